#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "io/codec.h"
#include "tools/trace_parts.h"

#define PAYLOAD_BYTES_MAX ((uint64_t)1 << 30)

struct slu_trace_reader {
    struct slu_source *source;
    struct slu_trace_shape shape;
    uint64_t at;
    /* Of the prompt that was read last. */
    size_t payload_bytes, choices_max, tokens_max;
    uint8_t *payload;
    int32_t *ids;
    uint16_t *experts;
    float *weights;
    uint32_t *seen; /* [n_experts] the visit that chose it last */
    uint32_t n_seen;
};

bool slu_trace_is(struct slu_source *source)
{
    char magic[8];
    return source->size_bytes >= sizeof magic &&
           source->read_at(source, 0, magic, sizeof magic, NULL) == 0 &&
           memcmp(magic, SLU_TRACE_MAGIC, sizeof magic) == 0;
}

static int damaged(const struct slu_trace_reader *r, const char *what, struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT, "%s: offset %" PRIu64 ": %s", r->source->name, r->at,
                       what);
}

static int check_header(struct slu_trace_reader *r, const struct slu_trace_header *h,
                        struct slu_err *err)
{
    if (memcmp(h->magic, SLU_TRACE_MAGIC, sizeof h->magic) != 0) {
        return damaged(r, "this isn't a routing trace; sluice run --trace makes one", err);
    }
    if (h->version > SLU_TRACE_VERSION) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: is a routing trace of version %" PRIu32
                           ", newer than this program knows (%u)",
                           r->source->name, h->version, SLU_TRACE_VERSION);
    }
    if (h->version == 0 || h->reserved != 0 || h->n_layers == 0 ||
        h->n_layers > SLU_TRACE_LAYERS_MAX || h->n_routed == 0 || h->n_routed > h->n_layers ||
        h->n_experts == 0 || h->n_experts > 65536 || h->n_used == 0 || h->n_used > h->n_experts ||
        h->n_used > SLU_TRACE_USED_MAX || h->n_vocab == 0 || h->n_vocab > (1u << 30) ||
        h->header_bytes != slu_trace_header_bytes(h->n_routed)) {
        return damaged(r, "the trace's header makes no sense; it is damaged", err);
    }
    return 0;
}

/* Also the list of layers, which is as long as the header says. */
static int read_header(struct slu_trace_reader *r, struct slu_err *err)
{
    struct slu_trace_header h;
    if (r->source->size_bytes < sizeof h) {
        return damaged(r, "the file is too short for a routing trace", err);
    }
    int rc = r->source->read_at(r->source, 0, &h, sizeof h, err);
    rc = rc < 0 ? rc : check_header(r, &h, err);
    if (rc < 0) {
        return rc;
    }
    uint8_t data[sizeof h + 4 * SLU_TRACE_LAYERS_MAX + 16];
    if (r->source->size_bytes < h.header_bytes) {
        return damaged(r, "the trace ends within its header", err);
    }
    rc = r->source->read_at(r->source, 0, data, h.header_bytes, err);
    if (rc < 0) {
        return rc;
    }
    uint64_t sum;
    memcpy(&sum, data + h.header_bytes - 8, sizeof sum);
    if (sum != slu_checksum(data, h.header_bytes - 8)) {
        return damaged(r, "the checksum of the trace's header doesn't match; it is damaged", err);
    }
    r->shape = (struct slu_trace_shape){.fingerprint = h.fingerprint,
                                        .input = h.input,
                                        .n_layers = h.n_layers,
                                        .n_experts = h.n_experts,
                                        .n_used = h.n_used,
                                        .n_vocab = h.n_vocab,
                                        .n_routed = h.n_routed};
    memcpy(r->shape.layers, data + sizeof h, h.n_routed * sizeof *r->shape.layers);
    for (uint32_t i = 0; i < h.n_routed; i++) {
        if (r->shape.layers[i] >= h.n_layers ||
            (i > 0 && r->shape.layers[i] <= r->shape.layers[i - 1])) {
            return damaged(r, "the trace's list of layers makes no sense", err);
        }
    }
    r->at = h.header_bytes;
    return 0;
}

int slu_trace_reader_create(struct slu_source *source, struct slu_trace_reader **ret_reader,
                            struct slu_err *err)
{
    struct slu_trace_reader *r = calloc(1, sizeof *r);
    if (!r) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", source->name);
    }
    r->source = source;
    int rc = read_header(r, err);
    if (rc == 0) {
        r->seen = calloc(r->shape.n_experts, sizeof *r->seen);
        rc = r->seen ? 0 : slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", source->name);
    }
    if (rc < 0) {
        slu_trace_reader_destroy(r);
        return rc;
    }
    *ret_reader = r;
    return 0;
}

void slu_trace_reader_destroy(struct slu_trace_reader *r)
{
    if (r) {
        free(r->payload);
        free(r->ids);
        free(r->experts);
        free(r->weights);
        free(r->seen);
        free(r);
    }
}

const struct slu_trace_shape *slu_trace_reader_shape(const struct slu_trace_reader *r)
{
    return &r->shape;
}

uint64_t slu_trace_reader_offset(const struct slu_trace_reader *r)
{
    return r->at;
}

void slu_trace_reader_seek(struct slu_trace_reader *r, uint64_t offset)
{
    r->at = offset < r->source->size_bytes ? offset : r->source->size_bytes;
}

/* The payload is known to be within the file, so what is taken is in proportion to the file. */
static int reserve(struct slu_trace_reader *r, size_t payload_bytes, size_t n_tokens,
                   struct slu_err *err)
{
    size_t n_choices = n_tokens * r->shape.n_routed * r->shape.n_used;
    if (payload_bytes > r->payload_bytes) {
        free(r->payload);
        r->payload = malloc(payload_bytes);
        r->payload_bytes = r->payload ? payload_bytes : 0;
    }
    if (n_tokens > r->tokens_max) {
        free(r->ids);
        r->ids = malloc(n_tokens * sizeof *r->ids);
        r->tokens_max = r->ids ? n_tokens : 0;
    }
    if (n_choices > r->choices_max) {
        free(r->experts);
        free(r->weights);
        r->experts = malloc(n_choices * sizeof *r->experts);
        r->weights = malloc(n_choices * sizeof *r->weights);
        r->choices_max = r->experts && r->weights ? n_choices : 0;
    }
    if (!r->payload_bytes || !r->tokens_max || !r->choices_max) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for a prompt of %zu tokens",
                           r->source->name, n_tokens);
    }
    return 0;
}

static bool get_visit(struct slu_trace_reader *r, const uint8_t *at, uint16_t *experts,
                      float *weights)
{
    uint32_t k = r->shape.n_used, id_bytes = r->shape.n_experts > 256 ? 2 : 1;
    uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24, shares = 0;
    float total;
    memcpy(&total, &bits, sizeof total);
    if (!(total >= 0 && total < 1e31f)) { /* NaN too */
        return false;
    }
    r->n_seen++;
    for (uint32_t i = 0; i < k; i++) {
        experts[i] = 0;
        memcpy(&experts[i], at + 2 + (size_t)i * id_bytes, id_bytes);
        if (experts[i] >= r->shape.n_experts || r->seen[experts[i]] == r->n_seen) {
            return false;
        }
        r->seen[experts[i]] = r->n_seen;
        shares += at[2 + (size_t)k * id_bytes + i];
    }
    for (uint32_t i = 0; i < k; i++) {
        float share = (float)at[2 + (size_t)k * id_bytes + i];
        weights[i] = shares ? total * share / (float)shares : 0;
    }
    return true;
}

static int unpack(struct slu_trace_reader *r, uint32_t n_tokens, struct slu_err *err)
{
    const uint8_t *at = r->payload + 4 * (size_t)n_tokens;
    memcpy(r->ids, r->payload, 4 * (size_t)n_tokens);
    for (uint32_t t = 0; t < n_tokens; t++) {
        if (r->ids[t] < 0 || (uint32_t)r->ids[t] >= r->shape.n_vocab) {
            return damaged(r, "a token is outside the trace's vocabulary", err);
        }
    }
    memset(r->seen, 0, r->shape.n_experts * sizeof *r->seen);
    r->n_seen = 0;
    for (size_t i = 0; i < (size_t)n_tokens * r->shape.n_routed; i++) {
        size_t first = i * r->shape.n_used;
        if (!get_visit(r, at, r->experts + first, r->weights + first)) {
            return damaged(r, "a choice of experts makes no sense; the trace is damaged", err);
        }
        at += slu_trace_visit_bytes(&r->shape);
    }
    return 0;
}

int slu_trace_reader_next(struct slu_trace_reader *r, struct slu_trace_prompt *ret_prompt,
                          struct slu_err *err)
{
    uint64_t left = r->source->size_bytes - r->at;
    struct slu_trace_record record;
    if (left == 0) {
        return 0;
    }
    if (left < sizeof record) {
        return damaged(r, "the trace ends within a prompt; it is cut off", err);
    }
    int rc = r->source->read_at(r->source, r->at, &record, sizeof record, err);
    if (rc < 0) {
        return rc;
    }
    if (record.magic != SLU_TRACE_RECORD_MAGIC || record.reserved != 0 || record.n_tokens == 0 ||
        record.n_tokens > SLU_TRACE_TOKENS_MAX || record.n_prompt > record.n_tokens) {
        return damaged(r, "no prompt begins here; the trace is damaged", err);
    }
    uint64_t bytes = slu_trace_payload_bytes(&r->shape, record.n_tokens);
    if (bytes > left - sizeof record || bytes > PAYLOAD_BYTES_MAX) {
        return damaged(r, "the trace ends within a prompt; it is cut off", err);
    }
    rc = reserve(r, (size_t)bytes, record.n_tokens, err);
    rc = rc < 0
             ? rc
             : r->source->read_at(r->source, r->at + sizeof record, r->payload, (size_t)bytes, err);
    if (rc < 0) {
        return rc;
    }
    if (record.checksum != slu_trace_record_checksum(&record, r->payload, (size_t)bytes)) {
        return damaged(r, "the checksum of a prompt doesn't match; the trace is damaged", err);
    }
    rc = unpack(r, record.n_tokens, err);
    if (rc < 0) {
        return rc;
    }
    r->at += sizeof record + bytes;
    *ret_prompt = (struct slu_trace_prompt){.n_tokens = record.n_tokens,
                                            .n_prompt = record.n_prompt,
                                            .ids = r->ids,
                                            .experts = r->experts,
                                            .weights = r->weights};
    return 1;
}
