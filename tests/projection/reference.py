"""Matrices to project, and what is expected of projections, by NumPy in float64.

Closed forms for ReLU and the identity, quadrature in the plane for other activations.
"""

import numpy as np
from scipy import optimize, special

FUNCTIONS = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x * special.expit(x),
    "swish": lambda x: x * special.expit(x),
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "softplus": lambda x: np.logaddexp(x, 0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "softsign": lambda x: x / (1 + np.abs(x)),
}


def golden_matrix(n, m):
    i, j = np.meshgrid(np.arange(n), np.arange(m), indexing="ij")
    return np.sin(1 + i * j + 0.37 * i + 0.91 * j) * (1 + j / m)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relu_h(rho):
    return (np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho) / np.pi


def lengths(w, group=1):
    """The lengths of the outputs of `[n, group * outputs]`."""
    return np.sqrt(np.sum(np.reshape(w, (len(w), group, -1)) ** 2, axis=(0, 1)))


def ratio(a, b):
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b))), where=np.asarray(b) > 0)


def risk(w, y, activation="relu", group=1):
    """E |sigma(x W) - sigma(x Y)|² over x ~ N(0, I)."""
    w, y = np.asarray(w, np.float64), np.asarray(y, np.float64)
    a, b = lengths(w, group), lengths(y, group)
    inner = np.sum(np.reshape(w * y, (len(w), group, -1)), axis=(0, 1))
    rho = np.clip(ratio(inner, a * b), -1, 1)
    if activation == "relu":
        return float(np.sum((a**2 + b**2) / 2 - a * b * relu_h(rho)))
    if activation == "identity":
        return float(np.sum((w - y) ** 2))
    return float(sum(planar_risk(FUNCTIONS[activation], s, t, r, 181) for s, t, r in zip(a, b, rho, strict=True)))


def relative_risk(w, factors, activation="relu", group=1):
    u, v = (np.asarray(factor, np.float64) for factor in factors)
    return risk(w, u @ v, activation, group) / risk(w, 0 * np.asarray(w), activation, group)


def spectral(w, rank):
    """The truncated singular value decomposition, as a product."""
    return projected(w, rank, "identity")


def projected(w, rank, activation="relu", group=1, normalized=False):
    """The kernel projection on the leading left singular vectors, as a product."""
    w = np.asarray(w, np.float64)
    q = np.linalg.svd(w, full_matrices=False)[0][:, :rank]
    c = q.T @ w
    whole, kept = lengths(w, group), lengths(c, group)
    best = whole if normalized else best_lengths(activation, whole, np.minimum(ratio(kept, whole), 1))
    return q @ (c * np.tile(ratio(best, kept), group))


def best_lengths(activation, s, rho):
    if activation == "identity":
        return s * rho
    if activation == "relu":
        return s * relu_h(rho)

    def best(s, rho):
        def lost(t):
            return planar_risk(FUNCTIONS[activation], s, t, rho, 181)

        return optimize.minimize_scalar(lost, bounds=(0, 2 * s), method="bounded", options={"xatol": 1e-5 * s}).x if s else 0.0

    return np.array([best(*pair) for pair in zip(s, rho, strict=True)])


def planar_risk(fn, s, t, rho, points=1001):
    """E (fn(s x) - fn(t y))² over a pair of standard Gaussians with correlation rho, by an even grid in the plane."""
    grid = np.linspace(-9, 9, points)
    weight = np.exp(-(grid**2) / 2)
    weight /= weight.sum()
    x, z = grid[:, None], grid[None]
    gap = fn(s * x) - fn(t * (rho * x + np.sqrt(1 - rho**2) * z))
    return float(weight @ gap**2 @ weight)
