"""What an adapted layer keeps for its backward pass, byte by byte, and what it never makes: a copy of x in another dtype.

Beside x, a layer saves S = dropout(x) A^T, in float32, and 8 bytes of seed where there is dropout. Measured here, in
bytes, as `table()` prints them; T = 48 tokens, 64 -> 96 features, r = 8, a frozen base:

    dtype     dropout  base         MoS  MoS under PEFT    LoRA  LoRA without autocast_adapter_dtype
    fp32          0.0  frozen     13824           13824   13824                                13824
    fp32          0.1  frozen     13832           13832   26112                                26112
    bf16          0.0  frozen      7680            7680   13824                                 6912
    bf16          0.1  frozen      7688            7688   26112                                13056
    autocast      0.0  frozen      7680            7680    9472                                 9472
    autocast      0.1  frozen      7688            7688   21760                                21760

PEFT's LoRA keeps S in the dtype that its adapters compute in. Where that is bfloat16 and nothing is dropped, it keeps
T * r * 2 bytes less than MoS, r / in of what x takes; under autocast copies of A and B come on top, which outweigh that
for few tokens, as here. In every other case it keeps more, however many tokens there are.
"""

import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mos_ext
from mos_ext import reference
from mos_ext.ops.checks import why_not_native

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import peak_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's deprecations at import
    import peft

import mos_ext.integrations.peft as mos_peft

T, IN, OUT, R = 48, 64, 96, 8
RANKS = {"r": R, "equivalent_rank": 4, "shards_per_vector": 4, "private_rank": 1}
WAYS = ("adapt", "peft")
NAMES = [f"{i}.layer" for i in range(3)]
ITEM = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2}


class Opaque(nn.Linear):
    """A linear of which nothing is known but that it is called."""

    def forward(self, x):
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, base, bias):
        super().__init__()
        self.layer = base(IN, OUT, bias)


def state_of(model):
    """What is there once, whatever runs: parameters, buffers and index tables."""
    pools = [m for m in model.modules() if isinstance(m, mos_ext.ShardPool)]
    return [*model.parameters(), *model.buffers(), *(t for pool in pools for t in (pool.index_a, pool.index_b))]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@dataclass
class Layer:
    """A layer of one of three, adapted in one of four ways: `adapt`, `peft` (MoS), `lora`, `lora-bf16`.

    `lora-bf16` is LoRA whose adapters have the base's dtype: autocast_adapter_dtype=False.
    """

    way: str
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    base: type = nn.Linear
    bias: bool = True
    trainable: bool = False
    adapters: int = 1
    pool_dtype: str = "float32"
    model: nn.Module = field(init=False)

    def __post_init__(self):
        torch.manual_seed(0)
        base = nn.Sequential(*(Block(self.base, self.bias) for _ in range(3))).to(self.dtype)
        mos = {**RANKS, "dropout": self.dropout, "target_modules": NAMES, "pool_dtype": self.pool_dtype}
        if self.way == "adapt":
            self.model = mos_ext.adapt(base, mos_ext.MoSConfig(**mos))
            self.module = self.model[1].layer
        else:
            lora = peft.LoraConfig(r=R, lora_dropout=self.dropout, target_modules=NAMES)
            config = mos_peft.MoSConfig(**mos) if self.way == "peft" else lora
            cast = self.way != "lora-bf16"
            self.model = peft.get_peft_model(base, config, autocast_adapter_dtype=cast)
            for number in range(1, self.adapters):
                self.model.add_adapter(f"{number}", config, autocast_adapter_dtype=cast)
            self.model.base_model.set_adapter(["default", *(str(n) for n in range(1, self.adapters))])
            self.module = self.model.get_base_model()[1].layer
        inner = getattr(self.module, "base_layer", self.module)
        for parameter in inner.parameters():
            parameter.requires_grad_(self.trainable)
        self.model.train()

    def x(self):
        """As in a model: a result of something before it, so that autocast has no cached copy of it."""
        return torch.randn(2, T // 2, IN, dtype=self.dtype, requires_grad=True) * 1


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


def saved(function, x, apart=(), context=nullcontext):
    """The size of each distinct storage that is saved when `function` is called with x, but for those of `apart`."""
    known, kept = storages(apart), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context():
        y = function(x)
    assert y.requires_grad
    return sorted(t.untyped_storage().nbytes() for address, t in kept.items() if address not in known)


def saved_by(layer, context=nullcontext):
    x = layer.x()
    return saved(layer.module, x, state_of(layer.model), context)


PRECISIONS = {
    "fp32": (torch.float32, nullcontext),
    "bf16": (torch.bfloat16, nullcontext),
    "autocast": (torch.float32, autocast),
}
# Under autocast torch's own linear keeps its float32 weight in bfloat16 for its gradient of x, and so does ours.
WEIGHT = {"fp32": [], "bf16": [], "autocast": [IN * OUT * 2]}


def expected(precision, dropout, adapters=1):
    """x, S of every adapter and its seed; and what the base's own arithmetic keeps, `WEIGHT`."""
    item = ITEM[torch.float32 if precision == "fp32" else torch.bfloat16]
    return sorted([T * IN * item, *WEIGHT[precision], *([T * R * 4] + [8] * (dropout > 0)) * adapters])


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("base", [nn.Linear, Opaque])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_x_and_s_and_nothing_else(way, precision, dropout, base, trainable, bias):
    dtype, context = PRECISIONS[precision]
    layer = Layer(way, dtype, dropout, base, bias, trainable)
    want = expected(precision, dropout)
    if base is Opaque and trainable and precision == "autocast":
        want = sorted([*want, T * IN * 2])  # the base converts x for itself, inside
    assert saved_by(layer, context) == want


@pytest.mark.parametrize("way", WAYS)
def test_double_precision_keeps_s_in_double(way):
    assert saved_by(Layer(way, torch.float64, pool_dtype="float64")) == sorted([T * IN * 8, T * R * 8])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("base", [nn.Linear, Opaque])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapters", [2, 3])
def test_more_adapters_share_x(adapters, precision, base, dropout):
    dtype, context = PRECISIONS[precision]
    layer = Layer("peft", dtype, dropout, base, adapters=adapters)
    assert saved_by(layer, context) == expected(precision, dropout, adapters)


@pytest.mark.parametrize("way", WAYS)
def test_x_is_the_very_tensor_that_its_maker_keeps(way):
    """Of relu's result there is one copy: relu keeps it for itself, the layer keeps the same."""
    layer = Layer(way, torch.bfloat16)
    x = layer.x()
    own = state_of(layer.model)
    assert saved(lambda x: layer.module(torch.relu(x)), x, own) == sorted([T * IN * 2, T * R * 4])


# ------------------------------------------------------------------------------------------------ beside LoRA


def table():
    """Bytes beside parameters and the base's `WEIGHT`, by case and way."""
    rows = {}
    for precision, (dtype, context) in PRECISIONS.items():
        for dropout in (0.0, 0.1):
            for trainable in (False, True):
                rows[precision, dropout, trainable] = {
                    way: sum(saved_by(Layer(way, dtype, dropout, trainable=trainable), context))
                    - sum(WEIGHT[precision])
                    for way in (*WAYS, "lora", "lora-bf16")
                }
    return rows


def as_text(rows):
    lines = ["dtype     dropout  base         MoS  MoS under PEFT    LoRA  LoRA without autocast_adapter_dtype"]
    for (precision, dropout, trainable), row in rows.items():
        case = f"{precision:<8}  {dropout:>7}  {'trainable' if trainable else 'frozen':<9}"
        lines.append(f"{case}  {row['adapt']:>5}  {row['peft']:>14}  {row['lora']:>6}  {row['lora-bf16']:>35}")
    return "\n".join(lines)


def test_lora_keeps_more():
    rows = table()
    text = as_text(rows)
    assert [line.split() for line in text.splitlines() if "trainable" not in line] == [
        line.split() for line in __doc__.partition("frozen base:")[2].partition("PEFT's LoRA")[0].strip().splitlines()
    ], f"\n{text}"
    for (precision, dropout, _), row in rows.items():
        assert row["adapt"] == row["peft"], text
        for lora in ("lora", "lora-bf16"):
            # The exception that this file's text explains: S in float32 instead of bfloat16.
            allowed = T * R * 2 if (precision, dropout, lora) == ("bf16", 0.0, "lora-bf16") else 0
            assert row["adapt"] <= row[lora] + allowed, f"{precision} {dropout} {lora}\n{text}"


# ------------------------------------------------------------------------------------------------ no copies on the way


class Widened(TorchDispatchMode):
    """Notes every operator that returns activations in float32, by shape: as many elements as x or y has."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float32
                and tensor.numel() in (T * IN, T * OUT)
            ):
                self.found.add((str(function), tuple(tensor.shape)))
        return out


def run(layer, x):
    y = layer.module(x)
    assert y.dtype == torch.bfloat16
    y.backward(torch.ones_like(y))


CASES = [
    (way, base, adapters, dropout)
    for way in WAYS
    for base in (nn.Linear, Opaque)
    for adapters in ((1,) if way == "adapt" else (1, 2))
    for dropout in (0.0, 0.1)
]


@pytest.mark.parametrize(("way", "base", "adapters", "dropout"), CASES)
def test_no_operator_returns_activations_in_float32(way, base, adapters, dropout):
    layer = Layer(way, torch.bfloat16, dropout, base, adapters=adapters)
    x = layer.x()
    with Widened() as mode:
        run(layer, x)
    assert not mode.found
    assert all(p.grad.dtype == torch.float32 for n, p in layer.model.named_parameters() if p.requires_grad)


def largest_allocation_in(function):
    """The most that one operator allocates, results included, in bytes, inside of kernels too."""
    function()  # whatever is made once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def largest_allocation(layer):
    """Of one forward and backward pass."""
    x = layer.x()
    return largest_allocation_in(lambda: run(layer, x.detach().requires_grad_()))


@pytest.mark.parametrize(("way", "base", "adapters", "dropout"), CASES)
def test_no_kernel_makes_room_for_activations_in_float32(way, base, adapters, dropout):
    """The results of the backward kernel are the largest there are: x in float32 would be larger, and is what LoRA makes
    (below)."""
    if dropout and why_not_native("low_rank", "cpu"):
        pytest.skip("of the kernels: without them PyTorch makes the mask of dropout as a tensor")
    dx_and_factors = T * IN * 2 + R * (IN + OUT) * 4
    assert T * OUT * 2 + T * R * 4 < dx_and_factors < T * IN * 4
    assert largest_allocation(Layer(way, torch.bfloat16, dropout, base, adapters=adapters)) <= dx_and_factors


def test_both_of_the_above_see_lora_widen_x():
    layer = Layer("lora", torch.bfloat16)
    with Widened() as mode:
        run(layer, layer.x())
    assert ("aten._to_copy.default", (2, T // 2, IN)) in mode.found
    assert largest_allocation(layer) >= T * IN * 4


def test_the_mask_of_plain_pytorch_is_made_of_bytes():
    """A word of eight elements is in int64, and a decision is a byte; the bits of each element in int64 would be eight."""
    assert largest_allocation_in(lambda: reference.dropout_mask(T, OUT, 0.5, torch.tensor(7))) <= T * OUT


# ------------------------------------------------------------------------------------------------ inside of kernels


def products(dtype, p, rows, cols=1, r=1):
    """The four products of x (rows, cols) with a factor (r, cols), by name."""
    x, s = torch.randn(rows, cols).to(dtype), torch.randn(rows, r)
    pool, index, seed = torch.randn(r, cols), torch.arange(r, dtype=torch.int32).unsqueeze(1), torch.tensor(7)
    op = torch.ops.mos_ext
    return {
        "shrink": lambda: op.shrink(x, pool, index, p, seed),
        "expand": lambda: op.expand(s, pool, index, 2.0, dtype),
        "expand_backward": lambda: op.expand_backward(x, s, pool, index, 2.0),
        "shrink_backward": lambda: op.shrink_backward(s, x, pool, index, p, seed),
    }


@pytest.mark.parametrize("name", ["shrink", "expand", "expand_backward", "shrink_backward"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_does_not_grow_with_the_rows(dtype, p, name):
    """By the system's record, which has what the kernels allocate past torch: one rank of x (2^20, 1) takes 4 MiB or
    less beside the results, where sums padded to 16 ranks would take 64."""
    if why_not_native(name, "cpu"):
        pytest.skip("of the kernels: without them PyTorch makes tensors of every step")
    product = products(dtype, p, 2**20)[name]
    results = product()  # threads and whatever else is made once
    size = sum(t.nbytes for t in (results if isinstance(results, tuple) else (results,)))
    assert size >= 2**20 * dtype.itemsize
    del results
    peak = peak_bytes(product)
    if peak is None:
        pytest.skip("the system does not let the record be reset")
    assert peak <= size + 2**22
