"""Two processes with two devices each, by jax.distributed on this machine: the results of one process."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), initialization_timeout=60)

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxgrad as jg
from jaxgrad import network

assert jax.process_count() == 2 and len(jax.devices()) == 4
B, rng = 16, np.random.default_rng(0)
X, Y = rng.normal(size=(B, 30)).astype(np.float32), np.sign(rng.normal(size=B)).astype(np.float32)
params = network.init_params(jax.random.key(0), 30, 20, jnp.float32)


def run(params, X, Y):
    g = jg.per_example_grad(network.loss)(params, X, Y)
    total, info = jg.clipped_grad(network.loss, 0.1)(params, X, Y, mask=jnp.arange(B) % 4 != 1)
    return g.norms(), g.gram(), g.sum(), total, info


mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
each, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
local = slice(8 * jax.process_index(), 8 * (jax.process_index() + 1))  # each process has read half of the batch
batch = [jax.make_array_from_process_local_data(each, a[local]) for a in (X, Y)]
everywhere = jax.tree.map(lambda a: jax.make_array_from_process_local_data(whole, np.asarray(a)), params)
found = jax.jit(run, out_shardings=whole)(everywhere, *batch)
expected = jax.jit(run)(params, X, Y)  # on this process alone
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)
print("agreed")
jax.distributed.shutdown()
"""


@pytest.mark.every(0)
def test_two_processes_agree_with_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "PYTEST"))}
    start = [sys.executable, "-c", PROGRAM, port]
    both = [
        subprocess.Popen([*start, str(k)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for k in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in both]
    except subprocess.TimeoutExpired:
        pytest.fail("two processes have not finished within three minutes")
    finally:
        for process in both:
            process.kill()
    assert [text.rstrip().splitlines()[-1:] for text in outputs] == [["agreed"]] * 2, "\n".join(outputs)
    assert [process.returncode for process in both] == [0, 0], "\n".join(outputs)
