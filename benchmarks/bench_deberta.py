"""DeBERTa's text tower beside transformers' DebertaV2Model, in one run: same weights, equal outputs checked first.

    python benchmarks/bench_deberta.py --threads 2
    python benchmarks/bench_deberta.py --device cuda --dtype bfloat16 --batch_size 128

Both take the sizes of DeBERTa-v3 base (the text tower of VLE base) and right-padded questions. transformers has its
attention in eager torch alone. Forward, and forward with backward, in turns; medians.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.flags import add_shared_flags
from benchmarks.measure import autocast, in_turns, is_installed
from benchmarks.rows import NOT_INSTALLED, Result, Row, load_average, write_result
from models.loading import load_weights
from models.vle.config import VLETextConfig
from models.vle.deberta import DebertaV2

SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
OPTIONS = {
    "model_type": "deberta-v2",
    "vocab_size": 8192,  # the table's rows that are not looked up would only cost memory
    "max_position_embeddings": 512,
    "position_buckets": 256,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.2}


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Both sides in turns; medians over the rounds."""
    torch.manual_seed(0)
    values = OPTIONS | SIZES[args.size]
    models = {"ours": DebertaV2(VLETextConfig.from_dict(values, "bench")).to(args.device).train()}
    ids = torch.randint(4, values["vocab_size"], (args.batch_size, args.tokens), device=args.device)
    mask = None
    if args.padded:
        lengths = torch.randint(args.tokens // 3, args.tokens + 1, (args.batch_size, 1), device=args.device)
        lengths[0] = args.tokens
        mask = (torch.arange(args.tokens, device=args.device) < lengths).long()
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    outputs: dict[str, Callable[[], Tensor]] = {"ours": lambda: models["ours"](ids, mask)}
    if is_installed("transformers"):
        models["peer"] = build_peer(models["ours"], values).to(args.device).train()
        look = torch.ones_like(ids) if mask is None else mask
        outputs["peer"] = lambda: models["peer"](ids, attention_mask=look).last_hidden_state
    else:
        print(f"{NOT_INSTALLED}: transformers", flush=True)

    def run(name: str, backward: bool) -> Tensor:
        with torch.set_grad_enabled(backward), autocast(args.device, args.dtype):
            tokens = outputs[name]()[valid].float()
        if backward:
            models[name].zero_grad(set_to_none=True)
            tokens.square().mean().backward()
        return tokens

    row: dict[str, object] = {"load_before": load_average()}
    if "peer" in models:
        row["difference"] = (run("ours", False) - run("peer", False)).abs().max().item()
        if not row["difference"] <= MAX_DIFFERENCE[args.dtype]:
            raise SystemExit(f"error: outputs differ by {row['difference']:.1e}")
    for what, backward in (("forward", False), ("step", True)):
        sides = {name: lambda name=name, backward=backward: run(name, backward) for name in models}
        for name, seconds in in_turns(sides, args.rounds, args.device).items():
            row[f"{name}_{what}_s"] = seconds
        if "peer" in models:
            row[f"{what}_ratio"] = row[f"peer_{what}_s"] / row[f"ours_{what}_s"]
    row["load_after"] = load_average()
    return row


def build_peer(ours: DebertaV2, values: dict[str, object]) -> torch.nn.Module:
    """transformers' model; both get its weights."""
    from transformers import DebertaV2Config, DebertaV2Model

    peer = DebertaV2Model(DebertaV2Config(**{key: value for key, value in values.items() if key != "model_type"}))
    load_weights(ours, {name: value for name, value in peer.state_dict().items() if not name.endswith("position_ids")})
    return peer


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--padded", action="store_true", help="questions of different lengths, with a mask")
    add_shared_flags(parser, rounds=5, dtypes=MAX_DIFFERENCE)
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    row = measure(args)
    padded = ", padded" if args.padded else ""
    print(f"DeBERTa {args.size}, batch {args.batch_size}, {args.tokens} tokens{padded}, {args.dtype}, {args.device}")
    rows = []
    for what, key in (("forward", "forward"), ("forward and backward", "step")):
        ours, peer = row[f"ours_{key}_s"], row.get(f"peer_{key}_s")
        beside = "" if peer is None else f", transformers {peer:.4g} s, ratio {peer / ours:.2f}"
        print(f"  {what}: ours {ours:.4g} s{beside}")
        check = f"outputs within {row['difference']:.1e}" if "difference" in row else ""
        setting = f"{args.size}, batch {args.batch_size}, {args.tokens} tokens{padded}, {args.dtype}"
        rows.append(Row("steps", f"VLE's text tower: {what}", setting, ours, "transformers", peer, check))
    print(f"  load average {row['load_before']:.1f} before, {row['load_after']:.1f} after")
    return write_result(args.json, Result(rows, details=row), vars(args))


if __name__ == "__main__":
    main()
