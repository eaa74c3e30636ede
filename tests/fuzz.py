"""Feed every reader of files with damaged ones.

    python tests/fuzz.py 2000          # inputs; the test suite tries a few

Valid files of each kind are cut, flipped, zeroed, overwritten, given absurd numbers or another kind's content. Each reader may take
what is left of them or end in one line (UserError); a stack trace, a crash of the process, more than 20 seconds or 2 GB is a failure.
Of a folder with a damaged file the good ones must be used. Prints a table; the exit status says whether all went well.
"""
import contextlib, io, json, os, random, resource, shutil, signal, sys, tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch
import data, diffusion, evaluate, vqgan3d

SECONDS, GIGABYTES = 20, 2

def mutate(blob, rng, others):
    """bytes -> damaged bytes, and how"""
    b, n = bytearray(blob), len(blob)
    how = rng.choice(["cut", "flipped bits", "zeros", "noise", "huge numbers", "doubled", "other kind", "empty", "digits"])
    i = rng.randrange(max(1, n if rng.random() < 0.5 else min(n, 400)))            # half of them near the header
    if how == "cut":
        b = b[:i]
    elif how == "flipped bits":
        for _ in range(rng.choice([1, 10, 100])):
            b[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        b[i:i + 64] = bytes(64)
    elif how == "noise":
        b[i:i + 64] = rng.randbytes(64)
    elif how == "huge numbers":
        b[i:i + 8] = rng.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"99999999"])
    elif how == "doubled":
        b[i:i] = b[i // 2:i // 2 + 200]
    elif how == "other kind":
        b = bytearray(rng.choice(others))
    elif how == "empty":
        b = bytearray()
    else:                                                                          # another number in a text or header
        places = [k for k, c in enumerate(b[:2000]) if 48 <= c <= 57]
        for k in rng.sample(places, min(len(places), 3)):
            b[k] = 48 + rng.randrange(10)
    return bytes(b), how

class Kinds:
    """name -> (the file to damage, what reads it). Everything lies in one folder, which a process of its own damages a copy of."""
    def __init__(self, home):
        self.home, clips = home, data.toy_videos(6, 12, 16, seed=5)[0]
        for i, clip in enumerate(clips[:4]):
            data.save_grid(home / "clips" / ("spin", "wave")[i % 2] / f"{i}.{'gif' if i % 2 else 'mp4'}", clip[None], zoom=1)
        for name, clip in zip(("spin", "wave"), clips[4:]):
            (home / "clips" / name / "frames").mkdir()
            for t, frame in enumerate(clip):
                data.iio.imwrite(home / "clips" / name / "frames" / f"{t}.{'png' if name == 'spin' else 'jpg'}", frame)
        ucf, lists = home / "UCF-101", home / "ucfTrainTestlist"
        lists.mkdir()
        for label in ("Bend", "Jump"):
            data.save_grid(ucf / label / f"v_{label}_g01_c01.mp4", clips[:1], zoom=1)
        (lists / "classInd.txt").write_text("1 Bend\n2 Jump\n")
        for split in ("train", "test"):
            (lists / f"{split}list01.txt").write_text("Bend/v_Bend_g01_c01.mp4 1\nJump/v_Jump_g01_c01.mp4 2\n")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for split in ("train", "test"):
                data.Videos(home / "clips", home, split, 16, 8)
        np.save(home / "samples.npy", clips)
        np.savez(home / "samples.npz", clips)
        np.savez(home / "weights.npz", **{"features.0.weight": np.zeros((64, 3, 3, 3), "f4"), "params|logits": np.zeros(5, "f4")})
        config = vqgan3d.Config(size=16, frames=8, down=(2, 4, 4), width=16, blocks=1, codes=16)
        vqgan = vqgan3d.VQGAN(config)
        stage1 = dict(config=vars(config), step=3, model=vqgan.state_dict())
        vqgan3d.save(home / "vqgan.pt", stage1)
        config = diffusion.Config(width=16, mults=(1,), blocks=1, head_dim=8, attention=64)
        system = diffusion.System(config, vqgan, (8, 16, 1), ["a", "b"], torch.device("cpu"))
        vqgan3d.save(home / "diffusion.pt", dict(config=vars(config), step=3, model=system.unet.state_dict(), ema=system.unet.state_dict(), opts=[], classes=["a", "b"],
                                                 statistics=[torch.zeros(6), torch.ones(6), 1.0], vqgan=stage1, clip=(8, 16, 1)))
        (home / "vqgan.jsonl").write_text("".join(json.dumps(dict(step=i, mse=0.5)) + "\n" for i in range(20)))
        (home / "samples.json").write_text(json.dumps(dict(data="toy", size=16, frames=8, labels=[0] * 6)))
        os.chdir(home)
        self.latents()
        index, = home.glob("cache/*train*.json")
        index.with_suffix(".journal").write_text(index.read_text())
        def interrupted():
            """As if the preparation had been killed at its end: no index yet"""
            index.relative_to(home).unlink()
            assert len(data.Videos("clips", ".", "train", 16, 8)) == len(made["videos"])
        self.kinds = {
            "mp4": ("clips/spin/0.mp4", self.folder), "gif": ("clips/wave/1.gif", self.folder),
            "png frame": ("clips/spin/frames/3.png", self.folder), "jpeg frame": ("clips/wave/frames/3.jpg", self.folder),
            "class list": ("ucfTrainTestlist/classInd.txt", lambda: data.Videos("ucf101", ".", "train", 16, 8)),
            "split list": ("ucfTrainTestlist/trainlist01.txt", lambda: data.Videos("ucf101", ".", "train", 16, 8)),
            "cache index": (index.relative_to(home), lambda: data.Videos("clips", ".", "train", 16, 8).batch(4, np.random.default_rng(0))),
            "cache frames": (index.with_suffix(".u8").relative_to(home), lambda: data.Videos("clips", ".", "train", 16, 8).batch(4, np.random.default_rng(0))),
            "cache journal": (index.with_suffix(".journal").relative_to(home), interrupted),
            "samples.npy": ("samples.npy", lambda: evaluate.open_samples("samples.npy", 8, 16)[:2]),
            "samples.npz": ("samples.npz", lambda: evaluate.open_samples("samples.npz", 8, 16)[:2]),
            "I3D weights": ("weights.npz", lambda: evaluate.load_i3d("weights.npz")), "VGG weights": ("weights.npz", lambda: vqgan3d.load_vgg("weights.npz")),
            "stage-1 checkpoint": ("vqgan.pt", lambda: vqgan3d.load_vqgan("vqgan.pt")(torch.zeros(1, 3, 8, 16, 16))),
            "stage-2 checkpoint": ("diffusion.pt", lambda: diffusion.load_diffusion("diffusion.pt").sample([0], torch.tensor([0]), steps=1)),
            "latents": ("latents.npy", self.latents),
            "log": ("vqgan.jsonl", lambda: vqgan3d.resume(Path("vqgan.pt"), vqgan3d.Config(**{**vars(config_of("vqgan.pt")), "fresh": False}), set(), Path("vqgan.jsonl"))),
        }

    def latents(self):
        """Encoded again if they cannot be used"""
        system, videos = diffusion.load_diffusion("diffusion.pt"), data.Videos("clips", ".", "train", 16, 8)
        latents, _ = diffusion.encode_once(system, videos, 16, Path("latents.npy"), "key", contextlib.nullcontext)
        assert latents.shape == (16, *system.shape)

    def folder(self):
        """All but one of the five train videos are whole: they must be there"""
        shutil.rmtree("cache")
        videos = data.Videos("clips", ".", "train", 16, 8)
        assert len(videos) >= 4, f"only {len(videos)} of 4 good videos are used"

def config_of(path):
    state = torch.load(path, weights_only=True)
    return vqgan3d.Config(**state["config"])

def attempt(home, path, blob, read):
    """Read a damaged file in a process of its own: "" if all is well, else what went wrong"""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "home"
        shutil.copytree(home, copy)
        (copy / path).write_bytes(blob)
        out, into = os.pipe()
        pid = os.fork()
        if not pid:
            os.chdir(copy)
            os.close(out)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            signal.alarm(SECONDS)
            before, message = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
            try:
                read()
            except data.UserError as e:
                message = "" if "\n" not in str(e) else f"more than a line: {e}"
            except BaseException as e:
                message = f"{type(e).__name__}: {data.first_line(e)}"
            used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
            os.write(into, (message or (f"{used:.1f} GB" if used > GIGABYTES else "")).encode()[:4000])
            os._exit(0)
        os.close(into)
        with open(out, errors="replace") as f:
            message = f.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return message or (f"killed by signal {-status}" if status else "")

def main():
    count, rng, done, fine = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, random.Random(0), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        kinds = Kinds(home).kinds
        others = [(home / path).read_bytes() for path, _ in kinds.values()]
        for name, (path, read) in kinds.items():                                   # undamaged, all of it is read
            wrong = attempt(home, path, (home / path).read_bytes(), read)
            if wrong and "weights" not in name:
                sys.exit(f"{name}, not damaged: {wrong}")
        for i in data.tqdm(range(count), desc="damaged files"):
            name = list(kinds)[i % len(kinds)]
            path, read = kinds[name]
            blob, how = mutate((home / path).read_bytes(), rng, others)
            wrong = attempt(home, path, blob, read)
            done[name] += 1
            fine[name] += not wrong
            if wrong:
                print(f"{name}, {how}, input {i}: {wrong}", file=sys.stderr)
    print(f"{'damaged file':<22}{'survived of tried':>20}")
    for name in kinds:
        print(f"{name:<22}{fine[name]:>12} of {done[name]}")
    print(f"{'together':<22}{sum(fine.values()):>12} of {sum(done.values())}")
    sys.exit(sum(fine.values()) < sum(done.values()))

if __name__ == "__main__":
    main()
