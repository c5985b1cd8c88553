"""The errors of the engine: wrong settings end a program with exit code 2, run-time failures with 1."""

import signal


class EngineError(ValueError):
    """A setting, checkpoint or environment is unusable; the message has the value, the rule and the way out."""

    agreed = False  # True where all processes raise it together, so that one of them need say it


class RunError(RuntimeError):
    """Training or evaluation cannot go on (full disk, lost rank, non-finite loss); says what was saved and where."""

    agreed = False


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """A signal asked the program to stop, and all processes have agreed to; the exit code is 128 + its number."""

    def __init__(self, number: int, done: str) -> None:
        """``number`` of the signal; ``done``: what has been saved and how to go on."""
        super().__init__(f"stopped by {signal.Signals(number).name}: {done}")
        self.number = number
        self.exit_code = 128 + number
