"""Kills training, again and again, and checks that nothing is lost.

    python -m tests.stress.crash_training 100     # faults in each stage; half an hour

A tiny run of each stage meets one fault after another: SIGKILL at a random moment, in the middle of
writing a checkpoint or a line of the log, or before or after a file gets its name; SIGTERM, which
asks it to stop, or ends it before training has begun; or a full disk. After each fault the same
command runs again. Then
    the checkpoint must be readable, and not older than the one before,
    no traceback may be printed, except that of a full disk,
    and when training is done, the checkpoint must be equal, bit for bit, to that of a run that met
    no fault.
Prints a table; the exit status is 1 if anything went wrong.
"""
import argparse
import io
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"           # a forked process cannot use its parent's threads
import torch

import data
import diffusion
import vqgan3d
from tests.conftest import STAGE1, STAGE2, same, write_video

# --------------------------------------------------------------------------------------------------
# the faults, each in a process of its own

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def nth_call(n, good, bad):
    """A function that calls good, and from its n-th call on bad."""
    calls = 0
    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        chosen = good if calls < n else bad
        return chosen(*args, **kwargs)
    return call

def write_half(file, content):
    """Write the first half and die."""
    file.write(content[:len(content) // 2])
    file.flush()
    die()

def die_in_checkpoint(n):
    torch_save = torch.save
    def save_half(checkpoint, file):
        buffer = io.BytesIO()
        torch_save(checkpoint, buffer)
        write_half(file, buffer.getvalue())
    torch.save = nth_call(n, torch_save, save_half)

def die_before_flush(n):
    os.fsync = nth_call(n, os.fsync, die)

def die_before_renaming(n):
    os.replace = nth_call(n, os.replace, die)

def die_after_renaming(n):
    replace = os.replace
    def replace_and_die(source, target):
        replace(source, target)
        die()
    os.replace = nth_call(n, replace, replace_and_die)

def die_in_log(n):
    def write_half_a_row(path, step, row):
        with open(path.with_suffix(".jsonl"), "a") as file:
            write_half(file, '{"step": %d, "loss": 0.123456}\n' % step)
    for module in (vqgan3d, diffusion):
        module.log = nth_call(n, module.log, write_half_a_row)

KILLED, STOPPED = "killed at a random moment", "asked to stop at a random moment"
DISK_FULL = "disk full"
FAULTS_AT_A_CALL = {
    "half a checkpoint written": die_in_checkpoint,
    "written, not flushed": die_before_flush,
    "written, not renamed": die_before_renaming,
    "just after renaming": die_after_renaming,
    "half a line of the log written": die_in_log,
}
FAULTS = [KILLED, STOPPED, *FAULTS_AT_A_CALL, DISK_FULL]

def prepare_fault(fault, rng, duration):
    """Arrange for a fault to happen to this process. duration: seconds of an undisturbed run"""
    if fault == KILLED:
        threading.Timer(rng.uniform(0, duration), die).start()
    elif fault == STOPPED:
        delay = rng.uniform(0, duration)
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
    elif fault == DISK_FULL:
        limit = rng.choice([200, 3000, 50_000])                   # bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    elif fault:
        FAULTS_AT_A_CALL[fault](rng.randint(1, 4))

# --------------------------------------------------------------------------------------------------
# one run

class Result(NamedTuple):
    status: int          # exit status, or minus the number of the signal
    text: str            # what it printed
    seconds: float

    def is_done(self):
        """Did it come to its last step?"""
        return self.status == 0 and "done: " in self.text

def train(folder, module, flags, fault=None, seed=0, duration=0.0):
    """Run a stage in a forked process, in which a fault happens -> Result"""
    began = time.time()
    read_end, write_end = os.pipe()           # a limit of file sizes does not hold for a pipe
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.chdir(folder)
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        os._exit(run_stage(module, flags, fault, random.Random(seed), duration))
    os.close(write_end)
    with open(read_end, errors="replace") as pipe:
        text = pipe.read()                    # returns when the process has ended
    _, status = os.waitpid(pid, 0)
    return Result(os.waitstatus_to_exitcode(status), text, time.time() - began)

def run_stage(module, flags, fault, rng, duration):
    """Run a stage in this process -> exit status"""
    try:
        prepare_fault(fault, rng, duration)
        sys.argv = [f"{module.__name__}.py", *map(str, flags)]
        data.run_main(module.main)
    except SystemExit as e:                   # a status, or the text of a UserError
        print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70
    return 0

# --------------------------------------------------------------------------------------------------
# what must hold

class Counts(NamedTuple):
    injected: Counter
    survived: Counter

def saved_step(path):
    """The step of a checkpoint; 0 if there is none yet."""
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0

def find_problem(result, fault, path, step, expected):
    """What is wrong with a run that began at `step`: a sentence, or "".

    expected: the checkpoint of an undisturbed run.
    """
    if fault == DISK_FULL and "OSError" in result.text:           # a traceback that names the file
        result = result._replace(status=0)
    elif "Traceback" in result.text:
        return "a traceback"
    if result.status > 0 and (fault, result.status) != (STOPPED, 130):
        return f"exit status {result.status}"
    if result.status < 0 and not fault:
        return f"killed by signal {-result.status}"
    try:
        now = saved_step(path)
    except Exception as e:
        return f"an unreadable checkpoint: {e}"
    if now < step:
        return f"the checkpoint of step {step} was replaced by one of step {now}"
    if result.is_done():
        try:
            # a resumed stage 2 logs the mean of fewer steps, and a row of another length
            same(torch.load(path, weights_only=True) | dict(log_size=0), expected | dict(log_size=0))
        except AssertionError as e:
            return f"another checkpoint than that of the undisturbed run: {e}"
    return ""

def crash(home, module, flags, name, count, rng):
    """Let `count` faults happen to runs of a stage in home/run -> Counts"""
    (home / "reference").mkdir(exist_ok=True)
    reference = train(home / "reference", module, flags)
    if not reference.is_done():
        raise data.UserError(f"an undisturbed run fails:\n{reference.text}")
    expected = torch.load(home / "reference" / "run" / name, weights_only=True)
    path = home / "run" / name
    counts = Counts(Counter(), Counter())
    while counts.injected.total() < count:
        path.unlink(missing_ok=True)
        faults = [rng.choice(FAULTS) for _ in range(6)]
        for fault in [*faults, None]:                             # the last run meets none
            step = saved_step(path)
            result = train(home, module, flags, fault, rng.random(), reference.seconds)
            wrong = find_problem(result, fault, path, step, expected)
            if wrong:
                print(f"{module.__name__}, {fault}: {wrong}\n{result.text[-2500:]}",
                      file=sys.stderr)
            if fault and (wrong or not result.is_done()):         # else it came too late
                counts.injected[fault] += 1
                counts.survived[fault] += not wrong
            if wrong and not fault:
                raise data.UserError("a run without a fault does not reach its end")
            if wrong or result.is_done():
                break
    return counts

def write_clips(folder):
    """Twelve tiny GIFs of two classes"""
    videos, _ = data.toy_videos(12, 12, 16, seed=5)
    for i, video in enumerate(videos):
        label = ("spin", "wave")[i % 2]
        write_video(folder / label / f"{i:02d}.gif", video)

def print_table(counts):
    """counts: the Counts of both stages. Returns whether all faults were survived."""
    print(f"{'fault':<36}{'stage 1':>16}{'stage 2':>16}   (survived of injected)")
    for fault in FAULTS:
        cells = [f"{c.survived[fault]:>9} of {c.injected[fault]:<4}" for c in counts]
        print(f"{fault:<36}{''.join(cells)}")
    cells = [f"{c.survived.total():>9} of {c.injected.total():<4}" for c in counts]
    print(f"{'together':<36}{''.join(cells)}")
    return all(c.survived == c.injected for c in counts)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=100,
                        help="faults in each stage [%(default)s]")
    args = parser.parse_args()
    rng = random.Random(0)
    counts = []
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        write_clips(home / "clips")
        common = ["--data", home / "clips", "--data_dir", home, "--out", "run"]
        stage1 = [*common, *STAGE1, "--steps", 40, "--eval_every", 4]
        vqgan = home / "reference" / "run" / "vqgan.pt"           # of the undisturbed run
        stage2 = [*common, *STAGE2, "--eval_every", 4, "--vqgan", vqgan]
        counts.append(crash(home, vqgan3d, stage1, "vqgan.pt", args.count, rng))
        counts.append(crash(home, diffusion, stage2, "diffusion.pt", args.count, rng))
    sys.exit(0 if print_table(counts) else 1)

if __name__ == "__main__":
    data.run_main(main)
