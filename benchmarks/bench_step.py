"""Training step and evaluation pass of a model against a peer, in one run: same weights, equal logits checked first.

    python benchmarks/bench_step.py --model beit3_base_patch16_480 --task vqav2 --batch_size 2 --threads 2
    python benchmarks/bench_step.py --family vle --batch_size 2
    python benchmarks/bench_step.py --device cuda --dtype bfloat16 --compile --batch_sizes 16 32 64 --peak_tflops 790

Our step: text of its own length, forward, backward, fused AdamW, no clipping. The peer's: text padded to ``--pad_to``
as the original does, forward, backward, AdamW as ``torch.optim.AdamW`` gives it by default. Both run under the same
autocast, in turns, each turn with an untimed call first; medians are reported. Peak memory comes from a process of its
own per side. FLOPs are counted by formula: real tokens only, nothing recomputed, of BEiT-3's last layer only what the
head needs, backward = 2 x forward.
To add a family: a file like ``workload_beit3.py`` and its line in ``FAMILIES``.
"""

import argparse
import importlib
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import workload_beit3, workload_vle
from benchmarks.measure import DTYPES, PeakMemory, autocast, in_own_process, is_installed, timed
from benchmarks.rows import NOT_INSTALLED, Result, Row, load_average, write_result
from benchmarks.workload import Side

MAX_LOGIT_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # relative to the largest logit (or 1)
# --family -> its workload, its file, the peer as the table names it
FAMILIES = {
    "beit3": (workload_beit3.beit3_workload, workload_beit3, "torchscale"),
    "vle": (workload_vle.vle_workload, workload_vle, "transformers"),
}


def add_optimizer(side: Side, *, fused: bool | None) -> Side:
    """AdamW on everything that trains; None leaves the choice of the implementation to torch."""
    parameters = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    side.optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.01, fused=fused)
    return side


def train_step(side: Side, args: argparse.Namespace) -> None:
    """Forward, backward, optimizer."""
    with autocast(args.device, args.dtype):
        loss = side.loss(side.forward())
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def logit_difference(sides: dict[str, Side], args: argparse.Namespace) -> float:
    """Largest difference of the logits in evaluation mode; ends the program if the sides do not compute the same."""
    logits = {}
    for name, side in sides.items():
        side.model.eval()
        with autocast(args.device, args.dtype):
            logits[name] = side.forward().float()
        side.model.train()
    difference = (logits["ours"] - logits["peer"]).abs().max().item()
    limit = MAX_LOGIT_DIFFERENCE[args.dtype] * max(1.0, logits["peer"].abs().max().item())
    if not difference <= limit:
        raise SystemExit(f"error: logits differ by {difference:.2e}, more than {limit:.2e}: nothing was timed")
    return difference


@torch.no_grad()
def eval_pass(side: Side, args: argparse.Namespace) -> None:
    """Forward only, in evaluation mode."""
    side.model.eval()
    with autocast(args.device, args.dtype):
        side.forward()
    side.model.train()


def measure(args: argparse.Namespace, batch_size: int) -> dict[str, object]:
    """Time both sides in turns at one batch size."""
    workload = FAMILIES[args.family][0](args, batch_size)
    sides = {"ours": add_optimizer(workload.build_ours(), fused=True)}
    if workload.build_peer is not None:
        sides["peer"] = add_optimizer(workload.build_peer(), fused=None)
    row: dict[str, object] = {"batch_size": batch_size, "load_before": load_average()}
    if "peer" in sides:
        row["logit_difference"] = logit_difference(sides, args)
    for side in sides.values():  # burn in: caches, allocator, compilation
        side.model.train()
        for _ in range(args.warmup):
            train_step(side, args)
        eval_pass(side, args)
    times: dict[str, list[tuple[float, float]]] = {f"{name}_{kind}": [] for name in sides for kind in ("train", "eval")}
    for _ in range(args.steps):
        for name, side in sides.items():
            train_step(side, args)  # untimed: see measure.in_turns, ``settled``
            times[f"{name}_train"].append(timed(lambda side=side: train_step(side, args), args.device))
        for name, side in sides.items():
            eval_pass(side, args)
            times[f"{name}_eval"].append(timed(lambda side=side: eval_pass(side, args), args.device))
    for name, pairs in times.items():
        row[f"{name}_s"], row[f"{name}_cpu_s"] = (statistics.median(values) for values in zip(*pairs, strict=True))
    row["wall_and_cpu_seconds"] = times
    row["load_after"] = load_average()
    row["samples_per_s"] = batch_size / row["ours_train_s"]
    row["train_gflops_per_sample"] = 3 * workload.forward_flops / batch_size / 1e9
    row["tflops"] = 3 * workload.forward_flops / row["ours_train_s"] / 1e12
    if args.peak_tflops:
        row["utilisation"] = row["tflops"] / args.peak_tflops
    if "peer" in sides:
        row["train_speedup"] = row["peer_train_s"] / row["ours_train_s"]
        row["eval_speedup"] = row["peer_eval_s"] / row["ours_eval_s"]
        row["train_cpu_ratio"] = row["peer_train_cpu_s"] / row["ours_train_cpu_s"]
        row["eval_cpu_ratio"] = row["peer_eval_cpu_s"] / row["ours_eval_cpu_s"]
    return row


def probe_memory(args: argparse.Namespace, batch_size: int, name: str) -> float:
    """Peak MiB of two training steps of one side, weights included, alone in this process."""
    torch.set_num_threads(args.threads)
    build, module, _ = FAMILIES[args.family]
    if name == "peer":
        for package in module.PEER_PACKAGES:  # what imports take is not the step's
            importlib.import_module(package)
    workload = build(args, batch_size)
    peak = PeakMemory(args.device)
    side = add_optimizer(
        workload.build_ours() if name == "ours" else workload.build_peer(), fused=name == "ours" or None
    )
    side.model.train()
    for _ in range(2):
        train_step(side, args)
    return peak.mib()


def describe(row: dict[str, object], device: str) -> str:
    """One readable paragraph per batch size."""
    lines = [
        f"batch {row['batch_size']}: train {row['ours_train_s']:.4g} s/step, {row['samples_per_s']:.4g} samples/s, "
        f"eval {row['ours_eval_s']:.4g} s; {row['train_gflops_per_sample']:.1f} useful GFLOP/sample, "
        f"{row['tflops']:.3g} TFLOP/s"
        + (f" = {100 * row['utilisation']:.1f} % of the peak" if "utilisation" in row else "")
    ]
    if "peer_train_s" in row:
        lines.append(
            f"  peer: train {row['peer_train_s']:.4g} s ({row['train_speedup']:.2f}x ours), "
            f"eval {row['peer_eval_s']:.4g} s ({row['eval_speedup']:.2f}x ours); "
            f"logits differ by {row['logit_difference']:.1e}"
        )
        if device == "cpu":  # other load on the machine counts less here
            lines.append(
                f"  CPU time: train {row['ours_train_cpu_s']:.4g} s against {row['peer_train_cpu_s']:.4g} s "
                f"({row['train_cpu_ratio']:.2f}x), eval {row['ours_eval_cpu_s']:.4g} s against "
                f"{row['peer_eval_cpu_s']:.4g} s ({row['eval_cpu_ratio']:.2f}x)"
            )
    memory = [f"{name} {row[f'{name}_peak_mib']:.0f} MiB" for name in ("ours", "peer") if f"{name}_peak_mib" in row]
    if memory:
        lines.append(f"  peak memory: {', '.join(memory)}")
    lines.append(f"  load average {row['load_before']:.1f} before, {row['load_after']:.1f} after")
    return "\n".join(lines)


def rows_of(row: dict[str, object], args: argparse.Namespace) -> list[Row]:
    """The training step and the evaluation pass of one batch size."""
    _, module, peer_name = FAMILIES[args.family]
    text = f"{args.question_tokens // 2} to {args.question_tokens}" if args.ragged else f"{args.question_tokens}"
    compiled = ", compiled" if args.compile else ""
    setting = f"batch {row['batch_size']}, {text} words, {args.dtype}{compiled}"
    check = f"logits within {row['logit_difference']:.1e}" if "logit_difference" in row else ""
    rows = []
    for what, kind in (("train step", "train"), ("inference", "eval")):
        rows.append(
            Row(
                "steps",
                f"{args.model or module.MODEL} {args.task}: {what}",
                setting,
                row[f"ours_{kind}_s"],
                peer_name if args.peer is None else "",
                row.get(f"peer_{kind}_s"),
                check,
            )
        )
    rows[0].ours_mib, rows[0].peer_mib = row.get("ours_peak_mib"), row.get("peer_peak_mib")
    rows[0].utilisation = row.get("utilisation")
    if "utilisation" in row:
        rows[1].utilisation = row["utilisation"] * row["ours_train_s"] / row["ours_eval_s"] / 3
    return rows


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="beit3")
    parser.add_argument("--model", help="default: beit3_base_patch16_480, vle_base_384")
    parser.add_argument("--task", default="vqav2")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="try these and name the best; replaces --batch_size")
    parser.add_argument("--question_tokens", type=int, default=12, help="words of the text, without the two specials")
    parser.add_argument(
        "--ragged", action="store_true", help="texts of half to all of that length, with a padding mask"
    )
    parser.add_argument("--pad_to", type=int, help="text length of the peer (default: 64, VLE 50)")
    parser.add_argument("--drop_path", type=float, default=0.1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument(
        "--peer",
        choices=("torchscale", "transformers", "none"),
        help="stop if it is not installed (default: the family's, and without it our side alone)",
    )
    parser.add_argument("--compile", action="store_true", help="compile our layers")
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--no_memory", action="store_true", help="leave out the extra processes that measure memory")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for the utilisation (790: bf16 on an H200)")
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


def choose_peer(args: argparse.Namespace) -> None:
    """Leave out a peer that nobody asked for and that is not installed."""
    _, module, own = FAMILIES[args.family]
    if args.peer not in (None, "none", own):
        raise SystemExit(f"error: the peer of --family {args.family} is {own}, not {args.peer}")
    if args.peer is None and not is_installed(*module.PEER_PACKAGES):
        print(f"{NOT_INSTALLED}: {own}", flush=True)
        args.has_peer = False
    else:
        args.has_peer = args.peer != "none"


def main(argv: list[str] | None = None) -> Result:
    """Measure every batch size, print, and name the best."""
    args = build_parser().parse_args(argv)
    choose_peer(args)
    batch_sizes = args.batch_sizes or [args.batch_size]
    memory: dict[tuple[int, str], float] = {}
    for batch_size in [] if args.no_memory else batch_sizes:  # before this process computes anything
        for name in ("ours", "peer")[: 1 + args.has_peer]:
            try:
                memory[batch_size, name] = in_own_process(probe_memory, args, batch_size, name, device=args.device)
            except RuntimeError as error:
                if "out of memory" not in str(error):
                    raise
                print(f"batch {batch_size}: no peak memory of {name}: {error}", flush=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for batch_size in batch_sizes:
        try:
            row = measure(args, batch_size)
        except torch.cuda.OutOfMemoryError:
            print(f"batch {batch_size}: out of memory", flush=True)
            continue
        finally:
            if args.device == "cuda":
                torch.cuda.empty_cache()
        row |= {f"{name}_peak_mib": memory[size, name] for size, name in memory if size == batch_size}
        print(describe(row, args.device), flush=True)
        rows.append(row)
    if not rows:
        raise SystemExit("error: no batch size fits into memory")
    best = max(rows, key=lambda row: row["samples_per_s"])
    print(f"best: batch {best['batch_size']}, {best['samples_per_s']:.4g} samples/s")
    return write_result(args.json, Result(rows_of(best, args), details=rows), vars(args))


if __name__ == "__main__":
    main()
