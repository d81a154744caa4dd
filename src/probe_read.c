#include <stdatomic.h>
#include <unistd.h>

#include "base/clock.h"
#include "kern/peak.h"
#include "probe.h"

#define RAM_BYTES_MIN ((size_t)64 << 20)
#define RAM_BYTES_MAX ((size_t)512 << 20)

/* Sixteen times the last cache, within bounds. */
size_t slu_probe_ram_bytes(void)
{
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t bytes = cache > 0 ? 16 * (size_t)cache : RAM_BYTES_MIN;
    return bytes > RAM_BYTES_MAX ? RAM_BYTES_MAX : bytes;
}

struct pass {
    const char *kernels;
    const uint8_t *data;
    size_t bytes;
    unsigned n_streams;
    _Atomic size_t next;  /* byte to read; relaxed: only hands out places */
    _Atomic uint64_t sum; /* so that reads can't be left out */
};

static void read_share(void *arg, unsigned thread, unsigned n_threads)
{
    struct pass *pass = arg;
    uint64_t sum = 0;
    (void)thread;
    (void)n_threads;
    for (;;) {
        size_t at = atomic_fetch_add_explicit(&pass->next, SLU_PROBE_GRAIN, memory_order_relaxed);
        if (at >= pass->bytes) {
            break;
        }
        sum ^= slu_peak_read(pass->kernels, pass->data + at, SLU_PROBE_GRAIN, pass->n_streams);
    }
    atomic_fetch_xor_explicit(&pass->sum, sum, memory_order_relaxed);
}

uint64_t slu_probe_read(struct slu_pool *pool, const char *kernels, const void *data, size_t bytes,
                        unsigned n_streams)
{
    struct pass pass = {.kernels = kernels, .data = data, .bytes = bytes, .n_streams = n_streams};
    slu_pool_enter(pool);
    uint64_t start_ns = slu_now_ns();
    slu_pool_run(pool, read_share, &pass);
    uint64_t ns = slu_now_ns() - start_ns;
    slu_pool_leave(pool);
    return ns;
}
