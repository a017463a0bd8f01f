"""Models to text, through templates.

Templates are Jinja with line statements (``#%``) and line comments (``##``). What they may do is a short list: attribute
access, ``if``, ``for``, ``import``, macros and ``length``; everything computed belongs on the model. What they may print is
typed: whole numbers, booleans, None, checked identifiers, and text that stands in a template. Any other string raises, so no
text of a spec reaches a generated file unchecked.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, Iterator, Sequence

import jinja2
from jinja2 import nodes
from markupsafe import Markup

from kernelgen import names
from kernelgen.diagnostics import Diagnostic, Failure
from kernelgen.model import Family, Location, Package, Variant
from kernelgen.names import Symbol

_ROOT = "templates/"
_NAMES = {Variant: "v", Family: "family", Package: "package"}
_STATEMENTS = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.For,
    nodes.Macro,
    nodes.Import,
)
_EXPRESSIONS = (
    nodes.Name,
    nodes.Getattr,
    nodes.Const,
    nodes.MarkSafe,
    nodes.Tuple,
    nodes.Call,
    nodes.Keyword,
    nodes.Filter,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
)


class _Loader(jinja2.BaseLoader):
    """Templates by their path below the first folder that has them, called the same on every machine."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, None]:
        file = self.find(template)
        if file is None:
            raise jinja2.TemplateNotFound(template)
        return file.read_text("utf-8"), _ROOT + template, None

    def find(self, template: str) -> Path | None:
        if any(part in ("", ".", "..") for part in template.split("/")):
            return None
        return next((f / template for f in self.folders if (f / template).is_file()), None)

    def list_folder(self, folder: str) -> list[str]:
        """What any of the folders has in ``folder``: templates of one name are one."""
        return sorted({file.name for root in self.folders for file in (root / folder).glob("*")})


class _Environment(jinja2.Environment):
    """Refuses, when a template is read, whatever is not on the list."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        callable_names = {"range"} | {macro.name for macro in tree.find_all(nodes.Macro)}
        modules = {node.target for node in tree.find_all(nodes.Import)}
        for node in _walk(tree):
            reason = _refusal(node, callable_names, modules)
            if reason:
                raise jinja2.TemplateSyntaxError(reason, node.lineno, name, filename)
        _mark_literals(tree)
        return tree


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _walk(child)


def _refusal(node: nodes.Node, callable_names: set[str], modules: set[str]) -> str | None:
    if not isinstance(node, (*_STATEMENTS, *_EXPRESSIONS)):
        return f"templates do without {type(node).__name__}; compute it in the model"
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        return f"private attribute {node.attr}"
    if isinstance(node, nodes.Filter) and node.name != "length":
        return f"templates do without the filter {node.name}; compute it in the model"
    if isinstance(node, nodes.Call):
        callee = node.node
        is_macro = isinstance(callee, nodes.Name) and callee.name in callable_names
        is_imported = (
            isinstance(callee, nodes.Getattr)
            and isinstance(callee.node, nodes.Name)
            and callee.node.name in modules
        )
        if not (is_macro or is_imported):
            return "only macros can be called; compute it in the model"
    return None


def _mark_literals(node: nodes.Node) -> None:
    """Mark the string literals of a template as its own text, which may be printed."""
    for field, value in node.iter_fields():
        if isinstance(node, nodes.Import) and field == "template":
            continue
        if isinstance(value, list):
            setattr(node, field, [_marked(item) for item in value])
        else:
            setattr(node, field, _marked(value))
    for child in node.iter_child_nodes():
        if not isinstance(child, nodes.MarkSafe):
            _mark_literals(child)


def _marked(value: Any) -> Any:
    if isinstance(value, nodes.Const) and isinstance(value.value, str):
        return nodes.MarkSafe(value, lineno=value.lineno)
    return value


def _checked(value: object) -> object:
    if value is None or isinstance(value, (int, Symbol, Markup)):
        return value
    if isinstance(value, jinja2.Undefined):
        value._fail_with_undefined_error()
    kind = type(value).__name__
    raise TypeError(
        f"a template may print whole numbers, booleans, None and identifiers, not {kind} {value!r:.60}"
    )


class Renderer:
    """Renders the templates found in ``folders``; the first folder that has a template wins."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._loader = _Loader(folders)
        self._environment = _Environment(
            loader=self._loader,
            undefined=jinja2.StrictUndefined,
            line_statement_prefix="#%",
            line_comment_prefix="##",
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=True,  # tells text of templates (Markup) from other strings
            finalize=_checked,
        )
        self._environment.globals = {"range": range}

    def missing_templates(self, package: Package) -> Iterator[Diagnostic]:
        """The kernels and families without a template; a fault of the spec that names them."""
        for family in package.families:
            for kernel in family.kernels:
                if not self.has(kernel.template):
                    message = f"there is no template {_ROOT}{kernel.template}"
                    yield Diagnostic("KG020", kernel.location, message, "write it, or drop the tag")
            front = names.front_door_template(family.name)
            if not self.has(front):
                message = f"there is no template {_ROOT}{front}"
                hint = "write the front door of the family"
                yield Diagnostic("KG020", family.location, message, hint)

    def has(self, template: str) -> bool:
        """Whether there is such a template."""
        return self._loader.find(template) is not None

    def templates_in(self, folder: str) -> list[tuple[str, str]]:
        """(stem, template) of the templates of a folder, in the order of their names."""
        files = [name for name in self._loader.list_folder(folder) if name.endswith(names.TEMPLATE_SUFFIX)]
        return [(name.removesuffix(names.TEMPLATE_SUFFIX), f"{folder}/{name}") for name in files]

    def families(self) -> list[str]:
        """The names of the families that have a front door."""
        return [name for name in self._loader.list_folder("dispatch") if self.has(names.front_door_template(name))]

    def render(self, template: str, spec: str, value: Variant | Family | Package) -> str:
        """The text that ``template`` makes of ``value``, with its header.

        Templates know the value as ``v`` (a variant), ``family`` or ``package``.

        Raises:
            Failure: the template is not well-formed, or failed on this value.
        """
        name = _NAMES[type(value)]
        try:
            body = self._environment.get_template(template).render({name: value})
        except jinja2.TemplateSyntaxError as error:
            where = Location(error.filename or _ROOT + template, error.lineno)
            raise Failure([Diagnostic("KG021", where, error.message or "syntax error")]) from None
        except jinja2.TemplateNotFound as error:
            where = Location(_ROOT + template)
            raise Failure([Diagnostic("KG020", where, f"no template {error.name}")]) from None
        except (jinja2.TemplateError, AttributeError, TypeError, ValueError) as error:
            raise Failure([self._fault(template, spec, error)]) from None
        return header(spec, _ROOT + template) + body

    def _fault(self, template: str, spec: str, error: Exception) -> Diagnostic:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame for frame in frames if frame.filename.startswith(_ROOT)]
        where = Location(_ROOT + template)
        if lines:
            where = Location(lines[-1].filename, lines[-1].lineno or 0)
        return Diagnostic("KG022", where, str(error), f"while rendering {spec}")


def header(spec: str, template: str) -> str:
    """The three lines that every generated file starts with."""
    return (
        "# Generated by kernelgen; edit the spec or the template, not this file.\n"
        f"# Spec: {spec}\n"
        f"# Template: {template}\n"
    )
