"""Benchmarks of mos_ext, run from the repository's root; README.md says how."""
