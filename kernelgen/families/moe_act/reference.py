"""The activation between two projections: see ``kernelgen.families.moe_gemm.reference``, whose bounds it shares."""

from kernelgen.families.moe_gemm.reference import moe_act

__all__ = ["moe_act"]
