"""`make gpu-report` without a GPU: everything of it that a CPU can run, on tiny shapes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_report, harness, kernels, providers, serving, tables  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups")


def test_smoke_report_and_resume(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_report", out, "--device", "cpu", "--section", "ceilings"]
    command += ["--part", "build,test,bench"]
    in_place = sorted((ROOT / "mos_ext").glob("*.so"))
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((out / "report.json").read_text())
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("build", "test", "bench"), "ok"
    )
    assert sorted((ROOT / "mos_ext").glob("*.so")) == in_place  # somebody's work
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["commit"]
    assert report["parts"]["test"]["pytest"]["outcomes"]["passed"] > 10
    assert "self-test      passed" in report["parts"]["build"]["mos_ext"]
    items = report["parts"]["bench"]["items"]
    assert {item["status"] for item in items.values()} == {"done"}
    assert "### Parts" in ran.stdout
    assert len(list(out.iterdir())) <= 8
    for path in out.glob("*.json"):
        assert str(ROOT) not in path.read_text()

    # One part more, on top of what is there.
    assert gpu_report.main([str(out), "--device", "cpu", "--part", "sanitize"]) == 0
    resumed = json.loads((out / "report.json").read_text())
    assert list(resumed["parts"]) == ["build", "test", "sanitize", "bench"]
    assert resumed["parts"]["sanitize"]["runs"]["without"]["status"] == "ok"
    assert resumed["parts"]["sanitize"]["runs"]["memcheck"]["status"] == "not installed"
    assert resumed["parts"]["bench"]["items"] == items


def test_a_failing_part_stops_nothing_but_counts(tmp_path, monkeypatch, capsys):
    def broken(report):
        raise RuntimeError("the part broke")

    after = {"problems": [], "note": "ran"}
    monkeypatch.setattr(gpu_report, "PARTS", {"build": broken, "test": lambda report: after})
    assert gpu_report.main([str(tmp_path), "--device", "cpu", "--part", "build,test"]) == 1
    parts = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert parts["build"]["status"] == "failed"
    assert parts["test"]["note"] == "ran"
    assert "the part broke" in capsys.readouterr().out
    assert gpu_report.main([str(tmp_path), "--device", "cpu", "--part", "test"]) == 0


def test_a_part_ends_at_its_limit_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "GRACE", 0.2)
    report = gpu_report.Report(tmp_path, "cpu", ["build"], "ceilings")
    began = time.monotonic()
    ran = report.run(["sh", "-c", "echo begun; trap '' INT; sleep 60 & echo $!; wait; sleep 60"], 1.0)
    assert time.monotonic() - began < 20
    assert ran["code"] is None
    text, child = ran["text"].split()
    assert text == "begun"
    for _ in range(100):
        if not _alive(int(child)):
            return
        time.sleep(0.05)
    pytest.fail("the child of a stopped command lives on")


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_parts_fit_nine_minutes():
    assert sum(gpu_report.SHARES.values()) <= 9 * 60 - 15
    assert set(gpu_report.SHARES) == set(gpu_report.PARTS)


@pytest.mark.parametrize("section", ["layers", "serving", "operators", "launches", "peers"])
def test_benchmarks(section, tmp_path, monkeypatch):
    # PEFT takes seconds to import and is not ours to test here; the report itself runs it where it is installed.
    for module in (kernels, providers, serving):
        monkeypatch.setattr(module, "importable", lambda name: "left out of this test")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    result = kernels.run(tmp_path / "bench.json", "cpu", [section], 600.0, resume=False)
    assert tables.problems(result) == []
    assert {item["status"] for item in result["items"].values()} == {"done"}
    assert json.loads((tmp_path / "bench.json").read_text()) == harness.scrub(result)
    text = tables.bench_tables(result)
    if section == "layers":
        found = tables.goals(result)
        # Nine of the table's ratios to the frozen linear, decode twice; the reference, the ranks.
        assert len(found) == 12 + 3 + 3
        assert [g["of_must"] for g in found] == sorted((g["of_must"] for g in found), reverse=True)
    if section == "serving":
        rows = [row for item in result["items"].values() for row in item["rows"]]
        used = {(row["provider"].partition(",")[0], row["adapters"]) for row in rows if "us" in row}
        assert used == {("frozen", 0), ("frozen_again", 0), *((p, n) for p in ("mos", "mos_same") for n in (1, 2, 4))}
        assert [g["what"] for g in tables.goals(result)] == ["mos, 4 adapters / frozen"]
        assert "| serving T=4 32->64 | 4 |" in text


def test_goals_name_the_worst_first():
    def row(provider, us):
        row = {"what": "layer", "case": "c", "provider": provider, "us": us, "role": "long", "shape": 0}
        return {**row, "dropout": 0.0, "dtype": "bfloat16"}

    rows = [row("frozen", 100.0), row("mos", 120.0), row("peft", 150.0), row("peft_fp32", 150.0)]
    found = tables.goals({"items": {"c": {"rows": rows}}})
    assert [(g["what"], g["ratio"], g["met"]) for g in found] == [
        ("peft_fp32 / mos", 1.25, False),
        ("mos / frozen", 1.2, False),
        ("peft / mos", 1.25, True),
    ]


def test_a_crash_is_recorded_and_passed(tmp_path, monkeypatch):
    def items(sizes, device):
        yield "first", lambda: [{"what": "x"}]
        yield "crashes", lambda: os._exit(3)  # never called again
        yield "wrong", lambda: [{"what": "x", "error_ok": False, "error": {"y": 1.0}}]

    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps({"items": {"first": {"status": "done", "rows": []}, "crashes": {"status": "running", "rows": []}}})
    )
    monkeypatch.setattr(kernels, "ITEMS", {"some": items})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    result = kernels.run(path, "cpu", ["some"], 600.0, resume=True)
    assert {name: item["status"] for name, item in result["items"].items()} == {
        "first": "done",
        "crashes": "crashed",
        "wrong": "done",
    }
    assert tables.problems(result) == ["crashes: crashed", "wrong, : wrong by {'y': 1.0}"]
    late = kernels.run(tmp_path / "late.json", "cpu", ["some"], -1.0, resume=False)
    assert {item["status"] for item in late["items"].values()} == {"skipped"}


def test_errors_follow_the_rule():
    exact = torch.randn(64, 64, dtype=torch.float64)
    near = exact.to(torch.bfloat16)
    assert providers.errors((near,), (near,), (exact,), ("y",), near.dtype)["error_ok"]
    assert not providers.errors((near * 1.05,), (near,), (exact,), ("y",), near.dtype)["error_ok"]
    near[0, 0] = torch.nan
    assert not providers.errors((near,), None, (exact,), ("y",), near.dtype)["error_ok"]


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Graph:
    steps = None

    def replay(self):
        time.sleep(1e-4)


def test_the_timer_of_a_gpu(monkeypatch):
    """The timer's way through graphs and events, with a stand-in for torch.cuda that cannot capture `stubborn`."""
    capturing = []

    @contextlib.contextmanager
    def graph(graph, stream):
        capturing.append(graph)
        yield
        capturing.pop()

    def stubborn():
        if capturing:
            capturing.clear()
            raise RuntimeError("operation not permitted when stream is capturing")

    fake = SimpleNamespace(
        CUDAGraph=Graph,
        Event=Event,
        graph=graph,
        _sleep=lambda n: None,
        synchronize=lambda: None,
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(harness.torch, "cuda", fake)
    sizes = harness.Sizes(rounds=6, sample_us=1000.0)
    timing = harness.measure({"willing": [lambda: None, lambda: None], "stubborn": [stubborn]}, "cuda", sizes)
    assert timing["willing"].timer == "graph"
    assert timing["willing"].steps_per_sample > 2
    assert timing["willing"].us_q20 <= timing["willing"].us <= timing["willing"].us_q80
    assert timing["stubborn"].timer == "events"
    assert "not permitted" in timing["stubborn"].row()["note"]
    assert timing["stubborn"].samples == 6
    harness.release("cuda")
