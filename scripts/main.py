"""Train the baseline of the VizWiz course competition, then answer the test questions; or answer only.

    python scripts/main.py
    python scripts/main.py --hold_out 0.1 --augment --min_answer_count 5 --output_dir runs/second
    python scripts/main.py --predict_only --model_path model.pth

Source: ``main.py`` of the competition, whose recipe the defaults are. Writes model.pth (with dictionaries.json) and
submission.npy; checkpoints and logs go to baseline_run/, from where the same command goes on. Deliberate differences:
samples that do not fill the last batch of an epoch are left to other epochs; see also data/baseline_vqa.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from functools import partial

from scripts.baseline_args import parse_args
from scripts.program import hide_interrupts, run

if __name__ == "__main__":
    hide_interrupts()
    parse_args()  # --help and mistakes answer at once, before torch is imported

import torch

from data.baseline_dictionaries import DICTIONARIES_FILE, Dictionaries
from data.samplers import TrainBatchSampler
from data.vizwiz import VizWizRow
from engine import distributed, stop
from engine.backend import TorchBackend, resolve_precision
from engine.checkpoint import BEST, newest_name
from engine.folder_lock import released_at_the_end
from engine.log import RunLog, say
from engine.loop import RunPlan, fit, resume_position
from engine.optim import build_optimizer, describe_groups
from engine.run_folder import prepare_run_folder
from engine.schedule import multi_step
from engine.weights import read_state_dict
from models.baseline import BaselineVQA
from models.loading import load_weights
from scripts import baseline_vqa
from scripts.start import autocast_of, precision_name, start_processes

RUN_FOLDER = "baseline_run"


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Start, train, answer."""
    args = parse_args(argv)

    # ---- 1. processes, device ----
    device = start_processes(args)
    dtype = resolve_precision(args.amp, device)
    if args.num_workers is None:
        args.num_workers = min(10, distributed.cores_per_process())

    # ---- 2. train, or find a trained model ----
    asked = baseline_vqa.read_split(args, args.eval_split)
    baseline_vqa.refuse_to_replace(args)
    if args.predict_only:
        dictionaries, weights = baseline_vqa.load_dictionaries(args), Path(args.model_path)
    else:
        dictionaries, weights = train(args, device, dtype)

    # ---- 3. answer ----
    if weights is not None:
        answer(args, asked, dictionaries, weights, device, dtype)
    distributed.barrier()
    distributed.shutdown()


def train(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None
) -> tuple[Dictionaries, Path | None]:
    """Train in ``baseline_run``; gives the dictionaries and the checkpoint to answer with (None in a dry run)."""

    # ---- 4. questions and answers; what is wrong with them is said before anything is written ----
    data = baseline_vqa.read_training(args)
    sampler = TrainBatchSampler(
        len(data.rows),
        args.batch_size,
        accumulation_steps=args.update_freq,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=args.seed,
    )
    run_dir, resume_from = None if args.dry_run else Path(args.output_dir) / RUN_FOLDER, None
    if run_dir is not None:
        resume_from = prepare_run_folder(run_dir, resume="", auto_resume=args.auto_resume, training=True)
    dictionaries = baseline_vqa.build_dictionaries(args, data, resume_from)
    train_loader = baseline_vqa.question_loader(
        args,
        data.rows,
        dictionaries,
        baseline_vqa.TRAIN_SPLIT,
        device=device,
        targets=data.targets,
        sampler=sampler,
    )
    val_loader = None
    if data.held_out:
        val_loader = baseline_vqa.question_loader(
            args, data.held_out, dictionaries, baseline_vqa.TRAIN_SPLIT, device=device
        )

    # ---- 5. model, optimizer, backend ----
    torch.manual_seed(args.seed)  # the original's start weights, on every rank; nothing is drawn after them
    model = BaselineVQA(dictionaries.question_size, len(dictionaries.answers)).to(device)
    group = {
        "name": "all",
        "params": list(model.parameters()),
        "weight_decay": args.weight_decay,  # of biases and norms too, as in the original
        "lr_scale": 1.0,
    }
    backend = TorchBackend(
        model,
        build_optimizer("adam", [group], lr=args.lr),
        device=device,
        autocast_dtype=dtype,
        accumulation_steps=args.update_freq,
        clip_grad=args.clip_grad,
    )

    # ---- 6. the plan, said once ----
    total_steps = train_loader.steps_per_epoch * args.epochs
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "question_entries": dictionaries.question_size,
        "answers": len(dictionaries.answers),
        **data.facts(),
        "samples_per_step": train_loader.samples_per_step,
        "steps_per_epoch": train_loader.steps_per_epoch,
        "total_steps": total_steps,
        "precision": precision_name(dtype),
        "parameter_groups": describe_groups([group], args.lr),
    }
    say(json.dumps(facts, indent=2))
    position = None if resume_from is None else resume_position(backend, train_loader, resume_from)
    log = RunLog(run_dir, Path(args.log_dir) if args.log_dir else None)
    log.write_run(vars(args), facts)
    plan = RunPlan(
        epochs=args.epochs,
        output_dir=run_dir,
        save_every_steps=args.save_ckpt_steps,
        keep_checkpoints=args.keep_ckpts,
        max_steps=args.max_steps,
        log_every=args.log_every,
        max_nonfinite=args.max_nonfinite,
        best_metric=baseline_vqa.BEST_METRIC,
        checkpoint_files={DICTIONARIES_FILE: dictionaries.to_json()},
        dry_run=args.dry_run,
    )

    # ---- 7. train ----
    validate = None
    if val_loader is not None and not args.dry_run:
        validate = partial(
            baseline_vqa.validate,
            rows=data.held_out,
            dictionaries=dictionaries,
            device=device,
            autocast=backend.autocast,
        )
    position = fit(
        backend,
        train_loader,
        baseline_vqa.loss_fn,
        multi_step(args.lr, (), 1.0),
        plan,
        log,
        evaluate=validate,
        val_loader=val_loader,
        position=position,
    )
    if run_dir is None:
        return dictionaries, None
    scored = validate is not None and position.best is not None
    best = f"; best accuracy on the hold-out {position.best:.2f}" if scored else ""
    say(f"done after {position.global_step} steps{best}")
    return dictionaries, run_dir / (BEST if scored else newest_name(run_dir))


def answer(
    args: argparse.Namespace,
    asked: list[VizWizRow],
    dictionaries: Dictionaries,
    weights: Path,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Write ``submission.npy``, and after training ``model.pth``."""
    model = BaselineVQA(dictionaries.question_size, len(dictionaries.answers))
    load_weights(model, read_state_dict(weights))
    if not args.dry_run:
        prepare_run_folder(Path(args.output_dir), resume="", auto_resume=False, training=False)
        if not args.predict_only:
            baseline_vqa.write_model(Path(args.output_dir), model.state_dict(), dictionaries)
    args.finetune = str(weights)  # by which results of an evaluation that was stopped are known
    with stop.listening():
        baseline_vqa.run_prediction(
            args, model.to(device), asked, dictionaries, device=device, autocast=autocast_of(device, dtype)
        )


if __name__ == "__main__":
    run(main)
