"""The models of `benchmarks.models` in torch with the same weights, and the names of their parameters in JAX."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The permutation of an array's axes from JAX to torch. The one from torch to JAX is its inverse.
AXES: dict[str, tuple[int, ...]] = {"": (), "matrix": (1, 0), "kernel": (3, 2, 0, 1), "image": (0, 3, 1, 2)}
ParameterMap = Mapping[str, tuple[str, str]]  # path in JAX: (name in torch, key in AXES)


@dataclasses.dataclass
class Problem:
    """A model with its weights, a batch, and the inputs of the quantities.

    Attributes:
        model: inputs [B, …] → outputs [B, …].
        inputs, targets: the batch.
        losses: (outputs, targets) → [B].
        mapping: the name of each parameter in torch, by its path in JAX.
        bound: the norm that gradients are clipped to.
        direction: the vector for matrix-vector products, by the names of the parameters in torch.
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    losses: Callable[[Tensor, Tensor], Tensor]
    mapping: ParameterMap
    bound: float
    direction: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name. A tied parameter appears once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def to_jax(self, tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Tensors with the parameters' shapes, by their paths in JAX and with JAX's order of axes."""
        return {path: to_numpy(tensors[name].detach(), layout) for path, (name, layout) in self.mapping.items()}


def problem(kind: str, arrays: Mapping[str, np.ndarray]) -> Problem:
    """The problem that the arrays from `theme` describe."""
    params = {k.removeprefix("params "): a for k, a in arrays.items() if k.startswith("params ")}
    model, mapping = MODELS[kind](params)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, (name, layout) in mapping.items():
            parameters[name].copy_(to_torch(params[path], layout))
    inputs = to_torch(arrays["batch 0"], "image" if arrays["batch 0"].ndim == 4 else "")
    targets = to_torch(arrays["batch 1"], "").long() if "batch 1" in arrays else inputs
    losses = LOSSES.get(kind, cross_entropies)
    if kind == "language_model":
        inputs, targets = inputs[:, :-1], inputs[:, 1:].long()
    direction = {name: to_torch(arrays[f"direction {path}"], layout) for path, (name, layout) in mapping.items()}
    return Problem(model, inputs, targets, losses, mapping, float(arrays["bound"]), direction)


def to_torch(array: np.ndarray, layout: str) -> Tensor:
    return torch.from_numpy(np.array(np.transpose(array, AXES[layout]) if layout else array, order="C"))


def to_numpy(tensor: Tensor, layout: str) -> np.ndarray:
    return np.transpose(tensor.numpy(), np.argsort(AXES[layout])) if layout else tensor.numpy()


def cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each example, averaged over its positions."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses if targets.ndim == 1 else losses.unflatten(0, targets.shape).mean(1)


def mean_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs**2).flatten(1).mean(1)


LOSSES = {"transformer": mean_squares}


def mlp(params: Mapping[str, np.ndarray]) -> tuple[nn.Module, ParameterMap]:
    layers: list[nn.Module] = []
    mapping: dict[str, tuple[str, str]] = {}
    for k in range(len(params) // 2):
        mapping |= {f"[{k}]['W']": (f"{2 * k}.weight", "matrix"), f"[{k}]['b']": (f"{2 * k}.bias", "")}
        layers += [nn.Linear(*params[f"[{k}]['W']"].shape), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), mapping


def conv_net(params: Mapping[str, np.ndarray]) -> tuple[nn.Module, ParameterMap]:
    """The conv net. With stride 2, JAX's SAME pads an even size only at the bottom and on the right."""
    layers: list[nn.Module] = []
    mapping: dict[str, tuple[str, str]] = {}
    for k, stride in ((1, 1), (2, 2), (3, 2)):
        _, _, inputs, outputs = params[f"['k{k}']"].shape
        layers += [nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.ZeroPad2d(1)]
        mapping |= {f"['k{k}']": (f"{len(layers)}.weight", "kernel"), f"['b{k}']": (f"{len(layers)}.bias", "")}
        layers += [nn.Conv2d(inputs, outputs, 3, stride), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(*params["['W']"].shape)]
    last = len(layers) - 1
    return nn.Sequential(*layers), mapping | {"['W']": (f"{last}.weight", "matrix"), "['b']": (f"{last}.bias", "")}


class Embedding(nn.Module):
    def __init__(self, params: Mapping[str, np.ndarray]):
        super().__init__()
        self.table = nn.Embedding(*params["['E']"].shape)
        self.out = nn.Linear(*params["['W']"].shape, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(ids).mean(1)))


def embedding(params: Mapping[str, np.ndarray]) -> tuple[nn.Module, ParameterMap]:
    return Embedding(params), {"['E']": ("table.weight", ""), "['W']": ("out.weight", "matrix")}


def layer_norm_without_bias(D: int) -> nn.Module:
    """A layer norm whose bias stays 0, because Opacus fails on a layer norm that has none."""
    norm = nn.LayerNorm(D)
    norm.bias.requires_grad_(False)
    return norm


class Block(nn.Module):
    def __init__(self, D: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = layer_norm_without_bias(D), layer_norm_without_bias(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in self.qkv(self.norm_1(h)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm_2(h)), approximate="tanh"))


def block_mapping(path: str = "", name: str = "") -> ParameterMap:
    mapping = {f"{path}['{w}']": (f"{name}{w}.weight", "matrix") for w in ("qkv", "out", "up", "down")}
    mapping |= {f"{path}['scale_{k}']": (f"{name}norm_{k}.weight", "") for k in (1, 2)}
    return mapping | {f"{path}['b_{w}']": (f"{name}{w}.bias", "") for w in ("up", "down")}


def transformer(params: Mapping[str, np.ndarray]) -> tuple[nn.Module, ParameterMap]:
    return Block(len(params["['out']"])), block_mapping()


class GRU(nn.Module):
    """A GRU made of two linear layers, because torch's GRU has a second bias."""

    def __init__(self, H: int):
        super().__init__()
        self.x, self.h = nn.Linear(H, 3 * H), nn.Linear(H, 3 * H, bias=False)
        self.out = nn.Linear(H, 10, bias=False)

    def forward(self, xs: Tensor) -> Tensor:
        h = xs.new_zeros(xs.shape[0], xs.shape[2])
        for x in self.x(xs).unbind(1):
            (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), self.h(h).chunk(3, -1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        return self.out(h)


def gru(params: Mapping[str, np.ndarray]) -> tuple[nn.Module, ParameterMap]:
    matrices = {f"['{w}']": (f"{w}.weight", "matrix") for w in ("x", "h", "out")}
    return GRU(len(params["['h']"])), matrices | {"['b']": ("x.bias", "")}


class LanguageModel(nn.Module):
    """A language model whose embedding table is also the last layer's matrix."""

    def __init__(self, V: int, D: int, blocks: int):
        super().__init__()
        self.table, self.out = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.out.weight = self.table.weight
        self.blocks = nn.Sequential(*(Block(D) for _ in range(blocks)))
        self.norm = layer_norm_without_bias(D)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.out(self.norm(self.blocks(h * math.sqrt(h.shape[-1]))))


def language_model(params: Mapping[str, np.ndarray]) -> tuple[nn.Module, ParameterMap]:
    blocks = len({path.split("]")[1] for path in params if path.startswith("['blocks']")})
    mapping = {"['E']": ("table.weight", ""), "['scale']": ("norm.weight", "")}
    for k in range(blocks):
        mapping |= block_mapping(f"['blocks'][{k}]", f"blocks.{k}.")
    V, D = params["['E']"].shape
    return LanguageModel(V, D, blocks), mapping


MODELS: dict[str, Callable[[Any], tuple[nn.Module, ParameterMap]]] = {
    "mlp": mlp,
    "conv_net": conv_net,
    "embedding": embedding,
    "transformer": transformer,
    "gru": gru,
    "language_model": language_model,
}
