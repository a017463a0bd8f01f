"""The sum over the experts of a token: see ``kernelgen.reference.moe_gemm``, whose bounds it shares."""

from kernelgen.reference.moe_gemm import moe_sum

__all__ = ["moe_sum"]
