"""per_example_grad against vmap(jax.grad) on random programs; JAXGRAD_FUZZ=20 runs 2,000 of them."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import programs

from conftest import FUZZ
from jaxgrad import per_example_grad

ONCE_WRONG = {
    125,
    161,
    168,
    843,
    1142,
    1179,
    1230,
    1312,
    1335,
    1350,
    1768,
    1977,
}  # seeds that once gave a wrong result or an error
QUICK = {"xla_backend_optimization_level": "0"}  # compilation takes most of the time


def disagreements(p: programs.Program) -> list[str]:
    """A line for each result that is off by more than p.rtol times the largest entry of its kind."""
    c = np.linspace(-1, 2, programs.B)

    def loss(params, *batch):
        """The program's loss, with auxiliary results of every kind."""
        value, x, weight = p.loss(params, *batch), batch[0], jax.tree.leaves(params)[0]
        spread = jnp.broadcast_to(x.sum(), (2, 3))
        extra = {"axis": x[None], "zeros": jnp.zeros(3), "spread": spread, "weight": weight, "none": None}
        return value, extra | {"value": value, "ids": (batch[4], batch[5])}

    def both(params, batch):
        g, aux = per_example_grad(loss, has_aux=True)(params, *batch)
        G, AUX = jax.vmap(jax.grad(loss, has_aux=True), (None, *[0] * len(batch)))(params, *batch)
        alike.append(jax.tree.map(lambda a, b: (a.dtype, a.shape) == (b.dtype, b.shape), aux, AUX))
        off = jax.tree.map(lambda a, b: jnp.abs(a.astype(float) - b.astype(float)).max(), aux, AUX)
        return (G, off), (g.materialize(), g.norms(), g.gram(), g.weighted_sum(jnp.asarray(c)), g.second_moment())

    alike: list = []
    (G, off), (materialized, norms, gram, weighted, second) = jax.jit(both, compiler_options=QUICK)(p.params, p.batch)
    wide = {n: np.asarray(v, np.float64).reshape(programs.B, -1) for n, v in G.items()}
    every = np.concatenate(list(wide.values()), 1)
    top = np.linalg.norm(every, axis=1).max()
    cases = [("norms", norms, np.linalg.norm(every, axis=1), top), ("gram", gram, every @ every.T, top**2)]
    for n, g in wide.items():
        size = max(np.abs(g).max(), 1e-3 * np.abs(every).max())
        cases += [(f"materialize {n}", materialized[n], g, size), (f"weighted_sum {n}", weighted[n], c @ g, size)]
        cases += [(f"second_moment {n}", second[n], (g * g).mean(0), size**2)]
    lines = [f"aux {n}" for n, same in alike[0].items() if not all(jax.tree.leaves(same))]
    lines += [f"aux {n}: off by {v}" for n, v in off.items() if not all(float(a) <= 1e-4 for a in jax.tree.leaves(v))]
    lines += [f"dtype {n}: {materialized[n].dtype}, not {G[n].dtype}" for n in G if materialized[n].dtype != G[n].dtype]
    for name, found, expected, size in cases:
        off = np.abs(np.asarray(found, np.float64).reshape(expected.shape) - expected).max()
        if not off <= p.rtol * size:
            lines.append(f"{name}: off by {off}, where the largest is {size}")
    return lines


def is_refused(p: programs.Program) -> bool:
    """Whether JAX cannot differentiate the program (a custom_vjp inside a custom_jvp); then neither can jaxgrad."""
    batched = (None, *[0] * len(p.batch))
    try:
        jax.eval_shape(jax.vmap(jax.grad(p.loss), batched), p.params, *p.batch)
    except (TypeError, NotImplementedError) as refusal:
        with pytest.raises(type(refusal)):
            jax.eval_shape(per_example_grad(p.loss), p.params, *p.batch)
        return True
    return False


def census(seeds) -> tuple[Counter, Counter]:
    """Count parameters that are factored, partly factored or materialized; and each kind of step that was drawn."""
    parameters, kinds = Counter(), Counter()
    for seed in seeds:
        p = programs.program(seed)
        kinds += p.kinds
        factors = jax.eval_shape(lambda *args, p=p: per_example_grad(p.loss)(*args).factors, p.params, *p.batch)
        for leaf in factors.values():
            dense = {f.kind == "Dense" for f in leaf}
            parameters["partly" if len(dense) == 2 else "Dense" if True in dense else "factored"] += 1
    return parameters, kinds


@pytest.mark.every(113)
@pytest.mark.parametrize("seed", sorted({*range(100 * FUZZ), *ONCE_WRONG}))
def test_a_random_program_agrees(seed):
    p = programs.program(seed)
    try:
        if is_refused(p):
            return
        lines = disagreements(p)
    except Exception as error:
        error.add_note(p.text)
        raise
    finally:
        if seed % 50 == 49:
            jax.clear_caches()
    assert not lines, "\n".join([*lines, p.text])


@pytest.mark.slow
def test_the_programs_cover_every_step_and_both_outcomes():
    parameters, kinds = census(range(60))
    print(dict(parameters), dict(kinds.most_common()))
    assert set(programs.TRANSFORMS) | set(programs.USES) | set(programs.CONTROLS) <= set(kinds)
    assert min(parameters["factored"] + parameters["partly"], parameters["Dense"]) > 20
