"""Names and places of VL-BERT's files: questions, annotations, regions (no torch, so that they are soon found)."""

from pathlib import Path

from data.errors import DataError
from data.vqav2_files import ANSWERS_FILE, QUESTION_FILE

VQA, VQA_CP = "vqa", "vqa_cp"
REGION_ROOT = "vgbua_res101_precomputed"
OWN = "own"  # place of the images of a file of one's own
SIZE_FILES = {
    "train2014": "annotations/instances_train2014.json",
    "val2014": "annotations/instances_val2014.json",
    "test2015": "annotations/image_info_test2015.json",
}
# image sets of VQA v2 → folder of their images
_VQA_SETS = {
    "train2014": "train2014",
    "val2014": "val2014",
    "minival2014": "val2014",
    "valminusminival2014": "val2014",
    "test2015": "test2015",
    "test-dev2015": "test2015",
}
_CP_SETS = {"train": "train", "val": "test"}  # image set → part of the file name
_UNLABELLED = ("test2015", "test-dev2015")
MISSING_DATA = "give the folder above vqa/ as DATASET.DATASET_PATH"


def question_files(dataset: str, image_set: str, data_path: str | Path) -> list[Path]:
    """The file of an image set's questions and, unless it is one of the test sets, that of their annotations.

    Raises:
        DataError: an unknown set.
    """
    known = _VQA_SETS if dataset == VQA else _CP_SETS
    if image_set not in known:
        raise DataError(f"image set {image_set!r} of {dataset}: choose {', '.join(known)}, or several joined by +")
    if dataset != VQA:
        names = [f"vqacp_v2_{_CP_SETS[image_set]}_{what}.json" for what in ("questions", "annotations")]
    else:
        names = [QUESTION_FILE.format(image_set)]
        names += [] if image_set in _UNLABELLED else [ANSWERS_FILE.format(image_set)]
    return [Path(data_path) / "vqa" / name for name in names]


def place_of(image_set: str) -> str:
    """Folder of the images of an image set; of VQA-CP, whose questions name their own, one of the two of every set."""
    return _VQA_SETS.get(image_set, "train2014")


def region_path(
    place: str, data_path: str | Path, *, boxes: str, dataset: str, zipped: bool, given: str | None
) -> Path:
    """Where the regions of a place should lie; arguments as of ``find_regions`` in ``data/vlbert_vqa.py``.

    Raises:
        DataError: images of one's own, and nothing is given.
    """
    if given:
        return Path(given)
    if place == OWN:
        raise DataError("regions of your own images: give them as --regions FOLDER")
    path = Path(data_path) / REGION_ROOT / region_folder(place, boxes, dataset)
    if zipped:
        return path.with_name(f"{path.name}.zip")
    packed = path.with_name(f"{path.name}.packed")
    return packed if packed.is_dir() else path


def region_folder(place: str, boxes: str, dataset: str = VQA) -> str:
    """Name of the folder of a place's box files."""
    test = place == "test2015"
    if boxes == "10-100ada":
        return f"{'test2015' if test else 'trainval2014'}_resnet101_faster_rcnn_genome"
    if boxes == "36":
        train = "trainval2014" if dataset == VQA_CP else "trainval"
        return f"{'test2015' if test else train}_resnet101_faster_rcnn_genome_36"
    raise DataError(f'DATASET.BOXES {boxes!r:.40}: choose "10-100ada" or "36"')
