"""What can go wrong, told in one form: place, code, the line with a caret, and what to do.

A fault in a spec never stops at the first: checks add to a list, and ``Failure`` carries all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Iterable, Mapping

from kernelgen.core.model import Location

CATALOGUE: Mapping[str, str] = {
    "KG001": "a file or folder cannot be read or written",
    "KG002": "a spec is not UTF-8",
    "KG003": "a spec holds a character that cannot be seen",
    "KG004": "a limit on size, depth or count is passed",
    "KG005": "a spec is not well-formed YAML",
    "KG006": "a feature of YAML that specs do without",
    "KG007": "a key is given twice",
    "KG008": "an unknown key",
    "KG009": "a required key is missing",
    "KG010": "a value of the wrong type",
    "KG011": "a value that is not allowed",
    "KG012": "a text that cannot be a name",
    "KG013": "a family that is not named as its file",
    "KG014": "an unknown axis",
    "KG015": "an unknown tag",
    "KG016": "a value is listed twice",
    "KG017": "an exclude that leaves nothing out",
    "KG018": "a tag, or a family, of which nothing is left",
    "KG019": "two variants of one name",
    "KG020": "a kernel without a template, or a template or a module of a room that nothing makes use of",
    "KG021": "a template that is not well-formed, or does more than templates may",
    "KG022": "a template failed on a variant",
    "KG023": "a template made something that is not acceptable Python",
    "KG024": "an output path that is not allowed",
    "KG025": "a tuned choice that does not fit the spec",
    "KG026": "FP8 that no kernel serves: groups that no tile fits, or not each family of a call; a type that a target lacks",
    "KG027": "tunables that are not those that the templates know",
    "KG028": "a family that needs another, of which there is no spec",
    "KG029": "a tag or a setting that makes no difference, that a template refuses, or that nothing can choose",
    "KG030": "a file in the way that kernelgen did not write",
    "KG031": "a generated file that was edited by hand",
    "KG032": "a manifest or journal that cannot be read",
    "KG033": "a build that was interrupted",
    "KG034": "the output differs from what the specs say",
    "KG040": "nothing matches",
    "KG041": "no variant serves a case",
    "KG050": "a kernel that cannot be compiled",
    "KG051": "a kernel that spills more than its spec allows",
    "KG052": "a kernel that takes more shared memory than the target has",
    "KG053": "a lock that cannot be read",
    "KG054": "a kernel that uses other resources than the lock says",
    "KG055": "a lock that does not cover the kernels",
    "KG060": "a variant that differs from its reference",
    "KG061": "kernels cannot run here",
    "KG062": "a module of a room that is missing, cannot be imported, or fails",
    "KG063": "a kernel that compute-sanitizer objects to",
    "KG064": "a kernel that compute-sanitizer did not see as it is now",
    "KG065": "a kernel that adds or rounds in another order than numerics.lock has",
    "KG070": "a workload that cannot be made, or a family that has nothing to tune",
    "KG071": "a peer that cannot be used here",
    "KG072": "a file of results, of tiles or of a search that this run cannot go on with",
    "KG073": "a result that is wrong, or that could not be timed",
    "KG074": "a process, or its context on the GPU, that was lost on the way",
    "KG080": "a command line that is not understood",
    "KG081": "a package that is not installed",
    "KG082": "an error of kernelgen itself",
}
_OF_THE_WAY = (FileNotFoundError, FileExistsError, NotADirectoryError)
_WIDTH = 120  # columns of an excerpt
_MOST = 200  # faults that are shown


@dataclasses.dataclass(frozen=True)
class Nearest:
    """A hint that names the known word nearest to ``word``, or what is said where none is near.

    It is looked for when the hint is shown: a file can have more faults than anybody is shown, and each look takes a while.
    """

    word: str
    known: tuple[str, ...]
    otherwise: str

    @property
    def nearest(self) -> str | None:
        """The known word that is near, if any."""
        return next(iter(difflib.get_close_matches(self.word[:80], self.known, n=1, cutoff=0.6)), None)

    def __str__(self) -> str:
        near = self.nearest
        return f"did you mean {near}?" if near else self.otherwise


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """One fault: a code of the catalogue, where, what, and what to do about it."""

    code: str
    location: Location
    message: str
    hint: str | Nearest = ""

    def __post_init__(self) -> None:
        assert self.code in CATALOGUE, self.code

    def as_json(self) -> dict[str, Any]:
        """The fields of a report; line and column 0 mean the whole file."""
        return {
            "code": self.code,
            "path": self.location.path,
            "line": self.location.line,
            "column": self.location.column,
            "message": self.message,
            "hint": str(self.hint),
        }

    def __str__(self) -> str:
        lines = [f"{printable(str(self.location))}: error[{self.code}]: {printable(self.message)}"]
        if self.location.text:
            lines += _excerpt(self.location)
        hint = printable(str(self.hint))
        if hint:
            lines.append(f"  hint: {hint}")
        return "\n".join(lines)


class Failure(Exception):
    """Work that could not be done; carries every fault that was found.

    Attributes:
        diagnostics: the faults, in the order of their places.
        exit_code: 1 when what was asked about is at fault, 2 when the job could not be done.
    """

    def __init__(self, diagnostics: Iterable[Diagnostic], exit_code: int = 1) -> None:
        self.diagnostics = tuple(sorted(set(diagnostics), key=_place))
        self.exit_code = exit_code
        super().__init__(f"{len(self.diagnostics)} errors")

    def as_json(self) -> dict[str, Any]:
        """The fields of a report: the errors that are shown, and how many are not."""
        shown = [diagnostic.as_json() for diagnostic in self.diagnostics[:_MOST]]
        return {"errors": shown, "more_errors": len(self.diagnostics) - len(shown)}

    def __str__(self) -> str:
        shown = [str(diagnostic) for diagnostic in self.diagnostics[:_MOST]]
        if len(self.diagnostics) > _MOST:
            shown.append(f"... and {len(self.diagnostics) - _MOST} more errors")
        return "\n".join(shown)


def failure(code: str, where: str, message: str, hint: str | Nearest = "", exit_code: int = 2) -> Failure:
    """A ``Failure`` with one fault that concerns a whole file, or the command."""
    return Failure([Diagnostic(code, Location(where), message, hint)], exit_code)


def os_failure(error: OSError, path: object) -> Failure:
    """The ``Failure`` of a system call on ``path``, or on the file or link that stands in the way there."""
    place = Path(str(path))
    for found in (*reversed(place.parents), place) if isinstance(error, _OF_THE_WAY) else ():
        if found.is_symlink() and not found.exists():
            return failure("KG001", str(found), "a link to what is not there", "mend it, or remove it")
        if isinstance(error, NotADirectoryError) and found.exists() and not found.is_dir():
            return failure("KG001", str(found), "a file, where a folder is wanted", "name a folder, or move it away")
    return failure("KG001", str(path), error.strerror or type(error).__name__)


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> Nearest:
    """A hint that names the nearest known word; where none is near ``otherwise``, by default all of them."""
    words = tuple(known)
    if otherwise is None:
        otherwise = f"known: {', '.join(words)}" if words else ""
    return Nearest(word, words, otherwise)


def printable(text: str) -> str:
    """``text`` with what a terminal would obey, and lone surrogates, replaced by '?'."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _place(diagnostic: Diagnostic) -> tuple[Any, ...]:
    where = diagnostic.location
    return where.path, where.line, where.column, diagnostic.code, diagnostic.message


def _excerpt(where: Location) -> list[str]:
    start = max(0, where.column - 1 - _WIDTH // 2) if len(where.text) > _WIDTH else 0
    text = printable(where.text[start : start + _WIDTH])
    before = where.column - 1 - start
    caret = "^" * max(1, min(where.length, _WIDTH - before))
    return [f"{where.line:5} | {text}", f"      | {' ' * before}{caret}"]
