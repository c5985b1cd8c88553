"""The picture page of captioning: what the model wrote, and what people did."""

import html
from collections import Counter
from typing import TypedDict

from scripts.report.page import (
    TableRow,
    assemble_page,
    card_attributes,
    controls_html,
    draw_cards,
    picture_html,
    select_html,
    summary_html,
)

THIRDS = ("best third", "middle third", "worst third")  # by CIDEr, of the cards of a page
_CLASSES = dict(zip(THIRDS, ("right", "partly", "wrong"), strict=True))  # of the page's style


class Row(TypedDict, total=False):
    """One image of the page; ``domain`` may be missing."""

    image: str | bytes  # path, or the bytes of an image file
    caption: str
    references: list[str]
    cider: float  # a fraction
    domain: str


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
) -> str:
    """The page as HTML text, worst captions first, the same for the same arguments.

    Args:
        rows: the images; if more than ``max_cards``, that many are drawn with ``seed``.
        title: heading, and the title of the browser's tab.
        columns: heads of the score columns of the summary, the model first.
        table: lines of the summary, in order.
        subtitle: one line below the heading.
        curves_png: a plot to show below the summary.
        max_cards: cards on the page.
        seed: of the draw.

    Raises:
        DataError: an image that is missing or cannot be decoded.
    """
    shown, note = draw_cards(rows, max_cards, seed, "images")
    shown = sorted(shown, key=lambda row: row["cider"])
    thirds = [THIRDS[2 - 3 * place // len(shown)] for place in range(len(shown))]
    domains = select_html("type", "domain", Counter(row["domain"] for row in shown if row.get("domain")))
    counts = Counter(thirds)
    return assemble_page(
        list(zip(shown, thirds, strict=True)),
        _card,
        title=title,
        subtitle=subtitle,
        table=summary_html(columns, table, caption="Scores, times 100", head="Metric"),
        controls=controls_html(
            {name: counts[name] for name in THIRDS if counts[name]}, domains, "captions", len(shown)
        ),
        note=note,
        curves_png=curves_png,
    )


def _card(row_and_third: tuple[Row, str], image_bytes: int) -> str:
    row, third = row_and_third
    texts = " ".join([row["caption"], *row["references"]]).lower()
    data = card_attributes({"verdict": third, "type": row.get("domain", ""), "kind": "", "text": texts})
    people = "".join(f"<li><span>{html.escape(text)}</span></li>" for text in row["references"])
    tags = f'<p class="tags">{html.escape(row["domain"])}</p>' if row.get("domain") else ""
    return (
        f'<article class="{_CLASSES[third]}"{data}>{picture_html(row["image"], image_bytes)}'
        f'<div class="body"><p class="mark">CIDEr {100 * row["cider"]:.0f}</p>'
        f"<h2>{html.escape(row['caption']) or '(no words)'}</h2>"
        f'<p class="truth">people wrote</p><ol>{people}</ol>{tags}</div></article>'
    )
