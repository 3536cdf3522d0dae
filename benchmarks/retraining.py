"""A classifier of digits, trained again on subsets of its data: what scores of training examples should predict."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad import attribution, curvature

RATE, MOMENTUM, DECAY = 0.2, 0.9, 1e-3


def model(params: Any, x: jax.Array) -> jax.Array:
    return params["out"] @ jnp.tanh(params["in"] @ x + params["b"]) + params["c"]


def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
    return curvature.softmax.value(model(params, x), label)


def output(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
    return attribution.log_odds(model(params, x), label)


class Task(NamedTuple):
    """Data, and the deterministic training on any subset of it: full batches, momentum, weight decay.

    Attributes:
        train, test: (images [B, 64], labels [B]).
        start: the parameters before training.
        steps: how many steps training takes.
    """

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    start: Any
    steps: int

    def fit(self, subset: jax.Array, checkpoints: int = 1) -> Any:
        """The parameters at equally spaced checkpoints of a training run on the subset, a mask; the last at its end."""

        def regularized(params: Any) -> jax.Array:
            losses = jax.vmap(loss, (None, 0, 0))(params, *self.train)
            squares = [(a**2).sum() for a in jax.tree.leaves(params)]
            return jnp.where(subset, losses, 0).sum() / subset.sum() + DECAY / 2 * sum(squares)

        def step(state: Any, _: Any) -> Any:
            params, velocity = state
            velocity = jax.tree.map(lambda v, d: MOMENTUM * v + d, velocity, jax.grad(regularized)(params))
            return (jax.tree.map(lambda p, v: p - RATE * v, params, velocity), velocity), None

        def part(state: Any, _: Any) -> Any:
            state, _ = lax.scan(step, state, None, length=self.steps // checkpoints)
            return state, state[0]

        return lax.scan(part, (self.start, jax.tree.map(jnp.zeros_like, self.start)), None, length=checkpoints)[1]

    def fits(self, subsets: jax.Array) -> Any:
        """The parameters after training on each subset [M, B], with a leading axis M."""
        last = lambda subset: jax.tree.map(lambda a: a[0], self.fit(subset))  # noqa: E731
        return lax.map(last, subsets, batch_size=16)

    def outputs(self, params: Any) -> jax.Array:
        """[M, C]: the log-odds of the right labels of the test examples, of M models."""
        return jax.vmap(jax.vmap(output, (None, 0, 0)), (0, None, None))(params, *self.test)


class Retrained(NamedTuple):
    """A task after all training, with what scores need and what they are measured by.

    Attributes:
        task: the task.
        checkpoints: parameters during the training on all examples; the last are those of the model to explain.
        halves: parameters after training on five random halves.
        subsets: [M, B], random halves.
        outputs: [M, C], the log-odds on the test examples after training on each subset.
    """

    task: Task
    checkpoints: list[Any]
    halves: list[Any]
    subsets: jax.Array
    outputs: jax.Array

    def score(self, scores: jax.Array) -> float:
        """The mean linear datamodeling score over the test examples."""
        return float(attribution.linear_datamodeling_score(scores, self.subsets, self.outputs).mean())


@functools.cache
def digits(train: int = 600, test: int = 100, subsets: int = 128, steps: int = 250, hidden: int = 32) -> Retrained:
    """An MLP on scikit-learn's digits, trained again on random halves."""
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    parts = np.split(rng.permutation(len(X))[: train + test], [train])
    data = [(jnp.asarray(X[k] / 16, jnp.float32), jnp.asarray(labels[k], jnp.int32)) for k in parts]
    start = {
        "in": jnp.asarray(rng.normal(size=(hidden, 64)) / 8, jnp.float32),
        "b": jnp.zeros(hidden, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(10, hidden)) / hidden**0.5, jnp.float32),
        "c": jnp.zeros(10, jnp.float32),
    }
    task = Task(data[0], data[1], start, steps)
    checkpoints = jax.jit(lambda: task.fit(jnp.ones(train, bool), 5))()
    masks = attribution.random_subsets(jax.random.key(0), subsets, train)
    halves = jax.jit(task.fits)(attribution.random_subsets(jax.random.key(1), 5, train))
    outputs = jax.jit(lambda masks: task.outputs(task.fits(masks)))(masks)
    return Retrained(task, unstacked(checkpoints), unstacked(halves), masks, outputs)


def unstacked(params: Any) -> list[Any]:
    """The parameters at each index of a leading axis."""
    count = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda a, k=k: a[k], params) for k in range(count)]
