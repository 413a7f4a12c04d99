"""Runs a body in a forked child, so that a fault, a hang or an exit is a result and not the end of the test run."""

import faulthandler
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    status: int  # exit status; -signal if one ended the child
    said: str  # what the body said; the end of it tells where it died
    seconds: float

    def check(self) -> None:
        how = f"signal {signal.Signals(-self.status).name}" if self.status < 0 else f"status {self.status}"
        assert self.status == 0, f"child ended with {how}; last words: {self.said[-2000:]}"


def run(body: Callable[[Callable[[str], None]], None], timeout: float = 60.0) -> Outcome:
    """body(say) runs in the child; an exception ends it with status 1 and the traceback as its last words."""
    begin = time.monotonic()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            body(lambda text: (os.write(writer, (text + "\n").encode()), None)[1])
            status = 0
        except BaseException:  # whatever it is, the child must not return into the test runner
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    said = b""
    while True:
        left = timeout - (time.monotonic() - begin)
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            said += b"\n(killed: out of time)"
            break
        piece = os.read(reader, 65536)
        if not piece:
            break
        said += piece
    os.close(reader)
    _, wait_status = os.waitpid(pid, 0)
    return Outcome(os.waitstatus_to_exitcode(wait_status), said.decode(errors="replace"), time.monotonic() - begin)
