"""docs/faults.md lists every fault case with a test that is there."""

import re
from collections import Counter
from pathlib import Path

from tests.citations import Citation, absent, absent_cases, citations_in
from tests.paths import ROOT

PAGE = ROOT / "docs/faults.md"
# cases per section: 60 kills and signals, 34 resumes, 20 kinds of images, ...
NUM_CASES = {"A": 60, "B": 34, "C": 20, "D": 20, "E": 18, "F": 8, "G": 15, "H": 9, "I": 9, "J": 6}
NOT_HERE = re.compile(r"does not apply: \S.*")  # in place of a test, with the reason


def cases(page: Path = PAGE) -> dict[str, list[str]]:
    """Cells of each row that begins with a case number, such as ``C7``."""
    rows = re.findall(r"^\| ([A-J]\d+) \| (.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    numbers = [number for number, _ in rows]
    assert len(numbers) == len(set(numbers)), [number for number, count in Counter(numbers).items() if count > 1]
    return {number: row.split(" | ") for number, row in rows}


def test_each_section_has_all_its_cases_numbered_from_one():
    assert sum(NUM_CASES.values()) == 199
    wanted = [f"{letter}{number}" for letter, count in NUM_CASES.items() for number in range(1, count + 1)]
    assert list(cases()) == wanted


def test_every_case_cites_a_test_that_is_there():
    for number, (*_, test) in cases().items():
        assert NOT_HERE.fullmatch(test) or citations_in(test), number
    assert absent(citations_in(PAGE.read_text(encoding="utf-8"))) == []


def test_every_cited_case_is_collected():
    assert absent_cases(citations_in(PAGE.read_text(encoding="utf-8"))) == []


def test_a_citation_of_what_is_not_there_is_noticed():
    here = "tests/test_faults.py"
    text = f"`{here}::test_gone`, `tests/gone.py::test_x`, `{here}::test_every_cited_case_is_collected[none]`"
    assert absent(citations_in(text)) == [f"{here}::test_gone", "tests/gone.py::test_x"]
    of_no_case = Citation(here, "test_every_cited_case_is_collected", "none")
    assert citations_in(text)[2] == of_no_case
    assert absent_cases([of_no_case]) == [str(of_no_case)]
