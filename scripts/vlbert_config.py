"""The YAML files of VL-BERT: every key, what it may hold, its default, and how files build on each other.

Keys and defaults are the original's (VL-BERT's and its adaptive fork's). Ours is ``EXTENDS``: a file that this one
changes, beside it. Departures: a file without FINETUNE_STRATEGY is ``standard``, and USE_IMDB and ENABLE_CNN_REG_LOSS
are off without being mentioned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.errors import DataError
from scripts.config_checks import Check, list_of, one_of, real, recompute, text, truth, unknown_key, whole

CONFIG_ROOT = Path(__file__).resolve().parent  # cfgs/vqa/… is looked up here as well
EXTENDS = "EXTENDS"
PIXEL_MEANS = [102.9801, 115.9465, 122.7717]


@dataclass(frozen=True)
class Key:
    """One key: its check, its default, what it is."""

    check: Check
    default: Any
    meaning: str


def _only(value: Any, meaning: str = "") -> Key:
    """A key whose other values are not implemented."""
    return Key(one_of(value), value, meaning or "nothing else is implemented")


def _ignored(default: Any = None) -> Key:
    return Key(lambda value: value, default, "without effect")


def _strategy(value: Any) -> str:
    """Any spelling of a strategy's case."""
    fixed = ("standard", "pretrained_frozen", "specific_k", "SpotTune", "SpotTune_Block", "BlockDrop")
    known = {name.lower(): name for name in fixed}
    name = text(value).lower()
    if name in known:
        return known[name]
    if name.startswith("last_") and name.removeprefix("last_").isdigit():
        return name
    raise ValueError(f"{', '.join(fixed)} or last_<k>")


def _boxes(value: Any) -> str:
    """36 is a number in YAML unless it is quoted."""
    return one_of("36", "10-100ada")(str(value))


def _epochs(value: Any) -> str:
    """A text; a single epoch is a number in YAML."""
    return str(value) if type(value) in (int, float) else text(value)


_CLASSIFIER = {
    "CLASSIFIER_TYPE": Key(one_of("mlm", "2fc", "1fc"), "2fc", "head of the network"),
    "CLASSIFIER_HIDDEN_SIZE": Key(whole(1), 1024, "inner width of 2fc"),
    "CLASSIFIER_DROPOUT": Key(real(0, 1), 0.1, "dropout of the head"),
}
_VLBERT = {
    "visual_size": Key(whole(1), 768, "width of region vectors"),
    "hidden_size": Key(whole(1), 768, "width"),
    "num_hidden_layers": Key(whole(1), 12, "layers"),
    "num_attention_heads": Key(whole(1), 12, "heads"),
    "intermediate_size": Key(whole(1), 3072, "width of the feed-forward part"),
    "hidden_act": _only("gelu"),
    "hidden_dropout_prob": Key(real(0, 1), 0.1, "dropout of hidden states"),
    "attention_probs_dropout_prob": Key(real(0, 1), 0.1, "dropout of attention"),
    "max_position_embeddings": Key(whole(8), 512, "positions"),
    "type_vocab_size": Key(whole(3), 3, "segments"),
    "vocab_size": Key(whole(1), 30522, "rows of the word table; vocab.txt may have fewer tokens"),
    "initializer_range": Key(real(0), 0.02, "spread of random weights"),
    "visual_scale_text_init": Key(real(0), 0.0, "gain of the visual input of words at the start"),
    "visual_scale_object_init": Key(real(0), 0.0, "gain of the visual input of regions at the start"),
    "visual_ln": Key(truth, False, "layer norms instead of factors on the visual input"),
    "with_pooler": Key(truth, False, "a pooler, which this task does not use"),
    "FROZEN_LAYERS": Key(list_of(whole(0)), [], "layers that specific_k freezes, from 0"),
    "word_embedding_frozen": _only(False),
    "pos_embedding_frozen": _only(False),
    "position_padding_idx": _only(-1),
    "obj_pos_id_relative": _only(True),
    "object_word_embed_mode": _only(2),
    "input_transform_type": _ignored(1),
    "from_scratch": _ignored(False),
}
_IMAGE = {
    "IMAGE_FEAT_PRECOMPUTED": Key(truth, False, "regions come with features; else a ResNet looks at the image"),
    "IMAGE_NUM_LAYERS": Key(whole(1), 101, "depth of the ResNet: 50, 101 or 152"),
    "IMAGE_C5_DILATED": Key(truth, False, "the last stage is dilated instead of strided"),
    "IMAGE_STRIDE_IN_1x1": Key(truth, False, "stride in the first convolution of a stage"),
    "IMAGE_PRETRAINED": Key(text, "", "beginning of the name of the ResNet's weights file"),
    "IMAGE_PRETRAINED_EPOCH": Key(whole(0), 0, "number in its name: <beginning>-0000.model"),
    "IMAGE_FROZEN_BN": Key(truth, True, "batch norms do not train"),
    "IMAGE_FROZEN_BACKBONE_STAGES": Key(list_of(whole(1)), [1, 2], "parts of the ResNet that do not train"),
    "IMAGE_FINAL_DIM": Key(whole(1), 768, "width of region vectors, equal to visual_size"),
    "PIXEL_MEANS": _only(PIXEL_MEANS),
    "PIXEL_STDS": _only([1.0, 1.0, 1.0]),
    "IMAGE_SEMANTIC": _only(False),
    "OUTPUT_CONV5": _only(False),
    "BLIND": _only(False),
    "ENABLE_CNN_REG_LOSS": _only(False),
    "CNN_LOSS_WEIGHT": _ignored(1.0),
    "ANS_LOSS_WEIGHT": _only(1.0),
    "NO_OBJ_ATTENTION": _only(False),
    "FOR_MASK_VL_MODELING_PRETRAIN": _only(False),
    "LOAD_REL_HEAD": _ignored(),
}
_OPTIMIZER = {
    "OPTIMIZER": Key(one_of("AdamW", "Adam", "SGD"), "AdamW", "optimizer"),
    "CLIP_GRAD_NORM": Key(real(-1), -1, "largest norm of all gradients; 0 or less: any"),
    "LR": Key(real(0), 0.1, "learning rate for one sample: times the samples of a step"),
    "LR_SCHEDULE": Key(one_of("triangle", "step"), "step", "triangle or step"),
    "LR_STEP": Key(_epochs, "", "epochs at which schedule step changes the rate, such as '2,4'"),
    "LR_FACTOR": Key(real(0), 0.1, "what it is multiplied with then"),
    "WD": Key(real(0), 0.0, "weight decay of every parameter"),
    "MOMENTUM": _only(0.9, "of SGD"),
    "WARMUP": Key(truth, False, "whether the rate rises at first"),
    "WARMUP_METHOD": Key(one_of("linear", "constant"), "linear", "rise of schedule step"),
    "WARMUP_FACTOR": Key(real(0, 1), 1 / 3, "first share of the rate in schedule step"),
    "WARMUP_STEPS": Key(whole(0), 1000, "steps of the rise"),
    "LR_MULT": _only([]),
}
_PRETRAINED = {
    "PARTIAL_PRETRAIN": Key(text, "", "VL-BERT weights to begin from"),
    "PARTIAL_PRETRAIN_PREFIX_CHANGES": Key(list_of(text), [], "old->new beginnings of their names"),
    "BERT_MODEL_NAME": Key(text, "", "folder of BERT: vocab.txt, pytorch_model.bin"),
    "BERT_PRETRAINED": Key(text, "", "beginning of the name of other BERT weights"),
    "BERT_PRETRAINED_EPOCH": Key(whole(0), 0, "number in its name: <beginning>-0000.model"),
    "BERT_FROZEN": _only(False),
    "CLASSIFIER_PRETRAINED": Key(truth, False, "answers begin as the mean of their words"),
}


def _without_effect(keys: dict[str, Any]) -> dict[str, Any]:
    return {name: _ignored() for name in keys}


_DATASET_IGNORED = (
    *("LABEL_INDEX_IN_BATCH", "APPEND_INDEX", "TASK", "ROOT_PATH", "CACHE_MODE", "IGNORE_DB_CACHE", "MASK_SIZE"),
)
SCHEMA: dict[str, Any] = {
    "RNG_SEED": Key(whole(0), 12345, "seed of weights, data order, flips, dropout and decisions"),
    "OUTPUT_PATH": Key(text, "", "folder inside the model directory"),
    "LOG_FREQUENT": Key(whole(1), 50, "optimizer steps between log lines"),
    "CHECKPOINT_FREQUENT": Key(whole(1), 1, "epochs between checkpoints"),
    "VAL_FREQUENT": _only(1),
    "NUM_WORKERS_PER_GPU": Key(whole(0), 4, "loader processes per rank"),
    "SCALES": Key(list_of(whole(1), 2), [600, 1000], "shorter side of the image, limit of the longer one"),
    "VERSION": Key(text, "", "name of the run in Weights & Biases"),
    **_without_effect(dict.fromkeys(("MODULE", "POLICY_MODULE", "GPUS", "MODEL_PREFIX"))),
    "FINETUNE_STRATEGY": Key(_strategy, "standard", "see the table of strategies"),
    "REFERENCE_BEHAVIOUR": Key(truth, False, "ours: SpotTune and SpotTune_Block in the published arithmetic"),
    "USE_CONSTRAIN_K_LOSS": Key(truth, False, "hold the mean number of chosen decisions near a number"),
    "CONSTRAIN_K_NUM_BLOCKS": Key(real(0), 4, "that number"),
    "CONSTRAIN_K_SCALE": Key(real(0), 1, "weight of that loss"),
    "USE_DETERMINISTIC_POLICY_LOSS": Key(truth, False, "push each decision to be alike for all samples"),
    "DETERMINISTIC_POLICY_SCALE": Key(real(0), 1, "weight of that loss"),
    "POLICY_GLOBAL_DECISION": Key(truth, False, "validate and predict with what most training samples decided"),
    "DATASET": {
        "DATASET": Key(one_of("vqa", "vqa_cp"), "vqa", "VQA v2 or VQA-CP v2"),
        "DATASET_PATH": Key(text, "./data/coco", "the data folder"),
        "TRAIN_IMAGE_SET": Key(text, "train2014", "image sets joined by +"),
        "VAL_IMAGE_SET": Key(text, "val2014", "image sets joined by +"),
        "TEST_IMAGE_SET": Key(text, "test2015", "image set that vqa/test.py predicts"),
        "ANSWER_VOCAB_FILE": Key(text, "", "an answer a line"),
        "ANSWER_VOCAB_SIZE": Key(whole(0), 3129, "its length; 0: any"),
        "BOXES": Key(_boxes, "36", "which box files: 36 or 10-100ada"),
        "ZIP_MODE": Key(truth, False, "box files and images lie in zip archives"),
        "ADD_IMAGE_AS_A_BOX": _only(True),
        "USE_IMDB": _only(False),
        "TOY": Key(truth, False, "use only the first TOY_SAMPLES of every split"),
        "TOY_SAMPLES": Key(whole(1), 128, "see TOY"),
        **_without_effect(dict.fromkeys(_DATASET_IGNORED)),
    },
    "NETWORK": {
        **_IMAGE,
        **_PRETRAINED,
        **_CLASSIFIER,
        "NO_GROUNDING": Key(truth, False, "words do not see the image"),
        "VLBERT": _VLBERT,
    },
    "POLICY": {
        **_OPTIMIZER,
        **_CLASSIFIER,
        "OUTPUT_SIZE": Key(whole(0), 0, "twice the decisions; 0: whatever the strategy takes"),
        "VLBERT": _VLBERT,
        **_without_effect({**_IMAGE, **_PRETRAINED, "NO_GROUNDING": None, "GRAD_ACCUMULATE_STEPS": None}),
    },
    "TRAIN": {
        **_OPTIMIZER,
        "BATCH_IMAGES": Key(whole(1), 1, "samples per process and micro-batch"),
        "GRAD_ACCUMULATE_STEPS": Key(whole(1), 1, "micro-batches per optimizer step"),
        "END_EPOCH": Key(whole(1), 1, "epochs"),
        "FLIP_PROB": Key(real(0, 1), 0.5, "share of mirrored samples"),
        "SHUFFLE": Key(truth, True, "false: in file order, in contiguous shards"),
        "ASPECT_GROUPING": Key(truth, False, "batches of upright or of wide images, in contiguous shards"),
        "RESUME": Key(truth, False, "go on from the checkpoint of epoch BEGIN_EPOCH - 1"),
        "BEGIN_EPOCH": Key(whole(0), 0, "see RESUME"),
        "AUTO_RESUME": Key(truth, True, "go on from the newest checkpoint"),
        "FP16": Key(truth, False, "half precision on CUDA, as --amp fp16"),
        "RECOMPUTE": Key(recompute, "none", "ours: layers that are computed twice: none, full, every_K or auto"),
        **_without_effect(dict.fromkeys(("FP16_LOSS_SCALE", "LOSS_LOGGERS"))),
    },
    "VAL": {
        "BATCH_IMAGES": Key(whole(1), 1, "samples per process"),
        "FLIP_PROB": _only(0),
        "SHUFFLE": _ignored(False),
    },
    "TEST": {
        "BATCH_IMAGES": Key(whole(1), 1, "samples per process"),
        "FLIP_PROB": _only(0),
        **_without_effect(dict.fromkeys(("SHUFFLE", "TEST_EPOCH"))),
    },
}


def find_config(name: str | Path) -> Path:
    """Path of a config file: as given, or in scripts/; upper and lower case are alike.

    Raises:
        DataError: there is none.
    """
    for root in (Path(), CONFIG_ROOT):
        path = root / name
        if path.is_file():
            return path
        folder = path.parent
        if folder.is_dir():
            for entry in sorted(folder.iterdir()):
                if entry.name.lower() == path.name.lower() and entry.is_file():
                    return entry
    shipped = sorted(str(path.relative_to(CONFIG_ROOT)) for path in CONFIG_ROOT.glob("cfgs/vqa*/*.yaml"))
    raise DataError(f"no config file {name}, neither as given nor in scripts/: such as {', '.join(shipped[:3])}")


def read_config(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every setting: the defaults, what the file extends, the file, the overrides; each checked.

    Args:
        path: a YAML file.
        overrides: ``SECTION.KEY=value``.

    Raises:
        DataError: not YAML, an unknown key, a value of a wrong kind.
    """
    settings = _defaults(SCHEMA)
    for given, place in _layers(path):
        _merge(settings, given, SCHEMA, place, "")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise DataError(f"--set {override!r:.80} must be of the form SECTION.KEY=value")
        nested: Any = _parse(value, f"--set {name}")
        for part in reversed(name.split(".")):
            nested = {part: nested}
        _merge(settings, nested, SCHEMA, "--set", "")
    return settings


def _layers(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """What a file and those that it extends say, the farthest first."""
    chain: list[tuple[dict[str, Any], str]] = []
    seen: set[Path] = set()
    while True:
        if path.resolve() in seen:
            raise DataError(f"{path}: {EXTENDS} leads in a circle")
        seen.add(path.resolve())
        try:
            content = _parse(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as text ({error})") from None
        if not isinstance(content, dict):
            raise DataError(f"{path} must hold settings, KEY: value a line")
        base = content.pop(EXTENDS, None)
        chain.append((content, str(path)))
        if base is None:
            return iter(reversed(chain))
        if not isinstance(base, str) or "/" in base or "\\" in base:
            raise DataError(f"{path}: {EXTENDS} must be the name of a file beside it, got {base!r:.80}")
        if not (path.parent / base).is_file():
            raise DataError(f"{path}: {EXTENDS} names {base}, which is not beside it")
        path = path.parent / base


def _parse(content: str, place: str) -> Any:
    try:
        return yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or "nested too deep"
        raise DataError(f"{place}{line}: not YAML ({reason})") from None


def _defaults(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: entry.default if isinstance(entry, Key) else _defaults(entry) for name, entry in schema.items()}


def _merge(settings: dict[str, Any], given: Any, schema: dict[str, Any], place: str, section: str) -> None:
    if not isinstance(given, dict):
        raise DataError(f"{place}: {section.rstrip('.')} must hold settings, got {given!r:.80}")
    for name, value in given.items():
        full = f"{section}{name}"
        if name not in schema:
            raise DataError(f"{place}: {unknown_key(full, [section + known for known in schema])}")
        entry = schema[name]
        if not isinstance(entry, Key):
            _merge(settings[name], value, entry, place, f"{full}.")
            continue
        try:
            settings[name] = entry.check(value)
        except ValueError as error:
            note = " (nothing else is implemented)" if entry.meaning.startswith("nothing else") else ""
            raise DataError(f"{place}: {full} must be {error}{note}, got {value!r:.80}") from None


# what a checkpoint's numbers depend on beside its weights
_OF_THE_MODEL = (
    *("FINETUNE_STRATEGY", "REFERENCE_BEHAVIOUR", "SCALES", "NETWORK.VLBERT", "NETWORK.NO_GROUNDING"),
    *("NETWORK.CLASSIFIER_TYPE", "NETWORK.IMAGE_FEAT_PRECOMPUTED", "NETWORK.IMAGE_NUM_LAYERS"),
    *("NETWORK.IMAGE_C5_DILATED", "NETWORK.IMAGE_STRIDE_IN_1x1", "POLICY.VLBERT", "POLICY.CLASSIFIER_TYPE"),
)
_MAY_CHANGE = ("dropout", "_init", "initializer_range")


def check_same_model(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on from, or to predict with, a checkpoint of another model than the settings describe.

    Args:
        path: ``config.yaml`` of the checkpoint; nothing is said where there is none.
        settings: of this run.

    Raises:
        DataError: names the first key that differs, and both values.
    """
    if not path.is_file():
        return
    saved = read_config(path)
    has_policy = settings["FINETUNE_STRATEGY"] in ("SpotTune", "SpotTune_Block", "BlockDrop")
    for name in _OF_THE_MODEL:
        if name.startswith("POLICY.") and not has_policy:
            continue
        one, other = (_at(values, name) for values in (saved, settings))
        pairs = [(name, one, other)]
        if isinstance(one, dict):
            pairs = [(f"{name}.{key}", one[key], other[key]) for key in one]
        for key, before, now in pairs:
            listed = key.endswith("FROZEN_LAYERS") and settings["FINETUNE_STRATEGY"] != "specific_k"
            if before != now and not listed and not any(part in key for part in _MAY_CHANGE):
                raise DataError(
                    f"{path.parent} was made with {key} {before}, not {now}: give the settings of that run, or another "
                    "model directory for a new one"
                )


def _at(settings: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        settings = settings[part]
    return settings


def as_yaml(settings: dict[str, Any]) -> bytes:
    """The settings as a file that can be given again."""
    return yaml.safe_dump(settings, sort_keys=False).encode()
