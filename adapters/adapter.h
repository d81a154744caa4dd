/*
 * A LoRA adapter: low-rank pairs (A, B) that change what linear maps of a base model compute,
 * y += scale * alpha / rank * B (A x), without touching the base. Hu et al., arXiv:2106.09685.
 *
 * Here are an adapter in memory, the .sla file that it is read from, and the check against its
 * base. How files of other kinds become a .sla is the importer's business (tools), which adapters
 * are in memory the registry's, and where the products go the model's.
 *
 * A .sla file: header page (magic, version, sizes, checksum), a zstd frame for each MiB of a pair,
 * a block for all pairs of one routed expert of a layer, metadata and index;
 * docs/adapter-format.md. The blocks are either all in memory too, or streamed
 * (adapters/expert_stream.h) as the experts themselves are.
 *
 * Thread safety: an opened adapter is constant, but for its stream.
 */
#ifndef SLU_ADAPTERS_ADAPTER_H
#define SLU_ADAPTERS_ADAPTER_H

#include "base/ledger.h"
#include "io/ring.h"
#include "io/source.h"
#include "kern/format.h"

/* Linear maps that an adapter may change. Values are stored in files: append only. */
enum slu_target {
    SLU_TARGET_Q = 0,
    SLU_TARGET_K = 1,
    SLU_TARGET_V = 2,
    SLU_TARGET_OUT = 3,
    SLU_TARGET_Q_A = 4, /* MLA */
    SLU_TARGET_Q_B = 5,
    SLU_TARGET_KV_A = 6, /* attn_kv_a_mqa */
    SLU_TARGET_KV_B = 7,
    SLU_TARGET_ROUTER = 8,
    SLU_TARGET_FFN_GATE = 9, /* dense layers */
    SLU_TARGET_FFN_UP = 10,
    SLU_TARGET_FFN_DOWN = 11,
    SLU_TARGET_SHARED_GATE = 12, /* the shared expert's matrices */
    SLU_TARGET_SHARED_UP = 13,
    SLU_TARGET_SHARED_DOWN = 14,
    SLU_TARGET_EXPERT_GATE = 15, /* routed experts: a pair for each */
    SLU_TARGET_EXPERT_UP = 16,
    SLU_TARGET_EXPERT_DOWN = 17,
    SLU_TARGET_EMBEDDING = 18, /* of the whole model: layer 0 */
    SLU_TARGET_HEAD = 19,
    SLU_TARGETS
};

/* The GGUF name of the matrix behind "blk.N.", such as "attn_q"; "token_embd" and "output" for the
 * last two. Static storage. */
const char *slu_target_name(enum slu_target target);

/* One pair, or for routed experts n pairs of equal rank. A is rank x in, B is out x rank; F32, F16
 * or BF16. An embedding's A is rank x n_vocab and its B n_embd x rank. */
struct slu_lora {
    enum slu_target target;
    uint32_t layer;
    uint32_t rank, n;
    float scale; /* alpha / rank, or what else the file's settings make of them */
    /* Of routed experts they have no data: slu_lora_of_expert. */
    struct slu_mat a, b;
    size_t at; /* of A in an expert's block; B follows */
};

struct slu_adapter_info {
    char name[64];
    char description[256];
    char arch[32];             /* as GGUF names it; empty where the source didn't say */
    uint64_t base_fingerprint; /* of the pack it was made for; 0: any whose shapes fit */
    uint32_t n_layers;         /* highest layer it changes + 1 */
    uint32_t rank_min, rank_max;
    uint32_t n_loras;
    uint32_t targets;      /* bit 1 << enum slu_target */
    uint32_t n_blocks;     /* of routed experts, all layers together; 0: it leaves those alone */
    uint32_t n_experts;    /* of the layer that has most blocks */
    uint32_t block_bytes;  /* of the largest block, raw */
    uint64_t expert_bytes; /* of all blocks, raw */
    uint64_t file_bytes;
    uint64_t memory_bytes; /* what opening charges, with all of it in memory */
    uint64_t extra_bytes;  /* that opening needs beyond slu_adapter_staging_bytes() */
    bool is_hf_order;      /* rows of q and k as Hugging Face has them, see slu_base */
};

/* Blocks of a layer's experts. */
struct slu_adapter_layer {
    uint32_t n; /* experts; 0: none has any */
    uint32_t first_block;
    uint32_t block_bytes;
    const uint8_t *data; /* block_bytes apart; NULL: streamed */
};

struct slu_expert_stream;

struct slu_adapter {
    struct slu_adapter_info info;
    struct slu_lora *loras;
    /* by_target[layer * SLU_TARGETS + target]: index into loras + 1, or 0 */
    uint32_t *by_target;
    struct slu_adapter_layer *layers;
    uint32_t n_layers;                /* of the base */
    struct slu_expert_stream *stream; /* NULL: everything is in memory */
    struct slu_ledger *ledger;
    uint64_t charged_bytes; /* to the ledger, the stream's included */
    void *memory;
    size_t memory_bytes;
};

/* What an adapter is checked against: the base, told by the model. */
struct slu_target_shape {
    uint32_t in, out, n;    /* n: experts, else 1; 0: the base has no such matrix */
    uint32_t permute_heads; /* > 0: GGUF keeps the rows of each of so many heads as adjacent RoPE
                               pairs where Hugging Face has split halves */
};
struct slu_base {
    const char *arch;
    uint64_t fingerprint;
    uint32_t n_layers;
    uint32_t n_used; /* routed experts of a layer that a token uses */
    void (*shape)(void *arg, enum slu_target target, uint32_t layer,
                  struct slu_target_shape *ret_shape);
    void *arg;
};

/* Reads header and index only, checked. */
int slu_adapter_inspect(struct slu_source *source, struct slu_adapter_info *ret_info,
                        struct slu_err *err);

/* Reads the whole adapter, charged to SLU_ACCOUNT_ADAPTERS (exactly info.memory_bytes). Refuses,
 * each with one clear sentence: another base (SLU_EUNSUP), shapes that don't fit it, corrupt or
 * truncated files, numbers that aren't finite (SLU_EFORMAT), no room (SLU_EBUDGET, with what it
 * needs). Rows of B for q and k are permuted here where is_hf_order and the base ask for it. */
int slu_adapter_open(struct slu_source *source, const struct slu_base *base,
                     struct slu_ledger *ledger, struct slu_adapter **ret_adapter,
                     struct slu_err *err);

/* How to stream the blocks of a file. */
struct slu_adapter_streaming {
    const char *path; /* of the source, opened anew for direct reads */
    uint32_t n_slots; /* blocks in memory at once */
    uint32_t n_workers;
    enum slu_io_backend backend;
};

/* As slu_adapter_open, but of the blocks no more than n_slots are in memory at once. All of the
 * file is read and checked all the same. Charges what slu_adapter_fit says. */
int slu_adapter_open_streamed(struct slu_source *source, const struct slu_base *base,
                              const struct slu_adapter_streaming *streaming,
                              struct slu_ledger *ledger, struct slu_adapter **ret_adapter,
                              struct slu_err *err);

/* The most slots with which the adapter takes up to bytes_max of memory, and what it then takes:
 * streaming->n_slots and *ret_bytes. Where not even so many do as one token uses in a layer: those,
 * and SLU_EBUDGET without a sentence. Other errors as slu_adapter_inspect's; SLU_EINVAL if there
 * are no blocks. */
int slu_adapter_fit(struct slu_source *source, const struct slu_base *base, uint64_t bytes_max,
                    struct slu_adapter_streaming *streaming, uint64_t *ret_bytes,
                    struct slu_err *err);

void slu_adapter_close(struct slu_adapter *adapter); /* NULL is fine */

/* What opening needs besides, under SLU_ACCOUNT_IO, for as long as it takes. Where the ledger has
 * room for up to four times as much, large adapters load faster. */
uint64_t slu_adapter_staging_bytes(void);

/* NULL where the adapter leaves that map alone. */
static inline const struct slu_lora *slu_adapter_find(const struct slu_adapter *adapter,
                                                      uint32_t layer, enum slu_target target)
{
    uint32_t i = adapter->by_target[layer * SLU_TARGETS + target];
    return i ? &adapter->loras[i - 1] : NULL;
}

/* The pair of the expert that has these bytes (slu_expert_bytes). */
static inline void slu_lora_of_expert(const struct slu_lora *lora, const uint8_t *bytes,
                                      struct slu_mat *ret_a, struct slu_mat *ret_b)
{
    *ret_a = lora->a;
    *ret_b = lora->b;
    ret_a->data = bytes + lora->at;
    ret_b->data = ret_a->data + lora->a.at.bytes;
}

#endif
