"""The FLOP formulas behind the model FLOPs utilisation, against torch's counter of what really ran, at tiny sizes.

Tolerance 0: FLOPs are whole numbers, and each difference that the formulas mean (work done that is not useful, or the
training rule of three forward passes) stands in its test with its own count.
"""

import argparse
import math
from collections.abc import Callable

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_llava
from benchmarks.workload_beit3 import beit3_workload
from benchmarks.workload_vle import vle_workload
from models.beit3.config import beit3_config
from models.vle.config import VLEConfig

BATCH = 2
WORDS = 12  # of each question or caption, ends included


@pytest.fixture(autouse=True)
def countable(monkeypatch):
    """The counter does not know oneDNN's product, which large layers use on the CPU."""
    monkeypatch.setattr("models.linear._MIN_PRODUCTS_FOR_ONEDNN", math.inf)


def counted(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions; attention as two products over all pairs, also the hidden ones."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def arguments(model: str, task: str = "vqav2") -> argparse.Namespace:
    return argparse.Namespace(
        model=model, task=task, device="cpu", drop_path=0.0, checkpoint_activations=False, compile=False,
        has_peer=False, ragged=False, question_tokens=WORDS - 2, pad_to=None,
    )  # fmt: skip


@pytest.mark.parametrize("task", ["vqav2", "coco_captioning"])
def test_beit3(task):
    args = arguments("beit3_tiny_patch32_64", task)
    config = beit3_config(args.model, task)
    work = beit3_workload(args, BATCH)
    side = work.build_ours()
    # a caption's words are multiplied with the later ones too, and then do not look at them
    later = WORDS * (WORDS - 1) // 2 if task == "coco_captioning" else 0
    hidden = BATCH * config.num_layers * 4 * config.embed_dim * later
    assert counted(side.forward) == work.forward_flops + hidden

    # backward is twice the forward pass but for the patches, whose pixels want no gradient
    pixels = BATCH * 2 * config.num_patches * config.in_chans * config.patch_size**2 * config.embed_dim
    step = counted(lambda: side.loss(side.forward()).backward())
    assert step == 3 * (work.forward_flops + hidden) - pixels


def test_vle():
    work = vle_workload(arguments("vle_tiny"), BATCH)
    side = work.build_ours()
    side.model.eval()
    config = side.model.vle.config
    assert isinstance(config, VLEConfig)
    # DeBERTa: distances are scored per distance (2 T - 1 of them), then looked up for T keys; and their projections
    text = config.text
    distances = 2 * WORDS - 1
    scored = BATCH * 4 * WORDS * (distances - WORDS) * text.hidden_size
    projected = 2 * 2 * distances * text.hidden_size**2
    more = text.num_hidden_layers * (scored + projected)
    assert counted(side.forward) == work.forward_flops + more

    vision = config.vision
    pixels = BATCH * 2 * vision.grid**2 * 3 * vision.patch_size**2 * vision.hidden_size
    step = counted(lambda: side.loss(side.forward()).backward())
    assert step == 3 * (work.forward_flops + more) - pixels


def test_llava_with_adapters():
    flags = "--width 32 --layers 2 --heads 2 --vocabulary 50 --length 20 --batch_size 3 --rank 2"
    args = bench_llava.build_parser().parse_args(flags.split())
    model, loss = bench_llava.our_side(args, None)
    model.train()
    lengths = bench_llava.lengths_of(args)
    hidden = sum(length * (length - 1) // 2 for length in lengths)
    scored = 3 * args.layers * 4 * args.width * hidden
    # into the first layer goes the frozen embedding, which wants no gradient through q, k, v and their adapters
    first = sum(lengths) * 3 * (2 * args.width**2 + 2 * args.width * args.rank)
    assert counted(lambda: loss().backward()) == bench_llava.step_flops(args) + scored - first
