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
    check(status, "softmax")
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
    check(status, "softmax_backward")
    return dx


# ---- norms ----

def rms_norm(x, w, double eps):
    """x·rstd·w, rstd = 1/√(mean(x²) + eps), over rows of x (..., d); w (d,). Returns (y, rstd (rows,))."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "rms_norm", "x")
    row_width(a, "rms_norm", "x")
    cdef cnp.ndarray weight = vector(w, a, "rms_norm", "w")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "rms_norm")
    cdef cnp.ndarray rstd = empty((rows,), cnp.NPY_FLOAT32, "rms_norm")
    cdef en_status status
    with nogil:
        status = k.rms_norm(rows, d, floats(a), floats(weight), eps, floats(y), floats(rstd))
    check(status, "rms_norm")
    return y, rstd


def rms_norm_backward(g, x, w, rstd, bint need_dw=True):
    """(dx, dw) of rms_norm from the gradient g of y and what the forward pass had; dw is None unless needed."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "rms_norm_backward", "x"), grad = contiguous(g, "rms_norm_backward", "g")
    row_width(a, "rms_norm_backward", "x")
    same_shape(grad, a, "rms_norm_backward", "g", "x")
    cdef cnp.ndarray weight = vector(w, a, "rms_norm_backward", "w")
    cdef cnp.ndarray scale = statistic(rstd, a, "rms_norm_backward", "rstd")
    cdef cnp.ndarray dx = empty(shape_of(a), cnp.NPY_FLOAT32, "rms_norm_backward")
    cdef int64_t rows = rows_of(a), d = width_of(a)
    cdef cnp.ndarray dw = empty((d if need_dw else 0,), cnp.NPY_FLOAT32, "rms_norm_backward")
    cdef float *pw = floats(dw) if need_dw else NULL
    cdef en_status status
    with nogil:
        status = k.rms_norm_backward(rows, d, floats(grad), floats(a), floats(weight), floats(scale), floats(dx), pw)
    check(status, "rms_norm_backward")
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
    check(status, "layer_norm")
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
    check(status, "layer_norm_backward")
    return dx, dw, db


# ---- positions ----

def rope(x, cos, sin, bint interleaved, bint inverse=False):
    """Turn pairs of x (B, T, H, D) by the angles whose cos, sin are (T, rot/2) or (B, T, rot/2), rot <= D; elements
    from rot on pass through. Pairs are (2i, 2i+1) where interleaved, else (i, i + rot/2). inverse: the backward pass."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(x, "rope", "x")
    cdef cnp.ndarray c = contiguous(cos, "rope", "cos"), s = contiguous(sin, "rope", "sin")
    if cnp.PyArray_NDIM(a) != 4:
        raise ShapeError(f"rope: x must be (B, T, H, D), its shape is {shape_of(a)}")
    same_shape(c, s, "rope", "cos", "sin")
    cdef int64_t b = cnp.PyArray_DIM(a, 0), t = cnp.PyArray_DIM(a, 1)
    cdef int64_t h = cnp.PyArray_DIM(a, 2), d = cnp.PyArray_DIM(a, 3)
    row_width(c, "rope", "cos")
    cdef int64_t half = width_of(c)
    tables = shape_of(c)
    if tables not in ((t, half), (b, t, half)) or 2 * half > d:
        raise ShapeError(f"rope: cos and sin have shape {tables}, x {shape_of(a)}; they must be ({t}, rot/2) or "
                         f"({b}, {t}, rot/2) with rot at most {d}")
    cdef int64_t table_batch = t * half if len(tables) == 3 else 0
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "rope")
    cdef en_status status
    if cnp.PyArray_SIZE(a) == 0:
        return y  # there may be 2^60 positions of no heads
    with nogil:
        status = k.rope(b, t, h, d, 2 * half, floats(a), floats(c), floats(s), table_batch, interleaved, inverse,
                        floats(y))
    check(status, "rope")
    return y


# ---- gated unit ----

def swiglu(gate, up):
    """silu(gate)·up, of one shape."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray a = contiguous(gate, "swiglu", "gate"), b = contiguous(up, "swiglu", "up")
    same_shape(a, b, "swiglu", "gate", "up")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "swiglu")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.swiglu(n, floats(a), floats(b), floats(y))
    check(status, "swiglu")
    return y


def swiglu_backward(g, gate, up):
    """(dgate, dup) of swiglu from the gradient g of its result."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray grad = contiguous(g, "swiglu_backward", "g")
    cdef cnp.ndarray a = contiguous(gate, "swiglu_backward", "gate"), b = contiguous(up, "swiglu_backward", "up")
    same_shape(a, b, "swiglu_backward", "gate", "up")
    same_shape(grad, a, "swiglu_backward", "g", "gate")
    cdef cnp.ndarray dgate = empty(shape_of(a), cnp.NPY_FLOAT32, "swiglu_backward")
    cdef cnp.ndarray dup = empty(shape_of(a), cnp.NPY_FLOAT32, "swiglu_backward")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.swiglu_backward(n, floats(grad), floats(a), floats(b), floats(dgate), floats(dup))
    check(status, "swiglu_backward")
    return dgate, dup


# ---- tokens ----

cdef int bad_token(cnp.ndarray ids, int64_t vocab, str op) except -1:
    """Raises for the first id that is outside the vocabulary."""
    flat = (<object>ids).reshape(-1)
    at = int(np.flatnonzero((flat < 0) | (flat >= vocab))[0])
    raise DataError(f"{op}: token id {flat[at]} at position {at} is outside the vocabulary of {vocab}")


def embedding(weight, ids):
    """Rows of weight (V, D) (float32, float16 or bfloat16) at ids (int64, any shape) -> f32 (*ids.shape, D).
    Raises DataError for an id outside [0, V)."""
    cdef const en_kernels *k = kernels()
    cdef en_dtype kind
    cdef cnp.ndarray table = plain(weight, "embedding", "weight"), rows = ids_of(ids, "embedding", "ids")
    if cnp.PyArray_NDIM(table) != 2:
        raise ShapeError(f"embedding: weight must be (V, D), its shape is {shape_of(table)}")
    weight_type(table, "embedding", "weight", &kind)
    table = packed(table)
    cdef int64_t n = cnp.PyArray_SIZE(rows), vocab = cnp.PyArray_DIM(table, 0), d = cnp.PyArray_DIM(table, 1)
    cdef cnp.ndarray y = empty((*shape_of(rows), d), cnp.NPY_FLOAT32, "embedding")
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(rows)
    cdef en_status status
    with nogil:
        status = k.embedding(n, vocab, d, kind, cnp.PyArray_DATA(table), index, floats(y))
    if status == EN_BAD_ID:
        bad_token(rows, vocab, "embedding")
    check(status, "embedding")
    return y


def embedding_backward(g, ids, int64_t vocab):
    """The gradient (V, D) of embedding's weight: g (*ids.shape, D) added up by id, in double and in the ids' order."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray grad = contiguous(g, "embedding_backward", "g"), rows = ids_of(ids, "embedding_backward", "ids")
    row_width(grad, "embedding_backward", "g")
    if shape_of(grad) != (*shape_of(rows), width_of(grad)):
        raise ShapeError(f"embedding_backward: g has shape {shape_of(grad)}, ids {shape_of(rows)}; g must be the ids' "
                         f"with one more dimension")
    if vocab < 0:
        raise UsageError(f"embedding_backward: vocab={vocab}")
    cdef cnp.ndarray order = np.argsort(rows, axis=None, kind="stable").astype(np.int64, copy=False)
    cdef int64_t n = cnp.PyArray_SIZE(rows), d = width_of(grad)
    cdef cnp.ndarray dweight = zeroed((vocab, d), "embedding_backward")
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(rows)
    cdef const int64_t *sorted_index = <const int64_t *>cnp.PyArray_DATA(order)
    cdef en_status status
    with nogil:
        status = k.embedding_backward(n, vocab, d, floats(grad), index, sorted_index, floats(dweight))
    if status == EN_BAD_ID:
        bad_token(rows, vocab, "embedding_backward")
    check(status, "embedding_backward")
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
    """Per row of logits (N, V): -log softmax at its label (N,) int64, and log(sum(exp)). Returns (losses, lse), both
    (N,); 0 for rows whose label is ignore_index. Raises DataError for another label outside [0, V)."""
    cdef const en_kernels *k = kernels()
    cdef str op = "cross_entropy"
    cdef cnp.ndarray a = contiguous(logits, op, "logits"), wanted = ids_of(labels, op, "labels")
    loss_shapes(a, wanted, op)
    cdef int64_t n = cnp.PyArray_DIM(a, 0), vocab = cnp.PyArray_DIM(a, 1)
    cdef cnp.ndarray losses = empty((n,), cnp.NPY_FLOAT32, op), lse = empty((n,), cnp.NPY_FLOAT32, op)
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(wanted)
    cdef en_status status
    with nogil:
        status = k.cross_entropy(n, vocab, floats(a), index, ignore_index, floats(losses), floats(lse))
    if status == EN_BAD_ID:
        bad_label(wanted, vocab, ignore_index, op)
    check(status, op)
    return losses, lse


def cross_entropy_backward(g, logits, labels, lse, int64_t ignore_index=-100):
    """The gradient (N, V) of the logits from the gradient g (N,) of the losses; ignored rows are 0."""
    cdef const en_kernels *k = kernels()
    cdef str op = "cross_entropy_backward"
    cdef cnp.ndarray a = contiguous(logits, op, "logits"), wanted = ids_of(labels, op, "labels")
    cdef cnp.ndarray grad = contiguous(g, op, "g"), total = contiguous(lse, op, "lse")
    loss_shapes(a, wanted, op)
    same_shape(grad, wanted, op, "g", "labels")
    same_shape(total, wanted, op, "lse", "labels")
    cdef int64_t n = cnp.PyArray_DIM(a, 0), vocab = cnp.PyArray_DIM(a, 1)
    cdef cnp.ndarray dlogits = empty((n, vocab), cnp.NPY_FLOAT32, op)
    cdef const int64_t *index = <const int64_t *>cnp.PyArray_DATA(wanted)
    cdef en_status status
    with nogil:
        status = k.cross_entropy_backward(n, vocab, floats(grad), floats(a), index, floats(total), ignore_index,
                                          floats(dlogits))
    if status == EN_BAD_ID:
        bad_label(wanted, vocab, ignore_index, op)
    check(status, op)
    return dlogits


# ---- dropout ----

def dropout(x, double p, uint64_t seed, uint64_t offset):
    """x (f32) with each element set to 0 with probability p, the others scaled by 1/(1-p). The mask is Philox4x32-10 of
    (seed, offset + i/4): the same call on a gradient is the backward pass. It consumes ceil(size/4) offsets."""
    cdef const en_kernels *k = kernels()
    if not 0 <= p <= 1:
        raise UsageError(f"dropout: p={p} must be from 0 to 1")
    cdef cnp.ndarray a = contiguous(x, "dropout", "x")
    cdef cnp.ndarray y = empty(shape_of(a), cnp.NPY_FLOAT32, "dropout")
    cdef int64_t n = cnp.PyArray_SIZE(a)
    cdef en_status status
    with nogil:
        status = k.dropout(n, floats(a), p, seed, offset, floats(y))
    check(status, "dropout")
    return y
