"""How a training step grows with sequence length, batch and image size, beside the peer: the shape of the curve.

    python benchmarks/bench_scaling.py --threads 2
    python benchmarks/bench_scaling.py --device cuda --dtype bfloat16 --batch_sizes 8 16 32 64 --lengths 512 1024 2048

Length: an adapter step of LLaVA's decoder (``bench_llava.py``); batch and image size: BEiT-3 (``bench_step.py``). Equal
outputs are checked at every point. An exponent of 1 says that twice as much takes twice as long.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import bench_llava, bench_step
from benchmarks.flags import add_shared_flags
from benchmarks.measure import is_installed
from benchmarks.rows import Curve, Result, exponent, write_result

CURVES = ("length", "batch", "image")


def length_curve(args: argparse.Namespace) -> Curve:
    """Seconds of an adapter step over the longest sample's length."""
    flags = ["--device", args.device, "--dtype", args.dtype, "--rounds", str(args.rounds)]
    for name in ("width", "layers", "heads", "vocabulary", "rank"):
        flags += [f"--{name}", str(getattr(args, name))]
    ours, peer, worst = [], [], 0.0
    for length in args.lengths:
        point = bench_llava.build_parser().parse_args([*flags, "--length", str(length), "--batch_size", "4"])
        point.has_peer = is_installed("transformers", "peft")
        row = bench_llava.measure(point)
        ours.append(row[bench_llava.SIDES[0]])
        if point.has_peer:
            peer.append(row[bench_llava.SIDES[1]])
            worst = max(worst, row["difference"], row["gradient_difference"])
        _say("length", length, ours, peer)
    setting = f"LLaVA's decoder, width {args.width}, {args.layers} layers, batch 4, rank {args.rank}, {args.dtype}"
    check = f"losses and gradients within {worst:.1e}" if peer else ""
    what = "length: seconds an adapter step"
    return Curve(what, setting, "tokens", args.lengths, ours, bench_llava.SIDES[1], peer or None, check)


def batch_curve(args: argparse.Namespace) -> Curve:
    """Seconds of a BEiT-3 step over the batch size."""
    model = f"{args.model}_{args.image_sizes[0]}"
    points = [(model, batch_size) for batch_size in args.batch_sizes]
    ours, peer, check = _beit3_points(args, points, "batch", args.batch_sizes)
    setting = f"{model}, {args.dtype}"
    return Curve("batch: seconds a step", setting, "samples", args.batch_sizes, ours, "torchscale", peer, check)


def image_curve(args: argparse.Namespace) -> Curve:
    """Seconds of a BEiT-3 step over the side of the image."""
    points = [(f"{args.model}_{size}", args.image_batch) for size in args.image_sizes]
    ours, peer, check = _beit3_points(args, points, "image", args.image_sizes)
    setting = f"{args.model}, batch {args.image_batch}, {args.dtype}"
    return Curve("image: seconds a step", setting, "pixels a side", args.image_sizes, ours, "torchscale", peer, check)


def _beit3_points(
    args: argparse.Namespace, points: list[tuple[str, int]], name: str, x: list[int]
) -> tuple[list[float], list[float] | None, str]:
    ours, peer, worst = [], [], 0.0
    for place, (model, batch_size) in zip(x, points, strict=True):
        flags = ["--model", model, "--device", args.device, "--dtype", args.dtype, "--steps", str(args.rounds)]
        point = bench_step.build_parser().parse_args(flags)
        bench_step.choose_peer(point)
        row = bench_step.measure(point, batch_size)
        ours.append(row["ours_train_s"])
        if point.has_peer:
            peer.append(row["peer_train_s"])
            worst = max(worst, row["logit_difference"])
        _say(name, place, ours, peer)
    return ours, peer or None, f"logits within {worst:.1e}" if peer else ""


def _say(name: str, place: int, ours: list[float], peer: list[float]) -> None:
    beside = f", peer {peer[-1]:.4g} s" if peer else ""
    print(f"{name} {place}: ours {ours[-1]:.4g} s{beside}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--model", default="beit3_base_patch16", help="of BEiT-3, without the image size")
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[224, 320, 384, 480])
    parser.add_argument("--image_batch", type=int, default=1)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="at the first image size")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    for name, value in (("width", 512), ("layers", 4), ("heads", 8), ("vocabulary", 32000), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=value, help="of LLaVA's decoder")
    add_shared_flags(parser, rounds=2, dtypes=("float32", "bfloat16"))
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    builders = {"length": length_curve, "batch": batch_curve, "image": image_curve}
    curves = [builders[name](args) for name in args.curves]
    for curve in curves:
        slopes = [f"{name} {exponent(curve.x, y):.2f}" for name, y in (("ours", curve.ours), ("peer", curve.peer)) if y]
        print(f"{curve.what}, exponents: {', '.join(slopes)}; {curve.check}")
    return write_result(args.json, Result(curves=curves), vars(args))


if __name__ == "__main__":
    main()
