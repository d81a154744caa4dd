/*
 * GGUF v3: the header (key-value pairs and tensor list). Format after the GGUF specification in
 * the ggml project. Nothing here reads tensor data. Packs carry the key-value pairs of the file
 * they were made from in the same encoding, so slu_kvs_parse serves both.
 *
 * Every count, length and offset is checked against the bytes that are there before anything is
 * allocated for it; hostile files get SLU_EFORMAT and a sentence.
 *
 * Thread safety: opened objects are constant.
 */
#ifndef SLU_IO_GGUF_H
#define SLU_IO_GGUF_H

#include <stdbool.h>

#include "io/source.h"

enum slu_kv_type {
    SLU_KV_U8, SLU_KV_I8, SLU_KV_U16, SLU_KV_I16, SLU_KV_U32, SLU_KV_I32, SLU_KV_F32, SLU_KV_BOOL,
    SLU_KV_STRING, SLU_KV_ARRAY, SLU_KV_U64, SLU_KV_I64, SLU_KV_F64,
    SLU_KV_TYPES
};

/* A string of the file: not NUL-terminated, points into the pairs' buffer. */
struct slu_str {
    const char *at;
    size_t len;
};

struct slu_kv {
    struct slu_str key;
    enum slu_kv_type type;
    union {
        uint64_t u; /* unsigned and bool */
        int64_t i;  /* signed */
        double f;
        struct slu_str s;
    } value;
    /* Arrays (of scalars or strings; nested arrays are refused): */
    enum slu_kv_type item_type;
    uint64_t n_items;
    const uint8_t *items; /* encoded; for strings u64 length + bytes each, checked at parse */
    size_t items_bytes;
};

struct slu_kvs {
    struct slu_kv *pairs;
    size_t n;
};

/* Parses n_pairs pairs from data, which must outlive ret_kvs. *ret_used is how many bytes they
 * took. Duplicate keys are refused. */
int slu_kvs_parse(const uint8_t *data, size_t bytes, uint64_t n_pairs, struct slu_kvs *ret_kvs,
                  size_t *ret_used, const char *name, struct slu_err *err);
void slu_kvs_finish(struct slu_kvs *kvs);

/* NULL if there is none. key is NUL-terminated. */
const struct slu_kv *slu_kvs_find(const struct slu_kvs *kvs, const char *key);

/* Typed look-ups: 0 when found and convertible (any integer type, range-checked; any float type
 * or integer for f64), SLU_ENOENT when absent (ret untouched), SLU_EFORMAT when of another type. */
int slu_kvs_u64(const struct slu_kvs *kvs, const char *key, uint64_t *ret, struct slu_err *err);
int slu_kvs_f64(const struct slu_kvs *kvs, const char *key, double *ret, struct slu_err *err);
int slu_kvs_bool(const struct slu_kvs *kvs, const char *key, bool *ret, struct slu_err *err);
int slu_kvs_str(const struct slu_kvs *kvs, const char *key, struct slu_str *ret,
                struct slu_err *err);

/* Walks the strings of a string array: start with *cursor = 0; false at the end. */
bool slu_kv_next_str(const struct slu_kv *array, size_t *cursor, struct slu_str *ret);
/* Item i of a numeric array as double or int64; asserts i and the type class. */
double slu_kv_item_f64(const struct slu_kv *array, uint64_t i);
int64_t slu_kv_item_i64(const struct slu_kv *array, uint64_t i);

#define SLU_GGUF_DIMS_MAX 4

struct slu_gguf_tensor {
    struct slu_str name;
    uint32_t type; /* ggml type number as in the file */
    uint32_t n_dims;
    uint64_t dims[SLU_GGUF_DIMS_MAX]; /* fastest first, 1 beyond n_dims */
    uint64_t offset;                  /* from the start of the file */
    uint64_t bytes;                   /* 0 if the type is unknown here */
};

struct slu_gguf {
    struct slu_kvs kvs;
    const uint8_t *kv_data; /* the pairs as they stand in the file */
    size_t kv_bytes;
    struct slu_gguf_tensor *tensors;
    uint64_t n_tensors;
    uint64_t data_offset;
    uint8_t *header; /* owned: everything before the tensor data */
};

/* Reads and checks the header: magic, version 3, alignment, tensor extents within the file and
 * not overlapping, no duplicate names. Headers over 1 GiB are refused. */
int slu_gguf_open(struct slu_source *source, struct slu_gguf **ret_gguf, struct slu_err *err);
void slu_gguf_close(struct slu_gguf *gguf); /* NULL is fine */

const struct slu_gguf_tensor *slu_gguf_find(const struct slu_gguf *gguf, const char *name);

/* "Q4_K" for 12, and so on for every type GGUF names, supported here or not; NULL if unknown. */
const char *slu_ggml_type_name(uint32_t type);
/* Weights and bytes of a type's block. False for types whose size isn't known here. */
bool slu_ggml_type_block(uint32_t type, uint32_t *ret_weights, uint32_t *ret_bytes);

#endif
