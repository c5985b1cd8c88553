from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.image_reader import ImageReader
from data.tokenizers.spm import XLMRTokenizer
from data.transforms import EvalTransform
from data.vqa_dataset import VQACollate, VQADataset, VQASample
from data.vqa_index import VQARecord
from tests.paths import FIXTURES

SPM = FIXTURES / "evaluation_tokenizer.spm"
SIDE = 8


@pytest.fixture
def tokenizer():
    return XLMRTokenizer(SPM)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "one.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG not really")
    return tmp_path


def record(name="images/one.png", tokens=(5, 6, 7, 8, 9), labels=(2, 0), scores=(0.6, 1.0), question_id=77):
    return VQARecord(name, tokens, labels, scores, question_id)


def dataset(root, tokenizer, *records, transform=None, max_tokens=64, **options):
    images = ImageReader(root, transform or EvalTransform(SIDE), image_size=SIDE, **options)
    return VQADataset(records, images, tokenizer, max_tokens=max_tokens)


def test_a_sample_has_the_transformed_image_and_the_token_segment(root, tokenizer):
    samples = dataset(root, tokenizer, record())
    sample = samples.sample(0, np.random.default_rng(0))
    assert len(samples) == 1
    assert (sample.sample_id, sample.question_id, sample.image_error) == (0, 77, "")
    assert sample.image.shape == (3, SIDE, SIDE)
    assert sample.image.dtype == torch.uint8
    assert sample.tokens == [tokenizer.bos_id, 5, 6, 7, 8, 9, tokenizer.eos_id]
    assert (tuple(sample.labels), tuple(sample.scores)) == ((2, 0), (0.6, 1.0))


def test_a_long_question_is_cut_with_both_special_tokens_kept(root, tokenizer):
    sample = dataset(root, tokenizer, record(), max_tokens=5).sample(0, np.random.default_rng(0))
    assert sample.tokens == [tokenizer.bos_id, 5, 6, 7, tokenizer.eos_id]


def test_the_transform_draws_from_the_generator_that_it_is_given(root, tokenizer):
    def noise(image, rng):
        return torch.full((3, SIDE, SIDE), int(rng.integers(256)), dtype=torch.uint8)

    samples = dataset(root, tokenizer, record(), transform=noise)
    first, again, other = (samples.sample(0, np.random.default_rng(seed)).image for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["images/broken.png", "images/absent.png"])
def test_a_broken_image_stops_or_is_replaced_by_grey_on_request(root, tokenizer, name):
    with pytest.raises(DataError, match=rf"^sample 0 \(question 77\): .*{Path(name).name}"):
        dataset(root, tokenizer, record(name)).sample(0, np.random.default_rng(0))
    sample = dataset(root, tokenizer, record(name), replace_broken_images=True).sample(0, np.random.default_rng(0))
    assert Path(name).name in sample.image_error
    assert sample.image.shape == (3, SIDE, SIDE)
    assert set(sample.image.flatten().tolist()) == {128}


def sample(index, tokens, labels=(), scores=(), replaced=False):
    image = torch.full((3, 2, 2), index, dtype=torch.uint8)
    return VQASample(index, 100 + index, image, tokens, labels, scores, "no image" if replaced else "")


def test_a_batch_has_soft_targets_ids_and_the_number_of_replaced_images():
    batch = VQACollate(pad_id=1, num_answers=4)(
        [sample(3, [0, 9, 2], (2, 0), (0.6, 1.0)), sample(5, [0, 2], replaced=True)]
    )
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["image"].dtype == torch.uint8
    assert batch["question"].tolist() == [[0, 9, 2], [0, 2, 1]]
    assert batch["padding_mask"].tolist() == [[0, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(batch["targets"], torch.tensor([[1.0, 0.0, 0.6, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert (batch["sample_id"], batch["question_id"]) == ([3, 5], [103, 105])
    assert (batch["images_replaced"], batch["image_errors"]) == (1, ["no image"])
