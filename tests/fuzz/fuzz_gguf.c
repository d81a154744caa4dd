/* Any bytes as a GGUF file: opened, and if they open, everything that the header has is looked at,
 * so that a pointer that strays is noticed. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "io/gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Keeps the compiler from leaving reads out. */
static volatile uint64_t sink;

static void touch(struct slu_str str)
{
    for (size_t i = 0; i < str.len; i++) {
        sink += (uint8_t)str.at[i];
    }
}

static void touch_array(const struct slu_kv *kv)
{
    struct slu_str item;
    if (kv->item_type == SLU_KV_STRING) {
        uint64_t n = 0;
        for (size_t cursor = 0; slu_kv_next_str(kv, &cursor, &item); n++) {
            touch(item);
        }
        if (n != kv->n_items) {
            abort();
        }
        return;
    }
    for (uint64_t i = 0; i < kv->n_items; i++) {
        sink += slu_kv_item_f64(kv, i) > 0;
    }
}

static void touch_pairs(const struct slu_kvs *kvs)
{
    for (size_t i = 0; i < kvs->n; i++) {
        const struct slu_kv *kv = &kvs->pairs[i];
        touch(kv->key);
        if (kv->type == SLU_KV_STRING) {
            touch(kv->value.s);
        } else if (kv->type == SLU_KV_ARRAY) {
            touch_array(kv);
        }
        char *key = strndup(kv->key.at, kv->key.len);
        if (!key) {
            continue;
        }
        uint64_t u;
        double f;
        bool b;
        struct slu_str s;
        struct slu_err err;
        slu_kvs_u64(kvs, key, &u, &err);
        slu_kvs_f64(kvs, key, &f, &err);
        slu_kvs_bool(kvs, key, &b, &err);
        slu_kvs_str(kvs, key, &s, &err);
        free(key);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct slu_source *source;
    struct slu_gguf *gguf;
    struct slu_err err = {0};
    if (slu_source_open_memory(data, size, "fuzz", &source) != 0) {
        return 0;
    }
    int rc = slu_gguf_open(source, &gguf, &err);
    if (rc != 0) {
        /* Each refusal has its sentence. */
        if (err.code != rc || err.text[0] == '\0' || strchr(err.text, '\n')) {
            abort();
        }
    } else {
        touch_pairs(&gguf->kvs);
        for (uint64_t i = 0; i < gguf->n_tensors; i++) {
            const struct slu_gguf_tensor *tensor = &gguf->tensors[i];
            touch(tensor->name);
            if (tensor->offset > size || tensor->bytes > size - tensor->offset) {
                abort();
            }
        }
        slu_gguf_close(gguf);
    }
    slu_source_destroy(source);
    return 0;
}
