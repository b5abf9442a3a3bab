"""Many adapters on one base of experts: a route groups a block's rows by expert and by adapter."""

import copy

import models
import pytest
import torch
from test_serving import ids, saved, trained

import mos_ext
from mos_ext.serving import AdapterBank


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(models.MOE_KINDS))
def test_experts(tmp_path, kind):
    base = models.moe(kind)
    targets = {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    budget = {"r": 3, "equivalent_rank": 2, "expert_equivalent_rank": 1, "private_rank": 0, "shards_per_vector": 2}
    if kind in ("deepseek_v3",):
        targets["target_modules"] = ["o_proj"]
    alone = {
        name: saved(base, mos_ext.MoSConfig(**budget, **targets, seed=seed), tmp_path / name, seed)
        for seed, name in enumerate("ab")
    }
    alone[None] = copy.deepcopy(base)
    bank = AdapterBank(base, **targets)
    for name in "ab":
        bank.add(name, tmp_path / name)
    x, names = ids(4, 7) % 64, ["b", None, "a", "b"]
    with bank.route(base, names):
        y = base(x).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i : i + 1], alone[name](x[i : i + 1]).logits, rtol=0, atol=2e-5)
    bank.close()
    assert "forward" not in {key for module in base.modules() for key in vars(module)}


@torch.no_grad()
def test_lora_on_experts(tmp_path):
    """A file of ``export_lora``, in PEFT's layout of experts, is the adapter that it came from."""
    base = models.moe("qwen3_moe")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    config = mos_ext.MoSConfig(r=3, equivalent_rank=2, private_rank=0, shards_per_vector=2, **targets)
    adapted = trained(base, config)
    mos_ext.export_lora(adapted, tmp_path)
    bank = AdapterBank(base, **targets)
    bank.add("exported", tmp_path)
    x = ids(2, 6) % 64
    with bank.route(base, [None, "exported"]):
        y = base(x).logits
    torch.testing.assert_close(y[1:], adapted(x[1:]).logits, rtol=0, atol=1e-5)
    assert (y[1:] - base(x[1:]).logits).abs().max() > 0.01


@torch.no_grad()
def test_copies_have_no_bank():
    base = models.moe("qwen3_moe")
    bank = AdapterBank(base, target_parameters=["experts.down_proj"], target_modules=[])
    x = ids(2, 4) % 64
    torch.testing.assert_close(copy.deepcopy(base)(x).logits, base(x).logits, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="batch_invariant must be False for models with experts"):
        bank.route(base, [None], batch_invariant=True).__enter__()


def test_experts_whose_forward_was_replaced():
    base = models.moe("qwen3_moe")
    base.model.layers[1].mlp.experts.forward = lambda *_: None
    with pytest.raises(
        ValueError, match="target_parameters must select experts with the forward of their class, got m"
    ):
        AdapterBank(base, target_parameters=["experts.down_proj"])
    assert not any(module._forward_hooks for module in base.modules())
    assert "forward" not in vars(base.model.layers[0].mlp.experts)
