"""Ctrl-C, SIGTERM and a terminal that closes end the process within a second, also inside native code.

Python runs a signal handler only when the main thread is back from native code, which may take minutes. The signal's
number also reaches a thread, through the wake-up descriptor: it gives the main thread a moment to unwind and then
ends the process; the files of its locks go with it. What is on disk must therefore be sound at any time, as after a
kill. Native code that keeps Python's lock also keeps this thread waiting; encoders, PyTorch and llama.cpp do not.

Where Python has nobody to raise an exception to (what native code calls back, as LLVM does when numba compiles, and
what is called for objects that go), it prints the exception and goes on: the process ends there instead.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from dynquant.storage.lock import remove_held

EXIT_STATUS = 130
GRACE_SECONDS = 0.5
"""Time that the main thread may take to unwind."""
SAYING_SECONDS = 0.3
"""Time that the last words may take: a terminal or pipe may not be read any more."""

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP else []))


class Interrupted(BaseException):
    """Raised in the main thread by the first signal; libraries turn KeyboardInterrupt into exits of their own."""


@contextmanager
def ends_promptly(say: Callable[[], None]) -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM or SIGHUP calls `say`, once, and ends the process with EXIT_STATUS.

    SIGHUP is ignored where it was, as under nohup. Does nothing outside the main thread, where Python allows no
    handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = _Ending(say)
    receiver, sender = socket.socketpair()
    sender.setblocking(False)  # Python's handler writes to it and must not wait
    heeded = [each for each in _SIGNALS if each != _HANGUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, ending.raise_once) for number in heeded}
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    print_unraisable, sys.unraisablehook = sys.unraisablehook, ending.unraisable
    threading.Thread(target=ending.watch, args=(receiver,), daemon=True, name="signals").start()
    try:
        yield
    except Interrupted:
        ending.leave()
    finally:
        sys.unraisablehook = print_unraisable
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        sender.close()


class _Ending:
    """The end of the process, by whichever thread comes first."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._print_unraisable = sys.unraisablehook
        self._lock = threading.Lock()
        self._was_raised = False

    def raise_once(self, *_: object) -> None:
        """The handler: what unwinds after the first signal is not disturbed by a second one."""
        if not self._was_raised:
            self._was_raised = True
            raise Interrupted

    def unraisable(self, dropped: "sys.UnraisableHookArgs") -> None:
        """Python drops an exception: of an interruption, this is the end; others are printed as ever."""
        if isinstance(dropped.exc_value, Interrupted):
            self.leave()
        self._print_unraisable(dropped)

    def watch(self, receiver: socket.socket) -> None:
        """Wait for a signal's number; then for a second one, or until the main thread has had its time."""
        with receiver:
            while (received := receiver.recv(1)) and received[0] not in _SIGNALS:
                pass
            if not received:
                return
            receiver.settimeout(GRACE_SECONDS)
            with suppress(TimeoutError):
                receiver.recv(1)
        self.leave()

    def leave(self) -> NoReturn:
        """Say the last words and end; the lock stays taken."""
        self._lock.acquire()  # for ever: a second thread that comes here waits for the end
        speaker = threading.Thread(target=self._say, daemon=True)  # a pipe that nobody reads would hold this one
        speaker.start()
        speaker.join(SAYING_SECONDS)
        remove_held()
        os._exit(EXIT_STATUS)  # sys.exit would wait for native threads
