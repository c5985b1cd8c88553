"""Every benchmark through its whole code at a tiny size, with and without its peers; and the page of results.

Benchmarks copy their process off, which wants one that has not computed anything: they run as programs of their own.
"""

import math
import re
import subprocess

import pytest

from benchmarks import run_all
from benchmarks.measure import in_own_process
from benchmarks.results_page import BEGIN, END, render, update_page
from benchmarks.rows import NOT_INSTALLED, Curve, Row, exponent
from benchmarks.targets import TARGETS
from data.errors import DataError
from data.files import read_json
from tests.helpers import run_program
from tests.paths import ROOT

# packages of the peers, all of which requirements-dev.txt asks for
PEERS = {"torchscale": "torchscale", "transformers": "transformers", "peft": "peft", "opencv-python-headless": "cv2"}


def assert_finite(entry: dict) -> None:
    numbers = [entry["ours"], entry["peer"]]
    if "x" in entry:
        numbers = [*entry["ours"], *(entry["peer"] or [])]
    assert numbers[0] is not None
    assert all(math.isfinite(value) and value > 0 for value in numbers if value is not None), entry
    assert (entry["state"] == NOT_INSTALLED) == bool(entry["peer_name"] and entry["peer"] is None), entry


def test_quick_runs_every_benchmark_beside_its_peer_and_leaves_the_page_alone(tmp_path):
    page = (ROOT / "benchmarks/RESULTS.md").read_bytes()
    command = ["bash", "benchmarks/run_all.sh", "--quick", "--devices", "cpu", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    content = read_json(tmp_path / "cpu.json")
    entries = [*content["rows"], *content["curves"]]
    assert {entry["job"] for entry in entries} == {job.name for job in run_all.JOBS if job.cpu is not None}
    assert content["failures"] == {}
    for entry in entries:
        assert_finite(entry)
        assert entry["state"] == "measured", f"{entry['what']}: {entry['peer_name']} is in requirements-dev.txt"
        assert entry["check"] or entry["what"] == "write weights and moments"
    memory = [row for row in content["rows"] if row["ours_mib"] is not None]
    assert {row["job"] for row in memory} == {"beit3_step", "vle_step", "llava_step", "adaptive"}
    assert all(row["ours_mib"] > 0 and row["peer_mib"] > 0 for row in memory)
    assert {c["what"].partition(":")[0] for c in content["curves"]} == {"length", "batch", "image", "processes"}
    run = content["runs"][0]
    assert run["commit"]
    assert run["peak_tflops"] > 0
    assert {"torch", "transformers", "torchscale", "peft"} <= run["versions"].keys()
    assert (ROOT / "benchmarks/RESULTS.md").read_bytes() == page
    table = render({"cpu": content})
    assert all(entry["what"] in table for entry in entries)


def test_the_peers_are_required_for_the_tests():
    text = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    assert [name for name in PEERS if not re.search(rf"^{re.escape(name)}\b", text, re.MULTILINE)] == []


def test_without_its_peer_ours_is_measured_and_the_row_says_so(tmp_path):
    jobs = ["beit3_step", "vle_step", "vle_text", "llava_step", "captions", "answers", "data"]
    # None in sys.modules: neither found nor importable, also in the processes that are copied off
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({list(PEERS.values())}))\n"
        "from benchmarks.run_all import main; raise SystemExit(main(sys.argv[1:]))"
    )
    done = run_program("-c", code, "--quick", "--devices", "cpu", "--output_dir", str(tmp_path), "--only", *jobs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read_json(tmp_path / "cpu.json")["rows"]
    assert {row["job"] for row in rows} == set(jobs)
    for row in rows:
        assert_finite(row)
        assert (row["state"], row["peer"], row["ratio"], row["check"]) == (NOT_INSTALLED, None, None, "")
    assert NOT_INSTALLED in render({"cpu": {"runs": [], "rows": [{**row, "run": 0} for row in rows], "curves": []}})


def test_sides_that_compute_something_else_are_not_timed(tmp_path):
    code = (
        "import sys, models.vle.deberta as deberta, torch\n"
        "forward = deberta.DebertaV2.forward\n"
        "deberta.DebertaV2.forward = lambda self, *inputs: forward(self, *inputs) * 1.01\n"
        "from benchmarks.run_all import main; raise SystemExit(main(sys.argv[1:]))"
    )
    flags = ["--quick", "--devices", "cpu", "--output_dir", str(tmp_path), "--only", "vle_text", "boxes"]
    done = run_program("-c", code, *flags)
    assert done.returncode == 1
    assert "failed: vle_text on cpu" in done.stderr
    content = read_json(tmp_path / "cpu.json")
    assert "outputs differ by" in content["failures"]["vle_text"]
    assert [row["job"] for row in content["rows"]] == ["boxes", "boxes"]  # the others go on, with all their rows


# --- the page ---------------------------------------------------------------------------------------------------------


def row(what: str, job: str, ours: float, **more) -> dict:
    values = Row("steps", what, "tiny", ours, "somebody", **more).as_dict()
    return {**values, "job": job, "run": 0, "command": "bench_x.py", "load_before": 0.0, "load_after": 0.0}


def content(*rows: dict, commit: str = "abc", curves: tuple = ()) -> dict:
    run = {"device": "cpu", "processor": "P", "cores": 2, "threads": 2, "memory_gib": 8, "gpu": None, "date": "today"}
    run |= {"peak_dtype": "float32", "peak_tflops": 0.1, "versions": {"torch": "2"}, "commit": commit}
    return {"runs": [run], "rows": list(rows), "curves": list(curves)}


def test_a_column_without_a_run_is_not_measured():
    lines = render({"cpu": content(row("step", "a", 0.5, peer=1.0))}).splitlines()
    line = next(line for line in lines if line.startswith("| step |"))
    assert "| 500 ms | 1 s | **2.00** | not measured |" in line


def test_a_run_on_another_machine_fills_its_own_column():
    results = {"cpu": content(row("step", "a", 0.5, peer=1.0)), "cuda": content(row("step", "a", 0.001, peer=0.004))}
    line = next(line for line in render(results).splitlines() if line.startswith("| step |"))
    assert "**2.00**" in line
    assert "| 1 ms | 4 ms | **4.00** |" in line


@pytest.mark.parametrize(
    ("what", "values", "line"),
    [
        ("beit3_base_patch16_480 vqav2: train step", {"ours": 1.0, "peer": 3.6}, "3.60 times as fast | yes |"),
        ("beit3_base_patch16_480 vqav2: train step", {"ours": 1.0, "peer": 3.4}, "3.40 times as fast | **no** |"),
        ("SpotTune: train step, beside Standard", {"ours": 1.5, "peer": 1.0}, "1.50 of its time | yes |"),
        ("SpotTune: train step, beside Standard", {"ours": 1.7, "peer": 1.0}, "1.70 of its time | **no** |"),
        ("VL-BERT: sample to batch", {"ours": 1e-3, "peer": 1.0}, "1,000 a second | **no** |"),
        ("VL-BERT: sample to batch", {"ours": 5e-5, "peer": 1.0}, "20,000 a second | yes |"),
        ("vle_base_384 vqav2: train step", {"ours": 1.0}, "not measured |  |"),
    ],
)
def test_a_target_stands_beside_what_was_measured(what, values, line):
    table = render({"cpu": content(row(what, "job", values.pop("ours"), **values))}).partition("### Targets")[2]
    (found,) = [text for text in table.splitlines() if text.startswith(f"| {what} |") and "| CPU |" in text][:1]
    assert line in found


def test_every_target_names_a_row_of_the_benchmarks():
    names = {entry["what"] for entry in read_json(ROOT / "benchmarks/measured/cpu.json")["rows"]}
    assert {target.what for target in TARGETS if target.device == "cpu"} <= names


def test_a_part_of_the_benchmarks_replaces_its_rows_and_keeps_the_others_with_their_commit():
    older = content(row("one", "beit3_step", 1.0), row("gone", "vle_step", 2.0), commit="old")
    merged = run_all.merge(older, content(row("new", "vle_step", 3.0), commit="new"))
    found = {entry["what"]: merged["runs"][entry["run"]]["commit"] for entry in merged["rows"]}
    assert found == {"one": "old", "new": "new"}
    again = run_all.merge(merged, content(row("x", "beit3_step", 1.0), commit="newest"))
    assert {run["commit"] for run in again["runs"]} == {"new", "newest"}


def test_the_page_keeps_what_stands_around_the_tables(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    curve = Curve("length: seconds", "tiny", "tokens", [1, 2, 4], [1.0, 2.0, 4.0]).as_dict()
    curve |= {"job": "scaling", "run": 0, "command": "bench_y.py", "load_before": 0.0, "load_after": 0.0}
    results = {"cpu": content(row("step", "a", 0.5), curves=(curve,))}
    update_page(page, results)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| length: seconds | CPU | 1, 2, 4 tokens | 1 s, 2 s, 4 s | – | 1.00 |" in text
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    update_page(page, results)
    assert page.read_text(encoding="utf-8") == text


def test_a_page_without_marker_lines_is_refused(tmp_path):
    (tmp_path / "RESULTS.md").write_text("text\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no lines"):
        update_page(tmp_path / "RESULTS.md", {})


def test_exponents():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([5], [1]) is None


# --- processes --------------------------------------------------------------------------------------------------------


def grow(mib: int) -> float:
    from benchmarks.measure import PeakMemory

    peak = PeakMemory()
    block = bytearray(b"x" * (mib << 20))
    del block
    return peak.mib()


def leave(code: int) -> None:
    import os

    os._exit(code)


def test_peak_memory_counts_what_was_freed_again():
    found = in_own_process(grow, 64, device="cuda")  # started anew, as for a GPU, but without one
    assert 64 <= found < 3 * 64


def test_a_process_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="ended with code 7"):
        in_own_process(leave, 7, device="cuda")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_own_process(divmod, 1, 0, device="cuda")


def test_an_unknown_name_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_all.main(["--only", "nothing"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_program_is_in_the_list():
    programs = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert programs == {job.program for job in run_all.JOBS}
