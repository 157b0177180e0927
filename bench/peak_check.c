/* A second opinion on the machine's limits, written apart from csrc/kernels/probe.h and csrc/probe.c: register tiles of
 * products fed from L1 with random non-zero operands, and streams over memory, on all threads at once.
 *
 *     peak_check LOOP THREADS SECONDS     LOOP: avx2 avx512 avx512_bf16 amx read copy
 *
 * prints FLOP/s of the best of five rounds, or bytes/s of the best of twenty. bench/peak_check.py compiles and runs it.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 5, STREAM_ROUNDS = 20, MAX_THREADS = 256 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Magnitudes from 0.5 to 0.9, signs at random. */
static void random_floats(float *x, int n) {
    unsigned seed = 7;
    for (int i = 0; i < n; i++) {
        const float size = 0.5f + 0.4f * (float)rand_r(&seed) / (float)RAND_MAX;
        x[i] = rand_r(&seed) & 1 ? size : -size;
    }
}
static void random_bf16(uint16_t *x, int n) {
    float *f = malloc((size_t)n * 4);
    random_floats(f, n);
    for (int i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, f + i, 4);
        x[i] = (uint16_t)(u >> 16);
    }
    free(f);
}

static float sink[MAX_THREADS][16];

/* FLOPs of `repeats` passes over L1; each is one of these for a level. */
typedef double (*loop)(long repeats, float *out);

/* A tile of `rows` words of A, each spread over a vector, times three vectors of B. */
#define TILE(name, feature, vector, lanes, rows, load, spread, multiply, store, type, words, fill, flops)             \
    __attribute__((target(feature))) static double name(long repeats, float *out) {                                   \
        static _Thread_local type a[64 * rows * words], b[64 * 3 * lanes * words] __attribute__((aligned(64)));       \
        if (a[0] == 0) fill(a, 64 * rows * words), fill(b, 64 * 3 * lanes * words);                                   \
        vector c[rows][3] = {0}, s = {0};                                                                             \
        for (long r = 0; r < repeats; r++) {                                                                          \
            const float *x = (const float *)a, *y = (const float *)b;                                                 \
            __asm__ volatile("" : "+r"(x), "+r"(y)::"memory");                                                        \
            for (int k = 0; k < 64; k++, x += rows, y += 3 * lanes) {                                                 \
                vector v0 = load(y), v1 = load(y + lanes), v2 = load(y + 2 * lanes);                                  \
                _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++) {                                              \
                    vector u = spread(x[i]);                                                                          \
                    c[i][0] = multiply(c[i][0], u, v0);                                                               \
                    c[i][1] = multiply(c[i][1], u, v1);                                                               \
                    c[i][2] = multiply(c[i][2], u, v2);                                                               \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 8") for (int i = 0; i < rows; i++) s += c[i][0] + c[i][1] + c[i][2];                      \
        store(out, s);                                                                                                \
        return (double)repeats * 64 * rows * 3 * lanes * flops;                                                       \
    }
#define FMA_256(c, u, v) _mm256_fmadd_ps(u, v, c)
#define FMA_512(c, u, v) _mm512_fmadd_ps(u, v, c)
#define DOT_512(c, u, v) _mm512_dpbf16_ps(c, (__m512bh)(u), (__m512bh)(v))
TILE(avx2, "avx2,fma", __m256, 8, 4, _mm256_load_ps, _mm256_set1_ps, FMA_256, _mm256_storeu_ps, float, 1,
     random_floats, 2)
TILE(avx512, "avx512f", __m512, 16, 8, _mm512_load_ps, _mm512_set1_ps, FMA_512, _mm512_storeu_ps, float, 1,
     random_floats, 2)
TILE(avx512_bf16, "avx512f,avx512bf16", __m512, 16, 8, _mm512_load_ps, _mm512_set1_ps, DOT_512, _mm512_storeu_ps,
     uint16_t, 2, random_bf16, 4)

/* 2 x 2 tiles of sums, two tiles of A and two of B a step: 8 steps are 32 KB. The configuration goes through assembly,
 * because gcc 12's intrinsic says that it reads 8 bytes of the 64. */
__attribute__((target("amx-tile,amx-bf16"))) static double amx(long repeats, float *out) {
    static _Thread_local uint16_t tiles[8 * 4][512] __attribute__((aligned(64)));
    static _Thread_local float result[16][16] __attribute__((aligned(64)));
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t columns[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.columns[i] = 64, config.rows[i] = 16;
    if (tiles[0][0] == 0) random_bf16(tiles[0], 8 * 4 * 512);
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long r = 0; r < repeats; r++)
        for (int k = 0; k < 8; k++) {
            _tile_loadd(4, tiles[4 * k], 64);
            _tile_loadd(6, tiles[4 * k + 2], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, tiles[4 * k + 3], 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, tiles[4 * k + 1], 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    _tile_stored(0, result, 64);
    memcpy(out, result, 64);
    __asm__ volatile("tilerelease");
    return (double)repeats * 8 * 4 * 16 * 16 * 32 * 2;
}

static const struct {
    const char *name;
    loop run;
} loops[] = {{"avx2", avx2}, {"avx512", avx512}, {"avx512_bf16", avx512_bf16}, {"amx", amx}};

struct part {
    pthread_barrier_t *together;
    loop run;
    const char *stream;
    char *from, *to;
    size_t bytes;
    double seconds, rate[STREAM_ROUNDS], begin[STREAM_ROUNDS], end[STREAM_ROUNDS];
    int index;
};

static void stream_part(struct part *p) {
    if (*p->stream == 'c') {
        memcpy(p->to, p->from, p->bytes);
        return;
    }
    __m128i s0 = _mm_setzero_si128(), s1 = s0, s2 = s0, s3 = s0;
    for (const __m128i *x = (const __m128i *)p->from, *end = x + p->bytes / 16; x < end; x += 4) {
        s0 = _mm_xor_si128(s0, x[0]), s1 = _mm_xor_si128(s1, x[1]);
        s2 = _mm_xor_si128(s2, x[2]), s3 = _mm_xor_si128(s3, x[3]);
    }
    _mm_storeu_si128((__m128i *)sink[p->index], _mm_xor_si128(_mm_xor_si128(s0, s1), _mm_xor_si128(s2, s3)));
}

static void *work(void *argument) {
    struct part *p = argument;
    if (p->stream) {
        memset(p->from, 3, p->bytes);
        if (p->to) memset(p->to, 5, p->bytes);
    }
    for (int round = 0; round < (p->stream ? STREAM_ROUNDS : ROUNDS); round++) {
        double flops = 0;
        pthread_barrier_wait(p->together);
        p->begin[round] = now();
        if (p->stream)
            stream_part(p);
        else
            do flops += p->run(64, sink[p->index]);
            while (now() - p->begin[round] < p->seconds / ROUNDS);
        p->end[round] = now();
        p->rate[round] = flops / (p->end[round] - p->begin[round]);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: peak_check LOOP THREADS SECONDS\n"), 2;
    const int threads = atoi(argv[2]), copy = !strcmp(argv[1], "copy"), streams = copy || !strcmp(argv[1], "read");
    loop run = NULL;
    for (size_t i = 0; i < sizeof loops / sizeof *loops; i++)
        if (!strcmp(argv[1], loops[i].name)) run = loops[i].run;
    if ((!run && !streams) || threads < 1 || threads > MAX_THREADS) return fprintf(stderr, "no loop %s\n", argv[1]), 2;
    if (run == amx && syscall(SYS_arch_prctl, 0x1023, 18)) return fprintf(stderr, "no tiles here\n"), 2;
    const long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t bytes = cache > 0 ? 4 * (size_t)cache : 0;
    if (bytes < 128u << 20) bytes = 128u << 20;
    if (bytes > 1u << 30) bytes = 1u << 30;
    const size_t share = bytes / (copy ? 2 : 1) / (size_t)threads / 4096 * 4096;
    char *buffer = streams ? aligned_alloc(2 << 20, bytes) : NULL;
    if (streams) madvise(buffer, bytes, MADV_HUGEPAGE); /* as the package's large arrays are */
    pthread_barrier_t together;
    pthread_barrier_init(&together, NULL, (unsigned)threads);
    static struct part part[MAX_THREADS];
    static pthread_t id[MAX_THREADS];
    for (int i = 0; i < threads; i++) {
        part[i] = (struct part){&together, run, streams ? argv[1] : NULL, buffer + share * i,
                                copy ? buffer + bytes / 2 + share * i : NULL, share, atof(argv[3]), .index = i};
        if (i) pthread_create(&id[i], NULL, work, &part[i]);
    }
    work(&part[0]);
    for (int i = 1; i < threads; i++) pthread_join(id[i], NULL);
    double best = 0;
    for (int round = 0; round < (streams ? STREAM_ROUNDS : ROUNDS); round++) {
        double sum = 0, begin = part[0].begin[round], end = part[0].end[round];
        for (int i = 0; i < threads; i++) {
            sum += part[i].rate[round];
            if (part[i].begin[round] < begin) begin = part[i].begin[round];
            if (part[i].end[round] > end) end = part[i].end[round];
        }
        if (streams) sum = (double)share * threads * (copy ? 2 : 1) / (end - begin);
        if (sum > best) best = sum;
    }
    printf("%.6e\n", best);
    return 0;
}
