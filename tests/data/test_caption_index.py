import json

import pytest

from data.caption_index import (
    CaptionRecord,
    folder_records,
    own_evaluation_records,
    own_training_records,
    read_caption_index,
)
from data.errors import DataError
from data.own_captions import read_caption_file
from data.tokenizers.spm import XLMRTokenizer
from tests.paths import FIXTURES

SPM = FIXTURES / "evaluation_tokenizer.spm"
CAPTION = {"image_path": "val2014/a.jpg", "text_segment": [4, 5], "image_id": 9}
IMAGE = {"image_path": "val2014/a.jpg", "text_segment": None, "image_id": 9}


def written(tmp_path, *rows, name="coco_captioning.train.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_lines_are_captions_and_an_image_may_have_several(tmp_path):
    path = written(tmp_path, CAPTION, CAPTION | {"text_segment": [6]})
    assert read_caption_index(path, vocab_size=7) == [
        CaptionRecord("val2014/a.jpg", 9, (4, 5)),
        CaptionRecord("val2014/a.jpg", 9, (6,)),
    ]


def test_other_lines_are_images_without_text(tmp_path):
    path = written(tmp_path, IMAGE, IMAGE | {"image_id": 3}, name="coco_captioning.val.jsonl")
    assert [record.image_id for record in read_caption_index(path, vocab_size=None)] == [9, 3]


@pytest.mark.parametrize(
    ("row", "vocab_size", "message"),
    [
        (CAPTION | {"image_id": "9"}, 7, r":2: image_id must be a whole number, got '9'"),
        (CAPTION | {"text_segment": None}, 7, r":2: text_segment must be a list of ids"),
        (CAPTION | {"text_segment": []}, 7, r":2: text_segment must be a list of ids"),
        (CAPTION | {"text_segment": [7]}, 7, r":2: .*below 7, the size of the vocabulary, got \[7\].*make_index.py"),
        (CAPTION | {"text_segment": [True]}, 7, r":2: text_segment must be a list of ids"),
        (CAPTION | {"image_path": "../a.jpg"}, 7, r":2"),
        (CAPTION, None, r":2: text_segment must be null outside training, got \[4, 5\]"),
        (IMAGE, None, r":2: image 9 stands on line 1 already"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path, row, vocab_size, message):
    path = written(tmp_path, CAPTION if vocab_size else IMAGE, row)
    with pytest.raises(DataError, match=message):
        read_caption_index(path, vocab_size=vocab_size)


def test_a_missing_index_says_how_to_build_it(tmp_path):
    with pytest.raises(DataError, match=r"nocaps.val.jsonl.*make_index.py nocaps --data_path DIR"):
        read_caption_index(tmp_path / "nocaps.val.jsonl", vocab_size=None)


def test_each_caption_of_ones_own_images_is_a_training_record_and_each_image_one_to_caption(tmp_path):
    tokenizer = XLMRTokenizer(SPM)
    rows = [{"image": "a.jpg", "captions": ["a red circle", "a circle"]}, {"image": "b.jpg"}]
    own = read_caption_file(written(tmp_path, *rows, name="own.jsonl"))
    records = own_training_records(own, tokenizer, "own.jsonl")
    assert [record.tokens for record in records] == [
        tuple(tokenizer.encode(text)) for text in ("a red circle", "a circle")
    ]
    assert [(record.image_path, record.image_id) for record in records] == [("a.jpg", 0)] * 2
    assert own_evaluation_records(own) == [CaptionRecord("a.jpg", 0), CaptionRecord("b.jpg", 1)]


def test_own_images_without_any_caption_cannot_be_trained_on(tmp_path):
    own = read_caption_file(written(tmp_path, {"image": "b.jpg"}, name="own.jsonl"))
    with pytest.raises(DataError, match='own.jsonl: no line has "captions"'):
        own_training_records(own, XLMRTokenizer(SPM), "own.jsonl")


def test_a_folder_gives_its_images_by_name_and_nothing_else(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (tmp_path / name).touch()
    assert folder_records(tmp_path) == [CaptionRecord("a.PNG", 0), CaptionRecord("b.jpg", 1)]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"no image in .*files that end in .bmp"):
        folder_records(tmp_path)
