"""The picture page of VizWiz: questions, the model's free answers, and what ten people said."""

import html
from collections import Counter
from typing import NamedTuple, TypedDict

from scripts.report.page import (
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
from scripts.report.prediction_page import SIGNS, verdict

ANSWERED, UNANSWERABLE = "answered", "unanswerable"  # verdicts where there is no score


class Said(NamedTuple):
    """An answer, how many people gave it, and whether it is the model's too."""

    text: str
    count: int
    is_hit: bool


class TextRow(NamedTuple):
    """One line of the table of answers: the group (such as ``longest``), an answer, how often, a question to it."""

    group: str
    answer: str
    count: int
    question: str


class Row(TypedDict, total=False):
    """One question of the page; all from ``other`` on may be missing."""

    image: str | bytes  # path, or the bytes of an image file
    name: str
    question: str
    prediction: str
    is_unanswerable: bool  # the prediction says so
    other: str  # the answer of the model that is compared
    comparison: str
    people: list[Said]
    score: float  # course accuracy of the prediction, 0 to 1
    other_score: float
    answer_type: str


def render_page(
    rows: list[Row],
    *,
    title: str,
    columns: list[str],
    table: list[TableRow],
    texts: list[TextRow],
    other_name: str = "",
    subtitle: str = "",
    curves_png: bytes | None = None,
    max_cards: int = 200,
    seed: int = 0,
    only_worst: bool = False,
) -> str:
    """The page as HTML text, worst answers first if they have scores, the same for the same arguments.

    Args:
        rows: the questions, all with a score or none.
        title: heading, and the title of the browser's tab.
        columns: heads of the score columns of the summary, the model first.
        table: lines of the summary, in order.
        texts: lines of the table of answers, in order.
        other_name: how the compared model is called on the cards.
        subtitle: one line below the heading.
        curves_png: a plot to show below the summary.
        max_cards: cards on the page; of more rows that many are drawn.
        seed: of the draw.
        only_worst: take the lowest scores in place of a draw.

    Raises:
        DataError: an image that is missing or cannot be decoded.
    """
    is_scored = all("score" in row for row in rows)
    ordered = sorted(rows, key=lambda row: row["score"]) if is_scored else rows  # equal ones stay in order
    if only_worst and len(rows) > max_cards:
        shown, note = ordered[:max_cards], f"the {max_cards:,} lowest scores of {len(rows):,} questions"
    else:
        shown, note = draw_cards(ordered, max_cards, seed, "questions")
    counts = Counter(map(_verdict, shown))
    verdicts = {name: counts[name] for name in (*SIGNS, ANSWERED, UNANSWERABLE) if counts[name]}
    types = select_html("type", "answer type", Counter(row["answer_type"] for row in shown if row.get("answer_type")))
    kinds = select_html("kind", "comparison", Counter(row["comparison"] for row in shown if row.get("comparison")))
    caption = "Accuracy of the course (people who agree / 3, one of ten left out) and shares, in %"
    return assemble_page(
        shown,
        lambda row, image_bytes: _card(row, other_name, image_bytes),
        title=title,
        subtitle=subtitle,
        table=summary_html(columns, table, caption=caption if is_scored else "Shares in %", head="Questions")
        + _texts_html(texts),
        controls=controls_html(verdicts, types + kinds, "questions and answers", len(shown)),
        note=note,
        curves_png=curves_png,
    )


def _verdict(row: Row) -> str:
    if "score" in row:
        return verdict(row["score"])
    return UNANSWERABLE if row["is_unanswerable"] else ANSWERED


def _texts_html(texts: list[TextRow]) -> str:
    lines, group = [], None
    for row in texts:
        start = ' class="block"' if row.group != group and group is not None else ""
        head, group = ("" if row.group == group else row.group), row.group
        cells = f"<td>{_shown(row.answer)}</td><td>{row.count:,}</td><td>{html.escape(row.question)}</td>"
        lines.append(f'<tr{start}><th scope="row">{html.escape(head)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("", "Answer", "Times", "To a question such as"))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Answers"><table class="texts">'
        f"<caption>The model's answers</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def _shown(answer: str) -> str:
    return html.escape(_words(answer))


def _words(answer: str) -> str:
    return answer or "(no words)"


def _card(row: Row, other_name: str, image_bytes: int) -> str:
    mark = _verdict(row)
    people, other = row.get("people") or [], row.get("other")
    texts = " ".join([row["name"], row["question"], row["prediction"], other or "", *(said.text for said in people)])
    values = {"verdict": mark, "type": row.get("answer_type", ""), "kind": row.get("comparison", "")}
    data = card_attributes({**values, "text": texts.lower()})
    head, css = "", ""
    if "score" in row:
        head = f'<p class="mark">{SIGNS[mark]} {mark} {row["score"]:.1f}</p>'
        css = f' class="scored {mark.split()[0]}"'
    compared = ""
    if other is not None:
        score = f" <span>{row['other_score']:.1f}</span>" if "other_score" in row else ""
        compared = f'<p class="answer other"><span>{html.escape(other_name)}:</span> {_shown(other)}{score}</p>'
    total = sum(said.count for said in people)
    bars = "".join(_bar(said, total) for said in people)
    crowd = f'<p class="truth">people said</p><ol>{bars}</ol>' if people else ""
    tags = " · ".join(filter(None, (row["name"], row.get("answer_type"))))
    return (
        f'<article{css}{data}>{picture_html(row["image"], image_bytes)}<div class="body">{head}'
        f"<h2>{html.escape(row['question'])}</h2>"
        f'<p class="answer"><span>model:</span> {_shown(row["prediction"])}</p>{compared}{crowd}'
        f'<p class="tags">{html.escape(tags)}</p></div></article>'
    )


def _bar(said: Said, total: int) -> str:
    return bar_html(_words(said.text), said.count / total, f"×{said.count}", is_hit=said.is_hit)
