"""benchmarks/quality on a tiny model: methods are what they are called, runs are repeatable and never mixed, reports complete."""

import csv
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mos_ext
from mos_ext.routing import draw_tables

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.quality import __main__ as program  # noqa: E402
from benchmarks.quality import demo, experts, report, train  # noqa: E402
from benchmarks.quality import methods as methods_module  # noqa: E402
from benchmarks.quality.data import SHARES, ngrams, split_topics  # noqa: E402
from benchmarks.quality.settings import EXPERTS, Base, Settings  # noqa: E402

BASE = Base(300, 32, 64, 3, 2, length=16, characters=30_000, steps=2, batch=2, eval_blocks=2)
TINY = Settings(BASE, steps=2, batch=2, seeds=2, sweep_seeds=1, r=3, lr=1e-2)
TINY = replace(TINY, l_sweep=(1, 2, 4), r_sweep=(2, 3, 4), routing_sweep=(2, 3))
REAL = methods_module.methods(Settings())
REAL_EXPERTS = methods_module.methods(EXPERTS)
TUNING = [ROOT / "benchmarks" / "quality" / name for name in ("tuning.csv", "tuning-experts.csv")]
TINY_EXPERTS = replace(EXPERTS, base=replace(BASE, intermediate=16, experts=4, choices=2), steps=2, batch=2, r=2, l=2)
TINY_EXPERTS = replace(TINY_EXPERTS, seeds=2, fractions=(1 / 2,), lr=1e-2)


# ------------------------------------------------------------------------------------------------ methods


@pytest.fixture(scope="module")
def models():
    """Of the real size, one per method."""
    torch.manual_seed(0)
    with train.quiet_threads(1):  # transformers' and PEFT's warnings are not this suite's
        return {name: methods_module.put_on(train.new_model(Base()), m, Settings(), 0) for name, m in REAL.items()}


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [n for n, m in REAL.items() if "main" in m.groups])
def test_budgets(models, name):
    budget = trainable(models["lora-r2"])
    assert budget == Settings().budget
    if name == "lora-r16":
        assert trainable(models[name]) == 8 * budget
    elif REAL[name].kind in ("vera", "vblora"):
        assert trainable(models[name]) == pytest.approx(budget, rel=0.01)
    else:
        assert trainable(models[name]) == budget


@pytest.mark.parametrize("group", ["l", "r", "routing", "p"])
def test_sweeps_vary_one_thing_at_one_budget(models, group):
    members = [m for m in REAL.values() if group in m.groups and m.kind == "mos"]
    assert len({trainable(models[m.name]) for m in members}) == 1
    varying = {k for k in members[0].options if len({m.options[k] for m in members}) > 1}
    option = {"l": {"shards_per_vector"}, "r": {"r"}, "routing": {"r", "routing"}, "p": {"private_rank"}}
    assert varying == option[group]
    assert len({tuple(m.options.items()) for m in members}) == len(members) > 2


def tables(name, seed=0):
    config = mos_ext.MoSConfig(**REAL[name].options, seed=seed)
    layers = Base().layers
    found = draw_tables(config, "q_proj", [config.r] * layers)
    return config, found.a.reshape(layers, -1), found.b.reshape(layers, -1), config.num_public_shards(layers)


def test_pure_sharing_gives_every_layer_the_whole_pool():
    config, a, b, public = tables("pure")
    assert (config.r, config.shards_per_vector) == (24, 1)
    # Identity tables, but for the order of the ranks, to which a product is indifferent.
    assert (np.sort(a) == np.arange(public)).all()
    assert (a == b).all()


def test_pure_sharing_is_one_product_for_all_layers(models):
    layers = [m for n, m in models["pure"].named_modules() if n.endswith("q_proj")]
    plain = [m for n, m in train.new_model(Base()).named_modules() if n.endswith("q_proj")]
    for layer, linear in zip(layers, plain, strict=True):
        linear.load_state_dict({"weight": layer.weight})
    pool = layers[0].pool
    with torch.no_grad():
        for p in pool.parameters():
            p.copy_(torch.randn_like(p))
        x = torch.randn(3, 96)
        results = [layer(x) - linear(x) for layer, linear in zip(layers, plain, strict=True)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


def test_the_ablations_each_lack_their_strategy():
    config, a, b, public = tables("mos")
    assert (a != b).any()
    assert (a[:, -config.shards_per_vector :] >= public).all()
    assert all(len(set(row) & set(range(public))) < public for row in a)

    _, a, b, _ = tables("mos-paired")
    assert (a == b).all()
    config, a, _, public = tables("mos-public")
    assert config.private_rank == 0
    assert (a < public).all()
    assert tables("mos-whole")[0].shards_per_vector == 1
    config, a, b, public = tables("mos-all")
    for side in (a, b):
        assert all(set(range(public)) <= set(row) for row in side)
    assert (a != b).any()
    _, a, b, public = tables("subset")
    assert (a == b).all()
    assert a.max() < public
    assert len({frozenset(row) for row in a}) > 1


def test_balanced_is_balanced():
    for name, level in (("mos-r2-balanced", True), ("mos-r2", False)):
        _, a, _, public = tables(name)
        counts = np.bincount(a[a < public], minlength=public)
        assert (np.ptp(counts) <= 1) == level


def test_vblora_trains_its_logits_faster(models):
    groups = methods_module.parameter_groups(models["vblora"], 0.5)
    assert [g["lr"] for g in groups] == [0.5, 5.0]
    assert sum(p.numel() for g in groups for p in g["params"]) == trainable(models["vblora"])
    assert [g["lr"] for g in methods_module.parameter_groups(models["mos"], 0.5)] == [0.5]


def test_rates_are_those_of_the_committed_tuning():
    rows = []
    for file in TUNING:
        with file.open(newline="") as stream:
            rows += csv.DictReader(stream)
    assert {r["split"] for r in rows} == {"validation"}
    assert not {int(r["seed"]) for r in rows} & set(range(Settings().seeds))
    best = {}
    for row in sorted(rows, key=lambda r: -float(r["loss"])):
        best[row["family"]] = float(row["lr"])
    assert best == methods_module.RATES
    assert {m.family for m in (*REAL.values(), *REAL_EXPERTS.values())} == set(best)


@pytest.mark.parametrize(("name", "share"), [("lora-r1", 1), ("shared-outer", 1), ("mos", 1), ("mos-e0.125", 1 / 8)])
def test_budgets_of_experts(name, share):
    torch.manual_seed(0)
    with train.quiet_threads(1):
        model = methods_module.put_on(train.new_model(EXPERTS.base), REAL_EXPERTS[name], EXPERTS, 0)
    assert trainable(model) == share * EXPERTS.budget == share * 16 * 6 * (96 + 112 + 56 + 96)


def test_shared_outer_is_one_matrix_for_the_experts_of_a_layer_towards_the_residual_stream():
    torch.manual_seed(0)
    method = REAL_EXPERTS["shared-outer"]
    model = methods_module.put_on(train.new_model(EXPERTS.base), method, EXPERTS, 0)
    for pool in model.mos_pools.pools:
        with torch.no_grad():
            pool.shards_b.normal_()
        outer = 0 if "gate_up" in pool.stream else 1
        seen = [pool.factors(layer) for layer in range(pool.num_layers)]
        for factors in seen:
            assert len(factors[outer].unique(dim=0)) == 1
            assert len(factors[1 - outer].unique(dim=0)) == EXPERTS.base.experts
        assert len(torch.cat([factors[outer] for factors in seen]).unique(dim=0)) == EXPERTS.base.layers


# ------------------------------------------------------------------------------------------------ data


def test_no_text_is_in_two_splits():
    from pydoc_data.topics import topics

    splits = split_topics(topics)
    grams = {name: set().union(*map(ngrams, paragraphs)) for name, paragraphs in splits.items()}
    assert set(grams) == {"training", *SHARES}
    assert all(len(g) > 1000 for g in grams.values())
    for a, b in itertools.combinations(grams.values(), 2):
        assert not a & b


def test_repeated_paragraphs_are_dropped_from_later_splits():
    same = "one two three four five six seven eight nine ten eleven"
    topics = {f"topic {i}": f"{same}\n\nits own paragraph, number {i}" for i in range(40)}
    splits = split_topics(topics)
    assert all(splits.values())
    assert [same in paragraphs for paragraphs in splits.values()] == [True, False, False]
    assert splits["training"].count(same) == 1


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with everything in it."""
    out = tmp_path_factory.mktemp("quality") / "out"
    assert program.main([str(out), "--workers", "0"], TINY) == 0
    return out


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A copy to go on with; the report is not drawn again."""
    monkeypatch.setattr(program, "write_report", lambda *_: None)
    return shutil.copytree(finished, tmp_path / "out")


def rows_of(out):
    with (out / "runs.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def lasting(row):
    """What must not depend on when a row was made."""
    return {k: v for k, v in row.items() if k not in ("seconds", "date", "commit", "modified")}


def test_a_row_for_every_run(finished):
    rows = rows_of(finished)
    known = methods_module.methods(TINY)
    expected = {(n, s) for n, m in known.items() for s in range(2 if "main" in m.groups else 1)}
    assert {(r["method"], int(r["seed"])) for r in rows} == expected
    assert len(rows) == len(expected)
    assert all(float(r["loss"]) != float(r["base_loss"]) for r in rows)
    assert all(r["commit"] and r["torch"] and r["date"] and r["threads"] == "1" for r in rows)
    assert not list(finished.rglob("*.part"))


def test_every_run_is_there_in_pefts_structure_too(finished):
    rows = {f"{r['method']}-seed{r['seed']}": r for r in rows_of(finished)}
    there = {file.stem: json.loads(file.read_text()) for file in (finished / "results").iterdir()}
    assert there.keys() == rows.keys()
    for name, content in there.items():
        assert content["train_info"]["num_trainable_params"] == int(rows[name]["trainable"])
        assert content["train_info"]["metrics"][-1]["test loss"] == float(rows[name]["loss"])
        assert content["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == float(rows[name]["lr"])


def test_a_finished_run_is_never_repeated(out, monkeypatch):
    before = rows_of(out)
    monkeypatch.setattr(train, "run_job", lambda *_: pytest.fail("repeated"))
    assert program.main([str(out), "--workers", "0"], TINY) == 0
    assert rows_of(out) == before


def test_what_is_missing_is_made_again_and_the_same(out, monkeypatch):
    before, made = rows_of(out), []
    (out / "runs" / "mos-seed1.json").unlink()
    (out / "runs" / "vblora-seed0.json").write_text('{"half a')
    run_job = train.run_job
    monkeypatch.setattr(train, "run_job", lambda s, job, base: made.append(job.name) or run_job(s, job, base))
    assert program.main([str(out), "--workers", "0"], TINY) == 0
    assert sorted(made) == ["mos-seed1", "vblora-seed0"]
    assert list(map(lasting, rows_of(out))) == list(map(lasting, before))


def test_more_seeds_are_added_to_what_is_there(out, monkeypatch):
    made, run_job = [], train.run_job
    monkeypatch.setattr(train, "run_job", lambda s, job, base: made.append(job.name) or run_job(s, job, base))
    jobs = [j for j in program.jobs_of(replace(TINY, seeds=3)) if j.method.name == "mos"]
    rows = train.run_all(replace(TINY, seeds=3), jobs, out, "runs", 0)
    assert made == ["mos-seed2"]
    assert len({r["loss"] for r in rows}) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (replace(TINY, steps=3), "steps: 2 there, 3 now"),
        (replace(TINY, lr=2e-2), "lr: 0.01 there, 0.02 now"),
        (replace(TINY, base=replace(BASE, steps=3)), "steps: 2 there, 3 now"),
    ],
)
def test_other_settings_are_not_mixed(out, changed, message, capsys):
    before = (out / "runs.csv").read_bytes()
    assert program.main([str(out), "--workers", "0"], changed) == 2
    assert message in capsys.readouterr().err
    assert (out / "runs.csv").read_bytes() == before


def test_another_base_model_is_not_mixed_in(out, capsys):
    content = torch.load(out / "base.pt")
    torch.save({**content, "digest": "another"}, out / "base.pt")
    assert program.main([str(out), "--workers", "0"], TINY) == 2
    assert "base: " in capsys.readouterr().err


def test_a_worker_process_computes_the_same(out):
    """What two workers would: each starts like this one."""
    before = json.loads((out / "runs" / "mos-seed0.json").read_text())
    (out / "runs" / "mos-seed0.json").unlink()
    jobs = [j for j in program.jobs_of(TINY) if j.name == "mos-seed0"]
    (row,) = train.run_all(TINY, jobs, out, "runs", 1)
    assert lasting(row) == lasting(before["row"])


def test_methods_see_the_same_batches_of_a_seed():
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.ones(())), []

        def forward(self, input_ids, labels):
            self.seen.append(input_ids)
            return type("Output", (), {"loss": self.weight * torch.rand(())})

    data, seen = torch.arange(400).reshape(100, 4), []
    for seed in (0, 0, 1):
        model = Recorder()
        torch.rand(len(seen))  # the global generator, which initial values use, is not that of the batches
        train.optimise(model, data, [{"params": [model.weight], "lr": 0.1}], steps=3, batch=4, seed=seed)
        seen.append(torch.stack(model.seen))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_tuning_never_sees_the_test_split(out, monkeypatch):
    monkeypatch.setattr(program, "GRIDS", {"mos-r3": (1e-3, 1e-2)})
    content = torch.load(out / "base.pt")
    content["blocks"]["test"] = torch.full_like(content["blocks"]["test"], 10**6)  # no such token
    torch.save(content, out / "base.pt")
    assert program.main([str(out), "--tune", "--workers", "0"], TINY) == 0
    with (out / "tuning.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(float(r["lr"]), r["split"]) for r in rows] == [(1e-3, "validation"), (1e-2, "validation")]


# ------------------------------------------------------------------------------------------------ the report


def test_the_report_has_every_method_and_plot(finished):
    text = (finished / "report.md").read_text()
    for method in methods_module.methods(TINY).values():
        if "main" in method.groups:
            assert f"| {method.label} |" in text
    for claim in report.claims(TINY):
        assert f"| {claim.text} |" in text
    row = rows_of(finished)[0]
    for column in ("commit", "cpu", "torch"):
        assert row[column] in text
    for name in ("loss", "sweeps", "shards"):
        assert f"]({name}.png)" in text
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "<" not in text.replace("<->", "")


def test_experts_from_the_base_model_to_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "EXPERTS", TINY_EXPERTS)
    assert program.main([str(tmp_path), "--experts", "--workers", "0"]) == 0
    rows = rows_of(tmp_path)
    assert {(r["method"], r["seed"]) for r in rows} == {
        (n, s) for n in methods_module.methods(TINY_EXPERTS) for s in "01"
    }
    text = (tmp_path / "report.md").read_text()
    for method in methods_module.methods(TINY_EXPERTS).values():
        assert f"| {method.label} |" in text
    for question in experts.questions(TINY_EXPERTS):
        assert f"| {question.text} |" in text
    assert "python -m benchmarks.quality OUT --experts" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo(tmp_path, capsys):
    assert demo.main([str(tmp_path), "--workers", "0"], TINY) == 0
    printed = capsys.readouterr().out
    for name in demo.names(TINY):
        assert methods_module.methods(TINY)[name].label in printed
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(file.read_text())["row"] for file in (tmp_path / "runs").iterdir()]
    assert sorted((r["method"], r["seed"]) for r in rows) == sorted((n, s) for n in demo.names(TINY) for s in range(3))


def test_what_the_demo_says_follows_the_numbers():
    losses = {"lora-r2": (2.1, 2.2, 2.3), "mos": (2.0, 2.11, 2.19), "lora-r16": (1.0, 1.0, 1.0)}
    rows = [
        {"method": name, "seed": seed, "loss": loss, "base_loss": 3.0, "trainable": 1, "lr": 1e-2}
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    shown, not_shown = demo.sentences(report.Results(TINY, rows))
    assert "MoS comes 45 % of the way from the frozen base to it, and LoRA r=2 40 %" in shown
    assert "MoS's loss is lower by 0.1000 ± 0.0058 (paired by seed; zero is outside the 95 % interval)" in shown
    assert not_shown.startswith("Not shown")
    for row in rows:
        row["loss"] += 0.3 * (row["method"] == "mos" and row["seed"] == 1)
    unclear, _ = demo.sentences(report.Results(TINY, rows))
    assert unclear.startswith("Seen, but not shown: ")
    assert "zero is inside the 95 % interval" in unclear


def test_answers_follow_the_numbers():
    losses = {"lora-r1": (2.0, 2.1, 1.9), "mos": (1.9, 2.01, 1.79), "shared-outer": (1.8, 2.2, 1.85)}
    losses |= {"mos-e0.5": (2.3, 2.41, 2.19), "lora-r8": (1.0, 1.0, 1.0)}
    rows = [
        {"method": name, "seed": seed, "loss": loss, "base_loss": 3.0, "trainable": 1, "lr": 1e-2}
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    said = [line.rsplit("|", 2)[1].strip() for line in experts.answers(report.Results(TINY_EXPERTS, rows))[2:]]
    assert said == ["lower", "not shown to differ", "not shown to differ", "higher", "higher"]


def invented(losses):
    """Rows in which each method's losses over the seeds are given, or else 2.0 with a little noise."""
    rows = []
    for i, name in enumerate(methods_module.methods(TINY)):
        for seed in range(4):
            given = losses.get(name)
            loss = given[seed] if given else 2.0 + 0.01 * ((i * 7 + seed * 5) % 11)
            rows.append({"method": name, "seed": seed, "loss": loss, "base_loss": 3.0, "trainable": 1, "lr": 1e-2})
    return report.Results(TINY, rows)


def test_verdicts_follow_the_numbers():
    results = invented(
        {
            "mos": [1.50, 1.60, 1.40, 1.55],
            "lora-r2": [1.61, 1.69, 1.51, 1.64],  # worse on every seed by 0.1
            "subset": [1.40, 1.51, 1.29, 1.45],  # better on every seed
            "pure": [1.45, 1.65, 1.35, 1.60],  # either
            "lora-r16": [1.00, 1.00, 1.00, 1.00],
        }
    )
    assert report.verdict(results.difference("lora-r2", "mos")) == "agrees"
    assert report.verdict(results.difference("subset", "mos")) == "disagrees"
    assert report.verdict(results.difference("pure", "mos")) == "not shown"
    assert results.difference("lora-r2", "mos").mean == pytest.approx(0.1)
    assert results.difference("lora-r2", "mos").error == pytest.approx(np.std([0.11, 0.09, 0.11, 0.09], ddof=1) / 2)
    assert results.gap("mos") == pytest.approx([0.75, 0.70, 0.80, 0.725])
    text = "\n".join(report.conclusions(results))
    assert "MoS beats LoRA" in text.split("opposite sign")[0]
    assert "Lowest mean loss at the budget: pure sharing + subset selection" in text


def test_a_single_seed_shows_nothing():
    assert not report.Difference(1.0, float("nan"), 1).clear


def test_unused_shards_agree_with_the_formula():
    """The paper's 10.9 % at LLaMA-2 7B, and none with a balanced draw."""
    draw = report.draws(Settings())[-1]
    assert draw.formula == pytest.approx(0.109, abs=5e-4)
    types = Base().types
    assert (draw.uses("random", 0, types) == 0).mean() == pytest.approx(draw.formula, abs=0.01)
    assert (draw.uses("balanced", 0, types) == 0).mean() == 0
    assert draw.uses("random", 0, types).shape == (14, 7 * 32 * 4)
    assert (draw.uses("random", 0, types).sum(1) == 32 * 15 * 4).all()
