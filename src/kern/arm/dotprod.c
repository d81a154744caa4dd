/* Quantized products with NEON and sdot: a quad of columns in each lane, and a quad of q taken from
 * a lane of its register. */
#include "kern/arm/panel.inc"

/* half[j] holds columns 4j .. 4j+3 of the 8 rows. */
ALWAYS_INLINE void panel_put(int8_t *half, const int8x16_t rows[PANEL_ROWS])
{
    for (int v = 0; v < 2; v++) {
        int32x4_t r[4];
        for (int i = 0; i < 4; i++) {
            r[i] = vreinterpretq_s32_s8(rows[4 * v + i]);
        }
        int64x2_t a = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1]));
        int64x2_t b = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1]));
        int64x2_t c = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3]));
        int64x2_t d = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
        vst1q_s8(half + 16 * v, vreinterpretq_s8_s64(vtrn1q_s64(a, c)));
        vst1q_s8(half + 32 + 16 * v, vreinterpretq_s8_s64(vtrn1q_s64(b, d)));
        vst1q_s8(half + 64 + 16 * v, vreinterpretq_s8_s64(vtrn2q_s64(a, c)));
        vst1q_s8(half + 96 + 16 * v, vreinterpretq_s8_s64(vtrn2q_s64(b, d)));
    }
}

ALWAYS_INLINE void panel_dots(const int n_toks, const int8_t codes[2][16 * PANEL_ROWS],
                              const struct token *toks, size_t at, int h0, int h1,
                              int32x4_t ret[2][BLOCK])
{
    for (int t = 0; t < n_toks; t++) {
        ret[0][t] = ret[1][t] = vdupq_n_s32(0);
    }
    for (int h = h0; h < h1; h++) {
        for (int v = 0; v < 2; v++) {
            const int8_t *w = codes[h] + 16 * v;
            int8x16_t a = vld1q_s8(w), b = vld1q_s8(w + 32);
            int8x16_t c = vld1q_s8(w + 64), d = vld1q_s8(w + 96);
            for (int t = 0; t < n_toks; t++) {
                int8x16_t q = vld1q_s8(toks[t].q + at + 64 * h);
                ret[v][t] = vdotq_laneq_s32(ret[v][t], a, q, 0);
                ret[v][t] = vdotq_laneq_s32(ret[v][t], b, q, 1);
                ret[v][t] = vdotq_laneq_s32(ret[v][t], c, q, 2);
                ret[v][t] = vdotq_laneq_s32(ret[v][t], d, q, 3);
            }
        }
    }
}

QUANT_MULS

const struct slu_kern slu_kern_dotprod = KERNELS("dotprod");
