"""Settings of ``run_vle_vqa.py``: the original's config file, each key of it as a flag, and ours (no torch here)."""

import argparse
import os
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_json
from scripts.arguments import (
    HelpFormatter,
    OneLineParser,
    check_recompute,
    count,
    fraction,
    leave_out_recompute,
    positive,
    positive_int,
    switch,
)
from scripts.vle_config import CONFIG_KEYS, PRECISIONS, read_config_file

CONFIG_FOLDER = Path(__file__).resolve().parent / "cfgs" / "vle"
DEFAULT_CONFIG = "vqa_train_config.json"
_TASK = "VQAv2"


_NO_EFFECT = {
    "draw_false_image": 0,
    "draw_false_text": 0,
    "save_top_k": 1,
}


def build_parser() -> argparse.ArgumentParser:
    """Every key of the config as a flag, and ours, in titled groups."""
    parser = OneLineParser(
        prog="run_vle_vqa.py",
        description="Fine-tune or evaluate VLE on VQA v2. Flags win over the config file.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--train_config_file",
        default=DEFAULT_CONFIG,
        help="JSON file with the settings; looked up as given, then in scripts/cfgs/vle",
    )
    group = parser.add_argument_group("settings of the config file (default: the file's, else the original's)")
    for name, (check, text) in CONFIG_KEYS.items():
        group.add_argument(f"--{name}", type=_flag(check), help=text)
    group = parser.add_argument_group("data")
    group.add_argument("--image_root", help="folder that image paths are relative to (default: above --data_root)")
    group.add_argument("--train_file", nargs="+", help="training .jsonl of one's own: image, question, answers")
    group.add_argument("--val_file", help="validation .jsonl of one's own")
    group.add_argument(
        "--skip_broken_images", action="store_true", help="put a grey image in place of one that cannot be read"
    )
    group.add_argument(
        "--max_bad_samples", type=fraction, default=0.001, help="share that --skip_broken_images may replace"
    )
    group.add_argument("--limit_samples", type=positive_int, help="use only the first N samples of each split")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_split", default="test", help="val, val2014, test, test-dev or an own .jsonl file")
    group.add_argument("--annotations", help="raw v2_mscoco_*_annotations.json, for the official accuracy")
    group.add_argument("--eval_batch_size", type=positive_int, help="samples per process (default: per_gpu_batchsize)")
    group.add_argument("--shuffle_images", action="store_true", help="evaluate with the images of other questions")
    group.add_argument("--no_validation", action="store_true", help="train without validation and checkpoint-best")
    group = parser.add_argument_group("model and optimizer")
    group.add_argument("--from_scratch", action="store_true", help="random weights: model_dir needs no weights file")
    group.add_argument("--sentencepiece_model", help="spm.model (default: in model_dir)")
    group.add_argument(
        "--reference_adamw",
        action="store_true",
        help="adamw in the arithmetic of the original, which transformers has dropped (default: torch's)",
    )
    group.add_argument("--clip_grad", type=positive, help="clip the total gradient norm to this value (default: off)")
    group.add_argument("--memory_gb", type=positive, help="of recompute auto: GB of a process's tensors")
    group.add_argument("--zero_stage", type=int, choices=[0, 1, 2, 3], help="DeepSpeed's stage (default: the config's)")
    group.add_argument("--max_nonfinite", type=positive_int, default=10, help="bad steps in a row before the end")
    group = parser.add_argument_group("start and devices")
    group.add_argument("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    group.add_argument("--dist_timeout", type=positive, default=1800.0, help="seconds until a lost rank ends the job")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="given by torch.distributed.launch")
    group.add_argument("--tf32", action="store_true", help="allow TF32 in float32 matrix products on CUDA")
    switch(group, "pin_mem", default=True, help="page-locked batches for CUDA (--no_pin_mem: off)")
    group = parser.add_argument_group("output, checkpoints and resume")
    group.add_argument("--output_dir", help="folder of the run (default: <log_dir>/VQAv2_seed<seed>_from_<model>)")
    group.add_argument("--log_every", type=positive_int, default=10, help="optimizer steps between log lines")
    switch(group, "tensorboard", default=True, help="write TensorBoard files (--no_tensorboard: none)")
    switch(group, "save_ckpt", default=True, help="write checkpoints (--no_save_ckpt: none)")
    group.add_argument("--save_ckpt_steps", type=count, default=0, help="also a checkpoint every so many steps")
    group.add_argument("--keep_ckpts", type=count, default=1, help="keep only the newest N epoch checkpoints (0: all)")
    switch(
        group,
        "auto_resume",
        default=True,
        help="go on from the newest checkpoint of --output_dir (--no_auto_resume: refuse a folder that has one)",
    )
    group.add_argument(
        "--stop_after", type=positive_int, help="stop after so many optimizer steps; the schedule does not change"
    )
    group.add_argument("--dry_run", action="store_true", help="build everything, take two steps, write nothing")
    return parser


def _flag(check: Any) -> Any:
    """Argument type of a key: its check, with argparse's kind of error; the text "null" is null."""

    def parse(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {error}, got {text!r}") from None

    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over the config file over the original's defaults; checked, with what the shared parts expect filled in.

    ``args.notes`` lists what a user should know. ``args.global_batch_size`` is the config's ``batch_size``;
    ``batch_size`` is that of one process and micro-batch, as everywhere else.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    args.notes = []
    try:
        given = _read_config(args.train_config_file, args)
        for name, value in (read_config_file(CONFIG_FOLDER / DEFAULT_CONFIG) | given).items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        _check_settings(args)
        _find_places(args)
        _fill_in_shared(args)
        if args.eval:
            leave_out_recompute(args, "memory_gb")
        else:
            check_recompute(args)
    except DataError as error:
        parser.error(str(error))
    return args


def _read_config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Content of the config file; none is needed where the default name is not there."""
    for path in (Path(name), CONFIG_FOLDER / name):
        if path.is_file():
            if path != Path(name):
                args.notes.append(f"settings of {path}")
            return read_config_file(path)
    raise DataError(f"--train_config_file {name}: no such file here or in {CONFIG_FOLDER}")


def _check_settings(args: argparse.Namespace) -> None:
    if args.image_only:
        raise DataError("image_only true is not implemented: it must be false")
    if args.val_check_interval != 1:
        raise DataError(f"val_check_interval {args.val_check_interval} is not implemented: it must be 1.0")
    if isinstance(args.warmup_steps, float) and args.warmup_steps > 1:
        raise DataError(f"warmup_steps {args.warmup_steps} is a fraction above 1: write a whole number for steps")
    for name, usual in _NO_EFFECT.items():
        if getattr(args, name) != usual:
            args.notes.append(
                f"{name} has no effect: {CONFIG_KEYS[name][1].removeprefix('without effect').strip(':, ')}"
            )
    if args.precision == "16" and args.device == "cpu":
        raise DataError("precision 16 needs a CUDA device: on the CPU give --precision 32 or --precision bf16")
    if args.reference_adamw and args.optim_type != "adamw":
        raise DataError(f"--reference_adamw goes with optim_type adamw, not {args.optim_type}")


def _find_places(args: argparse.Namespace) -> None:
    """Existing folders, or an error that names the setting."""
    args.is_eval = args.test_only
    if not Path(args.model_dir).is_dir():
        raise DataError(
            f"no folder {args.model_dir}: give --model_dir with the files of a VLE model (docs/vle.md); nothing "
            "is downloaded"
        )
    own = args.train_file or (args.is_eval and args.eval_split.endswith(".jsonl"))
    if not own and not Path(args.data_root).is_dir():
        raise DataError(
            f"no folder {args.data_root}: run python scripts/write_vqa.py first, or give --data_root "
            "(your own data: --train_file)"
        )
    if args.image_root is None:
        args.image_root = str(Path(args.data_root).parent)
    if not Path(args.image_root).is_dir():
        raise DataError(f"--image_root {args.image_root} is no folder")
    if args.sentencepiece_model is None:
        args.sentencepiece_model = str(Path(args.model_dir) / "spm.model")
    if isinstance(args.deepspeed_config, str):
        args.deepspeed_config = read_json(args.deepspeed_config)
        if not isinstance(args.deepspeed_config, dict):
            raise DataError("--deepspeed_config must hold one JSON object")
    if args.output_dir is None:
        model = Path(args.model_dir).resolve().name
        args.output_dir = str(Path(args.log_dir) / f"{_TASK}_seed{args.seed}_from_{model}")


def _fill_in_shared(args: argparse.Namespace) -> None:
    """Names under which the parts that all families share look their settings up."""
    args.task = "vqav2"
    args.model = Path(args.model_dir).resolve().name
    args.amp = PRECISIONS[args.precision]
    args.dry_run = args.dry_run or args.fast_dev_run
    args.eval, args.resume = args.is_eval, args.resume_from
    args.finetune = args.model_dir
    args.data_path = args.image_root
    args.num_max_bpe_tokens = args.max_text_len
    args.eval_batch_size = args.eval_batch_size or args.per_gpu_batchsize
    args.global_batch_size, args.batch_size = args.batch_size, args.per_gpu_batchsize
    args.enable_deepspeed = args.use_deepspeed and not args.eval
    args.model_ema, args.initial_scale_power = False, 16
    args.deepspeed_config = _with_precision(args.deepspeed_config, args)


def _with_precision(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's settings with the sections of the other precisions switched off, as the original does."""
    sections = {name: dict(settings.get(name) or {}) for name in ("fp16", "bf16")}
    for name, precision in (("fp16", "16"), ("bf16", "bf16")):
        sections[name]["enabled"] = args.precision == precision
    return settings | sections


def num_processes(args: argparse.Namespace) -> int:
    """Processes of this machine that ``num_gpus`` asks for."""
    return len(args.num_gpus) if isinstance(args.num_gpus, list) else args.num_gpus


def settle_batch_sizes(args: argparse.Namespace, world_size: int) -> None:
    """Micro-batches per step, once the number of processes is known.

    Where the global batch size is not a multiple of a step's samples, the step is smaller, as in the original; a note
    says so.
    """
    per_round = args.per_gpu_batchsize * world_size
    args.update_freq = max(args.global_batch_size // per_round, 1)
    if args.update_freq * per_round != args.global_batch_size:
        args.notes.append(
            f"batch_size {args.global_batch_size} is no multiple of {args.per_gpu_batchsize} x {world_size} processes: "
            f"a step has {args.update_freq * per_round} samples"
        )


def launch_command(args: argparse.Namespace, program: str, argv: list[str]) -> tuple[list[str], dict[str, str]] | None:
    """The torchrun command that ``num_gpus`` and ``num_nodes`` ask for, and changes to the environment.

    None where one process on one machine is asked for, or a launcher has started this process already.
    """
    processes = num_processes(args)
    if "RANK" in os.environ or (processes == 1 and args.num_nodes == 1 and not isinstance(args.num_gpus, list)):
        return None
    changes = {}
    if isinstance(args.num_gpus, list):
        changes["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, args.num_gpus))
    command = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    if args.num_nodes == 1:
        command.append("--standalone")
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
        if missing:
            raise DataError(f"num_nodes {args.num_nodes} needs the environment variable {missing[0]}: export it first")
        command += [f"--nnodes={args.num_nodes}", f"--node_rank={os.environ['NODE_RANK']}"]
        command += [f"--master_addr={os.environ['MASTER_ADDR']}", f"--master_port={os.environ['MASTER_PORT']}"]
    return [*command, program, *argv], changes
