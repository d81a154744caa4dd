#include "tools/ecq.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a unit of spread is: the mean magnitude of a Gaussian of standard deviation 1 is its
 * inverse. Mean magnitudes are less at the mercy of outliers than mean squares. */
#define SPREAD_OF_MEAN 1.2533141f
/* At high rate a step of d costs d^2/12 in error, and a bit more halves it: a bit is worth
 * 2 ln 2 d^2/12. */
#define BIT_WORTH 0.11552453f
#define BITS_MAX  8.0f /* of a code; Huffman codes of pairs are limited to 11 for two */
/* Steps tried, relative to the spread, and rounds of fitting at each. */
#define STEP_MOST  5.0f /* times the target error, which is the step over the root of 12 */
#define STEP_LEAST 0.02f
#define STEP_START                                                                                 \
    4.0f /* over the levels: cells then reach twice the spread, which is too little */
#define STEP_RATIO  0.84f
#define FINE_RATIO  0.965f
#define BISECTIONS  6
#define SCAN_ROUNDS 2
#define FIT_ROUNDS  2
/* How near to a target is there, and how much more bits are no reason for room for escapes. */
#define SLACK         1.002f
#define RATE_SLACK    1.004f
#define MIDDLE_LAMBDA 0.7f
/* Escapes count in this many steps: coarse, as the code of an escaped weight does the rest. */
#define ESCAPE_STEPS 4
/* What an escape's value costs, and the rest of a gap's over its mean's logarithm. */
#define VALUE_BITS 2.0f
#define GAP_BITS   1.44f
#define SCALE_NONE 255
#define SCALE_LAST 252
/* Rows that ask for less are zero: its inverse is finite, and so are numbers divided by it. */
#define SCALE_LEAST 0x1p-100f
#define SCALE_MOST  0x1p126f /* and a unit, which is less than twice that, is finite too */

/* A weight that an escape would help, and by how much. */
struct candidate {
    float benefit;
    uint32_t column;
};

struct scratch {
    struct candidate *candidates;
    float *u;       /* the row in units of its scale */
    int8_t *value;  /* of the column's escape */
    uint8_t *level; /* of columns */
};

size_t slu_ecq_scratch_bytes(uint32_t cols)
{
    return (size_t)cols * (sizeof(struct candidate) + sizeof(float) + 2) + 64;
}

static struct scratch scratch_at(void *at, uint32_t cols)
{
    struct scratch s = {.candidates = at};
    s.u = (float *)(void *)(s.candidates + cols);
    s.value = (int8_t *)(s.u + cols);
    s.level = (uint8_t *)s.value + cols;
    return s;
}

/* ---- levels and codes --------------------------------------------------------------------- */

/* Low bits of a code: those of the plane that all weights fill. What lies above is the ring, 0 for
 * the innermost levels, so that the high plane is nearly empty; and the frequent ones of every ring
 * share the low bits of the frequent ones of the innermost. */
static unsigned low_bits(const struct slu_fmt *fmt)
{
    return fmt->bits == 3 ? 2 : 4;
}

static uint8_t code_of(const struct slu_fmt *fmt, uint32_t level)
{
    int half = 1 << (fmt->bits - 1), n = 1 << (low_bits(fmt) - 1);
    int a = (int)level - half, b = a < 0 ? -1 - a : a;
    int ring = b / n, low = a < 0 ? n - 1 - b % n : n + b % n;
    return (uint8_t)(ring << low_bits(fmt) | low);
}

static void levels_init(struct slu_ecq *ecq, const struct slu_ecq_params *params)
{
    const struct slu_fmt *fmt = params->fmt;
    int half = 1 << (fmt->bits - 1);
    *ecq = (struct slu_ecq){.fmt = fmt, .lambda = params->lambda, .n_levels = 2 * (uint32_t)half};
    ecq->fine = (float)(128 / half);
    ecq->escape = ESCAPE_STEPS * ecq->fine;
    ecq->escape_bits =
        fmt->escapes ? log2f(1024.0f / fmt->escapes) + GAP_BITS + VALUE_BITS : INFINITY;
    for (uint32_t i = 0; i < ecq->n_levels; i++) {
        ecq->code[i] = code_of(fmt, i);
        ecq->value[i] = ((float)((int)i - half) + 0.5f) * ecq->fine;
        ecq->bits[i] = (float)fmt->bits;
    }
}

/* ---- rounding ----------------------------------------------------------------------------- */

static void consider(const struct slu_ecq *ecq, float u, float weight, float slope, int level,
                     float *least, int *best)
{
    float d = u - ecq->value[level];
    float cost = weight * d * d + slope * ecq->bits[level];
    if (cost < *least) {
        *least = cost;
        *best = level;
    }
}

/* The level that costs least: the cell that u lies in, or a neighbour. */
static int round_to_level(const struct slu_ecq *ecq, float u, float weight, float slope,
                          float *ret_cost)
{
    int last = (int)ecq->n_levels - 1, half = last / 2 + 1;
    float cell = floorf(u / ecq->fine) + (float)half;
    int level = cell < 0 ? 0 : cell > (float)last ? last : (int)cell, best = level;
    *ret_cost = INFINITY;
    consider(ecq, u, weight, slope, level, ret_cost, &best);
    if (level > 0) {
        consider(ecq, u, weight, slope, level - 1, ret_cost, &best);
    }
    if (level < last) {
        consider(ecq, u, weight, slope, level + 1, ret_cost, &best);
    }
    return best;
}

static float slope_of(const struct slu_ecq *ecq)
{
    return ecq->lambda * BIT_WORTH * ecq->fine * ecq->fine;
}

/* The value of an escape for u, 0 where none makes sense. */
static int8_t escape_value(const struct slu_ecq *ecq, float u)
{
    float v = rintf(u / ecq->escape);
    return (int8_t)(v < -127 ? -127 : v > 127 ? 127 : v);
}

/* Descending benefit, then ascending columns. */
static int by_benefit(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    if (x->benefit != y->benefit) {
        return x->benefit > y->benefit ? -1 : 1;
    }
    return x->column < y->column ? -1 : 1;
}

static int by_column(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    return x->column < y->column ? -1 : x->column > y->column;
}

/* Slots that escapes at these columns take, bridges over wide gaps counted. */
static size_t slots_of(const struct candidate *sorted, size_t n)
{
    size_t slots = 0;
    uint32_t column = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t gap = sorted[i].column - column;
        slots += gap ? (gap + 254) / 255 : 1;
        column = sorted[i].column;
    }
    return slots;
}

/* Leaves of n candidates those that fit into the row's room, ascending; returns how many. */
static size_t choose(struct candidate *c, size_t n, size_t room)
{
    qsort(c, n, sizeof *c, by_benefit);
    n = n < room ? n : room;
    for (;;) {
        qsort(c, n, sizeof *c, by_column);
        size_t slots = slots_of(c, n);
        if (slots <= room) {
            return n;
        }
        size_t over = slots - room;
        qsort(c, n, sizeof *c, by_benefit);
        n -= over < n ? over : n;
    }
}

/* Levels and escapes of a row whose scale is known. Returns its weighed squared error. */
static double round_row(const struct slu_ecq *ecq, float scale, const float *x,
                        const float *weights, uint32_t cols, const struct scratch *s,
                        size_t *ret_escapes)
{
    float slope = slope_of(ecq), inverse = scale > 0 ? 1 / scale : 0;
    float inside = ecq->fine * (float)(ecq->n_levels / 2);
    size_t n = 0, room = slu_fmt_escapes(ecq->fmt, cols);
    for (uint32_t i = 0; i < cols; i++) {
        float u = x[i] * inverse, weight = weights ? weights[i] : 1, cost;
        s->u[i] = u;
        s->value[i] = 0;
        s->level[i] = (uint8_t)round_to_level(ecq, u, weight, slope, &cost);
        if (room && fabsf(u) > inside) {
            float with;
            float rest = u - ecq->escape * (float)escape_value(ecq, u);
            round_to_level(ecq, rest, weight, slope, &with);
            float benefit = cost - with - slope * ecq->escape_bits;
            if (benefit > 0) {
                s->candidates[n++] = (struct candidate){.benefit = benefit, .column = i};
            }
        }
    }
    n = choose(s->candidates, n, room);
    for (size_t k = 0; k < n; k++) {
        uint32_t i = s->candidates[k].column;
        float cost;
        s->value[i] = escape_value(ecq, s->u[i]);
        s->level[i] = (uint8_t)round_to_level(ecq, s->u[i] - ecq->escape * (float)s->value[i],
                                              weights ? weights[i] : 1, slope, &cost);
    }
    double error = 0;
    for (uint32_t i = 0; i < cols; i++) {
        double d = (double)s->u[i] - ecq->value[s->level[i]] - ecq->escape * s->value[i];
        error += d * d * (weights ? weights[i] : 1);
    }
    *ret_escapes = n;
    return error * scale * scale;
}

static double power_of(const float *x, const float *weights, uint32_t cols)
{
    double power = 0;
    for (uint32_t i = 0; i < cols; i++) {
        power += (weights ? weights[i] : 1) * (double)x[i] * x[i];
    }
    return power;
}

/* ---- rows --------------------------------------------------------------------------------- */

static float row_scale(const struct slu_ecq *ecq, const float *x, uint32_t cols)
{
    double sum = 0;
    for (uint32_t i = 0; i < cols; i++) {
        sum += fabsf(x[i]);
    }
    double scale = sum / cols * SPREAD_OF_MEAN * ecq->step / ecq->fine;
    return scale < SCALE_MOST ? (float)scale : SCALE_MOST;
}

void slu_ecq_scales_add(struct slu_ecq_scales *scales, const struct slu_ecq *ecq, const float *x,
                        uint32_t cols)
{
    float scale = row_scale(ecq, x, cols);
    if (scale > SCALE_LEAST) {
        scales->squares += (double)scale * scale;
        scales->n++;
        scales->most = scale > scales->most ? scale : scales->most;
    }
}

float slu_ecq_unit(const struct slu_ecq_scales *scales)
{
    if (scales->n == 0) {
        return 0;
    }
    double common = sqrt(scales->squares / scales->n);
    double quarters = rint(4 * log2(scales->most / common));
    return (float)(common * exp2((quarters > 0 ? quarters : 0) / 4));
}

/* The byte of a scale, and the scale that it gives. */
static uint8_t scale_byte(float unit, float wanted, float *ret_scale)
{
    *ret_scale = 0;
    if (!(wanted > SCALE_LEAST) || !(unit > 0)) {
        return SCALE_NONE;
    }
    /* Quarters of an octave do: equal steps are what is best, but for what codes can reach, and
     * equal bytes cost nothing on flash. */
    float e = 4 * rintf(4 * log2f(unit / wanted));
    uint8_t byte = (uint8_t)(e < 0 ? 0 : e > SCALE_LAST ? SCALE_LAST : e);
    *ret_scale = slu_row_scale(unit, byte);
    return byte;
}

void slu_ecq_head_put(const struct slu_ecq *ecq, float unit, struct slu_planes *planes)
{
    struct slu_ecq_head head = {.unit = unit, .escape = ecq->escape};
    for (uint32_t i = 0; i < ecq->n_levels; i++) {
        head.table[ecq->code[i]] = (int8_t)ecq->value[i];
    }
    memcpy(planes->data + planes->at.head, &head, sizeof head);
}

static void put_codes(const struct slu_ecq *ecq, const uint8_t *level, struct slu_planes *planes,
                      uint32_t row)
{
    const struct slu_mat_layout *at = &planes->at;
    uint8_t *codes = planes->data + at->codes + row * at->codes_row;
    uint8_t *high = planes->data + at->high + row * at->high_row;
    unsigned bits = ecq->fmt->bits;
    for (uint32_t g = 0; g < planes->cols / 32; g++, level += 32) {
        uint8_t code[32], pairs[8] = {0}, fifth[4] = {0};
        unsigned low = low_bits(ecq->fmt);
        for (unsigned i = 0; i < 32; i++) {
            code[i] = ecq->code[level[i]];
            unsigned upper = (unsigned)code[i] >> low;
            fifth[i / 8] |= (uint8_t)((upper & 1) << i % 8);
            pairs[i % 8] |= (uint8_t)((bits == 3 ? code[i] & 3u : upper) << 2 * (i / 8));
        }
        if (bits == 3) {
            memcpy(codes + 8 * (size_t)g, pairs, 8);
        }
        for (unsigned i = 0; i < 16 && bits > 3; i++) {
            codes[16 * (size_t)g + i] = (uint8_t)((code[i] & 15) | (code[16 + i] & 15) << 4);
        }
        if (bits == 3 || bits == 5) {
            memcpy(high + 4 * (size_t)g, fifth, 4);
        } else if (bits == 6) {
            memcpy(high + 8 * (size_t)g, pairs, 8);
        }
    }
}

static void put_escapes(const struct scratch *s, size_t n, struct slu_planes *planes, uint32_t row)
{
    const struct slu_mat_layout *at = &planes->at;
    uint8_t *gaps = planes->data + at->gaps + row * at->escapes_row;
    uint8_t *values = planes->data + at->values + row * at->escapes_row;
    memset(gaps, 0, at->escapes_row);
    memset(values, 0, at->escapes_row);
    size_t slot = 0;
    uint32_t column = 0;
    for (size_t k = 0; k < n; k++) {
        uint32_t gap = s->candidates[k].column - column;
        column = s->candidates[k].column;
        for (; gap > 255; gap -= 255) {
            gaps[slot++] = 255;
        }
        assert(slot < at->escapes_row);
        gaps[slot] = (uint8_t)gap;
        values[slot++] = (uint8_t)s->value[column];
    }
}

void slu_ecq_row_put(const struct slu_ecq *ecq, float unit, const float *x, const float *weights,
                     struct slu_planes *planes, uint32_t row, void *scratch,
                     struct slu_ecq_sums *sums)
{
    assert(planes->fmt == ecq->fmt);
    struct scratch s = scratch_at(scratch, planes->cols);
    float scale;
    size_t n;
    planes->data[planes->at.scales + row] =
        scale_byte(unit, row_scale(ecq, x, planes->cols), &scale);
    sums->error += round_row(ecq, scale, x, weights, planes->cols, &s, &n);
    sums->power += power_of(x, weights, planes->cols);
    put_codes(ecq, s.level, planes, row);
    put_escapes(&s, n, planes, row);
}

/* ---- fitting ------------------------------------------------------------------------------ */

/* What a pass over the sample has seen. */
struct tally {
    double n[SLU_ECQ_LEVELS_MAX], weight[SLU_ECQ_LEVELS_MAX], sum[SLU_ECQ_LEVELS_MAX];
    double error, power, escapes;
};

static void tally_row(const struct slu_ecq *ecq, float unit, const float *x, const float *weights,
                      uint32_t cols, const struct scratch *s, struct tally *tally)
{
    size_t n;
    float scale;
    scale_byte(unit, row_scale(ecq, x, cols), &scale);
    tally->error += round_row(ecq, scale, x, weights, cols, s, &n);
    tally->escapes += (double)n;
    tally->power += power_of(x, weights, cols);
    for (uint32_t i = 0; i < cols && scale > 0; i++) {
        double weight = weights ? weights[i] : 1;
        unsigned level = s->level[i];
        tally->n[level]++;
        tally->weight[level] += weight;
        tally->sum[level] += weight * (s->u[i] - ecq->escape * s->value[i]);
    }
}

static float bits_of(double n, double all)
{
    float bits = (float)-log2((n + 0.5) / (all + 1));
    return bits < BITS_MAX ? bits : BITS_MAX;
}

/* Points become centroids, and codes get the bits that their planes will take for them. */
static void refit(struct slu_ecq *ecq, const struct tally *tally)
{
    double low[16] = {0}, ring[16] = {0}, all = 0;
    unsigned shift = low_bits(ecq->fmt);
    for (uint32_t i = 0; i < ecq->n_levels; i++) {
        low[ecq->code[i] & ((1u << shift) - 1)] += tally->n[i];
        ring[ecq->code[i] >> shift] += tally->n[i];
        all += tally->n[i];
        if (tally->weight[i] > 0) {
            float v = (float)rint(tally->sum[i] / tally->weight[i]);
            ecq->value[i] = v < -127 ? -127 : v > 127 ? 127 : v;
        }
    }
    for (uint32_t i = 0; i < ecq->n_levels; i++) {
        ecq->bits[i] = bits_of(low[ecq->code[i] & ((1u << shift) - 1)], all) +
                       bits_of(ring[ecq->code[i] >> shift], all);
    }
}

/* Fits everything but the step, in so many rounds from where the fit stands; returns the relative
 * error. */
static double fit_step(struct slu_ecq *ecq, float step, int rounds,
                       const struct slu_ecq_sample *sample, void *memory)
{
    struct scratch s = scratch_at(memory, sample->cols);
    struct tally tally;
    ecq->step = step;
    struct slu_ecq_scales scales = {0};
    for (uint32_t r = 0; r < sample->rows; r++) {
        slu_ecq_scales_add(&scales, ecq, sample->x + r * sample->stride, sample->cols);
    }
    float unit = slu_ecq_unit(&scales);
    for (int round = 0; round <= rounds; round++) {
        tally = (struct tally){0};
        for (uint32_t r = 0; r < sample->rows; r++) {
            const float *weights = sample->weights ? sample->weights + r * sample->stride : NULL;
            tally_row(ecq, unit, sample->x + r * sample->stride, weights, sample->cols, &s, &tally);
        }
        if (round < rounds) {
            refit(ecq, &tally);
        }
    }
    double n = (double)sample->rows * sample->cols, bits = tally.escapes * ecq->escape_bits;
    bits = tally.escapes > 0 ? bits : 0;
    for (uint32_t i = 0; i < ecq->n_levels; i++) {
        bits += tally.n[i] * ecq->bits[i];
    }
    ecq->rate = (float)(bits / n);
    ecq->escapes = (float)(1024 * tally.escapes / n);
    ecq->error = tally.power > 0 ? (float)sqrt(tally.error / tally.power) : 0;
    return ecq->error;
}

/* Where errors are least between two steps, or the first step down that meets the target. */
static float find_least(struct slu_ecq *ecq, double target, float from, float to,
                        const struct slu_ecq_sample *sample, void *memory)
{
    double least = INFINITY;
    float best = from;
    for (float step = from; step > to; step *= FINE_RATIO) {
        double error = fit_step(ecq, step, SCAN_ROUNDS, sample, memory);
        if (error < least) {
            least = error;
            best = step;
        }
        if (error <= target) {
            break;
        }
    }
    return best;
}

/* A step to search down from: five times the target, or more where codes that end so near would
 * clip too much, so that errors fall with coarser steps still. */
static float first_step(const struct slu_ecq *ecq, double target,
                        const struct slu_ecq_sample *sample, void *memory)
{
    struct slu_ecq probe = *ecq; /* the search starts from a fit that knows nothing yet */
    float least = STEP_START / (float)ecq->n_levels, step = STEP_MOST * (float)target;
    step = step > least ? step : least;
    double error = fit_step(&probe, step, SCAN_ROUNDS, sample, memory);
    while (error > target && step < STEP_MOST) {
        double coarser = fit_step(&probe, step / STEP_RATIO, SCAN_ROUNDS, sample, memory);
        if (coarser >= error) {
            break;
        }
        step /= STEP_RATIO;
        error = coarser;
    }
    return step;
}

/* The largest step that meets the target. From coarse ones down, errors fall until so much is
 * clipped that they rise again: where the target isn't met before, the step of the least error. */
static float find_step(struct slu_ecq *ecq, double target, const struct slu_ecq_sample *sample,
                       void *memory)
{
    float above = 0, step = first_step(ecq, target, sample, memory);
    double least = INFINITY;
    for (; step > STEP_LEAST; step *= STEP_RATIO) {
        double error = fit_step(ecq, step, SCAN_ROUNDS, sample, memory);
        if (error <= target) {
            break;
        }
        if (error > least) {
            return find_least(ecq, target, above / STEP_RATIO, step, sample, memory);
        }
        least = error;
        above = step;
    }
    if (above == 0) {
        return step;
    }
    float below = step;
    for (int i = 0; i < BISECTIONS; i++) {
        step = sqrtf(above * below);
        if (fit_step(ecq, step, SCAN_ROUNDS, sample, memory) <= target) {
            below = step;
        } else {
            above = step;
        }
    }
    return below;
}

/* A fit with a lambda of its own. */
static void fit_lambda(struct slu_ecq *ecq, const struct slu_ecq_params *params, float lambda,
                       const struct slu_ecq_sample *sample, void *memory)
{
    struct slu_ecq_params with = *params;
    with.lambda = lambda;
    levels_init(ecq, &with);
    float step =
        params->step > 0 ? params->step : find_step(ecq, params->target_error, sample, memory);
    fit_step(ecq, step, FIT_ROUNDS, sample, memory);
}

/* Whether a is better than b: both meet the target, or come as near to it as they can. */
static bool is_better(const struct slu_ecq *a, const struct slu_ecq *b, float target)
{
    bool a_meets = a->error <= target * SLACK, b_meets = b->error <= target * SLACK;
    if (a_meets != b_meets) {
        return a_meets;
    }
    return a_meets ? a->rate < b->rate : a->error < b->error;
}

static void fit_best(struct slu_ecq *ecq, const struct slu_ecq_params *params,
                     const struct slu_ecq_sample *sample, void *memory)
{
    static const float lambdas[] = {0.5f, 0.7f, 0.9f, 1.2f};
    if (params->lambda > 0) {
        fit_lambda(ecq, params, params->lambda, sample, memory);
        return;
    }
    for (size_t i = 0; i < sizeof lambdas / sizeof *lambdas; i++) {
        struct slu_ecq other;
        fit_lambda(&other, params, lambdas[i], sample, memory);
        if (i == 0 || is_better(&other, ecq, params->target_error)) {
            *ecq = other;
        }
    }
}

int slu_ecq_fit(struct slu_ecq *ecq, const struct slu_ecq_params *params,
                const struct slu_ecq_sample *sample, struct slu_err *err)
{
    void *memory = malloc(slu_ecq_scratch_bytes(sample->cols));
    if (!memory) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for rows of %u weights", sample->cols);
    }
    fit_best(ecq, params, sample, memory);
    free(memory);
    return 0;
}

int slu_ecq_fit_room(struct slu_ecq *ecq, unsigned bits, float target_error,
                     const struct slu_ecq_sample *sample, struct slu_err *err)
{
    void *memory = malloc(slu_ecq_scratch_bytes(sample->cols));
    if (!memory) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for rows of %u weights", sample->cols);
    }
    unsigned id = SLU_FMT_Q3E + bits - 3;
    struct slu_ecq_params params = {.target_error = target_error};
    struct slu_ecq most;
    params.fmt = slu_fmt_get(id + 256 * (SLU_ECQ_ROOMS - 1));
    fit_lambda(&most, &params, MIDDLE_LAMBDA, sample, memory);
    params.fmt = slu_fmt_get(id);
    fit_best(ecq, &params, sample, memory);
    bool suffices = ecq->error <= target_error * SLACK && ecq->rate <= most.rate * RATE_SLACK;
    for (unsigned v = 1; !suffices && v < SLU_ECQ_ROOMS; v++) {
        params.fmt = slu_fmt_get(id + 256 * v);
        if ((float)params.fmt->escapes >= most.escapes || v == SLU_ECQ_ROOMS - 1) {
            fit_best(ecq, &params, sample, memory);
            suffices = ecq->error <= target_error * SLACK;
        }
    }
    free(memory);
    return 0;
}
