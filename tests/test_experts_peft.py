"""Experts and PEFT: exports to its ``target_parameters``, and MoS on experts as a PEFT method."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from models import MOE_KINDS, moe, randomize
from safetensors.torch import load_file

import mos_ext
from mos_ext import MoSConfig as Native

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft
    from peft import PeftModel, get_peft_model

from mos_ext.integrations.peft import MoSConfig, MoSExperts, MoSLinear
from mos_ext.routing import IndexTables, draw_tables

# PEFT asks transformers whether a model checkpoints under a name that transformers is giving up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]

KINDS = sorted(MOE_KINDS)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "q_b_proj", "o_proj"]  # what a kind has of them
RANKS = {"r": 3, "equivalent_rank": 2, "shards_per_vector": 2, "private_rank": 1, "alpha": 10}
EXPERTS = {**RANKS, "target_parameters": STACKS, "expert_equivalent_rank": 0.75}


def ids():
    torch.manual_seed(5)
    return torch.randint(1, 64, (2, 9))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(ids(), **kwargs).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def native(kind, target_modules=(), **changes):
    """Adapted, and doing something."""
    return randomize(
        mos_ext.adapt(moe(kind), Native(**{**EXPERTS, "target_modules": target_modules, **changes}))
    ).eval()


# ------------------------------------------------------------------------------------------------ exports


@pytest.mark.parametrize("modules", [(), ATTENTION], ids=["experts alone", "with modules"])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_the_same_model_in_peft(kind, modules, tmp_path):
    model = native(kind, modules)
    mos_ext.export_lora(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert bool(stored["target_modules"]) == bool(modules)
    want, base = logits(model), logits(moe(kind))
    assert (want - base).abs().max() > 0.1
    close(logits(PeftModel.from_pretrained(moe(kind), tmp_path)), want)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_exports_of_one_stack(kind, stack, tmp_path):
    model = native(kind, target_parameters=[stack], alpha_pattern={r"experts\..*": 3})
    mos_ext.export_lora(model, tmp_path, rank=8, dtype=torch.float64)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.partition("experts.")[2] for name in tensors} == {"lora_A.weight", "lora_B.weight"}
    for name, tensor in tensors.items():
        assert tensor.shape["lora_B" in name] == 8 * 4  # the padded rank of four experts
    close(logits(PeftModel.from_pretrained(moe(kind), tmp_path)), logits(model))


def test_exports_of_other_stacks_in_other_layers(tmp_path):
    """PEFT wraps a module once for each parameter, so names depend on what else is adapted there; and ranks differ."""
    names = ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj", "1.mlp.experts.gate_up_proj"]
    changes = {"rank_pattern": {r"1\.mlp\.experts\.gate_up_proj": 2}, "alpha_pattern": {r"1\..*": 7}}
    model = native("qwen3_moe", ["v_proj"], target_parameters=names, **changes)
    mos_ext.export_lora(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_parameters"] == [f"model.layers.{name}" for name in names]
    close(logits(PeftModel.from_pretrained(moe("qwen3_moe"), tmp_path)), logits(model))


@pytest.mark.parametrize("targets", [["gate_proj"], "all-linear"])
@pytest.mark.parametrize("parameters", [(), STACKS])
def test_modules_that_peft_takes_for_experts_are_not_exported(targets, parameters, tmp_path):
    """PEFT would leave them out, with a warning, and make adapters on experts of them."""
    changes = {} if parameters else {"expert_equivalent_rank": None}
    ranks = {"r": 2, "private_rank": 0}
    model = native("glm4_moe", targets, target_parameters=parameters, **ranks, **changes)
    with pytest.raises(
        ValueError, match="must have modules that PEFT adapts, got .*gate_proj.*takes for the experts of a Glm4MoeFor"
    ):
        mos_ext.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ a PEFT method


def config(**changes):
    return MoSConfig(**{**EXPERTS, "target_modules": ["q_proj", "q_b_proj"], **changes})


def wrapped(kind="qwen3_moe", base=None, **changes):
    """A PEFT model whose adapter does something."""
    torch.manual_seed(1)
    return get_peft_model(moe(kind) if base is None else base, config(init_weights=False, **changes)).eval()


def pools(model, name="default"):
    return [pool for adapter, pool in model.base_model._named_pools() if adapter == name]


def experts(model):
    return {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, MoSExperts)}


def weights(model):
    """Of the base, under its own names."""
    return {n.replace(".base_layer", ""): p.clone() for n, p in model.named_parameters() if "mos_" not in n}


def loss(model):
    model(ids(), labels=ids()).loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_adapter_as_adapt(kind):
    """One planner and one computation: equal pools give equal logits and gradients, bit for bit."""
    ours, theirs = get_peft_model(moe(kind), config()), native(kind, ["q_proj", "q_b_proj"])
    assert torch.equal(logits(ours.eval()), logits(mos_ext.adapt(moe(kind), Native(**EXPERTS, target_modules=[]))))
    for a, b in zip(pools(ours), theirs.mos_pools.pools, strict=True):
        assert torch.equal(a.index_a, b.index_a)
        assert torch.equal(a.index_b, b.index_b)
        a.load_state_dict(b.state_dict())
    assert torch.equal(logits(ours), logits(theirs))
    loss(ours)
    loss(theirs)
    for a, b in zip(pools(ours), theirs.mos_pools.pools, strict=True):
        assert torch.equal(a.shards_a.grad, b.shards_a.grad)
        assert torch.equal(a.shards_b.grad, b.shards_b.grad)
    assert ours.get_nb_trainable_parameters()[0] == mos_ext.parameter_report(theirs).trainable
    assert set(experts(ours)) == {
        name.rpartition(".")[0] for t in theirs.mos_pools.linear_types for name in t.modules if t.kind.experts
    }
    for explained in mos_ext.explain(ours).layers:
        on_experts = explained.name.endswith("experts")
        assert explained.path == ("grouped with the experts" if on_experts else "fused with the base layer")
        assert explained.calls == {explained.path: 3}
    names = {n.rpartition(".")[0] for n, _ in moe(kind).named_parameters() if n.endswith("down_proj")}
    assert {n for n, p in ours.get_base_model().named_parameters() if "experts.base_layer" in n} >= {
        f"{name}.base_layer.down_proj" for name in names
    }


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    plain, checkpointed = wrapped(dropout=0.2), wrapped(dropout=0.2)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(3)
        loss(model)
    for a, b in zip(pools(plain), pools(checkpointed), strict=True):
        assert a.shards_b.grad.abs().sum() > 0
        close(a.shards_a.grad, b.shards_a.grad)
        close(a.shards_b.grad, b.shards_b.grad)


def several(**changes):
    """Two adapters, the second on one stack alone."""
    model = wrapped(**changes)
    torch.manual_seed(2)
    other = {"r": 2, "seed": 4, "expert_equivalent_rank": 1, "target_parameters": ["experts.down_proj"]}
    model.add_adapter("other", config(init_weights=False, **other))
    return model


def test_adapters_are_independent():
    base, model = logits(moe("qwen3_moe")), several()
    first = logits(model)
    assert torch.equal(first, logits(wrapped()))
    assert all(p.requires_grad for pool in pools(model) for p in pool.parameters())
    assert not any(p.requires_grad for pool in pools(model, "other") for p in pool.parameters())
    model.set_adapter("other")
    second = logits(model)
    assert (second - first).abs().max() > 0.01 < (second - base).abs().max()
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"other"}
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert pools(model) == []
    assert all(layer.mos_layer.keys() == {"other"} for layer in experts(model).values())
    assert torch.equal(logits(model.unload()), base)


def test_several_active_at_once_add_up():
    """In float64: results and gradients are those of dense weights."""
    model = several(base=moe("gpt_oss").double(), pool_dtype="float64")
    for pool in pools(model, "other"):
        pool.double()
    model.base_model.set_adapter(["default", "other"])
    layer = next(iter(experts(model).values()))
    layer.base_layer.config._experts_implementation = "eager"  # the one that takes float64
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    shares = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    dense = {name: getattr(layer.base_layer, name).detach().clone() for name in ("gate_up_proj", "down_proj")}
    leaves = [x, shares]
    for name in ("default", "other"):
        for parameter, (pool, k) in layer.parts(name).items():
            a, b = pool.factors(k)
            dense[parameter] = dense[parameter] + pool.scales[k] * (b @ a).mT  # GPT-OSS keeps (in, out)
            leaves += [pool.shards_a, pool.shards_b]
    assert len(leaves) == 2 + 6
    want = torch.func.functional_call(layer.base_layer, dense, (x, chosen, shares))
    got = layer(x, chosen, shares)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine, theirs)


def test_rows_of_several_adapters_are_refused():
    model = several()
    with pytest.raises(ValueError, match="adapter_names must be None where experts are adapted, .* use set_adapter"):
        logits(model, adapter_names=["default", "__base__"])
    assert torch.equal(logits(model, adapter_names=["__base__"] * 2), logits(moe("qwen3_moe")))


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind):
    model, before = wrapped(kind), weights(moe(kind))
    adapted = logits(model)
    model.merge_adapter(safe_merge=True)
    close(logits(model), adapted)
    assert {layer.path() for layer in experts(model).values()} == {"the base layer alone"}
    model.unmerge_adapter()
    for name, weight in weights(model.get_base_model()).items():
        assert torch.equal(weight, before[name])
    merged = model.merge_and_unload()
    assert type(merged) is type(moe(kind))
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in before.items()}
    close(logits(merged), adapted)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged other:UserWarning")
def test_several_are_merged_and_unmerged_one_by_one():
    model, before = several(), weights(moe("qwen3_moe"))
    model.base_model.set_adapter(["default", "other"])
    want = logits(model)
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    close(logits(model), want)
    for layer in experts(model).values():
        layer.unmerge_all_but(1)
        assert layer.merged_adapters == ["other"]
    clone = copy.deepcopy(model)
    for unmerged in (model, clone):
        unmerged.unmerge_adapter()
        for name, weight in weights(unmerged.get_base_model()).items():
            assert torch.equal(weight, before[name])
        close(logits(unmerged), want)


def test_merging_is_all_or_nothing():
    model, before = wrapped(), weights(moe("qwen3_moe"))
    with torch.no_grad():
        pools(model)[-1].shards_b[-1] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_adapter(safe_merge=True)
    for name, weight in weights(model.get_base_model()).items():
        assert torch.equal(weight, before[name])
    assert all(layer.merged_adapters == [] for layer in experts(model).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: pools(model)[-1].shards_b,
            "experts: the pools must not change .* changed pools of adapter default",
        ),
        (lambda model: next(iter(experts(model).values())).base_layer.down_proj, "the weight must not change between"),
    ],
)
def test_what_changed_since_the_merge(change, message):
    model = wrapped()
    model.merge_adapter()
    with torch.no_grad():
        change(model).add_(1)
    with pytest.raises(ValueError, match=message):
        model.unmerge_adapter()


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("modules", [["q_proj", "q_b_proj"], []], ids=["with modules", "experts alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_go_both_ways(kind, modules, tmp_path):
    """One format: what PEFT saved, load_adapter loads, and the other way round, bit for bit."""
    model = wrapped(kind, target_modules=modules, rank_pattern={r"experts\.down_proj": 2})
    model.save_pretrained(tmp_path / "peft")
    theirs = mos_ext.load_adapter(moe(kind), tmp_path / "peft").eval()
    assert torch.equal(logits(theirs), logits(model))
    mos_ext.save_adapter(randomize(theirs), tmp_path / "native")
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(moe(kind), tmp_path / "native", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again), logits(theirs))
    model.load_adapter(tmp_path / "native", adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(theirs))
    again.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("native", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    role = next(iter(experts(model))).replace(".", "_").replace("_1_", "_").replace("_0_", "_")
    assert sum(name.startswith(f"base_model.mos_{role}_") for name in one) == 4


def test_exports_of_a_peft_model(tmp_path):
    model = several()
    for name in ("default", "other"):
        mos_ext.export_lora(model, tmp_path / name, adapter_name=name)
        model.set_adapter(name)
        close(logits(PeftModel.from_pretrained(moe("qwen3_moe"), tmp_path / name)), logits(model))


def test_tables_given_by_hand(tmp_path):
    model = wrapped()
    other = dataclasses.replace(model.peft_config["default"].method(), seed=77)
    for pool in pools(model):
        budget = other.for_experts() if pool.experts else other
        drawn = draw_tables(budget, pool.stream, pool.matrix_ranks)
        pool.set_tables(IndexTables(drawn.a, drawn.b))
    model.save_pretrained(tmp_path)
    assert (logits(model) - logits(wrapped())).abs().max() > 0.01
    assert torch.equal(logits(PeftModel.from_pretrained(moe("qwen3_moe"), tmp_path)), logits(model))
    assert torch.equal(logits(mos_ext.load_adapter(moe("qwen3_moe"), tmp_path)), logits(model))


# ------------------------------------------------------------------------------------------------ selection


def test_experts_alone():
    """None is PEFT's choice for an architecture, as of LoRA, where it has one."""
    for targets in ([], None):
        model = wrapped(target_modules=targets)
        assert not any(isinstance(m, MoSLinear) for m in model.modules())
        assert model.peft_config["default"].target_modules == set()
        assert model.base_model.targeted_parameter_names == [
            f"model.layers.{k}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj") for k in range(2)
        ]
    mixtral = wrapped("mixtral", target_modules=None)
    assert mixtral.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert len(experts(mixtral)) == 2


def test_parameters_are_selected_as_lora_selects_them():
    for names in (STACKS, ["mlp.experts.down_proj"], ["model.layers.1.mlp.experts.gate_up_proj"]):
        lora = get_peft_model(moe("qwen3_moe"), peft.LoraConfig(target_modules=[], target_parameters=names))
        ours = wrapped(target_modules=[], target_parameters=names)
        assert set(ours.base_model.targeted_parameter_names) == set(lora.base_model.targeted_parameter_names)
    whole = wrapped(target_modules=[], modules_to_save=["layers.1.mlp"])
    assert set(experts(whole)) == {"model.layers.0.mlp.experts"}
    with pytest.raises(ValueError, match="target_parameters must match at least one parameter that stacks experts"):
        wrapped(target_parameters=["w1"])
    with pytest.raises(
        TypeError, match=r"must select parameters that stack experts, .* got .*embed_tokens.weight \(64,"
    ):
        wrapped(target_parameters=["embed_tokens.weight"])


def test_what_all_linear_leaves_out_is_said(caplog):
    caplog.set_level("WARNING", "mos_ext")
    model = wrapped(target_modules="all-linear", target_parameters=None, expert_equivalent_rank=None)
    explained = mos_ext.explain(model)
    assert {name.partition("mlp.")[2] for name in explained.left_out} == set(STACKS)
    assert "not adapted: model.layers.*.mlp.experts.down_proj (2 modules: it stacks" in str(explained)
    assert "layers.*.mlp.experts.down_proj (2 modules: it stacks experts, which target_parameters=['mlp.experts.d" in (
        caplog.text
    )
    caplog.clear()
    model.add_adapter("other", config(target_modules="all-linear"))
    assert "experts" not in caplog.text
    assert mos_ext.explain(model).left_out == {}


def test_a_base_that_gets_a_second_adapter():
    """As in a notebook cell that runs again; PEFT warns of it."""
    base = moe("qwen3_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = wrapped(base=base)
        want = logits(first)
        second = get_peft_model(base, config(init_weights=False, seed=4), adapter_name="other").eval()
        assert (logits(second) - want).abs().max() > 0.01
        second.set_adapter("default")
        assert torch.equal(logits(second), want)
        assert {id(pool) for pool in pools(first)} == {id(pool) for pool in pools(second)}
        with pytest.raises(
            ValueError, match="must have all modules of the earlier .* got none for .*experts.gate_up_proj"
        ):
            get_peft_model(base, config(target_parameters=["experts.down_proj"]))
    assert torch.equal(logits(first), want)


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize(
    "change",
    [lambda m: m.register_forward_hook(print), lambda m: setattr(m, "forward", type(m).forward.__get__(m))],
    ids=["a hook", "a forward"],
)
def test_what_somebody_put_on_the_experts_is_refused(change):
    """The adapted layer does not call them."""
    base, message = moe("qwen3_moe"), "must have no hooks and the forward of their class, got a Qwen3MoeExperts"
    change(base.model.layers[0].mlp.experts)
    with pytest.raises(ValueError, match=message):
        wrapped(base=base)
    assert not any("mos" in type(m).__module__ for m in base.modules())
    model = wrapped()
    change(model.get_base_model().model.layers[1].mlp.experts.base_layer)
    with pytest.raises(ValueError, match=message):
        logits(model)


def test_strength():
    model = several()
    layer = next(iter(experts(model).values()))
    assert layer.scaling["default"] == {"gate_up_proj": 10 / 3, "down_proj": 10 / 3}
    assert dict(layer.r) == {"default": {"gate_up_proj": 3, "down_proj": 3}, "other": {"down_proj": 2}}
    for one in experts(model).values():
        one.set_scale("default", 0)
    for m in model.modules():
        if isinstance(m, MoSLinear):
            m.set_scale("default", 0)
    close(logits(model), logits(moe("qwen3_moe")))
    layer.unscale_layer()
    assert layer.scaling["default"]["down_proj"] == 10 / 3


def test_autocast_and_half_bases():
    model = wrapped(base=moe("mixtral").bfloat16())
    assert {pool.shards_a.dtype for pool in pools(model)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    torch.manual_seed(1)
    half = get_peft_model(moe("mixtral").bfloat16(), config(init_weights=False), autocast_adapter_dtype=False)
    assert {pool.shards_a.dtype for pool in pools(half)} == {torch.bfloat16}
    ours, theirs = wrapped("mixtral"), native("mixtral", ["q_proj"])
    for a, b in zip(pools(ours), theirs.mos_pools.pools, strict=True):
        a.load_state_dict(b.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(ours), logits(theirs))
        loss(ours)
        loss(theirs)
    for a, b in zip(pools(ours), theirs.mos_pools.pools, strict=True):
        assert torch.equal(a.shards_a.grad, b.shards_a.grad)


def test_training_lowers_the_loss_and_leaves_the_base_alone():
    model = get_peft_model(moe("granitemoe"), config(dropout=0.1))
    before = weights(moe("granitemoe"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        out = model(ids(), labels=ids())
        losses.append(out.loss.item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model.get_base_model()).items())
