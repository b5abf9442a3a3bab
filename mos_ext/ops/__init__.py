"""The operator floor: ``torch.ops.mos_ext.*``, tensors in, tensors out."""

from . import (
    flops,  # noqa: F401
    fused,  # noqa: F401
    gradients,  # noqa: F401
    loader,  # noqa: F401
    schema,  # noqa: F401  (defines the operators that loader's libraries implement)
)
