#include "model/load.h"

#include <stdatomic.h>
#include <stdlib.h>

#include "base/arena.h"

struct loader {
    struct slu_decoder *decoder;
    void *staging;
    size_t failed; /* the piece that this thread could not read; SIZE_MAX: none */
    struct slu_err err;
};

struct load {
    const struct slu_load_params *params;
    struct loader *loaders;
    unsigned n_loaders;
    /* Relaxed both: one hands out indices, the other stops early what would be done in vain. */
    _Atomic size_t next;
    _Atomic bool has_failed;
};

uint64_t slu_load_charge_bytes(size_t stored_bytes_max)
{
    return slu_map_charge_bytes(stored_bytes_max) + slu_decoder_bytes();
}

static void finish_loader(const struct slu_load_params *p, struct loader *loader)
{
    slu_decoder_destroy(loader->decoder);
    slu_map_free(p->ledger, SLU_ACCOUNT_IO, loader->staging, p->stored_bytes_max);
    slu_ledger_release(p->ledger, SLU_ACCOUNT_IO, slu_decoder_bytes());
}

static int init_loader(const struct slu_load_params *p, struct loader *loader, struct slu_err *err)
{
    *loader = (struct loader){.failed = SIZE_MAX};
    int rc = slu_ledger_reserve(p->ledger, SLU_ACCOUNT_IO, slu_decoder_bytes(), err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_map_alloc(p->ledger, SLU_ACCOUNT_IO, p->stored_bytes_max, &loader->staging, err);
    rc = rc < 0 ? rc : slu_decoder_create(&loader->decoder, err);
    if (rc < 0) {
        finish_loader(p, loader);
    }
    return rc;
}

/* One loader in any case, and more of them while there is room. */
static int init_loaders(struct load *load, unsigned n_max, struct slu_err *err)
{
    const struct slu_load_params *p = load->params;
    uint64_t charge = slu_load_charge_bytes(p->stored_bytes_max);
    int rc = init_loader(p, &load->loaders[0], err);
    if (rc < 0) {
        return rc;
    }
    for (load->n_loaders = 1; load->n_loaders < n_max; load->n_loaders++) {
        if (slu_ledger_used(p->ledger) + charge > p->used_bytes_max ||
            init_loader(p, &load->loaders[load->n_loaders], NULL) < 0) {
            break;
        }
    }
    return 0;
}

/* Pieces are taken in order and each is read to its end, so that whatever comes before one that
 * fails has been tried as well. */
static void load_pieces(void *arg, unsigned thread, unsigned n_threads)
{
    (void)n_threads;
    struct load *load = arg;
    const struct slu_load_params *p = load->params;
    if (thread >= load->n_loaders) {
        return;
    }
    struct loader *loader = &load->loaders[thread];
    while (!atomic_load_explicit(&load->has_failed, memory_order_relaxed)) {
        size_t i = atomic_fetch_add_explicit(&load->next, 1, memory_order_relaxed);
        if (i >= p->n_pieces) {
            return;
        }
        const struct slu_load_piece *piece = &p->pieces[i];
        if (slu_pack_read_extent(p->pack, loader->decoder, piece->extent, loader->staging,
                                 piece->at, &loader->err) < 0) {
            if (piece->name) {
                slu_err_prefix(&loader->err, "tensor %s", piece->name);
            }
            loader->failed = i;
            atomic_store_explicit(&load->has_failed, true, memory_order_relaxed);
        }
    }
}

static int first_failure(const struct load *load, struct slu_err *err)
{
    const struct loader *first = &load->loaders[0];
    for (unsigned i = 1; i < load->n_loaders; i++) {
        if (load->loaders[i].failed < first->failed) {
            first = &load->loaders[i];
        }
    }
    return first->failed == SIZE_MAX ? 0 : slu_err_set(err, first->err.code, "%s", first->err.text);
}

int slu_load(const struct slu_load_params *params, struct slu_err *err)
{
    unsigned n_threads = slu_pool_threads(params->pool);
    struct load load = {.params = params, .loaders = calloc(n_threads, sizeof *load.loaders)};
    if (!load.loaders) {
        return slu_err_set(err, SLU_ENOMEM, "out of memory for reading the weights");
    }
    int rc = init_loaders(&load, n_threads, err);
    if (rc == 0) {
        slu_pool_enter(params->pool);
        slu_pool_run(params->pool, load_pieces, &load);
        slu_pool_leave(params->pool);
        rc = first_failure(&load, err);
    }
    for (unsigned i = 0; i < load.n_loaders; i++) {
        finish_loader(params, &load.loaders[i]);
    }
    free(load.loaders);
    return rc;
}
