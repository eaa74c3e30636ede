"""Nothing is lost: training that is killed, disks that are full."""
import errno, os
import numpy as np
import pytest
import data
from conftest import script

def test_killed_training_resumes_to_the_same_weights(tmp_path):
    """The short form of python tests/kill.py 100: a checkpoint torn or lost, a run that cannot resume, other weights at the end."""
    result = script("tests/kill.py", 5, cwd=tmp_path)
    assert result.code == 0, result.out + result.err
    survived, _, injected = result.out.splitlines()[-1].split()[1:4]
    assert survived == injected and int(injected) >= 5

def test_a_full_disk_is_said_before_a_memory_map_is_written(tmp_path, monkeypatch):
    """A file with holes: the write into the map that finds no space would end the process with a bus error."""
    array = data.new_array(tmp_path / "a.npy", np.uint8, (1000, 1000))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 1_000_000
    array[:] = 7
    array.flush()
    assert (np.load(tmp_path / "a.npy") == 7).all()
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemExit, match="cannot write .*No space left"):
        data.run(lambda: data.new_array(tmp_path / "b.npy", np.uint8, (10, 10)))

@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_too_little_memory_is_one_line(error):
    def main():
        raise error
    with pytest.raises(SystemExit, match="out of memory.*--batch_size"):
        data.run(main)
