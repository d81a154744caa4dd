/* The vocabularies and cases of the data folder, see its CONFORMANCE.md, "Tokenizer cases". */
#include <criterion/criterion.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "text/text_internal.h"

static const char separator[] = "\n__ggml_vocab_test__\n";

/* The data folder's path for a vocabulary; false, said on stderr, where there is none. */
static bool data_path(const char *name, char *ret_path, size_t bytes)
{
    const char *root = getenv("SLUICE_DATA");
    if (root) {
        snprintf(ret_path, bytes, "%s/vocab/vocab-%s.gguf", root, name);
    } else if (SLU_TEST_DATA[0] == '/') {
        snprintf(ret_path, bytes, "%s/vocab/vocab-%s.gguf", SLU_TEST_DATA, name);
    } else {
        snprintf(ret_path, bytes, "%s/%s/vocab/vocab-%s.gguf", SLU_TEST_SOURCE_ROOT, SLU_TEST_DATA,
                 name);
    }
    if (access(ret_path, R_OK) == 0) {
        return true;
    }
    fprintf(stderr, "skipped: %s isn't there\n", ret_path);
    return false;
}

static char *read_whole(const char *path)
{
    FILE *file = fopen(path, "rb");
    cr_assert_not_null(file, "%s", path);
    char *text = calloc(1, 1 << 20);
    size_t len = fread(text, 1, (1 << 20) - 1, file);
    cr_assert(len > 0 && feof(file), "%s", path);
    fclose(file);
    return text;
}

struct text {
    char *at;
    size_t len;
};

static void append(void *arg, const char *bytes, size_t len)
{
    struct text *text = arg;
    memcpy(text->at + text->len, bytes, len);
    text->len += len;
}

static void check_case(const struct slu_tokenizer *tokenizer, const char *name, int number,
                       const char *text, size_t len, const char *expected)
{
    int32_t *ids = calloc(len + 2, sizeof *ids);
    int64_t n = slu_tokenizer_encode(tokenizer, text, len, 0, ids, len + 2);
    cr_assert(n >= 0 && n <= (int64_t)len + 2);
    cr_expect_eq(slu_tokenizer_encode(tokenizer, text, len, 0, NULL, 0), n);
    for (int64_t i = 0; i < n; i++) {
        char *end;
        long id = strtol(expected, &end, 10);
        cr_expect(end != expected && id == ids[i], "%s case %d: id %d is %d, not %ld", name, number,
                  (int)i, ids[i], id);
        expected = end;
    }
    cr_expect_eq(strspn(expected, " "), strlen(expected), "%s case %d: more is expected:%s", name,
                 number, expected);

    struct text decoded = {.at = calloc(1, 4 * len + 16)};
    struct slu_detok detok;
    slu_detok_init(&detok, tokenizer, true);
    for (int64_t i = 0; i < n; i++) {
        slu_detok_push(&detok, ids[i], append, &decoded);
    }
    slu_detok_flush(&detok, append, &decoded);
    cr_expect(decoded.len == len && memcmp(decoded.at, text, len) == 0,
              "%s case %d: decodes to '%s'", name, number, decoded.at);
    free(decoded.at);
    free(ids);
}

static void check_vocabulary(const char *name)
{
    char path[4096];
    char list[sizeof path + 8];
    if (!data_path(name, path, sizeof path)) {
        cr_skip_test();
    }
    struct slu_err err = {0};
    struct slu_source *source;
    struct slu_gguf *gguf;
    cr_assert_eq(slu_source_open_file(path, &source, &err), 0, "%s", err.text);
    cr_assert_eq(slu_gguf_open(source, &gguf, &err), 0, "%s", err.text);
    struct slu_tokenizer *tokenizer;
    cr_assert_eq(slu_tokenizer_create(&gguf->kvs, &tokenizer, &err), 0, "%s", err.text);
    cr_expect_leq(slu_tokenizer_bytes(tokenizer), slu_tokenizer_bytes_max(&gguf->kvs));
    cr_expect_leq(slu_tokenizer_bytes(tokenizer), 24u << 20);

    snprintf(list, sizeof list, "%s.inp", path);
    char *texts = read_whole(list);
    snprintf(list, sizeof list, "%s.out", path);
    char *lines = read_whole(list);
    char *text = texts;
    char *line = lines;
    int n_cases = 0;
    for (char *end = strstr(text, separator); end; end = strstr(text, separator)) {
        char *newline = strchr(line, '\n');
        cr_assert_not_null(newline, "%s: fewer lines than cases", name);
        *newline = '\0';
        check_case(tokenizer, name, n_cases++, text, (size_t)(end - text), line);
        text = end + strlen(separator);
        line = newline + 1;
    }
    cr_expect_gt(n_cases, 40);
    free(texts);
    free(lines);
    slu_tokenizer_destroy(tokenizer);
    slu_gguf_close(gguf);
    slu_source_destroy(source);
}

/* Every text of the GPT-2 vocabulary's list gives the listed ids and decodes back. */
Test(vocab_cases, gpt_2)
{
    check_vocabulary("gpt-2");
}

/* The same for DeepSeek's, whose pre-tokenizer has six passes and cuts out user-defined tokens. */
Test(vocab_cases, deepseek_llm)
{
    check_vocabulary("deepseek-llm");
}

/* The same for Llama's SentencePiece vocabulary. */
Test(vocab_cases, llama_spm)
{
    check_vocabulary("llama-spm");
}

/* The same for Phi-3's, whose scores are other than Llama's and which has special tokens on top. */
Test(vocab_cases, phi_3)
{
    check_vocabulary("phi-3");
}

/* The same for gpt-oss's, the largest. */
Test(vocab_cases, o200k)
{
    check_vocabulary("o200k");
}
