"""Predict with a VL-BERT checkpoint of any strategy: the evaluation server's file, and scores where labels are known.

    python scripts/vqa/test.py cfgs/vqa/base_4X16G_fp32.yaml output
    python scripts/vqa/test.py --cfg cfgs/vqa/base_4X16G_fp32.yaml --ckpt vl-bert-best.model --split test-dev2015

Checkpoints of ours and of the original are read by their key names.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.program import hide_interrupts, run
from scripts.vlbert_args import prediction_args

if __name__ == "__main__":
    hide_interrupts()
    prediction_args()  # --help, mistakes and missing files answer at once, before torch is imported

from engine import distributed, stop
from engine.backend import resolve_precision
from engine.folder_lock import released_at_the_end
from engine.log import say
from engine.run_folder import prepare_run_folder
from scripts import vlbert_vqa
from scripts.start import autocast_of, start_processes
from scripts.vlbert_config import check_same_model
from scripts.vlbert_files import CONFIG
from scripts.vlbert_model import Vocabularies, build_network, load_tokenizer, load_trained_weights


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Load, predict, write."""
    args = prediction_args(argv)
    device = start_processes(args)
    dtype = resolve_precision(args.amp, device)
    for note in args.notes:
        say(f"note: {note}")
    folder = Path(args.finetune) if Path(args.finetune).is_dir() else None
    if folder is not None:
        check_same_model(folder / CONFIG, args.config)
    answers = vlbert_vqa.load_answers(args, [], folder)
    words = Vocabularies(load_tokenizer(args.config, folder), answers)
    model = build_network(args.config, len(answers), words.tokenizer, reference=args.reference_behaviour)
    load_trained_weights(model, args.finetune)
    if model.global_decision:
        model.most_used()  # refuses a checkpoint that has not counted
    if not args.dry_run:
        prepare_run_folder(Path(args.output_dir), resume="", auto_resume=args.auto_resume, training=False)
    with stop.listening():
        vlbert_vqa.run_prediction(args, model.to(device), words, device=device, autocast=autocast_of(device, dtype))
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    run(main)
