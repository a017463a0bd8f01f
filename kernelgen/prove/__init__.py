"""Kernels against the truth: the repaired interpreter, the cases as tests, mutants."""

SANITIZERS = ("memcheck", "initcheck", "racecheck", "synccheck")  # tools of compute-sanitizer
