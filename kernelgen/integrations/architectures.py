"""Architectures of ``transformers``, and what of each is served: the table is in the docs, and each of its cells is a test.

| column | what it stands for |
| --- | --- |
| ``reader`` | ``read_adapter`` on what PEFT saves for its experts |
| ``torch`` | ``MoeLora(base="torch")``: adapters between the products of the model's own experts |
| ``generated`` | ``MoeLora(base="generated")``: adapters inside of generated products |
| ``layer`` | ``MoeLayer`` on its weights as [E, 2 * I, H] and [E, H, I], which an engine has to lay out |

A cell is "" where it is served, or says what stands in the way; what it says is refused before anything runs.
"""

from __future__ import annotations

from typing import Iterator, NamedTuple

_OWN_FORWARD = "experts with a forward of their own"
_BEHIND = "layers with a limit, which clamps behind silu"
_NORM = "a norm behind the experts"


class Architecture(NamedTuple):
    """A kind of experts."""

    name: str  # of its classes
    model_type: str  # in its config
    reader: str = ""
    torch: str = ""
    generated: str = ""
    layer: str = ""
    remark: str = ""  # on its reader


ARCHITECTURES = (
    Architecture("DeepseekV3", "deepseek_v3"),
    Architecture("Gemma4", "gemma4_text"),
    Architecture("Glm4Moe", "glm4_moe"),
    Architecture("GlmMoeDsa", "glm_moe_dsa"),
    Architecture("GraniteMoe", "granitemoe"),
    Architecture("Inkling", "inkling_text"),
    Architecture("Jamba", "jamba"),
    Architecture("Lfm2Moe", "lfm2_moe"),
    Architecture("MiniMaxM2", "minimax_m2"),
    Architecture("Mixtral", "mixtral"),
    Architecture("Olmoe", "olmoe"),
    Architecture("Phimoe", "phimoe"),
    Architecture("Qwen2Moe", "qwen2_moe"),
    Architecture("Qwen3Moe", "qwen3_moe"),
    Architecture("Qwen3Next", "qwen3_next"),
    Architecture("Qwen3_5Moe", "qwen3_5_moe_text"),
    Architecture("DeepseekV4", "deepseek_v4"),
    Architecture("HYV4", "hy_v4"),
    Architecture("MiniMaxM3VL", "minimax_m3_vl_text"),
    Architecture("AriaText", "aria_text"),
    Architecture(
        "GptOss",
        "gpt_oss",
        remark='`layout="interleaved"`, unless the file names the published model or its class',
    ),
    Architecture("Llama4", "llama4_text"),
    Architecture(
        "NemotronH",
        "nemotron_h",
        remark='`UngatedShape`; of both parameters with `orientation="in_out"`',
    ),
    Architecture(
        "LongcatFlash",
        "longcat_flash",
        reader="experts without weights among those of gate_up_proj",
        torch=_OWN_FORWARD,
        generated=_OWN_FORWARD,
        layer="experts without weights",
    ),
    Architecture("Step3p7", "step3p5", generated=_BEHIND, layer=_BEHIND),
    Architecture("MuseSpark", "muse_spark_text", torch=_NORM, generated=_NORM, layer=_NORM),
)


def table() -> Iterator[str]:
    """The table of the docs, line by line."""
    yield "| model | `read_adapter` | `MoeLora`, base=torch | base=generated | `MoeLayer` |"
    yield "| --- | --- | --- | --- | --- |"
    for one in ARCHITECTURES:
        cells = (one.reader or one.remark, one.torch, one.generated, one.layer)
        yield f"| {one.name} | {' | '.join(cell or 'yes' for cell in cells)} |"
