"""Mixture of Shards (MoS) adapters for PyTorch, with native kernels.

    import mos_ext
    model = mos_ext.adapt(model, mos_ext.MoSConfig(r=16, equivalent_rank=8, shards_per_vector=4, private_rank=1))

See ``docs/start.md`` for a tour, ``python -m mos_ext`` for what was built.
"""

from . import functional, reference, serving
from ._version import __version__
from .adapt import ParameterReport, adapt, disabled, merge, parameter_report, unload, unmerge
from .checkpoint import load_adapter, save_adapter
from .config import MoSConfig
from .explain import Explanation, LayerExplanation, explain
from .linear import MoSLinear
from .lora import export_lora, lora_config, lora_state_dict
from .pools import ShardPool

__all__ = [
    "Explanation",
    "LayerExplanation",
    "MoSConfig",
    "MoSLinear",
    "ParameterReport",
    "ShardPool",
    "__version__",
    "adapt",
    "disabled",
    "explain",
    "export_lora",
    "functional",
    "load_adapter",
    "lora_config",
    "lora_state_dict",
    "merge",
    "parameter_report",
    "reference",
    "save_adapter",
    "serving",
    "unload",
    "unmerge",
]
