/* Attention with NEON. */
#include <math.h>

#include "kern/arm/neon.h"

#define VEC        float32x4_t
#define LANES      4
#define BLOCK_ROWS 8
#define ATTN(name) slu_neon_attn_##name

#define vec_set           vdupq_n_f32
#define vec_load          vld1q_f32
#define vec_store         vst1q_f32
#define vec_add           vaddq_f32
#define vec_sub           vsubq_f32
#define vec_mul           vmulq_f32
#define vec_div           vdivq_f32
#define vec_below         vminq_f32 /* x where it is a NaN */
#define vec_above         vmaxq_f32
#define vec_fma(a, b, c)  vfmaq_f32(c, a, b)
#define vec_most(x, most) vmaxnmq_f32(x, most)

ALWAYS_INLINE VEC vec_halves(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

ALWAYS_INLINE VEC vec_codes(const int8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

ALWAYS_INLINE VEC vec_steps(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

ALWAYS_INLINE VEC vec_power(VEC p, VEC t)
{
    uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(t), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p), power));
}

ALWAYS_INLINE VEC vec_limit(VEC x, VEC p)
{
    p = vbslq_f32(vcltq_f32(x, vdupq_n_f32(SLU_EXP_X_MIN)), vdupq_n_f32(0), p);
    p = vbslq_f32(vcgtq_f32(x, vdupq_n_f32(SLU_EXP_X_MAX)), vdupq_n_f32(INFINITY), p);
    return vbslq_f32(vceqq_f32(x, x), p, x);
}

ALWAYS_INLINE float vec_lanes(const VEC acc[8])
{
    VEC u[2];
    for (int k = 0; k < 2; k++) {
        u[k] = vaddq_f32(vaddq_f32(acc[k], acc[2 + k]), vaddq_f32(acc[4 + k], acc[6 + k]));
    }
    return lanes_sum(u[0], u[1]);
}

#include "kern/attn.inc"
