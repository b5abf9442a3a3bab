"""Replicas of the server under Ray Serve: each with its own model and adapters, all with the same directory.

    python examples/ray_replicas.py --model meta-llama/Llama-3.2-1B --adapters adapters --replicas 2

The options are those of examples/serve.py. Adapters change by files alone, which every replica follows (``--watch`` is
on): an admin's request would reach one of them. The guide is docs/guides/server.md.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import threading
from dataclasses import replace
from typing import Any

# Before ray is imported. It tells nobody that it runs; and its processes, which take any code from each other, meet on
# the loopback device (the switch is Ray's for systems where it supports one machine alone).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray import serve
from server.app import create
from server.start import arguments, serving

APP = "mos"


class Replica:
    """One engine with its bank, in a process of its own; ``x-replica`` of an answer says which it came from."""

    def __init__(self, options: argparse.Namespace) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._end = contextlib.ExitStack()
        service = self._end.enter_context(serving(options))
        name = serve.get_replica_context().replica_id.unique_id
        self._service = replace(service, headers={"x-replica": name})

    def __serve_build_asgi_app__(self) -> Any:
        return create(self._service)

    def check_health(self) -> None:
        """Ray Serve puts another one in the place of a replica that raises."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine has died")

    def __del__(self) -> None:  # Ray Serve's way to say that the last request is over
        self._end.close()


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv, __doc__, replicas=2)
    options.watch = options.adapters is not None
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        num_replicas=options.replicas,
        # Ray Serve sends a replica five requests at a time, if not told otherwise: too few to be computed together.
        max_ongoing_requests=options.max_sequences + options.max_queue,
        max_queued_requests=options.max_queue,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=options.grace,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(options.device.startswith("cuda"))},
    )
    stop = threading.Event()
    ray.init(include_dashboard=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(deployment.bind(options), name=APP)
        print(f"{options.replicas} replicas at http://{options.host}:{options.port}, until Ctrl-C", flush=True)
        stop.wait()
        serve.delete(APP)  # when their requests are over
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
