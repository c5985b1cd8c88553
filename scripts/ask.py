"""Ask a trained model about one picture, or let one that was trained on captions describe it.

python scripts/ask.py --checkpoint output/vqav2/checkpoint-best --image photo.jpg --question "what is on the table?"
python scripts/ask.py --checkpoint output/coco_captioning/checkpoint-best --image photo.jpg
python scripts/ask.py --checkpoint hfl/vle-base-for-vqa --image photo.jpg --question "what is on the table?"
python scripts/ask.py --checkpoint liuhaotian/llava-v1.5-7b --image photo.jpg --question "what is on the table?"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import TYPE_CHECKING, Any

from scripts import ask_llava
from scripts.arguments import HelpFormatter, OneLineParser, positive_int
from scripts.beit3_args import EVAL_TOKENS, RECIPES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from data.tokenizers.spm import SentencePieceTokenizer, XLMRTokenizer
    from data.vqa_answers import AnswerVocabulary
    from scripts.vqa_evaluation import Probabilities


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint folder of a run, folder of a VLE or LLaVA model, or a .pth of BEiT-3 with the flags below",
    )
    parser.add_argument("--image", required=True, help="picture file")
    parser.add_argument("--question", nargs="+", help="one or more questions, each in quotes; none: a caption")
    parser.add_argument("--top", type=positive_int, default=5, help="answers to print, of models with an answer list")
    parser.add_argument(
        "--num_beams", type=positive_int, help="beams of the search (default: 3 for a caption, 1 for LLaVA)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each question or caption")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    ask_llava.add_flags(parser)
    group = parser.add_argument_group("needed for a bare weights file; a checkpoint folder of a run knows them")
    group.add_argument("--model", help="such as beit3_base_patch16_480")
    group.add_argument("--sentencepiece_model", help="beit3.spm; of VLE and LLaVA in place of the folder's")
    group.add_argument("--answer_list", help="answer2label.txt of the weights, for questions")
    group.add_argument("--model_key", default="model|module", help="keys of which the first present holds the weights")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Load once, then answer each question or find a caption."""
    args = build_parser().parse_args(argv)

    import torch

    from data.errors import DataError
    from data.tokenizers.spm import XLMRTokenizer
    from data.transforms import EvalTransform, normalize
    from engine import distributed
    from scripts.beit3_checkpoint import TOKENIZER_FILE, checkpoint_folder, read_checkpoint_config
    from scripts.beit3_model import ModelChoice, build_model, find_answers

    if not Path(args.checkpoint).exists():
        raise DataError(f"--checkpoint {args.checkpoint}: no such file or folder")
    picture = read_picture(args.image)
    if ask_llava.is_llava_folder(args.checkpoint):
        ask_llava.ask_llava(args, picture)
        return
    ask_llava.refuse_flags(args)
    if is_vle_folder(args.checkpoint):
        _ask_vle(args, picture)
        return
    if is_vlbert_checkpoint(args.checkpoint):
        raise DataError(
            f"{args.checkpoint} is of VL-BERT, which needs regions of a detector beside the picture and is not offered "
            "here: predict with scripts/vqa/test.py (docs/vlbert.md)"
        )
    config = read_checkpoint_config(args.checkpoint)
    name = args.model or config.get("model")
    task = _task(args, config)
    spm = args.sentencepiece_model or str((checkpoint_folder(args.checkpoint) or Path()) / TOKENIZER_FILE)
    answers = find_answers(args.answer_list, args.checkpoint, None) if args.question else None
    for value, flag in ((name, "--model"), (answers or not args.question, "--answer_list")):
        if not value:
            raise DataError(f"{args.checkpoint} does not say its {flag.removeprefix('--')}: give {flag}")
    if not Path(spm).is_file():
        raise DataError(f"no sentencepiece model at {spm}: give --sentencepiece_model")
    tokenizer = XLMRTokenizer(spm)
    longest = RECIPES["vqav2", "base"]["num_max_bpe_tokens"] if args.question else EVAL_TOKENS
    max_tokens = config.get("num_max_bpe_tokens", longest)
    texts = [question_tokens(question, tokenizer, max_tokens) for question in args.question or ()]
    device = distributed.init(args.device)
    choice = ModelChoice(name=name, task=task, weights=args.checkpoint, model_key=args.model_key)
    model = build_model(choice, tokenizer, answers and len(answers), for_training=False).to(device).eval()
    image = normalize(EvalTransform(model.config.image_size)(picture).unsqueeze(0).to(device))
    if answers is not None:
        _answer(args, model, image, texts, answers, torch.sigmoid)
    else:
        _caption(args, model, image, tokenizer, max_tokens)


def is_vle_folder(checkpoint: str) -> bool:
    """Whether this is a folder whose ``config.json`` is of a VLE model."""
    from data.files import read_json

    path = Path(checkpoint) / "config.json"
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("model_type") == "vle"


def is_vlbert_checkpoint(checkpoint: str) -> bool:
    """Whether these are the checkpoint folder of a VL-BERT run or weights inside it."""
    from scripts.vlbert_files import ANSWERS, CONFIG, VOCABULARY

    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
    return all((folder / name).is_file() for name in (CONFIG, VOCABULARY, ANSWERS))


def _ask_vle(args: argparse.Namespace, picture: "np.ndarray") -> None:
    """Answer each question with a VLE folder; probabilities are those of its original pipeline."""
    from data.clip_images import CLIPTransform, normalize
    from data.errors import DataError
    from engine import distributed
    from scripts.vle_config import ORIGINAL_MAX_TEXT_LEN
    from scripts.vle_model import build_model, read_model_folder
    from scripts.vle_vqa import softmax

    if not args.question:
        raise DataError(f"{args.checkpoint} is of a model that answers questions: give --question")
    folder = read_model_folder(args.checkpoint, sentencepiece_model=args.sentencepiece_model)
    if folder.answers is None:
        raise DataError(f"{args.checkpoint}/config.json has no id2label: without it the answers have no names")
    texts = [question_tokens(question, folder.tokenizer, ORIGINAL_MAX_TEXT_LEN) for question in args.question]
    device = distributed.init(args.device)
    model = build_model(folder, args.checkpoint, folder.answers, for_training=False).to(device).eval()
    image = normalize(CLIPTransform(folder.images)(picture)[None].to(device), folder.images)
    _answer(args, model, image, texts, folder.answers, softmax)


def _task(args: argparse.Namespace, config: dict[str, Any]) -> str:
    """What the model is asked to do, checked against what its run trained."""
    from data.errors import DataError

    task = config.get("task", "vqav2" if args.question else "coco_captioning")
    if args.question and task != "vqav2":
        raise DataError(f"{args.checkpoint} was trained to caption pictures ({task}): leave --question out")
    if not args.question and task == "vqav2":
        raise DataError(f"{args.checkpoint} was trained to answer questions: give --question")
    return task


def _answer(
    args: argparse.Namespace,
    model: "nn.Module",
    image: "Tensor",
    texts: list[list[int]],
    answers: "AnswerVocabulary",
    probabilities: "Probabilities",
) -> None:
    """Print the most probable answers to each question."""
    import json

    import torch

    from scripts.vqa_evaluation import top_answers

    for question, tokens in zip(args.question, texts, strict=True):
        with torch.inference_mode():
            logits = model(image, torch.tensor([tokens], device=image.device))
        top = top_answers(logits[0], answers, args.top, probabilities)
        if args.json:
            print(json.dumps({"question": question, "top": [[answer, round(p, 6)] for answer, p in top]}))
        else:
            print(question)
            print("\n".join(f"{probability:8.1%}  {answer}" for answer, probability in top))


def _caption(
    args: argparse.Namespace, model: "nn.Module", image: "Tensor", tokenizer: "XLMRTokenizer", max_tokens: int
) -> None:
    """Print the best caption that the beam search finds."""
    import json

    import torch

    from models.beit3.decoding import DecodingSettings, generate
    from scripts.beit3_captioning import special_tokens

    settings = DecodingSettings(num_beams=args.num_beams or 3, max_tokens=max_tokens)
    with torch.inference_mode():
        found = generate(model, image, special_tokens(tokenizer), settings)
    caption, score = tokenizer.decode(found.ids[0].tolist()), float(found.scores[0])
    print(json.dumps({"caption": caption, "score": round(score, 6)}) if args.json else caption)


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


def question_tokens(question: str, tokenizer: "SentencePieceTokenizer", max_tokens: int) -> list[int]:
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
