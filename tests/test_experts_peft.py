"""Experts and PEFT: exports to its ``target_parameters``, and MoS on experts as a PEFT method."""

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
    from peft import PeftModel


# PEFT asks transformers whether a model checkpoints under a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

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
