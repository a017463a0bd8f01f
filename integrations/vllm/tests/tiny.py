"""Tiny random models and adapters on disk, and what transformers says of them with weights merged: the truth.

A request is right when what an engine says of every step is at least ``TELLS`` times nearer to the model under its own adapter
than to it under any other; so no tolerance is chosen, and a token that had the delta of another adapter for one step shows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

TELLS = 8
VOCAB = 96
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15}


def llama() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(intermediate_size=96, **SIZES)


def qwen3_moe() -> transformers.PreTrainedConfig:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return transformers.Qwen3MoeConfig(intermediate_size=96, decoder_sparse_step=1, mlp_only_layers=[], **experts, **SIZES)


def gpt_oss() -> transformers.PreTrainedConfig:
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return transformers.GptOssConfig(intermediate_size=32, sliding_window=16, **experts, **SIZES)


def gpt_oss_mxfp4() -> transformers.PreTrainedConfig:
    """Its experts in MXFP4; all of them for each token, as below."""
    config = gpt_oss()
    config.update({"num_local_experts": 4, "num_experts_per_tok": 4, "intermediate_size": 64})
    return config


def qwen3_moe_fp8() -> transformers.PreTrainedConfig:
    """Its experts in blocks of FP8; all of them for each token, so that no rounding chooses others."""
    config = qwen3_moe()
    config.update({"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 4})
    return config


CONFIGS = {config.__name__: config for config in (llama, qwen3_moe, qwen3_moe_fp8, gpt_oss, gpt_oss_mxfp4)}


def _blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [*, rows, columns] in the numbers of FP8, in FP8, and a power of two a block of 128 x 128: its scale."""
    blocks = weights.float().unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    scale = (blocks.abs().amax((-3, -1), keepdim=True) / 448).log2().ceil().exp2()
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    numbers = (codes.float() * scale).reshape(weights.shape).to(weights.dtype)
    return numbers, codes.reshape(weights.shape), scale[..., 0, :, 0]


def _mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [*, rows, columns] in the numbers of MXFP4, two a byte [*, rows, columns / 32, 16], and a scale of each 32."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = weights.float().unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1, keepdim=True).log2().floor() - 2
    scaled = groups / exponent.exp2()
    codes = (scaled.abs()[..., None] - grid).abs().argmin(-1)
    numbers = (grid[codes] * scaled.sign() * exponent.exp2()).flatten(-2).to(weights.dtype)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return numbers, codes[..., ::2] | codes[..., 1::2] << 4, (exponent[..., 0] + 127).to(torch.uint8)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Model:
    """A model in a folder, and adapters on it by name, in folders beside it."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder, self.dtype, self.quant = folder, dtype, kind.rpartition("_")[2]
        torch.manual_seed(0)
        self.config = CONFIGS[kind]()
        model = transformers.AutoModelForCausalLM.from_config(self.config).to(dtype)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
                    weight *= 8  # so that rounding does not choose other experts
                elif name.endswith("bias"):
                    weight.normal_(std=0.3)
                if self.quant == "fp8" and ".experts." in name:
                    weight.copy_(_blocks(weight / 4)[0])
                elif self.quant == "mxfp4" and name.endswith("_proj"):
                    weight.copy_(_mxfp4(weight.mT)[0].mT)
        model.save_pretrained(folder / "base")
        if self.quant in ("fp8", "mxfp4"):
            self._quantize(folder / "base")
        self.weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
        self.deltas: dict[str | None, dict[str, torch.Tensor]] = {None: {}}
        self._merged: dict[str | None, Any] = {}

    def _quantize(self, folder: Path) -> None:
        """Make the experts of a model that was saved FP8 or MXFP4, which hold their numbers."""
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if ".experts." in name and not name.endswith("bias")]:
            if self.quant == "fp8":
                _, tensors[name], tensors[f"{name}_scale_inv"] = _blocks(tensors[name])
            else:
                _, tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = _mxfp4(tensors.pop(name).mT)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        others = [
            name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2 and ".experts." not in name
        ]
        said: dict[str, Any] = {"quant_method": self.quant}
        if self.quant == "fp8":
            said |= {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(
            json.dumps(config | {"quantization_config": {**said, "modules_to_not_convert": others}})
        )

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    def adapter(self, name: str, rank: int, seed: int, targets: tuple[str, ...]) -> str:
        """The folder of a random adapter on the linear layers, experts or embeddings whose names end so, as PEFT writes it."""
        generator = torch.Generator().manual_seed(seed)
        tensors, deltas = {}, {}
        strength = 0.6 if self.quant in ("fp8", "mxfp4") else 0.3  # so that adapters tell beside what FP8 makes of tokens

        def product(path: str, rows: int, columns: int, embedding: bool = False) -> torch.Tensor:
            a = torch.randn(rank, columns, generator=generator).to(self.dtype)
            b = (torch.randn(rows, rank, generator=generator) * (strength / rank / (1 if embedding else columns**0.5))).to(
                self.dtype
            )
            names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            for part, tensor in zip(names, (a, b), strict=True):
                tensors[f"base_model.model.{path}.{part}"] = tensor.contiguous()
            return 2.0 * (b.float() @ a.float())  # lora_alpha / rank = 2

        for weight, value in self.weights.items():
            path, _, leaf = weight.rpartition(".")
            last = path.rpartition(".")[2]
            if leaf.endswith("bias"):
                continue
            if last in targets and value.dim() == 2:
                embedding = last == "embed_tokens"
                rows, columns = reversed(value.shape) if embedding else value.shape
                delta = product(path, rows, columns, embedding)
                deltas[weight] = delta.T if embedding else delta
            elif last == "experts" and "experts" in targets and self.config.model_type == "gpt_oss":
                # [E, H, 2 * I] gate and up in turns, [E, I, H]; PEFT has a layer around a layer, and all experts in one
                num, columns, rows = value.shape
                a = torch.randn(num, rank, columns, generator=generator).to(self.dtype)
                b = (torch.randn(num, rows, rank, generator=generator) * (strength / rank / columns**0.5)).to(self.dtype)
                deltas[weight] = 2.0 * (b.float() @ a.float()).mT
                layer = f"base_model.model.{path}" + (".base_layer" if leaf == "gate_up_proj" else "")
                tensors[f"{layer}.lora_A.weight"] = a.flatten(0, 1)
                tensors[f"{layer}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()  # [rows, rank * E]
            elif last == "experts" and "experts" in targets:  # [E, 2 * I, H] gate over up, [E, H, I]
                parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
                rows, columns = value.shape[1] // len(parts), value.shape[2]
                deltas[weight] = torch.stack(
                    [
                        torch.cat([product(f"{path}.{expert}.{part}", rows, columns) for part in parts])
                        for expert in range(value.shape[0])
                    ]
                )
        of_experts = {"experts"} if self.config.model_type == "gpt_oss" else {"gate_proj", "up_proj", "down_proj"}
        linears = {name for name in targets if name != "experts"} | (of_experts if "experts" in targets else set())
        folder = self.folder / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(linears), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        self.deltas[name] = deltas
        return str(folder)

    def merged(self, name: str | None) -> Any:
        """The model in float32 with the weights of an adapter in its own."""
        if name in self._merged:
            return self._merged[name]
        self._merged[name] = model = transformers.AutoModelForCausalLM.from_config(self.config).float().eval()
        delta = self.deltas[name]
        model.load_state_dict({weight: value + delta.get(weight, 0.0) for weight, value in self.weights.items()})
        return model

    @torch.no_grad()
    def logprobs(self, name: str | None, tokens: list[int]) -> torch.Tensor:
        """[len(tokens), VOCAB] float32: what follows each token, under an adapter."""
        return self.merged(name)(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def check(self, label: str, name: str | None, prompt: list[int], answer: list[int], steps: torch.Tensor) -> None:
        """That a finished request is right, each step and each token of the vocabulary.

        Args:
            steps: [len(answer), VOCAB] float32, log-probabilities as the engine says them.
        """
        begin, tokens = len(prompt) - 1, [*prompt, *answer]
        far = {other: (self.logprobs(other, tokens)[begin:-1] - steps).abs() for other in self.deltas}
        own = far.pop(name).max()
        nearest = min(distance.amax(-1).min() for distance in far.values())
        assert own * TELLS < nearest, f"{label}: {own:.4f} from its own, {nearest:.4f} from another"
        best = self.logprobs(name, tokens)[begin:-1]
        short = best.amax(-1) - best.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert (short <= 2 * own).all(), f"{label}: a token that is not the likeliest"


def prompt(seed: int, length: int) -> list[int]:
    """Random tokens."""
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextlib.contextmanager
def launched(runtime: Any) -> Iterator[set[Any]]:
    """What each launch would have been compiled for, of kernels on a ``_runtime``."""
    own, keys = runtime.Launcher.launch, set()

    def launch(self: Any, grid: int, arguments: Any, constants: Any, options: Any) -> Any:
        keys.add(runtime.CompileRequest(self, arguments, constants, options).key)
        return own(self, grid, arguments, constants, options)

    runtime.Launcher.launch = launch
    try:
        yield keys
    finally:
        runtime.Launcher.launch = own
