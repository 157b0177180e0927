/* One persistent pool of threads; no OpenMP (libgomp is not fork-safe and collides with other runtimes in a process).
 *
 * A job is published by one 64-bit ticket, generation and number of parts together, so that a worker that was late
 * for a job it had no part in can't mistake it for the next one. Idle workers spin for some 100
 * microseconds, then sleep.
 */
#define _GNU_SOURCE
#include "entrenar.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

enum { SPINS = 8000 };

static struct {
    pthread_mutex_t turn; /* held by the caller whose job runs */
    pthread_mutex_t lock; /* guards sleeping, moved and allowed */
    pthread_cond_t work;
    _Atomic uint64_t ticket; /* generation << 16 | parts */
    _Atomic int sleepers;
    _Atomic int pending; /* parts not finished yet, the caller's own aside */
    int started;         /* workers alive: parts 1 to started */
    pthread_t thread[EN_MAX_THREADS];
    char asleep[EN_MAX_THREADS], moved[EN_MAX_THREADS];
    cpu_set_t allowed;
    en_range fn;
    void *context;
    int64_t n;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .work = PTHREAD_COND_INITIALIZER};

static _Atomic int wanted; /* 0: not decided yet */
static _Thread_local int inside;

static inline void relax(void) {
#ifdef __x86_64__
    _mm_pause();
#endif
}

/* Denormals count: whatever another library set on the calling thread, every part runs with the default rounding and
 * without flush-to-zero. */
static inline unsigned enter_fp(void) {
#ifdef __x86_64__
    unsigned old = _mm_getcsr();
    if ((old & 0xffc0u) != 0x1f80u) _mm_setcsr(0x1f80u);
    return old;
#else
    return 0;
#endif
}

static inline void leave_fp(unsigned old) {
#ifdef __x86_64__
    if ((old & 0xffc0u) != 0x1f80u) _mm_setcsr(old);
#else
    (void)old;
#endif
}

static void run_part(int part, int parts) {
    int64_t q = pool.n / parts, r = pool.n % parts;
    int64_t begin = q * part + (part < r ? part : r);
    pool.fn(pool.context, begin, begin + q + (part < r));
}

/* Linux likes to wake a thread on the CPU of the one that wakes it; there it would wait for its caller, which is about
 * to compute. So sleepers are woken anywhere else, and may move again as soon as they run. */
static void keep_off_this_cpu(int parts) {
    int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof pool.allowed, &pool.allowed)) return;
    if (CPU_COUNT(&pool.allowed) < parts) return;
    cpu_set_t others = pool.allowed;
    CPU_CLR(here, &others);
    for (int part = 1; part < parts; part++)
        if (pool.asleep[part])
            pool.moved[part] = pthread_setaffinity_np(pool.thread[part], sizeof others, &others) == 0;
}

static uint64_t sleep_until_ticket_differs(uint64_t seen, int part) {
    uint64_t ticket;
    cpu_set_t allowed;
    pthread_mutex_lock(&pool.lock);
    pool.asleep[part] = 1;
    atomic_fetch_add(&pool.sleepers, 1);
    while ((ticket = atomic_load(&pool.ticket)) == seen) pthread_cond_wait(&pool.work, &pool.lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pool.asleep[part] = 0;
    int moved = pool.moved[part];
    pool.moved[part] = 0;
    allowed = pool.allowed;
    pthread_mutex_unlock(&pool.lock);
    if (moved) pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
    return ticket;
}

static void *worker(void *arg) {
    int part = (int)(intptr_t)arg;
    uint64_t seen = 0;
    inside = 1;
    enter_fp();
    for (;;) {
        uint64_t ticket = seen;
        for (int i = 0; i < SPINS && ticket == seen; i++) {
            relax();
            ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
        }
        if (ticket == seen) ticket = sleep_until_ticket_differs(seen, part);
        seen = ticket;
        int parts = (int)(ticket & 0xffff);
        if (part >= parts) continue;
        run_part(part, parts);
        atomic_fetch_sub_explicit(&pool.pending, 1, memory_order_release);
    }
    return NULL;
}

/* A fork copies the calling thread alone: the child starts with an empty pool. */
static void before_fork(void) {
    pthread_mutex_lock(&pool.turn);
}
static void after_fork_parent(void) { pthread_mutex_unlock(&pool.turn); }
static void after_fork_child(void) {
    pthread_mutex_init(&pool.turn, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    atomic_store(&pool.ticket, 0);
    atomic_store(&pool.sleepers, 0);
    pool.started = 0;
}
static void register_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

static void start_workers(int count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork);
    while (pool.started < count) {
        int part = pool.started + 1;
        pool.asleep[part] = pool.moved[part] = 0;
        if (pthread_create(&pool.thread[part], NULL, worker, (void *)(intptr_t)part)) return;
        pthread_detach(pool.thread[part]);
        pool.started = part;
    }
}

void en_parallel_for(int64_t n, int64_t grain, en_range fn, void *context) {
    if (n <= 0) return;
    unsigned fp = enter_fp();
    int64_t parts = inside ? 1 : en_get_threads();
    if (grain < 1) grain = 1;
    if (parts > n / grain) parts = n / grain;
    if (parts <= 1) {
        fn(context, 0, n);
        leave_fp(fp);
        return;
    }
    pthread_mutex_lock(&pool.turn);
    if (pool.started < parts - 1) start_workers((int)parts - 1);
    if (parts > pool.started + 1) parts = pool.started + 1;
    pool.fn = fn;
    pool.context = context;
    pool.n = n;
    atomic_store(&pool.pending, (int)parts - 1);
    uint64_t generation = (atomic_load(&pool.ticket) >> 16) + 1;
    atomic_store(&pool.ticket, generation << 16 | (uint64_t)parts);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.lock);
        keep_off_this_cpu((int)parts);
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.lock);
    }
    inside = 1;
    run_part(0, (int)parts);
    inside = 0;
    /* Parts are alike, so the wait is short; yielding lets a worker run that has no CPU of its own. */
    for (int i = 0; atomic_load_explicit(&pool.pending, memory_order_acquire); i++)
        if (i < SPINS)
            relax();
        else
            sched_yield();
    pthread_mutex_unlock(&pool.turn);
    leave_fp(fp);
}

struct tasks {
    en_range fn;
    void *context;
    int64_t n;
    _Atomic int64_t next;
};

static void run_tasks(void *context, int64_t begin, int64_t end) {
    struct tasks *t = context;
    (void)begin, (void)end;
    for (int64_t i; (i = atomic_fetch_add(&t->next, 1)) < t->n;) t->fn(t->context, i, i + 1);
}

void en_parallel_tasks(int64_t n, int64_t threads, en_range fn, void *context) {
    struct tasks t = {.fn = fn, .context = context, .n = n};
    int64_t parts = inside ? 1 : en_get_threads();
    if (parts > threads) parts = threads;
    if (parts > n) parts = n;
    if (n > 0) en_parallel_for(parts, 1, run_tasks, &t);
}

int en_get_threads(void) {
    int n = atomic_load_explicit(&wanted, memory_order_relaxed);
    if (n == 0) {
        n = en_default_threads();
        atomic_store(&wanted, n);
    }
    return n;
}

void en_set_threads(int n) { atomic_store(&wanted, n < 1 ? 1 : n > EN_MAX_THREADS ? EN_MAX_THREADS : n); }
