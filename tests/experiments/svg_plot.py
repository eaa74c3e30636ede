"""Line plots as SVG, for the other programs of this folder.

panel() draws one plot, write() a file of several.
"""
import html
import math

import numpy as np

COLOURS = "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b"
WIDTH, HEIGHT = 300, 220                           # of one plot with its labels
LEFT, RIGHT = 46, 286                              # the area of the curves
TOP, BOTTOM = 33, 178
COLUMNS = 3                                        # plots in a row of a file

def panel(title, xlabel, curves, log=False):
    """One plot as a piece of SVG. curves: {name: (xs, ys)}; log: a logarithmic y axis."""
    curves = {name: finite_points(xs, ys, log) for name, (xs, ys) in curves.items()}
    x_axis = Axis(np.concatenate([xs for xs, _ in curves.values()]), LEFT, RIGHT)
    y_axis = Axis(np.concatenate([ys for _, ys in curves.values()]), BOTTOM, TOP)
    centre = (LEFT + RIGHT) / 2
    lines = f"M{LEFT} {TOP - 3}V{BOTTOM}H{RIGHT + 4}"            # both axes
    parts = [text(centre, 16, title, 'text-anchor="middle" font-weight="bold"'),
             text(centre, HEIGHT - 8, xlabel, 'text-anchor="middle"'),
             f'<path d="{lines}" fill="none" stroke="#888"/>']
    for x in x_axis.ticks():
        parts.append(text(x_axis.place(x), BOTTOM + 15, short(x), 'text-anchor="middle"'))
    for y in y_axis.ticks():
        label = short(10 ** y if log else y)
        parts.append(text(LEFT - 4, y_axis.place(y) + 4, label, 'text-anchor="end"'))
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in zip(xs, ys))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                     'stroke-width="1.5"/>')
        legend = f'text-anchor="end" fill="{colour}"'
        parts.append(text(RIGHT + 2, TOP + 9 + 13 * i, name, legend))
    return "".join(parts)

def write(path, panels):
    """Write an SVG file of plots, three in a row, on white, so that dark mode shows them too."""
    columns, rows = min(COLUMNS, len(panels)), math.ceil(len(panels) / COLUMNS)
    width, height = WIDTH * columns + 10, HEIGHT * rows + 5
    plots = []
    for i, plot in enumerate(panels):
        row, column = divmod(i, COLUMNS)
        plots.append(f'<g transform="translate({WIDTH * column} {HEIGHT * row})">{plot}</g>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                    f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">'
                    f'<rect width="{width}" height="{height}" fill="white"/>'
                    f'{"".join(plots)}</svg>\n')
    print(f"saved: {path}")

class Axis:
    """Places numbers between two coordinates of the drawing: the smallest at start, the largest
    at end, and if all are equal, all in the middle."""
    def __init__(self, values, start, end):
        self.low, self.high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
        self.start, self.end = start, end

    def place(self, value):
        if self.high == self.low:
            return (self.start + self.end) / 2
        fraction = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * fraction

    def ticks(self):
        """The numbers to write beside the axis"""
        return [self.low] if self.high == self.low else np.linspace(self.low, self.high, 5)

def finite_points(xs, ys, log):
    """Two float arrays: without the points that cannot be drawn; with log, log10 of the ys."""
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    if log:
        ys = np.log10(np.where(ys > 0, ys, np.nan))
    keep = np.isfinite(xs) & np.isfinite(ys)
    return xs[keep], ys[keep]

def text(x, y, words, attributes):
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{html.escape(str(words))}</text>'

def short(value):
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
