"""What the two ranks of tests/test_zero.py run under DeepSpeed. Without a stage, one process takes the same steps."""

import contextlib
import os

import distributed_cases as cases
import torch
from torch import distributed, nn

import mos_ext

# ZeRO-3 that keeps nothing: every parameter is partitioned again as soon as its module is done.
NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def deepspeed():
    """Imported by the ranks alone."""
    os.environ.update(DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # a collective that would be compiled here; gloo's serves
    return deepspeed


class Headed(nn.Module):
    """A model, and a head that is trained with the adapter: what ``modules_to_save`` is for."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = body, nn.Linear(cases.WIDTH, cases.WIDTH)

    def forward(self, x):
        return self.head(self.body(x))


def settings(stage, micro=1, clip=0.0, bf16=False, **zero):
    return {
        "train_micro_batch_size_per_gpu": cases.ROWS // cases.rank_and_world()[1],
        "gradient_accumulation_steps": micro,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(NOTHING_KEPT if stage == 3 else {}), **zero},
    }


def make(way="adapt", blocks="nnnn", tied=False, headed=False, **config):
    model = cases.build(way, torch.float32, tied, **config)
    cases.inner(model).how = blocks
    return Headed(model) if headed else model


def sgd(model):
    return torch.optim.SGD(list(cases.trainable(model).values()), lr=0.05, momentum=0.9)


def start(model, **kwargs):
    return deepspeed().initialize(model=model, optimizer=sgd(model), config=settings(**kwargs))[0]


def whole(model, stage):
    """All trained parameters, by name."""
    parameters = [p for _, p in sorted(cases.trainable(model).items())]
    gathered = deepspeed().zero.GatheredParameters(parameters) if stage == 3 else contextlib.nullcontext()
    with gathered:
        return [p.detach().float().clone() for p in parameters]


def steps(engine, micro=1, dtype=torch.float32):
    """Steps on this rank's rows; yields after each."""
    rank, world = cases.rank_and_world()
    for group in cases.batches(micro):
        for batch in group:
            x = batch[rank::world].to(dtype).requires_grad_()
            engine.backward(engine(x).float().square().mean())
            engine.step()
        yield


def train(stage=None, micro=1, clip=0.0, zero=None, **kwargs):
    """Steps of SGD: everything that is trained, whole, after each step."""
    model = make(**kwargs)
    if stage is not None:
        engine = start(model, stage=stage, micro=micro, clip=clip, **(zero or {}))
        return [whole(model, stage) for _ in steps(engine, micro)]
    optimizer, history = sgd(model), []
    for group in cases.batches(micro):
        for batch in group:
            (model(batch.float().requires_grad_()).square().mean() / micro).backward()
        if clip:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        optimizer.step()
        optimizer.zero_grad()
        history.append(whole(model, None))
    return history


def train_partitioned_from_birth(way):
    """A base that is made under ``zero.Init``, as transformers makes one under ZeRO-3, and adapted afterwards."""
    kind, cases.Model = cases.Model, lambda blocks: _born(kind)
    try:
        return train(3, way=way)
    finally:
        cases.Model = kind


def _born(kind):
    with deepspeed().zero.Init(config_dict_or_path=settings(3)):
        model = kind(cases.stack(cases.LAYERS, cases.WIDTH))
    assert all(p.numel() == 0 for p in model.parameters())
    # The values that every other model has, whatever was drawn.
    for p, value in zip(model.parameters(), cases.stack(cases.LAYERS, cases.WIDTH).parameters(), strict=True):
        with deepspeed().zero.GatheredParameters(p, modifier_rank=0), torch.no_grad():
            p.copy_(value)
    return model


def train_in_bfloat16(stage):
    model = make()
    engine = start(model, stage=stage, bf16=True)
    return [whole(model, stage) for _ in steps(engine, dtype=torch.bfloat16)]


def save(folder, stage):
    """Trains under ZeRO and saves in every way; returns the whole trained parameters and what merging says."""
    model = make(headed=True)
    engine = start(model, stage=stage)
    for _ in steps(engine):
        pass
    assert any(p.numel() == 0 for p in model.parameters()) == (stage == 3)
    mos_ext.save_adapter(model.body, f"{folder}/adapter")
    mos_ext.export_lora(model.body, f"{folder}/lora")
    distributed.barrier()
    refused = ""
    try:
        mos_ext.merge(model.body)
    except ValueError as error:
        refused = str(error)
    return refused, whole(model.body, stage)


def save_beside(folder):
    """A norm that is trained beside the pools, under ZeRO-3."""
    model = cases.build(dtype=torch.float32)
    model.norm = nn.LayerNorm(cases.WIDTH)
    engine = start(model, stage=3)
    for _ in steps(engine):
        pass
    mos_ext.save_adapter(model, folder)
    distributed.barrier()
    return whole(model, 3)


def save_peft(folder):
    """PEFT's save_pretrained, of partitioned pools and of gathered ones."""
    model = make("peft")
    engine = start(model, stage=3)
    for _ in steps(engine):
        pass
    refused = ""
    try:
        model.save_pretrained(f"{folder}/partitioned")
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    with deepspeed().zero.GatheredParameters(list(model.parameters())):
        if distributed.get_rank() == 0:
            model.save_pretrained(f"{folder}/gathered")
    distributed.barrier()
    return refused, whole(model, 3)


def resume(folder, stage, blocks):
    """DeepSpeed's own checkpoint after two steps, loaded into another engine with other pools: all later states."""
    model = make(blocks=blocks)
    engine = start(model, stage=stage)
    history = []
    for i, _ in enumerate(steps(engine)):
        history.append(whole(model, stage))
        if i == 1:
            engine.save_checkpoint(folder)
    other = make(blocks=blocks)
    with torch.no_grad():
        for p in cases.trainable(other).values():
            p.zero_()
    engine = start(other, stage=stage)
    engine.load_checkpoint(folder)
    again = [whole(other, stage)]
    rank, world = cases.rank_and_world()
    for (batch,) in cases.batches(1)[2:]:
        engine.backward(engine(batch[rank::world].float().requires_grad_()).square().mean())
        engine.step()
        again.append(whole(other, stage))
    return history[1:], again


def other_tables():
    """Tables are replaced while the pools are partitioned: gradients are those of the new ones."""
    rank, world = cases.rank_and_world()

    def reverse(model):
        for pool in model.mos_pools.pools:
            pool.set_tables(type(pool.tables)(pool.tables.a[:, ::-1], pool.tables.b[::-1]))

    model, plain = make(), make()
    engine = start(model, stage=3)
    reverse(model)
    reverse(plain)
    optimizer = sgd(plain)
    x = cases.batches(1)[0][0].float()
    plain(x).square().mean().backward()
    optimizer.step()
    engine.backward(engine(x[rank::world]).square().mean())
    engine.step()
    return whole(model, 3), whole(plain, None)
