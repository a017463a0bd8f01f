"""``kernelgen init``: the specs of the kernels that one model needs."""
