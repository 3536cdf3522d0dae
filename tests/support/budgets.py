"""Compile models for an H100; print as JSON the bytes, memory and kernels, relative to a plain gradient's."""

import json

import jax.numpy as jnp

from benchmarks import functions, models
from benchmarks.compiled.program import Program
from benchmarks.compiled.targets import H100, compile_for, memory
from benchmarks.compiled.theme import shape_structs


def measured(model):
    device = H100.device()
    arguments = shape_structs((model.params, *model.batch), "bfloat16")
    programs = [compile_for(f, arguments, device) for f in (functions.plain(model), functions.factored(model, 1.0))]
    texts = [Program(p.as_text()) for p in programs]
    plain, ours = (p.counts() for p in texts)
    return {
        "bytes": ours.bytes / plain.bytes,
        "memory": memory(programs[1]) / memory(programs[0]),
        "kernels": ours.kernels / plain.kernels,
        "wide": sum(n for dtype, n in ours.products.items() if dtype.startswith("f32")) / sum(ours.products.values()),
        "largest": max(shape.bytes for kernel in texts[1].kernels() for shape in kernel.instruction.shapes),
        "batch of gradients": model.batch_size
        * max(a.size for a in model.params.values())
        * jnp.bfloat16.dtype.itemsize
        if isinstance(model.params, dict)
        else 0,
    }


if __name__ == "__main__":
    found = {
        "mlp": measured(models.mlp((1024, 4096, 4096, 10), 4096)),
        "block": measured(models.transformer(512, 128, 64)),
        "conv": measured(models.conv_net(1024)),
    }
    print(json.dumps(found))
