"""Evaluations of the program that were killed: the same command goes on and ends as an unbroken one."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessExitedException

from scripts import beit3_vqa
from tests.helpers import run_in_processes, run_program
from tests.scripts.vqa_run import drawn_data, eval_flags, failure, program, read_lines, trained_checkpoint, tree

SAMPLES, BATCH_SIZE, KILLED_AT = 26, 4, 3
BATCHES = {1: 7, 2: 4}  # of the first process
RESULTS = ("submit_vqav2_val.json", "top_answers_vqav2_val.jsonl", "result_vqav2_val.json")


def flags(output, *more):
    cut = ["--limit_samples", str(SAMPLES), "--eval_batch_size", str(BATCH_SIZE), "--eval_split", "val"]
    return [str(flag) for flag in eval_flags(trained_checkpoint(), output, *cut, *more)]


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def results(folder):
    return [(folder / name).read_bytes() for name in RESULTS]


def count_forward_passes(monkeypatch):
    calls, original = [], beit3_vqa._forward
    monkeypatch.setattr(beit3_vqa, "_forward", lambda *arguments: (calls.append(1), original(*arguments))[1])
    return calls


_KILLS_ITSELF = """
import os, signal, sys
import run_beit3_finetuning
from scripts import beit3_vqa
from scripts.program import run
where, argv = sys.argv[1], sys.argv[2:]
forward, replace, calls = beit3_vqa._forward, os.replace, []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_forward(*arguments):
    if where == str(len(calls)):
        die()
    calls.append(1)
    return forward(*arguments)

def killed_replace(source, target, **options):
    if os.path.basename(target) == where:
        die()
    replace(source, target, **options)

beit3_vqa._forward, os.replace = killed_forward, killed_replace
run(lambda: run_beit3_finetuning.main(argv))
"""


def kill(where, argv):
    """Run the program; it kills itself in the forward pass of this number, or before this file gets its name."""
    done = run_program("-c", _KILLS_ITSELF, str(where), *argv)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result files of an unbroken evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    program(*flags(folder))
    assert hidden(folder) == []
    return results(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of one that was killed after three batches; to be copied."""
    folder = tmp_path_factory.mktemp("killed")
    kill(KILLED_AT, flags(folder))
    assert hidden(folder) == [".lock-vqav2_val", ".partial-vqav2_val-rank0.jsonl"]  # nobody holds the lock any more
    assert len(read_lines(folder / hidden(folder)[1])) == 1 + KILLED_AT
    assert not any((folder / name).exists() for name in RESULTS)
    return folder


@pytest.fixture
def folder(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "killed"))


def test_the_same_command_goes_on_to_the_same_bytes_and_evaluates_the_rest_alone(folder, whole, monkeypatch, capsys):
    calls = count_forward_passes(monkeypatch)
    program(*flags(folder))
    assert results(folder) == whole
    assert hidden(folder) == []
    assert len(calls) == BATCHES[1] - KILLED_AT
    assert (
        f"goes on with an evaluation that was stopped: {KILLED_AT * BATCH_SIZE} of {SAMPLES} results of vqav2_val"
        in capsys.readouterr().err
    )
    program(*flags(folder))  # a finished one is evaluated anew
    assert len(calls) == 2 * BATCHES[1] - KILLED_AT


@pytest.mark.parametrize("name", [RESULTS[0], RESULTS[2]])
def test_a_stop_while_the_results_are_written_costs_no_forward_pass_and_leaves_nothing(
    folder, whole, name, monkeypatch
):
    kill(name, flags(folder))
    assert [left for left in hidden(folder) if left.startswith(f".{name}.tmp")]
    calls = count_forward_passes(monkeypatch)
    program(*flags(folder))
    assert calls == []
    assert results(folder) == whole
    assert hidden(folder) == []


def test_other_weights_discard_what_was_kept_and_say_so(folder, whole, tmp_path, monkeypatch, capsys):
    weights = Path(shutil.copytree(trained_checkpoint(), tmp_path / "weights"))
    os.utime(weights / "model.pth", ns=(1, 1))
    calls = count_forward_passes(monkeypatch)
    program(*flags(folder, "--finetune", weights))
    assert "discarded: it was another evaluation (other weights)" in capsys.readouterr().err
    assert len(calls) == BATCHES[1]
    assert results(folder) == whole  # the same numbers in another file


def test_no_auto_resume_evaluates_anew(folder, whole, monkeypatch, capsys):
    calls = count_forward_passes(monkeypatch)
    program(*flags(folder, "--no_auto_resume"))
    assert "discarded the results of an evaluation that was stopped (vqav2_val)" in capsys.readouterr().err
    assert len(calls) == BATCHES[1]
    assert results(folder) == whole


def test_other_splits_and_a_dry_run_leave_a_stopped_evaluation_alone(folder, whole, monkeypatch):
    kept = tree(folder)
    program(*flags(folder, "--dry_run"))
    assert tree(folder) == kept
    program(*flags(folder, "--eval_split", "test"))
    program(*flags(folder, "--shuffle_images"))
    assert kept.items() <= tree(folder).items()
    calls = count_forward_passes(monkeypatch)
    program(*flags(folder))
    assert len(calls) == BATCHES[1] - KILLED_AT
    assert results(folder) == whole


def test_a_picture_that_is_mended_after_the_stop_is_looked_at_again(tmp_path, whole, monkeypatch, capsys):
    data = tmp_path / "data"
    shutil.copytree(drawn_data() / "val2014", data / "val2014")
    for name in ("vqa.rest_val.jsonl", "beit3.spm"):
        shutil.copy(drawn_data() / name, data)
    first = data / read_lines(data / "vqa.rest_val.jsonl")[0]["image_path"]
    number = [row["image_path"] for row in read_lines(data / "vqa.rest_val.jsonl")[:SAMPLES]].count(
        str(first.relative_to(data))
    )
    first.write_bytes(b"")
    argv = flags(tmp_path / "out", "--data_path", data, "--skip_broken_images")
    kill(KILLED_AT, argv)
    calls = count_forward_passes(monkeypatch)
    shutil.copytree(tmp_path / "out", tmp_path / "still")
    program(*argv, "--output_dir", str(tmp_path / "still"))
    assert f"warning: {number} images could not be read and were replaced by a grey one" in capsys.readouterr().err
    assert results(tmp_path / "still") != whole
    again = len(calls)
    assert BATCHES[1] - KILLED_AT < again < BATCHES[1]
    shutil.copy(drawn_data() / first.relative_to(data), first)
    program(*argv)
    assert "replaced" not in capsys.readouterr().err
    assert results(tmp_path / "out") == whole
    assert len(calls) == 2 * again


# ---- two processes ----


def _evaluate_each(rank: int, calls: list[list[str]], die: tuple[int, int] | None = None) -> None:
    """Evaluations one after the other; ``die``: rank and number of the forward pass in which it is killed."""
    from engine import distributed

    original = beit3_vqa._forward
    for argv in calls:
        passes = []

        def forward(*arguments, passes=passes):
            distributed.barrier()  # so that the others have come as far
            if die == (rank, len(passes)):
                os.kill(os.getpid(), signal.SIGKILL)
            passes.append(1)
            return original(*arguments)

        beit3_vqa._forward = forward
        program(*argv)
        output = Path(argv[argv.index("--output_dir") + 1])
        (output / f"passes-{rank}").write_text(str(len(passes)))


def test_two_processes_of_which_one_is_killed_go_on_together_or_as_one(tmp_path, whole, monkeypatch):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_in_processes(_evaluate_each, 2, [flags(tmp_path / "killed")], (1, 2))
    assert len(list((tmp_path / "killed").glob(".partial-*"))) == 2
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    run_in_processes(_evaluate_each, 2, [flags(tmp_path / "unbroken"), flags(tmp_path / "killed")])
    assert results(tmp_path / "killed") == results(tmp_path / "unbroken")
    assert hidden(tmp_path / "killed") == []
    for name, expected in (("unbroken", BATCHES[2]), ("killed", BATCHES[2] - 2)):
        assert [(tmp_path / name / f"passes-{rank}").read_text() for rank in range(2)] == [str(expected)] * 2
    calls = count_forward_passes(monkeypatch)
    program(*flags(tmp_path / "alone"))
    assert len(calls) == BATCHES[1] - 4  # 2 x 2 batches of 4 are the first 16 samples
    chosen, unbroken = (json.loads(content) for content in (results(tmp_path / "alone")[0], whole[0]))
    assert chosen == unbroken
    assert hidden(tmp_path / "alone") == []


# ---- what cannot be evaluated ----


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"own\.jsonl is empty"),
        ([7, 7], r"own\.jsonl:2: question_id 7 stands at .*own\.jsonl:1 already; ids are unique"),
    ],
)
def test_an_empty_split_and_repeated_ids_are_one_line(tmp_path, capsys, lines, message):
    image = next((drawn_data() / "val2014").iterdir()).relative_to(drawn_data())
    rows = [{"image": str(image), "question": "what is it?", "question_id": number} for number in lines]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, line = failure(capsys, flags(tmp_path / "out", "--eval_split", tmp_path / "own.jsonl"))
    assert code == 2
    assert re.search(message, line), line
    assert hidden(tmp_path / "out") == []


def test_an_answer_that_is_not_finite_is_one_line_and_what_was_kept_stays(folder, whole, monkeypatch, capsys):
    original = beit3_vqa._forward
    monkeypatch.setattr(beit3_vqa, "_forward", lambda *arguments: original(*arguments) * float("nan"))
    code, line = failure(capsys, flags(folder))
    assert code == 1
    assert re.search(r"question \d+: the model's answer is not a finite number; .*try --amp no", line), line
    monkeypatch.undo()
    calls = count_forward_passes(monkeypatch)
    program(*flags(folder))
    assert len(calls) == BATCHES[1] - KILLED_AT
    assert results(folder) == whole
