"""What the two schemas of one's own data, questions and captions, have in common."""

from typing import Any

from data.errors import DataError


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
