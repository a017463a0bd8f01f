"""A plugin of vLLM: LoRA adapters, and the experts under them, on the kernels of kernelgen.

vLLM calls ``plugin.register`` in each of its processes. What it replaces, and for which releases, ``versions`` says:

- ``punica``: the object that all LoRA layers call, with routes that are made once a step (``rows``).
- ``experts``: what the experts of an MoE layer do; ``mxfp4``: which of those in MXFP4 are ours, hooked by ``early``.
- ``start``: what serves which layers is said, and their kernels are compiled, before the first request.
"""

__version__ = "0.1.0"
