"""The thread pool and the choice of kernels: environment, affinity, forks, callers at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from kernels.checks import floats

from entrenar import backend
from entrenar.backend import cpu
from entrenar.errors import UsageError


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own with this environment added."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENTRENAR_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=clean | env, capture_output=True, text=True, timeout=60
    )


LEVEL = "from entrenar import backend; print('level', backend.isa(), backend.get_num_threads())"


def test_the_environment_forces_a_level_and_threads():
    for isa in backend.available_isas():
        done = python(LEVEL, ENTRENAR_ISA=isa, ENTRENAR_THREADS="3")
        assert f"level {isa} 3" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["neon", "AVX1024", "av\N{LATIN SMALL LETTER O WITH DIAERESIS}x"])
def test_an_unknown_level_is_a_usage_error_that_names_the_known_ones(name):
    done = python(LEVEL, ENTRENAR_ISA=name)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert "UsageError: ENTRENAR_ISA=" in last
    assert "amx, avx512_bf16, avx512, avx2, scalar" in last


def test_a_level_that_the_cpu_lacks_is_a_usage_error():
    missing = [name for name in ("amx", "avx512_bf16", "avx512", "avx2") if name not in backend.available_isas()]
    for name in missing:
        done = python(LEVEL, ENTRENAR_ISA=name)
        assert f"UsageError: ENTRENAR_ISA={name}: this CPU or operating system lacks it" in done.stderr
    with pytest.raises(UsageError, match="no such instruction set"):
        cpu._set_isa("sse")


def test_tiles_made_in_software_are_never_a_default():
    info = backend.cpu_info()
    wanted = [name for name in info["isas"] if name != "amx" or not info["software_tiles"]]
    assert f"level {wanted[0]} " in python(LEVEL).stdout


@pytest.mark.parametrize("count", ["0", "-1", "two", "257", "1.5"])
def test_a_thread_count_that_can_not_be_is_a_usage_error(count):
    done = python(LEVEL, ENTRENAR_THREADS=count)
    assert f"UsageError: ENTRENAR_THREADS={count}: must be a whole number from 1 to 256" in done.stderr


@pytest.mark.tier1
@pytest.mark.parametrize("count", [0, -1, 257, 2.0, "2", True, None])
def test_set_num_threads_refuses_what_is_no_count(count):
    with pytest.raises(UsageError, match="whole number"):
        backend.set_num_threads(count)


def test_the_default_respects_affinity():
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); " + LEVEL
    assert python(one).stdout.split("level")[1].split()[1] == "1"


def test_cpu_info_describes_this_machine():
    info = backend.cpu_info()
    assert info["isas"] == backend.available_isas()
    assert info["isas"][-1] == "scalar"
    assert 1 <= info["cores"] <= os.cpu_count()


def test_a_forked_child_computes_and_so_does_its_parent():
    code = """
import os, numpy as np
from entrenar import backend
backend.set_num_threads(3)
a = np.random.default_rng(0).standard_normal((300, 300), dtype=np.float32)
want = backend.cpu.matmul(a, a)
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        grandchild = os.fork()
        same = np.array_equal(backend.cpu.matmul(a, a), want)
        if grandchild == 0:
            os._exit(not same)
        same &= os.waitpid(grandchild, 0)[1] == 0
        os._exit(not same)
    assert np.array_equal(backend.cpu.matmul(a, a), want)
    assert os.waitpid(pid, 0)[1] == 0
print("all alike")
"""
    done = python(code)
    assert "all alike" in done.stdout, done.stderr


def test_a_fork_while_another_thread_computes():
    code = """
import os, threading, numpy as np
from entrenar import backend
backend.set_num_threads(2)
a = np.random.default_rng(0).standard_normal((200, 200), dtype=np.float32)
want = backend.cpu.matmul(a, a)
stop = False
def work():
    while not stop:
        backend.cpu.matmul(a, a)
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        os._exit(not np.array_equal(backend.cpu.matmul(a, a), want))
    assert os.waitpid(pid, 0)[1] == 0
stop = True
thread.join()
print("all alike")
"""
    done = python(code)
    assert "all alike" in done.stdout, done.stderr


def test_callers_at_once_take_turns():
    a = [floats(i, 150 + i, 200) for i in range(6)]
    want = [cpu.matmul(x, x, trans_b=True) for x in a]
    wrong = []

    def work(i):
        for _ in range(20):
            if not np.array_equal(cpu.matmul(a[i], a[i], trans_b=True), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    before = backend.get_num_threads()
    backend.set_num_threads(3)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        backend.set_num_threads(before)
    assert wrong == []


def test_more_and_fewer_threads_while_running():
    a = floats(1, 300, 300)
    want = cpu.matmul(a, a)
    before = backend.get_num_threads()
    try:
        for n in (1, 5, 2, 9, 1, 3):
            backend.set_num_threads(n)
            assert backend.get_num_threads() == n
            assert np.array_equal(cpu.matmul(a, a), want)
    finally:
        backend.set_num_threads(before)


def test_denormals_are_kept_on_every_thread():
    before = backend.get_num_threads()
    backend.set_num_threads(4)
    try:
        tiny = np.full((400, 400), 1e-41, np.float32)
        one = np.eye(400, dtype=np.float32)
        np.testing.assert_array_equal(cpu.matmul(tiny, one), tiny)
    finally:
        backend.set_num_threads(before)
