"""How fast ferdlib is beside plain PyTorch and the libraries that people use: `python -m tests.benchmarks`."""
