# Layers: rows of the last dimension, rotary embedding, token embedding, loss, dropout.

cdef int row_width(cnp.ndarray a, str op, str name) except -1:
    """Checks that a has a last dimension."""
    if cnp.PyArray_NDIM(a) < 1:
        raise ShapeError(f"{op}: {name} must have at least one dimension, its shape is ()")
    return 0


cdef int64_t rows_of(cnp.ndarray a) noexcept:
    cdef int64_t d = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)
    return cnp.PyArray_SIZE(a) // d if d else 0


cdef int64_t width_of(cnp.ndarray a) noexcept:
    return cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1)


cdef cnp.ndarray vector(object w, cnp.ndarray x, str op, str name):
    """w (d,) for x (..., d)."""
    cdef cnp.ndarray a = contiguous(w, op, name)
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != width_of(x):
        raise ShapeError(f"{op}: {name} has shape {shape_of(a)}, x {shape_of(x)}; {name} must be ({width_of(x)},)")
    return a


cdef cnp.ndarray statistic(object s, cnp.ndarray x, str op, str name):
    """s (rows,) as a forward pass over x (..., d) gave it."""
    cdef cnp.ndarray a = contiguous(s, op, name)
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_DIM(a, 0) != rows_of(x):
        raise ShapeError(f"{op}: {name} has shape {shape_of(a)}, x {shape_of(x)}; {name} must be ({rows_of(x)},)")
    return a


cdef cnp.ndarray ids_of(object ids, str op, str name):
    """A C-contiguous copy: other threads can't change what C has checked before it is used."""
    cdef cnp.ndarray a = plain(ids, op, name)
    if cnp.PyArray_TYPE(a) != cnp.NPY_INT64 or not cnp.PyArray_ISNOTSWAPPED(a):
        raise DTypeError(f"{op}: {name} must be an array of int64, not {(<object>a).dtype}")
    return np.array(a, order="C")


cdef cnp.ndarray zeroed(tuple shape, str op):
    cdef cnp.ndarray a = empty(shape, cnp.NPY_FLOAT32, op)
    (<object>a).fill(0)
    return a


cdef int overlaps_itself(cnp.ndarray a, int outer, str op, str name) except -1:
    """Refuses an array to be written whose first `outer` dimensions put one element in two places."""
    cdef int64_t reach = cnp.PyArray_ITEMSIZE(a)
    cdef int i
    if cnp.PyArray_SIZE(a) == 0:
        return 0
    for i in range(outer, cnp.PyArray_NDIM(a)):
        reach *= cnp.PyArray_DIM(a, i)
    for stride, n in sorted([(abs(cnp.PyArray_STRIDE(a, i)), cnp.PyArray_DIM(a, i)) for i in range(outer)]):
        if n > 1:
            if stride < reach:
                raise ShapeError(f"{op}: {name} is written in place, but its elements overlap: shape {shape_of(a)}, "
                                 f"strides {(<object>a).strides}")
            reach += stride * (n - 1)
    return 0


cdef bint rows_meet(cnp.ndarray a, cnp.ndarray b):
    """Do two (rows, n) arrays with contiguous columns share an element? Halves of one array do not."""
    cdef int64_t row = cnp.PyArray_STRIDE(a, 0), width = cnp.PyArray_DIM(a, 1) * cnp.PyArray_ITEMSIZE(a), apart
    if not np.may_share_memory(a, b):
        return False
    if row <= 0 or row != cnp.PyArray_STRIDE(b, 0):
        return True
    apart = (<char *>cnp.PyArray_DATA(b) - <char *>cnp.PyArray_DATA(a)) % row
    if apart < 0:
        apart += row
    return apart < width or row - apart < width


# ---- softmax ----

def softmax(x):
    """Softmax of x (f32) over the last dimension."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "softmax", "x")
    row_width(a, "softmax", "x")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "softmax")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef en_status status
    with nogil:
        status = k.softmax(rows, d, floats(a), floats(y))
    check(status, "softmax", 0, 2 * bytes_of(a), EN_F32, rows, d)
    return y


def softmax_backward(y, g):
    """dx of softmax from its result y and the gradient g of that, both (..., d)."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(y, "softmax_backward", "y"), b = contiguous(g, "softmax_backward", "g")
    row_width(a, "softmax_backward", "y")
    same_shape(a, b, "softmax_backward", "y", "g")
    cdef cnp.ndarray dx = empty(shape_of(a), cnp.NPY_FLOAT32, "softmax_backward")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef en_status status
    with nogil:
        status = k.softmax_backward(rows, d, floats(a), floats(b), floats(dx))
    check(status, "softmax_backward", 0, 3 * bytes_of(a), EN_F32, rows, d)
    return dx


# ---- norms ----

def rms_norm(x, w, double eps):
    """x·rstd·w, rstd = 1/√(mean(x²) + eps), over rows of x (..., d), f32 or bf16; w (d,) f32. Returns (y of x's type,
    rstd (rows,) f32)."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(x, "rms_norm", "x", &type))
    row_width(a, "rms_norm", "x")
    cdef cnp.ndarray weight = vector(w, a, "rms_norm", "w")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef cnp.ndarray y = empty(shape_of(a), cnp.PyArray_TYPE(a), "rms_norm")
    cdef cnp.ndarray rstd = empty((rows,), cnp.NPY_FLOAT32, "rms_norm")
    cdef en_status status
    with nogil:
        status = k.rms_norm(type, rows, d, cnp.PyArray_DATA(a), floats(weight), eps, cnp.PyArray_DATA(y), floats(rstd))
    check(status, "rms_norm", 0, bytes_of(a) + bytes_of(y), type, rows, d)
    return y, rstd


cdef cnp.ndarray destination(object x, cnp.ndarray like, str op, str name, str name_of_like):
    """A C-contiguous array of the shape and type of `like`, to be written."""
    cdef en_dtype type
    cdef cnp.ndarray a = dense(in_place(x, op, name, &type), op, name)
    alike(a, like, op, name, name_of_like)
    same_shape(a, like, op, name, name_of_like)
    return a


def rms_norm_backward(g, x, w, rstd, bint need_dw=True, normed=None):
    """(dx, dw) of rms_norm from the gradient g of y and what the forward pass had; dx has x's type, dw (d,) is f32, or
    None unless needed. normed: an array like x in which y is made again, bit for bit, in the same pass."""
    cdef const en_kernels *k = kernels()
    cdef str op = "rms_norm_backward"
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(x, op, "x", &type)), grad = packed(alike(g, a, op, "g", "x"))
    row_width(a, op, "x")
    same_shape(grad, a, op, "g", "x")
    cdef cnp.ndarray weight = vector(w, a, op, "w"), scale = statistic(rstd, a, op, "rstd")
    cdef cnp.ndarray dx = empty(shape_of(a), cnp.PyArray_TYPE(a), op), again
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef cnp.ndarray dw = empty((d if need_dw else 0,), cnp.NPY_FLOAT32, op)
    cdef float *pw = floats(dw) if need_dw else NULL
    cdef void *pn = NULL
    if normed is not None:
        again = destination(normed, a, op, "normed", "x")
        if np.may_share_memory(again, a) or np.may_share_memory(again, grad):
            raise UsageError(f"{op}: normed overlaps an operand")
        pn = cnp.PyArray_DATA(again)
    cdef en_status status
    with nogil:
        status = k.rms_norm_backward(type, rows, d, cnp.PyArray_DATA(grad), cnp.PyArray_DATA(a), floats(weight),
                                     floats(scale), cnp.PyArray_DATA(dx), pw, pn)
    check(status, op, 0, (4 if normed is not None else 3) * bytes_of(a), type, rows, d)
    return dx, dw if need_dw else None


def layer_norm(x, w, b, double eps):
    """(x - mean)·rstd·w + b over rows of x (..., d); w, b (d,). Returns (y, mean (rows,), rstd (rows,))."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "layer_norm", "x")
    row_width(a, "layer_norm", "x")
    cdef cnp.ndarray weight = vector(w, a, "layer_norm", "w"), bias = vector(b, a, "layer_norm", "b")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "layer_norm")
    cdef cnp.ndarray mean = empty((rows,), cnp.NPY_FLOAT32, "layer_norm")
    cdef cnp.ndarray rstd = empty((rows,), cnp.NPY_FLOAT32, "layer_norm")
    cdef en_status status
    with nogil:
        status = k.layer_norm(rows, d, floats(a), floats(weight), floats(bias), eps, floats(y), floats(mean),
                              floats(rstd))
    check(status, "layer_norm", 0, 2 * bytes_of(a), EN_F32, rows, d)
    return y, mean, rstd


def layer_norm_backward(g, x, w, mean, rstd):
    """(dx, dw, db) of layer_norm from the gradient g of y and what the forward pass had."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "layer_norm_backward", "x"), grad = contiguous(g, "layer_norm_backward", "g")
    row_width(a, "layer_norm_backward", "x")
    same_shape(grad, a, "layer_norm_backward", "g", "x")
    cdef cnp.ndarray weight = vector(w, a, "layer_norm_backward", "w")
    cdef cnp.ndarray centre = statistic(mean, a, "layer_norm_backward", "mean")
    cdef cnp.ndarray scale = statistic(rstd, a, "layer_norm_backward", "rstd")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef cnp.ndarray dx = empty(shape_of(a), cnp.NPY_FLOAT32, "layer_norm_backward")
    cdef cnp.ndarray dw = empty((d,), cnp.NPY_FLOAT32, "layer_norm_backward")
    cdef cnp.ndarray db = empty((d,), cnp.NPY_FLOAT32, "layer_norm_backward")
    cdef en_status status
    with nogil:
        status = k.layer_norm_backward(rows, d, floats(grad), floats(a), floats(weight), floats(centre), floats(scale),
                                       floats(dx), floats(dw), floats(db))
    check(status, "layer_norm_backward", 0, 3 * bytes_of(a), EN_F32, rows, d)
    return dx, dw, db


# ---- positions ----

cdef int rope_into(cnp.ndarray a, cnp.ndarray y, en_dtype type, object cos, object sin, bint interleaved, bint inverse,
                   str op) except -1:
    """y, which may be a, from a (B, T, H, D), the last two dimensions of both contiguous."""
    cdef const en_kernels *k = kernels()
    cdef en_rope p
    cdef cnp.ndarray c = contiguous(cos, op, "cos"), s = contiguous(sin, op, "sin")
    same_shape(c, s, op, "cos", "sin")
    p.b = cnp.PyArray_DIM(a, 0)
    p.t = cnp.PyArray_DIM(a, 1)
    p.h = cnp.PyArray_DIM(a, 2)
    p.d = cnp.PyArray_DIM(a, 3)
    row_width(c, op, "cos")
    cdef int64_t half = width_of(c)
    tables = shape_of(c)
    if tables not in ((p.t, half), (p.b, p.t, half)) or 2 * half > p.d:
        raise ShapeError(f"{op}: cos and sin have shape {tables}, x {shape_of(a)}; they must be ({p.t}, rot/2) or "
                         f"({p.b}, {p.t}, rot/2) with rot at most {p.d}")
    if cnp.PyArray_SIZE(a) == 0:
        return 0  # there may be 2^60 positions of no heads
    p.rot = 2 * half
    p.type = type
    p.x = heads_at(a)
    p.y = heads_at(y)
    p.cos = floats(c)
    p.sin = floats(s)
    p.table_batch = p.t * half if len(tables) == 3 else 0
    p.interleaved = interleaved
    p.inverse = inverse
    cdef en_status status
    with nogil:
        status = k.rope(&p)
    return check(status, op, 0, 2 * bytes_of(a), type, p.b * p.t, p.h * p.d)


def rope(x, cos, sin, bint interleaved, bint inverse=False):
    """Turn pairs of x (B, T, H, D), f32 or bf16, by the angles whose cos, sin are (T, rot/2) or (B, T, rot/2), f32,
    rot <= D; elements from rot on pass through. Pairs are (2i, 2i+1) where interleaved, else (i, i + rot/2).
    inverse: the backward pass."""
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(x, "rope", "x", &type))
    if cnp.PyArray_NDIM(a) != 4:
        raise ShapeError(f"rope: x must be (B, T, H, D), its shape is {shape_of(a)}")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.PyArray_TYPE(a), "rope")
    rope_into(a, y, type, cos, sin, interleaved, inverse, "rope")
    return y


def rope_(x, cos, sin, bint interleaved=False, bint inverse=False):
    """As rope, in place: x (B, T, H, D) is a view of any strides whose last two dimensions are contiguous, such as the
    queries in rows of queries, keys and values. Returns x."""
    cdef en_dtype type
    cdef cnp.ndarray a = in_place(x, "rope_", "x", &type)
    if cnp.PyArray_NDIM(a) != 4:
        raise ShapeError(f"rope_: x must be (B, T, H, D), its shape is {shape_of(a)}")
    if not lie_in_heads(a):
        raise ShapeError(f"rope_: the last two dimensions of x must be contiguous, its shape is {shape_of(a)}, its "
                         f"strides are {(<object>a).strides}")
    overlaps_itself(a, 2, "rope_", "x")
    rope_into(a, a, type, cos, sin, interleaved, inverse, "rope_")
    return x


# ---- gated unit ----

cdef cnp.ndarray rows_view(cnp.ndarray a):
    """a (..., n) as (rows, n) with contiguous columns: a view where its strides allow, else a copy."""
    if cnp.PyArray_NDIM(a) == 2 and cnp.PyArray_STRIDE(a, 1) == cnp.PyArray_ITEMSIZE(a):
        return a
    return (<object>packed(a)).reshape(-1, max(1, width_of(a) if cnp.PyArray_NDIM(a) else 1))


cdef inline int64_t row_stride(cnp.ndarray a) noexcept:
    return cnp.PyArray_STRIDE(a, 0) // cnp.PyArray_ITEMSIZE(a)


def swiglu(gate, up):
    """silu(gate)·up, of one shape (..., n) and type, f32 or bf16; C-contiguous. The rows of 2-D gate and up may lie
    apart, such as two halves of one array."""
    cdef const en_kernels *k = kernels()
    cdef en_swiglu p
    cdef cnp.ndarray a = flowing(gate, "swiglu", "gate", &p.type), b = alike(up, a, "swiglu", "up", "gate")
    same_shape(a, b, "swiglu", "gate", "up")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.PyArray_TYPE(a), "swiglu")
    a = rows_view(a)
    b = rows_view(b)
    p.rows = cnp.PyArray_DIM(a, 0)
    p.n = cnp.PyArray_DIM(a, 1)
    p.gate = cnp.PyArray_DATA(a)
    p.gate_row = row_stride(a)
    p.up = cnp.PyArray_DATA(b)
    p.up_row = row_stride(b)
    p.h = cnp.PyArray_DATA(y)
    p.g = p.dgate = p.dup = NULL
    p.dgate_row = p.dup_row = 0
    cdef en_status status
    with nogil:
        status = k.swiglu(&p)
    check(status, "swiglu", 0, 3 * bytes_of(y), p.type, p.rows, p.n)
    return y


cdef cnp.ndarray rows_to_write(object x, cnp.ndarray like, str op, str name):
    """A (rows, n) array with contiguous columns, of the shape and type of `like`, to be written."""
    cdef en_dtype type
    cdef cnp.ndarray a = in_place(x, op, name, &type)
    alike(a, like, op, name, "gate")
    same_shape(a, like, op, name, "gate")
    if cnp.PyArray_NDIM(a) != 2 or (cnp.PyArray_DIM(a, 1) > 1 and cnp.PyArray_STRIDE(a, 1) != cnp.PyArray_ITEMSIZE(a)):
        raise ShapeError(f"{op}: {name} must be 2-D with contiguous columns, its shape is {shape_of(a)}, its strides "
                         f"are {(<object>a).strides}")
    overlaps_itself(a, 1, op, name)
    return a


cdef bint same_view(cnp.ndarray a, cnp.ndarray b) noexcept:
    return cnp.PyArray_DATA(a) == cnp.PyArray_DATA(b) and cnp.PyArray_STRIDE(a, 0) == cnp.PyArray_STRIDE(b, 0)


def swiglu_backward(g, gate, up, into=None, h=None):
    """(dgate, dup) of swiglu from the gradient g of its result; all of one shape and type. into: two (rows, n) views to
    write them to, contiguous in n; they may be gate and up themselves. h: a C-contiguous array of that shape in which
    the result of swiglu is made again, bit for bit, in the same pass; it may be g."""
    cdef const en_kernels *k = kernels()
    cdef str op = "swiglu_backward"
    cdef en_swiglu p
    cdef cnp.ndarray a = flowing(gate, op, "gate", &p.type), b = alike(up, a, op, "up", "gate")
    cdef cnp.ndarray grad = packed(alike(g, a, op, "g", "gate")), dgate, dup, again
    same_shape(a, b, op, "gate", "up")
    same_shape(grad, a, op, "g", "gate")
    if into is None:
        dgate = empty(shape_of(a), cnp.PyArray_TYPE(a), op)
        dup = empty(shape_of(a), cnp.PyArray_TYPE(a), op)
    else:
        dgate = rows_to_write(into[0], a, op, "into[0]")
        dup = rows_to_write(into[1], a, op, "into[1]")
    result = dgate, dup
    a = rows_view(a)
    b = rows_view(b)
    dgate = rows_view(dgate)
    dup = rows_view(dup)
    if into is not None:
        for out, name, twin, others in ((dgate, "into[0]", a, (b, dup, grad)), (dup, "into[1]", b, (a, grad))):
            if not same_view(out, twin) and rows_meet(out, twin) or any([rows_meet(out, other) for other in others]):
                raise UsageError(f"{op}: {name} overlaps another array")
    p.rows = cnp.PyArray_DIM(a, 0)
    p.n = cnp.PyArray_DIM(a, 1)
    p.gate = cnp.PyArray_DATA(a)
    p.gate_row = row_stride(a)
    p.up = cnp.PyArray_DATA(b)
    p.up_row = row_stride(b)
    p.g = cnp.PyArray_DATA(grad)
    p.dgate = cnp.PyArray_DATA(dgate)
    p.dgate_row = row_stride(dgate)
    p.dup = cnp.PyArray_DATA(dup)
    p.dup_row = row_stride(dup)
    p.h = NULL
    if h is not None:
        again = destination(h, grad, op, "h", "g")
        p.h = cnp.PyArray_DATA(again)
        if (p.h != p.g and np.may_share_memory(again, grad)) or \
                any([np.may_share_memory(again, other) for other in (a, b, dgate, dup)]):
            raise UsageError(f"{op}: h overlaps another array")
    cdef en_status status
    with nogil:
        status = k.swiglu_backward(&p)
    check(status, op, 0, (6 if h is not None else 5) * bytes_of(grad), p.type, p.rows, p.n)
    return result


# ---- tokens ----

cdef int bad_token(cnp.ndarray ids, int64_t vocab, str op) except -1:
    """Raises for the first id that is outside the vocabulary."""
    flat = (<object>ids).reshape(-1)
    at = int(np.flatnonzero((flat < 0) | (flat >= vocab))[0])
    raise DataError(f"{op}: token id {flat[at]} at position {at} is outside the vocabulary of {vocab}")


def embedding(weight, ids, dtype=np.float32):
    """Rows of weight (V, D) (float32, float16 or bfloat16) at ids (int64, any shape) as `dtype`, float32 or bfloat16:
    (*ids.shape, D). Raises DataError for an id outside [0, V)."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype kind, target
    cdef cnp.ndarray table = plain(weight, "embedding", "weight"), rows = ids_of(ids, "embedding", "ids")
    if cnp.PyArray_NDIM(table) != 2:
        raise ShapeError(f"embedding: weight must be (V, D), its shape is {shape_of(table)}")
    weight_type(table, "embedding", "weight", &kind)
    flowing(np.empty(0, dtype), "embedding", "dtype", &target)
    table = packed(table)
    cdef int64_t n = cnp.PyArray_SIZE(rows), vocab = cnp.PyArray_DIM(table, 0), d = cnp.PyArray_DIM(table, 1)
    cdef cnp.ndarray y = empty((*shape_of(rows), d), typenum_of(target), "embedding")
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(rows)
    cdef en_status status
    with nogil:
        status = k.embedding(n, vocab, d, kind, cnp.PyArray_DATA(table), index, target, cnp.PyArray_DATA(y))
    if status == EN_BAD_ID:
        bad_token(rows, vocab, "embedding")
    check(status, "embedding", 0, 2 * bytes_of(y), target, n, d)
    return y


def embedding_backward(g, ids, int64_t vocab, into=None):
    """The gradient (V, D) f32 of embedding's weight: g (*ids.shape, D), f32 or bf16, added up by id, in double and in
    the ids' order. into: a gradient that it is added to and that is returned; only rows of ids are touched then."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype type
    cdef cnp.ndarray grad = packed(flowing(g, "embedding_backward", "g", &type))
    cdef cnp.ndarray rows = ids_of(ids, "embedding_backward", "ids")
    row_width(grad, "embedding_backward", "g")
    if shape_of(grad) != (*shape_of(rows), width_of(grad)):
        raise ShapeError(f"embedding_backward: g has shape {shape_of(grad)}, ids {shape_of(rows)}; g must be the ids' "
                         f"with one more dimension")
    if vocab < 0:
        raise UsageError(f"embedding_backward: vocab={vocab}")
    cdef cnp.ndarray order = np.argsort(rows, axis=None, kind="stable").astype(np.int64, copy=False)
    cdef int64_t n = cnp.PyArray_SIZE(rows), d = width_of(grad)
    cdef cnp.ndarray dweight
    if into is None:
        dweight = zeroed((vocab, d), "embedding_backward")
    else:
        dweight = writable(into, "embedding_backward", "into")
        if shape_of(dweight) != (vocab, d):
            raise ShapeError(f"embedding_backward: into has shape {shape_of(dweight)}, the gradient {(vocab, d)}")
        if np.may_share_memory(dweight, grad):
            raise UsageError("embedding_backward: into overlaps g")
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(rows)
    cdef const int64_t *sorted_index = <const int64_t *>cnp.PyArray_DATA(order)
    cdef en_status status
    with nogil:
        status = k.embedding_backward(n, vocab, d, type, cnp.PyArray_DATA(grad), index, sorted_index, floats(dweight))
    if status == EN_BAD_ID:
        bad_token(rows, vocab, "embedding_backward")
    check(status, "embedding_backward", 0, 2 * bytes_of(grad), type, n, d)
    return dweight


# ---- loss ----

cdef int loss_shapes(cnp.ndarray logits, cnp.ndarray labels, str op) except -1:
    if cnp.PyArray_NDIM(logits) != 2 or cnp.PyArray_NDIM(labels) != 1 or \
            cnp.PyArray_DIM(logits, 0) != cnp.PyArray_DIM(labels, 0):
        raise ShapeError(f"{op}: logits have shape {shape_of(logits)}, labels {shape_of(labels)}; they must be (N, V) "
                         f"and (N,)")
    return 0


cdef int bad_label(cnp.ndarray labels, int64_t vocab, int64_t ignore_index, str op) except -1:
    flat = <object>labels
    row = int(np.flatnonzero(((flat < 0) | (flat >= vocab)) & (flat != ignore_index))[0])
    raise DataError(f"{op}: label {flat[row]} in row {row} is outside the vocabulary of {vocab} "
                    f"(and is not ignore_index, {ignore_index})")


def cross_entropy(logits, labels, int64_t ignore_index=-100):
    """Per row of logits (N, V), f32 or bf16: -log softmax at its label (N,) int64, and log(sum(exp)). Returns (losses,
    lse), both (N,) f32; 0 for rows whose label is ignore_index. Raises DataError for another label outside [0, V)."""
    cdef const en_kernels *k = kernels()
    cdef str op = "cross_entropy"
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(logits, op, "logits", &type)), wanted = ids_of(labels, op, "labels")
    loss_shapes(a, wanted, op)
    cdef int64_t n = cnp.PyArray_DIM(a, 0), vocab = cnp.PyArray_DIM(a, 1)
    cdef cnp.ndarray losses = empty((n,), cnp.NPY_FLOAT32, op), lse = empty((n,), cnp.NPY_FLOAT32, op)
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(wanted)
    cdef en_status status
    with nogil:
        status = k.cross_entropy(type, n, vocab, cnp.PyArray_DATA(a), index, ignore_index, floats(losses), floats(lse))
    if status == EN_BAD_ID:
        bad_label(wanted, vocab, ignore_index, op)
    check(status, op, 0, bytes_of(a), type, n, vocab)
    return losses, lse


def cross_entropy_backward(g, logits, labels, lse, int64_t ignore_index=-100):
    """The gradient (N, V) of the logits, of their type, from the gradient g (N,) of the losses; ignored rows are 0."""
    cdef const en_kernels *k = kernels()
    cdef str op = "cross_entropy_backward"
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(logits, op, "logits", &type)), wanted = ids_of(labels, op, "labels")
    cdef cnp.ndarray grad = contiguous(g, op, "g"), total = contiguous(lse, op, "lse")
    loss_shapes(a, wanted, op)
    same_shape(grad, wanted, op, "g", "labels")
    same_shape(total, wanted, op, "lse", "labels")
    cdef int64_t n = cnp.PyArray_DIM(a, 0), vocab = cnp.PyArray_DIM(a, 1)
    cdef cnp.ndarray dlogits = empty((n, vocab), cnp.PyArray_TYPE(a), op)
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(wanted)
    cdef en_status status
    with nogil:
        status = k.cross_entropy_backward(type, n, vocab, floats(grad), cnp.PyArray_DATA(a), index, floats(total),
                                          ignore_index, cnp.PyArray_DATA(dlogits))
    if status == EN_BAD_ID:
        bad_label(wanted, vocab, ignore_index, op)
    check(status, op, 0, 2 * bytes_of(a), type, n, vocab)
    return dlogits


def cross_entropy_gradient_(logits, labels, float factor, int64_t ignore_index=-100):
    """The losses (N,) f32 of logits (N, V), f32 or bf16, C-contiguous, which are replaced by the gradient of factor
    times the sum of the losses: factor·(softmax - onehot(label)). An ignored row has loss 0 and becomes 0. Raises
    DataError, and writes nothing, for another label outside [0, V)."""
    cdef const en_kernels *k = kernels()
    cdef str op = "cross_entropy_gradient_"
    cdef en_dtype type
    cdef cnp.ndarray a = dense(in_place(logits, op, "logits", &type), op, "logits")
    cdef cnp.ndarray wanted = ids_of(labels, op, "labels")
    loss_shapes(a, wanted, op)
    cdef int64_t n = cnp.PyArray_DIM(a, 0), vocab = cnp.PyArray_DIM(a, 1)
    cdef cnp.ndarray losses = empty((n,), cnp.NPY_FLOAT32, op)
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(wanted)
    cdef en_status status
    with nogil:
        status = k.cross_entropy_gradient(type, n, vocab, cnp.PyArray_DATA(a), index, factor, ignore_index,
                                          floats(losses))
    if status == EN_BAD_ID:
        bad_label(wanted, vocab, ignore_index, op)
    check(status, op, 0, 2 * bytes_of(a), type, n, vocab)
    return losses


# ---- dropout ----

def dropout(x, double p, uint64_t seed, uint64_t offset):
    """x (f32 or bf16) with each element set to 0 with probability p, the others scaled by 1/(1-p). The mask is
    Philox4x32-10 of (seed, offset + i/4): the same call on a gradient is the backward pass. It consumes ceil(size/4)
    offsets."""
    cdef const en_kernels *k = kernels()
    if not 0 <= p <= 1:
        raise UsageError(f"dropout: p={p} must be from 0 to 1")
    cdef en_dtype type
    cdef cnp.ndarray a = packed(flowing(x, "dropout", "x", &type))
    cdef cnp.ndarray y = empty(shape_of(a), cnp.PyArray_TYPE(a), "dropout")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.dropout(type, n, cnp.PyArray_DATA(a), p, seed, offset, cnp.PyArray_DATA(y))
    check(status, "dropout", 0, 2 * bytes_of(a), type, n)
    return y
