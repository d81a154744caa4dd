/* Any bytes as an adapter: as a .sla, once as they are and once with their checksums put right,
 * each read into memory and with its experts streamed, and as the weights of a PEFT adapter and as
 * a GGUF LoRA on their way into one. A first byte of '{' makes them a PEFT configuration instead.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "adapters/expert_stream.h"
#include "tools/adapter_parts.h"
#include "tools/peft.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What a model on the machine would leave to adapters: a bomb must not pass it. */
#define LEDGER_BYTES (32u << 20)

/* Accepts about any shape, so that as much as can be is read. */
static void shape_of(void *arg, enum slu_target target, uint32_t layer,
                     struct slu_target_shape *ret_shape)
{
    const struct slu_sla *sla = arg;
    *ret_shape = (struct slu_target_shape){0};
    for (uint32_t i = 0; i < sla->info.n_loras; i++) {
        const struct slu_sla_record *r = &sla->records[i];
        if (r->target == (uint32_t)target && r->layer == layer) {
            *ret_shape = (struct slu_target_shape){r->in, r->out, r->n, r->out % 4 ? 0 : 2};
        }
    }
}

/* Each refusal has its sentence. */
static void expect_sentence(int rc, const struct slu_err *err)
{
    if (rc < 0 && (err->code != rc || err->text[0] == '\0' || strchr(err->text, '\n'))) {
        abort();
    }
}

/* The first experts of each layer in rounds, the file as it was opened. */
static void run_rounds(const struct slu_adapter *adapter)
{
    for (uint32_t l = 0; l < adapter->n_layers; l++) {
        uint32_t experts[4], n = 0;
        while (n < adapter->layers[l].n && n < 4 && n < slu_expert_stream_slots(adapter)) {
            experts[n] = n;
            n++;
        }
        struct slu_err err = {0};
        int rc = n ? slu_expert_stream_begin(adapter, l, experts, n, &err) : 0;
        if (n && rc == 0) {
            slu_expert_stream_take(adapter, 0);
            bool is_there = slu_expert_stream_check(adapter) == 0;
            for (uint32_t i = 0; i < n && is_there; i++) {
                const uint8_t *bytes = slu_expert_bytes(adapter, l, i);
                volatile uint8_t last = bytes[adapter->layers[l].block_bytes - 1];
                (void)last;
            }
            rc = slu_expert_stream_end(adapter, &err);
        }
        if (rc != 0) { /* loading has read it all before */
            abort();
        }
    }
}

/* With as few slots as can be: from a file, since a stream opens one. */
static void open_streamed(struct slu_source *source, const struct slu_base *base,
                          const uint8_t *data, size_t size)
{
    char path[32];
    struct slu_adapter *adapter = NULL;
    struct slu_err err = {0};
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) {
        close(fd);
        return;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    struct slu_ledger *ledger = slu_ledger_create(LEDGER_BYTES);
    struct slu_adapter_streaming streaming = {
        .path = path, .n_workers = 1, .backend = SLU_IO_PREAD};
    uint64_t bytes = 0;
    int rc = slu_adapter_fit(source, base, 0, &streaming, &bytes, &err);
    if (rc != SLU_EBUDGET) { /* which has no sentence */
        abort();
    }
    rc = slu_adapter_open_streamed(source, base, &streaming, ledger, &adapter, &err);
    expect_sentence(rc, &err);
    if (rc == 0) {
        if (adapter->charged_bytes != bytes || slu_ledger_used(ledger) != bytes) {
            abort();
        }
        run_rounds(adapter);
        slu_adapter_close(adapter);
    }
    slu_ledger_destroy(ledger);
    close(fd);
}

static void open_sla(const uint8_t *data, size_t size)
{
    struct slu_source *source;
    struct slu_sla sla;
    struct slu_adapter *adapter = NULL;
    struct slu_err err = {0};
    if (slu_source_open_memory(data, size, "fuzz", &source) != 0) {
        return;
    }
    int rc = slu_sla_open(source, &sla, &err);
    expect_sentence(rc, &err);
    if (rc == 0) {
        struct slu_ledger *ledger = slu_ledger_create(LEDGER_BYTES);
        const struct slu_base base = {.fingerprint = sla.info.base_fingerprint,
                                      .n_layers = SLU_SLA_LAYERS_MAX,
                                      .shape = shape_of,
                                      .arg = &sla};
        rc = slu_adapter_open(source, &base, ledger, &adapter, &err);
        expect_sentence(rc, &err);
        slu_adapter_close(rc == 0 ? adapter : NULL);
        slu_ledger_destroy(ledger); /* asserts that it is empty */
        if (sla.info.n_blocks > 0) {
            open_streamed(source, &base, data, size);
        }
        slu_sla_finish(&sla);
    }
    slu_source_destroy(source);
}

static bool in_file(const struct slu_extent *extent, size_t size)
{
    return extent->offset <= size && extent->stored_bytes <= size - extent->offset;
}

/* A copy with sizes and checksums put right, as far as they name places in the file. */
static void open_sealed(const uint8_t *data, size_t size)
{
    struct slu_sla_header header;
    if (size < SLU_SLA_PAGE_BYTES) {
        return;
    }
    uint8_t *copy = malloc(size);
    if (!copy) {
        return;
    }
    memcpy(copy, data, size);
    memcpy(&header, copy, sizeof header);
    memset(copy, 0, SLU_SLA_PAGE_BYTES);
    memcpy(header.magic, SLU_SLA_MAGIC, sizeof header.magic);
    header.version = SLU_SLA_VERSION;
    header.header_bytes = sizeof header;
    header.file_bytes = size;
    uint64_t skip = (uint64_t)header.n_loras * sizeof(struct slu_sla_record);
    for (uint64_t i = 0; i < (uint64_t)header.n_extents + header.n_blocks && i < 64; i++) {
        struct slu_extent extent;
        uint64_t at = skip + i * sizeof extent;
        if (!in_file(&header.index, size) || at + sizeof extent > size - header.index.offset) {
            break;
        }
        memcpy(&extent, copy + header.index.offset + at, sizeof extent);
        if (in_file(&extent, size)) {
            extent.checksum = slu_checksum(copy + extent.offset, extent.stored_bytes);
            memcpy(copy + header.index.offset + at, &extent, sizeof extent);
        }
    }
    if (in_file(&header.meta, size) && in_file(&header.index, size)) {
        header.meta.checksum = slu_checksum(copy + header.meta.offset, header.meta.stored_bytes);
        header.index.checksum = slu_checksum(copy + header.index.offset, header.index.stored_bytes);
    }
    header.checksum = slu_checksum(&header, offsetof(struct slu_sla_header, checksum));
    memcpy(copy, &header, sizeof header);
    open_sla(copy, size);
    free(copy);
}

static void import(const uint8_t *data, size_t size)
{
    static const char config[] = "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,"
                                 "\"rank_pattern\":{\"k_proj\":3,\".*experts.1.up_proj\":1}}";
    for (unsigned is_peft = 0; is_peft < 2; is_peft++) {
        struct slu_source *source;
        struct slu_import all = {0};
        struct slu_err err = {0};
        if (slu_source_open_memory(data, size, "fuzz", &source) != 0) {
            return;
        }
        int rc = is_peft ? slu_import_peft(source, config, sizeof config - 1, "config", &all, &err)
                         : slu_import_gguf(source, &all, &err);
        rc = rc < 0 ? rc : slu_import_check(&all, NULL, &err);
        expect_sentence(rc, &err);
        slu_import_finish(&all);
        slu_source_destroy(source);
    }
}

static void configure(const uint8_t *data, size_t size)
{
    static const char module[] = "model.layers.0.self_attn.q_proj";
    struct slu_peft *peft;
    struct slu_err err = {0};
    uint32_t rank;
    double scale;
    int rc = slu_peft_open((const char *)data, size, "config", &peft, &err);
    expect_sentence(rc, &err);
    if (rc == 0) {
        rc = slu_peft_module(peft, module, sizeof module - 1, &rank, &scale, &err);
        expect_sentence(rc, &err);
        slu_peft_has_module(peft, module, sizeof module - 1);
        slu_peft_close(peft);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size > 0 && data[0] == '{') {
        configure(data, size);
        return 0;
    }
    open_sla(data, size);
    open_sealed(data, size);
    import(data, size);
    return 0;
}
