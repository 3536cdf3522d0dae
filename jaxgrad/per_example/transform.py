"""per_example_grad: the per-example gradients of any pure JAX loss, held as factors."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra import complexes
from jaxgrad.per_example.algebra.mapped import with_shared, without_shared
from jaxgrad.per_example.arguments import Arguments, arguments_of, checked_scalar
from jaxgrad.per_example.frameworks import add_advice
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.interpreter.measuring import Measure, Measurer, Target, measuring
from jaxgrad.per_example.interpreter.reasons import Reason
from jaxgrad.per_example.interpreter.values import Shared, Value, array_of, is_zero
from jaxgrad.per_example.interpreter.walk import evaluate
from jaxgrad.per_example.lower import Lowered, convolutions_materialized, lower
from jaxgrad.per_example.on_mesh import call_on_mesh


def per_example_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = 0,
    has_aux: bool = False,
    spmd_axis_name: Any = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """Compute the gradient of every example of a batch, held as factors: `jax.vmap(jax.grad(fun))` in less memory.

    JAX differentiates `fun`, so custom rules, remat, stop_gradient and control flow behave as under `jax.grad`. The
    only difference is that the last matrix product of each gradient is left unevaluated. A matrix whose gradient is not
    a product takes the direct route: its gradient is computed as `jax.vmap(jax.grad(fun))` would compute it. `explain`
    names each such parameter. On your own model, first run `check_gradient(per_example_grad(fun), fun, params,
    *batch)`, which compares the result with `jax.grad`. Jit the code that calls the returned function, as with
    `jax.grad`; all stated costs are those of jitted code.

    Args:
        fun: a pure function of one example that returns a real scalar, or (scalar, aux) with has_aux.
        argnums: the argument or arguments to differentiate with respect to, as in `jax.grad`; all examples share them.
        in_axes: one number, the example axis of all positional arguments except the differentiated ones; or, as in
            `jax.vmap(jax.grad(fun), in_axes)`, a sequence with one entry for each positional argument. An entry is None
            for differentiated and shared arguments, the number of the example axis for batched arguments, or a tree
            prefix of such entries. In keyword arguments, every leaf that is an array is batched along axis 0; scalars
            and leaves that are not arrays are shared.
        has_aux: whether fun returns (scalar, aux).
        spmd_axis_name: as in `jax.vmap`: the mesh axis or axes over which the examples are sharded, so that
            `jax.lax.with_sharding_constraint` inside fun leaves the examples sharded over these axes.
        strict: whether to raise an error if a parameter takes the direct route.

    Returns:
        A function that takes fun's arguments, with an example axis on the batched ones, and returns `PerExampleGrads`
        over the tree of the differentiated argument (a tuple of trees if there are several). With has_aux, it returns
        (PerExampleGrads, aux of every example).

    Raises:
        TypeError: the loss is not a real scalar, or a parameter does not have a floating dtype.
        ValueError: no argument is batched, batch sizes differ, argnums or in_axes do not fit the arguments, or strict
            is set and a parameter takes the direct route.

    Example:
        >>> loss = lambda params, x, y: (jnp.tanh(params["W"] @ x).sum() - y) ** 2
        >>> params = {"W": jnp.ones((3, 5)), "unused": jnp.ones(7)}
        >>> g = per_example_grad(loss)(params, jnp.ones((4, 5)), jnp.zeros(4))
        >>> g.norms().shape, g.sum()["W"].shape, g.factors["W"][0].kind
        ((4,), (3, 5), 'Outer')
    """
    transformed = Transformed("per_example_grad", fun, argnums, in_axes, has_aux, strict, spmd_axis_name)

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    def gradients(*args: Any, **kwargs: Any) -> Any:
        _, aux, g = transformed(args, kwargs)
        return (g, aux) if has_aux else g

    return gradients


def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = 0,
    has_aux: bool = False,
    spmd_axis_name: Any = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """Compute the losses as well as the gradients of `per_example_grad`: (values [B], PerExampleGrads).

    Args:
        fun, argnums, in_axes, has_aux, spmd_axis_name, strict: as in `per_example_grad`.

    Returns:
        A function of the same arguments as in `per_example_grad` that returns (values, PerExampleGrads) or, with
        has_aux, ((values, aux), PerExampleGrads), like `jax.value_and_grad`.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> loss = lambda w, x: jnp.sin(w @ x)
        >>> values, g = per_example_value_and_grad(loss)(jnp.ones(3), jnp.zeros((4, 3)))
        >>> values.shape, g.batch_size
        ((4,), 4)
    """
    transformed = Transformed("per_example_value_and_grad", fun, argnums, in_axes, has_aux, strict, spmd_axis_name)

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    def values_and_gradients(*args: Any, **kwargs: Any) -> Any:
        values, aux, g = transformed(args, kwargs)
        return ((values, aux), g) if has_aux else (values, g)

    return values_and_gradients


@jax.tree_util.register_static
@dataclass(frozen=True)
class Route:
    """The route that one parameter's gradient took; a pytree without leaves, so that `vmap` can return it.

    Attributes:
        how: the route, as in `Lowered`.
        reason: why the gradient took the direct route, if it did.
    """

    how: str
    reason: Reason | None


class Transformed:
    """A loss with its options; `gradient_map`, if given, is applied to each example's gradient."""

    def __init__(
        self,
        call: str,
        fun: Any,
        argnums: Any,
        in_axes: Any,
        has_aux: bool = False,
        strict: bool = False,
        spmd_axis_name: Any = None,
        gradient_map: Callable[[Any], Any] | None = None,
    ):
        if not callable(fun):
            raise TypeError(f"{call}: expected a function of one example, got {type(fun).__name__}.")
        self.gradient_map = gradient_map
        self.call, self.fun, self.argnums, self.in_axes = call, fun, argnums, in_axes
        self.has_aux, self.strict, self.spmd_axis_name = has_aux, strict, spmd_axis_name

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, PerExampleGrads]:
        """(values, aux, gradients)."""
        return self.evaluated(self.arguments(args, kwargs))[:3]

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Split a call into parameters, batched arguments and shared arguments."""
        with naming(self.call):
            return arguments_of(args, kwargs, self.argnums, self.in_axes)

    def evaluated(self, arguments: Arguments) -> tuple[Any, Any, PerExampleGrads, list[Route]]:
        """(values, aux, gradients, the route of each parameter)."""
        with naming(self.call):
            values, aux, g, routes = call_on_mesh(self._evaluated, arguments, (0, 0, 0, None))
            return values, aux, g if self.gradient_map else g.sharded_as(arguments.params), routes

    def _evaluated(self, arguments: Arguments) -> tuple[Any, Any, PerExampleGrads, list[Route]]:
        one, out_tree, gradients_tree = self.of_one_example(arguments)
        over_examples = jax.vmap(
            one, (arguments.axes,), (0, 0, 0, None), axis_size=arguments.batch_size, spmd_axis_name=self.spmd_axis_name
        )
        value_and_aux, parts, routes, shared = over_examples(arguments.batch)
        parts = [
            convolutions_materialized(factors, Lowered(factors, route.how, route.reason))
            for factors, route in zip(with_shared(parts, shared), routes, strict=True)
        ]
        if self.strict:
            self._refuse_direct(arguments, routes)
        values, aux = jax.tree.unflatten(out_tree, value_and_aux)
        return values, aux, PerExampleGrads(jax.tree.unflatten(gradients_tree, parts)), routes

    def measured(
        self,
        arguments: Arguments,
        measurer: Measurer,
        targets_of: Callable[[Any, Any], Sequence[Target]],
        axes: Any = 0,
        each: Any = (),
        common: Any = (),
    ) -> tuple[Any, Any, list[Measure]]:
        """(values, aux, the measure of each parameter's gradient).

        Args:
            arguments: the call.
            measurer: how gradients are measured.
            targets_of: (what one example has of `each`, `common`) → what is measured of each parameter's gradient.
            axes: the axes of examples in a measure, as in `out_axes` of `jax.vmap`; None for sums over the examples.
            each: a tree of arrays [B, …].
            common: a tree of arrays that all examples share.
        """

        def measured(arguments: Arguments, each: Any, common: Any) -> tuple[Any, Any, list[Measure]]:
            walked, out_tree, _ = self._walk(arguments)

            def one(examples: Sequence[Any], of_each: Any) -> Any:
                targets = targets_of(of_each, common)
                with measuring(measurer):
                    value_and_aux, gradients = walked(examples, targets)
                    pairs = zip(gradients, targets, strict=True)
                    items = [(value, tuple(aval.shape), aval.dtype, target) for (value, aval), target in pairs]
                    return value_and_aux, measurer.all(items)

            over_examples = jax.vmap(
                one,
                (arguments.axes, 0),
                (0, axes),
                axis_size=arguments.batch_size,
                spmd_axis_name=self.spmd_axis_name,
            )
            value_and_aux, measures = over_examples([jnp.asarray(a) for a in arguments.batch], each)
            return *jax.tree.unflatten(out_tree, value_and_aux), measures

        with naming(self.call):
            return call_on_mesh(measured, arguments, (0, 0, axes), each, common)

    def of_one_example(self, arguments: Arguments) -> tuple[Callable[[Sequence[Any]], Any], Any, Any]:
        """(one, the structure of (value, aux), the structure of the gradient).

        one(the leaves of one example) → (leaves of value and aux, factors without their shared arrays, the
        route of each parameter, the shared arrays).
        """
        walked, out_tree, gradients_tree = self._walk(arguments)

        def one(examples: Sequence[Any]) -> Any:
            value_and_aux, gradients = walked(examples)
            lowered = [lower(value, aval.shape, aval.dtype) for value, aval in gradients]
            parts, shared = without_shared([f.factors for f in lowered])
            return value_and_aux, parts, [Route(f.how, f.reason) for f in lowered], shared

        return one, out_tree, gradients_tree

    def _walk(self, arguments: Arguments) -> tuple[Callable[..., Any], Any, Any]:
        """(walked, the structure of (value, aux), the structure of the gradient).

        walked(the leaves of one example, targets of the gradient's leaves or ()) → (leaves of value and aux, (gradient,
        its aval) for each of its leaves).
        """
        program, out_tree, gradients_tree = self._program(arguments)
        outvars = program.jaxpr.outvars
        first = len(outvars) - gradients_tree.num_leaves
        is_gradient = [k >= first for k in range(len(outvars))]

        def walked(
            examples: Sequence[Any], targets: Sequence[Target] = ()
        ) -> tuple[list[Array], list[tuple[Value, Any]]]:
            leaves = [*map(Shared, arguments.params), *examples]
            of_results = [*[None] * first, *targets] if targets else ()
            results = evaluate(program, leaves, is_gradient, [True] * len(outvars), of_results)
            value_and_aux = [_as_returned(value, v.aval) for value, v in zip(results[:first], outvars, strict=False)]
            return value_and_aux, list(zip(results[first:], (v.aval for v in outvars[first:]), strict=True))

        return walked, out_tree, gradients_tree

    def _program(self, arguments: Arguments) -> tuple[_jax.Program, Any, Any]:
        """(the program, the structure of (value, aux), the structure of the gradient).

        The program is that of the gradient of one example's loss; its results are (value, aux …, gradients …).
        """

        def scalar(params: Sequence[Any], examples: Sequence[Any]) -> Any:
            args, kwargs = arguments.loss_arguments(params, examples)
            try:
                result = self.fun(*args, **kwargs)
            except Exception as error:
                add_advice(error, args)
                raise
            if self.has_aux and not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"{caller()}: expected a loss that returns (scalar, aux), because has_aux=True, "
                    f"got {'one array' if hasattr(result, 'dtype') else type(result).__name__}."
                )
            value, aux = result if self.has_aux else (result, None)
            return checked_scalar(value), (value, aux)

        def program(params: Sequence[Any], examples: Sequence[Any]) -> Any:
            (_, value_and_aux), leaves = jax.value_and_grad(scalar, has_aux=True)(params, examples)
            gradients = jax.tree.unflatten(arguments.params_tree, leaves)
            if self.gradient_map is not None:
                gradient = complexes.joined(gradients, complexes.gradient)
                gradients = complexes.parts(self.gradient_map(gradient), sign=-1)
            return value_and_aux, gradients

        closed, shape = jax.make_jaxpr(program, return_shape=True)(arguments.params, arguments.example)
        return _jax.program_of(closed), *map(jax.tree.structure, shape)

    def _refuse_direct(self, arguments: Arguments, routes: Sequence[Route]) -> None:
        for path, f in zip(arguments.paths, routes, strict=True):
            if f.how == "direct" and f.reason is not None:
                place = f" at {f.reason.source}" if f.reason.source else ""
                raise ValueError(
                    f"{caller()}: with strict=True expected the gradient of every matrix to be a product, got the "
                    f"direct route for {path or 'the parameter'}: {f.reason.primitive}{place}: {f.reason.why}. Write "
                    f"the use of the parameter as a matrix product, convolution or lookup (and move what depends on "
                    f"the parameters alone out of loops), or drop strict=True: the result is the same."
                )


def _as_returned(value: Value, aval: Any) -> Array:
    """Convert a result that is not a gradient to the array that the program returns."""
    if is_zero(value) and aval.weak_type:  # a value known to be zero does not record that its dtype is weak
        zeros = jnp.broadcast_to(jnp.asarray(aval.dtype.type(0).item()), aval.shape)
        if zeros.dtype == aval.dtype:
            return zeros
    array = array_of(value)
    if isinstance(array, np.ndarray) and aval.weak_type and not array.ndim:  # a literal number in the program
        number = jnp.asarray(array.item())
        array = number if number.dtype == aval.dtype else array
    return array if isinstance(array, jax.Array) else jnp.asarray(array, aval.dtype)
