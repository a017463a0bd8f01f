"""A plugin of vLLM: LoRA adapters, and the experts under them, on the kernels of kernelgen.

vLLM calls ``plugin.register`` in each of its processes. What it replaces, and for which releases, ``versions`` says:

- ``punica``: the object that all LoRA layers call, with routes that are made once a step (``rows``).
- ``experts``: what the experts of an unquantised MoE layer do.
- ``warm``: kernels are compiled before the first request.
"""

__version__ = "0.1.0"
