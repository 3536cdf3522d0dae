"""Neural differential equations in diffrax, with Equinox networks as vector fields."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built, squared_error
from benchmarks.third_party.equinox_models import KEY, trained


class Field(eqx.Module):
    mlp: Any

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        return self.mlp(jnp.concatenate([y, t[None].astype(y.dtype)]))


def neural_ode(B: int, adjoint: Any, controller: Any) -> Built:
    draw = Draw()
    module = Field(eqx.nn.MLP(33, 32, 256, 2, jnp.tanh, key=KEY))

    def loss(field: Any, y: Any, target: Any) -> jax.Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, 1.0, 0.1, y, adjoint=adjoint, stepsize_controller=controller,
            max_steps=16,
        )  # fmt: skip
        return squared_error(solution.ys[0], target)

    return trained(module, loss, draw.data(B, 32), draw.data(B, 32))


def ode_by_checkpoints(dtype: Any, B: int = 8) -> Built:
    """A neural ODE with adaptive steps and diffrax's default adjoint, which uses a loop with checkpoints."""
    return neural_ode(B, diffrax.RecursiveCheckpointAdjoint(), diffrax.PIDController(rtol=1e-3, atol=1e-6))


def ode_direct(dtype: Any, B: int = 8) -> Built:
    """A neural ODE with steps of equal length in a scan."""
    return neural_ode(B, diffrax.DirectAdjoint(), diffrax.ConstantStepSize())


def neural_cde(dtype: Any, B: int = 8, T: int = 12) -> Built:
    """A controlled differential equation: the network computes a matrix that multiplies the derivative of the data."""

    class Vector(eqx.Module):
        mlp: Any

        def __call__(self, t: Any, y: Any, args: Any) -> Any:
            return self.mlp(y).reshape(32, 8)

    class Model(eqx.Module):
        initial: Any
        vector: Any
        head: Any

        def __call__(self, xs: Any) -> Any:
            ts = jnp.arange(T, dtype=xs.dtype)
            control = diffrax.LinearInterpolation(ts, xs)
            term = diffrax.ControlTerm(self.vector, control).to_ode()
            y = self.initial(xs[0])
            solution = diffrax.diffeqsolve(
                term, diffrax.Heun(), 0.0, T - 1.0, 0.5, y, adjoint=diffrax.DirectAdjoint(), max_steps=32
            )
            return self.head(solution.ys[0])

    keys = jax.random.split(KEY, 3)
    module = Model(
        eqx.nn.Linear(8, 32, key=keys[0]),
        Vector(eqx.nn.MLP(32, 256, 128, 1, jax.nn.softplus, jnp.tanh, key=keys[1])),
        eqx.nn.Linear(32, 10, key=keys[2]),
    )
    draw = Draw()
    return trained(module, lambda m, x, y: cross_entropy(m(x), y), draw.data(B, T, 8), draw.ids(10, B))
