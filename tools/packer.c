#include "tools/packer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/printable.h"
#include "tools/packer_parts.h"

void *slu_packer_alloc(size_t bytes)
{
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

int slu_packer_step(struct slu_packer_job *job, uint64_t more, struct slu_err *err)
{
    const struct slu_packer_params *params = job->params;
    /* Relaxed: the flag alone carries the message. */
    if (params->cancel && atomic_load_explicit(params->cancel, memory_order_relaxed)) {
        return slu_err_set(err, SLU_ECANCEL, "%s: stopped; nothing was written", params->out);
    }
    if (params->progress) {
        params->progress(params->arg, job->done_bytes + more, job->total_bytes);
    }
    return 0;
}

/* The pack is renamed into place, which would take the place of an input of the same name. */
static int check_output(const struct slu_packer_input *input, const char *out, struct slu_err *err)
{
    struct stat there, part;
    if (stat(out, &there) != 0) {
        return 0;
    }
    for (uint32_t i = 0; i < input->n_parts; i++) {
        const char *name = input->parts[i].source->name;
        if (stat(name, &part) == 0 && part.st_dev == there.st_dev && part.st_ino == there.st_ino) {
            return slu_err_set(err, SLU_EINVAL,
                               "%s: is the model itself; give the pack its own name", out);
        }
    }
    if (!S_ISREG(there.st_mode)) {
        return slu_err_set(err, SLU_EINVAL,
                           "%s: is there and not a file, so no pack can replace it", out);
    }
    return 0;
}

/* Keys that begin so are the pack's own: those of a model would say things about it that aren't so,
 * or be there twice. */
static int check_keys(const struct slu_packer_input *input, struct slu_err *err)
{
    static const char own[] = "sluice.";
    const struct slu_kvs *kvs = &input->parts[0].gguf->kvs;
    for (size_t i = 0; i < kvs->n; i++) {
        struct slu_str key = kvs->pairs[i].key;
        if (key.len >= sizeof own - 1 && !memcmp(key.at, own, sizeof own - 1)) {
            return slu_err_set(
                err, SLU_EFORMAT, "%s: the key %s begins with '%s', as only those of packs may",
                input->parts[0].source->name, slu_printable(key.at, key.len).text, own);
        }
    }
    return 0;
}

static int write_pack(struct slu_packer_job *job, const struct slu_packer_plan *plan,
                      const struct slu_gguf *gguf, struct slu_err *err)
{
    int code = slu_packer_step(job, 0, err);
    for (size_t i = 0; i < plan->n_dense && code == 0; i++) {
        code = slu_packer_write_dense(job, &plan->dense[i], err);
    }
    for (size_t i = 0; i < plan->n_banks && code == 0; i++) {
        code = slu_packer_write_bank(job, &plan->banks[i], err);
    }
    if (code < 0) {
        return code;
    }
    if (!job->params->automatic.is_on) {
        return slu_pack_writer_finish(job->writer, gguf->kv_data, gguf->kv_bytes, gguf->kvs.n, err);
    }
    uint8_t *kvs;
    size_t bytes;
    uint64_t n;
    code = slu_packer_codec_kvs(&job->report.codec, gguf, &kvs, &bytes, &n, err);
    if (code == 0) {
        code = slu_pack_writer_finish(job->writer, kvs, bytes, n, err);
        free(kvs);
    }
    return code;
}

int slu_packer_run(const struct slu_packer_params *params, struct slu_packer_report *ret_report,
                   struct slu_err *err)
{
    struct slu_packer_input input = {0};
    struct slu_packer_plan plan = {0};
    struct slu_packer_job job = {
        .params = params,
        .codec = params->automatic.is_on ? SLU_CODEC_ZSTD : params->codec,
    };
    int code;
    if ((code = slu_packer_input_open(params->in, params->source, &input, err)) < 0 ||
        (code = slu_packer_plan_make(&input, params->block_bytes, &plan, err)) < 0 ||
        (code = check_output(&input, params->out, err)) < 0 ||
        (code = check_keys(&input, err)) < 0 ||
        (code = slu_pack_writer_create(params->out, job.codec, &job.writer, err)) < 0) {
        goto out;
    }
    job.total_bytes = input.weight_bytes;
    if (params->importance &&
        (code = slu_importance_read(params->importance, &job.importance, err)) < 0) {
        goto out;
    }
    if (params->automatic.is_on && (code = slu_packer_choose_codec(&job, &input, &plan, err)) < 0) {
        goto out;
    }
    if ((code = write_pack(&job, &plan, input.parts[0].gguf, err)) < 0) {
        goto out;
    }
    struct stat written;
    job.report.in_bytes = input.file_bytes;
    job.report.out_bytes = stat(params->out, &written) == 0 ? (uint64_t)written.st_size : 0;
    job.report.quant_error =
        job.report.quant_weights ? sqrt(job.quant_error2 / (double)job.report.quant_weights) : 0;
    if (ret_report) {
        *ret_report = job.report;
    }

out:
    slu_packer_crew_finish(&job.crew);
    slu_importance_destroy(job.importance);
    slu_pack_writer_destroy(job.writer);
    slu_packer_plan_finish(&plan);
    slu_packer_input_close(&input);
    return code;
}
