/* Products: C = A·B and C += A·B in f32, any strides, B in f32, bf16 or f16.
 *
 * The block algorithm of BLIS: B is packed once, in panels of NR columns, by all threads together. Then a task takes a
 * block of rows of A, packs it in panels of at most MR rows, and multiplies: a panel of B stays in L1 while those of A
 * pass by from L2, and a tile of C is summed in registers. Transposes and 16-bit weights cost nothing extra: packing
 * reads any strides and widens. Products with few rows read B where it lies, because packing would cost more than it
 * saves: by dot products where k is contiguous (the weights of a linear layer), by columns where n is.
 *
 * Every element of C is summed by one task, in an order that the shape alone decides: blocks of k in order, each from
 * zero. So bits don't depend on the number of threads. Tasks are claimed, not dealt out: a thread that the system keeps
 * waiting is left behind.
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

/* Floats of B packed at a time: they stay in the last cache while all rows of A pass. */
enum { PACKED_FLOATS = 1 << 21 };

/* Columns [n0, n1) of one product, and how they are cut into tasks. */
struct gemm_chunk {
    const struct en_gemm *p;
    int64_t n0, n1;
    int64_t m_blocks, n_pieces;
    int in_place;    /* full panels of B are read where they lie; only a ragged last one is packed */
    float *packed_b; /* a k block after the other; in it a panel after the other, each (kc, NR) */
    _Atomic int status;
};

static inline int64_t k_blocks(const struct en_gemm *p) { return ceil_div(p->k, KC); }

/* Panel of columns j, j+1.. and rows k0, k0+1.. of B, where it was packed; and its row stride. */
static const float *panel_at(const struct gemm_chunk *q, int64_t j, int64_t k0, int64_t kc, int64_t *row) {
    const struct en_gemm *p = q->p;
    const int ragged = q->n1 - j < NR;
    *row = NR;
    if (!q->in_place) return q->packed_b + k0 * ceil_div(q->n1 - q->n0, NR) * NR + (j - q->n0) * kc;
    if (ragged) return q->packed_b + k0 * NR;
    *row = p->b_row;
    return (const float *)p->b + k0 * p->b_row + j;
}

static void pack_panels(void *context, int64_t begin, int64_t end) {
    const struct gemm_chunk *q = context;
    const struct en_gemm *p = q->p;
    const int64_t blocks = k_blocks(p), element = p->b_type == EN_F32 ? 4 : 2;
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t j = q->n0 + panel * NR, n = min64(NR, q->n1 - j);
        if (q->in_place && n == NR) continue;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t k0 = cut(p->k, blocks, block), kc = cut(p->k, blocks, block + 1) - k0;
            int64_t row;
            pack(p->b_type, (float *)panel_at(q, j, k0, kc, &row), NR,
                 (const char *)p->b + (k0 * p->b_row + j * p->b_col) * element, p->b_col, p->b_row, n, kc);
        }
    }
}

static void multiply_blocks(void *context, int64_t begin, int64_t end) {
    struct gemm_chunk *q = context;
    const struct en_gemm *p = q->p;
    const int64_t blocks = k_blocks(p), all_panels = ceil_div(q->n1 - q->n0, NR);
    float *packed_a =
        en_scratch(EN_SCRATCH_A, (size_t)(ceil_div(p->m, q->m_blocks) * ceil_div(p->k, blocks) + VL) * sizeof(float));
    if (!packed_a) {
        q->status = EN_NO_MEMORY;
        return;
    }
    for (int64_t task = begin; task < end; task++) {
        const int64_t mb = task / q->n_pieces, piece = task % q->n_pieces;
        const int64_t i0 = cut(p->m, q->m_blocks, mb), mc = cut(p->m, q->m_blocks, mb + 1) - i0;
        const int64_t j0 = q->n0 + cut(all_panels, q->n_pieces, piece) * NR;
        const int64_t j1 = min64(q->n1, q->n0 + cut(all_panels, q->n_pieces, piece + 1) * NR);
        const int64_t panels = ceil_div(mc, MR);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t k0 = cut(p->k, blocks, block), kc = cut(p->k, blocks, block + 1) - k0;
            for (int64_t r = 0; r < panels; r++) {
                const int64_t i = cut(mc, panels, r), h = cut(mc, panels, r + 1) - i;
                pack(EN_F32, packed_a + i * kc, h, p->a + (i0 + i) * p->a_row + k0 * p->a_col, p->a_row, p->a_col, h,
                     kc);
            }
            for (int64_t j = j0; j < j1; j += NR) {
                int64_t row;
                const float *panel = panel_at(q, j, k0, kc, &row);
                for (int64_t r = 0; r < panels; r++) {
                    const int64_t i = cut(mc, panels, r), h = cut(mc, panels, r + 1) - i;
                    tiles[h](kc, packed_a + i * kc, panel, row, p->c + (i0 + i) * p->c_row + j, p->c_row,
                             min64(NR, j1 - j), p->accumulate || block > 0);
                }
            }
        }
    }
}

/* Threads that this much work deserves. */
static inline int64_t gemm_threads(double multiply_adds) {
    return multiply_adds < 1e15 ? 1 + (int64_t)(multiply_adds / GEMM_GRAIN) : EN_MAX_THREADS;
}

static inline double gemm_work(const struct en_gemm *p) { return (double)p->m * (double)p->n * (double)p->k; }

static en_status gemm_blocks(const struct en_gemm *p) {
    struct gemm_chunk q = {.p = p, .status = EN_OK};
    const int64_t threads = min64(gemm_threads(gemm_work(p)), en_get_threads());
    q.in_place = p->b_type == EN_F32 && p->b_col == 1 && p->m <= FEW_ROWS;
    const int64_t width = q.in_place ? p->n : min64(p->n, max64(NR, PACKED_FLOATS / p->k / NR * NR));
    const int64_t packed = q.in_place ? NR : ceil_div(width, NR) * NR;
    q.packed_b = en_scratch(EN_SCRATCH_B, (size_t)(packed * p->k + VL) * sizeof(float));
    if (!q.packed_b) return EN_NO_MEMORY;
    q.m_blocks = ceil_div(p->m, MC);
    if (q.m_blocks > threads) q.m_blocks = ceil_div(q.m_blocks, threads) * threads; /* none is left over */
    for (q.n0 = 0; q.n0 < p->n && q.status == EN_OK; q.n0 += width) {
        q.n1 = min64(p->n, q.n0 + width);
        const int64_t panels = ceil_div(q.n1 - q.n0, NR);
        /* enough tasks for every thread, but each wide enough to be worth packing its rows of A */
        q.n_pieces = max64(1, min64(ceil_div(4 * threads, q.m_blocks), panels * NR / 256));
        if (threads == 1) q.n_pieces = 1;
        en_parallel_tasks(panels, threads, pack_panels, &q);
        en_parallel_tasks(q.m_blocks * q.n_pieces, threads, multiply_blocks, &q);
    }
    return (en_status)q.status;
}

/* Few vectors x against many w, k contiguous in both: c[i * c_few + j * c_many] = or += x_i · w_j. Each w is read once,
 * DOT_N of them at a time, against DOT_M of x. Serves few rows of A against the weights of a linear layer, and many rows
 * of A against few columns of B. */
enum { DOT_ROWS = 8, DOT_COLUMNS = 16, DOT_M = 4, DOT_N = VL == 16 ? 4 : 2 };

struct dots {
    int64_t few, many, k;
    const float *x; /* (few,k) */
    int64_t x_row;
    enum en_dtype type;
    const void *w; /* (many,k) */
    int64_t w_row;
    float *c;
    int64_t c_few, c_many;
    int accumulate;
};

WORD void dot_tile(const int m, const int n, enum en_dtype type, const struct dots *q, int64_t i0, int64_t j0) {
    vf acc[DOT_M][DOT_N];
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) acc[i][j] = v_zero();
    for (int64_t l = 0; l < q->k; l += VL) {
        vf x[DOT_M];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) x[i] = load_as(EN_F32, q->x, (i0 + i) * q->x_row + l, q->k - l);
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            vf w = load_as(type, q->w, (j0 + j) * q->w_row + l, q->k - l);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) acc[i][j] = v_fma(x[i], w, acc[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            float *at = q->c + (i0 + i) * q->c_few + (j0 + j) * q->c_many, sum = v_hsum(acc[i][j]);
            *at = q->accumulate ? *at + sum : sum;
        }
}

/* m <= DOT_M vectors x from i on, against w [begin, end) */
WORD void dot_band(const int m, enum en_dtype type, const struct dots *q, int64_t i, int64_t begin, int64_t end) {
    int64_t j = begin;
    for (; j + DOT_N <= end; j += DOT_N) dot_tile(m, DOT_N, type, q, i, j);
    for (; j < end; j++) dot_tile(m, 1, type, q, i, j);
}

WORD void dot_all(enum en_dtype type, const struct dots *q, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += 16) /* 16 of w stay in cache for the next DOT_M of x */
        for (int64_t i = 0; i < q->few; i += DOT_M) {
            const int64_t stop = min64(end, j + 16);
            switch (min64(DOT_M, q->few - i)) {
            case 1: dot_band(1, type, q, i, j, stop); break;
            case 2: dot_band(2, type, q, i, j, stop); break;
            case 3: dot_band(3, type, q, i, j, stop); break;
            default: dot_band(4, type, q, i, j, stop); break;
            }
        }
}

static void dot_range(void *context, int64_t begin, int64_t end) {
    const struct dots *q = context;
    switch (q->type) {
    case EN_BF16: dot_all(EN_BF16, q, begin, end); break;
    case EN_F16: dot_all(EN_F16, q, begin, end); break;
    default: dot_all(EN_F32, q, begin, end); break;
    }
}

/* x, which lies at `from` with steps from_row and from_k, is gathered first unless its k is contiguous f32. */
static en_status gemm_dots(struct dots q, enum en_dtype from_type, const void *from, int64_t from_row, int64_t from_k) {
    q.x = from;
    q.x_row = from_row;
    if (from_type != EN_F32 || from_k != 1) {
        q.x_row = ceil_div(q.k, VL) * VL;
        float *x = en_scratch(EN_SCRATCH_A, (size_t)(q.few * q.x_row + VL) * sizeof(float));
        if (!x) return EN_NO_MEMORY;
        pack(from_type, x, q.x_row, from, from_k, from_row, q.k, q.few);
        q.x = x;
    }
    en_parallel_for(q.many, GEMM_GRAIN / (q.few * q.k) + 1, dot_range, &q);
    return EN_OK;
}

/* One product; p's batch is not looked at. */
static en_status gemm_one(const struct en_gemm *p) {
    if (p->m == 0 || p->n == 0) return EN_OK;
    struct dots q = {.k = p->k, .c = p->c, .accumulate = p->accumulate};
    if (p->m <= DOT_ROWS && p->b_row == 1 && p->b_col != 1) {
        q.few = p->m, q.c_few = p->c_row;
        q.many = p->n, q.c_many = 1;
        q.type = p->b_type, q.w = p->b, q.w_row = p->b_col;
        return gemm_dots(q, EN_F32, p->a, p->a_row, p->a_col);
    }
    if (p->n <= DOT_COLUMNS && p->a_col == 1 && p->k >= 4 * VL) {
        q.few = p->n, q.c_few = 1;
        q.many = p->m, q.c_many = p->c_row;
        q.type = EN_F32, q.w = p->a, q.w_row = p->a_row;
        return gemm_dots(q, p->b_type, p->b, p->b_col, p->b_row);
    }
    return gemm_blocks(p);
}

struct gemm_batch {
    const struct en_gemm *p;
    _Atomic int status;
};

static void gemm_products(void *context, int64_t begin, int64_t end) {
    struct gemm_batch *batch = context;
    for (int64_t product = begin; product < end; product++) {
        struct en_gemm p = *batch->p;
        int64_t a = 0, b = 0, c = 0, index = product;
        for (int d = p.batch_ndim - 1; d >= 0; d--) {
            const int64_t x = index % p.batch[d];
            index /= p.batch[d];
            a += x * p.a_batch[d];
            b += x * p.b_batch[d];
            c += x * p.c_batch[d];
        }
        p.a += a;
        p.b = (const char *)p.b + b * (p.b_type == EN_F32 ? 4 : 2);
        p.c += c;
        en_status status = gemm_one(&p);
        if (status != EN_OK) batch->status = status;
    }
}

/* A batch of many products goes to threads whole; few products are each shared by all threads. */
static en_status gemm(const struct en_gemm *p) {
    struct gemm_batch batch = {.p = p, .status = EN_OK};
    int64_t products = 1;
    for (int d = 0; d < p->batch_ndim; d++) products *= p->batch[d];
    const int64_t threads = min64(gemm_threads((double)products * gemm_work(p)), en_get_threads());
    if (products >= 2 * threads)
        en_parallel_tasks(products, threads, gemm_products, &batch);
    else
        gemm_products(&batch, 0, products);
    return (en_status)batch.status;
}

#endif
