"""Checks of the values of config files: the value as it is meant, or a ValueError that says what it must be.

A value comes from a file, or as text from the command line.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

Check = Callable[[Any], Any]


def whole(low: int) -> Check:
    """A whole number of at least ``low`` and below 2**63, which torch's generators and tensors take."""

    def check(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = int(value)
            except ValueError:
                raise ValueError("a whole number") from None
        if type(value) is not int or value < low:
            raise ValueError(f"a whole number of at least {low}")
        if value >= 2**63:
            raise ValueError("a whole number below 2**63")
        return value

    return check


def real(low: float, high: float = float("inf")) -> Check:
    """A finite number of at least ``low``, and at most ``high``."""

    def check(value: Any) -> float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError("a number") from None
        if type(value) not in (int, float) or not low <= value <= high or value == float("inf"):
            raise ValueError(
                f"a number of at least {low:g}" + (f" and at most {high:g}" if high < float("inf") else "")
            )
        return value

    return check


def truth(value: Any) -> bool:
    """True or false."""
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def text(value: Any) -> str:
    """A text; nothing at all, as of KEY= on the command line, is none."""
    if value is None:
        raise ValueError('a text (write "" for an empty text, \'""\' in a shell)')
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def one_of(*choices: Any) -> Check:
    """One of some values."""

    def check(value: Any) -> Any:
        # true is no 1
        if value not in choices or isinstance(value, bool) != isinstance(choices[choices.index(value)], bool):
            raise ValueError(" or ".join(map(repr, choices)))
        return value

    return check


def recompute(value: Any) -> str:
    """What ``models.recompute`` reads, or auto."""
    if text(value) in ("none", "full", "auto"):
        return value
    from models.errors import ModelError
    from models.recompute import Recompute  # torch, for which nobody waits without need

    try:
        return str(Recompute.parse(value))
    except ModelError:
        raise ValueError("none, full, auto, or every_K with K of 2 or more") from None


def list_of(item: Check, length: int | None = None) -> Check:
    """A list whose entries pass ``item``."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise ValueError("a list" + (f" of {length}" if length is not None else ""))
        return [item(entry) for entry in value]

    return check


def unknown_key(key: Any, known: Iterable[str]) -> str:
    """What to say of a key that is not known."""
    near = difflib.get_close_matches(str(key), list(known), n=1)
    return f"unknown key {key!r:.80}: " + (f"did you mean {near[0]}?" if near else "leave it out")
