/* Loading on several threads, from a file in memory that can be made to wait. */
#include <criterion/criterion.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "base/pool.h"
#include "model/load.h"

enum { N_PIECES = 40, PIECE_BYTES = 5000, FILE_BYTES = N_PIECES * 8192 };

/* Pieces 3i + 2 are compressed. The read of `waits`, if any, comes back after that of `awaited`. */
struct file {
    struct slu_source source;
    uint8_t bytes[FILE_BYTES];
    struct slu_extent extents[N_PIECES];
    int waits, awaited;
    _Atomic bool has_read_awaited;
};

static int read_at(struct slu_source *source, uint64_t offset, void *buffer, size_t bytes,
                   struct slu_err *err)
{
    struct file *f = (struct file *)source;
    (void)err;
    int piece = (int)(offset / 8192);
    while (piece == f->waits && !f->has_read_awaited) {
        sched_yield();
    }
    memcpy(buffer, f->bytes + offset, bytes);
    if (piece == f->awaited) {
        f->has_read_awaited = true;
    }
    return 0;
}

static uint8_t byte_of(unsigned piece, unsigned i)
{
    return (uint8_t)(piece * 7 + i * i % 11);
}

static void make_file(struct file *f)
{
    struct slu_encoder *encoder;
    cr_assert_eq(slu_encoder_create(&encoder, NULL), 0);
    *f = (struct file){.source = {.read_at = read_at, .size_bytes = FILE_BYTES, .name = "memory"},
                       .waits = -1,
                       .awaited = -1};
    for (unsigned p = 0; p < N_PIECES; p++) {
        uint8_t raw[PIECE_BYTES], *stored = f->bytes + (size_t)p * 8192;
        for (unsigned i = 0; i < PIECE_BYTES; i++) {
            raw[i] = byte_of(p, i);
        }
        struct slu_extent *x = &f->extents[p];
        *x = (struct slu_extent){.offset = (uint64_t)p * 8192,
                                 .stored_bytes = PIECE_BYTES,
                                 .raw_bytes = PIECE_BYTES,
                                 .codec = SLU_CODEC_RAW};
        memcpy(stored, raw, PIECE_BYTES);
        if (p % 3 == 2) {
            int64_t n = slu_encode(encoder, raw, PIECE_BYTES, stored, 8192, NULL);
            cr_assert(n > 0 && n < PIECE_BYTES);
            x->stored_bytes = (uint32_t)n;
            x->codec = SLU_CODEC_ZSTD;
        }
        x->checksum = slu_checksum(stored, x->stored_bytes);
    }
    slu_encoder_destroy(encoder);
}

/* Loads all pieces; ret_peak takes what the ledger held at the most beside what it held before. */
static int load(struct file *f, unsigned n_threads, uint64_t room_bytes, uint64_t limit_bytes,
                uint8_t *ret_bytes, uint64_t *ret_peak, struct slu_err *err)
{
    static const char *const names[] = {"zero", "one", "two", "three", "four", NULL};
    struct slu_pack pack = {
        .source = &f->source, .header = {.n_extents = N_PIECES}, .extents = f->extents};
    struct slu_load_piece pieces[N_PIECES];
    for (uint32_t p = 0; p < N_PIECES; p++) {
        pieces[p] = (struct slu_load_piece){
            .extent = p, .name = names[p < 5 ? p : 5], .at = ret_bytes + (size_t)p * PIECE_BYTES};
    }
    enum { BEFORE = 1000 };
    struct slu_pool *pool;
    cr_assert_eq(slu_pool_create(n_threads, &pool, NULL), 0);
    struct slu_ledger *ledger = slu_ledger_create(BEFORE + limit_bytes);
    cr_assert_eq(slu_ledger_reserve(ledger, SLU_ACCOUNT_TEXT, BEFORE, NULL), 0);
    struct slu_load_params params = {.pack = &pack,
                                     .pieces = pieces,
                                     .n_pieces = N_PIECES,
                                     .stored_bytes_max = PIECE_BYTES,
                                     .pool = pool,
                                     .ledger = ledger,
                                     .used_bytes_max = BEFORE + room_bytes};
    int rc = slu_load(&params, err);
    cr_expect_eq(slu_ledger_used(ledger), BEFORE);
    *ret_peak = slu_ledger_peak(ledger) - BEFORE;
    slu_ledger_release(ledger, SLU_ACCOUNT_TEXT, BEFORE);
    slu_ledger_destroy(ledger);
    slu_pool_destroy(pool);
    return rc;
}

/* Whatever the number of threads all pieces arrive, and no more of them read than there is room
 * for. */
Test(load, fills_every_place)
{
    static struct file f;
    static uint8_t bytes[N_PIECES * PIECE_BYTES];
    make_file(&f);
    uint64_t each = slu_load_charge_bytes(PIECE_BYTES);
    for (unsigned n_threads = 1; n_threads <= 4; n_threads++) {
        for (unsigned n_fit = 0; n_fit <= 5; n_fit++) {
            memset(bytes, 0, sizeof bytes);
            uint64_t peak;
            struct slu_err err = {0};
            cr_assert_eq(load(&f, n_threads, n_fit * each, 1 << 30, bytes, &peak, &err), 0, "%s",
                         err.text);
            unsigned n_loaders = n_fit < 1 ? 1 : n_fit < n_threads ? n_fit : n_threads;
            cr_expect_eq(peak, n_loaders * each);
            for (unsigned p = 0; p < N_PIECES; p++) {
                for (unsigned i = 0; i < PIECE_BYTES; i++) {
                    cr_assert_eq(bytes[p * PIECE_BYTES + i], byte_of(p, i), "piece %u", p);
                }
            }
        }
    }
}

/* Of two bad pieces the first is named, though the second is read before it. */
Test(load, names_the_first_failure, .timeout = 60)
{
    static struct file f;
    static uint8_t bytes[N_PIECES * PIECE_BYTES];
    make_file(&f);
    f.bytes[3 * 8192] ^= 1;
    f.bytes[4 * 8192] ^= 1;
    f.waits = 3;
    f.awaited = 4;
    uint64_t peak;
    struct slu_err err = {0};
    cr_assert_eq(load(&f, 2, 1 << 30, 1 << 30, bytes, &peak, &err), SLU_EFORMAT);
    cr_expect_eq(err.code, SLU_EFORMAT);
    cr_expect_not_null(strstr(err.text, "tensor three: "), "%s", err.text);
}

/* The ledger's limit, below which fewer threads read, and none at all. */
Test(load, stays_within_the_limit)
{
    static struct file f;
    static uint8_t bytes[N_PIECES * PIECE_BYTES];
    make_file(&f);
    uint64_t each = slu_load_charge_bytes(PIECE_BYTES), peak;
    struct slu_err err = {0};
    cr_expect_eq(load(&f, 4, 1 << 30, 3 * each - 1, bytes, &peak, &err), 0, "%s", err.text);
    cr_expect(peak >= 2 * each && peak < 3 * each);
    cr_expect_eq(load(&f, 4, 1 << 30, each - 1, bytes, &peak, &err), SLU_EBUDGET);
    cr_expect_eq(err.code, SLU_EBUDGET);
}
