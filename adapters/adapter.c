/*
 * Everything that an adapter is lies in one mapping, so that it is charged in one piece, which can
 * be told from the file alone:
 *
 *     | struct slu_adapter | loras | by_target, for the most layers there can be | matrices |
 *
 * Frames are read and decoded straight to their places by a few threads: decoding is slower than
 * good flash, and who asks for an adapter waits for it.
 */
#include "adapters/adapter.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "adapters/sla.h"
#include "base/arena.h"

#define WORKERS_MAX 4u
/* Stored bytes that one read takes, if more than one frame. A frame never has more. */
#define READ_BYTES SLU_SLA_PIECE_BYTES
/* Below this a thread costs more than it saves. */
#define WORKER_BYTES_MIN (2u << 20)

static size_t align64(size_t bytes)
{
    return (bytes + 63) & ~(size_t)63;
}

/* Where the parts of the mapping begin; the last is its size. */
struct parts {
    size_t loras, by_target, matrices, bytes;
};

static bool lay_out(const struct slu_sla *sla, struct parts *ret_parts)
{
    struct parts p;
    p.loras = align64(sizeof(struct slu_adapter));
    p.by_target = p.loras + align64(sla->info.n_loras * sizeof(struct slu_lora));
    p.matrices = p.by_target + align64(SLU_SLA_LAYERS_MAX * SLU_TARGETS * sizeof(uint32_t));
    if (sla->matrix_bytes > SIZE_MAX / 2) {
        return false;
    }
    p.bytes = p.matrices + (size_t)sla->matrix_bytes;
    *ret_parts = p;
    return true;
}

static int open_index(struct slu_source *source, struct slu_sla *ret_sla, struct parts *ret_parts,
                      struct slu_err *err)
{
    int rc = slu_sla_open(source, ret_sla, err);
    if (rc < 0) {
        return rc;
    }
    if (!lay_out(ret_sla, ret_parts)) {
        slu_sla_finish(ret_sla);
        return slu_err_set(err, SLU_EUNSUP, "%s: is larger than this machine can address",
                           source->name);
    }
    ret_sla->info.memory_bytes = slu_map_charge_bytes(ret_parts->bytes);
    return 0;
}

int slu_adapter_inspect(struct slu_source *source, struct slu_adapter_info *ret_info,
                        struct slu_err *err)
{
    struct slu_sla sla;
    struct parts parts = {0};
    int rc = open_index(source, &sla, &parts, err);
    if (rc < 0) {
        return rc;
    }
    *ret_info = sla.info;
    slu_sla_finish(&sla);
    return 0;
}

static bool is_permuted(const struct slu_adapter_info *info, const struct slu_target_shape *shape)
{
    return info->is_hf_order && shape->permute_heads > 0;
}

/* One record against the base's matrix. */
static int check_shape(const struct slu_adapter_info *info, const struct slu_sla_record *r,
                       const struct slu_base *base, const char *name, struct slu_err *err)
{
    const char *target = slu_target_name((enum slu_target)r->target);
    if (r->layer >= base->n_layers) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: changes %s of layer %u, but the model has %u layers; it was made "
                           "for another model",
                           name, target, r->layer, base->n_layers);
    }
    struct slu_target_shape shape = {0};
    base->shape(base->arg, (enum slu_target)r->target, r->layer, &shape);
    if (shape.n == 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: changes %s of layer %u, which the model doesn't have; it was made "
                           "for another model",
                           name, target, r->layer);
    }
    if (shape.in != r->in || shape.out != r->out) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u is made for %u inputs and %u outputs, but the "
                           "model's has %u and %u",
                           name, target, r->layer, r->in, r->out, shape.in, shape.out);
    }
    if (shape.n != r->n) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u has pairs for %u experts, but the model has %u; "
                           "import it with --base if it leaves the last ones alone",
                           name, target, r->layer, r->n, shape.n);
    }
    if (is_permuted(info, &shape) && r->out % (2 * shape.permute_heads) != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: the %u rows of %s of layer %u don't make %u heads of even width",
                           name, r->out, target, r->layer, shape.permute_heads);
    }
    return 0;
}

static int check_base(const struct slu_sla *sla, const struct slu_base *base, const char *name,
                      struct slu_err *err)
{
    const struct slu_adapter_info *info = &sla->info;
    if (info->arch[0] && base->arch && strcmp(info->arch, base->arch) != 0) {
        return slu_err_set(err, SLU_EUNSUP, "%s: is an adapter for %s, but the model is %s", name,
                           info->arch, base->arch);
    }
    if (info->base_fingerprint && info->base_fingerprint != base->fingerprint) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: belongs to the pack with fingerprint %016llx, and this one has "
                           "%016llx; import it again for this one",
                           name, (unsigned long long)info->base_fingerprint,
                           (unsigned long long)base->fingerprint);
    }
    if (base->n_layers > SLU_SLA_LAYERS_MAX) {
        return slu_err_set(err, SLU_EUNSUP, "%s: models of over %u layers take no adapters", name,
                           SLU_SLA_LAYERS_MAX);
    }
    for (uint32_t i = 0; i < info->n_loras; i++) {
        int rc = check_shape(info, &sla->records[i], base, name, err);
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

/* ---- loading ----------------------------------------------------------------------------- */

struct load {
    struct slu_source *source;
    const struct slu_sla *sla;
    uint8_t *matrices;
    uint64_t *record_at; /* where in the matrices each record begins */
    pthread_mutex_t lock;
    /* Under the lock: the next frame, whose it is, and how much of that is done. */
    uint32_t next, record;
    uint64_t done_bytes;
    struct slu_err err; /* of whoever failed first */
    int rc;
};

/* Frames that one read takes, and where the first belongs. */
struct run {
    uint32_t first, n;
    uint32_t record;
    uint64_t done_bytes;
};

struct worker {
    struct load *load;
    struct slu_decoder *decoder;
    uint8_t *staging; /* READ_BYTES */
    pthread_t thread;
    bool is_started;
};

/* Steps over frame x. */
static void step(const struct slu_sla *sla, uint32_t x, uint32_t *record, uint64_t *done_bytes)
{
    *done_bytes += sla->extents[x].raw_bytes;
    struct slu_mat_layout a, b;
    const struct slu_sla_record *r = &sla->records[*record];
    if (!slu_sla_layouts(r, &a, &b) || *done_bytes == slu_sla_raw_bytes(r, &a, &b)) {
        ++*record;
        *done_bytes = 0;
    }
}

/* False when nothing is left to do. */
static bool take_run(struct load *load, struct run *ret_run)
{
    const struct slu_sla *sla = load->sla;
    pthread_mutex_lock(&load->lock);
    struct run run = {.first = load->next, .record = load->record, .done_bytes = load->done_bytes};
    uint64_t bytes = 0;
    while (load->rc == 0 && load->next < sla->n_extents) {
        uint32_t stored = sla->extents[load->next].stored_bytes;
        if (bytes + stored > READ_BYTES) {
            break;
        }
        bytes += stored;
        step(sla, load->next, &load->record, &load->done_bytes);
        load->next++;
        run.n++;
    }
    pthread_mutex_unlock(&load->lock);
    *ret_run = run;
    return run.n > 0;
}

/* Exponents of all ones are infinities and NaNs: one more in the exponent's lowest place carries
 * into the sign's. Without branches, so that compilers make vectors of it. */
static bool is_finite(const struct slu_fmt *fmt, const uint8_t *data, size_t bytes)
{
    if (fmt->bits == 32) {
        uint32_t carry = 0;
        for (size_t i = 0; i < bytes / 4; i++) {
            uint32_t bits;
            memcpy(&bits, data + 4 * i, sizeof bits);
            carry |= (bits & 0x7f800000u) + 0x00800000u;
        }
        return !(carry & 0x80000000u);
    }
    const uint16_t exponent = fmt->id == SLU_FMT_BF16 ? 0x7f80u : 0x7c00u;
    const uint16_t lowest = fmt->id == SLU_FMT_BF16 ? 0x0080u : 0x0400u;
    uint16_t carry = 0;
    for (size_t i = 0; i < bytes / 2; i++) {
        uint16_t bits;
        memcpy(&bits, data + 2 * i, sizeof bits);
        carry = (uint16_t)(carry | (uint16_t)((bits & exponent) + lowest));
    }
    return !(carry & 0x8000u);
}

/* `bytes` of a record from byte `at` of its own on: first come all A, then all B. */
static int check_numbers(const struct load *load, uint32_t record, uint64_t at, const uint8_t *data,
                         size_t bytes, struct slu_err *err)
{
    const struct slu_sla_record *r = &load->sla->records[record];
    struct slu_mat_layout a, b;
    bool is_valid = slu_sla_layouts(r, &a, &b);
    uint64_t a_bytes = (uint64_t)r->n * a.bytes;
    size_t of_a = at >= a_bytes ? 0 : a_bytes - at < bytes ? (size_t)(a_bytes - at) : bytes;
    if (!is_valid || !is_finite(slu_fmt_get(r->fmt_a), data, of_a) ||
        !is_finite(slu_fmt_get(r->fmt_b), data + of_a, bytes - of_a)) {
        return slu_err_set(
            err, SLU_EFORMAT, "%s: %s of layer %u holds infinities or NaNs; the adapter is broken",
            load->source->name, slu_target_name((enum slu_target)r->target), r->layer);
    }
    return 0;
}

static int load_run(struct worker *worker, const struct run *run, struct slu_err *err)
{
    struct load *load = worker->load;
    const struct slu_sla *sla = load->sla;
    const struct slu_extent *first = &sla->extents[run->first];
    const struct slu_extent *last = &sla->extents[run->first + run->n - 1];
    int rc =
        load->source->read_at(load->source, first->offset, worker->staging,
                              (size_t)(last->offset + last->stored_bytes - first->offset), err);
    uint32_t record = run->record;
    uint64_t done_bytes = run->done_bytes;
    for (uint32_t x = run->first; x < run->first + run->n && rc == 0; x++) {
        const struct slu_extent *e = &sla->extents[x];
        uint8_t *out = load->matrices + load->record_at[record] + done_bytes;
        rc = slu_decode(worker->decoder, (enum slu_codec_id)e->codec,
                        worker->staging + (e->offset - first->offset), e->stored_bytes, e->checksum,
                        out, e->raw_bytes, err);
        if (rc < 0) {
            const struct slu_sla_record *r = &sla->records[record];
            slu_err_prefix(err, "%s: %s of layer %u", load->source->name,
                           slu_target_name((enum slu_target)r->target), r->layer);
            break;
        }
        rc = check_numbers(load, record, done_bytes, out, e->raw_bytes, err);
        step(sla, x, &record, &done_bytes);
    }
    return rc;
}

static void *work(void *arg)
{
    struct worker *worker = arg;
    struct load *load = worker->load;
    struct run run;
    while (take_run(load, &run)) {
        struct slu_err err = {0};
        int rc = load_run(worker, &run, &err);
        if (rc < 0) {
            pthread_mutex_lock(&load->lock);
            if (load->rc == 0) {
                load->rc = rc;
                load->err = err;
            }
            pthread_mutex_unlock(&load->lock);
        }
    }
    return NULL;
}

uint64_t slu_adapter_staging_bytes(void)
{
    return slu_map_charge_bytes(READ_BYTES) + slu_decoder_bytes();
}

static int start_worker(struct worker *worker, struct load *load, struct slu_ledger *ledger,
                        struct slu_err *err)
{
    void *staging = NULL;
    worker->load = load;
    int rc = slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, slu_decoder_bytes(), err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_map_alloc(ledger, SLU_ACCOUNT_IO, READ_BYTES, &staging, err);
    worker->staging = staging;
    if (rc == 0) {
        rc = slu_decoder_create(&worker->decoder, err);
    }
    if (rc < 0) {
        slu_map_free(ledger, SLU_ACCOUNT_IO, worker->staging, READ_BYTES);
        worker->staging = NULL;
        slu_ledger_release(ledger, SLU_ACCOUNT_IO, slu_decoder_bytes());
    }
    return rc;
}

static void finish_worker(struct worker *worker, struct slu_ledger *ledger)
{
    slu_decoder_destroy(worker->decoder);
    slu_map_free(ledger, SLU_ACCOUNT_IO, worker->staging, READ_BYTES);
    slu_ledger_release(ledger, SLU_ACCOUNT_IO, slu_decoder_bytes());
}

/* Runs the load on this thread and as many others as are worth it and the ledger has room for. */
static int run_load(struct load *load, struct slu_ledger *ledger, struct slu_err *err)
{
    struct worker workers[WORKERS_MAX] = {0};
    long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t n_wanted = load->sla->matrix_bytes / WORKER_BYTES_MIN + 1;
    n_wanted = n_cpus > 0 && n_wanted > (uint64_t)n_cpus ? (uint64_t)n_cpus : n_wanted;
    n_wanted = n_wanted > WORKERS_MAX ? WORKERS_MAX : n_wanted;
    int rc = start_worker(&workers[0], load, ledger, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", load->source->name);
        return rc;
    }
    unsigned n = 1;
    while (n < n_wanted && start_worker(&workers[n], load, ledger, NULL) == 0) {
        workers[n].is_started = pthread_create(&workers[n].thread, NULL, work, &workers[n]) == 0;
        n++;
    }
    work(&workers[0]);
    for (unsigned i = 0; i < n; i++) {
        if (workers[i].is_started) {
            pthread_join(workers[i].thread, NULL);
        }
        finish_worker(&workers[i], ledger);
    }
    if (load->rc < 0) {
        slu_err_set(err, load->rc, "%s", load->err.text);
    }
    return load->rc;
}

/* ---- opening ----------------------------------------------------------------------------- */

/* Rows of n_heads heads from Hugging Face's order, in which the first halves of all RoPE pairs come
 * before their second halves, to GGUF's, in which the halves of a pair are neighbours. A head is
 * copied out a stripe of columns at a time, so that a scratch of any size does. */
static void permute_rows(uint8_t *data, size_t row_bytes, uint32_t rows, uint32_t n_heads,
                         uint8_t *scratch, size_t scratch_bytes)
{
    uint32_t width = rows / n_heads;
    size_t stripe = scratch_bytes / width;
    for (uint32_t h = 0; h < n_heads; h++) {
        uint8_t *head = data + (size_t)h * width * row_bytes;
        for (size_t at = 0; at < row_bytes; at += stripe) {
            size_t n = row_bytes - at < stripe ? row_bytes - at : stripe;
            for (uint32_t r = 0; r < width; r++) {
                memcpy(scratch + r * n, head + r * row_bytes + at, n);
            }
            for (uint32_t r = 0; r < width; r++) {
                uint32_t from = r % 2 * (width / 2) + r / 2;
                memcpy(head + r * row_bytes + at, scratch + from * n, n);
            }
        }
    }
}

static int permute(struct slu_adapter *adapter, const struct slu_base *base,
                   struct slu_ledger *ledger, struct slu_err *err)
{
    const size_t scratch_bytes = READ_BYTES;
    void *scratch = NULL;
    int rc = 0;
    for (uint32_t i = 0; i < adapter->info.n_loras && rc == 0; i++) {
        const struct slu_lora *lora = &adapter->loras[i];
        struct slu_target_shape shape = {0};
        base->shape(base->arg, lora->target, lora->layer, &shape);
        if (!is_permuted(&adapter->info, &shape)) {
            continue;
        }
        if (!scratch) {
            rc = slu_map_alloc(ledger, SLU_ACCOUNT_IO, scratch_bytes, &scratch, err);
        }
        if (rc == 0 && lora->b.rows / shape.permute_heads > scratch_bytes) {
            rc = slu_err_set(err, SLU_EUNSUP, "%s of layer %u has heads of %u rows",
                             slu_target_name(lora->target), lora->layer,
                             lora->b.rows / shape.permute_heads);
        }
        for (uint32_t e = 0; e < lora->n && rc == 0; e++) {
            size_t at = (size_t)(lora->b.data - (uint8_t *)adapter->memory) + e * lora->b.at.bytes;
            permute_rows((uint8_t *)adapter->memory + at, lora->b.at.codes_row, lora->b.rows,
                         shape.permute_heads, scratch, scratch_bytes);
        }
    }
    slu_map_free(ledger, SLU_ACCOUNT_IO, scratch, scratch_bytes);
    return rc;
}

/* Fills everything but the numbers. ret_at[i]: where record i begins among the matrices. */
static struct slu_adapter *describe(const struct slu_sla *sla, const struct parts *parts,
                                    uint8_t *memory, uint32_t n_layers, uint64_t *ret_at)
{
    struct slu_adapter *adapter = (struct slu_adapter *)memory;
    *adapter = (struct slu_adapter){
        .info = sla->info,
        .loras = (struct slu_lora *)(memory + parts->loras),
        .by_target = (uint32_t *)(memory + parts->by_target),
        .n_layers = n_layers,
        .memory = memory,
        .memory_bytes = parts->bytes,
    };
    uint64_t at = 0;
    for (uint32_t i = 0; i < sla->info.n_loras; i++) {
        const struct slu_sla_record *r = &sla->records[i];
        struct slu_lora *lora = &adapter->loras[i];
        *lora = (struct slu_lora){
            .target = (enum slu_target)r->target,
            .layer = r->layer,
            .rank = r->rank,
            .n = r->n,
            .scale = r->scale,
        };
        const uint8_t *data = memory + parts->matrices + at;
        slu_mat_view(&lora->a, slu_fmt_get(r->fmt_a), r->rank, r->in, data);
        data += (size_t)r->n * lora->a.at.bytes;
        slu_mat_view(&lora->b, slu_fmt_get(r->fmt_b), r->out, r->rank, data);
        ret_at[i] = at;
        at += r->n * ((uint64_t)lora->a.at.bytes + lora->b.at.bytes);
        adapter->by_target[r->layer * SLU_TARGETS + r->target] = i + 1;
    }
    return adapter;
}

static int load_all(struct slu_source *source, const struct slu_sla *sla, struct parts *parts,
                    const struct slu_base *base, struct slu_ledger *ledger,
                    struct slu_adapter **ret_adapter, struct slu_err *err)
{
    void *memory = NULL;
    uint64_t *record_at = calloc(sla->info.n_loras, sizeof *record_at);
    if (!record_at) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to open it", source->name);
    }
    int rc = slu_map_alloc(ledger, SLU_ACCOUNT_ADAPTERS, parts->bytes, &memory, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", source->name);
        free(record_at);
        return rc;
    }
    struct slu_adapter *adapter = describe(sla, parts, memory, base->n_layers, record_at);
    adapter->ledger = ledger;
    struct load load = {
        .source = source,
        .sla = sla,
        .matrices = (uint8_t *)memory + parts->matrices,
        .record_at = record_at,
    };
    pthread_mutex_init(&load.lock, NULL);
    rc = run_load(&load, ledger, err);
    pthread_mutex_destroy(&load.lock);
    if (rc == 0) {
        rc = permute(adapter, base, ledger, err);
    }
    free(record_at);
    if (rc < 0) {
        slu_adapter_close(adapter);
        return rc;
    }
    *ret_adapter = adapter;
    return 0;
}

int slu_adapter_open(struct slu_source *source, const struct slu_base *base,
                     struct slu_ledger *ledger, struct slu_adapter **ret_adapter,
                     struct slu_err *err)
{
    struct slu_sla sla;
    struct parts parts = {0};
    int rc = open_index(source, &sla, &parts, err);
    if (rc < 0) {
        return rc;
    }
    rc = check_base(&sla, base, source->name, err);
    if (rc == 0) {
        rc = load_all(source, &sla, &parts, base, ledger, ret_adapter, err);
    }
    slu_sla_finish(&sla);
    return rc;
}

void slu_adapter_close(struct slu_adapter *adapter)
{
    if (adapter) {
        slu_map_free(adapter->ledger, SLU_ACCOUNT_ADAPTERS, adapter->memory, adapter->memory_bytes);
    }
}
