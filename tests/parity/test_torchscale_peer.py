"""Our BEiT-3 trunk against the package torchscale, from which the original was built: same weights, float32, CPU.

Needs torchscale 0.3 with timm and fairscale of any version (``pip install --no-deps torchscale``: its own pins are too
old for today's torch). Measured: tokens within 2e-6, gradients within 3e-6 of their largest entry.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.workload_beit3 import build_torchscale
from models.beit3.beit3 import BEiT3
from models.beit3.config import BEiT3Config
from models.loading import load_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # timm calls the import path that torchscale uses deprecated
    pytest.importorskip("torchscale.model.BEiT3", reason="torchscale is not installed")

TOKENS = {"atol": 1e-5, "rtol": 0}
GRAD_RTOL = 1e-4
NUM_IMAGE, NUM_TEXT = 26, 9  # 5 x 5 patches and the class token
CONFIG = BEiT3Config(
    image_size=40,
    patch_size=8,
    embed_dim=48,
    num_layers=3,
    num_heads=4,
    vocab_size=70,
    max_text_positions=32,
    normalize_output=True,
)


def both(config: BEiT3Config = CONFIG) -> tuple[BEiT3, nn.Module]:
    """Ours and the package's trunk with the same random weights, far from start values."""
    torch.manual_seed(0)
    peer = build_torchscale(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = BEiT3(config)
    load_weights(ours, peer.state_dict())
    return ours.eval(), peer.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    padding_mask = torch.zeros(3, NUM_TEXT, dtype=torch.bool)
    padding_mask[1, 5:] = padding_mask[2, 8:] = True
    return torch.randn(3, 3, 40, 40), torch.randint(0, CONFIG.vocab_size, (3, NUM_TEXT)), padding_mask


def captioning_mask() -> Tensor:
    """(N, N), 1 where a token may not look: image at text, text at later text."""
    hidden = torch.zeros(NUM_IMAGE + NUM_TEXT, NUM_IMAGE + NUM_TEXT)
    hidden[:NUM_IMAGE, NUM_IMAGE:] = 1
    hidden[NUM_IMAGE:, NUM_IMAGE:] = torch.ones(NUM_TEXT, NUM_TEXT).triu(1)
    return hidden


def assert_same_gradients(ours: nn.Module, peer: nn.Module, loss_ours: Tensor, loss_peer: Tensor) -> None:
    loss_ours.backward()
    loss_peer.backward()
    expected = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        if "k_proj" in name and name.endswith("bias"):
            continue  # zero up to rounding noise in sum
        theirs = expected[name].grad
        if theirs is None:
            assert parameter.grad is None, name
        else:
            assert (parameter.grad - theirs).abs().max() <= GRAD_RTOL * theirs.abs().max(), name


@pytest.mark.parametrize("normalize_output", [True, False])
@torch.no_grad()
def test_joint_tokens_match(normalize_output: bool):
    ours, peer = both(BEiT3Config(**{**vars(CONFIG), "normalize_output": normalize_output}))
    image, text, padding_mask = inputs()
    expected = peer(text, image, padding_mask)["encoder_out"]
    assert_close(torch.cat(ours(image, text, padding_mask), dim=1), expected, **TOKENS)


@torch.no_grad()
def test_image_tokens_alone_match():
    ours, peer = both()
    image, _, _ = inputs()
    assert_close(ours(image)[0], peer(visual_tokens=image)["encoder_out"], **TOKENS)


@torch.no_grad()
def test_text_tokens_alone_match():
    ours, peer = both()
    _, text, padding_mask = inputs()
    expected = peer(textual_tokens=text, text_padding_position=padding_mask)["encoder_out"]
    assert_close(ours(text=text, padding_mask=padding_mask)[1], expected, **TOKENS)


@torch.no_grad()
def test_captioning_tokens_match():
    ours, peer = both()
    image, text, padding_mask = inputs()
    expected = peer(text, image, padding_mask, attn_mask=captioning_mask())["encoder_out"]
    assert_close(torch.cat(ours(image, text, padding_mask, causal_text=True), dim=1), expected, **TOKENS)


def test_gradients_of_the_class_token_match():
    ours, peer = both()
    image, text, padding_mask = inputs()
    image_tokens, _ = ours(image, text, padding_mask, keep=(1, 0))
    expected = peer(text, image, padding_mask)["encoder_out"]
    assert_same_gradients(ours, peer, image_tokens[:, 0].pow(2).sum(), expected[:, 0].pow(2).sum())


def test_gradients_of_the_captioning_tokens_match():
    ours, peer = both()
    image, text, padding_mask = inputs()
    _, text_tokens = ours(image, text, padding_mask, causal_text=True, keep=(0, NUM_TEXT))
    expected = peer(text, image, padding_mask, attn_mask=captioning_mask())["encoder_out"][:, NUM_IMAGE:]
    real = (~padding_mask).unsqueeze(-1)
    assert_same_gradients(ours, peer, (text_tokens * real).pow(3).sum(), (expected * real).pow(3).sum())
