"""The official files of VQA v2, read and checked: questions of the images that are there, answers, places."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from sys import intern

from data.errors import DataError
from data.files import read_json
from data.index_writer import IndexSummary
from data.official_files import IMAGE_PLACES, AbsentError, find_annotation

ANNOTATION_PLACES = ("", "vqa", "annotations", "vqa/annotations")  # below the data folder
QUESTION_FILE = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERS_FILE = "v2_mscoco_{}_annotations.json"
TRAIN, VAL, TEST = "train2014", "val2014", "test2015"
TEST_SPLITS = (("test", TEST), ("test-dev", "test-dev2015"))  # both ask about the images of test2015


@dataclass
class OfficialSplit:
    """Questions of the images that are present, grouped by image, and all answers of the split (none for test)."""

    name: str
    question_path: Path
    images: list[tuple[int, str]]  # (image id, path relative to the data folder), by name; only with questions
    questions: dict[int, list[dict]]  # by image id
    answers: dict[int, list[str]]  # by question id
    multiple_choice_answers: list[str]  # in file order

    def image_ids(self) -> list[int]:
        """Of the images that are present, by name."""
        return [image_id for image_id, _ in self.images]


def rest_val_images(image_ids: list[int], seed: int, num_images: int) -> set[int]:
    """A seeded draw that no library version changes, and that hardly moves when images are added."""
    return set(sorted(image_ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:num_images])


def read_official_split(
    split: str, data_path: Path, annotation_path: str | Path | None, summary: IndexSummary
) -> OfficialSplit:
    """Read one split and note in ``summary`` what was found and what is left out.

    Args:
        split: ``train2014``, ``val2014``, ``test2015`` or ``test-dev2015``, as in the names of the question files.
        data_path: folder of the image folders.
        annotation_path: folder of the JSON files; None looks in ``data_path`` and the usual places below.
        summary: gets the places, and the number of questions without their image.

    Raises:
        AbsentError: a file or folder is not there, or no question has its image.
        DataError: broken or contradicting files.
    """
    is_test = split not in (TRAIN, VAL)
    question_path = find_annotation(QUESTION_FILE.format(split), data_path, annotation_path, ANNOTATION_PLACES)
    questions = read_items(question_path, "questions", {"image_id": int, "question": str, "question_id": int})
    found = [(f"{split} questions", str(question_path))]
    answers: dict[int, list[str]] = {}
    multiple_choice_answers: list[str] = []
    if not is_test:
        answers_path = find_annotation(ANSWERS_FILE.format(split), data_path, annotation_path, ANNOTATION_PLACES)
        annotations = read_items(
            answers_path, "annotations", {"question_id": int, "multiple_choice_answer": str, "answers": list}
        )
        found.append((f"{split} annotations", str(answers_path)))
        check_answers(questions, question_path, annotations, answers_path)
        # strings only, each once: the objects of all ten answers of all questions would fill gigabytes
        answers = {qid: [intern(answer["answer"]) for answer in a["answers"]] for qid, a in annotations.items()}
        multiple_choice_answers = [intern(a["multiple_choice_answer"]) for a in annotations.values()]
    folder, images = _list_images(data_path, TEST if is_test else split)
    found.append((f"{split} images", f"{data_path / folder} ({len(images)} images)"))

    by_image: dict[int, list[dict]] = {}
    num_missing = 0
    for question in questions.values():
        if question["image_id"] in images:
            by_image.setdefault(question["image_id"], []).append(question)
        else:
            num_missing += 1
    if not by_image:
        raise AbsentError(
            f"none of the {num_missing} questions of {question_path} has its image in {data_path / folder}"
        )
    summary.found.extend(found)
    if num_missing:
        summary.notes.append(f"{num_missing} {split} questions left out: their image is not in {data_path / folder}")
    present = [(image_id, f"{folder}/{name}") for image_id, name in images.items() if image_id in by_image]
    return OfficialSplit(split, question_path, present, by_image, answers, multiple_choice_answers)


def read_items(
    path: Path, key: str, kinds: dict[str, type], *, bare: bool = False, advice: str = ""
) -> dict[int, dict]:
    """The objects of a question or annotation file by question id, in file order.

    Args:
        path: of the file.
        key: ``questions`` or ``annotations``; where the list stands, and how messages call its entries.
        kinds: keys that every entry has, and the type of each.
        bare: the file is the list itself (VQA-CP).
        advice: how to get the file; ends the message when it is missing.

    Raises:
        DataError: missing or broken file, an entry without a key or with another type, an id that stands twice.
    """
    content = read_json(path, advice=advice)
    items = content if bare else content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        where = "as a whole" if bare else f'under "{key}"'
        raise DataError(f"{path}: needs a non-empty list {where}; is it the official file of VQA?")
    by_id: dict[int, dict] = {}
    for place, item in enumerate(items):
        qid = item.get("question_id") if isinstance(item, dict) else None
        name = f"{path}: {key}[{place}]" if qid is None else f"{path}: question {qid!s:.40}"
        for wanted, kind in kinds.items():
            if not isinstance(item, dict) or type(item.get(wanted)) is not kind:
                raise DataError(f'{name}: "{wanted}" must be of type {kind.__name__}, the entry is {item!r:.120}')
        if qid in by_id:
            raise DataError(f"{name} stands twice; question ids must be unique")
        by_id[qid] = item
    return by_id


def check_answers(questions: dict[int, dict], question_path: Path, annotations: dict[int, dict], path: Path) -> None:
    """Every question has one annotation, of the same image, with at least one answer text; and the reverse."""
    for one, other, what in ((questions, annotations, path), (annotations, questions, question_path)):
        missing = [qid for qid in one if qid not in other]
        if missing:
            raise DataError(
                f"{what}: {len(missing)} question ids missing, the first {missing[:5]}; question and annotation file "
                "must be of the same split"
            )
    for qid, annotation in annotations.items():
        answers = annotation["answers"]
        if not answers or not all(isinstance(a, dict) and type(a.get("answer")) is str for a in answers):
            raise DataError(
                f'{path}: question {qid}: "answers" must be a list of {{"answer": text}}, got {answers!r:.120}'
            )
        image_id = questions[qid]["image_id"]
        if annotation.get("image_id", image_id) != image_id:
            raise DataError(
                f"{path}: question {qid}: image {annotation['image_id']}, but {image_id} in {question_path}"
            )


def _list_images(data_path: Path, split: str) -> tuple[str, dict[int, str]]:
    """Folder relative to the data folder, and file name by image id, ordered by name."""
    for place in IMAGE_PLACES:
        folder = f"{place}/{split}".removeprefix("/")
        if (data_path / folder).is_dir():
            break
    else:
        looked = ", ".join(str(data_path / place / split) for place in IMAGE_PLACES)
        raise AbsentError(f"no image folder {split} (looked for {looked}): give the folder above it as --data_path")
    images: dict[int, str] = {}
    for name in sorted(os.listdir(data_path / folder)):
        digits = name.removesuffix(".jpg").rpartition("_")[2]
        if not name.endswith(".jpg") or name.startswith(".") or not (digits.isascii() and digits.isdigit()):
            continue  # thumbnails, lists, "._" files of other systems
        if int(digits) in images:
            raise DataError(
                f"{data_path / folder}: {images[int(digits)]} and {name} are both image {int(digits)}: remove one"
            )
        images[int(digits)] = name
    return folder, images
