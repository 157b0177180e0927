/* csrc/blocks.c under load: threads that make, fill, check and drop blocks of all sizes, while the system refuses some
 * of its calls.
 *
 *     blocks THREADS TURNS MREMAP MMAP     every MREMAP-th and MMAP-th call fails, 0: none
 *
 * A refused mremap has unmapped its target, as Linux did where pages lay in two mappings. Prints what is in use and kept
 * at the end, MB still resident once all is given back, and how many calls were refused; exit code 1 and a line for what
 * went wrong. tests/kernels/test_blocks.py compiles and runs it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static unsigned mremap_every, mmap_every;
static _Atomic unsigned mremaps, mmaps, refused;

static void *some_mremap(void *from, size_t bytes, size_t room, int flags, void *to) {
    if (mremap_every && ++mremaps % mremap_every == 0) {
        refused++;
        munmap(to, room);
        errno = EFAULT;
        return MAP_FAILED;
    }
    return mremap(from, bytes, room, flags, to);
}
static void *some_mmap(void *at, size_t bytes, int protection, int flags, int file, off_t offset) {
    if (mmap_every && ++mmaps % mmap_every == 0) {
        refused++;
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return mmap(at, bytes, protection, flags, file, offset);
}
#define mremap some_mremap
#define mmap some_mmap
#include "../../csrc/blocks.c"
#undef mremap
#undef mmap

enum { HELD = 24, STRIDE = 512 };
static const size_t most_in_use = (size_t)400 << 20;
static int turns;

static void fail(const char *what) {
    printf("%s\n", what);
    exit(1);
}

/* A number in every page, and in the last word. */
static void fill(uint64_t *words, size_t count, uint64_t tag) {
    for (size_t i = 0; i < count; i += STRIDE) words[i] = tag + i;
    words[count - 1] = ~tag;
}
static void check(const uint64_t *words, size_t count, uint64_t tag) {
    for (size_t i = 0; i + 1 < count; i += STRIDE)
        if (words[i] != tag + i) fail("a block has lost what was in it");
    if (words[count - 1] != ~tag) fail("a block has lost its end");
}

static void *work(void *argument) {
    unsigned seed = 977u * (unsigned)(uintptr_t)argument + 1;
    uint64_t *held[HELD] = {0}, tag[HELD];
    size_t count[HELD];
    for (int turn = 0; turn < turns; turn++) {
        const int i = rand_r(&seed) % HELD;
        if (held[i]) {
            check(held[i], count[i], tag[i]);
            en_large_free(held[i]);
            held[i] = NULL;
            continue;
        }
        const size_t largest = (size_t)1 << (17 + rand_r(&seed) % 9); /* to 32 MB */
        const size_t bytes = EN_LARGE + (size_t)rand_r(&seed) % largest / 64 * 64;
        if (used > most_in_use || !(held[i] = en_large_alloc(bytes))) continue;
        if ((uintptr_t)held[i] % 64) fail("a block is not aligned");
        count[i] = (bytes - EN_HEADER) / sizeof(uint64_t);
        tag[i] = ((uint64_t)(uintptr_t)argument << 40) + (uint64_t)turn;
        fill(held[i], count[i], tag[i]);
    }
    for (int i = 0; i < HELD; i++) {
        if (!held[i]) continue;
        check(held[i], count[i], tag[i]);
        en_large_free(held[i]);
    }
    return NULL;
}

/* The list is of pieces that don't overlap, neighbours of one mapping are one, and their sum is right. */
static void check_list(void) {
    size_t sum = 0;
    for (int i = 0; i < kept.count; i++) {
        const struct block a = kept.block[i];
        sum += a.bytes;
        for (int j = 0; j < i; j++) {
            const struct block b = kept.block[j];
            if (a.start < b.start + b.bytes && b.start < a.start + a.bytes) fail("kept blocks overlap");
            if (a.mapping == b.mapping && (a.start + a.bytes == b.start || b.start + b.bytes == a.start))
                fail("kept neighbours are not one");
        }
    }
    if (sum != kept.bytes) fail("the kept bytes are counted wrongly");
    if (sum > kept.most) fail("more is kept than was ever in use");
}

static long resident_mb(void) {
    long size, resident;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%ld %ld", &size, &resident) != 2) fail("no /proc/self/statm");
    fclose(file);
    return resident * sysconf(_SC_PAGESIZE) >> 20;
}

int main(int arguments, char **argument) {
    if (arguments != 5) return 2;
    const int threads = atoi(argument[1]);
    turns = atoi(argument[2]);
    mremap_every = (unsigned)atoi(argument[3]);
    mmap_every = (unsigned)atoi(argument[4]);
    pthread_t thread[16];
    for (int i = 0; i < threads; i++) pthread_create(&thread[i], NULL, work, (void *)(uintptr_t)(i + 1));
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    check_list();
    const size_t at_the_end = kept.bytes >> 20;
    while (kept.count) unmap(take(0));
    printf("%zu %zu %ld %u\n", (size_t)used, at_the_end, resident_mb(), (unsigned)refused);
    return 0;
}
