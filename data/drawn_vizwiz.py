"""Drawn photos with spoken questions, in the file layout of the course competition on VizWiz; and lessons before them.

The scenes are those of ``data/drawn_scenes.py``. Somebody who cannot see took the pictures: some are blurred, too dark
or miss their object, and most of ten people call a question about these unanswerable. Two files go beyond the course's:
``valid_annotations.json`` (the answers of valid, which the course keeps to itself, as VizWiz publishes such) and
``pretrain_for_llava.json`` (conversations in whole sentences over other scenes, for a model to start from).
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from data.drawn_captions import describe
from data.drawn_scenes import (
    CELL_PX,
    COLORS,
    PLACES,
    SHAPES,
    SIDE_PX,
    DrawnObject,
    Scene,
    draw_scene,
    render_scene,
)
from data.files import open_atomic
from data.metrics.vizwiz import process_text
from data.metrics.vqa import ten_choose_nine
from data.vizwiz import UNANSWERABLE
from data.vqa_answers import answer_type

SPLITS = ("train", "valid", "pretrain")
ANNOTATIONS_FILE, PRETRAIN_FILE = "valid_annotations.json", "pretrain_for_llava.json"
OBJECT_WEIGHTS = {"train": (6, 3, 2), "valid": (6, 3, 2), "pretrain": (3, 3, 3, 2)}  # for 1, 2, … objects
FLAWED_SHARE = 0.3
FLAWS = ("blurred", "dark", "missed")
BLUR_PX = (9.0, 14.0)
LIGHT = (0.03, 0.12)  # what is left of it in a dark picture
ROUNDS = 4  # questions of a conversation to learn before

# what else people call a thing; the first name is the usual one
SYNONYMS = {
    "circle": ("ball", "round thing", "dot"),
    "square": ("box", "block"),
    "triangle": ("pyramid", "arrow"),
    "star": ("starfish", "decoration"),
    "cross": ("plus", "plus sign"),
    "red": ("dark red", "orange"),
    "green": ("dark green", "teal"),
    "blue": ("navy", "dark blue"),
    "yellow": ("gold", "light brown"),
    "purple": ("violet", "pink"),
    "black": ("dark gray", "dark"),
}
FLAW_REMARKS = {
    "blurred": ("too blurry", "blurry"),
    "dark": ("too dark", "black"),
    "missed": ("nothing", "table"),
}
GIVING_UP = ("unsuitable", "unsuitable image", "i don't know")
OPENINGS = ("", "", "", "", "", "Hi, ", "Okay, ", "Hello, ", "Please tell me, ")
THANKS = ("", "", "", "", "", " Thanks.", " Thank you.", " Thank you very much.", " please")

NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Photo:
    """One row of train or valid before it is drawn.

    Attributes:
        name: of the picture, ``train_00000.jpg``.
        scene: what was there.
        flaw: one of ``FLAWS``, or None where the picture shows it.
        question: as spoken.
        kind: of question: what, color, shape, count, check, place.
        answers: (text, confidence) of ten people.
        answer_type: as in VizWiz: yes/no, number, other, unanswerable.
    """

    name: str
    scene: Scene
    flaw: str | None
    question: str
    kind: str
    answers: tuple[tuple[str, str], ...]
    answer_type: str


@dataclass(frozen=True)
class Lesson:
    """One picture to learn before: (question, sentence) rounds about it."""

    name: str
    scene: Scene
    rounds: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Drawing:
    """All rows of a data set before it is drawn."""

    train: tuple[Photo, ...]
    valid: tuple[Photo, ...]
    pretrain: tuple[Lesson, ...]


@dataclass(frozen=True)
class _Asked:
    """A question without its frills, its true answer, and what somebody says who says something else."""

    text: str
    answer: str
    others: tuple[str, ...]


# --- questions of VizWiz's kind: a function of the scene; None where the question would have no sense ----------------


def _ask_what(scene: Scene, rng: random.Random) -> _Asked | None:
    if len(scene.objects) > 1:
        return None
    item = scene.objects[0]
    texts = ("what is this", "what is this", "what is this", "what's this", "what is in this picture")
    texts += ("what do I have here", "can you tell me what this is", "what am I holding")
    others = (item.shape, f"{item.color} {SYNONYMS[item.shape][0]}", f"{SYNONYMS[item.color][0]} {item.shape}")
    return _Asked(rng.choice(texts), item.name, others + SYNONYMS[item.shape])


def _ask_color(scene: Scene, rng: random.Random) -> _Asked | None:
    item, called = _one_of(scene, "shape", rng)
    if item is None:
        return None
    texts = ("what color is {}", "what color is {}", "what is the color of {}", "can you tell me what color {} is")
    return _Asked(rng.choice(texts).format(called), item.color, SYNONYMS[item.color])


def _ask_shape(scene: Scene, rng: random.Random) -> _Asked | None:
    item, called = _one_of(scene, "color", rng)
    if item is None:
        return None
    texts = ("what shape is {}", "what shape does {} have", "which shape is {}")
    return _Asked(rng.choice(texts).format(called), item.shape, SYNONYMS[item.shape])


def _ask_count(scene: Scene, rng: random.Random) -> _Asked:
    number = len(scene.objects)
    texts = ("how many things are there", "how many objects are on the table", "how many of these do I have")
    return _Asked(rng.choice(texts), str(number), tuple(str(n) for n in (number - 1, number + 1) if n))


def _ask_check(scene: Scene, rng: random.Random) -> _Asked:
    item, truth = rng.choice(scene.objects), rng.random() < 0.5
    if len(scene.objects) == 1 and rng.random() < 0.5:
        color = item.color if truth else rng.choice([c for c in COLORS if c != item.color])
        text = rng.choice(("is this {}", "is it {} or not", "is this thing {}")).format(color)
    else:
        shape = item.shape if truth else rng.choice(sorted(set(SHAPES) - {o.shape for o in scene.objects}))
        text = rng.choice(("is there a {} here", "do you see a {}", "can you see a {} in this picture")).format(shape)
    return _Asked(text, "yes" if truth else "no", ("no" if truth else "yes", "maybe"))


def _ask_place(scene: Scene, rng: random.Random) -> _Asked | None:
    item, called = _one_of(scene, "shape", rng)
    if item is None:
        return None
    near = [p for cell, p in enumerate(PLACES) if abs(cell % 3 - item.cell % 3) + abs(cell // 3 - item.cell // 3) == 1]
    return _Asked(
        rng.choice(("where is {}", "where on the table is {}")).format(called), PLACES[item.cell], tuple(near)
    )


ASKERS: dict[str, tuple[float, Callable[[Scene, random.Random], _Asked | None]]] = {
    "what": (5.0, _ask_what),
    "color": (4.0, _ask_color),
    "shape": (2.0, _ask_shape),
    "count": (1.5, _ask_count),
    "check": (2.0, _ask_check),
    "place": (0.7, _ask_place),
}


def _one_of(scene: Scene, trait: str, rng: random.Random) -> tuple[DrawnObject | None, str]:
    """An object and what to call it: "this" if there is one, else by a trait that no other one has."""
    if len(scene.objects) == 1:
        return scene.objects[0], rng.choice(("this", "this", "this thing", "it"))
    values = [getattr(item, trait) for item in scene.objects]
    found = [item for item in scene.objects if values.count(getattr(item, trait)) == 1]
    if not found:
        return None, ""
    item = rng.choice(found)
    return item, f"the {item.shape}" if trait == "shape" else f"the {item.color} thing"


def _spoken(text: str, rng: random.Random) -> str:
    opening, thanks = rng.choice(OPENINGS), rng.choice(THANKS)
    mark = rng.choice(("?", "?", "?", ""))
    text = opening + text
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text + thanks + mark if thanks == " please" else text + mark + thanks


# --- people -----------------------------------------------------------------------------------------------------------


def _ten_answers(asked: _Asked, flaw: str | None, rng: random.Random) -> tuple[tuple[str, str], ...]:
    """What ten people say: most of them the same, each in words of their own, and how sure they are."""
    if flaw is None:
        usual, others = asked.answer, asked.others + (UNANSWERABLE,)
    else:
        usual, others = UNANSWERABLE, GIVING_UP + FLAW_REMARKS[flaw] + (asked.answer,)
    num_usual = rng.choices((10, 9, 8, 7, 6, 5), (30, 25, 20, 10, 10, 5))[0]
    said = [(_written(usual, rng), rng.choices(("yes", "maybe"), (9, 1))[0]) for _ in range(num_usual)]
    said += [(rng.choice(others), rng.choices(("yes", "maybe", "no"), (3, 5, 2))[0]) for _ in range(10 - num_usual)]
    rng.shuffle(said)
    return tuple(said)


def _written(answer: str, rng: random.Random) -> str:
    """One of the ways to write an answer that the rule of the course holds for equal."""
    if answer == UNANSWERABLE:
        return answer
    if answer.isdigit():
        return rng.choice((answer, answer, NUMBERS[int(answer)]))
    if answer in ("yes", "no"):
        return rng.choice((answer, answer, answer.capitalize()))
    names_a_thing = any(answer.endswith(shape) for shape in SHAPES)
    return rng.choice((answer, answer, answer, answer.capitalize(), f"a {answer}" if names_a_thing else f"{answer}."))


def _answer_type(asked: _Asked, flaw: str | None) -> str:
    return UNANSWERABLE if flaw is not None else answer_type(asked.answer)


# --- lessons ----------------------------------------------------------------------------------------------------------


def _lesson_rounds(scene: Scene, rng: random.Random) -> tuple[tuple[str, str], ...]:
    """A description, then questions with answers in sentences; words of its own, few of those that people speak."""
    rounds = [
        (rng.choice(("Describe the image.", "Give a description of the image.")), rng.choice(describe(scene, rng)))
    ]
    item = rng.choice(scene.objects)
    absent = sorted(set(SHAPES) - {o.shape for o in scene.objects})
    rest = [_about_number(scene), _about_shape(rng.choice([o.shape for o in scene.objects]), True)]
    rest += [_about_shape(rng.choice(absent), False), _about_place(item)]
    for trait, sentence in (("shape", _about_color), ("color", _about_form)):
        values = [getattr(o, trait) for o in scene.objects]
        rest += [sentence(o) for o in scene.objects if values.count(getattr(o, trait)) == 1]
    return tuple(rounds + rng.sample(rest, min(len(rest), ROUNDS - 1)))


def _about_number(scene: Scene) -> tuple[str, str]:
    number = len(scene.objects)
    sentence = "There is 1 object in the image." if number == 1 else f"There are {number} objects in the image."
    return "Count the objects in the image.", sentence


def _about_shape(shape: str, there: bool) -> tuple[str, str]:
    sentence = f"Yes, the image shows a {shape}." if there else f"No, the image does not show a {shape}."
    return f"Does the image show a {shape}?", sentence


def _about_place(item: DrawnObject) -> tuple[str, str]:
    place = PLACES[item.cell]
    return f"In which part of the image is the {item.name}?", f"The {item.name} is at the {place} of the image."


def _about_color(item: DrawnObject) -> tuple[str, str]:
    return f"Which color has the {item.shape}?", f"The color of the {item.shape} is {item.color}."


def _about_form(item: DrawnObject) -> tuple[str, str]:
    return f"Which shape has the {item.color} object?", f"The shape of the {item.color} object is a {item.shape}."


# --- rows and pictures ------------------------------------------------------------------------------------------------


def draw_rows(num_rows: Mapping[str, int], seed: int) -> Drawing:
    """Scenes, questions and answers; no scene of valid is in train, and none of these two among the lessons.

    Valid comes first and stays the same whatever the other sizes. A scene of train may come again, with another
    question, another position within its cells and other noise.

    Args:
        num_rows: pictures of each of ``SPLITS``.
        seed: any integer.
    """
    taken: set[tuple] = set()
    photos: dict[str, tuple[Photo, ...]] = {}
    for split in ("valid", "train"):
        rng, own = random.Random(f"drawn vizwiz, {split}, {seed}"), []
        for row in range(num_rows[split]):
            own.append(_draw_photo(f"{split}_{row:05d}.jpg", _new_scene(rng, split, taken), rng))
        taken |= {photo.scene.key for photo in own}
        photos[split] = tuple(own)
    rng = random.Random(f"drawn vizwiz, pretrain, {seed}")
    lessons = []
    for row in range(num_rows["pretrain"]):
        scene = _new_scene(rng, "pretrain", taken)
        lessons.append(Lesson(f"pretrain_{row:05d}.jpg", scene, _lesson_rounds(scene, rng)))
    return Drawing(photos["train"], photos["valid"], tuple(lessons))


def _new_scene(rng: random.Random, split: str, taken: set[tuple]) -> Scene:
    weights = OBJECT_WEIGHTS[split]
    while True:
        num_objects = rng.choices(range(1, len(weights) + 1), weights)[0]
        for _ in range(100):  # keeps the number of objects as weighted; only 1,620 scenes have one object
            scene = draw_scene(rng, num_objects)
            if scene.key not in taken:
                return scene


def _draw_photo(name: str, scene: Scene, rng: random.Random) -> Photo:
    kinds, weights = list(ASKERS), [weight for weight, _ in ASKERS.values()]
    asked = None
    while asked is None:
        kind = rng.choices(kinds, weights)[0]
        asked = ASKERS[kind][1](scene, rng)
    flaw = rng.choice(FLAWS) if rng.random() < FLAWED_SHARE else None
    answers = _ten_answers(asked, flaw, rng)
    return Photo(name, scene, flaw, _spoken(asked.text, rng), kind, answers, _answer_type(asked, flaw))


def render_photo(photo: Photo, noise: np.random.Generator) -> Image.Image:
    """The picture, ``SIDE_PX`` square: of the scene, or of what the camera made of it."""
    picture = render_scene(photo.scene, noise)
    if photo.flaw == "blurred":
        return picture.filter(ImageFilter.GaussianBlur(noise.uniform(*BLUR_PX)))
    if photo.flaw == "dark":
        pixels = np.asarray(picture, dtype=np.float32) * noise.uniform(*LIGHT)
        pixels += 3 * noise.standard_normal(pixels.shape, dtype=np.float32)
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if photo.flaw == "missed":  # held much too near, beside everything
        empty = sorted(set(range(9)) - {item.cell for item in photo.scene.objects})
        cell = int(noise.choice(empty))
        left, top = (cell % 3) * CELL_PX, (cell // 3) * CELL_PX
        return picture.crop((left, top, left + CELL_PX, top + CELL_PX)).resize((SIDE_PX, SIDE_PX), Image.BICUBIC)
    return picture


def write_drawn_vizwiz(folder: Path, drawing: Drawing, seed: int) -> None:
    """Draw the pictures of ``draw_rows`` and write the files; the same bytes each time.

    Args:
        folder: made if need be; gets ``train/``, ``valid/``, ``pretrain/`` and four JSON files.
        drawing: what ``draw_rows`` gave.
        seed: of the noise on the pictures.
    """
    for place, split in enumerate(SPLITS):
        noise = np.random.default_rng([seed % 2**64, 20 + place])
        (folder / split).mkdir(parents=True, exist_ok=True)
        for row in getattr(drawing, split):
            picture = render_scene(row.scene, noise) if isinstance(row, Lesson) else render_photo(row, noise)
            picture.save(folder / split / row.name, quality=95)
    for name, content in (
        ("train.json", _columns(drawing.train, with_answers=True)),
        ("valid.json", _columns(drawing.valid, with_answers=False)),
        (ANNOTATIONS_FILE, [_annotation(photo) for photo in drawing.valid]),
        (PRETRAIN_FILE, [_conversation(lesson) for lesson in drawing.pretrain]),
    ):
        with open_atomic(folder / name) as file:
            file.write(json.dumps(content) + "\n")


def _columns(photos: Iterable[Photo], *, with_answers: bool) -> dict[str, dict[str, Any]]:
    """As the course writes its files: columns with row numbers as keys."""
    photos = list(photos)
    columns: dict[str, dict[str, Any]] = {
        "image": {str(row): photo.name for row, photo in enumerate(photos)},
        "question": {str(row): photo.question for row, photo in enumerate(photos)},
    }
    if with_answers:
        columns["answers"] = {str(row): _answer_records(photo) for row, photo in enumerate(photos)}
    return columns


def _answer_records(photo: Photo) -> list[dict[str, str]]:
    return [{"answer_confidence": confidence, "answer": text} for text, confidence in photo.answers]


def _annotation(photo: Photo) -> dict[str, Any]:
    return {
        "image": photo.name,
        "question": photo.question,
        "answers": _answer_records(photo),
        "answer_type": photo.answer_type,
        "answerable": int(photo.flaw is None),
    }


def _conversation(lesson: Lesson) -> dict[str, Any]:
    turns = []
    for question, sentence in lesson.rounds:
        turns.append({"from": "human", "value": question if turns else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": sentence})
    return {"id": lesson.name.removesuffix(".jpg"), "image": lesson.name, "conversations": turns}


# --- without looking --------------------------------------------------------------------------------------------------


def text_only_scores(drawing: Drawing) -> dict[str, float]:
    """Accuracy on valid, by the rule of the course, of guesses that never look at a picture.

    Returns:
        Fractions: of the answer that is best over all of train; of the best one for each question as normalised (the
        former where the question is new); of the best one for each kind of question, which no guesser is told.
    """
    scores = {}
    for name, group in (
        ("one answer for all", lambda photo: ""),
        ("best answer by question", lambda photo: process_text(photo.question)),
        ("best answer by kind of question", lambda photo: photo.kind),
    ):
        groups: dict[str, list[Photo]] = {}
        for photo in drawing.train:
            groups.setdefault(group(photo), []).append(photo)
        guesses = {key: _best_guess(photos) for key, photos in groups.items()}
        usual = _best_guess(drawing.train)
        found = [_score(guesses.get(group(photo), usual), photo) for photo in drawing.valid]
        scores[name] = sum(found) / len(found)
    return scores


def _best_guess(photos: Iterable[Photo]) -> str:
    worth: Counter[str] = Counter()
    for photo in photos:
        answers = [process_text(text) for text, _ in photo.answers]
        for answer in dict.fromkeys(answers):
            worth[answer] += ten_choose_nine(answer, answers)
    return worth.most_common(1)[0][0]


def _score(guess: str, photo: Photo) -> float:
    return ten_choose_nine(guess, [process_text(text) for text, _ in photo.answers])
