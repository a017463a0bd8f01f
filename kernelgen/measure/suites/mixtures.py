"""What suites over mixtures of experts have in common: their models, and cells that have one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Mapping, Sequence, get_args

import click

from kernelgen.measure.models import MODELS, Model, model_from_config
from kernelgen.measure.options import Words
from kernelgen.measure.suite import Axis, Cell, misfit

Routing = Literal["uniform", "skewed"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureCell(Cell):
    """A cell of a mixture of experts. ``routing``: skewed: a quarter of the experts takes 90 % of the pairs."""

    model: Model
    routing: Routing = "uniform"

    @property
    def pairs(self) -> int:
        """Of a token and one of its experts."""
        return self.tokens * self.model.top_k


def model_axes(full: Sequence[str], quick: Sequence[str]) -> tuple[Axis, ...]:
    """Which models, by name or by a config."""
    return (
        Axis("models", Words(tuple(MODELS)), "Model shapes.", tuple(full), tuple(quick), ("tiny",)),
        Axis("model_config", click.Path(path_type=Path), "A model's config.json, in place of --models."),
        Axis("tp", click.IntRange(1), "With --model-config: tensor-parallel ranks.", 1),
    )


ROUTING = Axis("routing", Words(ROUTINGS), "uniform, skewed.", ("uniform",))


def models_of(values: Mapping[str, Any]) -> list[Model]:
    """What --models, or --model-config and --tp, stand for.

    Raises:
        Failure: they do not go together, or the config is not one of a mixture of experts.
    """
    if values["model_config"] is not None:
        return [model_from_config(values["model_config"], values["tp"])]
    if values["tp"] != 1:
        raise misfit("--tp goes with --model-config")
    return [MODELS[name] for name in values["models"]]
