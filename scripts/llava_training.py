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
from data.llava_dataset import Conversation, LlavaDataset, read_conversations
from data.llava_images import LlavaTransform
from data.llava_questions import read_llava_questions
from data.llava_sampler import LengthGroupedSampler, ShuffledSampler
from data.loader import EvalLoader, TrainLoader
from data.vizwiz import ANSWERS_KEY, VizWizRow, read_rows
from engine import distributed
from engine.log import say
from engine.partial_results import PartialResults
from models.llava.generation import Decoding
from models.llava.llava import IMAGE_PLACE, LlavaForCausalLM
from models.quantized import QuantizedWeight
from scripts import llava_vqa
from scripts.llava_feature_cache import cached_features
from scripts.llava_folder import LlavaFolder
from scripts.loaders import build_loader
from scripts.start import autocast_of

BEST_METRIC = "accuracy"
Validate = Callable[[nn.Module, EvalLoader, int], dict[str, float]]


def read_samples(args: argparse.Namespace) -> list[Conversation]:
    """The samples of ``--data_path``, cut by ``--limit_samples``.

    Raises:
        DataError: a broken file or sample.
    """
    return read_conversations(args.data_path)[: args.limit_samples]


def train_loader(
    args: argparse.Namespace,
    folder: LlavaFolder,
    samples: list[Conversation],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> TrainLoader:
    """Every sample, checked from the first to the last before any step.

    ``dtype`` is that of autocast, for the features of ``--feature_cache``.

    Raises:
        DataError: a sample that cannot be learnt from, images that are not there, too few samples for a step, or a
            feature cache that does not fit.
        RunError: no room for the features.
    """
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
    grouped = args.group_by_modality_length
    order = partial(LengthGroupedSampler, dataset.lengths()) if grouped else partial(ShuffledSampler, len(dataset))
    sampler = order(
        args.batch_size,
        accumulation_steps=args.update_freq,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=args.seed,
    )
    features = None
    if args.feature_cache:  # may take long: after all that can be wrong with the samples
        names = list(dict.fromkeys(sample.image for sample in samples if sample.image is not None))
        features = cached_features(args, folder, names, reader, device=device, dtype=dtype)
    if features is not None:
        dataset.use_features(features)
    return build_loader(args, dataset, dataset.collate, train=True, device=device, sampler=sampler)


def check_samples(samples: list[Conversation], args: argparse.Namespace, folder: LlavaFolder) -> None:
    """Encode every sample once, so that one that cannot be learnt from ends the run before it begins.

    The main process does it and tells the others.

    Raises:
        DataError: turns that do not fit the template, or no label that is left once images have taken their rows.
    """
    distributed.on_main(lambda: _check_samples(samples, args, folder))


def _check_samples(samples: list[Conversation], args: argparse.Namespace, folder: LlavaFolder) -> None:
    image_rows = folder.model.image_rows
    cut = labels = 0
    bar = tqdm(samples, desc="checking samples", unit="sample", leave=False, disable=None)
    for number, sample in enumerate(bar):
        where = f"{args.data_path}: sample {number} ({sample.name})"
        for turns in dict.fromkeys(sample.variants()):
            encoded = encode_conversation(
                turns,
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
                    f"{where}: its answer begins at row {learnt[0]}, behind --model_max_length "
                    f"{args.model_max_length}: raise it or shorten the sample"
                )
            cut += kept < len(learnt)
            labels += kept
    say(f"train: {len(samples)} samples, {labels} tokens to learn" + (f", {cut} answers are cut" if cut else ""))
    drawn = [len(sample.answers) for sample in samples if sample.answers]
    if drawn:
        say(f"train: {len(drawn)} samples with {ANSWERS_KEY}: each epoch draws among their {sum(drawn)} answers")


def training_loss(folder: LlavaFolder) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]:
    """What the loop calls at every micro-batch."""
    return partial(loss_fn, images=folder.images)


def loss_fn(model: LlavaForCausalLM, batch: dict[str, Any], step: int, *, images: CLIPImageSettings) -> dict[str, Any]:
    """Cross entropy of the answers' words, mean over those of the micro-batch (``step`` is not used)."""
    features = batch.get("features")
    pixels = normalize(batch["image"], images) if features is None else None
    scored = model(batch["ids"], pixels, features=features, mask=batch["mask"], labels=batch["labels"])
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
    """What the loop calls after every epoch, and its questions; nothing without ``--val_annotations``.

    Raises:
        DataError: questions, images or annotations are missing or broken.
    """
    if args.val_annotations is None:
        return None, None
    questions = read_llava_questions(args.val_questions)[: args.limit_samples]
    rows = llava_vqa.match_rows(read_rows(args.val_annotations), questions)
    if not args.skip_broken_images:
        check_images_exist((q.image for q in questions), Path(args.val_image_folder), flag="--val_image_folder")
    dataset = llava_vqa.question_dataset(
        folder,
        questions,
        args.val_image_folder,
        template=TEMPLATES[args.version],
        skip_broken_images=args.skip_broken_images,
    )
    loader = llava_vqa.question_loader(
        dataset,
        batch_size=args.eval_batch_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        max_bad_samples=args.max_bad_samples,
    )
    say(f"val: {len(questions)} questions")
    return partial(validate, folder=folder, args=args, rows=rows, device=device, dtype=dtype), loader


def validate(
    model: LlavaForCausalLM,
    loader: EvalLoader,
    epoch: int,
    *,
    folder: LlavaFolder,
    args: argparse.Namespace,
    rows: dict[int, VizWizRow],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, float]:
    """``accuracy``: that of greedy answers by the course's rule, in percent; ``unanswerable``: share of such answers.

    ``rows`` are the annotations by the questions' places; ``epoch`` makes no difference.
    """
    answers = llava_vqa.answer(
        model,
        loader,
        PartialResults(None, "validation", {}, list(rows)),
        tokenizer=folder.tokenizer,
        images=folder.images,
        decoding=Decoding(max_new_tokens=args.max_new_tokens),
        device=device,
        autocast=autocast_of(device, dtype),
    )
    scores = llava_vqa.score(rows, answers)
    return {
        BEST_METRIC: scores["accuracy"]["course"]["overall"],
        "unanswerable": 100 * scores["unanswerable"]["predicted"],
    }
