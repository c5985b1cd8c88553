"""scripts/make_model_card.py: what a run's own files say, for runs of every family."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from data.errors import DataError
from scripts.make_model_card import CARD, UNKNOWN, main, model_card
from tests.helpers import run_program
from tests.scripts import caption_run, llava_run, vlbert_run, vle_run, vqa_run


def beit3_vqa() -> Path:
    return vqa_run.trained_checkpoint().parent


def spottune() -> Path:
    return vlbert_run.trained_run("SpotTune")


RUNS = {
    "beit3": (beit3_vqa, "BEiT-3", "val_score"),
    "captions": (caption_run.trained_captioner, "BEiT-3", "val_CIDEr"),
    "vle": (vle_run.trained_run, "VLE", "val_score"),
    "vlbert": (spottune, "VL-BERT", "val_score"),
    "llava": (llava_run.trained_run, "LLaVA", None),
}


@pytest.fixture(params=RUNS)
def kind(request) -> str:
    return request.param


def card_of(kind: str, folder: Path, *more: object) -> str:
    main(["--run", str(RUNS[kind][0]()), "--output", str(folder / "card.md"), *map(str, more)])
    return (folder / "card.md").read_text(encoding="utf-8")


def rows(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (\S.*?) \| `(.*)` \|$", card, re.MULTILINE))


def test_the_card_of_every_family_has_the_facts_of_its_run(kind, tmp_path):
    record = json.loads((RUNS[kind][0]() / "run.json").read_text())
    card = card_of(kind, tmp_path)
    assert card.startswith(f"# Model card: {RUNS[kind][1]}, ")
    found = rows(card)
    for key in ("samples_per_step", "total_steps", "started", "torch", "python"):
        assert found[key] == str(record[key]), key
    parameters = "parameters" if "parameters" in record else "parameters_trained"
    assert found[parameters] == str(record[parameters])
    block = card.split("The last start:\n\n```\n", 1)[1].split("\n```", 1)[0]
    assert shlex.split(block) == record["command"]


def best_epoch(run: Path) -> int:
    """Of the steps that checkpoint-best has taken."""
    steps = json.loads((run / "checkpoint-best/manifest.json").read_text())["global_step"]
    return (steps - 1) // json.loads((run / "run.json").read_text())["steps_per_epoch"]


def logged_epochs(run: Path) -> dict[int, dict[str, float]]:
    return {row["epoch"]: row for row in map(json.loads, (run / "log.txt").read_text().splitlines())}


def test_the_best_epoch_is_that_of_checkpoint_best(kind, tmp_path):
    make, _, key = RUNS[kind]
    card, epochs = card_of(kind, tmp_path), logged_epochs(make())
    if key is None:
        assert not any(name.startswith("val_") for row in epochs.values() for name in row)
        assert ("No validation is logged" in card) == bool(epochs)
        assert ("No epoch of this run has ended" in card) == (not epochs)
    else:
        best = best_epoch(make())
        assert rows(card)[key] == f"{epochs[best][key]:.6g}"
        assert f"after epoch {best} (counted from 0), the best of {len(epochs)}" in card


@pytest.mark.parametrize("family", [vqa_run, vle_run])
def test_the_best_of_several_epochs_is_that_of_checkpoint_best(family, tmp_path):
    epochs = {vqa_run: ("--epochs", "3", "--lr", "3e-2", "--warmup_epochs", "0"), vle_run: ("--max_epoch", "3")}
    run = tmp_path / "run"
    family.program(*family.train_flags(run, "--limit_samples", "40", *epochs[family]))
    main(["--run", str(run)])
    card, best, logged = (run / CARD).read_text(), best_epoch(run), logged_epochs(run)
    assert sorted(logged) == [0, 1, 2]
    assert f"after epoch {best} (counted from 0), the best of 3" in card
    assert rows(card)["val_score"] == f"{logged[best]['val_score']:.6g}"


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("beit3", "none, random weights"),
        ("vle", "none, random weights"),
        ("vlbert", "none, random weights"),
        ("llava", str(llava_run.BASE)),
    ],
)
def test_the_start_weights_are_named(kind, start, tmp_path):
    assert rows(card_of(kind, tmp_path))["start weights"] == start


def test_the_strategy_and_the_data_of_vlberts_config_are_shown(tmp_path):
    found = rows(card_of("vlbert", tmp_path))
    assert found["strategy"] == "SpotTune"
    assert int(found["parameters_policy"]) > 0
    assert found["TRAIN_IMAGE_SET"] == "train2014"
    assert found["data_path"] == str(vlbert_run.drawn_regions())


def test_pretrained_weights_of_vlberts_config_count_as_start_weights():
    network = {"PARTIAL_PRETRAIN": "vl-bert-base-prec.model", "BERT_MODEL_NAME": "bert-base-uncased"}
    given = {"partial_pretrain": None, "from_scratch": False, "model": "base", "config": {"NETWORK": network}}
    assert rows(model_card({"arguments": given}, [], {}))["start weights"] == "vl-bert-base-prec.model"
    given["partial_pretrain"] = "other.model"
    assert rows(model_card({"arguments": given}, [], {}))["start weights"] == "other.model"


def test_the_first_of_equal_epochs_is_shown():
    given = {"captioning_mask_prob": None, "task": "vqav2"}
    epochs = [{"epoch": n, "val_score": score} for n, score in enumerate([40.0, 55.5, 55.5, 50.0])]
    assert "Validation after epoch 1 " in model_card({"arguments": given}, epochs, {})


def test_arguments_are_valid_json_without_what_was_not_given(kind, tmp_path):
    block = card_of(kind, tmp_path).split("## Arguments\n\n```json\n", 1)[1].removesuffix("```\n")
    given = json.loads(block)
    recorded = json.loads((RUNS[kind][0]() / "run.json").read_text())["arguments"]
    assert given == {k: v for k, v in recorded.items() if k != "config" and v not in (None, "", []) and v is not False}


def test_what_the_run_cannot_know_is_left_to_a_person(kind, tmp_path):
    card = card_of(kind, tmp_path)
    assert all(point in card for point in UNKNOWN)
    assert {"Licence", "Intended use", "Limits"} <= {point.split("**")[1].strip(":,") for point in UNKNOWN}


def test_result_files_are_shown(tmp_path):
    result = tmp_path / "result_vqav2_val.json"
    result.write_text('{"official": {"overall": 61.3}}')
    assert '"overall": 61.3' in card_of("vle", tmp_path, "--results", result)


def test_the_card_stands_in_the_run_and_additions_are_not_lost(tmp_path):
    folder = Path(shutil.copytree(vle_run.trained_run(), tmp_path / "run"))
    main(["--run", str(folder)])
    written = (folder / CARD).read_text()
    (folder / CARD).write_text(written + "Licence: MIT\n")
    with pytest.raises(DataError, match="MODEL_CARD.md exists, perhaps with what you added: give --overwrite"):
        main(["--run", str(folder)])
    assert (folder / CARD).read_text().endswith("Licence: MIT\n")
    main(["--run", str(folder), "--overwrite"])
    assert (folder / CARD).read_text() == written


def test_cells_of_a_table_stay_in_their_cells():
    given = {"captioning_mask_prob": None, "task": "vqav2", "data_path": "a|b\nc", "model": "m"}
    assert "| data_path | `a\\|b c` |" in model_card({"arguments": given}, [], {})


@pytest.mark.parametrize(
    "record",
    [[], {}, {"arguments": None}, {"arguments": {"min_answer_count": 1}}],
    ids=["list", "bare", "null", "other"],
)
def test_a_record_of_something_else_is_refused(record):
    with pytest.raises(DataError, match=r"run.json is not of a training run of VLE, LLaVA, VL-BERT, BEiT-3"):
        model_card(record, [], {})


def test_as_a_program_a_folder_without_a_run_is_one_line(tmp_path):
    ended = run_program("scripts/make_model_card.py", "--run", str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.strip().count("\n") == 0
    assert "give the output folder of a training run as --run" in ended.stderr
