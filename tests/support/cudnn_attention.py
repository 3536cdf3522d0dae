"""Compile an attention block that calls cuDNN for an H100; print as JSON what a plain gradient and ours do."""

import json
from collections import Counter

import jax
import jax.numpy as jnp

import jaxgrad as jg
from benchmarks.compiled.program import Program
from benchmarks.compiled.targets import H100, compile_for, memory

B, T, D, N, H = 16, 128, 768, 12, 64
KERNELS = {"__cudnn$fmhaSoftmax": "forward", "__cudnn$fmhaSoftmaxBackward": "backward"}


def loss(params, x, y):
    q, k, v = (jnp.einsum("td,dnh->tnh", x, params[name]) for name in ("q", "k", "v"))
    a = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    h = x + jnp.einsum("tnh,nhd->td", a, params["o"])
    return jnp.square((h - y).astype(jnp.float32)).mean()


def plain(params, x, y):
    return jax.value_and_grad(lambda params: jax.vmap(loss, (None, 0, 0))(params, x, y).mean())(params)


FUNCTIONS = {
    "plain": plain,
    "norms": lambda *args: jg.per_example_norms(loss)(*args),
    "one pass": lambda *args: jg.clipped_grad(loss, 1.0)(*args),
    "two passes": lambda *args: jg.clipped_grad(loss, 1.0, passes=2)(*args),
}


def measured(function):
    """The number of calls of cuDNN, bytes of memory, bytes moved, and the elements of the largest array of a kernel."""
    params = dict.fromkeys(("q", "k", "v"), (D, N, H)) | {"o": (N, H, D)}
    arguments = (*({name: struct(*shape) for name, shape in params.items()}, struct(B, T, D), struct(B, T, D)),)
    compiled = compile_for(function, arguments, H100.device())
    program = Program(compiled.as_text())
    kernels = list(program.kernels())
    calls = Counter(KERNELS.get(k.instruction.attribute("custom_call_target").strip('"'), "") for k in kernels)
    arrays = [s.size for k in kernels if "custom_call_target" not in k.instruction.rest for s in k.instruction.shapes]
    return {
        "calls": [calls["forward"], calls["backward"]],
        "memory": memory(compiled),
        "bytes": program.counts(H100.peak).bytes,
        "largest": max(arrays),
    }


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


if __name__ == "__main__":
    found = {name: measured(function) for name, function in FUNCTIONS.items()}
    print(json.dumps(found | {"batch of gradients": B * D * N * H}))
