"""Third-party models: each in a process of its own, so that a package that cannot be loaded only loses its own rows."""

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
MINUTES = 10.0  # for one model
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
MODELS = {  # a family is a file of this folder; each builder has its package and a description of the model
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
    """A workload for each model, which only names its builder; the model is built in its own process."""
    for family, builders in MODELS.items():
        for builder, (package, title) in builders.items():
            name = f"{package}, {title}"
            if settings.wants(NAME, name):
                yield Workload(name, {}, (), labels={"family": family, "builder": builder, "package": package})


def measure_row(workload: Workload, settings: Settings) -> list[Row]:
    """The model's row, or a row that says why it could not be measure_row. If jaxgrad fails, the row has failed."""
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
    """A row of the list below the table."""
    at = f" at {direct['source']}" if direct["source"] else ""
    shape = "×".join(map(str, direct["shape"]))
    return report.line(
        [model, f"`{direct['path']}` {shape}", f"{direct['share']:.0%}", f"{direct['primitive']}{at}: {direct['why']}"]
    )


def note(rows: Sequence[Row]) -> str:
    lines = [line for row in rows for line in row.lines]
    if not lines:
        return "No parameter of more than 1 % of its model's bytes is written out."
    header = [report.line(["model", "parameter", "of its bytes", "why"]), "|---|---|---:|---|"]
    return "\n".join(["Parameters of more than 1 % of their model's bytes that are written out:", "", *header, *lines])


THEME = Theme(
    NAME,
    "Third-party models",
    """
Models as packages build them, from configurations, at modest sizes; batches of 8 or 16. Each runs in a process of its
own: norms, clipped sum and Gram matrix are first held against those of `vmap(jax.grad)` in float64, where
`difference` is how far they lie apart, relative to their size (a package may compute in float32 inside all the same),
then the clipped sum in float32. `jaxgrad` is `per_example_grad`, norms and clipped sum; plain, the mean loss and its
gradient, is 1.00. `held` is what the factors hold, of all gradients written out; `factored`, `formed` (a product that
is smaller carried out, as are `vectors`) and `direct` (written out as `vmap(jax.grad)` does) are shares of the
model's bytes. Memory is the compiled program's temporary memory; compiling is tracing and compiling together.""",
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
        report.compiling("jaxgrad"),
        report.compiling("vmap(grad)"),
    ),
    workloads,
    measure_row,
    note,
)
