# Matrices that stay quantized, as operands of products.

cdef float dynamic_map[256]

cdef void fill_dynamic_map() noexcept:
    cdef int code
    for code in range(256):
        dynamic_map[code] = en_dynamic_value(code)

fill_dynamic_map()


cdef class Packed:
    """A matrix of quantized numbers which `product` takes as a b. Read-only; it keeps its memory alive.

    Attributes: name of the type, shape, ndim, nbytes (stored); T, the same matrix turned, which shares all.
    """

    cdef en_blocks matrix
    cdef bint transposed
    cdef cnp.ndarray bytes
    cdef readonly tuple shape
    cdef readonly str name
    cdef readonly int ndim

    def __init__(self, str name, raw, tuple shape):
        """raw: uint8, 1-D, the stored form of a (rows, columns) matrix as `quantize` gives it, NF4 and FP4 with blocks of
        64. Raises ShapeError, DTypeError, UsageError."""
        cdef en_qtype type = qtype_of(name, "packed")
        cdef const en_codec *codec = en_codecs + <int>type
        cdef int64_t rows, columns
        cdef en_flat at
        if len(shape) != 2 or shape[0] < 0 or shape[1] < 0 or (shape[0] and shape[1] > (<int64_t>1 << 59) // shape[0]):
            raise ShapeError(f"packed: {shape} is no shape of a matrix")
        rows, columns = shape
        if codec.levels == NULL and columns % codec.values:
            raise ShapeError(f"packed: rows of {columns} elements are not whole blocks of {name}, {codec.values}")
        cdef cnp.ndarray a = stored(raw, "packed")
        if cnp.PyArray_SIZE(a) != packed_bytes(name, rows * columns):
            raise ShapeError(f"packed: {shape} of {name} takes {packed_bytes(name, rows * columns)} bytes, "
                             f"not {cnp.PyArray_SIZE(a)}")
        if codec.levels != NULL and <size_t>cnp.PyArray_DATA(a) % 4:
            a = aligned_copy(a)
        self.bytes = a
        self.shape = (rows, columns)
        self.ndim = 2
        self.name = name
        cdef const uint8_t *data = <const uint8_t *>cnp.PyArray_DATA(a)
        self.matrix.type = type
        self.matrix.values = codec.values
        self.matrix.bytes = 32 if codec.levels != NULL else codec.bytes
        self.matrix.raw = data
        if codec.levels != NULL:
            at = en_flat_layout(rows * columns, 64, codec.nested)
            if not codec.nested:
                self.matrix.absmax = <const float *>(data + at.scales)
            else:
                self.matrix.codes = data + at.scales
                self.matrix.nested = <const float *>(data + at.nested_scales)
                self.matrix.map = dynamic_map
                self.matrix.offset = (<const float *>(data + at.offset))[0]

    @property
    def nbytes(self):
        return self.bytes.nbytes

    @property
    def T(self):
        cdef Packed turned = Packed.__new__(Packed)
        turned.matrix = self.matrix
        turned.transposed = not self.transposed
        turned.bytes = self.bytes
        turned.shape = self.shape[::-1]
        turned.name = self.name
        turned.ndim = 2
        return turned


cdef cnp.ndarray aligned_copy(cnp.ndarray a):
    cdef cnp.ndarray copy = empty((cnp.PyArray_SIZE(a),), cnp.NPY_UINT8, "packed")
    (<object>copy)[...] = a
    return copy
