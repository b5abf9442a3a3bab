"""Two texts without downloads, in blocks: Python's standard library, and the English of its reference manual.

The manual repeats itself: whole sections stand under several topics. So topics are split, not blocks, and what
validation or test have in common with an earlier split is dropped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from .settings import Base

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune.py"
SHARES = {"test": 0.15, "validation": 0.12}  # of the characters before the overlap is dropped; training has the rest
NGRAM = 10  # words in a row that two splits must not have in common


@cache
def example() -> ModuleType:
    """examples/finetune.py, which is a script and no module of a package."""
    spec = importlib.util.spec_from_file_location("finetune_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its imports
        spec.loader.exec_module(module)
    return module


def ngrams(paragraph: str) -> set[tuple[str, ...]]:
    """Of a shorter paragraph: the whole of it."""
    words = paragraph.split()
    return {tuple(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))} if words else set()


def split_topics(topics: dict[str, str]) -> dict[str, list[str]]:
    """Paragraphs for training, test and validation. No two splits share NGRAM words in a row or a whole paragraph."""
    total = sum(map(len, topics.values()))
    chosen: dict[str, list[str]] = {name: [] for name in ("training", *SHARES)}
    sizes = dict.fromkeys(SHARES, 0)
    # In the order of a hash: neighbours in the alphabet are often about the same thing.
    for name in sorted(topics, key=lambda n: hashlib.sha256(n.encode()).digest()):
        fits = [s for s, share in SHARES.items() if sizes[s] + len(topics[name]) <= share * total]
        if fits:
            sizes[fits[0]] += len(topics[name])
        chosen[fits[0] if fits else "training"].append(topics[name])
    seen: set[tuple[str, ...]] = set()
    splits: dict[str, list[str]] = {}
    for split, texts in chosen.items():
        own: set[tuple[str, ...]] = set()
        kept: dict[str, str] = {}  # by its words, so that a repetition in one split goes as well
        for paragraph in "\n\n".join(texts).split("\n\n"):
            grams = ngrams(paragraph)
            if grams and not grams & seen:
                kept.setdefault(" ".join(paragraph.split()), paragraph)
                own |= grams
        splits[split] = list(kept.values())
        seen |= own
    return splits


def make_tokenizer(text: str, vocabulary: int):
    """Byte-level BPE of the base text alone, as a pretrained model would bring its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text.splitlines(), vocab_size=vocabulary, min_frequency=2, special_tokens=["<eos>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>")


def blocks(base: Base) -> dict[str, torch.Tensor]:
    """(blocks, length) token ids of "base", "training", "validation" and "test"."""
    from pydoc_data.topics import topics

    finetune = example()
    source = finetune.standard_library_source(base.characters)
    tokenizer = make_tokenizer(source, base.vocabulary)
    found = {"base": finetune.to_blocks(tokenizer, source, base.length)}
    for split, paragraphs in split_topics(topics).items():
        found[split] = finetune.to_blocks(tokenizer, "\n\n".join(paragraphs), base.length)
        if split in SHARES and len(found[split]) > base.eval_blocks:  # spread over the text
            found[split] = found[split][torch.linspace(0, len(found[split]) - 1, base.eval_blocks).long()]
    return found
