"""The sum of a base product and a LoRA delta that was made beside it."""

from __future__ import annotations

import torch

from .. import _runtime as runtime
from ..moe_route._op import MoeRoute
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_add(out: torch.Tensor, delta: torch.Tensor, route: MoeRoute) -> None:
    """out[t, j] += delta[t, j] for every live pair of a route, in fp32, rounded once; other rows keep their bytes.

    ``delta`` is what ``moe_lora`` wrote with ``add_inputs=False``. Rows that it left alone hold anything, and are not read.

    Args:
        out: [T, top_k, N] bfloat16 or float16, last stride 1, stride(0) == top_k * stride(1).
        delta: likewise.
        route: that of the call of ``moe_lora``, from ``moe_route``.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, delta, route)


def _bind(given: Given) -> runtime.Call:
    problem = check("moe_add", given)
    variant = VARIANTS.get("moe_add", torch_dtype=given.out.dtype)
    if problem.num_pairs == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, choose(problem))
    return call


_apply = OP.caller(_bind)
_in_graphs = OP.in_graphs(_apply)
