/*
 * Taking GGUF rows apart into the planes of the weight format family (kern/format.h), and putting
 * them together again. Both ways move bits and round nothing: exporting what was imported gives
 * the very bytes that were read. The layouts of GGUF's block types follow the ggml project's
 * definitions (ggml-common.h, block_q4_0 and so on).
 *
 * Thread safety: pure functions.
 */
#ifndef SLU_TOOLS_PLANES_H
#define SLU_TOOLS_PLANES_H

#include "base/err.h"
#include "kern/format.h"

/* A matrix that can be written to; owns nothing. The layout is that of struct slu_mat. */
struct slu_planes {
    const struct slu_fmt *fmt;
    uint32_t rows, cols;
    uint8_t *data;
    struct slu_mat_layout at;
};

/* False if the shape doesn't suit the format, as for slu_mat_layout. */
bool slu_planes_init(struct slu_planes *planes, const struct slu_fmt *fmt, uint32_t rows,
                     uint32_t cols, void *data);

/* Where in a matrix that begins at `base` planes of another kind start that are worth a table of
 * symbols of their own (slu_encode_parts): offsets over 0, ascending, appended to cuts[*n_cuts].
 * At most SLU_PLANES_CUTS. */
#define SLU_PLANES_CUTS 9
void slu_planes_cuts(const struct slu_mat_layout *at, uint32_t rows, size_t base, size_t *cuts,
                     size_t *n_cuts);

/* What a plane has to gain by compression (struct slu_parts): nothing in the formats whose codes
 * are chosen for what they compress to. */
unsigned slu_planes_least_gain(const struct slu_fmt *fmt);

/* The family's format for a ggml type number. SLU_EUNSUP, by the type's name, for any other. */
int slu_planes_fmt(uint32_t ggml_type, const struct slu_fmt **ret_fmt, struct slu_err *err);

/* The ggml type number of a format. */
uint32_t slu_planes_ggml_type(const struct slu_fmt *fmt);

/* Bytes of `cols` weights in a GGUF row; cols is a multiple of the format's granule. */
size_t slu_planes_row_bytes(const struct slu_fmt *fmt, uint32_t cols);

/* Takes a GGUF row of planes->cols weights apart into row `row`. */
void slu_planes_import(struct slu_planes *planes, uint32_t row, const uint8_t *src);

/* The same for columns first_col .. first_col + planes->cols - 1 of a longer GGUF row. Both ends
 * are multiples of the format's granule. */
void slu_planes_import_range(struct slu_planes *planes, uint32_t row, const uint8_t *src,
                             uint32_t first_col);

/* The inverses: write the GGUF row, or those columns of a longer one. */
void slu_planes_export(const struct slu_planes *planes, uint32_t row, uint8_t *dst);
void slu_planes_export_range(const struct slu_planes *planes, uint32_t row, uint8_t *dst,
                             uint32_t first_col);

#endif
