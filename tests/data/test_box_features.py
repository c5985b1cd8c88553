"""Box files: the original's JSON and the packed form hold the same numbers; what is broken is named."""

import base64
import json
import os
import re
import zipfile

import numpy as np
import pytest

from data.box_features import FEATURE_SIZE, JSONRegions, PackedRegions, Regions, open_regions, pack, write_json
from data.errors import DataError
from scripts import pack_box_features
from tests.helpers import sent_to_a_process
from tests.scripts.bad_inputs import failure


def drawn(image_id: int, count: int) -> Regions:
    rng = np.random.default_rng(image_id)
    boxes, features = rng.random((count, 4), dtype=np.float32) * 90, rng.random((count, FEATURE_SIZE), dtype=np.float32)
    return Regions(boxes, features, rng.random(FEATURE_SIZE, dtype=np.float32), (100, 90 + image_id))


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "json"
    source.mkdir()
    for image_id, count in ((7, 3), (2, 1), (30, 5)):
        write_json(source / f"{image_id}.json", image_id, drawn(image_id, count))
    return source


def assert_same(one: Regions, other: Regions) -> None:
    assert one.size == other.size
    for name in ("boxes", "features", "whole"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == np.float32


def test_packed_regions_are_those_of_the_json_files(folder, tmp_path, capsys):
    pack_box_features.main(["--input", str(folder), "--output", str(tmp_path / "packed")])
    assert capsys.readouterr().out.startswith("wrote 9 regions of 3 images")
    packed, source = PackedRegions(tmp_path / "packed"), JSONRegions(folder)
    assert len(packed) == 3
    for image_id, count in ((7, 3), (2, 1), (30, 5)):
        assert_same(packed.regions(image_id), source.regions(image_id))
        assert_same(source.regions(image_id), drawn(image_id, count))
    copy = sent_to_a_process(packed)
    assert_same(copy.regions(30), packed.regions(30))
    assert not [name for name in os.listdir(tmp_path / "packed") if name.startswith(".")]


def test_zipped_files_are_read_and_packed_like_the_folder(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "boxes.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"boxes/{file.name}")
    source = open_regions(tmp_path / "boxes.zip")
    assert source.image_ids() == open_regions(folder).image_ids() == {2, 7, 30}
    assert_same(source.regions(7), drawn(7, 3))
    with pytest.raises(DataError, match=r"boxes.zip has no 8.json: every image of the questions needs its box file"):
        source.regions(8)
    pack_box_features.main(["--input", str(tmp_path / "boxes.zip"), "--output", str(tmp_path / "packed")])
    packed = open_regions(tmp_path / "packed")
    assert_same(packed.regions(30), drawn(30, 5))
    assert packed.sizes() == {2: (100, 92), 7: (100, 97), 30: (100, 120)}
    assert source.sizes() is None


def test_half_precision_halves_the_features_and_errs_by_their_precision(folder, tmp_path):
    pack(JSONRegions(folder), (2, 7, 30), tmp_path / "half", dtype="float16")
    found, expected = PackedRegions(tmp_path / "half").regions(7), drawn(7, 3)
    assert np.array_equal(found.boxes, expected.boxes)
    assert np.abs(found.features - expected.features).max() < 5e-4


def test_without_a_feature_of_the_whole_image_it_is_the_mean_of_its_regions(folder):
    path = folder / "7.json"
    content = json.loads(path.read_text())
    del content["image_box_feature"]
    content["boxes"] = base64.encodebytes(base64.b64decode(content["boxes"])).decode()  # with line breaks
    path.write_text(json.dumps(content))
    found = JSONRegions(folder).regions(7)
    assert np.allclose(found.whole, found.features.mean(axis=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_boxes": 0}, "num_boxes must be a whole number above 0, got 0"),
        ({"num_boxes": 4}, "boxes has 48 bytes, 4 x 4 float32 numbers have 64"),
        ({"features": base64.b64encode(b"\0" * 12).decode()}, "features has 12 bytes, 3 x 2048 float32 numbers"),
        ({"features": "ab"}, "features is not base64"),
        ({"boxes": None}, "boxes must be base64 text, got None"),
        ({"image_w": "640"}, "image_w and image_h must be whole numbers above 0"),
        ({"boxes": base64.b64encode(np.full(12, np.nan, "<f4").tobytes()).decode()}, "boxes holds NaN or infinite"),
    ],
)
def test_a_broken_box_file_is_named_and_nothing_is_packed(folder, tmp_path, values, message, capsys):
    path = folder / "7.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(DataError, match=message):
        JSONRegions(folder).regions(7)
    argv = ["--input", str(folder), "--output", str(tmp_path / "packed")]
    code, line = failure(capsys, argv, lambda *arguments: pack_box_features.main(list(arguments)))
    assert code == 2
    assert re.search(message, line)
    assert os.listdir(tmp_path / "packed") == []


def test_nothing_stands_in_the_folder_before_all_regions_are_read(folder, tmp_path):
    """So a kill while they are read leaves nothing, or the packed form that was there."""
    seen = []

    def progress(ids):
        for image_id in ids:
            yield image_id
            seen.append(sorted(os.listdir(tmp_path / "packed")))

    pack(JSONRegions(folder), (2, 7, 30), tmp_path / "packed", progress=progress)
    whole = sorted(os.listdir(tmp_path / "packed"))
    pack(JSONRegions(folder), (2, 7, 30), tmp_path / "packed", progress=progress)
    assert seen == [[]] * 3 + [whole] * 3


def test_an_image_without_regions_is_named(folder, tmp_path):
    pack(JSONRegions(folder), (2, 7), tmp_path / "packed")
    with pytest.raises(DataError, match="has no regions of image 30"):
        PackedRegions(tmp_path / "packed").regions(30)
    with pytest.raises(DataError, match="no such file: .*99.json"):
        JSONRegions(folder).regions(99)
    with pytest.raises(DataError, match="no folder of box files"):
        JSONRegions(folder / "absent")


@pytest.mark.parametrize("name", ["features", "boxes", "first"])
def test_a_packed_file_that_is_cut_off_is_refused(folder, tmp_path, name):
    pack(JSONRegions(folder), (2, 7, 30), tmp_path / "packed")
    path = tmp_path / "packed" / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=rf"{name}.npy has \d+ bytes, regions.json says \d+"):
        PackedRegions(tmp_path / "packed")


def test_a_packed_folder_is_not_replaced_unasked(folder, tmp_path, capsys):
    argv = ["--input", str(folder), "--output", str(tmp_path / "packed")]
    pack_box_features.main(argv)
    code, line = failure(capsys, argv, lambda *arguments: pack_box_features.main(list(arguments)))
    assert code == 2
    assert "holds packed regions: give --overwrite" in line
    pack_box_features.main([*argv, "--overwrite", "--dtype", "float16"])
    assert len(PackedRegions(tmp_path / "packed")) == 3
