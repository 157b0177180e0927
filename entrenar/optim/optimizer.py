"""What every optimizer shares: named parameters, step counts, and a state that can be saved and put back exactly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from entrenar.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from entrenar.random import default_rng
from entrenar.tensor import BFLOAT16, FLOAT32, Tensor

Array = npt.NDArray[Any]
Layout = Mapping[str, tuple[tuple[int, ...], type[np.generic]]]  # of a parameter's state: name -> shape, dtype


class Optimizer(ABC):
    """Base of `SGD`, `Adam` and `AdamW`.

    A subclass describes a parameter's state arrays in `_layout` and updates all parameters in `_update`. State is
    made at a parameter's first gradient, of zeros; a parameter without a gradient is left as it is. Parameters in
    bfloat16 are stepped in f32 and rounded stochastically, with the random numbers of `default_rng`.

    Args:
        params: Tensors, or (name, Tensor) pairs; unnamed ones are called "0", "1", …
        lr: learning rate, used by `step()` unless that is given another.

    Raises:
        ConfigError: no parameter, one that comes twice or can't be written in place, or an impossible number.
        DTypeError: a parameter that is neither f32 nor bf16.
    """

    def __init__(self, params: Iterable[Tensor | tuple[str, Tensor]], lr: float) -> None:
        self.params: dict[str, Tensor] = {}
        for i, item in enumerate(params):
            name, tensor = item if isinstance(item, tuple) else (str(i), item)
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise DTypeError(f"{type(self).__name__}: parameter {name} is of type {kind}, not a Tensor")
            if tensor.data.dtype not in (FLOAT32, BFLOAT16):
                kind = f"{tensor.data.dtype}, not float32 or bfloat16"
                raise DTypeError(f"{type(self).__name__}: parameter {name} is {kind}")
            if not (tensor.data.flags.c_contiguous and tensor.data.flags.writeable):
                raise ConfigError("params", f"{name} is a view or read-only memory; give it an array of its own")
            if name in self.params:
                raise ConfigError("params", f"two parameters are named {name!r}")
            self.params[name] = tensor
        if not self.params:
            raise ConfigError("params", "is empty; nothing is trainable")
        if len({id(tensor) for tensor in self.params.values()}) < len(self.params):
            raise ConfigError("params", "holds the same Tensor twice; it would be stepped twice")
        self.lr = number("lr", lr)
        self._factors: dict[str, float] = {}
        self.steps: dict[str, int] = dict.fromkeys(self.params, 0)
        self.state: dict[str, dict[str, Array]] = {}

    def set_factors(self, factors: Mapping[str, float]) -> None:
        """Lets these parameters step with a multiple of the learning rate, as LoRA+ does; the others with the rate.

        Raises:
            ConfigError: there is no such parameter, or a factor is no number of at least 0.
        """
        for name in factors:
            if name not in self.params:
                raise ConfigError("factors", f"there is no parameter {name!r}")
        self._factors = {name: number(f"factors[{name}]", factor) for name, factor in factors.items()}

    def step(self, lr: float | None = None, scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, in place, in one native call for all of one rate.

        Args:
            lr: default: the constructor's.
            scale: gradients count as if multiplied by it (`clip_scale` finds it); they are not written.

        Raises:
            ShapeError: a gradient is of another shape than its parameter. Nothing is changed then.
        """
        rate = self.lr if lr is None else number("lr", lr)
        factor = number("scale", scale)
        ready = {name: tensor for name, tensor in self.params.items() if tensor.grad is not None}
        grads = [tensor.grad.data for tensor in ready.values() if tensor.grad is not None]
        for (name, tensor), grad in zip(ready.items(), grads, strict=True):
            if grad.shape != tensor.data.shape:
                raise ShapeError(
                    f"{type(self).__name__}.step: gradient of {name} is {grad.shape}, the parameter is "
                    f"{tensor.data.shape}"
                )
        for name, tensor in ready.items():
            if name not in self.state:
                layout = self._layout(tensor.data)
                self.state[name] = {slot: np.zeros(shape, dtype) for slot, (shape, dtype) in layout.items()}
            self.steps[name] += 1
            tensor.version += 1  # the tape refuses a backward through values from before this write
        by_rate: dict[float, list[str]] = {}
        for name in ready:
            by_rate.setdefault(rate * self._factors.get(name, 1.0), []).append(name)
        gradient = dict(zip(ready, grads, strict=True))
        for own, names in by_rate.items():
            self._update(names, [ready[n].data for n in names], [gradient[n] for n in names], own, factor)

    @abstractmethod
    def _layout(self, data: Array) -> Layout:
        """What a parameter's state consists of."""

    @abstractmethod
    def _update(self, names: list[str], data: list[Array], grads: list[Array], lr: float, scale: float) -> None:
        """Writes the parameters and their state in place; their `steps` count this one already."""

    @staticmethod
    def _random(data: list[Array]) -> list[tuple[int, int] | None]:
        """Where the random numbers for rounding each bf16 parameter begin: 128 for each begun 256 elements."""
        return [default_rng.take(-(-array.size // 256) * 128) if array.dtype == BFLOAT16 else None for array in data]

    def _slot(self, names: list[str], slot: str) -> list[Any]:
        """That array of each parameter's state, None where it has none."""
        return [self.state[name].get(slot) for name in names]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in self.params.values():
            tensor.grad = None

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """{"kind": class name, "steps": {parameter: count}, "arrays": {"parameter:slot": array}}.

        Hyper-parameters are not part of it: they belong to the run's configuration. With ``copy=False`` the
        arrays are the live ones, which the next step changes.
        """
        arrays = {
            f"{name}:{slot}": array.copy() if copy else array
            for name, slots in self.state.items()
            for slot, array in slots.items()
        }
        return {"kind": type(self).__name__, "steps": dict(self.steps), "arrays": arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, bit for bit.

        Raises:
            CheckpointError: it is another optimizer's, or its parameters differ from ours. Nothing is changed then.
        """
        kind = state.get("kind")
        if kind != type(self).__name__:
            raise CheckpointError(f"optimizer state is of {kind}, this optimizer is {type(self).__name__}")
        if set(state["steps"]) != set(self.params):
            odd = sorted(set(state["steps"]) ^ set(self.params))
            raise CheckpointError(f"optimizer state has other parameters; {odd[0]} is on one side only")
        loaded: dict[str, dict[str, Array]] = {}
        layouts = {name: self._layout(tensor.data) for name, tensor in self.params.items()}
        for key, array in state["arrays"].items():
            name, _, slot = key.rpartition(":")
            if slot not in layouts.get(name, ()):
                raise CheckpointError(f"optimizer state has an unknown array {key}")
            shape, dtype = layouts[name][slot]
            if array.shape != shape or array.dtype != dtype:
                raise CheckpointError(
                    f"optimizer state {key} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}"
                )
            loaded.setdefault(name, {})[slot] = np.array(array, dtype, order="C")
        for name, count in state["steps"].items():
            if (count > 0 and loaded.get(name, {}).keys() != layouts[name].keys()) or count < 0:
                raise CheckpointError(f"optimizer state of {name} is incomplete: {count} steps")
        self.steps = {name: int(state["steps"][name]) for name in self.params}
        self.state = loaded


def number(field: str, value: float, low: float = 0.0, below: float = math.inf) -> float:
    """`value` where it is a finite number in [low, below), else a ConfigError that names `field`."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ConfigError(field, f"{value!r} is not a number")
    if not math.isfinite(value) or not low <= value < below:
        span = f"of at least {low:g}" if below == math.inf else f"from {low:g} to below {below:g}"
        raise ConfigError(field, f"{value!r} is not a finite number {span}")
    return float(value)
