"""scripts/format_dataset_for_llava.py: the competition's files by default, options, a seeded hold-out, bad input."""

import json

import pytest

from data.errors import DataError
from data.vizwiz import SUFFIX, read_rows
from scripts.format_dataset_for_llava import main
from tests.helpers import ROOT, run_program
from tests.parity.fixture_files import load_fixture


@pytest.fixture
def data(tmp_path):
    recording = load_fixture("llava_metric.pt")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.json").write_text(recording["inputs"][f"{name}_json"], encoding="utf-8")
    return tmp_path


def test_without_arguments_the_files_are_the_recorded_ones(data, monkeypatch, capsys):
    outputs = load_fixture("llava_metric.pt")["outputs"]
    (data / "work").mkdir()
    for name in ("train", "valid"):
        (data / "work" / "data").mkdir(exist_ok=True)
        (data / f"{name}.json").rename(data / "work" / "data" / f"{name}.json")
    monkeypatch.chdir(data / "work")
    main([])
    assert (data / "work/data/train_for_llava.json").read_text(encoding="utf-8") == outputs["train_for_llava"]
    assert (data / "work/data/valid_for_llava.jsonl").read_text(encoding="utf-8") == outputs["valid_for_llava"]
    said = capsys.readouterr().out
    for words in ("unanswerable: 2 of 7 (28.6 %)", "unique answers: ", "empty answers replaced: "):
        assert words in said


def test_options_change_the_text(data):
    main(["--data_path", str(data), "--output_path", str(data / "out"), "--keep_raw_questions", "--vizwiz_prompt"])
    entries = json.loads((data / "out/train_for_llava.json").read_text())
    assert entries[0]["conversations"][0]["value"] == "<image>\nWhat is this?" + SUFFIX


def test_a_hold_out_is_labelled_seeded_and_not_trained_on(data):
    main(["--data_path", str(data), "--hold_out", "0.3", "--seed", "3"])
    trained = {entry["id"] for entry in json.loads((data / "train_for_llava.json").read_text())}
    held = read_rows(data / "heldout_annotations.json")
    lines = [json.loads(line) for line in (data / "heldout_for_llava.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [row.id for row in held]
    assert (len(held), len(trained)) == (2, 5)
    rows = {row.id: row for row in read_rows(data / "train.json")}
    assert {row.id for row in held} == rows.keys() - trained
    assert all(row == rows[row.id] for row in held)


def test_bad_input_is_one_line_and_leaves_older_files(data):
    (data / "train_for_llava.json").write_text("older")
    (data / "valid.json").write_text("{")
    done = run_program("scripts/format_dataset_for_llava.py", "--data_path", str(data), cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert (data / "train_for_llava.json").read_text() == "older"
    (data / "valid.json").unlink()
    with pytest.raises(DataError, match=r"none of valid\.json, val\.json and test\.json"):
        main(["--data_path", str(data)])


def test_a_hold_out_of_everything_is_refused(data):
    with pytest.raises(DataError, match="leaves nothing to train on"):
        main(["--data_path", str(data), "--hold_out", "1"])
