"""docs/troubleshooting.md answers every complaint, and names what shows it."""

import re

from tests.citations import absent, absent_cases, citations_in
from tests.paths import ROOT

PAGE = ROOT / "docs/troubleshooting.md"


def rows(text: str) -> list[list[str]]:
    """Cells of the tables, their heads and rules left out."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [line.split(" | ") for line in lines if not line.startswith("what users report | ")]


def test_every_complaint_has_an_answer_and_something_to_look_at():
    table = rows(PAGE.read_text(encoding="utf-8"))
    assert len(table) > 80
    for row in table:
        assert len(row) == 3, row
        assert row[1].endswith((".", ")")), row
        assert re.search(r"`[^`]+`|\]\([^)]+\)", row[2]), row


def test_no_complaint_stands_twice_in_a_table():
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        complaints = [row[0] for row in rows(section)]
        assert len(complaints) == len(set(complaints)), section[:40]


def test_every_cited_test_and_case_is_there():
    cited = citations_in(PAGE.read_text(encoding="utf-8"))
    assert absent(cited) == []
    assert absent_cases(cited) == []


def test_every_page_of_a_family_leads_here():
    for name in ("beit3", "beit3_captioning", "vle", "vlbert", "llava"):
        page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
        assert re.search(r"\]\(troubleshooting\.md#[\w-]+\)", page), name
