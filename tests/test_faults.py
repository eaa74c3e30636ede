"""Nothing is lost: training that is killed, disks that are full, too little memory."""
import errno
import os
import subprocess
import sys

import numpy as np
import pytest

import data
from conftest import ROOT

def test_killed_training_resumes_to_the_same_weights():
    """A checkpoint torn or lost, a run that cannot resume, other weights at the end. The short
    form of python -m tests.stress.crash_training 100."""
    command = [sys.executable, "-m", "tests.stress.crash_training", "3"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                            timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    name, *cells = result.stdout.splitlines()[-1].replace(" of ", " ").split()
    assert name == "together"
    survived1, injected1, survived2, injected2 = map(int, cells)
    assert survived1 == injected1 >= 3
    assert survived2 == injected2 >= 3

def test_a_full_disk_is_said_before_a_memory_map_is_written(tmp_path, monkeypatch):
    """A file with holes: the write into the map that finds no space ends the process with a bus
    error."""
    array = data.new_array(tmp_path / "a.npy", np.uint8, (1000, 1000))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 1_000_000
    array[:] = 7
    array.flush()
    assert (np.load(tmp_path / "a.npy") == 7).all()
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    def main():
        data.new_array(tmp_path / "b.npy", np.uint8, (10, 10))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit, match="cannot write .*No space left"):
        data.run_main(main)

@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError()])
def test_too_little_memory_is_one_line(error):
    """A stack trace where a smaller batch would do."""
    def main():
        raise error
    with pytest.raises(SystemExit, match="out of memory.*--batch_size"):
        data.run_main(main)
