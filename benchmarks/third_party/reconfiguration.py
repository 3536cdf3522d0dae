"""Steps of stochastic reconfiguration beside NetKet's, for the same wave functions."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import report
from benchmarks.measure import measure
from benchmarks.workload import Row, Settings, Theme, Workload
from jaxgrad import curvature

NAME = "reconfiguration"
DAMPING, BLOCK = 1e-3, 256
RTOL = 1e-8  # of the largest entry
SIZES = {"small": (16, 64), "": (64, 1024)}  # sites and samples


def wave_functions(sites: int) -> dict[str, Any]:
    """flax modules of a batch of configurations, by name."""
    import netket as nk
    from flax import linen as nn

    class Transformer(nn.Module):
        """Patches of four spins, two layers of attention, and log cosh of complex numbers, as in Rende et al. 2024."""

        features: int = 32

        @nn.compact
        def __call__(self, spins: Any) -> Any:
            dense = functools.partial(nn.Dense, param_dtype=jnp.float64)
            x = dense(self.features)(spins.reshape(len(spins), sites // 4, 4))
            x = x + self.param("positions", nn.initializers.normal(), x.shape[1:], jnp.float64)
            for _ in range(2):
                norm = functools.partial(nn.LayerNorm, param_dtype=jnp.float64)
                attention = nn.MultiHeadDotProductAttention(4, param_dtype=jnp.float64)
                x = x + attention(norm()(x))
                x = x + dense(self.features)(nn.gelu(dense(2 * self.features)(norm()(x))))
            h = x.sum(1)
            return jnp.log(jnp.cosh(jax.lax.complex(dense(self.features)(h), dense(self.features)(h)))).sum(1)

    return {
        "RBM, real": nk.models.RBM(alpha=4, param_dtype=float),
        "RBM, complex": nk.models.RBM(alpha=4, param_dtype=complex),
        "RBM, modulus and phase": nk.models.RBMModPhase(alpha=4, param_dtype=float),
        "vision transformer": Transformer(),
    }


def steps(module: Any, mode: str) -> dict[str, Callable[..., Any]]:
    """The step (S + λI)⁻¹F by each program; NetKet's are for the gradient 2F."""
    import netket as nk
    from netket._src.ngd.srt_onthefly import srt_onthefly

    def log_psi(params: Any, sample: Any) -> Any:
        return module.apply({"params": params}, sample[None])[0]

    def ours(block_size: int | None, params: Any, samples: Any, energies: Any) -> Any:
        derivatives = curvature.log_derivatives(log_psi, block_size=block_size)(params, samples)
        return curvature.minsr(derivatives, energies, DAMPING)

    def theirs(chunk_size: int | None, params: Any, samples: Any, energies: Any) -> Any:
        settings = {"diag_shift": DAMPING, "solver_fn": nk.optimizer.solver.cholesky, "mode": mode}
        step = srt_onthefly(module.apply, energies, params, {}, samples, chunk_size=chunk_size, **settings)[0]
        return jax.tree.map(lambda a: a / 2, step)

    def dense(params: Any, samples: Any, energies: Any) -> Any:
        root, options = len(samples) ** 0.5, {"mode": mode, "dense": True, "center": True}
        O = nk.jax.jacobian(module.apply, params, samples, {}, **options) / root  # noqa: E741
        e = (energies - energies.mean()) / root
        e = e.real if mode == "real" else jnp.stack([e.real, e.imag], 1).ravel()
        O = O.reshape(e.size, -1)  # noqa: E741
        step = O.T @ nk.optimizer.solver.cholesky(O @ O.T + DAMPING * jnp.eye(e.size), e)[0]
        _, unravel = ravel_pytree(params)
        is_complex = any(jnp.iscomplexobj(a) for a in jax.tree.leaves(params))
        return unravel(jax.lax.complex(*jnp.split(step, 2)) if is_complex else step)

    return {
        "NetKet": functools.partial(theirs, None),
        "NetKet in blocks": functools.partial(theirs, BLOCK),
        "Jacobian": dense,
        "jaxgrad": functools.partial(ours, None),
        "jaxgrad in blocks": functools.partial(ours, BLOCK),
    }


def workloads(settings: Settings) -> Iterator[Workload]:
    sites, samples = SIZES["small" if settings.small else ""]
    rng = np.random.default_rng(0)
    try:
        modules = wave_functions(sites)
    except ModuleNotFoundError as error:
        columns = ("NetKet", "NetKet in blocks", "Jacobian", "jaxgrad", "jaxgrad in blocks")
        yield Workload(NAME, dict.fromkeys(columns, f"not installed: {error.name}"), ())
        return
    spins = jnp.asarray(rng.choice([-1.0, 1.0], size=(samples, sites)))
    energies = jnp.asarray(rng.normal(size=samples) + 1j * rng.normal(size=samples))
    for name, module in modules.items():
        mode = "real" if name.endswith("real") else "complex"
        params = module.init(jax.random.key(0), spins[:1])["params"]
        params = jax.tree.map(lambda a: a + 0.05 * rng.normal(size=a.shape), params)
        count = sum(a.size for a in jax.tree.leaves(params))
        functions: Any = steps(module, mode)
        if samples <= BLOCK:
            functions |= {k: "one block" for k in functions if k.endswith("in blocks")}
        yield Workload(
            f"{name}, {sites} sites, {count:,} parameters, {samples} samples",
            functions,
            (params, spins, energies if mode == "complex" else energies.real),
            agree=[k for k in functions if not isinstance(functions[k], str)],
            compare=close,
            goal=1.0,
            unit="NetKet",
        )


def close(reference: Any, other: Any) -> None:
    """Compare entry by entry, relative to the largest."""
    pairs = list(zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True))
    largest = max(float(jnp.abs(a).max()) for a, _ in pairs)
    difference = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    assert difference <= RTOL * largest, f"off by {difference / largest:.1e} of the largest entry"


def measured(workload: Workload, settings: Settings) -> Iterable[Row]:
    with jax.enable_x64(True):
        return measure(workload, settings)


THEME = Theme(
    NAME,
    "Stochastic reconfiguration beside NetKet",
    f"""
One step (S + λI)⁻¹F in float64, with λ = {DAMPING}, from samples and local energies that are drawn at random. `NetKet`
is its `VMC_SR` with `use_ntk=True, on_the_fly=True`, which takes inner products of Jacobians parameter by parameter;
`Jacobian` materializes NetKet's Jacobian. `jaxgrad` is `log_derivatives` and `minsr`. *In blocks* means {BLOCK} samples
at a time (`chunk_size`, `block_size`). The columns *time* and *memory* are multiples of `NetKet`. Before they are
timed, all steps must agree to {RTOL} of the largest entry. Memory is the temporary memory of the compiled program. This
theme needs NetKet in the same Python, and the environment variable OPENBLAS_NUM_THREADS=1.""",
    (
        report.milliseconds("NetKet"),
        report.ratio("NetKet in blocks"),
        report.ratio("Jacobian"),
        report.ratio("jaxgrad"),
        report.ratio("jaxgrad in blocks"),
        report.goal(),
        report.mebibytes("NetKet"),
        report.memory("NetKet in blocks"),
        report.memory("Jacobian"),
        report.memory("jaxgrad"),
        report.memory("jaxgrad in blocks"),
    ),
    workloads,
    measured,
)
