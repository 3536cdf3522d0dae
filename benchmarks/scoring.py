"""The methods of the theme `attribution`: from parameters and data to scores, and the bytes that each method keeps."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax

import jaxgrad as jg
from benchmarks.retraining import Task, mlp
from jaxgrad import attribution, curvature

DRAWS = 8
"""How many times the labels of each example are drawn for the Fisher matrix."""
OF_NORMS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Dampings as multiples of the mean squared norm."""
OF_DECAY = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Dampings as multiples of the weight decay."""

Scores = Callable[..., jax.Array]


class Method(NamedTuple):
    """A way to score training examples.

    Attributes:
        scores: (checkpoints, train, test, damping) → [C, B].
        dampings: what is tried, as multiples of `unit`.
        unit: what the dampings multiply: the "norms" or the "decay"; empty for none.
        kept: bytes for each training example with which further test examples are scored without its gradient.
        which: the checkpoints that it takes: "last", "checkpoints" or "halves".
    """

    scores: Scores
    dampings: tuple[float, ...]
    unit: str
    kept: float
    which: str = "last"


def methods(task: Task, params: Any) -> dict[str, Method]:
    """The methods for a task, by name."""
    gradients = jg.per_example_grad(task.loss)
    kept = bytes_each(gradients, params, task)
    drawn = "influence, EK-FAC, labels drawn from the model"
    found = {
        "TracIn, last checkpoint": Method(tracin(task), (0.0,), "", kept),
        "TracIn, five checkpoints": Method(tracin(task), (0.0,), "", 5 * kept, "checkpoints"),
    }
    for size in (64, 512):
        found[f"TRAK, {size} random numbers"] = Method(projected_trak(task, size), OF_NORMS, "norms", 4 * size)
    found["TRAK, exact kernel"] = Method(exact_trak(task), OF_NORMS, "norms", kept)
    found["TRAK, exact kernel, models of five halves"] = Method(exact_trak(task), OF_NORMS, "norms", 5 * kept, "halves")
    for size in (4, 8, 16):
        sides = attribution.random_sides(params, jax.random.key(0), size)
        results = jax.tree.map(
            lambda s, leaf: math.prod(s.result(leaf.shape)), sides, params, is_leaf=lambda s: hasattr(s, "result")
        )
        numbers = sum(jax.tree.leaves(results))
        found[f"LoGra, {size} rows and columns"] = Method(logra(gradients, sides), OF_NORMS, "norms", 4 * numbers)
    found["influence, empirical Fisher matrix"] = Method(fisher(gradients), OF_NORMS, "norms", kept)
    found["influence, EK-FAC of the empirical Fisher matrix"] = Method(
        ekfac(task.loss, given_labels), OF_NORMS, "norms", kept
    )
    found[drawn] = Method(ekfac(task.loss, drawn_labels(task), task.decay), OF_DECAY, "decay", kept)
    if task.model is mlp:
        found[f"{drawn}, biases apart"] = Method(biases_apart(task), OF_DECAY, "decay", kept)
    if task.positions == 1:
        rows = curvature.gauss_newton(task.model, curvature.softmax)
        found["influence, Gauss-Newton matrix"] = Method(
            gauss_newton(task, rows), OF_DECAY, "decay", bytes_each(rows, params, task)
        )
    if task.model is mlp:  # for the other models its many products take minutes
        found["influence, Hessian, by conjugate gradients"] = Method(hessian(task), OF_DECAY[3:6], "decay", kept)
    return found


def bytes_each(function: Any, params: Any, task: Task) -> float:
    """Bytes for each training example of what a function of the parameters and a batch returns."""
    result = jax.eval_shape(function, params, *task.train)
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(result)) / len(task.train[1])


def tracin(task: Task) -> Scores:
    def scores(checkpoints: Any, train: Any, test: Any, _: Any) -> jax.Array:
        return attribution.tracin(task.loss)(checkpoints, [1.0] * len(checkpoints), train, test)

    return scores


def exact_trak(task: Task) -> Scores:
    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        return attribution.trak(task.output, curvature.relative(ratio))(checkpoints, train, test)

    return scores


def projected_trak(task: Task, size: int) -> Scores:
    """TRAK as published: the gradients of the output, projected by one random matrix."""
    gradients = jg.per_example_value_and_grad(task.output)

    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        (outputs, g), (_, test_g) = (gradients(checkpoints[0], *data) for data in (train, test))
        rows, queries = (attribution.random_projection(x, jax.random.key(0), size) for x in (g, test_g))
        return through_rows(rows, queries, ratio) * jax.nn.sigmoid(-outputs)[None]

    return scores


def logra(gradients: Any, sides: Any) -> Scores:
    """Influence through the empirical Fisher matrix of the gradients that are projected from two sides."""

    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        rows, queries = (attribution.project(gradients(checkpoints[0], *data), sides) for data in (train, test))
        return through_rows(rows, queries, ratio)

    return scores


def through_rows(rows: jax.Array, queries: jax.Array, ratio: Any) -> jax.Array:
    """queries (rowsᵀrows/B + μI)⁻¹ rowsᵀ / B for rows [B, S] and queries [C, S]."""
    kernel = rows @ rows.T
    ridge = ratio * jnp.trace(kernel)
    return jax.scipy.linalg.solve(kernel + ridge * jnp.eye(len(kernel)), rows @ queries.T, assume_a="pos").T


def fisher(gradients: Any) -> Scores:
    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        train_g, test_g = (gradients(checkpoints[0], *data) for data in (train, test))
        return attribution.influence(train_g, test_g, curvature.relative(ratio))

    return scores


def gauss_newton(task: Task, rows: Any) -> Scores:
    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        test_g = jg.per_example_grad(task.loss)(checkpoints[0], *test)
        return attribution.influence(rows(checkpoints[0], *train), test_g, ratio * task.decay)

    return scores


def hessian(task: Task, tolerance: float = 1e-2) -> Scores:
    """Influence through the Hessian; NaN if a system is not solved, as where the damped matrix is indefinite."""

    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        product = curvature.hessian_vector_product(task.loss)
        train_g, test_g = (jg.per_example_grad(task.loss)(checkpoints[0], *data) for data in (train, test))
        through = lambda v: product(checkpoints[0], v, *train)  # noqa: E731
        found = attribution.influence_by_cg(through, train_g, test_g, ratio * task.decay, tolerance=tolerance)
        return jnp.where(found.residuals.max() <= 2 * tolerance, found.scores, jnp.nan)

    return scores


def smallest_eigenvalue(task: Task, params: Any) -> float:
    """The smallest eigenvalue of the Hessian of the mean training loss."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    mean = lambda a: jax.vmap(task.loss, (None, 0, 0))(unravel(a), *task.train).mean()  # noqa: E731
    return float(jnp.linalg.eigvalsh(jax.jit(jax.hessian(mean))(flat))[0])


# --- EK-FAC ----------------------------------------------------------------------------------------------------------

Labels = Callable[[Any, jax.Array, jax.Array], jax.Array]


def given_labels(_: Any, __: jax.Array, labels: jax.Array) -> jax.Array:
    """Those of the data [1, B, …], for the empirical Fisher matrix."""
    return labels[None]


def drawn_labels(task: Task) -> Labels:
    """Those that are drawn from the model [DRAWS, B, …], for the Fisher matrix."""

    def labels(params: Any, x: jax.Array, _: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), DRAWS)
        return jax.vmap(lambda key: task.drawn_labels(params, x, key))(keys)

    return labels


def ekfac(loss: Any, labels: Labels, decay: float | None = None, biases: Any = "joint") -> Scores:
    """Influence through EK-FAC; the damping is a multiple of the decay, or of the mean squared norm."""
    gradients, kfac = jg.per_example_grad(loss), curvature.kfac(loss, biases=biases)

    def scores(checkpoints: Any, train: Any, test: Any, ratio: Any) -> jax.Array:
        params, x = checkpoints[0], train[0]
        draws = labels(params, *train)
        factors = averaged(lambda y: kfac(params, x, y), draws)
        F = averaged(lambda y: curvature.ekfac(factors, gradients(params, x, y)), draws)
        damping = curvature.relative(ratio) if decay is None else ratio * decay
        return attribution.influence_through(
            lambda v: F.solve(v, damping), gradients(params, *train), gradients(params, *test)
        )

    return scores


def averaged(function: Any, draws: jax.Array) -> Any:
    """The mean over the draws of a function's results, which hold arrays."""
    return jax.tree.map(lambda a: a.mean(0), lax.map(function, draws))


def biases_apart(task: Task) -> Scores:
    """EK-FAC of the same network with biases that are parameters of their own."""

    def apart(params: Any) -> Any:
        return {name: {"W": weights[:, :-1], "b": weights[:, -1]} for name, weights in params.items()}

    def together(parts: Any) -> Any:
        return {name: jnp.append(p["W"], p["b"][:, None], 1) for name, p in parts.items()}

    def loss(parts: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        hidden = jnp.tanh(parts["in"]["W"] @ x + parts["in"]["b"])
        return curvature.softmax.value(parts["out"]["W"] @ hidden + parts["out"]["b"], label)

    draw = drawn_labels(task)
    labels = lambda parts, x, y: draw(together(parts), x, y)  # noqa: E731
    scores = ekfac(loss, labels, task.decay, biases="apart")
    return lambda checkpoints, *rest: scores([apart(checkpoints[0])], *rest)
