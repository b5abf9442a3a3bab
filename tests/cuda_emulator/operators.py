"""A pytest plugin: CPU tensors take the way of CUDA tensors.

    MOS_EXT_DISABLE_NATIVE=1 pytest -p operators tests/test_ops.py ...

runs tests of the library with csrc/cuda/ops.cpp and the kernels of csrc/cuda executed by the emulator, and with the
composition that CUDA has (the low-rank branch first, then the base product on top of it).
"""

import emulator
import torch

from mos_ext.ops import autograd, loader

if any(library.loaded for library in loader.libraries.values()):
    raise RuntimeError("MOS_EXT_DISABLE_NATIVE=1 must be set, so that the emulated kernels are the only ones")
torch.ops.load_library(emulator.build_operators())
autograd._low_rank_first = lambda x: True
