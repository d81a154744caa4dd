#include "tools/planes.h"

#include <assert.h>
#include <string.h>

#include "io/codec.h"
#include "io/gguf.h"

/* Bytes lo .. lo+n-1 of a GGUF block. */
struct span {
    uint8_t lo, n;
};

/* How a format lies in GGUF. Types without a super-group are one run of bytes for each plane, and
 * the runs' order inside is the same on both sides; the K-quants need their bits rearranged. */
struct gguf_block {
    uint32_t ggml_type;
    uint16_t weights, bytes;
    struct span codes, high, scale, min;
};

static const struct gguf_block blocks[SLU_FMT_GGUFS] = {
    [SLU_FMT_F32] = {0, 1, 4, .codes = {0, 4}},
    [SLU_FMT_F16] = {1, 1, 2, .codes = {0, 2}},
    [SLU_FMT_BF16] = {30, 1, 2, .codes = {0, 2}},
    [SLU_FMT_Q8_0] = {8, 32, 34, .codes = {2, 32}, .scale = {0, 2}},
    [SLU_FMT_Q4_0] = {2, 32, 18, .codes = {2, 16}, .scale = {0, 2}},
    [SLU_FMT_Q4_1] = {3, 32, 20, .codes = {4, 16}, .scale = {0, 2}, .min = {2, 2}},
    [SLU_FMT_Q5_0] = {6, 32, 22, .codes = {6, 16}, .high = {2, 4}, .scale = {0, 2}},
    [SLU_FMT_Q5_1] = {7, 32, 24, .codes = {8, 16}, .high = {4, 4}, .scale = {0, 2}, .min = {2, 2}},
    [SLU_FMT_Q4_K] = {12, 256, 144},
    [SLU_FMT_Q5_K] = {13, 256, 176},
    [SLU_FMT_Q6_K] = {14, 256, 210},
    [SLU_FMT_IQ4_NL] = {20, 32, 18, .codes = {2, 16}, .scale = {0, 2}},
    [SLU_FMT_MXFP4] = {39, 32, 17, .codes = {1, 16}, .scale = {0, 1}},
};

/* The planes at the start of one row. */
struct row_at {
    uint8_t *codes, *high, *scales, *mins, *supers;
};

static struct row_at row_at(const struct slu_planes *planes, uint32_t row)
{
    assert(row < planes->rows);
    const struct slu_mat_layout *at = &planes->at;
    uint8_t *data = planes->data;
    return (struct row_at){
        .codes = data + at->codes + row * at->codes_row,
        .high = data + at->high + row * at->high_row,
        .scales = data + at->scales + row * at->scales_row,
        .mins = data + at->mins + row * at->mins_row,
        .supers = data + at->supers + row * at->supers_row,
    };
}

bool slu_planes_init(struct slu_planes *planes, const struct slu_fmt *fmt, uint32_t rows,
                     uint32_t cols, void *data)
{
    struct slu_mat_layout at;
    if (!slu_mat_layout(fmt, rows, cols, &at)) {
        return false;
    }
    *planes = (struct slu_planes){.fmt = fmt, .rows = rows, .cols = cols, .data = data, .at = at};
    return true;
}

void slu_planes_cuts(const struct slu_mat_layout *at, uint32_t rows, size_t base, size_t *cuts,
                     size_t *n_cuts)
{
    /* Smaller planes share a table. */
    enum { BYTES_MIN = 1024 };
    const size_t planes[][2] = {{at->codes, at->codes_row},   {at->high, at->high_row},
                                {at->scales, at->scales_row}, {at->mins, at->mins_row},
                                {at->supers, at->supers_row}, {at->gaps, at->escapes_row},
                                {at->values, at->escapes_row}};
    size_t n = *n_cuts;
    bool was_small = false;
    for (size_t i = 0; i < sizeof planes / sizeof *planes; i++) {
        size_t start = base + planes[i][0], bytes = planes[i][1] * rows;
        bool is_small = bytes < BYTES_MIN;
        if (bytes && !(is_small && was_small) && start > (n ? cuts[n - 1] : 0)) {
            cuts[n++] = start;
        }
        was_small = bytes ? is_small : was_small;
    }
    *n_cuts = n;
}

unsigned slu_planes_least_gain(const struct slu_fmt *fmt)
{
    return fmt->id < SLU_FMT_GGUFS ? SLU_PARTS_LEAST_GAIN : 0;
}

int slu_planes_fmt(uint32_t ggml_type, const struct slu_fmt **ret_fmt, struct slu_err *err)
{
    for (unsigned id = 0; id < SLU_FMT_GGUFS; id++) {
        if (blocks[id].ggml_type == ggml_type) {
            *ret_fmt = slu_fmt_get(id);
            return 0;
        }
    }
    const char *name = slu_ggml_type_name(ggml_type);
    if (name) {
        return slu_err_set(err, SLU_EUNSUP, "its type %s is not supported", name);
    }
    return slu_err_set(err, SLU_EUNSUP, "its type, number %u, is unknown", ggml_type);
}

uint32_t slu_planes_ggml_type(const struct slu_fmt *fmt)
{
    return blocks[fmt->id].ggml_type;
}

size_t slu_planes_row_bytes(const struct slu_fmt *fmt, uint32_t cols)
{
    const struct gguf_block *block = &blocks[fmt->id];
    assert(cols % block->weights == 0);
    return (size_t)(cols / block->weights) * block->bytes;
}

/* ---- K-quants ---------------------------------------------------------------------------- */

/* 32 codes into the family's nibble and high planes. */
static void pack_codes(const uint8_t *codes, unsigned bits, uint8_t *low, uint8_t *high)
{
    for (unsigned j = 0; j < 16; j++) {
        low[j] = (uint8_t)((codes[j] & 15) | (codes[j + 16] & 15) << 4);
    }
    if (bits == 5) {
        for (unsigned k = 0; k < 4; k++) {
            unsigned byte = 0;
            for (unsigned i = 0; i < 8; i++) {
                byte |= (unsigned)(codes[8 * k + i] >> 4) << i;
            }
            high[k] = (uint8_t)byte;
        }
    } else if (bits == 6) {
        for (unsigned j = 0; j < 8; j++) {
            high[j] = (uint8_t)((codes[j] >> 4) | (codes[j + 8] >> 4) << 2 |
                                (codes[j + 16] >> 4) << 4 | (codes[j + 24] >> 4) << 6);
        }
    }
}

static void unpack_codes(uint8_t *codes, unsigned bits, const uint8_t *low, const uint8_t *high)
{
    for (unsigned j = 0; j < 16; j++) {
        codes[j] = low[j] & 15;
        codes[j + 16] = low[j] >> 4;
    }
    for (unsigned i = 0; bits == 5 && i < 32; i++) {
        codes[i] |= (uint8_t)((high[i / 8] >> (i % 8) & 1) << 4);
    }
    for (unsigned i = 0; bits == 6 && i < 32; i++) {
        codes[i] |= (uint8_t)((high[i % 8] >> (2 * (i / 8)) & 3) << 4);
    }
}

/* Bytes of the high plane for 256 weights. */
static unsigned high_bytes(unsigned bits)
{
    return bits == 5 ? 32 : bits == 6 ? 64 : 0;
}

static void pack_super(const uint8_t *codes, unsigned bits, uint8_t *low, uint8_t *high)
{
    for (unsigned g = 0; g < 8; g++) {
        pack_codes(codes + 32 * g, bits, low + 16 * g, high + high_bytes(bits) / 8 * g);
    }
}

static void unpack_super(uint8_t *codes, unsigned bits, const uint8_t *low, const uint8_t *high)
{
    for (unsigned g = 0; g < 8; g++) {
        unpack_codes(codes + 32 * g, bits, low + 16 * g, high + high_bytes(bits) / 8 * g);
    }
}

/*
 * Q4_K: d f16 | dmin f16 | 12 bytes of scales | 128 nibble bytes. Q5_K has 32 bytes of high bits
 * before the nibbles: bit g of byte l belongs to weight 32 g + l. Nibble byte 32 p + l holds weight
 * 64 p + l low and weight 64 p + 32 + l high. Of the eight 6-bit scales s and minimums m:
 *
 *   bytes 0-3   s[0..3] | high two bits of s[4..7]
 *   bytes 4-7   m[0..3] | high two bits of m[4..7]
 *   bytes 8-11  low four bits of s[4..7] | low four bits of m[4..7]
 */
static void import_q45_k(struct row_at to, const uint8_t *src, uint32_t i, unsigned bits)
{
    uint8_t codes[256];
    const uint8_t *packed = src + 4;
    const uint8_t *fifth = src + 16;
    const uint8_t *low = src + (bits == 5 ? 48 : 16);
    for (unsigned p = 0; p < 4; p++) {
        for (unsigned l = 0; l < 32; l++) {
            codes[64 * p + l] = low[32 * p + l] & 15;
            codes[64 * p + 32 + l] = low[32 * p + l] >> 4;
        }
    }
    for (unsigned g = 0; bits == 5 && g < 8; g++) {
        for (unsigned l = 0; l < 32; l++) {
            codes[32 * g + l] |= (uint8_t)((fifth[l] >> g & 1) << 4);
        }
    }
    pack_super(codes, bits, to.codes + 128 * (size_t)i, to.high + high_bytes(bits) * (size_t)i);
    uint8_t *scales = to.scales + 8 * (size_t)i;
    uint8_t *mins = to.mins + 8 * (size_t)i;
    for (unsigned k = 0; k < 4; k++) {
        scales[k] = packed[k] & 63;
        mins[k] = packed[k + 4] & 63;
        scales[k + 4] = (uint8_t)((packed[k + 8] & 15) | (packed[k] >> 6) << 4);
        mins[k + 4] = (uint8_t)((packed[k + 8] >> 4) | (packed[k + 4] >> 6) << 4);
    }
    memcpy(to.supers + 4 * (size_t)i, src, 4);
}

static void export_q45_k(struct row_at from, uint8_t *dst, uint32_t i, unsigned bits)
{
    uint8_t codes[256];
    uint8_t *packed = dst + 4;
    uint8_t *fifth = dst + 16;
    uint8_t *low = dst + (bits == 5 ? 48 : 16);
    unpack_super(codes, bits, from.codes + 128 * (size_t)i,
                 from.high + high_bytes(bits) * (size_t)i);
    for (unsigned p = 0; p < 4; p++) {
        for (unsigned l = 0; l < 32; l++) {
            low[32 * p + l] =
                (uint8_t)((codes[64 * p + l] & 15) | (codes[64 * p + 32 + l] & 15) << 4);
        }
    }
    for (unsigned l = 0; bits == 5 && l < 32; l++) {
        unsigned byte = 0;
        for (unsigned g = 0; g < 8; g++) {
            byte |= (unsigned)(codes[32 * g + l] >> 4) << g;
        }
        fifth[l] = (uint8_t)byte;
    }
    const uint8_t *scales = from.scales + 8 * (size_t)i;
    const uint8_t *mins = from.mins + 8 * (size_t)i;
    for (unsigned k = 0; k < 4; k++) {
        packed[k] = (uint8_t)(scales[k] | (scales[k + 4] >> 4) << 6);
        packed[k + 4] = (uint8_t)(mins[k] | (mins[k + 4] >> 4) << 6);
        packed[k + 8] = (uint8_t)((scales[k + 4] & 15) | (mins[k + 4] & 15) << 4);
    }
    memcpy(dst, from.supers + 4 * (size_t)i, 4);
}

/*
 * Q6_K: 128 nibble bytes | 64 bytes of high pairs | 16 int8 scales | d f16. In each half h of 128
 * weights, nibble byte 64 h + l (l < 64) holds weight l low and weight l + 64 high; pair k of byte
 * 32 h + l (l < 32) belongs to weight 32 k + l.
 */
static void import_q6_k(struct row_at to, const uint8_t *src, uint32_t i)
{
    uint8_t codes[256];
    for (unsigned h = 0; h < 2; h++) {
        const uint8_t *low = src + 64 * h;
        const uint8_t *pairs = src + 128 + 32 * h;
        uint8_t *half = codes + 128 * h;
        for (unsigned l = 0; l < 64; l++) {
            half[l] = low[l] & 15;
            half[l + 64] = low[l] >> 4;
        }
        for (unsigned k = 0; k < 4; k++) {
            for (unsigned l = 0; l < 32; l++) {
                half[32 * k + l] |= (uint8_t)((pairs[l] >> (2 * k) & 3) << 4);
            }
        }
    }
    pack_super(codes, 6, to.codes + 128 * (size_t)i, to.high + 64 * (size_t)i);
    memcpy(to.scales + 16 * (size_t)i, src + 192, 16);
    memcpy(to.supers + 2 * (size_t)i, src + 208, 2);
}

static void export_q6_k(struct row_at from, uint8_t *dst, uint32_t i)
{
    uint8_t codes[256];
    unpack_super(codes, 6, from.codes + 128 * (size_t)i, from.high + 64 * (size_t)i);
    for (unsigned h = 0; h < 2; h++) {
        uint8_t *low = dst + 64 * h;
        uint8_t *pairs = dst + 128 + 32 * h;
        const uint8_t *half = codes + 128 * h;
        for (unsigned l = 0; l < 64; l++) {
            low[l] = (uint8_t)((half[l] & 15) | (half[l + 64] & 15) << 4);
        }
        for (unsigned l = 0; l < 32; l++) {
            pairs[l] = (uint8_t)((half[l] >> 4) | (half[l + 32] >> 4) << 2 |
                                 (half[l + 64] >> 4) << 4 | (half[l + 96] >> 4) << 6);
        }
    }
    memcpy(dst + 192, from.scales + 16 * (size_t)i, 16);
    memcpy(dst + 208, from.supers + 2 * (size_t)i, 2);
}

/* ---- rows -------------------------------------------------------------------------------- */

/* Moves one span of block i out of, or back into, its plane. */
static void take_span(uint8_t *plane, const uint8_t *block, struct span span, uint32_t i)
{
    memcpy(plane + (size_t)span.n * i, block + span.lo, span.n);
}

static void give_span(const uint8_t *plane, uint8_t *block, struct span span, uint32_t i)
{
    memcpy(block + span.lo, plane + (size_t)span.n * i, span.n);
}

void slu_planes_import(struct slu_planes *planes, uint32_t row, const uint8_t *src)
{
    const struct slu_fmt *fmt = planes->fmt;
    const struct gguf_block *block = &blocks[fmt->id];
    struct row_at to = row_at(planes, row);
    if (fmt->group == 0) {
        memcpy(to.codes, src, slu_planes_row_bytes(fmt, planes->cols));
        return;
    }
    for (uint32_t i = 0; i < planes->cols / block->weights; i++, src += block->bytes) {
        if (fmt->id == SLU_FMT_Q6_K) {
            import_q6_k(to, src, i);
        } else if (fmt->super) {
            import_q45_k(to, src, i, fmt->bits);
        } else {
            take_span(to.codes, src, block->codes, i);
            take_span(to.high, src, block->high, i);
            take_span(to.scales, src, block->scale, i);
            take_span(to.mins, src, block->min, i);
        }
    }
}

void slu_planes_export(const struct slu_planes *planes, uint32_t row, uint8_t *dst)
{
    const struct slu_fmt *fmt = planes->fmt;
    const struct gguf_block *block = &blocks[fmt->id];
    struct row_at from = row_at(planes, row);
    if (fmt->group == 0) {
        memcpy(dst, from.codes, slu_planes_row_bytes(fmt, planes->cols));
        return;
    }
    for (uint32_t i = 0; i < planes->cols / block->weights; i++, dst += block->bytes) {
        if (fmt->id == SLU_FMT_Q6_K) {
            export_q6_k(from, dst, i);
        } else if (fmt->super) {
            export_q45_k(from, dst, i, fmt->bits);
        } else {
            give_span(from.codes, dst, block->codes, i);
            give_span(from.high, dst, block->high, i);
            give_span(from.scales, dst, block->scale, i);
            give_span(from.mins, dst, block->min, i);
        }
    }
}

void slu_planes_import_range(struct slu_planes *planes, uint32_t row, const uint8_t *src,
                             uint32_t first_col)
{
    slu_planes_import(planes, row, src + slu_planes_row_bytes(planes->fmt, first_col));
}

void slu_planes_export_range(const struct slu_planes *planes, uint32_t row, uint8_t *dst,
                             uint32_t first_col)
{
    slu_planes_export(planes, row, dst + slu_planes_row_bytes(planes->fmt, first_col));
}
