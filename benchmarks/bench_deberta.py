"""DeBERTa's text tower beside transformers' DebertaV2Model, in one run: same weights, equal outputs checked first.

    python benchmarks/bench_deberta.py --threads 2
    python benchmarks/bench_deberta.py --device cuda --dtype bfloat16 --batch_size 128

Both take the sizes of DeBERTa-v3 base (the text tower of VLE base) and right-padded questions. transformers has its
attention in eager torch alone. Forward, and forward with backward, in turns; medians.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.loading import load_weights
from models.vle.config import VLETextConfig
from models.vle.deberta import DebertaV2

SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.2}


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Both sides in turns; medians over the rounds."""
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    values = OPTIONS | SIZES[args.size]
    ours = DebertaV2(VLETextConfig.from_dict(values, "bench"))
    peer = DebertaV2Model(DebertaV2Config(**{key: value for key, value in values.items() if key != "model_type"}))
    state = {name: value for name, value in peer.state_dict().items() if not name.endswith("position_ids")}
    load_weights(ours, state)
    ours, peer = ours.to(args.device).train(), peer.to(args.device).train()
    ids = torch.randint(4, values["vocab_size"], (args.batch_size, args.tokens), device=args.device)
    mask = None
    if args.padded:
        lengths = torch.randint(args.tokens // 3, args.tokens + 1, (args.batch_size, 1), device=args.device)
        lengths[0] = args.tokens
        mask = (torch.arange(args.tokens, device=args.device) < lengths).long()
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    context = (
        contextlib.nullcontext if args.dtype == "float32" else lambda: torch.autocast(args.device, DTYPES[args.dtype])
    )

    def our_output() -> Tensor:
        with context():
            return ours(ids, mask)

    def peer_output() -> Tensor:
        with context():
            return peer(ids, attention_mask=torch.ones_like(ids) if mask is None else mask).last_hidden_state

    with torch.no_grad():
        difference = (our_output().float() - peer_output().float())[valid].abs().max().item()
    if difference > MAX_DIFFERENCE[args.dtype]:
        raise SystemExit(f"bench_deberta: error: outputs differ by {difference:.1e}")
    row: dict[str, object] = {"difference": difference, "load_before": os.getloadavg()[0]}
    for what, backward in (("forward", False), ("step", True)):
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(args.rounds + 1):
            for name, model, output in (("ours", ours, our_output), ("peer", peer, peer_output)):
                times[name].append(_timed(args.device, lambda m=model, o=output, b=backward: _pass(m, o, valid, b)))
        for name, seconds in times.items():
            row[f"{name}_{what}_s"] = statistics.median(seconds[1:])  # the first one warms up
        row[f"{what}_ratio"] = row[f"peer_{what}_s"] / row[f"ours_{what}_s"]
    row["load_after"] = os.getloadavg()[0]
    return row


def _pass(model: torch.nn.Module, output: Callable[[], Tensor], valid: Tensor, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            output()
        return
    model.zero_grad(set_to_none=True)
    output()[valid].float().square().mean().backward()


def _timed(device: str, work: Callable[[], None]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="base")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--padded", action="store_true", help="questions of different lengths, with a mask")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    row = measure(args)
    print(
        f"DeBERTa {args.size}, batch {args.batch_size}, {args.tokens} tokens{', padded' if args.padded else ''}, "
        f"{args.dtype}, {args.device}: outputs within {row['difference']:.1e}\n"
        f"  forward: ours {row['ours_forward_s']:.4g} s, transformers {row['peer_forward_s']:.4g} s, "
        f"ratio {row['forward_ratio']:.2f}\n"
        f"  forward and backward: ours {row['ours_step_s']:.4g} s, transformers {row['peer_step_s']:.4g} s, "
        f"ratio {row['step_ratio']:.2f}\n"
        f"  load average {row['load_before']:.1f} before, {row['load_after']:.1f} after"
    )
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(json.dumps({"torch": torch.__version__, "setting": setting, "row": row}, indent=2) + "\n")


if __name__ == "__main__":
    main()
