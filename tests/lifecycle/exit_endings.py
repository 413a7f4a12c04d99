"""Program of test_process_exit.py: for each ending, a forked child runs it and then ends as any Python program does.

One process imports torch for all of them. Prints a JSON list of {name, status, seconds, output} as its last line.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import textwrap
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from oracle.layers import Layer, Shape, make_inputs

from ktmoe import _ext

SETUP = """
shape = Shape(8, 2, 256, 256)
layer, x = Layer(shape, "bf16", "", threads=3), make_inputs(shape, 100)
out = torch.empty(100, 256, dtype=torch.bfloat16)
def submit(queue, n):
    return [queue.submit_forward(layer.engine, x.hidden, x.ids, x.weights, out) for _ in range(n)]
"""

ENDINGS = {
    "nothing used": "",
    "pool parked": "layer.forward(x)",
    "queue idle": "queue = _ext.TaskQueue(); submit(queue, 3); queue.drain()",
    "queue still holds work": "queue = _ext.TaskQueue(); submit(queue, 300)",
    "queue gone, work left": "submit(_ext.TaskQueue(), 300)",
    "queue closed early": "queue = _ext.TaskQueue(); submit(queue, 300); queue.close(0.05)",
    "results gone, work left": "queue = _ext.TaskQueue(); submit(queue, 300); del out, layer, x",
    "daemon threads run forwards": """
        import time
        from torch.utils.dlpack import to_dlpack
        long = make_inputs(shape, 8000)
        outs = [torch.empty_like(long.hidden) for _ in range(3)]
        for own in outs:  # tensors that stay: torch itself aborts when a daemon thread frees one at the very end
            arrays = [to_dlpack(t) for t in (long.hidden, long.ids, long.weights, own)]
            threading.Thread(target=layer.engine.forward, args=arrays, daemon=True).start()
        time.sleep(0.05)
    """,
    "sys.exit while a thread works": """
        t = threading.Thread(target=lambda: [layer.forward(x) for _ in range(20)])
        t.start()
        sys.exit(0)
    """,
    "after an error in a worker": """
        try: _ext.testing.failing_job(layer.pool, 50, 3)
        except RuntimeError: pass
    """,
}
REPEATS = 100 if os.environ.get("KTMOE_SOAK") else 2
LIMIT_S = 10.0


def wait(pid: int) -> tuple[int, float]:
    begin = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - begin
        if done:
            return os.waitstatus_to_exitcode(status), seconds
        if seconds > LIMIT_S:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


gc.collect()
gc.freeze()  # the end of a child does not go through all objects of torch again
results: list[dict] = []
ending: str | None = None
for name in [name for name in ENDINGS for _ in range(REPEATS)]:
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            ending = name
            break
        status, seconds = wait(pid)
        output.seek(0)
        results.append({"name": name, "status": status, "seconds": seconds, "output": output.read().decode()})
if ending is None:
    print(json.dumps(results))
else:
    scope = {"torch": torch, "threading": threading, "sys": sys, "_ext": _ext}
    scope |= {"Layer": Layer, "Shape": Shape, "make_inputs": make_inputs}
    exec(SETUP + textwrap.dedent(ENDINGS[ending]), scope)
