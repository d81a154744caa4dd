/* Quantization of the input: which matrices, on what sample, with what importance. */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/packer_parts.h"

#define SAMPLE_WEIGHTS 32768u
#define SAMPLE_ROWS    512u
#define MISSED         1.05f /* times the error aimed at; a sample's is within 2 % of it */

float slu_packer_quant_error(unsigned bits)
{
    static const float errors[] = {[3] = 0.17f, [4] = 0.082f, [5] = 0.05f, [6] = 0.027f};
    return bits < sizeof errors / sizeof *errors ? errors[bits] : 0;
}

static float error_aimed_at(const struct slu_packer_quant *quant)
{
    return quant->error > 0 ? quant->error : slu_packer_quant_error(quant->bits);
}

bool slu_packer_quantizes(const struct slu_packer_quant *quant, const struct slu_packer_ref *ref)
{
    return quant->bits && !ref->as_f32 && ref->fmt->bits >= 8 && ref->rows > 1 &&
           ref->cols % 32 == 0 && !strstr(ref->name, "ffn_gate_inp");
}

static float q8_at(const uint8_t *row, uint32_t i)
{
    const uint8_t *block = row + i / 32 * (size_t)34;
    uint16_t half = (uint16_t)(block[0] | block[1] << 8);
    return slu_f16_to_f32(half) * (float)(int8_t)block[2 + i % 32];
}

static float number_at(const struct slu_fmt *fmt, const uint8_t *row, uint32_t i)
{
    uint32_t bits;
    uint16_t half;
    float value;
    switch (fmt->id) {
    case SLU_FMT_F32:
        memcpy(&value, row + 4 * (size_t)i, sizeof value);
        return value;
    case SLU_FMT_F16:
        memcpy(&half, row + 2 * (size_t)i, sizeof half);
        return slu_f16_to_f32(half);
    case SLU_FMT_BF16:
        memcpy(&half, row + 2 * (size_t)i, sizeof half);
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    default:
        assert(fmt->id == SLU_FMT_Q8_0);
        return q8_at(row, i);
    }
}

bool slu_packer_floats(const struct slu_packer_ref *ref, const uint8_t *row, uint32_t first_col,
                       uint32_t n, float *out)
{
    bool is_finite = true;
    for (uint32_t i = 0; i < n; i++) {
        out[i] = number_at(ref->fmt, row, first_col + i);
        is_finite = is_finite && isfinite(out[i]);
    }
    return is_finite;
}

int slu_packer_not_finite(const struct slu_packer_ref *ref, struct slu_err *err)
{
    return slu_err_set(
        err, SLU_EFORMAT,
        "%s: tensor '%s' has a number that is infinite or none at all, which cannot be quantized",
        ref->source->name, ref->name);
}

void slu_packer_weights(struct slu_packer_job *job, const struct slu_packer_ref *ref,
                        uint32_t expert, float *ret_weights)
{
    const float *moments = NULL;
    double sum = 0;
    if (job->importance) {
        moments = slu_importance_find(job->importance, ref->name, expert, ref->cols);
        /* One tensor for each expert: its name says which it is. */
        moments = moments ? moments
                          : slu_importance_find(job->importance, ref->name,
                                                SLU_IMPORTANCE_NO_EXPERT, ref->cols);
        job->report.n_important += moments != NULL;
        job->report.n_unimportant += moments == NULL;
    }
    for (uint32_t i = 0; moments && i < ref->cols; i++) {
        sum += moments[i];
    }
    double scale = sum > 0 ? ref->cols / sum : 0;
    for (uint32_t i = 0; i < ref->cols; i++) {
        /* A column that never mattered may matter yet. */
        float weight = scale > 0 ? (float)(moments[i] * scale) : 1;
        ret_weights[i] = weight > 1e-3f ? weight : 1e-3f;
    }
}

/* ---- fitting ------------------------------------------------------------------------------ */

/* Buffers of a sample. */
struct gather {
    uint8_t *raw;
    float *x, *weights, *row_weights;
};

static void gather_finish(struct gather *g)
{
    free(g->raw);
    free(g->x);
    free(g->weights);
    free(g->row_weights);
}

/* Row i of the sample: rows are taken from all matrices and all over them, and of each another
 * stretch of columns. */
static int gather_row(struct slu_packer_job *job, const struct slu_packer_ref *refs,
                      uint32_t n_refs, uint32_t width, uint32_t i, uint32_t n, struct gather *g,
                      struct slu_err *err)
{
    uint64_t all = (uint64_t)refs[0].rows * refs[0].n * n_refs;
    uint64_t at = (uint64_t)(((double)i + 0.5) * (double)all / n);
    const struct slu_packer_ref *ref = &refs[at / ((uint64_t)refs[0].rows * refs[0].n)];
    uint64_t row = at % ((uint64_t)refs[0].rows * refs[0].n);
    uint32_t first = i % (ref->cols / width) * width;
    int code = slu_packer_read_rows(ref, row, 1, g->raw, err);
    if (code == 0 && !slu_packer_floats(ref, g->raw, first, width, g->x + (size_t)i * width)) {
        code = slu_packer_not_finite(ref, err);
    }
    if (code == 0 && job->importance) {
        uint32_t important = job->report.n_important, unimportant = job->report.n_unimportant;
        slu_packer_weights(job, ref, (uint32_t)(row / ref->rows), g->row_weights);
        job->report.n_important = important; /* counted when it is written */
        job->report.n_unimportant = unimportant;
        memcpy(g->weights + (size_t)i * width, g->row_weights + first, width * sizeof(float));
    }
    return code;
}

int slu_packer_fit(struct slu_packer_job *job, const struct slu_packer_quant *quant,
                   const struct slu_packer_ref *refs, uint32_t n_refs, uint32_t width,
                   struct slu_ecq *ret_ecq, struct slu_err *err)
{
    uint32_t n = SAMPLE_WEIGHTS / width, cols = refs[0].cols;
    uint64_t all = (uint64_t)refs[0].rows * refs[0].n * n_refs;
    n = n < 16 ? 16 : n > SAMPLE_ROWS ? SAMPLE_ROWS : n;
    n = n < all ? n : (uint32_t)all;
    struct gather g = {
        .raw = malloc(slu_packer_ref_row_bytes(&refs[0])),
        .x = malloc((size_t)n * width * sizeof(float)),
        .weights = malloc((size_t)n * width * sizeof(float)),
        .row_weights = malloc(cols * sizeof(float)),
    };
    int code = 0;
    if (!g.raw || !g.x || !g.weights || !g.row_weights) {
        code = slu_err_set(err, SLU_ENOMEM, "%s: out of memory for a sample of '%s'",
                           refs[0].source->name, refs[0].name);
    }
    for (uint32_t i = 0; i < n && code == 0; i++) {
        code = gather_row(job, refs, n_refs, width, i, n, &g, err);
    }
    if (code == 0) {
        const struct slu_ecq_sample sample = {
            .x = g.x,
            .weights = job->importance ? g.weights : NULL,
            .stride = width,
            .rows = n,
            .cols = width,
        };
        code = slu_ecq_fit_room(ret_ecq, quant->bits, error_aimed_at(quant), &sample, err);
    }
    gather_finish(&g);
    return code;
}

void slu_packer_quantized(struct slu_packer_job *job, const struct slu_packer_quant *quant,
                          uint64_t n_weights, const struct slu_ecq_sums *sums)
{
    double error2 = sums->power > 0 ? sums->error / sums->power : 0;
    double aim = MISSED * error_aimed_at(quant);
    job->report.quant_weights += n_weights;
    job->report.quant_missed += error2 > aim * aim ? n_weights : 0;
    job->quant_error2 += (double)n_weights * error2;
}
