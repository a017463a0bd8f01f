"""What says which pair of a token and an expert goes where, and with which adapter: operands that several ops take alike."""

from __future__ import annotations

from typing import Annotated

import torch

from . import _operands as operands

INT32 = (torch.int32, operands.CONTIGUOUS)

TopkIds = Annotated[torch.Tensor, operands.Tensor("T, top_k", operands.IDS, operands.CONTIGUOUS)]  # of experts
TopkWeights = Annotated[
    torch.Tensor | None, operands.Tensor("T, top_k", operands.FLOATS, operands.CONTIGUOUS, asks=("weighted",))
]
ExpertMap = Annotated[torch.Tensor, operands.Tensor(">=1", *INT32)]  # of global experts, -1: not here
TokenLoraMapping = Annotated[torch.Tensor, operands.Tensor("T", *INT32)]  # the adapter of each token, -1: none
AdapterEnabled = Annotated[torch.Tensor | None, operands.Tensor(">=L", *INT32)]  # 0: disabled
LoraRanks = Annotated[torch.Tensor | None, operands.Tensor(">=L", *INT32)]  # how many ranks of each adapter count
