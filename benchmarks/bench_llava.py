"""A LoRA training step of LLaVA's decoder beside transformers + peft, in one run: same weights, same losses.

    python benchmarks/bench_llava.py --threads 2

Samples of uneven length with labels on their last words, adapters on all linear layers of the decoder, AdamW over the
adapters. Ours lays the samples one behind the other and meets the vocabulary at labelled places only; the peer pads.
Losses are checked first. Peak memory is that of a process of its own for each side (``--memory_of``).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from models.linear import Linear
from models.llava.config import LlamaConfig
from models.llava.llama import LlamaModel
from models.llava.splice import IGNORED
from models.lora import LoRAConfig, add_adapters
from models.losses import chunked_cross_entropy

MAX_DIFFERENCE = 1e-4
SIDES = ("ours", "transformers + peft")


class Decoder(nn.Module):
    """Our decoder as a language model."""

    def __init__(self, config: LlamaConfig) -> None:
        """Random weights."""
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, samples: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Loss of samples of unequal length."""
        lengths = [len(sample) for sample in samples]
        embedded = self.model.embed_tokens(torch.cat(samples))[None]
        hidden = self.model.decode(embedded, lengths=lengths).tokens[0]
        targets = torch.cat([torch.cat([row[1:], row.new_full((1,), IGNORED)]) for row in labels])
        return chunked_cross_entropy(hidden, self.lm_head, targets)


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """Of both models."""
    return {
        "vocab_size": args.vocabulary, "hidden_size": args.width, "intermediate_size": int(args.width * 2.6875),
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "max_position_embeddings": 2 * args.length,
    }  # fmt: skip


def batch_of(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Samples between a quarter and all of the longest length; the last tenth of each is labelled."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(args.length / 4, args.length, args.batch_size).round().int().tolist()
    samples = [torch.randint(3, args.vocabulary, (length,), generator=generator) for length in lengths]
    labels = [torch.cat([s.new_full((len(s) - len(s) // 10,), IGNORED), s[len(s) - len(s) // 10 :]]) for s in samples]
    return samples, labels


def our_side(args: argparse.Namespace, state: dict[str, Tensor] | None) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Model and its loss."""
    model = Decoder(LlamaConfig.from_dict(sizes(args))).requires_grad_(False)
    if state is not None:
        model.load_state_dict(state)
    add_adapters(model.model.layers, LoRAConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0))
    model.model.checkpoint_layers = args.checkpoint
    samples, labels = batch_of(args)
    return model, lambda: model(samples, labels)


def peer_side(args: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor], dict[str, Tensor]]:
    """The same in transformers and peft, and the base weights."""
    import peft
    import transformers

    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(args), rms_norm_eps=1e-5, pad_token_id=0))
    state = {name: value.clone() for name, value in base.state_dict().items()}
    names = list(LoRAConfig().target_modules)
    settings = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=names, lora_dropout=0.0)
    model = peft.get_peft_model(base, settings)
    if args.checkpoint:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    samples, labels = batch_of(args)
    ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    marks = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(sample) for sample in samples], batch_first=True)
    return model, lambda: model(input_ids=ids, attention_mask=mask, labels=marks).loss, state


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """One training step; returns the loss."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of both sides, in turns."""
    torch.manual_seed(0)
    peer, peer_loss, state = peer_side(args)
    ours, our_loss = our_side(args, state)
    with torch.no_grad():
        difference = abs(our_loss().item() - peer_loss().item())
    if difference > MAX_DIFFERENCE:
        raise SystemExit(f"bench_llava: error: losses differ by {difference:.1e}")
    steps = dict(zip(SIDES, (stepper(ours, our_loss), stepper(peer, peer_loss)), strict=True))
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first one warms up
    return {**medians, "ratio": medians[SIDES[1]] / medians[SIDES[0]], "difference": difference}


def print_memory(args: argparse.Namespace) -> None:
    """MiB that two steps of one side add to what the process had with its model."""
    torch.manual_seed(0)
    model, loss = our_side(args, None) if args.memory_of == SIDES[0] else peer_side(args)[:2]
    step = stepper(model, loss)
    before = _kilobytes("VmRSS")
    step()
    step()
    print((_kilobytes("VmHWM") - before) / 2**10)


def _kilobytes(key: str) -> int:
    """Of this process (Linux): VmRSS now, VmHWM at most; ru_maxrss would include the process that started this one."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("width", 512), ("layers", 8), ("heads", 8), ("vocabulary", 32000), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("batch_size", 8), ("rank", 16), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--checkpoint", action="store_true", help="recompute each layer in the backward pass, both sides"
    )
    parser.add_argument("--memory_of", choices=SIDES, help="print one side's peak memory and end")
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_memory(args)
        return
    load = os.getloadavg()[0]
    row = measure(args)
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    memory = {
        side: float(subprocess.run([*command, "--memory_of", side], capture_output=True, text=True, check=True).stdout)
        for side in SIDES
    }
    print(
        f"width {args.width}, {args.layers} layers, {args.vocabulary} words, batch {args.batch_size} of up to "
        f"{args.length}, rank {args.rank}, float32, CPU, load average {load:.1f}\n"
        f"  step: ours {row[SIDES[0]]:.3g} s, {SIDES[1]} {row[SIDES[1]]:.3g} s, {row['ratio']:.2f} times as fast; "
        f"losses within {row['difference']:.1e}\n"
        f"  memory of a step: ours {memory[SIDES[0]]:.0f} MiB, {SIDES[1]} {memory[SIDES[1]]:.0f} MiB"
    )
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        content = {"torch": torch.__version__, "setting": setting, "row": row, "memory_mib": memory}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
