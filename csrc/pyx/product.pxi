# Products of matrices.

def matmul(a, b, bint trans_a=False, bint trans_b=False, out=None, bint accumulate=False):
    """a (..., M, K) times b (..., K, N) -> (..., M, N), f32.

    b may be float32, bfloat16 or float16. trans_a, trans_b swap the last two dimensions of that operand. Batch
    dimensions broadcast; operands may have any strides. out: C-contiguous result to write, or with accumulate to add
    to. Raises ShapeError, DTypeError.
    """
    cdef const en_kernels *k = kernels()
    cdef en_gemm p
    cdef en_batch batch
    cdef en_term *t = p.term
    cdef cnp.ndarray pa = f32(a, "matmul", "a")
    cdef cnp.ndarray pb, pc
    cdef int na = cnp.PyArray_NDIM(pa), nb, nd, i, ia, ib
    cdef int64_t size, da, db, step
    cdef double products = 1
    pb = plain(b, "matmul", "b")
    weight_type(pb, "matmul", "b", &t.b_type)
    size = 4 if t.b_type == EN_F32 else 2
    pb = whole_strides(pb, size)
    nb = cnp.PyArray_NDIM(pb)
    if na < 2 or nb < 2 or na > EN_MAX_DIMS or nb > EN_MAX_DIMS:
        raise ShapeError(f"matmul: operands need 2 to {<int>EN_MAX_DIMS} dimensions, "
                         f"shapes are {a.shape} and {b.shape}")
    p.m = cnp.PyArray_DIM(pa, na - 1 if trans_a else na - 2)
    t.k = cnp.PyArray_DIM(pa, na - 2 if trans_a else na - 1)
    p.n = cnp.PyArray_DIM(pb, nb - 2 if trans_b else nb - 1)
    t.a_row = cnp.PyArray_STRIDE(pa, na - 1 if trans_a else na - 2) // 4
    t.a_col = cnp.PyArray_STRIDE(pa, na - 2 if trans_a else na - 1) // 4
    t.b_row = cnp.PyArray_STRIDE(pb, nb - 1 if trans_b else nb - 2) // size
    t.b_col = cnp.PyArray_STRIDE(pb, nb - 2 if trans_b else nb - 1) // size
    if cnp.PyArray_DIM(pb, nb - 1 if trans_b else nb - 2) != t.k:
        raise ShapeError(f"matmul: inner dimensions differ: {a.shape}{' transposed' if trans_a else ''} and "
                         f"{b.shape}{' transposed' if trans_b else ''}")
    nd = max(na, nb)
    batch.ndim = nd - 2
    shape = []
    for i in range(nd - 2):
        ia = i - (nd - na)
        ib = i - (nd - nb)
        da = cnp.PyArray_DIM(pa, ia) if ia >= 0 else 1
        db = cnp.PyArray_DIM(pb, ib) if ib >= 0 else 1
        if da != db and da != 1 and db != 1:
            raise ShapeError(f"matmul: batch dimensions differ: {a.shape} and {b.shape}")
        batch.shape[i] = db if da == 1 else da
        batch.a[i] = cnp.PyArray_STRIDE(pa, ia) // 4 if da > 1 else 0
        batch.b[i] = cnp.PyArray_STRIDE(pb, ib) // size if db > 1 else 0
        shape.append(batch.shape[i])
    result = (*shape, p.m, p.n)
    if out is None:
        if accumulate:
            raise UsageError("matmul: accumulate needs out")
        pc = empty(result, cnp.NPY_FLOAT32, "matmul")
    else:
        pc = writable(out, "matmul", "out")
        if shape_of(pc) != result:
            raise ShapeError(f"matmul: out has shape {shape_of(pc)}, the product of {a.shape} and {b.shape} {result}")
        if np.may_share_memory(pc, pa) or np.may_share_memory(pc, pb):
            raise UsageError("matmul: out overlaps an operand")
    step = p.m * p.n
    for i in range(nd - 3, -1, -1):
        batch.c[i] = step
        step *= batch.shape[i]
    # One weight for all: rows of the batch are rows of one product, as far as their strides allow.
    while batch.ndim and batch.b[batch.ndim - 1] == 0:
        i = batch.ndim - 1
        if p.m == 1:
            t.a_row = batch.a[i]
        elif batch.shape[i] != 1 and batch.a[i] != p.m * t.a_row:
            break
        p.m *= batch.shape[i]
        batch.ndim -= 1
    t.n = p.n
    t.n0 = 0
    t.packed = NULL
    t.a = cnp.PyArray_DATA(pa)
    t.a_type = EN_F32
    t.b = cnp.PyArray_DATA(pb)
    p.terms = 1
    p.c = cnp.PyArray_DATA(pc)
    p.c_type = EN_F32
    p.c_row = p.n
    p.bias = NULL
    p.residual = NULL
    p.accumulate = accumulate
    cdef en_status status
    with nogil:
        status = k.gemm(&p, &batch)
    for i in range(batch.ndim):
        products *= batch.shape[i]
    check(status, "matmul", 2 * products * p.m * p.n * t.k, bytes_of(pa) + bytes_of(pb) + bytes_of(pc), EN_F32,
          p.m, p.n, t.k)
    return pc


cdef cnp.ndarray matrix(object x, en_dtype *kind, str name):
    """x (rows, columns) as an aligned native f32, bf16 or f16 array of any strides that are whole elements."""
    cdef cnp.ndarray a = plain(x, "product", name)
    weight_type(a, "product", name, kind)
    if cnp.PyArray_NDIM(a) != 2:
        raise ShapeError(f"product: {name} must have 2 dimensions, its shape is {shape_of(a)}")
    return whole_strides(a, 4 if kind[0] == EN_F32 else 2)


cdef cnp.ndarray rows(object x, en_dtype *kind, str name):
    """The same for a matrix that can't be copied, or is read along with one: f32 or bf16, columns contiguous."""
    cdef cnp.ndarray a = plain(x, "product", name)
    if cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT32 and cnp.PyArray_TYPE(a) != BF16:
        raise DTypeError(f"product: {name} must be float32 or bfloat16, not {(<object>a).dtype}")
    a = matrix(a, kind, name)
    cdef int size = 4 if kind[0] == EN_F32 else 2
    if cnp.PyArray_SIZE(a) and cnp.PyArray_DIM(a, 1) > 1 and cnp.PyArray_STRIDE(a, 1) != size:
        raise ShapeError(f"product: {name} must have contiguous columns, its strides are {x.strides}")
    return a


def product(terms, out, *, bias=None, residual=None, bint accumulate=False):
    """out (m, n) = the sum of its terms' products + bias + residual, summed in f32 and rounded once.

    terms: up to eight of (a, b) or (a, b, n0): a (m, k) times b (k, w), which counts in columns n0 to n0 + w of out (n0
    is 0 by default); k may differ between terms. a and b are float32, bfloat16 or float16 and may have any strides; b
    may be a Packed matrix, or the transpose of one.
    out: float32 or bfloat16, columns contiguous, any row stride; overwritten, or with accumulate added to. bias (n,)
    f32. residual (m, n) of out's type, columns contiguous; it may be out. Where the first a is bfloat16 and
    `fast_bf16()`, all operands are rounded to bfloat16 and multiplied as such, denormals as 0; else they are widened to
    f32 and multiplied there. Returns out. Raises ShapeError, DTypeError, UsageError.
    """
    cdef const en_kernels *k = kernels()
    cdef en_gemm p
    cdef en_term *t
    cdef en_dtype kind
    cdef cnp.ndarray a, b, c, r
    cdef Packed w
    cdef double flops = 0, traffic = 0
    cdef int size
    c = rows(out, &p.c_type, "out")
    if cnp.PyArray_DATA(c) != cnp.PyArray_DATA(out):
        raise ShapeError("product: out is written in place and must be aligned")
    if not cnp.PyArray_ISWRITEABLE(c):
        raise DTypeError("product: out is written in place but read-only")
    p.m = cnp.PyArray_DIM(c, 0)
    p.n = cnp.PyArray_DIM(c, 1)
    p.c = cnp.PyArray_DATA(c)
    p.c_row = cnp.PyArray_STRIDE(c, 0) // (4 if p.c_type == EN_F32 else 2)
    p.terms = len(terms)
    if not 1 <= p.terms <= EN_MAX_TERMS:
        raise UsageError(f"product: {len(terms)} terms; there must be 1 to {<int>EN_MAX_TERMS}")
    held = []  # operands that had to be copied live as long as the call
    for i, term in enumerate(terms):
        t = &p.term[i]
        a = matrix(term[0], &t.a_type, "a")
        t.k = cnp.PyArray_DIM(a, 1)
        t.n0 = term[2] if len(term) > 2 else 0
        if isinstance(term[1], Packed):
            w = term[1]
            b = w.bytes
            shape = w.shape
            t.packed = &w.matrix
            t.b_at = 0
            t.b_type = EN_F32
            t.b_row, t.b_col = (1, shape[0]) if w.transposed else (shape[1], 1)
        else:
            b = matrix(term[1], &t.b_type, "b")
            shape = shape_of(b)
            t.packed = NULL
            size = 4 if t.b_type == EN_F32 else 2
            t.b = cnp.PyArray_DATA(b)
            t.b_row = cnp.PyArray_STRIDE(b, 0) // size
            t.b_col = cnp.PyArray_STRIDE(b, 1) // size
        t.n = shape[1]
        if cnp.PyArray_DIM(a, 0) != p.m or shape[0] != t.k or t.n0 < 0 or t.n0 > p.n or t.n > p.n - t.n0:
            raise ShapeError(f"product: term {i} is {shape_of(a)} times {shape} at column {t.n0}, "
                             f"out has shape {shape_of(c)}")
        if np.may_share_memory(c, a, 1000) or np.may_share_memory(c, b, 1000):
            raise UsageError(f"product: out overlaps an operand of term {i}")
        held += (a, b)
        flops += 2.0 * p.m * t.n * t.k
        traffic += bytes_of(a) + bytes_of(b)
        t.a = cnp.PyArray_DATA(a)
        size = 4 if t.a_type == EN_F32 else 2
        t.a_row = cnp.PyArray_STRIDE(a, 0) // size
        t.a_col = cnp.PyArray_STRIDE(a, 1) // size
    p.bias = NULL
    if bias is not None:
        b = contiguous(bias, "product", "bias", 1)
        if cnp.PyArray_DIM(b, 0) != p.n:
            raise ShapeError(f"product: bias has shape {shape_of(b)}, out {shape_of(c)}")
        p.bias = floats(b)
    p.residual = NULL
    p.residual_row = 0
    if residual is not None:
        r = rows(residual, &kind, "residual")
        if kind != p.c_type or shape_of(r) != shape_of(c):
            raise ShapeError(f"product: residual is {(<object>r).dtype} {shape_of(r)}, out {(<object>c).dtype} "
                             f"{shape_of(c)}; they must be alike")
        if cnp.PyArray_DATA(r) != p.c and np.may_share_memory(c, r, 1000):
            raise UsageError("product: residual overlaps out, and isn't out itself")
        traffic += bytes_of(r)
        p.residual = cnp.PyArray_DATA(r)
        p.residual_row = cnp.PyArray_STRIDE(r, 0) // (4 if kind == EN_F32 else 2)
    p.accumulate = accumulate
    cdef en_status status
    with nogil:
        status = k.gemm(&p, NULL)
    kind = EN_BF16 if p.term[0].a_type == EN_BF16 and k.fast_bf16 else EN_F32
    traffic += (2 if accumulate else 1) * bytes_of(c)
    check(status, "product", flops, traffic, kind, p.m, p.n, p.term[0].k)
    return out
