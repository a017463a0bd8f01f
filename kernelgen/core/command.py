"""What every command gives: a report, which a person or a program reads."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from typing import Any, Callable, Iterable, Mapping

import click

from kernelgen.core.entry import SCHEMA_VERSION


@dataclasses.dataclass(frozen=True)
class Report:
    """What a command found out.

    Attributes:
        document: the fields of the JSON document.
        lines: what a person reads instead, on stdout.
        exit_code: 0 clean, 1 findings, 2 the job could not be done.
    """

    document: Mapping[str, Any]
    lines: Iterable[str] = ()
    exit_code: int = 0


def command(name: str, **settings: Any) -> Callable[[Callable[..., Report]], click.Command]:
    """A command of a function that gives a ``Report``, with --json and --quiet; ``kernelgen.core.entry`` tells what it raises."""

    def register(function: Callable[..., Report]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        @click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
        @functools.wraps(function)
        def run(as_json: bool, quiet: bool, **arguments: Any) -> int:
            del quiet  # kernelgen.core.progress looks it up
            report = function(**arguments)
            if as_json:
                _print([json.dumps({"schema_version": SCHEMA_VERSION, **report.document})])
            else:
                _print(report.lines)
            return report.exit_code

        return click.command(name, Strict, **settings)(run)

    return register


class Strict(click.Command):
    """A command that drops nothing it is given: what cannot be heeded is an error."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        values, _, given = self.make_parser(ctx).parse_args(args=list(args))
        options: dict[str | None, click.Parameter] = {}
        for parameter in given:
            if not isinstance(parameter, click.Option) or parameter.multiple:
                continue
            first = options.setdefault(parameter.name, parameter)
            if first is not parameter:
                raise click.UsageError(f"{_spelling(first)} and {_spelling(parameter)} exclude each other", ctx)
            if given.count(parameter) > 1:
                raise click.UsageError(f"{_spelling(parameter)} is given twice", ctx)
        for parameter in given:
            if isinstance(parameter.type, click.Path) and values.get(parameter.name or "") == "":
                raise click.UsageError(f"{_spelling(parameter)}: got an empty path", ctx)
        return super().parse_args(ctx, args)


def _spelling(parameter: click.Parameter) -> str:
    return "/".join([*parameter.opts[-1:], *parameter.secondary_opts])


def _print(lines: Iterable[str]) -> None:
    """Print until there is no more, or nobody reads on: head has what it wanted."""
    try:
        for line in lines:
            click.echo(line)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
