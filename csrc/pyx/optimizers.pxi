# Optimizer steps, in place, on all parameters in one call: lists with one entry a parameter.

from libc.stdlib cimport qsort

cdef struct span:
    char *begin
    char *end
    bint written


cdef int by_begin(const void *a, const void *b) noexcept nogil:
    cdef char *left = (<const span *>a).begin
    cdef char *right = (<const span *>b).begin
    return (left > right) - (left < right)


cdef class Params:
    """The parameters of one call, as C has them. Arrays are checked as they are added, and kept alive."""

    cdef str op
    cdef Py_ssize_t count
    cdef bytearray memory  # en_param a parameter
    cdef double traffic    # bytes read and written
    cdef list kept, written

    def __cinit__(self, str op, Py_ssize_t count):
        self.op = op
        self.count = count
        self.memory = bytearray(count * sizeof(en_param))
        self.kept = []
        self.written = []

    cdef en_param *at(self, Py_ssize_t i):
        return (<en_param *><char *>self.memory) + i

    cdef cnp.ndarray keep(self, cnp.ndarray a, bint written):
        self.kept.append(a)
        self.written.append(written)
        self.traffic += cnp.PyArray_NBYTES(a) * (2 if written else 1)
        return a

    cdef list column(self, object arrays, str name):
        """The same list, one entry a parameter."""
        if not isinstance(arrays, list) or len(arrays) != self.count:
            raise UsageError(f"{self.op}: {name} must be a list with an entry for each of {self.count} parameters")
        return arrays

    cdef cnp.ndarray gradient(self, Py_ssize_t i, object g):
        cdef cnp.ndarray a = self.keep(contiguous(g, self.op, "g"), False)
        self.at(i).n = cnp.PyArray_SIZE(a)
        self.at(i).g = floats(a)
        return a

    cdef cnp.ndarray state(self, object x, str name, cnp.ndarray grad):
        """f32 of the gradient's shape, to be written."""
        cdef cnp.ndarray a = self.keep(writable(x, self.op, name), True)
        same_shape(a, grad, self.op, name, "g")
        return a

    cdef int parameter(self, Py_ssize_t i, object p, object random, cnp.ndarray grad) except -1:
        """f32 or bf16 of the gradient's shape, to be written; random: (seed, offset) of bf16."""
        cdef cnp.ndarray a = plain(p, self.op, "p")
        cdef en_param *param = self.at(i)
        weight_type(a, self.op, "p", &param.p_type)
        if param.p_type == EN_F32:
            param.p = floats(self.state(p, "p", grad))
            return 0
        if param.p_type != EN_BF16:
            raise DTypeError(f"{self.op}: p must be float32 or bfloat16, not {(<object>a).dtype}")
        if random is None:
            raise UsageError(f"{self.op}: p of bfloat16 needs random, the seed and offset of its rounding")
        param.seed, param.offset = random
        param.p = cnp.PyArray_DATA(self.own(a, "p", grad))
        return 0

    cdef cnp.ndarray own(self, cnp.ndarray a, str name, cnp.ndarray grad):
        """An array of 8 or 16 bits that will be written."""
        if not (cnp.PyArray_IS_C_CONTIGUOUS(a) and cnp.PyArray_ISALIGNED(a)):
            raise ShapeError(f"{self.op}: {name} is written in place and must be C-contiguous")
        if not cnp.PyArray_ISWRITEABLE(a):
            raise DTypeError(f"{self.op}: {name} is written in place but read-only")
        same_shape(a, grad, self.op, name, "g")
        return self.keep(a, True)

    cdef int moment(self, object x, object absmax, str name, cnp.ndarray grad, void **data, float **scales) except -1:
        """f32 of the gradient's shape, or codes of that shape with the largest magnitude of each block."""
        cdef cnp.ndarray a, s
        if absmax is None:
            data[0] = floats(self.state(x, name, grad))
            scales[0] = NULL
            return 0
        a = plain(x, self.op, name)
        if cnp.PyArray_TYPE(a) != cnp.NPY_UINT8:
            raise DTypeError(f"{self.op}: {name} must be uint8 where it has magnitudes, not {(<object>a).dtype}")
        data[0] = cnp.PyArray_DATA(self.own(a, name, grad))
        s = self.keep(writable(absmax, self.op, name + "_absmax"), True)
        blocks = (cnp.PyArray_SIZE(a) + EN_MOMENT_BLOCK - 1) // EN_MOMENT_BLOCK
        if shape_of(s) != (blocks,):
            raise ShapeError(f"{self.op}: {name}_absmax has shape {shape_of(s)}; {name} has {blocks} blocks")
        scales[0] = floats(s)
        return 0

    cdef int apart(self) except -1:
        """Checks that whatever is written lies apart from all else."""
        cdef Py_ssize_t n = len(self.kept), i
        cdef bytearray memory = bytearray(n * sizeof(span))
        cdef span *spans = <span *><char *>memory
        cdef char *any_end = NULL
        cdef char *written_end = NULL
        cdef cnp.ndarray a
        for i in range(n):
            a = self.kept[i]
            spans[i].begin = <char *>cnp.PyArray_DATA(a)
            spans[i].end = spans[i].begin + cnp.PyArray_NBYTES(a)
            spans[i].written = self.written[i]
        qsort(spans, n, sizeof(span), by_begin)
        for i in range(n):
            if spans[i].begin == spans[i].end:
                continue
            if spans[i].begin < written_end or (spans[i].written and spans[i].begin < any_end):
                raise UsageError(f"{self.op}: two of the arrays overlap in memory; each needs its own")
            any_end = max(any_end, spans[i].end)
            if spans[i].written:
                written_end = max(written_end, spans[i].end)
        return 0


def square_sums(list arrays not None):
    """The sum of the squares of each array (f32), in double: a list of floats. Shapes alone decide the order."""
    cdef const en_kernels *k = kernels()
    cdef Params params = Params("square_sums", len(arrays))
    cdef Py_ssize_t i, count = params.count
    for i in range(count):
        params.gradient(i, arrays[i])
    cdef cnp.ndarray sums = np.zeros(count)
    cdef const en_param *first = params.at(0)
    cdef en_status status
    with nogil:
        status = k.square_sums(count, first, <double *>cnp.PyArray_DATA(sums))
    check(status, "square_sums", 0, params.traffic)
    return sums.tolist()


def adam_step(list p not None, g, m, v, steps, double lr, double beta1, double beta2, double eps, double weight_decay,
              bint decoupled, double scale=1.0, m_absmax=None, v_absmax=None, random=None):
    """One step of Adam on every parameter, in place on p, m and v (lists of f32 arrays, C-contiguous, each of one shape
    with its g). steps: counts from 1, a list. The decay acts on p directly where decoupled (AdamW), else through the
    gradient. scale: of every gradient, before anything else; g itself stays.

    m_absmax, v_absmax: lists of None, or of f32 arrays (blocks of 256 elements,) where m and v are of uint8 codes; all
    zero at first. Written in place too. csrc/kernels/adamw8.h has the codes.

    random: a list of None, or of (seed, offset) where p is bfloat16: it is rounded stochastically with the random
    numbers there; 128 for each begun 256 elements.
    """
    cdef const en_kernels *k = kernels()
    cdef Params params = Params("adam_step", len(p))
    cdef en_adam settings = en_adam(lr, beta1, beta2, eps, weight_decay, scale, decoupled)
    cdef Py_ssize_t i, count = params.count
    cdef list gs = params.column(g, "g"), ms = params.column(m, "m"), vs = params.column(v, "v")
    cdef list clocks = params.column(steps, "steps")
    cdef list m_scales = params.column([None] * count if m_absmax is None else m_absmax, "m_absmax")
    cdef list places = params.column([None] * count if random is None else random, "random")
    cdef list v_scales = params.column([None] * count if v_absmax is None else v_absmax, "v_absmax")
    cdef en_param *param
    cdef cnp.ndarray grad
    for i in range(count):
        param = params.at(i)
        grad = params.gradient(i, gs[i])
        params.parameter(i, p[i], places[i], grad)
        if (m_scales[i] is None) != (v_scales[i] is None):
            raise UsageError("adam_step: m_absmax and v_absmax go together")
        params.moment(ms[i], m_scales[i], "m", grad, &param.m, &param.m_absmax)
        params.moment(vs[i], v_scales[i], "v", grad, &param.v, &param.v_absmax)
        param.step = clocks[i]
        if param.step < 1:
            raise UsageError(f"adam_step: step={param.step} must count from 1")
    params.apart()
    cdef const en_param *first = params.at(0)
    cdef en_status status
    with nogil:
        status = k.adam_step(count, first, &settings)
    check(status, "adam_step", 0, params.traffic)


def sgd_step(list p not None, g, buf, double lr, double momentum, double weight_decay, bint nesterov, double scale=1.0,
             random=None):
    """One step of stochastic gradient descent on every parameter, in place on p and on buf, a list of the momenta,
    which start at 0 (None: no momentum). scale: of every gradient, before anything else; g itself stays. random: as of
    adam_step."""
    cdef const en_kernels *k = kernels()
    cdef Params params = Params("sgd_step", len(p))
    cdef en_sgd settings = en_sgd(lr, momentum, weight_decay, scale, nesterov)
    cdef Py_ssize_t i, count = params.count
    cdef list gs = params.column(g, "g"), bufs = None if buf is None else params.column(buf, "buf")
    cdef list places = params.column([None] * count if random is None else random, "random")
    cdef cnp.ndarray grad
    if bufs is None and momentum != 0:
        raise UsageError(f"sgd_step: momentum={momentum} needs buf")
    for i in range(count):
        grad = params.gradient(i, gs[i])
        params.parameter(i, p[i], places[i], grad)
        if bufs is not None:
            params.at(i).m = floats(params.state(bufs[i], "buf", grad))
    params.apart()
    cdef const en_param *first = params.at(0)
    cdef en_status status
    with nogil:
        status = k.sgd_step(count, first, &settings)
    check(status, "sgd_step", 0, params.traffic)
