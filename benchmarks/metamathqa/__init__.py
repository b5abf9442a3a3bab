"""MoS in PEFT's comparison of methods on MetaMathQA. See README.md; python -m benchmarks.metamathqa --peft DIR"""
