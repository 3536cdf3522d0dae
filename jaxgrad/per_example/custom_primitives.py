"""register_rule: teach `per_example_grad` a primitive that it does not know."""

from collections.abc import Callable
from typing import Any

from jax import lax

from jaxgrad import _jax
from jaxgrad.errors import naming
from jaxgrad.per_example.interpreter import registered
from jaxgrad.per_example.interpreter.rules import RECORDS

_WALKED = (
    *(_jax.jit_p, _jax.remat_p, _jax.scan_p, _jax.cond_p, lax.while_p),
    *("shard_map", "custom_jvp_call", "custom_vjp_call"),
)  # primitives whose inner jaxprs the interpreter walks, or leaves to JAX


class RegisteredRule:
    """A rule that `register_rule` has registered. As a context manager it removes itself at the end of the block.

    Example:
        >>> with register_rule("my_kernel", lambda x, dy, **params: x.T @ dy) as rule:
        ...     print(rule)
        the rule for my_kernel
    """

    def __init__(self, rule: registered.Rule):
        self._rule = rule

    def remove(self) -> None:
        """Remove the rule. Functions that `jax.jit` traced while the rule was registered keep it."""
        registered.remove(self._rule)

    def __enter__(self) -> "RegisteredRule":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __str__(self) -> str:
        return f"the rule for {self._rule}"


def register_rule(
    primitive: _jax.Primitive | str,
    equals: Callable[..., Any],
    *,
    name: str | None = None,
    override: bool = False,
) -> RegisteredRule:
    """Teach `per_example_grad` what your primitive computes, so that gradients through the primitive stay factored.

    A parameter takes the direct route if its gradient ends in a primitive that jaxgrad does not know, such as a Pallas
    kernel or a primitive that you defined. The primitive that needs a rule is the one that `explain` names: the
    primitive in the backward pass that returns the weight's gradient. `equals` computes the same result as this
    primitive, but with `jax.numpy` and `jax.lax`. jaxgrad traces `equals` to find out which matrix product the
    primitive computes, or how the primitive rearranges or scales a product. Gradients that stay factored are computed
    from the operands of that product; every other number still comes from the primitive.

    Rules are global and apply to all threads; they may be registered and removed at any time. They do not affect
    functions that `jax.jit` has already traced, so register rules first.

    Correctness:
        If `equals` is wrong, the gradients are wrong; `check_rule` and `check_gradient` detect this. If `equals`
        declines a call by returning None, the result is the same as without the rule.

    Args:
        primitive: the primitive, or its name if JAX does not export it, such as "pallas_call".
        equals: a function that takes the primitive's operands, and its params as keyword arguments, and returns the
            primitive's result up to rounding. If the primitive has several results, `equals` returns a list of them,
            with None for each result that it does not compute. To decline a call, it returns None; this decision may
            depend only on shapes, dtypes and params. A result with a different floating dtype is cast to the
            primitive's.
        name: if one primitive runs many functions, as `pallas_call` does, the name of the function that the rule is
            for: that given by `pallas_call(…, name=)`, or else the name of the kernel function. The rule does not apply
            to a kernel that `jax.vmap` has batched inside the loss; such a kernel takes the direct route.
        override: whether this rule may come before an existing rule, which is then used if this rule declines.

    Returns:
        The registered rule. Call `.remove()` to remove it, or use it in a `with` statement.

    Raises:
        TypeError: the primitive is neither a primitive nor a string, or `equals` is not a function.
        ValueError: there is already a rule for this primitive and name, perhaps jaxgrad's own, and override is not set;
            or the primitive, such as jit or scan, holds jaxprs that jaxgrad interprets itself. `per_example_grad`
            raises ValueError if `equals` raises an error or returns shapes that are not those of the primitive's
            results.

    Example:
        >>> from jax.experimental import pallas as pl
        >>> def kernel(x, dy, out):
        ...     out[...] = x[...].T @ dy[...]
        >>> def product(x, dy):                                                         # xᵀ dy
        ...     shape = jax.ShapeDtypeStruct((x.shape[1], dy.shape[1]), x.dtype)
        ...     return pl.pallas_call(kernel, out_shape=shape, interpret=True, name="my_product")(x, dy)
        >>> rule = register_rule("pallas_call", lambda x, dy, **params: x.T @ dy, name="my_product")
        >>> jg.per_example.check_rule(product, jnp.ones((4, 8)), jnp.ones((4, 9))).agrees
        True
        >>> rule.remove()
    """
    with naming("register_rule"):
        if not isinstance(primitive, _jax.Primitive | str) or not primitive:
            raise TypeError(
                f"register_rule: expected a primitive or its name, got {type(primitive).__name__}. `explain` prints "
                f"the name; for a Pallas kernel pass 'pallas_call' and the kernel's name as name=."
            )
        if not callable(equals):
            raise TypeError(f"register_rule: expected equals to be a function, got {type(equals).__name__}.")
        if _among(primitive, _WALKED):
            raise ValueError(
                f"register_rule: expected a primitive without jaxprs that jaxgrad interprets itself, got {primitive}. "
                f"Register a rule for the primitive inside of it."
            )
        if not override and _among(primitive, (*RECORDS, *(rule.primitive for rule in registered.BUILT_IN))):
            raise ValueError(
                f"register_rule: expected a primitive without a rule, got {primitive}, for which jaxgrad has its own. "
                f"Pass override=True to put yours before it."
            )
        rule = registered.Rule(primitive, name, equals)
        registered.add(rule, override)
        return RegisteredRule(rule)


def _among(primitive: _jax.Primitive | str, known: Any) -> bool:
    """Whether the primitive, or the primitive of this name, is among these primitives and names."""
    return any(primitive is p or str(primitive) == p or primitive == str(p) for p in known)
