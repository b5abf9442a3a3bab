"""What only PEFT's repository holds, over MoS: its comparison on MetaMathQA, rehearsed, and its table of capabilities.

    PEFT=DIR pytest tests/peft_checkout.py      # make metamathqa-dry PEFT=DIR; DIR is a git checkout, a minute

The script of the comparison runs as it is, started by benchmarks.metamathqa: what it gets from a GPU and from the hub
is made here, a Llama of six layers that has learnt one sentence, and a few rows in place of each data set.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "peft_suite")]

from benchmarks.metamathqa import __main__ as program  # noqa: E402

CHECKOUT = Path(os.environ.get("PEFT", "PEFT, a variable of the environment, unset")).resolve()
program.check_checkout(CHECKOUT)
MODEL = "meta-llama/Llama-3.2-3B"
SENTENCE = "a model of six layers can learn one sentence and no more. "
STEPS = 4


# ------------------------------------------------------------------------------------------------ the rehearsal


def tiny_llama(hub):
    """Saved where ``huggingface_hub`` looks for the real one; its loss is one that the script thinks sane: 1 to 2."""
    import torch
    from tiny_hub import LLAMA_LIKE, byte_tokenizer, snapshot
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 6, "max_position_embeddings": 1024}
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, **shape}))
    tokens = torch.tensor([tokenizer(3 * SENTENCE)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while (loss := model(input_ids=tokens, labels=tokens).loss) > 1.8:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = snapshot(hub, MODEL)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(name, *args, **kwargs):
    """In place of ``datasets.load_dataset``."""
    from datasets import Dataset, DatasetDict

    def of(count, **columns):
        return Dataset.from_dict({key: [value.format(i) for i in range(count)] for key, value in columns.items()})

    if name == "meta-math/MetaMathQA":
        question = "How much is {0} and 1?"
        answer = "One more than {0}. The answer is: {0}"
        return DatasetDict(train=of(200, type="sum", query=question, original_question=question, response=answer))
    if name == "openai/gsm8k":
        columns = {"question": "How much is {0} and 2?", "answer": "Two more. #### {0}"}
        return DatasetDict(train=of(60, **columns), test=of(8, **columns))
    assert name == "HuggingFaceFW/finewiki"
    return of(100, text=3 * SENTENCE).to_iterable_dataset()


def rehearse(checkout, name, out):
    """The runner in this process, without a GPU and the hub. (The process is spoilt for anything else.)"""
    import datasets
    import torch

    a_gpu = mock.patch.object(torch.cuda, "is_available", return_value=True)
    with a_gpu, mock.patch.object(program, "PYTHON", (3, 10)):
        program.check_machine(program.model_of(checkout, name))
    datasets.load_dataset = rows
    sys.path.insert(0, str(checkout / "src"))
    import peft.utils

    peft.utils.infer_device = lambda: "cuda"  # the script refuses others; what it asks torch.cuda, a CPU answers with 0
    torch.cuda.get_device_name = lambda number: "none"
    if sys.version_info < (3, 12):
        tempfile.TemporaryDirectory = Kept
    utils = program.use(checkout, out)
    utils.device, utils.init_accelerator = "cpu", lambda: 0
    defaults = json.loads(Path(utils.FILE_NAME_DEFAULT_TRAIN_PARAMS).read_text())
    short = {"max_steps": STEPS, "eval_steps": 2, "generation_kwargs": {"max_length": 200, "max_new_tokens": 4}}
    utils.FILE_NAME_DEFAULT_TRAIN_PARAMS = str(out / "short.json")
    Path(utils.FILE_NAME_DEFAULT_TRAIN_PARAMS).write_text(json.dumps({**defaults, **short}))
    print(program.run(checkout, name, out, ["--clean"]))


class Kept(tempfile.TemporaryDirectory):
    """With an argument that Python 3.12 added."""

    def __init__(self, *args, delete=True, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    tiny_llama(folder)
    return folder


def keys(value):
    return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None


def quality_result(seed):
    from test_metamathqa import ROW

    from benchmarks.quality.methods import methods
    from benchmarks.quality.results import result
    from benchmarks.quality.settings import Settings
    from benchmarks.quality.train import Job

    return result(Settings(), Job(methods(Settings())["mos"], 0.01, seed, "test"), ROW)


@pytest.mark.parametrize("name", program.names())
def test_pefts_script_trains_evaluates_and_saves_mos(name, hub, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, str(CHECKOUT), name, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    file = Path(run.stdout.splitlines()[-1])
    assert file.parent.parent == tmp_path
    content = json.loads(file.read_text())
    train, info = content["train_info"], content["run_info"]
    assert (train["status"], info["error_msg"]) == ("success", "")
    assert info["experiment_name"] == f"mos/{name}"
    assert info["peft_config"]["peft_type"] == "MOS"
    own = json.loads((program.HERE / program.EXPERIMENTS / name / "adapter_config.json").read_text())
    assert info["peft_config"]["r"] == own["r"]
    assert train["num_trainable_params"] == own["equivalent_rank"] * 6 * (32 + 32 + 32 + 16)
    # Float32 pools, a digest, and a header that names them.
    assert 0 < train["file_size"] - 4 * train["num_trainable_params"] < 2000
    assert [m["step"] for m in train["metrics"]] == [2, 4, STEPS]
    assert train["metrics"][-1]["train samples"] == STEPS * info["train_config"]["batch_size"]
    assert train["metrics"][-1]["forgetting"] != 0  # it has learnt something

    # The quality study says it has this structure.
    ours, theirs = quality_result(0), content
    assert ours["meta_info"]["package_info"].pop("mos_ext-commit-hash")
    assert ours["train_info"]["metrics"][-1].keys() == theirs["train_info"]["metrics"][-1].keys() | {"test loss"}
    for result in (ours, theirs):
        result["run_info"]["peft_config"] = result["meta_info"]["dataset_info"] = None
        result["run_info"]["train_config"]["generation_kwargs"] = None
    assert keys(ours) == keys(theirs)


def test_the_quality_studys_results_can_be_read_by_pefts_tools(tmp_path):
    for seed in range(2):
        (tmp_path / f"{seed}.json").write_text(json.dumps(quality_result(seed)))
    table = load(CHECKOUT / "method_comparison" / "processing.py").load_df(str(tmp_path), "MetaMathQA")
    assert sorted(table["experiment_name"]) == ["mos/seed0", "mos/seed1"]
    assert set(table["peft_type"]) == {"MOS"}
    assert set(table["num_trainable_params"]) == {43776}
    assert table["test_accuracy"].isna().all()


# ------------------------------------------------------------------------------------------------ capabilities


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAYERS = {
    "Linear": True,
    "Embedding": False,
    "Conv1d": False,
    "Conv2d": False,
    "Conv3d": False,
    "LayerNorm": False,
    "MultiheadAttention": False,
    "Conv1D (transformers)": True,
    "nn.Parameter": True,  # stacks of experts
}
ROW_OF_MOS = {
    "category": "adapter",
    "target_layer_types": LAYERS,
    # All that PEFT's own resolver knows; where that finds no way back to weights, merging is refused.
    "quantization_backends": ["aqlm", "awq", "bnb_4bit", "bnb_8bit", "eetq", "gptq", "hqq", "inc", "torchao"],
    "multiple_adapters": True,
    "mixed_adapter_batches": True,
    "merging": True,
    "peft_mixed_model": False,
    "lora_conversion": True,
    "add_weighted_adapter": False,
    "hotswapping": False,
    "auxiliary_modules": {"modules_to_save": True, "trainable_token_indices": False},
    "extras": ["alpha_pattern", "rank_pattern", "use_rslora"],
    "paper_url": "https://arxiv.org/abs/2410.00938",
}


@pytest.mark.filterwarnings("ignore")  # other people's, at import
def test_mos_in_pefts_table_of_capabilities():
    from peft import PeftType

    import mos_ext.integrations.peft  # noqa: F401

    script = load(CHECKOUT / "scripts" / "generate_method_capabilities.py")
    # One layer has no more than equivalent_rank ranks to choose from. The script has such a line for VB-LoRA, too.
    script.PROBE_CONFIG_OVERRIDES[PeftType.MOS] = {"r": 8}
    (method,) = script.collect_methods(["mos"])
    found = script.run_tasks(script.collect_tasks([method], script.ProbeContext()))["MOS"]
    assert (found["config_class"], found["model_class"]) == ("MoSConfig", "MoSModel")
    assert {name: feature["value"] for name, feature in found["features"].items()} == ROW_OF_MOS
    notes = {name: feature["note"] for name, feature in found["features"].items() if "note" in feature}
    assert "merging" not in notes  # the merged model computes the same
    assert notes["add_weighted_adapter"].startswith("NotImplementedError: MoS adapters cannot be combined into one")


if __name__ == "__main__":
    rehearse(Path(sys.argv[1]).resolve(), sys.argv[2], Path(sys.argv[3]).resolve())
