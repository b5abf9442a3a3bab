"""The PEFT configuration of MoS: the fields of ``mos_ext.MoSConfig`` and those that PEFT users expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

from ... import config as native
from .registration import add_peft_type

add_peft_type("MOS")

BIAS = ("none", "all", "mos_only")
_OF_METHOD = tuple(f.name for f in fields(native.MoSConfig))


@native.names_what_is_meant
@dataclass
class MoSConfig(PeftConfig):
    """Configuration of a Mixture-of-Shards adapter under PEFT.

    Every field of :class:`mos_ext.MoSConfig` is here under the same name, with the same meaning and default; and:

    Args:
        target_modules: additionally None, PEFT's own choice for the model's architecture.
        pool_dtype: additionally None (default), PEFT's rule: float32, or with ``autocast_adapter_dtype=False`` the
            dtype of the base layers.
        modules_to_save: modules to train and save whole, beside the adapter.
        bias: ``"none"``, ``"all"`` or ``"mos_only"``: biases of the base to train.
        fan_in_fan_out: whether weights are stored as (in, out); found out by itself, as for ``Conv1D``.
        table_digest: what an adapter file says of the index tables that its pools were trained with; loading checks it.
        init_weights: False also draws the B-pool at random, for tests that want an adapter that does something.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.
    """

    r: int = field(default=16, metadata={"help": "rank of every assembled A and B"})
    equivalent_rank: int = field(default=8, metadata={"help": "the LoRA rank with as many trainable parameters"})
    shards_per_vector: int = field(default=4, metadata={"help": "shards that make one rank vector"})
    private_rank: int = field(default=1, metadata={"help": "ranks of each layer that no other layer shares"})
    alpha: float = field(default=16, metadata={"help": "the adapter's product is scaled by alpha / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout of the adapter's input"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, endings of names, a regular expression, or 'all-linear'"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "name pattern -> r"})
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "name pattern -> alpha"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    pair_dissociation: bool = field(default=True, metadata={"help": "draw the indices of B independently of A's"})
    routing: str = field(default="random", metadata={"help": "'random' (the paper's) or 'balanced'"})
    pool_dtype: str | None = field(default=None, metadata={"help": "None follows autocast_adapter_dtype"})
    seed: int = field(default=0, metadata={"help": "of the index tables"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules to train and save whole"})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'mos_only'"})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "whether weights are stored as (in, out)"})
    init_weights: bool = field(default=True, metadata={"help": "False draws the B-pool at random too"})
    table_digest: str | None = field(default=None, metadata={"help": "of the index tables, in a file"})
    _saved_digest: ClassVar[str | None] = None  # of the tables in use, for files; the field may go to another model

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MOS  # type: ignore[attr-defined]
        if self.bias not in BIAS:
            raise ValueError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        for name in ("fan_in_fan_out", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        method = self.method()
        self.rank_pattern, self.alpha_pattern = dict(method.rank_pattern), dict(method.alpha_pattern)
        # Sets, as in PEFT's own configurations: they are compared with and added to.
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if self.pool_dtype is not None:
            self.pool_dtype = str(method.pool_dtype)

    def to_dict(self) -> dict:
        """Plain values for files, with the digest of the tables that were saved last."""
        return {**super().to_dict(), "table_digest": self._saved_digest or self.table_digest}

    def method(self, targets: Sequence[str] | None = None) -> native.MoSConfig:
        """The same adapter as a :class:`mos_ext.MoSConfig`; ``targets`` takes the place of ``target_modules``."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _OF_METHOD}
        values["exclude_modules"] = values["exclude_modules"] or ()
        values["pool_dtype"] = values["pool_dtype"] or "float32"
        values["layers_pattern"] = values["layers_pattern"] or None
        if targets is not None:
            values.update(target_modules=targets, exclude_modules=(), layers_to_transform=None, layers_pattern=None)
        elif values["target_modules"] is None:
            values["target_modules"] = ("the architecture's",)  # only validated: PEFT fills in what is meant
        return native.MoSConfig(**values)
