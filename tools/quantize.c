#include "tools/quantize.h"

#include <assert.h>
#include <math.h>
#include <string.h>

/* Loops here are written so that a compiler can vectorize them without knowing more than baseline
 * x86-64: rounding is done by truncating a non-negative number plus one half. */

static void put_u16(uint8_t *out, uint16_t value)
{
    out[0] = (uint8_t)value;
    out[1] = (uint8_t)(value >> 8);
}

/* Stores value as f16 and returns what was stored. */
static float put_f16(uint8_t *out, float value)
{
    uint16_t bits = slu_f32_to_f16(value);
    put_u16(out, bits);
    return slu_f16_to_f32(bits);
}

static float inverse(float value)
{
    return value != 0 ? 1 / value : 0;
}

static float abs_max(const float *x, unsigned n)
{
    float most = 0;
    for (unsigned i = 0; i < n; i++) {
        float a = fabsf(x[i]);
        most = a > most ? a : most;
    }
    return most;
}

static void range(const float *x, unsigned n, float *ret_min, float *ret_max)
{
    float lo = x[0], hi = x[0];
    for (unsigned i = 1; i < n; i++) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    *ret_min = lo;
    *ret_max = hi;
}

/* codes[i] = clamp(round(x[i] * scale + bias), 0, most) */
static void codes_of(uint8_t *codes, const float *x, unsigned n, float scale, float bias, int most)
{
    for (unsigned i = 0; i < n; i++) {
        float v = x[i] * scale + (bias + 0.5f);
        v = v > 0 ? v : 0;
        int q = (int)v;
        codes[i] = (uint8_t)(q < most ? q : most);
    }
}

static void put_nibbles(uint8_t *out, const uint8_t *codes)
{
    for (unsigned j = 0; j < 16; j++) {
        out[j] = (uint8_t)((codes[j] & 15) | (codes[j + 16] & 15) << 4);
    }
}

/* Bit 4 of 32 codes, weight 0 in the lowest bit. */
static void put_fifth_bits(uint8_t *out, const uint8_t *codes)
{
    uint32_t word = 0;
    for (unsigned i = 0; i < 32; i++) {
        word |= (uint32_t)(codes[i] >> 4 & 1) << i;
    }
    put_u16(out, (uint16_t)word);
    put_u16(out + 2, (uint16_t)(word >> 16));
}

static void quantize_q8_0(const float *x, uint8_t *out)
{
    float d = put_f16(out, abs_max(x, 32) / 127);
    uint8_t codes[32];
    codes_of(codes, x, 32, inverse(d), 128, 255);
    for (unsigned i = 0; i < 32; i++) {
        out[2 + i] = codes[i] ^ 0x80; /* offset binary to two's complement */
    }
}

/* Q4_0 and Q5_0: codes around a middle of 8 or 16. */
static void quantize_symmetric(const float *x, uint8_t *out, unsigned bits)
{
    float middle = (float)(1 << (bits - 1));
    float d = put_f16(out, abs_max(x, 32) / (middle - 1));
    uint8_t codes[32];
    codes_of(codes, x, 32, inverse(d), middle, (1 << bits) - 1);
    out += 2;
    if (bits == 5) {
        put_fifth_bits(out, codes);
        out += 4;
    }
    put_nibbles(out, codes);
}

/* Q4_1 and Q5_1: codes upward from the minimum. */
static void quantize_from_min(const float *x, uint8_t *out, unsigned bits)
{
    float lo, hi;
    range(x, 32, &lo, &hi);
    float most = (float)((1 << bits) - 1);
    float d = put_f16(out, (hi - lo) / most);
    float m = put_f16(out + 2, lo);
    uint8_t codes[32];
    codes_of(codes, x, 32, inverse(d), -m * inverse(d), (int)most);
    out += 4;
    if (bits == 5) {
        put_fifth_bits(out, codes);
        out += 4;
    }
    put_nibbles(out, codes);
}

static void quantize_iq4_nl(const float *x, uint8_t *out)
{
    const int8_t *table = slu_fmt_get(SLU_FMT_IQ4_NL)->table;
    float d = put_f16(out, abs_max(x, 32) / 127);
    uint8_t codes[32] = {0};
    float id = inverse(d);
    for (unsigned k = 0; k < 15; k++) {
        float between = 0.5f * (float)(table[k] + table[k + 1]);
        for (unsigned i = 0; i < 32; i++) {
            codes[i] += x[i] * id > between;
        }
    }
    put_nibbles(out + 2, codes);
}

static void quantize_mxfp4(const float *x, uint8_t *out)
{
    /* Midpoints between 0, .5, 1, 1.5, 2, 3, 4 and 6. */
    static const float between[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    int exponent = 0;
    float most = abs_max(x, 32);
    if (most > 0) {
        frexpf(most, &exponent);
        exponent -= 3; /* the largest magnitude lands in [4, 8) */
        exponent = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
    }
    float id = ldexpf(1, -exponent);
    uint8_t codes[32];
    for (unsigned i = 0; i < 32; i++) {
        codes[i] = x[i] < 0 ? 8 : 0;
    }
    for (unsigned k = 0; k < 7; k++) {
        for (unsigned i = 0; i < 32; i++) {
            codes[i] += fabsf(x[i]) * id > between[k];
        }
    }
    out[0] = most > 0 ? (uint8_t)(exponent + 127) : 0;
    put_nibbles(out + 1, codes);
}

/* Layouts of the K-quants: tools/planes.c. */
static void quantize_q45_k(const float *x, uint8_t *out, unsigned bits)
{
    float scale[8], min[8], scale_max = 0, min_max = 0;
    float most = (float)((1 << bits) - 1);
    for (unsigned g = 0; g < 8; g++) {
        float lo, hi;
        range(x + 32 * g, 32, &lo, &hi);
        min[g] = lo < 0 ? -lo : 0;
        scale[g] = ((hi > 0 ? hi : 0) + min[g]) / most;
        scale_max = scale[g] > scale_max ? scale[g] : scale_max;
        min_max = min[g] > min_max ? min[g] : min_max;
    }
    float d = put_f16(out, scale_max / 63);
    float dmin = put_f16(out + 2, min_max / 63);
    uint8_t s[8], m[8], codes[256];
    codes_of(s, scale, 8, inverse(d), 0, 63);
    codes_of(m, min, 8, inverse(dmin), 0, 63);
    for (unsigned g = 0; g < 8; g++) {
        float id = inverse(d * (float)s[g]);
        codes_of(codes + 32 * g, x + 32 * g, 32, id, dmin * (float)m[g] * id, (int)most);
    }
    uint8_t *packed = out + 4;
    for (unsigned k = 0; k < 4; k++) {
        packed[k] = (uint8_t)(s[k] | (s[k + 4] >> 4) << 6);
        packed[k + 4] = (uint8_t)(m[k] | (m[k + 4] >> 4) << 6);
        packed[k + 8] = (uint8_t)((s[k + 4] & 15) | (m[k + 4] & 15) << 4);
    }
    out += 16;
    if (bits == 5) {
        memset(out, 0, 32);
        for (unsigned g = 0; g < 8; g++) {
            for (unsigned l = 0; l < 32; l++) {
                out[l] |= (uint8_t)((codes[32 * g + l] >> 4) << g);
            }
        }
        out += 32;
    }
    for (unsigned p = 0; p < 4; p++) {
        for (unsigned l = 0; l < 32; l++) {
            out[32 * p + l] =
                (uint8_t)((codes[64 * p + l] & 15) | (codes[64 * p + 32 + l] & 15) << 4);
        }
    }
}

static void quantize_q6_k(const float *x, uint8_t *out)
{
    float scale[16];
    for (unsigned g = 0; g < 16; g++) {
        scale[g] = abs_max(x + 16 * g, 16) / 31;
    }
    float d = put_f16(out + 208, abs_max(scale, 16) / 127);
    uint8_t *s = out + 192;
    codes_of(s, scale, 16, inverse(d), 0, 127);
    uint8_t codes[256];
    for (unsigned g = 0; g < 16; g++) {
        codes_of(codes + 16 * g, x + 16 * g, 16, inverse(d * (float)s[g]), 32, 63);
    }
    for (unsigned h = 0; h < 2; h++) {
        const uint8_t *half = codes + 128 * h;
        for (unsigned l = 0; l < 64; l++) {
            out[64 * h + l] = (uint8_t)((half[l] & 15) | (half[l + 64] & 15) << 4);
        }
        for (unsigned l = 0; l < 32; l++) {
            out[128 + 32 * h + l] = (uint8_t)((half[l] >> 4) | (half[l + 32] >> 4) << 2 |
                                              (half[l + 64] >> 4) << 4 | (half[l + 96] >> 4) << 6);
        }
    }
}

static void quantize_floats(enum slu_fmt_id id, const float *x, uint32_t n, uint8_t *out)
{
    if (id == SLU_FMT_F32) {
        memcpy(out, x, (size_t)n * sizeof *x);
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        /* bf16: round to nearest even by adding just under half of the last place kept. */
        uint16_t half = id == SLU_FMT_F16 ? slu_f32_to_f16(x[i])
                                          : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        put_u16(out + 2 * (size_t)i, half);
    }
}

void slu_quantize_row(const struct slu_fmt *fmt, const float *x, uint32_t n, uint8_t *out)
{
    assert(n % fmt->granule == 0);
    if (fmt->group == 0) {
        quantize_floats(fmt->id, x, n, out);
        return;
    }
    for (uint32_t i = 0; i < n; i += fmt->granule) {
        switch (fmt->id) {
        case SLU_FMT_Q8_0:
            quantize_q8_0(x + i, out);
            out += 34;
            break;
        case SLU_FMT_Q4_0:
            quantize_symmetric(x + i, out, 4);
            out += 18;
            break;
        case SLU_FMT_Q4_1:
            quantize_from_min(x + i, out, 4);
            out += 20;
            break;
        case SLU_FMT_Q5_0:
            quantize_symmetric(x + i, out, 5);
            out += 22;
            break;
        case SLU_FMT_Q5_1:
            quantize_from_min(x + i, out, 5);
            out += 24;
            break;
        case SLU_FMT_Q4_K:
            quantize_q45_k(x + i, out, 4);
            out += 144;
            break;
        case SLU_FMT_Q5_K:
            quantize_q45_k(x + i, out, 5);
            out += 176;
            break;
        case SLU_FMT_Q6_K:
            quantize_q6_k(x + i, out);
            out += 210;
            break;
        case SLU_FMT_IQ4_NL:
            quantize_iq4_nl(x + i, out);
            out += 18;
            break;
        case SLU_FMT_MXFP4:
            quantize_mxfp4(x + i, out);
            out += 17;
            break;
        default:
            assert(!"a format without a quantizer");
        }
    }
}

void slu_quantize_q4_0(const float *x, uint32_t n, uint8_t *out)
{
    for (uint32_t g = 0; g < n; g += 32, x += 32, out += 18) {
        float most = 0;
        for (int i = 0; i < 32; i++) {
            most = fabsf(x[i]) > fabsf(most) ? x[i] : most;
        }
        float d = most / -8, id = inverse(d);
        put_f16(out, d);
        for (int i = 0; i < 16; i++) {
            int a = (int)(x[i] * id + 8.5f), b = (int)(x[i + 16] * id + 8.5f);
            out[2 + i] = (uint8_t)((a < 15 ? a : 15) | (b < 15 ? b : 15) << 4);
        }
    }
}
