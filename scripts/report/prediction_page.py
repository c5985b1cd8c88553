"""One HTML file that shows pictures, questions, the model's best answers and what people said.

Everything is inside the file: pictures as data URIs, style and script inline, and a policy that forbids the browser to
fetch anything. All texts come from data files and are escaped.
"""

import base64
import html
import io
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import TypedDict

from PIL import Image

from data.errors import DataError
from scripts.report.page_style import SCRIPT, STYLE

MAX_TOP = 5
CRISP_BELOW_PX = 200  # smaller pictures are enlarged pixel by pixel, larger ones smoothly
CARD_HTML_BYTES = 2_600  # room for a card without its picture
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


class TableRow(TypedDict):
    """One line of the summary: fractions, None where a column has no value."""

    name: str
    group: str
    count: int
    scores: list[float | None]


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
    max_bytes: int = 3_000_000,
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
    shown = rows
    if len(rows) > max_cards:
        shown = [rows[place] for place in sorted(random.Random(seed).sample(range(len(rows)), max_cards))]
    fixed = len(STYLE) + len(SCRIPT) + 4 * len(curves_png or b"") // 3 + 10_000
    image_bytes = int(0.75 * ((max_bytes - fixed) / max(len(shown), 1) - CARD_HTML_BYTES))
    cards = "\n".join(_card(row, image_bytes) for row in shown)
    picked = f"{len(shown):,} of {len(rows):,} questions, drawn with seed {seed}" if shown is not rows else ""
    plot = ""
    if curves_png:
        picture = f'<img alt="Training loss and accuracy" src="{_data_uri(curves_png, "png")}">'
        plot = f'<figure class="curves" tabindex="0">{picture}</figure>'
    return _PAGE.format(
        title=html.escape(title),
        subtitle=f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else "",
        style=STYLE,
        script=SCRIPT,
        table=_summary(columns, table),
        plot=plot,
        controls=_controls(shown),
        note=f'<p class="note">{picked}</p>' if picked else "",
        cards=cards,
    )


def verdict(score: float) -> str:
    """``right``, ``partly right`` (some people agree) or ``wrong``."""
    if score >= RIGHT_FROM:
        return "right"
    return "partly right" if score > 0 else "wrong"


def _summary(columns: list[str], table: list[TableRow]) -> str:
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
        '<div class="scroll" tabindex="0" role="region" aria-label="Accuracy"><table>'
        '<caption>Accuracy in %</caption><thead><tr><th scope="col">Questions</th><th scope="col">Number</th>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"


def _controls(rows: list[Row]) -> str:
    verdicts = Counter(verdict(row["score"]) for row in rows)
    names = [name for name in ("right", "partly right", "wrong") if verdicts[name]]
    buttons = "".join(
        f'<button type="button" data-verdict="{name}" aria-pressed="{str(name == "").lower()}">{name or "all"}'
        f" <span>{verdicts[name] if name else len(rows)}</span></button>"
        for name in ("", *names)
    )
    types = _select("type", "answer type", Counter(row["answer_type"] for row in rows))
    kinds = _select("kind", "kind", Counter(row["kind"] for row in rows if row.get("kind")))
    search = '<input type="search" id="search" placeholder="search texts" aria-label="Search questions and answers">'
    return (
        f'<div class="controls" role="group" aria-label="Filter">{buttons}{types}{kinds}{search}'
        f'<output id="shown" aria-live="polite">{len(rows):,} shown</output></div>'
    )


def _select(name: str, label: str, counts: Counter[str]) -> str:
    if len(counts) < 2:
        return ""
    options = "".join(
        f'<option value="{html.escape(value)}">{html.escape(value)} ({counts[value]})</option>'
        for value in sorted(counts)
    )
    return f'<select id="{name}" aria-label="{label}"><option value="">any {label}</option>{options}</select>'


def _card(row: Row, image_bytes: int) -> str:
    mark, top = verdict(row["score"]), list(row.get("top") or [])[:MAX_TOP]
    said = Counter(row["answers"])
    sign = {"right": "✓", "partly right": "≈", "wrong": "✗"}[mark]
    score = f" {row['score']:.1f}" if mark == "partly right" else ""
    tags = [row["answer_type"], row.get("kind") or ""]
    texts = " ".join([row["question"], row["prediction"], row["truth"], *said, *(answer for answer, _ in top)]).lower()
    attributes = {"verdict": mark, "type": tags[0], "kind": tags[1], "text": texts}
    data = "".join(f' data-{key}="{html.escape(value)}"' for key, value in attributes.items())
    bars = "\n".join(_bar(answer, share, answer == row["truth"] or said[answer] >= 3) for answer, share in top)
    if not top:
        bars = f'<li class="only"><span>{html.escape(row["prediction"])}</span></li>'
    return (
        f'<article class="{mark.split()[0]}"{data}>{_picture(row, image_bytes)}'
        f'<div class="body"><p class="mark">{sign} {mark}{score}</p><h2>{html.escape(row["question"])}</h2>'
        f'<ol>{bars}</ol><p class="truth">{_people(row["truth"], said)}</p>'
        f'<p class="tags">{" · ".join(html.escape(tag) for tag in tags if tag)}</p></div></article>'
    )


def _people(truth: str, said: Counter[str]) -> str:
    others = "".join(f", {html.escape(answer)} ×{n}" for answer, n in said.most_common(6) if answer != truth)
    return f"<b>{html.escape(truth)}</b> <span>×{said[truth]}{others}</span>"


def _bar(answer: str, share: float, is_good: bool) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    shown = f"{width:.0f} %" if width >= 1 or width == 0 else "<1 %"
    hit = ' class="hit"' if is_good else ""
    return (
        f'<li{hit}><span>{html.escape(answer)}</span><i style="--share:{width:.1f}%"></i>'
        f"<small>{html.escape(shown)}</small></li>"
    )


def _picture(row: Row, image_bytes: int) -> str:
    content, kind, width, height = _shrunk(row["image"], image_bytes)
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
<p class="empty" hidden>No question matches.</p>
</main>
<script>{script}</script>
</body>
</html>
"""
