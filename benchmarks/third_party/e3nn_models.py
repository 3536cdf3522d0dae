"""An equivariant network of e3nn-jax: its outputs rotate with its inputs."""

from typing import Any

import e3nn_jax as e3nn
import flax
import jax
import jax.numpy as jnp

from benchmarks.models import Draw
from benchmarks.third_party.built import Built


class Convolution(flax.linen.Module):
    """A convolution over the edges of a point cloud, with spherical harmonics and weights from the distances."""

    irreps: Any

    @flax.linen.compact
    def __call__(self, nodes: Any, vectors: Any, senders: Any, receivers: Any) -> Any:
        harmonics = e3nn.spherical_harmonics("0e + 1o + 2e", vectors, True)
        messages = e3nn.flax.Linear(nodes.irreps)(nodes)[senders]
        messages = e3nn.concatenate(
            [messages.filter("0e + 1o + 2e"), e3nn.tensor_product(messages, harmonics, filter_ir_out="0e + 1o + 2e")]
        ).regroup()
        radial = e3nn.bessel(e3nn.norm(vectors).array[:, 0], 8)
        weights = e3nn.flax.MultiLayerPerceptron((64, messages.irreps.num_irreps), jax.nn.silu)(radial)
        summed = e3nn.scatter_sum(messages * weights, dst=receivers, output_size=nodes.shape[0])
        skip = e3nn.flax.Linear(self.irreps, force_irreps_out=True)(nodes)
        return e3nn.flax.Linear(self.irreps, force_irreps_out=True)(summed / 4.0) + skip


class Potential(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, species: Any, positions: Any, senders: Any, receivers: Any) -> Any:
        vectors = e3nn.IrrepsArray("1o", positions[receivers] - positions[senders])
        nodes = e3nn.flax.Linear("32x0e")(e3nn.as_irreps_array(jax.nn.one_hot(species, 4, dtype=positions.dtype)))
        for _ in range(2):
            nodes = Convolution("64x0e + 16x1o + 8x2e")(nodes, vectors, senders, receivers)
            nodes = e3nn.scalar_activation(nodes, [jax.nn.silu, None, None])
        return jnp.sum(e3nn.flax.MultiLayerPerceptron((64, 1), jax.nn.silu)(nodes.filter("0e")).array)


def equivariant_potential(dtype: Any, B: int = 8, points: int = 8, edges: int = 24) -> Built:
    draw = Draw()
    module = Potential()
    senders = draw.ids(points, B, edges)
    receivers = (senders + 1 + draw.ids(points - 1, B, edges)) % points
    batch = (draw.ids(4, B, points), 2 * draw.data(B, points, 3), senders, receivers, draw.data(B))
    params = module.init(jax.random.key(0), *(a[0] for a in batch[:-1]))

    def loss(params: Any, species: Any, positions: Any, senders: Any, receivers: Any, energy: Any) -> jax.Array:
        return (module.apply(params, species, positions, senders, receivers) - energy) ** 2

    return Built(loss, params, batch)
