"""per_example_grad, per_example_value_and_grad and explain as users call them, against jax.vmap(jax.grad(…))."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrad import explain, network, per_example_grad, per_example_value_and_grad
from jaxgrad.network import closed_form

B = 6
# Each program runs once: without these options, optimizing it would take most of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
QUICK |= {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64).astype(dtype)


def mlp(p, x, y):
    return (p["v"] @ jnp.tanh(p["W"] @ x + p["b"]) - y) ** 2


def mlp_data(dtype=jnp.float64):
    p = {"W": normal(0, 9, 7, dtype=dtype), "b": normal(1, 9, dtype=dtype), "v": normal(2, 9, dtype=dtype)}
    return p, normal(3, B, 7, dtype=dtype), normal(4, B, dtype=dtype)


def many(p, ids, y):
    """A lookup, a convolution, a recurrence, a condition, a map in a loop, a product larger than its weight."""
    x = p["E"][ids]
    c = lax.conv_general_dilated(x[None], p["k"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    h, _ = lax.scan(lambda h, a: (jnp.tanh(p["R"] @ h + p["W"] @ a + p["b"]), None), jnp.zeros(12), x)
    extra = lax.cond(y > 0, lambda: jnp.sin(p["W"] @ x[0]).sum(), lambda: jnp.zeros(()))
    steps = h[:6].reshape(2, 3)
    direct = lax.scan(lambda c, v: (c + (jnp.sin(p["D"]) @ v).sum(), None), 0.0, steps)[0]  # the line explain names
    return (h.sum() - y) ** 2 + jnp.tanh(c).sum() + extra + direct + jnp.cos(p["F"] @ h[:4].reshape(2, 2)).sum()


DIRECT = f"{__file__}:{many.__code__.co_firstlineno + 7}"


def many_data():
    shapes = {"E": (30, 8), "k": (3, 8, 10), "R": (12, 12), "W": (12, 8), "D": (4, 3), "F": (2, 2), "b": (12,)}
    p = {name: normal(k, *shape) / 3 for k, (name, shape) in enumerate(shapes.items())}
    return p | {"unused": jnp.ones((2, 3))}, jax.random.randint(jax.random.key(7), (B, 3), 0, 30), normal(8, B)


MODELS = pytest.mark.parametrize(("loss", "data"), [(mlp, mlp_data), (many, many_data)], ids=["mlp", "many"])


def close(found, expected, rtol=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0))


def from_factors(loss, argnums=0, in_axes=0):
    def results(*args):
        g = per_example_grad(loss, argnums, in_axes=in_axes)(*args)
        return g.materialize(), g.sum(), g.norms(), g.clip(1.0).sum()

    return results


def reference(loss, argnums=0, vmap_axes=(None, 0, 0)):
    def results(*args):
        G = jax.vmap(jax.grad(loss, argnums), vmap_axes)(*args)
        squares = [jnp.sum(a**2, tuple(range(1, a.ndim))).astype(jnp.float64) for a in jax.tree.leaves(G)]
        norms = jnp.sqrt(functools.reduce(jnp.add, squares))
        weight = 1 / jnp.maximum(1, norms)
        clipped = jax.tree.map(lambda a: jnp.tensordot(weight, a.astype(jnp.float64), 1).astype(a.dtype), G)
        return G, jax.tree.map(lambda a: a.sum(0), G), norms, clipped

    return results


# --- Arguments and results -------------------------------------------------------------------------------------------


def test_scalars_are_parameters_and_random_keys_are_examples():
    def loss(p, key, x):
        x = x * jax.random.bernoulli(key, shape=x.shape).astype(x.dtype)
        return jnp.sin(p["a"] * x).sum() * p["c"] + p["d"]

    for dtype in (jnp.float32, jnp.float64):
        p = {"a": jnp.array(2, dtype), "c": 0.5, "d": np.ones((), dtype)[()]}
        args = (p, jax.random.split(jax.random.key(0), B), normal(0, B, 3, dtype=dtype))
        close(jit(from_factors(loss))(*args), jit(reference(loss))(*args), 1e-6)


def test_values_auxiliary_results_and_numpy_arrays():
    def loss(p, x, y):
        return mlp(p, x, y), {"h": p["W"] @ x, "n": 3, "ids": jnp.arange(2), "shared": p["b"], "none": None}

    p, X, Y = jax.tree.map(np.asarray, mlp_data())
    (values, aux), G = jit(jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0, 0)))(p, X, Y)
    g, found = per_example_grad(loss, has_aux=True)(p, X, Y)
    close((g.materialize(), found), (G, aux))
    found, g = per_example_value_and_grad(loss, has_aux=True)(p, X, Y)
    close((found, g.materialize()), ((values, aux), G))
    found, g = per_example_value_and_grad(mlp)(p, X, Y)
    close((found, g.materialize()), (values, G))


# --- Under JAX's transformations -------------------------------------------------------------------------------------


def fitted(results, p, X, Y):
    def step(p, i):
        return jax.tree.map(lambda a, d: a - 0.01 * d, p, results(mlp)(p, X * (1 + i / 5), Y)[3]), None

    return lax.scan(step, p, jnp.arange(3.0))


def over_a_closure(results, p, X, Y):
    def norms(scale, shift):
        return results(lambda p, x, y: mlp(p, x * scale + shift, y))(p, X, Y)[2].sum()

    scale, shift = normal(5, 7), normal(6)
    several = jax.vmap(norms, (None, 0))(scale, jnp.arange(3.0))
    return norms(scale, shift), jax.grad(norms, (0, 1))(scale, shift), jax.hessian(norms)(scale, shift), several


TRANSFORMED = {
    "vmap": (many_data, lambda results, p, X, Y: jax.vmap(lambda c: results(many)({**p, "R": c * p["R"]}, X, Y)[0])(Y)),
    "grad": (many_data, lambda results, p, *a: jax.grad(lambda p: jnp.square(results(many)(p, *a)[2] - 1).sum())(p)),
    "jvp": (mlp_data, lambda results, p, X, Y: jax.jvp(lambda p: results(mlp)(p, X, Y)[:3], (p,), (p,))),
    "scan": (mlp_data, fitted),
    "closure": (mlp_data, over_a_closure),
}


@pytest.mark.every(7)
@pytest.mark.parametrize("name", TRANSFORMED)
def test_under_transformations(name):
    data, function = TRANSFORMED[name]
    close(*(jit(functools.partial(function, results))(*data()) for results in (from_factors, reference)), 1e-11)


@pytest.mark.every(7)
@pytest.mark.parametrize("unused", [{}, {"unused": np.ones((3, 4))}], ids=["", "unused parameter"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map", "shard_map unchecked"])
def test_a_sharded_batch(kind, unused):
    devices = max(n for n in range(1, B + 1) if B % n == 0 and n <= len(jax.devices()))
    types = (jax.sharding.AxisType["Explicit" if kind == "Explicit" else "Auto"],)
    mesh, each, whole = jax.make_mesh((devices,), ("batch",), axis_types=types), PartitionSpec("batch"), PartitionSpec()
    (p, X, Y), part = mlp_data(), slice(None, None, 2 if "shard_map" in kind else None)  # without sums over examples
    function, expected = (lambda *args: from_factors(mlp)(*args)[part]), jit(reference(mlp))(p | unused, X, Y)[part]
    if "shard_map" in kind:
        specs = {"in_specs": (whole, each, each), "out_specs": each, "check_vma": kind == "shard_map"}
        function = jax.shard_map(function, mesh=mesh, **specs)
    with jax.set_mesh(mesh):
        p, batch = (jax.device_put(a, NamedSharding(mesh, lies)) for a, lies in ((p | unused, whole), ((X, Y), each)))
        close(jax.tree.map(np.asarray, jax.jit(function)(p, *batch)), expected)


def test_the_loss_is_traced_once():
    def loss(*args):
        count.append(1)
        return mlp(*args)

    under_grad = jax.grad(lambda *args: per_example_grad(loss)(*args).norms().sum())
    for call in (jit(per_example_grad(loss)), jit(per_example_value_and_grad(loss)), explain(loss), jit(under_grad)):
        count = []
        call(*mlp_data())
        assert count == [1]


# --- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.every(5)
@pytest.mark.parametrize("n", [0, 1])
@MODELS
def test_batches_of_none_and_of_one(loss, data, n):
    p, X, Y = data()
    close(jit(from_factors(loss))(p, X[:n], Y[:n]), jit(reference(loss))(p, X[:n], Y[:n]))
    assert jax.eval_shape(per_example_value_and_grad(loss), p, X[:n], Y[:n])[0].shape == (n,)


def test_all_examples_masked():
    p, X, Y = many_data()
    mask, nothing = jnp.zeros(B, bool), jax.tree.map(jnp.zeros_like, p)
    masked = lambda p, x, y, m: jnp.where(m, many(p, x, y), 0)  # noqa: E731
    _, total, norms, clipped = jit(from_factors(masked))(p, X, Y, mask)
    close((total, norms, clipped), (nothing, jnp.zeros(B), nothing), 0)
    bad = jit(lambda: (lambda g: (g.sum(), g.norms()))(per_example_grad(many)(p, X, Y * jnp.nan).where(mask)))()
    close(bad, (nothing, jnp.zeros(B)), 0)


@pytest.mark.every(2)
@MODELS
def test_examples_do_not_affect_each_other(loss, data):
    p, X, Y = data()
    others, order = np.arange(B) != 2, np.array([3, 0, 5, 1, 4, 2])

    @jit
    def run(X, Y):
        g = per_example_grad(loss)(p, X, Y)
        return (g.materialize(), g.norms(), g.clip(0.5).materialize()), g.where(jnp.asarray(others)).sum(), g.sum()

    each, kept, total = run(X, Y)
    for bad in (np.nan, np.inf, -np.inf):
        each_, kept_, _ = run(X, Y.at[2].set(bad))
        close(jax.tree.map(lambda a: a[others], each_), jax.tree.map(lambda a: a[others], each), 0)
        close(kept_, kept, 0)
        assert not np.isfinite(each_[1][2])
    each_, _, total_ = run(X[order], Y[order])
    close((each_, total_), (jax.tree.map(lambda a: a[order], each), total), 1e-13)


@pytest.mark.every(3)
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.05), (jnp.float16, 0.01)])
def test_low_precision(dtype, rtol):
    data = mlp_data(dtype)
    g, G = jit(per_example_grad(mlp))(*data), jit(reference(mlp))(*data)[0]
    for tree in (g.sum(), g.mean(), g.materialize(), g.weighted_sum(jnp.ones(B)), g.clip(1.0).sum()):
        assert {a.dtype for a in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    assert g.norms().dtype == jnp.float32
    close(jax.tree.map(np.float64, g.materialize()), jax.tree.map(np.float64, G), 4 * float(jnp.finfo(dtype).eps))
    norms = jit(from_factors(mlp))(*jax.tree.map(np.float64, data))[2]
    np.testing.assert_allclose(g.norms(), norms, rtol=rtol, atol=rtol * norms.max() / 4)
    W, *vectors = jax.tree.map(np.float64, [leaf[0] for leaf in g.factors.values()])
    squares = np.sum(W.left**2, 1) * np.sum(W.right**2, 1) + sum(np.sum(f.left**2, 1) for f in vectors)
    np.testing.assert_allclose(g.norms(), np.sqrt(squares), rtol=1e-6)


def test_the_exercise_has_the_factors_of_its_closed_form():
    X, Y = normal(1, B, 7), jnp.where(normal(2, B) > 0, 1.0, -1.0)
    params = network.init_params(jax.random.key(0), 7, 9, jnp.float64)
    found, expected = jit(per_example_grad(network.loss))(params, X, Y), closed_form.factored_grads(params, X, Y)
    assert (found.paths, found.nbytes, repr(found)) == (expected.paths, expected.nbytes, repr(expected))
    for a, b in zip(found.factors, expected.factors, strict=True):
        assert [f.kind for f in a] == [f.kind for f in b]
        close(jax.tree.leaves(a), jax.tree.leaves(b))


# --- explain, strict, errors ------------------------------------------------------------------------------------------

HELD = {
    "['D']": ("materialized", "Dense([6, 4, 3])"),
    "['E']": ("factored", "Rows([6, 3], [6, 3, 8])"),
    "['F']": ("materialized", "Dense([6, 2, 2])"),
    "['R']": ("factored", "Outer([6, 3, 12], [6, 3, 12])"),
    "['W']": ("factored", "Outer([6, 12], [6, 8]) + Outer([6, 3, 12], [6, 3, 8])"),
    "['b']": ("materialized", "Dense([6, 12])"),
    "['k']": ("factored", "Windows([6, 3, 10], [6, 3, 8])"),
}


def test_explain():
    p, X, Y = many_data()
    e, g = explain(many)(p, X, Y), jit(per_example_grad(many))(p, X, Y)
    assert {row.path: (row.how, " + ".join(row.factors)) for row in e.rows if row.nbytes} == HELD
    assert (e["['W']"].norm, e["['unused']"].how) == (("sides", "positions", "positions"), "unused")
    assert [row.shape for row in e.rows] == [a.shape for a in jax.tree.leaves(p)]
    assert (e.batch_size, e.nbytes, e.materialized_nbytes) == (B, g.nbytes, g.materialized_nbytes)
    assert (e["['R']"].nbytes, e["['R']"].materialized_nbytes) == (8 * B * 3 * 24, 8 * B * 144)
    assert [(row.path, row.primitive, row.source) for row in e.direct] == [("['D']", "scan", DIRECT)]
    lines = str(e).splitlines()
    assert [e[path].why for path in ("['F']", "['b']", "['W']")] == ["smaller", "vector", ""]
    assert re.fullmatch(r"\['b'\] +\[12\] +materialized +vector +Dense\(\[6, 12\]\) +entries +576 B +576 B", lines[8])
    assert lines[-1].startswith(f"['D']: materialized because of scan at {DIRECT}: ")
    with pytest.raises(KeyError, match=r"Explanation\[\.\.\.\]: expected one of the paths .*\['W'\].*, got W\."):
        e["W"]
    n = 10**12  # nothing is computed
    shapes = jax.eval_shape(lambda: p), jax.ShapeDtypeStruct((n, 3), jnp.int32), jax.ShapeDtypeStruct((n,), jnp.float64)
    assert explain(many)(*shapes).nbytes == e.nbytes // B * n


def test_strict():
    close(jit(per_example_grad(mlp, strict=True))(*mlp_data()).sum(), jit(from_factors(mlp))(*mlp_data())[1])
    for transform in (per_example_grad, per_example_value_and_grad):
        message = rf"{transform.__name__}: .*\['D'\]: scan at {re.escape(DIRECT)}: .*Write the use .* drop strict=True"
        with pytest.raises(ValueError, match=message):
            jit(transform(many, strict=True))(*many_data())


SCALAR = "expected a loss that returns a real scalar for one example"


@pytest.mark.usefixtures("plain_types")
@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (lambda p, x, y: p["W"] @ x, {}, TypeError, rf"{SCALAR}, got float64 of shape \(9,\)"),
        (lambda p, x, y: 1, {}, TypeError, rf"{SCALAR}, got int64 of shape \(\)"),
        (lambda p, x, y: lax.complex(y, y), {}, TypeError, f"{SCALAR}, got complex128"),
        (lambda p, x, y: (mlp(p, x, y), x), {}, TypeError, f"{SCALAR}, .* set has_aux=True"),
        (lambda p, x, y: None, {}, TypeError, SCALAR),
        (mlp, {"has_aux": True}, TypeError, "has_aux"),
        (lambda p, x, y: (mlp(p, x, y), x, y), {"has_aux": True}, TypeError, "has_aux"),
        *(
            (mlp, {"leaf": [leaf]}, TypeError, rf"of a floating dtype, got {got} at \['leaf'\]\[0\]")
            for leaf, got in (
                (3, "int64"),
                (np.arange(3), "int64"),
            )
        ),
        (3, {}, TypeError, "expected a function of one example, got int"),
        (mlp, {"argnums": 3}, ValueError, "expected argnums among the 3 positional arguments, got 3"),
        (mlp, {"argnums": (0, -3)}, ValueError, "expected each argument once in argnums"),
        *((mlp, {"argnums": k}, TypeError, "expected a whole number or a sequence") for k in (0.5, "0", (0.5,), None)),
        (mlp, {"argnums": (0, 1, 2)}, ValueError, "expected at least one batched argument"),
    ],
)
def test_errors_name_what_is_wrong(loss, options, error, message):
    p, X, Y = mlp_data()
    p, options = p | {"leaf": options.get("leaf", ())}, {k: v for k, v in options.items() if k != "leaf"}
    for name, transform in (("per_example_grad", per_example_grad), ("explain", explain)):
        with pytest.raises(error, match=f"{name}: .*{message}"):
            transform(loss, **options)(p, X, Y)


def attention(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    return jnp.sum(jnp.tanh((x + jax.nn.softmax(q @ k.T) @ v @ p["o"]) @ p["up"]) @ p["down"])


def gru(p, xs):
    def step(h, x):
        z, r = (jax.nn.sigmoid(p[a] @ x + p[b] @ h) for a, b in ("zZ", "rR"))
        return (1 - z) * h + z * jnp.tanh(p["n"] @ x + p["N"] @ (r * h)), None

    return lax.scan(step, jnp.zeros(40, xs.dtype), xs)[0].sum()


LARGE = {
    "mlp": (lambda p, x: jnp.sum(p["V"] @ jnp.tanh(p["W"] @ x[0])), {"W": (40, 40), "V": (48, 40)}),
    "attention": (attention, dict.fromkeys("qkvo", (40, 40)) | {"up": (40, 48), "down": (48, 40)}),
    "gru": (gru, dict.fromkeys("zZrRnN", (40, 40))),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", LARGE)
def test_no_array_of_batch_times_matrix_is_in_the_compiled_program(name):
    loss, shapes = LARGE[name]
    p, X = {k: jnp.zeros(shape, jnp.float32) for k, shape in shapes.items()}, jnp.zeros((29, 5, 40), jnp.float32)

    def largest(operation):
        text = (
            jax.jit(lambda *args: operation(per_example_grad(loss, strict=True)(*args))).lower(p, X).compile().as_text()
        )
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", text))

    assert largest(lambda g: (g.norms(), g.clip(1.0).sum())) < 29 * 40 * 40 <= largest(lambda g: g.materialize())
