/* A ring of what ran when. The boundary marks the entry of a native call and records it at its end; with the switch
 * off that is one branch each. Callers hold Python's lock, so records have one writer at a time. */
#define _GNU_SOURCE
#include "entrenar.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

int en_profiling;

static struct {
    struct en_record *record;
    int64_t capacity, count; /* count: of all since the start; the last `capacity` are kept */
    int64_t began;
} ring;

static _Thread_local int64_t entered;

int64_t en_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

en_status en_profile_reserve(int64_t capacity) {
    struct en_record *fresh = en_alloc((size_t)capacity * sizeof *fresh);
    if (!fresh) return EN_NO_MEMORY;
    memset(fresh, 0, (size_t)capacity * sizeof *fresh); /* no page is touched first while calls are timed */
    en_free(ring.record);
    ring.record = fresh;
    ring.capacity = capacity;
    ring.count = 0;
    ring.began = en_now();
    return EN_OK;
}

void en_profile_clear(void) {
    en_free(ring.record);
    memset(&ring, 0, sizeof ring);
}

void en_profile_enter(void) { entered = en_now(); }

void en_profile_record(const char *name, size_t length, const struct en_work *work) {
    struct en_record *r = &ring.record[ring.count++ % ring.capacity];
    const int64_t now = en_now();
    if (entered < ring.began) entered = ring.began; /* it was under way when the recording began */
    if (length > sizeof r->name - 1) length = sizeof r->name - 1;
    memcpy(r->name, name, length);
    r->name[length] = 0;
    r->start = entered;
    r->duration = now - entered;
    r->work = *work;
    r->thread = (int)gettid();
    entered = now; /* a wrapper's second kernel begins where its first one ends */
}

int64_t en_profile_count(void) { return ring.count; }

/* The i-th of all records, which is one of the last `capacity`; NULL where it was overwritten. */
const struct en_record *en_profile_at(int64_t i) {
    return i < 0 || i >= ring.count || i < ring.count - ring.capacity ? NULL : &ring.record[i % ring.capacity];
}
