"""What the examples have in common: their arguments, and data from the Hub, a file, or tiny.py."""

from __future__ import annotations

import argparse
from pathlib import Path

import tiny
import torch
from datasets import Dataset, load_dataset
from torch import Tensor


def arguments(doc: str, argv: list[str] | None, output: str, data: str, steps: tuple[int, int]) -> argparse.Namespace:
    """--model, --data, --output and --steps; ``steps`` are those of the tiny model, and of another."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name of the Hub or a folder; a tiny random model when left out")
    parser.add_argument("--data", help=f"{data}; made up when left out")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--steps", type=int, help=f"default: {steps[0]} of the tiny model, {steps[1]} of another")
    options = parser.parse_args(argv)
    options.steps = options.steps or steps[options.model is not None]
    return options


def dataset(name: str | None, made_up: Dataset) -> Dataset:
    """A .jsonl file, or the training split of a dataset of the Hub."""
    if name is None:
        return made_up
    if name.endswith(".jsonl"):
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split="train")


def blocks(tokenizer, file: str | None, length: int) -> Tensor:
    """(blocks, length) token ids of a text file."""
    if file:
        text = Path(file).read_text(encoding="utf-8")
    else:
        text = "\n".join(turn["content"] for row in tiny.conversations(64) for turn in row["messages"])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)
