/*
 * The inside of a stream, shared by stream.c (birth and death), fetch.c (slots, reads and their
 * completions), round.c (what callers see) and borrow.c (slots that come and go). Private to them.
 *
 * Thread safety: functions that end in _locked are called with the stream's lock held; those that
 * say so drop it for a while.
 */
#ifndef SLU_EXPERTS_STREAM_STATE_H
#define SLU_EXPERTS_STREAM_STATE_H

#include <pthread.h>

#include "base/arena.h"
#include "experts/pace.h"
#include "experts/policy.h"
#include "experts/slots.h"
#include "experts/stream.h"

#define SLU_STREAM_NONE UINT32_MAX
/* Reads in flight: so many bytes keep flash busy (2.6 GB/s from 2 MiB on, on a virtio disk), and
 * more only makes blocks arrive together, late: with 32 MiB none comes before the twelfth
 * millisecond, and nothing is multiplied while they are read. */
#define SLU_STREAM_DEPTH_BYTES ((size_t)4 << 20)
#define SLU_STREAM_DEPTH_MAX   32u
/* So many times as many where it doesn't matter that they arrive together: for a deep list of
 * hints, which arrive while the dense part of a layer is computed, in which nobody looks for what
 * has arrived but every few milliseconds, and for a round's blocks as long as there are others to
 * be read after them. With fewer the device would wait. */
#define SLU_STREAM_DEEP 4u
/* And so many times where a round's blocks are compressed: those that arrive together have to be
 * unpacked before they are multiplied, which may take as long as reading them. */
#define SLU_STREAM_DEEP_PACKED 2u
#define SLU_STREAM_PATH_BYTES  256

enum stream_block_state {
    BLOCK_ABSENT,
    BLOCK_MISSING,  /* of this round, in the queue of that name */
    BLOCK_READING,  /* has a slot, and a staging buffer if compressed */
    BLOCK_ARRIVED,  /* likewise, and is in the queue of that name, or among the guessed ones if it
                       isn't of this round */
    BLOCK_DECODING, /* likewise, in some worker's hands */
    BLOCK_RESIDENT, /* has a slot, and the policy knows it */
};

struct stream_block {
    uint32_t slot;
    uint32_t staging;
    uint32_t index;    /* into the round's list, or none */
    uint32_t n_faults; /* reads of it yet to fail, for tests */
    uint8_t state;
    bool is_done;   /* the worker that took it this round has finished */
    bool is_hinted; /* on the list of hints */
    bool is_kept;   /* by the caller's wish */
};

/* First in, first out, over a fixed array: nothing is in more than one queue, and none is longer
 * than a round can be. Holds block numbers. */
struct stream_queue {
    uint32_t *blocks;
    uint32_t first, n, n_max;
};

struct stream_stack {
    uint32_t *slots;
    uint32_t n;
};

/* What follows from the parameters alone. */
struct stream_sizes {
    uint32_t n_slots;     /* in the slab */
    uint32_t n_slots_max; /* with all that may be borrowed */
    struct slu_slots slots;
    size_t slab_bytes;
    uint32_t depth, packed_depth, deep_depth;
    uint32_t n_stagings;
    size_t staging_bytes; /* of one, whole pages */
    size_t table_bytes;   /* the stream itself and its tables */
    struct slu_ring_params ring;
    enum slu_account slots_account, io_account; /* what is charged to which */
};

struct slu_stream {
    /* Constant after create. */
    struct slu_ledger *ledger;
    const struct slu_extent *extents;
    uint32_t n_extents;
    uint32_t n_workers;
    uint32_t round_blocks_max;
    bool touches_slots;
    struct stream_sizes sizes;
    uint64_t charged_bytes[SLU_ACCOUNTS]; /* by hand, for tables, ring and decoders */
    char path[SLU_STREAM_PATH_BYTES];     /* for sentences; its beginning is cut off if need be */
    struct slu_arena *arena;
    unsigned char *slab;
    unsigned char *staging;
    struct slu_decoder **decoders; /* [n_workers] */
    struct slu_ring *ring;

    pthread_mutex_t lock; /* guards everything below; no other lock is taken under it but jemalloc's
                             and the ring's own */
    pthread_cond_t has_news;
    struct slu_policy *policy;
    uint32_t *block_experts;     /* [n_extents] for the policy; NULL if it has no use for it */
    struct stream_block *blocks; /* [n_extents] */
    uint32_t n_slots;            /* at present: those of the slab, then borrowed ones */
    unsigned char *borrowed_end; /* which lie below it */
    uint32_t *slot_blocks;       /* [n_slots_max] the block in it, if any */
    bool *is_slot_fresh;         /* [n_slots_max] its memory may have to be provided first */
    struct stream_stack free_slots[2]; /* [n_slots_max] large ones, small ones */
    uint32_t *free_stagings;           /* [n_stagings] a stack */
    uint32_t n_free_stagings;

    bool is_round;
    uint32_t *list; /* [round_blocks_max] the round's blocks */
    uint32_t n_list;
    uint32_t n_untaken; /* of them, in no worker's hands yet */
    uint32_t n_taken;   /* in a worker's hands, from next to done */
    struct stream_queue ready, missing, arrived;
    int error;
    struct slu_err err;

    uint32_t *hints; /* [round_blocks_max] blocks that later rounds may want */
    uint32_t n_hints, next_hint;
    uint32_t n_guesses_max;      /* reads in flight below which a hint's read may be added */
    uint32_t n_guesses_left;     /* of the hints, to be read at most */
    bool is_idle_only;           /* they are, while no read that a round asked for is in flight */
    uint32_t n_guesses;          /* reads in flight that no round has asked for */
    struct stream_queue guessed; /* arrived, asked for by no round yet */

    struct slu_pace pace;
    uint32_t n_in_flight; /* reads with a slot, not yet reaped */
    int64_t n_reapable;   /* of them, known to the ring; may lag behind it, never lead */
    bool has_reaper;      /* some worker waits on the ring */
    uint32_t n_waiting;   /* workers that wait for news */

    struct slu_stream_stats stats;
};

/* Slots of the slab that are never lent. */
static inline uint32_t slu_stream_slots_least(const struct stream_sizes *sizes)
{
    return sizes->n_slots - sizes->n_slots / 4;
}

/* fetch.c */

void slu_stream_push_locked(struct stream_queue *queue, uint32_t block);
uint32_t slu_stream_pop_locked(struct stream_queue *queue);

/* Where the block's bytes are to arrive: its staging buffer or its slot. */
unsigned char *slu_stream_arrival(const struct slu_stream *stream, const struct stream_block *b);
unsigned char *slu_stream_slot(const struct slu_stream *stream, uint32_t slot);

/* Whether a block, or a slot, is of the smaller size. */
bool slu_stream_is_small(const struct slu_stream *stream, uint32_t block);
bool slu_stream_is_small_slot(const struct slu_stream *stream, uint32_t slot);

/* The first error of a round counts; wakes everybody. `err` has its sentence. */
void slu_stream_fail_locked(struct slu_stream *stream, const struct slu_err *err);

/* Nothing is in the slot. */
void slu_stream_free_slot_locked(struct slu_stream *stream, uint32_t slot);
/* The resident block in a slot is absent again. */
void slu_stream_evict_locked(struct slu_stream *stream, uint32_t slot);
/* The same for the block that is worth least of those in small slots, or large ones; if possible
 * one that isn't hinted at. False where all are kept or in use. */
bool slu_stream_evict_least_locked(struct slu_stream *stream, bool is_small);
/* Moves a resident block to another slot of its size, of which one is free. */
void slu_stream_move_locked(struct slu_stream *stream, uint32_t slot);

/* A block that was on its way is absent again, its slot and staging free. */
void slu_stream_drop_locked(struct slu_stream *stream, uint32_t block);
void slu_stream_free_staging_locked(struct slu_stream *stream, struct stream_block *b);

/* Submits missing blocks as long as there are slots, staging and depth for them, and when all are
 * submitted, blocks of hints. Drops the lock while submitting. */
void slu_stream_issue_locked(struct slu_stream *stream);

/* The next missing block can't be submitted before something that is read has arrived or been
 * decoded. */
bool slu_stream_is_starved_locked(const struct slu_stream *stream);

/* The round has nothing left to submit, and a hint could be next, or waits for the round's last
 * read: when that one came should be known even if nothing fits after it. */
bool slu_stream_is_hint_due_locked(const struct slu_stream *stream);

/* Takes completions off the ring, waiting for the first one if `block`; drops the lock meanwhile.
 * There must be no other reaper. */
void slu_stream_reap_locked(struct slu_stream *stream, bool block);

#endif
