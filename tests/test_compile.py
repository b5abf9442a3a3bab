"""torch.compile: one graph without breaks, the same numbers, no recompilation over steps and, with dynamic shapes, over lengths."""

import re
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from models import inputs, llama, randomize, stack
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mos_ext import MoSConfig, MoSLinear, adapt
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


def test_a_layer_alone_in_its_pool_compiles_once():
    """In eager mode it gives its pool the gradient itself, once a pass has shown that nothing else does."""
    xs = [torch.randn(6, 24) for _ in range(4)]
    layer = MoSLinear(24, 24, config=MoSConfig(r=3, equivalent_rank=3, shards_per_vector=2))
    counter = counting()
    train_steps(layer, torch.compile(layer, fullgraph=True, backend=counter), xs)
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


# ------------------------------------------------------------------------------------------------ what is compiled


def code_of(step):
    """What Inductor made of a step, forward and backward, and how often it was asked."""
    from torch._inductor.utils import run_and_get_code

    _, codes = run_and_get_code(step)
    return [code[code.index("def call(") :].partition("\ndef ")[0] for code in codes]


@pytest.mark.filterwarnings("ignore")  # other people's deprecations when Inductor is imported
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_one_operator_a_direction_and_no_copy(bias, dropout):
    """An in-place product would be made functional: its C, all of y, copied first."""
    case, seed = random_case((32,), 64, 96, 16, 4, bias=bias).requires_grad_(), torch.tensor([4])
    case.weight.requires_grad_(False)
    needed = [t for t in case.differentiable() if t.requires_grad]

    def f(*arguments):
        return mos_linear(*arguments, dropout=dropout, seed=seed)

    want = torch.autograd.grad(f(*case.arguments()).sum(), needed)
    compiled = torch.compile(f, fullgraph=True)
    results = []
    forward, backward = code_of(lambda: results.append(torch.autograd.grad(compiled(*case.arguments()).sum(), needed)))
    for code, name, buffers in ((forward, "linear", 0), (backward, "linear_backward", int(bias))):
        called = re.findall(r"= torch\.ops\.(\w+\.\w+)\.", code)
        assert [operator for operator in called if operator != "mos_ext.scatter_add"] == [f"mos_ext.{name}"]
        # Nothing else is written but the sum of the bias' gradient: no product, no copy of y or dx.
        assert code.count("empty_strided_cpu(") == buffers
        assert "extern_kernels" not in code
        assert "copy" not in code
    for a, b in zip(results[0], want, strict=True):
        assert torch.equal(a, b)


def test_policies_of_compiled_checkpoints_see_base_and_branch():
    """In eager calls they are asked for low_rank and addmm; under torch.compile likewise, and what they save is saved."""
    case = random_case((5,), 24, 24, 4, 2).requires_grad_()
    x, *rest = case.arguments()
    low_rank, addmm = torch.ops.mos_ext.low_rank.default, torch.ops.aten.addmm.default
    needed = (case.x, case.pool_a, case.pool_b)

    def block(x):
        return mos_linear(mos_linear(x, *rest).relu(), *rest).relu()

    def step(save, f):
        seen = []

        def policy(context, operator, *args, **kwargs):
            seen.append(operator)
            return CheckpointPolicy.MUST_SAVE if operator in save else CheckpointPolicy.PREFER_RECOMPUTE

        def selective(x):
            contexts = partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum()

        return torch.autograd.grad(f(selective)(x), needed), [o for o in seen if o in (low_rank, addmm)]

    def computed_again(save):
        backward = []
        backend = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph),
            bw_compiler=lambda graph, _: backward.append(graph) or make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
        )
        got, seen = step(save, partial(torch.compile, fullgraph=True, backend=backend))
        targets = [node.target for node in backward[0].graph.nodes]
        return got, seen, targets.count(low_rank), targets.count(addmm)

    for save, again in (([], (2, 2)), ([low_rank], (0, 2)), ([addmm], (2, 0)), ([low_rank, addmm], (0, 0))):
        torch._dynamo.reset()
        want, eager = step(save, lambda f: f)
        got, seen, *counts = computed_again(save)
        assert eager == [low_rank, addmm] * 2
        assert seen[:4] == eager
        assert tuple(counts) == again
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
