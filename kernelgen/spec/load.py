"""Spec files to families: every check that a spec can fail, all faults of all files at once."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Collection, Iterable, Mapping, Sequence

from kernelgen.core.diagnostics import Diagnostic, Failure, Nearest, did_you_mean, failure, os_failure
from kernelgen.core.model import (
    SCHEDULE,
    TAG_HINTS,
    TUNED_AXES,
    VARIANT_ATTRIBUTES,
    VOCABULARY,
    Axis,
    Choice,
    Device,
    Exclude,
    Family,
    Kernel,
    Location,
    Numerics,
    Quant,
    Record,
    Resources,
    Tunable,
    Tuned,
    TunedEntry,
)
from kernelgen.core.names import TUNED, Identifier, identifier_fault, kernel_template
from kernelgen.core.read import read_file
from kernelgen.spec.limits import MAX_BYTES
from kernelgen.spec.parse import Node, Step, parse
from kernelgen.spec.schema import (
    ChoiceShape,
    DeviceShape,
    EntryShape,
    ExcludeShape,
    SpecShape,
    TunedShape,
    validate,
)

MAX_FILES = 256


def load(specs: Path) -> tuple[list[Family], list[Diagnostic]]:
    """The families of the folder ``specs`` that hold, in the order of their names, and the faults of all files.

    Raises:
        Failure: the folder or a file cannot be read, or there is no spec; exit code 2.
    """
    files = _spec_files(specs)
    if not files:
        message = "no spec (*.yaml) in this folder"
        raise failure("KG001", str(specs), message, "name the folder with --specs")
    families: list[Family] = []
    faults: list[Diagnostic] = []
    devices = _devices(specs)
    for file in files:
        family, found = _load_family(file, [folder / file.name for folder in devices])
        families += [family] if family else []
        faults += found
    return families, faults + _strays(specs, devices, {file.name for file in files})


def _strays(specs: Path, devices: Sequence[Path], names: Collection[str]) -> list[Diagnostic]:
    """Tuned files that belong to no device, or to no family."""
    faults = []
    for file in _spec_files(specs / TUNED, missing_ok=True):
        hint = f"put it into a folder of its device: {TUNED}/h200/{file.name}"
        faults.append(Diagnostic("KG013", Location(str(file)), "tiles of no device", hint))
    for folder in devices:
        if reason := identifier_fault(folder.name):
            faults.append(Diagnostic("KG012", Location(str(folder)), f"{folder.name!r} {reason}"))
        for file in _spec_files(folder):
            if file.name not in names:
                message = f"there is no spec {file.name} that this could tune"
                faults.append(Diagnostic("KG013", Location(str(file)), message))
    return faults


def _devices(specs: Path) -> list[Path]:
    """The folders of devices that tiles were measured on."""
    folder = specs / TUNED
    try:
        found = sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise os_failure(error, folder) from None
    if len(found) > MAX_FILES:
        raise failure("KG004", str(folder), f"{len(found)} folders; at most {MAX_FILES} are read")
    return found


def _spec_files(folder: Path, missing_ok: bool = False) -> list[Path]:
    try:
        files = sorted(
            (path for path in folder.iterdir() if path.suffix in (".yaml", ".yml")),
            key=lambda path: path.name,
        )
    except FileNotFoundError as error:
        if missing_ok:
            return []
        raise os_failure(error, folder) from None
    except OSError as error:
        raise os_failure(error, folder) from None
    if len(files) > MAX_FILES:
        raise failure("KG004", str(folder), f"{len(files)} files; at most {MAX_FILES} are read")
    return files


@functools.lru_cache(maxsize=64)  # a process that asks again finds most files as they were
def _parsed(path: str, data: bytes) -> tuple[Node | None, tuple[Diagnostic, ...]]:
    root, faults = parse(path, data)
    return root, tuple(faults)


def _read(file: Path) -> tuple[Node | None, list[Diagnostic]]:
    try:
        root, faults = _parsed(str(file), read_file(file, MAX_BYTES))
        return root, list(faults)
    except OSError as error:
        raise os_failure(error, file) from None
    except Failure as failed:
        return None, list(failed.diagnostics)


def _load_family(file: Path, tuned_files: Sequence[Path]) -> tuple[Family | None, list[Diagnostic]]:
    root, faults = _read(file)
    if file.suffix != ".yaml":
        faults.append(Diagnostic("KG013", Location(str(file)), "a spec is called <family>.yaml"))
    if root is None:
        return None, faults
    family, found = _Spec(root, file.stem).family()
    faults = _joined(faults, found)
    if family is None:
        return None, faults
    measured = []
    for tuned_file in filter(Path.exists, tuned_files):
        root, found = _read(tuned_file)
        faults += found
        if root is not None and not identifier_fault(tuned_file.parent.name):
            tuned, found = _TunedFile(root, family, Identifier(tuned_file.parent.name)).tuned()
            faults = _joined(faults, found)
            measured += [tuned] if tuned else []
    return dataclasses.replace(family, tuned=tuple(measured)), faults


def _joined(first: list[Diagnostic], then: list[Diagnostic]) -> list[Diagnostic]:
    """Both; a value that cannot be read is not judged again."""
    places = {fault.location for fault in first}
    return first + [fault for fault in then if fault.location not in places]


class _Checks:
    """A file under check: its tree, the sections that have their shape, and the faults so far."""

    def __init__(self, root: Node, shape: Any) -> None:
        self.root = root
        self.sections, self.faults = validate(shape, root)

    def fault(self, code: str, where: Location, message: str, hint: str | Nearest = "") -> None:
        self.faults.append(Diagnostic(code, where, message, hint))

    def value_at(self, *path: Step) -> Location:
        return self.root.at(*path).location

    def check_name(self, text: str, where: Location) -> None:
        reason = identifier_fault(text)
        if reason:
            self.fault("KG012", where, f"{text!r} {reason}")

    def check_attribute(self, text: str, where: Location, taken: Iterable[str]) -> None:
        self.check_name(text, where)
        if text in taken:
            self.fault("KG012", where, f"{text!r} has another meaning in templates")

    def check_unique(self, values: Iterable[object], *path: Step) -> None:
        seen = set()
        for i, value in enumerate(values):
            if value in seen:
                self.fault("KG016", self.value_at(*path, i), f"{value!r} is listed twice")
            seen.add(value)

    def check_family(self, stem: str) -> None:
        name = self.sections.get("family")
        if name is not None and name != stem:
            message = f"family {name!r} in a file called {stem!r}"
            self.fault("KG013", self.value_at("family"), message, f"rename one: {name}.yaml")


class _Spec(_Checks):
    def __init__(self, root: Node, stem: str) -> None:
        super().__init__(root, SpecShape)
        self.stem = stem

    def family(self) -> tuple[Family | None, list[Diagnostic]]:
        sections = self.sections
        self.check_family(self.stem)
        if "family" in sections:
            self.check_name(sections["family"], self.value_at("family"))
        if "targets" in sections:
            self.check_unique(sections["targets"], "targets")
        axes: Mapping[str, list[str]] = sections.get("axes", {})
        self._check_axes(axes)
        if axes:
            for i, exclude in enumerate(sections.get("exclude", [])):
                self._check_exclude(i, exclude, axes)
        self._check_tunables(sections.get("tunables", {}), axes)
        if "quant" in sections:
            self.check_unique(sections["quant"].elements, "quant", "elements")
        if self.faults:
            return None, self.faults
        name = Identifier(sections["family"])
        return (
            Family(
                name=name,
                axes=tuple(self._axis(axis, tags) for axis, tags in axes.items()),
                excludes=tuple(map(self._exclude, range(len(sections["exclude"])))),
                kernels=self._kernels(name, axes),
                numerics=Numerics(**sections["numerics"].model_dump()),
                quant=Quant(
                    tuple(map(Identifier, sections["quant"].elements)),
                    sections["quant"].group_n,
                    sections["quant"].group_k,
                ),
                targets=tuple(sections["targets"]),
                target_locations=tuple(self.value_at("targets", i) for i in range(len(sections["targets"]))),
                resources=Resources(**sections["resources"].model_dump()),
                tuned=(),
                location=self.value_at("family"),
                settings=self._settings("numerics", "quant"),
            ),
            [],
        )

    def _settings(self, *sections: str) -> Mapping[str, Location]:
        given = ((section, key) for section in sections if section in self.root.keys for key in self.root.at(section).keys)
        return {f"{section}.{key}": self.root.key_at(section, key) for section, key in given}

    def _check_axes(self, axes: Mapping[str, list[str]]) -> None:
        for axis, tags in axes.items():
            self.check_attribute(axis, self.root.key_at("axes", axis), VARIANT_ATTRIBUTES)
            self.check_unique(tags, "axes", axis)
            for i, tag in enumerate(tags):
                where = self.value_at("axes", axis, i)
                if axis not in VOCABULARY:
                    self.check_name(tag, where)
                elif tag not in VOCABULARY[axis]:
                    hint = TAG_HINTS.get(axis) or did_you_mean(tag, list(VOCABULARY[axis]))
                    self.fault("KG015", where, f"axis {axis} has no tag {tag!r}", hint)
                else:
                    ranks = VOCABULARY[axis][tag].get("block_rank")
                    if isinstance(ranks, int) and ranks & (ranks - 1):
                        message = f"{tag} is a tile of {ranks} ranks, and tiles of Triton are powers of two"
                        self.fault("KG015", where, message, TAG_HINTS[axis])

    def _check_exclude(self, i: int, exclude: ExcludeShape, axes: Mapping[str, list[str]]) -> None:
        for axis, tags in exclude.when.items():
            if axis not in axes:
                where = self.root.key_at("exclude", i, "when", axis)
                self.fault("KG014", where, f"unknown axis {axis!r}", did_you_mean(axis, list(axes)))
                continue
            self.check_unique(tags, "exclude", i, "when", axis)
            for j, tag in enumerate(tags):
                if tag not in axes[axis]:
                    where = self.value_at("exclude", i, "when", axis, j)
                    message = f"axis {axis} of this spec has no tag {tag!r}"
                    self.fault("KG015", where, message, did_you_mean(tag, axes[axis]))

    def _check_tunables(
        self, tunables: Mapping[str, Mapping[str, list[int]]], axes: Mapping[str, list[str]]
    ) -> None:
        family = self.sections.get("family") if "axes" in self.sections else None
        kernels = axes.get(SCHEDULE) or ([family] if family else [])  # none: they are unknown
        for kernel, parameters in tunables.items():
            if kernels and kernel not in kernels:
                where = self.root.key_at("tunables", kernel)
                message = f"unknown schedule {kernel!r}"
                self.fault("KG015", where, message, did_you_mean(kernel, kernels))
            for name, values in parameters.items():
                where = self.root.key_at("tunables", kernel, name)
                self.check_attribute(name, where, Record.__slots__)
                self.check_unique(values, "tunables", kernel, name)
                if name == "num_warps":
                    self._check_warps(values, kernel)

    def _check_warps(self, values: Sequence[int], kernel: str) -> None:
        legal = [1, 2, 4, 8, 16, 32]  # Triton's; 32 are the most that a program can have
        for i, value in enumerate(values):
            if value not in legal:
                where = self.value_at("tunables", kernel, "num_warps", i)
                hint = f"legal are {', '.join(map(str, legal))}"
                self.fault("KG011", where, f"num_warps {value} is not a power of two up to 32", hint)

    def _axis(self, name: str, tags: list[str]) -> Axis:
        return Axis(
            Identifier(name),
            tuple(map(Identifier, tags)),
            self.root.key_at("axes", name),
            tuple(self.value_at("axes", name, i) for i in range(len(tags))),
        )

    def _exclude(self, i: int) -> Exclude:
        shape: ExcludeShape = self.sections["exclude"][i]
        when = {axis: tuple(tags) for axis, tags in shape.when.items()}
        return Exclude(when, shape.why, self.root.key_at("exclude", i, "when"))

    def _kernels(self, family: Identifier, axes: Mapping[str, list[str]]) -> tuple[Kernel, ...]:
        tunables = self.sections["tunables"]

        def kernel(name: str, schedule: str | None, where: Location) -> Kernel:
            parameters = tuple(
                Tunable(Identifier(parameter), tuple(values), self.root.key_at("tunables", name, parameter))
                for parameter, values in tunables.get(name, {}).items()
            )
            template = kernel_template(family, schedule)
            tuned_at = self.root.key_at("tunables", name)
            return Kernel(Identifier(name), template, parameters, where, tuned_at)

        if SCHEDULE not in axes:
            return (kernel(family, None, self.value_at("family")),)
        return tuple(
            kernel(tag, tag, self.value_at("axes", SCHEDULE, i))
            for i, tag in enumerate(axes[SCHEDULE])
        )


class _TunedFile(_Checks):
    def __init__(self, root: Node, family: Family, label: Identifier) -> None:
        super().__init__(root, TunedShape)
        self.of = family
        self.label = label

    def tuned(self) -> tuple[Tuned | None, list[Diagnostic]]:
        self.check_family(self.of.name)
        entries = self.sections.get("entries", [])
        sizes = list(entries[0].problem) if entries else []
        seen: dict[tuple[object, ...], int] = {}
        for name in sizes:
            where = self.root.key_at("entries", 0, "problem", name)
            self.check_attribute(name, where, Record.__slots__)
        for i, entry in enumerate(entries):
            identity = (*entry.problem.items(), *self._tags(entry).items())
            first = seen.setdefault(identity, i)
            if list(entry.problem) != sizes:
                where = self.root.key_at("entries", i, "problem")
                message = "a problem has other sizes than the first, or in another order"
                self.fault("KG025", where, message, ", ".join(sizes))
            elif first != i:
                where = self.root.key_at("entries", i, "problem")
                self.fault("KG025", where, f"the problem is that of entry {first + 1} again")
            self._check_tags(entry, i)
            self._check_choice(entry, "entries", i)
            if entry.runner_up is not None:
                self._check_choice(entry.runner_up, "entries", i, "runner_up")
        if self.faults:
            return None, self.faults
        return (
            Tuned(
                self._device(),
                tuple(self.sections["versions"].items()),
                tuple(self._entry(entry) for entry in entries),
                self.value_at("entries"),
            ),
            [],
        )

    def _device(self) -> Device:
        shape: DeviceShape = self.sections["device"]
        target = Identifier(shape.target)
        return Device(self.label, shape.name, target, shape.multiprocessors, shape.shared_memory)

    def _tags(self, entry: EntryShape) -> dict[Identifier, str]:
        """A tag for each axis that measurements tell apart: the first one that there is, unless the entry names another."""
        return {
            axis.name: entry.tags.get(axis.name, next(iter(VOCABULARY[axis.name])))
            for axis in self.of.axes
            if axis.name in TUNED_AXES
        }

    def _check_tags(self, entry: EntryShape, i: int) -> None:
        axes = list(self._tags(entry))
        for axis, tag in entry.tags.items():
            if axis not in axes:
                where = self.root.key_at("entries", i, "tags", axis)
                self.fault("KG025", where, f"no tags of {axis!r} are measured", did_you_mean(axis, axes))
            elif tag not in VOCABULARY[axis]:
                where = self.value_at("entries", i, "tags", axis)
                hint = did_you_mean(tag, list(VOCABULARY[axis]))
                self.fault("KG025", where, f"{axis} has no tag {tag!r}", hint)

    def _entry(self, entry: EntryShape) -> TunedEntry:
        tags = {axis: Identifier(tag) for axis, tag in self._tags(entry).items()}
        facts = {
            Identifier(name): fact
            for axis, tag in tags.items()
            for name, fact in VOCABULARY[axis][tag].items()
        }
        return TunedEntry(
            Record({Identifier(key): size for key, size in entry.problem.items()}),
            Record(tags),
            Record(facts),
            self._choice(entry),
            self._choice(entry.runner_up) if entry.runner_up else None,
        )

    def _check_choice(self, choice: ChoiceShape, *path: Step) -> None:
        kernels = [kernel.name for kernel in self.of.kernels]
        if choice.schedule not in kernels:
            where = self.value_at(*path, "schedule")
            message = f"unknown schedule {choice.schedule!r}"
            self.fault("KG025", where, message, did_you_mean(choice.schedule, kernels))
            return
        tunables = {t.name: t.values for t in self.of.kernel(choice.schedule).tunables}
        for name, value in choice.config.items():
            if name not in tunables:
                where = self.root.key_at(*path, "config", name)
                message = f"{choice.schedule} has no tunable {name!r}"
                self.fault("KG025", where, message, did_you_mean(name, list(tunables)))
            elif value not in tunables[Identifier(name)]:
                where = self.value_at(*path, "config", name)
                declared = ", ".join(map(str, tunables[Identifier(name)]))
                message = f"{name} {value} is not a declared value"
                self.fault("KG025", where, message, f"{self.of.spec} declares {declared}")
        missing = ", ".join(name for name in tunables if name not in choice.config)
        if missing:
            self.fault("KG025", self.root.key_at(*path, "config"), f"without a value: {missing}")

    def _choice(self, shape: ChoiceShape) -> Choice:
        tunables = self.of.kernel(shape.schedule).tunables
        config = Record({tunable.name: shape.config[tunable.name] for tunable in tunables})
        return Choice(Identifier(shape.schedule), config, float(shape.us))
