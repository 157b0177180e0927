"""The operations: each is one function with its way back. Importing this package gives Tensor its methods."""

from entrenar.ops.activation import gated, gelu, relu, silu, softmax, swiglu, swish
from entrenar.ops.affine import affine
from entrenar.ops.arithmetic import add, div, exp, log, mean, mul, neg, pow, sub, sum
from entrenar.ops.attention import attention, rope, rope_attention
from entrenar.ops.cast import cast
from entrenar.ops.dropout import dropout
from entrenar.ops.embedding import embedding
from entrenar.ops.linear import Lora, Part, linear, projection
from entrenar.ops.loss import cross_entropy, linear_cross_entropy
from entrenar.ops.matmul import matmul
from entrenar.ops.norm import layer_norm, rms_norm
from entrenar.ops.shape import concat, reshape, slice, transpose
from entrenar.tensor import Tensor

__all__ = [
    "Lora", "Part", "Tensor", "add", "affine", "attention", "cast", "concat", "cross_entropy", "div", "dropout",
    "embedding", "exp", "gated", "gelu", "layer_norm", "linear", "linear_cross_entropy", "log", "matmul", "mean",
    "mul", "neg", "pow", "projection", "relu", "reshape", "rms_norm", "rope", "rope_attention", "silu", "slice",
    "softmax", "sub", "sum", "swiglu", "swish", "transpose",
]
