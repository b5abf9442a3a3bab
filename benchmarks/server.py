"""A server of many adapters under load: is every answer right and none lost, and how many tokens come out a second?

    python -m benchmarks.server FILE.csv [--grid default|smoke]

``examples/server`` on loopback with the official ``openai`` client, at most ``CLIENTS`` requests at a time, in three
phases: *base*, for the model without adapters; *mixed*, for as many adapters, all in memory, and the base; *changes*,
with memory for half of them, while adapters are added, replaced and removed, damaged files are offered, and every
seventh client goes away in the middle. Every answer is compared with that of ``generate`` of the adapter alone. A
table goes to FILE.md. It ends by itself: as many requests as PHASES say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mos_ext
from mos_ext.serving import AdapterBank

from . import step
from .harness import ROOT
from .rows import where
from .serving import save
from .tables import table

sys.path.insert(0, str(ROOT / "examples"))

CLIENTS, TOKENS, PROMPTS, DEADLINE = 16, 24, 4, 300.0
PHASES = ("base", "mixed", "changes")
TOKEN = "a token of the benchmark"


@dataclass(frozen=True)
class Scope:
    """A model, how many adapters of it, and how many requests a phase has."""

    case: step.Case
    adapters: int
    requests: int


FULL = Scope(step.Case(torch.float32), 32, 160)
TINY = Scope(step.Case(torch.float32, 5, 64, 96), 4, 28)


@dataclass
class Found:
    """A phase: what became of its requests. Latencies are of whole answers, in milliseconds."""

    phase: str
    adapters: int
    requests: int
    right: int = 0
    wrong: int = 0
    lost: int = 0
    left: int = 0  # by clients that went away
    changes: int = 0
    refused: int = 0  # damaged files
    evictions: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0


class World:
    """A base, its adapters' folders, and what each answers alone. ``None`` is the base."""

    def __init__(self, scope: Scope, folder: Path) -> None:
        from tiny import language_model  # type: ignore[import-not-found]
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(language_model(folder / "tokenizer"))
        scope = replace(scope, case=replace(scope.case, vocabulary=len(self.tokenizer)))
        self.scope, self.adapters = scope, folder / "adapters"
        self.model = step.frozen(scope.case).eval()
        self.model.generation_config.eos_token_id = self.model.config.eos_token_id = None
        self.adapters.mkdir()
        self.names = [path.name for path in save(step.mos(scope.case), self.adapters, scope.adapters)]
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(1, len(self.tokenizer), (PROMPTS, 16), generator=generator)
        self.right = {name: self._answers(name) for name in (None, *self.names)}
        cut = self.adapters / "cut"
        shutil.copytree(self.adapters / self.names[0], cut)
        weights = cut / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def _answers(self, name: str | None) -> list[str]:
        model = step.frozen(self.scope.case).eval()
        if name is not None:
            model = mos_ext.load_adapter(model, self.adapters / name).eval()
        model.generation_config.eos_token_id = None
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        rows = [model.generate(prompt[None], **options)[0, len(prompt) :] for prompt in self.prompts]
        return [self.tokenizer.decode(row, skip_special_tokens=True).rstrip("�") for row in rows]

    def one_bytes(self) -> int:
        """Of an adapter in memory."""
        bank = AdapterBank(step.frozen(self.scope.case))
        bank.add("one", self.adapters / self.names[0])
        return bank.report().used


@contextlib.contextmanager
def serving(world: World, capacity: int | None) -> Iterator[tuple[str, AdapterBank]]:
    """The address of a server, and its bank."""
    import uvicorn
    from server.app import Server, Service, create  # type: ignore[import-not-found]
    from server.engine import Engine, Limits  # type: ignore[import-not-found]
    from server.folder import Folder  # type: ignore[import-not-found]
    from server.metrics import Metrics  # type: ignore[import-not-found]

    bank, metrics = AdapterBank(world.model, capacity=capacity), Metrics("base")
    limits = Limits(length=64, new_tokens=TOKENS, sequences=CLIENTS, queue=4 * CLIENTS, room=DEADLINE)
    engine = Engine(world.model, world.tokenizer, bank, limits, metrics.observe)
    service = Service(engine, metrics, "base", Folder(world.adapters, bank, engine.changed), None, TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(uvicorn.Config(create(service), log_config=None), engine, DEADLINE)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", bank
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(DEADLINE)
            engine.close()
            bank.close()


async def load(world: World, phase: str, address: str, bank: AdapterBank) -> Found:
    """One phase, as its clients see it."""
    import httpx
    import openai

    names: Sequence[str | None] = [None] if phase == "base" else [None, *world.names]
    found = Found(phase, len(names) - 1, world.scope.requests)
    meant: dict[str, set[str]] = {}  # what a name may mean while it is replaced
    latencies: list[float] = []
    turn, over = asyncio.Semaphore(CLIENTS), asyncio.Event()

    async def ask(client: Any, n: int) -> None:
        name, prompt = names[n % len(names)], n % PROMPTS
        request = {"model": name or "base", "prompt": world.prompts[prompt].tolist(), "max_tokens": TOKENS}
        async with turn:
            started = time.perf_counter()
            try:
                if phase == "changes" and n % 7 == 0:
                    stream = await client.completions.create(stream=True, temperature=0, **request)
                    await stream.__anext__()
                    await stream.close()
                    found.left += 1
                    return
                text = (await client.completions.create(temperature=0, **request)).choices[0].text
            except Exception:  # an error, or no answer: what there must not be
                found.lost += 1
                return
            latencies.append(1e3 * (time.perf_counter() - started))
        ok = {name} if name is None else meant.get(name, {name})
        right = text.rstrip("�") in {world.right[one][prompt] for one in ok}
        found.right, found.wrong = found.right + right, found.wrong + (not right)

    async def change(http: Any) -> None:
        turn = 0
        while not over.is_set():
            name, other = (world.names[(turn + k) % len(world.names)] for k in (0, 1))
            meant[name] = {name, other}
            for body in ({"name": name, "directory": other}, {"name": name, "directory": name}):
                found.changes += (await http.post("/v1/adapters", json={**body, "replace": True})).is_success
            one = {"name": name, "directory": "cut", "replace": True}
            found.refused += (await http.post("/v1/adapters", json=one)).status_code == 400
            found.changes += (await http.post("/v1/adapters", json={"name": "new", "directory": name})).is_success
            found.changes += (await http.delete("/v1/adapters/new")).is_success
            turn += 1
            await asyncio.wait([asyncio.ensure_future(over.wait())], timeout=0.2)

    headers = {"authorization": f"Bearer {TOKEN}"}
    async with (
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=DEADLINE) as client,
        httpx.AsyncClient(base_url=address, headers=headers, timeout=DEADLINE) as http,
    ):
        for name in world.names if phase != "base" else ():
            assert (await http.post("/v1/adapters", json={"name": name, "directory": name})).is_success
        before, started = bank.report().evictions, time.perf_counter()
        changing = asyncio.ensure_future(change(http)) if phase == "changes" else None
        await asyncio.gather(*(ask(client, n) for n in range(world.scope.requests)))
        found.seconds = time.perf_counter() - started
        over.set()
        if changing is not None:
            await changing
    found.evictions = bank.report().evictions - before
    found.tokens_per_second = len(latencies) * TOKENS / found.seconds
    ordered = sorted(latencies)
    found.p50_ms, found.p95_ms = (ordered[int(q * (len(ordered) - 1))] for q in (0.5, 0.95))
    return found


def measure(scope: Scope) -> Iterator[Found]:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        world = World(scope, Path(folder))
        for phase in PHASES:
            capacity = world.one_bytes() * (scope.adapters // 2) if phase == "changes" else None
            with serving(world, capacity) as (address, bank):
                yield asyncio.run(load(world, phase, address, bank))


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each phase."""
    head = (
        "phase",
        "adapters",
        "requests",
        "right",
        "wrong",
        "lost",
        "clients that went",
        "changes",
        "damaged, refused",
    )
    columns = ("phase", "adapters", "requests", "right", "wrong", "lost", "left", "changes", "refused", "evictions")
    numbers = ("tokens_per_second", "p50_ms", "p95_ms")
    lines = [[*(row[c] for c in columns), *(f"{float(row[c]):.0f}" for c in numbers)] for row in rows]
    return table((*head, "evictions", "tokens/s", "answer, ms", "95 % within"), lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the CSV to write")
    parser.add_argument("--grid", choices=("default", "smoke"), default="default")
    options = parser.parse_args(arguments)
    here = where()
    rows: list[dict[str, Any]] = []
    for found in measure(TINY if options.grid == "smoke" else FULL):
        rows.append({**asdict(found), **here})
        print(f"server: {found.phase}", flush=True)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with options.file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = tables(rows)
    options.file.with_suffix(".md").write_text(text)
    print(text)
    counted = Counter({name: sum(row[name] for row in rows) for name in ("wrong", "lost")})
    return int(any(counted.values()))


if __name__ == "__main__":
    sys.exit(main())
