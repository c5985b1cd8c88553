"""The files that a training step runs through: README's table against what a step calls."""

import importlib
import re
import sys
from pathlib import Path
from types import FrameType

import pytest

from tests.paths import ROOT
from tests.scripts import caption_run, llava_run, vlbert_run, vle_run, vqa_run

MOST = 8
OURS = [ROOT / room for room in ("models", "data", "engine", "scripts")]  # an environment may stand beside them
PROGRAMS = {
    "BEiT-3, questions": (vqa_run, "run_beit3_finetuning"),
    "BEiT-3, captions": (caption_run, "run_beit3_finetuning"),
    "VLE": (vle_run, "run_vle_vqa"),
    "VL-BERT, SpotTune": (vlbert_run, "scripts.vqa.train_end2end"),
    "LLaVA with adapters": (llava_run, "run_llava_lora"),
}


def documented() -> tuple[dict[str, list[str]], set[str]]:
    """The files of each row, and the shared pieces that the sentence above the table names."""
    text = (ROOT / "README.md").read_text().split("One training step, file by file")[1].split("\n\n1. ")[0]
    pieces, table = text.split("\n\n", 1)
    rows = dict(re.findall(r"^\| (\w[^|]+) \| ([^|]+) \|$", table, re.M))
    return {name: re.findall(r"`([\w/]+\.py)`", files) for name, files in rows.items() if name != "what"}, set(
        re.findall(r"`([\w/]+\.py)`", pieces)
    )


def files_of_a_step(name: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of ours with a function that is called while a loss is computed, in that order."""
    runner, program = PROGRAMS[name]
    module = importlib.import_module(program)
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and any(room in file.parents for room in OURS):
            found[file.relative_to(ROOT).as_posix()] = None

    def fit(backend, loader, loss_fn, *more, **rest):
        def noted(model, batch, step):
            sys.setprofile(note)
            try:
                return loss_fn(model, batch, step)
            finally:
                sys.setprofile(None)

        return own(backend, loader, noted, *more, **rest)

    own = module.fit
    monkeypatch.setattr(module, "fit", fit)
    which = {"strategy": "SpotTune"} if name.endswith("SpotTune") else {}
    one_step = "--stop_after" if runner is vle_run else "--max_steps"
    argv = [str(flag) for flag in runner.train_flags(output, one_step, 1, **which)]
    (vqa_run if runner is caption_run else runner).program(*argv)
    return list(found)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_runs_through_the_listed_files_and_no_more_than_eight(name, tmp_path, monkeypatch):
    listed, pieces = documented()
    called = files_of_a_step(name, tmp_path / "out", monkeypatch)
    program = PROGRAMS[name][1].replace(".", "/") + ".py"
    assert listed[name][:3] == [program, "engine/loop.py", "engine/backend.py"]
    assert listed[name][3:] == [file for file in called if file not in pieces]
    assert len(listed[name]) <= MOST


def test_every_row_has_a_program():
    assert documented()[0].keys() == PROGRAMS.keys()
