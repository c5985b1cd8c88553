"""Seconds of a step that ``--dry_run`` predicts, beside those of the run itself: the same command with and without it.

    python benchmarks/bench_forecast.py --threads 2

BEiT-3 from random weights on drawn scenes, through the whole program: decoding, augmentation, one process. The first
step of the run is left out, which warms up; so does the forecast, which is taken from the second of its two steps.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.flags import add_shared_flags
from benchmarks.rows import Result, Row, load_average, write_result
from data.files import iterate_jsonl

NUM_IMAGES = 60
PREDICTED = re.compile(r"^predicted: (\S+) s a step", re.MULTILINE)


def call(threads: int, *command: str) -> str:
    """Run one of the programs to its end; what it said on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stderr


def prepare(args: argparse.Namespace, folder: Path) -> list[str]:
    """Scenes, tokenizer and index; the command of the run."""
    data, tokenizer = folder / "data", folder / "data" / "beit3.spm"
    scenes = ("--num_train", str(NUM_IMAGES), "--num_val", "4", "--num_test", "4", "--seed", "0")
    call(args.threads, "scripts/draw_scenes.py", "--layout", "vqav2", "--output", str(data), *scenes)
    questions = data / "vqa" / "v2_OpenEnded_mscoco_train2014_questions.json"
    call(args.threads, "scripts/train_sentencepiece.py", "--output", str(tokenizer), "--input", str(questions))
    found = ("--data_path", str(data), "--sentencepiece_model", str(tokenizer))
    call(args.threads, "scripts/make_index.py", "vqav2", *found)
    command = ["run_beit3_finetuning.py", "--task", "vqav2", "--model", args.model, "--finetune", "", *found]
    command += [
        "--device",
        args.device,
        "--batch_size",
        str(args.batch_size),
        "--num_workers",
        "1",
        "--max_steps",
        str(args.steps),
    ]
    return [*command, "--log_every", "1", "--no_validation", "--amp", "no" if args.device == "cpu" else "bf16"]


def measure(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds of a step as predicted and as they were, medians of runs in turns."""
    command, predicted, seen = prepare(args, folder), [], []
    for number in range(args.rounds):
        output = folder / f"run{number}"
        said = PREDICTED.search(call(args.threads, *command, "--output_dir", str(output), "--dry_run"))
        if said is None:
            raise SystemExit("error: the dry run predicted nothing")
        predicted.append(float(said[1]))
        call(args.threads, *command, "--output_dir", str(output))
        rows = [row for _, row in iterate_jsonl(output / "metrics.jsonl")]
        seen.append(statistics.median(args.batch_size / row["samples_per_s"] for row in rows[1:]))
    return statistics.median(predicted), statistics.median(seen)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="beit3_base_patch16_224")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of each run")
    add_shared_flags(parser, rounds=2)
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="forecast-") as folder:
        predicted, seen = measure(args, Path(folder))
    print(
        f"{args.model}, batch {args.batch_size}, {args.device}: {predicted:.3g} s a step predicted, {seen:.3g} s "
        f"in the run ({predicted / seen - 1:+.0%}); load average {load:.1f} before, {load_average():.1f} after"
    )
    setting = f"batch {args.batch_size}, runs of {args.steps} steps"
    check = "the same command with and without --dry_run"
    row = Row("forecast", f"{args.model} vqav2: train step", setting, predicted, "the run itself", seen, check)
    return write_result(args.json, Result([row]), vars(args))


if __name__ == "__main__":
    main()
