"""Every example runs as it is, on its tiny model, and leaves an adapter that loads and has learnt."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mos_ext

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = ("sft", "dpo", "qlora", "experts", "image_classification")
SHARED = ("common", "tiny")
SERVERS = ("serve", "ray_replicas")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, TRL and PEFT about each other's changes


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example for some steps: its output folder, and what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name, steps):
        for module in (name, *SHARED):
            monkeypatch.delitem(sys.modules, module, raising=False)
        torch.manual_seed(0)
        importlib.import_module(name).main(["--output", str(tmp_path), "--steps", str(steps)])
        return tmp_path, capsys.readouterr().out

    return run


def test_they_are_short_and_all_of_them_are_here():
    found = {file.stem for file in EXAMPLES.glob("*.py")}
    assert found == {*NAMES, *SHARED, *SERVERS, "finetune"}
    short = (*NAMES, *SHARED, *SERVERS)
    assert max(len((EXAMPLES / f"{name}.py").read_text().splitlines()) for name in short) <= 120


@pytest.mark.parametrize("extra", ["examples", "serve", "ray"])
def test_their_extra_has_what_they_import(extra):
    """Of the server, all but its tiny model."""
    files = {
        "serve": {EXAMPLES / "serve.py", *(EXAMPLES / "server").glob("*.py")},
        "ray": {EXAMPLES / "ray_replicas.py"},
    }
    imported = set()
    for file in files.get(extra) or {*EXAMPLES.glob("*.py")} - set().union(*files.values()):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    text = (EXAMPLES.parent / "pyproject.toml").read_text()
    needed = re.findall(r"^(?:io|peft|dependencies) = \[(.*)\]$", text, re.MULTILINE)
    needed.append(re.search(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL).group(1))
    names = {re.match(r"[\w-]+", word).group() for part in needed for word in re.findall(r'"([^"]+)"', part)}
    own = {"mos_ext", "server", "PIL", *SHARED}  # pillow is imported as PIL
    assert {"examples": "pillow", "serve": "uvicorn", "ray": "ray"}[extra] in names
    assert imported - own - set(sys.stdlib_module_names) <= {name.replace("-", "_") for name in names}


def learnt(folder):
    """The tensors of an adapter whose every B-pool has left zero."""
    tensors = load_file(folder / "adapter_model.safetensors")
    pools = {name: t for name, t in tensors.items() if name.endswith("shards_b")}
    assert pools
    assert all(t.abs().max() > 0 for t in pools.values())
    return tensors


def test_sft(run):
    folder, printed = run("sft", 20)
    learnt(folder / "adapter")
    assert "trainable params: 8,704" in printed
    assert printed.splitlines()[-1].startswith("You have")  # the beginning of every answer it saw


def test_dpo(run):
    folder, printed = run("dpo", 11)
    learnt(folder / "adapter")
    (line,) = (line for line in printed.splitlines() if line.startswith("reward of the chosen answer"))
    assert float(line.split(":")[1].split(",")[0]) > 0


def losses(printed):
    return [float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")]


def test_qlora(run):
    folder, printed = run("qlora", 11)
    learnt(folder / "adapter")
    assert "the base layer is a Linear4bit" in printed
    first, last = losses(printed)
    assert last < first


def test_experts(run):
    folder, printed = run("experts", 11)
    learnt(folder / "adapter")
    first, last = losses(printed)
    assert last < first
    assert "(of experts: rank 0.5)" in printed
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "base").eval()

    ids = torch.arange(1, 9)[None]
    ours, lora = mos_ext.load_adapter(base(), folder / "adapter"), PeftModel.from_pretrained(base(), folder / "lora")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, lora.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_image_classification(run):
    folder, printed = run("image_classification", 20)
    assert any("classifier" in name for name in learnt(folder / "adapter"))
    (accuracy,) = (line for line in printed.splitlines() if line.startswith("accuracy of 24 images"))
    assert float(accuracy.split()[-1]) > 0.6
    assert printed.splitlines()[-1] == "the first of them, loaded again: left"
