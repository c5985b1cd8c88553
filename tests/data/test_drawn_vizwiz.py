import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import drawn_vizwiz as drawn
from data.drawn_scenes import SIDE_PX
from data.errors import DataError
from data.llava_dataset import read_conversations
from data.metrics.vizwiz import process_text
from data.vizwiz import UNANSWERABLE, choose_answer, read_rows
from scripts import draw_scenes

SMALL = {"train": 120, "valid": 60, "pretrain": 30}


@pytest.fixture(scope="module")
def drawing():
    return drawn.draw_rows(SMALL, seed=3)


@pytest.fixture(scope="module")
def folder(drawing, tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn")
    drawn.write_drawn_vizwiz(path, drawing, seed=3)
    return path


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def chosen(photo):
    return choose_answer([text for text, _ in photo.answers])[0]


def test_the_reader_of_the_course_reads_both_splits(folder, drawing):
    train, valid = read_rows(folder / "train.json"), read_rows(folder / "valid.json")
    assert [row.question for row in train] == [photo.question for photo in drawing.train]
    assert [row.image for row in train[:2]] == ["train_00000.jpg", "train_00001.jpg"]
    assert [len(row.answers) for row in train] == [10] * 120
    assert [row.image for row in valid] == [f"valid_{number:05d}.jpg" for number in range(60)]
    assert not any(row.answers or row.answer_type for row in valid)
    assert {answer.confidence for row in train for answer in row.answers} == {"yes", "maybe", "no"}
    columns = json.loads((folder / "train.json").read_text())
    assert list(columns) == ["image", "question", "answers"]
    assert list(columns["image"])[:3] == ["0", "1", "2"]


def test_the_hidden_answers_are_in_the_annotations_alone(folder, drawing):
    assert list(json.loads((folder / "valid.json").read_text())) == ["image", "question"]
    hidden = read_rows(folder / "valid_annotations.json")
    for row, asked, photo in zip(hidden, read_rows(folder / "valid.json"), drawing.valid, strict=True):
        assert (row.image, row.question) == (asked.image, asked.question)
        assert [(answer.text, answer.confidence) for answer in row.answers] == list(photo.answers)
        assert row.answer_type == photo.answer_type
        assert row.is_answerable == (photo.flaw is None)


def test_every_picture_is_there(folder):
    for split, number in SMALL.items():
        names = sorted(path.name for path in (folder / split).iterdir())
        assert names == [f"{split}_{row:05d}.jpg" for row in range(number)]
        with Image.open(folder / split / names[0]) as picture:
            assert (picture.size, picture.mode) == ((SIDE_PX, SIDE_PX), "RGB")


def test_most_people_agree_and_call_flawed_pictures_unanswerable():
    photos = drawn.draw_rows({"train": 2000, "valid": 1, "pretrain": 1}, seed=0).train
    flaws = Counter(photo.flaw for photo in photos)
    assert 0.27 < 1 - flaws[None] / len(photos) < 0.33
    assert min(flaws[name] for name in drawn.FLAWS) > 0.08 * len(photos)
    for photo in photos:
        said = Counter(process_text(text) for text, _ in photo.answers)
        assert said.most_common(1)[0][1] >= 5
        assert (chosen(photo) == UNANSWERABLE) == (photo.flaw is not None) == (photo.answer_type == UNANSWERABLE)
    assert sum(len(set(photo.answers)) > 1 for photo in photos) > 0.5 * len(photos)


def test_a_flaw_can_be_seen(drawing):
    shown = {flaw: [] for flaw in (None, *drawn.FLAWS)}
    for photo in drawing.train:
        pixels = np.asarray(drawn.render_photo(photo, np.random.default_rng(1)), dtype=float)
        shown[photo.flaw].append(pixels)
    assert max(pixels.mean() for pixels in shown["dark"]) < 40 < min(pixels.mean() for pixels in shown[None])

    def edge(pixels):  # of the strongest step between pixels a few apart
        return np.abs(pixels[:, 4:] - pixels[:, :-4]).max()

    sharp = np.median([edge(pixels) for pixels in shown[None]])
    assert np.median([edge(pixels) for pixels in shown["blurred"]]) < 0.3 * sharp
    middles = [pixels[24:72, 24:72].reshape(-1, 3) for pixels in shown["missed"]]
    assert max(middle.std(axis=0).max() for middle in middles) < 12  # plain background


def test_answers_follow_from_the_scene(drawing):
    checked = Counter()
    for photo in (*drawing.train, *drawing.valid):
        if photo.flaw is not None:
            continue
        objects, said, words = photo.scene.objects, chosen(photo), process_text(photo.question).split()
        checked[photo.kind] += 1
        if photo.kind == "what":
            assert [said] == [item.name for item in objects]
        elif photo.kind == "count":
            assert said == str(len(objects))
        elif photo.kind == "check":
            traits = {trait for item in objects for trait in (item.color, item.shape)}
            (asked,) = [word for word in words if word in (*drawn.SHAPES, *drawn.COLORS)]
            assert said == ("yes" if asked in traits else "no")
        elif photo.kind in ("color", "place"):
            (item,) = [o for o in objects if len(objects) == 1 or o.shape in words]
            assert said == (item.color if photo.kind == "color" else drawn.PLACES[item.cell])
        else:
            (item,) = [o for o in objects if len(objects) == 1 or o.color in words]
            assert said == item.shape
    assert set(checked) == set(drawn.ASKERS)


def test_no_scene_is_in_two_splits(drawing):
    train, valid, lessons = ({row.scene.key for row in getattr(drawing, split)} for split in drawn.SPLITS)
    assert not train & valid
    assert not lessons & (train | valid)


def test_lessons_are_conversations_in_sentences(folder, drawing):
    samples = read_conversations(folder / "pretrain_for_llava.json")
    assert [sample.image for sample in samples] == [lesson.name for lesson in drawing.pretrain]
    answers = {text for sample in samples for role, text in sample.turns if role == "gpt"}
    assert all(answer.endswith(".") and len(answer.split()) > 2 for answer in answers)
    said = " ".join(text for sample in samples for _, text in sample.turns).lower()
    assert UNANSWERABLE not in said
    assert "what is this" not in said


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    drawn.write_drawn_vizwiz(tmp_path, drawn.draw_rows(SMALL, seed=3), seed=3)
    assert files_of(tmp_path) == files_of(folder)
    other = drawn.draw_rows(SMALL, seed=4)
    assert [photo.question for photo in other.valid] != [row.question for row in read_rows(folder / "valid.json")]


def test_valid_does_not_depend_on_the_other_sizes(drawing):
    assert drawn.draw_rows({**SMALL, "train": 7, "pretrain": 2}, seed=3).valid == drawing.valid


def test_guessing_without_looking_is_far_from_right():
    scores = drawn.text_only_scores(drawn.draw_rows({"train": 2000, "valid": 300, "pretrain": 1}, seed=0))
    assert list(scores) == ["one answer for all", "best answer by question", "best answer by kind of question"]
    assert all(0.25 < score < 0.55 for score in scores.values()), scores


def test_the_program_draws_keeps_and_replaces(tmp_path, capsys):
    flags = ["--layout", "vizwiz", "--output", str(tmp_path / "d"), "--num_train", "30", "--num_val", "8"]
    draw_scenes.main([*flags, "--num_pretrain", "5"])
    out = capsys.readouterr().out
    assert "drew 30 train + 8 val + 5 pretrain images, seed 0, layout vizwiz" in out
    assert "best answer by question" in out
    before = files_of(tmp_path / "d")
    draw_scenes.main([*flags, "--num_pretrain", "5"])
    assert "holds this drawing already" in capsys.readouterr().out
    assert files_of(tmp_path / "d") == before
    with pytest.raises(DataError, match=r"\(30 train \+ 8 val \+ 5 pretrain images.*\) than the one asked for \("):
        draw_scenes.main([*flags, "--num_pretrain", "4"])
    draw_scenes.main([*flags, "--num_pretrain", "4", "--overwrite"])
    assert len(list((tmp_path / "d/pretrain").iterdir())) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_pretrain", "0"], "--num_pretrain must be at least 1, got 0"),
        (["--regions"], "--regions goes with --layout vqav2"),
    ],
)
def test_bad_sizes_are_errors(tmp_path, flags, message):
    with pytest.raises(DataError, match=message):
        draw_scenes.main(["--layout", "vizwiz", "--output", str(tmp_path / "d"), *flags])
    assert not (tmp_path / "d").exists()


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(DataError, match=r"has a train.json that this program did not draw"):
        draw_scenes.main(["--layout", "vizwiz", "--output", str(tmp_path), "--overwrite"])
    assert (tmp_path / "train.json").read_text() == "{}"
