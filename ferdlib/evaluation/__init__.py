"""Class-wise robustness that one can publish: a model, data and a protocol to a report.

`evaluate` runs a named protocol and returns a `RobustnessReport` with the figures of every class, their
intervals and all that is needed to repeat them; `compare` puts reports side by side and tests two models on
the same samples, `merge` joins shards, and `trust_checks` looks for signs of masked gradients. Intervals and
tests alone are in `ferdlib.stats`.
"""

from ferdlib.evaluation.compare import Comparison, PairedTest, compare, merge
from ferdlib.evaluation.protocols import PROTOCOLS, AttackSpec, Protocol
from ferdlib.evaluation.report import Finding, RobustnessReport
from ferdlib.evaluation.result import AttackResult
from ferdlib.evaluation.run import evaluate
from ferdlib.evaluation.trust import trust_checks
from ferdlib.stats import (
    average_interval,
    holm,
    mcnemar,
    nsd_interval,
    paired_permutation,
    simultaneous_interval,
    wilson_interval,
    worst_class_interval,
    worst_fraction_interval,
)

__all__ = [
    "PROTOCOLS",
    "AttackResult",
    "AttackSpec",
    "Comparison",
    "Finding",
    "PairedTest",
    "Protocol",
    "RobustnessReport",
    "average_interval",
    "compare",
    "evaluate",
    "holm",
    "mcnemar",
    "merge",
    "nsd_interval",
    "paired_permutation",
    "simultaneous_interval",
    "trust_checks",
    "wilson_interval",
    "worst_class_interval",
    "worst_fraction_interval",
]
