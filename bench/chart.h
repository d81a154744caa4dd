/*
 * Line charts in SVG, as many as a figure wants, for the benches' plots.
 *
 * Thread safety: one thread a figure.
 */
#ifndef SLU_BENCH_CHART_H
#define SLU_BENCH_CHART_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

/* A panel's plotting area, in pixels, and what lies around it. */
#define BENCH_CHART_WIDTH  340
#define BENCH_CHART_HEIGHT 240

struct bench_chart_line {
    const char *name, *colour;
    bool is_dashed;
    uint32_t n;
    const double *x, *y; /* [n]; points that are NaN are left out */
};

struct bench_chart {
    const char *title, *x_label;
    double x_max, y_min, y_max; /* x begins at 0 */
    bool x_is_share;            /* told in percent; y always is */
    const struct bench_chart_line *lines;
    uint32_t n_lines;
};

/* Charts in rows of n_columns, and beside them one legend, of the first chart's lines. SLU_EIO. */
int bench_chart_write(const char *path, const struct bench_chart *charts, uint32_t n,
                      uint32_t n_columns, struct slu_err *err);

#endif
