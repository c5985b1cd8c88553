"""The index files of visual question answering, BEiT-3's format: names of the splits, lines to checked records."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import check_relative, iterate_jsonl, read_json, write_json_atomic

ANSWER_FILE = "answer2label.txt"
SPLIT_FILES = {  # what training and evaluation read
    "train": ("vqa.train.jsonl", "vqa.trainable_val.jsonl"),
    "val": ("vqa.rest_val.jsonl",),
    "val2014": ("vqa.val.jsonl",),
    "test": ("vqa.test.jsonl",),
    "test-dev": ("vqa.test-dev.jsonl",),
}
# questions without a known answer: the reference's files leave them out, the official accuracy counts them
UNLABELLED_FILES = {"val": "vqa.rest_val.unlabelled.jsonl", "val2014": "vqa.val.unlabelled.jsonl"}
# files without lines are no error: val may have at most 1000 images, and every question a known answer
MAY_BE_EMPTY = ("vqa.trainable_val.jsonl", *UNLABELLED_FILES.values())
ADVICE = "run scripts/make_index.py vqav2 --data_path DIR --sentencepiece_model beit3.spm first"
ONLY_INT = frozenset((int,))
NUMBERS = frozenset((int, float))


def write_tokenizer_stamp(folder: Path, index: str, fingerprint: str) -> None:
    """Note beside an index (``vqa``, ``coco_captioning``) which tokenizer its ids belong to."""
    write_json_atomic(folder / f"{index}.tokenizer.json", {"sha256": fingerprint})


def check_tokenizer_stamp(folder: Path, index: str, fingerprint: str) -> None:
    """Refuse an index made with another tokenizer; one without a note (the original's) is taken as it is.

    Raises:
        DataError: the note names another tokenizer.
    """
    path = folder / f"{index}.tokenizer.json"
    if path.is_file() and read_json(path).get("sha256") != fingerprint:
        raise DataError(
            f"the index {index}.*.jsonl in {folder} was made with another sentencepiece model than the one in use: "
            "give that one by --sentencepiece_model, or run scripts/make_index.py again with this one"
        )


@dataclass(frozen=True, slots=True)
class VQARecord:
    """One question; the tuples are shared between records that have the same content.

    Attributes:
        image_path: relative to the data folder.
        tokens: ids of the question without begin and end.
        labels: labels of the known answers; empty where there is none or the split has no answers.
        scores: in [0, 1], parallel to ``labels``.
        question_id: the data set's own number.
    """

    image_path: str
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    scores: tuple[float, ...]
    question_id: int


def read_vqa_index(
    path: str | Path,
    num_answers: int | None = None,
    vocab_size: int | None = None,
    require_labels: bool = False,
    allow_empty: bool = False,
) -> list[VQARecord]:
    """Read one index file.

    Args:
        path: ``vqa.*.jsonl``.
        num_answers: size of the answer list; labels must be below it.
        vocab_size: token ids must be below it.
        require_labels: a line without labels is an error (training data).
        allow_empty: a file without lines is an error unless this is set.

    Raises:
        DataError: a wrong key, type, range or length, or a question id that stands twice; file and line are named.
    """
    records: list[VQARecord] = []
    seen: set[int] = set()
    shared: dict[Any, Any] = {}
    for number, row in iterate_jsonl(path, advice=ADVICE, allow_empty=allow_empty):
        record = parse_index_line(row, shared, num_answers, vocab_size, lambda n=number: f"{path}:{n}")
        if record.question_id in seen:
            raise DataError(f"{path}:{number}: question id {record.question_id} stands twice: {ADVICE}")
        if require_labels and not record.labels:
            raise DataError(
                f"{path}:{number}: question {record.question_id} has no labels, training data need them: {ADVICE}"
            )
        seen.add(record.question_id)
        records.append(record)
    return records


def parse_index_line(
    row: dict, shared: dict, num_answers: int | None, vocab_size: int | None, where: Callable[[], str]
) -> VQARecord:
    """Check one index line; ``shared`` collects the strings and tuples that several records have in common."""
    try:
        path, tokens, labels, scores, qid = (
            row["image_path"], row["text_segment"], row["labels"], row["scores"], row["qid"],
        )  # fmt: skip
    except KeyError as error:
        raise DataError(f"{where()}: the key {error} is missing, this is no VQA index line: {ADVICE}") from None
    if type(path) is not str or path not in shared:
        shared[check_relative(path, where())] = path
    if type(qid) is not int:
        raise DataError(f"{where()}: qid must be a whole number, got {qid!r:.80}")
    if _not_of(ONLY_INT, tokens) or min(tokens, default=0) < 0 or (vocab_size and max(tokens, default=0) >= vocab_size):
        raise DataError(f"{where()}: {_out_of_range('text_segment', tokens, vocab_size, 'vocabulary')}")
    if not tokens:
        raise DataError(f"{where()}: text_segment is empty; every question needs a text")
    if (
        _not_of(ONLY_INT, labels)
        or min(labels, default=0) < 0
        or (num_answers and max(labels, default=0) >= num_answers)
    ):
        raise DataError(f"{where()}: {_out_of_range('labels', labels, num_answers, 'answer list')}")
    if len(labels) > 1 and len(set(labels)) < len(labels):
        raise DataError(f"{where()}: a label stands twice in {labels!r:.120}")
    if type(scores) is not list or len(scores) != len(labels):
        raise DataError(f"{where()}: scores must be a list as long as labels ({len(labels)}), got {scores!r:.80}")
    if _not_of(NUMBERS, scores) or min(scores, default=0) < 0 or max(scores, default=0) > 1:
        raise DataError(f"{where()}: a score must be a number in [0, 1], got {scores!r:.80}")
    tokens, labels, scores = tuple(tokens), tuple(labels), tuple(map(float, scores))
    # (1,) and (1.0,) are equal keys, so scores are kept apart from labels
    scores = shared.setdefault(("scores", scores), scores)
    return VQARecord(shared[path], shared.setdefault(tokens, tokens), shared.setdefault(labels, labels), scores, qid)


def _not_of(kinds: frozenset[type], values: Any) -> bool:
    """Whether this is anything but a list of these types (true and false, which count as int elsewhere, are not)."""
    return type(values) is not list or not kinds.issuperset(map(type, values))


def _out_of_range(key: str, values: Any, limit: int | None, of: str) -> str:
    if _not_of(ONLY_INT, values):
        return f"{key} must be a list of whole numbers, got {values!r:.80}"
    bound = f" and below {limit}, the size of the {of}" if limit else ""
    bad = next(value for value in values if value < 0 or (limit and value >= limit))
    return f"{key} must be at least 0{bound}, got {bad}: {ADVICE}, or give the matching file"


def read_vqav2_split(
    data_path: str | Path,
    split: str,
    num_answers: int | None = None,
    vocab_size: int | None = None,
    with_unlabelled: bool = False,
) -> list[VQARecord]:
    """Records of a split: train is train + trainable_val, val is rest_val, val2014 all of val.

    Args:
        data_path: folder of the index files.
        split: a key of ``SPLIT_FILES``.
        num_answers: see ``read_vqa_index``.
        vocab_size: see ``read_vqa_index``.
        with_unlabelled: for val and val2014, add the questions without a known answer (for the official accuracy).

    Raises:
        DataError: unknown split, and as ``read_vqa_index``; also if two files share a question id.
    """
    if split not in SPLIT_FILES:
        raise DataError(f"unknown split {split!r}: choose from {', '.join(SPLIT_FILES)}")
    names = SPLIT_FILES[split]
    if with_unlabelled and split in UNLABELLED_FILES:
        names += (UNLABELLED_FILES[split],)
    parts = [
        read_vqa_index(Path(data_path) / name, num_answers, vocab_size, split == "train", name in MAY_BE_EMPTY)
        for name in names
    ]
    records = list(chain.from_iterable(parts))
    if len({record.question_id for record in records}) < len(records):
        raise DataError(f"the files {', '.join(names)} in {data_path} share question ids: {ADVICE}")
    return records
