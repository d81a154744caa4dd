#include "model/embed.h"

#include <inttypes.h>
#include <string.h>

#include "base/arena.h"

static struct slu_ring_params ring_params(uint32_t n_slots, enum slu_io_backend backend)
{
    return (struct slu_ring_params){.backend = backend, .depth = n_slots, .n_threads = 2};
}

/* Row strides are multiples of 64, so a row may begin anywhere in a page. */
static uint32_t slot_bytes(const struct slu_weights *w)
{
    uint32_t across = w->embedding.row_stride + SLU_IO_ALIGN - 64;
    return (across + SLU_IO_ALIGN - 1) / SLU_IO_ALIGN * SLU_IO_ALIGN;
}

uint64_t slu_embed_charge_bytes(const struct slu_weights *weights, uint32_t n_slots,
                                enum slu_io_backend backend)
{
    if (weights->is_tied) {
        return 0;
    }
    struct slu_ring_params params = ring_params(n_slots, backend);
    return slu_map_charge_bytes((size_t)n_slots * slot_bytes(weights)) + slu_ring_bytes(&params);
}

int slu_embed_init(struct slu_embed *embed, const struct slu_weights *weights, const char *path,
                   uint32_t n_slots, enum slu_io_backend backend, const struct slu_kern *kern,
                   struct slu_ledger *ledger, struct slu_err *err)
{
    *embed =
        (struct slu_embed){.weights = weights, .kern = kern, .n_slots = n_slots, .ledger = ledger};
    if (weights->is_tied) {
        return 0;
    }
    embed->slot_bytes = slot_bytes(weights);
    struct slu_ring_params params = ring_params(n_slots, backend);
    void *staging;
    int rc =
        slu_map_alloc(ledger, SLU_ACCOUNT_IO, (size_t)n_slots * embed->slot_bytes, &staging, err);
    if (rc < 0) {
        return rc;
    }
    embed->staging = staging;
    uint64_t bytes = slu_ring_bytes(&params);
    rc = slu_ledger_reserve(ledger, SLU_ACCOUNT_IO, bytes, err);
    if (rc == 0) {
        embed->ring_bytes = bytes;
        struct slu_io_range range = {staging, (size_t)n_slots * embed->slot_bytes};
        params.ranges = &range;
        params.n_ranges = 1;
        rc = slu_ring_open(path, &params, &embed->ring, err);
    }
    if (rc < 0) {
        slu_embed_finish(embed);
    }
    return rc;
}

void slu_embed_finish(struct slu_embed *embed)
{
    slu_ring_destroy(embed->ring);
    if (embed->ring_bytes) {
        slu_ledger_release(embed->ledger, SLU_ACCOUNT_IO, embed->ring_bytes);
    }
    if (embed->staging) {
        slu_map_free(embed->ledger, SLU_ACCOUNT_IO, embed->staging,
                     (size_t)embed->n_slots * embed->slot_bytes);
    }
    *embed = (struct slu_embed){0};
}

static uint64_t row_offset(const struct slu_embed *embed, int32_t id)
{
    return embed->weights->embedding_offset + (uint64_t)id * embed->weights->embedding.row_stride;
}

/* Takes the n reads in flight off the ring; 0 or the first one's error. */
static int drain(struct slu_embed *embed, const int32_t *ids, uint32_t n, struct slu_err *err)
{
    int rc = 0;
    int32_t failed = -1;
    while (n > 0) {
        struct slu_read_done done[16];
        int got = embed->ring->wait(embed->ring, done, 16, true);
        if (got <= 0) {
            return slu_err_set(err, SLU_EIO, "reading embedding rows failed");
        }
        for (int i = 0; i < got; i++) {
            if (rc == 0 && done[i].result < 0) {
                rc = done[i].result;
                failed = ids[done[i].tag];
            }
        }
        n -= (uint32_t)got;
    }
    if (rc < 0) {
        return slu_err_set(err, rc,
                           "embedding row %d at offset %" PRIu64
                           " can't be read: the device failed or the file has become shorter",
                           (int)failed, row_offset(embed, failed));
    }
    return 0;
}

static int read_rows(struct slu_embed *embed, const int32_t *ids, uint32_t n, struct slu_err *err)
{
    uint32_t stride = embed->weights->embedding.row_stride, submitted = 0;
    int rc = 0;
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        uint64_t at = row_offset(embed, ids[i]), page = at & ~(uint64_t)(SLU_IO_ALIGN - 1);
        uint64_t end = (at + stride + SLU_IO_ALIGN - 1) & ~(uint64_t)(SLU_IO_ALIGN - 1);
        struct slu_read read = {.buffer = embed->staging + (size_t)i * embed->slot_bytes,
                                .offset = page,
                                .bytes = (uint32_t)(end - page),
                                .tag = i};
        rc = embed->ring->submit(embed->ring, &read, err);
        if (rc == 0) {
            submitted++;
            atomic_fetch_add_explicit(&embed->flash_bytes, read.bytes, memory_order_relaxed);
        }
    }
    int drained = drain(embed, ids, submitted, rc < 0 ? NULL : err);
    return rc < 0 ? rc : drained;
}

/* As slu_embed_rows, of n_slots rows at most. */
static int some_rows(struct slu_embed *embed, const int32_t *ids, uint32_t n, float *x,
                     struct slu_err *err)
{
    const struct slu_weights *w = embed->weights;
    uint32_t cols = w->config.n_embd;
    int rc = w->is_tied ? 0 : read_rows(embed, ids, n, err);
    if (rc < 0) {
        return rc;
    }
    for (uint32_t i = 0; i < n; i++) {
        float *out = x + (size_t)i * cols;
        if (w->is_tied) {
            embed->kern->row_f32(out, &w->head, (uint32_t)ids[i]);
        } else {
            const uint8_t *row = embed->staging + (size_t)i * embed->slot_bytes +
                                 row_offset(embed, ids[i]) % SLU_IO_ALIGN;
            struct slu_mat mat;
            slu_mat_view(&mat, slu_fmt_get(w->embedding.fmt), 1, cols, row);
            uint32_t sum;
            memcpy(&sum, row + mat.at.bytes, sizeof sum);
            if (sum != (uint32_t)slu_checksum(row, mat.at.bytes)) {
                return slu_err_set(err, SLU_EFORMAT,
                                   "embedding row %d at offset %" PRIu64
                                   " is corrupt: its checksum doesn't match",
                                   (int)ids[i], row_offset(embed, ids[i]));
            }
            embed->kern->row_f32(out, &mat, 0);
        }
        if (w->config.embd_scale != 1.0f) {
            for (uint32_t c = 0; c < cols; c++) {
                out[c] *= w->config.embd_scale;
            }
        }
    }
    return 0;
}

int slu_embed_rows(struct slu_embed *embed, const int32_t *ids, uint32_t n, float *x,
                   struct slu_err *err)
{
    int rc = 0;
    for (uint32_t i = 0; i < n && rc == 0; i += embed->n_slots) {
        uint32_t some = n - i < embed->n_slots ? n - i : embed->n_slots;
        rc = some_rows(embed, ids + i, some, x + (size_t)i * embed->weights->config.n_embd, err);
    }
    return rc;
}
