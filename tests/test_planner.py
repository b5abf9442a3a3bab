"""Which modules are adapted and how they group, for every supported style of model, and the paper's parameter counts."""

import copy
import re

import pytest
import torch
from models import Block, bert, gpt2, llama, randomize, stack, vit
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import mos_ext
import mos_ext.integrations.peft as mos_peft
from mos_ext import MoSConfig
from mos_ext.adapt import mos_layers
from mos_ext.linear import AdaptedLayer
from mos_ext.planner import Base, expert_stacks, kinds_of, plan, role_of, why_opaque

SMALL = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=1)


def roles(model, config=SMALL):
    return {t.kind.role: (t.kind.in_features, t.kind.out_features, len(t.modules)) for t in plan(model, config)[1]}


def test_llama():
    assert roles(llama()) == {
        "model.layers.*.self_attn.q_proj": (64, 64, 4),
        "model.layers.*.self_attn.k_proj": (64, 32, 4),
        "model.layers.*.self_attn.v_proj": (64, 32, 4),
        "model.layers.*.self_attn.o_proj": (64, 64, 4),
        "model.layers.*.mlp.gate_proj": (64, 96, 4),
        "model.layers.*.mlp.up_proj": (64, 96, 4),
        "model.layers.*.mlp.down_proj": (96, 64, 4),
    }


def test_gpt2_conv1d():
    assert roles(gpt2()) == {
        "transformer.h.*.attn.c_attn": (48, 144, 3),
        "transformer.h.*.attn.c_proj": (48, 48, 3),
        "transformer.h.*.mlp.c_fc": (48, 192, 3),
        "transformer.h.*.mlp.c_proj": (192, 48, 3),
    }


def test_bert_keeps_equal_shapes_of_different_roles_apart():
    found = roles(bert())
    assert found["bert.encoder.layer.*.attention.output.dense"] == (48, 48, 3)
    assert found["bert.encoder.layer.*.output.dense"] == (96, 48, 3)
    assert len(found) == 6
    assert not any("pooler" in role or "classifier" in role for role in found)


def test_vit():
    found = roles(vit())
    assert len(found) == 6
    assert all(layers == 3 for *_, layers in found.values())


def test_the_same_role_with_two_shapes_is_two_types():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    config = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=0)
    assert [(t.name, t.modules) for t in plan(model, config)[1]] == [("*[8->16]", ("0", "2")), ("*[16->8]", ("1", "3"))]


@pytest.mark.parametrize(
    ("target", "exclude", "count"),
    [
        (["q_proj", "v_proj"], (), 8),
        (["self_attn.q_proj"], (), 4),
        (["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], (), 2),
        (r"model\.layers\.[02]\.mlp\..*_proj", (), 6),
        ("all-linear", ["down_proj"], 24),
        ("all-linear", r".*\.(q|k|v|o)_proj", 12),
    ],
)
def test_selection(target, exclude, count):
    config = MoSConfig(
        r=2, equivalent_rank=2, shards_per_vector=2, private_rank=1, target_modules=target, exclude_modules=exclude
    )
    assert sum(len(t.modules) for t in plan(llama(), config)[1]) == count


def test_selection_errors():
    model = llama()
    with pytest.raises(
        ValueError, match=r"target_modules must match .*got \('query',\).*model\.layers\.\*\.self_attn\.q_proj"
    ):
        plan(model, MoSConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="the model has: no linear module"):
        plan(nn.Sequential(nn.ReLU()), MoSConfig())
    with pytest.raises(TypeError, match=r"target_modules must select .* got model\.embed_tokens, a Embedding"):
        plan(model, MoSConfig(target_modules=["embed_tokens"]))
    with pytest.raises(
        ValueError,
        match=r"shards_per_vector must divide in_features=64 of model\.layers\.0\.self_attn\.q_proj, got 3; nearest valid: 2 or 4, or exclude the module",
    ):
        plan(model, MoSConfig(r=2, equivalent_rank=2, shards_per_vector=3, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"r must be at most 1 for lm_head, .* has 1 adapted module, got 4"):
        plan(model, MoSConfig(r=4, equivalent_rank=1, private_rank=0, shards_per_vector=2, target_modules=["lm_head"]))


def test_what_a_parent_reads_is_not_adapted_silently():
    """MultiheadAttention never calls its out_proj: an adapter there would do nothing. A subclass is called as it is."""

    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(nn.MultiheadAttention(8, 2), Quantised(8, 8), nn.Linear(8, 8))
    assert [t.modules for t in plan(model, MoSConfig(r=1, equivalent_rank=1, private_rank=0))[1]] == [("1", "2")]
    assert [why_opaque(module) for module in model[1:]] == ["the base layer is a Quantised", None]
    with pytest.raises(TypeError, match=r"got 0\.out_proj, whose weight MultiheadAttention reads instead, .* exclude"):
        plan(model, MoSConfig(target_modules=["out_proj"]))


LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_2_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_32_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("shape", "p1"),
    [(LLAMA_2_7B, 2_498_560), (LLAMA_2_13B, 3_911_680), (LLAMA_3_8B, 2_621_440), (LLAMA_32_3B, 1_519_616)],
    ids=["2-7B", "2-13B", "3-8B", "3.2-3B"],
)
def test_parameter_counts_of_the_paper(shape, p1):
    """Exactly e * P1 trainable parameters, on the meta device, independent of r, l and p."""
    for e, r, l, p in ((2, 4, 1, 0), (8, 16, 4, 1), (8, 32, 16, 3)):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape))
        mos_ext.adapt(model, MoSConfig(r=r, equivalent_rank=e, shards_per_vector=l, private_rank=p))
        report = mos_ext.parameter_report(model)
        assert report.trainable == e * p1
        assert report.lora_parameters == r * p1
        assert sum(t.trainable for t in report.types) == report.trainable


def test_index_table_size_of_the_paper():
    """LLaMA-2 7B, r=16, l=4: 28,672 entries."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **LLAMA_2_7B))
    mos_ext.adapt(model, MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1))
    assert sum(p.index_a.numel() + p.index_b.numel() for p in model.mos_pools.pools) == 28_672


def test_planning_changes_nothing():
    model = stack()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan(model, SMALL)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# ------------------------------------------------------------------- "all-linear" with the defaults on every model

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
STATES = {"state_size": 4, "time_step_rank": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
GATED = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GATE = "mlp.shared_expert_gate"
# model_type -> what its configuration needs, which ranks the defaults get, what is left out where it is a linear module
# (routers are in some versions of transformers).
ARCHITECTURES = {
    "deepseek_v3": ({**LATENT, **EXPERTS}, {8, 15, 16}, set()),
    "qwen2_moe": (EXPERTS, {16}, {GATE}),
    "qwen3_next": ({**EXPERTS, **GATED}, {8, 15, 16}, {GATE}),
    "mamba": (STATES, {16}, {"mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}),
    "mamba2": (STATES, {16}, {"mixer.out_proj"}),
    "falcon_mamba": (STATES, {16}, {"mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}),
    "falcon_h1": (HYBRID, {16}, {"mamba.out_proj"}),
    "jamba": (
        {
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,  # transformers 4 refuses a CPU otherwise
        },
        {8, 15},
        {"mamba.dt_proj", "feed_forward.router"},
    ),
    "llama4_text": ({**EXPERTS, "head_dim": 8, "intermediate_size_mlp": 64}, {16}, {"feed_forward.router"}),
    "phimoe": (EXPERTS, {16}, {"mlp.router"}),
    "mixtral": (EXPERTS, {16}, set()),
    "gemma2": ({"head_dim": 8}, {16}, set()),
}


def known(model_type, *values):
    """A case that is run where there is such a model."""
    missing = pytest.mark.skipif(
        model_type not in CONFIG_MAPPING, reason="architectures that this transformers does not have"
    )
    return pytest.param(model_type, *values, marks=missing)


def tiny(model_type):
    extra = ARCHITECTURES[model_type][0]
    values = {**TINY, **extra}
    config_class = CONFIG_MAPPING[model_type]
    there = config_class()
    config = config_class(**{k: v for k, v in values.items() if hasattr(there, k)})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def under_peft(model, **kwargs):
    return get_peft_model(model, mos_peft.MoSConfig(target_modules="all-linear", **kwargs))


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
@pytest.mark.parametrize("model_type", [known(name) for name in ARCHITECTURES])
def test_all_linear_with_the_defaults_runs_on_every_model(model_type, caplog, tmp_path):
    """Natively and under PEFT the same modules get the same ranks; files say which, and load."""
    _, ranks, others = ARCHITECTURES[model_type]
    ids = torch.randint(2, 96, (2, 7))
    model = tiny(model_type)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = {re.split(r"\*\.", role_of(name))[-1] for name in linears}
    others = (others & last) | {re.split(r"\*\.", role_of(name))[-1] for name in expert_stacks(model)}
    base = model(input_ids=ids).logits
    mos_ext.adapt(model, MoSConfig())
    torch.testing.assert_close(model(input_ids=ids).logits, base)
    randomize(model)
    adapted = model(input_ids=ids).logits
    assert not torch.allclose(adapted, base, atol=1e-3)
    layers = dict(mos_layers(model))
    assert all(layer.paths for layer in layers.values())  # each was called, never just read
    assert {layer.pool.ranks[layer.layer] for layer in layers.values()} == ranks
    report = mos_ext.parameter_report(model)
    assert {re.split(r"\*\.", role_of(name))[-1] for name in report.left_out} == others
    warned = ranks != {16} or others
    assert [r.name for r in caplog.records if r.name == "mos_ext"] == ["mos_ext"] * bool(warned)
    for module in others:
        assert module in caplog.text
        assert module in str(report)

    mos_ext.save_adapter(model, tmp_path / "native")
    again = mos_ext.load_adapter(tiny(model_type), tmp_path / "native")
    assert torch.equal(again(input_ids=ids).logits, adapted)
    assert again.mos_pools.config == model.mos_pools.config
    assert mos_ext.parameter_report(again) == report

    tuned = under_peft(tiny(model_type), init_weights=False).eval()
    found = {
        name: layer for name, layer in tuned.get_base_model().named_modules() if isinstance(layer, mos_peft.MoSLayer)
    }
    for attribute, of_pool in (("r", "ranks"), ("scaling", "scales")):
        native = {name: getattr(layer.pool, of_pool)[layer.layer] for name, layer in layers.items()}
        assert {name: getattr(layer, attribute)["default"] for name, layer in found.items()} == native
    want = tuned(input_ids=ids).logits
    tuned.save_pretrained(tmp_path / "peft")
    for folder, expected in (("peft", want), ("native", adapted)):
        assert torch.equal(
            PeftModel.from_pretrained(tiny(model_type), tmp_path / folder)(input_ids=ids).logits, expected
        )
        assert torch.equal(mos_ext.load_adapter(tiny(model_type), tmp_path / folder)(input_ids=ids).logits, expected)


class UNet(nn.Module):
    """Down, middle and up, of numbered blocks or not; every width once."""

    def __init__(self, numbered):
        super().__init__()
        down, up = [Block(8), Block(16)], [Block(16), Block(8)]
        if numbered:
            self.down_blocks, self.up_blocks = nn.ModuleList(down), nn.ModuleList(up)
        else:
            self.down1, self.down2, self.up1, self.up2 = *down, *up
        self.widen, self.middle, self.narrow = nn.Linear(8, 16), Block(16), nn.Linear(16, 8)

    def forward(self, x):
        down, up = (list(getattr(self, f"{name}_blocks", ())) for name in ("down", "up"))
        down, up = down or [self.down1, self.down2], up or [self.up1, self.up2]
        h = self.middle(down[1](self.widen(down[0](x))))
        return up[1](self.narrow(up[0](h)))


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(("numbered", "count"), [(True, 8), (False, 12)])
def test_models_with_one_module_of_a_kind(numbered, count, peft, caplog):
    """Each gets the largest rank, 8, that a pool of equivalent rank 8 gives to one module; scaled by alpha / 8."""
    model = UNet(numbered)
    x = torch.randn(5, 8)
    base = model(x)
    model = under_peft(model) if peft else mos_ext.adapt(model, MoSConfig())
    assert torch.equal(model(x), base)
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    pools = [layer.adapter("default" if peft else None) for layer in layers]
    assert len(layers) == count
    assert {(pool.ranks[k], pool.scales[k]) for pool, k in pools} == {(8, 16 / 8)}
    (record,) = caplog.records
    assert record.name == "mos_ext"
    assert record.levelname == "WARNING"
    assert "too few modules for the rank: " in record.message
    assert "(r=8 instead of 16)" in record.message


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peft", [False, True])
def test_albert_shares_one_block(peft, caplog):
    config = AlbertConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}, embedding_size=16)
    model = AlbertForSequenceClassification(config).eval()
    model = under_peft(model) if peft else mos_ext.adapt(model, MoSConfig())
    model(torch.randint(2, 96, (2, 7)))
    assert len(caplog.records) == 1
    assert "albert.encoder.albert_layer_groups.*.albert_layers.*.ffn[32->64] (r=8 instead of 16)" in caplog.text


def test_a_lowered_rank_is_that_of_its_module_alone(caplog):
    """The names of the outer blocks are ends of the names of the inner ones, which keep their rank."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"h": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))}))
    _, types = plan(model, MoSConfig(r=10, equivalent_rank=8, private_rank=1))
    assert {t.modules: t.ranks for t in types} == {("0",): (8,), ("1.h.0", "1.h.1"): (10, 10)}
    with pytest.raises(ValueError, match=r"r must be at most 8 for 0, .*, or exclude the module"):
        plan(model, MoSConfig(r=10, equivalent_rank=8, private_rank=1, rank_pattern={"^0": 9}))  # the user's word


def test_what_is_named_keeps_its_error():
    model = nn.Sequential(nn.ModuleDict({"gate": nn.Linear(8, 1), "up": nn.Linear(8, 8)}))
    with pytest.raises(ValueError, match=r"must divide out_features=1 of 0\.gate, got 4; .* or exclude the module"):
        plan(model, MoSConfig(target_modules=["gate"]))
    with pytest.raises(ValueError, match=r"must divide out_features=1 of 0\.gate, got 4; .* or exclude the module"):
        plan(model, MoSConfig(exclude_modules=["up"]))  # nothing would be left


# ------------------------------------------------------------------- modules that are read instead of called


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "module", "reader"),
    [
        ("mamba", "out_proj", "MambaMixer"),
        ("mamba", "dt_proj", "MambaMixer"),
        ("mamba2", "out_proj", "Mamba2Mixer"),
        known("falcon_h1", "mamba.out_proj", "FalconH1Mixer"),
    ],
)
def test_state_space_blocks_read_weights(model_type, module, reader):
    """In a fused kernel, where there is one: an adapter would work here and not on a GPU."""
    model = tiny(model_type)
    message = (
        rf"target_modules must select modules that are called, got .*{module}, whose weight {reader} reads instead"
    )
    with pytest.raises(TypeError, match=message):
        mos_ext.adapt(model, MoSConfig(target_modules=[module]))
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, mos_peft.MoSConfig(target_modules=[module]))
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())


def test_attention_reads_its_output_projection():
    """Whatever class the projection has: quantisation replaces it."""

    class Quantised(nn.Linear):
        pass

    class Own(nn.MultiheadAttention):
        pass

    model = nn.Sequential(Own(8, 2), nn.Linear(8, 8))
    model[0].out_proj = Quantised(8, 8)
    for config, adapt in ((MoSConfig, mos_ext.adapt), (mos_peft.MoSConfig, get_peft_model)):
        with pytest.raises(TypeError, match=r"got 0\.out_proj, whose weight MultiheadAttention reads instead"):
            adapt(model, config(r=4, target_modules=["out_proj"]))
    _, (only,) = plan(model, MoSConfig(r=4))
    assert only.modules == ("1",)

    class MultiheadAttention(nn.Module):  # somebody's own, which calls it
        def __init__(self):
            super().__init__()
            self.out_proj = nn.Linear(8, 8)

    _, (only,) = plan(nn.Sequential(MultiheadAttention()), MoSConfig(r=4))
    assert only.modules == ("0.out_proj",)


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 3)


ENCODER = {"r": 4, "equivalent_rank": 4, "shards_per_vector": 2, "target_modules": ["linear1", "linear2"]}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_encoders_call_adapted_layers_in_eval_mode(peft, padded):
    """Where torch's fused path would read their weights, and make nested tensors of what is padded."""
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    inputs = {"src_key_padding_mask": mask} if padded else {}
    rows = ~mask if padded else torch.ones_like(mask)
    if peft:
        model = get_peft_model(encoder(), mos_peft.MoSConfig(**ENCODER, init_weights=False))
        model.add_adapter("other", mos_peft.MoSConfig(**ENCODER, init_weights=False))
    else:
        model = randomize(mos_ext.adapt(encoder(), MoSConfig(**ENCODER)))
    model = copy.deepcopy(model)
    trained = model.train()(x, **inputs)[rows]
    torch.testing.assert_close(model.eval()(x, **inputs)[rows], trained)
    with torch.no_grad():
        torch.testing.assert_close(model(x, **inputs)[rows], trained)
    assert not torch.allclose(encoder().eval()(x, **inputs)[rows], trained, atol=1e-2)
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    assert [len(layer._forward_pre_hooks) for layer in layers] == [1] * 6
    if peft:
        assert not any(m._forward_pre_hooks for m in model.unload().modules())


# ------------------------------------------------------------------- devices, partitioned weights, patterns


class Hook:
    def __init__(self, device):
        self.execution_device = device


@pytest.mark.parametrize("peft", [False, True])
def test_one_device_per_type(peft):
    """A pool is on one device. accelerate's hooks know where an offloaded layer computes."""
    config, adapt = (mos_peft.MoSConfig, get_peft_model) if peft else (MoSConfig, mos_ext.adapt)
    model = stack()
    model[1].up.to("meta")
    with pytest.raises(
        ValueError,
        match=r"the modules of a linear type, \*\.up\[24->48\], must be on one device, .* got 0\.up on cpu, 1\.up on meta: "
        r"load the model on one device",
    ):
        adapt(model, config(r=4, target_modules=["up", "down"]))
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    model[1].up._hf_hook = Hook("cpu")
    assert {t.modules for t in plan(model, MoSConfig(r=4))[1]} == {
        ("0.up", "1.up", "2.up"),
        ("0.down", "1.down", "2.down"),
    }
    model[2].down._hf_hook = Hook("cuda:0")
    with pytest.raises(ValueError, match=r"got 0\.down on cpu, 2\.down on cuda:0"):
        plan(model, MoSConfig(r=4))
    model[2].to("meta")
    assert plan(model, MoSConfig(r=4, exclude_modules=r"2\..*"))


def test_partitioned_weights_have_their_shape():
    """As DeepSpeed's ZeRO-3 leaves parameters: without elements, and with the shape in an attribute."""
    model = gpt2()
    want = roles(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = parameter.data.new_empty(0)
    assert roles(model) == want


def test_patterns_that_match_nothing():
    """(PEFT warns itself.)"""
    patterns = {"rank_pattern": {"up": 2, "wq": 2, "w.*": 3}, "alpha_pattern": {"h.up": 1}}
    with pytest.warns(UserWarning, match="should match adapted modules") as caught:
        mos_ext.adapt(stack(), MoSConfig(r=4, target_modules=["up"], **patterns))
    assert [(str(w.message).split(", which")[0], w.filename) for w in caught] == [
        ("rank_pattern should match adapted modules, got ['wq', 'w.*']", __file__),
        ("alpha_pattern should match adapted modules, got ['h.up']", __file__),
    ]


def test_a_base_remembers_every_selection_as_its_own():
    fields = [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "k_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
        {"shards_per_vector": 2},
        {"shards_per_vector": 64},
    ]
    configs, base = [MoSConfig(**{"r": 2, **changes}) for changes in fields], Base.of(llama())
    for config in configs * 2:
        assert kinds_of(base, config) == kinds_of(Base.of(llama()), config)
    assert len({str(kinds_of(base, config)) for config in configs}) == 5
