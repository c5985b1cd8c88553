"""BEiT-3 from a name, a tokenizer, an answer list and a file of weights; shared by training, evaluation and ask.py."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.errors import DataError
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary
from engine.log import say
from engine.weights import read_state_dict
from models.beit3.config import VOCAB_SIZE, beit3_config
from models.beit3.loading import load_rule, prepare_beit3_state_dict
from models.beit3.tasks import build_beit3
from models.loading import load_weights

CONFIG_FILE = "config.json"
ANSWER_FILE = "answer2label.txt"
TOKENIZER_FILE = "beit3.spm"
_TEXT_ROWS = "beit3.text_embed.weight"


@dataclass(frozen=True)
class ModelChoice:
    """What decides a network's shape and its first weights."""

    name: str
    task: str
    weights: str  # file or folder; empty for random weights
    image_size: int | None = None
    vocab_size: int | None = None  # None: the checkpoint's, else the published one (tiny: the tokenizer's)
    drop_path: float = 0.0
    checkpoint_activations: bool = False
    model_key: str = "model|module"
    model_prefix: str = ""


def build_model(
    choice: ModelChoice, tokenizer: XLMRTokenizer, num_answers: int | None, *, for_training: bool
) -> nn.Module:
    """The network of a task with its weights; says what keeps random start values.

    Raises:
        DataError: the tokenizer has more ids than the model has rows.
        EngineError: the weights cannot be read.
        ModelError: unknown name, or weights that do not fit.
    """
    state = read_state_dict(choice.weights, model_key=choice.model_key) if choice.weights else None
    vocab_size = choice.vocab_size or _vocab_size(choice, state, tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the sentencepiece model has {tokenizer.vocab_size} ids but the model {vocab_size} rows of text "
            "embedding: "
            "give the --sentencepiece_model that belongs to the weights, or another --vocab_size"
        )
    if state is not None and vocab_size - tokenizer.vocab_size > 64:
        say(
            f"warning: the sentencepiece model uses {tokenizer.vocab_size} of {vocab_size} rows of text embedding; "
            "is it the one that belongs to these weights?"
        )
    config = beit3_config(
        choice.name, choice.task, image_size=choice.image_size, drop_path=choice.drop_path, vocab_size=vocab_size
    )
    model = build_beit3(
        choice.task, config, num_classes=num_answers, checkpoint_activations=choice.checkpoint_activations
    )
    if state is None:
        say(f"{choice.name}: random weights, no checkpoint given")
        return model
    rule = load_rule(choice.task, for_training=for_training)
    report = load_weights(
        model,
        prepare_beit3_state_dict(state, config, model_prefix=choice.model_prefix),
        may_miss=rule.may_miss,
        may_mismatch=rule.may_mismatch,
        may_be_extra=rule.may_be_extra,
    )
    say(f"loaded {len(report.loaded)} weights from {choice.weights}")
    if report.newly_initialised:
        say(f"NEWLY INITIALISED, to be trained: {', '.join(report.newly_initialised)}")
    if report.ignored:
        say(f"not used by this task: {', '.join(report.ignored)}")
    return model


def _vocab_size(choice: ModelChoice, state: dict[str, Tensor] | None, tokenizer: XLMRTokenizer) -> int:
    if state is not None:
        rows = [value.shape[0] for name, value in state.items() if name.endswith(_TEXT_ROWS) and value.ndim == 2]
        if rows:
            return rows[0]
    return tokenizer.vocab_size if "_tiny_" in choice.name else VOCAB_SIZE


def find_answers(answer_list: str | None, weights: str, data_path: str | None) -> AnswerVocabulary | None:
    """Answer list from the flag, else beside the weights, else in the data folder; None if there is none."""
    if answer_list:
        return AnswerVocabulary.load(answer_list)
    folders = [Path(weights)] if weights and Path(weights).is_dir() else []
    folders += [Path(data_path)] if data_path else []
    for folder in folders:
        if (folder / ANSWER_FILE).is_file():
            return AnswerVocabulary.load(folder / ANSWER_FILE)
    return None


def read_checkpoint_config(weights: str) -> dict[str, Any]:
    """What a run wrote about its model into ``config.json`` of a checkpoint folder; empty for any other file."""
    path = Path(weights) / CONFIG_FILE
    if not weights or not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path} is not JSON: restore it, or give the weights file and its flags instead") from None
    if config.get("family") != "beit3":
        raise DataError(f"{path} describes a model of the family {config.get('family')!r}, not beit3")
    return config


def checkpoint_files(
    *, model: nn.Module, name: str, task: str, max_tokens: int, answers: AnswerVocabulary, tokenizer_file: str
) -> dict[str, bytes]:
    """Small files that make a checkpoint folder complete: config, answer list, sentencepiece model."""
    config = {
        "family": "beit3",
        "task": task,
        "model": name,
        "image_size": model.config.image_size,
        "vocab_size": model.config.vocab_size,
        "num_answers": len(answers),
        "num_max_bpe_tokens": max_tokens,
    }
    return {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        ANSWER_FILE: "".join(json.dumps(row) + "\n" for row in answers.rows()).encode(),
        TOKENIZER_FILE: Path(tokenizer_file).read_bytes(),
    }
