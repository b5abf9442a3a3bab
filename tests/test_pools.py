"""Shared pools: one gradient per pool and backward pass, right in every order in which people run layers."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randomize, stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mos_ext import MoSConfig, MoSLinear, ShardPool, adapt, reference
from mos_ext.routing import IndexTables

CONFIG = MoSConfig(r=3, equivalent_rank=2, shards_per_vector=2, private_rank=1)


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def adapted(layers=3, dtype=torch.float64, config=CONFIG):
    model = adapt(
        stack(layers, dtype=dtype),
        MoSConfig(**{**config.to_dict(), "pool_dtype": "float64" if dtype == torch.float64 else "float32"}),
    )
    return randomize(model)


def plain_forward(model, x):
    """The same model written with reference.mos_linear and ordinary autograd: dense pool gradients, no handles."""
    for block in model:
        if not hasattr(block, "up"):
            continue

        def linear(layer, x):
            pool, k = layer.pool, layer.layer
            return reference.mos_linear(
                x, layer.weight, layer.bias, pool.shards_a, pool.index_a[k], pool.shards_b, pool.index_b[k], layer.scale
            )

        x = x + linear(block.down, torch.relu(linear(block.up, x)))
    return x


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None
    loss().backward()
    return [p.grad.clone() for p in parameters]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_ordinary_autograd():
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    close(
        gradients(model, lambda: model(x).square().sum()),
        gradients(model, lambda: plain_forward(model, x).square().sum()),
    )


def test_one_scatter_per_pool_and_backward_pass():
    """The promise behind the design: the pool is written once a step, however many layers share it."""
    for layers in (2, 6):
        model, x = adapted(layers, torch.float32), torch.randn(5, 24)
        loss = model(x).sum()
        with Count() as count:
            loss.backward()
        assert count.calls["scatter_add.default"] == 4  # two linear types, two pools each


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("given", [(0, 1, 2), (1,), (0, 2)])
def test_a_pool_s_gradient_is_the_sum_in_the_order_of_layers_and_positions(given, dtype, experts):
    """To the bit, of layers of different ranks, some of which have no gradient in this pass."""
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=1, pool_dtype=str(dtype)[6:])
    pool = ShardPool(config, 10, 6, 3, experts=experts, ranks=(4, 2, 3))
    for side, parameter in (("a", pool.shards_a), ("b", pool.shards_b)):
        handles = [pool.handle(side, k) for k in given]
        factors = [torch.randn(h.shape, dtype=dtype) for h in handles]
        want = np.zeros(parameter.shape, parameter.detach().numpy().dtype)
        for k, factor in zip(given, factors, strict=True):
            np.add.at(want, pool.table(side, k).numpy().ravel(), factor.numpy().reshape(-1, want.shape[1]))
        (got,) = torch.autograd.grad(handles, [parameter], factors)
        assert torch.equal(got, torch.from_numpy(want))


def test_backward_allocates_no_pool_sized_tensor_per_layer():
    """Bytes made by the low-rank part of one layer's backward do not depend on the number of shards."""

    class Bytes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t._is_view() is False:
                    Bytes.total += t.untyped_storage().nbytes()
            return out

    def backward_bytes(num_layers):
        pool = ShardPool(CONFIG, 64, 64, num_layers)
        layer = MoSLinear(64, 64, pool=pool)
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(False)
        loss = layer(torch.randn(8, 64)).sum()
        Bytes.total = 0
        with Bytes():
            torch.autograd.grad(loss, [pool.handle("a", 0), pool.handle("b", 0)])
        return Bytes.total

    assert backward_bytes(2) == backward_bytes(200)


def test_gradient_accumulation():
    model = adapted()
    x = torch.randn(6, 24, dtype=torch.float64)
    whole = gradients(model, lambda: model(x).sum())
    for p in model.parameters():
        p.grad = None
    for part in x.split(2):
        model(part).sum().backward()
    close([p.grad for p in model.parameters() if p.requires_grad], whole)


def test_layers_called_twice_and_not_at_all():
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)

    def loss(block):
        return block(model[0], block(model[0], x)).square().sum()

    def plain(layers, x):
        return plain_forward([layers], x)

    close(gradients(model, lambda: loss(lambda b, x: b(x))), gradients(model, lambda: loss(plain)))


def test_a_sub_module_alone_and_after_a_step():
    """No stale factors: values move between calls, and the very next call sees them."""
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    model(x).sum().backward()  # the whole model first: handles exist
    layer = model[1].up
    pool, k = layer.pool, layer.layer
    optimizer = torch.optim.SGD([pool.shards_a, pool.shards_b], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        y = reference.mos_linear(
            x, layer.weight, layer.bias, pool.shards_a, pool.index_a[k], pool.shards_b, pool.index_b[k], layer.scale
        )
        close(
            [pool.shards_a.grad, pool.shards_b.grad],
            torch.autograd.grad(y.square().sum(), [pool.shards_a, pool.shards_b]),
        )
        optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing(reentrant, dropout):
    config = MoSConfig(**{**CONFIG.to_dict(), "dropout": dropout})
    model = adapted(config=config).train()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)

    def loss(use):
        torch.manual_seed(3)
        y = x
        for block in model:
            y = checkpoint(block, y, use_reentrant=reentrant) if use else block(y)
        return y.square().sum()

    close(gradients(model, lambda: loss(True)), gradients(model, lambda: loss(False)))


def test_retain_graph_and_two_backwards():
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    loss.backward()
    close([p.grad for p in model.parameters() if p.requires_grad], [2 * g for g in first])


def test_a_pool_changed_between_forward_and_backward_is_an_error():
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    loss = model(x).sum()
    with torch.no_grad():
        model.mos_pools.pools[0].shards_a.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_pools():
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    want, x.grad = x.grad, None
    model.mos_pools.requires_grad_(False)
    model(x).sum().backward()
    assert torch.equal(x.grad, want)
    model.mos_pools.pools[0].shards_b.requires_grad_(True)
    for p in model.parameters():
        p.grad = None
    model(x).sum().backward()
    assert [p.grad is not None for p in model.mos_pools.parameters()] == [False, True, False, False]


@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_pools_that_were_frozen_when_they_moved(sides):
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    want = gradients(model, lambda: model(x).sum())
    for pool in model.mos_pools.pools:
        for side in sides:
            getattr(pool, f"shards_{side}").requires_grad_(False)
    model.to(torch.float32).to(torch.float64)  # handles are made anew
    model(x.clone().requires_grad_()).sum().backward()
    model.mos_pools.requires_grad_(True)
    for p in model.parameters():
        p.grad = None
    got = gradients(model, lambda: model(x).sum())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # a float32 rounding of weights and pools in between


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "half and back", "state_dict", "assign"])
def test_copies_and_moves(how):
    """After any of these the copy trains its own pools, and the original keeps training its own."""
    model, x = adapted(dtype=torch.float32), torch.randn(5, 24)
    want = gradients(model, lambda: model(x).sum())  # handles exist now
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif how == "half and back":
        other = copy.deepcopy(model).double().float()
    else:
        other = adapted(dtype=torch.float32)
        gradients(other, lambda: other(x).sum())
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=how == "assign")
        for p in other.mos_pools.parameters():
            p.requires_grad_(True)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert all(layer.pool in other.mos_pools.pools for layer in other.modules() if isinstance(layer, MoSLinear))
    before = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    got = gradients(other, lambda: other(x).sum())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(
        torch.equal(a, p.grad) for a, p in zip(before, [p for p in model.parameters() if p.requires_grad], strict=True)
    )


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.load_state_dict(m.state_dict())])
def test_moves_in_inference_mode(move):
    """What an evaluation does to the model must not keep it from training."""
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    want = gradients(model, lambda: model(x).square().sum())
    with torch.inference_mode():
        move(model)
        model(x)
    close(gradients(model, lambda: model(x).square().sum()), want)


def test_other_tables_after_training():
    """Handles were made for the old tables; forward and backward must both use the new ones."""
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    gradients(model, lambda: model(x).sum())
    for pool in model.mos_pools.pools:
        pool.set_tables(IndexTables(pool.tables.a[:, ::-1], pool.tables.b[::-1]))
    close(
        gradients(model, lambda: model(x).square().sum()),
        gradients(model, lambda: plain_forward(model, x).square().sum()),
    )


def test_another_parameter_after_training():
    """What FSDP and load_state_dict(assign=True) do: the gradient must reach the parameter that is there now."""
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    gradients(model, lambda: model(x).sum())
    old = [p for pool in model.mos_pools.pools for p in pool.parameters()]
    for pool in model.mos_pools.pools:
        pool.shards_a, pool.shards_b = (
            torch.nn.Parameter(2 * pool.shards_a.detach()),
            torch.nn.Parameter(pool.shards_b.detach().clone()),
        )
    for p in old:
        p.grad = None
    close(
        gradients(model, lambda: model(x).square().sum()),
        gradients(model, lambda: plain_forward(model, x).square().sum()),
    )
    assert all(p.grad is None for p in old)


def test_dtype_change_after_training():
    model = adapted(dtype=torch.float32)
    gradients(model, lambda: model(torch.randn(5, 24)).sum())
    model.double()
    grads = gradients(model, lambda: model(torch.randn(5, 24, dtype=torch.float64)).sum())
    assert all(g.dtype == torch.float64 for g in grads)


def test_functional_call():
    model, x = adapted(), torch.randn(5, 24, dtype=torch.float64)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    replaced = {n: (p.detach() * 2).requires_grad_() for n, p in names.items()}
    y = torch.func.functional_call(model, replaced, (x,))
    got = torch.autograd.grad(y.sum(), list(replaced.values()))
    with torch.no_grad():
        for p in names.values():
            p.mul_(2)
    close(got, gradients(model, lambda: model(x).sum()))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_configuration(data):
    """Over (r, e, p, l, L, in, out): the budget of LoRA rank e, and the dense definition in every layer, in float64."""
    layers, e, l = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    p = data.draw(st.integers(0, e))
    r = e if p == e else data.draw(st.integers(max(1, p), p + (e - p) * layers))
    fan_in, fan_out = l * data.draw(st.integers(1, 6)), l * data.draw(st.integers(1, 6))
    config = MoSConfig(
        r=r,
        equivalent_rank=e,
        private_rank=p,
        shards_per_vector=l,
        alpha=data.draw(st.floats(0.1, 32)),
        pair_dissociation=data.draw(st.booleans()),
        routing=data.draw(st.sampled_from(["random", "balanced"])),
        pool_dtype="float64",
        seed=data.draw(st.integers(0, 99)),
    )
    pool = ShardPool(config, fan_in, fan_out, layers)
    assert pool.shards_a.numel() + pool.shards_b.numel() == e * layers * (fan_in + fan_out)
    torch.nn.init.normal_(pool.shards_b)
    x = torch.randn(3, fan_in, dtype=torch.float64)
    for k in range(layers):
        layer = MoSLinear(fan_in, fan_out, pool=pool, layer=k, dtype=torch.float64)
        a, b = layer.factors()
        assert (a.shape, b.shape) == ((r, fan_in), (fan_out, r))
        want = x @ (layer.weight + config.alpha / r * b @ a).T + layer.bias
        torch.testing.assert_close(layer(x), want, rtol=1e-11, atol=1e-11)


def test_initial_values_and_repr():
    pool = ShardPool(MoSConfig(r=8, equivalent_rank=4, shards_per_vector=4), 64, 96, 8)
    assert pool.shards_a.shape == (128, 16)
    assert pool.shards_b.shape == (128, 24)
    assert not pool.shards_b.any()
    assert pool.shards_a.abs().max() <= 1 / 8  # 1/sqrt(in), with the full in
    assert (
        abs(pool.shards_a.std().item() - (1 / 8) / 3**0.5) < 0.005
    )  # a uniform distribution's, within 6 of its standard errors
    assert "num_shards=128" in repr(pool)
    assert pool.index_a.shape == pool.index_b.shape == (8, 8, 4)


def test_bad_pools():
    good = ShardPool(CONFIG, 8, 8, 2)
    with pytest.raises(ValueError, match="shards_per_vector must divide out_features=9"):
        ShardPool(CONFIG, 8, 9, 2)
    tables = IndexTables(good.index_a.numpy(), np.full_like(good.index_b.numpy(), 99))
    with pytest.raises(ValueError, match=r"index_b must be in \[0, 8\), got 99"):
        ShardPool(CONFIG, 8, 8, 2, tables=tables)
    with pytest.raises(ValueError, match=r"index_a must have the shape \(3, 3, 2\), got \(2, 3, 2\)"):
        ShardPool(CONFIG, 8, 8, 3, tables=IndexTables(good.index_a.numpy(), good.index_b.numpy()))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"ranks": [-5, 6, 6]}, ValueError, "ranks must be at least 1, got -5"),
        ({"ranks": [0, 6, 6]}, ValueError, "ranks must be at least 1, got 0"),
        ({"ranks": [300, 6, 6]}, ValueError, "ranks must be at most 256, got 300"),
        ({"ranks": [2.0, 6, 6]}, TypeError, "ranks must be an integer, got 2.0"),
        ({"scales": [1, 1, float("nan")]}, ValueError, "scales must be finite, got nan"),
        ({"scales": [1, 1, "1"]}, TypeError, "scales must be a number, got '1'"),
        ({"num_layers": 10**9}, ValueError, r"must be below 2\^31, .* got 8 \* 1000000000 \* 4"),
        ({"num_layers": 2**28}, ValueError, r"must be below 2\^31, .* got 8 \* 268435456 \* 4"),
    ],
    ids=str,
)
def test_bounds(kwargs, error, message):
    """Told before anything is allocated."""
    with pytest.raises(error, match=message):
        ShardPool(MoSConfig(r=6), 64, 64, **{"num_layers": 3, **kwargs})


@torch.no_grad()
def test_calls_without_gradients_see_every_change():
    """What such a call is given is kept; not longer than it is true."""
    config = MoSConfig(r=4, equivalent_rank=4, shards_per_vector=2, private_rank=0, dropout=0.5)
    pool = ShardPool(config, 8, 8, 2)
    first = pool(1, False)
    assert pool(1, False) is first
    assert first.handle_a is first.handle_b is None
    assert pool(1, True).recipe.dropout == 0.5
    pool.set_strength(1, 3.0)
    assert pool(1, False).recipe.scale == 3 * config.scale
    pool.set_tables(IndexTables(pool.tables.b, pool.tables.a))
    assert pool(1, False).recipe.index_a.equal(first.recipe.index_b)
    pool.load_state_dict({name: value + 1 for name, value in pool.state_dict().items()}, assign=True)
    assert pool(1, False).pool_a is pool.shards_a
    pool.to(torch.float64)
    assert pool(1, False).pool_b.dtype == torch.float64
    pool.shards_a = torch.nn.Parameter(torch.zeros_like(pool.shards_a))  # as FSDP2 puts others there
    assert pool(1, False).pool_a is pool.shards_a
    with torch.enable_grad():
        assert pool(1, False).handle_a is not None
