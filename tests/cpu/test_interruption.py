"""Ctrl-C during a call: the kernels stop between two tiles, and what Python's handler does decides how it goes on."""

from __future__ import annotations

import signal

import pytest

from .test_process import python

pytestmark = pytest.mark.slow

# An interruption comes after a fifth of a call. That it stops then, and not at its end, is told in parts of the call.
PROGRAM = """
import os, signal, threading, time, torch
from fastcl import functional

LOSSES = {
    "both directions": lambda x, y: functional.clip(x, y, logit_scale=10.0),
    "one direction": lambda x, y: functional.info_nce(x, y),
    "with itself": lambda x, y: functional.nt_xent(x, y),
}
x, y = (torch.randn(3072, 256, generator=torch.Generator().manual_seed(k), requires_grad=True) for k in (0, 1))

def step(loss):
    x.grad = y.grad = None
    value = LOSSES[loss](x, y)
    value.backward()
    return value.detach(), x.grad, y.grad

def interrupt(after):
    def send():
        time.sleep(after)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    sent = []
    threading.Thread(target=send).start()
    return sent

def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

for loss in LOSSES:
    step(loss)
    lengths = []
    for _ in range(3):  # the shortest: on a busy machine one may take five times as long, and the next end before it is interrupted
        began = time.monotonic()
        whole = step(loss)
        lengths.append(time.monotonic() - began)
    length = min(lengths)

    sent = interrupt(length / 5)
    try:
        step(loss)
        raise SystemExit(f"{loss}: not interrupted")
    except KeyboardInterrupt:
        waited = time.monotonic() - sent[0]
        assert waited < length / 2, f"{loss}: {waited} of {length} s"

    notes = []
    signal.signal(signal.SIGINT, lambda *_: notes.append(1))
    interrupt(length / 5)
    assert same(step(loss), whole), f"{loss}: after a handler that only takes a note"
    assert notes == [1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt(length / 5)
    assert same(step(loss), whole), f"{loss}: ignored"
    signal.signal(signal.SIGINT, signal.default_int_handler)

    found = []
    thread = threading.Thread(target=lambda: found.append(step(loss)))
    thread.start()
    try:
        interrupt(length / 5)
        time.sleep(20 * length)
        raise SystemExit("the first thread was not interrupted")
    except KeyboardInterrupt:
        thread.join()
    assert same(found[0], whole), f"{loss}: in another thread"

assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    raise SystemExit("Python's handler is not there any more")
except KeyboardInterrupt:
    print("right")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs POSIX signals")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_stops_where_it_is(threads: int) -> None:
    done = python(PROGRAM, OMP_NUM_THREADS=str(threads))
    assert done.stdout == "right\n", done.stdout + done.stderr


# A child that a thread forks while the first thread is in a call has our handler, and no call of its own that would take it back.
FORKED = """
import os, signal, sys, threading, time, torch
from fastcl import functional

x, y = (torch.randn(4096, 256, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
value = functional.clip(x[:500], y[:500], logit_scale=10.0)

def child():
    signal.alarm(30)  # of a call that is made again and again
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    return all(torch.equal(functional.clip(x[:500], y[:500], logit_scale=10.0), value) for _ in range(3))

def fork():
    global pid
    time.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if child() else 1)

thread = threading.Thread(target=fork)
thread.start()
while thread.is_alive():
    functional.clip(x, y, logit_scale=10.0)
print("right" if os.waitpid(pid, 0)[1] == 0 else "wrong")
"""


def test_a_child_that_was_forked_meanwhile() -> None:
    done = python(FORKED, OMP_NUM_THREADS="1")
    assert done.stdout == "right\n", done.stdout + done.stderr
