"""What does rFVD consist of? Reconstructions of stage 1 are changed by hand, and each is scored.

    python -m tests.experiments.rfvd_breakdown --vqgan runs/sky/vqgan.pt

The error of a reconstruction is divided in two ways:
    fast, slow    its difference from the mean over 3 frames, and this mean
    fine          its difference from the mean over 3 x 3 pixels
"Corrected": this part of the error is removed. The rFVD that is left is what a model could reach
that knows this part. "Replaced by random detail": the part keeps its strength at every scale, in
each tile of 16 x 16 pixels, but not its content. "Moved by 5 pixels": the true part, but at another
place. The worth of detail that a GAN makes up lies between these two. All random numbers come from
one seed, so the numbers can be reproduced.
"""
import argparse

import torch
import torch.nn.functional as F

import evaluate
from data import FlagParser, Videos, run_main, to_float, to_uint8
from vqgan3d import load_vqgan, psnr

TILE = 16                                          # pixels a side

def local_mean(x, kernel):
    """Mean over a window of odd sides (t, h, w) around each position; edges are repeated."""
    t, h, w = (k // 2 for k in kernel)
    x = F.pad(x, (w, w, h, h, t, t), mode="replicate")
    return F.avg_pool3d(x, kernel, 1)

def fast_part(x):
    """The difference from the mean over 3 frames"""
    return x - local_mean(x, (3, 1, 1))

def fine_part(x):
    """The difference from the mean over 3 x 3 pixels"""
    return x - local_mean(x, (1, 3, 3))

def coarse_part(x, k):
    """Each frame averaged over blocks of k x k pixels and interpolated"""
    return F.interpolate(F.avg_pool3d(x, (1, k, k)), size=x.shape[2:], mode="trilinear")

def randomize(x, generator, in_time):
    """x (B, C, T, H, W) with random phases of its spectrum in each tile, the same for all channels.

    in_time: phases in time are random too; else they are the same for all frames, so that the
    changes in time stay.
    """
    B, C, T, H, W = x.shape
    rows, columns = H // TILE, W // TILE
    tiles = x.view(B, C, T, rows, TILE, columns, TILE)
    tiles = tiles.permute(0, 3, 5, 1, 2, 4, 6)           # (B, rows, columns, C, T, TILE, TILE)
    axes = (-3, -2, -1) if in_time else (-2, -1)
    noise_shape = B, rows, columns, 1, T if in_time else 1, TILE, TILE
    phase = torch.fft.fftn(torch.randn(noise_shape, generator=generator), dim=axes)
    spectrum = torch.fft.fftn(tiles, dim=axes) * phase / phase.abs()
    tiles = torch.fft.ifftn(spectrum, dim=axes).real
    return tiles.permute(0, 3, 4, 1, 5, 2, 6).reshape(x.shape)

def variants(vqgan, x, generator):
    """Yield (name, videos like x): the reconstructions of x, as they are and changed."""
    z = [vqgan.encode(clip[None]) for clip in x]
    y = torch.cat([vqgan.decode(vqgan.quantize(v)[0]) for v in z])
    yield "as they are", y
    yield "of latents that were not quantised", torch.cat([vqgan.decode(v) for v in z])
    error = x - y
    fast, fine = fast_part(error), fine_part(error)
    slow = error - fast
    yield "slow error corrected", y + slow
    yield "fast error corrected", y + fast
    yield "fine error corrected", y + fine
    yield "fast error corrected, at a scale of 4 pixels", y + coarse_part(fast, 4)
    yield "fast error corrected, at a scale of 8 pixels", y + coarse_part(fast, 8)
    strength = fast.square().mean((1, 3, 4), keepdim=True)                   # of each frame
    strongest = (strength > 1.7 * strength.median(2, keepdim=True).values).to(y)
    yield (f"fast error corrected in the {strongest.mean():.0%} of the frames where it is largest",
           y + strongest * fast)
    yield "fast error replaced by random detail", y + randomize(fast, generator, in_time=True)
    yield ("fast error replaced by random detail, its changes in time right",
           y + randomize(fast, generator, in_time=False))
    yield "fast error moved by 5 pixels", y + torch.roll(fast, (3, 4), (3, 4))
    yield "fine error replaced by random detail", y + randomize(fine, generator, in_time=True)
    yield "fast part of the reconstructions doubled", y + fast_part(y)
    yield "fast part of the reconstructions halved", y - fast_part(y) / 2

def fast_energy(x):
    """Mean square of the fast part, in squared grey levels"""
    return fast_part(x).square().mean().item() * 127.5 ** 2

def changes(x, axis, period):
    """Root mean square change along an axis from a position to the next, in grey levels: within a
    latent, and where the next latent begins"""
    change = x.diff(dim=axis).mul(127.5).square().movedim(axis, 0).flatten(1).mean(1)
    is_border = torch.arange(1, x.shape[axis]) % period == 0
    return change[~is_border].mean().sqrt().item(), change[is_border].mean().sqrt().item()

def print_row(name, decibels, rfvd, x, down):
    within, between = changes(x, 2, down[0])
    within_columns, between_columns = changes(x, 4, down[2])
    print(f"{name:<66}{decibels:>7}{rfvd:>8}{fast_energy(x):>13.2f}{within:>8.2f}{between:>9.2f}"
          f"{between_columns / within_columns:>7.2f}", flush=True)

@torch.no_grad()
def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vqgan", default="runs/sky/vqgan.pt", help="[%(default)s]")
    parser.add_argument("--n", type=int, default=54, help="test windows [%(default)s]")
    parser.add_argument("--i3d", help="I3D weights [downloaded once with pip]")
    args = parser.parse_args()
    vqgan = load_vqgan(args.vqgan)
    i3d = evaluate.load_i3d(args.i3d)
    c = vqgan.config
    test = Videos(c.data, c.data_dir, "test", c.size, c.frames, c.stride, c.fps)
    clips, _ = test.fixed(args.n)
    x = to_float(clips)                                                      # (n, 3, T, H, W)
    real = evaluate.i3d_logits(i3d, clips.numpy())
    print(f"{len(clips)} test windows of {c.data}, evenly spaced. PSNR in dB; energy of the fast "
          "part in squared grey levels; change\nfrom a frame to the next in grey levels, within a "
          "latent frame and between two; grid: the same\nfrom a column of pixels to the next, "
          "between divided by within\n"
          f"{'':<66}{'PSNR':>7}{'rFVD':>8}{'fast energy':>13}{'within':>8}{'between':>9}{'grid':>7}")
    print_row("real clips", "", "", x, c.down)
    for name, y in variants(vqgan, x, torch.Generator().manual_seed(0)):
        written = to_uint8(y)
        rfvd = evaluate.frechet_distance(real, evaluate.i3d_logits(i3d, written))
        print_row(name, f"{psnr(x, y).mean():.2f}", f"{rfvd:.1f}", to_float(written), c.down)

if __name__ == "__main__":
    run_main(main)
