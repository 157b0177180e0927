/* Which kernels this machine runs: one row a level, best first. Compiled for the baseline CPU; no instruction of a
 * level runs before its check has passed. */
#define _GNU_SOURCE
#include "entrenar.h"

#include <string.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern const struct en_kernels en_scalar_kernels;

static int always(void) { return 1; }

#ifdef __x86_64__
extern const struct en_kernels en_avx2_kernels, en_avx512_kernels, en_avx512_bf16_kernels, en_amx_kernels;

struct regs {
    unsigned a, b, c, d;
};

static struct regs cpuid(unsigned leaf, unsigned sub) {
    struct regs r = {0};
    __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
    return r;
}

/* Does the OS save these register states? (1: x87, 2: SSE, 4: AVX, 0xe0: AVX-512, 0x60000: AMX) */
static int os_saves(uint64_t states) {
    if (!(cpuid(1, 0).c >> 27 & 1)) return 0; /* OSXSAVE */
    uint32_t lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (((uint64_t)hi << 32 | lo) & states) == states;
}

static int has_avx2(void) {
    unsigned c1 = cpuid(1, 0).c, b7 = cpuid(7, 0).b, c81 = cpuid(0x80000001u, 0).c;
    int fma = c1 >> 12 & 1, movbe = c1 >> 22 & 1, avx = c1 >> 28 & 1, f16c = c1 >> 29 & 1;
    int bmi1 = b7 >> 3 & 1, avx2 = b7 >> 5 & 1, bmi2 = b7 >> 8 & 1, lzcnt = c81 >> 5 & 1;
    return fma && movbe && avx && f16c && bmi1 && avx2 && bmi2 && lzcnt && os_saves(0x6);
}

static int has_avx512(void) {
    unsigned b7 = cpuid(7, 0).b;
    int f = b7 >> 16 & 1, dq = b7 >> 17 & 1, cd = b7 >> 28 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1;
    return has_avx2() && f && dq && cd && bw && vl && os_saves(0xe6);
}

/* Only where vdpbf16ps is worth it: AMD's cores start one as often as a fused multiply-add, so it does twice the
 * arithmetic of f32; Intel's start one every other cycle, each in two passes, and do half. */
static int has_fast_avx512_bf16(void) {
    return has_avx512() && cpuid(7, 1).a >> 5 & 1 && !strcmp(en_cpu_vendor(), "AuthenticAMD");
}

#ifdef EN_SOFTWARE_TILES
/* A build for tests: tiles are made of vectors (isa/software_tiles.h). */
static int has_amx(void) { return has_avx512() && cpuid(7, 1).a >> 5 & 1; }
#else
/* Tiles also need the kernel's leave, asked once a process: ARCH_REQ_XCOMP_PERM for XTILEDATA. */
static int has_amx(void) {
    unsigned d7 = cpuid(7, 0).d, a71 = cpuid(7, 1).a;
    int bf16 = d7 >> 22 & 1, tile = d7 >> 24 & 1, int8 = d7 >> 25 & 1, avx512_bf16 = a71 >> 5 & 1;
    return has_avx512() && bf16 && tile && int8 && avx512_bf16 && os_saves(0x600e6) &&
           syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}
#endif
#endif

#ifdef EN_SOFTWARE_TILES
const int en_software_tiles = 1;
#else
const int en_software_tiles = 0;
#endif

const struct en_isa en_isas[] = {
#ifdef __x86_64__
    {"amx", has_amx, &en_amx_kernels},
    {"avx512_bf16", has_fast_avx512_bf16, &en_avx512_bf16_kernels},
    {"avx512", has_avx512, &en_avx512_kernels},
    {"avx2", has_avx2, &en_avx2_kernels},
#endif
    {"scalar", always, &en_scalar_kernels},
};
const int en_isa_count = sizeof en_isas / sizeof *en_isas;

const struct en_isa *en_find_isa(const char *name) {
    for (int i = 0; i < en_isa_count; i++)
        if (!strcmp(en_isas[i].name, name)) return &en_isas[i];
    return NULL;
}

const struct en_isa *en_best_isa(void) {
    const struct en_isa *isa = en_isas + en_software_tiles; /* amx is the first: made in software, no default */
    while (!isa->available()) isa++;
    return isa;
}

/* Text that cpuid gives in registers; empty on other machines. */
static char vendor[13], model[49];

const char *en_cpu_vendor(void) {
#ifdef __x86_64__
    struct regs r = cpuid(0, 0);
    unsigned words[3] = {r.b, r.d, r.c};
    memcpy(vendor, words, 12);
#endif
    return vendor;
}

const char *en_cpu_model(void) {
#ifdef __x86_64__
    if (cpuid(0x80000000u, 0).a >= 0x80000004u)
        for (unsigned i = 0; i < 3; i++) {
            struct regs r = cpuid(0x80000002u + i, 0);
            memcpy(model + 16 * i, &r, 16);
        }
#endif
    return model;
}

static _Thread_local int64_t bad_id;
void en_set_bad_id(int64_t id) { bad_id = id; }
int64_t en_bad_id(void) { return bad_id; }
