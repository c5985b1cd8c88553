"""Row files of VLE: written repeatably, read from disk when asked for."""

import json
import os
from pathlib import Path

import pytest

from data import vle_rows
from data.errors import DataError
from data.row_files import RowRecords, find_rows
from data.vle_rows import build_vle_rows, read_labels, rows_file
from scripts.write_vqa import FORMATS
from tests.helpers import sent_to_a_process


class Words:
    """Each word a number."""

    def encode_filled(self, text: str, kind: str, where: str) -> list[int]:
        return [len(word) for word in text.split()]


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(image: str, ids: list[int], labels: list[list[int]] | None = None) -> dict:
    labels = [[0]] * len(ids) if labels is None else labels
    scores = [[1.0] * len(of_one) for of_one in labels]
    questions = [f"question {'x' * index}" for index in ids]
    always = {"image": image, "questions": questions, "question_id": ids, "image_id": 1}
    return always | {"answer_labels": labels, "answer_scores": scores}


@pytest.fixture
def records(tmp_path):
    one = write(tmp_path / "one.jsonl", row("a/1.jpg", [1, 2]), row("a/2.jpg", [3]))
    empty = write(tmp_path / "empty.jsonl")
    two = write(tmp_path / "two.jsonl", row("b/3.jpg", [4, 5, 6], [[0], [], [1, 0]]))
    return RowRecords([one, empty, two], Words(), 2)


def test_questions_of_several_files_come_in_order_by_number_and_one_by_one(records):
    assert len(records) == 6
    assert [record.question_id for record in records] == [1, 2, 3, 4, 5, 6]
    assert list(records) == [records[place] for place in range(6)]
    assert records[-1] == records[5]
    assert (records[5].image_path, records[5].labels, records[5].scores) == ("b/3.jpg", (1, 0), (1.0, 1.0))
    assert records[4].labels == ()
    assert records[1].tokens == (8, 2)
    with pytest.raises(IndexError):
        records[6]


def test_the_first_few_are_such_a_sequence_again_and_travel_to_another_process(records):
    few = records[:4]
    assert [record.question_id for record in few] == [1, 2, 3, 4]
    assert len(few) == 4
    copy = sent_to_a_process(few)
    assert list(copy) == list(few)
    assert [record.question_id for record in records[2:5]] == [3, 4, 5]
    assert list(records.image_paths()) == ["a/1.jpg", "a/2.jpg", "b/3.jpg"]


def test_a_question_that_stands_twice_is_named(tmp_path):
    one, two = write(tmp_path / "one.jsonl", row("1.jpg", [7])), write(tmp_path / "two.jsonl", row("2.jpg", [7]))
    with pytest.raises(DataError, match="question 7 stands twice"):
        RowRecords([one, two], Words(), 1)


def test_files_without_a_question_are_refused(tmp_path):
    with pytest.raises(DataError, match="no question"):
        RowRecords([write(tmp_path / "one.jsonl")], Words(), 1)


def test_a_split_is_found_as_json_lines_or_as_arrow(tmp_path):
    with pytest.raises(DataError, match=r"no vqav2_test.jsonl \(or .arrow\)"):
        find_rows(tmp_path, "test")
    (tmp_path / rows_file("test", "arrow")).touch()
    assert find_rows(tmp_path, "test").suffix == ".arrow"
    (tmp_path / rows_file("test", "jsonl")).touch()
    assert find_rows(tmp_path, "test").suffix == ".jsonl"


def official(folder: Path) -> Path:
    """Three train and three val images with two questions each, of which one has no known answer; no test files."""
    for split in ("train2014", "val2014"):
        (folder / split).mkdir(parents=True)
        questions, annotations = [], []
        for image in range(1, 4):
            (folder / split / f"COCO_{split}_{image:012d}.jpg").write_bytes(b"jpeg")
            for number in range(2):
                qid = image * 10 + number
                answer = "yes" if number else f"{split}{image}"
                questions.append({"image_id": image, "question": "is it?", "question_id": qid})
                annotations.append(
                    {"question_id": qid, "image_id": image, "multiple_choice_answer": answer}
                    | {"answers": [{"answer": answer}] * 10}
                )
        (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps({"questions": questions}))
        (folder / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def build(data: Path, output: Path, **options: object):
    return build_vle_rows(data, None, output, min_answer_count=3, num_rest_val_images=1, **options)


def test_two_builds_are_equal_and_questions_without_a_known_answer_stand_apart(tmp_path):
    data = official(tmp_path / "data")
    summary = build(data, tmp_path / "one")
    build(data, tmp_path / "two")
    names = sorted(os.listdir(tmp_path / "one"))
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    assert read_labels(tmp_path / "one").answers == ("yes",)
    expected = {"train": 3, "val": 3, "rest_val": 1, "trainable_val": 2, "val.unlabelled": 3, "rest_val.unlabelled": 1}
    assert summary.num_questions == {rows_file(split, "jsonl"): count for split, count in expected.items()}
    assert [note.split()[0] for note in summary.notes] == ["vqav2_test.jsonl", "vqav2_test-dev.jsonl"]


def test_arrow_files_hold_the_images_themselves_in_the_originals_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    data = official(tmp_path / "data")
    build(data, tmp_path / "rows", kind="arrow")
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "rows" / "vqav2_train.arrow"))).read_all()
    columns = ["image", "questions", "answers", "answer_labels", "answer_scores", "image_id", "question_id", "split"]
    assert table.column_names == columns
    assert table["image"][0].as_py() == b"jpeg"
    records = RowRecords([tmp_path / "rows" / "vqav2_train.arrow"], Words(), 1)
    assert [record.question_id for record in records] == [11, 21, 31]
    assert records[1].image_path == "vqav2_train.arrow#1"


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    data = official(tmp_path / "data")
    monkeypatch.setattr(vle_rows, "soft_targets", lambda *_: ([], []))
    for kind in FORMATS:
        with pytest.raises(DataError, match="no question of train has a known answer"):
            build(data, tmp_path / kind, kind=kind)
        assert os.listdir(tmp_path / kind) == []


def test_arrow_files_go_where_a_link_leads_and_never_over_a_device(tmp_path):
    pytest.importorskip("pyarrow")
    data, rows = official(tmp_path / "data"), tmp_path / "rows"
    rows.mkdir()
    (rows / "vqav2_train.arrow").symlink_to(tmp_path / "elsewhere.arrow")
    build(data, rows, kind="arrow")
    assert (rows / "vqav2_train.arrow").is_symlink()
    assert len(RowRecords([tmp_path / "elsewhere.arrow"], Words(), 1)) == 3
    (rows / "vqav2_val.arrow").unlink()
    os.mkfifo(rows / "vqav2_val.arrow")
    with pytest.raises(DataError, match=r"vqav2_val\.arrow: it is a folder or a device, not a file"):
        build(data, rows, kind="arrow")
    assert (rows / "vqav2_val.arrow").is_fifo()


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        build(official(tmp_path / "data"), tmp_path / "rows", kind="arrow")
