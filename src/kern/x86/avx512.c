#include "kern/x86/avx512.h"
#include "kern/x86/ecq.h"

const struct slu_kern slu_kern_avx512 = {
    .name = "avx512",
    .mul =
        {
            /* Float products come at memory's speed already. */
            [SLU_FMT_F32] = slu_avx2_mul_f32,
            [SLU_FMT_F16] = slu_avx2_mul_f16,
            [SLU_FMT_BF16] = slu_avx2_mul_bf16,
            [SLU_FMT_Q8_0] = slu_avx512_mul_q8_0,
            [SLU_FMT_Q4_0] = slu_avx512_mul_q4_0,
            [SLU_FMT_Q4_1] = slu_avx512_mul_q4_1,
            [SLU_FMT_Q5_0] = slu_avx512_mul_q5_0,
            [SLU_FMT_Q5_1] = slu_avx512_mul_q5_1,
            [SLU_FMT_Q4_K] = slu_avx512_mul_q4_k,
            [SLU_FMT_Q5_K] = slu_avx512_mul_q5_k,
            [SLU_FMT_Q6_K] = slu_avx512_mul_q6_k,
            [SLU_FMT_IQ4_NL] = slu_avx512_mul_iq4_nl,
            [SLU_FMT_MXFP4] = slu_avx512_mul_mxfp4,
            [SLU_FMT_Q3E] = slu_avx512_mul_q3e,
            [SLU_FMT_Q4E] = slu_avx512_mul_q4e,
            [SLU_FMT_Q5E] = slu_avx512_mul_q5e,
            [SLU_FMT_Q6E] = slu_avx512_mul_q6e,
        },
    .quantize = slu_avx2_quantize,
    .row_f32 = slu_c_row_f32,
    .dot_f32 = slu_avx2_dot_f32,
    .dot_f16 = slu_avx2_dot_f16,
    .axpy_f32 = slu_avx2_axpy_f32,
    .axpy_f16 = slu_avx2_axpy_f16,
    .add_grid = slu_avx512_add_grid,
    .f32_to_f16 = slu_avx2_f32_to_f16,
    .attn_mul = slu_avx512_attn_mul,
    .attn_floats = slu_avx512_attn_floats,
    .attn_weigh = slu_avx512_attn_weigh,
    .glu = {slu_avx512_attn_silu, slu_avx512_attn_oai},
};
