/* Key-value pairs in GGUF's encoding: parse once, then look up. */
#include "io/cursor.h"

#include <assert.h>
#include <stdlib.h>

#include "io/printable.h"

/* Files have some dozens of pairs. The bound keeps what a hostile count can make us allocate to a
 * few MiB. */
#define PAIRS_MAX 65536u
/* The GGUF specification's own bound on keys. */
#define KEY_BYTES_MAX 65535u
/* The shortest pair: a key's length, no key bytes, a type, one byte. */
#define PAIR_BYTES_MIN 13u

/* Bytes of a value; 0 for strings and arrays, whose size is in the file. */
static const uint8_t type_bytes[SLU_KV_TYPES] = {
    [SLU_KV_U8] = 1,  [SLU_KV_I8] = 1,  [SLU_KV_U16] = 2, [SLU_KV_I16] = 2,
    [SLU_KV_U32] = 4, [SLU_KV_I32] = 4, [SLU_KV_F32] = 4, [SLU_KV_BOOL] = 1,
    [SLU_KV_U64] = 8, [SLU_KV_I64] = 8, [SLU_KV_F64] = 8,
};

static const char *const type_names[SLU_KV_TYPES] = {
    [SLU_KV_U8] = "u8",       [SLU_KV_I8] = "i8",     [SLU_KV_U16] = "u16",
    [SLU_KV_I16] = "i16",     [SLU_KV_U32] = "u32",   [SLU_KV_I32] = "i32",
    [SLU_KV_F32] = "f32",     [SLU_KV_BOOL] = "bool", [SLU_KV_STRING] = "string",
    [SLU_KV_ARRAY] = "array", [SLU_KV_U64] = "u64",   [SLU_KV_I64] = "i64",
    [SLU_KV_F64] = "f64",
};

static bool is_unsigned(enum slu_kv_type type)
{
    return type == SLU_KV_U8 || type == SLU_KV_U16 || type == SLU_KV_U32 || type == SLU_KV_U64 ||
           type == SLU_KV_BOOL;
}

static bool is_float(enum slu_kv_type type)
{
    return type == SLU_KV_F32 || type == SLU_KV_F64;
}

static bool is_integer(enum slu_kv_type type)
{
    return type != SLU_KV_BOOL && !is_float(type) && type != SLU_KV_STRING && type != SLU_KV_ARRAY;
}

/* Little-endian unsigned integer of 1, 2, 4 or 8 bytes. */
static uint64_t load_u(const uint8_t *at, size_t bytes)
{
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

/* Two's complement likewise. */
static int64_t load_i(const uint8_t *at, size_t bytes)
{
    unsigned shift = 64 - 8 * (unsigned)bytes;
    return (int64_t)(load_u(at, bytes) << shift) >> shift;
}

static double load_f(const uint8_t *at, enum slu_kv_type type)
{
    float single;
    double value;
    if (type == SLU_KV_F32) {
        memcpy(&single, at, sizeof single);
        return (double)single;
    }
    memcpy(&value, at, sizeof value);
    return value;
}

int slu_str_cmp(struct slu_str a, struct slu_str b)
{
    size_t n = a.len < b.len ? a.len : b.len;
    int order = n ? memcmp(a.at, b.at, n) : 0;
    return order ? order : (a.len > b.len) - (a.len < b.len);
}

/* For values that end before they should; says which key, so that a person can find the place. */
static int cut_off(const struct slu_cursor *cursor, const struct slu_kv *kv, const char *name,
                   struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT,
                       "%s: key '%s' runs past byte %llu, where the file ends or a header must; it "
                       "is truncated or corrupt",
                       name, slu_printable(kv->key.at, kv->key.len).text,
                       (unsigned long long)cursor->whole_bytes);
}

static int parse_array(struct slu_cursor *cursor, struct slu_kv *kv, const char *name,
                       struct slu_err *err)
{
    uint32_t type;
    if (!slu_cursor_u32(cursor, &type) || !slu_cursor_u64(cursor, &kv->n_items)) {
        return cut_off(cursor, kv, name, err);
    }
    if (type >= SLU_KV_TYPES || type == SLU_KV_ARRAY) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: key '%s' is an array of type %u, which is unknown or nested", name,
                           slu_printable(kv->key.at, kv->key.len).text, type);
    }
    kv->item_type = (enum slu_kv_type)type;
    size_t start = cursor->at;
    if (type == SLU_KV_STRING) {
        struct slu_str item;
        for (uint64_t i = 0; i < kv->n_items; i++) {
            if (!slu_cursor_str(cursor, &item)) {
                return cut_off(cursor, kv, name, err);
            }
        }
    } else {
        uint64_t item_bytes = type_bytes[type];
        uint64_t bytes;
        if (__builtin_mul_overflow(kv->n_items, item_bytes, &bytes) ||
            !slu_cursor_take(cursor, bytes)) {
            return cut_off(cursor, kv, name, err);
        }
    }
    kv->items = cursor->data + start;
    kv->items_bytes = cursor->at - start;
    for (size_t i = 0; type == SLU_KV_BOOL && i < kv->items_bytes; i++) {
        if (kv->items[i] > 1) {
            return slu_err_set(err, SLU_EFORMAT, "%s: key '%s' has a bool that is %u", name,
                               slu_printable(kv->key.at, kv->key.len).text, kv->items[i]);
        }
    }
    return 0;
}

static int parse_scalar(struct slu_cursor *cursor, struct slu_kv *kv, const char *name,
                        struct slu_err *err)
{
    size_t bytes = type_bytes[kv->type];
    const uint8_t *at = slu_cursor_take(cursor, bytes);
    if (!at) {
        return cut_off(cursor, kv, name, err);
    }
    if (is_float(kv->type)) {
        kv->value.f = load_f(at, kv->type);
    } else if (is_unsigned(kv->type)) {
        kv->value.u = load_u(at, bytes);
    } else {
        kv->value.i = load_i(at, bytes);
    }
    if (kv->type == SLU_KV_BOOL && kv->value.u > 1) {
        return slu_err_set(err, SLU_EFORMAT, "%s: key '%s' is a bool that is %u", name,
                           slu_printable(kv->key.at, kv->key.len).text, at[0]);
    }
    return 0;
}

static int parse_pair(struct slu_cursor *cursor, uint64_t index, struct slu_kv *kv,
                      const char *name, struct slu_err *err)
{
    size_t start = cursor->at;
    uint64_t key_bytes;
    /* The length is looked at before the bytes: no need to read a gigabyte to refuse it. */
    if (!slu_cursor_u64(cursor, &key_bytes)) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: ends at byte %llu, before metadata key %llu; the file is "
                           "truncated or corrupt",
                           name, (unsigned long long)cursor->whole_bytes,
                           (unsigned long long)index);
    }
    if (key_bytes == 0 || key_bytes > KEY_BYTES_MAX) {
        return slu_err_set(
            err, SLU_EFORMAT, "%s: key %llu at byte %zu is %llu bytes long; keys have 1 to %u",
            name, (unsigned long long)index, start, (unsigned long long)key_bytes, KEY_BYTES_MAX);
    }
    const uint8_t *key = slu_cursor_take(cursor, key_bytes);
    if (key) {
        kv->key = (struct slu_str){.at = (const char *)key, .len = (size_t)key_bytes};
    }
    uint32_t type;
    if (!key || !slu_cursor_u32(cursor, &type)) {
        return cut_off(cursor, kv, name, err);
    }
    if (type >= SLU_KV_TYPES) {
        return slu_err_set(err, SLU_EFORMAT, "%s: key '%s' at byte %zu has the unknown type %u",
                           name, slu_printable(kv->key.at, kv->key.len).text, start, type);
    }
    kv->type = (enum slu_kv_type)type;
    if (kv->type == SLU_KV_ARRAY) {
        return parse_array(cursor, kv, name, err);
    }
    if (kv->type == SLU_KV_STRING) {
        return slu_cursor_str(cursor, &kv->value.s) ? 0 : cut_off(cursor, kv, name, err);
    }
    return parse_scalar(cursor, kv, name, err);
}

static int by_key(const void *a, const void *b)
{
    const struct slu_kv *const *x = a;
    const struct slu_kv *const *y = b;
    return slu_str_cmp((*x)->key, (*y)->key);
}

static int check_unique(const struct slu_kvs *kvs, const char *name, struct slu_err *err)
{
    if (kvs->n < 2) {
        return 0;
    }
    const struct slu_kv **sorted = malloc(kvs->n * sizeof *sorted);
    if (!sorted) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to check %zu keys", name, kvs->n);
    }
    for (size_t i = 0; i < kvs->n; i++) {
        sorted[i] = &kvs->pairs[i];
    }
    qsort(sorted, kvs->n, sizeof *sorted, by_key);
    int rc = 0;
    for (size_t i = 1; rc == 0 && i < kvs->n; i++) {
        if (slu_str_cmp(sorted[i - 1]->key, sorted[i]->key) == 0) {
            rc = slu_err_set(err, SLU_EFORMAT, "%s: key '%s' stands twice in the metadata", name,
                             slu_printable(sorted[i]->key.at, sorted[i]->key.len).text);
        }
    }
    free(sorted);
    return rc;
}

int slu_kvs_parse_at(struct slu_cursor *cursor, uint64_t n_pairs, struct slu_kvs *ret_kvs,
                     const char *name, struct slu_err *err)
{
    if (n_pairs > PAIRS_MAX) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims %llu metadata keys; more than %u make no sense", name,
                           (unsigned long long)n_pairs, PAIRS_MAX);
    }
    uint64_t left = cursor->whole_bytes - cursor->at;
    if (n_pairs > left / PAIR_BYTES_MIN) {
        return slu_err_set(err, SLU_EFORMAT,
                           "%s: claims %llu metadata keys, which don't fit in the %llu bytes that "
                           "follow; the file is truncated or corrupt",
                           name, (unsigned long long)n_pairs, (unsigned long long)left);
    }
    struct slu_kvs kvs = {.n = (size_t)n_pairs};
    if (n_pairs > 0) {
        kvs.pairs = calloc((size_t)n_pairs, sizeof *kvs.pairs);
        if (!kvs.pairs) {
            return slu_err_set(err, SLU_ENOMEM, "%s: no memory for %llu metadata keys", name,
                               (unsigned long long)n_pairs);
        }
    }
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < kvs.n; i++) {
        rc = parse_pair(cursor, i, &kvs.pairs[i], name, err);
    }
    if (rc == 0) {
        rc = check_unique(&kvs, name, err);
    }
    if (rc != 0) {
        slu_kvs_finish(&kvs);
        return rc;
    }
    *ret_kvs = kvs;
    return 0;
}

int slu_kvs_parse(const uint8_t *data, size_t bytes, uint64_t n_pairs, struct slu_kvs *ret_kvs,
                  size_t *ret_used, const char *name, struct slu_err *err)
{
    struct slu_cursor cursor = {.data = data, .bytes = bytes, .whole_bytes = bytes};
    int rc = slu_kvs_parse_at(&cursor, n_pairs, ret_kvs, name, err);
    if (rc == 0) {
        *ret_used = cursor.at;
    }
    return rc;
}

void slu_kvs_finish(struct slu_kvs *kvs)
{
    free(kvs->pairs);
    *kvs = (struct slu_kvs){0};
}

const struct slu_kv *slu_kvs_find(const struct slu_kvs *kvs, const char *key)
{
    struct slu_str wanted = {.at = key, .len = strlen(key)};
    for (size_t i = 0; i < kvs->n; i++) {
        if (slu_str_cmp(kvs->pairs[i].key, wanted) == 0) {
            return &kvs->pairs[i];
        }
    }
    return NULL;
}

static int absent(const char *key, struct slu_err *err)
{
    return slu_err_set(err, SLU_ENOENT, "the metadata have no key '%s'", key);
}

static int wrong_type(const struct slu_kv *kv, const char *key, const char *wanted,
                      struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT, "metadata key '%s' is of type %s where %s is wanted", key,
                       type_names[kv->type], wanted);
}

int slu_kvs_u64(const struct slu_kvs *kvs, const char *key, uint64_t *ret, struct slu_err *err)
{
    const struct slu_kv *kv = slu_kvs_find(kvs, key);
    if (!kv) {
        return absent(key, err);
    }
    if (!is_integer(kv->type)) {
        return wrong_type(kv, key, "an integer", err);
    }
    if (!is_unsigned(kv->type) && kv->value.i < 0) {
        return slu_err_set(err, SLU_EFORMAT, "metadata key '%s' is %lld, below zero", key,
                           (long long)kv->value.i);
    }
    *ret = is_unsigned(kv->type) ? kv->value.u : (uint64_t)kv->value.i;
    return 0;
}

int slu_kvs_f64(const struct slu_kvs *kvs, const char *key, double *ret, struct slu_err *err)
{
    const struct slu_kv *kv = slu_kvs_find(kvs, key);
    if (!kv) {
        return absent(key, err);
    }
    if (is_float(kv->type)) {
        *ret = kv->value.f;
    } else if (!is_integer(kv->type)) {
        return wrong_type(kv, key, "a number", err);
    } else {
        *ret = is_unsigned(kv->type) ? (double)kv->value.u : (double)kv->value.i;
    }
    return 0;
}

int slu_kvs_bool(const struct slu_kvs *kvs, const char *key, bool *ret, struct slu_err *err)
{
    const struct slu_kv *kv = slu_kvs_find(kvs, key);
    if (!kv) {
        return absent(key, err);
    }
    if (kv->type != SLU_KV_BOOL) {
        return wrong_type(kv, key, "a bool", err);
    }
    *ret = kv->value.u != 0;
    return 0;
}

int slu_kvs_str(const struct slu_kvs *kvs, const char *key, struct slu_str *ret,
                struct slu_err *err)
{
    const struct slu_kv *kv = slu_kvs_find(kvs, key);
    if (!kv) {
        return absent(key, err);
    }
    if (kv->type != SLU_KV_STRING) {
        return wrong_type(kv, key, "a string", err);
    }
    *ret = kv->value.s;
    return 0;
}

bool slu_kv_next_str(const struct slu_kv *array, size_t *cursor, struct slu_str *ret)
{
    assert(array->type == SLU_KV_ARRAY && array->item_type == SLU_KV_STRING);
    struct slu_cursor at = {
        .data = array->items,
        .at = *cursor,
        .bytes = array->items_bytes,
        .whole_bytes = array->items_bytes,
    };
    if (!slu_cursor_str(&at, ret)) {
        return false;
    }
    *cursor = at.at;
    return true;
}

/* The bytes of item i of an array of scalars. */
static const uint8_t *item_at(const struct slu_kv *array, uint64_t i)
{
    assert(array->type == SLU_KV_ARRAY && i < array->n_items);
    return array->items + i * type_bytes[array->item_type];
}

double slu_kv_item_f64(const struct slu_kv *array, uint64_t i)
{
    if (!is_float(array->item_type)) {
        return (double)slu_kv_item_i64(array, i);
    }
    return load_f(item_at(array, i), array->item_type);
}

int64_t slu_kv_item_i64(const struct slu_kv *array, uint64_t i)
{
    assert(is_integer(array->item_type) || array->item_type == SLU_KV_BOOL);
    const uint8_t *at = item_at(array, i);
    size_t bytes = type_bytes[array->item_type];
    return is_unsigned(array->item_type) ? (int64_t)load_u(at, bytes) : load_i(at, bytes);
}
