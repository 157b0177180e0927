/* The whole C interface of the native core: one status, one table of kernels, threads, memory, dispatch.
 *
 * Conventions: row-major, sizes and strides in elements (int64_t), float is IEEE binary32, 16-bit weights are uint16_t
 * bit patterns. Callers (csrc/_native.pyx) have checked shapes, types and contiguity; kernels return a status only for
 * what a caller can't foresee. No result depends on the number of threads.
 */
#ifndef ENTRENAR_H
#define ENTRENAR_H

#include <stddef.h>
#include <stdint.h>

typedef enum en_status {
    EN_OK = 0,
    EN_NO_MEMORY,
    EN_BAD_ID, /* a token id or label out of range; en_bad_id() of the calling thread tells which */
    EN_NOT_FINITE, EN_TOO_LARGE, /* a value that can't be quantized; en_bad_id() tells where */
} en_status;

enum en_dtype { EN_F32, EN_BF16, EN_F16 };

enum en_unary { EN_NEG, EN_EXP, EN_LOG, EN_RELU, EN_GELU, EN_GELU_TANH, EN_SILU, EN_UNARY_COUNT };
enum en_binary { EN_ADD, EN_SUB, EN_MUL, EN_DIV, EN_POW, EN_BINARY_COUNT };
/* Storage types of weights, in the order of entrenar/quant/qtypes.py; quant/codecs.c has the table. */
enum en_qtype {
    EN_Q4_0, EN_Q4_1, EN_Q5_0, EN_Q5_1, EN_Q8_0, EN_Q2_K, EN_Q3_K, EN_Q4_K, EN_Q5_K, EN_Q6_K, EN_IQ2_XXS, EN_IQ2_XS,
    EN_IQ3_XXS, EN_IQ1_S, EN_IQ4_NL, EN_IQ3_S, EN_IQ2_S, EN_IQ4_XS, EN_IQ1_M, EN_TQ1_0, EN_TQ2_0, EN_MXFP4,
    EN_NF4, EN_NF4_F32, EN_FP4, EN_FP4_F32, EN_QTYPE_COUNT
};

enum { EN_MAX_DIMS = 8 };

/* A strided array; a broadcast dimension has stride 0. */
struct en_view {
    void *data;
    enum en_dtype type;
    int ndim;
    int64_t shape[EN_MAX_DIMS];
    int64_t stride[EN_MAX_DIMS];
};

/* A quantized array as products read it: its blocks and, of NF4 and FP4, their scales, which are absmax[i], or
 * map[codes[i]] * nested[i / 256] + offset. Floats are aligned. */
struct en_blocks {
    enum en_qtype type;
    int64_t values, bytes; /* of a block, without scales that lie apart */
    const uint8_t *raw;
    const float *absmax; /* or NULL */
    const uint8_t *codes;
    const float *nested, *map;
    float offset;
};

/* One product of a sum: A (m,k) · B (k,n), of any strides, which counts in columns n0 to n0 + n of the result.
 * B may be packed: its elements are then those of `packed`, the first one b_at; b and b_type mean nothing, and one of the
 * strides is 1. */
struct en_term {
    int64_t k, n, n0;
    const void *a;
    enum en_dtype a_type;
    int64_t a_row, a_col; /* strides */
    const void *b;
    enum en_dtype b_type;
    int64_t b_row, b_col;
    const struct en_blocks *packed; /* or NULL */
    int64_t b_at;
};

enum { EN_MAX_TERMS = 8 };

/* C (m,n) = or += the sum of the terms + bias + residual, summed in f32 and rounded once. bias (n) or NULL; residual
 * (m,n) in C's type or NULL. Where the first A is bf16 and the level has fast_bf16, every operand is rounded to bf16. */
struct en_gemm {
    int64_t m, n;
    int terms;
    struct en_term term[EN_MAX_TERMS];
    void *c; /* columns contiguous */
    enum en_dtype c_type; /* f32 or bf16 */
    int64_t c_row;
    const float *bias;
    const void *residual;
    int64_t residual_row;
    int accumulate;
};

/* A grid of products of one term, and the strides between them. */
struct en_batch {
    int ndim;
    int64_t shape[EN_MAX_DIMS], a[EN_MAX_DIMS], b[EN_MAX_DIMS], c[EN_MAX_DIMS];
};

/* (b, tokens, heads, d) of f32 or bf16: heads and d contiguous, steps in elements between sequences and tokens. */
struct en_heads {
    void *data;
    int64_t batch, token;
};

/* q, o, g, dq (b,t,h,d); k, v, dk, dv (b,s,hkv,d), all of one type; lse (b,h,t).
 * Query t sits at position p = t + s - T and sees key j when j <= p (causal), j > p - window (window > 0) and
 * j >= starts[b,t] (starts not NULL). Every query sees at least one key. */
struct en_attention {
    int64_t b, t, s, h, hkv, d;
    float scale;
    int causal;
    int64_t window;
    const int32_t *starts;
    enum en_dtype type;
    struct en_heads q, k, v, o; /* forward: o and lse are written; backward: read */
    float *lse;
    struct en_heads g, dq, dk, dv; /* backward only; the last three are overwritten, and overlap nothing */
};

/* One parameter of an optimizer's step: arrays of n elements, and its clock. */
struct en_param {
    int64_t n;
    enum en_dtype p_type; /* EN_F32 or EN_BF16 */
    void *p;
    const float *g;
    void *m, *v;                /* f32, or codes of one byte; of SGD only m, which may be NULL */
    float *m_absmax, *v_absmax; /* (blocks of EN_MOMENT_BLOCK,), of codes; NULL where m and v are f32 */
    int64_t step;               /* of Adam: counts from 1 */
    uint64_t seed, offset;      /* of EN_BF16: random bits of the rounding, see kernels/stochastic.h */
};
enum { EN_MOMENT_BLOCK = 256 };

/* scale: of all gradients, before anything else. */
struct en_adam {
    double lr, beta1, beta2, eps, weight_decay, scale;
    int decoupled;
};
struct en_sgd {
    double lr, momentum, weight_decay, scale;
    int nesterov;
};

/* x, y (b,t,h,d); y may be x. cos, sin (t,rot/2), or (b,t,rot/2) where table_batch is their batch stride. */
struct en_rope {
    int64_t b, t, h, d, rot;
    enum en_dtype type; /* of x and y: f32 or bf16 */
    struct en_heads x, y;
    const float *cos, *sin;
    int64_t table_batch;
    int interleaved, inverse;
};

/* gate, up, dgate, dup (rows,n) with row strides; h, g (rows,n) contiguous. dgate may be gate, dup may be up. */
struct en_swiglu {
    int64_t rows, n;
    enum en_dtype type; /* of all: f32 or bf16 */
    const void *gate, *up;
    int64_t gate_row, up_row;
    void *h;          /* forward: written; backward: written again, or NULL */
    const void *g;    /* backward only, as are the next two */
    void *dgate, *dup;
    int64_t dgate_row, dup_row;
};

struct en_kernels {
    int fast_bf16; /* products of bf16 run faster than those of f32 */

    /* products: kernels/product.h, kernels/attention.h */
    en_status (*gemm)(const struct en_gemm *p, const struct en_batch *batch /* or NULL */);
    en_status (*attention)(const struct en_attention *p);
    en_status (*attention_backward)(const struct en_attention *p);

    /* elementwise: kernels/elementwise.h, kernels/activation.h. x strided, y contiguous in x's shape and, but for
     * copy, of x's type. Where a kernel has a `type`, it is f32 or bf16 and that of its void pointers. */
    en_status (*copy)(const struct en_view *x, enum en_dtype type, void *y);
    en_status (*unary)(enum en_unary op, const struct en_view *x, void *y);
    en_status (*unary_backward)(enum en_unary op, enum en_dtype type, int64_t n, const void *x, const void *g,
                                void *dx);
    en_status (*binary)(enum en_binary op, const struct en_view *a, const struct en_view *b, void *y);
    en_status (*add_inplace)(enum en_dtype type, int64_t n, void *x, const void *y);
    en_status (*scale_inplace)(enum en_dtype type, int64_t n, void *x, float s);

    /* reductions: kernels/reduce.h. axes is a bit mask of x's dimensions; y contiguous over the others */
    en_status (*sum)(const struct en_view *x, uint32_t axes, float *y);
    en_status (*all_finite)(int64_t n, const float *x, int *result);

    /* rows of d: kernels/softmax.h, kernels/norm.h */
    en_status (*softmax)(int64_t rows, int64_t d, const float *x, float *y);
    en_status (*softmax_backward)(int64_t rows, int64_t d, const float *y, const float *g, float *dx);
    en_status (*rms_norm)(enum en_dtype type, int64_t rows, int64_t d, const void *x, const float *w, double eps,
                          void *y, float *rstd);
    en_status (*rms_norm_backward)(enum en_dtype type, int64_t rows, int64_t d, const void *g, const void *x,
                                   const float *w, const float *rstd, void *dx, float *dw /* or NULL */,
                                   void *normed /* y again, or NULL */);
    en_status (*layer_norm)(int64_t rows, int64_t d, const float *x, const float *w, const float *b, double eps,
                            float *y, float *mean, float *rstd);
    en_status (*layer_norm_backward)(int64_t rows, int64_t d, const float *g, const float *x, const float *w,
                                     const float *mean, const float *rstd, float *dx, float *dw, float *db);

    /* kernels/rope.h, kernels/swiglu.h */
    en_status (*rope)(const struct en_rope *p);
    en_status (*swiglu)(const struct en_swiglu *p);
    en_status (*swiglu_backward)(const struct en_swiglu *p);

    /* kernels/embedding.h: weight (vocab,d) of any type; order: positions sorted by id, stable; dweight comes zeroed */
    en_status (*embedding)(int64_t n, int64_t vocab, int64_t d, enum en_dtype weight_type, const void *weight,
                           const int64_t *ids, enum en_dtype type, void *y);
    en_status (*embedding_backward)(int64_t n, int64_t vocab, int64_t d, enum en_dtype type, const void *g,
                                    const int64_t *ids, const int64_t *order, float *dweight);

    /* kernels/loss.h: logits (n,vocab); losses, lse, g (n,). The gradient is factor times that of the losses' sum, and
     * replaces the logits. */
    en_status (*cross_entropy)(enum en_dtype type, int64_t n, int64_t vocab, const void *logits, const int64_t *labels,
                               int64_t ignore_index, float *losses, float *lse);
    en_status (*cross_entropy_backward)(enum en_dtype type, int64_t n, int64_t vocab, const float *g,
                                        const void *logits, const int64_t *labels, const float *lse,
                                        int64_t ignore_index, void *dlogits);
    en_status (*cross_entropy_gradient)(enum en_dtype type, int64_t n, int64_t vocab, void *logits,
                                        const int64_t *labels, float factor, int64_t ignore_index, float *losses);

    /* kernels/dropout.h: element i takes word i % 4 of Philox4x32-10 at counter offset + i / 4 */
    en_status (*dropout)(enum en_dtype type, int64_t n, const void *x, double p, uint64_t seed, uint64_t offset,
                         void *y);

    /* kernels/multi.h, kernels/adamw.h, kernels/adamw8.h, kernels/stochastic.h: p, m, v in place */
    en_status (*square_sums)(int64_t count, const struct en_param *params, double *sums); /* of each g, (count,) */
    en_status (*adam_step)(int64_t count, const struct en_param *params, const struct en_adam *settings);
    en_status (*sgd_step)(int64_t count, const struct en_param *params, const struct en_sgd *settings);

    /* kernels/dequant.h */
    en_status (*dequantize)(enum en_qtype qtype, int64_t blocks, const uint8_t *raw, enum en_dtype type, void *y);

    /* kernels/probe.h: FLOP/s of the calling thread in products of a type; 0: the level computes it as f32 */
    double (*peak)(enum en_dtype type, double seconds);
};

/* quant/codecs.c: a row a storage type. ggml's types are blocks of `values` in `bytes`; NF4 and FP4 have levels instead
 * and lie flat (quant/bnb.c). */
enum { EN_MAX_BLOCK = 256 };
struct en_codec {
    const char *name;
    int64_t values, bytes;
    void (*decode)(const uint8_t *raw, float *y);
    void (*encode)(const float *x, uint8_t *raw); /* NULL: the type is only read */
    int halves_at, halves; /* where the block's 16-bit scales are, how many */
    const float *levels;
    int nested;
};
extern const struct en_codec en_codecs[EN_QTYPE_COUNT];

/* A quantized array of n elements. raw needs no alignment. */
struct en_packed {
    enum en_qtype type;
    int64_t n;
    const uint8_t *raw;
    int64_t block; /* of NF4 and FP4: 32 to 4096, a power of two */
};
int64_t en_packed_bytes(enum en_qtype type, int64_t n, int64_t block); /* -1: n does not fill blocks */
/* Any elements, as floats; the plain way, which defines the bits. */
void en_packed_read(const struct en_packed *w, int64_t begin, int64_t end, float *y);
/* `count` rows of `width` elements in the order of ids (NULL: 0, 1, ...), of any en_dtype; EN_BAD_ID from n / width on. */
en_status en_packed_rows(const struct en_packed *w, int64_t width, int64_t count, const int64_t *ids,
                         enum en_dtype type, void *y);
/* Values that are to be encoded. */
struct en_source {
    enum en_dtype type;
    int64_t n;
    const void *x;
};
int64_t en_source_read(const struct en_source *source, int64_t begin, int64_t most, float *x); /* how many there were */
/* EN_NOT_FINITE, EN_TOO_LARGE: en_bad_id() is the first element at fault, or the first of its block. raw is aligned. */
en_status en_quantize(enum en_qtype type, int64_t block, const struct en_source *source, uint8_t *raw);

extern const int8_t en_iq4_levels[16]; /* quant/iq4.c */

/* quant/bnb.c: where the parts of a flat NF4 or FP4 array lie, in bytes; parts start at multiples of 64. The codes are
 * first, two a byte, the high nibble before the low one. Then a float a block; or, nested, a byte a block, floats for
 * 256 blocks each and one for all. */
struct en_flat {
    int64_t block, blocks, scales, nested_scales, offset, bytes;
    int nested;
};
extern const float en_nf4_levels[16], en_fp4_levels[16];
float en_dynamic_value(int code); /* what a byte means, 0 to 255 */
struct en_flat en_flat_layout(int64_t n, int64_t block, int nested);
float en_flat_scale(const struct en_flat *at, const uint8_t *raw, int64_t block);
void en_flat_decode(const struct en_flat *at, const float *levels, const uint8_t *raw, int64_t begin, int64_t end,
                    float *y);
en_status en_flat_encode(const struct en_flat *at, const float *levels, const struct en_source *source, uint8_t *raw);

/* dispatch.c: the levels, best first. */
struct en_isa {
    const char *name;
    int (*available)(void); /* does this CPU, under this OS, run it? */
    const struct en_kernels *kernels;
};
extern const struct en_isa en_isas[];
extern const int en_isa_count;
extern const int en_software_tiles; /* 1: a build for tests, whose level amx needs no AMX and is never a default */
const struct en_isa *en_find_isa(const char *name); /* NULL: no such level, available or not */
const struct en_isa *en_best_isa(void);
const char *en_cpu_vendor(void);
const char *en_cpu_model(void);

/* The id that made the last EN_BAD_ID. */
void en_set_bad_id(int64_t id);
int64_t en_bad_id(void);

/* threads.c: one persistent pool. fn gets a half-open range of [0, n), at most one a thread, none shorter than grain
 * unless n is. Nested calls run inline; concurrent callers take turns. A reduction must fix its pieces by shape: make
 * the piece, not the element, the index. */
typedef void (*en_range)(void *context, int64_t begin, int64_t end);
void en_parallel_for(int64_t n, int64_t grain, en_range fn, void *context);
/* Tasks of unequal length: fn gets [i, i + 1) for every i < n once, in order of claiming, on at most `threads` threads. */
void en_parallel_tasks(int64_t n, int64_t threads, en_range fn, void *context);
enum { EN_MAX_THREADS = 256 };
int en_default_threads(void); /* cores.c */
int en_get_threads(void);
void en_set_threads(int n);

/* probe.c: the best of several rounds on all threads at once, FLOP/s and bytes/s. */
double en_peak(const struct en_kernels *kernels, enum en_dtype type, double seconds, int rounds);
en_status en_bandwidth(double *read, double *copy /* read and written bytes */);

/* profile.c: the boundary calls enter and record where en_profiling is on, holding Python's lock. */
struct en_work {
    double flops, bytes;
    enum en_dtype type;
    int64_t m, n, k; /* sizes that tell a call from others of its name; 0: none */
};
struct en_record {
    char name[32];
    int64_t start, duration; /* nanoseconds of the monotonic clock */
    struct en_work work;
    int thread; /* the system's number of the calling thread */
};
extern int en_profiling;
int64_t en_now(void);
en_status en_profile_reserve(int64_t capacity); /* forgets earlier records */
void en_profile_clear(void);
void en_profile_enter(void);
void en_profile_record(const char *name, size_t length, const struct en_work *work);
int64_t en_profile_count(void);
const struct en_record *en_profile_at(int64_t i);

/* memory.c: 64-byte aligned. en_scratch is the calling thread's own buffer, one a slot, kept and grown, valid until
 * its next call with that slot; NULL when memory is out. */
enum en_slot { EN_SCRATCH_A, EN_SCRATCH_B, EN_SCRATCH_C, EN_SCRATCH_SUMS, EN_SCRATCH_COUNT };
void *en_alloc(size_t bytes);
void en_free(void *block);
void *en_scratch(enum en_slot slot, size_t bytes);
void en_trim(void); /* free pages of the C library's heap go back to the system, where it can do that */
void en_fail_allocation(int64_t nth); /* tests: the nth allocation from now fails (1 is the next); 0: none */

/* blocks.c, for memory.c: blocks of EN_LARGE bytes and more, of which the first EN_HEADER hold how many there are and
 * lie before what is returned. NULL when memory is out. */
enum { EN_HEADER = 64, EN_LARGE = 128 << 10 };
void *en_large_alloc(size_t bytes);
void en_large_free(void *block);
size_t en_kept_bytes(void); /* of freed blocks that are kept for later ones, 0 where another thread is at them */

#endif
