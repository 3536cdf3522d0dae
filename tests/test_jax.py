"""The contract with JAX: the params that each rule reads, and the form of the gradient programs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

import jaxgrad
from jaxgrad import _jax

S, A, V, IDS, C = (3, 4), jnp.ones((3, 4)), jnp.ones(4), jnp.arange(5), jnp.ones((2, 3, 3))
IMAGES = jnp.ones((1, 2, 6, 7)), jnp.ones((4, 1, 3, 2))


def program(function, *args):
    return _jax.program_of(jax.make_jaxpr(function)(*args))


def writes(jaxpr, v):
    """The equation that a variable is the result of."""
    return next(eqn for eqn in jaxpr.eqns if v in eqn.outvars)


def gradient(loss, *args):
    """The equation that gives the gradient of the first argument, and the program."""
    jaxpr = program(jax.grad(loss), *args).jaxpr
    return writes(jaxpr, jaxpr.outvars[0]), jaxpr


def is_zeros(eqn):
    v = eqn.invars[0]
    return eqn.primitive is lax.broadcast_in_dim_p and isinstance(v, _jax.Literal) and v.val == 0


def shapes(variables):
    return [v.aval.shape for v in variables]


MATRIX = {"dimension_numbers": (((1,), (0,)), ((), ())), "precision": None}
BATCH = {"dimension_numbers": (((2,), (1,)), ((0,), (0,))), "precision": (lax.Precision.HIGHEST,) * 2}
CONV = {"window_strides": (1, 2), "padding": ((0, 1), (2, 3)), "lhs_dilation": (2, 1), "rhs_dilation": (1, 3)}
CONV |= {"feature_group_count": 2, "batch_group_count": 1, "precision": None}
PARAMS = [  # operands, params
    (lax.transpose_p, lambda: A.T, [S], {"permutation": (1, 0)}),
    (lax.reshape_p, lambda: lax.reshape(A, (A.size,), dimensions=(1, 0)), [S], {"dimensions": (1, 0)}),
    (lax.broadcast_in_dim_p, lambda: A[:, None], [S], {"broadcast_dimensions": (0, 2)}),
    (lax.reduce_sum_p, lambda: A.sum(1), [S], {"axes": (1,)}),
    (lax.rev_p, lambda: A[:, ::-1], [S], {"dimensions": (1,)}),
    (lax.slice_p, lambda: A[:2], [S], {"start_indices": (0, 0), "limit_indices": (2, 4), "strides": None}),
    (lax.slice_p, lambda: A[:, 1::2], [S], {"start_indices": (0, 1), "limit_indices": (3, 4), "strides": (1, 2)}),
    (lax.split_p, lambda: jnp.split(A, [1], axis=1), [S], {"sizes": (1, 3), "axis": 1}),
    (lax.concatenate_p, lambda: jnp.concatenate([A, A], 1), [S, S], {"dimension": 1}),
    (lax.pad_p, lambda: lax.pad(A, 0.0, ((1, 2, 0), (0, 0, 1))), [S, ()], {"padding_config": ((1, 2, 0), (0, 0, 1))}),
    (lax.select_n_p, lambda: lax.select_n(A > 0, A, -A), [S, S, S], {}),
    (lax.dynamic_update_slice_p, lambda: lax.dynamic_update_slice(A, A[:1], (1, 0)), [S, (1, 4), (), ()], {}),
    (lax.scatter_add_p, lambda: A.at[IDS].add(jnp.ones((5, 4))), [S, (5, 1), (5, 4)], {}),
    (lax.dot_general_p, lambda: A @ V, [S, (4,)], MATRIX),
    (lax.dot_general_p, lambda: lax.batch_matmul(C, C, "highest"), [(2, 3, 3)] * 2, BATCH),
    (lax.conv_general_dilated_p, lambda: lax.conv_general_dilated(*IMAGES, **CONV), shapes(IMAGES), CONV),
    *([] if _jax.unstack_p is None else [(_jax.unstack_p, lambda: jnp.unstack(A, axis=1), [S], {"axis": 1})]),
]


@pytest.mark.parametrize(("primitive", "function", "operands", "params"), PARAMS, ids=[row[0].name for row in PARAMS])
def test_the_params_that_are_read(primitive, function, operands, params):
    eqn = next(eqn for eqn in reversed(program(function).jaxpr.eqns) if eqn.primitive is primitive)
    assert {name: eqn.params[name] for name in params} == params
    assert shapes(eqn.invars) == operands


def test_a_pallas_kernel_has_a_name_and_says_whether_vmap_has_batched_it():
    def call(x):
        def kernel(x, out):
            out[...] = 2 * x[...]

        return pl.pallas_call(kernel, out_shape=jax.typeof(x), interpret=True, name="twice")(x)

    for function, batched in ((call, False), (jax.vmap(call), True)):
        (eqn,) = program(function, A).jaxpr.eqns
        assert (eqn.primitive.name, _jax.kernel_name(eqn)) == ("pallas_call", "twice")
        assert _jax.is_batched_kernel(eqn) == batched
        assert _jax.is_foreign(eqn)
    assert not any(map(_jax.is_foreign, program(jax.grad(everything), jnp.ones((4, 4)), V).jaxpr.eqns))


def test_the_axes_of_a_lookups_gradient():
    for function, axes, window, clips in (
        (lambda E: E[IDS], (0,), [None, 1], False),
        (lambda E: E.at[IDS].get(mode="clip"), (0,), [None, 1], True),
        (lambda E: E[:, IDS], (1,), [0, None], False),
        (lambda E: E[IDS, IDS], (0, 1), [None, None], False),
        (lambda E: jax.vmap(lambda row, i: row[i])(E, IDS[:3]), (1,), None, True),
    ):
        eqn, _ = gradient(lambda E, function=function: jnp.sin(function(E)).sum(), A)
        assert (_jax.scatter_axes(eqn), _jax.scatter_window(eqn), _jax.scatter_clips(eqn)) == (axes, window, clips)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("step", "init", "xs", "parts"),
    [
        (lambda c, x: (c + x, 2 * x), A[0], A, (1, 1, 1)),
        (lambda c, x: ((c[1], c[0]), (x[0] + x[1], c[0].sum())), (V, V), (A, jnp.ones((3, 1))), (2, 2, 2)),
        (lambda c, x: (None, x.sum()), None, A, (0, 1, 1)),
        (lambda c, x: (2 * c, None), V, None, (1, 0, 0)),
    ],
)
def test_the_parts_of_a_scan(step, init, xs, parts, reverse):
    def loss(a):
        return lax.scan(lambda c, x: jax.tree.map(lambda v: v * a.sum(), step(c, x)), init, xs, 3, reverse, 1 + reverse)

    eqn = next(eqn for eqn in program(loss, A).jaxpr.eqns if eqn.primitive is _jax.scan_p)
    consts, carry, *rest = _jax.scan_parts(eqn)
    assert (carry, len(eqn.invars) - consts - carry, len(eqn.outvars) - carry) == parts
    assert rest == [3, reverse, 1 + reverse]
    assert consts == eqn.params.get("num_consts", consts) > 0  # JAX 0.11 has no such name


def recurrent(W, xs):
    return lax.scan(lambda h, x: (jnp.tanh(W @ h + x), None), jnp.zeros(len(W)), xs)[0].sum()


def test_a_scans_accumulated_gradient_is_a_carry_that_is_added_to():
    eqn, jaxpr = gradient(recurrent, jnp.ones((4, 4)), A)
    parts, inner, k = _jax.scan_parts(eqn), _jax.body(eqn).jaxpr, eqn.outvars.index(jaxpr.outvars[0])
    added, into = writes(inner, inner.outvars[k]), parts.consts + k
    assert (parts.length, parts.reverse, k < parts.carry) == (3, True, True)
    assert (added.primitive, added.invars[0]) == (_jax.add_any_p, inner.invars[into])
    assert writes(inner, added.invars[1]).primitive is lax.dot_general_p
    assert is_zeros(writes(jaxpr, eqn.invars[into]))


def test_jit_remat_and_cond_hold_programs():
    inner = lambda W, x: jnp.sin(W @ x).sum()  # noqa: E731
    cond = lambda W, x: lax.cond(x[0] > 0, inner, lambda W, x: W[1].sum(), W, x)  # noqa: E731
    for loss, primitive in ((jax.jit(inner), _jax.jit_p), (jax.checkpoint(inner), _jax.remat_p), (cond, _jax.cond_p)):
        eqn, _ = gradient(loss, A, V)
        *_, whole = _jax.branches(eqn) if loss is cond else [_jax.body(eqn)]
        assert (eqn.primitive, shapes(whole.jaxpr.invars)) == (primitive, shapes(eqn.invars[loss is cond :]))
        assert writes(whole.jaxpr, whole.jaxpr.outvars[0]).primitive is lax.dot_general_p
    assert gradient(jax.checkpoint(inner), A, V)[0].params["prevent_cse"] is True


def test_a_matrixs_gradient_is_a_product_of_cotangent_and_input():
    for x, contracted in ((V, ((), ())), (jnp.ones((4, 6)), ((1,), (1,)))):
        eqn, jaxpr = gradient(lambda W, x: jnp.sin(W @ x).sum(), A, x)
        assert (eqn.primitive, eqn.invars[1]) == (lax.dot_general_p, jaxpr.invars[1])
        assert eqn.params["dimension_numbers"] == (contracted, ((), ()))
    eqn, jaxpr = gradient(lambda W, x: jnp.sin(x @ W).sum(), A.T, V)
    assert [eqn.primitive, writes(jaxpr, eqn.invars[0]).primitive] == [lax.transpose_p, lax.dot_general_p]


def test_a_tables_gradient_is_added_to_zeros_and_a_kernels_is_a_convolution():
    for index, primitive in ((IDS, lax.scatter_add_p), (jnp.array(1), lax.dynamic_update_slice_p)):
        eqn, jaxpr = gradient(lambda E, i: jnp.sin(E[i]).sum(), A, index)
        assert (eqn.primitive, is_zeros(writes(jaxpr, eqn.invars[0]))) == (primitive, True)
    assert is_zeros(gradient(lambda p: jnp.sin(p[1]).sum(), (A, A))[0])
    eqn, jaxpr = gradient(lambda k, x: jnp.sin(lax.conv_general_dilated(x, k, **CONV)).sum(), *IMAGES[::-1])
    assert (eqn.primitive, eqn.invars[0]) == (lax.conv_general_dilated_p, jaxpr.invars[1])
    numbers = eqn.params["dimension_numbers"]
    assert numbers.lhs_spec == numbers.rhs_spec == numbers.out_spec == (1, 0, 2, 3)


def test_a_mean_of_lookups_adds_one_row_at_every_index_and_a_loop_gives_products_step_by_step():
    mean = lambda E, ids: jnp.sin(E[ids].mean(0)).sum()  # noqa: E731
    eqn, jaxpr = gradient(mean, jnp.ones((30, 4)), IDS)
    assert writes(jaxpr, eqn.invars[2]).primitive is lax.broadcast_in_dim_p
    (rows,) = jaxgrad.per_example_grad(mean)(jnp.ones((30, 4)), IDS[None]).factors
    assert (rows.left.shape, rows.right.shape) == ((1, 5), (1, 4))
    for loss in (  # written at every position it would hold more than the gradient
        lambda E, ids: jnp.tanh(E[ids].mean(1)).sum(),
        lambda E, ids: lax.scan(lambda h, ids: (h + jnp.tanh(E[ids].mean(0)).sum(), None), 0.0, ids)[0],
        lambda E, ids: sum(jnp.tanh(E[ids[k]].mean(0)).sum() for k in range(8)),
    ):
        g = jaxgrad.per_example_grad(loss)(jnp.ones((30, 4)), jnp.zeros((2, 8, 16), jnp.int32))
        assert g.nbytes <= g.materialized_nbytes
    (outer,) = jaxgrad.per_example_grad(recurrent)(jnp.ones((40, 40)), jnp.ones((2, 3, 40))).factors
    assert (outer.left.shape, outer.stepped) == ((2, 3, 40), True)


wrong_jvp, wrong_vjp = jax.custom_jvp(jnp.sin), jax.custom_vjp(jnp.cos)
wrong_jvp.defjvp(lambda primals, tangents: (wrong_jvp(*primals), 3 * tangents[0]))  # not its derivative
wrong_vjp.defvjp(lambda x: (wrong_vjp(x), None), lambda _, ct: (5 * ct,))


def everything(W, x):
    x = wrong_jvp(x) + wrong_vjp(x) + jnp.asarray(np.arange(4.0))
    h = lax.fori_loop(0, 3, lambda i, h: jnp.sin(h), x) + lax.while_loop(lambda h: h.sum() < 9, lambda h: 2 * h + 1, x)
    h = jax.checkpoint(lambda h: jnp.tanh(jax.jit(wrong_jvp)(W @ h)))(h) + recurrent(W, jnp.stack([x, x]))
    return lax.cond(x[0] > 0, lambda: wrong_vjp(W @ h).sum(), lambda: h.sum()) + (W @ lax.sort(x)).sum()


WRAPPERS = {"": lambda f: f, "vmap": jax.vmap, "grad": lambda f: jax.grad(lambda *args: jnp.sin(f(*args)).sum())}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_equation_can_be_evaluated_by_itself(name):
    W, x = jax.random.normal(jax.random.key(0), (2, 4, 4)), jax.random.normal(jax.random.key(1), (2, 4))
    args, names = (W, x) if name == "vmap" else (W[0], x[0]), set()

    def reevaluated(W, x):
        jaxpr, consts = program(jax.grad(everything), W, x)
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, W, x), strict=True))
        read = lambda v: v.val if isinstance(v, _jax.Literal) else known[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, _jax.bind(eqn, [read(v) for v in eqn.invars]), strict=True)
            names.add(eqn.primitive.name)
        return read(jaxpr.outvars[0])

    np.testing.assert_allclose(*(WRAPPERS[name](f)(*args) for f in (reevaluated, jax.grad(everything))), rtol=1e-12)
    assert names >= {"custom_jvp_call", "custom_vjp_call", "while", "scan", "cond", "sort"}


def test_the_users_line_is_found():
    def loss(W, x):
        h = W @ x
        return jax.nn.gelu(h).sum()

    (eqn, jaxpr), first = gradient(loss, A, V), loss.__code__.co_firstlineno
    assert _jax.source_line(eqn) == f"{__file__}:{first + 1}"
    assert _jax.source_line(next(e for e in jaxpr.eqns if e.primitive is lax.tanh_p)) == f"{__file__}:{first + 2}"


def test_only_one_file_uses_what_is_not_plainly_public():
    private = r"jax\.(_src|core|interpreters)\b|from jax import .*\b(_src|core|interpreters)\b"
    for path in Path(jaxgrad.__file__).parent.rglob("*.py"):
        assert not re.search(private, path.read_text()), path
        assert path.name == "_jax.py" or "jax.extend" not in path.read_text()


def test_an_equation_is_evaluated_in_its_own_context():
    """The context is the mesh: which of its axes are explicit, and which are automatic inside auto_axes."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        inner = program(jax.sharding.auto_axes(jnp.sin, out_sharding=jax.sharding.PartitionSpec()), A).jaxpr
        eqn = next(eqn for eqn in inner.eqns if eqn.primitive is lax.sin_p)
        with _jax.context(eqn):
            assert jax.sharding.get_abstract_mesh().axis_types == (jax.sharding.AxisType.Auto,)
        assert jax.sharding.get_abstract_mesh().axis_types == (jax.sharding.AxisType.Explicit,)
