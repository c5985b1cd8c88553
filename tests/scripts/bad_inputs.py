"""Tables of bad inputs, and what a call with one must do: leave an exit code and one line that says what is wrong."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from scripts.program import run

ERROR_LINE = re.compile(r"\S+: error: \S.*")


class BadInputs(dict[str, tuple[Callable[..., Any], str]]):
    """By name a function that spoils something and returns flags, and what the error line must say."""

    def register(self, message: str) -> Callable:
        """Decorate the function with the message, a regular expression."""

        def add(spoil: Callable[..., Any]) -> Callable[..., Any]:
            assert spoil.__name__ not in self, f"two bad inputs are called {spoil.__name__}"
            self[spoil.__name__] = (spoil, message)
            return spoil

        return add


def failure(capsys: pytest.CaptureFixture, argv: list[str], call: Callable[..., Any]) -> tuple[int, str]:
    """Exit code and last line on stderr of a call that must fail, checked to be its one error line, no traceback."""
    capsys.readouterr()
    try:  # unlike pytest.raises, this lets go of the traceback, and with it of the loader's processes
        run(lambda: call(*argv))
    except SystemExit as left:
        code = left.code
    else:
        pytest.fail(f"the program did not fail: {' '.join(map(str, argv))}")
    return code, the_error_line(capsys.readouterr().err)


def the_error_line(stderr: str) -> str:
    """The last line; it must be the only one that is an error."""
    lines = stderr.splitlines()
    assert lines, "nothing on stderr"
    assert ERROR_LINE.fullmatch(lines[-1]), stderr
    assert not [line for line in lines[:-1] if "error" in line.lower() or "Traceback" in line], stderr
    return lines[-1]
