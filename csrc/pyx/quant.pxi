# ---- quantized storage: csrc/quant, csrc/kernels/dequant.h ----

cdef dict QTYPE_OF = {en_codecs[i].name.decode(): i for i in range(EN_QTYPE_COUNT) if en_codecs[i].name != NULL}


def codecs():
    """name -> (elements of a block, its bytes, whether it can be written), as C has them."""
    return {name: (en_codecs[i].values, en_codecs[i].bytes, en_codecs[i].encode != NULL or en_codecs[i].levels != NULL)
            for name, i in QTYPE_OF.items()}


cdef en_qtype qtype_of(object name, str op) except *:
    if name not in QTYPE_OF:
        raise UsageError(f"{op}: no encoding {name!r}; it is one of {', '.join(QTYPE_OF)}")
    return <en_qtype><int>QTYPE_OF[name]


cdef int64_t block_of(object block, str op) except -1:
    """The block of NF4 and FP4, as bitsandbytes takes them."""
    if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise UsageError(f"{op}: block={block}: must be a power of two from 32 to 4096")
    return block


cdef cnp.ndarray stored(object raw, str op):
    """raw as a C-contiguous array of bytes."""
    cdef cnp.ndarray a = plain(raw, op, "raw")
    if cnp.PyArray_TYPE(a) != cnp.NPY_UINT8:
        raise DTypeError(f"{op}: raw must be an array of uint8, not {(<object>a).dtype}")
    return packed(a)


def packed_bytes(name, int64_t n, block=64):
    """Bytes that `n` elements take; ShapeError where they don't fill whole blocks. `block` counts for NF4 and FP4."""
    cdef int64_t size = -1
    cdef en_qtype type = qtype_of(name, "packed_bytes")
    cdef int64_t length = block_of(block, "packed_bytes")
    if 0 <= n < <int64_t>1 << 59:
        size = en_packed_bytes(type, n, length)
    if size < 0:
        raise ShapeError(f"{name}: {n} elements do not fill blocks of {en_codecs[<int>type].values}")
    return size


def flat_parts(name, int64_t n, block=64):
    """Where the parts of an NF4 or FP4 array of `n` elements begin: (scales, nested scales, offset, end), in bytes; the
    codes begin at 0. Without double quantization the last three are equal."""
    cdef en_qtype type = qtype_of(name, "flat_parts")
    packed_bytes(name, n, block)
    cdef en_flat at = en_flat_layout(n, block, en_codecs[<int>type].nested)
    return at.scales, at.nested_scales, at.offset, at.bytes


def quantize(name, x, block=64):
    """The stored bytes (uint8, 1-D, aligned) of x (float32, float16 or bfloat16, any shape and strides), row-major.

    Raises NonFiniteError that names the first element which is NaN or infinite, or the block whose values are too large
    for its 16-bit scale; ShapeError where rows do not fill blocks; UsageError for a type that is only read.
    """
    cdef en_qtype type = qtype_of(name, "quantize")
    cdef const en_codec *codec = en_codecs + <int>type
    cdef int64_t length = block_of(block, "quantize")
    if codec.encode == NULL and codec.levels == NULL:
        names = [k for k, (_, _, writes) in codecs().items() if writes]
        raise UsageError(f"quantize: {name} is read, not written; written are: {', '.join(names)}")
    cdef en_source source
    cdef cnp.ndarray a = plain(x, "quantize", "x")
    weight_type(a, "quantize", "x", &source.type)
    a = packed(a)
    source.n = cnp.PyArray_SIZE(a)
    source.x = cnp.PyArray_DATA(a)
    cdef int64_t width = cnp.PyArray_DIM(a, cnp.PyArray_NDIM(a) - 1) if cnp.PyArray_NDIM(a) else 1
    if codec.levels == NULL and width % codec.values:
        raise ShapeError(f"quantize: rows of {width} elements do not fill {name}'s blocks of {codec.values}; x has the "
                         f"shape {shape_of(a)}")
    cdef cnp.ndarray raw = empty((packed_bytes(name, source.n, block),), cnp.NPY_UINT8, "quantize")
    kernels()  # reads ENTRENAR_THREADS, marks the call's entry
    cdef en_status status
    with nogil:
        status = en_quantize(type, length, &source, <uint8_t *>cnp.PyArray_DATA(raw))
    if status == EN_NOT_FINITE or status == EN_TOO_LARGE:
        place = tuple([int(i) for i in np.unravel_index(en_bad_id(), shape_of(a))])
        if status == EN_NOT_FINITE:
            raise NonFiniteError(f"quantize: the element at {place} is {a[place]}")
        raise NonFiniteError(f"quantize: the block from {place} has values too large for {name}'s 16-bit scale")
    check(status, "quantize", 0, bytes_of(a) + bytes_of(raw), source.type, source.n)
    return raw


def dequantize(name, raw, dtype=np.float32):
    """The values of `raw` (uint8, 1-D), whole blocks of one of ggml's types, as float32, float16 or bfloat16, 1-D.

    Raises ShapeError where `raw` is not a whole number of blocks. NF4 and FP4 lie otherwise: `packed_rows`.
    """
    cdef const en_kernels *k = kernels()
    cdef en_qtype type = qtype_of(name, "dequantize")
    cdef const en_codec *codec = en_codecs + <int>type
    if codec.levels != NULL:
        raise UsageError(f"dequantize: {name} is not stored in blocks of its own; packed_rows reads it")
    cdef cnp.ndarray a = stored(raw, f"dequantize {name}")
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_SIZE(a) % codec.bytes:
        raise ShapeError(f"dequantize {name}: raw of shape {shape_of(a)} is not a row of whole {codec.bytes}-byte "
                         f"blocks")
    cdef en_dtype target
    cdef cnp.ndarray model = np.empty(0, dtype)
    weight_type(model, f"dequantize {name}", "dtype", &target)
    cdef int64_t blocks = cnp.PyArray_SIZE(a) // codec.bytes
    cdef cnp.ndarray y = empty((blocks * codec.values,), cnp.PyArray_TYPE(model), "dequantize")
    cdef en_status status
    with nogil:
        status = k.dequantize(type, blocks, <const uint8_t *>cnp.PyArray_DATA(a), target, cnp.PyArray_DATA(y))
    check(status, "dequantize", 0, bytes_of(a) + bytes_of(y), target, blocks * codec.values)
    return y


def packed_rows(name, raw, int64_t rows, int64_t width, ids=None, dtype=np.float32, block=64):
    """Rows of a stored (rows, width) matrix of any type as (len(ids), width), or all of them, in `dtype`.

    ids: integers, any shape is flattened. Raises ShapeError where `raw` is not what (rows, width) takes, DataError for
    an id beyond the rows.
    """
    cdef en_packed w
    w.type = qtype_of(name, "packed_rows")
    w.block = block_of(block, "packed_rows")
    if rows < 0 or width < 0 or (rows and width > (<int64_t>1 << 59) // rows):
        raise ShapeError(f"packed_rows: ({rows}, {width}) is no shape of a matrix")
    w.n = rows * width
    cdef cnp.ndarray a = stored(raw, "packed_rows")
    size = packed_bytes(name, w.n, block)
    if cnp.PyArray_NDIM(a) != 1 or cnp.PyArray_SIZE(a) != size:
        raise ShapeError(f"packed_rows: {rows} × {width} elements of {name} take {size} bytes; raw is of shape "
                         f"{shape_of(a)}")
    w.raw = <const uint8_t *>cnp.PyArray_DATA(a)
    cdef cnp.ndarray order
    cdef const int64_t *p = NULL
    cdef int64_t count = rows
    if ids is not None:
        order = plain(np.asarray(ids), "packed_rows", "ids")
        if (<object>order).dtype.kind not in "iu" and cnp.PyArray_SIZE(order):
            raise DTypeError(f"packed_rows: ids must be integers, not {(<object>order).dtype}")
        order = packed((<object>order).astype(np.int64).reshape(-1))
        p = <const int64_t *>cnp.PyArray_DATA(order)
        count = cnp.PyArray_SIZE(order)
    cdef en_dtype target
    cdef cnp.ndarray model = np.empty(0, dtype)
    weight_type(model, "packed_rows", "dtype", &target)
    cdef cnp.ndarray y = empty((count, width), cnp.PyArray_TYPE(model), "packed_rows")
    kernels()
    cdef en_status status = EN_OK
    if width:
        with nogil:
            status = en_packed_rows(&w, width, count, p, target, cnp.PyArray_DATA(y))
    check(status, "packed_rows", 0, bytes_of(y), target, count, width)
    return y
