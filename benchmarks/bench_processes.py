"""How a training step scales with the number of processes (DistributedDataParallel), each with the same batch.

    python benchmarks/bench_processes.py --processes 1 2
    python benchmarks/bench_processes.py --device cuda --dtype bfloat16 --processes 1 2 4 8 --batch_size 32

On the CPU the processes share ``--threads``. Before the times are taken, the loss and the norm of the gradients must be
those of one process with everybody's samples, and the weights after the steps the same on all processes.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.flags import add_shared_flags
from benchmarks.measure import DTYPES, OwnProcess, in_turns
from benchmarks.rows import Curve, Result, load_average, write_result
from engine import distributed
from engine.backend import TorchBackend
from models.beit3.config import beit3_config
from models.beit3.tasks import build_beit3
from models.losses import vqa_loss

NUM_ANSWERS = 3129
MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}  # of the gradients' norm, relative


def take_part(args: argparse.Namespace, rank: int, num_processes: int, batch_size: int, port: int) -> dict[str, float]:
    """One process of the job: a first step that is looked at, then timed ones; seconds of a step and what it saw."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, args.threads // num_processes))
    device = distributed.init(args.device)
    torch.manual_seed(0)
    config = beit3_config(args.model, "vqav2")
    model = build_beit3("vqav2", config, num_classes=NUM_ANSWERS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in model.unused_in_finetuning())
    model.to(device).train()
    generator, total = torch.Generator().manual_seed(1), num_processes * batch_size
    whole = (
        torch.randn(total, 3, config.image_size, config.image_size, generator=generator),
        torch.randint(4, 64000, (total, args.question_tokens), generator=generator),
        torch.rand(total, NUM_ANSWERS, generator=generator),
    )
    own = slice(rank * batch_size, (rank + 1) * batch_size)
    image, text, targets = (tensor[own].to(device) for tensor in whole)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "lr_scale": 1.0}], fused=True)
    dtype = None if args.dtype == "float32" else DTYPES[args.dtype]
    backend = TorchBackend(model, optimizer, device=device, autocast_dtype=dtype)

    def step() -> tuple[float, float]:
        with backend.autocast():
            loss = vqa_loss(backend.model(image, text, None), targets)
        backend.backward(loss)
        return loss.detach(), backend.step(1e-6).grad_norm

    loss, norm = step()
    found = {"loss": distributed.all_reduce_(loss.float()).item() / num_processes, "norm": norm.item()}
    found["seconds"] = in_turns({"step": step}, args.rounds, device.type)["step"]
    found["weights"] = sum(parameter.double().sum().item() for parameter in model.parameters())
    distributed.shutdown()
    return found


def run_job(args: argparse.Namespace, num_processes: int, batch_size: int) -> list[dict[str, float]]:
    """Start the processes together; what each of them found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = range(num_processes)
    job = [OwnProcess(take_part, args, r, num_processes, batch_size, port, device=args.device) for r in ranks]
    return [process.result() for process in job]


def check(found: list[dict[str, float]], alone: dict[str, float], limit: float) -> float:
    """Largest relative difference of loss and norm to those of one process; ends the program if it is too large."""
    if len({one["weights"] for one in found}) > 1:
        raise SystemExit(f"error: the weights of {len(found)} processes are not the same after the steps")
    worst = max(abs(found[0][key] - alone[key]) / abs(alone[key]) for key in ("loss", "norm"))
    if not worst <= limit:
        raise SystemExit(
            f"error: {len(found)} processes learn something else than one: {worst:.1e} of loss or gradient"
        )
    return worst


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4, ... as cores or GPUs allow")
    parser.add_argument("--model", default="beit3_base_patch16_224")
    parser.add_argument("--batch_size", type=int, default=2, help="of each process")
    parser.add_argument("--question_tokens", type=int, default=14)
    add_shared_flags(parser, rounds=3, dtypes=DTYPES)
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    most = torch.cuda.device_count() if args.device == "cuda" else args.threads
    counts = args.processes or [count for count in (1, 2, 4, 8) if count <= max(1, most)]
    seconds, worst, load = [], 0.0, load_average()
    for count in counts:
        found = run_job(args, count, args.batch_size)
        if count > 1:
            alone = run_job(args, 1, count * args.batch_size)[0]
            worst = max(worst, check(found, alone, MAX_DIFFERENCE[args.dtype]))
        step_s = max(one["seconds"] for one in found)
        seconds.append(step_s / (count * args.batch_size))
        print(f"{count} processes: {step_s:.4g} s a step, {1 / seconds[-1]:.4g} samples/s", flush=True)
    same = f"loss and gradients as one process, within {worst:.1e}" if max(counts) > 1 else "one process only"
    print(f"  {same}; load average {load:.1f} before, {load_average():.1f} after")
    threads = f", {args.threads} threads in all" if args.device == "cpu" else ""
    setting = f"{args.model}, batch {args.batch_size} each{threads}, {args.dtype}"
    curve = Curve("processes: seconds a sample", setting, "processes", counts, seconds, check=same)
    return write_result(args.json, Result(curves=[curve]), vars(args))


if __name__ == "__main__":
    main()
