#include "model/tally.h"

#include <string.h>

#include "base/clock.h"

void slu_tally_start(struct slu_tally *tally, unsigned n_threads)
{
    memset(tally->part_ns, 0, sizeof tally->part_ns);
    memset(tally->threads, 0, n_threads * sizeof *tally->threads);
    tally->weight_bytes = tally->macs = 0;
    tally->border_ns = slu_now_ns();
}

void slu_tally_cross(struct slu_tally *tally, enum slu_part part)
{
    uint64_t now_ns = slu_now_ns();
    tally->part_ns[part] += now_ns - tally->border_ns;
    tally->border_ns = now_ns;
}

void slu_tally_dense(struct slu_tally *tally, const struct slu_mat *mat, uint32_t n)
{
    tally->weight_bytes += mat->at.bytes;
    tally->macs += (uint64_t)mat->rows * mat->cols * n;
}
