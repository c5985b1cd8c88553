"""Flags of ``run_beit3_finetuning.py``: the original's, ours, and the recipe of each task and size (no torch here)."""

import argparse
from pathlib import Path
from typing import Any

from data.errors import DataError
from models.beit3.config import beit3_config
from models.errors import ModelError
from scripts.arguments import (
    HelpFormatter,
    OneLineParser,
    add_optimizer_flags,
    add_output_flags,
    add_speed_flags,
    add_start_flags,
    check_recompute,
    count,
    fraction,
    leave_out_recompute,
    not_negative,
    number,
    positive,
    positive_int,
    settle_recompute,
    switch,
)
from scripts.beit3_checkpoint import TOKENIZER_FILE, checkpoint_folder, read_checkpoint_config

TASKS_OF_THE_ORIGINAL = ("vqav2", "coco_captioning", "nocaps", "nlvr2", "flickr30k", "coco_retrieval", "imagenet")
CAPTIONING_TASKS = ("coco_captioning", "nocaps")
OFFERED_TASKS = ("vqav2", *CAPTIONING_TASKS)

# Published fine-tuning recipes (BEiT-3 get_started guides, table in docs/beit3.md); explicit flags win.
_VQAV2 = {
    "model": "beit3_base_patch16_480",
    "batch_size": 16,
    "lr": 3e-5,
    "layer_decay": 1.0,
    "epochs": 10,
    "warmup_epochs": 1.0,
    "drop_path": 0.1,
    "weight_decay": 0.01,
    "task_head_lr_weight": 20.0,
    "opt_betas": [0.9, 0.98],
    "randaug": True,
    "hflip": True,
    "min_crop_scale": 0.5,
    "recompute": "none",
    "seed": 42,
    "save_ckpt_freq": 5,
    "num_max_bpe_tokens": 64,
}
_CAPTIONING = _VQAV2 | {
    "batch_size": 32,
    "lr": 4e-5,
    "weight_decay": 0.05,
    "task_head_lr_weight": 0.0,
    "opt_betas": [0.9, 0.999],
    "recompute": "full",
    "num_max_bpe_tokens": 32,
    "captioning_mask_prob": 0.7,
}
# from random weights on drawn scenes: colours and places must survive the transform
_DRAWN_SCENES = {
    "batch_size": 32,
    "clip_grad": 1.0,
    "warmup_epochs": 0.3,
    "drop_path": 0.0,
    "weight_decay": 0.05,
    "task_head_lr_weight": 0.0,
    "opt_betas": [0.9, 0.98],
    "randaug": False,
    "hflip": False,
    "min_crop_scale": 1.0,
    "recompute": "none",
    "num_max_bpe_tokens": 32,
}
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("vqav2", "base"): _VQAV2,
    ("vqav2", "large"): _VQAV2 | {"lr": 2e-5, "drop_path": 0.15, "recompute": "full"},
    ("vqav2", "tiny"): _VQAV2 | _DRAWN_SCENES | {"lr": 5e-4},
    ("coco_captioning", "base"): _CAPTIONING,
    ("coco_captioning", "large"): _CAPTIONING | {"lr": 8e-6},
    ("coco_captioning", "tiny"): _CAPTIONING | _DRAWN_SCENES | {"lr": 1e-3, "epochs": 4},
    ("nocaps", "base"): _CAPTIONING | {"lr": 1e-5},
    ("nocaps", "large"): _CAPTIONING | {"lr": 8e-6},
    ("nocaps", "tiny"): _CAPTIONING | _DRAWN_SCENES | {"lr": 1e-3, "epochs": 4},
}
CAPTION_METRICS = {"auto": "auto", "basic": "no", "all": "require"}  # --caption_metrics → METEOR and SPICE, by Java
# longest text of an evaluation of weights that do not say theirs: the published commands leave the flag out
EVAL_TOKENS = 64
# weights looked for in the current folder when --finetune is not given: (training, evaluation)
DEFAULT_WEIGHTS = {
    ("vqav2", "base"): ("beit3_base_patch16_224.pth", "beit3_base_patch16_480_vqa.pth"),
    ("vqav2", "large"): ("beit3_large_patch16_224.pth", "beit3_large_patch16_480_vqa.pth"),
    **{
        (task, size): (f"beit3_{size}_patch16_224.pth", f"beit3_{size}_patch16_480_{task}.pth")
        for task in CAPTIONING_TASKS
        for size in ("base", "large")
    },
}
DEFAULT_DATA_FOLDERS = {
    "vqav2": ("data/vqav2", "dataset"),
    "coco_captioning": ("data/coco", "dataset"),
    "nocaps": ("data/coco", "dataset"),  # NoCaps trains on COCO's captions, from the same folder
}

# flags of the original that change nothing here → why
_NO_EFFECT = {
    "momentum": "AdamW has betas",
    "warmup_lr": "warm-up starts at 0, as in the original",
    "smoothing": "unused by the original as well",
    "resplit": "unused by the original as well",
    "world_size": "the launcher's environment decides",
    "dist_url": "the launcher's environment decides",
    "dist_on_itp": "OpenMPI variables are found by themselves",
    "dist_eval": "evaluation is always spread over the processes, without repeats",
    "start_epoch": "the checkpoint knows its epoch",
    "task_cache_path": "predictions are gathered in memory, there are no parts on disk",
    **dict.fromkeys(
        ("nb_classes", "mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
        "it belongs to the imagenet task",
    ),
    **dict.fromkeys(
        ("color_jitter", "aa", "reprob", "remode", "recount", "crop_pct"), "it belongs to the imagenet task"
    ),
}
# flags that change nothing for some of the tasks → those for which they do
_TASKS_OF_FLAG = dict.fromkeys(("answer_list", "shuffle_images"), ("vqav2",)) | dict.fromkeys(
    (
        *("captioning_mask_prob", "label_smoothing", "drop_worst_ratio", "drop_worst_after"),
        *("decoding", "num_beams", "length_penalty", "top_p", "temperature", "caption_metrics"),
    ),
    CAPTIONING_TASKS,
)


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the original and ours, in titled groups."""
    parser = OneLineParser(
        prog="run_beit3_finetuning.py",
        description="Fine-tune or evaluate BEiT-3. "
        "Defaults marked 'recipe' are those of the published recipe of task and size.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("task and model")
    group.add_argument("--task", required=True, choices=TASKS_OF_THE_ORIGINAL, help="what to train or evaluate")
    group.add_argument(
        "--model",
        help="beit3_{tiny,base,large}_patch<P>_<image size>, with or without the task's suffix (default: recipe)",
    )
    group.add_argument(
        "--input_size", type=positive_int, help="image side in pixels; must equal the model's (default: the model's)"
    )
    group.add_argument(
        "--finetune",
        default=None,
        help="weights to start from or to evaluate: checkpoint folder, .pth, .bin, .safetensors or sharded index; "
        "'' for random weights (default: the recipe's file name in the current folder)",
    )
    group.add_argument(
        "--model_key",
        default="model|module",
        help="'|'-separated keys; the first present in the file holds the weights",
    )
    group.add_argument("--model_prefix", default="", help="prefix of the model's names inside the file")
    group.add_argument(
        "--vocab_size",
        type=positive_int,
        help="rows of the text embedding (default: the checkpoint's, else 64010; tiny: the tokenizer's)",
    )
    group.add_argument("--drop_path", type=fraction, help="stochastic depth of the last layer (default: recipe)")
    _add_data_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval", action="store_true", help="evaluate only: predictions, and scores where labels are known"
    )
    group.add_argument("--no_validation", action="store_true", help="train without validation and checkpoint-best")
    group.add_argument(
        "--eval_split",
        default="test",
        help="vqav2: val (held-out 1000 images), val2014, test, test-dev; captioning: val, test or a folder of images; "
        "both: a .jsonl file of one's own",
    )
    group.add_argument(
        "--annotations",
        help="vqav2: raw v2_mscoco_*_annotations.json, for the official accuracy over all questions; captioning: file "
        "of reference captions, in COCO's form, Karpathy's or one's own (default: the official one in --data_path)",
    )
    group.add_argument("--eval_batch_size", type=positive_int, help="samples per process (default: 1.5 x batch_size)")
    group.add_argument(
        "--shuffle_images",
        action="store_true",
        help="evaluate with the images of other questions: what the text alone achieves",
    )
    _add_captioning_flags(parser)
    add_optimizer_flags(parser)
    add_speed_flags(parser)
    add_start_flags(parser)
    add_output_flags(parser)
    _add_flags_without_effect(parser)
    return parser


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="folder of index files and images (default: data/<task>, then dataset)")
    group.add_argument(
        "--sentencepiece_model",
        help="beit3.spm (default: beside the weights of a run, then in the current folder, then in --data_path)",
    )
    group.add_argument("--answer_list", help="answer2label.txt (default: beside the weights, then in --data_path)")
    group.add_argument(
        "--train_file",
        nargs="+",
        help="training .jsonl of one's own: lines with image, question, answers, or with image, captions (default: the "
        "index files)",
    )
    group.add_argument("--val_file", help="validation .jsonl of one's own (default: the index file)")
    group.add_argument(
        "--num_max_bpe_tokens",
        type=number(int, low=3),
        help="longest text in tokens, both ends included (default: recipe)",
    )
    group.add_argument(
        "--train_interpolation",
        default="bicubic",
        choices=["bicubic", "bilinear", "random"],
        help="resizing of training images",
    )
    switch(group, "randaug", default=None, help="RandAugment (default: recipe)")
    group.add_argument(
        "--randaug_reference",
        action="store_true",
        help="the original's AutoContrast and Sharpness, which wrap around (see docs/departures.md)",
    )
    switch(
        group,
        "hflip",
        default=None,
        help="flip half of the training images, left and right in the text stay (default: recipe)",
    )
    group.add_argument(
        "--min_crop_scale",
        type=number(float, low=0, high=1, above=True),
        help="smallest area of the random crop; 1: the whole image (default: recipe)",
    )
    group.add_argument(
        "--exact_transforms",
        action="store_true",
        help="resize training images exactly as PIL does (slower by about a third)",
    )
    group.add_argument(
        "--skip_broken_images",
        action="store_true",
        help="put a grey image in place of one that cannot be read, and count them",
    )
    group.add_argument(
        "--max_bad_samples",
        type=fraction,
        default=0.001,
        help="share of one pass over the data that --skip_broken_images may replace; 10 images always",
    )
    group.add_argument("--limit_samples", type=positive_int, help="use only the first N samples of each split")


def _add_flags_without_effect(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "flags of the original without effect on the offered tasks (accepted and reported)"
    )
    for name, kind in (
        ("smoothing", float),
        ("nb_classes", int),
        ("mixup", float),
        ("cutmix", float),
        ("mixup_prob", float),
        ("mixup_switch_prob", float),
        ("mixup_mode", str),
        ("color_jitter", float),
        ("aa", str),
        ("reprob", float),
        ("remode", str),
        ("recount", int),
        ("crop_pct", float),
        ("task_cache_path", str),
    ):
        group.add_argument(f"--{name}", type=kind, help=_NO_EFFECT[name])
    group.add_argument("--cutmix_minmax", type=float, nargs="+", help=_NO_EFFECT["cutmix_minmax"])
    group.add_argument("--resplit", action="store_true", help=_NO_EFFECT["resplit"])
    group.add_argument("--dist_eval", action="store_true", help=_NO_EFFECT["dist_eval"])


def _add_captioning_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("captioning")
    group.add_argument(
        "--captioning_mask_prob", type=number(float, low=0, high=1), help="share of tokens to hide (default: recipe)"
    )
    group.add_argument("--label_smoothing", type=fraction, default=0.1, help="probability spread over the other words")
    group.add_argument(
        "--drop_worst_ratio", type=fraction, default=0.2, help="share of words, those of the largest loss, to leave out"
    )
    group.add_argument("--drop_worst_after", type=count, default=12000, help="steps before which none is left out")
    group.add_argument(
        "--decoding",
        default="beam",
        choices=["beam", "greedy", "nucleus"],
        help="how captions are found: beam search, the most probable word, or a draw from the most probable ones",
    )
    group.add_argument("--num_beams", type=positive_int, default=3, help="beams of the beam search")
    group.add_argument(
        "--length_penalty",
        type=not_negative,
        default=0.6,
        help="beam search: power of the length that scores are divided by",
    )
    group.add_argument(
        "--top_p",
        type=number(float, low=0, high=1, above=True),
        default=0.9,
        help="nucleus: probability of the words to draw from",
    )
    group.add_argument("--temperature", type=positive, default=1.0, help="nucleus: what scores are divided by first")
    group.add_argument(
        "--caption_metrics",
        default="auto",
        choices=list(CAPTION_METRICS),
        help="basic: BLEU, ROUGE-L, CIDEr; auto: also METEOR and SPICE where pycocoevalcap and Java are installed; "
        "all: nothing may be missing",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, fill in the recipe of task and size, and look for data and weights at their default places.

    ``args.notes`` lists what a user should know: flags without effect, defaults that were found.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.task not in OFFERED_TASKS:
        parser.error(
            f"--task {args.task} is not offered by this version; choose {', '.join(OFFERED_TASKS)} "
            "(the model itself is in models/beit3/tasks.py)"
        )
    if args.opt_betas is not None and len(args.opt_betas) != 2:
        parser.error(f"--opt_betas takes two values, got {len(args.opt_betas)}")
    args.notes = [
        f"--{name} has no effect: {reason}"
        for name, reason in _NO_EFFECT.items()
        if getattr(args, name) != parser.get_default(name)
    ]
    args.notes += [
        f"--{name} has no effect: it belongs to {' and '.join(tasks)}"
        for name, tasks in _TASKS_OF_FLAG.items()
        if args.task not in tasks and getattr(args, name) != parser.get_default(name)
    ]
    if args.eval:
        leave_out_recompute(args, "recompute", "memory_gb")
    if args.eval and args.resume:
        args.notes.append("--resume has no effect: --eval takes its weights from --finetune")
    _settle_deepspeed(args, parser)
    try:
        if args.checkpoint_activations is not None:
            meaning = ("--no_checkpoint_activations", "none"), ("--checkpoint_activations", "full")
            settle_recompute(args, *meaning[args.checkpoint_activations])
        _fill_recipe(args)
        check_recompute(args)
        beit3_config(args.model, args.task, image_size=args.input_size)
    except (DataError, ModelError) as error:
        parser.error(str(error))
    _find_defaults(args, parser)
    return args


def _settle_deepspeed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """One flag says whether DeepSpeed runs; the others imply it."""
    if args.deepspeed_config and not Path(args.deepspeed_config).is_file():
        parser.error(f"--deepspeed_config {args.deepspeed_config}: no such file")
    implied = "--deepspeed_config" if args.deepspeed_config else f"--zero_stage {args.zero_stage}"
    wanted = bool(args.enable_deepspeed or args.deepspeed_config or args.zero_stage)
    if args.eval and wanted:
        flag = "--enable_deepspeed" if args.enable_deepspeed else implied
        args.notes.append(f"{flag} has no effect: --eval needs no optimizer")
    elif wanted and not args.enable_deepspeed:
        args.notes.append(f"{implied} implies --enable_deepspeed")
    args.enable_deepspeed = wanted and not args.eval


def _fill_recipe(args: argparse.Namespace) -> None:
    known = read_checkpoint_config(args.finetune or "")  # a run's own folder says what it holds
    args.model = args.model or known.get("model") or _VQAV2["model"]
    args.num_max_bpe_tokens = args.num_max_bpe_tokens or known.get("num_max_bpe_tokens")
    if args.eval and args.task in CAPTIONING_TASKS and not args.num_max_bpe_tokens:
        args.num_max_bpe_tokens = EVAL_TOKENS
    size = next((size for size in ("tiny", "large") if f"_{size}_" in args.model), "base")
    for name, value in RECIPES[args.task, size].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.eval_batch_size is None:
        args.eval_batch_size = int(1.5 * args.batch_size)
    args.output_dir = args.output_dir or f"output/{args.task}"
    if args.finetune is None:
        weights = DEFAULT_WEIGHTS.get((args.task, size))
        args.finetune = weights[args.eval] if weights else ""
        args.finetune_is_default = bool(weights)
    else:
        args.finetune_is_default = False


def _find_defaults(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Existing default places, or an error that names the flag to give."""
    if args.data_path is None and args.eval and args.task in CAPTIONING_TASKS and Path(args.eval_split).is_dir():
        args.data_path = args.eval_split  # pictures of one's own need nothing beside them
    if args.data_path is None:
        folders = DEFAULT_DATA_FOLDERS[args.task]
        args.data_path = next((folder for folder in folders if Path(folder).is_dir()), None)
        if args.data_path is None:
            parser.error(f"no data at {' or '.join(folders)}: give --data_path (layout: docs/datasets.md)")
    elif not Path(args.data_path).is_dir():
        parser.error(f"--data_path {args.data_path} is no folder")
    if args.sentencepiece_model is None:
        beside = checkpoint_folder(args.finetune)
        places = [*([str(beside / TOKENIZER_FILE)] if beside else []), TOKENIZER_FILE]
        places.append(str(Path(args.data_path) / TOKENIZER_FILE))
        args.sentencepiece_model = next((place for place in places if Path(place).is_file()), None)
        if args.sentencepiece_model is None:
            parser.error(f"no sentencepiece model at {' or '.join(places)}: give --sentencepiece_model")
    trains = not args.eval and not args.dry_run  # a dry run does not go on from a checkpoint
    resumes = trains and args.auto_resume and any(Path(args.output_dir).glob("checkpoint-*/manifest.json"))
    # a run that goes on takes its weights from there and need not have the default ones any more
    unused = args.finetune_is_default and resumes
    is_address = args.finetune.startswith(("http:", "https:"))
    if args.finetune and not is_address and not unused and not Path(args.finetune).exists():
        if args.finetune_is_default:
            or_random = "" if args.eval else ", or --finetune '' for random weights"
            parser.error(f"no weights at {args.finetune}: give --finetune FILE (sources: docs/datasets.md){or_random}")
        parser.error(f"--finetune {args.finetune}: no such file or folder")
    if is_address:
        parser.error("--finetune takes a file or folder: nothing is downloaded at run time; fetch the file first")
    if args.eval and not args.finetune:
        parser.error("--eval needs weights: give --finetune FILE or a checkpoint folder")
