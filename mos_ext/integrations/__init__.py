"""Other libraries' worlds. Nothing here is imported by ``import mos_ext``."""
