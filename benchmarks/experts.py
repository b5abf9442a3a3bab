"""What do adapters on every expert cost over the frozen block, and how does that grow with the number of experts?

    python -m benchmarks.experts FILE.csv [--grid default|smoke] [--seconds N] [--only TEXT]

Three questions. *block*: one experts module of transformers, forward and backward, with MoS, with PEFT's LoRA on
``target_parameters``, and with MoS as a loop over experts in plain PyTorch, each a ratio to the frozen block of the
same round. *growth*: the operator alone over 8 to 256 groups of the same rows. *rows*: the operator alone, 64 rows of a
decode step that use 1, 8 or 64 adapters. README.md says what the columns mean.
"""

from __future__ import annotations

import copy
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mos_ext import MoSConfig, reference
from mos_ext.experts import Routing, adapted_experts
from mos_ext.pools import ShardPool

from .harness import CPU, SMOKE, Sizes, Step, importable, measure, normal, release, saved_bytes
from .rows import Rows, command_line

ops = torch.ops.mos_ext
R, L_SHARDS = 16, 4
PROVIDERS = ("frozen", "mos", "frozen_again", "peft", "loop")
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
        return [Case("smoke", 16, 32, 16, 2, 24, d, r) for d in DTYPES for r in ("uniform", "skewed")]
    small, large = ("E=32 h=512 m=192", 32, 512, 192, 4, 512), ("E=64 h=1024 m=384", 64, 1024, 384, 8, 1024)
    # Of 128 experts, a quarter: with LoRA's copies of all weights and their gradients more would not fit into 16 GiB.
    qwen = ("Qwen3-30B-A3B, 32 experts", 32, 2048, 768, 8, 512)
    return [
        *(Case(*size, d, "uniform") for size in (small, large) for d in DTYPES),
        *(Case(*size, torch.bfloat16, "skewed") for size in (small, large)),
        Case(*qwen, torch.bfloat16, "uniform"),
    ]


DTYPES = (torch.bfloat16, torch.float32)


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
        config = MoSConfig(r=R, equivalent_rank=1, shards_per_vector=L_SHARDS, private_rank=0, alpha=R)
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
    for name in PROVIDERS:
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


def growth(sizes: Sizes, width: int, rows: int, counts: Sequence[int]) -> list[dict]:
    """Forward and backward of the operator over more and more groups of the same rows."""

    def step(groups: int) -> Step:
        x, *rest = operands(rows, width, groups, torch.bfloat16)
        y, s = ops.grouped_low_rank(x, *rest)
        dx = torch.empty_like(x)

        def run() -> None:
            ops.grouped_low_rank_(y, x, *rest)
            ops.grouped_low_rank_backward_(dx, y, s, x, *rest)

        return run

    timings = measure({str(g): [step(g)] for g in counts}, "cpu", sizes)
    first = timings[str(counts[0])].us
    return [
        {"provider": f"{g} groups", "status": "ok", **t.row(), "ratio": round(t.us / first, 4)}
        for g, t in ((g, timings[str(g)]) for g in counts)
    ]


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


# ------------------------------------------------------------------------------------------------ running


def run(which: str, seconds: float, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """(what was done, its rows), the most important first, in about ``seconds``."""
    end, smoke = time.monotonic() + seconds, which == "smoke"
    sizes = SMOKE if smoke else CPU
    width, rows, counts, adapters = (64, 32, (2, 4), (1, 4)) if smoke else (2048, 4096, COUNTS, (1, 8, 64))
    items: list[tuple[str, dict, Callable[[], list[dict]]]] = [
        (case.name, case.row(), functools.partial(block, case, sizes)) for case in grid(which)
    ]
    of_operator = {"in": width, "out": width, "dtype": "bfloat16"}
    items.append(
        (
            "growth",
            {"question": "experts", "mode": "growth", "T": rows, **of_operator},
            lambda: growth(sizes, width, rows, counts),
        )
    )
    few = 16 if smoke else 64
    for w in (width,) if smoke else (1024, 4096):
        of_rows = {"question": "experts", "mode": "rows", "T": few, **of_operator, "in": w, "out": w}
        items.append((f"rows {w}", of_rows, functools.partial(decode, sizes, w, few, adapters)))
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
        yield name, [{**columns, **row} for row in found]


COUNTS = (8, 16, 32, 64, 128, 256)


def main(arguments: list[str] | None = None) -> int:
    options = command_line(__doc__, 370.0).parse_args(arguments)
    warnings.simplefilter("ignore")  # optional packages' own
    with Rows(options.file, "experts") as rows:
        for name, found in run(options.grid, options.seconds, options.only):
            rows.add(name, found)
    return rows.status


if __name__ == "__main__":
    sys.exit(main())
