"""Somebody else's kernels under the cases of this package: ``run``, and an adapter for each system that is known here."""
