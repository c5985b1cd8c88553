"""The course baseline's data, loss, scores and result files, wired for ``scripts/main.py``."""

import argparse
import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.baseline_dataset import BaselineDataset, BaselineTransform, collate
from data.baseline_dictionaries import DICTIONARIES_FILE, Dictionaries, read_class_mapping, subword_text
from data.baseline_vqa import (
    build_answer_ids,
    build_word_ids,
    choose_targets,
    encode_answers,
    frequent_answer_ids,
    mode_targets,
)
from data.errors import DataError
from data.files import open_atomic
from data.image_reader import ImageReader, check_images_exist
from data.loader import BatchSampler, EvalLoader
from data.metrics.vizwiz import process_text, vizwiz_accuracy
from data.vizwiz import UNANSWERABLE, VizWizRow, read_rows, split_rows, write_submission
from engine import distributed
from engine.errors import RunError
from engine.evaluation import forward_batches, sum_over_processes
from engine.log import say
from engine.partial_results import PartialResults
from engine.whole_files import write_weights
from scripts.evaluation_files import clear_temporaries, open_partial_results
from scripts.loaders import build_loader, warn_of_replaced
from scripts.train_sentencepiece import train_model
from scripts.written_files import refuse_others, written

BEST_METRIC = "accuracy"
MODEL_FILE, SUBMISSION_FILE = "model.pth", "submission.npy"
TRAIN_SPLIT = "train"


@dataclass(frozen=True)
class TrainingData:
    """What there is to learn.

    Attributes:
        rows: questions with an answer that can be learnt.
        targets: its class, for each of them.
        questions: raw, of all rows that are not held out.
        answer_ids: class by normalised answer.
        held_out: rows kept for scoring.
    """

    rows: list[VizWizRow]
    targets: list[int]
    questions: list[str]
    answer_ids: dict[str, int]
    held_out: list[VizWizRow]

    def facts(self) -> dict[str, Any]:
        """What to say of it: counts, and percentages that a model has to be held against."""
        unanswerable = self.answer_ids.get(UNANSWERABLE)
        facts: dict[str, Any] = {
            "training_questions": len(self.rows),
            "questions_without_a_known_answer": len(self.questions) - len(self.rows),
            "distinct_targets": len(set(self.targets)),
            "unanswerable_targets": f"{100 * self.targets.count(unanswerable) / len(self.targets):.1f} %",
        }
        if self.held_out:
            always = score([UNANSWERABLE] * len(self.held_out), self.held_out)
            facts["held_out_questions"] = len(self.held_out)
            facts["accuracy_of_always_unanswerable"] = round(always, 4)
        return facts


def refuse_to_replace(args: argparse.Namespace) -> None:
    """Leave results alone that are not of this program; all processes call it together.

    Raises:
        DataError: there are some.
    """
    names = [SUBMISSION_FILE, *([] if args.predict_only else [MODEL_FILE, DICTIONARIES_FILE])]
    paths = [] if args.dry_run else [Path(args.output_dir) / name for name in names]
    distributed.on_main(lambda: refuse_others(*paths, overwrite=args.overwrite))


def read_split(args: argparse.Namespace, split: str, *, with_images: bool = True) -> list[VizWizRow]:
    """Rows of ``<split>.json``, cut by ``--limit_samples``; images that are read must be there, or may be replaced.

    Raises:
        DataError: missing or broken file, images that are not there.
    """
    rows = read_rows(Path(args.data_path) / f"{split}.json")[: args.limit_samples]
    if with_images and not args.skip_broken_images:
        check_images_exist((row.image for row in rows), Path(args.data_path) / split)
    return rows


def read_training(args: argparse.Namespace, *, with_images: bool = True) -> TrainingData:
    """Rows of ``train.json``, what can be learnt of them, and the hold-out; ``with_images`` as ``read_split``.

    Raises:
        DataError: as ``read_split``; questions without answers, or nothing to learn.
    """
    rows = read_split(args, TRAIN_SPLIT, with_images=with_images)
    unlabelled = [row.image for row in rows if not row.answers]
    if unlabelled:
        path = Path(args.data_path) / f"{TRAIN_SPLIT}.json"
        raise DataError(f"{path}: image {unlabelled[0]} has no answers to learn from: is it the training split?")
    rows, held_out = split_rows(rows, args.hold_out, args.seed)
    if held_out:
        score([UNANSWERABLE] * len(held_out), held_out)  # an answer list that cannot be scored is refused now
    answers = [texts_of(row) for row in rows]
    answer_ids, targets = learnable(args, answers)
    kept = [(row, target) for row, target in zip(rows, targets, strict=True) if target is not None]
    if not kept:
        raise DataError(f"no training question has one of the {len(answer_ids)} answers: mend --class_mapping")
    return TrainingData(
        rows=[row for row, _ in kept],
        targets=[target for _, target in kept],
        questions=[row.question for row in rows],
        answer_ids=answer_ids,
        held_out=held_out,
    )


def texts_of(row: VizWizRow) -> list[str]:
    """What the people said, raw."""
    return [answer.text for answer in row.answers]


def learnable(args: argparse.Namespace, answers: list[list[str]]) -> tuple[dict[str, int], Sequence[int | None]]:
    """Class by normalised answer as the flags say, and the class that each question teaches (None: none)."""
    if args.class_mapping:
        answer_ids = read_class_mapping(args.class_mapping)
    elif args.min_answer_count:
        answer_ids = frequent_answer_ids(answers, process_text, args.min_answer_count)
    else:
        answer_ids = build_answer_ids(answers, process_text)
    if args.reference_behaviour:
        return answer_ids, mode_targets(encode_answers(answers, answer_ids, process_text)).tolist()
    return answer_ids, choose_targets(answers, answer_ids, process_text)


def build_dictionaries(args: argparse.Namespace, data: TrainingData, resume_from: Path | None) -> Dictionaries:
    """The dictionaries of a training run; those of the checkpoint that it goes on from, if they fit flags and data.

    Raises:
        DataError: they do not.
    """
    saved = None if resume_from is None else Dictionaries.load(resume_from / DICTIONARIES_FILE)
    word_ids, subwords = None, b""
    if args.question_encoder == "words":
        word_ids = build_word_ids(data.questions, process_text)
    elif saved is not None:
        subwords = saved.subwords  # another version of sentencepiece might cut otherwise
    else:
        subwords = train_subwords(data.questions, args.vocab_size)
    made = Dictionaries(data.answer_ids, word_ids, subwords, args.reference_behaviour, args.image_size)
    if saved is not None and saved.to_json() != made.to_json():
        raise DataError(
            f"{resume_from} was trained with other questions, answers or model flags than these: give the same data "
            "and flags, or another --output_dir"
        )
    return made


def train_subwords(questions: list[str], vocab_size: int) -> bytes:
    """A serialised sentencepiece model of the questions; the same in every process."""
    texts = list(filter(None, map(subword_text, questions)))
    if not texts:
        raise DataError("all training questions are empty once normalised: there are no subwords in them")
    return train_model(texts, vocab_size)


def load_dictionaries(args: argparse.Namespace) -> Dictionaries:
    """Those of the weights to predict with: a file, or made from the training split as the original does.

    Raises:
        DataError: broken files, or flags beside a file that says what they would.
    """
    weights = Path(args.model_path)
    if not weights.exists():
        raise DataError(f"no weights {weights} to predict with: give --model_path, or train without --predict_only")
    beside = (weights if weights.is_dir() else weights.parent) / DICTIONARIES_FILE
    path = Path(args.dictionaries) if args.dictionaries else beside
    if args.dictionaries or beside.exists():
        if args.given:
            raise DataError(f"{', '.join(args.given)}: {path} says it already, leave it out (or move the file away)")
        say(f"dictionaries of {path}")
        return Dictionaries.load(path)
    say(f"no {path}: the dictionaries are made from {TRAIN_SPLIT}.json")
    return build_dictionaries(args, read_training(args, with_images=False), None)


def question_loader(
    args: argparse.Namespace,
    rows: list[VizWizRow],
    dictionaries: Dictionaries,
    split: str,
    *,
    device: torch.device,
    targets: Sequence[int] | None = None,
    done: Collection[int] = (),
    sampler: BatchSampler | None = None,
) -> Any:
    """Train loader (shuffled, or by ``sampler``) where there are targets, else one that reads each question once."""
    train = targets is not None
    images = ImageReader(
        Path(args.data_path) / split,
        BaselineTransform(dictionaries.image_size, augment=args.augment and train),
        image_size=dictionaries.image_size,
        replace_broken_images=args.skip_broken_images,
    )
    dataset = BaselineDataset(rows, images, dictionaries, targets)
    return build_loader(args, dataset, collate, train=train, device=device, done=done, sampler=sampler)


def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(B, answers) logits of a batch; bytes become numbers from 0 to 1."""
    return model(batch["image"].float() / 255, batch["question"])


def loss_fn(model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """Cross entropy, mean over the batch, and the share of answers that are right (``step`` is not used)."""
    logits = forward(model, batch).float()
    right = (logits.argmax(dim=1) == batch["target"]).float().mean()
    loss = F.cross_entropy(logits, batch["target"])
    return {"loss": loss, "acc": right, "images_replaced": batch["images_replaced"]}


def validate(
    model: nn.Module,
    loader: EvalLoader,
    epoch: int,
    *,
    rows: list[VizWizRow],
    dictionaries: Dictionaries,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """The course's accuracy on the hold-out, times 100 (any ``epoch``)."""
    share_statistics(model)
    kept = PartialResults(None, "hold-out", {}, range(len(rows)))
    classes = predict(model, loader, dictionaries, kept, device=device, autocast=autocast)
    return {BEST_METRIC: score(answers_of(classes, dictionaries), rows)}


def share_statistics(model: nn.Module) -> None:
    """Take the main process's running means, which its checkpoints hold: each process has those of its own batches."""
    if distributed.world_size() == 1:
        return
    shared = distributed.broadcast_object({name: buffer.cpu() for name, buffer in model.named_buffers()})
    for name, buffer in model.named_buffers():
        buffer.copy_(shared[name])


def predict(
    model: nn.Module,
    loader: EvalLoader,
    dictionaries: Dictionaries,
    kept: PartialResults,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> dict[int, int]:
    """Row → class of the highest score; a class whose answer is empty is passed over, unlike in the original.

    Raises:
        RunError: a score is not a finite number.
    """
    is_empty = [not text and not dictionaries.reference for text in dictionaries.answers]
    passed_over = torch.tensor(is_empty, device=device)
    replaced = 0
    batches = forward_batches(
        model, loader, forward, device=device, autocast=autocast, total=len(loader), description="answering"
    )
    for batch, logits in batches:
        if not torch.isfinite(logits).all():
            raise RunError(
                f"the scores of samples {batch['sample_id']} are not finite; the weights may be damaged, or the "
                "precision too low: try --amp no"
            )
        chosen = logits.float().masked_fill(passed_over, -torch.inf).argmax(dim=1).tolist()
        replaced += batch["images_replaced"]
        # after a stop somebody may have mended the images
        kept.add(dict(zip(batch["sample_id"], chosen, strict=True)), keep=not batch["images_replaced"])
    warn_of_replaced(sum_over_processes({"replaced": float(replaced)})["replaced"])
    return kept.gather()


def answers_of(classes: dict[int, int], dictionaries: Dictionaries) -> list[str]:
    """Texts by row; ``unanswerable`` if there is no other answer than the empty one."""
    texts = (dictionaries.answers[number] for number in classes.values())
    return [text if text or dictionaries.reference else UNANSWERABLE for text in texts]


def score(answers: list[str], rows: list[VizWizRow]) -> float:
    """The course's accuracy times 100."""
    predictions = {row.image: answer for row, answer in zip(rows, answers, strict=True)}
    return 100 * vizwiz_accuracy(predictions, {row.image: texts_of(row) for row in rows}).overall.value


def run_prediction(
    args: argparse.Namespace,
    model: nn.Module,
    rows: list[VizWizRow],
    dictionaries: Dictionaries,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Answer ``--eval_split`` into ``submission.npy``; one that was stopped goes on. A dry run writes nothing."""
    if args.dry_run:
        rows = rows[: 2 * args.eval_batch_size * distributed.world_size()]
    say(f"{args.eval_split}: {len(rows)} questions")
    kept = open_partial_results(
        args,
        args.eval_split,
        range(len(rows)),
        records=rows,
        answers=dictionaries.answers,
        tokenizer=hashlib.sha256(dictionaries.to_json()).hexdigest(),
        image_size=dictionaries.image_size,
        device=device,
    )
    loader = question_loader(args, rows, dictionaries, args.eval_split, device=device, done=kept.found)
    classes = predict(model, loader, dictionaries, kept, device=device, autocast=autocast)
    answers = answers_of(classes, dictionaries)
    if args.dry_run:
        say(f"dry run: {len(answers)} questions answered, nothing written")
        return
    submission = Path(args.output_dir) / SUBMISSION_FILE
    if distributed.is_main():
        clear_temporaries(submission)
        with written(submission):
            write_submission(submission, answers)
        share = answers.count(UNANSWERABLE) / len(answers)
        say(f"wrote {len(answers)} answers to {submission}, {100 * share:.1f} % of them {UNANSWERABLE}")
    kept.remove()


def write_model(output_dir: Path, state: dict[str, Tensor], dictionaries: Dictionaries) -> None:
    """``model.pth``, a bare state dict, and the dictionaries beside it; by the main process."""
    if not distributed.is_main():
        return
    with written(output_dir / DICTIONARIES_FILE, output_dir / MODEL_FILE):
        with open_atomic(output_dir / DICTIONARIES_FILE) as handle:
            handle.write(dictionaries.to_json().decode())
        write_weights(state, output_dir / MODEL_FILE)
    say(f"wrote {output_dir / MODEL_FILE}")
