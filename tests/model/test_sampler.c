#include <criterion/criterion.h>

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sampler.h"

#define DRAWS 20000

static struct slu_sampler *sampler_of(uint32_t n_vocab, const struct slu_sampling *sampling)
{
    struct slu_sampler *sampler;
    struct slu_err err;
    cr_assert_eq(slu_sampler_create(n_vocab, &sampler, &err), 0);
    slu_sampler_start(sampler, sampling);
    return sampler;
}

static int32_t next_once(const float *logits, uint32_t n, const struct slu_sampling *sampling,
                         const int32_t *recent, size_t n_recent)
{
    struct slu_sampler *sampler = sampler_of(n, sampling);
    int32_t id = slu_sampler_next(sampler, logits, recent, n_recent);
    slu_sampler_destroy(sampler);
    return id;
}

/* How often each of n ids comes in DRAWS draws. */
static void count_draws(const float *logits, uint32_t n, const struct slu_sampling *sampling,
                        unsigned *counts)
{
    struct slu_sampler *sampler = sampler_of(n, sampling);
    memset(counts, 0, n * sizeof *counts);
    for (int i = 0; i < DRAWS; i++) {
        int32_t id = slu_sampler_next(sampler, logits, NULL, 0);
        cr_assert(id >= 0 && (uint32_t)id < n);
        counts[id]++;
    }
    slu_sampler_destroy(sampler);
}

/* Expects counts to follow the weights: five standard deviations at the most. */
static void expect_shares(const unsigned *counts, const double *weights, uint32_t n)
{
    double total = 0;
    for (uint32_t i = 0; i < n; i++) {
        total += weights[i];
    }
    for (uint32_t i = 0; i < n; i++) {
        double p = weights[i] / total;
        double sigma = sqrt(DRAWS * p * (1 - p));
        cr_expect(fabs(counts[i] - DRAWS * p) <= 5 * sigma, "id %u: %u draws, expected %.0f", i,
                  counts[i], DRAWS * p);
    }
}

/* Greedy takes the largest logit, the lower id of equals, and treats both zeros as one. */
Test(sampler, greedy)
{
    struct slu_sampling greedy = {0};
    cr_expect_eq(next_once((float[]){1, 3, 2, 3}, 4, &greedy, NULL, 0), 1);
    cr_expect_eq(next_once((float[]){-5, -0.0f, 0.0f}, 3, &greedy, NULL, 0), 1);
    cr_expect_eq(next_once((float[]){-INFINITY, -INFINITY}, 2, &greedy, NULL, 0), 0);
    cr_expect_eq(next_once((float[]){0, INFINITY, FLT_MAX}, 3, &greedy, NULL, 0), 1);
}

/* A NaN is never chosen, wherever it stands; with nothing else there is an error. */
Test(sampler, nan_never_chosen)
{
    float logits[] = {NAN, 1, NAN, -INFINITY, NAN};
    struct slu_sampling ways[] = {
        {0},
        {.temperature = 1},
        {.temperature = 1, .top_k = 2},
        {.temperature = 1, .top_p = 0.9f},
        {.temperature = 1, .min_p = 0.1f},
    };
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        cr_expect_eq(next_once(logits, 5, &ways[i], NULL, 0), 1, "way %zu", i);
        cr_expect_eq(next_once((float[]){NAN, -NAN}, 2, &ways[i], NULL, 0), SLU_ERANGE);
    }
}

/* Draws follow the softmax of the logits, and of the logits over the temperature. */
Test(sampler, follows_distribution)
{
    float logits[] = {0, 1, 2, -1, 1.5f};
    unsigned counts[5];
    double weights[5];
    for (int k = 0; k < 3; k++) {
        float temperature = (float[]){1, 0.5f, 3}[k];
        for (int i = 0; i < 5; i++) {
            weights[i] = exp(logits[i] / temperature);
        }
        count_draws(logits, 5, &(struct slu_sampling){.temperature = temperature, .seed = 7},
                    counts);
        expect_shares(counts, weights, 5);
    }
}

/* top-k leaves exactly k, equals by the lower id, and keeps their proportions. */
Test(sampler, top_k)
{
    float logits[] = {1, 2, 1, 3, 1, 0};
    unsigned counts[6];
    count_draws(logits, 6, &(struct slu_sampling){.temperature = 1, .top_k = 3}, counts);
    expect_shares(counts, (double[]){exp(1), exp(2), 0, exp(3), 0, 0}, 6);
    count_draws(logits, 6, &(struct slu_sampling){.temperature = 1, .top_k = 1}, counts);
    cr_expect_eq(counts[3], DRAWS);
    count_draws(logits, 6, &(struct slu_sampling){.temperature = 1, .top_k = 100}, counts);
    cr_expect(counts[5] > 0);
}

/* top-p leaves the fewest tokens that hold p together, measured before the temperature. */
Test(sampler, top_p)
{
    float logits[] = {logf(0.1f), logf(0.4f), logf(0.3f), logf(0.2f)};
    unsigned counts[4];
    count_draws(logits, 4, &(struct slu_sampling){.temperature = 1, .top_p = 0.6f}, counts);
    expect_shares(counts, (double[]){0, 0.4, 0.3, 0}, 4);
    count_draws(logits, 4, &(struct slu_sampling){.temperature = 5, .top_p = 0.8f}, counts);
    cr_expect(counts[3] > 0);
    cr_expect_eq(counts[0], 0);
    count_draws(logits, 4, &(struct slu_sampling){.temperature = 1, .top_p = 0.01f}, counts);
    cr_expect_eq(counts[1], DRAWS);
}

/* min-p leaves what is at least that part as likely as the likeliest. */
Test(sampler, min_p)
{
    float logits[] = {logf(0.1f), logf(0.5f), logf(0.26f), logf(0.14f)};
    unsigned counts[4];
    count_draws(logits, 4, &(struct slu_sampling){.temperature = 1, .min_p = 0.5f}, counts);
    expect_shares(counts, (double[]){0, 0.5, 0.26, 0}, 4);
    count_draws(logits, 4, &(struct slu_sampling){.temperature = 9, .min_p = 2}, counts);
    cr_expect_eq(counts[1], DRAWS);
}

/* The penalty turns positive and negative logits down, once however often an id occurs, within the
 * window only, and forgets them afterwards. */
Test(sampler, repeat_penalty)
{
    struct slu_sampling sampling = {.repeat_penalty = 2};
    int32_t recent[] = {1, 1, 1, -7, 99};
    cr_expect_eq(next_once((float[]){3, 5, 1}, 3, &sampling, recent, 5), 0);
    cr_expect_eq(next_once((float[]){2, 5, 1}, 3, &sampling, recent, 5), 1);
    cr_expect_eq(next_once((float[]){-1.5f, -1}, 2, &sampling, recent, 5), 0);
    sampling.repeat_window = 2;
    cr_expect_eq(next_once((float[]){3, 5, 1}, 3, &sampling, recent, 5), 1);

    sampling.repeat_window = 0;
    struct slu_sampler *sampler = sampler_of(2, &sampling);
    cr_expect_eq(slu_sampler_next(sampler, (float[]){3, 5}, recent, 3), 0);
    cr_expect_eq(slu_sampler_next(sampler, (float[]){3, 5}, NULL, 0), 1);
    slu_sampler_destroy(sampler);
}

/* One seed gives one sequence, fixed for all machines; another seed another. */
Test(sampler, seed_decides)
{
    float logits[100] = {0};
    struct slu_sampling sampling = {.temperature = 1, .seed = 42};
    struct slu_sampler *a = sampler_of(100, &sampling);
    struct slu_sampler *b = sampler_of(100, &sampling);
    sampling.seed = 43;
    struct slu_sampler *c = sampler_of(100, &sampling);
    int n_differ = 0;
    int32_t first[5];
    for (int i = 0; i < 50; i++) {
        int32_t id = slu_sampler_next(a, logits, NULL, 0);
        cr_assert_eq(id, slu_sampler_next(b, logits, NULL, 0));
        n_differ += id != slu_sampler_next(c, logits, NULL, 0);
        if (i < 5) {
            first[i] = id;
        }
    }
    cr_expect(n_differ > 25);
    /* The first outputs of xoshiro256** seeded by splitmix64(42), as hundredths. */
    int32_t expected[5] = {8, 37, 68, 92, 99};
    cr_expect_arr_eq(first, expected, sizeof expected);
    slu_sampler_destroy(a);
    slu_sampler_destroy(b);
    slu_sampler_destroy(c);
}

/* So do all cuts together. The tokens are those that two ways to compute the weights gave. */
Test(sampler, seed_decides_within_cuts)
{
    float logits[1000];
    struct slu_sampling sampling = {
        .temperature = .7f, .top_k = 300, .top_p = .95f, .min_p = .02f, .seed = 42};
    struct slu_sampler *sampler = sampler_of(1000, &sampling);
    for (int i = 0; i < 1000; i++) {
        logits[i] = (float)(i * 7919 % 1000) / 100; /* 0 to 9.99, each once */
    }
    int32_t got[8], expected[8] = {977, 309, 556, 742, 830, 619, 852, 828};
    for (int i = 0; i < 8; i++) {
        got[i] = slu_sampler_next(sampler, logits, NULL, 0);
    }
    cr_expect_arr_eq(got, expected, sizeof expected);
    slu_sampler_destroy(sampler);
}

static int compare_falling(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

/* On a large vocabulary with many equal logits top-k and top-p cut where a full sort would. */
Test(sampler, cuts_as_a_sort_would)
{
    enum { N = 50000, K = 37 };
    float *logits = malloc(N * sizeof *logits);
    float *sorted = malloc(N * sizeof *sorted);
    cr_assert(logits && sorted);
    uint32_t state = 1;
    for (int i = 0; i < N; i++) {
        state = state * 1664525 + 1013904223;
        logits[i] = (float)(int)(state >> 20) / 256.0f - 8.0f;
    }
    memcpy(sorted, logits, N * sizeof *sorted);
    qsort(sorted, N, sizeof *sorted, compare_falling);
    double total = 0, sum = 0;
    for (int i = 0; i < N; i++) {
        total += exp(sorted[i] - sorted[0]);
    }
    float least = 0;
    for (int i = 0; i < N && sum < 0.3 * total; i++) {
        sum += exp(sorted[i] - sorted[0]);
        least = sorted[i];
    }
    /* So hot that all that is left is drawn alike. */
    struct slu_sampler *k = sampler_of(N, &(struct slu_sampling){.temperature = 1e9f, .top_k = K});
    struct slu_sampler *p =
        sampler_of(N, &(struct slu_sampling){.temperature = 1e9f, .top_p = 0.3f});
    float least_k = INFINITY, least_p = INFINITY;
    for (int i = 0; i < 500; i++) {
        least_k = fminf(least_k, logits[slu_sampler_next(k, logits, NULL, 0)]);
        least_p = fminf(least_p, logits[slu_sampler_next(p, logits, NULL, 0)]);
    }
    cr_expect_eq(least_k, sorted[K - 1]);
    cr_expect(least_p >= least && least_p <= least + 0.05f, "%f, cut at %f", least_p, least);
    slu_sampler_destroy(k);
    slu_sampler_destroy(p);
    free(logits);
    free(sorted);
}

/* Settings and logits at the ends of their ranges yield an id and no undefined behaviour. */
Test(sampler, extremes)
{
    float logits[] = {FLT_MAX, -FLT_MAX, INFINITY, -INFINITY, 1e-45f, NAN, 0};
    float values[] = {0, -1, NAN, INFINITY, 1e-45f, 1e-20f, 1, FLT_MAX};
    int32_t recent[] = {0, 1, 2, 3, 4, 5, 6, INT32_MIN, INT32_MAX};
    size_t n = sizeof values / sizeof *values;
    for (size_t t = 0; t < n; t++) {
        for (size_t i = 0; i < n * n; i++) {
            struct slu_sampling sampling = {
                .temperature = values[t],
                .top_p = values[i % n],
                .min_p = values[i / n],
                .repeat_penalty = values[(i + t) % n],
                .top_k = i % 3 ? UINT32_MAX : 2,
                .seed = UINT64_MAX,
            };
            int32_t id = next_once(logits, 7, &sampling, recent, 9);
            cr_assert(id >= 0 && id < 7 && id != 5);
        }
    }
    cr_expect_eq(next_once((float[]){3}, 1, &(struct slu_sampling){.temperature = 1}, NULL, 0), 0);
}

/* An empty or impossible vocabulary is refused. */
Test(sampler, refuses_vocabulary)
{
    struct slu_sampler *sampler = NULL;
    struct slu_err err;
    cr_expect_eq(slu_sampler_create(0, &sampler, &err), SLU_EINVAL);
    cr_expect_eq(slu_sampler_create(UINT32_MAX, &sampler, &err), SLU_EINVAL);
    cr_expect_null(sampler);
    slu_sampler_destroy(NULL);
}
