"""Adapters on the experts of transformers 5: every family that is named, end to end, and what must be refused."""

import copy
import importlib
import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from models import MOE_KINDS, llama, moe, randomize
from torch import nn

import mos_ext
from mos_ext import MoSConfig, adapt, experts, explain, load_adapter, merge, parameter_report, save_adapter, unmerge
from mos_ext.experts import MoSExperts, Routing
from mos_ext.linear import GROUPED
from mos_ext.planner import expert_stacks

STACKS = ("experts.gate_up_proj", "experts.down_proj")
CONFIG = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_parameters=STACKS)
KINDS = list(MOE_KINDS)


def adapted(kind="qwen3_moe", config=CONFIG, **changes):
    """A small model with a random adapter, and the tokens to try it on."""
    return randomize(adapt(moe(kind), config)), tokens()


def tokens():
    return torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


def blocks(model):
    return [module for module in model.modules() if isinstance(module, MoSExperts)]


def gradients(model, x, **keywords):
    model.zero_grad()
    model(x, labels=x, **keywords).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def same(got, want, rtol=1e-4, atol=1e-6):
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------ every family


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_only_pools_are_trained(kind):
    model, x = moe(kind), tokens()
    names, want = [n for n, _ in model.named_parameters()], logits(model, x)
    count = len(expert_stacks(model))
    adapt(model, CONFIG)
    torch.testing.assert_close(logits(model, x), want, rtol=1e-5, atol=1e-6)
    with mos_ext.disabled(model):
        assert torch.equal(logits(model, x), want)
    assert [n for n, _ in model.named_parameters() if "mos_pools" not in n] == names
    assert all(n.startswith("mos_pools.") for n, p in model.named_parameters() if p.requires_grad)
    assert sum(len(block.adapters) for block in blocks(model)) == count > 0
    assert {layer.path for layer in explain(model).layers if layer.name.endswith("experts")} == {GROUPED}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_a_merged_model(kind):
    """What the base itself computes with W + scale B A, whatever its layout, bias, gate and order of things."""
    model, x = adapted(kind)
    got = logits(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    assert all(block.merged for block in blocks(model))
    torch.testing.assert_close(logits(model, x), got, rtol=1e-4, atol=1e-5)
    assert not torch.equal(
        model.state_dict()[next(iter(expert_stacks(model)))], before[next(iter(expert_stacks(model)))]
    )
    unmerge(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(logits(model, x), got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_one_node_has_the_gradients_of_differentiable_operators(kind, reentrant, monkeypatch):
    """With and without gradient checkpointing; the router's gradient, which reaches x, included."""
    model, x = adapted(kind)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    got = gradients(model, x)
    monkeypatch.setattr(experts, "_compute", lambda block, *rest: block.composed(*rest))
    want = gradients(model, x)
    same(got, want)
    assert all(grad.any() for grad in got.values())


@pytest.mark.parametrize("kind", KINDS)
def test_training_saving_and_loading(kind, tmp_path):
    model, x = adapted(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    save_adapter(model, tmp_path)
    again = load_adapter(moe(kind), tmp_path)
    assert torch.equal(logits(again, x), logits(model, x))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_parameters"] == list(STACKS)


def test_router_and_auxiliary_loss_are_the_base_s():
    """At first everything is; and what the router computes is never touched."""
    base, model = moe("qwen3_moe"), adapt(moe("qwen3_moe"), MoSConfig(r=4, equivalent_rank=2, target_modules=[],
                                                                     shards_per_vector=2, target_parameters=STACKS))  # fmt: skip
    x = tokens()
    want = base(x, labels=x, output_router_logits=True)
    got = model(x, labels=x, output_router_logits=True)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    for a, b in zip(got.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ one block


def block_of(kind="qwen3_moe", dtype=torch.float32, **config):
    config = {"r": 4, "equivalent_rank": 2, "shards_per_vector": 2, "target_modules": [], **config}
    model = randomize(adapt(moe(kind).to(dtype), MoSConfig(target_parameters=STACKS, **config)))
    return blocks(model)[0], model


def inputs_of(block, rows=11, dtype=torch.float32, k=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 32, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(rows, block.num_experts, generator=generator).argsort(1)[:, :k].contiguous()
    weights = torch.rand(rows, k, generator=generator).to(dtype).requires_grad_()
    return x, index, weights


def test_routing_by_hand():
    routing = Routing.of(torch.tensor([[2, 0], [0, 3], [2, 0]]), 4)
    assert routing.expert.tolist() == [0, 0, 0, 2, 2, 3]
    assert routing.token.tolist() == [0, 1, 2, 0, 2, 1]
    assert routing.ends.tolist() == [3, 3, 5, 6]
    assert routing.ends.dtype == torch.int32
    rows = torch.arange(6.0).unsqueeze(1)
    assert routing.combine(rows).flatten().tolist() == [3.0, 6.0, 6.0]


@pytest.mark.parametrize("choice", ["all in one", "one token", "no token"])
def test_experts_without_tokens(choice):
    block, model = block_of()
    x, index, weights = inputs_of(block, {"all in one": 9, "one token": 1, "no token": 0}[choice], k=1)
    if choice == "all in one":
        index = torch.full_like(index, 2)
    y = block(x, index, weights)
    assert y.shape == x.shape
    y.sum().backward()
    merge(model)
    torch.testing.assert_close(block(x, index, weights), y, rtol=1e-4, atol=1e-5)


def test_saves_less_than_the_frozen_block_and_s():
    """x, what `up` computes, and S; the frozen block keeps what the gate is made of three times over."""
    block, model = block_of()
    frozen = blocks(adapt(moe("qwen3_moe"), CONFIG))[0].release()
    x, index, weights = inputs_of(block, 64)
    known = {p.untyped_storage().data_ptr() for m in (model, frozen) for p in m.parameters()}

    def saved(module):
        total = 0

        def pack(t):
            nonlocal total
            total += 0 if t.untyped_storage().data_ptr() in known else t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x, index, weights)
        return total

    s = 2 * 128 * 4 * 4
    assert saved(block) <= saved(frozen) + s


def test_dropout_is_in_training_alone_and_follows_the_seed():
    block, model = block_of(dropout=0.4)
    arguments = inputs_of(block, 40)
    want = block(*arguments)
    assert torch.equal(block(*arguments), want)
    model.train()
    torch.manual_seed(3)
    first = block(*arguments)
    torch.manual_seed(3)
    assert torch.equal(block(*arguments), first)
    assert not torch.equal(block(*arguments), first)
    assert not torch.equal(first, want)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_autocast(kind):
    model, x = adapted(kind)
    want = logits(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, x)
        model.train()
        model(x, labels=x).loss.backward()
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    block, model = block_of(dtype=dtype, pool_dtype="float64" if dtype == torch.float64 else "float32")
    x, index, weights = inputs_of(block, dtype=dtype)
    y = block(x, index, weights)
    assert y.dtype == dtype
    y.sum().backward()
    merge(model)
    block.config._experts_implementation = "eager"  # transformers' grouped product knows no float64
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(block(x, index, weights), y, **tolerance)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # as in test_compile.py
def test_one_graph_for_every_routing():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    block, _ = block_of()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *arguments: block(*arguments), fullgraph=True, backend=counter)
    x, index, weights = inputs_of(block, 12)
    for shift in range(3):
        routed = (index + shift) % block.num_experts
        torch.testing.assert_close(compiled(x, routed, weights), block(x, routed, weights))
    got, want = (torch.autograd.grad(f(x, index, weights).sum(), [x, weights]) for f in (compiled, block))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_experts_that_are_trained_themselves_get_their_gradients():
    block, _ = block_of()
    x, index, weights = inputs_of(block)
    block.down_proj.requires_grad_()
    y = block(x, index, weights)
    y.sum().backward()
    assert block.down_proj.grad.shape == block.down_proj.shape
    # the loss is linear in the last product's weights
    assert torch.allclose(
        (block.down_proj.grad * block.down_proj).sum() + branch_part(block, x, index, weights), y.sum(), atol=1e-4
    )


def branch_part(block, x, index, weights):
    """What the adapter of the last product adds to the sum of the results."""
    with torch.no_grad():
        whole = block(x, index, weights).sum()
        pool, layer = block.adapters.pop("down_proj")
        without = block(x, index, weights).sum()
        block.adapters["down_proj"] = pool, layer
    return whole - without


def test_copies_and_pickles():
    model, x = adapted()
    want = logits(model, x)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone, x), want)
    assert blocks(clone)[0].adapters["down_proj"][0] is not blocks(model)[0].adapters["down_proj"][0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), x), want)
    assert type(pickle.loads(pickle.dumps(blocks(model)[0]))) is type(blocks(model)[0])
    merge(model)
    clone = copy.deepcopy(model)
    unmerge(clone)
    assert torch.equal(logits(clone, x), want)


def test_unload_gives_the_base_back():
    model, x = moe("gpt_oss"), tokens()
    want, kinds = logits(model, x), [type(m) for m in model.modules()]
    adapt(model, CONFIG)
    assert isinstance(blocks(model)[0], kinds[[k.__name__ for k in kinds].index("GptOssExperts")])
    mos_ext.unload(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model, x), want)
    adapt(model, CONFIG)


# ------------------------------------------------------------------------------------------------ budget and names


def test_a_fraction_of_a_rank_for_every_expert(tmp_path):
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=[], target_parameters=STACKS,
                       expert_equivalent_rank=0.5)  # fmt: skip
    model, x = adapted(config=config)
    report = parameter_report(model)
    by_name = {t.name.partition("[")[0].rpartition(".")[2]: t for t in report.types}
    for name, (fan_in, fan_out) in {"gate_up_proj": (32, 32), "down_proj": (16, 32)}.items():
        assert by_name[name].num_layers == 8
        assert by_name[name].num_shards == 8  # 0.5 * 8 matrices * 2
        assert by_name[name].trainable == 4 * (fan_in + fan_out)
    assert report.lora_parameters == 8 * 4 * (32 + 32 + 16 + 32)
    assert "0.5" in str(report)
    save_adapter(model, tmp_path)
    again = load_adapter(moe("qwen3_moe"), tmp_path)
    assert torch.equal(logits(again, x), logits(model, x))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"expert_equivalent_rank": 0.3}, r"must be a whole number of shards.* got 0.3 \* 8 \* 2 = 4.8; nearest valid: "
                                          r"expert_equivalent_rank=5/16"),
        ({"expert_equivalent_rank": 0.25}, r"r must be at most 2 for model.layers.0.mlp.experts.gate_up_proj, .* got 4; "
                                           r"nearest valid: r=2, or expert_equivalent_rank=0.5"),
        ({"shards_per_vector": 3}, "shards_per_vector must divide in_features=32 of model.layers.0.mlp.experts"),
        ({"target_parameters": ["nowhere"]}, r"target_parameters must match at least one parameter that stacks experts, got "
                                             r"\('nowhere',\); the model has: model.layers.\*.mlp.experts.down_proj, model"),
        ({"exclude_modules": ["experts"]}, "target_parameters must match at least one parameter"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit(config, message):
    model = moe("qwen3_moe")
    names = list(model.state_dict())
    config = {
        "r": 4,
        "equivalent_rank": 2,
        "shards_per_vector": 2,
        "target_modules": [],
        "target_parameters": STACKS,
    } | config
    with pytest.raises(ValueError, match=message):
        adapt(model, MoSConfig(**config))
    assert list(model.state_dict()) == names
    assert not blocks(model)


def test_what_is_no_stack_of_experts():
    for name in ("gate.weight", "q_proj.weight"):
        with pytest.raises(
            TypeError, match=r"target_parameters must select parameters that stack experts, .* got model"
        ):
            adapt(moe("qwen3_moe"), MoSConfig(r=2, equivalent_rank=2, target_parameters=[name]))
    with pytest.raises(ValueError, match="the model has: none"):
        adapt(llama(), MoSConfig(target_parameters=STACKS))
    model = moe("qwen3_moe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TypeError, match="expert parallelism"):
        adapt(model, CONFIG)
    model = moe("qwen3_moe")
    model.model.layers[0].mlp.experts.forward = lambda *a: None
    with pytest.raises(ValueError, match="whose forward was replaced"):
        adapt(model, CONFIG)
    assert not blocks(model)
    model = moe("qwen3_moe")
    experts_of = model.model.layers[0].mlp.experts
    experts_of.down_proj = nn.Parameter(experts_of.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match="plain floating-point weights, got model.layers.0.mlp.experts.down_proj"):
        adapt(model, CONFIG)


def test_what_all_linear_does_not_reach_is_said(caplog):
    model = adapt(moe("qwen3_moe"), MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2))
    assert "target_parameters=['mlp.experts.gate_up_proj'] includes" in caplog.text
    report = parameter_report(model)
    assert len(report.left_out) == 4
    assert "not adapted: model.layers.*.mlp.experts.down_proj (2 modules: it stacks experts" in str(report)
    text = str(explain(model))
    assert "model.layers.*.mlp.experts.gate_up_proj" in text
    assert "target_parameters=['mlp.experts.gate_up_proj']" in text
    caplog.clear()
    adapt(moe("qwen3_moe"), CONFIG)
    assert "experts" not in caplog.text


def test_experts_alone_and_one_stack_alone():
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=[], target_parameters=STACKS[1:])
    model, x = adapted(config=config)
    assert {name for block in blocks(model) for name in block.adapters} == {"down_proj"}
    assert len(parameter_report(model).types) == 1
    got = logits(model, x)
    model.train()
    assert all(grad.any() for grad in gradients(model, x).values())
    model.eval()
    torch.testing.assert_close(logits(merge(model), x), got, rtol=1e-4, atol=1e-5)


def test_rank_and_alpha_patterns_name_parameters():
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=[], target_parameters=STACKS,
                       rank_pattern={r"layers\.0\..*down_proj": 2}, alpha_pattern={"gate_up_proj": 8})  # fmt: skip
    model, x = adapted(config=config)
    first, second = blocks(model)
    pool, layer = first.adapters["down_proj"]
    assert (pool.ranks, layer) == ((2, 4), 0)
    assert pool.table("a", 0).shape == (4, 2, 2)
    assert pool.table("a", 1).shape == (4, 4, 2)
    assert second.adapters["gate_up_proj"][0].scales == (2.0, 2.0)
    got = logits(model, x)
    torch.testing.assert_close(logits(merge(model), x), got, rtol=1e-4, atol=1e-5)


def test_merged_and_changed():
    alone = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=[], target_parameters=STACKS)
    model, _ = adapted(config=alone)
    merge(model)
    block = blocks(model)[0]
    with pytest.raises(ValueError, match="must not be merged while its weights are loaded"):
        model.load_state_dict(model.state_dict())
    with torch.no_grad():
        block.down_proj.add_(1)
    with pytest.raises(ValueError, match="mlp.experts: the weight must not change .* got a changed or another weight"):
        unmerge(model)
    model, _ = adapted(config=alone)
    with torch.no_grad():
        blocks(model)[1].adapters["down_proj"][0].shards_b.fill_(float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="must be finite after merge"):
        merge(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# ------------------------------------------------------------------------------------------------ other layouts

# Of models whose experts are built otherwise than those above: (model, class, sizes by the names that the class reads).
SIZES = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "hidden_act": "silu"}
LAYOUTS = {
    "no gate": ("nemotron_h", "NemotronHExperts", {"n_routed_experts": 4, "moe_latent_size": None, "mlp_hidden_act": "relu2"}),
    "a norm behind": ("muse_spark", "MuseSparkExperts", {"num_local_experts": 4, "moe_hidden_size": 32, "post_norm_eps": 1e-5}),
    "transposed": ("aria", "AriaExperts", {"moe_num_experts": 4}),
    "transposed, bias": (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        {"num_local_experts": 4, "swiglu_alpha": 1.7, "swiglu_limit": 7.0},
    ),
    "another activation": ("gemma4", "Gemma4TextExperts", {"num_experts": 4, "hidden_activation": "gelu_pytorch_tanh"}),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(layout, implementation):
    """Merged, the base computes what the adapter adds, whichever of transformers' ways it takes."""
    name, kind, sizes = LAYOUTS[layout]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    config = SimpleNamespace(**SIZES, **sizes, _experts_implementation=implementation)
    base = getattr(module, kind)(config)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = nn.ModuleDict({"experts": base})
    names = ["up_proj" if layout == "no gate" else "gate_up_proj", "down_proj"]
    wanted = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=[],
                       target_parameters=[f"experts.{n}" for n in names])  # fmt: skip
    model = randomize(adapt(nn.Sequential(model), wanted))
    (block,) = blocks(model)
    x, index, weights = inputs_of(block)
    y = block(x, index, weights)
    got = torch.autograd.grad(y.square().sum(), [x, weights, *model.mos_pools.parameters()])
    merge(model)
    merged = block(x, index, weights)
    torch.testing.assert_close(merged, y, rtol=1e-4, atol=1e-4)
    want = torch.autograd.grad(merged.square().sum(), [x, weights])
    for a, b in zip(got[:2], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert all(grad.any() for grad in got[2:])
