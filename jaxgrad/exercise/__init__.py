"""The exercise: the network wᵀσ(Wx + b), its loss, and its gradient by hand and by `jax.grad`.

The modules:

    params       Params(W, b, w) and their random initialization
    model        the network and its loss, pure functions of one example
    activations  σ, σ′ and σ″ of eleven activations, accurate to the last digits
    derivation   the exercise's two derivations, line by line, as written on the page
    closed_form  the stable closed form: gradients of one example and of batches, Hessian products
    autodiff     the same functions by `jax.grad`, with the same names and signatures
    labels       `signs`: labels of two classes as ±1
    job          `python -m jaxgrad`: train the network on real data and compare the closed form with `jax.grad`

Import it as `jaxgrad.network`.
"""

from jaxgrad.exercise import autodiff, closed_form, derivation
from jaxgrad.exercise.activations import (
    ACTIVATIONS,
    Activation,
    elu,
    gelu,
    gelu_tanh,
    identity,
    leaky_relu,
    logistic,
    relu,
    silu,
    sine,
    softplus,
    tanh,
)
from jaxgrad.exercise.labels import signs
from jaxgrad.exercise.model import loss, margin
from jaxgrad.exercise.params import Params, init_params

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Params",
    "autodiff",
    "closed_form",
    "derivation",
    "elu",
    "gelu",
    "gelu_tanh",
    "identity",
    "init_params",
    "leaky_relu",
    "logistic",
    "loss",
    "margin",
    "relu",
    "signs",
    "silu",
    "sine",
    "softplus",
    "tanh",
]
