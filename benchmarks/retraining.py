"""Models that are trained again on subsets of their data: what scores of training examples should predict."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad import attribution, curvature

MOMENTUM, DECAY = 0.9, 1e-3
LEFT_OUT = 64
"""How many times the models are trained without one example."""
Data = tuple[jax.Array, jax.Array]


class Task(NamedTuple):
    """A model, its data, and the deterministic training on any subset: full batches, momentum, weight decay.

    Attributes:
        model: (params, x) → logits [O], or [T, O] for a sequence with T labels.
        train, test: (inputs [B, …], labels [B] or [B, T]).
        start: the parameters before training.
        steps: how many steps training takes.
        rate: the learning rate.
        at_once: how many subsets are trained on at the same time.
    """

    model: Callable[[Any, jax.Array], jax.Array]
    train: Data
    test: Data
    start: Any
    steps: int
    rate: float
    at_once: int = 16

    @property
    def positions(self) -> int:
        """T, the number of labels of an example."""
        return self.train[1][0].size

    @property
    def decay(self) -> float:
        """The weight decay in units of the loss, which is a sum over positions."""
        return DECAY * self.positions

    def loss(self, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        return self._over_positions(curvature.softmax.value, params, x, labels)

    def output(self, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        """The log-odds of the right label, as a mean over positions."""
        return self._over_positions(attribution.log_odds, params, x, labels) / self.positions

    def _over_positions(self, function: Any, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = self.model(params, x)
        return jax.vmap(function)(logits.reshape(-1, logits.shape[-1]), labels.ravel()).sum()

    def drawn_labels(self, params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        """Labels of the inputs [B, …] that are drawn from the model."""
        return jax.random.categorical(key, jax.vmap(self.model, (None, 0))(params, x))

    def fit(self, subset: jax.Array, checkpoints: int = 1) -> Any:
        """The parameters at equally spaced checkpoints of a training run on the subset, a mask; the last at its end."""

        def regularized(params: Any) -> jax.Array:
            losses = jax.vmap(self.loss, (None, 0, 0))(params, *self.train) / self.positions
            squares = [(a**2).sum() for a in jax.tree.leaves(params)]
            return jnp.where(subset, losses, 0).sum() / subset.sum() + DECAY / 2 * sum(squares)

        def step(state: Any, _: Any) -> Any:
            params, velocity = state
            velocity = jax.tree.map(lambda v, d: MOMENTUM * v + d, velocity, jax.grad(regularized)(params))
            return (jax.tree.map(lambda p, v: p - self.rate * v, params, velocity), velocity), None

        def part(state: Any, _: Any) -> Any:
            state, _ = lax.scan(step, state, None, length=self.steps // checkpoints)
            return state, state[0]

        return lax.scan(part, (self.start, jax.tree.map(jnp.zeros_like, self.start)), None, length=checkpoints)[1]

    def fits(self, subsets: jax.Array) -> Any:
        """The parameters after training on each subset [M, B], with a leading axis M."""
        last = lambda subset: jax.tree.map(lambda a: a[0], self.fit(subset))  # noqa: E731
        return lax.map(last, subsets, batch_size=self.at_once)

    def outputs(self, params: Any) -> jax.Array:
        """[M, C]: the outputs on the test examples, of M models."""
        return jax.vmap(jax.vmap(self.output, (None, 0, 0)), (0, None, None))(params, *self.test)

    def on_wrong_labels(self) -> tuple["Task", jax.Array]:
        """(the task with one label in twenty moved to another class, the mask of those)."""
        x, labels = self.train
        rng = np.random.default_rng(1)
        wrong = rng.permutation(len(labels)) < len(labels) // 20
        classes = int(labels.max()) + 1
        moved = (np.asarray(labels) + rng.integers(1, classes, len(labels))) % classes
        return self._replace(train=(x, jnp.where(wrong, moved, labels).astype(labels.dtype))), jnp.asarray(wrong)

    def checkpoints(self) -> list[Any]:
        """The parameters at five points of the training on all examples."""
        return unstacked(jax.jit(lambda: self.fit(jnp.ones(len(self.train[0]), bool), 5))())


class Retrained(NamedTuple):
    """A task after all training, with what scores need and what they are measured by.

    Attributes:
        task: the task.
        checkpoints: parameters during the training on all examples; the last are those of the model to explain.
        halves: parameters after training on five random halves.
        subsets: [M, B], random halves.
        outputs: [M, C], the outputs on the test examples after training on each subset.
        all_but_one: [LEFT_OUT, B], subsets that leave out one random example each.
        outputs_without_one: [LEFT_OUT, C], the outputs after training on each of `all_but_one`.
    """

    task: Task
    checkpoints: list[Any]
    halves: list[Any]
    subsets: jax.Array
    outputs: jax.Array
    all_but_one: jax.Array
    outputs_without_one: jax.Array

    @property
    def params(self) -> Any:
        """The parameters of the model to explain."""
        return self.checkpoints[-1]

    def score(self, scores: jax.Array) -> float:
        """The mean linear datamodeling score over the test examples."""
        return float(attribution.linear_datamodeling_score(scores, self.subsets, self.outputs).mean())

    def score_left_out(self, scores: jax.Array) -> float:
        """The mean correlation with the effects of leaving out one example, over the test examples."""
        return float(attribution.leave_one_out_correlation(scores, self.all_but_one, self.outputs_without_one).mean())


def retrained(task: Task, subsets: int) -> Retrained:
    """Train on all examples, and again on random halves and without one example each."""
    B = len(task.train[0])
    masks = attribution.random_subsets(jax.random.key(0), subsets, B)
    all_but_one = attribution.leave_one_out_subsets(B, jax.random.permutation(jax.random.key(2), B)[:LEFT_OUT])
    halves = jax.jit(task.fits)(attribution.random_subsets(jax.random.key(1), 5, B))
    outputs = jax.jit(lambda masks: task.outputs(task.fits(masks)))
    return Retrained(
        task, task.checkpoints(), unstacked(halves), masks, outputs(masks), all_but_one, outputs(all_but_one)
    )


def unstacked(params: Any) -> list[Any]:
    """The parameters at each index of a leading axis."""
    count = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda a, k=k: a[k], params) for k in range(count)]


# --- Models. The last column of a dense layer's weights is its bias. -------------------------------------------------


def dense(weights: jax.Array, x: jax.Array) -> jax.Array:
    """weights [out, in + 1] times (x, 1), for x [in]."""
    return weights @ jnp.append(x, jnp.ones(1, x.dtype))


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return dense(params["out"], jnp.tanh(dense(params["in"], x)))


def conv_net(params: Any, x: jax.Array) -> jax.Array:
    """Two convolutions without padding and a dense layer; x [64] is an image of 8 × 8 pixels."""
    image, layout = x.reshape(1, 8, 8, 1), ("NHWC", "HWIO", "NHWC")
    for name, stride in (("first", 1), ("second", 2)):
        image = jnp.tanh(
            lax.conv_general_dilated(image, params[name], (stride,) * 2, "VALID", dimension_numbers=layout)
        )
    return dense(params["out"], image.ravel())


def language_model(params: Any, x: jax.Array) -> jax.Array:
    """Logits [T, V] of the next character from the four before, x [T, 4]: embeddings and a hidden layer."""
    return jax.vmap(lambda ids: mlp(params, params["embeddings"][ids].ravel()))(x)


class Draw:
    """Random weights, the same in every run; biases start at zero."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def dense(self, out: int, inputs: int) -> jax.Array:
        weights = self.rng.normal(size=(out, inputs)) / inputs**0.5
        return jnp.asarray(np.append(weights, np.zeros((out, 1)), 1), jnp.float32)

    def other(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5, jnp.float32)


def images(train: int, test: int, rng: np.random.Generator) -> list[Data]:
    """Digits of scikit-learn, for training and for tests."""
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    parts = np.split(rng.permutation(len(X))[: train + test], [train])
    return [(jnp.asarray(X[k] / 16, jnp.float32), jnp.asarray(labels[k], jnp.int32)) for k in parts]


def text(train: int, test: int, length: int, rng: np.random.Generator) -> tuple[list[Data], str]:
    """Sequences of a text for training and for tests, and its alphabet: the descriptions of scikit-learn's data."""
    from sklearn import datasets

    loaders = (datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer, datasets.load_diabetes)
    words = " ".join(load().DESCR for load in loaders).lower().split()
    whole = " ".join("".join(c for c in word if c.isalpha() and c.isascii()) for word in words)
    alphabet = "".join(sorted(set(whole)))
    ids = np.array([alphabet.index(c) for c in whole])
    starts = 4 + length * rng.permutation((len(ids) - 4) // length)[: train + test]
    places = starts[:, None] + np.arange(length)
    x, labels = ids[places[..., None] + np.arange(-4, 0)], ids[places]
    parts = np.split(np.arange(train + test), [train])
    return [(jnp.asarray(x[k], jnp.int32), jnp.asarray(labels[k], jnp.int32)) for k in parts], alphabet


@functools.cache
def digits(train: int = 600, test: int = 100, subsets: int = 128, steps: int = 250, hidden: int = 32) -> Retrained:
    """An MLP on scikit-learn's digits, trained again on random halves."""
    rng = np.random.default_rng(0)
    data, draw = images(train, test, rng), Draw(rng)
    start = {"in": draw.dense(hidden, 64), "out": draw.dense(10, hidden)}
    return retrained(Task(mlp, data[0], data[1], start, steps, 0.2), subsets)


@functools.cache
def convolutional(train: int = 400, test: int = 100, subsets: int = 64, steps: int = 200) -> Retrained:
    """A convolutional network on scikit-learn's digits, trained again on random halves."""
    rng = np.random.default_rng(0)
    data, draw = images(train, test, rng), Draw(rng)
    start = {"first": draw.other(3, 3, 1, 8), "second": draw.other(3, 3, 8, 16), "out": draw.dense(10, 64)}
    return retrained(Task(conv_net, data[0], data[1], start, steps, 0.1, at_once=1), subsets)


@functools.cache
def characters(train: int = 256, test: int = 64, subsets: int = 64, steps: int = 200, length: int = 16) -> Retrained:
    """A language model of characters on the descriptions of scikit-learn's data, trained again on random halves."""
    rng = np.random.default_rng(0)
    (data, alphabet), draw = text(train, test, length, rng), Draw(rng)
    V = len(alphabet)
    start = {"embeddings": 8**0.5 * draw.other(V, 8), "in": draw.dense(32, 32), "out": draw.dense(V, 32)}
    return retrained(Task(language_model, data[0], data[1], start, steps, 0.5, at_once=16), subsets)
