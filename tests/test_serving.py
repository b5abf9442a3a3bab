"""Many adapters on one base: every sequence gets what its adapter gives alone, whatever else happens to the bank."""

import asyncio
import copy
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import models
import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file, save_file
from torch import nn

import mos_ext
from mos_ext.serving import AdapterBank, BankFull
from mos_ext.serving.arena import Arena
from mos_ext.serving.route import MAX_ROWS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "plain": mos_ext.MoSConfig(r=5, equivalent_rank=2, shards_per_vector=4, private_rank=1, alpha=16, seed=1),
    "short": mos_ext.MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, private_rank=0, alpha=8, seed=2),
    "some": mos_ext.MoSConfig(
        r=4,
        equivalent_rank=2,
        shards_per_vector=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={"down_proj": 40},
        layers_to_transform=[1, 2, 3],
    ),
}
NAMES = ["plain", None, "short", "some", "plain", "short"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' about tiny models


def trained(model, config, seed=0):
    """A copy of a model with an adapter that does something."""
    model = mos_ext.adapt(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for pool in model.mos_pools.pools:
        nn.init.normal_(pool.shards_b, std=0.3, generator=generator)
    return model.eval()


def saved(model, config, folder, seed=0):
    adapted = trained(model, config, seed)
    mos_ext.save_adapter(adapted, folder)
    return adapted


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base, the directory of its adapters, and each of them loaded alone; None is the base."""
    base, folder = models.llama(), tmp_path_factory.mktemp("adapters")
    alone = {name: saved(base, config, folder / name, i) for i, (name, config) in enumerate(CONFIGS.items())}
    return base, folder, {**alone, None: copy.deepcopy(base)}


@pytest.fixture
def bank(llama):
    base, folder, _ = llama
    bank = AdapterBank(base)
    for name in CONFIGS:
        bank.add(name, folder / name)
    yield bank
    bank.close()


def ids(*shape, seed=0):
    return torch.randint(1, 96, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ equal to each alone


@torch.no_grad()
def test_logits_are_those_of_each_adapter_alone(llama, bank):
    base, _, alone = llama
    x = ids(len(NAMES), 9)
    with bank.route(base, NAMES):
        y = base(x).logits
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(y[i : i + 1], alone[name](x[i : i + 1]).logits, rtol=0, atol=1e-5)
    assert (y[0] - base(x).logits[0]).abs().max() > 0.1  # and the adapters do something


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_tokens_are_those_of_each_adapter_alone(llama, bank, beams):
    base, _, alone = llama
    x = ids(len(NAMES), 7)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with bank.route(base, NAMES):
        got = base.generate(x, **options)
    for i, name in enumerate(NAMES):
        assert got[i : i + 1].equal(alone[name].generate(x[i : i + 1], **options)), name


def test_left_padding(llama, bank):
    base, _, alone = llama
    x, lengths = ids(3, 8), (8, 3, 5)
    mask = torch.stack([torch.arange(8) >= 8 - n for n in lengths]).long()
    names = ["plain", "short", None]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with bank.route(base, names):
        got = base.generate(x * mask, attention_mask=mask, **options)
    for i, (name, n) in enumerate(zip(names, lengths, strict=True)):
        assert got[i, 8:].equal(alone[name].generate(x[i : i + 1, 8 - n :], **options)[0, n:]), name


def test_several_results_of_a_sequence(llama, bank):
    base, _, alone = llama
    x, options = ids(2, 5), {"max_new_tokens": 4, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    with bank.route(base, ["short", "plain"]):
        got = base.generate(x, **options)
    for i, name in enumerate(["short", "plain"]):
        expected = alone[name].generate(x[i : i + 1], **options)
        assert got[2 * i : 2 * i + 2, : expected.shape[1]].equal(expected)


@torch.no_grad()
def test_conv1d_and_dtypes(tmp_path):
    base = models.gpt2()
    config = mos_ext.MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=["c_attn", "c_fc", "c_proj"])
    alone = saved(base, config, tmp_path / "a")
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(base).to(dtype)
        bank = AdapterBank(model)
        bank.add("a", tmp_path / "a")
        x = ids(3, 6)
        with bank.route(model, ["a", None, "a"]):
            y = model(x).logits
        expected, plain = (m.to(dtype)(x).logits for m in (copy.deepcopy(alone), copy.deepcopy(base)))
        tolerance = 1e-5 if dtype == torch.float32 else 0.05  # of logits around 1, in bfloat16's eps of 0.008
        torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=0, atol=tolerance)
        torch.testing.assert_close(y[1], plain[1], rtol=0, atol=tolerance)


def test_an_encoder_and_its_decoder(tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 3, "vocab_size": 96}
    base = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )
    base.eval()
    config = mos_ext.MoSConfig(r=4, equivalent_rank=2, shards_per_vector=2, target_modules=["q", "k", "v", "o", "wo"])
    alone = {"a": saved(base, config, tmp_path / "a"), None: copy.deepcopy(base)}
    bank = AdapterBank(base)
    bank.add("a", tmp_path / "a")
    x, names = ids(3, 11), [None, "a", "a"]
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        with bank.route(base, names):
            got = base.generate(input_ids=x, **options)
        for i, name in enumerate(names):
            assert got[i : i + 1].equal(alone[name].generate(input_ids=x[i : i + 1], **options)), (beams, name)


@torch.no_grad()
def test_a_peft_model_keeps_its_own_adapter(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers about what PEFT calls
        from peft import LoraConfig, get_peft_model

        base, folder, alone = llama
        plain = copy.deepcopy(base)
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).eval()
    bank = AdapterBank(model)
    bank.add("plain", folder / "plain")
    x = ids(2, 6)
    with bank.route(model, [None, "plain"]):
        y = model(input_ids=x).logits
    torch.testing.assert_close(y[:1], plain(x[:1]).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(y[1:], alone["plain"](x[1:]).logits, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    with bank.route(model, ["plain", None]):
        both = model(input_ids=x).logits
    assert (both[1] - y[1]).abs().max() > 0.1 < (both[0] - y[0]).abs().max()


def test_gradients_and_autocast(llama, bank):
    """Routes are for inference; nothing breaks where somebody wants a gradient, or lower precision."""
    base, _, alone = llama
    embedded = base.get_input_embeddings()(ids(2, 5)).detach()
    with bank.route(base, ["plain", "short"]):
        x = embedded.clone().requires_grad_()
        base(inputs_embeds=x).logits.sum().backward()
    for i, name in enumerate(["plain", "short"]):
        own = embedded[i : i + 1].clone().requires_grad_()
        alone[name](inputs_embeds=own).logits.sum().backward()
        # Four blocks in float32, whose sums are added in another order: about 20 of its eps of the whole.
        assert (x.grad[i : i + 1] - own.grad).norm() < 2e-6 * own.grad.norm() + 2e-6
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), bank.route(base, ["plain", None]):
        y = base(inputs_embeds=embedded).logits
    torch.testing.assert_close(y[:1].float(), alone["plain"](inputs_embeds=embedded[:1]).logits, rtol=0, atol=0.2)
    base.zero_grad(set_to_none=True)


@pytest.mark.parametrize("capacity", [None, 1_000_000])
def test_inference_mode(llama, capacity):
    """What is made there serves outside as well."""
    base, folder, alone = llama
    x = ids(2, 5)
    with torch.inference_mode():
        bank = AdapterBank(base, capacity=capacity)
        bank.add("plain", folder / "plain")
        with bank.route(base, ["plain", None]):
            first = base(x).logits
    with bank.route(base, ["plain", None]):
        base(x)
    bank.add("short", folder / "short")
    bank.evict("plain")
    bank.restore("plain")
    for name in ("plain", "plain", "short"):
        with bank.route(base, [name, None]):
            y = base(x).logits
        torch.testing.assert_close(y[:1], alone[name](x[:1]).logits, rtol=0, atol=1e-5)
        if name == "plain":
            torch.testing.assert_close(first.clone(), y, rtol=0, atol=1e-5)
    bank.close()


# ------------------------------------------------------------------------------------------------ the same bits


ALONE_AND_AMONG_OTHERS = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import models
from mos_ext.serving import AdapterBank

kinds, ids = [*sys.argv[3:], None], torch.randint(1, 96, (64, 9))
for dtype in (torch.float32, torch.bfloat16):
    base = models.llama().to(dtype)
    bank = AdapterBank(base)
    for name in kinds[:-1]:
        bank.add(name, f"{sys.argv[2]}/{name}")
    names = [kinds[i * 7 % 4] for i in range(64)]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    options.update(output_logits=True, return_dict_in_generate=True)
    with bank.route(base, names, batch_invariant=True):
        among = base.generate(ids, **options)
    for i in (0, 1, 2, 3, 17, 63):
        with bank.route(base, [names[i]], batch_invariant=True):
            alone = base.generate(ids[i : i + 1], **options)
        assert alone.sequences.equal(among.sequences[i : i + 1]), (dtype, i)
        for step, (a, b) in enumerate(zip(alone.logits, among.logits, strict=True)):
            assert a.equal(b[i : i + 1]), (dtype, i, step)
"""


def test_the_same_bits_alone_and_among_63_others(llama):
    """In a process of its own: MKL reads once whether its products may depend on where operands lie in memory."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        ALONE_AND_AMONG_OTHERS,
        str(ROOT / "tests"),
        str(llama[1]),
        *CONFIGS,
    ]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "MKL_CBWR": "AUTO"})


@torch.no_grad()
def test_what_an_adapter_adds_is_the_same_bits_in_every_batch(llama):
    """Without ``batch_invariant`` too: here the base's product is a copy, whose bits say nothing."""
    _, folder, _ = llama
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False)
    nn.init.zeros_(model[0].weight)
    bank = AdapterBank(model)
    for i in range(3):
        config = mos_ext.MoSConfig(r=2 + i, equivalent_rank=2 + i, private_rank=0, shards_per_vector=4, seed=i)
        saved(nn.Sequential(nn.Linear(64, 64, bias=False)), config, folder.parent / f"one{i}", i)
        bank.add(str(i), folder.parent / f"one{i}")
    for length in (1, 5, 70):
        x = torch.randn(21, length, 64)
        names = [(None, "0", "1", "2")[k * k % 7 % 4] for k in range(21)]
        with bank.route(model, names):
            y = model(x)
        assert y[names.index("0")].any()
        assert not y[names.index(None)].any()
        for k in range(21):
            with bank.route(model, [names[k]]):
                assert model(x[k : k + 1]).equal(y[k : k + 1]), (length, k)


@torch.no_grad()
def test_no_new_compilation_when_routes_change(llama, bank):
    base, _, alone = llama
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(base, backend=counter, fullgraph=False)
    x, expected = ids(3, 6), None
    with bank.route(compiled, ["plain", None, "short"]):
        compiled(x)
    first = counter.frame_count
    for names in (
        ["short", "some", "plain"],
        ["some", "some", "some"],
        [None, None, "plain"],
        ["short", "plain", None],
    ):
        with bank.route(compiled, names):
            y = compiled(x).logits
        for i, name in enumerate(names):
            expected = alone[name](x[i : i + 1]).logits
            torch.testing.assert_close(y[i : i + 1], expected, rtol=0, atol=1e-5)
    assert counter.frame_count == first
    with (
        bank.route(compiled, ["short", None, "plain"]),
        pytest.raises(RuntimeError, match="x must have rows for each of the route's 3 sequences, got 4 sequences"),
    ):
        compiled(ids(4, 6))


# ------------------------------------------------------------------------------------------------ what is refused


def test_unknown_and_evicted_names_are_errors_before_anything_runs(llama, bank):
    base, _, _ = llama
    ran = []
    handle = base.register_forward_pre_hook(lambda *_: ran.append(1))
    message = "name must be that of an adapter in the bank, got 'other'; there are: plain"
    with pytest.raises(ValueError, match=message), bank.route(base, ["plain", "other"]):
        base(ids(2, 3))
    bank.evict("short")
    with (
        pytest.raises(
            ValueError, match=r"must be that of an adapter in memory, got 'short', which is evicted: call rest"
        ),
        bank.route(base, ["short"]),
    ):
        base(ids(1, 3))
    handle.remove()
    assert not ran
    assert all(member.leases == 0 for member in bank.report().adapters)
    bank.evict("plain")  # which it could not while the failed route held it


def test_batches_that_are_not_the_routes(llama, bank):
    base, _, _ = llama
    with bank.route(base, ["plain", "short"]), torch.no_grad():
        with pytest.raises(RuntimeError, match="x must have rows for each of the route's 2 sequences, got 3 sequences"):
            base(ids(3, 4))
        layer = base.model.layers[0].mlp.up_proj
        with pytest.raises(RuntimeError, match="x must be a Linear's first argument inside a route, got a named one"):
            layer(input=torch.randn(2, 4, 64))
        base(ids(2, 4))
        with pytest.raises(RuntimeError, match="x must have all rows of a batch, 8, got 6: a layer that is given some"):
            layer(torch.randn(6, 64))


@torch.no_grad()
def test_rows_that_come_before_those_of_the_batch(tmp_path):
    """Patches of all images, one after the other, are as many for each sequence; or nobody knows whose they are."""
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    vision, text = base
    config = mos_ext.MoSConfig(r=1, equivalent_rank=1, shards_per_vector=2)
    saved(base, config, tmp_path / "a")
    bank = AdapterBank(base)
    bank.add("a", tmp_path / "a")
    for _ in range(2):
        with bank.route(base, ["a", None]):
            vision(torch.randn(12, 16))
            with pytest.raises(RuntimeError, match="x must have all rows of a batch, 10, got 12"):
                text(torch.randn(2, 5, 16))


@torch.no_grad()
def test_a_route_that_lives_long_stays_small(llama, bank):
    base, _, _ = llama
    for length in range(1, 20):
        with bank.route(base, ["plain", None]):
            base(ids(2, length))
    assert len(bank._last[1]._rows) <= MAX_ROWS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity must be"),
        ({"capacity": "1GB"}, TypeError, "capacity must be"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of"),
        (
            {"dtype": torch.bfloat16},
            TypeError,
            "dtype must be float32 or that of model.layers.0.self_attn.q_proj, torch.f",
        ),
        ({"shards_per_vector": 0}, ValueError, "shards_per_vector must be"),
        ({"target_modules": ["nothing"]}, ValueError, "target_modules must match"),
    ],
)
def test_arguments_of_a_bank(llama, arguments, error, message):
    with pytest.raises(error, match=message):
        AdapterBank(llama[0], **arguments)
    assert not any(module._forward_hooks for module in llama[0].modules())


def test_models_of_a_bank(llama, bank):
    base, _, alone = llama
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        AdapterBank("model")
    with pytest.raises(ValueError, match=r"model must have no adapter of mos_ext.adapt, got one on model.layers.0"):
        AdapterBank(alone["plain"])
    with pytest.raises(ValueError, match="model must have no other bank"):
        AdapterBank(base)
    with pytest.raises(ValueError, match="model must be the bank's, or hold it, got a LlamaForCausalLM"):
        bank.route(alone[None], ["plain"]).__enter__()
    with pytest.raises(ValueError, match="names must be a list with an adapter for each sequence, got 'plain'"):
        bank.route(base, "plain").__enter__()
    with pytest.raises(ValueError, match=r"names must be a list with an adapter for each sequence, got \[\]"):
        bank.route(base, []).__enter__()
    bank.close()
    with pytest.raises(ValueError, match="model must have its bank, got one whose bank was closed"):
        bank.route(base, ["plain"]).__enter__()


def positions_first(name):
    """A model that gives linears (positions, sequences, features), and what one of them is called."""
    import transformers

    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
    if name == "longformer":
        sizes = {"vocab_size": 96, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
        return transformers.LongformerModel(transformers.LongformerConfig(**sizes, attention_window=4)), "query"
    if name == "xlnet":
        config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4)
        return transformers.XLNetModel(config), "layer_1"
    if name == "led":
        return transformers.LEDModel(transformers.LEDConfig(vocab_size=96, **sizes, attention_window=4)), "query"
    if name == "fsmt":
        config = transformers.FSMTConfig(langs=["a", "b"], src_vocab_size=96, tgt_vocab_size=96, **sizes)
        return transformers.FSMTModel(config), "fc1"
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 1, enable_nested_tensor=False), "linear1"


@pytest.mark.parametrize("name", ["longformer", "xlnet", "led", "fsmt", "torch"])
def test_modules_that_are_given_positions_first(name):
    model, target = positions_first(name)
    with pytest.raises(ValueError, match=r"target_modules must select modules that are given one sequence after the o"):
        AdapterBank(model, target_modules=[target])


@torch.no_grad()
def test_torch_encoders_and_padding(tmp_path):
    """torch would make nested tensors of padded batches; after the bank it does again."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    config = mos_ext.MoSConfig(r=1, equivalent_rank=1, shards_per_vector=2, target_modules=["linear1", "linear2"])
    alone = saved(base, config, tmp_path / "a")
    bank = AdapterBank(base)
    bank.add("a", tmp_path / "a")
    x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for names in (["a", None], [None, "a"], ["a", "a"]):
        with bank.route(base, names):
            y = base(x, src_key_padding_mask=mask)
        for i, (name, n) in enumerate(zip(names, (5, 3), strict=True)):
            expected = (base if name is None else alone)(x[i : i + 1, :n])
            torch.testing.assert_close(y[i : i + 1, :n], expected, rtol=0, atol=1e-5)
    bank.close()
    assert base.use_nested_tensor
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def planted(folder, to, change=None, tensors=None):
    """A copy of an adapter's files with another configuration, or other tensors."""
    to.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    config.update(change or {})
    if tensors is not None:
        weights = tensors(weights)
        del config["tensor_digest"]
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, to / "adapter_model.safetensors")
    return to


FAULTS = {
    "truncated": (None, "must be a complete safetensors file"),
    "no weights": (None, "path must hold adapter_model.safetensors"),
    "pickled": (None, "path must hold adapter_model.safetensors"),
    "other tables": (None, "table_digest must be"),
    "not finite": (None, "must be finite"),
    "another model": (None, "must be for this model"),
    "modules beside": (None, "path must be an adapter alone, got one with modules that were trained beside it"),
    "longer l": (None, "shards_per_vector of an adapter must divide the bank's"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_refused_leave_the_bank_as_it_was(llama, bank, tmp_path, fault):
    folder = llama[1]
    good, bad = folder / "plain", tmp_path / "bad"
    config = (good / "adapter_config.json").read_text()
    content = (good / "adapter_model.safetensors").read_bytes()
    if fault in ("truncated", "no weights", "pickled"):
        bad.mkdir()
        (bad / "adapter_config.json").write_text(config)
        if fault == "truncated":
            (bad / "adapter_model.safetensors").write_bytes(content[:-64])
        elif fault == "pickled":
            torch.save(load_file(good / "adapter_model.safetensors"), bad / "adapter_model.bin")
    elif fault == "other tables":
        planted(good, bad, {"seed": 77})
    elif fault == "not finite":
        planted(good, bad, tensors=lambda tensors: {k: v + float("inf") for k, v in tensors.items()})
    elif fault == "another model":
        saved(models.llama(layers=2, intermediate_size=128), mos_ext.MoSConfig(r=2, equivalent_rank=2), bad)
    elif fault == "modules beside":
        adapted = trained(models.llama(), CONFIGS["plain"])
        adapted.model.norm.requires_grad_(True)
        mos_ext.save_adapter(adapted, bad)
    else:
        saved(models.llama(), mos_ext.MoSConfig(r=4, equivalent_rank=2, shards_per_vector=16), bad)
    before = bank.report()
    for act in (bank.add, bank.replace):
        name = "new" if act == bank.add else "plain"
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(FAULTS[fault][1])):
            act(name, bad)
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(FAULTS[fault][1])):
            bank.submit(name, bad, replace=act == bank.replace).result()
    assert bank.report() == before
    check(llama, bank, NAMES)


def test_values_that_are_too_large_for_float16(llama, tmp_path):
    large = planted(
        llama[1] / "plain", tmp_path / "large", tensors=lambda tensors: {k: v * 1e6 for k, v in tensors.items()}
    )
    bank = AdapterBank(models.llama().half(), dtype=torch.float16)
    with pytest.raises(ValueError, match="path must be an adapter whose values fit into the bank's dtype, float16"):
        bank.add("large", large)
    assert bank.names == ()


@torch.no_grad()
def check(llama, bank, names, seed=1):
    """Every sequence gets what its adapter gives alone. Names are of ``llama``, or pairs of a name and what it means."""
    base, _, alone = llama
    pairs = [name if isinstance(name, tuple) else (name, name) for name in names]
    x = ids(len(pairs), 5, seed=seed)
    with bank.route(base, [name for name, _ in pairs]):
        y = base(x).logits
    for i, (_, meant) in enumerate(pairs):
        expected = alone[meant](x[i : i + 1]).logits
        torch.testing.assert_close(y[i : i + 1], expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the life of adapters


def test_add_replace_remove_list_and_pin(llama, bank):
    _base, folder, _ = llama
    assert bank.names == tuple(CONFIGS) == tuple(bank)
    assert len(bank) == 3
    assert "plain" in bank
    assert "other" not in bank
    with pytest.raises(ValueError, match="name must not be in the bank yet, got 'plain': call replace, or remove it"):
        bank.add("plain", folder / "short")
    with pytest.raises(ValueError, match="name must be that of an adapter in the bank, got 'other'"):
        bank.replace("other", folder / "short")
    with pytest.raises(ValueError, match="name must be a string that is not empty, got ''"):
        bank.add("", folder / "short")
    bank.replace("plain", folder / "some")
    check(llama, bank, [("plain", "some"), "short", None])
    bank.remove("short")
    assert bank.names == ("plain", "some")
    check(llama, bank, [("plain", "some"), "some", None])
    for act in (bank.remove, bank.pin, bank.unpin, bank.evict, bank.restore, bank.resident, bank.lease):
        with pytest.raises(ValueError, match="name must be that of an adapter in the bank, got 'short'"):
            act("short")
    bank.add("short", folder / "short", pin=True)
    with pytest.raises(ValueError, match="name must be of an adapter that nobody needs, got 'short', which is pinned"):
        bank.evict("short")
    bank.unpin("short")
    bank.evict("short")
    with pytest.raises(ValueError, match="name must be that of an adapter in memory, got 'short', which is evicted"):
        bank.pin("short")
    assert not bank.resident("short")
    assert bank.resident("some")
    bank.restore("short")
    bank.restore("short")  # nothing to do
    check(llama, bank, [("plain", "some"), "some", "short", None])


def test_a_lease_keeps_its_version(llama, bank):
    _, folder, _ = llama
    with bank.lease("plain") as old, bank.lease("short") as removed:
        bank.replace("plain", folder / "short")
        bank.remove("short")
        used = bank.report().used
        check(llama, bank, [(old, "plain"), ("plain", "short"), (removed, "short"), "some"])
        with pytest.raises(ValueError, match="held by"), bank.lease("some"):
            bank.evict("some")
    assert bank.report().used < used
    check(llama, bank, [("plain", "short"), "some"])
    old.close()  # once more does nothing
    with pytest.raises(ValueError, match="names must hold open leases of this bank, got another one, of 'plain'"):
        check(llama, bank, [(old, "plain")])


def one_bytes(llama):
    """What each of CONFIGS takes in memory."""
    bank = AdapterBank(models.llama())
    for name in CONFIGS:
        bank.add(name, llama[1] / name)
    return {member.name: member.bytes for member in bank.report().adapters}


def test_the_least_recently_used_makes_room(llama):
    base, folder, _ = llama
    size = one_bytes(llama)["plain"]
    assert one_bytes(llama)["short"] == size
    bank = AdapterBank(base, capacity=3 * size + 100)
    assert bank.report().free == bank.report().capacity == 3 * size
    try:
        for i in range(3):
            bank.add(f"a{i}", folder / ("plain", "short")[i % 2])
        assert bank.report().free == 0
        check(llama, bank, [("a0", "plain")])  # so a1 is the oldest
        bank.add("a3", folder / "plain")
        assert [bank.resident(f"a{i}") for i in range(4)] == [True, False, True, True]
        bank.pin("a2")
        bank.restore("a1")
        assert [bank.resident(f"a{i}") for i in range(4)] == [False, True, True, True]
        check(llama, bank, [("a1", "short"), ("a2", "plain"), ("a3", "plain"), None])
        with bank.lease("a1"), bank.lease("a3"):
            before = bank.report()
            with pytest.raises(
                BankFull, match=r"capacity must hold the adapters in use, those that are pinned and 'a4'"
            ):
                bank.add("a4", folder / "plain")
            with pytest.raises(BankFull, match="'a0'"):
                bank.restore("a0")
            assert [m.resident for m in bank.report().adapters] == [m.resident for m in before.adapters]
            assert bank.names == ("a0", "a1", "a2", "a3")
        bank.replace("a2", folder / "short")  # in the place of the old one; still pinned
        assert [m.pinned for m in bank.report().adapters] == [False, False, True, False]
        assert [bank.resident(f"a{i}") for i in range(4)] == [False, True, True, True]
        check(llama, bank, [("a1", "short"), ("a2", "short"), ("a3", "plain")])
        bank.remove("a3")
        assert bank.report().free == size
        bank.restore("a0")
        check(llama, bank, [("a0", "plain"), ("a1", "short"), ("a2", "short")])
        assert bank.report().evictions == 3
    finally:
        bank.close()


def test_an_adapter_larger_than_the_bank(llama):
    base, folder, _ = llama
    bank = AdapterBank(base, capacity=one_bytes(llama)["plain"] // 2)
    with pytest.raises(BankFull, match="lack"):
        bank.add("plain", folder / "plain")
    assert bank.names == ()
    assert bank.report().used == 0
    bank.close()


def test_the_report(llama, bank):
    report = bank.report()
    plain = report.adapters[0]
    adapted = trained(models.llama(), CONFIGS["plain"])
    numbers = mos_ext.parameter_report(adapted)
    assert plain.bytes == 4 * sum(p.numel() for p in adapted.mos_pools.parameters())
    assert plain.lora_bytes == 4 * numbers.lora_parameters
    assert (plain.kind, plain.r, plain.equivalent_rank) == ("MoS", 5, 2)
    assert (report.capacity, report.free) == (None, None)
    assert report.used == sum(member.bytes for member in report.adapters)
    text = str(report)
    assert "plain" in text
    assert f"{plain.bytes:,}" in text
    assert "2.5x" in text
    assert str(AdapterBank(models.llama()).report()).startswith("adapter")


@torch.no_grad()
def test_changes_while_others_compute(llama):
    """Adapters come, go, are replaced, evicted and damaged while batches run: no answer but the right ones."""
    base, folder, alone = llama
    sizes = one_bytes(llama)
    bank = AdapterBank(base, capacity=int(4.5 * sizes["plain"]))
    bank.add("steady", folder / "plain", pin=True)
    x = ids(4, 5)
    expected = {name: model(x).logits for name, model in alone.items()}
    damaged = folder.parent / "damaged"
    if not damaged.exists():
        damaged.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            content = (folder / "plain" / file).read_bytes()
            (damaged / file).write_bytes(content[: len(content) // 2])
    stop, problems, rounds = threading.Event(), [], []

    def change(k):
        kinds, mine = list(CONFIGS), f"mine{k}"
        for i in range(30):
            kind = kinds[(i + k) % 3]
            try:
                bank.add(mine, folder / kind)
            except BankFull:
                continue
            try:
                with bank.lease(mine) as lease, bank.route(base, [None, lease]):
                    bank.replace(mine, folder / kinds[(i + k + 1) % 3])
                    with pytest.raises(ValueError, match="must be"):
                        bank.replace(mine, damaged)
                    y = base(x[:2]).logits
                torch.testing.assert_close(y[1], expected[kind][1], rtol=0, atol=1e-5)
                if i % 3 == 0:
                    bank.evict(mine)
                    bank.restore(mine)
            except BankFull:
                pass
            bank.remove(mine)

    def compute():
        while not stop.is_set():
            with bank.route(base, ["steady", None, "steady", None]):
                y = base(x).logits
            for i, name in enumerate(["plain", None, "plain", None]):
                torch.testing.assert_close(y[i], expected[name][i], rtol=0, atol=1e-5)
            rounds.append(1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(4) as pool:
        steady = pool.submit(compute)
        changing = [pool.submit(change, k) for k in range(3)]
        wait(changing)
        stop.set()
        for future in (*changing, steady):
            if future.exception() is not None:
                problems.append(future.exception())
    torch.set_num_threads(threads)
    assert not problems
    assert len(rounds) > 5
    assert bank.names == ("steady",)
    assert bank.report().used == sizes["plain"]
    check_rows(bank)
    bank.close()


def after(monkeypatch, method, act, calls=1):
    """Something happens as an arena's method begins for the ``calls``-th time."""
    original, left = getattr(Arena, method), [calls]

    def wrapped(self, *args):
        left[0] -= 1
        if left[0] == 0:
            act()
        return original(self, *args)

    monkeypatch.setattr(Arena, method, wrapped)


def out_of_memory():
    raise MemoryError("planted")


def check_rows(bank):
    """Every row of an arena is somebody's or nobody's, and nobody's once."""
    for arena in bank._arenas.values():
        members = [*bank._members.values(), *bank._nameless]
        rows = [rows for member in members for of, rows in member.rows.items() if of is arena]
        rows.append(arena._free)
        assert sorted(row for own in rows for row in own) == list(range(len(arena.shards_a)))


def test_no_memory_for_what_is_evicted(llama, bank, monkeypatch):
    before = bank.report()
    after(monkeypatch, "read", out_of_memory, calls=3)
    with pytest.raises(MemoryError, match="planted"):
        bank.evict("plain")
    assert bank.report() == before
    check_rows(bank)
    check(llama, bank, NAMES)
    bank.evict("plain")
    bank.restore("plain")
    check(llama, bank, NAMES)


@pytest.mark.parametrize("method", ["read", "write"])
@pytest.mark.parametrize("calls", [1, 4])
def test_no_memory_for_a_new_version_in_a_full_bank(llama, monkeypatch, method, calls):
    base, folder, _ = llama
    bank = AdapterBank(base, capacity=2 * one_bytes(llama)["plain"])
    try:
        bank.add("a", folder / "plain", pin=True)
        bank.add("b", folder / "short")
        before = bank.report()
        after(monkeypatch, method, out_of_memory, calls)
        for act, name in ((bank.replace, "a"), (bank.add, "c")):
            with pytest.raises(MemoryError, match="planted"):
                act(name, folder / "plain")
            assert bank.report().adapters == before.adapters
            check_rows(bank)
            check(llama, bank, [("a", "plain"), ("b", "short"), None])
            monkeypatch.undo()
            after(monkeypatch, method, out_of_memory, calls)
    finally:
        bank.close()


def test_removed_while_it_comes(llama, bank, monkeypatch):
    """Back into memory, or as a new version: the name stays unknown, and the memory is free."""
    _, folder, _ = llama
    for name in ("plain", "short"):
        bank.evict(name)
    after(monkeypatch, "write", lambda: bank.remove("plain"))
    bank.restore("plain")
    monkeypatch.undo()
    after(monkeypatch, "write", lambda: bank.remove("short"))
    with pytest.raises(ValueError, match="name must be that of an adapter in the bank, got 'short'"):
        bank.replace("short", folder / "some")
    assert bank.names == ("some",)
    check_rows(bank)
    assert bank.report().used == bank.report().adapters[0].bytes
    assert (
        sum(len(a._free) * a.shard_bytes for a in bank._arenas.values())
        == sum(len(a.shards_a) * a.shard_bytes for a in bank._arenas.values()) - bank.report().used
    )


def test_pinned_while_a_new_version_comes(llama, bank, monkeypatch):
    after(monkeypatch, "write", lambda: bank.pin("plain"))
    bank.replace("plain", llama[1] / "short")
    assert bank.report().adapters[0].pinned


def test_close_inside_a_route(llama, bank):
    with bank.route(llama[0], ["plain"]), pytest.raises(RuntimeError, match="close must be called outside of a route"):
        bank.close()
    check(llama, bank, NAMES)


@torch.no_grad()
def test_other_threads_compute_the_base(llama, bank):
    base, _, alone = llama
    x = ids(2, 4)
    with bank.route(base, ["plain", "plain"]), ThreadPoolExecutor(1) as pool:
        other = pool.submit(torch.no_grad()(lambda: base(x).logits)).result()
        own = base(x).logits
    torch.testing.assert_close(other, alone[None](x).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(own, alone["plain"](x).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tasks_of_one_thread(llama, bank):
    """A route that is left open while others run is not theirs, and they get none before it ends."""
    base, _, alone = llama
    x = ids(1, 4)

    async def first(entered, go_on):
        with bank.route(base, ["plain"]):
            entered.set()
            await go_on.wait()
            return base(x).logits, await asyncio.to_thread(lambda: base(x).logits.detach())

    async def tasks():
        entered, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(first(entered, go_on))
        await entered.wait()
        with pytest.raises(RuntimeError, match="a route must end before another task of its thread enters one"):
            bank.route(base, ["short"]).__enter__()
        outside = base(x).logits
        go_on.set()
        return outside, *await task

    outside, *inside = asyncio.run(tasks())
    torch.testing.assert_close(outside, alone[None](x).logits, rtol=0, atol=1e-5)
    for y in inside:
        torch.testing.assert_close(y, alone["plain"](x).logits, rtol=0, atol=1e-5)
    check(llama, bank, NAMES)


def test_routes_that_end_in_another_order_or_thread(llama, bank):
    base, _, _ = llama
    outer, inner = bank.route(base, ["plain"]), bank.route(base, ["short"])
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="a route must end before those that it was entered in"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    outer = bank.route(base, ["plain"])
    outer.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(outer.__exit__, None, None, None).result()
        pool.submit(check, llama, bank, NAMES).result()
    check(llama, bank, [None])
    check(llama, bank, NAMES)
    assert not any(member.leases for member in bank.report().adapters)


@torch.no_grad()
def test_routes_inside_routes(llama, bank):
    base, _, alone = llama
    x = ids(1, 4)
    with bank.route(base, ["plain"]):
        with bank.route(base, ["short"]):
            inner = base(x).logits
        outer = base(x).logits
    torch.testing.assert_close(inner, alone["short"](x).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(outer, alone["plain"](x).logits, rtol=0, atol=1e-5)


def test_growing_keeps_what_routes_have(llama):
    """An arena that grows while a route is open: the route goes on with what it has."""
    base, folder, _alone = llama
    bank = AdapterBank(base)
    bank.add("plain", folder / "plain")
    x = ids(2, 4)
    with bank.route(base, ["plain", None]), torch.no_grad():
        first = base(x).logits
        for i in range(5):
            bank.add(f"more{i}", folder / "short")
        assert base(x).logits.equal(first)
    check(llama, bank, ["plain", ("more4", "short"), None])
    bank.close()
    assert not any(module._forward_hooks for module in base.modules())


@torch.no_grad()
def test_adapters_of_peft_lora_are_members_too(llama, bank, tmp_path):
    """Beside MoS's, with ranks of their own."""
    base, _, alone = llama
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3})
        lora = get_peft_model(models.llama(), config).eval()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    lora.save_pretrained(tmp_path / "lora")
    bank.add("lora", tmp_path / "lora")
    assert bank.report().adapters[-1].kind == "LoRA"
    x, names = ids(4, 6), ["lora", "plain", None, "lora"]
    with bank.route(base, names):
        y = base(x).logits
    for i, name in enumerate(names):
        expected = (lora(input_ids=x[i : i + 1]) if name == "lora" else alone[name](x[i : i + 1])).logits
        torch.testing.assert_close(y[i : i + 1], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_copies_have_no_bank(llama, bank, tmp_path):
    """Neither its memory, nor its routes; and may have one of their own."""
    base, folder, alone = llama
    x = ids(2, 4)
    torch.save(base, tmp_path / "model.pt")
    copies = [copy.deepcopy(base), torch.load(tmp_path / "model.pt", weights_only=False)]
    assert (tmp_path / "model.pt").stat().st_size < 4 * sum(p.numel() for p in base.parameters()) + 200_000
    for model in copies:
        with bank.route(base, ["plain", "plain"]):
            torch.testing.assert_close(model(x).logits, alone[None](x).logits, rtol=0, atol=1e-6)
        own = AdapterBank(model)
        own.add("plain", folder / "plain")
        with own.route(model, ["plain", None]):
            y = model(x).logits
        torch.testing.assert_close(y[:1], alone["plain"](x[:1]).logits, rtol=0, atol=1e-5)
