"""The sum over the experts of a token: see ``kernelgen.families.moe_gemm.reference``, whose bounds it shares."""

from kernelgen.families.moe_gemm.reference import moe_sum

__all__ = ["moe_sum"]
