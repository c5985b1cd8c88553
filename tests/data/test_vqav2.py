import errno
import json
import os

import pytest

from data.errors import DataError
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary
from data.vqa_index import VQARecord, read_vqa_index, read_vqav2_split
from data.vqav2 import build_vqav2_index
from tests.data.vqav2_tree import (
    SPM,
    annotation,
    edit_json,
    image_name,
    question,
    read_lines,
    write_images,
    write_vqav2,
)
from tests.helpers import sent_to_a_process

INDEX_FILES = {
    "answer2label.txt",
    "vqa.train.jsonl",
    "vqa.val.jsonl",
    "vqa.trainable_val.jsonl",
    "vqa.rest_val.jsonl",
    "vqa.val.unlabelled.jsonl",
    "vqa.rest_val.unlabelled.jsonl",
    "vqa.test.jsonl",
    "vqa.test-dev.jsonl",
}
QUESTIONS = "vqa/v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "vqa/v2_mscoco_train2014_annotations.json"
VAL_ANNOTATIONS = "vqa/v2_mscoco_val2014_annotations.json"


@pytest.fixture(scope="module")
def tokenizer():
    return XLMRTokenizer(SPM)


def build(root, tokenizer, **options):
    options = {"min_answer_count": 2, "num_rest_val_images": 4, **options}
    return build_vqav2_index(root, options.pop("annotation_path", None), tokenizer, **options)


def index_bytes(folder):
    return {name: (folder / name).read_bytes() for name in INDEX_FILES}


def images_of(path):
    return {row["image_path"] for row in read_lines(path)}


def test_the_build_writes_every_file_and_counts_its_lines(tmp_path, tokenizer):
    summary = build(write_vqav2(tmp_path), tokenizer)
    assert set(summary.num_lines) == INDEX_FILES
    for name, count in summary.num_lines.items():
        assert len(read_lines(tmp_path / name)) == count
    assert summary.num_lines["vqa.train.jsonl"] == 40
    assert summary.num_lines["vqa.val.jsonl"] == 19
    assert summary.num_lines["vqa.val.unlabelled.jsonl"] == 1
    assert summary.num_answers == 4


def test_two_builds_are_equal_byte_for_byte(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer)
    first = index_bytes(tmp_path)
    build(tmp_path, tokenizer)
    assert index_bytes(tmp_path) == first
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def test_a_line_has_the_reference_form(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer)
    first = (tmp_path / "vqa.train.jsonl").read_text().splitlines()[0]
    tokens = tokenizer.encode("is the circle red?")
    label = AnswerVocabulary.load(tmp_path / "answer2label.txt").label("no")
    row = {"image_path": "train2014/COCO_train2014_000000000001.jpg", "text_segment": tokens}
    assert first == json.dumps({**row, "labels": [label], "scores": [1.0], "qid": 1000})
    assert read_lines(tmp_path / "vqa.test-dev.jsonl") == [
        {"image_path": "test2015/COCO_test2015_000000000201.jpg", "text_segment": tokens, "labels": [], "scores": []}
        | {"qid": 201000}
    ]


def test_rest_val_has_the_wanted_number_of_images_and_trainable_val_the_others(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer)
    rest, trainable = images_of(tmp_path / "vqa.rest_val.jsonl"), images_of(tmp_path / "vqa.trainable_val.jsonl")
    assert len(rest) == 4
    assert rest.isdisjoint(trainable)
    assert rest | trainable == images_of(tmp_path / "vqa.val.jsonl")


def test_the_seed_alone_decides_rest_val(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    chosen = []
    for seed in (1, 2, 1):
        build(tmp_path, tokenizer, seed=seed)
        chosen.append(images_of(tmp_path / "vqa.rest_val.jsonl"))
    assert chosen[0] == chosen[2] != chosen[1]


def test_rest_val_is_drawn_by_the_documented_rule(tmp_path, tokenizer):
    # the four smallest of `printf 42:101 | sha256sum` ... 42:110; a change would move users' splits
    build(write_vqav2(tmp_path), tokenizer, seed=42)
    ids = sorted(int(path[-7:-4]) for path in images_of(tmp_path / "vqa.rest_val.jsonl"))
    assert ids == [104, 105, 106, 109]


def test_val_questions_without_a_known_answer_are_kept_apart(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer, num_rest_val_images=1000)
    assert read_lines(tmp_path / "vqa.trainable_val.jsonl") == []
    (row,) = read_lines(tmp_path / "vqa.rest_val.unlabelled.jsonl")
    assert (row["qid"], row["labels"], row["scores"]) == (110001, [], [])
    assert row["qid"] not in {r["qid"] for r in read_lines(tmp_path / "vqa.rest_val.jsonl")}
    every = read_vqav2_split(tmp_path, "val", with_unlabelled=True)
    assert len(every) == 20
    assert len(read_vqav2_split(tmp_path, "val")) == 19


def test_train_questions_without_a_known_answer_are_dropped_and_counted(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    edit_json(tmp_path / ANNOTATIONS, lambda c: c["annotations"].__setitem__(0, annotation(1, 0, "unicorn")))
    summary = build(tmp_path, tokenizer)
    assert summary.num_lines["vqa.train.jsonl"] == 39
    assert any(note.startswith("1 train questions left out: none of their answers") for note in summary.notes)


def test_lines_follow_image_names_then_the_question_file(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    edit_json(tmp_path / QUESTIONS, lambda c: c["questions"].reverse())
    build(tmp_path, tokenizer)
    rows = read_lines(tmp_path / "vqa.train.jsonl")
    assert [row["qid"] for row in rows[:4]] == [1001, 1000, 2001, 2000]
    paths = [row["image_path"] for row in rows]
    assert paths == sorted(paths)


@pytest.mark.parametrize("place", ["", "vqa", "annotations", "vqa/annotations"])
@pytest.mark.parametrize("images", ["", "images"])
def test_every_known_layout_is_found_and_named(tmp_path, tokenizer, place, images):
    summary = build(write_vqav2(tmp_path, annotations=place, images=images), tokenizer)
    assert summary.num_lines["vqa.train.jsonl"] == 40
    found = dict(summary.found)
    assert found["val2014 annotations"] == str(tmp_path / place / "v2_mscoco_val2014_annotations.json")
    assert found["train2014 images"] == f"{tmp_path / images / 'train2014'} (20 images)"
    first = read_lines(tmp_path / "vqa.train.jsonl")[0]["image_path"]
    assert (tmp_path / first).exists()


def test_annotations_may_lie_in_a_given_folder_and_the_index_go_to_another(tmp_path, tokenizer):
    write_vqav2(tmp_path / "data", annotations="../notes")
    build(tmp_path / "data", tokenizer, annotation_path=tmp_path / "notes", output_path=tmp_path / "index")
    assert INDEX_FILES <= set(os.listdir(tmp_path / "index"))
    assert set(os.listdir(tmp_path / "data")) == {"train2014", "val2014", "test2015"}


def test_missing_test_files_are_said_and_left_out(tmp_path, tokenizer):
    summary = build(write_vqav2(tmp_path, test=False), tokenizer)
    assert "vqa.test.jsonl" not in summary.num_lines
    assert any(note.startswith("vqa.test.jsonl not written: no v2_OpenEnded_mscoco_test2015") for note in summary.notes)
    assert not (tmp_path / "vqa.test.jsonl").exists()


def test_a_test_index_of_an_earlier_run_is_not_passed_off_as_new(tmp_path, tokenizer):
    write_vqav2(tmp_path, test=False)
    (tmp_path / "vqa.test.jsonl").write_text("{}\n")
    summary = build(tmp_path, tokenizer)
    assert any("the vqa.test.jsonl there is of an earlier run" in note for note in summary.notes)


def test_questions_without_their_image_are_left_out_and_counted(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    (tmp_path / "train2014" / image_name("train2014", 3)).unlink()
    summary = build(tmp_path, tokenizer)
    assert summary.num_lines["vqa.train.jsonl"] == 38
    assert any(note.startswith("2 train2014 questions left out: their image is not in") for note in summary.notes)


def test_files_that_are_no_images_of_the_split_are_passed_over(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    build(tmp_path, tokenizer)
    first = index_bytes(tmp_path)
    for name in ("._COCO_train2014_000000000003.jpg", "list.txt", "cover.jpg", "COCO_train2014_000000000999.jpg"):
        (tmp_path / "train2014" / name).touch()
    build(tmp_path, tokenizer)
    assert index_bytes(tmp_path) == first


def test_linked_image_folders_are_followed(tmp_path, tokenizer):
    write_vqav2(tmp_path / "data")
    (tmp_path / "data" / "train2014").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "train2014").symlink_to(tmp_path / "elsewhere")
    assert build(tmp_path / "data", tokenizer).num_lines["vqa.train.jsonl"] == 40


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (QUESTIONS, r"no v2_OpenEnded_mscoco_train2014_questions.json in .*/vqa/annotations: give the folder"),
        (VAL_ANNOTATIONS, r"no v2_mscoco_val2014_annotations.json in"),
    ],
)
def test_a_missing_train_or_val_file_is_named_with_the_places(tmp_path, tokenizer, name, message):
    (write_vqav2(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=message):
        build(tmp_path, tokenizer)


def test_a_missing_image_folder_is_named_with_the_places(tmp_path, tokenizer):
    (write_vqav2(tmp_path) / "val2014").rename(tmp_path / "val")
    with pytest.raises(DataError, match="no image folder val2014 .looked for .*images/val2014.: give the folder above"):
        build(tmp_path, tokenizer)


def test_a_split_without_any_of_its_images_is_an_error(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    for path in (tmp_path / "train2014").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="none of the 40 questions of .* has its image in"):
        build(tmp_path, tokenizer)
    assert not INDEX_FILES & set(os.listdir(tmp_path))


def drop_key(kind, key):
    return lambda content: content[kind][0].pop(key)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (QUESTIONS, lambda c: c["questions"].append(c["questions"][0]), "question 1000 stands twice"),
        (ANNOTATIONS, lambda c: c["annotations"].append(c["annotations"][0]), "question 1000 stands twice"),
        (QUESTIONS, lambda c: c["questions"].append(question(1, 9)), r"annotations.json: 1 question ids missing.*1009"),
        (QUESTIONS, lambda c: c["questions"].pop(), r"questions.json: 1 question ids missing.*\[20001\]"),
        (QUESTIONS, drop_key("questions", "image_id"), 'question 1000: "image_id" must be of type int'),
        (QUESTIONS, drop_key("questions", "question_id"), r'questions\[0\]: "question_id" must be of type int'),
        (QUESTIONS, lambda c: c["questions"].insert(0, 3), r'questions\[0\]: "image_id" must be'),
        (QUESTIONS, lambda c: c["questions"][0].update(question=""), "question 1000: the question '' has no tokens"),
        (ANNOTATIONS, drop_key("annotations", "multiple_choice_answer"), 'question 1000: "multiple_choice_answer"'),
        (ANNOTATIONS, lambda c: c["annotations"][0].update(answers=[]), 'question 1000: "answers" must be a list'),
        (ANNOTATIONS, lambda c: c["annotations"][0].update(answers=["yes"]), 'question 1000: "answers" must be'),
        (ANNOTATIONS, lambda c: c["annotations"][0].update(image_id=5), "question 1000: image 5, but 1 in"),
        (QUESTIONS, lambda c: c.pop("questions"), 'needs a non-empty list under "questions"'),
    ],
)  # fmt: skip
def test_contradicting_annotations_are_named_by_file_and_id(tmp_path, tokenizer, name, change, message):
    edit_json(write_vqav2(tmp_path) / name, change)
    with pytest.raises(DataError, match=message) as error:
        build(tmp_path, tokenizer)
    assert "train2014" in str(error.value)
    assert not INDEX_FILES & set(os.listdir(tmp_path))


def test_two_files_of_one_image_are_an_error(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    (tmp_path / "train2014" / "COCO_train2014_3.jpg").touch()
    with pytest.raises(DataError, match="are both image 3"):
        build(tmp_path, tokenizer)


def test_a_failed_build_leaves_the_old_index_as_it_was(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer)
    before = index_bytes(tmp_path)
    edit_json(
        tmp_path / "vqa/v2_OpenEnded_mscoco_test2015_questions.json", lambda c: c["questions"][1].update(question=" ")
    )
    with pytest.raises(DataError, match="question 202000"):
        build(tmp_path, tokenizer)
    assert index_bytes(tmp_path) == before
    assert not [name for name in os.listdir(tmp_path) if ".tmp" in name]


def test_training_reads_train_and_trainable_val(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer)
    records = read_vqav2_split(tmp_path, "train", num_answers=4, vocab_size=tokenizer.vocab_size)
    assert len(records) == 40 + len(read_lines(tmp_path / "vqa.trainable_val.jsonl"))
    assert records[0] == VQARecord(
        "train2014/COCO_train2014_000000000001.jpg", tuple(tokenizer.encode("is the circle red?")), (0,), (1.0,), 1000
    )


def test_an_unknown_split_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="unknown split 'dev': choose from train, val, val2014, test, test-dev"):
        read_vqav2_split(tmp_path, "dev")


def test_a_missing_index_names_the_builder(tmp_path):
    with pytest.raises(DataError, match="vqa.train.jsonl: run scripts/make_index.py vqav2"):
        read_vqav2_split(tmp_path, "train")


def test_files_of_a_split_that_share_questions_are_an_error(tmp_path, tokenizer):
    build(write_vqav2(tmp_path), tokenizer)
    (tmp_path / "vqa.trainable_val.jsonl").write_bytes((tmp_path / "vqa.train.jsonl").read_bytes())
    with pytest.raises(DataError, match="share question ids"):
        read_vqav2_split(tmp_path, "train")


def test_records_travel_to_another_process():
    record = VQARecord("a.jpg", (4, 5), (0,), (1.0,), 7)
    assert sent_to_a_process(record) == record


GOOD = {"image_path": "val2014/a.jpg", "text_segment": [4, 5], "labels": [0, 1], "scores": [1, 0.3], "qid": 7}


def index_with(tmp_path, **changes):
    row = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    path = tmp_path / "vqa.val.jsonl"
    path.write_text(json.dumps({**GOOD, "qid": 1}) + "\n" + json.dumps(row) + "\n")
    return path


def test_whole_number_scores_are_read_as_fractions(tmp_path):
    record = read_vqa_index(index_with(tmp_path))[1]
    assert record.scores == (1.0, 0.3)
    assert type(record.scores[0]) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_path": ...}, "the key 'image_path' is missing"),
        ({"image_path": "../a.jpg"}, "contains '..'"),
        ({"image_path": "/a.jpg"}, "is absolute"),
        ({"image_path": 3}, "must be a non-empty string"),
        ({"text_segment": None}, "text_segment must be a list of whole numbers, got None"),
        ({"text_segment": []}, "text_segment is empty"),
        ({"text_segment": [4, 5.0]}, "text_segment must be a list of whole numbers"),
        ({"text_segment": [4, True]}, "text_segment must be a list of whole numbers"),
        ({"text_segment": [4, 100]}, "text_segment must be at least 0 and below 100, .* got 100"),
        ({"text_segment": [-1]}, "text_segment must be at least 0"),
        ({"labels": [0, 2]}, "labels must be at least 0 and below 2, the size of the answer list, got 2"),
        ({"labels": [0, 0]}, "a label stands twice"),
        ({"labels": [0, "1"]}, "labels must be a list of whole numbers"),
        ({"labels": [0]}, r"scores must be a list as long as labels \(1\)"),
        ({"scores": [0.3, 1.5]}, r"a score must be a number in \[0, 1\], got \[0.3, 1.5\]"),
        ({"scores": [0.3, None]}, "a score must be a number"),
        ({"scores": [0.3, True]}, "a score must be a number"),
        ({"scores": 1.0}, "scores must be a list"),
        ({"qid": "7"}, "qid must be a whole number"),
        ({"qid": 1}, "question id 1 stands twice"),
        ({"labels": [], "scores": []}, "question 7 has no labels"),
    ],
)
def test_a_bad_index_line_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=r"vqa\.val\.jsonl:2: .*" + message):
        read_vqa_index(index_with(tmp_path, **changes), num_answers=2, vocab_size=100, require_labels=True)


def test_images_without_questions_do_not_take_a_place_in_rest_val(tmp_path, tokenizer):
    write_vqav2(tmp_path)
    build(tmp_path, tokenizer)
    before = images_of(tmp_path / "vqa.rest_val.jsonl")
    write_images(tmp_path, "val2014", range(300, 340))
    build(tmp_path, tokenizer)
    assert images_of(tmp_path / "vqa.rest_val.jsonl") == before


def test_a_read_only_data_folder_is_an_input_error_with_a_way_out(tmp_path, tokenizer, monkeypatch):
    write_vqav2(tmp_path)

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("data.index_writer.open_atomic", refuse)
    with pytest.raises(DataError, match="cannot write .*answer2label.txt .Read-only.*folder of your own with links"):
        build(tmp_path, tokenizer)
