#include "adapters/load.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/arena.h"

#define WORKERS_MAX 4u
/* Stored bytes that one read takes, if more than one frame or block: so many that a source leaves
 * nothing of them in the page cache. A frame never has more, a block seldom. */
#define READ_BYTES (2 * SLU_SLA_PIECE_BYTES)
/* Below this a thread costs more than it saves. */
#define WORKER_BYTES_MIN (2u << 20)

/* An extent, frame or block, and what its bytes are. */
struct cursor {
    uint32_t x;          /* index into sla->extents */
    uint32_t record;     /* of a frame: whose it is, and from which of its bytes on */
    uint64_t done_bytes; /* likewise */
    uint32_t layer;      /* of a block: index into sla->layers */
    uint32_t expert;
    uint64_t expert_at; /* of a block: where among all of them */
};

struct load {
    const struct slu_load_params *p;
    size_t staging_bytes;
    pthread_mutex_t lock;
    /* Under the lock: */
    struct cursor next;
    struct slu_err err; /* of whoever failed first */
    int rc;
};

struct worker {
    struct load *load;
    struct slu_decoder *decoder;
    uint8_t *staging; /* staging_bytes, and behind them room for a block that is only checked */
    pthread_t thread;
    bool is_started;
};

static size_t staging_bytes(const struct slu_sla *sla)
{
    return sla->stored_max > READ_BYTES ? sla->stored_max : READ_BYTES;
}

static size_t room_bytes(const struct slu_sla *sla, bool is_check_only)
{
    return staging_bytes(sla) + (is_check_only ? sla->info.block_bytes : 0);
}

uint64_t slu_load_bytes(const struct slu_sla *sla, bool is_check_only)
{
    return slu_map_charge_bytes(room_bytes(sla, is_check_only)) + slu_decoder_bytes();
}

uint64_t slu_adapter_staging_bytes(void)
{
    return slu_map_charge_bytes(READ_BYTES) + slu_decoder_bytes();
}

/* Records of routed experts have no frames. */
static uint32_t skip_experts(const struct slu_sla *sla, uint32_t record)
{
    while (record < sla->info.n_loras && slu_sla_is_expert(sla->records[record].target)) {
        record++;
    }
    return record;
}

static uint64_t pair_bytes(const struct slu_sla_record *record)
{
    struct slu_mat_layout a, b;
    return slu_sla_layouts(record, &a, &b) ? (uint64_t)a.bytes + b.bytes : 0;
}

/* Steps over the cursor's extent. */
static void step(const struct slu_sla *sla, struct cursor *at)
{
    if (at->x++ < sla->n_extents) {
        at->done_bytes += sla->extents[at->x - 1].raw_bytes;
        if (at->done_bytes == pair_bytes(&sla->records[at->record])) {
            at->record = skip_experts(sla, at->record + 1);
            at->done_bytes = 0;
        }
        return;
    }
    const struct slu_sla_layer *l = &sla->layers[at->layer];
    at->expert_at += l->block_bytes;
    if (++at->expert == l->n) {
        at->layer++;
        at->expert = 0;
    }
}

/* What extent x takes in the file. */
static size_t stored_bytes(const struct slu_sla *sla, uint32_t x)
{
    uint32_t bytes = sla->extents[x].stored_bytes;
    return x < sla->n_extents ? bytes : (size_t)slu_sla_page_up(bytes);
}

/* The next extents, as many as one read takes; 0 when nothing is left to do. */
static uint32_t take_run(struct load *load, struct cursor *ret_first)
{
    const struct slu_sla *sla = load->p->sla;
    pthread_mutex_lock(&load->lock);
    *ret_first = load->next;
    bool is_frame = load->next.x < sla->n_extents;
    uint32_t end = is_frame ? sla->n_extents : sla->n_extents + sla->info.n_blocks;
    size_t bytes = 0;
    while (load->rc == 0 && load->next.x < end) {
        bytes += stored_bytes(sla, load->next.x);
        if (bytes > load->staging_bytes) {
            break;
        }
        step(sla, &load->next);
    }
    uint32_t n = load->next.x - ret_first->x;
    pthread_mutex_unlock(&load->lock);
    return n;
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

/* `bytes` of a pair from byte `at` of its own on: first comes A, then B. */
static int check_numbers(const struct load *load, const struct slu_sla_record *r, uint64_t at,
                         const uint8_t *data, size_t bytes, struct slu_err *err)
{
    struct slu_mat_layout a, b;
    bool is_valid = slu_sla_layouts(r, &a, &b);
    size_t of_a = at >= a.bytes ? 0 : a.bytes - at < bytes ? (size_t)(a.bytes - at) : bytes;
    if (!is_valid || !is_finite(slu_fmt_get(r->fmt_a), data, of_a) ||
        !is_finite(slu_fmt_get(r->fmt_b), data + of_a, bytes - of_a)) {
        return slu_err_set(
            err, SLU_EFORMAT, "%s: %s of layer %u holds infinities or NaNs; the adapter is broken",
            load->p->source->name, slu_target_name((enum slu_target)r->target), r->layer);
    }
    return 0;
}

static int check_block(const struct load *load, const struct slu_sla_layer *l, const uint8_t *data,
                       struct slu_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < l->n_records && rc == 0; i++) {
        const struct slu_sla_record *r = &load->p->sla->records[l->first_record + i];
        size_t bytes = (size_t)pair_bytes(r);
        rc = check_numbers(load, r, 0, data, bytes, err);
        data += bytes;
    }
    return rc;
}

/* An extent that has been read. */
static int load_extent(struct worker *worker, const struct cursor *at, const uint8_t *stored,
                       struct slu_err *err)
{
    struct load *load = worker->load;
    const struct slu_load_params *p = load->p;
    const struct slu_extent *e = &p->sla->extents[at->x];
    bool is_frame = at->x < p->sla->n_extents;
    uint8_t *out = is_frame     ? p->matrices + p->record_at[at->record] + at->done_bytes
                   : p->experts ? p->experts + at->expert_at
                                : worker->staging + load->staging_bytes;
    int rc = slu_decode(worker->decoder, (enum slu_codec_id)e->codec, stored, e->stored_bytes,
                        e->checksum, out, e->raw_bytes, err);
    if (is_frame) {
        const struct slu_sla_record *r = &p->sla->records[at->record];
        if (rc < 0) {
            slu_err_prefix(err, "%s: %s of layer %u", p->source->name,
                           slu_target_name((enum slu_target)r->target), r->layer);
            return rc;
        }
        return check_numbers(load, r, at->done_bytes, out, e->raw_bytes, err);
    }
    const struct slu_sla_layer *l = &p->sla->layers[at->layer];
    if (rc < 0) {
        slu_err_prefix(err, "%s: expert %u of layer %u", p->source->name, at->expert, l->layer);
        return rc;
    }
    rc = slu_sla_check_zeros(stored + e->stored_bytes,
                             stored_bytes(p->sla, at->x) - e->stored_bytes, p->source->name, err);
    return rc < 0 ? rc : check_block(load, l, out, err);
}

static int load_run(struct worker *worker, struct cursor at, uint32_t n, struct slu_err *err)
{
    const struct slu_load_params *p = worker->load->p;
    uint64_t offset = p->sla->extents[at.x].offset;
    uint32_t last = at.x + n - 1;
    size_t bytes = (size_t)(p->sla->extents[last].offset - offset) + stored_bytes(p->sla, last);
    int rc = p->source->read_at(p->source, offset, worker->staging, bytes, err);
    for (; n > 0 && rc == 0; n--) {
        const uint8_t *stored = worker->staging + (p->sla->extents[at.x].offset - offset);
        rc = load_extent(worker, &at, stored, err);
        step(p->sla, &at);
    }
    return rc;
}

static void *work(void *arg)
{
    struct worker *worker = arg;
    struct load *load = worker->load;
    struct cursor first;
    uint32_t n;
    while ((n = take_run(load, &first)) > 0) {
        struct slu_err err = {0};
        int rc = load_run(worker, first, n, &err);
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

static int start_worker(struct worker *worker, struct load *load, struct slu_err *err)
{
    const struct slu_load_params *p = load->p;
    struct slu_ledger *ledger = p->ledger;
    size_t bytes = room_bytes(p->sla, !p->experts);
    void *staging = NULL;
    worker->load = load;
    int rc = slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, slu_decoder_bytes(), err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_map_alloc(ledger, SLU_ACCOUNT_IO, bytes, &staging, err);
    worker->staging = staging;
    if (rc == 0) {
        rc = slu_decoder_create(&worker->decoder, err);
    }
    if (rc < 0) {
        slu_map_free(ledger, SLU_ACCOUNT_IO, worker->staging, bytes);
        worker->staging = NULL;
        slu_ledger_release(ledger, SLU_ACCOUNT_IO, slu_decoder_bytes());
    }
    return rc;
}

static void finish_worker(struct worker *worker)
{
    const struct slu_load_params *p = worker->load->p;
    slu_decoder_destroy(worker->decoder);
    slu_map_free(p->ledger, SLU_ACCOUNT_IO, worker->staging, room_bytes(p->sla, !p->experts));
    slu_ledger_release(p->ledger, SLU_ACCOUNT_IO, slu_decoder_bytes());
}

/* Threads that are worth their while. */
static unsigned count_workers(const struct slu_sla *sla)
{
    long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t n = (sla->matrix_bytes + sla->info.expert_bytes) / WORKER_BYTES_MIN + 1;
    n = n_cpus > 0 && n > (uint64_t)n_cpus ? (uint64_t)n_cpus : n;
    return n > WORKERS_MAX ? WORKERS_MAX : (unsigned)n;
}

int slu_load_run(const struct slu_load_params *params, struct slu_err *err)
{
    struct worker workers[WORKERS_MAX] = {0};
    struct load load = {
        .p = params,
        .staging_bytes = staging_bytes(params->sla),
        .next = {.record = skip_experts(params->sla, 0)},
    };
    unsigned n_wanted = count_workers(params->sla);
    int rc = start_worker(&workers[0], &load, err);
    if (rc < 0) {
        slu_err_prefix(err, "%s", params->source->name);
        return rc;
    }
    pthread_mutex_init(&load.lock, NULL);
    unsigned n = 1;
    /* On this thread, and on as many others as the ledger has room for. */
    while (n < n_wanted && start_worker(&workers[n], &load, NULL) == 0) {
        workers[n].is_started = pthread_create(&workers[n].thread, NULL, work, &workers[n]) == 0;
        n++;
    }
    work(&workers[0]);
    for (unsigned i = 0; i < n; i++) {
        if (workers[i].is_started) {
            pthread_join(workers[i].thread, NULL);
        }
        finish_worker(&workers[i]);
    }
    pthread_mutex_destroy(&load.lock);
    if (load.rc < 0) {
        slu_err_set(err, load.rc, "%s", load.err.text);
    }
    return load.rc;
}
