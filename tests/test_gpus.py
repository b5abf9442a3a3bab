"""What only GPUs can tell beside results: whose context is current, and launches of which the first is captured.

Tests that need one GPU, or two, exist where there are as many.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from mos_ext import MoSConfig, MoSLinear, adapt, reference
from mos_ext.functional import gather_concat, mos_linear
from mos_ext.testing import assert_error_ratio, check_case, random_case

HERE = Path(__file__).resolve().parent
FIRST, SECOND = "cuda:0", "cuda:1"
RANKS = {"r": 4, "equivalent_rank": 3, "shards_per_vector": 2, "private_rank": 1}


def two_layers():
    """Two adapted layers of a type, which share a pool; its values are the same in every process and on every device."""
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)), MoSConfig(**RANKS, target_modules=["0", "1"]))
    nn.init.normal_(model.mos_pools.pools[0].shards_b, std=0.1)
    return model


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def assert_close(got, want):
    """float32, and cuBLAS may choose another product for another device, or under capture."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ captured first


def assert_captures(step, inputs, new):
    """A graph of a step that nothing ran before gives, of new inputs, what running the step gives."""
    # torch's own first time, which no graph can hold: its cuBLAS handles, one of them of the thread of backward passes.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm = torch.ones(8, 8, device="cuda", dtype=inputs.dtype, requires_grad=True)
        functional.linear(warm, warm.detach(), warm.detach()[0]).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    inputs.copy_(new)
    graph.replay()
    assert_close([t.clone() for t in captured], step())


def first_launch_of_the_operator():
    """Tables that were never looked at, too."""
    case = random_case(33, 64, 96, 8, 4, device="cuda")
    assert_captures(lambda: [mos_linear(*case.arguments())], case.x, case.x.flip(0))
    factor = reference.gather_concat(case.pool_a, case.index_a)
    assert torch.equal(gather_concat(case.pool_a, case.index_a), factor)


def first_launch_of_a_training_step():
    model = two_layers().cuda()
    x = torch.randn(9, 24, device="cuda")

    def step():
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), *gradients(model)]

    assert_captures(step, x, x.flip(0))


if torch.cuda.is_available():

    @pytest.mark.parametrize("case", [first_launch_of_the_operator, first_launch_of_a_training_step])
    def test_the_first_launch_of_a_process_is_captured(case):
        command = [sys.executable, "-c", f"import test_gpus; test_gpus.{case.__name__}()"]
        done = subprocess.run(command, cwd=HERE, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ another device's context

if torch.cuda.device_count() > 1:

    @pytest.fixture(autouse=True)
    def _first_is_current():
        """And stays so."""
        with torch.cuda.device(FIRST):
            yield
            assert torch.cuda.current_device() == 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_tensors_of_another_device(dtype):
        check_case(random_case((2, 65), 512, 256, 16, 4, dtype=dtype, device=SECOND))

    def test_dropout_on_another_device():
        case, seed = random_case(64, 128, 96, 8, 4, device=SECOND), torch.tensor([77], device=SECOND)
        exact, plain = (reference.mos_linear(*c.arguments(), 0.3, seed) for c in (case.exact(), case))
        assert_error_ratio(mos_linear(*case.arguments(), dropout=0.3, seed=seed), plain, exact)
        assert mos_linear(*case.arguments(), dropout=0.3).device == torch.device(SECOND)

    def test_work_is_enqueued_on_the_other_device_s_own_stream():
        """Not on the stream that is current where the call is made."""
        case = random_case(2048, 1024, 1024, 16, 4, device=SECOND)
        want = mos_linear(*case.arguments())
        torch.cuda.synchronize(SECOND)
        stream, x = torch.cuda.Stream(SECOND), case.x.clone()
        case.x.zero_()
        torch.cuda.synchronize(SECOND)
        with torch.cuda.stream(stream), torch.cuda.device(FIRST):
            torch.cuda._sleep(1_000_000)
            with torch.cuda.device(SECOND):
                torch.cuda._sleep(10_000_000)  # what comes behind it on this stream must wait for it
                case.x.copy_(x)
            y = mos_linear(*case.arguments())
        stream.synchronize()
        torch.testing.assert_close(y, want)

    def test_tensors_of_two_devices_are_refused():
        case = random_case(4, 12, 8, 3, 2, device=SECOND)
        case.index_b = case.index_b.to(FIRST)
        with pytest.raises(ValueError, match="index_b must be on the device of x, cuda:1, got cuda:0"):
            mos_linear(*case.arguments())
        with pytest.raises(RuntimeError, match="index must be on CUDA device 1"):
            torch.ops.mos_ext.shrink(case.x, case.pool_a, case.index_a.to(FIRST), 0.0, None)

    def test_a_pool_and_its_handles_on_another_device():
        """The gradients of layers that share a pool are delivered on its device, as on the first."""
        results = []
        for device in (FIRST, SECOND):
            model = two_layers().to(device)
            x = torch.ones(9, 24, device=device).cumsum(0) / 9
            for _ in range(2):
                model(x).square().sum().backward()
            assert {g.device for g in gradients(model)} == {torch.device(device)}
            results.append(gradients(model))
        assert_close(*results)

    def test_a_model_on_two_devices():
        """A backward pass that goes from device to device, each with a thread of its own."""
        results = []
        for second in (FIRST, SECOND):
            torch.manual_seed(0)
            config = MoSConfig(r=4, equivalent_rank=4)
            layers = [MoSLinear(24, 24, config=config), MoSLinear(24, 24, config=config)]
            for layer, device in zip(layers, (FIRST, second), strict=True):
                nn.init.normal_(layer.pool.shards_b, std=0.1)
                layer.to(device)
            x = (torch.ones(9, 24).cumsum(0) / 9).to(FIRST)
            layers[1](layers[0](x).to(second)).square().sum().backward()
            results.append([g for layer in layers for g in gradients(layer)])
        assert_close(*results)
