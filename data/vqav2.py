"""VQA v2: official files to index files, BEiT-3's format (``data/vqa_index.py`` reads them).

Source: the index builder of BEiT-3's VQAv2 dataset. Departures: images are taken in sorted order and the 1000 images of
rest_val by a seeded rule, so that two builds are equal byte for byte; the val questions without a known answer, which
the original drops, are kept beside (``*.unlabelled.jsonl``), since the official accuracy counts them.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

from data.errors import DataError
from data.files import read_json
from data.index_writer import IndexSummary, IndexWriter
from data.official_files import IMAGE_PLACES, AbsentError, find_annotation
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary, soft_targets
from data.vqa_index import ANSWER_FILE, MAY_BE_EMPTY

ANNOTATION_PLACES = ("", "vqa", "annotations", "vqa/annotations")  # below the data folder
QUESTION_FILE = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERS_FILE = "v2_mscoco_{}_annotations.json"
TRAIN, VAL, TEST = "train2014", "val2014", "test2015"
TEST_SPLITS = (("test", TEST), ("test-dev", "test-dev2015"))  # both ask about the images of test2015

Progress = Callable[[Iterable, str], Iterable]


@dataclass
class VQAIndexSummary(IndexSummary):
    """The counts of a build, with the size of the answer list.

    Attributes:
        num_answers: size of the answer list.
    """

    num_answers: int = 0


def build_vqav2_index(
    data_path: str | Path,
    annotation_path: str | Path | None,
    tokenizer: XLMRTokenizer,
    output_path: str | Path | None = None,
    *,
    seed: int = 42,
    min_answer_count: int = 9,
    num_rest_val_images: int = 1000,
    progress: Progress = lambda items, _: items,
) -> VQAIndexSummary:
    """Write the index files ``vqa.*.jsonl`` and ``answer2label.txt`` from the official files of VQA v2.

    Only questions whose image is in its folder are written, ordered by image name, then as in the question file.
    rest_val takes the ``num_rest_val_images`` val images with the smallest SHA-256 of "<seed>:<image id>",
    trainable_val the others. All files take their names together at the end.

    Args:
        data_path: folder with ``train2014``, ``val2014``, ``test2015``, directly or in ``images``.
        annotation_path: folder of the six official JSON files; None looks in ``data_path`` and the usual places below.
        tokenizer: turns questions into the ids that the index holds.
        output_path: folder for the index files; ``data_path`` if None.
        seed: of the rest_val rule.
        min_answer_count: how often an answer must be the most common one, over train and val, to get a label.
        num_rest_val_images: size of the own validation split, in images.
        progress: wraps an iterable of images for display, given a description.

    Returns:
        Counts and remarks. The test splits are left out, with a remark, if their files or images are not there.

    Raises:
        DataError: a file or folder that is needed is missing; broken or contradicting annotations; no image present.
    """
    data_path = Path(data_path)
    output_path = Path(output_path) if output_path else data_path
    if num_rest_val_images < 1:
        raise DataError(f"the number of rest_val images must be at least 1, got {num_rest_val_images}")
    summary = VQAIndexSummary()
    splits = {name: _read_split(name, data_path, annotation_path, summary) for name in (TRAIN, VAL)}
    vocabulary = AnswerVocabulary.from_annotations(
        (answer for split in splits.values() for answer in split.multiple_choice_answers), min_answer_count
    )
    summary.num_answers = len(vocabulary)
    encode = _QuestionEncoder(tokenizer)

    with ExitStack() as stack:
        writer = IndexWriter(stack, output_path, summary.num_lines)
        for row in vocabulary.rows():
            writer.write(ANSWER_FILE, row)
        writer.open("vqa.train.jsonl", "vqa.val.jsonl", "vqa.rest_val.jsonl", *MAY_BE_EMPTY)
        num_unlabelled = 0
        for row, _ in splits[TRAIN].rows(encode, vocabulary, progress):
            num_unlabelled += not row["labels"]
            if row["labels"]:
                writer.write("vqa.train.jsonl", row)
        if summary.num_lines["vqa.train.jsonl"] == 0:
            raise DataError(
                f"none of the {num_unlabelled} train questions has a known answer: lower --min_answer_count"
            )
        if num_unlabelled:
            summary.notes.append(
                f"{num_unlabelled} train questions left out: none of their answers is in {ANSWER_FILE}"
            )

        rest = _rest_val_images(splits[VAL].image_ids(), seed, num_rest_val_images)
        for row, image_id in splits[VAL].rows(encode, vocabulary, progress):
            ending = ".jsonl" if row["labels"] else ".unlabelled.jsonl"
            writer.write("vqa.val" + ending, row)
            if image_id in rest:
                writer.write("vqa.rest_val" + ending, row)
            elif row["labels"]:
                writer.write("vqa.trainable_val.jsonl", row)
        if summary.num_lines["vqa.rest_val.jsonl"] == 0:
            raise DataError("no val question of rest_val has a known answer: lower --min_answer_count")

        for name, split in TEST_SPLITS:
            file_name = f"vqa.{name}.jsonl"
            try:
                test = _read_split(split, data_path, annotation_path, summary)
            except AbsentError as absent:
                stale = f" (the {file_name} there is of an earlier run)" if (output_path / file_name).exists() else ""
                summary.notes.append(f"{file_name} not written{stale}: {absent}")
                continue
            writer.open(file_name)
            for row, _ in test.rows(encode, None, progress):
                writer.write(file_name, row)
    return summary


@dataclass
class _Split:
    """Questions of the images that are present, grouped by image, and all answers of the split (none for test)."""

    name: str
    question_path: Path
    images: list[tuple[int, str]]  # (image id, path relative to the data folder), by name; only with questions
    questions: dict[int, list[dict]]  # by image id
    answers: dict[int, list[str]]  # by question id
    multiple_choice_answers: list[str]  # in file order

    def image_ids(self) -> list[int]:
        return [image_id for image_id, _ in self.images]

    def rows(
        self, encode: "_QuestionEncoder", vocabulary: AnswerVocabulary | None, progress: Progress
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """(index line, image id) of each question; labels and scores stay empty without a vocabulary."""
        for image_id, image_path in progress(self.images, self.name):
            for question in self.questions[image_id]:
                qid = question["question_id"]
                labels, scores = [], []
                if vocabulary is not None:
                    labels, scores = soft_targets(self.answers[qid], vocabulary)
                tokens = encode(question["question"], f"{self.question_path}: question {qid}")
                yield (
                    {"image_path": image_path, "text_segment": tokens, "labels": labels, "scores": scores, "qid": qid},
                    image_id,
                )


class _QuestionEncoder:
    """Token ids of a question; the same question is asked of many images, so each text is encoded once."""

    def __init__(self, tokenizer: XLMRTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str, where: str) -> list[int]:
        tokens = self._known.get(text)
        if tokens is None:
            tokens = self._known[text] = self._tokenizer.encode_filled(text, "question", where)
        return tokens


def _rest_val_images(image_ids: list[int], seed: int, num_images: int) -> set[int]:
    """A seeded draw that no library version changes, and that hardly moves when images are added."""
    return set(sorted(image_ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:num_images])


def _read_split(split: str, data_path: Path, annotation_path: str | Path | None, summary: IndexSummary) -> _Split:
    is_test = split not in (TRAIN, VAL)
    question_path = find_annotation(QUESTION_FILE.format(split), data_path, annotation_path, ANNOTATION_PLACES)
    questions = _items(question_path, "questions", {"image_id": int, "question": str, "question_id": int})
    found = [(f"{split} questions", str(question_path))]
    answers: dict[int, list[str]] = {}
    multiple_choice_answers: list[str] = []
    if not is_test:
        answers_path = find_annotation(ANSWERS_FILE.format(split), data_path, annotation_path, ANNOTATION_PLACES)
        annotations = _items(
            answers_path, "annotations", {"question_id": int, "multiple_choice_answer": str, "answers": list}
        )
        found.append((f"{split} annotations", str(answers_path)))
        _check_answers(questions, question_path, annotations, answers_path)
        # strings only, each once: the objects of all ten answers of all questions would fill gigabytes
        answers = {qid: [intern(answer["answer"]) for answer in a["answers"]] for qid, a in annotations.items()}
        multiple_choice_answers = [intern(a["multiple_choice_answer"]) for a in annotations.values()]
    folder, images = _list_images(data_path, TEST if is_test else split)
    found.append((f"{split} images", f"{data_path / folder} ({len(images)} images)"))

    by_image: dict[int, list[dict]] = {}
    num_missing = 0
    for question in questions.values():
        if question["image_id"] in images:
            by_image.setdefault(question["image_id"], []).append(question)
        else:
            num_missing += 1
    if not by_image:
        raise AbsentError(
            f"none of the {num_missing} questions of {question_path} has its image in {data_path / folder}"
        )
    summary.found.extend(found)
    if num_missing:
        summary.notes.append(f"{num_missing} {split} questions left out: their image is not in {data_path / folder}")
    present = [(image_id, f"{folder}/{name}") for image_id, name in images.items() if image_id in by_image]
    return _Split(split, question_path, present, by_image, answers, multiple_choice_answers)


def _items(path: Path, key: str, kinds: dict[str, type]) -> dict[int, dict]:
    """The objects of a question or annotation file by question id, in file order."""
    content = read_json(path)
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        raise DataError(f'{path}: needs a non-empty list under "{key}"; is it the official file of VQA v2?')
    by_id: dict[int, dict] = {}
    for place, item in enumerate(items):
        qid = item.get("question_id") if isinstance(item, dict) else None
        name = f"{path}: {key}[{place}]" if qid is None else f"{path}: question {qid!s:.40}"
        for wanted, kind in kinds.items():
            if not isinstance(item, dict) or type(item.get(wanted)) is not kind:
                raise DataError(f'{name}: "{wanted}" must be of type {kind.__name__}, the entry is {item!r:.120}')
        if qid in by_id:
            raise DataError(f"{name} stands twice; question ids must be unique")
        by_id[qid] = item
    return by_id


def _check_answers(questions: dict[int, dict], question_path: Path, annotations: dict[int, dict], path: Path) -> None:
    """Every question has one annotation, of the same image, with at least one answer text; and the reverse."""
    for one, other, what in ((questions, annotations, path), (annotations, questions, question_path)):
        missing = [qid for qid in one if qid not in other]
        if missing:
            raise DataError(
                f"{what}: {len(missing)} question ids missing, the first {missing[:5]}; question and annotation file "
                "must be of the same split"
            )
    for qid, annotation in annotations.items():
        answers = annotation["answers"]
        if not answers or not all(isinstance(a, dict) and type(a.get("answer")) is str for a in answers):
            raise DataError(
                f'{path}: question {qid}: "answers" must be a list of {{"answer": text}}, got {answers!r:.120}'
            )
        image_id = questions[qid]["image_id"]
        if annotation.get("image_id", image_id) != image_id:
            raise DataError(
                f"{path}: question {qid}: image {annotation['image_id']}, but {image_id} in {question_path}"
            )


def _list_images(data_path: Path, split: str) -> tuple[str, dict[int, str]]:
    """Folder relative to the data folder, and file name by image id, ordered by name."""
    for place in IMAGE_PLACES:
        folder = f"{place}/{split}".removeprefix("/")
        if (data_path / folder).is_dir():
            break
    else:
        looked = ", ".join(str(data_path / place / split) for place in IMAGE_PLACES)
        raise AbsentError(f"no image folder {split} (looked for {looked}): give the folder above it as --data_path")
    images: dict[int, str] = {}
    for name in sorted(os.listdir(data_path / folder)):
        digits = name.removesuffix(".jpg").rpartition("_")[2]
        if not name.endswith(".jpg") or name.startswith(".") or not (digits.isascii() and digits.isdigit()):
            continue  # thumbnails, lists, "._" files of other systems
        if int(digits) in images:
            raise DataError(
                f"{data_path / folder}: {images[int(digits)]} and {name} are both image {int(digits)}: remove one"
            )
        images[int(digits)] = name
    return folder, images
