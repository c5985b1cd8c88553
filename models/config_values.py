"""Values of a published ``config.json``: read with their kind checked, refused by name where not implemented."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from models.errors import ModelError

Kind = Callable[[Any], bool]


def is_positive_int(value: Any) -> bool:
    """A whole number above 0."""
    return type(value) is int and value > 0


def is_int(value: Any) -> bool:
    """A whole number."""
    return type(value) is int


def is_positive_number(value: Any) -> bool:
    """A number above 0."""
    return type(value) in (int, float) and value > 0


def is_fraction(value: Any) -> bool:
    """A number from 0 to below 1."""
    return type(value) in (int, float) and 0 <= value < 1


def is_bool(value: Any) -> bool:
    """True or false."""
    return type(value) is bool


_RULES = {
    is_positive_int: "a whole number above 0",
    is_int: "a whole number",
    is_positive_number: "a number above 0",
    is_fraction: "a number from 0 to below 1",
    is_bool: "true or false",
}


class ConfigTable:
    """One object of a ``config.json``; unknown keys are left alone: such files hold dozens that decide nothing."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """``where`` stands in messages, such as ``config.json: text_config``.

        Raises:
            ModelError: ``values`` is no object.
        """
        if not isinstance(values, Mapping):
            raise ModelError(f"{where} must be an object of keys and values, got {values!r:.80}")
        self.values, self.where = values, where

    def read(self, key: str, kind: Kind, default: Any) -> Any:
        """The value of a key, or the default where it is absent.

        Raises:
            ModelError: it is not of this kind.
        """
        value = self.values.get(key, default)
        if not kind(value):
            raise ModelError(f"{self.where}: {key} must be {_RULES[kind]}, got {value!r:.80}")
        return value

    def need(self, key: str, allowed: Collection[Any], default: Any) -> Any:
        """The value of a key of which only some values are implemented.

        Args:
            key: its name.
            allowed: implemented values.
            default: what an absent key means.

        Raises:
            ModelError: another value.
        """
        value = self.values.get(key, default)
        if value not in allowed:
            shown = " or ".join(repr(choice) for choice in allowed)
            said = repr(value)[:80] if key in self.values else f"absent, which means {default!r}"
            raise ModelError(f"{self.where}: {key} {said} is not implemented here, only {shown}")
        return value

    def need_even_heads(self, width: int, num_heads: int) -> None:
        """Refuse a width that its heads do not divide."""
        if width % num_heads:
            raise ModelError(f"{self.where}: hidden_size {width} is not a multiple of num_attention_heads {num_heads}")
