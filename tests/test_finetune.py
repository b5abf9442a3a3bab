"""The main job in a minute's worth of miniature: every path of examples/finetune.py, with real transformers and real PEFT."""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import mos_ext

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "finetune.py"

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # the script is a program: its libraries' deprecations are not this suite's


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(finetune, tmp_path_factory):
    """The demo, shortened to a few steps."""
    output = tmp_path_factory.mktemp("demo")
    runs = finetune.main(
        [
            "--output",
            str(output),
            "--base-steps",
            "4",
            "--steps",
            "4",
            "--eval-blocks",
            "4",
            "--batch-size",
            "4",
            "--lr",
            "1e-2",
        ]
    )
    return output, runs


def test_demo(demo, capsys):
    output, (lora, mos) = demo
    assert lora.trainable == mos.trainable > 0
    assert mos.before == lora.before
    assert mos.after < mos.before
    assert lora.after < lora.before
    assert len(mos.losses) == len(mos.seconds) == 4
    assert mos.adapter_bytes == (output / "adapter" / "adapter_model.safetensors").stat().st_size
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "exported-lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_own_model_and_data(demo, finetune, tmp_path, capsys):
    """--model, --data with text and JSONL, no LoRA beside it."""
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    rows = [json.dumps({"body": f"Row number {i} of a table. " * 5}) for i in range(50)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows) + "\n\n")
    model = demo[0] / "base-model"
    arguments = [
        "--model",
        model,
        "--data",
        tmp_path / "a.txt",
        tmp_path / "b.jsonl",
        "--text-field",
        "body",
        "--output",
        tmp_path / "out",
    ]
    arguments += [
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--sequence-length",
        "32",
        "--eval-blocks",
        "2",
        "--dropout",
        "0.1",
        "--target-modules",
        "q_proj,down_proj",
    ]
    (run,) = finetune.main([str(a) for a in arguments])
    text = capsys.readouterr().out
    assert "exported LoRA in PEFT: logits differ by " in text
    assert "merged model:          logits differ by " in text
    assert "sample: " in text
    loaded = mos_ext.load_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out" / "adapter")
    assert mos_ext.parameter_report(loaded).trainable == run.trainable
    assert len(loaded.mos_pools.pools) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "--data must name files, got nowhere.txt"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments(finetune, arguments, message, capsys):
    with pytest.raises(SystemExit):
        finetune.main(arguments)
    assert message in capsys.readouterr().err


def test_bad_data(demo, finetune, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"other": 1}\n')
    (tmp_path / "short.txt").write_text("one line")
    common = ["--model", str(demo[0] / "base-model"), "--output", str(tmp_path), "--steps", "1"]
    with pytest.raises(
        SystemExit, match=r"--text-field must name a string in every line, got none for 'text' in .*bad\.jsonl:2"
    ):
        finetune.main([*common, "--data", str(tmp_path / "bad.jsonl")])
    with pytest.raises(SystemExit, match=r"--data must hold at least two blocks of --sequence-length tokens, got 0"):
        finetune.main([*common, "--data", str(tmp_path / "short.txt")])
