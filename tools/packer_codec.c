/*
 * The automatic choice of which blocks to compress: what sampled blocks cost to decode and to
 * multiply on this processor's cores, all busy at once, each timed in its thread's own time; what
 * flash gives; and the keys that say what came of it.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/cpu.h"
#include "base/pool.h"
#include "tools/flash_rate.h"
#include "tools/packer_parts.h"

#define SAMPLE_BANKS  3u
#define SAMPLE_BLOCKS 4u /* of a bank */
#define SAMPLES_MAX   (SAMPLE_BANKS * SAMPLE_BLOCKS)
#define ROUNDS        6u

/* A sampled block, and its compressed form where that pays. */
struct block {
    struct slu_packer_sample sample;
    uint8_t *stored; /* NULL: it stays raw */
    size_t stored_bytes;
    uint64_t raw_checksum, stored_checksum;
};

/* What one thread works with, and what it found. */
struct worker {
    struct slu_decoder *decoder;
    uint8_t *out, *acts_memory, *scratch;
    size_t out_stride; /* a block's share of out */
    float *x, *y;
    double raw_s, zstd_s; /* a round of all blocks, raw and with those compressed that can be */
    bool has_failed;
};

struct measurement {
    struct block blocks[SAMPLES_MAX];
    uint32_t n_blocks;
    const struct slu_kern *kern;
    struct worker workers[SLU_POOL_THREADS_MAX];
};

/* ---- blocks ------------------------------------------------------------------------------- */

static int encode(struct slu_encoder *encoder, struct block *block, struct slu_err *err)
{
    const struct slu_packer_sample *sample = &block->sample;
    size_t raw_bytes = sample->at.bytes;
    size_t cuts[SLU_PACKER_CUTS];
    const struct slu_parts parts = slu_packer_block_parts(&sample->shape, &sample->at, cuts);
    size_t room = slu_encode_parts_bound(raw_bytes, &parts);
    block->raw_checksum = slu_checksum(sample->raw, raw_bytes);
    block->stored_bytes = raw_bytes;
    uint8_t *stored = malloc(room);
    if (!stored) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for a sample of blocks");
    }
    int64_t n = slu_encode_parts(encoder, sample->raw, raw_bytes, &parts, stored, room, err);
    if (n > 0 && n <= (int64_t)(raw_bytes - raw_bytes / 32)) { /* as the writer decides */
        block->stored = stored;
        block->stored_bytes = (size_t)n;
        block->stored_checksum = slu_checksum(stored, (size_t)n);
    } else {
        free(stored);
    }
    return n < 0 ? (int)n : 0;
}

/* Blocks of the first, the middle and the last bank of routed experts. */
static int take_samples(struct slu_packer_job *job, const struct slu_packer_plan *plan,
                        struct measurement *m, struct slu_err *err)
{
    size_t n_routed = 0, seen = 0;
    for (size_t i = 0; i < plan->n_banks; i++) {
        n_routed += plan->banks[i].kind == SLU_BANK_ROUTED;
    }
    int code = 0;
    for (size_t i = 0; i < plan->n_banks && code == 0; i++) {
        const struct slu_packer_bank *bank = &plan->banks[i];
        if (bank->kind != SLU_BANK_ROUTED) {
            continue;
        }
        bool is_chosen = seen == 0 || seen == n_routed / 2 || seen + 1 == n_routed;
        seen++;
        uint32_t n = bank->n_experts < SAMPLE_BLOCKS ? bank->n_experts : SAMPLE_BLOCKS;
        if (!is_chosen || m->n_blocks + n > SAMPLES_MAX) {
            continue;
        }
        struct slu_packer_sample samples[SAMPLE_BLOCKS] = {0};
        code = slu_packer_sample_bank(job, bank, n, samples, err);
        for (uint32_t s = 0; s < n; s++) {
            m->blocks[m->n_blocks++].sample = samples[s];
        }
        code = code < 0 ? code : slu_packer_step(job, 0, err);
    }
    struct slu_encoder *encoder = NULL;
    code = code < 0 ? code : slu_encoder_create(&encoder, err);
    for (uint32_t i = 0; i < m->n_blocks && code == 0; i++) {
        code = encode(encoder, &m->blocks[i], err);
    }
    slu_encoder_destroy(encoder);
    return code;
}

static void free_samples(struct measurement *m)
{
    for (uint32_t i = 0; i < m->n_blocks; i++) {
        free(m->blocks[i].sample.raw);
        free(m->blocks[i].stored);
    }
}

/* ---- processor ---------------------------------------------------------------------------- */

static double thread_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Checks, decodes and multiplies one block as a worker of the engine does. */
static double time_block(const struct measurement *m, struct worker *w, const struct block *block,
                         bool is_zstd)
{
    const struct slu_packer_sample *sample = &block->sample;
    /* Each into its own place, as in the cache of experts: writing to memory is part of it. */
    uint8_t *out = w->out + (size_t)(block - m->blocks) * w->out_stride;
    const uint8_t *data = is_zstd ? out : sample->raw;
    struct slu_acts acts;
    slu_acts_init(&acts, 1, sample->shape.n_embd, w->x, sample->shape.n_embd, w->acts_memory);
    m->kern->quantize(&acts, 0, 1);
    double start = thread_s();
    int code = is_zstd ? slu_decode(w->decoder, SLU_CODEC_ZSTD, block->stored, block->stored_bytes,
                                    block->stored_checksum, out, sample->at.bytes, NULL)
                       : slu_decode(w->decoder, SLU_CODEC_RAW, sample->raw, sample->at.bytes,
                                    block->raw_checksum, sample->raw, sample->at.bytes, NULL);
    w->has_failed = w->has_failed || code < 0;
    slu_block_mul(m->kern, &sample->shape, &sample->at, data, SLU_GLU_SILU, &acts, NULL, 1,
                  w->scratch, w->y, sample->shape.n_embd, NULL);
    return thread_s() - start;
}

static void time_share(void *arg, unsigned thread, unsigned n_threads)
{
    struct measurement *m = arg;
    struct worker *w = &m->workers[thread];
    (void)n_threads;
    w->raw_s = w->zstd_s = 0;
    for (uint32_t i = 0; i < m->n_blocks; i++) {
        const struct block *block = &m->blocks[i];
        double raw = time_block(m, w, block, false);
        w->raw_s += raw;
        w->zstd_s += block->stored ? time_block(m, w, block, true) : raw;
    }
}

/* The mean of n threads' seconds in the fastest of some rounds, in each of which all of them are
 * busy but for its end: in the others something else had a part of the caches, the memory or the
 * host. */
static void run_rounds(struct slu_pool *pool, struct measurement *m, unsigned n, double *ret_raw_s,
                       double *ret_zstd_s)
{
    slu_pool_enter(pool);
    for (unsigned round = 0; round < ROUNDS; round++) {
        double raw_s = 0, zstd_s = 0;
        slu_pool_run(pool, time_share, m);
        for (unsigned t = 0; t < n; t++) {
            raw_s += m->workers[t].raw_s / n;
            zstd_s += m->workers[t].zstd_s / n;
        }
        if (round == 0 || raw_s + zstd_s < *ret_raw_s + *ret_zstd_s) {
            *ret_raw_s = raw_s;
            *ret_zstd_s = zstd_s;
        }
    }
    slu_pool_leave(pool);
}

static int init_worker(const struct measurement *m, struct worker *w, struct slu_err *err)
{
    size_t block = 0, acts = 0, scratch = 0;
    uint32_t width = 0;
    for (uint32_t i = 0; i < m->n_blocks; i++) {
        const struct slu_packer_sample *sample = &m->blocks[i].sample;
        size_t its_acts = slu_acts_bytes(1, sample->shape.n_embd);
        size_t its_scratch = slu_block_scratch_bytes(&sample->shape, 1);
        block = sample->at.bytes > block ? sample->at.bytes : block;
        acts = its_acts > acts ? its_acts : acts;
        scratch = its_scratch > scratch ? its_scratch : scratch;
        width = sample->shape.n_embd > width ? sample->shape.n_embd : width;
    }
    w->out_stride = (block + 63) / 64 * 64;
    w->out = slu_packer_alloc(w->out_stride * (m->n_blocks ? m->n_blocks : 1));
    w->acts_memory = slu_packer_alloc(acts);
    w->scratch = slu_packer_alloc(scratch + 64);
    w->x = slu_packer_alloc(width * sizeof(float));
    w->y = slu_packer_alloc(width * sizeof(float));
    if (!w->out || !w->acts_memory || !w->scratch || !w->x || !w->y) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory to measure blocks");
    }
    for (uint32_t i = 0; i < width; i++) {
        w->x[i] = sinf((float)i);
    }
    return slu_decoder_create(&w->decoder, err);
}

static void finish_worker(struct worker *w)
{
    slu_decoder_destroy(w->decoder);
    free(w->out);
    free(w->acts_memory);
    free(w->scratch);
    free(w->x);
    free(w->y);
}

/* On as many cores as will be used, so far as this machine has them. */
static int time_blocks(struct measurement *m, struct slu_codec_costs *costs, struct slu_err *err)
{
    unsigned n = costs->cores < slu_pool_cpus() ? costs->cores : slu_pool_cpus();
    n = n < SLU_POOL_THREADS_MAX ? n : SLU_POOL_THREADS_MAX;
    struct slu_pool *pool = NULL;
    int code = slu_pool_create(n, &pool, err);
    for (unsigned t = 0; t < n && code == 0; t++) {
        code = init_worker(m, &m->workers[t], err);
    }
    double raw_bytes = 0, stored_bytes = 0, raw_s = 0, zstd_s = 0;
    if (code == 0) {
        run_rounds(pool, m, n, &raw_s, &zstd_s);
    }
    for (uint32_t i = 0; i < m->n_blocks; i++) {
        raw_bytes += (double)m->blocks[i].sample.at.bytes;
        stored_bytes += (double)m->blocks[i].stored_bytes;
    }
    for (unsigned t = 0; t < n; t++) {
        struct worker *w = &m->workers[t];
        if (w->has_failed && code == 0) {
            code = slu_err_set(err, SLU_EFORMAT, "a block doesn't decode to what it was made from");
        }
        finish_worker(w);
    }
    slu_pool_destroy(pool);
    costs->ratio = raw_bytes > 0 ? stored_bytes / raw_bytes : 1;
    costs->multiply_bytes_s = raw_s > 0 ? raw_bytes / raw_s : 0;
    costs->unpack_bytes_s = zstd_s > raw_s ? raw_bytes / (zstd_s - raw_s) : 0;
    return code;
}

/* ---- choice ------------------------------------------------------------------------------- */

int slu_packer_choose_codec(struct slu_packer_job *job, const struct slu_packer_input *input,
                            const struct slu_packer_plan *plan, struct slu_err *err)
{
    const struct slu_packer_params *params = job->params;
    struct slu_packer_choice *chosen = &job->report.codec;
    struct slu_codec_costs costs = {
        .flash_bytes_s = params->automatic.flash_bytes_s,
        .cores = params->automatic.cores ? params->automatic.cores : slu_pool_cpus(),
    };
    struct measurement *m = calloc(1, sizeof *m);
    if (!m) {
        return slu_err_set(err, SLU_ENOMEM, "%s: out of memory", params->out);
    }
    m->kern = slu_kern_get(slu_cpu_flags());
    int code = take_samples(job, plan, m, err);
    code = code < 0 ? code : time_blocks(m, &costs, err);
    if (code == 0 && !(costs.flash_bytes_s > 0)) {
        chosen->is_flash_measured = true;
        code = slu_flash_rate(params->out, params->source ? NULL : input->parts[0].source->name,
                              &costs.flash_bytes_s, err);
    }
    if (code == 0) {
        uint32_t n_blocks = m->n_blocks ? slu_bank_blocks(&m->blocks[0].sample.shape) : 1;
        costs.layer_bytes = m->n_blocks ? (double)n_blocks * plan->config.n_used *
                                              (double)m->blocks[0].sample.at.bytes * costs.ratio
                                        : 0;
        chosen->costs = costs;
        chosen->choice = slu_codec_choose(&costs);
        job->codec = chosen->choice.reason == SLU_CODEC_CPU ? SLU_CODEC_RAW : SLU_CODEC_ZSTD;
        slu_pack_writer_set_codec(job->writer, job->codec);
    }
    free_samples(m);
    free(m);
    return code;
}

/* ---- metadata ----------------------------------------------------------------------------- */

static void put(uint8_t **at, const void *data, size_t bytes)
{
    memcpy(*at, data, bytes);
    *at += bytes;
}

static void put_text(uint8_t **at, const char *text)
{
    uint64_t len = strlen(text);
    put(at, &len, sizeof len);
    put(at, text, len);
}

static void put_f32(uint8_t **at, const char *key, double value)
{
    const uint32_t type = 6;
    float number = (float)value;
    put_text(at, key);
    put(at, &type, sizeof type);
    put(at, &number, sizeof number);
}

static void put_string(uint8_t **at, const char *key, const char *value)
{
    const uint32_t type = 8;
    put_text(at, key);
    put(at, &type, sizeof type);
    put_text(at, value);
}

int slu_packer_codec_kvs(const struct slu_packer_choice *choice, const struct slu_gguf *gguf,
                         uint8_t **ret_kvs, size_t *ret_bytes, uint64_t *ret_n, struct slu_err *err)
{
    const size_t room = 1024; /* for eight short keys */
    uint8_t *kvs = malloc(gguf->kv_bytes + room);
    if (!kvs) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for the pack's metadata");
    }
    uint8_t *at = kvs;
    const uint32_t u32 = 4, cores = choice->costs.cores;
    put(&at, gguf->kv_data, gguf->kv_bytes);
    put_string(&at, "sluice.codec.mode", "auto");
    put_string(&at, "sluice.codec.reason", slu_codec_reason_text(choice->choice.reason));
    put_f32(&at, "sluice.codec.share", choice->choice.share);
    put_f32(&at, "sluice.codec.flash_mbps", 1e-6 * choice->costs.flash_bytes_s);
    put_text(&at, "sluice.codec.cores");
    put(&at, &u32, sizeof u32);
    put(&at, &cores, sizeof cores);
    put_f32(&at, "sluice.codec.unpack_mbps", 1e-6 * choice->costs.unpack_bytes_s);
    put_f32(&at, "sluice.codec.multiply_mbps", 1e-6 * choice->costs.multiply_bytes_s);
    put_f32(&at, "sluice.codec.ratio", choice->costs.ratio);
    *ret_kvs = kvs;
    *ret_bytes = (size_t)(at - kvs);
    *ret_n = gguf->kvs.n + 8;
    return 0;
}
