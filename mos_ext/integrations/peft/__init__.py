"""MoS as a PEFT method, which importing this module registers.

::

    import mos_ext.integrations.peft as mos_peft
    model = peft.get_peft_model(model, mos_peft.MoSConfig(r=16, equivalent_rank=8, target_modules="all-linear"))

From then on PEFT treats ``peft_type="MOS"`` like its own methods: ``PeftModel.from_pretrained``, ``add_adapter``,
``merge_and_unload``, ... Import it before loading a MoS adapter, too: PEFT cannot know the type otherwise.
"""

from .registration import check_peft

check_peft()

from .config import MoSConfig  # noqa: E402
from .layer import MoSExperts, MoSLayer, MoSLinear  # noqa: E402
from .model import MoSModel  # noqa: E402
from .registration import register  # noqa: E402

register(MoSConfig, MoSModel)

__all__ = ["MoSConfig", "MoSExperts", "MoSLayer", "MoSLinear", "MoSModel"]
