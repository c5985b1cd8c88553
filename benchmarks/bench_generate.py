"""Captions by beam search against the original's recipe, in one run: same weights, equal captions checked first.

    python benchmarks/bench_generate.py --model beit3_base_patch16_480 --batch_size 4 --threads 2
    python benchmarks/bench_generate.py --device cuda --dtype bfloat16 --compile --batch_size 32

The peer is torchscale's trunk driven as the original drives it: the image repeated for every beam in the first step,
keys and values of image and text cached for every beam, the whole cache moved when beams change places, a softmax over
the whole vocabulary, hypotheses handled one by one in Python. Weights are random, so captions would end anywhere: the
bias of the end token is set so low that every caption has ``--words`` words, on both sides.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.flags import add_shared_flags
from benchmarks.measure import DTYPES, autocast, is_installed
from benchmarks.rows import NOT_INSTALLED, Result, Row, load_average, write_result
from benchmarks.workload_beit3 import PEER_PACKAGES, torchscale_trunk
from models.beit3.config import beit3_config
from models.beit3.decoding import DecodingSettings, SpecialTokens, generate
from models.beit3.tasks import BEiT3ForCaptioning

TOKENS = SpecialTokens(bos=0, pad=1, eos=2, mask=64001)
MAX_SCORE_DIFFERENCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


class Clock:
    """Seconds between ticks, the device's queue emptied at each."""

    def __init__(self, device: str) -> None:
        """``device`` of the work."""
        self._device, self.ticks = device, []

    def tick(self) -> None:
        """Note the time."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds between the ticks."""
        return [after - before for before, after in zip(self.ticks, self.ticks[1:], strict=False)]


# ---------------------------------------------------------------------------------------------- the original's recipe
def recipe(trunk: torch.nn.Module, head: torch.nn.Module, image: Tensor, settings: DecodingSettings, clock: Clock):  # noqa: ANN201
    """Caption as the original does; (ids, scores) of the best hypothesis of each image."""
    num_images, num_beams, device = image.shape[0], settings.num_beams, image.device
    rows = num_images * num_beams
    state = {index: {} for index in range(len(trunk.encoder.layers))}
    words = torch.full((rows, 1), TOKENS.bos, device=device)
    scores = torch.zeros(num_images, num_beams, device=device)
    scores[:, 1:] = -1e9
    scores = scores.flatten()
    best: list[tuple[list[int], float] | None] = [None] * num_images
    images = image.repeat_interleave(num_beams, dim=0)
    num_image_tokens = trunk.vision_embed.num_position_embeddings()
    for length in range(2, settings.max_tokens):
        text = torch.cat([words[:, -1:], torch.full((rows, 1), TOKENS.mask, device=device)], dim=1)
        if length == 2:
            total = num_image_tokens + 2
            hidden = torch.ones(total, total, device=device).triu(1)
            hidden[:, :num_image_tokens] = 0
            out = trunk(text, images, attn_mask=hidden * -1e8, incremental_state=state)["encoder_out"]
        else:
            hidden = torch.zeros(2, num_image_tokens + length, device=device)
            hidden[0, -1] = -1e8
            places = torch.tensor([[length, length + 1]], device=device)
            out = trunk(text, None, attn_mask=hidden, incremental_state=state, positions=places)["encoder_out"]
        log_probs = head(out[:, -1]).float().log_softmax(dim=-1)
        candidates = (log_probs + scores[:, None]).view(num_images, -1).topk(3 * num_beams, dim=1)
        following = []
        for place in range(num_images):
            beams = []
            pairs = zip(candidates.values[place].tolist(), candidates.indices[place].tolist(), strict=True)
            for value, index in pairs:
                beam, word = divmod(index, log_probs.shape[1])
                row = place * num_beams + beam
                if word == TOKENS.eos or length + 1 == settings.max_tokens:
                    score = value / length**settings.length_penalty
                    if best[place] is None or score > best[place][1]:
                        best[place] = ([*words[row].tolist(), TOKENS.mask], score)
                else:
                    beams.append((value, word, row))
                if len(beams) == num_beams:
                    break
            following += beams
        if length + 1 < settings.max_tokens:
            scores = torch.tensor([value for value, _, _ in following], device=device)
            parents = torch.tensor([row for _, _, row in following], device=device)
            chosen = torch.tensor([[word] for _, word, _ in following], device=device)
            words = torch.cat([words[parents], chosen], dim=1)
            for layer in state.values():
                for name, value in layer.items():
                    layer[name] = value[:, :, :-1].index_select(0, parents)
        clock.tick()
    ids = [[*found, TOKENS.eos] for found, _ in best]
    return [row + [TOKENS.pad] * (settings.max_tokens - len(row)) for row in ids], [score for _, score in best]


# ------------------------------------------------------------------------------------------------------ measuring
def measure(args: argparse.Namespace) -> dict[str, object]:
    """Both sides in turns; medians over the rounds."""
    torch.manual_seed(0)
    config = beit3_config(args.model, "coco_captioning")
    model = BEiT3ForCaptioning(config).to(args.device).eval()
    with torch.no_grad():
        model.mlm_head.bias[TOKENS.eos] = -100
        model.mlm_head.weight.mul_(4)  # words that differ in probability, so that both sides choose the same ones
    has_peer = is_installed(*PEER_PACKAGES)
    if has_peer:
        trunk = torchscale_trunk(config, model.beit3, checkpoint_activations=False).trunk.to(args.device).eval()
    else:
        print(f"{NOT_INSTALLED}: torchscale", flush=True)
    image = torch.randn(args.batch_size, 3, config.image_size, config.image_size).to(args.device)
    settings = DecodingSettings(
        num_beams=args.beams, max_tokens=args.words + 3, length_penalty=0.6, compile=args.compile
    )

    def ours(clock: Clock):  # noqa: ANN202
        def every_step(done: bool) -> bool:
            clock.tick()
            return done

        with autocast(args.device, args.dtype):
            found = generate(model, image, TOKENS, settings, agree_done=every_step)
        return found.ids.tolist(), found.scores.tolist()

    def peer(clock: Clock):  # noqa: ANN202
        with torch.inference_mode(), autocast(args.device, args.dtype):
            return recipe(trunk, model.mlm_head, image, settings, clock)

    sides = {"ours": ours, "peer": peer} if has_peer else {"ours": ours}
    found = {name: side(Clock(args.device)) for name, side in sides.items()}
    row: dict[str, object] = {"load_before": load_average()}
    if has_peer:
        same = sum(one == other for one, other in zip(found["ours"][0], found["peer"][0], strict=True))
        difference = max(abs(one - other) for one, other in zip(found["ours"][1], found["peer"][1], strict=True))
        if not difference <= MAX_SCORE_DIFFERENCE[args.dtype] or (args.dtype == "float32" and same < args.batch_size):
            raise SystemExit(f"error: {same} of {args.batch_size} captions agree, scores by {difference:.1e}")
        row |= {"same_captions": same, "score_difference": difference}
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            times[name].append(_timed(side, args.device))
    for name, rounds in times.items():
        row[f"{name}_total_s"] = statistics.median(sum(steps) for steps in rounds)
        row[f"{name}_first_s"] = statistics.median(steps[0] for steps in rounds)
        row[f"{name}_step_s"] = statistics.median(value for steps in rounds for value in steps[1:])
        row[f"{name}_images_per_s"] = args.batch_size / row[f"{name}_total_s"]
    row["load_after"] = load_average()
    for key in ("total", "first", "step") if has_peer else ():
        row[f"{key}_ratio"] = row[f"peer_{key}_s"] / row[f"ours_{key}_s"]
    return row


def _timed(side: Callable[[Clock], object], device: str) -> list[float]:
    clock = Clock(device)
    clock.tick()
    side(clock)
    return clock.steps()


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="beit3_base_patch16_480")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--beams", type=int, default=3)
    parser.add_argument("--words", type=int, default=11, help="words of every caption (COCO's have about 10)")
    parser.add_argument("--compile", action="store_true", help="compile our step")
    add_shared_flags(parser, rounds=3, dtypes=DTYPES)
    return parser


def describe(row: dict[str, object], args: argparse.Namespace) -> str:
    """A few readable lines."""
    lines = [
        f"{args.model}, batch {args.batch_size}, {args.beams} beams, {args.words} words, {args.dtype}, {args.device}"
    ]
    for name in ("ours", "peer"):
        if f"{name}_total_s" in row:
            lines.append(
                f"  {name}: {row[f'{name}_images_per_s']:.3g} images/s; first step {row[f'{name}_first_s']:.4g} s, "
                f"each further one {row[f'{name}_step_s']:.4g} s"
            )
    if "total_ratio" in row:
        lines.append(
            f"  {row['same_captions']} of {args.batch_size} captions equal, scores within {row['score_difference']:.1e}"
            f"; ratio: {row['total_ratio']:.2f} in all, first {row['first_ratio']:.2f}, further {row['step_ratio']:.2f}"
        )
    lines.append(f"  load average {row['load_before']:.1f} before, {row['load_after']:.1f} after")
    return "\n".join(lines)


def rows_of(row: dict[str, object], args: argparse.Namespace) -> list[Row]:
    """The whole caption, its first word, each further one."""
    setting = f"batch {args.batch_size}, {args.beams} beams, {args.words} words, {args.dtype}"
    check = ""
    if "same_captions" in row:
        check = (
            f"{row['same_captions']} of {args.batch_size} captions equal, scores within {row['score_difference']:.1e}"
        )
    rows = []
    for name, key in (("all words", "total"), ("first word", "first"), ("each further word", "step")):
        what, ours, peer = f"{args.model} captions: {name}", row[f"ours_{key}_s"], row.get(f"peer_{key}_s")
        rows.append(Row("decoding", what, setting, ours, "torchscale, original's recipe", peer, check))
    return rows


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    row = measure(args)
    print(describe(row, args))
    return write_result(args.json, Result(rows_of(row, args), details=row), vars(args))


if __name__ == "__main__":
    main()
