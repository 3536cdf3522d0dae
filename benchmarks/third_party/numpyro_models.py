"""Log densities of numpyro's programs, including the priors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.util import log_density

from benchmarks.models import Draw
from benchmarks.third_party.built import Built

N = 1000  # number of examples in the data, of which a batch is a part


def posterior(program: Any, sites: dict[str, jax.Array], *batch: Any) -> Built:
    """The loss of one example: the negative log density of the priors and of N such examples, divided by N."""

    def loss(sites: Any, *example: Any) -> jax.Array:
        return -log_density(program, tuple(a[None] for a in example), {}, sites)[0] / N

    return Built(loss, sites, batch)


def bayesian_network(dtype: Any, B: int = 16, D: int = 128, H: int = 256) -> Built:
    """numpyro's example of a Bayesian network: normal priors on all weights and a Gamma prior on the precision."""
    draw = Draw()

    def program(x: Any, y: Any) -> None:
        w = numpyro.sample("w", dist.Normal(jnp.zeros((D, H)), jnp.ones((D, H))))
        v = numpyro.sample("v", dist.Normal(jnp.zeros((H, H)), jnp.ones((H, H))))
        out = numpyro.sample("out", dist.Normal(jnp.zeros((H, 1)), jnp.ones((H, 1))))
        precision = numpyro.sample("precision", dist.Gamma(3.0, 1.0))
        mean = (jnp.tanh(jnp.tanh(x @ w) @ v) @ out)[:, 0]
        with numpyro.plate("data", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Normal(mean, 1.0 / jnp.sqrt(precision)), obs=y)

    sites = {"w": draw.weight(D, H), "v": draw.weight(H, H), "out": draw.weight(H, 1), "precision": jnp.ones(())}
    return posterior(numpyro.handlers.seed(program, 0), sites, draw.data(B, D), draw.data(B))


def hierarchical_regression(dtype: Any, B: int = 16, groups: int = 200, D: int = 32) -> Built:
    """Non-centered coefficients of each group, with a Cholesky factor of their correlations under an LKJ prior."""
    draw = Draw()

    def program(x: Any, group: Any, y: Any) -> None:
        scale = numpyro.sample("scale", dist.HalfNormal(jnp.ones(D)).to_event(1))
        correlation = numpyro.sample("correlation", dist.LKJCholesky(D, 1.0))
        z = numpyro.sample("z", dist.Normal(jnp.zeros((groups, D)), 1.0).to_event(2))
        coefficients = z @ (scale[:, None] * correlation).T
        with numpyro.plate("data", N, subsample_size=len(x)):
            logits = jnp.sum(coefficients[group] * x, -1)
            numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    factor = jnp.linalg.cholesky(0.9 * jnp.eye(D) + 0.1)
    sites = {"scale": jnp.ones(D), "correlation": factor, "z": draw.data(groups, D)}
    y = draw.ids(2, B).astype(jnp.float32)
    return posterior(numpyro.handlers.seed(program, 0), sites, draw.data(B, D), draw.ids(groups, B), y)


def topic_model(dtype: Any, B: int = 16, V: int = 500, topics: int = 20) -> Built:
    """Documents as mixtures of topics, each a softmax over the words, under normal priors."""
    draw = Draw()

    def program(words: Any) -> None:
        topic = numpyro.sample("topic", dist.Normal(jnp.zeros((topics, V)), 1.0).to_event(2))
        w = numpyro.sample("w", dist.Normal(jnp.zeros((V, 64)), 0.1).to_event(2))
        out = numpyro.sample("out", dist.Normal(jnp.zeros((64, topics)), 0.1).to_event(2))
        counts = jax.nn.one_hot(words, V).sum(-2)
        mixture = jax.nn.softmax(jax.nn.relu(counts @ w) @ out) @ jax.nn.softmax(topic)
        with numpyro.plate("documents", N, subsample_size=len(words)):
            numpyro.sample("words", dist.Categorical(mixture[:, None, :]).to_event(1), obs=words)

    sites = {"topic": draw.data(topics, V), "w": 0.1 * draw.data(V, 64), "out": draw.weight(64, topics)}
    return posterior(numpyro.handlers.seed(program, 0), sites, draw.ids(V, B, 40))
