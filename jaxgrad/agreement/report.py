"""The report of a comparison: a table with a row for each leaf."""

from dataclasses import dataclass

import chex
import jax
import numpy as np

from jaxgrad.agreement.leaf import LeafAgreement


@dataclass(frozen=True)
class AgreementReport:
    """The result of `check_gradient`; it prints as a table, and `agrees` is the verdict.

    Attributes:
        leaves: one row per leaf, in the order of the parameter tree.
        examples: number of examples that were compared.
        reference: what the candidate was compared with, for example "jax.grad in float64".

    Example:
        >>> report = jg.check_gradient(lambda w, x: x, lambda w, x: w @ x, jnp.ones(3), jnp.eye(3))
        >>> print(str(report).splitlines()[-1])
        agrees with jax.grad on 3 examples
    """

    leaves: tuple[LeafAgreement, ...]
    examples: int
    reference: str

    @property
    def agrees(self) -> bool:
        """True if every leaf agrees."""
        return not any(leaf.problem for leaf in self.leaves)

    def assert_agrees(self) -> None:
        """Raise AssertionError, with this table and chex's message, unless every leaf agrees."""
        shapes = {leaf.path: (leaf.shape, leaf.dtype) for leaf in self.leaves}
        expected = {leaf.path: (leaf.expected_shape, leaf.expected_dtype) for leaf in self.leaves}
        excess = {leaf.path: np.array([leaf.excess, leaf.numerical or 0.0]) for leaf in self.leaves}
        try:
            chex.assert_equal(shapes, expected)
            chex.assert_tree_all_finite(excess)
            chex.assert_trees_all_close(excess, jax.tree.map(np.zeros_like, excess), rtol=0, atol=1)
        except AssertionError as error:
            raise AssertionError(
                f"the gradients disagree.\n{self}\n"
                f"chex, on shapes, dtypes and ‖Δ‖ in units of the tolerance (at most 1):\n{error}"
            ) from None

    def __str__(self) -> str:
        rows = [
            ("leaf", "shape", "dtype", "max |Δ|", "max ‖Δ‖/‖ref‖", "rtol", "‖Δ‖/allowed", "worst example", "verdict")
        ]
        for leaf in self.leaves:
            rows.append(
                (
                    leaf.path,
                    str(leaf.shape),
                    leaf.dtype,
                    f"{leaf.max_abs:.2e}",
                    f"{leaf.max_rel:.2e}",
                    f"{leaf.rtol:.0e}",
                    f"{leaf.excess:.2g}",
                    str(leaf.worst_example),
                    leaf.problem or "agrees",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        verdict = "agrees" if self.agrees else "DISAGREES"
        return "\n".join([*lines, f"{verdict} with {self.reference} on {self.examples} examples"])
