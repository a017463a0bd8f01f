"""How every command ends: with a report, which a person or a program reads, or with a failure, told in the same two forms."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from typing import Any, Callable, Iterable, Mapping

import click

SCHEMA_VERSION = 1  # of every document that --json prints, but for those that are files too
_BROUGHT_BY = {"torch": "run", "triton": "run", "numpy": "run", "matplotlib": "report"}  # package: the extra that it comes with


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
    """A command of a function that gives a ``Report``, with ``--json`` and the one way to fail: ``Failure``, or a package
    that is not installed.
    """

    def register(function: Callable[..., Report]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> int:
            from kernelgen.diagnostics import Failure

            try:
                report = _report(function, arguments)
            except Failure as failed:
                if not as_json:
                    raise
                report = Report(failed.as_json(), exit_code=failed.exit_code)
            if as_json:
                _print([json.dumps({"schema_version": SCHEMA_VERSION, **report.document})])
            else:
                _print(report.lines)
            return report.exit_code

        return click.command(name, click.Command, **settings)(run)

    return register


def _report(function: Callable[..., Report], arguments: Mapping[str, Any]) -> Report:
    from kernelgen.diagnostics import failure

    try:
        return function(**arguments)
    except ModuleNotFoundError as error:
        extra = _BROUGHT_BY.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        hint = f"pip install 'kernelgen[{extra}]'"
        raise failure("KG061", str(error.name), "this command needs it, and it is not installed", hint) from error


def _print(lines: Iterable[str]) -> None:
    """Print until there is no more, or nobody reads on: head has what it wanted."""
    try:
        for line in lines:
            click.echo(line)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
