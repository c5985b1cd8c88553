"""Tests that a document cites, such as `tests/data/test_files.py::test_nan_is_not_written`, held against the tests.

A citation may name one case of a table: the words in square brackets that pytest prints behind the name.
"""

import re
import subprocess
import sys
from dataclasses import dataclass

from tests.paths import ROOT

_CITATION = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^`]+)\])?`")


@dataclass(frozen=True)
class Citation:
    """One test: its file relative to the root, its function, and the case of its table, if one is named."""

    file: str
    name: str
    case: str | None

    def __str__(self) -> str:
        """As pytest names it."""
        return f"{self.file}::{self.name}" + (f"[{self.case}]" if self.case else "")


def citations_in(text: str) -> list[Citation]:
    """The tests that stand in back-quotes in a text."""
    return [Citation(file, name, case or None) for file, name, case in _CITATION.findall(text)]


def absent(citations: list[Citation]) -> list[str]:
    """Those whose file or function is not there (cases of tables are not looked at)."""
    return [str(citation) for citation in citations if not _is_defined(citation)]


def absent_cases(citations: list[Citation]) -> list[str]:
    """Those that pytest does not collect, cases of tables included; takes as long as importing their files."""
    cited = [citation for citation in citations if citation.case]
    if not cited:
        return []
    files = sorted({citation.file for citation in cited})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    known = set(collected.stdout.splitlines())
    return [str(citation) for citation in cited if str(citation) not in known]


def _is_defined(citation: Citation) -> bool:
    path = ROOT / citation.file
    definition = rf"^def {citation.name}\("
    return path.is_file() and re.search(definition, path.read_text(encoding="utf-8"), re.MULTILINE) is not None
