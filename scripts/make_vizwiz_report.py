"""Report of answers to VizWiz: accuracy by answer type beside "unanswerable" for all, and a page of the answers.

python scripts/make_vizwiz_report.py --answers eval/answers.jsonl --annotations data/heldout_annotations.json \\
    --image_folder data/train --output report
python scripts/make_vizwiz_report.py --answers eval/answers.jsonl --image_folder data/valid --output report

Question ids are the images' names, as scripts/format_dataset_for_llava.py writes them; for others --questions tells
which image is meant.

Writes report.html, summary.json and, with --run, curves.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.files import check_relative, resolve_inside
from scripts.arguments import OneLineParser
from scripts.program import run
from scripts.report.curves import LOG
from scripts.report.folder import add_page_flags, check_output, write_report

NUM_TEXTS = 5  # answers in each group of the page's second table
_SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA's prompt for short answers


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--answers", type=Path, required=True, help="answers of the evaluation, one JSON object a line")
    p.add_argument(
        "--annotations", type=Path, help="rows with what people said (default: none, so questions have no score)"
    )
    p.add_argument(
        "--questions",
        type=Path,
        help="question file of the evaluation, if its ids are not the images' names (as in LLaVA's llava_test.jsonl)",
    )
    p.add_argument("--image_folder", type=Path, required=True, help="folder of the images")
    p.add_argument("--output", type=Path, required=True, help="folder for the report")
    p.add_argument("--compare", type=Path, help="answers of another model to the same questions, for a second column")
    p.add_argument("--compare_name", help="how to call that model (default: the file's name without ending)")
    p.add_argument("--run", type=Path, help="output folder of the training run, for its loss curve")
    add_page_flags(p, title="Answers", shown="questions")
    p.add_argument("--worst", action="store_true", help="show those with the lowest scores instead of a random draw")
    return p


@dataclass(frozen=True)
class Answer:
    """What the model said, and to which prompt (empty if the file does not tell)."""

    text: str
    prompt: str


@dataclass(frozen=True)
class Item:
    """One question; ``answers`` of people are raw, none where they are not known, and then there is no type."""

    name: str
    image: Path
    question: str
    answers: tuple[str, ...] = ()
    answer_type: str = ""


def main(argv: list[str] | None = None) -> None:
    """Read, score, print the table, write the page."""
    args = build_parser().parse_args(argv)
    has_curves = args.run is not None and (args.run / LOG).is_file()
    check_output(args.output, overwrite=args.overwrite, has_curves=has_curves)
    if args.compare_name and not args.compare:
        raise DataError("--compare_name names the answers of --compare: give both or none")
    asked = questions_by_name(args.questions) if args.questions else {}
    names: dict[str, str] = {}
    if args.annotations:
        items = annotated_items(args.annotations, args.image_folder)
        names = names_of_images(args.questions, asked)
    elif asked:
        items = asked_items(args.questions, asked, args.image_folder)
    answers = read_answers(args.answers, names)
    if not args.annotations and not asked:
        items = items_of_answers(args.answers, answers, args.image_folder)
    source = args.annotations or args.questions or args.answers
    check_cover(args.answers, answers, items, source)
    is_scored = any(item.answers for item in items)
    if args.worst and not is_scored:
        raise DataError("--worst needs scores: give --annotations with what people said")
    columns = {"Model": {name: answer.text for name, answer in answers.items()}}
    other = ""
    if args.compare:
        other = args.compare_name or args.compare.stem
        others = read_answers(args.compare, names)
        check_cover(args.compare, others, items, source)
        if other in columns:
            raise DataError(f"--compare_name {other} is the first column's: give another")
        columns[other] = {name: answer.text for name, answer in others.items()}
    check_images(items, args.image_folder)
    curves = _loss_curve(args.run) if args.run else None

    from data.vizwiz import UNANSWERABLE
    from scripts.report.text_table import format_table
    from scripts.report.vizwiz_page import render_page

    if is_scored:
        columns[f"“{UNANSWERABLE}” for all"] = {item.name: UNANSWERABLE for item in items}
    table, scores = score_table(columns, items, is_scored=is_scored)
    print(format_table(list(columns), table))
    texts = text_rows(columns["Model"], items)
    page = render_page(
        page_rows(items, columns["Model"], columns.get(other), other, scores),
        title=args.title,
        subtitle=f"{len(items):,} questions, answers from {args.answers.name}",
        columns=list(columns),
        table=table,
        texts=texts,
        other_name=other,
        curves_png=curves,
        max_cards=args.max_cards,
        seed=args.seed,
        only_worst=args.worst,
    )
    summary = {"columns": list(columns), "rows": table, "answers": [row._asdict() for row in texts]}
    write_report(args.output, page, curves, summary)


# --- reading ----------------------------------------------------------------------------------------------------------


def questions_by_name(path: Path) -> dict[str, dict[str, Any]]:
    """Lines of a question file by their ids as text.

    Raises:
        DataError: a line of another form, or an id that comes again.
    """
    from data.vizwiz import read_questions

    found: dict[str, dict[str, Any]] = {}
    for row in read_questions(path):
        name = str(row["question_id"])
        if name in found:
            raise DataError(f"{path}: the question id {name:.80} comes again; answers are told apart by it: rename one")
        found[name] = row
    return found


def names_of_images(path: Path, asked: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The image's name, by which annotations tell questions apart, for each question id.

    Raises:
        DataError: two questions about one image.
    """
    from data.vizwiz import VizWizRow

    names = {name: str(VizWizRow(row["image"], "").id) for name, row in asked.items()}
    (image, number), *_ = Counter(names.values()).most_common(1) or [("", 1)]
    if number > 1:
        raise DataError(
            f"{path} has {number} questions about {image:.80}, the annotations one: leave --annotations out"
        )
    return names


def asked_items(path: Path, asked: dict[str, dict[str, Any]], folder: Path) -> list[Item]:
    """The questions of a file, without what people said.

    Raises:
        DataError: a path that leads out of the folder.
    """
    for name, row in asked.items():
        check_relative(row["image"], f"{path}: question {name:.80}")
    return [Item(name, folder / row["image"], _without_prompt(row["text"])) for name, row in asked.items()]


def read_answers(path: Path, names: dict[str, str]) -> dict[str, Answer]:
    """Answers by question id, or by what ``names`` has for it; the last one of each.

    Says how many broken lines were left out.

    Raises:
        DataError: no such file, a line without ``question_id`` or ``text``, or no answer at all.
    """
    from data.vizwiz import read_result_rows

    rows, num_broken = read_result_rows(path)
    if not rows:
        raise DataError(f"{path} has no answers: run the evaluation first")
    if num_broken:
        print(f"left out {num_broken} broken lines of {path}")
    found = {str(name): Answer(row["text"], str(row.get("prompt", ""))) for name, row in rows.items()}
    return {names.get(name, name): answer for name, answer in found.items()}


def annotated_items(path: Path, folder: Path) -> list[Item]:
    """The rows of an annotation file, their types told by the most frequent answer where the file does not.

    Raises:
        DataError: a row of another form, or a path that leaves the folder.
    """
    from data.vizwiz import read_rows

    items = []
    for row in read_rows(path):
        texts = tuple(answer.text for answer in row.answers)
        kind = (row.answer_type or type_of_answers(texts)) if texts else ""
        items.append(Item(str(row.id), resolve_inside(folder, row.image), row.question, texts, kind))
    return items


def type_of_answers(answers: Iterable[str]) -> str:
    """VizWiz's types, told by the most frequent answer: ``unanswerable``, ``yes/no``, ``number`` or ``other``."""
    from data.metrics.vizwiz import process_text
    from data.vizwiz import UNANSWERABLE
    from data.vqa_answers import answer_type

    mode = Counter(map(process_text, answers)).most_common(1)[0][0]
    return mode if mode == UNANSWERABLE else answer_type(mode)


def items_of_answers(path: Path, answers: dict[str, Answer], folder: Path) -> list[Item]:
    """What an answers file alone tells: the prompts, and images by the question ids.

    Raises:
        DataError: a question id that leads out of the folder.
    """
    items = []
    for name, answer in answers.items():
        check_relative(name, f"{path}: question_id")
        question = _without_prompt(answer.prompt)
        items.append(Item(name, _image_of(name, folder), question or "(the file has no prompt)"))
    return items


def _without_prompt(text: str) -> str:
    """The question without what LLaVA's evaluation puts around it."""
    from data.vizwiz import SUFFIX

    return text.removeprefix("<image>\n").removesuffix(SUFFIX).removesuffix(_SHORT)


def _image_of(name: str, folder: Path) -> Path:
    """The image of that name with any ending; where there is none, the one that is usual."""
    from data.images import IMAGE_SUFFIXES

    endings = (".jpg", *IMAGE_SUFFIXES, *(("",) if name.lower().endswith(IMAGE_SUFFIXES) else ()))
    found = (path for ending in endings if (path := folder / (name + ending)).is_file())
    return next(found, folder / f"{name}.jpg")


def check_cover(path: Path, answers: dict[str, Answer], items: list[Item], source: Path) -> None:
    """Raise DataError unless the answers are to exactly these questions."""
    names = {item.name for item in items}
    missing, foreign = names - answers.keys(), answers.keys() - names
    if missing:
        raise DataError(
            f"{path} leaves {len(missing)} of {len(names)} questions of {source} without an answer, the first: "
            f"{min(missing)}; run the evaluation to its end"
        )
    if foreign:
        raise DataError(
            f"{path} answers {len(foreign)} questions that {source} does not have, the first: {min(foreign)}; give "
            "files of the same split"
        )


def check_images(items: list[Item], folder: Path) -> None:
    """Raise DataError for images that are not there."""
    missing = [item.image for item in items if not item.image.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(items)} images are missing, the first: {missing[0]}; check --image_folder "
            f"{folder}, and give --questions if question ids are not the images' names"
        )


def _loss_curve(folder: Path) -> bytes | None:
    from scripts.report.curves import draw_curves, read_run_log

    if not folder.is_dir():
        raise DataError(f"--run {folder}: no such folder; give the --output_dir of the training run")
    if not (folder / LOG).is_file():
        print(f"no {LOG} in {folder}: the page has no curve")
        return None
    log = read_run_log(folder)
    key = "val_accuracy"  # scripts/llava_training.py logs it, in percent
    return draw_curves(log, score_key=key if log.series(key)[0] else None, score_name="accuracy", is_percent=True)


# --- scoring ----------------------------------------------------------------------------------------------------------


def score_table(
    columns: dict[str, dict[str, str]], items: list[Item], *, is_scored: bool
) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """Course accuracy of each column overall and by answer type, and the share that says "unanswerable".

    Returns:
        (lines ``{"name", "group", "count", "scores"}``, for each column the score by question; empty without scores).
    """
    from data.metrics.vizwiz import vizwiz_accuracy
    from data.vizwiz import is_unanswerable

    answers = {item.name: item.answers for item in items}
    types = {item.name: item.answer_type for item in items}
    table, per_column = [], []
    if is_scored:
        results = [vizwiz_accuracy(predictions, answers, types) for predictions in columns.values()]
        per_column = [result.per_image for result in results]
        means = [("overall", "all", [result.overall for result in results])]
        for name in sorted(set(types.values())):
            means.append(("answer type", name, [result.per_answer_type[name] for result in results]))
        for group, name, columns_means in means:
            scores = [mean.value for mean in columns_means]
            table.append({"name": name, "group": group, "count": columns_means[0].count, "scores": scores})
    shares = [sum(map(is_unanswerable, column.values())) / len(items) for column in columns.values()]
    table.append({"name": "says unanswerable", "group": "share", "count": len(items), "scores": shares})
    return table, per_column


def text_rows(predictions: dict[str, str], items: list[Item]) -> list[Any]:
    """The most frequent answers, the longest and the shortest, as the page's second table has them.

    The most frequent alone where these are all answers that there are.
    """
    from scripts.report.vizwiz_page import TextRow

    counts = Counter(predictions.values())
    example = {predictions[item.name]: item.question for item in reversed(items)}  # the first one stays
    longest = sorted(counts, key=lambda text: (-len(text), text))
    groups = {"most frequent": [text for text, _ in counts.most_common(NUM_TEXTS)]}
    if len(counts) > NUM_TEXTS:
        groups |= {"longest": longest[:NUM_TEXTS], "shortest": longest[::-1][:NUM_TEXTS]}
    return [TextRow(group, text, counts[text], example[text]) for group, texts in groups.items() for text in texts]


def page_rows(
    items: list[Item],
    predictions: dict[str, str],
    others: dict[str, str] | None,
    other_name: str,
    scores: list[dict[str, float]],
) -> list[dict[str, Any]]:
    """What the page shows of each question, in order."""
    from data.metrics.vizwiz import process_text
    from data.vizwiz import is_unanswerable
    from scripts.report.vizwiz_page import Said

    rows = []
    for item in items:
        text = predictions[item.name]
        row: dict[str, Any] = {
            "image": str(item.image),
            "name": item.name,
            "question": item.question,
            "prediction": text,
            "is_unanswerable": is_unanswerable(text),
        }
        if others is not None:
            row["other"] = others[item.name]
            is_same = process_text(others[item.name]) == process_text(text)
            row["comparison"] = f"{'same answer as' if is_same else 'other answer than'} {other_name}"
        if scores:
            spelling: dict[str, str] = {}
            for answer in item.answers:
                spelling.setdefault(process_text(answer), answer)
            said = Counter(map(process_text, item.answers)).most_common()
            row["people"] = [Said(spelling[key], number, key == process_text(text)) for key, number in said]
            row["answer_type"], row["score"] = item.answer_type, scores[0][item.name]
        if scores and others is not None:
            row["other_score"] = scores[1][item.name]
            difference = row["score"] - row["other_score"]
            word = "better than" if difference > 0 else "worse than" if difference < 0 else "level with"
            row["comparison"] = f"{word} {other_name}"
        rows.append(row)
    return rows


if __name__ == "__main__":
    run(main)
