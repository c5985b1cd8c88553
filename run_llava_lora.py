"""Fine-tune LLaVA-1.5 with low-rank adapters; or its projector alone, or the whole model.

    python run_llava_lora.py
    torchrun --nproc_per_node=8 run_llava_lora.py --model_name_or_path llava-v1.5-13b --deepspeed scripts/zero3.json
    python run_llava_lora.py --bits 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 4

Read it from top to bottom; the flags stand in scripts/llava_args.py.
"""

import argparse
import json
import math
from pathlib import Path

from scripts.llava_args import parse_args
from scripts.program import hide_interrupts, run

if __name__ == "__main__":
    hide_interrupts()
    parse_args()  # --help and mistakes answer at once, before torch is imported

import torch

from engine import distributed
from engine.backend import resolve_precision
from engine.checkpoint import BEST, newest_name
from engine.errors import RunError
from engine.folder_lock import released_at_the_end
from engine.log import RunLog, say
from engine.loop import RunPlan, fit, resume_position
from engine.optim import build_optimizer, describe_groups
from engine.write_failures import could_not_write
from scripts import llava_training
from scripts.backends import build_backend
from scripts.llava_folder import LlavaFolder
from scripts.llava_model import build_for_training
from scripts.llava_optim import llava_parameter_groups, llava_schedule
from scripts.llava_resume import DATA_FILE, check_data, check_resume, describe_data
from scripts.llava_saving import checkpoint_format, publish
from scripts.recompute import apply_recompute
from scripts.start import open_run_folder, precision_name, start_processes


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Start, build the model, train, put the result into the output folder."""
    args = parse_args(argv)

    # ---- 1. processes, device, seed ----
    device = start_processes(args, group_of_one=args.enable_deepspeed)
    if args.num_workers is None:
        args.num_workers = min(4, distributed.cores_per_process())
    dtype = resolve_precision(args.amp, device)
    output_dir, resume_from = open_run_folder(args)

    # ---- 2. data, base, adapters ----
    samples = llava_training.read_samples(args)
    args.training_data = describe_data(samples, args)
    if resume_from is not None:
        check_data(resume_from, args)
    folder = build_for_training(args, dtype, device)
    if resume_from is not None:
        check_resume(resume_from, folder, args)
    validate, val_loader = llava_training.validation(args, folder, device=device, dtype=dtype)
    train_loader = llava_training.train_loader(args, folder, samples, device=device, dtype=dtype)
    torch.manual_seed(args.seed + distributed.rank())

    # ---- 3. train ----
    steps = train(args, folder, train_loader, validate, val_loader, device, dtype, output_dir, resume_from)

    # ---- 4. the result, beside the checkpoints ----
    if output_dir is not None:
        publish_result(args, output_dir, steps)
    distributed.barrier()
    distributed.shutdown()


def train(
    args: argparse.Namespace,
    folder: LlavaFolder,
    train_loader: llava_training.TrainLoader,
    validate: llava_training.Validate | None,
    val_loader: llava_training.EvalLoader | None,
    device: torch.device,
    dtype: torch.dtype | None,
    output_dir: Path | None,
    resume_from: Path | None,
) -> int:
    """Optimizer, schedule, then the one loop; returns the steps taken."""
    model = folder.model
    steps_per_epoch = train_loader.steps_per_epoch
    total_steps = math.ceil(args.num_train_epochs * steps_per_epoch)

    # ---- 5. optimizer, schedule, backend ----
    groups = llava_parameter_groups(
        model.named_parameters(),
        lr=args.learning_rate,
        projector_lr=args.mm_projector_lr,
        weight_decay=args.weight_decay,
    )
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer("adamw", groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
    schedule = llava_schedule(
        args.lr_scheduler_type, args.learning_rate, warmup_ratio=args.warmup_ratio, total_steps=total_steps
    )
    sizes = llava_training.parameter_counts(model)  # before a backend divides them
    weights = checkpoint_format(folder, args.mode)
    loss_fn = llava_training.training_loss(folder)
    recomputed = apply_recompute(args, model, train_loader, loss_fn, device=device, dtype=dtype)
    backend, deepspeed_facts = build_backend(
        args, model, optimizer, device, dtype, args.deepspeed_file, weights=weights
    )

    # ---- 6. the plan, said once ----
    facts = {
        **sizes,
        "trains": args.mode,
        "samples_per_step": train_loader.samples_per_step,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "precision": precision_name(dtype),
        **recomputed,
        "parameter_groups": describe_groups(groups, args.learning_rate),
        **deepspeed_facts,
    }
    say(json.dumps(facts, indent=2))
    # a checkpoint that does not fit ends the run here, before anything of the run before is touched
    position = None if resume_from is None else resume_position(backend, train_loader, resume_from)
    log = RunLog(output_dir, Path(args.log_dir) if output_dir and args.log_dir else None)
    log.write_run({key: value for key, value in vars(args).items() if key not in ("notes", "deepspeed_file")}, facts)
    plan = RunPlan(
        epochs=math.ceil(args.num_train_epochs),
        output_dir=output_dir,
        save_every_epochs=0 if args.save_strategy == "no" else 1,
        save_every_steps=args.save_steps if args.save_strategy == "steps" else 0,
        keep_checkpoints=args.save_total_limit,
        max_steps=min(total_steps, args.max_steps or total_steps),
        log_every=args.logging_steps,
        max_nonfinite=args.max_nonfinite,
        best_metric=llava_training.BEST_METRIC,
        checkpoint_files={DATA_FILE: json.dumps(args.training_data).encode()},
        dry_run=args.dry_run,
    )

    # ---- 7. train ----
    position = fit(
        backend,
        train_loader,
        loss_fn,
        schedule,
        plan,
        log,
        evaluate=None if args.dry_run else validate,
        val_loader=val_loader,
        position=position,
    )
    if not args.dry_run:
        best = "" if position.best is None else f"; best validation accuracy {position.best:.2f}"
        say(f"done after {position.global_step} steps{best}")
    return position.global_step


def publish_result(args: argparse.Namespace, output_dir: Path, steps: int) -> None:
    """The best checkpoint's model, or without validation the newest one's, at the top of the output folder.

    Raises:
        RunError: it could not be written.
    """
    if not distributed.is_main():
        return
    name = BEST if args.val_annotations and (output_dir / BEST).is_dir() else newest_name(output_dir)
    if name is None:
        say("no checkpoint was written (--save_strategy no): nothing is left of this run but its logs")
        return
    try:
        publish(output_dir / name, output_dir)
    except OSError as error:
        raise RunError(
            f"{could_not_write(output_dir, error)}: free some space; the result is in {output_dir / name}"
        ) from None
    say(f"{args.mode} of {name} after {steps} steps: {output_dir}")


if __name__ == "__main__":
    run(main)
