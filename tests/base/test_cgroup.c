#include <criterion/criterion.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/memory.h"

#define NONE UINT64_MAX

static char root[64];

static void setup(void)
{
    const char *temp = getenv("TMPDIR");
    snprintf(root, sizeof root, "%.40s/slu-test-XXXXXX", temp ? temp : "/tmp");
    cr_assert_not_null(mkdtemp(root));
}

static int remove_one(const char *path, const struct stat *stat, int type, struct FTW *ftw)
{
    (void)stat, (void)type, (void)ftw;
    return remove(path);
}

static void teardown(void)
{
    cr_assert_eq(nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS), 0);
}

TestSuite(memory, .init = setup, .fini = teardown);

/* A file of what the kernel shows, and the folders that it is in. */
static void put(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", root, name);
    for (char *at = path + strlen(root) + 1; (at = strchr(at, '/')) != NULL; at++) {
        *at = '\0';
        mkdir(path, 0700);
        *at = '/';
    }
    FILE *file = fopen(path, "w");
    cr_assert_not_null(file, "%s", path);
    fputs(text, file);
    fclose(file);
}

static uint64_t limit(void)
{
    return slu_memory_group_limit(root);
}

/* Version 2: the least of the group's own and of those around it, which bound it as well. */
Test(memory, groups_of_version_2)
{
    cr_expect_eq(limit(), NONE, "no groups at all");
    put("proc/self/cgroup", "0::/user.slice/app.scope\n");
    cr_expect_eq(limit(), NONE, "a kernel without the memory controller");
    put("sys/fs/cgroup/user.slice/app.scope/memory.max", "max\n");
    put("sys/fs/cgroup/user.slice/memory.max", "5000000000\n");
    cr_expect_eq(limit(), 5000000000);
    put("sys/fs/cgroup/user.slice/app.scope/memory.high", "4294967296\n");
    cr_expect_eq(limit(), 4294967296);
    put("sys/fs/cgroup/user.slice/app.scope/memory.max", "1073741824\n");
    cr_expect_eq(limit(), 1073741824);
    put("sys/fs/cgroup/user.slice/other.scope/memory.max", "4096\n");
    cr_expect_eq(limit(), 1073741824, "another's");
}

/* Version 1, the memory controller being one of many, beside version 2 without it. */
Test(memory, groups_of_version_1)
{
    put("proc/self/cgroup", "12:cpu,cpuacct:/a\n4:hugetlb,memory:/a/b\n1:name=memory:/c\n0::/\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2147483648\n");
    put("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "4096\n");
    cr_expect_eq(limit(), 2147483648);
}

/* A container that is told its path from outside, and sees its own group as the mount. */
Test(memory, groups_seen_from_inside)
{
    put("proc/self/cgroup", "7:memory:/docker/0123\n0::/docker/0123\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "3221225472\n");
    cr_expect_eq(limit(), 3221225472);
    put("sys/fs/cgroup/memory.max", "1610612736\n");
    cr_expect_eq(limit(), 1610612736);
}

/* What can't be understood is no limit. */
Test(memory, groups_that_make_no_sense)
{
    put("proc/self/cgroup", "\n:\n4:memory\nmemory\n4:memory:\n0::\n4:memory:relative\n");
    put("sys/fs/cgroup/memory.max", "");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "many\n");
    cr_expect_eq(limit(), NONE);
}

/* Never more than the machine has. */
Test(memory, is_what_the_machine_has_at_most)
{
    uint64_t machine = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t group = slu_memory_group_limit("");
    cr_expect_eq(slu_memory_bytes(), group < machine ? group : machine);
}
