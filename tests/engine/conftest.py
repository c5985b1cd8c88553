"""Runs under DeepSpeed that several test files look at, made once a session."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import zero_runs
from tests.helpers import run_in_processes


def _run(function: Any, world_size: int, folder: Path, result: str) -> dict[Any, Any]:
    run_in_processes(function, world_size, str(folder))
    return torch.load(folder / result, weights_only=True)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``compare_and_poison`` found in two processes."""
    return _run(zero_runs.compare_and_poison, 2, tmp_path_factory.mktemp("compared"), "found.pth")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and findings of ``save_and_resume`` in two processes; do not change the folder."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, _run(zero_runs.save_and_resume, 2, folder, "found.pth")


@pytest.fixture(scope="session")
def alone(saved: tuple[Path, dict[str, Any]]) -> dict[Any, Any]:
    """What one process says to the checkpoints of two."""
    return _run(zero_runs.resume_alone, 1, saved[0], "alone.pth")
