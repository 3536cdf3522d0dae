"""The code paths for accelerators, run on a CPU: other implementations, narrow products, rounded operands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad.per_example.algebra.chunks import Blocks, map_examples, sum_examples
from jaxgrad.per_example.algebra.platforms import by_platform
from jaxgrad.per_example.algebra.scales import _squares_in_one_pass, _squares_in_two_passes, safe_sqrt
from tests.support.accelerators import compiled_for, operands_rounded_to

KINDS = {
    "ordinary": lambda rng, n: rng.normal(size=(6, n)),
    "huge": lambda rng, n: rng.normal(size=(6, n)) * 1e37,
    "tiny": lambda rng, n: rng.normal(size=(6, n)) * 1e-34,
    "of all magnitudes": lambda rng, n: rng.normal(size=(6, n)) * 10.0 ** rng.uniform(-30, 30, size=(6, n)),
    "near the borders": lambda rng, n: rng.normal(size=(6, n)) * 2.0 ** rng.choice([-63, 52, -64, 53], size=(6, n)),
}


def norm_of(parts):
    squares, unit = parts
    return np.asarray(unit, np.float64) * np.sqrt(np.asarray(squares, np.float64))


@pytest.mark.parametrize("way", [_squares_in_one_pass, _squares_in_two_passes])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_norm_has_float32_accuracy_at_any_magnitude(kind, way, dtype):
    rng = np.random.default_rng(0)
    for n in (1, 7, 300):
        a = jnp.asarray(KINDS[kind](rng, n), dtype)
        exact = np.sqrt((np.asarray(a, np.longdouble) ** 2).sum(1))
        found = norm_of(jax.jit(way, static_argnums=(1, 2))(a, 1, jnp.dtype(jnp.float32)))
        np.testing.assert_allclose(found, np.asarray(exact, np.float64), rtol=2e-6)


def test_a_norm_in_one_pass_handles_zero_infinity_and_nan_and_is_differentiable():
    a = jnp.asarray([[0, 0], [jnp.inf, 1], [jnp.nan, 1], [3, -4], [1e30, jnp.nan]], jnp.float32)
    squares, unit = _squares_in_one_pass(a, 1, jnp.dtype(jnp.float32))
    norms = unit * jnp.sqrt(squares)
    np.testing.assert_array_equal(norms, [0, np.inf, np.nan, 5, np.nan])
    assert unit[0] == 0

    def norm(a):
        squares, unit = _squares_in_one_pass(a, 1, a.dtype)
        return (unit * safe_sqrt(squares)).sum()

    some = jnp.asarray([[3.0, -4.0], [3e30, -4e30], [3e-30, -4e-30]], jnp.float32)
    np.testing.assert_allclose(jax.grad(norm)(some), [[0.6, -0.8]] * 3, rtol=1e-6)
    zeros = jnp.asarray([[3.0, 0.0], [0.0, 3e30], [0.0, 0.0], [3e-30, 0.0]], jnp.float32)
    np.testing.assert_allclose(jax.grad(norm)(zeros), [[1, 0], [0, 1], [0, 0], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-6)])
def test_norms_of_a_few_examples_at_a_time_are_accurate_at_real_sizes(dtype, rtol, platform):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(64, 48, n)), dtype) for n in (96, 128))

    def norms(W, x, y):
        g = jg.per_example_grad(lambda W, x, y: ((x @ W) * y).sum())(W, x, y)
        return jnp.stack([g.norms(), g.with_chunk_bytes(2**14).norms()])  # all examples at once, and a few at a time

    with compiled_for(platform):
        found = jax.jit(norms)(jnp.zeros((96, 128), dtype), x, y)
    G = np.einsum("btf,btk->bfk", np.asarray(x, np.float64), np.asarray(y, np.float64))
    np.testing.assert_allclose(found, np.stack([np.sqrt((G**2).sum((1, 2)))] * 2), rtol=rtol)


def test_block_sizes_depend_on_the_platform():
    a = jnp.arange(24.0).reshape(12, 2)
    sizes = []

    def doubled(a):
        sizes.append(a.shape[0])
        return 2 * a

    with compiled_for("cuda"):
        np.testing.assert_array_equal(map_examples(doubled, Blocks(3, 6), a), 2 * a)
        np.testing.assert_array_equal(sum_examples(lambda a: a.sum(0), Blocks(3, 6), a), a.sum(0))
    assert set(sizes) == {6}
    sizes.clear()
    np.testing.assert_array_equal(jax.jit(lambda a: map_examples(doubled, Blocks(3, 6), a))(a), 2 * a)
    assert {3} <= set(sizes)


def mlp(params, x, label):
    h = jnp.tanh(x @ params["in"] + params["b"])
    return jax.nn.logsumexp(h @ params["out"]) - (h @ params["out"])[label]


def sequence(params, x, label):
    h = jax.nn.gelu(params["E"][label] + x @ params["in"] + params["b"][None])
    return ((h @ params["out"]) ** 2).mean()


def conv(params, x, label):
    h = jax.lax.conv_general_dilated(x[None], params["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sin(h[0].mean((0, 1)) @ params["out"]).sum() * (1 + label)


def problem(name, dtype, B=64):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1), dtype)

    def data(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def ids(*shape):
        return jnp.asarray(rng.integers(0, 10, shape), jnp.int32)

    if name == "mlp":
        return mlp, {"in": draw(32, 48), "b": draw(48), "out": draw(48, 10)}, (data(B, 32), ids(B))
    if name == "sequence":
        params = {"E": draw(10, 48), "in": draw(32, 48), "b": draw(48), "out": draw(48, 16)}
        return sequence, params, (data(B, 12, 32), ids(B, 12))
    return conv, {"k": draw(3, 3, 4, 8), "out": draw(8, 10)}, (data(B, 12, 12, 4), ids(B).astype(dtype))


def exact_of(loss, params, batch):
    """Norms and per-example gradients in float64 of the same numbers."""
    wide = jax.tree.map(
        lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, (params, batch)
    )
    G = jax.vmap(jax.grad(loss), (None, *[0] * len(batch)))(wide[0], *wide[1])
    norms = jnp.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in jax.tree.leaves(G)))
    return norms, G


@pytest.mark.every(5)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ["mlp", "sequence", "conv"])
def test_norms_sums_and_grams_as_compiled_for_accelerators(name, platform):
    loss, params, batch = problem(name, jnp.float32)
    norms, G = exact_of(loss, params, batch)

    def results(params, *batch):
        g = jg.per_example_grad(loss)(params, *batch)
        return g.norms(), g.sum(), g.gram(), g.magnitudes()

    with compiled_for(platform):
        found = jax.jit(lambda *a: results(*a))(params, *batch)
    flat = jnp.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(G)], 1)
    np.testing.assert_allclose(found[0], norms, rtol=1e-5)
    np.testing.assert_allclose(found[2], flat @ flat.T, rtol=1e-4, atol=1e-5 * float(norms.max()) ** 2)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(G), strict=True):
        np.testing.assert_allclose(a, b.sum(0), rtol=1e-4, atol=1e-4 * float(norms.max()))


@pytest.mark.parametrize("name", ["mlp", "sequence", "conv"])
def test_bfloat16_products_are_not_widened(name):
    """No matrix product in the program for an accelerator has float32 operands; CPUs cannot run all the others."""
    loss, params, batch = problem(name, jnp.bfloat16)

    def results(params, *batch):
        g = jg.per_example_grad(loss)(params, *batch)
        materializes = name == "conv"  # the Gram matrix takes float32 products of materialized gradients
        return g.norms(), g.clip(1.0).sum(), g.dot(params), None if materializes else g.gram()

    with compiled_for("cuda"):
        program = jax.make_jaxpr(results)(params, *batch).jaxpr
    products = [eqn for eqn in equations(program) if is_product(eqn)]
    wide = [eqn for eqn in products if eqn.invars[0].aval.dtype == jnp.float32 and is_matrix(eqn)]
    assert products
    assert not wide, wide


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def is_product(eqn):
    return eqn.primitive.name in ("dot_general", "conv_general_dilated")


def is_matrix(eqn):
    """False for sums along rows, which are products with ones on a processor, and for sums of biases."""
    return min(eqn.invars[0].aval.ndim, eqn.invars[1].aval.ndim) > 1 and 1 not in eqn.invars[0].aval.shape


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["mlp", "sequence", "conv"])
def test_bfloat16_norms_have_float32_accuracy_and_a_weighted_sum_is_rounded_once(name):
    loss, params, batch = problem(name, jnp.bfloat16)
    rng = np.random.default_rng(3)
    c = jnp.asarray(rng.uniform(0.1, 2, size=len(jax.tree.leaves(batch)[0])), jnp.float32)

    @jax.jit
    def results(g):
        halved = g.scale(jnp.full_like(c, 0.5)).sum(jnp.float32)
        return g.norms(), g.scale(c).sum(jnp.float32), halved, g.magnitudes()

    g = jax.jit(lambda *a: jg.per_example_grad(loss)(*a))(params, *batch)  # apart, so that factors are rounded
    norms, total, halved, sizes = results(g)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, g)
    np.testing.assert_allclose(norms, wide.norms(), rtol=1e-5)
    size = np.asarray(norms if sizes is None else jnp.hypot(norms, sizes), np.float64)
    for a, exact in zip(jax.tree.leaves(halved), jax.tree.leaves(wide.sum(jnp.float32)), strict=True):
        np.testing.assert_allclose(a, exact / 2, rtol=1e-4, atol=1e-6 * size.sum())  # a power of two is exact
    off = [
        a.astype(b.dtype) - b
        for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(wide.scale(c).sum(jnp.float32)), strict=True)
    ]
    assert jnp.sqrt(sum((jnp.asarray(d, jnp.float64) ** 2).sum() for d in off)) <= 2.0**-8 * float(
        (np.asarray(c) * size).sum()
    )


# --- Guarantees where operands are rounded ----------------------------------------------------------------------------


def bilinear(W, x, y):
    """A loss with the gradient Σ_t y_t x_tᵀ, so that an adversary can choose both sides."""
    return ((x @ W.T) * y).sum()


def adversarial(seed, N, T, dtype):
    """Positions that nearly cancel, at magnitudes where the rounded factor can have any mantissa."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(N, T, 5)), rng.normal(size=(N, T, 4))
    off = 10.0 ** rng.uniform(-4, 0, size=(N, 1, 1))
    x[:, 1::2] = x[:, ::2] * (1 + off * rng.normal(size=x[:, ::2].shape))
    y[:, 1::2] = -y[:, ::2] * (1 + off * rng.normal(size=y[:, ::2].shape))
    scale = 10.0 ** rng.uniform(-1, 3, size=(N, 1, 1))
    return jnp.asarray(x, dtype), jnp.asarray(y * scale, dtype)


CASES = {
    "bfloat16": (jnp.bfloat16, None, None),
    "GPU": (jnp.float32, "cuda", jnp.float16),
    "TPU": (jnp.float32, "tpu", jnp.bfloat16),
}


@pytest.mark.every(4)
@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("case", CASES)
def test_a_contribution_is_within_the_bound_although_operands_are_rounded(case, T):
    dtype, platform, rounded = CASES[case]
    W = jnp.zeros((4, 5), dtype)
    x, y = adversarial(T, 2000, T, dtype) if T > 1 else [a[:, :1] for a in adversarial(T, 2000, 2, dtype)]
    gradient = jg.clipped_grad(bilinear, 1.0)

    def contribution(x, y):
        return gradient(W, x[None], y[None])[0]

    def contributions():
        return np.asarray(jax.jit(jax.vmap(lambda x, y: contribution(x, y)))(x, y), np.float64)

    if platform is None:
        found = contributions()
    else:
        with compiled_for(platform), operands_rounded_to(rounded):
            found = contributions()
    lengths = np.sqrt((found**2).sum((1, 2)))
    assert lengths.max() <= gradient.sensitivity(1)
    assert lengths.max() > 0.9  # some contributions nearly reach the bound


def test_the_rounding_of_operands_follows_the_matmul_precision():
    x, y = adversarial(0, 8, 2, jnp.float32)
    g = jg.per_example_grad(bilinear)(jnp.zeros((4, 5), jnp.float32), x, y)
    assert g.rounding() == 0
    with compiled_for("cuda"):
        assert g.rounding() == 2.0**-9
        with jax.default_matmul_precision("highest"):
            assert g.rounding() == 0
    with compiled_for("tpu"):
        assert g.rounding() == 2.0**-6
    narrow = jg.per_example_grad(bilinear)(jnp.zeros((4, 5), jnp.bfloat16), *adversarial(0, 8, 2, jnp.bfloat16))
    assert narrow.rounding() == 3 * 2.0**-8


def test_the_choice_of_a_platform_is_inlined():
    """A called function is compiled separately; a deep model's clipped sum then needed a third more memory."""
    program = jax.make_jaxpr(lambda a: by_platform(jnp.sin, jnp.cos)(a))(1.0)
    names = [eqn.primitive.name for eqn in program.jaxpr.eqns]
    assert "cond" in names
    assert not {"jit", "pjit"} & {*names}, names
