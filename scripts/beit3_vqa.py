"""Visual question answering with BEiT-3: its data, loss, validation and prediction files, wired for the run script."""

import argparse
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.beit3_dataset import BEiT3VQADataset, VQACollate
from data.errors import DataError
from data.files import read_json, write_json_atomic, write_jsonl_atomic
from data.loader import EvalLoader, TrainLoader
from data.metrics.vqa import submission_entries, vqa_accuracy
from data.own_vqa import build_answer_list, read_vqa_file
from data.tokenizers.spm import XLMRTokenizer
from data.transforms import normalize
from data.vqa_answers import AnswerVocabulary
from data.vqa_index import ANSWER_FILE, SPLIT_FILES, VQARecord, check_tokenizer_stamp, read_vqav2_split
from engine import distributed
from engine.errors import RunError
from engine.evaluation import forward_batches, sum_over_processes
from engine.log import peak_mib, say
from engine.partial_results import PartialResults
from models.losses import vqa_loss
from scripts import beit3_loaders
from scripts.beit3_model import find_answers
from scripts.evaluation_files import clear_temporaries, open_partial_results

NUM_TOP_ANSWERS = 5
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
    return beit3_loaders.usable_records(args, records)


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
    images = beit3_loaders.image_reader(args, image_size, train=train)
    dataset = BEiT3VQADataset(records, images, tokenizer, max_tokens=args.num_max_bpe_tokens)
    # compiled layers see the text length as a dynamic size; rounding keeps the number of distinct ones small
    collate = VQACollate(tokenizer.pad_id, num_answers, multiple_of=8 if args.compile else 1)
    return beit3_loaders.build_loader(args, dataset, collate, train=train, device=device, done=done)


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
    return partial(evaluate, device=device, autocast=autocast)


def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    epoch: int,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Validation: ``score`` = 100 x mean over questions of the target score of the best answer (any ``epoch``)."""
    sums = {"score": 0.0, "questions": 0.0, "replaced": 0.0}
    batches = forward_batches(
        model, loader, _forward, device=device, autocast=autocast, total=len(loader), description="validating"
    )
    for batch, logits in batches:
        sums["score"] += float(_target_scores(logits, batch["targets"]).sum())
        sums["questions"] += len(logits)
        sums["replaced"] += batch["images_replaced"]
    total = sum_over_processes(sums)
    beit3_loaders.warn_of_replaced(total["replaced"])
    if total["questions"] != loader.num_samples:
        raise AssertionError(f"{total['questions']} questions validated instead of {loader.num_samples}")
    return {"score": 100 * total["score"] / total["questions"]}


def _target_scores(logits: Tensor, targets: Tensor) -> Tensor:
    return targets.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def predict(
    model: nn.Module,
    loader: EvalLoader,
    kept: PartialResults,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> dict[int, dict[str, Any]]:
    """Question id → {"top": [[label, probability], …], "score": target score of the first}, those found included.

    Raises:
        RunError: an answer is not a finite number.
    """
    replaced = 0
    batches = forward_batches(
        model, loader, _forward, device=device, autocast=autocast, total=len(loader), description="predicting"
    )
    for batch, logits in batches:
        probabilities = logits.float().sigmoid()
        top = probabilities.topk(min(NUM_TOP_ANSWERS, logits.shape[1]), dim=1)
        scores = _target_scores(logits, batch["targets"])
        rows = zip(batch["question_id"], top.indices.tolist(), top.values.tolist(), scores.tolist(), strict=True)
        answers = {}
        for question_id, labels, values, score in rows:
            if not math.isfinite(values[0]):  # topk puts NaN first
                raise RunError(
                    f"question {question_id}: the model's answer is not a finite number; the weights may be damaged, "
                    "or the precision too low: try --amp no"
                )
            answers[question_id] = {"top": list(map(list, zip(labels, values, strict=True))), "score": score}
        replaced += batch["images_replaced"]
        # after a stop somebody may have mended the images; and whatever counts them sees all of them again
        kept.add(answers, keep=not batch["images_replaced"])
    beit3_loaders.warn_of_replaced(sum_over_processes({"replaced": float(replaced)})["replaced"])
    return kept.gather()


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
        records = _with_shuffled_images(records, args.seed)
    annotations = _read_annotations(args.annotations, records) if args.annotations else None
    if args.dry_run:
        records = records[: 2 * args.eval_batch_size * distributed.world_size()]
    say(f"{args.eval_split}: {len(records)} questions")
    name = f"{args.task}_{Path(args.eval_split).stem}" + ("_shuffled_images" if args.shuffle_images else "")
    kept = open_partial_results(
        args,
        name,
        [record.question_id for record in records],
        records=records,
        answers=answers.answers,
        tokenizer=tokenizer.fingerprint,
        image_size=model.config.image_size,
        device=device,
    )
    done = [place for place, record in enumerate(records) if record.question_id in kept.found]
    loader = build_loader(
        args,
        records,
        tokenizer,
        len(answers),
        image_size=model.config.image_size,
        train=False,
        device=device,
        done=done,
    )
    predictions = predict(model, loader, kept, device=device, autocast=autocast)
    if args.dry_run:
        say(f"dry run: {len(predictions)} questions answered, nothing written; peak memory {peak_mib(device):.0f} MiB")
        return
    if distributed.is_main():
        _write_results(args, name, records, predictions, answers, annotations)
    kept.remove()


def _write_results(
    args: argparse.Namespace,
    name: str,
    records: list[VQARecord],
    predictions: dict[int, dict[str, Any]],
    answers: AnswerVocabulary,
    annotations: list[dict[str, Any]] | None,
) -> None:
    """The three files of an evaluation; scores are printed as well."""
    output = Path(args.output_dir)
    submission, top_file = output / f"submit_{name}.json", output / f"top_answers_{name}.jsonl"
    result_file = output / f"result_{name}.json"
    clear_temporaries(submission, top_file, result_file)
    chosen = {question_id: answers[row["top"][0][0]] for question_id, row in predictions.items()}
    entries = submission_entries(chosen, expected_ids=[record.question_id for record in records])
    write_json_atomic(submission, entries, indent=2)
    top = (
        {"question_id": question_id, "top": [[answers[label], round(p, 6)] for label, p in row["top"]]}
        for question_id, row in predictions.items()
    )
    write_jsonl_atomic(top_file, top)
    say(f"wrote {len(entries)} answers to {submission}")
    result = {"split": args.eval_split, "questions": len(entries)}
    labelled = [record.question_id for record in records if record.labels]
    if labelled:
        result["score"] = round(100 * sum(predictions[index]["score"] for index in labelled) / len(labelled), 4)
        result["labelled_questions"] = len(labelled)
        print(f"score {result['score']:.2f} over {len(labelled)} labelled questions")
    else:
        print("no score: no question of this split has a known answer")
    if annotations is not None:
        result["official"] = vqa_accuracy(chosen, annotations).official()
        _print_official(result["official"])
    write_json_atomic(result_file, result, indent=2)


def _with_shuffled_images(records: list[VQARecord], seed: int) -> list[VQARecord]:
    """Every question with the image of another one, never its own: shows what the question's text alone achieves."""
    images = sorted({record.image_path for record in records})
    if len(images) < 2:
        raise DataError(f"--shuffle_images needs two different images, the split has {len(images)}: leave it out")
    order = np.random.default_rng(seed).permutation(len(images))
    other = {images[place]: images[after] for place, after in zip(order, np.roll(order, 1), strict=True)}
    return [replace(record, image_path=other[record.image_path]) for record in records]


def _read_annotations(path: str, records: list[VQARecord]) -> list[dict[str, Any]]:
    """Annotations of the questions to be evaluated; the file may cover more (val2014 beside 1000 images)."""
    content = read_json(path)
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} has no list of annotations: give the raw v2_mscoco_<split>_annotations.json")
    questions = {record.question_id for record in records}
    wanted = [row for row in rows if isinstance(row, dict) and row.get("question_id") in questions]
    if len(wanted) != len(questions):
        raise DataError(
            f"{path} annotates {len(wanted)} of the {len(questions)} questions to be evaluated: "
            "give the annotations of this split"
        )
    return wanted


def _print_official(official: dict[str, Any]) -> None:
    print(f"official VQA accuracy {official['overall']:.2f}")
    for title, key in (("answer type", "perAnswerType"), ("question type", "perQuestionType")):
        for name, value in sorted(official[key].items(), key=lambda item: -item[1]):
            print(f"  {title:13} {name:32} {value:6.2f}")


def top_answers(logits: Tensor, answers: AnswerVocabulary, count: int) -> list[tuple[str, float]]:
    """The ``count`` most probable answers of one question with their (independent) probabilities."""
    top = logits.float().sigmoid().topk(min(count, logits.numel()))
    return [(answers[label], p) for label, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
