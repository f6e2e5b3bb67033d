"""Starting, asking and ending the process that reads untrusted tokenizers and templates."""

import json
import math
import os
import select
import subprocess
import sys
import time
import weakref
from pathlib import Path

from flashinfer.formats.errors import UserError
from flashinfer.plan import memory

SECONDS = 8  # that the requests which make one answer for the user may take together
LINE_BYTES = 32 << 20  # an answer is read up to here
SCRIPT = Path(__file__).with_name("text_worker.py")


class WorkerFailed(UserError):
    """A request failed; the message is the reason, without a name in front.

    of_memory  whether it was memory that did not suffice, as far as is known
    """

    def __init__(self, message, of_memory=False):
        super().__init__(message)
        self.of_memory = of_memory


class Worker:
    """The process of text_worker.py, and whatever it holds.

    Any failure to answer ends it. Its memory counts in ``memory.rss`` while it lives, as that of
    ``set_aside`` bytes at least.
    """

    def __init__(self, set_aside=0):
        environment = {
            **os.environ,
            "FLASHINFER_WORKER_PATH": json.dumps(sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "RUST_BACKTRACE": "0",  # which takes memory that a panic may not have
            "MALLOC_ARENA_MAX": "1",
        }
        try:
            # In a session of its own, where no Ctrl-C reaches it: whoever asks ends it.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SCRIPT)], env=environment, bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{sys.executable}: {error.strerror}") from None
        memory.helpers[self.process.pid] = set_aside
        self.end = weakref.finalize(self, _end, self.process)

    @property
    def alive(self):
        return self.end.alive

    def ask(self, do, data, most_memory, seconds, **request):
        """The answer (a dict) to a request, and the bytes that came with it.

        data         bytes that belong to the request
        most_memory  bytes of address space that the process may take in all
        seconds      until it has failed
        Raises WorkerFailed where the request fails; where the process died or did not answer in
        time, it has ended.
        """
        deadline = time.monotonic() + seconds
        cpu = max(1, math.ceil(seconds))
        request.update(do=do, nbytes=len(data), seconds=cpu, memory=max(0, most_memory))
        try:
            self._write(json.dumps(request).encode() + b"\n", deadline)
            self._write(data, deadline)
            line, rest = self._read_line(deadline)
            answer = json.loads(line)
            rest += self._read(answer["nbytes"] - len(rest), deadline)
        except TimeoutError:
            self.end()
            raise WorkerFailed(f"it takes more than {SECONDS} seconds") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # no answer, or no sound one
            self.end()
            raise WorkerFailed(
                "it takes too much memory, or makes its library fail", True
            ) from None
        except BaseException:
            self.end()
            raise
        if "error" in answer:
            reason = " ".join(str(answer["error"]).split())
            raise WorkerFailed(reason or "it fails", bool(answer.get("of_memory")))
        return answer, rest

    def _write(self, data, deadline):
        descriptor, data = self.process.stdin.fileno(), memoryview(data)
        os.set_blocking(descriptor, False)
        while data:
            self._wait(descriptor, select.POLLOUT, deadline)
            data = data[os.write(descriptor, data[: 1 << 16]) :]

    def _read_line(self, deadline):
        """(a line, what was read of what follows it)."""
        found = bytearray()
        while (at := found.find(b"\n")) < 0:
            found += self._some(1 << 16, deadline)
            if len(found) > LINE_BYTES:
                raise EOFError
        return bytes(found[:at]), bytes(found[at + 1 :])

    def _read(self, n, deadline):
        parts = []
        while n > 0:
            parts.append(self._some(min(n, 1 << 20), deadline))
            n -= len(parts[-1])
        return b"".join(parts)

    def _some(self, n, deadline):
        descriptor = self.process.stdout.fileno()
        self._wait(descriptor, select.POLLIN, deadline)
        data = os.read(descriptor, n)
        if not data:
            raise EOFError
        return data

    @staticmethod
    def _wait(descriptor, event, deadline):
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError


def _end(process):
    """Kill it, and leave neither a zombie nor an open pipe."""
    memory.helpers.pop(process.pid, None)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
