"""clipped_grad: agreement with jax-privacy and optax, and the guarantee on neighboring batches."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import pytest

import jaxgrad as jg
from benchmarks import models
from jaxgrad import clipping

B = 7
MODELS = {
    "MLP": models.mlp((6, 9, 8, 3), B),
    "conv net": models.conv_net(B),
    "transformer": models.transformer(16, 5, B),
    "tied language model": models.language_model(30, 16, 4, B),
}


MODEL = pytest.mark.parametrize("name", MODELS)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)  # each program here runs once


@pytest.fixture(autouse=True)
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@functools.cache
def reference(name):
    """(params, batch, materialized gradients, their norms, a bound near the median norm)."""
    model = MODELS[name]
    params, batch = wide(model.params), wide(model.batch)
    if name == "conv net":
        batch = (batch[0][:, ::3, ::3], batch[1])
    G = quick_jit(jax.vmap(jax.grad(model.loss), (None, *[0] * len(batch))))(params, *batch)
    norms = np.sqrt(sum(np.square(leaf).reshape(B, -1).sum(1) for leaf in jax.tree.leaves(G)))
    return params, batch, G, norms, 1.01 * float(np.median(norms))


# --- Agreement with jax-privacy and optax -----------------------------------------------------------------------------


@pytest.mark.every(13)
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")  # jax-privacy calls it
@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
@MODEL
def test_the_sums_are_those_of_jax_privacy_and_optax(name, microbatch_size):
    params, batch, G, norms, bound = reference(name)
    loss, axes = MODELS[name].loss, tuple(range(1, 1 + len(batch)))
    our_grad = quick_jit(jg.clipped_grad(loss, bound, microbatch_size=microbatch_size))
    privacy_grad = jax_privacy.clipped_grad(
        loss, l2_clip_norm=bound, batch_argnums=axes, keep_batch_dim=False, return_values=True
    )
    privacy_grad = quick_jit(privacy_grad)
    for mask in (np.ones(B, bool), np.arange(B) % 3 != 1, np.zeros(B, bool)):
        total, info = our_grad(params, *batch, mask=mask)
        expected, aux = privacy_grad(params, *batch, is_padding_example=~mask)
        chex.assert_trees_all_close(total, expected, rtol=1e-6, atol=1e-6 * bound)
        np.testing.assert_allclose(info.norms, np.where(mask, norms, 0), rtol=1e-9)
        np.testing.assert_allclose(info.values, np.where(mask, aux.values, 0), rtol=1e-9)
        kept = jax.tree.map(lambda a, mask=mask: a[mask], G)
        if mask.any():
            clipped, count = optax.per_example_global_norm_clip(kept, bound)
            chex.assert_trees_all_close(total, clipped, rtol=1e-6, atol=1e-6 * bound)
            assert info.clipped_fraction == count / mask.sum()
        else:
            assert all(not np.any(leaf) for leaf in jax.tree.leaves(total))
            assert info.clipped_fraction == 0


@pytest.mark.every(5)
@MODEL
def test_each_group_is_clipped_by_itself(name):
    params, batch, G, _, bound = reference(name)
    by_key = {key: bound / (2 + k) for k, key in enumerate(params)} if isinstance(params, dict) else None
    bounds = by_key or [bound / (2 + k) for k in range(len(params))]
    total, info = quick_jit(jg.clipped_grad(MODELS[name].loss, bounds))(params, *batch)
    exceeded = np.zeros(B, bool)
    for key in params if by_key else range(len(params)):
        norms = np.sqrt(sum(np.square(leaf).reshape(B, -1).sum(1) for leaf in jax.tree.leaves(G[key])))
        c = np.minimum(1, bounds[key] / np.maximum(norms, 1e-30))
        exceeded |= norms > bounds[key]
        expected = jax.tree.map(lambda leaf, c=c: np.tensordot(c, leaf, 1), G[key])
        chex.assert_trees_all_close(total[key], expected, rtol=1e-6, atol=1e-6 * bound)
    assert info.clipped_fraction == exceeded.mean()


# --- A loss whose gradient can be any sum of products -----------------------------------------------------------------

F, K, T = 24, 20, 4
BOUNDS = {"flat": 1.5, "groups": {"W": 0.75, "b": 2.0, "E": 0.5}}


def loss(params, s, x, ids):
    """∂/∂W = Σ_t s_t x_tᵀ, ∂/∂b = Σ_t s_t, ∂/∂E[ids_t] = Σ s_t."""
    along = (x @ params["W"].T).astype(s.dtype) + params["b"] + params["E"][ids]
    return jnp.sum((s * along).astype(jnp.float32))


def parameters(dtype):
    return {"W": jnp.zeros((F, K), dtype), "b": jnp.zeros(F, dtype), "E": jnp.zeros((50, F), dtype)}


def adversarial(rng, pairs, size):
    """(s, x, ids) of pairs × size examples: of all magnitudes, canceling, aligned, zero, not finite, unbalanced."""
    s, x = rng.normal(size=(pairs, size, T, F)), rng.normal(size=(pairs, size, T, K))
    kind = rng.integers(0, 9, (pairs, size, 1, 1))
    s *= np.where(kind >= 1, 10.0 ** rng.uniform(-20, 15, (pairs, size, 1, 1)), 1)
    x *= np.where(kind >= 1, 10.0 ** rng.uniform(-15, 15, (pairs, size, 1, 1)), 1)
    opposite = np.where(np.arange(T) % 2, -1.0, 1.0)[:, None] * (1 + 10.0 ** rng.uniform(-9, 0, (pairs, size, T, 1)))
    cancels = (kind == 2) | (kind == 3)
    s, x = np.where(cancels, s[:, :, :1] * opposite, s), np.where(cancels, x[:, :, :1], x)
    same = rng.normal(size=F), rng.normal(size=K)
    s, x = np.where(kind == 4, same[0] * 1e3, s), np.where(kind == 4, same[1], x)
    s = np.where(kind == 5, 0.0, s)
    unbalanced = np.where(kind == 8, 10.0 ** rng.uniform(-18, 18, (pairs, size, T, 1)), 1)
    s, x = s * unbalanced, x / unbalanced
    worst = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 1e-38], (pairs, size, 1, 1))
    s = np.where((kind == 6) & (rng.random(s.shape) < 0.3), worst, s)
    x = np.where((kind == 7) & (rng.random(x.shape) < 0.3), worst, x)
    return s, x, rng.integers(-1, 52, (pairs, size, T))


@pytest.mark.every(9)
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize(
    ("passes", "dtype"),
    [(1, jnp.float32), (1, jnp.bfloat16), (1, jnp.float16), (2, jnp.float32), (2, jnp.bfloat16)],  # 2 refuses float16
)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(passes, dtype, kind):
    size, rng, largest = 6, np.random.default_rng(0), 0.0
    gradient = jg.clipped_grad(loss, BOUNDS[kind], passes=passes)

    @jax.jit
    @jax.vmap
    def with_and_without(batch, j):
        one = lambda mask: gradient(parameters(dtype), *batch, mask=mask)  # noqa: E731
        return one(jnp.ones(size, bool)), one(jnp.arange(size) != j)

    count = nonfinite = 0
    for _ in range(20):
        s, x, ids = adversarial(rng, 500, size)
        with np.errstate(over="ignore"):
            batch = (jnp.asarray(s, dtype), jnp.asarray(x, dtype), jnp.asarray(ids, jnp.int32))
        (a, info), (b, _) = with_and_without(batch, jnp.asarray(rng.integers(0, size, 500)))
        assert all(leaf.dtype == (jnp.float32 if passes == 1 else dtype) for leaf in jax.tree.leaves(a))
        squares = [
            np.square(np.float64(v) - np.float64(w)).reshape(500, -1).sum(1)
            for v, w in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        ]
        moved = np.sqrt(sum(squares))
        assert np.isfinite(moved).all()
        largest, count = max(largest, moved.max()), count + 500
        nonfinite += int(info.nonfinite.sum())
    bound = gradient.sensitivity(size, dtype)
    share = largest / gradient.max_norm
    print(f"{kind}, {passes} passes, {jnp.dtype(dtype).name}: largest of {count} moves {share:.6f} of the bound")
    assert nonfinite > 100
    rounding = 3 * 2.0**-8 if dtype == jnp.bfloat16 else 0.0  # what is added to a norm
    assert 0.99 * gradient.max_norm < (1 + rounding) * largest
    assert largest <= bound


def test_removing_an_example_equals_masking_it():
    rng = np.random.default_rng(1)
    gradient = jax.jit(jg.clipped_grad(loss, 1.5))
    for _ in range(20):
        s, x, ids = (a[0] for a in adversarial(rng, 1, 6))
        s, x, ids = jnp.asarray(s, jnp.float32), jnp.asarray(x, jnp.float32), jnp.asarray(ids, jnp.int32)
        whole, _ = gradient(parameters(jnp.float32), s, x, ids)
        masked, _ = gradient(parameters(jnp.float32), s, x, ids, mask=jnp.arange(6) != 2)
        removed, _ = gradient(parameters(jnp.float32), *(np.delete(a, 2, 0) for a in (s, x, ids)))
        for total in (masked, removed):
            moved = np.sqrt(sum(np.square(np.float64(whole[k]) - np.float64(total[k])).sum() for k in whole))
            assert moved <= jg.clipped_grad(loss, 1.5).sensitivity(6)
        chex.assert_trees_all_close(masked, removed, rtol=1e-5, atol=1e-4)


def test_masked_examples_change_nothing():
    rng = np.random.default_rng(2)
    gradient = jax.jit(jg.clipped_grad(lambda p, *b: (loss(p, *b), b[0].sum()), 1.5, has_aux=True))
    s, x, ids = (a[0] for a in adversarial(rng, 1, 6))
    ids, mask = jnp.asarray(ids, jnp.int32), jnp.arange(6) < 3
    good = [jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (s, x)]
    for other in (np.nan, np.inf, 0.0, 1e38):
        s, x = (jnp.where(mask[:, None, None], a, jnp.float32(other)) for a in good)
        chex.assert_trees_all_equal(
            gradient(parameters(jnp.float32), s, x, ids, mask=mask),
            gradient(parameters(jnp.float32), *good, ids, mask=mask),
        )


def test_shapes_and_operations_do_not_depend_on_the_data():
    gradient = jg.clipped_grad(loss, 1.5, microbatch_size=2)
    example = (jnp.ones((6, T, F)), jnp.ones((6, T, K)), jnp.zeros((6, T), jnp.int32))
    function = jax.jit(lambda *a: gradient(parameters(jnp.float32), *a[:-1], mask=a[-1]))
    program = function.lower(*example, jnp.ones(6, bool)).compile().as_text()
    assert " while(" in program  # over microbatches; its trip count depends on shapes only
    assert program.count(" while(") == program.count("known_trip_count")
    assert " conditional(" not in program


# --- Gradients that are not finite, empty batches, norms on the bound -------------------------------------------------


def simple(w, x, y):
    return (w @ x - y) ** 2 / 2


@pytest.mark.every(0)
def test_an_example_that_is_not_finite_adds_nothing_and_is_counted():
    x = jnp.ones((5, 3)).at[1, 0].set(jnp.nan).at[3, 1].set(jnp.inf)
    y = jnp.arange(1.0, 6.0)
    total, info = jg.clipped_grad(simple, 1.0)(jnp.zeros(3), x, y, mask=jnp.arange(5) != 3)
    expected, _ = jg.clipped_grad(simple, 1.0)(jnp.zeros(3), x[jnp.array([0, 2, 4])], y[jnp.array([0, 2, 4])])
    np.testing.assert_array_equal(total, expected)
    assert (info.nonfinite, info.clipped_fraction) == (1, 1)
    np.testing.assert_array_equal(info.norms[jnp.array([1, 3])], [np.nan, 0])


@pytest.mark.every(2)
@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
def test_an_empty_batch_and_one_example(microbatch_size):
    gradient = jg.clipped_grad(simple, 1.0, microbatch_size=microbatch_size)
    total, info = gradient(jnp.ones(3), jnp.ones((0, 3)), jnp.ones(0))
    np.testing.assert_array_equal(total, np.zeros(3))
    assert (info.norms.shape, info.clipped_fraction) == ((0,), 0)
    total, info = gradient(jnp.zeros(3), jnp.ones((1, 3)), jnp.ones(1))
    np.testing.assert_allclose(total, -np.ones(3) / np.sqrt(3), rtol=1e-12)


def test_a_gradient_on_the_bound_and_a_zero_one_stay_as_they_are():
    x = jnp.array([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    total, info = jg.clipped_grad(simple, 5.0)(jnp.zeros(3), x, jnp.array([-1.0, 0.0]))
    np.testing.assert_array_equal(total, x[0])
    assert (info.norms.tolist(), info.clipped_fraction) == ([5, 0], 0)


def test_other_weightings():
    w, x, y = jnp.zeros(2), jnp.eye(2), jnp.array([-3.0, -0.5])
    run = lambda weighting: jg.clipped_grad(simple, 2.0, weighting=weighting)(w, x, y)[0].tolist()  # noqa: E731
    assert run("clip") == [2, 0.5]
    assert run("normalize") == [2, 2]
    np.testing.assert_allclose(run(clipping.automatic(0.5)), [2 * 3 / 3.5, 2 * 0.5 / 1], rtol=1e-12)
    assert run(lambda norms, bound: norms * 100) == [2, 2]  # no longer than the bound
    assert run(lambda norms, bound: norms * -100) == [-2, -2]
    assert run(lambda norms, bound: norms * np.nan) == [0, 0]
    assert jg.clipped_grad(simple, 2.0, weighting="normalize")(w, x, jnp.zeros(2))[0].tolist() == [0, 0]


def test_a_weighting_may_return_one_number_and_nothing_but_numbers():
    w, x, y = jnp.zeros(2), jnp.eye(2), jnp.array([-3.0, -0.5])
    for half in (0.5, np.float32(0.5), jnp.float32(0.5), np.array([0.5, 0.5]), jnp.full(2, 0.5, jnp.bfloat16)):
        total, _ = jg.clipped_grad(simple, 2.0, weighting=lambda norms, bound, half=half: half)(w, x, y)
        assert total.tolist() == [1.5, 0.25]
    assert jg.clipped_grad(simple, 2.0, weighting=lambda norms, bound: 1)(w, x, y)[0].tolist() == [2, 0.5]
    others = (
        (jnp.ones(3), r"float64 of shape \(3,\)"),
        (jnp.ones((2, 1)), "float64 of shape"),
        (None, "NoneType"),
        ("1", "str"),
    )
    for other, got in (*others, (1j, "complex"), (jnp.full(2, 1j), "complex128"), ([0.5, 0.5], "list")):
        with pytest.raises(
            ValueError, match=rf"clipped_grad: expected a weighting that returns .* \(2,\), .*got {got}"
        ):
            jg.clipped_grad(simple, 2.0, weighting=lambda norms, bound, other=other: other)(w, x, y)


def test_an_infinite_bound_clips_nothing_and_one_that_is_not_positive_gives_nan():
    w, x, y = jnp.ones(3), jnp.arange(12.0).reshape(4, 3), jnp.arange(4.0)
    g = jg.per_example_grad(simple)(w, x, y)
    total, info = jg.clipped_grad(simple, np.inf)(w, x, y)
    np.testing.assert_allclose(total, g.sum(), rtol=1e-12)
    np.testing.assert_allclose(g.clip(np.inf).sum(), g.sum(), rtol=1e-12)
    assert (info.clipped_fraction, jg.clipped_grad(simple, np.inf).sensitivity(4)) == (0, np.inf)
    when_it_runs = jax.jit(lambda bound: (jg.clipped_grad(simple, bound)(w, x, y)[0], g.clip(bound).sum()))
    for bound in (-1.0, 0.0, np.nan):
        for found in when_it_runs(bound):
            assert np.isnan(found).all()
    np.testing.assert_allclose(*when_it_runs(1.5), rtol=1e-9)


@pytest.mark.every(0)
def test_terms_that_cancel_do_not_exceed_the_bound():
    """Inner products in float32 give only rounding error for the norm of a difference of equal products."""
    rng = np.random.default_rng(3)
    s = jnp.asarray(1e6 * np.array([1, -1, 1, -1])[:, None] * rng.normal(size=F), jnp.float32)[None]
    x = jnp.asarray(np.broadcast_to(rng.normal(size=K), (T, K)) * (1 + 1e-7 * rng.normal(size=(T, 1))), jnp.float32)[
        None
    ]
    gradient = jg.clipped_grad(loss, 1.0)
    total, _ = gradient(parameters(jnp.float32), s, x, jnp.zeros((1, T), jnp.int32))
    assert np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in total.values())) <= gradient.sensitivity(1)


@pytest.mark.every(3)
@pytest.mark.parametrize(("huge", "zero"), [(3e38, 0.0), (3e38, 1e-42), (np.inf, 0.0)])
def test_a_factor_with_an_infinite_norm_and_a_zero_factor_do_no_harm(huge, zero):
    """At the first of two positions one side's norm is infinite and the product is 0, or NaN for entries of ∞."""
    s = jnp.ones((3, 2, F), jnp.float32).at[0, 0].set(huge)
    x = jnp.ones((3, 2, K), jnp.float32).at[0, 0].set(zero)
    total, info = jg.clipped_grad(lambda W, s, x: jnp.sum(s * (x @ W.T)), 1.0)(jnp.zeros((F, K), jnp.float32), s, x)
    assert info.nonfinite == np.isinf(huge)
    np.testing.assert_allclose(np.linalg.norm(total), 2 + np.isfinite(huge), rtol=1e-3)


def test_arguments_are_those_of_per_example_grad():
    keys = jax.random.split(jax.random.key(0), 5)
    noisy = lambda scale, w, x, key: (scale * simple(w["w"], x + jax.random.normal(key, (3,)), 1.0), x)  # noqa: E731
    x, w = jnp.arange(15.0).reshape(3, 5), {"w": jnp.ones(3)}
    options = {"argnums": 1, "in_axes": (None, None, 1, 0), "has_aux": True}
    whole = jg.clipped_grad(noisy, 2.0, **options)(0.1, w, x, keys)
    parts = jg.clipped_grad(noisy, 2.0, microbatch_size=2, **options)(0.1, w, x, keys)
    chex.assert_trees_all_close(whole, parts, rtol=1e-12)
    np.testing.assert_array_equal(whole[1].aux, x.T)
    g = jg.per_example_grad(noisy, 1, in_axes=(None, None, 1, 0), has_aux=True)(0.1, w, x, keys)[0]
    chex.assert_trees_all_close(whole[0], g.clip(2.0).sum(), rtol=1e-12)


@pytest.mark.usefixtures("plain_types")
def test_errors_name_the_call():
    w, x, y = jnp.zeros(3), jnp.ones((4, 3)), jnp.ones(4)
    with pytest.raises(ValueError, match="clipped_grad: expected positive numbers as bounds, got 0"):
        jg.clipped_grad(simple, 0.0)(w, x, y)
    with pytest.raises(ValueError, match="clipped_grad: expected a number or a tree prefix"):
        jg.clipped_grad(simple, {"w": 1.0})(w, x, y)
    with pytest.raises(ValueError, match="clipped_grad: expected a microbatch size of at least 1"):
        jg.clipped_grad(simple, 1.0, microbatch_size=0)
    for bound in (-1.0, np.nan, "1", True, 1j, jnp.ones((2, 2)), jnp.array([1.0, 0.0]), [1.0, -1.0]):
        with pytest.raises(ValueError, match="clipped_grad: expected positive numbers as bounds, got"):
            jg.clipped_grad(simple, bound)
    for size in (-1, 2.5, "2"):
        with pytest.raises(ValueError, match="clipped_grad: expected a microbatch size of at least 1"):
            jg.clipped_grad(simple, 1.0, microbatch_size=size)
    for weighting in ("median", clipping.automatic, None):
        with pytest.raises(TypeError, match='clipped_grad: expected "clip", "normalize" or a function'):
            jg.clipped_grad(simple, 1.0, weighting=weighting)
    with pytest.raises(ValueError, match="sensitivity: expected a batch size of at least 0, got -5"):
        jg.clipped_grad(simple, 1.0).sensitivity(-5)
    for mask in (jnp.ones(4), jnp.ones(3, bool)):
        with pytest.raises(ValueError, match="clipped_grad: expected a boolean mask of shape"):
            jg.clipped_grad(simple, 1.0)(w, x, y, mask=mask)
    with pytest.raises(TypeError, match="clipped_grad: expected a loss that returns a real scalar"):
        jg.clipped_grad(lambda w, x: w * x, 1.0)(w, x)


def with_a_mask(w, x, mask=None):
    return jnp.sin(w * x if mask is None else jnp.where(mask, w * x, 0.0)).sum()


@pytest.mark.parametrize(
    "fun",
    [
        with_a_mask,
        functools.partial(with_a_mask, mask=None),
        lambda w, x, **options: with_a_mask(w, x, **options),
        lambda w, x, *, mask: with_a_mask(w, x, mask),
    ],
    ids=["named", "partial", "any keyword", "keyword only"],
)
def test_a_loss_with_a_mask_of_its_own_is_not_given_padding_silently(fun):
    w, x, own, padding = jnp.ones(3), jnp.ones((4, 3)), jnp.tri(4, 3, dtype=bool), jnp.arange(4) < 2
    for mask in (own, padding):
        with pytest.raises(ValueError, match=r"clipped_grad: expected mask=, .*Wrap the loss, .*mask=own"):
            jg.clipped_grad(fun, 1.0)(w, x, mask=mask)
    both = jg.clipped_grad(lambda w, x, own: fun(w, x, mask=own), 1.0)
    _, info = both(w, x, own, mask=padding)
    norms = jg.per_example_grad(with_a_mask)(w, x, mask=own).norms()
    np.testing.assert_allclose(info.norms, jnp.where(padding, norms, 0), rtol=1e-12)
    by_position = jg.clipped_grad(with_a_mask, 1.0)(w, x, own)[1]
    np.testing.assert_allclose(by_position.norms, norms, rtol=1e-12)


def test_a_loss_whose_mask_is_not_a_keyword_is_given_padding():
    def fun(w, mask, /):
        return w @ mask

    norms = jg.clipped_grad(fun, 1.0)(jnp.ones(3), jnp.ones((4, 3)), mask=jnp.arange(4) < 2)[1].norms
    assert np.count_nonzero(norms) == 2


def test_the_sensitivity_of_groups_is_their_root_sum_of_squares():
    assert jg.clipped_grad(simple, 3.0).max_norm == 3
    assert jg.clipped_grad(loss, {"W": 3.0, "b": 4.0, "E": 12.0}).max_norm == 13
    assert 3 < jg.clipped_grad(simple, 3.0).sensitivity(100, jnp.float64) < 3.0001
    for dtype in (jnp.float32, jnp.float64):
        found = jax.jit(lambda bounds, dtype=dtype: jg.clipped_grad(loss, bounds).sensitivity(100, dtype))(
            {"W": 3.0, "b": jnp.float32(4.0), "E": 12}
        )
        expected = jg.clipped_grad(loss, {"W": 3.0, "b": 4.0, "E": 12.0}).sensitivity(100, dtype)
        assert (found.shape, found.dtype) == ((), dtype)
        np.testing.assert_allclose(found, expected, rtol=4 * jnp.finfo(dtype).eps)
    assert isinstance(jg.clipped_grad(simple, jnp.float32(3)).max_norm, float)
