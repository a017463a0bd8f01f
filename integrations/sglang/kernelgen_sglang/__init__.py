"""A plugin of SGLang: LoRA adapters, and the unquantised experts under them, on the kernels of kernelgen.

SGLang calls ``plugin.register`` in each of its processes. What it replaces, and for which releases, ``versions`` says:

- ``contract``: what is asked of a server, how far numbers may be from SGLang's own, and each reason to leave LoRA to it.
- ``backend``: the object that all LoRA layers call, with routes that are made once a step.
- ``experts``: what adapters add to the experts of an MoE layer, and these layers themselves.
- ``start``: kernels are compiled before the first request.
"""

__version__ = "0.1.0"
