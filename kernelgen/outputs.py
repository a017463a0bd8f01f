"""The files of a tree as they get made: rendered, formatted, checked, and outlined."""

from __future__ import annotations

import dataclasses
from typing import Iterable, Iterator

from kernelgen.diagnostics import Diagnostic, Failure
from kernelgen.formatting import check, finish
from kernelgen.model import Family, Location, Package, Variant
from kernelgen.names import PACKAGE, path_fault, spec_label
from kernelgen.outline import Outline, module_of, outline
from kernelgen.render import Renderer, header


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to be rendered: where it goes, from what, and the one value that its template sees."""

    path: str
    template: str
    spec: str
    value: Variant | Family | Package


class Outputs:
    """What was made so far.

    Attributes:
        modules: place in the package -> outline, of the files that are modules of it.
        faults: of the templates; one that many variants share is there once.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.modules: dict[tuple[str, ...], Outline] = {}
        self.faults: list[Diagnostic] = []
        self._made_by: dict[str, str] = {}  # path -> template
        self._rendered: dict[str, str] = {}
        self._copied: dict[str, str] = {}

    def render(self, outputs: Iterable[Output]) -> None:
        """Make these files, or make them anew."""
        for output in outputs:
            if self._made_by.setdefault(output.path, output.template) != output.template:
                self.add_fault(Diagnostic("KG024", Location(output.path), "two templates write this file"))
            try:
                text = self.renderer.render(output.template, output.spec, output.value)
            except Failure as failed:
                for fault in failed.diagnostics:
                    self.add_fault(fault)
            else:
                self._add(output.path, text, self._rendered)

    def add_fault(self, fault: Diagnostic) -> None:
        """Note a fault, unless one of this place and these words is known."""
        if all((fault.location, fault.message) != (known.location, known.message) for known in self.faults):
            self.faults.append(fault)

    def copy(self, path: str, source: str, text: str) -> None:
        """Make a file of the text of ``source``, which depends on no spec."""
        self._add(path, header(spec_label(), source) + text, self._copied)

    def remove(self, path: str) -> None:
        """Take back a file."""
        self._rendered.pop(path, None)
        self._copied.pop(path, None)
        self.modules.pop(module_of(path), None)

    def modules_of(self, family: str) -> Iterator[tuple[tuple[str, ...], Outline]]:
        """Place and outline of the modules of a family."""
        return ((place, outline) for place, outline in self.modules.items() if place[:1] == (family,))

    def finish(self, jobs: int = 1) -> dict[str, str]:
        """The final text of every file, by path.

        Raises:
            Failure: with every fault of the templates, and of what they made; exit code 2.
        """
        texts, faults = finish(self._rendered, jobs)
        copied = (check(path, text, rendered=False) for path, text in self._copied.items())
        texts.update(self._copied)
        faults += [*self.faults, *(fault for fault in copied if fault), *_path_faults(texts)]
        if faults:
            raise Failure(faults, exit_code=2)
        return texts

    def _add(self, path: str, text: str, texts: dict[str, str]) -> None:
        texts[path] = text
        if path.startswith(f"{PACKAGE}/"):
            self.modules[module_of(path)] = outline(path, text)


def _path_faults(paths: Iterable[str]) -> Iterator[Diagnostic]:
    seen: dict[str, str] = {}
    for path in paths:
        reason = path_fault(path)
        if reason:
            yield Diagnostic("KG024", Location(path), reason)
        other = seen.setdefault(path.lower(), path)
        if other != path:
            yield Diagnostic("KG024", Location(path), f"differs from {other} by case alone")
