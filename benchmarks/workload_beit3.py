"""BEiT-3 for question answering or captioning, beside torchscale's trunk under our heads."""

import argparse
import warnings

import torch
from torch import nn

from benchmarks.workload import NUM_ANSWERS, Side, TextBatch, Workload, draw_text
from models.beit3.beit3 import compile_layers
from models.beit3.config import TASK_SUFFIXES, BEiT3Config, beit3_config
from models.beit3.tasks import build_beit3, captioning_loss
from models.losses import vqa_loss
from models.recompute import Recompute, set_recompute

MODEL = "beit3_base_patch16_480"
PAD_TO = 64  # as the original pads every text
PEER_PACKAGES = ("torchscale", "timm", "fairscale")
MASKED_FRACTION = 0.7  # of the caption's words


def beit3_workload(args: argparse.Namespace, batch_size: int) -> Workload:
    """BEiT-3 for question answering or captioning, against torchscale's trunk under our heads."""
    config = beit3_config(args.model or MODEL, args.task, drop_path=args.drop_path)
    is_captioning = TASK_SUFFIXES[args.task] == "captioning"
    if not is_captioning and args.task != "vqav2":
        raise SystemExit(f"error: no batch is drawn for --task {args.task}: choose vqav2 or coco_captioning")
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(batch_size, 3, config.image_size, config.image_size, generator=generator).to(args.device)
    targets = torch.rand(batch_size, NUM_ANSWERS, generator=generator).to(args.device)

    def text_of(pad_to: int | None) -> TextBatch:
        return draw_text(args, batch_size, pad_to, vocabulary=64000, masked_fraction=MASKED_FRACTION)

    def ours() -> nn.Module:
        torch.manual_seed(0)
        num_classes = None if is_captioning else NUM_ANSWERS
        model = build_beit3(args.task, config, num_classes=num_classes)
        set_recompute(model, Recompute(int(args.checkpoint_activations)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in model.unused_in_finetuning())
        return model

    def side(model: nn.Module, text: TextBatch) -> Side:
        inputs = (image, text.tokens, text.padding_mask) + ((text.masked,) if is_captioning else ())
        words = text.tokens[text.masked]
        loss = (lambda logits: captioning_loss(logits, words)) if is_captioning else (lambda z: vqa_loss(z, targets))
        return Side(model.to(args.device), lambda: model(*inputs), loss)

    def build_ours() -> Side:
        model = ours()
        if args.compile:
            compile_layers(model)
        return side(model, text_of(None))

    def build_peer() -> Side:
        model = ours()
        model.beit3 = torchscale_trunk(config, model.beit3, checkpoint_activations=args.checkpoint_activations)
        return side(model, text_of(args.pad_to or PAD_TO))

    text = text_of(None)
    head = 2 * int(text.masked.sum()) * config.embed_dim * config.vocab_size if is_captioning else 0
    flops = sum(beit3_forward_flops(config, length, is_captioning=is_captioning) for length in text.lengths()) + head
    return Workload(build_ours, build_peer if args.has_peer else None, flops)


def beit3_forward_flops(config: BEiT3Config, text_length: int, *, is_captioning: bool) -> float:
    """Of one sample, without the captioning head."""
    width, num_image = config.embed_dim, config.num_image_tokens
    total = num_image + text_length
    last_read = text_length if is_captioning else 1
    # pairs of query and key, of all tokens and of those that the head reads
    causal = num_image * num_image + sum(num_image + i + 1 for i in range(text_length))
    pairs = causal if is_captioning else total * total
    last_pairs = causal - num_image * num_image if is_captioning else total
    projections = (8 + 4 * config.mlp_ratio) * width * width  # q, k, v, out and the two of the FFN, 2 FLOPs a weight
    layers = (config.num_layers - 1) * (projections * total + 4 * width * pairs)
    keys_values = 4 * width * width
    last = keys_values * total + (projections - keys_values) * last_read + 4 * width * last_pairs
    patches = 2 * config.num_patches * config.in_chans * config.patch_size**2 * width
    answers = 0 if is_captioning else 2 * (width * width + 2 * width * width + 2 * width * NUM_ANSWERS)
    return layers + last + patches + answers


def build_torchscale(config: BEiT3Config, *, checkpoint_activations: bool = False) -> nn.Module:
    """Torchscale's BEiT-3 with new weights, of the same sizes as our trunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm calls the import path that torchscale uses deprecated
        try:
            from torchscale.architecture.config import EncoderConfig
            from torchscale.model.BEiT3 import BEiT3 as TorchscaleBEiT3
        except ImportError as error:
            raise SystemExit(
                f"error: {error}: pip install --no-deps torchscale timm fairscale, or --peer none"
            ) from error
    return TorchscaleBEiT3(
        EncoderConfig(
            img_size=config.image_size,
            patch_size=config.patch_size,
            vocab_size=config.vocab_size,
            encoder_embed_dim=config.embed_dim,
            encoder_attention_heads=config.num_heads,
            encoder_ffn_embed_dim=config.mlp_ratio * config.embed_dim,
            encoder_layers=config.num_layers,
            max_source_positions=config.max_text_positions,
            normalize_output=config.normalize_output,
            drop_path_rate=config.drop_path,
            checkpoint_activations=checkpoint_activations,
            multiway=True,
            no_output_layer=True,
        )
    )


def torchscale_trunk(config: BEiT3Config, ours: nn.Module, *, checkpoint_activations: bool) -> nn.Module:
    """Torchscale's BEiT-3 with our trunk's weights, behind our trunk's arguments."""
    trunk = build_torchscale(config, checkpoint_activations=checkpoint_activations)
    trunk.load_state_dict(ours.state_dict())

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = trunk

        def forward(self, image, text, padding_mask, *, causal_text=False, keep=None):  # noqa: ANN001, ANN202
            num_image, hidden = config.num_image_tokens, None
            if causal_text:
                total = num_image + text.shape[1]
                hidden = torch.ones(total, total, device=text.device).triu(1)
                hidden[:, :num_image] = 0
            tokens = self.trunk(text, image, padding_mask, attn_mask=hidden)["encoder_out"]
            return tokens[:, :num_image], tokens[:, num_image:]

    return Adapter()
