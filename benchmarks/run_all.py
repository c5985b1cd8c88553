"""Run every benchmark beside its peer; write one file of rows for each device, and the tables of RESULTS.md.

    bash benchmarks/run_all.sh                        # all; about half an hour on two cores
    bash benchmarks/run_all.sh --quick                # the same code at tiny sizes: whether it runs, not how fast
    bash benchmarks/run_all.sh --only vle_step data   # some; the other rows stay as they are
    bash benchmarks/run_all.sh --list                 # their names and commands

Each benchmark runs in a process of its own, one after the other. Rows go to ``<output_dir>/<device>.json``; a full run
also keeps them in ``benchmarks/measured/``, from where a run on another machine fills its own columns.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import importlib
import os
import shlex
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.rows import load_average, num_cores
from data.files import read_json, write_json_atomic
from scripts.arguments import OneLineParser, positive_int

FOLDER = Path(__file__).resolve().parent
MEASURED = FOLDER / "measured"
DEVICES = ("cpu", "cuda")
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
# imported once, before the processes are copied off, so that not each of them spends seconds on it
PEERS = (
    "transformers.models.clip.modeling_clip", "transformers.models.deberta_v2.modeling_deberta_v2",
    "transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava",
    "peft", "torchscale.model.BEiT3", "cv2",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A benchmark and its flags: on the CPU, on a GPU (None: not there), and at a tiny size."""

    name: str
    program: str
    cpu: str | None
    cuda: str | None
    quick: str
    takes_threads: bool = True
    takes_peak: bool = False  # of the device, for the utilisation


_BF16 = "--dtype bfloat16"
_7B = "--width 4096 --layers 32 --heads 32"
JOBS = (
    Job(
        "beit3_step", "bench_step", "--batch_size 2 --steps 5", f"{_BF16} --compile --batch_sizes 16 32 64 --steps 10",
        "--model beit3_tiny_patch32_64 --steps 1", takes_peak=True,
    ),
    Job(
        "beit3_large_step", "bench_step", None,
        f"--model beit3_large_patch16_480 {_BF16} --compile --batch_sizes 16 32 --steps 10",
        "--model beit3_tiny_patch32_64 --steps 1 --no_memory", takes_peak=True,
    ),
    Job(
        "beit3_captioning_step", "bench_step", "--task coco_captioning --batch_size 2 --steps 3",
        f"--task coco_captioning {_BF16} --compile --batch_sizes 16 32 64 --steps 10",
        "--task coco_captioning --model beit3_tiny_patch32_64 --steps 1 --no_memory", takes_peak=True,
    ),
    Job(
        "vle_step", "bench_step", "--family vle --batch_size 2 --steps 5",
        f"--family vle {_BF16} --batch_sizes 16 32 64 --steps 10", "--family vle --model vle_tiny --steps 1",
        takes_peak=True,
    ),
    Job(
        "vle_text", "bench_deberta", "--rounds 3", f"{_BF16} --batch_size 128",
        "--size tiny --batch_size 2 --tokens 6 --rounds 1",
    ),
    Job(
        "llava_step", "bench_llava", "--rounds 3",
        f"{_BF16} {_7B} --length 650 --batch_size 8 --rank 128 --rounds 3",
        "--width 64 --layers 1 --heads 1 --vocabulary 200 --length 24 --batch_size 2 --rank 2 --rounds 1",
        takes_peak=True,
    ),
    Job(
        "adaptive", "bench_adaptive", "--rounds 3", "--batch_size 64 --rounds 5",
        "--width 64 --batch_size 2 --regions 3 --words 3 --rounds 1",
    ),
    Job(
        "captions", "bench_generate", "--batch_size 4 --rounds 2", f"{_BF16} --compile --batch_size 32",
        "--model beit3_tiny_patch32_64 --batch_size 2 --words 3 --rounds 1",
    ),
    Job(
        "answers", "bench_answers", "--vision_width 768 --vision_layers 12 --batch_size 2 --rounds 3",
        f"{_BF16} {_7B} --batch_size 8 --words 32",
        "--width 64 --layers 1 --heads 1 --vocabulary 200 --image_size 28 --vision_width 64 --vision_layers 2 "
        "--batch_size 2 --words 3 --prompt 6 --rounds 1",
    ),
    Job("data", "bench_data", "", None, "--size 64 --num_images 2 --rounds 1", takes_threads=False),
    Job("boxes", "bench_boxes", "", None, "--images 4 --rounds 1", takes_threads=False),
    Job("checkpoint", "bench_checkpoint", "", "", "--model beit3_tiny_patch32_64 --rounds 1"),
    Job("forecast", "bench_forecast", "", "--batch_size 32", "--model beit3_tiny_patch32_96 --steps 3 --rounds 1"),
    Job(
        "scaling", "bench_scaling", "", f"{_BF16} --batch_sizes 8 16 32 64 --image_batch 8 --lengths 512 1024 2048",
        "--model beit3_tiny_patch32 --image_sizes 32 64 --batch_sizes 1 2 --lengths 16 32 --width 64 --layers 1 "
        "--heads 1 --vocabulary 200 --rank 2 --rounds 1",
    ),
    Job(
        "processes", "bench_processes", "", f"{_BF16} --batch_size 32",
        "--model beit3_tiny_patch32_32 --batch_size 1 --rounds 1 --processes 1 2",
    ),
)  # fmt: skip


def flags_of(job: Job, device: str, args: argparse.Namespace, peak_tflops: float | None) -> list[str]:
    """Command-line flags of one benchmark."""
    words = shlex.split(job.quick if args.quick else getattr(job, device))
    if device == "cuda":
        words += ["--device", "cuda"]
    if job.takes_threads:
        words += ["--threads", str(args.threads)]
    if job.takes_peak and peak_tflops:
        words += ["--peak_tflops", f"{peak_tflops:.4g}"]
    return words


def run_job(program: str, words: list[str]) -> tuple[list[dict], list[dict]]:
    """Rows and curves of one benchmark; called in a process of its own."""
    result = importlib.import_module(f"benchmarks.{program}").main(words)
    return [row.as_dict() for row in result.rows], [curve.as_dict() for curve in result.curves]


def import_peers() -> None:
    """Those that are installed."""
    import torch  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PEERS:
            with suppress(ImportError):
                importlib.import_module(name)


def run_device(device: str, jobs: list[Job], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all benchmarks of a device; the content of its file, which is written anew after each of them."""
    from benchmarks import machine
    from benchmarks.measure import in_own_process

    size = 256 if args.quick else MATRIX_SIZE[device]
    run = in_own_process(machine.describe, device, args.threads, size, device=device)
    content: dict[str, Any] = {"quick": args.quick, "runs": [run], "rows": [], "curves": [], "failures": {}}
    for number, job in enumerate(jobs, start=1):
        words = flags_of(job, device, args, run["peak_tflops"])
        print(f"\n[{device} {number}/{len(jobs)}] {job.name}: {job.program}.py {shlex.join(words)}", flush=True)
        start, load = time.perf_counter(), load_average()
        try:
            rows, curves = in_own_process(run_job, job.program, words, device=device)
        except RuntimeError as error:
            content["failures"][job.name] = str(error)
            print(f"FAILED: {error}", flush=True)
            rows, curves = [], []
        for entry in (*rows, *curves):
            entry |= {"job": job.name, "command": f"{job.program}.py {shlex.join(words)}", "run": 0}
            entry |= {"load_before": load, "load_after": load_average()}
        content["rows"] += rows
        content["curves"] += curves
        content["seconds"] = content.get("seconds", 0.0) + time.perf_counter() - start
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        write_json_atomic(folder / f"{device}.json", content, indent=1)
    return content


def merge(older: dict[str, Any] | None, newer: dict[str, Any]) -> dict[str, Any]:
    """The older file with the rows of the newer one's benchmarks in place of its own; runs nobody refers to go."""
    contents = [older or {"runs": [], "rows": [], "curves": []}, newer]
    done = {entry["job"] for entry in (*newer["rows"], *newer["curves"])}
    merged: dict[str, Any] = {"runs": [], "rows": [], "curves": []}
    for content, is_kept in zip(contents, (lambda job: job not in done, lambda job: True), strict=True):
        places: dict[int, int] = {}
        for kind in ("rows", "curves"):
            for entry in content[kind]:
                if is_kept(entry["job"]):
                    if entry["run"] not in places:
                        places[entry["run"]] = len(merged["runs"])
                        merged["runs"].append(content["runs"][entry["run"]])
                    merged[kind].append({**entry, "run": places[entry["run"]]})
    order = {job.name: place for place, job in enumerate(JOBS)}
    for kind in ("rows", "curves"):
        merged[kind].sort(key=lambda entry: order.get(entry["job"], len(order)))
    return merged


def publish(results: dict[str, dict[str, Any]]) -> None:
    """Keep the rows beside RESULTS.md, and write its tables and plot from all that is kept."""
    from benchmarks.results_page import update_page

    MEASURED.mkdir(exist_ok=True)
    for device, newer in results.items():
        path = MEASURED / f"{device}.json"
        write_json_atomic(path, merge(read_json(path) if path.is_file() else None, newer), indent=1)
    kept = {device: MEASURED / f"{device}.json" for device in DEVICES}
    update_page(FOLDER / "RESULTS.md", {device: read_json(path) for device, path in kept.items() if path.is_file()})


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--quick", action="store_true", help="tiny sizes; RESULTS.md stays as it is")
    p.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="NAME", help="these benchmarks")
    p.add_argument("--devices", nargs="+", choices=DEVICES, help="default: cpu, and cuda where there is one")
    p.add_argument("--output_dir", type=Path, help="folder of the files (default: benchmarks/out; --quick: a new one)")
    p.add_argument("--threads", type=positive_int, help="on the CPU (default: all cores; --quick: 1)")
    p.add_argument("--list", action="store_true", help="print the benchmarks and end")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run them; 1 if one failed."""
    args = build_parser().parse_args(argv)
    if args.threads is None:
        args.threads = 1 if args.quick else num_cores()
    jobs = [job for job in JOBS if not args.only or job.name in args.only]
    if args.list:
        for job in jobs:
            device = "cuda" if job.cpu is None else "cpu"
            print(f"{job.name}: python benchmarks/{job.program}.py {shlex.join(flags_of(job, device, args, None))}")
        return 0
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not start CUDA in this process
    import_peers()
    import torch

    devices = args.devices or [device for device in DEVICES if device == "cpu" or torch.cuda.device_count()]
    results = {}
    with contextlib.ExitStack() as stack:
        # a quick run's rows mean nothing, so they go unless a place was given for them
        passing = args.quick and args.output_dir is None
        folder = args.output_dir or FOLDER / "out"
        if passing:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for device in devices:
            own = [job for job in jobs if getattr(job, device) is not None]
            results[device] = run_device(device, own, args, folder)
    if not args.quick:
        publish(results)
    if not passing:
        print(f"\nrows: {', '.join(str(folder / f'{device}.json') for device in devices)}")
    failed = [f"{name} on {device}" for device, content in results.items() for name in content["failures"]]
    if failed:
        print(f"run_all: error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
