#include "base/cpu.h"
#include "kern/c/ecq.h"
#include "kern/isa.h"

const struct slu_kern slu_kern_c = {
    .name = "c",
    .mul =
        {
            [SLU_FMT_F32] = slu_c_mul_float,
            [SLU_FMT_F16] = slu_c_mul_float,
            [SLU_FMT_BF16] = slu_c_mul_float,
            [SLU_FMT_Q8_0] = slu_c_mul_quant,
            [SLU_FMT_Q4_0] = slu_c_mul_quant,
            [SLU_FMT_Q4_1] = slu_c_mul_quant,
            [SLU_FMT_Q5_0] = slu_c_mul_quant,
            [SLU_FMT_Q5_1] = slu_c_mul_quant,
            [SLU_FMT_Q4_K] = slu_c_mul_quant,
            [SLU_FMT_Q5_K] = slu_c_mul_quant,
            [SLU_FMT_Q6_K] = slu_c_mul_quant,
            [SLU_FMT_IQ4_NL] = slu_c_mul_quant,
            [SLU_FMT_MXFP4] = slu_c_mul_quant,
            [SLU_FMT_Q3E] = slu_c_mul_ecq,
            [SLU_FMT_Q4E] = slu_c_mul_ecq,
            [SLU_FMT_Q5E] = slu_c_mul_ecq,
            [SLU_FMT_Q6E] = slu_c_mul_ecq,
        },
    .quantize = slu_c_quantize,
    .row_f32 = slu_c_row_f32,
    .dot_f32 = slu_c_dot_f32,
    .dot_f16 = slu_c_dot_f16,
    .axpy_f32 = slu_c_axpy_f32,
    .add_grid = slu_c_add_grid,
    .axpy_f16 = slu_c_axpy_f16,
    .f32_to_f16 = slu_c_f32_to_f16,
    .attn_mul = slu_c_attn_mul,
    .attn_floats = slu_c_attn_floats,
    .attn_weigh = slu_c_attn_weigh,
    .glu = {slu_c_attn_silu, slu_c_attn_oai},
};

#if defined(__x86_64__)
/* Climbs as far as the flags reach. */
static const struct slu_kern *best_x86(unsigned cpu_flags)
{
    if (!(cpu_flags & SLU_CPU_AVX2)) {
        return &slu_kern_c;
    }
    if (cpu_flags & SLU_CPU_AVX512) {
        return &slu_kern_avx512;
    }
    if (cpu_flags & SLU_CPU_AVX_VNNI) {
        return &slu_kern_avxvnni;
    }
    return &slu_kern_avx2;
}
#endif

#if defined(__aarch64__)
static const struct slu_kern *best_arm(unsigned cpu_flags)
{
    if (!(cpu_flags & SLU_CPU_DOTPROD)) {
        return &slu_kern_c;
    }
    return cpu_flags & SLU_CPU_I8MM ? &slu_kern_i8mm : &slu_kern_dotprod;
}
#endif

const struct slu_kern *slu_kern_get(unsigned cpu_flags)
{
#if defined(__x86_64__)
    return best_x86(cpu_flags);
#elif defined(__aarch64__)
    return best_arm(cpu_flags);
#else
    (void)cpu_flags;
    return &slu_kern_c;
#endif
}
