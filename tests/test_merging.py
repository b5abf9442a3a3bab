"""Merging and taking out again: the weights come back to the bit, any number of times."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from models import BUILDERS, gpt2, inputs, llama, randomize
from peft import get_peft_model
from torch import nn

import mos_ext
from mos_ext import MoSConfig, merging
from mos_ext.adapt import mos_layers
from mos_ext.integrations.peft import MoSConfig as PeftMoSConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
FIELDS = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(model):
    """Weights as integers: zeros of both signs and NaNs count, too."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    frozen = [p for n, p in model.named_parameters() if "mos_" not in n]
    assert frozen
    return [p.detach().clone().view(integer[p.element_size()]) for p in frozen]


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def change_pools(model, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cycles_do_not_walk(name, dtype):
    """What a trainer by reinforcement does for its generator, once a step."""
    native = mos_ext.adapt(BUILDERS[name]().to(dtype), MoSConfig(**FIELDS))
    wrapped = get_peft_model(BUILDERS[name]().to(dtype), PeftMoSConfig(**FIELDS, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for model, merge, unmerge in (
        (native, mos_ext.merge, mos_ext.unmerge),
        (wrapped, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
    ):
        before = bits(model)
        for _ in range(8):
            change_pools(model, generator)
            merge(model)
            assert not same(before, bits(model))
            unmerge(model)
            assert same(before, bits(model))


def test_rounding_does_lose_something():
    """Or the test above would show nothing: subtracting alone does not bring every weight back."""
    model = randomize(mos_ext.adapt(llama().bfloat16(), MoSConfig(**FIELDS)), std=0.01)
    mos_ext.merge(model)
    lost = [layer._merges[0].undo for _, layer in mos_layers(model)]
    sizes = [layer.weight.numel() for _, layer in mos_layers(model)]
    assert all(0 < rest.values.numel() <= size for rest, size in zip(lost, sizes, strict=True))
    assert all(rest.where is not None for rest in lost)


@pytest.mark.parametrize("size", [0.01, 0.05, 0.2, 1e4])
def test_what_is_kept(size):
    """A few per cent of the elements; the whole weight where positions and values would be larger."""
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    product = size * torch.randn(96, 64)
    total, lost = merging.add(weight, product)
    assert torch.equal(total, (weight.float() + product).bfloat16())
    assert torch.equal(merging.subtract(total, product, lost), weight)
    if size > 1:
        assert lost.where is None
        assert torch.equal(merging.subtract(total, None, lost), weight)
    else:
        # README's numbers, of normal weights and products of this relative size.
        assert lost.values.numel() / weight.numel() == pytest.approx(
            {0.01: 0.013, 0.05: 0.047, 0.2: 0.125}[size], rel=0.4
        )


def test_zeros_and_infinities_come_back():
    weight = torch.tensor([[0.0, -0.0, float("inf"), float("-inf")], [float("nan"), 65504.0, 6e-8, -6e-8]]).half()
    product = torch.tensor([[-0.0, 0.0, 1.0, 1.0], [1.0, 32.0, 1e-9, 1e-9]])
    total, lost = merging.add(weight, product)
    back = merging.subtract(total, product, lost)
    assert torch.equal(back.view(torch.int16), weight.view(torch.int16))


def test_a_product_that_comes_out_otherwise_is_told():
    torch.manual_seed(0)
    weight, product = torch.randn(32, 32), torch.randn(32, 32)
    total, lost = merging.add(weight, 0.01 * product)
    with pytest.warns(UserWarning, match="exact to rounding, not to the bit"):
        back = merging.subtract(total, 0.01 * product * (1 + 1e-5), lost)
    torch.testing.assert_close(back, weight, rtol=0, atol=1e-6)


def replace_weight(layer):
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)


def write_weight(layer):
    with torch.no_grad():
        layer.weight.mul_(2)


@pytest.mark.parametrize("change", [replace_weight, write_weight])
@pytest.mark.parametrize("way", ["adapt", "peft"])
def test_a_weight_that_changed_while_merged_is_noticed(way, change):
    if way == "adapt":
        model = mos_ext.merge(randomize(mos_ext.adapt(llama(), MoSConfig(**FIELDS))))
        change(model.model.layers[1].mlp.up_proj)
    else:
        model = get_peft_model(llama(), PeftMoSConfig(**FIELDS, target_modules="all-linear", init_weights=False))
        model.merge_adapter()
        change(model.base_model.model.model.layers[1].mlp.up_proj.get_base_layer())
    before = bits(model)
    for changed in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="the weight must not change between merge and unmerge, got a changed or"):
            mos_ext.unmerge(changed) if way == "adapt" else changed.unmerge_adapter()
        assert same(before, bits(changed))


def test_copies_and_moves_of_merged_models_come_back_too():
    model = randomize(mos_ext.adapt(llama(), MoSConfig(**FIELDS)))
    before = bits(model)
    mos_ext.merge(model)
    for copied in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), model.to("cpu")):
        mos_ext.unmerge(copied)
        assert same(before, bits(copied))


def test_another_dtype_while_merged():
    model = mos_ext.merge(randomize(mos_ext.adapt(llama(), MoSConfig(**FIELDS)))).bfloat16()
    with pytest.raises(
        ValueError, match="the weight must not change between merge and unmerge, got a changed or another"
    ):
        mos_ext.unmerge(model)


@pytest.mark.filterwarnings("ignore:Already (following adapters were merged|unmerged):UserWarning")
def test_several_adapters_come_out_in_turn():
    model = get_peft_model(llama().bfloat16(), PeftMoSConfig(**FIELDS, target_modules="all-linear", init_weights=False))
    model.add_adapter("second", PeftMoSConfig(**FIELDS, seed=1, target_modules=["q_proj"], init_weights=False))
    before = bits(model)
    for names in (["default"], ["default", "second"], ["second"]):
        for name in names:
            model.base_model.merge_adapter([name])
        model.unmerge_adapter()
        assert same(before, bits(model))
    model.base_model.merge_adapter(["default", "second"])
    with model.disable_adapter(), torch.no_grad():
        model(**inputs("llama"))  # takes them out
    assert same(before, bits(model))


@pytest.mark.parametrize("inside", ["merge", "unmerge", "disable"])
def test_autocast_does_not_reach_merges(inside):
    """A trainer's reference pass in bfloat16 takes the adapter out inside of autocast."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    if inside == "disable":
        model = get_peft_model(llama(), PeftMoSConfig(**FIELDS, target_modules="all-linear", init_weights=False))
        before = bits(model)
        model.merge_adapter()
        with autocast, model.disable_adapter(), torch.no_grad():
            model(**inputs("llama"))
    else:
        model, alone = (randomize(mos_ext.adapt(llama(), MoSConfig(**FIELDS))) for _ in range(2))
        before = bits(model)
        with autocast if inside == "merge" else nullcontext():
            mos_ext.merge(model)
        assert same(bits(model), bits(mos_ext.merge(alone)))
        with autocast if inside == "unmerge" else nullcontext():
            mos_ext.unmerge(model)
    assert same(before, bits(model))


def test_inference_mode():
    """Models that are made in it merge, unmerge and unload, though its tensors count no versions."""
    with torch.inference_mode():
        model = randomize(mos_ext.adapt(llama(), MoSConfig(**FIELDS)))
        before = bits(model)
        mos_ext.unmerge(mos_ext.merge(model))
        assert same(before, bits(model))
        get_peft_model(llama(), PeftMoSConfig(**FIELDS, target_modules="all-linear")).merge_and_unload()


def test_merged_conv1d():
    model = randomize(mos_ext.adapt(gpt2(), MoSConfig(**FIELDS)))
    layer = model.transformer.h[0].attn.c_attn
    want = layer.weight + layer.delta_weight()
    mos_ext.merge(model)
    torch.testing.assert_close(layer.weight, want.to(layer.weight.dtype), rtol=1e-6, atol=1e-7)


def test_warnings_are_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mos_ext.unmerge(mos_ext.merge(randomize(mos_ext.adapt(llama().half(), MoSConfig(**FIELDS)))))
