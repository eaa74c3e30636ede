"""Stage 2: noise, samplers, U-Net, guidance, training. Each test names the bug that it catches."""
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import diffusion
import vqgan3d
from conftest import load, read_log, same

CPU = torch.device("cpu")
SAMPLERS = diffusion.SAMPLERS

def make_unet(classes=3, frames=4, **changes):
    """A small U-Net whose parameters are all random, those too that start at zero."""
    torch.manual_seed(0)
    values = dict(width=16, mults=(1, 2), blocks=1, head_dim=8, full_attention_tokens=64)
    unet = diffusion.UNet(diffusion.Config(**values | changes), 3, frames, 8, classes)
    for p in unet.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return unet.eval()

def make_model(classes=("a", "b")):
    """A LatentDiffusion of pixels, with that U-Net: clips of 4 frames of 8 x 8, 20 timesteps."""
    config = diffusion.Config(width=16, mults=(1, 2), blocks=1, head_dim=8, timesteps=20,
                              full_attention_tokens=64)
    model = diffusion.LatentDiffusion(config, None, (8, 4, 1), list(classes), CPU)
    model.unet = make_unet(len(classes))
    model.bound = 3.0
    return model

def make_diffusion(timesteps, **more):
    return diffusion.Diffusion(diffusion.Config(timesteps=timesteps, **more))

def frame_times(*t):
    """The same noise level for all 4 frames of a clip: (B, 4)"""
    return torch.tensor(t)[:, None].repeat(1, 4)

def record_inputs(unet):
    """A list of the (x, t) of all calls of a U-Net from now on."""
    inputs = []
    unet.register_forward_pre_hook(lambda _, args: inputs.append([x.clone() for x in args[:2]]))
    return inputs

def test_the_schedule_is_that_of_the_paper():
    """Times reversed, noise that never becomes noise, an offset forgotten in the cosine."""
    alpha_bar = make_diffusion(1000).alpha_bar
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert np.allclose(alpha_bar[:990], f[1:991] / f[0], rtol=1e-9)
    assert (alpha_bar.diff() < 0).all()
    assert 0 < alpha_bar[-1] < 1e-3

def test_noise_shift_multiplies_the_ratio_of_noise_to_signal():
    """Multiplied by its root or its square, or in the networks' copy only; a default of 1 for
    latents of 32 x 32, whose mean colour stays visible under any noise (Hoogeboom et al. 2023)."""
    plain, shifted = make_diffusion(1000), make_diffusion(1000, noise_shift=4.0)
    ratio = torch.sqrt(1 / plain.alpha_bar - 1)
    assert torch.allclose(torch.sqrt(1 / shifted.alpha_bar - 1), 4 * ratio, rtol=1e-9)
    expected = 4 * plain.sigma[:900] / plain.alpha[:900]
    assert torch.allclose(shifted.sigma[:900] / shifted.alpha[:900], expected, rtol=1e-4)
    config = diffusion.Config(width=16, mults=(1,), blocks=1)
    for side, expected in (8, plain), (32, shifted):
        stage1 = vqgan3d.VQGAN(vqgan3d.Config(size=4 * side, width=8, blocks=1, codes=8))
        model = diffusion.LatentDiffusion(config, stage1, (4 * side, 16, 1), [], CPU)
        assert torch.equal(model.diffusion.alpha_bar, expected.alpha_bar)

def test_sampling_times_descend_to_0():
    """A sampler that begins too early, ends too late or stands still at a time that comes twice."""
    d = make_diffusion(1000)
    assert d.sampling_times(1000) == [*range(999, -1, -1)]
    assert d.sampling_times(4) == [999, 666, 333, 0]
    assert make_diffusion(10).sampling_times(25) == [*range(9, -1, -1)]
    first, *_, last = make_diffusion(1000, predict_eps=True).sampling_times(25)
    assert last == 0
    assert d.alpha_bar[first] >= 0.03 ** 2 > d.alpha_bar[first + 1]   # x_0 is divided by its root

@pytest.mark.parametrize("predict_eps", [False, True])
def test_noise_is_added_and_taken_away(predict_eps):
    """v with a sign exchanged; a clipped x_0 whose eps no longer explains x_t."""
    torch.manual_seed(0)
    d = make_diffusion(100, predict_eps=predict_eps)
    x0, eps = torch.randn(6, 3, 2, 4, 4).clamp(-2, 2), torch.randn(6, 3, 2, 4, 4)
    t = torch.tensor([0, 1, 20, 50, 80, 97])
    alpha = d.alpha_bar[t].sqrt().float().view(-1, 1, 1, 1, 1)
    sigma = (1 - d.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1, 1)
    x_t, target = d.add_noise(x0, eps, t)
    assert torch.allclose(x_t, alpha * x0 + sigma * eps)
    assert torch.allclose(target, eps if predict_eps else alpha * eps - sigma * x0)
    found_x0, found_eps = d.predict_x0_eps(x_t, target, t, bound=2)
    assert torch.allclose(found_x0, x0, atol=1e-3)
    assert torch.allclose(found_eps, eps, atol=2e-3)
    clipped, rest = d.predict_x0_eps(x_t, target, t, bound=0.5)
    assert clipped.abs().max() <= 0.5
    assert torch.allclose(alpha * clipped + sigma * rest, x_t, atol=1e-5)

def test_loss_against_a_second_formula():
    """Given frames that are noised, announced as noise or counted; a mean over all frames instead
    of those that are not given; another time or label for a clip than its own."""
    torch.manual_seed(0)
    unet, d = make_unet(), make_diffusion(100)
    x0, eps = torch.randn(3, 3, 4, 8, 8), torch.randn(3, 3, 4, 8, 8)
    t, labels = torch.tensor([5, 60, 90]), torch.tensor([0, -1, 2])
    num_cond = torch.tensor([0, 3, 1])
    with torch.no_grad():
        losses = diffusion.denoising_loss(unet, d, x0, t, eps, labels, num_cond)
        expected = []
        for i in range(3):
            K = num_cond[i]
            alpha, sigma = d.alpha_bar[t[i]].item() ** 0.5, (1 - d.alpha_bar[t[i]].item()) ** 0.5
            x_t = alpha * x0[i:i + 1] + sigma * eps[i:i + 1]
            x_t[:, :, :K] = x0[i, :, :K]
            times = frame_times(t[i])
            times[:, :K] = 0
            target = alpha * eps[i] - sigma * x0[i]
            error = unet(x_t, times, labels[i:i + 1])[0] - target                # (C, T, H, W)
            expected.append(error[:, K:].square().mean())
    assert torch.allclose(losses, torch.stack(expected), rtol=1e-4)

def test_ddpm_step_is_the_posterior_of_ddpm_eq_7():
    """A posterior with alpha and alpha-bar confused, or shifted by one step."""
    d = make_diffusion(1000)
    alpha_bar = d.alpha_bar.numpy()
    beta = 1 - alpha_bar / np.concatenate([[1], alpha_bar[:-1]])
    x, x0 = torch.randn(2, 5, dtype=torch.float64)
    def denoise(x, t):
        return x0, None
    for t in (998, 500, 7, 1):
        mean, _ = next(diffusion.ddpm(denoise, d, x, [t, t - 1], lambda: torch.zeros(5)))
        noisy, _ = next(diffusion.ddpm(denoise, d, x, [t, t - 1], lambda: torch.ones(5)))
        last = alpha_bar[t - 1]
        expected = last ** 0.5 * beta[t] * x0 + (1 - beta[t]) ** 0.5 * (1 - last) * x
        variance = (1 - last) / (1 - alpha_bar[t]) * beta[t]
        assert torch.allclose(mean, expected / (1 - alpha_bar[t]), rtol=1e-9)
        assert ((noisy - mean) ** 2).mean().item() == pytest.approx(variance, rel=1e-6)
    end, _ = next(diffusion.ddpm(denoise, d, x, [0], None))           # no noise is added at the end
    assert torch.allclose(end, x0)

MEAN, STD = 0.5, 0.3

def optimal_denoiser(d):
    """The best denoiser of data from N(MEAN, STD^2): x_0 and eps expected of a given x_t."""
    def denoise(x, t):
        alpha, variance = float(d.alpha_bar[t]) ** 0.5, 1 - float(d.alpha_bar[t])
        gain = alpha * STD ** 2 / (alpha ** 2 * STD ** 2 + variance)
        x0 = MEAN + gain * (x - alpha * MEAN)
        return x0, (x - alpha * x0) / variance ** 0.5
    return denoise

@pytest.mark.parametrize("sampler, steps", [
    ("ddpm", 250), ("ddim", 100), ("dpm", 25)])
def test_samplers_recover_a_gaussian(sampler, steps):
    """Any wrong coefficient: the samples have another mean or spread than the data."""
    d = make_diffusion(1000)
    stream = torch.Generator().manual_seed(0)
    def randn():
        return torch.randn(20_000, generator=stream, dtype=torch.float64)
    times = d.sampling_times(steps)
    *_, (x, _) = SAMPLERS[sampler](optimal_denoiser(d), d, randn(), times, randn)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, rel=0.03)

def test_dpm_is_of_second_order():
    """A wrong ratio of steps, an overshoot in the long last step: no better than DDIM."""
    d = make_diffusion(1000)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha_bar = float(d.alpha_bar[-1])
    std_T = (alpha_bar * STD ** 2 + 1 - alpha_bar) ** 0.5
    exact = MEAN + STD * (x - alpha_bar ** 0.5 * MEAN) / std_T        # the flow of a Gaussian
    error = {}
    for name in ("ddim", "dpm"):
        *_, (end, _) = SAMPLERS[name](optimal_denoiser(d), d, x, d.sampling_times(25))
        error[name] = (end - exact).abs().max()
    assert error["dpm"] < error["ddim"] / 3

def dpm_2m(denoise, d, x, times):
    """DPM-Solver++(2M) in the form of its paper's algorithm 2, without a corrector"""
    a = d.alpha_bar[times].sqrt()
    s = (1 - d.alpha_bar[times]).sqrt()
    lam = (a / s).log()
    old = None
    for i in range(len(times) - 1):
        x0, _ = denoise(x, times[i])
        h = lam[i + 1] - lam[i]
        r = None if old is None else min(1, h / (lam[i] - lam[i - 1]))
        D = x0 if old is None else (1 + r / 2) * x0 - r / 2 * old
        x = s[i + 1] / s[i] * x - a[i + 1] * torch.expm1(-h) * D
        old = x0
    return denoise(x, times[-1])[0]

def test_the_corrector_of_dpm_is_nearer_to_the_exact_flow():
    """A corrector with the wrong step, noise level or mean: no nearer than without it."""
    d = make_diffusion(1000)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha_bar = float(d.alpha_bar[-1])
    std_T = (alpha_bar * STD ** 2 + 1 - alpha_bar) ** 0.5
    exact = MEAN + STD * (x - alpha_bar ** 0.5 * MEAN) / std_T        # the flow of a Gaussian
    for steps in (12, 25):
        times = d.sampling_times(steps)
        *_, (end, _) = diffusion.dpm(optimal_denoiser(d), d, x, times)
        plain = dpm_2m(optimal_denoiser(d), d, x, times)
        assert (end - exact).abs().max() < 0.8 * (plain - exact).abs().max()

def test_gradient_reaches_every_parameter():
    """A layer that is built and never called."""
    for tokens in (0, 64):                                  # with attention apart, and over all
        unet = make_unet(full_attention_tokens=tokens).train()
        label = torch.tensor([0, -1])
        unet(torch.randn(2, 3, 4, 8, 8), frame_times(3, 40), label).square().mean().backward()
        unused = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
        assert not unused
        assert unet.label.weight.grad.any(1).tolist() == [True, False, False, True]

def test_videos_of_a_batch_do_not_mix():
    """Frames folded into the batch and given the time, label or neighbours of another video."""
    unet = make_unet()
    x, t, label = torch.randn(3, 3, 4, 8, 8), frame_times(0, 30, 99), torch.tensor([2, 0, -1])
    alone = torch.cat([unet(x[i:i + 1], t[i:i + 1], label[i:i + 1]) for i in range(3)])
    assert torch.allclose(unet(x, t, label), alone, atol=1e-4)
    def changed(t, label):
        difference = unet(x, t, label) - alone
        return (difference.abs().amax((1, 2, 3, 4)) > 1e-3).tolist()
    assert changed(frame_times(0, 31, 99), label) == [False, True, False]
    assert changed(t, torch.tensor([2, 0, 1])) == [False, False, True]
    t[1, 0] = 0                                             # each frame has its own noise level
    assert changed(t, label) == [False, True, False]

@pytest.mark.parametrize("frames, size", [(4, 1), (1, 2), (4, 2)])
def test_attention_reaches_as_far_as_its_window(frames, size):
    """Frames, rows and positions confused when they are folded into one axis."""
    torch.manual_seed(0)
    attention = diffusion.Attention(16, 8, frames, size)
    torch.nn.init.normal_(attention.proj.weight)
    attention.norm = torch.nn.Identity()                    # which mixes the positions of a frame
    x = torch.randn(4, 16, 2, 2)                                      # 4 frames of one video
    other = x.clone()
    other[3, :, 0, 0] += torch.randn(16)                              # one place of the last frame
    changed = (attention(other) - attention(x)).abs().amax(1) > 1e-4                     # (T, H, W)
    expected = torch.zeros(4, 2, 2, dtype=torch.bool)
    expected[3 if frames == 1 else slice(None), :size, :size] = True
    assert torch.equal(changed, expected)

def test_attention_knows_relative_positions_only():
    """Two offsets that share a bias by accident, or one that has several: positions that tie a
    video to the frame numbers it was trained at, or that do not tell before from after."""
    T, S = 3, 2
    attention = diffusion.Attention(16, 8, T, S)
    places = [*itertools.product(range(T), range(S), range(S))]
    offset_of = {}
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        offset = tuple(np.subtract(key, query))
        assert offset_of.setdefault(attention.index[i, j].item(), offset) == offset
    assert sorted(offset_of) == [*range((2 * T - 1) * (2 * S - 1) ** 2)]
    assert attention.bias.shape == (2, len(offset_of))
    first = [offset_of[k][0] for k in attention.bias.argmax(1).tolist()]
    assert first == [-1, 0]                                 # the frame before, and the same

def test_guidance():
    """Scales 0 and 1 exchanged, guidance on a part of the channels, another null label."""
    unet = make_unet(classes=3)
    x, t, label = torch.randn(2, 3, 4, 8, 8), frame_times(30, 30), torch.tensor([0, 2])
    conditional, null = unet(x, t, label), unet(x, t, torch.tensor([-1, -1]))
    assert len(unet.label.weight) == 4
    difference = conditional - null
    assert difference.abs().amax((0, 2, 3, 4)).min() > 1e-3
    for scale, expected in (1, conditional), (0, null), (2.5, null + 2.5 * difference):
        network = diffusion.classifier_free_guidance(unet, label, scale)
        assert torch.allclose(network(x, t), expected, atol=1e-4)
    unet = make_unet(classes=0)                             # there is no null label: no guidance
    network = diffusion.classifier_free_guidance(unet, label, 3)
    assert torch.equal(network(x, t), unet(x, t, label))

def test_null_label_is_trained_by_label_dropping(short):
    """Guidance away from an embedding that no step of the training ever saw."""
    for label_drop in (0.5, 0):
        state = short("--label_drop", label_drop)
        moments = [m["exp_avg"] for m in state["adam"]["state"].values()]
        shape = state["model"]["label.weight"].shape        # two classes, the null label
        gradient, = [moment for moment in moments if moment.shape == shape]
        assert gradient.any(1).tolist() == [True, True, label_drop > 0]

def test_labels_that_there_are_not_are_refused():
    """Label 99 that becomes some class; two labels for three seeds, or the reverse."""
    model = make_model()
    assert torch.equal(model.sample([5], [-1]), model.sample([5]))
    for seeds, labels in ([5], [2]), ([5], [-2]), ([5], [99]), ([5, 6, 7], [0, 1]), ([5], [0, 1]):
        with pytest.raises(ValueError, match="labels"):
            model.sample(seeds, labels)

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_frames_stay(sampler):
    """Given frames that are noised or changed, or announced as noise."""
    model, start = make_model(), torch.randn(1, 3, 1, 8, 8)
    inputs = record_inputs(model.unet)
    x = model.sample([6], [1], 1.0, sampler, 4, cond_frames=start)
    assert x.shape == (1, 3, 4, 8, 8)
    assert torch.equal(x[:, :, :1], start)
    assert len(inputs) == 4
    for x, t in inputs:
        assert torch.equal(x[:, :, :1], start)
        assert t.tolist() == [[0] + 3 * t[0, 3:].tolist()]

def test_what_is_random_in_a_step():
    """Times that leave gaps, or come in order; labels dropped at another rate than --label_drop;
    clips of which all frames are given; draws that do not follow from the seed."""
    B, labels, model = 2000, torch.arange(2000) % 2, make_model()
    def draw(seed, **flags):
        stream = torch.Generator().manual_seed(seed)
        return diffusion.random_draws(diffusion.Config(**flags), model, labels, stream)
    t, eps, dropped, num_cond = draws = draw(0, label_drop=0.25, cond_prob=0.5)
    assert t.bincount().tolist() == pytest.approx([B / 20] * 20, abs=1)
    assert t.float().diff().abs().mean() > 5
    assert eps.shape == (B, 3, 4, 8, 8)
    is_null = dropped == -1
    assert is_null.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(dropped[~is_null], labels[~is_null])
    share = num_cond.bincount() / B                                   # half: 0, 1, 2 or 3 frames
    assert share.tolist() == pytest.approx([0.625, 0.125, 0.125, 0.125], abs=0.04)
    same(draw(0, label_drop=0.25, cond_prob=0.5), draws)
    assert not torch.equal(draw(1)[1], eps)

def test_loss_by_time():
    """Quarters exchanged; a mean over all clips instead of over those that fall into a quarter; a
    quarter without clips logged as a loss of 0."""
    losses, t = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1, 6, 4, 19])        # of 20 times
    found = diffusion.loss_by_time([(losses, t), (losses + 10, t)], 20)
    expected = dict(loss=7.5, loss_t1=(1 + 3 + 11 + 13) / 4, loss_t2=(2 + 12) / 2,
                    loss_t4=(4 + 14) / 2)
    assert {name: loss.item() for name, loss in found.items()} == expected

@pytest.fixture
def short(stage1, stage2, main):
    """short(*flags): a run of four steps -> its checkpoint"""
    def short(*flags):
        main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--steps", 4,
             "--eval_every", 4, "--timesteps", 10, "--fresh", *flags)         # the last one counts
        return load("run/diffusion.pt")
    return short

def test_stage_2_inherits_learns_and_says_so(stage2):
    """A loop that learns nothing; a loss that is not logged; clips of another size."""
    log = read_log(stage2.path)
    scores = [row["held_out_loss"] for row in log if "held_out_loss" in row]
    assert len(scores) == 3
    assert 0.6 < scores[0] < 1.5                            # of a network that predicts nearly 0
    assert scores[-1] < scores[0] - 0.01
    losses = [row for row in log if "loss" in row]
    assert [row["step"] for row in losses] == [0, 20]
    assert {"loss_t1", "loss_t2", "loss_t3", "loss_t4"} <= set(losses[1])
    assert "60 of 60 steps): 8 frames of 16 x 16, stride 1" in stage2.out
    assert stage2.path.with_suffix(".gif").exists()

def test_nothing_is_learnt_from_given_frames(short, monkeypatch):
    """--cond_prob without effect; a loss on frames that the network was shown: nearly zero."""
    calls, forward = [], diffusion.UNet.forward
    def forward_and_record(self, x, t, label):
        output = forward(self, x, t, label)
        if self.training:
            output.retain_grad()
            calls.append((t, output))
        return output
    monkeypatch.setattr(diffusion.UNet, "forward", forward_and_record)
    short("--cond_prob", 1, "--timesteps", 50)
    given = torch.cat([t == 0 for t, _ in calls])                                        # (N, T)
    learnt = torch.cat([output.grad.abs().amax((1, 3, 4)) > 0 for _, output in calls])   # (N, T)
    given, learnt = given[~given.all(1)], learnt[~given.all(1)]       # else the time drawn was 0
    assert 0.1 < given.float().mean() < 0.9
    assert torch.equal(learnt, ~given)

def test_decode_is_the_inverse_of_encode(stage2):
    """Statistics that decoding does not undo, or that are not those of the latents: of standard
    deviation 0.2 for a network that is told they have 1; a video quantised twice, or never."""
    model = diffusion.load_diffusion(stage2.path)
    train = data.Videos(str(stage2.home / "clips"), stage2.home, "train", 16, 8)
    clips, _ = train.batch(300, np.random.default_rng(5))
    x = data.to_float(clips)
    with torch.no_grad():
        z = model.encode(x)
        y, _, _ = model.vqgan(x[:2])
        assert z.shape == (300, *model.shape)
        assert torch.allclose(model.decode(z[:2]), y, atol=1e-3)
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.15
    assert torch.allclose(z.std((0, 2, 3, 4)), torch.ones(6), rtol=0.1)
    assert model.bound == pytest.approx(z.abs().max().item(), rel=0.2)

def test_stage_1_stays_frozen_and_the_average_is_what_samples(stage1, stage2):
    """Stage 1 in the optimiser; raw weights loaded for sampling; an average that never moves."""
    state = load(stage2.path)
    same(state["vqgan"]["model"], load(stage1.path)["model"])
    groups = [group for name in ("muon", "adam") for group in state[name]["param_groups"]]
    assert sum(len(group["params"]) for group in groups) == len(state["model"])
    for name, weight in state["model"].items():
        assert not torch.equal(weight, state["ema"][name]), name
    model = diffusion.load_diffusion(stage2.path)
    same(dict(model.unet.state_dict()), dict(state["ema"]))
    assert (model.step, model.classes, [*model.clip_format]) == (24, ["spin", "wave"], [16, 8, 1])
    for network in (model.unet, model.vqgan):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())

def test_average_follows_the_formula(short, monkeypatch):
    """The decay on the wrong side: an average that forgets all but the newest weights."""
    history, average_gradients = [], diffusion.average_gradients
    def record_and_average(unet):
        history.append(unet.out[-1].weight.detach().clone())          # before the step
        average_gradients(unet)
    monkeypatch.setattr(diffusion, "average_gradients", record_and_average)
    state = short()
    assert len(history) == 4
    average = history[0]
    for step, weight in enumerate([*history[1:], state["model"]["out.2.weight"]]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(average, state["ema"]["out.2.weight"], atol=1e-6)

def test_pixels_need_no_stage_1(short):
    """--pixels that needs a stage 1 after all, or shifts the noise as for latents."""
    state = short("--pixels", "--size", 8, "--frames", 4, "--grad_accum_steps", 2)
    model = diffusion.load_diffusion("run/diffusion.pt")
    assert model.shape == (3, 4, 8, 8)
    assert state["vqgan"] is model.vqgan is None
    assert model.sample([0], [1], 2.0, "dpm", 3).shape == (1, *model.shape)
    assert (model.latent_frames(2), model.video_frames(2)) == (2, 2)
    assert torch.equal(model.diffusion.alpha_bar, make_diffusion(10, noise_shift=1.0).alpha_bar)

def test_what_does_not_fit_stage_1_is_one_line(stage1, stage2, main):
    """A missing stage 1, stage 1 in the place of the model, a grid that does not halve."""
    def error(*flags):
        return main(diffusion, *stage2.flags, "--out", "run", *flags, code=1).err
    assert "python vqgan3d.py" in error()
    assert "--mults" in error("--vqgan", stage1.path, "--mults", "1,1,1,1")
    assert "is no stage 1" in error("--vqgan", stage2.path)
    with pytest.raises(data.UserError):
        diffusion.load_diffusion(stage1.path)
