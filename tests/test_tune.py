"""The tuner: its search, resuming, the time budget and its file, with fake timers; what needs a GPU is faked."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
import yaml

from kernelgen.core.diagnostics import Failure
from kernelgen.measure import suites
from kernelgen.measure.models import MODELS, Model
from kernelgen.measure.options import Duration
from kernelgen.measure.suites import fused_moe, layer, lora
from kernelgen.measure.suites.moe_lora import Cell as MoeCell
from kernelgen.measure.tune import hints, space, tuned_file
from kernelgen.measure.tune import problem as problems
from kernelgen.measure.tune.command import cells_of, families
from kernelgen.measure.tune.crew import Event, Processes
from kernelgen.measure.tune.jobs import CompileJob, Device, GaugeJob, Reading, Sizes, Verdict
from kernelgen.measure.tune.search import FINAL, Found, search
from kernelgen.measure.tune.space import Candidate
from kernelgen.measure.tune.state import State
from kernelgen.measure.tune.tuner import Tuner

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "specs" / "moe_lora.yaml"
SPACE = space.read(SPEC, "moe_lora")
HINTS = hints.of("moe_lora").hints
NAIVE = "small_batch"
QWEN = MODELS["qwen3-30b-a3b"]
RULES = {
    "one_shot": {
        "block_n": 128,
        "block_k": 128,
        "shrink_stages": 3,
        "expand_stages": 3,
        "num_warps": 4,
        "weight_policy": 0,
    },
    "small_batch": {
        "shrink_block_r": 16,
        "block_k": 256,
        "split_k": 512,
        "block_n": 128,
        "shrink_warps": 4,
        "expand_warps": 2,
        "weight_policy": 0,
        "pdl": 1,
    },
    "two_kernel": {
        "block_k": 128,
        "split_k": 2048,
        "shrink_stages": 3,
        "shrink_warps": 4,
        "block_n": 128,
        "expand_tiles": 3,
        "expand_stages": 2,
        "expand_warps": 4,
        "weight_policy": 0,
        "pdl": 1,
    },
}
DEVICE = Device("fake", "NVIDIA Fake", "sm_90", 132, 232448)
HEAD = {"device": "NVIDIA Fake", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0"}


def Cell(model: Model, site: Any, rank: int, tokens: int, **options: Any) -> MoeCell:
    return MoeCell(model=model, site=site, rank=rank, tokens=tokens, **options)


def problem_of(cell: MoeCell) -> problems.Problem:
    """As the package looks tiles up."""
    (p,) = cell.projections
    sizes = {"num_tokens": cell.tokens, "top_k": cell.model.top_k, "num_experts": cell.model.experts, "max_loras": cell.slots}
    layer = {"k": p.k, "n": p.n, "slices": p.slices, "rank": cell.rank, "weighted": p.weighted}
    scales = {"weight_scales": cell.quant, "x_scales": cell.act}
    facts = {"adds": cell.add, **{name: None if kind == "none" else kind for name, kind in scales.items()}}
    return problems.of_key({**sizes, **layer, **facts})


def sizes_of(block_m: int = 16) -> Sizes:
    return Sizes(232448, RULES, "one_shot", {"block_m": block_m})


def subject(cell: MoeCell) -> hints.Hints:
    return HINTS(problem_of(cell), SPACE, sizes_of())


def model_us(cell: MoeCell, schedule: str, config: dict[str, int]) -> float:
    """A smooth time with one optimum, at the first value of every second tunable and at the last of the others."""
    us = {"small_batch": 4.0, "one_shot": 12.0, "two_kernel": 14.0}[schedule]
    us += cell.tokens * {"small_batch": 0.9, "one_shot": 0.1, "two_kernel": 0.09}[schedule]
    for i, (tunable, value) in enumerate(config.items()):
        declared = SPACE.tunables[schedule][tunable]
        wanted = 0 if i % 2 else len(declared) - 1
        us *= 1.0 + 0.02 * abs(declared.index(value) - wanted)
    return us


class FakeKernels:
    """A kernel is its schedule and tiles."""

    def problems(self, cell: MoeCell) -> list[problems.Problem]:
        return [problem_of(cell)]

    def sizes(self, cell: MoeCell, problem: problems.Problem, schedules: tuple[str, ...]) -> Sizes:
        return sizes_of()

    def digests(self, cell: MoeCell, problem: problems.Problem, schedule: str, config: dict[str, int]) -> list[str]:
        whole = f"{schedule} {sorted(config.items())}"
        return [f"{whole} shrink", f"{whole} expand"] if schedule != "one_shot" else [whole]


class FakeCrew:
    """Does jobs when its events are asked for; each reply takes ``seconds`` of the clock."""

    def __init__(
        self, serve: Callable[[Any], Iterator[Any]], clock: Clock, seconds: float, size: int = 1
    ) -> None:
        self._serve, self._clock, self._seconds = serve, clock, seconds
        self._given: dict[int, Any] = {}
        self._readable, theirs = Pipe(duplex=False)
        theirs.send(0)  # there is always something to do
        self.hellos = ["fake"] * size
        self.jobs: list[Any] = []

    def idle(self) -> list[int]:
        return [i for i in range(len(self.hellos)) if i not in self._given]

    def give(self, member: int, job: Any) -> None:
        self._given[member] = job
        self.jobs.append(job)

    def waitables(self) -> list[Any]:
        return [self._readable]

    def events(self) -> list[Event]:
        given, self._given, told = self._given, {}, []
        for member, job in given.items():
            end = Event(member, "done")
            try:
                for reply in self._serve(job):
                    self._clock.now += self._seconds
                    told.append(Event(member, "reply", reply))
            except RuntimeError:
                end = Event(member, "died")
            told.append(end)
        return told

    def stop(self) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A tuner over fakes, and what it asked of them."""

    def __init__(
        self,
        folder: Path,
        cells: list[MoeCell],
        *,
        budget: float | None = None,
        fault: Callable[[CompileJob], str | None] = lambda job: None,
        read: Callable[[MoeCell, str, dict[str, int], int], Reading] | None = None,
        head: dict[str, str] = HEAD,
    ) -> None:
        self.out = folder / "tuned" / "moe_lora.yaml"
        self.clock = Clock()
        self.timed: list[tuple[MoeCell, str, dict[str, int], bool]] = []
        kernels = FakeKernels()

        def compile_job(job: CompileJob) -> Iterator[Verdict]:
            digests = kernels.digests(job.cell, job.problem, job.schedule, job.config)
            yield from (Verdict(digests[place], fault(job)) for place in job.wanted)

        def measure(job: GaugeJob) -> Iterator[Reading]:
            for place, (schedule, config) in enumerate(job.candidates):
                (cell,) = job.cells
                self.timed.append((cell, schedule, config, job.final))
                if read is not None:
                    yield read(cell, schedule, config, place)
                else:
                    yield Reading(place, model_us(cell, schedule, config))

        self.compilers = FakeCrew(compile_job, self.clock, 0.0, size=64)
        self.gauges = FakeCrew(measure, self.clock, 0.02)
        self.state = State(self.out.with_suffix(".state.jsonl"), SPACE, head)
        device, earlier = tuned_file.read(self.out, SPACE)
        assert device in (None, HEAD["device"])
        self.tuner = Tuner(
            HINTS,
            cells,
            SPACE,
            kernels,
            "sm_90",
            self.compilers,
            self.gauges,
            self.state,
            earlier,
            self.save,
            budget,
            clock=self.clock,
        )

    def save(self, entries: list[tuned_file.Entry]) -> None:
        versions = {name: HEAD[name] for name in ("torch", "triton", "cuda")}
        tuned_file.write(self.out, tuned_file.text("moe_lora", DEVICE, versions, entries, SPACE))

    def run(self) -> bool:
        complete = self.tuner.run()
        self.state.close()
        return complete

    @property
    def entries(self) -> list[tuned_file.Entry]:
        return list(tuned_file.read(self.out, SPACE)[1].values())


CELLS = [Cell(QWEN, site, 64, tokens) for site in ("w13", "w2") for tokens in (1, 32, 256)]


def load_family(folder: Path, tuned: Path) -> Any:
    from kernelgen.spec.load import load

    specs = folder / "specs"
    (specs / "tuned/h200").mkdir(parents=True, exist_ok=True)
    shutil.copy(SPEC.with_name(tuned.name), specs)
    shutil.copy(tuned, specs / "tuned/h200" / tuned.name)
    families, faults = load(specs)
    assert not faults, faults[0]
    return families[0]


# --- the space ------------------------------------------------------------------------------------------------------


def test_moves_are_single_steps() -> None:
    start = SPACE.near("two_kernel", RULES["two_kernel"])
    moves = list(SPACE.moves(start))
    assert len(set(moves)) == len(moves) and start not in moves
    for move in moves:
        assert SPACE.declares(move)
        changed = [
            i
            for i, pair in enumerate(zip(start.values, move.values, strict=True))
            if len(set(pair)) > 1
        ]
        assert len(changed) == 1
    pdl = list(SPACE.tunables["two_kernel"]).index("pdl")
    assert any(move.values[pdl] == 0 for move in moves)


def test_near_takes_declared_values() -> None:
    found = SPACE.near("small_batch", {**RULES["small_batch"], "split_k": 700, "block_n": 9999})
    named = SPACE.named(found)
    assert (named["split_k"], named["block_n"]) == (1024, 512)
    assert not SPACE.declares(Candidate("small_batch", (1, *found.values[1:])))
    assert not SPACE.declares(Candidate("nothing", found.values))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("family: other\ntunables: {}\n", "other"),
        ("family: moe_lora\n", "tunables"),
        ("[", "spec"),
        ("- 1", "spec"),
    ],
)
def test_bad_spec(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "moe_lora.yaml"
    path.write_text(text)
    with pytest.raises(Failure, match=says):
        space.read(path, "moe_lora")
    with pytest.raises(Failure, match="nowhere"):
        space.read(tmp_path / "nowhere.yaml", "moe_lora")


@pytest.mark.parametrize(
    ("schedule", "change", "tokens", "accepted"),
    [
        ("two_kernel", {}, 64, True),
        ("two_kernel", {"split_k": 4096}, 64, False),  # 2048 is K already
        ("two_kernel", {"split_k": 1024}, 64, True),
        ("two_kernel", {"split_k": 960}, 64, False),  # no multiple of block_k
        ("two_kernel", {"split_k": 256}, 4096, True),  # 8 parts of up to 4096 pairs have scratch
        ("two_kernel", {"split_k": 256}, 8, True),
        ("two_kernel", {"expand_tiles": 8}, 64, False),  # of 6
        ("two_kernel", {"block_k": 256, "shrink_stages": 4}, 64, True),
        ("one_shot", {"block_k": 256, "shrink_stages": 6}, 64, False),  # shared memory
        ("small_batch", {}, 64, True),
        ("small_batch", {}, 256, False),  # too many pairs
        ("small_batch", {"split_k": 64}, 1, False),  # less than a tile
        ("small_batch", {"split_k": 64, "block_k": 64}, 128, False),  # 32 parts of 1024 pairs
        ("small_batch", {"shrink_block_r": 32}, 1, True),
    ],
)
def test_what_makes_sense(
    schedule: str, change: dict[str, int], tokens: int, accepted: bool
) -> None:
    candidate = SPACE.near(schedule, {**RULES[schedule], **change})
    assert SPACE.named(candidate) == {**RULES[schedule], **change}
    cell = Cell(QWEN, "w13", 64, tokens)
    if (schedule, change.get("split_k"), tokens) == ("two_kernel", 256, 4096):
        assert not subject(cell).accepts(candidate)  # 32768 pairs: only whole rows
        cell = Cell(QWEN, "w13", 64, 512)
    assert subject(cell).accepts(candidate) is accepted


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
@pytest.mark.parametrize("rank", [8, 16, 64, 128, 200])
def test_every_cell_has_starts(model: Model, rank: int) -> None:
    for site in ("w13", "w2"):
        for tokens in (1, 16, 64, 4096):
            one = subject(Cell(model, site, rank, tokens))
            rules = {name: dict(RULES[name]) for name in SPACE.schedules}
            starts = one.starts(rules)
            assert starts and len(starts) < 40 and len(set(starts)) == len(starts)
            for candidate in starts:
                named = SPACE.named(candidate)
                assert one.accepts(candidate) or named == rules[candidate.schedule]


# --- the search -----------------------------------------------------------------------------------------------------


def run_search(
    cell: Cell, us: Callable[[str, dict[str, int]], float | None], hurry: Callable[[], bool]
) -> tuple[Found, list[Any]]:
    found, asks = Found(), []
    one = subject(cell)
    coroutine = search(
        SPACE,
        found,
        one.starts(RULES),
        sensible=one.accepts,
        neighbours=lambda: (),
        kinds=HINTS.KINDS,
        hurry=hurry,
    )
    ask = next(coroutine)
    while True:
        asks.append(ask)
        times = {c: us(c.schedule, SPACE.named(c)) for c in ask.candidates}
        try:
            ask = coroutine.send(times)
        except StopIteration:
            return found, asks


def test_search_descends_to_the_optimum() -> None:
    cell = Cell(QWEN, "w13", 64, 256)
    found, asks = run_search(cell, lambda s, c: model_us(cell, s, c), lambda: False)
    (us, best), *_ = found.ranking()
    one = subject(cell)
    assert all(
        model_us(cell, move.schedule, SPACE.named(move)) > us * 0.98
        for move in SPACE.moves(best)
        if one.accepts(move)
    )
    first = min(
        us for us in (model_us(cell, c.schedule, SPACE.named(c)) for c in asks[0].candidates)
    )
    assert us < 0.9 * first
    assert asks[-1].round == FINAL and len(asks[-1].candidates) >= 3
    seen = [c for ask in asks[:-1] for c in ask.candidates]
    assert len(set(seen)) == len(seen)  # nothing is measured twice but in the end


def test_search_in_a_hurry_goes_to_the_end() -> None:
    cell = Cell(QWEN, "w13", 64, 32)
    found, asks = run_search(cell, lambda s, c: model_us(cell, s, c), lambda: True)
    assert [ask.round for ask in asks] == [1, FINAL]
    kinds = {c.schedule == NAIVE for c in found.final}
    assert kinds == {True, False}  # the best of each kind is timed in the end


def test_search_where_nothing_works() -> None:
    found, asks = run_search(Cell(QWEN, "w13", 64, 1), lambda s, c: None, lambda: False)
    assert [ask.round for ask in asks] == [1] and found.ranking() == []


def test_a_rough_time_is_worth_less() -> None:
    a, b = (SPACE.near("one_shot", {**RULES["one_shot"], "num_warps": n}) for n in (2, 4))
    found = Found({a: 9.95, b: 12.0}, {b: 10.0})
    assert found.best(1) == [b] and found.us(b) == 10.0
    found.rough[a] = 9.8
    assert found.ranking()[0] == (9.8, a)


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_file_comes_back_through_the_loader(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CELLS)
    assert bench.run()
    family = load_family(tmp_path, bench.out)
    assert family.tuned[0].device.name == HEAD["device"]
    assert dict(family.tuned[0].versions)["cuda"] == "13.0"  # a text, though it looks like a number
    assert len(family.tuned[0].entries) == len(CELLS)
    by_problem = {tuple(e.problem.items()): e for e in bench.entries}
    for read in family.tuned[0].entries:
        entry = by_problem[tuple(read.problem)]
        assert (read.schedule, read.config.values) == entry.best.candidate
        assert read.best.us == round(entry.best.us, 2)
        naive = read.schedule == NAIVE
        assert read.runner_up is not None and read.runner_up.schedule != read.schedule
        if dict(read.problem)["num_tokens"] < 256:
            assert (read.runner_up.schedule == NAIVE) != naive
    schedules = {dict(e.problem)["num_tokens"]: e.schedule for e in family.tuned[0].entries}
    assert schedules[1] == "small_batch" and schedules[256] in ("one_shot", "two_kernel")
    losses = bench.tuner.losses()
    assert len(losses) == len(CELLS) and all(loss.rule_us >= loss.best_us for loss in losses)


def test_same_times_give_the_same_bytes(tmp_path: Path) -> None:
    texts = set()
    for number, cells in enumerate((CELLS, CELLS[::-1])):
        bench = Bench(tmp_path / str(number), cells)
        bench.run()
        texts.add(len(bench.entries))
        shown = bench.out.read_text()
        tokens = [line for line in shown.splitlines() if "problem:" in line]
        texts.add("\n".join(tokens))
    assert len(texts) == 2
    again = Bench(tmp_path / "2", CELLS)
    again.run()
    assert again.out.read_bytes() == (tmp_path / "0/tuned/moe_lora.yaml").read_bytes()


def test_resume_measures_nothing_again(tmp_path: Path) -> None:
    first = Bench(tmp_path, CELLS)
    first.run()
    text, state = first.out.read_bytes(), first.out.with_suffix(".state.jsonl")
    first.out.unlink()
    with state.open("a") as file:
        file.write('{"problem": {"num_')  # a kill in the middle of a line
    again = Bench(tmp_path, CELLS)
    assert again.run() and again.timed == [] and again.compilers.jobs == []
    assert again.out.read_bytes() == text
    for line in state.read_text().splitlines():
        json.loads(line)
    more = Bench(tmp_path, [*CELLS, Cell(QWEN, "w13", 64, 2)])
    assert more.run()
    rough = [(cell, s, tuple(c.items())) for cell, s, c, final in more.timed if not final]
    before = {(cell, s, tuple(c.items())) for cell, s, c, final in first.timed if not final}
    assert rough and not before & set(rough)  # but what neighbours suggest
    assert len(more.entries) == len(CELLS) + 1


def test_resume_on_another_device(tmp_path: Path) -> None:
    Bench(tmp_path, CELLS[:1]).run()
    with pytest.raises(Failure, match="NVIDIA Other"):
        Bench(tmp_path, CELLS, head={**HEAD, "device": "NVIDIA Other"})
    state = tmp_path / "tuned" / "moe_lora.state.jsonl"
    state.write_text("nonsense\n")
    with pytest.raises(Failure, match="not a state"):
        Bench(tmp_path, CELLS)


def test_problems_of_the_file_stay(tmp_path: Path) -> None:
    first = Bench(tmp_path, CELLS[:2])
    first.run()
    first.out.with_suffix(".state.jsonl").unlink()
    before = {tuple(e.problem.items()): e for e in first.entries}
    then = Bench(tmp_path, CELLS[1:3])
    then.run()
    after = {tuple(e.problem.items()): e for e in then.entries}
    assert len(after) == 3 and before.keys() <= after.keys()
    known = before[tuple(problem_of(CELLS[1]).items())].best.candidate
    start = next((s, c) for cell, s, c, _ in then.timed if cell == CELLS[1])
    assert start == (known.schedule, SPACE.named(known))  # where the search begins


@pytest.mark.parametrize("budget", [0.5, 3.0, 12.0])
def test_budget(tmp_path: Path, budget: float) -> None:
    bench = Bench(tmp_path, CELLS, budget=budget)
    began = bench.clock.now
    complete = bench.run()
    assert not complete and bench.clock.now - began <= budget + 1.0  # a batch is not cut
    status = bench.tuner.status()
    assert status.timed == len(bench.entries) >= (1 if budget < 3 else len(CELLS))
    if budget >= 12:
        assert any(final for *_, final in bench.timed)
    load_family(tmp_path, bench.out)
    best = {tuple(e.problem.items()): e.best.us for e in bench.entries}
    rest = Bench(tmp_path, CELLS)
    assert rest.run()
    for entry in rest.entries:
        assert entry.best.us <= best.get(tuple(entry.problem.items()), 1e9) * 1.01


def test_wrong_and_spilling_candidates_never_win(tmp_path: Path) -> None:
    def fault(job: CompileJob) -> str | None:
        return "spills 8 bytes" if job.config.get("num_warps") == 2 else None

    def read(cell: MoeCell, schedule: str, config: dict[str, int], place: int) -> Reading:
        if config["block_n"] == 64:
            return Reading(place, None, "WrongResult: relative error 1")
        return Reading(place, 1.0 + zlib.crc32(repr(config).encode()) % 1000 / 100)

    bench = Bench(tmp_path, CELLS, fault=fault, read=read)
    bench.run()
    assert bench.tuner.status().dropped > 0
    assert all(config.get("num_warps") != 2 for _, _, config, _ in bench.timed)
    for entry in bench.entries:
        for choice in (entry.best, entry.runner_up):
            assert choice is not None
            named = SPACE.named(choice.candidate)
            assert named["block_n"] != 64 and named.get("num_warps") != 2
    failed = [
        line["failed"]
        for line in map(json.loads, bench.out.with_suffix(".state.jsonl").read_text().splitlines())
        if "failed" in line
    ]
    assert {"spills 8 bytes", "WrongResult: relative error 1"} == set(failed)


def test_a_dying_gauge_loses_one_candidate(tmp_path: Path) -> None:
    killer: list[str] = []

    def read(cell: MoeCell, schedule: str, config: dict[str, int], place: int) -> Reading:
        if place == 3 and not killer:
            killer.append(repr((cell, schedule, config)))
            raise RuntimeError("the process is gone")
        assert repr((cell, schedule, config)) not in killer
        return Reading(place, model_us(cell, schedule, config))

    bench = Bench(tmp_path, CELLS, read=read)
    assert bench.run() and len(bench.entries) == len(CELLS)
    assert "the process ended" in bench.out.with_suffix(".state.jsonl").read_text()


def test_neighbours_are_tried(tmp_path: Path) -> None:
    """What is far from the start of one problem and best for another is found through the neighbour."""
    target = SPACE.near("one_shot", {**RULES["one_shot"], "block_k": 32, "expand_stages": 2})
    hidden = dict(SPACE.named(target), num_warps=8, shrink_stages=2)

    def read(cell: MoeCell, schedule: str, config: dict[str, int], place: int) -> Reading:
        if schedule == "one_shot" and config == hidden:
            return Reading(place, 1.0)
        return Reading(place, 10.0 if cell.tokens == 512 else model_us(cell, schedule, config))

    first = Bench(tmp_path, [Cell(QWEN, "w13", 64, 256)])
    first.run()
    best = Candidate("one_shot", tuple(hidden.values()))
    entry = tuned_file.Entry(problem_of(Cell(QWEN, "w13", 64, 256)), tuned_file.Choice(best, 1.0), None)  # fmt: skip
    first.save([entry])
    first.out.with_suffix(".state.jsonl").unlink()
    bench = Bench(tmp_path, [Cell(QWEN, "w13", 64, t) for t in (256, 512)], read=read)
    bench.run()
    assert all(e.best.candidate == best for e in bench.entries)


def test_as_many_problems_as_a_file_may_hold(tmp_path: Path) -> None:
    big = tuned_file.Choice(SPACE.near("two_kernel", RULES["two_kernel"]), 123.456)
    small = tuned_file.Choice(SPACE.near("small_batch", RULES["small_batch"]), 7.0)

    def entries(count: int) -> list[tuned_file.Entry]:
        cells = [Cell(QWEN, "w13", 1 + i % 128, 1 + i // 128) for i in range(count)]
        return [tuned_file.Entry(problem_of(cell), big, small) for cell in cells]

    text = tuned_file.text("moe_lora", DEVICE, {"torch": "1"}, entries(700), SPACE)
    path = tmp_path / "moe_lora.yaml"
    tuned_file.write(path, text)
    assert len(load_family(tmp_path, path).tuned[0].entries) == 700
    with pytest.raises(Failure, match="too many"):
        tuned_file.text("moe_lora", DEVICE, {"torch": "1"}, entries(1000), SPACE)


def test_add_and_set_and_fp8_are_problems_of_their_own(tmp_path: Path) -> None:
    cell = Cell(QWEN, "w13", 64, 256)
    kinds: list[dict[str, Any]] = [
        {},
        {"add": False},
        {"quant": "channel"},
        {"quant": "channel", "act": "token"},
    ]
    bench = Bench(tmp_path, [dataclasses.replace(cell, **kind) for kind in kinds])
    bench.run()
    again = load_family(tmp_path, bench.out)
    tags = {tuple(map(str, entry.tags.values)) for entry in again.tuned[0].entries}
    assert tags == {
        ("add", "none", "none"),
        ("set", "none", "none"),
        ("add", "w8channel", "none"),
        ("add", "w8channel", "a8token"),
    }
    others = bench.entries[1:]
    resumed = Bench(tmp_path, [cell])
    resumed.run()
    assert resumed.entries[1:] == others


def test_tiles_of_groups_lie_in_one_group() -> None:
    groups = subject(Cell(QWEN, "w13", 64, 256, quant="group"))
    wide = SPACE.near("one_shot", {**RULES["one_shot"], "block_k": 256, "shrink_stages": 2})
    assert not groups.accepts(wide)
    assert subject(Cell(QWEN, "w13", 64, 256, quant="channel")).accepts(wide)
    assert groups.accepts(SPACE.near("one_shot", {**RULES["one_shot"], "block_k": 128}))


def test_stale_entries_are_left_out(tmp_path: Path) -> None:
    Bench(tmp_path, CELLS[:2]).run()
    path = tmp_path / "tuned" / "moe_lora.yaml"
    text = path.read_text()
    path.write_text(re.sub("shrink_block_r: [0-9]+", "shrink_block_r: 4", text))
    assert len(tuned_file.read(path, SPACE)[1]) < 2
    path.write_text("entries: 3")
    with pytest.raises(Failure, match=r"moe_lora\.yaml"):
        tuned_file.read(path, SPACE)


# --- processes ------------------------------------------------------------------------------------------------------


def echo(greeting: str) -> tuple[str, Callable[[Any], Iterator[Any]]]:
    """A member of a crew: replies with its environment, dies of "die", raises on "raise"."""

    def serve(job: str) -> Iterator[str]:
        yield f"{job} {os.environ.get('FAKE_DEVICE')}"
        if job == "die":
            os._exit(3)
        if job == "raise":
            raise ValueError("of this")

    return greeting, serve


def broken() -> Any:
    raise OSError("no GPU")


def collect(crew: Processes, until: str) -> list[Event]:
    import multiprocessing.connection as connection

    events: list[Event] = []
    while not any(event.kind == until for event in events):
        assert connection.wait(crew.waitables(), timeout=60)
        events += crew.events()
    return events


def test_crew() -> None:
    crew = Processes(echo, ("hi",), [{"FAKE_DEVICE": "0"}, {"FAKE_DEVICE": "1"}])
    try:
        assert crew.started() == ["hi", "hi"] and crew.idle() == [0, 1]
        crew.give(1, "work")
        assert crew.idle() == [0]
        assert collect(crew, "done") == [Event(1, "reply", "work 1"), Event(1, "done")]
        crew.give(0, "die")
        assert collect(crew, "died") == [Event(0, "reply", "die 0"), Event(0, "died")]
        assert crew.idle() == [1]
        crew.started()
        crew.give(0, "work")
        assert Event(0, "reply", "work 0") in collect(crew, "done")
        crew.give(0, "raise")
        with pytest.raises(Failure, match="of this"):
            collect(crew, "done")
    finally:
        crew.stop()
    assert "FAKE_DEVICE" not in os.environ


def test_crew_that_cannot_start() -> None:
    crew = Processes(broken, (), [{}])
    try:
        with pytest.raises(Failure, match="no GPU"):
            crew.started()
    finally:
        crew.stop()


# --- dense LoRA -----------------------------------------------------------------------------------------------------


def _dense(site: str, rank: int, tokens: int, quant: Any = "none") -> lora.Cell:
    return lora.Cell(model="llama-3-8b", site=site, rank=rank, tokens=tokens, quant=quant)


def _dense_problem(name: str, cell: lora.Cell) -> problems.Problem:
    widths, scales = cell.layer.widths, None if cell.quant == "none" else cell.quant
    key: dict[str, Any] = {"num_tokens": cell.tokens, "max_loras": cell.slots, "k": cell.layer.k}
    if name == "lora_expand":
        key |= {"n": sum(widths), "n_min": min(widths)}
    key |= {"slices": len(widths), "rank": cell.rank}
    key |= {"adds": True} if name == "lora_expand" else {}
    key["weight_scales"] = scales
    return problems.of_key(key if name == "lora_expand" else {**key, "x_scales": None})


def _product(name: str, cell: lora.Cell, rule: dict[str, int], block_m: int = 64) -> hints.Hints:
    sizes = Sizes(232448, {name: rule}, name, {"block_m": block_m})
    return hints.of(name).hints(_dense_problem(name, cell), space.read(SPEC.with_name(f"{name}.yaml"), name), sizes)


SHRINK_RULE = {
    "rows": 32,
    "ranks": 64,
    "block_k": 64,
    "chunk_k": 896,
    "parts": 1,
    "together": 1,
    "stages": 4,
    "num_warps": 4,
    "weight_policy": 0,
}
EXPAND_RULE = {"rows": 32, "block_n": 128, "tiles": 2, "stages": 3, "num_warps": 4, "weight_policy": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scales", "change", "wanted"),
    [
        ("lora_shrink", None, {}, True),
        ("lora_shrink", None, {"parts": 2}, True),
        ("lora_shrink", None, {"chunk_k": 1024}, False),  # part of the numbers
        ("lora_shrink", None, {"block_k": 256}, False),  # a tile in two chunks
        ("lora_shrink", None, {"together": 0}, False),  # of one slice there is nothing to tell
        ("lora_shrink", None, {"ranks": 128}, False),  # of 64
        ("lora_shrink", None, {"rows": 128}, False),
        ("lora_shrink", "channel", {"parts": 0}, False),  # scales round a part
        ("lora_shrink", "channel", {"rows": 64}, False),
        ("lora_shrink", "group", {"block_k": 32}, False),  # the order of groups
        ("lora_expand", None, {}, True),
        ("lora_expand", None, {"rows": 64}, True),
        ("lora_expand", "channel", {"rows": 64}, False),
        ("lora_expand", None, {"rows": 128}, False),  # a block has 64
        ("lora_expand", None, {"tiles": 1}, False),  # as with two stages
        ("lora_expand", None, {"tiles": 1, "stages": 2}, True),
    ],
)
def test_tiles_of_dense_lora(name: str, scales: Any, change: dict[str, int], wanted: bool) -> None:
    rule = SHRINK_RULE if name == "lora_shrink" else EXPAND_RULE
    subject = _product(name, _dense("down", 64, 256, scales or "none"), rule)
    assert subject.accepts(subject.space.near(name, {**rule, **change})) is wanted
    starts = subject.starts({name: rule})
    assert subject.space.named(starts[0]) == rule and len(starts) > 3
    assert all(map(subject.accepts, starts))


def test_a_chunk_that_the_spec_does_not_have_is_not_searched_around() -> None:
    """Another chunk would give other bits."""
    rule = {**SHRINK_RULE, "chunk_k": 100}
    subject = _product("lora_shrink", _dense("down", 64, 256), rule)
    assert subject.starts({"lora_shrink": rule}) == []


def test_keys_become_problems_and_tags() -> None:
    """What stands for the first tag of an axis is left out, and sizes keep their order."""
    cell = _dense("qkv", 64, 256, "group")
    batch, rest = {"num_tokens": 256, "max_loras": 4}, {"slices": 3, "rank": 64, "weight_quant": "w8group"}
    assert _dense_problem("lora_shrink", cell) == {**batch, "k": 4096, **rest}
    assert _dense_problem("lora_expand", cell) == {**batch, "k": 4096, "n": 6144, "n_min": 1024, **rest}
    assert list(problem_of(Cell(QWEN, "w13", 64, 2, add=False)))[-2:] == ["weighted", "add_inputs"]


def test_a_tuned_file_of_dense_lora(tmp_path: Path) -> None:
    """It is read again, by the search and by the build, as it was written."""
    searched = space.read(SPEC.with_name("lora_shrink.yaml"), "lora_shrink")
    cells = [_dense("qkv", rank, 256, "group") for rank in (64, 16)]
    best = tuned_file.Choice(searched.near("lora_shrink", {**SHRINK_RULE, "chunk_k": 512}), 5.0)
    entries = [tuned_file.Entry(_dense_problem("lora_shrink", cell), best, None) for cell in cells]
    path = tmp_path / "tuned" / "lora_shrink.yaml"
    tuned_file.write(path, tuned_file.text("lora_shrink", DEVICE, {"torch": "1"}, entries, searched))
    assert list(tuned_file.read(path, searched)[1].values()) == entries[::-1]
    read = load_family(tmp_path, path).tuned[0].entries
    assert [dict(e.problem)["rank"] for e in read] == [16, 64] and read[0].facts.weight_scales == "group"


# --- the real parts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_are_compiled_and_judged(tmp_path: Path) -> None:
    """For sm_90, without a GPU, in a process that does not interpret."""
    pytest.importorskip("triton")
    code = """
import json, sys
from pathlib import Path
from kernelgen.measure.models import MODELS
from kernelgen.measure.suites import lora, moe_lora
from kernelgen.measure.tune import space
from kernelgen.measure.tune.jobs import CompileJob
from kernelgen.measure.tune.kernels import Kernels

searched = space.read(Path("specs/moe_lora.yaml"), "moe_lora")
kernels = Kernels("moe_lora", "moe_lora", Path("generated"), "sm_90")

def cell(tokens, **options):
    return moe_lora.Cell(model=MODELS["qwen3-30b-a3b"], site="w13", rank=128, tokens=tokens, **options)

def digests(cell, schedule, tiles):
    (problem,) = kernels.problems(cell)
    return kernels.digests(cell, problem, schedule, tiles)

(problem,) = kernels.problems(cell(64))
sizes = kernels.sizes(cell(64), problem, searched.schedules)
rules = {s: searched.near(s, sizes.rules[s]) for s in sizes.rules}
for schedule, rule in rules.items():
    named = searched.named(rule)
    own = digests(cell(64), schedule, named)
    assert len(own) == (1 if schedule == "one_shot" else 2)
    assert digests(cell(32), schedule, named) == own  # the same block size: the number of tokens is no part of a kernel
eight = cell(64, quant="channel", act="token")
(of_eight,) = kernels.problems(eight)
assert of_eight == {**problem, "weight_quant": "w8channel", "act_quant": "a8token"}
assert kernels.problems(cell(64, dtype="f16", quant="channel")) == []  # there is no such variant
assert digests(eight, "one_shot", searched.named(rules["one_shot"]))[0] not in own
layer = lora.Cell(model="llama-3-8b", site="qkv", rank=64, tokens=4096)
for name in ("lora_shrink", "lora_expand"):
    dense = Kernels("lora", name, Path("generated"), "sm_90")
    (of_layer,) = dense.problems(layer)
    rule = dense.sizes(layer, of_layer, (name,)).rules[name]
    own, other = (dense.digests(layer, of_layer, name, {**rule, "num_warps": warps}) for warps in (4, 8))
    assert len(own) > 1 and len(set(own) - set(other)) == 1  # the tiles of one product
found = []
huge = {**searched.named(rules["one_shot"]), "block_k": 256, "shrink_stages": 6, "block_n": 256}
for config in (searched.named(rules["one_shot"]), huge):
    job = CompileJob("sm_90", cell(64), problem, "one_shot", config, (0,))
    found += [verdict.fault for verdict in kernels.compile(job)]
print(json.dumps([sizes.facts, sizes.rule, found]))
"""
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert shown.returncode == 0, shown.stderr
    facts, rule, (fit, fault) = json.loads(shown.stdout)
    assert facts == {"block_m": 16} and rule in SPACE.schedules
    assert fit is None and "shared memory" in fault


_TWO_KERNEL = {**RULES["two_kernel"], "block_k": 64, "expand_tiles": 1}
_SHRINK = {**SHRINK_RULE, "ranks": 16, "chunk_k": 512, "together": 0}
_EXPAND = {**EXPAND_RULE, "block_n": 64, "tiles": 1}
# family -> (cells that have one problem, right candidates, one that is refused, how, and right tiles of what then does nothing)
_LAYER = {"model": MODELS["tiny"], "tokens": 16}
_GEMM = {"block_n": 32, "block_k": 64, "num_stages": 2, "num_warps": 4, "group_m": 1, "tail": 0}
GAUGED: dict[str, tuple[Any, ...]] = {
    "moe_gemm": (
        [fused_moe.Cell(site="w13", **_LAYER)],
        [("tile", _GEMM), ("tile", {**_GEMM, "group_m": 4})],
        ("tile", {**_GEMM, "block_k": 96}),
        "(Value|Interpreter)Error",
        ("tile", {**_GEMM, "block_n": 64}),
    ),
    "moe_sum": (
        [fused_moe.Cell(site="sum", **_LAYER)],
        [("moe_sum", {"block_n": 128, "num_warps": 2})],
        ("moe_sum", {"block_n": 100, "num_warps": 2}),
        "(Value|Interpreter)Error",
        ("moe_sum", {"block_n": 256, "num_warps": 2}),
    ),
    "moe_add": (
        [layer.Cell(site="w13", rank=16, **_LAYER)],
        [("moe_add", {"block_n": 128, "num_warps": 2})],
        ("moe_add", {"block_n": 100, "num_warps": 2}),
        "(Value|Interpreter)Error",
        ("moe_add", {"block_n": 256, "num_warps": 2}),
    ),
    "moe_lora_expand": (
        [Cell(MODELS["tiny"], "w2", 16, 1)],
        [("pairs", {"block_n": 64, "num_warps": 2, "weight_policy": 0})],
        ("pairs", {"block_n": 48, "num_warps": 2, "weight_policy": 0}),
        "(Value|Interpreter)Error",
        ("pairs", {"block_n": 32, "num_warps": 2, "weight_policy": 1}),
    ),
    "moe_lora": (
        [Cell(MODELS["tiny"], "w13", 16, 16, dtype="f16")],
        [
            ("small_batch", {**RULES["small_batch"], "block_k": 64, "split_k": 128}),
            ("one_shot", {**RULES["one_shot"], "block_k": 64}),
            ("two_kernel", {**_TWO_KERNEL, "split_k": 256}),
        ],
        ("two_kernel", {**_TWO_KERNEL, "split_k": 96}),
        "ValueError: .*block_k",
        ("two_kernel", {**_TWO_KERNEL, "split_k": 256, "expand_tiles": 2}),
    ),
    "lora_shrink": (
        [lora.Cell(model="tiny", site="qkv", rank=16, tokens=4, active=active) for active in (4, 1)],
        [("lora_shrink", _SHRINK)],
        ("lora_shrink", {**_SHRINK, "block_k": 96}),
        "(Value|Interpreter)Error",
        ("lora_shrink", {**_SHRINK, "weight_policy": 1}),
    ),
    "lora_expand": (
        [lora.Cell(model="tiny", site="qkv", rank=16, tokens=4, active=active) for active in (4, 1)],
        [("lora_expand", _EXPAND)],
        ("lora_expand", {**_EXPAND, "block_n": 48}),
        "(Value|Interpreter)Error",
        ("lora_expand", {**_EXPAND, "weight_policy": 1}),
    ),
}


@pytest.mark.slow(keep=2)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels compile here")
@pytest.mark.parametrize("family", GAUGED)
def test_gauge_checks_before_it_times(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the interpreter, with a stopwatch that counts: right tiles are timed; what is refused or wrong is not."""
    from kernelgen.measure.timing import Spread
    from kernelgen.measure.tune import calls, gauge

    cells, right, refused, says, idle = GAUGED[family]
    tiles_now: list[dict[str, int]] = [{}]
    choosing, ops = calls.Preparation.choosing, calls.Calls.ops

    def chosen(prepared: calls.Preparation, schedule: str, tiles: dict[str, int]) -> Any:
        tiles_now[0] = tiles
        return choosing(prepared, schedule, tiles)

    def lazy(of: calls.Calls, schedule: str, case: Any) -> Any:
        def run(call: Callable[[], None]) -> None:
            if tiles_now[0] != idle[1]:
                call()

        return [dataclasses.replace(op, call=functools.partial(run, op.call)) for op in ops(of, schedule, case)]

    def capture(made: list[Callable[[], None]]) -> str:
        made[-1]()
        return "graph"

    def replay(graphs: dict[int, Any], seconds: float, least: int) -> dict[int, Spread]:
        return {place: Spread(5.0 + place, 5.0, 5.0, least) for place in graphs}

    monkeypatch.setattr(calls.Preparation, "choosing", chosen)
    monkeypatch.setattr(calls.Calls, "ops", lazy)
    monkeypatch.setattr(gauge, "capture", capture)
    monkeypatch.setattr(gauge, "replay", replay)
    for module in ("moe_lora", "fused_moe", "layer"):
        monkeypatch.setattr(f"kernelgen.measure.workloads.{module}.WEIGHT_BYTES", 0.0)
    monkeypatch.setattr("kernelgen.measure.operands.TOUCHED_BYTES", 1.0)
    instrument = gauge.Gauge(hints.of(family).suite, family, ROOT / "generated")
    (problem,) = {tuple(p.items()) for cell in cells for p in instrument._calls.problems(cell)}
    candidates = (*right, refused, idle)
    for final in (False, True):
        job = GaugeJob(tuple(cells), dict(problem), candidates, final)
        by_place = {reading.place: reading for reading in instrument.measure(job)}
        assert sorted(by_place) == list(range(len(candidates)))
        assert [by_place[i].us for i in range(len(right))] == [5.0 + i for i in range(len(right))]
        for place, words in ((len(right), says), (len(right) + 1, "WrongResult")):
            assert by_place[place].us is None and not by_place[place].fatal
            assert re.match(words, by_place[place].failed or ""), by_place[place].failed


def test_every_family_with_tunables_can_be_tuned() -> None:
    """Its cells are of powers of two of tokens."""
    from kernelgen.spec.load import load

    specs, faults = load(SPEC.parent)
    assert not faults
    tunable = {family.name for family in specs if any(kernel.tunables for kernel in family.kernels)}
    assert tunable == set(families())
    for family in families():
        cells = cells_of(suites.find(hints.of(family).suite), family, {})
        assert len(cells) > 10 and {cell.tokens for cell in cells} == {1 << i for i in range(13)}


# --- which devices take what was measured on one --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (("h200", "sm_90", 132, 232448), "h200"),
        (("gh200_480gb", "sm_90", 132, 232448), "h200"),  # no tiles of its own: the nearest of its architecture
        (("h100_pcie", "sm_90", 114, 232448), "h100_pcie"),
        (("h20", "sm_90", 78, 232448), "h100_pcie"),  # the H200 has more than half as many multiprocessors again
        (("h300", "sm_90", 198, 232448), "h200"),  # which has just so many
        (("h200_mig_1g_18gb", "sm_90", 16, 232448), None),
        (("b200", "sm_100", 148, 232448), None),  # as much shared memory is no kinship
        (("h200", "sm_90", 132, 101376), None),  # they would not fit
        (("", "sm_90", 132, 232448), "h200"),  # compiled for without a GPU
    ],
)
def test_who_takes_tiles_of_whom(device: tuple[Any, ...], found: str | None) -> None:
    from generated import _runtime as runtime

    label, target, sms, shared_memory = device
    known = dict.fromkeys(runtime.Traits._fields, 0)
    traits = runtime.Traits(**{**known, "label": label, "target": target, "num_sms": sms, "shared_memory": shared_memory})
    tables = [
        runtime.Measured("h200", "sm_90", 132, 232448, {(1,): (("h200", ()),), (2,): (("h200 too", ()),)}),
        runtime.Measured("h100_pcie", "sm_90", 114, 232448, {(1,): (("h100_pcie", ()),)}),
    ]
    further = found and "h200 too" if label != "h20" else None  # what one has not measured, another has
    for problem, schedule in (((1,), found), ((2,), further), ((3,), None)):
        assert runtime.measured(tables, problem, traits) == (() if schedule is None else ((schedule, ()),))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb_hbm3"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000_blackwell_server_edition"),
        ("AMD Instinct MI300X", "instinct_mi300x"),
    ],
)
def test_the_folder_of_a_device(name: str, label: str) -> None:
    from kernelgen.core.names import identifier_fault
    from kernelgen.families import _runtime as runtime

    assert runtime.device_label(name) == label and identifier_fault(label) is None


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("5m", 300.0), ("90s", 90.0), ("1.5h", 5400.0), ("7", 7.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["moe_lora", "--budget", "soon"],
        ["moe_lora", "--budget", "0"],
        ["moe_lora", "--models", "nobody"],
        ["moe_lora", "--sites", "root"],
        ["moe_lora", "--devices", "a"],
        ["moe_lora", "--tp", "2"],
        ["moe_lora", "--slots", "0"],
        ["moe_lora", "--tokens", "300"],
        ["moe_lora", "--models", "llama-3-8b"],
        ["lora_shrink", "--models", "mixtral-8x7b"],
        ["lora_expand", "--sites", "w13"],
        ["lora_expand", "--set"],
        ["--family", "lora_gather"],
        ["--tp", "2"],
    ],
)
def test_bad_options(arguments: list[str], kernelgen) -> None:
    code, stdout, stderr = kernelgen("tune", *arguments)
    assert (code, stdout) == (2, "") and ("error[KG070]" in stderr or "Usage:" in stderr)


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, kernelgen) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, stdout, stderr = kernelgen("tune", "moe_lora", "--budget", "1m")
    assert (code, stdout) == (2, "") and stderr.startswith("cuda: error[KG061]: there are 0 GPUs here")


def test_the_command_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernelgen) -> None:
    """With fakes for the processes and the kernels."""
    from kernelgen.measure.tune import crew, gauge, kernels
    from kernelgen.measure.tune.jobs import Hello

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7,4,5")
    environments = []

    class Crew(FakeCrew):
        def __init__(
            self, make: Any, arguments: Any, members: list[dict[str, str]], background: bool = False
        ) -> None:
            environments.append([member["CUDA_VISIBLE_DEVICES"] for member in members])
            serve = measure if gauge.gauge in make.args else compile_job
            super().__init__(serve, Clock(), 0.0, size=len(members))

        def started(self) -> list[Hello]:
            return [Hello(DEVICE, {"torch": "2.11.0"})] * len(self.hellos)

    def measure(job: GaugeJob) -> Iterator[Reading]:
        for place, (schedule, config) in enumerate(job.candidates):
            yield Reading(place, model_us(job.cells[0], schedule, config))

    def compile_job(job: CompileJob) -> Iterator[Verdict]:
        digests = FakeKernels().digests(job.cell, job.problem, job.schedule, job.config)
        yield from (Verdict(digests[place], None) for place in job.wanted)

    monkeypatch.setattr(crew, "Processes", Crew)
    monkeypatch.setattr(kernels, "Kernels", lambda suite, family, package, target: FakeKernels())
    specs = tmp_path / "specs"
    specs.mkdir()
    shutil.copy(SPEC, specs)
    out = specs / "tuned/fake/moe_lora.yaml"  # of the device that it runs on
    arguments = ["moe_lora", "--specs", str(specs), "--budget", "10m"]
    arguments += ["--models", "qwen3-30b-a3b", "--ranks", "64", "--tokens", "1,64"]
    arguments += ["--devices", "1,3", "--workers", "3", "--json"]
    code, stdout, stderr = kernelgen("tune", *arguments)
    assert code == 0, stderr
    assert environments == [["7", "5"], ["", "", ""]]
    document = json.loads(stdout)
    assert document["complete"] and document["problems"] == document["timed"] == 4
    assert len(document["rule"]) == 4 and document["rule"][0]["rule_us"] > 0
    assert len(load_family(tmp_path, out).tuned[0].entries) == 4
    code, stdout, _ = kernelgen("tune", *arguments[:-1])
    assert code == 0 and "the rule for what is not tuned takes" in stdout
    other = out.read_text().replace(HEAD["device"], "NVIDIA Other")
    out.write_text(other)
    code, stdout, _ = kernelgen("tune", *arguments)
    assert code == 2 and json.loads(stdout)["errors"][0]["hint"] == "name another --out"
    assert out.read_text() == other


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, kernelgen.measure.tune.command, kernelgen.measure.tune.tuner, kernelgen.measure.tune.tuned_file\n"
        "print([m for m in ('torch', 'triton', 'pydantic', 'black') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "specs/tuned").glob("*/moe_gemm.yaml")), ids=lambda path: path.parent.name)
def test_warps_of_roles_are_measured_in_blocks_that_they_take(path: Path) -> None:
    """What nothing serves would be passed over, without a word."""
    entries = yaml.safe_load(path.read_text())["entries"]
    heights = {entry["problem"]["block_m"] for entry in entries if entry["schedule"] == "warp_specialised"}
    assert heights == {128}
