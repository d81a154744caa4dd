#include "experts/slots.h"

#include "io/ring.h"

#define BYTES_MAX ((size_t)PTRDIFF_MAX / 4)

size_t slu_slots_round(size_t bytes)
{
    return (bytes < BYTES_MAX ? bytes + SLU_IO_ALIGN - 1 : BYTES_MAX) / SLU_IO_ALIGN * SLU_IO_ALIGN;
}

size_t slu_slots_bytes(const struct slu_slots *slots, uint32_t lo, uint32_t hi)
{
    uint32_t n_small = slu_slots_small(slots, hi) - slu_slots_small(slots, lo);
    size_t large, small, sum;
    if (__builtin_mul_overflow(slots->large, hi - lo - n_small, &large) ||
        __builtin_mul_overflow(slots->small, n_small, &small) ||
        __builtin_add_overflow(large, small, &sum) || sum > BYTES_MAX) {
        return BYTES_MAX;
    }
    return sum;
}

uint32_t slu_slots_fit(const struct slu_slots *slots, uint32_t lo, uint64_t bytes, uint32_t n_max)
{
    uint32_t n = 0;
    while (n < n_max) {
        uint32_t more = n_max - n - (n_max - n) / 2;
        if (slu_slots_bytes(slots, lo, lo + n + more) <= bytes) {
            n += more;
        } else {
            n_max = n + more - 1;
        }
    }
    return n;
}
