"""Drawn scenes with questions, in the file layout of VQA v2: a data set that anyone can make in seconds.

A scene is 1 to 4 coloured shapes on a 3 x 3 grid. The answers follow from the scene and hardly from the question, so
that a tiny model trained from scratch has to look. Folders, names and JSON keys are the official ones, read by the same
code as the real data. Two files go beyond them: ``vqa/drawn_test2015_annotations.json`` (the test answers, which VQA v2
keeps to itself) and ``vqa/drawn_kinds.json`` (question id to kind of question, for scores per kind).

Other layouts (captions, VizWiz) can be written from the same ``DrawnImage`` records, without images: ``draw_splits``.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.errors import DataError
from data.files import open_atomic
from data.vqa_answers import answer_type

CELL_PX = 32
SIDE_PX = 3 * CELL_PX
RADIUS_PX = {"big": 14.0, "small": 8.5}
JITTER_PX = 1.5
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
COLORS = {
    "red": (215, 45, 40),
    "green": (50, 160, 60),
    "blue": (45, 85, 210),
    "yellow": (240, 205, 40),
    "purple": (135, 60, 170),
    "black": (30, 30, 30),
}
BACKGROUNDS = {"white": (248, 248, 248), "gray": (190, 190, 190), "pink": (250, 205, 215)}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
OBJECT_WEIGHTS = (3, 3, 3, 2)  # for 1, 2, 3, 4 objects
BACKGROUND_SIGMA, PIXEL_SIGMA, OBJECT_SIGMA = 4.0, 6.0, 8.0  # grey levels, so that no two pictures are equal

QUESTIONS_PER_IMAGE = 6
NOISY_SHARE = 0.3  # of the questions have one answerer of ten who slips
SPLITS = ("train2014", "val2014", "test2015")
TEST_DEV_EVERY = 4  # the official test-dev split is about a quarter of test

# The question types of the official annotation files: the first words of a question, the longest match wins.
QUESTION_TYPES = tuple(
    "how many|is the|what|what color is the|what is the|is this|is this a|what is|are the|what kind of|is there a|"
    "what type of|is it|what are the|where is the|is there|does the|what color are the|are these|are there|which|is|"
    "what is the man|is the man|are|how|does this|what is on the|what does the|how many people are|what is in the|"
    "what is this|do|what are|are they|what time|what sport is|are there any|is he|what color is|why|where are the|"
    "what color|who is|what animal is|is the woman|is this an|do you|how many people are in|what room is|has|"
    "is this person|what is the woman|can you|why is the|is the person|what is the color of the|what is the person|"
    "could|was|is that a|what number is|what is the name|what brand|none of the above".split("|")
)


@dataclass(frozen=True)
class DrawnObject:
    """One shape: its cell counts 0 to 8 in reading order, the offset from the cell's middle is in pixels."""

    cell: int
    shape: str
    color: str
    size: str
    offset_px: tuple[float, float]

    @property
    def name(self) -> str:
        """How questions call the object; no two objects of a scene share it."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A named background and its objects in reading order."""

    background: str
    objects: tuple[DrawnObject, ...]

    @property
    def key(self) -> tuple:
        """What makes two scenes the same for somebody who looks: everything but the offsets."""
        return self.background, tuple((o.cell, o.shape, o.color, o.size) for o in self.objects)


@dataclass(frozen=True)
class Question:
    """A question, its true answer, its kind, and the wrong answers a hurried person might give."""

    text: str
    answer: str
    kind: str
    slips: tuple[str, ...]

    @property
    def answer_type(self) -> str:
        """As in the official annotations."""
        return answer_type(self.answer)


@dataclass(frozen=True)
class DrawnImage:
    """One image of a split before it is drawn; ``answers`` has ten texts for each question."""

    split: str
    image_id: int
    scene: Scene
    questions: tuple[Question, ...]
    answers: tuple[tuple[str, ...], ...]

    @property
    def file_name(self) -> str:
        """The COCO name."""
        return f"COCO_{self.split}_{self.image_id:012d}.jpg"


# --- scenes ---------------------------------------------------------------------------------------------------------


def draw_scene(rng: random.Random, num_objects: int) -> Scene:
    """A random scene of 1 to 9 objects; its shapes come from 2 to 4 kinds, so that counting is not trivial."""
    shapes = rng.sample(list(SHAPES), rng.randint(2, 4))
    looks = rng.sample([(shape, color) for shape in shapes for color in COLORS], num_objects)
    objects = tuple(
        DrawnObject(
            cell=cell,
            shape=shape,
            color=color,
            size=rng.choice(list(RADIUS_PX)),
            offset_px=(rng.uniform(-JITTER_PX, JITTER_PX), rng.uniform(-JITTER_PX, JITTER_PX)),
        )
        for cell, (shape, color) in zip(sorted(rng.sample(range(9), num_objects)), looks, strict=True)
    )
    return Scene(rng.choice(list(BACKGROUNDS)), objects)


def _draw_new_scene(rng: random.Random, seen: set[tuple]) -> Scene:
    while True:
        num_objects = rng.choices(range(1, len(OBJECT_WEIGHTS) + 1), OBJECT_WEIGHTS)[0]
        for _ in range(100):  # keeps the number of objects as weighted; only 1,620 scenes have one object
            scene = draw_scene(rng, num_objects)
            if scene.key not in seen:
                seen.add(scene.key)
                return scene


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners on about the unit circle, y downwards."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [(0, -1), (0.98, 0.8), (-0.98, 0.8)]
    if shape == "star":
        radii = [1.05 if corner % 2 == 0 else 0.45 for corner in range(10)]
        return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]
    arm = 0.32  # half the width of a cross's bars
    quarter = [(arm, -1), (arm, -arm), (1, -arm)]
    return [point for turn in range(4) for point in (_turned(x, y, turn) for x, y in quarter)]


def _turned(x: float, y: float, quarter_turns: int) -> tuple[float, float]:
    for _ in range(quarter_turns):
        x, y = -y, x
    return x, y


def render_scene(scene: Scene, noise: np.random.Generator) -> Image.Image:
    """The picture of a scene: RGB, ``SIDE_PX`` square, drawn at double size and shrunk, with noise on every colour."""
    picture = Image.new(
        "RGB", (2 * SIDE_PX, 2 * SIDE_PX), _shade(BACKGROUNDS[scene.background], BACKGROUND_SIGMA, noise)
    )
    pen = ImageDraw.Draw(picture)
    for item in scene.objects:
        fill, radius = _shade(COLORS[item.color], OBJECT_SIGMA, noise), 2 * RADIUS_PX[item.size]
        x = 2 * ((item.cell % 3 + 0.5) * CELL_PX + item.offset_px[0])
        y = 2 * ((item.cell // 3 + 0.5) * CELL_PX + item.offset_px[1])
        if item.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _outline(item.shape)], fill=fill)
    pixels = np.asarray(picture.reduce(2), dtype=np.float32)
    pixels = pixels + PIXEL_SIGMA * noise.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _shade(color: tuple[int, int, int], sigma: float, noise: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in noise.normal(color, sigma).round().clip(0, 255))


# --- questions: each kind is a function of the scene; it gives None where its question would have no sense -----------


def _ask_color(scene: Scene, rng: random.Random) -> Question | None:
    items = _unique(scene, "shape")
    return _about(rng.choice(items), "color", "what color is the {shape}?") if items else None


def _ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    items = _unique(scene, "color")
    return _about(rng.choice(items), "shape", "what shape is the {color} object?") if items else None


def _ask_place(scene: Scene, rng: random.Random) -> Question:
    return _about(rng.choice(scene.objects), "place", "where is the {color} {shape}?")


def _ask_size(scene: Scene, rng: random.Random) -> Question:
    return _about(rng.choice(scene.objects), "size", "what size is the {color} {shape}?")


def _ask_only_object(kind: str, text: str) -> Callable[[Scene, random.Random], Question | None]:
    return lambda scene, rng: _about(scene.objects[0], kind, text) if len(scene.objects) == 1 else None


def _ask_exists(scene: Scene, rng: random.Random) -> Question:
    present = {(o.color, o.shape) for o in scene.objects}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
        return _yes_no(f"is there a {color} {shape}?", True, "exists")
    # Mostly colours and shapes that are in the picture, in another combination: seeing both is not enough.
    mixed = {(c, s) for c, _ in present for _, s in present} - present
    everything = {(c, s) for c in COLORS for s in SHAPES} - present
    color, shape = rng.choice(sorted(mixed if mixed and rng.random() < 0.75 else everything))
    return _yes_no(f"is there a {color} {shape}?", False, "exists")


def _ask_shape_exists(scene: Scene, rng: random.Random) -> Question:
    present, truth = {o.shape for o in scene.objects}, rng.random() < 0.5
    shape = rng.choice([s for s in SHAPES if (s in present) == truth])
    return _yes_no(f"are there any {SHAPES[shape]}?", truth, "shape exists")


def _ask_color_check(scene: Scene, rng: random.Random) -> Question | None:
    items = _unique(scene, "shape")
    if not items:
        return None
    item, truth = rng.choice(items), rng.random() < 0.5
    others = sorted({o.color for o in scene.objects} - {item.color})
    wrong = rng.choice(others if others and rng.random() < 0.5 else [c for c in COLORS if c != item.color])
    return _yes_no(f"is the {item.shape} {item.color if truth else wrong}?", truth, "color check")


def _ask_relation(scene: Scene, rng: random.Random) -> Question | None:
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    right, down = second.cell % 3 - first.cell % 3, second.cell // 3 - first.cell // 3
    # Only along an axis on which the two differ, so that "no" always means the opposite.
    along = [
        (words, step > 0) for words, step in ((("left of", "right of"), right), (("above", "below"), down)) if step
    ]
    (before, after), is_before = rng.choice(along)
    truth = rng.random() < 0.5
    relation = before if is_before == truth else after
    return _yes_no(f"is the {first.name} {relation} the {second.name}?", truth, "relation")


def _ask_count(scene: Scene, rng: random.Random) -> Question:
    counts = {shape: sum(o.shape == shape for o in scene.objects) for shape in SHAPES}
    values = sorted(set(counts.values()))
    # By value first, rare values as often as common ones; absent shapes are always possible, so they weigh half.
    value = rng.choices(values, [0.5 if v == 0 else 1 for v in values])[0]
    shape = rng.choice([s for s in SHAPES if counts[s] == value])
    return _number(f"how many {SHAPES[shape]} are there?", value, "count")


def _ask_count_all(scene: Scene, rng: random.Random) -> Question:
    return _number("how many objects are there?", len(scene.objects), "count all")


def _ask_background(scene: Scene, rng: random.Random) -> Question:
    others = tuple(name for name in BACKGROUNDS if name != scene.background)
    return Question("what color is the background?", scene.background, "background", others)


def _unique(scene: Scene, trait: str) -> list[DrawnObject]:
    values = [getattr(o, trait) for o in scene.objects]
    return [o for o in scene.objects if values.count(getattr(o, trait)) == 1]


def _about(item: DrawnObject, trait: str, text: str) -> Question:
    """A question for one trait of an object; slips are the other values, for places the neighbouring ones."""
    text = text.format(color=item.color, shape=item.shape)
    if trait == "place":
        near = [
            name
            for cell, name in enumerate(PLACES)
            if abs(cell % 3 - item.cell % 3) + abs(cell // 3 - item.cell // 3) == 1
        ]
        return Question(text, PLACES[item.cell], "place", tuple(near))
    answer, values = getattr(item, trait), {"color": COLORS, "shape": SHAPES, "size": RADIUS_PX}[trait]
    return Question(text, answer, trait, tuple(value for value in values if value != answer))


def _yes_no(text: str, truth: bool, kind: str) -> Question:
    return Question(text, "yes" if truth else "no", kind, ("no" if truth else "yes",))


def _number(text: str, value: int, kind: str) -> Question:
    near = [v for v in (value - 1, value + 1) if 0 <= v <= len(OBJECT_WEIGHTS)]
    return Question(text, str(value), kind, tuple(str(v) for v in near))


# (weight, how to ask); the kinds of the questions are the names given in the functions above
ASKERS: tuple[tuple[float, Callable[[Scene, random.Random], Question | None]], ...] = (
    (0.7, _ask_only_object("color", "what color is the object?")),
    (0.7, _ask_only_object("shape", "what shape is the object?")),
    (0.7, _ask_only_object("place", "where is the object?")),
    (2.0, _ask_color),
    (2.0, _ask_shape),
    (1.2, _ask_place),
    (1.5, _ask_exists),
    (0.7, _ask_shape_exists),
    (0.7, _ask_color_check),
    (0.4, _ask_relation),
    (1.0, _ask_count),
    (0.5, _ask_count_all),
    (0.3, _ask_background),
    (0.4, _ask_size),
)


def ask_questions(scene: Scene, rng: random.Random, number: int = QUESTIONS_PER_IMAGE) -> tuple[Question, ...]:
    """Different questions about one scene (up to about ten), their kinds drawn by ``ASKERS``."""
    weights, askers = zip(*ASKERS, strict=True)
    questions: dict[str, Question] = {}
    while len(questions) < number:
        question = rng.choices(askers, weights)[0](scene, rng)
        if question is not None:
            questions.setdefault(question.text, question)
    return tuple(questions.values())


def ten_answers(question: Question, rng: random.Random) -> tuple[str, ...]:
    """What ten people say: the truth, except that in ``NOISY_SHARE`` of the questions one of them slips."""
    answers = [question.answer] * 10
    if rng.random() < NOISY_SHARE:
        answers[rng.randrange(10)] = rng.choice(question.slips)
    return tuple(answers)


def question_type(text: str) -> str:
    """The official type of a question: the longest of ``QUESTION_TYPES`` that it begins with, in whole words."""
    words = text.lower().rstrip("?").split()
    for length in range(len(words), 0, -1):
        if (first := " ".join(words[:length])) in _KNOWN_TYPES:
            return first
    return "none of the above"


_KNOWN_TYPES = frozenset(QUESTION_TYPES)


# --- splits and files -------------------------------------------------------------------------------------------------


def draw_splits(num_images: dict[str, int], seed: int) -> dict[str, list[DrawnImage]]:
    """Scenes, questions and answers of all splits; no scene occurs twice.

    Each split has its own generator, and test and val come first: they stay the same whatever the size of train.

    Args:
        num_images: images of each of ``SPLITS``.
        seed: any integer.

    Raises:
        DataError: for a size below 1.
    """
    for split in SPLITS:
        if num_images[split] < 1:
            raise DataError(f"{split} needs at least 1 image, got {num_images[split]}: give a larger number")
    seen: set[tuple] = set()
    images: dict[str, list[DrawnImage]] = {}
    for split in reversed(SPLITS):
        rng = random.Random(f"drawn scenes, {split}, {seed}")
        images[split] = []
        for row in range(num_images[split]):
            scene = _draw_new_scene(rng, seen)
            questions = ask_questions(scene, rng)
            answers = tuple(ten_answers(question, rng) for question in questions)
            image_id = row * len(SPLITS) + SPLITS.index(split) + 1  # unique over the splits, as in COCO
            images[split].append(DrawnImage(split, image_id, scene, questions, answers))
    return {split: images[split] for split in SPLITS}


def question_records(images: list[DrawnImage]) -> list[dict]:
    """The ``questions`` list of an official questions file."""
    return [
        {"image_id": image.image_id, "question": question.text, "question_id": image.image_id * 1000 + number}
        for image in images
        for number, question in enumerate(image.questions)
    ]


def annotation_records(images: list[DrawnImage]) -> list[dict]:
    """The ``annotations`` list of an official annotations file."""
    return [
        {
            "question_type": question_type(question.text),
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": text, "answer_confidence": "yes" if text == question.answer else "maybe", "answer_id": place}
                for place, text in enumerate(answers, start=1)
            ],
            "image_id": image.image_id,
            "answer_type": question.answer_type,
            "question_id": image.image_id * 1000 + number,
        }
        for image in images
        for number, (question, answers) in enumerate(zip(image.questions, image.answers, strict=True))
    ]


def write_drawn_vqav2(folder: Path, images: dict[str, list[DrawnImage]], seed: int) -> None:
    """Draw the pictures of ``draw_splits`` and write them with all VQA v2 files; the same bytes each time.

    Args:
        folder: made if need be; gets ``train2014/``, ``val2014/``, ``test2015/`` and ``vqa/``.
        images: what ``draw_splits`` gave.
        seed: of the noise on the pictures.
    """
    for place, split in enumerate(SPLITS):
        noise = np.random.default_rng([seed % 2**64, place])
        (folder / split).mkdir(parents=True, exist_ok=True)
        for image in images[split]:
            render_scene(image.scene, noise).save(folder / split / image.file_name, quality=95)
    for name, content in _vqa_files(images):
        with open_atomic(folder / "vqa" / name) as file:
            file.write(json.dumps(content) + "\n")  # json.dump would go through the slow encoder


def _vqa_files(images: dict[str, list[DrawnImage]]) -> Iterator[tuple[str, dict]]:
    asked = {**images, "test-dev2015": images["test2015"][::TEST_DEV_EVERY]}
    for subtype, drawn in asked.items():
        head = {**_file_head(subtype), "task_type": "Open-Ended"}
        yield f"v2_OpenEnded_mscoco_{subtype}_questions.json", {**head, "questions": question_records(drawn)}
    for split in SPLITS:
        name = "drawn_test2015_annotations.json" if split == "test2015" else f"v2_mscoco_{split}_annotations.json"
        yield name, {**_file_head(split), "annotations": annotation_records(images[split])}
    yield (
        "drawn_kinds.json",
        {
            str(image.image_id * 1000 + number): question.kind
            for drawn in images.values()
            for image in drawn
            for number, question in enumerate(image.questions)
        },
    )


def _file_head(subtype: str) -> dict:
    info = {
        "description": "Drawn scenes in the layout of VQA v2.0.",
        "url": "",
        "version": "1.0",
        "year": 2025,
        "contributor": "plainvl",
        "date_created": "2025-01-01 00:00:00",
    }
    license_ = {"url": "https://creativecommons.org/publicdomain/zero/1.0/", "name": "CC0 1.0, drawn by a program"}
    return {"info": info, "license": license_, "data_type": "mscoco", "data_subtype": subtype}
