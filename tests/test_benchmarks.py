"""The CPU benchmarks on tiny shapes: every provider runs and is right, and what is written can be read, drawn, compared.

Nothing here asserts a time. That compare.py finds a slow-down is tested with invented noise.
"""

import contextlib
import csv
import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mos_ext

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as everything  # noqa: E402
from benchmarks import (  # noqa: E402
    compare,
    drawing,
    experts,
    harness,
    layer,
    memory,
    providers,
    scaling,
    server,
    serving,
    step,
    summary,
)
from benchmarks import rows as schema  # noqa: E402
from benchmarks.plots import plot  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CASE = providers.Case("full", 24, 32, 64, 4, 2, torch.bfloat16, ())
NAMES = [p for p in providers.PROVIDERS if not p.endswith("_compiled")]


# ------------------------------------------------------------------------------------------------ providers


@pytest.mark.parametrize("kind", providers.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_runs_and_is_right(kind, dtype):
    names = tuple(n for n in NAMES if not (kind == "backward" and n == "mos_layer"))
    case = replace(CASE, kind=kind, dtype=dtype, providers=names)
    data = providers.Data(case, "cpu")
    ready = providers.make_ready(case, [data], providers.PROVIDERS)
    assert (ready.failed, ready.absent) == ({}, {})
    checked = providers.check_layer(data, ready)
    assert list(checked) == list(names)
    assert all(c["error_ok"] for c in checked.values()), checked
    compared = {n: len(c["error"]) for n, c in checked.items()}
    results = len(providers.RESULTS[kind])
    assert {n for n, count in compared.items() if count < results} <= {"frozen", "frozen_again", "vblora", "unilora"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own
def test_compiled_providers_run_and_are_right():
    case = replace(CASE, providers=("frozen", "mos_compiled", "peft_compiled"))
    data = providers.Data(case, "cpu")
    # Of torch.compile only the tracing: the code generator takes its time and is not ours.
    compiled = {
        f"{name}_compiled": lambda d, build=providers.PROVIDERS[name]: _traced(build(d)) for name in ("mos", "peft")
    }
    ready = providers.make_ready(case, [data], providers.PROVIDERS | compiled)
    assert (ready.failed, ready.absent) == ({}, {})
    checked = providers.check_layer(data, ready)
    assert len(checked) == 3
    assert all(c["error_ok"] for c in checked.values()), checked
    torch._dynamo.reset()


def _traced(built):
    return replace(built, forward=torch.compile(built.forward, backend="aot_eager", dynamic=True))


def test_a_wrong_provider_is_called_wrong():
    def wrong(d):
        built = providers.mos(d)
        return replace(built, forward=lambda: built.forward() * 1.1)

    def broken(d):
        raise RuntimeError("no such thing")

    case = replace(CASE, providers=("frozen", "mos", "reference", "broken", "mos_compiled"))
    known = providers.PROVIDERS | {"mos": wrong, "broken": broken, "mos_compiled": broken}
    found = {r["provider"]: r for r in layer.provider_rows(case, harness.SMOKE, known, CEILING)}
    assert {name: row["status"] for name, row in found.items()} == {
        "frozen": "ok",
        "mos": "wrong",
        "reference": "ok",
        "broken": "failed",
        "mos_compiled": "absent",
    }
    assert found["broken"]["cause"] == "RuntimeError: no such thing"


CEILING = {"copy": 10.0, "bfloat16": 100.0, "float32": 100.0}


def test_missing_packages_are_rows(monkeypatch):
    monkeypatch.setattr(providers, "importable", lambda name: f"No module named {name!r}")
    case = replace(CASE, providers=("frozen", "peft", "vblora"))
    found = layer.provider_rows(case, harness.SMOKE, providers.PROVIDERS, CEILING)
    assert [(r["provider"], r["status"], r.get("cause")) for r in found] == [
        ("frozen", "ok", None),
        ("peft", "absent", "No module named 'peft'"),
        ("vblora", "absent", "No module named 'peft'"),
    ]


def test_a_provider_file_adds_and_replaces(tmp_path):
    planted = providers.providers_of(ROOT / "benchmarks" / "planted.py")
    assert planted.keys() == providers.PROVIDERS.keys()
    case = replace(CASE, providers=("frozen", "mos", "reference"))
    data = providers.Data(case, "cpu")
    ready = providers.make_ready(case, [data], planted)
    assert all(c["error_ok"] for c in providers.check_layer(data, ready).values())
    honest = providers.make_ready(case, [data], providers.PROVIDERS)
    count = [sum(n == "aten::mm" for n in harness.launches(r.steps["mos"][0], "cpu")) for r in (ready, honest)]
    assert count[0] == count[1] + 1

    file = tmp_path / "more.py"
    file.write_text("from benchmarks.providers import frozen\nPROVIDERS = {'mine': frozen}\n")
    assert "mine" in providers.providers_of(file)
    assert all("mine" in c.providers for c in layer.grid("all", providers.providers_of(file)))


def test_grids():
    assert {c.rows for c in layer.grid("all")} == {1, 16, 256, 2048, 8192}
    full = {(c.rows, c.fan_in, c.dtype_name): c.providers for c in layer.grid("default") if len(c.providers) > 8}
    for (dtype, features, t), _ in summary.GOALS.items():
        assert {"frozen", "mos", "peft", "vblora", "unilora", "peft_compiled", "frozen_again"} <= set(
            full[t, features, dtype]
        )
    names = [(c.name, c.providers) for c in layer.grid("all") if c.model.startswith("LLaMA-2")]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------------------------------ what is measured


def test_saved_bytes_and_flops():
    data = providers.Data(replace(CASE, providers=("mos",)), "cpu")
    built = providers.mos(data)
    # x in bfloat16 and S in float32, as tests/test_memory.py has it.
    assert harness.saved_bytes(built.forward, [data.weight, *built.state]) == 24 * 32 * 2 + 24 * 4 * 4
    assert harness.saved_bytes(providers.frozen(data).forward, [data.weight]) == 0
    assert layer.work(CASE, False)[0] == 2 * 2 * 24 * 32 * 64
    assert layer.work(CASE, True)[0] == 2 * 2 * 24 * 32 * 64 + 3 * 2 * 24 * 4 * (32 + 64)
    assert layer.work(replace(CASE, kind="decode"), False) == (2 * 24 * 32 * 64, 2 * (24 * (32 + 64) + 32 * 64))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no record of the peak to reset")
def test_peak_sees_what_torch_does_not_allocate():
    import mmap

    def scratch():
        with mmap.mmap(-1, 32 << 20) as block:
            for page in range(0, 32 << 20, 4096):
                block[page] = 1

    peak = memory.peak_bytes(scratch)
    if peak is None:
        pytest.skip("the system does not let the record be reset")
    assert 30 << 20 < peak < 40 << 20


def test_ratios_are_paired(monkeypatch):
    """A round that is slow for all is in the times, and not in the ratios."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def step(cost):
        def run():
            slow = (1.0, 3.0, 7.0)[calls[0] // 2 % 3]  # two providers a round, and each once before the first
            calls[0] += 1
            clock[0] += cost * slow

        return [run]

    sizes = harness.Sizes(rounds=9, seconds=math.inf, sample_us=0.0)
    found = harness.measure({"frozen": step(1e-3), "mos": step(2e-3)}, "cpu", sizes)["mos"]
    assert (found.us_q20, found.us, found.us_q80) == pytest.approx((2e3, 6e3, 14e3))
    assert (found.ratio_q20, found.ratio, found.ratio_q80) == pytest.approx((2.0, 2.0, 2.0))


def test_times_repeat_until_a_sample_is_long_enough():
    found = harness.measure({"frozen": [lambda: None]}, "cpu", harness.Sizes(rounds=5, sample_us=50.0))
    assert found["frozen"].steps_per_sample > 1
    assert found["frozen"].samples == 5


# ------------------------------------------------------------------------------------------------ the whole, and its files


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    status = everything.main([str(folder), "--grid", "smoke"])
    assert status == 0, (folder / "bench.csv").read_text()
    return folder


def test_everything_is_written(out):
    assert {p.name for p in out.iterdir()} >= {"bench.csv", "bench.md", "ratio.png", "scaling.png"}
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("ratio", "scaling"))
    text = (out / "bench.md").read_text()
    for head in ("Goals", "Time over the frozen linear", "Growth", "ATen calls", "Saved for backward"):
        assert head in text
    assert str(ROOT) not in text + (out / "bench.csv").read_text()


def test_the_schema(out):
    with (out / "bench.csv").open(newline="") as stream:
        assert tuple(csv.DictReader(stream).fieldnames) == schema.COLUMNS
    rows = schema.read_rows(out / "bench.csv")
    assert {r["question"] for r in rows} == {"ceiling", "layer", "scaling", "setup"}
    for row in rows:
        assert row["torch"] == torch.__version__
        assert row["commit"]
        assert row["threads"] == torch.get_num_threads()
    timed = [r for r in rows if r["question"] == "layer"]
    assert {(r["mode"], r["dtype"]) for r in timed} == {
        (k, d) for k in providers.KINDS for d in ("bfloat16", "float32")
    }
    for row in timed:
        assert row["status"] == "ok", row
        assert row["us_q20"] <= row["us"] <= row["us_q80"]
        assert row["ratio_q20"] <= row["ratio"] <= row["ratio_q80"]
        assert row["error"] < providers.LOOSE_ERROR
        assert row["aten_calls"] > 0
        for column in ("gflop_s", "gb_s", "of_gemm", "of_copy", "T", "in", "out", "r", "l"):
            assert row[column] is not None, column
        if row["mode"] in ("full", "forward"):
            assert row["saved_bytes"] is not None
    assert all(r["ratio"] == 1.0 for r in timed if r["provider"] == "frozen")


def test_scaling_has_every_point(out):
    rows = schema.read_rows(out / "bench.csv")
    found = summary.growth(rows)
    assert {what: tuple(points) for what, points in found.items()} == scaling.TINY.points
    assert scaling.FULL.points["e"][0] == scaling.FULL.points["layers"][0] == 1
    assert scaling.FULL.points["e"][-1] == scaling.FULL.points["layers"][-1] == 64
    assert len([r for r in rows if r["question"] == "setup" and r["us"]]) == 3


def test_goals_name_met_and_missed():
    def row(provider, ratio, peak):
        case = {"question": "layer", "mode": "full", "T": 256, "in": 4096, "out": 4096, "dtype": "bfloat16"}
        size = {"r": 16, "l": 4, "dropout": 0.0, "gradient_bytes": 1 << 20}
        return {**case, **size, "provider": provider, "ratio": ratio, "peak_mib": peak}

    rows = [row("frozen", 1.0, 10.0), row("mos", 1.04, 11.4), row("peft", 1.05, 12.0), row("peft_fp32", 1.2, 14.0)]
    assert [(value, goal, met) for _, value, goal, met in summary.goals(rows)] == [
        ("1.040", "<= 1.030", False),
        ("0.990", "<= 1.000", True),
        ("11.400 MiB", "<= 11.516 MiB", True),
    ]


def test_plots_of_some_rows_only(out, tmp_path):
    lines = (out / "bench.csv").read_text().splitlines(keepends=True)
    few = tmp_path / "few.csv"
    few.write_text(lines[0] + "".join(line for line in lines if line.startswith("scaling")))
    assert [p.name for p in plot(few, tmp_path)] == ["scaling.png"]


# ------------------------------------------------------------------------------------------------ compare


def write(file, slowdown=1.0, seed=0, noise=0.03, samples=20, cells=100, again=0.0):
    """A CSV of invented measurements: paired ratios with normal noise, medians and quantiles of them."""
    draw = random.Random(seed)
    with schema.Rows(file, "", show=lambda line: None) as out:
        for k in range(cells):
            for provider, ratio in (("frozen_again", 1.0 + again), ("mos", 1.05 * slowdown)):
                values = sorted(ratio * (1 + draw.gauss(0, noise)) for _ in range(samples))
                q20, median, q80 = (values[round(q * (samples - 1))] for q in (0.2, 0.5, 0.8))
                case = {"question": "layer", "case": f"{k}", "mode": "full", "T": k, "provider": provider}
                times = {"us": 1.0, "ratio": median, "ratio_q20": q20, "ratio_q80": q80, "samples": samples}
                out.add("", [{**case, **times}])
    return file


@pytest.fixture
def here(monkeypatch):
    known = harness.environment()
    monkeypatch.setattr(schema, "environment", lambda: known)


@pytest.mark.usefixtures("here")
class TestCompare:
    def test_noise_alone_is_no_regression(self, tmp_path):
        for seed in range(12):
            samples = 5 + 5 * (seed % 4)
            old = write(tmp_path / "old.csv", seed=2 * seed, samples=samples)
            new = write(tmp_path / "new.csv", seed=2 * seed + 1, samples=samples)
            assert compare.main([str(old), str(new)]) == 0, seed

    def test_a_planted_slow_down_is_one(self, tmp_path, capsys):
        old = write(tmp_path / "old.csv", seed=1)
        new = write(tmp_path / "new.csv", seed=2, slowdown=1.25)
        assert compare.main([str(old), str(new)]) == 1
        assert "100 rows of mos compared, 100 regressed" in capsys.readouterr().out
        assert compare.main([str(new), str(old)]) == 0  # faster is no regression

    def test_tolerance_follows_the_noise(self, tmp_path):
        def tolerance(**options):
            old, new = (write(tmp_path / f"{k}.csv", seed=k, cells=1, **options) for k in range(2))
            return compare.compare(old, new)[0].tolerance

        assert tolerance(noise=0.0001) == pytest.approx(compare.LEAST, rel=0.02)
        quiet, loud = tolerance(noise=0.01), tolerance(noise=0.2)
        assert quiet < loud
        assert loud > 0.15
        assert tolerance(noise=0.01, again=0.1) > 0.3  # the same thing, measured twice, 10 % apart

    def test_a_small_rise_in_little_noise_is_found(self, tmp_path):
        old = write(tmp_path / "old.csv", seed=1, noise=0.002)
        new = write(tmp_path / "new.csv", seed=2, noise=0.002, slowdown=1.03)
        assert compare.main([str(old), str(new)]) == 1

    def test_unusable_input(self, tmp_path, capsys):
        good = write(tmp_path / "good.csv", cells=1)
        other = tmp_path / "other.csv"
        other.write_text("a,b\n1,2\n")
        empty = tmp_path / "empty.csv"
        empty.write_text(",".join(schema.COLUMNS) + "\n")
        for bad in (other, empty, tmp_path / "missing.csv", ROOT):
            assert compare.main([str(good), str(bad)]) == 2
            assert compare.main([str(bad), str(good)]) == 2
        assert compare.main([str(good), str(good), "--provider", "nobody"]) == 2
        assert "nobody" in capsys.readouterr().err

    def test_rows_pair_by_what_was_measured(self, tmp_path):
        old, new = write(tmp_path / "old.csv", cells=3), write(tmp_path / "new.csv", cells=2)
        assert len(compare.compare(old, new)) == 2


def test_standard_error_of_a_median():
    draw = random.Random(3)
    medians, errors = [], []
    for _ in range(400):
        values = sorted(draw.gauss(1, 0.1) for _ in range(25))
        row = {"ratio": values[12], "ratio_q20": values[5], "ratio_q80": values[19], "samples": 25}
        medians.append(values[12])
        errors.append(compare.relative_error(row, None))
    spread = math.sqrt(sum((m - 1) ** 2 for m in medians) / len(medians))
    assert 0.85 < sum(errors) / len(errors) / spread < 1.25


def test_no_case_is_told(tmp_path):
    with pytest.raises(SystemExit, match="--only must be part of a case's name.*got 'zzz'"):
        layer.main([str(tmp_path / "rows.csv"), "--grid", "smoke", "--only", "zzz"])


def test_documents_have_the_numbers_of_the_committed_runs():
    rows = schema.read_rows(RESULTS / "cpu" / "bench.csv")
    assert (RESULTS / "cpu" / "bench.md").read_text() == summary.summary(rows)
    page, excerpt = (ROOT / "docs" / "performance.md").read_text(), summary.excerpt(rows)
    assert excerpt in page
    goals = summary.goals(rows)
    assert f"{sum(met for *_, met in goals)} of the {len(goals)} goals there are met" in page
    quoted = (ROOT / "README.md").read_text().partition("<!-- training-step -->\n")[2].partition("<!-- /")[0]
    assert quoted == (RESULTS / "cpu" / "step.md").read_text()


# ------------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize(("low", "high"), [(0.97, 1.1), (0.97, 1.8), (0.9, 6.0), (0.9, 20.0)])
def test_ratio_axes_have_plain_numbers(low, high):
    plt = drawing.pyplot()
    figure, axis = plt.subplots()
    drawing.ratio_axis(axis, low, high)
    figure.canvas.draw()
    shown = [label.get_text() for label in axis.get_yticklabels(which="both") if label.get_text()]
    plt.close(figure)
    assert len(shown) >= 3
    assert "1" in shown
    assert all(low <= float(text) <= high for text in shown)


def test_labels_stand_apart_and_inside():
    plt = drawing.pyplot()
    figure, axis = plt.subplots()
    axis.set(xlim=(-5, 2), ylim=(0, 1))
    heights = [0.0, 0.001, 0.5, 0.5, 0.501, 0.999, 1.0]
    drawing.label_points(axis, [drawing.Label(1, y, f"at {y}", "black") for y in heights])
    figure.canvas.draw()
    boxes = [type(axis.title).get_window_extent(text) for text in axis.texts]  # of the text, without its line
    plt.close(figure)
    assert len(boxes) == len(heights)
    boxes.sort(key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))
    assert all(axis.bbox.y0 <= box.y0 and box.y1 <= axis.bbox.y1 for box in boxes)


def test_one_colour_for_each_provider():
    names = [
        n
        for n in providers.PROVIDERS
        if n not in ("frozen_again", "mos_layer") and not n.endswith(("_compiled", "_fp32"))
    ]
    assert len({drawing.color(n) for n in names}) == len(names)
    assert drawing.color("peft") == drawing.color("lora-r16") == drawing.color("peft_fp32")
    assert drawing.color("mos") == drawing.color("mos_compiled") == drawing.color("mos-e4-p1")
    assert drawing.color("vblora") != drawing.color("vera")


# ------------------------------------------------------------------------------------------------ blocks and models


@pytest.mark.parametrize("of", [experts, step], ids=["experts", "step"])
def test_every_line_of_the_other_benchmarks(of, tmp_path):
    file = tmp_path / "rows.csv"
    assert of.main([str(file), "--grid", "smoke"]) == 0
    rows = schema.read_rows(file)
    assert {row["status"] for row in rows} <= {"ok", "absent"}
    assert {row["provider"] for row in rows if row["status"] == "ok"} >= set(of.PROVIDERS)
    measured = [r for r in rows if r["provider"] in of.PROVIDERS and r["status"] == "ok"]
    assert all(row["us"] > 0 and row["ratio"] > 0 for row in measured)
    whole = [r for r in measured if r["saved_bytes"] is not None and r["provider"] != "frozen_again"]
    assert whole
    assert all(r["peak_mib"] is not None for r in whole)
    assert file.with_suffix(".md").read_text() == of.tables(rows)


@pytest.mark.parametrize("of", [experts, serving, step], ids=["experts", "serving", "step"])
def test_committed_tables_are_of_the_committed_rows(of):
    file = RESULTS / "cpu" / f"{of.__name__.rpartition('.')[2]}.csv"
    rows = schema.read_rows(file)
    assert file.with_suffix(".md").read_text() == of.tables(rows)
    assert {row["modified"] for row in rows} == {"False"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_of_a_step_are_on_every_linear_and_learn_from_the_first_pass():
    case = step.grid("smoke")[0]
    for name in step.PROVIDERS:
        built = step.Built(name, case)
        gradients = built.step()
        assert len(gradients) == 1 + len(built.trained)
        assert all(g.abs().max() > 0 for g in gradients), name
        adapted = [n for n, m in built.model.named_modules() if n.endswith("_proj") and len(list(m.parameters())) > 1]
        assert len(adapted) == (0 if name.startswith(("frozen", "mos")) else 7 * case.layers)
    assert [t.num_layers for t in mos_ext.parameter_report(step.mos(case)).types] == [case.layers] * 7


# ------------------------------------------------------------------------------------------------ serving


def test_every_line_of_serving(tmp_path):
    file = tmp_path / "serving.csv"
    assert serving.main([str(file), "--grid", "smoke"]) == 0
    rows = schema.read_rows(file)
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert {row["mode"] for row in rows} == {"memory", "load", "thousands", "generate", "prefill", "decode"}
    for row in rows:
        assert row["mode"] == "memory" or row["us"] > 0
    of_models = {row["provider"] for row in rows if row["mode"] == "generate"}
    assert of_models == set(serving.LABELS)
    decode = {(r["case"], r["dtype"], r["provider"]): r for r in rows if r["mode"] == "decode"}
    for used in (1, 2, 4, 6):  # as many sequences as use 6 of a bank's 8
        for provider in ("mos", "mos_same", "peft", "loop"):
            row = decode["6 x 1", "bfloat16", serving.label(provider, used)]
            assert row["error"] < 0.06
    assert ("6 x 1", "float32", "mos_same, 6 adapters") not in decode
    text = file.with_suffix(".md").read_text()
    assert text == serving.tables(rows)
    for line in ("| decode 6 x 1 | 64, bfloat16 | 6 |", "| lora r=16 | 507,904 | 8.00 |", "| MoS alone (`mos_ext"):
        assert line in text
    assert "MoS alone / PEFT LoRA alone, Llama, width 32, generate 1 x 3" in text


def test_serving_finds_mistaken_and_forgotten_adapters():
    served = serving.Served((32, 48), torch.bfloat16, (2,), 2)
    x = torch.randn(4, 32).bfloat16()
    with served.providers(x) as found:
        y = found["mos, 2 adapters"][0]()
    assert serving.close(y, served.exact(x, 2))["status"] == "ok"
    for wrong in (served.exact(x, 1), served.exact(x, 0), served.exact(x.flip(0), 2)):
        assert serving.close(y, wrong)["status"] == "wrong"


def test_goals_of_serving():
    def row(mode, provider, us, **columns):
        empty = dict.fromkeys(("model", "in", "out", "dtype", "case"))
        return {**empty, "mode": mode, "provider": provider, "us": us, "ratio": us / 100.0, **columns}

    linear = {"in": 1024, "out": 1024, "dtype": "float32", "case": "64 x 1"}
    model = {"model": "Llama", "dtype": "float32", "case": "1 x 24"}
    measured = {"frozen": 100.0, "mos, 1 adapter": 120.0, "mos, 64 adapters": 150.0, "peft, 64 adapters": 720.0}
    layers = [row("decode", name, us, **linear) for name, us in measured.items()]
    models = [row("generate", "adapt", 104.0, **model), row("generate", "peft", 105.0, **model)]
    found = serving.goals([*layers, *models, row("load", "load", 51e3, model="7B")])
    assert [(value, met) for _, value, _, met in found] == [
        ("1.25", "met"),
        ("4.80", "missed"),
        ("0.99", "met"),
        ("51.00", "missed"),
    ]


# ------------------------------------------------------------------------------------------------ a server


def test_the_committed_table_of_a_server_is_of_its_rows():
    file = RESULTS / "cpu" / "server.csv"
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert file.with_suffix(".md").read_text() == server.tables(rows)
    assert {row["modified"] for row in rows} == {"False"}
    assert {(row["wrong"], row["lost"]) for row in rows} == {("0", "0")}


@pytest.mark.filterwarnings("ignore")  # of libraries of the web about each other
def test_a_server_under_load(tmp_path):
    file = tmp_path / "server.csv"
    assert server.main([str(file), "--grid", "smoke"]) == 0
    with file.open(newline="") as stream:
        base, mixed, changes = csv.DictReader(stream)
    assert [row["phase"] for row in (base, mixed, changes)] == list(server.PHASES)
    for row in (base, mixed):
        assert row["right"] == row["requests"] == "28"
    assert (changes["right"], changes["left"]) == ("24", "4")
    assert int(changes["evictions"]) > 0 < int(changes["refused"])
    assert file.with_suffix(".md").read_text().count("\n") == 5


@pytest.mark.filterwarnings("ignore")
def test_a_server_that_answers_wrongly_is_found(tmp_path, monkeypatch):
    """One that gives everybody the base."""
    monkeypatch.setattr(server, "PHASES", ("mixed",))
    monkeypatch.setattr(server.AdapterBank, "route", lambda bank, model, names: contextlib.nullcontext())
    assert server.main([str(tmp_path / "server.csv"), "--grid", "smoke"]) == 1
