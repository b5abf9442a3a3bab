"""Many adapters on one base: a bank of pools, and batches whose sequences use different adapters.

::

    bank = mos_ext.serving.AdapterBank(model)
    bank.add("fr", "adapters/fr")
    with bank.route(model, ["fr", None]):
        model.generate(...)
"""

from .bank import AdapterBank, BankFull, Lease
from .members import BankReport, MemberReport

__all__ = ["AdapterBank", "BankFull", "BankReport", "Lease", "MemberReport"]
