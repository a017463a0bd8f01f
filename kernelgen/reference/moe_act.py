"""The activation between two projections: see ``kernelgen.reference.moe_gemm``, whose bounds it shares."""

from kernelgen.reference.moe_gemm import moe_act

__all__ = ["moe_act"]
