"""The main job: train the exercise's network on real data, and hold its closed-form gradient against `jax.grad`.

    python -m jaxgrad [--data FILE] [--label COLUMN] [--hidden N] [--activation NAME] [--dtype NAME] [--steps N]
                      [--seed N] [--save FILE] [--plot FILE.png]

Exit status: 0 the gradients agree; 1 they do not; 2 bad input, with one line that says what.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.network import ACTIVATIONS, init_params

_NEEDS = {"optax": "optax", "pandas": "pandas", "rich": "rich", "sklearn": "scikit-learn"}
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_LARGEST = 5


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"jaxgrad: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    options = _options(argv)
    needs = _NEEDS | ({"matplotlib": "matplotlib"} if options.plot else {})
    absent = [package for module, package in needs.items() if importlib.util.find_spec(module) is None]
    if absent:
        print(
            f"jaxgrad: error: the main job needs {', '.join(absent)}; install it with jaxgrad[examples]",
            file=sys.stderr,
        )
        return 2

    from jaxgrad.job.data import InputError

    try:
        return _run(options)
    except InputError as error:
        print(f"jaxgrad: error: {error}", file=sys.stderr)
        return 2


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m jaxgrad",
        description="Train the exercise's network and hold its closed-form gradient against jax.grad.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="CSV with a header, or NPZ (default: breast cancer)")
    parser.add_argument("--label", metavar="COLUMN", help="the column or array that holds the two classes")
    parser.add_argument("--hidden", type=_at_least(1), default=16, metavar="N", help="hidden units (default: 16)")
    parser.add_argument("--activation", choices=sorted(ACTIVATIONS), default="logistic", help="default: logistic")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the parameters (default: float32)")
    parser.add_argument("--steps", type=_at_least(0), default=500, metavar="N", help="of Adam (default: 500)")
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
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from jaxgrad.job import data, evaluation, output, training

    output.check_writable(options.save, output.TABLE_SUFFIXES, "--save")
    output.check_writable(options.plot, output.PLOT_SUFFIXES, "--plot")
    table = data.load(options.data, options.label)
    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    activation, dtype = ACTIVATIONS[options.activation], jnp.dtype(options.dtype)
    X, Y = jnp.asarray(table.X, dtype), jnp.asarray(table.Y, dtype)

    params = init_params(jax.random.key(options.seed), X.shape[1], options.hidden, dtype)
    console = Console(highlight=False, soft_wrap=True)
    params, losses = training.train(params, X, Y, activation, options.steps, console)
    results = evaluation.per_example(params, X, Y, activation)
    report = evaluation.agreement(params, X, Y, activation)
    times = evaluation.timings(params, X, Y, activation)

    console.print(f"data        {table.name}: {X.shape[0]} examples × {X.shape[1]} inputs")
    console.print(f"network     {options.hidden} {activation.name} units, {dtype}, on {jax.devices()[0].device_kind}")
    console.print(
        f"trained     {options.steps} steps: loss {results.loss.mean():.4f}, "
        f"accuracy {np.mean(np.sign(results.margin) == table.Y):.4f}\n"
    )
    console.print(str(report), markup=False)

    clock = Table("all gradients by", "compile and first call", "later calls (median)", box=box.SIMPLE_HEAD)
    for way, timing in times.items():
        clock.add_row(way, f"{timing.first * 1e3:.1f} ms", f"{timing.later * 1e3:.2f} ms")
    console.print(clock)

    largest = Table("largest gradients", "label", "margin", "loss", "norm", box=box.SIMPLE_HEAD)
    for i in np.argsort(-results.grad_norm, kind="stable")[:_LARGEST]:
        numbers = (f"{v[i]:.4g}" for v in (results.margin, results.loss, results.grad_norm))
        largest.add_row(f"example {i}", str(table.labels[i]), *numbers)
    console.print(largest)

    if options.save:
        output.save(options.save, table, results)
        console.print(f"saved       {options.save}", markup=False)
    if options.plot:
        output.plot(options.plot, losses, results, report)
        console.print(f"plotted     {options.plot}", markup=False)
    try:
        report.assert_agrees()
    except AssertionError as error:
        print(f"jaxgrad: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
