"""Weights behind a map that no example changes, penalties on the parameters, complex weights, and identities."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(12)
w, x, positive = draws.weight, draws.normal, draws.positive
MASK = np.random.default_rng(1).random((21, 17)) < 0.5
PERMUTATION = np.random.default_rng(0).permutation(21)


def used(W, x):
    return jnp.sum(jnp.tanh(W @ x))


# --- normalized weights


def weight_norm(p):
    return p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=1))[:, None]


@entry({"v": w(21, 17), "g": positive(21)}, (x(4, 17),), paths("v"))
def weight_normalized(p, x):
    return used(weight_norm(p), x)


@entry({"v": w(21, 17), "g": positive(21)}, (x(4, 2, 17),), paths("v"))
def weight_normalized_and_computed_twice(p, x):
    return jnp.sum(jax.checkpoint(lambda p, x: jnp.tanh(jnp.tanh(x @ weight_norm(p).T) @ weight_norm(p)))(p, x))


@entry({"v": w(17, 17), "g": positive(17)}, (x(3, 2, 17),), paths("v"))
def weight_normalized_and_recurrent(p, x):
    W = weight_norm(p)
    return lax.scan(lambda h, u: (jnp.tanh(W @ h + u), None), x[0], x)[0].sum()


@entry({"W": w(21, 17)}, (x(4, 17),), paths("W"))
def rows_standardized(p, x):
    W = p["W"] - p["W"].mean(1, keepdims=True)
    return used(W / (W.std(1, keepdims=True) + 0.1), x)


@entry({"W": w(21, 17)}, (x(4, 17),), paths("W"))
def spectrally_normalized(p, x):
    u = lax.fori_loop(0, 3, lambda _, u: jnp.tanh(p["W"] @ (u @ p["W"])), jnp.ones(21))
    v = lax.stop_gradient(u @ p["W"])
    v = v / jnp.linalg.norm(v)
    u = lax.stop_gradient(u / jnp.linalg.norm(u))
    return used(p["W"] / (u @ p["W"] @ v), x)


@entry({"K": w(9, 8, 3, 3)}, (x(3, 8, 4, 4),), (), paths("K"))
def kernels_standardized(p, x):
    K = p["K"] - p["K"].mean((1, 2, 3), keepdims=True)
    return jnp.sum(jnp.tanh(lax.conv(x[None], K / (K.std((1, 2, 3), keepdims=True) + 0.1), (1, 1), "SAME")))


# --- functions of each entry, and of all of them


@entry({"V": w(21, 17), "W": w(21, 17)}, (x(4, 17), x(4, 21)), paths("V", "W"))
def positive_weights(p, x, y):
    return used(jax.nn.softplus(p["V"]), x) + jnp.tanh(y @ jnp.exp(p["W"]) @ x)


@entry({"V": w(2, 21, 17)}, (x(4, 2, 17),), paths("V"))
def one_weight_of_two_scales_the_other(p, x):
    return used(p["V"][0] * jnp.exp(p["V"][1]), x.T)


@entry({"W": w(21, 17), "L": w(21, 21), "V": w(21, 17)}, (x(4, 17), x(4, 21)), paths("W", "L", "V"))
def weights_under_masks(p, x, y):
    return used(p["W"] * MASK, x) + used(jnp.tril(p["L"]), y) + used(jnp.where(MASK, p["V"], 0), x)


@entry({"W": w(21, 17)}, (x(4, 17),), paths("W"))
def rounded_with_a_straight_gradient(p, x):
    scale = jnp.abs(p["W"]).max() / 7
    return used(p["W"] + lax.stop_gradient(jnp.round(p["W"] / scale) * scale - p["W"]), x)


@entry({"W": w(21, 17), "V": w(21, 17), "U": w(21, 17)}, (x(4, 17),), paths("W", "V", "U"))
def accumulated_sorted_and_permuted(p, x):
    return used(jnp.cumsum(p["W"], 1), x) + used(jnp.sort(p["V"], 0), x) + used(p["U"][PERMUTATION], x)


@entry({"A": w(6, 4), "B": w(5, 6)}, (x(4, 24),), (), paths("A", "B"))
def kronecker_product(p, x):
    return used(jnp.kron(p["A"], p["B"]), x)


@entry({"L": w(17, 17)}, (x(4, 17),), paths("L"))
def triangular_solve(p, x):
    return jnp.sum(jnp.tanh(jax.scipy.linalg.solve_triangular(jnp.tril(p["L"]) + 3 * jnp.eye(17), x, lower=True)))


@entry({"W": w(21, 17), "V": w(17, 21)}, (x(4, 17),), paths("W", "V"))
def tied_and_mapped(p, x):
    W = jnp.tanh(p["W"])
    return jnp.sum(jnp.tanh(p["W"].T @ jnp.tanh(W @ x) + jnp.cumsum(p["V"], 0) @ jnp.tanh(p["V"].T @ x)))


# --- penalties


@entry({"W": w(21, 17), "b": x(21), "E": w(30, 17)}, (x(4, 17), draws.ids(30, 4, 2)), paths("W", "E"))
def weight_decay(p, x, i):
    penalty = sum(jnp.sum(a**2) for a in jax.tree.leaves(p))
    return jnp.sum(jnp.tanh(p["W"] @ (x + p["E"][i].sum(0)) + p["b"])) + 0.1 * penalty


@entry({"W": w(21, 17)}, (x(4, 17), positive(4)), paths("W"))
def weighted_examples_and_a_lasso(p, x, weight):
    return weight * (used(p["W"], x) + 0.1 * jnp.sum(jnp.abs(p["W"])))


@entry({"W": w(21, 17), "V": w(21, 17)}, (x(4, 17),), paths("W", "V"))
def penalties_that_couple_weights(p, x):
    penalty = jnp.linalg.norm(p["W"] @ p["V"].T) + jnp.linalg.svd(p["V"], compute_uv=False).sum()
    return used(p["W"], x) + jnp.tanh(x[0]) * penalty + used(p["V"], x)


@entry({"W": w(21, 17), "unseen": w(5, 4)}, (x(4, 17),), paths("W"))
def log_prior(p, x):
    prior = sum(jax.scipy.stats.norm.logpdf(a).sum() for a in jax.tree.leaves(p))
    return used(p["W"], x) - 0.01 * prior


# --- parts of one weight that are used in different ways


@entry({"W": w(33, 17)}, (x(4, 17),), paths("W"))
def split_into_a_masked_a_penalized_and_a_plain_part(p, x):
    a, b, c = jnp.split(p["W"], 3)
    return used(a * MASK[:11], x) + 0.1 * jnp.sum(b**2) + used(c, x)


@entry({"W": w(3, 11, 17)}, (x(4, 17),), paths("W"))
def unstacked_into_a_masked_a_penalized_and_a_plain_part(p, x):
    a, b, c = jnp.unstack(p["W"])
    return used(a * MASK[:11], x) + 0.1 * jnp.sum(b**2) + used(c, x)


@entry({"W": w(11, 17), "V": w(11, 17)}, (x(4, 17),), paths("W", "V"))
def joined_selected_and_subtracted(p, x):
    V = jnp.where(MASK[:11], p["V"], jnp.tanh(p["W"])) - jnp.exp(p["W"])
    joined = jnp.concatenate([p["W"], jnp.sin(V), V])
    return used(joined, x) + used(V, x) + 0.1 * jnp.sum(joined**2)


# --- inside loops


def recurrent(weight, h, xs):
    return jnp.sum(lax.scan(lambda h, x: (jnp.tanh(weight() @ h + x), h[0] * x[1]), h, xs)[0])


SQUARE = np.random.default_rng(2).random((19, 19)) < 0.5


@entry({"v": w(19, 19), "g": positive(19)}, (x(4, 3, 19),), paths("v"))
def weight_normalized_in_every_step(p, xs):
    return recurrent(lambda: weight_norm(p), jnp.ones(19), xs)


@entry({"W": w(19, 19)}, (x(4, 3, 19),), paths("W"))
def masked_in_every_step(p, xs):
    masked = recurrent(lambda: jnp.where(SQUARE, p["W"], 0) * 2, jnp.ones(19), xs)
    return masked + recurrent(lambda: jnp.tril(p["W"]), xs[0], xs)


@entry({"W": w(19, 19)}, (x(4, 3, 19),), paths("W"))
def rematerialized_with_its_map(p, xs):
    step = jax.checkpoint(lambda h, x: (jnp.tanh(jax.nn.softplus(p["W"]) @ h / 9 + x), None))
    return jnp.sum(lax.scan(step, jnp.ones(19), xs)[0])


@entry({"W": w(19, 19)}, (x(4, 3, 19),))
def a_map_that_is_another_in_every_step(p, xs):
    scales = jnp.arange(1.0, 4.0)
    return jnp.sum(lax.scan(lambda h, s: (jnp.tanh(jnp.tanh(s[0] * p["W"]) @ h + s[1]), None), xs[0], (scales, xs))[0])


@entry({"W": w(19, 19)}, (x(4, 3, 19),), paths("W"))
def penalized_in_every_step(p, xs):
    def step(total, x):
        return total + jnp.sum(jnp.tanh(p["W"] @ x)) + x[0] * jnp.sum(p["W"] ** 2), None

    return lax.scan(step, 0.0, xs)[0]


@entry({"W": w(19, 19)}, (x(4, 19),), paths("W"))
def a_shared_loop_before_an_example_is_met(p, x):
    v, _ = lax.scan(lambda v, _: (v / jnp.linalg.norm(v) @ p["W"] @ p["W"].T, None), jnp.ones(19), None, length=3)
    sigma = lax.cond(p["W"][0, 0] > 0, lambda: jnp.linalg.norm(v), lambda: 1 + jnp.linalg.norm(v))
    return used(p["W"] / lax.stop_gradient(sigma), x)


# --- complex weights


@entry({"re": w(21, 17), "im": w(21, 17)}, (x(4, 17),), paths("re", "im"))
def complex_weight_with_a_penalty(p, x):
    W = lax.complex(p["re"], p["im"])
    return jnp.sum(jnp.abs(W @ lax.complex(x, jnp.sin(x)))) + x[0] * jnp.sum(jnp.abs(W) ** 2)


@entry({"re": w(21, 17), "im": w(21, 17)}, (x(4, 17),), paths("re", "im"))
def complex_weight(p, x):
    return jnp.sum(jnp.abs(lax.complex(p["re"], p["im"]) @ lax.complex(x, jnp.sin(x))))


@entry({"re": w(3, 11, 9), "im": w(3, 11, 9)}, (x(3, 8, 11),), paths("re", "im"))
def fourier_layer(p, x):
    modes = jnp.einsum("mi,mio->mo", jnp.fft.rfft(x, axis=0)[:3], lax.complex(p["re"], p["im"]))
    return jnp.sum(jnp.tanh(jnp.fft.irfft(modes, n=8, axis=0)))


@entry({"W": w(2, 21, 17)}, (x(4, 17),), paths("W"))
def real_and_imaginary_parts_in_one_array(p, x):
    y = (p["W"][0] + 1j * p["W"][1]) @ jnp.exp(1j * x)
    return jnp.sum(jnp.cos(y.real) * y.imag)


# --- identities


@entry({"W": w(21, 17), "V": w(21, 17)}, (x(4, 17),), paths("W", "V"))
def behind_identities(p, x):
    (V,) = lax.optimization_barrier((p["V"],))
    return used(jax.device_put(p["W"], jax.devices()[0]), x) + used(V, x)


@entry({"W": w(21, 17)}, (x(4, 17),), paths("W"))
def behind_a_custom_identity(p, x):
    @jax.custom_vjp
    def identity(W):
        return W

    identity.defvjp(lambda W: (W, None), lambda _, g: (-0.5 * g,))
    return used(identity(p["W"]), x)


# --- parameters no larger than an activation


@entry(
    {"W": w(13, 3, 4), "b": x(3, 4), "scale": positive(3, 4), "position": x(5, 13), "token": x(1, 13)},
    (x(3, 4, 13),),
    paths("W"),
    paths("b", "scale", "position"),
)
def small_parameters_of_two_axes(p, x):
    h = jnp.concatenate([p["token"], x]) + p["position"]
    y = jnp.einsum("td,dhk->thk", h, p["W"]) + p["b"]
    return jnp.sum(jnp.tanh((y - y.mean((1, 2), keepdims=True)) * p["scale"]))


@entry({"U": w(8, 8), "V": w(8, 2), "b": x(2, 4)}, (x(3, 9, 2),), (), paths("U", "V", "b"))
def recurrent_on_two_inputs(p, x):
    step = lambda h, u: (jnp.tanh(p["U"] @ h + p["V"] @ u + p["b"].ravel()), None)  # noqa: E731
    return lax.scan(step, jnp.zeros(8), x)[0].sum()


# --- loops and branches that are one map: no example changes what they do


@entry({"W": w(17, 17)}, (x(4, 17),), paths("W"))
def exponential(p, x):
    return used(jax.scipy.linalg.expm(p["W"] - p["W"].T), x)


@entry({"W": w(21, 17)}, (x(4, 17),), paths("W"))
def orthogonalized_by_iteration(p, x):
    step = lambda W, _: (1.5 * W - 0.5 * W @ (W.T @ W), None)  # noqa: E731
    return used(lax.scan(step, p["W"] / jnp.linalg.norm(p["W"]), None, length=3)[0], x)


def power_series(W):
    def step(carry, k):
        power, total, count = carry
        power = power @ W / (1 + k)
        return (power, total + power, count + 1), power.sum()

    (_, total, _), sizes = lax.scan(step, (jnp.eye(17), jnp.zeros((17, 17)), 0), jnp.arange(4.0))
    return total, sizes


@entry({"W": w(17, 17)}, (x(4, 17),), paths("W"))
def power_series_of_a_weight(p, x):
    return used(power_series(p["W"])[0], x)


@entry({"W": w(17, 17)}, (x(4, 17),), (), paths("W"))
def power_series_and_a_penalty_of_its_terms(p, x):
    total, sizes = power_series(p["W"])
    return used(total, x) + 0.01 * sizes.sum()


@entry({"W": w(17, 17), "a": w(3)}, (x(4, 17),), paths("W"))
def loops_in_a_branch_that_the_parameters_choose(p, x):
    def squared(W):
        return lax.fori_loop(0, 2, lambda _, W: jnp.sin(W) @ W, W)

    W = lax.switch((p["a"].sum() > 0).astype(int), [squared, jnp.tanh], p["W"])
    return used(W, x) + used(lax.cond(p["a"].sum() > 0, jnp.tanh, squared, p["W"]), x)


@entry({"W": w(17, 17), "V": w(3, 17, 17)}, (x(4, 17),), paths("W"))
def mixed_with_every_matrix_of_a_stack(p, x):
    return used(lax.scan(lambda W, V: (jnp.tanh(W @ V), W.sum()), p["W"], p["V"])[0], x)


# --- another map in every layer of a stack


def layers(name, f):
    def loss(p, x):
        return lax.scan(lambda h, W: (jnp.tanh(f(W) @ h), None), x, p["W"])[0].sum()

    loss.__name__ = f"layers_of_{name}_weights"
    return loss


def with_unit_rows(W):
    return W / jnp.linalg.norm(W, axis=1, keepdims=True)


for name, f in {
    "tanh": jnp.tanh,
    "masked": lambda W: jnp.where(MASK[:17], W, 0.0),
    "unit_rows": with_unit_rows,
    "masked_unit_rows": lambda W: with_unit_rows(jnp.tril(jnp.exp(W))),
    "exponential": jax.scipy.linalg.expm,
    "plain_and_mapped": lambda W: W + jnp.tril(W) + with_unit_rows(W),
    "scattered": lambda W: jnp.zeros((17, 17)).at[np.arange(17)[::-1]].add(jnp.sin(W)),
}.items():
    entry({"W": w(3, 17, 17)}, (x(4, 17),), paths("W"))(layers(name, f))


@entry({"W": w(3, 17, 17)}, (x(4, 17),), paths("W"))
def layers_of_mapped_weights_computed_twice(p, x):
    return lax.scan(jax.checkpoint(lambda h, W: (jnp.tanh(jnp.exp(W - 3) @ h), None)), x, p["W"])[0].sum()


@entry({"W": w(3, 17, 17)}, (x(4, 17),), paths("W"))
def layers_of_mapped_weights_and_keys(p, x):
    def step(carry, W):
        h, key = carry
        key, now = jax.random.split(key)
        return (jnp.tanh(jnp.tanh(W) @ (h * jax.random.bernoulli(now, 0.5, h.shape))), key), None

    return lax.scan(step, (x, jax.random.key(1)), p["W"])[0][0].sum()


@entry({"W": w(17, 17)}, (x(4, 17),), paths("W"))
def shared_arrays_leave_a_jitted_loss(p, x):
    return jax.jit(lambda W, x: jnp.sum(jnp.tanh(jnp.tanh(W) @ x)))(p["W"], x)


@entry({"re": w(17, 17), "im": w(17, 17)}, (x(4, 17),))
def complex_weights_over_the_size_of_their_transform(p, x):
    W = lax.complex(p["re"], p["im"])
    scale = jnp.sum(jnp.real(jnp.fft.ifft2(jnp.fft.fft2(W) ** 2)))
    return jnp.sum(jnp.tanh(jnp.abs(W / (2 + scale) @ x)))


@entry({"W": w(17, 17)}, (x(4, 17),), paths("W"))
def over_the_size_of_a_transform(p, x):
    return used(p["W"] / (2 + jnp.sum(jnp.fft.irfft2(jnp.fft.rfft2(p["W"]), s=(17, 17)) ** 2)), x)


# --- hand-written backward passes that are not linear, so that their loop or branch is not a map


def by_hand(backward):
    f = jax.custom_vjp(lambda W: W)
    f.defvjp(lambda W: (W, W), lambda W, d: (backward(W, d),))
    return lambda p, x: used(f(p["W"]), x)


NOT_LINEAR = {
    "a_branch_without_its_cotangent": lambda W, d: lax.cond(W[0, 0] > 1e3, lambda: 2 * d, lambda: jnp.cos(W)),
    "a_branch_that_adds": lambda W, d: lax.cond(W[0, 0] < 1e3, lambda: 2 * d + W, lambda: d),
    "a_loop_that_forgets": lambda W, d: lax.fori_loop(0, 2, lambda i, d: jnp.sin(W), d),
    "a_loop_that_adds": lambda W, d: lax.fori_loop(0, 2, lambda i, d: 0.5 * d + W, d),
    "a_loop_that_squares": lambda W, d: lax.fori_loop(0, 2, lambda i, d: d * d, d),
    "a_loop_that_counts": lambda W, d: lax.fori_loop(0, 2, lambda i, c: (c[1], c[0] + 1.0), (d, W))[0],
}
for name, backward in NOT_LINEAR.items():
    loss = by_hand(backward)
    loss.__name__ = name
    entry({"W": w(17, 17)}, (x(4, 17),))(loss)
