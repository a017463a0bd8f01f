"""Processes that each do one job at a time, and are started again when one dies of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
from typing import Any, Callable, Iterator, Literal, Mapping, NamedTuple, Protocol, Sequence

from kernelgen.core import processes
from kernelgen.core.diagnostics import Failure, failure

# Runs in the process: gives (what the process says of itself, job -> replies).
Make = Callable[..., "tuple[Any, Callable[[Any], Iterator[Any]]]"]
_RESTARTS = 5  # of one member
_NICE = 10


class Event(NamedTuple):
    """What a member told: a reply to its job, that the job is done, or that the process died of it."""

    member: int
    kind: Literal["ready", "reply", "done", "died"]
    reply: Any = None


class Crew(Protocol):
    """What the tuner asks of processes; members are numbered."""

    def idle(self) -> list[int]:
        """Members that wait for a job."""

    def give(self, member: int, job: Any) -> None:
        """Start a job of an idle member."""

    def waitables(self) -> list[Any]:
        """What becomes readable when there are events, for ``multiprocessing.connection.wait``."""

    def events(self) -> list[Event]:
        """What was told since the last call, without waiting."""

    @property
    def hellos(self) -> list[Any]:
        """What the members that have started said of themselves."""

    def stop(self) -> None:
        """End all processes, whatever they do."""


class Processes:
    """A crew of spawned processes that run ``make(*arguments)``; a member each for ``environments``."""

    def __init__(
        self,
        make: Make,
        arguments: Sequence[Any],
        environments: Sequence[Mapping[str, str]],
        background: bool = False,
    ) -> None:
        self._make = make
        self._arguments = tuple(arguments)
        self._nice = _NICE if background else 0
        self._members = [_Member(environment) for environment in environments]
        for member in self._members:
            self._start(member)

    def idle(self) -> list[int]:
        return [i for i, member in enumerate(self._members) if member.state == "idle"]

    def give(self, member: int, job: Any) -> None:
        self._members[member].state = "busy"
        # A process that died while idle shows when its connection is read.
        with contextlib.suppress(OSError):
            self._members[member].connection.send(job)

    def waitables(self) -> list[Any]:
        return [member.connection for member in self._members]

    def events(self) -> list[Event]:
        found = []
        for number, member in enumerate(self._members):
            try:
                while member.connection.poll():
                    found.append(self._receive(number, member))
            except (EOFError, OSError):
                found.append(self._bury(number, member))
        return found

    @property
    def hellos(self) -> list[Any]:
        return [member.hello for member in self._members if member.state != "starting"]

    def started(self) -> list[Any]:
        """Wait until all members have started, and return what they said of themselves.

        Raises:
            Failure: one cannot start.
        """
        while len(self.hellos) < len(self._members):
            multiprocessing.connection.wait(self.waitables())
            self.events()
        return self.hellos

    def stop(self) -> None:
        for member in self._members:
            processes.end(member.process)
            member.connection.close()

    def _start(self, member: _Member) -> None:
        member.connection, theirs = multiprocessing.Pipe()
        member.state = "starting"
        with _environment(member.environment):
            member.process = processes.start("spawn", _serve, theirs, self._make, self._arguments, self._nice)
        theirs.close()

    def _receive(self, number: int, member: _Member) -> Event:
        kind, content = member.connection.recv()
        if kind == "failed":
            raise failure(*content)
        if kind == "ready":
            member.hello = content
        if kind in ("ready", "done"):
            member.state = "idle"
        return Event(number, kind, content)

    def _bury(self, number: int, member: _Member) -> Event:
        member.process.join()
        member.restarts += 1
        if member.state == "starting" or member.restarts > _RESTARTS:
            raise failure("KG074", "tune", f"a process ended {member.restarts} times: exit code {member.process.exitcode}")
        member.connection.close()
        self._start(member)
        return Event(number, "died")


class _Member:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.process: Any = None
        self.connection: Any = None
        self.state: Literal["starting", "idle", "busy"] = "starting"
        self.hello: Any = None
        self.restarts = 0


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(connection: Any, make: Make, arguments: tuple[Any, ...], nice: int) -> None:
    os.nice(nice)
    try:
        hello, work = make(*arguments)
        connection.send(("ready", hello))
        while True:
            job = connection.recv()
            for reply in work(job):
                connection.send(("reply", reply))
            connection.send(("done", None))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except Failure as failed:
        told = failed.diagnostics[0]
        connection.send(("failed", (told.code, told.location.path, told.message, told.hint)))
    except Exception as error:
        connection.send(("failed", ("KG074", "tune", f"{type(error).__name__}: {error}")))
