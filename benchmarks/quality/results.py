"""Every run once more, in the structure of a result file of PEFT's method comparison, so that its tools read ours.

What was not measured is None; what PEFT wants as a whole number, and a CPU has not, is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from ..harness import scrub, write_json
from .settings import Base, Settings
from .train import Job, new_model

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
# What Settings.alpha is called, of methods that have it.
_ALPHA = {"mos": "alpha", "shared": "alpha", "lora": "lora_alpha"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _parameters(base: Base) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in new_model(base).parameters())


def result(s: Settings, job: Job, row: dict) -> dict:
    """What PEFT's script would have written of the run that ``row`` is of."""
    date = datetime.strptime(row["date"], "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=timezone.utc)
    system, _, machine = row["platform"].partition(" ")
    samples = s.steps * s.batch
    kind = job.method.kind
    alpha = {_ALPHA[kind]: s.alpha} if kind in _ALPHA else {}
    packages = {f"{name}-{what}": None for name in PACKAGES for what in ("version", "commit-hash")}
    # Today's: where those that train the model differ from the base model's, a row would have been refused.
    packages |= {f"{name}-version": _version(name) for name in PACKAGES}
    packages |= {"torch-version": row["torch"], "peft-version": row["peft"], "mos_ext-commit-hash": row["commit"]}
    train_config = {
        "model_id": "benchmarks.quality",
        "dtype": "float32",
        "max_seq_length": s.base.length,
        "batch_size": s.batch,
        "batch_size_eval": 32,
        "max_steps": s.steps,
        "eval_steps": s.steps,
        "compile": False,
        "use_gc": False,
        "query_template": None,
        "seed": job.seed,
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": job.lr, "weight_decay": 0.0},
        "lr_scheduler": "linear",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }
    targets = {"target_parameters" if s.base.experts else "target_modules": list(s.base.types)}
    content = {
        "run_info": {
            "created_at": date.isoformat(),
            "total_time": row["seconds"],
            "experiment_name": f"{job.method.name}/seed{job.seed}",
            "peft_branch": None,
            "peft_worktree_is_dirty": None,
            "train_config": train_config,
            "peft_config": {"peft_type": kind.upper(), **targets, **job.method.options, **alpha},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": row["seconds"],
            "file_size": 4 * row["trainable"],  # nothing was saved: of float32 tensors, without a header
            "num_trainable_params": row["trainable"],
            "num_total_params": _parameters(s.base) + row["trainable"],
            "status": "success",
            "metrics": [
                {"step": 0, f"{job.split} loss": row["base_loss"]},
                {
                    "step": s.steps,
                    f"{job.split} loss": row["loss"],
                    f"{job.split} accuracy": None,
                    "train loss": None,
                    "train samples": samples,
                    "train total tokens": samples * s.base.length,
                    "forgetting": None,
                },
            ],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": packages,
            "system_info": {
                "system": system,
                "release": None,  # see harness.scrub
                "version": None,
                "machine": machine,
                "processor": row["cpu"],
                "accelerator": row["device"],
            },
            "pytorch_info": torch.__config__.show(),
        },
    }
    return scrub(content)


def write_results(s: Settings, jobs: Sequence[Job], rows: Sequence[dict], folder: Path) -> None:
    """``folder/<method>-seed<seed>.json`` for every run."""
    folder.mkdir(exist_ok=True)
    for job, row in zip(jobs, rows, strict=True):
        write_json(folder / f"{job.name}.json", result(s, job, row))
