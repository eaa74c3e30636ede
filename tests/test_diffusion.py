"""Stage 2: formulas against independent ones, the U-Net, guidance, what is trained and what is not, resuming."""
import functools, json, math, shutil
from pathlib import Path
import numpy as np
import pytest
import torch
import diffusion, sample
from conftest import same
from data import Videos
from diffusion import SAMPLERS, Attention, Config, Diffusion, System, UNet, ddim, ddpm, guided, load_diffusion
from vqgan3d import build_vqgan

def net(classes=3, **changes):
    """A small U-Net whose parameters are all random, those too that start at zero."""
    torch.manual_seed(0)
    unet = UNet(Config(**{**dict(width=16, mults=(1, 2), blocks=1, head_dim=8, attention=64), **changes}), 3, 4, 8, classes)
    for p in unet.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return unet.eval()

def load(path):
    return torch.load(path, weights_only=True)

# ---- the diffusion ----

def test_schedules():
    """Times reversed, a linear schedule other than DDPM's, noise that never becomes noise."""
    beta = np.linspace(1e-4, 0.02, 1000)
    assert np.allclose(Diffusion(1000, "linear", "eps").ab, np.cumprod(1 - beta), rtol=1e-12)
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert np.allclose(Diffusion(1000, "cosine", "eps").ab[:990], np.array(f[1:991]) / f[0], rtol=1e-9)
    for noise in ("linear", "cosine"):
        for T in (50, 1000):
            d = Diffusion(T, noise, "eps")
            assert (d.ab.diff() < 0).all() and 0.99 < d.ab[0] < 1 and 0 < d.ab[-1] < 1e-3
            assert d.times(T) == list(range(T))[::-1] and d.times(10)[0] == T - 1 and d.times(10)[-1] == 0 and len(set(d.times(10))) == 10
    for wrong in (("sine", "eps"), ("linear", "x0")):
        with pytest.raises(diffusion.UserError, match="must be"):
            Diffusion(10, *wrong)

@pytest.mark.parametrize("predict", ["eps", "v"])
def test_noise_is_added_and_taken_away(predict):
    """v = a eps - s x_0 with a sign or a factor exchanged; a clipped x_0 whose eps no longer explains x."""
    torch.manual_seed(0)
    d = Diffusion(100, "cosine", predict)
    x0, eps, t = torch.randn(6, 3, 2, 4, 4).clamp(-2, 2), torch.randn(6, 3, 2, 4, 4), torch.tensor([0, 1, 20, 50, 80, 97])
    x, target = d.add_noise(x0, eps, t)
    a, s = (v.float().view(-1, 1, 1, 1, 1) for v in (d.ab[t].sqrt(), (1 - d.ab[t]).sqrt()))
    assert torch.allclose(x, a * x0 + s * eps) and torch.allclose(target, eps if predict == "eps" else a * eps - s * x0)
    back = d.split(x, target, t, bound=2)
    assert torch.allclose(back[0], x0, atol=1e-3) and torch.allclose(back[1], eps, atol=2e-3)
    clipped, rest = d.split(x, target, t, bound=0.5)
    assert clipped.abs().max() <= 0.5 and torch.allclose(a * clipped + s * rest, x, atol=1e-5)

def test_ddpm_step_is_the_posterior_of_ddpm_eq_7():
    """A posterior with alpha and alpha-bar confused, or shifted by one step."""
    d, T = Diffusion(1000, "linear", "eps"), 1000
    beta = np.linspace(1e-4, 0.02, T)
    ab = np.cumprod(1 - beta)
    x, x0 = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for t in (999, 500, 7, 1):
        mean, _ = next(diffusion.ddpm(lambda x, t: (x0, None), d, x, [t, t - 1], lambda: torch.zeros(5)))
        noisy, _ = next(diffusion.ddpm(lambda x, t: (x0, None), d, x, [t, t - 1], lambda: torch.ones(5)))
        expected = (ab[t - 1] ** 0.5 * beta[t] * x0 + (1 - beta[t]) ** 0.5 * (1 - ab[t - 1]) * x) / (1 - ab[t])
        assert torch.allclose(mean, expected, rtol=1e-9)
        assert ((noisy - mean) ** 2).mean().item() == pytest.approx((1 - ab[t - 1]) / (1 - ab[t]) * beta[t], rel=1e-6)
    last, _ = next(diffusion.ddpm(lambda x, t: (x0, None), d, x, [0], None))       # at the end no noise is added
    assert torch.allclose(last, x0)

MEAN, STD = 0.5, 0.3
def optimal(d):
    """The best denoiser there is for data from N(MEAN, STD^2): x_0 and eps expected of a given x_t."""
    def denoise(x, t):
        ab = float(d.ab[t])
        x0 = MEAN + ab ** 0.5 * STD ** 2 / (ab * STD ** 2 + 1 - ab) * (x - ab ** 0.5 * MEAN)
        return x0, (x - ab ** 0.5 * x0) / (1 - ab) ** 0.5
    return denoise

@pytest.mark.parametrize("sampler, steps, noise", [("ddpm", 1000, "cosine"), ("ddpm", 1000, "linear"), ("ddpm", 250, "cosine"), ("ddim", 1000, "cosine"),
                                                    ("ddim", 1000, "linear"), ("ddim", 100, "cosine"), ("dpm", 25, "cosine"), ("dpm", 50, "linear")])
def test_samplers_recover_a_gaussian(sampler, steps, noise):
    """Any wrong coefficient: the samples then have another mean or spread than the data."""
    d, g = Diffusion(1000, noise, "eps"), torch.Generator().manual_seed(0)
    randn = lambda: torch.randn(20_000, generator=g, dtype=torch.float64)
    for x, x0 in SAMPLERS[sampler](optimal(d), d, randn(), d.times(steps), randn):
        pass
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01) and x.std().item() == pytest.approx(STD, rel=0.03)

def test_ddim_with_eta_1_is_ddpm():
    """A wrong sigma, or the direction to x_t not shortened by it: other samples than DDPM's from the same noise (Song et al. 2021, section 4.1)."""
    d = Diffusion(1000, "cosine", "eps")
    def ends(sampler):
        g = torch.Generator().manual_seed(0)
        randn = lambda: torch.randn(99, generator=g, dtype=torch.float64)
        return [x for x, _ in sampler(optimal(d), d, randn(), d.times(20), randn)][-1]
    half = ends(functools.partial(ddim, eta=0.5))
    assert torch.allclose(ends(functools.partial(ddim, eta=1.0)), ends(ddpm), atol=1e-9)
    assert all((half - ends(other)).abs().max() > 0.01 for other in (ddim, ddpm))

def test_dpm_is_of_second_order():
    """A correction with the wrong ratio of steps, or that overshoots at the long last step in log-SNR: no better than DDIM."""
    d = Diffusion(1000, "cosine", "eps")
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    ab = float(d.ab[-1])
    exact = MEAN + STD * (x - ab ** 0.5 * MEAN) / (ab * STD ** 2 + 1 - ab) ** 0.5  # the probability flow of a Gaussian
    error = {name: (list(SAMPLERS[name](optimal(d), d, x, d.times(25)))[-1][0] - exact).abs().max() for name in ("ddim", "dpm")}
    assert error["dpm"] < error["ddim"] / 3

# ---- the U-Net ----

def test_gradient_reaches_every_parameter():
    """A layer that is built and never called."""
    unet, t, label = net().train(), torch.tensor([3, 40]), torch.tensor([0, 3])
    unet(torch.randn(2, 3, 4, 8, 8), t, label).square().mean().backward()
    assert not [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert unet.label.weight.grad.any(1).tolist() == [True, False, False, True]

def test_videos_of_a_batch_do_not_mix():
    """Frames folded into the batch and given the time step, the label or the neighbours of another video."""
    unet = net()
    x, t, label = torch.randn(3, 3, 4, 8, 8), torch.tensor([0, 30, 99]), torch.tensor([2, 0, 3])
    alone = torch.cat([unet(x[i:i + 1], t[i:i + 1], label[i:i + 1]) for i in range(3)])
    assert torch.allclose(unet(x, t, label), alone, atol=1e-4)
    change = lambda **k: (unet(**{**dict(x=x, t=t, label=label), **k}) - alone).abs().amax((1, 2, 3, 4)) > 1e-3
    assert change(t=torch.tensor([0, 31, 99])).tolist() == [False, True, False]
    assert change(label=torch.tensor([2, 0, 1])).tolist() == [False, False, True]

def test_time_attention_sees_the_order_of_the_frames():
    """Positions forgotten: a video and its frames in any order would be the same to the network."""
    unet, order = net(), [2, 0, 3, 1]
    x, t = torch.randn(1, 3, 4, 8, 8), torch.tensor([20])
    assert (unet(x[:, :, order], t) - unet(x, t)[:, :, order]).abs().max() > 1e-2
    torch.manual_seed(0)
    time, space, everywhere = (Attention(16, 8, over, 2) for over in ("time", "space", "both"))
    for attention in (time, space, everywhere):
        torch.nn.init.normal_(attention.proj.weight)
        attention.norm = torch.nn.Identity()                                       # which ties the pixels of a frame together
    h = torch.randn(4, 16, 2, 2)                                                   # 4 frames of one video
    late = h.clone()
    late[3, :, 0, 0] += torch.randn(16)                                            # a change at one place of the last frame
    touched = lambda f: (f(late, 4) - f(h, 4)).abs().amax(1) > 1e-4                 # (T, H, W)
    assert touched(everywhere).all() and touched(time)[:, 0, 0].all() and touched(time).sum() == 4
    assert touched(space)[3].all() and touched(space).sum() == 4
    kinds = [[a.over for a in layer.attention] for layer in (*unet.down, *unet.middle) if isinstance(layer, diffusion.Layer)]
    large = net(attention=15)                                                      # 4 x 4 x 4 = 64 positions: over 15 ...
    assert kinds == [["time"], ["both"], ["both"], ["both"]] and [a.over for a in large.middle[0].attention] == ["space", "time"]

def test_time_attention_knows_relative_positions_only():
    """Positions that tie a video to the frame numbers it was trained at, or that do not tell before from after."""
    torch.manual_seed(0)
    attention, C, T = Attention(16, 8, "time", 1), 16, 12
    for p in attention.parameters():
        p.data.normal_()
    attention.norm = torch.nn.Identity()                                           # all frames ask and answer alike ...
    attention.qkv.weight.data = torch.cat([torch.zeros(2 * C, C), torch.eye(C)])
    attention.qkv.bias.data[2 * C:], attention.proj.bias.data = 0, torch.zeros(C)
    attention.proj.weight.data = torch.eye(C)                                      # ... and what they say is handed through
    flash = torch.eye(T)[:, :, None, None, None].expand(T, T, C, 1, 1)             # video j is a flash at frame j
    weight = torch.stack([(attention(x, T) - x)[:, :, 0, 0] for x in flash], 1).log()   # (T, T, C): of frame j in frame i
    relative = weight - weight.diagonal().T[:, None]
    assert torch.allclose(relative[:-1, :-1], relative[1:, 1:], atol=1e-3)
    assert (relative[0, 1:] - relative[1:, 0]).abs().min() > 1e-4 and relative[0].std(0).min() > 0.1

def test_any_number_of_frames():
    """A network that is tied to the length that it was trained at; a grid that does not halve."""
    for T in (1, 7, 40):
        assert net()(torch.randn(1, 3, T, 8, 8), torch.tensor([5])).shape == (1, 3, T, 8, 8)
    with pytest.raises(diffusion.UserError, match="--mults"):
        net(mults=(1, 1, 1, 1, 1))

# ---- guidance ----

def test_guidance():
    """Scales 0 and 1 exchanged, guidance on a part of the channels, a null label that is a number written somewhere."""
    unet = net(classes=3)
    x, t, label = torch.randn(2, 3, 4, 8, 8), torch.tensor([30, 30]), torch.tensor([0, 2])
    yes, no = unet(x, t, label), unet(x, t, torch.tensor([3, 3]))
    assert len(unet.label.weight) == 4 and torch.equal(unet(x, t), no) and (yes - no).abs().amax((0, 2, 3, 4)).min() > 1e-3
    for scale, expected in ((1, yes), (0, no), (2.5, no + 2.5 * (yes - no))):
        assert torch.allclose(guided(unet, label, scale)(x, t), expected, atol=1e-4)
    assert torch.allclose(guided(unet, None, 3)(x, t), no, atol=1e-5)
    assert net(classes=0).label is None and guided(net(classes=0), None, 3)(x, t).shape == x.shape

@pytest.mark.parametrize("drop, trained", [(0.5, True), (0, False)])
def test_null_label_is_trained_by_label_dropping(stage1, stage2, main, monkeypatch, drop, trained):
    """Guidance away from an embedding that no step of the training ever saw."""
    first = []
    class Spy(System):
        def __init__(self, *a):
            super().__init__(*a)
            first.append(self.unet.label.weight.detach().clone())
    monkeypatch.setattr(diffusion, "System", Spy)
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--label_drop", drop, "--steps", 4)
    assert result.code == 0, result.err
    row = load("run/diffusion.pt")["model"]["label.weight"]
    assert len(row) == 3 and not torch.equal(row[:2], first[0][:2])                # two classes and the null label
    assert torch.equal(row[2], first[0][2]) == (not trained)

# ---- the system ----

def test_a_sample_depends_on_its_seed_alone():
    """Noise drawn for the batch: another batch size, other videos."""
    torch.manual_seed(0)
    system = System(Config(width=16, mults=(1,), blocks=1, head_dim=8, attention=256, timesteps=20), None, (4, 8, 1), ["a", "b"], torch.device("cpu"))
    system.unet = net(classes=2).eval()
    for sampler in SAMPLERS:
        draw = lambda seeds, labels: system.sample(seeds, torch.tensor(labels), 2.0, sampler, 10)
        three, one = draw([5, 6, 7], [0, 1, 1]), draw([6], [1])
        assert torch.allclose(three[1:2], one, atol=1e-4) and (three[1] - three[2]).abs().max() > 0.1
        assert (draw([6], [0]) - one).abs().max() > 1e-3
    for steps in (0, 21):
        with pytest.raises(diffusion.UserError, match="--steps"):
            system.sample([0], None, 1.0, "dpm", steps)

def test_a_block_sees_the_neighbouring_frames_of_its_own_clip():
    """Frames and clips confused when they are folded into one axis; time mixed only after the label has had its say."""
    torch.manual_seed(0)
    block = diffusion.ResBlock(4, 4, 8, 0.0)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2 * 5, 4, 3, 3), torch.randn(2 * 5, 8)                        # two clips of five frames
    other = x.clone()
    other[6] = torch.randn(4, 3, 3)                                                # frame 1 of the second clip
    moved = (block(x, emb, 5) - block(other, emb, 5)).abs().amax((1, 2, 3)) > 1e-6
    assert moved.tolist() == [False] * 5 + [True, True, True, False, False]

def test_every_frame_has_its_own_noise_level():
    """Given frames announced as noise; a level that reaches another frame or another clip."""
    unet, x = net(), torch.randn(2, 3, 4, 8, 8)
    t, label = torch.tensor([40, 7]), torch.tensor([0, 2])
    assert torch.allclose(unet(x, t, label), unet(x, t[:, None].expand(2, 4), label), atol=1e-5)
    times = t[:, None].repeat(1, 4)
    times[1, 0] = 0
    change = (unet(x, times, label) - unet(x, t, label)).abs().amax((1, 3, 4))       # (B, T)
    assert change[0].max() < 1e-5 and change[1, 0] > 1e-3

def test_attention_notices_new_weights_and_other_lengths():
    """A table of biases kept from older weights, from another number of frames, or kept while its gradient is wanted."""
    torch.manual_seed(0)
    attention = diffusion.Attention(16, 8, "both", 4)
    torch.nn.init.normal_(attention.proj.weight)
    x = torch.randn(6, 16, 4, 4)
    with torch.no_grad():
        before = attention(x, 6)
        assert torch.equal(attention(x, 6), before) and not torch.allclose(attention(x, 3), before, atol=1e-3)
        torch._foreach_lerp_(list(attention.parameters())[:1], [torch.randn_like(attention.bias)], 0.9)      # as the averaged weights move
        assert list(attention.parameters())[0] is attention.bias
        after = attention(x, 6)
    assert not torch.allclose(after, before, atol=1e-3)
    again = attention(x, 6)
    again.sum().backward()
    assert torch.allclose(again, after, atol=1e-5) and attention.bias.grad.abs().sum() > 0

def test_given_frames_stay_and_windows_follow_from_them(monkeypatch):
    """Context that is noised, changed or forgotten; windows that continue another sample's, or none; a wrong length."""
    torch.manual_seed(0)
    system = System(Config(width=16, mults=(1,), blocks=1, head_dim=8, attention=256, timesteps=20), None, (4, 8, 1), ["a", "b"], torch.device("cpu"))
    system.unet = net(classes=2).eval()
    seen, forward = [], system.unet.forward
    monkeypatch.setattr(system.unet, "forward", lambda x, t, label=None: seen.append((x.clone(), t)) or forward(x, t, label))
    labels = torch.tensor([0, 1, 1])
    context = lambda: torch.autocast("cpu", enabled=False)
    draw = lambda seeds, labels, guidance, length: sample.sample_long(system, seeds, labels, guidance, "dpm", 4, context, length=length)
    long = draw([5, 6, 7], labels, 1.0, 7)                                         # windows of 4, 4 + 2, 4 + 4 frames
    assert long.shape == (3, 3, 7, 8, 8) and len(seen) == 3 * 4
    assert torch.allclose(long[:, :, :4], system.sample([5, 6, 7], labels, 1.0, "dpm", 4), atol=1e-4)
    assert all((t == t[0, 0]).all() for x, t in seen[:4])
    for x, t in seen[4:8]:                                                         # the second window: two frames are given
        assert torch.equal(x[:, :, :2], long[:, :, 2:4]) and (t[:, :2] == 0).all() and (t[:, 2:] == t[0, 3]).all()
    seen.clear()
    draw([5], labels[:1], 3.0, 7)                                                  # guidance, two rows a sample, in the first window only
    assert [len(x) for x, t in seen] == [2] * 4 + [1] * 8
    assert torch.allclose(long[1:2], draw([6], labels[1:2], 1.0, 7), atol=1e-3)
    start = torch.randn(1, 3, 1, 8, 8)
    given = [system.sample([6], labels[1:2], 1.0, sampler, 4, given=start) for sampler in SAMPLERS]
    assert all(g.shape == (1, 3, 4, 8, 8) and torch.equal(g[:, :, :1], start) for g in given)
    seen.clear()
    more = sample.sample_long(system, [6], labels[1:2], 3.0, "dpm", 4, context, context=start, length=5)   # windows of 1 + 3, then 2 + 2 frames
    assert more.shape == (1, 3, 5, 8, 8) and torch.equal(more[:, :, :4], system.sample([6], labels[1:2], 1.0, "dpm", 4, given=start))
    assert [(len(x), (t[0] == 0).sum()) for x, t in seen[:8]] == [(1, 1)] * 3 + [(1, 4)] + [(1, 2)] * 3 + [(1, 4)]

def test_a_window_continues_what_the_encoder_makes_of_the_decoded_video(stage2, monkeypatch):
    """Generated latents given as they are; the wrong frames; latents that are not normalised, or of an encoder that saw the end."""
    system, seen = load_diffusion(stage2.path), []
    vqgan, (_, T, _, _), slot = system.vqgan, system.shape, system.vqgan.config.down[0]
    forward = system.unet.forward
    monkeypatch.setattr(system.unet, "forward", lambda x, t, label=None: seen.append(x.clone()) or forward(x, t, label))
    K = T // 2
    context = lambda: torch.autocast("cpu", enabled=False)
    z = sample.sample_long(system, [3, 4], torch.tensor([0, 0]) if system.classes else None, 1.0, "dpm", 2, context, length=T + 1)
    pixels = vqgan.decode(vqgan.quantize(z[:, :, :T] * system.std + system.mean)[0]).clamp(-1, 1)
    there_and_back = [*range((T - K) * slot, T * slot), *reversed(range((T - K) * slot, T * slot))]
    given = (vqgan.encode(pixels[:, :, there_and_back])[:, :, :K] - system.mean) / system.std
    assert len(seen) == 4 and K > 0
    for x in seen[2:]:
        assert torch.allclose(x[:, :, :K], given, atol=1e-4) and not torch.allclose(x[:, :, :K], z[:, :, T - K:T], atol=1e-2)

def test_nothing_is_learnt_of_given_frames(stage1, stage2, main, monkeypatch):
    """A loss on frames that the network was shown: it is nearly zero, and drowns the rest."""
    seen, forward = [], UNet.forward
    def spy(self, x, t, label=None):
        out = forward(self, x, t, label)
        if self.training:
            out.retain_grad()
            seen.append((x, t, out))
        return out
    monkeypatch.setattr(UNet, "forward", spy)
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--context", 1, "--steps", 6)
    assert result.code == 0, result.err
    given = torch.cat([t == 0 for x, t, out in seen])                                  # (N, T)
    learnt = torch.cat([out.grad.abs().amax((1, 3, 4)) > 0 for x, t, out in seen])
    chance = given.all(1)                                                          # a drawn time of 0: given or not cannot be told
    assert 0.1 < given[~chance].float().mean() < 0.9 and torch.equal(learnt[~chance], ~given[~chance])

def test_latents_belong_to_their_labels_and_are_made_once(stage1, clips, tmp_path):
    """Latents in another order than their labels; a few videos encoded many times; latents of an older stage 1 kept."""
    videos = Videos(clips, stage1.home, "train", 16, 8)
    vqgan = build_vqgan(load(stage1.path))
    system = System(Config(width=16, mults=(1,), head_dim=8), vqgan, (8, 16, 1), videos.classes, torch.device("cpu"))
    context = lambda: torch.autocast("cpu", enabled=False)
    path = tmp_path / "latents.npy"
    latents, labels = diffusion.encode_once(system, videos, 22, path, "key", context)
    windows = [(i, start) for i in range(len(videos)) for start in range(5)]
    with torch.no_grad():
        known = system.encode(torch.from_numpy(np.stack([videos.window(*w)[0] for w in windows]))).flatten(1)
    distance = torch.cdist(torch.from_numpy(np.array(latents)).float().flatten(1), known)
    found = [windows[j][0] for j in distance.argmin(1)]
    assert distance.min(1)[0].max() < 0.05 and [videos.window(i)[1] for i in found] == labels.tolist()
    assert sorted(found) == sorted(2 * list(range(len(videos))))
    stamp = path.stat().st_mtime_ns
    diffusion.encode_once(system, videos, 22, path, "key", context)
    assert path.stat().st_mtime_ns == stamp
    diffusion.encode_once(system, videos, 22, path, "another stage 1", context)
    assert path.stat().st_mtime_ns != stamp

def test_checkpoint_holds_the_statistics_of_the_latents(stage2):
    """Latents of deviation 0.2 given to a network that is told they have 1; statistics that decoding does not undo."""
    state, z = load(stage2.path), np.load(stage2.home / "run" / "latents.npy").astype(np.float32)
    mean, std, bound = state["statistics"]
    true_mean, true_std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    assert (abs(mean.numpy() - true_mean) < 0.1 * true_std).all() and np.allclose(std.numpy(), true_std, rtol=0.08)
    assert bound == pytest.approx(abs((torch.from_numpy(z) - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)).max().item(), rel=1e-3)
    system = load_diffusion(stage2.path)
    video = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        z = system.encode(video)
        assert torch.allclose(system.decode((z - system.mean) / system.std), system.vqgan(video.movedim(-1, 1).float() / 127.5 - 1)[0], atol=1e-3)

def test_stage_1_stays_frozen_and_the_average_is_what_samples(stage1, stage2):
    """Stage 1 in the optimiser or the average; raw weights loaded for sampling; an average that never moves."""
    state, first = load(stage2.path), load(stage1.path)
    same(state["vqgan"]["model"], first["model"])
    assert state["vqgan"]["step"] == 60 and state["classes"] == ["spin", "wave"] and tuple(state["clip"]) == (8, 16, 1)
    held = sum(len(g["params"]) for opt in state["opts"] for g in opt["param_groups"])
    assert held == len(state["model"]) == len(state["ema"])
    assert all(not torch.equal(state["model"][k], state["ema"][k]) for k in state["model"])
    system = load_diffusion(stage2.path)
    same(dict(system.unet.state_dict()), dict(state["ema"]))
    assert system.step == 24 and not system.unet.training and not system.vqgan.training
    assert not any(p.requires_grad for m in (system.unet, system.vqgan) for p in m.parameters())

def test_average_follows_the_formula(stage1, stage2, main, monkeypatch):
    """The decay on the wrong side: an average that forgets all but the newest weights."""
    history, step = [], diffusion.Diffusion.add_noise
    nets = []
    class Spy(System):
        def __init__(self, *a):
            super().__init__(*a)
            nets.append(self.unet)
    def record(self, x0, eps, t):                                                  # once a step, before the update
        if nets[0].training and len(x0) == 8:
            history.append(nets[0].out[-1].weight.detach().clone())
        return step(self, x0, eps, t)
    monkeypatch.setattr(diffusion, "System", Spy)
    monkeypatch.setattr(diffusion.Diffusion, "add_noise", record)
    assert main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--steps", 5, "--eval_every", 5).code == 0
    state = load("run/diffusion.pt")
    assert len(history) == 5
    average = history[0]
    for n, new in enumerate([*history[1:], state["model"]["out.2.weight"]]):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * new
    assert torch.allclose(average, state["ema"]["out.2.weight"], atol=1e-6)

# ---- resuming, and refusals ----

def test_resume_is_exact_to_the_bit(stage1, stage2, main, stop_at):
    """The average, an optimiser, the statistics or a random draw that a resumed run lacks; a run that takes what it inherited
    from stage 1 for another configuration and refuses to go on."""
    Path("run").mkdir()
    shutil.copy(stage1.path, "run/vqgan.pt")
    stop_at(diffusion, 15)
    result = main(diffusion, *stage2.flags, "--out", "run")
    assert result.code == 1 and "stopped after step 16 and saved run/diffusion.pt" in result.err
    assert load("run/diffusion.pt")["step"] == 16
    result = main(diffusion, *stage2.flags, "--out", "run")
    assert result.code == 0 and "resuming run/diffusion.pt at step 16" in result.out, result.err
    same(load(stage2.path), load("run/diffusion.pt"))

def test_a_network_that_is_no_number_never_replaces_a_checkpoint(stage1, stage2, main):
    """A run that diverges between two looks at its loss, saves what is left of it at the next evaluation, and says "done"."""
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--lr", 1e30, "--steps", 5, "--eval_every", 5)
    assert result.code == 1 and "not finite" in result.err and not Path("run/diffusion.pt").exists()

def test_refusals(stage1, stage2, main):
    """A missing stage 1, a wrong kind of checkpoint, another configuration, a grid that does not fit: tracebacks."""
    assert "python vqgan3d.py" in main(diffusion, *stage2.flags, "--out", "nowhere").err
    assert "does not fit stage 1" in main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage2.path).err
    assert "--mults" in main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--mults", "1,1,1,1").err
    assert "--noise sine" in main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--noise", "sine").err
    Path("run").mkdir(exist_ok=True)
    shutil.copy(stage2.path, "run/diffusion.pt")
    result = main(diffusion, *stage2.flags, "--out", "run", "--width", 32)
    assert result.code == 1 and "--width 16 (now 32)" in result.err and "--fresh" in result.err
    Path("cut.pt").write_bytes(stage2.path.read_bytes()[:5000])
    for path, words in (("cut.pt", "not a usable checkpoint"), (stage1.path, "does not fit stage 2")):
        with pytest.raises(diffusion.UserError, match=words):
            load_diffusion(path)

@pytest.mark.parametrize("flags", [["--pixels", "--size", "8", "--frames", "4"], ["--latents", "0", "--predict", "v", "--noise", "linear"]])
def test_pixels_and_fresh_windows(stage1, stage2, main, flags):
    """--pixels that needs a stage 1 after all, or whose run cannot go on; --latents 0 that trains on something else."""
    stage = [] if "--pixels" in flags else ["--vqgan", stage1.path]
    command = [*stage2.flags, "--out", "run", "--steps", "2", "--eval_every", "2", *stage, *flags]
    result = main(diffusion, *command)
    assert result.code == 0 and Path("run/diffusion.gif").exists() and not Path("run/latents.npy").exists(), result.err
    assert main(diffusion, *command).code == 0                                     # nothing left to do
    losses = [r for r in map(json.loads, Path("run/diffusion.jsonl").read_text().splitlines())]
    assert all(0.5 < r["held_out_loss"] < 2 for r in losses if "held_out_loss" in r) and any("loss" in r for r in losses)
    system = load_diffusion("run/diffusion.pt")
    assert system.shape == ((3, 4, 8, 8) if stage == [] else (6, 4, 4, 4)) and (system.vqgan is None) == (stage == [])
    assert system.sample([0], torch.tensor([1]), 2.0, "dpm", 3).shape == (1, *system.shape)
