"""Constructs of functions: what JAX has, whatever the module system."""

import jax
import jax.numpy as jnp
from constructs import Construct, normal
from jax import lax


D = 6
X = normal(8, D)


def matrix(run, letters="io", *, shape=(D, D), args=(X,), **how):
    """A construct with one kernel, `w`: `run(w, *args)`."""
    return Construct(lambda params, *args: run(params["w"], *args), args, {"w": letters}, {"w": shape}, **how)


def layers(run, letters="sio", **how):
    """A construct with three stacked kernels `(3, D, D)`."""
    return matrix(run, letters, shape=(3, D, D), **how)


def dense(x, w):
    return jnp.tanh(x @ w)


def scan(ws, x):
    return lax.scan(lambda x, w: (dense(x, w), x), x, ws)


def scan_reversed(ws, x):
    return lax.scan(lambda x, w: (dense(x, w), jnp.sum(x)), x, ws, reverse=True, unroll=2)


def indexed(ws, x):
    return lax.fori_loop(0, 3, lambda i, x: dense(x, ws[i]), x)


def indexed_while(ws, x):
    step = lambda carry: (carry[0] + 1, dense(carry[1], ws[carry[0]]))
    return lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]


def fori(w, x):
    return lax.fori_loop(0, 3, lambda _, x: dense(x, w), x)


def until(w, x):
    """A loop whose condition uses the kernel as well."""
    return lax.while_loop(lambda x: jnp.sum(x @ w) < 50, lambda x: 1.1 * x + dense(x, w), jnp.abs(x))


def cond(w, x):
    return lax.cond(jnp.sum(x) < 0, lambda x: jnp.sin(x @ w.T), lambda x: x @ w, x)


def switch(w, x):
    return lax.switch(jnp.int32(1), [lambda x: x, lambda x: x @ w], x)


def sliced(ws, x):
    return sum((x @ ws[n] for n in range(3)), jnp.zeros_like(x))


def experts_ragged(ws, x):
    return lax.ragged_dot(x, ws, jnp.array([3, 0, 5]))


def experts_einsum(ws, x):
    return jnp.einsum("eti,eio->eto", x.reshape(3, -1, D), ws)


def experts_gated(ws, x):
    """Every expert sees every token; the product is contracted over the experts too."""
    return jnp.einsum("te,ti,eio->to", normal(8, 3), x, ws)


@jax.custom_vjp
def product(x, w):
    return jnp.tanh(x @ w)


def _forward(x, w):
    y = product(x, w)
    return y, (x, w, y)


def _backward(saved, ct):
    """Not the derivative: who differentiates the function itself gets something else."""
    x, w, y = saved
    ct = 2 * ct * (1 - y * y)
    return ct @ w.T, 3 * x.T @ ct


product.defvjp(_forward, _backward)


@jax.custom_vjp
def picked(w, rows, x):
    """With integers among its inputs, and a transposed kernel among its residuals."""
    return x[rows] @ w


def _picked_forward(w, rows, x):
    return picked(w, rows, x), (w.T, rows, x)


def _picked_backward(saved, ct):
    wt, rows, x = saved
    return -x[rows].T @ ct, None, jnp.zeros_like(x).at[rows].add(ct @ wt)


picked.defvjp(_picked_forward, _picked_backward)


FUNCTIONS: dict[str, Construct] = {
    "x @ w": matrix(lambda w, x: x @ w),
    "w on the left": matrix(lambda w, x: w @ x.T, "oi", shape=(5, D)),
    "w transposed": matrix(lambda w, x: x @ w.T, "oi", shape=(5, D)),
    "w reshaped": matrix(lambda w, x: (x @ w.reshape(D, 10)).reshape(8, 2, 5), "ioo", shape=(D, 2, 5)),
    "w used twice": matrix(lambda w, x: dense(dense(x, w), w)),
    "einsum of two kernels": Construct(
        lambda p, x: jnp.einsum("ti,ij,jk->tk", x, p["v"], p["w"]),
        (normal(2, D),),
        {"v": "io", "w": "io"},
        {"v": (D, 20), "w": (20, 30)},
    ),
    "scaled": matrix(lambda w, x: x @ (0.5 * w) + x @ (w / jnp.sum(x))),
    "scaled by a parameter": Construct(
        lambda p, x: x @ (p["g"] * p["w"]),
        (X,),
        {"w": "io"},
        {"w": (D, 5), "g": ()},
    ),
    "sliced per expert": layers(sliced),
    "ragged_dot": layers(experts_ragged),
    "ragged_dot, one expert": matrix(lambda ws, x: lax.ragged_dot(x, ws, jnp.array([8])), "sio", shape=(1, D, 5)),
    "experts by einsum": layers(experts_einsum, args=(normal(9, D),)),
    "contraction over experts": layers(experts_gated, told=False),
    "one expert by einsum": matrix(lambda ws, x: jnp.einsum("eti,eio->eto", x[None], ws), "sio", shape=(1, D, 5)),
    "lax.scan": layers(scan),
    "lax.scan, reversed and unrolled": layers(scan_reversed),
    "w[i] in fori_loop": layers(indexed),
    "fori_loop": matrix(fori),
    "while": matrix(until, reverse=False),
    "cond": matrix(cond),
    "switch": matrix(switch),
    "while over w[i]": layers(indexed_while, reverse=False),
    "gradient inside": layers(lambda ws, x: jax.grad(lambda x: jnp.sum(scan(ws, x)[0] ** 2))(x)),
    "optimization_barrier": matrix(lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w)))),
    "precision": matrix(lambda w, x: jnp.matmul(x, w, precision="highest")),
    "precision of an algorithm": matrix(lambda w, x: jnp.matmul(x, w, precision=lax.DotAlgorithmPreset.F32_F32_F32)),
    "two types": matrix(
        lambda w, x: (
            jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
            + lax.dot(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)
        ),
        tolerance=2**-7,
    ),
    "jit in jit": matrix(jax.jit(lambda w, x: x + jax.jit(dense)(x, w))),
    "custom_vjp": matrix(lambda w, x: product(product(x, w), w)),
    "custom_vjp with integers": matrix(lambda w, x: picked(w, jnp.array([2, 0, 2]), jnp.tanh(x @ w))),
    "custom_vjp in scan of remat": layers(
        lambda ws, x: lax.scan(jax.checkpoint(lambda x, w: (product(x, w), None)), x, ws)[0]
    ),
}
