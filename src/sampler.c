#include "sampler.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define REPEAT_WINDOW_DEFAULT 64

struct candidate {
    float logit;
    int32_t id;
    float weight; /* exp(logit - largest logit): the model's probability times a constant */
};

struct slu_sampler {
    uint32_t n_vocab;
    struct slu_sampling sampling;
    uint64_t random[4];
    struct candidate *candidates; /* n_vocab */
    uint64_t *is_recent;          /* a bit for each id; all zero between calls */
};

static size_t bitmap_words(uint32_t n_vocab)
{
    return ((size_t)n_vocab + 63) / 64;
}

size_t slu_sampler_bytes(uint32_t n_vocab)
{
    return sizeof(struct slu_sampler) + n_vocab * sizeof(struct candidate) +
           bitmap_words(n_vocab) * sizeof(uint64_t);
}

int slu_sampler_create(uint32_t n_vocab, struct slu_sampler **ret_sampler, struct slu_err *err)
{
    if (n_vocab == 0 || n_vocab > 1u << 28) {
        return slu_err_set(err, SLU_EINVAL, "no sampler for a vocabulary of %u tokens", n_vocab);
    }
    struct slu_sampler *sampler = calloc(1, sizeof *sampler);
    if (sampler) {
        sampler->n_vocab = n_vocab;
        sampler->candidates = calloc(n_vocab, sizeof *sampler->candidates);
        sampler->is_recent = calloc(bitmap_words(n_vocab), sizeof *sampler->is_recent);
    }
    if (!sampler || !sampler->candidates || !sampler->is_recent) {
        slu_sampler_destroy(sampler);
        return slu_err_set(err, SLU_ENOMEM, "no memory for a sampler over %u tokens", n_vocab);
    }
    slu_sampler_start(sampler, &(struct slu_sampling){0});
    *ret_sampler = sampler;
    return 0;
}

void slu_sampler_destroy(struct slu_sampler *sampler)
{
    if (sampler) {
        free(sampler->candidates);
        free(sampler->is_recent);
        free(sampler);
    }
}

/* splitmix64, which spreads a seed over the generator's state (Steele, Lea, Flood 2014). */
static uint64_t spread(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t rotate(uint64_t x, int k)
{
    return (x << k) | (x >> (64 - k));
}

/* xoshiro256** (Blackman, Vigna 2018), as a number in [0, 1) with 53 random bits. */
static double draw_uniform(uint64_t s[4])
{
    uint64_t out = rotate(s[1] * 5, 7) * 9;
    uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return (double)(out >> 11) * 0x1p-53;
}

void slu_sampler_start(struct slu_sampler *sampler, const struct slu_sampling *sampling)
{
    sampler->sampling = *sampling;
    uint64_t state = sampling->seed;
    for (int i = 0; i < 4; i++) {
        sampler->random[i] = spread(&state);
    }
}

#define LEAST (-700.0) /* its exponential is a normal double, and 0 as a float */

/* exp(x) for LEAST <= x <= 0, to 1e-14. The C library's differs in the last bit from machine to
 * machine; this is only additions and multiplications of doubles in a fixed order, without
 * branches, so that compilers do several at once. */
static inline double exp_negative(double x)
{
    /* Doubles near this one are whole numbers: a sum with it is rounded to the nearest of them, and
     * its lowest bits are that number's. */
    const double whole = 0x1.8p52;
    double shifted = x * 1.4426950408889634 + whole, n = shifted - whole;
    double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33; /* ln 2 in two parts */
    static const double over_factorial[] = {
        1.0 / 479001600,
        1.0 / 39916800,
        1.0 / 3628800,
        1.0 / 362880,
        1.0 / 40320,
        1.0 / 5040,
        1.0 / 720,
        1.0 / 120,
        1.0 / 24,
        1.0 / 6,
        1.0 / 2,
        1.0,
        1.0,
    };
    double sum = 0;
    for (size_t i = 0; i < sizeof over_factorial / sizeof *over_factorial; i++) {
        sum = sum * r + over_factorial[i];
    }
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52; /* 2^n */
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

/* Gives candidates the weights exp((logit - largest) / temperature); returns their sum. */
static double weigh(struct candidate *c, uint32_t n, double largest, double temperature)
{
    double total = 0, e[64];
    for (uint32_t first = 0; first < n; first += 64) {
        uint32_t some = n - first < 64 ? n - first : 64;
        for (uint32_t i = 0; i < some; i++) {
            double x = (c[first + i].logit - largest) / temperature;
            e[i] = x > LEAST ? x : LEAST;
        }
        for (uint32_t i = 0; i < some; i++) {
            e[i] = exp_negative(e[i]);
        }
        for (uint32_t i = 0; i < some; i++) {
            c[first + i].weight = (float)e[i];
            total += c[first + i].weight;
        }
    }
    return total;
}

/* A logit as the cuts see it: finite (unless NaN), one kind of zero, penalized if recent. */
static float adjusted(const struct slu_sampler *sampler, const float *logits, uint32_t id,
                      float penalty)
{
    float logit = logits[id];
    if (penalty != 1.0f && sampler->is_recent[id / 64] >> (id % 64) & 1) {
        if (logit > 0) {
            logit /= penalty;
        } else if (logit < 0) {
            logit *= penalty;
        }
    }
    if (logit > FLT_MAX) {
        logit = FLT_MAX;
    } else if (logit < -FLT_MAX) {
        logit = -FLT_MAX;
    }
    return logit + 0.0f;
}

static void mark_recent(struct slu_sampler *sampler, const int32_t *recent, size_t n_recent,
                        bool value)
{
    for (size_t i = 0; i < n_recent; i++) {
        if (recent[i] < 0 || (uint32_t)recent[i] >= sampler->n_vocab) {
            continue;
        }
        uint64_t bit = (uint64_t)1 << (recent[i] % 64);
        if (value) {
            sampler->is_recent[recent[i] / 64] |= bit;
        } else {
            sampler->is_recent[recent[i] / 64] &= ~bit;
        }
    }
}

static int32_t choose_greedy(const struct slu_sampler *sampler, const float *logits, float penalty)
{
    int32_t best = SLU_ERANGE;
    float best_logit = 0;
    for (uint32_t id = 0; id < sampler->n_vocab; id++) {
        float logit = adjusted(sampler, logits, id, penalty);
        if (logit > best_logit || (best < 0 && !isnan(logit))) {
            best = (int32_t)id;
            best_logit = logit;
        }
    }
    return best;
}

/* All ids but those of NaN logits, in the order of ids; returns how many. */
static uint32_t gather(struct slu_sampler *sampler, const float *logits, float penalty)
{
    uint32_t n = 0;
    for (uint32_t id = 0; id < sampler->n_vocab; id++) {
        float logit = adjusted(sampler, logits, id, penalty);
        if (!isnan(logit)) {
            sampler->candidates[n++] = (struct candidate){.logit = logit, .id = (int32_t)id};
        }
    }
    return n;
}

/* A number that is smaller the earlier a candidate comes: by falling logit, then by rising id. No
 * two candidates share one. */
static uint64_t rank(const struct candidate *candidate)
{
    uint32_t bits;
    memcpy(&bits, &candidate->logit, sizeof bits);
    uint32_t falling = bits >> 31 ? bits : bits ^ 0x7fffffffu;
    return (uint64_t)falling << 32 | (uint32_t)candidate->id;
}

static unsigned digit(const struct candidate *candidate, unsigned level)
{
    return rank(candidate) >> (56 - 8 * level) & 255;
}

static void swap(struct candidate *a, struct candidate *b)
{
    struct candidate t = *a;
    *a = *b;
    *b = t;
}

/* Moves candidates whose digit is below `middle` to the front and those above it to the back. */
static void partition(struct candidate *c, uint32_t *lo, uint32_t *hi, unsigned level,
                      unsigned middle)
{
    uint32_t front = *lo, back = *hi;
    for (uint32_t i = front; i < back;) {
        unsigned d = digit(&c[i], level);
        if (d < middle) {
            swap(&c[i++], &c[front++]);
        } else if (d > middle) {
            swap(&c[i], &c[--back]);
        } else {
            i++;
        }
    }
    *lo = front;
    *hi = back;
}

/*
 * Moves to the front the shortest run of candidates, in the order of rank, that together measure at
 * least `target`, and returns its length; its members stand in no particular order. Each measures
 * 1, or its weight. A radix selection from the top digit: of each digit's 256 buckets only the one
 * in which the target is reached is looked at further.
 */
static uint32_t keep_until(struct candidate *c, uint32_t n, double target, bool by_weight)
{
    uint32_t lo = 0, hi = n;
    double before = 0; /* measure of all in front of lo */
    for (unsigned level = 0; level < 8 && hi - lo > 1; level++) {
        double measure[256] = {0};
        for (uint32_t i = lo; i < hi; i++) {
            measure[digit(&c[i], level)] += by_weight ? (double)c[i].weight : 1.0;
        }
        unsigned reached = 0;
        while (reached < 255 && before + measure[reached] < target) {
            before += measure[reached++];
        }
        partition(c, &lo, &hi, level, reached);
        if (lo == hi) {
            break; /* sums rounded short of the target: all in front is the run */
        }
    }
    return hi;
}

/* Moves those that are not too unlikely to the front, in their order; returns how many. */
static uint32_t keep_likely(struct candidate *c, uint32_t n, float min_p, float largest)
{
    uint32_t n_kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (!(c[i].weight < min_p) || c[i].logit == largest) {
            c[n_kept++] = c[i];
        }
    }
    return n_kept;
}

/* Draws one of the first n by their weights, which sum up to `total`. */
static int32_t draw(struct slu_sampler *sampler, uint32_t n, double total)
{
    const struct candidate *c = sampler->candidates;
    double left = draw_uniform(sampler->random) * total;
    int32_t chosen = c[0].id;
    for (uint32_t i = 0; i < n; i++) {
        if (c[i].weight > 0) {
            chosen = c[i].id; /* the last one also takes what rounding leaves over */
            left -= c[i].weight;
            if (left < 0) {
                break;
            }
        }
    }
    return chosen;
}

static int32_t choose_random(struct slu_sampler *sampler, const float *logits, float penalty)
{
    const struct slu_sampling *sampling = &sampler->sampling;
    struct candidate *c = sampler->candidates;
    uint32_t n = gather(sampler, logits, penalty);
    if (n == 0) {
        return SLU_ERANGE;
    }
    float largest = c[0].logit;
    for (uint32_t i = 1; i < n; i++) {
        largest = c[i].logit > largest ? c[i].logit : largest;
    }
    if (sampling->top_k > 0 && sampling->top_k < n) {
        n = keep_until(c, n, sampling->top_k, false);
    }
    bool cuts_share = sampling->top_p > 0 && sampling->top_p < 1;
    bool cuts_tail = sampling->min_p > 0;
    double total = cuts_share || cuts_tail ? weigh(c, n, largest, 1) : 0;
    if (cuts_share) {
        n = keep_until(c, n, sampling->top_p * total, true);
    }
    if (cuts_tail) {
        n = keep_likely(c, n, sampling->min_p, largest);
    }
    return draw(sampler, n, weigh(c, n, largest, sampling->temperature));
}

int32_t slu_sampler_next(struct slu_sampler *sampler, const float *logits, const int32_t *recent,
                         size_t n_recent)
{
    const struct slu_sampling *sampling = &sampler->sampling;
    float penalty = sampling->repeat_penalty > 0 ? sampling->repeat_penalty : 1.0f;
    size_t window = sampling->repeat_window ? sampling->repeat_window : REPEAT_WINDOW_DEFAULT;
    if (n_recent > window) {
        recent += n_recent - window;
        n_recent = window;
    }
    mark_recent(sampler, recent, n_recent, true);
    int32_t id = sampling->temperature > 0 ? choose_random(sampler, logits, penalty)
                                           : choose_greedy(sampler, logits, penalty);
    mark_recent(sampler, recent, n_recent, false);
    assert(id < (int32_t)sampler->n_vocab);
    return id;
}
