"""Models to text, through templates.

Templates are Jinja with line statements (``#%``) and line comments (``##``). What they may do is a short list: attribute
access, ``if``, ``for``, ``import``, macros and ``length``; everything computed belongs on the model. What has no arm for a tag
says ``refuse("axis")``, which is told as a fault of the tag. What templates may print is
typed: whole numbers, booleans, None, checked identifiers, and text that stands in a template. Any other string is a fault, so no
text of a spec reaches a generated file unchecked.
"""

from __future__ import annotations

import contextlib
import filecmp
import os
from pathlib import Path
from typing import Callable, Iterator, Sequence

import jinja2

from kernelgen.core import names
from kernelgen.core.diagnostics import Diagnostic, Failure, did_you_mean
from kernelgen.core.model import Family, Location, Package, Variant
from kernelgen.core.read import open_file
from kernelgen.emit.template import MAX_CHARACTERS, TAGS, Environment, Refused, TooMuch, Trace, Unserved

_ROOT = "templates/"
_SUFFIX = ".j2"
_NAMES = {Variant: "v", Family: "family", Package: "package"}
_MAX_IMPORTS = 16  # of templates, one by way of the other


class _Loader(jinja2.BaseLoader):
    """Templates by their path below the first folder that has them, called the same on every machine."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, None]:
        file = self.find(template)
        if file is None:
            raise jinja2.TemplateNotFound(template)
        label = _ROOT + template
        try:
            with open_file(file) as opened:  # no more of it than a template may be: characters have 4 bytes at most
                return opened.read(4 * MAX_CHARACTERS + 1).decode("utf-8"), label, None
        except OSError as error:
            raise Refused([Diagnostic("KG001", Location(label), error.strerror or type(error).__name__)]) from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise Refused([Diagnostic("KG021", Location(label, line, 1), "this line is not UTF-8")]) from None

    def find(self, template: str) -> Path | None:
        if any(part in ("", ".", "..") for part in template.split("/")):
            return None
        return next((f / template for f in self.folders if (f / template).is_file()), None)

    def list_folder(self, folder: str) -> list[str]:
        """What any of the folders has in ``folder``: templates of one name are one."""
        return sorted({file.name for root in self.folders for file in (root / folder).glob("*")})

    def own(self) -> Iterator[str]:
        """The templates that lie over those of the last folder, and are not the same."""
        *own, last = self.folders
        for root in own:
            for folder, _, files in os.walk(root):
                for file in (Path(folder, name) for name in files if name.endswith(_SUFFIX)):
                    template = file.relative_to(root).as_posix()
                    other = last / template
                    if not (other.is_file() and filecmp.cmp(file, other, shallow=False)):
                        yield template


class Renderer:
    """Renders the templates found in ``folders``, file by file the first that has it."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._loader = _Loader(folders)
        self._environment = Environment(self._loader)
        self._traces = Environment(self._loader, traces=True)
        self._faults: dict[str, list[Diagnostic]] = {}

    def missing_templates(self, package: Package) -> Iterator[Diagnostic]:
        """The kernels without a template; a fault of the spec that names them."""
        for family in package.families:
            for kernel in family.kernels:
                if not self.has(kernel.template):
                    message = f"there is no template {_ROOT}{kernel.template}"
                    yield Diagnostic("KG020", kernel.location, message, "write it, or drop the tag")

    def faults(self, package: Package) -> Iterator[Diagnostic]:
        """What is wrong with the texts of the templates that ``package`` needs, and those that nothing needs."""
        used = [kernel.template for family in package.families for kernel in family.kernels]
        for folder in (names.FAMILY_TEMPLATE_FOLDER, names.PACKAGE_TEMPLATE_FOLDER):
            used += [template for _, template in self.templates_in(folder)]
        used.append(names.TEST_TEMPLATE)
        for template in used:
            if self.has(template):
                yield from self._check(template)
        imported = (template for imports in self._environment.imports.values() for template, _ in imports)
        for template in sorted(set(self._loader.own()) - {*used, *imported}):
            yield Diagnostic("KG020", Location(_ROOT + template), "no spec and no template makes use of this template",
                             self._use_of(template, package))

    def has(self, template: str) -> bool:
        """Whether there is such a template."""
        return self._loader.find(template) is not None

    def templates_in(self, folder: str) -> list[tuple[str, str]]:
        """(stem, template) of the templates of a folder, in the order of their names."""
        files = [name for name in self._loader.list_folder(folder) if name.endswith(names.TEMPLATE_SUFFIX)]
        return [(name.removesuffix(names.TEMPLATE_SUFFIX), f"{folder}/{name}") for name in files]

    def render(self, template: str, spec: str, value: Variant | Family | Package) -> str:
        """The text that ``template`` makes of ``value``, with its header.

        Templates know the value as ``v`` (a variant), ``family`` or ``package``.

        Raises:
            Failure: the template is not well-formed, or failed on this value.
            Unserved: it refuses the tag that this variant has on some axis.
        """
        faults = self._check(template)
        if faults:
            raise Failure(faults)
        try:
            body = self._environment.run(template, {_NAMES[type(value)]: value})
        except Unserved as refused:
            refused.where = self._environment.place_of(refused) or Location(_ROOT + template)
            raise
        except Exception as error:
            where = self._environment.place_of(error) or Location(_ROOT + template)
            fault = Diagnostic("KG022", where, str(error) or type(error).__name__, f"while rendering {spec}")
            if isinstance(error, (TooMuch, RecursionError)):  # once is enough
                self._faults[template] = [fault]
            raise Failure([*self._environment.faults, fault]) from None
        if self._environment.faults:
            raise Failure(self._environment.faults)
        return header(spec, _ROOT + template) + body

    def asks(self, template: str) -> set[str]:
        """The attributes that ``template`` reads, and the templates that it imports."""
        self._check(template)
        asked = set(self._environment.asks.get(template, ()))
        for other, _ in self._environment.imports.get(template, []):
            asked |= self.asks(other)
        return asked

    def trace(self, template: str, value: Variant | Family | Package, text: str) -> Callable[[int, int, str], Location]:
        """Where in templates a place (line, column, word) of ``text`` is from, which ``template`` made of ``value``."""
        trace = Trace("")
        with contextlib.suppress(Exception):  # marks can make a template too long, or go other ways
            trace = Trace(self._traces.run(template, {_NAMES[type(value)]: value}))
        body = text.split("\n", HEADER)[-1]

        def place(line: int, column: int = 1, word: str = "") -> Location:
            found = trace.of(line - HEADER, column) if trace.text == body else None
            return self._environment.location(*found, word) if found else Location(_ROOT + template)

        return place

    def _check(self, template: str, chain: Sequence[str] = ()) -> list[Diagnostic]:
        """The faults of the text of ``template``, and of those that it imports; each is read once."""
        if template not in self._faults:
            faults = self._faults[template] = self._read(template)
            for other, line in self._environment.imports.get(template, []):
                where = self._environment.location(_ROOT + template, line)
                if other in (*chain, template):
                    faults.append(Diagnostic("KG021", where, "this import leads back to this template", "drop it"))
                elif len(chain) > _MAX_IMPORTS:
                    faults.append(Diagnostic("KG021", where, f"more than {_MAX_IMPORTS} imports, one by way of the other"))
                elif not self.has(other):
                    known = [f"macros/{name}" for name in self._loader.list_folder("macros")]
                    faults.append(Diagnostic("KG020", where, f"no template {other}", did_you_mean(other, known)))
                else:
                    faults += self._check(other, (*chain, template))
        return self._faults[template]

    def _read(self, template: str) -> list[Diagnostic]:
        label = _ROOT + template
        try:
            self._environment.get_template(template)
        except Refused as refused:
            return list(refused.faults)
        except jinja2.TemplateSyntaxError as error:
            message = (error.message or "syntax error").partition(" at ")[0]  # a number of characters
            *_, word = ("", *message.partition(". ")[0].split("'")[1::2])
            hint = did_you_mean(word, TAGS) if "unknown tag" in message and word not in TAGS else ""
            return [Diagnostic("KG021", self._environment.location(label, error.lineno, word), message, hint)]
        except (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            message = f"this cannot be read: {type(error).__name__}"
            return [Diagnostic("KG021", Location(label), message, "it may be nested too deep")]
        return []

    def _use_of(self, template: str, package: Package) -> str:
        if not template.startswith("kernels/"):
            return "import it, or remove it"
        _, _, name = template.removesuffix(names.TEMPLATE_SUFFIX).partition("/")
        family = name.split("/")[0]
        if family in {family.name for family in package.families}:
            return f"{names.spec_label(family)} has no such schedule; add it, or remove the template"
        return f"remove it, or add what it is for, as {names.spec_label(family)}"


HEADER = 3  # lines


def header(spec: str, template: str) -> str:
    """The three lines that every generated file starts with."""
    return (
        "# Generated by kernelgen; edit the spec or the template, not this file.\n"
        f"# Spec: {spec}\n"
        f"# Template: {template}\n"
    )
