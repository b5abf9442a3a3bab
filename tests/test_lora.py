"""LoRA in memory, and LoRA of PEFT's read as an adapter like any other."""

import json
import shutil
import warnings

import pytest
import safetensors.torch
import torch
from models import gpt2, llama, moe, randomize
from safetensors.torch import load_file
from torch import nn

import mos_ext
from mos_ext import MoSConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft
import mos_ext.integrations.peft as mos_peft
from mos_ext.checkpoint import check_finite, read_mos
from mos_ext.lora import read_adapter, read_lora
from mos_ext.planner import Base

# PEFT asks transformers whether a model checkpoints under a name that transformers is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SMALL = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2, "private_rank": 1, "alpha": 10}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def random_(module, kind=""):
    """Values for whatever an adapter trains."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if kind in name:
                parameter.normal_(std=0.1)
    return module


def native(build, **changes):
    return lambda: randomize(mos_ext.adapt(build(), MoSConfig(**{**SMALL, **changes}))).eval()


def under_peft():
    config = mos_peft.MoSConfig(**SMALL, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(llama(), config)
    model.add_adapter("other", config)
    return random_(model, "shards").eval()


MODELS = {
    "linears": (llama, native(llama)),
    "ranks": (llama, native(llama, rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True)),
    "conv1d": (gpt2, native(gpt2)),
    "peft": (llama, under_peft),
    "experts": (
        lambda: moe("qwen3_moe"),
        native(lambda: moe("qwen3_moe"), target_modules=["q_proj"], target_parameters=STACKS),
    ),
    "interleaved experts": (
        lambda: moe("gpt_oss"),
        native(lambda: moe("gpt_oss"), target_modules=(), target_parameters=STACKS),
    ),
}


# ------------------------------------------------------------------------------------------------ in memory


@pytest.mark.parametrize("options", [{}, {"rank": 8, "dtype": torch.bfloat16}], ids=["as it is", "padded in half"])
@pytest.mark.parametrize("name", MODELS)
def test_tensors_in_memory_are_those_of_the_file(name, options, tmp_path):
    model = MODELS[name][1]()
    adapter = {"adapter_name": "other"} if name == "peft" else {}
    mos_ext.export_lora(model, tmp_path, **adapter, **options)
    there, here = load_file(tmp_path / WEIGHTS), mos_ext.lora_state_dict(model, **adapter, **options)
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert torch.equal(value, there[key])
        assert value.dtype == there[key].dtype
        assert not value.requires_grad
    rank = {"rank": options["rank"]} if options else {}
    assert mos_ext.lora_config(model, **adapter, **rank) == json.loads((tmp_path / CONFIG).read_text()) | (
        {"task_type": "CAUSAL_LM"} if name == "peft" else {}
    )


@pytest.mark.parametrize("name", MODELS)
def test_tensors_in_memory_make_the_same_model_in_peft(name):
    build, adapted = MODELS[name]
    model, batch = adapted(), {"input_ids": torch.randint(1, 64, (2, 9))}
    config = peft.LoraConfig(**mos_ext.lora_config(model))
    lora = peft.get_peft_model(build(), config).eval()
    result = peft.set_peft_model_state_dict(lora, mos_ext.lora_state_dict(model))
    assert not result.unexpected_keys
    torch.testing.assert_close(logits(lora, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    assert (logits(lora, batch) - logits(build(), batch)).abs().max() > 1e-3


def test_tensors_in_memory_are_copies():
    """A trainer goes on stepping while an engine still receives them."""
    model = native(llama)()
    before = mos_ext.lora_state_dict(model)
    kept = {key: value.clone() for key, value in before.items()}
    with torch.no_grad():
        for pool in model.mos_pools.pools:
            pool.shards_a.add_(1), pool.shards_b.add_(1)
    assert all(torch.equal(before[key], kept[key]) for key in before)
    assert not any(torch.equal(value, kept[key]) for key, value in mos_ext.lora_state_dict(model).items())


def test_what_has_no_tensors_in_memory():
    with pytest.raises(ValueError, match="model must be adapted"):
        mos_ext.lora_state_dict(llama())
    model = native(llama)()
    with pytest.raises(ValueError, match="rank must be at least r=4, got 2"):
        mos_ext.lora_state_dict(model, rank=2)
    with pytest.raises(ValueError, match="rank must be at least r=4, got 2"):
        mos_ext.lora_config(model, rank=2)
    with pytest.raises(TypeError, match="dtype must be one of"):
        mos_ext.lora_state_dict(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="adapter_name must be None"):
        mos_ext.lora_state_dict(model, adapter_name="other")


# ------------------------------------------------------------------------------------------------ read


def lora(build, folder, **changes):
    """A LoRA of PEFT's, in a directory, and as PEFT loads it from there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about combinations that are meant here
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **changes})
        model = random_(peft.get_peft_model(build(), config), "lora_").eval()
        model.save_pretrained(folder, save_embedding_layers=False)
        return peft.PeftModel.from_pretrained(build(), folder)


def deltas(stored):
    """Name -> what an adapter adds to a weight (out, in), or to a stack of them, assembled from pools and tables."""
    out = {}
    for t in stored.types:
        kind, tables = t.linear_type.kind, t.linear_type.tables
        assert tables.a.dtype == tables.b.dtype == "int32"
        assert tables.a.shape == tables.b.shape
        assert tables.a.min() >= 0
        assert tables.a.max() < len(t.shards_a) == len(t.shards_b)
        count = max(1, kind.experts)
        for k, name in enumerate(t.linear_type.modules):
            of_matrices = []
            for m in range(k * count, (k + 1) * count):
                rows = slice(-t.linear_type.ranks[k], None)
                a = t.shards_a[torch.from_numpy(tables.a[m, rows]).long()].flatten(1)
                b = t.shards_b[torch.from_numpy(tables.b[m, rows]).long()].flatten(1)
                of_matrices.append(t.linear_type.scales[k] * b.T.double() @ a.double())
            out[name] = torch.stack(of_matrices) if kind.experts else of_matrices[0]
    return out


def peft_deltas(model):
    """The same of PEFT's layers."""
    out = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            own, base = getattr(layer, "parameter_name", None), layer.get_base_layer()
            delta = layer.get_delta_weight("default")
            stacked = own is not None
            swap = base.is_transposed if stacked else type(base).__name__ == "Conv1D"
            name = name.replace(".base_layer", "") + (f".{own}" if stacked else "")
            out[name] = delta.mT if swap else delta
    return out


LORAS = {
    "patterns": (
        llama,
        {
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, r"layers\.[23]\.mlp\.down_proj": 2},
            "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 5},
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
        },
    ),
    "some modules": (llama, {"target_modules": r".*\.[13]\.mlp\.(up|gate)_proj", "init_lora_weights": "gaussian"}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "the head": (llama, {"target_modules": ["lm_head"], "lora_dropout": 0.1}),
    "experts": (
        lambda: moe("qwen3_moe"),
        {
            "target_modules": ["q_proj"],
            "target_parameters": STACKS,
            "rank_pattern": {r"1\.mlp\.experts\.down_proj": 3},
            "alpha_pattern": {"gate_up_proj": 11},
        },
    ),
    "transposed experts": (lambda: moe("gpt_oss"), {"target_modules": [], "target_parameters": STACKS}),
    "one stack": (lambda: moe("mixtral"), {"target_modules": [], "target_parameters": STACKS[:1]}),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_adds_what_peft_adds(name, tmp_path):
    build, changes = LORAS[name]
    want = peft_deltas(lora(build, tmp_path, **changes))
    stored = read_lora(Base.of(build()), tmp_path)
    assert (stored.method, stored.config, stored.equivalent_rank) == ("LoRA", None, None)
    assert stored.r == max(4, *changes.get("rank_pattern", {"": 1}).values())
    got = deltas(stored)
    assert got.keys() == want.keys()
    for module, delta in got.items():
        torch.testing.assert_close(delta.float(), want[module], rtol=1e-5, atol=1e-6)
        assert delta.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ranks", "conv1d", "experts", "interleaved experts"])
def test_an_adapter_and_its_export_are_the_same(name, tmp_path):
    """Read from its own file, and as LoRA, by what picks the reader."""
    build, adapted = MODELS[name]
    model = adapted()
    mos_ext.save_adapter(model, tmp_path / "mos")
    mos_ext.export_lora(model, tmp_path / "lora")
    mos, as_lora = (read_adapter(Base.of(build()), tmp_path / method) for method in ("mos", "lora"))
    assert (mos.method, as_lora.method) == ("MoS", "LoRA")
    assert [t.linear_type.modules for t in mos.types] == [t.linear_type.modules for t in as_lora.types]
    want = deltas(mos)
    for module, delta in deltas(as_lora).items():
        torch.testing.assert_close(delta, want[module], rtol=1e-5, atol=1e-6)
    assert mos.config == model.mos_pools.config
    assert mos.r == as_lora.r == 4
    assert mos.equivalent_rank == 3


def test_readers_need_no_weights(tmp_path):
    """Shapes are enough, and a model that carries an adapter of PEFT's is the base that it was."""
    mos_ext.save_adapter(native(llama)(), tmp_path / "mos")
    wrapped = lora(llama, tmp_path / "lora")
    bases = [
        Base.of(llama()),
        Base.of(llama().to("meta")),
        Base.of(wrapped),
        Base.of(torch.compile(wrapped, backend="eager")),
    ]
    for base in bases:
        assert [*base.modules] == [*bases[0].modules]
        assert type(base.head) is nn.Linear
        for folder in ("mos", "lora"):
            assert deltas(read_adapter(base, tmp_path / folder)).keys() <= base.modules.keys()
    stored = read_mos(bases[1], tmp_path / "mos")
    for t, pool in zip(stored.types, native(llama)().mos_pools.pools, strict=True):
        assert torch.equal(t.shards_a, pool.shards_a)
        assert torch.equal(t.shards_b, pool.shards_b)
    with pytest.raises(ValueError, match="base_model must have its values in memory"):
        mos_ext.load_adapter(llama().to("meta"), tmp_path / "mos")


def test_adapters_of_other_methods(tmp_path):
    peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json must describe a MoS or LoRA adapter, got a IA3 adapter"):
        read_adapter(Base.of(llama()), tmp_path)
    with pytest.raises(ValueError, match="must describe a LoRA adapter, got a IA3 adapter"):
        read_lora(Base.of(llama()), tmp_path)
    with pytest.raises(FileNotFoundError, match="path must hold adapter_config.json"):
        read_adapter(Base.of(llama()), tmp_path / "nowhere")
    (tmp_path / CONFIG).write_text('{"peft_type": ["LORA"]}')
    with pytest.raises(ValueError, match="must describe a MoS or LoRA adapter, got a"):
        read_adapter(Base.of(llama()), tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    lora(llama, folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "lora")


def read(folder):
    return read_lora(Base.of(llama()), folder)


ALONE = r"must be of a LoRA that adds low-rank products to a base, and nothing else, got "


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, ALONE + "use_dora=True: merge that adapter instead"),
        ("bias", "lora_only", ALONE + "bias='lora_only'"),
        ("modules_to_save", ["lm_head"], ALONE + "modules_to_save"),
        ("lora_bias", True, ALONE + "lora_bias=True"),
        ("trainable_token_indices", [1], ALONE + "trainable_token_indices"),
        ("layer_replication", [[0, 2]], ALONE + "layer_replication"),
        ("alora_invocation_tokens", [5], ALONE + "alora_invocation_tokens"),
        ("use_qalora", True, ALONE + "use_qalora"),
        ("arrow_config", {"top_k": 1}, ALONE + "arrow_config"),
        ("a_field_of_next_year", 1, ALONE + "a_field_of_next_year=1"),
        *(
            ("init_lora_weights", how, f"whose base is the model's, got init_lora_weights='{how}', which changed it")
            for how in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "of next year")
        ),
        (
            "r",
            8,
            r"must hold lora_A of .*q_proj as floats of shape \(8, 64\), as rank 8 .*, got torch.float32 \(4, 64\)",
        ),
        ("r", None, "must hold a valid LoRA configuration, got r must be an integer, got None"),
        ("r", 257, "got r must be at most 256, got 257"),
        ("r", 0, "got r must be at least 1, got 0"),
        ("lora_alpha", float("nan"), "got lora_alpha must be finite"),
        ("lora_alpha", "6", "got lora_alpha must be a number, got '6'"),
        ("rank_pattern", {"q_proj": 5}, "as rank 5 of its configuration"),
        ("rank_pattern", {"(": 5}, "rank_pattern must be a valid regular expression"),
        ("rank_pattern", {"q_proj": "5"}, "must be an integer, got '5'"),
        ("alpha_pattern", [], "alpha_pattern must be a dictionary from name patterns"),
        ("target_parameters", "experts", "must have a list of names as target_parameters, got 'experts'"),
    ],
)
def test_configurations_that_are_not_of_a_plain_lora(copy, field, value, message):
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=message):
        read(copy)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(f"{Q}.lora_B.weight"),
            f"must hold lora_A.weight and lora_B.weight of each layer, got also {Q}",
        ),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}), "got also .*lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.lora_B.bias": torch.ones(64)}), "got also .*lora_B.bias"),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(4, 96)}), "got also .*lora_embedding_A"),
        (lambda t: t.update({Q.removeprefix("base_model."): torch.ones(1)}), "got also model.model.layers.0"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 65)}), r"\(4, 64\), .* got torch.float32 \(4, 65\)"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(64, 3)}), r"\(64, 4\), .* got torch.float32 \(64, 3\)"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)}), "got torch.int32"),
        (lambda t: t[f"{Q}.lora_A.weight"][1, 1].fill_(float("inf")), "lora_A of .*q_proj, must be finite"),
        (lambda t: t[f"{Q}.lora_B.weight"][1, 1].fill_(float("nan")), "lora_B of .*q_proj, must be finite"),
        (lambda t: t.clear(), "must hold factors for modules of this model, a LlamaForCausalLM"),
    ],
)
def test_weights_that_are_not_of_this_model(copy, change, message):
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, copy / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        read(copy)


@pytest.mark.parametrize(
    "module", ["layers.9.self_attn.q_proj", "layers.0.self_attn.q", "embed_tokens", "norm", "layers"]
)
def test_modules_that_a_model_does_not_have(copy, module):
    tensors = load_file(copy / WEIGHTS)
    for side in "AB":
        tensors[f"base_model.model.model.{module}.lora_{side}.weight"] = torch.ones(4, 4)
    safetensors.torch.save_file(tensors, copy / WEIGHTS)
    with pytest.raises(ValueError, match=f"for .*this model.*{module}"):
        read(copy)


def test_files_that_are_no_safetensors(copy):
    content = (copy / WEIGHTS).read_bytes()
    for damaged in (b"", content[:100], content[:-1], content[:8] + b"x" + content[9:]):
        (copy / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match="must be a complete safetensors file"):
            read(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"path must hold {WEIGHTS}"):
        read(copy)
    (copy / "adapter_model.bin").write_bytes(b"code")
    with pytest.raises(ValueError, match=r"must hold adapter_model.safetensors, got adapter_model.bin, a pickle"):
        read(copy)
    (copy / CONFIG).write_text("[")
    with pytest.raises(ValueError, match="must be JSON"):
        read(copy)


def test_weights_of_the_base_that_were_saved_along(tmp_path):
    model = lora(llama, tmp_path, target_modules=["lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that it does so
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got also .*lm_head.base_layer.weight \(PEFT .* save_embedding_layers=False"):
        read(tmp_path)


def test_factors_of_experts_must_be_complete(tmp_path):
    lora(lambda: moe("qwen3_moe"), tmp_path, target_modules=[], target_parameters=STACKS)
    tensors = load_file(tmp_path / WEIGHTS)
    outer = [name for name in tensors if "layers.1" in name and ".base_layer." not in name]
    assert len(outer) == 2
    safetensors.torch.save_file({name: t for name, t in tensors.items() if name not in outer}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"got none too many and model.layers.1.mlp.experts missing"):
        read_lora(Base.of(moe("qwen3_moe")), tmp_path)
    with pytest.raises(
        ValueError, match=r"a LlamaForCausalLM.*model.layers.0.mlp.experts, .* too many and none missing"
    ):
        read(tmp_path)


def test_parameters_that_are_no_stack_of_experts(tmp_path):
    lora(lambda: moe("gpt_oss"), tmp_path, target_modules=[], target_parameters=["experts.down_proj_bias"])
    with pytest.raises(ValueError, match="must have stacks of experts as target_parameters, got .*down_proj_bias"):
        read_lora(Base.of(moe("gpt_oss")), tmp_path)


@pytest.mark.parametrize("dtypes", [["bfloat16"], ["float16"], ["float64"], ["bfloat16", "float32"]])
def test_a_lora_keeps_its_dtype_or_the_widest(copy, dtypes):
    want = deltas(read(copy))
    tensors = load_file(copy / WEIGHTS)
    for k, (name, tensor) in enumerate(tensors.items()):
        tensors[name] = tensor.to(getattr(torch, dtypes[k // 4 % len(dtypes)]))
    safetensors.torch.save_file(tensors, copy / WEIGHTS)
    stored = read(copy)
    assert {str(pool.dtype) for t in stored.types for pool in (t.shards_a, t.shards_b)} == {f"torch.{dtypes[-1]}"}
    for name, delta in deltas(stored).items():
        torch.testing.assert_close(delta, want[name], rtol=0.02, atol=0.001)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_whatever_is_neither_infinite_nor_nan(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([[info.max, info.min], [info.tiny, 0.0]], dtype=dtype)
    check_finite({"x": values.T, "none": torch.empty(0), "counts": torch.tensor([2**31 - 1, -1])})
    for bad in (float("nan"), float("inf"), -float("inf")):
        values[1, 1] = bad
        with pytest.raises(ValueError, match="x must be finite in torch"):
            check_finite({"x": values.T})
