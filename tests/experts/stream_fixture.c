#include "stream_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const enum slu_io_backend stream_backends[2] = {SLU_IO_URING, SLU_IO_PREAD};

/* What block b holds: of few values, so that zstd compresses it. */
static unsigned char byte_of(uint32_t block, uint32_t i)
{
    uint32_t x = (i + 1) * 2654435761u ^ (block + 1) * 40503u;
    x ^= x >> 15;
    x *= 2246822519u;
    return (unsigned char)(x >> 28 & x >> 24);
}

/* A file of extents, every third of them raw. */
static void write_file(struct stream_fixture *f)
{
    snprintf(f->path, sizeof f->path, "/tmp/slu-test-stream-XXXXXX");
    int fd = mkstemp(f->path);
    cr_assert_geq(fd, 0);
    struct slu_encoder *encoder;
    cr_assert_eq(slu_encoder_create(&encoder, NULL), 0);
    uint64_t offset = SLU_PACK_ALIGN;
    for (uint32_t b = 0; b < N_EXTENTS; b++) {
        uint32_t raw_bytes = b < N_BLOCKS ? SLOT_BYTES - 211 * b : 2 * SLOT_BYTES;
        unsigned char *raw = malloc(raw_bytes);
        for (uint32_t i = 0; i < raw_bytes; i++) {
            raw[i] = byte_of(b, i);
        }
        size_t bound = slu_encode_bound(raw_bytes);
        unsigned char *stored = malloc(bound);
        int64_t n = raw_bytes;
        enum slu_codec_id codec = b % 3 == 0 ? SLU_CODEC_RAW : SLU_CODEC_ZSTD;
        if (codec == SLU_CODEC_RAW) {
            memcpy(stored, raw, raw_bytes);
        } else {
            n = slu_encode(encoder, raw, raw_bytes, stored, bound, NULL);
            cr_assert(n > 0 && n < raw_bytes);
        }
        f->extents[b] = (struct slu_extent){
            .offset = offset,
            .checksum = slu_checksum(stored, (size_t)n),
            .stored_bytes = (uint32_t)n,
            .raw_bytes = raw_bytes,
            .codec = codec,
        };
        cr_assert_eq(pwrite(fd, stored, (size_t)n, (off_t)offset), n);
        offset += ((uint64_t)n + SLU_PACK_ALIGN - 1) / SLU_PACK_ALIGN * SLU_PACK_ALIGN;
        free(stored);
        free(raw);
    }
    cr_assert_eq(ftruncate(fd, (off_t)offset), 0);
    close(fd);
    slu_encoder_destroy(encoder);
}

void stream_setup(struct stream_fixture *f)
{
    memset(f, 0, sizeof *f);
    write_file(f);
    f->ledger = slu_ledger_create(0);
    f->params = (struct slu_stream_params){
        .path = f->path,
        .extents = f->extents,
        .n_extents = N_EXTENTS,
        .n_slots = N_BLOCKS,
        .n_blocks = N_BLOCKS,
        .slot_bytes = SLOT_BYTES,
        .round_blocks_max = ROUND_MAX,
        .n_workers = 1,
        .ledger = f->ledger,
    };
}

void stream_teardown(struct stream_fixture *f)
{
    slu_ledger_destroy(f->ledger); /* asserts that all came back */
    unlink(f->path);
}

bool stream_open(struct stream_fixture *f, enum slu_io_backend backend, uint32_t n_slots,
                 uint32_t n_workers)
{
    f->params.backend = backend;
    f->params.n_slots = n_slots;
    f->params.n_workers = n_workers;
    struct slu_err err;
    int e = slu_stream_create(&f->params, &f->stream, &err);
    if (e == SLU_EUNSUP && backend == SLU_IO_URING) {
        fprintf(stderr, "skipped on io_uring: %s\n", err.text);
        return false;
    }
    cr_assert_eq(e, 0, "%s", err.text);
    return true;
}

void stream_round_work(void *arg, unsigned thread, unsigned n_threads)
{
    struct stream_round *round = arg;
    struct slu_stream_item item;
    int got;
    (void)n_threads;
    while ((got = slu_stream_next(round->stream, thread, &item)) == 1) {
        uint32_t block = round->blocks[item.index];
        const unsigned char *data = item.data;
        uint32_t n_wrong = (uintptr_t)data % 4096 != 0;
        for (uint32_t i = 0; i < round->extents[block].raw_bytes; i++) {
            n_wrong += data[i] != byte_of(block, i);
        }
        atomic_fetch_add(&round->n_seen[item.index], 1);
        atomic_fetch_add(&round->n_wrong, n_wrong);
        slu_stream_done(round->stream, &item);
    }
    round->results[thread] = got;
}

int stream_round_run(struct stream_fixture *f, struct slu_pool *pool, const uint32_t *blocks,
                     uint32_t n, struct slu_err *err)
{
    struct stream_round round = {.stream = f->stream, .extents = f->extents, .blocks = blocks};
    cr_assert_eq(slu_stream_begin(f->stream, blocks, n, err), 0, "%s", err->text);
    slu_pool_run(pool, stream_round_work, &round);
    int e = slu_stream_end(f->stream, err);
    cr_assert_eq(round.n_wrong, 0);
    for (uint32_t i = 0; i < n; i++) {
        cr_assert(e < 0 ? round.n_seen[i] <= 1 : round.n_seen[i] == 1);
    }
    for (unsigned t = 0; t < slu_pool_threads(pool); t++) {
        cr_assert(round.results[t] == 0 || round.results[t] == e);
    }
    return e;
}
