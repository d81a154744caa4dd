#include "tools/inspect.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "io/pack.h"
#include "kern/format.h"
#include "text/chat.h"

static void copy_str(char *out, size_t out_bytes, const char *at, size_t len)
{
    size_t n = 0;
    for (size_t i = 0; i < len && n < out_bytes - 1; i++) {
        if (at[i]) {
            out[n++] = at[i];
        }
    }
    out[n] = '\0';
}

static void copy_kv(char *out, size_t out_bytes, const struct slu_kvs *kvs, const char *key)
{
    struct slu_str str = {"", 0};
    (void)slu_kvs_str(kvs, key, &str, NULL);
    copy_str(out, out_bytes, str.at, str.len);
}

static uint64_t multiply(uint64_t a, uint64_t b)
{
    uint64_t product;
    return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

static void count_format(struct slu_inspect *inspect, const char *name, uint64_t n_tensors,
                         uint64_t n_weights, uint64_t bytes)
{
    uint32_t i = 0;
    while (i < inspect->n_formats && strcmp(inspect->formats[i].name, name) != 0) {
        i++;
    }
    if (i == SLU_INSPECT_FORMATS_MAX) {
        return;
    }
    inspect->n_formats += i == inspect->n_formats;
    struct slu_inspect_format *format = &inspect->formats[i];
    format->name = name;
    format->n_tensors += n_tensors;
    format->n_weights += n_weights;
    format->bytes += bytes;
}

static void read_metadata(struct slu_inspect *inspect, const struct slu_kvs *kvs)
{
    inspect->n_kvs = kvs->n;
    inspect->n_splits = 1;
    uint64_t n_splits;
    if (slu_kvs_u64(kvs, "split.count", &n_splits, NULL) == 0 && n_splits <= UINT16_MAX) {
        inspect->n_splits = (uint32_t)n_splits;
    }
    copy_kv(inspect->arch, sizeof inspect->arch, kvs, "general.architecture");
    copy_kv(inspect->name, sizeof inspect->name, kvs, "general.name");
    copy_kv(inspect->tokenizer, sizeof inspect->tokenizer, kvs, "tokenizer.ggml.model");
    copy_kv(inspect->pre, sizeof inspect->pre, kvs, "tokenizer.ggml.pre");
    const struct slu_kv *tokens = slu_kvs_find(kvs, "tokenizer.ggml.tokens");
    inspect->n_tokens = tokens && tokens->type == SLU_KV_ARRAY ? tokens->n_items : 0;
    inspect->chat = slu_chat_name(slu_chat_detect(kvs));
    inspect->is_supported = slu_config_read(kvs, &inspect->config, &inspect->problem) == 0;
}

/* Absent keys and such as are no numbers leave 0. */
static double number_kv(const struct slu_kvs *kvs, const char *key)
{
    double value = 0;
    return slu_kvs_f64(kvs, key, &value, NULL) == 0 && isfinite(value) ? value : 0;
}

static void read_codec(struct slu_inspect_codec *codec, const struct slu_kvs *kvs)
{
    char mode[8];
    copy_kv(mode, sizeof mode, kvs, "sluice.codec.mode");
    if (strcmp(mode, "auto") != 0) {
        return;
    }
    codec->is_auto = true;
    copy_kv(codec->reason, sizeof codec->reason, kvs, "sluice.codec.reason");
    codec->share = number_kv(kvs, "sluice.codec.share");
    codec->ratio = number_kv(kvs, "sluice.codec.ratio");
    codec->flash_mbps = number_kv(kvs, "sluice.codec.flash_mbps");
    codec->unpack_mbps = number_kv(kvs, "sluice.codec.unpack_mbps");
    codec->multiply_mbps = number_kv(kvs, "sluice.codec.multiply_mbps");
    slu_kvs_u64(kvs, "sluice.codec.cores", &codec->cores, NULL);
}

static const char *fmt_name(uint32_t id)
{
    const struct slu_fmt *fmt = slu_fmt_get(id);
    return fmt ? fmt->name : "unknown";
}

static uint64_t matrix_bytes(uint32_t fmt_id, uint32_t rows, uint32_t cols)
{
    const struct slu_fmt *fmt = slu_fmt_get(fmt_id);
    struct slu_mat_layout layout;
    return fmt && slu_mat_layout(fmt, rows, cols, &layout) ? layout.bytes : 0;
}

static void read_pack_tensors(struct slu_inspect *inspect, const struct slu_pack *pack)
{
    for (uint32_t i = 0; i < pack->header.n_tensors; i++) {
        const struct slu_pack_tensor *from = &pack->tensors[i];
        struct slu_inspect_tensor *to = &inspect->tensors[i];
        copy_str(to->name, sizeof to->name, from->name, strnlen(from->name, sizeof from->name));
        to->format = fmt_name(from->fmt);
        to->dims[0] = from->cols;
        to->dims[1] = from->rows;
        to->dims[2] = from->n;
        to->dims[3] = 1;
        to->n_dims = from->n > 1 ? 3 : from->rows > 1 ? 2 : 1;
        uint64_t bytes = from->kind == SLU_PACK_ROWS
                             ? multiply(from->rows, from->row_stride)
                             : matrix_bytes(from->fmt, from->rows, from->cols);
        to->bytes = multiply(bytes, from->n);
        count_format(inspect, to->format, 1, multiply(multiply(from->rows, from->cols), from->n),
                     to->bytes);
    }
}

static void read_bank(struct slu_inspect *inspect, const struct slu_pack *pack,
                      const struct slu_pack_bank *bank)
{
    uint64_t n_weights = multiply(multiply(bank->n_embd, bank->n_ff), bank->n_experts);
    uint32_t rows_bytes[3][3] = {{bank->fmt_gate, bank->n_ff, bank->n_embd},
                                 {bank->fmt_up, bank->n_ff, bank->n_embd},
                                 {bank->fmt_down, bank->n_embd, bank->n_ff}};
    for (int i = 0; i < 3; i++) {
        uint64_t bytes = matrix_bytes(rows_bytes[i][0], rows_bytes[i][1], rows_bytes[i][2]);
        count_format(inspect, fmt_name(rows_bytes[i][0]), 1, n_weights,
                     multiply(bytes, bank->n_experts));
    }
    if (bank->kind != SLU_BANK_ROUTED) {
        return;
    }
    uint64_t n_blocks = multiply(bank->n_experts, bank->n_blocks);
    for (uint64_t b = 0; b < n_blocks && bank->first_extent + b < pack->header.n_extents; b++) {
        const struct slu_extent *extent = &pack->extents[bank->first_extent + b];
        inspect->n_blocks++;
        inspect->n_blocks_compressed += extent->codec != SLU_CODEC_RAW;
        inspect->expert_bytes += extent->raw_bytes;
        inspect->expert_stored_bytes += extent->stored_bytes;
        if (extent->raw_bytes > inspect->block_bytes_max) {
            inspect->block_bytes_max = extent->raw_bytes;
        }
    }
}

static int make_tensors(struct slu_inspect *inspect, uint64_t n, struct slu_err *err)
{
    inspect->tensors = calloc(n ? n : 1, sizeof *inspect->tensors);
    if (!inspect->tensors) {
        return slu_err_set(err, SLU_ENOMEM, "no memory for a list of tensors");
    }
    inspect->n_tensors = n;
    return 0;
}

static int read_pack(struct slu_inspect *inspect, struct slu_source **source, struct slu_err *err)
{
    struct slu_pack *pack;
    int rc = slu_pack_open(*source, &pack, err);
    if (rc < 0) {
        return rc;
    }
    *source = NULL; /* the pack's now */
    inspect->is_pack = true;
    inspect->version = pack->header.version;
    inspect->fingerprint = pack->fingerprint;
    read_metadata(inspect, &pack->kvs);
    read_codec(&inspect->codec, &pack->kvs);
    rc = make_tensors(inspect, pack->header.n_tensors, err);
    if (rc == 0) {
        read_pack_tensors(inspect, pack);
        for (uint32_t i = 0; i < pack->header.n_banks; i++) {
            read_bank(inspect, pack, &pack->banks[i]);
        }
    }
    slu_pack_close(pack);
    return rc;
}

/* Whether a GGUF tensor holds routed experts: ffn_up_exps.weight, or ffn_up.7.weight of old. */
static bool is_expert(const struct slu_str *name)
{
    static const char *const marks[] = {"_exps.", "ffn_gate.", "ffn_up.", "ffn_down."};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        const char *at = memmem(name->at, name->len, marks[i], strlen(marks[i]));
        if (at) {
            const char *next = at + strlen(marks[i]);
            return i == 0 || (next < name->at + name->len && *next >= '0' && *next <= '9');
        }
    }
    return false;
}

static int read_gguf(struct slu_inspect *inspect, struct slu_source *source, struct slu_err *err)
{
    struct slu_gguf *gguf;
    int rc = slu_gguf_open(source, &gguf, err);
    if (rc < 0) {
        return rc;
    }
    inspect->version = 3; /* the only one that opens */
    read_metadata(inspect, &gguf->kvs);
    rc = make_tensors(inspect, gguf->n_tensors, err);
    for (uint64_t i = 0; rc == 0 && i < gguf->n_tensors; i++) {
        const struct slu_gguf_tensor *from = &gguf->tensors[i];
        struct slu_inspect_tensor *to = &inspect->tensors[i];
        const char *format = slu_ggml_type_name(from->type);
        uint64_t n_weights = 1;
        copy_str(to->name, sizeof to->name, from->name.at, from->name.len);
        to->format = format ? format : "unknown";
        to->n_dims = from->n_dims;
        for (int d = 0; d < 4; d++) {
            to->dims[d] = from->dims[d];
            n_weights = multiply(n_weights, from->dims[d]);
        }
        to->bytes = from->bytes;
        count_format(inspect, to->format, 1, n_weights, from->bytes);
        inspect->expert_bytes += is_expert(&from->name) ? from->bytes : 0;
    }
    slu_gguf_close(gguf);
    return rc;
}

int slu_inspect_file(const char *path, struct slu_inspect *ret_inspect, struct slu_err *err)
{
    struct slu_inspect inspect = {0};
    struct slu_source *source = NULL;
    char magic[sizeof SLU_PACK_MAGIC - 1] = {0};
    int rc = slu_source_open_file(path, &source, err);
    if (rc < 0) {
        return rc;
    }
    inspect.file_bytes = source->size_bytes;
    if (source->size_bytes >= sizeof magic) {
        rc = source->read_at(source, 0, magic, sizeof magic, err);
    }
    if (rc == 0) {
        rc = memcmp(magic, SLU_PACK_MAGIC, sizeof magic) == 0 ? read_pack(&inspect, &source, err)
                                                              : read_gguf(&inspect, source, err);
    }
    slu_source_destroy(source);
    if (rc < 0) {
        slu_inspect_finish(&inspect);
        return rc;
    }
    *ret_inspect = inspect;
    return 0;
}

void slu_inspect_finish(struct slu_inspect *inspect)
{
    free(inspect->tensors);
    inspect->tensors = NULL;
}
