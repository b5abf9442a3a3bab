"""What is special about the CUDA operators. Run by tests/test_cuda_kernels.py under the plugin operators.py."""

import pytest
import torch

from mos_ext.ops import schema
from mos_ext.testing import assert_error_ratio, random_case, relative_error

ops = torch.ops.mos_ext


@pytest.fixture
def case():
    return random_case(37, 64, 96, 8, 4, dtype=torch.float32)


def factors(case):
    return case.pool_a, case.index_a, case.pool_b, case.index_b


def test_a_failed_launch_names_the_kernel_and_its_configuration(case):
    case.index_a[1, 1] = 10**6
    message = r"the kernel shrink \(float32\), grid 1 x 2 x 1, 128 threads, \d+ bytes of shared memory, did not start: "
    with pytest.raises(RuntimeError, match=message):
        ops.shrink(case.x, case.pool_a, case.index_a, 0.0, None)


def test_operands_that_do_not_fit_are_refused(case):
    a, b = (case.pool_a, case.index_a), (case.pool_b, case.index_b)
    for arguments, message in [
        ((case.x, case.pool_a.double(), case.index_a, 0.0, None), "pool must be float32 or of the activations' dtype"),
        ((case.x, case.pool_b, case.index_b, 0.0, None), "the factor has 96 columns, the activations 64"),
        ((case.x, case.pool_a, case.index_a.long(), 0.0, None), "index must be a contiguous int32 matrix"),
        ((case.x, case.pool_a, case.index_a, 0.5, None), "dropout needs a seed of one int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.shrink(*arguments)
    with pytest.raises(RuntimeError, match="index_a and index_b must have the same rank"):
        ops.low_rank(case.x, *a, case.pool_b, case.index_b[:3], None, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="bias must be"):
        ops.low_rank(case.x, *a, *b, case.bias[:5], 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="y must have x's rows and dtype"):
        ops.low_rank_(torch.empty(36, 96), case.x, *a, *b, 1.0, 0.0, None)


def test_groups_that_do_not_fit_are_refused(case):
    def run(x=case.x, index_a=case.index_a[None], index_b=case.index_b[None], ends=(37,), **changed):
        given = {"rows": None, "ranks": None, "scales": None, **changed}
        values = {k: None if v is None else torch.tensor(v) for k, v in given.items()}
        ends = torch.tensor(ends, dtype=torch.int32)
        branch = (case.pool_a, index_a, case.pool_b, index_b, 1.0, 0.0, None)
        return ops.grouped_low_rank(x, *branch, ends, *values.values(), False)

    many = (
        case.index_a.expand(65001, *case.index_a.shape)[:, :1],
        case.index_b.expand(65001, *case.index_b.shape)[:, :1],
    )
    for changed, message in [
        ({"index_a": case.index_a}, "index_a and index_b must have a table for each group"),
        ({"index_b": case.index_b[None].expand(2, -1, -1)}, "index_a and index_b must have a table for each group"),
        ({"ends": (1, 2)}, "ends must be one for each group, int32"),
        ({"ranks": [1.5]}, "ranks must be one for each group, int32"),
        ({"scales": [1]}, "scales must be one for each group, int32"),
        ({"rows": [[1]]}, "rows must be one for each place, int32"),
        (
            {"index_a": many[0], "index_b": many[1], "ends": (0,) * 65001},
            "at most 65000 groups of at most 1073741824 rows",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(**changed)
    y, s = run()
    with pytest.raises(RuntimeError, match="s must be \\(places, rank\\) in the accumulation type of x"):
        ops.grouped_low_rank_backward(
            y, s[:36], case.x, case.pool_a, case.index_a[None], case.pool_b, case.index_b[None], 1.0, 0.0, None,
            torch.tensor([37], dtype=torch.int32), None, None, None, False,
        )  # fmt: skip


def test_tf32_rounds_operands_and_nothing_else(case):
    """Ten bits of fraction: each operand of a product is off by at most 2^-11 of itself, S passes through two products."""
    allowed = 2 * 2 * 2.0**-11
    exact = ops.low_rank(case.x.double(), *factors(case), case.bias.double(), 0.5, 0.0, None)
    plain = ops.low_rank(case.x, *factors(case), case.bias, 0.5, 0.0, None)
    tf32 = ops.low_rank(case.x, *factors(case), case.bias, 0.5, 0.0, None, tf32=True)
    assert not torch.equal(plain[0], tf32[0])
    for got, truth in zip(tf32, exact, strict=True):
        assert relative_error(got, truth) <= allowed
    dy = torch.randn(37, 96)
    arguments = (dy, plain[1], case.x, *factors(case), 0.5, 0.0, None)
    doubles = (t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments)
    truth = ops.low_rank_backward(*doubles)
    for got, simple, true in zip(
        ops.low_rank_backward(*arguments, tf32=True), ops.low_rank_backward(*arguments), truth, strict=True
    ):
        assert not torch.equal(got, simple)
        assert relative_error(got, true) <= allowed


@pytest.mark.parametrize("shape", [(2048, 1024, 1024, 64), (40, 2048, 2048, 20)], ids=["readers", "planes"])
def test_planes_are_added_by_a_launch_of_their_own(shape):
    """S and dS have more readers, or more planes, than rereading is worth (heuristics.h)."""
    case = random_case(*shape, 4, dtype=torch.bfloat16)
    exact, s = case.exact(), torch.randn(shape[0], shape[3])

    def check(operator, arguments, doubles):
        plain = getattr(schema, f"_{operator}")(*arguments)
        for triple in zip(getattr(ops, operator)(*arguments), plain, getattr(ops, operator)(*doubles), strict=True):
            assert_error_ratio(*triple, operator, torch.bfloat16)

    tail = (0.5, 0.0, None)
    check("low_rank", (case.x, *factors(case), case.bias, *tail), (exact.x, *factors(exact), exact.bias, *tail))
    check(
        "low_rank_backward",
        (case.x, s, case.x, *factors(case), *tail),
        (exact.x, s.double(), exact.x, *factors(exact), *tail),
    )
