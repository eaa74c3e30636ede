"""Devices that are not here: a GPU, in whose place torch's meta device computes shapes only, and
Windows. A meta tensor has no values, so reading one raises: code that makes the CPU wait for a GPU
(item(), bool(), a boolean mask, an index on another device) fails here too."""
import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import torch

import data
import diffusion
import sample
import vqgan3d
from conftest import ROOT

META = torch.device("meta")

@pytest.fixture
def meta_run(monkeypatch):
    """What a training step needs of a Run, on the meta device, which has no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    run = types.SimpleNamespace(device=META, autocast=nullcontext)
    run.share, run.micro_batches = data.divide_batch(4, 2)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.update = types.MethodType(vqgan3d.Run.update, run)
    return run

def test_a_step_of_stage_1_does_not_wait_for_the_device(meta_run, monkeypatch):
    """A loss, a mask or a flag that is read in every step; a tensor left on the CPU."""
    monkeypatch.setattr(vqgan3d, "load_vgg", lambda path: vqgan3d.VGG16().requires_grad_(False))
    cfg = vqgan3d.Config(size=32, width=16, codes=16, blocks=1, disc_width=4, batch_size=4,
                         grad_accum_steps=2)
    nets = vqgan3d.build_networks(cfg, meta_run)
    starts = dict(vq_start=0, disc_start=0, gan_start=0)
    clips = torch.zeros(4, 16, 32, 32, 3, dtype=torch.uint8)
    frame = torch.zeros(4, dtype=torch.long)
    losses = vqgan3d.train_step(cfg, nets, clips, frame, 7, starts, meta_run)
    assert {"mse", "perceptual", "codebook", "gan", "feature", "disc"} <= set(losses)
    assert all(loss.device == META for loss in losses.values())

@pytest.fixture
def meta_model(meta_run):
    """A small latent diffusion model with classes, on the meta device."""
    stage1 = vqgan3d.Config(size=32, width=16, codes=16, blocks=1)
    vqgan = vqgan3d.VQGAN(stage1).to(META).eval().requires_grad_(False)
    vqgan.quantizer.started = True
    cfg = diffusion.Config(width=16, mults=(1, 2), blocks=1, head_dim=8, batch_size=4,
                           full_attention_tokens=64, grad_accum_steps=2)
    return diffusion.LatentDiffusion(cfg, vqgan, (32, 16, 1, 0), ["a", "b"], META)

def test_a_step_of_stage_2_does_not_wait_for_the_device(meta_run, meta_model):
    """A table of noise levels on the CPU, a loss that is read, labels looked up by value."""
    cfg, model = meta_model.config, meta_model
    unet = model.unet
    model.unet = diffusion.copy.deepcopy(unet).requires_grad_(False)
    opts = diffusion.make_optimizers(unet, 1e-3)
    latents = diffusion.Latents(model, None, 0, None, meta_run)
    samples = torch.zeros(4, 16, 32, 32, 3, dtype=torch.uint8)
    noise = diffusion.random_draws(cfg, model, torch.zeros(4, dtype=torch.long), torch.Generator())
    losses, u = diffusion.train_step(cfg, unet, model, opts, [samples, *noise], latents, 3,
                                     meta_run)
    assert losses.device == META
    assert losses.shape == u.shape == (4,)

@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_sampling_and_decoding_do_not_wait_for_the_device(meta_model, sampler):
    """A step of a sampler that reads what the network made; a decoder fed from the CPU."""
    labels = torch.zeros(2, dtype=torch.long, device=META)
    latents = meta_model.sample(range(2), labels, 2.0, sampler, 3)
    videos = sample.decode_long(meta_model, latents, 2)
    assert videos.device == META
    assert videos.shape == (2, 3, 16, 32, 32)

HIDE = """
import runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""

def test_training_without_the_modules_that_windows_lacks(clips, tmp_path):
    """An import of fcntl or resource that ends every script on Windows."""
    flags = ("--size 16 --frames 8 --down 2,4,4 --width 16 --blocks 1 --codes 16 --gan 0 "
             "--feature 0 --perceptual 0 --steps 2 --batch_size 2 --device cpu").split()
    command = [sys.executable, "-c", HIDE.format(root=str(ROOT)), ROOT / "vqgan3d.py"]
    command += ["--data", clips, "--data_dir", tmp_path, "--out", tmp_path / "run", *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "vqgan.pt").exists()

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_computes_what_a_cpu_computes(dtype):
    """A kernel, a layout or a type that is wrong on a GPU only."""
    torch.manual_seed(0)
    vqgan = vqgan3d.VQGAN(vqgan3d.Config(size=32, width=16, codes=64, blocks=1)).eval()
    unet = diffusion.UNet(diffusion.Config(width=32, mults=(1, 2), blocks=1), 6, 4, 8, 3).eval()
    for p in unet.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    x, z = torch.rand(2, 3, 16, 32, 32) * 2 - 1, torch.randn(2, 6, 4, 8, 8)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        expected = vqgan.decode(vqgan.encode(x)), unet(z, t)
        vqgan, unet = vqgan.cuda(), unet.cuda()
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found = vqgan.decode(vqgan.encode(x.cuda())), unet(z.cuda(), t.cuda())
    for a, b in zip(expected, found):
        error = (a - b.cpu()).abs().max() / a.abs().max()
        assert error < (1e-3 if dtype == torch.float32 else 0.1)
