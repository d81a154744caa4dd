#include "tools/adapter_synth.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/sla.h"
#include "tools/adapter_base.h"
#include "tools/gguf_writer.h"
#include "tools/planes.h"
#include "tools/quantize.h"

/* Rows are made in this many numbers at a time. */
#define CHUNK 4096u

struct job {
    struct slu_adapter_synth_params p;
    struct slu_adapter_base base;
    struct slu_gguf_writer *writer;
    const struct slu_fmt *fmt;
};

/* splitmix64 */
static uint64_t next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Close enough to normal, of unit deviation: the sum of four even numbers of 16 bits. Integers and
 * one product, so it is the same everywhere. */
static float noise(uint64_t *state)
{
    uint64_t bits = next(state);
    int32_t sum = 0;
    for (unsigned i = 0; i < 4; i++) {
        sum += (int32_t)(bits >> (16 * i) & 0xffff);
    }
    return (float)(sum - 2 * 65535) * (1.7320508f / 65536.0f);
}

static int write_numbers(struct job *job, uint64_t n, float deviation, uint64_t *state,
                         struct slu_err *err)
{
    float x[CHUNK];
    uint8_t packed[CHUNK * sizeof(float)];
    int rc = 0;
    while (n > 0 && rc == 0) {
        uint32_t some = n < CHUNK ? (uint32_t)n : CHUNK;
        for (uint32_t i = 0; i < some; i++) {
            x[i] = noise(state) * deviation;
        }
        slu_quantize_row(job->fmt, x, some, packed);
        rc = slu_gguf_writer_data(job->writer, packed, slu_planes_row_bytes(job->fmt, some), err);
        n -= some;
    }
    return rc;
}

/* Calls `each` for every map that the adapter is for, in the order of the file. */
typedef int (*map_fn)(struct job *job, enum slu_target target, uint32_t layer,
                      const struct slu_target_shape *shape, struct slu_err *err);

static int for_maps(struct job *job, map_fn each, struct slu_err *err)
{
    struct slu_base base = slu_adapter_base_view(&job->base);
    int n = 0;
    for (uint32_t layer = 0; layer < base.n_layers; layer++) {
        for (unsigned target = 0; target < SLU_TARGETS; target++) {
            struct slu_target_shape shape;
            base.shape(base.arg, (enum slu_target)target, layer, &shape);
            if (shape.n == 0 || !(job->p.targets >> target & 1)) {
                continue;
            }
            int rc = each(job, (enum slu_target)target, layer, &shape, err);
            if (rc < 0) {
                return rc;
            }
            n++;
        }
    }
    return n > 0 ? 0
                 : slu_err_set(err, SLU_EINVAL, "%s: has none of the matrices that were asked for",
                               job->p.base);
}

static bool is_stack(enum slu_target target)
{
    return target >= SLU_TARGET_EXPERT_GATE && target <= SLU_TARGET_EXPERT_DOWN;
}

static int add_tensors(struct job *job, enum slu_target target, uint32_t layer,
                       const struct slu_target_shape *shape, struct slu_err *err)
{
    (void)err;
    uint64_t rank = job->p.rank;
    char name[80], stem[64];
    if (target >= SLU_TARGET_EMBEDDING) {
        snprintf(stem, sizeof stem, "%s.weight", slu_target_name(target));
    } else {
        snprintf(stem, sizeof stem, "blk.%u.%s.weight", layer, slu_target_name(target));
    }
    uint32_t n_dims = is_stack(target) ? 3 : 2, type = slu_planes_ggml_type(job->fmt);
    /* The embedding's A has a row for each token. */
    bool is_turned = target == SLU_TARGET_EMBEDDING;
    uint64_t a[] = {is_turned ? rank : shape->in, is_turned ? shape->in : rank, shape->n};
    uint64_t b[] = {rank, shape->out, shape->n};
    size_t bytes = job->fmt->bits / 8u;
    snprintf(name, sizeof name, "%s.lora_a", stem);
    slu_gguf_writer_tensor(job->writer, name, type, n_dims, a, a[0] * a[1] * a[2] * bytes);
    snprintf(name, sizeof name, "%s.lora_b", stem);
    slu_gguf_writer_tensor(job->writer, name, type, n_dims, b, b[0] * b[1] * b[2] * bytes);
    return 0;
}

static int write_data(struct job *job, enum slu_target target, uint32_t layer,
                      const struct slu_target_shape *shape, struct slu_err *err)
{
    uint64_t state = job->p.seed * 0x9e3779b97f4a7c15u + layer * 64 + target;
    uint64_t n = (uint64_t)job->p.rank * shape->n;
    /* A row of the embedding's A is picked, not summed over. */
    float sum = target == SLU_TARGET_EMBEDDING ? 1.0f : (float)shape->in;
    int rc = write_numbers(job, n * shape->in, 1.0f / sqrtf(sum), &state, err);
    float deviation = job->p.gain / sqrtf((float)job->p.rank);
    return rc < 0 ? rc : write_numbers(job, n * shape->out, deviation, &state, err);
}

static int write_gguf(const char *path, struct job *job, struct slu_err *err)
{
    int rc = slu_gguf_writer_create(path, &job->writer, err);
    if (rc < 0) {
        return rc;
    }
    char name[64];
    snprintf(name, sizeof name, "random, rank %u, seed %llu", job->p.rank,
             (unsigned long long)job->p.seed);
    slu_gguf_writer_str(job->writer, "general.architecture", slu_arch_name(job->base.config.arch));
    slu_gguf_writer_str(job->writer, "general.type", "adapter");
    slu_gguf_writer_str(job->writer, "adapter.type", "lora");
    slu_gguf_writer_str(job->writer, "general.name", name);
    slu_gguf_writer_f32(job->writer, "adapter.lora.alpha", job->p.alpha);
    rc = for_maps(job, add_tensors, err);
    rc = rc < 0 ? rc : slu_gguf_writer_begin(job->writer, err);
    rc = rc < 0 ? rc : for_maps(job, write_data, err);
    rc = rc < 0 ? rc : slu_gguf_writer_finish(job->writer, err);
    slu_gguf_writer_destroy(job->writer);
    return rc;
}

/* By way of a GGUF beside the folder. */
static int write_peft(const char *path, struct job *job, struct slu_err *err)
{
    char *between;
    if (asprintf(&between, "%s.%ld.gguf", path, (long)getpid()) < 0) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", path);
    }
    int rc = write_gguf(between, job, err);
    rc = rc < 0 ? rc : slu_lora_gguf_to_peft(between, job->p.base, path, err);
    unlink(between);
    free(between);
    return rc;
}

int slu_adapter_synth_write(const char *path, const struct slu_adapter_synth_params *params,
                            struct slu_err *err)
{
    struct job job = {.p = *params, .fmt = slu_fmt_get(params->fmt)};
    job.p.rank = job.p.rank ? job.p.rank : 8;
    job.p.alpha = job.p.alpha != 0 ? job.p.alpha : 2.0f * (float)job.p.rank;
    job.p.gain = job.p.gain != 0 ? job.p.gain : 0.5f;
    job.p.targets = job.p.targets ? job.p.targets : SLU_ADAPTER_ATTENTION;
    if (!job.fmt || job.fmt->scale != SLU_SCALE_NONE || job.p.rank > SLU_SLA_RANK_MAX) {
        return slu_err_set(err, SLU_EINVAL, "rank %u or the number format make no adapter",
                           job.p.rank);
    }
    int rc = slu_adapter_base_open(params->base, &job.base, err);
    if (rc < 0) {
        return rc;
    }
    return params->form == SLU_ADAPTER_PEFT ? write_peft(path, &job, err)
                                            : write_gguf(path, &job, err);
}
