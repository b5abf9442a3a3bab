"""Every causal language model of transformers that can be made small enough: ``all-linear`` with the defaults runs,
changes nothing at first, calls every layer that it adapts, and trains. ``make fuzz`` runs this.
"""

import pytest
import torch
from models import randomize
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mos_ext
from mos_ext import MoSConfig
from mos_ext.adapt import mos_layers

SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "mamba_d_ssm", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 64),
    **dict.fromkeys(("hidden_dim", "vocab_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "encoder_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head", "n_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "n_groups", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_lora_rank", "q_lora_rank", "v_head_dim", "num_heads", "patch_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "embedding_size", "image_size"), 16),
    **dict.fromkeys(
        ("num_experts", "n_routed_experts", "num_local_experts", "qk_rope_head_dim", "qk_nope_head_dim"), 4
    ),
    **dict.fromkeys(
        ("state_size", "time_step_rank", "chunk_size", "mamba_n_heads", "mamba_d_state", "mamba_dt_rank"), 4
    ),
    **dict.fromkeys(("mamba_chunk_size", "linear_num_value_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "eos_token_id"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    "mamba_d_head": 8,
    "max_position_embeddings": 32,
}
IDS = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(0))
# What is called, and has no gradient in the base model either: it picks positions by their order.
PICKS = ("indexer", "compressor")
# Of decoders that are given no encoder's states.
CROSS = ("encoder_attn", "crossattention", "cross_attn")


def base_model(model_type):
    """The small model and its logits, or why there is none."""
    try:
        defaults = CONFIG_MAPPING[model_type]()
        values = {k: v for k, v in SMALL.items() if type(getattr(defaults, k, None)) is int}
        for name in ("layer_types", "layers_block_type"):
            if isinstance(getattr(defaults, name, None), list) and not isinstance(
                getattr(type(defaults), name, None), property
            ):
                kinds = list(dict.fromkeys(getattr(defaults, name)))
                values[name] = (kinds * 2)[: max(2, len(kinds))]
                values["num_hidden_layers"] = len(values[name])
        if "qk_rope_head_dim" in values:
            values.pop("head_dim", None)
        with torch.device("meta"):
            size = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values)).parameters()
            )
        if size > 3e6:
            return None, f"has {size} parameters"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values)).float().eval()
        return model, model(input_ids=IDS).logits
    except Exception as error:
        return None, f"cannot be made small: {type(error).__name__}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_all_linear(model_type):
    model, base = base_model(model_type)
    if model is None:
        pytest.skip(base)
    mos_ext.adapt(model, MoSConfig())
    torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-4, atol=1e-4)
    randomize(model)
    logits = model(input_ids=IDS).logits
    assert not torch.allclose(logits, base, rtol=1e-4, atol=1e-4)
    uncalled = [
        name for name, layer in mos_layers(model) if not layer.paths and not any(part in name for part in CROSS)
    ]
    assert not uncalled
    if model_type == "rwkv":  # its base cannot be differentiated in eval mode
        return
    logits.square().sum().backward()
    for linear_type, pool in zip(model.mos_pools.linear_types, model.mos_pools.pools, strict=True):
        if not any(part in linear_type.name for part in (*CROSS, *PICKS)):
            assert pool.shards_b.grad is not None, linear_type.name
            assert pool.shards_b.grad.abs().sum() > 0, linear_type.name
