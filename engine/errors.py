"""The errors of the engine: wrong settings end a program with exit code 2, run-time failures with 1."""


class EngineError(ValueError):
    """A setting, checkpoint or environment is unusable; the message has the value, the rule and the way out."""


class RunError(RuntimeError):
    """Training or evaluation cannot go on (full disk, lost rank, non-finite loss); says what was saved and where."""
