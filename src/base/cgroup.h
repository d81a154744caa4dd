/*
 * What control groups (cgroups, of either version) leave to this process: in a container or a
 * service that is often less than the machine has. Source: cgroups(7), and in the kernel's admin
 * guide "Control Group v2", "Memory Resource Controller" and "CFS Bandwidth Control".
 *
 * /proc and /sys are looked for under `root`: "" but for tests. Thread safety: all functions may be
 * called from any thread.
 */
#ifndef SLU_BASE_CGROUP_H
#define SLU_BASE_CGROUP_H

#include <stdint.h>

/* Bytes of memory that the machine has, or that the groups let this process use without slowing it
 * down (memory.high) or killing it, where that is less. 0: not known. */
uint64_t slu_cgroup_memory_bytes(const char *root);

/* CPUs whose time the groups give to this process in all, rounded up; UINT64_MAX: no limit. */
uint64_t slu_cgroup_cpus(const char *root);

#endif
