"""MoSConfig: defaults, round trips, and an error for every rule."""

import dataclasses
import inspect
import json

import pytest
import torch
from models import stack
from peft import get_peft_model

import mos_ext
import mos_ext.integrations.peft as mos_peft
from mos_ext import MoSConfig

BAD = [
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"r": 257}, ValueError, "r must be at most 256, got 257"),
    ({"r": 2.0}, TypeError, "r must be an integer, got 2.0"),
    ({"r": True}, TypeError, "r must be an integer, got True"),
    ({"equivalent_rank": 0}, ValueError, "equivalent_rank must be at least 1, got 0"),
    ({"equivalent_rank": 10**9}, ValueError, "equivalent_rank must be at most 256, got 1000000000"),
    ({"rank_pattern": {"q": 300}}, ValueError, r"rank_pattern\['q'\] must be at most 256, got 300"),
    ({"lora_alpha": 32}, TypeError, "lora_alpha must be given as alpha"),
    ({"lora_dropout": 0.1}, TypeError, "lora_dropout must be given as dropout"),
    ({"lora_r": 8}, TypeError, "lora_r must be given as r"),
    ({"rank": 8}, TypeError, "rank must be given as r"),
    (
        {"init_lora_weights": False},
        TypeError,
        "init_lora_weights must be given to the MoSConfig of mos_ext.integrations.peft, as init_weights",
    ),
    ({"task_type": "CAUSAL_LM"}, TypeError, "task_type must be given to the MoSConfig of mos_ext.integrations.peft"),
    ({"wrong": 1}, TypeError, "unexpected keyword argument 'wrong'"),
    ({"shards_per_vector": -1}, ValueError, "shards_per_vector must be at least 1, got -1"),
    ({"private_rank": -1}, ValueError, "private_rank must be at least 0, got -1"),
    ({"private_rank": 9}, ValueError, "private_rank must be at most equivalent_rank=8, got 9"),
    ({"private_rank": 3, "r": 2}, ValueError, "private_rank must be at most r=2, got 3"),
    ({"private_rank": 8, "r": 9}, ValueError, "r must equal equivalent_rank=8 when private_rank equals it"),
    ({"alpha": float("nan")}, ValueError, "alpha must be finite, got nan"),
    ({"alpha": 10**400}, ValueError, "alpha must be finite, got 1000"),
    ({"pool_dtype": [1]}, ValueError, "pool_dtype must be one of"),
    ({"alpha": "16"}, TypeError, "alpha must be a number, got '16'"),
    ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, ValueError, r"dropout must be in \[0, 1\), got -0.1"),
    ({"pair_dissociation": 1}, TypeError, "pair_dissociation must be True or False, got 1"),
    ({"routing": "best"}, ValueError, "routing must be one of random, balanced, got 'best'"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"pool_dtype": "int8"}, ValueError, "pool_dtype must be one of float64, float32, bfloat16, float16, got 'int8'"),
    ({"target_modules": []}, ValueError, r"target_modules must name at least one module, got \(\)"),
    ({"target_modules": 3}, TypeError, "target_modules must be a string or a list of strings, got 3"),
    ({"target_modules": ["q", 3]}, TypeError, "target_modules must be a string or a list of strings"),
    ({"target_modules": "("}, ValueError, "target_modules must be a valid regular expression, got '\\('"),
    ({"exclude_modules": "["}, ValueError, "exclude_modules must be a valid regular expression"),
    ({"rank_pattern": {"q": 257}}, ValueError, r"rank_pattern\['q'\] must be at most 256, got 257"),
    ({"rank_pattern": {"q": 2}, "private_rank": 3}, ValueError, r"private_rank must be at most rank_pattern\['q'\]=2"),
    ({"rank_pattern": {"(": 2}}, ValueError, "rank_pattern must be a valid regular expression, got '\\('"),
    ({"rank_pattern": {"(?i)q": 2}}, ValueError, "rank_pattern must be a valid regular expression"),
    (
        {"layers_pattern": ["("], "layers_to_transform": 1, "target_modules": ["q"]},
        ValueError,
        "layers_pattern must be a valid",
    ),
    ({"rank_pattern": {3: 2}}, TypeError, "rank_pattern must have strings as keys, got 3"),
    ({"rank_pattern": [2]}, TypeError, "rank_pattern must be a dictionary from name patterns to values, got"),
    ({"alpha_pattern": {"q": "1"}}, TypeError, r"alpha_pattern\['q'\] must be a number, got '1'"),
    ({"use_rslora": 1}, TypeError, "use_rslora must be True or False, got 1"),
    (
        {"layers_to_transform": 1},
        ValueError,
        "layers_to_transform must come with a list of target_modules, got 'all-li",
    ),
    (
        {"layers_to_transform": [-1], "target_modules": ["q"]},
        ValueError,
        "layers_to_transform must be at least 0, got -1",
    ),
    (
        {"layers_to_transform": "1", "target_modules": ["q"]},
        TypeError,
        "layers_to_transform must be a number or a list",
    ),
    (
        {"layers_pattern": "h", "target_modules": ["q"]},
        ValueError,
        "layers_to_transform must be given with layers_pattern",
    ),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_values(values, error, message):
    with pytest.raises(error, match=message):
        MoSConfig(**values)


def test_derived_numbers():
    config = MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1, alpha=16)
    assert config.scale == 1.0
    assert config.num_shards(32) == 1024
    assert config.num_public_shards(32) == 896
    assert MoSConfig(pool_dtype=torch.bfloat16).pool_dtype == "bfloat16"
    assert MoSConfig(pool_dtype="float64").torch_pool_dtype == torch.float64
    assert MoSConfig(target_modules={"v", "q"}).target_modules == ("q", "v")


def test_patterns():
    """A pattern matches the whole name, or its end after a dot, as in PEFT; where several match, they must agree."""
    config = MoSConfig(r=16, alpha=8, rank_pattern={"down": 2, r".*\.0\.up": 4, "up.*": 4}, alpha_pattern={"down": 3})
    ranks = {"h.1.down": 2, "h.0.down": 2, "h.0.up": 4, "h.1.gate": 16, "h.1.my_down": 16, "down": 2}
    assert {name: config.rank_of(name) for name in ranks} == ranks
    assert config.scale_of("h.1.down") == 3 / 2
    assert config.scale_of("h.0.up") == 8 / 4
    assert MoSConfig(r=16, alpha=8, use_rslora=True).scale == 8 / 4
    ambiguous = MoSConfig(r=16, rank_pattern={"down": 2, r".*\.0\..*": 4})
    with pytest.raises(ValueError, match=r"rank_pattern must give h\.0\.down one value, got \{'down': 2, .*: 4\}"):
        ambiguous.rank_of("h.0.down")
    assert hash(config) == hash(MoSConfig.from_dict(config.to_dict()))


def test_is_immutable_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoSConfig().r = 3
    assert MoSConfig() == MoSConfig()
    assert MoSConfig() != MoSConfig(seed=1)


def test_round_trip():
    config = MoSConfig(
        target_modules=["q_proj", "v_proj"],
        exclude_modules=r".*\.0\..*",
        pool_dtype=torch.bfloat16,
        layers_to_transform={2, 1},
        layers_pattern="layers",
        rank_pattern={"q_proj": 3},
        use_rslora=True,
    )
    assert MoSConfig.from_dict(config.to_dict()) == config
    assert MoSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"unknown \['rank'\] and missing \['r'\]"):
        MoSConfig.from_dict({("rank" if k == "r" else k): v for k, v in config.to_dict().items()})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lora_alpha", "alpha"), ("lora_dropout", "dropout"), ("init_lora_weights", "init_weights"), ("rank", "r")],
)
def test_other_names_under_peft(name, meant):
    with pytest.raises(TypeError, match=f"{name} must be given as {meant}, the name that it has in MoSConfig"):
        mos_peft.MoSConfig(**{name: 1})


def test_the_configuration_of_the_other_package():
    model = stack()
    with pytest.raises(
        AttributeError, match=r"PEFT must be given the MoSConfig of mos_ext\.integrations\.peft, got a mos_"
    ):
        get_peft_model(model, MoSConfig(r=4))
    with pytest.raises(
        TypeError, match=r"got a mos_ext\.integrations\.peft\.config\.MoSConfig, which .* takes \(from mos_ext"
    ):
        mos_ext.adapt(model, mos_peft.MoSConfig(r=4))
    with pytest.raises(AttributeError, match="'MoSConfig' object has no attribute 'nothing'"):
        MoSConfig().nothing  # noqa: B018
    assert not hasattr(MoSConfig(), "peft_type")
    assert next(iter(inspect.signature(MoSConfig).parameters)) == "r"
