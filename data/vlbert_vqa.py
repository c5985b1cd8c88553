"""VQA v2 and VQA-CP v2 in VL-BERT's folder layout: official files to checked records, and where their regions lie.

Source: the VQA and VQA-CP data sets of VL-BERT and its adaptive fork. Departures: questions and annotations are paired
by id, not by place; the size of an image comes from its box file where the COCO annotation file is not there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.box_features import RegionSource, open_regions
from data.errors import DataError
from data.files import read_json
from data.own_vqa import OWN_QUESTIONS, own_rows, own_targets
from data.tokenizers.wordpiece import WordPieceTokenizer, swap_sides
from data.vlbert_answers import AnswerList
from data.vlbert_files import MISSING_DATA, OWN, SIZE_FILES, VQA, place_of, question_files, region_path
from data.vqav2_files import check_answers, read_items


@dataclass(frozen=True, slots=True)
class VLBertRecord:
    """One question.

    Attributes:
        question_id: the data set's own number.
        image_id: of its image, and of the image's regions.
        place: folder of the images, such as ``train2014``.
        image: path of the image relative to the data folder.
        tokens: word-piece ids of the question.
        labels: of the known answers; empty where there is none or the split has no answers.
        scores: in (0, 1], parallel to ``labels``.
        flipped: (tokens, labels, scores) of the mirrored image, where left or right is spoken of; else None.
    """

    question_id: int
    image_id: int
    place: str
    image: str
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    scores: tuple[float, ...]
    flipped: tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Question:
    """One question as the files have it; ``answers`` is empty where there are none, ``main`` the most common one."""

    question_id: int
    image_id: int
    place: str
    image: str
    text: str
    answers: tuple[str, ...] = ()
    main: str = ""


def read_questions(dataset: str, image_sets: str, data_path: str | Path) -> list[Question]:
    """Questions of one or several image sets, in file order.

    Args:
        dataset: ``vqa`` or ``vqa_cp``.
        image_sets: a name, or several joined by ``+``.
        data_path: folder with ``vqa/`` below it.

    Raises:
        DataError: an unknown set; missing, broken or contradicting files.
    """
    questions: list[Question] = []
    for name in image_sets.split("+"):
        asked, answered = _read(dataset, question_files(dataset, name, data_path))
        for number, item in asked.items():
            place = place_of(name) if dataset == VQA else item["coco_split"]
            questions.append(_question(item, answered.get(number), place))
    return questions


def _read(dataset: str, paths: list[Path]) -> tuple[dict[int, dict], dict[int, dict]]:
    """Questions and, where there is a second file, annotations by number."""
    kinds = {"image_id": int, "question": str, "question_id": int}
    bare = dataset != VQA
    asked = read_items(
        paths[0],
        "questions",
        kinds | ({"coco_split": str} if bare else {}),
        bare=bare,
        advice=MISSING_DATA,
    )
    answered = {}
    if len(paths) > 1:
        kinds = {"question_id": int, "multiple_choice_answer": str, "answers": list}
        answered = read_items(paths[1], "annotations", kinds, bare=bare, advice=MISSING_DATA)
        check_answers(asked, paths[0], answered, paths[1])
    for number, item in asked.items() if bare else ():
        if item["coco_split"] not in SIZE_FILES:
            raise DataError(
                f"{paths[0]}: question {number}: coco_split {item['coco_split']!r:.40} must be {', '.join(SIZE_FILES)}"
            )
    return asked, answered


def _question(item: dict, annotation: dict | None, place: str) -> Question:
    image_id = item["image_id"]
    said = () if annotation is None else tuple(answer["answer"] for answer in annotation["answers"])
    main = "" if annotation is None else annotation["multiple_choice_answer"]
    image = f"{place}/COCO_{place}_{image_id:012d}.jpg"
    return Question(item["question_id"], image_id, place, image, item["question"], said, main)


def read_own_questions(path: str | Path) -> list[Question]:
    """Questions of a file of one's own (the schema of ``data/own_vqa.py``); regions are found by the image's number.

    Raises:
        DataError: a wrong key or type, or an image whose name does not end in a number; the line is named.
    """
    questions = []
    for where, (image, text, answers, question_id) in own_rows(OWN_QUESTIONS.lines(path)):
        digits = re.search(r"(\d+)$", Path(image).stem)
        if digits is None:
            raise DataError(
                f"{where}: the name of {image} must end in a number, by which its regions are found, as in "
                "photos/17.jpg"
            )
        questions.append(Question(question_id, int(digits[1]), OWN, image, text, tuple(answers or ())))
    return questions


def make_records(
    questions: Iterable[Question],
    tokenizer: WordPieceTokenizer,
    answers: AnswerList,
    *,
    max_words: int,
) -> list[VLBertRecord]:
    """Questions to ids and soft labels, as they are and mirrored.

    Args:
        questions: any.
        tokenizer: of the model.
        answers: that the model knows.
        max_words: word pieces that a question may have: the model's positions less the special ones.

    Raises:
        DataError: an empty question, or one that is too long.
    """
    known: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    shared: dict[tuple, tuple] = {}
    records = []
    for question in questions:
        ids = known.get(question.text)
        if ids is None:
            pieces = tokenizer.tokenize(question.text)
            if not 0 < len(pieces) <= max_words:
                raise DataError(
                    f"question {question.question_id} has {len(pieces)} word pieces, 1 to {max_words} are possible "
                    "(max_position_embeddings): "
                    f"{question.text!r:.80}"
                )
            mirrored = pieces
            if not {"left", "right"}.isdisjoint(pieces):
                mirrored = [piece if piece in tokenizer else "[UNK]" for piece in swap_sides(pieces)]
            ids = known[question.text] = tuple(tokenizer.to_ids(pieces)), tuple(tokenizer.to_ids(mirrored))
        labelled = _labels(question, answers)
        turned = tuple(" ".join(swap_sides(said.split(" "))) for said in question.answers)
        mirrored_labels = labelled if turned == question.answers else _labels(question, answers, turned)
        flipped = (ids[1], *mirrored_labels)
        plain = (ids[0], *labelled)
        plain, flipped = (shared.setdefault(values, values) for values in (plain, flipped))
        records.append(
            VLBertRecord(
                question.question_id,
                question.image_id,
                question.place,
                question.image,
                *plain,
                None if flipped == plain else flipped,
            )
        )
    return records


def _labels(
    question: Question, answers: AnswerList, said: tuple[str, ...] | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    said = question.answers if said is None else said
    if question.place == OWN and said:  # any number of people, answers compared after normalisation
        labels, scores = own_targets(list(said), answers)
        return tuple(labels), tuple(scores)
    return answers.soft_labels(said)


class RegionPlaces:
    """Regions and image sizes of all places (folders of images) of a data set."""

    def __init__(self, sources: dict[str, RegionSource], data_path: str | Path, *, coco_sizes: bool = True) -> None:
        """Read the sizes of COCO's annotation files, where they are.

        Args:
            sources: place → regions of its images.
            data_path: folder with ``annotations/`` below it.
            coco_sizes: whether to look for them.

        Raises:
            DataError: such a file is broken.
        """
        self.sources = sources
        self._sizes = {
            place: _read_sizes(Path(data_path) / SIZE_FILES[place])
            for place in sources
            if coco_sizes and place in SIZE_FILES and (Path(data_path) / SIZE_FILES[place]).is_file()
        }

    def check(self, records: Iterable[VLBertRecord]) -> None:
        """Every image has regions, and a size where sizes are known.

        Raises:
            DataError: with the number of images that lack them, and the first few.
        """
        wanted: dict[str, set[int]] = {}
        own: dict[int, str] = {}
        for record in records:
            wanted.setdefault(record.place, set()).add(record.image_id)
            if record.place == OWN and own.setdefault(record.image_id, record.image) != record.image:
                raise DataError(
                    f"{own[record.image_id]} and {record.image} both end in {record.image_id}, by which their regions "
                    "are found: give every image a number of its own"
                )
        for place, images in wanted.items():
            for what, known in (("box file", self.sources[place].image_ids()), ("size", self._sizes.get(place))):
                missing = () if known is None else sorted(images - set(known))
                if missing:
                    raise DataError(
                        f"{len(missing)} of {len(images)} images of {place} have no {what}, the first: "
                        f"{', '.join(map(str, missing[:5]))}; see docs/datasets.md for the files that are needed"
                    )

    def size(self, record: VLBertRecord, own: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the image: COCO's, else those of its box file."""
        sizes = self._sizes.get(record.place)
        return own if sizes is None else sizes[record.image_id]

    def is_wide(self, records: Iterable[VLBertRecord]) -> list[int]:
        """1 for every record whose image is at least as wide as high, else 0.

        Raises:
            DataError: sizes are not at hand without reading every box file.
        """
        sizes = {}
        for place, source in self.sources.items():
            sizes[place] = self._sizes.get(place) or source.sizes()
            if sizes[place] is None:
                file = SIZE_FILES.get(place, "file of sizes")
                raise DataError(
                    f"ASPECT_GROUPING needs the sizes of the images of {place}: put COCO's {file} into the data "
                    "folder, or pack the boxes by scripts/pack_box_features.py"
                )
        return [int(width >= height) for width, height in (sizes[r.place][r.image_id] for r in records)]


def find_regions(
    places: Iterable[str], data_path: str | Path, *, boxes: str, dataset: str, zipped: bool, given: str | None
) -> dict[str, RegionSource]:
    """Where the regions of each place lie: ``<name>.packed`` first, then the folder ``<name>``, or ``<name>.zip``.

    Args:
        places: of the records.
        data_path: the data folder.
        boxes: ``10-100ada`` or ``36``.
        dataset: ``vqa`` or ``vqa_cp``, whose folders of 36 boxes differ in name.
        zipped: read the zip archives (``ZIP_MODE``).
        given: one folder, packed folder or archive for all places.

    Raises:
        DataError: there is none, or it is broken.
    """
    found: dict[str, RegionSource] = {}
    opened: dict[Path, RegionSource] = {}
    for place in sorted(set(places)):
        path = region_path(place, data_path, boxes=boxes, dataset=dataset, zipped=zipped, given=given)
        if path not in opened:
            opened[path] = open_regions(path)
        found[place] = opened[path]
    return found


def _read_sizes(path: Path) -> dict[int, tuple[int, int]]:
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    try:
        sizes = {image["id"]: (image["width"], image["height"]) for image in images}
        if all(type(side) is int and side > 0 for size in sizes.values() for side in size):
            return sizes
    except (TypeError, KeyError):
        pass
    raise DataError(f'{path}: needs "images", each with id, width and height: give COCO\'s own file')
