"""Fine-tune a small GPT with differential privacy: all of its parameters, or LoRA adapters.

    python notebooks/private_language_model.py --folder runs/full
    python notebooks/private_language_model.py --folder runs/lora --lora 8

The model is first trained on public text, the manual of Python (`pydoc_data.topics`), and then privately on the
docstrings of SciPy, which JAX installs. An example, the unit of privacy, is one window of text: epsilon says nothing
about a whole file. The held-out loss is that of other files.

If a run is killed, start it with the same command again. It continues after the last checkpoint, and its numbers are
those of an unbroken run, because the examples and the noise of a step depend only on the key and on the step.

Epsilon covers the parameters after the last step, and nothing else: not the losses and the fraction of clipped examples
that are printed, and not the checkpoints, which contain the key. Keep the folder as secret as the private text. JAX's
random numbers are not made to withstand an attack.

`python -m benchmarks.compiled.private_step v5e:4x4` compiles the same step for a slice of TPU chips, without a TPU.

Needs `pip install ".[examples,frameworks,privacy]"`; orbax-checkpoint comes with Flax.
"""

import argparse
import ast
import dataclasses
import enum
import functools
import importlib.util
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgrad as jg

HELD_OUT_FILES = 20  # each 20th file is held out
HELD_OUT_WINDOWS = 512
PUBLIC_BATCH = 64
DELTA = 1e-5


# The model: a GPT in plain JAX. Its layers are stacked, scanned over, and recomputed in the backward pass.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the model, and the dtype in which it computes; parameters are in float32."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    length: int = 64
    vocabulary: int = 128
    dtype: str = "float32"

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of a layer: their numbers of inputs and outputs."""
        D = self.width
        return {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}


def new_params(key: jax.Array, sizes: Sizes) -> Any:
    """The parameters of the model."""
    keys, L, D = iter(jax.random.split(key, 6)), sizes.layers, sizes.width
    layers = {name: jax.random.normal(next(keys), (L, K, F)) * K**-0.5 for name, (K, F) in sizes.matrices.items()}
    return {
        "embedding": 0.1 * jax.random.normal(next(keys), (sizes.vocabulary, D)),
        "positions": 0.1 * jax.random.normal(next(keys), (sizes.length, D)),
        "layers": layers | {"scale_1": jnp.ones((L, D)), "scale_2": jnp.ones((L, D))},
        "scale": jnp.ones(D),
    }


def new_adapters(key: jax.Array, sizes: Sizes, rank: int) -> Any:
    """LoRA (Hu et al. 2021): each matrix W of a layer becomes W + A B, where B starts at zero."""
    keys, L = iter(jax.random.split(key, 4)), sizes.layers
    return {
        name: {"A": jax.random.normal(next(keys), (L, K, rank)) * K**-0.5, "B": jnp.zeros((L, rank, F))}
        for name, (K, F) in sizes.matrices.items()
    }


def block(layer: Any, adapters: Any, h: jax.Array, heads: int) -> jax.Array:
    """One layer."""
    T, D = h.shape

    def product(h: jax.Array, name: str) -> jax.Array:
        y = h @ layer[name]
        return y + h @ adapters[name]["A"] @ adapters[name]["B"] if name in adapters else y

    q, k, v = jnp.split(product(normalized(h, layer["scale_1"]), "qkv"), 3, axis=-1)
    q, k, v = (a.reshape(T, heads, D // heads) for a in (q, k, v))
    scores = jnp.einsum("thd,shd->hts", q, k).astype(jnp.float32) / math.sqrt(D // heads)
    weights = jax.nn.softmax(jnp.where(np.tril(np.ones((T, T), bool)), scores, -1e9)).astype(h.dtype)
    h = h + product(jnp.einsum("hts,shd->thd", weights, v).reshape(T, D), "out")
    return h + product(jax.nn.gelu(product(normalized(h, layer["scale_2"]), "up")), "down")


def normalized(h: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalization, computed in float32."""
    wide = h.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)
    return wide.astype(h.dtype) * scale


def loss(trained: Any, frozen: Any, window: jax.Array, sizes: Sizes, placed: Callable[..., Any] = lambda a: a) -> Any:
    """The mean cross-entropy of ONE window of text, in nats per id.

    Args:
        trained: the model's parameters, or adapters.
        frozen: None, or the parameters that the adapters are added to.
        window: [T + 1], ids.
        sizes: the sizes of the model.
        placed: a sharding constraint for the activations of the window, on many chips.
    """
    params, adapters = (trained, {}) if frozen is None else (frozen, trained)
    params, adapters = jax.tree.map(lambda a: a.astype(sizes.dtype), (params, adapters))
    step = jax.checkpoint(lambda h, layer: (placed(block(*layer, h, sizes.heads)), None))
    h = placed(params["embedding"][window[:-1]] + params["positions"])
    h, _ = jax.lax.scan(step, h, (params["layers"], adapters))
    logits = placed(normalized(h, params["scale"]) @ params["embedding"].T)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), window[1:]).mean()


def mean_loss(trained: Any, frozen: Any, windows: Any, fun: Callable[..., Any], axis: Any = None) -> jax.Array:
    """The mean loss of a batch, whose examples may be sharded over an axis of a mesh."""
    return jax.vmap(lambda window: fun(trained, frozen, window), spmd_axis_name=axis)(windows).mean()


# The steps. A checkpoint is a State: nothing else is needed to continue.


class State(NamedTuple):
    """What a step changes, and the key that the examples and the noise of all steps are drawn with."""

    trained: Any
    optimizer: Any
    step: jax.Array
    key: jax.Array  # uint32 [2]


class Use(enum.IntEnum):
    """What random numbers are for. Each use has its own, so that no noise equals numbers that are known."""

    PARAMETERS = 0
    ADAPTERS = 1
    PUBLIC_BATCHES = 2
    SAMPLES = 3
    NOISE = 4


def stream(key: jax.Array, use: Use) -> jax.Array:
    """JAX's key for one use."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), use)


def generator(state: State, use: Use) -> np.random.Generator:
    """NumPy's generator for one use, in the next step."""
    return np.random.default_rng([*np.asarray(state.key).tolist(), use, int(state.step)])


def new_state(trained: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before the first step."""
    return State(trained, optimizer.init(trained), jnp.zeros((), jnp.int32), key)


def updated(state: State, gradient: Any, optimizer: optax.GradientTransformation) -> State:
    """The state after a step of the optimizer."""
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
    return State(optax.apply_updates(state.trained, updates), optimizer_state, state.step + 1, state.key)


def public_step(optimizer: optax.GradientTransformation, fun: Callable[..., Any], axis: Any = None) -> Any:
    """A function (state, frozen, windows) → (state, mean loss)."""

    def step(state: State, frozen: Any, windows: jax.Array) -> tuple[State, jax.Array]:
        value, gradient = jax.value_and_grad(mean_loss)(state.trained, frozen, windows, fun, axis)
        return updated(state, gradient, optimizer), value

    return step


def private_step(
    gradient: jg.clipping.ClippedGrad, optimizer: optax.GradientTransformation, stddev: float, expected: float
) -> Callable[..., Any]:
    """A function (state, frozen, windows, mask) → (state, `ClipInfo`): the noisy sum, over the expected batch size."""

    def step(state: State, frozen: Any, windows: jax.Array, mask: jax.Array) -> tuple[State, jg.ClipInfo]:
        total, info = gradient(state.trained, frozen, windows, mask=mask)
        noise = optax.tree.random_like(jax.random.fold_in(stream(state.key, Use.NOISE), state.step), total)
        mean = jax.tree.map(lambda t, n: (t + stddev * n) / expected, total, noise)
        return updated(state, mean, optimizer), info

    return step


def clipped(options: argparse.Namespace, fun: Callable[..., Any], axis: Any = None) -> jg.clipping.ClippedGrad:
    """The clipped gradient of the loss, in the memory of a plain one."""
    return jg.clipped_grad(
        fun,
        options.max_norm,
        in_axes=(None, None, 0),
        passes=2,
        microbatch_size=options.microbatch,
        spmd_axis_name=axis,
    )


# The text.


def docstrings(package: str) -> Iterator[tuple[int, str]]:
    """(number of the file, docstring) for all modules, classes and functions of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    files = (path for path in sorted(Path(str(spec.origin)).parent.rglob("*.py")) if "tests" not in path.parts)
    for number, path in enumerate(files):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield number, text


def cut(text: str, length: int) -> np.ndarray:
    """Windows [N, length + 1] of ASCII characters that do not overlap."""
    ids = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    return ids[: len(ids) // (length + 1) * (length + 1)].reshape(-1, length + 1).astype(np.int32)


def load_text(sizes: Sizes, limit: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Public windows, private windows (at most `limit`), and held-out windows of the private kind."""
    from pydoc_data.topics import topics

    kept: dict[bool, list[str]] = {True: [], False: []}
    for number, text in docstrings("scipy"):
        kept[number % HELD_OUT_FILES == 0].append(text)
    held_out, private = (cut("\n\n".join(kept[k]), sizes.length) for k in (True, False))
    spread = np.linspace(0, len(held_out) - 1, HELD_OUT_WINDOWS).astype(int)
    return cut("\n\n".join(topics.values()), sizes.length), private[:limit], held_out[spread]


# Training.


def keep_settings(options: argparse.Namespace) -> None:
    """Write the settings into the folder; stop if it has a run with other settings."""
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    path = options.folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        if changed := [name for name in settings if settings[name] != before.get(name)]:
            was = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
            raise SystemExit(f"{options.folder} has a run with {was}. Use the same settings, or another --folder.")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings))
    os.replace(partial, path)


def train(folder: Path, state: State, steps: int, every: int, step: Any, report: Any) -> State:
    """Take steps until there are as many as asked for, from the last checkpoint on; write a checkpoint now and then."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        if (last := manager.latest_step()) is not None:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(last, args=ocp.args.StandardRestore(shapes))
            print(f"{folder.name}: continues after step {last}", flush=True)
        for done in range(int(state.step) + 1, steps + 1):
            state, info = step(state)
            if done % every == 0 or done == steps:
                manager.save(done, args=ocp.args.StandardSave(state))
                report(done, state, info)
    return state


def noise_multiplier(options: argparse.Namespace, probability: float) -> tuple[float, Callable[[int], float]]:
    """The multiplier that spends the given epsilon in all steps, and the epsilon of the first steps."""
    import dp_accounting

    def accountant() -> Any:
        return dp_accounting.rdp.RdpAccountant()

    def event(multiplier: float, steps: int = options.steps) -> Any:
        one = dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(multiplier))
        return dp_accounting.SelfComposedDpEvent(one, steps)

    multiplier = dp_accounting.calibrate_dp_mechanism(accountant, event, options.epsilon, DELTA)
    return multiplier, lambda steps: accountant().compose(event(multiplier, steps)).get_epsilon(DELTA)


def run(options: argparse.Namespace) -> None:
    """Train on the public text, and then privately."""
    keep_settings(options)
    sizes = Sizes(dtype=options.dtype)
    public, private, held_out = load_text(sizes, options.windows)
    fun, start = functools.partial(loss, sizes=sizes), time.time()
    held_out_loss = jax.jit(functools.partial(mean_loss, windows=held_out, fun=fun))
    base = train_publicly(options, sizes, fun, public, held_out_loss)
    trained, frozen = base.trained, None
    if options.lora:
        trained, frozen = new_adapters(stream(base.key, Use.ADAPTERS), sizes, options.lora), base.trained

    probability = options.batch / len(private)
    multiplier, epsilon = noise_multiplier(options, probability)
    longest = options.batch + 6 * math.isqrt(options.batch)
    length = -(-longest // options.microbatch) * options.microbatch  # longer samples are padded to a multiple of it
    gradient, optimizer = clipped(options, fun), optax.adam(options.learning_rate)
    stddev = multiplier * float(gradient.sensitivity(2 * length, sizes.dtype))
    take = jax.jit(private_step(gradient, optimizer, stddev, options.batch), donate_argnums=0)
    print(
        f"{len(private)} private windows, {count(trained)} parameters to train, {count(frozen)} frozen, "
        f"noise multiplier {multiplier:.3f}, held-out {held_out_loss(trained, frozen):.3f}",
        flush=True,
    )

    def step(state: State) -> tuple[State, jg.ClipInfo]:
        chosen = pad(poisson_sample(len(private), probability, generator(state, Use.SAMPLES)), length)
        return take(state, frozen, private[chosen], chosen >= 0)

    def report(done: int, state: State, info: jg.ClipInfo) -> None:
        value = info.values.sum() / jnp.maximum((info.norms > 0).sum(), 1)
        print(
            f"private {done:4d}   loss {value:.3f}   held-out {held_out_loss(state.trained, frozen):.3f}   "
            f"clipped {info.clipped_fraction:4.0%}   epsilon {epsilon(done):.2f}   {time.time() - start:5.0f} s",
            flush=True,
        )

    train(
        options.folder / "private", new_state(trained, optimizer, base.key), options.steps, options.every, step, report
    )


def train_publicly(
    options: argparse.Namespace, sizes: Sizes, fun: Any, public: np.ndarray, held_out_loss: Any
) -> State:
    """Train a new model with a plain gradient."""
    steps, seed = options.public_steps, secrets.randbits(64) if options.seed is None else options.seed
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps))
    take = jax.jit(public_step(optimizer, fun), donate_argnums=0)

    def step(state: State) -> tuple[State, jax.Array]:
        return take(state, None, public[generator(state, Use.PUBLIC_BATCHES).integers(0, len(public), PUBLIC_BATCH)])

    def report(done: int, state: State, value: jax.Array) -> None:
        print(f"public {done:5d}   loss {value:.3f}   held-out {held_out_loss(state.trained, None):.3f}", flush=True)

    key = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
    state = new_state(new_params(stream(key, Use.PARAMETERS), sizes), optimizer, key)
    return train(options.folder / "public", state, steps, 5 * options.every, step, report)


def count(tree: Any) -> int:
    """The number of parameters."""
    return sum(a.size for a in jax.tree.leaves(tree))


def poisson_sample(N: int, probability: float, rng: np.random.Generator) -> np.ndarray:
    """The indices of a batch: each example is in it with this probability."""
    from jax_privacy.batch_selection import CyclicPoissonSampling

    (chosen,) = CyclicPoissonSampling(sampling_prob=probability, iterations=1).batch_iterator(N, rng=rng)
    return chosen


def pad(chosen: np.ndarray, length: int) -> np.ndarray:
    """The indices, padded with -1 to this length, or to a multiple of it."""
    from jax_privacy.batch_selection import pad_to_multiple_of

    return pad_to_multiple_of(chosen, length) if len(chosen) else np.full(length, -1)


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters; 0: all parameters")
    parser.add_argument("--steps", type=int, default=200, help="private steps")
    parser.add_argument("--public-steps", type=int, default=500)
    parser.add_argument("--epsilon", type=float, default=3.0, help="spent by all private steps, at delta = 1e-5")
    parser.add_argument("--batch", type=int, default=256, help="the expected size of a private batch")
    parser.add_argument("--microbatch", type=int, default=32, help="examples that are processed at once")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, help="(2e-3; for adapters 5e-3)")
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--windows", type=int, help="use only so many private windows")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, help="for runs that can be repeated; without it the key is unpredictable")
    return parser


if __name__ == "__main__":
    options = command_line().parse_args()
    if options.learning_rate is None:
        options.learning_rate = 5e-3 if options.lora else 2e-3
    run(options)
