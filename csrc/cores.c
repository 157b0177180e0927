/* How many threads kernels use unless told: physical cores that this process may run on, within its cgroup's quota. */
#define _GNU_SOURCE
#include "entrenar.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    char siblings[EN_MAX_THREADS][64]; /* 16 KiB of our own: two threads may ask at once */
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
            snprintf(directory, sizeof directory, "/sys/fs/cgroup%s%s", v1 ? "/cpu" : "",
                     strcmp(group, "/") ? group : "");
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
