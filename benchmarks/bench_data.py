"""Images per second and core: our image pipeline against the recipe that the original BEiT-3 trained with.

The peer is that recipe as the original runs it: Pillow decoding, Pillow crop and bicubic resize, Pillow flip,
RandAugment on arrays with OpenCV, torchvision's ToTensor and Normalize (float32 out). Tables are applied with
``cv2.LUT``, faster than the original's numpy indexing, so the peer is nowhere slower than the original. Ours:
``load_image`` and the transforms of ``data/transforms.py`` (uint8 out, normalised on the device). Both draw the same
numbers; before anything is timed, our exact mode must give the peer's result bit for bit (OpenCV before 5.0; from then
on its warps are in floating point).

One thread, CPU time (other load on the machine does not count), photo-like JPEG files drawn from a fixed seed, rounds
in the order peer, ours, peer, ours.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from benchmarks.measure import is_installed
from benchmarks.rows import NOT_INSTALLED, Result, Row, write_result
from data.clip_images import CLIPImageSettings, CLIPTransform
from data.clip_images import normalize as clip_normalize
from data.images import load_image
from data.randaugment import POLICY_OPS, RandAugment, apply_op
from data.transforms import EvalTransform, TrainTransform, draw_crop, normalize

try:
    import cv2
except ImportError:
    cv2 = None

TO_FLOAT = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
MAX_CLIP_DIFFERENCE = 1e-5
KERNEL = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


# ------------------------------------------------------------------------------------------------------- the peer
def peer_autocontrast(image: np.ndarray, arg: None) -> np.ndarray:
    """Stretch each channel, with the original's wrapping offset."""
    channels = []
    for channel in cv2.split(image):
        low, high = int(channel.min()), int(channel.max())
        if high > low:
            scale = 255 / (high - low)
            table = (np.arange(256) * scale + (-low % 256) * scale).clip(0, 255).astype(np.uint8)
            channel = cv2.LUT(channel, table)
        channels.append(channel)
    return cv2.merge(channels)


def peer_equalize(image: np.ndarray, arg: None) -> np.ndarray:
    """Equalise the histogram of each channel."""
    channels = []
    for channel in cv2.split(image):
        histogram = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel()
        step = int(histogram.sum() - histogram[histogram != 0][-1]) // 255
        if step:
            table = (step // 2 + np.concatenate([[0], np.cumsum(histogram)[:-1]])) // step
            channel = cv2.LUT(channel, table.clip(0, 255).astype(np.uint8))
        channels.append(channel)
    return cv2.merge(channels)


def peer_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Scale all values."""
    return cv2.LUT(image, (np.arange(256, dtype=np.float32) * factor).clip(0, 255).astype(np.uint8))


def peer_sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Move away from the smoothed image, in float32, wrapping around as the original."""
    smooth = cv2.filter2D(image, -1, KERNEL).astype(np.float32)[1:-1, 1:-1]
    out = image.astype(np.float32)
    out[1:-1, 1:-1] = smooth + factor * (out[1:-1, 1:-1] - smooth)
    return out.astype(np.uint8)


def peer_warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Affine warp with a gray border."""
    height, width = image.shape[:2]
    return cv2.warpAffine(image, matrix, (width, height), borderValue=(128, 128, 128), flags=cv2.INTER_LINEAR)


PEER_OPS: dict[str, Callable] = {
    "Identity": lambda image, arg: image,
    "AutoContrast": peer_autocontrast,
    "Equalize": peer_equalize,
    "Brightness": peer_brightness,
    "Sharpness": peer_sharpness,
    "ShearX": lambda image, arg: peer_warp(image, np.float32([[1, arg, 0], [0, 1, 0]])),
    "ShearY": lambda image, arg: peer_warp(image, np.float32([[1, 0, 0], [arg, 1, 0]])),
    "TranslateX": lambda image, arg: peer_warp(image, np.float32([[1, 0, -arg], [0, 1, 0]])),
    "TranslateY": lambda image, arg: peer_warp(image, np.float32([[1, 0, 0], [0, 1, -arg]])),
    "Rotate": lambda image, arg: peer_warp(
        image, cv2.getRotationMatrix2D((image.shape[1] / 2, image.shape[0] / 2), arg, 1)
    ),
}


def peer_op(image: np.ndarray, name: str, arg: float | None) -> np.ndarray:
    """One operation of the peer; without OpenCV ours stands in, in the original's arithmetic."""
    return PEER_OPS[name](image, arg) if cv2 is not None else apply_op(image, name, arg, reference=True)


def peer_load(path: Path) -> Image.Image:
    """Decode with Pillow."""
    with Image.open(path) as image:
        return image.convert("RGB")


def peer_train(image: Image.Image, size: int, policy: RandAugment, rng: np.random.Generator) -> Tensor:
    """(3, S, S) float32; draws in the same order as ``TrainTransform``."""
    top, left, height, width = draw_crop(image.height, image.width, 0.5, rng)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.array(image)
    for name, arg in policy.draw(rng):
        pixels = peer_op(pixels, name, arg)
    return TO_FLOAT(pixels)


def peer_eval(image: Image.Image, size: int) -> Tensor:
    """(3, S, S) float32."""
    return TO_FLOAT(image.resize((size, size), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------- measurement
def draw_photos(folder: Path, count: int, seed: int) -> list[Path]:
    """Write 640 x 480 JPEG files of 70 to 150 KB: smooth shapes of several sizes with fine grain."""
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        pixels = np.full((480, 640, 3), 128.0)
        for cell, contrast in ((160, 50), (40, 30), (8, 14)):
            coarse = rng.normal(0, contrast, (480 // cell + 1, 640 // cell + 1, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(coarse[..., channel]).resize((640, 480), Image.Resampling.BICUBIC)
                pixels[..., channel] += np.asarray(layer)
        pixels += rng.normal(0, rng.uniform(5, 8), (480, 640, 1))
        paths.append(folder / f"photo_{number:03d}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def check_equal(paths: list[Path], size: int, policy: RandAugment) -> float:
    """Largest difference between the peer's outputs and ours in exact mode with the original's arithmetic."""
    exact = RandAugment(policy.num_ops, policy.magnitude, policy.fill, reference=True)
    transform, evaluate = TrainTransform(size, randaugment=exact, exact=True), EvalTransform(size)
    worst = 0.0
    for number, path in enumerate(paths):
        ours, peer = load_image(path), peer_load(path)
        pairs = (
            (
                normalize(transform(ours, np.random.default_rng(number))),
                peer_train(peer, size, exact, np.random.default_rng(number)),
            ),
            (normalize(evaluate(ours)), peer_eval(peer, size)),
        )
        worst = max(worst, *((first - second).abs().max().item() for first, second in pairs))
    return worst


def time_round(sample: Callable[[Path, np.random.Generator], object], paths: list[Path], seed: int) -> float:
    """Milliseconds of CPU time per image of one pass over all files."""
    start = time.process_time()
    for number, path in enumerate(paths):
        sample(path, np.random.default_rng([seed, number]))
    return (time.process_time() - start) * 1000 / len(paths)


def compare(samples: dict[str, tuple[Callable, Callable]], paths: list[Path], rounds: int) -> dict[str, dict]:
    """Best and median milliseconds per image of (peer, ours) for each named stage, interleaved round by round."""
    times = {name: ([], []) for name in samples}
    for number in range(-1, rounds):  # round -1 warms up
        for name, pair in samples.items():
            for side, sample in enumerate(pair):
                measured = time_round(sample, paths, seed=number + 1)
                if number >= 0:
                    times[name][side].append(measured)
    return {
        name: {
            "peer_ms": statistics.median(peer),
            "ours_ms": statistics.median(ours),
            "peer_best_ms": min(peer),
            "ours_best_ms": min(ours),
            "ratio": statistics.median(first / second for first, second in zip(peer, ours, strict=True)),
            "best_ratio": min(peer) / min(ours),
        }
        for name, (peer, ours) in times.items()
    }


def build_samples(size: int, policy: RandAugment, photo: Path) -> dict[str, tuple[Callable, Callable]]:
    """Name of a pipeline, stage or operation to (peer, ours), each a function of path and generator."""
    train, evaluate = TrainTransform(size, randaugment=policy), EvalTransform(size)
    plain = TrainTransform(size, randaugment=None)
    no_ops = RandAugment(num_ops=0)
    peer_image, image = peer_load(photo), load_image(photo)
    square = np.array(peer_image.resize((size, size), Image.Resampling.BICUBIC))
    samples: dict[str, tuple[Callable, Callable]] = {
        "train": (
            lambda path, rng: peer_train(peer_load(path), size, policy, rng),
            lambda path, rng: train(load_image(path), rng),
        ),
        "eval": (
            lambda path, rng: peer_eval(peer_load(path), size),
            lambda path, rng: evaluate(load_image(path)),
        ),
        "stage decode": (lambda path, rng: peer_load(path), lambda path, rng: load_image(path)),
        "stage crop, resize, flip, to tensor": (
            lambda path, rng: peer_train(peer_image, size, no_ops, rng),
            lambda path, rng: plain(image, rng),
        ),
    }
    rng = np.random.default_rng(0)
    for name in POLICY_OPS[1:]:
        arg = policy.draw_argument(name, rng)
        samples[f"op {name}"] = (
            lambda path, rng, name=name, arg=arg: peer_op(square, name, arg),
            lambda path, rng, name=name, arg=arg: apply_op(square, name, arg),
        )
    return samples


def clip_ours(size: int) -> Callable:
    """Images as VLE and LLaVA take them, uint8 out."""
    transform = CLIPTransform(CLIPImageSettings().resized(size))
    return lambda path, rng: transform(load_image(path))


def clip_peer(size: int) -> Callable:
    """transformers' processor behind Pillow, float32 out."""
    from transformers import CLIPImageProcessorPil

    sides = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=sides, resample=3)
    return lambda path, rng: processor(peer_load(path))["pixel_values"][0]


def check_clip(paths: list[Path], size: int) -> float:
    """Largest difference of the numbers that reach the model."""
    peer, ours, settings, worst = clip_peer(size), clip_ours(size), CLIPImageSettings().resized(size), 0.0
    for path in paths:
        expected = torch.as_tensor(np.asarray(peer(path, None)))
        worst = max(worst, (expected - clip_normalize(ours(path, None)[None], settings)[0]).abs().max().item())
    return worst


def rows_of(results: dict[str, dict], setting: str, check: str | None, clip_check: str | None) -> list[Row]:
    """Whole pipelines, seconds of CPU time an image; no check: the peer is not installed.

    Single stages and operations stay in the details.
    """
    rows = []
    for name, what in (("train", "training image"), ("eval", "evaluation image"), ("clip", "CLIP image (VLE, LLaVA)")):
        ours, peer = (results[name][f"{who}_ms"] / 1000 for who in ("ours", "peer"))
        peer_name, found = ("transformers", clip_check) if name == "clip" else ("original's recipe", check)
        rows.append(Row("data", what, setting, ours, peer_name, None if found is None else peer, found or ""))
    return rows


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=480, help="side of the model's input in pixels")
    parser.add_argument("--num_images", type=int, default=64, help="files drawn, and images per round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds measured, after one to warm up")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn files")
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure, print a table and one JSON line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("size", "num_images", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")

    torch.set_num_threads(1)
    if cv2 is not None:
        cv2.setNumThreads(1)
    policy = RandAugment()
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), args.num_images, args.seed)
        kilobytes = [path.stat().st_size / 1000 for path in paths]
        difference = check_equal(paths, args.size, policy)
        if difference > 0 and (cv2 is None or int(cv2.__version__.split(".")[0]) < 5):
            raise SystemExit(f"error: the peer and our exact mode differ by {difference}: the comparison would be void")
        samples = build_samples(args.size, policy, paths[0])
        samples["clip"], clip_check = (clip_ours(args.size),) * 2, None
        if is_installed("transformers"):
            clip_difference = check_clip(paths, args.size)
            if not clip_difference <= MAX_CLIP_DIFFERENCE:
                raise SystemExit(f"error: CLIP's images differ by {clip_difference:.1e}")
            samples["clip"] = (clip_peer(args.size), clip_ours(args.size))
            clip_check = f"pixels within {clip_difference:.0e}" if clip_difference else "equal pixels"
        else:
            print(f"{NOT_INSTALLED}: transformers")
        results = compare(samples, paths, args.rounds)

    opencv = cv2.__version__ if cv2 is not None else "none: our own operations stand in for the peer's"
    files = f"{args.num_images} JPEG files of {min(kilobytes):.0f} to {max(kilobytes):.0f} KB"
    print(f"{files}, size {args.size}, one thread")
    print(f"OpenCV of the peer: {opencv}; largest difference of our exact mode to the peer: {difference:g}")
    print(f"{'ms per image: median, best':38}{'peer':>16}{'ours':>16}{'ratio':>14}{'images/s':>16}")
    for name, row in results.items():
        peer, ours = (f"{row[f'{who}_ms']:.3f} {row[f'{who}_best_ms']:.3f}" for who in ("peer", "ours"))
        rates = f"{1000 / row['peer_ms']:.0f} {1000 / row['ours_ms']:.0f}"
        print(f"{name:38}{peer:>16}{ours:>16}{row['ratio']:>8.2f} {row['best_ratio']:.2f}{rates:>17}")
    summary = {
        "benchmark": "data",
        "size": args.size,
        "rounds": args.rounds,
        "num_images": args.num_images,
        "opencv": cv2.__version__ if cv2 is not None else None,
        "exact_difference": difference,
        "results": {name: {key: round(value, 4) for key, value in row.items()} for name, row in results.items()},
    }
    print(json.dumps(summary))
    check = "exact mode: equal pixels" if difference == 0 else f"exact mode: pixels within {difference:.0e}"
    if cv2 is None:
        check = None  # half of the peer is ours
    rows = rows_of(results, f"{files} to {args.size} px, one thread, CPU time", check, clip_check)
    return write_result(args.json, Result(rows, details=summary), vars(args))


if __name__ == "__main__":
    main()
