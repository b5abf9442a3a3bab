"""A second implementation: a reader of adapter files, from the words of docs/format.md alone, against the library's products.

What is above the tests knows nothing of mos_ext, torch or PEFT; a name, a shape and a number of experts are all it is told of a model.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import gpt2, inputs, llama, moe, randomize

import mos_ext
from mos_ext import MoSConfig

MASK = 2**64 - 1
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}


def read_tensors(content):
    """name -> (type, shape, bytes) of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def values(tensor):
    kind, shape, content = tensor
    numbers = np.frombuffer(content, TYPES[kind])
    if kind == "BF16":
        numbers = (numbers.astype("<u4") << 16).view("<f4")
    return numbers.reshape(shape).astype(np.int64 if kind[0] in "IU" else np.float64)


def keys(name, count):
    base = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    out = []
    for m in range(1, count + 1):
        z = (base + m * 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


def draw(config, stream, side, e, p, ranks):
    """(L, max(ranks), l) of one side."""
    l, count, r = config["shards_per_vector"], len(ranks), max(ranks)
    public, wanted = round((e - p) * count * l), (r - p) * l
    uses, tables = [0] * public, []
    for k, own in enumerate(ranks):
        key = keys(f"{config['seed']}/{stream}/{side}/{k}", public)
        if config["routing"] == "random":
            row = sorted(range(public), key=key.__getitem__)[:wanted]
        else:
            order = sorted(range(public), key=lambda m: (uses[m], key[m]))[:wanted]
            used, others = order[: (own - p) * l], order[(own - p) * l :]
            for m in used:
                uses[m] += 1
            row = sorted(others, key=key.__getitem__) + sorted(used, key=key.__getitem__)
        tables.append(row + list(range(public + k * p * l, public + (k + 1) * p * l)))
    return np.array(tables).reshape(count, r, l)


def selects(patterns, name):
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in patterns or ())


def in_layers(config, name):
    if config["layers_to_transform"] is None or name in config["target_modules"]:
        return True
    patterns = config["layers_pattern"]
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    found = [m for m in (re.match(e, name) for e in expressions) if m]
    return bool(found) and int(found[0].group(1)) in config["layers_to_transform"]


def of_pattern(patterns, name, default):
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def read(folder, linears, stacks=()):
    """Module or parameter -> its products scale * B A, (out, in), one for each expert.

    ``linears`` are all linear modules of a model, (name, in, out), in its order; ``stacks`` its stacks of experts, (name, E, in, out).
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_tensors((folder / "adapter_model.safetensors").read_bytes())
    assert (config["peft_type"], config["format_version"]) == ("MOS", 2)

    digest = hashlib.sha256()
    for name in sorted(tensors):
        kind, shape, content = tensors[name]
        digest.update(f"{name} {kind} {','.join(map(str, shape))}\n".encode() + content)
    assert digest.hexdigest() == config["tensor_digest"]

    def role(name):
        return ".".join("*" if part.isdigit() else part for part in name.split("."))

    grouped, targets = {}, config["target_modules"]
    for name, fan_in, fan_out in linears:
        wanted = targets == "all-linear" or (selects(targets, name) and in_layers(config, name))
        if wanted and not selects(config["exclude_modules"], name):
            grouped.setdefault((role(name), 0, fan_in, fan_out), []).append(name)
    for name, experts, fan_in, fan_out in stacks:
        excluded = selects(config["exclude_modules"], name) or selects(
            config["exclude_modules"], name.rpartition(".")[0]
        )
        if selects(config["target_parameters"], name) and in_layers(config, name) and not excluded:
            grouped.setdefault((role(name), experts, fan_in, fan_out), []).append(name)

    key_names, streams, digested, products = [], [], {}, {}
    for (kind, experts, fan_in, fan_out), names in grouped.items():
        text = f"{kind}[{f'{experts} x ' if experts else ''}{fan_in}->{fan_out}]"
        key = re.sub("[^A-Za-z0-9_]+", "_", text).strip("_")
        while key in key_names:
            key += "_"
        prefix = f"base_model.mos_{key}."
        if targets == "all-linear" and f"{prefix}shards_a" not in tensors:
            continue
        key_names.append(key)
        stream = f"{kind.partition('*.')[2] or kind}[{fan_in}->{fan_out}]"
        earlier = sum(other.partition("#")[0] == stream for other in streams)
        streams.append(f"{stream}#{earlier}" if earlier else stream)

        e, p, l = config["equivalent_rank"], config["private_rank"], config["shards_per_vector"]
        if experts:
            e = config["expert_equivalent_rank"] or e
            p = p if p < e else 0
        ranks = [
            of_pattern(config["rank_pattern"], name, config["r"]) for name in names for _ in range(max(1, experts))
        ]
        stored = f"{prefix}index_a" in tensors
        sides = {}
        for side in "ab":
            drawn = "a" if not config["pair_dissociation"] else side
            table = (
                values(tensors[f"{prefix}index_{side}"]) if stored else draw(config, streams[-1], drawn, e, p, ranks)
            )
            sides[side] = table
            digested.setdefault(streams[-1], []).append(table)
            assert tensors[f"{prefix}shards_{side}"][1][0] == round(e * len(ranks) * l)
        shards = {side: values(tensors[f"{prefix}shards_{side}"]) for side in "ab"}
        for k, r in enumerate(ranks):
            name = names[k // max(1, experts)]
            a, b = (shards[side][sides[side][k, -r:]].reshape(r, -1) for side in "ab")
            alpha = of_pattern(config["alpha_pattern"], name, config["alpha"])
            scale = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
            products.setdefault(name, []).append(scale * b.T @ a)

    digest = hashlib.sha256()
    for stream in sorted(digested):
        for table in digested[stream]:
            shape = ", ".join(map(str, table.shape))
            digest.update(f"{stream} ({shape})\n".encode() + table.astype("<i4").tobytes())
    assert config["table_digest"] == f"1:{digest.hexdigest()}"
    assert f"base_model.index_tables.1-{digest.hexdigest()}" in tensors
    return products


# ------------------------------------------------------------------------------------------------ tests


def linears_of(model):
    """(name, in, out) of every linear; of Conv1D, which stores its weight transposed, too."""
    out = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            out.append((name, module.in_features, module.out_features))
        elif type(module).__name__ == "Conv1D":
            out.append((name, *module.weight.shape))
    return out


def stacks_of(model):
    return [
        (name, p.shape[0], p.shape[2], p.shape[1]) for name, p in model.named_parameters() if p.dim() == 3
    ]  # of models that do not transpose


BASE = MoSConfig(r=4, equivalent_rank=3, shards_per_vector=2, private_rank=1, alpha=10, seed=7)
CASES = {
    "random": {},
    "balanced": {"routing": "balanced"},
    "paired": {"pair_dissociation": False},
    "public only": {"private_rank": 0, "shards_per_vector": 4},
    "LoRA": {"r": 3, "private_rank": 3},
    "names": {"target_modules": ["q_proj", "mlp.down_proj"], "use_rslora": True},
    "expression": {"target_modules": r".*\.(k|v)_proj", "exclude_modules": ["1.self_attn.k_proj"], "r": 3},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": ["layers"], "r": 3},
    "ranks": {"rank_pattern": {r"2\.self_attn\..*": 2, "down_proj": 3}, "alpha_pattern": {"up_proj": 3.5}},
    "balanced ranks": {"routing": "balanced", "rank_pattern": {r"2\.self_attn\..*": 2}},
    "ranks that do not fit": {"r": 16},
}


def check(model, linears, stacks, folder, tolerance):
    found = read(folder, linears, stacks)
    seen = set()
    for name, layer in model.named_modules():
        if not hasattr(layer, "parts"):
            continue
        for parameter, (pool, k) in layer.parts(None).items():
            whole = f"{name}.{parameter}" if pool.experts else name
            seen.add(whole)
            wanted = [pool.delta_weight(k, e) for e in range(pool.experts)] or [pool.delta_weight(k)]
            assert len(wanted) == len(found[whole])
            for ours, theirs in zip(wanted, found[whole], strict=True):
                np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=tolerance)
    assert seen == set(found)
    assert seen


@pytest.mark.parametrize("case", CASES)
def test_a_reader_from_the_page_alone(case, tmp_path):
    """To the rounding of float32 products of numbers around 0.1: their sums have up to 16 terms."""
    model = llama()
    linears = linears_of(model)
    randomize(mos_ext.adapt(model, replace(BASE, **CASES[case])))
    mos_ext.save_adapter(model, tmp_path)
    check(model, linears, (), tmp_path, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_type_of_pool(dtype, tmp_path):
    model = gpt2()
    linears = linears_of(model)
    randomize(mos_ext.adapt(model, replace(BASE, pool_dtype=dtype)))
    mos_ext.save_adapter(model, tmp_path)
    check(model, linears, (), tmp_path, 1e-6)


def test_tables_that_the_file_carries(tmp_path):
    model = llama()
    linears = linears_of(model)
    randomize(mos_ext.adapt(model, BASE))
    for pool in model.mos_pools.pools:
        tables = replace(pool.tables, drawn=None)
        tables.a[:, 0] = tables.a[:, 0, ::-1]
        pool.set_tables(tables)
    mos_ext.save_adapter(model, tmp_path)
    assert any("index_a" in name for name in read_tensors((tmp_path / "adapter_model.safetensors").read_bytes()))
    check(model, linears, (), tmp_path, 1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {"layers_to_transform": [1], "r": 1, "private_rank": 0}, {"exclude_modules": ["0.mlp.experts"]}]
)
def test_experts(changes, tmp_path):
    model = moe("qwen3_moe")
    linears, stacks = linears_of(model), stacks_of(model)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = replace(BASE, r=2, target_modules=["q_proj"], target_parameters=targets, expert_equivalent_rank=1 / 2)
    config = replace(config, **changes)
    randomize(mos_ext.adapt(model, config))
    mos_ext.save_adapter(model, tmp_path)
    check(model, linears, stacks, tmp_path, 1e-6)


def test_what_the_reader_found_is_the_model(tmp_path):
    """The products, added to the base's weights, give the adapted model's logits."""
    model, base, batch = llama(), llama(), inputs("llama")
    linears = linears_of(model)
    randomize(mos_ext.adapt(model, BASE))
    mos_ext.save_adapter(model, tmp_path)
    with torch.no_grad():
        for name, (product,) in read(tmp_path, linears).items():
            base.get_submodule(name).weight.add_(torch.from_numpy(product).float())
        torch.testing.assert_close(base(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
