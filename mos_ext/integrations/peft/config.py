"""The PEFT configuration of MoS: the fields of ``mos_ext.MoSConfig`` and those that PEFT users expect."""

from __future__ import annotations

import copy
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils.peft_types import PeftType
from torch import Tensor

from ... import config as native
from ... import files
from .registration import add_peft_type

add_peft_type("MOS")

BIAS = ("none", "all", "mos_only")
_OF_METHOD = tuple(f.name for f in fields(native.MoSConfig))
_saving = threading.local()  # what a thread is saving, see `note`


def note(config: MoSConfig, table_digest: str, tensors: Mapping[str, Tensor]) -> None:
    """Tells :meth:`MoSConfig.save_pretrained` what PEFT is about to write before it calls that."""
    _saving.config, _saving.digest = weakref.ref(config), table_digest
    _saving.tensors = {name: weakref.ref(tensor) for name, tensor in tensors.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, so that NaN is NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.contiguous().view(torch.uint8))


@native.names_what_is_meant
@dataclass
class MoSConfig(PeftConfig):
    """Configuration of a Mixture-of-Shards adapter under PEFT.

    Every field of :class:`mos_ext.MoSConfig` is here under the same name, with the same meaning and default; and:

    Args:
        target_modules: additionally None, PEFT's own choice for the model's architecture; where it has none, and there
            are ``target_parameters``, these alone.
        pool_dtype: additionally None (default), PEFT's rule: float32, or with ``autocast_adapter_dtype=False`` the
            dtype of the base layers.
        modules_to_save: modules to train and save whole, beside the adapter.
        bias: ``"none"``, ``"all"`` or ``"mos_only"``: biases of the base to train.
        fan_in_fan_out: whether weights are stored as (in, out); found out by itself, as for ``Conv1D``.
        format_version, table_digest, tensor_digest: what an adapter's files say of their format, of the index tables
            that the pools were trained with, and of the tensors; loading checks them.
        init_weights: False also draws the B-pool at random, for tests that want an adapter that does something.

    Raises:
        TypeError, ValueError: naming the argument, the rule and the value.

    Source: Wang et al., ICLR 2025 (https://arxiv.org/abs/2410.00938).
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
    target_parameters: list[str] | str | None = field(default=None, metadata={"help": "parameters that stack experts"})
    expert_equivalent_rank: float | None = field(default=None, metadata={"help": "equivalent_rank of the experts"})
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
    format_version: int | None = field(default=None, metadata={"help": "of the adapter's files"})
    table_digest: str | None = field(default=None, metadata={"help": "of the index tables, in a file"})
    tensor_digest: str | None = field(default=None, metadata={"help": "of the tensors, in a file"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MOS  # type: ignore[attr-defined]
        if self.bias not in BIAS:
            raise ValueError(f"bias must be one of {', '.join(BIAS)}, got {self.bias!r}")
        if self.format_version not in (None, files.FORMAT_VERSION):
            raise ValueError(f"format_version must be {files.FORMAT_VERSION}, got {self.format_version!r}")
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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """See ``PeftConfig.save_pretrained``. Where a model calls it, after its weights, it also writes their digest,
        and what loading needs to the model card; a configuration that is saved alone says nothing of weights.

        Raises:
            ValueError: the weights are not those that were just saved: somebody else is saving into the directory.
        """
        folder, own = Path(save_directory), copy.copy(self)
        own.format_version = own.table_digest = own.tensor_digest = None
        contents: dict[str, bytes] = {}
        if "auto_mapping_dict" in kwargs:
            own.format_version = files.FORMAT_VERSION
            noted = getattr(_saving, "config", None)
            known = noted is not None and noted() is self
            own.table_digest = _saving.digest if known else None
            if (folder / files.WEIGHTS).is_file():
                own.tensor_digest = self._digest_of(folder / files.WEIGHTS, _saving.tensors if known else {})
            contents = files.with_card(folder, contents)
        with tempfile.TemporaryDirectory() as beside:
            super(MoSConfig, own).save_pretrained(beside, **kwargs)
            contents[files.CONFIG] = files.read(Path(beside, files.CONFIG))
        files.write(folder, contents)

    @staticmethod
    def _digest_of(file: Path, saved: Mapping[str, weakref.ref[Tensor]]) -> str:
        content = files.read(file)
        there = files.tensors_of(content, file)
        for name, reference in saved.items():
            tensor = reference()
            if tensor is not None and not (name in there and _same(there[name], tensor.detach().cpu())):
                raise ValueError(
                    f"{file} must hold what was just saved, got another {name}: another save into this directory is "
                    f"under way, or an old file lies beside new ones of another format"
                )
        return files.tensor_digest(content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """See ``PeftConfig.from_pretrained``.

        Raises:
            ValueError: the weights beside it are damaged, or of another save.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        file = Path(pretrained_model_name_or_path, subfolder or "", files.WEIGHTS)
        digest = getattr(config, "tensor_digest", None)  # (PEFT returns whatever type of configuration the file is of)
        if digest is not None and file.is_file():
            files.read_weights(file, digest)
        return config

    def method(self, targets: Sequence[str] | None = None, parameters: Sequence[str] = ()) -> native.MoSConfig:
        """The same adapter as a :class:`mos_ext.MoSConfig`; with ``targets`` for just these and ``parameters``."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _OF_METHOD}
        values["exclude_modules"] = values["exclude_modules"] or ()
        values["target_parameters"] = values["target_parameters"] or ()
        values["pool_dtype"] = values["pool_dtype"] or "float32"
        values["layers_pattern"] = values["layers_pattern"] or None
        if targets is not None:
            values.update(target_modules=targets, target_parameters=parameters)
            values.update(exclude_modules=(), layers_to_transform=None, layers_pattern=None)
        elif values["target_modules"] is None:
            values["target_modules"] = ("the architecture's",)  # only validated: PEFT fills in what is meant
        return native.MoSConfig(**values)
