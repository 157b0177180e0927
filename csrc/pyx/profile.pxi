# What the machine can do at most, and a record of the native calls. `kernels` marks a call's entry, `check` its end.

cdef int record(str op, double flops, double nbytes, en_dtype type, int64_t m, int64_t n, int64_t k) except -1:
    """Adds the call that ends here to the ring (csrc/profile.c)."""
    cdef en_work work
    cdef bytes name = op.encode()
    work.flops, work.bytes, work.type = flops, nbytes, type
    work.m, work.n, work.k = m, n, k
    en_profile_record(name, len(name), &work)
    return 0


cdef double peak_of(en_dtype type, double seconds, int rounds) except? 0:
    cdef const en_kernels *table = kernels()
    cdef double found
    if not 0 < seconds <= 60:
        raise UsageError(f"peak: seconds={seconds} must be above 0, at most 60")
    if not 1 <= rounds <= 1000:
        raise UsageError(f"peak: rounds={rounds} must be from 1 to 1000")
    with nogil:
        found = en_peak(table, type, seconds, rounds)
    return found


def peak(str dtype, double seconds=0.1, int rounds=5):
    """FLOP/s of products from L1 with random operands at this level, all threads at once (csrc/kernels/probe.h).

    dtype is "f32" or "bf16"; a level without bf16 products computes them as f32. The best of `rounds` rounds, which take
    `seconds` together.
    """
    if dtype not in ("f32", "bf16"):
        raise UsageError(f"peak: dtype={dtype!r} must be 'f32' or 'bf16'")
    return (dtype == "bf16" and peak_of(EN_BF16, seconds, rounds)) or peak_of(EN_F32, seconds, rounds)


def peaks(double seconds=0.1):
    """The machine's limits at this level with all threads at once, measured now, in a second or two.

    {"f32", "bf16": what `peak` gives for `seconds`, "read", "copy": bytes/s of memory beyond the caches, a copied byte
    counted as read and written}.
    """
    cdef double f32 = peak_of(EN_F32, seconds, 5), bf16 = peak_of(EN_BF16, seconds, 5), read = 0, copy = 0
    cdef en_status status
    with nogil:
        status = en_bandwidth(&read, &copy)
    check(status, "peaks")
    return {"f32": f32, "bf16": bf16 or f32, "read": read, "copy": copy}


def profile_start(int64_t capacity=1 << 16):
    """Record every native call from now on; of more than `capacity` calls the last ones are kept.

    Use it through `entrenar.observe.profile.Profile`. Raises UsageError where a recording is under way.
    """
    global en_profiling
    if en_profiling:
        raise UsageError("profile: a recording is under way; only one can be")
    if not 1 <= capacity <= 1 << 24:
        raise UsageError(f"profile: capacity={capacity} must be from 1 to {1 << 24}")
    check(en_profile_reserve(capacity), "profile")
    en_profiling = 1


def profile_stop():
    """Ends the recording: (records, overwritten), the kept records in order, and how many older ones made room.

    A record is (name, start, duration, flops, bytes, type, (m, n, k), thread): nanoseconds of time.monotonic_ns,
    "f32", "bf16" or "f16", threading.get_native_id of the caller.
    """
    global en_profiling
    cdef int64_t i, count = en_profile_count(), missing = 0
    cdef const en_record *r
    cdef list records = []
    types = ("f32", "bf16", "f16")
    en_profiling = 0
    for i in range(count):
        r = en_profile_at(i)
        if r == NULL:
            missing += 1
            continue
        records.append((r.name.decode(errors="replace"), r.start, r.duration, r.work.flops, r.work.bytes,
                        types[<int>r.work.type], (r.work.m, r.work.n, r.work.k), r.thread))
    en_profile_clear()
    return records, missing
