"""Kill training, again and again, and see whether anything is lost.

    python tests/kill.py 100          # kills of each stage; the test suite makes a few

A tiny run of each stage is killed with SIGKILL: at a random moment, in the middle of writing a checkpoint, between its writing
and its renaming, just after that, or in the middle of a line of the log; or it finds that the disk is full. Then the same command
runs again, and is killed again. In between every checkpoint must be readable and never be older than the one before, and the
weights at the end must be those of a run that nobody disturbed, bit for bit. Prints a table; the exit status says whether all survived.
"""
import contextlib, io, os, random, resource, signal, sys, tempfile, threading, time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ["OMP_NUM_THREADS"] = "1"                                                # a fork and a pool of threads do not get along
import torch
import data, diffusion, vqgan3d
from conftest import STAGE1, STAGE2, same

die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def cut(write):
    """A write that is cut off in the middle"""
    def torn(f, content):
        write(f, content[:len(content) // 2])
        f.flush()
        die()
    return torn

def half_a_checkpoint(state, f):
    buffer = io.BytesIO()
    torch_save(state, buffer)
    cut(lambda f, b: f.write(b))(f, buffer.getvalue())

def torn_log(path, row):
    with open(path, "a") as f:
        cut(lambda f, s: f.write(s))(f, '{"step": %d, "loss": 0.123456}\n' % row["step"])

torch_save, fsync, replace, write_log = torch.save, os.fsync, os.replace, vqgan3d.write_log

def arrange(fault, rng, length):
    """Prepare a forked process for what is going to happen to it"""
    after = rng.randrange(3)                                                       # the how-manyth call is the fatal one
    def at(bad, good):
        left = [after]
        def call(*args, **kwargs):
            left[0] -= 1
            return (bad if left[0] < 0 else good)(*args, **kwargs)
        return call
    if fault == "at a random moment":
        threading.Timer(rng.uniform(0, length), die).start()
    elif fault == "half a checkpoint written":
        torch.save = at(half_a_checkpoint, torch_save)
    elif fault == "written, not flushed":
        os.fsync = at(die, fsync)
    elif fault == "flushed, not renamed":
        os.replace = at(die, replace)
    elif fault == "just after the renaming":
        os.replace = at(lambda a, b: (replace(a, b), die()), replace)
    elif fault == "half a line of the log":
        for module in (vqgan3d, diffusion):
            module.write_log = at(torn_log, write_log)
    elif fault == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.choice([200, 3000, 50_000]),) * 2)

FAULTS = ["at a random moment", "at a random moment", "half a checkpoint written", "written, not flushed", "flushed, not renamed",
          "just after the renaming", "half a line of the log", "disk full"]

def train(home, module, flags, fault=None, seed=0, length=0.0):
    """The script in a forked process -> (exit status, or minus the signal), the last line it wrote, seconds"""
    start, (out, into) = time.time(), os.pipe()                                    # a pipe: no limit of file sizes holds for it
    pid = os.fork()
    if not pid:
        os.chdir(home)
        os.dup2(into, 1), os.dup2(into, 2)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False, buffering=1) for fd in (1, 2))
        code = 70
        try:
            arrange(fault, random.Random(seed), length)
            sys.argv = [f"{module.__name__}.py", *map(str, flags)]
            data.run(module.main)
            code = 0
        except SystemExit as e:
            with contextlib.suppress(OSError):
                print(e.code, file=sys.stderr)
            code = 1
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(into)
    with open(out, errors="replace") as f:
        text = f.read()                                                            # until the process is gone
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text, time.time() - start

def torment(home, module, flags, path, kills, rng):
    """-> Counter of faults, Counter of those survived"""
    reference = home / "reference" / path.parent.name
    reference.mkdir(parents=True, exist_ok=True)
    status, text, length = train(home / "reference", module, flags)
    assert status == 0, text
    undisturbed, done, fine = torch.load(reference / path.name, weights_only=True), Counter(), Counter()
    while sum(done.values()) < kills:
        path.unlink(missing_ok=True)
        step = 0
        for fault in [*(rng.choice(FAULTS) for _ in range(6)), None]:              # six of them, then to the end
            status, text, _ = train(home, module, flags, fault, rng.random(), length)
            ok = "Traceback" not in text and status == (0 if fault is None else status)
            if fault == "disk full" and status:
                ok = ok and status == 1 and text.strip().splitlines()[-1].startswith("error: cannot write")
            if path.exists():                                                      # whatever happened: readable, and not older
                now = torch.load(path, weights_only=True)["step"]
                ok, step = ok and now >= step, now
            if status == 0:
                try:
                    same(torch.load(path, weights_only=True), undisturbed)
                except AssertionError as e:
                    ok, text = False, f"{text}\n{e}"
            if fault and (status < 0 or status == 1):                              # it may have been done before it was hit
                done[fault] += 1
                fine[fault] += ok
            if not ok:
                print(f"{module.__name__}, {fault}: exit {status}\n{text[-2500:]}", file=sys.stderr)
                if not fault:
                    sys.exit(1)
            if status == 0:
                break
    return done, fine

def main():
    kills, rng, table = int(sys.argv[1]) if len(sys.argv) > 1 else 100, random.Random(0), []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        videos, _ = data.toy_videos(12, 12, 16, seed=5)
        for i, video in enumerate(videos):
            data.save_grid(home / "clips" / ("spin", "wave")[i % 2] / f"{i:02d}.gif", video[None], zoom=1)
        common = ["--data", home / "clips", "--data_dir", home, "--out", "run"]
        stage1 = [*common, *STAGE1, "--steps", 40, "--eval_every", 4]
        stage2 = [*common, *STAGE2, "--eval_every", 4, "--vqgan", home / "reference" / "run" / "vqgan.pt"]
        for module, flags, name in ((vqgan3d, stage1, "vqgan.pt"), (diffusion, stage2, "diffusion.pt")):
            (home / "run").mkdir(exist_ok=True)
            table.append(torment(home, module, flags, home / "run" / name, kills, rng))
    print(f"{'fault':<28}{'stage 1':>16}{'stage 2':>16}   (survived of injected)")
    for fault in dict.fromkeys(FAULTS):
        print(f"{fault:<28}" + "".join(f"{fine[fault]:>9} of {done[fault]:<4}" for done, fine in table))
    lost = sum(sum(done.values()) - sum(fine.values()) for done, fine in table)
    print(f"{'together':<28}" + "".join(f"{sum(fine.values()):>9} of {sum(done.values()):<4}" for done, fine in table))
    sys.exit(1 if lost else 0)

if __name__ == "__main__":
    main()
