# Optimizer steps, in place.

cdef int apart(cnp.ndarray a, cnp.ndarray b, str op) except -1:
    """Checks that two C-contiguous arrays of one size, one of them written, lie apart."""
    cdef int64_t n = cnp.PyArray_SIZE(a)
    if floats(a) < floats(b) + n and floats(b) < floats(a) + n:
        raise UsageError(f"{op}: two of the arrays overlap in memory; each needs its own")
    return 0


def adam_step(p, g, m, v, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
              bint decoupled):
    """One Adam step, in place on p, m and v (f32, C-contiguous, of one shape with g). step counts from 1. The decay
    acts on p directly where decoupled (AdamW), else through the gradient."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray weight = writable(p, "adam_step", "p"), grad = contiguous(g, "adam_step", "g")
    cdef cnp.ndarray first = writable(m, "adam_step", "m"), second = writable(v, "adam_step", "v")
    same_shape(weight, grad, "adam_step", "p", "g")
    same_shape(weight, first, "adam_step", "p", "m")
    same_shape(weight, second, "adam_step", "p", "v")
    for other in (grad, first, second):
        apart(weight, other, "adam_step")
    for other in (grad, second):
        apart(first, other, "adam_step")
    apart(second, grad, "adam_step")
    if step < 1:
        raise UsageError(f"adam_step: step={step} must count from 1")
    cdef int64_t n = cnp.PyArray_SIZE(weight)
    cdef en_status status
    with nogil:
        status = k.adam_step(n, floats(weight), floats(grad), floats(first), floats(second), lr, beta1, beta2, eps,
                             weight_decay, step, decoupled)
    check(status, "adam_step")


def sgd_step(p, g, buf, double lr, double momentum, double weight_decay, bint nesterov):
    """One step of stochastic gradient descent, in place on p and on buf, the momentum, which starts at 0 (None: no
    momentum)."""
    cdef const en_kernels *k = kernels()
    cdef cnp.ndarray weight = writable(p, "sgd_step", "p"), grad = contiguous(g, "sgd_step", "g"), velocity
    cdef float *pb = NULL
    same_shape(weight, grad, "sgd_step", "p", "g")
    apart(weight, grad, "sgd_step")
    if buf is not None:
        velocity = writable(buf, "sgd_step", "buf")
        same_shape(weight, velocity, "sgd_step", "p", "buf")
        apart(weight, velocity, "sgd_step")
        apart(grad, velocity, "sgd_step")
        pb = floats(velocity)
    elif momentum != 0:
        raise UsageError(f"sgd_step: momentum={momentum} needs buf")
    cdef int64_t n = cnp.PyArray_SIZE(weight)
    cdef en_status status
    with nogil:
        status = k.sgd_step(n, floats(weight), floats(grad), pb, lr, momentum, weight_decay, nesterov)
    check(status, "sgd_step")
