"""VL-BERT's data: image sets, pairing by id, mirrored questions and answers, sizes, batches."""

import json

import numpy as np
import pytest
import torch

from data.box_features import Regions
from data.errors import DataError
from data.own_vqa import own_answer
from data.tokenizers.wordpiece import WordPieceTokenizer
from data.vlbert_answers import AnswerList
from data.vlbert_dataset import VLBertCollate, VLBertDataset
from data.vlbert_files import region_folder
from data.vlbert_samplers import ShardBatchSampler
from data.vlbert_vqa import Question, RegionPlaces, make_records, read_own_questions, read_questions
from tests.data.vqav2_tree import annotation, edit_json, question, write_json, write_vqav2

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] is the cat left right or ? circle red on".split()
TOKENIZER = WordPieceTokenizer(WORDS)
ANSWERS = AnswerList(["<unk>", "left", "right", "yes", "right side", "left side"])


class FakeRegions:
    """Two regions for every image below 100."""

    def image_ids(self):
        return set(range(100))

    def sizes(self):
        return dict.fromkeys(range(100), (80, 60))

    def regions(self, image_id):
        boxes = np.array([[8, 6, 16, 12], [0, 0, 40, 60]], dtype=np.float32)
        features = np.full((2, 2048), image_id, dtype=np.float32)
        return Regions(boxes, features, features[0] + 0.5, (80, 60))


def records(text, answers, place="train2014"):
    return make_records([Question(5, 3, place, "x_3.jpg", text, tuple(answers))], TOKENIZER, ANSWERS, max_words=9)


def test_image_sets_are_read_in_order_and_joined(tmp_path):
    folder = write_vqav2(tmp_path)
    found = read_questions("vqa", "val2014+train2014", folder)
    assert [q.question_id for q in found][:2] == [101000, 101001]
    assert len(found) == 60
    assert found[0].place == "val2014"
    assert found[0].image == "val2014/COCO_val2014_000000000101.jpg"
    assert found[-1].place == "train2014"
    assert len(found[0].answers) == 10
    test = read_questions("vqa", "test-dev2015", folder)
    assert [(q.place, q.answers) for q in test] == [("test2015", ())]


def test_questions_and_annotations_are_paired_by_id_not_by_place(tmp_path):
    folder = write_vqav2(tmp_path)
    before = {q.question_id: q.answers for q in read_questions("vqa", "train2014", folder)}
    edit_json(folder / "vqa/v2_mscoco_train2014_annotations.json", lambda c: c["annotations"].reverse())
    assert {q.question_id: q.answers for q in read_questions("vqa", "train2014", folder)} == before


def test_a_minival_of_val_images_is_an_image_set(tmp_path):
    write_json(tmp_path / "vqa/v2_OpenEnded_mscoco_minival2014_questions.json", {"questions": [question(9, 0)]})
    write_json(tmp_path / "vqa/v2_mscoco_minival2014_annotations.json", {"annotations": [annotation(9, 0, "red")]})
    (found,) = read_questions("vqa", "minival2014", tmp_path)
    assert found.place == "val2014"


def test_vqa_cp_reads_plain_lists_and_finds_each_image_by_its_split(tmp_path):
    rows = [question(i, 0) | {"coco_split": split} for i, split in ((1, "train2014"), (2, "val2014"))]
    write_json(tmp_path / "vqa/vqacp_v2_test_questions.json", rows)
    answers = [annotation(i, 0, "red") | {"coco_split": "x"} for i in (1, 2)]
    write_json(tmp_path / "vqa/vqacp_v2_test_annotations.json", answers)
    found = read_questions("vqa_cp", "val", tmp_path)
    assert [q.place for q in found] == ["train2014", "val2014"]
    rows[0]["coco_split"] = "mars"
    write_json(tmp_path / "vqa/vqacp_v2_test_questions.json", rows)
    with pytest.raises(DataError, match="question 1000: coco_split 'mars' must be"):
        read_questions("vqa_cp", "val", tmp_path)


@pytest.mark.parametrize(("dataset", "name"), [("vqa", "train"), ("vqa_cp", "train2014"), ("vqa", "train2014+")])
def test_an_unknown_image_set_is_refused_with_those_that_there_are(tmp_path, dataset, name):
    with pytest.raises(DataError, match=f"of {dataset}: choose"):
        read_questions(dataset, name, write_vqav2(tmp_path))


def test_mirroring_exchanges_left_and_right_in_question_and_answers():
    (record,) = records("is the cat left or right?", ["left"] * 3 + ["right side"] * 7)
    tokens, labels, scores = record.flipped
    swapped = {8: 9, 9: 8}
    assert tokens == tuple(swapped.get(token, token) for token in record.tokens)
    assert dict(zip(record.labels, record.scores, strict=True)) == {1: 0.9, 4: 1.0}
    assert dict(zip(labels, scores, strict=True)) == {2: 0.9, 5: 1.0}


def test_a_question_without_sides_has_no_second_form():
    (record,) = records("is the cat red?", ["yes"] * 10)
    assert record.flipped is None


def test_answers_of_ones_own_data_are_normalised_and_scaled_to_ten_people():
    (record,) = records("is the cat red?", ["Yes!"], place="own")
    assert dict(zip(record.labels, record.scores, strict=True)) == {3: 1.0}
    (record,) = records("is the cat red?", ["Yes!"])
    assert record.labels == ()


def test_a_question_beyond_the_positions_is_refused():
    with pytest.raises(DataError, match="question 5 has 10 word pieces, 1 to 9 are possible"):
        records("red " * 10, ["yes"])


def test_a_mirrored_sample_has_mirrored_boxes_and_the_same_features():
    regions = RegionPlaces({"train2014": FakeRegions()}, "nowhere")
    found = records("is the cat left?", ["left"] * 10)
    plain, flipped = (
        VLBertDataset(found, regions, flip_prob=p).sample(0, np.random.default_rng(0)) for p in (0.0, 1.0)
    )
    assert [part.tolist() for part in plain.features] == [part.tolist() for part in flipped.features]
    width = plain.info[0]
    assert torch.allclose(flipped.boxes[1:, 0], (width - 1 - plain.boxes[1:, 2]).clamp(0))
    assert plain.boxes[0].tolist() == pytest.approx([0, 0, 790, 590])  # the whole image, ten times as large
    assert plain.features[0].shape == (1, 2048)
    assert np.unique(plain.features[0]).tolist() == [3.5]
    assert (plain.tokens, flipped.tokens) == (found[0].tokens, found[0].flipped[0])
    assert (plain.labels, flipped.labels) == ((1,), (2,))


def test_a_batch_is_padded_and_has_the_targets():
    regions = RegionPlaces({"train2014": FakeRegions()}, "nowhere")
    found = [*records("is the cat red?", ["yes"] * 10), *records("red?", ["left"])]
    dataset = VLBertDataset(found, regions)
    batch = VLBertCollate(len(ANSWERS))([dataset.sample(place, np.random.default_rng(0)) for place in (0, 1)])
    assert batch["boxes"].shape == (2, 3, 2052)
    assert batch["question"].tolist()[1] == [*found[1].tokens, 0, 0, 0]
    assert batch["targets"].tolist() == [[0, 0, 0, 1, 0, 0], [0, pytest.approx(0.3), 0, 0, 0, 0]]
    assert batch["sizes"][:, :2].tolist() == [[800, 600]] * 2


def test_cocos_sizes_win_over_those_of_the_box_files(tmp_path):
    write_json(tmp_path / "annotations/instances_train2014.json", {"images": [{"id": 3, "width": 40, "height": 60}]})
    regions = RegionPlaces({"train2014": FakeRegions()}, tmp_path)
    found = records("is the cat red?", ["yes"])
    assert regions.size(found[0], (80, 60)) == (40, 60)
    assert regions.is_wide(found) == [0]
    assert RegionPlaces({"train2014": FakeRegions()}, "nowhere").is_wide(found) == [1]
    regions.check(found)
    (tmp_path / "annotations/instances_train2014.json").write_text(json.dumps({"images": [{"id": 4}]}))
    with pytest.raises(DataError, match="each with id, width and height"):
        RegionPlaces({"train2014": FakeRegions()}, tmp_path)


def test_images_without_regions_are_counted_and_named():
    regions = RegionPlaces({"train2014": FakeRegions()}, "nowhere")
    asked = [Question(n, n, "train2014", "x", "red?", ()) for n in (99, 100, 101)]
    with pytest.raises(DataError, match="2 of 3 images of train2014 have no box file, the first: 100, 101"):
        regions.check(make_records(asked, TOKENIZER, ANSWERS, max_words=9))


@pytest.mark.parametrize(
    ("place", "boxes", "dataset", "name"),
    [
        ("train2014", "10-100ada", "vqa", "trainval2014_resnet101_faster_rcnn_genome"),
        ("val2014", "36", "vqa", "trainval_resnet101_faster_rcnn_genome_36"),
        ("val2014", "36", "vqa_cp", "trainval2014_resnet101_faster_rcnn_genome_36"),
        ("test2015", "36", "vqa", "test2015_resnet101_faster_rcnn_genome_36"),
    ],
)
def test_names_of_the_box_folders(place, boxes, dataset, name):
    assert region_folder(place, boxes, dataset) == name


def test_own_images_are_known_by_the_number_at_the_end_of_their_names(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"image": "a/photo_0017.jpg", "question": "red?", "answers": ["yes"]}\n')
    (found,) = read_own_questions(path)
    assert (found.image_id, found.question_id, found.answers) == (17, 0, ("yes",))
    path.write_text('{"image": "photo.jpg", "question": "red?"}\n')
    with pytest.raises(DataError, match=r"own.jsonl:1: the name of photo.jpg must end in a number"):
        read_own_questions(path)
    lines = [{"image": f"{number}.jpg", "question": "what?"} for number in range(2)]
    for ids, message in (
        ((7, 7), "question_id 7 stands at .*own.jsonl:1 already"),
        ((7, None), "question_id must stand on every line or on none"),
    ):
        rows = [line | ({"question_id": i} if i else {}) for line, i in zip(lines, ids, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=f"own.jsonl:2: {message}"):
            read_own_questions(path)


def test_every_answer_of_ones_own_list_is_found_again():
    said = ["A dog", "Two", "None", "The park", "Yes!", "New\nYork"]
    built = AnswerList.build(map(own_answer, said), min_count=1)
    asked = [Question(n, n, "own", "x_1.jpg", "red?", (text,)) for n, text in enumerate(said)]
    found = make_records(asked, TOKENIZER, built, max_words=9)
    assert [record.scores for record in found] == [(1.0,)] * len(said)
    assert all("\n" not in entry for entry in built.entries)


def test_an_answer_list_built_from_data_has_the_most_frequent_ones():
    said = ["Yes"] * 3 + ["no!"] * 2 + ["maybe"]
    assert AnswerList.build(said, min_count=2).answers == ("<unk>", "yes", "no")
    assert AnswerList.build(said, min_count=1, most=2).answers == ("<unk>", "yes")
    with pytest.raises(DataError, match="none of the 3 different answers occurs 9 times"):
        AnswerList.build(said, min_count=9)


@pytest.mark.parametrize("groups", [None, [0, 1] * 13])
def test_every_process_takes_the_same_number_of_whole_steps_and_a_resume_goes_on_in_them(groups):
    samplers = [
        ShardBatchSampler(26, 3, accumulation_steps=2, rank=rank, world_size=2, group_of=groups) for rank in (0, 1)
    ]
    assert {sampler.steps_per_epoch for sampler in samplers} == {2}
    for sampler in samplers:
        sampler.set_position(4)
        whole = list(sampler)
        assert len(whole) == len(sampler) == 4
        sampler.set_position(4, 1)
        assert list(sampler) == whole[2:]
        if groups:
            assert all(len({groups[key.index] for key in batch}) == 1 for batch in whole)
