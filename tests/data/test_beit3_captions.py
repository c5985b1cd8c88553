import numpy as np
import pytest
import torch
from PIL import Image

from data.beit3_captions import (
    BEiT3CaptionDataset,
    CaptionCollate,
    CaptionImageDataset,
    CaptionSample,
    ImageSample,
    collate_images,
)
from data.caption_index import CaptionRecord
from data.errors import DataError
from data.image_reader import ImageReader
from data.loader import build_train_loader
from data.tokenizers.spm import XLMRTokenizer
from data.transforms import EvalTransform
from tests.paths import FIXTURES

SPM = FIXTURES / "evaluation_tokenizer.spm"
SIDE = 8


@pytest.fixture(scope="module")
def tokenizer():
    return XLMRTokenizer(SPM)


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (10, 12), "red").save(tmp_path / "red.png")
    return ImageReader(tmp_path, EvalTransform(SIDE), image_size=SIDE)


def captions(images, tokenizer, *rows, mask_prob=0.5, max_tokens=32):
    records = [CaptionRecord("red.png", 70 + place, tuple(row)) for place, row in enumerate(rows)]
    return BEiT3CaptionDataset(records, images, tokenizer, mask_prob=mask_prob, max_tokens=max_tokens)


def test_a_sample_holds_the_clean_caption_the_masked_one_and_where_they_may_differ(images, tokenizer):
    sample = captions(images, tokenizer, range(5, 15)).sample(0, np.random.default_rng(0))
    assert sample.tokens == [tokenizer.bos_id, *range(5, 15), tokenizer.eos_id]
    assert sum(sample.masked_positions) == 6  # half of twelve
    assert sample.masked_positions[0] == 0
    assert (sample.sample_id, sample.image_id, sample.image_error) == (0, 70, "")
    for clean, shown, masked in zip(sample.tokens, sample.masked_tokens, sample.masked_positions, strict=True):
        assert masked or shown == clean
    assert tokenizer.mask_id in sample.masked_tokens


def test_the_mask_is_a_function_of_the_generator(images, tokenizer):
    source = captions(images, tokenizer, range(5, 25))
    first, again, other = (source.sample(0, np.random.default_rng(seed)).masked_positions for seed in (1, 1, 2))
    assert first == again != other


def test_a_long_caption_is_cut_with_both_special_tokens_kept(images, tokenizer):
    sample = captions(images, tokenizer, range(5, 25), max_tokens=6).sample(0, np.random.default_rng(0))
    assert sample.tokens == [tokenizer.bos_id, 5, 6, 7, 8, tokenizer.eos_id]


def test_the_masks_of_an_epoch_do_not_depend_on_workers_or_on_where_it_was_begun(images, tokenizer):
    source = captions(images, tokenizer, *(range(5, 15 + length) for length in range(8)))

    def masks(num_workers, epoch, first_step=0):
        loader = build_train_loader(source, CaptionCollate(tokenizer.pad_id), 2, seed=3, num_workers=num_workers)
        return [batch["masked_tokens"].tolist() for batch in loader.batches(epoch, first_step)]

    assert masks(0, 1) == masks(2, 1)
    assert masks(0, 1, first_step=2) == masks(0, 1)[2:]
    assert masks(0, 1) != masks(0, 2)


def test_a_batch_has_the_targets_of_all_masked_positions_row_by_row():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    batch = CaptionCollate(pad_id=1)(
        [
            CaptionSample(4, 70, image, [0, 9, 8, 2], [0, 99, 8, 7], [0, 1, 0, 1]),
            CaptionSample(6, 71, image, [0, 5, 2], [0, 5, 99], [0, 0, 1], "no image"),
        ]
    )
    assert batch["masked_tokens"].tolist() == [[0, 99, 8, 7], [0, 5, 99, 1]]
    assert batch["masked_positions"].tolist() == [[False, True, False, True], [False, False, True, False]]
    assert batch["padding_mask"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
    assert batch["targets"].tolist() == [9, 2, 2]
    assert (batch["sample_id"], batch["image_id"]) == ([4, 6], [70, 71])
    assert (batch["images_replaced"], batch["image_errors"]) == (1, ["no image"])


def test_images_to_caption_come_with_their_ids(images):
    source = CaptionImageDataset([CaptionRecord("red.png", 7)], images)
    sample = source.sample(0, np.random.default_rng(0))
    assert isinstance(sample, ImageSample)
    batch = collate_images([sample, sample])
    assert batch["image"].shape == (2, 3, SIDE, SIDE)
    assert batch["image_id"] == [7, 7]


def test_an_image_that_cannot_be_read_is_named_with_its_id(images):
    source = CaptionImageDataset([CaptionRecord("absent.png", 7)], images)
    with pytest.raises(DataError, match=r"^sample 0 \(image 7\): .*absent.png"):
        source.sample(0, np.random.default_rng(0))
