"""What the two schemas of one's own data, questions and captions, have in common."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import iterate_jsonl


@dataclass(frozen=True)
class OwnSchema:
    """What a line of a file of one's own may hold.

    Attributes:
        what: a line stands for, with its article.
        example: of a line.
        keys: that it may have.
        id_key: the one of them that numbers it.
    """

    what: str
    example: str
    keys: frozenset[str]
    id_key: str

    def lines(self, path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """(file and line, object) for each line of a file.

        Raises:
            DataError: as ``iterate_jsonl``.
        """
        for number, row in iterate_jsonl(path, advice=f"write one line {self.what}, such as {self.example}"):
            yield f"{path}:{number}", row

    def check_keys(self, row: dict[str, Any], where: str) -> None:
        """Raise DataError for a key that the schema has not."""
        unknown = sorted(row.keys() - self.keys)
        if unknown:
            raise DataError(
                f"{where}: unknown key {unknown[0]!r}; a line is {self.example}, with an optional {self.id_key}"
            )

    def numbered(self, lines: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any], int]]:
        """(file and line, object, id) for each line; those without ids get running numbers from 0.

        Args:
            lines: of one file or of several, as ``lines`` gives them.

        Raises:
            DataError: an unknown key, an id that is no whole number, or ids on some lines only; the line is named.
        """
        have_ids: bool | None = None
        for count, (where, row) in enumerate(lines):
            self.check_keys(row, where)
            number = row.get(self.id_key)
            has_id = number is not None
            have_ids = has_id if have_ids is None else have_ids
            if has_id != have_ids:
                raise DataError(f"{where}: {self.id_key} must stand on every line or on none")
            if has_id and type(number) is not int:
                raise DataError(f"{where}: {self.id_key} must be a whole number, got {number!r:.80}")
            yield where, row, number if has_id else count


def optional_texts(row: dict[str, Any], key: str, where: str, *, example: str) -> list[str] | None:
    """The texts of ``row[key]``; None where there are none.

    Raises:
        DataError: something else than a list of texts that are not empty.
    """
    texts = row.get(key)
    if texts is None:
        return None
    if type(texts) is not list or not texts or not all(type(text) is str and text.strip() for text in texts):
        raise DataError(
            f'{where}: "{key}" must be a list of texts that are not empty, such as {example}, or left out; '
            f"got {texts!r:.80}"
        )
    return texts
