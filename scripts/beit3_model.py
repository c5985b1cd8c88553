"""BEiT-3 from a name, a tokenizer, an answer list and a file of weights; shared by training, evaluation and ask.py."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from data.errors import DataError
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary
from data.vqa_index import ANSWER_FILE
from engine.log import say
from engine.weights import read_state_dict
from models.beit3.config import VOCAB_SIZE, beit3_config
from models.beit3.loading import load_rule, prepare_beit3_state_dict
from models.beit3.tasks import build_beit3
from models.errors import ModelError
from scripts.beit3_checkpoint import checkpoint_folder, read_checkpoint_config
from scripts.pretrained import load_pretrained

_TEXT_ROWS = "beit3.text_embed.weight"
_OUTPUT_LAYER = ("head.3.weight", "head.3.bias")  # one row for each answer


@dataclass(frozen=True)
class ModelChoice:
    """What decides a network's shape and its first weights."""

    name: str
    task: str
    weights: str  # file or folder; empty for random weights
    resume_from: Path | None = None  # checkpoint folder that will give all weights, instead of ``weights``
    answers: AnswerVocabulary | None = None  # of the run; None leaves the weights' own list unchecked
    image_size: int | None = None
    vocab_size: int | None = None  # None: the checkpoint's, else the published one (tiny: the tokenizer's)
    max_tokens: int | None = None  # longest text of the run; None where that is checked elsewhere
    drop_path: float = 0.0
    model_key: str = "model|module"
    model_prefix: str = ""


def build_model(
    choice: ModelChoice, tokenizer: XLMRTokenizer, num_answers: int | None, *, for_training: bool
) -> nn.Module:
    """The network of a task with its weights; says what keeps random start values.

    Args:
        choice: shape and weights.
        tokenizer: of the text that the model will read.
        num_answers: rows of the output layer; None for tasks without.
        for_training: a new output layer is fine; in an evaluation nothing may be missing.

    Raises:
        DataError: the tokenizer has more ids than the model has rows, the weights were trained on other answers, or
            texts may be longer than the model's table of positions.
        EngineError: the weights cannot be read.
        ModelError: unknown name, or weights that do not fit.
    """
    _check_same_model(choice)
    weights = "" if choice.resume_from else choice.weights
    state = read_state_dict(weights, model_key=choice.model_key) if weights else None
    new_output = _is_of_other_answers(choice, for_training=for_training)
    if state is not None and new_output:
        state = {name: value for name, value in state.items() if not name.endswith(_OUTPUT_LAYER)}
    vocab_size = choice.vocab_size or _vocab_size(choice, state, tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the sentencepiece model has {tokenizer.vocab_size} ids but the model {vocab_size} rows of text "
            "embedding: give the --sentencepiece_model that belongs to the weights, or another --vocab_size"
        )
    if state is not None and vocab_size - tokenizer.vocab_size > 64:
        say(
            f"warning: the sentencepiece model uses {tokenizer.vocab_size} of {vocab_size} rows of text embedding; "
            "is it the one that belongs to these weights?"
        )
    config = beit3_config(
        choice.name, choice.task, image_size=choice.image_size, drop_path=choice.drop_path, vocab_size=vocab_size
    )
    room = config.max_text_positions - 2
    if choice.max_tokens is not None and choice.max_tokens > room:
        raise DataError(f"--num_max_bpe_tokens {choice.max_tokens}: the model has room for {room} tokens: lower it")
    model = build_beit3(choice.task, config, num_classes=num_answers)
    if choice.resume_from:
        return model
    if state is None:
        say(f"{choice.name}: random weights, no checkpoint given")
        return model
    rows = None if for_training or num_answers is None else _output_rows(state)
    if rows not in (None, num_answers):
        raise DataError(
            f"{choice.weights} was trained on {rows} answers, the answer list has {num_answers}: "
            "give the --answer_list of these weights"
        )
    try:
        state = prepare_beit3_state_dict(state, config, model_prefix=choice.model_prefix)
    except ModelError as error:
        raise ModelError(f"{choice.weights}: {error}") from None
    load_pretrained(model, state, load_rule(choice.task, for_training=for_training), choice.weights)
    return model


def _output_rows(state: dict[str, Tensor]) -> int | None:
    """Number of answers that the weights' own output layer has; None without one."""
    rows = [value.shape[0] for name, value in state.items() if name.endswith(_OUTPUT_LAYER[0]) and value.ndim == 2]
    return rows[0] if rows else None


def _check_same_model(choice: ModelChoice) -> None:
    """Say which model a checkpoint is of before the wrong one is built."""
    saved = read_checkpoint_config(choice.resume_from or "").get("model")
    if saved is not None and saved.removesuffix(f"_{choice.task}") != choice.name.removesuffix(f"_{choice.task}"):
        raise DataError(
            f"cannot resume: {choice.resume_from} is of {saved}, this run is of {choice.name}; give --model {saved}, "
            "or another --output_dir"
        )


def _is_of_other_answers(choice: ModelChoice, *, for_training: bool) -> bool:
    """Whether the weights' own answer list, where they have one beside them, is another than the run's."""
    folder, answers = checkpoint_folder(choice.resume_from or choice.weights), choice.answers
    if answers is None or folder is None or not (folder / ANSWER_FILE).is_file():
        return False
    theirs = AnswerVocabulary.load(folder / ANSWER_FILE)
    if theirs.answers == answers.answers:
        return False
    difference = f"{folder} was trained on another answer list ({len(theirs)} answers there, {len(answers)} here)"
    if choice.resume_from:
        raise DataError(f"cannot resume: {difference}; give its own one, or another --output_dir")
    if not for_training:
        raise DataError(f"{difference}: leave --answer_list out, or give --answer_list {folder / ANSWER_FILE}")
    say(f"warning: {difference}: the output layer starts anew")
    return True


def _vocab_size(choice: ModelChoice, state: dict[str, Tensor] | None, tokenizer: XLMRTokenizer) -> int:
    if choice.resume_from:
        rows_there = read_checkpoint_config(str(choice.resume_from)).get("vocab_size")
        if isinstance(rows_there, int):
            return rows_there
    if state is not None:
        rows = [value.shape[0] for name, value in state.items() if name.endswith(_TEXT_ROWS) and value.ndim == 2]
        if rows:
            return rows[0]
    return tokenizer.vocab_size if "_tiny_" in choice.name else VOCAB_SIZE


def find_answers(answer_list: str | None, weights: str, data_path: str | None) -> AnswerVocabulary | None:
    """Answer list from the flag, else beside the weights, else in the data folder; None if there is none."""
    if answer_list:
        return AnswerVocabulary.load(answer_list)
    folders = [checkpoint_folder(weights), Path(weights) if weights and Path(weights).is_dir() else None]
    folders += [Path(data_path)] if data_path else []
    for folder in folders:
        if folder is not None and (folder / ANSWER_FILE).is_file():
            return AnswerVocabulary.load(folder / ANSWER_FILE)
    return None
