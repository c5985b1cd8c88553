import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from engine import folder_lock
from engine.errors import EngineError
from engine.folder_lock import hold, release, released_at_the_end
from tests.helpers import run_program
from tests.paths import ROOT

HOLDS_UNTIL_KILLED = """
import os, sys, time
from pathlib import Path
from engine.folder_lock import hold
folder = Path(sys.argv[1])
hold(folder / ".run.lock", folder)
child = os.fork()  # as a loader process is: it lives on when its parent is killed
if child:
    print(child, flush=True)
time.sleep(600)
"""

REFUSED = (
    r"another run \(process {} on {}, since [-\d]+ [:\d]+\) writes into {}: wait for it, stop it, or choose another"
)


class Holder:
    """Another process that holds the lock of a folder, and a child that it forked while it did."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", HOLDS_UNTIL_KILLED, str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.child = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.kill()
        os.kill(self.child, signal.SIGKILL)
        self.process.stdout.close()


@pytest.fixture
def holder(tmp_path):
    holder = Holder(tmp_path)
    yield holder
    holder.end()


def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path, holder):
    wanted = REFUSED.format(holder.process.pid, socket.gethostname(), tmp_path)
    for _ in range(2):  # having looked, it has not taken anything away
        with pytest.raises(EngineError, match=wanted):
            hold(tmp_path / ".run.lock", tmp_path)
    assert holder.process.poll() is None


def test_a_killed_process_gives_its_lock_back_though_its_child_lives_on(tmp_path, holder):
    holder.kill()
    os.kill(holder.child, 0)  # it is there
    assert (tmp_path / ".run.lock").exists()
    with released_at_the_end():
        hold(tmp_path / ".run.lock", tmp_path)
        assert (tmp_path / ".run.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def can_be_taken_elsewhere(folder: Path) -> bool:
    code = "import sys; from pathlib import Path; from engine.folder_lock import hold; f = Path(sys.argv[1])\n"
    code += "try: hold(f / '.run.lock', f)\nexcept Exception as error: sys.exit(str(error))"
    done = run_program("-c", code, str(folder))
    assert done.returncode == 0 or "another run" in done.stderr, done.stderr
    return done.returncode == 0


def test_one_process_holds_it_once_and_gives_it_back_also_after_an_error(tmp_path):
    path = tmp_path / ".run.lock"

    @released_at_the_end()
    def main():
        hold(path, tmp_path)
        hold(path, tmp_path)
        assert not can_be_taken_elsewhere(tmp_path)
        raise KeyError("a bug")

    for _ in range(2):
        with pytest.raises(KeyError):
            main()
        assert not path.exists()
    assert can_be_taken_elsewhere(tmp_path)


def test_a_forked_child_does_not_give_back_what_is_its_parent_s(tmp_path):
    path = tmp_path / ".run.lock"
    with released_at_the_end():
        hold(path, tmp_path)
        child = os.fork()
        if child == 0:
            with released_at_the_end():
                pass
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.exists()
        assert not can_be_taken_elsewhere(tmp_path)
    release(path)  # nothing is held any more


def test_a_lock_whose_file_was_removed_just_then_is_taken_on_the_new_file(tmp_path, monkeypatch):
    import fcntl

    path = tmp_path / ".run.lock"
    lockf, taken = fcntl.lockf, []

    def lock_after_the_holder_left(handle, how):
        if not taken:
            path.unlink()
        taken.append(handle)
        lockf(handle, how)

    monkeypatch.setattr(fcntl, "lockf", lock_after_the_holder_left)
    with released_at_the_end():
        hold(path, tmp_path)
        assert len(taken) == 2
        assert not can_be_taken_elsewhere(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    hold(tmp_path / ".run.lock", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: {tmp_path} cannot be locked here ({os.strerror(number)}): let no other run write into it meanwhile"
    )
    assert not folder_lock._held
    assert list(tmp_path.iterdir()) == []


def test_another_runs_lock_in_a_folder_that_was_made_anew_is_left_alone(tmp_path):
    path = tmp_path / ".run.lock"
    hold(path, tmp_path)
    path.unlink()
    path.write_text("process 1 on another machine")
    release(path)
    assert path.read_text() == "process 1 on another machine"


def test_a_lock_file_of_another_machine_stays_where_locking_fails_for_a_moment(tmp_path, monkeypatch, capsys):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / ".run.lock"
    path.write_text("process 1 on another machine")
    monkeypatch.setattr("fcntl.lockf", refuse)
    hold(path, tmp_path)
    assert "cannot be locked here" in capsys.readouterr().err
    assert path.read_text() == "process 1 on another machine"
