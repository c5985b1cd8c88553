"""LLaVA from folders, whose kind is told by what is in them and never by their name.

Kinds: LLaVA's own layout, that of transformers, a plain Llama that gets a projector and CLIP's tower, an adapter of
LLaVA's code or of peft over transformers' model, with its base. Weights are streamed into a model without
memory, so that little more than the model is held.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data.clip_images import CONFIG_FILE as IMAGE_FILE
from data.clip_images import CLIPImageSettings
from data.errors import DataError
from data.files import read_object
from data.tokenizers.llama import MODEL_FILE, LlamaTokenizer
from engine.log import say
from engine.weights import read_state_dict, stream_weights
from models.clip_vision import CLIPVisionConfig
from models.errors import ModelError
from models.llava.adapters import AdapterWeights, place_adapters
from models.llava.config import LlavaConfig
from models.llava.llava import LlavaForCausalLM
from models.llava.loading import TOWER, load_stream, missing_weights, start_projector
from models.lora import LoRAConfig
from scripts.llava_kinds import ADAPTER_CONFIG, PROJECTOR_FILE, is_adapter, is_projector

CONFIG_FILE = "config.json"
REST_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TOWER_SIZES = "mm_vision_config"  # our own key beside the original's
PROJECTOR = "mm_projector."
LLAVA, TRANSFORMERS, PLAIN = "llava", "transformers", "llama"
# what tiles of LLaVA-1.6 are replaced by: with them its models are fine-tuned and asked as those of 1.5
_WHOLE_IMAGES = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# of all weights, or what says it of the name of each; None: that of the file
Precision = torch.dtype | Callable[[str], torch.dtype | None] | None


@dataclass(frozen=True)
class LlavaFolder:
    """A model and all that belongs to it.

    Attributes:
        model: in evaluation mode; of an adapter's folder with the adapters in it, not merged.
        values: ``config.json`` in LLaVA's own layout, whatever the folder's.
        vision: sizes of the whole tower.
        images: how images are prepared; ``image_aspect_ratio`` in ``values`` says how they become square.
        tokenizer: of the folder or the adapter's base.
        tokenizer_folder: where its files lie.
        adapter: rank and scale, if the folder holds an adapter.
        layout: ``llava``, ``transformers`` or ``llama`` (no projector of its own); of an adapter or a projector that of
            its base, but a language model with a projector that was trained is ``llava``.
    """

    model: LlavaForCausalLM
    values: dict[str, Any]
    vision: CLIPVisionConfig
    images: CLIPImageSettings
    tokenizer: LlamaTokenizer
    tokenizer_folder: Path
    adapter: LoRAConfig | None
    layout: str


@dataclass(frozen=True)
class _Plan:
    """Where everything is, before any weight has been read; ``tower`` None: the weights are in the checkpoint."""

    weights: Path
    layout: str
    values: dict[str, Any]
    config: LlavaConfig
    vision: CLIPVisionConfig
    images: CLIPImageSettings
    tower: Path | None


def read_llava_folder(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    new_projector: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: str | Path | None = None,
    dtype: Precision,
    device: torch.device | str = "cpu",
) -> LlavaFolder:
    """Read a model folder of any kind.

    Args:
        path: of the folder.
        base: of an adapter, None takes the one that it names, as given or beside the adapter; or of a projector that
            was trained alone, which needs one.
        vision_tower: folder of CLIP; None takes the one that the config names, as given or beside the model. Of a model
            that brings its tower's weights it can only be the one that the config names, for sizes and images.
        projector: weights (``mm_projector.bin`` or a folder that holds it) that replace those of the folder.
        new_projector: keys of LLaVA's config for a plain language model, which has none, such as
            ``mm_projector_type``; ``projector`` must be of this type.
        tokenizer: folder or sentencepiece file in place of the folder's.
        dtype: of the weights, not of adapters, which stay float32; a function says it of the name of each weight;
            None: that of the files.
        device: of the model.

    Raises:
        DataError: a file is missing or broken.
        EngineError: a weight file or shard is missing, broken or unsafe.
        ModelError: weights are missing or of other sizes, or the config asks for what is not implemented.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no model folder at {path}: give the folder that holds config.json")
    adapter, brought, source, overriding = None, None, path, None
    if is_adapter(path):
        adapter, brought = read_adapter(path)
        overriding = None if brought.of_transformers else _adapter_values(path)
        source = _base_of(path, adapter.base_model_name_or_path, base)
    elif base is not None and is_projector(path):
        overriding, projector = read_object(path / CONFIG_FILE), path
        source = _base_of(path, overriding.get("_name_or_path"), base)
    elif base is not None:
        raise DataError(f"{path} has no {ADAPTER_CONFIG}, so it takes no base: leave the base out or give an adapter")
    _refuse_a_projector(source)
    plan = _plan(source, overriding, path, vision_tower, new_projector)
    tokens, tokenizer_folder = _tokenizer(tokenizer, (source, path), plan.config.text.vocab_size)
    with torch.device("meta"):
        model = LlavaForCausalLM(plan.config, plan.vision).eval()
    skip = (TOWER,) if plan.tower else ()
    # what others bring is perhaps more precise than the base's
    if overriding is not None or projector is not None:
        skip += (f"model.{PROJECTOR}",)
    if brought is not None:
        skip += brought.replaced
    padded = plan.layout == TRANSFORMERS
    load_stream(model, stream_weights(plan.weights), dtype=dtype, skip=skip, padded_tables=padded)
    if plan.tower:
        load_stream(model, stream_weights(plan.tower), dtype=dtype)
    if plan.config.text.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # two since loading
    if projector is not None:
        load_stream(model, _projector_weights(Path(projector)), dtype=dtype)
        if missing := [name for name in missing_weights(model) if PROJECTOR in name]:
            kind = plan.config.mm_projector_type
            raise ModelError(f"{projector} lacks {missing[0]} of a projector {kind}: give a whole one of this type")
    if adapter is not None and overriding is not None and _has_projector(model):
        load_stream(model, read_rest(path / REST_FILE).items(), dtype=dtype)
    if brought is not None:
        load_stream(model, brought.whole.items(), dtype=dtype, padded_tables=True)
    _fill_or_refuse(model, plan, is_adapter=adapter is not None, dtype=dtype)
    values = plan.values
    if adapter is not None and brought is not None:
        place_adapters(model, adapter, brought)
        if brought.has_tower:
            values = values | {"unfreeze_mm_vision_tower": True}  # a merged model brings its own tower
        for name, parameter in model.named_parameters():  # what the original trains, and what belongs to an adapter
            parameter.requires_grad_(".lora_" in name or PROJECTOR in name)
    model = model.to(device).eval()
    layout = LLAVA if plan.layout == PLAIN and projector == path else plan.layout
    return LlavaFolder(model, values, plan.vision, plan.images, tokens, tokenizer_folder, adapter, layout)


def _plan(
    source: Path,
    overriding: dict[str, Any] | None,
    near: Path,
    tower: str | Path | None,
    new_projector: Mapping[str, Any],
) -> _Plan:
    """Decide by content what the folder is, and where its tower comes from."""
    where = source / CONFIG_FILE
    values = read_object(where, advice="it comes with the weights")
    if "text_config" in values:
        config = LlavaConfig.from_hf(values, str(where))
        vision = CLIPVisionConfig.from_dict(values.get("vision_config") or {}, f"{where}: vision_config")
        values = _values_of(config)
        if overriding is not None:
            _need_equal_sizes(overriding, values, near, source)
            values = _with_whole_images(overriding, near / CONFIG_FILE)
            config = LlavaConfig.from_dict(values, str(near / CONFIG_FILE))
        _refuse_other_tower(tower, values, source)
        return _Plan(source, TRANSFORMERS, values, config, vision, _images(vision, source), None)
    layout = LLAVA if any(key.startswith("mm_") for key in values) else PLAIN
    from_checkpoint = values.get("unfreeze_mm_vision_tower") is True
    if overriding is not None:
        _need_equal_sizes(overriding, values, near, source)
        values, where = overriding, near / CONFIG_FILE
        from_checkpoint |= values.get("unfreeze_mm_vision_tower") is True
    if from_checkpoint:
        _refuse_other_tower(tower, values, source)
    values = _with_whole_images(values, where)
    named = tower or values.get("mm_vision_tower") or values.get("vision_tower")
    if not named:
        raise DataError(f"{source} is a language model without an image tower: give CLIP's folder as --vision_tower")
    folder = _find_folder(str(named), (source, near))
    if folder is None and isinstance(values.get(TOWER_SIZES), dict) and tower is None:
        vision, from_checkpoint = CLIPVisionConfig.from_dict(values[TOWER_SIZES], f"{where}: {TOWER_SIZES}"), True
    elif folder is None:
        raise DataError(f"no image tower at {named}, nor beside {source}: download it and give it as --vision_tower")
    else:
        vision = CLIPVisionConfig.from_dict(read_object(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    if layout == PLAIN and overriding is None:
        values = values | {
            "mm_vision_tower": str(named),
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad",
            **new_projector,
        }
    config = LlavaConfig.from_dict(values, str(where))
    images = _images(vision, *((folder,) if folder else ()), source)
    return _Plan(source, layout, values, config, vision, images, None if from_checkpoint else folder)


def _with_whole_images(values: dict[str, Any], where: Path) -> dict[str, Any]:
    """LLaVA-1.6 cuts images into tiles, which are not implemented here: its settings as those of 1.5."""
    asked = {key: values[key] for key in _WHOLE_IMAGES if values.get(key) is not None}
    merged, ratio = asked.get("mm_patch_merge_type", "flat"), asked.get("image_aspect_ratio", "pad")
    if merged == "flat" and not str(ratio).startswith("anyres"):
        return values
    said = ", ".join(f"{key} {value!r:.40}" for key, value in asked.items())
    say(
        f"warning: {where} asks for tiles of LLaVA-1.6 ({said}), which are not implemented here: every image is taken "
        "whole, as in LLaVA-1.5 (pad, flat)"
    )
    return values | _WHOLE_IMAGES


def _refuse_other_tower(given: str | Path | None, values: Mapping[str, Any], source: Path) -> None:
    """Weights of a tower that were fine-tuned with the model, or lie in one file with it, must not be replaced."""
    named = values.get("mm_vision_tower") or values.get("vision_tower")
    if given is not None and not (named and _is_called(Path(given), str(named))):
        raise ModelError(
            f"{source} brings its own image tower, so {given} would not be used: leave --vision_tower out"
            + (f" or give {named}" if named else "")
        )


def _is_called(path: Path, name: str) -> bool:
    """Whether a folder has the last part of this name, itself or what it is a link to."""
    return Path(name).name in (Path(os.path.abspath(path)).name, path.resolve().name)


def _refuse_a_projector(path: Path) -> None:
    if is_projector(path):
        raise DataError(
            f"{path} holds a projector ({PROJECTOR_FILE}), no model: train on with it by --pretrain_mm_mlp_adapter "
            f"{path}, or ask it with the folder of its model as --model-base"
        )


def _fill_or_refuse(model: LlavaForCausalLM, plan: _Plan, *, is_adapter: bool, dtype: Precision) -> None:
    missing = missing_weights(model)
    if plan.layout == PLAIN and not is_adapter and missing and all(PROJECTOR in name for name in missing):
        if len(missing) < len(list(model.model.mm_projector.parameters())):
            raise ModelError(f"the projector's weights lack {missing[0]}: give a whole one of the type it has")
        chosen = dtype(missing[0]) if callable(dtype) else dtype
        start_projector(model, chosen or model.lm_head.weight.dtype)
        say(f"{plan.weights} has no projector: a new one, which must be trained")
        return
    if missing:
        source = plan.tower if plan.tower and missing[0].startswith(TOWER) else plan.weights
        raise ModelError(f"{source} lacks {len(missing)} weights, the first: {missing[0]}; download it again")


def _adapter_values(path: Path) -> dict[str, Any]:
    advice = "folders of checkpoints within a run of the original lack it; give the folder of its end, which has it"
    values = read_object(path / CONFIG_FILE, advice=advice)
    if not (path / REST_FILE).exists() and values.get("mm_projector_type") != "identity":
        raise DataError(f"{path} has no {REST_FILE}, which holds the trained projector: {advice}")
    return values


def _adapter_file(path: Path) -> Path:
    for name in ADAPTER_FILES:
        if (path / name).exists():
            return path / name
    raise DataError(f"{path} has {ADAPTER_CONFIG} but none of {', '.join(ADAPTER_FILES)}: copy it whole")


def _base_of(path: Path, named: str | None, given: str | Path | None) -> Path:
    """The base's folder; another one than adapter or projector were trained on would load and answer badly."""
    if given is None:
        found = _find_folder(named, (path,)) if named else None
        if found is None:
            raise DataError(f"{path} is an adapter of {named or 'an unnamed model'}: give its folder as --model-base")
    else:
        found = Path(given)
        if not found.is_dir():
            raise DataError(f"no model folder at {found}: give the folder of {named or 'the base'} as --model-base")
        if named and not _is_called(found, named):
            say(f"warning: {path} was trained on {named}, not on {found}: answers may be bad")
    if is_adapter(found):
        raise DataError(f"the base {found} is an adapter itself: merge it first (scripts/merge_lora_weights.py)")
    return found


def _need_equal_sizes(own: Mapping[str, Any], base: Mapping[str, Any], path: Path, source: Path) -> None:
    for key in _SIZES:
        if key in own and key in base and own[key] != base[key]:
            raise ModelError(f"{path} is for a base of {key} {own[key]}, {source} has {base[key]}: give its own base")


def _find_folder(name: str, near: Sequence[Path]) -> Path | None:
    """A folder by its name: as given, then beside others, there also by its last part (``openai/clip`` as ``clip``)."""
    places = [Path(name)]
    for folder in near:
        beside = folder.resolve().parent
        places += [beside / name, beside / Path(name).name]
    return next((place for place in places if place.is_dir()), None)


def _images(vision: CLIPVisionConfig, *folders: Path) -> CLIPImageSettings:
    for folder in folders:
        if (folder / IMAGE_FILE).exists():
            settings = CLIPImageSettings.load(folder / IMAGE_FILE)
            if settings.crop_size != (vision.image_size, vision.image_size):
                raise DataError(
                    f"{folder / IMAGE_FILE}: crop_size {settings.crop_size}, the tower takes {vision.image_size}: "
                    "give both files of one tower"
                )
            return settings
    return CLIPImageSettings().resized(vision.image_size)


def _tokenizer(given: str | Path | None, folders: Sequence[Path], rows: int) -> tuple[LlamaTokenizer, Path]:
    """The tokenizer, without added tokens if the table has no rows for them (<image> of transformers' folders)."""
    place = Path(given) if given else next((f for f in folders if (f / MODEL_FILE).exists()), folders[0])
    tokens = LlamaTokenizer.load(place)
    model_file = place / MODEL_FILE if place.is_dir() else place
    if tokens.vocab_size > rows:
        tokens = LlamaTokenizer(model_file, legacy=tokens.legacy)
    if tokens.vocab_size > rows:
        raise ModelError(f"{model_file} has {tokens.vocab_size} pieces, the model {rows} rows: give its own tokenizer")
    return tokens, model_file.parent


def read_adapter(path: Path) -> tuple[LoRAConfig, AdapterWeights]:
    """The two files of an adapter's folder that peft knows; errors as ``read_llava_folder``."""
    where = path / ADAPTER_CONFIG
    config = LoRAConfig.from_dict(read_object(where), str(where))
    return config, AdapterWeights.parse(read_state_dict(_adapter_file(path)))


def read_rest(path: Path) -> dict[str, Tensor]:
    """What an adapter brings beside itself; by the original's rule its names have one prefix of peft's or both."""
    state = {name.removeprefix("base_model."): value for name, value in read_state_dict(path).items()}
    if any(name.startswith("model.model.") for name in state):
        state = {name.removeprefix("model."): value for name, value in state.items()}
    return state


def _projector_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    path = path / PROJECTOR_FILE if (path / PROJECTOR_FILE).exists() else path
    for name, value in read_state_dict(path).items():
        _, found, rest = name.partition(PROJECTOR)
        if not found:
            raise ModelError(f"{path} holds {name}, which is no weight of a projector: give mm_projector.bin")
        yield f"model.{PROJECTOR}{rest}", value


def _has_projector(model: LlavaForCausalLM) -> bool:
    return any(True for _ in model.model.mm_projector.parameters())


def _values_of(config: LlavaConfig) -> dict[str, Any]:
    """``config.json`` of LLaVA's layout for a model that came in another."""
    text = asdict(config.text)
    factor = text.pop("rope_factor")
    return text | {
        "hidden_act": "silu",
        "rope_scaling": None if factor == 1 else {"type": "linear", "factor": factor},
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": config.mm_hidden_size,
        "mm_projector_type": config.mm_projector_type,
        "mm_vision_select_layer": config.mm_vision_select_layer,
        "mm_vision_select_feature": config.mm_vision_select_feature,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        # the tower's weights are in the folder, whatever else is at hand
        "unfreeze_mm_vision_tower": True,
    }
