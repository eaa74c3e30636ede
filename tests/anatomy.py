"""What is rFVD made of? Reconstructions of stage 1, mended or spoilt by hand, and what I3D thinks of each.

    python tests/anatomy.py --vqgan runs/sky/vqgan.pt

The error of a reconstruction is divided: what changes from frame to frame (fast: it differs from the mean over 3 frames) and the
rest (slow); what changes from pixel to pixel (fine: it differs from the mean over 3 x 3 pixels). "Mended" is what rFVD could be if
a better model knew that part. "Invented" keeps how much of it there is and where, but not what; "5 pixels off" shows the real thing
where it was not: what detail made up by a GAN is worth lies between them. One seed, so the numbers can be had again.
"""
import argparse, sys
from pathlib import Path
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from data import Videos, run, to_float, to_uint8
from vqgan3d import load_vqgan, psnr

def mean(x, kernel):
    """Mean over a window of odd sides (t, h, w) around each position, edges repeated"""
    t, h, w = (k // 2 for k in kernel)
    return F.avg_pool3d(F.pad(x, (w, w, h, h, t, t), mode="replicate"), kernel, 1)

def coarse(x, k):
    """What of each frame is left at a scale of k pixels"""
    return F.interpolate(F.avg_pool3d(x, (1, k, k)), size=x.shape[2:], mode="trilinear")

def invented(x, generator, k=16, time=False):
    """x with random phases, the same for all colours, in tiles of k x k pixels: each keeps its spectrum. The same for all frames too,
    so that each keeps its changes in time; with `time`, those are random as well."""
    B, C, T, H, W = x.shape
    tiles, axes = x.view(B, C, T, H // k, k, W // k, k).permute(0, 3, 5, 1, 2, 4, 6), (-3, -2, -1) if time else (-2, -1)   # (B, H/k, W/k, C, T, k, k)
    phase = torch.fft.fftn(torch.randn(B, H // k, W // k, 1, T if time else 1, k, k, generator=generator), dim=axes)
    tiles = torch.fft.ifftn(torch.fft.fftn(tiles, dim=axes) * phase / phase.abs(), dim=axes).real
    return tiles.permute(0, 3, 4, 1, 5, 2, 6).reshape(x.shape)

def change(x, t):
    """From one frame to the next, root mean square in grey levels: within a latent frame of t frames; where the next one begins"""
    d, begins = x.diff(dim=2).mul(127.5).square().mean((0, 1, 3, 4)), torch.arange(1, x.shape[2]) % t == 0
    return d[~begins].mean().sqrt().item(), d[begins].mean().sqrt().item()

def variants(vqgan, x, generator):
    """name, clips like x, one after the other"""
    z = [vqgan.encode(clip[None]) for clip in x]
    y = torch.cat([vqgan.decode(vqgan.quantize(v)[0]) for v in z])
    yield "as they are", y
    yield "of latents that were not quantised", torch.cat([vqgan.decode(v) for v in z])
    error = x - y
    slow, fine = mean(error, (3, 1, 1)), error - mean(error, (1, 3, 3))
    fast = error - slow
    yield "slow error mended", y + slow
    yield "fast error mended", y + fast
    yield "fine error mended", y + fine
    yield "fast error mended, at a scale of 4 pixels", y + coarse(fast, 4)
    yield "fast error mended, at a scale of 8 pixels", y + coarse(fast, 8)
    loud = fast.square().mean((1, 3, 4), keepdim=True)
    events = (loud > 1.7 * loud.median(2, keepdim=True).values).to(y)
    yield f"fast error mended in its {events.mean():.0%} loudest frames", y + events * fast
    yield "fast error invented", y + invented(fast, generator, time=True)
    yield "fast error invented, its changes in time right", y + invented(fast, generator)
    yield "fast error 5 pixels off", y + torch.roll(fast, (3, 4), (3, 4))
    yield "fine error invented", y + invented(fine, generator, time=True)
    yield "what is fast in them doubled", 2 * y - mean(y, (3, 1, 1))
    yield "what is fast in them halved", (y + mean(y, (3, 1, 1))) / 2

@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vqgan", default="runs/sky/vqgan.pt")
    parser.add_argument("--n", type=int, default=54, help="test windows, evenly spaced")
    parser.add_argument("--i3d", help="I3D weights; else the user's cache, or pip")
    args = parser.parse_args()
    vqgan, i3d = load_vqgan(args.vqgan), evaluate.load_i3d(args.i3d)
    c = vqgan.config
    clips = Videos(c.data, c.data_dir, "test", c.size, c.frames, c.stride).fixed(args.n)[0]
    real, x = evaluate.i3d_logits(i3d, clips.numpy()), to_float(clips)
    energy = lambda v: (v - mean(v, (3, 1, 1))).square().mean().item() * 127.5 ** 2
    tell = lambda name, decibels, rfvd, v: print(f"{name:<50}{decibels:>7}{rfvd:>8}{energy(v):>13.2f}" + "{:>8.2f}{:>8.2f}".format(*change(v, c.down[0])), flush=True)
    print(f"{len(clips)} test windows of {c.data}; fast: its energy in squared grey levels; change: from frame to frame in grey levels, within a latent frame and between two\n"
          f"{'':<50}{'PSNR':>7}{'rFVD':>8}{'fast energy':>13}{'change':>8}")
    tell("real", "", "", x)
    for name, y in variants(vqgan, x, torch.Generator().manual_seed(0)):
        written = to_uint8(y)
        rfvd = evaluate.frechet_distance(real, evaluate.i3d_logits(i3d, written))
        tell(name, f"{psnr(x, y):.2f}", f"{rfvd:.1f}", to_float(torch.from_numpy(written)))

if __name__ == "__main__":
    run(main)
