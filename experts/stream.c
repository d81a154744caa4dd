#include "experts/stream_state.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* The table in memory: the stream itself, then arrays, each at a multiple of 16 bytes. */
#define TABLE_ALIGN 16u

#define SLAB_REGISTERED_BYTES_MAX ((size_t)256 << 20)

/* Slots that there are for each staging buffer, where buffers are for more than demanded reads. */
#define SLOTS_A_GUESS    16
#define SLOTS_AN_ARRIVAL 32

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t max_size(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* Saturates, at a size that any ledger and any system refuses. */
static size_t mul_size(size_t a, size_t b)
{
    size_t product;
    return __builtin_mul_overflow(a, b, &product) || product > PTRDIFF_MAX / 4 ? PTRDIFF_MAX / 4
                                                                               : product;
}

static size_t round_up(size_t bytes, size_t multiple)
{
    return bytes > PTRDIFF_MAX / 4 ? PTRDIFF_MAX / 4 / multiple * multiple
                                   : (bytes + multiple - 1) / multiple * multiple;
}

/* The largest compressed block, as stored. Extents too large for a slot aren't blocks, and one
 * that is larger compressed than raw would not have been compressed. */
static size_t staging_bytes(const struct slu_stream_params *params, size_t slot_bytes)
{
    if (!params->extents) {
        return slot_bytes;
    }
    size_t most = 0;
    for (uint32_t i = 0; i < params->n_extents; i++) {
        const struct slu_extent *extent = &params->extents[i];
        if (extent->codec != SLU_CODEC_RAW && extent->raw_bytes <= slot_bytes &&
            extent->stored_bytes > most) {
            most = extent->stored_bytes;
        }
    }
    return min_size(round_up(most, SLU_IO_ALIGN), slot_bytes);
}

/* Lays the tables out after the stream; with stream NULL only adds up their bytes. */
static size_t lay_out(struct slu_stream *stream, const struct slu_stream_params *params,
                      const struct stream_sizes *sizes)
{
    size_t at = round_up(sizeof *stream, TABLE_ALIGN);
    uint32_t n_experts_of = params->policy ? params->n_extents : 0;
    struct {
        size_t n, item_bytes;
        size_t start;
    } tables[] = {
        {params->n_extents, sizeof(struct stream_block), 0},
        {sizes->n_slots_max, sizeof(uint32_t), 0},
        {sizes->n_slots_max, sizeof(uint32_t), 0},
        {sizes->n_stagings, sizeof(uint32_t), 0},
        {params->round_blocks_max, sizeof(uint32_t), 0},
        {params->round_blocks_max, sizeof(uint32_t), 0},
        {params->round_blocks_max, sizeof(uint32_t), 0},
        {params->round_blocks_max, sizeof(uint32_t), 0},
        {params->round_blocks_max, sizeof(uint32_t), 0},
        {params->round_blocks_max, sizeof(uint32_t), 0},
        {params->n_workers, sizeof(struct slu_decoder *), 0},
        {n_experts_of, sizeof(uint32_t), 0},
        {sizes->n_slots_max, sizeof(bool), 0},
        {sizes->slots.n_small ? sizes->n_slots_max : 0, sizeof(uint32_t), 0},
    };
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        tables[i].start = at;
        at += round_up(mul_size(tables[i].n, tables[i].item_bytes), TABLE_ALIGN);
    }
    if (stream) {
        char *base = (char *)stream;
        stream->blocks = (struct stream_block *)(base + tables[0].start);
        stream->slot_blocks = (uint32_t *)(base + tables[1].start);
        stream->free_slots[false].slots = (uint32_t *)(base + tables[2].start);
        stream->free_slots[true].slots = (uint32_t *)(base + tables[13].start);
        stream->free_stagings = (uint32_t *)(base + tables[3].start);
        stream->list = (uint32_t *)(base + tables[4].start);
        struct stream_queue *queues[] = {&stream->ready, &stream->missing, &stream->arrived,
                                         &stream->guessed};
        for (size_t i = 0; i < sizeof queues / sizeof queues[0]; i++) {
            queues[i]->blocks = (uint32_t *)(base + tables[5 + i].start);
            queues[i]->n_max = params->round_blocks_max;
        }
        stream->hints = (uint32_t *)(base + tables[9].start);
        stream->decoders = (struct slu_decoder **)(base + tables[10].start);
        stream->block_experts = n_experts_of ? (uint32_t *)(base + tables[11].start) : NULL;
        stream->is_slot_fresh = (bool *)(base + tables[12].start);
    }
    return at;
}

/* Reads in flight at most, as far as a round and the slots allow for them; four at least, since
 * several are decoded at once. */
static void set_depths(const struct slu_stream_params *params, struct stream_sizes *sizes)
{
    size_t n = SLU_STREAM_DEPTH_BYTES / max_size(sizes->slots.large, 1);
    size_t depth = max_size(4, min_size(n, SLU_STREAM_DEPTH_MAX));
    size_t most = min_size(sizes->n_slots, params->round_blocks_max);
    sizes->depth = (uint32_t)min_size(depth, most);
    sizes->packed_depth = (uint32_t)min_size(SLU_STREAM_DEEP_PACKED * depth, most);
    sizes->deep_depth = (uint32_t)min_size(SLU_STREAM_DEEP * depth, most);
}

static struct slu_slots slots_of(const struct slu_stream_params *params, uint32_t n_slots)
{
    struct slu_slots slots = {.large = slu_slots_round(params->slot_bytes),
                              .small = slu_slots_round(params->small_bytes),
                              .n_small = params->n_small_blocks,
                              .n_of = params->n_blocks};
    uint32_t n_small = slots.n_small < slots.n_of ? slu_slots_small(&slots, n_slots) : 0;
    if (n_small == 0 || n_small == n_slots || slots.small >= slots.large) {
        slots.n_small = 0;
    }
    return slots;
}

static struct stream_sizes sizes_of(const struct slu_stream_params *params)
{
    struct stream_sizes sizes = {0};
    sizes.n_slots = (uint32_t)min_size(params->n_slots, params->n_blocks);
    sizes.n_slots = sizes.n_slots ? sizes.n_slots : 1;
    sizes.n_slots_max =
        (uint32_t)min_size((size_t)sizes.n_slots + params->n_borrowed_max, params->n_blocks);
    sizes.slots = slots_of(params, sizes.n_slots);
    sizes.slab_bytes = slu_slots_bytes(&sizes.slots, 0, sizes.n_slots);
    if (sizes.slab_bytes < SLU_ARENA_EXACT_BYTES) {
        sizes.slab_bytes = SLU_ARENA_EXACT_BYTES; /* below that its charge couldn't be foretold */
    }
    set_depths(params, &sizes);
    sizes.staging_bytes = staging_bytes(params, sizes.slots.large);
    if (sizes.staging_bytes > 0) {
        /* For what is read and what is being decoded. A buffer is about a block less in the cache,
         * so only where slots are many are there more: for guesses, and where they are very many
         * for what has arrived meanwhile, too. */
        size_t least = (size_t)sizes.depth + params->n_workers;
        size_t guesses = min_size(sizes.n_slots / SLOTS_A_GUESS, least + sizes.depth);
        size_t arrived = min_size(sizes.n_slots / SLOTS_AN_ARRIVAL,
                                  2 * (size_t)sizes.deep_depth + params->n_workers);
        size_t n_stagings = max_size(least, max_size(guesses, arrived));
        sizes.n_stagings = (uint32_t)min_size(n_stagings, sizes.n_slots);
    }
    sizes.table_bytes = lay_out(NULL, params, &sizes);
    sizes.ring = (struct slu_ring_params){.backend = params->backend, .depth = sizes.deep_depth};
    sizes.slots_account = params->account ? *params->account : SLU_ACCOUNT_EXPERTS;
    sizes.io_account = params->account ? *params->account : SLU_ACCOUNT_IO;
    return sizes;
}

static struct slu_policy_shape policy_shape(const struct slu_stream_params *params,
                                            const struct stream_sizes *sizes)
{
    return (struct slu_policy_shape){.n_slots = sizes->n_slots_max,
                                     .n_layers = params->n_layers,
                                     .n_experts = params->n_experts,
                                     .n_blocks = params->n_extents};
}

static size_t policy_bytes(const struct slu_stream_params *params, const struct stream_sizes *sizes)
{
    struct slu_policy_shape shape = policy_shape(params, sizes);
    return params->policy ? params->policy->bytes(&shape)
                          : slu_policy_lru_bytes(sizes->n_slots_max);
}

/* What is on the heap, and charged by hand: everything but the slab and the staging. */
static void heap_bytes(const struct slu_stream_params *params, const struct stream_sizes *sizes,
                       uint64_t *ret_accounts)
{
    memset(ret_accounts, 0, SLU_ACCOUNTS * sizeof *ret_accounts);
    ret_accounts[sizes->slots_account] += sizes->table_bytes + policy_bytes(params, sizes);
    ret_accounts[sizes->io_account] +=
        slu_ring_bytes(&sizes->ring) + mul_size(params->n_workers, slu_decoder_bytes());
}

static size_t all_staging_bytes(const struct stream_sizes *sizes)
{
    return mul_size(sizes->n_stagings, sizes->staging_bytes);
}

uint32_t slu_stream_borrowed_slots(const struct slu_stream_params *params, uint64_t bytes)
{
    struct stream_sizes sizes = sizes_of(params);
    return slu_slots_fit(&sizes.slots, sizes.n_slots, bytes, sizes.n_slots_max - sizes.n_slots);
}

size_t slu_stream_lendable_bytes(const struct slu_stream_params *params)
{
    struct stream_sizes sizes = sizes_of(params);
    return slu_slots_bytes(&sizes.slots, slu_stream_slots_least(&sizes), sizes.n_slots);
}

uint64_t slu_stream_charge_bytes(const struct slu_stream_params *params, uint64_t *ret_accounts)
{
    uint64_t accounts[SLU_ACCOUNTS];
    struct stream_sizes sizes = sizes_of(params);
    heap_bytes(params, &sizes, accounts);
    accounts[sizes.slots_account] +=
        slu_arena_overhead_bytes() + slu_map_charge_bytes(sizes.slab_bytes);
    accounts[sizes.io_account] += slu_map_charge_bytes(all_staging_bytes(&sizes));
    uint64_t sum = 0;
    for (int i = 0; i < SLU_ACCOUNTS; i++) {
        sum += accounts[i];
        if (ret_accounts) {
            ret_accounts[i] = accounts[i];
        }
    }
    return sum;
}

static int check_params(const struct slu_stream_params *params, struct slu_err *err)
{
    if (!params->path || !params->extents || !params->ledger || params->n_slots == 0 ||
        params->n_blocks == 0 || params->n_blocks > params->n_extents || params->slot_bytes == 0 ||
        params->round_blocks_max == 0 || params->n_workers == 0) {
        return slu_err_set(err, SLU_EINVAL,
                           "a stream needs a file, extents, blocks, slots, "
                           "workers and a ledger");
    }
    return 0;
}

static void release_heap(struct slu_ledger *ledger, const uint64_t *heap, int n_accounts)
{
    for (int i = 0; i < n_accounts; i++) {
        slu_ledger_release(ledger, (enum slu_account)i, heap[i]);
    }
}

static int reserve_heap(struct slu_ledger *ledger, const uint64_t *heap, struct slu_err *err)
{
    for (int i = 0; i < SLU_ACCOUNTS; i++) {
        int e = slu_ledger_reserve(ledger, (enum slu_account)i, heap[i], err);
        if (e < 0) {
            release_heap(ledger, heap, i);
            return e;
        }
    }
    return 0;
}

/* Reserves and allocates the stream with its tables, charges for what else is on the heap. */
static int create_tables(const struct slu_stream_params *params, struct slu_stream **ret_stream,
                         struct slu_err *err)
{
    struct stream_sizes sizes = sizes_of(params);
    uint64_t heap[SLU_ACCOUNTS];
    heap_bytes(params, &sizes, heap);
    int e = reserve_heap(params->ledger, heap, err);
    if (e < 0) {
        return e;
    }
    struct slu_stream *stream = calloc(1, sizes.table_bytes);
    if (!stream) {
        release_heap(params->ledger, heap, SLU_ACCOUNTS);
        return slu_err_set(err, SLU_ENOMEM, "no memory for tables of %zu bytes", sizes.table_bytes);
    }
    lay_out(stream, params, &sizes);
    stream->ledger = params->ledger;
    stream->extents = params->extents;
    stream->n_extents = params->n_extents;
    stream->n_workers = params->n_workers;
    stream->round_blocks_max = params->round_blocks_max;
    stream->touches_slots = params->touch_slots;
    stream->sizes = sizes;
    memcpy(stream->charged_bytes, heap, sizeof heap);
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->has_news, NULL);
    *ret_stream = stream;
    return 0;
}

static void fill_tables(struct slu_stream *stream, const struct slu_stream_params *params)
{
    size_t len = strlen(params->path);
    size_t cut = len < sizeof stream->path ? 0 : len - sizeof stream->path + 1;
    memcpy(stream->path, params->path + cut, len - cut + 1);
    for (uint32_t i = 0; i < stream->n_extents; i++) {
        stream->blocks[i] = (struct stream_block){
            .slot = SLU_STREAM_NONE, .staging = SLU_STREAM_NONE, .index = SLU_STREAM_NONE};
    }
    stream->n_slots = stream->sizes.n_slots;
    for (uint32_t i = 0; i < stream->sizes.n_slots_max; i++) {
        stream->slot_blocks[i] = SLU_STREAM_NONE;
        stream->is_slot_fresh[i] = !params->touch_slots;
    }
    for (uint32_t slot = stream->n_slots; slot > 0; slot--) { /* from the bottom of the slab */
        slu_stream_free_slot_locked(stream, slot - 1);
    }
    for (uint32_t i = 0; i < stream->sizes.n_stagings; i++) {
        stream->free_stagings[i] = i;
    }
    stream->n_free_stagings = stream->sizes.n_stagings;
}

static int create_memory(struct slu_stream *stream, bool touch_slots, struct slu_err *err)
{
    const struct stream_sizes *sizes = &stream->sizes;
    int e = slu_arena_create(stream->ledger, sizes->slots_account, &stream->arena, err);
    if (e < 0) {
        return e;
    }
    stream->slab = slu_arena_alloc(stream->arena, sizes->slab_bytes, SLU_IO_ALIGN);
    if (!stream->slab) {
        uint64_t left = slu_ledger_limit(stream->ledger) - slu_ledger_used(stream->ledger);
        return slu_err_set(
            err, left < slu_map_charge_bytes(sizes->slab_bytes) ? SLU_EBUDGET : SLU_ENOMEM,
            "%zu bytes for %u expert slots can't be had; the budget has %llu left",
            sizes->slab_bytes, sizes->n_slots, (unsigned long long)left);
    }
    if (touch_slots) {
        slu_map_touch(stream->slab, sizes->slab_bytes);
    }
    void *staging;
    e = slu_map_alloc(stream->ledger, sizes->io_account, all_staging_bytes(sizes), &staging, err);
    if (e < 0) {
        return e;
    }
    stream->staging = staging;
    for (uint32_t i = 0; i < stream->n_workers && e == 0; i++) {
        e = slu_decoder_create(&stream->decoders[i], err);
    }
    return e;
}

/* Registering spares the kernel some 0.01 CPU-seconds a GiB read, but touches all of the range at
 * once, which took 2.2 s/GiB on a 2-core VM. So the slab is registered only where reads go into it,
 * that is with raw blocks, and where that is soon done; the staging always. */
static int open_ring(struct slu_stream *stream, const char *path, struct slu_err *err)
{
    const struct stream_sizes *sizes = &stream->sizes;
    struct slu_io_range ranges[2];
    struct slu_ring_params params = sizes->ring;
    params.ranges = ranges;
    if (stream->staging) {
        ranges[params.n_ranges++] =
            (struct slu_io_range){.start = stream->staging, .bytes = all_staging_bytes(sizes)};
    }
    bool has_raw = false;
    for (uint32_t i = 0; i < stream->n_extents; i++) {
        const struct slu_extent *extent = &stream->extents[i];
        has_raw =
            has_raw || (extent->codec == SLU_CODEC_RAW && extent->raw_bytes <= sizes->slots.large);
    }
    if (has_raw && sizes->slab_bytes <= SLAB_REGISTERED_BYTES_MAX) {
        ranges[params.n_ranges++] =
            (struct slu_io_range){.start = stream->slab, .bytes = sizes->slab_bytes};
    }
    return slu_ring_open(path, &params, &stream->ring, err);
}

static struct slu_policy *create_policy(struct slu_stream *stream,
                                        const struct slu_stream_params *params)
{
    if (!params->policy) {
        return slu_policy_create_lru(stream->sizes.n_slots_max);
    }
    struct slu_policy_shape shape = policy_shape(params, &stream->sizes);
    for (uint32_t i = 0; i < params->n_extents; i++) {
        stream->block_experts[i] = params->expert_of(params->expert_arg, i);
    }
    shape.block_experts = stream->block_experts;
    return params->policy->create(&shape);
}

int slu_stream_create(const struct slu_stream_params *params, struct slu_stream **ret_stream,
                      struct slu_err *err)
{
    int e = check_params(params, err);
    if (e < 0) {
        return e;
    }
    struct slu_stream *stream = NULL;
    e = create_tables(params, &stream, err);
    if (e < 0) {
        return e;
    }
    fill_tables(stream, params);
    e = create_memory(stream, params->touch_slots, err);
    if (e == 0) {
        stream->policy = create_policy(stream, params);
        if (!stream->policy) {
            e = slu_err_set(err, SLU_ENOMEM, "no memory for the cache policy of %u slots",
                            stream->sizes.n_slots_max);
        } else if (stream->policy->resize) {
            stream->policy->resize(stream->policy, stream->n_slots);
        }
    }
    if (e == 0) {
        e = open_ring(stream, params->path, err);
    }
    if (e < 0) {
        slu_stream_destroy(stream);
        return e;
    }
    stream->stats.backend = stream->ring->backend;
    stream->stats.is_direct = stream->ring->is_direct;
    *ret_stream = stream;
    return 0;
}

void slu_stream_destroy(struct slu_stream *stream)
{
    if (!stream) {
        return;
    }
    slu_ring_destroy(stream->ring); /* first: reads may be under way into what follows */
    for (uint32_t i = 0; i < stream->n_workers; i++) {
        slu_decoder_destroy(stream->decoders[i]);
    }
    if (stream->policy) {
        stream->policy->destroy(stream->policy);
    }
    slu_map_free(stream->ledger, stream->sizes.io_account, stream->staging,
                 all_staging_bytes(&stream->sizes));
    if (stream->slab) {
        slu_arena_free(stream->arena, stream->slab);
    }
    slu_arena_destroy(stream->arena);
    pthread_mutex_destroy(&stream->lock);
    pthread_cond_destroy(&stream->has_news);
    release_heap(stream->ledger, stream->charged_bytes, SLU_ACCOUNTS);
    free(stream);
}

void slu_stream_stats(const struct slu_stream *stream, struct slu_stream_stats *ret_stats)
{
    pthread_mutex_t *lock = (pthread_mutex_t *)&stream->lock; /* constant but for the lock */
    pthread_mutex_lock(lock);
    *ret_stats = stream->stats;
    ret_stats->n_slots = stream->n_slots;
    pthread_mutex_unlock(lock);
}

void slu_stream_inject_fault(struct slu_stream *stream, uint32_t block, unsigned n_times)
{
    assert(block < stream->n_extents);
    pthread_mutex_lock(&stream->lock);
    stream->blocks[block].n_faults = n_times;
    pthread_mutex_unlock(&stream->lock);
}
