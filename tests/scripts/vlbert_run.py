"""VL-BERT on the drawn VQA v2 with regions, made once a session, and ways to call its programs."""

import functools
from pathlib import Path
from typing import Any

import torch

from scripts import draw_scenes
from scripts.vqa import test as test_program
from scripts.vqa import train_end2end
from tests.fault_points import run_with_fault
from tests.nursery import Ended, Job, Nursery
from tests.scripts.vqa_run import drawn_data

STRATEGIES = ("standard", "pretrained_frozen", "last_1", "specific_k", "SpotTune", "SpotTune_Block", "BlockDrop")
WITH_POLICY = STRATEGIES[-3:]
LAYERS, HEADS = 3, 2
_SIZES = {"visual_size": 16, "hidden_size": 16, "num_attention_heads": HEADS, "intermediate_size": 24}


@functools.cache
def drawn_regions() -> Path:
    """Data folder: 40 train, 24 val and 12 test images with regions, six questions each; do not change it."""
    data = drawn_data().parent / "vlbert"
    draw_scenes.main(["--output", str(data), "--regions", "--num_train", "40", "--num_val", "24", "--num_test", "12"])
    return data


def settings(data: Path | None = None) -> dict[str, Any]:
    """Sizes smaller than those of the shipped config, and the places."""
    folder = data or drawn_regions()
    chosen: dict[str, Any] = {
        "DATASET.DATASET_PATH": folder,
        "NETWORK.BERT_MODEL_NAME": folder / "bert_drawn",
        "NETWORK.IMAGE_FINAL_DIM": 16,
        "NETWORK.VLBERT.num_hidden_layers": LAYERS,
        "NETWORK.VLBERT.FROZEN_LAYERS": "[0, 2]",
        "NETWORK.VLBERT.hidden_dropout_prob": 0.1,
        "POLICY.VLBERT.num_hidden_layers": 1,
        "TRAIN.BATCH_IMAGES": 5,
        "TRAIN.GRAD_ACCUMULATE_STEPS": 2,
        "TRAIN.END_EPOCH": 1,
        "TRAIN.WD": 0.1,
        "POLICY.WD": 0.1,
        "TRAIN.WARMUP_STEPS": 2,
        "POLICY.WARMUP_STEPS": 2,
        "VAL.BATCH_IMAGES": 25,
        "TEST.BATCH_IMAGES": 25,
    }
    for part in ("NETWORK", "POLICY"):
        chosen |= {f"{part}.VLBERT.{name}": value for name, value in _SIZES.items()}
    return chosen


def _flags(model_dir: Path, strategy: str, data: Path | None, more: tuple[object, ...]) -> list[str]:
    chosen = [f"--set={name}={value}" for name, value in settings(data).items()]
    argv = ["cfgs/vqa/drawn.yaml", model_dir, "--strategy", strategy, *chosen, "--device", "cpu", *more]
    return [str(flag) for flag in argv]


def train_flags(model_dir: Path, *more: object, strategy: str = "standard", data: Path | None = None) -> list[str]:
    """Ten samples a step in micro-batches of five, one epoch, random weights, 60 questions."""
    always = ("--from_scratch", "--build_answers", 5, "--no_tensorboard", "--limit_samples", 60, "--lr", 1e-2)
    return _flags(model_dir, strategy, data, (*always, *more))


def predict_flags(model_dir: Path, *more: object, strategy: str = "standard", data: Path | None = None) -> list[str]:
    """A prediction of the run that ``train_flags`` asks for."""
    return _flags(model_dir, strategy, data, more)


def run_dir(model_dir: Path, strategy: str = "standard") -> Path:
    """Where a run of ``train_flags`` writes."""
    return model_dir / "output" / "vl-bert" / "vqa" / f"drawn_{strategy}" / "train2014_train"


def _with_one_thread(main: Any, argv: tuple[object, ...]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


def program(*argv: object) -> None:
    """Call the training program in this process, with one thread as the other tests' processes have."""
    _with_one_thread(train_end2end.main, argv)


def predict(*argv: object) -> None:
    """Call the prediction program likewise."""
    _with_one_thread(test_program.main, argv)


@functools.cache
def trained_run(strategy: str = "standard") -> Path:
    """Output folder of a run of one epoch; do not change it."""
    model_dir = drawn_data().parent / "vlbert_runs"
    program(*train_flags(model_dir, strategy=strategy))
    return run_dir(model_dir, strategy)


def open_nursery() -> Nursery:
    """A nursery that has imported the program."""
    return Nursery("scripts.vqa.train_end2end", "tests.fault_points")


def start(nursery: Nursery, world_size: int, argv: list[str], stderr: Path, *fault: Any) -> Ended:
    """Run the training program in processes of its own; ``fault``: place, rank, occasion, happening."""
    usual = ("", 0, 1, "kill")
    arguments = (argv, *fault, *usual[len(fault) :], train_end2end.main)
    return nursery.run(Job(run_with_fault, arguments, stderr, world_size))
