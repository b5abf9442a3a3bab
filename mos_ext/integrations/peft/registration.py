"""Adding a method to PEFT from outside its tree."""

from __future__ import annotations

from importlib import metadata

OLDEST = (0, 21)


def check_peft() -> None:
    """ImportError, in one sentence, unless a PEFT is installed that this integration was written for."""
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        raise ImportError("mos_ext.integrations.peft needs peft >= 0.21: pip install 'mos_ext[peft]'") from None
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if release < OLDEST:
        raise ImportError(f"mos_ext.integrations.peft must be used with peft >= 0.21, got peft {version}")


def add_peft_type(name: str) -> None:
    """Makes ``PeftType.<name>`` a real member of the enumeration, which is closed to outsiders otherwise.

    A bare string will not do: PEFT and transformers read ``peft_type.value``. Nothing happens for a member there is.
    """
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # since Python 3.12 members are found as attributes of the class


def register(config_cls: type, model_cls: type) -> None:
    """Tells PEFT about MoS, once."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    if PeftType.MOS not in PEFT_TYPE_TO_CONFIG_MAPPING:  # type: ignore[attr-defined]
        register_peft_method(name="mos", config_cls=config_cls, model_cls=model_cls)
    # Where PEFT's own methods are, for code that looks classes up by name.
    peft.MoSConfig, peft.MoSModel = config_cls, model_cls  # type: ignore[attr-defined]
