"""Flags of ``scripts/main.py``, the course baseline: the original's recipe as defaults (no torch here)."""

import argparse
from pathlib import Path

from data.errors import DataError
from scripts.arguments import (
    HelpFormatter,
    OneLineParser,
    count,
    fraction,
    not_negative,
    positive,
    positive_int,
    switch,
)

IMAGE_SIZE = 224
QUESTION_ENCODERS = ("words", "subwords")
# what a trained model's dictionaries say, so that a prediction with them takes none of these
_OF_THE_MODEL = ("image_size", "question_encoder", "class_mapping", "min_answer_count", "reference_behaviour")
_STRIDE = 32  # of the last stage: a smaller image is one place there


def build_parser() -> argparse.ArgumentParser:
    """All flags, in titled groups."""
    parser = OneLineParser(
        prog="main.py",
        description="Train the baseline of the VizWiz course competition and write model.pth and submission.npy.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", default="data", help="folder of train.json, valid.json, train/ and valid/")
    group.add_argument("--eval_split", default="valid", help="what is predicted: NAME.json with its images in NAME/")
    group.add_argument(
        "--hold_out",
        type=fraction,
        default=0.0,
        metavar="FRACTION",
        help="share of the training questions kept for scoring; the best epoch then predicts (default: none)",
    )
    group.add_argument("--limit_samples", type=positive_int, help="use only the first N questions of each file")
    group.add_argument(
        "--skip_broken_images", action="store_true", help="put a grey image in place of one that cannot be read"
    )
    group.add_argument(
        "--max_bad_samples", type=fraction, default=0.001, help="share that --skip_broken_images may replace"
    )
    group = parser.add_argument_group("model, and ways beyond the original")
    group.add_argument("--image_size", type=positive_int, help=f"side of the images in pixels (default: {IMAGE_SIZE})")
    group.add_argument("--question_encoder", choices=QUESTION_ENCODERS, help="what questions are cut into (words)")
    group.add_argument(
        "--vocab_size", type=positive_int, default=2000, help="most subwords, learnt from the training questions"
    )
    group.add_argument("--class_mapping", metavar="FILE", help="CSV answer,class_id: learn these classes of answers")
    group.add_argument("--min_answer_count", type=positive_int, metavar="N", help="learn answers given N times or more")
    group.add_argument("--augment", action="store_true", help="crop and recolour training images at random")
    group.add_argument(
        "--reference_behaviour",
        action="store_true",
        default=None,
        help="the original's defects: questions are looked up as typed, and answers may be empty",
    )
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=20, help="epochs to train")
    group.add_argument("--batch_size", type=positive_int, default=128, help="samples per process and micro-batch")
    group.add_argument("--update_freq", type=positive_int, default=1, help="micro-batches per optimizer step")
    group.add_argument("--lr", type=not_negative, default=1e-3, help="rate of Adam, constant")
    group.add_argument("--weight_decay", type=not_negative, default=1e-5, help="L2 decay of all weights")
    group.add_argument("--clip_grad", type=positive, help="clip the total gradient norm to this value (default: off)")
    group.add_argument("--max_steps", type=positive_int, help="stop after so many optimizer steps")
    group.add_argument("--max_nonfinite", type=positive_int, default=10, help="bad steps in a row before the end")
    group.add_argument("--seed", type=count, default=42, help="of start weights, order, augmentation and hold-out")
    group = parser.add_argument_group("prediction")
    group.add_argument("--predict_only", action="store_true", help="do not train")
    group.add_argument(
        "--model_path", metavar="FILE", help="weights or checkpoint folder (default: model.pth in --output_dir)"
    )
    group.add_argument(
        "--dictionaries",
        metavar="FILE",
        help="dictionaries.json of the weights (default: beside them, else made from train.json as in training)",
    )
    group.add_argument("--eval_batch_size", type=positive_int, help="samples per process (default: --batch_size)")
    group = parser.add_argument_group("start, devices and speed")
    group.add_argument("--device", default="auto", help="auto (CUDA when there is one), cuda, cuda:N or cpu")
    group.add_argument("--num_workers", type=count, help="loader processes per rank (default: 10, at most the cores)")
    switch(group, "pin_mem", default=True, help="page-locked batches for CUDA (--no_pin_mem: off)")
    group.add_argument("--dist_timeout", type=positive, default=1800.0, help="seconds until a lost rank ends the job")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help="given by torch.distributed.launch")
    group.add_argument(
        "--amp", default="no", choices=["auto", "bf16", "fp16", "no"], help="autocast; no: float32, as the original"
    )
    group.add_argument("--tf32", action="store_true", help="allow TF32 in float32 matrix products on CUDA")
    group = parser.add_argument_group("output, checkpoints and resume")
    group.add_argument("--output_dir", default=".", help="folder of the results and of baseline_run/")
    group.add_argument(
        "--overwrite", action="store_true", help="also replace results there that this program did not write"
    )
    group.add_argument("--log_dir", help="TensorBoard folder (default: none)")
    group.add_argument("--log_every", type=positive_int, default=10, help="optimizer steps between log lines")
    group.add_argument("--save_ckpt_steps", type=count, default=0, help="also a checkpoint every so many steps")
    group.add_argument("--keep_ckpts", type=count, default=1, help="keep only the newest N checkpoints (0: all)")
    switch(
        group,
        "auto_resume",
        default=True,
        help="go on from the newest checkpoint of baseline_run/ (--no_auto_resume: refuse a folder that has one)",
    )
    group.add_argument("--dry_run", action="store_true", help="build everything, take two steps, write nothing")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked; ``args.given`` lists those that say what a model is trained with."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.given = [f"--{name}" for name in _OF_THE_MODEL if getattr(args, name) is not None]
    args.question_encoder = args.question_encoder or QUESTION_ENCODERS[0]
    args.image_size, args.reference_behaviour = args.image_size or IMAGE_SIZE, bool(args.reference_behaviour)
    args.eval_batch_size = args.eval_batch_size or args.batch_size
    args.model_path = args.model_path or (str(Path(args.output_dir) / "model.pth") if args.predict_only else None)
    try:
        _check(args)
    except DataError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    if not Path(args.data_path).is_dir():
        raise DataError(
            f"no folder {args.data_path}: put train.json, valid.json, train/ and valid/ into one and give it as "
            "--data_path"
        )
    if args.class_mapping and args.min_answer_count:
        raise DataError("--class_mapping and --min_answer_count both choose the answers: give one of them")
    own = [flag for flag in args.given if flag in ("--class_mapping", "--min_answer_count")]
    own += ["--question_encoder subwords"] * (args.question_encoder != "words")
    if args.reference_behaviour and own:
        raise DataError(f"--reference_behaviour is the original's, which has no {own[0]}: leave one of them out")
    if not args.predict_only:
        for name in ("model_path", "dictionaries"):
            if getattr(args, name):
                raise DataError(f"--{name} is for predictions: give --predict_only too, or leave it out")
        if args.batch_size == 1 and args.image_size <= _STRIDE:
            raise DataError(
                f"--batch_size 1 with --image_size {args.image_size} leaves batch normalisation one value: "
                "raise one of them"
            )
