"""Fairness-robustness primitives for PyTorch: per-sample losses, L-infinity attacks, class
reweighting, class-wise metrics, and the parts of data-free robust distillation, each usable alone
in a training loop of one's own. Import what is needed from its submodule, as in
`from ferdlib.attacks import utae_pgd`; `import ferdlib` by itself loads nothing.
"""

__version__ = "0.1.0"
