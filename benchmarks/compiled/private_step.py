"""Compile the private step of a language model for a slice of TPU chips, and print what a chip holds and sends.

    python -m benchmarks.compiled.private_step v5e:4x4
    python -m benchmarks.compiled.private_step v5e:16x16 --lora 8

The step is that of `notebooks/private_language_model.py`, clipping, noise and optimizer included, with the sizes of
GPT-2 small. It is compared with the same step without privacy. Both need the compiler of a TPU (the extra `aot-tpu`),
but no TPU.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.compiled.communication import bytes_sent
from benchmarks.compiled.program import Program
from benchmarks.compiled.sharded import AXIS, fully_sharded

SCRIPT = Path(__file__).parents[2] / "notebooks" / "private_language_model.py"
GPT_2_SMALL = {"layers": 12, "width": 768, "heads": 12, "length": 1024, "vocabulary": 50304}


def load_example() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[SCRIPT.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(options: argparse.Namespace, devices: Sequence[Any], numbers: dict[str, int]) -> None:
    """Compile a plain and a private step. The parameters are sharded over the devices, as the examples are (FSDP)."""
    example = load_example()
    sizes = example.Sizes(**numbers, dtype=options.dtype)
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    B, optimizer = options.per_chip * mesh.size, optax.adam(1e-4)

    def shapes() -> Any:
        key, frozen = jnp.zeros(2, jnp.uint32), None
        trained = example.new_params(jax.random.wrap_key_data(key), sizes)
        if options.lora:
            trained, frozen = example.new_adapters(jax.random.wrap_key_data(key), sizes, options.lora), trained
        return example.new_state(trained, optimizer, key), frozen

    def struct(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=fully_sharded(a, mesh))

    def on_one_chip(a: Any) -> Any:  # without this, the compiler may choose another sharding
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec()))

    state, frozen = jax.tree.map(struct, jax.eval_shape(shapes))
    each = NamedSharding(mesh, PartitionSpec(AXIS))
    windows = jax.ShapeDtypeStruct((B, sizes.length + 1), jnp.int32, sharding=each)
    mask = jax.ShapeDtypeStruct((B,), bool, sharding=each)
    fun = functools.partial(example.loss, sizes=sizes, placed=on_one_chip)
    private = example.private_step(example.clipped(options, fun, AXIS), optimizer, 1.0, B)
    steps = {
        "plain": (example.public_step(optimizer, fun, AXIS), (state, frozen, windows)),
        "private": (private, (state, frozen, windows, mask)),
    }
    counts = example.count(state.trained), example.count(frozen)
    print(f"{mesh.size} chips, {B} windows of {sizes.length} ids, {counts[0]} parameters to train, {counts[1]} frozen")
    shardings = jax.tree.map(lambda a: a.sharding, state), None
    costs = []
    for name, (step, arguments) in steps.items():
        program: Any = jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(*arguments).compile()
        held, sent = program.memory_analysis().peak_memory_in_bytes, bytes_sent(Program(program.as_text()))
        costs.append((held, sent))
        print(f"{name:16} a chip holds {held / 2**20:7.1f} MiB and sends {sent / 2**20:7.1f} MiB", flush=True)
    (held, sent), (private_held, private_sent) = costs
    print(f"{'private / plain':16} {private_held / held:20.2f} {private_sent / sent:21.2f}")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.compiled.private_step", description=__doc__)
    parser.add_argument("slice", help="such as v5e:4x4 or v5e:16x16")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters; 0: all parameters")
    parser.add_argument("--per-chip", type=int, default=4, metavar="N", help="examples on each chip")
    parser.add_argument(
        "--microbatch", type=int, metavar="N", help="examples, on all chips, that are processed at once"
    )
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    return parser


if __name__ == "__main__":
    options = command_line().parse_args()
    jax.config.update("jax_platforms", "cpu")  # computes on no TPU, even if there is one
    compare(options, topologies.get_topology_desc(platform="tpu", topology_name=options.slice).devices, GPT_2_SMALL)
