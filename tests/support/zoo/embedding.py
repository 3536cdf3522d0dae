"""Tables that are looked up, and tables that are written to."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(3)
w, x, ids = draws.weight, draws.normal, draws.ids

REPEATED = np.array([[1, 5, 1, 1], [0, 12, 12, 3], [7, 8, 9, 10], [4, 4, 4, 4]])
BEYOND = np.array([[1, 13, -1, 1], [99, 12, 12, 3], [7, -8, 9, 10], [4, -14, 4, 400]])


@entry({"E": w(13, 7), "V": w(9, 7)}, (ids(13, 4, 3), x(4, 9)), paths("E", "V"))
def take(p, ids, y):
    h = jnp.tanh(jnp.take(p["E"], ids, axis=0)).mean(0)
    return jax.nn.softplus(y @ p["V"] @ h)


@entry({"E": w(13, 7)}, (REPEATED, x(4, 7)), paths("E"))
def repeated_ids(p, ids, y):
    return jnp.sum(jnp.tanh(p["E"][ids] * y).prod(0)) + jnp.sum(p["E"][ids] ** 2)


@entry({"E": w(17, 7)}, (ids(17, 3, 2, 4), x(3, 7)), paths("E"))
def ids_of_rank_2(p, ids, y):
    return jnp.sum(jnp.tanh(p["E"][ids].sum(1) @ y))


@entry({"E": w(29, 7), "V": w(9, 7)}, (ids(29, 4, 3), BEYOND, x(4, 9)), paths("E", "V"))
def means_of_embeddings(p, ids, some, y):
    """The cotangents are the same at all positions, and held once; with padding ids; and two means of one table."""
    h = jnp.tanh(p["E"][ids].mean(0)) + jnp.take(p["E"], some, axis=0, mode="fill", fill_value=0.0).sum(0)
    return jax.nn.softplus(y @ p["V"] @ jnp.sin(h))


@entry({"E": w(113, 7)}, (ids(113, 4, 5, 3), x(4, 7)), paths("E"))
def means_in_a_row(p, ids, y):
    """So many that they are merged, and beside lookups that differ by position."""
    h = sum(jnp.tanh(p["E"][ids[k]].mean(0) * (k + 1)) for k in range(4))
    return jnp.sum(jnp.sin(h * y)) + jnp.sum(jnp.tanh(p["E"][ids[4]] * y))


@entry({"E": w(113, 7)}, (ids(113, 4, 5, 3), x(4, 7)), paths("E"))
def a_mean_of_embeddings_at_every_step(p, ids, y):
    def step(h, ids):
        return jnp.tanh(h * y + p["E"][ids].mean(0)), None

    return jnp.sum(lax.scan(step, jnp.zeros(7), ids)[0])


@entry({"E": w(60, 7)}, (ids(60, 4, 3), x(4, 7)), paths("E"))
def a_mean_of_embeddings_tied_to_the_output(p, ids, y):
    return jax.nn.logsumexp(p["E"] @ jnp.tanh(p["E"][ids].mean(0) * y))


@entry({"E": w(13, 7)}, (ids(13, 4), x(4, 7)), paths("E"))
def one_id(p, i, y):
    return jnp.sum(jnp.tanh(p["E"][i] * y))


@entry({"E": w(13, 7)}, (BEYOND, x(4, 7)), paths("E"))
def padding_beyond_the_table_counts_zero(p, ids, y):
    return jnp.sum(jnp.tanh(p["E"].at[ids].get(mode="fill", fill_value=0.0, wrap_negative_indices=False) * y + 0.1))


@entry({"E": w(13, 7)}, (BEYOND, x(4, 7)), paths("E"))
def ids_clipped(p, ids, y):
    return jnp.sum(jnp.tanh(jnp.take(p["E"], ids, axis=0, mode="clip") * y))


@entry({"E": w(13, 7), "F": w(13, 7)}, (BEYOND, x(4, 7)), paths("E", "F"))
def ids_filled_and_wrapped(p, ids, y):
    h = jnp.take(p["E"], ids, axis=0, mode="fill", fill_value=0.0)
    return jnp.sum(jnp.tanh((h + jnp.take(p["F"], ids, axis=0, mode="wrap")) * y))


@entry({"E": w(13, 7)}, (np.where(BEYOND > 12, 13, BEYOND % 13), x(4, 7)), paths("E"))
def padding_id_masked_away(p, ids, y):
    h = jnp.where((ids < 13)[:, None], p["E"][ids], 0)
    return jnp.sum(jnp.tanh(h.sum(0) / (ids < 13).sum() * y))


@entry({"E": w(9, 14)}, (ids(14, 4, 3), x(4, 9)), paths("E"))
def columns_of_a_table(p, ids, y):
    return jnp.sum(jnp.tanh(y @ jnp.take(p["E"], ids, axis=1))) + jnp.sum(jnp.tanh(p["E"][:, ids[0]] * y))


@entry({"E": w(23, 11), "W": w(11, 12), "V": w(12, 11)}, (ids(23, 4, 4),), paths("E", "W", "V"))
def tied_to_the_output_layer(p, ids):
    h = p["E"][ids[:-1]]
    h = h + jnp.tanh(h @ p["W"]) @ p["V"]
    logits = h @ p["E"].T
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, ids[1:, None], axis=1)[:, 0])


@entry({"E": w(29, 13)}, (ids(29, 3, 3), x(3, 29)), paths("E"))
def tied_three_times(p, ids, bag):
    h = jnp.tanh(p["E"][ids] + bag @ p["E"])
    logits = h @ p["E"].T
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jax.nn.one_hot(ids, 29) * logits, axis=-1))


@entry({"E": w(13, 11)}, (ids(13, 4, 3), x(4, 11)), paths("E"))
def one_hot(p, ids, y):
    return jnp.sum(jnp.tanh(jax.nn.one_hot(ids, 13) @ p["E"] * y))


@entry({"E": w(13, 7), "P": w(5, 7), "S": w(3, 7)}, (ids(13, 4, 3), ids(3, 4, 3)), paths("E"))
def words_positions_and_segments(p, ids, segments):
    h = p["E"][ids] + p["P"][:3] + p["S"][segments]
    return jax.nn.logsumexp(jnp.tanh(h) @ h.mean(0))


@entry({"E": w(13, 7)}, (ids(13, 4, 4), x(4, 4)), paths("E"))
def weighted_bags(p, ids, weights):
    bags = jax.ops.segment_sum(p["E"][ids] * weights[:, None], jnp.array([0, 0, 1, 1]), num_segments=2)
    return jnp.sum(jnp.tanh(bags[0] * bags[1]) + jnp.cos(bags[0]))


@entry({"E": w(13, 8)}, (ids(13, 4, 3), x(4, 8)), paths("E"))
def looked_up_one_by_one(p, ids, y):
    return jnp.sum(jnp.tanh(jax.vmap(lambda i: p["E"][i])(ids) * y)) + lax.dynamic_index_in_dim(p["E"], ids[0])[0] @ y


@entry({"W": w(9, 7), "b": x(7)}, (ids(9, 4, 2), x(4, 2, 7), x(4, 9)))
def scatter_into_a_weight(p, ids, rows, y):
    changed = p["W"].at[ids].add(jnp.tanh(rows)).at[0].set(y[:7]).at[:, 3].multiply(y)
    return jnp.sum(jnp.tanh(y @ changed + p["b"]))


@entry({"v": x(6), "W": w(11, 6)}, (ids(7, 4, 3), x(4, 11)), paths("W"))
def scatter_of_products(p, ids, y):
    h = y @ p["W"]
    return jnp.sum(jnp.tanh(jnp.zeros((5, 6)).at[ids].add(h * p["v"], mode="drop").at[ids[0] % 5, 2].set(h[1])))


@entry({"E": w(4, 13, 7)}, (ids(4, 3), ids(13, 3, 2), x(3, 7)))
def a_table_of_tables(p, i, ids, y):
    return jnp.sum(jnp.tanh(p["E"][i, ids] * y)) + jnp.sum(p["E"][i][ids[0]] * y) ** 2
