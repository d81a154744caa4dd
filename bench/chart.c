#include "bench/chart.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define MARGIN_LEFT   56
#define MARGIN_TOP    36
#define MARGIN_BOTTOM 44
#define MARGIN_RIGHT  20
#define LEGEND_WIDTH  250
#define LEGEND_STEP   18
#define N_TICKS       5

static const int column_width = MARGIN_LEFT + BENCH_CHART_WIDTH + MARGIN_RIGHT;
static const int row_height = MARGIN_TOP + BENCH_CHART_HEIGHT + MARGIN_BOTTOM;

static double place(double value, double min, double max, double length)
{
    double share = max > min ? (value - min) / (max - min) : 0;
    return length * (share < 0 ? 0 : share > 1 ? 1 : share);
}

static void draw_axes(FILE *f, const struct bench_chart *chart)
{
    int bottom = BENCH_CHART_HEIGHT;
    fprintf(f, "<text y=\"-14\" font-size=\"13\">%s</text>\n", chart->title);
    for (int i = 0; i <= N_TICKS; i++) {
        double y = chart->y_min + (chart->y_max - chart->y_min) * i / N_TICKS;
        double x = chart->x_max * i / N_TICKS;
        double at_y = bottom - place(y, chart->y_min, chart->y_max, bottom);
        double at_x = place(x, 0, chart->x_max, BENCH_CHART_WIDTH);
        fprintf(f,
                "<line x1=\"0\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#dddddd\"/>"
                "<text x=\"-8\" y=\"%.1f\" text-anchor=\"end\">%.0f %%</text>\n",
                BENCH_CHART_WIDTH, at_y, at_y, at_y + 4, 100 * y);
        fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.*f%s</text>\n", at_x,
                bottom + 16, chart->x_is_share || chart->x_max >= 10 ? 0 : 1,
                chart->x_is_share ? 100 * x : x, chart->x_is_share ? " %" : "");
    }
    fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", BENCH_CHART_WIDTH / 2,
            bottom + 34, chart->x_label);
}

static void draw_line(FILE *f, const struct bench_chart *chart, const struct bench_chart_line *line)
{
    const char *dashes = line->is_dashed ? " stroke-dasharray=\"5 3\"" : "";
    fprintf(f, "<polyline fill=\"none\" stroke-width=\"1.6\" stroke=\"%s\"%s points=\"",
            line->colour, dashes);
    for (int is_dots = 0; is_dots < 2; is_dots++) {
        for (uint32_t i = 0; i < line->n; i++) {
            if (isnan(line->x[i]) || isnan(line->y[i])) {
                continue;
            }
            double x = place(line->x[i], 0, chart->x_max, BENCH_CHART_WIDTH);
            double y = BENCH_CHART_HEIGHT -
                       place(line->y[i], chart->y_min, chart->y_max, BENCH_CHART_HEIGHT);
            fprintf(f,
                    is_dots ? "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2.4\" fill=\"%s\"/>"
                            : "%.1f,%.1f ",
                    x, y, line->colour);
        }
        fprintf(f, is_dots ? "\n" : "\"/>\n");
    }
}

static void draw_legend(FILE *f, const struct bench_chart *chart)
{
    for (uint32_t i = 0; i < chart->n_lines; i++) {
        const struct bench_chart_line *line = &chart->lines[i];
        int y = LEGEND_STEP * (int)i;
        fprintf(f,
                "<line x1=\"0\" x2=\"24\" y1=\"%d\" y2=\"%d\" stroke=\"%s\" stroke-width=\"2\"%s/>"
                "<text x=\"32\" y=\"%d\">%s</text>\n",
                y, y, line->colour, line->is_dashed ? " stroke-dasharray=\"5 3\"" : "", y + 4,
                line->name);
    }
}

int bench_chart_write(const char *path, const struct bench_chart *charts, uint32_t n,
                      uint32_t n_columns, struct slu_err *err)
{
    FILE *f = fopen(path, "w");
    if (!f) {
        return slu_err_set(err, SLU_EIO, "%s: cannot be written: %s", path, strerror(errno));
    }
    int n_rows = (int)((n + n_columns - 1) / n_columns);
    int width = column_width * (int)n_columns + LEGEND_WIDTH;
    int height = row_height * n_rows, legend = 2 * MARGIN_TOP + LEGEND_STEP * (int)charts->n_lines;
    height = legend > height ? legend : height;
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
            "font-family=\"sans-serif\" font-size=\"11\">\n"
            "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>\n",
            width, height, width, height);
    for (uint32_t i = 0; i < n; i++) {
        fprintf(f, "<g transform=\"translate(%d %d)\">\n",
                MARGIN_LEFT + column_width * (int)(i % n_columns),
                MARGIN_TOP + row_height * (int)(i / n_columns));
        draw_axes(f, &charts[i]);
        for (uint32_t j = 0; j < charts[i].n_lines; j++) {
            draw_line(f, &charts[i], &charts[i].lines[j]);
        }
        fprintf(f, "</g>\n");
    }
    fprintf(f, "<g transform=\"translate(%d %d)\">\n", column_width * (int)n_columns + 10,
            MARGIN_TOP);
    draw_legend(f, charts);
    fprintf(f, "</g>\n</svg>\n");
    bool is_written = ferror(f) == 0;
    is_written = fclose(f) == 0 && is_written;
    return is_written ? 0 : slu_err_set(err, SLU_EIO, "%s: cannot be written", path);
}
