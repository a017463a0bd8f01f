"""The sum over the experts of each token."""

from __future__ import annotations

import torch

from .. import _runtime as runtime
from ..moe_route._op import MoeRoute
from ._problem import OP, Given, check, choose
from ._table import VARIANTS


def moe_sum(
    y: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_experts: int,
    local_expert_start: int = 0,
    topk_weights: torch.Tensor | None = None,
    valid_tokens: torch.Tensor | None = None,
    num_tokens_hint: int | None = None,
    out: torch.Tensor | None = None,
    keep_empty: bool = False,
    delta: torch.Tensor | None = None,
    route: MoeRoute | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = the sum over the local experts of token t of w[t, j] * (y[t, j] + delta[t, j] + bias[e]), in fp32,
    rounded once.


    Args:
        y: [T, top_k, N] bfloat16, float16 or float32, stride(0) == top_k * stride(1); rows of pairs that are not local are not
            read.
        topk_ids: [T, top_k] int32 or int64, global ids.
        num_experts, local_expert_start: the global ids that are local.
        topk_weights: [T, top_k] float, w; None: 1.
        valid_tokens: int32 on the device, how many of the T rows are tokens; None: all.
        num_tokens_hint: how many tokens to expect, for the size of the grid; None: T. Any number is right.
        out: [T, N] in any float dtype, of which rows from ``valid_tokens`` on keep their bytes; None: a new float32
            tensor, in which they are zero.
        keep_empty: rows of tokens without a local expert keep their bytes too, in a caller's ``out``; else they become zero.
        delta, route: what ``moe_lora`` wrote with ``add_inputs=False``, like ``y``, and its route, from ``moe_route``: rows of
            pairs that are live on it are added, others are not read. None: y has it already, or there is none.
        bias: [E, N] in any float dtype, last stride 1, of the local experts; with ``topk_weights`` alone. Of layers that are cut
            over GPUs in the columns of W2 one has it, and others zeros. None: y has it already, or there is none.

    Raises:
        ValueError: something does not fit, or no variant serves it; nothing was launched.
    """
    zeroes = out is None
    routing = (topk_ids, topk_weights, valid_tokens, num_experts, local_expert_start, num_tokens_hint)
    rest = (*routing, zeroes, keep_empty, delta, route, bias)
    if out is None:
        try:
            out = torch.empty((y.shape[0], y.shape[-1]), dtype=torch.float32, device=y.device)
        except (AttributeError, IndexError) as error:
            OP.refuse(Given(None, y, *rest), error)  # type: ignore[arg-type]
    (_in_graphs if torch.compiler.is_compiling() else _apply)(out, y, *rest)
    return out


def bind(given: Given) -> runtime.Call:
    """The launch for calls that look like this one.

    Raises:
        ValueError: as ``moe_sum``.
    """
    problem = check("moe_sum", given)
    if given.keep_empty and given.zeroes:
        runtime.fail("moe_sum", "out", None, "a tensor, of which rows are kept", "keep_empty is about what is there")
    facts = {"weighted": given.topk_weights is not None, "zeroes": given.zeroes}
    facts |= {"adapted": given.delta is not None, "biased": given.bias is not None}
    of_16_bits = [t.dtype for t in (given.y, given.delta) if t is not None and t.dtype in VARIANTS.dtypes]
    variant = VARIANTS.get("moe_sum", torch_dtype=(of_16_bits or VARIANTS.dtypes)[0], **facts)  # no text hangs on that of y
    if problem.num_tokens == 0:
        return runtime.NOTHING
    call: runtime.Call = variant.bind(problem, choose(problem))
    return call


_apply = OP.caller(bind)
_in_graphs = OP.in_graphs(_apply)
