"""What every generated launcher shares: launching, compile-only mode, and the words of an error.

Depends on torch and triton alone, so that a copy of it makes the generated package self-contained.

How a launch is made cheap. ``kernel[grid](...)`` binds, specialises and hashes every argument on each call (about 10 us).
A ``Launcher`` does that once per compile key and then calls the compiled kernel with raw pointers, through a function that
is written for the kinds of its arguments and reads them where they lie in what the call is given (about 1 us beside the
driver). This is sound because a key is everything that
Triton specialises on: the constants, the options, the device, the dtype of each pointer, which optional pointers are absent,
and that pointers are 16-byte aligned (but for the trailing ones, small index tables, that a kernel declares
``do_not_specialize_on_alignment``). A call with an unaligned pointer, and any call while a profiler hooks launches, takes
Triton's own path. Integers that change from step to step are declared ``do_not_specialize`` in the kernels, so no number of
tokens and no routing can make another key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar, final

import torch
import triton

TensorGuards: Any = None
with contextlib.suppress(ImportError):
    from torch._C._dynamo.guards import TensorGuards

INTERPRETED: bool = triton.knobs.runtime.interpret
if INTERPRETED:  # on CPU tensors; Triton's interpreter alone is wrong in bfloat16 and FP8
    from . import _repairs

    _repairs.install()


# How the cache treats weights, by the tunable weight_policy: as any data, or as data that is read once.
CACHE_POLICIES = ("", "evict_first")


class Options(NamedTuple):
    """Launch options of one kernel."""

    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False  # launched before the kernel in front of it has finished (programmatic dependent launch)
    fused: bool = True  # a product and the sum that it is added to may be rounded once
    max_registers: int | None = None  # of a thread, as a program starts: warps of roles then share them out anew

    def __repr__(self) -> str:
        """Without what is not set: an option that few kernels have changes no digest of the others."""
        return f"Options({', '.join(f'{name}={value!r}' for name, value in self._asdict().items() if value is not None)})"


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """One compile key, as a launch would make it: enough to compile it without running it."""

    launcher: Launcher
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: Options

    @property
    def key(self) -> tuple[Any, ...]:
        """What Triton specialises on, for aligned pointers; equal keys share one compiled kernel."""

        def kind(argument: Any) -> Any:
            if isinstance(argument, torch.Tensor):
                return argument.dtype
            if isinstance(argument, tuple):
                return tuple(kind(item) for item in argument)
            if hasattr(argument, "block_shape"):  # a descriptor, of Triton or of Gluon
                return argument.base.dtype, tuple(argument.block_shape)
            return argument is None

        return (self.launcher, self.constants, self.options, *map(kind, self.arguments))

    def compile(self) -> Any:
        """Compile for the active target and return Triton's compiled kernel; nothing runs."""
        from triton.runtime.jit import MockTensor

        def mock(argument: Any) -> Any:
            if isinstance(argument, torch.Tensor):
                return MockTensor(_BYTES.get(argument.dtype, argument.dtype))
            if isinstance(argument, tuple):
                return tuple(mock(item) for item in argument)
            if hasattr(argument, "block_shape"):  # a descriptor, of Triton or of Gluon
                return dataclasses.replace(argument, base=MockTensor(argument.base.dtype))
            return argument

        return self.launcher.kernel.warmup(
            *(mock(argument) for argument in self.arguments),
            *self.constants,
            grid=(1,),
            **_triton_options(self.options),
        )


_BYTES = {torch.float8_e8m0fnu: torch.uint8}  # what Triton has no type for, kernels read as bytes


def _as_bytes(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor) and argument.dtype in _BYTES:
        return argument.view(_BYTES[argument.dtype])
    return argument


_recorder: list[CompileRequest] | None = None
_stand_in: torch.device | None = None
_caches: list[dict[Any, Any]] = []


def _cache() -> dict[Any, Any]:
    _caches.append({})
    return _caches[-1]


class Calls:
    """What was worked out for calls seen before: found by the shapes, strides, dtypes and devices of their tensors.

    The tensors of a call nearly always look like those of the last one with its ``hint``. torch compares them in C
    (0.1 us a tensor); only where they do not, or where torch has no such guards, a key is made of them (0.5 us a tensor).
    ``compile_only`` and ``choosing`` start and end with all of this empty.
    """

    _LIMIT = 16384

    def __init__(self) -> None:
        self._known = _cache()
        self.recent = _cache()  # by hint: (whether tensors look like those of the call, what was put for it)

    def find(self, hint: tuple[Any, ...], tensors: Sequence[torch.Tensor]) -> Any:
        """What ``recent`` is to hold for such tensors, or None.

        ``hint`` holds all that matters beside them, and fixes their number.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return None  # as the guards have it; autograd is no part of the key
        if any(tensor.is_neg() for tensor in tensors):
            return None  # which is refused; a key does not tell it
        known = self._known.get((hint, *map(_looks, tensors)))
        if known is None:
            return None
        self.recent[hint] = found = (_guard(tensors), known)
        return found

    def get(self, hint: tuple[Any, ...], tensors: Sequence[torch.Tensor]) -> Any:
        """What was put for such tensors, or None."""
        last = self.recent.get(hint)
        if last is None or not last[0](*tensors):
            last = self.find(hint, tensors)
        return None if last is None else last[1]

    def put(self, hint: tuple[Any, ...], tensors: Sequence[torch.Tensor], call: Any) -> Any:
        """Keep ``call`` for such tensors, and return it."""
        if len(self._known) >= self._LIMIT:
            self._known.clear()
            self.recent.clear()
        key = (hint, *map(_looks, tensors))
        self._known[key] = call
        return call


def _looks(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _guard(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Whether other tensors look like these, and are of the same classes; it keeps none of them alive."""
    if TensorGuards is None:
        return lambda *others: False
    places = {id(tensor): place for place, tensor in reversed([*enumerate(tensors)])}
    firsts = [places[id(tensor)] for tensor in tensors]  # torch's guards take no tensor twice
    own = sorted({*firsts})
    distinct = [tensors[place] for place in own]
    sizes, strides = [list(t.shape) for t in distinct], [list(t.stride()) for t in distinct]
    check: Callable[..., bool] = TensorGuards(*distinct, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if len(own) == len(tensors):
        return check

    def check_twins(*others: torch.Tensor) -> bool:
        ids = [*map(id, others)]
        return [ids[place] for place in firsts] == ids and check(*[others[place] for place in own])

    return check_twins


@contextlib.contextmanager
def compile_only(device: torch.device | None = None) -> Iterator[list[CompileRequest]]:
    """Inside, launches run nothing: each is noted as a ``CompileRequest`` in the list that is yielded.

    Tensors may be on the ``meta`` device; choices are then made as for ``device``, or, without one, for the target of
    Triton's active driver. Warm-up, the resource lock and the proof that keys are closed are built on this.
    """
    global _recorder, _stand_in
    previous = _recorder, _stand_in
    _recorder, _stand_in = [], device
    _forget()
    try:
        yield _recorder
    finally:
        _recorder, _stand_in = previous
        _forget()


def _forget() -> None:
    for known in _caches:
        known.clear()


def _triton_options(options: Options) -> dict[str, Any]:
    # enable_fp_fusion: Triton 3.10 turns its default off, which would change numbers under a user.
    chosen = {"num_warps": options.num_warps, "num_stages": options.num_stages, "enable_fp_fusion": options.fused}
    if options.pdl:
        chosen["launch_pdl"] = True
    if options.max_registers is not None:
        chosen["maxnreg"] = options.max_registers
    return chosen


# Without the checks around them in torch.cuda; a build of torch for the CPU has neither.
_get_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_get_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)

# The object, not its current value: profilers add themselves to it.
_launch_hooks = triton.knobs.runtime.launch_enter_hook


class Path:
    """Where something lies in what a call is given, or in scratch that the call has of its own: names, one behind the other.

    Attributes of a path are paths, and so is a part or a view of one: where a function tells of tensors what each launch is
    given, it tells of paths where that lies. None has nothing in it but None. A field may be called as anything but ``view``.
    """

    __slots__ = ("_names", "_views")

    def __init__(self, names: tuple[str, ...], views: tuple[Callable[[Any], Any], ...] = ()) -> None:
        self._names = names
        self._views = views  # of the tensor there, in contiguous memory: the same bytes, from the same place in it on

    def __getattr__(self, name: str) -> Path:
        if name.startswith("_"):
            raise AttributeError(name)
        return Path((*self._names, name))

    def __getitem__(self, part: slice) -> Path:
        return Path(self._names, (*self._views, lambda tensor: tensor[part]))

    def view(self, *shape: Any) -> Path:
        return Path(self._names, (*self._views, lambda tensor: tensor.view(*shape)))

    def _find(self, given: Any, scratch: Any = None) -> Any:
        """What lies there."""
        root, *names = self._names
        found = given if root == "given" else scratch
        for name in names:
            found = None if found is None else getattr(found, name)
        return self._seen(found)

    def _seen(self, whole: Any) -> Any:
        """What a view is of, viewed."""
        return functools.reduce(lambda seen, view: view(seen), self._views, whole)

    @property
    def _text(self) -> str:
        """It without its views, in Python: a field of what is given is a name of its own."""
        return ".".join(self._names).replace("given.", "given_", 1)

    def _away(self, given: Any, scratch: Any) -> int:
        """Bytes from there to the tensor, in its views."""
        return self._find(given, scratch).data_ptr() - Path(self._names)._find(given, scratch).data_ptr() if self._views else 0


GIVEN, SCRATCH = Path(("given",)), Path(("scratch",))
# Where memory of a call lies, and what makes it at each; None: a caller's workspace has it.
Lent = tuple[Path, Callable[[], torch.Tensor] | None]


class Made:
    """An operand that is made at each call, of what lies at a path: a tensor descriptor."""

    __slots__ = ("make", "of")

    def __init__(self, make: Callable[[Any], Any], of: Any) -> None:
        self.make = make
        self.of = of


def paths(given: Any, path: Path = GIVEN) -> Any:
    """A named tuple like ``given`` with paths in place of tensors and fractions, which change from call to call that look alike;
    of sequences of tensors each is one. The rest stays.
    """
    if isinstance(given, (torch.Tensor, float)):
        return path
    if hasattr(given, "_fields"):
        return given._make([paths(value, getattr(path, name)) for name, value in zip(given._fields, given, strict=True)])
    return path if isinstance(given, (list, tuple)) and any(isinstance(each, torch.Tensor) for each in given) else given


def _through(source: Any, given: Any) -> Any:
    """A source of calls that are given something else, in which that of ``source`` lies where ``given``, of paths, has it."""
    if isinstance(source, Made):
        return Made(source.make, _through(source.of, given))
    return source._find(given, SCRATCH) if isinstance(source, Path) else source


def _found(source: Any, given: Any, scratch: Any) -> Any:
    if isinstance(source, Made):
        return source.make(_found(source.of, given, scratch))
    return source._find(given, scratch) if isinstance(source, Path) else source


def _named(given: Any, record: Any) -> Any:
    return record._make(given) if type(given) is tuple else given


class Call:
    """What a call of one kind does, ready to be done again and again: ``run``, with what it is given."""

    __slots__ = ("run",)

    run: Callable[..., None]  # (given, scratch of the call that it is a part of)

    def through(self, given: Any, **operands: Any) -> Call:
        """The same as a part of calls that are given something else.

        Args:
            given: what this one is given, made of paths to where it lies there; ``GIVEN``: the same.
            operands: of parameters of the kernel, in place of what is read for them.
        """
        raise NotImplementedError

    def plain(self, record: Any) -> Call:
        """The same, run with plain tuples of what such a named tuple has, which take half the time to make."""
        raise NotImplementedError


class InOrder(Call):
    """Calls, one behind the other.

    Args:
        calls: of which each is given the same.
        scratch: makes what they find at ``SCRATCH``; None: there is none.
    """

    __slots__ = ("_calls", "_scratch")

    def __init__(self, calls: Iterable[Call], scratch: Callable[[], Any] | None = None) -> None:
        self._calls = tuple(calls)
        self._scratch = scratch
        self.run = self._run

    def _run(self, given: Any, scratch: Any = None) -> None:
        if self._scratch is not None:
            scratch = self._scratch()
        for call in self._calls:
            call.run(given, scratch)

    def through(self, given: Any, **operands: Any) -> Call:
        if self._scratch is not None:
            raise TypeError("a call with scratch of its own is no part of another")
        return InOrder(call.through(given, **operands) for call in self._calls)

    def plain(self, record: Any) -> Call:
        return InOrder((call.plain(record) for call in self._calls), self._scratch)


NOTHING = InOrder(())  # the call of an empty batch


class OnHost(Call):
    """A function of the host, of what lies at a path."""

    __slots__ = ("_function", "_record", "_source")

    def __init__(self, function: Callable[[Any], object], source: Any, record: Any = None) -> None:
        self._function = function
        self._source = source
        self._record = record
        self.run = self._run

    def _run(self, given: Any, scratch: Any = None) -> None:
        self._function(_found(self._source, _named(given, self._record), scratch))

    def through(self, given: Any, **operands: Any) -> Call:
        return OnHost(self._function, _through(self._source, given))

    def plain(self, record: Any) -> Call:
        return OnHost(self._function, self._source, record)


class Launcher:
    """Launches one Triton kernel, whose operands stand in front of its constants.

    Args:
        kernel: of Triton.
        op: of ``_operands``, whose calls launch it.
        operands: where they lie in what a call is given, a word each: "parameter=field.part"; a parameter alone is of the field
            of its name, but for _ptr or _ptrs. The kernel takes those that it has.

    Raises:
        TypeError: nothing lies there in what such calls are given.
    """

    def __init__(self, kernel: Any, op: Any, operands: str = "") -> None:
        self.kernel = kernel
        # The interpreter's kernels have no params, but annotations too.
        self.constants = tuple(name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind))
        code = kernel.fn.__code__
        own = [name for name in code.co_varnames[: code.co_argcount] if name not in self.constants]
        self._sources: dict[str, Any] = dict.fromkeys(own, Ellipsis)  # that are left to ``bind``
        for word in operands.split():
            name, _, path = word.partition("=")
            names = (path or name.removesuffix("_ptrs").removesuffix("_ptr")).split(".")
            if not op.has(*names):
                raise TypeError(f"{kernel.fn.__name__}: {word}: {op.name} is given no {'.'.join(names)}")
            if name in self._sources:
                self._sources[name] = Path(("given", *names))
        loose = [getattr(param, "do_not_specialize_on_alignment", False) for param in getattr(kernel, "params", ())]
        self.num_aligned = loose.index(True) if True in loose else len(loose)  # leading arguments

    def bind(self, grid: int, options: Options, /, **given: Any) -> Bound:
        """The launches of one compile key over ``grid`` programs; whoever keeps it vouches for the arguments' dtypes.

        ``given``: constants, and operands that are the same for all calls, are made at each (Made) or lie elsewhere (Path), by
        the kernel's names for them; it takes those that it has.

        Raises:
            TypeError: it has others beside them.
        """
        sources = {name: given.get(name, source) for name, source in self._sources.items()}
        missing = [name for name in self.constants if name not in given]
        missing += [name for name, source in sources.items() if source is Ellipsis]
        if missing:
            raise TypeError(f"{self.kernel.fn.__name__}: constants and operands that are missing: {missing}")
        constants = {name: given[name] for name in self.constants}
        family, variant = self.kernel.fn.__module__.split(".")[-2:]
        _note(Launch(family, variant, self.kernel.fn.__name__, grid, constants, options))
        return Bound(self, grid, tuple(constants.values()), options, sources)

    def launch(self, grid: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options) -> Any:
        """Launch once; return the compiled kernel if later launches with such arguments may call it directly."""
        if _recorder is not None:
            _recorder.append(CompileRequest(self, arguments, constants, options))
            return None
        arguments = tuple(map(_as_bytes, arguments))
        if INTERPRETED:
            self.kernel[(grid,)](*arguments, *constants, **_triton_options(options))
            return None
        with torch.cuda.device(arguments[0].device):
            handle = self.kernel[(grid,)](*arguments, *constants, **_triton_options(options))
        aligned = not any(pointer & 15 for pointer in _pointers(arguments[: self.num_aligned]))
        return handle if aligned and torch.version.hip is None else None


def variant_of(kernel: Any) -> str:
    """The variant that a kernel is of, which is called as it, and by what it does there."""
    name: str = kernel.fn.__name__
    return name.rpartition("_")[0]


class Bound(Call):
    """One launch, see ``Launcher.bind``. Operands are tensors, sequences of tensors, descriptors, numbers or None; the first is a
    tensor.
    """

    __slots__ = ("_constants", "_grid", "_handle", "_launcher", "_options", "_record", "_sources")

    def __init__(
        self,
        launcher: Launcher,
        grid: int,
        constants: tuple[Any, ...],
        options: Options,
        sources: Mapping[str, Any],
        record: Any = None,
    ) -> None:
        self.run = self._through_triton
        self._launcher = launcher
        self._grid = grid
        self._constants = constants
        self._options = options
        self._sources = sources
        self._record = record
        self._handle: Any = None

    def through(self, given: Any, **operands: Any) -> Call:
        sources = {name: operands.get(name, _through(source, given)) for name, source in self._sources.items()}
        return Bound(self._launcher, self._grid, self._constants, self._options, sources)

    def plain(self, record: Any) -> Call:
        return Bound(self._launcher, self._grid, self._constants, self._options, self._sources, record)

    def _through_triton(self, given: Any, scratch: Any = None) -> None:
        given = _named(given, self._record)
        found = [_found(source, given, scratch) for source in self._sources.values()]
        arguments: tuple[Any, ...] = tuple(tuple(each) if isinstance(each, list) else each for each in found)
        handle = self._launcher.launch(self._grid, arguments, self._constants, self._options)
        if handle is not None:
            self._handle = handle  # kept whole: Triton unloads the module when it dies
            run, fixed = _entry(handle)
            code = _Code(given, scratch)
            for place, (source, argument) in enumerate(zip(self._sources.values(), arguments, strict=True)):
                code.add(source, argument, place < self._launcher.num_aligned)
            make = _straight_line(*code.parts(), len(fixed), len(code.values), len(self._constants))
            device = arguments[0].get_device()
            self.run = make(self._through_triton, run, self._grid, device, *fixed, *code.values, *self._constants)


class _Code:
    """What a launch of its own Python does about its operands; ``values`` are passed to it once."""

    def __init__(self, given: Any, scratch: Any) -> None:
        self._lies_in = given, scratch
        self._lines: list[str] = []
        self._aligned: list[str] = []  # pointers
        self._passed: list[str] = []
        self.values: list[Any] = []

    def parts(self) -> tuple[tuple[str, ...], ...]:
        """Lines, pointers that have to be aligned, and what is passed to the kernel."""
        fields = _listed(f"given_{name}" for name in self._lies_in[0]._fields)
        return (f"{fields} = given", *self._lines), tuple(self._aligned), tuple(self._passed)

    def add(self, source: Any, argument: Any, aligned: bool) -> None:
        """An operand, which was ``argument`` when it was launched for the first time."""
        if isinstance(source, Made):
            self._passed.append(f"{self._value(source.make)}({self._value(source.of._seen)}({source.of._text}))")
        elif not isinstance(source, Path):
            self._passed.append(self._value(source))
        elif argument is None:  # and so in all calls that look alike
            self._passed.append("None")
        elif isinstance(argument, tuple):
            tensors = [f"t{len(self._passed)}_{i}" for i in range(len(argument))]
            self._lines.append(f"{_listed(tensors)} = {source._text}")
            self._passed.append(_listed([self._pointer(f"{tensor}.data_ptr()", True) for tensor in tensors]))
        elif isinstance(argument, torch.Tensor):
            away = source._away(*self._lies_in)
            self._passed.append(self._pointer(f"{source._text}.data_ptr(){f' + {away}' if away else ''}", aligned))
        else:  # a number
            self._passed.append(source._text)

    def _pointer(self, text: str, aligned: bool) -> str:
        if not aligned:
            return text
        name = f"p{len(self._aligned)}"
        self._lines.append(f"{name} = {text}")
        self._aligned.append(name)
        return name

    def _value(self, value: Any) -> str:
        self.values.append(value)
        return f"v{len(self.values) - 1}"


@functools.cache
def _straight_line(
    lines: tuple[str, ...], aligned: tuple[str, ...], passed: tuple[str, ...], num_fixed: int, num_values: int, num_constants: int
) -> Callable[..., Any]:
    """Makes launches of such operands, written out: loops over them would take as long again as all the rest.

    What it makes gives a call to ``slow`` where it is not what the compiled kernel was made for: Triton vectorises on 16-byte
    alignment.
    """
    counts = {"f": num_fixed, "v": num_values, "c": num_constants}
    fixed, values, constants = ([f"{letter}{i}" for i in range(count)] for letter, count in counts.items())
    source = f"""
def make(slow, run, grid, device, {", ".join(fixed + values + constants)}):
    def launch(given, scratch=None):
        if _recorder is not None or _launch_hooks.calls or device != _get_device():
            return slow(given, scratch)
        {"; ".join(lines) or "pass"}
        if ({" | ".join(aligned) or "0"}) & 15:
            return slow(given, scratch)
        run(grid, 1, 1, _get_stream(device), {", ".join([*fixed, *passed, *constants])})
    return launch
"""
    made: dict[str, Any] = {}
    exec(source, globals(), made)  # noqa: S102  (of names of declarations, and numbers)
    return made["make"]  # type: ignore[no-any-return]


def _listed(names: Iterable[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _entry(handle: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """What launches a compiled kernel, and its arguments between the stream and those of the kernel."""
    run, metadata = handle.run, handle.packed_metadata
    scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if triton.__version__.startswith("3.6.") and scratch == 0:
        # the C function that run() calls, without run()'s own microsecond
        flags = (run.launch_cooperative_grid, run.launch_pdl)
        return run.launch, (handle.function, *flags, None, None, metadata, None, None, None)
    return run, (handle.function, metadata, None, None, None)


def _pointers(arguments: tuple[Any, ...]) -> Iterator[int]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument.data_ptr()
        elif isinstance(argument, tuple):
            yield from _pointers(argument)


class Traits(NamedTuple):
    """What the choice of a schedule and its tiles asks of a device."""

    num_sms: int
    shared_memory: int  # bytes that one program may take
    pdl: bool  # programmatic dependent launch: NVIDIA, from sm_90 on
    e4m3: bool  # Triton has the type there: all but NVIDIA before sm_89
    full_warps: int  # a program of so many can have all registers of a multiprocessor: 8 on NVIDIA, 4 of twice the lanes on AMD
    warp_sums: int  # fp32 sums of a product that a warp has room for
    max_stages: int  # of a loop of products: on AMD, where loads in flight take registers, fewer
    mixed_pointers: bool  # a tile may be of pointers into several tensors: not on AMD, where Triton 3.6 fails to compile it
    target: str  # "sm_90", "gfx942"
    label: str  # what the device is called where tiles were measured on it; nothing off the GPU


# Bytes of shared memory by Triton target, for compilation without a GPU.
_SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536, "gfx950": 163840}


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of a device; where launches are only noted, on any."""
    return device.type == "cuda" or _recorder is not None or (INTERPRETED and device.type == "cpu")


def traits(device: torch.device) -> Traits:
    """The traits of a device; off the GPU, those of the target that is compiled for, with the multiprocessors of an H200."""
    if device.type != "cuda" and _stand_in is not None:
        device = _stand_in
    if device.type == "cuda":
        return _traits(device.index if device.index is not None else torch.cuda.current_device())
    if INTERPRETED:
        return Traits(132, _SHARED_MEMORY[90], False, True, *_room(90), "sm_90", "")
    target = triton.runtime.driver.active.get_current_target()
    nvidia = target.arch if target.backend == "cuda" else 0
    shared_memory, e4m3 = _SHARED_MEMORY.get(target.arch, 65536), nvidia == 0 or nvidia >= 89
    arch = f"sm_{nvidia}" if nvidia else target.arch
    return Traits(132, shared_memory, nvidia >= 90, e4m3, *_room(nvidia), arch, "")


@functools.cache
def _traits(index: int) -> Traits:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    shared_memory, sms = properties["max_shared_mem"], properties["multiprocessor_count"]
    label = device_label(torch.cuda.get_device_name(index))
    if torch.version.hip is not None:
        target = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        return Traits(sms, shared_memory, False, True, *_room(0), target, label)
    major, minor = torch.cuda.get_device_capability(index)
    nvidia = 10 * major + minor
    return Traits(sms, shared_memory, nvidia >= 90, nvidia >= 89, *_room(nvidia), f"sm_{nvidia}", label)


def _room(nvidia: int) -> tuple[int, int, int, bool]:
    """full_warps, warp_sums, max_stages and mixed_pointers; ``nvidia``: its architecture, 0 for others.

    Matrix units of sm_90 and sm_100 read shared memory; elsewhere what is multiplied takes registers beside the sums.
    """
    if nvidia == 0:
        return 4, 2048, 2, False
    return 8, 4096 if 90 <= nvidia < 120 else 2048, 6, True


def device_label(name: str) -> str:
    """What a device is called where tiles were measured on it: "h200" for "NVIDIA H200"."""
    words = "_".join("".join(c if c.isascii() and c.isalnum() else " " for c in name.lower()).split())
    return words.removeprefix("nvidia_").removeprefix("amd_")[:40]


# (schedule, tiles), the best of each kind of schedule first; tiles of None: those of the rule
Fastest = tuple[tuple[str, tuple[int, ...] | None], ...]


class Measured(NamedTuple):
    """What was fastest on one device, by problem."""

    label: str
    target: str
    num_sms: int
    shared_memory: int
    fastest: Mapping[tuple[Any, ...], Fastest]

    def distance(self, device: Traits) -> float | None:
        """How far ``device`` is from this one, 0 for itself; None: its tiles are not for it.

        Another device of the same architecture may take them if it has at most half as many multiprocessors again, or the
        other way round, as tiles share work out over them. No device takes tiles from one with more shared memory.
        """
        if self.shared_memory > device.shared_memory or self.target != device.target:
            return None
        if self.label == device.label:
            return 0.0
        ratio = max(self.num_sms, device.num_sms) / min(self.num_sms, device.num_sms)
        return ratio if ratio <= 1.5 else None


def measured(tables: Sequence[Measured], key: tuple[Any, ...], device: Traits) -> Fastest:
    """What is known to be fastest for a problem: on the device itself, else on the nearest that it was measured on."""
    near = [(away, table.label, table.fastest) for table in tables if (away := table.distance(device)) is not None]
    return next((known[key] for *_, known in sorted(near, key=lambda found: found[:2]) if key in known), ())


class Launch(NamedTuple):
    """One launch of a call, as it is made for all calls of its kind."""

    family: str
    variant: str  # its module in the family
    kernel: str
    grid: int  # programs
    constants: Mapping[str, Any]  # of the kernel by name, tiles among them
    options: Options


# Of the package: at DEBUG it tells the choices and the launches of each kind of call, when the first of the kind is made.
_log = logging.getLogger(__name__.rpartition(".")[0])
_launches: list[Launch] | None = None


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Inside, calls are bound anew, and the launches that they are bound to are noted in the list that is yielded, in their
    order: which variants serve a call, with which tiles. The calls run as ever.
    """
    global _launches
    previous, _launches = _launches, []
    _forget()
    try:
        yield _launches
    finally:
        _launches = previous
        _forget()


def _note(launch: Launch) -> None:
    if _launches is not None:
        _launches.append(launch)
    if _log.isEnabledFor(logging.DEBUG):
        tiles = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
        _log.debug("%s.%s: %s over %d programs, %s, %s", *launch[:4], tiles, launch.options)


class Choice(NamedTuple):
    """What a call took, of the tiles that there are for a problem."""

    key: Any  # a NamedTuple of its family
    schedule: str
    config: Any
    measured: bool  # rather than the rule's


_choices: list[Choice] | None = None
_forced: Mapping[tuple[type, Any], Fastest] = {}


@contextlib.contextmanager
def choosing(forced: Mapping[tuple[type, Any], Fastest]) -> Iterator[list[Choice]]:
    """Inside, calls are bound anew, and what they choose is noted in the list that is yielded. ``forced``: by the class of a
    key and the key, what is taken for it in place of what was measured; nothing leaves it to the rule. Tuning is built on this.
    """
    global _choices, _forced
    previous = _choices, _forced
    _choices, _forced = [], forced
    _forget()
    try:
        yield _choices
    finally:
        _choices, _forced = previous
        _forget()


Config = TypeVar("Config")


def taken_for(tables: Sequence[Measured], key: Any, device: Traits, other: Any = None) -> Fastest:
    """What is taken for a problem where it serves: what tuning forces, else what was measured for it, or for an ``other``."""
    return _forced.get((type(key), key), measured(tables, key, device) or measured(tables, other, device))


def choose(
    tables: Sequence[Measured],
    key: Any,
    device: Traits,
    configs: Mapping[str, Callable[..., Config]],
    rule: Callable[[str | None], tuple[str, Config]],
    serves: Callable[[str], bool] = lambda schedule: True,
    other: Any = None,
) -> tuple[str, Config]:
    """(schedule, tiles) for a problem: the fastest that is known for it, or else for an ``other`` one, and that serves the
    call; where there is none, what the rule says, of its own or for a schedule.
    """
    tiles: tuple[int, ...] | None = None
    for schedule, tiles in taken_for(tables, key, device, other):
        if serves(schedule):
            taken = rule(schedule) if tiles is None else (schedule, configs[schedule](*tiles))
            break
    else:
        taken, tiles = rule(None), None
    _log.debug("%s: %s %s for %s", "measured" if tiles is not None else "by the rule", *taken, key)
    if _choices is not None:
        _choices.append(Choice(key, *taken, tiles is not None))
    return taken


def describable(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: rows of whole 16 bytes, from a 16-byte boundary."""
    width = tensor.element_size()
    strides = tensor.stride()
    return strides[-1] == 1 and not any(s * width & 15 for s in strides[:-1]) and not tensor.data_ptr() & 15


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) for positive integers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for n <= 1)."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def block_rank(rank: int) -> int:
    """Ranks of a tile: the power of two that holds them, from 16, of which a matrix unit has no fewer, to 128."""
    return min(128, max(16, next_power_of_2(rank)))


def rank_tile(
    rank: int, rows: int, columns: int, parts: int, part_bytes: int, stages: int, device: torch.device
) -> tuple[int, int]:
    """(ranks at a time, stages of the pipeline over them) of a second product whose rank is above a tile.

    What a program holds must not grow with the rank. A stage is a tile of B and one of each part that the first product
    left; where two stages do not fit, because parts are many, there is no pipeline.
    """
    # Rows of a rank that is no multiple of 8 go through registers, as they are not aligned for copies to shared memory.
    wanted = 32 if rows == 128 or rank % 8 else 64
    budget = traits(device).shared_memory - 4096
    for tile, count in ((wanted, stages), (32, stages), (32, 2)):
        if count * tile * (2 * columns + part_bytes * rows * parts) <= budget:
            return tile, count
    return 32, 1


@final
class Caller(str):
    """The name of what the user called, with what its arguments are called there: for an op that is made of others."""

    labels: dict[str, str]

    def __new__(cls, name: str, **labels: str) -> Caller:
        caller = super().__new__(cls, name)
        caller.labels = labels
        return caller


def fail(variant: str, what: str, got: object, wanted: object, hint: str = "") -> NoReturn:
    """Raise the one form of error that launchers use.

    Raises:
        ValueError: always; the message names the variant, what was given, what was wanted and what to do.
    """
    if isinstance(variant, Caller):
        what = variant.labels.get(what, what)
    raise ValueError(f"{variant}: {what}: got {got}, wanted {wanted}" + (f"; {hint}" if hint else ""))


def check_tile(variant: str, name: str, tile: int, **wholes: int) -> None:
    """Raise ValueError where a tile, of a config that a caller brought, is no part of what it has to end with."""
    for whole, size in wholes.items():
        if size % tile:
            fail(variant, name, tile, f"a divisor of {whole} = {size}", "leave config out for the tiles of the rule")


def given(variant: str, config: Any, of: type) -> Any:
    """Tiles that a caller brought, or None.

    Raises:
        ValueError: they are of another kernel.
    """
    if config is not None and not isinstance(config, of):
        fail(variant, "config", type(config).__name__, f"a {of.__name__} of this module, or None")
    return config


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype, strides and device of a tensor, for an error message."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        return f"{list(tensor.shape)} {dtype} of layout {tensor.layout} on {tensor.device}"
    return f"{list(tensor.shape)} {dtype} with strides {list(tensor.stride())} on {tensor.device}"


_libraries: list[torch.library.Library] = []  # a Library undefines its ops when it dies


def op(schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Register ``function``, which mutates its arguments and returns nothing, as an op; return the op.

    The namespace is the path of the package, so that copies of it under other names live side by side.
    ``torch.compile`` sees the op as opaque; eager code calls the function itself, which is cheaper. No autograd.
    """
    namespace, name = __name__.rpartition(".")[0].replace(".", "_"), schema.split("(")[0]
    make: Any = torch.library.Library  # which has no annotations
    library = make(namespace, "FRAGMENT")
    library.define(schema)
    for key in ("CUDA", "CPU"):
        library.impl(name, function, key)
    library.impl(name, lambda *arguments: None, "Meta")
    _libraries.append(library)
    registered: Callable[..., None] = getattr(getattr(torch.ops, namespace), name).default
    return registered
