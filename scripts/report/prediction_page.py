"""The picture page of question answering: questions, the model's best answers and what people said."""

import html
from collections import Counter
from typing import TypedDict

from scripts.report.page import (
    MAX_BYTES,
    TableRow,
    assemble_page,
    bar_html,
    card_attributes,
    controls_html,
    draw_cards,
    picture_html,
    select_html,
    summary_html,
)

SIGNS = {"right": "✓", "partly right": "≈", "wrong": "✗"}  # by verdict
MAX_TOP = 5
RIGHT_FROM = 0.85  # a score of 0.9 means that at least three of ten people said so


class Row(TypedDict, total=False):
    """One question of the page; ``kind`` and ``top`` may be missing."""

    image: str | bytes  # path, or the bytes of an image file
    question: str
    prediction: str
    top: list[tuple[str, float]]  # answers and probabilities, best first
    truth: str
    answers: list[str]  # what people said
    score: float  # official accuracy of the prediction, 0 to 1
    answer_type: str
    kind: str


def render_page(
    rows: list[Row],
    *,
    title: str,
    columns: list[str],
    table: list[TableRow],
    subtitle: str = "",
    curves_png: bytes | None = None,
    max_cards: int = 200,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The page as HTML text, the same for the same arguments.

    Args:
        rows: the questions; if more than ``max_cards``, that many are drawn with ``seed`` and shown in order.
        title: heading, and the title of the browser's tab.
        columns: heads of the score columns of the summary, the model first.
        table: lines of the summary, in order; a line whose ``group`` differs from the one before starts a block.
        subtitle: one line below the heading.
        curves_png: a plot to show below the summary.
        max_cards: cards on the page.
        seed: of the draw.
        max_bytes: pictures are shrunk until the page is smaller.

    Raises:
        DataError: an image that is missing or cannot be decoded.
    """
    shown, note = draw_cards(rows, max_cards, seed, "questions")
    return assemble_page(
        shown,
        _card,
        title=title,
        subtitle=subtitle,
        table=summary_html(columns, table, caption="Accuracy in %", head="Questions"),
        controls=_controls(shown),
        note=note,
        curves_png=curves_png,
        max_bytes=max_bytes,
    )


def verdict(score: float) -> str:
    """``right``, ``partly right`` (some people agree) or ``wrong``."""
    if score >= RIGHT_FROM:
        return "right"
    return "partly right" if score > 0 else "wrong"


def _controls(rows: list[Row]) -> str:
    counts = Counter(verdict(row["score"]) for row in rows)
    verdicts = {name: counts[name] for name in SIGNS if counts[name]}
    types = select_html("type", "answer type", Counter(row["answer_type"] for row in rows))
    kinds = select_html("kind", "kind", Counter(row["kind"] for row in rows if row.get("kind")))
    return controls_html(verdicts, types + kinds, "questions and answers", len(rows))


def _card(row: Row, image_bytes: int) -> str:
    mark, top = verdict(row["score"]), list(row.get("top") or [])[:MAX_TOP]
    said = Counter(row["answers"])
    score = f" {row['score']:.1f}" if mark == "partly right" else ""
    tags = [row["answer_type"], row.get("kind") or ""]
    texts = " ".join([row["question"], row["prediction"], row["truth"], *said, *(answer for answer, _ in top)]).lower()
    attributes = {"verdict": mark, "type": tags[0], "kind": tags[1], "text": texts}
    data = card_attributes(attributes)
    bars = "\n".join(_bar(answer, share, answer == row["truth"] or said[answer] >= 3) for answer, share in top)
    if not top:
        bars = f'<li class="only"><span>{html.escape(row["prediction"])}</span></li>'
    picture = picture_html(row["image"], image_bytes)
    return (
        f'<article class="{mark.split()[0]}"{data}>{picture}'
        f'<div class="body"><p class="mark">{SIGNS[mark]} {mark}{score}</p><h2>{html.escape(row["question"])}</h2>'
        f'<ol>{bars}</ol><p class="truth said">{_people(row["truth"], said)}</p>'
        f'<p class="tags">{" · ".join(html.escape(tag) for tag in tags if tag)}</p></div></article>'
    )


def _people(truth: str, said: Counter[str]) -> str:
    others = "".join(f", {html.escape(answer)} ×{n}" for answer, n in said.most_common(6) if answer != truth)
    return f"<b>{html.escape(truth)}</b> <span>×{said[truth]}{others}</span>"


def _bar(answer: str, share: float, is_good: bool) -> str:
    share = min(max(share, 0.0), 1.0)
    note = f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "<1 %"
    return bar_html(answer, share, note, is_hit=is_good)
