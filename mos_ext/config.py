"""What an adapter is: the ranks, the sharding, the draw and the modules; validated once, not to be changed later."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from typing import Any, TypeVar

import torch

from .ops.checks import check_integer, check_number

ROUTINGS = ("random", "balanced")
MAX_RANK = 256
_PATTERN = r"(.*\.)?({})$"  # what a key of rank_pattern or alpha_pattern stands for
T = TypeVar("T")
POOL_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What other libraries call these fields.
_MEANT = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "e": "equivalent_rank",
    "l": "shards_per_vector",
    "init_lora_weights": "init_weights",
}
# Attributes that PEFT asks of a configuration, and fields that only its own has.
_OF_PEFT = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "is_prompt_learning")
_PEFT_FIELDS = (*_OF_PEFT, "init_weights", "modules_to_save", "bias", "fan_in_fan_out", "revision")


def names_what_is_meant(cls: type[T]) -> type[T]:
    """A class decorator for configurations: an argument known under another name is a TypeError that says which."""
    init = cls.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for name in kwargs.keys() - known:
            meant = _MEANT.get(name, name)
            if meant in known:
                raise TypeError(f"{name} must be given as {meant}, the name that it has in MoSConfig")
            if meant in _PEFT_FIELDS:
                raise TypeError(
                    f"{name} must be given to the MoSConfig of mos_ext.integrations.peft, as {meant}, and that one to "
                    f"peft.get_peft_model; this is mos_ext.MoSConfig"
                )
        init(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[method-assign, misc]
    return cls


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_expression(name: str, expression: str, shown: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # Python 3.10's of what newer ones refuse
            re.compile(expression)
    except (re.error, DeprecationWarning) as error:
        raise ValueError(f"{name} must be a valid regular expression, got {shown!r} ({error})") from None


def _patterns(name: str, value: object) -> str | tuple[str, ...]:
    """A regular expression as it is; a collection of names as a tuple."""
    if isinstance(value, str):
        _check_expression(name, value, value)
        return value
    if not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    names = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
    if not all(isinstance(n, str) for n in names):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    return names


def by_pattern(name: str, value: object, check: Callable[[str, Any], None]) -> dict[str, Any]:
    """A dictionary from regular expressions to values, each of which ``check`` accepts."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dictionary from name patterns to values, got {value!r}")
    for pattern, entry in value.items():
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must have strings as keys, got {pattern!r}")
        _check_expression(name, _PATTERN.format(pattern), pattern)
        check(f"{name}[{pattern!r}]", entry)
    return dict(value)


def matching_patterns(patterns: Mapping[str, Any], module: str) -> dict[str, Any]:
    """The patterns that match a module's whole name, or the end of it after a dot, with their values."""
    return {pattern: value for pattern, value in patterns.items() if re.match(_PATTERN.format(pattern), module)}


def pattern_value(name: str, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value that the patterns of field ``name`` give a module: of one that matches its whole name or the end of it.

    Raises:
        ValueError: patterns that match give different values. PEFT takes the first then, but files do not keep the
            order.
    """
    matching = matching_patterns(patterns, module)
    if len(set(matching.values())) > 1:
        raise ValueError(f"{name} must give {module} one value, got {matching}")
    return next(iter(matching.values()), default)


@names_what_is_meant
@dataclass(frozen=True)
class MoSConfig:
    """Configuration of a Mixture-of-Shards adapter.

    Args:
        r: active rank, the rank of every assembled A and B. 1 to 256.
        equivalent_rank: the LoRA rank with the same number of trainable parameters (``e``); it sizes the pools, e * L
            * l shards for L layers. 1 to 256: L layers of rank 256 cannot use more.
        shards_per_vector: shards that make one rank vector (``l``); must divide in_features and out_features of every
            adapted module.
        private_rank: ranks of each layer that no other layer shares (``p``).
        alpha: the adapter's product is scaled by alpha / r.
        dropout: probability in [0, 1) with which an element of the adapter's input is dropped in training; rounded to
            the nearest 1/65536.
        target_modules: ``"all-linear"`` (every supported linear inside a numbered block, so heads and poolers are left
            out; every one but the output head where no block is numbered), a list of module names or name endings
            (``["q_proj", "mlp.down_proj"]``), or a regular expression that matches whole names. ``"all-linear"`` runs
            on every model, and a line of the log names what it does not adapt like the rest: linears that
            ``shards_per_vector`` does not divide, or whose weights their parents read instead of calling them, are
            left out, and modules too few for r get the largest rank they can have, written into ``rank_pattern`` (so
            they are scaled by alpha / that rank).
        target_parameters: names or name endings of parameters that stack the experts of a mixture-of-experts model of
            transformers 5, one matrix each: ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``; matched as PEFT
            does. Beside ``target_modules``, or alone with ``target_modules=[]``. All experts of all layers with one
            role and one shape share one pool. ``"all-linear"`` does not include them, and the log says which there are.
        expert_equivalent_rank: ``equivalent_rank`` of the experts, which may be a fraction (1/8, say) as long as their
            pool has a whole number of shards, and at least r * l public ones; None is ``equivalent_rank``. Experts have
            ``private_rank`` private ranks where that is less than their equivalent rank, else none.
        exclude_modules: names or a regular expression to leave out, read like ``target_modules``.
        layers_to_transform: the number of the block, or numbers of the blocks, to adapt; None adapts all. Only with a
            list of ``target_modules``.
        layers_pattern: the name, or names, of the list of blocks that ``layers_to_transform`` counts (``"layers"``);
            None takes the first number in a module's name.
        rank_pattern: ``{pattern: r}`` for modules whose name, or the end of it, matches a regular expression. The
            pools stay as they are. Patterns that match one module must agree.
        alpha_pattern: ``{pattern: alpha}``, likewise.
        use_rslora: scale by alpha / sqrt(r) instead of alpha / r (rank-stabilised LoRA, arXiv 2312.03732).
        pair_dissociation: draw the indices of B independently of those of A. ``False`` gives B the indices of A.
        routing: ``"random"``, the paper's draw, or ``"balanced"``: every public shard is used equally often, up to one.
        pool_dtype: ``"float32"`` (default) whatever the base model's dtype, or ``"float64"``, ``"bfloat16"``,
            ``"float16"``; a torch.dtype also works.
        seed: of the index tables, which are the same on every platform and for every version of torch. (Initial values
            come from torch's own generator, as for every layer.)

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    The paper's ablations are configurations too, for L layers: pure sharing is ``r = e * L, private_rank=0,
    shards_per_vector=1, pair_dissociation=False``; vanilla LoRA of rank e is ``r = private_rank = equivalent_rank =
    e``; subset selection alone is ``private_rank=0, shards_per_vector=1, pair_dissociation=False``; and each of the
    other strategies switches with its own field.

    Source: Wang et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
    ICLR 2025, arXiv 2410.00938.
    """

    r: int = 16
    equivalent_rank: int = 8
    shards_per_vector: int = 4
    private_rank: int = 1
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    target_parameters: str | Sequence[str] = ()
    expert_equivalent_rank: float | None = None
    exclude_modules: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False
    pair_dissociation: bool = True
    routing: str = "random"
    pool_dtype: str | torch.dtype = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("equivalent_rank", self.equivalent_rank, 1)
        if self.equivalent_rank > MAX_RANK:
            raise ValueError(f"equivalent_rank must be at most {MAX_RANK}, got {self.equivalent_rank}")
        check_integer("shards_per_vector", self.shards_per_vector, 1)
        check_integer("private_rank", self.private_rank, 0)
        if self.private_rank > self.equivalent_rank:
            raise ValueError(
                f"private_rank must be at most equivalent_rank={self.equivalent_rank}, got {self.private_rank}"
            )
        self.check_rank("r", self.r)
        object.__setattr__(self, "rank_pattern", by_pattern("rank_pattern", self.rank_pattern, self.check_rank))
        object.__setattr__(self, "alpha_pattern", by_pattern("alpha_pattern", self.alpha_pattern, check_number))
        _boolean("use_rslora", self.use_rslora)
        check_number("alpha", self.alpha)
        check_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        _boolean("pair_dissociation", self.pair_dissociation)
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {self.routing!r}")
        check_integer("seed", self.seed, 0)
        dtype = self.pool_dtype
        name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
        if not isinstance(name, str) or name not in POOL_DTYPES:
            raise ValueError(f"pool_dtype must be one of {', '.join(POOL_DTYPES)}, got {dtype!r}")
        object.__setattr__(self, "pool_dtype", name)
        object.__setattr__(self, "target_modules", _patterns("target_modules", self.target_modules))
        object.__setattr__(self, "exclude_modules", _patterns("exclude_modules", self.exclude_modules))
        object.__setattr__(self, "target_parameters", _patterns("target_parameters", self.target_parameters))
        if not self.target_modules and not self.target_parameters:
            raise ValueError(f"target_modules must name at least one module, got {self.target_modules!r}")
        if (e := self.expert_equivalent_rank) is not None:
            check_number("expert_equivalent_rank", e)
            if not 0 < e <= MAX_RANK:
                raise ValueError(f"expert_equivalent_rank must be above 0 and at most {MAX_RANK}, got {e}")
            if not self.target_parameters:
                raise ValueError(f"expert_equivalent_rank must come with target_parameters, got {e} without")
        self._check_layers()

    def check_rank(self, name: str, r: object) -> None:
        """ValueError or TypeError unless r can be the rank of a layer of this adapter; ``name`` is what r is called."""
        check_integer(name, r, 1)
        assert isinstance(r, int)
        if r > MAX_RANK:
            raise ValueError(f"{name} must be at most {MAX_RANK}, got {r}")
        if self.private_rank > r:
            raise ValueError(f"private_rank must be at most {name}={r}, got {self.private_rank}")
        if self.private_rank == self.equivalent_rank and r != self.equivalent_rank:
            raise ValueError(
                f"{name} must equal equivalent_rank={self.equivalent_rank} when private_rank equals it "
                f"(no shard is public), got {r}"
            )

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is None:
            if self.layers_pattern:
                raise ValueError(
                    f"layers_to_transform must be given with layers_pattern={self.layers_pattern!r}, got None"
                )
            object.__setattr__(self, "layers_pattern", None)  # an empty list, say, could not be hashed
            return
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform must come with a list of target_modules, got {self.target_modules!r}"
            )
        numbers = (layers,) if isinstance(layers, int) else layers
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            raise TypeError(f"layers_to_transform must be a number or a list of numbers, got {layers!r}")
        numbers = tuple(sorted(numbers) if isinstance(numbers, (set, frozenset)) else numbers)
        for number in numbers:
            check_integer("layers_to_transform", number, 0)
        object.__setattr__(self, "layers_to_transform", numbers)
        pattern = self.layers_pattern
        if pattern is not None:
            names = (pattern,) if isinstance(pattern, str) else _patterns("layers_pattern", pattern)
            for name in names:
                _check_expression("layers_pattern", rf"(?:^|.*?\.){name}\.(\d+)\.", name)
            object.__setattr__(self, "layers_pattern", tuple(names) or None)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PEFT:
            raise AttributeError(
                f"PEFT must be given the MoSConfig of mos_ext.integrations.peft, got a mos_ext.MoSConfig (which has no "
                f"{name}): from mos_ext.integrations.peft import MoSConfig"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def scale(self) -> float:
        """What multiplies the low-rank product where no pattern matches, alpha / r or alpha / sqrt(r)."""
        return self._scale(self.alpha, self.r)

    def _scale(self, alpha: float, r: int) -> float:
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def rank_of(self, module: str) -> int:
        """r of the module called so."""
        return pattern_value("rank_pattern", self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """:attr:`scale` of the module called so."""
        alpha = pattern_value("alpha_pattern", self.alpha_pattern, module, self.alpha)
        return self._scale(alpha, self.rank_of(module))

    @property
    def torch_pool_dtype(self) -> torch.dtype:
        """``pool_dtype`` as a torch.dtype."""
        return POOL_DTYPES[str(self.pool_dtype)]

    def for_experts(self) -> MoSConfig:
        """The same with the equivalent rank of experts, and with the private ranks that leaves them."""
        e = self.equivalent_rank if self.expert_equivalent_rank is None else self.expert_equivalent_rank
        of_experts = copy.copy(self)  # as it is: only here may e be a fraction
        object.__setattr__(of_experts, "equivalent_rank", e)
        object.__setattr__(of_experts, "private_rank", self.private_rank if self.private_rank < e else 0)
        return of_experts

    def num_shards(self, num_layers: int) -> int:
        """Shards of one pool, n = e * L * l."""
        return round(self.equivalent_rank * num_layers * self.shards_per_vector)

    def num_public_shards(self, num_layers: int) -> int:
        """Shards of one pool that any layer may use, (e - p) * L * l."""
        return self.num_shards(num_layers) - self.private_rank * num_layers * self.shards_per_vector

    def to_dict(self) -> dict:
        """Plain JSON values; :meth:`from_dict` reverses it."""
        out = asdict(self)
        for key, value in out.items():
            if isinstance(value, tuple):
                out[key] = list(value)
        return out

    @classmethod
    def from_dict(cls, values: dict) -> MoSConfig:
        """The configuration of :meth:`to_dict`; unknown or missing fields are a ValueError."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            unknown, missing = sorted(set(values) - names), sorted(names - set(values))
            raise ValueError(
                f"an MoSConfig must have exactly its own fields, got unknown {unknown} and missing {missing}"
            )
        return cls(**values)
