/* Configurations: what keys mean that are there, that are not, and that make no sense. */
#include <criterion/criterion.h>
#include <string.h>

#include "io/make.h"
#include "model/config.h"

#define TYPE_F32 6u

struct keys {
    struct make bytes;
    uint64_t n;
};

static void put_u32(struct keys *keys, const char *key, uint32_t value)
{
    make_kv_u32(&keys->bytes, key, value);
    keys->n++;
}

static void put_str(struct keys *keys, const char *key, const char *value)
{
    make_kv_str(&keys->bytes, key, value);
    keys->n++;
}

static void put_f32(struct keys *keys, const char *key, float value)
{
    make_str(&keys->bytes, key);
    make_u32(&keys->bytes, TYPE_F32);
    make_f32(&keys->bytes, value);
    keys->n++;
}

/* A model of which nothing is said but what must be. */
static struct keys minimal(void)
{
    struct keys keys = {0};
    put_str(&keys, "general.architecture", "llama");
    put_u32(&keys, "llama.block_count", 2);
    put_u32(&keys, "llama.context_length", 128);
    put_u32(&keys, "llama.embedding_length", 64);
    put_u32(&keys, "llama.feed_forward_length", 96);
    put_u32(&keys, "llama.attention.head_count", 4);
    put_u32(&keys, "llama.expert_count", 8);
    put_u32(&keys, "llama.expert_used_count", 2);
    put_u32(&keys, "llama.vocab_size", 300);
    return keys;
}

/* Reads and frees. */
static int read(struct keys *keys, struct slu_config *ret_config)
{
    struct slu_kvs kvs;
    size_t used;
    struct slu_err err = {0};
    cr_assert_eq(
        slu_kvs_parse(keys->bytes.data, keys->bytes.bytes, keys->n, &kvs, &used, "test", &err), 0,
        "%s", err.text);
    int rc = slu_config_read(&kvs, ret_config, &err);
    slu_kvs_finish(&kvs);
    make_free(&keys->bytes);
    return rc;
}

/* A factor alone is linear scaling, under its new name or its old; 0 is none, and so is "none". */
Test(config, rope_scaling)
{
    static const struct {
        const char *type, *key;
        float factor;
        int want_rc;
        float want_linear, want_yarn;
    } cases[] = {
        {NULL, NULL, 0, 0, 1, 0},
        {NULL, "llama.rope.scaling.factor", 4, 0, 4, 0},
        {NULL, "llama.rope.scale_linear", 4, 0, 4, 0},
        {NULL, "llama.rope.scale_linear", 0, 0, 1, 0},
        {NULL, "llama.rope.scale_linear", -2, SLU_EFORMAT, 0, 0},
        {NULL, "llama.rope.scaling.factor", .5f, SLU_EFORMAT, 0, 0},
        {"linear", "llama.rope.scaling.factor", 2, 0, 2, 0},
        {"linear", "llama.rope.scaling.factor", 0, 0, 1, 0},
        {"none", "llama.rope.scaling.factor", 2, 0, 1, 0},
        {"yarn", "llama.rope.scaling.factor", 32, 0, 1, 32},
        {"longrope", "llama.rope.scaling.factor", 2, SLU_EUNSUP, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct keys keys = minimal();
        if (cases[i].type) {
            put_str(&keys, "llama.rope.scaling.type", cases[i].type);
        }
        if (cases[i].key) {
            put_f32(&keys, cases[i].key, cases[i].factor);
        }
        struct slu_config config = {0};
        cr_expect_eq(read(&keys, &config), cases[i].want_rc, "case %zu", i);
        cr_expect_eq(config.rope_linear, cases[i].want_linear, "case %zu", i);
        cr_expect_eq(config.yarn_factor, cases[i].want_yarn, "case %zu", i);
    }
}
