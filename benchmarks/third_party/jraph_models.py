"""jraph's graph networks, updated by Haiku's modules."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jraph

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built


def graphs(B: int, nodes: int = 20, edges: int = 60, width: int = 32) -> tuple[jraph.GraphsTuple, jax.Array]:
    """A batch of graphs, all with the same number of nodes and edges, and labels."""
    draw = Draw()
    graph = jraph.GraphsTuple(
        nodes=draw.data(B, nodes, width),
        edges=draw.data(B, edges, 16),
        senders=draw.ids(nodes, B, edges),
        receivers=draw.ids(nodes, B, edges),
        n_node=jnp.full((B, 1), nodes),
        n_edge=jnp.full((B, 1), edges),
        globals=jnp.ones((B, 1, 16)),
    )
    return graph, draw.ids(10, B)


def graph_classifier(forward: Any, B: int = 8) -> Built:
    batch = graphs(B)
    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batch[0]))
    return Built(lambda p, graph, label: cross_entropy(model.apply(p, graph), label), params, batch)


def graph_network(dtype: Any) -> Built:
    """Two rounds of jraph.GraphNetwork, with MLPs that update edges, nodes and globals."""

    def mlp() -> Any:
        return jraph.concatenated_args(lambda x: hk.nets.MLP([128, 128])(x))

    def forward(graph: Any) -> Any:
        for _ in range(2):
            graph = jraph.GraphNetwork(mlp(), mlp(), mlp())(graph)
        return hk.Linear(10)(graph.globals[0])

    return graph_classifier(forward)


def graph_attention(dtype: Any) -> Built:
    """jraph.GraphConvolution, then jraph.GAT."""

    def forward(graph: Any) -> Any:
        graph = jraph.GraphConvolution(lambda n: jax.nn.relu(hk.Linear(128)(n)), add_self_edges=True)(graph)
        query = lambda n: hk.Linear(128)(n)  # noqa: E731
        logit = lambda s, r, e: jax.nn.leaky_relu(hk.Linear(1)(jnp.concatenate([s, r], -1)))  # noqa: E731
        graph = jraph.GAT(query, logit)(graph._replace(edges=None))
        return hk.Linear(10)(graph.nodes.mean(0))

    return graph_classifier(forward)
