"""Training step and evaluation pass of a model against a peer, in one run: same weights, equal logits checked first.

    python benchmarks/bench_step.py --model beit3_base_patch16_480 --task vqav2 --batch_size 2 --threads 2
    python benchmarks/bench_step.py --device cuda --dtype bfloat16 --compile --batch_sizes 16 32 64 --peak_tflops 790

Our step: text of its own length, forward, backward, fused AdamW, no clipping. The peer's: text padded to ``--pad_to``
as the original does, forward, backward, AdamW as ``torch.optim.AdamW`` gives it by default. Both run under the same
autocast, alternately; medians are reported. Peak memory comes from a process of its own per side. FLOPs are counted by
formula: real tokens only, nothing recomputed, of the last layer only what the head needs, backward = 2 x forward.
To add a family: a function like ``beit3_workload`` and its line in ``FAMILIES``.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models.beit3.beit3 import compile_layers
from models.beit3.config import TASK_SUFFIXES, BEiT3Config, beit3_config
from models.beit3.tasks import build_beit3, captioning_loss
from models.losses import vqa_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LOGIT_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # relative to the largest logit (or 1)
NUM_ANSWERS = 3129
MASKED_FRACTION = 0.7  # of the caption's words


@dataclass
class Side:
    """One of the two that are compared; ``forward`` gives logits, ``loss`` takes them."""

    model: nn.Module
    forward: Callable[[], Tensor]
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None = None


@dataclass
class Workload:
    """What a family contributes: how to build each side, and the FLOPs of one forward pass over the whole batch."""

    build_ours: Callable[[], Side]
    build_peer: Callable[[], Side] | None
    forward_flops: float


# --------------------------------------------------------------------------------------------------------- BEiT-3
@dataclass
class TextBatch:
    """(B, T) ids; (B, T) padding or None; (B, T) positions to predict, for captioning; both padded to one length."""

    tokens: Tensor
    padding_mask: Tensor | None
    masked: Tensor


def draw_text(args: argparse.Namespace, batch_size: int, pad_to: int | None) -> TextBatch:
    """Random words between two specials; the same words for every ``pad_to`` (None: the longest of the batch)."""
    generator = torch.Generator().manual_seed(1)
    shortest = args.question_tokens // 2 if args.ragged else args.question_tokens
    lengths = 2 + torch.randint(shortest, args.question_tokens + 1, (batch_size,), generator=generator)
    width = pad_to or int(lengths.max())
    words = torch.randint(4, 64000, (batch_size, args.question_tokens + 2), generator=generator)
    masked = torch.rand(batch_size, args.question_tokens + 2, generator=generator) < MASKED_FRACTION
    tokens, positions = (
        torch.ones(batch_size, width, dtype=torch.long),
        torch.zeros(batch_size, width, dtype=torch.bool),
    )
    for row, length in enumerate(lengths.tolist()):
        tokens[row, :length] = words[row, :length]
        positions[row, 1:length] = masked[row, 1:length]
        tokens[row, 0] = 0
        positions[row, 1] = True
    padding_mask = torch.arange(width) >= lengths[:, None]
    device = args.device
    return TextBatch(tokens.to(device), padding_mask.to(device) if padding_mask.any() else None, positions.to(device))


def beit3_workload(args: argparse.Namespace, batch_size: int) -> Workload:
    """BEiT-3 for question answering or captioning, against torchscale's trunk under our heads."""
    config = beit3_config(args.model, args.task, drop_path=args.drop_path)
    is_captioning = TASK_SUFFIXES[args.task] == "captioning"
    if not is_captioning and args.task != "vqav2":
        raise SystemExit(
            f"bench_step: error: no batch is drawn for --task {args.task}: choose vqav2 or coco_captioning"
        )
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(batch_size, 3, config.image_size, config.image_size, generator=generator).to(args.device)
    targets = torch.rand(batch_size, NUM_ANSWERS, generator=generator).to(args.device)

    def ours() -> nn.Module:
        torch.manual_seed(0)
        num_classes = None if is_captioning else NUM_ANSWERS
        model = build_beit3(
            args.task, config, num_classes=num_classes, checkpoint_activations=args.checkpoint_activations
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in model.unused_in_finetuning())
        return model

    def side(model: nn.Module, text: TextBatch) -> Side:
        inputs = (image, text.tokens, text.padding_mask) + ((text.masked,) if is_captioning else ())
        words = text.tokens[text.masked]
        loss = (lambda logits: captioning_loss(logits, words)) if is_captioning else (lambda z: vqa_loss(z, targets))
        return Side(model.to(args.device), lambda: model(*inputs), loss)

    def build_ours() -> Side:
        model = ours()
        if args.compile:
            compile_layers(model)
        return side(model, draw_text(args, batch_size, None))

    def build_peer() -> Side:
        model = ours()
        model.beit3 = torchscale_trunk(config, model.beit3, checkpoint_activations=args.checkpoint_activations)
        return side(model, draw_text(args, batch_size, args.pad_to))

    text = draw_text(args, batch_size, None)
    lengths = [text.tokens.shape[1]] * batch_size
    if text.padding_mask is not None:
        lengths = (~text.padding_mask).sum(1).tolist()
    head = 2 * int(text.masked.sum()) * config.embed_dim * config.vocab_size if is_captioning else 0
    flops = sum(beit3_forward_flops(config, length, is_captioning=is_captioning) for length in lengths) + head
    return Workload(build_ours, build_peer if args.peer == "torchscale" else None, flops)


def beit3_forward_flops(config: BEiT3Config, text_length: int, *, is_captioning: bool) -> float:
    """Of one sample, without the captioning head."""
    width, num_image = config.embed_dim, config.num_image_tokens
    total = num_image + text_length
    last_read = text_length if is_captioning else 1
    # pairs of query and key, of all tokens and of those that the head reads
    causal = num_image * num_image + sum(num_image + i + 1 for i in range(text_length))
    pairs = causal if is_captioning else total * total
    last_pairs = causal - num_image * num_image if is_captioning else total
    projections = (8 + 4 * config.mlp_ratio) * width * width  # q, k, v, out and the two of the FFN, 2 FLOPs a weight
    layers = (config.num_layers - 1) * (projections * total + 4 * width * pairs)
    keys_values = 4 * width * width
    last = keys_values * total + (projections - keys_values) * last_read + 4 * width * last_pairs
    patches = 2 * config.num_patches * config.in_chans * config.patch_size**2 * width
    answers = 0 if is_captioning else 2 * (width * width + 2 * width * width + 2 * width * NUM_ANSWERS)
    return layers + last + patches + answers


def torchscale_trunk(config: BEiT3Config, ours: nn.Module, *, checkpoint_activations: bool) -> nn.Module:
    """Torchscale's BEiT-3 with our trunk's weights, behind our trunk's arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torchscale.architecture.config import EncoderConfig
            from torchscale.model.BEiT3 import BEiT3 as TorchscaleBEiT3
        except ImportError as error:
            raise SystemExit(
                f"bench_step: error: {error}: pip install --no-deps torchscale timm fairscale, or --peer none"
            ) from error
    trunk = TorchscaleBEiT3(
        EncoderConfig(
            img_size=config.image_size,
            patch_size=config.patch_size,
            vocab_size=config.vocab_size,
            encoder_embed_dim=config.embed_dim,
            encoder_attention_heads=config.num_heads,
            encoder_ffn_embed_dim=config.mlp_ratio * config.embed_dim,
            encoder_layers=config.num_layers,
            normalize_output=config.normalize_output,
            drop_path_rate=config.drop_path,
            checkpoint_activations=checkpoint_activations,
            multiway=True,
            no_output_layer=True,
        )
    )
    trunk.load_state_dict(ours.state_dict())

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = trunk

        def forward(self, image, text, padding_mask, *, causal_text=False, keep=None):  # noqa: ANN001, ANN202
            num_image, hidden = config.num_image_tokens, None
            if causal_text:
                total = num_image + text.shape[1]
                hidden = torch.ones(total, total, device=text.device).triu(1)
                hidden[:, :num_image] = 0
            tokens = self.trunk(text, image, padding_mask, attn_mask=hidden)["encoder_out"]
            return tokens[:, :num_image], tokens[:, num_image:]

    return Adapter()


FAMILIES = {"beit3": beit3_workload}


# ------------------------------------------------------------------------------------------------------ measuring
def add_optimizer(side: Side, *, fused: bool | None) -> Side:
    """AdamW on everything that trains; None leaves the choice of the implementation to torch."""
    parameters = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    side.optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.01, fused=fused)
    return side


def autocast(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Mixed precision with float32 weights, the same for both sides."""
    dtype = DTYPES[args.dtype]
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(args.device, dtype)


def train_step(side: Side, args: argparse.Namespace) -> None:
    """Forward, backward, optimizer."""
    with autocast(args):
        loss = side.loss(side.forward())
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def timed(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Wall seconds and CPU seconds (over all threads) of one call, the device's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


@torch.no_grad()
def logit_difference(sides: dict[str, Side], args: argparse.Namespace) -> float:
    """Largest difference of the logits in evaluation mode; ends the program if the sides do not compute the same."""
    logits = {}
    for name, side in sides.items():
        side.model.eval()
        with autocast(args):
            logits[name] = side.forward().float()
        side.model.train()
    difference = (logits["ours"] - logits["peer"]).abs().max().item()
    limit = MAX_LOGIT_DIFFERENCE[args.dtype] * max(1.0, logits["peer"].abs().max().item())
    if not difference <= limit:
        raise SystemExit(
            f"bench_step: error: logits differ by {difference:.2e}, more than {limit:.2e}: nothing was timed"
        )
    return difference


@torch.no_grad()
def eval_pass(side: Side, args: argparse.Namespace) -> None:
    """Forward only, in evaluation mode."""
    side.model.eval()
    with autocast(args):
        side.forward()
    side.model.train()


def measure(args: argparse.Namespace, batch_size: int) -> dict[str, object]:
    """Time both sides alternately at one batch size."""
    workload = FAMILIES[args.family](args, batch_size)
    sides = {"ours": add_optimizer(workload.build_ours(), fused=True)}
    if workload.build_peer is not None:
        sides["peer"] = add_optimizer(workload.build_peer(), fused=None)
    row: dict[str, object] = {"batch_size": batch_size, "load_before": os.getloadavg()[0]}
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
            times[f"{name}_train"].append(timed(lambda side=side: train_step(side, args), args.device))
        for name, side in sides.items():
            times[f"{name}_eval"].append(timed(lambda side=side: eval_pass(side, args), args.device))
    for name, pairs in times.items():
        row[f"{name}_s"], row[f"{name}_cpu_s"] = (statistics.median(values) for values in zip(*pairs, strict=True))
    row["wall_and_cpu_seconds"] = times
    row["load_after"] = os.getloadavg()[0]
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


def probe_memory(args: argparse.Namespace, name: str) -> float:
    """Peak MiB of two training steps of one side, alone in this process; on the CPU beyond what the imports took."""
    workload = FAMILIES[args.family](args, args.batch_size)
    before = resident_mib("VmRSS")
    build, fused = (workload.build_ours, True) if name == "ours" else (workload.build_peer, None)
    side = add_optimizer(build(), fused=fused)
    side.model.train()
    for _ in range(2):
        train_step(side, args)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process; ``getrusage`` would also count the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit("bench_step: error: this system does not tell a process's memory: use --no_memory")


def memory_in_own_process(argv: list[str], batch_size: int, name: str) -> float:
    """Run ``probe_memory`` in a fresh interpreter."""
    command = [sys.executable, __file__, *argv, "--batch_size", str(batch_size), "--probe", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_step: error: the memory of {name} could not be measured: {done.stderr.strip()[-300:]}")
    return float(done.stdout.split()[-1])


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


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=sorted(FAMILIES), default="beit3")
    parser.add_argument("--model", default="beit3_base_patch16_480")
    parser.add_argument("--task", default="vqav2")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="try these and name the best; replaces --batch_size")
    parser.add_argument("--question_tokens", type=int, default=12, help="words of the text, without the two specials")
    parser.add_argument(
        "--ragged", action="store_true", help="texts of half to all of that length, with a padding mask"
    )
    parser.add_argument("--pad_to", type=int, default=64, help="text length of the peer")
    parser.add_argument("--drop_path", type=float, default=0.1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--peer", choices=("torchscale", "none"), default="torchscale")
    parser.add_argument("--compile", action="store_true", help="compile our layers")
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--no_memory", action="store_true", help="leave out the extra processes that measure memory")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for the utilisation (790: bf16 on an H200)")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--probe", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure every batch size, print, and name the best."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.probe:
        print(probe_memory(args, args.probe))
        return
    rows = []
    for batch_size in args.batch_sizes or [args.batch_size]:
        try:
            row = measure(args, batch_size)
        except torch.cuda.OutOfMemoryError:
            print(f"batch {batch_size}: out of memory", flush=True)
            continue
        finally:
            if args.device == "cuda":
                torch.cuda.empty_cache()
        if not args.no_memory:
            for name in ("ours", "peer")[: 1 if args.peer == "none" else 2]:
                row[f"{name}_peak_mib"] = memory_in_own_process(argv, batch_size, name)
        print(describe(row, args.device), flush=True)
        rows.append(row)
    if not rows:
        raise SystemExit("bench_step: error: no batch size fits into memory")
    best = max(rows, key=lambda row: row["samples_per_s"])
    print(f"best: batch {best['batch_size']}, {best['samples_per_s']:.4g} samples/s")
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key not in ("json", "probe")}
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {args.threads} threads"
        result = {"torch": torch.__version__, "device": device, "setting": setting, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
