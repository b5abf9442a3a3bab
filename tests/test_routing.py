"""Index tables: the paper's draw, its invariants over all configurations, and tables that never change."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mos_ext import MoSConfig, routing
from mos_ext.routing import IndexTables, check_ranks, check_tables, draw_tables, invert


@st.composite
def cases(draw):
    layers, l = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    e = draw(st.integers(1, 8))
    p = draw(st.integers(0, e))
    r = e if p == e else draw(st.integers(max(1, p), p + (e - p) * layers))
    return MoSConfig(
        r=min(r, 256),
        equivalent_rank=e,
        shards_per_vector=l,
        private_rank=p,
        pair_dissociation=draw(st.booleans()),
        routing=draw(st.sampled_from(["random", "balanced"])),
        seed=draw(st.integers(0, 2**40)),
    ), layers


@given(cases(), st.data())
@settings(max_examples=300, deadline=None)
def test_invariants(case, data):
    config, layers = case
    r, p, l = config.r, config.private_rank, config.shards_per_vector
    lowest = r if p == config.equivalent_rank else max(p, 1)
    ranks = data.draw(st.lists(st.integers(lowest, r), min_size=layers, max_size=layers), label="ranks")
    for rank in ranks:
        check_ranks(config, l, l, layers, r=rank)
    tables = draw_tables(config, "model.layers.*.q[8->8]", ranks)
    check_tables(config, tables, ranks)
    r = max(ranks)
    n_public, n = config.num_public_shards(layers), config.num_shards(layers)
    for table in (tables.a, tables.b):
        assert table.shape == (layers, r, l)
        assert table.dtype == np.int32
        for k in range(layers):
            public, private = table[k, : r - p].ravel(), table[k, r - p :].ravel()
            assert len(set(public.tolist())) == public.size  # without replacement inside a layer
            assert ((public >= 0) & (public < n_public)).all()
            assert private.tolist() == list(range(n_public + k * p * l, n_public + (k + 1) * p * l))
            assert (private < n).all()
        if config.routing == "balanced":  # counting what each layer uses, the last rows
            used = np.concatenate([table[k, r - rank : r - p].ravel() for k, rank in enumerate(ranks)])
            uses = np.bincount(used, minlength=n_public)[:n_public]
            assert uses.size == 0 or uses.max() - uses.min() <= 1
    assert np.array_equal(tables.a[:, r - p :], tables.b[:, r - p :])  # private vectors stay paired
    if not config.pair_dissociation:
        assert np.array_equal(tables.a, tables.b)
    again = draw_tables(config, "model.layers.*.q[8->8]", ranks)
    assert np.array_equal(tables.a, again.a)
    assert np.array_equal(tables.b, again.b)


GOLDEN_FIRST = [[0, 2], [7, 5], [6, 1], [8, 9]]
GOLDEN_DIGEST = "81a3c29508dff13b7c4087fe606a49dc32480623bdbda087380e4e02113f66d6"


def test_tables_never_change():
    """Frozen: files do not depend on the generator, but experiments do."""
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=1, seed=0)
    tables = draw_tables(config, "q", [config.r] * 4)
    digest = hashlib.sha256(tables.a.tobytes() + tables.b.tobytes()).hexdigest()
    assert tables.a[0].tolist() == GOLDEN_FIRST
    assert digest == GOLDEN_DIGEST


def test_streams_are_distinct():
    config = MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1)
    tables = draw_tables(config, "q", [config.r] * 32)
    other = draw_tables(config, "k", [config.r] * 32)
    reseeded = draw_tables(
        MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1, seed=1), "q", [16] * 32
    )
    assert not np.array_equal(tables.a, tables.b)  # pair dissociation
    assert not np.array_equal(tables.a[0], tables.a[1])
    assert not np.array_equal(tables.a, other.a)
    assert not np.array_equal(tables.a, reseeded.a)


def test_the_draw_is_uniform():
    """Every public shard is as likely as any other at every position: chi-squared below mean + 6 standard deviations."""
    config = MoSConfig(r=8, equivalent_rank=8, shards_per_vector=1, private_rank=0)
    counts = np.zeros((8, 64))
    trials = 4000
    for seed in range(trials):
        table = draw_tables(MoSConfig(**{**config.to_dict(), "seed": seed}), "q", [config.r] * 8).a[seed % 8]
        counts[np.arange(8), table[:, 0]] += 1
    expected = trials / 64
    chi2 = ((counts - expected) ** 2 / expected).sum(1)
    assert (chi2 < 63 + 6 * (2 * 63) ** 0.5).all()


def test_unused_shards_match_the_paper_s_probability():
    """MOS facts: e=8, r=16, p=1, L=32 leaves (1 - 15/224)^32 = 10.9% of public shards unused by the random draw, none by the balanced one."""
    unused = []
    for seed in range(20):
        config = MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1, seed=seed)
        a = draw_tables(config, "q", [config.r] * 32).a[:, :15]
        unused.append(1 - len(np.unique(a)) / 896)
    assert abs(np.mean(unused) - 0.109) < 0.01
    balanced = draw_tables(
        MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1, routing="balanced"), "q", [16] * 32
    )
    assert len(np.unique(balanced.a[:, :15])) == 896


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a[:2], r"index_a must have the shape \(3, 4, 2\) of its configuration, got \(2, 4, 2\)"),
        (lambda a: np.where(a == a[0, 0, 0], 12, a), r"index_a must use public shards in \[0, 12\), got \d+ to 12"),
        (lambda a: np.where(a == a[1, 0, 1], a[1, 0, 0], a), "index_a must not use a public shard twice in one layer"),
        (
            lambda a: np.concatenate([a[:, :3], a[:, :2, :][:, 1:]], axis=1),
            "index_a must end with the 1 private ranks of each layer",
        ),
    ],
)
def test_contradicting_tables(spoil, message):
    config = MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=1)
    tables = draw_tables(config, "q", [config.r] * 3)
    check_tables(config, tables, [config.r] * 3)
    with pytest.raises(ValueError, match=message):
        check_tables(config, IndexTables(spoil(tables.a), tables.b), [config.r] * 3)


def test_paired_tables_must_agree():
    config = MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=1, pair_dissociation=False)
    dissociated = draw_tables(MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=1), "q", [4] * 3)
    with pytest.raises(ValueError, match="index_b must equal index_a when pair_dissociation is False"):
        check_tables(config, dissociated, [4] * 3)


@pytest.mark.parametrize(
    ("config", "shape", "layers", "message"),
    [
        (
            MoSConfig(shards_per_vector=5),
            (64, 96),
            9,
            "shards_per_vector must divide in_features=64 of the layer, got 5; nearest valid: 4 or 8",
        ),
        (
            MoSConfig(shards_per_vector=64),
            (64, 96),
            9,
            "shards_per_vector must divide out_features=96 of the layer, got 64; nearest valid: 32",
        ),
        (
            MoSConfig(r=16, equivalent_rank=4),
            (64, 64),
            4,
            "r must be at most 13 for the layer, whose pool has 4 adapted modules, got 16; nearest valid: r=13, or equivalent_rank=5",
        ),
    ],
)
def test_check_ranks(config, shape, layers, message):
    with pytest.raises(ValueError, match=message):
        check_ranks(config, *shape, layers)


def test_nearest_valid_values_are_valid():
    for r, e, p, layers in ((16, 4, 1, 4), (40, 2, 1, 7), (9, 1, 0, 8)):
        with pytest.raises(ValueError, match="nearest valid") as caught:
            check_ranks(MoSConfig(r=r, equivalent_rank=e, private_rank=p), 64, 64, layers)
        text = str(caught.value)
        largest = int(text.split("nearest valid: r=")[1].split(",")[0])
        needed = int(text.split("equivalent_rank=")[1].split(",")[0])
        check_ranks(MoSConfig(r=largest, equivalent_rank=e, private_rank=p), 64, 64, layers)
        check_ranks(MoSConfig(r=r, equivalent_rank=needed, private_rank=p), 64, 64, layers)
        for bad in ({"r": largest + 1, "equivalent_rank": e}, {"r": r, "equivalent_rank": needed - 1}):
            if bad["equivalent_rank"] >= max(1, p):
                with pytest.raises(ValueError, match="must"):
                    check_ranks(MoSConfig(private_rank=p, **bad), 64, 64, layers)


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_invert(num_shards, shapes, data):
    """Every entry once, at its shard, in the order of tables and positions."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tables = [draw.integers(0, num_shards, shape).astype(np.int32) for shape in shapes]
    starts, places = invert(tables, num_shards)
    assert (starts.dtype, places.dtype, starts.shape) == (np.int32, np.int32, (num_shards + 1,))
    uses = [
        [(k, q) for k, t in enumerate(tables) for q, m in enumerate(t.ravel()) if m == s] for s in range(num_shards)
    ]
    assert [[tuple(p) for p in places[a:b].tolist()] for a, b in itertools.pairwise(starts)] == uses
    assert (starts[0], starts[-1]) == (0, len(places))


def test_the_smallest_keys_are_those_of_a_sort():
    """Ties go to the first, however few are wanted."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        keys = generator.integers(0, 12, generator.integers(1, 60)).astype(np.uint64)
        for count in (0, 1, len(keys) // 2, len(keys), len(keys) + 1):
            assert np.array_equal(routing._smallest(keys, count), np.argsort(keys, kind="stable")[:count])


def test_layers_draw_together_what_each_draws_alone(monkeypatch):
    config, ranks = MoSConfig(r=5, equivalent_rank=3, shards_per_vector=4, private_rank=1, seed=7), (5, 3, 5, 4)
    together = draw_tables(config, "q_proj[8->8]", ranks)
    monkeypatch.setattr(routing, "_SORTED", 0)
    alone = draw_tables(config, "q_proj[8->8]", ranks)
    assert np.array_equal(together.a, alone.a)
    assert np.array_equal(together.b, alone.b)
