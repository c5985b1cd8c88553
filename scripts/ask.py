"""Ask a trained model about one picture: the most probable answers with their probabilities.

python scripts/ask.py --checkpoint output/vqav2/checkpoint-best --image photo.jpg --question "what is on the table?"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import TYPE_CHECKING

from scripts.arguments import HelpFormatter, OneLineParser, positive_int
from scripts.beit3_args import RECIPES

if TYPE_CHECKING:
    import numpy as np

    from data.tokenizers.spm import XLMRTokenizer


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint folder of a run, or a published .pth with the flags below"
    )
    parser.add_argument("--image", required=True, help="picture file")
    parser.add_argument("--question", required=True, nargs="+", help="one or more questions, each in quotes")
    parser.add_argument("--top", type=positive_int, default=5, help="answers to print")
    parser.add_argument("--json", action="store_true", help="print one JSON object a question instead of text")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    group = parser.add_argument_group("needed for a bare weights file; a checkpoint folder of a run knows them")
    group.add_argument("--model", help="such as beit3_base_patch16_480")
    group.add_argument("--sentencepiece_model", help="beit3.spm")
    group.add_argument("--answer_list", help="answer2label.txt of the weights")
    group.add_argument("--model_key", default="model|module", help="keys of which the first present holds the weights")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Load once, answer each question."""
    args = build_parser().parse_args(argv)

    import json

    import torch

    from data.errors import DataError
    from data.tokenizers.spm import XLMRTokenizer
    from data.transforms import EvalTransform, normalize
    from engine import distributed
    from scripts.beit3_checkpoint import TOKENIZER_FILE, checkpoint_folder, read_checkpoint_config
    from scripts.beit3_model import ModelChoice, build_model, find_answers
    from scripts.beit3_vqa import top_answers

    if not Path(args.checkpoint).exists():
        raise DataError(f"--checkpoint {args.checkpoint}: no such file or folder")
    picture = read_picture(args.image)
    config = read_checkpoint_config(args.checkpoint)
    name = args.model or config.get("model")
    spm = args.sentencepiece_model or str((checkpoint_folder(args.checkpoint) or Path()) / TOKENIZER_FILE)
    answers = find_answers(args.answer_list, args.checkpoint, None)
    for value, flag in ((name, "--model"), (answers, "--answer_list")):
        if not value:
            raise DataError(f"{args.checkpoint} does not say its {flag.removeprefix('--')}: give {flag}")
    if not Path(spm).is_file():
        raise DataError(f"no sentencepiece model at {spm}: give --sentencepiece_model")
    tokenizer = XLMRTokenizer(spm)
    max_tokens = config.get("num_max_bpe_tokens", RECIPES["vqav2", "base"]["num_max_bpe_tokens"])
    texts = [question_tokens(question, tokenizer, max_tokens) for question in args.question]
    device = distributed.init(args.device)
    choice = ModelChoice(name=name, task="vqav2", weights=args.checkpoint, model_key=args.model_key)
    model = build_model(choice, tokenizer, len(answers), for_training=False).to(device).eval()
    image = normalize(EvalTransform(model.config.image_size)(picture).unsqueeze(0).to(device))
    for question, tokens in zip(args.question, texts, strict=True):
        with torch.inference_mode():
            logits = model(image, torch.tensor([tokens], device=device))
        top = top_answers(logits[0], answers, args.top)
        if args.json:
            print(json.dumps({"question": question, "top": [[answer, round(p, 6)] for answer, p in top]}))
        else:
            print(question)
            print("\n".join(f"{probability:8.1%}  {answer}" for answer, probability in top))


def read_picture(path: str) -> "np.ndarray":
    """Pixels of the picture to ask about, (H, W, 3) uint8 RGB.

    Raises:
        DataError: a missing or unreadable file; names --image and the reason.
    """
    from data.errors import DataError
    from data.images import decode_image

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"--image {path}: {error.strerror or error}") from None
    try:
        return decode_image(content, path)
    except DataError as error:  # ends in advice about an index, and there is none here
        reason = str(error).removeprefix(f"cannot read image {path}: ")
        raise DataError(f"--image {path}: {reason.rpartition('; ')[0] or reason}") from None


def question_tokens(question: str, tokenizer: "XLMRTokenizer", max_tokens: int) -> list[int]:
    """Model input of one question, at most ``max_tokens`` ids; says on stderr when it had to be cut.

    Raises:
        DataError: an empty question or one that is no proper text; names --question.
    """
    from data.errors import DataError

    try:
        tokens = tokenizer.encode(question)
    except DataError as error:
        raise DataError(f"--question {question!r:.80}: {error}") from None
    if not tokens:
        raise DataError(f"--question {question!r:.80} is empty: give a question in quotes")
    room = max_tokens - 2  # begin and end
    if len(tokens) > room:
        print(
            f"warning: --question {question!r:.80} has {len(tokens)} tokens, only the first {room} are read",
            file=sys.stderr,
        )
    return tokenizer.build_segment(tokens, max_tokens)


if __name__ == "__main__":
    from scripts.program import run

    run(main)
