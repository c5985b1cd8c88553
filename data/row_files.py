"""Row files of VLE (``data/vle_rows.py`` writes them) as records, read from disk when they are asked for.

A file is mapped into memory and indexed once by image; its texts and images never all lie in memory.
"""

import copy
import itertools
import json
import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.files import check_relative, resolve_inside
from data.images import decode_image, load_image
from data.vle_rows import import_pyarrow, rows_file
from data.vqa_index import NUMBERS, ONLY_INT, VQARecord

ADVICE = "run python scripts/write_vqa.py again"
_LISTS = ("questions", "question_id", "answer_labels", "answer_scores")


class Tokenizer(Protocol):
    """Turns questions into ids."""

    def encode_filled(self, text: str, kind: str, where: str) -> list[int]:
        """Ids of a text that must not be empty."""
        ...


class _JSONLines:
    """Rows of a JSON-lines file, by number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                size = path.stat().st_size
                self._content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}): run python scripts/write_vqa.py first") from None
        ends, place = [], 0
        while place < len(self._content):
            end = self._content.find(b"\n", place)
            if end < 0:
                raise DataError(f"{path}: the last line is cut off: {ADVICE}")
            ends.append(end)
            place = end + 1
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, number: int) -> dict[str, Any]:
        start = 0 if number == 0 else int(self._ends[number - 1]) + 1
        try:
            row = json.loads(self._content[start : int(self._ends[number])])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}:{number + 1}: not JSON ({error}): {ADVICE}") from None
        if type(row) is not dict:
            raise DataError(f"{self.path}:{number + 1}: a line must be a JSON object: {ADVICE}")
        return row

    def image_path(self, number: int, row: dict[str, Any]) -> str:
        return check_relative(row.get("image"), f"{self.path}:{number + 1}")


class _ArrowTable:
    """Rows of an Arrow file, by number; the original's files too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        pa = import_pyarrow()
        try:
            self._table = pa.ipc.open_file(pa.memory_map(str(path), "r")).read_all()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror or error}): {ADVICE} with --format arrow") from None
        except pa.ArrowInvalid as error:
            reason = str(error).split("\n")[0]
            raise DataError(f"{path} is not a whole Arrow file ({reason}): {ADVICE} with --format arrow") from None
        missing = [name for name in (*_LISTS, "image") if name not in self._table.column_names]
        if missing:
            raise DataError(f"{path} has no column {missing[0]}: {ADVICE} with --format arrow")
        self._texts = self._table.select(_LISTS)

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        return self._texts.slice(number, 1).to_pylist()[0]

    def image_path(self, number: int, row: dict[str, Any]) -> str:
        return f"{self.path.name}#{number}"

    def image(self, number: int) -> bytes:
        return self._table["image"][number].as_py()


class RowRecords(Sequence):
    """The questions of row files as records, in file order."""

    def __init__(
        self, paths: Iterable[str | Path], tokenizer: Tokenizer, num_answers: int, limit: int | None = None
    ) -> None:
        """Open and check the files.

        Args:
            paths: ``.jsonl`` or ``.arrow`` files; empty ones among several are fine.
            tokenizer: of the model.
            num_answers: labels must be below it.
            limit: take only the first so many questions.

        Raises:
            DataError: a file is missing, broken or empty; a row is malformed or a question id stands twice. File and
                line are named.
        """
        self._paths, self._tokenizer, self._num_answers = [Path(path) for path in paths], tokenizer, num_answers
        self._files = [_ArrowTable(path) if path.suffix == ".arrow" else _JSONLines(path) for path in self._paths]
        firsts, ids = [0], []
        for file in self._files:
            for number in range(len(file)):
                row = self._checked(file, number)
                ids.extend(row["question_id"])
                firsts.append(firsts[-1] + len(row["questions"]))
        names = " and ".join(map(str, self._paths))
        if not ids:
            raise DataError(f"{names}: no question: {ADVICE}")
        self._first = np.array(firsts, dtype=np.int64)  # question number with which each row begins
        self._row_of_file = np.cumsum([0, *map(len, self._files)])
        if len(set(ids)) < len(ids):
            seen: set[int] = set()
            twice = next(index for index in ids if index in seen or seen.add(index))
            raise DataError(f"{names}: question {twice} stands twice: {ADVICE}")
        self._length = len(ids) if limit is None else min(limit, len(ids))

    def __reduce__(self) -> tuple[Any, ...]:
        """Mapped files cannot travel to another process; it opens them itself."""
        return RowRecords, (self._paths, self._tokenizer, self._num_answers, self._length)

    def __len__(self) -> int:
        """Number of questions."""
        return self._length

    def __getitem__(self, index: Any) -> Any:
        """One record; of a slice from the start on such an object, of another slice a list."""
        if isinstance(index, slice):
            places = range(*index.indices(len(self)))
            if places.start or places.step != 1:
                return [self[place] for place in places]
            part = copy.copy(self)
            part._length = len(places)
            return part
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        place = bisect_right(self._first, index) - 1
        file, number = self._locate(place)
        return self._record(file, number, file.row(number), index - int(self._first[place]))

    def __iter__(self) -> Iterator[VQARecord]:
        """All records; each row is read once."""
        return itertools.islice(self._all(), self._length)

    def _all(self) -> Iterator[VQARecord]:
        for file in self._files:
            for number in range(len(file)):
                row = file.row(number)
                for place in range(len(row["questions"])):
                    yield self._record(file, number, row, place)

    def image_paths(self) -> Iterator[str]:
        """Paths of the images that are files of their own."""
        for file in self._files:
            if isinstance(file, _JSONLines):
                for number in range(len(file)):
                    yield file.image_path(number, file.row(number))

    def load_image(self, root: Path, relative: str) -> np.ndarray:
        """(H, W, 3) uint8 of a record's ``image_path``, from a file below ``root`` or out of an Arrow file."""
        name, mark, number = relative.partition("#")
        for file in self._files if mark else ():
            if isinstance(file, _ArrowTable) and file.path.name == name:
                return decode_image(file.image(int(number)), relative)
        return load_image(resolve_inside(root, relative))

    def _locate(self, place: int) -> tuple[Any, int]:
        file = bisect_right(self._row_of_file, place) - 1
        return self._files[file], place - int(self._row_of_file[file])

    def _record(self, file: Any, number: int, row: dict[str, Any], place: int) -> VQARecord:
        where = f"{file.path}:{number + 1}: question {row['question_id'][place]}"
        labelled = bool(row["answer_labels"])
        return VQARecord(
            image_path=file.image_path(number, row),
            tokens=tuple(self._tokenizer.encode_filled(row["questions"][place], "question", where)),
            labels=tuple(row["answer_labels"][place]) if labelled else (),
            scores=tuple(map(float, row["answer_scores"][place])) if labelled else (),
            question_id=row["question_id"][place],
        )

    def _checked(self, file: Any, number: int) -> dict[str, Any]:
        """A row with what its records need."""
        row, where = file.row(number), f"{file.path}:{number + 1}"
        file.image_path(number, row)
        for key in _LISTS:
            if type(row.get(key)) is not list:
                raise DataError(f"{where}: {key} must be a list, got {row.get(key)!r:.80}: {ADVICE}")
        count = len(row["questions"])
        for key in _LISTS[1:]:
            if len(row[key]) != count and (row[key] or key == "question_id"):
                raise DataError(f"{where}: {count} questions, but {len(row[key])} {key}: {ADVICE}")
        if not all(type(text) is str for text in row["questions"]) or not ONLY_INT.issuperset(
            map(type, row["question_id"])
        ):
            raise DataError(f"{where}: questions must be texts, and question_id whole numbers: {ADVICE}")
        for labels, scores in zip(row["answer_labels"], row["answer_scores"], strict=False):
            if type(labels) is not list or type(scores) is not list or len(labels) != len(scores):
                raise DataError(f"{where}: each label needs a score, got {labels!r:.40} {scores!r:.40}: {ADVICE}")
            if not ONLY_INT.issuperset(map(type, labels)) or not NUMBERS.issuperset(map(type, scores)):
                raise DataError(f"{where}: labels must be whole numbers and scores numbers: {ADVICE}")
            if labels and not 0 <= min(labels) <= max(labels) < self._num_answers:
                raise DataError(
                    f"{where}: label {max(labels)} is outside of the {self._num_answers} answers of label2answer.json: "
                    f"{ADVICE}"
                )
            if scores and not 0 <= min(scores) <= max(scores) <= 1:
                raise DataError(f"{where}: a score must lie in [0, 1], got {scores!r:.80}: {ADVICE}")
        return row


def find_rows(folder: str | Path, split: str) -> Path:
    """The row file of a split: JSON lines, else Arrow.

    Raises:
        DataError: neither is there.
    """
    for kind in ("jsonl", "arrow"):
        path = Path(folder) / rows_file(split, kind)
        if path.is_file():
            return path
    raise DataError(
        f"no {rows_file(split, 'jsonl')} (or .arrow) in {folder}: run python scripts/write_vqa.py first, or give "
        "--data_root"
    )
