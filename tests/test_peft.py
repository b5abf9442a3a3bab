"""MoS as a PEFT method: what PEFT's own suite cannot see (sharing, tables, the planner) and what users do with it."""

import copy
import dataclasses
import inspect
import json
import re
import sys
import warnings
from importlib import metadata

import pytest
import torch
from models import BUILDERS, gpt2, inputs, llama, randomize, stack
from safetensors.torch import load_file
from torch import nn

import mos_ext
from mos_ext import reference
from mos_ext.routing import IndexTables, draw_tables

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft
    from peft import PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.peft_types import PeftType

import mos_ext.integrations.peft as mos_peft
from mos_ext.integrations.peft import MoSConfig, MoSLinear, registration

# PEFT asks transformers whether a model checkpoints under a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RANKS = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2, "private_rank": 1, "alpha": 10}
NATIVE = mos_ext.MoSConfig(**RANKS)
ARCHITECTURES = sorted(BUILDERS)


def config(**kwargs):
    return MoSConfig(**{**RANKS, "target_modules": "all-linear", **kwargs})


def pools(model, name="default"):
    return [pool for adapter, pool in model.base_model._named_pools() if adapter == name]


def wrapped(base=None, **kwargs):
    """A PEFT model whose adapter does something."""
    torch.manual_seed(1)
    model = get_peft_model(llama() if base is None else base, config(init_weights=False, **kwargs))
    return model.eval()


def layers(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, MoSLinear)}


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(**batch, **kwargs).logits


def loaded(base, folder, **kwargs):
    return PeftModel.from_pretrained(base, folder, **kwargs).eval()


# ------------------------------------------------------------------------------------------------ registration


def test_a_real_member_of_the_enumeration():
    assert PeftType.MOS.value == PeftType.MOS == "MOS"
    assert PeftType("MOS") is PeftType["MOS"] is PeftType.MOS
    assert PeftType.MOS in list(PeftType)
    assert copy.deepcopy(PeftType.MOS) is PeftType.MOS
    count = len(list(PeftType))
    registration.add_peft_type("MOS")
    registration.register(MoSConfig, mos_peft.MoSModel)
    assert len(list(PeftType)) == count
    assert peft.MoSConfig is MoSConfig


@pytest.mark.parametrize(
    ("version", "message"), [("0.20.4", "peft >= 0.21, got peft 0.20.4"), (None, "needs peft >= 0.21")]
)
def test_a_wrong_peft_is_named(monkeypatch, version, message):
    def installed(package):
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", installed)
    with pytest.raises(ImportError, match=message):
        registration.check_peft()


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "1.0.dev0"])
def test_a_right_peft_is_not(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda package: version)
    registration.check_peft()


# ------------------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_adapter_as_adapt(name):
    """One planner: the same modules, linear types and tables, so equal pools give equal outputs, bit for bit."""
    native, batch = randomize(mos_ext.adapt(BUILDERS[name](), NATIVE)), inputs(name)
    base = logits(BUILDERS[name](), batch)
    model = get_peft_model(BUILDERS[name](), config()).eval()
    assert torch.equal(logits(model, batch), base)  # a new adapter changes nothing
    ours, theirs = pools(model), native.mos_pools.pools
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index_a, b.index_a)
        assert torch.equal(a.index_b, b.index_b)
        a.load_state_dict(b.state_dict())
    assert torch.equal(logits(model, batch), logits(native, batch))
    report = mos_ext.parameter_report(native)
    assert (
        model.get_nb_trainable_parameters()[0]
        == report.trainable
        == sum(p.numel() for q in ours for p in q.parameters())
    )
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"shards_a", "shards_b"}


def test_pools_are_shared_and_there_once():
    model = wrapped()
    types = {}
    for name, layer in layers(model).items():
        types.setdefault(re.sub(r"\d+", "*", name), []).append(layer)
    assert all(len(group) == 4 for group in types.values())
    for group in types.values():
        assert len({id(layer.adapter("default")[0]) for layer in group}) == 1
        assert [layer.adapter("default")[1] for layer in group] == [0, 1, 2, 3]
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if "mos_" in n]
    assert len(names) == len(set(names)) == 2 * len(types)
    first, *others = next(iter(types.values()))
    before = [layer.get_delta_weight("default") for layer in (first, *others)]
    with torch.no_grad():
        first.adapter("default")[0].shards_b.mul_(2)
    for layer, delta in zip((first, *others), before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 2 * delta)


def test_strategies_can_be_seen():
    pool = pools(wrapped())[0]
    assert not torch.equal(pool.index_a, pool.index_b)  # pair dissociation
    assert torch.equal(pool.index_a[:, -1], pool.index_b[:, -1])  # private ranks stay paired
    assert not torch.equal(pool.index_a[0], pool.index_a[1])  # subset selection
    tied = pools(wrapped(pair_dissociation=False))[0]
    assert torch.equal(tied.index_a, tied.index_b)
    assert not torch.equal(pools(wrapped(seed=1))[0].index_a, pool.index_a)


def test_the_definition():
    """float64, against dense matrices made of pools and tables."""
    model = wrapped(stack(dtype=torch.float64), pool_dtype="float64", use_rslora=True)
    x = torch.randn(5, 24, dtype=torch.float64)
    layer = layers(model)["1.up"]
    pool, k = layer.adapter("default")
    a = reference.gather_concat(pool.shards_a, pool.index_a[k])
    b = reference.gather_concat(pool.shards_b, pool.index_b[k]).T
    want = layer.base_layer(x) + 10 / 2 * x @ a.T @ b.T  # alpha / sqrt(r)
    torch.testing.assert_close(layer(x), want)


def test_gradients_flow_to_each_pool_once_and_match_adapt():
    native, batch = randomize(mos_ext.adapt(llama(), NATIVE)), inputs("llama")
    model = get_peft_model(llama(), config())
    for a, b in zip(pools(model), native.mos_pools.pools, strict=True):
        a.load_state_dict(b.state_dict())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    native(**batch, labels=batch["input_ids"]).loss.backward()
    for a, b in zip(pools(model), native.mos_pools.pools, strict=True):
        assert torch.equal(a.shards_a.grad, b.shards_a.grad)
        assert torch.equal(a.shards_b.grad, b.shards_b.grad)
    assert set(mos_ext.explain(model).layers[0].calls) == {"fused with the base layer"}


# ------------------------------------------------------------------------------------------------ selection


def selected(**kwargs):
    model = get_peft_model(llama(), MoSConfig(**{**RANKS, "r": 3, **kwargs}))
    return set(layers(model))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": r".*\.[02]\..*_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.3\..*"},
    ],
)
def test_modules_are_selected_as_lora_selects_them_and_as_adapt_does(kwargs):
    lora = get_peft_model(llama(), peft.LoraConfig(**kwargs))
    want = {n for n, m in lora.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert selected(**kwargs) == want
    native = {k: v or () if k == "exclude_modules" else v for k, v in kwargs.items()}
    model = mos_ext.adapt(llama(), mos_ext.MoSConfig(**{**RANKS, "r": 3, **native}))
    assert {n for n, m in model.named_modules() if isinstance(m, mos_ext.MoSLinear)} == want


def test_target_modules_default_to_the_architecture():
    assert {name.rpartition(".")[2] for name in selected()} == {"q_proj", "v_proj"}


def test_all_linear_of_a_second_adapter():
    model = wrapped(target_modules=["q_proj"])
    model.add_adapter("second", config())
    assert sum("second" in layer.mos_layer for layer in layers(model).values()) == 28
    assert sum("default" in layer.mos_layer for layer in layers(model).values()) == 4


def test_patterns():
    model = wrapped(r=4, rank_pattern={r"layers\.0\..*": 2, r"[1-3]\..*v_proj": 3}, alpha_pattern={"up_proj": 7})
    native = mos_ext.MoSConfig(
        **RANKS, rank_pattern={r"layers\.0\..*": 2, r"[1-3]\..*v_proj": 3}, alpha_pattern={"up_proj": 7}
    )
    for name, layer in layers(model).items():
        pool, k = layer.adapter("default")
        r = 2 if ".0." in name else 3 if "v_proj" in name else 4
        assert layer.r["default"] == r == pool.table("a", k).shape[0] == native.rank_of(name)
        assert layer.scaling["default"] == (7 if "up_proj" in name else 10) / r == native.scale_of(name)
        # A smaller rank uses the last rows: the private rank is among them, and no pool grows or shrinks.
        assert torch.equal(pool.table("b", k)[-1], pool.index_b[k, -1])
        assert pool.shards_a.shape[0] == 3 * 4 * 2


# ------------------------------------------------------------------------------------------------ several adapters


def several():
    model, batch = wrapped(), inputs("llama")
    torch.manual_seed(2)
    model.add_adapter("other", config(init_weights=False, r=3, seed=5, target_modules=["q_proj", "up_proj"]))
    return model, batch


def test_adapters_are_independent():
    model, batch = several()
    first = logits(model, batch)
    alone = logits(wrapped(), batch)
    assert torch.equal(first, alone)
    model.set_adapter("other")
    second = logits(model, batch)
    assert not torch.allclose(first, second, atol=1e-3)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(llama(), batch))
    assert torch.equal(logits(model, batch), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch), second)
    assert pools(model) == []
    assert not any("default" in layer.mos_layer for layer in layers(model).values())


def test_adding_an_adapter_leaves_the_others_training():
    model = get_peft_model(llama(), config())
    model.add_adapter("other", config(seed=1))
    assert all(p.requires_grad for pool in pools(model) for p in pool.parameters())
    assert not any(p.requires_grad for pool in pools(model, "other") for p in pool.parameters())


def test_several_active_at_once_add_up():
    model, _ = several()
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 64, requires_grad=True)
    for name, layer in layers(model).items():
        if not name.endswith(("q_proj", "v_proj")):
            continue
        names = ["default", "other"] if name.endswith("q_proj") else ["default"]
        delta = sum(layer.get_delta_weight(n) for n in names)
        y = layer(x)
        torch.testing.assert_close(y, layer.base_layer(x) + x @ delta.T, rtol=1e-4, atol=1e-5)  # float32, another order
        parameters = [p for n in names for p in layer.adapter(n)[0].parameters()]
        grads = torch.autograd.grad(y.sum(), [x, *parameters])
        want = x.new_ones(3, delta.shape[0]) @ (layer.base_layer.weight + delta)
        torch.testing.assert_close(grads[0], want, rtol=1e-4, atol=1e-4)
        assert all(g.abs().sum() > 0 for g in grads)


def test_mixed_batches():
    model, _ = several()
    batch = {"input_ids": torch.randint(1, 96, (5, 7))}
    names = ["other", "__base__", "default", "other", "default"]
    mixed = logits(model, batch, adapter_names=names)
    for name in ("default", "other"):
        model.set_adapter(name)
        rows = [i for i, n in enumerate(names) if n == name]
        torch.testing.assert_close(mixed[rows], logits(model, batch)[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], logits(llama(), batch)[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, batch, adapter_names=["nobody"] * 5)
    with pytest.raises(
        ValueError, match="Length of `adapter_names` should be the same as the number of inputs, but got 2 and 5"
    ):
        logits(model, batch, adapter_names=["other"] * 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        logits(model, batch, adapter_names=names)


def test_mixed_batches_choose_modules_to_save_too():
    model = wrapped(modules_to_save=["lm_head"])
    model.add_adapter("other", config(init_weights=False, seed=5, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for copy_of_head in model.get_base_model().lm_head.modules_to_save.values():
            copy_of_head.weight.normal_()
    batch, names = {"input_ids": torch.randint(1, 96, (3, 7))}, ["other", "default", "__base__"]
    mixed = logits(model, batch, adapter_names=names)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, batch)[row], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[2], logits(llama(), batch)[2], rtol=1e-4, atol=1e-4)


def test_mixed_batches_in_beam_search():
    model, _ = several()
    ids, names = torch.randint(1, 96, (3, 5)), ["other", "__base__", "default"]
    kwargs = {"attention_mask": torch.ones_like(ids), "num_beams": 2, "max_new_tokens": 6, "do_sample": False}
    mixed = model.generate(input_ids=ids, adapter_names=names, **kwargs)
    for row, name in enumerate(names):
        one = {**kwargs, "attention_mask": kwargs["attention_mask"][:1]}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids[row : row + 1], **one)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[row : row + 1], **one)
        assert mixed[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_rank_and_scaling_are_views():
    model, _ = several()
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    ranks, scaling = layer.r, layer.scaling
    assert dict(ranks) == {"default": 4, "other": 3}
    assert dict(scaling) == {"default": 10 / 4, "other": 10 / 3}
    model.delete_adapter("other")
    assert dict(ranks) == {"default": 4}
    assert "other" not in scaling
    with pytest.raises(TypeError):
        scaling["default"] = 1.0


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_and_unmerge(name):
    base, batch = BUILDERS[name](), inputs(name)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    model = wrapped(base)
    adapted = logits(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert set(mos_ext.explain(model).layers[0].calls) == {"fused with the base layer", "the base layer alone"}
    model.unmerge_adapter()
    for key, value in base.state_dict().items():
        torch.testing.assert_close(value, weights[key.replace(".base_layer", "")], rtol=1e-6, atol=1e-7)  # one rounding
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base)
    torch.testing.assert_close(logits(merged, batch), adapted, rtol=1e-4, atol=1e-5)
    assert not any("mos_" in n for n, _ in merged.named_parameters())


def test_unload_gives_the_base_back():
    batch = inputs("llama")
    model = wrapped().unload()
    assert torch.equal(logits(model, batch), logits(llama(), batch))


def test_a_safe_merge_refuses_what_is_not_finite():
    model = wrapped()
    with torch.no_grad():
        pools(model)[0].shards_b.fill_(float("inf"))
    before = {n: layer.base_layer.weight.clone() for n, layer in layers(model).items() if n.endswith("q_proj")}
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for name, weight in before.items():
        assert torch.equal(layers(model)[name].base_layer.weight, weight)


def test_pools_that_changed_since_the_merge():
    model = wrapped()
    model.merge_adapter()
    with torch.no_grad():
        pools(model)[0].shards_b.add_(1)
    with pytest.raises(
        ValueError, match="the pools must not change between merge and unmerge, got changed pools of adapter default"
    ):
        model.unmerge_adapter()


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_round_trip(name, low_cpu_mem_usage, tmp_path):
    model, batch = wrapped(BUILDERS[name]()), inputs(name)
    model.save_pretrained(tmp_path)
    again = loaded(BUILDERS[name](), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert all(p.index_a.dtype == torch.int32 for p in pools(again))


def by_hand(pools):
    """Gives pools tables that are not their configuration's."""
    for pool in pools:
        other = draw_tables(dataclasses.replace(pool.config, seed=77), pool.stream, pool.ranks)
        pool.set_tables(IndexTables(other.a, other.b))


def test_each_pool_once_and_no_tables_in_the_file(tmp_path):
    wrapped().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.rpartition(".")[2] for n, t in tensors.items() if t.numel()} == {"shards_a", "shards_b"}
    assert len(tensors) == 2 * 7 + 1  # and what names the tables
    assert all(t.is_floating_point() for t in tensors.values())  # somebody may average them
    assert not any("default" in n for n in tensors)


def test_what_requires_grad_is_enough_to_save(tmp_path):
    """Training scripts filter so; index tables follow from the configuration."""
    model, batch = wrapped(), inputs("llama")
    model.save_pretrained(tmp_path, state_dict={n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(logits(loaded(llama(), tmp_path), batch), logits(model, batch))
    assert torch.equal(logits(mos_ext.load_adapter(llama(), tmp_path), batch), logits(model, batch))


def test_averages_of_adapters_are_adapters():
    """As federated learning takes them: of every tensor, in its own type."""
    models, batch = [wrapped(), wrapped()], inputs("llama")
    for pool in pools(models[1]):
        torch.nn.init.normal_(pool.shards_b, std=0.1)
    states = [peft.get_peft_model_state_dict(model) for model in models]
    mean = {
        name: sum(state[name] * weight for state, weight in zip(states, (0.3, 0.7), strict=True)) for name in states[0]
    }
    model = wrapped()
    peft.set_peft_model_state_dict(model, mean)
    for pool, one, two in zip(*(pools(m) for m in (model, *models)), strict=True):
        torch.testing.assert_close(pool.shards_b, 0.3 * one.shards_b + 0.7 * two.shards_b)
        assert torch.equal(pool.index_a, one.index_a)
    assert not torch.allclose(logits(model, batch), logits(models[0], batch), atol=1e-3)


def test_tables_given_by_hand_go_both_ways(tmp_path):
    model, batch = wrapped(), inputs("llama")
    drawn = logits(model, batch)
    by_hand(pools(model))
    want = logits(model, batch)
    assert not torch.allclose(want, drawn, atol=1e-3)
    model.save_pretrained(tmp_path / "peft")
    again = loaded(llama(), tmp_path / "peft")
    assert torch.equal(logits(again, batch), want)
    native = mos_ext.load_adapter(llama(), tmp_path / "peft")
    assert torch.equal(logits(native, batch), want)
    mos_ext.save_adapter(native, tmp_path / "native")
    assert torch.equal(logits(loaded(llama(), tmp_path / "native"), batch), want)
    model.load_adapter(tmp_path / "native", adapter_name="default")
    wrapped().save_pretrained(tmp_path / "drawn")
    model.load_adapter(
        tmp_path / "drawn", adapter_name="default"
    )  # and an adapter with its own tables takes their place
    assert torch.equal(logits(model, batch), drawn)


@pytest.mark.parametrize("safe", [True, False])
def test_tables_of_another_generator_or_seed(safe, tmp_path):
    wrapped().save_pretrained(tmp_path, safe_serialization=safe)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    assert (stored["tensor_digest"] is None) != safe  # the digest is that of a safetensors file
    for changed, message in (
        (
            {"seed": 1},
            "table_digest must be that of the index tables that the configuration gives here, .* another seed",
        ),
        ({"private_rank": 2}, "table_digest must be that of the index tables"),
        ({"format_version": 3}, "format_version must be 2, got 3"),
    ):
        file.write_text(json.dumps({**stored, **changed}))
        with pytest.raises(ValueError, match=message):
            loaded(llama(), tmp_path)


def test_a_file_s_generator(tmp_path, monkeypatch):
    wrapped().save_pretrained(tmp_path)
    monkeypatch.setattr("mos_ext.routing.GENERATOR", 2)
    for load in (loaded, mos_ext.load_adapter):
        with pytest.raises(ValueError, match="table_digest must be of generator 2, .* got '1:"):
            load(llama(), tmp_path)


def test_a_configuration_alone_says_nothing_of_weights(tmp_path):
    """And one that came with weights may serve another model."""
    model = wrapped()
    model.save_pretrained(tmp_path / "a")
    stored = mos_peft.MoSConfig.from_pretrained(tmp_path / "a")
    assert stored.tensor_digest is not None
    stored.save_pretrained(tmp_path / "alone")
    values = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert values["tensor_digest"] is values["table_digest"] is values["format_version"] is None
    assert not (tmp_path / "alone" / "README.md").exists()
    stored.target_modules = "all-linear"
    other = get_peft_model(llama(5), stored)
    other.save_pretrained(tmp_path / "b")
    other.load_adapter(tmp_path / "b", adapter_name="default")
    batch = inputs("llama")
    assert torch.equal(logits(loaded(llama(5), tmp_path / "b"), batch), logits(other, batch))


@pytest.mark.parametrize(
    ("made_on", "used_on", "key_mapping"),
    [
        (llama, lambda: llama().model, {"^mos_model_": "mos_"}),
        (lambda: llama().model, llama, {"^mos_": "mos_model_"}),
        (lambda: nn.ModuleDict({"module": llama().model}), llama, {"^mos_module": "mos_model"}),
    ],
    ids=["of ...ForCausalLM", "of a base model", "of a wrapped one"],
)
def test_another_class_or_prefix_is_named(made_on, used_on, key_mapping, tmp_path):
    """With what PEFT can do about it, and it does: tables are the same, for a stream is called without the prefix."""
    model = wrapped(made_on())
    model.save_pretrained(tmp_path)
    shown = re.escape(f"key_mapping={key_mapping}")
    for load in (loaded, mos_ext.load_adapter):
        with pytest.raises(ValueError, match=f"must be for this model, got an adapter for one .* the prefix .*{shown}"):
            load(used_on(), tmp_path)
    again = loaded(used_on(), tmp_path, key_mapping=key_mapping)
    for pool, want in zip(pools(again), pools(model), strict=True):
        assert pool.stream == want.stream
        assert torch.equal(pool.shards_a, want.shards_a)
        assert torch.equal(pool.index_b, want.index_b)


def test_adapters_go_both_ways(tmp_path):
    """One format: what PEFT saved, load_adapter loads, and the other way round, bit for bit."""
    for name in ("llama", "gpt2"):
        batch, kwargs = inputs(name), {"rank_pattern": {r".*\.0\..*": 2}, "use_rslora": True, "dropout": 0.1}
        model = wrapped(BUILDERS[name](), **kwargs)
        model.save_pretrained(tmp_path / "peft")
        native = mos_ext.load_adapter(BUILDERS[name](), tmp_path / "peft").eval()
        assert torch.equal(logits(native, batch), logits(model, batch))
        assert native.mos_pools.config.dropout == 0.1
        mos_ext.save_adapter(randomize(native), tmp_path / "native")
        again = loaded(BUILDERS[name](), tmp_path / "native")
        assert torch.equal(logits(again, batch), logits(native, batch))
        again.save_pretrained(tmp_path / "again")
        assert torch.equal(
            logits(mos_ext.load_adapter(BUILDERS[name](), tmp_path / "again"), batch), logits(native, batch)
        )


def test_biases_are_for_peft_to_load(tmp_path):
    wrapped(bias="all").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bias must be 'none', got 'all': load this adapter with PEFT"):
        mos_ext.load_adapter(llama(), tmp_path)


def test_an_adapter_of_another_model(tmp_path):
    wrapped(llama(5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj\[64->64\] of 5 modules where this model has 4"):
        mos_ext.load_adapter(llama(4), tmp_path)
    with pytest.raises(ValueError, match="table_digest must be that of the index tables"):
        loaded(llama(4), tmp_path)


def test_hot_reload_keeps_the_parameters(tmp_path):
    """load_adapter under a name that exists copies into the parameters that optimizers and compiled graphs hold."""
    model, batch = wrapped(), inputs("llama")
    other = wrapped()
    by_hand(pools(other))
    with torch.no_grad():
        for pool in pools(other):
            pool.shards_b.mul_(3)
    other.save_pretrained(tmp_path)
    held = [p for pool in pools(model) for p in pool.parameters()]
    model.load_adapter(tmp_path, adapter_name="default")
    assert [id(p) for pool in pools(model) for p in pool.parameters()] == [id(p) for p in held]
    assert torch.equal(logits(model, batch), logits(other, batch))
    model.train()(**batch).logits.sum().backward()  # and gradients find the new tables
    other.train()(**batch).logits.sum().backward()
    for a, b in zip(pools(model), pools(other), strict=True):
        assert torch.equal(a.shards_a.grad, b.shards_a.grad)


def test_hot_reload_of_an_adapter_of_another_seed_is_refused(tmp_path):
    """PEFT reads no configuration then, so the weights must say which tables they belong to."""
    model, batch = wrapped(), inputs("llama")
    wrapped(seed=3).save_pretrained(tmp_path)
    before = logits(model, batch)
    with pytest.raises(ValueError, match="table_digest must be that of the index tables .* another seed"):
        model.load_adapter(tmp_path, adapter_name="default")
    assert torch.equal(logits(model, batch), before)


def test_modules_to_save_and_biases(tmp_path):
    model, batch = wrapped(modules_to_save=["lm_head"]), inputs("llama")
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(loaded(llama(), tmp_path / "a"), batch), logits(model, batch))
    native = mos_ext.load_adapter(llama(), tmp_path / "a")
    assert torch.equal(logits(native, batch), logits(model, batch))
    assert {n for n, p in native.named_parameters() if p.requires_grad and "mos_" not in n} == {"lm_head.weight"}
    for bias, count in (("mos_only", 12), ("all", 19)):
        model = wrapped(gpt2(), bias=bias)
        trained = [p for n, p in model.named_parameters() if n.endswith("bias") and p.requires_grad]
        assert len(trained) == count  # 3 blocks of 4 linears, 2 norms each, and the last norm
        with torch.no_grad():
            for p in trained:
                p.normal_()
        model.save_pretrained(tmp_path / bias)
        batch = inputs("gpt2")
        assert torch.equal(logits(loaded(gpt2(), tmp_path / bias), batch), logits(model, batch))


def test_the_export_to_lora_is_exact(tmp_path):
    model, batch = several()
    for name in ("default", "other"):
        model.set_adapter(name)
        mos_ext.export_lora(model, tmp_path / name, rank=8)
        lora = loaded(llama(), tmp_path / name)
        torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
        assert lora.peft_config["default"].r == 8
    mos_ext.export_lora(model, tmp_path / "named", adapter_name="default")
    lora = loaded(llama(), tmp_path / "named")
    model.set_adapter("default")
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"adapter_name must be a MoS adapter, one of \['default', 'other'\], got 'x'"):
        mos_ext.export_lora(model, tmp_path / "x", adapter_name="x")
    with pytest.raises(ValueError, match="adapter_name must be None for a model of one adapter, got 'x'"):
        mos_ext.export_lora(mos_ext.adapt(llama(), NATIVE), tmp_path / "x", adapter_name="x")
    assert not (tmp_path / "x").exists()


def test_the_export_to_lora_takes_modules_to_save_along(tmp_path):
    model, batch = wrapped(modules_to_save=["lm_head"], task_type="CAUSAL_LM"), inputs("llama")
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    mos_ext.export_lora(model, tmp_path / "a")
    torch.testing.assert_close(
        logits(loaded(llama(), tmp_path / "a"), batch), logits(model, batch), rtol=1e-5, atol=1e-4
    )
    with pytest.raises(ValueError, match="bias must be 'none' for an export to LoRA, got 'all'"):
        mos_ext.export_lora(wrapped(bias="all"), tmp_path / "b")


# ------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dtypes(dtype, autocast_adapter_dtype):
    model = get_peft_model(llama().to(dtype), config(init_weights=False), autocast_adapter_dtype=autocast_adapter_dtype)
    want = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for pool in pools(model) for p in pool.parameters()} == {want}
    model.add_adapter("second", config(init_weights=False), autocast_adapter_dtype=autocast_adapter_dtype)
    assert {p.dtype for pool in pools(model, "second") for p in pool.parameters()} == {want}
    output = model(**inputs("llama"))
    assert output.logits.dtype == dtype
    output.logits.float().square().mean().backward()
    for pool in pools(model):
        assert pool.shards_a.grad.dtype == want
        assert pool.shards_a.grad.abs().sum() > 0
    assert set(mos_ext.explain(model).layers[0].calls) == {"fused with the base layer"}


def test_pool_dtype_in_the_configuration_wins():
    model = get_peft_model(llama().bfloat16(), config(pool_dtype="float32"), autocast_adapter_dtype=False)
    assert {p.dtype for pool in pools(model) for p in pool.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"private_rank": 4}, ValueError, "private_rank must be at most equivalent_rank=3, got 4"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of none, all, mos_only, got 'lora_only'"),
        ({"fan_in_fan_out": 1}, TypeError, "fan_in_fan_out must be True or False, got 1"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be at least 1, got 0"),
        ({"layers_to_transform": [0]}, ValueError, "layers_to_transform must come with a list of target_modules"),
        (
            {"target_modules": ["q"], "layers_pattern": "h"},
            ValueError,
            "layers_to_transform must be given with layers_pattern",
        ),
        ({"pool_dtype": "int8"}, ValueError, "pool_dtype must be one of float64"),
    ],
)
def test_bad_configurations(kwargs, error, message):
    with pytest.raises(error, match=message):
        config(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, TypeError, "got model.embed_tokens, a Embedding"),
        ({"target_modules": ["nothing"]}, ValueError, "Target modules {'nothing'} not found in the base model"),
        ({"shards_per_vector": 5}, ValueError, "shards_per_vector must divide in_features=64 of model.layers.0"),
        (
            {"r": 10, "target_modules": ["q_proj"]},
            ValueError,
            "r must be at most 9 for model.layers.0.self_attn.q_proj",
        ),
    ],
)
@pytest.mark.parametrize("second", [False, True])
def test_a_failed_injection_leaves_everything_as_it_was(kwargs, error, message, second):
    base, batch = llama(), inputs("llama")
    model = wrapped(base) if second else base
    before = logits(model, batch)
    names = [(n, type(m)) for n, m in model.named_modules()]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(error, match=message):
        model.add_adapter("bad", config(**kwargs)) if second else get_peft_model(model, config(**kwargs))
    assert [(n, type(m)) for n, m in model.named_modules()] == names
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(logits(model, batch), before)


def test_injection_without_a_tuner_is_refused():
    with pytest.raises(ValueError, match="shared"):
        peft.inject_adapter_in_model(config(), llama())


# ------------------------------------------------------------------------------------------------ explain


def test_explain_names_what_is_not_fused():
    model = wrapped()
    layer = layers(model)["model.layers.1.mlp.up_proj"]
    layer.base_layer.register_forward_hook(lambda module, args, output: None)
    assert mos_ext.explain(model).layers[0].path == "fused with the base layer"
    logits(model, inputs("llama"))
    text = str(mos_ext.explain(model))
    assert "27 of 28 layers: fused with the base layer" in text
    assert "1 of 28 layers: the base layer has hooks" in text
    assert "1 calls: the base layer has hooks" in text
    with model.disable_adapter():
        assert {layer.path for layer in mos_ext.explain(model).layers} == {"the base layer alone"}
    with pytest.raises(ValueError, match="model must have adapted layers, got a plain Linear"):
        mos_ext.explain(nn.Linear(2, 2))


def test_configurations_survive_json(tmp_path):
    before = config(target_modules=["q_proj"], rank_pattern={"q_proj": 3}, layers_to_transform=[1, 2])
    before.save_pretrained(tmp_path)
    after = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(after, MoSConfig)
    assert after.method() == before.method()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOS"


# ------------------------------------------------------------------------------------------------ a second adapter on one base

# PEFT's own words, for a base that still has the layers of an earlier adapter.
again = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time:UserWarning",
    "ignore:Already found a `peft_config` attribute in the model:UserWarning",
)


@again
def test_loading_a_second_adapter_on_one_base(tmp_path):
    """A web interface or a notebook keeps the base and loads one adapter after another: each computes what it computes
    on a base of its own, as with LoRA."""
    batch, base, want = inputs("llama"), llama(), []
    for seed in (1, 2):
        model = wrapped(seed=seed)
        with torch.no_grad():
            for pool in pools(model):
                pool.shards_b.mul_(seed)
        model.save_pretrained(tmp_path / str(seed))
        want.append(logits(model, batch))
    assert not torch.equal(*want)
    for seed in (1, 2, 1):
        assert torch.equal(logits(loaded(base, tmp_path / str(seed)), batch), want[seed - 1])


@again
def test_a_second_adapter_trains_on_one_base():
    batch, base = inputs("llama"), llama()
    get_peft_model(base, config())
    model = get_peft_model(base, config(seed=3))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(pools(model))
    alone = get_peft_model(llama(), config(seed=3))
    for a, b in zip(pools(alone), pools(model), strict=True):
        assert torch.equal(a.index_a, b.index_a)
        a.load_state_dict(b.state_dict())
    alone(**batch, labels=batch["input_ids"]).loss.backward()
    for a, b in zip(pools(alone), pools(model), strict=True):
        assert torch.equal(a.shards_b.grad, b.shards_b.grad)


@again
def test_a_second_adapter_of_another_name_leaves_the_first_in_place():
    batch, base = inputs("llama"), llama()
    first = wrapped(base)
    want = logits(first, batch)
    second = get_peft_model(base, config(init_weights=False, seed=4), adapter_name="other").eval()
    assert not torch.equal(logits(second, batch), want)
    second.set_adapter("default")
    assert torch.equal(logits(second, batch), want)
    first.set_adapter("default")
    assert torch.equal(logits(first, batch), want)
    assert {id(p) for p in pools(first)} == {id(p) for p in pools(second)}


@again
def test_a_second_adapter_that_leaves_modules_of_the_first_out():
    """LoRA computes a mixture of both there."""
    batch, base = inputs("llama"), llama()
    first = wrapped(base, target_modules=["q_proj", "v_proj"])
    want = logits(first, batch)
    before = [pool.shards_a for pool in pools(first)]
    with pytest.raises(
        ValueError,
        match="target_modules must have all modules of the earlier adapter 'default' .* got none for model.layers.0."
        r"self_attn.v_proj: call unload\(\) on the earlier",
    ):
        get_peft_model(base, config(target_modules=["q_proj"]))
    assert torch.equal(logits(first, batch), want)
    assert all(pool.shards_a is p for pool, p in zip(pools(first), before, strict=True))
    first.unload()
    got = get_peft_model(base, config(target_modules=["q_proj"], init_weights=False))
    assert len(pools(got)) == 1


@again
def test_a_second_adapter_on_a_merged_one():
    base = llama()
    first = wrapped(base)
    first.merge_adapter()
    with pytest.raises(
        ValueError, match=r"adapter_name must not be that of a merged adapter, .* call unmerge_adapter\(\) or"
    ):
        get_peft_model(base, config())
    first.unmerge_adapter()
    get_peft_model(base, config())


@again
def test_a_second_adapter_with_modules_that_the_first_model_does_not_know(tmp_path):
    base = llama()
    first = wrapped(base, target_modules=["q_proj"])
    second = get_peft_model(base, config(target_modules=["q_proj", "o_proj"]), adapter_name="two")
    with pytest.raises(
        ValueError, match="model must have all pools of adapter 'two', got none for .*o_proj: another model"
    ):
        first.save_pretrained(tmp_path, selected_adapters=["two"])
    second.save_pretrained(tmp_path)


@again
def test_a_second_adapter_that_cannot_be_made_leaves_the_first():
    batch, base = inputs("llama"), llama()
    first = wrapped(base)
    want = logits(first, batch)
    with pytest.raises(ValueError, match="shards_per_vector must divide"):
        get_peft_model(base, config(shards_per_vector=5))
    assert first.peft_config["default"].shards_per_vector == 2
    assert torch.equal(logits(first, batch), want)


@pytest.mark.parametrize("names", [("a", "b"), ("x", "index")])
def test_adapters_of_any_name(tmp_path, names):
    """A/B tests."""
    first, second = names
    batch = inputs("llama")
    model = get_peft_model(llama(), config(init_weights=False), adapter_name=first).eval()
    model.add_adapter(second, config(init_weights=False, seed=1))
    model.save_pretrained(tmp_path)
    for name in names:
        model.set_adapter(name)
        assert torch.equal(logits(loaded(llama(), tmp_path / name), batch), logits(model, batch))


def test_averages_and_filters_do_not_touch_tables():
    """Tables are no state: an exponential average with buffers, and whoever multiplies or drops what is in state_dict()."""
    model, batch = wrapped(), inputs("llama")
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(3):
        averaged.update_parameters(model)
    # Values that do not change average to themselves, but for rounding.
    torch.testing.assert_close(logits(averaged.module, batch), logits(model, batch), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(pools(model), pools(averaged.module), strict=True):
        assert torch.equal(ours.index_a, theirs.index_a)
        assert torch.equal(ours.index_b, theirs.index_b)
    assert not [key for key in model.state_dict() if "index" in key]
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ what could go wrong silently


@pytest.mark.parametrize("name", ["shards_a", "shards_b", "index_a", "index_b"])
def test_adapters_named_like_a_pool_s_tensors_are_refused(name):
    """PEFT leaves out of a file what ends in another adapter's name: every other adapter would lose half of itself."""
    model = wrapped()
    with pytest.raises(
        ValueError, match=f"adapter_name must not be one of shards_a, shards_b, index_a, index_b, .* got '{name}'"
    ):
        model.add_adapter(name, config())
    with pytest.raises(ValueError, match="adapter_name must not be one of"):
        get_peft_model(llama(), config(), adapter_name=name)
    assert list(model.peft_config) == ["default"]


class Ambiguous(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(8, 8)}), "a_b": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer["a_b"](layer["a"]["b"](x))
        return x


def test_linear_types_that_differ_in_punctuation_alone(tmp_path):
    """Not in one adapter; and adapters for either do not meet, though their pools' names are one."""
    fields = {"r": 2, "equivalent_rank": 2, "shards_per_vector": 2, "init_weights": False}
    with pytest.raises(ValueError, match="linear types must differ in more than punctuation, got layers"):
        get_peft_model(Ambiguous(), MoSConfig(**fields, target_modules=["a.b", "a_b"]))
    model, x = get_peft_model(Ambiguous(), MoSConfig(**fields, target_modules=["a_b"])), torch.randn(3, 8)
    model.add_adapter("second", MoSConfig(**fields, target_modules=["a.b"]))
    model.save_pretrained(tmp_path)
    for name in ("default", "second"):
        model.set_adapter(name)
        alone = loaded(Ambiguous(), tmp_path / ("" if name == "default" else name))
        assert torch.equal(alone(x), model(x))
        assert not torch.allclose(model(x), Ambiguous()(x), atol=1e-3)


@pytest.mark.parametrize("other", [{"hidden_size": 128}, {"num_key_value_heads": 4}])
def test_a_model_of_another_width(other, tmp_path):
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"the adapter must be for this model, got an adapter without \['base_model.mos_"
    ):
        loaded(llama(**other), tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.float() + 0.7, "index_a must be an integer tensor, .* got torch.float32"),
        (lambda t: t.bool(), "index_a must be an integer tensor, .* got torch.bool"),
        (lambda t: t.long() + 2**32, "index_a must use public shards in"),
    ],
)
def test_tables_that_are_no_indices(spoil, message, tmp_path):
    model = wrapped()
    by_hand(pools(model))
    model.save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "adapter_model.bin"
    tensors = torch.load(file)
    key = next(k for k in tensors if k.endswith("index_a"))
    torch.save({**tensors, key: spoil(tensors[key])}, file)
    with pytest.raises(ValueError, match=message):
        loaded(llama(), tmp_path)


def test_fields_of_a_later_version(tmp_path):
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match=r"must only have fields that this version knows, got \{'use_dora': True\}"):
        mos_ext.load_adapter(llama(), tmp_path)


def test_one_way_in_at_a_time():
    with pytest.raises(
        ValueError, match="model must not be adapted yet, got one where base_model.model.*q_proj is a MoSLinear"
    ):
        mos_ext.adapt(wrapped(), NATIVE)
    with pytest.raises(ValueError, match="model must not be adapted yet, got one where .* is a Linear"):
        mos_ext.adapt(get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), NATIVE)
    with pytest.raises(
        ValueError, match="model must not be adapted with mos_ext.adapt, got one where model.layers.0.self_attn"
    ):
        get_peft_model(mos_ext.adapt(llama(), NATIVE), config(target_modules=["lm_head"], r=3))
    with pytest.raises(ValueError, match="got a PEFT model: use its own merge_adapter"):
        mos_ext.merge(wrapped())
    with pytest.raises(
        TypeError, match="config must be a mos_ext.MoSConfig, got a mos_ext.integrations.peft.config.MoSConfig"
    ):
        mos_ext.adapt(llama(), config())


def test_weighted_combinations_say_what_to_do():
    model, _ = several()
    with pytest.raises(NotImplementedError, match="MoS adapters cannot be combined into one"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed")


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True.:UserWarning")  # PEFT's, at every step
def test_tied_weights_are_not_merged():
    base = llama(tie_word_embeddings=True)
    model = wrapped(base, target_modules=["lm_head"], r=3)
    before = base.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match="must belong to one module alone"):
        model.merge_adapter()
    assert torch.equal(base.get_input_embeddings().weight, before)


@pytest.mark.parametrize("at_once", [False, True])
def test_merging_is_all_or_nothing(at_once):
    """In one layer with several adapters, and over the layers of a model."""
    model, _ = several()
    last = pools(model)[-1]
    with torch.no_grad():
        last.shards_b[-1] = float("nan")  # a private shard of the last layer
        if at_once:
            pools(model, "other")[0].shards_b[-1] = float("nan")
    before = {n: layer.base_layer.weight.clone() for n, layer in layers(model).items()}
    names = ["other", "default"] if at_once else ["default"]
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(adapter_names=names, safe_merge=True)
    for name, layer in layers(model).items():
        assert layer.merged_adapters == []
        torch.testing.assert_close(layer.base_layer.weight, before[name], rtol=1e-6, atol=1e-7)  # one rounding


def test_copies_of_a_merged_model_unmerge():
    model, batch = wrapped(), inputs("llama")
    adapted = logits(model, batch)
    model.merge_adapter()
    clone = copy.deepcopy(model)
    clone.unmerge_adapter()
    torch.testing.assert_close(logits(clone, batch), adapted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        pools(model)[0].shards_b.add_(1)
    with pytest.raises(ValueError, match="got changed pools of adapter default"):
        copy.deepcopy(model).unmerge_adapter()


def test_global_hooks_see_the_base():
    model, seen = wrapped(), []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append((module, output))
    )
    try:
        logits(model, inputs("llama"))
    finally:
        handle.remove()
    bases = {layer.base_layer for layer in layers(model).values()}
    assert bases <= {module for module, _ in seen}
    assert mos_ext.explain(model).layers[0].calls == {"modules have global hooks": 1}


class Configurable(nn.Linear):
    def forward(self, x, training=False):
        return super().forward(x) * (2 if training else 1)


def test_a_base_s_own_keywords():
    base = nn.ModuleDict({"layers": nn.ModuleList([Configurable(8, 8) for _ in range(2)])})
    model = get_peft_model(
        base, MoSConfig(r=2, equivalent_rank=2, shards_per_vector=2, target_modules=["0", "1"], init_weights=False)
    )
    layer, x = model.base_model.model["layers"][1], torch.randn(3, 8)
    delta = x @ layer.get_delta_weight("default").T
    torch.testing.assert_close(layer(x, training=True), 2 * nn.functional.linear(x, layer.weight, layer.bias) + delta)


def test_strength(tmp_path):
    """Of each adapter and layer, under the names of LoRA's layers, which diffusers calls; in float64."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double(),
        MoSConfig(r=4, alpha=6, target_modules=["0", "1"], init_weights=False, pool_dtype="float64"),
    )
    model.add_adapter("other", MoSConfig(r=4, target_modules=["0"], init_weights=False, pool_dtype="float64"))
    first, second = model.base_model.model
    x = torch.randn(3, 8, dtype=torch.float64)
    base = first.base_layer(x)
    with torch.no_grad():
        delta = first(x) - base

    def check(strength):
        torch.testing.assert_close(first(x), base + strength * delta)
        assert first.scaling["default"] == strength * 6 / 4

    first.set_scale("default", 0.5)
    check(0.5)
    assert second.scaling["default"] == 6 / 4  # the other layer of the same pool
    first.scale_layer(3)
    check(1.5)
    first.unscale_layer(2)
    check(0.75)
    assert first.scaling["other"] == 16 / 4  # is not active
    torch.testing.assert_close(copy.deepcopy(first)(x), first(x))
    mos_ext.export_lora(model, tmp_path, adapter_name="default")
    exported = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (exported[f"base_model.model.0.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(x @ a.T @ b.T, 0.75 * delta)
    model.merge_adapter()
    check(0.75)
    with pytest.raises(ValueError, match="adapter default must not be merged while its scale changes"):
        first.scale_layer(2)
    model.unmerge_adapter()
    first.unscale_layer()
    check(1.0)
    first.set_scale("default", 0)
    check(0)
    first.set_scale("nobody", 2)
    for bad, error in ((float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="scale must be"):
            first.set_scale("default", bad)
    with pytest.raises(ValueError, match="scale must not be 0"):
        first.unscale_layer(0)
    check(0)


# ------------------------------------------------------------------------------------------------ what PEFT looks for


def test_what_pefts_table_of_capabilities_looks_for_by_name():
    """``scripts/generate_method_capabilities.py`` of PEFT's repository reads names; ``make metamathqa-dry`` runs it."""
    model_cls = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MOS]
    assert model_cls is mos_peft.MoSModel
    assert issubclass(model_cls, BaseTuner)  # "adapter"
    module = sys.modules[model_cls.tuner_layer_cls.__module__]
    layers = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    layers = [c for c in layers if issubclass(c, BaseTunerLayer)]
    assert {c.__name__ for c in layers} == {"MoSLayer", "MoSLinear", "MoSExperts"}
    assert any(c.merge is not BaseTunerLayer.merge for c in layers)
    assert hasattr(MoSLinear, "_mixed_batch_forward")
    assert hasattr(model_cls, "_enable_peft_forward_hooks")
    assert "resolve_quantization_backend" in inspect.getsource(module)
    links = [set(re.findall(r"https://arxiv\.org/abs/[^\s)]+", c.__doc__)) for c in (MoSConfig, model_cls)]
    assert links == [{"https://arxiv.org/abs/2410.00938"}, set()]
    options = {f.name for f in dataclasses.fields(MoSConfig)}
    assert {"modules_to_save", "target_parameters", "rank_pattern", "alpha_pattern", "use_rslora"} <= options
    assert "trainable_token_indices" not in options
