"""Squares commute, by the thousand: a random product goes through random equations, and what the rules make of it,
materialized, is the program's own result. Both are traced, and evaluated in NumPy."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.numpy_programs import evaluated, traced

from conftest import FUZZ
from jaxgrad import _jax
from jaxgrad.per_example.algebra.place import Axis, is_nested, put, read
from jaxgrad.per_example.interpreter import walk
from jaxgrad.per_example.interpreter.measuring import Measurer, measuring
from jaxgrad.per_example.interpreter.values import Unevaluated, array_of

SIZES = [1, 2, 3, 4, 6]


class Draw:
    """Random choices, and the arrays that a program takes; the first `made` of them make the product."""

    def __init__(self, seed):
        self.rng, self.operands, self.text = np.random.default_rng(seed), [], []

    def of(self, options):
        return options[self.rng.integers(len(options))]

    def size(self):
        return self.of(SIZES)

    def array(self, *shape):
        return self.operand(self.rng.normal(size=shape))

    def ids(self, rows, *shape):
        return self.operand(self.rng.integers(-2, rows + 2, size=shape))

    def operand(self, a):
        self.operands.append(a)
        k = len(self.operands) - 1
        return lambda args: args[k]


# --- What makes a product: each returns (a function of all operands, the shape) -----------------------------------


def matrix_product(d):
    """dot_general with positions and groups, in any order of the axes."""
    groups, positions = ([d.size() for _ in range(d.of([0, 1, 1, 2]))] for _ in range(2))
    F, K = ([d.size() for _ in range(d.of([0, 1, 1, 2]))] for _ in range(2))
    g, t = range(len(groups)), range(len(groups), len(groups) + len(positions))
    left, right = [*groups, *positions, *F], [*groups, *positions, *K]
    order, order_ = (d.rng.permutation(len(sizes)) for sizes in (left, right))
    a, b = d.array(*(left[k] for k in order)), d.array(*(right[k] for k in order_))
    at, at_ = ({int(k): i for i, k in enumerate(o)} for o in (order, order_))
    numbers = (([at[k] for k in t], [at_[k] for k in t]), ([at[k] for k in g], [at_[k] for k in g]))
    result = lambda args: lax.dot_general(a(args), b(args), numbers)  # noqa: E731
    return result, [*groups, *(left[k] for k in order if k >= len(groups) + len(positions)),
                    *(right[k] for k in order_ if k >= len(groups) + len(positions))]  # fmt: skip


def outer(d):
    G, F, K = d.size(), d.size(), d.size()
    a, b = d.array(G, F), d.array(G, K)
    return lambda args: a(args)[:, :, None] * b(args)[:, None, :], [G, F, K]


def lookup(d):
    rows, K, positions = d.of([2, 3, 6]), [d.size() for _ in range(d.of([0, 1, 2]))], [d.size()] * d.of([1, 2])
    ids, values, mode = d.ids(rows, *positions), d.array(*positions, *K), d.of(["drop", "clip"])

    def table(args):
        return jnp.zeros((rows, *K)).at[ids(args)].add(values(args), mode=mode)

    return table, [rows, *K]


def mean_of_rows(d):
    rows, K, T = d.of([2, 3, 6]), d.size(), d.of([2, 5])
    ids, value = d.ids(rows, T), d.array(K)
    return lambda args: jnp.zeros((rows, K)).at[ids(args)].add(jnp.broadcast_to(value(args), (T, K)), mode="drop"), [
        rows,
        K,
    ]


def one_row(d):
    rows, K = d.of([2, 3, 6]), d.size()
    index, value = d.ids(rows), d.array(1, K)

    def put(args):
        i = index(args)
        return lax.dynamic_update_slice(jnp.zeros((rows, K)), value(args), (i, jnp.zeros_like(i)))

    return put, [rows, K]


def padded(d):
    n, m, lo, hi = d.size(), d.size(), d.size(), d.size()
    a = d.array(n, m)
    return lambda args: lax.pad(a(args), 0.0, [(lo, hi, 0), (0, hi, lo)]), [n + lo + hi, m + (m - 1) * lo + hi]


def kernel(d):
    """The gradient of a convolution's kernel along one axis."""
    N, C, F, T, places, stride = d.of([1, 2]), d.size(), d.size(), d.of([2, 3]), d.of([1, 2, 3]), d.of([1, 2])
    image, cotangent = d.array(N, C, (T - 1) * stride + places), d.array(N, F, T)
    numbers = lax.ConvDimensionNumbers((1, 0, 2), (1, 0, 2), (1, 0, 2))

    def gradient(args):
        return lax.conv_general_dilated(
            image(args), cotangent(args), (1,), [(0, 0)], rhs_dilation=(stride,), dimension_numbers=numbers
        )

    return gradient, [F, C, places]


MAKERS = [matrix_product] * 5 + [outer, lookup, lookup, mean_of_rows, one_row, padded, kernel]

# --- What follows: each takes (draw, shape) and returns (a function of the array and all operands, the new shape) ----


def transpose(d, shape):
    order = [int(k) for k in d.rng.permutation(len(shape))]
    return lambda a, args: a.transpose(order), [shape[k] for k in order]


def factored(d, n):
    """n as a product of a few sizes."""
    found = []
    while n > 1 and d.rng.random() < 0.7:
        p = int(d.of([m for m in range(2, n + 1) if n % m == 0]))
        found, n = [*found, p], n // p
    return [*found, n] if n > 1 or not found else found


def reshape(d, shape):
    """Axes merged, split, both, or with sizes of 1 put between them."""
    if 0 in shape:
        return None
    way, new = d.of(["merge", "split", "any", "ones"]), list(shape)
    if way in ("merge", "any") and len(new) > 1:
        k = d.rng.integers(len(new) - 1)
        new[k : k + 2] = [new[k] * new[k + 1]]
    if way in ("split", "any") and new:
        k = d.rng.integers(len(new))
        new[k : k + 1] = factored(d, new[k])
    if way == "ones":
        new.insert(d.rng.integers(len(new) + 1), 1)
    return lambda a, args: a.reshape(new), new


def squeeze(d, shape):
    ones = [k for k, n in enumerate(shape) if n == 1]
    if not ones:
        return None
    return lambda a, args: lax.squeeze(a, [ones[0]]), [n for k, n in enumerate(shape) if k != ones[0]]


def cut(d, shape):
    starts, limits, steps = [], [], []
    for n in shape:
        whole = d.rng.random() < 0.5
        a = 0 if whole else int(d.rng.integers(n))
        starts.append(a)
        limits.append(n if whole else int(d.rng.integers(a, n + 1)))
        steps.append(1 if whole else d.of([1, 1, 2, 3]))
    new = [len(range(*part)) for part in zip(starts, limits, steps, strict=True)]
    return lambda a, args: lax.slice(a, starts, limits, steps), new


def pad(d, shape):
    config = [d.of([(0, 0, 0), (1, 0, 0), (0, 2, 0), (2, 1, 1), (0, 0, 2), (-1, 0, 0), (0, -1, 0)]) for _ in shape]
    config = [(max(lo, 1 - n), hi if n + min(lo, 0) > 1 else max(hi, 0), step) for (lo, hi, step), n in
              zip(config, shape, strict=True)]  # fmt: skip
    new = [lo + hi + n + max(n - 1, 0) * step for (lo, hi, step), n in zip(config, shape, strict=True)]
    return lambda a, args: lax.pad(a, 0.0, config), new


def reverse(d, shape):
    dims = [k for k in range(len(shape)) if d.rng.random() < 0.5]
    return lambda a, args: lax.rev(a, dims), shape


def negative(d, shape):
    return lambda a, args: -a, shape


def scaled(d, shape):
    """By numbers that vary along some axes, or along none."""
    dims = [k for k in range(len(shape)) if d.rng.random() < 0.3]
    c, divide = d.array(*(shape[k] for k in dims)), d.rng.random() < 0.3

    def scale(a, args):
        other = lax.broadcast_in_dim(c(args), shape, dims)
        return a / other if divide else a * other

    return scale, shape


def masked(d, shape):
    dims = [k for k in range(len(shape)) if d.rng.random() < 0.3]
    mask = d.operand(d.rng.random([shape[k] for k in dims]) < 0.6)
    return lambda a, args: lax.select(lax.broadcast_in_dim(mask(args), shape, dims), a, jnp.zeros(shape)), shape


def summed(d, shape):
    dims = [k for k in range(len(shape)) if d.rng.random() < 0.3]
    return lambda a, args: a.sum(dims), [n for k, n in enumerate(shape) if k not in dims]


def times_matrix(d, shape):
    if not shape:
        return None
    k, first = int(d.rng.integers(len(shape))), d.rng.random() < 0.5
    C = d.array(shape[k], 3)
    both = [(k, 0)] if first else [(0, k)]
    numbers = (tuple(zip(*both, strict=True)), ((), ()))

    def times(a, args):
        return lax.dot_general(a, C(args), numbers) if first else lax.dot_general(C(args), a, numbers)

    others = [n for i, n in enumerate(shape) if i != k]
    return times, [*others, 3] if first else [3, *others]


def joined(d, shape):
    if not shape:
        return None
    k = int(d.rng.integers(len(shape)))
    zeros = [3 if i == k else n for i, n in enumerate(shape)]
    parts = lambda a: [a, jnp.zeros(zeros), a]  # noqa: E731
    return lambda a, args: lax.concatenate(parts(a), k), [2 * n + 3 if i == k else n for i, n in enumerate(shape)]


def part(d, shape):
    if not shape:
        return None
    k = int(d.rng.integers(len(shape)))
    n = int(d.rng.integers(shape[k] + 1))
    sizes = (n, shape[k] - n)
    which = int(d.rng.integers(2))
    return lambda a, args: lax.split(a, sizes, k)[which], [sizes[which] if i == k else m for i, m in enumerate(shape)]


def placed(d, shape):
    """Into zeros, at an index that is data."""
    if not shape:
        return None
    k = int(d.rng.integers(len(shape)))
    new = [n + 2 if i == k else n for i, n in enumerate(shape)]
    index = d.ids(3)

    def update(a, args):
        i = index(args)
        return lax.dynamic_update_slice(
            jnp.zeros(new), a, [i if j == k else jnp.zeros_like(i) for j in range(len(new))]
        )

    return update, new


STEPS = [transpose, reshape, reshape, squeeze, cut, cut, pad, reverse, negative, scaled, masked, summed]
STEPS += [times_matrix, joined, part, placed]


def program(seed):
    """(function of the operands, the operands, what it does)."""
    d = Draw(seed)
    maker = d.of(MAKERS)
    value, shape = maker(d)
    names, steps = [maker.__name__], []
    for _ in range(d.of([1, 2, 3, 4, 6])):
        step = d.of(STEPS)
        found = step(d, shape)
        if found is None or not 0 < np.prod(found[1]) <= 5000:
            continue
        steps.append(found[0])
        names.append(f"{step.__name__} {shape} → {found[1]}")
        shape = found[1]

    def function(*args):
        a = value(args)
        for step in steps:
            a = step(a, args)
        return a

    return function, d.operands, names


def result_of(closed, kept):
    """A function that evaluates the program by the rules, and materializes the result."""

    def by_rules(*args):
        with measuring(Measurer(None, None)):  # products stay products, however small the result is
            (value,) = walk.evaluate(_jax.program_of(closed), args, [True], [True])
        if isinstance(value, Unevaluated):
            kept.append(len(value.terms))
            value = dataclasses.replace(value, as_written=None)
        return array_of(value)

    return by_rules


@pytest.fixture(autouse=True)
def _users_settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_what_the_rules_make_of_a_product_is_what_the_program_makes_of_its_array(first):
    kept, refused = [], Counter()
    for seed in range(first * FUZZ, (first + 100) * FUZZ):
        function, operands, names = program(seed)
        closed = traced(function, operands)
        (expected,), before = evaluated(closed, operands), len(kept)
        (found,) = evaluated(traced(result_of(closed, kept), operands), operands)
        scale = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-12, err_msg=f"{seed}: {names}")
        refused[len(kept) == before] += 1
    assert refused[False] > 40 * FUZZ, refused  # most stay products to the end


def random_place(d):
    """(a place whose labels have gaps between them and run backwards, their sizes)."""
    sizes, place = [], []
    for _ in range(d.of([1, 2])):
        steps, extent = [], 1
        for _ in range(d.of([0, 1, 2, 3])):
            stride, n = extent + d.of([0, 0, 1, 2]), d.of([1, 2, 3])
            steps.insert(0, (len(sizes), d.of([-1, 1]) * stride))
            sizes.append(n)
            extent += stride * (n - 1)
        axis = Axis(0, 0, tuple(steps))
        first, last = axis.extent(sizes)
        before, after = d.of([0, 1, 2]), d.of([0, 1, 2])
        place.append(axis._replace(size=before + last - first + 1 + after, start=before - first))
    return place, sizes


@pytest.mark.parametrize("seed", range(40 * FUZZ))
def test_put_and_read_are_what_the_strides_say(seed):
    d = Draw(seed)
    place, sizes = random_place(d)
    assert all(is_nested(axis, sizes) for axis in place)
    order = [int(k) for k in d.rng.permutation(len(sizes))]
    value = d.rng.normal(size=[2, *(sizes[label] for label in order)])
    expected = np.zeros([2, *(axis.size for axis in place)])
    for index in np.ndindex(value.shape[1:]):
        at = [a.start + sum(stride * index[order.index(label)] for label, stride in a.steps) for a in place]
        expected[(slice(None), *at)] += value[(slice(None), *index)]
    (found,) = evaluated(traced(lambda a: put(a, order, place, sizes), [value]), [value])
    np.testing.assert_array_equal(found, expected)
    (found,) = evaluated(traced(lambda a: read(a, order, place, sizes), [expected]), [expected])
    np.testing.assert_array_equal(found, value)
