"""Drop-ins for other libraries: what jax-privacy and optax return, from factored gradients."""

import dataclasses
import functools
import inspect

import dp_accounting
import jax
import jax.numpy as jnp
import jax_privacy
import numpy as np
import optax
import pytest
from jax_privacy.experimental import execution_plan

import jaxgrad as jg
from benchmarks import models
from jaxgrad.integrations import jax_privacy as ours
from jaxgrad.integrations import optax as ours_of_optax

B = 7
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)  # each program here runs once
RTOL = {jnp.dtype(jnp.float64): 1e-9, jnp.dtype(jnp.float32): 2e-5}


@pytest.fixture(autouse=True)
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")  # jax-privacy calls it


def close(found, expected, rtol=1e-9, atol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = float(np.nanmax(np.abs(np.where(np.isfinite(b), b, 0)), initial=0))
        np.testing.assert_allclose(a, b, rtol=rtol, atol=max(atol, rtol * scale))


def loss(params, x, y, key=None):
    """The mean over a batch, with a matrix used at several positions, a table and a scale."""
    h = params["table"][y] + jnp.tanh(x @ params["W"]) * params["scale"]
    h = h if key is None else h * jax.random.bernoulli(key, 0.5, h.shape)
    logits = h.mean(1) @ params["V"] + params["b"]
    return ((logits**2).sum(-1) + jnp.sin(logits).sum(-1)).mean()


def with_aux(params, x, y):
    h = x @ params["W"]
    return loss(params, x, y), {"h": h, "mean": h.mean(), "first": h[:, 0, :1]}


def inputs(dtype=jnp.float64, count=B):
    rng = np.random.default_rng(3)
    shapes = {"W": (5, 8), "table": (11, 8), "scale": (8,), "V": (8, 3), "b": (3,)}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    x, y = jnp.asarray(rng.normal(size=(count, 4, 5)), dtype), jnp.asarray(rng.integers(0, 11, (count, 4)))
    return params, x * jnp.linspace(0.1, 3, count, dtype=dtype)[:, None, None], y


def both(fun, *args, padding=None, batch_argnums=(1, 2), **options):
    """(what jaxgrad's function returns, what jax-privacy's does)."""
    keywords = {} if padding is None else {"is_padding_example": padding}
    functions = (f(fun, batch_argnums=batch_argnums, **options) for f in (ours.clipped_grad, jax_privacy.clipped_grad))
    return [quick_jit(lambda *a, f=f: f(*a, **keywords))(*args) for f in functions]


# --- clipped_grad of jax-privacy --------------------------------------------------------------------------------------

OPTIONS = {
    "a bound": {"l2_clip_norm": 2.0},
    "a bound of 0": {"l2_clip_norm": 0.0},
    "an infinite bound": {"l2_clip_norm": jnp.inf},
    "rescaled": {"l2_clip_norm": 2.0, "rescale_to_unit_norm": True},
    "rescaled, a bound of 0": {"l2_clip_norm": 0.0, "rescale_to_unit_norm": True},
    "rescaled, an infinite bound": {"l2_clip_norm": jnp.inf, "rescale_to_unit_norm": True},
    "normalized": {"l2_clip_norm": 2.0, "normalize_by": 5.0},
    "wider": {"l2_clip_norm": 2.0, "dtype": jnp.float64},
    "of each example": {"l2_clip_norm": 2.0, "keep_batch_dim": False},
    "in microbatches": {"l2_clip_norm": 2.0, "microbatch_size": 1},
    "nothing replaced": {"l2_clip_norm": 2.0, "nan_safe": False},
}


@pytest.mark.every(5)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_clipped_grad_returns_what_jax_privacy_returns(options, dtype):
    fun = loss
    if not options.get("keep_batch_dim", True):
        fun = lambda params, x, y: loss(params, x[None], y[None])  # noqa: E731
    found, expected = both(fun, *inputs(dtype), return_values=True, return_grad_norms=True, **options)
    assert type(found[1]) is type(expected[1])
    close(found, expected, RTOL[jnp.dtype(dtype)], atol=1e-6 if dtype == jnp.float32 else 1e-12)


MODELS = {
    "MLP": models.mlp((6, 9, 8, 3), B),
    "conv net": models.conv_net(B),
    "transformer": models.transformer(16, 5, B),
    "tied language model": models.language_model(30, 16, 4, B),
}


def of_model(name, **options):
    """As `both`, for a model in float64."""
    model = MODELS[name]
    args = jax.tree.map(
        lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, (model.params, *model.batch)
    )
    numbers = tuple(range(1, len(args)))
    return both(model.loss, *args, batch_argnums=numbers, keep_batch_dim=False, l2_clip_norm=0.5, **options)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", MODELS)
def test_clipped_grad_of_a_model_is_jax_privacys(name):
    close(*of_model(name, return_grad_norms=True))


def test_auxiliary_results_have_jax_privacys_shapes():
    for options in ({}, {"return_values": True}, {"microbatch_size": 1, "return_grad_norms": True}):
        found, expected = both(with_aux, *inputs(), has_aux=True, l2_clip_norm=1.0, **options)
        close(found, expected)
        assert found[1].aux["h"].shape == (B, 4, 8)
        assert found[1].aux["mean"].shape == (B,)
    assert jax.tree.structure(both(loss, *inputs(), l2_clip_norm=1.0)[0]) == jax.tree.structure(inputs()[0])


def test_several_arguments_are_differentiated_and_others_are_shared():
    params, x, y = inputs()

    def fun(head, training, x, rest, y, factor):
        assert training is True
        return factor.mean() * loss({**head, **rest}, x, y)

    head = {k: params[k] for k in ("V", "b")}
    args = head, True, x, {k: v for k, v in params.items() if k not in head}, y
    made = [
        f(fun, (0, 3), batch_argnums=(2, 4), l2_clip_norm=1.0) for f in (ours.clipped_grad, jax_privacy.clipped_grad)
    ]
    factor = jnp.linspace(1.0, 2.0, B)
    close(*(quick_jit(lambda *a, f=f: f(a[0], True, *a[1:], factor=factor))(head, *args[2:]) for f in made))


def test_a_random_key_is_split_as_jax_privacy_splits_it():
    params, x, y = inputs()
    for key in (jax.random.key(4), jax.random.PRNGKey(4)):
        found, expected = both(loss, params, x, y, key, l2_clip_norm=1.0, prng_argnum=3, return_values=True)
        close(found, expected)


def test_padding_adds_zero_and_what_it_returns_is_computed():
    padding = jnp.arange(B) > 3
    options = {"return_values": True, "return_grad_norms": True, "l2_clip_norm": 1.0}
    close(*both(loss, *inputs(), padding=padding, **options))
    params, x, y = inputs()
    kept, _ = both(loss, params, x[:4], y[:4], **options)
    close(both(loss, params, x, y, padding=padding, **options)[0][0], kept[0])


@pytest.mark.every(3)
@pytest.mark.parametrize("padding", [[], [3, 7], [3, 7, 2, 6], [0, 4], [*range(8)]])
def test_microbatches_at_the_end_that_are_padding_are_skipped(padding):
    where = jnp.isin(jnp.arange(8), jnp.asarray(padding, int))  # two at once: examples 3 and 7 are the last
    options = {"return_values": True, "return_grad_norms": True, "l2_clip_norm": 1.0, "microbatch_size": 2}
    close(*both(loss, *inputs(count=8), padding=where, **options))
    seen = []

    def counting(params, x, y):
        jax.debug.callback(lambda _: seen.append(1), x[0, 0, 0])
        return loss(params, x, y)

    run = quick_jit(ours.clipped_grad(counting, batch_argnums=(1, 2), **options))
    jax.block_until_ready(run(*inputs(count=8), is_padding_example=where))
    jax.effects_barrier()
    assert len(seen) == 8 - {(): 0, (3, 7): 2, (3, 7, 2, 6): 4, (0, 4): 0}.get(tuple(padding), 8)


def test_a_microbatch_size_need_not_divide_the_batch():
    options = {"batch_argnums": (1, 2), "l2_clip_norm": 1.0, "return_values": True}
    whole, parts = (quick_jit(ours.clipped_grad(loss, microbatch_size=size, **options)) for size in (None, 3))
    close(parts(*inputs()), whole(*inputs()))


def groups_by_hand(params, x, y, bounds, rescaled):
    """The sum of gradients each of whose groups is clipped, from materialized gradients, and the groups' norms."""
    G = jax.vmap(lambda x, y: jax.grad(loss)(params, x[None], y[None]))(x, y)
    norms = jax.tree.map(
        lambda _, g: jnp.sqrt(sum((a.reshape(B, -1) ** 2).sum(1) for a in jax.tree.leaves(g))), bounds, G
    )

    def total(bound, n, part):
        c = 1 / jnp.maximum(bound, n) if rescaled else jnp.minimum(1, bound / n)
        return jax.tree.map(lambda g: jnp.einsum("b,b...->...", c, g), part)

    return jax.tree.map(total, bounds, norms, G), norms


@pytest.mark.parametrize("rescaled", [False, True])
def test_groups_have_a_bound_a_norm_and_a_part_of_the_sensitivity_each(rescaled):
    params, x, y = inputs()
    bounds = {"W": 0.5, "table": 0.0, "scale": 2.0, "V": jnp.inf, "b": 0.25}
    options = {"batch_argnums": (1, 2), "rescale_to_unit_norm": rescaled, "return_grad_norms": True}
    total, aux = quick_jit(ours.clipped_grad(loss, l2_clip_norm=bounds, **options))(params, x, y)
    expected, norms = quick_jit(lambda *args: groups_by_hand(*args, bounds, rescaled))(params, x, y)
    close(total, expected)
    close(aux.grad_norms, norms)
    some = ours.clipped_grad(loss, l2_clip_norm={"W": 3.0, "b": 4.0}, rescale_to_unit_norm=rescaled, normalize_by=2.0)
    assert some.sensitivity() == (np.sqrt(2) if rescaled else 5) / 2


def test_a_traced_bound_gives_what_the_number_gives():
    params, x, y = inputs()

    @quick_jit
    def step(bound):
        made = ours.clipped_grad(loss, batch_argnums=(1, 2), l2_clip_norm=bound)
        return made(params, x, y), made.sensitivity()

    for bound in (0.5, 0.0, -1.0, np.inf):
        total, sensitivity = step(bound)
        close(
            total, quick_jit(ours.clipped_grad(loss, batch_argnums=(1, 2), l2_clip_norm=max(bound, 0.0)))(params, x, y)
        )
        assert sensitivity == max(bound, 0)


def diagonal(g):
    return jax.tree.map(lambda a: a * jnp.exp(jnp.linspace(-6, 6, a.size)).reshape(a.shape), g)


TRANSFORMS = {
    "a number for each leaf": lambda g: {k: (i + 0.5) * a for i, (k, a) in enumerate(g.items())},
    "diagonal": diagonal,
    "another tree": lambda g: [g["W"].T @ g["W"], g["W"] + g["table"][:5], g["V"][::2]],
    "a matrix": lambda g: {**g, "W": jnp.tri(5) @ g["W"], "V": jnp.cumsum(g["V"], 0)},
    "not linear": lambda g: jax.tree.map(jnp.tanh, g),
    "narrower": lambda g: jax.tree.map(lambda a: a.astype(jnp.float32), g),
}


@pytest.mark.every(5)
@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_before_clipping_gives_jax_privacys_sum_and_norms(transform, size):
    options = {"pre_clipping_transform": transform, "microbatch_size": size, "return_grad_norms": True}
    found, expected = both(loss, *inputs(), l2_clip_norm=1.0, **options)
    narrow = transform is TRANSFORMS["narrower"]
    close(found, expected, 1e-5 if narrow else 1e-9, 1e-6 if narrow else 1e-12)


def test_a_wide_diagonal_in_float32_clips_no_more_than_it_has_to():
    """Terms that may cancel have the magnitude of the scaled products, not of the products times the largest entry."""
    found, expected = both(loss, *inputs(jnp.float32), l2_clip_norm=1.0, pre_clipping_transform=diagonal)
    close(found, expected, 2e-4, 1e-6)


@pytest.mark.every(2)
@pytest.mark.parametrize("name", [*MODELS][1:])
def test_a_diagonal_transform_of_convolutions_sequences_and_tables_is_jax_privacys(name):
    close(*of_model(name, pre_clipping_transform=diagonal))


def test_a_diagonal_transform_materializes_nothing():
    def mlp(params, x):
        return (jnp.tanh(x @ params["in"]) @ params["out"]).sum()

    params, x = {"in": jnp.ones((64, 96)) / 9, "out": jnp.ones((96, 80)) / 9}, jnp.ones((50, 64))
    made = ours.clipped_grad(mlp, l2_clip_norm=1.0, pre_clipping_transform=diagonal)
    materialized = 50 * sum(p.nbytes for p in params.values())
    assert jax.jit(made).lower(params, x).compile().memory_analysis().temp_size_in_bytes < materialized / 8


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_adds_zero_or_is_seen(bad):
    params, x, y = inputs()
    broken = x.at[2].set(bad)
    options = {"batch_argnums": (1, 2), "l2_clip_norm": 1.0}
    others = jnp.arange(B) != 2
    run = ours.clipped_grad(loss, **options)
    close(quick_jit(run)(params, broken, y), quick_jit(run)(params, x[others], y[others]))
    found, theirs = both(loss, params, broken, y, l2_clip_norm=1.0, nan_safe=False)
    assert not all(np.isfinite(a).all() for a in jax.tree.leaves(found))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_half_precision_the_dtypes_are_jax_privacys(dtype):
    params = {"w": jnp.ones((6, 5), dtype), "b": jnp.ones(5, dtype)}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 6)), dtype)
    fun = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]).mean()  # noqa: E731
    for given in (None, jnp.float32):
        found, expected = both(fun, params, x, batch_argnums=1, l2_clip_norm=0.1, dtype=given)
        assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.05, atol=0.01)


def test_the_signature_is_jax_privacys():
    theirs, mine = (inspect.signature(f).parameters for f in (jax_privacy.clipped_grad, ours.clipped_grad))
    assert [*mine][: len(theirs)] == [*theirs]
    assert [*mine][len(theirs) :] in ([], ["grid_scale"])
    for name, parameter in theirs.items():
        assert mine[name].kind == parameter.kind
        if name != "pre_clipping_transform":
            assert mine[name].default == parameter.default


def test_the_sensitivity_is_jax_privacys_and_can_include_rounding():
    relations = dp_accounting.NeighboringRelation
    for options in ({}, {"normalize_by": 4.0}, {"rescale_to_unit_norm": True}):
        mine, theirs = (f(loss, l2_clip_norm=3.0, **options) for f in (ours.clipped_grad, jax_privacy.clipped_grad))
        assert isinstance(mine, jax_privacy.clipping.BoundedSensitivityCallable)
        assert (mine.l2_norm_bound, mine.has_aux) == (theirs.l2_norm_bound, theirs.has_aux)
        for relation in (relations.ADD_OR_REMOVE_ONE, relations.REPLACE_ONE, relations.REPLACE_SPECIAL):
            assert mine.sensitivity(relation) == theirs.sensitivity(relation)
            allowed = mine.sensitivity(relation, batch_size=256) / mine.sensitivity(relation)
            np.testing.assert_allclose(allowed, jg.clipped_grad(loss, 3.0).sensitivity(256) / 3, rtol=1e-12)
    mine = ours.clipped_grad(loss, l2_clip_norm=3.0)
    assert mine.sensitivity(batch_size=9, dtype=jnp.float64) < mine.sensitivity(batch_size=9)
    assert mine.sensitivity(batch_size=9, dtype=jnp.bfloat16) > 3 * (1 + 9 * 2.0**-7)
    with pytest.raises(ValueError, match="Unsupported"):
        mine.sensitivity(None)
    with pytest.raises(ValueError, match="batch size of at least 0"):
        mine.sensitivity(batch_size=-1)


WRONG = {
    "overlap in": {"argnums": (0, 1), "batch_argnums": (1, 2)},
    "must not be empty": {"batch_argnums": ()},
    "numbers ≥ 0, got argnums": {"batch_argnums": -1},
    "grid_scale=None, got 1000.*jax_privacy.clipped_grad": {"grid_scale": 1000},
    "normalize_by > 0": {"normalize_by": 0.0},
    "microbatch size of at least 1": {"microbatch_size": 0},
    "numbers ≥ 0 as l2_clip_norm, got -1": {"l2_clip_norm": -1.0},
    "numbers ≥ 0 as l2_clip_norm, got nan": {"l2_clip_norm": float("nan")},
    "numbers ≥ 0 as l2_clip_norm, got {}": {"l2_clip_norm": {}},
}


@pytest.mark.parametrize("message", WRONG)
def test_options_that_do_not_fit_are_named(message):
    with pytest.raises(ValueError, match=f"clipped_grad: .*{message}"):
        ours.clipped_grad(loss, **({"l2_clip_norm": 1.0} | WRONG[message]))


def test_arguments_that_do_not_fit_are_named():
    params, x, y = inputs()
    made = ours.clipped_grad(loss, batch_argnums=(1, 2), l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="same size along axis 0"):
        made(params, x, y[:3])
    with pytest.raises(ValueError, match="expected an argument 2 with examples"):
        made(params, x)
    for padding in (jnp.zeros(3, bool), jnp.zeros(B)):
        with pytest.raises(ValueError, match="clipped_grad: expected a boolean mask of shape"):
            made(params, x, y, is_padding_example=padding)
    with pytest.raises(ValueError, match="tree prefix"):
        ours.clipped_grad(loss, batch_argnums=(1, 2), l2_clip_norm={"W": 1.0})(params, x, y)


# --- jax-privacy's own machinery on it --------------------------------------------------------------------------------


def train(plan, params, x, y):
    """A few steps as the plan's documentation writes them."""
    noise = plan.noise_addition_transform
    state, gradient = noise.init(params), quick_jit(plan.clipped_grad(loss, batch_argnums=(1, 2)))
    for indices in plan.batch_selection_strategy.batch_iterator(len(x), rng=np.random.default_rng(0)):
        padded = np.full(len(x), -1)
        padded[: len(indices)] = indices
        total = gradient(params, x[padded], y[padded], is_padding_example=jnp.asarray(padded < 0))
        step, state = noise.update(total, state)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, step)
    return params


def config(**options):
    return execution_plan.BandMFExecutionPlanConfig(
        iterations=4, strategy=np.array([1.0, 0.5]), epsilon=None, delta=None, noise_multiplier=0.7, sampling_prob=0.8,
        l2_clip_norm=2.0, normalize_by=3.0, dtype=np.float64, noise_seed=5, **options,
    )  # fmt: skip


def test_a_plan_of_jax_privacy_trains_as_before():
    expected = train(config().plan, *inputs())
    calls = []
    with ours.installed():
        assert jax_privacy.clipped_grad is jax_privacy.clipping.clipped_grad is ours.clipped_grad
        made = config().plan
        calls.append(type(made.clipped_grad(loss)))
        close(train(made, *inputs()), expected)
    assert calls == [ours.BoundedSensitivityCallable]
    assert jax_privacy.clipped_grad is jax_privacy.clipping.clipped_grad is not ours.clipped_grad


def test_a_plan_takes_the_function_as_a_part_of_it():
    options = config()
    fields = ("l2_clip_norm", "normalize_by", "rescale_to_unit_norm", "dtype")
    mine = functools.partial(ours.clipped_grad, **{name: getattr(options, name) for name in fields})
    plan = dataclasses.replace(options.plan, clipped_grad=mine)
    close(train(plan, *inputs()), train(options.plan, *inputs()))


# --- optax ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_the_aggregate_of_optax_has_the_same_mean_noise_and_state(dtype):
    params, x, y = inputs(dtype)
    fun = lambda params, x, y: loss(params, x[None], y[None])  # noqa: E731
    mine, theirs = (
        f(0.7, 1.3, key=jax.random.key(2))
        for f in (ours_of_optax.differentially_private_aggregate, optax.contrib.differentially_private_aggregate)
    )
    G = quick_jit(jax.vmap(jax.grad(fun), (None, 0, 0)))(params, x, y)
    expected, state = theirs.update(G, theirs.init(params))
    found, after = jax.jit(mine.update)(jg.per_example_grad(fun)(params, x, y), mine.init(params))
    close(found, expected, RTOL[jnp.dtype(dtype)], 1e-6 if dtype == jnp.float32 else 1e-12)
    assert type(after) is type(state)
    assert jnp.array_equal(jax.random.key_data(after.rng_key), jax.random.key_data(state.rng_key))
    close(mine.update(G, mine.init(params))[0], expected, 1e-12)


def test_a_gradient_without_an_axis_of_examples_is_refused():
    params = {"W": jnp.ones((3, 2)), "b": jnp.ones(())}
    aggregate = ours_of_optax.differentially_private_aggregate(1.0, 0.0, key=0)
    with pytest.raises(ValueError, match=r"an axis of examples, got .* \(3, 2\). Pass what jg.per_example_grad"):
        aggregate.update(params, aggregate.init(params), params)
    with_examples = jax.tree.map(lambda a: jnp.stack([a, a, a]), params)
    assert aggregate.update(with_examples, aggregate.init(params), params)[0]["W"].shape == (3, 2)


def test_dpsgd_is_a_chain_with_the_aggregate_of_optax():
    params, x, y = inputs()
    fun = lambda params, x, y: loss(params, x[None], y[None])  # noqa: E731
    aggregate = ours_of_optax.differentially_private_aggregate(0.7, 1.3, key=jax.random.key(4))
    mine = optax.chain(aggregate, optax.trace(0.9), optax.scale_by_learning_rate(0.1))
    theirs = optax.chain(
        optax.contrib.differentially_private_aggregate(0.7, 1.3, key=jax.random.key(4)),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )
    of_mine, of_theirs = jg.per_example_grad(fun), jax.vmap(jax.grad(fun), (None, 0, 0))

    def train(optimizer, gradients):
        def step(params, state):
            updates, state = optimizer.update(gradients(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        p, state = params, optimizer.init(params)
        for _ in range(3):
            p, state = quick_jit(step)(p, state)
        return p

    close(train(mine, of_mine), train(theirs, of_theirs))


def test_the_aggregate_leaves_out_what_is_not_finite_and_refuses_a_bound_of_0():
    aggregate = ours_of_optax.differentially_private_aggregate(1.0, 0.0, key=0)
    g = jg.per_example_grad(lambda w, x: w @ x)(jnp.ones(2), jnp.array([[3.0, 4.0], [jnp.nan, 1.0]]))
    np.testing.assert_allclose(aggregate.update(g, aggregate.init(None))[0], [0.3, 0.4], rtol=1e-6)
    with pytest.raises(ValueError, match="differentially_private_aggregate: expected positive numbers"):
        ours_of_optax.differentially_private_aggregate(0.0, 1.0, key=0)
