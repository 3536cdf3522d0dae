"""Scores of training examples: what they predict about retraining, and what they cost."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.measure import compile_column, describe_arrays
from benchmarks.retraining import Retrained, Task, characters, convolutional, digits
from benchmarks.scoring import Method, methods, smallest_eigenvalue
from benchmarks.timing import medians
from benchmarks.workload import Row, Settings, Theme, Workload
from jaxgrad import attribution

SCORES = "scores"
TASKS = {  # the heading of the table: the task
    "MLP 64-32-10 (2,410 parameters), 600 digits": digits,
    "Convolutional network (1,874 parameters), 400 digits": convolutional,
    "Language model of characters (2,163 parameters), 256 sequences of 16": characters,
}


def workloads(settings: Settings) -> Iterator[Workload]:
    for section, build in TASKS.items():
        if not settings.wants("attribution", section):
            continue
        retrained = build()
        for name, method in methods(retrained.task, retrained.params).items():
            arguments = (checkpoints(retrained, method), retrained.task.train, retrained.task.test)
            yield Workload(name, {SCORES: method.scores}, arguments, section=section)


def checkpoints(retrained: Retrained, method: Method) -> list[Any]:
    every = {"last": retrained.checkpoints[-1:], "checkpoints": retrained.checkpoints, "halves": retrained.halves}
    return every[method.which]


def measure(workload: Workload, settings: Settings) -> Iterable[Row]:
    """The scores at the best of several dampings: what they predict, whether they find wrong labels, their cost."""
    retrained = TASKS[workload.section]()
    method = methods(retrained.task, retrained.params)[workload.name]
    row = Row(workload.name, workload.section, shapes=describe_arrays(workload.arguments))
    dampings = [jnp.asarray(ratio, jnp.float32) for ratio in method.dampings]
    compiled = compile_column(row, SCORES, method.scores, (*workload.arguments, dampings[0]))
    found = [retrained.score(compiled(*workload.arguments, ratio)) for ratio in dampings]
    best = max(range(len(found)), key=lambda k: found[k] if found[k] == found[k] else -1.0)
    auc, row.lines = wrong_labels(workload.section, method, compiled, best)
    row.labels = {
        "LDS": f"{found[best]:.3f}",
        "one left out": f"{retrained.score_left_out(compiled(*workload.arguments, dampings[best])):.3f}",
        "AUC": auc,
        "damping": f"{method.dampings[best]:g} × {method.unit}" if method.unit else "",
        "kept, bytes": f"{method.kept:,.0f}",
    }
    call = functools.partial(compiled, *workload.arguments, dampings[best])
    row.seconds |= medians({SCORES: call}, settings.seconds, 3, wait=jax.block_until_ready)
    return [row]


def wrong_labels(section: str, method: Method, compiled: Any, best: int) -> tuple[str, list[str]]:
    """How well the sum of the scores over the test examples finds wrong labels, and what to know of the number.

    The model is trained on some wrong labels. Where scores are NaN, because a system is not solved, a larger damping is
    taken.
    """
    if TASKS[section]().task.positions > 1 or method.which == "halves":
        return "", []
    task, wrong, trained = mislabeled(section)
    params = trained if method.which == "checkpoints" else trained[-1:]
    for ratio in method.dampings[best:]:
        scores = compiled(params, task.train, task.test, jnp.asarray(ratio, jnp.float32))
        auc = float(attribution.mislabeled_auc(-scores.sum(0), wrong))
        if auc == auc:
            return f"{auc:.3f}", indefinite(section, method.dampings[best], ratio) if ratio > method.dampings[
                best
            ] else []
    return "", []


def indefinite(section: str, unsolved: float, solved: float) -> list[str]:
    """Why the Hessian's damping is larger after training on wrong labels; dampings as multiples of the decay."""
    (task, _, trained), (clean, params) = mislabeled(section), (TASKS[section]().task, TASKS[section]().params)
    before, after = smallest_eigenvalue(clean, params), smallest_eigenvalue(task, trained[-1])
    return [
        f"The smallest eigenvalue of the Hessian is {before / clean.decay:.1f} × decay, and {after / task.decay:.1f} × "
        f"decay after training on wrong labels. There, at the damping {unsolved:g} × decay, the damped matrix is "
        "indefinite and conjugate gradients do not solve its systems. Therefore the AUC of the Hessian is that at "
        f"{solved:g} × decay."
    ]


@functools.cache
def mislabeled(section: str) -> tuple[Task, Any, list[Any]]:
    """(the task with wrong labels, the mask of these, checkpoints of the training on all examples)."""
    task, wrong = TASKS[section]().task.on_wrong_labels()
    return task, wrong, task.checkpoints()


THEME = Theme(
    "attribution",
    "Scores of training examples",
    """
Three models are trained on all of their data, and again on random halves of it: an MLP on 600 of scikit-learn's digits
(128 halves), a convolutional network on 400 of them (64 halves), and a language model on the text of scikit-learn's
descriptions of its data, which predicts each of the 16 characters of a sequence from the four before it by a hidden
layer (64 halves). Training is by full batches with momentum and a weight decay of 0.001, and deterministic.

LDS is the linear datamodeling score: the rank correlation, over the halves, of the summed scores with the log-odds of
the right label after training on that half, as a mean over 100 test examples (64 sequences). A perfect score is 1, less
the effects that are not a sum over the examples. "One left out" is the correlation (Pearson) of the scores with what
training without one example changes, over 64 random examples, as a mean over the test examples. AUC says whether the
scores find wrong labels: one label in twenty is moved to another class, the model is trained on all examples, and minus
the sum of an example's scores over the test examples is its suspicion. All three are those at the damping with the
highest LDS, which is chosen on the same halves. Dampings are multiples of the mean squared norm of the gradients,
`relative(…)`, or of the weight decay.

"kept" is what a method keeps of each training example, so that it scores further test examples without that example's
gradient. The time is that of all scores from the parameters, without compiling; the memory is the temporary memory of
the compiled program. The Fisher matrix of EK-FAC has labels that are drawn from the model, 8 times for each example.
The weights of the dense layers hold the biases as a column, so that both are in one block, but for the row "biases
apart".""",
    (
        report.label("LDS"),
        report.label("one left out"),
        report.label("AUC"),
        report.label("damping"),
        report.label("kept, bytes"),
        report.milliseconds(SCORES, "time, ms"),
        report.mebibytes(SCORES, "memory, MiB"),
    ),
    workloads,
    measure,
    note=lambda rows: "\n\n".join(line for row in rows for line in row.lines),
)
