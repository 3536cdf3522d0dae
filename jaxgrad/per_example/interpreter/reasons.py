"""Why a gradient takes the direct route: the reasons that `explain` and `strict` print."""

from typing import NamedTuple

from jaxgrad import _jax


class Reason(NamedTuple):
    """Why a gradient is evaluated as `vmap(jax.grad)` would: the primitive, its line in the source, and the cause."""

    primitive: str
    source: str
    why: str


FORMED = Reason("", "", "the product is smaller than its operands")
"""The reason for a product that was materialized because the array is smaller; this is not the direct route."""

NO_PRODUCT = "its result is not a product of two smaller arrays"
NOT_APPLICABLE = "this operation cannot be applied to the product's operands"
INTEGERS = "it computes integers: convert the operands to a floating dtype before they are multiplied"
BATCHED_KERNEL = "jax.vmap inside the loss has batched this kernel, and no rule is used for a batched kernel"
UNKNOWN_STEPS = "it is computed in a loop with an unknown number of steps: give the loop a fixed number"
CARRIED = "it is carried through a loop that does more than add to it"
MAPPED_IN_LOOP = "every step applies a linear map to the parameter's gradient"
BRANCHES = "not every branch returns a product that is smaller than the gradient"
ADDED = "added to something that is not a product"
REGISTERED_HAS_NONE = "its registered rule has no product for this result"


def reason_at(eqn: _jax.Equation, why: str) -> Reason:
    """A reason that names the equation."""
    return Reason(eqn.primitive.name, _jax.source_line(eqn), why)


def unknown_primitive(eqn: _jax.Equation) -> Reason:
    """The reason for a primitive that jaxgrad does not know; it says how a rule for it is registered."""
    if _jax.is_batched_kernel(eqn):
        return reason_at(eqn, BATCHED_KERNEL)
    name = _jax.kernel_name(eqn)
    this, how = ("this primitive", "") if name is None else (f"the kernel {name!r}", f"(…, name={name!r})")
    return reason_at(eqn, f"it is not known what {this} computes: jaxgrad.register_rule{how} can say it")


def registered_makes_none(eqn: _jax.Equation, inner: Reason) -> Reason:
    """The reason for a primitive whose registered rule makes no product, from the reason found in the rule."""
    return reason_at(eqn, f"its registered rule makes no product: {inner.primitive}: {inner.why}")
