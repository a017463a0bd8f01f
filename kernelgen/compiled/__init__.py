"""Kernels compiled without a GPU: what they use, the lock, what limits them, and which of them serves a call."""
