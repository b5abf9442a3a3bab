"""What other people's tools do to an adapted model: quantise, prune, reparametrise, convert, count, offload, cast, shard.

A tool must come to the same as when it is applied to the base first, or say why not. Mostly with `mos_ext.adapt` and
with PEFT; and `unload`, the way back to what no adapter is in.
"""

import copy
import io
import pickle
import re
import warnings
from collections import Counter

import pytest
import torch
from models import BUILDERS, gpt2, inputs, llama, stack
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import mos_ext
from mos_ext.linear import AdaptedLayer, MoSLinear, MoSModule
from mos_ext.ops import loader
from mos_ext.ops.checks import why_not_native

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import accelerate
    import peft
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

    import mos_ext.integrations.peft as mos_peft

# PEFT speaks to transformers about checkpointing in names that transformers is giving up.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated:FutureWarning"
)

RANKS = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2, "private_rank": 1}
WAYS = ("adapt", "peft")
TORCHAO = {"int8": Int8WeightOnlyConfig, "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4)}


def adapt(base, way="adapt", std=0.1, **kwargs):
    """An adapter that does something, the same on every base."""
    kwargs = {**RANKS, "target_modules": "all-linear", **kwargs}
    if way == "adapt":
        model = mos_ext.adapt(base, mos_ext.MoSConfig(**kwargs))
    else:
        model = peft.get_peft_model(base, mos_peft.MoSConfig(**kwargs)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for pool in pools(model):
            pool.shards_a.normal_(std=std)
            pool.shards_b.normal_(std=std)
    return model


def pools(model):
    if hasattr(model, "mos_pools"):
        return model.mos_pools.pools
    return [pool for _, pool in model.base_model._named_pools()]


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def base_of(layer):
    """The module with the weight, where a tool finds it."""
    return layer if isinstance(layer, MoSModule) else layer.base_layer


def batch():
    return torch.arange(1, 23).reshape(2, 11)


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch()).logits


def gradients(model):
    """Of what is trained, by a step of a loss."""
    model.zero_grad()
    model(input_ids=batch()).logits.square().mean().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def learns(model):
    """Whether a step of SGD makes the loss smaller, and every pool has a gradient."""
    trained = [p for pool in pools(model) for p in pool.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=batch()).logits.square().mean()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        losses.append(loss.item())
    return losses[1] < losses[0]


# ------------------------------------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("kind", TORCHAO)
@pytest.mark.parametrize("way", WAYS)
def test_torchao_quantises_every_weight_of_an_adapted_model(way, kind):
    base = llama()
    model = adapt(copy.deepcopy(base), way)
    quantize_(base, TORCHAO[kind]())
    quantize_(model, TORCHAO[kind]())
    quantised = [n for n, p in model.named_parameters() if hasattr(p, "__tensor_flatten__")]
    assert len(quantised) == 29  # seven linears in each of four blocks, and the head
    assert torch.equal(logits(model), logits(adapt(base, way)))
    assert {layer.path for layer in mos_ext.explain(model).layers} == {
        f"the weight of the base layer is a {type(model.get_output_embeddings().weight).__name__}"
    }
    assert learns(model)
    if way == "adapt":
        with pytest.raises(ValueError, match="a merged layer must have a plain weight, got one of which the weight"):
            mos_ext.merge(model)


@pytest.mark.parametrize("way", WAYS)
def test_what_torchao_leaves_alone_stays_as_it_is(way):
    """Conv1D is no nn.Linear, adapted or not: the head alone is one."""
    model = adapt(gpt2(), way)
    want = logits(model)
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and "h." in name
    )
    assert not [n for n, p in model.named_parameters() if hasattr(p, "__tensor_flatten__")]
    assert torch.equal(logits(model), want)


@pytest.mark.filterwarnings("ignore")  # torch.ao, and the dtypes of its weights, are on their way out
def test_dynamic_quantisation_converts_bases_or_leaves_layers_alone():
    """torch.ao looks for the exact class: PEFT's base layers have it, adapted layers have not."""
    quantised = torch.ao.nn.quantized.dynamic.Linear
    model = torch.ao.quantization.quantize_dynamic(adapt(llama()), {nn.Linear})
    assert isinstance(model.lm_head, quantised)
    assert len([m for m in model.modules() if type(m) is MoSLinear]) == 28
    mos_ext.explain(model)
    model = torch.ao.quantization.quantize_dynamic(adapt(llama(), "peft"), {nn.Linear})
    assert all(isinstance(layer.base_layer, quantised) for layer in layers(model).values())
    with model.disable_adapter():
        without = logits(model)
    assert (logits(model) - without).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ pruning, parametrising

# Spectral norm draws a start for its power iteration.
TOOLS = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_computed_from_others(way, tool):
    base = llama()
    model = adapt(copy.deepcopy(base), way)
    (layer,) = [layer for name, layer in layers(model).items() if name.endswith("layers.0.self_attn.q_proj")]
    for module in (base.model.layers[0].self_attn.q_proj, base_of(layer)):
        torch.manual_seed(3)
        TOOLS[tool](module.eval())
    want = adapt(base, way)
    assert torch.equal(logits(model), logits(want))
    assert not torch.equal(logits(model), logits(adapt(llama(), way)))
    assert learns(model)
    assert learns(want)
    assert_same(*([p.grad for pool in pools(m) for p in pool.parameters()] for m in (model, want)))
    if way == "adapt":
        with pytest.raises(ValueError, match="the weight is computed from other parameters"):
            mos_ext.merge(model)
    if tool == "pruned":
        prune.remove(base_of(layer), "weight")
    elif tool == "orthogonal":
        parametrize.remove_parametrizations(base_of(layer), "weight")
    else:
        return
    torch.testing.assert_close(logits(model), logits(want), rtol=1e-5, atol=1e-6)
    assert {layer.path for layer in mos_ext.explain(model).layers} == {"fused with the base layer"}
    if way == "adapt":
        assert type(layer) is MoSLinear
        mos_ext.merge(model)
        torch.testing.assert_close(logits(model), logits(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_pruning_a_conv1d(way):
    base = gpt2()
    model = adapt(copy.deepcopy(base), way)
    for module in (
        base.transformer.h[1].mlp.c_fc,
        base_of(next(m for n, m in layers(model).items() if n.endswith("1.mlp.c_fc"))),
    ):
        prune.l1_unstructured(module, "weight", 0.5)
    assert torch.equal(logits(model), logits(adapt(base, way)))
    assert learns(model)


# ------------------------------------------------------------------------------------------------ converters

FLOAT8 = Float8LinearConfig(emulate=True)


def to_float8(model):
    """torchao's converter, which puts other modules in the place of whatever is an nn.Linear."""
    return convert_to_float8_training(model, module_filter_fn=lambda _, name: "lm_head" not in name, config=FLOAT8)


def test_a_converter_that_replaces_adapted_layers_is_noticed(tmp_path):
    model = to_float8(adapt(llama()))
    assert not layers(model)
    message = (
        "model must keep its adapted layers, got a Float8Linear in place of model.layers.0.self_attn.q_proj (and 27 "
        "others), whose adapter is lost: convert the base before it is adapted, or call mos_ext.unload(model) first"
    )
    for use in (
        logits,
        mos_ext.merge,
        mos_ext.unmerge,
        mos_ext.explain,
        mos_ext.parameter_report,
        lambda model: mos_ext.disabled(model).__enter__(),
        lambda model: mos_ext.save_adapter(model, tmp_path / "adapter"),
        lambda model: mos_ext.export_lora(model, tmp_path / "lora"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            use(model)
    assert not list(tmp_path.iterdir())
    mos_ext.unload(model)  # which leaves what the converter made
    assert torch.equal(logits(model), logits(to_float8(llama())))


def test_both_ways_out_of_a_converter_keep_the_adapter():
    """Converting first, and PEFT, whose base layers are converted where they are."""
    first = adapt(to_float8(llama()))
    assert {layer.path for layer in mos_ext.explain(first).layers} == {"the base layer is a Float8Linear"}
    after = to_float8(adapt(llama(), "peft"))
    torch.testing.assert_close(logits(first), logits(after), rtol=1e-5, atol=1e-6)
    assert (logits(first) - logits(to_float8(llama()))).abs().max() > 1e-2
    assert learns(first.train())


def test_what_was_merged_may_be_converted():
    """The adapter is in the weights then. That it cannot be taken out again is told."""
    model = mos_ext.merge(adapt(llama()))
    assert_same([logits(to_float8(model))], [logits(to_float8(mos_ext.unload(mos_ext.merge(adapt(llama())))))])
    with pytest.raises(ValueError, match="got a Float8Linear in place of"):
        mos_ext.unmerge(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("of", [lambda model: model, copy.deepcopy, pickled, saved])
def test_copies_notice_too_and_wrappers_are_no_replacement(of):
    original = adapt(stack())
    model = of(original)
    x = torch.randn(5, 24)
    want = original(x)
    assert torch.equal(model(x), want)
    layer = model[1].up
    model[1].up = nn.Sequential(layer)  # as checkpointing and offloading wrappers do
    assert torch.equal(model(x), want)
    mos_ext.parameter_report(model)
    model[1].up = nn.Linear(24, 48)
    model[2].down = nn.Identity()
    with pytest.raises(ValueError, match=r"got a Linear in place of 1\.up \(and 1 others\), whose adapter is lost"):
        model(x)
    if model is not original:
        assert torch.equal(original(x), want)
    model[1].up = layer
    with pytest.raises(ValueError, match=r"got a Identity in place of 2\.down, whose adapter"):
        mos_ext.merge(model)


def test_blocks_may_leave_and_layers_may_move():
    model = adapt(
        nn.Sequential(stack(4), nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)])), r=3
    )
    model.forward = lambda x: model[1][-1](model[0](x))
    x = torch.randn(5, 24)
    del model[0][3]  # a whole block: nothing stands in its place
    before = model(x)
    model[1] = nn.ModuleList([model[1][2], model[1][0], model[1][1], model[1][2]])
    assert torch.equal(model(x), before)
    mos_ext.explain(model)


def test_copying_pools_copies_no_model():
    model = adapt(stack())
    copied = copy.deepcopy(model.mos_pools)
    assert len(pickle.dumps(copied)) < sum(p.numel() * 4 for p in model.mos_pools.parameters()) + 60_000
    assert not any(isinstance(value, nn.Linear) for value in vars(copied).values())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch says it to itself
def test_compiled_models_do_not_look():
    model = adapt(stack())
    x = torch.randn(5, 24)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# ------------------------------------------------------------------------------------------------ unload


@pytest.mark.parametrize("name", BUILDERS)
def test_unload_gives_the_base_back(name):
    base, model = BUILDERS[name](), adapt(BUILDERS[name]())
    given = inputs(name)
    assert mos_ext.unload(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert {n: vars(m).keys() for n, m in model.named_modules()} == {n: vars(m).keys() for n, m in base.named_modules()}
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(model(**given).logits, base(**given).logits)
    assert not hasattr(model, "mos_pools")
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="model must be adapted with mos_ext.adapt"):
        mos_ext.unload(model)
    assert torch.equal(adapt(model)(**given).logits, adapt(base)(**given).logits)


def test_unload_keeps_parameters_hooks_attributes_and_ties():
    model, seen = stack(), []
    weight = model[0].up.weight
    model[0].up.tag = "before"
    model[0].up.register_forward_hook(lambda *_: seen.append("before"))
    model[2] = model[1]
    adapt(model)
    model[0].up.register_forward_pre_hook(lambda *_: seen.append("since"))
    model[0].up.note = "since"
    mos_ext.unload(model)
    up = model[0].up
    assert type(up) is nn.Linear
    assert (up.weight is weight, up.tag, up.note) == (True, "before", "since")
    assert model[2] is model[1]
    model(torch.randn(5, 24))
    assert seen == ["since", "before"]


def test_unload_of_called_bases_and_of_compiled_models():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(24, 24), nn.Linear(24, 24))
    own = model[0]
    compiled = torch.compile(adapt(model, target_modules=["0", "1"], r=3), backend="eager")
    assert mos_ext.unload(compiled) is compiled
    assert model[0] is own
    assert [type(m) for m in model] == [Own, nn.Linear]


def test_unload_keeps_what_is_merged():
    model = adapt(llama())
    want = logits(mos_ext.merge(model))
    mos_ext.unload(model)
    assert torch.equal(logits(model), want)
    assert not layers(model)


def test_unload_lets_torch_fuse_an_encoder_again():
    def calls(encoder):
        """How often a linear is called: never where torch reads its weight."""
        seen = []
        handle = register_module_forward_hook(lambda module, *_: seen.append(isinstance(module, nn.Linear)))
        try:
            encoder(torch.ones(1, 3, 24))
        finally:
            handle.remove()
        return sum(seen)

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval().requires_grad_(False)
    before = {name: {k: v for k, v in vars(m).items() if k != "_modules"} for name, m in encoder.named_modules()}
    adapt(encoder, target_modules=["linear1", "linear2"])
    assert (calls(encoder), encoder.use_nested_tensor) == (4, False)
    mos_ext.unload(encoder)
    after = {name: {k: v for k, v in vars(m).items() if k != "_modules"} for name, m in encoder.named_modules()}
    assert after == before
    assert (calls(encoder), encoder.use_nested_tensor) == (0, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: parametrizations.weight_norm(layer), "got a ParametrizedMoSLinear: call torch.nn.utils.param"),
        (
            lambda layer: accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook()),
            "got one .of a hook of accelerate, say.: call accelerate.hooks.remove_hook_from_submodules",
        ),
    ],
)
def test_unload_refuses_layers_that_others_know(change, message):
    model = adapt(stack())
    change(model[1].up)
    want = model(torch.ones(2, 24))
    with pytest.raises(ValueError, match=rf"1\.up: a layer must .*{message}"):
        mos_ext.unload(model)
    assert len(layers(model)) == 6
    assert torch.equal(model(torch.ones(2, 24)), want)


@pytest.mark.parametrize("way", WAYS)
def test_adapting_again_names_unload(way):
    with pytest.raises(ValueError, match=r"start from the base model, or call mos_ext\.unload\(model\) first"):
        adapt(adapt(llama()), way)
    with pytest.raises(ValueError, match=r"start from the base model, or call unload\(\) of the PEFT model first"):
        mos_ext.adapt(adapt(llama(), "peft").get_base_model(), mos_ext.MoSConfig(**RANKS))


# ------------------------------------------------------------------------------------------------ FLOPs

T, FAN_IN, FAN_OUT = 10, 24, 48
BASE, LOW_RANK = 2 * T * FAN_IN * FAN_OUT, 2 * T * RANKS["r"] * (FAN_IN + FAN_OUT)


class Own(nn.Linear):
    """A base that is called."""


@pytest.mark.parametrize("base", [nn.Linear, Own])
@pytest.mark.parametrize("way", WAYS)
def test_flops(way, base):
    """Two per multiply-add. Backward has two products for the adapter where forward has one: of dx and of a factor."""
    model = adapt(nn.Sequential(base(FAN_IN, FAN_OUT)), way, target_modules=["0"], equivalent_rank=4, dropout=0.1)
    x = torch.randn(2, T // 2, FAN_IN, requires_grad=True)
    for _ in range(2):
        with FlopCounterMode(display=False) as forward:
            y = model.train()(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert forward.get_total_flops() == BASE + LOW_RANK
        assert backward.get_total_flops() == BASE + 2 * LOW_RANK


@pytest.mark.parametrize("way", WAYS)
def test_a_counter_leaves_nothing_on_the_handles(way):
    """It hangs hooks on whatever modules return; handles are kept for ever."""
    model = adapt(llama(), way)
    want = gradients(model)
    for _ in range(2):
        with FlopCounterMode(display=False):
            gradients(model)
    assert all(pool.handle(side, k)._backward_hooks is None for pool in pools(model) for side in "ab" for k in range(4))
    assert_same(gradients(model), want)


def test_flops_of_operators_alone():
    pool = mos_ext.ShardPool(mos_ext.MoSConfig(**RANKS), FAN_IN, FAN_OUT, 2)
    operands = pool.shards_a, pool.table("a", 0), pool.shards_b, pool.table("b", 0)
    x, s, dy = torch.randn(T, FAN_IN), torch.randn(T, 4), torch.randn(T, FAN_OUT)
    weight, base = torch.randn(FAN_OUT, FAN_IN), 2 * T * FAN_IN * FAN_OUT
    half_a, half_b = 2 * T * 4 * FAN_IN, 2 * T * 4 * FAN_OUT
    ops = torch.ops.mos_ext
    for op, arguments, want in (
        (ops.shrink, (x, *operands[:2], 0.0, None), half_a),
        (ops.expand, (s, *operands[2:], 1.0, torch.float32), half_b),
        (ops.shrink_backward, (s, x, *operands[:2], 0.0, None), 2 * half_a),
        (ops.expand_backward, (dy, s, *operands[2:], 1.0), 2 * half_b),
        (ops.low_rank, (x, *operands, None, 1.0, 0.0, None), half_a + half_b),
        (ops.low_rank_, (dy.clone(), x, *operands, 1.0, 0.0, None), half_a + half_b),
        (ops.low_rank_backward, (dy, s, x, *operands, 1.0, 0.0, None), 2 * (half_a + half_b)),
        (ops.low_rank_backward_, (x.clone(), dy, s, x, *operands, 1.0, 0.0, None), 2 * (half_a + half_b)),
        (ops.linear, (x, weight, None, *operands, 1.0, 0.0, None), base + half_a + half_b),
        (ops.linear_backward, (dy, s, x, weight, *operands, 1.0, 0.0, None, False), base + 2 * (half_a + half_b)),
        (ops.gather_concat, operands[:2], 0),
    ):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            op(*arguments)
        assert counter.get_total_flops() == want, op


# ------------------------------------------------------------------------------------------------ no values


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("way", WAYS)
def test_the_meta_device(way, build):
    with torch.device("meta"):
        model = adapt(build(), way, dropout=0.1)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = adapt(build(), way, dropout=0.1)
    assert "fused with the base layer" in str(mos_ext.explain(model))
    ids = batch().to("meta")
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        model.zero_grad()
        with context:
            y = model.train()(input_ids=ids).logits
            assert (y.shape, y.device.type) == ((2, 11, 96), "meta")
            y.float().square().mean().backward()
        assert all(p.grad.shape == p.shape for pool in pools(model) for p in pool.parameters())
    for layer in mos_ext.explain(model).layers:
        assert layer.calls == {"fused with the base layer": 2}
    if way == "adapt":
        assert mos_ext.parameter_report(model) == mos_ext.parameter_report(real)
        mos_ext.unmerge(mos_ext.merge(model))
    else:
        model.merge_adapter()
        model.unmerge_adapter()
    model.to_empty(device="cpu")
    for a, b in zip(pools(model), pools(real), strict=True):
        assert torch.equal(a.index_a, b.index_a)
        assert torch.equal(a.index_b, b.index_b)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("way", WAYS)
def test_fake_tensors(way, build):
    with FakeTensorMode():
        model = adapt(build(), way, dropout=0.1)
        y = model.train()(input_ids=torch.ones(2, 11, dtype=torch.long)).logits
        assert (type(y).__name__, y.shape) == ("FakeTensor", (2, 11, 96))
        y.square().mean().backward()
        assert all(p.grad.shape == p.shape for pool in pools(model) for p in pool.parameters())
        mos_ext.explain(model)
        if way == "adapt":
            assert mos_ext.parameter_report(model) == mos_ext.parameter_report(adapt(build()))
            mos_ext.unmerge(mos_ext.merge(model))
        else:
            model.merge_adapter(safe_merge=True)
            model.unmerge_adapter()


def test_fake_tensors_in_the_functional_form():
    pool = mos_ext.ShardPool(mos_ext.MoSConfig(**RANKS), FAN_IN, FAN_OUT, 2)
    real = [t.detach() for t in (pool.shards_a, pool.table("a", 0), pool.shards_b, pool.table("b", 0))]
    with FakeTensorMode() as mode:
        operands = [mode.from_tensor(t) for t in real]
        y = mos_ext.functional.mos_linear(torch.ones(5, FAN_IN), torch.ones(FAN_OUT, FAN_IN), None, *operands, 1.0)
        assert y.shape == (5, FAN_OUT)
        assert mos_ext.functional.gather_concat(*operands[:2]).shape == (4, FAN_IN)


@pytest.mark.parametrize("kind", ["mps", "xpu", "hpu", "privateuseone", "npu", "xla", "mtia", "vulkan"])
def test_device_types_without_kernels(kind):
    assert why_not_native("low_rank", kind) == f"there are no native kernels for {kind} tensors"


def test_device_types_with_kernels():
    assert why_not_native("low_rank", "meta") is None
    for name, kind in (("_C", "cpu"), ("_C_cuda", "cuda")):
        problem = loader.libraries[name].problem
        if problem is not None:
            assert why_not_native("low_rank", kind) == f"{name}: {problem}"
    if loader.libraries["_C"].loaded:
        assert why_not_native("low_rank", "cpu") is None


# ------------------------------------------------------------------------------------------------ offloading, hooks

CPU = torch.device("cpu")


def cpu_offload(model, folder):
    accelerate.cpu_offload(model, execution_device=CPU)


def disk_offload(model, folder):
    accelerate.disk_offload(model, folder, execution_device=CPU)


def dispatched(model, folder):
    """Half of the modules, bases and pools, on disk."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False))
    places = {name: "disk" if i % 2 else "cpu" for i, name in enumerate(owners)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("offload", [cpu_offload, disk_offload, dispatched])
@pytest.mark.parametrize("way", WAYS)
def test_offloading_after_adapting(way, offload, build, tmp_path):
    model = adapt(build(), way)
    want = logits(model)
    offload(model, tmp_path)
    assert any(p.device.type == "meta" for pool in pools(model) for p in pool.parameters())
    assert torch.equal(logits(model), want)
    torch.testing.assert_close(model(input_ids=batch()).logits, want)


@pytest.mark.parametrize("way", WAYS)
def test_pools_that_stay_are_trained_on_an_offloaded_base(way, tmp_path):
    model = adapt(llama(), way)
    want = gradients(model)
    places = {name.rpartition(".")[0]: "cpu" if "mos_" in name else "disk" for name, _ in model.named_parameters()}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert_same(gradients(model), want)


@pytest.mark.parametrize("way", WAYS)
def test_hooks_see_the_pools(way):
    model = adapt(llama(), way)
    want, seen = gradients(model), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert_same(gradients(model), want)
    finally:
        handle.remove()
    assert Counter(seen)["ShardPool"] == 28
    calls = []
    for pool in pools(model):
        pool.register_forward_pre_hook(lambda _, args: calls.append(args))
        pool.register_forward_hook(lambda *_: calls.append("after"))
    assert_same(gradients(model), want)
    assert Counter(calls) == {"after": 28, **{(k, False): 7 for k in range(4)}}


def test_a_hook_may_change_what_a_pool_gives():
    model = adapt(llama())
    for pool in model.mos_pools.pools:
        pool.register_forward_hook(lambda _, args, branch: branch._replace(recipe=branch.recipe._replace(scale=0.0)))
    assert torch.equal(logits(model), logits(llama()))


def cast_by_hooks(module, storage, compute):
    module.to(storage)
    module.register_forward_pre_hook(lambda module, _: module.to(compute) and None)
    module.register_forward_hook(lambda module, *_: module.to(storage) and None)


def cast_in_forward(module, storage, compute):
    """As diffusers' layer-wise casting does it."""
    module.to(storage)
    forward = module.forward

    def cast(*args, **kwargs):
        module.to(compute)
        out = forward(*args, **kwargs)
        module.to(storage)
        return out

    module.forward = cast


@pytest.mark.parametrize("cast", [cast_by_hooks, cast_in_forward])
@pytest.mark.parametrize("way", WAYS)
def test_pools_stored_in_another_dtype(way, cast):
    model = adapt(llama(), way)
    for pool in pools(model):
        pool.to(torch.bfloat16).to(torch.float32)
    want = logits(model)
    for pool in pools(model):
        cast(pool, torch.bfloat16, torch.float32)
    assert torch.equal(logits(model), want)
    assert {p.dtype for pool in pools(model) for p in pool.parameters()} == {torch.bfloat16}
    assert torch.equal(model(input_ids=batch()).logits, want)


@pytest.mark.parametrize("cast", [cast_by_hooks, cast_in_forward])
@pytest.mark.parametrize("way", WAYS)
def test_weights_stored_in_float8(way, cast):
    """Layer by layer, of whatever is an nn.Linear in a block: bases, not pools."""
    base = llama()
    model = adapt(copy.deepcopy(base), way)
    for module in base.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.float8_e4m3fn).to(torch.float32)
    found = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    assert len(found) == 28
    for module in found:
        cast(module, torch.float8_e4m3fn, torch.float32)
    want = logits(adapt(base, way))
    assert torch.equal(logits(model), want)
    assert {m.weight.dtype for m in found} == {torch.float8_e4m3fn}
    if way == "peft":  # diffusers calls this around such models
        with peft.helpers.disable_input_dtype_casting(model):
            assert torch.equal(logits(model), want)


def test_what_tools_set_on_a_module_is_still_there():
    base = llama()
    linear = base.model.layers[0].self_attn.q_proj
    linear.tag, linear._is_hf_initialized, linear.weight.tag = {"of": "a tool"}, True, "of the weight"
    model = adapt(base)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer is not linear
    assert isinstance(layer, nn.Linear)
    assert (layer.tag, layer._is_hf_initialized, layer.weight.tag) == ({"of": "a tool"}, True, "of the weight")
    missing = vars(nn.Linear(2, 3)).keys() - vars(layer).keys()
    assert not missing
