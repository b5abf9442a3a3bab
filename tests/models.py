"""Small transformers of every style the library is tested on, made locally."""

import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import transformers


def _build(cls, config, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(config).eval()


def llama(layers=4, **kwargs):
    config = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return _build(
        transformers.LlamaForCausalLM, transformers.LlamaConfig(num_hidden_layers=layers, **{**config, **kwargs})
    )


def gpt2(layers=3):
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=48, n_head=4, vocab_size=96, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return _build(transformers.GPT2LMHeadModel, config)


def bert(layers=3):
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=96,
        vocab_size=96,
        max_position_embeddings=64,
    )
    return _build(transformers.BertForSequenceClassification, config)


def vit(layers=3):
    config = transformers.ViTConfig(
        num_hidden_layers=layers,
        hidden_size=48,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=16,
        patch_size=8,
    )
    return _build(transformers.ViTForImageClassification, config)


def inputs(name):
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(1, 96, (2, 11))}


# What each kind of mixture of experts needs beside the sizes of all. Between them: weights transposed or not, biases,
# gates concatenated or interleaved, blocks with and without experts, experts beside shared ones, three routers.
MOE_KINDS = {
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "deepseek_v3": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


def moe(kind, **changes):
    """A mixture of experts of transformers 5, of one of MOE_KINDS: two blocks, four experts, two per token."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(kind, **{**common, **MOE_KINDS[kind], **changes})
    return _build(transformers.AutoModelForCausalLM.from_config, config)


class ExpertsBlock(nn.Module):
    """Four experts of Qwen3-MoE and a router that is no module: two experts for each row."""

    def __init__(self, width):
        super().__init__()
        config = transformers.Qwen3MoeConfig(
            hidden_size=width, moe_intermediate_size=width // 2, num_experts=4, num_experts_per_tok=2
        )
        config._experts_implementation = "eager"
        self.experts = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=width**-0.5)

    def forward(self, x):
        inside = torch.tanh(x)  # products of four blocks would grow without bounds
        weights, index = torch.topk(inside[:, :4].softmax(-1), 2)
        return torch.tanh(x + self.experts(inside, index, weights))


BUILDERS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def stack(layers=3, width=24, dtype=torch.float32):
    """Plain residual blocks: small enough to differentiate by hand."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(layers))).to(dtype)


def randomize(model, std=0.1):
    """Non-zero pools, so that an adapter does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for pool in model.mos_pools.pools:
            pool.shards_a.normal_(std=std)
            pool.shards_b.normal_(std=std)
    return model
