"""From the tensors of one decoder layer to the factors of gate, up and down. The forms are those of ``keys``.

Which parameter a fused pair belongs to is told by its widths, (columns of ``lora_A``, rows of ``lora_B``):

| parameter | "in_out" | "out_in", as PEFT wrote it before 0.19.1 |
| --- | --- | --- |
| ``gate_up_proj`` | (H, 2I) | (2I, H) |
| ``down_proj`` | (I, H) | (H, I) |

No width of one parameter is one of the other, whatever H and I are, but where 2I = H or I = H a parameter has the same widths in
both orientations. It then has that of its sibling in the layer, whose widths differ. The version in the configuration says
nothing: a file that was loaded and saved again keeps the version that first wrote it.

Experts without a gate have ``up_proj``, (H, I), in the place of ``gate_up_proj``: its widths are those of ``down_proj`` in the
other orientation, so that this must be given, or ``target_parameters`` have one of the two alone.
"""

from __future__ import annotations

from typing import Mapping, NamedTuple, Sequence

import torch

from .adapter import AdapterError, ExpertShape, Factors
from .files import Tensors
from .keys import PARTS, Pair, Place
from .settings import Settings

ORIENTATIONS = ("in_out", "out_in")
NO_EXPERTS = ExpertShape(0, 0, 0)


class Found(NamedTuple):
    """The two factors of one module or parameter of routed experts."""

    target: str  # its name in the base model
    pair: Pair
    place: Place


class Reader(NamedTuple):
    """What the layers of one file are read with; ``orientation`` and ``layout`` as in ``read_adapter``."""

    tensors: Tensors
    settings: Settings
    shape: ExpertShape  # of no experts: ``NO_EXPERTS``
    orientation: str | None
    layout: str | None

    def layer(self, found: Sequence[Found]) -> dict[str, Factors]:
        """The factors of "gate", "up" and "down" of one layer, where it has any.

        Args:
            found: all that the file has for the routed experts of this layer.

        Raises:
            AdapterError: they do not fit together, or the experts.
        """
        first = found[0].place
        for one in found:
            if one.place.where != first.where:
                raise AdapterError(
                    f"layer {first.layer}: got experts in {first.where} and in {one.place.where}, wanted one of them\n"
                    f"  hint: prefix={first.where!r} reads the former, and names the latter in `other`"
                )
            if (one.place.form, one.place.naming) != (first.form, first.naming):
                raise AdapterError(
                    f"layer {first.layer}: got {found[0].target} beside {one.target}, two ways to write experts, wanted one"
                )
        found = self._without_gate(found)
        if not found:
            return {}
        read = {"fused": self._fused, "stacked": self._stacked}.get(first.form, self._single)
        parts = read(found)
        if "gate_up" not in parts:
            return parts
        if both := sorted(parts.keys() & {"gate", "up"}):
            raise AdapterError(
                f"layer {first.layer}: got gate and up as one, and {both[0]} alone, wanted one way"
            )
        a, b = parts.pop("gate_up")
        how = self.settings.gate_up_layout(self.layout, self.shape, in_lists=first.form == "listed")
        gate, up = b.chunk(2, dim=1) if how == "halves" else (b[:, ::2], b[:, 1::2])
        return {"gate": Factors(a, gate), "up": Factors(a, up), **parts}

    def linear(self, target: str, pair: Pair) -> Factors | None:
        """The factors of a linear layer or of an embedding; None: they are of something else, a convolution.

        Raises:
            AdapterError: they do not fit together, or the configuration.
        """
        (size_a, size_b), where = (self.tensors.shapes[name] for name in pair), pair.a
        if len(size_a) == len(size_b) > 2:
            return None
        if {len(size_a), len(size_b)} != {2} or 0 in (*size_a, *size_b):
            raise AdapterError(
                f"{where}: got lora_A {list(size_a)} and lora_B {list(size_b)}, wanted [r, in] and [out, r]\n"
                "  hint: what is empty or flat was sharded over GPUs (ZeRO-3, FSDP) when saved; gather it and save it again"
            )
        if size_a[0] != size_b[1]:
            raise AdapterError(f"{where}: got lora_A {list(size_a)} and lora_B {list(size_b)}, wanted [r, in] and [out, r]")
        name = self.settings.name_of(target)
        scaling = self._scaling(where, name, size_a[0])
        a, b = (self.tensors.read(factor) for factor in pair)
        return Factors(a, self._scaled(pair.b, b, scaling))

    def _fused(self, found: Sequence[Found]) -> dict[str, Factors]:
        parts: dict[str, Found] = {}
        fits: dict[str, list[str]] = {}
        for one in found:
            part, orientations = self._fit(one)
            if part in parts:
                raise AdapterError(
                    f"{one.pair.a}: got factors of {part}_proj twice, beside {parts[part].pair.a}, wanted one pair of them"
                )
            named = self.settings.target_parameters
            if named and f"{part}_proj" not in named:
                raise AdapterError(
                    f"{one.pair.a}: got the widths of {part}_proj, wanted those of {', '.join(sorted(named))} "
                    "(target_parameters)\n  hint: experts without a gate are an UngatedShape"
                )
            parts[part], fits[part] = one, orientations
        module = found[0].target.partition(".base_layer")[0]
        for part in self.shape.parameters:
            if part not in parts and self.settings.says(f"{module}.{part}_proj", parameter=True):
                raise _incomplete(f"{module}.{part}_proj", "target_parameters")
        orientation = self._orientation(found, fits)
        return {part: self._fused_factors(part, one, orientation) for part, one in parts.items()}

    def _fit(self, one: Found) -> tuple[str, list[str]]:
        """The parameter that a fused pair fits, and the orientations in which it does."""
        a, b = self.tensors.shapes[one.pair.a], self.tensors.shapes[one.pair.b]
        names = [f"{part}_proj" for part in self.shape.parameters]
        fits: dict[str, list[str]] = {}
        if len(a) == len(b) == 2 and a[0] == b[1] and a[0] % self.shape.num_experts == 0:
            for part in self.shape.parameters:
                wide, tall = self.shape.widths(part)
                sides = {"in_out": (wide, tall), "out_in": (tall, wide)}
                if some := [name for name in ORIENTATIONS if sides[name] == (a[1], b[0])]:
                    fits[part] = some
        if not fits:
            raise self._misfit(one, f"{' or '.join(names)}, [E * r, in] and [out, r * E]")
        if len(fits) > 1:  # experts without a gate
            named = self.settings.target_parameters
            given = {part: [name for name in some if name == self.orientation] for part, some in fits.items()}
            fits = {p: s for p, s in fits.items() if f"{p}_proj" in named} if len(named & {*names}) == 1 else given
            fits = {part: some for part, some in fits.items() if some}
        if len(fits) != 1:
            raise AdapterError(
                f"{one.pair.a}: got widths that fit {' and '.join(names)}, of experts without a gate, wanted "
                'orientation="in_out" (lora_A has the columns of the input) or "out_in" (before PEFT 0.19.1)'
                if self.shape.hidden != self.shape.intermediate
                else f"{one.pair.a}: got widths that fit {' and '.join(names)} in every orientation, wanted one of them alone, "
                "named in target_parameters"
            )
        return next(iter(fits.items()))

    @property
    def _parts(self) -> Mapping[str, str]:
        """What projections are; the first of those with numbers is up where there is no gate."""
        return PARTS if self.shape.gated else {**PARTS, "w1": "up", "w3": "gate"}

    def _without_gate(self, found: Sequence[Found]) -> list[Found]:
        """What is there for experts; those without a gate have an empty ``w3``, and ``w1`` is their up."""
        if self.shape.gated:
            return list(found)
        left = []
        for one in found:
            projection = one.target.rpartition(".")[2]
            place = one.place._replace(part=self._parts.get(projection, one.place.part))
            if projection == "w3" and all(0 in self.tensors.shapes[name] for name in one.pair):
                continue
            if place.part in ("gate", "gate_up"):
                raise AdapterError(f"{one.pair.a}: got factors of a gate, wanted none, as the experts have none (UngatedShape)")
            left.append(one._replace(place=place))
        return left

    def _orientation(self, found: Sequence[Found], fits: dict[str, list[str]]) -> str:
        sure = {part: names[0] for part, names in fits.items() if len(names) == 1}
        if len({*sure.values(), self.orientation} - {None}) > 1:
            raise AdapterError(
                f"layer {found[0].place.layer}: got "
                f"{' and '.join(f'{part}_proj of orientation {name}' for part, name in sure.items())}, "
                f"wanted {self.orientation or 'one for both'}"
            )
        if sure:
            return next(iter(sure.values()))
        if self.orientation is None:
            raise AdapterError(
                f"{found[0].pair.a}: got widths that fit both orientations, and no other parameter in the layer that tells, "
                'wanted orientation="in_out" (lora_A has the columns of the input) or "out_in" (before PEFT 0.19.1)'
            )
        return self.orientation

    def _fused_factors(self, part: str, one: Found, orientation: str) -> Factors:
        """One parameter; the expert is the slowest index of ``lora_A``, and the fastest of ``lora_B``."""
        parameter = f"{one.target.partition('.base_layer')[0]}.{part}_proj"
        a, b = (self.tensors.read(name) for name in one.pair)
        rank = a.shape[0] // self.shape.num_experts
        scaling = self._scaling(one.pair.a, parameter, rank)
        a = a.view(self.shape.num_experts, rank, a.shape[1])
        b = expert_fastest(b, self.shape.num_experts)
        if orientation == "out_in":
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return Factors(a, self._scaled(one.pair.b, b, scaling))

    def _stacked(self, found: Sequence[Found]) -> dict[str, Factors]:
        parts = {str(one.place.part): one for one in found}
        self._check_whole(found, parts)
        return {part: self._stack(one) for part, one in parts.items()}

    def _stack(self, one: Found) -> Factors:
        experts, part = self.shape.num_experts, str(one.place.part)
        wide, tall = self.shape.widths(part)
        sizes = [self.tensors.shapes[name] for name in one.pair]
        if all(0 in size for size in sizes):
            raise AdapterError(
                f"{one.pair.a}: got an empty tensor, which stands for a projection that the experts do not have; wanted "
                "experts with gate, up and down"
            )
        if not all(len(size) == 3 and size[0] in (1, experts) for size in sizes):
            raise self._misfit(one, f"[E, r, {wide}] and [E, {tall}, r], or 1 for E")
        (_, rank, width), (_, height, columns) = sizes
        if (width, height, columns) != (wide, tall, rank):
            raise self._misfit(one, f"[E, r, {wide}] and [E, {tall}, r], or 1 for E")
        scaling = self._scaling(one.pair.a, one.target, rank)
        a, b = (self.tensors.read(name) for name in one.pair)
        b = self._scaled(one.pair.b, b, scaling)
        return Factors(a.expand(experts, -1, -1), b.expand(experts, -1, -1))

    def _single(self, found: Sequence[Found]) -> dict[str, Factors]:
        """Experts that an adapter leaves out, and ranks below the largest, are zeros."""
        parts: dict[str, list[Found]] = {}
        for one in found:
            parts.setdefault(str(one.place.part), []).append(one)
        self._check_whole(found, parts)
        return {part: self._join(part, experts) for part, experts in parts.items()}

    def _check_whole(self, found: Sequence[Found], parts: Mapping[str, object]) -> None:
        """What the configuration names must be there, and of all experts, as where these were on several GPUs."""
        there, place = {one.target for one in found}, found[0].place
        module = found[0].target.rsplit(".", 1 if place.form == "stacked" else 2)[0]
        first = {"gate_up"} if "gate_up" in parts else {*self.shape.slices}
        experts = range(1 if place.form == "stacked" else self.shape.num_experts)
        for name, part in self._parts.items():
            if place.naming.endswith("w*") == name.startswith("w") and part in (*first, "down"):
                for expert in experts:
                    own = {"single": f"{expert}.{name}", "listed": f"{name}s.{expert}", "stacked": name}[place.form]
                    target = f"{module}.{own}"
                    if target not in there and self.settings.says(target, parameter=False):
                        raise _incomplete(target, "target_modules")

    def _join(self, part: str, found: Sequence[Found]) -> Factors:
        wide, tall = self.shape.widths(part)
        for one in found:
            size_a, size_b = (self.tensors.shapes[name] for name in one.pair)
            if len(size_a) != 2 or (size_a[1], size_b) != (wide, (tall, size_a[0])):
                raise self._misfit(one, f"[r, {wide}] and [{tall}, r]")
            if one.place.expert not in range(self.shape.num_experts):
                raise AdapterError(
                    f"{one.pair.a}: got expert {one.place.expert}, wanted one of {self.shape.num_experts}"
                )
        rank = max(self.tensors.shapes[one.pair.a][0] for one in found)
        a_all = torch.zeros(self.shape.num_experts, rank, wide)
        b_all = torch.zeros(self.shape.num_experts, tall, rank)
        for one in found:
            r = self.tensors.shapes[one.pair.a][0]
            scaling = self._scaling(one.pair.a, one.target, r)
            a, b = (self.tensors.read(name) for name in one.pair)
            a_all[one.place.expert, :r] = a
            b_all[one.place.expert, :, :r] = self._scaled(one.pair.b, b, scaling)
        return Factors(a_all, b_all)

    def _scaling(self, where: str, target: str, rank: int) -> float:
        if rank != (wanted := self.settings.rank_of(target)):
            raise AdapterError(
                f"{where}: got rank {rank}, wanted {wanted}, that of the configuration (r, rank_pattern)"
            )
        return self.settings.scaling_of(target, rank)

    def _scaled(self, where: str, b: torch.Tensor, scaling: float) -> torch.Tensor:
        scaled = b * scaling
        if not scaled.isfinite().all() or (scaling and b.any() and not scaled.any()):
            raise AdapterError(
                f"{where}: got a scaling of {scaling:g}, wanted one that float32 can hold times lora_B"
            )
        return scaled

    def _misfit(self, one: Found, wanted: str) -> AdapterError:
        a, b = (list(self.tensors.shapes[name]) for name in one.pair)
        return AdapterError(
            f"{one.pair.a}: got lora_A {a} and lora_B {b}, wanted {wanted}, of {self.shape}"
        )


def _incomplete(target: str, setting: str) -> AdapterError:
    return AdapterError(
        f"{target}: got no factors, wanted some, as {setting} names it and there are some of its layer\n"
        "  hint: the file may be a part of an adapter; if it is the whole, take the setting out of the configuration"
    )


def expert_fastest(b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[out, r * E] -> [E, out, r]."""
    return b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)
