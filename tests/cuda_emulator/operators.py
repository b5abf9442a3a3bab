"""A pytest plugin: CPU tensors take the way of CUDA tensors.

    MOS_EXT_DISABLE_NATIVE=1 pytest -p operators tests/test_ops.py ...

runs tests of the library with csrc/cuda/ops.cpp and the kernels of csrc/cuda executed by the emulator. Base products
are ATen's for CPU tensors, on top of the branch as on CUDA.
"""

import emulator
import torch

from mos_ext.ops import loader

if any(library.loaded for library in loader.libraries.values()):
    raise RuntimeError("MOS_EXT_DISABLE_NATIVE=1 must be set, so that the emulated kernels are the only ones")
torch.ops.load_library(emulator.build_operators())
