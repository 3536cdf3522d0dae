"""The main job: train the exercise's network on real data, and compare its closed-form gradient with `jax.grad`.

    python -m jaxgrad [--data FILE] [--label COLUMN] [--hidden N] [--activation NAME] [--dtype NAME] [--steps N]
                      [--seed N] [--save FILE] [--plot FILE.png]

Exit status: 0 if the gradients agree; 1 if they do not; 2 for bad input or a failed write, with one line that says why.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.exercise import ACTIVATIONS, init_params

_NEEDS = {"optax": "optax", "pandas": "pandas", "rich": "rich", "sklearn": "scikit-learn"}
_DTYPES = ("float32", "float64", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(_bad(message))


def main(argv: list[str] | None = None) -> int:
    """Run the job and return the exit status."""
    options = _options(argv)
    needs = _NEEDS | ({"matplotlib": "matplotlib"} if options.plot else {})
    missing = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _bad(f"the main job needs {', '.join(missing)}; install it with jaxgrad[examples]")

    from jaxgrad.exercise.job.data import InputError

    try:
        return _run(options)
    except InputError as error:
        return _bad(str(error))


def _bad(message: str) -> int:
    """Print the message as one line and return the exit status for bad input."""
    _complain(f"jaxgrad: error: {' '.join(message.split())}")  # names may hold newlines
    return 2


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # standard error may have no reader; the exit status still tells
        print(message, file=sys.stderr)


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m jaxgrad",
        description="Train the exercise's network and compare its closed-form gradient with jax.grad.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="CSV with a header, or NPZ (default: breast cancer)")
    parser.add_argument("--label", metavar="COLUMN", help="the column or array that holds the two classes")
    parser.add_argument("--hidden", type=_at_least(1), default=16, metavar="N", help="hidden units (default: 16)")
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="logistic", help="default: logistic")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="parameter dtype (default: float32)")
    parser.add_argument("--steps", type=_at_least(0), default=500, metavar="N", help="Adam steps (default: 500)")
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="default: 0")
    parser.add_argument("--save", type=Path, metavar="FILE", help="per-example results, as .csv or .npz")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="loss curve, gradient norms, agreement by leaf")
    return parser.parse_args(argv)


def _at_least(least: int):  # type: ignore[no-untyped-def]
    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number < 2**31:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to 2147483647, got {text!r}")
        return number

    return integer


def _run(options: argparse.Namespace) -> int:
    from jaxgrad.exercise.job import data, evaluation, output, screen, training

    output.check_distinct({"--data": options.data, "--save": options.save, "--plot": options.plot})
    output.check_writable(options.save, output.TABLE_SUFFIXES, "--save")
    output.check_writable(options.plot, output.PLOT_SUFFIXES, "--plot")
    table = data.load(options.data, options.label)
    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    activation, dtype = ACTIVATIONS[options.activation], jnp.dtype(options.dtype)
    X, Y = jnp.asarray(table.X, dtype), jnp.asarray(table.Y, dtype)

    params = init_params(jax.random.key(options.seed), X.shape[1], options.hidden, dtype)
    console = screen.console()
    params, losses = training.train(params, X, Y, activation, options.steps, console)
    results = evaluation.per_example(params, X, Y, activation)
    report = evaluation.agreement(params, X, Y, activation)
    times = evaluation.timings(params, X, Y, activation)

    parts: list[Any] = [
        f"data        {table.name}: {X.shape[0]} examples × {X.shape[1]} inputs"
        f"{table.left_out and f' ({table.left_out})'}",
        f"network     {options.hidden} {activation.name} units, {dtype}, on {jax.devices()[0].device_kind}",
        f"trained     {options.steps} steps: loss {results.loss.mean():.4f}, "
        f"accuracy {np.mean(np.sign(results.margin) == table.Y):.4f}\n",
        str(report),
        screen.clock(times),
        screen.largest(table.labels, results),
    ]
    writes = [
        ("saved", options.save, partial(output.save, options.save, table, results)),
        ("plotted", options.plot, partial(output.plot, options.plot, losses, results, report)),
    ]
    status = 0
    for done, path, write in writes:
        if path is not None and (failed := _attempt(write)):
            status = failed
        elif path is not None:
            parts.append(f"{done:<11} {path}")
    status |= _attempt(partial(screen.show, console, parts))
    try:
        report.assert_agrees()
    except AssertionError as error:
        _complain(f"jaxgrad: {error}")
        return 1  # even if a write failed too
    return status


def _attempt(step: Callable[[], None]) -> int:
    from jaxgrad.exercise.job.data import InputError

    try:
        step()
    except InputError as error:
        return _bad(str(error))
    return 0


def run_program() -> int:
    """Run `main` as a program: standard output may lack a character of the output, be full, or have no reader."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        status = main()
    except SystemExit as stop:  # argparse: --help, bad options
        status = int(stop.code or 0)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:  # the rest of the buffer would fail again at the interpreter's exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = status or _bad(f"standard output: {error.strerror or error}")
    return status
