/* One persistent pool of threads; no OpenMP (libgomp is not fork-safe and collides with other runtimes in a process).
 *
 * A job is published by one 64-bit ticket, generation and number of parts together, so that a worker that was late
 * for a job it had no part in can't mistake it for the next one. Waiting spins for some microseconds, then sleeps.
 */
#define _GNU_SOURCE
#include "entrenar.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

enum { SPINS = 2000 };

static struct {
    pthread_mutex_t turn; /* held by the caller whose job runs */
    pthread_mutex_t lock; /* guards sleeping */
    pthread_cond_t work, done;
    _Atomic uint64_t ticket;  /* generation << 16 | parts */
    _Atomic int sleepers;
    _Atomic int pending;      /* parts not finished yet, the caller's own aside */
    _Atomic int caller_sleeps;
    int started;              /* workers alive */
    en_range fn;
    void *context;
    int64_t n;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .work = PTHREAD_COND_INITIALIZER,
          .done = PTHREAD_COND_INITIALIZER};

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
        if (ticket == seen) {
            pthread_mutex_lock(&pool.lock);
            atomic_fetch_add(&pool.sleepers, 1);
            while ((ticket = atomic_load(&pool.ticket)) == seen) pthread_cond_wait(&pool.work, &pool.lock);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.lock);
        }
        seen = ticket;
        int parts = (int)(ticket & 0xffff);
        if (part >= parts) continue;
        run_part(part, parts);
        if (atomic_fetch_sub(&pool.pending, 1) == 1 && atomic_load(&pool.caller_sleeps)) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.done);
            pthread_mutex_unlock(&pool.lock);
        }
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
    pthread_cond_init(&pool.done, NULL);
    atomic_store(&pool.ticket, 0);
    atomic_store(&pool.sleepers, 0);
    pool.started = 0;
}
static void register_fork(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

static void start_workers(int count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork);
    while (pool.started < count) {
        pthread_t id;
        if (pthread_create(&id, NULL, worker, (void *)(intptr_t)(pool.started + 1))) return;
        pthread_detach(id);
        pool.started++;
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
        pthread_cond_broadcast(&pool.work);
        pthread_mutex_unlock(&pool.lock);
    }
    inside = 1;
    run_part(0, (int)parts);
    inside = 0;
    for (int i = 0; i < SPINS && atomic_load_explicit(&pool.pending, memory_order_acquire); i++) relax();
    if (atomic_load(&pool.pending)) {
        pthread_mutex_lock(&pool.lock);
        atomic_store(&pool.caller_sleeps, 1);
        while (atomic_load(&pool.pending)) pthread_cond_wait(&pool.done, &pool.lock);
        atomic_store(&pool.caller_sleeps, 0);
        pthread_mutex_unlock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.turn);
    leave_fp(fp);
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

/* ---- how many threads by default ---- */

static int read_line(const char *path, char *line, int size) {
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    int ok = fgets(line, size, f) != NULL;
    fclose(f);
    if (ok) line[strcspn(line, "\n")] = 0;
    return ok;
}

/* Cores among the CPUs we may run on: hyper-threads of one core have the same list of siblings. */
static int physical_cores(void) {
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask)) return 1;
    static char siblings[EN_MAX_THREADS][64];
    int cores = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && cores < EN_MAX_THREADS; cpu++) {
        if (!CPU_ISSET(cpu, &mask)) continue;
        char path[96], *mine = siblings[cores];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        if (!read_line(path, mine, 64)) snprintf(mine, 64, "cpu%d", cpu);
        int known = 0;
        for (int i = 0; i < cores; i++) known |= !strcmp(siblings[i], mine);
        cores += !known;
    }
    return cores ? cores : 1;
}

/* CPUs that one cgroup directory grants; 0 when it sets no limit. */
static double quota_in(const char *directory) {
    char path[600], line[64];
    double quota = -1, period = 0;
    snprintf(path, sizeof path, "%s/cpu.max", directory); /* v2: "max 100000" or "150000 100000" */
    if (read_line(path, line, sizeof line)) {
        if (sscanf(line, "%lf %lf", &quota, &period) != 2) return 0;
    } else { /* v1 */
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", directory);
        if (read_line(path, line, sizeof line)) quota = atof(line);
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", directory);
        if (read_line(path, line, sizeof line)) period = atof(line);
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

static double smaller_quota(double a, double b) { return a > 0 && (b <= 0 || a < b) ? a : b; }

/* The tightest limit on the way from our cgroup up to its root; 0: none. */
static double cgroup_quota(void) {
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return 0;
    double best = 0;
    char line[512];
    while (fgets(line, sizeof line, f)) { /* "0::/a/b" (v2) or "4:cpu,cpuacct:/a/b" (v1) */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':');
        char *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        controllers++;
        int v1 = strstr(controllers, "cpu") && strncmp(controllers, "cpuset", 6);
        if (*controllers && !v1) continue;
        for (;;) {
            char directory[560];
            snprintf(directory, sizeof directory, "/sys/fs/cgroup%s%s", v1 ? "/cpu" : "", strcmp(group, "/") ? group : "");
            best = smaller_quota(quota_in(directory), best);
            char *slash = strrchr(group, '/');
            if (!slash || !*group) break;
            *slash = 0;
        }
    }
    fclose(f);
    return best;
}

int en_default_threads(void) {
    int n = physical_cores();
    double quota = cgroup_quota();
    if (quota > 0 && quota < n) n = quota < 1 ? 1 : (int)quota;
    return n;
}
