/*
 * Work is cut into items: some tokens, and some of the query heads that share a head of the cache.
 * An item's queries, its rows, go together from tile to tile of the cache, so that a tile's
 * numbers are loaded and converted once for all of them. A tile's scores are weighed as they come
 * (Milakov and Gimelshein, arXiv:1805.02867): whenever one raises the maximum of its row, what was
 * summed up before is scaled down.
 *
 * Tiles begin at multiples of SLU_KV_TILE, and a row's terms are those positions of a tile that
 * its token sees, in order. So it gets the same numbers in whatever chunk or item it is.
 */
#include "model/attend.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "model/ops.h"

#define TILE       SLU_KV_TILE
#define ROWS_MAX   64u /* of an item */
#define ROWS_FUSED 8u  /* up to so many convert a tile's numbers as they multiply them */
#define COLS       16u /* positions are scored in multiples of it */

struct run {
    struct slu_model *model;
    const struct slu_kv_cache *kv;
    const struct slu_attend *a;
    uint32_t group;             /* query heads of a head of the cache */
    uint32_t n_heads, n_tokens; /* of an item, at most */
    uint32_t n_parts;           /* items that a group's heads are cut into */
    uint32_t n_blocks;          /* items that the chunk's tokens are cut into */
    _Atomic uint32_t next;      /* relaxed: only hands out items */
};

/* A thread's scratch. Rows are [token][head]. */
struct item {
    uint32_t kv_head, head, n_heads; /* the first query head, and how many */
    uint32_t token, n_tokens;
    uint32_t first, last; /* positions of the first and the last token */
    float *q;             /* rows x k_dim, scaled */
    float *out;           /* rows x v_dim */
    float *weights;       /* rows x TILE: scores at first */
    float *high, *sum, *shrink;
    float *keys;   /* k_dim x TILE */
    float *values; /* TILE x v_dim */
};

static uint32_t rows_max(uint32_t group)
{
    return group < ROWS_MAX ? ROWS_MAX / group * group : ROWS_MAX;
}

size_t slu_attend_scratch(const struct slu_config *c)
{
    uint32_t group = c->is_mla ? c->n_heads : c->n_heads / c->n_heads_kv;
    size_t k_dim = c->is_mla ? c->kv_lora + c->rope_dims : c->k_dim;
    size_t v_dim = c->is_mla ? c->kv_lora : c->v_dim, rows = rows_max(group);
    return rows * (k_dim + v_dim + TILE + 3) + TILE * (k_dim + v_dim);
}

static void item_carve(const struct run *r, struct item *item, float *at)
{
    size_t k_dim = r->kv->k_dim, v_dim = r->a->v_dim, rows = rows_max(r->group);
    item->keys = at;
    item->values = item->keys + TILE * k_dim;
    item->weights = item->values + TILE * v_dim;
    item->q = item->weights + TILE * rows;
    item->out = item->q + rows * k_dim;
    item->high = item->out + rows * v_dim;
    item->sum = item->high + rows;
    item->shrink = item->sum + rows;
}

/* The first position that the token at `position` sees. */
static uint32_t seen_from(const struct run *r, uint32_t position)
{
    uint32_t window = r->a->window;
    return window && position + 1 > window ? position + 1 - window : 0;
}

static void begin(const struct run *r, struct item *item)
{
    const struct slu_attend *a = r->a;
    uint32_t k_dim = r->kv->k_dim, row = 0;
    for (uint32_t t = 0; t < item->n_tokens; t++) {
        for (uint32_t h = 0; h < item->n_heads; h++, row++) {
            const float *q =
                a->q + ((size_t)(item->token + t) * a->n_heads + item->head + h) * k_dim;
            float *scaled = item->q + (size_t)row * k_dim;
            for (uint32_t i = 0; i < k_dim; i++) {
                scaled[i] = q[i] * a->scale;
            }
            /* A sink is one more logit that takes its share and gives nothing. */
            item->high[row] = a->sinks ? a->sinks[item->head + h] : -INFINITY;
            item->sum[row] = a->sinks ? 1.0f : 0.0f;
        }
    }
    memset(item->out, 0, (size_t)row * a->v_dim * sizeof(float));
}

static void end(const struct run *r, const struct item *item)
{
    const struct slu_attend *a = r->a;
    uint32_t row = 0;
    for (uint32_t t = 0; t < item->n_tokens; t++) {
        for (uint32_t h = 0; h < item->n_heads; h++, row++) {
            float *out =
                a->out + ((size_t)(item->token + t) * a->n_heads + item->head + h) * a->v_dim;
            const float *sum = item->out + (size_t)row * a->v_dim;
            float part = 1.0f / item->sum[row];
            for (uint32_t i = 0; i < a->v_dim; i++) {
                out[i] = sum[i] * part;
            }
        }
    }
}

/* weights = q . keys, for positions lo .. hi-1 of the tile at least. */
static void score(const struct run *r, const struct item *item, uint32_t tile, uint32_t lo,
                  uint32_t hi, const void *next)
{
    const struct slu_kern *kern = r->model->kern;
    uint32_t rows = item->n_tokens * item->n_heads, k_dim = r->kv->k_dim;
    struct slu_attn_mat keys = slu_kv_cache_keys(r->kv, r->a->l, tile, item->kv_head);
    if (rows > ROWS_FUSED || r->kv->v_dim == 0) {
        kern->attn_floats(item->keys, &keys, k_dim, TILE);
        keys = (struct slu_attn_mat){SLU_ATTN_F32, item->keys, TILE, NULL, 0};
    }
    lo = lo / COLS * COLS;
    hi = (hi + COLS - 1) / COLS * COLS;
    kern->attn_mul(&(struct slu_attn_mul){
        .c = item->weights + lo,
        .c_stride = TILE,
        .a = item->q,
        .a_stride = k_dim,
        .b = slu_attn_from_col(keys, lo),
        .rows = rows,
        .k = k_dim,
        .n = hi - lo,
        .next = next,
        .next_bytes = next ? r->kv->v_bytes : 0,
    });
}

/* With MLA: values are the first rows of the keys, turned over. */
static void turn(float *values, const float *keys, uint32_t v_dim)
{
    for (uint32_t i = 0; i < v_dim; i += COLS) {
        for (uint32_t p = 0; p < TILE; p++) {
            for (uint32_t j = i; j < i + COLS && j < v_dim; j++) {
                values[(size_t)p * v_dim + j] = keys[(size_t)j * TILE + p];
            }
        }
    }
}

static struct slu_attn_mat values_of(const struct run *r, const struct item *item, uint32_t tile)
{
    uint32_t v_dim = r->a->v_dim;
    struct slu_attn_mat floats = {SLU_ATTN_F32, item->values, v_dim, NULL, 0};
    if (r->kv->v_dim == 0) {
        turn(item->values, item->keys, v_dim);
        return floats;
    }
    struct slu_attn_mat values = slu_kv_cache_values(r->kv, r->a->l, tile, item->kv_head);
    if (item->n_tokens * item->n_heads <= ROWS_FUSED) {
        return values;
    }
    r->model->kern->attn_floats(item->values, &values, TILE, v_dim);
    return floats;
}

/* out += weights . values over positions lo .. hi-1 of the tile, for tokens t .. end-1. */
static void add_values(const struct run *r, const struct item *item, const struct slu_attn_mat *v,
                       uint32_t t, uint32_t end_token, uint32_t lo, uint32_t hi, const void *next)
{
    size_t row = (size_t)t * item->n_heads;
    r->model->kern->attn_mul(&(struct slu_attn_mul){
        .c = item->out + row * r->a->v_dim,
        .c_stride = r->a->v_dim,
        .factor = item->shrink + row,
        .a = item->weights + row * TILE + lo,
        .a_stride = TILE,
        .b = slu_attn_from_row(*v, lo),
        .rows = (end_token - t) * item->n_heads,
        .k = hi - lo,
        .n = r->a->v_dim,
        .next = next,
        .next_bytes = next ? r->kv->k_bytes : 0,
    });
}

/* The positions of a tile that a token sees: lo .. hi-1, none if not lo < hi. */
static void seen(const struct run *r, const struct item *item, uint32_t t, uint32_t tile,
                 uint32_t *ret_lo, uint32_t *ret_hi)
{
    uint32_t position = item->first + t, start = tile * TILE, from = seen_from(r, position);
    *ret_lo = from > start ? from - start : 0;
    *ret_hi = position < start ? 0 : position - start < TILE ? position - start + 1 : TILE;
}

static void attend_tile(const struct run *r, const struct item *item, uint32_t tile)
{
    uint32_t start = tile * TILE, from = seen_from(r, item->first), t = 0;
    /* With few rows it is memory that is waited for. */
    const void *values_next = NULL, *keys_next = NULL;
    if (item->n_tokens * item->n_heads <= ROWS_FUSED && r->kv->v_dim) {
        values_next = slu_kv_cache_values(r->kv, r->a->l, tile, item->kv_head).codes;
        keys_next = slu_kv_cache_keys(r->kv, r->a->l, tile + 1, item->kv_head).codes;
    }
    score(r, item, tile, from > start ? from - start : 0,
          item->last - start < TILE ? item->last - start + 1 : TILE, values_next);
    struct slu_attn_mat values = values_of(r, item, tile);
    while (t < item->n_tokens) {
        uint32_t lo, hi, next_lo, next_hi, first = t;
        seen(r, item, t, tile, &lo, &hi);
        do { /* tokens that see the same of it are multiplied together */
            for (uint32_t h = 0; lo < hi && h < item->n_heads; h++) {
                uint32_t row = t * item->n_heads + h;
                item->shrink[row] =
                    r->model->kern->attn_weigh(item->weights + (size_t)row * TILE + lo, hi - lo,
                                               &item->high[row], &item->sum[row]);
            }
            t++;
            seen(r, item, t, tile, &next_lo, &next_hi);
        } while (t < item->n_tokens && next_lo == lo && next_hi == hi);
        if (lo < hi) {
            add_values(r, item, &values, first, t, lo, hi,
                       tile < item->last / TILE ? keys_next : NULL);
        }
    }
}

/* Items of the last tokens come first: they take the longest. */
static void attend_item(const struct run *r, struct item *item, uint32_t i)
{
    uint32_t per_block = r->kv->n_heads * r->n_parts;
    uint32_t block = r->n_blocks - 1 - i / per_block, part = i % r->n_parts;
    item->kv_head = i % per_block / r->n_parts;
    item->head = item->kv_head * r->group + part * r->n_heads;
    uint32_t left = r->group - part * r->n_heads;
    item->n_heads = left < r->n_heads ? left : r->n_heads;
    item->token = block * r->n_tokens;
    left = r->a->n - item->token;
    item->n_tokens = left < r->n_tokens ? left : r->n_tokens;
    item->first = r->kv->n + r->a->from + item->token;
    item->last = item->first + item->n_tokens - 1;
    begin(r, item);
    for (uint32_t tile = seen_from(r, item->first) / TILE; tile <= item->last / TILE; tile++) {
        attend_tile(r, item, tile);
    }
    end(r, item);
}

static void work(void *arg, unsigned thread, unsigned n_threads)
{
    struct run *r = arg;
    struct slu_scratch *s = &r->model->scratch;
    struct item item;
    (void)n_threads;
    item_carve(r, &item, s->attend + thread * s->attend_stride);
    for (;;) {
        slu_keep_reading(r->model, thread);
        uint32_t i = atomic_fetch_add_explicit(&r->next, 1, memory_order_relaxed);
        if (i >= r->n_blocks * r->kv->n_heads * r->n_parts) {
            return;
        }
        attend_item(r, &item, i);
    }
}

void slu_attend(struct slu_model *m, const struct slu_kv_cache *kv, const struct slu_attend *a)
{
    struct run r = {.model = m, .kv = kv, .a = a, .group = a->n_heads / kv->n_heads};
    uint32_t n_threads = slu_pool_threads(m->pool), n_items;
    r.n_heads = r.group < ROWS_MAX ? r.group : ROWS_MAX;
    r.n_tokens = ROWS_MAX / r.n_heads;
    r.n_blocks = (a->n + r.n_tokens - 1) / r.n_tokens;
    for (;;) {
        r.n_parts = (r.group + r.n_heads - 1) / r.n_heads;
        n_items = r.n_blocks * kv->n_heads * r.n_parts;
        if (r.n_heads == 1 || n_items % n_threads == 0 || n_items >= 4 * n_threads) {
            break;
        }
        r.n_heads = (r.n_heads + 1) / 2;
    }
    slu_pool_run(m->pool, work, &r);
}
