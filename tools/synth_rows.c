/*
 * The weights of a generated model, row by row: each row of each tensor has random numbers of its
 * own, so that any can be made without those before it.
 *
 * Formats that giants are made of take a short cut. Codes are drawn from a table of 65,536 entries
 * (a byte of two nibbles, or one larger code, distributed as normal numbers are once they are
 * quantized), and scales from one of 256; that makes about a GB a second. All others go the long
 * way: normal numbers, then slu_quantize_row.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tools/planes.h"
#include "tools/quantize.h"
#include "tools/synth_parts.h"

/* ---- random numbers ---------------------------------------------------------------------- */

#define LANES SLU_SYNTH_LANES

/* Eight xoshiro128++ generators (Blackman and Vigna) side by side, so that a compiler can run them
 * in vectors. */
struct rng {
    uint32_t s[4][LANES];
};

/* splitmix64 (Steele, Lea, Flood). */
static uint64_t mix(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static void rng_init(struct rng *rng, uint64_t seed, uint64_t tensor, uint64_t row)
{
    uint64_t state = seed;
    state = mix(&state) ^ tensor;
    state = mix(&state) ^ row;
    for (unsigned k = 0; k < 4; k++) {
        for (unsigned l = 0; l < LANES; l += 2) {
            uint64_t two = mix(&state);
            rng->s[k][l] = (uint32_t)two;
            rng->s[k][l + 1] = (uint32_t)(two >> 32);
        }
    }
}

static inline uint32_t rotate(uint32_t x, unsigned k)
{
    return x << k | x >> (32 - k);
}

static inline void rng_next(struct rng *rng, uint32_t *ret)
{
    for (unsigned l = 0; l < LANES; l++) {
        uint32_t *s0 = &rng->s[0][l], *s1 = &rng->s[1][l], *s2 = &rng->s[2][l], *s3 = &rng->s[3][l];
        ret[l] = rotate(*s0 + *s3, 7) + *s0;
        uint32_t t = *s1 << 9;
        *s2 ^= *s0;
        *s3 ^= *s1;
        *s1 ^= *s2;
        *s0 ^= *s3;
        *s2 ^= t;
        *s3 = rotate(*s3, 11);
    }
}

/* Nearly normal numbers: sums of four 16-bit uniforms, which end at 3.46 deviations. `out` has room
 * for n rounded up to LANES. */
static void fill_normal(struct rng *rng, float *out, size_t n, float mean, float deviation)
{
    /* Each uniform has variance (2^32 - 1) / 12. */
    float scale = deviation / sqrtf(4.0f * 4294967295.0f / 12.0f);
    for (size_t i = 0; i < n; i += LANES) {
        uint32_t a[LANES], b[LANES];
        rng_next(rng, a);
        rng_next(rng, b);
        for (unsigned l = 0; l < LANES; l++) {
            int sum = (int)((a[l] & 0xffff) + (a[l] >> 16) + (b[l] & 0xffff) + (b[l] >> 16));
            out[i + l] = mean + scale * (float)(sum - 2 * 65535);
        }
    }
}

/* ---- codes ------------------------------------------------------------------------------- */

#define DRAWS 65536u /* entries of a table: one for each 16-bit random number */

/* How a format's codes are distributed: normal around `centre` with `deviation`, clipped to
 * 0 .. most; as wide as a group whose largest weight has the largest code makes them. */
struct spread {
    float centre, deviation;
    unsigned most;
};

static bool spread_of(enum slu_fmt_id id, struct spread *ret_spread)
{
    switch (id) {
    case SLU_FMT_Q8_0: /* around 128, as offset binary */
        *ret_spread = (struct spread){128, 61, 255};
        return true;
    case SLU_FMT_Q4_0:
        *ret_spread = (struct spread){8, 3.4f, 15};
        return true;
    case SLU_FMT_Q4_K:
        *ret_spread = (struct spread){7.5f, 3.6f, 15};
        return true;
    case SLU_FMT_Q6_K:
        *ret_spread = (struct spread){32, 17.5f, 63};
        return true;
    case SLU_FMT_MXFP4: /* values, not codes */
        *ret_spread = (struct spread){0, 2.6f, 15};
        return true;
    default:
        return false;
    }
}

/* The standard normal distribution's inverse, by halving. */
static double normal_at(double p)
{
    double lo = -6, hi = 6;
    for (int i = 0; i < 40; i++) {
        double mid = (lo + hi) / 2;
        if (0.5 * (1 + erf(mid / sqrt(2))) < p) {
            lo = mid;
        } else {
            hi = mid;
        }
    }
    return (lo + hi) / 2;
}

static const float mxfp4_values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};

static uint8_t code_at(enum slu_fmt_id id, const struct spread *spread, double p, float *ret_value)
{
    float x = spread->centre + spread->deviation * (float)normal_at(p);
    if (id == SLU_FMT_MXFP4) {
        unsigned k = 0;
        while (k < 7 && fabsf(x) > 0.5f * (mxfp4_values[k] + mxfp4_values[k + 1])) {
            k++;
        }
        *ret_value = x < 0 ? -mxfp4_values[k] : mxfp4_values[k];
        return (uint8_t)(k | (x < 0 ? 8u : 0));
    }
    float code = floorf(x + 0.5f);
    code = code < 0 ? 0 : code > (float)spread->most ? (float)spread->most : code;
    *ret_value = code - spread->centre;
    return (uint8_t)code;
}

/* Fills a format's table; *ret_rms is that of the values that it stands for. */
static void fill_table(enum slu_fmt_id id, const struct spread *spread, uint8_t *table,
                       float *ret_rms)
{
    bool is_pair = spread->most == 15;
    unsigned n = is_pair ? 256 : DRAWS;
    double squares = 0;
    for (unsigned i = 0; i < n; i++) {
        float value;
        table[i] = code_at(id, spread, (i + 0.5) / n, &value);
        squares += (double)value * value;
    }
    *ret_rms = (float)sqrt(squares / n);
    for (unsigned i = DRAWS; is_pair && i-- > 0;) { /* from above: entries below 256 are read */
        table[i] = (uint8_t)(table[i & 255] | table[i >> 8] << 4);
    }
}

int slu_synth_codes_init(struct slu_synth_codes *codes, const struct slu_synth_tensor *tensors,
                         size_t n, struct slu_err *err)
{
    for (size_t i = 0; i < n; i++) {
        struct spread spread;
        enum slu_fmt_id id = tensors[i].fmt->id;
        if (codes->table[id] || !spread_of(id, &spread)) {
            continue;
        }
        codes->table[id] = malloc(DRAWS);
        if (!codes->table[id]) {
            return slu_err_set(err, SLU_ENOMEM, "out of memory for a table of codes");
        }
        fill_table(id, &spread, codes->table[id], &codes->rms[id]);
    }
    return 0;
}

void slu_synth_codes_finish(struct slu_synth_codes *codes)
{
    for (unsigned id = 0; id < SLU_FMT_GGUFS; id++) {
        free(codes->table[id]);
        codes->table[id] = NULL;
    }
}

/* ---- rows -------------------------------------------------------------------------------- */

static void put_u16(uint8_t *out, uint16_t value)
{
    out[0] = (uint8_t)value;
    out[1] = (uint8_t)(value >> 8);
}

/* 16 entries of the table; returns a few bits that have little to do with them, for scales. */
static inline uint32_t draw(struct rng *rng, const uint8_t *table, uint8_t *out)
{
    uint32_t bits[LANES];
    rng_next(rng, bits);
    for (unsigned l = 0; l < LANES; l++) {
        out[2 * l] = table[bits[l] & 0xffff];
        out[2 * l + 1] = table[bits[l] >> 16];
    }
    return (bits[0] * 0x9e3779b1u ^ bits[5]) * 0x85ebca6bu >> 8;
}

/* 256 scales around one, from .75 to 1.25, whose squares have the mean 1. */
static float jitter(unsigned i)
{
    return (0.75f + (float)i / 510.0f) / 1.0104f;
}

/* Q4_0 and Q8_0: an f16 scale and a code for each of 32 weights. */
static void fill_plain(struct rng *rng, const uint8_t *table, float scale, bool is_q8, uint32_t n,
                       uint8_t *out)
{
    uint16_t scales[256];
    for (unsigned i = 0; i < 256; i++) {
        scales[i] = slu_f32_to_f16(scale * jitter(i));
    }
    for (uint32_t at = 0; at < n; at += 32) {
        uint32_t more = draw(rng, table, out + 2);
        put_u16(out, scales[more & 255]);
        out += 18;
        if (is_q8) {
            draw(rng, table, out);
            out += 16;
            for (int i = -32; i < 0; i++) {
                out[i] ^= 0x80; /* offset binary to two's complement */
            }
        }
    }
}

/* Scales are powers of two: two neighbouring ones, mixed so that the deviation comes out right. */
static void fill_mxfp4(struct rng *rng, const uint8_t *table, float scale, uint32_t n, uint8_t *out)
{
    int exponent;
    float part = frexpf(scale, &exponent); /* [.5, 1) */
    exponent = exponent - 1 < -126 ? -126 : exponent - 1 > 126 ? 126 : exponent - 1;
    uint32_t larger = (uint32_t)(256.0f * (4 * part * part - 1) / 3);
    for (uint32_t at = 0; at < n; at += 32) {
        uint32_t more = draw(rng, table, out + 1);
        out[0] = (uint8_t)(exponent + 127 + ((more & 255) < larger));
        out += 17;
    }
}

/* Layouts of the K-quants: tools/planes.c. Scales of 48 to 63, and minimums that put the middle of
 * the codes at zero. */
static void fill_q4_k(struct rng *rng, const uint8_t *table, float scale, uint32_t n, uint8_t *out)
{
    float d = slu_f16_to_f32(slu_f32_to_f16(scale / 55.7f)); /* the rms of 48 .. 63 */
    uint16_t d_bits = slu_f32_to_f16(d), dmin_bits = slu_f32_to_f16(7.5f * d);
    for (uint32_t at = 0; at < n; at += 256) {
        uint32_t more = 0;
        for (unsigned i = 0; i < 8; i++) {
            more ^= draw(rng, table, out + 16 + 16 * i) << i;
        }
        uint8_t s[8];
        for (unsigned g = 0; g < 8; g++) {
            s[g] = (uint8_t)(48 + (more * (2 * g + 1) >> (g + 4) & 15));
        }
        put_u16(out, d_bits);
        put_u16(out + 2, dmin_bits);
        for (unsigned k = 0; k < 4; k++) {
            out[4 + k] = out[8 + k] = (uint8_t)(s[k] | (s[k + 4] >> 4) << 6);
            out[12 + k] = (uint8_t)((s[k + 4] & 15) | (s[k + 4] & 15) << 4);
        }
        out += 144;
    }
}

static void fill_q6_k(struct rng *rng, const uint8_t *table, float scale, uint32_t n, uint8_t *out)
{
    uint16_t d_bits = slu_f32_to_f16(scale / 103.9f); /* the rms of 88 .. 119 */
    for (uint32_t at = 0; at < n; at += 256) {
        uint8_t codes[256];
        for (unsigned i = 0; i < 16; i++) {
            out[192 + i] = (uint8_t)(88 + (draw(rng, table, codes + 16 * i) & 31));
        }
        for (unsigned h = 0; h < 2; h++) {
            const uint8_t *half = codes + 128 * h;
            for (unsigned l = 0; l < 64; l++) {
                out[64 * h + l] = (uint8_t)((half[l] & 15) | (half[l + 64] & 15) << 4);
            }
            for (unsigned l = 0; l < 32; l++) {
                out[128 + 32 * h + l] =
                    (uint8_t)((half[l] >> 4) | (half[l + 32] >> 4) << 2 | (half[l + 64] >> 4) << 4 |
                              (half[l + 96] >> 4) << 6);
            }
        }
        put_u16(out + 208, d_bits);
        out += 210;
    }
}

void slu_synth_row(const struct slu_synth_codes *codes, uint64_t seed,
                   const struct slu_synth_tensor *tensor, uint64_t row, float *scratch,
                   uint8_t *out)
{
    struct rng rng;
    uint32_t cols = (uint32_t)tensor->dims[0];
    enum slu_fmt_id id = tensor->fmt->id;
    const uint8_t *table = codes->table[id];
    rng_init(&rng, seed, tensor->number, row);
    if (!table) {
        fill_normal(&rng, scratch, cols, tensor->mean, tensor->deviation);
        slu_quantize_row(tensor->fmt, scratch, cols, out);
        return;
    }
    float scale = tensor->deviation / codes->rms[id];
    if (id == SLU_FMT_MXFP4) {
        fill_mxfp4(&rng, table, scale, cols, out);
    } else if (id == SLU_FMT_Q4_K) {
        fill_q4_k(&rng, table, scale, cols, out);
    } else if (id == SLU_FMT_Q6_K) {
        fill_q6_k(&rng, table, scale, cols, out);
    } else {
        fill_plain(&rng, table, scale, id == SLU_FMT_Q8_0, cols, out);
    }
}
