"""The operations: each is one function with its way back. Importing this package gives Tensor its methods."""

from entrenar.ops.activation import gelu, relu, silu, softmax, swiglu, swish
from entrenar.ops.arithmetic import add, div, exp, log, mean, mul, neg, pow, sub, sum
from entrenar.ops.attention import attention, rope
from entrenar.ops.dropout import dropout
from entrenar.ops.embedding import embedding
from entrenar.ops.loss import cross_entropy
from entrenar.ops.matmul import linear, matmul
from entrenar.ops.norm import layer_norm, rms_norm
from entrenar.ops.shape import concat, reshape, slice, transpose
from entrenar.tensor import Tensor

__all__ = [
    "Tensor", "add", "attention", "concat", "cross_entropy", "div", "dropout", "embedding", "exp", "gelu",
    "layer_norm", "linear", "log", "matmul", "mean", "mul", "neg", "pow", "relu", "reshape", "rms_norm",
    "rope", "silu", "slice", "softmax", "sub", "sum", "swiglu", "swish", "transpose",
]
