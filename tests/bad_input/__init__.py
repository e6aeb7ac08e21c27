"""Tables of bad input, one for each module of the package; tests/test_bad_input.py walks them."""
