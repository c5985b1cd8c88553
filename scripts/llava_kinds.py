"""What a folder of LLaVA is, told by its files; no torch here, so that mistakes answer at once."""

from pathlib import Path

from engine.weight_files import MODEL_FILES

ADAPTER_CONFIG, PROJECTOR_FILE = "adapter_config.json", "mm_projector.bin"


def is_adapter(folder: Path) -> bool:
    """Whether it holds low-rank adapters, which need their base."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_projector(folder: Path) -> bool:
    """Whether it is what a training of the projector alone leaves, with or without DeepSpeed; needs its base."""
    return (folder / PROJECTOR_FILE).is_file() and not any((folder / name).exists() for name in MODEL_FILES)
