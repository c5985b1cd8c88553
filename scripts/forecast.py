"""Predict a training step's memory at full size, without weights, data or a GPU, and what batch a card has room for.

    python scripts/forecast.py all                                    # the published recipes, the table of the docs
    python scripts/forecast.py beit3 --model beit3_large_patch16_480 --recompute full
    python scripts/forecast.py vlbert --cfg cfgs/vqa/base_spottune.yaml
    python scripts/forecast.py llava --model 13b --lora_r 64 --batch_size 4

Runs the step of the real model with tensors that have shapes but no values, one process, AdamW, and counts them.
The dry run of each program (--dry_run) does the same count with your data, strategy and backend.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import gc
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.arguments import OneLineParser, number, positive_int, recompute_policy
from scripts.program import run

if TYPE_CHECKING:
    from scripts.forecast_models import Step

CARDS = (24, 40, 80, 141)
_MANY = 64  # samples with which activations are most of the memory
_SHARE, _CONTEXT = 0.95, 0.75e9  # of a card: the allocator's slack, and bytes of the CUDA context and its libraries
_DEFAULTS = {  # family → model, samples per step and process, words of a question or conversation
    "beit3": ("beit3_base_patch16_480", 16, 20),
    "vle": ("vle-base", 8, 20),
    "vlbert": ("", 16, 14),
    "llava": ("7b", 16, 74),
}


@dataclass(frozen=True)
class Prediction:
    """Bytes that stay from step to step, bytes at most, and the largest batch that each card takes."""

    held: int
    peak: int
    largest: dict[int, int]


def build_parser() -> argparse.ArgumentParser:
    """Flags; those of another family are refused."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("family", choices=[*_DEFAULTS, "all"])
    p.add_argument("--model", help="such as beit3_base_patch16_480, vle-large, 13b (default: the family's base model)")
    p.add_argument("--task", choices=("vqav2", "coco_captioning", "nocaps"), help="of beit3 (default: vqav2)")
    p.add_argument("--cfg", help="of vlbert: a YAML file, strategy included (default: cfgs/vqa/base_4X16G_fp32.yaml)")
    p.add_argument("--image_size", type=positive_int, help="of vle: pixels of a side (default: 384)")
    p.add_argument("--boxes", type=positive_int, help="of vlbert: regions of an image (default: 100)")
    p.add_argument("--lora_r", type=positive_int, help="of llava: rank of the adapters (default: 128)")
    p.add_argument("--lora_dropout", type=number(float, low=0, high=1, below=True), help="of llava (default: 0.05)")
    p.add_argument("--recompute", type=recompute_policy, help="none, full or every_K (default: none)")
    p.add_argument("--batch_size", type=positive_int, help="samples per step and process (default: the recipe's)")
    p.add_argument("--words", type=positive_int, help="tokens of the longest text (default: usual questions)")
    p.add_argument("--amp", choices=("bf16", "no"), default="bf16", help="precision (default: %(default)s)")
    p.add_argument("--cards", type=positive_int, nargs="+", default=list(CARDS), help="GB of memory (%(default)s)")
    return p


_FLAGS_OF = {
    "beit3": {"task"},
    "vle": {"image_size"},
    "vlbert": {"cfg", "boxes"},
    "llava": {"lora_r", "lora_dropout"},
}


def main(argv: list[str] | None = None) -> None:
    """One row, or with ``all`` one for each published recipe."""
    parser = build_parser()
    args = parser.parse_args(argv)
    own = _FLAGS_OF.get(args.family, set())
    for flag in sorted({flag for flags in _FLAGS_OF.values() for flag in flags} - own):
        value = getattr(args, flag)
        if value is not None:
            parser.error(f"--{flag} is not for {args.family}: leave it out")
    given = [flag for flag in ("model", "recompute", "batch_size", "words") if getattr(args, flag) is not None]
    if args.family == "all" and given:
        parser.error(f"--{given[0]} is not for all, which takes the published recipes: name a family")
    if args.recompute == "auto":
        parser.error("--recompute auto is of a run with its data: give none, full or every_K")
    if args.family == "vlbert" and args.model:
        parser.error("--model is not for vlbert: --cfg says the size")

    rows = [(f"{args.family} {_name(args)}".strip(), args)]
    if args.family == "all":
        rows = [(label, parser.parse_args([*words.split(), "--amp", args.amp])) for label, words in PUBLISHED.items()]
    head = f"| run | batch | weights and optimizer | peak | {' | '.join(f'{card} GB' for card in args.cards)} |"
    head += "\n" + "|---" * (4 + len(args.cards)) + "|"
    for name, one in rows:
        batch_size = one.batch_size or _DEFAULTS[one.family][1]
        found = predict(build_step(one), batch_size, amp=one.amp, cards=args.cards)
        if head:
            print(head)
            head = ""
        sizes = " | ".join(str(found.largest[card] or "no") for card in args.cards)
        held, peak = (f"{number_of / 1e9:.1f} GB" for number_of in (found.held, found.peak))
        print(f"| {name} | {batch_size} | {held} | {peak} | {sizes} |", flush=True)


def _name(args: argparse.Namespace) -> str:
    words = [args.model or _DEFAULTS[args.family][0], args.task, args.cfg and Path(args.cfg).stem]
    words += [args.recompute and f"recompute {args.recompute}", "float32" if args.amp == "no" else None]
    return " ".join(word for word in words if word)


PUBLISHED = {  # label in the docs → flags
    "BEiT-3 base 480, VQAv2": "beit3",
    "BEiT-3 base 480, captioning, recomputing": "beit3 --task coco_captioning --batch_size 32 --words 32 "
    "--recompute full",
    "BEiT-3 large 480, VQAv2": "beit3 --model beit3_large_patch16_480",
    "BEiT-3 large 480, VQAv2, recomputing": "beit3 --model beit3_large_patch16_480 --recompute full",
    "VLE base 384": "vle",
    "VLE large 384": "vle --model vle-large",
    "VL-BERT base, Standard": "vlbert --cfg cfgs/vqa/base_4X16G_fp32.yaml",
    "VL-BERT base, SpotTune": "vlbert --cfg cfgs/vqa/base_spottune.yaml",
    "VL-BERT base, SpotTune_Block": "vlbert --cfg cfgs/vqa/base_spottune_block.yaml",
    "VL-BERT base, BlockDrop": "vlbert --cfg cfgs/vqa/base_blockdrop.yaml",
    "VL-BERT large, Standard": "vlbert --cfg cfgs/vqa/large_4X16G_fp32.yaml",
    "LLaVA-1.5 7B, LoRA r = 128": "llava",
    "LLaVA-1.5 7B, LoRA r = 128, recomputing": "llava --recompute full",
    "LLaVA-1.5 13B, LoRA r = 128, recomputing": "llava --model 13b --recompute full",
}


def build_step(args: argparse.Namespace) -> "Step":
    """The family's model, with the layers marked that are recomputed, and its batches.

    Raises:
        ModelError, DataError: there is no such model or config.
    """
    from models.recompute import Recompute, set_recompute

    step = _family_step(args)
    set_recompute(step.model, Recompute.parse(args.recompute or "none"))
    return step


def _family_step(args: argparse.Namespace) -> "Step":
    import torch

    from models.errors import ModelError
    from scripts import forecast_models as steps

    name, _, usual = _DEFAULTS[args.family]
    name, words = args.model or name, args.words or usual
    if args.family == "beit3":
        return steps.beit3_step(name, task=args.task or "vqav2", words=words, drop_path=0.1)
    if args.family == "vlbert":
        return steps.vlbert_step(args.cfg or "cfgs/vqa/base_4X16G_fp32.yaml", words=words, boxes=args.boxes or 100)
    known = steps.VLE_MODELS if args.family == "vle" else steps.LLAVA_MODELS
    if name not in known:
        raise ModelError(f"--model {name}: no such {args.family} model here; choose from {', '.join(known)}")
    if args.family == "vle":
        return steps.vle_step(name, words=words, image_size=args.image_size or 384)
    return steps.llava_step(
        name,
        words=words,
        rank=args.lora_r or 128,
        dropout=0.05 if args.lora_dropout is None else args.lora_dropout,
        dtype=torch.bfloat16 if args.amp == "bf16" else None,
    )


def predict(step: "Step", batch_size: int, *, amp: str, cards: list[int]) -> Prediction:
    """Memory at a batch size, and the largest batch of each card, 0 where not even one sample fits."""
    held, peak = step_memory(step, batch_size, amp)
    _, least = step_memory(step, 1, amp)  # with few samples the optimizer's step may be the highest point
    (_, many), (_, twice) = (step_memory(step, size, amp) for size in (_MANY, 2 * _MANY))
    each = (twice - many) / _MANY  # activations grow with the batch, all else stays
    largest = {}
    for card in cards:
        room = _SHARE * card * 1e9 - _CONTEXT
        largest[card] = max(0, _MANY + math.floor((room - many) / each)) if least <= room else 0
    return Prediction(held, peak, largest)


def step_memory(step: "Step", batch_size: int, amp: str) -> tuple[int, int]:
    """Bytes held from step to step and bytes at most, of a step without values; what is drawn is the same each time."""
    import torch

    from engine.forecast import StepMemory
    from scripts.forecast_models import SHAPES_ONLY

    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    memory = StepMemory(optimizer, torch.device("cpu"))
    step.model.train()
    compute = step.batch(batch_size)
    gc.collect()  # what a step before has left in circles
    with torch.random.fork_rng(devices=[]), memory:
        torch.manual_seed(0)  # adaptive strategies keep what their decisions choose
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            loss = compute()
        loss.backward()
        with SHAPES_ONLY:
            torch.nn.utils.get_total_norm([parameter.grad for parameter in trained], foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return memory.held_bytes, memory.peak_bytes


if __name__ == "__main__":
    run(main)
