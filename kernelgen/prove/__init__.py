"""Kernels against the truth: the repaired interpreter, the cases as tests, mutants."""
