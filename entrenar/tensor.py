"""Tensor and the tape: an N-d array that remembers how it was computed, for gradients to flow back.

An operation is one function that returns its result and the way back, ``(out, vjp)``. The `op` decorator runs
it and, where an operand needs a gradient, puts a `Node` on the tape: the vjp (vector-Jacobian product) and
the parents. Nodes are numbered as they are made, so a consumer has a larger number than what it consumes, and
`backward` walks them from the largest down: no recursion, and a node has its whole gradient before it passes
it on. docs/autograd.md tells the same on one page, with the hazards.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import DTypeError, GraphError, ShapeError
from entrenar.random import default_rng, manual_seed

__all__ = [
    "OPS", "Array", "Tensor", "Vjp", "as_tensor", "checkpoint", "default_rng", "manual_seed", "no_grad", "op",
    "taping",
]

Array: TypeAlias = npt.NDArray[Any]
Operand: TypeAlias = "Tensor | npt.NDArray[Any] | np.number[Any] | float"
# What a vjp returns for an operand: g, a view of g, or memory that nobody else holds and that `backward` may add
# into; None where it needs no gradient; or, where adding to what is there costs less than making it, as for a few
# rows of a table, a function that returns the array it was given, with the gradient added, or a new one for None.
Gradient: TypeAlias = "Array | Callable[[Array | None], Array] | None"
Vjp: TypeAlias = Callable[[Array], Sequence[Gradient]]  # from g, the gradient of the result, one an operand
P = ParamSpec("P")

FLOAT32 = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF = (np.dtype(np.float16), BFLOAT16)
OPS: dict[str, Callable[..., Tensor]] = {}  # every operation by name; tests walk it


class Tensor:
    """An array on the tape.

    Attributes:
        data: float32 array of any strides, shared with the array given; for weights also bfloat16 and, where frozen,
            float16; bfloat16 for what flows through operations that serve it. A result on the tape is read-only,
            because a vjp may read it again.
        grad: what `backward` has accumulated (leaves only; f32 of a weight, whatever its type; contiguous, own
            memory), or None.
        requires_grad: whether `backward` should reach it.
        version: how often `data` of a leaf was written in place. Whoever writes (an optimizer) adds one; a
            backward through values from before the write is then a GraphError, not a wrong gradient.
    """

    __slots__ = ("__weakref__", "_node", "data", "grad", "requires_grad", "version")
    __array_ufunc__ = None  # ndarray + Tensor asks Tensor.__radd__
    backend = cpu

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        array = np.asarray(data.data if isinstance(data, Tensor) else data)
        if array.dtype not in (FLOAT32, *HALF) or not array.dtype.isnative:
            if array.dtype.kind not in "fiub":
                raise DTypeError(f"Tensor: data of type {array.dtype}; give real numbers")
            array = array.astype(FLOAT32)
        if requires_grad and array.dtype not in (FLOAT32, BFLOAT16):
            raise DTypeError(f"Tensor: {array.dtype} is frozen storage; float32 and bfloat16 can require a gradient")
        self.data: Array = array if array.flags.aligned else array.copy()
        self.grad: Tensor | None = None
        self.requires_grad = requires_grad
        self.version = 0
        self._node: Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def is_leaf(self) -> bool:
        """Whether it was given, not computed on the tape."""
        return self._node is None

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def numpy(self) -> Array:
        """The data itself, not a copy."""
        return self.data

    # A weight is a Tensor or a QTensor (entrenar/quant); both have the next three.

    def dense(self, dtype: npt.DTypeLike = FLOAT32) -> Array:
        """The values as `dtype`: the data itself where it is that."""
        return self.data.astype(dtype, copy=False)

    def rows(self, ids: Array, dtype: npt.DTypeLike = FLOAT32) -> Array:
        """Rows of a matrix (V, D) by id: (*ids.shape, D), "f32" or bf16. DataError for an id outside 0 … V - 1."""
        return cpu.embedding(np.ascontiguousarray(self.data), ids, dtype)

    def source_bytes(self) -> Array:
        """The values as they lie in memory, uint8 (bytes,)."""
        return np.ascontiguousarray(self.data).reshape(-1).view(np.uint8)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self.data, dtype=dtype, copy=copy)

    def item(self) -> float:
        if self.size != 1:
            raise ShapeError(f"item: one element is needed, the tensor has shape {self.shape}")
        return float(self.data.reshape(()))

    def detach(self) -> Tensor:
        """The same data, off the tape."""
        return _wrap(self.data)

    def __repr__(self) -> str:
        text = np.array2string(self.data, separator=", ", prefix="Tensor(", threshold=100)
        return f"Tensor({text}, shape={self.shape}{', requires_grad=True' if self.requires_grad else ''})"

    def pow(self, exponent: Operand) -> Tensor:
        return self**exponent

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self.shape[0]))

    def backward(self, grad: Operand | None = None) -> None:
        """Add d(self · grad)/d(leaf) to the `.grad` of each leaf that requires it, and free the graph.

        grad: same shape as self, float32 or self's type; may be left out for a single element (then 1).

        Raises:
            GraphError: nothing here requires a gradient, a part of the graph was freed by an earlier
                backward, or a leaf was written in place since the forward pass. No gradient is changed then.
            ShapeError: `grad` is missing or of another shape.
        """
        if not self.requires_grad:
            raise GraphError("backward: neither this tensor nor anything it came from requires a gradient")
        if grad is None and self.size != 1:
            raise ShapeError(f"backward: a tensor of shape {self.shape} needs a grad of that shape")
        g = np.ones(self.shape, FLOAT32) if grad is None else as_tensor(grad).data
        if g.shape != self.shape:
            raise ShapeError(f"backward: grad has shape {g.shape}, the tensor {self.shape}")
        if g.dtype not in (FLOAT32, self.dtype):
            raise DTypeError(f"backward: grad is {g.dtype}; give float32")
        _backward(self, g if g.dtype == self.dtype else cpu.convert(g, self.dtype))

    if TYPE_CHECKING:  # attached by the operations in entrenar.ops, see `op`

        def __add__(self, other: Operand) -> Tensor: ...
        def __radd__(self, other: Operand) -> Tensor: ...
        def __sub__(self, other: Operand) -> Tensor: ...
        def __rsub__(self, other: Operand) -> Tensor: ...
        def __mul__(self, other: Operand) -> Tensor: ...
        def __rmul__(self, other: Operand) -> Tensor: ...
        def __truediv__(self, other: Operand) -> Tensor: ...
        def __rtruediv__(self, other: Operand) -> Tensor: ...
        def __pow__(self, other: Operand) -> Tensor: ...
        def __rpow__(self, other: Operand) -> Tensor: ...
        def __matmul__(self, other: Operand) -> Tensor: ...
        def __rmatmul__(self, other: Operand) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __getitem__(self, key: Any) -> Tensor: ...
        def exp(self) -> Tensor: ...
        def log(self) -> Tensor: ...
        def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: int | tuple[int, ...]) -> Tensor: ...
        def transpose(self, *axes: int | tuple[int, ...]) -> Tensor: ...


def as_tensor(value: Operand) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value)


def _wrap(data: Array) -> Tensor:
    """A Tensor around an array that is known to be right; skips the checks of Tensor()."""
    tensor = Tensor.__new__(Tensor)
    tensor.data, tensor.grad, tensor.requires_grad, tensor.version, tensor._node = data, None, False, 0, None
    return tensor


# ---- the tape ----------------------------------------------------------------------------------------------


class Node:
    """One operation on the tape. It keeps its parents' nodes, not their values: a vjp keeps what it reads."""

    __slots__ = ("name", "number", "parents", "versions", "vjp")
    _numbers = count()

    def __init__(self, name: str, operands: Sequence[Tensor], vjp: Vjp | None) -> None:
        self.name = name
        self.number = next(Node._numbers)
        # a leaf is its own parent entry; an operand that needs no gradient is None
        self.parents = [(t._node or t) if t.requires_grad else None for t in operands]
        self.versions = [t.version for t in operands]
        self.vjp = vjp  # None once used


class _Mode(threading.local):
    """What operations of this thread leave behind."""

    taping = True  # nodes
    outside: dict[Tensor, None] | None = None  # in `checkpoint`: no nodes, but what came from outside


_mode = _Mode()
_INSIDE = Node("checkpoint", [], None)  # of every value that lives only inside a checkpoint


@contextmanager
def _set_mode(taping: bool, outside: dict[Tensor, None] | None = None) -> Iterator[None]:
    before = _mode.taping, _mode.outside
    _mode.taping, _mode.outside = taping, outside
    try:
        yield
    finally:
        _mode.taping, _mode.outside = before


def no_grad() -> Any:
    """``with no_grad():`` or ``@no_grad()``: operations of this thread leave nothing on the tape."""
    return _set_mode(False)


def taping() -> bool:
    """Whether this thread keeps ways back now: not in `no_grad`, nor in the first run of a `checkpoint`."""
    return _mode.taping


def op(
    *,
    method: str | None = None,
    reflected: str | None = None,
    half: tuple[str, ...] = (),
    flow: tuple[str, ...] = (),
) -> Callable[[Callable[P, tuple[Array, Vjp]]], Callable[P, Tensor]]:
    """Make an operation of a function that returns ``(out, vjp)``, and enter it into OPS under its name.

    Its operands are the arguments that are Tensors, or Tensors inside lists and tuples; `vjp` returns one
    gradient for each, in the order of the signature. Leading parameters annotated as Tensor also take numbers
    and arrays.

    method, reflected: names under which Tensor gets it as a method, as it is and with two operands exchanged.
    half: parameters that may be 16-bit storage of frozen weights.
    flow: parameters that may be bfloat16 instead of float32, all of one call the same. The others are float32.
    """

    def decorate(fn: Callable[P, tuple[Array, Vjp]]) -> Callable[P, Tensor]:
        name = fn.__name__
        parameters = inspect.signature(fn).parameters
        names = tuple(parameters)
        kinds = [getattr(p.annotation, "__name__", str(p.annotation)) for p in parameters.values()]
        leading = next((i for i, kind in enumerate(kinds) if not kind.startswith("Tensor")), len(kinds))
        types = [(FLOAT32, *HALF) if n in half else (FLOAT32, BFLOAT16)[: 1 + (n in flow)] for n in names]

        @wraps(fn)
        def operation(*given: Any, **named: Any) -> Tensor:
            args = list(given)
            operands: list[Tensor] = []
            flowing = set()
            for i, parameter in enumerate(names):
                value = args[i] if i < len(args) else named.get(parameter)
                if value is None:
                    continue
                first = len(operands)
                if isinstance(value, Tensor):
                    operands.append(value)
                elif i < leading:
                    operands.append(Tensor(value))
                    if i < len(args):
                        args[i] = operands[-1]
                    else:
                        named[parameter] = operands[-1]
                elif isinstance(value, (tuple, list)):
                    _collect(value, operands)
                for tensor in operands[first:]:
                    dtype = tensor.data.dtype
                    if dtype not in types[i]:
                        raise DTypeError(f'{name}: {parameter} is {dtype}; give float32, see ops.cast(x, "f32")')
                    if parameter in flow:
                        flowing.add(dtype)
            if len(flowing) > 1:
                both = " and ".join(flow)
                raise DTypeError(f'{name}: {both} are float32 and bfloat16; ops.cast(x, "f32"|"bf16") makes them one')
            out, vjp = fn(*args, **named)
            return _record(name, operands, out, vjp)

        if method:
            setattr(Tensor, method, operation)
        if reflected:
            setattr(Tensor, reflected, lambda self, other: operation(other, self))
        OPS[name] = operation
        return operation

    return decorate


def _collect(values: Iterable[Any], into: list[Tensor]) -> None:
    """Append the Tensors inside nested lists and tuples, in order."""
    for value in values:
        if isinstance(value, Tensor):
            into.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, into)


def _record(name: str, operands: Sequence[Tensor], out: Array, vjp: Vjp) -> Tensor:
    """The result of an operation, on the tape where an operand needs a gradient and this thread records."""
    result = _wrap(out)
    outside = _mode.outside
    if (_mode.taping or outside is not None) and any(t.requires_grad for t in operands):
        result.requires_grad = True
        if outside is not None:
            outside.update((t, None) for t in operands if t.requires_grad and t._node is not _INSIDE)
            result._node = _INSIDE
        else:
            result._node = Node(name, operands, vjp)
            out.flags.writeable = False  # a vjp may read it again
    return result


def _graph(root: Node, since: int) -> list[Node]:
    """Root and all nodes below it that are not older than `since`, in the order of their making.

    Raises before anything is computed if one of them can't be used.
    """
    seen, todo = {root}, [root]
    while todo:
        node = todo.pop()
        if node.vjp is None:
            raise GraphError(
                f"backward: the graph was freed at {node.name!r}, by an earlier backward or in a "
                "checkpoint; run the forward pass again, or add the losses and call backward once"
            )
        for parent, version in zip(node.parents, node.versions, strict=True):
            if isinstance(parent, Node):
                if parent not in seen and parent.number >= since:
                    seen.add(parent)
                    todo.append(parent)
            elif parent is not None and parent.version != version:
                raise GraphError(
                    f"backward: a tensor of shape {parent.shape} that {node.name!r} read was written in "
                    "place since; run the forward pass again"
                )
    return sorted(seen, key=lambda node: node.number)


def _backward(root: Tensor, g: Array, since: int = 0) -> dict[Node, tuple[Array, bool]]:
    """Send g down the graph to the leaves. What reaches nodes older than `since` is returned.

    With each gradient goes whether it is ours to add into, that is, nobody else holds the array.
    """
    if root._node is None:
        _add_to_leaf(root, g, False)
        return {}
    pending = {root._node: (g, False)}
    nodes = _graph(root._node, since) if root._node.number >= since else []
    while nodes:
        node = nodes.pop()
        vjp, parents = node.vjp, node.parents
        node.vjp, node.parents, node.versions = None, [], []
        if vjp is None or node not in pending:
            continue  # every consumer answered None
        g, _ = pending.pop(node)
        for parent, d in zip(parents, vjp(g), strict=True):
            if parent is None or d is None:
                continue
            if callable(d):
                held = _held(parent, pending)
                if held is not None and np.may_share_memory(held, g):
                    held = None
                d = d(held)
                if d is held:
                    continue
            ours = d.flags.carray and not np.may_share_memory(d, g)
            if isinstance(parent, Tensor):
                _add_to_leaf(parent, d, ours)
            elif parent in pending:
                pending[parent] = (_sum(*pending[parent], d, ours), True)
            else:
                pending[parent] = (d, ours)
    return pending


def _held(parent: Node | Tensor, pending: dict[Node, tuple[Array, bool]]) -> Array | None:
    """The gradient that has reached a parent so far, where it is ours to add into."""
    if isinstance(parent, Tensor):
        return None if parent.grad is None else parent.grad.data
    held, ours = pending.get(parent, (None, False))
    return held if ours else None


def _sum(held: Array, held_is_ours: bool, d: Array, d_is_ours: bool = False) -> Array:
    """held + d, in the memory of one of them where it is ours to write."""
    if not held_is_ours:
        if not d_is_ours:
            return cpu.binary("add", held, d)
        held, d = d, held
    cpu.add_(held, d if d.flags.c_contiguous else cpu.copy(d))
    return held


def _add_to_leaf(leaf: Tensor, d: Array, ours: bool) -> None:
    if leaf.grad is None:
        leaf.grad = _wrap(d if ours else cpu.copy(d))
    else:
        _sum(leaf.grad.data, True, d)


# ---- computing again instead of storing --------------------------------------------------------------------


def checkpoint(fn: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``fn(*args, **kwargs)``, storing only the arguments: backward runs it again, random numbers included.

    Gradients reach the Tensors in `args` and whatever else fn uses, the parameters of modules for example.
    What fn computes must come out as its result, one Tensor: values that it leaves elsewhere have no way
    back.
    """
    if not _mode.taping:
        return fn(*args, **kwargs)
    rng = default_rng.state_dict()
    outside: dict[Tensor, None] = {}
    with _set_mode(False, outside):
        out = fn(*args, **kwargs)
    if not isinstance(out, Tensor):
        raise GraphError(f"checkpoint: the function returned {type(out).__name__}; it must return one Tensor")
    if out._node is not _INSIDE:
        return out  # nothing was computed that needs a gradient
    nodes = [t._node for t in outside]

    def vjp(g: Array) -> list[Array | None]:
        inputs = [_argument(a) if isinstance(a, Tensor) else a for a in args]
        since = next(Node._numbers)
        with default_rng.replay(rng), _set_mode(True):
            again = fn(*inputs, **kwargs)
        beyond = _backward(again, g, since)
        sources = [a._node for a in inputs if isinstance(a, Tensor)] + nodes
        # one array may have reached two of them; what is g is told from it by the walk outside
        found = [beyond.get(n) if n else None for n in sources]  # leaves outside already have theirs
        return [f and (f[0] if f[1] or np.may_share_memory(f[0], g) else cpu.copy(f[0])) for f in found]

    return _record("checkpoint", [*(a for a in args if isinstance(a, Tensor)), *outside], out.data, vjp)


def _argument(tensor: Tensor) -> Tensor:
    """The same data with a node of its own, where the walk over a second run ends."""
    argument = tensor.detach()
    if tensor.requires_grad:
        argument.requires_grad, argument._node = True, Node("argument", [], None)
    return argument
