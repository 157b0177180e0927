/* Aligned memory, scratch buffers that a thread keeps, free pages given back, and the switch by which tests make an
 * allocation fail. */
#include "entrenar.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

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

struct header { /* in the bytes before a block */
    size_t bytes; /* of a large one; else 0 */
};

/* For the sanitizer to see every misuse, a block has exactly its bytes, no header, and stays freed. */
static void *sanitized_alloc(size_t bytes) {
    void *block;
    return posix_memalign(&block, EN_HEADER, bytes) ? NULL : block;
}

void *en_alloc(size_t bytes) {
    if (must_fail() || bytes > PTRDIFF_MAX - 2 * EN_LARGE) return NULL;
    if (SANITIZED) return sanitized_alloc(bytes);
    bytes = (bytes + EN_HEADER - 1) / EN_HEADER * EN_HEADER + EN_HEADER;
    if (bytes >= EN_LARGE) return en_large_alloc(bytes);
    struct header *block = aligned_alloc(EN_HEADER, bytes);
    if (!block) return NULL;
    block->bytes = 0;
    return (char *)block + EN_HEADER;
}

void en_free(void *p) {
    if (!p || SANITIZED) {
        free(p);
        return;
    }
    struct header *block = (struct header *)((char *)p - EN_HEADER);
    if (block->bytes)
        en_large_free(p);
    else
        free(block);
}

void en_trim(void) {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
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
