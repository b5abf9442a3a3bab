"""What the two ranks of tests/test_distributed.py run. Every function is also run by one process, as the truth."""

import contextlib
import warnings
from functools import partial

import torch
from models import ExpertsBlock, llama, randomize, stack
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mos_ext

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft

    import mos_ext.integrations.peft as mos_peft

STEPS, ROWS, WIDTH, LAYERS = 4, 8, 24, 4
RANKS = {"r": 3, "equivalent_rank": 2, "shards_per_vector": 2, "private_rank": 1}


def rank_and_world():
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


class Model(nn.Module):
    """Residual blocks, each called plainly (n), under non-reentrant (o) or reentrant (r) checkpointing, the latter inside
    another (R), or not at all (-)."""

    def __init__(self, blocks):
        super().__init__()
        self.layers, self.how = nn.ModuleList(blocks), "n" * len(blocks)

    def forward(self, x):
        for how, block in zip(self.how, self.layers, strict=True):
            if how in "or":
                x = checkpoint(block, x, use_reentrant=how == "r")
            elif how == "R":
                x = checkpoint(partial(checkpoint, block, use_reentrant=True), x, use_reentrant=True)
            elif how == "n":
                x = block(x)
        return x


def build(way="adapt", dtype=torch.float64, tied=False, **kwargs):
    """An adapted model in float64, so that the only differences are of sums in another order.

    ``tied``: one block, called again and again.
    """
    config = {**RANKS, "pool_dtype": str(dtype).removeprefix("torch."), **kwargs}
    if way.endswith("experts"):
        torch.manual_seed(0)
        model = Model([ExpertsBlock(WIDTH).to(dtype) for _ in range(LAYERS)])
        stacks = ["experts.gate_up_proj", "experts.down_proj"]
        config |= {"target_modules": [], "target_parameters": stacks, "expert_equivalent_rank": 0.75}
        if way == "experts":
            return randomize(mos_ext.adapt(model, mos_ext.MoSConfig(**config)))
        torch.manual_seed(1)
        return peft.get_peft_model(model, mos_peft.MoSConfig(**config, init_weights=False))
    model = Model(stack(1 if tied else LAYERS, WIDTH, dtype))
    if way == "adapt":
        model = randomize(mos_ext.adapt(model, mos_ext.MoSConfig(**config)))
        model.layers = nn.ModuleList(list(model.layers) * (LAYERS if tied else 1))
        return model
    torch.manual_seed(1)
    return peft.get_peft_model(model, mos_peft.MoSConfig(**config, target_modules=["up", "down"], init_weights=False))


def inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def shard(model, **kwargs):
    for block in inner(model).layers:
        fully_shard(block, **kwargs)
    return fully_shard(model, **kwargs)


def wrap(model, how):
    _, world = rank_and_world()
    if world == 1 or how is None:
        return model
    if how.startswith("ddp"):
        return DistributedDataParallel(model, find_unused_parameters="unused" in how, static_graph="static" in how)
    if how == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return shard(model, reshard_after_forward="keep" not in how)


def batches(micro):
    generator = torch.Generator().manual_seed(5)
    return [
        [torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(micro)] for _ in range(STEPS)
    ]


def train(wrapper=None, blocks="nnnn", way="adapt", micro=1, sync_always=False, clip=None, thawed=False, **config):
    """Steps of SGD on this rank's rows of each batch: all pools, whole, after each step."""
    rank, world = rank_and_world()
    model = build(way, **config)
    inner(model).how = blocks
    if thawed:  # frozen while handles are made, so that they are made anew in the first forward pass with gradients
        frozen = list(trainable(model).values())
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.to("cpu")
        for parameter in frozen:
            parameter.requires_grad_(True)
    forward = wrap(model, wrapper)
    parameters = [p for p in forward.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    history = []
    for group in batches(micro):
        for i, batch in enumerate(group):
            last = i == micro - 1 or sync_always
            x = batch[rank::world].clone().requires_grad_()
            delay = contextlib.nullcontext()
            if isinstance(forward, (DistributedDataParallel, FullyShardedDataParallel)) and not last:
                delay = forward.no_sync()
            elif wrapper and wrapper.startswith("fsdp2") and world > 1:
                forward.set_requires_gradient_sync(last)
            with delay:
                (forward(x).square().mean() / micro).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        gathered = contextlib.nullcontext()
        if isinstance(forward, FullyShardedDataParallel):
            gathered = FullyShardedDataParallel.summon_full_params(forward)
        with gathered:
            history.append([whole(p) for p in trainable(model).values()])
    return history


def train_in_bfloat16(wrapper):
    """float32 pools, a bfloat16 base, FSDP2's own casts: losses only."""
    rank, world = rank_and_world()
    model = build(dtype=torch.float32)
    forward = shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)) if world > 1 else model
    optimizer = torch.optim.SGD([p for p in forward.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for (batch,) in batches(1):
        x = batch[rank::world].float()
        with contextlib.nullcontext() if world > 1 else torch.autocast("cpu", torch.bfloat16):
            loss = forward(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(total)
        losses.append(total.item() / world)
    return losses


def interrupted(blocks):
    """A backward pass that fails half-way must leave nothing behind for the next step."""
    rank, world = rank_and_world()
    model = build()
    model.how = blocks
    forward = DistributedDataParallel(model) if world > 1 else model
    x = batches(1)[0][0][rank::world].clone().requires_grad_()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise ZeroDivisionError

    first = model.layers[0]
    original, first.forward = first.forward, lambda x: type(first).forward(first, Fails.apply(x))
    failed = False
    try:
        model(x).square().mean().backward()  # without DDP, which cannot be used again after a failed pass
    except ZeroDivisionError:
        failed = True
    first.forward = original
    model.zero_grad()
    forward(x).square().mean().backward()
    return failed, [p.grad.clone() for p in trainable(model).values()]


def adapt_with(*configs):
    """Each rank with its own configuration."""
    rank, _ = rank_and_world()
    mos_ext.adapt(stack(), mos_ext.MoSConfig(**configs[rank]))


def peft_with(*configs):
    rank, _ = rank_and_world()
    peft.get_peft_model(stack(), mos_peft.MoSConfig(target_modules=["up"], **configs[rank]))


def save_sharded(folder):
    """Trains a step under FSDP2 and saves in every way; returns the whole pools."""
    rank, world = rank_and_world()
    model = build(dtype=torch.float32)
    forward = shard(model)
    x = batches(1)[0][0][rank::world].float()
    optimizer = torch.optim.SGD([p for p in forward.parameters() if p.requires_grad], lr=0.05)
    forward(x).square().mean().backward()
    optimizer.step()
    mos_ext.save_adapter(model, f"{folder}/adapter")
    mos_ext.export_lora(model, f"{folder}/lora")
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=False))
    distributed.checkpoint.save(state, checkpoint_id=f"{folder}/dcp")
    try:
        mos_ext.merge(model)
    except ValueError as error:
        refused = str(error)
    return refused, {n: whole(p) for n, p in trainable(model).items()}


def load_sharded(folder):
    """Loads the distributed checkpoint into a model sharded over however many ranks there are; returns whole pools."""
    _, world = rank_and_world()
    model = build(dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    if world > 1:
        shard(model)
    state = get_model_state_dict(model)
    distributed.checkpoint.load(state, checkpoint_id=f"{folder}/dcp")
    set_model_state_dict(model, state)
    return {n: whole(p) for n, p in trainable(model).items()}


def save_sharded_beside(folder):
    """A transformers model with a norm and a head that are trained too, saved in every way; returns its outputs."""
    rank, _ = rank_and_world()
    model = randomize(mos_ext.adapt(llama(), mos_ext.MoSConfig(**RANKS)))
    for module in (model.model.norm, model.model.layers[1].input_layernorm, model.lm_head):
        module.weight.requires_grad_(True)
        with torch.no_grad():
            module.weight.add_(torch.arange(module.weight.shape[-1]) / 100)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    logits = model(input_ids=torch.arange(1, 9)[None]).logits.detach()
    mos_ext.save_adapter(model, f"{folder}/adapter")
    mos_ext.export_lora(model, f"{folder}/lora")
    model.save_pretrained(f"{folder}/hf")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # as transformers.Trainer does
        model.save_pretrained(f"{folder}/gathered", state_dict=state)
        try:
            model.save_pretrained(f"{folder}/shards", state_dict={})
        except ValueError as error:
            return logits, str(error)
    return logits, None


def save_peft_sharded(folder):
    """PEFT's save_pretrained of a model that FSDP2 has sharded, from a gathered state_dict on the first rank."""
    rank, _ = rank_and_world()
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), mos_peft.MoSConfig(**RANKS, target_modules="all-linear", init_weights=False))
    pools = {n: p.detach().clone() for n, p in trainable(model).items()}
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    ids = torch.arange(1, 9)[None]
    logits = model(input_ids=ids).logits.detach()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    distributed.barrier()
    return logits, pools


def tensor_parallel(when):
    """What a user of tensor parallelism is told."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    plan = {
        f"layers.{i}.{name}": style()
        for i in range(LAYERS)
        for name, style in (("up", ColwiseParallel), ("down", RowwiseParallel))
    }
    if when == "before":
        model = parallelize_module(Model(stack(LAYERS, WIDTH)), mesh, plan)
        mos_ext.adapt(model, mos_ext.MoSConfig(**RANKS))
    elif when == "before, peft":
        model = parallelize_module(Model(stack(LAYERS, WIDTH)), mesh, plan)
        peft.get_peft_model(model, mos_peft.MoSConfig(**RANKS, target_modules=["up", "down"]))
    elif when == "after":
        parallelize_module(build(dtype=torch.float32), mesh, plan)(torch.randn(2, WIDTH))
    else:
        model = build("peft", dtype=torch.float32)
        parallelize_module(inner(model), mesh, {f"{name}.base_layer": style for name, style in plan.items()})
        model(torch.randn(2, WIDTH))


def adapt_after_sharding():
    model = fully_shard(Model(stack(LAYERS, WIDTH)))
    mos_ext.adapt(model, mos_ext.MoSConfig(**RANKS))


def shard_the_pools_alone():
    model = build()
    fully_shard(model.mos_pools)
    model(batches(1)[0][0])


def shard_each_pool(frees):
    """The pools as units of FSDP2 of their own: their forward is what gathers them."""
    rank, world = rank_and_world()
    model = build()
    if world > 1:
        for pool in model.mos_pools.pools:
            fully_shard(pool, reshard_after_forward=frees)
        shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    history = []
    for (batch,) in batches(1):
        model(batch[rank::world].clone().requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append([whole(p) for p in trainable(model).values()])
    return history
