"""Fine-tune or evaluate BEiT-3.

    torchrun --nproc_per_node=8 run_beit3_finetuning.py --task vqav2
    python run_beit3_finetuning.py --task vqav2 --eval --finetune output/vqav2/checkpoint-best

Read it from top to bottom; every flag stands in scripts/beit3_args.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from scripts.beit3_args import parse_args
from scripts.program import hide_interrupts, run

if __name__ == "__main__":
    hide_interrupts()
    parse_args()  # --help and mistakes answer at once, before torch is imported

import torch

from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary
from engine import distributed, stop
from engine.backend import resolve_precision
from engine.deepspeed_config import choose_precision, choose_stage, read_config
from engine.errors import EngineError
from engine.folder_lock import released_at_the_end
from engine.log import RunLog, say
from engine.loop import RunPlan, fit, resume_position
from engine.optim import LRRule, build_adamw, describe_groups, head_multiplier_rule, layer_decay_rule, parameter_groups
from engine.schedule import warmup_cosine
from models.beit3.beit3 import compile_layers
from scripts import beit3_captioning, beit3_vqa
from scripts.backends import build_backend
from scripts.beit3_checkpoint import checkpoint_files
from scripts.beit3_model import ModelChoice, build_model
from scripts.recompute import apply_recompute
from scripts.start import autocast_of, open_run_folder, precision_name, start_processes

# --task → module with load_labels, train_and_val_loaders, training_loss, validation, run_evaluation and BEST_METRIC
TASKS = {"vqav2": beit3_vqa, "coco_captioning": beit3_captioning, "nocaps": beit3_captioning}


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Start, build the model, then evaluate or train."""
    args = parse_args(argv)

    # ---- 1. processes, device, seed ----
    deepspeed_file = read_config(args.deepspeed_config) if args.deepspeed_config else None
    amp, args.zero_stage = choose_precision(args.amp, deepspeed_file), choose_stage(args.zero_stage, deepspeed_file)
    if args.compile and args.enable_deepspeed and args.zero_stage == 3:
        raise EngineError("--compile does not go with ZeRO stage 3, which gathers weights inside each layer: drop one")
    device = start_processes(args, group_of_one=args.enable_deepspeed)
    dtype = resolve_precision(amp, device)
    if args.num_workers is None:
        args.num_workers = min(10, distributed.cores_per_process())
    output_dir, resume_from = open_run_folder(args, training=not args.eval)

    # ---- 2. task: text and labels ----
    task = TASKS[args.task]
    tokenizer = XLMRTokenizer(args.sentencepiece_model)
    answers = task.load_labels(args)

    # ---- 3. model and weights ----
    choice = ModelChoice(
        name=args.model,
        task=args.task,
        weights=args.finetune,
        resume_from=resume_from,
        answers=answers,
        image_size=args.input_size,
        vocab_size=args.vocab_size,
        max_tokens=args.num_max_bpe_tokens,
        drop_path=0.0 if args.eval else args.drop_path,
        model_key=args.model_key,
        model_prefix=args.model_prefix,
    )
    model = build_model(choice, tokenizer, answers and len(answers), for_training=not args.eval).to(device)
    torch.manual_seed(args.seed + distributed.rank())
    if args.compile:
        compile_layers(model)

    # ---- 4. evaluate or train ----
    if args.eval:
        with stop.listening():
            task.run_evaluation(args, model, tokenizer, answers, device=device, autocast=autocast_of(device, dtype))
    else:
        train(args, model, tokenizer, answers, device, dtype, deepspeed_file, output_dir, resume_from)
    distributed.barrier()
    distributed.shutdown()


def train(
    args: argparse.Namespace,
    model: torch.nn.Module,
    tokenizer: XLMRTokenizer,
    answers: AnswerVocabulary | None,
    device: torch.device,
    dtype: torch.dtype | None,
    deepspeed_file: dict[str, Any] | None,
    output_dir: Path | None,
    resume_from: Path | None,
) -> None:
    """Data, optimizer, schedule, then the one loop."""
    task = TASKS[args.task]

    # ---- 5. data ----
    train_loader, val_loader = task.train_and_val_loaders(
        args, tokenizer, answers, image_size=model.config.image_size, device=device
    )
    steps_per_epoch = train_loader.steps_per_epoch

    # ---- 6. optimizer, schedule, backend ----
    unused = model.unused_in_finetuning()
    for name, parameter in model.named_parameters():
        if name in unused:  # so that data-parallel training need not look for unused ones
            parameter.requires_grad_(False)
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=args.weight_decay,
        no_decay=model.no_weight_decay(),
        rule=choose_rule(args, model),
    )
    warmup_steps = args.warmup_steps if args.warmup_steps > 0 else int(args.warmup_epochs * steps_per_epoch)
    schedule = warmup_cosine(args.lr, args.min_lr, warmup_steps=warmup_steps, total_steps=args.epochs * steps_per_epoch)

    loss_fn = task.training_loss(args)
    recomputed = apply_recompute(args, model, train_loader, loss_fn, device=device, dtype=dtype)

    # ---- 7. the plan, said once ----
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        **({} if answers is None else {"answers": len(answers)}),
        "samples_per_step": train_loader.samples_per_step,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": steps_per_epoch * args.epochs,
        "warmup_steps": warmup_steps,
        "precision": precision_name(dtype),
        **recomputed,
        "parameter_groups": describe_groups(groups, args.lr),
    }
    optimizer = build_adamw(groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps)
    backend, deepspeed_facts = build_backend(args, model, optimizer, device, dtype, deepspeed_file)
    facts |= deepspeed_facts
    say(json.dumps(facts, indent=2))
    # what does not fit, reference captions or a checkpoint, ends the run here: nothing of the run before was touched
    validate = None
    if val_loader is not None and not args.dry_run and not args.no_validation:
        validate = task.validation(args, tokenizer, answers, device=device, autocast=backend.autocast)
    position = None if resume_from is None else resume_position(backend, train_loader, resume_from)
    log = RunLog(output_dir, Path(args.log_dir) if args.log_dir else None)
    log.write_run({key: value for key, value in vars(args).items() if key != "notes"}, facts)
    keep = checkpoint_files(
        task=args.task,
        model_name=args.model,
        image_size=model.config.image_size,
        vocab_size=model.config.vocab_size,
        max_tokens=args.num_max_bpe_tokens,
        answer_rows=None if answers is None else list(answers.rows()),
        tokenizer_file=args.sentencepiece_model,
    )
    plan = RunPlan(
        epochs=args.epochs,
        output_dir=output_dir,
        save_every_epochs=args.save_ckpt_freq if args.save_ckpt else 0,
        save_every_steps=args.save_ckpt_steps if args.save_ckpt else 0,
        keep_checkpoints=args.keep_ckpts,
        max_steps=args.max_steps,
        log_every=args.log_every,
        max_nonfinite=args.max_nonfinite,
        best_metric=task.BEST_METRIC,
        checkpoint_files=keep,
        dry_run=args.dry_run,
    )

    # ---- 8. train ----
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


def choose_rule(args: argparse.Namespace, model: torch.nn.Module) -> LRRule | None:
    """Layer decay wins over the head's multiplier, as in the original."""
    if args.layer_decay < 1:
        return layer_decay_rule(model.layer_id, model.num_layers, args.layer_decay)
    if args.task_head_lr_weight > 1:
        return head_multiplier_rule("head", args.task_head_lr_weight)
    return None


if __name__ == "__main__":
    run(main)
