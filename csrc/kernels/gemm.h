/* Products: C = A·B and C += A·B in f32, any strides, B in f32, bf16 or f16.
 *
 * The block algorithm of BLIS: B is packed in panels of NR columns that stay in L1 while panels of at most MR rows of A
 * pass by from L2, and a tile of C is summed in registers. Transposes and 16-bit weights cost nothing extra: packing
 * reads any strides and widens. Products with few rows read B where it lies, because packing would cost more than it
 * saves: by dot products where k is contiguous (the weights of a linear layer), by columns where n is.
 *
 * Every element of C is summed in an order that the shape alone decides: blocks of k in order, each from zero. Threads
 * own rectangles of C, so bits don't depend on their number.
 */
#ifndef EN_GEMM_H
#define EN_GEMM_H

enum { NR = NV * VL };

/* Fewest multiply-adds worth a thread of their own (waking one costs some microseconds). */
enum { GEMM_GRAIN = 1 << 18 };

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* First index of piece i of n things cut into `pieces` as even as can be. */
static inline int64_t cut(int64_t n, int64_t pieces, int64_t i) {
    return n / pieces * i + min64(i, n % pieces);
}

/* n elements at p + offset, widened to f32. */
WORD vf load_as(enum en_dtype type, const void *p, int64_t offset, int64_t n) {
    switch (type) {
    case EN_BF16: return v_load_bf16_n((const uint16_t *)p + offset, n);
    case EN_F16: return v_load_f16_n((const uint16_t *)p + offset, n);
    default: return n >= VL ? v_load((const float *)p + offset) : v_load_n((const float *)p + offset, n);
    }
}

/* PACK: dst[j * width + i] = src[i * si + j * sj] for i < rows, 0 for rows <= i < width; j < depth.
 * width is at most VL or a multiple of it. Writes up to VL floats beyond the end of dst. */
WORD void pack_as(enum en_dtype type, float *dst, int64_t width, const void *src, int64_t si, int64_t sj, int64_t rows,
                  int64_t depth) {
    if (si == 1) {
        for (int64_t j = 0; j < depth; j++)
            for (int64_t i = 0; i < width; i += VL)
                v_store(dst + j * width + i, load_as(type, src, j * sj + i, max64(rows - i, 0)));
    } else if (sj == 1) {
        for (int64_t j = 0; j < depth; j += VL)
            for (int64_t i = 0; i < width; i += VL) {
                vf r[VL];
                for (int64_t v = 0; v < VL; v++)
                    r[v] = i + v < rows ? load_as(type, src, (i + v) * si + j, depth - j) : v_zero();
                v_transpose(r);
                for (int64_t v = 0; v < VL && j + v < depth; v++) v_store(dst + (j + v) * width + i, r[v]);
            }
    } else {
        for (int64_t j = 0; j < depth; j++)
            for (int64_t i = 0; i < width; i++)
                dst[j * width + i] = i < rows ? v_hsum(load_as(type, src, i * si + j * sj, 1)) : 0.0f;
    }
}

static void pack(enum en_dtype type, float *dst, int64_t width, const void *src, int64_t si, int64_t sj, int64_t rows,
                 int64_t depth) {
    switch (type) {
    case EN_BF16: pack_as(EN_BF16, dst, width, src, si, sj, rows, depth); return;
    case EN_F16: pack_as(EN_F16, dst, width, src, si, sj, rows, depth); return;
    default: pack_as(EN_F32, dst, width, src, si, sj, rows, depth); return;
    }
}

/* TILE: c (h,n) = or += a (depth,h packed) · b (depth, NR at stride b_row), n <= NR. */
WORD void tile_of(const int h, int64_t depth, const float *a, const float *b, int64_t b_row, float *c, int64_t c_row,
                  int64_t n, int accumulate) {
    vf acc[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < h; i++)
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) acc[i][v] = v_zero();
    for (int64_t j = 0; j < depth; j++, a += h, b += b_row) {
        vf row[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) row[v] = v_load(b + v * VL);
#pragma GCC unroll 16
        for (int i = 0; i < h; i++) {
            vf x = v_set(a[i]);
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) acc[i][v] = v_fma(x, row[v], acc[i][v]);
        }
    }
    if (n == NR) {
#pragma GCC unroll 16
        for (int i = 0; i < h; i++)
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                float *at = c + i * c_row + v * VL;
                v_store(at, accumulate ? v_add(v_load(at), acc[i][v]) : acc[i][v]);
            }
        return;
    }
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) {
        int64_t left = n - v * VL;
        if (left <= 0) return;
#pragma GCC unroll 16
        for (int i = 0; i < h; i++) {
            float *at = c + i * c_row + v * VL;
            v_store_n(at, accumulate ? v_add(v_load_n(at, left), acc[i][v]) : acc[i][v], left);
        }
    }
}

/* One function a height, so that no row of a tile is wasted. */
#define TILE(h)                                                                                                       \
    static void tile_##h(int64_t depth, const float *a, const float *b, int64_t b_row, float *c, int64_t c_row,       \
                         int64_t n, int accumulate) {                                                                 \
        tile_of(h <= MR ? h : MR, depth, a, b, b_row, c, c_row, n, accumulate);                                       \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) TILE(13) TILE(14)
#undef TILE

typedef void (*tile_fn)(int64_t, const float *, const float *, int64_t, float *, int64_t, int64_t, int);
static const tile_fn tiles[15] = {NULL,   tile_1, tile_2, tile_3,  tile_4,  tile_5,  tile_6, tile_7,
                                  tile_8, tile_9, tile_10, tile_11, tile_12, tile_13, tile_14};
_Static_assert(MR <= 14, "a tile function for every height");

/* Rows of A below which packing B is not worth it. */
enum { FEW_ROWS = 2 * MR };

/* The rectangle rows [m0,m1) × columns [n0,n1) of one product. */
static en_status gemm_block(const struct en_gemm *p, const float *a, const void *b, float *c, int64_t m0, int64_t m1,
                            int64_t n0, int64_t n1) {
    const int64_t element = p->b_type == EN_F32 ? 4 : 2;
    const int64_t k_blocks = ceil_div(p->k, KC), kc_max = ceil_div(p->k, k_blocks);
    const int64_t m_blocks = ceil_div(m1 - m0, MC), mc_max = ceil_div(m1 - m0, m_blocks);
    const int64_t nc_max = min64(NC, ceil_div(n1 - n0, NR) * NR);
    const int in_place = p->b_type == EN_F32 && p->b_col == 1 && p->m <= FEW_ROWS; /* only the ragged edge is packed */
    float *packed_a = en_scratch(EN_SCRATCH_A, (size_t)(mc_max * kc_max + VL) * 4);
    float *packed_b = en_scratch(EN_SCRATCH_B, (size_t)((in_place ? NR : nc_max) * kc_max + VL) * 4);
    if (!packed_a || !packed_b) return EN_NO_MEMORY;
    for (int64_t jc = n0; jc < n1; jc += NC) {
        const int64_t j_end = min64(n1, jc + NC);
        for (int64_t kb = 0; kb < k_blocks; kb++) {
            const int64_t k0 = cut(p->k, k_blocks, kb), kc = cut(p->k, k_blocks, kb + 1) - k0;
            const int accumulate = p->accumulate || kb > 0;
            const char *b_block = (const char *)b + k0 * p->b_row * element;
            if (!in_place)
                for (int64_t j = jc; j < j_end; j += NR)
                    pack(p->b_type, packed_b + (j - jc) * kc, NR, b_block + j * p->b_col * element, p->b_col, p->b_row,
                         min64(NR, j_end - j), kc);
            else if ((j_end - jc) % NR)
                pack(EN_F32, packed_b, NR, (const float *)b_block + (j_end - (j_end - jc) % NR), 1, p->b_row,
                     (j_end - jc) % NR, kc);
            for (int64_t mb = 0; mb < m_blocks; mb++) {
                const int64_t i0 = m0 + cut(m1 - m0, m_blocks, mb), mc = m0 + cut(m1 - m0, m_blocks, mb + 1) - i0;
                const int64_t panels = ceil_div(mc, MR);
                for (int64_t r = 0; r < panels; r++) {
                    const int64_t i = cut(mc, panels, r), h = cut(mc, panels, r + 1) - i;
                    pack(EN_F32, packed_a + i * kc, h, a + (i0 + i) * p->a_row + k0 * p->a_col, p->a_row, p->a_col, h,
                         kc);
                }
                for (int64_t j = jc; j < j_end; j += NR) {
                    const int64_t n = min64(NR, j_end - j);
                    const int lies = in_place && n == NR;
                    const float *panel = lies       ? (const float *)b_block + j
                                         : in_place ? packed_b
                                                    : packed_b + (j - jc) * kc;
                    for (int64_t r = 0; r < panels; r++) {
                        const int64_t i = cut(mc, panels, r), h = cut(mc, panels, r + 1) - i;
                        tiles[h](kc, packed_a + i * kc, panel, lies ? p->b_row : NR, c + (i0 + i) * p->c_row + j,
                                 p->c_row, n, accumulate);
                    }
                }
            }
        }
    }
    return EN_OK;
}

/* Few rows, k contiguous in B: each weight is read once, DOT_N rows of it at a time, against DOT_M rows of A. */
enum { DOT_ROWS = 8, DOT_M = 4, DOT_N = VL == 16 ? 4 : 2 };

WORD void dot_tile(const int m, const int n, enum en_dtype type, int64_t k, const float *a, const void *b, int64_t b_col,
                   int64_t column, float *c, int64_t c_row, int accumulate) {
    vf acc[DOT_M][DOT_N];
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) acc[i][v] = v_zero();
    for (int64_t j = 0; j < k; j += VL) {
        vf row[DOT_M];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) row[i] = load_as(EN_F32, a, i * k + j, k - j);
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) {
            vf w = load_as(type, b, (column + v) * b_col + j, k - j);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) acc[i][v] = v_fma(row[i], w, acc[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int v = 0; v < n; v++) {
            float *at = c + i * c_row + column + v, sum = v_hsum(acc[i][v]);
            *at = accumulate ? *at + sum : sum;
        }
}

/* Columns [n0,n1) of a product with m <= DOT_M rows, a (m,k) contiguous. */
WORD void dot_columns(const int m, enum en_dtype type, const struct en_gemm *p, const float *a, const void *b, float *c,
                      int64_t n0, int64_t n1) {
    int64_t j = n0;
    for (; j + DOT_N <= n1; j += DOT_N)
        dot_tile(m, DOT_N, type, p->k, a, b, p->b_col, j, c, p->c_row, p->accumulate);
    for (; j < n1; j++) dot_tile(m, 1, type, p->k, a, b, p->b_col, j, c, p->c_row, p->accumulate);
}

WORD void dot_rows(enum en_dtype type, const struct en_gemm *p, const float *a, const void *b, float *c, int64_t n0,
                   int64_t n1) {
    for (int64_t j = n0; j < n1; j += 64) /* 64 rows of B stay in cache for the second DOT_M rows of A */
        for (int64_t i = 0; i < p->m; i += DOT_M) {
            const float *ai = a + i * p->k;
            float *ci = c + i * p->c_row;
            const int64_t end = min64(n1, j + 64);
            switch (min64(DOT_M, p->m - i)) {
            case 1: dot_columns(1, type, p, ai, b, ci, j, end); break;
            case 2: dot_columns(2, type, p, ai, b, ci, j, end); break;
            case 3: dot_columns(3, type, p, ai, b, ci, j, end); break;
            default: dot_columns(4, type, p, ai, b, ci, j, end); break;
            }
        }
}

static en_status gemm_dot(const struct en_gemm *p, const float *a, const void *b, float *c, int64_t n0, int64_t n1) {
    if (p->a_col != 1 || p->a_row != p->k) {
        float *rows = en_scratch(EN_SCRATCH_A, (size_t)(p->m * p->k) * 4);
        if (!rows) return EN_NO_MEMORY;
        for (int64_t i = 0; i < p->m; i++)
            for (int64_t j = 0; j < p->k; j++) rows[i * p->k + j] = a[i * p->a_row + j * p->a_col];
        a = rows;
    }
    switch (p->b_type) {
    case EN_BF16: dot_rows(EN_BF16, p, a, b, c, n0, n1); break;
    case EN_F16: dot_rows(EN_F16, p, a, b, c, n0, n1); break;
    default: dot_rows(EN_F32, p, a, b, c, n0, n1); break;
    }
    return EN_OK;
}

/* Do dot products serve it? */
static int wants_dots(const struct en_gemm *p) { return p->m <= DOT_ROWS && p->b_row == 1 && p->b_col != 1; }

/* One product on the calling thread; the building block of other kernels. */
static en_status gemm_alone(const struct en_gemm *p) {
    if (p->m == 0 || p->n == 0) return EN_OK;
    return wants_dots(p) ? gemm_dot(p, p->a, p->b, p->c, 0, p->n) : gemm_block(p, p->a, p->b, p->c, 0, p->m, 0, p->n);
}

struct gemm_job {
    const struct en_gemm *p;
    int64_t cuts_m, cuts_n; /* rectangles of each product */
    int dots;
    _Atomic int status;
};

static void gemm_range(void *context, int64_t begin, int64_t end) {
    struct gemm_job *job = context;
    const struct en_gemm *p = job->p;
    const int64_t rectangles = job->cuts_m * job->cuts_n, panels = ceil_div(p->n, NR);
    for (int64_t task = begin; task < end; task++) {
        int64_t a = 0, b = 0, c = 0, index = task / rectangles;
        for (int d = p->batch_ndim - 1; d >= 0; d--) {
            const int64_t x = index % p->batch[d];
            index /= p->batch[d];
            a += x * p->a_batch[d];
            b += x * p->b_batch[d];
            c += x * p->c_batch[d];
        }
        const int64_t im = task % rectangles / job->cuts_n, in = task % rectangles % job->cuts_n;
        const int64_t m0 = cut(p->m, job->cuts_m, im), m1 = cut(p->m, job->cuts_m, im + 1);
        const int64_t n0 = cut(panels, job->cuts_n, in) * NR;
        const int64_t n1 = min64(cut(panels, job->cuts_n, in + 1) * NR, p->n);
        const void *pb = (const char *)p->b + b * (p->b_type == EN_F32 ? 4 : 2);
        en_status status = job->dots ? gemm_dot(p, p->a + a, pb, p->c + c, n0, n1)
                                     : gemm_block(p, p->a + a, pb, p->c + c, m0, m1, n0, n1);
        if (status != EN_OK) job->status = status;
    }
}

static en_status gemm(const struct en_gemm *p) {
    int64_t products = 1;
    for (int d = 0; d < p->batch_ndim; d++) products *= p->batch[d];
    if (products == 0 || p->m == 0 || p->n == 0) return EN_OK;
    struct gemm_job job = {.p = p, .cuts_m = 1, .cuts_n = 1, .status = EN_OK};
    job.dots = wants_dots(p);
    /* As many rectangles as the threads need, cut so that the least is packed twice. */
    const double work = (double)p->m * (double)p->n * (double)max64(p->k, 1);
    const int64_t threads = en_get_threads(), worth = (int64_t)min64(1 << 20, (int64_t)(work / GEMM_GRAIN));
    const int64_t panels = ceil_div(p->n, NR);
    int64_t pieces = products % threads == 0 || products >= 4 * threads ? 1 : min64(threads, worth);
    for (int64_t m = 1; m <= pieces; m++) {
        if (pieces % m || m > ceil_div(p->m, MR) || pieces / m > panels || (job.dots && m > 1)) continue;
        const int64_t n = pieces / m;
        if (job.cuts_m * job.cuts_n == 1 || n * p->m + m * p->n < job.cuts_n * p->m + job.cuts_m * p->n) {
            job.cuts_m = m;
            job.cuts_n = n;
        }
    }
    const int64_t tasks = products * job.cuts_m * job.cuts_n;
    const int64_t grain = job.cuts_m * job.cuts_n > 1 ? 1 : (int64_t)(GEMM_GRAIN / (work < 1 ? 1 : work)) + 1;
    en_parallel_for(tasks, grain, gemm_range, &job);
    return (en_status)job.status;
}

#endif
