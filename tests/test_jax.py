"""The contract with JAX: the params that are read of each primitive, and the form of the gradient programs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxgrad
from jaxgrad import _jax

A, V, IDS = jnp.ones((3, 4)), jnp.ones(4), jnp.arange(5)
IMAGE, KERNEL = jnp.ones((1, 2, 6, 7)), jnp.ones((4, 2, 3, 2))


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


def plain(value):
    return tuple(plain(v) for v in value) if isinstance(value, tuple | list) else value


A_SHAPE = ((3, 4),)
PARAMS = [
    (lax.transpose_p, lambda: A.T, A_SHAPE, {"permutation": (1, 0)}),
    (lax.reshape_p, lambda: lax.reshape(A, (2, 6)), A_SHAPE, {"dimensions": None}),
    (lax.broadcast_in_dim_p, lambda: A[:, None], A_SHAPE, {"broadcast_dimensions": (0, 2)}),
    (lax.reduce_sum_p, lambda: A.sum(1), A_SHAPE, {"axes": (1,)}),
    (lax.rev_p, lambda: A[:, ::-1], A_SHAPE, {"dimensions": (1,)}),
    (lax.slice_p, lambda: A[:2], A_SHAPE, {"start_indices": (0, 0), "limit_indices": (2, 4), "strides": None}),
    (lax.slice_p, lambda: A[:, 1::2], A_SHAPE, {"start_indices": (0, 1), "limit_indices": (3, 4), "strides": (1, 2)}),
    (lax.split_p, lambda: jnp.split(A, [1], axis=1), A_SHAPE, {"sizes": (1, 3), "axis": 1}),
    (lax.concatenate_p, lambda: jnp.concatenate([A, A], 1), A_SHAPE * 2, {"dimension": 1}),
    (lax.pad_p, lambda: jnp.pad(A, ((1, 2), (0, 0))), (*A_SHAPE, ()), {"padding_config": ((1, 2, 0), (0, 0, 0))}),
    (lax.select_n_p, lambda: lax.select_n(A > 0, A, -A), A_SHAPE * 3, {}),
    (lax.dynamic_update_slice_p, lambda: lax.dynamic_update_slice(A, A[:1], (1, 0)), (*A_SHAPE, (1, 4), (), ()), {}),
    (lax.scatter_add_p, lambda: A.at[IDS].add(jnp.ones((5, 4))), (*A_SHAPE, (5, 1), (5, 4)), {}),
    (
        lax.dot_general_p,
        lambda: A @ V,
        (*A_SHAPE, (4,)),
        {"dimension_numbers": (((1,), (0,)), ((), ())), "precision": None},
    ),
    (
        lax.dot_general_p,
        lambda: jnp.einsum("bij,bj->bi", jnp.ones((2, 3, 4)), jnp.ones((2, 4)), precision="highest"),
        ((2, 3, 4), (2, 4)),
        {"dimension_numbers": (((2,), (1,)), ((0,), (0,))), "precision": (lax.Precision.HIGHEST,) * 2},
    ),
    (
        lax.conv_general_dilated_p,
        lambda: lax.conv_general_dilated(IMAGE, KERNEL, (1, 2), ((0, 1), (2, 3)), (2, 1), (1, 3)),
        ((1, 2, 6, 7), (4, 2, 3, 2)),
        {"window_strides": (1, 2), "padding": ((0, 1), (2, 3)), "lhs_dilation": (2, 1), "rhs_dilation": (1, 3)}
        | {"feature_group_count": 1, "batch_group_count": 1, "precision": None},
    ),
    *([] if _jax.unstack_p is None else [(_jax.unstack_p, lambda: jnp.unstack(A, axis=1), A_SHAPE, {"axis": 1})]),
]


@pytest.mark.parametrize("case", PARAMS, ids=lambda case: case[0].name)
def test_the_params_that_are_read(case):
    primitive, function, operands, params = case
    eqns = [
        e for e in program(function).jaxpr.eqns for e in (_jax.body(e).jaxpr.eqns if e.primitive is _jax.jit_p else [e])
    ]
    eqn = next(eqn for eqn in reversed(eqns) if eqn.primitive is primitive)
    assert {name: plain(eqn.params[name]) for name in params} == params
    assert shapes(eqn.invars) == list(operands)


@pytest.mark.parametrize(
    ("function", "axes", "window", "clips"),
    [
        (lambda E: E[IDS], (0,), [None, 1], False),
        (lambda E: E.at[IDS].get(mode="clip"), (0,), [None, 1], True),
        (lambda E: E.at[IDS].get(mode="fill", fill_value=0), (0,), [None, 1], False),
        (lambda E: E[:, IDS], (1,), [0, None], False),
        (lambda E: E[IDS, IDS], (0, 1), [None, None], False),
        (lambda E: jax.vmap(lambda row, i: row[i])(E, IDS[:3]), (1,), None, True),
    ],
)
def test_the_axes_of_a_lookups_gradient(function, axes, window, clips):
    eqn, _ = gradient(lambda E: jnp.sin(function(E)).sum(), A)
    assert eqn.primitive is lax.scatter_add_p
    assert (_jax.scatter_axes(eqn), _jax.scatter_window(eqn), _jax.scatter_clips(eqn)) == (axes, window, clips)


@pytest.mark.parametrize("options", [{}, {"reverse": True, "unroll": 2}], ids=["", "reverse"])
@pytest.mark.parametrize(
    ("step", "init", "xs", "parts"),
    [
        (lambda c, x: (c + x, 2 * x), A[0], A, (1, 1, 1)),
        (lambda c, x: (2 * c, None), V, None, (1, 0, 0)),
        (lambda c, x: ((c[1], c[0]), (x[0] + x[1], c[0].sum())), (V, V), (A, jnp.ones((3, 1))), (2, 2, 2)),
        (lambda c, x: (None, x.sum()), None, A, (0, 1, 1)),
    ],
)
def test_the_parts_of_a_scan(step, init, xs, parts, options):
    def loss(a):
        return lax.scan(lambda c, x: jax.tree.map(lambda v: v * a.sum(), step(c, x)), init, xs, length=3, **options)

    eqn = next(eqn for eqn in program(loss, A).jaxpr.eqns if eqn.primitive is _jax.scan_p)
    consts, carry, *rest = _jax.scan_parts(eqn)
    assert (carry, len(eqn.invars) - consts - carry, len(eqn.outvars) - carry) == parts
    assert rest == [3, options.get("reverse", False), options.get("unroll", 1)]
    assert consts == eqn.params.get("num_consts", consts) > 0  # the name is gone since JAX 0.11


def recurrent(W, xs):
    return lax.scan(lambda h, x: (jnp.tanh(W @ h + x), None), jnp.zeros(4), xs)[0].sum()


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
        assert eqn.primitive is primitive
        *others, whole = _jax.branches(eqn) if loss is cond else [_jax.body(eqn)]
        assert shapes(whole.jaxpr.invars) == shapes(eqn.invars[loss is cond :])
        assert writes(whole.jaxpr, whole.jaxpr.outvars[0]).primitive is lax.dot_general_p
        assert [writes(other.jaxpr, other.jaxpr.outvars[0]).primitive for other in others] == [lax.pad_p] * len(others)
    assert gradient(jax.checkpoint(inner), A, V)[0].params["prevent_cse"] is True


def test_a_matrixs_gradient_is_a_product_of_cotangent_and_input():
    for x, contracted in ((V, ((), ())), (jnp.ones((4, 6)), ((1,), (1,)))):
        eqn, jaxpr = gradient(lambda W, x: jnp.sin(W @ x).sum(), A, x)
        assert (eqn.primitive, eqn.invars[1]) == (lax.dot_general_p, jaxpr.invars[1])
        assert plain(eqn.params["dimension_numbers"]) == (contracted, ((), ()))
        assert eqn.invars[0].aval.shape == (3, *x.shape[1:])
    eqn, jaxpr = gradient(lambda W, x: jnp.sin(x @ W).sum(), A.T, V)
    assert [eqn.primitive, writes(jaxpr, eqn.invars[0]).primitive] == [lax.transpose_p, lax.dot_general_p]


def test_a_tables_gradient_is_added_to_zeros_and_a_kernels_is_a_convolution():
    for index, primitive in ((IDS, lax.scatter_add_p), (jnp.array(1), lax.dynamic_update_slice_p)):
        eqn, jaxpr = gradient(lambda E, i: jnp.sin(E[i]).sum(), A, index)
        assert (eqn.primitive, is_zeros(writes(jaxpr, eqn.invars[0]))) == (primitive, True)
    assert is_zeros(gradient(lambda p: jnp.sin(p[1]).sum(), (A, A))[0])
    eqn, jaxpr = gradient(lambda k, x: jnp.sin(lax.conv_general_dilated(x, k, (1, 1), "SAME")).sum(), KERNEL, IMAGE)
    assert (eqn.primitive, eqn.invars[0]) == (lax.conv_general_dilated_p, jaxpr.invars[1])
    numbers = eqn.params["dimension_numbers"]
    assert numbers.lhs_spec == numbers.rhs_spec == numbers.out_spec == (1, 0, 2, 3)


odd, strange = jax.custom_jvp(jnp.sin), jax.custom_vjp(jnp.cos)
odd.defjvp(lambda primals, tangents: (odd(*primals), 3 * tangents[0]))  # not its derivative
strange.defvjp(lambda x: (strange(x), None), lambda _, ct: (5 * ct,))


def everything(W, x, custom=strange):
    x = odd(x) + custom(x) + jnp.asarray(np.arange(4.0))
    h = lax.fori_loop(0, 3, lambda i, h: jnp.sin(h), x) + lax.while_loop(lambda h: h.sum() < 9, lambda h: 2 * h + 1, x)
    h = jax.checkpoint(lambda h: jnp.tanh(jax.jit(odd)(W @ h)))(h) + recurrent(W, jnp.stack([x, x]))
    return lax.cond(x[0] > 0, lambda: custom(W @ h).sum(), lambda: h.sum()) + (W @ lax.sort(x)).sum()


WRAPPERS = {"": lambda f: f, "jit": jax.jit, "vmap": jax.vmap, "jacfwd": lambda f: jax.jacfwd(f, argnums=1)}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_equation_can_be_evaluated_by_itself(name):
    function = jax.grad(lambda W, x: everything(W, x, odd if name == "jacfwd" else strange))
    W, x = jax.random.normal(jax.random.key(0), (2, 4, 4)), jax.random.normal(jax.random.key(1), (2, 4))
    args, names = (W, x) if name == "vmap" else (W[0], x[0]), set()

    def again(W, x):
        jaxpr, consts = program(function, W, x)
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, W, x), strict=True))
        read = lambda v: v.val if isinstance(v, _jax.Literal) else known[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, _jax.bind(eqn, [read(v) for v in eqn.invars]), strict=True)
            names.add(eqn.primitive.name)
        return read(jaxpr.outvars[0])

    np.testing.assert_allclose(*(jax.jit(WRAPPERS[name](f))(*args) for f in (again, function)), rtol=1e-12)
    assert names >= {"custom_jvp_call", "while", "scan", "cond", "sort"} | ({"custom_vjp_call"} - {name == "jacfwd"})


def test_the_users_line_is_found():
    def loss(W, x):
        h = W @ x
        return jax.nn.gelu(h).sum()

    (eqn, jaxpr), first = gradient(loss, A, V), loss.__code__.co_firstlineno
    assert _jax.source_line(eqn) == f"{__file__}:{first + 1}"
    assert _jax.source_line(next(e for e in jaxpr.eqns if e.primitive is lax.tanh_p)) == f"{__file__}:{first + 2}"


def test_only_one_file_takes_what_is_not_plainly_public():
    for path in Path(jaxgrad.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"jax\.(_src|core|interpreters)\b|from jax import [^\n]*\b(_src|core|interpreters)\b", text
        )
        assert path.name == "_jax.py" or "jax.extend" not in text
