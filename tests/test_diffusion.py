"""Stage 2: formulas against independent ones, the U-Net, guidance, sampling, what is trained and
what is not, resuming. Each test names the bug that it catches."""
import functools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import diffusion
import evaluate
import sample
import vqgan3d
from conftest import load, read_log, same
from data import Videos
from diffusion import (SAMPLERS, Attention, Config, Diffusion, LatentDiffusion, UNet,
                       classifier_free_guidance, ddim, ddpm, load_diffusion, noise_stream)
from vqgan3d import load_vqgan

CPU = torch.device("cpu")

def float32():
    return torch.autocast("cpu", enabled=False)

def make_unet(classes=3, **changes):
    """A small U-Net whose parameters are all random, those too that start at zero."""
    torch.manual_seed(0)
    values = dict(width=16, mults=(1, 2), blocks=1, head_dim=8, full_attention_tokens=64)
    unet = UNet(Config(**values | changes), 3, 4, 8, classes)
    for p in unet.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return unet.eval()

def make_model(classes=("a", "b")):
    """A LatentDiffusion of pixels, with that U-Net: clips of 4 frames of 8 x 8, 20 timesteps."""
    config = Config(width=16, mults=(1, 2), blocks=1, head_dim=8, full_attention_tokens=64,
                    timesteps=20)
    model = LatentDiffusion(config, None, (8, 4, 1, 0), classes, CPU)
    model.unet = make_unet(len(classes))
    model.bound = 3.0
    return model

def record_inputs(unet, monkeypatch):
    """A list of the (x, t) of all calls of a U-Net from now on."""
    inputs, forward = [], unet.forward
    def forward_and_record(x, t, label=None):
        inputs.append((x.clone(), t.clone()))
        return forward(x, t, label)
    monkeypatch.setattr(unet, "forward", forward_and_record)
    return inputs

# --------------------------------------------------------------------------------------------------
# the diffusion

@pytest.mark.parametrize("T", [50, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_go_from_clean_to_noise(schedule, T):
    """Times reversed, or noise that never becomes noise."""
    alpha_bar = Diffusion(T, schedule, "v").alpha_bar
    assert (alpha_bar.diff() < 0).all()
    assert 0.99 < alpha_bar[0] < 1
    assert 0 < alpha_bar[-1] < 1e-3

def test_schedules_are_those_of_the_papers():
    """A linear schedule other than DDPM's, an offset forgotten in the cosine."""
    beta = np.linspace(1e-4, 0.02, 1000)
    linear = Diffusion(1000, "linear", "v").alpha_bar
    assert np.allclose(linear, np.cumprod(1 - beta), rtol=1e-12)
    cosine = Diffusion(1000, "cosine", "v").alpha_bar
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert np.allclose(cosine[:990], f[1:991] / f[0], rtol=1e-9)
    for wrong in (("sine", "eps"), ("linear", "x0")):
        with pytest.raises(diffusion.UserError, match="must be"):
            Diffusion(10, *wrong)

def test_noise_shift_multiplies_the_ratio_of_noise_to_signal():
    """Multiplied by its root or its square, or in the networks' copy only."""
    plain = Diffusion(1000, "cosine", "v")
    shifted = Diffusion(1000, "cosine", "v", 4.0)
    ratio = torch.sqrt(1 / plain.alpha_bar - 1)
    assert torch.allclose(torch.sqrt(1 / shifted.alpha_bar - 1), 4 * ratio, rtol=1e-9)
    expected = 4 * plain.sigma[:900] / plain.alpha[:900]
    assert torch.allclose(shifted.sigma[:900] / shifted.alpha[:900], expected, rtol=1e-4)

def test_sampling_times_descend_to_0():
    """A sampler that begins too early, ends too late or stands still at a time that comes twice."""
    d = Diffusion(1000, "cosine", "v")
    assert d.sampling_times(1000) == [*range(999, -1, -1)]
    assert d.sampling_times(4) == [999, 666, 333, 0]
    d = Diffusion(1000, "cosine", "eps")
    times = d.sampling_times(1000)
    first = times[0]
    assert times == [*range(first, -1, -1)]
    assert d.alpha_bar[first] ** 0.5 >= 0.03 > d.alpha_bar[first + 1] ** 0.5

@pytest.mark.parametrize("predict", ["eps", "v"])
def test_noise_is_added_and_taken_away(predict):
    """v = alpha eps - sigma x_0 with a sign or a factor exchanged; a clipped x_0 whose eps no
    longer explains x_t."""
    torch.manual_seed(0)
    d = Diffusion(100, "cosine", predict)
    x0, eps = torch.randn(6, 3, 2, 4, 4).clamp(-2, 2), torch.randn(6, 3, 2, 4, 4)
    t = torch.tensor([0, 1, 20, 50, 80, 97])
    alpha = d.alpha_bar[t].sqrt().float().view(-1, 1, 1, 1, 1)
    sigma = (1 - d.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1, 1)
    x_t, target = d.add_noise(x0, eps, t)
    assert torch.allclose(x_t, alpha * x0 + sigma * eps)
    assert torch.allclose(target, eps if predict == "eps" else alpha * eps - sigma * x0)
    found_x0, found_eps = d.predict_x0_eps(x_t, target, t, bound=2)
    assert torch.allclose(found_x0, x0, atol=1e-3)
    assert torch.allclose(found_eps, eps, atol=2e-3)
    clipped, rest = d.predict_x0_eps(x_t, target, t, bound=0.5)
    assert clipped.abs().max() <= 0.5
    assert torch.allclose(alpha * clipped + sigma * rest, x_t, atol=1e-5)

@pytest.mark.parametrize("predict", ["eps", "v"])
def test_loss_against_a_second_formula(predict):
    """Given frames that are noised, announced as noise or counted; a mean over all frames instead
    of those that are not given; another time or label for a clip than its own."""
    torch.manual_seed(0)
    unet, d = make_unet(), Diffusion(100, "cosine", predict)
    x0, eps = torch.randn(3, 3, 4, 8, 8), torch.randn(3, 3, 4, 8, 8)
    t, labels = torch.tensor([5, 60, 90]), torch.tensor([0, 3, 2])
    num_cond = torch.tensor([0, 3, 1])
    with torch.no_grad():
        losses = diffusion.denoising_loss(unet, d, x0, t, eps, labels, num_cond)
        expected = []
        for i in range(3):
            K = num_cond[i]
            alpha, sigma = d.alpha_bar[t[i]].item() ** 0.5, (1 - d.alpha_bar[t[i]].item()) ** 0.5
            x_t = alpha * x0[i:i + 1] + sigma * eps[i:i + 1]
            x_t[:, :, :K] = x0[i, :, :K]
            times = t[i].repeat(1, 4)
            times[:, :K] = 0
            target = eps[i] if predict == "eps" else alpha * eps[i] - sigma * x0[i]
            error = unet(x_t, times, labels[i:i + 1])[0] - target                # (C, T, H, W)
            expected.append(error[:, K:].square().mean())
    assert torch.allclose(losses, torch.stack(expected), rtol=1e-4)

# --------------------------------------------------------------------------------------------------
# the samplers

def test_ddpm_step_is_the_posterior_of_ddpm_eq_7():
    """A posterior with alpha and alpha-bar confused, or shifted by one step."""
    T = 1000
    d = Diffusion(T, "linear", "v")
    beta = np.linspace(1e-4, 0.02, T)
    alpha_bar = np.cumprod(1 - beta)
    x, x0 = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    def denoise(x, t):
        return x0, None
    def zeros():
        return torch.zeros(5)
    def ones():
        return torch.ones(5)
    for t in (999, 500, 7, 1):
        mean, _ = next(ddpm(denoise, d, x, [t, t - 1], zeros))
        noisy, _ = next(ddpm(denoise, d, x, [t, t - 1], ones))
        last = alpha_bar[t - 1]
        expected = last ** 0.5 * beta[t] * x0 + (1 - beta[t]) ** 0.5 * (1 - last) * x
        variance = (1 - last) / (1 - alpha_bar[t]) * beta[t]
        assert torch.allclose(mean, expected / (1 - alpha_bar[t]), rtol=1e-9)
        assert ((noisy - mean) ** 2).mean().item() == pytest.approx(variance, rel=1e-6)
    end, _ = next(ddpm(denoise, d, x, [0], None))                     # no noise is added at the end
    assert torch.allclose(end, x0)

MEAN, STD = 0.5, 0.3

def optimal_denoiser(d, mean=MEAN, std=STD):
    """The best denoiser of data from N(mean, std^2): x_0 and eps expected of a given x_t."""
    def denoise(x, t):
        alpha, variance = float(d.alpha_bar[t]) ** 0.5, 1 - float(d.alpha_bar[t])
        gain = alpha * std ** 2 / (alpha ** 2 * std ** 2 + variance)
        x0 = mean + gain * (x - alpha * mean)
        return x0, (x - alpha * x0) / variance ** 0.5
    return denoise

def draw_samples(sampler, denoise, d, steps, n=20_000):
    """n samples of one number, from noise that is always the same."""
    stream = torch.Generator().manual_seed(0)
    def randn():
        return torch.randn(n, generator=stream, dtype=torch.float64)
    for x, _ in sampler(denoise, d, randn(), d.sampling_times(steps), randn):
        pass
    return x

@pytest.mark.parametrize("sampler, steps, schedule", [
    ("ddpm", 1000, "cosine"), ("ddpm", 1000, "linear"), ("ddpm", 250, "cosine"),
    ("ddim", 1000, "cosine"), ("ddim", 1000, "linear"), ("ddim", 100, "cosine"),
    ("dpm", 25, "cosine"), ("dpm", 50, "linear")])
def test_samplers_recover_a_gaussian(sampler, steps, schedule):
    """Any wrong coefficient: the samples have another mean or spread than the data."""
    d = Diffusion(1000, schedule, "v")
    x = draw_samples(SAMPLERS[sampler], optimal_denoiser(d), d, steps)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.03)

@pytest.mark.parametrize("error", [0.001, -0.001])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_small_error_in_eps_stays_small(sampler, error):
    """Sampling that begins where x_0 is eps divided by nearly 0: begun at t = 999, an error of
    0.001 is one of 20 in x_0, and moves the mean by 0.2 even if x_0 is clipped."""
    d = Diffusion(1000, "cosine", "eps")
    exact = optimal_denoiser(d, mean=0.0, std=1.0)
    def denoise(x, t):
        _, eps = exact(x, t)
        return d.predict_x0_eps(x, eps + error, torch.tensor([t]), bound=3.0)
    x = draw_samples(SAMPLERS[sampler], denoise, d, 25)
    assert abs(x.mean()) < 0.05
    assert x.std().item() == pytest.approx(1, abs=0.1)

def test_ddim_with_eta_1_is_ddpm():
    """A wrong sigma, or the direction to x_t not shortened by it: other samples than DDPM's from
    the same noise (Song et al. 2021, section 4.1)."""
    d = Diffusion(1000, "cosine", "v")
    denoise = optimal_denoiser(d)
    def end(sampler):
        return draw_samples(sampler, denoise, d, 20, n=99)
    assert torch.allclose(end(functools.partial(ddim, eta=1.0)), end(ddpm), atol=1e-9)
    half = end(functools.partial(ddim, eta=0.5))
    assert (half - end(ddim)).abs().max() > 0.01
    assert (half - end(ddpm)).abs().max() > 0.01

def test_dpm_is_of_second_order():
    """A correction with the wrong ratio of steps, or that overshoots at the long last step in
    log-SNR: no better than DDIM."""
    d = Diffusion(1000, "cosine", "v")
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha_bar = float(d.alpha_bar[-1])
    std_T = (alpha_bar * STD ** 2 + 1 - alpha_bar) ** 0.5
    exact = MEAN + STD * (x - alpha_bar ** 0.5 * MEAN) / std_T        # the flow of a Gaussian
    error = {}
    for name in ("ddim", "dpm"):
        *_, (end, _) = SAMPLERS[name](optimal_denoiser(d), d, x, d.sampling_times(25))
        error[name] = (end - exact).abs().max()
    assert error["dpm"] < error["ddim"] / 3

# --------------------------------------------------------------------------------------------------
# the U-Net

def test_gradient_reaches_every_parameter():
    """A layer that is built and never called."""
    unet = make_unet().train()
    t, label = torch.tensor([3, 40]), torch.tensor([0, 3])
    unet(torch.randn(2, 3, 4, 8, 8), t, label).square().mean().backward()
    unused = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused
    assert unet.label.weight.grad.any(1).tolist() == [True, False, False, True]

def test_videos_of_a_batch_do_not_mix():
    """Frames folded into the batch and given the time, the label or the neighbours of another
    video."""
    unet = make_unet()
    x, t, label = torch.randn(3, 3, 4, 8, 8), torch.tensor([0, 30, 99]), torch.tensor([2, 0, 3])
    alone = torch.cat([unet(x[i:i + 1], t[i:i + 1], label[i:i + 1]) for i in range(3)])
    assert torch.allclose(unet(x, t, label), alone, atol=1e-4)
    def changed(t, label):
        difference = unet(x, t, label) - alone
        return (difference.abs().amax((1, 2, 3, 4)) > 1e-3).tolist()
    assert changed(torch.tensor([0, 31, 99]), label) == [False, True, False]
    assert changed(t, torch.tensor([2, 0, 1])) == [False, False, True]

def test_a_block_sees_the_neighbouring_frames_of_its_own_clip():
    """Frames and clips confused when they are folded into one axis."""
    torch.manual_seed(0)
    block = diffusion.ResBlock(4, 4, 8, 0.0)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2 * 5, 4, 3, 3), torch.randn(2 * 5, 8)       # two clips of five frames
    other = x.clone()
    other[6] = torch.randn(4, 3, 3)                                   # frame 1 of the second clip
    changed = (block(x, emb, 5) - block(other, emb, 5)).abs().amax((1, 2, 3)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True, True, True, False, False]

def test_every_frame_has_its_own_noise_level():
    """Given frames announced as noise; a level that reaches another clip."""
    unet, x = make_unet(), torch.randn(2, 3, 4, 8, 8)
    t, label = torch.tensor([40, 7]), torch.tensor([0, 2])
    same_level = unet(x, t, label)
    times = t[:, None].repeat(1, 4)
    assert torch.allclose(same_level, unet(x, times, label), atol=1e-5)
    times[1, 0] = 0
    change = (unet(x, times, label) - same_level).abs().amax((1, 3, 4))                  # (B, T)
    assert change[0].max() < 1e-5
    assert change[1, 0] > 1e-3

def test_the_order_of_the_frames_counts():
    """Positions forgotten: a video and its frames in any order are the same to the network."""
    unet, order = make_unet(), [2, 0, 3, 1]
    x, t = torch.randn(1, 3, 4, 8, 8), torch.tensor([20])
    assert (unet(x[:, :, order], t) - unet(x, t)[:, :, order]).abs().max() > 1e-2

@pytest.mark.parametrize("axes", ["time", "space", "both"])
def test_attention_reaches_along_its_axes(axes):
    """Frames, rows and positions confused when they are folded into one axis."""
    torch.manual_seed(0)
    attention = Attention(16, 8, axes, 2)
    torch.nn.init.normal_(attention.proj.weight)
    attention.norm = torch.nn.Identity()                    # which mixes the positions of a frame
    x = torch.randn(4, 16, 2, 2)                                      # 4 frames of one video
    other = x.clone()
    other[3, :, 0, 0] += torch.randn(16)                              # one place of the last frame
    changed = (attention(other, 4) - attention(x, 4)).abs().amax(1) > 1e-4               # (T, H, W)
    expected = torch.zeros(4, 2, 2, dtype=torch.bool)
    if axes == "time":
        expected[:, 0, 0] = True
    elif axes == "space":
        expected[3] = True
    else:
        expected[:] = True
    assert torch.equal(changed, expected)

def test_attention_over_everything_where_there_are_few_positions():
    """Attention whose memory grows with the square of a large grid, or none over space at all."""
    def axes_of(unet):
        levels = [m for m in (*unet.down, *unet.middle) if isinstance(m, diffusion.UNetBlock)]
        return [[attention.axes for attention in level.attention] for level in levels]
    few, many = ["both"], ["space", "time"]                 # 4 x 8 x 8 = 256, 4 x 4 x 4 = 64
    assert axes_of(make_unet(full_attention_tokens=64)) == [["time"], few, few, few]
    assert axes_of(make_unet(full_attention_tokens=63)) == [["time"], ["time"], many, many]

def test_time_attention_knows_relative_positions_only():
    """Positions that tie a video to the frame numbers it was trained at, or that do not tell
    before from after."""
    torch.manual_seed(0)
    C, T = 16, 12
    attention = Attention(C, 8, "time", 1)
    for p in attention.parameters():
        p.data.normal_()
    attention.norm = torch.nn.Identity()                    # queries and keys are 0, values pass
    attention.qkv.weight.data = torch.cat([torch.zeros(2 * C, C), torch.eye(C)])
    attention.qkv.bias.data[2 * C:] = 0
    attention.proj.weight.data = torch.eye(C)
    attention.proj.bias.data.zero_()
    flash = torch.eye(T)[:, :, None, None, None].expand(T, T, C, 1, 1)    # video j: only frame j
    seen = [(attention(x, T) - x)[:, :, 0, 0] for x in flash]             # by frame i, of frame j
    weight = torch.stack(seen, 1).log()                                   # (T, T, C)
    relative = weight - weight.diagonal().T[:, None]
    assert torch.allclose(relative[:-1, :-1], relative[1:, 1:], atol=1e-3)
    assert (relative[0, 1:] - relative[1:, 0]).abs().min() > 1e-4
    assert relative[0].std(0).min() > 0.1

@pytest.mark.parametrize("T", [1, 7, 40])
def test_any_number_of_frames(T):
    """A network that is tied to the length that it was trained at."""
    x = torch.randn(1, 3, T, 8, 8)
    assert make_unet()(x, torch.tensor([5])).shape == x.shape

def test_a_grid_that_does_not_halve_is_refused():
    """A stack trace about the sizes of two tensors."""
    with pytest.raises(diffusion.UserError, match="--mults"):
        make_unet(mults=(1, 1, 1, 1, 1))

def test_biases_are_those_of_the_weights_and_the_length():
    """Biases gathered once for another number of frames, or kept after sampling: of older weights,
    and without a gradient."""
    torch.manual_seed(0)
    attention = Attention(16, 8, "both", 4)
    torch.nn.init.normal_(attention.proj.weight)
    x = torch.randn(6, 16, 4, 4)
    with torch.no_grad():
        six, three = attention(x, 6), attention(x, 3)
        for T, expected in (6, six), (3, three), (6, six):
            with diffusion.reuse_biases(attention, T):
                assert torch.equal(attention(x, T), expected)
    assert (six - three).abs().max() > 1e-3
    attention.bias.data.normal_()
    later = attention(x, 6)
    later.sum().backward()
    assert (later - six).abs().max() > 1e-3
    assert attention.bias.grad.abs().sum() > 0

# --------------------------------------------------------------------------------------------------
# guidance

def test_guidance():
    """Scales 0 and 1 exchanged, guidance on a part of the channels, a null label that is a number
    written somewhere."""
    unet = make_unet(classes=3)
    x, t, label = torch.randn(2, 3, 4, 8, 8), torch.tensor([30, 30]), torch.tensor([0, 2])
    conditional, null = unet(x, t, label), unet(x, t, torch.tensor([3, 3]))
    assert len(unet.label.weight) == 4
    assert torch.equal(unet(x, t), null)
    difference = conditional - null
    assert difference.abs().amax((0, 2, 3, 4)).min() > 1e-3
    for scale, expected in (1, conditional), (0, null), (2.5, null + 2.5 * difference):
        network = classifier_free_guidance(unet, label, scale)
        assert torch.allclose(network(x, t), expected, atol=1e-4)

def test_without_labels_guidance_does_nothing():
    """A set without classes, for which there is no null label."""
    unet = make_unet(classes=0)
    x, t = torch.randn(2, 3, 4, 8, 8), torch.tensor([30, 30])
    assert unet.label is None
    for label in (None, torch.tensor([0, 2])):
        assert torch.equal(classifier_free_guidance(unet, label, 3)(x, t), unet(x, t))

@pytest.mark.parametrize("label_drop, trained", [(0.5, True), (0, False)])
def test_null_label_is_trained_by_label_dropping(
        stage1, stage2, main, monkeypatch, label_drop, trained):
    """Guidance away from an embedding that no step of the training ever saw."""
    first = []
    class RecordedModel(LatentDiffusion):
        def __init__(self, *args):
            super().__init__(*args)
            first.append(self.unet.label.weight.detach().clone())
    monkeypatch.setattr(diffusion, "LatentDiffusion", RecordedModel)
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path,
                  "--label_drop", label_drop, "--steps", 4)
    assert result.code == 0, result.err
    rows = load("run/diffusion.pt")["model"]["label.weight"]          # two classes, the null label
    changed = (rows != first[0]).any(1).tolist()
    assert changed == [True, True, trained]

# --------------------------------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_its_seed_and_label_alone(sampler):
    """Noise drawn for the batch: another batch size, other videos."""
    model = make_model()
    def draw(seeds, labels):
        return model.sample(seeds, torch.tensor(labels), 2.0, sampler, 10)
    three, one = draw([5, 6, 7], [0, 1, 1]), draw([6], [1])
    assert torch.allclose(three[1:2], one, atol=1e-4)
    assert (three[1] - three[2]).abs().max() > 0.1
    assert (draw([6], [0]) - one).abs().max() > 1e-3

def test_pixels_of_the_toy_keep_its_size():
    """The preset of --pixels, made for Sky: a second toy set four times as large, in 16 parts."""
    cfg = data.parse_flags(Config, diffusion.PRESETS, ["--pixels"])
    assert (cfg.size, cfg.grad_accum_steps, cfg.width) == (32, 1, 48)
    cfg = data.parse_flags(Config, diffusion.PRESETS, ["--pixels", "--data", "sky"])
    assert (cfg.size, cfg.grad_accum_steps, cfg.noise_shift) == (64, 16, 1.0)

def test_an_unknown_label_is_the_null_label():
    """Label -1, of a held-out video whose class train lacks: an index error, or another class."""
    model = make_model()
    null = model.unet.num_classes
    unknown, expected = (model.sample([5], torch.tensor([label]), 2.0, "dpm", 10)
                         for label in (-1, null))
    assert torch.equal(unknown, expected)

def test_noise_of_a_sample_is_not_that_of_a_training_step():
    """A stream of noise with the seed of a training step: sample i begins from noise that training
    step i removed from its first clip."""
    for seed in (0, 1, 500):
        of_sample = torch.randn(16, generator=noise_stream(seed))
        of_step = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        assert (of_sample - of_step).abs().max() > 0.1

@pytest.mark.parametrize("steps", [0, 21])
def test_more_steps_than_trained_are_refused(steps):
    """A stack trace, or times that were never trained."""
    with pytest.raises(diffusion.UserError, match="--steps"):
        make_model().sample([0], None, 1.0, "dpm", steps)

def test_biases_are_gathered_once_a_sample(monkeypatch):
    """A cache that is never used, which nobody sees but in the time; one that outlives the sample
    and shows older weights."""
    gathered, relative_index = [], diffusion.relative_index
    def record(*args):
        gathered.append(args)
        return relative_index(*args)
    monkeypatch.setattr(diffusion, "relative_index", record)
    model = make_model()
    attentions = [m for m in model.unet.modules() if isinstance(m, Attention)]
    before = model.sample([0], None, 1.0, "ddim", 5)
    assert len(gathered) == len(attentions)
    for attention in attentions:
        attention.bias.data.normal_(std=3)
    assert (model.sample([0], None, 1.0, "ddim", 5) - before).abs().max() > 1e-3

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_frames_stay(sampler):
    """Given frames that are noised or changed."""
    start = torch.randn(1, 3, 1, 8, 8)
    x = make_model().sample([6], torch.tensor([1]), 1.0, sampler, 4, cond_frames=start)
    assert x.shape == (1, 3, 4, 8, 8)
    assert torch.equal(x[:, :, :1], start)

def test_windows_follow_from_given_frames(monkeypatch):
    """Windows that continue another sample's, or none; given frames announced as noise; guidance
    where the given frames show the class; a wrong length."""
    model = make_model()
    inputs = record_inputs(model.unet, monkeypatch)
    labels = torch.tensor([0, 1, 1])
    def draw(seeds, labels, guidance):
        return sample.sample_long(model, seeds, labels, guidance, "dpm", 4, float32, length=7)
    long = draw([5, 6, 7], labels, 1.0)                     # windows of 4, 2 + 2 and 2 + 2 frames
    assert long.shape == (3, 3, 7, 8, 8)
    assert len(inputs) == 3 * 4
    short = model.sample([5, 6, 7], labels, 1.0, "dpm", 4)
    assert torch.allclose(long[:, :, :4], short, atol=1e-4)
    for x, t in inputs[:4]:
        assert (t == t[0, 0]).all()
    for x, t in inputs[4:8]:
        assert torch.equal(x[:, :, :2], long[:, :, 2:4].clamp(-1, 1))         # as pixels are
        assert (t[:, :2] == 0).all()
        assert (t[:, 2:] == t[0, 3]).all()
    assert torch.allclose(long[1:2], draw([6], labels[1:2], 1.0), atol=1e-3)
    inputs.clear()
    draw([5], labels[:1], 3.0)                              # two rows a sample where it is guided
    assert [len(x) for x, t in inputs] == [2] * 4 + [1] * 8

def test_windows_follow_from_a_start(monkeypatch):
    """A start that does not count for the length, or of which only the newest frame is given."""
    model = make_model()
    start, label = torch.randn(1, 3, 1, 8, 8), torch.tensor([1])
    first = model.sample([6], label, 1.0, "dpm", 4, cond_frames=start)
    inputs = record_inputs(model.unet, monkeypatch)
    x = sample.sample_long(model, [6], label, 3.0, "dpm", 4, float32, length=5, start=start)
    assert x.shape == (1, 3, 5, 8, 8)
    assert torch.equal(x[:, :, :4], first)
    clean_frames = [(t[0] == 0).sum().item() for _, t in inputs]      # at last all times are 0
    assert clean_frames == [1, 1, 1, 4, 2, 2, 2, 4]
    assert all(len(x) == 1 for x, _ in inputs)

@pytest.mark.parametrize("given", [0, 1, 2, 4])
def test_windows_are_counted_right(monkeypatch, given):
    """A progress bar that ends before the work, or never."""
    model, windows = make_model(), []
    def draw(*args):
        windows.append(args)
        return torch.zeros(1, 3, 4, 8, 8)
    monkeypatch.setattr(model, "sample", draw)
    start = torch.zeros(1, 3, given, 8, 8) if given else None
    for length in range(1, 12):
        windows.clear()
        x = sample.sample_long(model, [0], None, 1.0, "dpm", 4, float32, length, start)
        assert x.shape == (1, 3, length, 8, 8)
        assert sample.count_sampler_calls(4, length, given) == len(windows)

def test_a_window_continues_what_the_encoder_makes_of_the_decoded_video(stage2, monkeypatch):
    """Generated latents given as they are; the wrong frames; latents that are not normalised, or
    of an encoder that saw the end."""
    model = load_diffusion(stage2.path)
    vqgan, T = model.vqgan, model.shape[1]
    inputs = record_inputs(model.unet, monkeypatch)
    latents = sample.sample_long(model, [3, 4], torch.tensor([0, 0]), 1.0, "dpm", 2, float32,
                                 length=T + 1)
    z_q, _, _ = vqgan.quantize(latents[:, :, :T] * model.std + model.mean)
    video = vqgan.decode(z_q).clamp(-1, 1)                            # 8 frames, 4 latent frames
    z = vqgan.encode(video[:, :, [4, 5, 6, 7, 7, 6, 5, 4]])
    given = (z[:, :, :2] - model.mean) / model.std
    assert len(inputs) == 4
    for x, _ in inputs[2:]:
        assert torch.allclose(x[:, :, :2], given, atol=1e-4)
        assert not torch.allclose(x[:, :, :2], latents[:, :, 2:4], atol=1e-2)

# --------------------------------------------------------------------------------------------------
# what is trained, and on what

def test_what_is_random_in_a_step():
    """Times that leave gaps, or come in order; labels dropped at another rate than --label_drop;
    clips of which all frames are given; draws that do not follow from the seed."""
    B, labels, model = 2000, torch.arange(2000) % 2, make_model()
    def draw(seed, **flags):
        stream = torch.Generator().manual_seed(seed)
        return diffusion.random_draws(Config(**flags), model, labels, stream)
    u, t, eps, dropped, num_cond = draws = draw(0, label_drop=0.25, cond_prob=0.5)
    gaps = u.sort().values.diff()
    assert torch.allclose(gaps, torch.tensor(1 / B), atol=1e-5)
    assert u.diff().abs().mean() > 0.25
    assert t.bincount().tolist() == pytest.approx([B / 20] * 20, abs=1)
    assert eps.shape == (B, 3, 4, 8, 8)
    is_null = dropped == -1
    assert is_null.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(dropped[~is_null], labels[~is_null])
    share = num_cond.bincount() / B                                   # half: 0, 1, 2 or 3 frames
    assert share.tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125], abs=0.04)
    same(draw(0, label_drop=0.25, cond_prob=0.5), draws)
    assert not torch.equal(draw(1)[2], eps)

def test_loss_by_time():
    """Quarters exchanged; a mean over all clips instead of over those that fall into a quarter."""
    losses, u = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.1, 0.3, 0.2, 0.99])
    found = diffusion.loss_by_time([(losses, u), (losses + 10, u)])
    expected = dict(loss_t1=(1 + 3 + 11 + 13) / 4, loss_t2=(2 + 12) / 2, loss_t3=0,
                    loss_t4=(4 + 14) / 2)
    assert {name: loss.item() for name, loss in found.items()} == expected

def test_nothing_is_learnt_from_given_frames(stage1, stage2, main, monkeypatch):
    """--cond_prob without effect; a loss on frames that the network was shown, which is nearly
    zero and drowns the rest."""
    calls, forward = [], UNet.forward
    def forward_and_record(self, x, t, label=None):
        output = forward(self, x, t, label)
        if self.training:
            output.retain_grad()
            calls.append((t, output))
        return output
    monkeypatch.setattr(UNet, "forward", forward_and_record)
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path,
                  "--cond_prob", 1, "--steps", 6)
    assert result.code == 0, result.err
    given = torch.cat([t == 0 for t, _ in calls])                                        # (N, T)
    learnt = torch.cat([output.grad.abs().amax((1, 3, 4)) > 0 for _, output in calls])   # (N, T)
    given, learnt = given[~given.all(1)], learnt[~given.all(1)]       # else the time drawn was 0
    assert 0.1 < given.float().mean() < 0.9
    assert torch.equal(learnt, ~given)

@pytest.mark.parametrize("flip", [False, True])
def test_latents_belong_to_their_labels_and_are_made_once(stage1, clips, tmp_path, flip):
    """Latents in another order than their labels; a few videos encoded many times; frames mirrored
    in time; latents of an older stage 1 kept."""
    videos = Videos(clips, stage1.home, "train", 16, 8, flip=flip)
    config = Config(width=16, mults=(1,), head_dim=8)
    model = LatentDiffusion(config, load_vqgan(stage1.path), (16, 8, 1, 0), videos.classes, CPU)
    n = 2 * len(videos)
    def encode():
        z, labels = diffusion.encode_dataset(model, videos, n, tmp_path, float32)
        path, = tmp_path.glob("latents-*.npy")
        return torch.from_numpy(np.array(z)).float().flatten(1), labels, path
    windows = [(i, start) for i in range(len(videos)) for start in range(5)]
    clips = np.stack([videos.window(i, start) for i, start in windows])
    clips = np.concatenate([clips, clips[:, :, :, ::-1]])             # and mirrored
    with torch.no_grad():
        known = model.encode(torch.from_numpy(clips).movedim(-1, 1) / 127.5 - 1).flatten(1)

    z, labels, path = encode()
    distance, nearest = torch.cdist(z, known).min(1)
    is_mirrored = nearest >= len(windows)
    found = [windows[k % len(windows)][0] for k in nearest.tolist()]
    assert distance.max() < 0.05
    assert is_mirrored.any() == flip
    assert not is_mirrored.all()
    assert [videos.videos[i].label for i in found] == labels.tolist()
    assert np.bincount(found).tolist() == [2] * len(videos)
    stamp = path.stat().st_mtime_ns
    assert encode()[2].stat().st_mtime_ns == stamp
    model.vqgan.decoder[0].bias.data.add_(1)                          # another stage 1
    assert encode()[2] != path

def test_checkpoint_holds_the_statistics_of_the_latents(stage2):
    """Latents of standard deviation 0.2 given to a network that is told they have 1."""
    path, = stage2.path.parent.glob("latents-*.npy")
    z = torch.from_numpy(np.load(path).astype(np.float32))
    mean, std, bound = load(stage2.path)["statistics"]
    assert ((mean - z.mean((0, 2, 3, 4))).abs() < 0.1 * std).all()
    assert torch.allclose(std, z.std((0, 2, 3, 4)), rtol=0.08)
    normalized = (z - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
    assert bound == pytest.approx(normalized.abs().max().item(), rel=1e-3)

def test_decode_is_the_inverse_of_encode(stage2):
    """Statistics that decoding does not undo; a video quantised twice, or never."""
    model = load_diffusion(stage2.path)
    x = torch.rand(2, 3, 8, 16, 16) * 2 - 1
    with torch.no_grad():
        y, _, _ = model.vqgan(x)
        assert model.encode(x).shape == (2, *model.shape)
        assert torch.allclose(model.decode(model.encode(x)), y, atol=1e-3)

def test_stage_1_stays_frozen_and_the_average_is_what_samples(stage1, stage2):
    """Stage 1 in the optimiser or the average; raw weights loaded for sampling; an average that
    never moves."""
    state, first = load(stage2.path), load(stage1.path)
    same(state["vqgan"]["model"], first["model"])
    assert state["vqgan"]["step"] == 60
    assert state["classes"] == ["spin", "wave"]
    assert tuple(state["clip"]) == (16, 8, 1, 0)
    groups = [group for opt in state["opts"] for group in opt["param_groups"]]
    assert sum(len(group["params"]) for group in groups) == len(state["model"])
    for name, weight in state["model"].items():
        assert not torch.equal(weight, state["ema"][name]), name
    model = load_diffusion(stage2.path)
    same(dict(model.unet.state_dict()), dict(state["ema"]))
    assert model.step == 24
    for network in (model.unet, model.vqgan):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())

def test_average_follows_the_formula(stage1, stage2, main, monkeypatch):
    """The decay on the wrong side: an average that forgets all but the newest weights."""
    history, train_step = [], diffusion.train_step
    def record_and_train(cfg, unet, *args):
        history.append(unet.out[-1].weight.detach().clone())
        return train_step(cfg, unet, *args)
    monkeypatch.setattr(diffusion, "train_step", record_and_train)
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path,
                  "--steps", 5, "--eval_every", 5)
    assert result.code == 0, result.err
    state = load("run/diffusion.pt")
    assert len(history) == 5
    average = history[0]
    for step, weight in enumerate([*history[1:], state["model"]["out.2.weight"]]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(average, state["ema"]["out.2.weight"], atol=1e-6)

@pytest.mark.parametrize("flags", [
    ["--pixels", "--size", "8", "--frames", "4", "--grad_accum_steps", "2"],
    ["--num_latents", "0", "--predict", "eps", "--noise_schedule", "linear"]])
def test_pixels_and_fresh_windows(stage1, stage2, main, flags):
    """--pixels that needs a stage 1 after all, or whose run cannot go on; --num_latents 0 that
    trains on something else."""
    pixels = "--pixels" in flags
    command = [*stage2.flags, "--out", "run", "--steps", 2, "--eval_every", 2, *flags]
    if not pixels:
        command += ["--vqgan", stage1.path]
    result = main(diffusion, *command)
    assert result.code == 0, result.err
    assert Path("run/diffusion.gif").exists()
    assert not [*Path("run").glob("latents-*")]
    assert main(diffusion, *command).code == 0                        # nothing is left to do
    log = read_log(Path("run/diffusion.pt"))
    scores = [row["held_out_loss"] for row in log if "held_out_loss" in row]
    assert len(scores) == 2
    assert all(0.5 < score < 2 for score in scores)
    model = load_diffusion("run/diffusion.pt")
    assert model.shape == ((3, 4, 8, 8) if pixels else (6, 4, 4, 4))
    assert (model.vqgan is None) == pixels
    assert model.sample([0], torch.tensor([1]), 2.0, "dpm", 3).shape == (1, *model.shape)

# --------------------------------------------------------------------------------------------------
# resuming, and refusals

@pytest.fixture
def finished(stage1, stage2, main):
    """run/: a copy of the finished runs of both stages."""
    Path("run").mkdir()
    for path in (stage1.path, stage2.path, stage2.path.with_suffix(".jsonl")):
        shutil.copy(path, "run")

def test_resume_is_exact_to_the_bit(stage1, stage2, main, stop_at):
    """The average, an optimiser, the statistics or a random draw that a resumed run lacks; a run
    that takes what it inherited from stage 1 for another configuration and refuses to go on."""
    Path("run").mkdir()
    shutil.copy(stage1.path, "run/vqgan.pt")
    stop_at(diffusion, 15)
    result = main(diffusion, *stage2.flags, "--out", "run")
    assert result.code == 0, result.err
    assert "stopped after step 16 and saved run/diffusion.pt" in result.out
    assert load("run/diffusion.pt")["step"] == 16
    result = main(diffusion, *stage2.flags, "--out", "run")
    assert result.code == 0, result.err
    assert "resuming run/diffusion.pt at step 16" in result.out
    same(load(stage2.path), load("run/diffusion.pt"))

def test_a_flag_that_makes_no_other_network_may_change(stage2, finished, main):
    """A run that cannot be given more steps or another learning rate, or that is silent about it;
    scores in the log that are lost on resuming, or come twice; a network of another width that is
    filled with what fits."""
    longer = [*stage2.flags, "--out", "run", "--steps", 26, "--lr", 0.001]
    result = main(diffusion, *longer)
    assert result.code == 0, result.err
    assert "--lr 0.001   (until now 0.003)" in result.out
    assert "--steps 26   (until now 24)" in result.out
    state = load("run/diffusion.pt")
    assert state["step"] == 26
    assert state["config"]["lr"] == 0.001
    log = read_log(Path("run/diffusion.pt"))
    assert [row["step"] for row in log if "held_out_loss" in row] == [0, 12, 24, 26]
    result = main(diffusion, *longer, "--width", 32)
    assert result.code == 1
    assert "--width 16 (now 32)" in result.err
    assert "--fresh" in result.err

def test_a_stage_1_that_was_trained_further_is_said(stage2, finished, main):
    """Stage 2 goes on with the stage 1 it began with, and the user believes in the newer one; or
    it takes the newer one, whose latents it was not trained on."""
    newer = load("run/vqgan.pt")
    newer["step"] = 70
    newer["model"]["quantizer.codebook"] += 1
    torch.save(newer, "run/vqgan.pt")
    result = main(diffusion, *stage2.flags, "--out", "run", "--steps", 25)
    assert result.code == 0, result.err
    assert "run/vqgan.pt (70 steps) is not the stage 1 that this run began with" in result.out
    assert load("run/diffusion.pt")["vqgan"]["step"] == 60

def test_other_classes_than_those_of_training_are_refused(stage2, finished, clips, main):
    """A class folder renamed: every later label moves by one, and the network trains on."""
    saved = load("run/diffusion.pt")
    saved["classes"] = ["jump", "spin"]
    torch.save(saved, "run/diffusion.pt")
    result = main(diffusion, *stage2.flags, "--out", "run", "--steps", 25)
    assert result.code == 1
    assert "['jump', 'spin'], and now there are ['spin', 'wave']" in result.err

def test_a_stage_1_without_a_codebook_in_use_is_refused(clips, stage1, stage2, main):
    """Stage 2 of latents that nothing holds together: its samples are decoded without a codebook,
    as noise."""
    result = main(vqgan3d, *stage1.flags, "--out", "run", "--vq_start", 1, "--steps", 2)
    assert result.code == 0, result.err
    result = main(diffusion, *stage2.flags, "--out", "run")
    assert result.code == 1
    assert "its codebook is not trained yet" in result.err
    result = main(evaluate, "--vqgan", "run/vqgan.pt", "--data_dir", stage1.home, "--device", "cpu")
    assert result.code == 0, result.err
    assert "stage 1 does not quantise yet" in result.out

def test_a_network_that_is_no_number_never_replaces_a_checkpoint(stage1, stage2, main):
    """A run that diverges between two looks at its loss, saves what is left of it at the next
    evaluation, and says "done"."""
    result = main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path,
                  "--lr", 1e30, "--steps", 5, "--eval_every", 5)
    assert result.code == 1
    assert "not finite" in result.err
    assert not Path("run/diffusion.pt").exists()

def test_refusals(stage1, stage2, main):
    """A missing stage 1, a checkpoint of the other stage, a grid that does not halve, a name that
    does not exist: stack traces."""
    def error(*flags):
        result = main(diffusion, *stage2.flags, "--out", "run", *flags)
        assert result.code == 1
        return result.err
    assert "python vqgan3d.py" in error()
    assert "is a stage 2" in error("--vqgan", stage2.path)
    assert "--mults" in error("--vqgan", stage1.path, "--mults", "1,1,1,1")
    assert "--width 9" in error("--vqgan", stage1.path, "--width", 9)
    assert "--noise_schedule sine" in error("--vqgan", stage1.path, "--noise_schedule", "sine")

def test_a_fresh_start_that_is_refused_keeps_the_log(stage2, finished, main):
    """A name mistyped beside --fresh, and the log of the run that is still there is empty."""
    rows = read_log(Path("run/diffusion.pt"))
    result = main(diffusion, *stage2.flags, "--out", "run", "--fresh", "--vqgan", "typo.pt")
    assert result.code == 1
    assert rows
    assert read_log(Path("run/diffusion.pt")) == rows

def test_fewer_timesteps_than_the_default_number_of_steps(stage1, stage2, main):
    """Previews of 25 steps, which 10 time steps do not have, end the training before it begins."""
    flags = ["--vqgan", stage1.path, "--timesteps", 10, "--steps", 2, "--eval_every", 2]
    result = main(diffusion, *stage2.flags, "--out", "run", *flags)
    assert result.code == 0, result.err
    result = main(sample, "--checkpoint", "run/diffusion.pt", "--n", 2, "--device", "cpu")
    assert result.code == 0, result.err
    assert "10 steps" in result.out

def test_too_little_memory_is_no_fault_of_the_checkpoint(stage2, monkeypatch):
    """A GPU that another program has filled, and the advice to train anew."""
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(diffusion, "LatentDiffusion", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        load_diffusion(stage2.path)

def test_unusable_checkpoints(stage1, stage2, tmp_path):
    """A stack trace for a file that is damaged, or of the other stage."""
    (tmp_path / "cut.pt").write_bytes(stage2.path.read_bytes()[:5000])
    with pytest.raises(diffusion.UserError, match="not a usable checkpoint"):
        load_diffusion(tmp_path / "cut.pt")
    with pytest.raises(diffusion.UserError, match="is a stage 1"):
        load_diffusion(stage1.path)
