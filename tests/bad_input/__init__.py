"""The table of tests/test_bad_input_matrix.py: what is handed to each public name."""

from bad_input import compositions, evaluation, primitives
from bad_input.kinds import CASES

__all__ = ["CASES", "compositions", "evaluation", "primitives"]
