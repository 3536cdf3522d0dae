"""Scores of training examples: what they predict about retraining, and what they cost."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

import jaxgrad as jg
from benchmarks import report
from benchmarks.measure import compile_column, describe_arrays, run_once
from benchmarks.retraining import DECAY, Retrained, digits, loss, model, output
from benchmarks.timing import medians
from benchmarks.workload import Row, Settings, Theme, Workload
from jaxgrad import attribution, curvature

RATIO = curvature.relative(1e-3)
SCORES = "scores"


def methods() -> dict[str, tuple[Callable[..., Any], str]]:
    """By name: (a function of the checkpoints, the training examples and the test examples, which checkpoints)."""
    gradients = jg.per_example_grad(loss)

    def fisher(checkpoints: Any, train: Any, test: Any) -> jax.Array:
        return attribution.influence(gradients(checkpoints[0], *train), gradients(checkpoints[0], *test), RATIO)

    def gauss_newton(checkpoints: Any, train: Any, test: Any) -> jax.Array:
        rows = curvature.gauss_newton(model, curvature.softmax)(checkpoints[0], *train)
        return attribution.influence(rows, gradients(checkpoints[0], *test), 3 * DECAY)

    def ekfac(checkpoints: Any, train: Any, test: Any) -> jax.Array:
        train_g, test_g = (gradients(checkpoints[0], *data) for data in (train, test))
        F = curvature.ekfac(curvature.kfac(loss)(checkpoints[0], *train), train_g)
        return attribution.influence_through(lambda v: F.solve(v, RATIO), train_g, test_g)

    def hessian(checkpoints: Any, train: Any, test: Any) -> jax.Array:
        product = curvature.hessian_vector_product(loss)
        train_g, test_g = (gradients(checkpoints[0], *data) for data in (train, test))
        through = lambda v: product(checkpoints[0], v, *train)  # noqa: E731
        return attribution.influence_by_cg(through, train_g, test_g, 3 * DECAY, tolerance=1e-2).scores

    def tracin(checkpoints: Any, train: Any, test: Any) -> jax.Array:
        return attribution.tracin(loss)(checkpoints, [1.0] * len(checkpoints), train, test)

    return {
        "TracIn, last checkpoint": (tracin, "last"),
        "TracIn, five checkpoints": (tracin, "checkpoints"),
        "TRAK, exact kernel, last checkpoint": (attribution.trak(output, RATIO), "last"),
        "TRAK, exact kernel, models of five halves": (attribution.trak(output, RATIO), "halves"),
        "influence, empirical Fisher matrix": (fisher, "last"),
        "influence, EK-FAC of the empirical Fisher matrix": (ekfac, "last"),
        "influence, Gauss-Newton matrix": (gauss_newton, "last"),
        "influence, Hessian, by conjugate gradients": (hessian, "last"),
    }


def workloads(settings: Settings) -> Iterator[Workload]:
    if not any(settings.wants("attribution", name) for name in methods()):
        return
    task = digits()
    trees = {"last": task.checkpoints[-1:], "checkpoints": task.checkpoints, "halves": task.halves}
    for name, (method, which) in methods().items():
        yield Workload(name, {SCORES: method}, (trees[which], task.task.train, task.task.test))


def measure(workload: Workload, settings: Settings) -> Iterable[Row]:
    """The time, the memory and the linear datamodeling score of one method."""
    row = Row(workload.name, shapes=describe_arrays(workload.arguments))
    compiled = compile_column(row, SCORES, workload.functions[SCORES], workload.arguments)
    results: dict[str, Any] = {}
    run_once(lambda: compiled(*workload.arguments), SCORES, {SCORES: lambda scores: scores}, results)
    row.labels = {"LDS": f"{retrained().score(results[SCORES]):.3f}"}
    row.seconds |= medians(
        {SCORES: lambda: compiled(*workload.arguments)}, settings.seconds, 3, wait=jax.block_until_ready
    )
    return [row]


def retrained() -> Retrained:
    return digits()


THEME = Theme(
    "attribution",
    "Scores of training examples",
    """
An MLP 64-32-10 with biases (2,410 parameters) on 600 of scikit-learn's digits, trained by full batches with momentum
and a weight decay of 0.001, and 100 test examples. LDS is the linear datamodeling score: the rank correlation, over 128
random halves of the training examples, of the summed scores with the log-odds of the right label after training on that
half, as a mean over the test examples. Its standard error is below 0.01. Training is deterministic, so the score of a
perfect method is 1 but for the effects that are not a sum over the examples.

The time is that of all 600 × 100 scores from the parameters, without compiling; the memory is the temporary memory of
the compiled program. Dampings are 0.1 % of the mean squared norm, `relative(0.001)`, and for the Gauss-Newton matrix
and the Hessian three times the weight decay.""",
    (report.label("LDS"), report.milliseconds(SCORES, "time, ms"), report.mebibytes(SCORES, "memory, MiB")),
    workloads,
    measure,
)
