"""``kernelgen tune``: search the tunables that a spec declares, on the GPUs of this machine, for what is fastest."""
