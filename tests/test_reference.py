"""The oracle itself: against hand-worked cases and against the dense float64 definition of the method."""

import torch

from mos_ext import reference


def test_gather_concat_by_hand():
    pool = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    index = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    assert reference.gather_concat(pool, index).tolist() == [[5, 6, 1, 2], [3, 4, 3, 4]]


def test_scatter_add_by_hand():
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    index = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    assert reference.scatter_add([grad], [index], 4).tolist() == [[3, 4], [12, 14], [1, 2], [0, 0]]
    assert reference.scatter_add([grad, grad], [index, index], 4).tolist() == [[6, 8], [24, 28], [2, 4], [0, 0]]
    assert reference.scatter_add([grad[:0], grad], [index, index], 4).tolist() == [[3, 4], [12, 14], [1, 2], [0, 0]]


def test_linear_by_hand():
    # in = out = 2, r = 1, l = 2: A = [pool_a[1], pool_a[0]] = [10, 1], B = [2, 3]^T, scale 0.5
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([100.0, 200.0])
    pool_a, index_a = torch.tensor([[1.0], [10.0]]), torch.tensor([[1, 0]], dtype=torch.int32)
    pool_b, index_b = torch.tensor([[2.0], [3.0]]), torch.tensor([[0, 1]], dtype=torch.int32)
    y = reference.mos_linear(x, weight, bias, pool_a, index_a, pool_b, index_b, 0.5)
    assert y.tolist() == [[1 + 100 + 0.5 * 12 * 2, 2 + 200 + 0.5 * 12 * 3]]


def test_against_the_dense_definition():
    """A and B built element by element from the definition, then y = x (W + scale B A)^T + bias."""
    generator = torch.Generator().manual_seed(3)
    n, r, l, fan_in, fan_out, scale = 20, 4, 3, 12, 9, 0.7
    pool_a = torch.randn(n, fan_in // l, generator=generator, dtype=torch.float64)
    pool_b = torch.randn(n, fan_out // l, generator=generator, dtype=torch.float64)
    index_a = torch.randint(n, (r, l), generator=generator, dtype=torch.int32)
    index_b = torch.randint(n, (r, l), generator=generator, dtype=torch.int32)
    a = torch.tensor(
        [[pool_a[index_a[j, c // 4], c % 4] for c in range(fan_in)] for j in range(r)], dtype=torch.float64
    )
    b = torch.tensor(
        [[pool_b[index_b[j, c // 3], c % 3] for j in range(r)] for c in range(fan_out)], dtype=torch.float64
    )
    x = torch.randn(5, fan_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64)
    bias = torch.randn(fan_out, generator=generator, dtype=torch.float64)
    y = reference.mos_linear(x, weight, bias, pool_a, index_a, pool_b, index_b, scale)
    torch.testing.assert_close(y, x @ (weight + scale * b @ a).T + bias, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(reference.delta_weight(pool_a, index_a, pool_b, index_b, scale), scale * b @ a)


def test_backward_formulas_are_autograd_s():
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    pool, x, s = normal(10, 4), normal(6, 8), normal(6, 3)
    index = torch.randint(10, (3, 2), generator=generator, dtype=torch.int32)
    seed = torch.tensor([11])
    ds, dy = torch.ones(6, 3, dtype=torch.float64), torch.ones(6, 8, dtype=torch.float64)
    dx, factor = reference.shrink_backward(ds, x, pool, index, 0.3, seed)
    want = torch.autograd.grad(reference.shrink(x, pool, index, 0.3, seed), (x, pool), ds)
    torch.testing.assert_close(dx, want[0])
    torch.testing.assert_close(reference.scatter_add([factor], [index], 10), want[1])
    d_s, factor = reference.expand_backward(dy, s, pool, index, 0.7)
    want = torch.autograd.grad(reference.expand(s, pool, index, 0.7, torch.float64), (s, pool), dy)
    torch.testing.assert_close(d_s, want[0])
    torch.testing.assert_close(reference.scatter_add([factor], [index], 10), want[1])


def test_philox_known_answers():
    """The published vectors are for ten rounds; seven rounds of zeros and ones were worked out with an independent integer implementation."""

    def by_integers(seed, counter):
        c, k = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(7):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
        return c

    for seed, group, row in ((0, 0, 0), (2**62 - 1, 5, 7), (0x0123456789ABCDEF, 2**31, 2**33 + 3)):
        words = reference.philox(torch.tensor(seed), torch.tensor(group), torch.tensor(row))
        assert [int(w) for w in words] == by_integers(seed, (group, row & 0xFFFFFFFF, row >> 32, 0))


def test_dropout_statistics():
    """Kept fraction and mean within six standard deviations; 0.25 is exact in 1/65536, so the scale is exactly 4/3."""
    x = torch.ones(256, 1000, dtype=torch.float64)
    y = reference.dropout(x, 0.25, torch.tensor([5]))
    kept = (y != 0).double().mean().item()
    assert abs(kept - 0.75) < 6 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert set(y.unique().tolist()) == {0.0, 4 / 3}
    assert not torch.equal(y, reference.dropout(x, 0.25, torch.tensor([6])))
    assert torch.equal(reference.dropout(x, 0.0, torch.tensor([5])), x)


def test_dropout_neighbours_are_independent():
    """Correlation of the masks of neighbouring columns, rows and seeds: below six standard deviations of an independent pair."""
    mask = reference.dropout_mask(512, 512, 0.5, torch.tensor([1])).double() - 0.5
    other = reference.dropout_mask(512, 512, 0.5, torch.tensor([2])).double() - 0.5
    for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask[:, 8:], mask[:, :-8]), (mask, other)):
        assert abs((4 * a * b).mean().item()) < 6 / a.numel() ** 0.5
