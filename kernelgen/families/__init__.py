"""The families: a room each, and what several rooms share.

A room, ``families/<family>/``, holds all that is of one family beside its spec and its kernel templates. The modules that begin
with an underscore become part of every generated package, under the same names:

* ``_op.py``: the front door, and what chooses the variant for a call;
* ``_problem.py``: the declaration of the operands, the sizes of a call, and its tiles;
* ``_launch.py``: how the kernels of a schedule are launched: a class, of which the module of a variant makes its ``schedule``.

They depend on torch and triton alone, and import each other by relative names, which hold here and there. What a spec decides
is in the modules ``_table`` and ``_tuned`` beside them, which the build makes. The other modules of a room are the laboratory:

* ``reference.py``: what the family computes, in plain torch and fp64, written for reading: the truth for kernels;
* ``cases.py``: inputs with a name and a reason. ``CASES``: dataclasses that extend ``case.Case``; ``BODY``: the axes that
  change the body of a kernel most, of whose tags every case meets every combination; ``check(package, launcher, tags, case,
  device)``: run one, raise ``AssertionError`` or return the worst error over the bound;
* ``laws.py``: ``LAWS``, what holds between variants and between calls; see ``case.Law``. And ``good(device)``: the arguments of
  a good call of the front door, all that it can be given, which tests spoil one by one, and one more law lays elsewhere;
* ``probes.py``: ``probes(package, variant)``, the problems that a variant is compiled for without a GPU; see ``probe.Probe``. And
  ``tuned(package, variant, entry)``, where tiles are measured: the same with these;
* ``call.py``, for ``kernelgen which``: ``SIZES``, those of a usual call; ``call(package, asked)``, which makes one of the sizes
  and tags that are asked for; see ``call.Asked``. Where tags change the sizes, ``AT``; axes of which a call has several
  tags, ``OPEN``;
* ``tune.py``, of a family with tunables: ``TUNING``, in whose calls its tiles are timed; see ``kernelgen/measure/tune/hints.py``;
* ``suite.py`` and ``workload.py``, of a family that is in no call of the suites: a suite of its own, ``SUITE`` and its operands;
  see ``kernelgen/measure/suite.py``.
"""
