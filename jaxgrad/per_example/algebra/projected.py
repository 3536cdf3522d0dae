"""Projections of one parameter's gradients onto a few numbers, from the sides of their products.

The projection of Σ_t δ_t a_tᵀ by P and Q is Σ_t (P δ_t)(Q a_t)ᵀ: T·k(F + K) + T·k² operations for k rows in each
matrix, whatever the parameter's size. P and Q are given for the parameter's axes; `_read` takes from them what lies
where the product lies in the parameter, so that transposes, slices and shared uses of a weight need no care.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra import product
from jaxgrad.per_example.algebra.chunks import chunk_size, map_examples
from jaxgrad.per_example.algebra.constructors import dense
from jaxgrad.per_example.algebra.factors import Factor, accumulator, is_nothing, written_out
from jaxgrad.per_example.algebra.mapped import Common, of_examples
from jaxgrad.per_example.algebra.place import Labels, labels_of, put, read
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.projection_sides import Axes, Sides, exact
from jaxgrad.per_example.algebra.rows import Lookup, with_values
from jaxgrad.precision import added, contracted, working_dtype

MATERIALIZED_BYTES = 16 * 2**20
"""How many bytes are materialized at once for gradients that have no product to project."""

UNBOUNDED = 2**62
"""The size that NumPy may give to intermediate arrays when it orders a contraction, so that the order has no limit."""

Operand = tuple[Array, Labels]


def projected(leaf: Sequence[Factor], sides: Sides) -> Array:
    """[B, *sides.result(shape)]: the projections of Σ_i f_i, in the accumulator's dtype."""
    dtype = accumulator(*leaf)
    total = added([_projected(f, sides, dtype) for f in leaf])
    return total * jnp.asarray(sides.scale, total.dtype)


def _projected(f: Factor, sides: Sides, dtype: jnp.dtype) -> Array:
    B, shape = of_examples(f)[0].shape[0], f.layout.shape
    if isinstance(f, Product) and is_nothing(f):
        return jnp.zeros((B, *sides.result(shape)), dtype)
    if isinstance(f, Common) and not sides.materializes:
        number = f.number.astype(dtype)
        array = _of_arrays(f.array.value[None].astype(dtype), sides, dtype)
        return number.reshape(B, *[1] * (array.ndim - 1)) * array
    if isinstance(f, Product) and not sides.materializes:
        found = _of_products(f, sides, dtype)
        if found is not None:
            return found
    size = chunk_size(2 * f.layout.size * dtype.itemsize, B, MATERIALIZED_BYTES)
    return map_examples(lambda f: _of_arrays(written_out(f).astype(dtype), sides, dtype), size, f)


def _of_arrays(values: Array, sides: Sides, dtype: jnp.dtype) -> Array:
    """The projections of materialized gradients [B, *shape]."""
    if sides.materializes:
        values, sides = values * sides.weights.astype(dtype)[None], sides.replace(weights=None)
    return jax.vmap(lambda a: _of_one(dense(a, a.shape), sides, dtype))(values)


def _of_products(f: Product, sides: Sides, dtype: jnp.dtype) -> Array | None:
    """The projections of products; None for a lookup in a table whose rows are kept."""
    if f.row is not None:
        row_axis = next(k for k, axis in enumerate(f.place) if f.row in axis.labels)
        if row_axis not in sides.summed:
            return None
        f = with_values(f, *Lookup.of(f).valid())  # what padding ids hold does not count, even if it is NaN
    return jax.vmap(lambda f: _of_one(product.spread(f), sides, dtype))(f)


def _of_one(p: Product, sides: Sides, dtype: jnp.dtype) -> Array:
    """The projection of one example's product."""
    matrices: list[Operand] = []
    names: list[int] = []
    for matrix, axes in sides.matrices:
        names.append(len(p.sizes) + len(names))
        matrices.append(_read(p, matrix, axes, names[-1]))
    operands = [(p.left, p.left_labels)]
    if p.row is not None:
        ids, labels = operands.pop()
        matrices = [_looked_up(operand, p.row, ids, labels) for operand in matrices]
    if p.right is not None:
        operands.append((p.right, p.right_labels))
    if p.windows:
        operands, matrices = _without_windows(p, matrices)
    kept = sides.kept(len(p.place))
    place = [p.place[axis] for axis in kept]
    labels = labels_of(place)
    value = _contracted([*operands, *matrices], (*names, *labels), dtype)
    value = put(value, labels, place, p.sizes)
    value = jnp.moveaxis(value, range(len(names)), range(-len(names), 0))
    if sides.weights is None:
        return value
    weights = sides.weights.astype(dtype).reshape([sides.weights.shape[axis] for axis in kept])
    return value * weights.reshape(*weights.shape, *[1] * len(names))


def _read(p: Product, matrix: Array, axes: Axes, name: int) -> Operand:
    """The entries of the matrix where the product lies, with an axis for each of its labels."""
    place = [p.place[axis] for axis in axes]
    labels = labels_of(place)
    return read(exact(matrix), labels, place, p.sizes), (name, *labels)


def _looked_up(operand: Operand, row: int, ids: Array, labels: Labels) -> Operand:
    """The rows of a matrix that the ids name, in place of all of them."""
    matrix, of_matrix = operand
    if row not in of_matrix:
        return operand
    axis = of_matrix.index(row)
    return jnp.take(matrix, ids, axis), (*of_matrix[:axis], *labels, *of_matrix[axis + 1 :])


def _without_windows(p: Product, matrices: list[Operand]) -> tuple[list[Operand], list[Operand]]:
    """(the two sides, the matrices), where the windows are gone: a matrix that has the kernel's entries, and no other
    labels, is convolved with the image; otherwise the image is unfolded."""
    kernel = set(p.roles[3])
    for k, (matrix, labels) in enumerate(matrices):
        if set(labels[1:]) == kernel:
            return [(p.left, p.left_labels), _convolved(p, matrix, labels)], [*matrices[:k], *matrices[k + 1 :]]
    p = product.unfolded(p)
    return [(p.left, p.left_labels), (p.right, p.right_labels)], matrices


def _convolved(p: Product, matrix: Array, labels: Labels) -> Operand:
    """Q times the image's windows, at every position: a convolution with k features."""
    places, axes = [w.place for w in p.windows], [w.axis for w in p.windows]
    features = [x for x in labels[1:] if x not in places]
    others = [x for x in p.right_labels if x not in axes and x not in features]
    order = [*others, *axes, *features]
    image = p.right.transpose([p.right_labels.index(x) for x in order])
    image = image.reshape(p.count(others), *(p.sizes[x] for x in axes), p.count(features))
    kernel = matrix.transpose([labels.index(x) for x in (*(x for x in places if x in labels), *features, labels[0])])
    kernel = kernel.reshape(*(w.window.places for w in p.windows), p.count(features), matrix.shape[0])
    last = 1 + len(axes)
    spatial = range(1, last)
    if {image.dtype, kernel.dtype} != {jnp.dtype(jnp.bfloat16)}:
        image, kernel = (a.astype(working_dtype(image.dtype)) for a in (image, kernel))
    found = lax.conv_general_dilated(
        image,
        kernel,
        window_strides=[w.window.dilation for w in p.windows],
        padding=[w.window.padding[:2] for w in p.windows],
        lhs_dilation=[w.window.padding[2] + 1 for w in p.windows],
        rhs_dilation=[w.window.stride for w in p.windows],
        dimension_numbers=lax.ConvDimensionNumbers(
            (0, last, *spatial), (last, last - 1, *range(last - 1)), (0, last, *spatial)
        ),
        preferred_element_type=working_dtype(image.dtype),
    )
    positions = [w.position for w in p.windows if w.position in p.roles[1]]
    left = (*others, *positions)
    return found.reshape(*(p.sizes[x] for x in left), matrix.shape[0]), (*left, labels[0])


def _contracted(operands: list[Operand], out: Labels, dtype: jnp.dtype) -> Array:
    """Sum the product of all operands over the labels that are not in `out`, in the cheapest order of pairs."""
    while len(operands) > 1:
        names = {x: k for k, x in enumerate(dict.fromkeys(x for _, labels in operands for x in labels))}
        shapes = [part for a, labels in operands for part in (np.broadcast_to(0, a.shape), [names[x] for x in labels])]
        steps, _ = np.einsum_path(*shapes, [names[x] for x in out], optimize=("optimal", UNBOUNDED))
        pair = steps[1][:2]
        (a, labels), (b, labels_) = (operands[k] for k in pair)
        operands = [operand for k, operand in enumerate(operands) if k not in pair]
        later = {*out, *(x for _, others in operands for x in others)}
        both = tuple(x for x in dict.fromkeys((*labels, *labels_)) if x in later)
        operands.append((contracted(_spec(names, (labels, labels_), both), a, b, dtype), both))
    ((a, labels),) = operands
    names = {x: k for k, x in enumerate(labels)}
    return jnp.einsum(_spec(names, (labels,), out), a.astype(dtype))


def _spec(names: dict[int, int], inputs: Sequence[Labels], out: Labels) -> str:
    def letters(labels: Labels) -> str:
        return "".join(chr(ord("a") + names[x]) for x in labels)

    return ",".join(map(letters, inputs)) + "->" + letters(out)
