"""scripts/format_dataset_for_llava.py: the competition's files by default, options, a seeded hold-out, bad input."""

import json

import pytest

from data.errors import DataError
from data.llava_dataset import read_conversations
from data.llava_questions import read_llava_questions
from data.vizwiz import SUFFIX, read_rows
from scripts import format_dataset_for_llava as program_module
from scripts.format_dataset_for_llava import main
from scripts.llava_vqa import match_rows
from tests.helpers import run_program
from tests.parity.fixture_files import load_fixture
from tests.paths import ROOT
from tests.scripts.vqa_run import tree


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


OWN = [
    {"image": "p/1.jpg", "question": "What is on the table?", "answers": ["A cup.", "mug", "cup"], "question_id": 17},
    {"image": "p/1.jpg", "question": "Is it full?", "answers": ["no"], "question_id": 4},
    {"image": "p/2.jpg", "question": "What now?", "question_id": 5},
    {"image": "p/3.jpg", "question": "How many?", "answers": ["2", "2"], "question_id": 6},
]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_questions_of_ones_own_become_samples_and_questions(tmp_path, capsys):
    train = write_lines(tmp_path / "train.jsonl", OWN)
    asked = [{key: row[key] for key in ("image", "question")} for row in OWN]
    main(
        [
            "--train_file",
            train,
            "--val_file",
            write_lines(tmp_path / "new.jsonl", asked),
            "--output_path",
            str(tmp_path),
        ]
    )
    samples = read_conversations(tmp_path / "train_for_llava.json")
    assert [(sample.name, sample.image, sample.turns[-1][1]) for sample in samples] == [
        ("17", "p/1.jpg", "cup"),
        ("4", "p/1.jpg", "no"),
        ("6", "p/3.jpg", "2"),
    ]
    assert "left out 1 of 4 training questions" in capsys.readouterr().out
    questions = read_llava_questions(tmp_path / "valid_for_llava.jsonl")
    assert [(q.question_id, q.image, q.text) for q in questions[:2]] == [
        (0, "p/1.jpg", "what is on table"),
        (1, "p/1.jpg", "is it full"),
    ]


def test_a_hold_out_of_ones_own_keeps_its_form_and_is_told_by_its_ids(tmp_path):
    rows = [row | {"answers": ["x", "y"] * 2} for row in OWN]
    flags = ["--train_file", write_lines(tmp_path / "a.jsonl", rows[:2]), write_lines(tmp_path / "b.jsonl", rows[2:])]
    main([*flags, "--hold_out", "0.5", "--output_path", str(tmp_path)])
    held = [json.loads(line) for line in (tmp_path / "heldout_annotations.jsonl").read_text().splitlines()]
    assert len(held) == 2
    assert all(row in rows for row in held)
    questions = read_llava_questions(tmp_path / "heldout_for_llava.jsonl")
    matched = match_rows(read_rows(tmp_path / "heldout_annotations.jsonl"), questions)
    assert [matched[q.place].question_id for q in questions] == [row["question_id"] for row in held]
    trained = {sample.name for sample in read_conversations(tmp_path / "train_for_llava.json")}
    assert trained == {str(row["question_id"]) for row in rows if row not in held}


def test_annotations_of_ones_own_may_have_several_questions_about_an_image(tmp_path):
    rows = [row | {"answers": [str(number)] * 4} for number, row in enumerate(OWN)]
    main(["--val_file", write_lines(tmp_path / "val.jsonl", rows), "--output_path", str(tmp_path)])
    assert not (tmp_path / "train_for_llava.json").exists()
    questions = read_llava_questions(tmp_path / "valid_for_llava.jsonl")
    matched = match_rows(read_rows(tmp_path / "val.jsonl"), questions)
    assert [matched[place].answers[0].text for place in range(4)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            [OWN[0], OWN[1] | {"question_id": 17}],
            (),
            r"t\.jsonl:2: question_id 17 stands at .*t\.jsonl:1 already; ids are unique",
        ),
        ([OWN[0], {"image": "a.jpg", "question": "?", "answers": ["x"]}], (), r"t\.jsonl:2: question_id must stand on"),
        ([OWN[0] | {"image": "../a.jpg"}], (), r"t\.jsonl:1: \"image\": '\.\./a\.jpg' contains"),
        ([OWN[0] | {"answer": "x"}], (), r"t\.jsonl:1: unknown key 'answer'"),
        ([OWN[2]], (), r"none of the 1 questions of --train_file .*t\.jsonl has answers"),
        (OWN, ("--train_file", "none.jsonl"), "no such file: none.jsonl: write one line a question, such as"),
    ],
)
def test_bad_data_of_ones_own_is_named_and_nothing_written(tmp_path, rows, more, message):
    path = write_lines(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=message):
        main(["--train_file", path, *more, "--output_path", str(tmp_path / "out")])
    with pytest.raises(DataError, match="--hold_out keeps a part of --train_file"):
        main(["--val_file", path, "--hold_out", "0.5", "--output_path", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("name", ["train_for_llava.json", "valid_for_llava.jsonl", "heldout_annotations.json"])
def test_it_replaces_its_own_files_and_no_others(data, name):
    argv = ["--data_path", str(data), "--hold_out", "0.3"]
    main([*argv, "--seed", "1"])
    main([*argv, "--vizwiz_prompt"])
    written = (data / name).read_bytes()
    (data / name).write_text("mended by hand")
    before = tree(data)
    with pytest.raises(DataError, match=rf"{name} is there and was not written by this program, or was changed since"):
        main(argv)
    assert tree(data) == before
    main([*argv, "--vizwiz_prompt", "--overwrite"])
    assert (data / name).read_bytes() == written


def test_a_file_that_was_being_written_when_it_was_stopped_is_its_own(data, monkeypatch):
    argv = ["--data_path", str(data)]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program_module, "question_lines", stop)
        with pytest.raises(KeyboardInterrupt):
            main(argv)
    assert (data / "train_for_llava.json").exists()
    main([*argv, "--vizwiz_prompt"])
    assert (data / "valid_for_llava.jsonl").read_text().count(SUFFIX.splitlines()[-1]) == 7


def test_a_hold_out_of_everything_is_refused(data):
    with pytest.raises(DataError, match="leaves nothing to train on"):
        main(["--data_path", str(data), "--hold_out", "1"])
