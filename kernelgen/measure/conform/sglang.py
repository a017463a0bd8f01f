"""SGLang's kernels of dense LoRA, called as its layers call them: rows sorted into blocks of an adapter, or each by itself.

Its factors of all slices are one tensor, and so are its rank vectors: what a call of ours has apart is put side by side.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import Any, Callable

import torch

from kernelgen.families.case import Tags
from kernelgen.measure.conform.run import Adapter, adapters_of_tokens, theirs
from kernelgen.measure.workload import Unsupported

_OPS = "sglang.kernels.ops.lora.common"
_LARGE = 2**24  # bytes; what is larger is sparse, and cannot be put side by side
_BLOCK, _TILE = 16, 32  # rows of a block, columns of a tile
_CONFIG = {"BLOCK_SIZE_N": _TILE, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 2, "num_warps": 4, "num_stages": 2}
importlib.import_module(f"{_OPS}.lora_a")


def _route(mapping: torch.Tensor, max_loras: int, sorted_rows: bool) -> Any:
    """A route of tokens; sorted by adapter into blocks that are padded, as its CUDA op does it."""
    found = importlib.import_module(f"{_OPS}.route_view")
    num, kind = mapping.numel(), found.RouteViewKind
    given = {"block_size": _BLOCK, "token_slots": mapping, "group_ids": None, "groups_per_slot": 1, "max_loras": max_loras}
    if not sorted_rows:
        return found.RouteView(view=kind.RAW, **given)
    blocks = max_loras + -(-num // _BLOCK)
    pairs = torch.full((blocks * _BLOCK,), num, dtype=torch.int32, device=mapping.device)
    owners = torch.full((blocks,), -1, dtype=torch.int32, device=mapping.device)
    at = 0
    for adapter in range(max_loras):
        rows = (mapping == adapter).nonzero()[:, 0].int()
        pairs[at * _BLOCK : at * _BLOCK + len(rows)] = rows
        needed = -(-len(rows) // _BLOCK)
        owners[at : at + needed] = adapter
        at += needed
    end = torch.tensor([at * _BLOCK], dtype=torch.int32, device=mapping.device)
    tables = {"maybe_sorted_pair_ids": pairs, "maybe_block_bucket_ids": owners, "maybe_num_pairs_post_padded": end}
    return found.RouteView(view=kind.ALIGNED, **given, **tables)


def _joined(parts: Any, dim: int) -> torch.Tensor:
    """Parts [L, *, *] of slices as one tensor."""
    weights = [part.squeeze(1) if part.dim() == 4 else part for part in parts]
    if any(part.untyped_storage().nbytes() > _LARGE for part in weights):
        raise Unsupported("factors of slices in one tensor")
    return torch.cat(weights, dim).contiguous()


def _claimed(tags: Tags, x: torch.Tensor) -> None:
    if tags["weight_quant"] != "none" or tags["act_quant"] != "none":
        raise Unsupported("operands in 16 bits")
    if x.shape[-2] == 0:
        raise Unsupported("a token at least")


def _shrink(
    tags: Tags, y: Any, x: Any, lora_a: Any, route: Any, scaling: float, *, sorted_rows: bool = True, splits: int = 1
) -> None:
    _claimed(tags, x)
    weight, slices, mapping = _joined(lora_a, 1), y.shape[0], adapters_of_tokens(route, x.device)
    view, given = _route(mapping, route.max_loras, sorted_rows), {"stack": slices}
    out = torch.empty(x.shape[0], weight.shape[1], dtype=torch.float32, device=x.device)
    config: dict[str, Any] = dict(_CONFIG)
    if splits > 1:
        tiles = view.sorted_pair_ids.numel() // _BLOCK * -(-weight.shape[1] // _TILE)
        given |= {"partial": out.new_empty(splits, *out.shape), "counters": torch.zeros(tiles, dtype=torch.int32)}
        config |= {"SPLIT_K": splits, "SPLIT_MODE": "serial"}
    theirs(f"{_OPS}.lora_a", "grouped_lora_a" if sorted_rows else "per_row_lora_a", x, weight, out, view, config=config, **given)
    live = (mapping >= 0).nonzero()[:, 0]
    y[:, live] = (out[live] * scaling).view(len(live), slices, out.shape[1] // slices).transpose(0, 1)  # theirs scales later


def _expand(tags: Tags, out: Any, y: Any, lora_b: Any, route: Any, offset_start: int = 0, *, sorted_rows: bool = True) -> None:
    _claimed({"act_quant": "none", **tags}, y)
    found, weight = importlib.import_module(f"{_OPS}.lora_b"), _joined(lora_b, 1)
    widths = [part.shape[-2] for part in lora_b]
    rows = list(itertools.accumulate(widths, initial=0))
    columns = [offset_start + row for row in rows[:-1]]
    uniform = widths[0] if len({*widths}) == 1 else 0
    geometry = found.SliceGeometry(
        slice_offsets=torch.tensor(rows, dtype=torch.int32, device=out.device),
        out_offsets=torch.tensor(columns, dtype=torch.int32, device=out.device),
        num_slices=len(widths),
        num_column_tiles=sum(-(-width // _TILE) for width in widths),
        uniform_width=uniform,
        out_stride=0,
        full_tiles=all(width % _TILE == 0 for width in widths),
        block_size_n=_TILE,
    )
    view = _route(adapters_of_tokens(route, out.device), route.max_loras, sorted_rows)
    bridge = y.transpose(0, 1).flatten(1).contiguous()
    given = {"geometry": geometry, "config": _CONFIG, "add_inplace": tags["add_inputs"] == "add", "zero_sentinel": False}
    theirs(f"{_OPS}.lora_b", "grouped_lora_b" if sorted_rows else "per_row_lora_b", bridge, weight, out, view, **given)


_Calls = dict[str, Callable[..., None]]
_SHRINKS: _Calls = {
    "grouped_lora_a": _shrink,
    "grouped_lora_a in parts of K": functools.partial(_shrink, splits=3),
    "per_row_lora_a": functools.partial(_shrink, sorted_rows=False),
}
_EXPANDS: _Calls = {"grouped_lora_b": _expand, "per_row_lora_b": functools.partial(_expand, sorted_rows=False)}
_SERVED = {"dtype": ("bf16",), "weight_quant": ("none",), "act_quant": ("none",)}
ADAPTERS = {
    "lora_shrink": Adapter(_SHRINKS, _SERVED),
    "lora_expand": Adapter(_EXPANDS, {"dtype": ("bf16",), "weight_quant": ("none",)}),
}
