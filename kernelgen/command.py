"""What every command gives: a report, which a person or a program reads."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from typing import Any, Callable, Iterable, Mapping

import click

from kernelgen.entry import SCHEMA_VERSION


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
    """A command of a function that gives a ``Report``, with ``--json``; ``kernelgen.entry`` tells what it raises."""

    def register(function: Callable[..., Report]) -> click.Command:
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
        @functools.wraps(function)
        def run(as_json: bool, **arguments: Any) -> int:
            report = function(**arguments)
            if as_json:
                _print([json.dumps({"schema_version": SCHEMA_VERSION, **report.document})])
            else:
                _print(report.lines)
            return report.exit_code

        return click.command(name, click.Command, **settings)(run)

    return register


def _print(lines: Iterable[str]) -> None:
    """Print until there is no more, or nobody reads on: head has what it wanted."""
    try:
        for line in lines:
            click.echo(line)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
