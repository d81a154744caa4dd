#include <criterion/criterion.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/cgroup.h"

static char root[256];

static void setup(void)
{
    const char *temp = getenv("TMPDIR");
    int n = snprintf(root, sizeof root, "%s/slu-test-XXXXXX", temp ? temp : "/tmp");
    cr_assert_lt((size_t)n, sizeof root);
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

TestSuite(cgroup, .init = setup, .fini = teardown);

/* A file of what the kernel shows, and the folders that it is in. */
static void put(const char *name, const char *text)
{
    char path[512];
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

static uint64_t memory(void)
{
    return slu_cgroup_memory_bytes(root);
}

static uint64_t machine(void)
{
    return (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Version 2: the least of the group's own and of those around it, which bound it as well. */
Test(cgroup, memory_of_version_2)
{
    cr_expect_eq(memory(), machine(), "no groups at all");
    put("proc/self/cgroup", "0::/user.slice/app.scope\n");
    cr_expect_eq(memory(), machine(), "a kernel without the memory controller");
    put("sys/fs/cgroup/user.slice/app.scope/memory.max", "max\n");
    put("sys/fs/cgroup/user.slice/memory.max", "5000000\n");
    cr_expect_eq(memory(), 5000000);
    put("sys/fs/cgroup/user.slice/app.scope/memory.high", "4194304\n");
    cr_expect_eq(memory(), 4194304);
    put("sys/fs/cgroup/user.slice/app.scope/memory.max", "1048576\n");
    cr_expect_eq(memory(), 1048576);
    put("sys/fs/cgroup/user.slice/other.scope/memory.max", "4096\n");
    cr_expect_eq(memory(), 1048576, "another's");
}

/* Version 1, the memory controller being one of many, beside version 2 without it. */
Test(cgroup, memory_of_version_1)
{
    put("proc/self/cgroup", "12:cpu,cpuacct:/a\n4:hugetlb,memory:/a/b\n1:name=memory:/c\n0::/\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n");
    put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2097152\n");
    put("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "4096\n");
    cr_expect_eq(memory(), 2097152);
}

/* A container that is told its path from outside, and sees its own group as the mount. */
Test(cgroup, memory_seen_from_inside)
{
    put("proc/self/cgroup", "7:memory:/docker/0123\n0::/docker/0123\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "3145728\n");
    cr_expect_eq(memory(), 3145728);
    put("sys/fs/cgroup/memory.max", "1572864\n");
    cr_expect_eq(memory(), 1572864);
}

/* Version 2's memory beside other controllers of version 1. */
Test(cgroup, memory_of_hybrid_hierarchies)
{
    put("proc/self/cgroup", "2:cpu:/a\n0::/a\n");
    put("sys/fs/cgroup/unified/a/memory.max", "2097152\n");
    cr_expect_eq(memory(), 2097152);
}

/* What can't be understood is no limit, nor is nothing, nor more than there is. */
Test(cgroup, memory_that_makes_no_sense)
{
    put("proc/self/cgroup", "\n:\n4:memory\nmemory\n4:memory:\n0::\n4:memory:relative\n");
    put("sys/fs/cgroup/memory.max", "");
    put("sys/fs/cgroup/memory.high", "0\n");
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "many\n");
    cr_expect_eq(memory(), machine());
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "-1\n");
    cr_expect_eq(memory(), machine());
    put("sys/fs/cgroup/memory.max", "4000000000000000000\n");
    cr_expect_eq(memory(), machine());
}

/* A path longer than any that can be opened is passed over, its neighbours in the list aren't. */
Test(cgroup, memory_of_long_paths)
{
    char lines[9000] = "3:memory:/";
    size_t n = strlen(lines);
    memset(lines + n, 'x', sizeof lines - 100 - n);
    strcat(lines, "\n2:memory:/a\n");
    put("proc/self/cgroup", lines);
    put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "2097152\n");
    cr_expect_eq(memory(), 2097152);
}

Test(cgroup, cpus_of_version_2)
{
    cr_expect_eq(slu_cgroup_cpus(root), UINT64_MAX);
    put("proc/self/cgroup", "0::/a/b\n");
    put("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    cr_expect_eq(slu_cgroup_cpus(root), UINT64_MAX);
    put("sys/fs/cgroup/a/cpu.max", "400000 100000\n");
    cr_expect_eq(slu_cgroup_cpus(root), 4);
    put("sys/fs/cgroup/a/b/cpu.max", "150000 100000\n");
    cr_expect_eq(slu_cgroup_cpus(root), 2, "rounded up");
    put("sys/fs/cgroup/a/b/cpu.max", "1000 100000\n");
    cr_expect_eq(slu_cgroup_cpus(root), 1);
    put("sys/fs/cgroup/a/b/cpu.max", "1000 0\n");
    cr_expect_eq(slu_cgroup_cpus(root), 4, "no period");
}

Test(cgroup, cpus_of_version_1)
{
    put("proc/self/cgroup", "5:cpuset:/c\n4:cpu,cpuacct:/a\n");
    put("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n");
    put("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "-1\n");
    cr_expect_eq(slu_cgroup_cpus(root), UINT64_MAX);
    put("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "300000\n");
    cr_expect_eq(slu_cgroup_cpus(root), 3);
    put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "50000\n");
    put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "100000\n");
    cr_expect_eq(slu_cgroup_cpus(root), 2);
}
