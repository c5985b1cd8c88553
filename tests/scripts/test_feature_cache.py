"""--feature_cache of run_llava_lora.py: the tower runs once an image, and nothing of the result changes by it.

Comparisons bit by bit have one image in a micro-batch: what the tower computes for an image can depend in the last bit
on its neighbours, which another epoch changes.
"""

import errno
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import run_llava_lora
import scripts.llava_feature_cache as llava_feature_cache
from data.clip_images import normalize
from engine import evaluation
from engine.weights import read_state_dict
from models.clip_vision import CLIPVisionTransformer
from scripts.llava_folder import read_llava_folder
from scripts.program import run
from tests.nursery import Job, Nursery
from tests.scripts.bad_inputs import BadInputs, failure
from tests.scripts.llava_run import BASE, TOWER, conversation, copy_of, program, train_flags
from tests.scripts.vqa_run import differences, read_lines, tree

ROWS, WIDTH = 16, 24  # of the tiny tower
NUM_IMAGES = 7
_ONE_IMAGE = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery(
        "run_llava_lora", "tests.scripts.test_feature_cache", "deepspeed", environment={"DS_ACCELERATOR": "cpu"}
    )
    yield nursery
    nursery.close()


class Work:
    """Pictures of one size in bytes, samples of which every fourth has none, and a cache that is to be made."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp, self.images, self.data = tmp_path, tmp_path / "images", tmp_path / "train.json"
        self.cache = tmp_path / "features"
        self.images.mkdir()
        for number in range(NUM_IMAGES):
            self.draw(f"{number}.bmp", number)
        names = [*(f"{n}.bmp" for n in range(NUM_IMAGES)), None]
        self.data.write_text(json.dumps([conversation(n, "a cup", name) for n, name in enumerate(names)]))

    def draw(self, name: str, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (30, 22, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.images / name)

    def flags(self, run_name: str, *more: object, cache: bool = True) -> list[str]:
        cached = ("--feature_cache", self.cache) if cache else ()
        places = ("--image_folder", self.images, "--num_train_epochs", 2, *_ONE_IMAGE)
        return train_flags(self.tmp / run_name, *places, *cached, *more, data=self.data)

    def train(self, run_name: str, *more: object, cache: bool = True) -> None:
        program(*self.flags(run_name, *more, cache=cache))

    def parts(self) -> list[Path]:
        return sorted(self.cache.glob("part-*.bin"))

    def kept(self) -> list[str]:
        """Names of the images in all parts."""
        return sorted(row[0] for part in self.parts() for row in _first_line(part)["images"])

    def assert_same_result(self, one: str, other: str) -> None:
        names = {path.name for path in (self.tmp / one).iterdir() if path.suffix in (".bin", ".safetensors")}
        assert names
        for name in names:
            states = [read_state_dict(self.tmp / place / name) for place in (one, other)]
            assert not differences(*states), name


@pytest.fixture
def work(tmp_path) -> Work:
    return Work(tmp_path)


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory) -> Work:
    """With the features of all pictures; do not change it."""
    work = Work(tmp_path_factory.mktemp("filled"))
    work.train("first", "--max_steps", 1)
    return work


@pytest.fixture
def filled(filled_once, work) -> Work:
    """A copy of it; the pictures are the same to the nanosecond."""
    shutil.copytree(filled_once.images, work.images, dirs_exist_ok=True)
    shutil.copytree(filled_once.cache, work.cache)
    return work


def _first_line(part: Path) -> dict:
    return json.loads(part.read_bytes().partition(b"\n")[0])


@pytest.fixture
def tower_images(monkeypatch) -> list[int]:
    """Images of each pass of the tower."""
    seen, forward = [], CLIPVisionTransformer.forward

    def counted(self: CLIPVisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(CLIPVisionTransformer, "forward", counted)
    return seen


# ---- the same result ----


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--bf16", "True"),
        ("--bits", 4),
        ("--tune_mm_mlp_adapter", "True"),
        ("--lora_enable", "False", "--bf16", "True"),
        ("--image_aspect_ratio", "square", "--group_by_modality_length", "False"),
        ("--dataloader_num_workers", 1),
    ],
)
def test_training_with_and_without_the_cache_ends_with_the_same_bytes(work, flags):
    work.train("without", *flags, cache=False)
    work.train("with", *flags)
    work.assert_same_result("with", "without")


def test_larger_micro_batches_differ_in_rounding_at_most(work, tower_images):
    flags = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3)
    work.train("without", *flags, cache=False)
    tower_images.clear()
    work.train("with", *flags)
    assert tower_images == [2] * 4  # seven images, the last one beside a copy of itself
    states = [read_state_dict(work.tmp / name / "non_lora_trainables.bin") for name in ("with", "without")]
    # measured: 3e-8
    assert max((states[0][name] - states[1][name]).abs().max().item() for name in states[0]) < 1e-6


@pytest.mark.parametrize("flags", [(), ("--deepspeed", "scripts/zero2.json", "--bf16", "True")])
def test_two_processes_share_the_images_and_end_with_the_same_bytes(nursery, work, flags):
    for name in ("without", "with"):
        argv = work.flags(name, "--gradient_accumulation_steps", 2, *flags, cache=name == "with")
        ended = nursery.run(Job(_program, (argv,), work.tmp / name, 2))
        assert ended.codes == [0, 0], ended.describe()
    work.assert_same_result("with", "without")
    assert work.kept() == [f"{n}.bmp" for n in range(NUM_IMAGES)]
    assert sorted(len(_first_line(part)["images"]) for part in work.parts()) == [3, 4]  # a part of each process


@pytest.mark.slow
def test_with_divided_weights_it_trains_alike(nursery, work):
    """DeepSpeed's stage 3 has a linear layer of its own, which rounds before it adds the bias, also in the tower."""
    flags = ("--gradient_accumulation_steps", 2, "--deepspeed", "scripts/zero3.json", "--bf16", "True")
    losses = {}
    for name in ("without", "with"):
        argv = work.flags(name, *flags, cache=name == "with")
        ended = nursery.run(Job(_program, (argv,), work.tmp / name, 2))
        assert ended.codes == [0, 0], ended.describe()
        losses[name] = [row["loss"] for row in read_lines(work.tmp / name / "metrics.jsonl")]
    assert losses["with"] == pytest.approx(losses["without"], rel=2e-3)  # measured: 5e-4


def test_without_a_projector_nothing_is_rounded_under_autocast():
    folder = read_llava_folder(BASE, dtype=torch.bfloat16)
    pixels = torch.randint(0, 256, (1, 3, *[folder.vision.image_size] * 2), dtype=torch.uint8)
    for projector, dtype in ((folder.model.model.mm_projector, torch.bfloat16), (torch.nn.Identity(), torch.float32)):
        folder.model.model.mm_projector = projector
        kept = llava_feature_cache._kind(folder, torch.bfloat16)
        assert (kept.rows, kept.width, kept.dtype) == (ROWS, WIDTH, dtype)
        how = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
        features = llava_feature_cache._tower_features(folder, pixels, 1, **how)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            computed = folder.model.image_vectors(folder.model.tower_features(normalize(pixels, folder.images)))
            read = folder.model.image_vectors(features.to(kept.dtype))
        assert torch.equal(computed.float(), read.float())


def test_a_cache_that_is_there_is_used_by_every_later_run(work, tower_images):
    work.train("first")
    assert tower_images == [1] * NUM_IMAGES
    before = tree(work.cache)
    tower_images.clear()
    work.train("second")
    assert not tower_images
    assert tree(work.cache) == before
    work.assert_same_result("first", "second")


def test_an_image_takes_its_numbers_and_no_more(work):
    work.train("run", "--bf16", "True", "--max_steps", 1)
    (part,) = work.parts()
    assert part.stat().st_size == len(part.read_bytes().partition(b"\n")[0]) + 1 + NUM_IMAGES * ROWS * WIDTH * 2


def test_batches_carry_features_and_no_pixels(work, monkeypatch):
    carried = []
    to_device = evaluation.to_device
    monkeypatch.setattr(
        "engine.loop.to_device", lambda batch, device: carried.append(batch) or to_device(batch, device)
    )
    work.train("run", "--max_steps", 1)
    assert [(tuple(batch["features"].shape), "image" in batch) for batch in carried] == [((1, ROWS, WIDTH), False)] * 4


# ---- other pictures ----


def test_new_pictures_are_added_and_changed_ones_computed_anew(filled, tower_images):
    work = filled
    work.draw("1.bmp", 100)  # another picture of the same name and size
    work.draw("new.bmp", 200)
    (work.images / "2.bmp").rename(work.images / "renamed.bmp")
    os.utime(work.images / "3.bmp", ns=(0, 0))
    content = work.data.read_text().replace('"2.bmp"', '"renamed.bmp"').replace('"4.bmp"', '"new.bmp"')
    work.data.write_text(content)
    tower_images.clear()
    work.train("second")
    assert tower_images == [1, 1]
    added = [row[0] for row in _first_line(max(work.parts(), key=lambda path: path.stat().st_mtime_ns))["images"]]
    assert sorted(added) == ["1.bmp", "new.bmp"]
    work.train("without", cache=False)
    work.assert_same_result("second", "without")


def test_broken_pictures_are_grey_as_without_the_cache(work, capsys):
    (work.images / "1.bmp").write_text("no image")
    (work.images / "2.bmp").unlink()
    work.train("without", "--skip_broken_images", cache=False)
    work.train("with", "--skip_broken_images")
    work.assert_same_result("with", "without")
    assert "1.bmp" not in work.kept()
    replaced = [json.loads(line)["images_replaced"] for line in (work.tmp / "with" / "metrics.jsonl").open()]
    assert replaced == [json.loads(line)["images_replaced"] for line in (work.tmp / "without" / "metrics.jsonl").open()]
    assert sum(replaced) > 0
    # once they are mended they are computed
    for number in (1, 2):
        work.draw(f"{number}.bmp", number)
    capsys.readouterr()
    work.train("mended", "--skip_broken_images")
    assert "; 2 were computed now" in capsys.readouterr().err


def test_a_dry_run_writes_no_features_and_uses_those_that_are_there(work, tower_images, capsys):
    work.train("none", "--dry_run")
    assert not work.cache.exists()
    assert (
        f"{NUM_IMAGES} of {NUM_IMAGES} images, {ROWS * WIDTH * 4:,} bytes each, are not there"
        in capsys.readouterr().err
    )
    work.train("run", "--max_steps", 1)
    before = tree(work.cache)
    tower_images.clear()
    work.train("none", "--dry_run")
    assert not tower_images
    assert tree(work.cache) == before


# ---- stops ----


def _program(argv: list[str]) -> None:
    run(lambda: run_llava_lora.main(argv))


def _stopped_after_parts(argv: list[str], number: int, happening: int) -> None:
    """Parts of one image; a signal comes when ``number`` of them are written, the next one in the making."""
    llava_feature_cache.PART_BYTES = 1
    flush, left = os.fsync, [number]

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # the folder is flushed as well, once a part has its name
            if left[0] == 0:
                os.kill(os.getpid(), happening)
            left[0] -= 1
        flush(descriptor)

    os.fsync = fsync
    _program(argv)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_start_that_is_killed_while_it_computes_goes_on(nursery, work, world_size):
    flags = ("--gradient_accumulation_steps", 4 // world_size)
    argv = work.flags("with", *flags)
    arguments = (argv, 2, signal.SIGKILL)
    killed = nursery.run(Job(_stopped_after_parts, arguments, work.tmp / "killed", world_size))
    assert killed.codes[0] == -signal.SIGKILL, killed.describe()
    assert not killed.hung
    kept = work.kept()
    assert 2 <= len(kept) < NUM_IMAGES
    ended = nursery.run(Job(_program, (argv,), work.tmp / "with", world_size))
    assert ended.codes == [0] * world_size, ended.describe()
    assert f"; {NUM_IMAGES - len(kept)} were computed now" in ended.stderr[0]
    assert work.kept() == [f"{n}.bmp" for n in range(NUM_IMAGES)]
    whole = nursery.run(Job(_program, (work.flags("without", *flags, cache=False),), work.tmp / "whole", world_size))
    assert whole.codes == [0] * world_size, whole.describe()
    work.assert_same_result("with", "without")


def test_a_signal_keeps_what_was_computed(nursery, work):
    argv = work.flags("run")
    stopped = nursery.run(Job(_stopped_after_parts, (argv, 2, signal.SIGTERM), work.tmp / "stopped", 1))
    assert stopped.codes == [143], stopped.describe()
    assert "the same command goes on" in stopped.stderr[0].splitlines()[-1]
    assert len(work.kept()) == 3
    assert not list(work.cache.glob(".part*"))


def test_what_a_killed_writer_has_left_is_removed_once_it_is_old(work):
    work.cache.mkdir()
    old, young = work.cache / ".part-old.bin.tmp7", work.cache / ".part-young.bin.tmp8"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    work.train("run", "--max_steps", 1)
    assert (old.exists(), young.exists()) == (False, True)


# ---- what can be wrong ----

BAD = BadInputs()
bad = BAD.register


@bad(r"--feature_cache .*features holds holiday.txt, which is no part of a feature cache: give a folder of its own")
def a_folder_of_something_else(work):
    (work.cache / "holiday.txt").write_text("sun")
    return []


@bad(r"--feature_cache .*train.json cannot be read \(Not a directory\)")
def a_file(work):
    return ["--feature_cache", work.data]


@bad(r"--feature_cache /proc/features cannot be written \(.*\): give another folder")
def a_place_where_nobody_can_write(work):
    return ["--feature_cache", "/proc/features"]


@bad(r"part-\w+.bin has \d+ bytes, its 7 images need \d+: remove it")
def a_part_that_is_cut_off(work):
    part = work.parts()[0]
    part.write_bytes(part.read_bytes()[:-1])
    return []


@bad(r"part-\w+.bin is no part of a feature cache, or cut off in its first line: remove it")
def a_part_that_is_cut_off_at_the_beginning(work):
    part = work.parts()[0]
    part.write_bytes(part.read_bytes()[:100])
    return []


@bad(r"part-0.bin is no part of a feature cache")
def a_part_of_another_program(work):
    (work.cache / "part-0.bin").write_bytes(b"\x80\x02abc\n")
    return []


@bad(r"part-\w+.bin has a damaged first line: remove it")
def a_first_line_that_is_no_json(work):
    part = work.parts()[0]
    part.write_bytes(part.read_bytes().replace(b'"made_with": {', b'"made_with": [', 1))
    return []


@bad(r"part-\w+.bin has a damaged first line: remove it")
def a_first_line_that_lacks_the_images(work):
    part = work.parts()[0]
    part.write_bytes(part.read_bytes().replace(b'"images": ', b'"others": ', 1))
    return []


@bad(r"--feature_cache .* was made with other tower weights: give another folder, or remove this one")
def another_tower(work):
    tower = copy_of(TOWER, work.tmp / "clip")
    state = torch.load(tower / "pytorch_model.bin", weights_only=True)
    name = next(name for name in state if name.endswith("layers.0.mlp.fc1.bias") and "vision" in name)
    state[name] = state[name] + 1
    torch.save(state, tower / "pytorch_model.bin")
    return ["--vision_tower", tower]


@bad(r"was made with other image_aspect_ratio \(\"pad\", now \"square\"\): give another folder")
def another_way_to_make_images_square(work):
    return ["--image_aspect_ratio", "square"]


@bad(r"was made with other precision \(\"float32\", now \"bfloat16\"\), tower weights, dtype")
def another_precision(work):
    return ["--bf16", "True"]


@bad(r"was made with other image settings: give another folder")
def other_image_settings(work):
    tower = copy_of(TOWER, work.tmp / "clip")
    path = tower / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    return ["--vision_tower", tower]


@bad(r"cannot read image .*3.bmp: .*")
def a_changed_picture_that_is_none(work):
    (work.images / "3.bmp").write_text("no image")
    return []


@bad(r"--feature_cache keeps what a frozen tower gives: leave out --unfreeze_mm_vision_tower")
def a_tower_that_is_trained(work):
    return ["--lora_enable", "False", "--unfreeze_mm_vision_tower", "True"]


@bad(r"the image tower has dropout \(attention_dropout\): leave --feature_cache out")
def a_tower_that_draws(work):
    tower = copy_of(TOWER, work.tmp / "clip")
    path = tower / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["attention_dropout"] = 0.1
    path.write_text(json.dumps(config))
    return ["--vision_tower", tower]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_the_cache_stays_as_it_is(filled, capsys, name):
    work = filled
    spoil, message = BAD[name]
    more = spoil(work)
    before = tree(work.cache)
    code, line = failure(capsys, work.flags("run", *more), program)
    assert code == 2, line
    assert re.search(message, line), line
    assert tree(work.cache) == before
    assert not list((work.tmp / "run").rglob("*.safetensors"))


def test_a_damaged_part_is_found_by_its_checksum(filled, capsys):
    work = filled
    (part,) = work.parts()
    content = bytearray(part.read_bytes())
    content[-1] ^= 1  # of the last image
    part.write_bytes(content)
    code, line = failure(capsys, work.flags("run"), program)
    assert code == 2, line
    assert re.search(r"sample \d+ \(s\d+\): .*part-\w+.bin is damaged, the features of \S+.bmp are others now", line)


@pytest.mark.parametrize("place", ["before", "while writing"])
def test_a_full_disk_ends_with_what_is_needed(work, capsys, monkeypatch, place):
    needed = NUM_IMAGES * ROWS * WIDTH * 4
    if place == "before":
        monkeypatch.setattr(llava_feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
        message = rf"the features of {NUM_IMAGES} images need {needed:,} bytes, 5 are free there: free some space"
    else:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", full)
        message = rf"could not write the features .* \(the disk is full\): .* need {needed:,} bytes; free some"
    code, line = failure(capsys, work.flags("run"), program)
    assert code == 1, line
    assert re.search(message, line), line
    assert not list(work.cache.iterdir())
    monkeypatch.undo()
    work.train("run")


def test_samples_without_any_picture_need_no_features(work, tower_images):
    work.data.write_text(json.dumps([conversation(n, "a cup", None) for n in range(8)]))
    work.train("without", cache=False)
    tower_images.clear()
    work.train("with")
    assert not tower_images
    work.assert_same_result("with", "without")
