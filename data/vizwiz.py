"""Files of VizWiz: the original lists and the course's columns in, LLaVA's training file, uploads and submissions out.

Questions of one's own (``data/own_vqa.py``) become the same rows.

Sources: the file formats of VizWiz-VQA; ``format_dataset_for_llava.py`` and ``format_result_for_submission.py`` of the
course competition's LLaVA pipeline; LLaVA's ``convert_vizwiz_for_submission.py``.

Deliberate differences: an answer of signs alone, such as an emoji, which the competition's normalisation leaves empty,
is learnt as VizWiz's own writes it; one that is empty then too gives way to the next; an image name that does not end
in .jpg is kept as it is.
"""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.files import check_relative, iterate_jsonl, open_atomic, parse_json, read_json
from data.metrics.vizwiz import normalize_evalai, process_text
from data.metrics.vqa import ten_choose_nine
from data.own_vqa import OWN_QUESTIONS, own_rows
from data.vqa_answers import normalize_official

UNANSWERABLE = "unanswerable"
QuestionId = str | int  # LLaVA's own files of VizWiz number their questions, others name them
# of a training sample that is to be learnt with another answer in each epoch; a name that nobody's own files have
ANSWERS_KEY = "plainvl_answers"
# LLaVA's prompt for VizWiz, behind the question
SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
ANSWER_CHOICES = ("mode", "soft", "sample", "all")
# what may be done to an answer before it is sent: the original's rules, the course's, nothing
NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "evalai": normalize_evalai,
    "process_text": process_text,
    "none": str,
}
CONFIDENCES = ("yes", "maybe", "no")
_ROW_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_KEYS = ("image", "question", "answers", "answer_type", "answerable")


def is_unanswerable(text: str) -> bool:
    """Whether an answer says that there is none."""
    return process_text(text) == UNANSWERABLE


@dataclass(frozen=True)
class VizWizAnswer:
    """What one person said; ``confidence`` is one of ``CONFIDENCES``, or None if the file does not tell."""

    text: str
    confidence: str | None = None


@dataclass(frozen=True)
class VizWizRow:
    """One question about one image.

    Attributes:
        image: path below the image folder; without its ending it tells the rows of a file apart.
        question: raw.
        answers: usually ten; none where they are hidden.
        answer_type: such as ``yes/no``, if the file tells.
        is_answerable: if the file tells.
        question_id: of a question of one's own, of which there may be several about one image.
    """

    image: str
    question: str
    answers: tuple[VizWizAnswer, ...] = ()
    answer_type: str | None = None
    is_answerable: bool | None = None
    question_id: int | None = None

    @property
    def id(self) -> QuestionId:
        """By which LLaVA's files tell questions apart: in those of VizWiz the name of the image without its ending."""
        return os.path.splitext(self.image)[0] if self.question_id is None else self.question_id


def read_rows(path: str | Path) -> list[VizWizRow]:
    """Read ``train.json`` or ``valid.json`` of the course (columns), or a list of objects as VizWiz publishes it.

    Args:
        path: ``{"image": {"0": ...}, "question": {"0": ...}, "answers": {"0": [...]}}`` or
            ``[{"image": ..., "question": ..., "answers": [...], "answer_type": ..., "answerable": ...}]``; all but
            image and question may be absent. A file that ends in .jsonl is one for ``read_own_rows``.

    Returns:
        The rows, by number.

    Raises:
        DataError: names the file and the row that is not of this form, or whose image another row has.
    """
    if Path(path).suffix == ".jsonl":
        return read_own_rows([path])
    content = read_json(path, advice="it is one of the annotation files of VizWiz or of the course competition")
    if isinstance(content, dict):
        numbered = _rows_of_columns(content, path)
    elif isinstance(content, list):
        numbered = enumerate(content)
    else:
        raise DataError(f"{path} must hold a list of rows or an object of columns, got {content!r:.40}")
    rows: list[VizWizRow] = []
    row_of: dict[str, int] = {}
    for number, values in numbered:
        row = _parse_row(values, f"{path}: row {number}")
        if row.id in row_of:
            raise DataError(
                f"{path}: row {number} has the image name {row.id!r:.80} of row {row_of[row.id]}; answers are told "
                "apart by it: remove one of the two or rename the image"
            )
        row_of[row.id] = number
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows: download it again")
    return rows


def read_own_rows(paths: Iterable[str | Path]) -> list[VizWizRow]:
    """Read questions of one's own; those without an id get their number over all files.

    Raises:
        DataError: names file and line that is not of the schema of ``data/own_vqa.py``, or whose id another one has.
    """
    rows = []
    for _, row in own_rows(itertools.chain.from_iterable(map(OWN_QUESTIONS.lines, paths))):
        said = tuple(VizWizAnswer(answer) for answer in row.answers or ())
        rows.append(VizWizRow(row.image, row.question, said, question_id=row.question_id))
    return rows


def own_line(row: VizWizRow) -> dict[str, Any]:
    """A row of ``read_own_rows`` with answers, as its file has it."""
    answers = [answer.text for answer in row.answers]
    return {"image": row.image, "question": row.question, "answers": answers, "question_id": row.question_id}


def _rows_of_columns(columns: dict[str, Any], path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = {name: columns[name] for name in _KEYS if name in columns}
    for name in ("image", "question"):
        if name not in columns:
            raise DataError(f'{path} has no column "{name}": it must be an object of columns, or a list of rows')
    for name, column in columns.items():
        if not isinstance(column, dict):
            raise DataError(f'{path}: column "{name}" must be an object with row numbers as keys, got {column!r:.40}')
        for key in column:
            if not _ROW_NUMBER.fullmatch(key):
                raise DataError(f'{path}: column "{name}" has the key {key!r:.40}, keys must be row numbers')
        uneven = column.keys() ^ columns["image"].keys()
        if uneven:
            row = min(uneven, key=int)
            raise DataError(f'{path}: row {row} is not in both columns "image" and "{name}": download the file again')
    for key in sorted(columns["image"], key=int):  # the file may have them as text sorts: 0, 1, 10, 2
        yield int(key), {name: column[key] for name, column in columns.items()}


def _parse_row(values: Any, where: str) -> VizWizRow:
    if not isinstance(values, dict):
        raise DataError(f'{where} must be an object {{"image": name, "question": text}}, got {values!r:.80}')
    question, answer_type, answerable = (values.get(key) for key in ("question", "answer_type", "answerable"))
    if type(question) is not str:
        raise DataError(f'{where}: "question" must be a text, got {question!r:.80}')
    if answer_type is not None and type(answer_type) is not str:
        raise DataError(f'{where}: "answer_type" must be a text, got {answer_type!r:.80}')
    if answerable is not None and answerable not in (0, 1):
        raise DataError(f'{where}: "answerable" must be 0 or 1, got {answerable!r:.80}')
    answers = values.get("answers")
    if answers is not None and (not isinstance(answers, list) or not answers):
        raise DataError(f'{where}: "answers" must be a list of what people said, got {answers!r:.80}')
    return VizWizRow(
        check_relative(values.get("image"), where),
        question,
        tuple(_parse_answer(answer, where) for answer in answers or ()),
        answer_type,
        None if answerable is None else bool(answerable),
    )


def _parse_answer(answer: Any, where: str) -> VizWizAnswer:
    text, confidence = (answer.get("answer"), answer.get("answer_confidence")) if type(answer) is dict else (None, None)
    if type(text) is not str or confidence not in (*CONFIDENCES, None):
        raise DataError(
            f'{where}: an answer must be {{"answer": text, "answer_confidence": yes, maybe or no}}, got {answer!r:.120}'
        )
    return VizWizAnswer(text, confidence)


def split_rows(rows: Sequence[VizWizRow], share: float, seed: int) -> tuple[list[VizWizRow], list[VizWizRow]]:
    """Rows to train on and rows to keep for scoring, both in file order.

    The draw is by SHA-256 of seed and id: no library version changes it, and it hardly moves when rows are added.

    Args:
        rows: of the training split.
        share: of all rows, below 1; a share above 0 keeps at least one.
        seed: another one draws other rows.

    Raises:
        DataError: nothing is left to train on.
    """
    if not share:
        return list(rows), []
    amount = max(1, round(share * len(rows)))
    if amount >= len(rows):
        raise DataError(f"--hold_out {share:g} of {len(rows)} rows leaves nothing to train on: give a smaller share")
    drawn = sorted((row.id for row in rows), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:amount]
    chosen = set(drawn)
    return [row for row in rows if row.id not in chosen], [row for row in rows if row.id in chosen]


@dataclass(frozen=True)
class ConversionOptions:
    """How rows become LLaVA's conversations; the defaults are those of the competition's pipeline.

    Attributes:
        keep_questions_raw: write questions as they were asked instead of normalised.
        suffix: put behind every question, such as ``SUFFIX``.
        answer_choice: ``mode`` learns the most frequent answer, ``soft`` one of the highest accuracy (all that four
            people gave are equal to it). The first given wins ties. ``sample`` keeps everybody's answer in the file, of
            which each epoch of run_llava_lora.py draws one; ``all`` makes a sample of each.
        drop_unsure_answers: leave out people who were not confident, unless nobody was.
    """

    keep_questions_raw: bool = False
    suffix: str = ""
    answer_choice: str = "mode"
    drop_unsure_answers: bool = False

    def __post_init__(self) -> None:
        """Refuse a choice that there is not."""
        if self.answer_choice not in ANSWER_CHOICES:
            raise DataError(
                f"the answer choice must be one of {', '.join(ANSWER_CHOICES)}, got {self.answer_choice!r:.40}"
            )

    def prompt_of(self, row: VizWizRow) -> str:
        """The question as the model reads it, without the image token."""
        question = row.question if self.keep_questions_raw else process_text(row.question, llava_fork=True)
        return question + self.suffix


@dataclass(frozen=True)
class TrainingFile:
    """Content of LLaVA's training file, and what to report of it.

    Attributes:
        entries: as ``train_for_llava.json`` holds them, in which the original writes an indent of 4.
        num_replaced: rows whose most wanted answer was empty once normalised and gave way to another.
    """

    entries: list[dict[str, Any]]
    num_replaced: int

    @property
    def num_unanswerable(self) -> int:
        """Entries that teach to answer ``unanswerable``."""
        return sum(answer == UNANSWERABLE for answer in self._answers())

    @property
    def num_distinct_answers(self) -> int:
        """How many different answers are taught."""
        return len(set(self._answers()))

    def _answers(self) -> list[str]:
        return [entry["conversations"][-1]["value"] for entry in self.entries]


def choose_answer(answers: Sequence[str], answer_choice: str = "mode") -> tuple[str, bool]:
    """The answer to learn out of those of several people.

    Args:
        answers: raw, at least one.
        answer_choice: see ``ConversionOptions``.

    Returns:
        Normalised text, never empty, and whether it stands in for one that is.
    """
    return _choose([_learnt(answer) for answer in answers], answer_choice)


def _learnt(answer: str) -> str:
    """The course's text of an answer; of signs alone, which it drops, VizWiz's own text, such as an emoji or ``$``."""
    return process_text(answer, llava_fork=True) or normalize_official(answer)


def _choose(normalized: Sequence[str], answer_choice: str) -> tuple[str, bool]:
    worth: Mapping[str, float] = Counter(normalized)  # in order of first appearance
    if answer_choice == "soft":
        worth = {answer: ten_choose_nine(answer, normalized) for answer in worth}
    ranked = sorted(worth, key=lambda answer: -worth[answer])  # stable: the first given wins ties
    return next(filter(None, ranked), UNANSWERABLE), not ranked[0]


def training_file(rows: Iterable[VizWizRow], options: ConversionOptions | None = None) -> TrainingFile:
    """Make ``train_for_llava.json`` of the training rows.

    Raises:
        DataError: a row has no answers.
    """
    options = options or ConversionOptions()
    entries, num_replaced = [], 0
    for row in rows:
        if not row.answers:
            raise DataError(f"image {row.image} has no answers to learn from: convert the training split")
        answers = row.answers
        if options.drop_unsure_answers:
            answers = [answer for answer in answers if answer.confidence != "no"] or answers
        normalized = [_learnt(answer.text) for answer in answers]
        text, is_replaced = _choose(normalized, options.answer_choice)
        num_replaced += is_replaced
        everybody = list(filter(None, normalized)) or [UNANSWERABLE]
        for number, one in enumerate(everybody if options.answer_choice == "all" else [text]):
            turns = [
                {"from": "human", "value": f"<image>\n{options.prompt_of(row)}"},
                {"from": "gpt", "value": one},
            ]
            name = f"{row.id}_{number}" if options.answer_choice == "all" else row.id
            entry = {"id": name, "image": row.image, "conversations": turns}
            entries.append(entry | ({ANSWERS_KEY: everybody} if options.answer_choice == "sample" else {}))
    return TrainingFile(entries, num_replaced)


def question_lines(rows: Iterable[VizWizRow], options: ConversionOptions | None = None) -> list[dict[str, Any]]:
    """Make ``valid_for_llava.jsonl``, the questions that LLaVA's evaluation reads, of rows with or without answers."""
    options = options or ConversionOptions()
    return [{"question_id": row.id, "image": row.image, "text": options.prompt_of(row)} for row in rows]


def read_results(path: str | Path) -> tuple[dict[QuestionId, str], int]:
    """The texts of ``read_result_rows``."""
    rows, num_broken = read_result_rows(path)
    return {question_id: row["text"] for question_id, row in rows.items()}, num_broken


def read_result_rows(path: str | Path) -> tuple[dict[QuestionId, dict[str, Any]], int]:
    """Read an answers file of LLaVA's evaluation (one JSON object a line).

    Returns:
        Line by question id, the last one if an id comes again; and the number of broken lines, which are skipped:
        a run that was stopped leaves one, and its question is asked again.

    Raises:
        DataError: no such file, or a line without ``question_id`` or ``text``.
    """
    results: dict[QuestionId, dict[str, Any]] = {}
    num_broken = 0
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the answers {path} ({error.strerror}): run the evaluation first") from None
    for number, line in enumerate(lines, start=1):
        try:
            values = parse_json(line, f"{path}:{number}")
        except DataError:
            num_broken += 1
            continue
        if type(values) is not dict:
            raise DataError(f'{path}:{number}: a line must be {{"question_id": …, "text": …}}, got {line!r:.120}')
        _text(values, "text", f"{path}:{number}")
        results[_question_id(values, f"{path}:{number}")] = values
    return results, num_broken


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of ``question_lines``, or one of LLaVA's own, whose ids are whole numbers.

    Raises:
        DataError: names the line and its ``question_id``, ``image`` or ``text`` that is missing or of another kind.
    """
    questions = []
    for number, row in iterate_jsonl(path, advice="scripts/format_dataset_for_llava.py writes it"):
        where = f"{path}:{number}"
        _question_id(row, where), _text(row, "image", where), _text(row, "text", where)
        questions.append(row)
    return questions


def _question_id(row: Mapping[str, Any], where: str) -> QuestionId:
    value = row.get("question_id")
    if type(value) not in (str, int):
        raise DataError(f'{where}: "question_id" must be a text or a whole number, got {value!r:.80}')
    return value


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if type(row.get(key)) is not str:
        raise DataError(f'{where}: "{key}" must be a text, got {row.get(key)!r:.80}')
    return row[key]


def upload_entries(
    questions: Iterable[Mapping[str, Any]],
    results: Mapping[QuestionId, str],
    normalize: Callable[[str], str] = normalize_evalai,
) -> list[dict[str, str]]:
    """Make the list that VizWiz takes, in the order of the questions: [{"image": name, "answer": text}].

    Args:
        questions: as ``question_lines``.
        results: the model's answers by question id; the number 1 and the text "1" are two ids, as in JSON.
        normalize: what is done to an answer; for the course competition ``process_text`` may be meant.

    Raises:
        DataError: a question has no result.
    """
    questions = list(questions)
    missing = [question["question_id"] for question in questions if question["question_id"] not in results]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(questions)} questions have no answer, the first: {missing[0]}; "
            "run the evaluation to its end on these questions"
        )
    return [
        {"image": question["image"], "answer": normalize(results[question["question_id"]])} for question in questions
    ]


def write_upload(path: str | Path, entries: Sequence[Mapping[str, str]]) -> None:
    """Write ``upload_entries`` as the original does, on one line without an end, whole or not at all."""
    with open_atomic(path) as handle:
        json.dump(entries, handle)


def read_upload(path: str | Path) -> list[str]:
    """The answers of a file of ``upload_entries``, in its order.

    Raises:
        DataError: names the entry that has no answer.
    """
    entries = read_json(path, advice="scripts/convert_vizwiz_for_submission.py writes it")
    if not isinstance(entries, list):
        raise DataError(f'{path} must hold a list of {{"image": name, "answer": text}}, got {entries!r:.40}')
    for number, entry in enumerate(entries):
        if type(entry) is not dict or type(entry.get("answer")) is not str:
            raise DataError(f'{path}: entry {number} must be {{"image": name, "answer": text}}, got {entry!r:.80}')
    return [entry["answer"] for entry in entries]


def write_submission(path: str | Path, answers: Sequence[str]) -> None:
    """Write ``submission.npy`` of the course competition, whole or not at all: an array of texts, nothing pickled.

    Args:
        path: of the file.
        answers: in the order of ``valid.json``.

    Raises:
        DataError: there is none, or one is no text that the array can hold; ``path`` is a folder or a device.
    """
    if not answers:
        raise DataError(f"there are no answers to write to {path}: run the evaluation first")
    for row, answer in enumerate(answers):
        if type(answer) is not str or answer.endswith("\0"):  # numpy cuts zeros off
            raise DataError(f"the answer of row {row} must be a text without a zero at its end, got {answer!r:.80}")
    with open_atomic(path, binary=True) as handle:
        np.save(handle, np.array(answers, dtype=np.str_), allow_pickle=False)
