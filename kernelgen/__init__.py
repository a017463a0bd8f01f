"""kernelgen writes GPU kernels: from YAML specs to specialised Triton kernels, launchers and their tests."""

__version__ = "0.1.0"
