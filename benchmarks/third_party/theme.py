"""Third-party models. Each runs in its own process, so a package that cannot be imported affects only its own rows."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks import report
from benchmarks.measure import OUT_OF_TIME
from benchmarks.workload import Row, Settings, Theme, Workload

NAME = "third_party"
MINUTES = 10.0  # the time limit of one model
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
MODELS = {  # by family, which is a file of this folder: each builder's package and model
    "linen_models": {
        "gpt": ("flax", "linen: GPT, tied embedding"),
        "partitioned_gpt": ("flax", "linen: GPT, nn.with_partitioning"),
        "scanned_gpt": ("flax", "linen: GPT, nn.scan and nn.remat"),
        "resnet": ("flax", "linen: ResNet, group norm"),
        "weight_norm": ("flax", "linen: nn.WeightNorm"),
        "spectral_norm": ("flax", "linen: nn.SpectralNorm"),
        "lstm": ("flax", "linen: bidirectional LSTM, GRU"),
        "brax_ppo": ("brax", "PPO's policy and value"),
        "brax_sac": ("brax", "SAC's critics"),
    },
    "nnx_models": {
        "vision_transformer": ("flax", "nnx: vision transformer"),
        "sharded_vision_transformer": ("flax", "nnx: vision transformer, nnx.with_partitioning"),
        "conv_net": ("flax", "nnx: depthwise convolutions, batch norm, LoRA"),
        "gru": ("flax", "nnx: GRU"),
        "mamba": ("mamba2-jax", "language model"),
        "mamba_forecaster": ("mamba2-jax", "forecaster"),
    },
    "haiku_models": {
        "transformer": ("dm-haiku", "transformer"),
        "resnet": ("dm-haiku", "ResNet, batch norm"),
        "gru": ("dm-haiku", "GRU and LSTM"),
        "conv_lstm": ("dm-haiku", "ConvLSTM"),
        "spectral_norm": ("dm-haiku", "hk.SpectralNorm"),
        "vq_vae": ("dm-haiku", "VQ-VAE"),
        "coupling_flow": ("distrax", "coupling flow, splines"),
    },
    "jraph_models": {
        "graph_network": ("jraph", "GraphNetwork"),
        "graph_attention": ("jraph", "GraphConvolution and GAT"),
    },
    "equinox_models": {
        "transformer": ("equinox", "transformer, rotary positions"),
        "gru": ("equinox", "GRU"),
        "weight_norm": ("equinox", "eqx.nn.WeightNorm"),
        "spectral_norm": ("equinox", "eqx.nn.SpectralNorm"),
        "unet": ("pdequinox", "U-Net"),
        "dilated_resnet": ("pdequinox", "dilated ResNet"),
        "fourier_operator": ("pdequinox", "Fourier neural operator"),
    },
    "diffrax_models": {
        "ode_direct": ("diffrax", "neural ODE, DirectAdjoint"),
        "ode_by_checkpoints": ("diffrax", "neural ODE, adaptive, default adjoint"),
        "neural_cde": ("diffrax", "neural CDE"),
    },
    "flowjax_models": {
        "autoregressive_flow": ("flowjax", "masked autoregressive flow"),
        "block_autoregressive_flow": ("flowjax", "block neural autoregressive flow"),
        "spline_flow": ("flowjax", "triangular spline flow"),
        "coupling_flow": ("flowjax", "coupling flow, splines"),
    },
    "hugging_face": {
        "bert": ("transformers", "FlaxBert"),
        "gpt2": ("transformers", "FlaxGPT2"),
        "llama": ("transformers", "FlaxLlama"),
        "vit": ("transformers", "FlaxViT"),
        "beit": ("transformers", "FlaxBeit"),
        "resnet": ("transformers", "FlaxResNet"),
        "wav2vec2": ("transformers", "FlaxWav2Vec2"),
        "whisper": ("transformers", "FlaxWhisper"),
        "clip": ("transformers", "FlaxCLIP"),
        "diffusion_unet": ("diffusers", "FlaxUNet2DCondition"),
    },
    "keras_models": {
        "transformer": ("keras", "transformer"),
        "recurrent": ("keras", "bidirectional LSTM, GRU"),
        "mobile_net": ("keras", "MobileNetV3"),
        "penalized": ("keras", "conv net, kernel_regularizer"),
        "spectral_norm": ("keras", "SpectralNormalization"),
    },
    "numpyro_models": {
        "bayesian_network": ("numpyro", "Bayesian network"),
        "hierarchical_regression": ("numpyro", "hierarchical regression, LKJ prior"),
        "topic_model": ("numpyro", "topic model"),
    },
    "gpjax_models": {
        "sparse_process": ("gpjax", "sparse variational process"),
        "deep_kernel": ("gpjax", "deep kernel"),
    },
    "netket_models": {
        "phase_machine": ("netket", "RBM, modulus and phase"),
        "complex_machine": ("netket", "RBM, complex parameters"),
        "autoregressive": ("netket", "autoregressive, masked"),
        "symmetric": ("netket", "group-equivariant"),
    },
    "e3nn_models": {
        "equivariant_potential": ("e3nn-jax", "potential, spherical harmonics"),
    },
}


def workloads(settings: Settings) -> Iterator[Workload]:
    """A workload for each model. It only names the builder, because the model is built in its own process."""
    for family, builders in MODELS.items():
        for builder, (package, title) in builders.items():
            name = f"{package}, {title}"
            if settings.wants(NAME, name):
                yield Workload(name, {}, (), labels={"family": family, "builder": builder, "package": package})


def measure_row(workload: Workload, settings: Settings) -> list[Row]:
    """Measure a model in its process. The row says so if the model could not be measured or jaxgrad failed."""
    outcome = run_model(workload.labels["family"], workload.labels["builder"], settings)
    row = Row(**outcome.get("row", {}) | {"name": workload.name})
    row.labels = {**row.labels, "version": installed(workload.labels["package"])}
    row.lines = [direct_line(workload.name, direct) for direct in outcome.get("direct", [])]
    row.failed = outcome.get("failed", "")
    if "row" not in outcome:
        row.skipped = {"plain": outcome.get("skipped") or row.failed}
        print(f"{workload.name}\n{outcome.get('trace', '')}", file=sys.stderr)
    return [row]


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def run_model(family: str, name: str, settings: Settings) -> dict[str, Any]:
    """Run the model's process and return its report."""
    root = str(Path(benchmarks.__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.third_party.run", family, name, folder, str(settings.seconds)]
        try:
            process = subprocess.run(
                command,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=60 * MINUTES,
            )
        except subprocess.TimeoutExpired:
            return {"skipped": OUT_OF_TIME}
        if process.returncode:
            return {"failed": f"ended with status {process.returncode}", "trace": process.stderr}
        return json.loads((Path(folder) / "out.json").read_text(encoding="utf-8"))


def direct_line(model: str, direct: dict[str, Any]) -> str:
    """A row of the table of direct parameters."""
    location = f" at {direct['source']}" if direct["source"] else ""
    shape = "×".join(map(str, direct["shape"]))
    return report.line(
        [
            model,
            f"`{direct['path']}` {shape}",
            f"{direct['share']:.0%}",
            f"{direct['primitive']}{location}: {direct['why']}",
        ]
    )


def note(rows: Sequence[Row]) -> str:
    lines = [line for row in rows for line in row.lines]
    if not lines:
        return "No parameter with more than 1 % of its model's bytes takes the direct route."
    header = [report.line(["model", "parameter", "share of bytes", "why"]), "|---|---|---:|---|"]
    return "\n".join(
        ["These parameters take the direct route and have more than 1 % of their model's bytes:", "", *header, *lines]
    )


THEME = Theme(
    NAME,
    "Third-party models",
    """
Each row is a model that a package builds from a configuration, at a modest size and with 8 or 16 examples. Each model
runs in its own process. `plain` is `jit(value_and_grad(mean loss))`; the columns *time*, *memory* and *compile time*
are multiples of it. `jaxgrad` computes the mean loss, the norms and the clipped sum of the per-example gradients from
factors, and `vmap(grad)` computes them from the gradients that `vmap(jax.grad)` materializes.

- *difference*: norms, clipped sum and Gram matrix are compared with those by `vmap(jax.grad)` in float64, and this is
  the largest relative difference. Some packages compute in float32 all the same. The clipped sums are also compared in
  float32.
- *factored*, *smaller*, *vector*, *direct*: shares of the model's bytes. The gradients of the first share stay
  factored and the others are materialized, for the reason that [Concepts](../docs/concepts.md#what-explain-prints)
  explains.
- *held*: the bytes of the factors divided by the bytes of the materialized gradients.

Memory is the temporary memory of the compiled program. Compile time includes tracing.""",
    (
        report.label("version"),
        report.label("parameters"),
        report.label("difference"),
        report.label("factored"),
        report.label("smaller"),
        report.label("vector"),
        report.label("direct"),
        report.label("held"),
        report.milliseconds("plain"),
        report.ratio("jaxgrad"),
        report.ratio("vmap(grad)"),
        report.mebibytes("plain"),
        report.memory("jaxgrad"),
        report.memory("vmap(grad)"),
        report.compile_time("jaxgrad"),
        report.compile_time("vmap(grad)"),
    ),
    workloads,
    measure_row,
    note,
)
