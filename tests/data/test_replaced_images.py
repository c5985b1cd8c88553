"""Every kind of image through loader processes: read, refused by name, or replaced and counted; never a dead worker."""

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.image_reader import ImageReader
from data.images import load_image
from data.loader import build_eval_loader
from data.replaced_images import ALWAYS_ALLOWED, limit_replaced
from data.tokenizers.spm import XLMRTokenizer
from data.transforms import EvalTransform
from data.vqa_dataset import VQACollate, VQADataset
from data.vqa_index import VQARecord
from tests.data.test_images import ILLEGAL, LEGAL
from tests.paths import FIXTURES

SPM = FIXTURES / "evaluation_tokenizer.spm"
SIDE = 8
KINDS = [*LEGAL, *ILLEGAL]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One file of each kind, named by its place in ``KINDS``."""
    folder = tmp_path_factory.mktemp("kinds")
    for place, kind in enumerate(KINDS):
        build = LEGAL[kind] if kind in LEGAL else ILLEGAL[kind][0]
        (folder / f"{place}.jpg").write_bytes(build())
    return folder


def loader(root, kinds=KINDS, *, replace, num_workers=2):
    tokenizer = XLMRTokenizer(SPM)
    records = [VQARecord(f"{KINDS.index(kind)}.jpg", (5,), (), (), 100 + place) for place, kind in enumerate(kinds)]
    images = ImageReader(root, EvalTransform(SIDE), image_size=SIDE, replace_broken_images=replace)
    source = VQADataset(records, images, tokenizer)
    return build_eval_loader(source, VQACollate(tokenizer.pad_id, 1), 3, num_workers=num_workers)


def test_every_kind_of_image_passes_two_workers_or_is_replaced_by_grey_and_counted(root):
    images, replaced = {}, 0
    for batch in loader(root, replace=True):
        images.update(zip(batch["sample_id"], batch["image"], strict=True))
        replaced += batch["images_replaced"]
    assert sorted(images) == list(range(len(KINDS)))
    assert replaced == len(ILLEGAL)
    resize = EvalTransform(SIDE)
    for place, kind in enumerate(KINDS):
        grey = torch.full((3, SIDE, SIDE), 128, dtype=torch.uint8)
        wanted = resize(load_image(root / f"{place}.jpg"), np.random.default_rng(0)) if kind in LEGAL else grey
        assert torch.equal(images[place], wanted), kind


def test_what_is_replaced_does_not_depend_on_the_number_of_workers(root):
    alone, shared = (list(loader(root, replace=True, num_workers=number)) for number in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["image_errors"] == other["image_errors"]


@pytest.mark.parametrize("kind", ILLEGAL)
def test_an_illegal_kind_ends_the_pass_with_sample_question_file_and_reason(root, kind):
    kinds = [*list(LEGAL)[:4], kind]
    with pytest.raises(DataError, match=ILLEGAL[kind][1]) as caught:
        list(loader(root, kinds, replace=False, num_workers=0))
    message = str(caught.value)
    assert message.startswith("sample 4 (question 104): cannot read image ")
    assert f"{root / str(KINDS.index(kind))}.jpg" in message
    assert "\n" not in message


def batches(*replaced):
    return [{"images_replaced": count, "image_errors": ["no image x.jpg"] * count} for count in replaced]


def test_a_few_images_may_be_replaced_in_any_set():
    few = batches(1, 0, ALWAYS_ALLOWED - 1)
    assert list(limit_replaced(few, num_samples=20, share=0.001)) == few


@pytest.mark.parametrize(
    ("num_samples", "share", "world_size", "allowed"),
    [(20, 0.001, 1, 10), (50_000, 0.001, 1, 50), (50_000, 0.001, 2, 25), (50_000, 0, 1, 10), (40, 1.0, 1, 40)],
)
def test_beyond_the_share_of_a_process_the_pass_ends_with_the_last_image(num_samples, share, world_size, allowed):
    passed = limit_replaced(batches(*[1] * 60), num_samples=num_samples, share=share, world_size=world_size)
    for _ in range(allowed):
        next(passed)
    with pytest.raises(DataError, match=rf"^{allowed + 1} images could not be read.*at most {allowed} .*the last: no"):
        next(passed)


def test_each_pass_counts_anew():
    for _ in range(3):
        assert len(list(limit_replaced(batches(ALWAYS_ALLOWED), num_samples=20, share=0.0))) == 1
