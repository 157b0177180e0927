/* Aligned memory and the freed blocks it keeps, scratch buffers that a thread keeps, and the switch by which tests make
 * an allocation fail. */
#include "entrenar.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#ifndef __has_feature
#define __has_feature(name) 0
#endif
#if defined __SANITIZE_ADDRESS__ || __has_feature(address_sanitizer)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

static atomic_int_least64_t countdown;

void en_fail_allocation(int64_t nth) { atomic_store(&countdown, nth); }

static int must_fail(void) {
    return atomic_load_explicit(&countdown, memory_order_relaxed) > 0 && atomic_fetch_sub(&countdown, 1) == 1;
}

enum { ALIGNMENT = 64 };

/* Large blocks that were freed are kept for the next allocation of about their size: pages fresh from the system cost
 * several times what a kernel does with them. Who finds the cache busy does without, so a fork can't block on it. */
enum { HEADER = ALIGNMENT, LARGE = 128 << 10, KEPT_BLOCKS = 64, KEPT_BYTES = 128 << 20 };

struct header { /* in the 64 bytes before a block */
    size_t bytes;
};

static struct {
    atomic_flag busy;
    int count;
    size_t bytes;
    struct header *block[KEPT_BLOCKS]; /* oldest first */
} kept = {.busy = ATOMIC_FLAG_INIT};

static struct header *take(int i) {
    struct header *block = kept.block[i];
    kept.bytes -= block->bytes;
    memmove(kept.block + i, kept.block + i + 1, (size_t)(--kept.count - i) * sizeof *kept.block);
    return block;
}

static struct header *reuse(size_t bytes) {
    if (bytes < LARGE || atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire)) return NULL;
    struct header *found = NULL;
    for (int i = kept.count - 1; i >= 0 && !found; i--)
        if (kept.block[i]->bytes >= bytes && kept.block[i]->bytes - bytes <= bytes / 8) found = take(i);
    atomic_flag_clear_explicit(&kept.busy, memory_order_release);
    return found;
}

static int keep(struct header *block) {
    if (block->bytes < LARGE || block->bytes > KEPT_BYTES / 2) return 0;
    if (atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire)) return 0;
    while (kept.count == KEPT_BLOCKS || kept.bytes + block->bytes > KEPT_BYTES) free(take(0));
    kept.block[kept.count++] = block;
    kept.bytes += block->bytes;
    atomic_flag_clear_explicit(&kept.busy, memory_order_release);
    return 1;
}

/* For the sanitizer to see every misuse, a block has exactly its bytes, no header, and stays freed. */
static void *sanitized_alloc(size_t bytes) {
    void *block;
    return posix_memalign(&block, ALIGNMENT, bytes) ? NULL : block;
}

void *en_alloc(size_t bytes) {
    if (must_fail() || bytes > PTRDIFF_MAX - 2 * HEADER) return NULL;
    if (SANITIZED) return sanitized_alloc(bytes);
    bytes = (bytes + HEADER - 1) / HEADER * HEADER;
    struct header *block = reuse(bytes);
    if (!block) {
        block = aligned_alloc(HEADER, bytes + HEADER);
        if (!block) return NULL;
        block->bytes = bytes;
    }
    return (char *)block + HEADER;
}

void en_free(void *p) {
    if (!p || SANITIZED) {
        free(p);
        return;
    }
    struct header *block = (struct header *)((char *)p - HEADER);
    if (!keep(block)) free(block);
}

struct scratch {
    void *block[EN_SCRATCH_COUNT];
    size_t bytes[EN_SCRATCH_COUNT];
};

static _Thread_local struct scratch *mine;
static pthread_key_t key; /* only for its destructor */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int have_key;

static void release(void *p) {
    struct scratch *s = p;
    for (int i = 0; i < EN_SCRATCH_COUNT; i++) en_free(s->block[i]);
    free(s);
    mine = NULL;
}

static void make_key(void) { have_key = pthread_key_create(&key, release) == 0; }

void *en_scratch(enum en_slot slot, size_t bytes) {
    if (!mine) {
        pthread_once(&once, make_key);
        mine = calloc(1, sizeof *mine);
        if (!mine) return NULL;
        if (have_key) pthread_setspecific(key, mine);
    }
    if (mine->bytes[slot] < bytes || (SANITIZED && mine->bytes[slot] != bytes)) {
        void *block = en_alloc(bytes);
        if (!block) return NULL;
        en_free(mine->block[slot]);
        mine->block[slot] = block;
        mine->bytes[slot] = bytes;
    }
    return mine->block[slot];
}
