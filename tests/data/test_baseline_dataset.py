"""The course baseline's images and batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.baseline_dataset import NO_TARGET, BaselineDataset, BaselineTransform, collate
from data.baseline_dictionaries import Dictionaries
from data.errors import DataError
from data.image_reader import ImageReader
from data.vizwiz import VizWizRow


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 37, 3), dtype=np.uint8)


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_images_are_those_of_the_original(picture):
    original = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])
    assert torch.equal(BaselineTransform(24)(picture, draws(0)).float() / 255, original(Image.fromarray(picture)))


def test_augmentation_depends_on_the_generator_alone(picture):
    transform = BaselineTransform(24, augment=True)
    one, again, other = (transform(picture, draws(seed)) for seed in (1, 1, 2))
    assert one.shape == (3, 24, 24)
    assert one.dtype == torch.uint8
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_augmentation_never_mirrors():
    ramp = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 64, 3)).copy()
    transform = BaselineTransform(16, augment=True)
    for seed in range(20):
        image = transform(ramp, draws(seed)).float()
        assert image[:, :, -1].mean() > image[:, :, 0].mean() + 60


def test_a_batch_holds_images_vectors_targets_and_names_the_unreadable(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    rows = [VizWizRow("a.png", "What is this?"), VizWizRow("b.png", "?")]
    dictionaries = Dictionaries({"cup": 0}, {"what": 0, "is": 1})

    def dataset(replace: bool, targets: list[int] | None) -> BaselineDataset:
        images = ImageReader(tmp_path, BaselineTransform(8), image_size=8, replace_broken_images=replace)
        return BaselineDataset(rows, images, dictionaries, targets)

    samples = dataset(True, [4, 5])
    batch = collate([samples.sample(index, draws(0)) for index in range(len(samples))])
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["question"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["target"].tolist() == [4, 5]
    assert (batch["sample_id"], batch["images_replaced"]) == ([0, 1], 1)
    assert "b.png" in batch["image_errors"][0]
    assert dataset(True, None).sample(0, draws(0))["target"] == NO_TARGET
    with pytest.raises(DataError, match=r"sample 1 \(question b\): cannot read image .*b\.png"):
        dataset(False, None).sample(1, draws(0))
