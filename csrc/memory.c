/* Aligned memory, scratch buffers that a thread keeps, and the switch by which tests make an allocation fail. */
#include "entrenar.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static atomic_int_least64_t countdown;

void en_fail_allocation(int64_t nth) { atomic_store(&countdown, nth); }

void *en_alloc(size_t bytes) {
    if (atomic_load_explicit(&countdown, memory_order_relaxed) > 0 && atomic_fetch_sub(&countdown, 1) == 1) return NULL;
    if (bytes > PTRDIFF_MAX - 64) return NULL;
    return aligned_alloc(64, (bytes + 63) / 64 * 64 + (bytes == 0) * 64);
}

void en_free(void *block) { free(block); }

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
    if (mine->bytes[slot] < bytes) {
        void *block = en_alloc(bytes);
        if (!block) return NULL;
        en_free(mine->block[slot]);
        mine->block[slot] = block;
        mine->bytes[slot] = bytes;
    }
    return mine->block[slot];
}
