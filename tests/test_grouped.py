"""Rows in groups, each with factors of its own: the grouped operators, and functional.grouped_low_rank over them."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from mos_ext import reference
from mos_ext.functional import grouped_low_rank, mos_linear
from mos_ext.ops import checks
from mos_ext.testing import assert_error_ratio

ops = torch.ops.mos_ext

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


@dataclass
class Case:
    """Arguments of a grouped operator."""

    x: Tensor
    pool_a: Tensor
    index_a: Tensor
    pool_b: Tensor
    index_b: Tensor
    scale: float
    p: float
    seed: Tensor | None
    ends: Tensor
    rows: Tensor | None
    ranks: Tensor | None
    scales: Tensor | None

    def exact(self):
        def double(value):
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        return replace(self, **{f.name: double(getattr(self, f.name)) for f in fields(self)})

    @property
    def operands(self):
        """What every grouped operator is given after its activations, but for whether it is batch-invariant."""
        return tuple(getattr(self, f.name) for f in fields(self))[1:]

    def reference(self, name, *activations):
        *branch, ends, rows, ranks, scales = self.operands
        function = getattr(reference, name)
        return function(*activations, *branch, ends=ends, rows=rows, ranks=ranks, scales=scales)

    def call(self, **changed):
        arguments = (self.x, self.pool_a, self.index_a, self.pool_b, self.index_b, self.scale, self.ends)
        keywords = {"rows": self.rows, "ranks": self.ranks, "scales": self.scales, "dropout": self.p, "seed": self.seed}
        return grouped_low_rank(*arguments, **{**keywords, **changed})


def make(
    counts, in_features=96, out_features=72, r=5, l=4, *, beyond=0, optional=False, p=0.0, dtype=torch.float32,
    pool_dtype=None, device="cpu", seed=0
):  # fmt: skip
    """Groups of so many rows, and rows beyond that belong to nobody; with rows in any order, ranks and scales if
    ``optional``."""
    generator = torch.Generator().manual_seed(seed)
    groups, places = len(counts), sum(counts) + beyond
    rows = places + 3 if optional else places  # some that are nowhere in the order
    n = 3 * r * l
    pool_dtype = pool_dtype or reference.accumulate_dtype(dtype)

    def normal(*shape, std=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(to).to(device)

    def table():
        drawn = [torch.randperm(n, generator=generator)[: r * l].reshape(r, l) for _ in range(groups)]
        return torch.stack(drawn).to(torch.int32).to(device)

    def integers(values):
        return torch.as_tensor(values).to(torch.int32).to(device)

    return Case(
        normal(rows, in_features),
        normal(n, in_features // l, std=in_features**-0.5, to=pool_dtype),
        table(),
        normal(n, out_features // l, std=r**-0.5, to=pool_dtype),
        table(),
        0.5,
        p,
        torch.tensor([1234567891011], device=device),
        integers(torch.tensor(counts).cumsum(0)),
        integers(torch.randperm(rows, generator=generator)[:places]) if optional else None,
        integers(torch.randint(0, r + 1, (groups,), generator=generator)) if optional else None,
        (torch.rand(groups, generator=generator) + 0.5).to(device) if optional else None,
    )


def skewed(groups, rows):
    """Most rows in few groups, several groups without any."""
    counts = [0] * groups
    counts[groups // 2] = rows - rows // 3
    counts[-1] = rows // 3
    return counts


COUNTS = {
    "one": [37],
    "none": [0, 0, 0],
    "empty ends": [0, 5, 0, 0, 9, 0],
    "one each": [1] * 24,
    "all in one": [0, 0, 200, 0],
    "even": [16, 16, 16, 16],
    "odd": [3, 129, 17, 1, 64],
    "skewed": skewed(16, 300),
    "blocks": [700, 0, 530],
}


def against_reference(case, dtype, invariant=False):
    """Every operator by the error-ratio rule; the in-place ones add to the bit what the others write, rounded once."""
    exact_case = case.exact()
    (plain_y, plain_s), (exact_y, exact_s) = (c.reference("grouped_low_rank", c.x) for c in (case, exact_case))
    y, s = ops.grouped_low_rank(case.x, *case.operands, invariant)
    assert_error_ratio(y, plain_y, exact_y, "y")
    assert_error_ratio(s, plain_s, exact_s, "s", dtype)
    base = torch.randn(y.shape, dtype=torch.float64).to(y)
    accumulated = base.clone()
    assert torch.equal(ops.grouped_low_rank_(accumulated, case.x, *case.operands, invariant), s)
    assert_error_ratio(accumulated, base + plain_y, base.double() + exact_y, "y +=")

    dy = torch.randn(y.shape, dtype=torch.float64).to(y)
    got = ops.grouped_low_rank_backward(dy, s, case.x, *case.operands, invariant)
    plain = case.reference("grouped_low_rank_backward", dy, s, case.x)
    exact = exact_case.reference("grouped_low_rank_backward", dy.double(), s.double(), exact_case.x)
    for name, *triple in zip(("dx", "grad_a", "grad_b"), got, plain, exact, strict=True):
        assert_error_ratio(*triple, name, dtype)
    base = torch.randn(case.x.shape, dtype=torch.float64).to(case.x)
    dx = base.clone()
    grads = ops.grouped_low_rank_backward_(dx, dy, s, case.x, *case.operands, invariant)
    for grad, want in zip(grads, got[1:], strict=True):
        assert torch.equal(grad, want)
    assert_error_ratio(dx, base + plain[0], base.double() + exact[0], "dx +=")
    return y, s, *got


@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{str(d[0])[6:]}-{str(d[1])[6:]}")
@pytest.mark.parametrize("optional", [False, True], ids=["sorted", "rows, ranks, scales"])
def test_parity(counts, dtypes, optional, device):
    dtype, pool_dtype = dtypes
    for p, beyond in ((0.0, 0), (0.3, 7)):
        case = make(
            counts, beyond=beyond, optional=optional, p=p, dtype=dtype, pool_dtype=pool_dtype, device=device, l=3
        )
        against_reference(case, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (257, 24, 7, 1), (1024, 520, 33, 8), (40, 512, 256, 2)], ids=str)
def test_parity_of_shapes(shape, device):
    in_features, out_features, r, l = shape
    for dtype in (torch.float64, torch.bfloat16):
        case = make([9, 0, 70, 1], in_features, out_features, r, l, beyond=2, dtype=dtype, device=device)
        against_reference(case, dtype)


def test_many_groups(device):
    against_reference(make([1] * 512, 64, 64, 4, 2, device=device), torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_one_group_is_what_exists_without_groups(rows, dtype, p, device):
    case = make([rows], 1536, 1100, 16, 4, p=p, dtype=dtype, device=device)
    y, s, *_ = against_reference(case, dtype)
    a, b = (case.pool_a, case.index_a[0]), (case.pool_b, case.index_b[0])
    want_y, want_s = ops.low_rank(case.x, *a, *b, None, case.scale, p, case.seed)
    want = ops.low_rank_backward(torch.ones_like(want_y), s, case.x, *a, *b, case.scale, p, case.seed)
    got = ops.grouped_low_rank_backward(torch.ones_like(y), s, case.x, *case.operands, False)
    assert torch.equal(y, want_y)
    assert torch.equal(s, want_s)
    for grad, expected in zip(got, want, strict=True):
        assert torch.equal(grad.view_as(expected), expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_rows_are_a_permutation_of_x_and_y(p, device):
    """To the bit: what stands at a place is computed as if it were sorted."""
    case = make([5, 0, 150, 33], 1100, 640, optional=True, beyond=3, p=p, dtype=torch.bfloat16, device=device)
    own = case.rows.long()
    y, s = ops.grouped_low_rank(case.x, *case.operands, False)
    dy = torch.randn_like(y)
    grads = ops.grouped_low_rank_backward(dy, s, case.x, *case.operands, False)
    ordered = replace(case, x=case.x[own], rows=None)
    want_y, want_s = ops.grouped_low_rank(ordered.x, *ordered.operands, False)
    want = ops.grouped_low_rank_backward(dy[own], want_s, ordered.x, *ordered.operands, False)
    assert torch.equal(s, want_s)
    assert torch.equal(y[own], want_y)
    assert torch.equal(grads[0][own], want[0])
    assert torch.equal(grads[1], want[1])
    assert torch.equal(grads[2], want[2])
    nowhere = torch.ones(len(case.x), dtype=torch.bool, device=device)
    nowhere[own] = False
    assert not y[nowhere].any()
    assert not grads[0][nowhere].any()


def test_what_belongs_to_nobody_is_left_alone(device):
    """Rows beyond the last end: NaN there reaches nothing, and what is accumulated into keeps its bits."""
    case = make([4, 0, 6], beyond=5, device=device)
    x = case.x.clone()
    x[10:] = float("nan")
    y, s, _, grad_a, grad_b = against_reference(case, torch.float32)
    got, got_s = ops.grouped_low_rank(x, *case.operands, False)
    assert torch.equal(got, y)
    assert torch.equal(got_s, s)
    assert not got[10:].any()
    assert not got_s[10:].any()
    target = torch.full_like(y, float("nan"))
    ops.grouped_low_rank_(target, x, *case.operands, False)
    assert target[10:].isnan().all()
    dy = torch.full_like(y, 1.0)
    dy[10:] = float("nan")
    for grad in ops.grouped_low_rank_backward(dy, s, x, *case.operands, False):
        assert torch.isfinite(grad).all()
    assert not grad_a[1].any()  # a group without rows
    assert not grad_b[1].any()


@pytest.mark.parametrize("ends", [(5, 3, 9), (-4, 2, 40), (40, 40, 40), (-1, -1, -1), (2**31 - 1, 0, 7)], ids=str)
def test_impossible_ends_touch_nothing_out_of_bounds(ends, monkeypatch, device):
    """Their values are on the device, so nobody looks, unless asked to."""
    case = replace(make([3, 3, 3], device=device), ends=torch.tensor(ends, dtype=torch.int32, device=device))
    frame = torch.full((9 + 8, 72), float("nan"), device=device)
    target = frame[4:-4].zero_()
    s = ops.grouped_low_rank_(target, case.x, *case.operands, False)
    ops.grouped_low_rank_backward(target, s, case.x, *case.operands, False)
    assert torch.isfinite(target).all()
    assert frame[:4].isnan().all()
    assert frame[-4:].isnan().all()
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=r"ends\[\d\] must be in \["):
        case.call()


def test_values_are_checked_where_asked_for(monkeypatch, device):
    monkeypatch.setattr(checks, "DEBUG", True)
    case = make([3, 0, 4], optional=True, device=device)
    case.call()
    for name, place, value, message in (
        ("rows", 1, 10, r"rows must be in \[0, 10\), got 10"),
        ("rows", 1, -1, r"rows must be in \[0, 10\), got -1"),
        ("rows", 1, int(case.rows[0]), "rows must be different, got 7 of 6 values"),
        ("ranks", 2, 6, r"ranks\[2\] must be in \[0, 5\], got 6"),
    ):
        wrong = getattr(case, name).clone()
        wrong[place] = value
        with pytest.raises(ValueError, match=message):
            replace(case, **{name: wrong}).call()


@pytest.mark.parametrize("rows", [1, 16, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariance(rows, dtype, device):
    """A row's result does not depend on the others: alone, in a batch, in another place of it, among other groups."""
    case = make([rows, 3, 0, 2 * rows], 4096, 1536, 16, 4, dtype=dtype, device=device)
    y = case.call(batch_invariant=True)
    for g, place in ((0, 0), (0, rows - 1), (1, rows + 1), (3, rows + 3), (3, 3 * rows + 2)):
        ends = torch.tensor([0] * g + [1] * (4 - g), dtype=torch.int32, device=device)
        alone = replace(case, x=case.x[place : place + 1], ends=ends).call(batch_invariant=True)
        assert torch.equal(alone[0], y[place])
        one = replace(case, x=alone.new_zeros(1, 4096).copy_(case.x[place]), ends=ends[-1:])
        own = replace(one, index_a=case.index_a[g : g + 1], index_b=case.index_b[g : g + 1])
        assert torch.equal(own.call(batch_invariant=True)[0], y[place])


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{str(d[0])[6:]}-{str(d[1])[6:]}")
def test_a_mixed_batch_is_its_rows_one_by_one(dtypes, device):
    """A decode step of a server: groups of one row to two hundred, in any order. Every row, to the bit."""
    counts = [1, 2, 3, 7, 64, 200]
    dtype, pool_dtype = dtypes
    case = make(counts, 2132, 200, 16, 4, optional=True, dtype=dtype, pool_dtype=pool_dtype, device=device)
    y = case.call(batch_invariant=True)
    against_reference(case, dtype, invariant=True)
    end = torch.ones(1, dtype=torch.int32, device=device)
    for place, g in enumerate(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()):
        row = case.rows[place].item()
        tables = {"index_a": case.index_a[g : g + 1], "index_b": case.index_b[g : g + 1], "ends": end, "rows": None}
        own = {"ranks": case.ranks[g : g + 1], "scales": case.scales[g : g + 1], "x": case.x[row : row + 1]}
        assert torch.equal(replace(case, **tables, **own).call(batch_invariant=True)[0], y[row])


def differentiable(case):
    return [t.requires_grad_() for t in (case.x, case.pool_a, case.pool_b)]


def test_gradcheck(device):
    for optional in (False, True):
        case = make([2, 0, 3], 6, 4, 2, 2, beyond=1, optional=optional, p=0.3, dtype=torch.float64, device=device)

        def f(x, pool_a, pool_b, case=case):
            return replace(case, x=x, pool_a=pool_a, pool_b=pool_b).call()

        assert torch.autograd.gradcheck(f, differentiable(case))


def test_gradients_are_those_of_a_loop_over_groups(device):
    case = make([3, 0, 21, 8], 64, 48, 4, 2, device=device)
    leaves = differentiable(case)
    dy = torch.randn(32, 48, device=device)
    got = torch.autograd.grad(case.call(), leaves, dy)
    zero, parts, begin = torch.zeros(48, 64, device=device), [], 0
    for g, end in enumerate(case.ends.tolist()):
        own = (case.pool_a, case.index_a[g], case.pool_b, case.index_b[g], case.scale)
        parts.append(mos_linear(case.x[begin:end], zero, None, *own))
        begin = end
    for a, b in zip(got, torch.autograd.grad(torch.cat(parts), leaves, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast(device):
    case = make([3, 4], device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        y = case.call()
    assert torch.equal(y, replace(case, x=case.x.bfloat16()).call())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # as in test_compile.py
def test_other_routings_do_not_compile_anew(device):
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for seed, counts in enumerate(([3, 0, 5], [0, 8, 0], [1, 1, 6])):
        case = make(counts, optional=True, p=0.2, device=device, seed=seed)
        leaves = differentiable(case)
        want = torch.autograd.grad(run(*leaves, *tensors(case)).sum(), leaves)
        got = torch.autograd.grad(compiled(*leaves, *tensors(case)).sum(), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def run(x, pool_a, pool_b, index_a, index_b, ends, rows, ranks, scales, seed):
    return grouped_low_rank(
        x, pool_a, index_a, pool_b, index_b, 0.5, ends, rows=rows, ranks=ranks, scales=scales, dropout=0.2, seed=seed
    )


def tensors(case):
    return case.index_a, case.index_b, case.ends, case.rows, case.ranks, case.scales, case.seed


def test_under_torch_func(device):
    case = make([2, 3], 6, 4, 2, 2, dtype=torch.float64, device=device)
    leaves = differentiable(case)
    want = torch.autograd.grad(case.call().square().sum(), leaves)

    def loss(x, pool_a, pool_b):
        return replace(case, x=x, pool_a=pool_a, pool_b=pool_b).call().square().sum()

    for a, b in zip(torch.func.grad(loss, (0, 1, 2))(*leaves), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 96)}, ValueError, r"x must have the shape \(any, any\)"),
        ({"x": torch.ones(7, 95)}, ValueError, "pool_a must have shards of 95/4 elements"),
        ({"ends": torch.tensor([3, 7])}, TypeError, "ends must be int32, got torch.int64"),
        ({"ends": torch.tensor([7], dtype=torch.int32)}, ValueError, r"ends must have the shape \(2,\), got \(1,\)"),
        ({"ends": [3, 7]}, TypeError, "ends must be a tensor, got list"),
        ({"ends": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "ends must be on the device of x"),
        ({"rows": torch.arange(7)}, TypeError, "rows must be int32"),
        ({"rows": torch.ones(7, 1, dtype=torch.int32)}, ValueError, r"rows must have the shape \(any,\)"),
        ({"ranks": torch.ones(3, dtype=torch.int32)}, ValueError, r"ranks must have the shape \(2,\)"),
        ({"scales": torch.ones(2, dtype=torch.float64)}, TypeError, "scales must be float32"),
        ({"index_a": torch.zeros(5, 4, dtype=torch.int32)}, ValueError, "index_a must have the shape"),
        (
            {"index_b": torch.full((2, 5, 4), 60, dtype=torch.int32)},
            ValueError,
            r"index_b must be in \[0, 60\), got 60",
        ),
        ({"index_b": torch.zeros(3, 5, 4, dtype=torch.int32)}, ValueError, r"index_b must have the shape \(2, 5, 4\)"),
        ({"pool_b": torch.ones(60, 18, dtype=torch.float64)}, TypeError, "pool .* must be float32"),
        ({"p": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ],
    ids=str,
)
def test_bad_input(changed, error, message):
    with pytest.raises(error, match=message):
        replace(make([3, 4]), **changed).call()
