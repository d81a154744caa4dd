/*
 * Quantized weights in NEON registers: a group's codes as signed integers, and the scales and
 * minimums of eight groups. Only the ARM files may include it: everything here is inlined.
 */
#ifndef SLU_KERN_ARM_LOAD_H
#define SLU_KERN_ARM_LOAD_H

#include "kern/arm/neon.h"

#define CHUNK 8 /* groups */

/* A format. All of it is known at compile time. */
struct kind {
    uint8_t bits;
    bool has_table;
    bool is_halved; /* two 8-bit scales for 32 columns, of a super-group */
    uint8_t offset; /* subtracted from the value */
    enum slu_scale_kind scale;
    enum slu_min_kind min;
};

/* Where a row of weights lies. */
struct row {
    const uint8_t *codes, *high, *scales, *mins, *supers;
};

ALWAYS_INLINE struct row row_at(const struct slu_mat *w, size_t i)
{
    return (struct row){
        .codes = w->data + w->at.codes + i * w->at.codes_row,
        .high = w->data + w->at.high + i * w->at.high_row,
        .scales = w->data + w->at.scales + i * w->at.scales_row,
        .mins = w->data + w->at.mins + i * w->at.mins_row,
        .supers = w->data + w->at.supers + i * w->at.supers_row,
    };
}

/* The table of a format, its offset already taken out. */
ALWAYS_INLINE int8x16_t table_of(const struct kind k, const struct slu_mat *w)
{
    if (!k.has_table) {
        return vdupq_n_s8(0);
    }
    return vsubq_s8(vld1q_s8(w->fmt->table), vdupq_n_s8((int8_t)k.offset));
}

/* Bit i of two bytes becomes `value` in byte i. */
ALWAYS_INLINE uint8x16_t bits_of_bytes(const uint8_t *at, uint8_t value)
{
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8x16_t v = vcombine_u8(vdup_n_u8(at[0]), vdup_n_u8(at[1]));
    return vandq_u8(vtstq_u8(v, bit), vdupq_n_u8(value));
}

ALWAYS_INLINE uint8x16_t high_bits(const uint8_t *high)
{
    return bits_of_bytes(high, 16);
}

/* Bits `shift` and shift + 1 of 8 bytes; those from shift + 2 follow. */
ALWAYS_INLINE uint8x16_t pairs_of_bytes(const uint8_t *at, int shift)
{
    uint8x8_t v = vld1_u8(at);
    uint8x8_t a = vshl_u8(v, vdup_n_s8((int8_t)-shift));
    uint8x8_t b = vshl_u8(v, vdup_n_s8((int8_t)(-shift - 2)));
    return vandq_u8(vcombine_u8(a, b), vdupq_n_u8(3));
}

/* The same as bits 4 and 5. */
ALWAYS_INLINE uint8x16_t high_pairs(const uint8_t *high, int shift)
{
    return vshlq_n_u8(pairs_of_bytes(high, shift), 4);
}

/* Group g of a row, its first and its second 16 columns. */
ALWAYS_INLINE void decode(const struct kind k, const struct row *row, size_t g, int8x16_t table,
                          int8x16_t ret[2])
{
    if (k.bits == 8) {
        ret[0] = vreinterpretq_s8_u8(vld1q_u8(row->codes + 32 * g));
        ret[1] = vreinterpretq_s8_u8(vld1q_u8(row->codes + 32 * g + 16));
        return;
    }
    uint8x16_t v = vld1q_u8(row->codes + 16 * g);
    uint8x16_t codes[2] = {vandq_u8(v, vdupq_n_u8(15)), vshrq_n_u8(v, 4)};
    for (int h = 0; h < 2; h++) {
        if (k.bits == 5) {
            codes[h] = vorrq_u8(codes[h], high_bits(row->high + 4 * g + 2 * h));
        } else if (k.bits == 6) {
            codes[h] = vorrq_u8(codes[h], high_pairs(row->high + 8 * g, 4 * h));
        }
        ret[h] = k.has_table
                     ? vqtbl1q_s8(table, codes[h])
                     : vsubq_s8(vreinterpretq_s8_u8(codes[h]), vdupq_n_s8((int8_t)k.offset));
    }
}

ALWAYS_INLINE void load_halves(const uint8_t *plane, size_t g, uint32_t n, float32x4_t ret[2])
{
    uint16_t some[CHUNK] = {0};
    memcpy(some, plane + 2 * g, 2 * n);
    float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(some));
    ret[0] = vcvt_f32_f16(vget_low_f16(v));
    ret[1] = vcvt_f32_f16(vget_high_f16(v));
}

/* n bytes from the g-th on, wide. */
ALWAYS_INLINE void load_bytes(const uint8_t *plane, size_t g, uint32_t n, uint32x4_t ret[2])
{
    uint8_t some[CHUNK] = {0};
    memcpy(some, plane + g, n);
    uint16x8_t v = vmovl_u8(vld1_u8(some));
    ret[0] = vmovl_u16(vget_low_u16(v));
    ret[1] = vmovl_u16(vget_high_u16(v));
}

/* 2^(e-128), which for e of 0 and 1 is subnormal. */
ALWAYS_INLINE float32x4_t from_e8m0(uint32x4_t e)
{
    uint32x4_t normal = vshlq_n_u32(vsubq_u32(e, vdupq_n_u32(1)), 23);
    uint32x4_t subnormal = vshlq_u32(vdupq_n_u32(1 << 21), vreinterpretq_s32_u32(e));
    uint32x4_t is_normal = vcgtq_u32(e, vdupq_n_u32(1));
    return vreinterpretq_f32_u32(vbslq_u32(is_normal, normal, subnormal));
}

ALWAYS_INLINE float super_at(const uint8_t *supers, size_t i)
{
    uint16_t bits;
    memcpy(&bits, supers + 2 * i, sizeof bits);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}

/* The scales of a chunk, which is a super-group where there are such. */
ALWAYS_INLINE void load_scales(const struct kind k, const struct row *row, size_t g, uint32_t n,
                               float32x4_t ret[2])
{
    uint32x4_t bytes[2];
    if (k.scale == SLU_SCALE_F16) {
        load_halves(row->scales, g, n, ret);
        return;
    }
    if (k.scale == SLU_SCALE_E8M0) {
        load_bytes(row->scales, g, n, bytes);
        ret[0] = from_e8m0(bytes[0]);
        ret[1] = from_e8m0(bytes[1]);
        return;
    }
    float d = super_at(row->supers, g / CHUNK * (k.min == SLU_MIN_NONE ? 1 : 2));
    if (k.is_halved) {
        ret[0] = ret[1] = vdupq_n_f32(d);
        return;
    }
    load_bytes(row->scales, g, n, bytes);
    ret[0] = vmulq_n_f32(vcvtq_f32_u32(bytes[0]), d);
    ret[1] = vmulq_n_f32(vcvtq_f32_u32(bytes[1]), d);
}

/* What the sums of activations are multiplied with. */
ALWAYS_INLINE void load_mins(const struct kind k, const struct row *row, size_t g, uint32_t n,
                             float32x4_t ret[2])
{
    if (k.min == SLU_MIN_F16) {
        load_halves(row->mins, g, n, ret);
        return;
    }
    uint32x4_t bytes[2];
    float d = super_at(row->supers, g / CHUNK * 2 + 1);
    load_bytes(row->mins, g, n, bytes);
    ret[0] = vnegq_f32(vmulq_n_f32(vcvtq_f32_u32(bytes[0]), d));
    ret[1] = vnegq_f32(vmulq_n_f32(vcvtq_f32_u32(bytes[1]), d));
}

#endif
