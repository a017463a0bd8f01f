"""The shape of a spec file and of a tuned file: pydantic models, and the JSON Schema that editors use.

What needs more than one value to judge (tags of an axis, excludes, tuned choices) is checked in ``load``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Mapping

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from kernelgen.core.diagnostics import Diagnostic, did_you_mean, failure
from kernelgen.core.model import SCHEDULE, TARGETS, VOCABULARY
from kernelgen.core.names import NAME_PATTERN
from kernelgen.core.read import parse_json, read_file
from kernelgen.spec.limits import MAX_BYTES
from kernelgen.spec.parse import Node, Step

MAX_AXES = 16
MAX_TAGS = 64
MAX_EXCLUDES = 128
MAX_TUNABLES = 64  # of a schedule, and values of each
MAX_SIZES = 32  # of a problem
MAX_TUNABLE = 1 << 20

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Names = Annotated[list[Name], Field(min_length=1, max_length=MAX_TAGS)]
TunableValue = Annotated[int, Field(ge=0, le=MAX_TUNABLE)]
TunableValues = Annotated[list[TunableValue], Field(min_length=1, max_length=MAX_TUNABLES)]


def _size(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and 0 <= value < 1 << 40):
        return value
    raise PydanticCustomError("size", "wanted a whole number from 0, or true or false")


def _intermediate(value: Any) -> Any:
    if value == "float32":
        raise PydanticCustomError("intermediate", "every kernel rounds the value between two products; wanted activation")
    return value


Size = Annotated[Any, AfterValidator(_size)]
NameOrNames = Annotated[
    list[Name],
    Field(min_length=1, max_length=MAX_TAGS),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string", "pattern": NAME_PATTERN},
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "string", "pattern": NAME_PATTERN},
                },
            ]
        }
    ),
]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ExcludeShape(_Shape):
    """Combinations that are left out."""

    when: Annotated[
        dict[Name, NameOrNames],
        Field(
            min_length=1,
            max_length=MAX_AXES,
            description="Axis to a tag or a list of tags; a combination that matches on every axis named is left out.",
        ),
    ]
    why: Annotated[
        str, Field(min_length=1, max_length=500, description="The reason, for the next reader.")
    ]


class NumericsShape(_Shape):
    """Decisions on precision that hold for every schedule of the family."""

    intermediate: Annotated[
        Literal["activation"],
        BeforeValidator(_intermediate),
        Field(description="Precision of the value between two products: rounded once to the activation dtype."),
    ] = "activation"
    strict: Annotated[
        bool,
        Field(description="All schedules add in one order, so that they agree bit for bit; slower for few tokens."),
    ] = False


class QuantShape(_Shape):
    """What the FP8 operands of a family look like."""

    elements: Annotated[
        list[Literal["e4m3", "e5m2"]],
        Field(min_length=1, description="Element types; the kernels read them from the tensors."),
    ] = ["e4m3", "e5m2"]
    group_n: Annotated[
        int,
        Field(ge=1, le=MAX_TUNABLE, description="Rows of a weight matrix that share a scale."),
    ] = 128
    group_k: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_TUNABLE,
            description="Columns of a weight matrix, and of an activation, that share a scale.",
        ),
    ] = 128


class ResourcesShape(_Shape):
    """What a compiled variant may use."""

    max_spill_bytes: Annotated[
        int,
        Field(ge=0, le=MAX_TUNABLE, description="Bytes of spilled registers a thread may have."),
    ] = 0


class SpecShape(_Shape):
    """A kernel family: its axes of meaning, what is left out, and its tunables."""

    family: Annotated[Name, Field(description="Name of the family, and of this file.")]
    axes: Annotated[
        dict[Name, Names],
        Field(
            min_length=1,
            max_length=MAX_AXES,
            description="Axis to tags. Every combination is a variant, its name the tags in this order.",
        ),
    ]
    exclude: Annotated[
        list[ExcludeShape],
        Field(max_length=MAX_EXCLUDES, description="Combinations that are left out."),
    ] = []
    numerics: NumericsShape = NumericsShape()
    quant: QuantShape = QuantShape()
    targets: Annotated[
        list[Literal[TARGETS]],  # type: ignore[valid-type]
        Field(min_length=1, description="GPUs that every variant must compile for."),
    ]
    resources: ResourcesShape = ResourcesShape()
    tunables: Annotated[
        dict[Name, Annotated[dict[Name, TunableValues], Field(max_length=MAX_TUNABLES)]],
        Field(
            max_length=MAX_TAGS,
            description="Schedule (without such an axis: the family) to its constexpr parameters and their legal values."
        ),
    ] = {}


class ChoiceShape(_Shape):
    """A schedule, its tunables, and its time."""

    schedule: Name
    config: Annotated[dict[Name, int], Field(max_length=MAX_TUNABLES)]
    us: Annotated[float, Field(gt=0)]


class EntryShape(ChoiceShape):
    """The best choice for a problem."""

    problem: Annotated[dict[Name, Size], Field(min_length=1, max_length=MAX_SIZES)]
    tags: Annotated[dict[Name, Name], Field(max_length=MAX_AXES)] = {}
    runner_up: ChoiceShape | None = None


class DeviceShape(_Shape):
    """What was measured on; see ``model.Device``."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    target: Literal[TARGETS]  # type: ignore[valid-type]
    multiprocessors: Annotated[int, Field(ge=1, le=MAX_TUNABLE)]
    shared_memory: Annotated[int, Field(ge=1, le=MAX_TUNABLE)]


class TunedShape(_Shape):
    """Measurements of a family on one device; written by ``kernelgen tune``."""

    family: Name
    device: DeviceShape
    versions: dict[Name, Annotated[str, Field(max_length=100)]]
    entries: list[EntryShape]


def validate(shape: type[_Shape], root: Node) -> tuple[dict[str, Any], list[Diagnostic]]:
    """The sections of a file that have their shape, and the faults of the others.

    Sections that fit are given even when others do not, so that their content is checked in the same run.
    """
    if not isinstance(root.value, dict):
        return {}, [Diagnostic("KG010", root.location, "wanted a mapping of keys to values")]
    plain = root.plain()
    try:
        fitting = shape.model_validate(plain)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=True)
        bad = {fault["loc"][0] for fault in faults if fault["loc"]}
        good = {name: plain[name] for name in shape.model_fields if name in plain.keys() - bad}
        sections = {name: _section(shape, name, value) for name, value in good.items()}
        return sections, [_diagnostic(shape, root, fault) for fault in faults]
    return {name: getattr(fitting, name) for name in shape.model_fields}, []


def _section(shape: type[_Shape], name: str, value: object) -> Any:
    field = shape.model_fields[name]
    annotated: Any = Annotated[field.annotation, field]
    return TypeAdapter(annotated).validate_python(value, strict=True)


_TYPES = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
}


def _diagnostic(shape: type[_Shape], root: Node, fault: Mapping[str, Any]) -> Diagnostic:
    kind: str = fault["type"]
    path: tuple[Step, ...] = fault["loc"]
    if path and path[-1] == "[key]":
        where = root.key_at(*path[:-1])
        return Diagnostic("KG012", where, f"{fault['input']!r} cannot be a name", _NAME_HINT)
    if kind == "extra_forbidden":
        known = sorted(_keys(shape, path[:-1]))
        message = f"unknown key {path[-1]!r}"
        return Diagnostic("KG008", root.key_at(*path), message, did_you_mean(str(path[-1]), known))
    if kind == "missing":
        where = root.key_at(*path[:-1]) if len(path) > 1 else root.location
        if len(path) > 1 and isinstance(path[-2], int):
            where = root.at(*path[:-1]).location
        return Diagnostic("KG009", where, f"key {path[-1]!r} is missing")
    where = root.at(*path).location
    if kind in _TYPES:
        return Diagnostic("KG010", where, f"wanted {_TYPES[kind]}, got {_kind(fault['input'])}")
    if kind == "string_pattern_mismatch":
        return Diagnostic("KG012", where, f"{fault['input']!r} cannot be a name", _NAME_HINT)
    if kind == "literal_error":
        allowed = [
            word.strip("'") for word in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")
        ]
        message = f"{fault['input']!r} is not allowed here"
        return Diagnostic("KG011", where, message, did_you_mean(str(fault["input"]), allowed))
    if kind in ("too_long", "too_short"):
        limits = fault["ctx"]
        wanted = "at least 1" if kind == "too_short" else f"at most {limits['max_length']}"
        code = "KG011" if kind == "too_short" else "KG004"
        return Diagnostic(code, where, f"{limits['actual_length']} entries; {wanted}")
    return Diagnostic("KG011", where, fault["msg"].replace("Input should", "the value should"))


_NAME_HINT = "a name is a lower-case letter, then up to 39 of a-z, 0-9 and _"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), repr(value))


def _keys(shape: type[BaseModel], path: tuple[Step, ...]) -> list[str]:
    """The keys that the mapping at ``path`` may have."""
    models: dict[tuple[str, ...], type[BaseModel]] = {
        ("exclude",): ExcludeShape,
        ("numerics",): NumericsShape,
        ("quant",): QuantShape,
        ("resources",): ResourcesShape,
        ("device",): DeviceShape,
        ("entries",): EntryShape,
        ("entries", "runner_up"): ChoiceShape,
    }
    names = tuple(step for step in path if isinstance(step, str))
    return list(models.get(names, shape).model_fields)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 7, as editors want it) of a spec file."""
    schema = SpecShape.model_json_schema()
    axes = schema["properties"]["axes"]
    axes["properties"] = {
        axis: {
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {"enum": list(tags)},
        }
        for axis, tags in VOCABULARY.items()
    }
    axes["properties"][SCHEDULE] = {
        "type": "array",
        "uniqueItems": True,
        "description": "Ways to do the same work; each has a template of its own.",
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "kernelgen spec"}
    return {**head, **_draft7(schema)}


def _draft7(value: Any) -> Any:
    """Pydantic's dialect (2020-12) in the older words, without its titles, closed to other names."""
    if isinstance(value, dict):
        closed = {"additionalProperties": False} if "patternProperties" in value else {}
        return closed | {
            "definitions" if key == "$defs" else key: _draft7(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    if isinstance(value, list):
        return [_draft7(item) for item in value]
    return value.replace("#/$defs/", "#/definitions/") if isinstance(value, str) else value


SCHEMA_FILE = "kernelgen.schema.json"


def check_schema(specs: Path) -> None:
    """Compare the schema file beside the specs with ``json_schema``.

    Raises:
        Failure: it is missing or another; exit code 1.
    """
    file = specs / SCHEMA_FILE
    try:
        current = parse_json(read_file(file, MAX_BYTES))
    except (OSError, ValueError):
        current = None
    if current != json_schema():
        hint = f"run kernelgen schema > {file}"
        raise failure("KG034", str(file), "differs from the schema of specs", hint, exit_code=1)
