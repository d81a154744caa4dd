/*
 * From halves to pairs to a file. Sorted by layer, map, expert and side, the halves of a pair stand
 * next to each other, and the pairs of a map's experts too: a *group*, which becomes one record of
 * the .sla. In a group that is one stack already, matrices are copied as they are. Where experts
 * come apart, those that an adapter leaves alone get zeros, lower ranks are filled up with zeros,
 * and where scales differ they are multiplied into B.
 *
 * In the .sla all that one expert of a layer has is one block, so a layer's groups are written
 * expert by expert. Never is more in memory than a few matrices and what the writer holds.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/sla.h"
#include "tools/adapter_parts.h"

#define DIGITS_MAX 5u
/* Maps of a layer's experts: gate, up, down. */
#define GROUPS_MAX 3u

struct group {
    const struct slu_import_half *halves; /* A, B, A, B, ... by expert */
    size_t n_pairs;
    struct slu_sla_record record;
};

int slu_import_add(struct slu_import *import, const struct slu_import_half *half,
                   struct slu_err *err)
{
    if (import->n_halves == import->room) {
        size_t room = import->room ? 2 * import->room : 64;
        struct slu_import_half *grown = realloc(import->halves, room * sizeof *grown);
        if (!grown) {
            return slu_err_set(err, SLU_ENOMEM, "no memory for the list of an adapter's matrices");
        }
        import->halves = grown;
        import->room = room;
    }
    import->halves[import->n_halves++] = *half;
    return 0;
}

void slu_import_finish(struct slu_import *import)
{
    free(import->halves);
    *import = (struct slu_import){0};
}

size_t slu_import_number(const char *at, size_t len, uint32_t *ret)
{
    uint32_t value = 0;
    size_t n = 0;
    while (n < len && at[n] >= '0' && at[n] <= '9') {
        if (n == DIGITS_MAX) {
            return 0;
        }
        value = value * 10 + (uint32_t)(at[n] - '0');
        n++;
    }
    *ret = value;
    return n;
}

bool slu_import_target(const char *name, size_t len, enum slu_target *ret_target,
                       uint32_t *ret_expert)
{
    static const char *const parts[] = {"ffn_gate.", "ffn_up.", "ffn_down."};
    for (unsigned i = 0; i < SLU_TARGETS; i++) {
        const char *known = slu_target_name((enum slu_target)i);
        if (strlen(known) == len && memcmp(known, name, len) == 0) {
            *ret_target = (enum slu_target)i;
            return true;
        }
    }
    for (unsigned i = 0; i < 3; i++) {
        size_t n = strlen(parts[i]);
        if (len > n && memcmp(name, parts[i], n) == 0 &&
            slu_import_number(name + n, len - n, ret_expert) == len - n) {
            *ret_target = (enum slu_target)(SLU_TARGET_EXPERT_GATE + i);
            return true;
        }
    }
    return false;
}

static int by_place(const void *x, const void *y)
{
    const struct slu_import_half *a = x, *b = y;
    if (a->layer != b->layer) {
        return a->layer < b->layer ? -1 : 1;
    }
    if (a->target != b->target) {
        return a->target < b->target ? -1 : 1;
    }
    if (a->expert != b->expert) {
        return a->expert < b->expert ? -1 : 1;
    }
    return (int)a->is_b - (int)b->is_b;
}

static bool is_same_map(const struct slu_import_half *a, const struct slu_import_half *b)
{
    return a->layer == b->layer && a->target == b->target;
}

/* Each A with its B behind it, of one rank. */
static int check_pair(const struct slu_import *import, size_t i, struct slu_err *err)
{
    const struct slu_import_half *a = &import->halves[i];
    const struct slu_import_half *b = i + 1 < import->n_halves ? a + 1 : NULL;
    bool is_pair = b && is_same_map(a, b) && a->expert == b->expert;
    if (is_pair && a->is_b == b->is_b) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s and %s are for the same matrix",
                           a->matrix.source->name, a->name.text, b->name.text);
    }
    if (!is_pair) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s has no %s beside it", a->matrix.source->name,
                           a->name.text, a->is_b ? "A" : "B");
    }
    if (a->matrix.rows != b->matrix.cols || a->matrix.n != b->matrix.n) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s (%u x %u x %u) and %s (%u x %u x %u) make no pair: the rank or "
                           "the number of experts differs",
                           a->matrix.source->name, a->name.text, a->matrix.n, a->matrix.rows,
                           a->matrix.cols, b->name.text, b->matrix.n, b->matrix.rows,
                           b->matrix.cols);
    }
    if (!isfinite(a->scale) || !isfinite((float)a->scale)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: the scale of %s isn't finite",
                           a->matrix.source->name, a->name.text);
    }
    return 0;
}

/* The group that begins with half i, which is known to be whole pairs. */
static int make_group(const struct slu_import *import, size_t i, struct group *ret_group,
                      struct slu_err *err)
{
    const struct slu_import_half *first = &import->halves[i];
    const struct slu_import_matrix *a = &first[0].matrix, *b = &first[1].matrix;
    struct group g = {
        .halves = first,
        .record = {.target = first->target,
                   .layer = first->layer,
                   .rank = a->rows,
                   .n = a->n,
                   .in = a->cols,
                   .out = b->rows,
                   .fmt_a = a->fmt,
                   .fmt_b = b->fmt,
                   .scale = (float)first->scale},
    };
    for (; i < import->n_halves && is_same_map(first, &import->halves[i]); i += 2) {
        const struct slu_import_half *half = &import->halves[i];
        a = &half[0].matrix;
        b = &half[1].matrix;
        if (g.n_pairs > 0 && half->expert == SLU_IMPORT_NO_EXPERT) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: %s is for all experts, but %s is for one of them",
                               a->source->name, half->name.text, first->name.text);
        }
        if (a->cols != g.record.in || b->rows != g.record.out) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: %s is for %u inputs and %u outputs, but %s for %u and %u",
                               a->source->name, half->name.text, a->cols, b->rows, first->name.text,
                               g.record.in, g.record.out);
        }
        bool is_scaled = half->scale != first->scale;
        g.record.rank = a->rows > g.record.rank ? a->rows : g.record.rank;
        g.record.fmt_a = a->fmt != g.record.fmt_a ? SLU_FMT_F32 : g.record.fmt_a;
        g.record.fmt_b = b->fmt != g.record.fmt_b || is_scaled ? SLU_FMT_F32 : g.record.fmt_b;
        if (fabs(half->scale) > fabs((double)g.record.scale)) {
            g.record.scale = (float)half->scale;
        }
        g.n_pairs++;
    }
    if (first->expert != SLU_IMPORT_NO_EXPERT) {
        g.record.n = import->n_experts;
    }
    *ret_group = g;
    return 0;
}

static int check_experts(struct slu_import *import, struct slu_err *err)
{
    uint32_t n_experts = 0;
    for (size_t i = 0; i < import->n_halves; i++) {
        const struct slu_import_half *half = &import->halves[i];
        if (half->expert == SLU_IMPORT_NO_EXPERT) {
            continue;
        }
        if (half->expert >= SLU_SLA_EXPERTS_MAX ||
            (import->n_experts && half->expert >= import->n_experts)) {
            return slu_err_set(err, SLU_EFORMAT, "%s: %s is for an expert that the model lacks",
                               half->matrix.source->name, half->name.text);
        }
        n_experts = half->expert >= n_experts ? half->expert + 1 : n_experts;
    }
    import->n_experts = import->n_experts ? import->n_experts : n_experts;
    return 0;
}

static int check_base(const struct group *g, const struct slu_base *base, struct slu_err *err)
{
    const struct slu_import_half *half = g->halves;
    struct slu_target_shape shape = {0};
    if (half->layer < base->n_layers) {
        base->shape(base->arg, half->target, half->layer, &shape);
    }
    if (shape.in != g->record.in || shape.out != g->record.out || shape.n != g->record.n) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s is for %u inputs, %u outputs and %u experts, but the base has "
                           "%u, %u and %u there",
                           half->matrix.source->name, half->name.text, g->record.in, g->record.out,
                           g->record.n, shape.in, shape.out, shape.n);
    }
    return 0;
}

int slu_import_check(struct slu_import *import, const struct slu_base *base, struct slu_err *err)
{
    if (import->n_halves == 0) {
        return slu_err_set(err, SLU_EFORMAT, "there are no LoRA matrices to import");
    }
    qsort(import->halves, import->n_halves, sizeof *import->halves, by_place);
    int rc = check_experts(import, err);
    for (size_t i = 0; i < import->n_halves && rc == 0; i += 2) {
        rc = check_pair(import, i, err);
    }
    for (size_t i = 0; i < import->n_halves && rc == 0;) {
        struct group group = {0};
        rc = make_group(import, i, &group, err);
        if (rc == 0 && base) {
            rc = check_base(&group, base, err);
        }
        i += 2 * group.n_pairs;
    }
    return rc;
}

/* ---- matrices ---------------------------------------------------------------------------- */

static size_t number_bytes(uint32_t fmt)
{
    return fmt == SLU_FMT_F32 ? 4 : 2;
}

static float number_at(const uint8_t *data, enum slu_fmt_id fmt, size_t i)
{
    uint32_t bits = 0;
    uint16_t half = 0;
    float value;
    if (fmt == SLU_FMT_F32) {
        memcpy(&bits, data + 4 * i, sizeof bits);
    } else {
        memcpy(&half, data + 2 * i, sizeof half);
        if (fmt == SLU_FMT_F16) {
            return slu_f16_to_f32(half);
        }
        bits = (uint32_t)half << 16;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Puts number `from` of the source at number `to` of the destination. */
static void put_number(uint8_t *out, uint32_t fmt_out, size_t to, const uint8_t *data,
                       enum slu_fmt_id fmt, size_t from, float factor)
{
    if (fmt_out == (uint32_t)fmt && factor == 1.0f) {
        size_t bytes = number_bytes(fmt_out);
        memcpy(out + to * bytes, data + from * bytes, bytes);
    } else {
        float value = number_at(data, fmt, from) * factor;
        memcpy(out + 4 * to, &value, sizeof value);
    }
}

/* Matrix number i of the half as fmt_out, its rows `cols` wide and zeros behind its own columns;
 * multiplied by factor (which needs F32). out has room and is zeroed. */
static int read_matrix(const struct slu_import_half *half, uint32_t i, uint32_t fmt_out,
                       uint32_t cols, float factor, uint8_t *scratch, uint8_t *out,
                       struct slu_err *err)
{
    const struct slu_import_matrix *m = &half->matrix;
    size_t n = (size_t)m->rows * m->cols, bytes = n * number_bytes(m->fmt);
    int rc = m->source->read_at(m->source, m->offset + (uint64_t)i * bytes, scratch, bytes, err);
    if (rc < 0) {
        return rc;
    }
    for (size_t at = 0; at < n; at++) {
        if (!isfinite(number_at(scratch, m->fmt, at))) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: %s holds infinities or NaNs; the adapter is broken",
                               m->source->name, half->name.text);
        }
    }
    if (fmt_out == (uint32_t)m->fmt && factor == 1.0f && cols == m->cols && !m->is_transposed) {
        memcpy(out, scratch, bytes);
        return 0;
    }
    for (uint32_t r = 0; r < m->rows; r++) {
        for (uint32_t c = 0; c < m->cols; c++) {
            size_t from = m->is_transposed ? (size_t)c * m->rows + r : (size_t)r * m->cols + c;
            put_number(out, fmt_out, (size_t)r * cols + c, scratch, m->fmt, from, factor);
        }
    }
    for (size_t at = 0; factor != 1.0f && at < (size_t)m->rows * cols; at++) {
        if (!isfinite(number_at(out, SLU_FMT_F32, at))) {
            return slu_err_set(err, SLU_EFORMAT, "%s: %s is too large for its scale",
                               m->source->name, half->name.text);
        }
    }
    return 0;
}

/* What writing takes: matrices as they lie in the source and in the file. */
struct buffers {
    uint8_t *out, *scratch;
    size_t out_bytes, scratch_bytes;
};

/* Room for what of the group is largest. */
static int make_room(struct buffers *buffers, const struct group *g, struct slu_err *err)
{
    struct slu_mat_layout a, b;
    slu_sla_layouts(&g->record, &a, &b); /* the writer has checked it */
    size_t out = a.bytes > b.bytes ? a.bytes : b.bytes, scratch = 0;
    for (size_t i = 0; i < 2 * g->n_pairs; i++) {
        const struct slu_import_matrix *m = &g->halves[i].matrix;
        size_t its = (size_t)m->rows * m->cols * number_bytes(m->fmt);
        scratch = its > scratch ? its : scratch;
    }
    if (out > buffers->out_bytes) {
        free(buffers->out);
        buffers->out = malloc(out);
        buffers->out_bytes = out;
    }
    if (scratch > buffers->scratch_bytes) {
        free(buffers->scratch);
        buffers->scratch = malloc(scratch);
        buffers->scratch_bytes = scratch;
    }
    return buffers->out && buffers->scratch
               ? 0
               : slu_err_set(err, SLU_ENOMEM, "no memory for a matrix of %zu bytes", out);
}

/* A and B of expert e, or of what has no experts (e is 0 then), from pair *at of the group on,
 * which moves on behind it. */
static int write_pair(const struct group *g, uint32_t e, size_t *at, struct buffers *buffers,
                      struct slu_sla_writer *writer, struct slu_err *err)
{
    const struct slu_sla_record *r = &g->record;
    struct slu_mat_layout layouts[2];
    slu_sla_layouts(r, &layouts[0], &layouts[1]);
    const struct slu_import_half *pair = &g->halves[2 * *at];
    bool is_stack = pair->expert == SLU_IMPORT_NO_EXPERT;
    bool is_there = is_stack || pair->expert == e;
    int rc = 0;
    for (unsigned is_b = 0; is_b < 2 && rc == 0; is_b++) {
        const struct slu_import_half *half = &pair[is_b];
        memset(buffers->out, 0, layouts[is_b].bytes);
        if (is_there) {
            float factor = is_b && (float)half->scale != r->scale
                               ? (float)(half->scale / (double)r->scale)
                               : 1.0f;
            rc = read_matrix(half, is_stack ? e : 0, is_b ? r->fmt_b : r->fmt_a,
                             is_b ? r->rank : r->in, factor, buffers->scratch, buffers->out, err);
        }
        rc = rc < 0 ? rc : slu_sla_writer_append(writer, buffers->out, layouts[is_b].bytes, err);
    }
    *at += is_there && !is_stack && *at + 1 < g->n_pairs;
    return rc;
}

/* The blocks of a layer whose experts these groups are for. */
static int write_experts(const struct group *groups, uint32_t n_groups, struct buffers *buffers,
                         struct slu_sla_writer *writer, struct slu_err *err)
{
    struct slu_sla_record records[GROUPS_MAX];
    size_t at[GROUPS_MAX] = {0};
    for (uint32_t i = 0; i < n_groups; i++) {
        records[i] = groups[i].record;
    }
    int rc = slu_sla_writer_experts(writer, records, n_groups, err);
    for (uint32_t i = 0; i < n_groups && rc == 0; i++) {
        rc = make_room(buffers, &groups[i], err);
    }
    for (uint32_t e = 0; e < records[0].n && rc == 0; e++) {
        for (uint32_t i = 0; i < n_groups && rc == 0; i++) {
            rc = write_pair(&groups[i], e, &at[i], buffers, writer, err);
        }
    }
    return rc;
}

/* All pairs outside of routed experts, or those of all layers' experts. */
static int write_groups(const struct slu_import *import, bool is_experts, struct buffers *buffers,
                        struct slu_sla_writer *writer, struct slu_err *err)
{
    int rc = 0;
    for (size_t i = 0; i < import->n_halves && rc == 0;) {
        struct group groups[GROUPS_MAX] = {0};
        uint32_t n_groups = 0;
        const struct slu_import_half *first = &import->halves[i];
        bool is_expert = slu_sla_is_expert(first->target);
        /* Of experts, all groups of the layer. */
        while (rc == 0 && i < import->n_halves &&
               (n_groups == 0 || (is_expert && import->halves[i].layer == first->layer &&
                                  slu_sla_is_expert(import->halves[i].target)))) {
            rc = make_group(import, i, &groups[n_groups], err);
            i += 2 * groups[n_groups++].n_pairs;
        }
        if (rc < 0 || is_expert != is_experts) {
            continue;
        }
        if (is_expert) {
            rc = write_experts(groups, n_groups, buffers, writer, err);
            continue;
        }
        size_t at = 0;
        rc = slu_sla_writer_pair(writer, &groups[0].record, err);
        rc = rc < 0 ? rc : make_room(buffers, &groups[0], err);
        rc = rc < 0 ? rc : write_pair(&groups[0], 0, &at, buffers, writer, err);
    }
    return rc;
}

int slu_import_write(const struct slu_import *import, const char *path, struct slu_err *err)
{
    struct slu_sla_writer *writer;
    struct buffers buffers = {0};
    int rc = slu_sla_writer_create(path, &writer, err);
    if (rc < 0) {
        return rc;
    }
    rc = write_groups(import, false, &buffers, writer, err);
    rc = rc < 0 ? rc : write_groups(import, true, &buffers, writer, err);
    rc = rc < 0 ? rc : slu_sla_writer_finish(writer, &import->info, err);
    slu_sla_writer_destroy(writer);
    free(buffers.out);
    free(buffers.scratch);
    return rc;
}
