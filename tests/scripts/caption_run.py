"""A small folder in the layout of COCO captions and NoCaps with its index, made once a session, and ways to call."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

from scripts import make_index, train_sentencepiece
from tests.scripts.vqa_run import MODEL, drawn_data, program

_folder: list[tempfile.TemporaryDirectory] = []  # kept until the session ends, which removes it
NUM_TRAIN, NUM_RESTVAL, NUM_VAL, NUM_TEST, NUM_NOCAPS = 16, 4, 7, 9, 5
WORDS = (("a", "the"), ("red", "blue", "big", "small"), ("star", "circle", "cross"), ("on white", "on gray"))


def caption(number: int) -> str:
    """One of 48 sentences."""
    words = []
    for choices in WORDS:
        words.append(choices[number % len(choices)])
        number //= len(choices)
    return " ".join(words) + "."


@functools.cache
def caption_data() -> Path:
    """Data folder with pictures, annotations, ``beit3.spm`` and the index; do not change it."""
    _folder.append(tempfile.TemporaryDirectory())
    data = Path(_folder[0].name) / "coco"
    data.mkdir()
    drawn = drawn_data()
    for name in ("train2014", "val2014"):
        shutil.copytree(drawn / name, data / name)
    shutil.copytree(drawn / "test2015", data / "val")
    shutil.copytree(drawn / "test2015", data / "test")
    (data / "dataset_coco.json").write_text(json.dumps({"images": _coco_images(data), "dataset": "coco"}))
    _write_nocaps(data)
    train_sentencepiece.main(["--input", str(_sentences(data)), "--output", str(data / "beit3.spm")])
    make_index.main(["--data_path", str(data)])
    return data


def _coco_images(data: Path) -> list[dict]:
    splits = ["restval"] * NUM_RESTVAL + ["val"] * NUM_VAL + ["test"] * NUM_TEST
    places = [("train2014", "train")] * NUM_TRAIN + [("val2014", split) for split in splits]
    files = {name: sorted(path.name for path in (data / name).iterdir()) for name in ("train2014", "val2014")}
    images = []
    for place, (folder, split) in enumerate(places):
        name = files[folder].pop(0)
        sentences = [{"raw": caption(3 * place + number), "imgid": place} for number in range(3)]
        cocoid = int(name.rpartition("_")[2].partition(".")[0])
        images.append({"filepath": folder, "filename": name, "split": split, "cocoid": cocoid, "sentences": sentences})
    return images


def _write_nocaps(data: Path) -> None:
    files = sorted(path.name for path in (data / "val").iterdir())[:NUM_NOCAPS]
    domains = ("in-domain", "near-domain", "out-domain")
    images = [{"id": index, "file_name": name, "domain": domains[index % 3]} for index, name in enumerate(files)]
    annotations = [
        {"id": 2 * index + number, "image_id": index, "caption": caption(5 * index + number)}
        for index in range(len(files))
        for number in range(2)
    ]
    (data / "nocaps_val_4500_captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (data / "nocaps_test_image_info.json").write_text(json.dumps({"images": images}))


def _sentences(data: Path) -> Path:
    """Questions of every caption, in the form that train_sentencepiece.py reads."""
    path = data / "sentences.json"
    path.write_text(json.dumps({"questions": [{"question": caption(number)} for number in range(48)]}))
    return path


def caption_flags(*more: object, task: str = "coco_captioning", data: Path | None = None) -> list[str]:
    """What every call needs; later flags win."""
    required = ["--task", task, "--model", MODEL, "--data_path", str(data or caption_data())]
    required += ["--device", "cpu", "--num_workers", "0", "--caption_metrics", "basic"]
    return [*required, *map(str, more)]


def train_flags(output: Path, *more: object, **which: object) -> list[str]:
    """Ten samples a step, six steps an epoch, short captions."""
    few = ["--batch_size", "10", "--epochs", "1", "--num_max_bpe_tokens", "12", "--eval_batch_size", "3"]
    return caption_flags("--output_dir", output, *few, *more, **which)


def eval_flags(weights: Path, output: Path, *more: object, **which: object) -> list[str]:
    """An evaluation of ``weights``."""
    few = ["--eval_batch_size", "2", *more]
    return caption_flags("--eval", "--finetune", weights, "--output_dir", output, *few, **which)


@functools.cache
def trained_captioner() -> Path:
    """Output folder of a run of one epoch with validation; do not change it."""
    output = caption_data().parent / "trained"
    program(*train_flags(output))
    return output
