import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import drawn_scenes as drawn
from data.errors import DataError

SMALL = {"train2014": 40, "val2014": 8, "test2015": 9}


@pytest.fixture(scope="module")
def images():
    return drawn.draw_splits(SMALL, seed=3)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn")
    drawn.write_drawn_vqav2(path, images, seed=3)
    return path


def read(folder, name):
    return json.loads((folder / "vqa" / name).read_text())


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def questions_of(images, *splits):
    return [(image.scene, question) for split in splits for image in images[split] for question in image.questions]


def true_answer(scene, question):
    """The answer worked out from the words of the question alone, by other means than the ones that made it."""
    words = question.text.rstrip("?").split()
    objects = scene.objects
    singular = {plural: shape for shape, plural in drawn.SHAPES.items()}
    shapes = [singular.get(w, w) for w in words if w in drawn.SHAPES or w in singular]
    colors = [w for w in words if w in drawn.COLORS]
    if question.text == "what color is the background?":
        return scene.background
    if words[:2] == ["how", "many"]:
        return str(len([o for o in objects if not shapes or o.shape == shapes[0]]))
    if "above" in words or "below" in words or "of" in words:
        first, second = (next(o for o in objects if (o.color, o.shape) == pair) for pair in zip(colors, shapes))  # noqa: B905
        row, column = (first.cell // 3 - second.cell // 3), (first.cell % 3 - second.cell % 3)
        holds = {"above": row < 0, "below": row > 0, "left": column < 0, "right": column > 0}
        return "yes" if holds[next(w for w in words if w in holds)] else "no"
    if words[:2] in (["is", "there"], ["are", "there"]):
        found = [o for o in objects if o.shape == shapes[0] and (not colors or o.color == colors[0])]
        return "yes" if found else "no"
    if words[:2] == ["is", "the"]:
        (item,) = (o for o in objects if o.shape == shapes[0])
        return "yes" if item.color == colors[0] else "no"
    found = [o for o in objects if (not shapes or o.shape == shapes[0]) and (not colors or o.color == colors[0])]
    assert len(found) == 1, f"{question.text} does not name one object"
    traits = {"color": found[0].color, "shape": found[0].shape, "size": found[0].size}
    return drawn.PLACES[found[0].cell] if words[0] == "where" else traits[words[1]]


def test_every_answer_is_true_and_every_question_names_one_thing(images):
    for scene, question in questions_of(images, *drawn.SPLITS):
        assert question.answer == true_answer(scene, question), question.text


def test_all_kinds_of_questions_occur(images):
    kinds = {question.kind for _, question in questions_of(images, "train2014")}
    assert kinds == {
        "color", "shape", "place", "exists", "shape exists", "color check", "relation", "count", "count all",
        "background", "size",
    }  # fmt: skip


def test_each_image_has_six_different_questions(images):
    for split in drawn.SPLITS:
        for image in images[split]:
            assert len({question.text for question in image.questions}) == 6


def test_objects_of_a_scene_differ_in_place_and_in_look(images):
    for image in images["train2014"]:
        objects = image.scene.objects
        assert len({o.cell for o in objects}) == len(objects) == len({o.name for o in objects})


def test_no_scene_occurs_twice_in_any_split():
    images = drawn.draw_splits({"train2014": 1500, "val2014": 200, "test2015": 200}, seed=0)
    keys = [image.scene.key for split in drawn.SPLITS for image in images[split]]
    assert len(set(keys)) == len(keys) == 1900


def test_test_and_val_stay_the_same_when_train_grows(images):
    larger = drawn.draw_splits({**SMALL, "train2014": 60}, seed=3)
    assert larger["val2014"] == images["val2014"]
    assert larger["test2015"] == images["test2015"]
    assert larger["train2014"][:40] == images["train2014"]


def test_a_second_drawing_is_equal_byte_for_byte(folder, tmp_path):
    drawn.write_drawn_vqav2(tmp_path, drawn.draw_splits(SMALL, seed=3), seed=3)
    assert files_of(tmp_path) == files_of(folder)


def test_another_seed_draws_other_scenes(images):
    other = drawn.draw_splits(SMALL, seed=4)
    assert not {i.scene.key for i in other["train2014"]} <= {i.scene.key for i in images["train2014"]}


def test_all_pictures_differ(folder):
    contents = [path.read_bytes() for path in folder.rglob("*.jpg")]
    assert len(set(contents)) == len(contents) == sum(SMALL.values())


def test_pictures_are_rgb_jpegs_under_coco_names(folder):
    for split, number in SMALL.items():
        paths = list((folder / split).iterdir())
        assert len(paths) == number
        for path in paths:
            assert path.name.startswith(f"COCO_{split}_")
            assert len(path.stem.rsplit("_", 1)[1]) == 12
            with Image.open(path) as picture:
                assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 96))


def test_the_middle_of_every_object_has_the_named_color(images, folder):
    for image in images["train2014"]:
        with Image.open(folder / image.split / image.file_name) as picture:
            pixels = np.asarray(picture).astype(float)
        for item in image.scene.objects:
            x = round((item.cell % 3 + 0.5) * 32 + item.offset_px[0])
            y = round((item.cell // 3 + 0.5) * 32 + item.offset_px[1])
            mean = pixels[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
            nearest = min(drawn.COLORS, key=lambda name: np.abs(mean - drawn.COLORS[name]).sum())
            assert nearest == item.color


def test_big_objects_cover_more_pixels_than_small_ones():
    noise = np.random.default_rng(0)
    covered = {}
    for size in drawn.RADIUS_PX:
        scene = drawn.Scene("white", (drawn.DrawnObject(4, "circle", "black", size, (0.0, 0.0)),))
        covered[size] = int((np.asarray(drawn.render_scene(scene, noise)).mean(axis=2) < 128).sum())
    assert covered["big"] == pytest.approx(np.pi * 14**2, rel=0.1)
    assert covered["small"] == pytest.approx(np.pi * 8.5**2, rel=0.1)


@pytest.mark.parametrize("split", ["train2014", "val2014", "test2015", "test-dev2015"])
def test_question_files_have_the_official_keys(folder, split):
    content = read(folder, f"v2_OpenEnded_mscoco_{split}_questions.json")
    assert set(content) == {"info", "task_type", "data_type", "license", "data_subtype", "questions"}
    assert set(content["info"]) == {"description", "url", "version", "year", "contributor", "date_created"}
    assert set(content["license"]) == {"url", "name"}
    assert (content["task_type"], content["data_type"], content["data_subtype"]) == ("Open-Ended", "mscoco", split)
    for record in content["questions"]:
        assert set(record) == {"image_id", "question", "question_id"}
        assert record["question_id"] // 1000 == record["image_id"]


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("train2014", "v2_mscoco_train2014_annotations.json"),
        ("val2014", "v2_mscoco_val2014_annotations.json"),
        ("test2015", "drawn_test2015_annotations.json"),
    ],
)
def test_annotation_files_have_the_official_keys_and_the_order_of_the_questions(folder, split, name):
    content = read(folder, name)
    questions = read(folder, f"v2_OpenEnded_mscoco_{split}_questions.json")["questions"]
    assert set(content) == {"info", "license", "data_type", "data_subtype", "annotations"}
    assert content["data_subtype"] == split
    assert [a["question_id"] for a in content["annotations"]] == [q["question_id"] for q in questions]
    for record in content["annotations"]:
        assert set(record) == {
            "question_id", "image_id", "question_type", "answer_type", "multiple_choice_answer", "answers",
        }  # fmt: skip
        assert [answer["answer_id"] for answer in record["answers"]] == list(range(1, 11))
        assert {answer["answer_confidence"] for answer in record["answers"]} <= {"yes", "maybe", "no"}
        assert record["answer_type"] in ("yes/no", "number", "other")
        assert record["question_type"] in drawn.QUESTION_TYPES


def test_question_ids_are_unique_over_the_splits(folder):
    ids = [
        record["question_id"]
        for split in drawn.SPLITS
        for record in read(folder, f"v2_OpenEnded_mscoco_{split}_questions.json")["questions"]
    ]
    assert len(set(ids)) == len(ids)


def test_test_dev_is_a_proper_part_of_test(folder):
    part, whole = (
        {q["question_id"] for q in read(folder, f"v2_OpenEnded_mscoco_{split}_questions.json")["questions"]}
        for split in ("test-dev2015", "test2015")
    )
    assert part
    assert part < whole


def test_every_question_has_a_kind_on_file(folder, images):
    kinds = read(folder, "drawn_kinds.json")
    assert set(kinds) == {
        str(record["question_id"]) for split in drawn.SPLITS for record in drawn.question_records(images[split])
    }


def test_at_most_one_of_ten_people_slips_and_then_in_a_known_answer():
    images = drawn.draw_splits({"train2014": 300, "val2014": 1, "test2015": 1}, seed=0)["train2014"]
    known = {question.answer for image in images for question in image.questions}
    pairs = [(q, a) for image in images for q, a in zip(image.questions, image.answers, strict=True)]
    wrong = [[text for text in answers if text != question.answer] for question, answers in pairs]
    assert max(map(len, wrong)) == 1
    assert {text for texts in wrong for text in texts} <= known
    assert 0.25 < sum(map(len, wrong)) / len(wrong) < 0.35


def test_half_of_the_yes_no_answers_are_yes():
    images = drawn.draw_splits({"train2014": 1000, "val2014": 1, "test2015": 1}, seed=0)["train2014"]
    answers = Counter(q.answer for image in images for q in image.questions if q.answer_type == "yes/no")
    assert 0.45 < answers["yes"] / answers.total() < 0.55


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_of_a_small_drawing_passes_the_threshold_of_the_index(seed):
    images = drawn.draw_splits({"train2014": 300, "val2014": 30, "test2015": 30}, seed)
    counts = Counter(question.answer for _, question in questions_of(images, "train2014", "val2014"))
    assert len(counts) == 32
    assert min(counts.values()) >= 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("what color is the star?", "what color is the"),
        ("what shape is the red object?", "what"),
        ("is there a red star?", "is there a"),
        ("are there any stars?", "are there any"),
        ("how many people are in this?", "how many people are in"),
        ("How many stars?", "how many"),
        ("isthmus or not?", "none of the above"),
    ],
)
def test_question_type_is_the_longest_prefix_in_whole_words(text, expected):
    assert drawn.question_type(text) == expected


def test_there_are_65_different_question_types():
    assert len(set(drawn.QUESTION_TYPES)) == len(drawn.QUESTION_TYPES) == 65


def test_a_scene_can_hold_nine_objects():
    scene = drawn.draw_scene(random.Random(0), 9)
    assert [item.cell for item in scene.objects] == list(range(9))


@pytest.mark.parametrize("split", drawn.SPLITS)
def test_an_empty_split_is_refused_by_name(split):
    with pytest.raises(DataError, match=f"{split} needs at least 1 image, got 0"):
        drawn.draw_splits({**SMALL, split: 0}, seed=0)
