"""Evaluation of question answering, for every family: validation, predictions, the files of an evaluation."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.errors import DataError
from data.files import read_json, write_json_atomic, write_jsonl_atomic
from data.loader import EvalLoader
from data.metrics.vqa import submission_entries, vqa_accuracy
from data.vqa_answers import AnswerVocabulary
from data.vqa_index import VQARecord
from engine import distributed
from engine.errors import RunError
from engine.evaluation import forward_batches, sum_over_processes
from engine.log import peak_mib, say
from engine.partial_results import PartialResults
from scripts import loaders
from scripts.evaluation_files import clear_temporaries, open_partial_results

NUM_TOP_ANSWERS = 5
Forward = Callable[[nn.Module, dict[str, Any]], Tensor]  # (model, batch) → (B, answers) logits
Observe = Callable[[dict[str, Any]], None]
Probabilities = Callable[[Tensor], Tensor]  # (..., answers) logits → the same shape


def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    epoch: int,
    *,
    forward: Forward,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    observe: Observe = lambda batch: None,
) -> dict[str, float]:
    """Validation: ``score`` = 100 x mean over questions of the target score of the best answer (any ``epoch``).

    ``observe`` sees every batch once, after ``forward`` has had it.
    """
    sums = {"score": 0.0, "questions": 0.0, "replaced": 0.0}
    batches = forward_batches(
        model, loader, forward, device=device, autocast=autocast, total=len(loader), description="validating"
    )
    for batch, logits in batches:
        sums["score"] += float(target_scores(logits, batch["targets"]).sum())
        sums["questions"] += len(logits)
        sums["replaced"] += batch["images_replaced"]
        observe(batch)
    total = sum_over_processes(sums)
    loaders.warn_of_replaced(total["replaced"])
    if total["questions"] != loader.num_samples:
        raise AssertionError(f"{total['questions']} questions validated instead of {loader.num_samples}")
    return {"score": 100 * total["score"] / total["questions"]}


def target_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) target score of the best answer of each question."""
    return targets.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


def predict(
    model: nn.Module,
    loader: EvalLoader,
    kept: PartialResults,
    *,
    forward: Forward,
    probabilities: Probabilities = torch.sigmoid,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    observe: Observe = lambda batch: None,
) -> dict[int, dict[str, Any]]:
    """Question id → {"top": [[label, probability], …], "score": target score of the first}, those found included.

    ``observe`` sees every batch once, after ``forward`` has had it.

    Raises:
        RunError: an answer is not a finite number.
    """
    replaced = 0
    batches = forward_batches(
        model, loader, forward, device=device, autocast=autocast, total=len(loader), description="predicting"
    )
    for batch, logits in batches:
        top = probabilities(logits.float()).topk(min(NUM_TOP_ANSWERS, logits.shape[1]), dim=1)
        scores = target_scores(logits, batch["targets"])
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
        observe(batch)
        # after a stop somebody may have mended the images; and whatever counts them sees all of them again
        kept.add(answers, keep=not batch["images_replaced"])
    loaders.warn_of_replaced(sum_over_processes({"replaced": float(replaced)})["replaced"])
    return kept.gather()


def answer_split(
    args: argparse.Namespace,
    model: nn.Module,
    records: Sequence[Any],
    name: str,
    answers: AnswerVocabulary,
    build_loader: Callable[[Sequence[Any], list[int]], EvalLoader],
    *,
    tokenizer: str,
    image_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    submission_name: str | None = None,
    **predicting: Any,
) -> None:
    """Predict a split and write its results (``write_results``).

    What a stopped evaluation had predicted is kept in hidden files of the output folder until the results are written.
    A dry run predicts two batches and writes nothing.

    Args:
        args: of the program.
        model: what answers.
        records: the questions.
        name: task and split, for the names of the results.
        answers: what the labels mean.
        build_loader: records and the places of those that are done already → the loader.
        tokenizer: its fingerprint.
        image_size: side in pixels.
        device: where the model runs.
        autocast: gives the context of its precision.
        submission_name: as in ``write_results``.
        predicting: ``forward`` and whatever else ``predict`` takes.
    """
    annotations = read_annotations(args.annotations, records) if args.annotations else None
    if args.dry_run:
        records = records[: 2 * args.eval_batch_size * distributed.world_size()]
    say(f"{args.eval_split}: {len(records)} questions")
    ids = [record.question_id for record in records]
    kept = open_partial_results(
        args,
        name,
        ids,
        records=records,
        answers=answers.answers,
        tokenizer=tokenizer,
        image_size=image_size,
        device=device,
    )
    loader = build_loader(records, [place for place, question_id in enumerate(ids) if question_id in kept.found])
    predictions = predict(model, loader, kept, device=device, autocast=autocast, **predicting)
    if args.dry_run:
        say(f"dry run: {len(predictions)} questions answered, nothing written; peak memory {peak_mib(device):.0f} MiB")
        return
    if distributed.is_main():
        write_results(args, name, records, predictions, answers, annotations, submission_name=submission_name)
    kept.remove()


def write_results(
    args: argparse.Namespace,
    name: str,
    records: Sequence[Any],
    predictions: dict[int, dict[str, Any]],
    answers: AnswerVocabulary,
    annotations: list[dict[str, Any]] | None,
    *,
    submission_name: str | None = None,
) -> None:
    """The three files of an evaluation; scores are printed as well.

    The evaluation server's file is ``submit_<name>.json`` unless it is given another name.
    """
    output = Path(args.output_dir)
    submission = output / (submission_name or f"submit_{name}.json")
    top_file = output / f"top_answers_{name}.jsonl"
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


def with_shuffled_images(records: list[VQARecord], seed: int) -> list[VQARecord]:
    """Every question with the image of another one, never its own: shows what the question's text alone achieves."""
    images = sorted({record.image_path for record in records})
    if len(images) < 2:
        raise DataError(f"--shuffle_images needs two different images, the split has {len(images)}: leave it out")
    order = np.random.default_rng(seed).permutation(len(images))
    other = {images[place]: images[after] for place, after in zip(order, np.roll(order, 1), strict=True)}
    return [replace(record, image_path=other[record.image_path]) for record in records]


def read_annotations(path: str, records: Iterable[Any]) -> list[dict[str, Any]]:
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


def top_answers(
    logits: Tensor, answers: AnswerVocabulary, count: int, probabilities: Probabilities = torch.sigmoid
) -> list[tuple[str, float]]:
    """The ``count`` most probable answers of one question with their probabilities."""
    top = probabilities(logits.float()).topk(min(count, logits.numel()))
    return [(answers[label], p) for label, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
