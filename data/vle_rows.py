"""VQA v2 for VLE: official files to rows, one an image with all its questions, as JSON lines or as Arrow tables.

Source: METER's ``write_vqa.py`` as VLE has it: file names, columns, labels and scores. Departures: images in sorted
order and the 1000 images of rest_val by a seeded rule, so that two builds are equal; JSON lines hold the image's path,
not its bytes; val questions without a known answer, which the original drops, are kept beside (``*.unlabelled``), since
the official accuracy counts them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import open_atomic, write_json_atomic
from data.images import read_image_file
from data.index_writer import IndexSummary, IndexWriter
from data.official_files import AbsentError
from data.vqa_answers import AnswerVocabulary, soft_targets
from data.vqav2_files import TEST_SPLITS, TRAIN, VAL, OfficialSplit, read_official_split, rest_val_images

LABEL_FILE = "label2answer.json"  # list of answers by label
ANSWER_FILE = "answer2label.json"
ROWS_IN_MEMORY = 64  # of an Arrow table: image files are up to 300 KB each
NEEDS_PYARROW = "Arrow tables need the package pyarrow: pip install pyarrow, or use the JSON lines of write_vqa.py"

Progress = Callable[[Iterable, str], Iterable]
Row = dict[str, Any]


def rows_file(split: str, kind: str) -> str:
    """Name of the file of ``train``, ``val``, ``trainable_val``, ``rest_val``, ``test``, ``test-dev``."""
    return f"vqav2_{split}.{kind}"


@dataclass
class VLERowsSummary(IndexSummary):
    """The counts of a build (rows, that is images), with the size of the answer list.

    Attributes:
        num_answers: size of the answer list.
        num_questions: of each file, by name.
    """

    num_answers: int = 0
    num_questions: dict[str, int] | None = None


def build_vle_rows(
    data_path: str | Path,
    annotation_path: str | Path | None,
    output_path: str | Path,
    *,
    kind: str = "jsonl",
    seed: int = 42,
    min_answer_count: int = 9,
    num_rest_val_images: int = 1000,
    progress: Progress = lambda items, _: items,
) -> VLERowsSummary:
    """Write ``vqav2_<split>.jsonl`` or ``.arrow``, ``answer2label.json`` and ``label2answer.json``.

    A train or val question without a known answer is left out, and an image without questions; test keeps all.

    Args:
        data_path: folder with ``train2014``, ``val2014``, ``test2015``.
        annotation_path: folder of the six official JSON files; None looks in ``data_path`` and the usual places below.
        output_path: folder for the files.
        kind: ``jsonl``, with paths of images below ``data_path``; or ``arrow``, with the images themselves, as the
            original reads them.
        seed: of the rest_val rule.
        min_answer_count: how often an answer must be the most common one, over train and val, to get a label.
        num_rest_val_images: size of the own validation split.
        progress: wraps an iterable of images for display, given a description.

    Raises:
        DataError: a file or folder that is needed is missing; broken annotations; no image present; no pyarrow.
    """
    data_path, output_path = Path(data_path), Path(output_path)
    summary = VLERowsSummary(num_questions={})
    splits = {name: read_official_split(name, data_path, annotation_path, summary) for name in (TRAIN, VAL)}
    vocabulary = AnswerVocabulary.from_annotations(
        (answer for split in splits.values() for answer in split.multiple_choice_answers), min_answer_count
    )
    summary.num_answers = len(vocabulary)

    with ExitStack() as stack:
        writer = (_ArrowWriter if kind == "arrow" else _JSONLWriter)(stack, data_path, output_path, summary)
        for split in ("train", "val", "trainable_val", "rest_val", "val.unlabelled", "rest_val.unlabelled"):
            writer.open(rows_file(split, kind))
        for row, _ in _rows(splits[TRAIN], "train", vocabulary, progress):
            writer.write(rows_file("train", kind), row)
        rest = rest_val_images(
            [
                row["image_id"]
                for row, _ in _rows(splits[VAL], "val", vocabulary, lambda items, _: items)
                if row["questions"]
            ],
            seed,
            num_rest_val_images,
        )
        for row, unlabelled in _rows(splits[VAL], "val", vocabulary, progress):
            part = "rest_val" if row["image_id"] in rest else "trainable_val"
            for split in ("val", part):
                writer.write(rows_file(split, kind), row)
                if split != "trainable_val":
                    writer.write(rows_file(f"{split}.unlabelled", kind), unlabelled)
        for name in ("train", "rest_val"):
            if not summary.num_lines[rows_file(name, kind)]:
                raise DataError(f"no question of {name} has a known answer: lower --min_answer_count")
        for name, split in TEST_SPLITS:
            try:
                test = read_official_split(split, data_path, annotation_path, summary)
            except AbsentError as absent:
                summary.notes.append(f"{rows_file(name, kind)} not written: {absent}")
                continue
            writer.open(rows_file(name, kind))
            for row, _ in _rows(test, name, None, progress):
                writer.write(rows_file(name, kind), row)
    write_json_atomic(output_path / ANSWER_FILE, {answer: label for label, answer in enumerate(vocabulary.answers)})
    write_json_atomic(output_path / LABEL_FILE, list(vocabulary.answers))
    return summary


def _rows(
    split: OfficialSplit, name: str, vocabulary: AnswerVocabulary | None, progress: Progress
) -> Iterator[tuple[Row, Row]]:
    """Of each image the row of the questions with a known answer, or of all in a test split, and that of the others."""
    for image_id, image_path in progress(split.images, split.name):
        row, unlabelled = (
            {
                "image": image_path,
                "questions": [],
                "answers": [],
                "answer_labels": [],
                "answer_scores": [],
                "image_id": image_id,
                "question_id": [],
                "split": name,
            }
            for _ in range(2)
        )
        for question in split.questions[image_id]:
            labels: list[int] = []
            scores: list[float] = []
            if vocabulary is not None:
                labels, scores = soft_targets(split.answers[question["question_id"]], vocabulary)
            chosen = row if labels or vocabulary is None else unlabelled
            chosen["questions"].append(question["question"])
            chosen["question_id"].append(question["question_id"])
            if labels:
                chosen["answers"].append([vocabulary[label] for label in labels])
                chosen["answer_labels"].append(labels)
                chosen["answer_scores"].append(scores)
        yield row, unlabelled


class _JSONLWriter:
    """Rows as JSON lines; an image is its path."""

    def __init__(self, stack: ExitStack, data_path: Path, folder: Path, summary: VLERowsSummary) -> None:
        self._writer, self._summary = IndexWriter(stack, folder, summary.num_lines), summary

    def open(self, name: str) -> None:
        self._writer.open(name)
        self._summary.num_questions[name] = 0

    def write(self, name: str, row: Row) -> None:
        if row["questions"]:
            self._writer.write(name, row)
            self._summary.num_questions[name] += len(row["questions"])


class _ArrowWriter:
    """Rows as Arrow files with the bytes of the images, written whole or not at all."""

    def __init__(self, stack: ExitStack, data_path: Path, folder: Path, summary: VLERowsSummary) -> None:
        self._pa, self._schema = _schema()
        self._stack, self._data_path, self._folder, self._summary = stack, data_path, folder, summary
        self._files: dict[str, Any] = {}
        self._waiting: dict[str, list[Row]] = {}

    def open(self, name: str) -> None:
        self._files[name] = self._stack.enter_context(self._arrow_file(self._folder / name))
        self._waiting[name] = []
        self._summary.num_lines[name] = self._summary.num_questions[name] = 0

    def write(self, name: str, row: Row) -> None:
        if not row["questions"]:
            return
        waiting = self._waiting[name]
        waiting.append(row | {"image": read_image_file(self._data_path / row["image"])})
        self._summary.num_lines[name] += 1
        self._summary.num_questions[name] += len(row["questions"])
        if len(waiting) >= ROWS_IN_MEMORY:
            self._flush(name)

    def _flush(self, name: str) -> None:
        if self._waiting[name]:
            self._files[name].write_batch(self._pa.RecordBatch.from_pylist(self._waiting[name], schema=self._schema))
            self._waiting[name].clear()

    @contextmanager
    def _arrow_file(self, path: Path) -> Iterator[Any]:
        with open_atomic(path, binary=True) as handle, self._pa.ipc.new_file(handle, self._schema) as file:
            yield file
            self._flush(path.name)


def import_pyarrow() -> Any:
    """The package pyarrow.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise DataError(NEEDS_PYARROW) from None
    return pyarrow


def _schema() -> tuple[Any, Any]:
    pa = import_pyarrow()
    texts, numbers = pa.list_(pa.list_(pa.string())), pa.list_(pa.list_(pa.int64()))
    fields = [
        ("image", pa.binary()),
        ("questions", pa.list_(pa.string())),
        ("answers", texts),
        ("answer_labels", numbers),
        ("answer_scores", pa.list_(pa.list_(pa.float64()))),
        ("image_id", pa.int64()),
        ("question_id", pa.list_(pa.int64())),
        ("split", pa.string()),
    ]
    return pa, pa.schema(fields)


def read_labels(folder: str | Path) -> AnswerVocabulary:
    """Answers by label from ``label2answer.json``.

    Raises:
        DataError: missing, or no list of distinct texts.
    """
    path = Path(folder) / LABEL_FILE
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"no {LABEL_FILE} in {folder}: run python scripts/write_vqa.py first") from None
    except ValueError:
        raise DataError(f"{path} is not JSON: run python scripts/write_vqa.py again") from None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{path} must hold a list of answers, got {answers!r:.80}")
    return AnswerVocabulary(answers, source=str(path))
