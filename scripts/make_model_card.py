"""Write MODEL_CARD.md for a training run: what its run.json and log.txt say, and what only a person can add.

python scripts/make_model_card.py --run output/vqav2
python scripts/make_model_card.py --run output/vqav2 --results output/vqav2/val/result_vqav2_val.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.errors import DataError
from data.files import open_atomic, read_json
from scripts.arguments import OneLineParser
from scripts.program import run
from scripts.report.curves import LOG, read_run_log

CARD = "MODEL_CARD.md"
# an argument that only its program has → family, the score by which checkpoint-best is chosen (None: by the task),
# where the start weights stand among the arguments, and what is known of the data
FAMILIES = {
    "lr_mult_head": ("VLE", "score", ("model_dir",), ("data_root", "train_file", "val_file")),
    "lora_enable": ("LLaVA", "accuracy", ("model_name_or_path",), ("data_path", "image_folder", "val_annotations")),
    "partial_pretrain": ("VL-BERT", "score", ("partial_pretrain",), ("data_path", "train_file", "val_file")),
    "captioning_mask_prob": ("BEiT-3", None, ("finetune",), ("data_path", "train_file", "val_file")),
}
VLBERT_DATA = ("DATASET", "TRAIN_IMAGE_SET", "VAL_IMAGE_SET", "BOXES", "ANSWER_VOCAB_FILE")  # of its config
FACTS = ("strategy", "trains", "parameters", "parameters_trained", "parameters_frozen", "parameters_policy", "answers")
PLAN = ("samples_per_step", "total_steps", "effective_lr", "precision", "world_size", "started", "python", "torch")
UNKNOWN = (
    "**Licence** of the start weights and of the data; their publishers say it. It binds this model too.",
    "**Sources**: the paths below are those of the machine that trained. Name what they are, with version and address.",
    "**Intended use**, who should not use it, and for what.",
    "**Limits**: which people, languages, places and kinds of pictures the data leave out; how the model fails.",
    "**Hardware**, and the time that the training took; the commit of the code.",
    "**Whether the scores can be compared** with published ones: a held-out part of your own is no test set.",
    "**Earlier settings**: run.json has the arguments of the last start; a run that went on may have had others.",
)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of a training run (run.json, log.txt)")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], help="result files of evaluations (JSON), shown with the scores"
    )
    parser.add_argument("--output", type=Path, help=f"file to write (default: {CARD} in --run)")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that exists, additions included")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the run, write the card."""
    args = build_parser().parse_args(argv)
    record = read_json(args.run / "run.json", advice="give the output folder of a training run as --run")
    epochs = read_run_log(args.run).epochs if (args.run / LOG).exists() else []
    results = {path.name: read_json(path, advice="give the result file of an evaluation") for path in args.results}
    output = args.output or args.run / CARD
    if output.exists() and not args.overwrite:
        raise DataError(f"{output} exists, perhaps with what you added: give --overwrite or another --output")
    text = model_card(record, epochs, results, where=str(args.run / "run.json"))
    with open_atomic(output) as handle:
        handle.write(text)
    print(f"wrote {output}; {len(UNKNOWN)} points in it are yours to fill in")


def model_card(
    record: Any, epochs: Sequence[Mapping[str, Any]], results: Mapping[str, Any], *, where: str = "run.json"
) -> str:
    """Markdown of one run.

    Args:
        record: content of run.json.
        epochs: lines of log.txt.
        results: content of result files by name.
        where: names run.json in an error.

    Raises:
        DataError: the record is not that of a training run of one of the four families.
    """
    given = record.get("arguments") if isinstance(record, dict) else None
    mark = next((key for key in FAMILIES if isinstance(given, dict) and key in given), None)
    if mark is None:
        raise DataError(f"{where} is not of a training run of {', '.join(f[0] for f in FAMILIES.values())}")
    family, best_by, start_keys, data_keys = FAMILIES[mark]
    best_by = best_by or ("score" if given.get("task") == "vqav2" else "CIDEr")
    settings = _part(given, "config")  # VL-BERT's file, overrides applied
    lines = [f"# Model card: {family}, {given.get('model')}", "", *_table(_facts(record, given, settings, start_keys))]
    data = {key: given.get(key) for key in data_keys} | {
        key: _part(settings, "DATASET").get(key) for key in VLBERT_DATA
    }
    lines += ["", "## Data", "", *_table(data)]
    lines += ["", "## Training", "", *_table({key: record.get(key) for key in PLAN} | {"epochs": len(epochs)})]
    lines += ["", "The last start:", "", "```", shlex.join(map(str, record.get("command") or [])), "```"]
    lines += ["", "## Scores", "", *_scores(epochs, f"val_{best_by}"), *_results(results)]
    lines += ["", "## To be filled in", "", "The run does not know:", "", *(f"- {point}" for point in UNKNOWN)]
    recorded = {key: value for key, value in given.items() if key != "config" and _is_said(value)}
    lines += ["", "## Arguments", "", "```json", json.dumps(recorded, indent=1, default=str), "```", ""]
    return "\n".join(lines)


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _facts(
    record: Mapping[str, Any], given: Mapping[str, Any], settings: Mapping[str, Any], start_keys: Sequence[str]
) -> dict[str, Any]:
    start = next((given[key] for key in start_keys if given.get(key)), None)
    network = _part(settings, "NETWORK")
    start = start or network.get("PARTIAL_PRETRAIN") or network.get("BERT_MODEL_NAME")
    if given.get("from_scratch") or not start:
        start = "none, random weights"
    return {"task": given.get("task"), "start weights": start} | {key: record.get(key) for key in FACTS}


def _is_said(value: Any) -> bool:
    """Whether an argument has a value; 0 is one, an absent or switched-off one is not worth a line."""
    return value is not None and value is not False and value != "" and value != []


def _table(rows: Mapping[str, Any]) -> list[str]:
    said = {key: value for key, value in rows.items() if _is_said(value)}
    cells = [(key, f"{value:.6g}" if isinstance(value, float) else str(value)) for key, value in said.items()]
    cells = [(key, value.replace("|", "\\|").replace("\n", " ")) for key, value in cells]
    return ["| | |", "|---|---|", *(f"| {key} | `{value}` |" for key, value in cells)]


def _scores(epochs: Sequence[Mapping[str, Any]], key: str) -> Iterator[str]:
    """The epoch of checkpoint-best: the first of the highest score."""
    scored = [row for row in epochs if isinstance(row.get(key), int | float)]
    if not scored:
        yield "No validation is logged in this run." if epochs else "No epoch of this run has ended."
        return
    best = max(scored, key=lambda row: row[key])
    yield f"Validation after epoch {best.get('epoch')} (counted from 0), the best of {len(scored)} by `{key}`:"
    yield from ("", *_table({name: value for name, value in best.items() if name.startswith("val_")}))
    yield from ("", "Scores of answers are in %, those of captions are fractions.")


def _results(results: Mapping[str, Any]) -> Iterator[str]:
    for name, content in results.items():
        yield from ("", f"`{name}`:", "", "```json", json.dumps(content, indent=1), "```")


if __name__ == "__main__":
    run(main)
