"""README and the pages of docs/: every snippet is executed, every number is that of a committed run, and the site builds.

A page is a program. Its Python blocks run one after the other in one namespace and one empty directory; a block below
`<!-- file: NAME -->` is written to NAME there, for the commands of the page (`sh` blocks), which are executed or
checked, each by a function of COMMANDS. What stands in for the rest of the world: names of models of a hub are replaced
by folders of small ones, and trainers stop after three steps.
"""

import ast
import csv
import importlib.util
import os
import re
import shlex
import statistics
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from models import llama, moe, transformers
from safetensors.torch import load_file

import mos_ext
import mos_ext.integrations.peft as mos_peft
from mos_ext.integrations.peft.layer import MIXED
from mos_ext.linear import BASE_ALONE, FUSED, GROUPED

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import rows as schema  # noqa: E402
from benchmarks import summary  # noqa: E402
from benchmarks.quality import demo, methods  # noqa: E402
from benchmarks.quality.report import Results  # noqa: E402
from benchmarks.quality.settings import Settings  # noqa: E402
from benchmarks.quality.train import new_model  # noqa: E402

DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
# docs/sources shows files that live elsewhere.
PAGES = {
    str(file.relative_to(ROOT)): file.read_text()
    for file in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if "sources" not in file.parts
}

# The snippets are programs: the deprecations of the libraries they use are not this suite's.
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(NamedTuple):
    file: str  # to write it to, or ""
    language: str
    code: str
    line: int  # of the page, of its first line of code


def blocks(page, language=None):
    text, found = PAGES[page], []
    for match in re.finditer(r"(?:^<!-- file: (\S+) -->\n)?^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        found.append(Block(match[1] or "", match[2], match[3], text[: match.start(3)].count("\n") + 1))
    return [block for block in found if language in (None, block.language)]


def test_every_block_is_of_a_kind_that_is_looked_at():
    kinds = {block.language for page in PAGES for block in blocks(page)}
    assert {kind for kind in kinds if not kind.startswith("{")} <= {"python", "sh", "json", "text"}


# ------------------------------------------------------------------------------------------------ programs


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What a hub's models are called -> folders, as a download would leave them."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folders = {name: tmp_path_factory.mktemp("model") for name in ("meta-llama/Llama-3.2-1B", "Qwen/Qwen3-30B-A3B")}
    llama_folder, moe_folder = folders.values()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words to read, again and again"], vocab_size=300, special_tokens=["<eos>"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama(16, vocab_size=512, hidden_size=64, intermediate_size=128).save_pretrained(llama_folder)
        moe("qwen3_moe", num_experts=64).save_pretrained(moe_folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")
        tokenizer.save_pretrained(llama_folder)
    return folders


@pytest.fixture
def run(hub, tmp_path, monkeypatch):
    """Runs a page; returns what its Python blocks left behind."""
    prepare = transformers.TrainingArguments.__post_init__

    def short(self):
        """The page's arguments, for three steps on a CPU."""
        self.max_steps, self.save_steps, self.use_cpu, self.report_to = 3, 2, True, "none"
        prepare(self)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", short)
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("some words to read, again and again. " * 400)

    def local(code):
        for name, here in (*hub.items(), *SERVERS.items()):
            code = code.replace(name, str(here))
        return code

    def run(page):
        variables = {"__name__": "__main__"}
        for block in blocks(page):
            if block.file:
                Path(block.file).write_text(local(block.code))
            elif block.language == "python":
                # As if it stood where it stands, so that a traceback names the page's line.
                exec(compile("\n" * (block.line - 1) + local(block.code), page, "exec"), variables)
            elif block.language == "sh":
                for command in block.code.splitlines():
                    execute(local(command))
        return variables

    yield run
    stop_servers()


def logits(model):
    return model(input_ids=torch.arange(1, 9)[None]).logits


def check_readme(left):
    model, names = left["model"], {"adapter_model.safetensors", "adapter_config.json"}
    assert sum(isinstance(module, mos_ext.MoSLinear) for module in model.modules()) == 16 * 7
    assert all(names <= {file.name for file in Path(folder).iterdir()} for folder in ("adapters/mine", "lora"))
    assert logits(model).isfinite().all()


def check_start(left):
    model, fresh, manual = left["model"], left["fresh"], left["manual"]
    with mos_ext.disabled(model):
        before = left["evaluate"](model, manual)
    assert left["evaluate"](fresh, manual) < before - 0.3  # the adapter has learnt
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16_384
    assert {layer.path for layer in mos_ext.explain(fresh).layers} == {"fused with the base layer"}


def check_peft(left):
    assert sum(type(m).__name__ == "MoSLinear" for m in left["model"].modules()) == 16 * 7
    assert torch.equal(logits(left["model"]), logits(left["native"]))


def check_trainer(left):
    for folder in ("run", "sft", "dpo", "dpo-after-sft"):
        names = {file.name for file in Path(folder, "checkpoint-2").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        assert "model.safetensors" not in names
    last = left["trainer"]
    assert last.state.global_step == 3
    assert list(last.model.peft_config) == ["default", "ref"]
    # The reference is the adapter that DPO began with, frozen.
    began = load_file("sft-adapter/adapter_model.safetensors")
    reference = {name: value for name, value in last.model.named_parameters() if ".ref." in name}
    assert len(reference) == 14
    for name, value in reference.items():
        assert not value.requires_grad
        assert torch.equal(value, began[f"base_model.{name.rpartition('base_model.')[2].replace('.ref', '')}"])
    assert all(value.any() for value in reference.values())


def check_qlora(left):
    model = left["model"]
    bases = {type(m.base_layer).__name__ for m in model.modules() if type(m).__name__ == "MoSLinear"}
    assert bases == {"Linear4bit"}
    assert {layer.path for layer in mos_ext.explain(model).layers} == {"the base layer is a Linear4bit"}
    model(input_ids=torch.arange(1, 9)[None], labels=torch.arange(1, 9)[None]).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained.values())


def check_experts(left):
    of_experts = [t for t in left["model"].mos_pools.linear_types if t.kind.experts]
    assert [t.num_matrices for t in of_experts] == [128, 128]
    assert logits(left["model"]).isfinite().all()
    assert left["y"].shape == (100, 32)


def check_distributed(left):
    """`train.py` was run by the page's command."""
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in Path("adapter").iterdir()}
    assert Path("out", "adapter").is_dir()


def check_server(left):
    """The page's client has talked to the page's server."""
    assert left["answer"].model == "mine"
    assert left["answer"].usage.completion_tokens == 20
    assert left["piece"].choices[0].finish_reason in ("length", "stop")


def check_serving(left):
    bank, tokens = left["bank"], left["tokens"]
    assert tokens.shape[0] == 3
    assert bank.names == ("french", "poems")
    assert all(bank.resident(name) for name in bank)


def check_export(left):
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), logits(left["lora"]), rtol=1e-4, atol=1e-5)


def check_troubleshooting(left):
    paths = [layer.path for layer in mos_ext.explain(left["model"]).layers]
    assert paths.count("the base layer is a Doubled") == 1
    assert paths.count("fused with the base layer") == 3


def check_format(left):
    """tests/test_checkpoint.py loads what this writer writes."""
    assert callable(left["write"])


CHECKS = {
    "README.md": check_readme,
    "docs/start.md": check_start,
    "docs/guides/peft.md": check_peft,
    "docs/guides/trainer.md": check_trainer,
    "docs/guides/qlora.md": check_qlora,
    "docs/guides/experts.md": check_experts,
    "docs/guides/distributed.md": check_distributed,
    "docs/guides/server.md": check_server,
    "docs/guides/serving.md": check_serving,
    "docs/guides/export.md": check_export,
    "docs/troubleshooting.md": check_troubleshooting,
    "docs/format.md": check_format,
    "docs/install.md": lambda left: None,
}


def test_every_page_with_a_snippet_is_executed():
    assert set(CHECKS) == {page for page in PAGES if blocks(page, "python") or blocks(page, "sh")}


@pytest.mark.parametrize("page", CHECKS)
def test_page(page, run, monkeypatch):
    if page == "docs/start.md":  # torch, safetensors and the wheel are all it asks for
        for name in ("transformers", "peft", "accelerate", "matplotlib"):
            monkeypatch.setitem(sys.modules, name, None)
    CHECKS[page](run(page))


# ------------------------------------------------------------------------------------------------ commands


def python(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def example(arguments):
    """The arguments that make an example short, after those of a page."""
    script = str(ROOT / arguments[0])
    small = ["--steps", "2", "--batch-size", "2", "--sequence-length", "32", "--eval-blocks", "2", "--device", "cpu"]
    return [script, *arguments[1:], *small, "--output", "out"]


def torchrun(arguments):
    where = next(i for i, argument in enumerate(arguments) if argument.endswith(".py"))
    own, program = arguments[:where], arguments[where:]
    python("-m", "torch.distributed.run", *own, *(example(program) if program[0].startswith("examples/") else program))


def make(arguments):
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(arguments) <= set(phony)


def pip(arguments):
    """Building and installing is tested in tests/test_build.py; here, that what is asked for has a name."""
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    asked = ",".join(re.findall(r"\[([\w,]+)\]", " ".join(arguments)))
    assert arguments[0] == "install"
    assert set(asked.split(",")) - {""} <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def server(arguments):
    """There is none here, and it would want a GPU: only that the adapter it is given is there, and of the rank it is told."""
    adapter = next(argument for argument in arguments if argument.startswith("mine=")).removeprefix("mine=")
    config = peft.LoraConfig.from_pretrained(adapter)
    if "--max-lora-rank" in arguments:
        assert config.r == int(arguments[arguments.index("--max-lora-rank") + 1])


SERVERS = {}  # where a page says that its server is -> where it is
PROCESSES = []


def serve(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), *arguments, "--port", "0", "--device", "cpu"]
    PROCESSES.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    lines = []
    while not (found := re.search(r"Uvicorn running on (\S+)", "".join(lines[-1:]))):
        lines.append(PROCESSES[-1].stderr.readline())
        assert lines[-1], "".join(lines)
    SERVERS["http://localhost:8000"] = found[1]


def ray_replicas(arguments):
    """Run by `make check-ray`; here, that there are such options."""
    sys.path.append(str(ROOT / "examples"))
    try:
        from server.start import arguments as parse
    finally:
        sys.path.remove(str(ROOT / "examples"))
    assert parse(arguments, None, replicas=1).replicas == 2


def stop_servers():
    SERVERS.clear()
    while PROCESSES:
        with PROCESSES.pop() as process:
            process.terminate()
            errors = process.stderr.read()
        assert process.returncode == 0, errors


COMMANDS = {
    "make": make,
    "pip": pip,
    "torchrun": torchrun,
    "python -m mos_ext": lambda arguments: python("-m", "mos_ext"),
    "python examples/finetune.py": lambda arguments: python(*example(["examples/finetune.py", *arguments])),
    "python examples/serve.py": serve,
    "python examples/ray_replicas.py": ray_replicas,
    "vllm serve": server,
    "python -m sglang.launch_server": server,
    "curl": lambda arguments: None,  # of those servers
    "python3 -m venv": lambda arguments: None,
    ".": lambda arguments: None,
}


def execute(line):
    for command in line.split(" && "):
        words = shlex.split(command, comments=True)
        start = max((name for name in COMMANDS if words[: len(name.split())] == name.split()), key=len)
        COMMANDS[start](words[len(start.split()) :])


# ------------------------------------------------------------------------------------------------ numbers


def measured():
    """(mode, T, width, dtype) -> provider -> row, of square layers."""
    found = {}
    for row in schema.read_rows(RESULTS / "cpu" / "bench.csv"):
        if row["question"] == "layer" and row["ratio"] and row["in"] == row["out"]:
            found.setdefault((row["mode"], row["T"], row["in"], row["dtype"]), {})[row["provider"]] = row
    return found


def table_rows(page, heading):
    """The cells of the first table below a heading, row by row."""
    below = PAGES[page].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


PROVIDERS = ("mos", "peft", "peft_fp32", "vblora", "unilora")


def test_speed_and_memory_of_the_layers():
    cells = measured()
    for heading, column, digits, providers in (
        ("Speed", "ratio", 3, PROVIDERS),
        ("Memory", "peak_mib", 1, ("frozen", *PROVIDERS)),
    ):
        rows = table_rows("docs/when.md", heading)
        assert rows
        for case, *found in rows:
            width, t = map(int, re.fullmatch(r"(\d+) x \d+, T=(\d+)", case).groups())
            by = cells["full", t, width, "bfloat16"]
            assert found == [f"{by[p][column]:.{digits}f}" for p in providers]


def test_what_is_said_of_layers():
    cells, page = measured(), PAGES["docs/performance.md"]
    small, one = cells["full", 256, 1024, "bfloat16"], cells["full", 1, 1024, "float32"]

    def added(by):
        return (by["mos"]["ratio"] - 1) * by["frozen"]["us"] / 1000

    assert f"T = 256 MoS adds {added(small):.2f} ms to a bfloat16 step" in page
    assert f"adds {added(one):.2f} ms to a float32 step of {one['frozen']['us'] / 1000:.2f}" in page
    assert f"{small['mos']['aten_calls']} ATen calls, and {small['peft']['aten_calls']} with PEFT's LoRA" in page

    def over_lora(mode, t, width, dtype):
        by = cells[mode, t, width, dtype]
        return by["mos"]["ratio"] / min(by[name]["ratio"] for name in ("peft", "peft_fp32") if name in by)

    both = [(width, dtype) for width in (1024, 4096) for dtype in ("bfloat16", "float32")]
    tokens = [100 * over_lora("full", 1, *of) - 100 for of in both]
    assert f"MoS takes {min(tokens):.0f} to {max(tokens):.0f} % longer" in page
    decoding = [over_lora("decode", t, 4096, dtype) for t in (1, 16) for dtype in ("bfloat16", "float32")]
    assert all(0.95 < ratio < 1.05 for ratio in decoding)  # "within 5 %", here and in docs/when.md
    assert "the two are within 5 % of each other" in page

    peak = {name: f"{row['peak_mib'] or 0:.0f}" for name, row in cells["full", 2048, 4096, "bfloat16"].items()}
    assert peak["frozen"] == peak["mos"]
    assert f"peaks at {peak['mos']} MiB, as the frozen linear does; PEFT's LoRA at {peak['peft']}" in page
    assert f"by default at {peak['peft_fp32']}; plain ATen in the best order, like MoS, at {peak['aten']}" in page

    grown = summary.growth(schema.read_rows(RESULTS / "cpu" / "bench.csv"))
    own = [100 * (max(points.values())[1] / points[1][1] - 1) for points in (grown["e"], grown["l"])]
    assert f"grows by {own[0]:.0f} % from e = 1 to 64 and by {own[1]:.0f} % from l = 1 to 16" in page


def test_what_is_said_of_experts():
    tables = [line.strip("| ").split(" | ") for line in (RESULTS / "cpu" / "experts.md").read_text().splitlines()]
    blocks_of = [cells for cells in tables if len(cells) == 9 and cells[6].strip() and cells[0] != "block"]
    page = PAGES["docs/performance.md"]
    quoted = [cells[2:] for cells in table_rows("docs/performance.md", "Experts")]
    assert quoted == [[mos, lora, loop, noise, peak] for *_, mos, noise, lora, loop, peak in blocks_of]
    for column in (4, 6):
        values = [float(cells[column]) for cells in blocks_of]
        for name in ("docs/when.md", "docs/guides/experts.md"):
            assert f"{min(values):.2f} to {max(values):.2f} times" in PAGES[name]
    growth = [float(cells[4]) for cells in tables if cells[0].startswith("growth")]
    assert f"from {growth[0]:.2f} to {growth[-1]:.2f}" in page
    rows = {cells[2]: f"{100 * float(cells[3]) - 100:.0f}" for cells in tables if cells[0] == "64 x 4096"}
    mos, loop = ([rows[f"{who}, {count} adapters"] for count in (1, 8, 64)] for who in ("mos", "loop"))
    assert "the adapters add {}, {} and {} %; a loop over adapters {}, {} and {} %".format(*mos, *loop) in page


def test_what_was_learnt():
    report = (RESULTS / "quality" / "report.md").read_text().splitlines()
    of_experts = (RESULTS / "quality-experts" / "report.md").read_text().splitlines()
    for page in ("docs/when.md", "docs/quality.md"):
        quoted = [line for line in PAGES[page].splitlines() if line.startswith("| ") and "±" in line]
        assert len(quoted) >= 5
        assert not set(quoted) - {*report, *of_experts}
    assert "| MoS against LoRA per expert, one budget | -0.0547 ± 0.0071 | lower |" in of_experts
    half = next(line for line in of_experts if line.startswith("| MoS of 0.5 of the budget against LoRA per expert"))
    assert half.endswith("| not shown to differ |")
    assert "by 0.0547 ± 0.0071 at its budget, and at half of it the two cannot be told apart" in PAGES["README.md"]
    for page, number, method in (
        ("README.md", "0.0351 ± 0.0026", "LoRA r=2"),
        ("README.md", "0.0636 ± 0.0053", "LoRA r=16"),
        ("docs/when.md", "+0.0316 ± 0.0040", "LoRA r=4"),
    ):
        assert number in PAGES[page]
        assert any(line.startswith(f"| {method} |") and number in line for line in report)
    with (RESULTS / "quality" / "runs.csv").open(newline="") as stream:
        runs = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    vera, lora = (
        statistics.fmean(float(row["seconds"]) for row in runs if row["method"] == method)
        for method in ("vera", "lora-r2")
    )
    page = PAGES["docs/when.md"]
    assert f"VeRA needs rank {methods.vera_rank(Settings())}" in page
    assert f"took {vera:.0f} s where LoRA's r=2 took {lora:.0f}" in page


def test_what_the_demo_printed():
    with (RESULTS / "demo" / "runs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row |= {"seed": int(row["seed"]), "trainable": int(row["trainable"])}
        row |= {name: float(row[name]) for name in ("loss", "base_loss", "lr")}
    assert {row["modified"] for row in rows} == {"False"}
    assert f"```text\n{demo.text(Results(Settings(seeds=demo.SEEDS), rows))}\n```" in PAGES["README.md"]


def test_what_is_said_of_many_adapters():
    rows = schema.read_rows(RESULTS / "cpu" / "serving.csv")
    goals, model, memory, *_ = (RESULTS / "cpu" / "serving.md").read_text().split("\n\n")
    under_load = (RESULTS / "cpu" / "server.md").read_text()
    for page in ("README.md", "docs/performance.md"):
        assert model in PAGES[page]
        assert under_load in PAGES[page]
    page = PAGES["docs/performance.md"]
    assert goals in page
    assert memory in page
    of = {(row["mode"], row["provider"]): row for row in rows}
    assert f"checked whole, takes {of['load', 'load']['us'] / 1e3:.0f} ms" in page
    add, new, same = (of["thousands", name]["us"] / 1e3 for name in ("add", "a new route", "the same route"))
    assert f"{of['thousands', 'add']['bytes']:,} bytes each, adding one takes {add:.1f} ms" in page
    assert f"over 64 of them {new:.1f} ms, again over the same {same:.2f}" in page
    alone = [line.split(" | ")[1] for line in goals.splitlines() if "alone" in line and "generate 1 x 24" in line]
    assert "takes {} (float32) and {} (bfloat16) of its time with PEFT's LoRA".format(*alone) in PAGES["docs/when.md"]
    mos, lora = of["memory", "mos r=16 e=2"]["bytes"], of["memory", "lora r=16"]["bytes"]
    assert f"takes {mos / 1e6:.0f} MB in the bank, where LoRA of its rank takes {lora / 1e6:.0f}" in PAGES["README.md"]
    assert "20 MB and 0.2 MB, where LoRA of rank 16 takes 160 MB" in PAGES["docs/guides/serving.md"]
    assert f"{(of['memory', 'mos, with tables']['bytes'] - mos) / 1e6:.1f}" == "0.2"


def test_what_is_said_of_a_training_step():
    table = (RESULTS / "cpu" / "step.md").read_text()
    for page in ("README.md", "docs/performance.md"):
        assert table in PAGES[page]
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[2] for row in table.splitlines()[2:]}
    page = PAGES["docs/when.md"]
    for provider, text in (
        ("MoS (r=16, e=4)", "MoS {} times"),
        ("PEFT LoRA r=16, adapter in the base's dtype", "LoRA {} in the base's dtype"),
        ("PEFT LoRA r=16", "and {} by default"),
        ("PEFT VB-LoRA r=4", "VB-LoRA {}"),
        ("PEFT VeRA r=256", "VeRA (r=256) {}"),
    ):
        assert text.format(cells[provider].split(",")[0]) in page
    peaks = [
        cells[name].split(", ")[1].split()[0] for name in ("the frozen model", "MoS (r=16, e=4)", "PEFT LoRA r=16")
    ]
    assert cells["PEFT LoRA r=16, adapter in the base's dtype"].endswith(f", {peaks[1]} MiB")
    assert "peaks at {} MiB, MoS and LoRA in the base's dtype at {}, LoRA by default at {}".format(*peaks) in page


def test_files_are_as_large_as_the_page_says(tmp_path):
    s, found = Settings(), {}
    known = methods.methods(s)

    def save(label, name, change=None, **options):
        model = methods.put_on(new_model(s.base), known[name], s, 0)
        if change:
            setattr(model.peft_config["default"], *change)
        folder = tmp_path / label
        mos_ext.save_adapter(model, folder, **options) if name == "mos" else model.save_pretrained(folder)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[label] = [f"{trained:,}", f"{(folder / 'adapter_model.safetensors').stat().st_size:,}"]

    save("LoRA r=16", "lora-r16")
    save("LoRA r=2", "lora-r2")
    save("VeRA, with its projections (default)", "vera")
    save("VeRA, without", "vera", ("save_projection", False))
    save("VB-LoRA", "vblora")
    save("VB-LoRA, `save_only_topk_weights` (no further training)", "vblora", ("save_only_topk_weights", True))
    save("MoS", "mos")
    save("MoS, saved in bfloat16", "mos", dtype=torch.bfloat16)
    assert {label: cells for label, *cells in table_rows("docs/when.md", "File size")} == found


def test_parameters_of_a_model_of_a_billion():
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    trained, lora = {}, None
    for e in (2, 8):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        report = mos_ext.parameter_report(mos_ext.adapt(model, mos_ext.MoSConfig(r=16, equivalent_rank=e)))
        trained[e], lora = report.trainable, report.lora_parameters
    page = PAGES["docs/when.md"]
    for count in (lora, *trained.values()):
        assert f"{count:,}" in page
        assert f"{4 * count / 1e6:.1f} MB" in page
    assert f"saves {12 * (lora - trained[2]) / 1e6:.0f} MB of {12 * lora / 1e6:.0f} in float32" in page
    assert f"{2 * trained[2] / 1e6:.1f} M parameters; LoRA of r=16: {lora / 1e6:.1f} M" in PAGES["README.md"]


# ------------------------------------------------------------------------------------------------ troubleshooting


def strings(node):
    """The strings of an expression, with X for what is put into them."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def reasons(file, *names):
    """The sentences that some functions of a module return, or put into what they return."""
    tree = ast.parse((ROOT / "mos_ext" / file).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    nodes = [node for name in names for node in ast.walk(functions[name])]
    values = [node.value for node in nodes if isinstance(node, (ast.Return, ast.Assign)) and node.value]
    return [text for value in values for text in strings(value) if " " in text]


def test_every_reason_has_its_line():
    """The reasons of the code against the first column of the page's tables."""
    said = [
        *reasons("planner.py", "why_opaque", "why_opaque_weight", "stacks_left_out", "adaptable"),
        *reasons("linear.py", "why_called", "_why_slow"),
        *reasons("ops/checks.py", "why_not_native"),
        *(f"X: {reason}" for reason in reasons("ops/loader.py", "_load", "_driver_problem")),
        *(FUSED, BASE_ALONE, GROUPED, MIXED),
    ]
    said.remove("X: X")  # a library and its problem, the line before
    lines = re.findall(r"^\| `(.*?)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert set(said) == set(lines)


# ------------------------------------------------------------------------------------------------ the site


SPHINX = ("-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", "docs")


def test_the_site(tmp_path):
    """As `make docs` builds it: a warning, a reference to nothing, a missing picture, a page in no menu is an error."""
    result = subprocess.run([sys.executable, *SPHINX, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    html = {file: file.read_text() for file in tmp_path.rglob("*.html") if file.stem not in ("genindex", "search")}
    wanted = {f"{page.removeprefix('docs/').removesuffix('.md')}.html" for page in PAGES if page != "README.md"}
    assert wanted <= {str(file.relative_to(tmp_path)) for file in html}

    # Every public name is in the reference.
    inventory = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    public = {f"mos_ext.{name}" for name in mos_ext.__all__ if name not in ("functional", "reference", "__version__")}
    public |= {f"mos_ext.functional.{name}" for name in mos_ext.functional.__all__}
    public |= {f"mos_ext.integrations.peft.{name}" for name in mos_peft.__all__}
    assert public <= {line.split()[0] for line in inventory.splitlines()}

    # What Sphinx does not look at: that files and fragments of the built pages are there.
    for file, text in html.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            target, _, fragment = link.partition("#")
            if re.match(r"\w+:|//", target):
                continue
            there = (file.parent / target.partition("?")[0]).resolve() if target else file
            assert there.is_file(), (file.name, link)
            assert not fragment or f'id="{fragment}"' in html.get(there, f'id="{fragment}"'), (file.name, link)


def test_the_makefile_builds_the_same_site():
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs:")[2].partition("\n\n")[0]
    assert " ".join(SPHINX) in recipe


def test_links_of_the_readme():
    for target in re.findall(r"\]\(([^)]+)\)", PAGES["README.md"]):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_pictures_are_those_of_the_library():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "pictures" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    drawn = dict(draw.pictures())
    assert {file: file.read_text() for file in (DOCS / "pictures").glob("*.svg")} == drawn
    assert all(file.name in "".join(PAGES.values()) for file in drawn)
