# Products of matrices.

def matmul(a, b, bint trans_a=False, bint trans_b=False, out=None, bint accumulate=False):
    """a (..., M, K) times b (..., K, N) -> (..., M, N), f32.

    b may be float32, bfloat16 or float16. trans_a, trans_b swap the last two dimensions of that operand. Batch
    dimensions broadcast; operands may have any strides. out: C-contiguous result to write, or with accumulate to add to.
    Raises ShapeError, DTypeError.
    """
    cdef const en_kernels *k = kernels()
    cdef en_gemm p
    cdef cnp.ndarray pa = f32(a, "matmul", "a")
    cdef cnp.ndarray pb, pc
    cdef int na = cnp.PyArray_NDIM(pa), nb, nd, i, ia, ib
    cdef int64_t size, da, db, step
    pb = plain(b, "matmul", "b")
    weight_type(pb, "matmul", "b", &p.b_type)
    size = 4 if p.b_type == EN_F32 else 2
    pb = whole_strides(pb, size)
    nb = cnp.PyArray_NDIM(pb)
    if na < 2 or nb < 2 or na > EN_MAX_DIMS or nb > EN_MAX_DIMS:
        raise ShapeError(f"matmul: operands need 2 to {<int>EN_MAX_DIMS} dimensions, shapes are {a.shape} and {b.shape}")
    p.m = cnp.PyArray_DIM(pa, na - 1 if trans_a else na - 2)
    p.k = cnp.PyArray_DIM(pa, na - 2 if trans_a else na - 1)
    p.n = cnp.PyArray_DIM(pb, nb - 2 if trans_b else nb - 1)
    p.a_row = cnp.PyArray_STRIDE(pa, na - 1 if trans_a else na - 2) // 4
    p.a_col = cnp.PyArray_STRIDE(pa, na - 2 if trans_a else na - 1) // 4
    p.b_row = cnp.PyArray_STRIDE(pb, nb - 1 if trans_b else nb - 2) // size
    p.b_col = cnp.PyArray_STRIDE(pb, nb - 2 if trans_b else nb - 1) // size
    if cnp.PyArray_DIM(pb, nb - 1 if trans_b else nb - 2) != p.k:
        raise ShapeError(f"matmul: inner dimensions differ: {a.shape}{' transposed' if trans_a else ''} and "
                         f"{b.shape}{' transposed' if trans_b else ''}")
    nd = max(na, nb)
    p.batch_ndim = nd - 2
    shape = []
    for i in range(nd - 2):
        ia = i - (nd - na)
        ib = i - (nd - nb)
        da = cnp.PyArray_DIM(pa, ia) if ia >= 0 else 1
        db = cnp.PyArray_DIM(pb, ib) if ib >= 0 else 1
        if da != db and da != 1 and db != 1:
            raise ShapeError(f"matmul: batch dimensions differ: {a.shape} and {b.shape}")
        p.batch[i] = db if da == 1 else da
        p.a_batch[i] = cnp.PyArray_STRIDE(pa, ia) // 4 if da > 1 else 0
        p.b_batch[i] = cnp.PyArray_STRIDE(pb, ib) // size if db > 1 else 0
        shape.append(p.batch[i])
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
        p.c_batch[i] = step
        step *= p.batch[i]
    # One weight for all: rows of the batch are rows of one product, as far as their strides allow.
    while p.batch_ndim and p.b_batch[p.batch_ndim - 1] == 0:
        i = p.batch_ndim - 1
        if p.m == 1:
            p.a_row = p.a_batch[i]
        elif p.batch[i] != 1 and p.a_batch[i] != p.m * p.a_row:
            break
        p.m *= p.batch[i]
        p.batch_ndim -= 1
    p.a = floats(pa)
    p.b = cnp.PyArray_DATA(pb)
    p.c = floats(pc)
    p.c_row = p.n
    p.accumulate = accumulate
    if p.k == 0:
        if not accumulate:
            pc[...] = 0
        return pc
    cdef en_status status
    with nogil:
        status = k.gemm(&p)
    check(status, "matmul")
    return pc


cdef cnp.ndarray matrix(object x, str op, str name):
    """x (2-D) as an aligned native f32, bf16 or f16 array of any strides that are whole elements."""
    cdef en_dtype kind
    cdef cnp.ndarray a = plain(x, op, name)
    weight_type(a, op, name, &kind)
    if cnp.PyArray_NDIM(a) != 2:
        raise ShapeError(f"{op}: {name} must have 2 dimensions, its shape is {shape_of(a)}")
    return whole_strides(a, 4 if kind == EN_F32 else 2)


def product(terms, out, *, bias=None, residual=None, bint accumulate=False):
    """out (m, n) = the sum of its terms' products + bias + residual, summed in f32 and rounded once.

    terms: up to eight of (a, b) or (a, b, n0): a (m, k) times b (k, w), which counts in columns n0 to n0 + w of out (n0
    is 0 by default); k may differ between terms. a and b are float32, bfloat16 or float16 and may have any strides.
    out: float32 or bfloat16, columns contiguous, any row stride; overwritten, or with accumulate added to. bias (n,)
    f32. residual (m, n) of out's type, columns contiguous. Where the first a is bfloat16 and `fast_bf16()`, all operands
    are rounded to bfloat16 and multiplied as such, denormals as 0; else they are widened to f32 and multiplied there.
    Returns out. Raises ShapeError, DTypeError, UsageError.
    """
    cdef cnp.ndarray pa, pb, pc
    pc = plain(out, "product", "out")
    if cnp.PyArray_NDIM(pc) != 2:
        raise ShapeError(f"product: out must have 2 dimensions, its shape is {shape_of(pc)}")
    if (<object>pc).dtype not in (np.float32, ml_dtypes.bfloat16):
        raise DTypeError(f"product: out must be float32 or bfloat16, not {(<object>pc).dtype}")
    cdef int64_t m = cnp.PyArray_DIM(pc, 0), n = cnp.PyArray_DIM(pc, 1), start
    if not 1 <= len(terms) <= 8:
        raise UsageError(f"product: {len(terms)} terms, there must be 1 to 8")
    total = np.asarray(pc, np.float32) + 0 if accumulate else np.zeros((m, n), np.float32)
    seen = ml_dtypes.bfloat16 if fast_bf16() and terms[0][0].dtype == ml_dtypes.bfloat16 else np.float32
    for index, term in enumerate(terms):
        pa = matrix(term[0], "product", f"a of term {index}")
        pb = matrix(term[1], "product", f"b of term {index}")
        start = term[2] if len(term) > 2 else 0
        if (shape_of(pa)[0] != m or shape_of(pa)[1] != shape_of(pb)[0] or start < 0
                or start + shape_of(pb)[1] > n):
            raise ShapeError(f"product: term {index} is {shape_of(pa)} times {shape_of(pb)} at column {start}, "
                             f"out has shape {shape_of(pc)}")
        total[:, start : start + shape_of(pb)[1]] += matmul(
            pa.astype(seen).astype(np.float32), pb.astype(seen))
    if bias is not None:
        if np.shape(bias) != (n,):
            raise ShapeError(f"product: bias has shape {np.shape(bias)}, out {shape_of(pc)}")
        total += f32(bias, "product", "bias")
    if residual is not None:
        if np.shape(residual) != (m, n):
            raise ShapeError(f"product: residual has shape {np.shape(residual)}, out {shape_of(pc)}")
        total += np.asarray(residual, np.float32)
    out[...] = total.astype((<object>pc).dtype)
    return out
