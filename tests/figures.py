"""The figures of the README, drawn from our own numbers as SVG.

    python tests/figures.py --corruptions sky --data_dir datasets   # does FVD grow when footage is spoilt? (14 x 128 clips of I3D)
    python tests/figures.py --curves runs/toy                       # the losses of both stages, from their logs
    python tests/figures.py --neighbours runs/sky/samples.npy       # are samples copies of training clips?
"""
import argparse, json, sys
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from data import Videos, save_grid, to_float, to_uint8

COLOURS = "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b"

def panel(title, xlabel, curves, log=False):
    """curves {name: (xs, ys)} -> SVG of one plot, 300 x 220; log: a logarithmic y axis"""
    xs, ys = (np.concatenate([np.asarray(c[i], float) for c in curves.values()]) for i in (0, 1))
    f = np.log10 if log else np.asarray
    x0, x1, y0, y1 = xs.min(), xs.max(), f(ys).min(), f(ys).max()
    X, Y = (lambda x: 46 + 240 * (x - x0) / (x1 - x0)), (lambda y: 178 - 145 * (f(y) - y0) / (y1 - y0))
    short = lambda v: f"{v:.0f}" if abs(v) >= 100 else f"{v:.2g}"
    text = lambda x, y, s, more="": f'<text x="{x:.1f}" y="{y:.1f}" {more}>{s}</text>'
    out = [text(166, 16, title, 'text-anchor="middle" font-weight="bold"'), text(166, 212, xlabel, 'text-anchor="middle"'),
           '<path d="M46 30V178H290" fill="none" stroke="#888"/>']
    for v in np.linspace(x0, x1, 5):
        out.append(text(X(v), 193, short(v), 'text-anchor="middle"'))
    for v in np.linspace(y0, y1, 5):
        out.append(text(42, 182 - 145 * (v - y0) / (y1 - y0), short(10 ** v if log else v), 'text-anchor="end"'))
    for (name, (x, y)), colour in zip(curves.items(), COLOURS):
        points = " ".join(f"{X(a):.1f},{Y(b):.1f}" for a, b in zip(x, y))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for i, (name, colour) in enumerate(zip(curves, COLOURS)):
        out.append(text(288, 42 + 13 * i, name, f'text-anchor="end" fill="{colour}"'))
    return "".join(out)

def write(path, panels):
    """The plots side by side, three in a row, on white, which is readable in dark mode too."""
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    inner = "".join(f'<g transform="translate({300 * (i % 3)} {220 * (i // 3)})">{p}</g>' for i, p in enumerate(panels))
    w, h = 300 * columns + 10, 220 * rows + 5
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" font-family="sans-serif" font-size="10">'
                    f'<rect width="{w}" height="{h}" fill="white"/>{inner}</svg>\n')
    print(f"saved: {path}")

def blur(x, sigma):
    """Gaussian blur of every frame of (B, 3, T, H, W), edges repeated"""
    k = int(3 * sigma + 1)
    g = torch.exp(-torch.arange(-k, k + 1).float() ** 2 / (2 * sigma ** 2))
    g, shape = g / g.sum(), x.shape
    x = F.pad(x.transpose(1, 2).reshape(-1, 1, *shape[3:]), (k,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))
    return x.view(shape[0], shape[2], shape[1], *shape[3:]).transpose(1, 2)

def freeze(x, part):
    """The last `part` of the frames are repetitions of the frame before them"""
    keep = x.shape[2] - round(part * x.shape[2])
    return torch.cat([x[:, :, :keep], x[:, :, keep - 1:keep].expand(-1, -1, x.shape[2] - keep, -1, -1)], 2)

SPOILT = {
    "noise, deviation in grey levels": ((5, 10, 20, 40), lambda x, s: x + s / 127.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
    "blur, deviation in pixels": ((0.5, 1, 2, 4), blur),
    "frozen part of the frames": ((0.25, 0.5, 0.75, 0.9375), freeze),
}

def corruptions(data, data_dir, out, dtype, i3d=None, n=128, size=128):
    """Windows that begin at even frames, against others of the same videos that begin at odd ones and are spoilt. (Spoilt copies
    of the very same windows would draw KVD below zero: it leaves out the pairs i = j on either side, not those across.)"""
    videos, i3d = Videos(data, data_dir, "train", size), evaluate.load_i3d(i3d)
    def windows(odd):
        all = [(i, s) for i, v in enumerate(videos.videos) for s in range(odd, v[1] - videos.span + 1, 2)]
        return np.stack([videos.window(*all[k * len(all) // n])[0] for k in range(n)])    # uint8 (n, T, H, W, 3)
    def logits(clips, what):
        return evaluate.i3d_logits(i3d, clips, desc=what, dtype=dtype)
    clips, real, table = windows(1), logits(windows(0), "as it is"), []
    untouched = logits(clips, "other windows")
    for what, (strengths, spoil) in SPOILT.items():
        rows = []
        for s in (0, *strengths):
            bad = np.concatenate([to_uint8(spoil(to_float(torch.from_numpy(clips[i:i + 8])), s)) for i in range(0, n, 8)]) if s else clips
            features = logits(bad, f"{what} {s}") if s else untouched
            rows.append((s, evaluate.frechet_distance(real, features), evaluate.kernel_distance(real, features)))
            print(f"{what} {s}: FVD {rows[-1][1]:.1f}, KVD {rows[-1][2]:.2f}", flush=True)
        table.append(dict(what=what, rows=rows))
    Path("runs").mkdir(exist_ok=True)
    Path("runs/corruptions.json").write_text(json.dumps(dict(data=data, n=n, size=size, dtype=dtype, table=table), indent=1))
    short = lambda k: k.split(",")[0].split(" part")[0]
    write(out, [panel(f"{name}: {short(t['what'])}", t["what"], {name: ([r[0] for r in t["rows"]], [r[i] for r in t["rows"]])})
                for i, name in ((1, "FVD"), (2, "KVD")) for t in table])

def curves(folder, out):
    """What a healthy run looks like: both logs"""
    def read(name):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        column = lambda k: ([r["step"] for r in rows if k in r], [r[k] for r in rows if k in r])
        smooth = lambda c, n=9: (c[0], [float(np.mean(c[1][max(0, i - n // 2):i + n // 2 + 1])) for i in range(len(c[1]))])
        return lambda *keys: {k: smooth(column(k)) if len(column(k)[0]) > 40 else column(k) for k in keys}
    one, two = read("vqgan.jsonl"), read("diffusion.jsonl")
    write(out, [panel("stage 1: mse", "step", one("mse"), log=True), panel("stage 1: held-out PSNR, dB", "step", one("psnr")),
                panel("stage 1: the game", "step", one("gan", "disc", "D_real", "D_fake")),
                panel("stage 1: part of the codes in use", "step", one("usage")), panel("stage 2: loss", "step", two("loss", "held_out_loss"), log=True),
                panel("stage 2: loss by quarter of the times", "step", two("loss_t1", "loss_t2", "loss_t3", "loss_t4"), log=True)])

def neighbours(path, data_dir, show=8):
    """PSNR of each sample, and of each held-out window, to the nearest window of the training videos (at a quarter of the
    resolution); a GIF of samples over their neighbours, beside the samples. A copy would be far nearer than a held-out clip is."""
    protocol = json.loads(path.with_suffix(".json").read_text())
    small = lambda clips: F.avg_pool3d(to_float(clips), (1, 4, 4)).flatten(1)
    def all_windows(split):
        v = Videos(protocol["data"], data_dir, split, protocol["size"], protocol["frames"], protocol["stride"])
        windows = [v.window(i, s)[0] for i, (_, n, _, _) in enumerate(v.videos) for s in range(n - v.span + 1)]
        return windows, torch.cat([small(np.array(w[None])) for w in windows])
    def nearest(x, train):
        distance, i = torch.cdist(x, train).min(1)
        return -20 * (distance / x.shape[1] ** 0.5 / 2).log10(), i                 # of a range of 2
    samples = np.load(path, mmap_mode="r")
    (windows, train), (_, test) = all_windows("train"), all_windows("test")
    near, i = nearest(torch.cat([small(np.array(samples[k:k + 1])) for k in range(len(samples))]), train)
    for name, values in (f"{len(samples)} samples", near), (f"{len(test)} held-out windows", nearest(test, train)[0]):
        print(f"{name}: PSNR to the nearest of {len(train)} training windows: median {values.median():.1f} dB, 10% {values.quantile(0.1):.1f}, 90% {values.quantile(0.9):.1f}")
    print(f"the samples' neighbours lie in {len(set(i.tolist()))} different windows")
    pairs = np.stack([np.concatenate([samples[k], windows[i[k]]], 1) for k in range(min(show, len(samples)))])
    save_grid(path.with_name("neighbours.gif"), pairs, columns=show)
    print(f"saved: {path.with_name('neighbours.gif')}, samples over their neighbours")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corruptions", metavar="DATA")
    parser.add_argument("--n", type=int, default=128, help="windows on each side of --corruptions")
    parser.add_argument("--data_dir", default="datasets")
    parser.add_argument("--i3d", help="I3D weights; else the user's cache, or pip")
    parser.add_argument("--dtype", default="float32", help="of I3D: float32 or bfloat16")
    parser.add_argument("--curves", type=Path, metavar="RUN")
    parser.add_argument("--neighbours", type=Path, metavar="SAMPLES")
    args = parser.parse_args()
    if args.corruptions:
        corruptions(args.corruptions, args.data_dir, Path("assets/corruptions.svg"), args.dtype, args.i3d, args.n)
    if args.curves:
        curves(args.curves, Path("assets/curves.svg"))
    if args.neighbours:
        neighbours(args.neighbours, args.data_dir)
