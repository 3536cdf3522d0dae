"""Wave functions of netket."""

from typing import Any

import jax
import jax.numpy as jnp
import netket as nk

from benchmarks.models import Draw
from benchmarks.third_party.built import Built

KEY = jax.random.key(0)


def wave_function(module: Any, sites: int = 64, B: int = 16) -> Built:
    """The real part of log psi, weighted by one number for each configuration, as in variational Monte Carlo."""
    draw = Draw()
    spins = 2.0 * draw.ids(2, B, sites) - 1.0

    def loss(params: Any, spin: Any, energy: Any) -> jax.Array:
        return energy * jnp.real(module.apply({"params": params}, spin[None])[0])

    return Built(loss, module.init(KEY, spins[:1])["params"], (spins, draw.data(B)))


def complex_machine(dtype: Any) -> Built:
    """nk.models.RBM with complex parameters."""
    return wave_function(nk.models.RBM(alpha=4, param_dtype=jnp.result_type(dtype, jnp.complex64)))


def phase_machine(dtype: Any) -> Built:
    """nk.models.RBMModPhase: real parameters for the modulus and for the phase."""
    return wave_function(nk.models.RBMModPhase(alpha=4, param_dtype=dtype))


def autoregressive(dtype: Any) -> Built:
    """nk.models.ARNNDense, which has masked matrices."""
    space = nk.hilbert.Spin(0.5, 16)
    return wave_function(nk.models.ARNNDense(hilbert=space, layers=3, features=16, param_dtype=dtype), 16)


def symmetric(dtype: Any) -> Built:
    """nk.models.GCNN with the translations and reflections of a chain."""
    graph = nk.graph.Chain(16)
    module = nk.models.GCNN(symmetries=graph, layers=3, features=16, param_dtype=dtype)
    return wave_function(module, 16)
