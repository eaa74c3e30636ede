"""Draw the losses and scores of a training run from its logs: one SVG, of one stage or of both.

    python -m tests.experiments.plot_curves runs/toy        # writes runs/toy/curves.svg
    python -m tests.experiments.plot_curves runs/toy --out assets/curves.svg    # for the README
"""
import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import FlagParser, UserError, run_main
from tests.experiments.svg_plot import panel, write

class Plot(NamedTuple):
    title: str
    columns: tuple       # of the log: one curve each
    log: bool = False    # a logarithmic axis?

PLOTS = {
    "vqgan.jsonl": [
        Plot("stage 1: mse", ("mse",), log=True),
        Plot("stage 1: held-out PSNR, dB", ("psnr",)),
        Plot("stage 1: GAN", ("gan", "disc", "D_real", "D_fake")),
        Plot("stage 1: fraction of the codes in use", ("codes_used",)),
    ],
    "diffusion.jsonl": [
        Plot("stage 2: loss", ("loss", "held_out_loss"), log=True),
        Plot("stage 2: loss by quarter of the times", ("loss_t1", "loss_t2", "loss_t3", "loss_t4"),
             log=True),
    ],
}

def read_log(path):
    """{column: (steps, values)} of a .jsonl log; {} if it is absent."""
    columns = {}
    if not path.exists():
        return columns
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"line {number} of {path} is not a row of a log: delete that line")
        for name, value in row.items():
            steps, values = columns.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return columns

def smooth(values, n=9):
    """Each value replaced by the mean of the n around it; a short series stays as it is."""
    if len(values) <= 40:
        return values
    return [np.mean(values[max(0, i - n // 2):i + n // 2 + 1]) for i in range(len(values))]

def draw(plot, columns):
    """One plot of the columns that the log has; None if it has none of them."""
    curves = {}
    for name in plot.columns:
        if name in columns:
            steps, values = columns[name]
            curves[name] = steps, smooth(values)
    return panel(plot.title, "step", curves, plot.log) if curves else None

def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--out", type=Path, help="the SVG file [curves.svg in that folder]")
    args = parser.parse_args()
    panels = []
    for name, plots in PLOTS.items():
        columns = read_log(args.run / name)
        for plot in plots:
            drawn = draw(plot, columns)
            if drawn:
                panels.append(drawn)
    if not panels:
        raise UserError(f"there is no {' or '.join(PLOTS)} with losses in {args.run}: give the "
                        "folder of a run, as in runs/toy")
    write(args.out or args.run / "curves.svg", panels)

if __name__ == "__main__":
    run_main(main)
