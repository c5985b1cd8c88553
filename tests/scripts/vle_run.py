"""VLE on the drawn VQA v2: rows and an untrained tiny model folder, made once a session; ways to call the program."""

import functools
import json
import shutil
from pathlib import Path

import torch

import run_vle_vqa
from scripts import train_sentencepiece, write_vqa
from tests.paths import ROOT
from tests.scripts.vqa_run import drawn_data

TINY_CONFIG = ROOT / "scripts" / "cfgs" / "vle" / "tiny" / "config.json"


@functools.cache
def drawn_rows() -> Path:
    """Folder of row files made from ``drawn_data``; do not change it."""
    rows = drawn_data().parent / "vle_rows"
    places = ["--data_path", str(drawn_data()), "--output_path", str(rows)]
    write_vqa.main([*places, "--num_rest_val_images", "12", "--min_answer_count", "5"])
    return rows


@functools.cache
def model_folder() -> Path:
    """Model folder of a tiny VLE without weights, smaller than the shipped one; do not change it."""
    folder = drawn_data().parent / "vle_tiny"
    folder.mkdir()
    config = json.loads(TINY_CONFIG.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    config["vision_config"] |= {"image_size": 32, "patch_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    questions = sorted(map(str, (drawn_data() / "vqa").glob("*_questions.json")))
    train_sentencepiece.main(["--layout", "deberta", "--input", *questions, "--output", str(folder / "spm.model")])
    return folder


@functools.cache
def trained_run() -> Path:
    """Output folder of a run of one epoch with prediction of the test split; do not change it."""
    output = drawn_data().parent / "vle_trained"
    program(*train_flags(output, "--limit_samples", "60"))
    return output


def flags(*more: object, model: Path | None = None, rows: Path | None = None) -> list[str]:
    """What every call needs; later flags win."""
    required = [
        "--model_dir",
        model or model_folder(),
        "--data_root",
        rows or drawn_rows(),
        "--image_root",
        drawn_data(),
    ]
    required += ["--image_size", 32, "--max_text_len", 32, "--precision", 32, "--use_deepspeed", "false"]
    required += ["--device", "cpu", "--num_workers", 0, "--no_tensorboard", "--save_top_k", 1]
    return [str(flag) for flag in (*required, *more)]


def train_flags(output: Path, *more: object, **which: object) -> list[str]:
    """Ten samples a step in micro-batches of five, one epoch, from random weights."""
    few = ["--batch_size", 10, "--per_gpu_batchsize", 5, "--max_epoch", 1, "--learning_rate", 1e-3, "--lr_mult_head", 1]
    return flags("--output_dir", output, "--from_scratch", *few, *more, **which)


def eval_flags(weights: Path, output: Path, *more: object, **which: object) -> list[str]:
    """A prediction with ``weights``."""
    return flags("--test_only", "true", "--output_dir", output, *more, model=weights, **which)


def program(*argv: object) -> None:
    """Call the run script in this process, with one thread as the other tests' processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_vle_vqa.main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


def copy_of(folder: Path, place: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(folder, place))
