"""Measurements: what the numbers in the README come from. `results/` holds what was measured."""
