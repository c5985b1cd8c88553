"""Flags that the benchmarks share."""

import argparse
from collections.abc import Iterable
from pathlib import Path


def add_shared_flags(parser: argparse.ArgumentParser, *, rounds: int, dtypes: Iterable[str] = ()) -> None:
    """On what it runs, how often, and where the results go; ``dtypes``: the precisions it can take, if any."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    if dtypes:
        parser.add_argument("--dtype", choices=sorted(dtypes), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="write everything there")
