"""What the examples run on when they are given no model: random models of a few thousand parameters, and made-up data.

Nothing is downloaded, nothing is learnt that would be worth keeping; it shows that every line works, in seconds.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FRUIT = ("apples", "pears", "plums", "cherries", "quinces")


def language_model(folder: Path, experts: int = 0) -> str:
    """Saves a Llama, or a Qwen3-MoE, with a tokenizer that knows the data below, and gives its name: the folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    bpe = ByteLevelBPETokenizer()
    texts = [turn["content"] for row in conversations(50) for turn in row["messages"]]
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = CHAT
    options = {
        "vocab_size": 400,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if experts:
        mixture = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options, **mixture))
    else:
        model = LlamaForCausalLM(LlamaConfig(**options, intermediate_size=128))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def conversations(count: int) -> Dataset:
    """Rows of ``messages``: a question of sums of fruit, and its answer."""
    return Dataset.from_list([{"messages": _turns(n)} for n in range(count)])


def preferences(count: int) -> Dataset:
    """Rows of ``prompt``, ``chosen`` and ``rejected``: the right answer is preferred to a wrong one."""
    rows = []
    for n in range(count):
        question, right = _turns(n)
        wrong = {"role": "assistant", "content": "I cannot count fruit."}
        rows.append({"prompt": [question], "chosen": [right], "rejected": [wrong]})
    return Dataset.from_list(rows)


def _turns(n: int) -> list[dict[str, str]]:
    draw = random.Random(n)
    a, b, fruit = draw.randint(1, 9), draw.randint(1, 9), draw.choice(FRUIT)
    question = f"I have {a} {fruit} and buy {b} more. How many {fruit} do I have?"
    answer = f"You have {a + b} {fruit}."
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def vision_model(folder: Path) -> str:
    """Saves a ViT for images of 16 x 16 with its processor, and gives its name: the folder."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def images(count: int) -> DatasetDict:
    """Splits ``train`` and ``validation`` of ``image`` and ``label``: noise that is brighter on the left, or right."""
    draw, rows = np.random.default_rng(0), []
    for n in range(count):
        pixels = draw.integers(0, 128, (16, 16, 3))
        half = slice(0, 8) if n % 2 == 0 else slice(8, 16)
        pixels[:, half] += 96
        rows.append({"image": Image.fromarray(pixels.astype(np.uint8)), "label": n % 2})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["left", "right"])})
    train, validation = (
        Dataset.from_list(part, features=features) for part in (rows[: count * 3 // 4], rows[count * 3 // 4 :])
    )
    return DatasetDict({"train": train, "validation": validation})
