#include "model/sums.h"

#include <assert.h>
#include <sched.h>
#include <string.h>

#include "kern/block.h"

static double *rows_of(const struct slu_sums *sums, unsigned thread)
{
    return sums->rows + (size_t)thread * slu_sums_apart(sums->chunk) * sums->n_embd;
}

void slu_sums_clear(const struct slu_sums *sums, unsigned thread, uint32_t n, uint32_t lo,
                    uint32_t hi)
{
    double *rows = rows_of(sums, thread) + (size_t)lo * sums->n_embd;
    memset(rows, 0, (size_t)(hi - lo) * sums->n_embd * sizeof *rows);
    for (uint32_t t = lo; t < hi && slu_sums_shared(n); t++) {
        atomic_flag_clear_explicit(&sums->are_taken[t], memory_order_relaxed);
    }
}

/* Those that nobody else is at, and of the others again, until there are none. */
static void add_shared(const struct slu_sums *sums, const struct slu_kern *kern,
                       const uint32_t *tok, const float *weight, const float *x, uint32_t some)
{
    uint32_t left[SLU_BLOCK_TOKENS], n_left = some;
    for (uint32_t i = 0; i < some; i++) {
        left[i] = i;
    }
    while (n_left > 0) {
        uint32_t n_taken = 0;
        for (uint32_t j = 0; j < n_left; j++) {
            uint32_t i = left[j];
            atomic_flag *is_taken = &sums->are_taken[tok[i]];
            if (atomic_flag_test_and_set_explicit(is_taken, memory_order_acquire)) {
                left[n_taken++] = i;
                continue;
            }
            kern->add_grid(sums->rows + (size_t)tok[i] * sums->n_embd, weight[i],
                           x + (size_t)i * sums->n_embd, sums->n_embd);
            atomic_flag_clear_explicit(is_taken, memory_order_release);
        }
        if (n_taken == n_left) { /* its owner may have lost its processor */
            sched_yield();
        }
        n_left = n_taken;
    }
}

void slu_sums_add(const struct slu_sums *sums, const struct slu_kern *kern, unsigned thread,
                  uint32_t n, const uint32_t *tok, const float *weight, const float *x,
                  uint32_t some)
{
    assert(n <= sums->chunk && some <= SLU_BLOCK_TOKENS);
    if (slu_sums_shared(n)) {
        add_shared(sums, kern, tok, weight, x, some);
        return;
    }
    double *rows = rows_of(sums, thread);
    for (uint32_t i = 0; i < some; i++) {
        kern->add_grid(rows + (size_t)tok[i] * sums->n_embd, weight[i],
                       x + (size_t)i * sums->n_embd, sums->n_embd);
    }
}

void slu_sums_take(const struct slu_sums *sums, uint32_t n, float *y, size_t lo, size_t hi)
{
    unsigned n_threads = slu_sums_shared(n) ? 1 : sums->n_threads;
    for (size_t i = lo; i < hi; i++) {
        double sum = 0;
        for (unsigned thread = 0; thread < n_threads; thread++) {
            sum += rows_of(sums, thread)[i];
        }
        y[i] = (float)sum;
    }
}
