"""Time to write a checkpoint and to read it back, beside ``torch.save`` of the same content.

    python benchmarks/bench_checkpoint.py

Weights and both moments of AdamW. Ours: under a temporary name, flushed to the disk, a checksum for each file, renamed.
The peer writes one file beside its predecessor, flushes it and takes the predecessor's place, without a checksum:
writing over the old file would be faster, since its memory is there already, but a crash would leave neither. What is
read back must be what was written. The time is mostly the disk's: ``--folder`` says where to write.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.flags import add_shared_flags
from benchmarks.measure import in_turns
from benchmarks.rows import Result, Row, write_result
from engine.backend import TorchBackend
from engine.checkpoint import load_checkpoint, save_checkpoint
from models.beit3.config import beit3_config
from models.beit3.tasks import build_beit3

NUM_ANSWERS = 3129


def build(args: argparse.Namespace) -> TorchBackend:
    """A model after one step, so that there are moments."""
    torch.manual_seed(0)
    model = build_beit3("vqav2", beit3_config(args.model, "vqav2"), num_classes=NUM_ANSWERS).to(args.device)
    parameters = [{"params": list(model.parameters()), "lr_scale": 1.0, "name": "all"}]
    backend = TorchBackend(model, torch.optim.AdamW(parameters, fused=True), device=torch.device(args.device))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    backend.step(1e-4)
    return backend


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Both ways of writing in turns, then reading; MiB of ours."""
    backend = build(args)
    model, optimizer = backend.unwrapped(), backend.optimizer

    def ours() -> None:
        save_checkpoint(backend, folder, "checkpoint-0", {"global_step": 1})

    def plain() -> None:
        with (folder / "new.pt").open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        (folder / "new.pt").replace(folder / "plain.pt")

    row = {f"{name}_s": s for name, s in in_turns({"ours": ours, "plain": plain}, args.rounds, args.device).items()}
    row["mib"] = sum(path.stat().st_size for path in (folder / "checkpoint-0").iterdir()) / 2**20
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    row["load_s"] = in_turns({"load": lambda: load_checkpoint(backend, folder / "checkpoint-0")}, args.rounds)["load"]
    if not all(torch.equal(value, saved[name]) for name, value in model.state_dict().items()):
        raise SystemExit("error: what was read is not what was written")
    return row


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="beit3_base_patch16_480")
    parser.add_argument("--folder", type=Path, help="write into a new folder in there (default: the system's)")
    add_shared_flags(parser, rounds=3)
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=args.folder))
    try:
        row = measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{args.model}, weights and moments, {row['mib']:.0f} MiB\n"
        f"  write: ours {row['ours_s']:.3g} s, torch.save, fsync and rename {row['plain_s']:.3g} s\n"
        f"  verify and read: {row['load_s']:.3g} s; the same weights"
    )
    setting = f"{args.model}, {row['mib']:.0f} MiB"
    rows = [
        Row("checkpoints", "write weights and moments", setting, row["ours_s"], "torch.save, fsync", row["plain_s"]),
        Row("checkpoints", "verify and read them", setting, row["load_s"], check="the weights that were written"),
    ]
    return write_result(args.json, Result(rows, details=row), vars(args))


if __name__ == "__main__":
    main()
