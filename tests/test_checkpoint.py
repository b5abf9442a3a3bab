"""Adapter files: round trips, exports that real PEFT loads, and files that must be refused whole."""

import copy
import gc
import hashlib
import json
import os
import pickle
import shutil
import threading
import warnings
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import BUILDERS, gpt2, inputs, llama, randomize
from safetensors.torch import load_file, save_file

import mos_ext
from mos_ext import MoSConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft
import mos_ext.integrations.peft as mos_peft
from mos_ext.files import tensor_digest, weights
from mos_ext.routing import IndexTables, _keys, draw_tables, table_digest

# PEFT asks transformers whether a model checkpoints under a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

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


def by_hand(pools):
    """Gives pools tables that are not their configuration's."""
    for pool in pools:
        other = draw_tables(replace(pool.config, seed=77), pool.stream, pool.ranks)
        pool.set_tables(IndexTables(other.a, other.b))


def holds_complex():
    try:
        return bool(safetensors.torch.save({"x": torch.zeros(1, dtype=torch.complex64)}))
    except KeyError:
        return False


def test_tables_are_derived_not_stored(tmp_path):
    model = mos_ext.adapt(llama(), SMALL)
    mos_ext.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    digest = json.loads((tmp_path / CONFIG).read_text())["table_digest"]
    assert digest == table_digest(model.mos_pools.tables)
    assert tensors.pop(f"base_model.index_tables.{digest.replace(':', '-')}").numel() == 0
    assert {name.rpartition(".")[2] for name in tensors} == {"shards_a", "shards_b"}
    assert len(tensors) == 2 * 7
    assert sum(t.numel() for t in tensors.values()) == mos_ext.parameter_report(model).trainable


@pytest.mark.parametrize(("layers", "integer"), [(4, torch.uint8), (200, torch.int16)])
def test_tables_given_by_hand_are_stored_and_small(layers, integer, tmp_path):
    def base():
        return llama(layers, hidden_size=8, intermediate_size=8, num_attention_heads=2)

    model, batch = randomize(mos_ext.adapt(base(), SMALL)), inputs("llama")
    drawn = logits(model, batch)
    by_hand(model.mos_pools.pools)
    assert not torch.allclose(logits(model, batch), drawn, atol=1e-3)
    mos_ext.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for n, t in tensors.items() if n.endswith(("index_a", "index_b"))} == {integer}
    assert len(tensors) == 4 * 7 + 1
    loaded = mos_ext.load_adapter(base(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert not any(pool.tables_are_drawn() for pool in loaded.mos_pools.pools)


def test_pools_of_another_private_rank_leave_the_tables_of_the_model(tmp_path):
    """The pools have the same shapes, so load_state_dict takes them; tables are the configuration's all the same."""
    model = mos_ext.adapt(llama(), SMALL)
    other = randomize(mos_ext.adapt(llama(), replace(SMALL, private_rank=2)))
    model.load_state_dict(other.state_dict())
    for pool in model.mos_pools.pools:
        want = draw_tables(SMALL, pool.stream, pool.ranks)
        assert torch.equal(pool.index_a, torch.from_numpy(want.a))
        assert torch.equal(pool.index_b, torch.from_numpy(want.b))
    mos_ext.save_adapter(model, tmp_path)
    batch = inputs("llama")
    assert torch.equal(logits(mos_ext.load_adapter(llama(), tmp_path), batch), logits(model, batch))


def test_pool_dtype_on_disk(tmp_path):
    model = randomize(mos_ext.adapt(llama(), SMALL))
    mos_ext.save_adapter(model, tmp_path / "full")
    mos_ext.save_adapter(model, tmp_path / "half", dtype=torch.bfloat16)
    assert (tmp_path / "half" / WEIGHTS).stat().st_size < 0.7 * (tmp_path / "full" / WEIGHTS).stat().st_size
    loaded = mos_ext.load_adapter(llama(), tmp_path / "half")
    for ours, theirs in zip(model.mos_pools.pools, loaded.mos_pools.pools, strict=True):
        assert theirs.shards_a.dtype == torch.float32
        assert torch.equal(theirs.shards_a, ours.shards_a.bfloat16().float())
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
    """Changes tensors and configuration, and what the latter says of the former unless that is what changes."""
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    before = config["tensor_digest"]
    change(tensors, config)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if config["tensor_digest"] == before:
        config["tensor_digest"] = tensor_digest((folder / WEIGHTS).read_bytes())
    (folder / CONFIG).write_text(json.dumps(config))


Q = "base_model.mos_model_layers_self_attn_q_proj_64_64"


def test_missing_files(saved):
    (saved / WEIGHTS).rename(saved / "elsewhere")
    refused(saved, "path must hold adapter_model.safetensors", error=FileNotFoundError)
    (saved / CONFIG).unlink()
    refused(saved, "path must hold adapter_config.json", error=FileNotFoundError)
    refused(saved / "nowhere", "path must hold adapter_config.json", error=FileNotFoundError)
    refused(saved / "elsewhere", "path must hold adapter_config.json", error=FileNotFoundError)  # that is a file


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            PermissionError(13, "Permission denied"),
            ValueError,
            r"must be a readable file, got \[Errno 13\] Permission denied",
        ),
        (
            OSError(116, "Stale file handle"),
            ValueError,
            r"must be a readable file, got \[Errno 116\] Stale file handle",
        ),
        (FileNotFoundError(2, "No such file"), FileNotFoundError, "path must hold"),
    ],
)
def test_files_that_cannot_be_read(saved, monkeypatch, name, error, raised, message):
    """Or that vanish between two looks at the directory."""
    read = Path.read_bytes

    def read_bytes(self):
        if self.name == name:
            raise error
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    refused(saved, message, error=raised)
    refused(saved, name, error=raised)


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


def test_another_format(saved):
    (saved / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    refused(saved, "adapter_config.json must describe a MoS adapter, got a LORA adapter")


def test_another_version(saved):
    edit(saved, lambda tensors, config: config.update(format_version=3))
    refused(saved, "must have format_version 2, got 3")
    edit(saved, lambda tensors, config: config.pop("format_version"))
    refused(saved, "must have format_version 2, got None")


def test_files_of_two_saves(saved, tmp_path):
    mos_ext.save_adapter(
        mos_ext.adapt(llama(), MoSConfig(r=5, equivalent_rank=3, shards_per_vector=2)), tmp_path / "other"
    )
    os.replace(tmp_path / "other" / CONFIG, saved / CONFIG)
    refused(saved, "must come from the same save as adapter_config.json beside it")


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (lambda: llama(3), r"q_proj\[64->64\] of 4 modules where this model has 3"),
        (lambda: llama(5), r"q_proj\[64->64\] of 4 modules where this model has 5"),
        (
            lambda: llama(hidden_size=32),
            "must be for this model, got an adapter without .*_32_32.* and with .*_64_64",
        ),
        (gpt2, "must be for this model, got an adapter without .*transformer_h.* and with .*model_layers"),
        (lambda: torch.nn.Sequential(torch.nn.ReLU()), "a Sequential, got: target_modules must match"),
    ],
)
def test_another_model(saved, model, difference):
    refused(saved, difference, model=model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: c.update(r=0), "must hold a valid MoS configuration, got r must be at least 1"),
        (
            lambda t, c: c.pop("routing"),
            r"got an MoSConfig must have exactly its own fields, got unknown \[\] and missing \['routing'\]",
        ),
        (lambda t, c: c.update(bias="all"), "got bias must be 'none', got 'all': load this adapter with PEFT"),
        (
            lambda t, c: c.update(private_rank=2),
            "table_digest must be that of the index tables that the configuration gives",
        ),
        (lambda t, c: c.update(pair_dissociation=False), "table_digest must be that of the index tables"),
        (
            lambda t, c: c.update(r=5),
            "table_digest must be that of the index tables .* made with other ranks, another seed",
        ),
        (lambda t, c: c.update(seed=1), "table_digest must be that of the index tables"),
        (lambda t, c: c.update(table_digest="2:abc"), "table_digest must be of generator 1, .* got '2:abc'"),
        (lambda t, c: c.update(table_digest=1), "table_digest must be of generator 1, .* got 1"),
        (lambda t, c: c.update(tensor_digest="0" * 64), "must come from the same save as adapter_config.json"),
        (
            lambda t, c: t.pop(f"{Q}.shards_a"),
            r"got an adapter without \['base_model.mos_.*q_proj_64_64.shards_a'\] and with \[\]",
        ),
        (
            lambda t, c: t.update(extra=torch.zeros(1)),
            r"must hold the tensors of its configuration, got also \['extra'\]",
        ),
        (
            lambda t, c: t[f"{Q}.shards_a"].view(-1)[:1].fill_(float("nan")),
            r"proj_64_64\.shards_a must be finite in torch.float32, got inf or NaN",
        ),
        (
            lambda t, c: t.update({f"{Q}.shards_a": t[f"{Q}.shards_a"].double() * 1e300}),
            r"proj_64_64\.shards_a must be finite in torch.float32, got inf or NaN",
        ),
        (
            lambda t, c: c.update(alpha=10**400),
            "must hold a valid MoS configuration, got alpha must be finite",
        ),
        (
            lambda t, c: t.update({f"{Q}.shards_b": t[f"{Q}.shards_b"][1:].clone()}),
            r"proj_64_64\.shards_b as floats of shape \(24, 32\), got torch.float32 \(23, 32\)",
        ),
        (
            lambda t, c: t.update({f"{Q}.shards_b": t[f"{Q}.shards_b"].int()}),
            r"proj_64_64\.shards_b as floats of shape \(24, 32\), got torch.int32",
        ),
        (lambda t, c: c.update(modules_to_save="norm"), "must have a list of names as modules_to_save, got 'norm'"),
        (lambda t, c: c.update(modules_to_save=["model.norm"]), r"got a difference in \['model.norm.weight'\]"),
        (
            lambda t, c: t.update({"base_model.model.model.norm.bias": torch.zeros(64)}),
            r"and be for this model, a LlamaForCausalLM; got a difference in \['model.norm.bias'\]",
        ),
        (
            lambda t, c: t.update({"base_model.model.model.norm.weight": torch.zeros(65)}),
            r"must hold model.norm.weight as in this model, torch.float32 \(64,\), got torch.float32 \(65,\)",
        ),
    ],
)
def test_contradictions(saved, change, message):
    edit(saved, change)
    refused(saved, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: c.update(private_rank=2), "index_a must use public shards in"),
        (
            lambda t, c: c.update(pair_dissociation=False),
            "index_b must equal index_a when pair_dissociation is False",
        ),
        (
            lambda t, c: c.update(r=5),
            r"index_a must have the shape \(4, 5, 2\) of its configuration, got \(4, 4, 2\)",
        ),
        (
            lambda t, c: t.pop(f"{Q}.index_b"),
            "index_b must be an integer tensor, like the table of the other side, got none",
        ),
        (
            lambda t, c: t.update({f"{Q}.index_b": t[f"{Q}.index_b"].float()}),
            "index_b must be an integer tensor, .* got torch.float32",
        ),
        pytest.param(
            lambda t, c: t.update({f"{Q}.index_a": t[f"{Q}.index_a"].to(torch.complex64)}),
            "index_a must be an integer tensor, .* got torch.complex64",
            marks=pytest.mark.skipif(
                not holds_complex(), reason="files with complex numbers, which this safetensors cannot write"
            ),
        ),
        (
            lambda t, c: t[f"{Q}.index_a"].view(-1).__setitem__(0, 200),
            r"index_a must use public shards in \[0, 16\), got \d+ to 200",
        ),
        (
            lambda t, c: t.update({f"{Q}.index_a": t[f"{Q}.index_a"].long() + 2**32}),
            r"index_a must use public shards in \[0, 16\)",
        ),
        (lambda t, c: t[f"{Q}.index_a"][0, 0].fill_(1), "index_a must not use a public shard twice in one layer"),
        # Tables that could be this adapter's, but are not.
        (
            lambda t, c: t.update(
                {f"{Q}.index_a": torch.cat([t[f"{Q}.index_a"].flip(0)[:, :3], t[f"{Q}.index_a"][:, 3:]], 1)}
            ),
            "table_digest must be that of the index tables",
        ),
        (
            lambda t, c: [t.pop(name) for name in list(t) if name.endswith(("index_a", "index_b"))],
            "table_digest must be that of the index tables",
        ),
    ],
)
def test_contradictions_of_tables_given_by_hand(tmp_path, change, message):
    model = randomize(mos_ext.adapt(llama(), SMALL))
    by_hand(model.mos_pools.pools)
    mos_ext.save_adapter(model, tmp_path)
    edit(tmp_path, change)
    refused(tmp_path, message)


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


BOTH_WRITERS = pytest.mark.parametrize("write", ["native", "peft"])


def two_adapters(write):
    """Of one configuration but for what no tensor shows: seed and alpha. (save, logits) of each."""
    out = []
    for seed in (0, 1):
        config = replace(SMALL, seed=seed, alpha=10 + seed)
        if write == "native":
            model = randomize(mos_ext.adapt(llama(2), config), std=0.1 + seed)
            out.append((partial(mos_ext.save_adapter, model), model))
        else:
            torch.manual_seed(seed)
            fields = {**config.to_dict(), "init_weights": False}
            model = peft.get_peft_model(llama(2), mos_peft.MoSConfig(**fields)).eval()
            out.append((model.save_pretrained, model))
    return out


def loads(folder):
    """What each way to load makes of a directory: logits, or None where it is refused."""
    batch = {"input_ids": torch.arange(1, 12)[None]}
    for load in (mos_ext.load_adapter, in_peft):
        try:
            yield logits(load(llama(2), folder), batch)
        except ValueError:
            yield None


@BOTH_WRITERS
def test_threads_that_save_into_one_directory(write, tmp_path):
    """Readers get one adapter or the other or a documented error, at any time; and what stays is one of them."""
    savers = two_adapters(write)
    batch = {"input_ids": torch.arange(1, 12)[None]}
    wanted = [logits(model, batch) for _, model in savers]
    assert not torch.allclose(*wanted, atol=1e-3)
    start, errors, read = threading.Barrier(3), [], []

    def saving(save):
        start.wait()
        for _ in range(15):
            try:
                save(tmp_path)
            except ValueError as error:  # PEFT writes the weights in place; see "docs/format.md"
                errors.append(str(error))

    threads = [threading.Thread(target=saving, args=(save,)) for save, _ in savers]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        try:
            read.append(logits(mos_ext.load_adapter(llama(2), tmp_path), batch))
        except (ValueError, FileNotFoundError) as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
    for thread in threads:
        thread.join()
    assert all(any(torch.equal(got, want) for want in wanted) for got in read)
    if write == "native":
        assert errors == []
    assert all("must hold what was just saved" in e or "must be a complete safetensors file" in e for e in errors)
    for got in loads(tmp_path):
        assert got is None or any(torch.equal(got, want) for want in wanted)
    if write == "native":
        assert all(got is not None for got in loads(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}


@BOTH_WRITERS
def test_every_mixture_of_two_saves_is_detected(write, tmp_path):
    for (save, _), name in zip(two_adapters(write), "ab", strict=True):
        save(tmp_path / name)
    shutil.copy(tmp_path / "b" / CONFIG, tmp_path / "a" / CONFIG)
    for load in (mos_ext.load_adapter, in_peft):
        with pytest.raises(ValueError, match="must come from the same save as adapter_config.json beside it"):
            load(llama(2), tmp_path / "a")


def test_peft_finds_the_weights_of_another_save(tmp_path, monkeypatch):
    """Between its weights and its configuration, another save puts its own weights there."""
    (save, _), (other, _) = two_adapters("peft")
    other(tmp_path / "b")
    original = mos_peft.MoSConfig.save_pretrained

    def late(self, folder, **kwargs):
        shutil.copy(tmp_path / "b" / WEIGHTS, Path(folder) / WEIGHTS)
        original(self, folder, **kwargs)

    monkeypatch.setattr(mos_peft.MoSConfig, "save_pretrained", late)
    with pytest.raises(
        ValueError, match="must hold what was just saved, got another base_model.*another save into this"
    ):
        save(tmp_path / "a")


@BOTH_WRITERS
def test_every_flipped_bit_is_noticed_or_changes_nothing(write, tmp_path):
    """Of the length, of the header and of every tensor's first, middle and last bytes."""
    save, model = two_adapters(write)[0]
    save(tmp_path)
    want = logits(model, {"input_ids": torch.arange(1, 12)[None]})
    content = (tmp_path / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    places = {*range(8), *range(8, 8 + size, 61)}
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0] != entry["data_offsets"][1]:
            low, high = (8 + size + offset for offset in entry["data_offsets"])
            places |= {low, (low + high) // 2, high - 1}
    refused_bits = 0
    for place in sorted(places):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / WEIGHTS).write_bytes(flipped)
        for got in loads(tmp_path):
            assert got is None or torch.equal(got, want), f"byte {place} of a header of {size}"
            refused_bits += got is None
            if place >= 8 + size:
                assert got is None
    assert refused_bits > len(places)


def test_what_killed_saves_have_left_is_swept(saved):
    """And what a save that is under way writes is not."""
    old, new = saved / f".{WEIGHTS}.12345.tmp", saved / f".{CONFIG}.0123abc.tmp"
    for file in (old, new):
        file.write_text("half")
    long_ago = old.stat().st_mtime - 2 * 3600
    os.utime(old, (long_ago, long_ago))
    mos_ext.save_adapter(randomize(mos_ext.adapt(llama(), SMALL)), saved)
    assert not old.exists()
    assert new.read_text() == "half"


def test_a_directory_that_vanishes(saved, monkeypatch):
    model = mos_ext.adapt(llama(), SMALL)
    original = os.fsync

    def gone(fd):
        original(fd)
        shutil.rmtree(saved)

    monkeypatch.setattr(os, "fsync", gone)
    with pytest.raises(FileNotFoundError, match=str(saved)):
        mos_ext.save_adapter(model, saved)


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
        model.mos_pools.pools[0].shards_b.fill_(1e6)
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


# ------------------------------------------------------------------------------------------------ trained beside the pools


def train_beside(model, *names):
    """Gives modules other values, and trains them."""
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(True)
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", ["lm_head", "model.norm"]),
        ("gpt2", ["transformer.ln_f", "transformer.wpe"]),
        ("bert", ["bert.embeddings", "bert.encoder.layer.0.attention.output.LayerNorm", "classifier"]),
        ("vit", ["classifier", "vit.embeddings.patch_embeddings"]),
    ],
)
def test_what_is_trained_beside_the_pools_is_part_of_the_adapter(name, modules, tmp_path):
    model, batch = randomize(mos_ext.adapt(BUILDERS[name](), SMALL)), inputs(name)
    alone = logits(model, batch)
    train_beside(model, *modules)
    want = logits(model, batch)
    assert not torch.allclose(want, alone, atol=1e-3)
    mos_ext.save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(in_peft(BUILDERS[name](), tmp_path / "a"), batch), want)
    loaded = mos_ext.load_adapter(BUILDERS[name](), tmp_path / "a")
    assert torch.equal(logits(loaded, batch), want)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    # It stays part of an adapter that is only deployed.
    mos_ext.save_adapter(loaded.requires_grad_(False), tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    mos_ext.export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(in_peft(BUILDERS[name](), tmp_path / "lora"), batch), want, rtol=1e-4, atol=1e-4)


def test_buffers_of_modules_beside(tmp_path):
    """BatchNorm's statistics, an integer among them."""

    def base():
        torch.manual_seed(0)
        blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)) for _ in range(2)]
        return torch.nn.Sequential(*blocks)

    model = mos_ext.adapt(base(), replace(SMALL, r=2, equivalent_rank=2))
    train_beside(model, "1.1")
    x = torch.randn(16, 8)
    model.train()(x)
    mos_ext.save_adapter(model, tmp_path)
    loaded = mos_ext.load_adapter(base(), tmp_path)
    for name, buffer in model.get_submodule("1.1").named_buffers():
        assert torch.equal(loaded.get_submodule("1.1").get_buffer(name), buffer)
    assert loaded.get_submodule("1.1").num_batches_tracked == 1


def test_names_that_end_alike(tmp_path):
    """PEFT reads modules_to_save as endings: "norm" is every norm, and it wants to find them all in the file."""
    model = randomize(mos_ext.adapt(llama(2).model, SMALL))
    train_beside(model, "norm")
    mos_ext.save_adapter(model, tmp_path)
    assert len(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]) == 5
    x = torch.arange(1, 12)[None]
    for loaded in (mos_ext.load_adapter(llama(2).model, tmp_path), in_peft(llama(2).model, tmp_path)):
        with torch.no_grad():
            assert torch.equal(loaded(x).last_hidden_state, model(x).last_hidden_state)


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True.:UserWarning")  # PEFT's
def test_a_tied_head(tmp_path):
    model, batch = randomize(mos_ext.adapt(llama(tie_word_embeddings=True), SMALL)), inputs("llama")
    train_beside(model, "lm_head")
    mos_ext.save_adapter(model, tmp_path)
    for load in (mos_ext.load_adapter, in_peft):
        assert torch.equal(logits(load(llama(tie_word_embeddings=True), tmp_path), batch), logits(model, batch))


@pytest.mark.parametrize("write", [mos_ext.save_adapter, mos_ext.export_lora])
def test_what_cannot_be_saved_is_named(write, tmp_path):
    """Parameters of adapted layers, and of the model itself."""
    model = mos_ext.adapt(gpt2(), SMALL)
    model.transformer.h[1].attn.c_attn.bias.requires_grad_(True)
    model.register_parameter("temperature", torch.nn.Parameter(torch.ones(())))
    with pytest.warns(
        UserWarning, match=r"got trained temperature, transformer\.h\.1\.attn\.c_attn\.bias, which are not saved"
    ) as caught:
        write(model, tmp_path)
    assert caught[0].filename == __file__
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] is None


# ------------------------------------------------------------------------------------------------ model.save_pretrained


def test_save_pretrained_saves_the_adapter(tmp_path):
    for put in (
        lambda base: randomize(mos_ext.adapt(base, SMALL)),
        lambda base: mos_ext.load_adapter(base, tmp_path / "0"),
    ):
        model, batch = put(llama()), inputs("llama")
        train_beside(model, "model.norm")
        mos_ext.save_adapter(model, tmp_path / "0")
        model.save_pretrained(tmp_path / "1", max_shard_size="1GB", safe_serialization=True)
        resumed = load_file(tmp_path / "1" / "model.safetensors")
        state = model.state_dict()
        assert set(resumed) == {"model.norm.weight", *(n for n in state if n.startswith("mos_pools."))}
        assert all(torch.equal(value, state[name]) for name, value in resumed.items())
        (tmp_path / "1" / "model.safetensors").unlink()
        assert contents(tmp_path / "1") == contents(tmp_path / "0")
        assert torch.equal(logits(mos_ext.load_adapter(llama(), tmp_path / "1"), batch), logits(model, batch))


def test_save_pretrained_of_a_merged_model_saves_the_model(tmp_path):
    model, batch = mos_ext.merge(randomize(mos_ext.adapt(llama(), SMALL))), inputs("llama")
    model.save_pretrained(tmp_path)
    again, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values())
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_save_pretrained_takes_values_that_were_gathered(tmp_path):
    model = randomize(mos_ext.adapt(llama(), SMALL))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batch = inputs("llama")
    want = logits(model, batch)
    randomize(model, std=0.5)
    model.save_pretrained(tmp_path, state_dict=state)
    assert torch.equal(logits(mos_ext.load_adapter(llama(), tmp_path), batch), want)
    model.save_pretrained(tmp_path / "nothing", is_main_process=False)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("arguments", [{"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_save_pretrained_refuses_what_adapters_cannot_do(arguments, tmp_path):
    model = mos_ext.adapt(llama(), SMALL)
    with pytest.raises(ValueError, match=f"must be called with arguments for adapters, got .*{next(iter(arguments))}"):
        model.save_pretrained(tmp_path / "a", **arguments)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(how, tmp_path):
    model = randomize(mos_ext.adapt(llama(), SMALL))
    clone = how(model)
    randomize(model, std=0.5)
    clone.save_pretrained(tmp_path)
    batch = inputs("llama")
    assert torch.equal(logits(mos_ext.load_adapter(llama(), tmp_path), batch), logits(clone, batch))


def test_an_adapted_model_goes_when_nobody_needs_it():
    model = mos_ext.adapt(llama(1), replace(SMALL, r=3))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------ model cards


@BOTH_WRITERS
def test_a_card_begins_with_what_loading_needs(write, tmp_path):
    save, _ = two_adapters(write)[0]
    save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert "library_name: peft" in front
    assert body.lstrip().startswith("```python\nimport mos_ext.integrations.peft")
    save(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import mos_ext") == 1


@BOTH_WRITERS
@pytest.mark.parametrize("front", ["", "---\nlicense: mit\n---\n"])
def test_a_user_s_card_keeps_what_it_says(write, front, tmp_path):
    (tmp_path / "README.md").write_text(front + "# My adapter\n\nIt is great.\n")
    save, _ = two_adapters(write)[0]
    save(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.index("import mos_ext") < card.index("# My adapter\n\nIt is great.\n")
    assert ("license: mit" in card) == bool(front)
    assert card.startswith("---\n") == (bool(front) or write == "peft")


# ------------------------------------------------------------------------------------------------ the format's document


def block(marker):
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    return text.partition(f"<!-- {marker} -->\n```")[2].partition("\n")[2].partition("\n```\n")[0]


def test_the_document_s_test_vector():
    vector = json.loads(block("test vector"))
    config, stream = MoSConfig(**vector["config"]), vector["stream"]
    hashed = hashlib.blake2b(vector["name"].encode(), digest_size=8).digest()
    assert f"{int.from_bytes(hashed, 'little'):016x}" == vector["base"]
    assert [f"{int(key):016x}" for key in _keys(vector["name"], 4)] == vector["keys"]
    tables = draw_tables(config, stream, (2, 2))
    assert (tables.a.tolist(), tables.b.tolist()) == (vector["index_a"], vector["index_b"])
    assert table_digest({stream: tables}) == vector["table_digest"]
    balanced = draw_tables(replace(config, routing="balanced"), stream, (2, 2))
    assert {"index_a": balanced.a.tolist(), "index_b": balanced.b.tolist()} == vector["balanced"]
    types = {"F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {
        name: torch.tensor(t["values"], dtype=types[t["type"]]).reshape(t["shape"])
        for name, t in vector["tensors"].items()
    }
    assert tensor_digest(weights(tensors)) == vector["tensor_digest"]


@pytest.mark.parametrize("pair_dissociation", [True, False])
def test_what_the_document_s_writer_writes_loads(pair_dissociation, tmp_path):
    program = {}
    exec(block("writer"), program)
    model, batch = mos_ext.adapt(llama(), replace(SMALL, seed=5, pair_dissociation=pair_dissociation)), inputs("llama")
    randomize(model)
    types = {pool.stream: pool.num_layers for pool in model.mos_pools.pools}
    pools = {
        f"base_model.mos_{name}": (tuple(value.shape), value.detach().numpy().tobytes())
        for name, value in model.mos_pools.state_dict().items()
    }
    program["write"](tmp_path, model.mos_pools.config.to_dict(), types, pools)
    for load in (mos_ext.load_adapter, in_peft):
        assert torch.equal(logits(load(llama(), tmp_path), batch), logits(model, batch))
    mos_ext.save_adapter(model, tmp_path / "ours")
    ours, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path / "ours", tmp_path))
    assert {k: ours[k] for k in theirs} == theirs


# ------------------------------------------------------------------------------------------------ export


def in_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations
        return peft.PeftModel.from_pretrained(base, folder).eval()


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


def test_tables_of_another_draw_are_kept_in_the_file(tmp_path):
    """They follow from a configuration, but not from this one."""
    model, other = randomize(mos_ext.adapt(llama(), SMALL)), mos_ext.adapt(llama(), replace(SMALL, seed=SMALL.seed + 1))
    for pool, from_other in zip(model.mos_pools.pools, other.mos_pools.pools, strict=True):
        pool.set_tables(from_other.tables)
    mos_ext.save_adapter(model, tmp_path)
    loaded = mos_ext.load_adapter(llama(), tmp_path)
    batch = inputs("llama")
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
