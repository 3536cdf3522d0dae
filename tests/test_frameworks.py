"""per_example_grad on models as people write them: plain trees, Equinox, Flax linen and Flax nnx.

Every example is small and complete, to copy: how to get from the framework's model to a loss of one example whose first
argument is the tree of parameters. The results are compared with jax.vmap(jax.grad(loss)).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import check_gradient, clipped_grad, explain, per_example_grad, per_example_jacobian

B = 4
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def jax_defaults():
    """JAX's default promotion rules, in float64; frameworks with a fixed dtype create float32."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape, dtype=float):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def labels(seed, *shape, classes):
    return jnp.asarray(np.random.default_rng(seed).integers(classes, size=shape))


def cross_entropy(logits, label):
    return jax.nn.logsumexp(logits) - logits[label]


def agrees(loss, params, *batch, in_axes=0):
    """Compare the factors with the materialized gradients; no matrix may take the direct route."""
    axes = (None, *[0] * len(batch)) if in_axes == 0 else in_axes

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(params):  # the batch is closed over: a shared argument may hold functions, which jit does not take
        g = per_example_grad(loss, in_axes=in_axes)(params, *batch)
        total, info = clipped_grad(loss, 1.0, in_axes=in_axes, passes=2)(params, *batch)
        materialized = jax.vmap(jax.grad(loss), axes)(params, *batch)
        norms = jnp.sqrt(sum((a.reshape(B, -1) ** 2).sum(1) for a in jax.tree.leaves(materialized)))
        clipped = jax.tree.map(lambda a: jnp.tensordot(1 / jnp.maximum(1, norms), a, 1), materialized)
        one_pass = g.materialize(), g.norms(), g.clip(1.0).sum()
        return (*one_pass, info.norms, total), (materialized, norms, clipped, norms, clipped)

    found, expected = both(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        rtol = 1e-10 if b.dtype == jnp.float64 else 1e-4
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))
    assert (expected[1] > 1).any(), "the bound should bind"

    explanation = explain(loss, in_axes=in_axes)(params, *batch)
    assert {row.path: row.shape for row in explanation.rows} == {
        jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert not [row.path for row in explanation.rows if len(row.shape) > 1 and row.primitive], explanation
    return explanation


def test_plain_tree():
    params = {"layers": [(normal(0, 16, 8), jnp.zeros(16)), (normal(1, 3, 16), jnp.zeros(3))], "scale": jnp.ones(8)}

    def loss(params, x, label):
        x = x * params["scale"]
        for W, b in params["layers"]:
            x = jnp.tanh(W @ x + b)
        return cross_entropy(3 * x, label)

    batch = normal(2, B, 8), labels(3, B, classes=3)
    assert agrees(loss, params, *batch)["['layers'][0][0]"].how == "factored"


# --- Equinox: differentiate the array part, put the rest back inside the loss


@pytest.mark.every(0)
def test_equinox_with_the_static_part_closed_over_and_the_check_to_do_first():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 3, 16, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, label):
        return 5 * cross_entropy(eqx.combine(params, static)(x), label)

    batch = normal(1, B, 8), labels(2, B, classes=3)
    report = check_gradient(per_example_grad(loss), loss, params, *batch)
    assert report.agrees, report
    assert agrees(loss, params, *batch)[".layers[0].weight"].how == "factored"


@pytest.mark.every(0)
def test_equinox_with_the_static_part_as_an_argument():
    """What is not trained, a frozen layer and a function here, is an argument that all examples share."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 3, 16, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    none = jax.tree.map(lambda _: False, model)
    trained = eqx.tree_at(lambda m: (m.layers[1].weight, m.layers[1].bias), none, (True, True))
    params, frozen = eqx.partition(model, trained)

    def loss(params, frozen, x, label):
        return 5 * cross_entropy(eqx.combine(params, frozen)(x), label)

    batch = normal(2, B, 8), labels(3, B, classes=3)
    rows = agrees(loss, params, frozen, *batch, in_axes=(None, None, 0, 0)).rows
    assert [row.path for row in rows] == [".layers[1].weight", ".layers[1].bias"]


def test_equinox_convolutions():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 6, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(6, 4, 2, stride=2, groups=2, key=keys[1]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(16, 3, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, label):
        return 5 * cross_entropy(eqx.combine(params, static)(x), label)

    agrees(loss, params, normal(1, B, 2, 8, 8), labels(2, B, classes=3))


@pytest.mark.every(0)
def test_equinox_attention_with_a_mask_and_layer_norm():
    eqx = pytest.importorskip("equinox")
    T, D, keys = 6, 8, jax.random.split(jax.random.key(0), 3)
    model = (
        eqx.nn.Embedding(11, D, key=keys[0]),
        eqx.nn.LayerNorm(D),
        eqx.nn.MultiheadAttention(2, D, key=keys[1]),
        eqx.nn.Linear(D, 11, key=keys[2]),
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    causal = jnp.tril(jnp.ones((T, T), bool))

    def loss(params, tokens, targets):
        embed, norm, attention, readout = eqx.combine(params, static)
        x = jax.vmap(embed)(tokens)
        h = jax.vmap(norm)(x)
        logits = jax.vmap(readout)(x + attention(h, h, h, mask=causal))
        return jax.vmap(cross_entropy)(logits, targets).sum()

    tokens = labels(1, B, T + 1, classes=11)
    assert agrees(loss, params, tokens[:, :-1], tokens[:, 1:])["[0].weight"].how == "factored"


@pytest.mark.every(0)
def test_equinox_recurrent_cell_in_a_scan():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.GRUCell(3, 8, key=jax.random.key(0)), eqx.nn.Linear(8, 1, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, xs, y):
        cell, readout = eqx.combine(params, static)
        h, _ = jax.lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(8), xs)
        return 20 * jnp.square(readout(h)[0] - y)

    agrees(loss, params, normal(1, B, 5, 3), normal(2, B))


@pytest.mark.every(0)
def test_equinox_dropout_with_a_key_for_every_example():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(8, 32, key=keys[0]), eqx.nn.Dropout(0.5), eqx.nn.Linear(32, 3, key=keys[1])]
    model = eqx.nn.Sequential(layers)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, x, label, key):
        return 5 * cross_entropy(eqx.combine(params, static)(x, key=key), label)

    agrees(loss, params, normal(2, B, 8), labels(3, B, classes=3), jax.random.split(jax.random.key(4), B))


# --- Flax linen: model.apply of one example, without a batch axis


@pytest.mark.every(0)
def test_linen_convolutions():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, image):
            x = linen.relu(linen.Conv(6, (3, 3))(image))
            x = linen.avg_pool(x, (2, 2), (2, 2))
            x = linen.relu(linen.Conv(8, (3, 3), strides=2, feature_group_count=2)(x))
            return linen.Dense(3)(x.reshape(-1))

    model = Net()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((8, 8, 1), jnp.float32))

    def loss(params, x, label):
        return 5 * cross_entropy(model.apply(params, x), label)

    batch = normal(1, B, 8, 8, 1, dtype=jnp.float32), labels(2, B, classes=3)
    assert agrees(loss, params, *batch)["['params']['Dense_0']['kernel']"].how == "factored"


def test_linen_embedding_tied_to_the_output():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            embed = linen.Embed(40, 16)
            x = linen.LayerNorm()(embed(tokens))
            x = x + linen.Dense(16)(linen.gelu(linen.Dense(32)(x)))
            return embed.attend(x)

    model, tokens = Net(), labels(1, B, 7, classes=40)
    params = jax.jit(model.init)(jax.random.key(0), tokens[0, :-1])

    def loss(params, tokens):
        return jax.vmap(cross_entropy)(model.apply(params, tokens[:-1]), tokens[1:]).sum()

    row = agrees(loss, params, tokens)["['params']['Embed_0']['embedding']"]
    assert [held.split("(")[0] for held in row.factors] == ["Outer", "Rows"]


# --- Flax nnx: split into the parameters and the rest, merge inside the loss


def test_nnx_linear_and_convolution():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 6, (3, 3), rngs=rngs)
            self.hidden = nnx.Linear(96, 16, rngs=rngs)
            self.out = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, image):
            x = nnx.avg_pool(nnx.relu(self.conv(image)), (2, 2), (2, 2))
            return self.out(nnx.tanh(self.hidden(x.reshape(-1))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, x, label):
        return 5 * cross_entropy(nnx.merge(graph, params, rest)(x), label)

    batch = normal(1, B, 8, 8, 1, dtype=jnp.float32), labels(2, B, classes=3)
    assert agrees(loss, params, *batch)["['hidden']['kernel'].value"].how == "factored"


# --- Errors for models that cannot be used as they are


@pytest.mark.usefixtures("plain_types")
def test_the_error_for_a_whole_model_says_how_to_split_it():
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dropout, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    loss = lambda model, x: jnp.sum(model(x))  # noqa: E731
    models = [(eqx.nn.MLP(8, 3, 16, depth=1, key=jax.random.key(0)), r"eqx\.partition\(.*eqx\.combine\(")]
    models += [(Net(nnx.Rngs(0)), r"nnx\.split\(.*nnx\.merge\(")]
    for model, message in [*models, *(({"inside": [model]}, message) for model, message in models)]:
        for transform in (per_example_grad, explain):
            with pytest.raises(TypeError, match=rf"{transform.__name__}: expected parameters of .*{message}"):
                transform(loss)(model, normal(0, B, 8))


def test_a_state_that_the_loss_changes_and_an_axis_of_examples_are_explained():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, layer, rngs):
            self.hidden, self.layer = nnx.Linear(8, 3, rngs=rngs), layer(rngs)

        def __call__(self, x):
            return self.layer(self.hidden(x))

    layers = {
        "dropout": lambda rngs: nnx.Dropout(0.5, rngs=rngs),
        "statistics": lambda rngs: nnx.BatchNorm(3, rngs=rngs),
        "an axis": lambda rngs: nnx.BatchNorm(3, axis_name="examples", rngs=rngs),
    }
    for name, layer in layers.items():
        graph, params, rest = nnx.split(Net(layer, nnx.Rngs(0)), nnx.Param, ...)

        def loss(params, x, graph=graph, rest=rest):
            return nnx.merge(graph, params, rest)(x[None]).sum()

        with pytest.raises(Exception) as raised:  # noqa: PT011
            per_example_grad(loss)(params, normal(0, B, 8, dtype=jnp.float32))
        note = "no axis of examples" if name == "an axis" else "Let it change a copy"
        assert any(note in line and line.startswith("per_example_grad: ") for line in raised.value.__notes__)


@pytest.mark.parametrize(
    "transform", [per_example_grad, explain, functools.partial(clipped_grad, max_norm=1.0), per_example_jacobian]
)
def test_an_error_inside_the_loss_says_that_the_loss_had_one_example(transform):
    with pytest.raises(ValueError, match="rank should be at least 1") as raised:
        transform(lambda W, X: jax.vmap(lambda x: x * W.sum())(X).mean())(jnp.ones((3, 2)), jnp.ones(4))
    (note,) = [note for note in raised.value.__notes__ if "ONE example" in note]  # JAX adds others
    assert (
        "the loss was called with ONE example: argument 0 float64[3,2], argument 1 float64[]. It must not vmap" in note
    )


@pytest.mark.every(0)
def test_nnx_dropout_with_a_key_for_every_example_and_running_statistics():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(8, 32, rngs=rngs)
            self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.out = nnx.Linear(32, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, key, x, label):
        net = nnx.merge(graph, params, rest, copy=True)
        nnx.reseed(net, default=key)
        return 5 * cross_entropy(net(x), label)

    keys = jax.random.split(jax.random.key(4), B)
    batch = normal(2, B, 8, dtype=jnp.float32), labels(3, B, classes=3)
    norms = per_example_grad(loss, in_axes=(None, None, 0, 0, 0))(params, rest, keys, *batch).norms()
    G = jax.vmap(jax.grad(loss), (None, None, 0, 0, 0))(params, rest, keys, *batch)
    expected = jnp.sqrt(sum((a.reshape(B, -1) ** 2).sum(1) for a in jax.tree.leaves(G)))
    np.testing.assert_allclose(norms, expected, rtol=1e-4)
