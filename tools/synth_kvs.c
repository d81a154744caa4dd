/* The metadata of a generated model: sizes under the architecture's prefix, and a tokenizer with
 * the special tokens that the architecture's chat format needs. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tools/synth_parts.h"

enum { TOKEN_NORMAL = 1, TOKEN_UNKNOWN = 2, TOKEN_CONTROL = 3, TOKEN_BYTE = 6 };

#define SPECIALS_MAX 10
#define G            "\xc4\xa0"     /* how byte-level BPE writes a space */
#define U            "\xe2\x96\x81" /* and how SentencePiece does */
#define BAR          "\xef\xbd\x9c" /* the wide bar of DeepSeek's tokens */

/* Pairs of pieces, best first. */
static const char *const merges[] = {
    G " t", "h e",   "i n",   "e r",  G " a", "r e",   "o n",    G "t he", "a t",  "e n",
    G " s", "n d",   "o r",   G " w", "e s",  "i s",   G " o",   "i t",    G " b", "o u",
    G " c", "a n",   "in g",  "a r",  "e d",  G " f",  "l e",    "a l",    G " m", G " p",
    "s t",  "r o",   G "o f", "i c",  G " d", "l l",   "a s",    G "a nd", "en t", "i on",
    G " h", G "t o", "v e",   "o m",  "u r",  G " in", G " l",   "i l",    "c h",  G "b e",
    "l y",  "o t",   "a y",   "i d",  "s e",  "m e",   G "w as", "e t",    "h at", "k e",
};
#define N_MERGES (sizeof merges / sizeof *merges)

static const char *const spm_pieces[] = {
    U,       "e",  "t",  "a",    "o",  "i",     "n",    "s",    "r",   "h",   "l",  "d",
    "c",     "u",  "m",  "f",    "p",  "g",     "w",    "y",    "b",   "v",   "k",  "x",
    "j",     "q",  "z",  ".",    ",",  U "t",   "he",   U "a",  "in",  "er",  "re", "on",
    U "the", "at", "en", U "s",  "nd", U "w",   "or",   U "o",  "is",  U "b", "an", U "c",
    "ing",   "ed", "ou", U "of", "al", U "and", U "to", U "in", "ion", "ent", "le", U "th",
};
#define N_SPM_PIECES (sizeof spm_pieces / sizeof *spm_pieces)
#define N_SPM_FIRST  259u /* <unk>, <s>, </s> and the bytes */

/* What an architecture's byte-level tokenizer has of its own. -1: no such token. */
struct bpe_kind {
    const char *pre;
    const char *specials[SPECIALS_MAX];
    int bos, eos, pad; /* indices into specials */
    bool add_bos;
};

static const struct bpe_kind bpe_kinds[] = {
    [SLU_ARCH_GPT_OSS] = {"gpt-4o",
                          {"<|startoftext|>", "<|return|>", "<|endoftext|>", "<|start|>", "<|end|>",
                           "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"},
                          0,
                          1,
                          2,
                          false},
    [SLU_ARCH_QWEN3MOE] =
        {"qwen2", {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}, 0, 2, 0, false},
    [SLU_ARCH_OLMOE] = {"olmo", {"<|endoftext|>", "<|padding|>"}, 0, 0, 1, false},
    [SLU_ARCH_QWEN2MOE] =
        {"qwen2", {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}, 0, 2, 0, false},
    [SLU_ARCH_GRANITEMOE] =
        {"refact", {"<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"}, 0, 0, 0, false},
    [SLU_ARCH_DEEPSEEK2] = {"deepseek-llm",
                            {"<" BAR "begin" U "of" U "sentence" BAR ">",
                             "<" BAR "end" U "of" U "sentence" BAR ">", "<" BAR "User" BAR ">",
                             "<" BAR "Assistant" BAR ">"},
                            0,
                            1,
                            1,
                            true},
};

static uint32_t n_specials(const struct bpe_kind *kind)
{
    uint32_t n = 0;
    while (n < SPECIALS_MAX && kind->specials[n]) {
        n++;
    }
    return n;
}

uint32_t slu_synth_vocab_min(enum slu_arch arch)
{
    if (arch == SLU_ARCH_LLAMA) {
        return N_SPM_FIRST + (uint32_t)N_SPM_PIECES;
    }
    return 256 + (uint32_t)N_MERGES + n_specials(&bpe_kinds[arch]);
}

/* ---- tokenizers -------------------------------------------------------------------------- */

/* The character that stands for a byte in byte-level BPE: itself where it is printable, and the
 * next free one from U+0100 on otherwise. */
static void byte_char(unsigned byte, char *ret_utf8)
{
    unsigned code = 0, next = 256;
    for (unsigned b = 0; b <= byte; b++) {
        bool printable = (b > 32 && b < 127) || (b > 160 && b != 173);
        code = printable ? b : next++;
    }
    if (code < 128) {
        ret_utf8[0] = (char)code;
        ret_utf8[1] = 0;
    } else {
        ret_utf8[0] = (char)(0xc0 | code >> 6);
        ret_utf8[1] = (char)(0x80 | (code & 63));
        ret_utf8[2] = 0;
    }
}

/* Filler word w: a space and two syllables, or three when those are used up. Numbers and words
 * correspond one to one, and none collides with a merge. */
static void filler_word(uint32_t w, const char *space, char *ret_text, size_t bytes)
{
    static const char consonants[] = "bcdfghjklmnprstvwz", vowels[] = "aeiou";
    uint32_t n_syllables = 2, n_words = 90 * 90;
    if (w >= n_words) {
        w -= n_words;
        n_syllables = 3;
    }
    char word[8];
    for (uint32_t i = 0; i < n_syllables; i++, w /= 90) {
        word[2 * i] = consonants[w % 90 / 5];
        word[2 * i + 1] = vowels[w % 5];
    }
    word[2 * n_syllables] = 0;
    snprintf(ret_text, bytes, "%s%s", space, word);
}

/* The piece that a merge makes: both its parts without the space between. */
static void write_merged(struct slu_gguf_writer *writer, const char *merge)
{
    char text[32];
    size_t n = 0;
    for (; *merge && n + 1 < sizeof text; merge++) {
        if (*merge != ' ') {
            text[n++] = *merge;
        }
    }
    text[n] = 0;
    slu_gguf_writer_strs_item(writer, text);
}

static void write_types(struct slu_gguf_writer *writer, uint32_t n_vocab, uint32_t lo, uint32_t hi,
                        bool is_spm)
{
    int32_t *types = malloc(n_vocab * sizeof *types);
    for (uint32_t i = 0; types && i < n_vocab; i++) {
        types[i] = i >= lo && i < hi ? TOKEN_CONTROL : TOKEN_NORMAL;
        if (is_spm && i < N_SPM_FIRST) {
            types[i] = i == 0 ? TOKEN_UNKNOWN : i < 3 ? TOKEN_CONTROL : TOKEN_BYTE;
        }
    }
    slu_gguf_writer_i32s(writer, "tokenizer.ggml.token_type", types, n_vocab);
    free(types);
}

/* Bytes, merges, specials, filler. */
static void write_bpe(struct slu_gguf_writer *writer, enum slu_arch arch, uint32_t n_vocab)
{
    const struct bpe_kind *kind = &bpe_kinds[arch];
    uint32_t first = 256 + (uint32_t)N_MERGES, end = first + n_specials(kind);
    slu_gguf_writer_str(writer, "tokenizer.ggml.model", "gpt2");
    slu_gguf_writer_str(writer, "tokenizer.ggml.pre", kind->pre);
    slu_gguf_writer_strs_begin(writer, "tokenizer.ggml.tokens", n_vocab);
    char text[32];
    for (unsigned b = 0; b < 256; b++) {
        byte_char(b, text);
        slu_gguf_writer_strs_item(writer, text);
    }
    for (size_t i = 0; i < N_MERGES; i++) {
        write_merged(writer, merges[i]);
    }
    for (uint32_t i = first; i < end; i++) {
        slu_gguf_writer_strs_item(writer, kind->specials[i - first]);
    }
    for (uint32_t i = end; i < n_vocab; i++) {
        filler_word(i - end, G, text, sizeof text);
        slu_gguf_writer_strs_item(writer, text);
    }
    write_types(writer, n_vocab, first, end, false);
    slu_gguf_writer_strs_begin(writer, "tokenizer.ggml.merges", N_MERGES);
    for (size_t i = 0; i < N_MERGES; i++) {
        slu_gguf_writer_strs_item(writer, merges[i]);
    }
    slu_gguf_writer_u32(writer, "tokenizer.ggml.bos_token_id", first + (uint32_t)kind->bos);
    slu_gguf_writer_u32(writer, "tokenizer.ggml.eos_token_id", first + (uint32_t)kind->eos);
    slu_gguf_writer_u32(writer, "tokenizer.ggml.padding_token_id", first + (uint32_t)kind->pad);
    slu_gguf_writer_bool(writer, "tokenizer.ggml.add_bos_token", kind->add_bos);
}

static void write_spm(struct slu_gguf_writer *writer, uint32_t n_vocab)
{
    static const char *const named[] = {"<unk>", "<s>", "</s>"};
    slu_gguf_writer_str(writer, "tokenizer.ggml.model", "llama");
    slu_gguf_writer_strs_begin(writer, "tokenizer.ggml.tokens", n_vocab);
    float *scores = calloc(n_vocab, sizeof *scores);
    for (uint32_t i = 0; i < n_vocab; i++) {
        char text[32];
        if (i < 3) {
            snprintf(text, sizeof text, "%s", named[i]);
        } else if (i < N_SPM_FIRST) {
            snprintf(text, sizeof text, "<0x%02X>", i - 3);
        } else if (i < N_SPM_FIRST + N_SPM_PIECES) {
            snprintf(text, sizeof text, "%s", spm_pieces[i - N_SPM_FIRST]);
        } else {
            filler_word(i - N_SPM_FIRST - (uint32_t)N_SPM_PIECES, U, text, sizeof text);
        }
        slu_gguf_writer_strs_item(writer, text);
        if (scores && i >= N_SPM_FIRST) {
            scores[i] = -(float)(i - N_SPM_FIRST);
        }
    }
    slu_gguf_writer_f32s(writer, "tokenizer.ggml.scores", scores, n_vocab);
    free(scores);
    write_types(writer, n_vocab, 0, 0, true);
    slu_gguf_writer_u32(writer, "tokenizer.ggml.bos_token_id", 1);
    slu_gguf_writer_u32(writer, "tokenizer.ggml.eos_token_id", 2);
    slu_gguf_writer_u32(writer, "tokenizer.ggml.unknown_token_id", 0);
    slu_gguf_writer_bool(writer, "tokenizer.ggml.add_bos_token", true);
    slu_gguf_writer_bool(writer, "tokenizer.ggml.add_eos_token", false);
}

/* ---- sizes ------------------------------------------------------------------------------- */

/* A writer with the architecture's prefix for its keys. */
struct prefixed {
    struct slu_gguf_writer *writer;
    const char *arch;
    char key[96];
};

static const char *key_of(struct prefixed *to, const char *key)
{
    snprintf(to->key, sizeof to->key, "%s.%s", to->arch, key);
    return to->key;
}

static void put_u32(struct prefixed *to, const char *key, uint32_t value)
{
    slu_gguf_writer_u32(to->writer, key_of(to, key), value);
}

static void put_f32(struct prefixed *to, const char *key, float value)
{
    slu_gguf_writer_f32(to->writer, key_of(to, key), value);
}

static void put_yarn(struct prefixed *to, uint32_t n_ctx, float factor)
{
    slu_gguf_writer_str(to->writer, key_of(to, "rope.scaling.type"), "yarn");
    put_f32(to, "rope.scaling.factor", factor);
    put_u32(to, "rope.scaling.original_context_length", n_ctx / 8 ? n_ctx / 8 : 1);
}

static void put_deepseek2(struct prefixed *to, const struct slu_synth_model *m)
{
    put_u32(to, "leading_dense_block_count", SLU_SYNTH_DENSE_LAYERS);
    put_u32(to, "vocab_size", m->p.n_vocab);
    if (!m->p.is_lite) {
        put_u32(to, "attention.q_lora_rank", m->q_lora);
    }
    put_u32(to, "attention.kv_lora_rank", m->kv_lora);
    put_u32(to, "attention.key_length", m->k_dim);
    put_u32(to, "attention.value_length", m->v_dim);
    put_u32(to, "rope.dimension_count", m->rope_dims);
    put_u32(to, "expert_shared_count", m->n_ff_shared / m->p.n_ff);
    put_f32(to, "expert_weights_scale", m->p.is_lite ? 1.0f : 2.5f);
    slu_gguf_writer_bool(to->writer, key_of(to, "expert_weights_norm"), !m->p.is_lite);
    put_u32(to, "expert_gating_func", m->p.is_lite ? 1 : 2);
    put_yarn(to, m->p.n_ctx, 40.0f);
    put_f32(to, "rope.scaling.yarn_log_multiplier", 0.0707f);
}

/* What each architecture has beyond the common keys. */
static void put_own(struct prefixed *to, const struct slu_synth_model *m)
{
    if (m->p.arch != SLU_ARCH_DEEPSEEK2 && m->k_dim * m->p.n_heads != m->p.n_embd) {
        put_u32(to, "attention.key_length", m->k_dim);
        put_u32(to, "attention.value_length", m->v_dim);
    }
    switch (m->p.arch) {
    case SLU_ARCH_GPT_OSS:
        put_u32(to, "attention.sliding_window",
                m->p.window       ? m->p.window
                : m->p.n_ctx / 32 ? m->p.n_ctx / 32
                                  : 1);
        put_yarn(to, m->p.n_ctx, 32.0f);
        break;
    case SLU_ARCH_QWEN2MOE:
        put_u32(to, "expert_shared_feed_forward_length", m->n_ff_shared);
        break;
    case SLU_ARCH_LLAMA:
        put_u32(to, "rope.dimension_count", m->rope_dims);
        put_u32(to, "vocab_size", m->p.n_vocab);
        break;
    case SLU_ARCH_GRANITEMOE:
        put_u32(to, "rope.dimension_count", m->rope_dims);
        put_u32(to, "vocab_size", m->p.n_vocab);
        put_f32(to, "attention.scale", 0.2f);
        put_f32(to, "embedding_scale", 1.5f);
        put_f32(to, "residual_scale", 0.6f);
        put_f32(to, "logit_scale", 0.7f);
        break;
    case SLU_ARCH_DEEPSEEK2:
        put_deepseek2(to, m);
        break;
    default:
        break;
    }
}

void slu_synth_write_kvs(struct slu_gguf_writer *writer, const struct slu_synth_model *m)
{
    const struct slu_synth_params *p = &m->p;
    struct prefixed to = {.writer = writer, .arch = slu_arch_name(p->arch)};
    slu_gguf_writer_str(writer, "general.architecture", to.arch);
    slu_gguf_writer_str(writer, "general.name", p->name ? p->name : "random");
    slu_gguf_writer_u32(writer, "general.quantization_version", 2);
    slu_gguf_writer_u32(writer, "general.alignment", 32);

    bool own_width = p->arch != SLU_ARCH_LLAMA && p->arch != SLU_ARCH_GRANITEMOE;
    bool dense_too = p->arch == SLU_ARCH_DEEPSEEK2;
    put_u32(&to, "block_count", p->n_layers);
    put_u32(&to, "context_length", p->n_ctx);
    put_u32(&to, "embedding_length", p->n_embd);
    put_u32(&to, "feed_forward_length", dense_too ? m->n_ff_dense : p->n_ff);
    if (own_width) {
        put_u32(&to, "expert_feed_forward_length", p->n_ff);
    }
    put_u32(&to, "attention.head_count", p->n_heads);
    put_u32(&to, "attention.head_count_kv", p->n_heads_kv);
    put_f32(&to, "attention.layer_norm_rms_epsilon", 1e-6f);
    put_u32(&to, "expert_count", p->n_experts);
    put_u32(&to, "expert_used_count", p->n_used);
    put_f32(&to, "rope.freq_base", p->arch == SLU_ARCH_GPT_OSS ? 150000.0f : 10000.0f);
    put_own(&to, m);

    if (p->arch == SLU_ARCH_LLAMA) {
        write_spm(writer, p->n_vocab);
    } else {
        write_bpe(writer, p->arch, p->n_vocab);
    }
    if (p->chat_template) {
        slu_gguf_writer_str(writer, "tokenizer.chat_template", p->chat_template);
    }
}
