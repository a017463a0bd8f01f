"""``kernelgen init``."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, Sequence

import click

from kernelgen.core import names
from kernelgen.core.command import Report, command
from kernelgen.core.diagnostics import failure
from kernelgen.core.locate import SPECS, default_output
from kernelgen.core.table import table, terminal_width
from kernelgen.core.write import replace_file


@command("init")
@click.option("--from", "config", required=True, type=click.Path(path_type=Path), help="The model's config.json.")
@click.option(
    "--adapter", "folders", multiple=True, metavar="FOLDER", type=click.Path(path_type=Path), help="An adapter, once or more."
)
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--slots", type=click.IntRange(1), default=4, show_default=True, help="Adapters in the buffers, spare ones too.")
@click.option("--rank", type=click.IntRange(1), help="Of the buffers.  [default: the largest of the adapters, or 16]")
@click.option("--dtype", type=click.Choice(["bf16", "f16"]), help="Of activations and adapters.  [default: the model's]")
@click.option(
    "--base",
    "bases",
    multiple=True,
    type=click.Choice(["generated", "foreign"]),
    help="Adapters go into generated products of the experts, or between those of an engine; or both.  [default: generated]",
)
@click.option("--max-tokens", type=click.IntRange(1), default=8192, show_default=True, help="The largest batch.")
@click.option("--specs", type=click.Path(path_type=Path), default=Path("specs"), help="The folder to make.  [default: ./specs]")
def init(
    config: Path,
    folders: Sequence[Path],
    tp: int,
    slots: int,
    rank: int | None,
    dtype: str | None,
    bases: Sequence[str],
    max_tokens: int,
    specs: Path,
) -> Report:
    """Write the specs of just the variants that a model needs, and say what to warm up, to tune, and what padding wastes.

    Neither weights nor a network are asked for: of adapters the configuration and the header of the file are read.
    """
    from kernelgen.emit import build as pipeline
    from kernelgen.measure.init import narrow
    from kernelgen.measure.init.needs import needs

    if specs.exists() and any(specs.iterdir()):
        raise failure("KG030", str(specs), "there are specs already", "name another folder with --specs")
    asked = tuple(dict.fromkeys(bases)) or ("generated",)
    needed = needs(config, folders, tp=tp, slots=slots, rank=rank, dtype=dtype, bases=asked)
    package = pipeline.package(SPECS)
    with _whole_package() as kernels:
        shapes = [_shape(kernels, *shape) for shape in needed.shapes()]
        modules = narrow.launched(kernels, shapes, max_tokens)
        families = modules.keys() | narrow.imported(kernels, shapes)
    sizes = _sizes(needed.shapes())
    texts, counts = {}, []
    for family in package.families:
        if family.name not in families:
            continue
        variants = narrow.chosen(family, modules.get(family.name, set()), needed.dtype)
        head = f"Narrowed by kernelgen init to what {_name(needed)} needs."
        source = (SPECS / f"{family.name}.yaml").read_text(encoding="utf-8")
        texts[f"{family.name}.yaml"] = narrow.spec(source, family, variants, head)
        for device, measured in narrow.measured(SPECS, family, variants, sizes):
            texts[f"{names.TUNED}/{device}/{family.name}.yaml"] = measured
        counts.append((family.name, f"{len(variants)} of {len(family.variants)}"))
    _check(texts)
    for path, text in texts.items():
        (specs / path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(specs / path, text)
    click.echo(f"{specs}: {len(texts)} files; run kernelgen build", err=True)
    calls = [f"kg.{name}({', '.join(_code(*field) for field in fields.items())})" for name, fields in needed.shapes()]
    tune = list(_tune(needed, config, tp))
    document = {
        "written": sorted(texts),
        "variants": dict(counts),
        "warmup": calls,
        "tune": tune,
        "padding": [dict(zip(("adapter", "ranks", "zeros"), row, strict=True)) for row in needed.padding()],
    }
    lines = table(counts, ("family", "variants"), terminal_width())
    lines += ["", "kg.warmup([", *(f"    {call}," for call in calls), f"], max_tokens={max_tokens})", "", *tune]
    if needed.adapters:
        lines += ["", *table(needed.padding(), ("adapter", "ranks", "zeros"), terminal_width())]
    return Report(document, lines)


@contextlib.contextmanager
def _whole_package() -> Iterator[ModuleType]:
    """The package of all specs that come with kernelgen: the one beside them, else one that is built for now."""
    from kernelgen.compiled.stand_in import import_package
    from kernelgen.emit import build as pipeline

    out = default_output(SPECS)
    if (out / names.PACKAGE).is_dir() and pipeline.check(SPECS, out).is_clean:
        yield import_package(out, interpreted=True)
        return
    with tempfile.TemporaryDirectory(prefix="kernelgen-") as folder:
        pipeline.build(SPECS, Path(folder))
        yield import_package(Path(folder), interpreted=True)


def _shape(kernels: ModuleType, name: str, fields: dict[str, Any]) -> Any:
    import torch

    return getattr(kernels, name)(**{f: getattr(torch, v) if f.endswith("dtype") else v for f, v in fields.items()})


def _sizes(shapes: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, set[int]]:
    """Those that measured problems are of, whatever the number of tokens and adapters."""
    found: dict[str, set[int]] = {"k": set(), "n": set()}
    for _, fields in shapes:
        pairs = [(fields[x], fields[y]) for x, y in (("hidden", "intermediate"), ("intermediate", "hidden")) if x in fields]
        pairs += [(fields["k"], n) for n in (fields.get("widths") or (fields.get("n"),))] if "k" in fields else []
        for k, n in pairs:
            found["k"].add(k)
            found["n"].add(n)
        for name in ("num_experts", "top_k"):
            if name in fields:
                found.setdefault(name, set()).add(fields[name])
    return found


def _check(texts: dict[str, str]) -> None:
    """They are specs that a build takes; raises Failure if not."""
    from kernelgen.emit import build as pipeline

    with tempfile.TemporaryDirectory(prefix="kernelgen-") as folder:
        for path, text in texts.items():
            file = Path(folder, "specs", path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        pipeline.package(Path(folder, "specs"))


def _tune(needed: Any, config: Path, tp: int) -> Iterator[str]:
    of_model = f"--model-config {shlex.quote(str(config))}" + (f" --tp {tp}" if tp > 1 else "")
    if needed.model is not None and "generated" in needed.bases:
        weights, acts = needed.quant
        yield f"kernelgen tune moe_gemm {of_model}" + (f" --quant {weights} --act {acts}" if weights else "")
    if needed.model is not None and "foreign" in needed.bases:
        yield f"kernelgen tune moe_lora {of_model} --ranks {needed.rank} --slots {needed.slots} --dtype {needed.dtype}"


def _name(needed: Any) -> str:
    return needed.model.name if needed.model is not None else "this model"


def _code(field: str, value: Any) -> str:
    return f"{field}=torch.{value}" if field.endswith("dtype") else f"{field}={value!r}"
