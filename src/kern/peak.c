#include "kern/peak.h"

#include <string.h>

typedef uint64_t words __attribute__((vector_size(16)));

/* Everywhere; a compiler's vectors of 16 bytes. */
static uint64_t read_plain(const char *at, size_t part_bytes, unsigned n_streams)
{
    words sums[4] = {{0}};
    for (size_t i = 0; i < part_bytes; i += 64) {
        for (unsigned s = 0; s < n_streams; s++) {
            const words *from = (const words *)(const void *)(at + s * part_bytes + i);
            for (int k = 0; k < 4; k++) {
                sums[k] ^= from[k];
            }
        }
    }
    words sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    return sum[0] ^ sum[1];
}

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) static uint64_t read_avx2(const char *at, size_t part_bytes,
                                                          unsigned n_streams)
{
    __m256i sums[4];
    memset(sums, 0, sizeof sums);
    for (size_t i = 0; i < part_bytes; i += 128) {
        for (unsigned s = 0; s < n_streams; s++) {
            const __m256i *from = (const __m256i *)(const void *)(at + s * part_bytes + i);
            for (int k = 0; k < 4; k++) {
                sums[k] = _mm256_xor_si256(sums[k], _mm256_load_si256(from + k));
            }
        }
    }
    uint64_t sum[4];
    memcpy(sum, sums, sizeof sum);
    for (int k = 1; k < 4; k++) {
        uint64_t more[4];
        memcpy(more, &sums[k], sizeof more);
        sum[0] ^= more[0] ^ more[1] ^ more[2] ^ more[3];
    }
    return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

uint64_t slu_peak_read(const char *kernels, const void *data, size_t bytes, unsigned n_streams)
{
    return strncmp(kernels, "avx", 3) == 0 ? read_avx2(data, bytes / n_streams, n_streams)
                                           : read_plain(data, bytes / n_streams, n_streams);
}

#else

uint64_t slu_peak_read(const char *kernels, const void *data, size_t bytes, unsigned n_streams)
{
    (void)kernels;
    return read_plain(data, bytes / n_streams, n_streams);
}
#endif
