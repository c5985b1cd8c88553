"""Fine-tune VL-BERT on VQA v2 or VQA-CP v2, with one of the fine-tuning strategies.

    ./scripts/dist_run_single.sh 4 vqa/train_end2end.py cfgs/vqa/base_4X16G_fp32.yaml output
    ./scripts/nondist_run.sh vqa/train_end2end.py cfgs/vqa/base_spottune.yaml output

Read it from top to bottom; keys of the config stand in scripts/vlbert_config.py, flags in scripts/vlbert_args.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json

from scripts.program import hide_interrupts, run
from scripts.vlbert_args import schedule_steps, training_args

if __name__ == "__main__":
    hide_interrupts()
    training_args()  # --help, mistakes and missing files answer at once, before torch is imported

import torch

from data.loader import EvalLoader, TrainLoader
from engine import distributed, stop
from engine.backend import resolve_precision
from engine.checkpoint import BEST
from engine.errors import EngineError
from engine.folder_lock import released_at_the_end
from engine.log import RunLog, say
from engine.loop import RunPlan, fit, resume_position
from engine.optim import build_optimizer, describe_groups
from engine.schedule import Schedule, multi_step, triangle
from models.vlbert.vqa import AdaptiveVQA
from scripts import vlbert_vqa
from scripts.backends import build_backend
from scripts.recompute import apply_recompute
from scripts.start import autocast_of, open_run_folder, precision_name, start_processes
from scripts.vlbert_config import as_yaml, check_same_model
from scripts.vlbert_files import CONFIG
from scripts.vlbert_model import (
    Vocabularies,
    build_network,
    check_same_answers,
    load_first_weights,
    load_tokenizer,
)
from scripts.vlbert_optim import POLICY_PART, vlbert_parameter_groups
from scripts.wandb_log import WandbLog


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Start, build network and policy, train."""
    args = training_args(argv)

    # ---- 1. processes, device, seed ----
    device = start_processes(args, group_of_one=args.enable_deepspeed)
    dtype = resolve_precision(args.amp, device)
    output_dir, resume_from = open_run_folder(args)

    if resume_from is not None:
        check_same_model(resume_from / CONFIG, args.config)

    # ---- 2. words and answers, network and policy, first weights ----
    say("reading questions and answers")
    questions = vlbert_vqa.training_questions(args)
    words = Vocabularies(load_tokenizer(args.config), vlbert_vqa.load_answers(args, questions))
    if resume_from is not None:
        check_same_answers(resume_from, words)
    model = build_network(args.config, len(words.answers), words.tokenizer, reference=args.reference_behaviour)
    if resume_from is None:  # a resumed run has its own, frozen copies and policy included
        load_first_weights(model, args, words)
    model.to(device)
    torch.manual_seed(args.seed + distributed.rank())

    # ---- 3. train, then perhaps predict ----
    if args.do_test:
        vlbert_vqa.check_split(args, args.config["DATASET"]["TEST_IMAGE_SET"], words)
    train_loader, val_loader = vlbert_vqa.train_and_val_loaders(args, questions, words, device=device)
    del questions
    train(args, model, words, train_loader, val_loader, device, dtype, output_dir, resume_from)
    if args.do_test and output_dir is not None:
        args.eval_batch_size = args.config["TEST"]["BATCH_IMAGES"]
        test_best(args, model, words, device, output_dir)
    distributed.barrier()
    distributed.shutdown()


def train(
    args: argparse.Namespace,
    model: AdaptiveVQA,
    words: Vocabularies,
    train_loader: TrainLoader,
    val_loader: EvalLoader | None,
    device: torch.device,
    dtype: torch.dtype | None,
    output_dir: Path | None,
    resume_from: Path | None,
) -> None:
    """Optimizer, schedules, then the one loop."""
    steps_per_epoch = train_loader.steps_per_epoch
    total_steps = steps_per_epoch * args.config["TRAIN"]["END_EPOCH"]

    # ---- 4. optimizer, schedules, backend: the policy has its own rate, schedule and clipping ----
    settings, policy = args.config["TRAIN"], args.config["POLICY"]
    scale = train_loader.samples_per_step if args.lr is None else args.lr / (settings["LR"] or 1.0)
    lr, policy_lr = settings["LR"] * scale, policy["LR"] * scale
    groups = vlbert_parameter_groups(
        model.named_parameters(), weight_decay=settings["WD"], policy_weight_decay=policy["WD"]
    )
    kind = "transformers_adamw" if args.reference_adamw else settings["OPTIMIZER"].lower()
    optimizer = build_optimizer(kind, groups, lr=lr, eps=1e-6)
    schedule = build_schedule(settings, lr, steps_per_epoch, total_steps)
    part_schedules, clip_parts = {}, {}
    if model.policy is not None:
        part_schedules[POLICY_PART] = build_schedule(policy, policy_lr, steps_per_epoch, total_steps)
        clip_parts[POLICY_PART] = policy["CLIP_GRAD_NORM"] if policy["CLIP_GRAD_NORM"] > 0 else None
        if policy["OPTIMIZER"] != settings["OPTIMIZER"]:
            raise EngineError(
                f"POLICY.OPTIMIZER {policy['OPTIMIZER']} beside TRAIN.OPTIMIZER {settings['OPTIMIZER']}: both networks "
                "share one optimizer here, make them equal"
            )
    recomputed = apply_recompute(
        args,
        model,
        train_loader,
        vlbert_vqa.answer_loss,
        device=device,
        dtype=dtype,
        prepare=vlbert_vqa.draw_decisions,
    )
    backend, deepspeed_facts = build_backend(args, model, optimizer, device, dtype, None, clip_parts=clip_parts)

    # ---- 5. the plan, said once ----
    rates = {POLICY_PART: policy_lr}
    described = [describe_groups([group], rates.get(group["part"], lr))[0] for group in groups]
    facts = {
        **count_parameters(model),
        "strategy": args.config["FINETUNE_STRATEGY"],
        "answers": len(words.answers),
        "samples_per_step": train_loader.samples_per_step,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "effective_lr": lr,
        **({"effective_policy_lr": policy_lr} if model.policy is not None else {}),
        "precision": precision_name(dtype),
        **recomputed,
        "parameter_groups": described,
        **deepspeed_facts,
    }
    say(json.dumps(facts, indent=2))
    # a checkpoint that does not fit ends the run here, before anything of the run before is touched
    position = None if resume_from is None else resume_position(backend, train_loader, resume_from)
    log = open_log(args, output_dir)
    log.write_run({key: value for key, value in vars(args).items() if key not in ("notes", "run_dir")}, facts)
    plan = RunPlan(
        epochs=settings["END_EPOCH"],
        output_dir=output_dir,
        save_every_epochs=args.config["CHECKPOINT_FREQUENT"] if args.save_ckpt else 0,
        save_every_steps=args.save_ckpt_steps if args.save_ckpt else 0,
        keep_checkpoints=args.keep_ckpts,
        max_steps=args.max_steps,
        log_every=args.log_every,
        max_nonfinite=args.max_nonfinite,
        best_metric=vlbert_vqa.BEST_METRIC,
        checkpoint_files={**words.files(), CONFIG: as_yaml(args.config)},
        dry_run=args.dry_run,
    )

    # ---- 6. train ----
    validate = None
    if val_loader is not None and not args.dry_run:
        validate = vlbert_vqa.validation(
            args.config, output_dir=output_dir, log=log, device=device, autocast=backend.autocast
        )
    begun = 0 if position is None else position.global_step
    position = fit(
        backend,
        train_loader,
        vlbert_vqa.training_loss(args.config, model, steps_per_epoch),
        schedule,
        plan,
        log,
        part_schedules=part_schedules,
        evaluate=validate,
        val_loader=val_loader,
        position=position,
    )
    if not args.dry_run:
        best = "" if position.best is None else f"; best soft accuracy {position.best:.2f}"
        idle = "; nothing was left to do" if begun == position.global_step else ""
        say(f"done after {position.global_step} steps{best}{idle}; results in {output_dir}")


def build_schedule(settings: dict, lr: float, steps_per_epoch: int, total_steps: int) -> Schedule:
    """The rate over the steps, from the TRAIN or the POLICY section."""
    warmup_steps = settings["WARMUP_STEPS"] if settings["WARMUP"] else 0
    if settings["LR_SCHEDULE"] == "triangle":
        return triangle(lr, warmup_steps=warmup_steps, total_steps=total_steps)
    return multi_step(
        lr,
        schedule_steps(settings, steps_per_epoch),
        settings["LR_FACTOR"],
        warmup_steps=warmup_steps,
        warmup_factor=settings["WARMUP_FACTOR"],
        constant_warmup=settings["WARMUP_METHOD"] == "constant",
    )


def count_parameters(model: AdaptiveVQA) -> dict[str, int]:
    """Trained and frozen ones of the network, and those of its policy."""
    own = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters() if not name.startswith("policy.")]
    found = {
        "parameters_trained": sum(number for _, number, trained in own if trained),
        "parameters_frozen": sum(number for _, number, trained in own if not trained),
    }
    if model.policy is not None:
        found["parameters_policy"] = sum(parameter.numel() for parameter in model.policy.parameters())
    return found


def open_log(args: argparse.Namespace, output_dir: Path | None) -> RunLog:
    """The logs that the flags ask for."""
    board = None
    if output_dir is not None and (args.tensorboard or args.log_dir):
        board = Path(args.log_dir) if args.log_dir else output_dir / "tensorboard_logs"
    if args.wandb:
        return WandbLog(output_dir, board, name=args.config["VERSION"] or args.config_name, settings=args.config)
    return RunLog(output_dir, board)


def test_best(
    args: argparse.Namespace, model: AdaptiveVQA, words: Vocabularies, device: torch.device, output_dir: Path
) -> None:
    """Predict TEST_IMAGE_SET with the best checkpoint, as scripts/vqa/test.py does."""
    from scripts.vlbert_model import load_trained_weights

    best = output_dir / BEST
    if not distributed.broadcast_object(best.is_dir()):
        say(f"no prediction: there is no {best}")
        return
    load_trained_weights(model, best)
    args.eval_split, args.finetune = args.config["DATASET"]["TEST_IMAGE_SET"], str(best)
    args.output_dir, args.annotations, args.result_name = str(output_dir / "test"), None, None
    dtype = resolve_precision(args.amp, device)
    with stop.listening():
        vlbert_vqa.run_prediction(args, model, words, device=device, autocast=autocast_of(device, dtype))


if __name__ == "__main__":
    run(main)
