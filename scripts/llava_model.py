"""The model of a LLaVA training run: read, told what is trained, with its settings in ``config.json``."""

import argparse
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from engine.distributed import is_main
from engine.log import say
from models.errors import ModelError
from models.llava.loading import TOWER
from models.llava.quantized import quantize_decoder
from models.lora import LoRAConfig, add_adapters
from scripts.llava_folder import PLAIN, PROJECTOR, LlavaFolder, read_llava_folder

_PROJECTOR_KEYS = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")


def build_for_training(args: argparse.Namespace, dtype: torch.dtype | None, device: torch.device) -> LlavaFolder:
    """Read ``--model_name_or_path``, add what is to be trained, freeze the rest.

    Frozen weights have the precision of the run, trained ones float32, from the file on; activations follow autocast.
    DeepSpeed gets all of them in 16 bits, which it rounds them to anyway before it makes its float32 masters.

    Args:
        args: of the program; its seed must be set, since adapters and projectors start at random.
        dtype: of the frozen weights; None for float32.
        device: of the model.

    Raises:
        DataError, EngineError: the folder is not whole.
        ModelError: it does not fit the flags.
    """
    in_16_bits = args.enable_deepspeed and dtype is not None
    if args.zero_stage == 3:
        say("note: at first every process holds the whole model on its device, until stage 3 has divided it")
    chosen = {key: getattr(args, key) for key in _PROJECTOR_KEYS if getattr(args, key) is not None}
    folder = read_llava_folder(
        args.model_name_or_path,
        vision_tower=args.vision_tower,
        projector=args.pretrain_mm_mlp_adapter,
        new_projector=chosen,
        tokenizer=args.tokenizer,
        dtype=dtype if in_16_bits else partial(_precision, args=args, frozen=dtype or torch.float32),
    )
    if folder.adapter is not None:
        raise ModelError(
            f"{args.model_name_or_path} is an adapter: merge it first (scripts/merge_lora_weights.py); a run that was "
            "stopped goes on by its own --output_dir"
        )
    for key, value in chosen.items():
        if folder.layout != PLAIN and folder.values.get(key) != value:
            raise ModelError(
                f"--{key} {value}: {args.model_name_or_path} was trained with {folder.values.get(key)}: leave it out"
            )
    folder = _with_settings(folder, args)
    if args.bits < 16:
        _quantize(folder, args, device)
    if args.mode == "lora":
        folder = _with_adapters(folder, args)
    for name, parameter in folder.model.named_parameters():
        parameter.requires_grad_(_is_trained(name, args))
        if parameter.requires_grad and in_16_bits:
            parameter.data = parameter.data.to(dtype)  # adapters, which start in float32
    folder.model.to(device)
    return folder


def _quantize(folder: LlavaFolder, args: argparse.Namespace, device: torch.device) -> None:
    bar = partial(tqdm, desc=f"{args.bits} bits", unit="layer", leave=False, disable=None if is_main() else True)
    report = quantize_decoder(
        folder.model, bits=args.bits, double_quant=args.double_quant and args.bits == 4, device=device, progress=bar
    )
    gib = [number / 2**30 for number in (report.bytes_before, report.bytes_after)]
    say(f"the decoder's layers in {args.bits} bits: {gib[0]:.2f} GiB became {gib[1]:.2f}")


def _with_settings(folder: LlavaFolder, args: argparse.Namespace) -> LlavaFolder:
    """The flags in the config that a saved model will have."""
    values = folder.values | {
        "_name_or_path": args.model_name_or_path,
        "image_aspect_ratio": args.image_aspect_ratio,
        "tokenizer_model_max_length": args.model_max_length,
        "tokenizer_padding_side": "right",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": args.mm_projector_lr,
        "tune_mm_mlp_adapter": args.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": args.freeze_mm_mlp_adapter,
        "use_mm_proj": True,
    }
    if args.unfreeze_mm_vision_tower:
        values["unfreeze_mm_vision_tower"] = True
    model = folder.model
    model.config = replace(model.config, max_length=args.model_max_length, padding_side="right")
    rows = model.config.text.max_position_embeddings
    if args.model_max_length > rows:
        say(f"warning: --model_max_length {args.model_max_length} is more than the {rows} positions of the model")
    return replace(folder, values=values)


def _with_adapters(folder: LlavaFolder, args: argparse.Namespace) -> LlavaFolder:
    config = LoRAConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        base_model_name_or_path=args.model_name_or_path,
    )
    folder.model.requires_grad_(False)
    add_adapters(folder.model.model.layers, config)
    return replace(folder, adapter=config)


def _is_trained(name: str, args: argparse.Namespace) -> bool:
    """Whether the flags say that a weight of this name trains."""
    if PROJECTOR in name:
        return not args.freeze_mm_mlp_adapter
    if args.mode == "lora":
        return ".lora_" in name
    if name.startswith(TOWER):
        return args.unfreeze_mm_vision_tower
    return args.mode == "full" and not args.freeze_backbone


def _precision(name: str, *, args: argparse.Namespace, frozen: torch.dtype) -> torch.dtype:
    return torch.float32 if _is_trained(name, args) else frozen
