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
from typing import IO, Any

from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.errors import UserError
from flashinfer.plan import memory

SECONDS = 8  # for all requests together that make one answer for the user
LINE_BYTES = 32 << 20  # the longest line of an answer
SCRIPT = Path(__file__).with_name("text_worker.py")


class WorkerFailed(UserError):
    """A request failed; the message is the reason, without a file's name.

    of_memory  whether the reason may be too little memory
    """

    def __init__(self, message: object, of_memory: bool = False) -> None:
        super().__init__(message)
        self.of_memory = of_memory


class Worker:
    """The process of text_worker.py, and its pipes.

    The process ends when it fails to answer. While it lives ``memory.rss`` counts its memory, or
    ``set_aside`` bytes where that is more.
    """

    def __init__(self, set_aside: int = 0) -> None:
        environment = {
            **os.environ,
            "FLASHINFER_WORKER_PATH": json.dumps(sys.path),
            "TOKENIZERS_PARALLELISM": "false",
            "RAYON_NUM_THREADS": "1",
            "RUST_BACKTRACE": "0",  # a backtrace takes memory that a panic may not have
            "MALLOC_ARENA_MAX": "1",
        }
        try:
            # In a session of its own Ctrl-C does not reach it; this process ends it.
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SCRIPT)], env=environment, bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{sys.executable}: {error.strerror}") from None
        memory.helpers[self.process.pid] = set_aside
        self.end = weakref.finalize(self, _end, self.process)

    @property
    def alive(self) -> bool:
        return self.end.alive

    def ask(
        self, do: str, data: bytes, most_memory: int, seconds: float, **request: Any
    ) -> tuple[JsonObject, bytes]:
        """The answer to a request, and the bytes that come with it.

        data         bytes that belong to the request
        most_memory  bytes of address space that the process may take in all
        seconds      after which the request fails
        Raises WorkerFailed where the request fails. The process is ended where it died or did not
        answer in time.
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
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # no answer, or a broken one
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

    def _write(self, data: bytes, deadline: float) -> None:
        descriptor, left = _pipe(self.process.stdin).fileno(), memoryview(data)
        os.set_blocking(descriptor, False)
        while left:
            self._wait(descriptor, select.POLLOUT, deadline)
            left = left[os.write(descriptor, left[: 1 << 16]) :]

    def _read_line(self, deadline: float) -> tuple[bytes, bytes]:
        """(a line, the bytes behind it that were read with it)."""
        found = bytearray()
        while (at := found.find(b"\n")) < 0:
            found += self._some(1 << 16, deadline)
            if len(found) > LINE_BYTES:
                raise EOFError
        return bytes(found[:at]), bytes(found[at + 1 :])

    def _read(self, n: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while n > 0:
            parts.append(self._some(min(n, 1 << 20), deadline))
            n -= len(parts[-1])
        return b"".join(parts)

    def _some(self, n: int, deadline: float) -> bytes:
        """At least one and at most ``n`` bytes. Raises EOFError where the process has ended."""
        descriptor = _pipe(self.process.stdout).fileno()
        self._wait(descriptor, select.POLLIN, deadline)
        data = os.read(descriptor, n)
        if not data:
            raise EOFError
        return data

    @staticmethod
    def _wait(descriptor: int, event: int, deadline: float) -> None:
        """Wait until a pipe is ready. Raises TimeoutError."""
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process, and leave neither a zombie nor an open pipe."""
    memory.helpers.pop(process.pid, None)
    process.kill()
    process.wait()
    _pipe(process.stdin).close()
    _pipe(process.stdout).close()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    """A pipe to the process, which Popen always makes where it is given PIPE."""
    assert pipe is not None
    return pipe
