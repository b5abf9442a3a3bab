"""A pytest plugin for PEFT's own tests: MoS takes the place of every method they are parametrised with.

PEFT lists its methods in lists that its tests are parametrised with. A :class:`Cases` names such a list (or a test, if
the list stands in its decorator) and gives the values for MoS; these replace the list's when the tests are generated,
in the decorators' marks only: PEFT's files stay as they are. Tests without such a list are about another method and are
deselected. A list or test that a newer PEFT no longer has is an error, not a smaller suite.
"""

import collections
import functools
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
import types
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType, TaskType

from mos_ext.integrations.peft import MoSConfig

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers share the cores

if importlib.util.find_spec("diffusers") is None:
    # PEFT's tests import one name of diffusers, to ask whether a model is of that class. None is, in those run here.
    diffusers: Any = types.ModuleType("diffusers")
    diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", loader=None)
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = diffusers


# -------------------------------------------------------------------------------------------------- the cases

# In PEFT's small models nearly every linear is a type of its own. A pool of one layer has no more than equivalent_rank
# rank vectors, so r is that.
ALONE = {"r": 4, "equivalent_rank": 4, "private_rank": 1, "shards_per_vector": 2}
# In the transformers, tiny_hub.BLOCKS layers share a pool.
SHARED = {"r": 4, "equivalent_rank": 2, "private_rank": 1, "shards_per_vector": 2}


@dataclass(frozen=True)
class Cases:
    """What the parameter sets ``where`` become: the name of a list in ``file``, or of a test with a list in place."""

    file: str
    where: str
    values: list[Any]
    argnames: str = ""  # of a test with several parameters in place: which are meant

    def takes_over(self, mark: pytest.Mark, metafunc: pytest.Metafunc) -> bool:
        if metafunc.module.__name__.rpartition(".")[2] != self.file:
            return False
        if self.where.isupper():
            return mark.args[1] is getattr(metafunc.module, self.where, None)
        return metafunc.function.__name__ == self.where and self.argnames in ("", mark.args[0])


def small(name: str, model: str, **config: Any) -> Any:
    return pytest.param(name, model, MoSConfig, {**ALONE, **config}, id=name)


def pair(name: str, first: dict[str, Any], second: dict[str, Any]) -> Any:
    """Two adapters on one model, as keyword arguments."""
    return pytest.param(
        name, "mos", MoSConfig, {**ALONE, "init_weights": False, **first}, {**ALONE, "init_weights": False, **second}
    )


def config(**values: Any) -> MoSConfig:
    return MoSConfig(**{**ALONE, "init_weights": False, **values})


def transformers(task_type: str) -> list[Any]:
    values = {"task_type": task_type, "dropout": 0.05}
    everywhere = {"r": 8, "equivalent_rank": 4, "private_rank": 0, "shards_per_vector": 4, "routing": "balanced"}
    return [
        pytest.param(MoSConfig, {**values, "target_modules": None, **SHARED}, id="MoS"),
        pytest.param(MoSConfig, {**values, "target_modules": "all-linear", **everywhere}, id="MoS all-linear"),
    ]


# Where a test itself makes the configuration, it does so without arguments for r.
WITH_RANKS = pytest.param(functools.partial(MoSConfig, **ALONE), id="MoS")

SMALL_MODELS = [
    small("Vanilla MLP 1 MoS", "MLP", target_modules="lin0"),
    small("Vanilla MLP 2 MoS", "MLP", target_modules=["lin0"]),
    small("Vanilla MLP 3 MoS", "MLP", target_modules=["lin1"]),
    small("Vanilla MLP 4 MoS", "MLP", target_modules=["lin0", "lin1"]),
    small("Vanilla MLP 5 MoS", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    small("Vanilla MLP 6 MoS all private", "MLP", target_modules=["lin0", "lin1"], private_rank=4),
    small(
        "Vanilla MLP 7 MoS balanced",
        "MLP",
        target_modules=["lin0", "lin1"],
        routing="balanced",
        pair_dissociation=False,
        use_rslora=True,
    ),
    small("Embedding + transformers Conv1D 1 MoS", "EmbConv1D", target_modules=["conv1d"], shards_per_vector=1),
    small("Embedding + transformers Conv1D 2 MoS", "EmbConv1D", target_modules=["conv1d", "lin0"], shards_per_vector=1),
]

CASES = [
    # configurations
    Cases("test_config", "ALL_CONFIG_CLASSES", [pytest.param(MoSConfig, {}, id="MoS")]),
    Cases("test_config", "LAYER_INDEXING_CONFIG_CLASSES", [pytest.param(MoSConfig, {}, id="MoS")]),
    Cases("test_config", "test_save_pretrained_with_target_modules", [MoSConfig]),
    # small models
    Cases("test_custom_models", "TEST_CASES", SMALL_MODELS),
    Cases("test_custom_models", "ALL_PEFT_CONFIG_CLASSES", [WITH_RANKS]),
    Cases(
        "test_custom_models",
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
        [
            pair("MoS Same", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
            pair("MoS Same, other tables", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "seed": 1}),
            pair("MoS Different", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
        ],
    ),
    Cases("test_custom_models", "test_multiple_adapters_mixed_modules_to_save", [WITH_RANKS]),
    Cases("test_custom_models", "test_multiple_adapters_mixed_modules_to_save_order_switched", [WITH_RANKS]),
    Cases("test_custom_models", "test_adapter_name_makes_no_difference", [config(target_modules=["lin0"])]),
    # batches whose rows use different adapters
    Cases(
        "test_custom_models",
        "MIXED_ADAPTER_TEST_CASES",
        [
            (
                "MoS mixed adapter",
                config(target_modules=["lin0"]),
                config(target_modules=["lin0"], r=8, equivalent_rank=8),
            )
        ],
    ),
    Cases(
        "test_custom_models",
        "test_mixed_adapter_batches_different_target_layers",
        [
            (
                "MoS mixed adapter with different target layers",
                config(target_modules=["lin0"]),
                config(target_modules=["lin1"]),
            )
        ],
    ),
    Cases(
        "test_custom_models",
        "test_mixed_adapter_batches_multiple_modules_to_save",
        [
            (
                "MoS mixed adapter with modules to save",
                config(target_modules=["lin0"], modules_to_save=["lin1"]),
                config(target_modules=["lin0"], modules_to_save=["lin1"]),
            )
        ],
    ),
    Cases(
        "test_custom_models",
        "test_mixed_adapter_batches_partly_overlapping_target_layers",
        [
            (
                "MoS mixed adapter with overlapping layers",
                config(target_modules=["lin0"]),
                config(target_modules=["lin0", "lin1"]),
            )
        ],
    ),
    Cases(
        "test_custom_models",
        "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
        [("MoS mixed batch wrong adapter name", config(target_modules=["lin0"]))],
    ),
    Cases(
        "test_custom_models",
        "test_mixed_adapter_batches_unsupported_layer_raises",
        [
            (
                "MoS mixed adapter with unsupported layer",
                config(target_modules=["lin0"], modules_to_save=["gru"]),
                config(target_modules=["lin0"], modules_to_save=["gru"]),
            )
        ],
    ),
    Cases(
        "test_custom_models",
        "test_mixed_adapter_batches_lora_opt_timing",
        [
            (
                "MoS mixed adapter timing",
                config(task_type="CAUSAL_LM"),
                config(task_type="CAUSAL_LM", r=16, equivalent_rank=8),
                3.0,
            )
        ],
    ),
    # transformers
    Cases("test_decoder_models", "ALL_CONFIGS", transformers("CAUSAL_LM")),
    Cases("test_encoder_decoder_models", "ALL_CONFIGS", transformers("SEQ_2_SEQ_LM")),
    Cases("test_feature_extraction_models", "ALL_CONFIGS", transformers("FEATURE_EXTRACTION")),
    Cases("test_seq_classifier", "ALL_CONFIGS", transformers("SEQ_CLS")),
    Cases("test_token_classification_qa", "TOKEN_CLS_CONFIGS", transformers("TOKEN_CLS")),
    Cases("test_token_classification_qa", "QA_CONFIGS", transformers("QUESTION_ANS")),
    Cases(
        "test_quantization",
        "TEST_CASES",
        [
            (MoSConfig, {**SHARED, "target_modules": ["q_proj", "v_proj"]}),
            (MoSConfig, {"r": 16, "equivalent_rank": 8, "target_modules": ["q_proj", "v_proj"]}),
        ],
    ),
    # the rest
    Cases("test_low_level_api", "test_inject_adapter_in_model_rejects_shared_state_tuners", [(MoSConfig, ALONE)]),
    Cases(
        "test_other",
        "test_self_targeting_is_ignored",
        [
            (MoSConfig, {**ALONE, "target_modules": "l1.*"}),
            (MoSConfig, {**ALONE, "target_modules": "(l1|mos_).*"}),  # the pools' own names, too
        ],
    ),
    *(
        Cases(
            "test_torch_compile",
            test,
            [pytest.param((MoSConfig(task_type=TaskType.CAUSAL_LM, **SHARED), {}), id="mos")],
        )
        for test in ("test_causal_lm_training_trainer_compile", "test_causal_lm_training_pytorch_compile")
    ),
]

# Tests that go through PeftType. Ours is the only member they meet: other methods' dependencies need not be there.
OF_EVERY_METHOD = {("test_config", "test_from_peft_type")}

SHARED_POOLS = (
    "counts trainable tensors, but layers share a pool, so that there are as many with fewer layers adapted; PEFT "
    "skips VB-LoRA, VeRA and Uni-LoRA for it, too"
)
# Tests that do not hold for this method, or here, and why.
SKIPPED = {
    "test_training_decoders_layer_indexing": SHARED_POOLS,
    "test_training_encoder_decoders_layer_indexing": SHARED_POOLS,
    "test_training_layer_indexing": SHARED_POOLS,
    "test_from_pretrained_cache_dir": "downloads into an empty cache: needs the hub",
}

FLAT_ROWS = "OPT gives fc1 all tokens as rows, so that no row is an input of the batch; PEFT's LoRA refuses this, too"

# PEFT admits methods to these by comparing with its LoraConfig; for the time of such a test, that is ours.
ONLY_FOR_LORA = ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches")


# -------------------------------------------------------------------------------------------------- generating tests

_used: set[int] = set()  # numbers of CASES that a test has taken
_adapted: set[tuple[str, str]] = set()  # (module, qualified name) of the tests that took some
_lost: set[str] = set()  # what PEFT no longer has; reported as failures


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        for number, cases in enumerate(CASES):
            if cases.takes_over(mark, metafunc):
                # A function that names parameters still names ours; a list of names was for PEFT's values.
                ids = mark.kwargs.get("ids")
                kwargs = {"ids": ids} if callable(ids) else {}
                marks[i] = pytest.mark.parametrize(mark.args[0], cases.values, **kwargs).mark
                _used.add(number)
                _adapted.add(_key(metafunc.definition))


def _key(item: Any) -> tuple[str, str]:
    return item.module.__name__, item.function.__qualname__


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep, leave = [], []
    for item in items:
        module, name = item.module.__name__.rpartition(".")[2], item.function.__name__
        (keep if _key(item) in _adapted or (module, name) in OF_EVERY_METHOD else leave).append(item)
        if name in SKIPPED:
            item.add_marker(pytest.mark.skip(reason=SKIPPED[name]))
        if name in ONLY_FOR_LORA and "all-linear" in item.name and "OPT" in item.name:
            item.add_marker(pytest.mark.skip(reason=FLAT_ROWS))
    config.hook.pytest_deselected(items=leave)
    items[:] = keep
    if not any("::" in argument for argument in config.args):  # or only a part of a file was looked at
        collected = {item.module.__name__.rpartition(".")[2] for item in keep + leave}
        _lost.update(f"{c.file}.py: {c.where}" for i, c in enumerate(CASES) if i not in _used and c.file in collected)


# -------------------------------------------------------------------------------------------------- while they run


class _AllFetched(collections.defaultdict):  # type: ignore[type-arg]
    def __contains__(self, key: object) -> bool:
        return True


def pytest_collection_finish() -> None:
    common, utils = sys.modules.get("tests.testing_common"), sys.modules.get("tests.testing_utils")
    if utils is not None:
        # `hub_online_once` reaches for the hub when a model is used for the first time; there is none for us.
        _replace(utils, "_HUB_MODEL_ACCESSES", _AllFetched(int))
    if common is not None:
        # Leaves GPT-2 out for methods that are not in a list. MoS adapts Conv1D.
        _replace(common, "_skip_if_conv1d_not_supported", lambda *args: None)
    decoders = sys.modules.get("tests.test_decoder_models")
    if decoders is not None:
        # Meant for BEFT, it leaves Llama and Gemma out of the merging tests of every method.
        _replace(decoders, "check_beft_config", lambda *args: None)
    compiled = sys.modules.get("tests.test_torch_compile")
    if compiled is not None:
        _replace(compiled, "load_dataset_english_quotes", _quotes)


def _replace(module: types.ModuleType, name: str, value: Any) -> None:
    if not hasattr(module, name):
        raise pytest.UsageError(f"PEFT {metadata.version('peft')}: {module.__name__} has no {name}")
    setattr(module, name, value)


def _quotes() -> Any:
    """A data set of the form of the one on the hub."""
    from datasets import Dataset, DatasetDict

    quotes = [f"{a} {b} is worth {n} in the bush." for n in range(2, 7) for a in "AB" for b in ("bird", "word")]
    rows = {"quote": quotes, "author": ["nobody"] * len(quotes), "tags": [["none"]] * len(quotes)}
    return DatasetDict(train=Dataset.from_dict(rows))


@pytest.fixture(autouse=True)
def _admitted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function.__name__ in ONLY_FOR_LORA:
        monkeypatch.setattr("tests.testing_common.LoraConfig", MoSConfig)
        if hasattr(request.module, "LoraConfig"):
            monkeypatch.setattr(request.module, "LoraConfig", MoSConfig)
    if (request.module.__name__.rpartition(".")[2], request.function.__name__) in OF_EVERY_METHOD:
        monkeypatch.setattr(request.module, "PeftType", [PeftType.MOS])


# -------------------------------------------------------------------------------------------------- the report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mos-report", type=Path, help="file for the numbers, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "single_gpu_tests: PEFT's own")
    config.addinivalue_line("markers", "bitsandbytes: PEFT's own")
    config.mos_start = time.perf_counter()  # type: ignore[attr-defined]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["mos_lost"] = sorted(_lost)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    _lost.update(getattr(node, "workeroutput", {}).get("mos_lost", ()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path = config.getoption("--mos-report")
    if path is None:
        return
    stats = terminalreporter.stats
    skipped = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
    lost = [f"PEFT {metadata.version('peft')} has no parameters of this name: {name}" for name in sorted(_lost)]
    for line in lost:
        terminalreporter.write_line(line, red=True)
    result = {
        **{name: metadata.version(name) for name in ("peft", "transformers", "torch")},
        "passed": len(stats.get("passed", [])),
        "failed": lost + sorted({r.nodeid for kind in ("failed", "error") for r in stats.get(kind, [])}),
        "skipped": dict(skipped.most_common()),
        "seconds": round(time.perf_counter() - config.mos_start, 1),  # type: ignore[attr-defined]
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
