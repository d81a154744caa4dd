#include "base/cgroup.h"

#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Version 1 tells that there is no limit by a number as large as can be. */
#define NO_LIMIT ((uint64_t)1 << 62)

/* A controller of a hierarchy. */
struct control {
    const char *mount;
    const char *controller;               /* NULL: version 2, which has them all */
    uint64_t (*read)(const char *folder); /* the limit of the group there; UINT64_MAX: none */
};

/* The file's first n numbers; false where there is no such file, or a word in it ("max"). */
static bool read_numbers(const char *folder, const char *name, uint64_t *ret, unsigned n)
{
    char path[PATH_MAX];
    int len = snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = len > 0 && (size_t)len < sizeof path ? fopen(path, "r") : NULL;
    unsigned n_read = 0;
    while (file && n_read < n && fscanf(file, "%" SCNu64, &ret[n_read]) == 1) {
        n_read++;
    }
    if (file) {
        fclose(file);
    }
    return n_read == n;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint64_t read_bytes(const char *folder, const char *name)
{
    uint64_t bytes;
    return read_numbers(folder, name, &bytes, 1) && bytes > 0 && bytes < NO_LIMIT ? bytes
                                                                                  : UINT64_MAX;
}

static uint64_t read_memory_v1(const char *folder)
{
    return read_bytes(folder, "memory.limit_in_bytes");
}

static uint64_t read_memory_v2(const char *folder)
{
    return least(read_bytes(folder, "memory.max"), read_bytes(folder, "memory.high"));
}

static uint64_t cpus_of(uint64_t quota, uint64_t period)
{
    return period > 0 && quota > 0 && quota < NO_LIMIT ? quota / period + (quota % period != 0)
                                                       : UINT64_MAX;
}

static uint64_t read_cpus_v1(const char *folder)
{
    uint64_t quota, period; /* a quota of -1, which reads as a large number, is none */
    return read_numbers(folder, "cpu.cfs_quota_us", &quota, 1) &&
                   read_numbers(folder, "cpu.cfs_period_us", &period, 1)
               ? cpus_of(quota, period)
               : UINT64_MAX;
}

static uint64_t read_cpus_v2(const char *folder)
{
    uint64_t numbers[2]; /* quota and period */
    return read_numbers(folder, "cpu.max", numbers, 2) ? cpus_of(numbers[0], numbers[1])
                                                       : UINT64_MAX;
}

/* The least limit of `group` and those around it, up to the hierarchy's mount. A container may see
 * its own group as the mount while its path is still told from outside: folders that aren't there
 * are passed over. */
static uint64_t least_around(const struct control *control, const char *root, const char *group)
{
    char folder[PATH_MAX];
    int n_mount = snprintf(folder, sizeof folder, "%s%s", root, control->mount);
    int n = snprintf(folder, sizeof folder, "%s%s%s", root, control->mount, group);
    if (n < 0 || (size_t)n >= sizeof folder) {
        return UINT64_MAX;
    }
    uint64_t limit = control->read(folder);
    while (n > n_mount) {
        n--;
        if (folder[n] == '/') {
            folder[n] = '\0';
            limit = least(limit, control->read(folder));
        }
    }
    return limit;
}

static bool is_listed(const char *list, const char *name)
{
    size_t len = strlen(name);
    for (const char *at = list; (at = strstr(at, name)) != NULL; at += len) {
        if ((at == list || at[-1] == ',') && (at[len] == ',' || at[len] == '\0')) {
            return true;
        }
    }
    return false;
}

/* The least that the controls tell of the groups that this process is in: lines
 * "number:controllers:group", of which version 2's names no controllers. */
static uint64_t find_limit(const char *root, const struct control *controls, size_t n_controls)
{
    char path[PATH_MAX], *line = NULL;
    size_t size = 0;
    uint64_t limit = UINT64_MAX;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && getline(&line, &size, file) >= 0) {
        line[strcspn(line, "\n")] = '\0';
        char *list = strchr(line, ':'), *group = list ? strchr(list + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        list++;
        *group++ = '\0';
        for (size_t i = 0; i < n_controls; i++) {
            const char *controller = controls[i].controller;
            if (controller ? is_listed(list, controller) : *list == '\0') {
                limit = least(limit, least_around(&controls[i], root, group));
            }
        }
    }
    free(line);
    if (file) {
        fclose(file);
    }
    return limit;
}

uint64_t slu_cgroup_memory_bytes(const char *root)
{
    static const struct control controls[] = {
        {"/sys/fs/cgroup", NULL, read_memory_v2},
        {"/sys/fs/cgroup/unified", NULL, read_memory_v2},
        {"/sys/fs/cgroup/memory", "memory", read_memory_v1},
    };
    uint64_t limit = find_limit(root, controls, sizeof controls / sizeof *controls);
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    if (pages > 0 && page > 0) {
        return least(limit, (uint64_t)pages * (uint64_t)page);
    }
    return limit < UINT64_MAX ? limit : 0;
}

uint64_t slu_cgroup_cpus(const char *root)
{
    static const struct control controls[] = {
        {"/sys/fs/cgroup", NULL, read_cpus_v2},
        {"/sys/fs/cgroup/unified", NULL, read_cpus_v2},
        {"/sys/fs/cgroup/cpu", "cpu", read_cpus_v1},
        {"/sys/fs/cgroup/cpu,cpuacct", "cpu", read_cpus_v1},
    };
    return find_limit(root, controls, sizeof controls / sizeof *controls);
}
