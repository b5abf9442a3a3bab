"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

# From a small model on a GPU to a long prompt on a CPU, in seconds.
BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """Counters of one server; ``observe`` is the engine's, ``count`` the app's, and ``text`` is what is scraped.

    The label ``adapter`` is what requests call it, ``base`` that of the model alone, and empty for an unknown one.
    """

    def __init__(self, base: str) -> None:
        self._base = base
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self._requests = Counter("mos_requests", "Requests by adapter and HTTP status", ["adapter", "status"], **of)
        self._tokens = Counter("mos_tokens", "Tokens of prompts and of answers", ["adapter", "kind"], **of)
        self._restores = Counter("mos_restores", "Adapters brought back from host memory", **of)
        self._steps = Histogram("mos_step_seconds", "One forward of the model", ["kind"], buckets=BUCKETS, **of)

    def count(self, adapter: str, status: int) -> None:
        """A request is over."""
        self._requests.labels(adapter, str(status)).inc()

    def observe(self, name: str, value: float, adapter: str | None) -> None:
        """What the engine does."""
        if name == "restored":
            self._restores.inc(value)
        elif name in ("step", "prefill"):
            self._steps.labels("decode" if name == "step" else "prefill").observe(value)
        else:
            self._tokens.labels(adapter or self._base, "answer" if name == "tokens" else "prompt").inc(value)

    def answered(self) -> float:
        """Tokens of all answers so far."""
        samples = (sample for family in self._tokens.collect() for sample in family.samples)
        return sum(s.value for s in samples if s.name == "mos_tokens_total" and s.labels["kind"] == "answer")

    def text(self, engine: Any, bank: Any) -> bytes:
        """The state of the engine and of the bank is read when it is asked for."""
        return generate_latest(_All(self.registry, engine, bank))


class _All:
    def __init__(self, registry: CollectorRegistry, engine: Any, bank: Any) -> None:
        self.registry, self.engine, self.bank = registry, engine, bank

    def collect(self) -> Iterator[Any]:
        yield from self.registry.collect()
        yield GaugeMetricFamily("mos_active", "Requests that are computed", self.engine.active)
        yield GaugeMetricFamily("mos_waiting", "Requests that wait", self.engine.waiting)
        yield GaugeMetricFamily("mos_cache_bytes", "Keys and values of all rows", self.engine.cache.bytes)
        if self.bank is None:
            return
        report = self.bank.report()
        yield GaugeMetricFamily("mos_adapters", "Adapters in the bank", len(report.adapters))
        resident = sum(adapter.resident for adapter in report.adapters)
        yield GaugeMetricFamily("mos_adapters_resident", "Of them, those in memory", resident)
        yield GaugeMetricFamily("mos_bank_bytes", "Bytes of shards in use", report.used)
        if report.capacity is not None:
            yield GaugeMetricFamily("mos_bank_capacity_bytes", "Bytes that there are for shards", report.capacity)
        yield CounterMetricFamily("mos_evictions", "Adapters that made room for others", report.evictions)
