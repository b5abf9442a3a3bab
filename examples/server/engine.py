"""Requests of many adapters decoded together: they join and leave between steps.

One thread owns the model, the cache and the bank's route. Everything else asks: ``submit`` and ``cancel`` may be called
from any thread, and what comes out is handed to a function of the request, in the engine's thread.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mos_ext.serving import AdapterBank, BankFull, Lease

from .cache import Slots, check, rehearse
from .text import Text

log = logging.getLogger("server")


class Refused(Exception):
    """What a client gets for an answer: an HTTP status, a sentence, OpenAI's code, seconds until to try again."""

    def __init__(
        self, status: int, message: str, code: str, retry: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry, self.param = status, message, code, retry, param


def unknown(name: str) -> Refused:
    """For a model that is not there, or no longer."""
    return Refused(404, f"`model` must be one that /v1/models lists, got {name!r}", "model_not_found", param="model")


@dataclass(frozen=True)
class Limits:
    """What one server takes on. A sequence is the tokens of a prompt and of its answer."""

    length: int = 2048  # of a sequence, and of a row of the cache
    new_tokens: int = 512  # of an answer
    sequences: int = 16  # computed at a time, rows of the cache
    queue: int = 64  # that wait for a row
    prefill: int = 512  # tokens of prompts per step, so that a long prompt does not hold up the others
    seconds: float = 300.0  # of a request, waiting included
    room: float = 10.0  # of waiting for memory of the bank


@dataclass(frozen=True)
class Piece:
    """What comes out: a piece of text, and at the end a reason or what went wrong."""

    text: str = ""
    finish: str | None = None  # "stop" or "length"
    error: Refused | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(frozen=True)
class Ask:
    """A request. ``adapter`` None is the base alone; without a seed every answer is another."""

    tokens: list[int]
    adapter: str | None = None
    new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


class Job:
    """A request on its way. ``out`` are its tokens so far."""

    def __init__(self, ask: Ask, deliver: Callable[[Piece], None], text: Text, deadline: float) -> None:
        self.ask, self.deliver, self.text, self.deadline = ask, deliver, text, deadline
        self.out: list[int] = []
        self.cancelled = False
        self.lease: Lease | None = None
        self.read = 0  # tokens of the prompt that are computed
        self.gone = False  # its last piece is delivered, or about to be
        self.loading = False  # its adapter is on its way back
        self.refused: Refused | None = None  # by the bank, for good
        self.full_since: float | None = None  # the bank has had no room since then,
        self.tried = -1  # and was asked at this count of leases given back
        self.draw = torch.Generator()
        if ask.seed is None:
            self.draw.seed()
        else:
            self.draw.manual_seed(ask.seed)


class Engine:
    """Decodes requests over one model.

    ``bank`` None serves the base alone. ``observe(name, value, adapter)`` is told what happens: "step" and "prefill"
    (seconds), "tokens" and "prompt" (numbers), "restored". Unservable is raised for models it would get wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        bank: AdapterBank | None = None,
        limits: Limits | None = None,
        observe: Callable[[str, float, str | None], None] = lambda name, value, adapter: None,
    ) -> None:
        self.model, self.tokenizer, self.bank, self.limits = model.eval(), tokenizer, bank, limits or Limits()
        self._observe = observe
        check(model, self.limits.length)
        rehearse(model, self.limits.length)
        self.cache = Slots(model, self.limits.sequences, self.limits.length)
        with torch.no_grad():  # all its memory is taken now, not by the first request
            self.cache.forward(0, [[0]])
        self.cache.clear(0)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if ends is not None else getattr(model.config, "eos_token_id", None)
        self._ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._wake = threading.Condition()
        self._news = False  # guarded by _wake, as are
        self._waiting: deque[Job] = deque()
        self._returned = 0  # leases given back, adapters removed: reasons to ask a full bank again
        self._stop_at: float | None = None  # no new requests, and the old ones until then
        self._active: list[Job] = []  # by row of the cache; those that are decoded, then at most one in its prompt
        self._loader = ThreadPoolExecutor(1, "server-loader")
        self._thread = threading.Thread(target=self._run, name="server-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------ any thread

    def submit(self, ask: Ask, deliver: Callable[[Piece], None]) -> Job:
        """Accepts a request, and holds its adapter from now on; Refused if it cannot be served, now or ever."""
        room = self.limits.length - len(ask.tokens)
        if not ask.tokens:
            raise Refused(400, "`prompt` must have a token, got none", "invalid_value", param="prompt")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if not all(0 <= token < vocabulary for token in ask.tokens):  # on a GPU it would be the end of all requests
            raise Refused(400, f"`prompt` must be of tokens below {vocabulary}", "invalid_value", param="prompt")
        if room < 1 or ask.new_tokens > room:
            raise Refused(
                400,
                f"prompt and answer must be at most {self.limits.length} tokens, got {len(ask.tokens)} of the prompt "
                f"and `max_tokens` {ask.new_tokens}",
                "context_length_exceeded",
            )
        if not 1 <= ask.new_tokens <= self.limits.new_tokens:
            raise Refused(
                400,
                f"`max_tokens` must be from 1 to {self.limits.new_tokens}, got {ask.new_tokens}",
                "invalid_value",
                param="max_tokens",
            )
        job = Job(ask, deliver, Text(self.tokenizer, ask.stops), time.monotonic() + self.limits.seconds)
        if ask.adapter is not None:
            job.lease = self._lease(ask.adapter)
        with self._wake:
            if self._stop_at is not None:
                refused = Refused(503, "the server is shutting down", "shutting_down", 5)
            elif len(self._waiting) + len(self._active) >= self.limits.sequences + self.limits.queue:
                refused = Refused(429, f"the queue is full: {self.limits.queue} requests wait", "queue_full", 1)
            else:
                self._waiting.append(job)
                self._tell()
                return job
        self._release(job)
        raise refused

    def cancel(self, job: Job) -> None:
        """Its row is free at the next step; a last piece says so, unless it had one."""
        with self._wake:
            job.cancelled = True
            self._tell()

    def changed(self) -> None:
        """To be called when the bank may have room again for a reason of its own."""
        with self._wake:
            self._returned += 1
            self._tell()

    def drain(self, seconds: float) -> None:
        """From now on nothing is accepted; what is accepted may take so long."""
        with self._wake:
            self._stop_at = min(time.monotonic() + seconds, self._stop_at or float("inf"))
            self._tell()

    def close(self, seconds: float = 0.0) -> None:
        """Drains, and returns when nothing runs any more."""
        self.drain(seconds)
        self._thread.join()
        self._loader.shutdown()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        return self.alive and self._stop_at is None

    def requests(self) -> Counter[str | None]:
        """How many requests each adapter has, of those that wait, too."""
        with self._wake:
            return Counter(job.ask.adapter for job in (*self._waiting, *self._active))

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    # ------------------------------------------------------------------------------------------ adapters

    def _lease(self, name: str) -> Lease | None:
        """None: it is evicted, and must be restored first."""
        if self.bank is None or name not in self.bank:
            raise unknown(name)
        try:
            return self.bank.lease(name)
        except ValueError:  # evicted, or removed in between
            if name not in self.bank:
                raise unknown(name) from None
            return None

    def _load(self, job: Job) -> None:
        """In the loader's thread: a lease of an evicted adapter, which is brought back for it."""
        lease, full, refused = None, False, None
        try:
            while (lease := self._lease(job.ask.adapter)) is None:
                self.bank.restore(job.ask.adapter)
                self._observe("restored", 1, job.ask.adapter)
        except BankFull:
            full = True
        except Refused as error:
            refused = error
        except Exception as error:
            if job.ask.adapter in self.bank:
                log.exception("restoring %s", job.ask.adapter)
                refused = Refused(500, f"the adapter could not be restored: {error}", "restore_failed")
            else:  # removed between two looks
                refused = unknown(job.ask.adapter)
        with self._wake:
            job.loading, job.refused = False, refused
            job.full_since = (job.full_since or time.monotonic()) if full else None
            if lease is not None and job.gone:
                lease.close()
                self._returned += 1
            else:
                job.lease = lease
            self._tell()

    def _release(self, job: Job) -> None:
        with self._wake:
            if job.lease is not None:
                job.lease.close()
                job.lease = None
                self._returned += 1
                self._tell()

    # ------------------------------------------------------------------------------------------ the engine's thread

    def _tell(self) -> None:
        self._news = True
        self._wake.notify_all()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._pause():
                    self._expire()
                    self._admit()
                    self._decode()
        finally:  # a fault of this file: nobody may wait for ever
            with self._wake:
                self._stop_at = time.monotonic()
            self._expire()

    def _pause(self) -> bool:
        """Waits while there is nothing to do; False at the end of all."""
        with self._wake:
            while not (self._active or self._news or any(map(self._has_work, self._waiting))):
                if self._stop_at is not None and not self._waiting:
                    return False
                limit = min(map(self._until, self._waiting), default=None)
                if limit is not None and limit <= time.monotonic():
                    break
                self._wake.wait(None if limit is None else limit - time.monotonic())
            self._news = False
            return True

    def _has_work(self, job: Job) -> bool:
        """Of one who waits: it may begin, or its adapter should be asked for, again if the bank had no room."""
        loaded = job.ask.adapter is None or job.lease is not None
        return loaded or not (job.loading or job.refused or job.tried == self._returned)

    def _until(self, job: Job) -> float:
        """When a request that gets no further is given up."""
        limits = [job.deadline]
        if job.full_since is not None:
            limits.append(job.full_since + self.limits.room)
        if self._stop_at is not None:
            limits.append(self._stop_at)
        return min(limits)

    def _expire(self) -> None:
        now = time.monotonic()
        with self._wake:
            jobs = [*self._waiting, *self._active]
        for job in jobs:
            if job.cancelled:
                error = Refused(499, "the client has gone", "cancelled")
            elif job.refused:
                error = job.refused
            elif self._stop_at is not None and now >= self._stop_at:
                error = Refused(503, "the server is shutting down", "shutting_down", 5)
            elif now >= job.deadline:
                error = Refused(504, f"the request took longer than {self.limits.seconds:g} s", "timeout")
            elif job.full_since is not None and now >= job.full_since + self.limits.room:
                error = Refused(503, "the adapters in use leave no room for this one", "bank_full", 2)
            else:
                continue
            self._leave(job, Piece(error=error))

    def _admit(self) -> None:
        """Computes prompts, so many tokens of them, of those who wait and whose adapter is there, in their order."""
        budget = self.limits.prefill
        while budget > 0:
            job = self._active[-1] if self._active and not self._active[-1].out else self._next()
            if job is None:
                return
            part = job.ask.tokens[job.read : job.read + budget]
            try:
                began = time.perf_counter()
                logits = self._forward([job], len(self._active) - 1, [part])
                job.read += len(part)
                budget -= len(part)
                last = job.read == len(job.ask.tokens)
                chosen = choose(logits, [job]) if last else []
                self._observe("prefill", time.perf_counter() - began, job.ask.adapter)
                if last:
                    self._observe("prompt", job.read, job.ask.adapter)
                    self._take([job], chosen)
            except Exception as error:
                self._fail([job], error)

    def _next(self) -> Job | None:
        """The first that may begin, now in the row behind the others."""
        if len(self._active) == self.limits.sequences:
            return None
        with self._wake:
            for job in filter(self._has_work, self._waiting):
                if job.ask.adapter is None or job.lease is not None:
                    self._waiting.remove(job)
                    self._active.append(job)
                    return job
                job.loading, job.tried = True, self._returned
                self._loader.submit(self._load, job)
        return None

    def _decode(self) -> None:
        """One token more for everyone whose prompt is computed."""
        jobs = [job for job in self._active if job.out]
        if not jobs:
            return
        try:
            began = time.perf_counter()
            chosen = choose(self._forward(jobs, 0, [job.out[-1:] for job in jobs]), jobs)
            self._observe("step", time.perf_counter() - began, None)
            self._take(jobs, chosen)
        except Exception as error:
            self._fail(jobs, error)

    def _forward(self, jobs: Sequence[Job], first: int, tokens: list[list[int]]) -> Tensor:
        """Logits (jobs, vocabulary), on the model's device."""
        route: Any = contextlib.nullcontext()
        if self.bank is not None:
            route = self.bank.route(self.model, [job.lease for job in jobs])
        with route:
            return self.cache.forward(first, tokens)

    def _take(self, jobs: Sequence[Job], chosen: Sequence[int | None]) -> None:
        """The next token of each, its text delivered, and those who are at their end gone."""
        for job, token in zip(jobs, chosen, strict=True):
            if token is None:
                self._leave(job, Piece(error=Refused(500, "the model's logits are not finite", "model_failed")))
                continue
            job.out.append(token)
            self._observe("tokens", 1, job.ask.adapter)
            ended = token in self._ends
            shown = "" if ended else job.text.add(token)
            if ended or job.text.stopped or len(job.out) == job.ask.new_tokens:
                shown += job.text.end()
                finish = "stop" if ended or job.text.stopped else "length"
                self._leave(job, Piece(shown, finish))
            elif shown:
                self._deliver(job, Piece(shown))

    def _leave(self, job: Job, last: Piece) -> None:
        """Takes a request out. The last rows move into the hole: of those in decoding, then the one in its prompt."""
        with self._wake:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)
        if job in self._active:
            hole, end = self._active.index(job), len(self._active) - 1
            decoding = sum(bool(other.out) for other in self._active)
            for mover in sorted({decoding - 1, end}):
                if hole < mover:
                    self.cache.move(mover, hole)
                    self._active[hole], hole = self._active[mover], mover
            self._active.pop()
            self.cache.clear(end)
        self._release(job)
        self._deliver(job, last)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        log.error("a step failed", exc_info=error)
        for job in jobs:
            if job in self._active:
                self._leave(job, Piece(error=Refused(500, "the model failed; the log says how", "model_failed")))

    def _deliver(self, job: Job, piece: Piece) -> None:
        try:
            job.deliver(piece)
        except Exception:  # of someone who is gone; nobody else may suffer from it
            log.exception("delivering")


def choose(logits: Tensor, jobs: Sequence[Job]) -> list[int | None]:
    """The next token of each: the likeliest at temperature 0, drawn by the request's own generator otherwise.

    None where there is none, because an adapter overflows; it is the matter of its own requests alone.
    """
    top, best = logits.max(-1)
    chosen: list[int | None] = best.tolist()
    for row, (job, finite) in enumerate(zip(jobs, top.isfinite().tolist(), strict=True)):
        if not finite:
            chosen[row] = None
        elif job.ask.temperature > 0:
            shares, order = (logits[row].cpu().double() / job.ask.temperature).softmax(-1).sort(descending=True)
            shares[1:][shares.cumsum(-1)[:-1] >= job.ask.top_p] = 0  # the fewest that have a share of top_p
            chosen[row] = int(order[torch.multinomial(shares, 1, generator=job.draw)])
    return chosen
