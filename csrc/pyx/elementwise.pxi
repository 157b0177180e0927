# Elementwise operations, reductions and conversions: any strides in, C-contiguous out.

cdef dict UNARY = {
    "neg": EN_NEG, "exp": EN_EXP, "log": EN_LOG, "relu": EN_RELU, "gelu": EN_GELU, "gelu_tanh": EN_GELU_TANH,
    "silu": EN_SILU,
}
cdef dict BINARY = {"add": EN_ADD, "sub": EN_SUB, "mul": EN_MUL, "div": EN_DIV, "pow": EN_POW}


cdef int named(dict table, object name, str kind) except -1:
    found = table.get(name)
    if found is None:
        raise UsageError(f"{kind}: no operation {name!r}; it is one of {', '.join(table)}")
    return found


cdef int same_shape(cnp.ndarray a, cnp.ndarray b, str op, str name_a, str name_b) except -1:
    if shape_of(a) != shape_of(b):
        raise ShapeError(f"{op}: {name_a} has shape {shape_of(a)}, {name_b} {shape_of(b)}; they must be the same")
    return 0


cdef int view(cnp.ndarray a, tuple shape, str op, en_view *v) except -1:
    """a, broadcast to `shape`: missing and repeated dimensions get stride 0."""
    cdef int ndim = len(shape), own = cnp.PyArray_NDIM(a), i, k
    weight_type(a, op, "x", &v.type)
    if ndim > EN_MAX_DIMS:
        raise ShapeError(f"{op}: {ndim} dimensions are too many, shape {shape}; at most {<int>EN_MAX_DIMS}")
    v.data = cnp.PyArray_DATA(a)
    v.ndim = ndim
    for i in range(ndim):
        k = i - (ndim - own)
        v.shape[i] = shape[i]
        v.stride[i] = cnp.PyArray_STRIDE(a, k) // size_of(v.type) if k >= 0 and cnp.PyArray_DIM(a, k) != 1 else 0
    return 0


cdef tuple broadcast_shape(cnp.ndarray a, cnp.ndarray b, str op):
    cdef tuple sa = shape_of(a), sb = shape_of(b)
    cdef int i, na = len(sa), nb = len(sb)
    if sa == sb:
        return sa
    shape = list(sa) if na >= nb else list(sb)
    for i in range(1, min(na, nb) + 1):
        if sa[na - i] != sb[nb - i] and sa[na - i] != 1 and sb[nb - i] != 1:
            raise ShapeError(f"{op}: shapes {sa} and {sb} do not broadcast")
        shape[len(shape) - i] = sb[nb - i] if sa[na - i] == 1 else sa[na - i]
    return tuple(shape)


cdef cnp.ndarray copy_as(cnp.ndarray a, en_dtype type, int typenum, str op):
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray y = empty(shape_of(a), typenum, op)
    cdef en_view v
    cdef en_status status
    view(a, shape_of(a), op, &v)
    with nogil:
        status = k.copy(&v, type, cnp.PyArray_DATA(y))
    check(status, op, 0, bytes_of(a) + bytes_of(y), type, cnp.PyArray_SIZE(a))
    return y


def copy(x):
    """A C-contiguous copy of x (f32 or bf16, any strides)."""
    cdef en_dtype type
    cdef cnp.ndarray a = flowing(x, "copy", "x", &type)
    return copy_as(a, type, cnp.PyArray_TYPE(a), "copy")


def unary(name, x):
    """neg, exp, log, relu, gelu (erf), gelu_tanh or silu of x (f32 or bf16, any strides), elementwise."""
    cdef const en_kernels *k = kernels()
    cdef en_unary op = <en_unary>named(UNARY, name, "unary")
    cdef en_dtype type
    cdef cnp.ndarray a = flowing(x, name, "x", &type)
    cdef cnp.ndarray y = empty(shape_of(a), cnp.PyArray_TYPE(a), name)
    cdef en_view v
    cdef en_status status
    view(a, shape_of(a), name, &v)
    with nogil:
        status = k.unary(op, &v, cnp.PyArray_DATA(y))
    check(status, name, 0, 2 * bytes_of(a), v.type, cnp.PyArray_SIZE(a))
    return y


def unary_backward(name, x, g):
    """g times the derivative of `unary(name, .)` at x; both of one shape and type."""
    cdef const en_kernels *k = kernels()
    cdef en_unary op = <en_unary>named(UNARY, name, "unary_backward")
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(x, name, "x", &type)), b = packed(alike(g, a, name, "g", "x"))
    same_shape(a, b, name, "x", "g")
    cdef cnp.ndarray dx = empty(shape_of(a), cnp.PyArray_TYPE(a), name)
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.unary_backward(op, type, n, cnp.PyArray_DATA(a), cnp.PyArray_DATA(b), cnp.PyArray_DATA(dx))
    check(status, name, 0, 3 * bytes_of(a), type, n)
    return dx


cdef bint is_number(object x):
    return isinstance(x, (int, float, np.floating))


cdef cnp.ndarray operand(object x, object other, str op, str name):
    """x as an array; a number is one of no dimensions and of the other operand's type."""
    cdef en_dtype type
    if is_number(x):
        x = np.asarray(x, ml_dtypes.bfloat16 if getattr(other, "dtype", None) == ml_dtypes.bfloat16 else np.float32)
    return flowing(x, op, name, &type)


def binary(name, a, b):
    """a add|sub|mul|div|pow b (both f32 or both bf16, of any strides, or numbers) with NumPy's broadcasting, rounded
    once. Raises ShapeError naming both shapes, DTypeError both types."""
    cdef const en_kernels *k = kernels()
    cdef en_binary op = <en_binary>named(BINARY, name, "binary")
    cdef cnp.ndarray pa = operand(a, b, name, "a"), pb = operand(b, a, name, "b")
    alike(pb, pa, name, "b", "a")
    cdef tuple shape = broadcast_shape(pa, pb, name)
    cdef cnp.ndarray y = empty(shape, cnp.PyArray_TYPE(pa), name)
    cdef en_view va, vb
    cdef en_status status
    view(pa, shape, name, &va)
    view(pb, shape, name, &vb)
    with nogil:
        status = k.binary(op, &va, &vb, cnp.PyArray_DATA(y))
    check(status, name, 0, bytes_of(pa) + bytes_of(pb) + bytes_of(y), va.type, cnp.PyArray_SIZE(y))
    return y


def add_(x, y):
    """x += y in place, of one shape and type (f32 or bf16); x C-contiguous. Returns x."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype type
    cdef cnp.ndarray a = dense(in_place(x, "add_", "x", &type), "add_", "x"), b = packed(alike(y, a, "add_", "y", "x"))
    same_shape(a, b, "add_", "x", "y")
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b) and np.may_share_memory(a, b):
        b = np.array(b)
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.add_inplace(type, n, cnp.PyArray_DATA(a), cnp.PyArray_DATA(b))
    check(status, "add_", 0, 3 * bytes_of(a), type, n)
    return x


def scale_(x, float s):
    """x *= s in place; x C-contiguous, f32 or bf16. Returns x."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype type
    cdef cnp.ndarray a = dense(in_place(x, "scale_", "x", &type), "scale_", "x")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.scale_inplace(type, n, cnp.PyArray_DATA(a), s)
    check(status, "scale_", 0, 2 * bytes_of(a), type, n)
    return x


# ---- reductions ----

def sum(x, axes=None, bint keepdims=False):
    """The sum of x (f32 or bf16, any strides) over `axes` (None: all), accumulated in double; f32."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype type
    cdef cnp.ndarray a = flowing(x, "sum", "x", &type)
    cdef int ndim = cnp.PyArray_NDIM(a), i
    cdef uint32_t mask = 0
    cdef en_view v
    cdef en_status status
    view(a, shape_of(a), "sum", &v)
    for axis in range(ndim) if axes is None else axes:
        if not -ndim <= axis < ndim:
            raise ShapeError(f"sum: axis {axis} of an array of shape {shape_of(a)}")
        i = axis + ndim if axis < 0 else axis
        if mask >> i & 1:
            raise ShapeError(f"sum: axis {axis} is given twice")
        mask |= 1u << i
    shape = [1 if mask >> i & 1 else v.shape[i] for i in range(ndim) if keepdims or not mask >> i & 1]
    cdef cnp.ndarray y = empty(tuple(shape), cnp.NPY_FLOAT32, "sum")
    with nogil:
        status = k.sum(&v, mask, floats(y))
    check(status, "sum", 0, bytes_of(a), type, cnp.PyArray_SIZE(a))
    return y


def all_finite(x):
    """Is no element of x NaN or infinite?"""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "all_finite", "x")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef int result = 0
    cdef en_status status
    with nogil:
        status = k.all_finite(n, floats(a), &result)
    check(status, "all_finite", 0, bytes_of(a), EN_F32, n)
    return bool(result)


# ---- types ----

def convert(x, dtype):
    """x (float32, float16 or bfloat16, any strides) as another of them, C-contiguous, rounded to nearest even. f16 to
    bf16 and back goes through float32. The same type gives a copy."""
    cdef en_dtype source, target
    cdef cnp.ndarray a = plain(x, "convert", "x")
    weight_type(a, "convert", "x", &source)
    cdef cnp.ndarray model = np.empty(0, dtype)
    weight_type(model, "convert", "dtype", &target)
    return copy_as(whole_strides(a, size_of(source)), target, cnp.PyArray_TYPE(model), "convert")
