"""Where the recorded numbers of the original implementations lie, and how the parity tests read them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.paths import FIXTURES

DEFAULT_FOLDER = FIXTURES


def fixture_path(name: str) -> Path:
    """Path of a recorded file; a missing one fails in the default folder and skips in a folder of one's own."""
    folder = os.environ.get("PLAINVL_FIXTURES")
    path = (Path(folder) if folder else DEFAULT_FOLDER) / name
    if not path.exists():
        if folder:
            pytest.skip(f"{name} is not among the recordings in PLAINVL_FIXTURES={folder}")
        pytest.fail(f"the recording tests/fixtures/{name} is missing")
    return path


def load_fixture(name: str) -> Any:
    """Content of a recorded ``.pt`` (tensors and plain values) or ``.json`` file."""
    path = fixture_path(name)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return torch.load(path, map_location="cpu", weights_only=True)
