"""Compile models for an H100; print as JSON the bytes, memory and kernels, relative to a plain gradient's."""

import json

import jax
import jax.numpy as jnp

import jaxgrad as jg
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


def projected(model):
    """The memory of projections inside the loop over layers, relative to a plain gradient's."""
    arguments = shape_structs((model.params, *model.batch), "bfloat16")

    def inside(params, *batch):
        stacked = {"E": 0, "out": 0, "layers": 1, "scale": 0}
        sides = jg.attribution.random_sides(params, jax.random.key(0), 16, stacked=stacked)
        return jg.attribution.per_example_projection(model.loss, sides)(params, *batch)

    programs = [compile_for(f, arguments, H100.device()) for f in (functions.plain(model), inside)]
    return memory(programs[1]) / memory(programs[0])


def in_float32(model, **compared):
    """The bytes and the memory of functions of the parameters and the batch, relative to a plain gradient's."""
    arguments = shape_structs((model.params, *model.batch), "float32")
    plain, *others = (compile_for(f, arguments, H100.device()) for f in (functions.plain(model), *compared.values()))

    def moved(program):
        return Program(program.as_text()).counts().bytes

    return {
        name: {"bytes": moved(ours) / moved(plain), "memory": memory(ours) / memory(plain)}
        for name, ours in zip(compared, others, strict=True)
    }


if __name__ == "__main__":
    deep = {T: models.deep_language_model(L=12, V=50304, D=768, T=T, B=8) for T in (128, 4096)}
    found = {
        "mlp": measured(models.mlp((1024, 4096, 4096, 10), 4096)),
        "block": measured(models.transformer(512, 128, 64)),
        "conv": measured(models.conv_net(1024)),
        "projected": projected(models.deep_language_model(L=4, V=4096, D=256, T=512, B=8)),
        "deep": {
            T: in_float32(
                model,
                two_passes=functions.clipped(model, 1.0, passes=2),
                by_layer=functions.clipped_by_layer(model, 1.0),
            )
            for T, model in deep.items()
        },
    }
    print(json.dumps(found))
