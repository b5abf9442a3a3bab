"""The paper in miniature: which adapter learns most at one budget. See README.md; python -m benchmarks.quality OUT"""
