#include "model/rope.h"

#include <math.h>

/* The pair index at which a full turn of the original context has `beta` rotations. */
static double yarn_pair(const struct slu_config *c, double beta)
{
    return c->rope_dims * log(c->yarn_orig_ctx / (beta * 2 * M_PI)) / (2 * log(c->rope_base));
}

void slu_rope_freqs(const struct slu_config *c, double *freqs)
{
    uint32_t n = c->rope_dims;
    bool is_yarn = c->yarn_factor > 0;
    double lo = 0, hi = 0;
    if (is_yarn) {
        lo = fmax(0, floor(yarn_pair(c, c->yarn_beta_fast)));
        hi = fmin(n - 1, ceil(yarn_pair(c, c->yarn_beta_slow)));
    }
    for (uint32_t i = 0; i < n / 2; i++) {
        double freq = pow(c->rope_base, -2.0 * i / n) / c->rope_linear;
        if (is_yarn) {
            double ramp = 1 - fmin(1, fmax(0, (i - lo) / fmax(.001, hi - lo)));
            freq *= (1 - ramp) / c->yarn_factor + ramp;
        }
        freqs[i] = freq;
    }
}

void slu_rope_angles(const struct slu_config *c, const double *freqs, uint32_t position,
                     float *ret_cos, float *ret_sin)
{
    for (uint32_t i = 0; i < c->rope_dims / 2; i++) {
        double angle = position * freqs[i];
        ret_cos[i] = (float)(cos(angle) * c->rope_magnitude);
        ret_sin[i] = (float)(sin(angle) * c->rope_magnitude);
    }
}

void slu_rope_apply(const struct slu_config *c, float *x, const float *cos_row,
                    const float *sin_row)
{
    uint32_t half = c->rope_dims / 2;
    /* Split halves pair i with i + half; adjacent pairs are 2i and 2i + 1. */
    uint32_t step = c->rope_neox ? 1 : 2, apart = c->rope_neox ? half : 1;
    for (uint32_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + apart];
        x[i * step] = a * cos_row[i] - b * sin_row[i];
        x[i * step + apart] = a * sin_row[i] + b * cos_row[i];
    }
}
