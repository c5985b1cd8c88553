"""Visual question answering with VLE: its data, loss, validation and prediction files, wired for the run script."""

import argparse
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.clip_images import CLIPImageSettings, CLIPTransform, normalize
from data.errors import DataError
from data.image_reader import ImageReader, check_images_exist
from data.loader import EvalLoader, TrainLoader
from data.own_vqa import build_answer_list, read_vqa_file
from data.row_files import RowRecords, find_rows
from data.tokenizers.deberta import DebertaTokenizer
from data.vle_rows import read_labels
from data.vqa_answers import AnswerVocabulary
from data.vqa_dataset import VQACollate, VQADataset
from data.vqa_index import VQARecord
from engine.log import say
from models.losses import vqa_loss
from scripts.loaders import build_loader
from scripts.vle_model import VLEFolder
from scripts.vqa_evaluation import answer_split, evaluate, with_shuffled_images

BEST_METRIC = "score"
# split → row files
SPLITS = {
    "train": ("train", "trainable_val"),
    "val": ("rest_val",),
    "val2014": ("val",),
    "test": ("test",),
    "test-dev": ("test-dev",),
}
_WITH_UNLABELLED = ("val", "val2014")


def load_answers(args: argparse.Namespace, folder: VLEFolder) -> AnswerVocabulary:
    """The answer list: the data's in training; in an evaluation the model's own, else the data's."""
    if args.eval and folder.answers is not None:
        return folder.answers
    if args.train_file:
        return build_answer_list(args.train_file + ([args.val_file] if args.val_file else []))
    return read_labels(args.data_root)


def read_split(
    args: argparse.Namespace, split: str, tokenizer: DebertaTokenizer, answers: AnswerVocabulary
) -> Sequence[VQARecord]:
    """Records of ``train``, a split of VQAv2, or a ``.jsonl`` file of one's own; cut by ``--limit_samples``.

    Raises:
        DataError: missing or broken files, images that are not there, or rows that number another answer list.
    """
    if split == "train" and args.train_file:
        records: Sequence[VQARecord] = [
            record
            for path in args.train_file
            for record in read_vqa_file(path, tokenizer, answers, drop_unlabelled=True)
        ]
    elif split == "val" and args.val_file:
        records = read_vqa_file(args.val_file, tokenizer, answers)
    elif split in SPLITS:
        if split not in ("test", "test-dev") and read_labels(args.data_root).answers != answers.answers:
            raise DataError(
                f"the labels in {args.data_root} belong to its label2answer.json, another answer list than the "
                f"model's ({len(answers)} answers): give the questions as a .jsonl file with answers"
            )
        names = SPLITS[split] + ((f"{SPLITS[split][0]}.unlabelled",) if _wants_unlabelled(args, split) else ())
        records = RowRecords([find_rows(args.data_root, name) for name in names], tokenizer, len(answers))
    elif split.endswith(".jsonl"):
        records = read_vqa_file(split, tokenizer, answers)
    else:
        raise DataError(f"--eval_split {split}: choose {', '.join(SPLITS)}, or a .jsonl file of your own")
    records = records[: args.limit_samples]
    if not args.skip_broken_images:
        images = records.image_paths() if isinstance(records, RowRecords) else (r.image_path for r in records)
        check_images_exist((image for image in images if "#" not in image), Path(args.image_root))
    return records


def has_split(args: argparse.Namespace, split: str) -> bool:
    """Whether there are rows or a file of this split."""
    if split not in SPLITS:
        return Path(split).is_file()
    try:
        return bool([find_rows(args.data_root, name) for name in SPLITS[split]])
    except DataError:
        return False


def _wants_unlabelled(args: argparse.Namespace, split: str) -> bool:
    return bool(args.annotations) and split in _WITH_UNLABELLED


def question_loader(
    args: argparse.Namespace,
    records: Sequence[VQARecord],
    folder: VLEFolder,
    num_answers: int,
    *,
    train: bool,
    device: torch.device,
    done: Collection[int] = (),
    images_of: Sequence[VQARecord] | None = None,
) -> Any:
    """Train loader (shuffled) or evaluation loader (every question once, in order); images are prepared alike.

    ``images_of`` holds the images where ``records`` were made from other ones.
    """
    root, images_of = Path(args.image_root), records if images_of is None else images_of
    images = ImageReader(
        root,
        CLIPTransform(folder.images),
        image_size=folder.images.shortest_edge,
        replace_broken_images=args.skip_broken_images,
        load=partial(images_of.load_image, root) if isinstance(images_of, RowRecords) else None,
    )
    dataset = VQADataset(records, images, folder.tokenizer, max_tokens=args.max_text_len)
    collate = VQACollate(folder.tokenizer.pad_id, num_answers)
    return build_loader(args, dataset, collate, train=train, device=device, done=done)


def train_and_val_loaders(
    args: argparse.Namespace, folder: VLEFolder, answers: AnswerVocabulary, *, device: torch.device
) -> tuple[TrainLoader, EvalLoader | None]:
    """Loaders of a training run; no validation with own data that has no ``--val_file``."""

    def loader(split: str) -> Any:
        records = read_split(args, split, folder.tokenizer, answers)
        say(f"{split}: {len(records)} questions")
        return question_loader(args, records, folder, len(answers), train=split == "train", device=device)

    return loader("train"), None if args.train_file and not args.val_file else loader("val")


def training_loss(folder: VLEFolder) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]:
    """What the loop calls at every micro-batch."""
    return partial(loss_fn, images=folder.images)


def loss_fn(model: nn.Module, batch: dict[str, Any], step: int, *, images: CLIPImageSettings) -> dict[str, Any]:
    """Sum over answers of the binary cross entropy, mean over the batch (``step`` is not used)."""
    logits = forward(model, batch, images=images)
    return {"loss": vqa_loss(logits, batch["targets"]), "images_replaced": batch["images_replaced"]}


def forward(model: nn.Module, batch: dict[str, Any], *, images: CLIPImageSettings) -> Tensor:
    """Logits of a batch; without padding the model gets no mask."""
    padding = batch["padding_mask"]
    return model(normalize(batch["image"], images), batch["question"], None if padding is None else 1 - padding)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities of the answers as the original's pipeline gives them, although the training loss is another."""
    return logits.softmax(dim=-1)


def validation(
    folder: VLEFolder, *, device: torch.device, autocast: Callable[[], AbstractContextManager]
) -> Callable[[nn.Module, EvalLoader, int], dict[str, float]]:
    """What the loop calls after every epoch."""
    return partial(evaluate, forward=partial(forward, images=folder.images), device=device, autocast=autocast)


def run_evaluation(
    args: argparse.Namespace,
    model: nn.Module,
    folder: VLEFolder,
    answers: AnswerVocabulary,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """The test stage: the server's prediction file, the top answers, and scores where labels are known.

    An evaluation that was stopped goes on. A dry run predicts two batches and writes nothing.
    """
    records = source = read_split(args, args.eval_split, folder.tokenizer, answers)
    if args.shuffle_images:
        records = with_shuffled_images(list(records), args.seed)
    name = f"{args.task}_{Path(args.eval_split).stem}" + ("_shuffled_images" if args.shuffle_images else "")

    def loader(records: Sequence[VQARecord], done: list[int]) -> EvalLoader:
        return question_loader(
            args, records, folder, len(answers), train=False, device=device, done=done, images_of=source
        )

    answer_split(
        args,
        model,
        records,
        name,
        answers,
        loader,
        tokenizer=folder.tokenizer.fingerprint,
        image_size=model.config.vision.image_size,
        forward=partial(forward, images=folder.images),
        probabilities=softmax,
        device=device,
        autocast=autocast,
    )
