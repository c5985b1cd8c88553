"""The frame of a picture page: one HTML file with a table, a plot, filters and cards.

Everything is inside the file: pictures as data URIs, style and script inline, and a policy that forbids the browser to
fetch anything. All texts come from data files and are escaped.
"""

import base64
import html
import io
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from data.errors import DataError
from scripts.report.page_style import SCRIPT, STYLE

CRISP_BELOW_PX = 200  # smaller pictures are enlarged pixel by pixel, larger ones smoothly
CARD_HTML_BYTES = 2_600  # room for a card without its picture
MAX_BYTES = 3_000_000  # of the page


class TableRow(TypedDict):
    """One line of the summary: fractions, None where a column has no value."""

    name: str
    group: str
    count: int
    scores: list[float | None]


def draw_cards(rows: list[Any], max_cards: int, seed: int, what: str) -> tuple[list[Any], str]:
    """At most so many of the rows, drawn with ``seed`` and in their order; and a remark if these are not all."""
    if len(rows) <= max_cards:
        return rows, ""
    places = sorted(random.Random(seed).sample(range(len(rows)), max_cards))
    return [rows[place] for place in places], f"{max_cards:,} of {len(rows):,} {what}, drawn with seed {seed}"


def assemble_page(
    rows: Sequence[Any],
    card: Callable[[Any, int], str],
    *,
    title: str,
    subtitle: str,
    table: str,
    controls: str,
    note: str,
    curves_png: bytes | None,
    max_bytes: int = MAX_BYTES,
) -> str:
    """The page as HTML text.

    Args:
        rows: what the cards show.
        card: row and room in bytes for its picture → HTML.
        title: heading, and the title of the browser's tab.
        subtitle: one line below the heading, or "".
        table: HTML of the summary.
        controls: HTML of the filters.
        note: a remark above the cards, or "".
        curves_png: a plot to show below the summary.
        max_bytes: pictures are shrunk until the page is smaller.
    """
    fixed = len(STYLE) + len(SCRIPT) + 4 * len(curves_png or b"") // 3 + 10_000
    image_bytes = int(0.75 * ((max_bytes - fixed) / max(len(rows), 1) - CARD_HTML_BYTES))
    plot = ""
    if curves_png:
        picture = f'<img alt="Training curves" src="{_data_uri(curves_png, "png")}">'
        plot = f'<figure class="curves" tabindex="0">{picture}</figure>'
    return _PAGE.format(
        title=html.escape(title),
        subtitle=f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else "",
        style=STYLE,
        script=SCRIPT,
        table=table,
        plot=plot,
        controls=controls,
        note=f'<p class="note">{note}</p>' if note else "",
        cards="\n".join(card(row, image_bytes) for row in rows),
    )


def summary_html(columns: list[str], table: list[TableRow], *, caption: str, head: str) -> str:
    """The summary as a table; ``head`` is over its first column."""
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in columns)
    lines, group = [], None
    for row in table:
        cells = "".join(f"<td>{_percent(score)}</td>" for score in row["scores"])
        start = ' class="block"' if row["group"] != group and group is not None else ""
        group = row["group"]
        name = html.escape(row["name"])
        lines.append(f'<tr{start}><th scope="row">{name}</th><td class="count">{row["count"]:,}</td>{cells}</tr>')
    body = "\n".join(lines)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Scores"><table>'
        f'<caption>{html.escape(caption)}</caption><thead><tr><th scope="col">{html.escape(head)}</th>'
        f'<th scope="col">Number</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"


def controls_html(verdicts: dict[str, int], selects: str, searched: str, total: int) -> str:
    """Buttons for the verdicts that occur, drop-down lists, and a search field."""
    buttons = "".join(
        f'<button type="button" data-verdict="{name}" aria-pressed="{str(name == "").lower()}">{name or "all"}'
        f" <span>{number}</span></button>"
        for name, number in {"": total, **verdicts}.items()
    )
    search = f'<input type="search" id="search" placeholder="search texts" aria-label="Search {searched}">'
    return (
        f'<div class="controls" role="group" aria-label="Filter">{buttons}{selects}{search}'
        f'<output id="shown" aria-live="polite">{total:,} shown</output></div>'
    )


def select_html(name: str, label: str, counts: Counter[str]) -> str:
    """A drop-down list of the values there are; empty for fewer than two."""
    if len(counts) < 2:
        return ""
    options = "".join(
        f'<option value="{html.escape(value)}">{html.escape(value)} ({counts[value]})</option>'
        for value in sorted(counts)
    )
    return f'<select id="{name}" aria-label="{label}"><option value="">any {label}</option>{options}</select>'


def card_attributes(values: dict[str, str]) -> str:
    """What the filters read of a card."""
    return "".join(f' data-{key}="{html.escape(value)}"' for key, value in values.items())


def bar_html(text: str, share: float, note: str, *, is_hit: bool) -> str:
    """One line of a list of answers: its words, a bar for a share from 0 to 1, a note; hits stand out."""
    hit = ' class="hit"' if is_hit else ""
    return (
        f'<li{hit}><span>{html.escape(text)}</span><i style="--share:{100 * share:.1f}%"></i>'
        f"<small>{html.escape(note)}</small></li>"
    )


def picture_html(image: str | bytes, image_bytes: int) -> str:
    """An image file (path, or its bytes) inside the page.

    Raises:
        DataError: it is missing or cannot be decoded.
    """
    content, kind, width, height = _shrunk(image, image_bytes)
    crisp = ' class="crisp"' if max(width, height) < CRISP_BELOW_PX else ""
    return f'<img{crisp} alt="" width="{width}" height="{height}" loading="lazy" src="{_data_uri(content, kind)}">'


def _shrunk(image: str | bytes, max_bytes: int) -> tuple[bytes, str, int, int]:
    """(file bytes, format, width, height): the file as it is if it is small enough, else a smaller JPEG."""
    where = "an image" if isinstance(image, bytes) else str(image)
    try:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content))
            picture.load()
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"cannot show {where} ({reason}): check the file and --data_path") from None
    if picture.format in ("JPEG", "PNG") and len(content) <= max_bytes and max(picture.size) <= 512:
        return content, picture.format.lower(), *picture.size
    picture = picture.convert("RGB")
    for side, quality in ((384, 80), (320, 75), (256, 70), (192, 65), (128, 60), (64, 50)):
        picture.thumbnail((side, side))
        smaller = io.BytesIO()
        picture.save(smaller, format="JPEG", quality=quality)
        if smaller.tell() <= max_bytes:
            break
    return smaller.getvalue(), "jpeg", *picture.size


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{subtitle}
</header>
<main>
{table}
{plot}
{controls}
{note}
<section class="cards">
{cards}
</section>
<p class="empty" hidden>Nothing matches.</p>
</main>
<script>{script}</script>
</body>
</html>
"""
