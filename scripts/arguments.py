"""Flags that every training program shares, in titled groups, and a parser whose errors are one line."""

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from data.errors import DataError
from scripts.config_checks import recompute


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that reports a mistake in one line and exit code 2, without the usage block."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and leave."""
        print(f"{self.prog}: error: {message} ({self._nearest_flag(message)}see --help)", file=sys.stderr)
        raise SystemExit(2)

    def _nearest_flag(self, message: str) -> str:
        """A question that names the flag which an unknown one resembles; empty without one."""
        _, marker, words = message.partition("unrecognized arguments: ")
        known = [name for action in self._actions for name in action.option_strings if action.help != argparse.SUPPRESS]
        wrong = words.split("=")[0].split()[0] if marker and words.strip() else ""
        near = difflib.get_close_matches(wrong, known, n=1) if wrong.startswith("--") else []
        return f"did you mean {near[0]}? " if near else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False) or "%(default)" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def number(
    kind: Callable[[str], Any],
    *,
    low: float | None = None,
    high: float | None = None,
    above: bool = False,
    below: bool = False,
):
    """Argument type: a finite number within bounds (``above`` excludes the lower one, ``below`` the upper one).

    Whole numbers are below 2**63, which torch's generators and tensors take.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is no {'whole ' if kind is int else ''}number") from None
        if value != value or (low is not None and (value < low or (above and value == low))):
            must = "a number" if low is None else f"{'above' if above else 'at least'} {low:g}"
            raise argparse.ArgumentTypeError(f"must be {must}, got {text:.40}")
        if high is not None and (value > high or (below and value == high)):
            raise argparse.ArgumentTypeError(f"must be {'below' if below else 'at most'} {high:g}, got {text:.40}")
        if kind is int and not -(2**63) <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be below 2**63, got {text:.40}")
        if value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {text:.40}")
        return value

    return parse


positive_int = number(int, low=1)
count = number(int, low=0)
positive = number(float, low=0, above=True)
not_negative = number(float, low=0)
fraction = number(float, low=0, high=1)
finite = number(float)


def switch(group: Any, name: str, *, default: bool | None, help: str) -> None:
    """Add ``--name`` and ``--no_name``, as the originals spell their pairs."""
    group.add_argument(f"--{name}", action="store_true", default=default, help=help)
    group.add_argument(f"--no_{name}", dest=name, action="store_false", help=argparse.SUPPRESS)


def recompute_policy(text: str) -> str:
    """Argument type: which layers are recomputed."""
    try:
        return recompute(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be {error}, got {text!r:.40}") from None


def add_recompute_flags(group: Any, *, default: str) -> None:
    """Activation checkpointing; ``default`` is for the help, the programs fill it in."""
    group.add_argument(
        "--recompute",
        type=recompute_policy,
        metavar="WHAT",
        help="layers that the backward pass computes again, for less memory and more time: none, full, every_K (the "
        f"first of each K layers), auto (as few as fit) (default: {default})",
    )
    group.add_argument(
        "--memory_gb",
        type=positive,
        help="of --recompute auto: GB that the tensors of a process may take (default: 95%% of what is free)",
    )


def check_recompute(args: argparse.Namespace) -> None:
    """Refuse what does not go together, once ``args.recompute`` and ``args.enable_deepspeed`` are settled.

    Raises:
        DataError: names the flag to leave out.
    """
    if args.memory_gb is not None and args.recompute != "auto":
        raise DataError(f"--memory_gb goes with --recompute auto, not {args.recompute}: leave it out")
    if args.recompute == "auto" and args.enable_deepspeed:
        raise DataError(
            "--recompute auto does not go with DeepSpeed, whose memory it does not count: give none, every_K or full, "
            "by the flag or where the config says auto"
        )


def leave_out_recompute(args: argparse.Namespace, *names: str) -> None:
    """An evaluation recomputes nothing: note which of these flags were given all the same, and forget them."""
    for name in names:
        if getattr(args, name) is not None:
            args.notes.append(f"--{name} has no effect: an evaluation recomputes nothing")
            setattr(args, name, None)


def settle_recompute(args: argparse.Namespace, flag: str, meaning: str) -> None:
    """Give ``args.recompute`` what an original's flag means.

    Raises:
        DataError: --recompute says another thing.
    """
    if args.recompute not in (None, meaning):
        raise DataError(f"--recompute {args.recompute} and {flag} contradict each other: leave one of them out")
    args.recompute = meaning


def add_start_flags(parser: argparse.ArgumentParser) -> None:
    """Device, seed, processes."""
    group = parser.add_argument_group("start and devices")
    group.add_argument("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    group.add_argument(
        "--seed", type=count, help="seed of data order, augmentation and initialisation (default: recipe)"
    )
    group.add_argument(
        "--num_workers",
        type=count,
        default=None,
        help="loader processes per rank (default: 10, at most the number of cores)",
    )
    switch(group, "pin_mem", default=True, help="page-locked batches for CUDA (--no_pin_mem: off)")
    group.add_argument(
        "--dist_timeout", type=positive, default=1800.0, help="seconds after which a lost or hung rank ends the job"
    )
    group.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=-1,
        help="given by torch.distributed.launch; the environment decides",
    )
    group.add_argument("--world_size", type=int, default=1, help="without effect: the launcher's environment decides")
    group.add_argument(
        "--dist_on_itp", action="store_true", help="without effect: OpenMPI variables are found by themselves"
    )
    group.add_argument("--dist_url", default="env://", help="without effect: the launcher's environment decides")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Optimizer and schedule."""
    group = parser.add_argument_group("optimizer and schedule")
    group.add_argument("--opt", default="adamw", choices=["adamw"], help="optimizer")
    group.add_argument("--opt_eps", type=positive, default=1e-8, help="epsilon of AdamW")
    group.add_argument(
        "--opt_betas",
        type=number(float, low=0, high=1),
        nargs="+",
        metavar="BETA",
        help="betas of AdamW (default: recipe)",
    )
    group.add_argument("--clip_grad", type=positive, help="clip the total gradient norm to this value (default: off)")
    group.add_argument(
        "--weight_decay",
        type=not_negative,
        help="decay of weight matrices; biases and norms have none (default: recipe)",
    )
    group.add_argument("--lr", type=not_negative, help="peak learning rate (default: recipe)")
    group.add_argument(
        "--layer_decay",
        type=number(float, low=0, high=1, above=True),
        help="factor of the rate per layer below the head (default: recipe)",
    )
    group.add_argument(
        "--task_head_lr_weight",
        type=not_negative,
        help="factor of the rate of parameters named head* when layer_decay is 1 (default: recipe)",
    )
    group.add_argument("--min_lr", type=not_negative, default=1e-6, help="rate that the cosine approaches")
    group.add_argument("--warmup_epochs", type=not_negative, help="epochs of linear warm-up (default: recipe)")
    group.add_argument(
        "--warmup_steps", type=int, default=-1, help="steps of warm-up; wins over --warmup_epochs when above 0"
    )
    group.add_argument("--epochs", type=positive_int, help="epochs to train (default: recipe)")
    group.add_argument("--batch_size", type=positive_int, help="samples per process and micro-batch (default: recipe)")
    group.add_argument("--update_freq", type=positive_int, default=1, help="micro-batches per optimizer step")
    group.add_argument(
        "--max_steps", type=positive_int, help="stop after so many optimizer steps; the schedule does not change"
    )
    group.add_argument(
        "--max_nonfinite",
        type=positive_int,
        default=10,
        help="steps in a row with a non-finite loss or gradient before the run ends",
    )
    group.add_argument(
        "--model_ema",
        action="store_true",
        help="keep a moving average of the weights (model_ema.pth in each checkpoint)",
    )
    group.add_argument("--model_ema_decay", type=fraction, default=0.9999, help="decay of the moving average")
    group.add_argument("--model_ema_force_cpu", action="store_true", help="keep the moving average in host memory")
    group.add_argument("--momentum", type=float, default=0.9, help="without effect: AdamW has betas")
    group.add_argument(
        "--warmup_lr", type=float, default=1e-6, help="without effect: warm-up starts at 0, as in the original"
    )


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Precision, memory, DeepSpeed."""
    group = parser.add_argument_group("precision, memory and speed")
    group.add_argument(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "no"],
        help="autocast; auto: bf16 where CUDA has it, else fp16, on the CPU no",
    )
    group.add_argument("--tf32", action="store_true", help="allow TF32 in float32 matrix products on CUDA")
    switch(
        group,
        "checkpoint_activations",
        default=None,
        help="the same as --recompute full (--no_checkpoint_activations: none)",
    )
    add_recompute_flags(group, default="recipe")
    group.add_argument("--compile", action="store_true", help="torch.compile each repeated layer")
    group.add_argument(
        "--initial_scale_power", type=count, default=16, help="the fp16 loss scaler starts at 2 to this power"
    )
    group.add_argument(
        "--enable_deepspeed",
        action="store_true",
        help="train with DeepSpeed (ZeRO, see docs/deepspeed.md) instead of plain torch (DDP)",
    )
    group.add_argument(
        "--zero_stage",
        type=int,
        choices=[0, 1, 2, 3],
        help="DeepSpeed divides over the processes 1: the moments, 2: also the gradients, 3: also the weights "
        "(default: the file's of --deepspeed_config, else 0)",
    )
    group.add_argument(
        "--deepspeed_config", help="DeepSpeed's JSON settings; any value may be 'auto' (default: all from the flags)"
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Where things go, checkpoints, logging."""
    group = parser.add_argument_group("output, checkpoints and resume")
    group.add_argument("--output_dir", help="folder of the run (default: output/<task>)")
    group.add_argument("--log_dir", help="TensorBoard folder (default: none)")
    group.add_argument("--log_every", type=positive_int, default=10, help="optimizer steps between log lines")
    switch(group, "save_ckpt", default=True, help="write checkpoints (--no_save_ckpt: none)")
    group.add_argument("--save_ckpt_freq", type=positive_int, help="epochs between checkpoints (default: recipe)")
    group.add_argument(
        "--save_ckpt_steps", type=count, default=0, help="also a checkpoint every so many steps; only the newest stays"
    )
    group.add_argument("--keep_ckpts", type=count, default=0, help="keep only the newest N epoch checkpoints (0: all)")
    group.add_argument(
        "--resume", default="", help="checkpoint folder to go on from, or 'latest' (the newest of --output_dir)"
    )
    switch(
        group,
        "auto_resume",
        default=True,
        help="go on from the newest checkpoint of --output_dir (--no_auto_resume: start anew)",
    )
    group.add_argument("--start_epoch", type=count, default=0, help="without effect: the checkpoint knows its epoch")
    group.add_argument(
        "--dry_run", action="store_true", help="build everything, take two steps, write nothing, print the plan"
    )
