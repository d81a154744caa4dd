#!/usr/bin/env python3
"""Draws the logs of train.py and adapt.py as SVG: a line for each, on a logarithmic scale of loss.
Needs nothing but Python's own library."""
import argparse
import csv
import math

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 64, 16, 40, 48
COLOURS = ("#1b6ca8", "#c8553d", "#4a7c59", "#7d5ba6")


def read(path, column, smooth):
    """Points (step, mean of the last few losses)."""
    points, recent = [], []
    for row in csv.DictReader(open(path, newline="")):
        if float(row[column]) <= 0:  # nothing of the kind in that step
            continue
        recent = (recent + [float(row[column])])[-smooth:]
        points.append((int(row["step"]), sum(recent) / len(recent)))
    every = max(1, len(points) // 400)
    return points[::every] + points[-1:]


def ticks(low, high):
    """Round values between the two, for a logarithmic axis."""
    power = math.floor(math.log10(low))
    out = [m * 10.0 ** p for p in range(power, 3) for m in (1, 2, 5)]
    return [t for t in out if low <= t <= high]


def draw(title, curves):
    last = max(p[-1][0] for _, p in curves)
    values = [v for _, p in curves for _, v in p]
    low, high = max(min(values), 1e-4) * 0.9, max(values) * 1.1

    def x(step):
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value):
        share = math.log(max(value, low) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="22" font-size="15">{title}</text>']
    for t in ticks(low, high):
        out.append(f'<path d="M{LEFT} {y(t):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
                   f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>')
    step = 10 ** math.floor(math.log10(last))
    step = step if last / step > 4 else step / 2 if last / step > 2 else step / 5
    for i in range(int(last / step) + 1):
        out.append(f'<text x="{x(i * step):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                   f'text-anchor="middle">{i * step:g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
               'step</text>')
    for i, (name, points) in enumerate(curves):
        path = "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in points)
        colour = COLOURS[i % len(COLOURS)]
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                   f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 14 + 16 * i}" fill="{colour}" '
                   f'text-anchor="end">{name}</text>')
    return "\n".join(out + ["</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("curves", nargs="+", help="NAME=FILE.csv or NAME=FILE.csv:COLUMN")
    parser.add_argument("-o", "--output", required=True, help="the SVG to write")
    parser.add_argument("--title", default="Loss")
    parser.add_argument("--smooth", type=int, default=10, help="steps to average over (10)")
    args = parser.parse_args()
    curves = []
    for text in args.curves:
        name, _, path = text.partition("=")
        path, _, column = path.partition(":")
        curves.append((name, read(path, column or "loss", args.smooth)))
    with open(args.output, "w", encoding="utf-8") as f:
        f.write(draw(args.title, curves))


if __name__ == "__main__":
    main()
