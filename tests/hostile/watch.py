"""Feed hostile input to a reader in a forked child, and say all that went wrong.

The child starts warm, may not take more than a bound of memory, and its every sensitive act is
seen by an audit hook. Invariant: an input is accepted, refused in one line, or a defect; what kills
or stops the child counts against the input it was reading.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kdcache.errors import KdcacheError

HANG = 10.0  # seconds
# Resident memory an input of a few kB may take, and address space as a second bound, for what is
# asked for and never touched.
MAX_RESIDENT = 96 * 2**20
MAX_ADDRESSES = 640 * 2**20
LONGEST_LINE = 2000
# Seed of the inputs that a process is warmed up with.
WARM = 2**31

# By the start of an audit event's name. Whatever runs, loads, starts or talks.
FORBIDDEN = (
    "exec", "compile", "pickle.find_class", "marshal.", "os.system", "os.exec", "os.fork",
    "os.posix_spawn", "os.spawn", "os.startfile", "pty.", "subprocess.", "socket.", "ctypes.",
    "import", "os.kill", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink",
    "os.truncate", "os.chmod", "os.chown", "os.utime", "os.putenv", "shutil.", "tempfile.",
    "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "code.__new__", "sys.addaudithook",
    "mmap.__new__",
)  # fmt: skip
ALLOWED_EVENTS: tuple[str, ...] = ("exec_module",)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watched(Protocol):
    """What is fed: `kinds.Kind`."""

    @property
    def seeds(self) -> tuple[bytes, ...]:
        """Inputs that are in order."""

    @property
    def refused(self) -> bool:
        """Even those are refused."""

    @property
    def put(self) -> Callable[[Path, bytes], None]:
        """Place an input in a folder."""

    @property
    def read(self) -> Callable[[Path], object]:
        """Read it."""

    def make(self, seed: int, number: int) -> bytes:
        """A damaged input."""


@dataclass
class Found:
    """What became of some inputs.

    Attributes:
        tried, accepted, refused: how many.
        peak: largest growth of resident memory by one input, bytes.
        slowest: seconds.
        said: the last refusal.
        defects: number of the input, and what was wrong.
    """

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    peak: int = 0
    slowest: float = 0.0
    said: str = ""
    defects: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Found) -> None:
        self.tried += other.tried
        self.accepted += other.accepted
        self.refused += other.refused
        self.peak = max(self.peak, other.peak)
        self.slowest = max(self.slowest, other.slowest)
        self.said = other.said or self.said
        self.defects += other.defects


class Watch:
    """The audit hook of a process; it looks only while something is fed."""

    def __init__(self, target: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self._target = str(target)
        # What libraries may read of themselves.
        self._own = (sys.prefix, sys.base_prefix, "/proc/", "/sys/", str(Path(__file__).parents[2]))
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, flags = str(arguments[0]), int(arguments[2] or 0)
            if flags & WRITING:
                self._say(f"writes {path}")
            # A name without a folder is opened below a store's directory.
            elif (path.startswith("/") or ".." in path) and not path.startswith(
                (self._target, *self._own)
            ):
                self._say(f"reads {path}")
        elif event == "compile" and arguments[1] == "<unknown>":
            # `ast.literal_eval`: parsed, never run; what runs is an "exec".
            return
        elif event.startswith(FORBIDDEN):
            self._say(f"{event} {arguments!r:.120}")

    def _say(self, what: str) -> None:
        self.on = False
        self.seen.append(what)
        self.on = True


def warm_up(kind: Watched, folder: Path, n: int = 40) -> None:
    """Whatever is imported or built at the first use is so afterwards.

    Raises:
        KdcacheError: a seed is refused.
    """
    folder.mkdir(parents=True)
    for codec in ("utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "latin1"):
        codecs.lookup(codec)  # the json module tells them apart by the first bytes
    for data in kind.seeds:
        kind.put(folder, data)
        if not kind.refused:
            kind.read(folder)
    # Errors take other ways through the libraries. In a child first: it may die of them.
    found = feed_many(lambda number: kind.make(WARM, number), kind, range(n), folder)
    deadly = {
        number for number, what in found.defects if what.startswith(("killed", "hangs", "left"))
    }
    for number in set(range(n)) - deadly:
        with warnings.catch_warnings(), suppress(Exception):
            warnings.simplefilter("ignore")
            kind.put(folder, kind.make(WARM, number))
            kind.read(folder)


def feed_many(
    make: Callable[[int], bytes],
    kind: Watched,
    numbers: range,
    folder: Path,
    *,
    max_resident: int = MAX_RESIDENT,
) -> Found:
    """Feed the inputs of these numbers, in as many children as it takes.

    Args:
        make: the input of a number.
        kind: places and reads it; a KdcacheError is the only way out.
        numbers: of the inputs.
        folder: the child may have anything in it read.
        max_resident: bytes that resident memory may grow by, beside the bytes of the input.
    """
    found = Found()
    start = numbers.start
    while start < numbers.stop:
        start = _one_child(make, kind, range(start, numbers.stop), folder, max_resident, found)
    return found


def _one_child(
    make: Callable[[int], bytes],
    kind: Watched,
    numbers: range,
    folder: Path,
    max_resident: int,
    found: Found,
) -> int:
    """Feed until all are fed or the child dies; the number to go on with."""
    progress = mmap.mmap(-1, 8)
    # A file, not a pipe: nobody empties it before the child is done.
    results = tempfile.TemporaryFile("w+")  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of a warm process
        pid = os.fork()
    if not pid:
        try:
            _child(make, kind, numbers, folder, max_resident, progress, results.fileno())
        finally:
            os._exit(1)
    killed = _wait(pid, progress)
    status = killed[1]
    with results:
        results.seek(0)
        lines = results.read().splitlines()
    for line in lines:
        if line.endswith("}"):
            told = json.loads(line)
            told["defects"] = [tuple(defect) for defect in told["defects"]]
            found.add(Found(**told))
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
        return numbers.stop
    last = numbers.start + max(0, int.from_bytes(progress[:8], "little") - 1)
    how = (
        f"hangs for {HANG:.0f} s"
        if killed[0]
        else f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        if os.WIFSIGNALED(status)
        else f"left with {os.WEXITSTATUS(status)}"
    )
    found.add(Found(tried=1, defects=[(last, how)]))
    return last + 1


def _wait(pid: int, progress: mmap.mmap) -> tuple[bool, int]:
    """Whether the child had to be killed, and its status."""
    before, since = b"", time.monotonic()
    pause = 0.002
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return False, status
        now = progress[:8]
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > HANG:
            os.kill(pid, signal.SIGKILL)
            return True, os.waitpid(pid, 0)[1]
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)


def _child(
    make: Callable[[int], bytes],
    kind: Watched,
    numbers: range,
    folder: Path,
    max_resident: int,
    progress: mmap.mmap,
    pipe: int,
) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    watch = Watch(folder)
    limit = _memory("VmSize") + MAX_ADDRESSES + max_resident
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for k, number in enumerate(numbers):
        data = make(number)
        progress[:8] = (k + 1).to_bytes(8, "little")
        one = _feed_one(kind, folder, data, watch, max_resident)
        one.defects = [(number, what) for _, what in one.defects]
        os.write(pipe, (json.dumps(vars(one)) + "\n").encode())
    os._exit(0)


def _feed_one(kind: Watched, folder: Path, data: bytes, watch: Watch, max_resident: int) -> Found:
    one = Found(tried=1)
    problems: list[str] = []
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, started = _memory("VmHWM"), time.monotonic()
    watch.seen.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kind.put(folder, data)
            watch.on = True
            kind.read(folder)
        one.accepted = 1
    except KdcacheError as error:
        one.refused, one.said = 1, str(error)[:LONGEST_LINE]
        problems += _line_problems(str(error))
    except BaseException as error:
        problems.append(f"{type(error).__name__}: {error!s:.200} at {_origin(error)}")
    finally:
        watch.on = False
    one.slowest = time.monotonic() - started
    one.peak = max(0, _memory("VmHWM") - before)
    if one.peak > max_resident + len(data):
        problems.append(f"takes {one.peak >> 20} MiB for {len(data)} bytes")
    problems += watch.seen
    if problems:
        one.accepted = one.refused = 0
        one.defects = [(0, problem) for problem in problems]
    return one


def _line_problems(message: str) -> list[str]:
    problems = []
    if not message.isprintable():
        bad = next(c for c in message if not c.isprintable())
        at = message.index(bad)
        problems.append(f"the line holds {bad!r}: {message[max(0, at - 60) : at + 20]!r}")
    if len(message) > LONGEST_LINE:
        problems.append(f"the line has {len(message)} characters: {message[:80]!r}")
    return problems


def _origin(error: BaseException) -> str:
    """The last line of ours on the way to an error."""
    trace, where = error.__traceback__, "?"
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/kdcache/" in code.co_filename:
            where = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"the system does not say {name}")
