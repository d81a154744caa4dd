/* Quantized products with NEON and smmla, which multiplies two rows with two tokens over 8 columns
 * at once; for a token alone, with sdot. */
#include "kern/arm/panel.inc"

/* half[c][p] holds columns 8c .. 8c+7 of rows 2p and 2p+1. */
ALWAYS_INLINE void panel_put(int8_t *half, const int8x16_t rows[PANEL_ROWS])
{
    for (int p = 0; p < 4; p++) {
        int64x2_t a = vreinterpretq_s64_s8(rows[2 * p]);
        int64x2_t b = vreinterpretq_s64_s8(rows[2 * p + 1]);
        vst1q_s8(half + 16 * p, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
        vst1q_s8(half + 64 + 16 * p, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
    }
}

ALWAYS_INLINE void panel_dots(const int n_toks, const int8_t codes[2][16 * PANEL_ROWS],
                              const struct token *toks, size_t at, int h0, int h1,
                              int32x4_t ret[2][BLOCK])
{
    for (int t = 0; t < n_toks; t += 2) {
        /* An odd token goes with itself. */
        int other = t + 1 < n_toks ? t + 1 : t;
        int32x4_t sums[4];
        for (int p = 0; p < 4; p++) {
            sums[p] = vdupq_n_s32(0);
        }
        for (int h = h0; h < h1; h++) {
            for (int c = 0; c < 2; c++) {
                const int8_t *from = toks[t].q + at + 64 * h + 8 * c;
                const int8_t *from_other = toks[other].q + at + 64 * h + 8 * c;
                int8x16_t q = vcombine_s8(vld1_s8(from), vld1_s8(from_other));
                for (int p = 0; p < 4; p++) {
                    sums[p] = vmmlaq_s32(sums[p], vld1q_s8(codes[h] + 64 * c + 16 * p), q);
                }
            }
        }
        /* Rows by tokens, two by two -> rows of a token. */
        for (int v = 0; v < 2; v++) {
            ret[v][t] = vuzp1q_s32(sums[2 * v], sums[2 * v + 1]);
            ret[v][other] = t == other ? ret[v][t] : vuzp2q_s32(sums[2 * v], sums[2 * v + 1]);
        }
    }
}

QUANT_MULS

const struct slu_kern slu_kern_i8mm = KERNELS("i8mm");
