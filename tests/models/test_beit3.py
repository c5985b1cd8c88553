"""Properties of the BEiT-3 trunk that no recording shows."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from models import linear
from models.beit3.beit3 import BEiT3, EncoderLayer, compile_layers, init_beit3_weights
from models.beit3.config import BEiT3Config, StartValues
from models.errors import ModelError

IMAGE = 24  # pixels, patches of 8: 9 patches and the class token
NUM_IMAGE, NUM_TEXT = 10, 6
SIZES = {"patch_size": 8, "embed_dim": 24, "num_layers": 3, "num_heads": 3, "vocab_size": 40, "max_text_positions": 12}


def trunk(**changes: object) -> BEiT3:
    """A small trunk with weights far from their start values, so that every part matters."""
    torch.manual_seed(0)
    config = BEiT3Config(**{"image_size": IMAGE, **SIZES, **changes})
    model = BEiT3(config)
    init_beit3_weights(model, StartValues(image_positions=0.5, text_positions=0.5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, IMAGE, IMAGE), torch.randint(0, SIZES["vocab_size"], (batch, NUM_TEXT))


def padding() -> Tensor:
    mask = torch.zeros(2, NUM_TEXT, dtype=torch.long)
    mask[1, 4:] = 1
    return mask


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("causal_text", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("normalize_output", [False, True])
@pytest.mark.parametrize("keep", [(1, 0), (0, NUM_TEXT), (1, 1), (NUM_IMAGE, 2)])
def test_computing_only_the_kept_tokens_changes_neither_them_nor_the_gradients(
    causal_text: bool, padded: bool, normalize_output: bool, keep: tuple[int, int]
):
    """Measured: 1e-6 on tokens, 2e-6 of the largest entry on gradients."""
    model = trunk(normalize_output=normalize_output)
    image, text = inputs()
    mask = padding() if padded else None
    kept = model(image, text, mask, causal_text=causal_text, keep=keep)
    everything = model(image, text, mask, causal_text=causal_text)
    losses = []
    for streams in (kept, everything):
        first = [stream[:, :number] for stream, number in zip(streams, keep, strict=True)]
        losses.append(sum((tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum() for tokens in first))
    for stream, whole, number in zip(kept, everything, keep, strict=True):
        assert stream.shape[1] == number
        assert_close(stream, whole[:, :number], atol=1e-5, rtol=0)
    ours, expected = gradients(model, losses[0]), gradients(model, losses[1])
    for name, parameter in model.named_parameters():
        if "k_proj" in name and name.endswith("bias"):
            continue  # a common shift of all keys changes nothing: rounding noise
        zero = torch.zeros_like(parameter)
        grad, whole = (zero if grads[name] is None else grads[name] for grads in (ours, expected))
        assert (grad - whole).abs().max() <= 1e-5 * whole.abs().max(), name


@pytest.mark.parametrize(("keep", "branch"), [((1, 0), "B"), ((0, NUM_TEXT), "A")])
def test_a_stream_that_is_not_kept_gets_zero_gradients_in_the_last_layer_not_none(keep: tuple[int, int], branch: str):
    model = trunk(normalize_output=True)
    image_tokens, text_tokens = model(*inputs(), keep=keep)
    grads = gradients(model, (image_tokens if keep[0] else text_tokens).pow(2).sum())
    unused = [f"self_attn.q_proj.{branch}", f"self_attn.out_proj.{branch}", f"self_attn.inner_attn_ln.{branch}"]
    unused += [f"ffn.{branch}.fc1", f"ffn.{branch}.fc2", f"ffn.{branch}.ffn_layernorm", f"final_layer_norm.{branch}"]
    last = f"encoder.layers.{SIZES['num_layers'] - 1}"
    unused = {f"{last}.{name}.{kind}" for name in unused for kind in ("weight", "bias")}
    unused |= {f"encoder.layer_norm.{branch}.{kind}" for kind in ("weight", "bias")}
    assert {name for name, grad in grads.items() if grad is not None and not grad.any()} == unused


@torch.no_grad()
def test_padding_changes_no_real_token():
    model, (image, text) = trunk().eval(), inputs()
    padded_image, padded_text = model(image, text, padding())
    alone_image, alone_text = model(image[1:], text[1:, :4])
    assert_close(padded_image[1:], alone_image, atol=1e-5, rtol=0)
    assert_close(padded_text[1:, :4], alone_text, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_padding_mask_without_padding_equals_none():
    model, (image, text) = trunk().eval(), inputs()
    for with_mask, without in zip(model(image, text, torch.zeros_like(text)), model(image, text), strict=True):
        assert_close(with_mask, without, atol=1e-5, rtol=0)


@torch.no_grad()
def test_in_captioning_no_token_sees_a_later_one_and_the_image_sees_no_text():
    model, (image, text) = trunk().eval(), inputs()
    changed = text.clone()
    changed[:, 3] = (changed[:, 3] + 1) % SIZES["vocab_size"]
    before_image, before_text = model(image, text, causal_text=True)
    after_image, after_text = model(image, changed, causal_text=True)
    assert torch.equal(before_image, after_image)
    assert torch.equal(before_text[:, :3], after_text[:, :3])
    assert not torch.allclose(before_text[:, 3:], after_text[:, 3:])


@torch.no_grad()
def test_one_modality_alone_uses_its_own_branch():
    model, (image, text) = trunk(normalize_output=True).eval(), inputs()
    image_tokens, nothing = model(image)
    assert nothing is None
    assert image_tokens.shape == (2, NUM_IMAGE, SIZES["embed_dim"])
    before_text = model(text=text)[1]
    for name, parameter in model.named_parameters():
        if ".B." in name or "text_embed" in name:
            parameter.fill_(float("nan"))
    assert torch.equal(model(image)[0], image_tokens)
    for name, parameter in model.named_parameters():
        parameter.fill_(float("nan") if ".A." in name or "vision" in name else 0.5)
    assert before_text.isfinite().all()
    assert model(text=text)[1].isfinite().all()


@torch.no_grad()
def test_the_first_two_position_rows_are_never_read():
    model, (image, text) = trunk().eval(), inputs()
    before = model(image, text)
    for table in (model.encoder.embed_positions.A, model.encoder.embed_positions.B):
        table.weight[:2] = float("nan")
    for stream, expected in zip(model(image, text), before, strict=True):
        assert torch.equal(stream, expected)


def test_stochastic_depth_acts_in_training_only():
    model, given = trunk(drop_path=0.9), inputs()
    plain = trunk()(*given)[0]
    torch.manual_seed(3)
    assert not torch.allclose(model.train()(*given)[0], plain)
    assert torch.equal(model.eval()(*given)[0], plain)


def test_stochastic_depth_leaves_the_first_layer_alone_and_drops_whole_samples():
    model = trunk(num_layers=2, drop_path=0.999).train()
    first = EncoderLayer.forward
    image, text = inputs()
    torch.manual_seed(4)
    outputs = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(image, text)
    assert first is EncoderLayer.forward
    assert torch.equal(
        outputs[0][0], outputs[1][0]
    )  # both branches of the last layer dropped, for image and text alike
    assert torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.slow
def test_compiled_layers_give_the_same_numbers_and_keep_their_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "_MIN_PRODUCTS_FOR_ONEDNN", 1)
    monkeypatch.setattr(linear, "_PREFERS_ONEDNN", True)
    plain = trunk(drop_path=0.3)
    compiled = copy.deepcopy(plain)
    compile_layers(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    grads = []
    for model in (plain, compiled):
        torch.manual_seed(5)
        image_tokens, _ = model.train()(*inputs(batch=16), keep=(1, 0))
        grads.append(gradients(model, image_tokens.pow(2).sum()))
    for name, expected in grads[0].items():
        if expected is not None:
            assert_close(grads[1][name], expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    model, given = trunk(), inputs()
    expected = model(*given)[0]
    with torch.autocast("cpu", torch.bfloat16):
        image_tokens, text_tokens = model(*given)
    assert image_tokens.dtype == text_tokens.dtype == torch.float32
    assert (image_tokens - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_image_of_another_size_names_both():
    with pytest.raises(ModelError, match="32 x 24 pixels for a model of 24 x 24"):
        trunk()(torch.zeros(1, 3, 32, 24))


def test_a_text_longer_than_the_position_table_names_both():
    with pytest.raises(ModelError, match="11 tokens is longer than the 10 positions"):
        trunk()(text=torch.zeros(1, 11, dtype=torch.long))
