"""VQA v2: official files to index files, BEiT-3's format (``data/vqa_index.py`` reads them).

Source: the index builder of BEiT-3's VQAv2 dataset. Departures: images are taken in sorted order and the 1000 images of
rest_val by a seeded rule, so that two builds are equal byte for byte; the val questions without a known answer, which
the original drops, are kept beside (``*.unlabelled.jsonl``), since the official accuracy counts them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.index_writer import IndexSummary, IndexWriter
from data.official_files import AbsentError
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary, soft_targets
from data.vqa_index import ANSWER_FILE, MAY_BE_EMPTY
from data.vqav2_files import TEST_SPLITS, TRAIN, VAL, OfficialSplit, read_official_split, rest_val_images

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
    splits = {name: read_official_split(name, data_path, annotation_path, summary) for name in (TRAIN, VAL)}
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
        for row, _ in _rows(splits[TRAIN], encode, vocabulary, progress):
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

        rest = rest_val_images(splits[VAL].image_ids(), seed, num_rest_val_images)
        for row, image_id in _rows(splits[VAL], encode, vocabulary, progress):
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
                test = read_official_split(split, data_path, annotation_path, summary)
            except AbsentError as absent:
                stale = f" (the {file_name} there is of an earlier run)" if (output_path / file_name).exists() else ""
                summary.notes.append(f"{file_name} not written{stale}: {absent}")
                continue
            writer.open(file_name)
            for row, _ in _rows(test, encode, None, progress):
                writer.write(file_name, row)
    return summary


def _rows(
    split: OfficialSplit, encode: "_QuestionEncoder", vocabulary: AnswerVocabulary | None, progress: Progress
) -> Iterator[tuple[dict[str, Any], int]]:
    """(index line, image id) of each question; labels and scores stay empty without a vocabulary."""
    for image_id, image_path in progress(split.images, split.name):
        for question in split.questions[image_id]:
            qid = question["question_id"]
            labels, scores = [], []
            if vocabulary is not None:
                labels, scores = soft_targets(split.answers[qid], vocabulary)
            tokens = encode(question["question"], f"{split.question_path}: question {qid}")
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
