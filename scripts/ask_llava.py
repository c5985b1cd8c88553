"""Free answers of LLaVA to questions about one picture, for ``scripts/ask.py``; folders of every kind.

As in the original's evaluation weights are float16 on CUDA, the adapter is merged first, and the answer is greedy or
the best beam's. The image tower sees the picture once, whatever the number of questions.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.errors import DataError
from data.files import read_json
from scripts.arguments import positive_int
from scripts.llava_kinds import PROJECTOR_FILE, is_adapter, is_projector

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from data.llava_conversation import Template
    from models.llava.generation import Decoding
    from scripts.llava_folder import LlavaFolder

CONV_MODE, MAX_NEW_TOKENS = "vicuna_v1", 128
_OWN_FLAGS = ("model_base", "vision_tower", "conv_mode", "max_new_tokens", "prompt_suffix", "vizwiz_prompt", "dtype")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that have a meaning for LLaVA only; none has a default, so that it is known which were given."""
    group = parser.add_argument_group("for folders of LLaVA")
    group.add_argument(
        "--model_base",
        "--model-base",
        help="folder of its base (default: the one that an adapter names)",
    )
    group.add_argument("--vision_tower", "--vision-tower", help="folder of CLIP (default: the config's)")
    group.add_argument("--conv_mode", "--conv-mode", help=f"conversation template (default: {CONV_MODE}, of LLaVA-1.5)")
    group.add_argument(
        "--max_new_tokens", type=positive_int, help=f"longest answer, in tokens (default: {MAX_NEW_TOKENS})"
    )
    prompt = group.add_mutually_exclusive_group()
    prompt.add_argument("--prompt_suffix", help="text on a new line behind every question")
    prompt.add_argument("--vizwiz_prompt", action="store_true", help="LLaVA's prompt for VizWiz as the suffix")
    group.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the weights (default: float16 on CUDA, else float32)",
    )


def refuse_flags(args: argparse.Namespace) -> None:
    """Raise DataError for a flag of ``add_flags`` that was given with a model of another family."""
    for name in _OWN_FLAGS:
        if getattr(args, name):
            raise DataError(f"--{name} is for folders of LLaVA, {args.checkpoint} is none: leave it out")


def is_llava_folder(checkpoint: str) -> bool:
    """Whether this is an adapter's folder, or one whose ``config.json`` is of LLaVA or of its language model."""
    if is_adapter(Path(checkpoint)):
        return True
    path = Path(checkpoint) / "config.json"
    content = read_json(path) if path.is_file() else None
    if not isinstance(content, dict):
        return False
    kind = str(content.get("model_type"))
    return kind.startswith("llava") or kind == "llama" or any(key.startswith("mm_") for key in content)


def _check_full_folder(args: argparse.Namespace) -> None:
    """Raise DataError for what would take long to find out or be said without our flags."""
    folder = Path(args.checkpoint)
    values = read_json(folder / "config.json")
    if is_projector(folder):
        if not args.model_base:
            raise DataError(
                f"{folder} holds a projector ({PROJECTOR_FILE}), no model: give the folder of its model as --model_base"
            )
        return
    if "text_config" not in values and not any(key.startswith("mm_") for key in values):
        raise DataError(f"{args.checkpoint} is a language model that has learnt no image: give a folder of LLaVA")
    if not args.sentencepiece_model and not (Path(args.checkpoint) / "tokenizer.model").is_file():
        raise DataError(f"{args.checkpoint} has no tokenizer.model: give LLaVA's or Vicuna's as --sentencepiece_model")


def ask_llava(args: argparse.Namespace, picture: "np.ndarray") -> None:
    """Load the folder once and print an answer to each question.

    Raises:
        DataError: a question that cannot be asked, an unknown template, a file that is missing or broken.
        ModelError: weights that do not fit, or settings that are not implemented.
    """
    from data.llava_conversation import TEMPLATES

    if not args.question:
        raise DataError(f"{args.checkpoint} is of a model that answers questions: give --question")
    mode = args.conv_mode or CONV_MODE
    if mode not in TEMPLATES:
        raise DataError(f"--conv_mode must be one of {', '.join(TEMPLATES)}, got {mode!r:.40}")
    prompts = [prompt_of(question, TEMPLATES[mode], _suffix(args)) for question in args.question]
    if not is_adapter(Path(args.checkpoint)):
        _check_full_folder(args)

    import torch

    from engine import distributed
    from models.llava.generation import Decoding
    from scripts.llava_folder import read_llava_folder
    from scripts.llava_inference import inference_dtype, settle_adapters

    device = distributed.init(args.device)
    dtype = inference_dtype(getattr(torch, args.dtype) if args.dtype else None, device)
    folder = read_llava_folder(
        args.checkpoint,
        base=args.model_base,
        vision_tower=args.vision_tower,
        tokenizer=args.sentencepiece_model,
        dtype=dtype,
        device=device,
    )
    settle_adapters(folder.model, dtype)
    decoding = Decoding(max_new_tokens=args.max_new_tokens or MAX_NEW_TOKENS, num_beams=args.num_beams or 1)
    for question, answer in zip(args.question, answers_to(folder, picture, prompts, decoding), strict=True):
        text = json.dumps({"question": question, "answer": answer}) if args.json else f"{question}\n    {answer}"
        print(text, flush=True)


def _suffix(args: argparse.Namespace) -> str:
    from data.tokenizers.llama import IMAGE_TOKEN
    from data.vizwiz import SUFFIX

    if args.vizwiz_prompt:
        return SUFFIX
    if IMAGE_TOKEN in (args.prompt_suffix or ""):
        raise DataError(f"--prompt_suffix contains {IMAGE_TOKEN}, and the picture is put in front by itself")
    return "\n" + args.prompt_suffix.lstrip("\n") if args.prompt_suffix else ""


def prompt_of(question: str, template: "Template", suffix: str) -> str:
    """The conversation up to where the model's answer begins, with the picture in front of the question.

    Raises:
        DataError: an empty question, one that is no text or names the place of a picture; names --question.
    """
    from data.llava_conversation import GPT, HUMAN, build_prompt
    from data.tokenizers.llama import IMAGE_TOKEN

    if not question.strip():
        raise DataError(f"--question {question!r:.80} is empty: give a question in quotes")
    if IMAGE_TOKEN in question:
        raise DataError(f"--question {question!r:.80} contains {IMAGE_TOKEN}: leave it out, the picture is in front")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise DataError(f"--question {question!r:.80} is no proper text: type it again in UTF-8") from None
    return build_prompt([(HUMAN, f"{IMAGE_TOKEN}\n{question}{suffix}"), (GPT, None)], template)


def answers_to(
    folder: "LlavaFolder", picture: "np.ndarray", prompts: list[str], decoding: "Decoding"
) -> "Iterator[str]":
    """Answer one prompt after the other about the same picture.

    Args:
        folder: the model and what belongs to it.
        picture: (H, W, 3) uint8.
        prompts: each with one place for the picture.
        decoding: how words are chosen.

    Yields:
        The model's text, without spaces at its ends.

    Raises:
        DataError: a prompt that leaves no room for the answer.
        RunError: the model gives no finite numbers.
    """
    import torch

    from data.clip_images import normalize
    from data.llava_images import LlavaTransform
    from engine.errors import RunError
    from models.llava.generation import generate

    model, tokenizer = folder.model, folder.tokenizer
    encoded = [tokenizer.encode_with_images(prompt) for prompt in prompts]
    weight = model.lm_head.weight
    image = LlavaTransform(folder.images, folder.values.get("image_aspect_ratio"))(picture)[None].to(weight.device)
    with torch.inference_mode():
        features = model.tower_features(normalize(image, folder.images, weight.dtype))
    room = model.config.text.max_position_embeddings - decoding.max_new_tokens
    room = min(room, model.config.max_length or room)
    for number, ids in enumerate(encoded, start=1):
        length = len(ids) - 1 + model.image_rows
        if length > room:
            raise DataError(
                f"--question: number {number} takes {length} places with the picture, and {room} are left beside the "
                f"{decoding.max_new_tokens} of an answer: ask a shorter one or give a smaller --max_new_tokens"
            )
    for ids in encoded:
        with torch.inference_mode():
            joined = model.join(torch.tensor([ids], device=weight.device), features=features, padding_side="left")
            try:
                words = generate(model, joined, decoding)[0].tolist()
            except FloatingPointError as error:
                raise RunError(
                    f"{error}: the weights may be damaged, or the precision too low: try --dtype bfloat16 or float32"
                ) from None
        yield tokenizer.decode(words).strip()
