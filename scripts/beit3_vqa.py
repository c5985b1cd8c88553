"""Visual question answering with BEiT-3: its data, loss, validation and prediction files, wired for the run script."""

import argparse
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import DataError
from data.loader import EvalLoader, TrainLoader
from data.own_vqa import build_answer_list, read_vqa_file
from data.tokenizers.spm import XLMRTokenizer
from data.transforms import normalize
from data.vqa_answers import AnswerVocabulary
from data.vqa_dataset import VQACollate, VQADataset
from data.vqa_index import ANSWER_FILE, SPLIT_FILES, VQARecord, check_tokenizer_stamp, read_vqav2_split
from engine.log import say
from models.losses import vqa_loss
from scripts import loaders
from scripts.beit3_loaders import image_reader
from scripts.beit3_model import find_answers
from scripts.vqa_evaluation import answer_split, evaluate, with_shuffled_images

LABELLED_SPLITS = ("train", "val", "val2014")
BEST_METRIC = "score"


def load_labels(args: argparse.Namespace) -> AnswerVocabulary:
    """The answer list: given, beside the weights (evaluation), in the data folder, or built from own training data."""
    if args.train_file and not args.answer_list:
        return build_answer_list(args.train_file + ([args.val_file] if args.val_file else []))
    answers = find_answers(args.answer_list, args.finetune if args.eval else "", args.data_path)
    if answers is None:
        raise DataError(
            f"no answer2label.txt in {args.data_path}: run python scripts/make_index.py --data_path {args.data_path}, "
            "or give --answer_list (your own data: --train_file, the list is built from it)"
        )
    return answers


def read_split(
    args: argparse.Namespace, split: str, tokenizer: XLMRTokenizer, answers: AnswerVocabulary
) -> list[VQARecord]:
    """Records of ``train``, a split of VQAv2, or a ``.jsonl`` file of one's own; cut by ``--limit_samples``."""
    if split == "train" and args.train_file:
        records = [
            record
            for path in args.train_file
            for record in read_vqa_file(path, tokenizer, answers, drop_unlabelled=True)
        ]
    elif split == "val" and args.val_file:
        records = read_vqa_file(args.val_file, tokenizer, answers)
    elif split in SPLIT_FILES:
        check_tokenizer_stamp(Path(args.data_path), "vqa", tokenizer.fingerprint)
        _check_index_answers(args, split, answers)
        records = read_vqav2_split(
            args.data_path, split, len(answers), tokenizer.vocab_size, with_unlabelled=bool(args.annotations)
        )
    elif split.endswith(".jsonl"):
        records = read_vqa_file(split, tokenizer, answers)
    else:
        raise DataError(f"--eval_split {split}: choose {', '.join(SPLIT_FILES)}, or a .jsonl file of your own")
    return loaders.usable_records(args, records)


def _check_index_answers(args: argparse.Namespace, split: str, answers: AnswerVocabulary) -> None:
    """Labels in an index number the answers of the list beside it: another list would score other answers."""
    path = Path(args.data_path) / ANSWER_FILE
    if split in LABELLED_SPLITS and path.is_file() and AnswerVocabulary.load(path).answers != answers.answers:
        raise DataError(
            f"the labels of the index in {args.data_path} belong to its {ANSWER_FILE}, which is another answer list "
            f"than the model's ({len(answers)} answers): build an index with the model's list, or give the questions "
            "as a .jsonl file with answers"
        )


def build_loader(
    args: argparse.Namespace,
    records: list[VQARecord],
    tokenizer: XLMRTokenizer,
    num_answers: int,
    *,
    image_size: int,
    train: bool,
    device: torch.device,
    done: Collection[int] = (),
) -> Any:
    """Train loader (random transform, shuffled) or evaluation loader (plain resize, every question once).

    An evaluation leaves out the batches whose records (their places in ``records``) are all in ``done``.
    """
    images = image_reader(args, image_size, train=train)
    dataset = VQADataset(records, images, tokenizer, max_tokens=args.num_max_bpe_tokens)
    # compiled layers see the text length as a dynamic size; rounding keeps the number of distinct ones small
    collate = VQACollate(tokenizer.pad_id, num_answers, multiple_of=8 if args.compile else 1)
    return loaders.build_loader(args, dataset, collate, train=train, device=device, done=done)


def train_and_val_loaders(
    args: argparse.Namespace,
    tokenizer: XLMRTokenizer,
    answers: AnswerVocabulary,
    *,
    image_size: int,
    device: torch.device,
) -> tuple[TrainLoader, EvalLoader | None]:
    """Loaders of a training run; no validation with own data that has no ``--val_file``."""

    def loader(split: str) -> Any:
        records = read_split(args, split, tokenizer, answers)
        say(f"{split}: {len(records)} questions")
        return build_loader(
            args, records, tokenizer, len(answers), image_size=image_size, train=split == "train", device=device
        )

    return loader("train"), None if args.train_file and not args.val_file else loader("val")


def training_loss(args: argparse.Namespace) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]:
    """What the loop calls at every micro-batch."""
    return loss_fn


def loss_fn(model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """Sum over answers of the binary cross entropy, mean over the batch (``step`` is not used)."""
    return {"loss": vqa_loss(_forward(model, batch), batch["targets"]), "images_replaced": batch["images_replaced"]}


def _forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(normalize(batch["image"]), batch["question"], batch["padding_mask"])


def validation(
    args: argparse.Namespace,
    tokenizer: XLMRTokenizer,
    answers: AnswerVocabulary,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[nn.Module, EvalLoader, int], dict[str, float]]:
    """What the loop calls after every epoch."""
    return partial(evaluate, forward=_forward, device=device, autocast=autocast)


def run_evaluation(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: XLMRTokenizer,
    answers: AnswerVocabulary,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """``--eval``: write the server's prediction file, the top answers, and scores where labels are known.

    An evaluation that was stopped goes on: what was predicted is kept in hidden files of the output folder until the
    results are written. A dry run predicts two batches and writes nothing.
    """
    records = read_split(args, args.eval_split, tokenizer, answers)
    if args.shuffle_images:
        records = with_shuffled_images(records, args.seed)
    name = f"{args.task}_{Path(args.eval_split).stem}" + ("_shuffled_images" if args.shuffle_images else "")
    image_size = model.config.image_size

    def loader(records: list[VQARecord], done: list[int]) -> EvalLoader:
        return build_loader(
            args, records, tokenizer, len(answers), image_size=image_size, train=False, device=device, done=done
        )

    answer_split(
        args,
        model,
        records,
        name,
        answers,
        loader,
        tokenizer=tokenizer.fingerprint,
        image_size=image_size,
        forward=_forward,
        device=device,
        autocast=autocast,
    )
