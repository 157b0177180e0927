/* Tiles of AMX without the unit: its instructions in words of AVX-512, under the names of their intrinsics, so that
 * tests of the level run on other CPUs (docs/emulated.md). Never compiled unless asked for.
 *
 * As Intel's manual has them, to the bit: see tile_amx.h. What a kernel must not do ends the process: tiles without a
 * configuration, which the unit answers with a fault, and a second configuration while one is left over.
 */
#include <stdint.h>
#include <stdlib.h>

enum { SOFTWARE_TILES = 8, SOFTWARE_ROWS = 16 };

static _Thread_local struct {
    int configured;
    _Alignas(64) float row[SOFTWARE_TILES][SOFTWARE_ROWS][VL];
} tile_unit;

static float (*software_tile(int tile))[VL] {
    if (!tile_unit.configured) abort();
    return tile_unit.row[tile];
}

struct tile_config;

/* ldtilecfg of eight whole tiles, palette 1: tiles become 0. */
static void load_tile_config(const struct tile_config *config) {
    const uint8_t *byte = (const uint8_t *)config; /* bytes a row from 16 on, 16 bits each; rows from 48 on */
    int whole = byte[0] == 1 && byte[1] == 0;
    for (int t = 0; t < SOFTWARE_TILES; t++)
        whole = whole && byte[16 + 2 * t] == 64 && byte[17 + 2 * t] == 0 && byte[48 + t] == SOFTWARE_ROWS;
    if (!whole || tile_unit.configured) abort();
    tile_unit.configured = 1;
    for (int t = 0; t < SOFTWARE_TILES; t++)
        for (int i = 0; i < SOFTWARE_ROWS; i++) v_store(tile_unit.row[t][i], v_zero());
}

static void software_release(void) { tile_unit.configured = 0; }

static void software_zero(int tile) {
    float(*to)[VL] = software_tile(tile);
    for (int i = 0; i < SOFTWARE_ROWS; i++) v_store(to[i], v_zero());
}

static void software_load(int tile, const void *from, int64_t stride) {
    float(*to)[VL] = software_tile(tile);
    for (int i = 0; i < SOFTWARE_ROWS; i++) v_store(to[i], v_load((const float *)((const char *)from + i * stride)));
}

static void software_store(int tile, void *to, int64_t stride) {
    float(*from)[VL] = software_tile(tile);
    for (int i = 0; i < SOFTWARE_ROWS; i++) v_store((float *)((char *)to + i * stride), v_load(from[i]));
}

static vf low_of_pairs(vf x) { return v_from_bits(vi_shl(v_bits(x), 16)); }
static vf high_of_pairs(vf x) { return v_from_bits(vi_and(v_bits(x), vi_set((int32_t)0xffff0000))); }

static __attribute__((noinline)) void multiply_tiles(float (*c)[VL], float (*a)[VL], float (*b)[VL]) {
    for (int m = 0; m < SOFTWARE_ROWS; m++) {
        vf even = v_zero(), odd = v_zero();
        for (int k = 0; k < VL; k++) {
            const vf pair = v_set(a[m][k]), row = v_load(b[k]);
            even = v_fma(low_of_pairs(pair), low_of_pairs(row), even);
            odd = v_fma(high_of_pairs(pair), high_of_pairs(row), odd);
        }
        v_store(c[m], v_add(v_load(c[m]), v_add(even, odd)));
    }
}

/* The instruction rounds to nearest even and takes denormals for 0, operands and results, whatever MXCSR says. */
static void software_dot(int c, int a, int b) {
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(0x9fc0); /* all exceptions masked, to nearest even, FTZ, DAZ */
    multiply_tiles(software_tile(c), software_tile(a), software_tile(b));
    _mm_setcsr(csr);
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_release
#define _tile_zero software_zero
#define _tile_loadd software_load
#define _tile_stream_loadd software_load
#define _tile_stored software_store
#define _tile_dpbf16ps software_dot
#define _tile_release software_release
