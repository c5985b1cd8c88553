"""Training data and loss of LLaVA, wired for the run script."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.clip_images import CLIPImageSettings, normalize
from data.errors import DataError
from data.image_reader import ImageReader, check_images_exist
from data.llava_conversation import IGNORE_INDEX, TEMPLATES, encode_conversation
from data.llava_dataset import Conversation, LlavaCollate, LlavaDataset, read_conversations
from data.llava_images import LlavaTransform
from data.llava_sampler import LengthGroupedSampler
from data.loader import EvalLoader, TrainLoader
from engine import distributed
from engine.log import say
from models.llava.llava import LlavaForCausalLM
from models.llava.splice import IMAGE_PLACE
from models.quantized import QuantizedWeight
from scripts.llava_folder import LlavaFolder
from scripts.loaders import build_loader

BEST_METRIC = "accuracy"
Validate = Callable[[nn.Module, EvalLoader, int], dict[str, float]]


def train_loader(args: argparse.Namespace, folder: LlavaFolder, *, device: torch.device) -> TrainLoader:
    """Every sample of ``--data_path``, checked from the first to the last before any step.

    Raises:
        DataError: a broken file or sample, images that are not there, or too few samples for a step.
    """
    samples = read_conversations(args.data_path)[: args.limit_samples]
    if not args.skip_broken_images:
        images = (sample.image for sample in samples if sample.image is not None)
        check_images_exist(images, Path(args.image_folder), flag="--image_folder")
    check_samples(samples, args, folder)
    reader = ImageReader(
        Path(args.image_folder),
        LlavaTransform(folder.images, args.image_aspect_ratio),
        image_size=folder.vision.image_size,
        replace_broken_images=args.skip_broken_images,
    )
    dataset = LlavaDataset(
        samples,
        reader,
        folder.tokenizer,
        TEMPLATES[args.version],
        image_size=folder.vision.image_size,
        max_length=args.model_max_length,
    )
    sampler = None
    if args.group_by_modality_length:
        sampler = LengthGroupedSampler(
            dataset.lengths(),
            args.batch_size,
            accumulation_steps=args.update_freq,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=args.seed,
        )
    collate = LlavaCollate(folder.model.config.text.pad_token_id, args.model_max_length)
    return build_loader(args, dataset, collate, train=True, device=device, sampler=sampler)


def check_samples(samples: list[Conversation], args: argparse.Namespace, folder: LlavaFolder) -> None:
    """Encode every sample once, so that one that cannot be learnt from ends the run before it begins.

    The main process does it and tells the others.

    Raises:
        DataError: turns that do not fit the template, or no label that is left once images have taken their rows.
    """
    error: DataError | None = None
    if distributed.is_main():
        try:
            _check_samples(samples, args, folder)
        except DataError as raised:
            error = raised
    distributed.raise_together(error)


def _check_samples(samples: list[Conversation], args: argparse.Namespace, folder: LlavaFolder) -> None:
    image_rows = num_image_rows(folder)
    cut = labels = 0
    bar = tqdm(samples, desc="checking samples", unit="sample", leave=False, disable=None)
    for number, sample in enumerate(bar):
        where = f"{args.data_path}: sample {number} ({sample.name})"
        encoded = encode_conversation(
            sample.turns,
            folder.tokenizer,
            TEMPLATES[args.version],
            has_image=sample.image is not None,
            max_length=args.model_max_length,
            where=where,
        )
        ids, targets = np.array(encoded.ids), np.array(encoded.labels)
        # the row that each token has once every image place has become the image's rows
        rows = np.arange(len(ids)) + np.cumsum(ids == IMAGE_PLACE) * (image_rows - 1)
        learnt = rows[targets != IGNORE_INDEX]
        kept = int((learnt < args.model_max_length).sum())
        if not kept:
            raise DataError(
                f"{where}: its answer begins at row {learnt[0]}, behind --model_max_length {args.model_max_length}: "
                "raise it or shorten the sample"
            )
        cut += kept < len(learnt)
        labels += kept
    say(f"train: {len(samples)} samples, {labels} words to learn" + (f", {cut} answers are cut" if cut else ""))


def num_image_rows(folder: LlavaFolder) -> int:
    """Rows that an image takes in a sequence."""
    patches = (folder.vision.image_size // folder.vision.patch_size) ** 2
    return patches + (folder.model.config.mm_vision_select_feature == "cls_patch")


def training_loss(folder: LlavaFolder) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]:
    """What the loop calls at every micro-batch."""
    return partial(loss_fn, images=folder.images)


def loss_fn(model: LlavaForCausalLM, batch: dict[str, Any], step: int, *, images: CLIPImageSettings) -> dict[str, Any]:
    """Cross entropy of the answers' words, mean over those of the micro-batch (``step`` is not used)."""
    pixels = normalize(batch["image"], images)
    scored = model(batch["ids"], pixels, mask=batch["mask"], labels=batch["labels"])
    return {"loss": scored.loss, "images_replaced": batch["images_replaced"]}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Trained and frozen parameters, quantized ones by the weights that they stand for."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = 0
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            frozen += module.shape.numel()
        else:
            frozen += sum(p.numel() for p in module.parameters(recurse=False) if not p.requires_grad)
    return {"parameters_trained": trained, "parameters_frozen": frozen}


def validation(
    args: argparse.Namespace, folder: LlavaFolder, *, device: torch.device, dtype: torch.dtype | None
) -> tuple[Validate | None, EvalLoader | None]:
    """What the loop calls after every epoch, and its questions; nothing without ``--val_annotations``."""
    if args.val_annotations is None:
        return None, None
    raise NotImplementedError
