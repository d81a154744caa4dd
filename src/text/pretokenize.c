/*
 * Pre-tokenizers: regexes that cut a text into pieces, which BPE then never merges across. A
 * tokenizer has one or more passes; each splits every piece of the pass before it into its
 * matches and what lies between them, and sees that piece alone (so (?!\S) holds at its end).
 *
 * The expressions are those of the tokenizers' published tokenizer.json files. \s is written out,
 * because PCRE2 and Unicode don't agree on U+180E. No expression here backtracks over more than
 * the run of characters that it then consumes, so matching takes linear time.
 *
 * Bytes that aren't UTF-8 are matched as U+FFFD, one for each byte, and stay what they are in the
 * pieces.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "text/text_internal.h"

#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

#define WS                                                                                         \
    "\\t-\\r \\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"       \
    "\\x{3000}"
#define S     "[" WS "]"
#define NOT_S "[^" WS "]"

/* White space that no word follows: a run but for its last character, which goes with the word. */
#define SPACES S "+(?!" NOT_S ")|" S "+"
#define LINES  S "*[\\r\\n]+"
#define SHORT  "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^" WS "\\p{L}\\p{N}]+|" SPACES
#define CL100K(DIGITS)                                                                             \
    SHORT "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" DIGITS "| ?[^" WS "\\p{L}\\p{N}]+[\\r\\n]*|" LINES     \
          "|" SPACES
#define QWEN35                                                                                     \
    SHORT "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^" WS                                  \
          "\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" LINES "|" SPACES
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define O200K                                                                                      \
    "[^\\r\\n\\p{L}\\p{N}]?" UPPER "*" LOWER "+" SHORT "?|[^\\r\\n\\p{L}\\p{N}]?" UPPER "+" LOWER  \
    "*" SHORT "?|\\p{N}{1,3}| ?[^" WS "\\p{L}\\p{N}]+[\\r\\n/]*|" LINES "|" SPACES

/* DeepSeek's letters: those of scripts with two cases, as its tokenizer.json lists them. */
#define DEEPSEEK_LETTERS                                                                           \
    S "?[A-Za-z\\x{b5}\\x{c0}-\\x{d6}\\x{d8}-\\x{f6}\\x{f8}-\\x{1ba}\\x{1bc}-\\x{1bf}"             \
      "\\x{1c4}-\\x{293}\\x{295}-\\x{2af}\\x{370}-\\x{373}\\x{376}\\x{377}\\x{37b}-\\x{37d}"       \
      "\\x{37f}\\x{386}\\x{388}-\\x{38a}\\x{38c}\\x{38e}-\\x{3a1}\\x{3a3}-\\x{3f5}\\x{3f7}-\\x{"   \
      "481}"                                                                                       \
      "\\x{48a}-\\x{52f}\\x{531}-\\x{556}\\x{10a0}-\\x{10c5}\\x{13a0}-\\x{13f5}"                   \
      "\\x{13f8}-\\x{13fd}\\x{1c90}-\\x{1cba}\\x{1cbd}-\\x{1cbf}\\x{1d00}-\\x{1d2b}"               \
      "\\x{1d6b}-\\x{1d77}\\x{1d79}-\\x{1d9a}\\x{1e00}-\\x{1f15}\\x{1f18}-\\x{1f1d}"               \
      "\\x{1f20}-\\x{1f45}\\x{1f48}-\\x{1f4d}\\x{1f50}-\\x{1f57}\\x{1f59}\\x{1f5b}\\x{1f5d}"       \
      "\\x{1f5f}-\\x{1f7d}\\x{1f80}-\\x{1fb4}\\x{1fb6}-\\x{1fbc}\\x{1fbe}\\x{1fc2}-\\x{1fc4}"      \
      "\\x{1fc6}-\\x{1fcc}\\x{1fd0}-\\x{1fd3}\\x{1fd6}-\\x{1fdb}\\x{1fe0}-\\x{1fec}"               \
      "\\x{1ff2}-\\x{1ff4}\\x{1ff6}-\\x{1ffc}\\x{2102}\\x{2107}\\x{210a}-\\x{2113}\\x{2115}"       \
      "\\x{2119}-\\x{211d}\\x{2124}\\x{2126}\\x{2128}\\x{212a}-\\x{212d}\\x{212f}-\\x{2134}"       \
      "\\x{2139}\\x{213c}-\\x{213f}\\x{2145}-\\x{2149}\\x{214e}\\x{2183}\\x{2184}"                 \
      "\\x{2c00}-\\x{2c7b}\\x{2c7e}-\\x{2ce4}\\x{2ceb}-\\x{2cee}\\x{2cf2}\\x{2cf3}"                \
      "\\x{a640}-\\x{a66d}\\x{a680}-\\x{a69b}\\x{a722}-\\x{a76f}\\x{a771}-\\x{a787}"               \
      "\\x{a78b}-\\x{a78e}\\x{ab70}-\\x{abbf}\\x{fb00}-\\x{fb06}\\x{fb13}-\\x{fb17}"               \
      "\\x{ff21}-\\x{ff3a}\\x{ff41}-\\x{ff5a}\\x{10400}-\\x{1044f}\\x{104b0}-\\x{104d3}"           \
      "\\x{104d8}-\\x{104fb}\\x{10c80}-\\x{10cb2}\\x{10cc0}-\\x{10cf2}\\x{118a0}-\\x{118df}"       \
      "\\x{1e900}-\\x{1e943}]+"
#define DEEPSEEK_MARKS                                                                             \
    S "?[!-/:-~\\x{ff01}-\\x{ff0f}\\x{ff1a}-\\x{ff5e}\\x{2018}-\\x{201f}\\x{3000}-\\x{3002}]+"
#define DEEPSEEK_CJK  "[\\x{4e00}-\\x{9fa5}\\x{800}-\\x{4e00}\\x{ac00}-\\x{d7ff}]+"
#define DEEPSEEK3_CJK "[\\x{4e00}-\\x{9fa5}\\x{3040}-\\x{309f}\\x{30a0}-\\x{30ff}]+"
#define DEEPSEEK3                                                                                  \
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}"    \
    "\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|" LINES "|" SPACES

/* The pass that isn't a regex: white space at the end of a piece. */
#define TRAILING_SPACE ""

enum family {
    FAMILY_DEFAULT,
    FAMILY_GPT2,
    FAMILY_REFACT,
    FAMILY_FALCON,
    FAMILY_LLAMA3,
    FAMILY_QWEN2,
    FAMILY_QWEN35,
    FAMILY_O200K,
    FAMILY_DEEPSEEK,
    FAMILY_DEEPSEEK_CODER,
    FAMILY_DEEPSEEK3,
    FAMILIES
};

static const char *const families[FAMILIES][SLU_PRETOKEN_PASSES] = {
    [FAMILY_DEFAULT] = {"[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"},
    [FAMILY_GPT2] = {GPT2},
    [FAMILY_REFACT] = {"\\p{N}", GPT2},
    [FAMILY_FALCON] = {"[\\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"},
    [FAMILY_LLAMA3] = {CL100K("\\p{N}{1,3}")},
    [FAMILY_QWEN2] = {CL100K("\\p{N}")},
    [FAMILY_QWEN35] = {QWEN35},
    [FAMILY_O200K] = {O200K},
    [FAMILY_DEEPSEEK] = {"[\\r\\n]", DEEPSEEK_LETTERS, DEEPSEEK_MARKS, TRAILING_SPACE, DEEPSEEK_CJK,
                         "\\p{N}"},
    [FAMILY_DEEPSEEK_CODER] = {"[\\r\\n]", S "?\\p{L}+", S "?\\p{P}+", DEEPSEEK_CJK, "\\p{N}"},
    [FAMILY_DEEPSEEK3] = {"\\p{N}{1,3}", DEEPSEEK3_CJK, DEEPSEEK3},
};

/* Names as llama.cpp's converter writes them. */
static const struct {
    const char *name;
    enum family family;
    bool ignore_merges;
    bool add_bos;
} names[] = {
    {"default", FAMILY_DEFAULT, false, false},
    {"gpt-2", FAMILY_GPT2, false, false},
    {"phi-2", FAMILY_GPT2, false, false},
    {"mpt", FAMILY_GPT2, false, false},
    {"olmo", FAMILY_GPT2, false, false},
    {"dclm", FAMILY_GPT2, false, false},
    {"jais", FAMILY_GPT2, false, false},
    {"trillion", FAMILY_GPT2, false, false},
    {"granite-docling", FAMILY_GPT2, false, false},
    {"gigachat", FAMILY_GPT2, false, false},
    {"exaone4", FAMILY_GPT2, false, false},
    {"mellum", FAMILY_GPT2, false, false},
    {"refact", FAMILY_REFACT, false, false},
    {"starcoder", FAMILY_REFACT, false, false},
    {"command-r", FAMILY_REFACT, false, false},
    {"smollm", FAMILY_REFACT, false, false},
    {"codeshell", FAMILY_REFACT, false, false},
    {"exaone", FAMILY_REFACT, false, false},
    {"minerva-7b", FAMILY_REFACT, false, false},
    {"falcon", FAMILY_FALCON, false, false},
    {"llama-bpe", FAMILY_LLAMA3, true, true},
    {"llama3", FAMILY_LLAMA3, true, true},
    {"llama-v3", FAMILY_LLAMA3, true, true},
    {"falcon3", FAMILY_LLAMA3, true, true},
    {"pixtral", FAMILY_LLAMA3, true, true},
    {"lfm2", FAMILY_LLAMA3, true, true},
    {"dbrx", FAMILY_LLAMA3, false, false},
    {"smaug-bpe", FAMILY_LLAMA3, false, false},
    {"glm4", FAMILY_LLAMA3, false, false},
    {"chatglm-bpe", FAMILY_LLAMA3, false, false},
    {"qwen2", FAMILY_QWEN2, false, false},
    {"deepseek-r1-qwen", FAMILY_QWEN2, false, false},
    {"megrez", FAMILY_QWEN2, false, false},
    {"stablelm2", FAMILY_QWEN2, false, false},
    {"hunyuan", FAMILY_QWEN2, false, false},
    {"qwen35", FAMILY_QWEN35, false, false},
    {"gpt-4o", FAMILY_O200K, false, false},
    {"llama4", FAMILY_O200K, false, false},
    {"deepseek-llm", FAMILY_DEEPSEEK, false, false},
    {"deepseek-coder", FAMILY_DEEPSEEK_CODER, false, false},
    {"deepseek-v3", FAMILY_DEEPSEEK3, false, false},
    {"hunyuan-dense", FAMILY_DEEPSEEK3, false, false},
};

static int compile(const char *pattern, void **ret_code, struct slu_err *err)
{
    int code;
    PCRE2_SIZE offset;
    pcre2_code *regex = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                      PCRE2_UTF | PCRE2_UCP, &code, &offset, NULL);
    if (!regex) {
        return slu_err_set(err, SLU_ENOMEM, "pre-tokenizer: PCRE2 refuses its expression (%d)",
                           code);
    }
    /* Where the system forbids executable memory this fails, and matching is merely slower. */
    (void)pcre2_jit_compile(regex, PCRE2_JIT_COMPLETE);
    *ret_code = regex;
    return SLU_OK;
}

int slu_pretokenizer_init(struct slu_pretokenizer *pre, struct slu_str name, struct slu_err *err)
{
    memset(pre, 0, sizeof *pre);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strlen(names[i].name) != name.len || memcmp(names[i].name, name.at, name.len) != 0) {
            continue;
        }
        pre->ignore_merges = names[i].ignore_merges;
        pre->add_bos = names[i].add_bos;
        const char *const *patterns = families[names[i].family];
        for (unsigned p = 0; p < SLU_PRETOKEN_PASSES && patterns[p]; p++) {
            pre->n_passes = p + 1;
            if (patterns[p][0] == '\0') {
                continue;
            }
            int rc = compile(patterns[p], &pre->passes[p].code, err);
            if (rc < 0) {
                slu_pretokenizer_finish(pre);
                return rc;
            }
        }
        return SLU_OK;
    }
    return slu_err_set(err, SLU_EUNSUP,
                       "tokenizer.ggml.pre: the pre-tokenizer '%.*s' is not supported",
                       name.len > 64 ? 64 : (int)name.len, name.at);
}

void slu_pretokenizer_finish(struct slu_pretokenizer *pre)
{
    for (unsigned p = 0; p < pre->n_passes; p++) {
        pcre2_code_free(pre->passes[p].code);
    }
    memset(pre, 0, sizeof *pre);
}

size_t slu_pretokenizer_bytes(const struct slu_pretokenizer *pre)
{
    size_t bytes = 0;
    for (unsigned p = 0; p < pre->n_passes; p++) {
        size_t size = 0;
        size_t jit_size = 0;
        if (pre->passes[p].code) {
            pcre2_pattern_info(pre->passes[p].code, PCRE2_INFO_SIZE, &size);
            pcre2_pattern_info(pre->passes[p].code, PCRE2_INFO_JITSIZE, &jit_size);
        }
        bytes += size + jit_size;
    }
    return bytes;
}

size_t slu_pretokenizer_bytes_max(void)
{
    /* The largest family takes 40 KiB with PCRE2 10.42 on x86-64. */
    return 256u << 10;
}

struct split {
    const struct slu_pretokenizer *pre;
    pcre2_match_data *match_data;
    pcre2_match_context *context;
    slu_word_fn word;
    void *arg;
    const char *raw; /* where in the caller's text the next piece begins; NULL if pieces are its */
    const char *raw_end;
};

/* Finds where a piece of the repaired copy lies in the caller's text: its characters correspond
 * one to one, with a U+FFFD for each stray byte. */
static int emit(struct split *split, const char *piece, size_t len)
{
    if (!split->raw) {
        return split->word(split->arg, piece, len);
    }
    const char *start = split->raw;
    for (size_t at = 0; at < len;) {
        unsigned n =
            slu_utf8_len((const unsigned char *)split->raw, (size_t)(split->raw_end - split->raw));
        split->raw += n > 0 ? n : 1;
        at += n > 0 ? n : 3;
    }
    return split->word(split->arg, start, (size_t)(split->raw - start));
}

static bool is_space(const char *text, size_t len, unsigned n)
{
    const unsigned char *at = (const unsigned char *)text;
    (void)len;
    uint32_t c = at[0];
    if (n == 2) {
        c = (c & 0x1fu) << 6 | (at[1] & 0x3fu);
    } else if (n == 3) {
        c = (c & 0x0fu) << 12 | (at[1] & 0x3fu) << 6 | (at[2] & 0x3fu);
    } else if (n > 3) {
        return false;
    }
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

/* The length of the piece without the white space that ends it. */
static size_t trimmed_len(const char *piece, size_t len)
{
    size_t end = 0;
    for (size_t at = 0; at < len;) {
        unsigned n = slu_utf8_len((const unsigned char *)piece + at, len - at);
        n = n > 0 ? n : 1;
        if (!is_space(piece + at, len - at, n)) {
            end = at + n;
        }
        at += n;
    }
    return end;
}

static int split_pass(struct split *split, unsigned pass, const char *piece, size_t len)
{
    if (len == 0) {
        return SLU_OK;
    }
    if (pass == split->pre->n_passes) {
        return emit(split, piece, len);
    }
    const pcre2_code *code = split->pre->passes[pass].code;
    if (!code) {
        size_t end = trimmed_len(piece, len);
        int rc = split_pass(split, pass + 1, piece, end);
        return rc != 0 ? rc : split_pass(split, pass + 1, piece + end, len - end);
    }
    size_t done = 0;
    while (done < len) {
        /* From `done` on within the piece: no expression looks behind. A matcher that gives up (its
         * limits are out of reach of the expressions above) leaves the rest in one piece. */
        int rc = pcre2_match(code, (PCRE2_SPTR)piece, len, done, PCRE2_NO_UTF_CHECK,
                             split->match_data, split->context);
        if (rc < 0) {
            break;
        }
        const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(split->match_data);
        size_t from = ends[0];
        size_t to = ends[1];
        if (to <= from || from < done) {
            break;
        }
        rc = split_pass(split, pass + 1, piece + done, from - done);
        if (rc == 0) {
            rc = split_pass(split, pass + 1, piece + from, to - from);
        }
        if (rc != 0) {
            return rc;
        }
        done = to;
    }
    return split_pass(split, pass + 1, piece + done, len - done);
}

/* A copy of text in which each byte that isn't part of a character is U+FFFD; NULL and SLU_OK if
 * there is no such byte. */
static int repair(const char *text, size_t len, char **ret_copy, size_t *ret_len)
{
    *ret_copy = NULL;
    size_t n_bad = 0;
    for (size_t at = 0; at < len;) {
        unsigned n = slu_utf8_len((const unsigned char *)text + at, len - at);
        n_bad += n == 0;
        at += n > 0 ? n : 1;
    }
    if (n_bad == 0) {
        return SLU_OK;
    }
    if (n_bad > (SIZE_MAX - len) / 2) {
        return SLU_ENOMEM;
    }
    char *copy = malloc(len + 2 * n_bad);
    if (!copy) {
        return SLU_ENOMEM;
    }
    size_t to = 0;
    for (size_t at = 0; at < len;) {
        unsigned n = slu_utf8_len((const unsigned char *)text + at, len - at);
        if (n > 0) {
            memcpy(copy + to, text + at, n);
        } else {
            memcpy(copy + to, "\xef\xbf\xbd", 3);
        }
        to += n > 0 ? n : 3;
        at += n > 0 ? n : 1;
    }
    *ret_copy = copy;
    *ret_len = to;
    return SLU_OK;
}

int slu_pretokenize(const struct slu_pretokenizer *pre, const char *text, size_t len,
                    slu_word_fn word, void *arg)
{
    if (len == 0) {
        return SLU_OK;
    }
    char *copy;
    size_t copy_len = 0;
    int rc = repair(text, len, &copy, &copy_len);
    if (rc != SLU_OK) {
        return rc;
    }
    struct split split = {.pre = pre, .word = word, .arg = arg};
    if (copy) {
        split.raw = text;
        split.raw_end = text + len;
    }
    split.match_data = pcre2_match_data_create(1, NULL);
    split.context = pcre2_match_context_create(NULL);
    if (!split.match_data || !split.context) {
        rc = SLU_ENOMEM;
    } else {
        /* The default of ten million steps is less than a long run of capitals takes. */
        pcre2_set_match_limit(split.context, UINT32_MAX);
        rc = split_pass(&split, 0, copy ? copy : text, copy ? copy_len : len);
    }
    pcre2_match_context_free(split.context);
    pcre2_match_data_free(split.match_data);
    free(copy);
    return rc;
}
