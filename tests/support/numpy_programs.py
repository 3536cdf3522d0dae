"""Jaxprs evaluated in NumPy, equation by equation: nothing is compiled, so that a test can evaluate thousands."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jaxgrad import _jax


def evaluated(closed: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of a ClosedJaxpr. A primitive that is not in `RULES` is evaluated by JAX."""
    program = _jax.program_of(closed)
    known = dict(zip(program.jaxpr.constvars, map(np.asarray, program.consts), strict=True))
    known |= dict(zip(program.jaxpr.invars, map(np.asarray, operands), strict=True))

    def read(v: Any) -> Any:
        return np.asarray(v.val, v.aval.dtype) if isinstance(v, _jax.Literal) else known[v]

    for eqn in program.jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if eqn.primitive is _jax.jit_p:
            results = evaluated(eqn.params["jaxpr"], values)
        elif eqn.primitive in RULES:
            results = RULES[eqn.primitive](*values, **eqn.params)
        else:
            results = _jax.bind(eqn, values)
        results = results if isinstance(results, list | tuple) else [results]
        for v, result in zip(eqn.outvars, results, strict=True):
            assert np.shape(result) == v.aval.shape, (eqn, np.shape(result))
            known[v] = np.asarray(result, v.aval.dtype)
    return [read(v) for v in program.jaxpr.outvars]


def _dot_general(a: Any, b: Any, dimension_numbers: Any, **_: Any) -> np.ndarray:
    (contracted, contracted_), (batch, batch_) = dimension_numbers
    labels = list(range(a.ndim))
    labels_ = [a.ndim + k for k in range(b.ndim)]
    for k, k_ in (*zip(contracted, contracted_, strict=True), *zip(batch, batch_, strict=True)):
        labels_[k_] = labels[k]
    shared = {*contracted, *batch}
    out = [*batch, *(k for k in labels if k not in shared), *(k for k in labels_ if k >= a.ndim)]
    return np.einsum(a, labels, b, labels_, out)


def _broadcast_in_dim(a: Any, *_: Any, shape: Any, broadcast_dimensions: Any, **__: Any) -> np.ndarray:
    wide = [1] * len(shape)
    for k, d in enumerate(broadcast_dimensions):
        wide[d] = a.shape[k]
    return np.broadcast_to(a.reshape(wide), shape)


def _pad(a: Any, value: Any, padding_config: Any) -> np.ndarray:
    for axis, (lo, hi, step) in enumerate(padding_config):
        n = a.shape[axis]
        wide = np.full([n + max(n - 1, 0) * step if k == axis else m for k, m in enumerate(a.shape)], value, a.dtype)
        wide[tuple(slice(None, None, step + 1) if k == axis else slice(None) for k in range(a.ndim))] = a
        wide = np.pad(wide, [(max(lo, 0), max(hi, 0)) if k == axis else (0, 0) for k in range(a.ndim)],
                      constant_values=value)  # fmt: skip
        cut = slice(max(-lo, 0), wide.shape[axis] - max(-hi, 0))
        a = wide[tuple(cut if k == axis else slice(None) for k in range(a.ndim))]
    return a


def _slice(a: Any, start_indices: Any, limit_indices: Any, strides: Any) -> np.ndarray:
    steps = strides or [1] * a.ndim
    return a[tuple(map(slice, start_indices, limit_indices, steps))]


def _reshape(a: Any, *_: Any, new_sizes: Any, dimensions: Any, **__: Any) -> np.ndarray:
    return (a if dimensions is None else a.transpose(dimensions)).reshape(new_sizes)


def _select(which: Any, *cases: Any) -> np.ndarray:
    return np.choose(np.broadcast_to(which, cases[0].shape).astype(int), cases)


def _dynamic_update_slice(a: Any, update: Any, *starts: Any) -> np.ndarray:
    at = [min(max(int(i), 0), n - m) for i, n, m in zip(starts, a.shape, update.shape, strict=True)]
    a = a.copy()
    a[tuple(slice(i, i + m) for i, m in zip(at, update.shape, strict=True))] = update
    return a


def _dynamic_slice(a: Any, *starts: Any, slice_sizes: Any, **_: Any) -> np.ndarray:
    at = [min(max(int(i), 0), n - m) for i, n, m in zip(starts, a.shape, slice_sizes, strict=True)]
    return a[tuple(slice(i, i + m) for i, m in zip(at, slice_sizes, strict=True))]


def _scatter_add(a: Any, indices: Any, updates: Any, dimension_numbers: Any, mode: Any, **_: Any) -> np.ndarray:
    d = dimension_numbers
    assert not d.operand_batching_dims
    a, window = a.copy(), [k for k in range(a.ndim) if k not in d.inserted_window_dims]
    others = [k for k in range(updates.ndim) if k not in d.update_window_dims]
    updates = updates.transpose(*others, *d.update_window_dims)
    for at in np.ndindex(indices.shape[:-1]):
        block, starts, sizes = updates[at], [0] * a.ndim, [1] * a.ndim
        for k, n in zip(window, block.shape, strict=True):
            sizes[k] = n
        for k, i in zip(d.scatter_dims_to_operand_dims, indices[at], strict=True):
            starts[k] = int(i)
        if mode == lax.GatherScatterMode.CLIP:
            starts = [min(max(i, 0), n - m) for i, n, m in zip(starts, a.shape, sizes, strict=True)]
        if all(0 <= i <= n - m for i, n, m in zip(starts, a.shape, sizes, strict=True)):
            a[tuple(slice(i, i + m) for i, m in zip(starts, sizes, strict=True))] += block.reshape(sizes)
    return a


def _split(a: Any, sizes: Any, axis: int) -> list[np.ndarray]:
    return np.split(a, np.cumsum(sizes)[:-1], axis)


def _of(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands, **_: function(*operands)


def _sum(a: Any, axes: Any, **_: Any) -> Any:
    return a.sum(tuple(axes))


RULES: dict[Any, Callable[..., Any]] = {
    lax.dot_general_p: _dot_general,
    lax.broadcast_in_dim_p: _broadcast_in_dim,
    lax.pad_p: _pad,
    lax.slice_p: _slice,
    lax.reshape_p: _reshape,
    lax.select_n_p: _select,
    lax.dynamic_update_slice_p: _dynamic_update_slice,
    lax.dynamic_slice_p: _dynamic_slice,
    lax.scatter_add_p: _scatter_add,
    lax.split_p: _split,
    lax.reduce_sum_p: _sum,
    lax.transpose_p: lambda a, permutation: a.transpose(permutation),
    lax.squeeze_p: lambda a, dimensions: a.squeeze(tuple(dimensions)),
    lax.rev_p: lambda a, dimensions: np.flip(a, tuple(dimensions)),
    lax.concatenate_p: lambda *parts, dimension: np.concatenate(parts, dimension),
    lax.convert_element_type_p: lambda a, new_dtype, **_: a.astype(new_dtype),
    lax.iota_p: lambda dtype, shape, dimension, **_: np.broadcast_to(
        np.arange(shape[dimension], dtype=dtype).reshape([-1 if k == dimension else 1 for k in range(len(shape))]),
        shape,
    ),
    lax.clamp_p: lambda lo, a, hi: np.clip(a, lo, hi),
    lax.max_p: _of(np.maximum),
    lax.min_p: _of(np.minimum),
    lax.mul_p: _of(np.multiply),
    lax.add_p: _of(np.add),
    _jax.add_any_p: _of(np.add),
    lax.sub_p: _of(np.subtract),
    lax.div_p: lambda a, b, **_: a / b if np.issubdtype(a.dtype, np.inexact) else a // b,
    lax.rem_p: _of(np.fmod),
    lax.neg_p: _of(np.negative),
    lax.eq_p: _of(np.equal),
    lax.ne_p: _of(np.not_equal),
    lax.lt_p: _of(np.less),
    lax.le_p: _of(np.less_equal),
    lax.gt_p: _of(np.greater),
    lax.ge_p: _of(np.greater_equal),
    lax.and_p: _of(np.bitwise_and),
    lax.or_p: _of(np.bitwise_or),
    lax.not_p: _of(np.logical_not),
    lax.copy_p: lambda a: a,
    **dict.fromkeys([lax.stop_gradient_p] if hasattr(lax, "stop_gradient_p") else [], lambda a: a),
}


def traced(function: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """The function's ClosedJaxpr, for arrays like these."""
    return jax.make_jaxpr(function)(*[jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype) for a in operands])
