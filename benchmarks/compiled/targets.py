"""The devices that programs are compiled for. Their compilers must be installed, but no device is needed."""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.compiled.program import Peak

H100_DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The description of the GPU for XLA: a GpuTargetConfigProto in text form."""


class NotInstalledError(Exception):
    """A target's compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        name: the name in the table.
        extra: the extra of this package that installs its compiler.
        peak: the rates on its data sheet.
        topology: arguments of `topologies.get_topology_desc`.
        variables: the environment variables that its compiler reads when it is loaded.
    """

    name: str
    extra: str
    peak: Peak
    topology: dict[str, str]
    variables: dict[str, str]

    def device(self) -> Any:
        """A description of the device. JAX compiles for it as for a real device.

        Raises:
            NotInstalledError: its compiler is not installed.
        """
        try:
            return topologies.get_topology_desc(**self.topology).devices[0]
        except Exception as error:  # plugins raise various errors; the table shows that the target is skipped
            raise NotInstalledError(f"{self.name}: pip install 'jaxgrad[{self.extra}]' ({error})") from error


def compile_for(function: Any, arguments: Any, device: Any) -> Any:
    """Compile a function for a device and for arguments of these shapes and dtypes."""
    sharding = SingleDeviceSharding(device)
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments)
    return jax.jit(function).lower(*structs).compile()


def memory(program: Any) -> int:
    """The bytes that a compiled program holds besides its arguments: temporary arrays and results."""
    sizes = program.memory_analysis()
    return int(sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes)


# Rates of dense products. A GPU rounds the operands of float32 products to TensorFloat-32, and a TPU to bfloat16,
# unless the program asks for full precision. For full precision a TPU computes six products.
H100 = Target(
    "H100",
    "aot-cuda",
    Peak(3.35e12, {"bf16": 989e12, "f16": 989e12, "f32": 494e12, "f32 highest": 67e12, "f64": 67e12}),
    {"platform": "cuda", "topology_name": "", "target_config": H100_DEVICE, "topology": "1x1x1"},
    {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
)
V5E = Target(
    "TPU v5e",
    "aot-tpu",
    Peak(819e9, {"bf16": 197e12, "f32": 197e12, "f32 highest": 197e12 / 6, "s8": 394e12}),
    {"platform": "tpu", "topology_name": "v5e:2x2"},
    {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
)
TARGETS = (H100, V5E)

for _target in TARGETS:  # a compiler reads them when it is loaded, and XLA its flags when JAX first computes
    for _name, _value in _target.variables.items():
        os.environ.setdefault(_name, _value)
