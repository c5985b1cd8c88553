"""LLaVA's training program on the tiny recorded model and its images, made once a session, and ways to call it."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import run_llava_lora
from tests.fault_points import run_with_fault
from tests.nursery import Ended, Job, Nursery
from tests.paths import FIXTURES
from tests.scripts.vqa_run import drawn_data

TINY = FIXTURES / "llava_tiny"
BASE, TOWER, IMAGES = TINY / "llava", TINY / "clip", TINY / "images"
ANSWERS = ("a cup", "unanswerable", "the red dog is here", "no")


def conversation(number: int, answer: str, image: str | None) -> dict[str, Any]:
    """A row of the training file; questions differ in length."""
    question = "what is this" + " thing" * (number % 5)
    place = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": f"{place}{question}"}, {"from": "gpt", "value": answer}]
    return {"id": f"s{number}", "conversations": turns} | ({} if image is None else {"image": image})


def rows(count: int = 16, *, texts: bool = True) -> list[dict[str, Any]]:
    """Samples over the three images; every fourth has none."""
    names = sorted(path.name for path in IMAGES.iterdir())
    return [
        conversation(n, ANSWERS[n % 4], None if texts and n % 4 == 3 else names[n % len(names)]) for n in range(count)
    ]


@functools.cache
def training_file() -> Path:
    """16 samples, four of them without an image; do not change it."""
    path = drawn_data().parent / "train_for_llava.json"
    path.write_text(json.dumps(rows()))
    return path


def train_flags(output: Path, *more: object, model: Path | None = None, data: Path | None = None) -> list[str]:
    """Four samples a step in micro-batches of two, one epoch; later flags win."""
    required = ["--model_name_or_path", model or BASE, "--data_path", data or training_file(), "--image_folder", IMAGES]
    required += ["--output_dir", output, "--device", "cpu", "--dataloader_num_workers", 0, "--lora_r", 4]
    required += ["--lora_alpha", 8, "--learning_rate", 1e-2, "--mm_projector_lr", 1e-3, "--logging_steps", 1]
    required += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    return [str(flag) for flag in (*required, *more)]


def program(*argv: object) -> None:
    """Call the run script in this process, with one thread as the other tests' processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_llava_lora.main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


@functools.cache
def trained_run() -> Path:
    """Output folder of a run of one epoch; do not change it."""
    output = drawn_data().parent / "llava_trained"
    program(*train_flags(output))
    return output


def copy_of(folder: Path, place: Path) -> Path:
    """A copy to be spoilt; the recorded base keeps its tower beside it."""
    return Path(shutil.copytree(folder, place))


def start(nursery: Nursery, world_size: int, argv: list[str], stderr: Path, *fault: Any) -> Ended:
    """Run the program in processes of its own; ``fault``: place, rank, occasion, happening."""
    usual = ("", 0, 1, "kill")
    arguments = (argv, *fault, *usual[len(fault) :], run_llava_lora.main)
    return nursery.run(Job(run_with_fault, arguments, stderr, world_size))
