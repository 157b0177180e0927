# Attention: q (B, T, H, D), k and v (B, S, Hkv, D), all f32 or all bf16, read and written where they lie as long as the
# last two dimensions are contiguous; see csrc/kernels/attention.h.

cdef bint lie_in_heads(cnp.ndarray a):
    """Are the last two of four dimensions contiguous, and all steps whole elements?"""
    cdef cnp.npy_intp size = cnp.PyArray_ITEMSIZE(a), d = cnp.PyArray_DIM(a, 3)
    cdef cnp.npy_intp *step = cnp.PyArray_STRIDES(a)
    return (cnp.PyArray_ISALIGNED(a) and (d == 1 or step[3] == size)
            and (cnp.PyArray_DIM(a, 2) == 1 or step[2] == size * d) and step[1] % size == 0 and step[0] % size == 0)


cdef en_heads heads_at(cnp.ndarray a):
    cdef en_heads x
    cdef cnp.npy_intp size = cnp.PyArray_ITEMSIZE(a)
    x.data = cnp.PyArray_DATA(a)
    x.batch, x.token = cnp.PyArray_STRIDE(a, 0) // size, cnp.PyArray_STRIDE(a, 1) // size
    return x


cdef cnp.ndarray heads(object x, str op, str name, en_dtype *type):
    """x (B, T, H, D), copied unless it lies as kernels read it; its type, f32 or bf16, to *type."""
    cdef cnp.ndarray a = plain(x, op, name)
    weight_type(a, op, name, type)
    if type[0] == EN_F16:
        raise DTypeError(f"{op}: {name} must be float32 or bfloat16, not float16")
    if cnp.PyArray_NDIM(a) != 4:
        raise ShapeError(f"{op}: {name} must have 4 dimensions (B, tokens, heads, D), its shape is {shape_of(a)}")
    return a if lie_in_heads(a) else np.array(a, order="C")


cdef cnp.ndarray heads_like(object x, cnp.ndarray q, str op, str name):
    """x as `heads` of q's type."""
    cdef en_dtype type
    cdef cnp.ndarray a = heads(x, op, name, &type)
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(q):
        raise DTypeError(f"{op}: {name} is {(<object>a).dtype}, q {(<object>q).dtype}; all must be of one type")
    return a


cdef cnp.ndarray heads_into(object x, cnp.ndarray like, str op, str name):
    """x itself, which a kernel will write to: `like`'s shape and type, no element twice."""
    cdef cnp.ndarray a = plain(x, op, name)
    cdef int64_t row, token, batch
    same_shape(a, like, op, name, "its operand")
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(like) or not cnp.PyArray_ISNOTSWAPPED(a):
        raise DTypeError(f"{op}: {name} is {(<object>a).dtype}, needed is {(<object>like).dtype}")
    if not cnp.PyArray_ISWRITEABLE(a):
        raise DTypeError(f"{op}: {name} is written to but read-only")
    row = cnp.PyArray_ITEMSIZE(a) * cnp.PyArray_DIM(a, 2) * cnp.PyArray_DIM(a, 3)
    token, batch = cnp.PyArray_STRIDE(a, 1), cnp.PyArray_STRIDE(a, 0)
    if (not lie_in_heads(a) or (cnp.PyArray_DIM(a, 1) > 1 and token < row)
            or (cnp.PyArray_DIM(a, 0) > 1 and batch < token * (cnp.PyArray_DIM(a, 1) - 1) + row)):
        raise ShapeError(f"{op}: {name} is written in place: heads must be contiguous and tokens apart, its strides "
                         f"are {(<object>a).strides}")
    return a


cdef cnp.ndarray describe_attention(en_attention *p, cnp.ndarray q, cnp.ndarray k, cnp.ndarray v, double scale,
                                    bint causal, int64_t window, object starts, str op):
    """Checks the operands against each other, fills p; returns the int32 array of starts, which p points into."""
    cdef cnp.ndarray first = None
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
    p.q, p.k, p.v = heads_at(q), heads_at(k), heads_at(v)
    return first


cdef double scores_of(const en_attention *p) noexcept:
    """How many scores the mask leaves, of all heads; counted while calls are recorded."""
    cdef double total = 0
    cdef int64_t i, position, lo
    if not en_profiling:
        return 0
    for i in range(p.b * p.t):
        position = i % p.t + p.s - p.t
        lo = max(0, position - p.window + 1) if p.window > 0 else 0
        if p.starts != NULL:
            lo = max(lo, p.starts[i])
        total += (position + 1 if p.causal else p.s) - lo
    return total * p.h


def attention(q, k, v, double scale, bint causal=True, int64_t window=0, starts=None):
    """(o, lse): softmax(scale·q·kᵀ + mask)·v (B, T, H, D) of q's type, and the log-sum-exp of the scores (B, H, T) f32.

    q (B, T, H, D), k and v (B, S, Hkv, D), all f32 or all bf16: views whose last two dimensions are contiguous are read
    where they lie, such as parts of one array of q, k and v, or a slice of a cache. Query t sits at position t + S - T
    and sees keys up to its position (causal), from `starts`[b, t] on and, with window > 0, no more than that many.
    """
    cdef const en_kernels *table = kernels()
    cdef en_attention p
    cdef str op = "attention"
    cdef cnp.ndarray aq = heads(q, op, "q", &p.type)
    cdef cnp.ndarray ak = heads_like(k, aq, op, "k"), av = heads_like(v, aq, op, "v")
    cdef cnp.ndarray first = describe_attention(&p, aq, ak, av, scale, causal, window, starts, op)
    cdef cnp.ndarray ao = empty(shape_of(aq), cnp.PyArray_TYPE(aq), op)
    cdef cnp.ndarray al = empty((p.b, p.h, p.t), cnp.NPY_FLOAT32, op)
    p.o, p.lse = heads_at(ao), floats(al)
    cdef en_status status
    with nogil:
        status = table.attention(&p)
    check(status, op, 4 * scores_of(&p) * p.d, bytes_of(aq) + bytes_of(ak) + bytes_of(av) + bytes_of(ao) + bytes_of(al),
          EN_BF16 if p.type == EN_BF16 and table.fast_bf16 else EN_F32, p.b * p.t * p.h, p.s, p.d)
    return ao, al


def attention_backward(g, q, k, v, o, lse, double scale, bint causal=True, int64_t window=0, starts=None, into=None):
    """(dq, dk, dv) of attention from the gradient g (B, T, H, D) of o; o and lse are what attention returned.

    All but lse (f32) are of q's type, as are the results. into: three arrays to write them to, views whose last two
    dimensions are contiguous, that overlap neither an operand nor each other.
    """
    cdef const en_kernels *table = kernels()
    cdef en_attention p
    cdef str op = "attention_backward"
    cdef cnp.ndarray aq = heads(q, op, "q", &p.type), ag = heads_like(g, aq, op, "g"), ao = heads_like(o, aq, op, "o")
    cdef cnp.ndarray ak = heads_like(k, aq, op, "k"), av = heads_like(v, aq, op, "v")
    cdef cnp.ndarray al = contiguous(lse, op, "lse", 3), dq, dk, dv
    cdef cnp.ndarray first = describe_attention(&p, aq, ak, av, scale, causal, window, starts, op)
    same_shape(ag, aq, op, "g", "q")
    same_shape(ao, aq, op, "o", "q")
    if shape_of(al) != (p.b, p.h, p.t):
        raise ShapeError(f"{op}: lse must be ({p.b}, {p.h}, {p.t}), its shape is {shape_of(al)}")
    if into is None:
        into = [empty(shape_of(x), cnp.PyArray_TYPE(aq), op) for x in (aq, ak, av)]
    x, y, z = into
    dq, dk, dv = heads_into(x, aq, op, "dq"), heads_into(y, ak, op, "dk"), heads_into(z, av, op, "dv")
    p.g, p.o, p.lse = heads_at(ag), heads_at(ao), floats(al)
    p.dq, p.dk, p.dv = heads_at(dq), heads_at(dk), heads_at(dv)
    cdef en_status status
    with nogil:
        status = table.attention_backward(&p)
    check(status, op, 10 * scores_of(&p) * p.d, 3 * bytes_of(aq) + 2 * bytes_of(ak) + 2 * bytes_of(av) + bytes_of(ao) +
          bytes_of(al), EN_BF16 if p.type == EN_BF16 and table.fast_bf16 else EN_F32, p.b * p.t * p.h, p.s, p.d)
    return dq, dk, dv

