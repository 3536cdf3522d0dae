"""Where the entries of a factor's matrices are in their parameter."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


@dataclass(frozen=True)
class Layout:
    """Where the entries of [G, F, K] are: parameter[box].reshape(split).transpose(axes).reshape(G, F, K).

    Outside the box the factor's gradient is zero, because only a part of the parameter was used.

    Attributes:
        shape: the parameter's own shape.
        dtype: the parameter's dtype, in which sums and materialized gradients are returned.
        axes: the permutation of split's axes that brings them into matrix order.
        matrix: (G, F, K).
        split: the box's shape with axes merged or divided; None for the box's shape itself.
        box: (start, size, stride) in each axis of the parameter; None for the whole parameter.

    Example:
        >>> transposed = Layout((5, 3), jnp.dtype(jnp.float32), axes=(1, 0), matrix=(1, 3, 5))
        >>> transposed.to_matrix(jnp.zeros((4, 5, 3))).shape
        (4, 1, 3, 5)
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[int, ...]
    matrix: tuple[int, int, int]
    split: tuple[int, ...] | None = None
    box: tuple[tuple[int, int, int], ...] | None = None

    def __post_init__(self) -> None:
        inside = self.shape if self.box is None else tuple(size for _, size, _ in self.box)
        split = inside if self.split is None else self.split
        object.__setattr__(self, "split", split)
        fits = self.box is None or (
            len(self.box) == len(self.shape)
            and all(i >= 0 and i + (n - 1) * s < d for (i, n, s), d in zip(self.box, self.shape, strict=True) if n)
        )
        if (
            not fits
            or sorted(self.axes) != list(range(len(split)))
            or not math.prod(inside) == math.prod(split) == math.prod(self.matrix)
        ):
            raise ValueError(
                f"Layout: expected axes that permute shape {split} and equally many entries in matrix (G, F, K) and "
                f"the box of the parameter, got axes {self.axes}, matrix {self.matrix}, box {self.box} of {self.shape}."
            )

    @staticmethod
    def of_matrix(F: int, K: int, dtype: jax.typing.DTypeLike) -> "Layout":
        """The layout of a parameter that is itself an [F, K] matrix."""
        return Layout((F, K), jnp.dtype(dtype), (0, 1), (1, F, K))

    @staticmethod
    def of_rows(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> "Layout":
        """The layout of a parameter whose first axis is F and whose other axes together are K."""
        F, K = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        split = (F, K) if len(shape) > 1 else None
        return Layout(shape, jnp.dtype(dtype), (0, 1) if split else tuple(range(len(shape))), (1, F, K), split)

    @property
    def size(self) -> int:
        """Number of entries in the parameter."""
        return math.prod(self.shape)

    def same_place(self, other: "Layout") -> bool:
        """True if each entry of [G, F, K] is at the same place in the parameter."""
        return (self.axes, self.matrix, self.split, self.box) == (other.axes, other.matrix, other.split, other.box)

    def disjoint(self, other: "Layout") -> bool:
        """True if the two boxes are known to have no entry in common."""
        pairs = zip(self.box or (), other.box or (), strict=False)
        return any(_apart(a, b) or _apart(b, a) for a, b in pairs)

    def to_matrix(self, value: Array) -> Array:
        """`[*batch, *shape]` → `[*batch, G, F, K]`."""
        batch = value.ndim - len(self.shape)
        if self.box is not None:
            part = tuple(slice(i, i + (n - 1) * s + 1 if n else i, s) for i, n, s in self.box)
            value = value[(*[slice(None)] * batch, *part)]
        value = value.reshape(*value.shape[:batch], *self._split)
        value = value.transpose(*range(batch), *(batch + a for a in self.axes))
        return value.reshape(*value.shape[:batch], *self.matrix)

    def from_matrix(self, value: Array) -> Array:
        """`[*batch, G, F, K]` → `[*batch, *shape]`."""
        batch = value.ndim - 3
        value = value.reshape(*value.shape[:batch], *(self._split[a] for a in self.axes))
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        value = value.transpose(*range(batch), *(batch + a for a in inverse))
        if self.box is None:
            return value.reshape(*value.shape[:batch], *self.shape)
        value = value.reshape(*value.shape[:batch], *(n for _, n, _ in self.box))
        edges = [
            (i, d - i - (n - 1) * s - 1 if n else d - i, s - 1)
            for (i, n, s), d in zip(self.box, self.shape, strict=True)
        ]
        return lax.pad(value, jnp.zeros((), value.dtype), [*[(0, 0, 0)] * batch, *edges])

    @property
    def _split(self) -> tuple[int, ...]:
        assert self.split is not None
        return self.split


def _apart(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """True if a ends before b starts, or if their strides are equal and their remainders differ."""
    (i, n, s), (j, m, t) = a, b
    return n == 0 or m == 0 or i + (n - 1) * s < j or (s == t and (i - j) % s != 0)
