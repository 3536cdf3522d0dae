"""Count the bytes that each device sends to others in a compiled program.

A collective counts with the bytes that one device sends in the usual ring algorithm, for a group of n devices:
(n - 1)/n of the whole array for all-gather, reduce-scatter and all-to-all, twice that for all-reduce, and all of it for
a permutation. The body of a loop counts once for each iteration, and a conditional counts as the branch that sends the
most. An asynchronous collective, which a TPU's compiler splits over several instructions, counts where it starts: the
others may be in an inner loop that computes while the collective runs.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from benchmarks.compiled.program import BITS, Instruction, Program, Shape

KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")
CALLS = ("fusion", "call", "async-start")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication between devices.

    Attributes:
        kind: the operation, such as "all-gather".
        shapes: the arrays that one device has before or after it, whichever is larger.
        devices: the number of devices in a group.
        times: how often it runs.
    """

    kind: str
    shapes: tuple[Shape, ...]
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """The bytes that one device sends, each time."""
        whole = sum(shape.size * BITS[shape.dtype] // 8 for shape in self.shapes)
        share = {"all-reduce": 2.0, "collective-permute": 0.0, "collective-broadcast": 0.0}.get(self.kind, 1.0)
        return whole * share * (self.devices - 1) / self.devices if share else whole


def bytes_sent(program: Program) -> float:
    """The bytes that one device sends while the program runs once."""
    return sum(c.times * c.sent for c in collectives(program))


def sent_by_kind(program: Program) -> Counter[str]:
    """As `bytes_sent`, for each kind of collective."""
    total: Counter[str] = Counter()
    for c in collectives(program):
        total[c.kind] += round(c.times * c.sent)
    return total


def collectives(program: Program) -> list[Collective]:
    """The program's collectives. Those of a loop appear once."""
    return _counted(_inside(program, program.entry, 1))


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the instructions of a collective. Those of an asynchronous one have one channel."""

    collective: Collective
    channel: str
    starts: bool  # whether it starts an asynchronous collective


def _counted(parts: Iterable[_Part]) -> list[Collective]:
    parts = list(parts)
    asynchronous = {part.channel for part in parts if part.starts}
    return [part.collective for part in parts if part.starts or part.channel not in asynchronous]


def _inside(program: Program, name: str, times: int) -> Iterator[_Part]:
    found: dict[tuple[str, bool], _Part] = {}
    for i in program.computations[name].values():
        if i.opcode == "while":
            steps = program.trip_count(i, name)
            for part in i.computations("body", "condition"):
                yield from _inside(program, part, times * steps)
        elif i.opcode == "conditional":
            branches = [list(_inside(program, branch, times)) for branch in program.branches(i)]
            yield from max(branches, key=lambda each: sum(c.times * c.sent for c in _counted(each)))
        else:
            for inner, starts in _operations(program, i):
                channel = inner.attribute("channel_id") or inner.name
                found.setdefault((channel, starts), _Part(_collective(inner, times), channel, starts))
    yield from found.values()


def _operations(program: Program, i: Instruction) -> Iterator[tuple[Instruction, bool]]:
    """The collectives that one instruction runs, and whether it only starts them."""
    if i.opcode in CALLS:
        for called in i.computations("to_apply", "calls"):
            inside = program.computations[called].values()
            starts = {name for j in inside if "AsyncCollectiveStart" in j.rest for name in j.operands}
            for inner in inside:
                for operation, started in _operations(program, inner):
                    yield operation, started or inner.name in starts
    elif i.opcode.removesuffix("-start") in KINDS:
        yield i, False


def _collective(i: Instruction, times: int) -> Collective:
    kind, devices = i.opcode.removesuffix("-start"), group_size(i.rest)
    shapes = tuple(shape for shape in i.shapes if shape.dims)
    if i.opcode.endswith("-start") and kind != "all-reduce":  # the result is (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    if kind == "reduce-scatter":
        shapes = tuple(dataclasses.replace(shape, dims=(devices, *shape.dims)) for shape in shapes)
    return Collective(kind, shapes, devices, times)


def group_size(text: str) -> int:
    """The number of devices that communicate with each other, from the attributes of a collective.

    The compilers print groups as lists, {{0,1},{2,3}}; as the shape of an array of groups, [2,4]<=[8]; or as the axes
    of a mesh, mesh['x'=2,'y'=4] {'y'}.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']*)'=(\d+)", found[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'([^']*)'", found[2]))
    return 2  # a permutation
