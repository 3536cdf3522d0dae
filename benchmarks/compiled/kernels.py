"""Print the kernels that move the most bytes in the programs of one row of the table `compiled`.

    python -m benchmarks.compiled.kernels "MLP" float32 H100

The arguments are the beginning of a model's name, a dtype and a device. For each program, a line per kernel says how
many MiB it moves, how often it runs, what it writes, and which operation of the program it comes from.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.compiled.program import Kernel, Program
from benchmarks.compiled.targets import TARGETS, Target, compile_for, memory
from benchmarks.compiled.theme import DTYPES, gradient, select_models, shape_structs
from benchmarks.functions import clipped
from benchmarks.models import Model

MIB = 2.0**20
MASKED = "clipped_grad, with a mask"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.kernels", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="the beginning of a model's name in the table")
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("target", choices=[target.name for target in TARGETS])
    parser.add_argument("--share", type=float, default=0.01, help="list kernels from this share of a program's bytes")
    return parser.parse_args(argv)


def model_of(target: Target, name: str) -> tuple[Model, tuple[str, ...]]:
    """The first model of the table whose name begins so, and the names of its programs."""
    for make, _, programs in select_models(target, small=False):
        model = make()
        if model.name.startswith(name):
            return model, programs
    raise SystemExit(f"no model's name begins with {name!r}")


def lines(program: Program, share: float) -> Iterator[str]:
    kernels = list(program.kernels())
    total = sum(k.times * k.bytes for k in kernels)
    for k in kernels:
        if k.times * k.bytes >= share * total:
            yield describe(k)


def describe(kernel: Kernel) -> str:
    i = kernel.instruction
    written = " ".join(f"{s.dtype}{list(s.dims)}" for s in i.shapes)
    source = re.search(r'op_name="([^"]*)"', i.rest)
    operation = "/".join(source[1].split("/")[-3:]) if source else ""
    return f"{kernel.times * kernel.bytes / MIB:9.1f}  × {kernel.times:<4} {i.name:34.34} {written:60.60} {operation}"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    (target,) = (t for t in TARGETS if t.name == options.target)
    model, names = model_of(target, options.model)
    arguments: Any = shape_structs((model.params, *model.batch), options.dtype)
    functions = {name: gradient(model, name) for name in names} | {MASKED: clipped(model, 1.0)}
    for name, function in functions.items():
        compiled = compile_for(function, arguments, target.device())
        program = Program(compiled.as_text())
        counts = program.counts()
        print(
            f"{model.name}, {options.dtype}, {target.name}: {name}. {counts.bytes / MIB:.0f} MiB moved in "
            f"{counts.kernels} kernels, {memory(compiled) / MIB:.0f} MiB of memory"
        )
        print("\n".join(lines(program, options.share)), flush=True)


if __name__ == "__main__":
    main()
