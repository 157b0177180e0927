/* The engine of AMX: tile registers of 16 rows by 64 bytes, multiplied by tdpbf16ps.
 *
 * Tiles 0 to 3 are the sums, 2 by 2 of 16 x 16 floats; 4 and 5 two tiles of A, 6 and 7 two of B: a load for every
 * product. A packed tile of A is 16 rows of 16 words, pairs of k, one kilobyte; B has kernels/pack.h's layout, a step a
 * row, which is what the instruction wants. The sums of up to 896 of k, and a quarter more where the rest is short, are
 * made in tiles; where k is longer, C is visited again for every further block.
 *
 * tdpbf16ps takes denormals for 0 and rounds to nearest even whatever MXCSR says. It sums the even k of its 32 and the
 * odd ones apart, each product added with one rounding, then adds both to the sum that was there.
 */
#ifndef EN_TILE_AMX_H
#define EN_TILE_AMX_H

#include "../entrenar.h"

#include "types.h"

#include "pack.h"
#include "tile.h"

enum { ROWS = 16, TILE_WORDS = ROWS * ROWS }; /* rows of a tile, each of as many words */

/* Words of A that stay in L1 while columns of B pass by; the rest is loaded as B is, for one use. */
enum { A_NEAR = 36 << 8 };

/* Eight whole tiles. A constant in memory, loaded by hand: to gcc 12's _tile_loadconfig it has 8 bytes, and stores to
 * the others vanish. */
static const struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS}};

#ifndef EN_SOFTWARE_TILES
static void load_tile_config(const struct tile_config *config) { __asm__ volatile("ldtilecfg %0" ::"m"(*config)); }
#endif

/* Around a thread's work with tiles. They are never left configured: another library may have a configuration of its
 * own, and the system saves 8 KB a switch for a thread that holds tiles. */
static void begin_tiles(void) { load_tile_config(&tile_config); }
static void end_tiles(void) { _tile_release(); }

/* Sums in tiles += a·b over `steps`. Rows of a are a_row words apart, a_step from one tile along k to the next. near: a
 * stays in L1, or else passes by once, by streaming loads; b_near: so does b. */
WORD void sum_tiles(const int tall, const int wide, const int a_near, const int b_near, const float *a, int64_t a_row,
                    int64_t a_step, const float *b, int64_t b_row, int64_t steps) {
    for (; steps > 0; steps -= ROWS, a += a_step, b += ROWS * b_row) {
        if (b_near)
            _tile_loadd(6, b, b_row * 4);
        else
            _tile_stream_loadd(6, b, b_row * 4);
        if (a_near)
            _tile_loadd(4, a, a_row * 4);
        else
            _tile_stream_loadd(4, a, a_row * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            if (b_near)
                _tile_loadd(7, b + ROWS, b_row * 4);
            else
                _tile_stream_loadd(7, b + ROWS, b_row * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (tall) {
            if (a_near)
                _tile_loadd(5, a + ROWS * a_row, a_row * 4);
            else
                _tile_stream_loadd(5, a + ROWS * a_row, a_row * 4);
            _tile_dpbf16ps(2, 5, 6);
            if (wide) _tile_dpbf16ps(3, 5, 7);
        }
    }
}

/* The sums begin: with c (16 or 32, 16 or 32), or with 0. */
WORD void begin_sums(const int tall, const int wide, int accumulate, const float *c, int64_t c_row) {
    const int64_t stride = c_row * 4;
    __asm__ volatile("" ::: "memory"); /* gcc's tile loads don't say that they read memory */
    if (accumulate) {
        _tile_loadd(0, c, stride);
        if (wide) _tile_loadd(1, c + ROWS, stride);
        if (tall) _tile_loadd(2, c + ROWS * c_row, stride);
        if (tall && wide) _tile_loadd(3, c + ROWS * c_row + ROWS, stride);
    } else {
        _tile_zero(0);
        if (wide) _tile_zero(1);
        if (tall) _tile_zero(2);
        if (tall && wide) _tile_zero(3);
    }
}

WORD void store_sums(const int tall, const int wide, float *c, int64_t c_row) {
    const int64_t stride = c_row * 4;
    _tile_stored(0, c, stride);
    if (wide) _tile_stored(1, c + ROWS, stride);
    if (tall) _tile_stored(2, c + ROWS * c_row, stride);
    if (tall && wide) _tile_stored(3, c + ROWS * c_row + ROWS, stride);
}

/* c (16 or 32, 16 or 32) = or += the sum over the segments of a·b */
WORD void whole_tiles(const int tall, const int wide, const struct segment *s, int count, float *c, int64_t c_row,
                      int accumulate) {
    const int64_t rows = tall ? 2 * ROWS : ROWS, a_step = ROWS * rows;
    begin_sums(tall, wide, accumulate, c, c_row);
    for (int64_t room = A_NEAR / rows; count > 0; count--, s++) { /* room: steps that still fit */
        const int64_t near = min64(s->steps, room / ROWS * ROWS), far = s->steps - near;
        sum_tiles(tall, wide, 1, 0, s->a, ROWS, a_step, s->b, s->b_row, near);
        sum_tiles(tall, wide, 0, 0, s->a + near * rows, ROWS, a_step, s->b + near * s->b_row, s->b_row, far);
        room -= near;
    }
    store_sums(tall, wide, c, c_row);
}

/* c (h,width): rows that fill no tile go through a buffer. */
static void tile_amx(int64_t h, int64_t width, const struct segment *s, int count, float *c, int64_t c_row,
                     int accumulate) {
    _Alignas(64) float buffer[2 * ROWS * 2 * ROWS];
    const int ragged = h % ROWS != 0, more = accumulate && !ragged;
    float *to = ragged ? buffer : c;
    const int64_t row = ragged ? 2 * ROWS : c_row;
    if (h > ROWS && width > ROWS)
        whole_tiles(1, 1, s, count, to, row, more);
    else if (h > ROWS)
        whole_tiles(1, 0, s, count, to, row, more);
    else if (width > ROWS)
        whole_tiles(0, 1, s, count, to, row, more);
    else
        whole_tiles(0, 0, s, count, to, row, more);
    for (int64_t i = 0; ragged && i < h; i++)
        for (int64_t j = 0; j < width; j += VL) {
            const vf sum = v_load(buffer + i * row + j);
            v_store(c + i * c_row + j, accumulate ? v_add(v_load(c + i * c_row + j), sum) : sum);
        }
}

/* Rows of A as tiles: of every ROWS steps, the words of a row after those of the row before, up to whole tiles. */
WORD void pack_tiles_as(enum en_dtype type, float *dst, const struct operand *o, int64_t rows, int64_t k,
                       int64_t steps) {
    const int64_t height = round_up(rows, ROWS);
    for (int64_t s = 0; s < steps; s += ROWS, dst += ROWS * height)
        for (int64_t i = 0; i < height; i += ROWS) {
            vf r[ROWS];
            if (o->k == 1) {
                for (int64_t v = 0; v < ROWS; v++)
                    v_store(dst + (i + v) * ROWS,
                            i + v < rows ? load_words(1, type, o, i + v, s, k) : v_zero());
                continue;
            }
            for (int64_t v = 0; v < ROWS; v++) {
                r[v] = v_zero();
                if (2 * (s + v) >= k) continue;
                if (o->row == 1) {
                    r[v] = gather_words(1, type, o, i, max64(rows - i, 0), s + v, k);
                } else {
                    float word[ROWS] = {0};
                    for (int64_t x = 0; x < ROWS && i + x < rows; x++)
                        v_store_n(word + x, gather_words(1, type, o, i + x, 1, s + v, k), 1);
                    r[v] = v_load(word);
                }
            }
            v_transpose(r);
            for (int64_t v = 0; v < ROWS; v++) v_store(dst + (i + v) * ROWS, r[v]);
        }
}

static void pack_tiles(int pairs, float *dst, int64_t width, const struct operand *o, int64_t rows, int64_t k,
                      int64_t steps) {
    (void)pairs, (void)width;
    switch (o->type) {
    case EN_BF16: pack_tiles_as(EN_BF16, dst, o, rows, k, steps); return;
    case EN_F16: pack_tiles_as(EN_F16, dst, o, rows, k, steps); return;
    default: pack_tiles_as(EN_F32, dst, o, rows, k, steps); return;
    }
}

/* Longer K is cut into equal blocks of at most 896: beyond, A and B leave the caches between uses. B's block, 640
 * columns of that, is half of a core's L2. */
static const struct engine amx_engine = {
    .pairs = 1, .align = ROWS, .mr = 2 * ROWS, .pad = ROWS, .kc = 896 / 2, .block = 640 * 896 / 2,
    .pack_a = pack_tiles, .tile = tile_amx, .begin = begin_tiles, .end = end_tiles};
#define EN_BF16_ENGINE (&amx_engine)

/* ATTENTION'S BLOCKS: c (16 or 32, 16 or 32) of them. All of a block's operands stay in L1 or close to it. */
WORD void tiles_of_block(const int tall, const int wide, const struct block *q, const float *a, const float *b,
                         float *c, const float *keep) {
    for (int64_t i = 0; keep && i < (tall ? 2 * ROWS : ROWS); i++)
        for (int64_t v = 0; v < (wide ? 2 * ROWS : ROWS); v += VL) {
            float *at = c + i * q->c_row + v;
            v_store(at, v_mul(v_load(at), v_load(keep + v)));
        }
    begin_sums(tall, wide, keep || q->add, c, q->c_row);
    sum_tiles(tall, wide, 1, 1, a, q->a_row, ROWS, b, q->b_row, q->depth);
    store_sums(tall, wide, c, q->c_row);
}

static void block_amx(int64_t m, int64_t n, const struct block *q, const float *a, const float *b, float *c,
                      const float *keep) {
    for (int64_t j = 0; j < n; j += 2 * ROWS)
        for (int64_t i = 0; i < m; i += 2 * ROWS) {
            const float *at = a + i * q->a_row, *some = keep ? keep + j : NULL;
            float *to = c + i * q->c_row + j;
            if (m - i > ROWS && n - j > ROWS)
                tiles_of_block(1, 1, q, at, b + j, to, some);
            else if (m - i > ROWS)
                tiles_of_block(1, 0, q, at, b + j, to, some);
            else if (n - j > ROWS)
                tiles_of_block(0, 1, q, at, b + j, to, some);
            else
                tiles_of_block(0, 0, q, at, b + j, to, some);
        }
}
#define EN_BF16_BLOCKS block_amx

/* FLOP/s of the calling thread: the 2 x 2 loop, fed from L1 with random numbers in [1/2, 1) of either sign, since a
 * core that multiplies zeros clocks higher. */
enum { PEAK_STEPS = 8 * ROWS, AMX_PASSES = 256 };

static double amx_peak(double seconds) {
    enum { WORDS = PEAK_STEPS * 2 * ROWS };
    _Alignas(64) uint32_t operands[2 * WORDS]; /* a, then b: 16 KB each */
    _Alignas(64) float sums[TILE_WORDS];
    const float *a = (const float *)operands, *b = a + WORDS;
    uint32_t state = 1;
    for (int i = 0; i < 2 * WORDS; i++) {
        state ^= state << 13, state ^= state >> 17, state ^= state << 5; /* xorshift32 */
        operands[i] = (state & 0x807f807fu) | 0x3f003f00u;
    }
    int64_t passes = 0, elapsed, start = en_now();
    begin_tiles();
    do {
        __asm__ volatile("" ::: "memory");
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int pass = 0; pass < AMX_PASSES; pass++)
            sum_tiles(1, 1, 1, 1, a, ROWS, 2 * TILE_WORDS, b, 2 * ROWS, PEAK_STEPS);
        _tile_stored(3, sums, 64);
        passes += AMX_PASSES;
        elapsed = en_now() - start;
    } while ((double)elapsed < seconds * 1e9);
    end_tiles();
    return (double)passes * (PEAK_STEPS / ROWS) * 4 * (2.0 * ROWS * ROWS * 2 * ROWS) / ((double)elapsed * 1e-9);
}
#define EN_BF16_PEAK amx_peak

#endif
