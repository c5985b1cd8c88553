"""Questions of one's own: a JSON-lines file with images, questions and answers as text, read into the same records.

A line is {"image": path, "question": text, "answers": [text, ...] or absent, "question_id": whole number or absent};
the image path is relative to the data folder. Unlike in the VQA v2 index, answers are compared after normalisation on
both sides, and any number of people may have answered (``soft_score`` scales to ten).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError
from data.files import check_relative
from data.own_rows import OwnSchema, optional_texts
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary, normalize_answer, soft_score
from data.vqa_index import VQARecord, parse_index_line

OWN_QUESTIONS = OwnSchema(
    what="a question",
    example='{"image": "photos/1.jpg", "question": "what is it?", "answers": ["dog"]}',
    keys=frozenset({"image", "question", "answers", "question_id"}),
    id_key="question_id",
)


class OwnRow(NamedTuple):
    """A line of one's own; ``answers`` None: it has none."""

    image: str
    question: str
    answers: list[str] | None
    question_id: int


def read_vqa_file(
    path: str | Path,
    tokenizer: XLMRTokenizer,
    vocabulary: AnswerVocabulary | None,
    *,
    drop_unlabelled: bool = False,
) -> list[VQARecord]:
    """Records of a file of one's own or of an index file, told apart by the keys of the first line.

    Question ids that are absent are running numbers from 0 over the file; they stand on all lines or on none.

    Args:
        path: JSON-lines file.
        tokenizer: of the model.
        vocabulary: the answers that the model knows; None only for files without answers.
        drop_unlabelled: leave out the questions of which no answer is known (training).

    Raises:
        DataError: a wrong key or type, an empty question, an id that stands twice, answers without a vocabulary; file
            and line are named. Also if ``drop_unlabelled`` leaves nothing.
    """
    lines = OWN_QUESTIONS.lines(path)
    first = next(lines)
    lines = itertools.chain([first], lines)
    if "image_path" in first[1] and "image" not in first[1]:
        found = _index_records(lines, tokenizer, vocabulary)
    else:
        found = (_own_record(row, where, tokenizer, vocabulary) for where, row in own_rows(lines))
    records, num_questions = [], 0
    for record in found:
        num_questions += 1
        if record.labels or not drop_unlabelled:
            records.append(record)
    if not records:
        raise DataError(
            f"{path}: none of the {num_questions} questions has an answer of the answer list: give the list that was "
            "built from these data"
        )
    return records


def build_answer_list(files: Iterable[str | Path], min_count: int = 1) -> AnswerVocabulary:
    """Answer list of own data: the normalised answers given at least ``min_count`` times in all files together.

    Labels follow the first appearance. Every entry of every "answers" counts; lines without answers are passed over.

    Raises:
        DataError: no answer is left, or a line is unusable, such as one with an unknown key (file and line are named).
    """
    counts: Counter[str] = Counter()
    names = []
    for path in files:
        names.append(str(path))
        for where, row in OWN_QUESTIONS.lines(path):
            if "image_path" in row:
                raise DataError(f"{where}: an index line has labels, not answers: use its answer2label.txt")
            OWN_QUESTIONS.check_keys(row, where)
            counts.update(map(own_answer, _answers(row, where) or ()))
    kept = [answer for answer, count in counts.items() if count >= min_count]
    if not kept:
        wanted = "answers" if min_count == 1 else f"an answer that is given at least {min_count} times"
        raise DataError(
            f"no question in {', '.join(names)} has {wanted}: training needs lines such as {OWN_QUESTIONS.example}"
        )
    return AnswerVocabulary(kept, source=", ".join(names))


def own_answer(text: str) -> str:
    """Normalised answer; one of which nothing would be left (the choice "A" is an article) only lower-cased."""
    return normalize_answer(text) or " ".join(text.lower().split())


def own_targets(answers: list[str], vocabulary: AnswerVocabulary) -> tuple[list[int], list[float]]:
    """Labels and scores of one question: each answer is looked up as it stands, else normalised, then counted.

    Args:
        answers: what people said, at least one.
        vocabulary: known answers.

    Returns:
        Distinct labels in order of first appearance and scores in (0, 1] by ``soft_score``, which scales to ten people.
    """
    known = (answer if answer in vocabulary else own_answer(answer) for answer in answers)
    counts = Counter(vocabulary.label(answer) for answer in known)
    counts.pop(None, None)
    return list(counts), [soft_score(count, len(answers)) for count in counts.values()]


def _index_records(
    lines: Iterable[tuple[str, dict]], tokenizer: XLMRTokenizer, vocabulary: AnswerVocabulary | None
) -> Iterator[VQARecord]:
    place_of: dict[int, str] = {}
    shared: dict[Any, Any] = {}
    num_answers = None if vocabulary is None else len(vocabulary)
    for where, row in lines:
        record = parse_index_line(row, shared, num_answers, tokenizer.vocab_size, lambda w=where: w)
        before = place_of.setdefault(record.question_id, where)
        if before != where:
            raise DataError(
                f"{where}: question_id {record.question_id} stands on line {before.rpartition(':')[2]} already; "
                "ids are unique"
            )
        yield record


def _own_record(row: OwnRow, where: str, tokenizer: XLMRTokenizer, vocabulary: AnswerVocabulary | None) -> VQARecord:
    tokens = tokenizer.encode_filled(row.question, "question", where)
    labels: list[int] = []
    scores: list[float] = []
    if row.answers:
        if vocabulary is None:
            raise DataError(f"{where}: the line has answers, but there is no answer list to number them by")
        labels, scores = own_targets(row.answers, vocabulary)
    return VQARecord(row.image, tuple(tokens), tuple(labels), tuple(scores), row.question_id)


def own_rows(lines: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, OwnRow]]:
    """Rows of lines of one's own, each with what names its line; those without ids get running numbers from 0.

    Args:
        lines: (file and line, object), of one file or of several.

    Raises:
        DataError: an unknown key, a wrong type, an empty text, ids on some lines only, or an id that stands twice; the
            line is named.
    """
    place_of: dict[int, str] = {}
    for where, line, number in OWN_QUESTIONS.numbered(lines):
        row = _checked(line, where, number)
        if row.question_id in place_of:
            before = place_of[row.question_id]
            raise DataError(f"{where}: question_id {row.question_id} stands at {before} already; ids are unique")
        place_of[row.question_id] = where
        yield where, row


def _checked(row: dict, where: str, question_id: int) -> OwnRow:
    image = check_relative(row.get("image"), f'{where}: "image"')
    question = row.get("question")
    if type(question) is not str or not question.strip():
        raise DataError(f'{where}: "question" must be a text that is not empty, got {question!r:.80}')
    return OwnRow(image, question, _answers(row, where), question_id)


def _answers(row: dict, where: str) -> list[str] | None:
    return optional_texts(row, "answers", where, example='["dog", "puppy"]')
