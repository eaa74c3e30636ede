"""Stage 1: network, quantiser, each loss against a formula, who learns from which loss, resuming,
refusals. Each test names the bug that it catches."""
import contextlib
import itertools
import math
import signal
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import diffusion
import sample
import vqgan3d
from conftest import STAGE1, launch, load, read_log, same
from vqgan3d import VQGAN, Config, Discriminator, PatchDown, PatchUp, Quantizer

CPU = torch.device("cpu")
FLOAT32_RUN = types.SimpleNamespace(            # what build_networks() and the losses need of a Run
    device=CPU, autocast=contextlib.nullcontext, scaler=torch.amp.GradScaler("cpu", enabled=False))

def tiny_config(**changes):
    tiny = dict(size=16, frames=8, down=(2, 4, 4), width=8, blocks=1, codes=16, disc_width=4,
                perceptual=0.0)
    return Config(**{**tiny, **changes})

def tiny_vqgan(**changes):
    torch.manual_seed(0)
    return VQGAN(tiny_config(**changes))

def shake(network, size):
    """Add random numbers to all parameters: some start at zero, and hide what comes before them."""
    for p in network.parameters():
        p.data.add_(torch.randn_like(p) * size)

# --------------------------------------------------------------------------------------------------
# the network

def test_patches_are_cut_and_put_back():
    """Axes exchanged in one direction, or in both, where there and back would not show it."""
    x = torch.randn(2, 3, 4, 6, 8)
    down = PatchDown(3, 72, (2, 3, 4))
    down.proj = torch.nn.Identity()
    y = down(x)
    assert y.shape == (2, 72, 2, 2, 2)
    assert torch.equal(y[:, :, 1, 0, 1], x[:, :, 2:4, 0:3, 4:8].movedim(1, -1).flatten(1))
    down, up = PatchDown(3, 36, (1, 3, 4)), PatchUp(36, 3, (3, 4))
    down.proj = up.proj = torch.nn.Identity()
    assert torch.equal(up(down(x)), x)

def test_frames_are_interpolated_in_time():
    """Frames of the decoder that stand still for two, then jump; a shift by half a frame."""
    x = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 2)
    y = vqgan3d.TimeUp()(x)[0, 0, :, 0, 1]
    assert y.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]

@pytest.mark.parametrize("down", [(1, 4, 4), (4, 8, 8), (8, 2, 4), (1, 1, 1)])
def test_down_is_the_shape_of_the_latent(down):
    """A downsampling that is right for 4,4,4 only, or time and height exchanged."""
    vqgan = tiny_vqgan(down=down)
    z = vqgan.encode(torch.randn(1, 3, 8, 16, 16))
    assert z.shape == (1, 6, 8 // down[0], 16 // down[1], 16 // down[2])
    assert z.shape[1:] == vqgan.latent_shape()
    assert vqgan.decode(z).shape == (1, 3, 8, 16, 16)

@pytest.mark.parametrize("down, blocks", [((4, 4, 4), 2), ((2, 8, 8), 1), ((1, 4, 4), 2)])
def test_long_videos_are_decoded_without_seams(down, blocks):
    """Parts decoded with fewer neighbours than the decoder sees, or with more than are needed."""
    vqgan = tiny_vqgan(down=down, blocks=blocks, frames=4 * down[0]).eval()
    shake(vqgan, 0.05)
    z = torch.randn(1, 6, 23, 16 // down[1], 16 // down[2])
    whole = vqgan.decode(z)
    assert whole.shape[2] == 23 * down[0]
    side = sample.receptive_field(vqgan.decoder)
    rate = down[0]
    model = types.SimpleNamespace(vqgan=vqgan, decode=vqgan.decode, frames_per_latent=rate)
    assert torch.allclose(sample.decode_long(model, z, 5), whole, atol=1e-4)
    z.requires_grad_()
    vqgan.decode(z)[:, :, 11 * rate:12 * rate].square().sum().backward()
    seen = z.grad.abs().amax((0, 1, 3, 4)).nonzero()
    assert (seen.min(), seen.max()) == (11 - side, 11 + side)

def test_decoder_is_a_function_of_the_codes_alone():
    """Dropout, batch statistics or noise in the decoder; a video that changes another one of its
    batch."""
    vqgan = tiny_vqgan()
    shake(vqgan, 0.02)
    z = torch.randn(3, 6, 4, 4, 4)
    y = vqgan.train().decode(z)
    assert torch.equal(y, vqgan.decode(z))
    assert torch.equal(y, vqgan.eval().decode(z))
    assert torch.allclose(vqgan.decode(z[1:2]), y[1:2], atol=1e-5)

HAS_AMX = hasattr(torch.cpu, "_is_amx_tile_supported") and torch.cpu._is_amx_tile_supported()
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="only CPUs with AMX had this fault")

@pytest.mark.parametrize("shape", [
    dict(frames=2), dict(frames=4), dict(frames=8),
    pytest.param(dict(frames=16, size=128, down=(4, 4, 4), width=32), marks=needs_amx)], ids=str)
def test_bfloat16_gradients_are_those_of_float32(shape):
    """oneDNN's bfloat16 gradients of a convolution over two frames, and, on CPUs with AMX, of a
    wide one of 1x1x1: absurd values, or NaN."""
    vqgan = tiny_vqgan(**shape)
    shake(vqgan, 0.05)
    c = vqgan.config
    x = torch.rand(2, 3, c.frames, c.size, c.size) * 2 - 1
    gradients = []
    for use_bf16 in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            y, _, _ = vqgan(x)
        vqgan.zero_grad()
        (y - x).square().mean().backward()
        found = [p.grad.flatten() for p in vqgan.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    bf16, float32 = gradients
    assert bf16.isfinite().all()
    assert (bf16 - float32).norm() < 0.1 * float32.norm()

@pytest.mark.parametrize("frames, size", [(16, 32), (8, 16), (2, 64), (20, 48)])
def test_discriminator_gives_one_logit_for_any_size(frames, size):
    """A last layer that fits 16 x 128 x 128 only."""
    logits, features = Discriminator(frames, size, 4)(torch.randn(2, 3, frames, size, size))
    assert logits.shape == (2,)
    assert len(features) >= 2

# --------------------------------------------------------------------------------------------------
# the quantiser

def tiny_quantizer():
    """A quantiser that has started, all of its 32 codes in use."""
    torch.manual_seed(0)
    quantizer = Quantizer(32, 4)
    quantizer.started = True
    quantizer.usage.fill_(1)
    return quantizer

def test_quantiser_takes_the_nearest_code():
    """A distance without one of its terms or with a wrong sign; codes in another order than the
    positions."""
    quantizer = tiny_quantizer().eval()
    z = torch.randn(2, 4, 3, 5, 6)
    z_q, codes, _ = quantizer(z)
    flat = z.movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(flat.double(), quantizer.codebook.double()).argmin(1)
    assert torch.equal(codes, nearest.view(2, 3, 5, 6))
    assert torch.allclose(z_q, quantizer.codebook[codes].movedim(-1, 1), atol=1e-6)

def test_codebook_loss_moves_codes_and_commitment_moves_latents():
    """detach() on the wrong term, so that the commitment weight acts on the codes; a gradient that
    does not go straight through."""
    quantizer = tiny_quantizer()
    z = torch.randn(2, 4, 2, 3, 3, requires_grad=True)
    z_q, codes, losses = quantizer(z)
    mse = (z_q - z).square().mean().item()
    assert losses["codebook"].item() == pytest.approx(mse, rel=1e-4)
    assert losses["commitment"].item() == pytest.approx(mse, rel=1e-4)
    def gradients(loss):
        return torch.autograd.grad(loss, [z, quantizer.codebook], retain_graph=True,
                                   allow_unused=True, materialize_grads=True)
    to_z, to_codes = gradients(losses["codebook"])
    assert not to_z.any()
    assert to_codes[codes.unique()].any(1).all()
    to_z, to_codes = gradients(losses["commitment"])
    assert to_z.any()
    assert not to_codes.any()
    weight = torch.randn_like(z)
    to_z, to_codes = gradients((z_q * weight).sum())
    assert torch.equal(to_z, weight)
    assert not to_codes.any()

def test_unused_codes_move_to_latents_and_the_others_stay():
    """A codebook that collapses; codes in use that are overwritten; codes moved in evaluation."""
    quantizer = tiny_quantizer()
    quantizer.usage[::2] = 0.01
    before = quantizer.codebook.detach().clone()
    z = torch.randn(2, 4, 2, 4, 4) + 20
    quantizer.eval()(z)
    assert torch.equal(quantizer.codebook, before)
    quantizer.train()(z)
    assert torch.equal(quantizer.codebook[1::2], before[1::2])
    flat = z.movedim(1, -1).reshape(-1, 4)
    moved = quantizer.codebook[::2].detach()
    assert torch.cdist(moved, flat).min(1).values.max() < 0.2
    assert quantizer.usage.min() > 0.5

def test_quantiser_starts_once_and_never_again_after_loading():
    """"Needs initialisation" as an attribute that is not saved: a resumed run loses its codebook at
    the first step."""
    quantizer = Quantizer(32, 4)
    z = torch.randn(2, 4, 2, 4, 4)
    z_q, _, losses = quantizer(z)
    assert z_q is z                                                   # not started: latents pass
    assert losses["codebook"] == 0
    quantizer.started = True
    quantizer(z + 20)
    assert (quantizer.codebook.mean() - 20).abs() < 1                 # started from latents
    loaded = Quantizer(32, 4)
    loaded.load_state_dict(quantizer.state_dict())
    assert loaded.started
    loaded(z - 20)
    assert torch.equal(loaded.codebook, quantizer.codebook)
    assert not torch.equal(loaded.usage, quantizer.usage)

# --------------------------------------------------------------------------------------------------
# the losses, each against a formula

def test_reconstruction_loss():
    """A sum instead of a mean; frames of the video compared with other frames of its
    reconstruction, or the same frame taken from every clip."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 3, 4, 5, 5)
    frame = torch.tensor([2, 0, 3])
    pairs = []
    def vgg(real, fake):
        pairs.append((real, fake))
        return torch.tensor(7.0)
    losses = vqgan3d.reconstruction_loss(x, y, vgg, frame)
    assert losses["mse"].item() == pytest.approx(((x - y) ** 2).mean().item())
    assert losses["perceptual"] == 7
    (real, fake), = pairs
    for clip, t in enumerate(frame):
        assert torch.equal(real[clip], x[clip, :, t])
        assert torch.equal(fake[clip], y[clip, :, t])
    assert list(vqgan3d.reconstruction_loss(x, y)) == ["mse"]

def test_adversarial_losses():
    """A sign, a real clip taken for a fake one, the saturating loss, a feature counted twice."""
    torch.manual_seed(0)
    real, fake = torch.randn(2, 5)
    D_real, D_fake = 1 / (1 + (-real).exp()), 1 / (1 + (-fake).exp())
    disc = vqgan3d.discriminator_loss(real, fake)
    assert torch.allclose(disc, -(D_real.log().mean() + (1 - D_fake).log().mean()))
    real_features = [torch.randn(5, 3), torch.randn(5, 2, 2)]
    fake_features = [torch.randn(5, 3), torch.randn(5, 2, 2)]
    losses = vqgan3d.generator_loss(fake, fake_features, real_features)
    assert torch.allclose(losses["gan"], -D_fake.log().mean())
    distances = [(a - b).abs().mean() for a, b in zip(real_features, fake_features)]
    assert torch.allclose(losses["feature"], (distances[0] + distances[1]) / 2)

def test_adversarial_gradient_is_limited_and_a_short_one_is_not_changed():
    """A gradient that is made as long as the limit even if it is shorter; another direction; the
    limit of the wrong one of the two."""
    torch.manual_seed(0)
    rec, adv = torch.randn(2, 2, 3, 4, 5, 5)
    assert torch.equal(vqgan3d.join_gradients(rec, adv * 0.1, 0.3), rec + adv * 0.1)
    limited = adv * (0.3 * rec.norm() / adv.norm())
    for scale in (1, 1000):
        joined = vqgan3d.join_gradients(rec, adv * scale, 0.3)
        assert torch.allclose(joined, rec + limited, atol=1e-5)
    assert torch.equal(vqgan3d.join_gradients(rec, torch.zeros_like(adv), 0.3), rec)

@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """VGG16 of random weights, as .npz."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.npz"
    weights = vqgan3d.VGG16().features.state_dict()
    np.savez(path, **{f"features.{name}": weight.numpy() for name, weight in weights.items()})
    return path

def test_perceptual_network_is_frozen_and_differentiable(vgg_file):
    """A network that is trained too, or in training mode; no gradient to the reconstruction."""
    vgg = vqgan3d.load_vgg(vgg_file)
    assert not vgg.training
    assert not any(p.requires_grad for p in vgg.parameters())
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    assert vgg(x, x).item() == 0
    loss = vgg(x, y)
    assert loss.item() > 0
    gradient, = torch.autograd.grad(loss, y)
    assert gradient.flatten(1).any(1).all()

def test_evaluation_of_a_known_error(tmp_path):
    """PSNR of the range 2 instead of 1; codes counted in another way than the README says."""
    class TenLevelsBrighter(torch.nn.Module):
        """Adds 10 of 255 grey levels, and uses 2 of 8 codes."""
        config = types.SimpleNamespace(codes=8)
        quantizer = types.SimpleNamespace(usage=torch.zeros(8))
        def forward(self, x):
            codes = torch.arange(len(x) * 4).view(len(x), 1, 2, 2) % 2
            return x + 10 / 127.5, codes, {}
    clips = torch.randint(20, 200, (10, 3, 16, 16, 3), dtype=torch.uint8)
    scores = vqgan3d.evaluate_and_preview(TenLevelsBrighter(), clips, contextlib.nullcontext, 4,
                                          tmp_path / "a.gif")
    expected = dict(psnr=20 * math.log10(25.5), codes_used=0.25, perplexity=2)
    assert scores == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "a.gif").exists()

# --------------------------------------------------------------------------------------------------
# who learns from which loss

def gradients(train_disc, use_gan, **changes):
    """Of one batch: the gradients of the autoencoder, and those of the discriminator."""
    torch.manual_seed(0)
    cfg = tiny_config(**changes)
    nets = vqgan3d.build_networks(cfg, FLOAT32_RUN)
    nets.vqgan.quantizer.started = True
    x = torch.rand(2, 3, 8, 16, 16) * 2 - 1
    vqgan3d.backward_losses(cfg, nets, x, torch.tensor([0, 3]), train_disc, use_gan, 1.0,
                            FLOAT32_RUN)
    of_vqgan = [p.grad for p in nets.vqgan.parameters()]
    of_disc = [p.grad for p in nets.disc.parameters()]
    return of_vqgan, of_disc

def test_neither_network_learns_from_the_others_loss():
    """y not detached in the discriminator's loss; gradients of the generator's loss left in the
    discriminator."""
    vqgan_alone, nothing = gradients(train_disc=False, use_gan=False)
    vqgan_watched, disc_alone = gradients(train_disc=True, use_gan=False)
    vqgan_gan, still_nothing = gradients(train_disc=False, use_gan=True)
    vqgan_both, disc_both = gradients(train_disc=True, use_gan=True)
    same(vqgan_watched, vqgan_alone)
    same(vqgan_both, vqgan_gan)
    same(disc_both, disc_alone)
    assert all(g is None for g in nothing + still_nothing)
    assert all(g.any() for g in disc_alone)
    assert not torch.equal(vqgan_gan[0], vqgan_alone[0])

def test_the_discriminator_cannot_ruin_the_reconstruction():
    """A limit that is computed and not used: the heavier --gan, the worse the videos."""
    class Video(torch.nn.Module):
        """A stage 1 whose reconstruction is a parameter: .grad of it is the gradient at y."""
        def __init__(self):
            super().__init__()
            self.y = torch.nn.Parameter(torch.zeros(2, 3, 8, 16, 16))
        def forward(self, x):
            return self.y * 1, None, dict(codebook=x.new_zeros(()), commitment=x.new_zeros(()))
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 16, 16) * 2 - 1
    nets = vqgan3d.Networks(Video(), [], None, Discriminator(8, 16, 4), None)
    def gradient(use_gan, fraction, **weights):
        nets.vqgan.zero_grad()
        vqgan3d.backward_losses(tiny_config(**weights), nets, x, None, False, use_gan, fraction,
                                FLOAT32_RUN)
        return nets.vqgan.y.grad.clone()
    rec = gradient(False, 1.0)
    assert torch.allclose(rec, -2 * x / x.numel())
    adversarial = gradient(True, 1.0, gan=1e6, feature=0.0, gan_ratio=0.3) - rec
    assert adversarial.norm().item() == pytest.approx(0.3 * rec.norm().item(), rel=1e-4)
    half = gradient(True, 0.5, gan=1e6, feature=0.0, gan_ratio=0.3)
    assert torch.allclose(half, (rec + adversarial) / 2)

# --------------------------------------------------------------------------------------------------
# the optimiser and the compiler

def test_muon_steps_are_orthogonal_and_downhill():
    """Coefficients mistyped, a transposed matrix, the sign of the step."""
    torch.manual_seed(0)
    for shape in ((16, 64), (24, 32)):
        values = torch.linalg.svdvals(vqgan3d.orthogonalize(torch.randn(shape)))
        assert 0.6 < values.min()
        assert values.max() < 1.3
    for shape in ((8, 4, 3, 3), (40, 8)):                                        # wide and tall
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        vqgan3d.Muon([p], lr=0.1).step()
        step = p.detach().flatten(1)
        values = torch.linalg.svdvals(step) / (0.1 * 0.2 * max(step.shape) ** 0.5)
        assert (step * p.grad.flatten(1)).sum() < 0
        assert 0.6 < values.min()
        assert values.max() < 1.3

def test_muon_skips_a_kernel_without_a_gradient():
    """A stack trace for a layer that a fork has frozen; momentum that goes on moving it."""
    frozen = torch.nn.Parameter(torch.ones(4, 4))
    trained = torch.nn.Parameter(torch.ones(4, 4))
    trained.grad = torch.randn(4, 4)
    vqgan3d.Muon([frozen, trained], lr=0.1).step()
    assert (frozen == 1).all()
    assert (trained != 1).any()

def test_newton_schulz_of_nearly_singular_matrices():
    """Too few digits on a GPU, or in the form for CPUs: singular values of 12 instead of 1."""
    left, _, right = torch.linalg.svd(torch.randn(64, 256).double(), full_matrices=False)
    values = torch.logspace(0, -3, 64).double()
    u = left * values / values.norm() @ right
    expected = vqgan3d.newton_schulz(u)
    assert torch.linalg.svdvals(expected).max() < 1.25
    on_cpu = vqgan3d.newton_schulz_on_cpu(u.float())
    assert (on_cpu - expected).norm() < 1e-3 * expected.norm()
    in_half = vqgan3d.newton_schulz(u.half()).double()
    assert (in_half - expected).norm() < 0.03 * expected.norm()

def test_every_parameter_is_in_exactly_one_optimiser():
    """A parameter that no optimiser moves, or two."""
    vqgan = tiny_vqgan()
    muon, adam = vqgan3d.make_optimizers(vqgan, 1e-3)
    of_muon = [id(p) for p in muon.param_groups[0]["params"]]
    of_adam = [id(p) for p in adam.param_groups[0]["params"]]
    assert sorted(of_muon + of_adam) == sorted(id(p) for p in vqgan.parameters())
    assert id(vqgan.quantizer.codebook) in of_adam

def test_learning_rate():
    """A warm-up that is not linear or not 2%, a cosine that does not end at zero."""
    assert vqgan3d.cosine_lr(0, 1000) == pytest.approx(1 / 21)
    assert vqgan3d.cosine_lr(10, 1000) == pytest.approx(11 / 21, rel=1e-3)
    assert vqgan3d.cosine_lr(500, 1000) == pytest.approx(0.5)
    assert vqgan3d.cosine_lr(1000, 1000) == pytest.approx(0)

def test_every_network_is_compiled_as_one_piece():
    """Blocks compiled one by one, as torch does with an nn.Sequential; more sizes than torch keeps
    compiled by default, so that the ninth runs uncompiled."""
    if not vqgan3d.set_up_compile("on", CPU):
        pytest.skip("no compiler here")
    graphs = []
    def keep_graph(graph, _):
        graphs.append(graph)
        return graph
    vqgan = tiny_vqgan()
    disc = Discriminator(8, 16, 4)
    vgg = vqgan3d.VGG16()
    config = diffusion.Config(width=16, mults=(1,), blocks=1, head_dim=16)
    unet = diffusion.UNet(config, channels=6, frames=4, size=4, num_classes=3)
    x = torch.linspace(-1, 1, 9 * 3 * 8 * 16 * 16).view(9, 3, 8, 16, 16).sin()
    def run_all():
        z = vqgan.encode(x[:2])
        outputs = [z, vqgan.decode(z), vgg(x[:2, :, 0], x[:2, :, 1])]
        outputs.append(unet(z, torch.arange(2), torch.arange(2)))
        for n in range(1, 10):
            logits, _ = disc(x[:n])
            outputs.append(logits)
        return outputs
    with torch.no_grad():
        plain = run_all()
        for module in (vqgan, disc, vgg, unet):
            module.compile(dynamic=False, backend=keep_graph)
        compiled = run_all()
    torch.compiler.reset()
    assert len(graphs) == 4 + 9
    for a, b in zip(plain, compiled):
        assert torch.allclose(a, b, atol=1e-5)

# --------------------------------------------------------------------------------------------------
# training

def short(clips, home, *flags):
    """Flags of a still shorter run. Of a flag that comes twice the second counts."""
    return ["--data", clips, "--data_dir", home, *STAGE1, "--out", "run", "--steps", 4,
            "--eval_every", 4, *flags]

def test_without_gan_and_feature_there_is_no_discriminator(stage1, clips, main):
    """A weight of zero that still costs a network."""
    assert main(vqgan3d, *short(clips, stage1.home, "--gan", 0, "--feature", 0)).code == 0
    assert load("run/vqgan.pt")["disc"] is None
    for row in read_log(Path("run/vqgan.pt")):
        assert not {"gan", "disc"} & set(row)

def test_training_on_crops(stage1, clips, main):
    """A flag that does nothing; a discriminator made for whole frames; a network that can then do
    nothing but crops."""
    def train(*flags):
        result = main(vqgan3d, *short(clips, stage1.home, "--fresh", *flags))
        assert result.code == 0, result.err
        return load("run/vqgan.pt")
    no_gan = ["--gan", 0, "--feature", 0]
    whole, crops = train(*no_gan), train(*no_gan, "--crop", 8)
    with pytest.raises(AssertionError):
        same(whole["model"], crops["model"])
    expected = Discriminator(frames=8, size=8, width=4).state_dict()
    found = train("--crop", 8)["disc"]
    assert {name: w.shape for name, w in found.items()} == {n: w.shape for n, w in expected.items()}
    vqgan = vqgan3d.load_vqgan("run/vqgan.pt")
    assert vqgan.encode(torch.zeros(1, 3, 8, 16, 16)).shape == (1, 6, 4, 4, 4)

def test_perceptual_loss_in_training(stage1, clips, main, vgg_file):
    """A loss that is not logged; VGG16 in the checkpoint or in the optimisers."""
    flags = short(clips, stage1.home, "--perceptual", 0.1, "--vgg", vgg_file)
    result = main(vqgan3d, *flags)
    assert result.code == 0, result.err
    rows = [row for row in read_log(Path("run/vqgan.pt")) if "mse" in row]
    assert rows
    assert all(row["perceptual"] > 0 for row in rows)
    assert Path("run/vqgan.pt").stat().st_size < 3e6                  # VGG16 alone has 59 MB

def test_vgg_offline_is_one_line_that_helps(stage1, clips, main, monkeypatch):
    """A stack trace of urllib, or training without the loss that was asked for."""
    def offline(url, **options):
        assert options["check_hash"]
        assert options["weights_only"]
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nmore lines")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    flags = short(clips, stage1.home, "--perceptual", 0.1)
    result = main(vqgan3d, *flags)
    assert result.code == 1
    for word in ("vgg16-397923af.pth", "https://download.pytorch.org", "--perceptual 0", "--vgg"):
        assert word in result.err
    Path("vgg.npz").write_text("not weights")
    assert "vgg.npz" in main(vqgan3d, *flags, "--vgg", "vgg.npz").err

# --------------------------------------------------------------------------------------------------
# resuming

def without_timing(rows):
    for row in rows:
        for name in ("seconds_a_step", "waiting", "memory_gb"):
            row.pop(name, None)
    return rows

def assert_as_undisturbed(path, undisturbed):
    """Checkpoint and log at a path must be those of a run that nothing happened to."""
    same(load(path), load(undisturbed))
    assert without_timing(read_log(path)) == without_timing(read_log(undisturbed))

@pytest.mark.parametrize("step", [3, 47])                # before the codes are used; with the GAN
def test_resume_is_exact_to_the_bit(stage1, main, stop_at, step):
    """An optimiser, the discriminator, the codebook's state, the learning rate or a random draw
    that a resumed run lacks."""
    stop_at(vqgan3d, step)
    result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 0
    assert f"stopped after step {step + 1} and saved run/vqgan.pt" in result.out
    assert load("run/vqgan.pt")["step"] == step + 1
    result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 0
    assert f"resuming run/vqgan.pt at step {step + 1}" in result.out
    assert_as_undisturbed(Path("run/vqgan.pt"), stage1.path)

@pytest.mark.parametrize("step", [19, 59])               # amid the training; the last one
def test_a_stop_before_an_evaluation_does_not_lose_it(stage1, main, stop_at, step):
    """Neither the stopped run nor the one that goes on makes it: its row is not in the log, and the
    pictures are those of an older step."""
    stop_at(vqgan3d, step)
    assert main(vqgan3d, *stage1.flags, "--out", "run").code == 0
    assert load("run/vqgan.pt")["step"] == step + 1
    assert main(vqgan3d, *stage1.flags, "--out", "run").code == 0
    assert_as_undisturbed(Path("run/vqgan.pt"), stage1.path)
    assert Path("run/vqgan.gif").read_bytes() == (stage1.home / "run/vqgan.gif").read_bytes()

def test_sigterm_saves_and_the_same_command_goes_on(stage1, main, tmp_path):
    """The same of a real process, stopped wherever the signal finds it."""
    log = tmp_path / "run" / "vqgan.jsonl"
    process = launch("vqgan3d.py", *stage1.flags, "--out", "run", cwd=tmp_path)
    while process.poll() is None and not (log.exists() and "mse" in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after step" in out.splitlines()[-1]
    assert "the same command goes on" in out.splitlines()[-1]
    assert main(vqgan3d, *stage1.flags, "--out", "run").code == 0
    assert_as_undisturbed(tmp_path / "run" / "vqgan.pt", stage1.path)

def test_a_finished_run_repeated_changes_nothing_and_fresh_starts_anew(stage1, clips, main):
    """A second run of the same command that trains on, or writes its evaluation again; --fresh that
    does nothing."""
    def contents():
        return {path.name: path.read_bytes() for path in Path("run").iterdir()}
    flags = short(clips, stage1.home)
    assert main(vqgan3d, *flags).code == 0
    before = contents()
    result = main(vqgan3d, *flags)
    assert result.code == 0
    assert "done: run/vqgan.pt" in result.out
    assert contents() == before
    result = main(vqgan3d, *flags, "--fresh", "--seed", 1)
    assert result.code == 0
    assert "resuming" not in result.out
    assert contents()["vqgan.pt"] != before["vqgan.pt"]
    assert len(read_log(Path("run/vqgan.pt"))) == before["vqgan.jsonl"].count(b"\n")

@pytest.mark.parametrize("term", ["feature", "gan"])
def test_the_term_that_broke_is_named_and_the_last_good_step_remains(stage1, main, monkeypatch,
                                                                     term):
    """Losses looked at every 20 steps: by then all are broken, as the weights were NaN one step
    later. And a log that, cut to what it was at step 40, lacks the evaluation of that step."""
    generator_loss = vqgan3d.generator_loss
    step = itertools.count(36)                                        # gan_start is 0.6 of 60 steps
    def break_at_45(*args):
        losses = generator_loss(*args)
        if next(step) == 45:
            losses[term] = losses[term] * math.nan
        return losses
    with monkeypatch.context() as patch:
        patch.setattr(vqgan3d, "generator_loss", break_at_45)
        result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 1
    assert f"step 45: {term} is not finite" in result.err
    assert "run/vqgan.pt still holds the last good step" in result.err
    assert load("run/vqgan.pt")["step"] == 40
    assert main(vqgan3d, *stage1.flags, "--out", "run").code == 0
    assert_as_undisturbed(Path("run/vqgan.pt"), stage1.path)

def test_steps_given_where_a_fraction_is_meant_are_refused(clips, stage1, main):
    """--gan_start 10000, as in other code: it would never begin, without a word."""
    result = main(vqgan3d, *short(clips, stage1.home), "--gan_start", 10000)
    assert result.code == 1
    assert "--gan_start: 10000 is not a fraction" in result.err

def test_a_run_that_diverges_never_replaces_a_checkpoint(stage1, clips, main):
    """A run that breaks between two looks at its losses, saves what is left at the next evaluation,
    and says "done"."""
    flags = short(clips, stage1.home, "--lr", 1e30, "--steps", 15, "--eval_every", 5)
    result = main(vqgan3d, *flags)
    assert result.code == 1
    assert "not finite" in result.err
    assert "--lr" in result.err
    assert not Path("run/vqgan.pt").exists()

# --------------------------------------------------------------------------------------------------
# checkpoints

def new_run(folder):
    """The Run of a training in a folder."""
    return data.Run(folder / "vqgan", vqgan3d.Config(device="cpu", dtype="float32"))

def test_a_checkpoint_with_nan_in_any_network_is_not_written(tmp_path):
    """A discriminator that broke while it learnt alone: the autoencoder's losses are fine."""
    broken = torch.tensor([1, math.nan])
    with pytest.raises(data.UserError, match="step 7: w is not finite; nothing was saved yet"):
        new_run(tmp_path).save(7, model=dict(w=torch.ones(2)), disc=dict(w=broken))
    assert not list(tmp_path.glob("vqgan.pt*"))

def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Half a checkpoint in the place of the last good one."""
    run = new_run(tmp_path)
    run.save(1, model={})
    def write_half(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(data.UserError, match="No space left"):
        run.save(2, model={})
    assert load(tmp_path / "vqgan.pt")["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))

def test_two_processes_do_not_train_into_one_folder(stage1, main, tmp_path):
    """Two runs that overwrite each other's checkpoints; a lock that is not freed at the end."""
    run = new_run(tmp_path / "run")
    result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 1
    assert "another process is writing run/vqgan.pt" in result.err
    run.lock.close()                                                  # the system does it at an end
    new_run(tmp_path / "run")

def test_a_checkpoint_of_other_flags_is_refused(stage1, main):
    """A checkpoint of another network, or of other losses, taken for one of this run."""
    Path("run").mkdir()
    Path("run/vqgan.pt").write_bytes(stage1.path.read_bytes())
    result = main(vqgan3d, *stage1.flags, "--out", "run", "--codes", 32)
    assert result.code == 1
    assert "--codes 16 (now 32)" in result.err
    assert "--fresh" in result.err
    assert Path("run/vqgan.pt").read_bytes() == stage1.path.read_bytes()

class Payload:
    """Its pickle creates a file when it is loaded carelessly."""
    def __reduce__(self):
        return Path.touch, (Path("executed"),)

@pytest.mark.parametrize("kind", ["truncated", "empty", "hostile"])
def test_unusable_checkpoints_are_refused_in_one_line(stage1, main, kind):
    """A stack trace; code that is executed when a checkpoint is read."""
    path = Path("run/vqgan.pt")
    path.parent.mkdir()
    if kind == "hostile":
        torch.save(dict(config={}, step=1, model=Payload()), path)
    else:
        content = stage1.path.read_bytes()
        path.write_bytes(content[:len(content) // 2] if kind == "truncated" else b"")
    result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 1
    assert "run/vqgan.pt is not a usable checkpoint" in result.err
    assert "--fresh" in result.err
    assert not Path("executed").exists()

def test_a_checkpoint_of_another_network_is_refused_in_one_line(stage1, tmp_path):
    """A stack trace where the code was changed since the checkpoint was written."""
    checkpoint = load(stage1.path)
    del checkpoint["model"]["quantizer.usage"]
    torch.save(checkpoint, tmp_path / "vqgan.pt")
    with pytest.raises(data.UserError, match="the stage 1 in .* does not fit the code"):
        vqgan3d.load_vqgan(tmp_path / "vqgan.pt")

# --------------------------------------------------------------------------------------------------
# flags

@pytest.mark.parametrize("flags, words", [
    ("--size 18", "18 x 18 cannot be divided by --down 2,4,4"),
    ("--crop 10", "10 x 10 cannot be divided"),
    ("--crop 32", "larger than the videos"),
    ("--frames 7", "7 frames"),
    ("--down 2,4", "three powers of two"),
    ("--down 2,3,4", "three powers of two"),
    ("--down 4,four,4", "invalid ints value"),
    ("--lr fast", "invalid float value: 'fast'"),
    ("--stepz 3", "did you mean --steps?"),
    ("--dtype half", "must be auto, float32, bfloat16 or float16"),
    ("--device tpu9", "Try --device cpu"),
    ("--data nowhere", "nor a folder"),
    ("--steps 0", "--steps: 0 is too small"),
    ("--batch_size 0", "--batch_size: 0 is too small"),
    ("--eval_every 0", "--eval_every: 0 is too small"),
    ("--eval_clips 0", "--eval_clips: 0 is too small"),
    ("--grad_accum_steps 0", "--grad_accum_steps: 0 is too small"),
    ("--grad_accum_steps 3", "cannot be divided among 1 process(es) x --grad_accum_steps 3")])
def test_wrong_flags_end_in_one_line(stage1, main, flags, words):
    """A stack trace, a flag that does nothing, or "done" without a checkpoint."""
    result = main(vqgan3d, *stage1.flags, "--out", "run", *flags.split())
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert words in result.err
