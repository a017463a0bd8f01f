"""``specs/tuned/<device>/<family>.yaml``: written here, read by ``kernelgen.spec.load``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from kernelgen.core.diagnostics import failure, os_failure
from kernelgen.core.write import replace_file
from kernelgen.measure.tune.jobs import Device
from kernelgen.measure.tune.problem import Problem, order, tags
from kernelgen.measure.tune.search import Found
from kernelgen.measure.tune.space import Candidate, Space, content
from kernelgen.measure.tune.state import Key, key
from kernelgen.spec.limits import MAX_BYTES, MAX_VALUES, excess


@dataclasses.dataclass(frozen=True)
class Choice:
    """A candidate and its microseconds."""

    candidate: Candidate
    us: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """The best choice for a problem, and the best of the schedules that take another kind of route."""

    problem: Problem
    best: Choice
    runner_up: Choice | None


def entry(problem: Problem, found: Found, kinds: Sequence[Sequence[str]]) -> Entry | None:
    """What follows from the measurements of a problem; None where nothing worked.

    The runner-up serves the calls that the best cannot: it is of another of ``kinds``, which go by the route that they take.
    Where no such schedule was measured it is the best of any other.
    """
    ranking = [Choice(candidate, us) for us, candidate in found.ranking()]
    if not ranking:
        return None
    best = ranking[0]
    others = [c for c in ranking if c.candidate.schedule != best.candidate.schedule]
    of_its_kind = next((kind for kind in kinds if best.candidate.schedule in kind), ())
    other_kind = [c for c in others if c.candidate.schedule not in of_its_kind]
    return Entry(problem, best, next(iter(other_kind or others), None))


def text(
    family: str, device: Device, versions: Mapping[str, str], entries: Sequence[Entry], space: Space
) -> str:
    """The file; the same entries always give the same bytes.

    Raises:
        Failure: ``kernelgen build`` would not read so large a file.
    """
    about = device._asdict() | {"name": json.dumps(device.name)}
    del about["label"]
    lines = [
        "# Written by kernelgen tune. us: microseconds a call, the median of CUDA-graph replays with weights out of the",
        "# L2 cache, add_inputs=True unless tags say set; runner_up: for routes that the first choice does not serve.",
        f"family: {family}",
        f"device: {_flow(about)}",
        f"versions: {_flow({name: json.dumps(version) for name, version in versions.items()})}",
        "entries:" if entries else "entries: []",
    ]
    for one in sorted(entries, key=lambda one: order(one.problem)):
        own = tags(one.problem)
        sizes = {name: size for name, size in one.problem.items() if name not in own}
        lines.append(f"  - problem: {_flow(sizes)}")
        if own:
            lines.append(f"    tags: {_flow(own)}")
        lines += [f"    {part}" for part in _choice(one.best, space)]
        if one.runner_up is not None:
            lines.append(f"    runner_up: {{{', '.join(_choice(one.runner_up, space))}}}")
    result = "\n".join(lines) + "\n"
    if len(result) > MAX_BYTES or excess(result):
        limit = f"at most {MAX_VALUES} values and {MAX_BYTES} bytes are read"
        raise failure("KG004", family, f"{len(entries)} problems are too many for one file", limit)
    return result


def write(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one step: a reader or a kill never sees half of it.

    Raises:
        Failure: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text)
    except OSError as error:
        raise os_failure(error, path) from error


def read(path: Path, space: Space) -> tuple[str | None, dict[Key, Entry]]:
    """(the name of the device, entries by problem) of an earlier run; entries that the spec does not allow any more are left out.

    Raises:
        Failure: it is not such a file.
    """
    if not path.exists():
        return None, {}
    data = content(path)
    try:
        found = [_entry(one) for one in data["entries"]]
        allowed = [e for e in found if _is_allowed(e.best, space)]
        return data["device"]["name"], {key(e.problem): _without_stale(e, space) for e in allowed}
    except (KeyError, TypeError, AttributeError) as error:
        raise failure("KG072", str(path), f"not a file of kernelgen tune: {error!r}") from error


def _entry(data: dict[str, Any]) -> Entry:
    runner_up = data.get("runner_up")
    problem = {**data["problem"], **data.get("tags", {})}
    return Entry(problem, _read_choice(data), runner_up and _read_choice(runner_up))


def _read_choice(data: dict[str, Any]) -> Choice:
    return Choice(Candidate(data["schedule"], tuple(data["config"].values())), float(data["us"]))


def _is_allowed(choice: Choice, space: Space) -> bool:
    return space.declares(choice.candidate)


def _without_stale(one: Entry, space: Space) -> Entry:
    if one.runner_up is None or _is_allowed(one.runner_up, space):
        return one
    return dataclasses.replace(one, runner_up=None)


def _choice(choice: Choice, space: Space) -> list[str]:
    return [
        f"schedule: {choice.candidate.schedule}",
        f"config: {_flow(space.named(choice.candidate))}",
        f"us: {choice.us:.2f}",
    ]


def _flow(mapping: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {_scalar(value)}" for name, value in mapping.items()) + "}"


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
