"""Modules of a generated package that depend on no variant: copied into it as they stand, under the same names.

They depend on torch and triton alone, and import each other by relative names, which hold here and there.
"""
