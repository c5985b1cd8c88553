"""VL-BERT from a config: network, policy, first weights, checkpoints; shared by training and prediction."""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.errors import DataError
from data.tokenizers.wordpiece import WordPieceTokenizer
from data.vlbert_answers import AnswerList
from engine.errors import EngineError
from engine.log import say
from engine.weights import read_state_dict
from models.adaptive import num_decisions
from models.errors import ModelError
from models.loading import load_weights
from models.vlbert.fast_rcnn import HEAD, FastRCNN, FastRCNNConfig, blocks_of, without_aliases
from models.vlbert.loading import classifier_from_words, load_bert, load_pretrained
from models.vlbert.vlbert import EncoderConfig, VLBertConfig
from models.vlbert.vqa import COUNTS, POLICY, AdaptiveVQA, SpecialIds, VLBertForVQA
from scripts.vlbert_files import (
    ANSWERS,
    BERT_HINT,
    PRETRAINED_HINT,
    VOCABULARY,
    bert_file,
    pretrained_file,
    require_weights,
    resnet_file,
    vocabulary_file,
)

_KEYS = "state_dict|model|module"
_CNN = "image_feature_extractor."


@dataclass(frozen=True)
class Vocabularies:
    """Words and answers of a run."""

    tokenizer: WordPieceTokenizer
    answers: AnswerList

    def files(self) -> dict[str, bytes]:
        """Name → content, as a checkpoint carries them."""
        lists = {VOCABULARY: self.tokenizer.tokens, ANSWERS: self.answers.entries}
        return {name: ("\n".join(entries) + "\n").encode() for name, entries in lists.items()}


def check_same_answers(checkpoint: Path, words: Vocabularies) -> None:
    """A run goes on with the words and answers that its checkpoint carries.

    Raises:
        DataError: another vocabulary or answer list.
    """
    for name, content in words.files().items():
        if (checkpoint / name).is_file() and (checkpoint / name).read_bytes() != content:
            there, here = (checkpoint / name).read_bytes().count(b"\n"), content.count(b"\n")
            raise DataError(
                f"{checkpoint} was trained with another {name} ({there} entries there, {here} here): give the same "
                "data and --build_answers, or another model directory for a new run"
            )


def load_tokenizer(config: dict[str, Any], checkpoint: Path | None = None) -> WordPieceTokenizer:
    """Vocabulary of a checkpoint folder, else of the BERT folder.

    Raises:
        DataError: missing, broken, or with more words than the network has.
    """
    path = vocabulary_file(config, checkpoint)
    tokenizer = WordPieceTokenizer.load(path)
    rows = min(config[part]["VLBERT"]["vocab_size"] for part in ("NETWORK", "POLICY"))
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"{path} has {tokenizer.vocab_size} words, the network {rows} (VLBERT.vocab_size): give the vocabulary of "
            "its weights"
        )
    return tokenizer


def longest_question(config: dict[str, Any]) -> int:
    """Word pieces of a question for which both networks have positions: four special tokens and END come on top."""
    return min(config[part]["VLBERT"]["max_position_embeddings"] for part in ("NETWORK", "POLICY")) - 6


def build_network(
    config: dict[str, Any], num_answers: int, tokenizer: WordPieceTokenizer, *, reference: bool
) -> nn.Module:
    """Network and, where the strategy has one, its policy, with random weights.

    Raises:
        ModelError: sizes or a strategy that do not fit.
    """
    network, policy = config["NETWORK"], config["POLICY"]
    ids = SpecialIds(tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    strategy, sizes = config["FINETUNE_STRATEGY"], network["VLBERT"]
    decisions = num_decisions(strategy, sizes["num_hidden_layers"], sizes["num_attention_heads"])
    common = {"special_ids": ids, "grounding": not network["NO_GROUNDING"]}
    decider = None
    if decisions:
        decider = VLBertForVQA(
            _transformer(policy["VLBERT"], "POLICY"),
            2 * decisions,
            **_classifier(policy),
            **common,
            regions=_regions(config, policy),
        )
    listed = tuple(sizes["FROZEN_LAYERS"]) if strategy == "specific_k" else ()
    transformer = _transformer(sizes, strategy=strategy, frozen_layers=listed, reference_behaviour=reference)
    return AdaptiveVQA(
        transformer,
        num_answers,
        policy=decider,
        global_decision=config["POLICY_GLOBAL_DECISION"],
        **_classifier(network),
        **common,
        regions=_regions(config, network),
    )


def _transformer(sizes: dict[str, Any], section: str = "NETWORK", **encoder: Any) -> VLBertConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("hidden_dropout_prob", "attention_probs_dropout_prob")
    others = ("visual_size", "vocab_size", "max_position_embeddings", "type_vocab_size", "visual_ln", "with_pooler")
    others += ("visual_scale_text_init", "visual_scale_object_init", "initializer_range")
    try:
        layers = EncoderConfig(**{name: sizes[name] for name in names}, **encoder)
    except ModelError as error:
        raise ModelError(f"{section}.VLBERT: {error}") from None
    return VLBertConfig(encoder=layers, **{name: sizes[name] for name in others})


def _classifier(section: dict[str, Any]) -> dict[str, Any]:
    return {
        "classifier": section["CLASSIFIER_TYPE"],
        "classifier_hidden_size": section["CLASSIFIER_HIDDEN_SIZE"],
        "classifier_dropout": section["CLASSIFIER_DROPOUT"],
    }


def _regions(config: dict[str, Any], section: dict[str, Any]) -> nn.Module | None:
    """What looks at the image, as ``NETWORK`` says for both networks; None: features are precomputed."""
    network = config["NETWORK"]
    if network["IMAGE_FEAT_PRECOMPUTED"]:
        return None
    image = FastRCNNConfig(
        blocks=tuple(blocks_of(network["IMAGE_NUM_LAYERS"])),
        stride_in_1x1=network["IMAGE_STRIDE_IN_1x1"],
        dilated=network["IMAGE_C5_DILATED"],
        frozen_batch_norm=network["IMAGE_FROZEN_BN"],
        frozen_stages=tuple(network["IMAGE_FROZEN_BACKBONE_STAGES"]),
    )
    return FastRCNN(section["VLBERT"]["visual_size"], image)


# ---- first weights of a run ----


def load_first_weights(model: nn.Module, args: argparse.Namespace, words: Vocabularies) -> None:
    """ResNet, BERT, VL-BERT, answers, in this order, as the config names them; says what came from where.

    Raises:
        EngineError: a file is missing or broken.
        ModelError: weights that do not fit.
    """
    network = args.config["NETWORK"]
    if not args.from_scratch:
        if not network["IMAGE_FEAT_PRECOMPUTED"]:
            _load_cnn(model, network)
        pretrained = pretrained_file(args)
        _load_bert_file(model, network, required=not pretrained)
        if pretrained:
            _from(
                pretrained,
                PRETRAINED_HINT,
                partial(_load_pretrained_file, model, changes=network["PARTIAL_PRETRAIN_PREFIX_CHANGES"]),
            )
    if network["CLASSIFIER_PRETRAINED"]:
        pieces = [words.tokenizer.encode(answer) for answer in words.answers.answers]
        empty = [words.answers[label] for label, ids in enumerate(pieces) if not ids]
        if empty:
            raise DataError(f"the answer {empty[0]!r} of the answer list has no word piece: mend the list")
        classifier_from_words(model, pieces)


def _load_bert_file(model: nn.Module, network: dict[str, Any], *, required: bool) -> None:
    path = bert_file(network)
    if not path.is_file() and not required:
        say(f"note: no {path}: all weights come from PARTIAL_PRETRAIN")
        return
    _from(path, BERT_HINT, lambda state, _: load_bert(model, state))


def _load_pretrained_file(model: nn.Module, state: dict[str, Tensor], path: str, *, changes: list[str]) -> Any:
    found = load_pretrained(model, without_aliases(state), changes)
    own = {name for name, _ in model.named_parameters() if not name.startswith(POLICY) and "parallel_" not in name}
    missing = sorted(own - set(found.loaded))
    if missing:
        say(f"note: {path} has not: {', '.join(missing[:8])}{', …' * (len(missing) > 8)}")
    return found


def _from(path: str | Path, hint: str, load: Any) -> None:
    require_weights(path, hint)
    try:
        state = read_state_dict(path, model_key=_KEYS)
    except EngineError as error:
        raise EngineError(f"{error}; or start from random weights by --from_scratch") from None
    try:
        found = load(state, str(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    skipped = f", {len(found.skipped)} of its weights have no place" if found.skipped else ""
    say(f"loaded {len(found.loaded)} weights from {path}{skipped}")


def _load_cnn(model: nn.Module, network: dict[str, Any]) -> None:
    """Give ResNet weights to every network that looks at the image."""
    path = resnet_file(network)
    state = read_state_dict(path, model_key=_KEYS)
    backbone = {f"backbone.{name}": value for name, value in state.items()}
    head = {f"{HEAD}{name.removeprefix('layer4.')}": v for name, v in state.items() if name.startswith("layer4.")}
    rules = {
        "may_miss": ("obj_downsample.*", "*.num_batches_tracked"),
        "may_be_extra": ("backbone.fc.*", "backbone.layer4.*"),
    }
    try:
        for part in (model, model.policy):
            if part is not None:
                load_weights(part.image_feature_extractor, {**backbone, **head}, **rules)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    say(f"loaded the ResNet from {path}")


# ---- trained weights ----


def load_trained_weights(model: nn.Module, path: str | Path) -> None:
    """All weights of a checkpoint of ours or of the original, strictly; frozen copies and policy included.

    Raises:
        EngineError: the file is missing or broken.
        ModelError: weights that do not fit, or a policy is missing.
    """
    state = {name.removeprefix("module."): value for name, value in read_state_dict(path, model_key=_KEYS).items()}
    if model.policy is not None and not any(name.startswith(POLICY) for name in state):
        try:
            policy = read_state_dict(path, model_key="policy_state_dict")
        except EngineError:
            policy = {}
        state |= {POLICY + name.removeprefix("module."): value for name, value in policy.items()}
        if not any(name.startswith("policy.vlbert.") for name in state):
            raise ModelError(f"{path} has no policy: it is no checkpoint of a run with this strategy, see --strategy")
    for prefix in (_CNN, POLICY + _CNN):
        state = without_aliases(state, prefix)
    try:
        load_weights(model, state, may_miss=COUNTS)
    except ModelError as error:
        kind = "" if "final_mlp.2.weight" in state else "; it looks like a pre-trained file, not a fine-tuned one"
        raise ModelError(f"{path}: {error}{kind}") from None
    say(f"loaded {len(state)} weights from {path}")
