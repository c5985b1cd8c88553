"""Visual question answering with VL-BERT: its data, losses, validation with usage pictures, and prediction files."""

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import DataError
from data.images import decode_image, load_image
from data.loader import EvalLoader, TrainLoader
from data.own_vqa import own_answer
from data.vlbert_answers import AnswerList
from data.vlbert_dataset import VLBertCollate, VLBertDataset
from data.vlbert_samplers import ShardBatchSampler
from data.vlbert_vqa import (
    Question,
    RegionPlaces,
    VLBertRecord,
    find_regions,
    make_records,
    read_own_questions,
    read_questions,
)
from data.zip_folder import ZipFolder
from engine import distributed
from engine.log import RunLog, say
from models.adaptive import constrain_k_loss, deterministic_policy_loss
from models.losses import vqa_loss
from models.vlbert.vqa import AdaptiveVQA
from scripts.loaders import build_loader
from scripts.report.usage import make_usage, write_usage, write_usage_page
from scripts.vlbert_files import ANSWERS, NO_ANSWERS
from scripts.vlbert_model import Vocabularies, longest_question
from scripts.vqa_evaluation import answer_split, evaluate, target_scores

BEST_METRIC = "score"
PICTURES = "visualizations"


# ---- data ----


def training_questions(args: argparse.Namespace) -> list[Question]:
    """All questions of the training sets; ``--limit_samples`` cuts them later, so that answers do not depend on it."""
    if args.train_file:
        return [question for path in args.train_file for question in read_own_questions(path)]
    settings = args.config["DATASET"]
    return read_questions(settings["DATASET"], settings["TRAIN_IMAGE_SET"], args.data_path)


def split_questions(args: argparse.Namespace, split: str) -> list[Question]:
    """Questions of an image set, or of a ``.jsonl`` file of one's own."""
    if split.endswith(".jsonl"):
        return read_own_questions(split)
    return read_questions(args.config["DATASET"]["DATASET"], split, args.data_path)


def load_answers(args: argparse.Namespace, questions: Sequence[Question], checkpoint: Path | None = None) -> AnswerList:
    """The answer list: built from the training questions where that is wanted, a checkpoint's, or the config's file.

    Raises:
        DataError: missing, or of another length than the config says.
    """
    settings = args.config["DATASET"]
    size = settings["ANSWER_VOCAB_SIZE"] or None
    if getattr(args, "build_answers", None):
        if not any(question.answers for question in questions):
            raise DataError("--build_answers: the training questions have no answers; give a set that has some")
        said = (answer for question in questions for answer in _answers_of(question))
        return AnswerList.build(said, min_count=args.build_answers, most=size)
    if checkpoint is not None and (checkpoint / ANSWERS).is_file():
        return AnswerList.load(checkpoint / ANSWERS)
    if not settings["ANSWER_VOCAB_FILE"]:
        raise DataError(NO_ANSWERS)
    return AnswerList.load(settings["ANSWER_VOCAB_FILE"], size)


def _answers_of(question: Question) -> Iterable[str]:
    """What counts for the answer list: the most common answer, or of own data all of them as they are looked up."""
    return [question.main] if question.main else map(own_answer, question.answers)


def records_of(
    args: argparse.Namespace, questions: Sequence[Question], words: Vocabularies, *, labelled: str = ""
) -> list[VLBertRecord]:
    """The first ``--limit_samples`` questions as records.

    Raises:
        DataError: as ``make_records``; no question has a known answer, where ``labelled`` names a set that needs some.
    """
    records = make_records(
        questions[: args.limit_samples], words.tokenizer, words.answers, max_words=longest_question(args.config)
    )
    if labelled and not any(record.labels for record in records):
        raise DataError(
            f"{labelled}: no question has an answer of the answer list: give a set with answers, and the answer list "
            "of these data"
        )
    return records


def find_region_places(args: argparse.Namespace, records: Sequence[VLBertRecord]) -> RegionPlaces:
    """Regions of the records' images, all of them there.

    Raises:
        DataError: box files, or sizes, are missing.
    """
    settings = args.config["DATASET"]
    sources = find_regions(
        {record.place for record in records},
        args.data_path,
        boxes=settings["BOXES"],
        dataset=settings["DATASET"],
        zipped=settings["ZIP_MODE"],
        given=args.regions,
    )
    regions = RegionPlaces(sources, args.data_path)
    regions.check(records)
    return regions


def question_loader(
    args: argparse.Namespace,
    records: Sequence[VLBertRecord],
    num_answers: int,
    *,
    train: bool,
    device: torch.device,
    done: Collection[int] = (),
) -> Any:
    """Train loader (shuffled and partly mirrored) or evaluation loader (every question once, in order)."""
    regions = find_region_places(args, records)
    settings = args.config["TRAIN"]
    dataset = VLBertDataset(
        records,
        regions,
        flip_prob=settings["FLIP_PROB"] if train else 0.0,
        scales=tuple(args.config["SCALES"]),
        load_image=None if args.config["NETWORK"]["IMAGE_FEAT_PRECOMPUTED"] else _image_reader(args),
    )
    per_step = args.batch_size * args.update_freq * distributed.world_size() if train else 0
    if len(records) < per_step:
        raise DataError(
            f"{len(records)} training questions do not fill one step of {per_step} (TRAIN.BATCH_IMAGES "
            f"{args.batch_size} x TRAIN.GRAD_ACCUMULATE_STEPS {args.update_freq} x processes): lower them or add data"
        )
    sampler = None
    if train and (args.contiguous_shards or settings["ASPECT_GROUPING"] or not settings["SHUFFLE"]):
        sampler = ShardBatchSampler(
            len(records),
            args.batch_size,
            accumulation_steps=args.update_freq,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            shuffle=settings["SHUFFLE"],
            group_of=regions.is_wide(records) if settings["ASPECT_GROUPING"] else None,
        )
    return build_loader(
        args, dataset, VLBertCollate(num_answers), train=train, device=device, done=done, sampler=sampler
    )


def _image_reader(args: argparse.Namespace) -> Callable[[VLBertRecord], Any]:
    """Record → image, from the folders or, in ``ZIP_MODE``, the zip archives of the data folder."""
    root = Path(args.data_path)
    archives: dict[str, ZipFolder] = {}

    def read(record: VLBertRecord) -> Any:
        if not args.config["DATASET"]["ZIP_MODE"]:
            return load_image(root / record.image)
        folder, _, name = record.image.rpartition("/")
        if folder not in archives:
            archives[folder] = ZipFolder(root / f"{folder}.zip")
        return decode_image(archives[folder].read(name), f"{archives[folder].path}@/{name}")

    return read


def train_and_val_loaders(
    args: argparse.Namespace, questions: Sequence[Question], words: Vocabularies, *, device: torch.device
) -> tuple[TrainLoader, EvalLoader | None]:
    """Loaders of a training run."""
    num_answers = len(words.answers)
    settings = args.config["DATASET"]
    named = ", ".join(args.train_file) if args.train_file else f"DATASET.TRAIN_IMAGE_SET {settings['TRAIN_IMAGE_SET']}"
    records = records_of(args, questions, words, labelled=named)
    if args.train_file:
        records = [record for record in records if record.labels]
    say(f"training: {len(records)} questions")
    train_loader = question_loader(args, records, num_answers, train=True, device=device)
    if args.no_validation:
        return train_loader, None
    held_out = settings["VAL_IMAGE_SET"]
    asked = read_own_questions(args.val_file) if args.val_file else split_questions(args, held_out)
    records = records_of(args, asked, words, labelled=args.val_file or f"DATASET.VAL_IMAGE_SET {held_out}")
    say(f"validation: {len(records)} questions")
    trained = {(question.image, question.text) for question in questions[: args.limit_samples]}
    if seen := sum((question.image, question.text) in trained for question in asked[: args.limit_samples]):
        say(f"warning: {seen} of the validation questions are trained on: the score says nothing about new ones")
    return train_loader, question_loader(args, records, num_answers, train=False, device=device)


# ---- training ----


def training_loss(
    config: dict[str, Any], model: AdaptiveVQA, steps_per_epoch: int
) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]:
    """What the loop calls at every micro-batch; ``model`` is the one without wrappers, which counts the decisions."""
    return partial(loss_fn, config=config, counting=model, steps_per_epoch=steps_per_epoch)


def loss_fn(
    model: nn.Module,
    batch: dict[str, Any],
    step: int,
    *,
    config: dict[str, Any],
    counting: AdaptiveVQA,
    steps_per_epoch: int,
) -> dict[str, Any]:
    """The answers' cross-entropy and, with a policy, the losses on its decisions that the config switches on."""
    answered = forward(model, batch)
    answer_loss = vqa_loss(answered.logits, batch["targets"])
    values = {"answer_loss": answer_loss}
    if answered.decisions is not None:
        if config["USE_CONSTRAIN_K_LOSS"]:
            values["constrain_k_loss"] = constrain_k_loss(
                answered.decisions, config["CONSTRAIN_K_NUM_BLOCKS"], config["CONSTRAIN_K_SCALE"]
            )
        if config["USE_DETERMINISTIC_POLICY_LOSS"]:
            values["deterministic_policy_loss"] = deterministic_policy_loss(
                answered.decisions, config["DETERMINISTIC_POLICY_SCALE"]
            )
        if step % steps_per_epoch == 0:
            counting.begin_counts(step // steps_per_epoch)
        chosen = answered.decisions.detach()
        finite = chosen.isfinite().all(dim=1, keepdim=True)  # a step that fails is no decision
        sums = torch.cat([torch.where(finite, chosen, 0.0).sum(dim=0), finite.sum(dim=0).to(chosen.dtype)])
        sums = distributed.all_reduce_(sums)
        counting.count(sums[:-1], sums[-1])
        values["decisions"] = chosen.sum(dim=1).mean()
    loss = sum(values[name] for name in values if name.endswith("loss"))
    with torch.no_grad():
        values["acc"] = target_scores(answered.logits, batch["targets"]).mean()
    return {"loss": loss, **values}


def answer_loss(model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Any]:
    """``loss_fn`` without what the decisions are counted and judged by, for a prediction of its memory."""
    return {"loss": vqa_loss(forward(model, batch).logits, batch["targets"])}


def draw_decisions(copy: AdaptiveVQA) -> None:
    """Give a copy without values decisions with values, drawn at random, since the layers look at them."""
    if copy.policy is not None:
        from scripts.drawn_policy import DrawnPolicy  # loads torch's compiler

        copy.policy = DrawnPolicy(copy.policy)


def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Logits and decisions of a batch."""
    return model(batch["boxes"], batch["sizes"], batch["question"], batch.get("image"))


def _observed_forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    answered = forward(model, batch)
    batch["decisions"] = answered.decisions
    return answered.logits


# ---- validation and prediction ----


class _Counter:
    """Decisions of an evaluation, summed over its batches and then over the processes."""

    def __init__(self, num_decisions: int, device: torch.device) -> None:
        self._sums = torch.zeros(num_decisions + 1, dtype=torch.float64, device=device)

    def __call__(self, batch: dict[str, Any]) -> None:
        decisions = batch["decisions"]
        if decisions is not None:
            self._sums[:-1] += decisions.double().sum(dim=0)
            self._sums[-1] += len(decisions)

    def result(self) -> tuple[list[int], int]:
        """How many samples chose each decision, and the number of samples."""
        *counts, samples = distributed.all_reduce_(self._sums).round().long().tolist()
        return counts, samples


def validation(
    config: dict[str, Any],
    *,
    output_dir: Path | None,
    log: RunLog,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[nn.Module, EvalLoader, int], dict[str, float]]:
    """What the loop calls after every epoch: soft accuracy, and with a policy the pictures of what it chose."""
    strategy = config["FINETUNE_STRATEGY"]

    def validate(model: AdaptiveVQA, loader: EvalLoader, epoch: int) -> dict[str, float]:
        counter = _Counter(model.config.encoder.num_decisions, device)
        metrics = evaluate(
            model, loader, epoch, forward=_observed_forward, observe=counter, device=device, autocast=autocast
        )
        if model.policy is None:
            return metrics
        chosen = {"train": (model.policy_decisions.tolist(), int(model.policy_samples)), "val": counter.result()}
        layers = model.config.encoder.num_hidden_layers
        usages = {mode: make_usage(strategy, mode, epoch, *counts, layers) for mode, counts in chosen.items()}
        usages["val"] = replace(usages["val"], score=metrics[BEST_METRIC])
        if output_dir is not None and distributed.is_main():
            folder = output_dir / PICTURES
            for mode, usage in usages.items():
                write_usage(folder, usage)
                if hasattr(log, "picture"):
                    log.picture(f"{strategy} Finetuning Fraction: {mode}", folder / f"{usage.stem}.png")
            write_usage_page(folder, newest=usages["val"], title=f"{strategy}: what the policy chose")
        return metrics | {"decisions": usages["val"].mean_used}

    return validate


def check_split(args: argparse.Namespace, split: str, words: Vocabularies) -> None:
    """Questions and regions of a split that will be predicted later are there.

    Raises:
        DataError: they are not.
    """
    find_region_places(args, records_of(args, split_questions(args, split), words))


def run_prediction(
    args: argparse.Namespace,
    model: AdaptiveVQA,
    words: Vocabularies,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Predict one split: the evaluation server's file, the top answers, scores where labels are known.

    A prediction that was stopped goes on. A dry run predicts two batches and writes nothing.
    """
    records = records_of(args, split_questions(args, args.eval_split), words)
    name = f"{args.result_name or args.config_name}_{args.task}2_{Path(args.eval_split).stem}"
    counter = _Counter(model.config.encoder.num_decisions, device)

    def loader(records: list[VLBertRecord], done: list[int]) -> EvalLoader:
        return question_loader(args, records, len(words.answers), train=False, device=device, done=done)

    answer_split(
        args,
        model,
        records,
        name,
        words.answers,
        loader,
        tokenizer=words.tokenizer.fingerprint,
        image_size=args.config["SCALES"][0],
        forward=_observed_forward,
        observe=counter,
        submission_name=f"{name}.json",
        device=device,
        autocast=autocast,
    )
    counts, samples = counter.result()
    if samples == len(records) and distributed.is_main() and not args.dry_run:  # nothing was known from before a stop
        print(f"decisions: {sum(counts) / samples:.2f} of {len(counts)} chosen per question")
