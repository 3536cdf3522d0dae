"""Count the kernels that a compiled program runs, the bytes that they move, and the products that they compute.

The counts come from the scheduled program that the compiler prints. A kernel is an instruction that runs on the device:
a fusion, a product, a copy, a reduction. It moves the bytes of its operands and of its results, with these exceptions:

* An operand that is only sliced or gathered from, also after elementwise operations in the same kernel, counts with the
  elements that are read. An operand that is passed twice counts once.
* An array that is updated in place counts with the part that is written.
* An array in the on-chip memory of a TPU does not count.

The body of a loop counts once for each iteration, and a conditional counts as the branch that moves the most bytes.
Arrays with a tiled layout, as on a TPU, count with their padding.
"""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}
BITS |= {"f8e4m3fn": 8, "f8e5m2": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "add-dependency", "iota", "copy-done", "async-done", "async-update", "domain"}
SLICES = {"dynamic-slice", "slice", "gather"}
ELEMENTWISE = {"add", "subtract", "multiply", "divide", "negate", "abs", "maximum", "minimum", "exponential", "log"}
ELEMENTWISE |= {"convert", "select", "compare", "sqrt", "rsqrt", "tanh", "power", "and", "or", "not"}
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # in place: the index of the operand with the new elements
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its dtype, its dimensions and its layout in memory."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def logical(self) -> int:
        """Bytes without the layout: without padding, and on the chip or not."""
        return self.size * BITS[self.dtype] // 8

    @property
    def bytes(self) -> int:
        """Bytes in the device's main memory, including the padding of tiles."""
        if self.on_chip:
            return 0
        dims = [self.dims[k] for k in reversed(self.order)] if self.order else list(self.dims)
        dims = [1] * (len(self.tile) - len(dims)) + dims
        for k, tile in enumerate(self.tile, len(dims) - len(self.tile)):
            dims[k] = -(-dims[k] // tile) * tile
        return math.prod(dims) * BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str  # the text after the operands
    root: bool
    literal: str = ""  # the value of a constant

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def logical(self) -> int:
        return sum(shape.logical for shape in self.shapes)

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1] if found else ""

    def computations(self, *names: str) -> list[str]:
        return [c for name in names for c in re.findall(r"%([\w.\-]+)", self.attribute(name))]


Computation = Mapping[str, Instruction]  # by name, in the order of execution


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs on the device.

    Attributes:
        instruction: the instruction in the program.
        times: how often it runs.
        bytes: the bytes that it moves each time.
        products: the multiplications and additions of its products each time, by the dtype of their operands. Products
            of float32 in full precision count as "f32 highest".
    """

    instruction: Instruction
    times: int
    bytes: int
    products: Counter[str]


@dataclasses.dataclass
class Counts:
    """The sums over all kernels of a program."""

    bytes: int = 0
    kernels: int = 0
    products: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0


@dataclasses.dataclass(frozen=True)
class Peak:
    """A device's rates. A kernel takes the longer of the times for its bytes and for its operations."""

    bytes: float
    operations: Mapping[str, float]

    def seconds(self, kernel: Kernel) -> float:
        products = sum(n / self.operations[dtype] for dtype, n in kernel.products.items())
        return kernel.times * max(kernel.bytes / self.bytes, products)


class Program:
    """A compiled program, read from `compiled.as_text()`."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and (found := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = self.computations[found[2]] = {}
                self.entry = found[2] if found[1] else self.entry
            elif (instruction := parse_instruction(line)) is not None:
                current[instruction.name] = instruction

    def counts(self, peak: Peak | None = None) -> Counts:
        """The sums over all kernels. The seconds are 0 without a peak."""
        total = Counts()
        for kernel in self.kernels():
            total.bytes += kernel.times * kernel.bytes
            total.kernels += kernel.times
            total.seconds += peak.seconds(kernel) if peak else 0.0
            for dtype, operations in kernel.products.items():
                total.products[dtype] += kernel.times * operations
        return total

    def trip_count(self, loop: Instruction, name: str) -> int:
        """How often a loop runs that is in this computation: as noted by the compiler, or as its condition says.

        Raises:
            ValueError: neither says it.
        """
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(noted[1])
        (condition,), (body,) = loop.computations("condition"), loop.computations("body")
        computation = self.computations[condition]
        (test,) = (i for i in computation.values() if i.root)
        sides = [computation[operand] for operand in test.operands]
        if test.opcode == "compare" and "direction=LT" in test.rest and sides[1].opcode == "constant":
            index = int(sides[0].attribute("index"))
            start = self.computations[name][loop.operands[0]]
            while start.opcode in ("tuple", "copy"):
                operand = start.operands[index if start.opcode == "tuple" else 0]
                start = self.computations[name][operand]
            step = self._step(body, index)
            if start.opcode == "constant" and step:
                return -(-(int(sides[1].literal) - int(start.literal)) // step)
        raise ValueError(f"the program does not say how often the loop {loop.name} runs")

    def _step(self, body: str, index: int) -> int:
        """What an iteration adds to this entry of its tuple; 0 if it is not a constant."""
        computation = self.computations[body]
        (result,) = (i for i in computation.values() if i.root)
        change = computation[result.operands[index]]
        added = [computation[operand] for operand in change.operands]
        constants = [int(i.literal) for i in added if i.opcode == "constant"]
        return constants[0] if change.opcode == "add" and constants else 0

    def branches(self, conditional: Instruction) -> list[str]:
        """The names of the computations that a conditional chooses from."""
        return conditional.computations("branch_computations", "true_computation", "false_computation")

    def kernels(self) -> Iterator[Kernel]:
        """The kernels in the order of execution. Those of a loop appear once.

        Raises:
            ValueError: the program does not say how often a loop runs.
        """
        return self._kernels(self.entry, 1)

    def _kernels(self, name: str, times: int) -> Iterator[Kernel]:
        body = self.computations[name]
        for i in body.values():
            if i.opcode in FREE or i.opcode.endswith("-done"):
                continue
            if i.opcode == "while":
                steps = self.trip_count(i, name)
                for part in i.computations("body", "condition"):
                    yield from self._kernels(part, times * steps)
            elif i.opcode == "conditional":
                branches = [list(self._kernels(branch, times)) for branch in self.branches(i)]
                yield from max(branches, key=lambda kernels: sum(k.times * k.bytes for k in kernels))
            elif i.opcode in ("call", "async-start") and (called := i.computations("to_apply", "calls")):
                for part in called:
                    yield from self._kernels(part, times)
            else:
                kernel = self._kernel(i, body, times)
                if kernel.bytes or kernel.products:  # skip scalars on the host and arrays on the chip
                    yield kernel

    def _kernel(self, i: Instruction, computation: Computation, times: int) -> Kernel:
        if i.opcode != "fusion":
            return Kernel(i, times, _bytes_moved(i, computation), self._products(i, computation))
        (name,) = i.computations("calls")
        body = self.computations[name]
        moved = self._fusion_reads(i, computation, body) + self._fusion_writes(body)
        return Kernel(i, times, moved, self._products(i, computation))

    def _fusion_reads(self, i: Instruction, computation: Computation, body: Computation) -> int:
        parameters = {int(p.rest): p for p in body.values() if p.opcode == "parameter"}
        read: Counter[str] = Counter()
        for k, name in enumerate(i.operands):
            read[name] += self._bytes_used(parameters[k], body)
        return sum(min(computation[name].bytes, used) for name, used in read.items())

    def _bytes_used(self, p: Instruction, body: Computation) -> int:
        """The number of bytes of p that its users read."""
        if p.root:
            return p.bytes
        total = 0
        for user in body.values():
            for k, name in enumerate(user.operands):
                if name != p.name:
                    continue
                if user.opcode == "bitcast":
                    total += self._bytes_used(user, body)
                elif user.opcode in ELEMENTWISE:
                    if k == user.operands.index(name):  # an operand that is given twice is read once
                        total += p.bytes * self._bytes_used(user, body) // max(user.bytes, 1)
                elif user.opcode in SLICES and k == 0:
                    total += user.bytes
                elif user.opcode in UPDATES and k == 0:
                    pass
                elif user.opcode == "fusion":
                    (called,) = user.computations("calls")
                    nested = self.computations[called]
                    (parameter,) = (q for q in nested.values() if q.opcode == "parameter" and int(q.rest) == k)
                    total += self._bytes_used(parameter, nested)
                else:
                    return p.bytes
        return min(total, p.bytes)

    def _fusion_writes(self, body: Computation) -> int:
        (root,) = (i for i in body.values() if i.root)
        return self._bytes_written(root, body)

    def _bytes_written(self, i: Instruction, body: Computation) -> int:
        if i.opcode == "tuple":
            return sum(self._bytes_written(body[name], body) for name in i.operands)
        if i.opcode == "bitcast":
            return min(i.bytes, self._bytes_written(body[i.operands[0]], body)) if i.operands[0] in body else i.bytes
        if i.opcode in UPDATES:
            return body[i.operands[UPDATES[i.opcode]]].bytes
        if i.opcode == "fusion":
            (called,) = i.computations("calls")
            return self._fusion_writes(self.computations[called])
        return i.bytes

    def _products(self, i: Instruction, computation: Computation) -> Counter[str]:
        found: Counter[str] = Counter()
        called = i.attribute("custom_call_target")
        if i.opcode in ("dot", "convolution") or "gemm" in called or "conv" in called:
            left, right = (computation[name].shapes[0] for name in i.operands[:2])
            found[_precision(i, left, right)] += _operations(i, left, right)
        elif i.opcode == "fusion":
            for name in i.computations("calls"):
                body = self.computations[name]
                for instruction in body.values():
                    found.update(self._products(instruction, body))
        return found


def _bytes_moved(i: Instruction, computation: Computation) -> int:
    """The bytes that an instruction moves if it is a kernel of its own."""
    sizes = [
        computation[name].bytes * (name not in i.operands[:k])
        for k, name in enumerate(i.operands)
        if name in computation
    ]
    if i.opcode in SLICES:
        return i.bytes + min(i.logical, sizes[0]) + sum(sizes[1:])
    if i.opcode in UPDATES:
        return sum(sizes[1:]) + sizes[UPDATES[i.opcode]]
    if i.opcode == "custom-call":  # a library's workspace does not count
        return sum(sizes) + sum(s.bytes for s in i.shapes if s.dtype not in ("s8", "u8"))
    if i.opcode == "copy-start":
        return sizes[0] + i.shapes[0].bytes
    if i.opcode == "slice-start":  # (operand, result, context)
        return min(i.shapes[1].logical, sizes[0]) + i.shapes[1].bytes
    return sum(sizes) + i.bytes


def _precision(i: Instruction, left: Shape, right: Shape) -> str:
    dtype = max(left.dtype, right.dtype, key=BITS.__getitem__)
    return f"{dtype} highest" if "highest" in i.attribute("operand_precision") else dtype


def _operations(i: Instruction, left: Shape, right: Shape) -> int:
    """The number of operations of a product: two for each multiplication and addition."""
    out = i.shapes[0].size
    if labels := i.attribute("dim_labels"):
        kernel = re.split("_|->", labels)[1]
        return 2 * out * right.size // right.dims[kernel.index("o")]
    contracted = i.attribute("lhs_contracting_dims")
    if not contracted:  # a library's product
        numbers = json.loads(i.rest[i.rest.index("backend_config=") + 15 :].split(", metadata")[0])
        dims = numbers["gemm_backend_config"]["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        return 2 * out * math.prod(left.dims[int(k)] for k in dims)
    return 2 * out * math.prod(left.dims[int(k)] for k in re.findall(r"\d+", contracted))


# --- Parsing the text ----------------------------------------------------------------------------------------------


def parse_instruction(line: str) -> Instruction | None:
    """Parse a line of the program's text. Return None if it has no instruction."""
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    types, line = _split_type(line[found.end() :])
    opcode, line = line.strip().split("(", 1)
    operands, rest = _split_parentheses("(" + line)
    names = re.findall(r"%([\w.\-]+)", operands)
    rest = operands if opcode == "parameter" else rest
    literal = operands.strip("()") if opcode == "constant" else ""
    return Instruction(found[2], tuple(shapes(types)), opcode, tuple(names), rest, bool(found[1]), literal)


def shapes(types: str) -> Iterator[Shape]:
    """The arrays of a type such as f32[8,128]{1,0:T(8,128)} or of a tuple of types."""
    for dtype, dims, order, layout in ARRAY.findall(types):
        tile = re.search(r"T\(([\d,]+)\)", layout)
        yield Shape(dtype, _numbers(dims), _numbers(order), _numbers(tile[1]) if tile else (), "S(1)" in layout)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _split_type(text: str) -> tuple[str, str]:
    """(the type at the beginning, the rest of the text)."""
    if text.startswith("("):
        return _split_parentheses(text)
    first, _, rest = text.partition(" ")
    return first, rest


def _split_parentheses(text: str) -> tuple[str, str]:
    """(the text in the parentheses at the beginning, the text after them)."""
    depths: Sequence[int] = list(itertools.accumulate((c == "(") - (c == ")") for c in text))
    end = depths.index(0)
    return text[1:end], text[end + 1 :]
