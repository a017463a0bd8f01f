"""How a command starts and ends: the one place that turns failures into exit codes, and under ``--json`` into a document.

An interrupt (^C) unwinds the command, so that what is half done is undone. It ends within two seconds even where a library
swallows the exception, and at once on a second ^C; processes of ``kernelgen.core.processes`` end with it.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import click

    from kernelgen.core.diagnostics import Failure

SCHEMA_VERSION = 1  # of every document that --json prints, but for those that are files too
FAILED, INTERRUPTED = 2, 130
_GRACE = 1.0  # seconds that an interrupted command has to unwind
_RETRY = 0.02  # seconds
_BROUGHT_BY = {"torch": "run", "triton": "run", "numpy": "run", "matplotlib": "report"}  # package: the extra that it comes with


def run(module: str, name: str) -> NoReturn:
    """Load the command ``name`` of ``module``, run it with the arguments of this process, and exit."""
    signal.signal(signal.SIGINT, _leave)  # while modules are imported there is nothing to undo
    command: click.Command = getattr(importlib.import_module(module), name)
    signal.signal(signal.SIGINT, _interrupt)
    code = exit_code(command)
    signal.signal(signal.SIGINT, _leave)  # nor while Python tidies up
    if code == INTERRUPTED:  # which may take it a second
        _leave()
    sys.exit(code)


def exit_code(command: click.Command) -> int:
    """Run a command with the arguments of this process: 0 clean, 1 findings, 2 it could not be done, 130 interrupted."""
    import click

    _open_streams()
    try:
        return command.main(standalone_mode=False) or 0
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except (Exception, SystemExit) as error:  # code of a room may exit
        if isinstance(error, click.ClickException) and not _wants_json():
            error.show()
            return FAILED
        failed = _failure(error)
        if _wants_json():
            click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **failed.as_json()}))
        else:
            click.echo(str(failed), err=True)
        return failed.exit_code


def _open_streams() -> None:
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if stream is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (for as long as the process lasts)
        elif isinstance(stream, io.TextIOWrapper):  # a name may hold what the encoding has not
            stream.reconfigure(errors="backslashreplace")


def _wants_json() -> bool:
    """Whether a document is asked for; told from the arguments, since they may be what is wrong."""
    return "--json" in sys.argv[1:]


def _failure(error: BaseException) -> Failure:
    """Any exception as a failure; those of bugs are raised again where KERNELGEN_TRACEBACK is set."""
    import click

    from kernelgen.core.diagnostics import Diagnostic, Failure, failure, os_failure
    from kernelgen.core.locate import place_in_room

    if isinstance(error, Failure):
        return error
    if isinstance(error, click.ClickException):
        return failure("KG080", "command line", error.format_message())
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in _BROUGHT_BY:
        return failure("KG081", package, "this command needs it", f"pip install 'kernelgen[{_BROUGHT_BY[package]}]'")
    if os.environ.get("KERNELGEN_TRACEBACK"):
        raise error
    message = f"{type(error).__name__}: {error}"
    if (place := place_in_room(error)) is not None:
        return Failure([Diagnostic("KG062", place, f"it raised {message}", "set KERNELGEN_TRACEBACK=1 to see all")], exit_code=2)
    if isinstance(error, OSError):  # of what is printed, for one; those of the work have a code
        return os_failure(error, error.filename or "output")
    return failure("KG082", "kernelgen", message, "set KERNELGEN_TRACEBACK=1 to see where")


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave)
    deadline = threading.Timer(_GRACE, _leave)
    deadline.daemon = True
    deadline.start()
    signal.signal(signal.SIGALRM, _unwind)
    sys.unraisablehook = _unraisable
    _unwind(number, frame)


def _unwind(number: int, frame: FrameType | None) -> None:
    """Raise, but not in an import, as a module of C++ may abort the process, nor while a process is told what it is to do."""
    del number
    while frame is not None:
        starts = (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("kernelgen.core.processes", "start")
        if starts or frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_REAL, _RETRY)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    """What was raised where nothing can be, in a destructor for one, is raised again later."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _RETRY)
    else:
        sys.__unraisablehook__(unraisable)


def _leave(*_: Any) -> None:
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")  # the cursor, which bars hide
    os._exit(INTERRUPTED)
