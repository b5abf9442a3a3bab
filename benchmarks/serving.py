"""What does it cost to serve many adapters on one base, in time, in memory and until they are loaded?

    python -m benchmarks.serving FILE.csv [--grid default|smoke] [--seconds N] [--only TEXT]

Five questions. *decode* and *prefill*: one linear whose rows use 1 to 512 adapters of a bank, beside PEFT's mixed
batches (``adapter_names``) and a loop over adapters, each a ratio to the linear alone in the same round; a merged
adapter is that linear. *generate* (and *prefill* again): a whole Llama. *memory*: bytes of an adapter of a 7B model.
*load*: how long such an adapter takes from the page cache into the bank. *thousands*: 2,000 adapters of a small model
in one bank. Tables go to FILE.md. README.md says what the columns mean.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import mos_ext
from mos_ext import MoSConfig, reference
from mos_ext.lora import read_adapter
from mos_ext.planner import Base
from mos_ext.serving import AdapterBank
from mos_ext.testing import relative_error

from . import step
from .harness import CPU, SMOKE, Sizes, Step, importable, measure, normal, release
from .rows import answer, command_line
from .tables import table

LOOPED = 64  # adapters at most that are computed one after the other: 256 of them take a second
R, L_SHARDS, E = 16, 4, 2  # E is the paper's: as many parameters as LoRA of rank 2, an eighth of LoRA of rank R
GIB = 1 << 30
LLAMA = step.Case(torch.float32, vocabulary=512, sequences=16, length=64)


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        widths: of a layer. adapters: in its banks, and of how many a batch has. distinct: adapters that have files of
            their own; the bank has each of them under several names. decode: sequences of one row. prefill: (sequences,
            tokens). llama: the model that generates. generate: (sequences, new tokens). large, small: the models whose
            adapters are loaded, and how many of the small one's.
    """

    widths: tuple[int, ...] = (1024, 4096)
    adapters: tuple[int, ...] = (1, 8, 64, 512)
    distinct: int = 64
    decode: tuple[int, ...] = (1, 8, 64, 256)
    prefill: tuple[tuple[int, int], ...] = ((16, 64),)
    llama: step.Case = LLAMA
    # (As many sequences as 64, fewer tokens: five rounds of five providers take a minute as it is.)
    generate: tuple[tuple[int, int], ...] = ((1, 24), (64, 6))
    large: tuple[int, int, int, int] = (32, 4096, 11008, 32)  # layers, width, intermediate, heads: LLaMA-2-7B's
    small: tuple[int, int, int, int] = (2, 64, 128, 4)
    thousands: int = 2000


FULL = Scope()
TINY = Scope(
    widths=(64,),
    adapters=(1, 2, 4, 8),
    distinct=3,
    decode=(1, 6),
    prefill=((3, 4),),
    llama=step.Case(torch.float32, 5, 32, 64, 64, 3, 8),
    generate=((1, 3), (3, 3)),
    large=(8, 64, 96, 2),
    small=(2, 32, 64, 2),
    thousands=70,
)
DTYPES = (torch.float32, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def close(got: Tensor, exact: Tensor) -> dict[str, object]:
    """Whether a result is right, by its distance from float64's: a branch left out, or another's, is far off."""
    error = relative_error(got, exact)
    return {"error": error, "status": "ok" if error < 8 * torch.finfo(got.dtype).eps else "wrong"}


# ------------------------------------------------------------------------------------------------ one layer


class Served:
    """A linear with its adapters: in banks of several sizes, and with the same factors in PEFT's LoRA.

    A bank has one route at a time, and providers take turns, so each has a bank of its own; all share the weight.

    Attributes:
        factors: (A, B) of each adapter that has files, (r, in) and (r, out). lora: PEFT's layer, or None. absent: why.
    """

    def __init__(
        self, features: tuple[int, int], dtype: torch.dtype, counts: Sequence[int], distinct: int, device: str = "cpu"
    ) -> None:
        self.features, self.dtype, self.device = features, dtype, device
        fan_in, fan_out = features
        weight = normal(fan_out, fan_in, dtype=dtype, device=device, std=fan_in**-0.5)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.factors: list[tuple[Tensor, Tensor]] = []
        with tempfile.TemporaryDirectory() as folder:
            paths = [self._save(Path(folder) / str(k), k) for k in range(min(distinct, counts[-1]))]
            # The shards' default dtype, and the base's.
            dtypes = {"mos": torch.float32, **({"mos_same": dtype} if dtype != torch.float32 else {})}
            self.banks = {name: [self._bank(n, paths, of) for n in counts] for name, of in dtypes.items()}
        self.absent, self.lora = importable("peft"), None
        if self.absent is None:
            self.lora = self._peft(counts[-1])

    def model(self) -> nn.Sequential:
        proj = nn.Linear(*self.features, bias=False, device="meta", dtype=self.dtype)
        proj.weight = self.weight
        return nn.Sequential(OrderedDict(proj=proj))

    def _save(self, path: Path, seed: int) -> Path:
        # A pool as large as the factors: of many layers that share one, a layer reads r different vectors, too.
        config = MoSConfig(
            r=R, equivalent_rank=R, shards_per_vector=L_SHARDS, private_rank=0, seed=seed, target_modules=["proj"]
        )
        model = mos_ext.adapt(self.model(), config)
        pool = model.mos_pools.pools[0]
        nn.init.normal_(pool.shards_b, std=R**-0.5 / pool.config.scale)  # a branch as large as the base
        mos_ext.save_adapter(model, path)
        b = reference.gather_concat(pool.shards_b, pool.index_b[0]) * pool.config.scale
        self.factors.append((reference.gather_concat(pool.shards_a, pool.index_a[0]).detach(), b.detach()))
        return path

    def _bank(self, count: int, paths: Sequence[Path], dtype: torch.dtype) -> tuple[AdapterBank, nn.Module]:
        model = self.model()
        bank = AdapterBank(model, dtype=dtype)
        for k in range(count):
            bank.add(str(k), paths[k % len(paths)])
        return bank, model

    def _peft(self, count: int) -> nn.Module:
        """The layer, not the model around it."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=R, lora_alpha=R, target_modules=["proj"])
        model = multiplied(get_peft_model(self.model(), config, autocast_adapter_dtype=False), count)
        layer = model.base_model.model.proj.to(self.device).eval()
        with torch.no_grad():
            for k in range(count):
                a, b = self.factors[k % len(self.factors)]
                layer.lora_A[str(k)].weight.copy_(a)
                layer.lora_B[str(k)].weight.copy_(b.t())
        return layer

    def exact(self, x: Tensor, adapters: int) -> Tensor:
        """What sequences x, each with adapter after adapter, make; in float64."""
        wide = x.double()
        y = wide @ self.weight.double().t()
        for k in range(len(x) if adapters else 0):
            a, b = self.factors[k % adapters % len(self.factors)]
            y[k] += wide[k] @ a.double().t() @ b.double()
        return y

    @contextlib.contextmanager
    def providers(self, x: Tensor) -> Iterator[dict[str, tuple[Callable[[], Tensor], int]]]:
        """Name -> a step and how many adapters the sequences x (first dimension) use in it. Inside, routes are in
        force."""
        sequences, frozen = len(x), self.model().proj
        found: dict[str, tuple[Callable[[], Tensor], int]] = dict.fromkeys(
            ("frozen", "frozen_again"), (functools.partial(frozen, x), 0)
        )
        counts: list[int] = []
        with contextlib.ExitStack() as routes:
            for name, banks in self.banks.items():
                for k, (bank, model) in enumerate(banks):
                    if k and len(banks[k - 1][0]) >= sequences:
                        break  # there are no more adapters in the batch than with the bank before
                    used = min(len(bank), sequences)
                    routes.enter_context(bank.route(model, [str(k % used) for k in range(sequences)]))
                    found[label(name, used)] = functools.partial(model.proj, x), used
                    counts.append(used)
            # A capture that fails can spoil those behind it, so PEFT comes last.
            for used in dict.fromkeys(counts) if self.lora is not None else ():
                if used <= LOOPED:
                    found[label("loop", used)] = functools.partial(self._loop, x, used), used
                names = [str(k % used) for k in range(sequences)]
                found[label("peft", used)] = functools.partial(self.lora, x, adapter_names=names), used
            yield found

    def _loop(self, x: Tensor, adapters: int) -> Tensor:
        """Each adapter's sequences through PEFT's layer, one adapter after the other."""
        y = x.new_empty(*x.shape[:-1], self.features[1])
        for k in range(adapters):
            own = x[k::adapters]
            y[k::adapters] = self.lora(own, adapter_names=[str(k)] * len(own))  # type: ignore[misc]
        return y


def multiplied(model: nn.Module, count: int) -> nn.Module:
    """A PEFT model with ``count`` copies of its adapter, "0" and so on.

    PEFT's own ``add_adapter`` goes through all adapters each time: 88 s for 64 on 42 linears.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for of in model.modules():
        for held in (*vars(of).values(), *of.children()) if isinstance(of, BaseTunerLayer) else ():
            if isinstance(held, (dict, nn.ModuleDict)) and "default" in held:
                for k in range(count):
                    held[str(k)] = copy.deepcopy(held["default"])
    return model


def label(provider: str, adapters: int) -> str:
    return f"{provider}, {adapters} adapter{'s' * (adapters != 1)}"


@functools.lru_cache(maxsize=1)
def served(width: int, dtype: torch.dtype, counts: Sequence[int], distinct: int) -> Served:
    return Served((width, width), dtype, counts, distinct)


@torch.no_grad()
def layer(scope: Scope, sizes: Sizes, width: int, dtype: torch.dtype, shape: tuple[int, ...]) -> list[dict]:
    """Rows of ``shape``, (sequences,) or (sequences, tokens), through a linear and its adapters."""
    # (The largest bank for the first width alone: PEFT's copies of its adapters take minutes to make.)
    s = served(width, dtype, scope.adapters if width == scope.widths[0] else scope.adapters[:-1], scope.distinct)
    x = normal(*shape, width, dtype=dtype, device="cpu")
    with s.providers(x) as providers:
        checked = {name: close(do(), s.exact(x, adapters)) for name, (do, adapters) in providers.items()}
        times = measure({name: [do] for name, (do, _) in providers.items()}, "cpu", sizes)
    found = [{"provider": name, **checked[name], **timing.row()} for name, timing in times.items()]
    return found + ([] if s.absent is None else [{"provider": "peft", "status": "absent", "cause": s.absent}])


# ------------------------------------------------------------------------------------------------ a model


@functools.lru_cache(maxsize=1)
def models(case: step.Case, count: int) -> dict[str, tuple[nn.Module, AdapterBank | None]]:
    """The providers of a whole model, and the banks of those that have one: of one adapter, and of ``count``."""
    made: dict[str, tuple[nn.Module, AdapterBank | None]] = {"frozen": (step.frozen(case), None)}
    with tempfile.TemporaryDirectory() as folder:
        paths = save(step.mos(case), Path(folder), count)
        for name, adapters in (("mos, one", 1), ("mos, each", count)):
            model = step.frozen(case)
            bank = AdapterBank(model)
            for k in range(adapters):
                bank.add(str(k), paths[k])
            made[name] = model, bank
        made["adapt"] = mos_ext.load_adapter(step.frozen(case), paths[0]), None
        made["merged"] = mos_ext.merge(mos_ext.load_adapter(step.frozen(case), paths[0])), None
        exact = [mos_ext.load_adapter(step.frozen(case).double(), path) for path in paths[:CHECKED]]
        made |= {f"exact {k}": (model, None) for k, model in enumerate(exact)}
    made["frozen_again"] = made["frozen"]
    if importable("peft") is None:
        made["peft"] = step.by_peft("LoraConfig", case, r=R, casts=False), None
        made["peft, each"] = multiplied(step.by_peft("LoraConfig", case, r=R, casts=False), count), None
        for name in ("peft", "peft, each"):
            for p in made[name][0].parameters():
                if p.requires_grad:
                    nn.init.normal_(p, std=0.02)
    for model, _ in made.values():
        model.eval()
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.eos_token_id = None  # nobody stops early
    return made


CHECKED = 2  # sequences of a model; each costs a copy in float64
ONE = ("adapt", "peft", "merged")  # providers with one adapter, which is no question of how many sequences there are


def save(model: nn.Module, folder: Path, count: int) -> list[Path]:
    """``count`` adapters of a model, with random pools; where they are."""
    paths = [folder / str(k) for k in range(count)]
    for path in paths:
        for pool in model.mos_pools.pools:
            nn.init.normal_(pool.shards_b, std=R**-0.5 / pool.config.scale)
        mos_ext.save_adapter(model, path)
    return paths


def tokens_of(model: nn.Module, ids: Tensor, new: int, **options: object) -> Tensor:
    """Logits of a prefill where there are no new tokens; else the tokens."""
    if not new:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, **options).logits
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )


def routed(bank: AdapterBank, model: nn.Module, names: Sequence[str], ids: Tensor, new: int) -> Tensor:
    """As a server does: the route is entered for each batch, and its tables are those of the batch before."""
    with bank.route(model, names):
        return tokens_of(model, ids, new)


@torch.no_grad()
def model(scope: Scope, sizes: Sizes, case: step.Case, sequences: int, new: int) -> list[dict]:
    """A prefill, or ``generate`` with short prompts, of a whole model."""
    made = models(case, max(*(n for n, _ in scope.generate), scope.llama.sequences))
    torch.manual_seed(2)
    ids = torch.randint(case.vocabulary, (sequences, case.length // 4 if new else case.length))
    steps: dict[str, Step] = {}
    for name, (of, bank) in made.items():
        if name.startswith("exact") or (name in ONE and sequences != 1 and new):
            continue
        if bank is not None:
            steps[name] = functools.partial(routed, bank, of, [str(k % len(bank)) for k in range(sequences)], ids, new)
        elif name == "peft, each":
            names = [str(k) for k in range(sequences)]
            steps[name] = functools.partial(tokens_of, of, ids, new, adapter_names=names)
        else:
            steps[name] = functools.partial(tokens_of, of, ids, new)
    checked = _checked(made, ids, case.dtype)
    rows = []
    for name, timing in measure({name: [do] for name, do in steps.items()}, "cpu", sizes).items():
        rows.append({"provider": name, **checked.get(name, {}), **timing.row()})
    why = importable("peft")
    return rows + [{"provider": "peft, each", "status": "absent", "cause": why}] * (why is not None)


def _checked(made: dict, ids: Tensor, dtype: torch.dtype) -> dict[str, dict]:
    """Logits of our own providers against each adapter loaded alone in float64. Roundings grow through the layers."""
    # Of bfloat16, whose logits are a few per cent off whatever the adapter, that no adapter was forgotten or mistaken.
    limit, found = (0.1 if dtype == torch.bfloat16 else 1e-5), {}
    truths = [tokens_of(made[f"exact {k}"][0], ids[k : k + 1], 0) for k in range(min(CHECKED, len(ids)))]
    for name in ("mos, one", "mos, each", "adapt", "merged"):
        of, bank = made[name]
        if bank is None:
            got = tokens_of(of, ids, 0)
        else:
            got = routed(bank, of, [str(k % len(bank)) for k in range(len(ids))], ids, 0)
        same = range(len(truths) if name == "mos, each" else 1)  # the others have the first adapter alone
        error = max(relative_error(got[k : k + 1], truths[k]) for k in same)
        found[name] = {"error": error, "status": "ok" if error < limit else "wrong"}
    return found


# ------------------------------------------------------------------------------------------------ memory, loading


def hollow(sizes: tuple[int, int, int, int]) -> nn.Module:
    """A Llama whose every parameter is one number, seen as a matrix: shapes of 7B and no memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, intermediate, heads = sizes
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    with torch.device("meta"):
        made = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in made.modules():
        for name, p in module.named_parameters(recurse=False):
            view = torch.zeros((), dtype=p.dtype).expand(p.shape)
            module.register_parameter(name, nn.Parameter(view, requires_grad=False))
    return made


def config_of(layers: int) -> MoSConfig:
    """Rank R, or what a pool of few layers has vectors for."""
    r = min(R, E * layers)
    return MoSConfig(r=r, equivalent_rank=E, shards_per_vector=L_SHARDS, private_rank=0, target_modules="all-linear")


def memory(scope: Scope) -> list[dict]:
    """Bytes of an adapter, by arithmetic, and of MoS as the bank itself says."""
    base, adapted = hollow(scope.large), mos_ext.adapt(hollow(scope.large), config_of(scope.large[0]))
    trainable = sum(p.numel() for p in adapted.mos_pools.parameters())
    linears = [m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith("model.")]
    lora = {r: sum(r * (m.in_features + m.out_features) for m in linears) for r in (E, R)}
    with tempfile.TemporaryDirectory() as folder:
        mos_ext.save_adapter(adapted, folder)
        bank = AdapterBank(base)
        bank.add("a", folder)
        (of,) = bank.report().adapters
        bank.close()
    # (r, l) of both sides in int32, a rank and a scale, for every linear.
    tables = sum(4 * (2 * R * BANK_SHARDS + 2) for _ in linears)
    right = (of.bytes, of.table_bytes, of.lora_bytes) == (4 * trainable, tables, 4 * lora[R])
    status = {"status": "ok" if right and trainable == lora[E] else "wrong"}
    budget = {"r": R, "l": L_SHARDS, "e": E, **status}
    return [
        {"provider": f"mos r={R} e={E}", "trainable": trainable, "bytes": of.bytes, **budget},
        {"provider": "mos, with tables", "bytes": of.bytes + of.table_bytes, **budget},
        *({"provider": f"lora r={r}", "trainable": n, "bytes": 4 * n, "r": r, "status": "ok"} for r, n in lora.items()),
    ]


BANK_SHARDS = 8  # in a rank vector: what a bank has unless it is told otherwise


def load(scope: Scope, sizes: Sizes) -> list[dict]:
    """An adapter of the large model out of the page cache: its bytes alone, read and checked, and in the bank."""
    base = hollow(scope.large)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        (path,) = save(mos_ext.adapt(hollow(scope.large), config_of(scope.large[0])), Path(folder), 1)
        one = AdapterBank(base)
        one.add("a", path)
        size = one.report().used
        one.close()
        bank = AdapterBank(base, capacity=4 * size)  # room for the next version beside the one that is there
        bank.add("a", path)
        known = Base.of(base)
        steps: dict[str, list[Step]] = {
            "file": [lambda: [file.read_bytes() for file in path.iterdir()]],
            "read": [functools.partial(read_adapter, known, path)],
            "load": [functools.partial(bank.replace, "a", path)],
        }
        found = measure(steps, "cpu", sizes, lambda name: "file")
        bank.close()
    return [{"provider": name, "status": "ok", "bytes": size, **timing.row()} for name, timing in found.items()]


@torch.no_grad()
def thousands(scope: Scope, sizes: Sizes) -> list[dict]:
    """Many adapters in one bank that grows, and the first batch of a route: all tables are still to be gathered."""
    case = step.Case(torch.float32, *scope.small[:3], vocabulary=64, sequences=64, length=4)
    base, count = step.frozen(case), scope.thousands
    with tempfile.TemporaryDirectory() as folder:
        paths = save(mos_ext.adapt(step.frozen(case), config_of(case.layers)), Path(folder), 20)
        bank, took = AdapterBank(base), []
        for k in range(count):
            began = time.perf_counter()
            bank.add(str(k), paths[k % len(paths)])
            took.append((time.perf_counter() - began) * 1e6)
    report = bank.report()
    each, tenth = {r.bytes for r in report.adapters}, max(1, count // 10)
    right = len(report.adapters) == count and report.used == count * report.adapters[0].bytes and len(each) == 1
    rows = [
        {"provider": name, "us": sum(some) / len(some), "samples": len(some), "timer": "wall"}
        for name, some in (("add", took), ("add, first tenth", took[:tenth]), ("add, last tenth", took[-tenth:]))
    ]
    for row in rows:
        row |= {"bytes": report.used // count, "status": "ok" if right else "wrong"}
    ids = torch.randint(64, (64, 4))
    batches = [[str((k * 29 + shift) % count) for k in range(64)] for shift in range(2)]

    def route(names: Sequence[str]) -> None:
        with bank.route(base, names):
            pass

    def both() -> None:  # never the one before
        route(batches[0])
        route(batches[1])

    def batch(names: Sequence[str | None]) -> Tensor:
        return routed(bank, base, names, ids, 0)

    frozen = functools.partial(tokens_of, base, ids, 0)
    times = measure({"frozen": [frozen], "two new routes": [both]}, "cpu", sizes)
    times |= measure({"frozen": [frozen], "the same route": [functools.partial(route, batches[0])]}, "cpu", sizes)
    times |= measure({"frozen": [frozen], "batch": [functools.partial(batch, batches[0])]}, "cpu", sizes)
    bank.close()
    rows += [{"provider": name, "status": "ok", **t.row()} for name, t in times.items() if name != "two new routes"]
    new = times["two new routes"]
    return [*rows, {"provider": "a new route", "status": "ok", "us": new.us / 2, "samples": new.samples}]


# ------------------------------------------------------------------------------------------------ running


Item = tuple[str, dict[str, object], Callable[[], list[dict]]]


def items(scope: Scope, sizes: Sizes) -> Iterator[Item]:
    """(name, columns, what to do), the most important first."""
    longer = sizes if scope is TINY else replace(sizes, seconds=8.0)  # five rounds of seconds would be an accident's
    large, small = (f"Llama, {s[0]} layers of width {s[1]}" for s in (scope.large, scope.small))
    yield "memory", {"mode": "memory", "model": large, "dtype": "float32"}, functools.partial(memory, scope)
    yield "load", {"mode": "load", "model": large, "dtype": "float32"}, functools.partial(load, scope, sizes)
    columns: dict[str, object] = {"mode": "thousands", "model": small, "case": scope.thousands, "dtype": "float32"}
    yield "thousands", columns, functools.partial(thousands, scope, sizes)
    shapes: list[tuple[int, ...]] = [*((n,) for n in scope.decode), *scope.prefill]
    for width in scope.widths:
        for dtype in DTYPES:
            for shape in shapes:
                mode, tokens = ("decode", 1) if len(shape) == 1 else ("prefill", shape[1])
                columns = {"mode": mode, "case": f"{shape[0]} x {tokens}", "T": shape[0] * tokens, "in": width}
                columns |= {"out": width, "dtype": dtype_name(dtype), "r": R, "l": L_SHARDS, "e": R}
                do = functools.partial(layer, scope, sizes, width, dtype, shape)
                yield f"layer {mode} {width} {dtype_name(dtype)} {shape[0]} x {tokens}", columns, do
    for dtype in DTYPES:
        case = replace(scope.llama, dtype=dtype)
        batches = [*scope.generate, (case.sequences, 0)]
        for sequences, new in batches:
            mode = "generate" if new else "prefill"
            columns = {"mode": mode, "case": f"{sequences} x {new or case.length}", "layers": case.layers}
            columns |= {"model": f"Llama, width {case.hidden}", "T": sequences, "dtype": dtype_name(dtype), "r": R}
            do = functools.partial(model, scope, longer, case, sequences, new)
            yield f"model {mode} {dtype_name(dtype)} {sequences}", {**columns, "l": L_SHARDS, "e": step.E}, do


def run(which: str, seconds: float, only: str = "") -> Iterator[tuple[str, list[dict]]]:
    """(what was done, its rows), in about ``seconds``."""
    end = time.monotonic() + seconds
    for name, columns, do in items(*((TINY, SMOKE) if which == "smoke" else (FULL, CPU))):
        if only not in name:
            continue
        if time.monotonic() > end:
            found = [{"status": "skipped", "cause": "no time left"}]
        else:
            release("cpu")
            try:
                found = do()
            except Exception as error:  # one case may not fit into memory
                found = [{"status": "failed", "cause": f"{type(error).__name__}: {error}"}]
        yield name, [{"question": "serving", **columns, **row} for row in found]
    served.cache_clear()
    models.cache_clear()


# ------------------------------------------------------------------------------------------------ tables


LABELS = {
    "frozen": "no adapter",
    "mos, one": "MoS in the bank, one adapter for all",
    "mos, each": "MoS in the bank, an adapter for each sequence",
    "peft, each": "PEFT LoRA, an adapter for each sequence (`adapter_names`)",
    "adapt": "MoS alone (`mos_ext.adapt`)",
    "peft": "PEFT LoRA alone",
    "merged": "one adapter, merged",
    "frozen_again": "noise: no adapter again",
}


def model_table(rows: Sequence[dict]) -> str:
    """A line for each provider, of all batches side by side, as a multiple of the model's time without adapters."""
    of = [r for r in rows if r["model"] and r["mode"] in ("generate", "prefill") and r["us"]]
    batches = list(dict.fromkeys((r["dtype"], r["mode"], r["case"]) for r in of))
    cells = {(r["dtype"], r["mode"], r["case"], r["provider"]): r for r in of}
    lines = []
    for name, text in LABELS.items():
        mine = [cells.get((*batch, name)) for batch in batches]
        if any(mine):
            show = "{us:.0f} ms" if name == "frozen" else "{ratio:.3f}"
            lines.append([text, *(r and show.format(us=r["us"] / 1e3, ratio=r["ratio"]) for r in mine)])
    return table(["", *(f"{mode} {case}, {dtype}" for dtype, mode, case in batches)], lines)


def layer_table(rows: Sequence[dict]) -> str:
    """A line for each batch and number of adapters in it."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["in"] and row["us"]:
            cases.setdefault((row["mode"], row["in"], row["dtype"], row["case"]), {})[row["provider"]] = row
    columns, lines = ("mos", "mos_same", "peft", "loop"), []
    for (mode, width, dtype, case), by in cases.items():
        adapters = sorted({int(name.split()[1]) for name in by if "," in name})
        for used in adapters:
            mine = [by.get(label(name, used)) for name in columns]
            own = [f"{by['frozen']['us']:.0f}", f"{by['frozen_again']['ratio']:.2f}"]
            ratios = [r and f"{r['ratio']:.2f}" for r in mine]
            lines.append([f"{mode} {case}", f"{width}, {dtype}", used, *own, *ratios])
    head = ("batch", "linear", "adapters in it", "no adapter, us", "again", "bank", "bank, shards in the base's dtype")
    return table((*head, "PEFT `adapter_names`", "PEFT, adapter by adapter"), lines)


def goals(rows: Sequence[dict]) -> list[tuple[str, str, str, str]]:
    """(what, measured, goal, whether it is met)."""
    out = []

    def add(what: str, value: float, limit: float, unit: str = "", at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        out.append(
            (what, f"{value:.2f}{unit}", f"{'>=' if at_least else '<='} {limit:g}{unit}", "met" if met else "missed")
        )

    by: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["us"]:
            key = tuple(row[k] for k in ("mode", "model", "in", "dtype", "case"))
            by.setdefault(key, {})[row["provider"]] = row
    for (mode, model, width, dtype, case), of in by.items():
        where = f"{model or f'{width} -> {width}'}, {mode} {case}, {dtype}"
        if mode == "load":
            add(f"milliseconds to load an adapter, {model}", of["load"]["us"] / 1e3, 50.0)
        for name, shards in (("mos", ""), ("mos_same", f", {dtype} shards")) if case == "64 x 1" else ():
            many, one, peft = (of.get(label(*who)) for who in ((name, 64), (name, 1), ("peft", 64)))
            if many and one:
                add(f"64 adapters / one, {where}{shards}", many["ratio"] / one["ratio"], 1.3)
            if many and peft:
                what = f"PEFT's mixed batch / bank, 64 adapters, {where}{shards}"
                add(what, peft["ratio"] / many["ratio"], 5.0, at_least=True)
        if {"adapt", "peft"} <= of.keys():
            add(f"MoS alone / PEFT LoRA alone, {where}", of["adapt"]["ratio"] / of["peft"]["ratio"], 1.0)
    return out


def tables(rows: Sequence[dict]) -> str:
    """Markdown: goals, the model, memory, loading, thousands, the layer."""
    modes: dict[str, list[dict]] = {}
    for row in rows:
        modes.setdefault(row["mode"], []).append(row)
    parts = []
    if found := goals(rows):
        parts.append(table(("goal", "measured", "must", ""), found))
    if any(r["layers"] for r in rows):
        parts.append(model_table(rows))
    of = modes.get("memory", [])
    if of and of[0].get("bytes"):
        mos = of[0]["bytes"]
        lines = [
            [r["provider"], f"{r['bytes']:,}", f"{r['bytes'] / mos:.2f}", f"{8 * GIB // r['bytes']:,}"] for r in of
        ]
        parts.append(table((f"an adapter of a {of[0]['model']}", "bytes", "of MoS's shards", "in 8 GiB"), lines))
    for mode, head in (("load", "from the page cache"), ("thousands", "adapters in one bank")):
        of = [r for r in modes.get(mode, []) if r["us"]]
        if of:
            title = f"{of[0]['case'] or ''} {head}, {of[0]['model']}".strip()
            lines = [[r["provider"], f"{r['us'] / 1e3:.3f}", r["bytes"] and f"{r['bytes']:,}"] for r in of]
            parts.append(table((title, "ms", "bytes of an adapter"), lines))
    if any(r["in"] for r in rows):
        parts.append(layer_table(rows))
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    return answer(command_line(__doc__, 400.0).parse_args(arguments), "serving", run, tables)


if __name__ == "__main__":
    sys.exit(main())
