"""Makes the models that PEFT's tests load from the hub: the same architectures, tiny, with random weights.

They are written the way ``huggingface_hub`` keeps downloads, under the names the tests use. With ``HF_HUB_CACHE``
pointing here and ``HF_HUB_OFFLINE=1``, every ``from_pretrained`` finds them, and nothing has to be redirected.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 1000
# Three blocks: pools are shared, and r may exceed equivalent_rank. All widths are multiples of shards_per_vector.
BLOCKS = 3
# Wider than the usual 0.02, at which outputs are so small that an adapter's effect drowns in the tests' tolerances.
WEIGHTS = 0.1

LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": WEIGHTS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": WEIGHTS,
}
DISENTANGLED = {**BERT_LIKE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
GPT_LIKE = {
    "vocab_size": VOCABULARY,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "initializer_range": WEIGHTS,
    "bos_token_id": 98,
    "eos_token_id": 98,
}
OPT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": WEIGHTS,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "init_std": WEIGHTS,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": BLOCKS,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

# name on the hub -> (model class, configuration)
MODELS: dict[str, tuple[type, Any]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, tf.OPTConfig(**OPT_LIKE)),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT_LIKE)),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (tf.GPTJForCausalLM, tf.GPTJConfig(**GPT_LIKE, rotary_dim=4)),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA_LIKE)),
    "peft-internal-testing/tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**LLAMA_LIKE)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=16),
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(**T5),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(**BART),
    ),
    "peft-internal-testing/tiny-random-BertModel": (tf.BertModel, tf.BertConfig(**BERT_LIKE)),
    "peft-internal-testing/tiny-random-RobertaModel": (tf.RobertaModel, tf.RobertaConfig(**BERT_LIKE)),
    "peft-internal-testing/tiny-random-DebertaModel": (tf.DebertaModel, tf.DebertaConfig(**DISENTANGLED)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (tf.DebertaV2Model, tf.DebertaV2Config(**DISENTANGLED)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        tf.BertForSequenceClassification,
        tf.BertConfig(**BERT_LIKE),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(**BERT_LIKE),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig(**LLAMA_LIKE, num_labels=1),
    ),
    # The quantization tests count its layers: twelve blocks.
    "peft-internal-testing/opt-125m": (
        tf.OPTForCausalLM,
        tf.OPTConfig(
            **{**OPT_LIKE, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 12}
        ),
    ),
}

# The only model whose text is tokenized (test_torch_compile.py).
TOKENIZED = "peft-internal-testing/tiny-random-OPTForCausalLM"

# A LoRA adapter that test_config.py reads with every method's configuration class: (name, revision).
ADAPTER = ("peft-internal-testing/tiny-opt-lora-revision", "test")


def snapshot(hub: Path, name: str, revision: str = "main") -> Path:
    """A new folder for the files of a repository, where ``huggingface_hub`` looks for that revision of it."""
    commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def byte_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per byte, after OPT's special ones."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def build(hub: Path) -> None:
    for name, (model_cls, config) in MODELS.items():
        torch.manual_seed(0)
        folder = snapshot(hub, name)
        model_cls(config).save_pretrained(folder)
        if name == TOKENIZED:
            byte_tokenizer().save_pretrained(folder)
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj", "v_proj"]}
    (snapshot(hub, *ADAPTER) / "adapter_config.json").write_text(json.dumps(adapter))


def main() -> None:
    hub = Path(sys.argv[1])
    made_by = hashlib.sha256(Path(__file__).read_bytes() + tf.__version__.encode()).hexdigest()
    stamp = hub / "made-by"
    if stamp.exists() and stamp.read_text() == made_by:
        return
    shutil.rmtree(hub, ignore_errors=True)
    hub.mkdir(parents=True)
    build(hub)
    stamp.write_text(made_by)


if __name__ == "__main__":
    main()
