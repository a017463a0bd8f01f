"""The files of a tree as they get made: rendered, formatted, checked, and outlined."""

from __future__ import annotations

import dataclasses
from typing import Callable, Iterable, Iterator

from kernelgen.core.diagnostics import Diagnostic, Failure, Nearest, os_failure
from kernelgen.core.model import Axis, Family, Location, Package, Variant
from kernelgen.core.names import PACKAGE, path_fault, spec_label
from kernelgen.core.progress import progress
from kernelgen.core.read import read_file
from kernelgen.emit.formatting import finish
from kernelgen.emit.lint import faults as faults_of
from kernelgen.emit.outline import Outline, module_of, outline
from kernelgen.emit.render import HEADER, Renderer, header
from kernelgen.emit.rooms import Rooms, Source
from kernelgen.emit.template import Unserved

MAX_COPY = 1 << 20  # bytes of a module that is copied


@dataclasses.dataclass(frozen=True)
class Output:
    """A file to be rendered: where it goes, from what, and the one value that its template sees."""

    path: str
    template: str
    spec: str
    value: Variant | Family | Package
    axes: tuple[Axis, ...] = ()  # of a variant


class Outputs:
    """What was made so far.

    Attributes:
        modules: place in the package -> outline, of the files that are modules of it, where they are Python.
        faults: of the templates; one that many variants share is there once.
    """

    def __init__(self, renderer: Renderer, rooms: Rooms) -> None:
        self.renderer = renderer
        self.rooms = rooms
        self.modules: dict[tuple[str, ...], Outline] = {}
        self.faults: list[Diagnostic] = []
        self._made_by: dict[str, Output] = {}
        self._paths: dict[tuple[str, ...], str] = {}
        self._places: dict[str, Callable[[int, int, str], Location]] = {}
        self._rendered: dict[str, str] = {}
        self._copied: dict[str, str] = {}
        self._sources: dict[str, Source] = {}

    def render(self, outputs: Iterable[Output]) -> None:
        """Make these files, or make them anew."""
        wanted = list(outputs)
        output: Output
        for output in progress("rendering", lines=False)(wanted, len(wanted)):
            if self._made_by.get(output.path, output).template != output.template:
                self.add_fault(Diagnostic("KG024", Location(output.path), "two templates write this file"))
            if output.path in self._sources:
                where = Location(self._sources[output.path].label)
                self.add_fault(Diagnostic("KG024", where, f"{output.path} is made by {output.template}", "rename the module"))
            self._made_by[output.path] = output
            self._places.pop(output.path, None)
            try:
                text = self.renderer.render(output.template, output.spec, output.value)
            except Unserved as refused:
                self.add_fault(_refusal(output, refused))
            except Failure as failed:
                for fault in failed.diagnostics:
                    self.add_fault(fault)
            else:
                self._add(output.path, text, self._rendered)

    def place(self, path: str, line: int = 0, column: int = 1, word: str = "") -> Location:
        """Where in a template the place ``line``, ``column`` of a rendered file is from; without a line: the template."""
        output = self._made_by[path]
        if path not in self._places:
            self._places[path] = self.renderer.trace(output.template, output.value, self._rendered[path])
        return self._places[path](line, column, word)

    def place_in(self, module: tuple[str, ...], line: int, word: str = "", column: int = 0) -> Location:
        """As ``place``, of a module by its place in the package; that of a copy is in what it was copied from.

        Without a column it is that of the word.
        """
        path = self._paths[module]
        if path not in self._sources:
            return self.place(path, line, max(1, column), word)
        if line == 0:
            return Location(self._sources[path].label)
        text = self._copied[path].split("\n")[line - 1]
        return Location(self._sources[path].label, line - HEADER, column or max(0, text.find(word)) + 1, max(1, len(word)), text)

    def add_fault(self, fault: Diagnostic) -> None:
        """Note a fault, unless one of this place and these words is known."""
        if all((fault.location, fault.message) != (known.location, known.message) for known in self.faults):
            self.faults.append(fault)

    def copy(self, path: str, source: Source) -> None:
        """Make a file of the text of ``source``, which depends on no spec, unless it is made."""
        if path in self._copied:
            return
        if not source.stem.isidentifier():
            self.add_fault(Diagnostic("KG024", Location(source.label), "no module can be called so", "rename it"))
        try:
            text = read_file(source.file, MAX_COPY).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except Failure as failed:
            for fault in failed.diagnostics:
                self.add_fault(dataclasses.replace(fault, location=Location(source.label)))
        except OSError as error:
            (fault,) = os_failure(error, source.file).diagnostics
            self.add_fault(dataclasses.replace(fault, location=Location(source.label)))
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            self.add_fault(Diagnostic("KG021", Location(source.label, line, 1), "this line is not UTF-8"))
        else:
            self._sources[path] = source
            self._add(path, header(spec_label(), source.label) + text, self._copied)
            for fault in faults_of(path, self._copied[path], rendered=False):
                where = fault.location._replace(path=source.label, line=max(fault.location.line - HEADER, 0))
                self.add_fault(dataclasses.replace(fault, location=where))

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
        for fault in _path_faults([*self._rendered, *self._copied]):
            self.add_fault(fault)
        texts, faults = finish(self._rendered, jobs, only_check=bool(self.faults))
        for fault in faults:
            self._add_traced(fault)
        if self.faults:
            raise Failure(self.faults, exit_code=2)
        return {**texts, **self._copied}

    def _add_traced(self, fault: Diagnostic) -> None:
        """Note a fault of a rendered file as one of the template that made the place."""
        path, line, column, length, text = fault.location
        word = text[column - 1 : column - 1 + length].strip()
        where = self.place(path, line, column, word)
        if word not in where.text and any((known.location, known.code) == (where, fault.code) for known in self.faults):
            return  # of another variant, in other words
        made = f"in {path} it is: {text.strip()}" if text.strip() else f"in {path}"
        hint = dataclasses.replace(fault.hint, otherwise=made) if isinstance(fault.hint, Nearest) else fault.hint or made
        self.add_fault(dataclasses.replace(fault, location=where, hint=hint))

    def _add(self, path: str, text: str, texts: dict[str, str]) -> None:
        texts[path] = text
        if path.startswith(f"{PACKAGE}/"):
            made = outline(path, text)
            if made is not None:
                self.modules[module_of(path)] = made
                self._paths[module_of(path)] = path


def _refusal(output: Output, refused: Unserved) -> Diagnostic:
    """What a template refuses, as a fault of the tag in the spec."""
    axis = next((axis for axis in output.axes if axis.name == refused.axis), None)
    if axis is None:
        return Diagnostic("KG022", refused.where, f"refuse({refused.axis!r}): the family has no such axis")
    tag = getattr(output.value, axis.name)
    where = axis.tag_locations[axis.tags.index(tag)]
    hint = "drop the tag, leave it out of these by an exclude, or write what it makes"
    return Diagnostic("KG029", where, f"{refused.where} refuses {axis.name} {tag}", hint)


def _path_faults(paths: Iterable[str]) -> Iterator[Diagnostic]:
    seen: dict[str, str] = {}
    for path in paths:
        reason = path_fault(path)
        if reason:
            yield Diagnostic("KG024", Location(path), reason)
        other = seen.setdefault(path.lower(), path)
        if other != path:
            yield Diagnostic("KG024", Location(path), f"differs from {other} by case alone")
