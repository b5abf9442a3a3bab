"""torch.compile: one graph without breaks, the same numbers, no recompilation over steps and, with dynamic shapes, over lengths."""

import pytest
import torch
from models import inputs, llama, randomize, stack

from mos_ext import MoSConfig, adapt
from mos_ext.functional import mos_linear
from mos_ext.testing import random_case

# The compiled graph is executed, not generated code: what is tested is tracing, functionalisation and AOT autograd of our
# operators; Inductor's C++ would add a minute. One test below goes all the way.
BACKEND = "aot_eager"

# torch's tracer makes its own placeholder of an autograd.Function, and warns about that; any other warning is still an error.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting(backend=BACKEND):
    """A backend that counts compilations."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(backend)


def train_steps(model, forward, xs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for x in xs:
        optimizer.zero_grad()
        loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_functional(dropout):
    case = random_case((2, 9), 24, 16, 4, 2).requires_grad_()
    seed = torch.tensor([4])

    def f(*arguments):
        return mos_linear(*arguments, dropout=dropout, seed=seed)

    compiled = torch.compile(f, fullgraph=True, backend=BACKEND)
    want = torch.autograd.grad(f(*case.arguments()).sum(), case.differentiable())
    got = torch.autograd.grad(compiled(*case.arguments()).sum(), case.differentiable())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_training_steps_compile_once_and_agree():
    xs = [torch.randn(6, 24) for _ in range(5)]
    config = MoSConfig(r=3, equivalent_rank=2, shards_per_vector=2)
    eager, model = randomize(adapt(stack(), config)), randomize(adapt(stack(), config))
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert train_steps(model, compiled, xs) == pytest.approx(train_steps(eager, eager, xs), rel=1e-5)
    assert counter.frame_count == 1


def test_dynamic_lengths_compile_once():
    model = randomize(adapt(stack(), MoSConfig(r=3, equivalent_rank=2, shards_per_vector=2)))
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    train_steps(model, compiled, [torch.randn(6, 24)])
    first = counter.frame_count  # torch may call the backend twice while it learns which sizes vary
    train_steps(model, compiled, [torch.randn(rows, 24) for rows in (11, 3, 200, 17)])
    assert counter.frame_count == first


def test_training_mode_with_dropout_compiles_once():
    model = randomize(adapt(stack(), MoSConfig(r=3, equivalent_rank=2, shards_per_vector=2, dropout=0.3))).train()
    counter = counting()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(6, 24)
    outputs = [compiled(x) for _ in range(4)]
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.filterwarnings("ignore")  # other people's deprecations while the whole stack compiles
def test_a_transformer_through_inductor():
    model, batch = randomize(adapt(llama(2), MoSConfig(r=2, equivalent_rank=2, shards_per_vector=2))), inputs("llama")
    compiled = torch.compile(model, fullgraph=True)
    labels = batch["input_ids"]

    def gradients(f):
        model.zero_grad()
        loss = f(**batch, labels=labels).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.mos_pools.parameters()]

    (want_loss, want), (loss, got) = gradients(model), gradients(compiled)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
