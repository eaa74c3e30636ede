"""Stage 1: network, quantiser, losses, optimisers. Each test names the bug that it catches."""
import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import vqgan3d
from conftest import STAGE1, load, read_log, same

def tiny_vqgan(**changes):
    torch.manual_seed(0)
    tiny = dict(size=16, frames=8, down=(2, 4, 4), width=8, blocks=1, codes=16)
    return vqgan3d.VQGAN(vqgan3d.Config(**tiny | changes))

def shake(network, size):
    """Add random numbers to all parameters: some start at zero, and hide what comes before them."""
    for p in network.parameters():
        p.data.add_(torch.randn_like(p) * size)

def test_patches_are_cut_and_put_back():
    """Axes exchanged in one direction, or in both, where there and back would not show it; frames
    of the decoder that stand still for two, then jump, or are shifted by half a frame."""
    x = torch.randn(2, 4, 6, 8, 3)                                    # (B, T, H, W, C)
    down = vqgan3d.PatchDown(3, 72, (2, 3, 4))
    down.proj = torch.nn.Identity()
    y = down(x)
    assert y.shape == (2, 2, 2, 2, 72)
    assert torch.equal(y[:, 1, 0, 1], x[:, 2:4, 0:3, 4:8].flatten(1))
    down, up = vqgan3d.PatchDown(3, 36, (1, 3, 4)), vqgan3d.PatchUp(36, 3, (3, 4))
    down.proj = up.proj = torch.nn.Identity()
    assert torch.equal(up(down(x)), x)
    times = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 2, 1)
    found = vqgan3d.TimeUp()(times)[0, :, 0, 1, 0]
    assert found.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]

@pytest.mark.parametrize("down", [(1, 4, 4), (4, 8, 8), (8, 2, 4), (1, 1, 1)])
def test_down_is_the_shape_of_the_latent(down):
    """A downsampling that is right for 4,4,4 only, or time and height exchanged."""
    vqgan = tiny_vqgan(down=down)
    z = vqgan.encode(torch.randn(1, 3, 8, 16, 16))
    assert z.shape == (1, 6, 8 // down[0], 16 // down[1], 16 // down[2])
    assert z.shape[1:] == vqgan.latent_shape()
    assert (vqgan.latent_frames(8), vqgan.video_frames(z.shape[2])) == (z.shape[2], 8)
    assert vqgan.decode(z).shape == (1, 3, 8, 16, 16)

def test_decoder_is_a_function_of_the_codes_alone():
    """Dropout, batch statistics or noise in the decoder; a video that changes another one of its
    batch; statistics over time or space, so that a frame depends on the length of the video."""
    vqgan = tiny_vqgan()
    shake(vqgan, 0.02)
    z = torch.randn(3, 6, 14, 4, 4)
    y = vqgan.train().decode(z)
    assert torch.equal(y, vqgan.eval().decode(z))
    assert torch.allclose(vqgan.decode(z[1:2]), y[1:2], atol=1e-5)
    assert torch.allclose(vqgan.decode(z[:, :, :11])[:, :, :8], y[:, :, :8], atol=1e-5)

@pytest.mark.parametrize("frames", [2, 8])
def test_bfloat16_gradients_are_those_of_float32(frames):
    """oneDNN's bfloat16 gradients of a convolution over two frames: absurd values."""
    vqgan = tiny_vqgan(frames=frames)
    shake(vqgan, 0.05)
    x = torch.rand(2, 3, frames, 16, 16) * 2 - 1
    gradients = []
    for use_bf16 in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            y, _, _ = vqgan(x)
        vqgan.zero_grad()
        (y - x).square().mean().backward()
        found = [p.grad.flatten() for p in vqgan.parameters() if p.grad is not None]
        gradients.append(torch.cat(found))
    bf16, float32 = gradients
    assert (bf16 - float32).norm() < 0.1 * float32.norm()

def tiny_quantizer():
    """A quantiser that has started, all of its 32 codes in use."""
    torch.manual_seed(0)
    quantizer = vqgan3d.Quantizer(32, 4)
    quantizer.started = True
    quantizer.usage.fill_(1)
    return quantizer

def test_quantiser_takes_the_nearest_code():
    """A distance without one of its terms; codes in another order than the positions."""
    quantizer = tiny_quantizer().eval()
    z = torch.randn(2, 4, 3, 20, 20)
    z_q, codes, _ = quantizer(z)
    flat = z.movedim(1, -1).reshape(-1, 4)
    nearest = torch.cdist(flat.double(), quantizer.codebook.double()).argmin(1)
    assert torch.equal(codes, nearest.view(2, 3, 20, 20))
    assert torch.allclose(z_q, quantizer.codebook[codes].movedim(-1, 1), atol=1e-6)

def test_codebook_loss_moves_codes_and_commitment_moves_latents():
    """detach() on the wrong term; a gradient that does not go straight through."""
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
    """Initialised anew after loading: a resumed run loses its codebook at the first step."""
    quantizer = vqgan3d.Quantizer(32, 4)
    z = torch.randn(2, 4, 2, 4, 4)
    z_q, _, losses = quantizer(z)
    assert z_q is z                                                   # not started: latents pass
    assert losses["codebook"] == 0
    quantizer.started = True
    quantizer(z + 20)
    assert (quantizer.codebook.mean() - 20).abs() < 1                 # started from latents
    loaded = vqgan3d.Quantizer(32, 4)
    loaded.load_state_dict(quantizer.state_dict())
    loaded.started = True
    loaded(z - 20)
    assert torch.equal(loaded.codebook, quantizer.codebook)
    assert not torch.equal(loaded.usage, quantizer.usage)

def test_reconstruction_loss():
    """A sum instead of a mean; frames of the video compared with other frames of its
    reconstruction, or the same frame taken from every clip."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 3, 4, 5, 5)
    frame = torch.tensor([2, 0, 3])
    pairs = []
    losses = vqgan3d.reconstruction_loss(x, y, lambda *frames: pairs.append(frames), frame)
    assert losses["mse"].item() == pytest.approx(((x - y) ** 2).mean().item())
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
    assert torch.allclose(disc["disc"], -(D_real.log().mean() + (1 - D_fake).log().mean()))
    assert torch.allclose(disc["D_real"], D_real.mean())
    assert torch.allclose(disc["D_fake"], D_fake.mean())
    real_features = [torch.randn(5, 3), torch.randn(5, 2, 2)]
    fake_features = [torch.randn(5, 3), torch.randn(5, 2, 2)]
    losses = vqgan3d.generator_loss(fake, fake_features, real_features)
    assert torch.allclose(losses["gan"], -D_fake.log().mean())
    distances = [(a - b).abs().mean() for a, b in zip(real_features, fake_features)]
    assert torch.allclose(losses["feature"], (distances[0] + distances[1]) / 2)

def test_adversarial_gradient_is_limited_and_a_short_one_is_not_changed():
    """A gradient made as long as the limit even if it is shorter; another direction."""
    torch.manual_seed(0)
    rec, adv = torch.randn(2, 2, 3, 4, 5, 5)
    assert torch.equal(vqgan3d.join_gradients(rec, adv * 0.1, 0.3), rec + adv * 0.1)
    limited = adv * (0.3 * rec.norm() / adv.norm())
    for scale in (1, 1000):
        joined = vqgan3d.join_gradients(rec, adv * scale, 0.3)
        assert torch.allclose(joined, rec + limited, atol=1e-5)
    assert torch.equal(vqgan3d.join_gradients(rec, torch.zeros_like(adv), 0.3), rec)

@pytest.fixture
def random_vgg(monkeypatch):
    """VGG16 of random weights in the place of the download."""
    torch.manual_seed(0)
    weights = {f"features.{k}": v for k, v in vqgan3d.VGG16().features.state_dict().items()}
    weights["classifier.0.weight"] = torch.zeros(2)                   # of the file, not of VGG16
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **_: weights)

def test_perceptual_network_is_frozen_and_differentiable(random_vgg, short):
    """A network that is trained too, or saved; no gradient to the reconstruction; no log."""
    vgg = vqgan3d.load_vgg()
    assert not vgg.training
    assert not any(p.requires_grad for p in vgg.parameters())
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    assert vgg(x, x).item() == 0
    loss = vgg(x, y)
    assert loss.item() > 0
    gradient, = torch.autograd.grad(loss, y)
    assert gradient.flatten(1).any(1).all()
    short("--perceptual", 0.1)
    rows = [row for row in read_log(Path("run/vqgan.pt")) if "mse" in row]
    assert all(row["perceptual"] > 0 for row in rows)
    assert Path("run/vqgan.pt").stat().st_size < 3e6                  # VGG16 alone has 59 MB

def test_evaluation_of_a_known_error(monkeypatch):
    """PSNR of the range 2 instead of 255; exp of an entropy in bits; parts of the clips left out;
    the original under its reconstruction; a network that is left in eval mode."""
    class TenLevelsBrighter(torch.nn.Module):
        """Adds 10 of 255 grey levels, and uses 2 of 8 codes."""
        def __init__(self):
            super().__init__()
            self.quantizer = vqgan3d.Quantizer(8, 4)
        def forward(self, x):
            assert not self.training
            codes = torch.arange(len(x) * 4).view(len(x), 1, 2, 2) % 2
            return x + 10 / 127.5, codes, {}
    clips = torch.randint(20, 200, (10, 3, 16, 16, 3), dtype=torch.uint8)
    network, pairs = TenLevelsBrighter(), []
    monkeypatch.setattr(vqgan3d, "save_grid", lambda path, videos, columns: pairs.append(videos))
    scores = vqgan3d.evaluate_and_preview(network, clips, contextlib.nullcontext, 4, Path("a.gif"))
    expected = dict(psnr=20 * math.log10(25.5), codes_used=0.25, perplexity=2)
    assert scores == pytest.approx(expected, rel=1e-5)
    assert network.training
    above, below = np.split(pairs[0].astype(int), 2, 2)
    assert (above == clips[:8].numpy()).all()
    assert (below - above == 10).all()

def test_muon_steps_are_orthogonal_and_downhill():
    """Coefficients mistyped, a transposed matrix, the sign of the step, too few digits, matrices
    that get each other's step."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(64, 256), full_matrices=False)
    u = left * torch.logspace(0, -3, 64) @ right
    for found in vqgan3d.orthogonalize([u, u.T]):
        assert torch.linalg.svdvals(found).max() < 1.3
    frozen = torch.nn.Parameter(torch.ones(4, 4))                     # has no gradient, and stays
    shapes = (8, 4, 3, 3), (40, 8), (8, 8), (3, 5)                               # wide and tall
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    vqgan3d.Muon([frozen, *params], lr=0.1).step()
    assert (frozen == 1).all()
    for p in params:
        step = -p.detach().flatten(1)
        left, _, right = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
        values = torch.linalg.svdvals(step) / (0.1 * 0.2 * max(step.shape) ** 0.5)
        assert (step * (left @ right)).sum() > 0.9 * (step.norm() * (left @ right).norm())
        assert 0.6 < values.min()
        assert values.max() < 1.3

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

@pytest.fixture
def short(stage1, main):
    """short(*flags): a run of four steps -> its checkpoint"""
    def short(*flags):
        main(vqgan3d, *stage1.flags, "--out", "run", "--steps", 4, "--eval_every", 4, "--fresh",
             *flags)                                                  # the last one counts
        return load("run/vqgan.pt")
    return short

def test_stage_1_learns_and_says_so(stage1):
    """A loop that runs and learns nothing; a loss that is not logged; phases that begin at other
    steps than announced; progress pictures that are not written."""
    log = read_log(stage1.path)
    scores = {row["step"]: row for row in log if "psnr" in row}
    assert list(scores) == [0, 20, 40, 60]
    assert scores[60]["psnr"] > scores[0]["psnr"] + 1
    assert scores[60]["codes_used"] > 1 / 16
    losses = {row["step"]: row for row in log if "mse" in row}
    assert list(losses) == [0, 20, 40]
    assert {"codebook", "commitment", "dead_codes"} <= set(losses[0])
    assert "disc" not in losses[20]                                   # which begins at 60 x 0.5
    assert {"gan", "feature", "disc", "D_real", "D_fake"} <= set(losses[40])
    assert losses[0]["codebook"] == 0                                 # codes begin at 60 x 0.1
    assert losses[20]["codebook"] > 0
    assert stage1.path.with_suffix(".gif").exists()
    assert not list(stage1.path.parent.glob("*.tmp"))

def test_neither_network_learns_from_the_others_loss(short):
    """y not detached in the discriminator's loss; gradients of the generator's loss left in the
    discriminator; a limit --gan_ratio that is computed and not used."""
    alone = short("--gan", 0, "--feature", 0)
    watched = short("--disc_start", 0, "--gan_start", 1)
    limited = short("--disc_start", 0, "--gan_start", 0, "--gan_ratio", 0)
    taught = short("--disc_start", 0, "--gan_start", 0)
    same(watched["model"], alone["model"])
    same(limited["model"], alone["model"])
    same(limited["disc"], watched["disc"])
    weight = "decoder.0.weight"
    assert not torch.equal(taught["model"][weight], alone["model"][weight])
    moved = [not torch.equal(alone["disc"][name], w) for name, w in watched["disc"].items()]
    assert all(moved)

def test_training_on_crops(short, monkeypatch):
    """A flag that does nothing; a discriminator made for whole frames, or too small for squares
    of any size; a network that can then do nothing but crops."""
    shapes, forward = set(), vqgan3d.Discriminator.forward
    def record(self, x):
        shapes.add(x.shape[1:])
        return forward(self, x)
    monkeypatch.setattr(vqgan3d.Discriminator, "forward", record)
    short("--crop", 12, "--disc_start", 0)
    assert shapes == {(3, 8, 12, 12)}
    vqgan = vqgan3d.load_vqgan("run/vqgan.pt")
    assert vqgan.encode(torch.zeros(1, 3, 8, 16, 16)).shape == (1, 6, 4, 4, 4)

def test_a_loaded_stage_1_quantises_if_its_codebook_is_trained(short):
    """A codebook that is not used after loading; one that is used although it was never trained."""
    for vq_start in (0, 1.5):
        short("--vq_start", vq_start)
        assert vqgan3d.load_vqgan("run/vqgan.pt").quantizer.started == (vq_start == 0)

def test_vgg_offline_is_one_line_that_helps(stage1, main, monkeypatch):
    """A stack trace of urllib, or training without the loss that was asked for."""
    def offline(url, check_hash, weights_only):
        assert check_hash is weights_only is True
        raise OSError("<urlopen error [Errno -2] Name or service not known>")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    result = main(vqgan3d, *stage1.flags, "--out", "run", "--perceptual", 0.1, code=1)
    for word in ("https://download.pytorch.org/models/vgg16-397923af.pth", "--perceptual 0"):
        assert word in result.err

@pytest.mark.parametrize("flags, words", [
    ("--size 18", "--down 2,4,4 must be powers of two that divide"),
    ("--crop 10", "--down 2,4,4 must"), ("--crop 24", "a crop is not larger"),
    ("--frames 7", "--down 2,4,4 must"),
    ("--down 2,3,4", "--down 2,3,4 must be powers of two"),
    ("--grad_accum_steps 3", "cannot be divided among 1 process(es) x --grad_accum_steps 3")])
def test_sizes_that_do_not_fit_end_in_one_line(stage1, main, flags, words):
    """A stack trace about the shapes of two tensors."""
    result = main(vqgan3d, *stage1.flags, "--out", "run", *flags.split(), code=1)
    assert words in result.err
