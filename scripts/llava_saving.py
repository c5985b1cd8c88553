"""LLaVA to folders: a full model in shards with an index, or an adapter in peft's files; whole or not at all.

Deliberate differences of saved full models: layers of the tower that nobody looks at are not in them; ``config.json``
has the sizes of the tower (``mm_vision_config``), so that they also load where the tower's folder is not at hand.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.clip_images import CONFIG_FILE as IMAGE_FILE
from data.errors import DataError
from data.files import write_json_atomic
from data.tokenizers.llama import ADDED_FILE, MODEL_FILE, LlamaTokenizer
from data.tokenizers.llama import CONFIG_FILE as TOKENIZER_FILE
from engine.backend import WeightsFormat, trained_names
from engine.errors import RunError
from engine.weights import read_state_dict
from engine.whole_files import WRITE_ERRORS, write_whole
from engine.write_failures import could_not_write, why_not_written
from models.errors import ModelError
from models.lora import PEFT_PREFIX, LoRAConfig, adapter_state, plain_names
from scripts.llava_folder import ADAPTER_FILES, CONFIG_FILE, PROJECTOR, REST_FILE, TOWER_SIZES, LlavaFolder
from scripts.llava_kinds import ADAPTER_CONFIG, PROJECTOR_FILE

GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
MAX_SHARD_BYTES = 5 * 10**9
MIN_LINKED_BYTES = 64 << 20  # of a result's file that shares its bytes with the checkpoint's
_MODEL_FILES = (
    *(CONFIG_FILE, "generation_config.json", IMAGE_FILE, MODEL_FILE, TOKENIZER_FILE, ADDED_FILE),
    *("special_tokens_map.json", ADAPTER_CONFIG, REST_FILE, PROJECTOR_FILE),
)
# what a run or an older program left in a config and has no meaning in a saved model
_LEFT_BEHIND = ("_name_or_path", "transformers_version", "quantization_config", "auto_map")


def save_full_model(
    output: str | Path,
    folder: LlavaFolder,
    *,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder of LLaVA's own layout, tower included; it takes its name only when it is whole.

    Args:
        output: folder to write.
        folder: a model without adapters, and what belongs to it.
        dtype: of the weights.
        max_shard_bytes: of one file; a larger tensor has a file of its own.
        overwrite: replace a model folder that is there.

    Raises:
        DataError: the folder exists, or holds other things than a model.
        ModelError: the model has adapters that are not merged.
        RunError: the disk is full or not writable.
    """
    output = Path(output).absolute()
    check_output(output, overwrite=overwrite)
    state = dict(folder.model.state_dict())
    if any(".lora_" in name for name in state):
        raise ModelError("the model has adapters that are not merged: merge them, or save the adapter")
    if folder.model.config.text.tie_word_embeddings:
        del state["lm_head.weight"]
    with _whole_folder(output) as temporary:
        _write_model(temporary, folder, state, dtype, max_shard_bytes)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to write a model where something is.

    Raises:
        DataError: says what is there.
    """
    if output.is_dir() and not any(output.iterdir()):
        return
    if not output.exists():
        return
    if not overwrite:
        raise DataError(f"{output} exists: give another folder, or --overwrite")
    if not (output / CONFIG_FILE).is_file():
        raise DataError(f"{output} is no model folder (no {CONFIG_FILE}), so it is not replaced: give another folder")


def save_for_transformers(output: str | Path, config: LoRAConfig, state: Mapping[str, Tensor]) -> None:
    """Write an adapter that peft loads over transformers' LLaVA; its folder takes its name only when it is whole.

    Args:
        output: folder to write, new or empty.
        config: of the adapter.
        state: by peft's names.

    Raises:
        DataError: the folder holds something.
        RunError: the disk is full or not writable.
    """
    output = Path(output).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"{output} exists: give another folder")
    peer = {
        "base_model_class": "LlavaForConditionalGeneration",
        "parent_library": "transformers.models.llava.modeling_llava",
    }
    tensors = {name: _plain(value) for name, value in state.items()}
    with _whole_folder(output) as temporary:
        write_whole(temporary / ADAPTER_FILES[0], lambda at: save_file(tensors, at, metadata={"format": "pt"}))
        _write_json(temporary / ADAPTER_CONFIG, config.as_dict() | {"task_type": None, "auto_mapping": peer})


def checkpoint_format(folder: LlavaFolder, mode: str) -> WeightsFormat:
    """How the checkpoints of a training run hold the weights, so that each is a folder to be used as it is.

    Args:
        folder: the model in training, on the CPU or a device, not yet divided over processes.
        mode: ``lora``: an adapter's four files; ``projector``: ``mm_projector.bin``; ``full``: a whole model folder,
            with every weight in the precision that it is trained in.
    """
    frozen = {  # of an adapter beside a projector that does not train, which belongs to it all the same
        name: _plain(value)
        for name, value in folder.model.named_parameters()
        if mode == "lora" and PROJECTOR in name and not value.requires_grad
    }
    writers: dict[str, Callable[[Path, Mapping[str, Tensor]], None]] = {
        "lora": lambda target, state: _write_adapter(target, folder, {**frozen, **state}),
        "projector": lambda target, state: _write_projector(target, folder, state),
        "full": lambda target, state: _write_model(target, folder, state, None, MAX_SHARD_BYTES),
    }
    readers = {
        "lora": lambda source: {n: v for n, v in _read_adapter(source).items() if n not in frozen},
        "projector": lambda source: read_state_dict(source / PROJECTOR_FILE),
        "full": read_state_dict,
    }

    def write(state: Mapping[str, Tensor], target: Path) -> None:
        try:
            writers[mode](target, state)
        except SafetensorError as error:  # such as a full disk
            raise OSError(why_not_written(target, error)) from None

    return WeightsFormat(write, readers[mode], with_frozen=mode == "full")


def publish(checkpoint: Path, output: Path) -> None:
    """Put the files of a checkpoint that make a model, without those of its training, into another folder.

    Raises:
        OSError: the disk is full or not writable.
    """
    names = [
        path.name
        for path in checkpoint.iterdir()
        if path.name in _MODEL_FILES or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
    ]
    for name in sorted(names, key=lambda name: (name == ADAPTER_CONFIG, name)):

        def place(at: Path, source: Path = checkpoint / name) -> None:
            # a small one may be edited here, which must not reach into the checkpoint
            if source.stat().st_size < MIN_LINKED_BYTES:
                shutil.copyfile(source, at)
                return
            at.unlink()
            try:
                os.link(source, at)  # the same bytes, once on the disk
            except OSError:
                shutil.copyfile(source, at)

        write_whole(output / name, place)


def _write_adapter(output: Path, folder: LlavaFolder, state: Mapping[str, Tensor]) -> None:
    adapters = {name: _plain(value) for name, value in adapter_state(state).items()}
    trained = trained_names(folder.model)
    rest = {
        PEFT_PREFIX + name: _plain(value)
        for name, value in state.items()
        if ".lora_" not in name and (name in trained or PROJECTOR in name)
    }
    write_whole(output / ADAPTER_FILES[0], lambda at: save_file(adapters, at, metadata={"format": "pt"}))
    if rest:
        write_whole(output / REST_FILE, lambda at: torch.save(rest, at))
    _write_json(output / CONFIG_FILE, folder.values)
    # the last: by this file a folder is an adapter
    _write_json(output / ADAPTER_CONFIG, folder.adapter.as_dict())


def _read_adapter(source: Path) -> dict[str, Tensor]:
    state = read_state_dict(source / ADAPTER_FILES[0])
    if (source / REST_FILE).exists():
        state |= read_state_dict(source / REST_FILE)
    return plain_names(state)


def _write_projector(output: Path, folder: LlavaFolder, state: Mapping[str, Tensor]) -> None:
    torch.save({name: _plain(value) for name, value in state.items()}, output / PROJECTOR_FILE)
    _write_json(output / CONFIG_FILE, folder.values)


def _write_model(
    target: Path, folder: LlavaFolder, state: Mapping[str, Tensor], dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    """Everything of a model's folder; without ``dtype`` every weight in its own."""
    _write_json(target / CONFIG_FILE, _saved_values(folder, dtype or folder.model.lm_head.weight.dtype))
    _write_json(target / "generation_config.json", GENERATION)
    settings = json.loads(folder.images.to_json())
    settings.pop("processor_class", None)
    _write_json(target / IMAGE_FILE, settings)
    _copy_tokenizer(folder, target)
    _write_shards(target, state, dtype, max_shard_bytes)


def _saved_values(folder: LlavaFolder, dtype: torch.dtype) -> dict[str, Any]:
    values = {key: value for key, value in folder.values.items() if key not in _LEFT_BEHIND}
    return values | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
        TOWER_SIZES: asdict(folder.vision) | {"model_type": "clip_vision_model"},
    }


def _copy_tokenizer(folder: LlavaFolder, target: Path) -> None:
    names = [MODEL_FILE, TOKENIZER_FILE, "special_tokens_map.json"]
    source = folder.tokenizer_folder
    added = LlamaTokenizer.load(source).vocab_size
    if added == folder.tokenizer.vocab_size:  # else its added tokens have no rows in this model
        names.append(ADDED_FILE)
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _write_shards(target: Path, state: Mapping[str, Tensor], dtype: torch.dtype | None, limit: int) -> None:
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, value in state.items():
        size = value.numel() * (dtype or value.dtype).itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"

        def save_shard(at: Path, names: list[str] = names) -> None:
            save_file({name: _plain(state[name], dtype) for name in names}, at, metadata={"format": "pt"})

        write_whole(target / file, save_shard)
        places.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(target / "model.safetensors.index.json", index)


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` to write into, which replaces it at the end.

    Raises:
        RunError: the disk is full or not writable; what was there is as it was.
    """
    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _take_name(temporary, output)
    except WRITE_ERRORS as error:
        raise RunError(f"{could_not_write(output, error)}: free some space or check it") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_name(temporary: Path, output: Path) -> None:
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    if output.exists():
        output.replace(old)
    try:
        temporary.replace(output)
    except OSError:
        if old.exists():
            old.replace(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _plain(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    # a copy: pieces of one long tensor would each carry all of it
    return value.detach().to("cpu", dtype or value.dtype).clone().contiguous()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_json_atomic(path, dict(sorted(values.items())), indent=2)
