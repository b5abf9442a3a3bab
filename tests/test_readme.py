"""The snippets of the README, executed as they stand there: only the model's name is replaced by a small local one."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import llama, moe, transformers

ROOT = Path(__file__).resolve().parent.parent
NAME = "meta-llama/Llama-3.2-1B"

# The snippets are programs: the deprecations of the libraries they use are not this suite's.
pytestmark = pytest.mark.filterwarnings("ignore")


def snippets():
    text = (ROOT / "README.md").read_text()
    return dict(re.findall(r"<!-- snippet: (\w+) -->\n```\w*\n(.*?)```", text, re.DOTALL))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small Llama with a tokenizer, saved as a hub's download would be."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words to read, again and again"], vocab_size=300, special_tokens=["<eos>"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama(16, vocab_size=512, hidden_size=64, intermediate_size=128).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
            folder
        )
    return folder


def run(name, model_folder, tmp_path, monkeypatch, model_name=NAME, **variables):
    monkeypatch.chdir(tmp_path)
    code = snippets()[name].replace(model_name, str(model_folder))
    assert str(model_folder) in code
    exec(compile(code, f"README.md, snippet {name}", "exec"), variables)
    return variables


def test_every_snippet_is_executed_here():
    tests = {name.removeprefix("test_snippet_") for name in globals() if name.startswith("test_snippet_")}
    assert set(snippets()) == tests


def test_snippet_peft(model_folder, tmp_path, monkeypatch):
    model = run("peft", model_folder, tmp_path, monkeypatch)["model"]
    assert sum(type(m).__name__ == "MoSLinear" for m in model.modules()) == 16 * 7
    assert model(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


def test_snippet_experts(tmp_path, monkeypatch):
    folder = tmp_path / "moe"
    moe("qwen3_moe", num_experts=64).save_pretrained(folder)
    model = run("experts", folder, tmp_path, monkeypatch, model_name="Qwen/Qwen3-30B-A3B")["model"]
    of_experts = [t for t in model.mos_pools.linear_types if t.kind.experts]
    assert [t.num_matrices for t in of_experts] == [128, 128]
    assert model(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all()


def test_snippet_trainer(model_folder, tmp_path, monkeypatch):
    rows = torch.randint(1, 512, (16, 12))
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    real = transformers.TrainingArguments

    def short(folder, **kwargs):
        """The snippet's arguments, for three steps on a CPU."""
        return real(folder, **{**kwargs, "max_steps": 3, "save_steps": 2, "report_to": [], "use_cpu": True})

    monkeypatch.setattr("transformers.TrainingArguments", short)
    trainer = run("trainer", model_folder, tmp_path, monkeypatch, dataset=dataset)["trainer"]
    assert trainer.state.global_step == 3
    saved = {file.name for file in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= saved
    assert "model.safetensors" not in saved


def test_snippet_qlora(model_folder, tmp_path, monkeypatch):
    model = run("qlora", model_folder, tmp_path, monkeypatch)["model"]
    bases = {type(m.base_layer).__name__ for m in model.modules() if type(m).__name__ == "MoSLinear"}
    assert bases == {"Linear4bit"}
    loss = model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())


def test_snippet_torchrun(model_folder, tmp_path):
    (tmp_path / "notes.txt").write_text("some words to read, again and again. " * 400)
    script = ROOT / "examples" / "finetune.py"
    command = (
        snippets()["torchrun"].replace(NAME, str(model_folder)).replace("examples/finetune.py", str(script)).split()
    )
    assert command.pop(0) == "torchrun"
    small = ["--steps", "2", "--batch-size", "2", "--sequence-length", "32", "--eval-blocks", "2", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command, *small, "--output", str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
