"""The exercise in 60-digit arithmetic, and errors in ulps: the reference of the accuracy tests."""

import ml_dtypes
import mpmath as mp
import numpy as np

mp.mp.dps = 60


def logistic(z):
    return 1 / (1 + mp.exp(-z))


def logistic_slope(z):
    return logistic(z) * logistic(-z)


def _normal(z):
    return mp.erfc(-z / mp.sqrt(2)) / 2


def _density(z):
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


def _gelu_tanh(order):
    def function(z):
        c = 2 * mp.sqrt(2 / mp.pi)
        k = c * mp.mpf("0.044715")
        v, dv, ddv = c * z + k * z**3, c + 3 * k * z * z, 6 * k * z
        s1 = logistic_slope(v)
        if order == 0:
            return z * logistic(v)
        if order == 1:
            return logistic(v) + z * s1 * dv
        return s1 * (2 * dv + z * ddv + z * dv * dv * (logistic(-v) - logistic(v)))

    return function


ONE, ZERO = mp.mpf(1), mp.mpf(0)
LEAK = mp.mpf(0.01)

# value, slope, curvature of every activation
EXACT = {
    "logistic": (logistic, logistic_slope, lambda z: logistic_slope(z) * (logistic(-z) - logistic(z))),
    "tanh": (mp.tanh, lambda z: mp.sech(z) ** 2, lambda z: -2 * mp.tanh(z) * mp.sech(z) ** 2),
    "softplus": (lambda z: mp.log1p(mp.exp(z)), logistic, logistic_slope),
    "relu": (lambda z: max(z, ZERO), lambda z: ONE if z > 0 else ZERO, lambda z: ZERO),
    "leaky_relu": (lambda z: z if z >= 0 else LEAK * z, lambda z: ONE if z >= 0 else LEAK, lambda z: ZERO),
    "elu": (
        lambda z: z if z > 0 else mp.expm1(z),
        lambda z: ONE if z > 0 else mp.exp(z),
        lambda z: ZERO if z > 0 else mp.exp(z),
    ),
    "gelu": (
        lambda z: z * _normal(z),
        lambda z: _normal(z) + z * _density(z),
        lambda z: _density(z) * (2 - z * z),
    ),
    "gelu_tanh": (_gelu_tanh(0), _gelu_tanh(1), _gelu_tanh(2)),
    "silu": (
        lambda z: z * logistic(z),
        lambda z: logistic(z) + z * logistic_slope(z),
        lambda z: logistic_slope(z) * (2 + z * (logistic(-z) - logistic(z))),
    ),
    "sine": (mp.sin, mp.cos, lambda z: -mp.sin(z)),
    "identity": (lambda z: z, lambda z: ONE, lambda z: ZERO),
}


def numbers(array) -> list:
    """The entries of an array of any float dtype, exactly."""
    return [mp.mpf(float(v)) for v in np.asarray(array).astype(np.float64).ravel()]


def ulps(found, true, dtype) -> float:
    """|found - true| in units in the last place that `true` has in `dtype`; 0 is correct where `true` underflows."""
    info = ml_dtypes.finfo(dtype)
    found = mp.mpf(float(found))
    if abs(true) < float(info.smallest_normal):
        return 0.0 if abs(found) <= float(info.smallest_normal) else float("inf")
    ulp = mp.ldexp(1, int(mp.floor(mp.log(abs(true), 2)))) * float(info.eps)
    return float(abs(found - true) / ulp)


def gradient(params, x, y, sigma="logistic"):
    """(W, b, w, x) gradients of one example as lists of mpf (W a list of rows), with the conditioning of each.

    Also returned: π, s, s′ and the absolute sums |W||x| + |b| and |w|ᵀ|s| that the error bounds contain.
    """
    value, slope, curvature = EXACT[sigma]
    W = [numbers(row) for row in np.asarray(params.W)]
    b, w, x = numbers(params.b), numbers(params.w), numbers(x)
    y = mp.mpf(float(y))
    z = [mp.fdot(row, x) + bi for row, bi in zip(W, b, strict=True)]
    s, s1, s2 = ([f(zi) for zi in z] for f in (value, slope, curvature))
    beta = -y * mp.fdot(w, s)
    pi = 1 / (1 + mp.exp(-beta))
    delta = [-pi * y * a * c for a, c in zip(s1, w, strict=True)]
    return {
        "W": [[d * xj for xj in x] for d in delta],
        "b": delta,
        "w": [-pi * y * si for si in s],
        "x": [sum((d * row[j] for d, row in zip(delta, W, strict=True)), ZERO) for j in range(len(x))],
        "loss": mp.log1p(mp.exp(beta)),
        "pi": pi,
        "beta": beta,
        "z": z,
        "s": s,
        "s1": s1,
        "s2": s2,
        "abs_z": [mp.fdot([abs(v) for v in row], [abs(v) for v in x]) + abs(bi) for row, bi in zip(W, b, strict=True)],
        "abs_beta": abs(y) * mp.fdot([abs(v) for v in w], [abs(v) for v in s]),
    }
