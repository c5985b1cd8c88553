"""Scores of captions: BLEU, ROUGE-L and CIDEr always, METEOR and SPICE where Java has them, by domain where known."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.errors import DataError
from data.metrics.bleu import bleu
from data.metrics.caption_words import caption_words, clean_line
from data.metrics.cider import cider
from data.metrics.java_metrics import UnavailableError, meteor, spice, why_unavailable
from data.metrics.rouge import rouge_l

JAVA_METRICS = ("METEOR", "SPICE")


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions; a CIDEr of 1.33 is 133 in papers.

    corpus: metric → value over all images.
    per_image: metric → image id → value.
    skipped: metric → why it is not among them.
    """

    corpus: dict[str, float]
    per_image: dict[str, dict[int, float]] = field(repr=False)
    skipped: dict[str, str]


def check_java(with_java: str) -> None:
    """Refuse ``require`` at once where METEOR or SPICE cannot be computed.

    Raises:
        DataError: names what is missing.
    """
    for metric in JAVA_METRICS if with_java == "require" else ():
        reason = why_unavailable(metric)
        if reason:
            raise DataError(f"{reason}, or leave out --caption_metrics all")


def score_captions(
    references: Mapping[int, Sequence[str]], captions: Mapping[int, str], *, with_java: str = "auto"
) -> CaptionScores:
    """Compare one caption an image with what people wrote.

    Args:
        references: image id → reference captions, at least one.
        captions: image id → caption; the same images.
        with_java: METEOR and SPICE: ``auto`` where they are installed, ``no``, or ``require``. One that fails while it
            runs is skipped in any case: no captions are lost for it.

    Raises:
        DataError: not the same images, none at all, an image without references, or ``require`` and nothing there.
    """
    check_same_images(references, captions)
    check_java(with_java)
    ids = list(captions)
    words = [caption_words(captions[index]) for index in ids]
    others = [[caption_words(text) for text in references[index]] for index in ids]
    corpus: dict[str, float] = {}
    per_image: dict[str, dict[int, float]] = {}
    skipped: dict[str, str] = {}

    parts, other_parts = [_at_every_space(found) for found in words], [list(map(_at_every_space, o)) for o in others]
    totals, values = bleu(parts, other_parts)
    for order, (total, of_images) in enumerate(zip(totals, values, strict=True), start=1):
        corpus[f"Bleu_{order}"], per_image[f"Bleu_{order}"] = total, dict(zip(ids, of_images, strict=True))
    if with_java != "no":
        _add_java("METEOR", lambda: meteor(words, others), ids, corpus, per_image, skipped)
    for name, found in (
        ("ROUGE_L", [rouge_l(caption, texts) for caption, texts in zip(words, others, strict=True)]),
        ("CIDEr", cider(parts, other_parts)),
    ):
        corpus[name], per_image[name] = sum(found) / len(found), dict(zip(ids, found, strict=True))
    if with_java != "no":
        lines = [clean_line(captions[index]) for index in ids]
        texts = [[clean_line(text) for text in references[index]] for index in ids]
        _add_java("SPICE", lambda: spice(lines, texts), ids, corpus, per_image, skipped)
    return CaptionScores(corpus, per_image, skipped)


def score_by_domain(
    references: Mapping[int, Sequence[str]], captions: Mapping[int, str], domains: Mapping[int, str]
) -> dict[str, dict[str, Any]]:
    """BLEU, ROUGE-L and CIDEr over the images of each domain alone, as NoCaps reports them, and how many those are.

    CIDEr weighs words by their rarity among the images that are compared, so the value over all images is no mean of
    the domains' values.
    """
    found = {}
    for domain in sorted(set(domains.values())):
        ids = [index for index in captions if domains.get(index) == domain]
        if ids:
            part = score_captions({i: references[i] for i in ids}, {i: captions[i] for i in ids}, with_java="no")
            found[domain] = {"images": len(ids), **part.corpus}
    return found


def check_same_images(references: Mapping[int, Sequence[str]], captions: Mapping[int, str]) -> None:
    """Refuse what cannot be compared.

    Raises:
        DataError: names how many images, and the first of them.
    """
    if not captions:
        raise DataError("no caption to score")
    for what, ids in (
        ("captions have no reference", [index for index in captions if not references.get(index)]),
        ("images with references have no caption", [index for index in references if index not in captions]),
    ):
        if ids:
            total = len(captions) if "captions" in what.split()[0] else len(references)
            first = ", ".join(map(str, ids[:3]))
            raise DataError(f"{len(ids)} of {total} {what}, the first of image {first}: give the files of one split")


def format_scores(scores: CaptionScores, domains: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """A table for people, values times 100 as in papers; one column for each domain."""
    columns = {"all": scores.corpus, **(domains or {})}
    lines = [" " * 8 + "".join(f"{name:>12}" for name in columns)]
    for metric in scores.corpus:
        values = (f"{100 * part[metric]:12.2f}" if metric in part else " " * 12 for part in columns.values())
        lines.append(f"{metric:8}" + "".join(values))
    lines += [f"{metric} skipped: {reason}" for metric, reason in scores.skipped.items()]
    return "\n".join(lines)


def _at_every_space(words: list[str]) -> list[str]:
    """Part "7 1/2", a word with a no-break space, in two: the reference does so for BLEU and CIDEr, not for others."""
    return " ".join(words).split()


def _add_java(
    name: str,
    compute: Callable[[], tuple[float, list[float]]],
    ids: list[int],
    corpus: dict[str, float],
    per_image: dict[str, dict[int, float]],
    skipped: dict[str, str],
) -> None:
    try:
        corpus[name], values = compute()
    except UnavailableError as error:
        skipped[name] = str(error)
    else:
        per_image[name] = dict(zip(ids, values, strict=True))
