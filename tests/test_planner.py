"""Which modules are adapted and how they group, for every supported style of model, and the paper's parameter counts."""

import pytest
import torch
from models import bert, gpt2, llama, stack, vit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mos_ext
from mos_ext import MoSConfig
from mos_ext.planner import plan, why_opaque

SMALL = MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=1)


def roles(model, config=SMALL):
    return {t.role: (t.in_features, t.out_features, len(t.modules)) for t in plan(model, config)[1]}


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
