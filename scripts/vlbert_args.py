"""Settings of ``scripts/vqa/train_end2end.py`` and ``scripts/vqa/test.py``: config file and flags (no torch here)."""

import argparse
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import DataError
from engine.errors import EngineError
from scripts.arguments import (
    HelpFormatter,
    OneLineParser,
    add_recompute_flags,
    check_recompute,
    count,
    fraction,
    not_negative,
    positive,
    positive_int,
    switch,
)
from scripts.vlbert_config import SCHEMA, as_yaml, find_config, read_config
from scripts.vlbert_files import find_prediction_files, find_training_files

DEFAULT_CONFIG = "cfgs/vqa/base_4X16G_fp32.yaml"
DEFAULT_MODEL_DIR = "output"
POLICY_STRATEGIES = ("SpotTune", "SpotTune_Block", "BlockDrop")


def build_parser() -> argparse.ArgumentParser:
    """Flags of training."""
    parser = _parser("vqa/train_end2end.py", "Fine-tune VL-BERT on VQA v2 or VQA-CP v2. Flags win over the config.")
    _add_shared_flags(parser)
    group = parser.add_argument_group("weights and strategy")
    group.add_argument("--partial-pretrain", dest="partial_pretrain", help="VL-BERT weights (NETWORK.PARTIAL_PRETRAIN)")
    group.add_argument("--from_scratch", action="store_true", help="random weights: only vocab.txt is needed")
    group.add_argument("--contiguous_shards", action="store_true", help="the original's order of samples, see docs")
    group.add_argument("--train_file", nargs="+", help="training .jsonl of one's own: image, question, answers")
    group.add_argument("--val_file", help="validation .jsonl of one's own")
    group.add_argument(
        "--build_answers",
        type=positive_int,
        metavar="N",
        help="answer list: the answers of N or more training questions",
    )
    group.add_argument("--no_validation", action="store_true", help="train without validation and checkpoint-best")
    group.add_argument("--do-test", dest="do_test", action="store_true", help="predict the test set at the end")
    group = parser.add_argument_group("optimizer")
    group.add_argument("--lr", type=not_negative, help="peak rate (default: TRAIN.LR times the samples of a step)")
    group.add_argument(
        "--reference_adamw", action="store_true", help="AdamW in the original's arithmetic (default: torch's)"
    )
    group.add_argument("--max_nonfinite", type=positive_int, default=10, help="bad steps in a row before the end")
    add_recompute_flags(group, default="TRAIN.RECOMPUTE")
    group.add_argument("--enable_deepspeed", action="store_true", help="train with DeepSpeed instead of plain torch")
    group.add_argument("--zero_stage", type=int, choices=[0, 1, 2, 3], help="DeepSpeed's stage (default: 1)")
    group = parser.add_argument_group("output, checkpoints and resume")
    group.add_argument("--log-dir", dest="log_dir", help="TensorBoard folder (default: tensorboard_logs of the run)")
    switch(group, "tensorboard", default=True, help="write TensorBoard files (--no_tensorboard: none)")
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases too (pip install wandb)")
    group.add_argument("--log_every", type=positive_int, help="optimizer steps between log lines (LOG_FREQUENT)")
    switch(group, "save_ckpt", default=True, help="write checkpoints (--no_save_ckpt: none)")
    group.add_argument("--save_ckpt_steps", type=count, default=0, help="also a checkpoint every so many steps")
    group.add_argument("--keep_ckpts", type=count, default=1, help="keep only the newest N epoch checkpoints (0: all)")
    group.add_argument("--resume", default="", help="checkpoint folder to go on from, or 'latest'")
    switch(group, "auto_resume", default=None, help="go on from the newest checkpoint (TRAIN.AUTO_RESUME)")
    group.add_argument("--max_steps", type=positive_int, help="stop after so many optimizer steps; the schedule stays")
    group = parser.add_argument_group("without effect")
    for name in ("--dist", "--slurm", "--cudnn-off"):
        group.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser


def build_test_parser() -> argparse.ArgumentParser:
    """Flags of prediction."""
    parser = _parser("vqa/test.py", "Predict with a VL-BERT checkpoint: the evaluation server's file, and scores.")
    _add_shared_flags(parser)
    group = parser.add_argument_group("prediction")
    group.add_argument("--ckpt", help="checkpoint folder or weights file (default: checkpoint-best of the run)")
    group.add_argument("--split", help="image set, or a .jsonl file of one's own (default: DATASET.TEST_IMAGE_SET)")
    group.add_argument("--annotations", help="v2_mscoco_*_annotations.json, for the official accuracy")
    group.add_argument("--bs", type=positive_int, help="samples per process (default: TEST.BATCH_IMAGES)")
    group.add_argument("--result-path", dest="result_path", help="folder of the results (default: test, see docs)")
    group.add_argument("--result-name", dest="result_name", help="beginning of their names (default: the config's)")
    switch(group, "auto_resume", default=True, help="go on with a prediction that was stopped (--no_auto_resume: anew)")
    group.add_argument("--gpus", nargs="+", help=argparse.SUPPRESS)
    return parser


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    return OneLineParser(prog=program, description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def _add_shared_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cfg_file", nargs="?", metavar="cfg", help="YAML file, looked up as given and in scripts/")
    parser.add_argument("model_directory", nargs="?", metavar="model_dir", help="folder of all runs")
    group = parser.add_argument_group("settings")
    group.add_argument("--cfg", help=f"the same as the first argument (default: {DEFAULT_CONFIG})")
    group.add_argument("--model-dir", dest="model_dir", help=f"the same as the second (default: {DEFAULT_MODEL_DIR})")
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as TRAIN.LR=1e-6")
    group.add_argument("--strategy", help="instead of the config's FINETUNE_STRATEGY")
    group.add_argument(
        "--reference_behaviour", action="store_true", help="SpotTune and SpotTune_Block in the published arithmetic"
    )
    group.add_argument("--seed", type=count, help="instead of RNG_SEED")
    group = parser.add_argument_group("data")
    group.add_argument("--regions", help="box files of all images: a folder, a packed folder or a .zip")
    group.add_argument("--limit_samples", type=positive_int, help="use only the first N samples of each split")
    group.add_argument("--num_workers", type=count, help="loader processes per rank (NUM_WORKERS_PER_GPU)")
    switch(group, "pin_mem", default=True, help="page-locked batches for CUDA (--no_pin_mem: off)")
    group = parser.add_argument_group("start and devices")
    group.add_argument("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "no"], help="precision (default: no, as the original)")
    group.add_argument("--tf32", action="store_true", help="allow TF32 in float32 matrix products on CUDA")
    group.add_argument("--dist_timeout", type=positive, default=1800.0, help="seconds until a lost rank ends the job")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    group.add_argument("--dry_run", action="store_true", help="build everything, take two steps, write nothing")
    group.add_argument("--max_bad_samples", type=fraction, default=0.0, help=argparse.SUPPRESS)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Settings of a training run, checked as far as no data are read; ``args.config`` holds the whole config file."""
    args = build_parser().parse_args(argv)
    return _settled(args, build_parser(), training=True)


def parse_test_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Settings of a prediction."""
    args = build_test_parser().parse_args(argv)
    return _settled(args, build_test_parser(), training=False)


def training_args(argv: list[str] | None = None) -> argparse.Namespace:
    """``parse_args``, and every file that the settings name is there."""
    return _found(parse_args(argv), build_parser(), find_training_files)


def prediction_args(argv: list[str] | None = None) -> argparse.Namespace:
    """``parse_test_args``, and every file that the settings name is there."""
    return _found(parse_test_args(argv), build_test_parser(), find_prediction_files)


def _found(
    args: argparse.Namespace, parser: argparse.ArgumentParser, find: Callable[[argparse.Namespace], None]
) -> argparse.Namespace:
    try:
        find(args)
    except (DataError, EngineError) as error:
        parser.error(str(error))
    return args


def _settled(args: argparse.Namespace, parser: argparse.ArgumentParser, *, training: bool) -> argparse.Namespace:
    try:
        for flag, place, default in (
            ("cfg", "cfg_file", DEFAULT_CONFIG),
            ("model_dir", "model_directory", DEFAULT_MODEL_DIR),
        ):
            if getattr(args, flag) and getattr(args, place):
                raise DataError(f"--{flag.replace('_', '-')} is given twice, once without its name: give it once")
            setattr(args, flag, getattr(args, flag) or getattr(args, place) or default)
        config_file = find_config(args.cfg)
        if args.strategy:
            try:
                args.strategy = SCHEMA["FINETUNE_STRATEGY"].check(args.strategy)
            except ValueError as error:
                raise DataError(f"--strategy must be {error}, got {args.strategy!r:.40}") from None
        overrides = [*args.set, *([f"FINETUNE_STRATEGY={args.strategy}"] if args.strategy else [])]
        overrides += ["REFERENCE_BEHAVIOUR=true"] if args.reference_behaviour else []
        args.config = read_config(config_file, overrides)
        args.config_name = config_file.stem
        args.reference_behaviour = args.config["REFERENCE_BEHAVIOUR"]
        args.notes = []
        _check_config(args)
        _fill_in_shared(args, training=training)
    except DataError as error:
        parser.error(str(error))
    return args


def _check_config(args: argparse.Namespace) -> None:
    config = args.config
    network, strategy = config["NETWORK"], config["FINETUNE_STRATEGY"]
    sizes, policy = network["VLBERT"], config["POLICY"]
    if network["IMAGE_FINAL_DIM"] != sizes["visual_size"]:
        raise DataError(
            f"NETWORK.IMAGE_FINAL_DIM {network['IMAGE_FINAL_DIM']} and NETWORK.VLBERT.visual_size "
            f"{sizes['visual_size']} must be equal"
        )
    for name in ("TRAIN", "POLICY"):
        try:
            schedule_steps(config[name], 1)
        except DataError as error:
            raise DataError(f"{name}.{error}") from None
    if strategy in POLICY_STRATEGIES:
        wanted = 2 * _decisions(strategy, sizes["num_hidden_layers"], sizes["num_attention_heads"])
        if policy["OUTPUT_SIZE"] not in (0, wanted):
            if not args.strategy:
                raise DataError(
                    f"POLICY.OUTPUT_SIZE is {policy['OUTPUT_SIZE']}, {strategy} of this network takes {wanted}: write "
                    "that, or leave the key out"
                )
            args.notes.append(f"POLICY.OUTPUT_SIZE {policy['OUTPUT_SIZE']} is the config's; {strategy} takes {wanted}")
        policy["OUTPUT_SIZE"] = wanted
        if config["USE_CONSTRAIN_K_LOSS"] and config["CONSTRAIN_K_NUM_BLOCKS"] > wanted // 2:
            raise DataError(
                f"CONSTRAIN_K_NUM_BLOCKS {config['CONSTRAIN_K_NUM_BLOCKS']:g} is more than the {wanted // 2} decisions "
                f"of {strategy}: give 0 to {wanted // 2}"
            )
        if config["POLICY_GLOBAL_DECISION"]:
            args.notes.append("global decision: validation and prediction decide alike for all samples")
    else:
        for key in ("USE_CONSTRAIN_K_LOSS", "USE_DETERMINISTIC_POLICY_LOSS", "POLICY_GLOBAL_DECISION"):
            if config[key]:
                args.notes.append(f"{key} has no effect: strategy {strategy} has no policy")
                config[key] = False
    if strategy in ("SpotTune", "SpotTune_Block"):
        mixing = "reference (published arithmetic)" if args.reference_behaviour else "corrected"
        args.notes.append(f"{strategy}: {mixing} mixing of trained and frozen branch")
    elif args.reference_behaviour:
        args.notes.append(f"--reference_behaviour makes no difference to strategy {strategy}")


def _decisions(strategy: str, layers: int, heads: int) -> int:
    # models.adaptive.num_decisions, of which this module would import torch; a test holds them equal
    return layers * (heads + 3) if strategy == "SpotTune" else layers


def output_folder(args: argparse.Namespace) -> Path:
    """``<model_dir>/<OUTPUT_PATH>/<config name>/<TRAIN_IMAGE_SET>_train``; no folder stands in it twice in a row.

    The published OUTPUT_PATH begins with ``output``, which is also the usual model directory.
    """
    model_dir, inner = Path(args.model_dir), Path(args.config["OUTPUT_PATH"])
    parts = [part for part in inner.parts if part != "."]
    if parts and parts[0] == model_dir.name:
        parts = parts[1:]
    trained_on = args.config["DATASET"]["TRAIN_IMAGE_SET"]
    name = args.config_name + (f"_{args.strategy}" if args.strategy else "")
    return model_dir.joinpath(*parts, name, f"{trained_on}_train")


def _result_folder(args: argparse.Namespace) -> Path:
    """``test`` beside the run's checkpoint-best, ``test-<name>`` beside any other weights.

    So predictions of one configuration with several weights never replace each other.
    """
    if not args.ckpt:
        return args.run_dir / "test"
    weights = Path(os.path.abspath(args.ckpt))  # "." has no name; a link keeps its own
    if (weights.parent / "manifest.json").is_file():  # a file inside a checkpoint, which is left as it was written
        weights = weights.parent
    return weights.with_name("test" if weights.name == "checkpoint-best" else f"test-{weights.name}")


def _fill_in_shared(args: argparse.Namespace, *, training: bool) -> None:
    """Names under which the parts that all families share look their settings up."""
    config = args.config
    train = config["TRAIN"]
    args.run_dir = output_folder(args)
    args.task, args.model = config["DATASET"]["DATASET"], args.config_name
    args.settings_sha256 = hashlib.sha256(as_yaml(config) + str(args.regions).encode()).hexdigest()
    args.data_path = config["DATASET"]["DATASET_PATH"]
    args.seed = config["RNG_SEED"] if args.seed is None else args.seed
    args.num_workers = config["NUM_WORKERS_PER_GPU"] if args.num_workers is None else args.num_workers
    if args.limit_samples is None and config["DATASET"]["TOY"]:
        args.limit_samples = config["DATASET"]["TOY_SAMPLES"]
    args.amp = args.amp or ("fp16" if train["FP16"] else "no")
    args.batch_size, args.update_freq = train["BATCH_IMAGES"], train["GRAD_ACCUMULATE_STEPS"]
    if not training:
        args.eval_batch_size = args.bs or config["TEST"]["BATCH_IMAGES"]
        args.output_dir = args.result_path or str(_result_folder(args))
        args.eval_split = args.split or config["DATASET"]["TEST_IMAGE_SET"]
        args.finetune = args.ckpt or str(args.run_dir / "checkpoint-best")
        if args.gpus:
            args.notes.append("--gpus has no effect: scripts/dist_run_single.sh starts several processes")
        return
    args.eval_batch_size = config["VAL"]["BATCH_IMAGES"]
    args.output_dir = str(args.run_dir)
    args.log_every = args.log_every or config["LOG_FREQUENT"]
    args.recompute = args.recompute or train["RECOMPUTE"]
    args.clip_grad = train["CLIP_GRAD_NORM"] if train["CLIP_GRAD_NORM"] > 0 else None
    if args.auto_resume is None:
        args.auto_resume = train["AUTO_RESUME"]
    if train["RESUME"] and train["BEGIN_EPOCH"] < 1:
        raise DataError(
            "TRAIN.RESUME goes on from the checkpoint of epoch BEGIN_EPOCH - 1: set TRAIN.BEGIN_EPOCH to 1 or more, or "
            "leave it to TRAIN.AUTO_RESUME"
        )
    if train["RESUME"] and not args.resume:
        named = args.run_dir / f"checkpoint-{train['BEGIN_EPOCH'] - 1}"
        # a run that has gone on since may have removed it
        args.resume = "latest" if not named.exists() and (args.run_dir / "latest").exists() else str(named)
    if args.from_scratch and args.partial_pretrain:
        raise DataError("--from_scratch takes no weights and --partial-pretrain gives some: leave one of them out")
    if args.reference_adamw and train["OPTIMIZER"] != "AdamW":
        raise DataError(f"--reference_adamw goes with TRAIN.OPTIMIZER AdamW, not {train['OPTIMIZER']}")
    if args.zero_stage and not args.enable_deepspeed:
        args.enable_deepspeed = True
        args.notes.append(f"--zero_stage {args.zero_stage} implies --enable_deepspeed")
    if args.enable_deepspeed and args.zero_stage == 3 and config["FINETUNE_STRATEGY"] in POLICY_STRATEGIES:
        raise DataError(
            f"--zero_stage 3 does not go with {config['FINETUNE_STRATEGY']}: the processes run different layers; take "
            "stage 2"
        )
    if args.do_test and (args.train_file or args.no_validation):
        raise DataError(
            "--do-test predicts TEST_IMAGE_SET with the best checkpoint: leave --train_file and "
            "--no_validation out, or run scripts/vqa/test.py after the training"
        )
    if args.do_test and args.enable_deepspeed:
        raise DataError("--do-test does not go with --enable_deepspeed: run scripts/vqa/test.py after the training")
    for flag, word in (("slurm", "srun's variables are found by themselves"), ("cudnn_off", "cuDNN stays on")):
        if getattr(args, flag):
            args.notes.append(f"--{flag.replace('_', '-')} has no effect: {word}")
    check_recompute(args)
    args.model_ema, args.initial_scale_power = False, 16
    args.zero_stage = 1 if args.zero_stage is None else args.zero_stage
    _check_own_data(args)


def _check_own_data(args: argparse.Namespace) -> None:
    if args.train_file:
        if not args.val_file and not args.no_validation:
            raise DataError("--train_file without --val_file: give your validation questions, or --no_validation")
        if not args.regions:
            raise DataError("--train_file needs --regions, the box files of your images")
    elif args.val_file:
        raise DataError("--val_file goes with --train_file")


def schedule_steps(settings: dict[str, Any], steps_per_epoch: int) -> list[int]:
    """Steps at which schedule ``step`` changes the rate.

    Raises:
        DataError: LR_STEP is no list of epochs.
    """
    try:
        epochs = [float(part) for part in settings["LR_STEP"].split(",") if part.strip()]
    except ValueError:
        raise DataError(f"LR_STEP {settings['LR_STEP']!r:.40} must be epochs joined by commas, such as '2,4'") from None
    return [int(epoch * steps_per_epoch) for epoch in epochs]
