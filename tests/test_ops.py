"""The operator floor: every operator against the float64 oracle by the error-ratio rule, and against what dispatchers expect of operators."""

import re

import numpy as np
import pytest
import torch

from mos_ext import reference
from mos_ext.functional import mos_linear
from mos_ext.ops import schema
from mos_ext.ops.checks import why_not_native
from mos_ext.ops.schema import OPERATORS as NAMES
from mos_ext.routing import invert
from mos_ext.testing import assert_error_ratio, check_case, random_case

ops = torch.ops.mos_ext

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
# (T, d, r, l): single elements, remainders of every tile (4 and 16 rows, 32 and 256 columns, even ranks), shards of one element,
# more rows than one block, the largest rank, and realistic sizes.
SHAPES = [
    (1, 1, 1, 1),
    (3, 6, 2, 3),
    (5, 24, 3, 24),
    (17, 257, 5, 1),
    (64, 96, 16, 4),
    (129, 520, 33, 8),
    (1030, 40, 7, 5),
    (7, 512, 256, 2),
    (300, 1024, 16, 4),
]


def double(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{str(d[0])[6:]}-{str(d[1])[6:]}")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_parity(shape, dtypes, p, device):
    (rows, d, r, l), (dtype, pool_dtype) = shape, dtypes
    case = random_case(rows, d, d, r, l, dtype=dtype, pool_dtype=pool_dtype, device=device)
    x, pool, index = case.x, case.pool_a, case.index_a
    y = random_case(rows, d, d, r, l, dtype=dtype, device=device, seed=1).x
    seed = torch.tensor([1234567891011], device=device)

    def check(name, *arguments, also=()):
        got = getattr(ops, name)(*arguments)
        plain = getattr(reference, name)(*arguments)
        exact = getattr(reference, name)(*double(*arguments))
        for i, triple in enumerate(
            zip(*(t if isinstance(t, tuple) else (t,) for t in (got, plain, exact)), strict=True)
        ):
            assert_error_ratio(*triple, what=f"{name}[{i}]", operands=dtype)
        return got

    s = check("shrink", x, pool, index, p, seed)
    ds = torch.randn_like(s)
    check("shrink_backward", ds, x, pool, index, p, seed)
    check("expand_backward", y, s, pool, index, 0.7)
    got = ops.expand(s, pool, index, 0.7, dtype)
    plain = reference.expand(s, pool, index, 0.7, dtype)
    exact = reference.expand(*double(s, pool), index, 0.7, torch.float64)
    assert_error_ratio(got, plain, exact, "expand")

    # Both factors at once: the same products one after the other, with one rounding where they meet what was there.
    pool_b, index_b = case.pool_b, case.index_b
    factors = (pool, index, pool_b, index_b)
    forward, backward = (x, *factors), (x, *factors, 0.7, p, seed)
    bias, dy = y[0].clone(), random_case(rows, d, d, r, l, dtype=dtype, device=device, seed=2).x
    tail = (bias, 0.7, p, seed)
    delta, s_got = ops.low_rank(*forward, *tail)
    (plain_y, plain_s), (exact_y, exact_s) = low_rank(*forward, *tail), low_rank(*double(*forward, *tail))
    plain_branch, exact_branch = plain_y - bias, exact_y - bias.double()
    assert_error_ratio(delta, plain_y, exact_y, "low_rank y")
    assert_error_ratio(s_got, plain_s, exact_s, "low_rank s", dtype)
    accumulated = y.clone()
    assert torch.equal(ops.low_rank_(accumulated, *forward, 0.7, p, seed), s_got)
    assert_error_ratio(accumulated, y + plain_branch, y.double() + exact_branch, "low_rank_")

    got = ops.low_rank_backward(dy, s, *backward)
    plain = low_rank_backward(dy, s, *backward)
    exact = low_rank_backward(*double(dy, s, *backward))
    for i, triple in enumerate(zip(got, plain, exact, strict=True)):
        assert_error_ratio(*triple, what=f"low_rank_backward[{i}]", operands=dtype)
    dx = y.clone()
    factor_grads = ops.low_rank_backward_(dx, dy, s, *backward)
    assert torch.equal(factor_grads[0], got[1])
    assert torch.equal(factor_grads[1], got[2])
    assert_error_ratio(dx, y + plain[0], y.double() + exact[0], "low_rank_backward_ dx")

    # The whole layer: what ATen's product and the other operators give, in one order or the other, to the bit.
    weight = case.weight
    for b in (None, bias):
        layer, s_got = ops.linear(x, weight, b, *factors, 0.7, p, seed)
        base, (branch, _) = torch.nn.functional.linear(x, weight, b), ops.low_rank(*forward, b, 0.7, p, seed)
        exact_base = torch.nn.functional.linear(*double(x, weight, b))
        assert_error_ratio(layer, base + plain_branch, exact_base + exact_branch, "linear y")
        assert torch.equal(s_got, ops.low_rank_(base, *forward, 0.7, p, seed))
        assert torch.equal(layer, base) or torch.equal(layer, branch.addmm_(x, weight.t()))
    layer, *grads = ops.linear_backward(dy, s, x, weight, *factors, 0.7, p, seed, False)
    base, (branch, *_) = dy @ weight, ops.low_rank_backward(dy, s, *backward)
    assert_error_ratio(layer, base + plain[0], dy.double() @ weight.double() + exact[0], "linear_backward dx")
    for grad, want in zip(grads, ops.low_rank_backward_(base, dy, s, *backward), strict=True):
        assert torch.equal(grad, want)
    assert torch.equal(layer, base) or torch.equal(layer, branch.addmm_(dy, weight))
    of_pools = ops.linear_backward(dy, s, x, weight, *factors, 0.7, p, seed, True)
    wants = (layer, *(ops.scatter_add([g], [i], len(pool)) for g, i in zip(grads, (index, index_b), strict=True)))
    for got, want in zip(of_pools, wants, strict=True):
        assert torch.equal(got, want)


def low_rank(x, pool_a, index_a, pool_b, index_b, bias, scale, p, seed):
    s = reference.shrink(x, pool_a, index_a, p, seed)
    return reference.expand(s, pool_b, index_b, scale, x.dtype) + bias, s


def low_rank_backward(dy, s, x, pool_a, index_a, pool_b, index_b, scale, p, seed):
    ds, factor_b = reference.expand_backward(dy, s, pool_b, index_b, scale)
    return *reference.shrink_backward(ds, x, pool_a, index_a, p, seed), factor_b


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("low_rank_first", [True, False])
def test_both_orders_of_plain_pytorch(dtype, bias, low_rank_first, monkeypatch, device):
    """Where no library could be built: CUDA's order, in which the branch becomes the C of the base's product, and the
    CPU's, on every device."""
    asked = []
    monkeypatch.setattr(schema, "_low_rank_first", lambda x: asked.append(x) or low_rank_first)
    for name in ("linear", "linear_backward"):
        default = getattr(schema, f"_{name}")
        monkeypatch.setattr(ops, name, lambda *arguments, tf32, default=default: default(*arguments))
    check_case(random_case((3, 7), 24, 40, 5, 4, dtype=dtype, bias=bias, device=device))
    assert len(asked) == 2  # forward and backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gather_is_exact_and_scatter_is_its_adjoint(dtype, device):
    case = random_case(1, 60, 60, 7, 5, num_shards=40, dtype=dtype, pool_dtype=dtype, device=device)
    assert torch.equal(ops.gather_concat(case.pool_a, case.index_a), reference.gather_concat(case.pool_a, case.index_a))
    # Repeated shards inside a module, shards that nobody uses, and several modules of different ranks.
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(0, 30, (r, 5), generator=generator, dtype=torch.int32).to(device) for r in (3, 1, 8)]
    grads = [torch.randn(len(i), 60, generator=generator).to(dtype).to(device) for i in indices]
    got = ops.scatter_add(grads, indices, 40)
    plain = reference.scatter_add(grads, indices, 40)
    assert_error_ratio(got, plain, reference.scatter_add([g.double() for g in grads], indices, 40))
    assert got.dtype == reference.accumulate_dtype(dtype)
    assert not got[30:].any()
    # <gather(p), g> == <p, scatter(g)>
    pool = case.pool_a.double()
    forward = sum((ops.gather_concat(pool, i) * g.double()).sum() for i, g in zip(indices, grads, strict=True))
    adjoint = (pool * ops.scatter_add([g.double() for g in grads], indices, 40)).sum()
    torch.testing.assert_close(forward, adjoint, rtol=1e-12, atol=1e-12)


def sums_in_order(grads, indices, num_shards):
    """The pool's gradient by one addition after the other, in the order of modules and positions."""
    sums = np.float64 if grads[0].dtype == torch.float64 else np.float32
    out = np.zeros((num_shards, grads[0].shape[1] // indices[0].shape[1]), sums)
    for grad, index in zip(grads, indices, strict=True):
        parts = grad.cpu().double().numpy().astype(sums).reshape(-1, out.shape[1])
        np.add.at(out, index.cpu().numpy().ravel()[: len(parts)], parts)
    return torch.from_numpy(out)


def inverse_of(indices, num_shards, device):
    return [torch.from_numpy(array).to(device) for array in invert([i.cpu().numpy() for i in indices], num_shards)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("ranks", "l", "shard", "num_shards"),
    [
        ((1,), 1, 1, 3),
        ((3, 1, 8), 5, 12, 40),  # shards that nobody uses
        ((2, 5, 2), 3, 7, 2),  # shards that everybody uses, many times
        ((4,) * 70, 2, 4, 300),  # more modules than a launch takes
        ((64, 48), 4, 40, 500),  # several tasks
    ],
)
def test_scatter_adds_in_the_order_of_modules_and_positions(ranks, l, shard, num_shards, dtype, device):
    """To the bit, by the inverse or without it; of all modules, or of those that have a gradient."""
    generator = torch.Generator().manual_seed(0)
    used = max(1, num_shards * 3 // 4)
    indices = [torch.randint(0, used, (r, l), generator=generator, dtype=torch.int32).to(device) for r in ranks]
    grads = [torch.randn(r, l * shard, generator=generator).to(dtype).to(device) for r in ranks]
    inverse = inverse_of(indices, num_shards, device)
    strided = [torch.cat((g, g[:, :3]), dim=1)[:, : g.shape[1]] for g in grads]
    columns = [g.t().contiguous().t() for g in grads]
    some = [g[:0] if k % 2 else g for k, g in enumerate(grads)]
    last = [g[: len(g) * (k == len(grads) - 1)] for k, g in enumerate(grads)]
    for given in (grads, strided, columns, some, last):
        want = sums_in_order(given, indices, num_shards)
        for way in ((), inverse):
            got = ops.scatter_add(given, indices, num_shards, *way).cpu()
            assert torch.equal(got, want)
            assert got.dtype == reference.accumulate_dtype(dtype)
            assert torch.equal(ops.scatter_add(given, indices, num_shards, *way).cpu(), got)
    far = [torch.stack((t, t), -1)[..., 0] for t in inverse]  # strided themselves
    assert torch.equal(
        ops.scatter_add(grads, indices, num_shards, *far).cpu(), sums_in_order(grads, indices, num_shards)
    )


def arguments_of(name, device, dtype=torch.float32):
    """Small valid arguments of an operator."""
    case = random_case(5, 12, 12, 3, 2, dtype=dtype, device=device)
    x, pool, index = case.x, case.pool_a, case.index_a
    s = reference.shrink(x, pool, index)
    seed = torch.tensor([3], device=device)
    factor = torch.randn(3, 12, device=device, dtype=s.dtype)
    tables = torch.stack((index, index.flip(0), index.flip(1)))
    ends, ranks = (torch.tensor(t, dtype=torch.int32, device=device) for t in ((2, 2, 4), (3, 3, 2)))
    rows = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32, device=device)
    scales = torch.tensor([1.0, 2.0, 0.5], device=device)
    groups = (pool, tables, pool, tables, 0.5, 0.2, seed, ends, rows, ranks, scales, True)
    return {
        "gather_concat": (pool, index),
        "scatter_add": ([factor, factor], [index, index], 12),
        "shrink": (x, pool, index, 0.2, seed),
        "expand": (s, pool, index, 0.5, dtype),
        "expand_backward": (x, s, pool, index, 0.5),
        "shrink_backward": (s, x, pool, index, 0.2, seed),
        "low_rank": (x, pool, index, pool, index, x[0].clone(), 0.5, 0.2, seed),
        "low_rank_": (x.clone(), x, pool, index, pool, index, 0.5, 0.2, seed),
        "low_rank_backward": (x, s, x, pool, index, pool, index, 0.5, 0.2, seed),
        "low_rank_backward_": (x.clone(), x, s, x, pool, index, pool, index, 0.5, 0.2, seed),
        "grouped_low_rank": (x, *groups),
        "grouped_low_rank_": (x.clone(), x, *groups),
        "grouped_low_rank_backward": (x, s, x, *groups),
        "grouped_low_rank_backward_": (x.clone(), x, s, x, *groups),
        "linear": (x, case.weight, case.bias, pool, index, pool, index, 0.5, 0.2, seed),
        "linear_backward": (x, s, x, case.weight, pool, index, pool, index, 0.5, 0.2, seed, True),
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype, device):
    torch.library.opcheck(getattr(ops, name).default, arguments_of(name, device, dtype))


# torch 2.14's opcheck looks at gradients of its own copies.
NOT_LEAVES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@NOT_LEAVES
@pytest.mark.parametrize("name", ["gather_concat", "scatter_add", "shrink", "expand"])
def test_opcheck_with_gradients(name, device):
    def leaf(a):
        if isinstance(a, list):
            return [leaf(t) for t in a]
        return a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    torch.library.opcheck(getattr(ops, name).default, tuple(leaf(a) for a in arguments_of(name, device)))


@NOT_LEAVES
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_of_scatter_add_by_the_inverse(requires_grad, device):
    generator = torch.Generator().manual_seed(0)
    indices = [torch.randint(0, 9, (r, 2), generator=generator, dtype=torch.int32).to(device) for r in (3, 2, 4)]
    grads = [torch.randn(r, 12, device=device, requires_grad=requires_grad) for r in (3, 0, 4)]
    torch.library.opcheck(ops.scatter_add.default, (grads, indices, 9, *inverse_of(indices, 9, device)))


def test_gradients_of_scatter_add_by_the_inverse(device):
    """Those of modules that gave nothing are empty, like what they gave."""
    indices = [torch.tensor(t, dtype=torch.int32, device=device) for t in ([[0, 1]], [[1, 2]], [[2, 2]])]
    grads = [torch.ones(r, 4, device=device, dtype=torch.float64, requires_grad=True) for r in (1, 0, 1)]
    out = ops.scatter_add(grads, indices, 4, *inverse_of(indices, 4, device))
    assert out.tolist() == [[1, 1], [1, 1], [2, 2], [0, 0]]
    factors = torch.autograd.grad(out, grads, torch.arange(8.0, dtype=torch.float64, device=device).view(4, 2))
    assert [f.tolist() for f in factors] == [[[0, 1, 2, 3]], [], [[4, 5, 4, 5]]]


@pytest.mark.parametrize("name", ["gather_concat", "shrink", "expand"])
def test_gradcheck(name, device):
    arguments = [
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments_of(name, device, torch.float64)
    ]
    assert torch.autograd.gradcheck(getattr(ops, name), arguments)


def test_gather_concat_is_twice_differentiable(device):
    case = random_case(2, 12, 12, 3, 2, dtype=torch.float64, device=device)
    pool = case.pool_a.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: ops.gather_concat(p, case.index_a).square(), [pool])


def test_second_derivatives_of_products_are_an_error_not_a_constant(device):
    case = random_case(2, 12, 12, 3, 2, device=device).requires_grad_()
    for y in (
        ops.shrink(case.x, case.pool_a, case.index_a, 0.0, None),
        ops.expand(torch.ones(2, 3, device=device), case.pool_a, case.index_a, 1.0, torch.float32),
        mos_linear(*case.arguments()),
    ):
        (grad,) = torch.autograd.grad(y.square().sum(), case.pool_a, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match="not implemented|once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_native_kernels_serve_this_build(name):
    """Guards the suite itself: without this, a library that fails to load would leave every parity test comparing the reference with itself."""
    assert why_not_native(name, "cpu") is None


def test_every_fallback_is_explained_in_a_sentence(monkeypatch):
    """Missing libraries, unknown devices, and GPUs that the kernels were not compiled for."""
    assert why_not_native("shrink", "xpu") == "there are no native kernels for xpu tensors"
    if torch.version.cuda is None:
        assert re.match(r"_C_cuda: (not built|built, but|MOS_EXT_DISABLE_NATIVE)", why_not_native("shrink", "cuda"))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert why_not_native("shrink", "cuda") == (
        "the GPU has compute capability 7.5, _C_cuda needs 8.0 or newer (MOS_EXT_DISABLE_NATIVE=1 runs plain PyTorch)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why_not_native("shrink", "cuda") is None


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("gather_concat", "scatter_add")])
def test_strides(name, device):
    """Transposed, sliced and expanded inputs give what contiguous copies give, bit for bit."""

    def views(t):
        yield t.clone().T.contiguous().T if t.dim() == 2 else t
        if t.dim() == 2 and t.is_floating_point():
            wide = torch.full((t.shape[0], 2 * t.shape[1] + 1), float("nan"), dtype=t.dtype, device=t.device)
            wide[:, 1::2] = t
            yield wide[:, 1::2]
            tall = torch.full((2 * t.shape[0], t.shape[1] + 3), float("nan"), dtype=t.dtype, device=t.device)
            tall[::2, 2:-1] = t
            yield tall[::2, 2:-1]

    arguments = arguments_of(name, device)
    mutated = name.endswith("_")
    expected_arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = getattr(ops, name)(*expected_arguments)
    for position, argument in enumerate(arguments):
        if not isinstance(argument, torch.Tensor):
            continue
        for view in views(argument):
            used = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            used[position] = view
            got = getattr(ops, name)(*used)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            if mutated:
                torch.testing.assert_close(used[0], expected_arguments[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["low_rank_", "low_rank_backward_"])
def test_in_place_writes_nothing_else(name, device):
    """Sentinels around the view that is written: NaN before, NaN after."""
    arguments = list(arguments_of(name, device))
    target = arguments[0]
    rows, cols = target.shape
    frame = torch.full((rows + 4, cols + 6), float("nan"), device=device)
    frame[2:-2, 3:-3] = target
    arguments[0] = frame[2:-2, 3:-3]
    getattr(ops, name)(*arguments)
    written = torch.zeros_like(frame, dtype=torch.bool)
    written[2:-2, 3:-3] = True
    assert torch.isfinite(frame[written]).all()
    assert torch.isnan(frame[~written]).all()


@pytest.mark.parametrize("name", ["low_rank_", "low_rank_backward_"])
def test_in_place_is_seen_by_autograd(name, device):
    """A tensor that backward needs and an in-place operator changed is an error, as for every in-place operator of torch."""
    arguments = arguments_of(name, device)
    target = arguments[0]
    loss = (torch.ones_like(target, requires_grad=True) * target).sum()
    getattr(ops, name)(*arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    needy = [a.clone().requires_grad_() if i == 1 else a for i, a in enumerate(arguments)]
    with pytest.raises(RuntimeError, match=f"mos_ext::{name} must be called without gradients"):
        getattr(ops, name)(*needy)
    with torch.no_grad():
        getattr(ops, name)(*needy)


@pytest.mark.parametrize("name", ["low_rank_", "low_rank_backward_"])
def test_an_output_that_overlaps_itself_is_refused(name):
    arguments = list(arguments_of(name, "cpu"))
    arguments[0] = arguments[0][:1].expand(5, -1)
    with pytest.raises(RuntimeError, match="an output must not overlap itself, got row stride 0 for 12 columns"):
        getattr(ops, name)(*arguments)


def test_dropped_infinities_are_gone(device):
    """As in the reference: what is dropped is zero, whatever it was."""
    case, seed = random_case(40, 64, 64, 4, 2, device=device), torch.tensor([5], device=device)
    kept = reference.dropout_mask(40, 64, 0.5, seed)
    x = torch.where(kept, case.x, torch.full_like(case.x, float("inf")))
    s = ops.shrink(x, case.pool_a, case.index_a, 0.5, seed)
    dx, factor = ops.shrink_backward(s, x, case.pool_a, case.index_a, 0.5, seed)
    assert torch.isfinite(s).all()
    assert torch.isfinite(dx).all()
    assert torch.isfinite(factor).all()


def test_dropout_arguments():
    case = random_case(4, 12, 12, 3, 2)
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(RuntimeError, match=r"dropout must be in \[0, 1\], got"):
            ops.shrink(case.x, case.pool_a, case.index_a, p, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="dropout needs a seed of one int64"):
        ops.shrink(case.x, case.pool_a, case.index_a, 0.5, None)


def test_subnormal_halves_survive_flush_to_zero():
    x = torch.full((4, 12), 3e-7, dtype=torch.float16)
    case = random_case(4, 12, 12, 3, 2)
    expected = ops.shrink(x, case.pool_a, case.index_a, 0.0, None)
    assert expected.any()
    try:
        torch.set_flush_denormal(True)
        assert torch.equal(ops.shrink(x, case.pool_a, case.index_a, 0.0, None), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_written(name, device):
    arguments = arguments_of(name, device)
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    copies = [t.clone() for t in flat]
    getattr(ops, name)(*arguments)
    for i, (tensor, copy) in enumerate(zip(flat, copies, strict=True)):
        assert torch.equal(tensor, copy) or (name.endswith("_") and i == 0)


@pytest.mark.parametrize("rows", [0, 1])
def test_empty(rows, device):
    case = random_case(rows, 12, 12, 3, 2, device=device)
    x, pool, index = case.x, case.pool_a, case.index_a
    s = ops.shrink(x, pool, index, 0.0, None)
    assert s.shape == (rows, 3)
    assert ops.expand(s, pool, index, 1.0, torch.float32).shape == (rows, 12)
    for result in (ops.expand_backward(x, s, pool, index, 1.0), ops.shrink_backward(s, x, pool, index, 0.0, None)):
        assert result[1].shape == (3, 12)
        assert rows or not result[1].any()


@pytest.mark.parametrize("name", NAMES)
def test_bitwise_deterministic(name, device):
    arguments = arguments_of(name, device, torch.bfloat16)

    def run():
        used = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        out = getattr(ops, name)(*used)
        return [used[0]] + (list(out) if isinstance(out, tuple) else [] if out is None else [out])

    first = run()
    for _ in range(3):
        for a, b in zip(first, run(), strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "features"), [(2100, 1100), (40000, 12)])  # S as planes; in chunks of a block
def test_results_do_not_depend_on_the_number_of_threads(rows, features):
    case = random_case(rows, features, features, 16, 4, dtype=torch.bfloat16)
    x, pool, index = case.x, case.pool_a, case.index_a
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            s = ops.shrink(x, pool, index, 0.0, None)
            dx, da = ops.shrink_backward(s, x, pool, index, 0.0, None)
            ds, db = ops.expand_backward(x, s, pool, index, 1.0)
            results.append((s, dx, da, ds, db, ops.scatter_add([da, db], [index, index], len(pool))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_index_out_of_range_is_refused_before_memory_is_touched():
    case = random_case(5, 12, 12, 3, 2)
    for bad in (-1, 12, 2**31 - 1):
        index = case.index_a.clone()
        index[1, 1] = bad
        with pytest.raises((RuntimeError, IndexError), match=r"index must be in \[0, 12\)"):
            ops.shrink(case.x, case.pool_a, index, 0.0, None)
        with pytest.raises((RuntimeError, IndexError), match=r"index must be in \[0, 12\)"):
            ops.scatter_add([torch.ones(3, 12)], [index], 12)


def test_operands_of_scatter_add_that_do_not_fit(device):
    index = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    starts, places = inverse_of([index], 4, device)
    grad = torch.ones(2, 10, device=device)
    for way, message in (
        ((starts, None), "starts and places must come together"),
        ((None, places), "starts and places must come together"),
        ((starts[1:], places), "starts must be (num_shards + 1,) int32"),
        ((starts.long(), places), "starts must be (num_shards + 1,) int32"),
        ((starts, places[:, :1]), "places must be (entries, 2) int32"),
        ((starts, places.flatten()), "places must be (entries, 2) int32"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            ops.scatter_add([grad], [index], 4, *way)
    with pytest.raises(
        RuntimeError, match=re.escape("grads must be (r, l * shard_size) of one dtype, or have no rows")
    ):
        ops.scatter_add([grad[:1]], [index], 4)


@pytest.mark.parametrize("rows", [1, 2048])  # many column blocks, and one
def test_long_sums_are_as_exact_as_pytorch_s(rows, device):
    """Sums of 4096 and 2048 products, one after the other, would be 7 times worse than PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4096, generator=generator).to(device)
    s = torch.randn(rows, 16, generator=generator).to(device)
    index = torch.randperm(64, generator=generator).view(16, 4).int().to(device)
    pool = torch.randn(64, 1024, generator=generator).to(device)
    a = reference.gather_concat(pool, index)
    got = ops.shrink(x, pool, index, 0.0, None)
    assert_error_ratio(got, x @ a.T, x.double() @ a.double().T, "S")
    _, got = ops.shrink_backward(s, x, pool, index, 0.0, None)
    assert_error_ratio(got, s.T @ x, s.double().T @ x.double(), "dA")
