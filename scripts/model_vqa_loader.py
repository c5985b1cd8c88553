"""Answer questions about images with LLaVA, as VizWiz and the course competition ask them; score and submit.

python scripts/model_vqa_loader.py --model-path MODEL --image-folder data/valid
torchrun --nproc_per_node=8 scripts/model_vqa_loader.py --model-path ADAPTER --model-base BASE --batch_size 32

MODEL is a folder of any kind that scripts/llava_folder.py reads. An evaluation that was stopped goes on. Departures
from the original: --conv-mode vicuna_v1 and --temperature 0, which is how v1.5 is evaluated, are the defaults; beams
take no temperature; answer ids are not random.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import hashlib
import os
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.vizwiz import NORMALIZATIONS
from engine.folder_lock import released_at_the_end
from scripts.arguments import (
    HelpFormatter,
    OneLineParser,
    count,
    finite,
    fraction,
    not_negative,
    number,
    positive,
    positive_int,
    switch,
)
from scripts.program import run
from scripts.written_files import refuse_others, written

if TYPE_CHECKING:
    from data.llava_questions import LlavaQuestion
    from models.llava.llava import LlavaForCausalLM

_ID_LENGTH = 22  # of the original's random ids
_DRY_BATCHES = 2


def build_parser() -> argparse.ArgumentParser:
    """The original's flags in both spellings, and ours."""
    p = OneLineParser(prog="model_vqa_loader.py", description=__doc__, formatter_class=_Formatter, allow_abbrev=False)

    def add(group: Any, name: str, **options: Any) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}", f"--{name.replace('_', '-')}"))
        group.add_argument(*spellings, **options)

    group = p.add_argument_group("model")
    add(group, "model-path", type=Path, required=True, help="folder of the model, adapter or trained projector")
    add(group, "model-base", type=Path, help="folder of its base (default: the one that an adapter names)")
    add(group, "vision-tower", type=Path, help="folder of CLIP (default: the config's)")
    add(group, "tokenizer", type=Path, help="folder of a tokenizer, where the model's folder has none")
    group = p.add_argument_group("questions")
    add(group, "question-file", type=Path, default=Path("data/valid_for_llava.jsonl"), help="one JSON object a line")
    add(group, "image-folder", type=Path, default=Path("data/valid"), help="folder that image paths are relative to")
    add(group, "conv-mode", default="vicuna_v1", help="template of the conversation")
    add(group, "num-chunks", type=positive_int, default=1, help="parts into which the questions are cut")
    add(group, "chunk-idx", type=count, default=0, help="the part to answer, from 0")
    add(group, "limit_samples", type=positive_int, help="only the first N questions")
    add(group, "skip_broken_images", action="store_true", help="put a grey image in place of one that cannot be read")
    add(group, "max_bad_samples", type=fraction, default=0.001, help="share that --skip_broken_images may replace")
    group = p.add_argument_group("answers")
    add(group, "temperature", type=not_negative, default=0.0, help="0: the best word; else words are drawn")
    add(group, "top_p", type=number(float, low=0, high=1, above=True), help="draw among words of this probability")
    add(group, "num_beams", type=positive_int, default=1, help="width of a beam search")
    add(group, "length_penalty", type=finite, default=1.0, help="a beam's score is divided by its length to this power")
    add(group, "max_new_tokens", type=positive_int, default=128, help="longest answer")
    add(group, "seed", type=count, default=0, help="of drawn words")
    group = p.add_argument_group("output")
    add(group, "answers-file", type=Path, help="JSON lines to write (default: eval/<model>.jsonl)")
    add(group, "upload-file", type=Path, help="also write the list that VizWiz takes")
    add(group, "submission-file", type=Path, help="also write submission.npy of the course competition")
    add(
        group, "normalize", choices=tuple(NORMALIZATIONS), default="evalai", help="what is done to answers in these two"
    )
    add(group, "annotations", type=Path, help="answers of people (VizWiz, course, own .jsonl): score")
    add(group, "overwrite", action="store_true", help="also replace files that this program did not write")
    add(group, "dry_run", action="store_true", help=f"answer {_DRY_BATCHES} batches and write nothing")
    switch(group, "auto_resume", default=True, help="go on where the same evaluation stopped (--no_auto_resume: anew)")
    group = p.add_argument_group("device and speed")
    add(group, "batch_size", type=positive_int, default=8, help="questions per process")
    add(group, "num_workers", type=count, help="loader processes per process (default: 4, at most the cores)")
    add(group, "device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    add(
        group,
        "amp",
        choices=("auto", "bf16", "fp16", "no"),
        default="auto",
        help="precision of the weights; auto: fp16 on CUDA, as the original, on the CPU float32",
    )
    add(group, "dist_timeout", type=positive, default=1800.0, help="seconds after which a lost process ends the job")
    add(group, "local_rank", type=int, default=-1, help="given by torch.distributed.launch; the environment decides")
    return p


class _Formatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Lines of the description as they are, and defaults."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, and the names under which the shared parts look their settings up."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.model_id = model_id(args.model_path)
    if args.answers_file is None:
        part = f"_{args.num_chunks}_{args.chunk_idx}" if args.num_chunks > 1 else ""
        args.answers_file = Path("eval") / f"{args.model_id}{part}.jsonl"
    args.scores_file = args.answers_file.with_name(args.answers_file.name.removesuffix(".jsonl") + ".scores.json")
    args.output_dir, args.data_path, args.finetune = args.answers_file.parent, args.image_folder, args.model_path
    args.eval_batch_size = args.batch_size
    args.notes = notes(args, parser)
    return args


def parse_args_and_outputs(argv: list[str] | None = None) -> argparse.Namespace:
    """``parse_args`` for ``scripts/main.sh``, which looks before the training whether the answers can be written."""
    args = parse_args(argv)
    try:
        check_outputs(args)
    except DataError as error:
        build_parser().error(str(error))
    return args


def notes(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """A line for each flag that was given for nothing."""
    idle = {}
    if args.temperature == 0:
        idle |= dict.fromkeys(("top_p", "seed"), "no words are drawn at --temperature 0")
    if args.num_beams == 1:
        idle["length_penalty"] = "it goes with --num_beams above 1"
    given = {name: getattr(args, name) for name in idle}
    return [
        f"--{name} {value} has no effect: {idle[name]}"
        for name, value in given.items()
        if value != parser.get_default(name)
    ]


def model_id(path: Path) -> str:
    """Name of the model as the original writes it: of a checkpoint the run's in front."""
    path = Path(os.path.abspath(path))
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name


@released_at_the_end()
def main(argv: list[str] | None = None) -> None:
    """Check all input, read the model, answer, write."""
    args = parse_args(argv)

    import torch

    from data.llava_conversation import TEMPLATES
    from data.llava_questions import answer_ids
    from data.vizwiz import UNANSWERABLE, read_rows
    from engine import distributed, stop
    from engine.backend import resolve_precision
    from engine.log import peak_mib, say
    from models.llava.generation import Decoding
    from scripts import llava_vqa
    from scripts.evaluation_files import open_partial_results
    from scripts.llava_folder import PLAIN, read_llava_folder
    from scripts.llava_inference import inference_dtype, settle_adapters

    # ---- 1. processes, device, precision ----
    device = distributed.init(args.device, timeout_s=args.dist_timeout)
    if args.num_workers is None:
        args.num_workers = min(4, distributed.cores_per_process())
    # what auto is in training is another thing: there a merged adapter is not at stake
    chosen = None if args.amp == "auto" else resolve_precision(args.amp, device) or torch.float32
    dtype = inference_dtype(chosen, device)
    for note in args.notes:
        say(f"note: {note}")

    # ---- 2. input, checked before the model is read ----
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    if args.conv_mode not in TEMPLATES:
        raise DataError(f"--conv-mode {args.conv_mode!r:.40} is unknown: choose one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[args.conv_mode]
    questions = read_questions(args)
    rows = llava_vqa.match_rows(read_rows(args.annotations), questions) if args.annotations else None
    if not args.dry_run:
        check_outputs(args)
    else:
        questions = questions[: _DRY_BATCHES * args.batch_size * distributed.world_size()]

    # ---- 3. model ----
    folder = read_llava_folder(
        args.model_path,
        base=args.model_base,
        vision_tower=args.vision_tower,
        tokenizer=args.tokenizer,
        dtype=dtype,
        device=device,
    )
    if folder.layout == PLAIN and folder.adapter is None:
        raise DataError(f"{args.model_path} is a language model without a trained projector: give a LLaVA model")
    # the sums before the merge, whose last bits may depend on the number of threads
    args.settings_sha256 = checksum(args.conv_mode, args.max_new_tokens, rows is None, folder.values, folder.images)
    args.settings_sha256 += checksum(weights_sums(folder.model) if distributed.is_main() else None)
    settle_adapters(folder.model, dtype)
    dataset = llava_vqa.question_dataset(
        folder, questions, args.image_folder, template=template, skip_broken_images=args.skip_broken_images
    )
    unanswerable = answer_ids(UNANSWERABLE, folder.tokenizer, template) if rows is not None else ()
    say(f"{args.question_file}: {len(questions)} questions for {args.model_id} in {str(dtype).removeprefix('torch.')}")

    # ---- 4. answers, with those that the same evaluation had when it was stopped ----
    with stop.listening():
        kept = open_partial_results(
            args,
            args.answers_file.name,
            [question.place for question in questions],
            records=questions,
            answers=(),
            tokenizer=folder.tokenizer.fingerprint,
            image_size=folder.vision.image_size,
            device=device,
        )
        loader = llava_vqa.question_loader(
            dataset,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            pin_memory=device.type == "cuda",
            done=kept.found,
            max_bad_samples=args.max_bad_samples,
        )
        answers = llava_vqa.answer(
            folder.model,
            loader,
            kept,
            tokenizer=folder.tokenizer,
            images=folder.images,
            decoding=decoding,
            device=device,
            seed=args.seed,
            unanswerable=unanswerable,
        )

    # ---- 5. files ----
    if args.dry_run:
        say(f"dry run: {len(answers)} questions answered, nothing written; peak memory {peak_mib(device):.0f} MiB")
    else:
        if distributed.is_main():
            scores_file = None if rows is None else args.scores_file
            with written(args.answers_file, args.upload_file, args.submission_file, scores_file):
                write_results(args, questions, answers)
                if rows is not None:
                    write_scores(args, llava_vqa.score(rows, answers))
        kept.remove()
    distributed.barrier()
    distributed.shutdown()


def read_questions(args: argparse.Namespace) -> "list[LlavaQuestion]":
    """The chunk of the file, cut by --limit_samples; its images must be there unless broken ones are replaced."""
    from data.image_reader import check_images_exist
    from data.llava_questions import read_llava_questions

    questions = read_llava_questions(args.question_file, args.num_chunks, args.chunk_idx)[: args.limit_samples]
    if not args.image_folder.is_dir():
        raise DataError(f"no folder {args.image_folder}: give the folder of the images as --image-folder")
    if not args.skip_broken_images:
        check_images_exist((question.image for question in questions), args.image_folder, flag="--image-folder")
    return questions


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written, that are read, or that others wrote, before anything is computed.

    Raises:
        DataError: names the flag.
    """
    outputs = {"--answers-file": args.answers_file}
    outputs |= {"--upload-file": args.upload_file} if args.upload_file else {}
    outputs |= {"--submission-file": args.submission_file} if args.submission_file else {}
    outputs |= {"--annotations (its scores)": args.scores_file} if args.annotations else {}
    taken = {os.path.abspath(path): "an input" for path in (args.question_file, args.annotations) if path}
    for flag, path in outputs.items():
        place = os.path.abspath(path)
        if place in taken:
            raise DataError(f"{flag} {path} is {taken[place]} as well: give another file")
        taken[place] = f"that of {flag}"
        if path.is_dir():
            raise DataError(f"{flag} {path} is a folder: give a file")
        nearest = next(parent for parent in Path(place).parents if parent.exists())
        if not nearest.is_dir():
            raise DataError(f"{flag} {path}: {nearest} is a file, so nothing can be written below it")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise DataError(f"{flag} {path}: the folder {nearest} cannot be written: give another one")
    refuse_others(*outputs.values(), overwrite=args.overwrite)


def write_results(args: argparse.Namespace, questions: "list[LlavaQuestion]", answers: dict[int, Any]) -> None:
    """The answers file and, if wanted, VizWiz's upload and the course's submission."""
    from data.files import write_jsonl_atomic
    from data.vizwiz import upload_entries, write_submission, write_upload
    from engine.log import say
    from scripts.evaluation_files import clear_temporaries

    clear_temporaries(*filter(None, (args.answers_file, args.upload_file, args.submission_file, args.scores_file)))
    lines = [
        {
            "question_id": question.question_id,
            "prompt": question.text,
            "text": answers[question.place]["text"],
            "answer_id": checksum(args.model_id, question.question_id)[:_ID_LENGTH],
            "model_id": args.model_id,
            "metadata": {},
        }
        for question in questions
    ]
    write_jsonl_atomic(args.answers_file, lines)
    say(f"wrote {len(lines)} answers to {args.answers_file}")
    entries = upload_entries(
        [{"question_id": question.question_id, "image": question.image} for question in questions],
        {line["question_id"]: line["text"] for line in lines},
        NORMALIZATIONS[args.normalize],
    )
    if args.upload_file:
        write_upload(args.upload_file, entries)
        say(f"wrote {len(entries)} answers for VizWiz to {args.upload_file}")
    if args.submission_file:
        write_submission(args.submission_file, [entry["answer"] for entry in entries])
        say(f"wrote {len(entries)} answers for the competition to {args.submission_file}")


def write_scores(args: argparse.Namespace, scores: dict[str, Any]) -> None:
    """Print the scores and write them beside the answers."""
    from data.files import write_json_atomic
    from scripts.llava_vqa import describe_scores

    print("\n".join(describe_scores(scores)))
    write_json_atomic(args.scores_file, scores, indent=2)


def weights_sums(model: "LlavaForCausalLM") -> list[int]:
    """A number for each weight that says which it is, whatever file it came from; exact, so the same on every run."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [weight.detach().view(kinds[weight.element_size()]).sum(dtype=torch.int64) for weight in model.parameters()]
    return torch.stack(sums).tolist()


def checksum(*values: object) -> str:
    """SHA-256 of what values look like."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


if __name__ == "__main__":
    run(main)
