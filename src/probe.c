/*
 * What bounds the engine, measured on the spot: the flash by reading the pack as the stream does,
 * memory by reading more than the caches hold, byte products from registers, decoding from blocks
 * of the pack. A busy machine only ever takes away, so processors are measured in short rounds of
 * which the best counts. Flash may be throttled, and memory that a host's other guests use comes in
 * bursts shorter than a token takes: theirs is the average over a second or so, which other work
 * lowers, and which a phase in a better second may exceed.
 */
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#include "base/arena.h"
#include "base/clock.h"
#include "base/cpu.h"
#include "engine.h"
#include "experts/stream.h"
#include "kern/peak.h"
#include "probe.h"

#define FLASH_BYTES_MAX (32u << 20) /* of buffers */
#define FLASH_DEPTH_MAX 32u
#define FLASH_WARM_NS   300000000u /* until bursts that a throttle grants are over */
#define FLASH_NS        1000000000u
#define ROUNDS_NS       400000000u /* of each measurement that is made in rounds */
#define MAC_ROUNDS      400000u
#define UNPACK_BLOCKS   8u

struct probe {
    const struct slu_weights *weights;
    const struct slu_pack *pack;
    const char *path;
    struct slu_plan_input input;
    struct slu_ledger *ledger;
    struct slu_pool *pool;
    const char *kernels;
    uint64_t random;
};

/* xorshift64 (Marsaglia). */
static uint64_t next_random(struct probe *p)
{
    p->random ^= p->random << 13;
    p->random ^= p->random >> 7;
    p->random ^= p->random << 17;
    return p->random;
}

/* ---- flash -------------------------------------------------------------------------------- */

/* Walks experts chosen at random, block after block, as the stream asks for them. */
struct walk {
    uint32_t extent, n_left;
};

static uint32_t next_extent(struct probe *p, struct walk *walk)
{
    const struct slu_weights *w = p->weights;
    while (walk->n_left == 0) {
        const struct slu_bank *bank = &w->layers[next_random(p) % w->config.n_layers].routed;
        if (bank->n_experts > 0) {
            uint32_t expert = (uint32_t)(next_random(p) % bank->n_experts);
            walk->extent = bank->first_extent + expert * bank->n_blocks;
            walk->n_left = bank->n_blocks;
        }
    }
    walk->n_left--;
    return walk->extent++;
}

static uint32_t pages_of(const struct slu_extent *extent)
{
    return (extent->stored_bytes + SLU_IO_ALIGN - 1) / SLU_IO_ALIGN * SLU_IO_ALIGN;
}

struct flash_run {
    struct slu_ring *ring;
    uint8_t *buffers;
    uint32_t depth, buffer_bytes;
    uint32_t in_flight_bytes[FLASH_DEPTH_MAX];
};

static int submit(struct probe *p, struct flash_run *run, struct walk *walk, uint32_t slot,
                  struct slu_err *err)
{
    const struct slu_extent *extent = &p->pack->extents[next_extent(p, walk)];
    run->in_flight_bytes[slot] = pages_of(extent);
    struct slu_read read = {.buffer = run->buffers + (size_t)slot * run->buffer_bytes,
                            .offset = extent->offset,
                            .bytes = run->in_flight_bytes[slot],
                            .tag = slot};
    return run->ring->submit(run->ring, &read, err);
}

/* Keeps the queue full; counts what is completed from the end of the warming up to the last
 * completion. */
static int time_flash(struct probe *p, struct flash_run *run, double *ret_bytes_s,
                      struct slu_err *err)
{
    struct walk walk = {0};
    int rc = 0;
    for (uint32_t slot = 0; slot < run->depth && rc == 0; slot++) {
        rc = submit(p, run, &walk, slot, err);
    }
    uint64_t start_ns = slu_now_ns(), from_ns = 0, now_ns = start_ns, bytes = 0;
    while (rc == 0 && (from_ns == 0 || now_ns - from_ns < FLASH_NS)) {
        struct slu_read_done done[FLASH_DEPTH_MAX];
        int n = run->ring->wait(run->ring, done, FLASH_DEPTH_MAX, true);
        now_ns = slu_now_ns();
        for (int i = 0; i < n && rc == 0; i++) {
            bytes += run->in_flight_bytes[done[i].tag];
            rc = done[i].result < 0 ? slu_err_set(err, SLU_EIO, "%s: can't be read", p->path)
                                    : submit(p, run, &walk, (uint32_t)done[i].tag, err);
        }
        if (from_ns == 0 && now_ns - start_ns >= FLASH_WARM_NS) {
            from_ns = now_ns;
            bytes = 0;
        }
    }
    if (rc == 0) {
        *ret_bytes_s = 1e9 * (double)bytes / (double)(now_ns - from_ns);
    }
    return rc;
}

static int probe_flash(struct probe *p, struct slu_probe *probe, struct slu_err *err)
{
    if (p->weights->n_blocks == 0) {
        return 0;
    }
    struct flash_run run = {0};
    for (uint32_t i = p->weights->first_block; i < p->weights->end_block; i++) {
        uint32_t bytes = pages_of(&p->pack->extents[i]);
        run.buffer_bytes = bytes > run.buffer_bytes ? bytes : run.buffer_bytes;
    }
    run.depth = FLASH_BYTES_MAX / run.buffer_bytes;
    run.depth = run.depth < 1 ? 1 : run.depth > FLASH_DEPTH_MAX ? FLASH_DEPTH_MAX : run.depth;
    size_t bytes = (size_t)run.depth * run.buffer_bytes;
    void *buffers;
    int rc = slu_map_alloc(p->ledger, SLU_ACCOUNT_IO, bytes, &buffers, err);
    if (rc < 0) {
        return rc;
    }
    run.buffers = buffers;
    struct slu_io_range range = {buffers, bytes};
    struct slu_ring_params params = {
        .backend = p->input.backend, .depth = run.depth, .ranges = &range, .n_ranges = 1};
    rc = slu_ring_open(p->path, &params, &run.ring, err);
    if (rc == 0) {
        rc = time_flash(p, &run, &probe->flash_bytes_s, err);
        slu_ring_destroy(run.ring);
    }
    slu_map_free(p->ledger, SLU_ACCOUNT_IO, buffers, bytes);
    probe->flash_depth = run.depth;
    probe->flash_read_bytes = run.buffer_bytes;
    return rc;
}

/* ---- memory and processor ----------------------------------------------------------------- */

/* One round of a measurement on all threads. */
struct round {
    struct probe *probe;
    _Atomic uint64_t done; /* multiply-adds, or bytes decoded; relaxed: the pool's barrier orders */
    /* Decoding: */
    const uint32_t *extents;
    const uint8_t *const *stored;
    uint32_t n_stored;
    uint8_t *out; /* out_bytes for each thread */
    size_t out_bytes;
    struct slu_decoder **decoders;
    atomic_bool has_failed;
};

/* What it did a second, in the best of several rounds. */
static double time_rounds(struct round *round, slu_pool_fn fn)
{
    double best = 0;
    uint64_t start_ns = slu_now_ns(), now_ns = start_ns;
    while (now_ns - start_ns < ROUNDS_NS) {
        uint64_t from_ns = now_ns;
        atomic_store_explicit(&round->done, 0, memory_order_relaxed);
        slu_pool_enter(round->probe->pool);
        slu_pool_run(round->probe->pool, fn, round);
        slu_pool_leave(round->probe->pool);
        now_ns = slu_now_ns();
        double done = (double)atomic_load_explicit(&round->done, memory_order_relaxed);
        double rate = 1e9 * done / (double)(now_ns - from_ns);
        best = rate > best ? rate : best;
    }
    return best;
}

/* As much of that as the user grants. */
static size_t ram_bytes(const struct probe *p)
{
    size_t bytes = slu_probe_ram_bytes();
    bytes = bytes > p->input.ram_bytes ? (size_t)p->input.ram_bytes : bytes;
    return (bytes < SLU_PROBE_GRAIN ? SLU_PROBE_GRAIN : bytes) / SLU_PROBE_GRAIN * SLU_PROBE_GRAIN;
}

static int probe_ram(struct probe *p, struct slu_probe *probe, struct slu_err *err)
{
    size_t bytes = ram_bytes(p);
    void *data;
    int rc = slu_map_alloc(p->ledger, SLU_ACCOUNT_SCRATCH, bytes, &data, err);
    if (rc < 0) {
        return rc;
    }
    memset(data, 1, bytes);
    for (unsigned n_streams = 1; n_streams <= 4; n_streams *= 2) {
        uint64_t done = 0, ns = 0;
        while (ns < ROUNDS_NS) {
            ns += slu_probe_read(p->pool, p->kernels, data, bytes, n_streams);
            done += bytes;
        }
        double rate = 1e9 * (double)done / (double)ns;
        probe->ram_bytes_s = rate > probe->ram_bytes_s ? rate : probe->ram_bytes_s;
    }
    slu_map_free(p->ledger, SLU_ACCOUNT_SCRATCH, data, bytes);
    return 0;
}

static void mac_share(void *arg, unsigned thread, unsigned n_threads)
{
    struct round *round = arg;
    (void)thread;
    (void)n_threads;
    atomic_fetch_add_explicit(&round->done, slu_peak_macs(round->probe->kernels, MAC_ROUNDS),
                              memory_order_relaxed);
}

static void probe_macs(struct probe *p, struct slu_probe *probe)
{
    if (slu_peak_macs(p->kernels, 1) > 0) {
        struct round round = {.probe = p};
        probe->macs_s = time_rounds(&round, mac_share);
    }
}

/* ---- decoding ----------------------------------------------------------------------------- */

static void unpack_share(void *arg, unsigned thread, unsigned n_threads)
{
    struct round *round = arg;
    (void)n_threads;
    for (uint32_t i = 0; i < round->n_stored; i++) {
        const struct slu_extent *extent = &round->probe->pack->extents[round->extents[i]];
        int rc = slu_decode(round->decoders[thread], (enum slu_codec_id)extent->codec,
                            round->stored[i], extent->stored_bytes, extent->checksum,
                            round->out + thread * round->out_bytes, extent->raw_bytes, NULL);
        if (rc < 0) {
            atomic_store_explicit(&round->has_failed, true, memory_order_relaxed);
            return;
        }
        atomic_fetch_add_explicit(&round->done, extent->raw_bytes, memory_order_relaxed);
    }
}

/* Compressed blocks at random; fewer where few are. */
static uint32_t choose_compressed(struct probe *p, uint32_t *ret_extents, size_t *ret_raw_max)
{
    struct walk walk = {0};
    uint32_t n = 0;
    *ret_raw_max = 0;
    for (unsigned tries = 0; p->weights->n_blocks && tries < 64 && n < UNPACK_BLOCKS; tries++) {
        uint32_t i = next_extent(p, &walk);
        const struct slu_extent *extent = &p->pack->extents[i];
        if (extent->codec != SLU_CODEC_RAW) {
            ret_extents[n++] = i;
            *ret_raw_max = extent->raw_bytes > *ret_raw_max ? extent->raw_bytes : *ret_raw_max;
        }
    }
    return n;
}

static int time_unpack(struct probe *p, struct round *round, uint8_t *memory, double *ret_bytes_s,
                       struct slu_err *err)
{
    const uint8_t *stored[UNPACK_BLOCKS];
    struct slu_decoder *decoders[SLU_POOL_THREADS_MAX] = {0};
    unsigned n_threads = slu_pool_threads(p->pool);
    int rc = 0;
    for (uint32_t i = 0; i < round->n_stored && rc == 0; i++) {
        const struct slu_extent *extent = &p->pack->extents[round->extents[i]];
        stored[i] = memory;
        rc = p->pack->source->read_at(p->pack->source, extent->offset, memory, extent->stored_bytes,
                                      err);
        memory += pages_of(extent);
    }
    for (unsigned t = 0; t < n_threads && rc == 0; t++) {
        rc = slu_decoder_create(&decoders[t], err);
    }
    if (rc == 0) {
        round->stored = stored;
        round->out = memory;
        round->decoders = decoders;
        *ret_bytes_s = time_rounds(round, unpack_share);
        if (atomic_load_explicit(&round->has_failed, memory_order_relaxed)) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: a block is corrupt", p->path);
        }
    }
    for (unsigned t = 0; t < n_threads; t++) {
        slu_decoder_destroy(decoders[t]);
    }
    return rc;
}

static int probe_unpack(struct probe *p, struct slu_probe *probe, struct slu_err *err)
{
    uint32_t extents[UNPACK_BLOCKS];
    struct round round = {.probe = p, .extents = extents};
    round.n_stored = choose_compressed(p, extents, &round.out_bytes);
    if (round.n_stored == 0) {
        return 0;
    }
    round.out_bytes = (round.out_bytes + 63) / 64 * 64;
    size_t bytes = slu_pool_threads(p->pool) * round.out_bytes;
    for (uint32_t i = 0; i < round.n_stored; i++) {
        bytes += pages_of(&p->pack->extents[extents[i]]);
    }
    void *memory;
    int rc = slu_map_alloc(p->ledger, SLU_ACCOUNT_IO, bytes, &memory, err);
    if (rc == 0) {
        rc = time_unpack(p, &round, memory, &probe->unpack_bytes_s, err);
        slu_map_free(p->ledger, SLU_ACCOUNT_IO, memory, bytes);
    }
    return rc;
}

/* ---- all of them -------------------------------------------------------------------------- */

int slu_probe_run(const char *path, const struct slu_engine_params *params,
                  struct slu_probe *ret_probe, struct slu_err *err)
{
    struct slu_pack *pack = NULL;
    struct slu_weights weights;
    struct slu_probe result = {0};
    int rc = slu_pack_open_file(path, &pack, err);
    if (rc < 0) {
        return rc;
    }
    rc = slu_weights_describe(pack, &weights, err);
    if (rc < 0) {
        slu_pack_close(pack);
        return rc;
    }
    struct probe p = {.weights = &weights,
                      .pack = pack,
                      .path = path,
                      .kernels = slu_kern_get(slu_cpu_flags())->name,
                      .random = slu_now_ns() | 1};
    slu_plan_resolve(params, pack, &weights, &p.input);
    p.ledger = slu_ledger_create(0);
    rc = p.ledger ? 0 : slu_err_set(err, SLU_ENOMEM, "out of memory for a ledger");
    rc = rc < 0 ? rc : slu_pool_create(p.input.n_threads, &p.pool, err);
    rc = rc < 0 ? rc : probe_flash(&p, &result, err);
    rc = rc < 0 ? rc : probe_ram(&p, &result, err);
    rc = rc < 0 ? rc : probe_unpack(&p, &result, err);
    if (rc == 0) {
        probe_macs(&p, &result);
        *ret_probe = result;
    }
    slu_pool_destroy(p.pool);
    slu_ledger_destroy(p.ledger);
    slu_weights_finish(&weights);
    slu_pack_close(pack);
    return rc;
}

/* Seconds a token, 0 where the rate isn't known. */
static double seconds(uint64_t amount, uint64_t n_tokens, double rate)
{
    return rate > 0 ? (double)amount / (double)n_tokens / rate : 0;
}

void slu_bound_of(const struct slu_phase_stats *phase, const struct slu_probe *probe,
                  struct slu_bound *ret_bound)
{
    struct slu_bound bound = {.by = "nothing"};
    if (phase->n_tokens > 0) {
        uint64_t n = phase->n_tokens;
        bound.flash_s = seconds(phase->flash_bytes, n, probe->flash_bytes_s);
        bound.unpack_s = seconds(phase->unpacked_bytes, n, probe->unpack_bytes_s);
        bound.ram_s = seconds(phase->dense_bytes + phase->expert_bytes, n, probe->ram_bytes_s);
        bound.arithmetic_s = seconds(phase->dense_macs + phase->expert_macs, n, probe->macs_s);
        const struct {
            const char *name;
            double s;
        } all[] = {{"flash", bound.flash_s},
                   {"unpack", bound.unpack_s},
                   {"ram", bound.ram_s},
                   {"arithmetic", bound.arithmetic_s}};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
            if (all[i].s > bound.token_s) {
                bound.token_s = all[i].s;
                bound.by = all[i].name;
            }
        }
        double token_s = 1e-9 * (double)phase->wall_ns / (double)n;
        bound.efficiency = token_s > 0 ? bound.token_s / token_s : 0;
    }
    *ret_bound = bound;
}
