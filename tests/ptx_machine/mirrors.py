"""The structs of launch.h and the numbers of dtypes, which tests/cuda_emulator/kernels.py mirrors for both machines."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "cuda_emulator"))
import kernels

DTYPES, STORAGE, STRUCTS, sums_type = kernels.DTYPES, kernels.STORAGE, kernels.STRUCTS, kernels.sums_type
Matrix, Factor, FactorGradient, Dropout, Planes, ExpandOptions, Groups, Inverse = STRUCTS
inverse_of = kernels.inverse_of
