"""Which way every adapted layer takes through the library, and why it is not the fast one where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from .adapt import POOLS, adapter_of
from .linear import FUSED, AdaptedLayer
from .planner import by_role, expert_stacks, role_of, unwrap


@dataclass(frozen=True)
class LayerExplanation:
    """One adapted layer.

    Attributes:
        name: of the module.
        base: the class of its base layer.
        path: what a call takes now: ``"fused with the base layer"`` (native kernels, one node with the base: the fast
            way), ``"the base layer alone"`` (merged, or switched off), or the cause of another way.
        calls: path -> eager calls that took it so far. Compiled calls are not counted.
    """

    name: str
    base: str
    path: str
    calls: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: ``print`` it for a summary.

    Attributes:
        layers: those that are adapted.
        left_out: experts that are not, though ``"all-linear"`` asked for everything: parameter -> which argument would
            include it.
    """

    layers: tuple[LayerExplanation, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for path in _most_common(layer.path for layer in self.layers):
            here = [layer for layer in self.layers if layer.path == path]
            lines += [f"{len(here)} of {len(self.layers)} layers: {path}", f"    {_roles(here)}"]
        calls: Counter[str] = Counter()
        for layer in self.layers:
            calls.update(layer.calls)
        for path, count in calls.most_common():
            line = f"{count} calls: {path}"
            took = [layer for layer in self.layers if path in layer.calls]
            lines.append(line if path == FUSED else f"{line}\n    {_roles(took)}")
        return "\n".join(lines + [f"not adapted: {text}" for text in by_role(self.left_out)])


def _most_common(items: Iterable[str]) -> list[str]:
    return [item for item, _ in Counter(items).most_common()]


def _roles(layers: Iterable[LayerExplanation]) -> str:
    roles = Counter((role_of(layer.name), layer.base) for layer in layers)
    return ", ".join(f"{role} ({count} x {base})" for (role, base), count in roles.items())


def explain(model: nn.Module) -> Explanation:
    """Tells for every adapted layer of a model, MoS's own or PEFT's, which way its calls take and took.

    What keeps a layer from the native kernels, or from one node with its base, is named here and logged once per cause
    (logger ``mos_ext``). Dropout, a bias, any float dtype, any strides and any rank do not.

    Raises:
        ValueError: the model has no adapted layer, or other modules are in the place of some.
    """
    if hasattr(unwrap(model), POOLS):
        adapter_of(model)
    modules = dict(unwrap(model).named_modules())
    layers = tuple(
        LayerExplanation(name, module.base_name(), module.path(), dict(module.paths))
        for name, module in modules.items()
        if isinstance(module, AdaptedLayer)
    )
    if not layers:
        raise ValueError(f"model must have adapted layers, got a plain {type(model).__name__}")
    # What an adapter, or PEFT's tuner, has left out, as far as nobody else adapts it.
    left_out = [item for module in modules.values() for item in vars(module).get("left_out", {}).items()]
    stacks = tuple(f".{stack}" for stack in expert_stacks(unwrap(model)))
    out = {name: why for name, why in left_out if any(stack.endswith(f".{name}") for stack in stacks)}
    return Explanation(layers, out)
