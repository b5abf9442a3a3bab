"""Trains the base model and the adapters; one file per finished run, so that nothing is ever done twice."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..harness import now, read_json, scrub, write_json
from ..rows import where
from .data import blocks, example
from .methods import Method, parameter_groups, put_on
from .settings import Base, Settings


class OtherSettings(Exception):
    """The directory holds results that were not made with these settings."""


def _refuse_others(file: Path, found: dict, wanted: dict) -> None:
    if found != wanted:
        keys = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
        changes = "; ".join(f"{k}: {found.get(k)} there, {wanted.get(k)} now" for k in keys)
        raise OtherSettings(
            f"{file.parent.name}/{file.name} must be of the settings of this run, got others ({changes}). "
            "Choose another directory, or delete that file to have it made again."
        )


@contextmanager
def quiet_threads(count: int) -> Iterator[None]:
    """``count`` threads, and none of the warnings of the packages involved."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)


def optimise(model: nn.Module, data: Tensor, groups: list[dict], steps: int, batch: int, seed: int, bar=None) -> None:
    """AdamW, linear schedule, warm-up 0.03: the paper's recipe. The batches depend on ``seed`` alone."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, int(0.03 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for group in groups for p in group["params"]]
    model.train()
    for _ in range(steps):
        rows = data[torch.randint(len(data), (batch,), generator=generator)]
        model(input_ids=rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if bar is not None:
            bar.update()
    model.eval()


# ------------------------------------------------------------------------------------------------ the base model


def new_model(base: Base) -> nn.Module:
    """A Llama, or a Qwen3-MoE."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = {
        "vocab_size": base.vocabulary,
        "hidden_size": base.hidden,
        "num_hidden_layers": base.layers,
        "num_attention_heads": base.heads,
        "max_position_embeddings": base.length,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    if not base.experts:
        return LlamaForCausalLM(LlamaConfig(**options, intermediate_size=base.intermediate))
    mixture = {"num_experts": base.experts, "num_experts_per_tok": base.choices, "norm_topk_prob": True}
    heads = {"num_key_value_heads": base.heads, "head_dim": base.hidden // base.heads}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, **mixture, **heads, moe_intermediate_size=base.intermediate))


def _origin(base: Base) -> dict[str, object]:
    """What the base model depends on; the texts are those of a version of Python."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "tokenizers")}
    return {**asdict(base), "python": platform.python_version(), **versions}


def prepare(out: Path, base: Base, threads: int) -> Path:
    """Texts and base model, in one file; made when it is not there."""
    file = out / "base.pt"
    if file.exists():
        _refuse_others(file, json.loads(torch.load(file)["origin"]), _origin(base))
        return file
    out.mkdir(parents=True, exist_ok=True)
    with quiet_threads(threads):
        data = blocks(base)
        torch.manual_seed(base.seed)
        model = new_model(base)
        # The balancing loss of a mixture of experts, while its router learns.
        model.config.output_router_logits = bool(base.experts)
        with tqdm(total=base.steps, desc="base model", unit="step", dynamic_ncols=True) as bar:
            groups = [{"params": list(model.parameters()), "lr": base.lr}]
            optimise(model, data["base"], groups, base.steps, base.batch, base.seed, bar)
        model.config.output_router_logits = False
        losses = {split: example().evaluate(model, data[split], 32) for split in ("validation", "test")}
    state = model.state_dict()
    digest = hashlib.sha256()
    for tensor in [*state.values(), *data.values()]:
        digest.update(tensor.numpy().tobytes())
    content = {"state": state, "blocks": data, "losses": losses, "digest": digest.hexdigest()[:16]}
    temporary = file.with_name(file.name + ".part")
    torch.save({**content, "origin": json.dumps(_origin(base))}, temporary)
    temporary.replace(file)
    return file


# ------------------------------------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Job:
    """One training run: a line of runs.csv, or of tuning.csv with split "validation"."""

    method: Method
    lr: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        return f"{self.method.name}-seed{self.seed}" + (f"-lr{self.lr:g}" if self.split == "validation" else "")


def origin(s: Settings, job: Job, base: dict) -> dict[str, object]:
    """What a run's result depends on. Not how many seeds there are: more of them may be added."""
    method = {"kind": job.method.kind, "options": job.method.options}
    settings = {"base": base["digest"], "steps": s.steps, "batch": s.batch, "alpha": s.alpha}
    return settings | method | {"lr": job.lr, "seed": job.seed, "split": job.split}


def run_job(s: Settings, job: Job, base: dict) -> dict:
    """The row of a run: the same, but for its time, wherever and whenever it runs."""
    start = time.perf_counter()
    with quiet_threads(1):
        model = new_model(s.base)
        model.load_state_dict(base["state"])
        torch.manual_seed(job.seed)
        model = put_on(model, job.method, s, job.seed)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        optimise(model, base["blocks"]["training"], parameter_groups(model, job.lr), s.steps, s.batch, job.seed)
        loss = example().evaluate(model, base["blocks"][job.split], 32)
    return {
        "method": job.method.name,
        "label": job.method.label,
        "family": job.method.family,
        "seed": job.seed,
        "lr": job.lr,
        "split": job.split,
        "trainable": trainable,
        "of_budget": round(trainable / s.budget, 4),
        "base_loss": base["losses"][job.split],
        "loss": loss,
        "seconds": round(time.perf_counter() - start, 1),
    }


# ------------------------------------------------------------------------------------------------ all runs


_base: dict = {}  # a worker's own
_where: dict = {}


def _start_worker(base_file: Path) -> None:
    logging.disable(logging.WARNING)  # packages about themselves, across the progress bar
    _base.update(torch.load(base_file))
    _where.update(where() | {"threads": 1})


def _work(s: Settings, job: Job) -> dict:
    return scrub(run_job(s, job, _base) | _where | {"date": now()})


def finished(s: Settings, jobs: Sequence[Job], folder: Path, base: dict) -> dict[str, dict]:
    """The rows that are there, by the job's name. OtherSettings when one is of something else."""
    done = {}
    for job in jobs:
        file = folder / f"{job.name}.json"
        if (content := read_json(file)) is not None:
            _refuse_others(file, content["origin"], json.loads(json.dumps(origin(s, job, base))))
            done[job.name] = content["row"]
    return done


def _fresh(s: Settings, jobs: Sequence[Job], base_file: Path, workers: int) -> Iterator[tuple[Job, dict]]:
    if not workers:  # in this process: for tests and debuggers
        _start_worker(base_file)
        try:
            for job in jobs:
                yield job, _work(s, job)
        finally:
            logging.disable(logging.NOTSET)
        return
    # Before the workers import torch; a pool of threads per worker would fight for the cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (base_file,))
    try:
        futures = {pool.submit(_work, s, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(s: Settings, jobs: Sequence[Job], out: Path, folder: str, workers: int) -> list[dict]:
    """The rows of all jobs in their order; trains those that ``out/folder`` lacks."""
    base_file = prepare(out, s.base, max(1, workers))
    base = torch.load(base_file)
    (out / folder).mkdir(exist_ok=True)
    done = finished(s, jobs, out / folder, base)
    todo = [job for job in jobs if job.name not in done]
    with tqdm(total=len(jobs), initial=len(done), desc=folder, unit="run", dynamic_ncols=True) as bar:
        for job, row in _fresh(s, todo, base_file, workers) if todo else ():
            write_json(out / folder / f"{job.name}.json", {"origin": origin(s, job, base), "row": row})
            done[job.name] = row
            bar.set_postfix_str(f"{job.name} {row['loss']:.3f}", refresh=False)
            bar.update()
    return [done[job.name] for job in jobs]


def write_csv(file: Path, rows: Sequence[dict]) -> None:
    """All or nothing."""
    temporary = file.with_name(file.name + ".part")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(file)
