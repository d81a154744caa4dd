#include "tools/importance_record.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/place.h"
#include "engine.h"
#include "io/codec.h"
#include "tools/importance.h"

#define MAGIC 0x53554d3155504c53ull /* "SLPU1MUS" */

/* What went into one matrix, or one expert's. */
struct sums {
    float *squares; /* [cols]; NULL: nothing yet */
    uint64_t n;     /* rows */
};

/* The matrices of one layer that read the same: of experts a sum for each. */
struct input {
    struct sums *sums; /* [n] */
    uint32_t n, cols;
};

struct slu_importance_record {
    struct slu_engine *engine;
    struct slu_model_inputs inputs;
    uint32_t n_layers;
    struct input *table; /* [n_layers][SLU_TARGETS] */
    bool is_short;       /* there was no memory for a sum */
};

/* What is saved before each sum's numbers; all zero but n at the end. */
struct saved {
    uint32_t index, expert, cols, reserved;
    uint64_t n, checksum; /* checksum: of the numbers */
};

struct saved_header {
    uint64_t magic, fingerprint, input, n_prompts;
};

static bool reserve(struct slu_importance_record *r, struct input *in, uint32_t expert)
{
    struct sums *sums = &in->sums[expert];
    if (!sums->squares) {
        sums->squares = calloc(in->cols, sizeof *sums->squares);
        r->is_short = r->is_short || !sums->squares;
    }
    return sums->squares != NULL;
}

static bool is_down(enum slu_target target)
{
    return target == SLU_TARGET_FFN_DOWN || target == SLU_TARGET_SHARED_DOWN ||
           target == SLU_TARGET_EXPERT_DOWN;
}

static bool is_gate(enum slu_target target)
{
    return target == SLU_TARGET_FFN_GATE || target == SLU_TARGET_SHARED_GATE ||
           target == SLU_TARGET_EXPERT_GATE;
}

/* A down matrix's sums are made with its gate's, by the thread that shows those, since many threads
 * add to them. */
static void see(void *arg, uint32_t layer, enum slu_target target, uint32_t expert, uint32_t first,
                uint32_t cols, const float *x, size_t stride, const uint32_t *rows, uint32_t n)
{
    struct slu_importance_record *r = arg;
    struct input *in = &r->table[(size_t)layer * SLU_TARGETS + target];
    if (expert >= in->n || first + cols > in->cols) {
        return; /* the router, or what has no entry */
    }
    if (!is_down(target)) {
        if (!reserve(r, in, expert)) {
            return;
        }
        in->sums[expert].n += n;
    }
    if (is_gate(target) && reserve(r, in + 2, expert)) {
        in[2].sums[expert].n += n;
    }
    float *squares = in->sums[expert].squares;
    for (uint32_t i = 0; i < n && squares; i++) {
        const float *row = x + (size_t)(rows ? rows[i] : i) * stride;
        for (uint32_t c = 0; c < cols; c++) {
            squares[first + c] += row[c] * row[c];
        }
    }
}

static bool set_input(struct slu_importance_record *r, uint32_t layer, int target, uint32_t n,
                      uint32_t cols)
{
    struct input *in = &r->table[(size_t)layer * SLU_TARGETS + (uint32_t)target];
    *in = (struct input){.sums = calloc(n, sizeof *in->sums), .n = n, .cols = cols};
    return in->sums != NULL;
}

static bool set_bank(struct slu_importance_record *r, uint32_t layer, enum slu_target gate,
                     const struct slu_bank *bank)
{
    return bank->n_experts == 0 ||
           (set_input(r, layer, gate, bank->n_experts, bank->shape.n_embd) &&
            set_input(r, layer, (int)gate + 2, bank->n_experts, bank->shape.n_ff));
}

static bool set_layer(struct slu_importance_record *r, uint32_t l, const struct slu_layer *layer)
{
    const struct slu_mat *mats[] = {
        [SLU_TARGET_Q] = &layer->q,       [SLU_TARGET_K] = &layer->k,
        [SLU_TARGET_V] = &layer->v,       [SLU_TARGET_OUT] = &layer->out,
        [SLU_TARGET_Q_A] = &layer->q_a,   [SLU_TARGET_Q_B] = &layer->q_b,
        [SLU_TARGET_KV_A] = &layer->kv_a,
    };
    for (int i = 0; i < (int)(sizeof mats / sizeof *mats); i++) {
        if (mats[i]->fmt && !set_input(r, l, i, 1, mats[i]->cols)) {
            return false;
        }
    }
    bool has_routed = layer->routed.n_experts > 0;
    return set_bank(r, l, SLU_TARGET_EXPERT_GATE, &layer->routed) &&
           set_bank(r, l, has_routed ? SLU_TARGET_SHARED_GATE : SLU_TARGET_FFN_GATE,
                    &layer->resident);
}

int slu_importance_record_create(struct slu_engine *engine,
                                 struct slu_importance_record **ret_record, struct slu_err *err)
{
    const struct slu_weights *w = &engine->weights;
    struct slu_importance_record *r = calloc(1, sizeof *r);
    bool is_whole = r != NULL;
    if (r) {
        r->n_layers = w->config.n_layers;
        r->table = calloc((size_t)r->n_layers * SLU_TARGETS, sizeof *r->table);
        is_whole = r->table != NULL;
        for (uint32_t l = 0; l < r->n_layers && is_whole; l++) {
            is_whole = set_layer(r, l, &w->layers[l]);
        }
        is_whole = is_whole && set_input(r, 0, SLU_TARGET_HEAD, 1, w->head.cols);
    }
    if (!is_whole) {
        slu_importance_record_destroy(r);
        return slu_err_set(err, SLU_ENOMEM, "out of memory to record what matters");
    }
    r->engine = engine;
    r->inputs = (struct slu_model_inputs){see, r};
    pthread_mutex_lock(&engine->compute);
    engine->model.inputs = &r->inputs;
    pthread_mutex_unlock(&engine->compute);
    *ret_record = r;
    return 0;
}

void slu_importance_record_destroy(struct slu_importance_record *r)
{
    if (!r) {
        return;
    }
    if (r->engine) {
        pthread_mutex_lock(&r->engine->compute);
        r->engine->model.inputs = NULL;
        pthread_mutex_unlock(&r->engine->compute);
    }
    for (size_t i = 0; r->table && i < (size_t)r->n_layers * SLU_TARGETS; i++) {
        for (uint32_t e = 0; r->table[i].sums && e < r->table[i].n; e++) {
            free(r->table[i].sums[e].squares);
        }
        free(r->table[i].sums);
    }
    free(r->table);
    free(r);
}

/* Entries with their names and means, in memory of their own. */
struct list {
    struct slu_importance_entry *entries;
    char (*names)[SLU_IMPORTANCE_NAME_BYTES];
    float *means;
    size_t n, n_means;
};

static void add_entry(struct list *list, const struct slu_importance_record *r, size_t index,
                      enum slu_target target, uint32_t expert)
{
    const struct input *in = &r->table[index];
    const struct sums *sums = &in->sums[expert];
    const char *name = slu_target_name(target);
    if (target == SLU_TARGET_HEAD) {
        const char *head = r->engine->weights.is_tied ? "token_embd" : name;
        snprintf(list->names[list->n], sizeof *list->names, "%s.weight", head);
    } else {
        snprintf(list->names[list->n], sizeof *list->names, "blk.%u.%s.weight",
                 (unsigned)(index / SLU_TARGETS), name);
    }
    bool is_stack = target >= SLU_TARGET_EXPERT_GATE && target <= SLU_TARGET_EXPERT_DOWN;
    list->entries[list->n] = (struct slu_importance_entry){
        .name = list->names[list->n],
        .expert = is_stack ? expert : SLU_IMPORTANCE_NO_EXPERT,
        .n_cols = in->cols,
        .moments = list->means + list->n_means,
    };
    for (uint32_t c = 0; c < in->cols; c++) {
        float mean = sums->squares[c] / (float)sums->n;
        list->means[list->n_means++] = isfinite(mean) ? mean : 0;
    }
    list->n++;
}

/* Each sum once, gates' twice: up reads the same. With NULL arrays it only counts. */
static void list_entries(const struct slu_importance_record *r, struct list *list)
{
    for (size_t i = 0; i < (size_t)r->n_layers * SLU_TARGETS; i++) {
        enum slu_target target = (enum slu_target)(i % SLU_TARGETS);
        for (uint32_t e = 0; e < r->table[i].n; e++) {
            for (int up = 0; up <= is_gate(target) && r->table[i].sums[e].n; up++) {
                if (list->entries) {
                    add_entry(list, r, i, (enum slu_target)((int)target + up), e);
                } else {
                    list->n++;
                    list->n_means += r->table[i].cols;
                }
            }
        }
    }
}

int slu_importance_record_write(const struct slu_importance_record *r, const char *path,
                                struct slu_err *err)
{
    struct list list = {0};
    list_entries(r, &list);
    size_t n = list.n + 1;
    list.entries = malloc(n * sizeof *list.entries);
    list.names = malloc(n * sizeof *list.names);
    list.means = malloc((list.n_means + 1) * sizeof *list.means);
    int rc;
    if (r->is_short || !list.entries || !list.names || !list.means) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory for what matters", path);
    } else {
        list.n = list.n_means = 0;
        list_entries(r, &list);
        rc = slu_importance_write(path, list.entries, list.n, err);
    }
    free(list.entries);
    free(list.names);
    free(list.means);
    return rc;
}

static bool save_all(const struct slu_importance_record *r, FILE *f)
{
    bool is_good = true;
    for (size_t i = 0; i < (size_t)r->n_layers * SLU_TARGETS; i++) {
        const struct input *in = &r->table[i];
        for (uint32_t e = 0; e < in->n && is_good; e++) {
            const struct sums *sums = &in->sums[e];
            if (!sums->squares) {
                continue;
            }
            const struct saved saved = {
                (uint32_t)i, e,       in->cols,
                0,           sums->n, slu_checksum(sums->squares, 4 * (size_t)in->cols)};
            is_good = fwrite(&saved, sizeof saved, 1, f) == 1 &&
                      fwrite(sums->squares, 4, in->cols, f) == in->cols;
        }
    }
    return is_good && fwrite(&(struct saved){0}, sizeof(struct saved), 1, f) == 1;
}

int slu_importance_record_save(const struct slu_importance_record *r, const char *path,
                               uint64_t input, uint32_t n_prompts, struct slu_err *err)
{
    const struct saved_header header = {MAGIC, r->engine->pack->fingerprint, input, n_prompts};
    char *temp;
    int fd = slu_place_open(path, &temp, err);
    if (fd < 0) {
        return fd;
    }
    FILE *f = fdopen(fd, "wb");
    bool is_good = f && fwrite(&header, sizeof header, 1, f) == 1 && save_all(r, f) &&
                   fflush(f) == 0 && (fsync(fd) == 0 || errno == EINVAL);
    is_good = (f ? fclose(f) : close(fd)) == 0 && is_good;
    return slu_place_commit(-1, temp, path, is_good)
               ? 0
               : slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(errno));
}

/* One sum; false at the end and where the file isn't what it should be. */
static bool load_one(struct slu_importance_record *r, FILE *f, bool *ret_is_end)
{
    struct saved saved;
    if (fread(&saved, sizeof saved, 1, f) != 1) {
        return false;
    }
    *ret_is_end = saved.cols == 0;
    if (*ret_is_end || saved.index >= r->n_layers * (uint32_t)SLU_TARGETS) {
        return false;
    }
    struct input *in = &r->table[saved.index];
    if (saved.expert >= in->n || saved.cols != in->cols || !reserve(r, in, saved.expert)) {
        return false;
    }
    struct sums *sums = &in->sums[saved.expert];
    sums->n = saved.n;
    return fread(sums->squares, 4, in->cols, f) == in->cols &&
           slu_checksum(sums->squares, 4 * (size_t)in->cols) == saved.checksum;
}

static void forget(struct slu_importance_record *r)
{
    for (size_t i = 0; i < (size_t)r->n_layers * SLU_TARGETS; i++) {
        for (uint32_t e = 0; e < r->table[i].n; e++) {
            free(r->table[i].sums[e].squares);
            r->table[i].sums[e] = (struct sums){0};
        }
    }
}

int slu_importance_record_check(const char *path, struct slu_err *err)
{
    char magic[8];
    memcpy(magic, &(uint64_t){MAGIC}, sizeof magic);
    return slu_place_check_left(path, magic, err);
}

uint32_t slu_importance_record_load(struct slu_importance_record *r, const char *path,
                                    uint64_t input)
{
    struct saved_header header;
    FILE *f = fopen(path, "rbe");
    bool is_end = false;
    if (!f) {
        return 0;
    }
    if (fread(&header, sizeof header, 1, f) == 1 && header.magic == MAGIC &&
        header.fingerprint == r->engine->pack->fingerprint && header.input == input &&
        header.n_prompts <= UINT32_MAX) {
        while (load_one(r, f, &is_end)) {
        }
    }
    fclose(f);
    if (!is_end) {
        forget(r);
        return 0;
    }
    return (uint32_t)header.n_prompts;
}
