"""A GPU that is not here: in its place torch's meta device, which computes shapes only. Reading a
value of a meta tensor raises, so code that makes the CPU wait for a GPU in each step (item(), a
boolean mask, an index on another device) fails here. A real GPU: experiments/gpu_check.py"""
import torch

import diffusion
import vqgan3d

META = torch.device("meta")

def test_a_step_of_either_stage_does_not_wait_for_the_device(monkeypatch):
    """A loss, a mask or a label that is read in every step; a table or tensor left on the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **_: torch.no_grad())   # meta has none
    cfg = vqgan3d.Config(size=32, width=16, codes=16, blocks=1, disc_width=4)
    vqgan = vqgan3d.VQGAN(cfg).to(META)
    vqgan.quantizer.started = True
    disc = vqgan3d.Discriminator(16, 32, 4).to(META)
    vgg = vqgan3d.VGG16().requires_grad_(False).to(META)
    x = torch.zeros(4, 3, 16, 32, 32, device=META)
    y, _, losses = vqgan(x)
    frame = torch.zeros(4, dtype=torch.long, device=META)
    losses |= vqgan3d.reconstruction_loss(x, y, vgg, frame)
    (real_logits, real), (fake_logits, fake) = disc(x), disc(y)
    losses |= vqgan3d.discriminator_loss(real_logits, fake_logits)
    losses |= vqgan3d.generator_loss(fake_logits, fake, real)
    assert {"mse", "perceptual", "codebook", "gan", "feature", "disc"} <= set(losses)
    assert all(loss.device == META for loss in losses.values())
    vqgan3d.join_gradients(x, y, 0.3)
    muon, adam = vqgan3d.make_optimizers(vqgan, 1e-3)
    for p in vqgan.parameters():
        p.grad = torch.zeros_like(p)
    muon.step()
    cfg = diffusion.Config(width=16, mults=(1, 2), blocks=1, head_dim=8, full_attention_tokens=64)
    model = diffusion.LatentDiffusion(cfg, vqgan, (32, 16, 1), ["a", "b"], META)
    x0 = model.encode(x)
    draws = frame, x0, frame, frame                                   # t, eps, labels, num_cond
    assert diffusion.denoising_loss(model.unet, model.diffusion, x0, *draws).device == META
    assert model.decode(x0).device == META
