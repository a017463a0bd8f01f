"""Adapters between the generated kernels and the systems that serve models; each module needs its own system only."""
