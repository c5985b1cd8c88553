"""Fine-tune VLE on VQA v2, then predict the test split; or predict only.

    python run_vle_vqa.py --train_config_file=vqa_train_config.json
    torchrun --nproc_per_node=8 run_vle_vqa.py --train_config_file=vqa_train_config.json
    python run_vle_vqa.py --test_only true --model_dir logs/VQAv2_seed0_from_vle-base/checkpoint-best

Read it from top to bottom; the settings stand in scripts/vle_config.py, the other flags in scripts/vle_args.py.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from scripts.program import hide_interrupts, run
from scripts.vle_args import launch_command, parse_args, settle_batch_sizes

if __name__ == "__main__":
    hide_interrupts()
    _args = parse_args()  # --help and mistakes answer at once, before torch is imported
    if _launch := launch_command(_args, sys.argv[0], sys.argv[1:]):  # num_gpus of the config: torchrun starts them
        os.environ.update(_launch[1])
        os.execv(sys.executable, [sys.executable, *_launch[0]])

import torch

from data.vqa_answers import AnswerVocabulary
from engine import distributed, stop
from engine.backend import resolve_precision
from engine.checkpoint import BEST
from engine.deepspeed_config import choose_stage
from engine.errors import EngineError
from engine.folder_lock import released_at_the_end
from engine.log import RunLog, say
from engine.loop import RunPlan, fit, resume_position
from engine.optim import build_optimizer, describe_groups
from engine.schedule import warmup_decay
from scripts import vle_vqa
from scripts.backends import build_backend
from scripts.recompute import apply_recompute
from scripts.start import autocast_of, open_run_folder, precision_name, start_processes
from scripts.vle_config import COSINE, warmup_steps_of
from scripts.vle_model import VLEFolder, build_model, folder_files, read_model_folder
from scripts.vle_optim import vle_parameter_groups

_BETAS = (0.9, 0.98)
_MANY_EPOCHS = 1000  # where max_steps decides, as in the original


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Start, build the model, train, predict."""
    args = parse_args(argv)

    # ---- 1. processes, device, seed ----
    device = start_processes(args, group_of_one=args.enable_deepspeed)
    settle_batch_sizes(args, distributed.world_size())
    if args.amp == "fp16" and device.type == "cpu":
        raise EngineError("precision 16 needs a CUDA device: on the CPU give --precision 32 or --precision bf16")
    dtype = resolve_precision(args.amp, device)
    output_dir, resume_from = open_run_folder(args, training=not args.eval)

    # ---- 2. model folder, answers, weights ----
    folder = read_model_folder(
        args.model_dir,
        image_size=None if args.eval else args.image_size,
        sentencepiece_model=args.sentencepiece_model,
    )
    answers = vle_vqa.load_answers(args, folder)
    weights = None if args.from_scratch or resume_from else args.model_dir
    model = build_model(folder, weights, answers, for_training=not args.eval).to(device)
    torch.manual_seed(args.seed + distributed.rank())

    # ---- 3. train, then predict with the best weights ----
    if not args.eval:
        train(args, model, folder, answers, device, dtype, output_dir, resume_from)
        del model
        model = best_model(args, folder, answers, output_dir)
    if model is not None:
        with stop.listening():
            autocast = autocast_of(device, dtype)
            vle_vqa.run_evaluation(args, model.to(device), folder, answers, device=device, autocast=autocast)
    distributed.barrier()
    distributed.shutdown()


def train(
    args: argparse.Namespace,
    model: torch.nn.Module,
    folder: VLEFolder,
    answers: AnswerVocabulary,
    device: torch.device,
    dtype: torch.dtype | None,
    output_dir: Path | None,
    resume_from: Path | None,
) -> None:
    """Data, optimizer, schedule, then the one loop."""

    # ---- 4. data ----
    train_loader, val_loader = vle_vqa.train_and_val_loaders(args, folder, answers, device=device)
    steps_per_epoch = train_loader.steps_per_epoch
    total_steps = args.max_steps or steps_per_epoch * args.max_epoch

    # ---- 5. optimizer, schedule, backend ----
    groups = vle_parameter_groups(
        model.named_parameters(),
        weight_decay=args.weight_decay,
        lr_mult_head=args.lr_mult_head,
        lr_mult_cross_modal=args.lr_mult_cross_modal,
    )
    kind = "transformers_adamw" if args.reference_adamw else args.optim_type
    optimizer = build_optimizer(kind, groups, lr=args.learning_rate, betas=_BETAS)
    warmup_steps = warmup_steps_of(args.warmup_steps, total_steps)
    power = None if args.decay_power == COSINE else args.decay_power
    schedule = warmup_decay(
        args.learning_rate, args.end_lr, warmup_steps=warmup_steps, total_steps=total_steps, power=power
    )
    loss_fn = vle_vqa.training_loss(folder)
    recomputed = apply_recompute(args, model, train_loader, loss_fn, device=device, dtype=dtype)
    args.zero_stage = choose_stage(args.zero_stage, args.deepspeed_config) if args.enable_deepspeed else 0
    backend, deepspeed_facts = build_backend(args, model, optimizer, device, dtype, args.deepspeed_config)

    # ---- 6. the plan, said once ----
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "answers": len(answers),
        "samples_per_step": train_loader.samples_per_step,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
        "precision": precision_name(dtype),
        **recomputed,
        "parameter_groups": describe_groups(groups, args.learning_rate),
        **deepspeed_facts,
    }
    say(json.dumps(facts, indent=2))
    # a checkpoint that does not fit ends the run here, before anything of the run before is touched
    position = None if resume_from is None else resume_position(backend, train_loader, resume_from)
    log = RunLog(output_dir, output_dir / "tensorboard" if output_dir and args.tensorboard else None)
    log.write_run({key: value for key, value in vars(args).items() if key != "notes"}, facts)
    plan = RunPlan(
        epochs=args.max_epoch if args.max_steps is None else _MANY_EPOCHS,
        output_dir=output_dir,
        save_every_epochs=1 if args.save_ckpt else 0,
        save_every_steps=args.save_ckpt_steps if args.save_ckpt else 0,
        keep_checkpoints=args.keep_ckpts,
        max_steps=args.stop_after or args.max_steps,
        log_every=args.log_every,
        max_nonfinite=args.max_nonfinite,
        best_metric=vle_vqa.BEST_METRIC,
        checkpoint_files=folder_files(folder, answers),
        dry_run=args.dry_run,
    )

    # ---- 7. train ----
    validate = None
    if val_loader is not None and not args.dry_run and not args.no_validation:
        validate = vle_vqa.validation(folder, device=device, autocast=backend.autocast)
    position = fit(
        backend,
        train_loader,
        loss_fn,
        schedule,
        plan,
        log,
        evaluate=validate,
        val_loader=val_loader,
        position=position,
    )
    if not args.dry_run:
        best = "" if position.best is None else f"; best validation score {position.best:.2f}"
        say(f"done after {position.global_step} steps{best}; results in {output_dir}")


def best_model(
    args: argparse.Namespace, folder: VLEFolder, answers: AnswerVocabulary, output_dir: Path | None
) -> torch.nn.Module | None:
    """The best checkpoint of the run, to predict the test split with; None, with word of it, where one is missing."""
    if output_dir is None or args.stop_after is not None:
        return None
    best = output_dir / BEST
    reason = "" if best.is_dir() else f"there is no {best}"
    if not reason and args.train_file and args.eval_split in vle_vqa.SPLITS:
        reason = "own data have no test split: give a .jsonl file as --eval_split"
    if not reason and not vle_vqa.has_split(args, args.eval_split):
        reason = f"there is no split {args.eval_split} in {args.data_root}"
    if distributed.broadcast_object(reason):
        say(f"no prediction: {reason}")
        return None
    args.finetune = str(best)
    return build_model(folder, best, answers, for_training=False)


if __name__ == "__main__":
    run(main)
