"""Where VL-BERT's first weights come from: BERT's file, then VL-BERT's pre-training file, under their own names.

Source: the loading rules of VL-BERT (``load_language_pretrained_model``, ``smart_partial_load_model_state_dict``).

Difference: frozen copies are made once, at the start of a run; a resumed run keeps its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import ModelError
from models.vlbert.vqa import VLBertForVQA

# prefix changes of the published configs: the first that fits a name applies, once
PREFIX_CHANGES = (
    "vlbert.mlm_head.predictions.transform->final_mlp.0",
    "module.vlbert.mlm_head.predictions.transform->module.final_mlp.0",
    "vlbert->vlbert",
    "module.vlbert->module.vlbert",
)
_BERT_PREFIXES = ("bert.", "roberta.")
_OLD_ENDINGS = {"gamma": "weight", "beta": "bias"}
_TABLES = {
    "embeddings.word_embeddings.weight": "vlbert.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "vlbert.position_embeddings.weight",
    "embeddings.LayerNorm.weight": "vlbert.embedding_LayerNorm.weight",
    "embeddings.LayerNorm.bias": "vlbert.embedding_LayerNorm.bias",
}
_TYPES = "embeddings.token_type_embeddings.weight"
_HEAD = "cls.predictions.transform."


@dataclass(frozen=True)
class PartialLoad:
    """Names of the model that got values, and names of the file that have no place in it."""

    loaded: tuple[str, ...]
    skipped: tuple[str, ...]


@torch.no_grad()
def load_bert(model: VLBertForVQA, state: Mapping[str, Tensor]) -> PartialLoad:
    """Take encoder, tables and, for the ``mlm`` classifier, the head's transform from BERT's weights.

    Args:
        model: its frozen copies follow.
        state: content of BERT's ``pytorch_model.bin``; names of before 2019 (gamma, beta) too.

    Raises:
        ModelError: an encoder layer, or the head, is missing from the file, or something has another shape.
    """
    given = {_modern(name): value for name, value in state.items()}
    wanted = {name: value for name, value in model.state_dict().items() if "parallel_" not in name}
    found: dict[str, Tensor] = {}
    for name in wanted:
        if name.startswith("vlbert.encoder."):
            found[name] = _need(given, name.removeprefix("vlbert."), "BERT's weights")
    for there, name in _TABLES.items():
        found[name] = _need(given, there, "BERT's weights")
    if "final_mlp.0.dense.weight" in wanted:
        for ending in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
            found[f"final_mlp.0.{ending}"] = _need(given, _HEAD + ending, "BERT's weights")
    types = _need(given, _TYPES, "BERT's weights")
    table = wanted["vlbert.token_type_embeddings.weight"].clone()
    if types.shape[0] == 1:
        types = types.expand(table.shape[0], -1)
    rows = min(types.shape[0], table.shape[0])
    table[:rows] = types[:rows]
    found["vlbert.token_type_embeddings.weight"] = table
    _assign(model, found)
    model.vlbert.encoder.copy_to_frozen()
    used = {name for name in given if name.startswith(("encoder.", "embeddings.", _HEAD))}
    return PartialLoad(tuple(found), tuple(sorted(given.keys() - used)))


def _modern(name: str) -> str:
    prefix = next((prefix for prefix in _BERT_PREFIXES if name.startswith(prefix)), "")
    *parts, last = name.removeprefix(prefix).split(".")
    return ".".join([*parts, _OLD_ENDINGS.get(last, last)])


def _need(state: Mapping[str, Tensor], name: str, what: str) -> Tensor:
    if name not in state:
        raise ModelError(f"{what} lack {name}: give the file of this size of BERT, with its head for classifier mlm")
    return state[name]


@torch.no_grad()
def load_pretrained(
    model: VLBertForVQA, state: Mapping[str, Tensor], prefix_changes: Sequence[str] = PREFIX_CHANGES
) -> PartialLoad:
    """Take whatever a VL-BERT file has for the model; what it has more is skipped, what it lacks stays.

    Args:
        model: its frozen copies follow.
        state: the file's ``state_dict``.
        prefix_changes: ``old->new`` beginnings of names.

    Raises:
        ModelError: a shape differs, a change is misspelt, or nothing fits.
    """
    changes = [_change(text) for text in prefix_changes]
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    skipped = []
    for name, value in state.items():
        old, new = next(((old, new) for old, new in changes if name.startswith(old)), ("", ""))
        renamed = new + name.removeprefix(old)
        place = next((n for n in (renamed, renamed.removeprefix("module."), f"module.{renamed}") if n in own), None)
        if place is None:
            skipped.append(name)
        else:
            found[place] = value
    if not found:
        examples = ", ".join(list(state)[:3])
        raise ModelError(f"none of the {len(state)} weights, such as {examples}, is VL-BERT's: give a VL-BERT file")
    _assign(model, found)
    model.vlbert.encoder.copy_to_frozen()
    return PartialLoad(tuple(found), tuple(skipped))


def _change(text: str) -> tuple[str, str]:
    old, arrow, new = text.partition("->")
    if not arrow:
        raise ModelError(f"PARTIAL_PRETRAIN_PREFIX_CHANGES: {text!r:.80} must be of the form old->new")
    return old, new


def _assign(model: VLBertForVQA, values: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name, value in values.items():
        if own[name].shape != value.shape:
            raise ModelError(
                f"the checkpoint's {name} is {tuple(value.shape)}, the model's {tuple(own[name].shape)}: give weights "
                "of this size of model"
            )
    for name, value in values.items():
        own[name].copy_(value)


@torch.no_grad()
def classifier_from_words(model: VLBertForVQA, answers: Sequence[Sequence[int]]) -> None:
    """Start each answer's row of the last layer as the mean of its words' embeddings.

    Args:
        model: its last classifier layer has a row an answer.
        answers: word-piece ids of each answer.

    Raises:
        ModelError: an answer without a word piece, or another number of answers than rows.
    """
    last, words = model.final_mlp[-1].weight, model.vlbert.word_embeddings.weight
    if len(answers) != last.shape[0]:
        raise ModelError(f"{len(answers)} answers for a classifier of {last.shape[0]} rows")
    for row, ids in enumerate(answers):
        if not ids:
            raise ModelError(f"answer {row} has no word piece: mend the answer list")
        last[row] = words[list(ids)].mean(dim=0)
