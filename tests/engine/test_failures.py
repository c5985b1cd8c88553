"""engine/failures.py: what of the surroundings failed, in one line."""

import errno

import pytest

from engine.failures import explain


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "process (pid 7) was killed by signal",
        ),
        # its batch was on the way through a socket just then
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "a loader process ended unexpectedly"),
        (OSError(errno.EMFILE, "Too many open files"), "raise the limit"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_failed_and_what_to_do(error, said):
    line = explain(error)
    assert said in line
    assert "\n" not in line


def test_a_bug_is_not_explained_away():
    assert explain(KeyError("x")) is None
    assert explain(RuntimeError("shapes differ")) is None
