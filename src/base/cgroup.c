#include "base/memory.h"

#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The number in a file; UINT64_MAX where there is no such file, or a word in it ("max"). */
static uint64_t read_number(const char *path)
{
    uint64_t value = UINT64_MAX;
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%" SCNu64, &value) != 1) {
            value = UINT64_MAX;
        }
        fclose(file);
    }
    return value;
}

/* The least number in the files of that name in `group` and those around it, up to the hierarchy's
 * mount. A container may see its own group as the mount while its path is still told from outside:
 * folders that aren't there are passed over. `group` is cut down to nothing. */
static uint64_t least_around(const char *mount, char *group, const char *file)
{
    uint64_t least = UINT64_MAX;
    for (;;) {
        char path[PATH_MAX];
        int n = snprintf(path, sizeof path, "%s%s/%s", mount, group, file);
        uint64_t value = n > 0 && (size_t)n < sizeof path ? read_number(path) : UINT64_MAX;
        least = value < least ? value : least;
        char *last = strrchr(group, '/');
        if (!last) {
            return least;
        }
        *last = '\0';
    }
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

/* Of a line "number:controllers:group" of /proc/self/cgroup, which is changed. Version 2 names no
 * controllers. */
static uint64_t limit_of(const char *root, char *line)
{
    static const struct {
        const char *mount, *file;
        bool is_v2;
    } limits[] = {
        {"/sys/fs/cgroup", "memory.max", true},
        {"/sys/fs/cgroup", "memory.high", true},
        {"/sys/fs/cgroup/memory", "memory.limit_in_bytes", false},
    };
    line[strcspn(line, "\n")] = '\0';
    char *controllers = strchr(line, ':'),
         *group = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!group) {
        return UINT64_MAX;
    }
    *group++ = '\0';
    controllers++;
    uint64_t least = UINT64_MAX;
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        if (limits[i].is_v2 ? *controllers == '\0' : is_listed(controllers, "memory")) {
            char mount[PATH_MAX], path[PATH_MAX];
            snprintf(mount, sizeof mount, "%s%s", root, limits[i].mount);
            snprintf(path, sizeof path, "%s", group);
            uint64_t limit = least_around(mount, path, limits[i].file);
            least = limit < least ? limit : least;
        }
    }
    return least;
}

uint64_t slu_memory_group_limit(const char *root)
{
    uint64_t least = UINT64_MAX;
    char path[PATH_MAX], *line = NULL;
    size_t size = 0;
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "r");
    while (file && getline(&line, &size, file) >= 0) {
        uint64_t limit = limit_of(root, line);
        least = limit < least ? limit : least;
    }
    free(line);
    if (file) {
        fclose(file);
    }
    return least;
}

uint64_t slu_memory_bytes(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    uint64_t machine = pages > 0 && page > 0 ? (uint64_t)pages * (uint64_t)page : 0;
    uint64_t limit = slu_memory_group_limit("");
    return machine && machine < limit ? machine : limit < UINT64_MAX ? limit : 0;
}
