"""What is compared: every method as data, its learning rate, and how it is put on a model's linears or experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from torch import nn

import mos_ext
from mos_ext.routing import IndexTables

from .settings import Settings

# Of each family the rate with the lowest validation loss in tuning*.csv (--tune; a seed that no result uses). A family
# is what shares the scale alpha / r of its product, to which the best rate of Adam is tied.
RATES: dict[str, float] = {
    "lora-r2": 0.01,
    "lora-r4": 0.01,
    "lora-r16": 0.01,
    "pure": 0.01,
    "subset": 0.01,
    "mos-all": 0.02,
    "mos-r2": 0.01,
    "mos-r4": 0.01,
    "mos-r8": 0.01,
    "mos-r12": 0.02,
    "vera": 0.1,
    "vblora": 0.03,
    **dict.fromkeys(("experts-lora-r1", "experts-lora-r8", "experts-shared-outer"), 0.01),
    **dict.fromkeys(("experts-mos", "experts-mos-e0.5", "experts-mos-e0.25", "experts-mos-e0.125"), 0.02),
}
# What --tune tries; a grid goes on until its best is inside it.
_GRID = (3e-3, 1e-2, 2e-2, 3e-2)
GRIDS = {
    **dict.fromkeys(("lora-r2", "lora-r4", "lora-r16"), _GRID),
    **dict.fromkeys(("mos-r8", "pure", "subset", "mos-all", "mos-r2", "mos-r4", "mos-r12"), _GRID),
    "vera": (1e-2, 3e-2, 1e-1, 2e-1, 3e-1),
    "vblora": (3e-3, 1e-2, 3e-2, 6e-2, 1e-1),
    **dict.fromkeys(("experts-lora-r1", "experts-lora-r8", "experts-shared-outer"), (1e-3, *_GRID)),
    **dict.fromkeys(("experts-mos", "experts-mos-e0.5", "experts-mos-e0.25", "experts-mos-e0.125"), _GRID),
}


@dataclass(frozen=True)
class Method:
    """``options`` are those of the method's own configuration; ``groups`` the parts of the report it is in."""

    name: str
    label: str
    kind: str
    family: str
    groups: tuple[str, ...]
    options: dict = field(default_factory=dict)


def mos_options(s: Settings, **changes) -> dict:
    options = {
        "r": s.r,
        "equivalent_rank": s.equivalent_rank,
        "shards_per_vector": s.l,
        "private_rank": s.p,
        "pair_dissociation": True,
        "routing": "random",
    }
    return options | changes


def vera_rank(s: Settings) -> int:
    """The rank at which VeRA (r + out trainable parameters per module) is nearest to the budget."""
    modules = s.base.layers * len(s.base.types)
    outputs = s.base.layers * sum(out for _, out in s.base.types.values())
    return max(1, round((s.budget - outputs) / modules))


def vblora_vectors(s: Settings, r: int, length: int) -> int:
    """The size of the bank at which VB-LoRA, its logits included, is nearest to the budget."""
    return max(2, round(s.budget / (length + r * s.base.rank_one // length)))


def methods(s: Settings) -> dict[str, Method]:
    """All of them by name."""
    return of_experts(s) if s.base.experts else of_linears(s)


def of_experts(s: Settings) -> dict[str, Method]:
    """LoRA on every expert, of its smallest rank and as the ceiling; shared-outer; MoS of that budget and fractions."""
    found: dict[str, Method] = {}

    def add(name: str, label: str, kind: str, options: dict) -> None:
        found[name] = Method(name, label, kind, f"experts-{name}", ("main",), options)

    for r in (s.equivalent_rank, s.equivalent_rank * s.ceiling):
        add(f"lora-r{r}", f"LoRA r={r} per expert (PEFT)", "lora", {"r": r})
    r = 2 * s.equivalent_rank  # has the same budget, see settings.py
    add("shared-outer", f"shared-outer LoRA r={r}", "shared", {"r": r})
    for e in (s.equivalent_rank, *s.fractions):
        name, label = "mos" if e == s.equivalent_rank else f"mos-e{e:g}", f"MoS e={Fraction(e)} (r={s.r}, l={s.l})"
        options = {"r": s.r, "expert_equivalent_rank": e, "shards_per_vector": s.l, "private_rank": s.p}
        add(name, label, "mos", options)
    return found


def of_linears(s: Settings) -> dict[str, Method]:
    """A configuration that two questions ask for is one method, in two groups."""
    e, layers = s.equivalent_rank, s.base.layers
    found: dict[str, Method] = {}

    def add(name: str, label: str, kind: str, family: str, group: str, options: dict) -> None:
        same = next((m for m in found.values() if (m.kind, m.options) == (kind, options)), None)
        if same:
            groups = tuple(dict.fromkeys((*same.groups, group)))
            found[same.name] = Method(same.name, same.label, kind, same.family, groups, options)
        else:
            found[name] = Method(name, label, kind, family, (group,), options)

    def mos(name: str, label: str, group: str, family: str = "", **changes) -> None:
        options = mos_options(s, **changes)
        add(name, label, "mos", family or f"mos-r{options['r']}", group, options)

    def lora(r: int, group: str) -> None:
        add(f"lora-r{r}", f"LoRA r={r}", "lora", f"lora-r{r}", group, {"r": r})

    plain = {"private_rank": 0, "shards_per_vector": 1, "pair_dissociation": False}
    # VeRA first: its runs are the longest, and no worker should be left alone with one at the end.
    add("vera", "VeRA (PEFT)", "vera", "vera", "main", {"r": vera_rank(s)})
    lora(e, "main")
    mos("pure", "pure sharing", "main", "pure", r=e * layers, **plain)
    mos("subset", "pure sharing + subset selection", "main", "subset", **plain)
    mos("mos", f"MoS (r={s.r}, l={s.l}, p={s.p})", "main")
    # All public shards in every layer: the largest rank there is.
    mos("mos-all", "MoS - subset selection", "main", "mos-all", r=s.p + (e - s.p) * layers)
    mos("mos-paired", "MoS - pair dissociation", "main", pair_dissociation=False)
    mos("mos-whole", "MoS - vector sharding", "main", shards_per_vector=1)
    mos("mos-public", "MoS - privatization", "main", private_rank=0)
    length = math.gcd(s.base.hidden, s.base.intermediate)
    options = {"r": 2, "num_vectors": vblora_vectors(s, 2, length), "vector_length": length}
    add("vblora", "VB-LoRA (PEFT)", "vblora", "vblora", "main", options)
    lora(e * s.ceiling, "main")

    for l in s.l_sweep:
        mos(f"mos-l{l}", f"MoS l={l}", "l", shards_per_vector=l)
    for r in s.r_sweep:
        mos(f"mos-r{r}", f"MoS r={r}", "r", r=r)
    for r in s.routing_sweep:
        for routing in ("random", "balanced"):
            mos(f"mos-r{r}-{routing}", f"MoS r={r}, {routing} draw", "routing", r=r, routing=routing)
    big = s.p_equivalent_rank
    lora(big, "p")
    for p in s.p_sweep:
        mos(f"mos-e{big}-p{p}", f"MoS e={big}, p={p}", "p", equivalent_rank=big, private_rank=p)
    return found


def rate(s: Settings, method: Method) -> float:
    if s.lr is not None:
        return s.lr
    if method.family not in RATES:
        raise ValueError(f"RATES must have {method.family!r}: run --tune and enter its choice in methods.py")
    return RATES[method.family]


def put_on(model, method: Method, s: Settings, seed: int):
    """The adapted model. Torch's generator is the caller's to seed."""
    names, options = list(s.base.types), method.options
    targets = {"target_parameters": names, "target_modules": []} if s.base.experts else {"target_modules": names}
    if method.kind == "mos":
        return mos_ext.adapt(model, mos_ext.MoSConfig(**options, alpha=s.alpha, **targets, seed=seed))
    if method.kind == "shared":
        return put_shared_outer(model, options["r"], s, targets, seed)
    import peft

    if method.kind == "lora":
        config = peft.LoraConfig(**options, lora_alpha=s.alpha, **targets)
    elif method.kind == "vera":
        config = peft.VeraConfig(**options, **targets, projection_prng_key=seed)
    elif method.kind == "vblora":
        config = peft.VBLoRAConfig(**options, **targets)
    else:
        raise ValueError(f"kind must be mos, shared, lora, vera or vblora, got {method.kind!r}")
    return peft.get_peft_model(model, config)


def put_shared_outer(model, r: int, s: Settings, targets: dict, seed: int):
    """LoRA per expert whose side towards the residual stream is one for all experts of a layer, as of SGLang's.

    That is A of gate_up_proj and B of down_proj. A corner of the index tables: whole vectors (l = 1), of which matrix
    k has its own r on one side, and on the other those of its layer, in a pool that is as much smaller.
    """
    whole = {"r": r, "expert_equivalent_rank": r, "shards_per_vector": 1, "private_rank": 0}
    model = mos_ext.adapt(model, mos_ext.MoSConfig(**whole, alpha=s.alpha, **targets, seed=seed))
    own = np.arange(s.base.layers * s.base.experts * r, dtype=np.int32).reshape(-1, r, 1)
    shared = own[: s.base.layers].repeat(s.base.experts, axis=0)
    for pool in model.mos_pools.pools:
        outer = "a" if "gate_up_proj" in pool.stream else "b"
        values = getattr(pool, f"shards_{outer}")
        setattr(pool, f"shards_{outer}", nn.Parameter(values.detach()[: s.base.layers * r].clone()))
        a, b = (shared, own) if outer == "a" else (own, shared)
        pool.set_tables(IndexTables(a, b))
    return model


def parameter_groups(model, lr: float) -> list[dict]:
    """For the optimizer. VB-LoRA's logits learn ten times as fast as its vectors, as its authors have it."""
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trainable if "vblora_logits" not in n], "lr": lr},
        {"params": [p for n, p in trainable if "vblora_logits" in n], "lr": 10 * lr},
    ]
    return [g for g in groups if g["params"]]
