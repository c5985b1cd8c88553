import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing import ProcessExitedException

from data.loader import build_eval_loader
from engine import distributed
from engine.errors import EngineError, RunError
from engine.evaluation import forward_batches
from engine.partial_results import PartialResults, weights_identity
from tests.helpers import run_in_processes, run_program
from tests.paths import ROOT

KEY = {"weights": {"bytes": 3}, "split": "val", "sizes": (1, 2)}
IDS = range(100, 140)


def partial(folder, name="vqa_val", *, key=KEY, ids=IDS, **options):
    return PartialResults(folder, name, key, ids, **options)


def hidden(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith(".partial"))


def leftovers(folder):
    """All that is hidden, whoever wrote it."""
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith("."))


def left_by_a_stop(folder, results, **options):
    """The file of an evaluation that ended after these results."""
    stopped = partial(folder, **options)
    stopped.add(results)
    return Path(folder) / hidden(folder)[0]


# ---- what is found again ----


def test_results_and_floats_come_back_exactly(tmp_path):
    values = {100: 0.1 + 0.2, 101: 5e-324, 102: 1 / 3, 103: float(torch.tensor(0.1)), 104: math.pi * 1e300}
    left_by_a_stop(tmp_path, {index: {"top": [[7, value]], "text": "é"} for index, value in values.items()})
    again = partial(tmp_path, ids=values)
    assert again.found == values.keys()
    assert again.gather() == {index: {"top": [[7, value]], "text": "é"} for index, value in values.items()}


def test_one_line_says_how_much_was_found(tmp_path, capsys):
    partial(tmp_path)
    assert capsys.readouterr().err == ""
    left_by_a_stop(tmp_path, {101: 1.0, 102: 2.0})
    partial(tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        "goes on with an evaluation that was stopped: 2 of 40 results of vqa_val are there already"
    ]


def test_a_known_result_wins_over_one_that_was_computed_again(tmp_path):
    left_by_a_stop(tmp_path, {100: "known"})
    again = partial(tmp_path, ids=[100, 101])
    again.add({100: "again", 101: "new"})
    assert again.gather() == {100: "known", 101: "new"}
    assert partial(tmp_path, ids=[100, 101]).gather() == {100: "known", 101: "new"}


def test_results_that_are_not_to_be_kept_are_computed_again_after_a_stop(tmp_path):
    stopped = partial(tmp_path, ids=[1, 2])
    stopped.add({1: "provisional"}, keep=False)
    stopped.add({2: "kept"})
    assert stopped.gather() == {1: "provisional", 2: "kept"}
    assert partial(tmp_path, ids=[1, 2]).found == {2}


def test_a_line_that_the_stop_cut_off_is_passed_over(tmp_path):
    file = left_by_a_stop(tmp_path, {100: 1.0})
    whole = file.read_bytes()
    stopped = partial(tmp_path)
    stopped.add({101: 2.0})
    line = file.read_bytes()[len(whole) :]
    for cut in range(len(line)):
        file.write_bytes(whole + line[:cut])
        again = partial(tmp_path)
        assert again.found == {100}
        again.add({102: 3.0})  # what follows does not run into the torn line
        assert partial(tmp_path).found == {100, 102}
    file.write_bytes(whole + line)
    assert partial(tmp_path).found == {100, 101}


def test_a_file_without_a_whole_line_holds_nothing(tmp_path, capsys):
    for content in (b"", b'{"key": {"wei'):
        (tmp_path / ".partial-vqa_val-rank3.jsonl").write_bytes(content)
        assert partial(tmp_path).found == frozenset()
        assert hidden(tmp_path) == [".partial-vqa_val-rank0.jsonl"]
    assert capsys.readouterr().err == ""


def test_an_evaluation_stopped_again_and_again_loses_nothing(tmp_path):
    for index in IDS:
        stopped = partial(tmp_path)
        assert stopped.found == set(range(IDS.start, index))
        stopped.add({index: index / 7})
    assert partial(tmp_path).gather() == {index: index / 7 for index in IDS}


# ---- what is not taken over ----


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ({**KEY, "weights": {"bytes": 4}}, "other weights"),
        ({**KEY, "split": "test", "more": 1}, "other more, split"),
        ({"split": "val"}, "other sizes, weights"),
    ],
)
def test_results_of_another_evaluation_are_discarded_with_a_line(tmp_path, key, named, capsys):
    file = left_by_a_stop(tmp_path, {100: 1.0})
    assert partial(tmp_path, key=key).found == frozenset()
    said = capsys.readouterr().err
    assert said == (
        f"{file} holds results of an evaluation that was stopped, discarded: it was another evaluation ({named})\n"
    )
    assert partial(tmp_path).found == frozenset()  # gone for good


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.replace(b'"results": [[100', b'"results": [[100,'),
        lambda content: content.replace(b"[[100", b"[[999"),  # no id of this evaluation
        lambda content: content.replace(b'"results"', b'"other"'),
        lambda content: b"\0" * len(content) + b"\n",
        lambda content: b"[1]\n" + content,
        lambda content: b"\xff\xfe" + content,
        lambda content: content + b"[" * 100_000 + b"\n",
    ],
)
def test_a_damaged_file_is_discarded_with_a_line_and_the_others_stay(tmp_path, damage, capsys):
    file = left_by_a_stop(tmp_path, {100: 1.0})
    sound = tmp_path / ".partial-vqa_val-rank5.jsonl"
    sound.write_bytes(file.read_bytes().replace(b"[[100", b"[[105"))
    file.write_bytes(damage(file.read_bytes()))
    assert partial(tmp_path).found == {105}
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{file} holds results of an evaluation that was stopped, discarded: the file is damaged"
    assert len(said) == 2


def test_no_resume_starts_anew_with_a_line(tmp_path, capsys):
    left_by_a_stop(tmp_path, {100: 1.0})
    assert partial(tmp_path, resume=False).found == frozenset()
    assert "vqa_val): it starts anew" in capsys.readouterr().err
    assert partial(tmp_path).found == frozenset()


def test_evaluations_of_other_names_in_the_same_folder_are_left_alone(tmp_path):
    names = ("vqa_val", "vqa_val_shuffled_images", "vqa_val-rank1", "vqa_val[1]", "vqa_*")
    for number, name in enumerate(names):
        partial(tmp_path, name).add({100 + number: name})
    for number, name in enumerate(names):
        again = partial(tmp_path, name, ids=[100 + number])
        assert again.gather() == {100 + number: name}
        again.remove()
        assert len(hidden(tmp_path)) == len(names) - 1 - number


# ---- files ----


def test_nothing_is_left_at_the_end(tmp_path):
    for rank in (1, 2):
        (tmp_path / f".partial-vqa_val-rank{rank}.jsonl").write_text(json.dumps({"key": KEY}) + "\n")
    (tmp_path / ".writing-.partial-vqa_val-rank0.jsonl").write_bytes(b"torn")
    done = partial(tmp_path / "deeper" / "still", ids=[1])
    done.add({1: "a"})
    done.remove()
    assert list((tmp_path / "deeper" / "still").iterdir()) == []
    done = partial(tmp_path, ids=[1])
    assert hidden(tmp_path) == [".partial-vqa_val-rank0.jsonl"]
    done.add({1: "a"})
    done.remove()
    assert leftovers(tmp_path) == []


def test_the_same_evaluation_by_another_process_is_refused_and_loses_nothing(tmp_path):
    code = "import sys; from engine.partial_results import PartialResults\n"
    code += "from pathlib import Path\nPartialResults(Path(sys.argv[1]), sys.argv[2], {}, [1])"

    def started(name):
        return run_program("-c", code, str(tmp_path), name)

    first = partial(tmp_path, ids=[1, 2])
    first.add({1: "a"})
    assert f"another evaluation of the same (process {os.getpid()} on " in started("vqa_val").stderr
    assert started("vqa_test").stderr == ""
    first.add({2: "b"})
    assert partial(tmp_path, ids=[1, 2]).found == {1, 2}
    first.remove()
    ended = started("vqa_val")
    assert ended.returncode == 0, ended.stderr
    assert "another evaluation" not in ended.stderr


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = partial(None, ids=[1, 2])
    results.add({2: "b"})
    results.add({1: "a"})
    assert list(results.gather().items()) == [(1, "a"), (2, "b")]
    results.remove()
    assert leftovers(tmp_path) == []


def test_a_result_that_is_missing_is_an_error(tmp_path):
    results = partial(tmp_path, ids=[1, 2])
    results.add({1: "a"})
    with pytest.raises(EngineError, match="1 ids were evaluated instead of 2"):
        results.gather()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot keep results in \S+\.jsonl \(.+\): what was evaluated so far stays"):
        partial(tmp_path / "file")


_FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
from engine.errors import RunError
from engine.partial_results import PartialResults
results = PartialResults(Path(sys.argv[1]), "x", {}, range(100))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # stands for a full disk: a write is cut short, the next fails
for index in range(100):
    try:
        results.add({index: "v" * 100})
    except RunError as error:
        print(index, error)
        break
"""


def test_a_full_disk_is_one_line_and_what_was_kept_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _FILLS_THE_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    index, _, message = done.stdout.partition(" ")
    assert 5 < int(index) < 30
    kept = tmp_path / ".partial-x-rank0.jsonl"
    assert message.startswith(f"cannot keep results in {kept} (File too large): what was evaluated so far stays")
    assert len(message.splitlines()) == 1
    assert PartialResults(tmp_path, "x", {}, range(100)).found == set(range(int(index)))


# ---- evaluations that are really killed ----

SIZE, BATCH_SIZE = 41, 3
IDS_OF_ALL = range(100, 100 + SIZE)
KILLED_AT = {1: (0, 6), 2: (1, 3), 3: (0, 2)}  # number of processes: rank and number of the forward pass of its death


class Rows:
    """Samples of which each has a number."""

    def __len__(self):
        return SIZE

    def sample(self, index, rng):
        return index


def _collate(indices):
    return {"id": [100 + i for i in indices], "x": torch.tensor([[i, i * i] for i in indices], dtype=torch.float64)}


def num_batches(world_size):
    """Of the first process."""
    return math.ceil(math.ceil(SIZE / world_size) / BATCH_SIZE)


def _evaluate(rank: int, folders: list[str], die: tuple[int, int] | None = None) -> None:
    """Whole evaluations that write results.json and their numbers of forward passes; ``die``: see ``KILLED_AT``."""
    for folder in map(Path, folders):
        results = partial(folder, ids=IDS_OF_ALL)
        done = [index - 100 for index in results.found]
        places = {"rank": rank, "world_size": distributed.world_size()}
        loader = build_eval_loader(Rows(), _collate, BATCH_SIZE, **places, done=done)
        calls = []

        def forward(model, batch, calls=calls):
            distributed.barrier()  # so that nobody is killed before the others have come as far
            if die == (rank, len(calls)):
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(1)
            # what a sample gets depends on its batch: only batches that stay whole give the same again
            return model(batch["x"]).squeeze(1) * batch["x"].sum().sin()

        torch.manual_seed(0)
        model = nn.Linear(2, 1).double()
        for batch, values in forward_batches(model, loader, forward, device=torch.device("cpu")):
            results.add(dict(zip(batch["id"], values.tolist(), strict=True)))
        merged = results.gather()
        if distributed.is_main():
            time.sleep(0.2)  # the others, which have nothing to write, wait with the removal of their files
            assert len(hidden(folder)) == distributed.world_size()
            (folder / "results.json").write_text(json.dumps(list(merged.items())))
        results.remove()
        (folder / f"calls-{rank}").write_text(str(len(calls)))


def kept_in(folder):
    """Id → value in the files that a kill has left."""
    lines = [json.loads(line) for path in folder.glob(".partial-*") for line in path.read_text().splitlines()[1:]]
    return {index: value for line in lines for index, value in line["results"]}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Number of processes → folder of an evaluation that was killed."""
    folders = {world_size: tmp_path_factory.mktemp(f"killed-{world_size}") for world_size in KILLED_AT}
    for world_size, folder in folders.items():
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_in_processes(_evaluate, world_size, [str(folder)], KILLED_AT[world_size])
        assert len(hidden(folder)) == world_size
        assert not (folder / "results.json").exists()
    return folders


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_killed_evaluation_goes_on_with_any_number_of_processes(tmp_path, killed, world_size):
    folders = {before: tmp_path / str(before) for before in killed}
    for before, folder in folders.items():
        shutil.copytree(killed[before], folder)
    names = [str(tmp_path / "whole"), *map(str, folders.values())]
    if world_size == 1:
        _evaluate(0, names)
    else:
        run_in_processes(_evaluate, world_size, names)
    passes = {name: [int(Path(name, f"calls-{rank}").read_text()) for rank in range(world_size)] for name in names}
    assert passes[names[0]] == [num_batches(world_size)] * world_size
    whole = (tmp_path / "whole" / "results.json").read_bytes()
    for before, folder in folders.items():
        assert leftovers(folder) == []
        kept, found = kept_in(killed[before]), dict(json.loads((folder / "results.json").read_text()))
        at = KILLED_AT[before][1]
        assert len(kept) >= at * BATCH_SIZE * before
        assert list(found) == list(IDS_OF_ALL)
        assert {index: found[index] for index in kept} == kept  # no known result was replaced
        assert max(passes[str(folder)]) < num_batches(world_size)
        if before == world_size:
            assert (folder / "results.json").read_bytes() == whole
            assert passes[str(folder)] == [num_batches(world_size) - at] * world_size


def test_two_evaluations_at_once_do_not_disturb_each_other_not_even_in_one_folder(tmp_path):
    for folders in (("one", "two"), ("same", "same")):
        both = [partial(tmp_path / folder) for folder in folders]
        for index in IDS:
            for number, results in enumerate(both):
                results.add({index: [number, index]})
        for number, results in enumerate(both):
            assert results.gather() == {index: [number, index] for index in IDS}
            results.remove()
        assert all(leftovers(tmp_path / folder) == [] for folder in folders)


# ---- the identity of weights ----


def test_weights_are_told_apart_by_place_size_time_and_checksum(tmp_path):
    file = tmp_path / "model.pth"
    file.write_bytes(b"123")
    first = weights_identity(file)
    assert weights_identity(file) == first
    os.utime(file, ns=(1, 1))
    assert weights_identity(file) != first
    second = weights_identity(file)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"model.pth": {"bytes": 3, "crc32": 9}}}))
    assert weights_identity(file) != second
    third = weights_identity(tmp_path)
    assert third == weights_identity(file)
    (tmp_path / "result_vqav2_val.json").write_text("{}")  # an evaluation may write beside the weights
    assert weights_identity(tmp_path) == third
    (tmp_path / "more.safetensors").write_bytes(b"1")
    assert weights_identity(tmp_path) != third


def test_weights_that_are_not_there_have_no_identity(tmp_path):
    with pytest.raises(EngineError, match="cannot read .*absent.pth"):
        weights_identity(tmp_path / "absent.pth")
