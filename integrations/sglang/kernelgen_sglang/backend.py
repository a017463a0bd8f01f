"""The object that all LoRA layers of SGLang call, on the front doors of the kernels.

A batch says which adapter each of its rows has, once a step and outside of CUDA graphs; its route, ranks and scalings are at
fixed addresses. The routing of experts is known inside of a graph only, see ``experts``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from . import kernels as kg
from .versions import seams

__all__ = ["Backend", "Batch", "Logits"]

_sglang = seams()
_Ints = np.ndarray[Any, np.dtype[np.int32]]


class Batch:
    """Which adapter each of up to ``capacity`` rows has; SGLang takes it for its own ``LoRABatchInfo``.

    Attributes:
        lora_ranks, scalings: [max_loras] int32 and float32 on the device, of the adapters in the slots.
        use_cuda_graph: it is of a graph, whose batches all have its tensors.
        has_active_lora: some row has an adapter, which the host knows.
        num_tokens, expected_tokens: rows of the batch that it was filled with.
        is_prefill: SGLang sets it.
    """

    def __init__(self, capacity: int, max_loras: int, device: torch.device, *, use_cuda_graph: bool = False) -> None:
        none = torch.empty(0, dtype=torch.int32, device=device)  # as slots come, so that it is compiled
        self._held, self.capacity = kg.lora_route(none, max_loras=max_loras, capacity=capacity), capacity
        self._adapters = torch.zeros(2 * max_loras, dtype=torch.int32, device=device)
        self.lora_ranks = self._adapters[:max_loras]
        self.scalings = self._adapters[max_loras:].view(torch.float32)
        self.use_cuda_graph = use_cuda_graph
        self.has_active_lora = self.is_prefill = False
        self.num_tokens = self.expected_tokens = 0

    @property
    def token_slots(self) -> torch.Tensor:
        """[capacity] int32, the slot of each row, -1: none, as behind the batch."""
        slots: torch.Tensor = self._held.first(self.capacity).token_lora_mapping
        return slots

    @property
    def moe_lora_info(self) -> Any:
        """What experts are told: without segments, by which ``experts`` knows it."""
        return _sglang.MoELoRABatchInfo(None, None, self.lora_ranks, self.token_slots)

    def fill(self, slots: torch.Tensor, adapters: torch.Tensor | None = None) -> None:
        """Take the rows of a step, [n] int32, the slot of each, -1: none; and the ranks and scalings, [2 * max_loras] int32."""
        self._held.refill(slots)
        if adapters is not None:
            self._adapters.copy_(adapters)
        self.num_tokens = self.expected_tokens = slots.shape[0]

    def first(self, num_rows: int) -> Any:
        """The route of an op on the first rows."""
        return self._held.first(num_rows)


class Logits:
    """The rows of a batch that reach the head, or those of a pass over them; SGLang looks at its attributes.

    Attributes:
        slots: [n] int32 on the device, the slot of each, -1: none.
    """

    use_cuda_graph = False

    def __init__(self, slots: torch.Tensor) -> None:
        self.slots, self.expected_tokens = slots, slots.shape[0]


class Backend(_sglang.BaseLoRABackend):  # type: ignore[name-defined,misc]
    """LoRA of a step: which row has which adapter, and what layers do with it. Arguments are those of SGLang's own backends.

    T rows, L = max_loras_per_batch slots, S slices. Factors of a linear layer are [L, S * rank, K], in which the slices of an
    adapter lie one behind the other by its own rank, and [L, N, rank], of bfloat16 or float16.

    Args:
        name: of the backend that it is in place of: with which runner of experts it goes.
        capacity: rows of the largest batch; a larger one has its route compiled when it comes.
    """

    supports_prefill_cuda_graph = True
    skip_inactive_dense_lora = True

    def __init__(self, name: str, max_loras_per_batch: int, device: torch.device, *, capacity: int) -> None:
        super().__init__(max_loras_per_batch, device)
        self.name, self.capacity = name, capacity
        self.lora_workspace = self  # that of a runner of experts, which knows us by it
        self._eager, self._head = self._new(capacity), self._new(capacity)
        self._decode: Batch | None = None
        self._slices: dict[tuple[int, int, tuple[int, ...]], tuple[Any, ...]] = {}

    # Steps

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        self._decode = self._new(max_bs_in_cuda_graph * num_tokens_per_req, use_cuda_graph=True)

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens: int, max_num_requests: int | None = None) -> None:
        self.prefill_cuda_graph_batch_info = self._new(max_num_tokens, use_cuda_graph=True)
        self.prefill_cuda_graph_max_bs = max_num_tokens if max_num_requests is None else max_num_requests
        self.prefill_cuda_graph_max_tokens = max_num_tokens

    def init_cuda_graph_moe_buffers(self, *args: Any, **kwargs: Any) -> None:
        """Experts have a route of their own in a graph, and no buffers."""

    def reset_routing_cache(self) -> None:
        """Routes are made in front of a graph, or inside of it each time."""

    def prepare_lora_batch(
        self,
        forward_batch: Any,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_decode_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Take the adapters of a step: a slot a request; rank and scaling a slot, of those that are in the batch.

        Raises:
            ValueError: the batch has more rows than its graph was made for.
        """
        rows, logits = _sglang.rows_of_requests(forward_batch), _sglang.rows_of_logits(forward_batch)
        batch = self._decode if use_decode_cuda_graph else None
        if use_prefill_cuda_graph:
            batch = self.prefill_cuda_graph_batch_info
        self._fill(batch, rows, weight_indices, lora_ranks, scalings, logits)

    def prepare_lora_token_segments(
        self, *, segment_lens: list[int], weight_indices: list[int], lora_ranks: list[int], scalings: list[float]
    ) -> None:
        """Take the adapters of segments of rows, without requests."""
        self._fill(None, segment_lens, weight_indices, lora_ranks, scalings, None)

    def _fill(
        self,
        batch: Batch | None,
        rows: list[int],
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        logits: list[int] | None,
    ) -> None:
        num_rows, ranks = sum(rows), np.asarray(lora_ranks, np.int32)
        if batch is None:
            batch = self._eager = self._holding(self._eager, num_rows)
        requests = np.asarray(weight_indices, np.int32)
        requests = np.where(ranks[requests] > 0, requests, np.int32(-1))
        # In one copy: the slots of all rows and of those that reach the head, and what adapters have.
        of_head = [] if logits is None else [np.repeat(requests, logits)]
        adapters = np.concatenate([ranks, np.asarray(scalings, np.float32).view(np.int32)])
        host = torch.from_numpy(np.concatenate([np.repeat(requests, rows), *of_head, adapters]))
        on_device = host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)
        batch.fill(on_device[:num_rows], on_device[-adapters.size :])
        batch.has_active_lora = bool((requests >= 0).any())
        self.batch_info = batch
        self._lm_head_pass_idx = self.lm_head_batch_info = self.lm_head_pass_batch_infos = None
        if logits is not None:
            slots, each = on_device[num_rows : -adapters.size], _sglang.logits_at_once()
            self.lm_head_batch_info = Logits(slots)
            if each is not None and slots.shape[0] > each:
                passes = range(0, slots.shape[0], each)
                self.lm_head_pass_batch_infos = [Logits(slots[begin : begin + each]) for begin in passes]

    def _new(self, capacity: int, *, use_cuda_graph: bool = False) -> Batch:
        return Batch(max(1, capacity), self.max_loras_per_batch, self.device, use_cuda_graph=use_cuda_graph)

    def _holding(self, batch: Batch, num_rows: int) -> Batch:
        """A batch, or a larger one in place of it, which no graph has."""
        return batch if num_rows <= batch.capacity else self._new(1 << (num_rows - 1).bit_length())

    def _rows(self, logits: Logits | None, num_rows: int) -> Any:
        """The route of a call."""
        if logits is None:
            return self.batch_info.first(num_rows)
        self._head = self._holding(self._head, logits.expected_tokens)
        self._head.fill(logits.slots)
        return self._head.first(num_rows)

    # Layers

    def forward_with_base(
        self,
        layer: Any,
        x: torch.Tensor,
        base_fn: Callable[[], torch.Tensor],
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        output_offset: torch.Tensor | None,
        offsets: Sequence[int],
        *,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        kind: Any = "linear",
        pruned_batch_info: Logits | None = None,
    ) -> torch.Tensor:
        """base + scaling * (x . A_s^T) . B_s^T in the columns of each slice s, and its sum over GPUs, which both take at once."""
        out = base_fn()
        if kind == _sglang.DenseLoraKind.EMBEDDING:
            self._embedding(out, x, lora_a, lora_b)
        else:
            self._linear(out, x, lora_a, lora_b, tuple(offsets), pruned_batch_info)
        return out if all_reduce is None else all_reduce(out)

    def run_lora_a_sgemm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        pruned_batch_info: Logits | None = None,
        stack_num: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """x . A^T, [T, S * rank], where slices lie as in A; 0 behind the ranks of an adapter, and where there is none."""
        ranks = self.batch_info.lora_ranks * stack_num
        y = x.new_empty(1, x.shape[0], weights.shape[1], dtype=torch.float32)
        route = self._rows(pruned_batch_info, x.shape[0])
        kg.lora_shrink(y, x, [weights], route, zero_rest=True, lora_ranks=ranks)
        return y[0].to(x.dtype)

    def run_lora_b_sgemm(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        *args: Any,
        base_output: torch.Tensor | None = None,
        pruned_batch_info: Logits | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """base + scaling * x . B^T, of x [T, rank]."""
        out = x.new_zeros(x.shape[0], weights.shape[1]) if base_output is None else base_output
        route = self._rows(pruned_batch_info, x.shape[0])
        kg.lora_expand(out, self._scaled(x, route.token_lora_mapping), [weights], route)
        return out

    def run_lora_a_embedding(
        self,
        input_ids: torch.Tensor,
        weights: torch.Tensor,
        vocab_size: int,
        extra_embeddings: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A[:, id] of each row's adapter, [T, rank], of A [L, rank, vocabulary]; 0 where there is none, or no such id.

        Raises:
            NotImplementedError: there are embeddings of added tokens, which SGLang loads no adapters with.
        """
        if extra_embeddings is not None:
            raise NotImplementedError("kernelgen: an adapter adds tokens to the vocabulary")
        slots = self.batch_info.first(input_ids.shape[0]).token_lora_mapping
        rows = weights[slots.clamp_min(0).long(), :, input_ids.clamp(0, weights.shape[2] - 1)]
        known = (slots >= 0) & (input_ids >= 0) & (input_ids < weights.shape[2])
        return torch.where(known[:, None], rows, 0)

    def run_qkv_lora(
        self,
        x: torch.Tensor,
        qkv_lora_a: torch.Tensor,
        qkv_lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        max_qkv_out_dim: int,
        base_output: torch.Tensor | None = None,
        n_slices: int = 3,
        *args: Any,
        output_offset_cpu: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """base + the deltas of slices, which begin and end at the columns ``output_offset``."""
        offsets = (output_offset if output_offset_cpu is None else output_offset_cpu).tolist()
        return self._added(base_output, x, qkv_lora_a, qkv_lora_b, tuple(offsets))

    def run_gate_up_lora(
        self,
        x: torch.Tensor,
        gate_up_lora_a: torch.Tensor,
        gate_up_lora_b: torch.Tensor,
        base_output: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """base + the deltas of two slices that are as wide."""
        width = gate_up_lora_b.shape[1]
        return self._added(base_output, x, gate_up_lora_a, gate_up_lora_b, (0, width // 2, width))

    def _added(
        self, base: torch.Tensor | None, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: tuple[int, ...]
    ) -> torch.Tensor:
        out = x.new_zeros(x.shape[0], lora_b.shape[1]) if base is None else base
        self._linear(out, x, lora_a, lora_b, offsets, None)
        return out

    def _linear(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        offsets: tuple[int, ...],
        logits: Logits | None,
    ) -> None:
        a, b = self._sliced(lora_a, lora_b, offsets)
        of_adapters = {"lora_ranks": self.batch_info.lora_ranks, "scalings": self.batch_info.scalings, "packed": len(a) > 1}
        kg.lora(out, x, a, b, self._rows(logits, x.shape[0]), **of_adapters)

    def _embedding(self, out: torch.Tensor, ids: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        route = self.batch_info.first(ids.shape[0])
        rows = self.run_lora_a_embedding(ids, lora_a, lora_a.shape[2])
        kg.lora_expand(out, self._scaled(rows, route.token_lora_mapping), [lora_b], route)

    def _scaled(self, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[1, T, rank] float32, rank vectors by the scaling of each row's adapter."""
        return (rows * self.batch_info.scalings[slots.clamp_min(0).long(), None])[None]

    def _sliced(self, lora_a: torch.Tensor, lora_b: torch.Tensor, offsets: tuple[int, ...]) -> tuple[Any, Any]:
        """The slices of factors, which stay where they are for good."""
        key = (id(lora_a), id(lora_b), offsets)
        found = self._slices.get(key)
        if found is None:
            rank = lora_b.shape[2]
            a = [lora_a[:, i * rank : (i + 1) * rank] for i in range(len(offsets) - 1)]
            b = [lora_b[:, begin:end] for begin, end in itertools.pairwise(offsets)]
            self._slices[key] = found = (lora_a, lora_b, a, b)  # held, so that no others have their ids
        return found[2:]
