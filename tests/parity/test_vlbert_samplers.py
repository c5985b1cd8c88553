"""VL-BERT's orders of samples against recorded ones; equal."""

import pytest

from data.vlbert_samplers import epoch_shard, grouped_batches
from tests.parity.fixture_files import load_fixture


@pytest.mark.parametrize(("name", "drop"), [("grouped", False), ("grouped_drop", True)])
def test_batches_of_like_shape(name, drop):
    recording = load_fixture("vlbert_samplers.pt")
    inputs = recording["inputs"]
    found = grouped_batches(inputs["order"], inputs["group_ids"], inputs["batch_size"], drop_uneven=drop)
    assert found == recording["outputs"][name]


def test_contiguous_shards():
    recording = load_fixture("vlbert_samplers.pt")
    for key, ranks in recording["outputs"]["distributed"].items():
        world_size, epoch, shuffle = map(int, key.split("_"))
        for rank, expected in enumerate(ranks):
            found = epoch_shard(
                recording["inputs"]["n"], epoch, rank=rank, world_size=world_size, shuffle=bool(shuffle)
            )
            assert found == expected, key
