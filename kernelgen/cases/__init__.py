"""The cases of each family: inputs with a name and a reason, and how a kernel is held against the reference on them.

A family has a module here of its own name, with

* ``CASES``: the cases, each a dataclass that extends ``Case``;
* ``BODY``: the axes that change the body of a kernel most; every case meets every combination of their tags;
* ``check(package, launcher, tags, case, device)``: run one, raise ``AssertionError`` or return the worst error over the bound,

and a second one, ``<family>_laws``, with ``LAWS``: what holds between variants and between calls; see ``Law``.
"""
