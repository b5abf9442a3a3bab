"""Adapters on quantised bases: bitsandbytes, torchao, and a layer of the user's own; with `mos_ext.adapt` and with PEFT.

What a base computes is taken from the base itself, called alone; what the adapter adds is the reference's, in float64.
"""

import copy
import re
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from models import llama
from safetensors.torch import load_file
from torch import nn

import mos_ext
from mos_ext import reference
from mos_ext.linear import MoSModule
from mos_ext.testing import assert_error_ratio, relative_error

with warnings.catch_warnings():
    # bitsandbytes imports scipy-like helpers of torch.jit; torch says of them that they are on their way out.
    warnings.filterwarnings("ignore", r".torch\.jit\.script_method. is deprecated", DeprecationWarning)
    import bitsandbytes as bnb
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

import mos_ext.integrations.peft as mos_peft

# PEFT speaks to transformers about checkpointing in names that transformers is giving up.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated:FutureWarning"
)

RANKS = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2, "private_rank": 1, "alpha": 10}
WAYS = ("adapt", "peft")
BITSANDBYTES = ("nf4", "nf4-bf16", "int8")
TORCHAO = {"torchao-int8": Int8WeightOnlyConfig, "torchao-int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4)}
LIBRARIES = (*BITSANDBYTES, *TORCHAO)
KINDS = (*LIBRARIES, "own")
# How far the same logits are apart when products are summed in another order: float32's rounding, but where the base
# rounds activations to bfloat16, or (bitsandbytes' 8-bit inference) to 8 bits of a row's largest.
ANOTHER_ORDER = {**dict.fromkeys(KINDS, 1e-5), "nf4-bf16": 2e-2, "int8": 5e-3}


# ------------------------------------------------------------------------------------------------ quantised models


class OwnLinear(nn.Module):
    """A user's own: int8 codes and a scale per row. Nothing of it is called weight, and it is no nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scales).round().to(torch.int8))
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scales.to(x.dtype), self.offset)


def quantised(linear, kind):
    """One linear, quantised by hand."""
    shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach().clone()
    if kind == "own":
        return OwnLinear(linear)
    if kind in TORCHAO:
        out = nn.Linear(*shape, bias, dtype=weight.dtype)
        out.load_state_dict(linear.state_dict())
        quantize_(out.requires_grad_(False), TORCHAO[kind]())
        return out
    if kind == "int8":
        out = bnb.nn.Linear8bitLt(*shape, bias, has_fp16_weights=False)
        out.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        compute = torch.bfloat16 if kind == "nf4-bf16" else torch.float32
        out = bnb.nn.Linear4bit(*shape, bias, compute_dtype=compute, compress_statistics=True, quant_type="nf4")
        out.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    if bias:
        # bitsandbytes converts it to this at the first call, in place.
        bias_dtype = weight.dtype if kind == "int8" else compute
        out.bias = nn.Parameter(linear.bias.detach().to(bias_dtype, copy=True), requires_grad=False)
    return never_pack(out.to("cpu"))


def never_pack(model):
    """Without the packing that bitsandbytes does on CPUs with AVX512-BF16 at the first inference.

    What is packed has no gradient any more and computes in bfloat16 (bitsandbytes 0.50), with an adapter or without:
    tests would depend on the machine. One test below leaves it as it is.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def quantise(model, kind):
    """Every linear in a numbered block."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and re.search(r"\d", name):
            model.set_submodule(name, quantised(module, kind))
    if kind in TORCHAO:
        # Where transformers leaves, and PEFT looks for, how to quantise anew what was merged.
        model.hf_quantizer = SimpleNamespace(
            quantization_config=SimpleNamespace(get_apply_tensor_subclass=TORCHAO[kind])
        )
    return model.eval()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def stack(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return quantise(nn.Sequential(*(Block() for _ in range(3))).to(dtype), kind)


def model(kind, dtype=torch.float32):
    return quantise(llama(3, intermediate_size=128).to(dtype), kind)


def batch():
    torch.manual_seed(5)
    return {"input_ids": torch.randint(1, 96, (2, 11))}


def adapt(base, way, std=0.1, **kwargs):
    """An adapter that does something, unless ``std`` is None."""
    own = any(isinstance(m, OwnLinear) for m in base.modules())  # which "all-linear" does not take for a linear
    kwargs = {**RANKS, "target_modules": r".*\b\d+\..*(up|down|_proj)" if own else "all-linear", **kwargs}
    if way == "adapt":
        out = mos_ext.adapt(base, mos_ext.MoSConfig(**kwargs))
    else:
        out = peft.get_peft_model(base, mos_peft.MoSConfig(**kwargs)).eval()
    return out if std is None else randomise(out, std=std)


def randomise(adapted, name="default", std=0.1, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for pool in pools(adapted, name):
            pool.shards_a.normal_(std=std)
            pool.shards_b.normal_(std=std)
    return adapted


def pools(adapted, name="default"):
    if not isinstance(adapted, peft.PeftModel):
        return adapted.mos_pools.pools
    return [pool for adapter, pool in adapted.base_model._named_pools() if adapter == name]


def layers(adapted):
    return {n: m for n, m in adapted.named_modules() if isinstance(m, (MoSModule, mos_peft.MoSLinear))}


def pool_of(layer, name="default"):
    return layer.adapter(None if isinstance(layer, MoSModule) else name)


def off(adapted):
    return adapted.disable_adapter() if isinstance(adapted, peft.PeftModel) else mos_ext.disabled(adapted)


def bits(module):
    """Everything a base consists of, down to the tensors inside of tensor subclasses, copied."""
    out = {}
    for key, value in module.state_dict().items():
        if ".mos_" in key or key.startswith("mos_"):
            continue
        inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        for name, tensor in [(key, value)] if not inner else [(f"{key}.{n}", getattr(value, n)) for n in inner]:
            out[name.replace("base_layer.", "").removeprefix("base_model.model.")] = tensor.detach().clone()
    return out


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def logits(adapted, **kwargs):
    with torch.no_grad():
        return adapted(**batch(), **kwargs).logits


def train(adapted, steps=6, autocast=False):
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = adapted(**batch(), labels=batch()["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adapted.eval()
    return losses


# ------------------------------------------------------------------------------------------------ the layer


def low_rank(x, pool, number, a, b):
    delta = reference.low_rank(
        x.reshape(-1, x.shape[-1]), a, pool.table("a", number), b, pool.table("b", number), pool.scales[number]
    )
    return delta.reshape(*x.shape[:-1], -1)


def results(base, x, grad, adapters, context):
    """Output and gradients of base + adapters (x, a, b of each), each adapter (dtype, pool, number).

    The base is differentiated apart, in its own dtype: its arithmetic is not what is tested.
    """
    x = x.detach().clone().requires_grad_()
    with context():
        y = base(x)
        y.backward(grad)
        out, dx, pool_grads = y.detach(), x.grad, []
        for dtype, pool, number in adapters:
            own = x.detach().to(dtype or x.dtype).requires_grad_()
            a, b = (p.detach().clone().to(dtype or p.dtype).requires_grad_() for p in (pool.shards_a, pool.shards_b))
            computed = torch.bfloat16 if torch.is_autocast_enabled("cpu") and dtype is None else own.dtype
            with torch.autocast("cpu", enabled=False):
                delta = low_rank(own.to(computed), pool, number, a, b)
                delta.backward(grad.to(delta.dtype))
            out = out + delta.detach().to(dtype or y.dtype)
            dx = dx + own.grad
            pool_grads += [a.grad, b.grad]
    return [out, dx, *pool_grads]


PRECISIONS = {
    "fp32": (torch.float32, nullcontext),
    "bf16": (torch.bfloat16, nullcontext),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
}


def check_layer(layer, base, x, context, names=("default",)):
    with context():
        out_dtype = base(x).dtype
    grad = torch.randn(*x.shape[:-1], layer.out_features).to(out_dtype)
    plain = [(None, *pool_of(layer, name)) for name in names]
    exact = [(torch.float64, *pool_of(layer, name)) for name in names]
    x = x.detach().requires_grad_()
    for _, pool, _ in plain:
        pool.zero_grad()
    with context():
        y = layer(x)
    y.backward(grad)
    got = [y.detach(), x.grad, *(p.grad for _, pool, _ in plain for p in (pool.shards_a, pool.shards_b))]
    operands = torch.bfloat16 if context is not nullcontext else x.dtype
    what = ["y", "dx", *(f"{name}: dpool_{side}" for name in names for side in "ab")]
    for name, actual, near, true in zip(
        what, got, results(base, x, grad, plain, context), results(base, x, grad, exact, context), strict=True
    ):
        assert_error_ratio(actual, near, true, name, operands)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_base_plus_branch_and_its_gradients(way, kind, precision):
    dtype, context = PRECISIONS[precision]
    adapted = adapt(stack(kind, dtype), way)
    for name in ("0.up", "2.down"):
        layer = next(layer for n, layer in layers(adapted).items() if n.endswith(name))
        assert isinstance(layer.base_layer, type(quantised(nn.Linear(64, 64), kind)))
        for shape in ((5, layer.in_features), (2, 3, layer.in_features)):
            check_layer(layer, layer.base_layer, torch.randn(shape).to(dtype), context)


@pytest.mark.parametrize("kind", KINDS)
def test_two_active_adapters(kind):
    adapted = adapt(stack(kind), "peft")
    adapted.add_adapter("other", mos_peft.MoSConfig(**{**RANKS, "seed": 7}, target_modules=["up"]))
    randomise(adapted, "other", seed=2)
    adapted.base_model.set_adapter(["default", "other"])
    layer = adapted.base_model.model[1].up
    check_layer(layer, layer.base_layer, torch.randn(2, 3, 64), nullcontext, ("default", "other"))
    layer = adapted.base_model.model[1].down
    check_layer(layer, layer.base_layer, torch.randn(2, 3, 128), nullcontext)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batches(kind):
    """A row computes what it computes alone, with its own adapter: products of other sizes sum in another order."""
    adapted = adapt(model(kind), "peft")
    adapted.add_adapter("other", mos_peft.MoSConfig(**{**RANKS, "seed": 7}, target_modules=["q_proj", "up_proj"]))
    randomise(adapted, "other", seed=2)
    ids = torch.randint(1, 96, (4, 7))
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        mixed = adapted(input_ids=ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with adapted.disable_adapter():
                    want = adapted(input_ids=ids[row : row + 1]).logits
            else:
                adapted.set_adapter(name)
                want = adapted(input_ids=ids[row : row + 1]).logits
            assert relative_error(mixed[row : row + 1], want) < ANOTHER_ORDER[kind], name


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_training(way, kind, tmp_path):
    """The loss falls, the base stays what it was bit for bit, and what was saved goes onto a base quantised anew."""
    base = model(kind)
    alone, before = logits(base), bits(base)
    adapted = adapt(base, way, std=None, dropout=0.1)
    assert torch.equal(logits(adapted), alone)
    assert {p for p in adapted.parameters() if p.requires_grad} == {p for q in pools(adapted) for p in q.parameters()}
    losses = train(adapted)
    assert losses[-1] < losses[0] - 0.2
    trained = logits(adapted)
    assert relative_error(trained, alone) > 1e-2
    with off(adapted):
        assert torch.equal(logits(adapted), alone)
    assert torch.equal(logits(adapted), trained)
    assert_same_bits(before, bits(adapted))
    if way == "adapt":
        mos_ext.save_adapter(adapted, tmp_path)
        loaded = mos_ext.load_adapter(model(kind), tmp_path)
    else:
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(model(kind), tmp_path)
    assert torch.equal(logits(loaded.eval()), trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_training_in_bf16(precision, way, kind):
    dtype, context = PRECISIONS[precision]
    adapted = adapt(model(kind, dtype), way, std=None)
    losses = train(adapted, autocast=context is not nullcontext)
    assert losses[-1] < losses[0] - 0.2
    assert all(p.dtype == p.grad.dtype == torch.float32 for pool in pools(adapted) for p in pool.parameters())


def checkpoint_activations(adapted, reentrant):
    # transformers 5.24 has a new name for both; the PEFT model passes either on.
    new = hasattr(adapted, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(adapted, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing(way, kind, reentrant):
    """Gradients of the pools are those of a run without, dropout included: the same products, computed twice.

    The reentrant kind runs a backward pass per block, so pools sum their layers in another order.
    """
    grads = []
    for checkpointing in (False, True):
        adapted = adapt(model(kind), way, dropout=0.1).train()
        if checkpointing:
            checkpoint_activations(adapted, reentrant)
            adapted.enable_input_require_grads()  # what the reentrant kind needs when only the layers inside train
        torch.manual_seed(3)
        adapted(**batch(), labels=batch()["input_ids"]).loss.backward()
        grads.append([p.grad for pool in pools(adapted) for p in pool.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[0])
    for plain, checkpointed in zip(*grads, strict=True):
        assert relative_error(checkpointed, plain) <= (1e-6 if reentrant else 0)


# torch's tracer makes its own placeholder of an autograd.Function, and warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_in_one_graph(way, kind):
    """As PEFT's LoRA is on these bases. The graph is executed, not generated code: the numbers are eager mode's."""
    torch._dynamo.reset()
    adapted = adapt(stack(kind), way)
    block = (adapted if way == "adapt" else adapted.get_base_model())[1]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for function in (block, compiled):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
        parameters = [p for pool in pools(adapted) for p in pool.parameters()]
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    for eager, got in zip(*results, strict=True):
        assert relative_error(got, eager) < 1e-5  # the branch is added before or after rounding the base's product
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama(3, intermediate_size=128).save_pretrained(folder)
    return folder


CONFIGS = {
    "nf4": lambda compute: transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    ),
    "int8": lambda compute: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda compute: transformers.TorchAoConfig(TORCHAO["torchao-int8"]()),
    "torchao-int4": lambda compute: transformers.TorchAoConfig(TORCHAO["torchao-int4"]()),
}


def from_transformers(folder, kind, dtype=torch.bfloat16):
    return never_pack(
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CONFIGS[kind](dtype), dtype=dtype, device_map="cpu"
        )
    ).eval()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("way", WAYS)
def test_the_qlora_recipe(way, kind, checkpoint, tmp_path):
    """Load in few bits, prepare_model_for_kbit_training (fp32 norms, checkpointing), adapt, train in bf16, save, load."""

    def prepared():
        return peft.prepare_model_for_kbit_training(
            from_transformers(checkpoint, kind), gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    base = prepared()
    before, alone = bits(base), logits(base)
    adapted = adapt(base, way, std=None, dropout=0.05)
    losses = train(adapted, autocast=True)
    assert losses[-1] < losses[0] - 0.2
    assert_same_bits(before, bits(adapted))
    with off(adapted):
        assert torch.equal(logits(adapted), alone)
    if way == "adapt":
        mos_ext.save_adapter(adapted, tmp_path)
        loaded = mos_ext.load_adapter(prepared(), tmp_path)
    else:
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(prepared(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(adapted))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("way", WAYS)
def test_models_that_transformers_quantised(way, kind, checkpoint):
    adapted = adapt(from_transformers(checkpoint, kind, torch.float32), way)
    layer = next(layer for n, layer in layers(adapted).items() if n.endswith("1.mlp.down_proj"))
    check_layer(layer, layer.base_layer, torch.randn(2, 3, 128), nullcontext)
    assert len(layers(adapted)) == 3 * 7
    if way == "peft":
        unmerged = logits(adapted)
        with ROUNDING if kind in BITSANDBYTES else nullcontext():
            merged = adapted.merge_and_unload()
        assert not layers(merged)
        assert relative_error(logits(merged), unmerged) < 2 * LOGITS[kind]


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_export_to_lora(kind, tmp_path):
    """PEFT's LoRA on a base quantised anew: the same products, summed in another order."""
    adapted = adapt(model(kind), "adapt")
    mos_ext.export_lora(adapted, tmp_path)
    lora = peft.PeftModel.from_pretrained(model(kind), tmp_path).eval()
    assert relative_error(logits(lora), logits(adapted)) < ANOTHER_ORDER[kind]
    assert relative_error(logits(lora), logits(model(kind))) > 1e-2


def test_the_export_to_lora_of_a_layer_that_peft_does_not_know(tmp_path):
    adapted = adapt(stack("own"), "adapt")
    mos_ext.export_lora(adapted, tmp_path)
    tensors, lora = load_file(tmp_path / "adapter_model.safetensors"), peft.LoraConfig.from_pretrained(tmp_path)
    for name, layer in layers(adapted).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(lora.lora_alpha / lora.r * b @ a, layer.delta_weight(), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------ merging

ROUNDING = pytest.warns(UserWarning, match="may get different generations due to rounding errors")
# Relative to the norm of weights (and so of products), what one quantisation costs them: half a step, evenly
# distributed, for int8 of normal weights with a scale per row, 3 sigma / 127 / sqrt(12) = 0.007 at most; int4 groups
# step by 16 / 127 of that; NF4's levels are 0.09 from a normal variable on average.
STEP = {"nf4": 0.1, "nf4-bf16": 0.1, "int8": 0.01, "torchao-int8": 0.01, "torchao-int4": 0.12}
# Of a model of three blocks: each adds the error of its own products to what it was given.
LOGITS = {kind: 3 * step for kind, step in STEP.items()}


def dequantised(layer):
    return layer.quantization_backend.get_base_weight(layer.get_base_layer()).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", LIBRARIES)
def test_merging_under_peft(kind, dtype):
    """What a merged layer holds is the sum, quantised as the base was: bit for bit what quantising the sum by hand gives."""
    adapted = adapt(stack(kind, dtype), "peft")
    x = torch.randn(64, 64).to(dtype)
    with torch.no_grad():
        want, before = adapted(x), bits(adapted)
        kept_in = layers(adapted)["base_model.model.0.up"].get_base_weight().dtype
        sums = {n: dequantised(m) + m.get_delta_weight("default") for n, m in layers(adapted).items()}
        with ROUNDING if kind in BITSANDBYTES else nullcontext():
            adapted.merge_adapter()
        for name, layer in layers(adapted).items():
            assert layer.merged
            by_hand = nn.Linear(layer.in_features, layer.out_features, bias=False).to(kept_in)
            by_hand.weight.copy_(sums[name])
            by_hand = quantised(by_hand, kind)
            if kind in TORCHAO:
                assert torch.equal(by_hand.weight.dequantize().float(), dequantised(layer))
            else:
                assert torch.equal(by_hand.weight, layer.base_layer.weight)
            assert type(layer.base_layer) is type(by_hand)
            assert 0 < relative_error(dequantised(layer), sums[name]) < STEP[kind]
        merged = adapted(x)
        assert 0 < relative_error(merged, want) < 2 * STEP[kind]
        adapted.unmerge_adapter()
        assert not any(layer.merged for layer in layers(adapted).values())
        assert_same_bits(before, bits(adapted))  # not quantised anew: the very weights are back
        assert torch.equal(adapted(x), want)


@pytest.mark.parametrize("kind", ["nf4", "nf4-bf16"])
def test_merging_after_inference_where_bitsandbytes_packs(kind):
    """On CPUs with AVX512-BF16 weights are packed by then; on others this is one more merge."""
    adapted = adapt(stack(kind), "peft")
    for layer in layers(adapted).values():
        layer.base_layer.support_avx512bf16_for_cpu = bnb.functional.has_avx512bf16()
    x = torch.randn(64, 64)
    unpacked = adapted(x.clone().requires_grad_()).detach()
    with torch.no_grad():
        want = adapted(x)
        # The packed kernel computes in bfloat16, as `nf4-bf16` always does: a few eps over three blocks.
        assert relative_error(want, unpacked) < 8 * torch.finfo(torch.bfloat16).eps
        with ROUNDING:
            adapted.merge_adapter()
        assert relative_error(adapted(x), want) < 2 * STEP[kind]
        adapted.unmerge_adapter()
        assert relative_error(adapted(x), want) < 8 * torch.finfo(torch.bfloat16).eps  # packed again, or not


@pytest.mark.parametrize("kind", LIBRARIES)
def test_merge_and_unload(kind):
    adapted = adapt(stack(kind), "peft")
    other = copy.deepcopy(adapted)
    x = torch.randn(5, 64)
    with torch.no_grad(), ROUNDING if kind in BITSANDBYTES else nullcontext():
        adapted.merge_adapter()
        unloaded = other.merge_and_unload()
        assert torch.equal(unloaded(x), adapted(x))
    assert [type(m) for m in unloaded.modules()] == [type(m) for m in stack(kind).modules()]


@pytest.mark.parametrize("kind", LIBRARIES)
def test_unload_gives_the_base_back(kind):
    base = stack(kind)
    before = bits(base)
    assert_same_bits(before, bits(adapt(base, "peft").unload()))


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_merges_no_quantised_weight(kind):
    adapted = adapt(stack(kind), "adapt")
    before = bits(adapted)
    name = (
        type(adapted[0].up.base_layer.weight).__name__ if kind in TORCHAO else type(adapted[0].up.base_layer).__name__
    )
    with pytest.raises(
        ValueError, match=rf"^0\.up: a merged layer must have a plain weight, got .* is an? {name}: export"
    ):
        mos_ext.merge(adapted)
    assert not any(layer.merged for layer in layers(adapted).values())
    assert_same_bits(before, bits(adapted))


def test_peft_merges_nothing_when_one_layer_cannot():
    """A plain layer comes first: it must not have been merged when the second turns out to be one of the user's own."""
    base = stack("own")
    for block in base:
        block.up = nn.Linear(64, 128)
    adapted = adapt(base, "peft")
    before = bits(adapted)
    for call in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match=r"0\.down.*OwnLinear"):
            call()
        assert not any(layer.merged for layer in layers(adapted).values())
        assert_same_bits(before, bits(adapted))


class Squashed(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def test_peft_merges_no_weight_whose_use_it_does_not_know():
    """A base that computes more than x W^T + b: adding to its weight would be something else than the adapter."""
    base = nn.Sequential(*(Squashed(64, 64) for _ in range(3)))
    adapted = randomise(peft.get_peft_model(base, mos_peft.MoSConfig(**RANKS, target_modules=["0", "1", "2"])).eval())
    before = bits(adapted)
    with pytest.raises(ValueError, match="Squashed"):
        adapted.merge_adapter()
    assert_same_bits(before, bits(adapted))


def test_torchao_by_hand_trains_under_peft():
    """Without transformers nothing says how to quantise anew. PEFT's LoRA needs that when it merges, not before."""
    base = stack("torchao-int8")
    del base.hf_quantizer
    adapted = adapt(base, "peft")
    layer = adapted.base_model.model[0].up
    check_layer(layer, layer.base_layer, torch.randn(5, 64), nullcontext)
    before = bits(adapted)
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        adapted.merge_adapter()
    assert_same_bits(before, bits(adapted))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["nf4", "torchao-int8", "own"])
def test_what_has_no_features_is_refused_by_name(kind, way):
    base = stack(kind)
    base[1].norm = nn.LayerNorm(64)
    before = bits(base)
    with pytest.raises(TypeError, match=r"in_features and out_features .*, got 1\.norm, a LayerNorm"):
        adapt(base, way, target_modules=["up", "norm"])
    assert not layers(base)
    assert_same_bits(before, bits(base))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nf4", "int8", "own"])
def test_a_bank_serves_a_quantised_base(kind, tmp_path):
    """Every sequence gets what its adapter gives alone on that base; the base computes the same batch both times."""
    base, targets = quantise(llama(), kind), ["q_proj", "o_proj", "up_proj", "down_proj"]
    alone = mos_ext.adapt(copy.deepcopy(base), mos_ext.MoSConfig(r=4, equivalent_rank=2, target_modules=targets))
    for pool in alone.mos_pools.pools:
        nn.init.normal_(pool.shards_b, std=0.3)
    mos_ext.save_adapter(alone, tmp_path)
    bank = mos_ext.serving.AdapterBank(base, target_modules=targets)
    bank.add("a", tmp_path)
    x = torch.randint(1, 96, (2, 7), generator=torch.Generator().manual_seed(0))
    plain = base(x).logits
    with bank.route(base, ["a", None]):
        y = base(x).logits
    torch.testing.assert_close(y[:1], alone(x).logits[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(y[1:], plain[1:], rtol=0, atol=1e-5)
    assert (y[0] - plain[0]).abs().max() > 0.1
