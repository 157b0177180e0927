# cython: language_level=3, boundscheck=True, wraparound=False, cdivision=True, embedsignature=True
"""The boundary between NumPy arrays and the C kernels: the only place that turns Python objects into pointers.

Every wrapper checks element types, ranks and shapes, raises DTypeError or ShapeError with the operation's name and both
shapes, allocates the result and releases the GIL around the kernel alone. Use it through `entrenar.backend`.
"""

import os

import ml_dtypes
import numpy as np

from entrenar.errors import BackendError, DataError, DTypeError, NonFiniteError, ShapeError, UsageError

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cnp.import_array()

cdef extern from "entrenar.h" nogil:
    ctypedef enum en_status:
        EN_OK
        EN_NO_MEMORY
        EN_BAD_ID
        EN_NOT_FINITE
        EN_TOO_LARGE
    cdef enum en_dtype:
        EN_F32
        EN_BF16
        EN_F16
    cdef enum en_unary:
        EN_NEG, EN_EXP, EN_LOG, EN_RELU, EN_GELU, EN_GELU_TANH, EN_SILU
    cdef enum en_binary:
        EN_ADD, EN_SUB, EN_MUL, EN_DIV, EN_POW
    cdef enum en_qtype:
        EN_QTYPE_COUNT
    cdef enum:
        EN_MAX_DIMS
        EN_MAX_THREADS

    cdef struct en_view:
        void *data
        en_dtype type
        int ndim
        int64_t *shape
        int64_t *stride

    cdef enum:
        EN_MAX_TERMS

    cdef struct en_blocks:
        en_qtype type
        int64_t values, bytes
        const uint8_t *raw
        const float *absmax
        const uint8_t *codes
        const float *nested
        const float *map
        float offset

    cdef struct en_term:
        int64_t k, n, n0
        const void *a
        en_dtype a_type
        int64_t a_row, a_col
        const void *b
        en_dtype b_type
        int64_t b_row, b_col
        const en_blocks *packed
        int64_t b_at

    cdef struct en_gemm:
        int64_t m, n
        int terms
        en_term *term
        void *c
        en_dtype c_type
        int64_t c_row
        const float *bias
        const void *residual
        int64_t residual_row
        int accumulate

    cdef struct en_batch:
        int ndim
        int64_t *shape
        int64_t *a
        int64_t *b
        int64_t *c

    cdef struct en_heads:
        void *data
        int64_t batch, token

    cdef struct en_attention:
        int64_t b, t, s, h, hkv, d
        float scale
        int causal
        int64_t window
        const int32_t *starts
        en_dtype type
        en_heads q, k, v, o
        float *lse
        en_heads g, dq, dk, dv

    cdef struct en_param:
        int64_t n
        en_dtype p_type
        void *p
        const float *g
        void *m
        void *v
        float *m_absmax
        float *v_absmax
        int64_t step
        uint64_t seed, offset

    cdef enum:
        EN_MOMENT_BLOCK

    cdef struct en_adam:
        double lr, beta1, beta2, eps, weight_decay, scale
        int decoupled

    cdef struct en_sgd:
        double lr, momentum, weight_decay, scale
        int nesterov

    cdef struct en_rope:
        int64_t b, t, h, d, rot
        en_dtype type
        en_heads x, y
        const float *cos
        const float *sin
        int64_t table_batch
        int interleaved, inverse

    cdef struct en_swiglu:
        int64_t rows, n
        en_dtype type
        const void *gate
        const void *up
        int64_t gate_row, up_row
        void *h
        const void *g
        void *dgate
        void *dup
        int64_t dgate_row, dup_row

    # The members as csrc/entrenar.h has them; wrappers below use them by name.
    cdef struct en_kernels:
        int fast_bf16
        en_status (*gemm)(const en_gemm *, const en_batch *) noexcept nogil
        en_status (*attention)(const en_attention *) noexcept nogil
        en_status (*attention_backward)(const en_attention *) noexcept nogil
        en_status (*copy)(const en_view *, en_dtype, void *) noexcept nogil
        en_status (*unary)(en_unary, const en_view *, void *) noexcept nogil
        en_status (*unary_backward)(en_unary, en_dtype, int64_t, const void *, const void *, void *) noexcept nogil
        en_status (*binary)(en_binary, const en_view *, const en_view *, void *) noexcept nogil
        en_status (*add_inplace)(en_dtype, int64_t, void *, const void *) noexcept nogil
        en_status (*scale_inplace)(en_dtype, int64_t, void *, float) noexcept nogil
        en_status (*sum)(const en_view *, uint32_t, float *) noexcept nogil
        en_status (*all_finite)(int64_t, const float *, int *) noexcept nogil
        en_status (*softmax)(int64_t, int64_t, const float *, float *) noexcept nogil
        en_status (*softmax_backward)(int64_t, int64_t, const float *, const float *, float *) noexcept nogil
        en_status (*rms_norm)(en_dtype, int64_t, int64_t, const void *, const float *, double, void *,
                              float *) noexcept nogil
        en_status (*rms_norm_backward)(en_dtype, int64_t, int64_t, const void *, const void *, const float *,
                                       const float *, void *, float *, void *) noexcept nogil
        en_status (*layer_norm)(int64_t, int64_t, const float *, const float *, const float *, double, float *,
                                float *, float *) noexcept nogil
        en_status (*layer_norm_backward)(int64_t, int64_t, const float *, const float *, const float *, const float *,
                                         const float *, float *, float *, float *) noexcept nogil
        en_status (*rope)(const en_rope *) noexcept nogil
        en_status (*swiglu)(const en_swiglu *) noexcept nogil
        en_status (*swiglu_backward)(const en_swiglu *) noexcept nogil
        en_status (*embedding)(int64_t, int64_t, int64_t, en_dtype, const void *, const int64_t *, en_dtype,
                               void *) noexcept nogil
        en_status (*embedding_backward)(int64_t, int64_t, int64_t, en_dtype, const void *, const int64_t *,
                                        const int64_t *, float *) noexcept nogil
        en_status (*cross_entropy)(en_dtype, int64_t, int64_t, const void *, const int64_t *, int64_t, float *,
                                   float *) noexcept nogil
        en_status (*cross_entropy_backward)(en_dtype, int64_t, int64_t, const float *, const void *, const int64_t *,
                                            const float *, int64_t, void *) noexcept nogil
        en_status (*cross_entropy_gradient)(en_dtype, int64_t, int64_t, void *, const int64_t *, float, int64_t,
                                            float *) noexcept nogil
        en_status (*dropout)(en_dtype, int64_t, const void *, double, uint64_t, uint64_t, void *) noexcept nogil
        en_status (*square_sums)(int64_t, const en_param *, double *) noexcept nogil
        en_status (*adam_step)(int64_t, const en_param *, const en_adam *) noexcept nogil
        en_status (*sgd_step)(int64_t, const en_param *, const en_sgd *) noexcept nogil
        en_status (*dequantize)(en_qtype, int64_t, const uint8_t *, en_dtype, void *) noexcept nogil
        double (*peak)(en_dtype, double) noexcept nogil

    cdef struct en_codec:
        const char *name
        int64_t values, bytes
        void (*decode)(const uint8_t *, float *)
        void (*encode)(const float *, uint8_t *)
        const float *levels
        int nested

    cdef struct en_packed:
        en_qtype type
        int64_t n
        const uint8_t *raw
        int64_t block

    cdef struct en_source:
        en_dtype type
        int64_t n
        const void *x

    cdef struct en_flat:
        int64_t block, blocks, scales, nested_scales, offset, bytes

    const en_codec *en_codecs
    int64_t en_packed_bytes(en_qtype, int64_t, int64_t)
    en_status en_packed_rows(const en_packed *, int64_t, int64_t, const int64_t *, en_dtype, void *)
    en_status en_quantize(en_qtype, int64_t, const en_source *, uint8_t *)
    en_flat en_flat_layout(int64_t, int64_t, int)
    float en_dynamic_value(int)

    cdef struct en_isa:
        const char *name
        int (*available)() noexcept nogil
        const en_kernels *kernels

    const en_isa *en_isas
    const int en_isa_count
    const int en_software_tiles
    const en_isa *en_find_isa(const char *name)
    const en_isa *en_best_isa()
    const char *en_cpu_vendor()
    const char *en_cpu_model()
    int64_t en_bad_id()
    int en_default_threads()
    int en_get_threads()
    void en_set_threads(int n)
    void *en_alloc(size_t bytes)
    size_t en_kept_bytes()
    void en_trim()
    void en_free(void *block)
    void en_fail_allocation(int64_t nth)

    cdef struct en_work:
        double flops, bytes
        en_dtype type
        int64_t m, n, k

    cdef struct en_record:
        char *name
        int64_t start, duration
        en_work work
        int thread

    int en_profiling
    double en_peak(const en_kernels *, en_dtype, double, int)
    en_status en_bandwidth(double *, double *)
    en_status en_profile_reserve(int64_t capacity)
    void en_profile_clear()
    void en_profile_enter()
    void en_profile_record(const char *name, size_t length, const en_work *)
    int64_t en_profile_count()
    const en_record *en_profile_at(int64_t i)


# ---- instruction set and threads ----

cdef const en_isa *current = NULL


cdef const en_isa *decide() except NULL:
    """The level of this process, from ENTRENAR_ISA or the best there is; also reads ENTRENAR_THREADS."""
    global current
    cdef const en_isa *chosen
    name = os.environ.get("ENTRENAR_ISA", "").strip().lower()
    threads = os.environ.get("ENTRENAR_THREADS", "").strip()
    chosen = find(name, "ENTRENAR_ISA") if name else en_best_isa()
    if threads:
        set_num_threads(int(threads) if threads.isascii() and threads.isdigit() else threads, "ENTRENAR_THREADS")
    current = chosen
    return current


cdef const en_isa *find(str name, str where) except NULL:
    cdef const en_isa *row = en_find_isa(name.encode())
    if row == NULL:
        raise UsageError(f"{where}={name}: no such instruction set; it is one of {', '.join(_isa_names())}")
    if not row.available():
        raise UsageError(f"{where}={name}: this CPU or operating system lacks it; available are "
                         f"{', '.join(available_isas())}")
    return row


cdef inline const en_kernels *kernels() except NULL:
    if current == NULL:
        decide()
    if en_profiling:
        en_profile_enter()
    return current.kernels


def _isa_names():
    return tuple([en_isas[i].name.decode() for i in range(en_isa_count)])


def isa():
    """Name of the instruction set in use: "amx", "avx512_bf16", "avx512", "avx2" or "scalar"."""
    if current == NULL:
        decide()
    return current.name.decode()


def available_isas():
    """Names that ENTRENAR_ISA may have on this machine, best first."""
    return tuple([en_isas[i].name.decode() for i in range(en_isa_count) if en_isas[i].available()])


def fast_bf16():
    """Whether this level multiplies bf16 faster than f32; elsewhere bf16 only saves memory."""
    return bool(kernels().fast_bf16)


def _set_isa(str name):
    """Tests: use another level from now on."""
    global current
    kernels()
    current = find(name, "isa")


def get_num_threads():
    """Threads that a kernel may use, the calling one included."""
    kernels()
    return en_get_threads()


def set_num_threads(n, str where="num_threads"):
    """Let kernels use `n` threads from now on (1 to 256). Results don't depend on it."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 1 <= n <= EN_MAX_THREADS:
        raise UsageError(f"{where}={n}: must be a whole number from 1 to {<int>EN_MAX_THREADS}")
    if where == "num_threads":
        kernels()  # else the environment would overwrite it at first use
    en_set_threads(n)


def cpu_info():
    """What the kernels know of this machine: vendor, model, cores (physical, allowed to this process), isas; and whether
    this is a build for tests that makes the tiles of "amx" in software."""
    return {
        "vendor": en_cpu_vendor().decode(errors="replace"),
        "model": " ".join(en_cpu_model().decode(errors="replace").split()),
        "cores": en_default_threads(),
        "isas": available_isas(),
        "software_tiles": bool(en_software_tiles),
    }


def _fail_allocation(n):
    """Tests: the nth native allocation from now fails; 0 turns that off."""
    en_fail_allocation(n)


# ---- arrays ----

cdef int BF16 = np.dtype(ml_dtypes.bfloat16).num


cdef int check(en_status status, str op, double flops=0, double nbytes=0, en_dtype type=EN_F32, int64_t m=0,
               int64_t n=0, int64_t k=0) except -1:
    """Ends a native call: maps what only C could find out to an exception, and records the call where it is profiled.

    flops: of the arithmetic that was asked for; nbytes: read and written if every operand passes once; type: of the
    products; m, n, k: sizes that tell the call from others of its name (pyx/profile.pxi).
    """
    if status == EN_OK:
        if en_profiling:
            record(op, flops, nbytes, type, m, n, k)
        return 0
    if status == EN_NO_MEMORY:
        raise MemoryError(f"{op}: out of memory")
    if status == EN_BAD_ID:
        raise DataError(f"{op}: id {en_bad_id()} is out of range")
    raise BackendError(f"{op}: status {<int>status}")


cdef void free_block(object capsule) noexcept:
    en_free(PyCapsule_GetPointer(capsule, NULL))


cdef cnp.ndarray empty(tuple shape, int typenum=cnp.NPY_FLOAT32, str op="allocation"):
    """A new C-contiguous array whose data is 64-byte aligned."""
    cdef cnp.npy_intp dims[32]
    cdef cnp.npy_intp size = 4
    cdef int nd = len(shape)
    cdef int i
    cdef bint hollow = False
    if nd > 32:
        raise ShapeError(f"{op}: {nd} dimensions are too many")
    if typenum == cnp.NPY_INT64:
        size = 8
    elif typenum == cnp.NPY_FLOAT16 or typenum == BF16:
        size = 2
    elif typenum == cnp.NPY_UINT8:
        size = 1
    for i in range(nd):
        dims[i] = shape[i]
        if dims[i] == 0:
            hollow = True  # its other dimensions still have to be countable, as in NumPy
        elif size > <cnp.npy_intp>0x7fffffffffffff // dims[i]:
            raise MemoryError(f"{op}: an array of shape {shape} does not fit into memory")
        else:
            size *= dims[i]
    if hollow:
        size = 0
    cdef void *block = en_alloc(size)
    if block == NULL:
        raise MemoryError(f"{op}: no memory for an array of shape {shape}, {size} bytes")
    capsule = PyCapsule_New(block, NULL, free_block)
    cdef cnp.ndarray out = cnp.PyArray_SimpleNewFromData(nd, dims, typenum, block)
    cnp.set_array_base(out, capsule)
    return out


def kept_bytes():
    """Bytes of freed results that are kept for later ones: they count as this process's memory, and are free for it."""
    return en_kept_bytes()


def trim():
    """Gives free pages of the C library's heap back to the system: parsing a large file leaves many."""
    en_trim()


def buffer(shape, dtype=np.float32):
    """A new array of float32, float16 or bfloat16, C-contiguous and 64-byte aligned, its values undefined."""
    cdef en_dtype type
    cdef cnp.ndarray model = np.empty(0, dtype)
    weight_type(model, "buffer", "dtype", &type)
    return empty(tuple(shape), cnp.PyArray_TYPE(model), "buffer")


def joined(arrays):
    """Arrays one below the other as one read-only view, where they are consecutive rows of one array in memory; or None."""
    cdef cnp.ndarray first = plain(arrays[0], "joined", "arrays[0]"), last = first, a
    cdef int nd = cnp.PyArray_NDIM(first), i
    cdef cnp.npy_intp shape[EN_MAX_DIMS]
    if not 1 <= nd <= EN_MAX_DIMS:
        return None
    for i in range(nd):
        shape[i] = cnp.PyArray_DIM(first, i)
    for x in arrays[1:]:
        a = plain(x, "joined", "arrays")
        if (cnp.PyArray_NDIM(a) != nd or cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(first) or (<object>a).base is None
                or (<object>a).base is not (<object>first).base
                or <char *>cnp.PyArray_DATA(a)
                != <char *>cnp.PyArray_DATA(last) + cnp.PyArray_DIM(last, 0) * cnp.PyArray_STRIDE(last, 0)):
            return None
        for i in range(nd):
            if cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(first, i) or (i and cnp.PyArray_DIM(a, i) != shape[i]):
                return None
        shape[0] += cnp.PyArray_DIM(a, 0)
        last = a
    cdef cnp.ndarray view = cnp.PyArray_New(np.ndarray, nd, shape, cnp.PyArray_TYPE(first), cnp.PyArray_STRIDES(first),
                                            cnp.PyArray_DATA(first), 0, 0, first)
    cnp.set_array_base(view, first)
    return view


cdef cnp.ndarray plain(object x, str op, str name):
    """x as an array of NumPy's own class: a subclass may say anything of its shape."""
    if not cnp.PyArray_Check(x):
        raise DTypeError(f"{op}: {name} must be a NumPy array, not {type(x).__name__}")
    return x if cnp.PyArray_CheckExact(x) else np.asarray(x)


cdef tuple shape_of(cnp.ndarray a):
    return (<object>a).shape


cdef cnp.ndarray f32(object x, str op, str name):
    """x as an aligned native f32 array of any strides that are whole elements."""
    cdef cnp.ndarray a = plain(x, op, name)
    if cnp.PyArray_TYPE(a) != cnp.NPY_FLOAT32 or not cnp.PyArray_ISNOTSWAPPED(a):
        raise DTypeError(f"{op}: {name} must be float32, not {(<object>a).dtype}")
    return whole_strides(a, 4)


cdef cnp.ndarray whole_strides(cnp.ndarray a, int size):
    cdef int i
    if not cnp.PyArray_ISALIGNED(a):
        return np.array(a)
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_STRIDES(a)[i] % size:
            return np.array(a)
    return a


cdef cnp.ndarray packed(cnp.ndarray a):
    """a itself where it is C-contiguous and aligned, else a copy that is."""
    return a if cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISALIGNED(a) else np.array(a, order="C")


cdef cnp.ndarray contiguous(object x, str op, str name, int ndim=-1):
    """x as a C-contiguous f32 array; a copy where it isn't one."""
    cdef cnp.ndarray a = f32(x, op, name)
    if ndim >= 0 and cnp.PyArray_NDIM(a) != ndim:
        raise ShapeError(f"{op}: {name} must have {ndim} dimensions, its shape is {shape_of(a)}")
    return packed(a)


cdef cnp.ndarray writable(object x, str op, str name):
    """x itself, which a kernel will write to: C-contiguous f32."""
    cdef cnp.ndarray a = f32(x, op, name)
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(x) or not cnp.PyArray_IS_C_CONTIGUOUS(a):
        raise ShapeError(f"{op}: {name} is written in place and must be C-contiguous, its strides are {x.strides}")
    if not cnp.PyArray_ISWRITEABLE(a):
        raise DTypeError(f"{op}: {name} is written in place but read-only")
    return a


cdef int weight_type(cnp.ndarray a, str op, str name, en_dtype *result) except -1:
    """The type of an array that may be held in 16 bits."""
    cdef int num = cnp.PyArray_TYPE(a)
    if not cnp.PyArray_ISNOTSWAPPED(a):
        num = -1
    if num == cnp.NPY_FLOAT32:
        result[0] = EN_F32
    elif num == cnp.NPY_FLOAT16:
        result[0] = EN_F16
    elif num == BF16:
        result[0] = EN_BF16
    else:
        raise DTypeError(f"{op}: {name} must be float32, float16 or bfloat16, not {(<object>a).dtype}")
    return 0


cdef inline int size_of(en_dtype type) noexcept nogil:
    return 4 if type == EN_F32 else 2


cdef inline int typenum_of(en_dtype type) noexcept:
    return cnp.NPY_FLOAT32 if type == EN_F32 else BF16


cdef cnp.ndarray flowing(object x, str op, str name, en_dtype *type):
    """x as an aligned native array of f32 or bf16, of any strides that are whole elements; *type says which."""
    cdef cnp.ndarray a = plain(x, op, name)
    cdef int num = cnp.PyArray_TYPE(a) if cnp.PyArray_ISNOTSWAPPED(a) else -1
    if num != cnp.NPY_FLOAT32 and num != BF16:
        raise DTypeError(f"{op}: {name} must be float32 or bfloat16, not {(<object>a).dtype}")
    type[0] = EN_F32 if num == cnp.NPY_FLOAT32 else EN_BF16
    return whole_strides(a, size_of(type[0]))


cdef cnp.ndarray alike(object x, cnp.ndarray other, str op, str name, str name_of_other):
    """x as an array of any whole strides and of the type of `other`."""
    cdef en_dtype type
    cdef cnp.ndarray a = flowing(x, op, name, &type)
    if cnp.PyArray_TYPE(a) != cnp.PyArray_TYPE(other):
        raise DTypeError(f"{op}: {name} is {(<object>a).dtype}, {name_of_other} {(<object>other).dtype}; they must be "
                         f"the same")
    return a


cdef cnp.ndarray in_place(object x, str op, str name, en_dtype *type):
    """x itself, which a kernel will write to: f32 or bf16, of any whole strides."""
    cdef cnp.ndarray a = flowing(x, op, name, type)
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(x):
        raise ShapeError(f"{op}: {name} is written in place and must be aligned")
    if not cnp.PyArray_ISWRITEABLE(a):
        raise DTypeError(f"{op}: {name} is written in place but read-only")
    return a


cdef cnp.ndarray dense(cnp.ndarray a, str op, str name):
    """a itself where it is C-contiguous, as what is written in place must be."""
    if not cnp.PyArray_IS_C_CONTIGUOUS(a):
        raise ShapeError(f"{op}: {name} is written in place and must be C-contiguous, its strides are "
                         f"{(<object>a).strides}")
    return a


cdef inline double bytes_of(cnp.ndarray a) noexcept:
    return <double>cnp.PyArray_NBYTES(a)


cdef inline float *floats(cnp.ndarray a) noexcept nogil:
    return <float *>cnp.PyArray_DATA(a)


include "pyx/attention.pxi"
include "pyx/elementwise.pxi"
include "pyx/layers.pxi"
include "pyx/optimizers.pxi"
include "pyx/packed.pxi"
include "pyx/product.pxi"
include "pyx/profile.pxi"
include "pyx/quant.pxi"
