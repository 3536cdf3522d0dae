"""Normalizing flows of flowjax: the negative log density of one example."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flowjax.bijections
import flowjax.distributions
import flowjax.flows
import jax
import jax.numpy as jnp
import paramax

from benchmarks.models import Draw
from benchmarks.third_party.built import Built


def flow(make: Callable[..., Any], B: int = 16, D: int = 16, **options: Any) -> Built:
    base = flowjax.distributions.Normal(jnp.zeros(D))
    module = make(jax.random.key(0), base_dist=base, **options)
    params, static = eqx.partition(module, eqx.is_inexact_array, is_leaf=lambda n: isinstance(n, paramax.NonTrainable))

    def loss(params: Any, x: Any) -> jax.Array:
        return -paramax.unwrap(eqx.combine(params, static)).log_prob(x)

    return Built(loss, params, (Draw().data(B, D),))


def autoregressive_flow(dtype: Any) -> Built:
    return flow(flowjax.flows.masked_autoregressive_flow, flow_layers=4, nn_width=128, nn_depth=2)


def block_autoregressive_flow(dtype: Any) -> Built:
    return flow(flowjax.flows.block_neural_autoregressive_flow, nn_depth=1, nn_block_dim=8, flow_layers=2)


def spline_flow(dtype: Any) -> Built:
    return flow(flowjax.flows.triangular_spline_flow, flow_layers=4, knots=8)


def coupling_flow(dtype: Any) -> Built:
    spline = flowjax.bijections.RationalQuadraticSpline(knots=8, interval=4)
    return flow(flowjax.flows.coupling_flow, transformer=spline, flow_layers=4, nn_width=128, nn_depth=2)
