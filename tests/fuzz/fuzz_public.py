"""The public face under odd input: whatever it is given, the result is right, or the error is a documented one and
nothing has changed. ``make fuzz`` runs this for a few minutes; the test-suite does not.
"""

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import randomize, stack
from torch import nn

import mos_ext
from mos_ext import MoSConfig, MoSLinear, ShardPool, reference
from mos_ext.adapt import mos_layers
from mos_ext.functional import gather_concat, mos_linear
from mos_ext.linear import AdaptedLayer

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENTED = (TypeError, ValueError)


def fuzz(examples):
    """So many examples per test that all of them together take about four minutes on two cores."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(deadline=None, max_examples=examples, suppress_health_check=checks, print_blob=True)


def often(usual, odd):
    """Four times in five what people write, so that several odd arguments do not hide each other."""
    return st.integers(0, 4).flatmap(lambda n: odd if n == 0 else usual)


HUGE = st.sampled_from([10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**30, -(2**63), -(10**30)])
NUMBERS = st.one_of(st.integers(-3, 300), HUGE, st.floats(), st.booleans(), st.just(10**400))
NAMES = st.sampled_from(
    ["up", "down", "0.up", "1", "q_proj", "", "(", ".*", r"\d+\.up", "all-linear", "\x00", "é", "[a"]
)
ANYTHING = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.lists(st.integers(), max_size=3),
)
SELECTIONS = st.one_of(NAMES, st.lists(NAMES, max_size=3), st.sets(NAMES, max_size=2))


def patterns(values):
    return often(st.dictionaries(NAMES, values, max_size=2), ANYTHING)


FIELDS = {
    "r": often(st.integers(1, 12), ANYTHING),
    "equivalent_rank": often(st.integers(1, 8), ANYTHING),
    "shards_per_vector": often(st.sampled_from([1, 2, 3, 4, 8]), ANYTHING),
    "private_rank": often(st.integers(0, 3), ANYTHING),
    "alpha": often(st.floats(-8, 8), ANYTHING),
    "dropout": often(st.just(0.0), ANYTHING),
    "target_modules": often(
        st.sampled_from(["all-linear", ("up",), ("up", "down"), r".*\.up"]), st.one_of(SELECTIONS, ANYTHING)
    ),
    "exclude_modules": often(st.just(()), st.one_of(SELECTIONS, ANYTHING)),
    "layers_to_transform": often(st.none(), st.one_of(st.lists(st.integers(-1, 3), max_size=3), ANYTHING)),
    "layers_pattern": often(st.none(), st.one_of(SELECTIONS, ANYTHING)),
    "rank_pattern": patterns(often(st.integers(1, 12), ANYTHING)),
    "alpha_pattern": patterns(often(st.floats(-8, 8), ANYTHING)),
    "use_rslora": often(st.booleans(), ANYTHING),
    "pair_dissociation": often(st.booleans(), ANYTHING),
    "routing": often(st.sampled_from(["random", "balanced"]), ANYTHING),
    "pool_dtype": often(
        st.sampled_from(["float32", "float64", torch.float32]),
        st.one_of(ANYTHING, st.sampled_from([torch.int8, "bfloat16"])),
    ),
    "seed": often(st.integers(0, 9), ANYTHING),
}
CONFIGS = st.fixed_dictionaries({}, optional=FIELDS)
SMALL = {"r": st.integers(1, 6), "equivalent_rank": st.integers(1, 4), "shards_per_vector": st.sampled_from([1, 2, 4])}


def config_of(values):
    """The configuration, or None where the values are refused as they should be."""
    try:
        return MoSConfig(**values)
    except DOCUMENTED:
        return None


@fuzz(3000)
@given(CONFIGS)
def test_configurations(values):
    config = config_of(values)
    if config is not None:
        assert 1 <= config.r <= 256
        assert 0 <= config.private_rank <= config.equivalent_rank <= 256
        assert math.isfinite(config.scale)
        assert MoSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert hash(config) == hash(MoSConfig.from_dict(config.to_dict()))


class Model(nn.Module):
    """Blocks, a gate that nothing divides, an attention that reads a weight, a layer of its own shape, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks, self.gate = stack(2, 8), nn.ModuleList([nn.Linear(8, 1)])
        self.attention = nn.ModuleList([nn.MultiheadAttention(8, 2)])
        self.up, self.head = nn.ModuleList([nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)]), nn.Linear(8, 5)

    def forward(self, x):
        h = self.blocks(x)
        h = h + self.attention[0](h, h, h)[0] + torch.sigmoid(self.gate[0](h))
        return self.head(h + self.up[2](self.up[1](self.up[0](h))))


def snapshot(model):
    return {
        **{name: type(module) for name, module in model.named_modules()},
        **{name: (parameter.requires_grad, parameter.clone()) for name, parameter in model.named_parameters()},
    }


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, tuple):
            assert now[key][0] == value[0]
            assert torch.equal(now[key][1], value[1])
        else:
            assert now[key] is value


@fuzz(400)
@given(CONFIGS)
def test_adapting(values):
    config = config_of(values)
    if config is None:
        return
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 4, 8)
    want, before = model(x), snapshot(model)
    try:
        mos_ext.adapt(model, config)
    except DOCUMENTED:
        assert_unchanged(model, before)
        return
    layers = dict(mos_layers(model))
    assert layers
    if config.pool_dtype != "float32" or abs(config.alpha) > 100 or config.alpha_pattern:
        return  # pools of another dtype want inputs of it; large scales overflow
    torch.testing.assert_close(model(x), want)
    randomize(model)
    model(x)
    for name, layer in layers.items():
        assert layer.paths, name  # is called, never just read
        a, b = layer.factors()
        assert a.shape[0] == model.mos_pools.config.rank_of(name)
        assert 1 <= a.shape[0] <= 256
        h = torch.randn(5, layer.in_features)
        dense = nn.functional.linear(h.double(), layer.weight.double(), layer.bias.double())
        dense = dense + layer.scale * (h.double() @ a.double().T) @ b.double().T
        torch.testing.assert_close(
            layer(h).double(), dense, rtol=1e-4, atol=1e-4 * max(1.0, float(dense.detach().abs().max()))
        )
    with tempfile.TemporaryDirectory() as folder:
        mos_ext.save_adapter(model, folder)
        torch.manual_seed(0)
        assert torch.equal(mos_ext.load_adapter(Model().eval(), folder)(x), model(x))


# (Features of 10^9 are allocated as asked.)
POOL = {
    name: often(st.sampled_from([4, 8, 12]), ANYTHING.filter(lambda n: type(n) is not int or not 10**4 < n < 2**31))
    for name in ("in_features", "out_features")
}


@fuzz(800)
@given(
    st.fixed_dictionaries(SMALL),
    st.fixed_dictionaries(
        POOL,
        optional={
            "num_layers": often(st.integers(1, 3), NUMBERS),
            "ranks": st.lists(often(st.integers(1, 6), ANYTHING), max_size=3),
            "scales": st.lists(often(st.floats(-2, 2), ANYTHING), max_size=3),
        },
    ),
)
def test_pools(config, arguments):
    config = config_of({**config, "private_rank": 0})
    try:
        pool = ShardPool(config, **arguments)
    except DOCUMENTED:
        return
    assert len(pool.ranks) == len(pool.scales) == pool.num_layers
    for k in range(pool.num_layers):
        a, b = pool.factors(k)
        assert a.shape == (pool.ranks[k], pool.in_features)
        assert b.shape == (pool.out_features, pool.ranks[k])
        assert pool.ranks[k] >= 1
        assert math.isfinite(pool.scales[k])


@fuzz(500)
@given(
    st.fixed_dictionaries(SMALL),
    st.fixed_dictionaries(
        {
            name: often(st.sampled_from([4, 8]), st.one_of(st.integers(-3, 9), st.none(), st.floats(), st.text()))
            for name in POOL
        },
        optional={
            "layer": often(st.just(0), ANYTHING),
            "config": often(st.just("the"), ANYTHING),
            "pool": often(st.none(), ANYTHING),
            "bias": st.booleans(),
        },
    ),
)
def test_layers(config, arguments):
    config = config_of({**config, "private_rank": 0})
    if arguments.get("config", "the") == "the":
        arguments["config"] = config
    sizes = [arguments[name] for name in POOL]
    if not all(type(size) is int and size >= 0 for size in sizes):
        return  # nn.Linear's own words
    try:
        layer = MoSLinear(**arguments)
    except DOCUMENTED:
        return
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from(
    [torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64]
)
TENSORS = st.one_of(st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), SHAPES, DTYPES), ANYTHING)
FACTORS = {
    "x": (2, 8),
    "weight": (4, 8),
    "bias": (4,),
    "pool_a": (6, 4),
    "index_a": (3, 2),
    "pool_b": (6, 2),
    "index_b": (3, 2),
}


@fuzz(700)
@given(st.data())
def test_operator(data):
    arguments = {}
    for name, shape in FACTORS.items():
        good = torch.randint(0, 6, shape, dtype=torch.int32) if name.startswith("index") else torch.randn(shape)
        odd = st.one_of(TENSORS, st.integers(-2, 9).map(lambda n, good=good: torch.full_like(good, n)))
        arguments[name] = data.draw(
            st.integers(0, 9).flatmap(lambda n, good=good, odd=odd: odd if n == 0 else st.just(good))
        )
    arguments["scale"] = data.draw(often(st.floats(-2, 2), ANYTHING))
    options = data.draw(st.fixed_dictionaries({}, optional={"dropout": often(st.just(0.0), ANYTHING)}))
    try:
        y = mos_linear(**arguments, **options)
    except DOCUMENTED:
        return
    assert y.shape[:-1] == arguments["x"].shape[:-1]
    arguments["scale"] = float(arguments["scale"])
    if abs(arguments["scale"]) < 100 and options.get("dropout", 0.0) == 0:
        torch.testing.assert_close(y, reference.mos_linear(**arguments), rtol=1e-3, atol=1e-3)


@fuzz(600)
@given(
    often(st.just(torch.randn(6, 4)), TENSORS),
    often(st.just(torch.tensor([[0, 5], [1, 1]], dtype=torch.int32)), TENSORS),
)
def test_gathering(pool, index):
    try:
        out = gather_concat(pool, index)
    except DOCUMENTED:
        return
    assert torch.equal(out, pool[index.long()].reshape(index.shape[0], index.shape[1] * pool.shape[1]))


# --------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = randomize(mos_ext.adapt(Model().eval(), MoSConfig(r=4, equivalent_rank=4, shards_per_vector=2)))
    mos_ext.save_adapter(model, folder)
    return folder, model


def load_mutated(saved, mutate):
    """What ``load_adapter`` makes of a mutated copy of the files: outputs, or None after a documented error."""
    source, _ = saved
    torch.manual_seed(0)
    model = Model().eval()
    before = snapshot(model)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        mutate(Path(folder))
        try:
            mos_ext.load_adapter(model, folder)
        except (*DOCUMENTED, FileNotFoundError):
            assert_unchanged(model, before)
            assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
            return None
    x = torch.linspace(-1, 1, 32).reshape(1, 4, 8)
    return model(x), saved[1](x)


@fuzz(400)
@given(st.data())
def test_mutated_configurations(saved, data):
    """A file beside weights that were saved with another one is refused, whatever was changed; but for the scale of the
    product, which one may set by hand, as of LoRA."""
    scaled = []

    def mutate(folder):
        file = folder / "adapter_config.json"
        values = json.loads(file.read_text())
        key = data.draw(st.sampled_from([*sorted(values), "unknown"]))
        kind = data.draw(st.sampled_from(["set", "delete", "text", "cut"]))
        if key in ("alpha", "alpha_pattern", "use_rslora"):
            scaled.append(key)
        if kind == "set":
            values[key] = data.draw(st.one_of(FIELDS.get(key, ANYTHING), ANYTHING))
            try:
                file.write_text(json.dumps(values))
            except (TypeError, ValueError):
                return
        elif kind == "delete":
            values.pop(key, None)
            file.write_text(json.dumps(values))
        elif kind == "text":
            file.write_bytes(
                data.draw(st.one_of(st.binary(max_size=40), st.sampled_from([b"[]", b"null", b"[" * 9999, b"{}"])))
            )
        else:
            file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, 400))])

    outputs = load_mutated(saved, mutate)
    if outputs is not None and not scaled:
        torch.testing.assert_close(*outputs)


@fuzz(400)
@given(st.data())
def test_mutated_weights(saved, data):
    def mutate(folder):
        file = folder / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        header = int.from_bytes(content[:8], "little") + 8
        kind = data.draw(st.sampled_from(["header", "header", "cut", "append"]))
        if kind == "header":
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            content += data.draw(st.binary(min_size=1, max_size=9))
        file.write_bytes(content)

    outputs = load_mutated(saved, mutate)
    if outputs is not None:
        torch.testing.assert_close(*outputs)
