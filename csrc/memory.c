/* Aligned memory and the freed blocks it keeps, scratch buffers that a thread keeps, and the switch by which tests make
 * an allocation fail. */
#define _GNU_SOURCE /* MADV_HUGEPAGE */
#include "entrenar.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

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

/* Large blocks are mappings of their own, in huge pages where that helps: pages fresh from the system cost several
 * times what a kernel does with them, small ones eight times as much as huge ones. Freed ones are kept for the next
 * allocation of about their size, but in use and kept together never exceed the most that was in use at once: keeping
 * costs no memory at a program's peak. Who finds the cache busy does without, so a fork can't block on it. */
enum { HEADER = ALIGNMENT, PAGE = 4096, LARGE = 128 << 10, HUGE = 4 << 20, KEPT_BLOCKS = 256, KEPT_BYTES = 512 << 20 };

struct header { /* in the 64 bytes before a block */
    size_t bytes; /* of the whole mapping, or 0 */
};

static atomic_size_t used; /* bytes of large blocks in use */

static struct {
    atomic_flag busy;
    int count;
    size_t bytes, most; /* kept; the most that was in use at once */
    struct header *block[KEPT_BLOCKS]; /* oldest first */
} kept = {.busy = ATOMIC_FLAG_INIT};

static int enter(void) { return !atomic_flag_test_and_set_explicit(&kept.busy, memory_order_acquire); }
static void leave(void) { atomic_flag_clear_explicit(&kept.busy, memory_order_release); }

static struct header *take(int i) {
    struct header *block = kept.block[i];
    kept.bytes -= block->bytes;
    memmove(kept.block + i, kept.block + i + 1, (size_t)(--kept.count - i) * sizeof *kept.block);
    return block;
}

static void unmap(struct header *block) { munmap(block, block->bytes); }

static struct header *map(size_t bytes) {
    struct header *block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) return NULL;
    if (bytes >= HUGE) madvise(block, bytes, MADV_HUGEPAGE); /* a hint: without it all is well */
    block->bytes = bytes;
    return block;
}

static struct header *large(size_t bytes) {
    struct header *found = NULL;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (enter()) {
        for (int i = kept.count - 1; i >= 0 && !found; i--)
            if (kept.block[i]->bytes >= bytes && kept.block[i]->bytes - bytes <= bytes / 8) found = take(i);
        size_t now = atomic_load(&used) + (found ? found->bytes : bytes);
        if (now > kept.most) kept.most = now;
        while (kept.count && now + kept.bytes > kept.most) unmap(take(0));
        leave();
    }
    if (!found) found = map(bytes);
    if (found) atomic_fetch_add(&used, found->bytes);
    return found;
}

static void keep(struct header *block) {
    atomic_fetch_sub(&used, block->bytes);
    if (block->bytes > KEPT_BYTES / 2 || !enter()) {
        unmap(block);
        return;
    }
    while (kept.count == KEPT_BLOCKS || kept.bytes + block->bytes > KEPT_BYTES) unmap(take(0));
    kept.block[kept.count++] = block;
    kept.bytes += block->bytes;
    leave();
}

/* For the sanitizer to see every misuse, a block has exactly its bytes, no header, and stays freed. */
static void *sanitized_alloc(size_t bytes) {
    void *block;
    return posix_memalign(&block, ALIGNMENT, bytes) ? NULL : block;
}

void *en_alloc(size_t bytes) {
    if (must_fail() || bytes > PTRDIFF_MAX - 2 * HEADER) return NULL;
    if (SANITIZED) return sanitized_alloc(bytes);
    bytes = (bytes + HEADER - 1) / HEADER * HEADER + HEADER;
    if (bytes >= LARGE) {
        struct header *block = large(bytes);
        return block ? (char *)block + HEADER : NULL;
    }
    struct header *block = aligned_alloc(HEADER, bytes);
    if (!block) return NULL;
    block->bytes = 0;
    return (char *)block + HEADER;
}

void en_free(void *p) {
    if (!p || SANITIZED) {
        free(p);
        return;
    }
    struct header *block = (struct header *)((char *)p - HEADER);
    if (block->bytes)
        keep(block);
    else
        free(block);
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
