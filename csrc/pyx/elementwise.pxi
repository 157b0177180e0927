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
    if ndim > EN_MAX_DIMS:
        raise ShapeError(f"{op}: {ndim} dimensions are too many, shape {shape}; at most {<int>EN_MAX_DIMS}")
    v.data = floats(a)
    v.ndim = ndim
    for i in range(ndim):
        k = i - (ndim - own)
        v.shape[i] = shape[i]
        v.stride[i] = cnp.PyArray_STRIDE(a, k) // 4 if k >= 0 and cnp.PyArray_DIM(a, k) != 1 else 0
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


def copy(x):
    """A C-contiguous copy of x (f32, any strides)."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = f32(x, "copy", "x")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "copy")
    cdef en_view v
    cdef en_status status
    view(a, shape_of(a), "copy", &v)
    with nogil:
        status = k.copy(&v, floats(y))
    check(status, "copy")
    return y


def unary(name, x):
    """neg, exp, log, relu, gelu (erf), gelu_tanh or silu of x (f32, any strides), elementwise."""
    cdef const en_kernels *k = kernels()
    cdef en_unary op = <en_unary>named(UNARY, name, "unary")
    cdef cnp.ndarray a = f32(x, name, "x")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, name)
    cdef en_view v
    cdef en_status status
    view(a, shape_of(a), name, &v)
    with nogil:
        status = k.unary(op, &v, floats(y))
    check(status, name)
    return y


def unary_backward(name, x, g):
    """g times the derivative of `unary(name, .)` at x; both of one shape."""
    cdef const en_kernels *k = kernels()
    cdef en_unary op = <en_unary>named(UNARY, name, "unary_backward")
    cdef cnp.ndarray a = contiguous(x, name, "x"), b = contiguous(g, name, "g")
    same_shape(a, b, name, "x", "g")
    cdef cnp.ndarray dx = empty(shape_of(a), cnp.NPY_FLOAT32, name)
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.unary_backward(op, n, floats(a), floats(b), floats(dx))
    check(status, name)
    return dx


cdef cnp.ndarray operand(object x, str op, str name):
    """x as an f32 array; a number is one of no dimensions."""
    return f32(np.asarray(x, np.float32) if isinstance(x, (int, float, np.floating)) else x, op, name)


def binary(name, a, b):
    """a add|sub|mul|div|pow b (f32 of any strides, or numbers) with NumPy's broadcasting. Raises ShapeError naming both
    shapes."""
    cdef const en_kernels *k = kernels()
    cdef en_binary op = <en_binary>named(BINARY, name, "binary")
    cdef cnp.ndarray pa = operand(a, name, "a"), pb = operand(b, name, "b")
    cdef tuple shape = broadcast_shape(pa, pb, name)
    cdef cnp.ndarray y = empty(shape, cnp.NPY_FLOAT32, name)
    cdef en_view va, vb
    cdef en_status status
    view(pa, shape, name, &va)
    view(pb, shape, name, &vb)
    with nogil:
        status = k.binary(op, &va, &vb, floats(y))
    check(status, name)
    return y


def add_(x, y):
    """x += y in place, of one shape; x C-contiguous. Returns x."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = writable(x, "add_", "x"), b = contiguous(y, "add_", "y")
    same_shape(a, b, "add_", "x", "y")
    if floats(a) != floats(b) and np.may_share_memory(a, b):
        b = np.array(b)
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.add_inplace(n, floats(a), floats(b))
    check(status, "add_")
    return x


def scale_(x, float s):
    """x *= s in place; x C-contiguous. Returns x."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = writable(x, "scale_", "x")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.scale_inplace(n, floats(a), s)
    check(status, "scale_")
    return x


# ---- reductions ----

def sum(x, axes=None, bint keepdims=False):
    """The sum of x (f32, any strides) over `axes` (None: all), accumulated in double."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = f32(x, "sum", "x")
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
    check(status, "sum")
    return y


def sum_squares(x):
    """The sum of x² as a Python float, accumulated in double; the order depends on the size alone."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "sum_squares", "x")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef double result = 0
    cdef en_status status
    with nogil:
        status = k.sum_squares(n, floats(a), &result)
    check(status, "sum_squares")
    return result


def all_finite(x):
    """Is no element of x NaN or infinite?"""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "all_finite", "x")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef int result = 0
    cdef en_status status
    with nogil:
        status = k.all_finite(n, floats(a), &result)
    check(status, "all_finite")
    return bool(result)


# ---- types ----

def convert(x, dtype):
    """x (float32, float16 or bfloat16) as another of them, C-contiguous, rounded to nearest even. f16 to bf16 and back
    goes through float32. The same type gives a copy."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype source, target
    cdef cnp.ndarray a = plain(x, "convert", "x")
    weight_type(a, "convert", "x", &source)
    cdef cnp.ndarray model = np.empty(0, dtype)
    weight_type(model, "convert", "dtype", &target)
    if source == target:
        return np.array(a, order="C")
    a = packed(a)
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef cnp.ndarray y
    cdef en_status status = EN_OK
    if source != EN_F32:
        y = empty(shape_of(a), cnp.NPY_FLOAT32, "convert")
        with nogil:
            status = k.widen(source, n, <const uint16_t *>cnp.PyArray_DATA(a), floats(y))
        check(status, "convert")
        a = y
    if target != EN_F32:
        y = empty(shape_of(a), cnp.PyArray_TYPE(model), "convert")
        with nogil:
            status = k.narrow(target, n, floats(a), <uint16_t *>cnp.PyArray_DATA(y))
        check(status, "convert")
        a = y
    return a


# Encoding, values and bytes of a block; csrc/kernels/dequant.h describes them.
cdef dict ENCODINGS = {"q4_0": (EN_Q4_0, 32, 18), "q8_0": (EN_Q8_0, 32, 34), "q4_k": (EN_Q4_K, 256, 144),
                       "q6_k": (EN_Q6_K, 256, 210)}


def dequantize(name, raw, dtype=np.float32):
    """The values of `raw` (uint8, 1-D), whole blocks of ggml's q4_0, q8_0, q4_k or q6_k, as float32, float16 or
    bfloat16, 1-D. Raises ShapeError where `raw` is not a whole number of blocks."""
    cdef const en_kernels *k = kernels()
    if name not in ENCODINGS:
        raise UsageError(f"dequantize: no encoding {name!r}; it is one of {', '.join(ENCODINGS)}")
    qtype, values, size = ENCODINGS[name]
    cdef cnp.ndarray a = plain(raw, f"dequantize {name}", "raw")
    if cnp.PyArray_TYPE(a) != cnp.NPY_UINT8:
        raise DTypeError(f"dequantize {name}: raw must be an array of uint8, not {(<object>a).dtype}")
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_SIZE(a) % size:
        raise ShapeError(f"dequantize {name}: raw of shape {shape_of(a)} is not a row of whole {size}-byte blocks")
    cdef en_dtype target
    cdef cnp.ndarray model = np.empty(0, dtype)
    weight_type(model, f"dequantize {name}", "dtype", &target)
    a = packed(a)
    cdef int64_t blocks = cnp.PyArray_SIZE(a) // size
    cdef cnp.ndarray y = empty((blocks * values,), cnp.PyArray_TYPE(model), "dequantize")
    cdef en_qtype encoding = <en_qtype><int>qtype
    cdef en_status status
    with nogil:
        status = k.dequantize(encoding, blocks, <const uint8_t *>cnp.PyArray_DATA(a), target, cnp.PyArray_DATA(y))
    check(status, "dequantize", 0, a.nbytes + y.nbytes, target, blocks * values)
    return y
