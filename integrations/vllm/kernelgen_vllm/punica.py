"""The object that all LoRA layers of vLLM call, on the front doors of the kernels.

Linear layers share a route that ``update_metadata`` makes once a step, outside of CUDA graphs (``rows``). The routing of experts
is known inside of a graph only; their route is made there, on the device, and goes from the first product to the second.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import kernels as kg
from . import ops
from .plugin import log
from .rows import Rows
from .start import install
from .versions import Refused, seams

__all__ = ["PunicaWrapper", "kernelgen_wrapper", "see"]

_vllm = seams()
DTYPES = (torch.bfloat16, torch.float16)


def kernelgen_wrapper(max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any) -> Any:
    """A wrapper, as vLLM asks for one: ours, or its own where ours would not be right, which one line in the log says."""
    try:
        see(kwargs["lora_config"])
        install()
    except Refused as reason:
        log.warning("kernelgen: LoRA layers are vLLM's own: %s", reason)
        return _vllm.own_wrapper()(max_num_batched_tokens, max_batches, device, **kwargs)
    return PunicaWrapper(max_num_batched_tokens, max_batches, device, **kwargs)


def see(lora_config: Any) -> None:
    """See that LoRA layers of a ``LoRAConfig`` can call a wrapper of ours.

    Raises:
        Refused: why not.
    """
    _vllm.check(PunicaWrapper)
    dtype = lora_config.lora_dtype
    if dtype not in DTYPES:
        raise Refused(f"adapters are of {dtype}, kernels are for bfloat16 and float16")


class PunicaWrapper(_vllm.PunicaWrapperBase):  # type: ignore[name-defined,misc]
    """LoRA of a step: which row has which adapter, and what layers do with it. Arguments are those of vLLM's own wrapper.

    T rows, L = max_loras slots, S slices. Weights of linear layers are S tensors [L, 1, rank, K] and [L, 1, N, rank], those of
    experts [L, E, rank, K] and [L, E, N, rank], of bfloat16 or float16, the scaling folded in.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self.lora_config = kwargs["lora_config"]
        self.max_loras: int = self.lora_config.max_loras
        self.token_mapping_meta = Rows(max_num_batched_tokens, self.max_loras, device)
        self.prompt_mapping_meta = Rows(max_num_batched_tokens, self.max_loras, device)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Take the adapters of a step: of its tokens, and of the rows that are sampled from.

        Raises:
            KeyError: an adapter that is in no slot.
        """
        self.is_prefill = mapping.is_prefill
        slots = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        tokens, samples = slots_of(mapping.index_mapping, slots), slots_of(mapping.prompt_mapping, slots)
        n, m = len(tokens), len(samples)
        # In one copy: both, and where the rows of the embedding of each token's adapter begin.
        host = np.concatenate([tokens, samples, np.maximum(tokens, 0) * vocab_size])
        on_device = _vllm.to_device(host, self.device)
        self._token_lora_indices[:n].copy_(on_device[:n])
        self._sampler_indices[:m].copy_(on_device[n : n + m])
        self._embeddings_indices[:n].copy_(on_device[n + m :])
        self.indices_len[:] = n, m, 0, n
        self.token_mapping_meta.fill(on_device[:n], bool((tokens >= 0).any()))
        self.prompt_mapping_meta.fill(on_device[n : n + m], bool((samples >= 0).any()))

    # Linear layers

    def add_shrink(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: tuple[torch.Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        """y[s] = scale * (x . A_s^T): [S, T, rank] float32, 0 in rows without an adapter, as a collective moves all of them."""
        ops.shrink(y, x.view(-1, x.shape[-1]), list(lora_a_stacked), scale, self.token_mapping_meta)

    def add_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, columns of s] (+)= x[s] . B_s^T, from column ``offset_start`` on."""
        rows = self.token_mapping_meta
        ops.expand(y.view(-1, y.shape[-1]), x.contiguous(), list(lora_b_stacked), offset_start, add_inputs, rows)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y (+)= x . B^T, of the rows x [T, rank] of the embeddings of adapters."""
        ops.expand(y, x.unsqueeze(0), [lora_b_stacked], 0, add_inputs, self.token_mapping_meta)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y[:, columns of s] += scale * (x . A_s^T) . B_s^T; with ``add_inputs=False`` rows with an adapter are overwritten."""
        out, x, add = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), kwargs.get("add_inputs", True)
        ops.linear(out, x, list(lora_a_stacked), list(lora_b_stacked), scale, add, self.token_mapping_meta)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """As ``add_lora_linear``, of the rows that are sampled from; y may be float32."""
        out, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        ops.linear(out, x, [lora_a_stacked], [lora_b_stacked], scale, True, self.prompt_mapping_meta)

    def apply_lora_full_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        weight_stacked: torch.Tensor,
        bias_stacked: torch.Tensor,
        module_enabled: torch.Tensor,
    ) -> None:
        """A classifier of an adapter's own: y = x . W^T + bias, in rows whose adapter has one."""
        own = self.full_linear(x, weight_stacked)
        y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))

    def full_linear(self, x: torch.Tensor, weight_stacked: torch.Tensor) -> torch.Tensor:
        """x . W^T of the adapter of each row, [T, N] float32; 0 in rows without one."""
        own = torch.empty((1, x.shape[0], weight_stacked.shape[-2]), dtype=torch.float32, device=x.device)
        ops.shrink(own, x, [weight_stacked], 1.0, self.prompt_mapping_meta)
        return own[0]

    # Experts

    def add_lora_w13(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        w1: torch.Tensor,
        w2: torch.Tensor,
        num_tokens: int,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: torch.Tensor,
        local_num_experts: int,
        top_k: int,
        num_slices: int,
        fully_sharded: bool,
        use_tuned_config: bool,
        add_inputs: bool = True,
        token_lora_mapping: torch.Tensor | None = None,
    ) -> tuple[Any, None, None, torch.Tensor | None]:
        """y[t, j] += (x[t] . A^T) . B^T of the expert topk_ids[t, j], for gate and up; what is returned goes to ``add_lora_w2``.

        ``token_lora_mapping`` comes with tokens that were gathered from other GPUs; whether those here have adapters says nothing
        then.
        """
        if token_lora_mapping is None:
            if not self.token_mapping_meta.any:
                return None, None, None, None
            token_lora_mapping = self.token_mapping_meta.first(num_tokens).token_lora_mapping
        route = kg.moe_route(
            topk_ids,
            token_lora_mapping.to(torch.int32),
            num_experts=local_num_experts,
            max_loras=max_loras,
            adapter_enabled=adapter_enabled,
            expert_map=expert_map,
            rank=lora_a_stacked[0].shape[-2],
        )
        out, factors = y.view(-1, top_k_num, y.shape[-1]), (list(lora_a_stacked), list(lora_b_stacked))
        if fully_sharded:
            _sharded(out, x, *factors, route, add_inputs=add_inputs)
        else:
            kg.moe_lora(out, x, *factors, route, add_inputs=add_inputs)
        return route, None, None, token_lora_mapping

    def add_lora_w2(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor,
        sorted_token_ids_lora: Any,
        expert_ids_lora: None,
        num_tokens_post_padded_lora: None,
        token_lora_mapping: torch.Tensor | None,
        num_tokens: int,
        w1: torch.Tensor,
        w2: torch.Tensor,
        top_k_num: int,
        max_loras: int,
        adapter_enabled: torch.Tensor,
        top_k: int,
        fully_sharded: bool,
        tp_rank: int,
        use_tuned_config: bool,
        add_inputs: bool = True,
    ) -> None:
        """y[t, j] += topk_weights[t, j] * (x[t, j] . A^T) . B^T, for down; the route is in ``sorted_token_ids_lora``."""
        route, factors = sorted_token_ids_lora, (list(lora_a_stacked), list(lora_b_stacked))
        if route is None:  # no token has an adapter
            return
        options: dict[str, Any] = {"topk_weights": topk_weights, "mul_routed_weight": True, "add_inputs": add_inputs}
        if fully_sharded:
            _sharded(y, x, *factors, route, offset=lora_b_stacked[0].shape[-2] * tp_rank, **options)
        else:
            kg.moe_lora(y, x, *factors, route, **options)


def _sharded(
    out: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], route: Any, **options: Any
) -> None:
    """``moe_lora`` of factors that are cut over the GPUs of a group: in the rank of A, or in its columns."""
    vectors = torch.empty((len(a), route.num_tokens * route.top_k, a[0].shape[-2]), dtype=torch.float32, device=x.device)
    kg.moe_lora_shrink(vectors, x, a, route)
    whole_rank = a[0].shape[-2] == b[0].shape[-1]
    join = _vllm.tensor_model_parallel_all_reduce if whole_rank else _vllm.tensor_model_parallel_all_gather
    kg.moe_lora_expand(out, join(vectors), b, route, **options)


def slots_of(adapters: tuple[int, ...], slots: dict[int, int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The slot of each adapter, -1 where there is none (0 or less).

    Raises:
        KeyError: an adapter that is in no slot.
    """
    ids = np.asarray(adapters, dtype=np.int64).reshape(-1)
    found = np.full(ids.shape, -1)
    for adapter, slot in slots.items():
        found[ids == adapter] = slot
    lost = ids[(ids > 0) & (found < 0)]
    if lost.size:
        raise KeyError(int(lost[0]))
    found[ids <= 0] = -1
    return found
