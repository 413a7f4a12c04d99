"""The engine leaves its host as it was: no output, no busy threads, no changed signals, affinity or float behaviour."""

import ctypes
import ctypes.util
import os
import signal
import time

import numpy as np
import torch
from oracle import child
from oracle.layers import Layer, Shape, make_inputs, make_lora, make_pool
from oracle.registry import ISAS

SHAPE = Shape(8, 2, 96, 48)


def use_everything(isa: str, threads: int = 3) -> Layer:
    layer, lora, x = Layer(SHAPE, "int8", isa, threads=threads), make_lora(SHAPE, 4), make_inputs(SHAPE, 60)
    adapter = layer.adapter(lora)
    layer.forward(x, adapter)
    _, cache = layer.train(x, adapter)
    layer.backward(cache, torch.randn(60, 96).bfloat16(), adapter, lora)
    return layer


def status(field: str) -> str:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(line.split(":")[1].strip() for line in lines if line.startswith(field + ":"))


def test_an_idle_engine_uses_no_cpu() -> None:
    layer = use_everything(ISAS[0])
    time.sleep(0.05)
    begin = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - begin < 0.1
    assert layer.pool.started


def test_no_output(capfd: object) -> None:
    for isa in ISAS:
        use_everything(isa)
    captured = capfd.readouterr()  # type: ignore[attr-defined]
    assert captured.out == ""
    assert captured.err == ""


def test_signals_affinity_and_folder_stay() -> None:
    def state() -> tuple:
        masks = tuple(status(f) for f in ("SigCgt", "SigIgn", "SigBlk"))
        return masks, os.sched_getaffinity(0), os.getcwd(), dict(os.environ), signal.getsignal(signal.SIGINT)

    before = state()
    use_everything(ISAS[0])
    assert state() == before


def float_control() -> tuple[int, int]:
    """x87 control word and MXCSR without the sticky exception flags, as fegetenv stores them."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    environment = (ctypes.c_uint32 * 8)()
    assert libm.fegetenv(environment) == 0
    return environment[0] & 0xFFFF, environment[7] & ~0x3F


def test_float_behaviour_stays() -> None:
    before = float_control()
    assert before[1] == 0x1F80  # round to nearest, subnormals kept, exceptions masked
    for isa in ISAS:
        use_everything(isa)
        assert float_control() == before, isa
    tiny = np.float32(1e-40)
    assert tiny * np.float32(0.5) != 0


def test_pools_leave_no_threads_and_no_files() -> None:
    def body(say: object) -> None:
        use_everything(ISAS[0])
        threads, files = int(status("Threads")), len(os.listdir("/proc/self/fd"))
        for i in range(200):
            say(str(i))
            pool = make_pool(1 + i % 4)
            if i % 3:
                Layer(Shape(2, 1, 64, 48), "bf16", "", pool=pool).forward(make_inputs(Shape(2, 1, 64, 48), 100))
            del pool
        until = time.monotonic() + 5
        while int(status("Threads")) > threads and time.monotonic() < until:
            time.sleep(0.01)
        assert int(status("Threads")) <= threads
        assert len(os.listdir("/proc/self/fd")) <= files

    child.run(body).check()


def test_no_memory_is_kept_per_call() -> None:
    """Resident memory after many forwards and backwards is what it was after the first ones."""

    def body(say: object) -> None:
        layer, lora = Layer(SHAPE, "bf16", "", threads=2), make_lora(SHAPE, 4)
        adapter, x = layer.adapter(lora), make_inputs(SHAPE, 100)
        dy = torch.randn(100, 96).bfloat16()

        def step() -> None:
            layer.backward(layer.train(x, adapter)[1], dy, adapter, lora)

        def resident() -> int:
            return int(status("VmRSS").split()[0])

        for _ in range(50):
            step()
        before = resident()
        for _ in range(300):
            step()
        say(f"{before} kB, then {resident()} kB")
        assert resident() - before < 4096

    child.run(body).check()
