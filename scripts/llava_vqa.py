"""Visual question answering with LLaVA: questions in batches, answers, scores of VizWiz; for every program.

Greedy answers and probabilities depend on the batches alone, which are the same for any number of processes; a drawn
answer has a seed of its own, made of the run's and the question's place in its file.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.clip_images import CLIPImageSettings, normalize
from data.errors import DataError
from data.image_reader import ImageReader
from data.llava_conversation import Template
from data.llava_images import LlavaTransform
from data.llava_questions import LlavaQuestion, QuestionDataset, encode_questions
from data.loader import EvalLoader, build_eval_loader
from data.metrics.vizwiz import MIN_ANSWERS, TEXT_RULES, answerability_scores, vizwiz_accuracy
from data.replaced_images import limit_replaced
from data.tokenizers.llama import LlamaTokenizer
from data.vizwiz import UNANSWERABLE, VizWizRow, choose_answer, is_unanswerable
from engine import distributed
from engine.errors import RunError
from engine.evaluation import forward_batches, sum_over_processes
from engine.partial_results import PartialResults
from models.llava.generation import Decoding, answer_probability, generate
from models.llava.llava import LlavaForCausalLM
from scripts.llava_folder import LlavaFolder
from scripts.loaders import warn_of_replaced

Answers = dict[int, dict[str, Any]]


def question_dataset(
    folder: LlavaFolder,
    questions: Sequence[LlavaQuestion],
    image_folder: str | Path,
    *,
    template: Template,
    skip_broken_images: bool = False,
) -> QuestionDataset:
    """Prompts and images as a model takes them.

    Args:
        folder: of the model: how text and images are prepared.
        questions: to be asked.
        image_folder: that their image paths are relative to.
        template: of the conversation.
        skip_broken_images: put a grey image in place of one that cannot be read.

    Raises:
        DataError: a prompt is too long for the model, or images are to be cut in a way that is not implemented.
    """
    images = ImageReader(
        Path(image_folder),
        LlavaTransform(folder.images, folder.values.get("image_aspect_ratio")),
        image_size=folder.vision.image_size,
        replace_broken_images=skip_broken_images,
    )
    prompts = encode_questions(questions, folder.tokenizer, template, max_tokens=_most_tokens(folder))
    return QuestionDataset(questions, prompts, images, folder.tokenizer.pad_id)


def question_loader(
    dataset: QuestionDataset,
    *,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    done: Collection[int] = (),
    max_bad_samples: float = 0.001,
) -> EvalLoader:
    """Batches of questions in file order, every one once over all processes.

    Args:
        dataset: of ``question_dataset``.
        batch_size: questions a batch; the batches do not depend on the number of processes.
        num_workers: loader processes.
        pin_memory: for a CUDA device.
        done: places of questions that are answered; batches of nothing else are left out.
        max_bad_samples: share of the images that may be replaced by grey ones.
    """
    done, world_size = frozenset(done), distributed.world_size()
    return build_eval_loader(
        dataset,
        dataset.collate,
        batch_size,
        rank=distributed.rank(),
        world_size=world_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        done=[index for index, question in enumerate(dataset.questions) if question.place in done],
        fixed_batches=True,
        watch=partial(limit_replaced, num_samples=len(dataset), share=max_bad_samples, world_size=world_size),
    )


def answer(
    model: LlavaForCausalLM,
    loader: EvalLoader,
    kept: PartialResults,
    *,
    tokenizer: LlamaTokenizer,
    images: CLIPImageSettings,
    decoding: Decoding,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    seed: int = 0,
    unanswerable: Sequence[int] = (),
) -> Answers:
    """Answer every question; all processes call it together.

    Args:
        model: the unwrapped one; it gets its mode back.
        loader: of ``question_loader``.
        kept: takes the answers and may hold some already; its ids are the questions' places.
        tokenizer: of the model.
        images: how bytes become numbers.
        decoding: how words are chosen.
        device: where the model is.
        autocast: makes the autocast context.
        seed: of drawn answers.
        unanswerable: ids of the answer ``unanswerable`` (``data.llava_questions.answer_ids``), whose probability is
            wanted too; none: it is not.

    Returns:
        {place: {"text": answer, "unanswerable": probability}}, on every process.

    Raises:
        RunError: the model gives no finite numbers.
    """

    def reply(model: LlavaForCausalLM, batch: dict[str, Any]) -> list[dict[str, Any]]:
        pixels = normalize(batch["image"], images, next(model.tower.parameters()).dtype)
        joined = model.join(batch["ids"], pixels, mask=batch["mask"], padding_side="left")
        draws = [_generator(seed, place, device) for place in batch["place"]] if decoding.temperature > 0 else None
        try:
            words = generate(model, joined, decoding, generator=draws)
        except FloatingPointError as error:
            raise _not_finite(batch["place"], str(error)) from None
        found: list[dict[str, Any]] = [{"text": tokenizer.decode(row).strip()} for row in words.tolist()]
        if unanswerable:
            chances = answer_probability(model, joined, unanswerable).tolist()
            for row, chance in zip(found, chances, strict=True):
                row["unanswerable"] = chance
        return found

    replaced = 0
    batches = forward_batches(
        model, loader, reply, device=device, autocast=autocast, total=len(loader), description="answering"
    )
    for batch, found in batches:
        if any(not math.isfinite(row.get("unanswerable", 0)) for row in found):
            raise _not_finite(batch["place"], "a probability is not a finite number")
        replaced += batch["images_replaced"]
        # after a stop somebody may have mended the images
        kept.add(dict(zip(batch["place"], found, strict=True)), keep=not batch["images_replaced"])
    warn_of_replaced(sum_over_processes({"replaced": float(replaced)})["replaced"])
    return kept.gather()


def match_rows(rows: Sequence[VizWizRow], questions: Sequence[LlavaQuestion]) -> dict[int, VizWizRow]:
    """The annotation of each question, by its place; told by the image's name, of one's own data by the id.

    Raises:
        DataError: a question has none, or one with too few answers to score against.
    """
    by_id = {row.id: row for row in rows}
    are_own = any(row.question_id is not None for row in rows)
    ids = {q.place: q.question_id if are_own else VizWizRow(q.image, "").id for q in questions}
    missing = [question.image for question in questions if ids[question.place] not in by_id]
    if missing:
        raise DataError(
            f"the annotations lack {len(missing)} of {len(questions)} questions, the first of image {missing[0]:.200}: "
            "give those of the same split"
        )
    matched = {place: by_id[name] for place, name in ids.items()}
    for row in matched.values():
        if len(row.answers) < MIN_ANSWERS:
            raise DataError(
                f"the annotations have {len(row.answers)} answers for image {row.image:.200}, scores need at least "
                f"{MIN_ANSWERS} people: give a split with answers"
            )
    return matched


def score(rows: Mapping[int, VizWizRow], answers: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of VizWiz, in percent but for the shares.

    Whether a question can be answered is taken from the annotations or, where they do not say, from the most frequent
    answer.

    Args:
        rows: of ``match_rows``.
        answers: of ``answer``, for the same places.

    Returns:
        ``questions``; ``accuracy``: by text rule ``overall`` and ``per_answer_type``; ``unanswerable``: the shares
        ``predicted`` and ``true``; ``answerability``: ``average_precision`` and ``f1``, or None without probabilities
        or without an unanswerable question.
    """
    texts = {str(place): answers[place]["text"] for place in rows}
    given = {str(place): [a.text for a in row.answers] for place, row in rows.items()}
    types = {str(place): row.answer_type for place, row in rows.items() if row.answer_type is not None}
    accuracy = {}
    for rule in TEXT_RULES:
        found = vizwiz_accuracy(texts, given, types, rule=rule)
        per_type = {name: _percent(mean.value) for name, mean in sorted(found.per_answer_type.items())}
        accuracy[rule] = {"overall": _percent(found.overall.value), "per_answer_type": per_type}
    can_be_answered = [_can_be_answered(row) for row in rows.values()]
    said = sum(map(is_unanswerable, texts.values()))
    answerability = None
    if not all(can_be_answered) and all("unanswerable" in answers[place] for place in rows):
        sure = [1 - min(answers[place]["unanswerable"], 1.0) for place in rows]
        answerability = {name: _percent(value) for name, value in answerability_scores(can_be_answered, sure).items()}
    return {
        "questions": len(rows),
        "accuracy": accuracy,
        "unanswerable": {"predicted": said / len(rows), "true": can_be_answered.count(False) / len(rows)},
        "answerability": answerability,
    }


def describe_scores(scores: Mapping[str, Any]) -> list[str]:
    """Lines to print."""
    lines = []
    for rule, values in scores["accuracy"].items():
        lines.append(f"accuracy ({rule} rule) {values['overall']:.2f} over {scores['questions']} questions")
        lines += [f"  answer type {name:16} {value:6.2f}" for name, value in values["per_answer_type"].items()]
    predicted, true = (100 * scores["unanswerable"][key] for key in ("predicted", "true"))
    lines.append(f"unanswerable: {predicted:.1f} % of the answers, {true:.1f} % of the questions")
    if scores["answerability"] is not None:
        found = scores["answerability"]
        lines.append(f"answerability: average precision {found['average_precision']:.2f}, F1 {found['f1']:.2f}")
    return lines


def _most_tokens(folder: LlavaFolder) -> int:
    """Ids of a prompt, the image's one among them, that the model neither cuts nor has never learnt."""
    config = folder.model.config
    longest = config.text.max_position_embeddings
    return min(config.max_length or longest, longest) - folder.model.image_rows + 1


def _generator(seed: int, place: int, device: torch.device) -> torch.Generator:
    state = np.random.SeedSequence((seed, place)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> np.uint64(1)))


def _not_finite(places: Sequence[int], what: str) -> RunError:
    return RunError(
        f"questions {min(places) + 1} to {max(places) + 1} of the file: {what}; the weights may be damaged, or the "
        "precision too low: try bfloat16 or float32"
    )


def _can_be_answered(row: VizWizRow) -> bool:
    if row.is_answerable is not None:
        return row.is_answerable
    return choose_answer([answer.text for answer in row.answers])[0] != UNANSWERABLE


def _percent(fraction: float) -> float:
    return round(100 * fraction, 4)
