"""Two layers and a loss with their gradients in NumPy: an oracle for float32 at real sizes, without XLA.

Rounding is bounded entry by entry: a sum of n terms is off by about √n u Σ|term| (Higham and Mary 2019; u = 2⁻²⁴).
So each expected result comes with its magnitude, the same formula with M in place of G. M is computed from absolute
values, and nothing in it cancels.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import PerExampleGrads, curvature, per_example_grad

H = 16


class Size(NamedTuple):
    """The numbers of examples, outputs and inputs."""

    B: int
    O: int  # noqa: E741
    D: int

    @property
    def rounding(self) -> float:
        """The rounding of the longest sum, three times: in both layers, and in the operation on the gradients."""
        return 3 * 2.0**-24 * max(self) ** 0.5


class TwoLayers(NamedTuple):
    """W₂ tanh(W₁x + b): parameters and a batch that float32 holds exactly, and the logits in float64."""

    params: dict[str, np.ndarray]
    x: np.ndarray
    y: np.ndarray
    logits: np.ndarray

    @property
    def size(self) -> Size:
        return Size(len(self.x), self.logits.shape[1], self.x.shape[1])

    @property
    def arguments(self) -> tuple[Any, np.ndarray, np.ndarray]:
        return self.params, self.x, self.y

    @property
    def p(self) -> np.ndarray:
        """[B, O], the softmax of the logits."""
        e = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    @property
    def labels(self) -> np.ndarray:
        return np.eye(self.size.O)[self.y]

    @property
    def G(self) -> np.ndarray:
        """[B, parameters], the gradients of the softmax loss."""
        return self.gradients((self.p - self.labels)[:, None])

    @property
    def M(self) -> np.ndarray:
        """G's magnitude."""
        return self.magnitudes((self.p + self.labels)[:, None])

    def gradients(self, cotangents: np.ndarray) -> np.ndarray:
        """[B, R, O] → [B·R, parameters], the gradients of cotangents · outputs."""
        W, x = np.float64(self.params["out"]), np.float64(self.x)
        h = np.tanh(x @ np.float64(self.params["in"]).T + self.params["b"])
        return _joined(cotangents, cotangents @ W * (1 - h**2)[:, None], x, h)

    def magnitudes(self, cotangents: np.ndarray) -> np.ndarray:
        """The same with absolute values; 1 stands for a unit and its slope."""
        W, x = (np.abs(np.float64(a)) for a in (self.params["out"], self.x))
        return _joined(np.abs(cotangents), np.abs(cotangents) @ W, x, np.ones((len(x), H)))

    @property
    def large(self) -> np.ndarray:
        """[B], the relative change of a softmax's probabilities for a relative change of the logits."""
        return 1 + np.abs(self.logits).max(1)

    def root(self) -> tuple[np.ndarray, np.ndarray]:
        """S [B, O, O] and r [B, O] of the softmax: diag(p) - ppᵀ = SSᵀ, Sr = p - label."""
        p, own = self.p, np.eye(self.size.O, dtype=bool)
        others = np.where(own, 0, p[:, None, :]).sum(2)
        S = np.where(own, (np.sqrt(p) * others)[:, :, None], -p[:, :, None] * np.sqrt(p)[:, None, :])
        return S, -self.labels / np.sqrt(p)

    def split(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """[…, parameters] as the parameters' tree."""
        sizes = [a.size for a in self.params.values()]
        parts = np.split(vectors, np.cumsum(sizes)[:-1], -1)
        return {
            k: part.reshape(*part.shape[:-1], *a.shape) for (k, a), part in zip(self.params.items(), parts, strict=True)
        }


@functools.lru_cache(maxsize=3)
def two_layers(size: Size, scale: float = 1.0, seed: int = 0) -> TwoLayers:
    """`scale` multiplies the last layer; from about 10 on, the softmax is saturated on most examples."""
    B, O, D = size  # noqa: E741
    rng = np.random.default_rng(seed)
    rounded = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {"b": rounded(H), "in": rounded(H, D) / 2 ** np.float32(round(np.log2(D) / 2)), "out": rounded(O, H)}
    params["out"] *= np.float32(scale / 2)
    x = rounded(B, D)
    hidden = np.tanh(np.float64(x) @ np.float64(params["in"]).T + params["b"])
    return TwoLayers(params, x, np.arange(B, dtype=np.int32) % O, hidden @ np.float64(params["out"]).T)


def _joined(cotangents: np.ndarray, delta: np.ndarray, x: np.ndarray, h: np.ndarray) -> np.ndarray:
    """One array, in the order of the parameters: b, in, out."""
    n = cotangents.shape[0] * cotangents.shape[1]
    parts = (delta, delta[..., None] * x[:, None, None, :], cotangents[..., None] * h[:, None, None, :])
    return np.concatenate([part.reshape(n, -1) for part in parts], 1)


def model(params: Any, x: Any) -> Any:
    return params["out"] @ jnp.tanh(params["in"] @ x + params["b"])


def loss(params: Any, x: Any, y: Any) -> Any:
    return curvature.softmax.value(model(params, x), y)


def gradients(params: Any, x: Any, y: Any) -> PerExampleGrads:
    return per_example_grad(loss)(params, x, y)


def value_magnitude(data: TwoLayers) -> Any:
    """The magnitude of every loss, that of two logits."""
    return 2 * (np.abs(data.logits).max(1) + np.abs(np.float64(data.params["out"])).sum(1).max())


def direction(data: TwoLayers) -> np.ndarray:
    P = sum(a.size for a in data.params.values())
    return np.float64(np.float32(np.random.default_rng(1).normal(size=P)))


# --- Which sizes, and how they are compared --------------------------------------------------------------------------

SIZES = [Size(B, O, D) for B in (64, 256, 1000) for O in (10, 100) for D in (64, 512)]  # noqa: E741
NUMBERS = 1e7  # the most entries of gradients to materialize at once


class Claim(NamedTuple):
    """function(params, x, y) is `expected`, off by no more than rounding · magnitude, entry by entry."""

    function: Callable[..., Any]
    expected: Any
    magnitude: Any
    jitted: bool = True


class Claims(dict[str, Callable[[TwoLayers], Claim]]):
    """Claims about a batch by name, and the sizes at which each is tested."""

    def __init__(self) -> None:
        self.runs: list[Any] = []

    def __call__(self, rows: Callable[[Size], int] = lambda s: s.B, most: int = 10_000) -> Any:
        """A decorator; `rows` and `most` as in `drawn`."""

        def register(function: Callable[[TwoLayers], Claim]) -> Callable[[TwoLayers], Claim]:
            self[function.__name__] = function
            self.runs += drawn(function.__name__, rows, most)
            return function

        return register


def drawn(name: str, rows: Callable[[Size], int] = lambda s: s.B, most: int = 10_000) -> list[Any]:
    """One size for every number of examples, chosen by the name from those with at most `most` rows."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    possible = [s for s in SIZES if rows(s) <= most and rows(s) * H * (1 + s.D + s.O) <= NUMBERS]
    of_each = [[s for s in possible if s.B == B] for B in (64, 256, 1000)]
    found = [sizes[rng.integers(len(sizes))] for sizes in of_each if sizes]
    return [pytest.param(name, s, id=f"{name}-{s.B}-{s.O}-{s.D}") for s in found]


def check(claim: Claim, data: TwoLayers) -> None:
    with jax.enable_x64(False):
        found = (jax.jit(claim.function) if claim.jitted else claim.function)(*data.arguments)
    assert_held(found, claim.expected, claim.magnitude, data.size.rounding)


def single(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def lengths(A: np.ndarray) -> np.ndarray:
    return np.sqrt((A**2).sum(1))


def assert_held(found: Any, expected: Any, magnitude: Any, rounding: float, rounded_to: float = 0.0) -> None:
    """|found - expected| ≤ rounding · magnitude + rounded_to · |expected|, entry by entry."""
    leaves, treedef = jax.tree.flatten(found)
    expected, magnitude = treedef.flatten_up_to(expected), treedef.flatten_up_to(magnitude)
    for a, b, m in zip(leaves, expected, magnitude, strict=True):
        assert a.dtype != np.float64
        assert a.shape == np.shape(b)
        error, allowed = np.abs(np.float64(a) - b), rounding * np.broadcast_to(m, a.shape) + rounded_to * np.abs(b)
        worst = (error / np.where(allowed == 0, 1, allowed)).max(initial=0, where=allowed != 0)
        assert worst <= 1, f"off by {worst:.3g} times the rounding"
        assert not error[allowed == 0].any()


# --- Systems that are solved -----------------------------------------------------------------------------------------


class Solved(NamedTuple):
    """W = (K + ridge·I)⁻¹ R of a Gram matrix K known to rounding, and W's magnitude."""

    W: np.ndarray
    magnitude: np.ndarray


def solved(
    K: np.ndarray, diagonal: np.ndarray, ridge: float, right: np.ndarray, right_magnitude: np.ndarray | float
) -> Solved:
    """The solution, and its magnitude if K is off by rounding · E and the right side by rounding · right_magnitude.

    With A = K + ridge·I, W moves by A⁻¹(δR - δK W). E_ij = m_i m_j, m_i² = diagonal_i + ridge, covers the rounding of
    products of rows whose magnitudes have these squared lengths, and a Cholesky decomposition's, whose factor's rows
    have the lengths √A_ii. Errors of mean zero add up as roots do.
    """
    inverse, m2 = np.linalg.inv(K + ridge * np.eye(len(K))), diagonal + ridge
    W = inverse @ right
    moved = right_magnitude**2 + np.multiply.outer(m2, m2 @ W**2)
    return Solved(W, np.sqrt(inverse**2 @ moved))


def root_of_squares(weights: np.ndarray, A: np.ndarray) -> np.ndarray:
    """√((weights ⊙ weights)(A ⊙ A)), the size of a sum of terms with mean zero."""
    return np.sqrt(weights**2 @ A**2)
