"""A LoRA training step of LLaVA's decoder beside transformers + peft, in one run: same weights, same losses.

    python benchmarks/bench_llava.py --threads 2
    python benchmarks/bench_llava.py --device cuda --dtype bfloat16 --width 4096 --layers 32 --heads 32 --length 650
        --batch_size 8 --rank 128 --peak_tflops 790   (one line: the decoder of the 7B model)

Samples of uneven length with labels on their last words, adapters on all linear layers of the decoder, AdamW over the
adapters. Ours lays the samples one behind the other and meets the vocabulary at labelled places only; the peer pads.
Losses are checked first. Peak memory is what two steps add, in a process of its own for each side. bfloat16: frozen
weights are kept in it, adapters in float32, both sides under autocast. FLOPs are counted by formula: no padding,
nothing recomputed, the vocabulary at labelled places only, no gradient of frozen weights.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.measure import DTYPES, PeakMemory, autocast, in_own_process, in_turns, is_installed
from benchmarks.rows import NOT_INSTALLED, Result, Row, load_average, write_result
from benchmarks.workload_llava import MAX_DIFFERENCE, add_decoder_flags, llama_values
from models.linear import Linear
from models.llava.config import LlamaConfig
from models.llava.llama import IGNORED, LlamaModel, next_word_loss
from models.lora import LoRAConfig, add_adapters
from models.recompute import Recompute, set_recompute

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
        return next_word_loss(hidden, self.lm_head, targets)


def sizes(args: argparse.Namespace) -> dict[str, float]:
    """Of both models."""
    return llama_values(args, num_positions=2 * args.length)


def lengths_of(args: argparse.Namespace) -> list[int]:
    """Between a quarter and all of the longest length."""
    return torch.linspace(args.length / 4, args.length, args.batch_size).round().int().tolist()


def batch_of(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """Samples and their labels; the last tenth of each is labelled."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, args.vocabulary, (length,), generator=generator) for length in lengths_of(args)]
    labels = [torch.cat([s.new_full((len(s) - len(s) // 10,), IGNORED), s[len(s) - len(s) // 10 :]]) for s in samples]
    return [sample.to(args.device) for sample in samples], [row.to(args.device) for row in labels]


def our_side(args: argparse.Namespace, state: dict[str, Tensor] | None) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Model and its loss."""
    with torch.device(args.device):
        model = Decoder(LlamaConfig.from_dict(sizes(args))).requires_grad_(False)
    if state is not None:
        model.load_state_dict(state)
    model.to(DTYPES[args.dtype])
    add_adapters(model.model.layers, LoRAConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0))
    set_recompute(model, Recompute(int(args.checkpoint)))
    samples, labels = batch_of(args)

    def loss() -> Tensor:
        with autocast(args.device, args.dtype):
            return model(samples, labels)

    return model, loss


def peer_side(args: argparse.Namespace) -> tuple[nn.Module, Callable[[], Tensor], dict[str, Tensor]]:
    """The same in transformers and peft, and the base weights."""
    import peft
    import transformers

    with torch.device(args.device):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes(args), pad_token_id=0))
    base.to(DTYPES[args.dtype])
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

    def loss() -> Tensor:
        with autocast(args.device, args.dtype):
            return model(input_ids=ids, attention_mask=mask, labels=marks).loss

    return model, loss, state


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and of a forward pass of both sides, in turns."""
    torch.manual_seed(0)
    losses, models, row = {}, {}, {}
    state = None
    if args.has_peer:
        models[SIDES[1]], losses[SIDES[1]], state = peer_side(args)
    models[SIDES[0]], losses[SIDES[0]] = our_side(args, state)
    del state
    sides = {name: models[name] for name in SIDES if name in models}
    forward = {name: lambda name=name: _without_graph(losses[name]) for name in sides}
    if args.has_peer:
        row |= compare(models, losses, args.dtype)
    steps = {name: stepper(model, losses[name]) for name, model in sides.items()}
    row |= in_turns(steps, args.rounds, args.device, settled=True)
    row |= {f"{name}, forward": seconds for name, seconds in in_turns(forward, args.rounds, args.device).items()}
    if args.has_peer:
        row["ratio"] = row[SIDES[1]] / row[SIDES[0]]
    row["tflops"] = step_flops(args) / row[SIDES[0]] / 1e12
    return row


def compare(models: dict[str, nn.Module], losses: dict[str, Callable[[], Tensor]], dtype: str) -> dict[str, float]:
    """Give both the same adapters, which start silent; difference of the losses, and of the adapters' gradients.

    Ends the program if they do not compute the same.
    """
    ours, peer = (dict(models[name].named_parameters()) for name in SIDES)
    pairs = []
    for name, parameter in ours.items():
        if "lora_" in name:
            other = peer[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]
            nn.init.normal_(other, std=0.02)
            parameter.data.copy_(other.data)
            pairs.append((parameter, other))
    found = {name: losses[name]() for name in SIDES}
    for loss in found.values():
        loss.backward()
    difference = abs(found[SIDES[0]].item() - found[SIDES[1]].item())
    largest = max(other.grad.abs().max().item() for _, other in pairs)
    gradient = max((one.grad - other.grad).abs().max().item() for one, other in pairs) / largest
    if not (difference <= MAX_DIFFERENCE[dtype] and gradient <= MAX_DIFFERENCE[dtype]):
        raise SystemExit(f"error: losses differ by {difference:.1e}, gradients by {gradient:.1e} of the largest")
    return {"difference": difference, "gradient_difference": gradient}


@torch.no_grad()
def _without_graph(loss: Callable[[], Tensor]) -> float:
    return loss().item()


def step_flops(args: argparse.Namespace) -> float:
    """Useful FLOPs of a training step: forward, and backward to activations and adapters."""
    values = sizes(args)
    width, inner, layers = values["hidden_size"], values["intermediate_size"], args.layers
    lengths = lengths_of(args)
    tokens, labelled = sum(lengths), sum(length // 10 for length in lengths)
    frozen = layers * (4 * width**2 + 3 * width * inner)
    adapters = layers * args.rank * (4 * 2 * width + 3 * (width + inner))
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    matrices = 4 * frozen + 6 * adapters  # a frozen one: forward and to its input; an adapter: its own gradient too
    return tokens * matrices + 3 * layers * 4 * width * pairs + 4 * labelled * width * args.vocabulary


def probe_memory(args: argparse.Namespace, side: str) -> float:
    """MiB that two steps of one side add to what the process had with its model."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, loss = our_side(args, None) if side == SIDES[0] else peer_side(args)[:2]
    step = stepper(model, loss)
    peak = PeakMemory(args.device)
    step()
    step()
    return peak.mib()


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_decoder_flags(parser, rounds=5)
    for name, value in (("length", 256), ("batch_size", 8), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak_tflops", type=float, help="of the device, for the utilisation (790: bf16 on an H200)")
    parser.add_argument(
        "--checkpoint", action="store_true", help="recompute each layer in the backward pass, both sides"
    )
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    args.has_peer = is_installed("transformers", "peft")
    if not args.has_peer:
        print(f"{NOT_INSTALLED}: {SIDES[1]}", flush=True)
    names = SIDES[: 1 + args.has_peer]
    memory = {side: in_own_process(probe_memory, args, side, device=args.device) for side in names}
    load = load_average()
    torch.set_num_threads(args.threads)
    row = measure(args)
    setting = (
        f"width {args.width}, {args.layers} layers, {args.vocabulary} words, batch {args.batch_size} of up to "
        f"{args.length}, rank {args.rank}, {args.dtype}{', checkpointed' if args.checkpoint else ''}"
    )
    print(f"{setting}, {args.device}, load average {load:.1f}")
    for name in names:
        print(
            f"  {name}: step {row[name]:.3g} s, forward {row[f'{name}, forward']:.3g} s, memory {memory[name]:.0f} MiB"
        )
    check = ""
    if args.has_peer:
        check = f"losses within {row['difference']:.1e}, gradients {row['gradient_difference']:.1e} of the largest"
    if args.has_peer:
        print(f"  {row['ratio']:.2f} times as fast; {check}")
    rows = [
        Row(
            "steps",
            f"LLaVA's decoder: {what}",
            setting,
            row[f"{SIDES[0]}{key}"],
            SIDES[1],
            row.get(f"{SIDES[1]}{key}"),
            check,
        )
        for what, key in (("adapter train step", ""), ("forward pass with loss", ", forward"))
    ]
    rows[0].ours_mib, rows[0].peer_mib = memory[SIDES[0]], memory.get(SIDES[1])
    if args.peak_tflops:
        rows[0].utilisation = row["tflops"] / args.peak_tflops
    return write_result(args.json, Result(rows, details={**row, "memory_mib": memory}), vars(args))


if __name__ == "__main__":
    main()
