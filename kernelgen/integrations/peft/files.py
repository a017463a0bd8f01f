"""The two files of an adapter's folder, each opened once, so that nothing in it can hang or mislead, or change meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Mapping, NamedTuple

import torch

from .adapter import AdapterError

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_BESIDE = ("new_embeddings", "non_lora_trainables")  # of tokens that were added; of projectors that were trained with it
_LARGEST_CONFIG = 16 << 20  # bytes; a rank for each of 100 000 modules is less
_LARGEST_HEADER = 100_000_000  # bytes, that of safetensors
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class AdapterFiles(NamedTuple):
    """What a folder of an adapter would hold, in memory: as a trainer has it that changes an adapter while it is served."""

    config: Mapping[str, Any]  # of adapter_config.json: LoraConfig.to_dict() of PEFT
    tensors: Mapping[str, torch.Tensor]  # by the names of a file: get_peft_model_state_dict() of PEFT; on any device
    name: str = "adapter"


@contextlib.contextmanager
def opened(source: Path | AdapterFiles) -> Iterator[tuple[Mapping[str, Any], Tensors]]:
    """The configuration and the tensors of an adapter.

    Raises:
        AdapterError: they are something else, or not whole.
        FileNotFoundError: a file is not there.
    """
    if isinstance(source, AdapterFiles):
        yield source.config, _in_memory(source)
    else:
        config = read_config(source)
        with open_tensors(source) as tensors:
            yield config, tensors


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``: an object, no key twice.

    Raises:
        AdapterError: it is something else.
        FileNotFoundError: it is not there.
    """
    with _opened(folder / _CONFIG) as (file, size):
        if not 0 < size <= _LARGEST_CONFIG:
            raise AdapterError(f"{_CONFIG}: got {size} bytes, wanted 1 to {_LARGEST_CONFIG}")
        text = file.read(size)
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{_CONFIG}: {error}, wanted an object of JSON") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{_CONFIG}: got {type(config).__name__}, wanted an object")
    return config


class _TwiceError(ValueError):
    """A key twice in one object."""


class Tensors:
    """The tensors of an adapter by their names; one is read when it is asked for."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], get: Callable[[str], torch.Tensor]
    ) -> None:
        self.shapes = shapes
        self._dtypes = dtypes
        self._get = get

    def check_dtype(self, name: str) -> None:
        """Raises AdapterError unless its numbers are plain floating-point ones."""
        if (dtype := self._dtypes[name]) not in _FLOATS.values():
            why = ", without the scales that it needs" if dtype.startswith(("F8", "float8")) else ""
            raise AdapterError(f"{name}: got {dtype}{why}, wanted one of {', '.join(_FLOATS.values())}")

    def stored(self, name: str) -> torch.Tensor:
        """The tensor as it is, on the CPU."""
        return self._get(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as float32; raises AdapterError if a number of it is not finite in float32."""
        tensor = self._get(name).to(torch.float32)
        if not tensor.isfinite().all():
            raise AdapterError(f"{name}: got NaN or infinity (in float32), wanted finite numbers")
        return tensor


def _in_memory(source: AdapterFiles) -> Tensors:
    for what, kind in ((source.config, "configuration"), (source.tensors, "tensors")):
        if not isinstance(what, Mapping) or not all(isinstance(name, str) for name in what):
            raise AdapterError(f"{kind}: got {type(what).__name__}, wanted a mapping of names")
    for name, tensor in source.tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            looks = f", {tensor.layout}, on {tensor.device}" if isinstance(tensor, torch.Tensor) else ""
            raise AdapterError(
                f"{name}: got {type(tensor).__name__}{looks}, wanted a plain tensor with its numbers\n"
                "  hint: of a sharded one, full_tensor()"
            )
    dtypes = {name: _FLOATS.get(t.dtype, str(t.dtype).removeprefix("torch.")) for name, t in source.tensors.items()}
    shapes = {name: tuple(t.shape) for name, t in sorted(source.tensors.items())}
    # Copies: what was read stays as it is while a trainer goes on.
    return Tensors(shapes, dtypes, lambda name: source.tensors[name].detach().to("cpu", copy=True))


def _of_file(file: Any) -> Tensors:
    slices = {name: file.get_slice(name) for name in sorted(file.keys())}
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    return Tensors(shapes, {name: str(part.get_dtype()) for name, part in slices.items()}, file.get_tensor)


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """``adapter_model.safetensors``.

    Raises:
        AdapterError: it is no such file, or not the whole of it, or the folder has another kind of file.
        FileNotFoundError: there is none.
    """
    from safetensors import SafetensorError, safe_open

    if (folder / f"{_TENSORS}.index.json").exists():
        raise AdapterError(
            f"got {_TENSORS}.index.json, an adapter in shards, wanted one {_TENSORS}\n"
            "  hint: load it with PEFT and save it again"
        )
    for name in _BESIDE:
        if found := sorted(folder.glob(f"{name}.*")):
            raise AdapterError(
                f"got {found[0].name}, weights that go with the adapter, wanted {_TENSORS} alone\n"
                "  hint: put them into the base model and out of the folder"
            )
    if (folder / "adapter_model.bin").exists() and not (folder / _TENSORS).exists():
        raise AdapterError(
            f"got adapter_model.bin, a pickle, which runs code when it is read; wanted {_TENSORS}\n"
            "  hint: where you trust it, load it with PEFT and save it again"
        )
    with _opened(folder / _TENSORS) as (file, size):
        if not size:
            raise AdapterError(f"{_TENSORS}: got an empty file, wanted tensors")
        opened = Path(f"/dev/fd/{file.fileno()}")  # another name for this very file, where the system has such
        try:
            _check_header(file)
            with safe_open(str(opened if opened.exists() else folder / _TENSORS), framework="pt", device="cpu") as tensors:
                yield _of_file(tensors)
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{_TENSORS}: {error}, wanted a whole file of safetensors\n  hint: copy it again"
            ) from None


def _check_header(file: BinaryIO) -> None:
    """Of tensors that are named twice safetensors takes the last; all else it checks itself."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if length <= _LARGEST_HEADER else b""
    try:
        json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise AdapterError(f"{_TENSORS}: {error}, wanted each tensor once") from None
    except (ValueError, RecursionError):
        return


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file, and how many bytes it has.

    Raises:
        AdapterError: it is something else, or it changed while it was open.
        FileNotFoundError: it is not there.
    """
    try:
        handle = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, "not there, wanted what save_pretrained of PEFT writes", str(path)
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path.name}: {error}, wanted a file") from None
    before = os.fstat(handle)
    if not stat.S_ISREG(before.st_mode):
        os.close(handle)
        raise AdapterError(f"{path.name}: got a folder, pipe or device, wanted a regular file")
    with os.fdopen(handle, "rb") as file:
        try:
            yield file, before.st_size
        except OSError as error:
            raise AdapterError(f"{path.name}: {error}, wanted a file") from None
        after = os.fstat(handle)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise AdapterError(f"{path.name}: it changed while it was read, wanted a file that is done\n  hint: read it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise _TwiceError(f"got {twice!r} twice in one object")
    return result


def _no_number(text: str) -> None:
    raise ValueError(f"got {text}")
