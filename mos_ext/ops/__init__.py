"""The operator floor: ``torch.ops.mos_ext.*``, tensors in, tensors out."""

from . import schema  # noqa: F401  (defines the operators that loader's libraries implement)
from . import loader  # noqa: F401, I001
from . import autograd  # noqa: F401
