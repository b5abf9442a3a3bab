"""The layer by every provider: what each computes, on which inputs, and whether it is right.

A provider is a function of a `Data` that returns a `Built`; `step` makes of it what a `Case` times. To measure another
one without changing this file, name it in a file of its own: `PROVIDERS = {name: build}` (see planted.py).
"""

from __future__ import annotations

import contextlib
import functools
import math
import runpy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mos_ext import MoSConfig, MoSLinear, ShardPool, functional, reference
from mos_ext.ops.branch import Branch
from mos_ext.testing import ERROR_RATIO, error_floor, relative_error

from .harness import Sizes, Step, importable, normal, synchronize

# Providers that compute the same with other roundings or other dropout masks: a wrong one is far above this.
LOOSE_ERROR = 0.05
KINDS = ("full", "forward", "backward", "decode")


@dataclass(frozen=True)
class Case:
    """One measurement of a layer, or of ``layers`` that share a pool, one after the other.

    ``full``: forward and backward (y, dx, adapter gradients); ``forward`` and ``backward``: the one, then the other;
    ``decode``: forward without gradients.
    """

    kind: str
    rows: int
    fan_in: int
    fan_out: int
    r: int
    l: int
    dtype: torch.dtype
    providers: tuple[str, ...]
    dropout: float = 0.0
    role: str = ""  # long, medium or decode: the row of the GPU's table of goals
    shape: int = 0  # position in Sizes.shapes
    model: str = ""
    layers: int = 1
    e: int | None = None  # equivalent rank, the size of the pools; None: r

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.bfloat16 else f" {self.dtype_name}"
        dropout = f" p={self.dropout}" if self.dropout else ""
        ranks = " ranks" if any("r=" in p for p in self.providers) else f" r={self.r}"
        peer = f" {self.providers[-1]}" if self.role == "peers" else ""
        return f"{self.kind} T={self.rows} {self.fan_in}->{self.fan_out}{ranks}{dropout}{dtype}{peer}"

    def row(self) -> dict[str, object]:
        left_out = ("fan_in", "fan_out", "dtype", "providers")
        row = {k: v for k, v in vars(self).items() if k not in left_out}
        return {
            "what": "layer",
            "case": self.name,
            **row,
            "e": self.e or self.r,
            "in": self.fan_in,
            "out": self.fan_out,
            "dtype": self.dtype_name,
        }


@dataclass
class Data:
    """One set of inputs of a case. Pools whose values are never zero, by rank."""

    case: Case
    device: str
    x: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    weight: Tensor = field(init=False)
    pools: dict[int, ShardPool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        c = self.case
        make = functools.partial(normal, dtype=c.dtype, device=self.device)
        self.x = make(c.rows, c.fan_in).requires_grad_(c.kind != "decode")
        self.dy = make(c.rows, c.fan_out)
        self.weight = make(c.fan_out, c.fan_in, std=c.fan_in**-0.5)

    def pool(self, r: int) -> ShardPool:
        if r not in self.pools:
            c = self.case
            config = MoSConfig(r=r, equivalent_rank=c.e or r, shards_per_vector=c.l, private_rank=0, dropout=c.dropout)
            pool = ShardPool(config, c.fan_in, c.fan_out, c.layers, device=self.device)
            with torch.no_grad():
                # U(-1/sqrt(in), ...) is A's own start; B such that the product is as large as the base's.
                pool.shards_b.copy_(normal(*pool.shards_b.shape, dtype=torch.float32, device=self.device, std=r**-0.5))
            self.pools[r] = pool
        return self.pools[r]

    def linear(self) -> nn.Linear:
        base = nn.Linear(self.case.fan_in, self.case.fan_out, bias=False, device="meta", dtype=self.case.dtype)
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        return base

    @functools.cached_property
    def exact_base(self) -> tuple[Tensor, Tensor]:
        """y and dx of the base alone in float64."""
        weight = self.weight.double()
        return self.x.detach().double() @ weight.t(), self.dy.double() @ weight

    def of_rank(self, r: int) -> Data:
        """The same inputs for a case of another rank."""
        other = object.__new__(Data)
        other.__dict__.update(vars(self), case=replace(self.case, r=r))
        return other


@dataclass
class Built:
    """A provider on one set of inputs.

    Attributes:
        forward: y.
        trained: what the adapter's gradients are of.
        factors: turns these gradients into those of A and B, for comparison; None where there is no telling.
        state: parameters and buffers, which are there whatever T is.
        delta: the provider's own (out, in) change of the weight, where it is not the case's A and B.
    """

    forward: Callable[[], Tensor]
    trained: tuple[Tensor, ...] = ()
    factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    delta: Callable[[], Tensor] | None = None
    state: tuple[Tensor, ...] = ()


def step(d: Data, built: Built) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed, by the kind of the case."""

    def decode():
        with torch.no_grad():
            return (built.forward(),)

    def forward():
        return (built.forward(),)

    def full():
        y = built.forward()
        return (y.detach(), *torch.autograd.grad(y, (d.x, *built.trained), d.dy))

    graph: list[Tensor] = []

    def backward():
        # Of a graph made at the first call, which is never timed.
        if not graph:
            graph.append(built.forward())
        return torch.autograd.grad(graph[0], (d.x, *built.trained), d.dy, retain_graph=True)

    return {"decode": decode, "forward": forward, "full": full, "backward": backward}[d.case.kind]


# ------------------------------------------------------------------------------------------------ mos_ext and ATen


def draw_seed(device: str) -> Tensor:
    """As mos_ext.functional draws it, so that the same generator state gives the same mask."""
    return torch.randint(0, 2**62, (1,), device=device)


def frozen(d: Data) -> Built:
    linear = d.linear()
    return Built(lambda: linear(d.x))


def _state(*modules: nn.Module) -> tuple[Tensor, ...]:
    pools = [p for m in modules for p in m.modules() if isinstance(p, ShardPool)]
    tables = [t for pool in pools for t in (pool.index_a, pool.index_b)]
    return tuple(t for m in modules for t in (*m.parameters(), *m.buffers())) + tuple(tables)


def _of_pools(pool: ShardPool) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradients of pools as those of factors: each shard of a layer is used once."""
    return lambda a, b: (
        reference.gather_concat(a, pool.index_a[0]),
        reference.gather_concat(b, pool.index_b[0]),
    )


def _mos_layer(d: Data, pool: ShardPool) -> nn.Module:
    return MoSLinear.from_linear(d.linear(), pool=pool).train(d.case.kind != "decode")


def mos(d: Data, r: int | None = None) -> Built:
    """The layer as users have it, with a pool of its own: two more launches than a layer that shares one."""
    pool = d.pool(r or d.case.r)
    layer = _mos_layer(d, pool)
    return Built(lambda: layer(d.x), (pool.shards_a, pool.shards_b), _of_pools(pool), state=_state(layer))


def mos_layer(d: Data) -> Built:
    """One layer of many, without their pools' scatter_add, which runs once for all of them."""
    pool = d.pool(d.case.r)
    handles = pool.handle("a", 0), pool.handle("b", 0)
    recipe = pool(0, training=d.case.kind != "decode").recipe
    branch = Branch(pool.shards_a.detach(), pool.shards_b.detach(), *handles, recipe)
    forward = functools.partial(functional.linear, d.x, d.weight, None, branch)
    return Built(forward, handles, lambda a, b: (a, b), state=_state(_mos_layer(d, pool)))


class ATen(torch.autograd.Function):
    """The layer by ATen alone in the best order: the base's product accumulates into the low-rank one."""

    @staticmethod
    def forward(ctx, x, weight, pool_a, pool_b, index_a, index_b, scale, p):
        a = pool_a[index_a].reshape(index_a.shape[0], -1).to(x.dtype)
        b = pool_b[index_b].reshape(index_b.shape[0], -1).to(x.dtype)
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        s = dropped @ a.t()
        y = torch.addmm(x.new_empty(()), s, b, beta=0, alpha=scale)
        y.addmm_(x, weight.t())
        ctx.save_for_backward(dropped, mask, weight, a, b, s, index_a, index_b, pool_a, pool_b)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, weight, a, b, s, index_a, index_b, pool_a, pool_b = ctx.saved_tensors
        nothing = dy.new_empty(())
        ds = torch.addmm(nothing, dy, b.t(), beta=0, alpha=ctx.scale)
        grad_b = torch.addmm(nothing, s.t(), dy, beta=0, alpha=ctx.scale)
        grad_a = ds.t() @ dropped
        dx = ds @ a
        if mask is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, mask, 1 / (1 - ctx.p))
        dx.addmm_(dy, weight)
        grads = [
            torch.zeros_like(pool).index_add_(0, index.flatten(), grad.reshape(-1, pool.shape[1]).to(pool.dtype))
            for pool, index, grad in ((pool_a, index_a, grad_a), (pool_b, index_b, grad_b))
        ]
        return dx, None, *grads, None, None, None, None


def aten(d: Data) -> Built:
    pool = d.pool(d.case.r)
    index_a, index_b = pool.index_a[0].long(), pool.index_b[0].long()
    p = d.case.dropout if d.case.kind != "decode" else 0.0
    arguments = (d.weight, pool.shards_a, pool.shards_b, index_a, index_b, pool.config.scale, p)
    state = (*_state(pool), index_a, index_b)
    return Built(lambda: ATen.apply(d.x, *arguments), (pool.shards_a, pool.shards_b), _of_pools(pool), state=state)


def mos_reference(d: Data) -> Built:
    """``mos_ext.reference`` under plain autograd."""
    pool = d.pool(d.case.r)
    p = d.case.dropout if d.case.kind != "decode" else 0.0
    factors = (pool.shards_a, pool.index_a[0], pool.shards_b, pool.index_b[0], pool.config.scale)

    def forward():
        seed = draw_seed(d.device) if p else None
        return reference.mos_linear(d.x, d.weight, None, *factors, p, seed)

    return Built(forward, (pool.shards_a, pool.shards_b), _of_pools(pool), state=_state(pool))


# ------------------------------------------------------------------------------------------------ PEFT


class _One(nn.Module):
    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def _adapted(d: Data, config, **options) -> tuple[nn.Module, nn.Module]:
    """PEFT's model of one linear, and the layer that took its place: what is timed, for a model is wrapped once."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on models that are not of transformers
        model = get_peft_model(_One(d.linear()), config, **options).to(d.device)
    model.train(d.case.kind != "decode")
    return model, model.base_model.model.proj


def peft(d: Data, fp32: bool) -> Built:
    """PEFT's LoRA of equal rank with the same A and B: adapter in the base's dtype, or PEFT's default, float32."""
    from peft import LoraConfig

    pool, c = d.pool(d.case.r), d.case
    config = LoraConfig(r=c.r, lora_alpha=pool.config.alpha, lora_dropout=c.dropout, target_modules=["proj"])
    model, lora = _adapted(d, config, autocast_adapter_dtype=fp32)
    linear_a, linear_b = lora.lora_A["default"], lora.lora_B["default"]
    for linear in (linear_a, linear_b):
        linear.to(torch.float32 if fp32 else c.dtype)
    a, b = linear_a.weight, linear_b.weight
    with torch.no_grad():
        a.copy_(reference.gather_concat(pool.shards_a, pool.index_a[0]))
        b.copy_(reference.gather_concat(pool.shards_b, pool.index_b[0]).t())

    def forward():
        # As users train: on a GPU under autocast; on a CPU PEFT converts x itself.
        if not fp32 or d.device == "cpu":
            return lora(d.x)
        with torch.autocast(d.device, dtype=c.dtype):
            return lora(d.x)

    return Built(forward, (a, b), lambda grad_a, grad_b: (grad_a, grad_b.t()), state=_state(model))


def _with_delta(d: Data, model: nn.Module, layer: nn.Module) -> Built:
    """Of a PEFT method with factors of its own."""
    trained = tuple(p for p in model.parameters() if p.requires_grad)
    return Built(lambda: layer(d.x), trained, delta=lambda: layer.get_delta_weight("default"), state=_state(model))


def vblora(d: Data) -> Built:
    """PEFT's VB-LoRA of equal rank, with its default bank: 256 vectors of length 256, the best 2 of them."""
    from peft import VBLoRAConfig

    c = d.case
    length = math.gcd(256, c.fan_in, c.fan_out)  # 256 must divide both; tiny shapes have less
    config = VBLoRAConfig(r=c.r, vector_length=length, vblora_dropout=c.dropout, target_modules=["proj"])
    return _with_delta(d, *_adapted(d, config))


def unilora(d: Data) -> Built:
    """PEFT's Uni-LoRA of equal rank, with as many parameters as MoS's pools have."""
    from peft import UniLoraConfig

    c, pool = d.case, d.pool(d.case.r)
    length = pool.shards_a.numel() + pool.shards_b.numel()
    config = UniLoraConfig(r=c.r, theta_d_length=length, unilora_dropout=c.dropout, target_modules=["proj"])
    return _with_delta(d, *_adapted(d, config))


def compiled(build: Callable[[Data], Built]) -> Callable[[Data], Built]:
    """``build`` under ``torch.compile``, one graph for every T."""

    def build_compiled(d: Data) -> Built:
        # The kind `backward` runs one graph many times: it must not give its saved tensors away as scratch.
        torch._functorch.config.donated_buffer = False
        built = build(d)
        return replace(built, forward=torch.compile(built.forward, dynamic=True))

    return build_compiled


# ------------------------------------------------------------------------------------------------ all of them


def rank_providers(sizes: Sizes) -> dict[str, Callable[[Data], Built]]:
    return {f"mos r={r}": functools.partial(mos, r=r) for r in sizes.ranks}


_peft = functools.partial(peft, fp32=False)
PROVIDERS: dict[str, Callable[[Data], Built]] = {
    "frozen": frozen,
    "mos": mos,
    "mos_layer": mos_layer,
    "aten": aten,
    "peft": _peft,
    "peft_fp32": functools.partial(peft, fp32=True),
    "frozen_again": frozen,  # how far apart two measurements of the same thing are
    "reference": mos_reference,  # last of a GPU's: a failed capture can spoil those behind it
    "vblora": vblora,
    "unilora": unilora,
    "mos_compiled": compiled(mos),
    "peft_compiled": compiled(_peft),
}
PEERS = ("vblora", "unilora", "mos_compiled", "peft_compiled")
OF_PEFT = ("peft", "peft_fp32", "vblora", "unilora", "peft_compiled")
SEEDED = ("mos", "mos_layer", "reference")  # draw the same dropout mask from the same state of the generator


def providers_of(file: Path | None) -> dict[str, Callable[[Data], Built]]:
    """All providers; those that ``file`` defines are added, or replace what is here under the same name."""
    return PROVIDERS | (runpy.run_path(str(file))["PROVIDERS"] if file else {})


@dataclass
class Ready:
    """The providers of a case, built for every set of inputs, and why the others are not."""

    built: dict[str, list[Built]] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def make_ready(case: Case, sets: Sequence[Data], known: Mapping[str, Callable[[Data], Built]]) -> Ready:
    """Builds the case's providers and runs each once."""
    ready, device = Ready(), sets[0].device
    missing = importable("peft") if any(p in OF_PEFT for p in case.providers) else None
    for name in case.providers:
        if missing and name in OF_PEFT:
            ready.absent[name] = missing
            continue
        try:
            built = [known[name](d) for d in sets]
            steps = [step(d, b) for d, b in zip(sets, built, strict=True)]
            steps[0]()
            synchronize(device)
        except Exception as error:  # one provider's trouble (a new PEFT, say) must not cost the others
            # Where torch.compile cannot work there is no compiler; of ours it is tested in tests/test_compile.py.
            causes = ready.absent if name.endswith("_compiled") else ready.failed
            causes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            synchronize(device)
        else:
            ready.built[name], ready.steps[name] = built, steps
    return ready


@contextlib.contextmanager
def tf32_allowed(case: Case) -> Iterator[None]:
    """float32 is measured with torch's TF32 switch on: that is what it is for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or case.dtype == torch.float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ------------------------------------------------------------------------------------------------ errors


def errors(
    actual: Sequence[Tensor],
    plain: Sequence[Tensor] | None,
    exact: Sequence[Tensor],
    names: Sequence[str],
    operands: torch.dtype,
) -> dict[str, object]:
    """Relative errors against float64, and whether they are allowed.

    They are by the rule of ``mos_ext.testing`` where plain PyTorch's results are given, else below ``LOOSE_ERROR``.
    """
    row: dict[str, object] = {"error": {}, "error_ok": True}
    for k, name in enumerate(names):
        got = actual[k]
        error = relative_error(got, exact[k]) if torch.isfinite(got).all() else math.inf
        allowed = LOOSE_ERROR
        if plain is not None:
            allowed = ERROR_RATIO * relative_error(plain[k], exact[k]) + error_floor(got, operands)
        row["error"][name] = float(f"{error:.3g}") if math.isfinite(error) else "not finite"
        row["error_ok"] = bool(row["error_ok"] and got.shape == exact[k].shape and error <= allowed)
    return row


# What a step of each kind returns, in order; providers without factors to compare end before the gradients of them.
RESULTS = {
    "full": ("y", "dx", "grad_a", "grad_b"),
    "backward": ("dx", "grad_a", "grad_b"),
    "forward": ("y",),
    "decode": ("y",),
}


def _exact(d: Data, product: Callable[[Tensor], Tensor] | None, *factors: Tensor) -> tuple[Tensor, ...]:
    """What a step returns, in float64, for a layer that adds ``product(x)`` to the base's."""
    y, dx = d.exact_base
    grads: tuple[Tensor, ...] = (dx,)
    if product is not None:
        x = d.x.detach().double().requires_grad_()
        added = product(x)
        y = y + added.detach()
        added_dx, *of_factors = torch.autograd.grad(added, (x, *factors), d.dy.double())
        grads = (dx + added_dx, *of_factors)
    return {"full": (y, *grads), "backward": grads}.get(d.case.kind, (y,))


def exact_layer(d: Data, r: int, seed: Tensor | None) -> tuple[Tensor, ...]:
    """A step's results in float64, with the gradients of factors rather than pools."""
    pool = d.pool(r)
    a, b = (
        reference.gather_concat(p.detach(), index[0]).double().requires_grad_()
        for p, index in ((pool.shards_a, pool.index_a), (pool.shards_b, pool.index_b))
    )
    p = d.case.dropout if seed is not None else 0.0
    return _exact(d, lambda x: pool.config.scale * (reference.dropout(x, p, seed) @ a.t()) @ b, a, b)


def check_layer(d: Data, ready: Ready) -> dict[str, dict]:
    """Errors of every provider's step; those whose dropout masks are their own are not comparable."""
    case = d.case
    names = RESULTS[case.kind]

    def results(built: Built, run: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        torch.manual_seed(1)
        out = [t.detach() for t in run()]
        if built.factors and case.kind in ("full", "backward"):
            out[-2:] = built.factors(*out[-2:])
        return out

    dropping = case.dropout > 0.0 and case.kind != "decode"
    torch.manual_seed(1)
    seed = draw_seed(d.device) if dropping else None
    by_rank: dict[int, tuple] = {}

    def truths(r: int) -> tuple[tuple[Tensor, ...], list[Tensor] | None]:
        """In float64, and by plain PyTorch in the case's dtype."""
        if r not in by_rank:
            at_rank = d.of_rank(r)
            plain = mos_reference(at_rank)
            by_rank[r] = exact_layer(d, r, seed), results(plain, step(at_rank, plain))
        return by_rank[r]

    checked = {}
    for name, (built, *_) in ready.built.items():
        got = results(built, ready.steps[name][0])
        if dropping and not name.startswith("frozen") and name.partition(" ")[0] not in SEEDED:
            checked[name] = {"error": None, "error_ok": True}
        elif name.startswith("frozen") or built.delta:
            delta = built.delta().detach().double().t() if built.delta else None
            exact = _exact(d, None if delta is None else lambda x, delta=delta: x @ delta)
            checked[name] = errors(got, None, exact, names[: len(exact)], d.x.dtype)
        else:
            ours = name.partition(" ")[0] in ("mos", "mos_layer")
            exact, plain = truths(int(name.partition("r=")[2] or case.r))
            checked[name] = errors(got, plain if ours else None, exact, names, d.x.dtype)
    return checked
