"""VLE for question answering, beside transformers' CLIP and DeBERTa towers under our fusion layers and head.

No public package has the fusion layers, so they are ours on both sides; the peer pads its questions as the original
does. Dropout is 0.1 on both, as in the recipe.
"""

import argparse

import torch
from torch import Tensor, nn

from benchmarks.workload import NUM_ANSWERS, Side, TextBatch, Workload, draw_text
from models.losses import vqa_loss
from models.vle.config import VLEConfig
from models.vle.vle import VLEForVQA

MODEL = "vle_base_384"
PAD_TO = 50
PEER_PACKAGES = ("transformers",)
VOCABULARY = 8192  # rows that are not looked up would only cost memory


def _values(image_size: int, patch_size: int, width: int, layers: int, fusion_layers: int) -> dict:
    """A ``config.json`` with one width for everything."""
    sizes = {"hidden_size": width, "num_attention_heads": max(1, width // 64), "intermediate_size": 4 * width}
    text = {
        "model_type": "deberta-v2", "vocab_size": VOCABULARY, "max_position_embeddings": 512, "position_buckets": 256,
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "num_hidden_layers": layers, **sizes,
    }  # fmt: skip
    vision = {"image_size": image_size, "patch_size": patch_size, "num_hidden_layers": layers, **sizes}
    rest = {"model_type": "vle", "num_hidden_layers": fusion_layers, **sizes}
    return {**rest, "text_config": text, "vision_config": vision}


MODELS = {
    "vle_base_384": _values(384, 16, 768, 12, 6),
    "vle_base_576": _values(576, 16, 768, 12, 6),
    "vle_tiny": _values(32, 16, 64, 2, 1),  # ours, to try the program
}


def vle_workload(args: argparse.Namespace, batch_size: int) -> Workload:
    """Both sides with the same weights, images and questions."""
    name = args.model or MODEL
    if name not in MODELS:
        raise SystemExit(f"error: there is no {name} here: give --model {' or '.join(MODELS)}")
    if args.compile:
        raise SystemExit("error: --compile is for --family beit3: nothing of VLE is compiled here")
    values = MODELS[name]
    config = VLEConfig.from_dict(values)
    generator = torch.Generator().manual_seed(2)
    side_px = config.vision.image_size
    image = torch.randn(batch_size, 3, side_px, side_px, generator=generator).to(args.device)
    targets = torch.rand(batch_size, NUM_ANSWERS, generator=generator).to(args.device)

    def ours() -> VLEForVQA:
        torch.manual_seed(0)
        return VLEForVQA(config, NUM_ANSWERS)

    def side(model: nn.Module, text: TextBatch) -> Side:
        mask = None if text.padding_mask is None else ~text.padding_mask
        return Side(model.to(args.device), lambda: model(image, text.tokens, mask), lambda z: vqa_loss(z, targets))

    def build_ours() -> Side:
        return side(ours(), draw_text(args, batch_size, None, vocabulary=VOCABULARY))

    def build_peer() -> Side:
        model = ours()
        put_peers_towers(model, values)
        return side(model, draw_text(args, batch_size, args.pad_to or PAD_TO, vocabulary=VOCABULARY))

    lengths = draw_text(args, batch_size, None, vocabulary=VOCABULARY).lengths()
    flops = sum(vle_forward_flops(config, length) for length in lengths)
    return Workload(build_ours, build_peer if args.has_peer else None, flops)


def vle_forward_flops(config: VLEConfig, text_length: int) -> float:
    """Of one sample."""
    vision, text, width = config.vision, config.text, config.hidden_size
    num_image = vision.num_tokens
    patches = 2 * vision.grid**2 * 3 * vision.patch_size**2 * vision.hidden_size
    image_tower = vision.num_hidden_layers * _layer_flops(
        num_image, num_image, vision.hidden_size, vision.intermediate_size
    )
    text_tower = text.num_hidden_layers * (
        _layer_flops(text_length, text_length, text.hidden_size, text.intermediate_size)
        + 4 * text_length**2 * text.hidden_size  # scores of distances, in both directions
    )
    into_fusion = 2 * width * (num_image * vision.hidden_size + text_length * text.hidden_size)
    fusion = 0
    for own, other in ((num_image, text_length), (text_length, num_image)):
        fusion += _layer_flops(own, own, width, config.intermediate_size)
        fusion += 4 * own * width**2 + 4 * other * width**2 + 4 * own * other * width  # looking at the other stream
    head = 2 * 2 * width**2 + 2 * (2 * width) ** 2 + 2 * 2 * width * NUM_ANSWERS
    return patches + image_tower + text_tower + into_fusion + config.num_hidden_layers * fusion + head


def _layer_flops(queries: int, keys: int, width: int, inner: int) -> float:
    projections = 2 * queries * (4 * width**2 + 2 * width * inner)
    return projections + 4 * queries * keys * width


def put_peers_towers(model: VLEForVQA, values: dict) -> None:
    """Replace both towers by transformers' with the same weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, DebertaV2Config, DebertaV2Model

    dropped = ("model_type",)
    vision, text = (
        {key: value for key, value in values[f"{part}_config"].items() if key not in dropped}
        for part in ("vision", "text")
    )
    clip, deberta = CLIPVisionModel(CLIPVisionConfig(**vision)), DebertaV2Model(DebertaV2Config(**text))
    _fill(clip, model.vle.vision_model.vision_model.state_dict())
    _fill(deberta, model.vle.text_model.state_dict())
    model.vle.vision_model.vision_model = _PeerCLIP(clip)
    model.vle.text_model = _PeerDeBERTa(deberta)


def _fill(peer: nn.Module, ours: dict[str, Tensor]) -> None:
    """Load our weights under the peer's names, which may begin with ``vision_model.``."""
    names = {name.removeprefix("vision_model."): name for name in peer.state_dict() if "position_ids" not in name}
    missing = names.keys() ^ ours.keys()
    if missing:
        raise SystemExit(f"error: this version of transformers names its weights otherwise: {sorted(missing)[:3]}")
    peer.load_state_dict({names[name]: value for name, value in ours.items()}, strict=False)


class _PeerCLIP(nn.Module):
    """CLIP behind our tower's two calls."""

    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def post_layernorm(self, tokens: Tensor) -> Tensor:
        return getattr(self.peer, "vision_model", self.peer).post_layernorm(tokens)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.peer(pixels).last_hidden_state


class _PeerDeBERTa(nn.Module):
    def __init__(self, peer: nn.Module) -> None:
        super().__init__()
        self.peer = peer

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.peer(ids, attention_mask=torch.ones_like(ids) if mask is None else mask.long()).last_hidden_state
