/*
 * The stream: expert blocks on their way from flash to a worker's hands. It owns the slots (one
 * slab of a jemalloc arena, on huge pages, charged to the ledger), the cache policy that decides
 * which blocks stay in them, the staging buffers for compressed blocks, and the ring that reads.
 * It refuses to know what a model is: blocks are numbers with extents.
 *
 * A round is one layer's demand. The control thread begins it with the list of blocks it needs;
 * workers then take blocks, those already resident first, and compute with them while the missing
 * ones arrive; whoever finds nothing ready reaps the ring, decodes what came, and goes on. When
 * slots are fewer than the round's blocks, reads go out as finished blocks give their slots up.
 *
 *   absent --begin--> missing --slot+staging--> reading --reaped--> arrived --taken--> decoding
 *     ^                                                                                   |
 *     +------------- slot given up ------------ resident <-------------- decoded ---------+
 *
 * Hints name blocks that later rounds may want. They are read when the device has nothing else to
 * do, from absent right to reading, and a round that comes to ask for them finds them there or on
 * their way.
 *
 * Thread safety: next and done by any number of workers between begin and end; all else by one
 * control thread, which may be a worker too. One lock guards all state; it is never held while
 * reading, decoding or computing.
 */
#ifndef SLU_EXPERTS_STREAM_H
#define SLU_EXPERTS_STREAM_H

#include "base/ledger.h"
#include "experts/policy.h"
#include "io/pack.h"
#include "io/ring.h"

struct slu_stream;

struct slu_stream_params {
    const char *path;                 /* of the pack, opened anew for direct reads */
    const struct slu_extent *extents; /* the pack's table; blocks are indices into it. Kept: it must
                                         outlive the stream */
    uint32_t n_extents;
    uint32_t n_slots;        /* > 0; more than blocks exist is fine and trimmed */
    uint32_t n_borrowed_max; /* slots that slu_stream_borrow may add; trimmed likewise */
    uint32_t n_blocks;       /* how many extents are streamed blocks at all */
    size_t slot_bytes;       /* of the largest block, raw */
    /* Where many blocks are smaller: n_small_blocks fit small_bytes, which are rounded up to whole
     * pages, and the same share of slots is as small. Only they may be in them, and they in no
     * other, so a round of one size has its share of slots. 0, or so few that one size would have
     * no slot: all are large. */
    size_t small_bytes;
    uint32_t n_small_blocks;
    uint32_t round_blocks_max; /* the longest list that begin will get */
    uint32_t n_workers;        /* threads that may call next; each gets a decoder */
    bool touch_slots;          /* have the system provide all of the slots' memory at once; what is
                                  borrowed has it already then */
    enum slu_io_backend backend;
    /* The cache policy (experts/policy.h); NULL: LRU, and what follows isn't looked at. */
    const struct slu_policy_kind *policy;
    uint32_t n_layers, n_experts;
    /* layer * n_experts + expert of a block. Asked at creation, with expert_arg. */
    uint32_t (*expert_of)(const void *arg, uint32_t block);
    const void *expert_arg;
    struct slu_ledger *ledger;
    const enum slu_account *account; /* what everything is charged to; NULL: slots to experts, what
                                        reads and decodes to I/O */
};

/* How many slots so much borrowed memory has room for, n_borrowed_max at most. */
uint32_t slu_stream_borrowed_slots(const struct slu_stream_params *params, uint64_t bytes);

/* SLU_EBUDGET, SLU_EIO, SLU_ENOMEM. All memory is taken here; later calls allocate nothing. */
int slu_stream_create(const struct slu_stream_params *params, struct slu_stream **ret_stream,
                      struct slu_err *err);
void slu_stream_destroy(struct slu_stream *stream); /* NULL is fine */

/* Exactly what create will charge to the ledger (all accounts together), for plans; split by
 * account into ret_accounts[SLU_ACCOUNTS] if not NULL. params->ledger, path and extents are not
 * read except extents' stored_bytes when not NULL. */
uint64_t slu_stream_charge_bytes(const struct slu_stream_params *params, uint64_t *ret_accounts);

/* What a router chose, for the policy: before the round that follows from it. A chunk's tokens one
 * after the other. */
void slu_stream_observe(struct slu_stream *stream, const struct slu_policy_choice *choice);

/* What the policy says of a layer to come (experts/kin.h), as ret_chances[n_experts]; false if it
 * can't tell. Between rounds or in one. */
bool slu_stream_foresee(struct slu_stream *stream, uint32_t layer, float *ret_chances);

/* Begins a round: n distinct block numbers, in the order in which the caller would like the
 * missing ones. Reads start before it returns. */
int slu_stream_begin(struct slu_stream *stream, const uint32_t *blocks, uint32_t n,
                     struct slu_err *err);

struct slu_stream_item {
    uint32_t index;     /* into the round's list */
    uint32_t slot;      /* for done */
    const void *data;   /* the block's raw bytes, 4096-aligned, valid until done */
    uint64_t unpack_ns; /* that next took to check and decode it; 0 for a resident one */
};

/* The next block for this worker (0 .. n_workers-1): 1 with an item; 0 when the round has no more
 * to hand out; negative when a read or a decode failed, the same for every worker of the round,
 * with its sentence from slu_stream_end. Blocks while others' blocks are on their way. A worker
 * gives its block back with done before it asks for the next: with a single slot, that is the slot
 * that the next one needs. A worker that has been told 0 learns of a later failure from end. */
int slu_stream_next(struct slu_stream *stream, unsigned worker, struct slu_stream_item *ret_item);
void slu_stream_done(struct slu_stream *stream, const struct slu_stream_item *item);

/* Ends the round after all workers have left: 0, or the round's error, after which what was in
 * flight has been drained and the stream is as good as new. */
int slu_stream_end(struct slu_stream *stream, struct slu_err *err);

/* Memory for which its owner has no use at present: slots lie at its end, n_borrowed_max at most,
 * until the next call, which tells of more of it or less: with the same end, or after a call that
 * returned 0. Returns how many there are: where there is room for more than before, some of them
 * at each call (see experts/borrow.c). When it returns, nothing touches what lies outside of them:
 * of the blocks that were there those worth most have moved, and reads were waited for. Between
 * rounds, with nothing else called meanwhile. */
uint32_t slu_stream_borrow(struct slu_stream *stream, void *memory, size_t bytes);

/* The other way round: so many bytes of the slots' memory for the caller, page-aligned, until the
 * next call; 0, which gives NULL, for none. Of the blocks in those slots the ones worth most move,
 * the others are forgotten. While nothing is borrowed; otherwise as above. */
void *slu_stream_lend(struct slu_stream *stream, size_t bytes);
/* The most that it can be asked for: a quarter of the slots, in whole ones. */
size_t slu_stream_lendable_bytes(const struct slu_stream_params *params);

#define SLU_HINTS_DEEP UINT32_MAX
/* Blocks that later rounds may want, the likeliest first, n <= round_blocks_max; the list before is
 * forgotten. Those that are absent are read whenever no block of a round waits to be submitted and
 * fewer than n_in_flight_max reads are in flight, as many as keep flash busy at most, or with
 * SLU_HINTS_DEEP more: for long stretches in which completions are seldom looked for, where most of
 * the hints will come true. Those that are resident are the last to give their slots up. Never
 * fails: what can't be read is left to the round that asks for it. Between rounds or in one. */
void slu_stream_hint(struct slu_stream *stream, const uint32_t *blocks, uint32_t n,
                     uint32_t n_in_flight_max);
/* The same for guesses, of which `share` (0 to 1) come true: they are read only while no round
 * needs the device, no more than it delivers from one round to the next (experts/pace.h). To be
 * called in a round. */
void slu_stream_hint_idle(struct slu_stream *stream, const uint32_t *blocks, uint32_t n,
                          float share);
/* Between rounds, every now and then: takes completions and submits the next hints. */
void slu_stream_poll(struct slu_stream *stream);

/* A block that is kept gives its slot up only where nothing else could; for callers that decide for
 * themselves who stays. There should be more slots than kept blocks: with none to spare, what is
 * read takes the place of what is kept. At first none is. Between rounds or in one. */
void slu_stream_keep(struct slu_stream *stream, uint32_t block, bool is_kept);
/* Whether the block is neither resident nor on its way. By the control thread. */
bool slu_stream_is_absent(struct slu_stream *stream, uint32_t block);

struct slu_stream_stats {
    uint64_t hits, misses;   /* blocks asked for that were resident, and not */
    uint64_t guesses;        /* blocks read on a hint */
    uint64_t foreseen;       /* misses whose read a hint had begun */
    uint64_t flash_bytes;    /* read, page-rounded */
    uint64_t wait_ns;        /* sum over workers of time in next with nothing to do */
    uint64_t decode_ns;      /* sum over workers */
    uint64_t unpacked_bytes; /* of compressed blocks, once decoded */
    const char *backend;     /* "io_uring" or "pread" */
    bool is_direct;
    uint32_t n_slots; /* at present */
};
void slu_stream_stats(const struct slu_stream *stream, struct slu_stream_stats *ret_stats);

/* A fault for tests: the read of `block` fails n_times with SLU_EIO. */
void slu_stream_inject_fault(struct slu_stream *stream, uint32_t block, unsigned n_times);

#endif
