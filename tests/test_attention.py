"""Attention as it is used: JAX's own, a Pallas kernel, checkpoint policies, and layers scanned by Flax.

Each loss goes through one pass, two passes and `per_example_norms`, and is held against `vmap(jax.grad)` in float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from support.quick import quick_jit

import jaxgrad as jg

T, HEADS, SIZE, L, B = 6, 2, 4, 2, 5
D = HEADS * SIZE


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1]))


def drawn(kv_heads=HEADS):
    shapes = {"q": (D, D), "kv": (D, 2 * kv_heads * SIZE), "out": (D, D), "up": (D, 3 * D), "down": (3 * D, D)}
    return {name: draw(k, L, *shape) for k, (name, shape) in enumerate(shapes.items())} | {"scale": jnp.ones((L, D))}


def layer(attention, p, h):
    """A pre-norm transformer block, with names for checkpoint policies."""
    normal = h / jnp.sqrt((h * h).mean(-1, keepdims=True) + 1e-3) * p["scale"]
    q = checkpoint_name((normal @ p["q"]).reshape(T, HEADS, SIZE), "q")
    k, v = jnp.split((normal @ p["kv"]).reshape(T, -1, SIZE), 2, axis=1)
    h = h + checkpoint_name(attention(q, k, v).reshape(T, D), "attention") @ p["out"]
    return h + jax.nn.gelu(h @ p["up"]) @ p["down"]


def loss_of(attention, remat=lambda f: f):
    def loss(params, x):
        step = remat(lambda h, p: (layer(attention, p, h), None))
        return (lax.scan(step, x, params)[0] ** 2).mean()

    return loss


FLOAT32 = 1e-5  # JAX's attention computes the softmax in float32, and its programs round differently
FLOAT64 = 1e-9


def agree(loss, params, *batch, rtol=FLOAT64):
    """One pass, two passes and `per_example_norms` equal the gradients of vmap(jax.grad), clipped."""
    G = quick_jit(jax.vmap(jax.grad(loss), (None, *[0] * len(batch))))(params, *batch)
    leaves = [np.asarray(a) for a in jax.tree.leaves(G)]
    norms = np.sqrt(sum((a.reshape(len(a), -1) ** 2).sum(1) for a in leaves))
    bound = float(np.median(norms))
    expected = [np.tensordot(np.minimum(1, bound / norms), a, 1) for a in leaves]
    for passes in (1, 2):
        total, info = quick_jit(jg.clipped_grad(loss, bound, passes=passes))(params, *batch)
        np.testing.assert_allclose(info.norms, norms, rtol=rtol)
        for a, b in zip(jax.tree.leaves(total), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=100 * rtol, atol=rtol * bound)
    np.testing.assert_allclose(quick_jit(jg.per_example_norms(loss))(params, *batch)[1], norms, rtol=rtol)


xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
VARIANTS = {  # (attention, heads of keys and values)
    "causal": (functools.partial(xla, is_causal=True), HEADS),
    "local window": (functools.partial(xla, is_causal=True, local_window_size=(2, 0)), HEADS),
    "one head of keys and values": (functools.partial(xla, is_causal=True), 1),
    "bias and mask": (
        functools.partial(xla, bias=draw(9, 1, HEADS, T, T), mask=jnp.tril(jnp.ones((1, 1, T, T), bool))),
        HEADS,
    ),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_dot_product_attention(name):
    attention, kv_heads = VARIANTS[name]
    agree(loss_of(attention, jax.checkpoint), drawn(kv_heads), draw(7, B, T, D), rtol=FLOAT32)


# --- A Pallas kernel with a hand-written backward pass ----------------------------------------------------------------


def probabilities(q, k):
    scores = q @ k.T / np.sqrt(SIZE)
    scores = jnp.where(lax.broadcasted_iota(int, (T, T), 0) >= lax.broadcasted_iota(int, (T, T), 1), scores, -jnp.inf)
    return jax.nn.softmax(scores)


def forward_kernel(q, k, v, out):
    out[0] = probabilities(q[0], k[0]) @ v[0]


def backward_kernel(q, k, v, d, dq, dk, dv):
    P = probabilities(q[0], k[0])
    dP = d[0] @ v[0].T
    dS = P * (dP - (dP * P).sum(-1, keepdims=True)) / np.sqrt(SIZE)
    dq[0], dk[0], dv[0] = dS @ k[0], dS.T @ q[0], P.T @ d[0]


def by_head(kernel, results, *arrays):
    """Run a kernel for each head, on [T, heads, size] arrays."""
    block = pl.BlockSpec((1, T, SIZE), lambda i: (i, 0, 0))
    shape = jax.ShapeDtypeStruct((HEADS, T, SIZE), arrays[0].dtype)
    call = pl.pallas_call(
        kernel,
        out_shape=[shape] * results,
        grid=(HEADS,),
        in_specs=[block] * len(arrays),
        out_specs=[block] * results,
        interpret=True,
    )
    return [a.swapaxes(0, 1) for a in call(*(a.swapaxes(0, 1) for a in arrays))]


@jax.custom_vjp
def in_pallas(q, k, v):
    return by_head(forward_kernel, 1, q, k, v)[0]


in_pallas.defvjp(
    lambda q, k, v: (in_pallas(q, k, v), (q, k, v)),
    lambda saved, d: tuple(by_head(backward_kernel, 3, *saved, d)),
)


@pytest.mark.parametrize("remat", [jax.checkpoint, lambda f: f], ids=["checkpoint", "no checkpoint"])
@pytest.mark.every(2)
def test_a_pallas_kernel_with_a_backward_kernel(remat):
    q, k, v = draw(0, 3, T, HEADS, SIZE)
    np.testing.assert_allclose(in_pallas(q, k, v), xla(q, k, v, is_causal=True), rtol=FLOAT32)
    agree(loss_of(in_pallas, remat), drawn(), draw(7, B, T, D))


def causal(q, k, v):
    """Attention in float64."""
    return jnp.stack([probabilities(q[:, i], k[:, i]) @ v[:, i] for i in range(HEADS)], axis=1)


# --- Checkpoint policies ----------------------------------------------------------------------------------------------

policies = jax.checkpoint_policies
POLICIES = {
    "dots_saveable": policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": policies.dots_with_no_batch_dims_saveable,
    "save_only_these_names": policies.save_only_these_names("attention"),
    "save_any_names_but_these": policies.save_any_names_but_these("attention"),
    "everything_saveable": policies.everything_saveable,
    "offloaded": policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["q"],
        names_which_can_be_offloaded=["attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots offloaded": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", POLICIES)
def test_checkpoint_policies(name):
    remat = functools.partial(jax.checkpoint, policy=POLICIES[name])
    agree(loss_of(causal, remat), drawn(), draw(7, B, T, D))


# --- Layers scanned and rematerialized by Flax ------------------------------------------------------------------------


@pytest.mark.slow
def test_linen_scan_and_remat():
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, h, _):
            attended = linen.MultiHeadDotProductAttention(HEADS, param_dtype=float)(
                linen.LayerNorm(param_dtype=float)(h)
            )
            h = h + attended
            return h + linen.Dense(D, param_dtype=float)(jnp.tanh(linen.Dense(3 * D, param_dtype=float)(h))), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, h):
            body = linen.remat(Block, prevent_cse=False)
            stack = linen.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
            return (stack()(h, None)[0] ** 2).mean()

    model = Model()
    params = model.init(jax.random.key(0), jnp.ones((T, D)))
    agree(model.apply, params, draw(7, B, T, D))


@pytest.mark.slow
def test_nnx_scan_and_remat():
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs):
            options = {"param_dtype": float, "dtype": float, "rngs": rngs}
            self.norm = nnx.LayerNorm(D, **options)
            self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, **options)
            self.up, self.down = nnx.Linear(D, 3 * D, **options), nnx.Linear(3 * D, D, **options)

        def __call__(self, h):
            h = h + self.attention(self.norm(h))
            return h + self.down(jnp.tanh(self.up(h)))

    @nnx.split_rngs(splits=L)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return Block(rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def step(h, block):
        return block(h)

    graph, params, rest = nnx.split(stacked(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, x):
        return (step(x, nnx.merge(graph, params, rest)) ** 2).mean()

    agree(loss, params, draw(7, B, T, D), rtol=FLOAT32)
