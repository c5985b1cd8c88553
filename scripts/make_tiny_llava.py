"""Make a tiny LLaVA with random weights and a tokenizer of its own, to train on drawn data in minutes.

python scripts/draw_scenes.py --layout vizwiz --output data
python scripts/make_tiny_llava.py --data data --output tiny_llava

The folder has LLaVA's own layout, image tower included, so that every program for LLaVA reads it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from scripts.arguments import OneLineParser, count, positive_int
from scripts.program import run

if TYPE_CHECKING:
    from models.llava.llava import LlavaForCausalLM

# a name that is no folder: the tower is in the checkpoint
TOWER_NAME = "drawn/clip-vit-tiny"
NUM_BYTES = 256  # pieces of the fallback, beside those of --vocab_size
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
POSITION_STD = 0.2  # of the tower: from random weights, 0.02 leaves it blind to places for long


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument(
        "--data", type=Path, required=True, help="folder of scripts/draw_scenes.py --layout vizwiz, for its words"
    )
    p.add_argument("--output", type=Path, required=True, help="model folder to write")
    p.add_argument("--seed", type=count, default=0, help="of the weights (%(default)s)")
    p.add_argument(
        "--vocab_size",
        type=positive_int,
        default=400,
        help="at most so many pieces beside 256 for bytes; fewer where the texts have no more (%(default)s)",
    )
    p.add_argument("--image_size", type=positive_int, default=96, help="side in pixels (%(default)s)")
    p.add_argument("--patch_size", type=positive_int, default=16, help="side of a patch in pixels (%(default)s)")
    p.add_argument("--vision_width", type=positive_int, default=96, help="of the tower (%(default)s)")
    p.add_argument("--vision_layers", type=positive_int, default=3, help="of the tower, all looked at (%(default)s)")
    p.add_argument("--hidden_size", type=positive_int, default=128, help="of the decoder (%(default)s)")
    p.add_argument("--layers", type=positive_int, default=3, help="of the decoder (%(default)s)")
    p.add_argument("--heads", type=positive_int, default=4, help="of tower and decoder (%(default)s)")
    p.add_argument("--overwrite", action="store_true", help="replace a model folder that exists")
    return p


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer, draw the weights, write the folder."""
    args = build_parser().parse_args(argv)
    from scripts.llava_saving import check_output

    check_output(args.output, overwrite=args.overwrite)
    texts = read_texts(args.data)
    model_file = train_tokenizer(texts, args.vocab_size)

    import torch

    from data.clip_images import CLIPImageSettings
    from data.tokenizers.llama import LlamaTokenizer
    from models.clip_vision import CLIPVisionConfig
    from models.llava.config import LlavaConfig
    from models.llava.llava import LlavaForCausalLM
    from scripts.llava_folder import LlavaFolder
    from scripts.llava_saving import save_full_model

    with tempfile.TemporaryDirectory() as folder:
        tokenizer_folder = Path(folder)
        write_tokenizer(tokenizer_folder, model_file)
        tokenizer = LlamaTokenizer.load(tokenizer_folder)
        vision_values, values = _sizes(args, tokenizer.vocab_size)
        vision = CLIPVisionConfig.from_dict(vision_values, "the flags")
        config = LlavaConfig.from_dict(values, "the flags")
        torch.manual_seed(args.seed)
        model = LlavaForCausalLM(config, vision)
        start_weights(model)
        images = CLIPImageSettings().resized(vision.image_size)
        made = LlavaFolder(model, values, vision, images, tokenizer, tokenizer_folder, None, "llava")
        save_full_model(args.output, made, dtype=torch.float32, overwrite=args.overwrite)
    amounts = [sum(p.numel() for p in part.parameters()) for part in (model.tower, model.model.mm_projector, model)]
    print(
        f"wrote {args.output}: {tokenizer.vocab_size} pieces, {amounts[2]:,} random weights, of these {amounts[0]:,} "
        f"of the tower and {amounts[1]:,} of the projector; {vision.grid**2} rows an image"
    )


def read_texts(data: Path) -> list[str]:
    """What is said in the drawn data and in the template around it, a line each.

    Raises:
        DataError: a file is missing or broken.
    """
    from data.drawn_vizwiz import PRETRAIN_FILE
    from data.llava_conversation import TEMPLATES, Turn, build_prompt
    from data.llava_dataset import read_conversations
    from data.tokenizers.llama import IMAGE_TOKEN
    from data.vizwiz import read_rows, training_file

    if not data.is_dir():
        raise DataError(f"no folder at --data {data}: draw one with scripts/draw_scenes.py --layout vizwiz")
    rows = read_rows(data / "train.json")
    conversations = [sample.turns for sample in read_conversations(data / PRETRAIN_FILE)]
    conversations += [
        tuple((turn["from"], turn["value"]) for turn in entry["conversations"]) for entry in training_file(rows).entries
    ]

    def plain(turns: tuple[Turn, ...]) -> Iterator[Turn]:
        for role, text in turns:
            yield role, (text or "").replace(IMAGE_TOKEN, " ").strip()

    prompts = (build_prompt(list(plain(turns)), TEMPLATES["v1"]) for turns in conversations)
    lines = [line for prompt in prompts for line in prompt.replace(SPECIALS["eos_token"], "\n").splitlines()]
    return [*lines, *(row.question for row in rows)]


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A serialised model with Llama's ids and rules; the same texts give the same bytes.

    Raises:
        DataError: a ``vocab_size`` that cannot hold every character.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size + NUM_BYTES,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].split("] ")[-1]  # without the place in the C++ source
        raise DataError(f"sentencepiece cannot train with --vocab_size {vocab_size}: {reason}") from None
    return model.getvalue()


def write_tokenizer(folder: Path, model_file: bytes) -> None:
    """The files of a Llama tokenizer as LLaVA 1.5 ships them."""
    (folder / "tokenizer.model").write_bytes(model_file)
    settings: dict[str, Any] = SPECIALS | {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    for name, values in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", SPECIALS | {"pad_token": "<unk>"}),
    ):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _sizes(args: argparse.Namespace, vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of the tower's and of the model's ``config.json``."""
    vision = {
        "hidden_size": args.vision_width,
        "intermediate_size": 4 * args.vision_width,
        # the last but one is taken, as in LLaVA 1.5; the last is not even built
        "num_hidden_layers": args.vision_layers + 1,
        "num_attention_heads": args.heads,
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "hidden_act": "quick_gelu",
    }
    values = {
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 11 * args.hidden_size // 4,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_vision_tower": TOWER_NAME,
        "mm_hidden_size": args.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "unfreeze_mm_vision_tower": True,
    }
    return vision, values


def start_weights(model: "LlavaForCausalLM") -> None:
    """Random weights from which so small a model learns fast; torch's global generator draws them."""
    import torch
    from torch import nn

    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5 * 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=POSITION_STD if "position" in name else 0.1)
    with torch.no_grad():
        model.tower.embeddings.class_embedding.normal_(std=POSITION_STD)


if __name__ == "__main__":
    run(main)
