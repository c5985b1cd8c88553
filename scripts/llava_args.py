"""Flags of ``run_llava_lora.py``: those of the original's LoRA script with that script's values as defaults, and ours.

No torch here: --help and mistakes answer at once.
"""

import argparse
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_json
from engine.deepspeed_config import choose_stage
from engine.errors import EngineError
from scripts.arguments import (
    HelpFormatter,
    OneLineParser,
    add_recompute_flags,
    check_recompute,
    count,
    fraction,
    not_negative,
    number,
    positive,
    positive_int,
    settle_recompute,
    switch,
)

DEFAULT_MODEL = "checkpoints/llava-v1.5-7b"
VERSIONS = ("v1", "vicuna_v1", "llava_v1", "plain", "llava_llama_2")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
# option → values that the original has and that are taken here
_ONLY = {
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_patch_merge_type": ("flat",),
    "lora_bias": ("none",),
    "quant_type": ("nf4",),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "evaluation_strategy": ("no", "epoch"),
}
_NO_EFFECT = {
    "lazy_preprocess": "samples are always read as they are needed",
    "is_multimodal": "the data tell",
    "lora_weight_path": "the original does not use it either",
    "cache_dir": "nothing is downloaded",
    "per_device_eval_batch_size": "give --eval_batch_size",
    "remove_unused_columns": "keys that are not known are left alone",
    "ddp_find_unused_parameters": "every trained weight is used",
}


def boolean(text: str) -> bool:
    """``True`` or ``False``, as the original's scripts write them."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return known[text.lower()]


def build_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups."""
    parser = OneLineParser(
        prog="run_llava_lora.py",
        description="Fine-tune LLaVA-1.5 with low-rank adapters, or wholly. Without flags: the original's LoRA recipe.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    _add_model_flags(parser)
    _add_data_flags(parser)
    _add_training_flags(parser)
    _add_output_flags(parser)
    return parser


def _yes(group: Any, name: str, default: bool | None, help: str) -> None:
    """``--name`` alone or with True or False."""
    group.add_argument(f"--{name}", type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path", default=DEFAULT_MODEL, help="model folder: LLaVA, transformers' layout, or plain Llama"
    )
    group.add_argument("--vision_tower", help="folder of CLIP (default: the one that the model names)")
    group.add_argument("--tokenizer", help="folder or sentencepiece file (default: the model's)")
    group.add_argument("--pretrain_mm_mlp_adapter", help="mm_projector.bin of a pre-training")
    group.add_argument(
        "--mm_projector_type", help="of a plain Llama's new projector: linear, mlp2x_gelu … (default: mlp2x_gelu)"
    )
    group.add_argument("--mm_vision_select_layer", type=int, help="of a plain Llama (default: -2)")
    group.add_argument("--mm_vision_select_feature", choices=["patch", "cls_patch"], help="of a plain Llama")
    group.add_argument("--mm_patch_merge_type", default="flat", help="only flat: tiles of LLaVA-1.6 are not offered")
    _yes(group, "mm_use_im_start_end", False, "only False: tokens of old models")
    _yes(group, "mm_use_im_patch_token", False, "only False: tokens of old models")
    group = parser.add_argument_group("what is trained")
    _yes(group, "lora_enable", None, "adapters on the decoder; False: the decoder itself (default: True)")
    group.add_argument("--lora_r", type=positive_int, default=128, help="rank")
    group.add_argument("--lora_alpha", type=positive, default=256, help="the adapter counts alpha / r times")
    group.add_argument(
        "--lora_dropout", type=number(float, low=0, high=1, below=True), default=0.05, help="of the adapters' inputs"
    )
    group.add_argument("--lora_bias", default="none", help="only none")
    _yes(group, "freeze_mm_mlp_adapter", False, "leave the projector as it is")
    _yes(group, "tune_mm_mlp_adapter", False, "train the projector alone (pre-training)")
    _yes(group, "freeze_backbone", False, "with --lora_enable False: leave the decoder as it is")
    _yes(group, "unfreeze_mm_vision_tower", False, "with --lora_enable False: train the image tower too")
    group.add_argument("--bits", type=int, choices=[4, 8, 16], default=16, help="of the frozen decoder's weights")
    _yes(group, "double_quant", True, "with --bits 4: 8 bits for the scales, too")
    group.add_argument("--quant_type", default="nf4", help="only nf4")
    group.add_argument("--lora_weight_path", default="", help=argparse.SUPPRESS)
    group.add_argument("--cache_dir", help=argparse.SUPPRESS)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        default="data/train_for_llava.json",
        help="list of conversations; scripts/format_dataset_for_llava.py writes it",
    )
    group.add_argument("--image_folder", default="data/train", help="image paths are relative to it")
    group.add_argument("--version", choices=VERSIONS, default="v1", help="template of the prompts")
    group.add_argument(
        "--image_aspect_ratio", default="pad", help="pad: expand to a square; square: leave out the ends"
    )
    _yes(group, "group_by_modality_length", True, "samples of like length come together")
    group.add_argument("--model_max_length", type=positive_int, default=2048, help="longest sample in rows")
    group.add_argument(
        "--feature_cache", help="folder that keeps the image tower's features, so that it runs once an image"
    )
    group.add_argument("--limit_samples", type=positive_int, help="use only the first N samples")
    group.add_argument(
        "--skip_broken_images", action="store_true", help="put a grey image in place of one that cannot be read"
    )
    group.add_argument(
        "--max_bad_samples", type=fraction, default=0.001, help="share that --skip_broken_images may replace"
    )
    group.add_argument(
        "--dataloader_num_workers",
        "--num_workers",
        type=count,
        help="loader processes per rank (default: 4, at most the number of cores)",
    )
    switch(group, "pin_mem", default=True, help="page-locked batches for CUDA (--no_pin_mem: off)")
    _yes(group, "lazy_preprocess", True, argparse.SUPPRESS)
    _yes(group, "is_multimodal", True, argparse.SUPPRESS)
    _yes(group, "remove_unused_columns", False, argparse.SUPPRESS)
    group = parser.add_argument_group("validation after every epoch (none unless --val_annotations is given)")
    group.add_argument("--val_annotations", help="VizWiz's list, the course's columns or own .jsonl, with answers")
    group.add_argument("--val_questions", help="questions .jsonl (default: heldout_for_llava.jsonl beside --data_path)")
    group.add_argument("--val_image_folder", help="(default: --image_folder)")
    group.add_argument("--max_new_tokens", type=positive_int, default=32, help="longest answer of a validation")
    group.add_argument("--eval_batch_size", type=positive_int, default=16, help="questions per process")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument("--learning_rate", type=not_negative, default=2e-4, help="peak rate")
    group.add_argument("--mm_projector_lr", type=not_negative, help="the projector's (default: 2e-5 with adapters)")
    epochs = number(float, low=0, high=1e6, above=True)
    group.add_argument("--num_train_epochs", type=epochs, default=1.0, help="epochs; may be a fraction")
    group.add_argument("--per_device_train_batch_size", type=positive_int, default=16, help="samples per process")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches per step")
    group.add_argument("--weight_decay", type=not_negative, default=0.0, help="of weight matrices")
    group.add_argument("--warmup_ratio", type=fraction, default=0.03, help="share of the steps in which the rate rises")
    group.add_argument("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="how the rate falls")
    group.add_argument("--max_grad_norm", type=not_negative, default=1.0, help="clip the gradients to it (0: off)")
    group.add_argument("--adam_beta1", type=number(float, low=0, high=1, below=True), default=0.9, help="of AdamW")
    group.add_argument("--adam_beta2", type=number(float, low=0, high=1, below=True), default=0.999, help="of AdamW")
    group.add_argument("--adam_epsilon", type=positive, default=1e-8, help="of AdamW")
    group.add_argument("--optim", default="adamw_torch", help="only adamw_torch")
    group.add_argument("--seed", type=count, default=42, help="of order, dropout and adapters")
    group.add_argument(
        "--max_steps", type=number(int), default=-1, help="stop after so many steps; the schedule does not change"
    )
    group.add_argument("--max_nonfinite", type=positive_int, default=10, help="bad steps in a row before the end")
    group = parser.add_argument_group("precision, memory and devices")
    group.add_argument(
        "--bf16", type=boolean, nargs="?", const=True, metavar="BOOL", help="(default: where a CUDA device has it)"
    )
    _yes(group, "fp16", False, "float16 with a loss scaler")
    _yes(group, "tf32", True, "allow TF32 in float32 matrix products on CUDA")
    add_recompute_flags(group, default="full")
    _yes(group, "gradient_checkpointing", None, "the same as --recompute full (False: none)")
    group.add_argument("--deepspeed", help="DeepSpeed's JSON file, such as scripts/zero2.json or scripts/zero3.json")
    group.add_argument("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    group.add_argument("--dist_timeout", type=positive, default=1800.0, help="seconds until a lost rank ends the job")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="given by launchers")
    _yes(group, "ddp_find_unused_parameters", False, argparse.SUPPRESS)


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output, checkpoints and resume")
    group.add_argument("--output_dir", help="folder of the run (default: checkpoints/<model>-finetune_lora)")
    group.add_argument("--log_dir", help="TensorBoard folder")
    group.add_argument("--report_to", default="none", help="tensorboard: files in the run; others have no effect")
    group.add_argument("--logging_steps", type=positive_int, default=10, help="optimizer steps between log lines")
    group.add_argument(
        "--save_strategy", choices=["no", "steps", "epoch"], default="epoch", help="when checkpoints are written"
    )
    group.add_argument("--save_steps", type=positive_int, default=500, help="with steps: so many between two")
    group.add_argument("--save_total_limit", type=count, default=1, help="keep the newest N epochs (0: all)")
    group.add_argument("--resume_from_checkpoint", "--resume", default="", help="checkpoint folder, or 'latest'")
    switch(group, "auto_resume", default=True, help="go on from the newest checkpoint (--no_auto_resume: refuse)")
    group.add_argument("--evaluation_strategy", "--eval_strategy", default="no", help="see --val_annotations")
    group.add_argument("--per_device_eval_batch_size", type=positive_int, help=argparse.SUPPRESS)
    group.add_argument("--dry_run", action="store_true", help="build everything, take two steps, write nothing")


def parse_args(argv: list[str] | None = None, *, data_is_made: bool = True) -> argparse.Namespace:
    """Flags, checked as far as no weights and no data are read; with the names that the shared parts look up.

    Without ``data_is_made`` the files of ``scripts/format_dataset_for_llava.py`` may still be missing.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.notes = []
    try:
        _check(args)
        if args.gradient_checkpointing is not None:
            given = f"--gradient_checkpointing {args.gradient_checkpointing}"
            settle_recompute(args, given, "full" if args.gradient_checkpointing else "none")
        _note_what_has_no_effect(args, parser)
        _find_places(args, data_is_made)
        _read_deepspeed(args)
        _fill_in_shared(args)
        check_recompute(args)
    except (DataError, EngineError) as error:
        parser.error(str(error))
    return args


def parse_args_before_data(argv: list[str] | None = None) -> argparse.Namespace:
    """``parse_args`` for ``scripts/main.sh``, which looks for mistakes before it makes the data."""
    return parse_args(argv, data_is_made=False)


def mode_of(args: argparse.Namespace) -> str:
    """What is trained: ``lora``, ``projector`` alone, or the ``full`` model."""
    if args.tune_mm_mlp_adapter:
        return "projector"
    return "full" if args.lora_enable is False else "lora"


def _check(args: argparse.Namespace) -> None:
    for name, allowed in _ONLY.items():
        if getattr(args, name) not in allowed:
            raise DataError(f"--{name} {getattr(args, name)} is not offered: give {' or '.join(map(str, allowed))}")
    if args.image_aspect_ratio.startswith("anyres"):
        raise DataError("--image_aspect_ratio anyres (tiles of LLaVA-1.6) is not offered: give pad")
    if args.image_aspect_ratio not in ("pad", "square"):
        raise DataError(f"--image_aspect_ratio {args.image_aspect_ratio:.40} is unknown: give pad or square")
    if args.tune_mm_mlp_adapter and args.freeze_mm_mlp_adapter:
        raise DataError("--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter contradict each other: leave one out")
    mode = mode_of(args)
    if args.unfreeze_mm_vision_tower and mode != "full":
        raise DataError("--unfreeze_mm_vision_tower goes with --lora_enable False: an adapter has no tower")
    if args.freeze_backbone and mode == "full" and args.freeze_mm_mlp_adapter and not args.unfreeze_mm_vision_tower:
        raise DataError("--freeze_backbone and --freeze_mm_mlp_adapter leave nothing to train: leave one out")
    if args.bits != 16 and mode == "full":
        raise DataError(f"--bits {args.bits} is for frozen weights: train adapters, or leave it out")
    if args.bits != 16 and args.deepspeed:
        raise DataError(f"--bits {args.bits} does not go with --deepspeed: leave one of them out")
    if args.fp16 and args.bf16:
        raise DataError("--bf16 and --fp16 contradict each other: give one")
    if args.fp16 and args.device == "cpu":
        raise DataError("--fp16 needs a CUDA device: on the CPU leave it out")
    if args.feature_cache and args.unfreeze_mm_vision_tower:
        raise DataError("--feature_cache keeps what a frozen tower gives: leave out --unfreeze_mm_vision_tower")
    if args.version == "plain" and mode == "lora":
        args.notes.append("--version plain throws the question away: it is meant for --tune_mm_mlp_adapter")
    if args.max_steps == 0 or args.max_steps < -1:
        raise DataError(f"--max_steps must be above 0, or -1 for no limit, got {args.max_steps}")
    if args.mm_projector_lr is not None and args.mm_projector_lr > 0 and args.learning_rate == 0:
        raise DataError("--mm_projector_lr needs a --learning_rate above 0")
    if args.evaluation_strategy == "epoch" and args.val_annotations is None:
        raise DataError("--evaluation_strategy epoch needs --val_annotations, which has the answers")
    if args.val_annotations is None and (args.val_questions or args.val_image_folder):
        raise DataError("--val_questions and --val_image_folder go with --val_annotations, which has the answers")


def _note_what_has_no_effect(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """A line for each flag that was given for nothing."""
    idle = dict(_NO_EFFECT)
    if mode_of(args) != "lora":
        idle |= dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout"), "no adapters are trained")
    if args.tune_mm_mlp_adapter and args.lora_enable:
        idle["lora_enable"] = "--tune_mm_mlp_adapter trains the projector alone"
    if args.save_strategy != "steps":
        idle["save_steps"] = "it goes with --save_strategy steps"
    if args.val_annotations is None:
        idle |= dict.fromkeys(("max_new_tokens", "eval_batch_size"), "nothing is answered without --val_annotations")
    for name, why in idle.items():
        value = getattr(args, name)
        if value not in (None, "", parser.get_default(name)):
            args.notes.append(f"--{name} {value} has no effect: {why}")
    if args.report_to not in ("none", "tensorboard"):
        args.notes.append(f"--report_to {args.report_to} has no effect: log.txt and --log_dir hold the figures")


def _find_places(args: argparse.Namespace, data_is_made: bool) -> None:
    """Existing folders and files, or an error that names the flag."""
    model = Path(args.model_name_or_path)
    if not model.is_dir():
        raise DataError(
            f"no model folder at {model}: give --model_name_or_path (docs/llava.md tells which); nothing is downloaded"
        )
    if data_is_made and not Path(args.data_path).is_file():
        raise DataError(
            f"no file {args.data_path}: run python scripts/format_dataset_for_llava.py first, or give --data_path"
        )
    if not Path(args.image_folder).is_dir():
        raise DataError(f"no folder {args.image_folder}: give --image_folder, where the images are")
    if args.val_annotations is not None:
        args.val_questions = args.val_questions or str(Path(args.data_path).with_name("heldout_for_llava.jsonl"))
        args.val_image_folder = args.val_image_folder or args.image_folder
        for flag in ("val_annotations", "val_questions"):
            if data_is_made and not Path(getattr(args, flag)).is_file():
                raise DataError(f"no file {getattr(args, flag)}: give --{flag}")
    name = model.resolve().name
    suffix = {"lora": "finetune_lora", "projector": "pretrain", "full": "finetune"}[mode_of(args)]
    args.output_dir = args.output_dir or f"checkpoints/{name}-{suffix}"
    inputs = {"--model_name_or_path": args.model_name_or_path, "--image_folder": args.image_folder}
    inputs |= {"--vision_tower": args.vision_tower, "--tokenizer": args.tokenizer}
    for flag, place in inputs.items():
        if place and Path(place).resolve() == Path(args.output_dir).resolve():
            raise DataError(
                f"--output_dir {args.output_dir} is {flag} as well, which it would replace: give another folder"
            )


def _read_deepspeed(args: argparse.Namespace) -> None:
    """The content of ``--deepspeed`` and its ZeRO stage, 0 without; what goes by it looks at ``args.zero_stage``."""
    args.deepspeed_file = None
    if args.deepspeed:
        args.deepspeed_file = read_json(args.deepspeed, advice="give DeepSpeed's settings as --deepspeed")
        if not isinstance(args.deepspeed_file, dict):
            raise DataError(f"--deepspeed {args.deepspeed} must hold one JSON object")
    args.zero_stage = choose_stage(None, args.deepspeed_file)
    if args.zero_stage == 3 and args.val_annotations is not None:
        raise DataError(
            f"--deepspeed {args.deepspeed} is of stage 3, in which processes would wait for each other's longer "
            "answers: take stage 2, or leave --val_annotations out and run scripts/model_vqa_loader.py afterwards"
        )


def _fill_in_shared(args: argparse.Namespace) -> None:
    """Names under which the parts that all families share look their settings up."""
    args.mode = mode_of(args)
    args.recompute = args.recompute or "full"
    if args.mm_projector_lr is None and args.mode == "lora" and args.learning_rate > 0:
        args.mm_projector_lr = 2e-5
    args.task, args.model = f"llava_{args.mode}", Path(args.model_name_or_path).resolve().name
    args.amp = "bf16" if args.bf16 else "fp16" if args.fp16 else "auto" if args.bf16 is None else "no"
    args.batch_size, args.update_freq = args.per_device_train_batch_size, args.gradient_accumulation_steps
    args.num_workers = args.dataloader_num_workers
    args.clip_grad = args.max_grad_norm or None
    args.resume = args.resume_from_checkpoint
    args.max_steps = None if args.max_steps == -1 else args.max_steps
    args.enable_deepspeed = args.deepspeed is not None
    args.model_ema, args.initial_scale_power = False, 16
    args.finetune, args.eval = args.model_name_or_path, False
    if args.log_dir is None and args.report_to == "tensorboard":
        args.log_dir = str(Path(args.output_dir) / "tensorboard")
