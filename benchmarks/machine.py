"""Which machine, which versions, which commit: what a measured row must carry."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import DTYPES, in_turns
from benchmarks.rows import num_cores
from models.linear import linear

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "torchvision", "numpy", "pillow", "transformers", "peft", "torchscale", "timm"),
    "opencv-python-headless",
)
# what a bf16 matrix product reaches, measured elsewhere; a GPU that is not listed is measured here
KNOWN_TFLOPS = {"H200": 790.0}


def describe(device: str, threads: int, matrix_size: int) -> dict[str, Any]:
    """Machine, versions, commit and date of a run on ``device``; call it in a process of its own.

    Args:
        device: cpu or cuda.
        threads: of the products that measure the CPU.
        matrix_size: rows and columns of these products.
    """
    torch.set_num_threads(threads)
    is_gpu = device == "cuda"
    gpu = torch.cuda.get_device_name() if is_gpu else None
    known = next((value for name, value in KNOWN_TFLOPS.items() if is_gpu and name in gpu), None)
    dtype = "bfloat16" if is_gpu else "float32"
    return {
        "device": device,
        "processor": _processor(),
        "cores": num_cores(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": gpu,
        "peak_dtype": dtype,
        "peak_tflops": known or matmul_tflops(device, dtype, matrix_size),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def matmul_tflops(device: str, dtype: str, size: int) -> float:
    """What the faster of torch's product and ours reaches for square matrices: the bar of the utilisation."""
    one, other = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    with torch.no_grad():
        times = in_turns({"torch": lambda: one @ other, "ours": lambda: linear(one, other)}, 5, device)
    return 2 * size**3 / min(times.values()) / 1e12


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit, with ``+`` where tracked files differ from it."""
    try:
        run = ["git", "-C", str(ROOT)]
        name = subprocess.run([*run, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(
            [*run, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
        return name.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
