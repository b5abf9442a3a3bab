"""Distributed runs: every rank must put the same adapter on its model, or all of them are told that they do not."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch import distributed

# How long a rank waits for the others to build their adapter: they load the same model, at different speeds.
PATIENCE = timedelta(minutes=5)
_calls = itertools.count()


@contextmanager
def same_on_every_rank() -> Iterator[Callable[[dict], None]]:
    """``with same_on_every_rank() as say:`` plan the adapter, then ``say(config)``; what follows is only done if all
    ranks said the same.

    The ranks meet in the process group's store, not in a collective: a rank whose plan fails says so before it raises,
    so the others raise as well instead of waiting for it. Nothing happens outside of distributed runs, or with
    ``MOS_EXT_CHECK_RANKS=0`` for runs whose ranks adapt different models.

    Raises:
        ValueError: ranks said different things, or another rank could not say anything. Every rank raises.
    """
    said: list[dict] = []
    try:
        yield said.append
    except Exception as error:
        _publish({"error": f"{type(error).__name__}: {error}"})
        raise
    others = _publish(said[0])
    if others is not None:
        _compare(said[0], others)


def _publish(mine: dict) -> Callable[[int], dict] | None:
    """Says ``mine`` to the other ranks; the result reads what a rank said. None when there are none."""
    if os.environ.get("MOS_EXT_CHECK_RANKS") == "0" or not (
        distributed.is_available() and distributed.is_initialized()
    ):
        return None
    if distributed.get_world_size() == 1:
        return None
    store, call = distributed.distributed_c10d._get_default_store(), next(_calls)
    store.set(f"mos_ext/{call}/{distributed.get_rank()}", json.dumps(mine, sort_keys=True))

    def read(rank: int) -> dict:
        key = f"mos_ext/{call}/{rank}"
        try:
            store.wait([key], PATIENCE)
        except RuntimeError:  # torch's DistStoreError
            raise ValueError(
                f"every rank must adapt its model, got no word from rank {rank} in {PATIENCE} (MOS_EXT_CHECK_RANKS=0 "
                f"stops asking)"
            ) from None
        return json.loads(store.get(key))

    return read


def _compare(mine: dict, read: Callable[[int], dict]) -> None:
    me = distributed.get_rank()
    for rank in range(distributed.get_world_size()):
        theirs = mine if rank == me else read(rank)
        if "error" in theirs:
            raise ValueError(f"every rank must be able to adapt its model, got on rank {rank}: {theirs['error']}")
        # Compared as the store holds them: JSON has no tuples.
        different = [
            f"{name}={ours!r} on rank {me} and {name}={theirs.get(name)!r} on rank {rank}"
            for name, ours in json.loads(json.dumps(mine)).items()
            if theirs.get(name) != ours
        ]
        if different:
            raise ValueError(f"config must be the same on every rank, got {'; '.join(different)}")
