"""Greedy answers of LLaVA beside transformers' ``generate``, in one run: same weights, equal words checked first.

    python benchmarks/bench_answers.py --threads 2
    python benchmarks/bench_answers.py --device cuda --dtype bfloat16 --width 4096 --layers 32 --heads 32 --batch_size 8

A picture and a question of uneven length each, both sides with a cache of keys and values, batches padded on the left.
Weights are random, so an answer would end anywhere: neither side can say the end, every answer has ``--words`` words.
The first word (image tower, prompt) and each further word are told apart by a second run of one word.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.measure import DTYPES, in_turns, is_installed
from benchmarks.rows import NOT_INSTALLED, Result, Row, load_average, write_result
from benchmarks.workload_llava import MAX_DIFFERENCE, add_decoder_flags, llama_values
from models.clip_vision import CLIPVisionConfig
from models.llava.config import LlamaConfig, LlavaConfig
from models.llava.generation import Decoding, generate
from models.llava.llava import IMAGE_PLACE, LlavaForCausalLM
from models.llava.loading import load_stream

_NUM_POSITIONS = 4096


def vision_values(args: argparse.Namespace) -> dict[str, int | str]:
    """Sizes of the tower."""
    return {
        "hidden_size": args.vision_width, "intermediate_size": 4 * args.vision_width, "patch_size": 14,
        "num_hidden_layers": args.vision_layers, "num_attention_heads": max(1, args.vision_width // 64),
        "image_size": args.image_size, "hidden_act": "quick_gelu",
    }  # fmt: skip


def build_ours(args: argparse.Namespace) -> LlavaForCausalLM:
    """Random weights; the end is a word that no row of the vocabulary has."""
    text = LlamaConfig.from_dict({**llama_values(args, num_positions=_NUM_POSITIONS), "eos_token_id": args.vocabulary})
    config = LlavaConfig(text=text, mm_hidden_size=args.vision_width, padding_side="left")
    with torch.device(args.device):
        return LlavaForCausalLM(config, CLIPVisionConfig.from_dict(vision_values(args))).to(DTYPES[args.dtype]).eval()


def build_peer(args: argparse.Namespace) -> torch.nn.Module:
    """transformers' model; its vocabulary has one word more, which marks image places."""
    import transformers

    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            **{**llama_values(args, num_positions=_NUM_POSITIONS), "vocab_size": args.vocabulary + 1},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        vision_config=transformers.CLIPVisionConfig(**vision_values(args)),
        image_token_index=args.vocabulary,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device(args.device):
        return transformers.LlavaForConditionalGeneration(config).to(DTYPES[args.dtype]).eval()


def draw_prompts(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T0) ids with an image place each, padded on the left, (B, T0) mask, pixels."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.linspace(max(3, args.prompt / 2), args.prompt, args.batch_size).round().int().tolist()
    ids = torch.zeros(args.batch_size, max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, args.vocabulary, (length,), generator=generator)
        ids[row, -length] = 1
        ids[row, -length + 1] = IMAGE_PLACE
        mask[row, -length:] = True
    pixels = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=generator)
    return ids.to(args.device), mask.to(args.device), pixels.to(args.device, DTYPES[args.dtype])


def with_places(ids: Tensor, mask: Tensor, places: int, image_token: int) -> tuple[Tensor, Tensor]:
    """What transformers expects: the image token once for every patch."""
    rows, marks = [], []
    for row, kept in zip(ids, mask, strict=True):
        at = int((row == IMAGE_PLACE).nonzero())
        rows.append(torch.cat([row[:at], row.new_full((places,), image_token), row[at + 1 :]]))
        marks.append(torch.cat([kept[:at], kept.new_ones(places), kept[at + 1 :]]))
    return torch.stack(rows), torch.stack(marks).long()


def build_sides(args: argparse.Namespace) -> tuple[dict[str, Callable[[int], Tensor]], float | None]:
    """Name to a function of the number of words that gives (B, words); and the difference of the first logits."""
    torch.manual_seed(0)
    ours, (ids, mask, pixels) = build_ours(args), draw_prompts(args)

    def our_answers(words: int) -> Tensor:
        with torch.no_grad():
            joined = ours.join(ids, pixels, mask=mask, padding_side="left")
            return generate(ours, joined, Decoding(max_new_tokens=words))

    if not is_installed("transformers"):
        print(f"{NOT_INSTALLED}: transformers", flush=True)
        return {"ours": our_answers}, None
    peer = build_peer(args)
    load_stream(ours, peer.state_dict().items(), padded_tables=True)
    places = (args.image_size // 14) ** 2
    repeated, marks = with_places(ids, mask, places, args.vocabulary)
    inputs = {"input_ids": repeated, "attention_mask": marks, "pixel_values": pixels}

    def peer_answers(words: int) -> Tensor:
        found = peer.generate(
            **inputs, max_new_tokens=words, do_sample=False, suppress_tokens=[args.vocabulary], pad_token_id=0
        )
        return found[:, repeated.shape[1] :]

    with torch.no_grad():
        expected = peer(**inputs).logits[:, -1, : args.vocabulary].float()
        found = ours(ids, pixels, mask=mask, with_logits=True).logits[:, -1]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= MAX_DIFFERENCE[args.dtype]:
        raise SystemExit(f"error: logits of the first word differ by {difference:.1e} of the largest")
    return {"ours": our_answers, "peer": peer_answers}, difference


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Both sides in turns; medians over the rounds."""
    sides, difference = build_sides(args)
    row: dict[str, float] = {}
    if difference is not None:
        answers = {name: side(args.words) for name, side in sides.items()}
        row["logit_difference"] = difference
        row["equal_words"] = (answers["ours"] == answers["peer"]).float().mean().item()
        if args.dtype == "float32" and row["equal_words"] < 1:  # in bfloat16 one rounding changes all later words
            raise SystemExit(f"error: only {100 * row['equal_words']:.1f} % of the words agree")
    for what, words in (("all", args.words), ("first", 1)):
        calls = {name: lambda side=side, words=words: side(words) for name, side in sides.items()}
        row |= {f"{name}_{what}_s": seconds for name, seconds in in_turns(calls, args.rounds, args.device).items()}
    for name in sides:
        row[f"{name}_further_s"] = (row[f"{name}_all_s"] - row[f"{name}_first_s"]) / max(1, args.words - 1)
    return row


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_decoder_flags(parser, rounds=3)
    for name, value in (("vision_width", 1024), ("vision_layers", 24), ("image_size", 336)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("batch_size", 4), ("words", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--prompt", type=int, default=64, help="words of the longest question; the shortest has half")
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    load, row = load_average(), measure(args)
    setting = (
        f"decoder {args.width} wide, {args.layers} layers, tower {args.vision_width} wide, {args.vision_layers} "
        f"layers, {args.image_size} px, batch {args.batch_size}, prompts to {args.prompt}, {args.words} words, "
        f"{args.dtype}"
    )
    check = ""
    if "equal_words" in row:
        words = 100 * row["equal_words"]
        check = f"{words:.0f} % of the words equal, first logits within {row['logit_difference']:.1e}"
    print(f"{setting}, {args.device}: {check}")
    rows = []
    for what, key in (("all words", "all"), ("first word", "first"), ("each further word", "further")):
        ours, peer = row[f"ours_{key}_s"], row.get(f"peer_{key}_s")
        if min(ours, peer or ours) <= 0:
            print(f"  {what}: --words {args.words} are too few to tell it from the first")
            continue
        beside = "" if peer is None else f", transformers {peer:.4g} s, ratio {peer / ours:.2f}"
        print(f"  {what}: ours {ours:.4g} s{beside}")
        rows.append(Row("decoding", f"LLaVA answers: {what}", setting, ours, "transformers", peer, check))
    print(f"  load average {load:.1f} before, {load_average():.1f} after")
    return write_result(args.json, Result(rows, details=row), vars(args))


if __name__ == "__main__":
    main()
