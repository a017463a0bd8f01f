"""Small mixture-of-experts models with random weights, and adapters on their experts as PEFT saves them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, Mapping

import torch

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """One adapter to make: its LoRA settings, and which parameters of the experts it changes."""

    name: str
    rank: int
    alpha: int
    rslora: bool = False
    targets: tuple[str, ...] = ("gate_up_proj", "down_proj")

    @property
    def scaling(self) -> str:
        """How the update is scaled, in words."""
        return f"{self.alpha}/sqrt({self.rank})" if self.rslora else f"{self.alpha}/{self.rank}"


ADAPTERS = (
    AdapterSpec("poet", rank=8, alpha=16),
    AdapterSpec("lawyer", rank=16, alpha=8, rslora=True),
    AdapterSpec("coder", rank=12, alpha=18, targets=("down_proj",)),
)


def qwen3_moe() -> Any:
    """Two layers of Qwen3-MoE: 8 experts, 4 a token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        initializer_range=0.1,
    )
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> Any:
    """Two layers of Mixtral: 4 experts, 2 a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
    )
    return MixtralForCausalLM(config).eval()


MODELS: Mapping[str, Any] = {"qwen3_moe": qwen3_moe, "mixtral": mixtral}


def save_adapter(model: torch.nn.Module, spec: AdapterSpec, folder: Path) -> Path:
    """Let PEFT make an adapter with random factors, none of them zero, and save it; return its folder."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=[],
        target_parameters=[f"experts.{target}" for target in spec.targets],
    )
    adapted = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, factor in adapted.named_parameters():
            if "lora_A" in name:
                factor.normal_(std=factor.shape[1] ** -0.5)
            elif "lora_B" in name:
                factor.normal_(std=0.25 * spec.rank**-0.5)
    adapted.save_pretrained(folder / spec.name)
    return folder / spec.name
