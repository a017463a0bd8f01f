"""The operands of each suite, what is right for them, and the generated package on them: a module a suite, of its name.

Each holds ``Workload`` and ``Ours``, an ``Implementation``.
"""
