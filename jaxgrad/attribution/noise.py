"""The gradient noise of each parameter, averages of it over a training run, and estimates from a few parameters."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.attribution.scores import NoiseScale
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.precision import added, working_dtype


@naming("leaf_noise_scale")
def leaf_noise_scale(g: PerExampleGrads) -> NoiseScale:
    """`noise_scale` for each parameter by itself, from the norms of its gradients and its mean gradient.

    Args:
        g: as in `noise_scale`.

    Returns:
        `NoiseScale` whose fields are trees like the parameters, with a scalar in float32 or wider for each of them.
        `total_noise_scale` adds them up: the sum of all is `noise_scale(g)`, where the noise is not rounded up to 0.

    Example:
        >>> loss = lambda p, x: p["w"] @ x + 2 * p["b"]
        >>> g = jg.per_example_grad(loss)({"w": jnp.zeros(2), "b": jnp.zeros(())}, jnp.array([[3.0, 1], [3.0, -1]]))
        >>> leaf_noise_scale(g).noise["w"].round(3).item(), leaf_noise_scale(g).signal["b"].item()
        (2.0, 4.0)
    """
    checked_gradients(g)
    norms = g.leaf_norms()
    dtype = working_dtype(*(a.dtype for a in jax.tree.leaves(norms)))
    unit = _unit(norms, dtype)
    total = g.scale(jnp.full(g.batch_size, 1, dtype) / unit).sum(dtype)
    mean = jax.tree.map(lambda a: a / jnp.asarray(g.batch_size, a.real.dtype), total)
    return _estimates(norms, mean, unit)


@naming("noise_scale_from_norms")
def noise_scale_from_norms(norms: PyTree, mean: PyTree) -> NoiseScale:
    """`leaf_noise_scale` from norms and a mean gradient that were computed already, for models with little memory.

    `per_example_norms(loss, leaf_norms=True)` and a gradient of the mean loss take about the memory of a plain
    gradient. The norms over all parameters, from `clipped_grad(loss, jnp.inf)`, give the noise of the whole.

    Args:
        norms: arrays [B] of norms, in a tree like the parameters or a tree prefix of it.
        mean: the mean gradient of these B examples, a tree like the parameters. Pass it in float32 or wider: its
            rounding errors count as noise.

    Returns:
        `NoiseScale` whose fields are trees like `norms`, with a scalar for each array.

    Raises:
        ValueError: the norms are not arrays of one length B, or not a tree prefix of `mean`.

    Example:
        >>> loss, w, X = lambda w, x: w @ x, jnp.zeros(2), jnp.array([[3.0, 1], [3.0, -1]])
        >>> total, info = jg.clipped_grad(loss, jnp.inf)(w, X)
        >>> found = noise_scale_from_norms(info.norms, total / 2)
        >>> round(found.noise.item(), 3), round(found.signal.item(), 3)
        (2.0, 8.0)
    """
    shapes = {jnp.shape(a) for a in jax.tree.leaves(norms)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"{caller()}: expected norms of B examples, arrays [B], got shapes {sorted(shapes)}.")
    norms = jax.tree.map(jnp.asarray, norms)
    unit = _unit(norms, working_dtype(*(a.dtype for a in jax.tree.leaves(norms))))
    wide = lambda a: a.astype(working_dtype(a.dtype)) / unit.astype(working_dtype(a.real.dtype))  # noqa: E731
    return _estimates(norms, jax.tree.map(lambda a: wide(jnp.asarray(a)), mean), unit)


@naming("total_noise_scale")
def total_noise_scale(estimates: NoiseScale, select: Callable[[str], bool] | None = None) -> NoiseScale:
    """The noise scale of all parameters together, or of some, from estimates for each.

    In a transformer, the noise scale of the layer norms alone follows that of the whole through a training run (Gray et
    al. 2024), and their gradients are few: differentiate with respect to them only, and the estimate costs little more
    than the forward and backward pass. The two differ by a factor that depends on the model.

    Args:
        estimates: from `leaf_noise_scale`, `noise_scale_from_norms` or `NoiseRecorder.average`.
        select: a function of a parameter's path, as `jax.tree_util.keystr` writes it, that says whether to count the
            parameter; None for all.

    Returns:
        `NoiseScale` of scalars.

    Raises:
        ValueError: no parameter is selected.

    Example:
        >>> loss = lambda p, x: p["w"] @ x + 2 * p["b"]
        >>> g = jg.per_example_grad(loss)({"w": jnp.zeros(2), "b": jnp.zeros(())}, jnp.array([[3.0, 1], [3.0, -1]]))
        >>> total_noise_scale(leaf_noise_scale(g), lambda path: "w" in path).scale.round(3).item()
        0.25
    """
    leaves = jax.tree_util.tree_leaves_with_path((estimates.noise, estimates.signal))
    paths = [jax.tree_util.keystr(path[1:]) for path, _ in leaves[: len(leaves) // 2]]
    chosen = [k for k, path in enumerate(paths) if select is None or select(path)]
    if not chosen:
        raise ValueError(f"{caller()}: expected at least one parameter to be selected, got none among {paths}.")
    noise, signal = (added([leaves[start + k][1] for k in chosen]) for start in (0, len(paths)))
    return _with_scale(noise, signal)


# --- Averages over a training run ------------------------------------------------------------------------------------


@named_tuple
class NoiseRecord(NamedTuple):
    """What a `NoiseRecorder` has seen: scalars for an exponential average, arrays [window] for the last steps.

    Attributes:
        count: number of updates.
        weight: the weights of the recorded steps.
        noise, signal: trees like the parameters, each entry times its weight.

    Example:
        >>> record = noise_recorder(window=10).init({"w": jnp.zeros(3)})
        >>> record.count.item(), record.noise["w"].shape
        (0, (10,))
    """

    count: Array  # type: ignore[assignment]  # tuple.count is not used
    weight: Array
    noise: PyTree
    signal: PyTree


class NoiseRecorder(NamedTuple):
    """Functions that average the noise of a training run, as an optimizer's are; `noise_recorder` returns them.

    Attributes:
        init: (params) → an empty `NoiseRecord`.
        update: (record, estimates) → the record with one more step.
        average: (record) → `NoiseScale` of trees: averages of noise and signal, and their quotients.

    Example:
        >>> recorder = noise_recorder(decay=0.9)
        >>> recorder.init(jnp.zeros(3)).weight.item()
        0.0
    """

    init: Callable[[PyTree], NoiseRecord]
    update: Callable[[NoiseRecord, NoiseScale], NoiseRecord]
    average: Callable[[NoiseRecord], NoiseScale]


def noise_recorder(*, decay: float | None = None, window: int | None = None) -> NoiseRecorder:
    """Average the noise and the signal of each parameter over steps, before they are divided.

    One batch's signal is itself noise if the batch is far smaller than the noise scale; averages over steps make the
    quotient meaningful. The record is a pytree: carry it through a jitted training step beside the optimizer's state.

    Args:
        decay: for an exponential average: the weight of a step is `decay` times that of the next one, 0 ≤ decay < 1.
            The weights are divided by their sum, so that the first steps are not drawn to zero.
        window: for the mean of the last `window` steps. Pass exactly one of the two.

    Returns:
        `NoiseRecorder`: `init(params)`, `update(record, estimates)` and `average(record)`. The estimates are those of
        `leaf_noise_scale(g)` or `noise_scale_from_norms`; `params` is a tree with the leaves of the estimates. A step
        that is not finite makes an exponential average NaN; keep the old record then.

    Raises:
        ValueError: not exactly one of the two is passed, or it is out of range; in an update, the tree of the estimates
            is not that of the record.

    Example:
        >>> recorder = noise_recorder(decay=0.9)
        >>> loss, w = lambda w, x: w @ x, jnp.zeros(2)
        >>> record = recorder.init(w)
        >>> for X in (jnp.array([[3.0, 1], [3.0, -1]]), jnp.array([[1.0, 1], [1.0, -1]])):
        ...     record = recorder.update(record, leaf_noise_scale(jg.per_example_grad(loss)(w, X)))
        >>> total_noise_scale(recorder.average(record)).signal.round(3).item()      # (0.9 · 8 + 0) / 1.9
        3.789
    """
    if (decay is None) == (window is None):
        raise ValueError(f"noise_recorder: expected either decay or window, got decay={decay} and window={window}.")
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"noise_recorder: expected a decay ≥ 0 and < 1, got {decay}.")
    if window is not None and operator.index(window) < 1:
        raise ValueError(f"noise_recorder: expected a window of at least 1 step, got {window}.")
    shape = () if window is None else (window,)

    def init(params: PyTree) -> NoiseRecord:
        def zero(p: Any) -> Array:
            return jnp.zeros(shape, jnp.finfo(working_dtype(jnp.result_type(p))).dtype)

        zeros = jax.tree.map(zero, params)
        dtype = jnp.result_type(*jax.tree.leaves(zeros))
        return NoiseRecord(jnp.zeros((), jnp.int32), jnp.zeros(shape, dtype), zeros, zeros)

    @naming("NoiseRecorder.update")
    def update(record: NoiseRecord, estimates: NoiseScale) -> NoiseRecord:
        expected, got = map(_structure, (record.noise, estimates.noise))
        if got != expected:
            raise ValueError(f"{caller()}: expected estimates like the record, {expected}, got {got}.")

        def recorded(total: Array, new: Array) -> Array:
            new = jnp.asarray(new).astype(total.dtype)
            if window is not None:
                return total.at[record.count % window].set(new)
            return jnp.asarray(decay, total.dtype) * total + new

        noise, signal = (
            jax.tree.map(recorded, *pair)
            for pair in ((record.noise, estimates.noise), (record.signal, estimates.signal))
        )
        weight = recorded(record.weight, jnp.ones((), record.weight.dtype))
        return NoiseRecord(record.count + 1, weight, noise, signal)

    def average(record: NoiseRecord) -> NoiseScale:
        mean = lambda total: total.sum() / record.weight.sum().astype(total.dtype)  # noqa: E731
        noise, signal = (jax.tree.map(mean, tree) for tree in (record.noise, record.signal))
        scale = jax.tree.map(lambda *both: _with_scale(*both).scale, noise, signal)
        return NoiseScale(noise, signal, scale)

    return NoiseRecorder(init, update, average)


# --- The estimates ---------------------------------------------------------------------------------------------------


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)


def _unit(norms: PyTree, dtype: Any) -> Array:
    """A power of two near the largest norm."""
    return power_of_two(jnp.stack([a.astype(dtype).max(initial=0) for a in jax.tree.leaves(norms)]).max())


def _estimates(norms: PyTree, mean: PyTree, unit: Array) -> NoiseScale:
    """The estimates from norms [B] and the mean gradient divided by the unit."""
    structure: Any
    leaves, structure = jax.tree.flatten(norms)
    try:
        parts = structure.flatten_up_to(mean)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{caller()}: expected norms in a tree prefix of the mean gradient's, {jax.tree.structure(mean)}, got "
            f"{structure}."
        ) from error
    found = [_estimate(a, jax.tree.leaves(part), unit) for a, part in zip(leaves, parts, strict=True)]
    return NoiseScale(*(jax.tree.unflatten(structure, field) for field in zip(*found, strict=True)))


def _estimate(norms: Array, mean: list[Array], unit: Array) -> NoiseScale:
    B = norms.shape[0]
    if B < 2:
        return NoiseScale(*[jnp.full((), jnp.nan, unit.dtype)] * 3)
    norms = norms.astype(unit.dtype) / unit
    square = added([(jnp.abs(a) ** 2).sum() for a in mean]).astype(unit.dtype)
    spread = ((norms**2).sum() - B * square) / (B - 1)
    noise = jnp.maximum(spread, jnp.zeros_like(spread))
    found = _with_scale(noise, square - noise / B)
    return NoiseScale(found.noise * unit * unit, found.signal * unit * unit, found.scale)


def _with_scale(noise: Array, signal: Array) -> NoiseScale:
    infinite = signal <= 0
    scale = jnp.where(infinite, jnp.ones_like(noise), noise) / jnp.where(infinite, jnp.zeros_like(signal), signal)
    return NoiseScale(noise, signal, scale)
