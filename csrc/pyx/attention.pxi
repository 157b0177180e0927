# Attention: q (B, T, H, D), k and v (B, S, Hkv, D); see csrc/kernels/attention.h.

cdef cnp.ndarray cached(object x, str name, int64_t *batch):
    """k or v: contiguous but between sequences, as a slice of a cache is; *batch is the step between those."""
    cdef cnp.ndarray a = f32(x, "attention", name)
    if cnp.PyArray_NDIM(a) != 4:
        raise ShapeError(f"attention: {name} must be (B, S, Hkv, D), its shape is {shape_of(a)}")
    cdef int64_t d = cnp.PyArray_DIM(a, 3), heads = cnp.PyArray_DIM(a, 2), s = cnp.PyArray_DIM(a, 1)
    cdef int64_t step = cnp.PyArray_STRIDE(a, 0)
    if (cnp.PyArray_STRIDE(a, 3) != 4 or cnp.PyArray_STRIDE(a, 2) != 4 * d or cnp.PyArray_STRIDE(a, 1) != 4 * d * heads
            or step % 4 or (cnp.PyArray_DIM(a, 0) > 1 and step < 4 * d * heads * s)):
        a = np.array(a, order="C")
        step = 4 * d * heads * s
    batch[0] = step // 4
    return a


cdef cnp.ndarray describe_attention(en_attention *p, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, double scale,
                                    bint causal, int64_t window, object starts, str op):
    """Checks the operands against each other, fills p; returns the int32 array of starts, which p points into."""
    cdef cnp.ndarray first = None
    if cnp.PyArray_NDIM(q) != 4:
        raise ShapeError(f"{op}: q must be (B, T, H, D), its shape is {shape_of(q)}")
    same_shape(k, v, op, "k", "v")
    p.b, p.t, p.h, p.d = shape_of(q)
    p.s, p.hkv = cnp.PyArray_DIM(k, 1), cnp.PyArray_DIM(k, 2)
    if (cnp.PyArray_DIM(k, 0) != p.b or cnp.PyArray_DIM(k, 3) != p.d or p.s < p.t or p.hkv < 1 or p.h < 1
            or p.h % p.hkv or p.d < 1):
        raise ShapeError(f"{op}: q {shape_of(q)} with k {shape_of(k)}; needed are (B, T, H, D) and (B, S, Hkv, D) with "
                         "S >= T and H a multiple of Hkv")
    if not 0 < scale < float("inf"):
        raise UsageError(f"{op}: scale {scale} is not a positive number")
    if window < 0:
        raise UsageError(f"{op}: window {window} is negative; 0 means none")
    p.scale, p.causal, p.window, p.starts = scale, causal, window, NULL
    if starts is not None:
        first = plain(starts, op, "starts")
        if not cnp.PyArray_ISINTEGER(first):
            raise DTypeError(f"{op}: starts must be integers, not {(<object>first).dtype}")
        if shape_of(first) != (p.b, p.t):
            raise ShapeError(f"{op}: starts must be ({p.b}, {p.t}), its shape is {shape_of(first)}")
        first = np.array(first, np.int64, order="C")  # our own: what was checked is what C reads
        if ((<object>first < 0) | (<object>first > np.arange(p.s - p.t, p.s))).any():
            raise UsageError(f"{op}: starts must lie between 0 and the query's own position")
        first = np.array(first, np.int32)
        p.starts = <const int32_t *>cnp.PyArray_DATA(first)
    p.q, p.k, p.v = floats(q), floats(k), floats(v)
    return first


def attention(q, k, v, double scale, bint causal=True, int64_t window=0, starts=None):
    """(o, lse): softmax(scale·q·kᵀ + mask)·v (B, T, H, D), and the log-sum-exp of the scores (B, H, T).

    Query t sits at position t + S - T and sees keys up to its position (causal), from `starts`[b, t] int32 on and, with
    window > 0, no more than that many. k, v may be slices of a longer cache.
    """
    cdef const en_kernels *table = kernels()
    cdef en_attention p
    cdef cnp.ndarray aq = contiguous(q, "attention", "q")
    cdef cnp.ndarray ak = cached(k, "k", &p.k_batch), av = cached(v, "v", &p.v_batch)
    cdef cnp.ndarray first = describe_attention(&p, aq, ak, av, scale, causal, window, starts, "attention")
    cdef cnp.ndarray o = empty(shape_of(aq), cnp.NPY_FLOAT32, "attention")
    cdef cnp.ndarray lse = empty((p.b, p.h, p.t), cnp.NPY_FLOAT32, "attention")
    p.o, p.lse = floats(o), floats(lse)
    cdef en_status status
    with nogil:
        status = table.attention(&p)
    check(status, "attention")
    return o, lse


def attention_backward(g, q, k, v, o, lse, double scale, bint causal=True, int64_t window=0, starts=None):
    """(dq, dk, dv) of attention from the gradient g (B, T, H, D) of o; o and lse are what attention returned."""
    cdef const en_kernels *table = kernels()
    cdef en_attention p
    cdef str op = "attention_backward"
    cdef cnp.ndarray aq = contiguous(q, op, "q"), ag = contiguous(g, op, "g"), ao = contiguous(o, op, "o")
    cdef cnp.ndarray al = contiguous(lse, op, "lse", 3)
    cdef cnp.ndarray ak = cached(k, "k", &p.k_batch), av = cached(v, "v", &p.v_batch)
    cdef cnp.ndarray first = describe_attention(&p, aq, ak, av, scale, causal, window, starts, op)
    same_shape(ag, aq, op, "g", "q")
    same_shape(ao, aq, op, "o", "q")
    if shape_of(al) != (p.b, p.h, p.t):
        raise ShapeError(f"{op}: lse must be ({p.b}, {p.h}, {p.t}), its shape is {shape_of(al)}")
    cdef cnp.ndarray dq = empty(shape_of(aq), cnp.NPY_FLOAT32, op)
    cdef cnp.ndarray dk = empty(shape_of(ak), cnp.NPY_FLOAT32, op)
    cdef cnp.ndarray dv = empty(shape_of(av), cnp.NPY_FLOAT32, op)
    p.g, p.o, p.lse = floats(ag), floats(ao), floats(al)
    p.dq, p.dk, p.dv = floats(dq), floats(dk), floats(dv)
    cdef en_status status
    with nogil:
        status = table.attention_backward(&p)
    check(status, op)
    return dq, dk, dv
