"""`Module`: a node of the model's tree whose attribute names are Hugging Face's module paths."""

from __future__ import annotations

from collections.abc import Iterator

from entrenar.ops.parts import Weight
from entrenar.quant import QTensor
from entrenar.tensor import Tensor


class Module:
    """Attributes that are Tensors or QTensors are weights; those that are Modules, or lists of them, are children."""

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each with its dotted path."""
        yield prefix, self
        for name, value in vars(self).items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(value, Module):
                yield from value.named_modules(path)
            elif isinstance(value, list):
                for i, child in enumerate(value):
                    yield from child.named_modules(f"{path}.{i}")

    def named_weights(self) -> Iterator[tuple[str, Weight]]:
        """Every weight with its dotted path; one that is shared (a tied head) comes once, under its first path."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor | QTensor) and id(value) not in seen:
                    seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value
