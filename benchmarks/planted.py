"""A slow-down, planted: MoS that does about a quarter more than it must, to show that compare.py sees it.

python -m benchmarks.layer build/slow.csv --providers benchmarks/planted.py
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.providers import PROVIDERS as HONEST
from benchmarks.providers import Built, Data


def slow(d: Data) -> Built:
    """MoS, and the base's product of every second row of x once more: of the products of a full step a quarter."""
    built = HONEST["mos"](d)
    wasted = d.x.detach()[: max(1, d.case.rows // 2)]

    def forward():
        with torch.no_grad():
            wasted @ d.weight.t()
        return built.forward()

    return replace(built, forward=forward)


PROVIDERS = {"mos": slow}
