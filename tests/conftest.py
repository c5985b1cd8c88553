"""The same surroundings for every test: one thread, nothing left over from the shell, GPU tests only with a GPU."""

import os

import pytest

# before torch is imported: the cores are shared by the tests and the processes that they start
os.environ.setdefault("OMP_NUM_THREADS", "1")

# what our programs and launchers read; a test that needs one sets it
READ_BY_PROGRAMS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("NNODES", "NODE_RANK", "NPROC_PER_NODE", "PLAINVL_PRINT", "MODEL", "FINETUNE", "SENTENCEPIECE_MODEL"),
    *("DATA_PATH", "OUTPUT_DIR", "LOG_DIR", "BATCH_SIZE", "SEED"),
)


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name in READ_BY_PROGRAMS or name.startswith(("QUICKSTART_", "SLURM_", "OMPI_COMM_WORLD_")):
            del os.environ[name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
