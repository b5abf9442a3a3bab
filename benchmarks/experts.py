"""What do adapters on every expert cost over the frozen block, and how does that grow with the number of experts?

    python -m benchmarks.experts FILE.csv [--grid default|smoke] [--seconds N] [--only TEXT]

Four questions. *block*: one experts module of transformers, forward and backward, with MoS, with PEFT's LoRA on
``target_parameters``, and with MoS as a loop over experts in plain PyTorch, each a ratio to the frozen block of the
same round. *growth*: the same over 8 to 256 experts at the same number of rows. *rows*: the operator alone, 64 rows of
a decode step that use 1, 8 or 64 adapters. *scatter*: how long the factor gradients of 6 to 48 layers of 128 experts
take to be added up in their pool, for each layer, beside ATen's ``index_put_``. Tables go to FILE.md. README.md says
what the columns mean.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mos_ext import MoSConfig, reference
from mos_ext.experts import Routing, adapted_experts
from mos_ext.pools import ShardPool
from mos_ext.routing import invert

from .harness import CPU, SMOKE, Sizes, Step, importable, measure, normal, release, saved_bytes
from .memory import ask_for_peaks, tell_peak, tell_peaks
from .rows import answer, command_line

ops = torch.ops.mos_ext
R, L_SHARDS = 16, 4
PROVIDERS = ("frozen", "mos", "frozen_again", "peft", "loop")
SHORT = PROVIDERS[:3]
STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A block of ``experts``, of which each of ``tokens`` uses ``top_k``."""

    model: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    dtype: torch.dtype
    routing: str = "uniform"
    providers: tuple[str, ...] = PROVIDERS

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"block {self.model} {self.dtype_name} {self.routing}"

    def row(self) -> dict[str, object]:
        return {
            "question": "experts",
            "model": self.model,
            "case": f"{self.experts} experts, top {self.top_k}",
            "mode": self.routing,
            "T": self.tokens,
            "in": self.hidden,
            "out": self.intermediate,
            "dtype": self.dtype_name,
            "r": R,
            "l": L_SHARDS,
        }

    def choices(self) -> Tensor:
        """(T, k) experts: each equally likely, or the e-th as 1 / (e + 1), as trained routers are."""
        likely = torch.ones(self.experts)
        if self.routing == "skewed":
            likely /= torch.arange(1, self.experts + 1)
        generator = torch.Generator().manual_seed(0)
        return torch.multinomial(likely.expand(self.tokens, -1), self.top_k, generator=generator)


def grid(which: str) -> list[Case]:
    if which == "smoke":
        smoke = [Case("smoke", 16, 32, 16, 2, 24, d, r) for d in DTYPES for r in ("uniform", "skewed")]
        return [*smoke, Case("growth E=20", 20, 32, 16, 2, 24, DTYPES[0], providers=SHORT)]
    small, large = ("E=32 h=512 m=192", 32, 512, 192, 4, 512), ("E=64 h=1024 m=384", 64, 1024, 384, 8, 1024)
    # Of 128 experts, a quarter: with LoRA's copies of all weights and their gradients more would not fit into 16 GiB.
    qwen = ("Qwen3-30B-A3B, 32 experts", 32, 2048, 768, 8, 512)
    return [
        *(Case(*size, d, "uniform") for size in (small, large) for d in DTYPES),
        *(Case(*size, torch.bfloat16, "skewed") for size in (small, large)),
        Case(*qwen, torch.bfloat16, "uniform"),
        *(Case(f"growth E={e}", e, 512, 192, 4, 2048, torch.bfloat16, providers=SHORT) for e in COUNTS),
    ]


DTYPES = (torch.bfloat16, torch.float32)
COUNTS = (8, 16, 32, 64, 128, 256)


# ------------------------------------------------------------------------------------------------ one block


class Data:
    """A frozen module, and what a router and the loss give it."""

    def __init__(self, case: Case) -> None:
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=case.hidden,
            moe_intermediate_size=case.intermediate,
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
        )
        config._experts_implementation = "grouped_mm"  # transformers' own choice
        self.case, self.module = case, Qwen3MoeExperts(config).to(case.dtype).requires_grad_(False)
        for name, width in zip(STACKS, (case.hidden, case.intermediate), strict=True):
            weight = self.module._parameters[name]
            assert weight is not None
            weight.data = normal(*weight.shape, dtype=case.dtype, device="cpu", std=width**-0.5)
        self.x = normal(case.tokens, case.hidden, dtype=case.dtype, device="cpu").requires_grad_()
        self.index = case.choices()
        weights = torch.full((case.tokens, case.top_k), 1.0 / case.top_k, dtype=case.dtype)
        self.weights = weights.requires_grad_()
        self.dy = normal(case.tokens, case.hidden, dtype=case.dtype, device="cpu")

    def pools(self) -> dict[str, ShardPool]:
        least = max(1, R // self.case.experts)  # that gives every expert rank R
        config = MoSConfig(r=R, equivalent_rank=least, shards_per_vector=L_SHARDS, private_rank=0, alpha=R)
        sides = {"gate_up_proj": (self.case.hidden, 2 * self.case.intermediate)}
        sides["down_proj"] = self.case.intermediate, self.case.hidden
        made = {}
        for name, (fan_in, fan_out) in sides.items():
            torch.manual_seed(0)
            made[name] = ShardPool(config, fan_in, fan_out, 1, experts=self.case.experts, stream=name)
            nn.init.normal_(made[name].shards_b, std=R**-0.5)
        return made


@dataclass
class Built:
    """``forward`` of a provider, and what it trains beside x and the router's weights."""

    forward: Callable[[], Tensor]
    trained: Sequence[Tensor]


def frozen(d: Data) -> Built:
    return Built(lambda: d.module(d.x, d.index, d.weights), ())


def mos(d: Data) -> Built:
    pools = d.pools()
    layer = adapted_experts(d.module, {name: (pool, 0) for name, pool in pools.items()})
    trained = [p for pool in pools.values() for p in pool.parameters()]
    return Built(lambda: layer(d.x, d.index, d.weights), trained)


def loop(d: Data) -> Built:
    """The same by a loop over experts in plain PyTorch: what one writes without the operator."""
    pools = d.pools()
    trained = [p for pool in pools.values() for p in pool.parameters()]

    def branch(x: Tensor, name: str, e: int) -> Tensor:
        pool = pools[name]
        tables = (pool.index_a[e], pool.shards_b, pool.index_b[e])
        return reference.low_rank(x, pool.shards_a, *tables, pool.scales[0])

    def forward() -> Tensor:
        routing, out, begin = Routing.of(d.index, d.case.experts), [], 0
        for e, end in enumerate(routing.ends.tolist()):
            x = d.x[routing.token[begin:end]]
            gate_up = nn.functional.linear(x, d.module.gate_up_proj[e]) + branch(x, "gate_up_proj", e)
            gated = d.module._apply_gate(gate_up)
            out.append(nn.functional.linear(gated, d.module.down_proj[e]) + branch(gated, "down_proj", e))
            begin = end
        own = d.weights.reshape(-1)[routing.order].unsqueeze(-1)
        return routing.combine(torch.cat(out) * own)

    return Built(forward, trained)


def peft(d: Data) -> Built:
    """LoRA of the same rank on ``target_parameters``, as PEFT has it: W + BA of all experts at every call."""
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = adapted_experts(d.module, {}).release()  # a copy that shares the weights

        def forward(self, *arguments: Tensor) -> Tensor:
            return self.experts(*arguments)

    config = LoraConfig(r=R, lora_alpha=R, target_modules=[], target_parameters=[f"experts.{name}" for name in STACKS])
    model = get_peft_model(Model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=R**-0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Built(lambda: model(d.x, d.index, d.weights), trained)


BUILDERS = {"frozen": frozen, "frozen_again": frozen, "mos": mos, "loop": loop, "peft": peft}


def step_of(d: Data, built: Built) -> Step:
    wanted = [d.x, d.weights, *built.trained]
    return lambda: torch.autograd.grad(built.forward(), wanted, d.dy)


def check(d: Data, built: dict[str, Built]) -> float:
    """The largest error of MoS against the loop in float64, relative to the largest result; within that dtype's eps."""
    wide = Data.__new__(Data)
    vars(wide).update(vars(d))
    wide.module = copy.deepcopy(d.module).double()
    wide.x, wide.weights, wide.dy = (t.detach().double().requires_grad_() for t in (d.x, d.weights, d.dy))
    exact, got = (step_of(data, of)() for data, of in ((wide, loop(wide)), (d, built["mos"])))
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, exact, strict=True)]
    return max(errors)


def block(case: Case, sizes: Sizes) -> list[dict]:
    d, built, absent = Data(case), {}, {}
    for name in case.providers:
        if name == "peft" and (why := importable("peft")):
            absent[name] = why
            continue
        built[name] = BUILDERS[name](d)
    error = check(d, built)
    ok = error < 8 * torch.finfo(case.dtype).eps
    state = [*d.module.parameters(), d.weights]
    saved = {name: saved_bytes(b.forward, [*state, *b.trained]) for name, b in built.items()}
    release("cpu")
    rows = []
    for name, timing in measure({name: [step_of(d, b)] for name, b in built.items()}, "cpu", sizes).items():
        status = "wrong" if name == "mos" and not ok else "ok"
        found = {"provider": name, "status": status, **timing.row(), "saved_bytes": saved[name]}
        rows.append({**found, **({"error": error} if name == "mos" else {})})
    return rows + [{"provider": name, "status": "absent", "cause": why} for name, why in absent.items()]


# ------------------------------------------------------------------------------------------------ the operator


def operands(rows: int, width: int, groups: int, dtype: torch.dtype) -> tuple:
    """x, and what a grouped operator is given after it: as many rows for each group."""
    l, n = L_SHARDS, R * L_SHARDS * groups
    tables = torch.randperm(n).reshape(groups, R, l).int()
    pools = [normal(n, width // l, dtype=torch.float32, device="cpu", std=std) for std in (width**-0.5, R**-0.5)]
    ends = (torch.arange(1, groups + 1) * rows // groups).int()
    branch = (pools[0], tables, pools[1], tables.flip(0), 1.0, 0.0, None)
    return normal(rows, width, dtype=dtype, device="cpu"), *branch, ends, None, None, None, False


def decode(sizes: Sizes, width: int, rows: int, counts: Sequence[int]) -> list[dict]:
    """Rows of a decode step that use several adapters, over a frozen linear: by one operator, or adapter by adapter."""
    weight = normal(width, width, dtype=torch.bfloat16, device="cpu", std=width**-0.5)
    x = normal(rows, width, dtype=torch.bfloat16, device="cpu")
    steps: dict[str, list[Step]] = {"frozen": [lambda: nn.functional.linear(x, weight)]}
    for adapters in counts:
        _, *rest = operands(rows, width, adapters, torch.bfloat16)
        order = torch.randperm(rows).int()
        pool_a, index_a, pool_b, index_b = rest[:4]
        own = order.long().chunk(adapters)

        def grouped(rest=rest, order=order) -> Tensor:
            y = nn.functional.linear(x, weight)
            ops.grouped_low_rank_(y, x, *rest[:8], order, None, None, False)
            return y

        def one_by_one(own=own, pool_a=pool_a, index_a=index_a, pool_b=pool_b, index_b=index_b) -> Tensor:
            y = nn.functional.linear(x, weight)
            for where, a, b in zip(own, index_a, index_b, strict=True):
                y[where] += reference.low_rank(x[where], pool_a, a, pool_b, b, 1.0)
            return y

        steps |= {f"mos, {adapters} adapters": [grouped], f"loop, {adapters} adapters": [one_by_one]}
    return [{"provider": name, "status": "ok", **t.row()} for name, t in measure(steps, "cpu", sizes).items()]


def scatter(sizes: Sizes, width: int, experts: int, counts: Sequence[int], equivalent_rank: float) -> list[dict]:
    """Microseconds for each of more and more layers that share a pool."""
    grads = [normal(experts * R, width, dtype=torch.float32, device="cpu") for _ in range(counts[-1])]
    steps: dict[str, list[Step]] = {}
    error = 0.0
    for layers in counts:
        n = round(equivalent_rank * layers * experts * L_SHARDS)
        indices = [torch.randint(n, (experts * R, L_SHARDS), dtype=torch.int32) for _ in range(layers)]
        inverse = [torch.from_numpy(array) for array in invert([index.numpy() for index in indices], n)]
        mos = functools.partial(ops.scatter_add, grads[:layers], indices, n, *inverse)
        aten = functools.partial(reference.scatter_add, grads[:layers], indices, n)
        error = max(error, ((mos() - aten()).norm() / aten().norm()).item())
        steps |= {f"mos, {layers} layers": [mos], f"aten, {layers} layers": [aten]}
    found = []
    for name, timing in measure(steps, "cpu", sizes, lambda name: name.replace("mos", "aten")).items():
        each = {k: v / int(name.split()[1]) if k.startswith("us") else v for k, v in timing.row().items()}
        status = "ok" if error < 8 * torch.finfo(torch.float32).eps else "wrong"
        found.append({"provider": name, "status": status, "error": error, **each})
    return found


# ------------------------------------------------------------------------------------------------ running


def run(which: str, seconds: float, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """(what was done, its rows), the most important first, in about ``seconds``."""
    end, smoke = time.monotonic() + seconds, which == "smoke"
    sizes, few, adapters = (SMOKE, 16, (1, 4)) if smoke else (CPU, 64, (1, 8, 64))
    peak = ask_for_peaks("benchmarks.experts", (which, only), seconds / 4)
    items: list[tuple[str, dict, Callable[[], list[dict]]]] = [
        (case.name, case.row(), functools.partial(block, case, sizes)) for case in grid(which)
    ]
    for width in (64,) if smoke else (1024, 4096):
        of_rows = {"question": "experts", "mode": "rows", "T": few, "in": width, "out": width, "dtype": "bfloat16"}
        items.append((f"rows {width}", of_rows, functools.partial(decode, sizes, width, few, adapters)))
    stack, layers = (4, (2, 3)) if smoke else (128, (6, 12, 24, 48))
    for e in (1 / 8, 1.0):
        of_pool = {"question": "experts", "mode": "scatter", "in": 256, "dtype": "float32", "r": R, "l": L_SHARDS}
        items.append((f"scatter e={e:g}", of_pool | {"e": e}, functools.partial(scatter, sizes, 256, stack, layers, e)))
    for name, columns, do in items:
        if only not in name:
            continue
        if time.monotonic() > end:
            found = [{"status": "skipped", "cause": "no time left"}]
        else:
            try:
                found = do()
            except Exception as error:  # one case may not fit into memory
                found = [{"status": "failed", "cause": f"{type(error).__name__}: {error}"}]
        of_case = peak.get(name, {})
        yield name, [{**columns, **row, "peak_mib": of_case.get(row.get("provider"))} for row in found]


def print_peaks(which: str, only: str) -> None:
    """A line for each case and provider."""
    for case in grid(which):
        if only not in case.name:
            continue
        data = Data(case)
        for name in case.providers:
            if name == "frozen_again" or (name == "peft" and importable("peft")):
                continue
            tell_peak(case.name, name, step_of(data, BUILDERS[name](data)))


def tables(rows: Sequence[dict]) -> str:
    """Markdown: ratios to the frozen block, and memory, one line per case."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = tuple(str(row[k] or "") for k in ("model", "dtype", "mode", "T", "in", "e"))
        cases.setdefault(key, {})[row["provider"]] = row
    lines = ["| block | dtype | routing | rows | " + " | ".join(PROVIDERS[1:]) + " | peak MiB: frozen, mos, peft |"]
    lines.append("|" + "---|" * (4 + len(PROVIDERS)))
    other = ["", "| rows of a decode step | frozen us | provider | ratio |", "|---|---|---|---|"]
    scattered = ["", "| equivalent rank | pool | us for a layer | of ATen's |", "|---|---|---|---|"]
    for (model, dtype, mode, tokens, width, e), of in cases.items():
        if mode == "scatter":
            mine = {p: r for p, r in of.items() if p.startswith("mos") and r["us"]}
            scattered += [f"| {e} | {p} | {r['us']:.0f} | {r['ratio']:.2f} |" for p, r in mine.items()]
            continue
        if mode == "rows":
            us = of["frozen"]["us"]
            other += [
                f"| {tokens} x {width} | {us:.0f} | {p} | {r['ratio']:.2f} |" for p, r in of.items() if r["ratio"]
            ]
            continue
        ratios = [f"{of[p]['ratio']:.3f}" if p in of and of[p]["ratio"] else "" for p in PROVIDERS[1:]]
        memory = [str(of.get(p, {}).get("peak_mib") or "") for p in ("frozen", "mos", "peft")]
        lines.append(f"| {model} | {dtype} | {mode} | {tokens} | {' | '.join(ratios)} | {', '.join(memory)} |")
    return "\n".join([*lines, *other, *scattered]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--peaks"]:
        return tell_peaks(print_peaks, *arguments[1:])
    return answer(command_line(__doc__, 370.0).parse_args(arguments), "experts", run, tables)


if __name__ == "__main__":
    sys.exit(main())
