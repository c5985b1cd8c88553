"""The error that a network raises for a value that its user can mend (programs end with exit code 2)."""


class ModelError(ValueError):
    """A size, name or checkpoint does not fit; the message has the value, the rule and the way out, in one line."""
