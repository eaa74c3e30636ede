"""Stage 1: quantiser, losses, who learns from what, resuming, refusals. Each test names the bug that it would catch."""
import json, math, signal, time, types
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import diffusion, sample, vqgan3d
from conftest import STAGE1, launch, same, script
from vqgan3d import VQGAN, Config, Discriminator, Down, Quantizer, Up

def tiny(**changes):
    torch.manual_seed(0)
    return VQGAN(Config(**{**dict(size=16, frames=8, down=(2, 4, 4), width=8, blocks=1, codes=16), **changes}))

def quantizer(codes=32, D=4):
    """A started quantiser whose codes are all in use."""
    torch.manual_seed(0)
    q = Quantizer(codes, D)
    q.started.fill_(True)
    q.usage.fill_(1)
    return q

def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

# ---- the network ----

def test_patches_are_cut_and_put_back():
    """Axes exchanged in one of the two directions, or in both, where a round trip would not show it."""
    x, p = torch.randn(2, 3, 4, 6, 8), (2, 3, 4)
    down, up = Down(3, 72, p), Up(72, 3, p)
    down.proj = up.proj = torch.nn.Identity()
    y = down(x)
    assert y.shape == (2, 72, 2, 2, 2) and torch.equal(up(y), x)
    assert torch.equal(y[:, :, 1, 0, 1], x[:, :, 2:4, 0:3, 4:8].movedim(1, -1).flatten(1))

@pytest.mark.parametrize("down", [(1, 4, 4), (4, 8, 8), (8, 2, 4), (1, 1, 1)])
def test_down_is_the_shape_of_the_latent(down):
    """A downsampling that holds for 4,4,4 only, or time and height exchanged."""
    vqgan = tiny(down=down)
    z = vqgan.encode(torch.randn(1, 3, 8, 16, 16))
    assert z.shape == (1, 6, 8 // down[0], 16 // down[1], 16 // down[2])
    assert vqgan.decode(z).shape == (1, 3, 8, 16, 16)

@pytest.mark.parametrize("down, blocks", [((4, 4, 4), 2), ((2, 8, 8), 1), ((1, 4, 4), 2)])
def test_long_videos_are_decoded_without_seams(down, blocks, monkeypatch):
    """A decoder fed with parts that are too short: every part begins with a jump."""
    torch.manual_seed(0)
    vqgan = VQGAN(Config(down=down, width=8, blocks=blocks, frames=4 * down[0], size=16)).eval()
    for p in vqgan.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    z = torch.randn(1, 6, 23, 16 // down[1], 16 // down[2])
    whole = vqgan.decode(z)
    assert whole.shape[2] == 23 * down[0]
    system, (halo, rate) = types.SimpleNamespace(vqgan=vqgan, decode=vqgan.decode), sample.reach(vqgan.decoder)
    assert rate == down[0] and torch.allclose(sample.decode_long(system, z, 5), whole, atol=1e-4)
    monkeypatch.setattr(sample, "reach", lambda decoder: (halo - 1, rate))         # and it is no wider than it must be
    assert not torch.allclose(sample.decode_long(system, z, 5), whole, atol=1e-4)

def test_decoder_is_a_function_of_the_codes_alone():
    """Dropout, batch statistics or noise in the decoder; one video that leaks into the next of its batch."""
    vqgan = tiny()
    for p in vqgan.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    z = torch.randn(3, 6, 4, 4, 4)
    y = vqgan.train().decode(z)
    assert torch.equal(y, vqgan.decode(z)) and torch.equal(y, vqgan.eval().decode(z))
    assert torch.allclose(vqgan.decode(z[1:2]), y[1:2], atol=1e-5)

@pytest.mark.parametrize("shape", [dict(frames=2), dict(frames=4), dict(frames=8), dict(frames=16, size=128, down=(4, 4, 4), width=32)], ids=str)
def test_bfloat16_gradients_are_those_of_float32(shape):
    """Gradients of a convolution over two frames, and of a wide one of 1x1x1 on CPUs with AMX, are not numbers, or absurd ones,
    in bfloat16 (oneDNN)."""
    vqgan, grads = tiny(**shape), []
    x = torch.rand(2, 3, vqgan.config.frames, vqgan.config.size, vqgan.config.size) * 2 - 1
    for p in vqgan.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    for low in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = vqgan(x)[0]
        vqgan.zero_grad()
        (y - x).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in vqgan.parameters() if p.grad is not None]))
    assert grads[0].isfinite().all() and (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()

# ---- the quantiser ----

def test_quantiser_takes_the_nearest_code():
    """A distance that lacks a term or has the wrong sign; codes in another order than the positions."""
    q = quantizer().eval()
    z = torch.randn(2, 4, 3, 5, 6)
    z_q, codes, _ = q(z)
    nearest = torch.cdist(z.movedim(1, -1).reshape(-1, 4).double(), q.codebook.double()).argmin(1)
    assert torch.equal(codes.flatten(), nearest) and codes.shape == (2, 3, 5, 6)
    assert torch.allclose(z_q, q.codebook[codes].movedim(-1, 1), atol=1e-6)

def test_codebook_loss_moves_codes_and_commitment_moves_latents():
    """The detach on the wrong term: the commitment weight then acts on the codes; and a broken straight-through gradient."""
    q = quantizer()
    z = torch.randn(2, 4, 2, 3, 3, requires_grad=True)
    z_q, codes, (codebook, commitment) = q(z)
    assert codebook.item() == pytest.approx(F.mse_loss(z_q, z).item(), rel=1e-4) == pytest.approx(commitment.item())
    grad = lambda loss: torch.autograd.grad(loss, [z, q.codebook], retain_graph=True, allow_unused=True)
    to_z, to_codes = grad(codebook)
    assert (to_z is None or not to_z.any()) and to_codes[codes.unique()].any(1).all()
    to_z, to_codes = grad(commitment)
    assert to_z.any() and (to_codes is None or not to_codes.any())
    weight = torch.randn_like(z)
    to_z, to_codes = grad((z_q * weight).sum())
    assert torch.equal(to_z, weight) and (to_codes is None or not to_codes.any())

def test_dead_codes_restart_from_data_and_living_ones_stay():
    """A codebook that collapses; a restart that overwrites codes in use, or that happens in evaluation."""
    q = quantizer()
    q.usage[::2] = 0.01
    before, z = q.codebook.detach().clone(), torch.randn(2, 4, 2, 4, 4) + 20
    q.eval()(z)
    assert torch.equal(q.codebook, before)
    q.train()(z)
    assert torch.equal(q.codebook[1::2], before[1::2])
    flat = z.movedim(1, -1).reshape(-1, 4)
    assert torch.cdist(q.codebook[::2].detach(), flat).min(1)[0].max() < 0.2 and (q.usage > 0.5).all()

def test_quantiser_starts_once_and_never_again_after_loading():
    """"Needs initialisation" as a plain attribute: a resumed run throws its codebook away at its first step."""
    q = Quantizer(32, 4)
    z = torch.randn(2, 4, 2, 4, 4)
    assert q(z)[0] is z and q(z)[2][0] == 0 and not q.started                      # not started: the latents pass
    q.started.fill_(True)
    q(z + 20)
    assert (q.codebook.mean() - 20).abs() < 1                                      # started from data
    loaded = Quantizer(32, 4)
    loaded.load_state_dict(q.state_dict())
    loaded(z - 20)
    assert loaded.started and torch.equal(loaded.codebook, q.codebook)
    assert {"started", "usage"} <= set(q.state_dict()) and not torch.equal(loaded.usage, q.usage)

# ---- the compiler ----

def test_every_network_is_compiled_as_one_piece():
    """Blocks compiled one by one, as torch does with an nn.Sequential; a ninth size that runs uncompiled."""
    graphs = []
    assert vqgan3d.compiles("on", torch.device("cpu")) or pytest.skip("no compiler here")
    vqgan, disc, vgg = tiny(), Discriminator(8, 16, 4), vqgan3d.VGG16()
    unet = diffusion.UNet(diffusion.Config(width=16, mults=(1, 2), blocks=1, head_dim=16, attention=64), 6, 4, 4, 3)
    x = torch.linspace(-1, 1, 10 * 3 * 8 * 16 * 16).view(10, 3, 8, 16, 16).sin()
    def run():
        z = vqgan.encode(x[:2])
        return z, vqgan.decode(z), vgg(x[:2, :, 0], x[:2, :, 1]), unet(z, torch.arange(2), torch.arange(2)), *(disc(x[:n + 1])[0] for n in range(10))
    with torch.no_grad():
        plain = run()
        for module in (vqgan, disc, vgg, unet):
            module.compile(dynamic=False, backend=lambda graph, _: graphs.append(graph) or graph)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(run(), plain)) and len(graphs) == 4 + 10
    torch.compiler.reset()

# ---- the optimiser ----

def test_muon_steps_are_orthogonal_and_downhill():
    """Coefficients mistyped, a transposed matrix, the sign of the step."""
    torch.manual_seed(0)
    for shape in ((16, 64), (24, 32)):
        s = torch.linalg.svdvals(vqgan3d.orthogonalise(torch.randn(shape)))
        assert 0.6 < s.min() and s.max() < 1.3
    for shape in ((8, 4, 3, 3), (40, 8)):                                          # wide and tall
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        vqgan3d.Muon([p], lr=0.1).step()
        step = p.detach().flatten(1)
        s = torch.linalg.svdvals(step) / (0.1 * 0.2 * max(step.shape) ** 0.5)
        assert (step * p.grad.flatten(1)).sum() < 0 and 0.6 < s.min() and s.max() < 1.3

def test_every_parameter_is_in_exactly_one_optimiser():
    """A parameter that nobody moves, or two."""
    vqgan = tiny()
    muon, adam = vqgan3d.optimisers(vqgan, 1e-3)
    held = [id(p) for opt in (muon, adam) for group in opt.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in vqgan.parameters())
    assert id(vqgan.quantizer.codebook) in [id(p) for p in adam.param_groups[0]["params"]]

# ---- the game ----

def short(clips, home, *flags):
    """Flags of a still shorter run; the later of two flags counts."""
    return ["--data", clips, "--data_dir", home, *STAGE1, "--out", "run", "--steps", 4, "--eval_every", 4, *flags]

def test_neither_player_learns_from_the_others_loss(stage1, clips, main):
    """y not detached in the discriminator's loss; the generator's loss left in the discriminator's gradients."""
    def trained(*flags):
        assert main(vqgan3d, *short(clips, stage1.home, "--vq_start", 0.25, "--fresh", *flags)).code == 0
        return torch.load("run/vqgan.pt", weights_only=True)
    neither = trained("--disc_start", 1, "--gan_start", 1)
    judge, player = trained("--disc_start", 0.25, "--gan_start", 1), trained("--disc_start", 1, "--gan_start", 0.25)
    same(judge["model"], neither["model"])                                         # the discriminator learns, the autoencoder does not notice
    same(player["disc"], neither["disc"])                                          # and the other way round
    with pytest.raises(AssertionError):
        same(judge["disc"], neither["disc"])
    with pytest.raises(AssertionError):
        same(player["model"], neither["model"])

def test_the_discriminators_arrival_does_not_wreck_the_reconstruction(stage1, clips, main):
    """However heavy its weight, its gradient stays shorter than that of the pixels."""
    result = main(vqgan3d, *short(clips, stage1.home, "--steps", 60, "--eval_every", 30, "--disc_start", 0, "--gan_start", 0.5,
                                  "--gan", 1e4, "--feature", 0, "--disc_lr", 2e-3))
    assert result.code == 0, result.err
    before, after = (r["psnr"] for r in rows(Path("run/vqgan.jsonl")) if r["step"] in (30, 60) and "psnr" in r)
    assert after > before                                                          # with no limit 0.6 dB are lost, with it 0.8 won

def test_without_gan_and_feature_there_is_no_discriminator(stage1, clips, main):
    """A weight of zero that still costs a network."""
    assert main(vqgan3d, *short(clips, stage1.home, "--gan", 0, "--feature", 0)).code == 0
    state = torch.load("run/vqgan.pt", weights_only=True)
    assert state["disc"] is None and not {"gan", "disc"} & set().union(*rows(Path("run/vqgan.jsonl")))

@pytest.mark.parametrize("shape", [(16, 32), (8, 16), (2, 64), (20, 48)])
def test_discriminator_gives_one_logit_for_any_size(shape):
    """A head that fits 16 x 128 x 128 only."""
    frames, size = shape
    logit, features = Discriminator(frames, size, 4)(torch.randn(2, 3, frames, size, size))
    assert logit.shape == (2,) and len(features) >= 2

# ---- the perceptual loss ----

@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """VGG16 of random weights, as .npz."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg.npz"
    np.savez(path, **{k: v.numpy() for k, v in vqgan3d.VGG16().state_dict().items() if k.startswith("features.")})
    return path

def test_perceptual_network_is_frozen_and_differentiable(vgg_file):
    """A "frozen" network that is trained, in training mode, or cut off from the reconstruction."""
    vgg = vqgan3d.load_vgg(str(vgg_file))
    assert not vgg.training and not any(p.requires_grad for p in vgg.parameters())
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    y.requires_grad_()
    assert vgg(x, x).item() == 0 and vgg(x, y).item() > 0
    grad, = torch.autograd.grad(vgg(x, y), y)
    assert grad.flatten(1).any(1).all()

def test_perceptual_loss_compares_a_frame_with_its_own_reconstruction(stage1, clips, main, monkeypatch):
    """The random frame drawn once for the video and once more for the reconstruction."""
    class Equal(torch.nn.Linear):
        def forward(self, x, y):
            pairs.append((x, y))
            return (x - y).square().mean()
    def copy(self, x):                                                             # a perfect reconstruction
        zero = 0 * sum(p.sum() for p in self.parameters())
        return x + zero, torch.zeros(len(x), dtype=torch.long), (x.new_zeros(()), x.new_zeros(()))
    pairs = []
    monkeypatch.setattr(vqgan3d, "load_vgg", lambda path: Equal(1, 1))
    monkeypatch.setattr(vqgan3d.VQGAN, "forward", copy)
    result = main(vqgan3d, *short(clips, stage1.home, "--perceptual", 1, "--gan", 0, "--feature", 0))
    assert result.code == 0 and len(pairs) == 4
    assert all(x.shape == (2, 3, 16, 16) and torch.allclose(x, y) for x, y in pairs)

def test_perceptual_loss_in_training(stage1, clips, main, vgg_file):
    """A loss that is computed and not logged, or that puts VGG16 into the checkpoint and the optimisers."""
    result = main(vqgan3d, *short(clips, stage1.home, "--perceptual", 0.1, "--vgg", vgg_file))
    assert result.code == 0, result.err
    assert all(r["perceptual"] > 0 for r in rows(Path("run/vqgan.jsonl")) if "mse" in r)
    assert Path("run/vqgan.pt").stat().st_size < 3e6                               # VGG16 alone has 59 MB

def test_vgg_offline_is_one_line_that_helps(stage1, clips, main, monkeypatch):
    """A traceback of urllib, or training without the loss that was asked for."""
    def offline(*a, **k):
        assert k["check_hash"] and k["weights_only"]
        raise OSError("<urlopen error [Errno -2] Name or service not known>\nmore lines")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    result = main(vqgan3d, *short(clips, stage1.home, "--perceptual", 0.1))
    assert result.code == 1 and all(w in result.err for w in ("vgg16-397923af.pth", "https://download.pytorch.org", "--perceptual 0", "--vgg"))
    Path("vgg.npz").write_text("not weights")
    assert "vgg.npz" in main(vqgan3d, *short(clips, stage1.home, "--perceptual", 0.1, "--vgg", "vgg.npz")).err

# ---- resuming ----

@pytest.mark.parametrize("step", [3, 47])                                          # before the codebook starts; amid the game
def test_resume_is_exact_to_the_bit(stage1, main, stop_at, step):
    """An optimiser, the discriminator, the codebook's state, the learning rate or a random draw that a resumed run lacks."""
    stop_at(vqgan3d, step)
    result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 1 and f"stopped after step {step + 1} and saved run/vqgan.pt; the same command goes on" in result.err
    assert torch.load("run/vqgan.pt", weights_only=True)["step"] == step + 1
    result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 0 and f"resuming run/vqgan.pt at step {step + 1}" in result.out
    same(*(torch.load(path, weights_only=True) for path in (stage1.path, "run/vqgan.pt")))
    log = [r["step"] for r in rows(Path("run/vqgan.jsonl"))]
    assert log == sorted(log) and log.count(0) == 2

def test_sigterm_saves_and_the_same_command_goes_on(stage1, tmp_path):
    """The same of real processes, stopped wherever the signal finds them."""
    process, log = launch("vqgan3d.py", *stage1.flags, "--out", "run", cwd=tmp_path), tmp_path / "run" / "vqgan.jsonl"
    while process.poll() is None and not (log.exists() and "mse" in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "error: stopped after step" in err.splitlines()[-1], err
    result = script("vqgan3d.py", *stage1.flags, "--out", "run", cwd=tmp_path)
    assert result.code == 0 and "resuming" in result.out
    same(*(torch.load(path, weights_only=True) for path in (stage1.path, tmp_path / "run" / "vqgan.pt")))

def test_a_run_that_is_over_is_left_alone_and_fresh_starts_anew(stage1, main):
    """A second run of the same command that trains on, or --fresh that does nothing."""
    flags = [*stage1.flags, "--out", "run", "--steps", 2, "--eval_every", 2]
    assert main(vqgan3d, *flags).code == 0
    before = Path("run/vqgan.pt").read_bytes()
    assert main(vqgan3d, *flags).code == 0 and Path("run/vqgan.pt").read_bytes() == before
    result = main(vqgan3d, *flags, "--fresh", "--seed", 1)
    assert result.code == 0 and "resuming" not in result.out and Path("run/vqgan.pt").read_bytes() != before

def test_a_network_that_is_no_number_never_replaces_a_checkpoint(stage1, clips, main):
    """A run that diverges between two looks at its loss, saves what is left of it at the next evaluation, and says "done"."""
    result = main(vqgan3d, *short(clips, stage1.home, "--lr", 1e30, "--steps", 15, "--eval_every", 5))
    assert result.code == 1 and "not finite" in result.err and "--lr" in result.err and not Path("run/vqgan.pt").exists()

@pytest.mark.parametrize("function, term", [("l1_loss", "feature"), ("softplus", "gan")])
def test_the_term_that_broke_is_named_and_the_last_good_step_remains(stage1, main, monkeypatch, function, term):
    """Looked at every 20 steps only, all terms are broken: the weights had become NaN the step after."""
    schedule, good = vqgan3d.schedule, getattr(F, function)
    def breaks_at_45(now, steps):
        monkeypatch.setattr(F, function, (lambda *args: good(*args) * math.nan) if now == 45 else good)
        return schedule(now, steps)
    with monkeypatch.context() as m:
        m.setattr(vqgan3d, "schedule", breaks_at_45)
        result = main(vqgan3d, *stage1.flags, "--out", "run")
    assert result.code == 1 and f"step 45: {term}" in result.err and "mse" not in result.err
    assert vqgan3d.load("run/vqgan.pt")["step"] == 40
    assert main(vqgan3d, *stage1.flags, "--out", "run").code == 0
    same(vqgan3d.load(stage1.path), vqgan3d.load("run/vqgan.pt"))

def test_training_on_crops(stage1, main):
    """A discriminator made for whole frames, evaluation on squares, or a flag that is not looked at."""
    assert main(vqgan3d, *stage1.flags, "--crop", 8, "--out", "run").code == 0
    state = vqgan3d.load("run/vqgan.pt")
    assert state["disc"]["head.weight"].shape != vqgan3d.load(stage1.path)["disc"]["head.weight"].shape
    assert vqgan3d.load_vqgan("run/vqgan.pt").encode(torch.zeros(1, 3, 8, 16, 16)).shape[-1] == 4
    assert rows(Path("run/vqgan.jsonl"))[-1]["psnr"] != rows(stage1.home / "run" / "vqgan.jsonl")[-1]["psnr"]

def test_a_checkpoint_with_nan_in_any_network_is_not_written(tmp_path):
    """A discriminator that broke while it learnt alone: the losses of the autoencoder are fine, and the checkpoint is not."""
    state = dict(config={}, step=7, model=dict(w=torch.ones(2)), disc=dict(w=torch.tensor([1, math.nan])))
    with pytest.raises(vqgan3d.UserError, match="step 7: w is not finite.*last good step"):
        vqgan3d.save(tmp_path / "a.pt", state)
    assert not list(tmp_path.iterdir())

# ---- bad input ----

@pytest.mark.parametrize("flags, words", [
    ("--size 18", "18 x 18 cannot be divided by --down 2,4,4"), ("--crop 10", "10 x 10 cannot be divided"), ("--crop 32", "larger than the videos"), ("--frames 7", "7 frames"), ("--down 2,4", "three powers of two"),
    ("--down 2,3,4", "three powers of two"), ("--down 4,four,4", "invalid ints value"), ("--lr fast", "invalid float value: 'fast'"),
    ("--stepz 3", "did you mean --steps?"), ("--dtype half", "float32 or bfloat16"), ("--device tpu9", "Try --device cpu"),
    ("--data nowhere", "nor a folder")])
def test_wrong_flags_end_in_one_line(stage1, main, flags, words):
    """A traceback, or a flag that is not looked at."""
    result = main(vqgan3d, *stage1.flags, "--out", "run", *flags.split())
    assert result.code == 1 and words in result.err and result.err.startswith("error: ")

@pytest.mark.parametrize("flags", ["--steps 0", "--batch_size 0", "--eval_every 0", "--eval_clips 0"])
def test_numbers_that_make_no_sense_end_in_one_line(stage1, main, flags):
    """ZeroDivisionError, an empty stack, "done" without a checkpoint."""
    result = main(vqgan3d, *stage1.flags, "--out", "run", *flags.split())
    assert result.code == 1 and flags.split()[0] in result.err

def test_unusable_checkpoints_are_refused_in_one_line(stage1, main, tmp_path):
    """A checkpoint of another configuration mixed into this run, a truncated one, one that executes code when it is read."""
    path = Path("run/vqgan.pt")
    path.parent.mkdir()
    good = stage1.path.read_bytes()
    path.write_bytes(good)
    result = main(vqgan3d, *stage1.flags, "--out", "run", "--codes", 32)
    assert result.code == 1 and "--codes 16 (now 32)" in result.err and "--fresh" in result.err
    assert path.read_bytes() == good
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)
    hostile = tmp_path / "hostile.pt"
    torch.save(dict(config={}, step=1, model=Payload()), hostile)
    for content, word in ((good[:len(good) // 2], "not a usable checkpoint"), (b"", "not a usable checkpoint"),
                          (hostile.read_bytes(), "not a usable checkpoint")):
        path.write_bytes(content)
        result = main(vqgan3d, *stage1.flags, "--out", "run")
        assert result.code == 1 and word in result.err and "run/vqgan.pt" in result.err and "--fresh" in result.err
    assert not (tmp_path / "executed").exists()
    state = torch.load(stage1.path, weights_only=True)
    del state["model"]["quantizer.usage"]
    torch.save(state, path)
    with pytest.raises(vqgan3d.UserError, match="does not fit stage 1"):
        vqgan3d.load_vqgan(path)

def test_two_processes_do_not_train_into_one_folder(stage1, stage2, main):
    """Two runs that overwrite each other's checkpoints and mix their logs; a lock that outlives its process."""
    for module, flags, name in ((vqgan3d, stage1.flags, "vqgan.pt"), (diffusion, [*stage2.flags, "--vqgan", stage1.path], "diffusion.pt")):
        Path("run").mkdir(exist_ok=True)
        held = vqgan3d.lock(Path("run") / name)
        result = main(module, *flags, "--out", "run", "--steps", 2)
        assert result.code == 1 and f"another process is training run/{name}" in result.err
        held.close()
        assert main(module, *flags, "--out", "run", "--steps", 2).code == 0

def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Half a checkpoint in the place of the last good one."""
    path = tmp_path / "vqgan.pt"
    vqgan3d.save(path, dict(step=1))
    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(vqgan3d.UserError, match="No space left"):
        vqgan3d.save(path, dict(step=2))
    assert torch.load(path, weights_only=True) == dict(step=1) and list(tmp_path.iterdir()) == [path]
