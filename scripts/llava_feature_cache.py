"""Features of the training images from ``--feature_cache``, computed before the first step where they are not there."""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.clip_images import normalize
from data.errors import DataError
from data.image_reader import ImageReader
from data.llava_features import FeatureFolder, FeatureKind, FeatureReader, ImageFile, PictureDataset, Place
from data.loader import build_eval_loader
from engine import distributed, stop
from engine.errors import EngineError, RunError, Stopped
from engine.log import say
from engine.write_failures import why_not_written
from models.errors import ModelError
from scripts.llava_folder import LlavaFolder
from scripts.start import autocast_of, precision_name

PART_BYTES = 64 * 2**20  # a stop loses no more than a part of each process
_PROBE = ".probe"


def cached_features(
    args: argparse.Namespace,
    folder: LlavaFolder,
    names: Sequence[str],
    images: ImageReader,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> FeatureReader | None:
    """Have the features of all images on disk; all processes call it together.

    Args:
        args: of the program.
        folder: of the model, whose tower is frozen and on ``device``.
        names: paths of the images below ``--image_folder``, each once.
        images: reads them; a broken one is an error or grey, as it is told.
        device: of the model.
        dtype: of autocast; None for float32.

    Returns:
        Their reader; None in a dry run that lacks some, since it writes nothing.

    Raises:
        DataError: the folder cannot be used, or an image cannot be read.
        ModelError: the tower draws, so that its features differ from one time to the next.
        RunError: no room, or the tower gives no finite numbers.
    """
    if folder.model.tower.config.attention_dropout:
        raise ModelError("the image tower has dropout (attention_dropout): leave --feature_cache out")
    kind = _kind(folder, dtype)
    cache = FeatureFolder(Path(args.feature_cache), kind, distributed.on_main(lambda: _made_with(args, folder, dtype)))
    root = Path(args.image_folder)
    places = distributed.on_main(lambda: _find(cache, names, root))
    missing = [name for name in names if name not in places]
    size = f"{len(names)} images, {kind.num_bytes:,} bytes each"
    if missing and args.dry_run:
        say(f"feature cache: {len(missing)} of {size}, are not there; a dry run computes none")
        return None
    broken: dict[str, str] = {}
    if missing:
        distributed.on_main(lambda: _create(cache, len(missing)))
        _require_shared(cache.folder)
        broken = _fill(args, folder, PictureDataset(missing, root, images), cache, device=device, dtype=dtype)
        places = distributed.on_main(lambda: _find(cache, names, root))
        lost = [name for name in names if name not in places and name not in broken]
        if lost:
            raise DataError(f"image {lost[0]} was changed while its features were computed: start the command again")
    say(f"feature cache {cache.folder}: {size}; {len(missing) - len(broken)} were computed now")
    grey = None
    if broken:
        side = folder.vision.image_size
        pixels = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
        grey = _tower_features(folder, pixels, args.batch_size, device=device, dtype=dtype).to(kind.dtype)[0]
    return FeatureReader(cache.folder, kind, places, broken=broken, grey=grey)


def _kind(folder: LlavaFolder, dtype: torch.dtype | None) -> FeatureKind:
    """Size and dtype of an image's features, such that nothing is lost.

    Under autocast a linear projector takes its input in autocast's dtype, whatever the tower's norms make of it;
    without one the features go into the sequence as they are.
    """
    model = folder.model
    is_linear = len(list(model.model.mm_projector.parameters())) > 0
    return FeatureKind(model.image_rows, model.config.mm_hidden_size, dtype if dtype and is_linear else torch.float32)


def _made_with(args: argparse.Namespace, folder: LlavaFolder, dtype: torch.dtype | None) -> dict[str, object]:
    """All that the features depend on beside the images; the tower's layers end with the one that is looked at."""
    model = folder.model
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.tower.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    sizes = asdict(model.tower.config)
    return {
        "image_aspect_ratio": args.image_aspect_ratio,
        "tower layers": sizes.pop("num_hidden_layers"),  # as far as mm_vision_select_layer
        "mm_vision_select_feature": model.config.mm_vision_select_feature,
        "image size": sizes.pop("image_size"),
        "image settings": asdict(folder.images),
        "precision": precision_name(dtype),
        "tower sizes": sizes,
        "tower weights": digest.hexdigest(),
    }


def _find(cache: FeatureFolder, names: Sequence[str], root: Path) -> dict[str, Place]:
    return cache.find(
        names, root, progress=lambda names: tqdm(names, desc="looking", unit="image", leave=False, disable=None)
    )


def _create(cache: FeatureFolder, num_missing: int) -> None:
    """Make the folder and see whether there is room; leaves a probe for the other processes."""
    try:
        cache.create()
        (cache.folder / _PROBE).touch()
    except OSError as error:
        raise DataError(
            f"--feature_cache {cache.folder} cannot be written ({error.strerror}): give another folder"
        ) from None
    needed, free = num_missing * cache.kind.num_bytes, shutil.disk_usage(cache.folder).free
    if needed > free:
        (cache.folder / _PROBE).unlink()
        raise RunError(
            f"--feature_cache {cache.folder}: the features of {num_missing} images need {needed:,} bytes, {free:,} are "
            "free there: free some space, give another folder, or leave the flag out"
        )


def _require_shared(folder: Path) -> None:
    """Every process writes parts that all read."""

    def look() -> None:
        if not (folder / _PROBE).exists():
            raise EngineError(
                f"--feature_cache {folder} is not the same folder for all processes: put it on a file system that all "
                "machines share"
            )

    try:
        distributed.together(look)
    finally:
        if distributed.is_main():
            (folder / _PROBE).unlink(missing_ok=True)


def _fill(
    args: argparse.Namespace,
    folder: LlavaFolder,
    dataset: PictureDataset,
    cache: FeatureFolder,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """Compute the features of the images, each on one process; returns those that are broken, and why."""
    world_size = distributed.world_size()
    loader = build_eval_loader(
        dataset,
        dataset.collate,
        args.batch_size,
        rank=distributed.rank(),
        world_size=world_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    writer, broken = _PartWriter(cache, len(dataset)), {}

    def compute(batch: dict | None) -> None:
        if batch is None:  # another process has one more
            return
        features = _tower_features(folder, batch["image"], args.batch_size, device=device, dtype=dtype)
        if not torch.isfinite(features).all():
            bad = next(n for n, row in zip(batch["name"], features, strict=True) if not torch.isfinite(row).all())
            raise RunError(f"the image tower gives no finite numbers for {bad}: try --bf16 True, or float32")
        broken.update({n: error for n, error in zip(batch["name"], batch["error"], strict=True) if error})
        good = [place for place, file in enumerate(batch["file"]) if file is not None]
        writer.add([batch["file"][place] for place in good], features[good])

    show = distributed.is_main() and sys.stderr.isatty()
    bar = tqdm(total=len(dataset), desc="image features", unit="image", leave=False, disable=not show)
    rounds, batches = max(distributed.gather_objects(len(loader))), iter(loader)
    with stop.listening(), bar:
        try:
            for _ in range(rounds):
                distributed.together(lambda: compute(next(batches, None)))
                bar.update(min(args.batch_size * world_size, len(dataset) - bar.n))
                stop.raise_if_asked()
        except (DataError, EngineError, RunError, Stopped):
            with suppress(RunError):
                writer.flush()  # the next start goes on from here
            raise
        distributed.together(writer.flush)
    return {name: error for part in distributed.gather_objects(broken) for name, error in part.items()}


def _tower_features(
    folder: LlavaFolder, pixels: Tensor, batch_size: int, *, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """(I, 3, S, S) bytes -> (I, P, C) on the CPU, as a training step computes them.

    The last bits of a matrix product may depend on the number of its rows, so there are as many images as in a
    micro-batch. For some sizes they depend on the neighbours too: a run without a cache has no fixed ones then.
    """
    repeated = torch.arange(batch_size) % len(pixels)
    images = normalize(pixels[repeated].to(device), folder.images)
    with torch.inference_mode(), autocast_of(device, dtype)():
        features = folder.model.tower_features(images)[: len(pixels)]
    return features.cpu().clone()


class _PartWriter:
    """Gathers features until they fill a part."""

    def __init__(self, cache: FeatureFolder, num_images: int) -> None:
        self._cache, self._num_images = cache, num_images
        self._files: list[ImageFile] = []
        self._features: list[Tensor] = []

    def add(self, files: list[ImageFile], features: Tensor) -> None:
        self._files += files
        self._features.append(features.to(self._cache.kind.dtype))
        if len(self._files) * self._cache.kind.num_bytes >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what has been gathered, if anything.

        Raises:
            RunError: no room.
        """
        if not self._files:
            return
        try:
            self._cache.add(self._files, torch.cat(self._features))
        except OSError as error:
            needed, why = self._num_images * self._cache.kind.num_bytes, why_not_written(self._cache.folder, error)
            raise RunError(
                f"could not write the features of {len(self._files)} images to --feature_cache {self._cache.folder} "
                f"({why}): those of this start need {needed:,} bytes; free some space, then the "
                "same command goes on, or give another folder"
            ) from None
        self._files, self._features = [], []
