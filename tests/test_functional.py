"""functional.mos_linear: the fused forward and backward as users call it."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad

from mos_ext import MoSConfig, MoSLinear, reference
from mos_ext.functional import gather_concat, mos_linear
from mos_ext.ops import checks, watch
from mos_ext.testing import assert_error_ratio, check_case, random_case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 9), (2, 3, 5), (3, 0)], ids=str)
def test_forward_and_gradients(rows, dtype, bias, device):
    check_case(random_case(rows, 40, 24, 6, 4, dtype=dtype, bias=bias, device=device))


def test_tf32_follows_the_switches_of_torch():
    on_cuda, on_cpu = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda")), torch.zeros(1)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = precision
            assert watch.tf32(on_cuda) is expected
            assert watch.tf32(on_cpu) is False
            assert watch.tf32(SimpleNamespace(dtype=torch.float64, device=torch.device("cuda"))) is False
            compiled = torch.compile(lambda x: x + watch._tf32_allowed(), fullgraph=True, backend="eager")
            assert compiled(on_cpu).item() == expected
            torch.compiler.reset()
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float32])
def test_low_precision_pools(pool_dtype, device):
    check_case(random_case(33, 256, 320, 16, 4, dtype=torch.bfloat16, pool_dtype=pool_dtype, device=device))


@given(
    rows=st.integers(0, 40),
    l=st.integers(1, 6),
    a=st.integers(1, 12),
    b=st.integers(1, 12),
    r=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, l, a, b, r, seed):
    """Small integers make every sum exact, so forward and gradients must equal the reference bit for bit."""
    torch.manual_seed(seed)
    case = random_case(rows, a * l, b * l, r, l).apply(lambda t: torch.randint(-3, 4, t.shape).to(t.dtype))
    grad_y = torch.randint(-3, 4, (rows, b * l)).float()
    results = []
    for function in (mos_linear, reference.mos_linear):
        inputs = case.apply(torch.clone).requires_grad_()
        y = function(*inputs.arguments())
        results.append((y, *torch.autograd.grad(y, inputs.differentiable(), grad_y)))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_gradcheck(device):
    case = random_case((2, 3), 8, 6, 3, 2, dtype=torch.float64, device=device).requires_grad_()
    for dropout in (0.0, 0.4):
        seed = torch.tensor([9], device=device)
        x, weight, bias, pool_a, index_a, pool_b, index_b, scale = case.arguments()

        def f(
            x, weight, bias, pool_a, pool_b, dropout=dropout, seed=seed, index_a=index_a, index_b=index_b, scale=scale
        ):
            return mos_linear(x, weight, bias, pool_a, index_a, pool_b, index_b, scale, dropout=dropout, seed=seed)

        assert torch.autograd.gradcheck(f, (x, weight, bias, pool_a, pool_b))


def test_every_combination_of_wanted_gradients(device):
    base = random_case(9, 24, 16, 4, 2, device=device)
    full = base.apply(torch.clone).requires_grad_()
    dy = torch.randn(9, 16, device=device)
    everything = torch.autograd.grad(mos_linear(*full.arguments()), full.differentiable(), dy)
    for wanted in itertools.product((False, True), repeat=5):
        case = base.apply(torch.clone)
        leaves = case.differentiable()
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        y = mos_linear(*case.arguments())
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for leaf, want, expected in zip(leaves, wanted, everything, strict=True):
            assert (leaf.grad is None) != want
            if want:
                # The write and the accumulate forms round alike in float32.
                torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


def test_saves_only_x_and_s(device):
    """T * r float32 besides x, the weight and the pools: no copy of x, no delta, no mask, no assembled A or B."""
    case = random_case(64, 96, 128, 8, 4, dtype=torch.bfloat16, device=device)
    case.pool_a.requires_grad_()
    case.pool_b.requires_grad_()
    case.x.requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in case.arguments() if isinstance(t, torch.Tensor)}
    saved = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = mos_linear(*case.arguments(), dropout=0.1, seed=torch.tensor([1], device=device))
    assert sorted((tuple(t.shape), t.dtype) for t in saved) == [((1,), torch.int64), ((64, 8), torch.float32)]
    y.sum().backward()


def test_dropout(device):
    case = random_case(64, 128, 96, 8, 4, device=device)
    seed = torch.tensor([77], device=device)
    with_seed = mos_linear(*case.arguments(), dropout=0.3, seed=seed)
    exact = reference.mos_linear(*case.exact().arguments(), 0.3, seed)
    assert_error_ratio(with_seed, reference.mos_linear(*case.arguments(), 0.3, seed), exact)
    assert torch.equal(with_seed, mos_linear(*case.arguments(), dropout=0.3, seed=seed))
    # Without a seed, torch's generator decides: the same after manual_seed, another one otherwise.
    torch.manual_seed(5)
    first, second = mos_linear(*case.arguments(), dropout=0.3), mos_linear(*case.arguments(), dropout=0.3)
    torch.manual_seed(5)
    assert torch.equal(first, mos_linear(*case.arguments(), dropout=0.3))
    assert not torch.equal(first, second)


def test_dropout_is_unbiased():
    """The mean over 400 masks is within six standard errors of the product without dropout."""
    case = random_case(4, 64, 32, 4, 2)
    exact = reference.low_rank(case.x, case.pool_a, case.index_a, case.pool_b, case.index_b, 1.0)
    zero = torch.zeros_like(case.weight)
    rest = (case.pool_a, case.index_a, case.pool_b, case.index_b, 1.0)
    samples = torch.stack([mos_linear(case.x, zero, None, *rest, dropout=0.5) for _ in range(400)])
    assert ((samples.mean(0) - exact).abs() < 6 * samples.std(0) / 400**0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    """Like F.linear: x and weight in the autocast dtype, the result too; pools stay float32 and get float32 gradients."""
    case = random_case((2, 17), 48, 32, 4, 4, device=device).requires_grad_()
    with torch.autocast(device, dtype):
        y = mos_linear(*case.arguments())
        assert y.dtype == torch.nn.functional.linear(case.x, case.weight).dtype == dtype
    y.float().sum().backward()
    low = case.apply(lambda t: t)
    low.x, low.weight, low.bias = low.x.to(dtype), low.weight.to(dtype), low.bias.to(dtype)
    assert torch.equal(y, mos_linear(*low.arguments()))
    assert case.pool_a.grad.dtype == case.x.grad.dtype == case.weight.grad.dtype == torch.float32
    wide = random_case(3, 48, 32, 4, 4, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype):
        assert mos_linear(*wide.arguments()).dtype == torch.float64


def test_one_step_of_a_pool_is_bitwise_reproducible(device):
    case = random_case(300, 256, 128, 16, 4, dtype=torch.bfloat16, device=device).requires_grad_()
    grads = [
        torch.autograd.grad(
            mos_linear(*case.arguments()),
            case.differentiable(),
            torch.ones(300, 128, device=device, dtype=torch.bfloat16),
        )
        for _ in range(3)
    ]
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_under_torch_func(device):
    """functional transforms take the same gradients, through the same autograd node."""
    case = random_case(5, 12, 8, 3, 2, dtype=torch.float64, device=device)
    x, weight, bias, pool_a, index_a, pool_b, index_b, scale = case.arguments()

    def loss(pool_a, pool_b):
        return mos_linear(x, weight, bias, pool_a, index_a, pool_b, index_b, scale).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(pool_a, pool_b)
    leaves = [pool_a.clone().requires_grad_(), pool_b.clone().requires_grad_()]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tensor_that_outlived_a_transform_still_has_its_gradient(device):
    layer = MoSLinear(8, 8, config=MoSConfig(r=4, equivalent_rank=4), device=device)
    nn.init.normal_(layer.pool.shards_b)
    weight = layer.weight.detach().clone().requires_grad_()
    kept = []
    for shape in ((3, 8), (2, 3, 8)):
        x = torch.randn(shape, device=device, requires_grad=True)
        torch.func.grad(lambda *t: (kept.extend(t), t[0].sum() + t[1].sum())[1], argnums=(0, 1))(x, weight)
        leaked_weight, leaked = kept.pop(), kept.pop()
        (got,) = torch.autograd.grad(layer(leaked).sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(layer(x).sum(), x)[0])
        pool = layer.pool
        y = mos_linear(
            x, leaked_weight, None, pool.shards_a, pool.table("a", 0), pool.shards_b, pool.table("b", 0), 1.0
        )
        (got,) = torch.autograd.grad(y.sum(), weight)
        torch.testing.assert_close(got, x.detach().reshape(-1, 8).sum(0).expand(8, 8))


def test_parameters_that_outlived_a_transform_still_have_their_gradients(device):
    layer, x = MoSLinear(8, 8, config=MoSConfig(r=4, equivalent_rank=4), device=device), torch.randn(3, 8).to(device)
    nn.init.normal_(layer.pool.shards_b)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    kept = {}
    torch.func.grad(lambda p: (kept.update(p), torch.func.functional_call(layer, p, (x,)).sum())[1])(leaves)
    torch.func.functional_call(layer, kept, (x,)).sum().backward()
    layer(x).sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(leaves[name].grad, p.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_inside_of_autocast_is_that_outside(dtype, device):
    layer = MoSLinear(16, 8, config=MoSConfig(r=4, equivalent_rank=4), device=device, dtype=dtype)
    nn.init.normal_(layer.pool.shards_b)
    x = torch.randn(3, 16).to(device, dtype).requires_grad_()
    wanted = (x, *layer.parameters())
    want = torch.autograd.grad(layer(x).square().sum(), wanted)
    loss = layer(x).square().sum()
    with torch.autocast(x.device.type, torch.bfloat16):
        got = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch.func.jvp's own
def test_second_derivatives_and_forward_mode_are_errors(device):
    """Loud, in every way to ask for them; never a silently missing term."""
    case = random_case(3, 12, 8, 3, 2, dtype=torch.float64, device=device)
    x, weight, bias, pool_a, index_a, pool_b, index_b, scale = case.arguments()

    def f(x, pool_b):
        return mos_linear(x, weight, bias, pool_a, index_a, pool_b, index_b, scale).square().sum()

    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        torch.func.grad(lambda b: torch.func.grad(f)(x, b).square().sum())(pool_b)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(f(leaf, pool_b), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        dx.square().sum().backward()
    # The gradient of a sum requires none itself, yet dx depends on the pools.
    (dx,) = torch.autograd.grad(mos_linear(leaf, *case.arguments()[1:]).sum(), leaf, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        dx.square().sum().backward()
    with pytest.raises(RuntimeError, match="jvp|forward AD"):
        torch.func.jvp(f, (x, pool_b), (x, pool_b))
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="jvp|forward AD"):
        f(forward_ad.make_dual(x, x), pool_b)


BAD = {
    "x a list": (lambda c: setattr(c, "x", [1.0]), TypeError, "x must be a tensor, got list"),
    "no weight": (lambda c: setattr(c, "weight", None), TypeError, "weight must be a tensor, got NoneType"),
    "weight dtype": (
        lambda c: setattr(c, "weight", c.weight.double()),
        TypeError,
        "x must have the dtype of the weight, torch.float64, got torch.float32",
    ),
    "bias dtype": (
        lambda c: setattr(c, "bias", c.bias.bfloat16()),
        TypeError,
        "x must have the dtype of the bias, torch.bfloat16, got torch.float32",
    ),
    "pool_b device": (
        lambda c: setattr(c, "pool_b", c.pool_b.to("meta")),
        ValueError,
        "pool_b must be on the device of x, cpu, got meta",
    ),
    "index_a device": (
        lambda c: setattr(c, "index_a", c.index_a.to("meta")),
        ValueError,
        "index_a must be on the device of x, cpu, got meta",
    ),
    "pool_b dtype": (
        lambda c: setattr(c, "pool_b", c.pool_b.bfloat16()),
        TypeError,
        "pool .pool_dtype. must be float32 or have the dtype of x, torch.float32, got torch.bfloat16",
    ),
    "scale a string": (lambda c: setattr(c, "scale", "0.5"), TypeError, "scale must be a number, got '0.5'"),
    "scale NaN": (lambda c: setattr(c, "scale", float("nan")), ValueError, "scale must be finite, got nan"),
    "x of integers": (lambda c: setattr(c, "x", c.x.int()), TypeError, r"x must be float64, .* got torch.int32"),
    "x complex": (
        lambda c: setattr(c, "x", c.x.to(torch.complex64)),
        TypeError,
        r"x must be float64.* got torch.complex64",
    ),
    "x features": (
        lambda c: setattr(c, "x", c.x[:, :5]),
        ValueError,
        r"x must have 12 features in its last dimension, got the shape \(4, 5\)",
    ),
    "x scalar": (lambda c: setattr(c, "x", torch.tensor(1.0)), ValueError, r"x must have 12 features"),
    "weight shape": (
        lambda c: setattr(c, "weight", c.weight[0]),
        ValueError,
        r"weight must have the shape \(any, any\), got \(12,\)",
    ),
    "bias shape": (
        lambda c: setattr(c, "bias", c.bias[:3]),
        ValueError,
        r"bias must have the shape \(8,\), got \(3,\)",
    ),
    "pool dtype": (
        lambda c: setattr(c, "pool_a", c.pool_a.double()),
        TypeError,
        r"pool .pool_dtype. must be float32 or have the dtype of x, torch.float32, got torch.float64",
    ),
    "pool device": (
        lambda c: setattr(c, "x", c.x.to("meta")),
        ValueError,
        r"weight must be on the device of x, meta, got cpu",
    ),
    "pool_a shape": (
        lambda c: setattr(c, "pool_a", c.pool_a[:, :2]),
        ValueError,
        r"pool_a must have shards of 12/2 elements, got the shape \(12, 2\)",
    ),
    "pool_b integers": (lambda c: setattr(c, "pool_b", c.pool_b.int()), TypeError, r"pool_b must be float64"),
    "index dtype": (
        lambda c: setattr(c, "index_a", c.index_a.long()),
        TypeError,
        r"index_a must be int32, got torch.int64",
    ),
    "index low": (lambda c: c.index_a.__setitem__((0, 0), -3), ValueError, r"index_a must be in \[0, 12\), got -3"),
    "index high": (lambda c: c.index_b.__setitem__((2, 1), 12), ValueError, r"index_b must be in \[0, 12\), got 12"),
    "ranks differ": (
        lambda c: setattr(c, "index_b", c.index_b[:2]),
        ValueError,
        r"index_b must have the shape \(3, 2\), got \(2, 2\)",
    ),
    "no rank": (
        lambda c: (setattr(c, "index_a", c.index_a[:0]), setattr(c, "index_b", c.index_b[:0])),
        ValueError,
        r"index_a must have 1 to 256 rows, the rank, got 0",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    change, error, message = BAD[what]
    case = random_case(4, 12, 8, 3, 2)
    change(case)
    with pytest.raises(error, match=message):
        mos_linear(*case.arguments())


def test_more_bad_input():
    case = random_case(4, 12, 8, 3, 2)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        mos_linear(*case.arguments(), dropout=1.0)
    for seed in (torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(ValueError, match="seed must be one int64, got"):
            mos_linear(*case.arguments(), dropout=0.5, seed=seed)
    with pytest.raises(TypeError, match="seed must be a tensor, got int"):
        mos_linear(*case.arguments(), dropout=0.5, seed=3)
    with pytest.raises(ValueError, match=r"index must be in \[0, 12\), got 99"):
        gather_concat(case.pool_a, torch.tensor([[0, 99]], dtype=torch.int32))


def test_gather_concat_for_users(device):
    case = random_case(4, 12, 8, 3, 2, device=device)
    assert torch.equal(gather_concat(case.pool_a, case.index_a), reference.gather_concat(case.pool_a, case.index_a))


@pytest.fixture
def reads(monkeypatch):
    """Counts how often values of a table are read."""
    counted = []
    least = torch.Tensor.min
    monkeypatch.setattr(torch.Tensor, "min", lambda t, *rest: counted.append(t.shape) or least(t, *rest))
    return counted


def call_with(case, **tables):
    """The operator on a case, as layers without tables of their own call it: sliced anew."""
    return mos_linear(*replace(case, **tables).arguments())


def test_values_of_a_table_are_read_once(reads, device):
    """Reading them waits for a GPU: not at every call, nor for every slice of a table; and of no copy that is gone."""
    case = random_case(4, 12, 8, 3, 2, device=device)
    tables = torch.stack((case.index_a, case.index_a.flip(0)))
    before = len(checks._ranges)
    y = [call_with(case, index_a=tables[layer]) for layer in (0, 1, 0, 1)]
    assert torch.equal(y[0], y[2])
    assert torch.equal(y[1], y[3])
    assert len(reads) == 3  # two slices, and index_b
    with torch.inference_mode():
        call_with(case, index_a=tables[1])
    gather_concat(case.pool_a, tables[0])
    assert len(reads) == 3
    assert len(checks._ranges) == before + 2
    del tables
    assert len(checks._ranges) == before + 1
    with pytest.raises(ValueError, match=r"index_b must be in \[0, 1\), got"):  # what was read is known of every pool
        call_with(case, pool_b=case.pool_b[:1])
    assert len(reads) == 4  # index_a itself


@pytest.mark.parametrize("change", ["the table", "a view", "what it is a view of", "in inference mode"])
def test_a_table_that_has_changed_is_read_again(change, device):
    case = random_case(4, 12, 8, 3, 2, device=device)
    tables = torch.stack((case.index_a, case.index_a))
    table = tables[1]
    call_with(case, index_a=table)
    with torch.inference_mode(change == "in inference mode"):
        {"a view": table[0], "what it is a view of": tables}.get(change, table).fill_(12)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"index_a must be in \[0, 12\), got 12"):
            call_with(case, index_a=table)
    with pytest.raises(ValueError, match=r"index_a must be in \[0, 12\), got 12"):
        call_with(case, index_a=tables[1])
    tables.zero_()
    call_with(case, index_a=table)


def test_tables_made_in_inference_mode_do_not_tell_when_they_change(device):
    case = random_case(4, 12, 8, 3, 2, device=device)
    with torch.inference_mode():
        table = case.index_a.clone()
        call_with(case, index_a=table)
        table[1, 1] = -1
        with pytest.raises(ValueError, match=r"index_a must be in \[0, 12\), got -1"):
            call_with(case, index_a=table)


def test_no_table_is_read_while_a_stream_is_captured(reads, monkeypatch):
    """A wait would break the capture. What was read before is known; what was not is read by the first call after."""
    case = random_case(4, 12, 8, 3, 2)
    bad = torch.full_like(case.index_a, 12)
    call_with(case)
    reads.clear()
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_is_capturing", lambda device: True)
        call_with(case)
        with pytest.raises((RuntimeError, IndexError)):  # whoever computes notices it
            call_with(case, index_a=bad)
        with pytest.raises(ValueError, match=r"index_b must be in \[0, 1\), got"):
            call_with(case, pool_b=case.pool_b[:1])
    assert not reads
    with pytest.raises(ValueError, match=r"index_a must be in \[0, 12\), got 12"):
        call_with(case, index_a=bad)
