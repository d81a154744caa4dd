/*
 * The asynchronous reader: many reads of one file in flight at once, straight from the device.
 * Two back ends behind one interface: io_uring with registered file and buffers, and a few threads
 * that pread, for kernels and platforms where io_uring is absent or must not even be probed.
 * Direct reads where the file system grants them, else buffered ones, dropped from the page cache
 * as they are used; which it is can be asked.
 *
 * Thread safety: submit from any thread; wait from one thread at a time (another than the
 * submitters' is fine).
 */
#ifndef SLU_IO_RING_H
#define SLU_IO_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

#define SLU_IO_ALIGN 4096u

enum slu_io_backend {
    SLU_IO_AUTO, /* io_uring if built in and the kernel has it, else pread */
    SLU_IO_URING,
    SLU_IO_PREAD, /* never asks the kernel about io_uring */
};

struct slu_read {
    void *buffer;    /* aligned to SLU_IO_ALIGN */
    uint64_t offset; /* likewise */
    uint32_t bytes;  /* likewise; reads past the end of the file are an error */
    uint64_t tag;    /* comes back with the completion */
    bool is_fresh;   /* the buffer's memory was never used: the system provides it first, which it
                        may do on threads of its own instead of in submit */
};

struct slu_read_done {
    uint64_t tag;
    int result; /* 0, or SLU_EIO */
};

struct slu_ring {
    /* Queues a read; at most `depth` (as created) may be in flight. Short reads are resumed
     * inside. 0 or a negative error, in which case the read was not taken. */
    int (*submit)(struct slu_ring *ring, const struct slu_read *read, struct slu_err *err);
    /* Takes up to n_max completions; blocks until there is at least one unless !block. With none
     * in flight returns 0. */
    int (*wait)(struct slu_ring *ring, struct slu_read_done *ret_done, unsigned n_max, bool block);
    void (*destroy)(struct slu_ring *ring); /* waits for what is in flight */
    const char *backend;                    /* "io_uring" or "pread" */
    bool is_direct;                         /* O_DIRECT was granted */
    bool is_registered;                     /* buffers are registered */
};

/* A range that reads will be made into: registering it saves the kernel work for each read. A
 * failure to register is not an error. */
struct slu_io_range {
    void *start;
    size_t bytes;
};

struct slu_ring_params {
    enum slu_io_backend backend;
    unsigned depth;                    /* reads in flight at most; 0 means 64, at most 1024 */
    unsigned n_threads;                /* pread back end; 0 means 4 */
    const struct slu_io_range *ranges; /* n_ranges of them; may be NULL */
    unsigned n_ranges;
    bool is_buffered; /* don't even try direct reads */
};

/* Opens the file anew for itself. SLU_ENOENT, SLU_EIO; SLU_EUNSUP if io_uring was asked for by
 * name and this build or kernel lacks it. */
int slu_ring_open(const char *path, const struct slu_ring_params *params,
                  struct slu_ring **ret_ring, struct slu_err *err);
void slu_ring_destroy(struct slu_ring *ring); /* NULL is fine */

/* Memory that a ring takes for itself, for the ledger. */
size_t slu_ring_bytes(const struct slu_ring_params *params);

#endif
