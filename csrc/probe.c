/* The machine's limits, all threads at once: the best rate of the level's product loop, and memory bandwidth. */
#define _GNU_SOURCE
#include "entrenar.h"

#include <string.h>
#include <unistd.h>

enum { STREAM_ROUNDS = 20 }; /* of milliseconds */

struct rates {
    const struct en_kernels *kernels;
    enum en_dtype type;
    double seconds, rate[EN_MAX_THREADS];
};

static void peak_part(void *context, int64_t begin, int64_t end) {
    struct rates *r = context;
    for (int64_t i = begin; i < end; i++) r->rate[i] = r->kernels->peak(r->type, r->seconds);
}

/* The best of several rounds: whatever disturbs a round only slows it down. */
double en_peak(const struct en_kernels *kernels, enum en_dtype type, double seconds, int rounds) {
    struct rates r = {.kernels = kernels, .type = type, .seconds = seconds / rounds};
    double best = 0;
    for (int round = 0; round < rounds; round++) {
        int threads = en_get_threads();
        double sum = 0;
        en_parallel_for(threads, 1, peak_part, &r);
        for (int i = 0; i < threads; i++) sum += r.rate[i];
        if (sum > best) best = sum;
    }
    return best;
}

enum { LINE = 64 };

struct lines {
    const char *from;
    char *to; /* NULL: read only */
};

static void touch(void *context, int64_t begin, int64_t end) {
    struct lines *q = context;
    memset(q->to + begin * LINE, 1, (size_t)(end - begin) * LINE);
}

static void copy_lines(void *context, int64_t begin, int64_t end) {
    struct lines *q = context;
    memcpy(q->to + begin * LINE, q->from + begin * LINE, (size_t)(end - begin) * LINE);
}

/* Words of this type are added where they lie: the fewer instructions to a line, the more lines are on their way. */
typedef uint64_t pair __attribute__((vector_size(16)));

static void read_lines(void *context, int64_t begin, int64_t end) {
    struct lines *q = context;
    const pair *word = (const pair *)(q->from + begin * LINE), *stop = (const pair *)(q->from + end * LINE);
    pair sum[LINE / sizeof(pair)] = {{0}};
    volatile uint64_t sink;
#pragma GCC unroll 4
    for (; word < stop; word += LINE / sizeof(pair))
        for (size_t i = 0; i < LINE / sizeof(pair); i++) sum[i] += word[i];
    for (size_t i = 1; i < LINE / sizeof(pair); i++) sum[0] += sum[i];
    sink = sum[0][0] + sum[0][1];
    (void)sink;
}

/* Bytes a second of the fastest round; a copied byte is two, one read and one written. */
static double stream(en_range fn, struct lines *q, int64_t lines) {
    double best = 0;
    for (int round = 0; round < STREAM_ROUNDS; round++) {
        int64_t start = en_now();
        en_parallel_for(lines, 1, fn, q);
        double rate = (double)lines * LINE * (q->to ? 2 : 1) / ((double)(en_now() - start) * 1e-9);
        if (rate > best) best = rate;
    }
    return best;
}

/* A buffer far beyond the last cache, within reason. */
static size_t buffer_bytes(void) {
    const size_t least = (size_t)128 << 20, most = (size_t)1 << 30;
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t bytes = cache > 0 ? (size_t)cache * 4 : 0;
    return bytes < least ? least : bytes > most ? most : bytes;
}

en_status en_bandwidth(double *read, double *copy) {
    const size_t bytes = buffer_bytes();
    const int64_t lines = (int64_t)(bytes / LINE);
    char *buffer = en_alloc(bytes);
    if (!buffer) return EN_NO_MEMORY;
    struct lines q = {.from = buffer, .to = buffer};
    en_parallel_for(lines, 1, touch, &q);
    q.to = NULL;
    *read = stream(read_lines, &q, lines);
    q.to = buffer + bytes / 2;
    *copy = stream(copy_lines, &q, lines / 2);
    en_free(buffer);
    return EN_OK;
}
