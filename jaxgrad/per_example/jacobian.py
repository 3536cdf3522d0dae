"""Per-example gradients of all outputs of a model; arrays that are the same for all outputs are held once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad import _jax
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra.chunks import pairs_of_outputs
from jaxgrad.per_example.algebra.mapped import map_examples_of, with_shared
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.frameworks import add_advice
from jaxgrad.per_example.gradients import PerExampleGrads, widened
from jaxgrad.per_example.interpreter import dependence
from jaxgrad.per_example.lower import Lowered, convolutions_materialized, has_its_final_form
from jaxgrad.per_example.on_mesh import call_on_mesh
from jaxgrad.per_example.transform import Transformed
from jaxgrad.sharding import sharded_as

OUTPUT_AXIS, NO_OUTPUT_AXIS = 1, -1
"""The output axis of an array, and the mark of an array without one because all outputs share it."""


@jax.tree_util.register_pytree_with_keys_class
class PerExampleJacobian:
    """The Jacobians J_b [O, parameters] of B examples, held as factors; `per_example_jacobian` returns it.

    An activation is the same for all outputs and is held once; a cotangent is held for every output. The class is a
    pytree of these arrays. The example axis comes first, in all arrays that the examples do not share; the output axis
    comes second, in all arrays that the outputs do not share.

    Example:
        >>> model = lambda params, x: params["V"] @ jnp.tanh(params["W"] @ x)
        >>> params = {"W": jnp.ones((30, 20)), "V": jnp.ones((10, 30))}
        >>> J = jg.per_example_jacobian(model)(params, jnp.ones((4, 20)))
        >>> J.batch_size, J.outputs, J.norms().shape, J.gram().shape
        (4, 10, (4, 10), (4, 4, 10, 10))
    """

    def __init__(self, held: PerExampleGrads, axes: tuple[int, ...], outputs: int):
        self._held, self._axes, self.outputs = held, axes, outputs

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, PerExampleGrads], ...], Any]:
        """Flatten the pytree, for JAX."""
        return ((jax.tree_util.GetAttrKey("held"), self._held),), (self._axes, self.outputs)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Sequence[PerExampleGrads]) -> "PerExampleJacobian":
        """Rebuild the pytree, for JAX, without checks."""
        return cls(children[0], *aux)

    @property
    def batch_size(self) -> int:
        """The number of examples, B."""
        return self._held.batch_size

    @property
    def nbytes(self) -> int:
        """The number of bytes that the factors hold."""
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self._held))

    def __repr__(self) -> str:
        return f"PerExampleJacobian({self.batch_size} examples, {self.outputs} outputs, {self.nbytes} bytes held)"

    def _vmap_outputs(self, function: Callable[[PerExampleGrads], Any], out_axes: int = 1) -> Any:
        """Apply the function to the gradients of each output; stack the results along `out_axes`."""
        held = self._held.with_chunk_bytes(max(1, self._held.chunk_bytes // max(1, self.outputs)))
        axes = jax.tree.unflatten(jax.tree.structure(held), map(_vmap_axis, self._axes))
        return jax.vmap(function, (axes,), out_axes, axis_size=self.outputs)(held)

    def norms(self) -> Float[Array, "B O"]:
        """The norm [B, O] of the gradient of every output, computed as in `PerExampleGrads.norms`."""
        return self._vmap_outputs(lambda g: g.norms())

    def dot(self, tree: PyTree) -> Float[Array, "B O"]:
        """J_b v [B, O] for a direction v, as in `PerExampleGrads.dot`."""
        return self._vmap_outputs(lambda g: g.dot(tree))

    def gram(self, other: "PerExampleJacobian | PerExampleGrads | None" = None) -> Float[Array, "B C O *P"]:
        """J_b J′_cᵀ [B, C, O, O′] for every pair of examples, where J′ is `other` or, without it, this Jacobian.

        Cost, for a weight that enters through one matrix product: the inner products of activations take B·C·K
        operations, for every pair of examples; those of cotangents take B·C·O·O′·F operations, for every pair of
        examples and outputs.

        Args:
            other: a Jacobian with respect to the same parameters, whose number of outputs may be different; or
                gradients with respect to the same parameters, for J_b g_c [B, C, O].

        Raises:
            ValueError: the parameters of `other` have a different tree, or different shapes or dtypes.
        """
        if isinstance(other, PerExampleGrads):
            return self._vmap_outputs(lambda g: g.gram(other), 2)
        second = self if other is None else other

        def one_row(g: PerExampleGrads) -> Array:
            return second._vmap_outputs(lambda h: g.gram(h), 2)

        with pairs_of_outputs(min(self.outputs, second.outputs)):  # chunk_bytes is already divided among the outputs
            return self._vmap_outputs(one_row, 2)

    @naming("PerExampleJacobian.diagonal_gram")
    def diagonal_gram(self, other: "PerExampleJacobian | None" = None) -> Float[Array, "B C O"]:
        """⟨J_b[o], J′_c[o]⟩ [B, C, O]: the entries with o = o′ of `gram`, without the others.

        Cost, for a weight that enters through one matrix product: the inner products of activations take B·C·K
        operations; those of cotangents take B·C·O·F operations.

        Args:
            other: a Jacobian with respect to the same parameters and with as many outputs; None for this Jacobian.

        Raises:
            ValueError: the numbers of outputs differ, or the parameters of `other` do.
        """
        second = self if other is None else other
        if second.outputs != self.outputs:
            raise ValueError(
                f"{caller()}: expected as many outputs on both sides, got {self.outputs} and {second.outputs}."
            )
        sides, axes = [], []
        for J in (self, second):
            held = J._held.with_chunk_bytes(max(1, J._held.chunk_bytes // max(1, J.outputs)))
            sides.append(held)
            axes.append(jax.tree.unflatten(jax.tree.structure(held), map(_vmap_axis, J._axes)))
        return jax.vmap(lambda g, h: g.gram(h), tuple(axes), 2, axis_size=self.outputs)(*sides)

    def weighted_sum(self, c: Float[Array, "B O"], dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """Σ_bk c_bk J_b[k], a tree with the parameters' shapes.

        The sum over outputs runs in a loop, so that the arrays that the outputs share are not copied.

        Args:
            c: [B, O], a number for each row J_b[k].
            dtype: dtype of the result, as in `PerExampleGrads.sum`; the sum over outputs is in float32 or wider.
        """
        shapes = jax.eval_shape(lambda h, k: h._output(k).sum(), self, jnp.zeros((), jnp.int32))
        wide = jnp.result_type(jax.eval_shape(self.norms))

        def add_output(total: PyTree, k: Array) -> tuple[PyTree, None]:
            g, weights = self._output(k), jnp.take(c, k, 1)
            return jax.tree.map(jnp.add, total, g.weighted_sum(weights, wide)), None

        start = jax.tree.map(lambda s: sharded_as(s, jnp.zeros(s.shape, _with_real(s.dtype, wide))), shapes)
        total, _ = jax.lax.scan(add_output, start, jnp.arange(self.outputs))
        return jax.tree.map(lambda a, s: a.astype(_with_real(s.dtype, dtype or _real(s.dtype))), total, shapes)

    def _output(self, k: Array) -> PerExampleGrads:
        """The gradients of output k."""
        leaves: list[Any]
        leaves, structure = jax.tree.flatten(self._held)
        axes = map(_vmap_axis, self._axes)
        chosen = [a if axis is None else jnp.take(a, k, axis) for a, axis in zip(leaves, axes, strict=True)]
        gradients: PerExampleGrads = jax.tree.unflatten(structure, chosen)
        return gradients

    def widened(self) -> "PerExampleJacobian":
        """The same Jacobians with bfloat16 factors cast to float32, so that weighted sums do not round to bfloat16."""
        return PerExampleJacobian(widened(self._held), self._axes, self.outputs)

    def sharded_as(self, params: Sequence[Any]) -> "PerExampleJacobian":
        """The same Jacobians, whose sums are sharded as these leaves of the parameters are, on an explicit mesh."""
        return PerExampleJacobian(self._held.sharded_as(params), self._axes, self.outputs)

    def __mul__(self, c: Any) -> "PerExampleJacobian":
        """c · J_b for a number c."""
        return PerExampleJacobian(self._held * c, self._axes, self.outputs)

    def rows(self) -> PerExampleGrads:
        """The rows as B·O gradients, those of the first example first; arrays that outputs share are copied."""
        O = self.outputs  # noqa: E741

        def flatten(a: Array, axis: int) -> Array:
            a = jnp.broadcast_to(a[:, None], (a.shape[0], O, *a.shape[1:])) if axis == NO_OUTPUT_AXIS else a
            return a.reshape(a.shape[0] * O, *a.shape[2:])

        return map_examples_of(flatten, self._held, jax.tree.unflatten(jax.tree.structure(self._held), self._axes))

    def materialize(self) -> PyTree:
        """The tree of arrays [B, O, *shape] that `jax.vmap(jax.jacrev(fun))` returns if the outputs are a vector."""
        return self._vmap_outputs(lambda g: g.materialize())


def per_example_jacobian(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, *, in_axes: Any = 0, spmd_axis_name: Any = None
) -> Callable[..., PerExampleJacobian]:
    """Compute the gradients of all outputs of a model, for every example, as factors.

    The forward pass runs once. Arrays that are the same for all outputs, such as activations, are held once.

    Args:
        fun: fun(params, x) → the outputs of one example: an array or a tree of arrays, of a real floating dtype. The
            index of an output is its position in the result of `jax.flatten_util.ravel_pytree`.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function that takes fun's arguments, with an example axis on the batched ones, and returns
        `PerExampleJacobian`.

    Raises:
        TypeError: the outputs are not arrays of a real floating dtype; otherwise as in `per_example_grad`.
        ValueError: as in `per_example_grad`.

    Example:
        >>> J = per_example_jacobian(lambda W, x: jnp.tanh(W @ x))(jnp.ones((5, 3)), jnp.ones((4, 3)))
        >>> J.materialize().shape, J.dot(jnp.ones((5, 3))).shape
        ((4, 5, 5, 3), (4, 5))
    """

    def output(*args: Any, **kwargs: Any) -> Array:
        *args_, k = args
        return _outputs(fun(*args_, **kwargs))[k]

    transformed = Transformed("per_example_jacobian", fun, argnums, in_axes)
    one_output = Transformed("per_example_jacobian", output, argnums, in_axes, spmd_axis_name=spmd_axis_name)

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    @naming("per_example_jacobian")
    def jacobian(*args: Any, **kwargs: Any) -> PerExampleJacobian:
        arguments = transformed.arguments(args, kwargs)

        def outputs(params: Any, example: Any) -> Array:
            args, kwargs = arguments.loss_arguments(params, example)
            try:
                return _outputs(fun(*args, **kwargs))
            except Exception as error:
                add_advice(error, args)
                raise

        count = jax.eval_shape(outputs, arguments.params, arguments.example).shape[0]
        return evaluated_by_output(one_output, with_output_index(arguments), count)[1]

    return jacobian


def _outputs(results: Any) -> Array:
    """All outputs, concatenated into one vector."""
    leaves = jax.tree.leaves(results)
    wrong = [a for a in leaves if not jnp.issubdtype(jnp.result_type(a), jnp.floating)]
    if not leaves or wrong:
        got = f"{jnp.result_type(wrong[0])}" if wrong else "nothing"
        raise TypeError(
            f"per_example_jacobian: expected a function that returns real floating arrays for one example, got {got}."
        )
    dtype = jnp.result_type(*leaves)
    return jnp.concatenate([jnp.ravel(a).astype(dtype) for a in leaves])


def with_output_index(arguments: Arguments) -> Arguments:
    """Append the index of an output to the arguments; it is the same for all examples."""

    def rebuild(params: Sequence[Any], examples: Sequence[Any], shared: Sequence[Any]) -> Any:
        *examples, k = examples
        args, kwargs = arguments.rebuild(params, examples, shared)
        return (*args, k), kwargs

    index = jax.ShapeDtypeStruct((), jnp.int32)
    return dataclasses.replace(arguments, example=[*arguments.example, index], rebuild=rebuild)


def evaluated_by_output(
    transformed: Transformed, arguments: Arguments, outputs: int
) -> tuple[PyTree, PerExampleJacobian]:
    """(aux, the gradients of all outputs), for a function whose last argument is the index of the output.

    Args:
        transformed: the function; with has_aux, its aux must not depend on the index of the output.
        arguments: as returned by `with_output_index`.
        outputs: O.
    """
    aux, jacobian = call_on_mesh(functools.partial(_evaluated, transformed, outputs), arguments, 0)
    return aux, jacobian.sharded_as(arguments.params)


def _evaluated(transformed: Transformed, outputs: int, arguments: Arguments) -> tuple[PyTree, PerExampleJacobian]:
    """Do as `evaluated_by_output`, where the examples can be mapped over."""
    one, out_tree, _ = transformed.of_one_example(arguments)
    routes = []

    def parts_of_one(*examples: Any) -> Any:
        others, parts, found, shared = one(examples)
        routes.extend(found)
        return jax.tree.unflatten(out_tree, others)[1], parts, shared

    program, shape = jax.make_jaxpr(parts_of_one, return_shape=True)(*arguments.example)
    trees: list[Any] = [jax.tree.structure(part) for part in shape]
    aux_count, parts_count, shared_count = (tree.num_leaves for tree in trees)
    depends = dependence.depending(program, [len(arguments.example) - 1])[aux_count : aux_count + parts_count]
    inner = [0 if by_output else None for by_output in depends]
    axes = [OUTPUT_AXIS if by_output else NO_OUTPUT_AXIS for by_output in depends]
    run = _jax.function_of(program)

    def over_outputs(example: Sequence[Any]) -> Any:
        out_axes = [*[None] * aux_count, *inner, *[None] * shared_count]
        return jax.vmap(lambda k: run(*example, k), 0, out_axes)(jnp.arange(outputs, dtype=jnp.int32))

    over_examples = jax.vmap(
        over_outputs,
        (arguments.axes,),
        [*[0] * (aux_count + parts_count), *[None] * shared_count],
        axis_size=arguments.batch_size,
        spmd_axis_name=transformed.spmd_axis_name,
    )
    results = over_examples(arguments.batch)
    cuts = aux_count, aux_count + parts_count
    aux, parts, shared = (
        jax.tree.unflatten(tree, part)
        for tree, part in zip(trees, (results[: cuts[0]], results[slice(*cuts)], results[cuts[1] :]), strict=True)
    )
    factor_axes = with_shared(jax.tree.unflatten(trees[1], axes), jax.tree.map(lambda _: NO_OUTPUT_AXIS, shared))
    held, axes_held = [], []
    for factors, axes_of_factors, route in zip(with_shared(parts, shared), factor_axes, routes, strict=True):
        final, axes_ = _materialized(factors, axes_of_factors, Lowered(factors, route.how, route.reason), outputs)
        held.append(final)
        axes_held += [*axes_, NO_OUTPUT_AXIS]  # the last entry is for the leaf's weights
    g = PerExampleGrads(jax.tree.unflatten(arguments.params_tree, held))
    return aux, PerExampleJacobian(g, tuple(axes_held), outputs)


def _materialized(factors: Any, axes: Any, lowered: Lowered, outputs: int) -> tuple[Any, list[int]]:
    """Apply `convolutions_materialized` to every output; also return the output axis of each array."""
    if has_its_final_form(factors, lowered):
        return factors, jax.tree.leaves(axes)
    over_outputs = jax.vmap(
        lambda factors: convolutions_materialized(factors, lowered),
        (jax.tree.map(_vmap_axis, axes),),
        OUTPUT_AXIS,
        axis_size=outputs,
    )
    return over_outputs(factors), [OUTPUT_AXIS]


def _vmap_axis(axis: int) -> int | None:
    return None if axis == NO_OUTPUT_AXIS else axis


def _real(dtype: Any) -> Any:
    """The dtype of the real part."""
    return jnp.finfo(dtype).dtype


def _with_real(dtype: Any, real: Any) -> Any:
    """The dtype, complex where `dtype` is, whose real part has the dtype `real`."""
    complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.result_type(1j * jnp.zeros((), real)) if complex_ else jnp.dtype(real)
