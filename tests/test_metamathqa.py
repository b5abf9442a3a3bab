"""MoS in PEFT's comparison on MetaMathQA: configurations, budgets, the runner on a stand-in for PEFT's repository."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft

from mos_ext.integrations.peft import MoSConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.metamathqa import __main__ as program  # noqa: E402
from benchmarks.quality.results import result  # noqa: E402
from benchmarks.quality.settings import EXPERTS, Settings  # noqa: E402
from benchmarks.quality.train import Job  # noqa: E402

# PEFT asks transformers whether a model checkpoints under a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "llama-3.2-3B-default": MoSConfig(**TARGETS),
    "llama-3.2-3B-tuned": MoSConfig(**TARGETS, r=32, alpha=64),
}


# ------------------------------------------------------------------------------------------------ the experiments


def written(folder):
    values = json.loads((folder / "adapter_config.json").read_text())
    values.pop("peft_version")
    return {**values, "target_modules": sorted(values["target_modules"])}  # written in the order of a set


@pytest.mark.parametrize("name", program.names())
def test_an_experiment_is_what_save_pretrained_writes(name, tmp_path):
    folder = program.HERE / program.EXPERIMENTS / name
    CONFIGS[name].save_pretrained(tmp_path)
    assert written(folder) == written(tmp_path)
    peft.PeftConfig.from_pretrained(str(folder)).save_pretrained(tmp_path / "again")
    assert written(folder) == written(tmp_path / "again")
    assert {path.name for path in folder.iterdir()} <= {"adapter_config.json", "training_params.json"}


@pytest.fixture(scope="module")
def llama():
    """Llama-3.2-3B, without its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("config", "trainable"),
    [
        (MoSConfig(**TARGETS, equivalent_rank=2), 573_440),
        (MoSConfig(**TARGETS, equivalent_rank=4), 1_146_880),
        (MoSConfig(**TARGETS, equivalent_rank=8), 2_293_760),
        *((config, 2_293_760) for config in CONFIGS.values()),
    ],
)
def test_budgets_on_the_meta_device(llama, config, trainable):
    model = peft.get_peft_model(llama, config)
    try:
        assert model.get_nb_trainable_parameters() == (trainable, 3_212_749_824 + trainable)
        assert {p.device.type for p in model.parameters()} == {"meta"}
    finally:
        model.unload()


# ------------------------------------------------------------------------------------------------ the runner

UTILS = """
import json, os
RESULT_PATH = RESULT_PATH_TEST = RESULT_PATH_CANCELLED = os.path.dirname(__file__)
"""
RUN = """
import argparse, json, os, sys
import peft
import utils
parser = argparse.ArgumentParser()
parser.add_argument("-v", action="store_true")
parser.add_argument("path_experiment")
parser.add_argument("--clean", action="store_true")
parser.add_argument("--fail", action="store_true")
options = parser.parse_args()
config = peft.PeftConfig.from_pretrained(options.path_experiment)
info = {"config": config.__class__.__module__, "r": config.r, "peft": peft.__file__, **vars(options)}
status = "canceled" if options.fail else "success"
folder = utils.RESULT_PATH_CANCELLED if options.fail else utils.RESULT_PATH
with open(os.path.join(folder, options.path_experiment.split("/")[-1] + ".json"), "w") as file:
    json.dump({"run_info": {"error_msg": "no memory" if options.fail else ""}, "train_info": {"status": status}, "seen": info}, file)
"""


@pytest.fixture
def checkout(tmp_path):
    """Laid out like PEFT's repository; the script has the same command line and tells what it saw."""
    root = tmp_path / "checkout"
    scripts = root / program.SCRIPT.parent
    scripts.mkdir(parents=True)
    (scripts / "run.py").write_text(RUN)
    (scripts / "utils.py").write_text(UTILS)
    (scripts / "default_training_params.json").write_text(json.dumps({"model_id": "an/unheard-of-model"}))
    (root / ".git").mkdir()
    (root / "src").mkdir()
    (root / "src" / "peft").symlink_to(Path(peft.__file__).parent)
    return root


# What needs a GPU and the hub is not asked; this is all that is left out.
UNCHECKED = (
    "import sys; from benchmarks.metamathqa import __main__ as program; "
    "program.check_machine = lambda model_id: None; sys.exit(program.main(sys.argv[1:]))"
)


def start(checkout, out, *arguments):
    command = [sys.executable, "-c", UNCHECKED, "--peft", str(checkout), "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_script_gets_the_experiment_and_knows_mos(checkout, tmp_path):
    run = start(checkout, tmp_path / "out", "--experiment", "llama-3.2-3B-tuned", "--clean")
    assert run.returncode == 0, run.stderr
    (file,) = (tmp_path / "out").rglob("*.json")
    assert file == tmp_path / "out" / "results" / "llama-3.2-3B-tuned.json"
    assert run.stdout.splitlines()[-1] == f"wrote {file}: success"
    seen = json.loads(file.read_text())["seen"]
    assert (seen["config"], seen["r"]) == ("mos_ext.integrations.peft.config", 32)
    assert (seen["v"], seen["clean"]) == (True, True)
    assert seen["path_experiment"] == "experiments/mos/llama-3.2-3B-tuned"
    assert seen["peft"] == str(checkout / "src" / "peft" / "__init__.py")
    assert not list(checkout.rglob("llama*"))


def test_a_run_that_was_not_finished_is_an_error(checkout, tmp_path):
    run = start(checkout, tmp_path / "out", "--experiment", "llama-3.2-3B-default", "--fail")
    assert run.returncode == 1, run.stderr
    file = tmp_path / "out" / "cancelled_results" / "llama-3.2-3B-default.json"
    assert run.stdout.splitlines()[-1] == f"wrote {file}: canceled no memory"


def test_without_a_name_all_run_each_in_a_process(checkout, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(program, "check_machine", lambda model_id: None)
    monkeypatch.setattr(subprocess, "call", lambda command, cwd: calls.append(command) or (-9, 0)[len(calls) - 1])
    assert program.main(["--peft", str(checkout), "--out", str(tmp_path / "out"), "--clean"]) == 1
    assert [command[-3:] for command in calls] == [["--experiment", name, "--clean"] for name in CONFIGS]
    assert all(command[:3] == [sys.executable, "-m", "benchmarks.metamathqa"] for command in calls)


@pytest.mark.parametrize("missing", program.NEEDED)
def test_what_is_no_checkout_is_refused(checkout, missing, capsys):
    (checkout / missing).parent.rename(checkout / "elsewhere") if "/" in missing else (checkout / missing).rmdir()
    assert program.main(["--peft", str(checkout)]) == 2
    message = f"--peft must be a git checkout of PEFT's repository, got {checkout}, which has no {missing}: git clone "
    assert message in capsys.readouterr().err


def test_a_script_that_says_nothing_of_where_results_go_is_refused(checkout, tmp_path):
    (checkout / program.SCRIPT.with_name("utils.py")).write_text("RESULT_PATH = ''")
    run = start(checkout, tmp_path / "out", "--experiment", "llama-3.2-3B-default")
    assert run.returncode == 2
    assert (
        f"--peft must have RESULT_PATH_TEST in {program.SCRIPT.with_name('utils.py')}, got {checkout} without"
        in run.stderr
    )


def refused(monkeypatch, capsys, checkout, python=(3, 10), device=True, missing=None, hub=None):
    """What is said on a machine that has everything but that."""
    find_spec = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("found", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name) or spec)
    monkeypatch.setattr(program, "PYTHON", python)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)

    def download(model_id, file):
        assert (model_id, file) == ("an/unheard-of-model", "config.json")
        raise hub

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert program.main(["--peft", str(checkout)]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"python": (4, 0)}, f"python must be at least 4.0 for PEFT's script, got {sys.version.split()[0]}"),
        ({"missing": "datasets"}, "got no datasets: pip install datasets"),
        ({"device": False}, "torch must see a CUDA or XPU device for PEFT's script, got none with torch"),
        ({"hub": OSError("401")}, "model_id must be a model that can be downloaded, got an/unheard-of-model: OSError;"),
    ],
)
def test_what_a_machine_lacks_is_said_before_anything_runs(monkeypatch, capsys, checkout, machine, message):
    assert message in refused(monkeypatch, capsys, checkout, **machine)


def test_an_experiment_may_name_its_model(checkout, monkeypatch, tmp_path):
    assert program.model_of(checkout, "llama-3.2-3B-tuned") == "an/unheard-of-model"
    folder = tmp_path / program.EXPERIMENTS / "other"
    folder.mkdir(parents=True)
    (folder / "training_params.json").write_text('{"model_id": "another/model"}')
    monkeypatch.setattr(program, "HERE", tmp_path)
    assert program.model_of(checkout, "other") == "another/model"


# ------------------------------------------------------------------------------------------------ the schema

# Of a result file of PEFT's, three levels deep: what its tools read.
RUN_INFO = {"created_at", "total_time", "experiment_name", "peft_branch", "peft_worktree_is_dirty", "train_config"}
RUN_INFO |= {"peft_config", "error_msg"}
TRAIN_CONFIG = {"model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps"}
TRAIN_CONFIG |= {"compile", "use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs"}
TRAIN_CONFIG |= {"lr_scheduler", "use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation"}
TRAIN_CONFIG |= {"init_kv_cache_prefix"}
TRAIN_INFO = {"accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"}
TRAIN_INFO |= {"train_time", "file_size", "num_trainable_params", "num_total_params", "status", "metrics"}
LAST_METRICS = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
PACKAGES = {
    f"{n}-{w}"
    for n in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    for w in ("version", "commit-hash")
}
SYSTEM = {"system", "release", "version", "machine", "processor", "accelerator"}

ROW = {
    "method": "mos",
    "trainable": 43776,
    "base_loss": 4.5,
    "loss": 4.25,
    "seconds": 9.5,
    "date": "2026-11-25 14:24:06 UTC",
    "platform": "Linux x86_64",
    "cpu": "A processor",
    "device": "cpu",
    "torch": "2.13.0",
    "peft": "0.21.2",
    "commit": "abc",
}


@pytest.mark.parametrize(("name", "alpha"), [("mos", "alpha"), ("lora-r2", "lora_alpha"), ("vera", None)])
def test_a_quality_run_in_pefts_schema(name, alpha):
    from benchmarks.quality.methods import methods

    s = Settings()
    content = result(s, Job(methods(s)[name], 0.01, 3, "test"), ROW)
    run, train, meta = content["run_info"], content["train_info"], content["meta_info"]
    assert (set(content), set(run)) == ({"run_info", "train_info", "meta_info"}, RUN_INFO)
    assert set(run["train_config"]) == TRAIN_CONFIG
    assert set(train) == TRAIN_INFO
    assert set(train["metrics"][-1]) == LAST_METRICS | {"test loss"}
    assert (set(meta), set(meta["system_info"])) == (META_INFO, SYSTEM)
    assert set(meta["package_info"]) == PACKAGES | {"mos_ext-commit-hash"}

    assert run["created_at"] == "2026-11-25T14:24:06+00:00"
    assert run["experiment_name"] == f"{name}/seed3"
    assert run["train_config"]["optimizer_kwargs"]["lr"] == 0.01
    assert run["peft_config"]["peft_type"] == methods(s)[name].kind.upper()
    assert {k: v for k, v in run["peft_config"].items() if "alpha" in k} == ({alpha: 16.0} if alpha else {})
    assert run["peft_config"]["r"] == methods(s)[name].options["r"]
    assert train["num_trainable_params"] == 43776
    assert train["num_total_params"] == 43776 + 12 * (4 * 96**2 + 3 * 96 * 256 + 2 * 96) + 1024 * 96 + 96
    assert [m["test loss"] for m in train["metrics"]] == [4.5, 4.25]
    assert train["metrics"][-1]["train total tokens"] == 140 * 4 * 64
    assert meta["package_info"]["peft-version"] == "0.21.2"
    assert json.loads(json.dumps(content)) == content


def test_a_quality_run_over_experts_says_so():
    from benchmarks.quality.methods import methods

    config = result(EXPERTS, Job(methods(EXPERTS)["mos"], 0.01, 0, "test"), ROW)["run_info"]["peft_config"]
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert "target_modules" not in config
