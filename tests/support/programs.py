"""Random losses: `program(seed)` writes the source of one, and runs it.

The source is Python: params, batch, and loss(params, *example) line by line, so that a failure can be cut down by hand.
Every line is a template below, an f-string that is evaluated when it is drawn: {w} is a weight of shape {s},
{like(shape)} another weight, {given(shape)} a value that depends on the example, {const(*shape)} one that does not,
{ids(n)} integers, some of them out of range, {flag()} a boolean. After a template marked with ! the gradient of w is no
longer a product; two programs in three have none of these.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

B = 3


def table(text):
    """{kind: [template, ...]} of lines "kind: template | template", a longer one indented from its second line on."""
    lines = (line.split(": ", 1) for line in re.sub(r"\n +", " ", text).strip().splitlines())
    return {kind: templates.split(" | ") for kind, templates in lines}


# --- (a) a weight from a weight, before its use. A number after the slash is the rank that the template takes.
TRANSFORMS = table("""
transpose: {w}.transpose({perm(len(s))}) | {w}.T | jnp.moveaxis({w}, 0, -1)
reshape: {w}.reshape({factored(n)}) | {w}.ravel() | {w}.reshape({s[::-1]})
expand: jnp.expand_dims({w}, {axis}) | lax.squeeze(jnp.expand_dims({w}, {axis}) * 2.0, ({axis},))
slice: {w}[{slices(s)}] | {w}[{slices(s)}] | {w}[{int(0, s[0])}] | jnp.split({w}, [1], {axis})[0]
reverse: jnp.flip({w}, {axis}) | jnp.roll({w}, {int(1, 4)}, {axis})
dynamic_slice: lax.dynamic_slice_in_dim({w}, {ids(1)}[0], {int(1, s[axis] + 1)}, {axis}) |
    lax.dynamic_slice_in_dim({w}, jnp.int32(1), {int(1, s[axis] + 1)}, {axis}) |
    lax.dynamic_update_index_in_dim({w}, {given(s[1:])}, {ids(1)}[0], 0) ! |
    lax.dynamic_update_index_in_dim({w}, {like(s[1:])}, {ids(1)}[0], 0) !
at: {w}.at[{int(0, s[0])}].set({like(s[1:])}) ! | {w}.at[{int(0, s[0])}].add({like(s[1:])}) |
    {w}.at[{ids(2)}].add({like((2, *s[1:]))}) | {w}.at[..., :1].multiply({number}) !
pad: lax.pad({w}, jnp.float64(0.5), {widths(s)})
concatenate: jnp.concatenate([{w}, {w}], {axis}) | jnp.concatenate([{like(s)}, {w}], {axis}) |
    jnp.concatenate([{w}, {const(*s)}, {like(s)}], {axis}) | jnp.concatenate([{given(s)}, {w}], {axis}) |
    jnp.split(jnp.concatenate([{w}, {like(s)}], {axis}), 2, {axis})[1] |
    jnp.stack([{w}, {like(s)}], {int(0, len(s) + 1)}) | jnp.stack([{w}, 0.5 * {w}], {int(0, len(s) + 1)})
tile: jnp.broadcast_to({w}[None], {(2, *s)}) | jnp.repeat({w}, 2, {axis}) |
    jnp.tile({w}, {(1,) * (len(s) - 1) + (2,)}) | jnp.broadcast_to({w}[..., None], {(*s, 3)})
cast: f64(f32({w})) | f64(f32({w}).T) | f64(jnp.tanh(f32({w}))) ! | f64(f32({w}) * np.float32(2)) |
    f64(f32({w} * {given(s)})) !
scale: -{w} | {w} * {number} | {number} - {w} / 3 | {scalar()} * {w} | jnp.broadcast_to({scalar()}, {s}) * {w} |
    {given(())} * {w} | {w} * {const(*along)} | {w} * {const(*s)} ! | {w} * f64({const(*s)} > 0) ! |
    {w} * {given(s)} ! | {w} * {given(along)} | {w} * {like(along)} | {w} / (2 + {like(s)} ** 2) ! | {w} * {like(s)} !
where: jnp.where({const(*s)} > 0, {w}, 0.0) ! | jnp.where({const(*s)} > 0, 0.3, {w}) ! |
    jnp.where({const(*s)} > 0, {w}, {like(s)}) ! | jnp.where({flag()}, {w}, 0.0) |
    jnp.where({flag()}, {w}, {like(s)}) | jnp.where({given(s)} > 0, {w}, {like(s)}) ! |
    jnp.where({given(along)} > 0, {w}, 0.0) | jnp.where({w} > 0, {w}, 0.1 * {w}) ! |
    lax.select_n({ids(1)}[0] % 3, {w}, {like(s)}, -{w})
matrix/2: {w} @ {like((s[1], m))} / {s[1]} ** 0.5 | {w}.T @ {w} / {s[0]} ** 0.5 |
    {const(m, s[0])} @ {w} / {s[0]} ** 0.5 | {const(s[0], s[0])} @ {w} @ {given((s[1], m))} / {n} ** 0.5 |
    {w} + {like((s[0], 1))} @ {like((1, s[1]))} |
    (lambda q: (q + q.T) / 2)({square}) |
    jnp.einsum('ij,kj->kij', {w}, {like((2, s[1]))}) ! | jnp.kron({const(1, 2)}, {w}) | jnp.kron({w}, {like((2, 1))}) |
    jnp.tril({w}) + jnp.triu({like(s)}, 1) ! | jnp.tril({w}) !
add: {w} + {like(s)} | {w} - 0.5 * {given(s)} | {w} - 0.5 * lax.stop_gradient({like(s)}) |
    jnp.maximum({w}, {like(s)}) ! | ({w} + jnp.flip({w})) / 2
curve: jnp.tanh({w}) ! | jnp.exp({w} / 2) ! | jax.nn.softmax({w}, {axis}) ! |
    jnp.cumsum({w}, {axis}) / {s[axis]} ** 0.5 ! | jnp.sort({w}, {axis}) ! |
    {w} / jnp.sqrt(({w} * {w}).sum({axis}, keepdims=True) + 0.1) ! | {w} - {w}.mean({axis}, keepdims=True) ! |
    lax.optimization_barrier({w}) | {w} ** 2 ! | {w}.max({axis}) ! | {w}.sum({axis}) / {s[axis]} ** 0.5 ! |
    jnp.clip({w}, -1, 1) !
gather: jnp.take({w}, np.array({perm(s[axis])}), {axis}) |
    jnp.take({w}, np.array({perm(s[axis])[:2]}), {axis}, mode='clip') |
    jnp.take({w}, {ids(3)}, {axis}, mode='wrap') ! | jnp.take({w}, {ids(3)}, {axis}, mode='fill', fill_value=0.0) |
    {w}[np.array({perm(s[0])})] | jnp.take_along_axis({w}, np.argsort({const(*s)}, {axis}), {axis})
maps: {w} * ({like(along)} / jnp.sqrt(({w} ** 2).sum({axis}, keepdims=True) + 0.1)) |
    {w} / (1 + jnp.abs({w}).max()) | {w} / jnp.sqrt(({w} * {const(*s)}).sum() ** 2 + 1) |
    ({w} - {w}.mean()) / ({w}.std() + 0.5) | {w} * jax.nn.sigmoid({like(s)}) | jnp.where({w} > 0, {w}, 0.1 * {w}) |
    {w} + lax.stop_gradient(jnp.round({w} * 4) / 4 - {w}) | jnp.fft.fft({w}, axis={axis}).imag / {s[axis]} ** 0.5 |
    lax.cumsum({w}, {axis}, reverse=True) / {s[axis]} ** 0.5 | jnp.linalg.norm({w}) * {const(*s)} / {n} ** 0.5 |
    lax.fori_loop(0, 2, lambda i, w: jnp.tanh(w), {w}) | lax.cond({const()} > 0, jnp.tanh, jnp.sin, {w}) |
    lax.scan(lambda c, _: ((1.1 * jnp.sin(c[0]), c[1] + 1), c[0].sum()), ({w}, 0), None, length=2)[0][0] |
    lax.switch(({const()} > 0).astype(int), [lambda w: lax.fori_loop(0, 2, lambda i, w: w * jnp.sin(w), w), jnp.tanh],
    {w})
powers/2: (lambda q: lax.scan(lambda u, _: (jnp.tanh(u @ q) / {max(s)} ** 0.5, None), q, None, length=3)[0])({square})
identity: jax.device_put({w}, jax.devices()[0]) | lax.optimization_barrier(({w}, {like(s)}))[0] |
    lax.reduce_precision({w}, 11, 52) | identity({w})
full: {w} + jnp.full({s}, 0.5) | {w} * jnp.full({s}, 2) | jnp.where(jnp.full({s}, True), {w}, 1.0) |
    {w} ** np.int32(2) | {w} + jnp.zeros({s}) | 1.5 - {w} * np.float64(0.5)
inside: jax.jit({t})({w}) | jax.jit(jax.jit({t}))({w}) | (lambda t: t({w}) + t({like(s)}))(jax.jit({t})) |
    (lambda t: t({w}) * t({given(s)}))(jax.jit({t})) ! | jax.checkpoint({t})({w}) |
    lax.cond({flag()}, {t}, lambda w: {t}(2 * w), {w}) | lax.cond({flag()}, lambda: {w}, lambda: 0.5 * {like(s)}) |
    jax.vmap({t})(jnp.stack([{w}, {like(s)}])) | jax.vmap({t}, -1, -1)(jnp.stack([{w}, {like(s)}], -1)) |
    lax.map({t}, jnp.stack([{w}, {like(s)}])) ! | lax.scan(lambda w, _: (w * 0.5, {t}(w)), {w}, length=3)[1] ! |
    lax.scan(lambda w, x: (w, w * x), {w}, {given((3,))})[1] |
    lax.fori_loop(0, 2, lambda i, w: w - 0.1 * {like(s)}, {w}) !
""")

# --- (b) where a weight meets the example
USES = table("""
matmul/2: {given((s[0],))} @ {w} / {s[0]} ** 0.5 | {given((T, s[0]))} @ {w} / {s[0]} ** 0.5 |
    {given((2, m, s[0]))} @ {w} / {s[0]} ** 0.5 | {w} @ {given((s[1],))} / {s[1]} ** 0.5 |
    {w} @ {given((s[1], T))} / {s[1]} ** 0.5 |
    jnp.dot(f32({w}), f32({given((s[1],))}), preferred_element_type=jnp.float64)
einsum: jnp.einsum({einsum(w, s)})
bilinear/2: {given(s[:1])} @ {w} @ {given(s[1:])} / {n} ** 0.5 | {like(s[:1])} @ {w} @ {given(s[1:])} / {n} ** 0.5 |
    {given((m, s[0]))} @ {w} @ {given((s[1], m))} / {n} ** 0.5
outer/1: {given((T, 1))} * {w}[None] | jnp.outer({w}, {given((T,))})
lookup: {w}[{ids(T)}] | {w}[{ids(T)}.astype(jnp.uint32)] | {w}[{ids(T)}.astype(jnp.int64)] |
    {w}.at[{ids(T)}].get(mode='fill', fill_value=0.0) |
    jnp.take({w}, {ids(T)}, {axis}, mode='clip') | jnp.tensordot(jax.nn.one_hot({ids(T)}, {s[0]}), {w}, 1) |
    jnp.zeros({(3, *s[1:])}).at[{ids(s[0])}].add({w}) ! |
    jnp.zeros({(3, *s[1:])}).at[{ids(T)} % 3].add({w}[{ids(T)}] * {given((T, *s[1:]))}) |
    {w}[{ids(T)}] * jnp.expand_dims({given((T,))}, {(*range(1, len(s)),)})
lookup/2: {w}[{ids(T)}, {ids(T)}] | {w}[{ids(T)}[:, None], {ids(2)}[None]] | {w}[:, {ids(T)}] |
    {w}[{ids(T)}[:, None], :1]
tied/2: jax.nn.log_softmax(jnp.tanh({w}[{ids(m)}] + {given((m, s[1]))}) @ {w}.T) |
    jnp.tanh({w}.at[{ids(m)}].get(mode='clip') * {given((1, s[1]))}) @ {w}.T / {s[1]} ** 0.5 |
    jnp.tanh({given((m, s[0]))} @ {w} / {s[0]} ** 0.5) @ {w}.T / {s[1]} ** 0.5
conv_1d/3: lax.conv_general_dilated({conv(w, s)})
conv_2d/4: lax.conv_general_dilated({conv(w, s)})
elementwise: {w} * {given(s)} ! | ({w} * {given(along)}).sum({axis}) / {s[axis]} ** 0.5 | {w} * {given(())} ! |
    {w} + {given(along)} ! | {given((2, *s))} * {w}[None] ! | ({given((T, *s))} * {w}[None]).sum({axis}) ! |
    jnp.maximum({w}, {given(s)}) !
complex/2: jnp.abs(lax.complex({w}, {like(s)}) @ cis({given((s[1], T))})) / {s[1]} ** 0.5 |
    (cis({given((T, s[0]))}) @ lax.complex({like(s)}, {w})).real / {s[0]} ** 0.5 |
    jnp.fft.irfft(jnp.fft.rfft({given((4, s[0]))}, axis=0) @ lax.complex({w}, {like(s)}), n=4, axis=0) / {s[0]} ** 0.5
recurrence/2: recurrence(jax.nn.sigmoid({like(s[1:])}), {given((T, s[0]))} @ {w} / {s[0]} ** 0.5)
masked/2: jax.nn.softmax({given((T, s[0]))} @ {w} @ {given((s[1], T))} / {n} ** 0.5 +
    jnp.triu(jnp.full(({T}, {T}), -1e9), 1))
penalty: 0.1 * ({w} ** 2).sum() / {n} ** 0.5 | {given(())} * jnp.abs({w}).sum() / {n} |
    jnp.sqrt(({w} * {like(s)}).sum() ** 2 + 1) | jnp.where({flag()}, ({w} ** 2).mean(), 0.0)
scalar/0: {w} * {given((T,))} | {w} + {given((T,))}
attention/2: (lambda x: jax.nn.softmax((x @ {w}) @ (x @ {like(s)}).T / {n} ** 0.5, 1) @ x)({given((T, s[0]))}) |
    (lambda q: jax.nn.softmax(q @ q.T / {s[1]} ** 0.5, 1) @ q)({given((T, s[0]))} @ {w} / {s[0]} ** 0.5) |
    jax.nn.softmax({given((T, s[1]))} @ {w}.T, 1) @ {w}
norm/1: jax.nn.standardize({given((T, *s))}, axis=1, epsilon=0.1) * (1 + {w})[None] + {like(s)}[None] |
    jax.nn.standardize({given((T, *s))}, axis=0, epsilon=0.1) * {w}[None]
""")

# --- (c) control structure around a program f(w, x) -> [k]; x, y and h are [k], xs is [T, k], v another weight
CONTROLS = table("""
jit: jax.jit({f})({w}, {x}) | jax.jit(lambda x: {f}({w}, x))({x}) |
    (lambda f: f({w}, {x}) + f({w}, {y}))(jax.jit({f})) | (lambda f: f({w}, {x}) * f({v}, {x}))(jax.jit({f})) |
    (lambda f: f({w}, {x}) + f(jnp.sin({w}), {x} / 2))(jax.jit({f})) ! |
    (lambda f: f({w}, f({v}, f({w}, {x}))))(jax.jit({f})) | jax.jit(lambda w, x: jax.jit({f})(2 * w, x))({w}, {x}) |
    (lambda u, y: {f}(u, y))(*jax.jit(lambda w, x: (0.5 * w, {f}(w, x)))({w}, {x}))
checkpoint: jax.checkpoint({f})({w}, {x}) |
    jax.checkpoint(lambda x: {f}({w}, x), policy=jax.checkpoint_policies.dots_saveable)({x}) |
    jax.checkpoint(jax.jit({f}))({w}, {x}) + {f}({w}, {y})
custom: custom_jvp({closed})({w}, {x}) | custom_vjp({closed})({w}, {x}) | product({w}.ravel(), {given((n,))}) !
scan: scan(lambda h, x: 2 * ({f}({w}, h + x),), {h}, {xs}, {options}) |
    scan(lambda h, x: ({f}({w}, h) + {f}({v}, x), None), {h}, {xs}, {options}) |
    scan(lambda h, x: ({f}({w} * {v}, h + x), h), {h}, {xs}, {options}) ! |
    scan(lambda h, x: ({f}({w} * x[0], h), x), {h}, {xs}, {options}) |
    scan(lambda c, x: ((c[0], {f}(c[0], c[1] + x)), c[1]), ({w}, {h}), {xs}, {options}) |
    scan(lambda c, x: (({v}, {f}(c[0], c[1] + x)), c[1]), ({w}, {h}), {xs}, {options}) ! |
    scan(lambda c, x: (({carried}, {f}(c[0], c[1] + x)), c[1]), ({w}, {h}), {xs}, {options}) ! |
    scan(lambda c, x: ((c[1], c[0], {f}(c[0], c[2] + x)), c[2]), ({w}, {v}, {h}), {xs}, {options}) ! |
    scan(lambda c, x: (learnt({f}, *c, x), c[1]), ({w}, {h}), {xs}, {options}) ! |
    scan(lambda h, x: (lax.cond(x[0] > 0, lambda: {f}({w}, h + x), lambda: h), h), {h}, {xs}, {options}) |
    scan(lambda h, x: (jax.checkpoint({f})({w}, h + x), h), {h}, {xs}, {options}) |
    scan(lambda h, x: (scan(lambda h, y: ({f}({w}, h * y), y), h, {xs}[:2] + x[None]), h), {h}, {xs}) |
    scan(lambda h, ux: ({f}(ux[0], h + ux[1]), h), {h}, (jnp.stack([{w}, {v}, -{w}]), {given((3, k))}), {options}) |
    scan(lambda h, i: ({f}(jnp.stack([{w}, {v}])[i], h), h), {h}, {ids(3)}, {options})
layers: scan(lambda h, w: ({part}(w, h), h), {h}, jnp.moveaxis({w}, {axis}, 0), {options}) |
    scan(lambda h, w: ({part}(jnp.tanh(w), h), h), {h}, jnp.moveaxis({w}, {axis}, 0), {options}) |
    scan(lambda h, w: ({part}(w / jnp.sqrt((w * w).sum() + 1), h), h), {h}, jnp.moveaxis({w}, {axis}, 0), {options}) |
    lax.fori_loop(0, {s[axis]}, lambda i, h: {part}(lax.dynamic_index_in_dim({w}, i, {axis}, False), h), {h}) ! |
    jax.vmap({part}, ({axis}, None), {int(0, 2)})({w}, {x}) |
    jax.vmap({part}, ({axis}, 1), {int(0, 2)})({w}, {given((k, s[axis]))})
positions: jax.vmap({f}, (None, 0), {int(0, 2)})({w}, {xs}) |
    jax.vmap({f}, (None, 0))({w}, {xs}) + jax.vmap(lambda x: {f}({v}, x))({xs}) |
    lax.map(lambda x: {f}({w}, x), {xs}) | lax.map(lambda x: {f}({w}, x), {xs}, batch_size=2) |
    jax.vmap(lambda x: lax.cond(x[0] > 0, lambda: {f}({w}, x), lambda: x))({xs})
branches: lax.cond({flag()}, {f}, {g}, {w}, {x}) | lax.cond({flag()}, lambda: {f}({w}, {x}), lambda: {const(k)}) |
    lax.cond({flag()}, lambda: {f}({w}, {x}), lambda: {f}({v}, {x})) |
    {f}(lax.cond({flag()}, lambda w, v: w, lambda w, v: v, {w}, {v}), {x}) |
    lax.switch({ids(1)}[0] % 3, [{f}, {g}, lambda w, x: {f}(w, x) + {g}(w, x)], {w}, {x}) |
    jax.jit(lambda w, x: lax.cond(x[0] > 0, {f}, {g}, w, x))({w}, {x})
effects: seen({f}, {w}, {x}) | jax.jit(lambda w, x: seen({f}, w, x))({w}, {x}) |
    scan(lambda h, x: (seen({f}, {w}, h + x), None), {h}, {xs}, {options}) |
    jax.checkpoint({f})(seen(lambda w, x: w, {w}, {x}), {x})
numbers: scan(lambda h, x: ({f}({w}, h + x), None), jnp.full({k}, 0.5), {xs}, {options}) |
    {f}({w}, {x}) * lax.cond({flag()}, lambda: 0.5, lambda: {x}[0]) | {f}({w}, jnp.full({k}, 0.3).at[0].set({x}[0])) |
    {f}({w}, {x}) + lax.switch({ids(1)}[0] % 3, [lambda: 1.0, lambda: 0.0, lambda: {x}[0] ** 2])
loops: lax.fori_loop(0, 3, lambda i, h: {f}({w}, h), {h}) |
    lax.fori_loop(0, 3, lambda i, c: (c[0], {f}(*c)), ({w}, {h}))[1] |
    {f}({w}, {x}) * lax.while_loop(lambda c: abs(c) > 0.5, lambda c: c / 2, lax.stop_gradient({x}[0]))
derivative: sum(jax.jvp(lambda x: {f}({w}, x), ({x},), ({y},))) | sum(jax.jvp(lambda w: {f}(w, {x}), ({w},), ({v},))) |
    jax.grad(lambda x: jnp.sin({f}({w}, x)).sum())({x}) | jax.grad(lambda w: jnp.sin({f}(w, {x})).sum())({w}) ! |
    learnt({f}, {w}, {x}, {y})[1] + {f}(learnt({f}, {w}, {x}, {y})[0], {y}) ! | jax.jacfwd({f}, 1)({w}, {x})
""")

LAST = table("""
curve: jnp.tanh({v}) | jnp.sin({v}) | jax.nn.softplus({v}) | jax.nn.relu({v}) | jax.nn.gelu({v})
scalar: ({const(*s)} * {v}).sum() / {n} ** 0.5 | ({v} * {v}).mean() | jax.nn.logsumexp({v}) |
    jnp.tanh(({const(*s)} * {v}).sum() / {n} ** 0.5) | jnp.sqrt((({v} + {const(*s)}) ** 2).sum())
""")


# --- what the templates call


def custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


def custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda w, x: jax.vjp(f, w, x), lambda pull, d: pull(d))
    return g


product = jax.custom_vjp(lambda w, x: w * x)
product.defvjp(lambda w, x: (w * x, (w, x)), lambda saved, d: (d * saved[1], d * saved[0]))


identity = jax.custom_vjp(lambda w: w)
identity.defvjp(lambda w: (w, None), lambda _, d: (0.5 * d,))


def seen(f, w, x):
    """f(w, x), with an effect."""
    jax.debug.callback(lambda _: None, x)
    return f(w, x)


def recurrence(decay, u):
    """h_t = decay h_{t-1} + u_t, for all t."""
    combine = lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1])  # noqa: E731, E741
    return lax.associative_scan(combine, (jnp.broadcast_to(decay, u.shape), u))[1]


def scan(step, start, xs, **options):
    """The [k] of the last carry, plus the mean of the stacked results."""
    last, ys = lax.scan(step, start, xs, **options)
    last = last[-1] if isinstance(last, tuple) else last
    return last if ys is None else last + ys.mean(0)


def learnt(f, w, h, x):
    """A step of gradient descent inside the loss."""
    return w - 0.1 * jax.grad(lambda w: jnp.sin(f(w, x)).sum())(w), f(w, h)


GLOBALS = {"jax": jax, "jnp": jnp, "np": np, "lax": lax, "product": product, "scan": scan, "learnt": learnt}
GLOBALS |= {"identity": identity, "seen": seen, "recurrence": recurrence}
GLOBALS |= {"cis": lambda x: lax.complex(jnp.cos(x), jnp.sin(x))}
GLOBALS |= {"normal": lambda seed, *shape: np.random.default_rng(seed).normal(size=shape)}
GLOBALS |= {"f32": lambda v: v.astype(np.float32), "f64": lambda v: v.astype(np.float64)}
GLOBALS |= {"custom_jvp": custom_jvp, "custom_vjp": custom_vjp}


# --- the generator


class Program(NamedTuple):
    loss: Callable  # loss(params, *example)
    params: dict
    batch: tuple
    text: str  # the source of these three
    rtol: float
    kinds: Counter  # how often each kind of step was drawn


FEW = 1000  # how often a small array is repeated one operand at a time


def program(seed: int) -> Program:
    b = Builder(np.random.default_rng(seed))
    a, c, T = b.side(), b.side(), b.dim()
    shapes = {"W": (a, c), "V": (a, c), "U": (c, b.side()), "E": (b.side(), c), "R": (b.int(2, 4), a, c), "g": (c,)}
    shapes |= {"K": (b.int(1, 4), b.side(), 2, b.side()), "J": (b.side(), b.int(1, 4), b.side()), "r": ()}
    chosen = {b.pick(["W", "U", "E", "R", "K", "J"]), *b.perm(list(shapes))[: b.int(0, 3)]}
    batch = {"x": b.const(B, c), "z": b.const(B, T, c), "image": b.const(B, b.int(3, 7), 5, 2), "q": b.const(B)}
    batch |= {"ids": f"np.random.default_rng({seed}).integers(-2, 9, ({B}, {T}), np.int32)"}
    batch |= {"flag": f"np.array([True, False, {b.coin()}])"}
    for n in shapes:
        if n in chosen:
            b.parameter(n, shapes[n])
    for n, code in batch.items():
        v = eval(code, GLOBALS)
        b.declare(n, v.shape[1:], "data" if v.dtype == float else None, v.dtype)
    b.used |= set(batch)
    b.steps(b.int(2, 7))
    b.lines.append(f"return {b.close(None)}")
    narrow = b.coin(0.08)
    params = {n: f"f32({b.const(*s)})" if narrow else f"np.asarray({b.const(*s)})" for n, s in b.params.items()}
    given = [f"{n} = dict({', '.join(map('='.join, d.items()))})" for n, d in (("params", params), ("batch", batch))]
    text = "\n".join([f"# program({seed})", *given, f"def loss(params, {', '.join(batch)}):", *indented(b.lines)])
    names = dict(GLOBALS)
    exec(text, names)
    rtol = 1e-4 if "f32(" in text else 1e-10
    return Program(names["loss"], names["params"], tuple(names["batch"].values()), text, rtol, b.kinds)


SIDE = 200
"""The longest side of a square matrix, whose products with itself would take minutes."""


def corner(s):
    """The index of a matrix's corner if the matrix is larger than a square may be."""
    return "" if max(s) <= SIDE else f"[{', '.join(f':{min(n, SIDE)}' for n in s)}]"


class Names(dict):
    """The names in a template; each is drawn on its first use and then stays the same."""

    def __missing__(self, name):
        b, s = self["b"], self.get("s")
        draw = {
            "n": lambda: prod(s),
            "m": lambda: b.int(1, 6),
            "k": lambda: b.int(2, 7),
            "T": lambda: b.dim(),
            "axis": lambda: b.int(0, len(s)),
            "along": lambda: tuple(n if i == self["axis"] else 1 for i, n in enumerate(s)),
            "v": lambda: b.like(s),
            "square": lambda: f"jnp.pad({self['w']}{corner(s)}, {[(0, min(max(s), SIDE) - min(n, SIDE)) for n in s]})",
            "xs": lambda: b.given((self["T"], self["k"])),
            "t": lambda: b.inner(None, w=s),
            "closed": lambda: b.inner((self["k"],), closed=True, w=s, x=(self["k"],)),
            "part": lambda: b.inner((self["k"],), w=s[: self["axis"]] + s[self["axis"] + 1 :], x=(self["k"],)),
            "options": lambda: f"reverse={b.coin()}, unroll={b.pick([1, 1, 2])}",
            "carried": lambda: b.pick(["0.9 * c[0]", "jnp.sin(c[0]) * x[0]", "jnp.flip(c[0])", "c[0] + 1"]),
            "number": lambda: round(b.rng.normal() + 0.1, 3),
        }
        draw |= dict.fromkeys("xyh", lambda: b.given((self["k"],)))
        draw |= dict.fromkeys("fg", lambda: b.inner((self["k"],), w=s, x=(self["k"],)))
        if name not in draw and not hasattr(b, name):
            raise KeyError(name)
        self[name] = draw[name]() if name in draw else getattr(b, name)
        return self[name]


class Builder:
    """The lines of one function."""

    def __init__(self, rng, outer=None):
        self.rng, self.gentle = rng, outer.gentle if outer else rng.random() < 2 / 3
        self.depth, self.kinds = (outer.depth + 1, outer.kinds) if outer else (0, Counter())
        self.numbers, self.params = (outer.numbers, outer.params) if outer else (itertools.count(), {})
        self.shapes, self.weights, self.data, self.lines, self.functions, self.used = {}, [], [], [], {}, set()
        self.closed, self.forward = False, outer is not None and outer.forward

    def int(self, low, high):
        return int(self.rng.integers(low, high))

    def coin(self, p=0.5):
        return bool(self.rng.random() < p)

    def pick(self, options):
        return options[self.int(0, len(options))]

    def dim(self):
        return self.int(1, 4) if self.coin(0.8) else self.int(4, 15)

    def side(self):
        return self.int(24, 49) if self.coin(0.85) else self.int(2, 9)

    def perm(self, items):
        return self.rng.permutation(items).tolist()

    def shape(self, name):
        return self.shapes[name].shape

    def declare(self, name, shape, pool, dtype=np.float64):
        self.shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
        if pool:
            getattr(self, pool).append(name)

    # --- lines

    def parameter(self, name, shape):
        self.params[name] = shape
        self.lines.append(f"{name} = f64(params['{name}'])  # {list(shape)}")
        self.declare(name, shape, "weights")
        return name

    def line(self, kind, template, pool=None, like=None, **names):
        """A new value, from the filled-in template. like: its shape, if that is known."""
        before, self.forward = self.forward, self.forward or kind in ("derivative", "custom")
        code = eval(f'f"""{template}"""', {}, Names(b=self, **names))
        self.forward = before
        name = f"{'w' if pool == 'weights' else 'v'}{next(self.numbers)}"
        words = set(re.findall(r"\w+", code))
        source = "\n".join([*(text for f, text in self.functions.items() if f in words), f"{name} = {code}"])

        def value(env):
            names = GLOBALS | env | {"params": {n: jnp.zeros(s) for n, s in self.params.items()}}
            exec(source, names)
            return names[name]

        out = jax.eval_shape(value, self.shapes) if like is None else jax.ShapeDtypeStruct(like, np.float64)
        self.used |= set(re.findall(r"\w+", source)) & set(self.shapes)
        self.lines.append(f"{name} = {code}  # {list(out.shape)}")
        self.declare(name, out.shape, pool, out.dtype)
        self.kinds[kind] += 1
        return name

    def inner(self, out, closed=False, **arguments):
        """The name of a new function: (weight, value) → shape `out`; if `out` is None, weight → weight."""
        b = Builder(self.rng, self)
        b.closed = closed or self.closed
        names = {n: f"{n}{next(self.numbers)}" for n in arguments}
        for n, shape in arguments.items():
            b.declare(names[n], shape, "weights" if n == "w" else "data")
        b.used |= {n for n in names.values() if n[0] == "x"}
        if out is None or (not closed and self.coin(0.3)):  # it may close over outer variables
            for n, v in self.shapes.items():
                pool = "data" if n in self.data else "weights" if n in self.weights and out is not None else None
                b.declare(n, v.shape, pool, v.dtype)
            b.used |= set(self.shapes)
        if out is None:
            end = b.step(TRANSFORMS, names["w"])
            end = b.step(TRANSFORMS, end) if self.coin() else end
        else:
            b.steps(self.int(1, 3))
            end = f"jnp.sin({b.close(out)})"  # bounded, because it may become a carry
        f = f"fun{next(self.numbers)}"
        lines = [f"def {f}({', '.join(names.values())}):", *indented([*b.lines, f"return {end}"])]
        self.functions[f] = "\n".join(lines)
        self.lines += lines
        return f

    def steps(self, n):
        for _ in range(n):
            self.step(self.pick([TRANSFORMS, TRANSFORMS, USES, CONTROLS if self.depth < 2 else USES]))

    def step(self, family, w=None):
        ranks = {len(self.shape(v)) for v in ([w] if w else self.weights)}
        allowed = {k: v for k, v in family.items() if k != "scalar/0" and not (k == "custom" and self.forward)}
        if self.depth:  # a checkpoint's policy rounds what it saves, which JAX cannot do to complex numbers
            allowed.pop("complex/2", None)
        if self.gentle:
            fitting = {k: [v for v in vs if not v.endswith(" !")] for k, vs in allowed.items()}
            allowed = {k: v for k, v in fitting.items() if v and ("/" not in k or int(k[-1]) in ranks)}
        kind = self.pick(list(allowed))
        rank = int(kind[-1]) if "/" in kind else None
        w = w or self.weight(rank)
        s = self.shape(w)
        if family is USES and not s:
            kind = "scalar/0"
        elif not s or rank not in (None, len(s)):
            rank = rank or 1
            w = self.line("fit", f"{w}.reshape{(*s[: rank - 1], *[1] * (rank - 1 - len(s)), -1)}", "weights")
        pool = "weights" if family is TRANSFORMS else None
        name = self.line(
            kind, self.pick(allowed.get(kind, family[kind])).removesuffix(" !"), pool, w=w, s=self.shape(w)
        )
        if pool:
            return name
        if self.coin(0.3):
            self.data.append(name)
            return name
        return self.line("nonlinear", self.pick(LAST["curve"]), "data", self.shape(name), v=name)

    def close(self, shape):
        """Use every unused weight, then add up all unused values in one of this shape (None: a scalar)."""
        while unused := [w for w in self.weights if w not in self.used]:
            self.step(USES, unused[0])
        ends = [v for v in self.data if v not in self.used] or self.data[-1:]
        if shape is not None:
            return " + ".join([self.fit(v, shape) for v in ends])
        return " + ".join([self.line("end", self.pick(LAST["scalar"]), None, (), v=v, s=self.shape(v)) for v in ends])

    # --- arguments

    def weight(self, rank=None):
        """A small weight, more often an unused one; of this rank if there is one."""
        small = [w for w in self.weights if prod(self.shape(w)) <= 1200 and self.shape(w)] or self.weights
        fitting = [w for w in small if rank in (None, len(self.shape(w)))] or small
        unused = [w for w in fitting if w not in self.used]
        return self.pick(unused if unused and self.coin(0.7) else fitting)

    def like(self, shape):
        """A weight of this shape: an existing one, a new parameter, or a piece of another weight."""
        same = [w for w in self.weights if self.shape(w) == shape]
        if same and self.coin(0.8):
            return self.pick(same)
        if self.coin(0.6) and len(self.params) < 6 and not self.closed:
            return self.parameter(f"P{len(self.params)}", shape)
        return self.fit(self.weight(), shape, "weights")

    def given(self, shape):
        """A value of this shape that depends on the example."""
        same = [v for v in self.data if self.shape(v) == shape]
        return self.pick(same) if same and self.coin(0.7) else self.fit(self.pick(self.data), shape)

    def fit(self, name, shape, pool=None):
        s, n, have = self.shape(name), prod(shape), prod(self.shape(name))
        if s == shape:
            return name
        if pool and self.coin(0.8):  # pad or crop each axis; otherwise ravel, repeat and cut, below
            k = len(shape) - len(s)
            kept = (*[1] * k, *s) if k > 0 else s[-k:]
            edges = [(0, size - old, 0) for size, old in zip(shape, kept, strict=True)]
            return self.line(
                "fit", f"lax.pad({name}[{', '.join(['None'] * k + ['0'] * -k) or '...'}], 0.0, {edges})", pool, shape
            )
        times = -(-n // have)
        repeated = f"jnp.concatenate([{name}.ravel()] * {times})"
        if times > FEW:  # XLA overflows its stack on tens of thousands of operands
            repeated = f"jnp.tile({name}.ravel(), {times})"
        code = f"{name}.ravel()" if n <= have else repeated
        code = f"{code}[:{n}]" if n != have else code
        if pool is None and n * have < 3000 and n != have and self.coin(0.7 if n < have else 0.2):
            code = f"({self.const(n, have)} @ {name}.ravel() / {have} ** 0.5)"
        return self.line("fit", f"{code}.reshape{shape}", pool, shape)

    def scalar(self):
        return self.pick([w for w in self.weights if not self.shape(w)] or [self.given(())])

    def ids(self, n):
        if "ids" in self.shapes and self.coin(0.8):
            return self.line("ids", f"jnp.resize(ids, {n})")
        return self.line("ids", f"jnp.floor(2 * {self.given((n,))}).astype(jnp.int32)")

    def flag(self):
        return "flag" if "flag" in self.shapes and self.coin() else f"({self.given(())} > 0.1)"

    def const(self, *shape):
        return f"normal({', '.join(map(str, (self.int(0, 10**6), *shape)))})"

    def divisor(self, n):
        return self.pick([k for k in range(1, n + 1) if n % k == 0])

    def factored(self, n):
        k = self.divisor(n)
        return self.pick([(k, n // k), (n // k, 1, k)])

    def slices(self, s):
        start = [(self.int(0, (n + 1) // 2), n) for n in s]
        return ", ".join(f"{a}:{self.pick([n, n, max(n - 1, a + 1)])}:{self.pick([1, 1, 2])}" for a, n in start)

    def widths(self, s):
        return [(self.int(-1 if n > 2 else 0, 3), self.int(0, 2), self.int(0, 2)) for n in s]

    def einsum(self, w, s):
        own, more = "ijklmno"[: len(s)], "".join(self.perm(list("abc"))[: self.int(0, 3)])
        sizes = dict(zip(own, s, strict=True)) | {n: self.int(1, 4) for n in more}
        shared = [n for n in own if self.coin(0.6)] or [own[0]]
        x = "".join(self.perm([*shared, *more]))
        out = [n for n in self.perm(list(own + more)) if self.coin(0.3 if n in shared else 0.8)]
        k, v = prod(n for i, n in sizes.items() if i not in out), self.given(tuple(sizes[n] for n in x))
        pairs = self.pick([[(own, w), (x, v)], [(x, v), (own, w)]])
        return f"'{pairs[0][0]},{pairs[1][0]}->{''.join(out)}', {pairs[0][1]}, {pairs[1][1]}) / ({k} ** 0.5"

    def conv(self, w, s):
        axes = "HW"[: len(s) - 2]
        spec = ["".join(self.perm(list(n + axes))) for n in ("NC", "OI", "NC")]
        kernel = self.coin(0.7)  # or the weight is the image
        if self.coin(0.9):  # a small window, as is usual
            letters = axes + "".join(self.perm(list("OI" if kernel else "NC")))
            spec[kernel] = "".join(letters[k] for k in np.argsort(np.argsort(s)))
        size, axes = dict(zip(spec[kernel], s, strict=True)), [n for n in spec[1] if n in axes]
        groups, examples = (self.divisor(size[n]) for n in ("OO" if kernel else "CN"))
        groups, examples = self.pick([(1, 1), (groups, 1), (1, examples)])
        stride, base, dilation = ([self.pick([1, 1, 2]) for _ in axes] for _ in range(3))
        pads = [(self.int(0, 3), self.pick([0, 1, -1])) for _ in axes]
        if kernel:
            other = {n: (size[n] - 1) * d + self.int(2, 4) for n, d in zip(axes, dilation, strict=True)}
            other |= {"N": examples * self.int(1, 3), "C": size["I"] * groups}
        else:
            other = {n: self.int(1, max(2, (size[n] + 1) // 2)) for n in axes}
            other |= {"O": examples * groups * self.int(1, 4), "I": size["C"] // groups}
            pads = [(a, abs(b)) for a, b in pads]
        x = self.given(tuple(other[n] for n in spec[not kernel]))
        options = f"{stride}, {pads}, lhs_dilation={base}, rhs_dilation={dilation}, dimension_numbers={tuple(spec)}"
        options += f", feature_group_count={groups}, batch_group_count={examples}"
        scale = (size["I"] if kernel else other["I"]) ** 0.5
        return f"{x}, {w} / {scale}, {options}" if kernel else f"{w}, {x} / {scale}, {options}"


def indented(lines):
    return [f"    {line}" for line in lines]
