#define PCRE2_CODE_UNIT_WIDTH 8
#include "tools/peft.h"

#include <jansson.h>
#include <math.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#include "io/printable.h"

/* Patterns come with the adapter, from anywhere: no match may take long, nor all of them together,
 * and neither may they take much memory. A step is an item of a pattern tried at a place: twenty
 * patterns on each of fifty thousand modules come to some 10^8 of them, which take seconds. */
#define MATCH_STEPS_MAX    100000u
#define STEPS_MAX          100000000u
#define PATTERNS_MAX       65536u
#define COMPILED_BYTES_MAX ((size_t)16 << 20)

/* One key of rank_pattern or alpha_pattern. Most are the plain names of modules, of which there may
 * be one for each expert; those are compared without an expression. */
struct pattern {
    pcre2_code *code;  /* NULL where the key is plain */
    const char *plain; /* owned by the JSON */
    double value;
};

struct patterns {
    struct pattern *at;
    size_t n;
};

struct slu_peft {
    json_t *json;
    char *name;
    uint32_t rank;
    double alpha;
    bool is_rslora;
    struct patterns ranks, alphas;
    size_t compiled_bytes;
    uint64_t n_steps; /* of all matches so far */
    pcre2_match_data *match;
    pcre2_match_context *limits;
};

/* Settings that don't change what the saved weights compute. */
static const char *const harmless[] = {
    "alpha_pattern",     "auto_mapping",   "base_model_name_or_path", "bias",
    "corda_config",      "eva_config",     "exclude_modules",         "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform",     "loftq_config",
    "lora_alpha",        "lora_dropout",   "lora_ga_config",          "megatron_core",
    "peft_type",         "peft_version",   "qalora_group_size",       "r",
    "rank_pattern",      "revision",       "runtime_config",          "target_modules",
    "task_type",         "use_rslora",
};

/* Sentences for the better known of those that do. */
static const struct {
    const char *key, *what;
} refused[] = {
    {"use_dora", "use_dora (DoRA: a magnitude beside each pair)"},
    {"modules_to_save", "modules_to_save (whole matrices in place of the base's)"},
    {"layer_replication", "layer_replication (layers that the base doesn't have)"},
    {"lora_bias", "lora_bias (a bias in B)"},
    {"fan_in_fan_out", "fan_in_fan_out (matrices stored the other way round)"},
    {"target_parameters", "target_parameters (pairs for fused parameters)"},
    {"trainable_token_indices", "trainable_token_indices (rows in place of the base's)"},
    {"alora_invocation_tokens", "alora_invocation_tokens (activated LoRA)"},
};

/* Initializations that leave the base's weights as they are. The others (PiSSA, OLoRA, LoftQ, ...)
 * train against a base that they changed, unless the adapter was converted when it was saved, and
 * then the setting says true. */
static const char *const inits[] = {"gaussian", "orthogonal", "eva"};

static bool is_in(const char *text, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(list[i], text) == 0) {
            return true;
        }
    }
    return false;
}

/* null, false, 0, "", [] and {}. */
static bool is_off(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return json_object_size(value) == 0;
    case JSON_ARRAY:
        return json_array_size(value) == 0;
    case JSON_STRING:
        return json_string_length(value) == 0;
    case JSON_INTEGER:
    case JSON_REAL:
        return json_number_value(value) == 0;
    default:
        return !json_is_true(value);
    }
}

static int check_keys(const struct slu_peft *peft, struct slu_err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach(peft->json, key, value)
    {
        if (is_off(value) || is_in(key, harmless, sizeof harmless / sizeof *harmless)) {
            continue;
        }
        for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
            if (strcmp(refused[i].key, key) == 0) {
                return slu_err_set(err, SLU_EUNSUP, "%s: %s is not supported", peft->name,
                                   refused[i].what);
            }
        }
        return slu_err_set(err, SLU_EUNSUP, "%s: the setting %s is not supported", peft->name,
                           slu_printable(key, strlen(key)).text);
    }
    return 0;
}

static int check_kind(const struct slu_peft *peft, struct slu_err *err)
{
    const json_t *value = json_object_get(peft->json, "peft_type");
    const char *text = json_string_value(value);
    if (!text || strcmp(text, "LORA") != 0) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: adapters of peft_type %s are not supported, only LORA", peft->name,
                           text ? slu_printable(text, strlen(text)).text : "(none)");
    }
    value = json_object_get(peft->json, "bias");
    text = json_string_value(value);
    if (value && (!text || strcmp(text, "none") != 0)) {
        return slu_err_set(err, SLU_EUNSUP, "%s: bias other than \"none\" is not supported",
                           peft->name);
    }
    value = json_object_get(peft->json, "init_lora_weights");
    text = json_string_value(value);
    if (text && !is_in(text, inits, sizeof inits / sizeof *inits)) {
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: init_lora_weights %s changes the base's weights, which is not "
                           "supported; save the adapter converted to a plain LoRA",
                           peft->name, slu_printable(text, strlen(text)).text);
    }
    return 0;
}

static int bad_number(const struct slu_peft *peft, const char *key, struct slu_err *err)
{
    return slu_err_set(err, SLU_EFORMAT, "%s: %s is missing or not a number that makes sense",
                       peft->name, slu_printable(key, strlen(key)).text);
}

static bool is_rank(double value)
{
    return value >= 1 && value <= 1u << 24 && value == floor(value);
}

static int read_numbers(struct slu_peft *peft, struct slu_err *err)
{
    const json_t *rank = json_object_get(peft->json, "r");
    const json_t *alpha = json_object_get(peft->json, "lora_alpha");
    const json_t *rslora = json_object_get(peft->json, "use_rslora");
    if (!json_is_integer(rank) || !is_rank(json_number_value(rank))) {
        return bad_number(peft, "r", err);
    }
    if (!json_is_number(alpha) || !isfinite(json_number_value(alpha))) {
        return bad_number(peft, "lora_alpha", err);
    }
    if (rslora && !json_is_boolean(rslora) && !json_is_null(rslora)) {
        return slu_err_set(err, SLU_EFORMAT, "%s: use_rslora is neither true nor false",
                           peft->name);
    }
    peft->rank = (uint32_t)json_integer_value(rank);
    peft->alpha = json_number_value(alpha);
    peft->is_rslora = json_is_true(rslora);
    return 0;
}

/* Nothing but what stands for itself, and '.'. */
static bool is_plain(const char *key)
{
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.";
    return key[strspn(key, plain)] == '\0';
}

/* PEFT takes the first key for which re.match(rf"(.*\.)?({key})$", module) holds. */
static int compile(struct slu_peft *peft, const char *key, pcre2_code **ret_code,
                   struct slu_err *err)
{
    static const char head[] = "(?:.*\\.)?(?:", tail[] = ")$";
    size_t bytes = strlen(key) + sizeof head + sizeof tail;
    char *text = malloc(bytes);
    if (!text) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its patterns", peft->name);
    }
    int number;
    PCRE2_SIZE at;
    memcpy(text, head, sizeof head - 1);
    memcpy(text + sizeof head - 1, key, strlen(key));
    memcpy(text + sizeof head - 1 + strlen(key), tail, sizeof tail);
    *ret_code = pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED,
                              PCRE2_ANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C |
                                  PCRE2_DOLLAR_ENDONLY | PCRE2_AUTO_CALLOUT,
                              &number, &at, NULL);
    free(text);
    if (!*ret_code) {
        return slu_err_set(err, SLU_EUNSUP, "%s: the pattern %s can't be read as an expression",
                           peft->name, slu_printable(key, strlen(key)).text);
    }
    size_t compiled_bytes = 0;
    pcre2_pattern_info(*ret_code, PCRE2_INFO_SIZE, &compiled_bytes);
    peft->compiled_bytes += compiled_bytes;
    if (peft->compiled_bytes > COMPILED_BYTES_MAX) {
        pcre2_code_free(*ret_code);
        return slu_err_set(err, SLU_EUNSUP,
                           "%s: its rank_pattern and alpha_pattern take too much memory",
                           peft->name);
    }
    return 0;
}

static int read_patterns(struct slu_peft *peft, const char *name, bool is_ranks,
                         struct patterns *patterns, struct slu_err *err)
{
    const json_t *object = json_object_get(peft->json, name);
    if (!object || json_is_null(object)) {
        return 0;
    }
    if (!json_is_object(object) || json_object_size(object) > PATTERNS_MAX) {
        return slu_err_set(err, SLU_EFORMAT, "%s: %s is no object, or too large a one", peft->name,
                           name);
    }
    patterns->at = calloc(json_object_size(object) + 1, sizeof *patterns->at);
    if (!patterns->at) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory for its patterns", peft->name);
    }
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        double number = json_number_value(value);
        if (!json_is_number(value) || !isfinite(number) || (is_ranks && !is_rank(number))) {
            return bad_number(peft, key, err);
        }
        struct pattern pattern = {.plain = key, .value = number};
        int rc = is_plain(key) ? 0 : compile(peft, key, &pattern.code, err);
        if (rc < 0) {
            return rc;
        }
        patterns->at[patterns->n++] = pattern;
    }
    return 0;
}

/* Called at each item of an expression that is tried. */
static int count_step(pcre2_callout_block *block, void *arg)
{
    struct slu_peft *peft = arg;
    (void)block;
    return ++peft->n_steps > STEPS_MAX ? PCRE2_ERROR_CALLOUT : 0;
}

static int read_all(struct slu_peft *peft, struct slu_err *err)
{
    peft->limits = pcre2_match_context_create(NULL);
    peft->match = pcre2_match_data_create(1, NULL);
    if (!peft->limits || !peft->match) {
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", peft->name);
    }
    pcre2_set_match_limit(peft->limits, MATCH_STEPS_MAX);
    pcre2_set_depth_limit(peft->limits, 1000);
    pcre2_set_callout(peft->limits, count_step, peft);
    const json_t *targets = json_object_get(peft->json, "target_modules");
    int rc = check_kind(peft, err);
    rc = rc < 0 ? rc : check_keys(peft, err);
    rc = rc < 0 ? rc : read_numbers(peft, err);
    rc = rc < 0 ? rc : read_patterns(peft, "rank_pattern", true, &peft->ranks, err);
    rc = rc < 0 ? rc : read_patterns(peft, "alpha_pattern", false, &peft->alphas, err);
    if (rc == 0 && targets && !json_is_null(targets) && !json_is_array(targets) &&
        !json_is_string(targets)) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: target_modules is neither a list nor a text",
                         peft->name);
    }
    return rc;
}

int slu_peft_open(const char *text, size_t len, const char *name, struct slu_peft **ret_peft,
                  struct slu_err *err)
{
    struct slu_peft *peft = calloc(1, sizeof *peft);
    if (!peft || !(peft->name = strdup(name))) {
        free(peft);
        return slu_err_set(err, SLU_ENOMEM, "%s: no memory to read it", name);
    }
    json_error_t error;
    int rc = 0;
    peft->json = json_loadb(text, len, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(peft->json)) {
        rc = slu_err_set(err, SLU_EFORMAT, "%s: is no JSON object: %s", name,
                         peft->json ? "another value"
                                    : slu_printable(error.text, strlen(error.text)).text);
    }
    rc = rc < 0 ? rc : read_all(peft, err);
    if (rc < 0) {
        slu_peft_close(peft);
        return rc;
    }
    *ret_peft = peft;
    return 0;
}

static void free_patterns(struct patterns *patterns)
{
    for (size_t i = 0; i < patterns->n; i++) {
        pcre2_code_free(patterns->at[i].code);
    }
    free(patterns->at);
}

void slu_peft_close(struct slu_peft *peft)
{
    if (peft) {
        free_patterns(&peft->ranks);
        free_patterns(&peft->alphas);
        pcre2_match_data_free(peft->match);
        pcre2_match_context_free(peft->limits);
        json_decref(peft->json);
        free(peft->name);
        free(peft);
    }
}

/* Does ".*\.KEY" or "KEY" fit the whole module, if '.' stands for any character? */
static bool fits_plain(const char *key, const char *module, size_t len)
{
    size_t n = strlen(key);
    if (n > len || (n < len && module[len - n - 1] != '.')) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        if (key[i] != module[len - n + i] && key[i] != '.') {
            return false;
        }
    }
    return true;
}

/* As pcre2_match: negative unless it fits. */
static int match(const struct slu_peft *peft, const struct pattern *pattern, const char *module,
                 size_t len)
{
    if (!pattern->code) {
        return fits_plain(pattern->plain, module, len) ? 0 : PCRE2_ERROR_NOMATCH;
    }
    return pcre2_match(pattern->code, (PCRE2_SPTR)module, len, 0, 0, peft->match, peft->limits);
}

/* The value of the first pattern that fits; *value stays where none does. */
static int look_up(const struct slu_peft *peft, const struct patterns *patterns, const char *module,
                   size_t len, double *value, struct slu_err *err)
{
    for (size_t i = 0; i < patterns->n; i++) {
        int rc = match(peft, &patterns->at[i], module, len);
        if (rc >= 0) {
            *value = patterns->at[i].value;
            return 0;
        }
        if (rc != PCRE2_ERROR_NOMATCH) {
            return slu_err_set(err, SLU_EUNSUP,
                               "%s: pattern %zu of rank_pattern or alpha_pattern takes too long to "
                               "match %s",
                               peft->name, i + 1, slu_printable(module, len).text);
        }
    }
    return 0;
}

int slu_peft_module(const struct slu_peft *peft, const char *module, size_t len, uint32_t *ret_rank,
                    double *ret_scale, struct slu_err *err)
{
    double rank = peft->rank, alpha = peft->alpha;
    int rc = look_up(peft, &peft->ranks, module, len, &rank, err);
    rc = rc < 0 ? rc : look_up(peft, &peft->alphas, module, len, &alpha, err);
    if (rc == 0) {
        *ret_rank = (uint32_t)rank;
        *ret_scale = alpha / (peft->is_rslora ? sqrt(rank) : rank);
    }
    return rc;
}

bool slu_peft_has_module(const struct slu_peft *peft, const char *module, size_t len)
{
    const json_t *list = json_object_get(peft->json, "target_modules");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        const char *key = json_string_value(item);
        size_t n = json_string_length(item);
        if (key && n <= len && memcmp(module + len - n, key, n) == 0 &&
            (n == len || module[len - n - 1] == '.')) {
            return true;
        }
    }
    return !json_is_array(list);
}
