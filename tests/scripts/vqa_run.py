"""A small drawn VQA v2 with its index and sentencepiece model, made once a session, and ways to call the program."""

import functools
import hashlib
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch

import run_beit3_finetuning
from models.beit3.config import model_names
from scripts import draw_scenes, make_index, train_sentencepiece
from tests.scripts import bad_inputs

MODEL = next(name for name in model_names() if name.startswith("beit3_tiny_"))
STEM, SIDE, PATCH = MODEL.rpartition("_")[0], int(MODEL.rpartition("_")[2]), int(re.search(r"patch(\d+)", MODEL)[1])
LARGER = f"{STEM}_{SIDE + PATCH}"  # the same model at another image size
_folder: list[tempfile.TemporaryDirectory] = []  # kept until the session ends, which removes it


@functools.cache
def drawn_data() -> Path:
    """Data folder: 40 train, 24 val (12 of them rest_val) and 12 test images, six questions each; do not change it."""
    _folder.append(tempfile.TemporaryDirectory())
    data = Path(_folder[0].name) / "vqav2"
    draw_scenes.main(["--output", str(data), "--num_train", "40", "--num_val", "24", "--num_test", "12"])
    questions = sorted(map(str, (data / "vqa").glob("*_questions.json")))
    train_sentencepiece.main(["--input", *questions, "--output", str(data / "beit3.spm")])
    make_index.main(["--data_path", str(data), "--num_rest_val_images", "12", "--min_answer_count", "5"])
    return data


@functools.cache
def trained_checkpoint() -> Path:
    """checkpoint-step2 of a run of two steps on ``drawn_data``; do not change it."""
    output = drawn_data().parent / "trained"
    program(*train_flags(output, "--max_steps", "2"))
    return output / "checkpoint-step2"


def flags(*more: str, data: Path | None = None) -> list[str]:
    """What every call needs."""
    required = ["--task", "vqav2", "--model", MODEL, "--data_path", str(data or drawn_data())]
    return [*required, "--device", "cpu", "--num_workers", "0", *map(str, more)]


def train_flags(output: Path, *more: str, data: Path | None = None) -> list[str]:
    """Four samples a step, no augmentation beyond the crop; later flags win."""
    return flags("--output_dir", str(output), "--batch_size", "4", "--epochs", "1", *more, data=data)


def eval_flags(weights: Path, output: Path, *more: str, data: Path | None = None) -> list[str]:
    """An evaluation of ``weights``."""
    return flags("--eval", "--finetune", str(weights), "--output_dir", str(output), *more, data=data)


def program(*argv: str) -> None:
    """Call the run script in this process, with one thread as the other tests' processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_beit3_finetuning.main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


def failure(capsys: pytest.CaptureFixture, argv: list[str]) -> tuple[int, str]:
    """``bad_inputs.failure`` of this program."""
    return bad_inputs.failure(capsys, argv, program)


def tree(*folders: Path) -> dict[str, str]:
    """Every file below the folders with its checksum, to show that nothing was written."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_lines(path: Path) -> list[dict]:
    """Objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def differences(one: object, other: object, place: str = "") -> list[str]:
    """Where two nested values differ, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [] if one.keys() == other.keys() else [f"{place}: other keys"]
        return found + [
            text for key in one.keys() & other.keys() for text in differences(one[key], other[key], f"{place}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        found = [] if len(one) == len(other) else [f"{place}: other length"]
        pairs = enumerate(zip(one, other, strict=False))
        return found + [text for index, (a, b) in pairs for text in differences(a, b, f"{place}/{index}")]
    return [] if one == other else [f"{place}: {one} and {other}"]
