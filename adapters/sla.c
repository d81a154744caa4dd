/*
 * The file is laid out without gaps but those to the next page, frames and blocks in the order of
 * the index and then metadata and index themselves, so that there is one place where each byte can
 * be: no offset needs to be believed, nothing can overlap, and every bit of the file is under a
 * checksum or must be zero.
 */
#include "adapters/sla.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"

static const char *const target_names[SLU_TARGETS] = {
    [SLU_TARGET_Q] = "attn_q",
    [SLU_TARGET_K] = "attn_k",
    [SLU_TARGET_V] = "attn_v",
    [SLU_TARGET_OUT] = "attn_output",
    [SLU_TARGET_Q_A] = "attn_q_a",
    [SLU_TARGET_Q_B] = "attn_q_b",
    [SLU_TARGET_KV_A] = "attn_kv_a_mqa",
    [SLU_TARGET_KV_B] = "attn_kv_b",
    [SLU_TARGET_ROUTER] = "ffn_gate_inp",
    [SLU_TARGET_FFN_GATE] = "ffn_gate",
    [SLU_TARGET_FFN_UP] = "ffn_up",
    [SLU_TARGET_FFN_DOWN] = "ffn_down",
    [SLU_TARGET_SHARED_GATE] = "ffn_gate_shexp",
    [SLU_TARGET_SHARED_UP] = "ffn_up_shexp",
    [SLU_TARGET_SHARED_DOWN] = "ffn_down_shexp",
    [SLU_TARGET_EXPERT_GATE] = "ffn_gate_exps",
    [SLU_TARGET_EXPERT_UP] = "ffn_up_exps",
    [SLU_TARGET_EXPERT_DOWN] = "ffn_down_exps",
    [SLU_TARGET_EMBEDDING] = "token_embd",
    [SLU_TARGET_HEAD] = "output",
};

const char *slu_target_name(enum slu_target target)
{
    return (unsigned)target < SLU_TARGETS ? target_names[target] : "?";
}

static const struct slu_fmt *float_fmt(uint32_t id)
{
    const struct slu_fmt *fmt = slu_fmt_get(id);
    return fmt && fmt->scale == SLU_SCALE_NONE ? fmt : NULL;
}

bool slu_sla_layouts(const struct slu_sla_record *record, struct slu_mat_layout *ret_a,
                     struct slu_mat_layout *ret_b)
{
    const struct slu_fmt *a = float_fmt(record->fmt_a), *b = float_fmt(record->fmt_b);
    return a && b && record->rank <= SLU_SLA_RANK_MAX &&
           slu_mat_layout(a, record->rank, record->in, ret_a) &&
           slu_mat_layout(b, record->out, record->rank, ret_b);
}

static int read_header(struct slu_source *source, struct slu_sla_header *ret_header,
                       struct slu_err *err)
{
    uint8_t page[SLU_SLA_PAGE_BYTES];
    const char *name = source->name;
    size_t bytes = source->size_bytes < sizeof page ? (size_t)source->size_bytes : sizeof page;
    int rc = source->read_at(source, 0, page, bytes, err);
    if (rc < 0) {
        return rc;
    }
    if (bytes < 8 || memcmp(page, SLU_SLA_MAGIC, 8) != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: is no adapter of sluice; `sluice adapter import` makes one", name);
    }
    if (bytes < sizeof page) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: has %zu bytes, less than a header; it is "
                           "truncated",
                           name, bytes);
    }
    struct slu_sla_header header;
    memcpy(&header, page, sizeof header);
    if (header.version != SLU_SLA_VERSION) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: has version %u of the adapter format, and this build reads version "
                           "%u; import it again",
                           name, header.version, SLU_SLA_VERSION);
    }
    uint8_t rest = 0;
    for (size_t i = sizeof header; i < sizeof page; i++) {
        rest |= page[i];
    }
    if (header.header_bytes != sizeof header || rest || header.reserved != 0 ||
        header.checksum != slu_checksum(&header, offsetof(struct slu_sla_header, checksum))) {
        return slu_err_set(err, SLU_EFORMAT, "%s: its header is damaged", name);
    }
    if (header.file_bytes != source->size_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: has %llu bytes where its header says %llu; it is truncated or has "
                           "grown",
                           name, (unsigned long long)source->size_bytes,
                           (unsigned long long)header.file_bytes);
    }
    *ret_header = header;
    return 0;
}

/* Metadata and index, raw, of these sizes, at the very end. */
static int check_header(const struct slu_sla_header *header, const char *name, struct slu_err *err)
{
    uint64_t index_bytes =
        (uint64_t)header->n_loras * sizeof(struct slu_sla_record) +
        ((uint64_t)header->n_extents + header->n_blocks) * sizeof(struct slu_extent);
    if (header->n_loras == 0 || header->n_loras > SLU_SLA_LAYERS_MAX * SLU_TARGETS ||
        (header->n_extents == 0 && header->n_blocks == 0) ||
        header->n_extents > SLU_SLA_EXTENTS_MAX ||
        header->n_blocks > SLU_SLA_LAYERS_MAX * SLU_SLA_EXPERTS_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims %u pairs in %u frames and %u expert blocks, which can't be",
                           name, header->n_loras, header->n_extents, header->n_blocks);
    }
    const struct slu_extent *meta = &header->meta, *index = &header->index;
    uint64_t end = header->file_bytes;
    bool is_right =
        meta->codec == SLU_CODEC_RAW && index->codec == SLU_CODEC_RAW && meta->reserved == 0 &&
        index->reserved == 0 && meta->raw_bytes == sizeof(struct slu_sla_meta) &&
        meta->stored_bytes == meta->raw_bytes && index->raw_bytes == index_bytes &&
        index->stored_bytes == index_bytes &&
        end - SLU_SLA_PAGE_BYTES > index_bytes + meta->raw_bytes &&
        index->offset == end - index_bytes && meta->offset == index->offset - meta->raw_bytes;
    if (!is_right) {
        return slu_err_set(err, SLU_EFORMAT, "%s: its header places metadata or index wrongly",
                           name);
    }
    return 0;
}

static int read_extent(struct slu_source *source, const struct slu_extent *extent, void *out,
                       const char *what, struct slu_err *err)
{
    int rc = source->read_at(source, extent->offset, out, extent->raw_bytes, err);
    if (rc == 0 && slu_checksum(out, extent->raw_bytes) != extent->checksum) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: its %s are damaged: the checksum doesn't match",
                         source->name, what);
    }
    return rc;
}

size_t slu_sla_char_bytes(const char *text, size_t len)
{
    static const uint32_t first_of_length[] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char lead = (unsigned char)text[0];
    if (lead < 0x80) {
        return lead >= 0x20 && lead != 0x7f;
    }
    size_t n = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc0 || lead >= 0xf8 || n > len) {
        return 0;
    }
    uint32_t point = lead & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if (((unsigned char)text[i] & 0xc0) != 0x80) {
            return 0;
        }
        point = point << 6 | ((unsigned char)text[i] & 0x3f);
    }
    bool is_surrogate = point >= 0xd800 && point < 0xe000;
    bool is_valid = point >= first_of_length[n] && point >= 0xa0 && point <= 0x10ffff;
    return is_valid && !is_surrogate ? n : 0;
}

/* Terminated, zero-filled, UTF-8, and without what would steer a terminal. */
static bool is_text(const char *text, size_t bytes)
{
    size_t len = strnlen(text, bytes);
    for (size_t i = 0, n; i < len; i += n) {
        n = slu_sla_char_bytes(text + i, len - i);
        if (n == 0) {
            return false;
        }
    }
    for (size_t i = len; i < bytes; i++) {
        if (text[i] != '\0') {
            return false;
        }
    }
    return len < bytes;
}

static int read_meta(struct slu_source *source, const struct slu_sla_header *header,
                     struct slu_adapter_info *info, struct slu_err *err)
{
    struct slu_sla_meta meta;
    int rc = read_extent(source, &header->meta, &meta, "metadata", err);
    if (rc < 0) {
        return rc;
    }
    if (!is_text(meta.name, sizeof meta.name) || !is_text(meta.arch, sizeof meta.arch) ||
        !is_text(meta.description, sizeof meta.description) || meta.reserved != 0 ||
        meta.flags > SLU_SLA_HF_ORDER) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: its metadata hold a name, text or flag that isn't allowed",
                           source->name);
    }
    memcpy(info->name, meta.name, sizeof meta.name);
    memcpy(info->description, meta.description, sizeof meta.description);
    memcpy(info->arch, meta.arch, sizeof meta.arch);
    info->base_fingerprint = meta.base_fingerprint;
    info->is_hf_order = meta.flags & SLU_SLA_HF_ORDER;
    return 0;
}

/* What can be said of a record without knowing the base. */
static int check_record(const struct slu_sla *sla, uint32_t i, const char *name,
                        uint64_t *ret_pair_bytes, struct slu_err *err)
{
    const struct slu_sla_record *r = &sla->records[i];
    bool is_whole = r->target == SLU_TARGET_EMBEDDING || r->target == SLU_TARGET_HEAD;
    bool is_stack = slu_sla_is_expert(r->target);
    if (r->target >= SLU_TARGETS || r->layer >= (is_whole ? 1 : SLU_SLA_LAYERS_MAX)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: pair %u is for target %u of layer %u, which no "
                           "model has",
                           name, i, r->target, r->layer);
    }
    const char *target = slu_target_name((enum slu_target)r->target);
    if (i > 0 &&
        (r[-1].layer > r->layer || (r[-1].layer == r->layer && r[-1].target >= r->target))) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s of layer %u is there twice or out of order",
                           name, target, r->layer);
    }
    if (r->rank > SLU_SLA_RANK_MAX || r->n == 0 || r->n > (is_stack ? SLU_SLA_EXPERTS_MAX : 1)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u claims %u pairs of rank %u; up to %u of %u can be",
                           name, target, r->layer, r->n, r->rank,
                           is_stack ? SLU_SLA_EXPERTS_MAX : 1, SLU_SLA_RANK_MAX);
    }
    struct slu_mat_layout a, b;
    if (!slu_sla_layouts(r, &a, &b)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u has a shape (%u to %u, rank %u) or a number format "
                           "that can't be",
                           name, target, r->layer, r->in, r->out, r->rank);
    }
    if (!isfinite(r->scale)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: the scale of %s of layer %u isn't finite", name,
                           target, r->layer);
    }
    *ret_pair_bytes = (uint64_t)a.bytes + b.bytes;
    return 0;
}

/* Sizes and codec of an extent that begins at `at`, behind which the file goes on to `end`. */
static bool is_placed(const struct slu_extent *e, uint64_t at, uint64_t raw_bytes, uint64_t end)
{
    return e->offset == at && at <= end && e->stored_bytes > 0 && e->stored_bytes <= raw_bytes &&
           e->stored_bytes <= end - at && e->raw_bytes == raw_bytes && e->reserved == 0 &&
           e->codec < SLU_CODECS && (e->codec != SLU_CODEC_RAW || e->stored_bytes == raw_bytes);
}

/* The frames of record i, from extent *first on, at *at; both are moved behind them. */
static int check_frames(const struct slu_sla *sla, uint32_t i, uint64_t raw_bytes, uint64_t end,
                        const char *name, uint32_t *first, uint64_t *at, struct slu_err *err)
{
    const struct slu_sla_record *r = &sla->records[i];
    uint64_t n = (raw_bytes + SLU_SLA_PIECE_BYTES - 1) / SLU_SLA_PIECE_BYTES;
    if (r->n_extents != n || n > sla->n_extents - *first) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u has %u frames where its shape needs %llu", name,
                           slu_target_name((enum slu_target)r->target), r->layer, r->n_extents,
                           (unsigned long long)n);
    }
    for (uint32_t left = r->n_extents; left > 0; left--, ++*first) {
        const struct slu_extent *e = &sla->extents[*first];
        uint64_t raw = left > 1 ? SLU_SLA_PIECE_BYTES : raw_bytes - (n - 1) * SLU_SLA_PIECE_BYTES;
        if (!is_placed(e, *at, raw, end)) {
            return slu_err_set(err, SLU_EFORMAT,
                               "%s: frame %u of the index has a place or size that can't be", name,
                               *first);
        }
        *at += e->stored_bytes;
    }
    return 0;
}

/* Record i, of routed experts: the first of its layer to have blocks, or a further one. */
static int check_experts(struct slu_sla *sla, uint32_t i, uint64_t pair_bytes, const char *name,
                         struct slu_err *err)
{
    const struct slu_sla_record *r = &sla->records[i];
    const char *target = slu_target_name((enum slu_target)r->target);
    if (r->n_extents != 0) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u has %u frames; experts are in blocks of their own",
                           name, target, r->layer, r->n_extents);
    }
    struct slu_sla_layer *l = sla->n_layers ? &sla->layers[sla->n_layers - 1] : NULL;
    if (sla->info.n_blocks && (!l || l->layer != r->layer)) {
        uint32_t first_block = l ? l->first_block + l->n : 0;
        l = &sla->layers[sla->n_layers++];
        *l = (struct slu_sla_layer){
            .layer = r->layer, .n = r->n, .first_record = i, .first_block = first_block};
    }
    if (!l || l->n != r->n || r->n > sla->info.n_blocks - l->first_block) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: %s of layer %u is for %u experts, which its blocks are not", name,
                           target, r->layer, r->n);
    }
    if (pair_bytes > SLU_SLA_BLOCK_MAX - l->block_bytes) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: an expert of layer %u has more than the %u bytes that can be", name,
                           r->layer, SLU_SLA_BLOCK_MAX);
    }
    l->n_records++;
    l->block_bytes += (uint32_t)pair_bytes;
    return 0;
}

/* The blocks of all layers, each from a page on, from *at on, which is moved behind them. */
static int check_blocks(struct slu_sla *sla, uint64_t end, const char *name, uint64_t *at,
                        struct slu_err *err)
{
    struct slu_adapter_info *info = &sla->info;
    uint32_t n_blocks = 0;
    for (uint32_t i = 0; i < sla->n_layers; i++) {
        const struct slu_sla_layer *l = &sla->layers[i];
        for (uint32_t x = 0; x < l->n; x++, n_blocks++) {
            const struct slu_extent *e = &sla->extents[sla->n_extents + n_blocks];
            if (!is_placed(e, *at, l->block_bytes, end)) {
                return slu_err_set(err, SLU_EFORMAT,
                                   "%s: expert block %u of the index has a place or size that "
                                   "can't be",
                                   name, n_blocks);
            }
            uint32_t stored = (uint32_t)slu_sla_page_up(e->stored_bytes);
            sla->stored_max = stored > sla->stored_max ? stored : sla->stored_max;
            *at += stored;
        }
        info->expert_bytes += (uint64_t)l->n * l->block_bytes;
        info->block_bytes = l->block_bytes > info->block_bytes ? l->block_bytes : info->block_bytes;
        info->n_experts = l->n > info->n_experts ? l->n : info->n_experts;
    }
    if (n_blocks != info->n_blocks) {
        return slu_err_set(err, SLU_EFORMAT, "%s: has %u expert blocks where its pairs need %u",
                           name, info->n_blocks, n_blocks);
    }
    return 0;
}

/* Adds a record to what is told of the whole. */
static void sum_record(struct slu_adapter_info *info, const struct slu_sla_record *r)
{
    bool is_first = info->targets == 0;
    info->targets |= 1u << r->target;
    info->n_layers = r->layer + 1 > info->n_layers ? r->layer + 1 : info->n_layers;
    info->rank_min = is_first || r->rank < info->rank_min ? r->rank : info->rank_min;
    info->rank_max = r->rank > info->rank_max ? r->rank : info->rank_max;
}

/* `end`: where the metadata begin. ret_frames_end: where the last frame ends. */
static int check_index(struct slu_sla *sla, uint64_t end, const char *name,
                       uint64_t *ret_frames_end, struct slu_err *err)
{
    uint32_t n_frames = 0;
    uint64_t at = SLU_SLA_PAGE_BYTES;
    for (uint32_t i = 0; i < sla->info.n_loras; i++) {
        uint64_t pair_bytes = 0;
        int rc = check_record(sla, i, name, &pair_bytes, err);
        if (rc == 0 && slu_sla_is_expert(sla->records[i].target)) {
            rc = check_experts(sla, i, pair_bytes, name, err);
        } else if (rc == 0) {
            rc = check_frames(sla, i, pair_bytes, end, name, &n_frames, &at, err);
            sla->matrix_bytes += pair_bytes;
        }
        if (rc < 0) {
            return rc;
        }
        sum_record(&sla->info, &sla->records[i]);
    }
    *ret_frames_end = at;
    at = sla->n_layers ? slu_sla_page_up(at) : at;
    int rc = check_blocks(sla, end, name, &at, err);
    if (rc == 0 && (n_frames != sla->n_extents || at != end)) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: its index doesn't account for all of the file",
                         name);
    }
    return rc;
}

/* Between the frames and the page on which the expert blocks begin. */
static int check_gap(struct slu_source *source, uint64_t frames_end, struct slu_err *err)
{
    uint8_t bytes[SLU_SLA_PAGE_BYTES];
    size_t n = (size_t)(slu_sla_page_up(frames_end) - frames_end);
    int rc = n ? source->read_at(source, frames_end, bytes, n, err) : 0;
    return rc < 0 ? rc : slu_sla_check_zeros(bytes, n, source->name, err);
}

int slu_sla_check_zeros(const uint8_t *bytes, size_t n, const char *name, struct slu_err *err)
{
    uint8_t any = 0;
    for (size_t i = 0; i < n; i++) {
        any |= bytes[i];
    }
    return any ? slu_err_set(err, SLU_EFORMAT, "%s: is damaged: what fills up a page isn't zero",
                             name)
               : 0;
}

int slu_sla_open(struct slu_source *source, struct slu_sla *ret_sla, struct slu_err *err)
{
    struct slu_sla sla = {0};
    struct slu_sla_header header = {0};
    int rc = read_header(source, &header, err);
    if (rc == 0) {
        rc = check_header(&header, source->name, err);
    }
    if (rc == 0) {
        rc = read_meta(source, &header, &sla.info, err);
    }
    if (rc < 0) {
        return rc;
    }
    /* Its size was checked against the file's, so a small file can't ask for much. */
    sla.index = malloc(header.index.raw_bytes);
    sla.layers = header.n_blocks ? calloc(SLU_SLA_LAYERS_MAX, sizeof *sla.layers) : NULL;
    if (!sla.index || (header.n_blocks && !sla.layers)) {
        rc = slu_err_set(err, SLU_ENOMEM, "%s: no memory for its index", source->name);
        slu_sla_finish(&sla);
        return rc;
    }
    sla.records = sla.index;
    sla.extents = (void *)(sla.records + header.n_loras);
    sla.n_extents = header.n_extents;
    sla.info.n_loras = header.n_loras;
    sla.info.n_blocks = header.n_blocks;
    sla.info.file_bytes = header.file_bytes;
    uint64_t frames_end = 0;
    rc = read_extent(source, &header.index, sla.index, "index", err);
    rc = rc < 0 ? rc : check_index(&sla, header.meta.offset, source->name, &frames_end, err);
    rc = rc < 0 || !header.n_blocks ? rc : check_gap(source, frames_end, err);
    if (rc < 0) {
        slu_sla_finish(&sla);
        return rc;
    }
    *ret_sla = sla;
    return 0;
}

void slu_sla_finish(struct slu_sla *sla)
{
    free(sla->index);
    free(sla->layers);
    *sla = (struct slu_sla){0};
}
