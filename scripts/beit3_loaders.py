"""What BEiT-3's tasks do to images, from the flags."""

import argparse
from pathlib import Path

from data.image_reader import ImageReader
from data.randaugment import RandAugment
from data.transforms import EvalTransform, TrainTransform


def image_reader(args: argparse.Namespace, image_size: int, *, train: bool) -> ImageReader:
    """Random crop, flip and RandAugment for training, a plain resize for everything else."""
    if train:
        augment = RandAugment(reference=args.randaug_reference) if args.randaug else None
        transform = TrainTransform(
            image_size,
            args.train_interpolation,
            augment,
            min_crop_scale=args.min_crop_scale,
            hflip=args.hflip,
            exact=args.exact_transforms,
        )
    else:
        transform = EvalTransform(image_size)
    return ImageReader(
        Path(args.data_path), transform, image_size=image_size, replace_broken_images=args.skip_broken_images
    )
