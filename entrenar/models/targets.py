"""Which layers and modules of a model an adapter's settings mean, and what is wrong with settings that mean none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from entrenar.errors import AdapterError
from entrenar.nn.lora import EMBEDDING, LoraConfig, within
from entrenar.nn.module import Module
from entrenar.ops.parts import Weight
from entrenar.quant import QTensor
from entrenar.tensor import Tensor

Layer = TypeVar("Layer")  # a module, or its shape where there is none yet
Held = TypeVar("Held")  # a weight, or its shape


def selected(layers: Mapping[str, Layer], config: LoraConfig) -> dict[str, Layer]:
    """Of the layers that can have an adapter, by path, those that get one.

    Raises:
        AdapterError: one of the targets gives none, or the embedding would get DoRA.
    """
    targets = config.target_modules
    for target in [(name,) for name in targets] if isinstance(targets, tuple) else [targets]:
        meant = list(filter(LoraConfig(target_modules=target).selects, layers))
        what = repr(target[0] if isinstance(target, tuple) else target)
        if not meant:
            names = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
            raise AdapterError(f"target_modules: {what} selects no linear layer; there are {names}")
        if any(map(config.selects, meant)):
            continue
        if saved := list(filter(config.saves, meant)):
            raise AdapterError(
                f"{saved[0]} is named by target_modules and by modules_to_save, which trains it whole; leave it to one"
            )
        raise AdapterError(f"exclude_modules and layers_to_transform leave nothing of target_modules: {what}")
    chosen = {path: layer for path, layer in layers.items() if config.selects(path)}
    if config.use_dora and EMBEDDING in chosen:
        raise AdapterError(f"{EMBEDDING}: use_dora is served on linear layers only")
    return chosen


def held_whole(model: Module, config: LoraConfig) -> dict[str, Weight]:
    """The weights that modules_to_save means, by path; those of a tied head under its own path as well.

    Raises:
        AdapterError: there is no module with weights of such a name.
    """
    weights = {
        path: {f"{path}.{kind}": value for kind, value in vars(module).items() if isinstance(value, Tensor | QTensor)}
        for path, module in model.named_modules()
    }
    return whole(weights, config)


def whole(weights: Mapping[str, Mapping[str, Held]], config: LoraConfig) -> dict[str, Held]:
    """The same of modules' weights by the module's path."""
    for name in config.modules_to_save or ():
        if not any(found and within(path, name) for path, found in weights.items()):
            raise AdapterError(f"modules_to_save: no module with weights is named {name!r}")
    held = (found for path, found in weights.items() if config.saves(path))
    return {name: weight for found in held for name, weight in found.items()}
