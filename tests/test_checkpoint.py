"""Adapter files: round trips, exports that real PEFT loads, and files that must be refused whole."""

import json
import os
import warnings

import pytest
import torch
from models import BUILDERS, gpt2, inputs, llama, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mos_ext
from mos_ext import MoSConfig

SMALL = MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=1, alpha=10)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_round_trip(name, tmp_path):
    model, batch = randomize(mos_ext.adapt(BUILDERS[name](), SMALL)), inputs(name)
    mos_ext.save_adapter(model, tmp_path / "a")
    loaded = BUILDERS[name]()
    assert mos_ext.load_adapter(loaded, tmp_path / "a") is loaded
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert all(p.requires_grad == n.startswith("mos_pools.") for n, p in loaded.named_parameters())
    for ours, theirs in zip(model.mos_pools.pools, loaded.mos_pools.pools, strict=True):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype


def test_tables_come_from_the_file_not_from_the_generator(tmp_path, monkeypatch):
    model, batch = randomize(mos_ext.adapt(llama(), SMALL)), inputs("llama")
    mos_ext.save_adapter(model, tmp_path)
    monkeypatch.setattr("mos_ext.routing._keys", lambda name, count: pytest.fail("the generator was asked"))
    assert torch.equal(logits(mos_ext.load_adapter(llama(), tmp_path), batch), logits(model, batch))


def test_each_pool_once_and_small_tables(tmp_path):
    for layers, integer in ((4, torch.uint8), (200, torch.int16)):
        model = mos_ext.adapt(llama(layers, hidden_size=8, intermediate_size=8, num_attention_heads=2), SMALL)
        mos_ext.save_adapter(model, tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        assert (
            sum(t.numel() for n, t in tensors.items() if n.endswith((".a", ".b")))
            == mos_ext.parameter_report(model).trainable
        )
        assert {t.dtype for n, t in tensors.items() if ".index_" in n} == {integer}
        assert len(tensors) == 4 * 7


def test_index_share_of_the_file(tmp_path):
    """LLaMA-2 7B shapes at e=8, r=16, l=4 store 28,672 entries in 2 bytes beside 20.0 M floats: less than 0.6% of the file."""
    entries, pool_bytes = 28_672, 19_988_480 * 4
    assert 2 * entries / (2 * entries + pool_bytes) < 0.006


def test_pool_dtype_on_disk(tmp_path):
    model = randomize(mos_ext.adapt(llama(), SMALL))
    mos_ext.save_adapter(model, tmp_path / "full")
    mos_ext.save_adapter(model, tmp_path / "half", dtype=torch.bfloat16)
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.7 * (tmp_path / "full" / WEIGHTS).stat().st_size
    loaded = mos_ext.load_adapter(llama(), tmp_path / "half")
    for ours, theirs in zip(model.mos_pools.pools, loaded.mos_pools.pools, strict=True):
        assert theirs.a.dtype == torch.float32
        assert torch.equal(theirs.a, ours.a.bfloat16().float())
    with pytest.raises(TypeError, match="dtype must be one of"):
        mos_ext.save_adapter(model, tmp_path, dtype=torch.int8)


def test_merged_models_save_the_same(tmp_path):
    model = randomize(mos_ext.adapt(llama(), SMALL))
    mos_ext.save_adapter(model, tmp_path / "a")
    mos_ext.save_adapter(mos_ext.merge(model), tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


# ------------------------------------------------------------------------------------------------ refused files


@pytest.fixture
def saved(tmp_path):
    mos_ext.save_adapter(randomize(mos_ext.adapt(llama(), SMALL)), tmp_path)
    return tmp_path


def refused(folder, message, model=None, error=ValueError):
    """load_adapter raises and the model is untouched."""
    model = model or llama()
    names = [n for n, _ in model.named_modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        mos_ext.load_adapter(model, folder)
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def edit(folder, change):
    """Changes tensors, configuration and header consistently in both files."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()["mos_ext"])
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    change(tensors, config, header)
    save_file(tensors, folder / WEIGHTS, {"mos_ext": json.dumps({**header, "adapter_config": config})})
    (folder / CONFIG).write_text(json.dumps(config))


Q = "base_model.mos_model_layers_self_attn_q_proj_64_64"


def test_missing_files(saved):
    (saved / CONFIG).unlink()
    refused(saved, "path must hold adapter_config.json", error=FileNotFoundError)
    refused(saved / "nowhere", "path must hold adapter_model.safetensors", error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(saved, keep):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:keep])
    refused(saved, "adapter_model.safetensors must be a complete safetensors file, got")


def test_not_json(saved):
    (saved / CONFIG).write_text("{")
    refused(saved, "adapter_config.json must be JSON, got")


def test_deeply_nested_json(saved):
    (saved / CONFIG).write_text("[" * 100_000)
    refused(saved, "adapter_config.json must be JSON, got")


def test_a_broken_header(saved):
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors, saved / WEIGHTS, {"mos_ext": "{"})
    refused(saved, "must come from the same save")


def test_another_format(saved):
    (saved / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    refused(saved, "adapter_config.json must describe a MoS adapter, got a LORA adapter")


def test_another_version(saved):
    edit(saved, lambda tensors, config, header: header.update(format_version=2))
    refused(saved, "must have format_version 1, got 2")


def test_files_of_two_saves(saved, tmp_path):
    mos_ext.save_adapter(
        mos_ext.adapt(llama(), MoSConfig(r=5, equivalent_rank=3, shards_per_vector=2)), tmp_path / "other"
    )
    os.replace(tmp_path / "other" / CONFIG, saved / CONFIG)
    refused(saved, "must come from the same save as adapter_config.json beside it")


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (lambda: llama(3), r"q_proj\[64->64\] with 4 modules where this model has 3"),
        (lambda: llama(5), r"q_proj\[64->64\] with 4 modules where this model has 5"),
        (lambda: llama(hidden_size=32), r"a LlamaForCausalLM, got one that differs in model\.layers.*\[32->"),
        (gpt2, "a GPT2LMHeadModel, got one that differs in"),
        (lambda: torch.nn.Sequential(torch.nn.ReLU()), "a Sequential, got: target_modules must match"),
    ],
)
def test_another_model(saved, model, difference):
    refused(saved, difference, model=model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c, h: c.update(r=0), "must hold a valid MoS configuration, got r must be at least 1"),
        (
            lambda t, c, h: c.pop("routing"),
            r"got an MoSConfig must have exactly its own fields, got unknown \[\] and missing \['routing'\]",
        ),
        (lambda t, c, h: c.update(bias="all"), "got bias must be 'none', got 'all': load this adapter with PEFT"),
        (lambda t, c, h: c.update(private_rank=2), "index_a must use public shards in"),
        (
            lambda t, c, h: c.update(pair_dissociation=False),
            "index_b must equal index_a when pair_dissociation is False",
        ),
        (
            lambda t, c, h: c.update(r=5),
            r"index_a must have the shape \(4, 5, 2\) of its configuration, got \(4, 4, 2\)",
        ),
        (lambda t, c, h: h.pop("linear_types"), "must hold a valid MoS configuration, got 'linear_types'"),
        (lambda t, c, h: t.pop(f"{Q}.a"), "must hold the tensors of its configuration, got a difference in"),
        (lambda t, c, h: t.update(extra=torch.zeros(1)), r"got a difference in \['extra'\]"),
        (lambda t, c, h: t.pop(f"{Q}.index_b"), r"must hold an integer tensor index_b of model.*, got none"),
        (
            lambda t, c, h: t.update({f"{Q}.index_b": t[f"{Q}.index_b"].float()}),
            "must hold an integer tensor .*, got torch.float32",
        ),
        (
            lambda t, c, h: t[f"{Q}.index_a"].view(-1).__setitem__(0, 200),
            r"index_a must use public shards in \[0, 16\), got \d+ to 200",
        ),
        (
            lambda t, c, h: t.update({f"{Q}.index_a": t[f"{Q}.index_a"].long() + 2**32}),
            r"index_a must use public shards in \[0, 16\)",
        ),
        (
            lambda t, c, h: t.update({f"{Q}.index_a": t[f"{Q}.index_a"].to(torch.complex64)}),
            "must hold an integer tensor .*, got torch.complex64",
        ),
        (
            lambda t, c, h: t[f"{Q}.a"].view(-1)[:1].fill_(float("nan")),
            r"proj_64_64\.a must be finite in torch.float32, got inf or NaN",
        ),
        (
            lambda t, c, h: t.update({f"{Q}.a": t[f"{Q}.a"].double() * 1e300}),
            r"proj_64_64\.a must be finite in torch.float32, got inf or NaN",
        ),
        (lambda t, c, h: h["linear_types"].append(h["linear_types"][0]), "got a linear type that occurs twice"),
        (
            lambda t, c, h: c.update(alpha=10**400),
            "must hold a valid MoS configuration, got alpha must be finite",
        ),
        (lambda t, c, h: t[f"{Q}.index_a"][0, 0].fill_(1), "index_a must not use a public shard twice in one layer"),
        (
            lambda t, c, h: t.update({f"{Q}.b": t[f"{Q}.b"][1:].clone()}),
            r"proj_64_64\.b as floats of shape \(24, 32\), got torch.float32 \(23, 32\)",
        ),
        (
            lambda t, c, h: t.update({f"{Q}.b": t[f"{Q}.b"].int()}),
            r"proj_64_64\.b as floats of shape \(24, 32\), got torch.int32",
        ),
    ],
)
def test_contradictions(saved, change, message):
    edit(saved, change)
    refused(saved, message)


def test_loading_onto_an_adapted_model(saved):
    model = mos_ext.adapt(llama(), SMALL)
    with pytest.raises(ValueError, match="model must not be adapted yet"):
        mos_ext.load_adapter(model, saved)


# ------------------------------------------------------------------------------------------------ whole or not at all


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_failed_save_keeps_the_old_files(saved, monkeypatch):
    before = contents(saved)
    model = randomize(mos_ext.adapt(llama(), SMALL), std=0.5)
    original = os.fsync

    def disk_full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        mos_ext.save_adapter(model, saved)
    assert contents(saved) == before  # and no temporary file beside them
    monkeypatch.setattr(os, "fsync", original)
    mos_ext.save_adapter(model, saved)
    assert set(contents(saved)) == set(before)
    assert contents(saved)[WEIGHTS] != before[WEIGHTS]


def test_an_interrupted_replace_is_noticed(saved, monkeypatch):
    """Killed between the two replacements: new weights beside an old configuration that differs."""
    model = randomize(mos_ext.adapt(llama(), MoSConfig(r=5, equivalent_rank=3, shards_per_vector=2)))
    original, done = os.replace, []

    def once(a, b):
        if done:
            raise KeyboardInterrupt
        done.append(b)
        original(a, b)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        mos_ext.save_adapter(model, saved)
    monkeypatch.undo()
    refused(saved, "must come from the same save")


def test_files_are_as_readable_as_the_umask_says(saved):
    mask = os.umask(0)
    os.umask(mask)
    assert {(saved / name).stat().st_mode & 0o777 for name in (WEIGHTS, CONFIG)} == {0o666 & ~mask}


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="path must be a directory, got the file"):
        mos_ext.save_adapter(mos_ext.adapt(llama(), SMALL), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_meta_models(saved, tmp_path):
    with torch.device("meta"):
        model, base = mos_ext.adapt(llama(), SMALL), llama()
    for write in (mos_ext.save_adapter, mos_ext.export_lora):
        with pytest.raises(ValueError, match="model must have its values in memory, got .* on the meta device"):
            write(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(
        ValueError, match="base_model must have its values in memory, got parameters on the meta device"
    ):
        mos_ext.load_adapter(base, saved)


def test_values_that_the_file_s_dtype_cannot_hold(tmp_path):
    model = mos_ext.adapt(llama(), SMALL)
    with torch.no_grad():
        model.mos_pools.pools[0].b.fill_(1e6)
    for write in (mos_ext.save_adapter, mos_ext.export_lora):
        with pytest.raises(ValueError, match="must be finite in torch.float16, got inf or NaN"):
            write(model, tmp_path / "a", dtype=torch.float16)
    assert not (tmp_path / "a").exists()


def test_a_directory_in_the_way(saved):
    (saved / CONFIG).unlink()
    (saved / CONFIG).mkdir()
    before = (saved / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="adapter_config.json must be a file, got a directory"):
        mos_ext.save_adapter(randomize(mos_ext.adapt(llama(), SMALL), std=0.7), saved)
    assert (saved / WEIGHTS).read_bytes() == before


# ------------------------------------------------------------------------------------------------ export


def in_peft(base, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations
        return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("rank", [None, 8])
def test_exported_lora_in_real_peft(name, rank, tmp_path):
    """The same logits in float32 to 1e-5: only the order of sums differs."""
    model, batch = randomize(mos_ext.adapt(BUILDERS[name](), SMALL)), inputs(name)
    mos_ext.export_lora(model, tmp_path, rank=rank)
    lora = in_peft(BUILDERS[name](), tmp_path)
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(BUILDERS[name](), batch), logits(model, batch), rtol=1e-3, atol=1e-3)
    config = lora.peft_config["default"]
    assert config.r == config.lora_alpha == (rank or 4)


def test_exported_lora_of_some_modules_and_in_half(tmp_path):
    config = MoSConfig(
        r=2,
        equivalent_rank=2,
        shards_per_vector=2,
        target_modules=["model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj"],
    )
    model, batch = randomize(mos_ext.adapt(llama(), config)), inputs("llama")
    mos_ext.export_lora(model, tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == list(config.target_modules)
    lora = in_peft(llama(), tmp_path)
    # bf16 factors, eps 2^-8, on a perturbation of the logits of about 0.1
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-2, atol=2e-3)


def test_bad_exports(tmp_path):
    model = mos_ext.adapt(llama(), SMALL)
    with pytest.raises(ValueError, match="rank must be at least r=4, got 2"):
        mos_ext.export_lora(model, tmp_path / "a", rank=2)
    with pytest.raises(TypeError, match="rank must be an integer, got '8'"):
        mos_ext.export_lora(model, tmp_path / "a", rank="8")
    for dtype in (torch.long, "bfloat16"):
        with pytest.raises(TypeError, match="dtype must be one of torch.float64, .* or None, got"):
            mos_ext.export_lora(model, tmp_path / "a", dtype=dtype)
    with pytest.raises(ValueError, match="model must be adapted"):
        mos_ext.export_lora(llama(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
