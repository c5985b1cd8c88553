"""VLE's modules: published sizes, masks, distances, start values, what is refused."""

import copy

import pytest
import torch
from torch.testing import assert_close

from models.errors import ModelError
from models.loading import load_weights
from models.vle.config import VLEConfig
from models.vle.deberta import DebertaV2, _shift, distance_buckets
from models.vle.loading import prepare_vle_state_dict, published_state_dict, unwrap_names
from models.vle.vle import VLE, VLEForVQA

TEXT = {
    "model_type": "deberta-v2",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "position_buckets": 8,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 16,
    "patch_size": 8,
}
TINY = {
    "model_type": "vle",
    "hidden_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 28,
    "text_config": TEXT,
    "vision_config": VISION,
    "id2label": {"0": "yes", "1": "no", "2": "red"},
}


def published(size: str) -> VLEConfig:
    width, layers, heads, inner, patch = {"base": (768, 12, 12, 3072, 16), "large": (1024, 24, 16, 4096, 14)}[size]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": inner}
    text = TEXT | sizes | {"vocab_size": 128100, "num_hidden_layers": layers}
    text |= {"max_position_embeddings": 512, "position_buckets": 256}
    vision = VISION | sizes | {"num_hidden_layers": layers - 1, "image_size": 224, "patch_size": patch}
    return VLEConfig.from_dict(TINY | sizes | {"num_hidden_layers": 6, "text_config": text, "vision_config": vision})


@pytest.mark.parametrize(
    ("size", "trunk", "whole", "keys"), [("base", 378328320, 385501497, 710), ("large", 930356224, 940967993, 1094)]
)
def test_published_sizes_have_the_published_numbers_of_parameters_and_keys(size, trunk, whole, keys):
    with torch.device("meta"):
        model = VLEForVQA(published(size), 3129)
    assert sum(parameter.numel() for parameter in model.vle.parameters()) == trunk
    assert sum(parameter.numel() for parameter in model.parameters()) == whole
    assert len(model.state_dict()) + 2 == keys  # the original also keeps two tables of place numbers


def tiny_model(**values: object) -> VLEForVQA:
    torch.manual_seed(0)
    return VLEForVQA(VLEConfig.from_dict(TINY | values)).eval()


def test_no_mask_and_a_mask_of_ones_are_the_same():
    model, pixels, ids = tiny_model(), torch.randn(2, 3, 16, 16), torch.randint(0, 40, (2, 6))
    assert_close(model(pixels, ids), model(pixels, ids, torch.ones_like(ids)), atol=1e-6, rtol=0)


def test_padding_changes_no_answer():
    model, pixels, ids = tiny_model(), torch.randn(2, 3, 16, 16), torch.randint(4, 40, (2, 6))
    longer = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    mask = (torch.arange(11) < 6).long().expand(2, -1)
    assert_close(model(pixels, ids), model(pixels, longer, mask), atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient():
    model = tiny_model()
    model(torch.randn(2, 3, 16, 16), torch.randint(0, 40, (2, 6))).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_training_step_may_follow_an_evaluation():
    model, pixels, ids = tiny_model(), torch.randn(2, 3, 16, 16), torch.randint(0, 40, (2, 17))
    with torch.inference_mode():
        model(pixels, ids)
    model(pixels, ids).sum().backward()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_shifted_rows_are_the_terms_of_each_distance(length):
    scores = torch.arange(2 * length * (2 * length - 1)).view(2, length, 2 * length - 1)
    expected = torch.stack(
        [torch.stack([scores[:, i, j - i + length - 1] for j in range(length)], -1) for i in range(length)], -2
    )
    assert torch.equal(_shift(scores), expected)


def test_near_distances_have_a_bucket_each_and_the_table_is_odd():
    distances = torch.arange(-31, 32)
    buckets = distance_buckets(distances, 8, 32)
    assert torch.equal(buckets[distances.abs() <= 4], distances[distances.abs() <= 4])
    assert torch.equal(buckets, -buckets.flip(0))
    assert buckets.max() <= 7


@pytest.mark.parametrize("length", [3, 5, 6, 20])
def test_distances_are_gathered_by_their_buckets(length):
    """The long way: a table of every pair of places, as the reference has it."""
    torch.manual_seed(1)
    config = VLEConfig.from_dict(TINY).text
    model = DebertaV2(config).eval()
    ids = torch.randint(0, 40, (2, length))
    layer = model.encoder.layer[0].attention.self
    tokens = model.embeddings(ids, None)
    places = torch.arange(length)
    table = distance_buckets(places[:, None] - places, config.position_buckets, config.max_positions)
    table = (table + config.position_buckets).clamp(0, 2 * config.position_buckets - 1)
    rel = model.encoder.LayerNorm(model.encoder.rel_embeddings.weight)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (config.num_attention_heads, -1)).transpose(-3, -2)

    q, k, v = (heads(project(tokens)) for project in (layer.query_proj, layer.key_proj, layer.value_proj))
    pq, pk = heads(layer.query_proj(rel)), heads(layer.key_proj(rel))
    scores = q @ k.transpose(-1, -2)
    scores = scores + torch.einsum("bhic,hijc->bhij", q, pk[:, table])
    scores = (scores + torch.einsum("bhjc,hijc->bhij", k, pq[:, table])) / (3 * q.shape[-1]) ** 0.5
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    captured = []
    layer.register_forward_hook(lambda _, __, out: captured.append(out))
    model(ids)
    assert_close(captured[0], expected, atol=1e-5, rtol=0)


def test_start_values_are_normal_with_the_configs_deviation_and_norms_are_one():
    model = tiny_model(initializer_range=0.05, hidden_size=64, intermediate_size=256)
    weight = model.vle.cross_modal_text_layers[0].intermediate.dense.weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(model.vqa_classifier[1].weight, torch.ones(128))
    assert not model.vqa_classifier[3].bias.any()


def test_another_image_size_resamples_the_position_table():
    small, large = tiny_model(), VLEConfig.from_dict(TINY | {"vision_config": VISION | {"image_size": 32}})
    state = prepare_vle_state_dict(small.state_dict(), large)
    load_weights(VLEForVQA(large), state)
    name = "vle.vision_model.vision_model.embeddings.position_embedding.weight"
    assert state[name].shape == (17, 12)
    assert torch.equal(state[name][0], small.state_dict()[name][0])


def test_what_is_written_has_the_originals_names_and_loads_again():
    model = tiny_model()
    state = published_state_dict(model.state_dict(), model.config)
    assert len(state) == len(model.state_dict()) + 2
    for prefix in ("", "model.", "module.", "module.model."):
        known, strangers = unwrap_names({prefix + name: value for name, value in state.items()})
        assert (known.keys(), strangers) == (state.keys(), [])
    bare = {name.removeprefix("vle."): value for name, value in state.items() if name.startswith("vle.")}
    prepared = prepare_vle_state_dict(bare, model.config)
    assert prepared.keys() == {name for name in model.state_dict() if name.startswith("vle.")}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text_config", {"conv_kernel_size": 3}, "conv_kernel_size 3 is not implemented here, only 0 or None"),
        ("text_config", {"pos_att_type": "c2p"}, "pos_att_type .* is not implemented"),
        ("text_config", {"position_buckets": -1}, "position_buckets must be a whole number above 0, got -1"),
        ("text_config", {"hidden_size": 17}, "hidden_size 17 is not a multiple of num_attention_heads 2"),
        ("text_config", {"hidden_size": "16"}, "hidden_size must be a whole number above 0, got '16'"),
        ("vision_config", {"model_type": "vit"}, "model_type 'vit' is not implemented here"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act 'relu' is not implemented here"),
        ("vision_config", {"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06 is not implemented here"),
        ("vision_config", {"image_size": 4}, "image_size 4 is smaller than patch_size 8"),
        (None, {"model_type": "bert"}, "model_type 'bert' is not implemented here, only 'vle'"),
        (None, {"text_config": None}, "text_config must be an object"),
        (None, {"id2label": {"a": "yes"}}, "the keys of id2label must be whole numbers"),
        (None, {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be a number from 0 to below 1"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(section, values, message):
    config = copy.deepcopy(TINY)
    (config if section is None else config[section]).update(values)
    with pytest.raises(ModelError, match=message):
        VLEConfig.from_dict(config)


def test_string_spellings_and_unknown_keys_are_taken():
    config = TINY | {"text_config": TEXT | {"pos_att_type": "p2c|c2p", "top_k": 50}, "id2label": ["a", "b"]}
    assert VLEConfig.from_dict(config).labels == ("a", "b")
    nested = TINY | {"vision_config": {"model_type": "clip", "vision_config": VISION}}
    assert VLEConfig.from_dict(nested).vision == VLEConfig.from_dict(TINY).vision


def test_images_of_another_size_are_refused():
    with pytest.raises(ModelError, match=r"images of shape \(3, 24, 24\), the model takes \(3, 16, 16\)"):
        VLE(VLEConfig.from_dict(TINY))(torch.randn(1, 3, 24, 24), torch.zeros(1, 2, dtype=torch.long))
