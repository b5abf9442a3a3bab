"""The whole extension beside one version of torch, on a machine without a driver: see torch_versions.py.

What was built loads, and the CPU kernels compute. Beside a CUDA build of torch every operator has its CUDA kernel
registered, too, and tensors that only claim to be on a GPU (FakeTensorMode) take the way that real ones would: shapes,
dtypes, and the composition with the base's product.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mos_ext.functional import linear
from mos_ext.ops import loader
from mos_ext.ops.branch import Branch, Recipe
from mos_ext.ops.checks import why_not_native
from mos_ext.ops.schema import OPERATORS
from mos_ext.testing import check_case, random_case

assert Path.cwd() == loader.PACKAGE.parent, f"mos_ext was imported from {loader.PACKAGE}"
devices = ["cpu"]
if torch.version.cuda and loader.libraries["_C_cuda"].path.exists():
    devices.append("cuda")
for device in devices:
    for operator in OPERATORS:
        assert why_not_native(operator, device) is None, why_not_native(operator, device)
check_case(random_case(37, 120, 48, 5, 3))

if "cuda" in devices:
    assert int(loader.RUNTIME.search(loader.libraries["_C_cuda"].path.read_bytes())[1]) >= 12000
    with FakeTensorMode():
        x = torch.empty(7, 64, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(96, 64, dtype=torch.bfloat16, device="cuda")
        pool_a, pool_b = (torch.empty(20, features // 4, device="cuda") for features in (64, 96))
        index_a, index_b = (torch.empty(8, 4, dtype=torch.int32, device="cuda") for _ in range(2))
        recipe = Recipe(index_a, index_b, 0.5, dropout=0.1)
        y = linear(x, weight, weight[:, 0], Branch(pool_a, pool_b, None, None, recipe))
        assert (y.shape, y.dtype, y.device.type) == ((7, 96), torch.bfloat16, "cuda")
        s = torch.empty(7, 8, device="cuda")
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        gradients = torch.ops.mos_ext.low_rank_backward(y, s, x, pool_a, index_a, pool_b, index_b, 0.5, 0.1, seed)
        assert [tuple(g.shape) for g in gradients] == [(7, 64), (8, 64), (8, 96)]

built = loader.build_record().get("torch", "another torch")
print(f"torch_link: built against {built}, beside {torch.__version__}: {len(OPERATORS)} operators for {devices}")
sys.exit(0)
