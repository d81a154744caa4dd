/*
 * How much memory there is for this process.
 *
 * Thread safety: all functions may be called from any thread.
 */
#ifndef SLU_BASE_MEMORY_H
#define SLU_BASE_MEMORY_H

#include <stdint.h>

/* Bytes that the machine has, or that the control groups (cgroups, of either version) of this
 * process may use where that is less, as in a container. 0: not known. */
uint64_t slu_memory_bytes(void);

/* What control groups allow, where /proc and /sys are found under `root`: "" but for tests.
 * UINT64_MAX: there is no limit, or none that can be read. Source: cgroups(7) and the kernel's
 * admin guide, "Control Group v2" and "Memory Resource Controller". */
uint64_t slu_memory_group_limit(const char *root);

#endif
