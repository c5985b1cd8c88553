"""Report of a VQA run: accuracy beside what needs no picture, a page of predictions, training curves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from dataclasses import dataclass

from data.errors import DataError
from data.files import read_json, read_jsonl
from data.official_files import IMAGE_PLACES
from data.vqav2_files import ANNOTATION_PLACES
from scripts.arguments import OneLineParser
from scripts.program import run
from scripts.report.folder import add_page_flags, check_output, read_log, write_report

SPLITS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
ANSWER_KEYS = {"answer_type": str, "question_type": str, "multiple_choice_answer": str}
KINDS_FILE = "drawn_kinds.json"
COLUMNS = ["Model", "Shuffled images", "Question only", "Most frequent of type"]


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="output folder of the run (log.txt, metrics.jsonl)")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with the images and the VQA v2 files")
    parser.add_argument("--split", choices=list(SPLITS), default="val", help="what was predicted (default: val)")
    parser.add_argument("--predictions", type=Path, help="default: submit_vqav2_<split>.json in --run")
    parser.add_argument(
        "--top_answers", type=Path, help="default: top_answers_vqav2_<split>.jsonl beside the predictions, if there"
    )
    parser.add_argument(
        "--shuffled",
        type=Path,
        help="predictions made with --shuffle_images, for comparison (default: "
        "submit_vqav2_<split>_shuffled_images.json beside the predictions, if there)",
    )
    parser.add_argument("--annotations", type=Path, help="default: looked for below --data_path")
    parser.add_argument("--output", type=Path, help="folder for the report (default: --run)")
    add_page_flags(parser, title="Predictions", shown="questions")
    return parser


@dataclass(frozen=True)
class Split:
    """Questions, annotations and kinds (empty if not known) of the predicted split, by question id."""

    questions: dict[int, dict]
    annotations: dict[int, dict]
    kinds: dict[int, str]


def main(argv: list[str] | None = None) -> None:
    """Read, score, print the table, write report.html, curves.png and summary.json."""
    args = build_parser().parse_args(argv)
    output = args.output or args.run
    log = read_log(args.run)
    check_output(output, overwrite=args.overwrite)
    predictions_file = args.predictions or args.run / f"submit_vqav2_{args.split}.json"
    top_file = args.top_answers or predictions_file.with_name(f"top_answers_vqav2_{args.split}.jsonl")
    answers = read_predictions(predictions_file)
    split = read_split(args.data_path, args.split, args.annotations, wanted=set(answers), source=predictions_file)
    top = read_top_answers(top_file) if args.top_answers or top_file.exists() else {}

    columns = {"Model": answers, **_priors(args.data_path, split)}
    shuffled_file = args.shuffled or predictions_file.with_name(f"submit_vqav2_{args.split}_shuffled_images.json")
    if args.shuffled or shuffled_file.exists():
        shuffled = read_predictions(shuffled_file)
        missing = [qid for qid in answers if qid not in shuffled]
        if missing:
            raise DataError(
                f"{shuffled_file} lacks question {missing[0]} of {predictions_file}: predict the same split"
            )
        columns["Shuffled images"] = {qid: shuffled[qid] for qid in answers}
    names = [name for name in COLUMNS if name in columns]
    table, scores = score_table({name: columns[name] for name in names}, split)
    rows = page_rows(args.data_path, args.split, split, answers, top, scores)

    from scripts.report.curves import draw_curves
    from scripts.report.prediction_page import render_page
    from scripts.report.text_table import format_table

    print(format_table(names, table))
    overall = dict(zip(names, table[0]["scores"], strict=True))
    where = "" if args.split == "val" else f" of {args.split}"  # the curve is of val
    levels = {
        f"question-only prior{where}": overall["Question only"],
        f"shuffled images{where}": overall.get("Shuffled images"),
    }
    curves = draw_curves(log, levels=levels)
    page = render_page(
        rows,
        title=args.title,
        subtitle=f"{args.split} split, {len(rows):,} questions, predictions from {predictions_file.name}",
        columns=names,
        table=table,
        curves_png=curves,
        max_cards=args.max_cards,
        seed=args.seed,
    )
    write_report(output, page, curves, {"split": args.split, "columns": names, "rows": table})


# --- reading ----------------------------------------------------------------------------------------------------------


def read_predictions(path: Path) -> dict[int, str]:
    """Answer by question id from a result file in the official form.

    Raises:
        DataError: the file is missing or not a list of ``{"question_id": int, "answer": str}`` with different ids.
    """
    from data.metrics.vqa import submission_entries

    entries = read_json(path, advice="give the result file of a prediction run as --predictions")
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path} is not a result file: expected a list of {{"question_id": number, "answer": text}}')
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or not {"question_id", "answer"} <= set(entry):
            raise DataError(f'{path}: entry {place} needs "question_id" and "answer", got {entry!r:.80}')
    try:
        checked = submission_entries((entry["question_id"], entry["answer"]) for entry in entries)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return {entry["question_id"]: entry["answer"] for entry in checked}


def read_top_answers(path: Path) -> dict[int, list[tuple[str, float]]]:
    """The best answers with probabilities by question id.

    Raises:
        DataError: a line that is not ``{"question_id": int, "top": [[answer, probability], ...]}``.
    """
    top = {}
    for number, line in enumerate(read_jsonl(path), start=1):
        pairs = line.get("top")
        is_good = isinstance(line.get("question_id"), int) and isinstance(pairs, list)
        if not is_good or not all(_is_answer_and_share(pair) for pair in pairs):
            raise DataError(
                f'{path}, record {number}: expected {{"question_id": number, "top": [[answer, probability], ...]}}'
            )
        top[line["question_id"]] = [(answer, float(share)) for answer, share in pairs]
    return top


def _is_answer_and_share(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) in (int, float)


def read_split(data_path: Path, name: str, annotations: Path | None, *, wanted: set[int], source: Path) -> Split:
    """Questions and annotations of exactly the ``wanted`` question ids.

    Raises:
        DataError: files not found or malformed, or ``source`` answers a question that the split does not have.
    """
    split = SPLITS[name]
    if annotations is None:
        # VQA v2 keeps its test answers; the drawn data have them, test-dev is a part of test
        is_test = name.startswith("test")
        file_name = "drawn_test2015_annotations.json" if is_test else f"v2_mscoco_{split}_annotations.json"
        way_out = "VQA v2 publishes no test answers, use --split val" if is_test else "give --annotations"
        annotations = _find(data_path, file_name, way_out)
    questions_file = _find(data_path, f"v2_OpenEnded_mscoco_{split}_questions.json", "check --data_path")
    questions = _by_id(questions_file, "questions", {"image_id": int, "question": str})
    annotated = _by_id(annotations, "annotations", {"answers": list, **ANSWER_KEYS})
    for path, known in ((questions_file, questions), (annotations, annotated)):
        unknown = sorted(wanted - set(known))
        if unknown:
            raise DataError(f"{source} answers question {unknown[0]}, which {path} does not have: check --split")
    if len(wanted) < len(questions):
        print(f"predictions cover {len(wanted):,} of the {len(questions):,} questions; scores are for these")
    kinds_file = next((p for p in _candidates(data_path, KINDS_FILE) if p.is_file()), None)
    kinds = read_json(kinds_file) if kinds_file else {}
    if not isinstance(kinds, dict) or not all(isinstance(kind, str) for kind in kinds.values()):
        raise DataError(f"{kinds_file} must map question ids to kinds: draw the data again or delete the file")
    return Split(
        {qid: question for qid, question in questions.items() if qid in wanted},
        {qid: annotated[qid] for qid in questions if qid in wanted},
        {qid: kinds[str(qid)] for qid in wanted if str(qid) in kinds},
    )


def _candidates(data_path: Path, name: str) -> list[Path]:
    return [data_path / place / name for place in ANNOTATION_PLACES]


def _find(data_path: Path, name: str, way_out: str) -> Path:
    for path in _candidates(data_path, name):
        if path.is_file():
            return path
    raise DataError(f"no {name} in {data_path} or its vqa/ and annotations/ folders: {way_out}")


def _by_id(path: Path, key: str, needed: dict[str, type]) -> dict[int, dict]:
    content = read_json(path)
    records = content.get(key) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise DataError(f'{path} has no list "{key}": is it the official file of VQA v2?')
    by_id = {}
    for place, record in enumerate(records):
        for name, kind in {"question_id": int, **needed}.items():
            if not isinstance(record, dict) or type(record.get(name)) is not kind:
                raise DataError(f'{path}: {key}[{place}] needs "{name}" of type {kind.__name__}, got {record!r:.80}')
        by_id[record["question_id"]] = record
    return by_id


# --- scoring ----------------------------------------------------------------------------------------------------------


def _priors(data_path: Path, split: Split) -> dict[str, dict[int, str]]:
    """Predictions without pictures, learnt from the train annotations."""
    from scripts.report import priors

    train_file = _find(data_path, "v2_mscoco_train2014_annotations.json", "priors are computed from the train answers")
    train = _by_id(train_file, "annotations", ANSWER_KEYS)
    questions_file = _find(data_path, "v2_OpenEnded_mscoco_train2014_questions.json", "priors need the train questions")
    questions = {**_by_id(questions_file, "questions", {"question": str}), **split.questions}
    if unasked := [qid for qid in train if qid not in questions]:
        raise DataError(
            f"{train_file} has question {unasked[0]}, which {questions_file} has not: take files of one release"
        )
    texts = {qid: record["question"] for qid, record in questions.items()}
    train_records, records = list(train.values()), list(split.annotations.values())
    return {
        "Question only": priors.question_only_prior(train_records, records, texts),
        "Most frequent of type": priors.most_frequent_per_answer_type(train_records, records),
    }


def score_table(columns: dict[str, dict[int, str]], split: Split) -> tuple[list[dict], dict[int, float]]:
    """Official accuracy of each column overall, by answer type and, where kinds are known, by kind.

    Returns:
        (lines ``{"name", "group", "count", "scores"}``, score by question id of the first column).
    """
    from data.metrics.vqa import vqa_accuracy

    records = list(split.annotations.values())
    per_question = [vqa_accuracy(predictions, records).per_question for predictions in columns.values()]
    groups: dict[tuple[str, str], list[int]] = {("overall", "all"): list(split.annotations)}
    for group, names in (
        ("answer type", {qid: record["answer_type"] for qid, record in split.annotations.items()}),
        ("kind", split.kinds),
    ):
        for name in sorted(set(names.values())):
            groups[group, name] = [qid for qid, other in names.items() if other == name]
    table = [
        {
            "name": name,
            "group": group,
            "count": len(qids),
            "scores": [sum(scores[qid] for qid in qids) / len(qids) for scores in per_question],
        }
        for (group, name), qids in groups.items()
    ]
    return table, per_question[0]


def page_rows(
    data_path: Path,
    name: str,
    split: Split,
    answers: dict[int, str],
    top: dict[int, list[tuple[str, float]]],
    scores: dict[int, float],
) -> list[dict]:
    """What the page shows of each question, in the order of the questions file."""
    folder = "test2015" if name == "test-dev" else SPLITS[name]
    place = next((p for p in IMAGE_PLACES if (data_path / p / folder).is_dir()), None)
    if place is None:
        raise DataError(f"no image folder {folder} in {data_path} or its images/: check --data_path")
    return [
        {
            "image": str(data_path / place / folder / f"COCO_{folder}_{question['image_id']:012d}.jpg"),
            "question": question["question"],
            "prediction": answers[qid],
            "top": top.get(qid, []),
            "truth": split.annotations[qid]["multiple_choice_answer"],
            "answers": [answer["answer"] for answer in split.annotations[qid]["answers"]],
            "score": scores[qid],
            "answer_type": split.annotations[qid]["answer_type"],
            **({"kind": split.kinds[qid]} if qid in split.kinds else {}),
        }
        for qid, question in split.questions.items()
    ]


if __name__ == "__main__":
    run(main)
