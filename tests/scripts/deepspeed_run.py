"""One short run of the program under DeepSpeed, made once a session for the tests that look at its checkpoints."""

import functools
import json
from pathlib import Path

from tests.helpers import run_program
from tests.scripts.vqa_run import drawn_data, train_flags

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# every weight is partitioned, and what a user's file may hold
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 5e8},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
}


def deepspeed_train(output: Path, *more: str, launcher: tuple[str, ...] = ()) -> str:
    """Train by the launcher's arguments (a plain process without); what the program says."""
    flags = train_flags(output, "--log_every", "1", *more)
    result = run_program(*launcher, "run_beit3_finetuning.py", *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@functools.cache
def stage_3_run() -> tuple[Path, str]:
    """Output folder and words of two steps of ZeRO 3 in two processes; 67 validation questions, so unevenly shared."""
    folder = drawn_data().parent
    config, output = folder / "ds.json", folder / "stage3"
    config.write_text(json.dumps(CONFIG))
    more = ("--deepspeed_config", str(config), "--model_ema", "--drop_path", "0.1", "--checkpoint_activations")
    more += ("--max_steps", "2", "--eval_batch_size", "1")
    return output, deepspeed_train(output, *more, launcher=TORCHRUN)
