"""Sandbox: the only place that runs code which a model has written.

A program runs in the interpreter that runs us, inside bubblewrap: as an ordinary user without rights, in namespaces of
its own, with no network, no /proc, none of our environment, and nothing of the host to see but system libraries,
the interpreter and its packages, all read-only. The one place it can write to is a small scratch directory in memory.
Of time, processor, memory, processes, output and files it has what `Limits` says; when one of them is spent, or the
program is done, everything that it has started is killed with its process namespace.

Linux only. Where bubblewrap is missing or may not make namespaces, a `Sandbox` is refused, unless the user says in so
many words that code is to run without one (`allow_unsafe=True`): then limits hold, and nothing is hidden.

Knows programs as text; knows nothing of models, tools or tests.
"""

import contextlib
import errno
import inspect
import os
import platform
import selectors
import shlex
import shutil
import signal
import site
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from recursivemas.errors import ConfigError, SandboxError

MIB = 1024 * 1024
NOBODY = 65534
"""Whom a program runs as if we are root: the user whom nothing belongs to."""
REASONS = ("finished", "failed", "time", "cpu", "memory", "output", "killed")
"""How a program ended: by itself, well or with an exception or an exit code; at one of its limits; by a signal."""
SCRATCH = "/tmp"
"""The scratch directory, as a program sees it."""

_START_SECONDS = 20.0
_WATCH_SECONDS = 0.05


class SandboxWarning(UserWarning):
    """Code of a model runs without a sandbox."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. Bytes, seconds and counts."""

    seconds: float = 10.0
    """By the clock, from when the program begins."""
    cpu_seconds: int = 10
    """Processor time of each process, over all its threads."""
    memory: int = 1024 * MIB
    """Address space of each process, and memory of all of them together."""
    processes: int = 32
    """Processes and threads at a time."""
    output: int = 64 * 1024
    """Of each of standard output, standard error and the value of the last expression."""
    file_size: int = 10 * MIB
    scratch: int = 64 * MIB
    """All that the scratch directory holds."""
    open_files: int = 64

    def __post_init__(self) -> None:
        for each in fields(self):
            value, least = getattr(self, each.name), 0.05 if each.name == "seconds" else 1
            kinds = (int, float) if each.name == "seconds" else (int,)
            if not isinstance(value, kinds) or isinstance(value, bool) or not value >= least:
                raise ConfigError(f"the limit '{each.name}' must be a number, {least} or more; got {value!r}")


@dataclass(frozen=True)
class Execution:
    """How a program went."""

    reason: str
    """One of `REASONS`."""
    stdout: str
    stderr: str
    value: str | None = None
    """`repr` of the program's last statement, if that is an expression and not None."""
    seconds: float = 0.0
    detail: str = ""
    """What is to be said of the reason: which limit, which signal."""

    @property
    def is_finished(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.reason == "finished"

    def to_text(self) -> str:
        """All of it in one text: what was printed, the value, and what went wrong. Never empty."""
        parts = [self.stdout.rstrip("\n"), self.value or "", self.stderr.rstrip("\n")]
        if not self.is_finished:
            parts.append(f"[{self.reason}: {self.detail}]")
        return "\n".join(part for part in parts if part) or "[finished without output]"


class Sandbox:
    """Runs programs, each in a fresh interpreter that nothing of an earlier one reaches.

    `spares` interpreters are started ahead, in the background, so that a program need not wait for one; close the
    sandbox, or use it as a context manager, to end them. Programs may be run from several threads at once.
    """

    def __init__(self, limits: Limits | None = None, *, spares: int = 0, allow_unsafe: bool = False) -> None:
        """Raises `SandboxError`, with the reason, if there is no sandbox here and `allow_unsafe` does not say so."""
        self.limits = limits or Limits()
        self.is_unsafe = False
        reason = sandbox_problem()
        if reason is not None:
            if not allow_unsafe:
                raise SandboxError(
                    f"code of models cannot be run here: {reason}. To run it all the same, with the rights of this "
                    "user, ask for that in so many words: allow_unsafe=True, or --run-code-without-sandbox"
                )
            self.is_unsafe = True
            warnings.warn(
                f"no sandbox ({reason}): code that a model writes can read and change whatever this user can",
                SandboxWarning,
                stacklevel=2,
            )
        self._spares: list[_Interpreter] = []
        self._num_spares = spares
        self._changed = threading.Condition()
        self._is_closed = False
        self._starter: threading.Thread | None = None
        if spares:
            # What bubblewrap starts dies with the thread that started it, so spares have a thread of their own.
            self._starter = threading.Thread(target=self._keep_spares, name="sandbox spares", daemon=True)
            self._starter.start()

    def run(self, program: str, stdin: str = "") -> Execution:
        """Run a program to its end, or to its limits.

        Raises `SandboxError` if the sandbox itself fails, `ConfigError` if it has been closed.
        """
        interpreter = self._take()
        try:
            return interpreter.execute(program, stdin)
        finally:
            interpreter.kill()

    def run_many(self, programs: Sequence[str], stdins: Sequence[str] = (), *, at_once: int = 8) -> list[Execution]:
        """Run several programs, `at_once` at a time; results come in their order."""
        inputs = stdins or [""] * len(programs)
        if len(inputs) != len(programs):
            raise ConfigError(f"{len(inputs)} inputs were given for {len(programs)} programs; give one for each")
        with ThreadPoolExecutor(max_workers=at_once) as threads:
            return list(threads.map(self.run, programs, inputs))

    def close(self) -> None:
        """End the interpreters that were started ahead."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._starter is not None:
            self._starter.join()
        for spare in self._spares:
            spare.kill()
        self._spares.clear()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self) -> "_Interpreter":
        with self._changed:
            if self._is_closed:
                raise ConfigError("this sandbox has been closed; make another one")
            while self._spares:
                spare = self._spares.pop(0)
                self._changed.notify_all()
                if spare.is_alive:
                    return spare
                spare.kill()
        return _Interpreter(self.limits, self.is_unsafe)

    def _keep_spares(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or len(self._spares) < self._num_spares)
                if self._is_closed:
                    return
            try:
                spare = _Interpreter(self.limits, self.is_unsafe)
            except SandboxError:
                return  # whoever runs a program starts an interpreter, and is told why it fails
            with self._changed:
                self._spares.append(spare)


@cache
def sandbox_problem() -> str | None:
    """Why programs cannot be confined on this machine, in a few words; None if they can. It is tried out once."""
    if sys.platform != "linux":
        return f"the sandbox needs Linux, this is {sys.platform}"
    needed = ["bwrap", *(["setpriv", "unshare", "mount"] if os.geteuid() == 0 else [])]
    for name in needed:
        if shutil.which(name) is None:
            package = "bubblewrap" if name == "bwrap" else "util-linux"
            return f"the command {name} is missing (install the package {package})"
    interpreter = None
    try:
        interpreter = _Interpreter(Limits(seconds=10.0), is_unsafe=False)
        seen = interpreter.execute("import os; os.getuid() != 0 and not os.path.exists('/proc/self')", "")
    except SandboxError as error:
        return str(error)
    finally:
        if interpreter is not None:
            interpreter.kill()
    return None if seen.value == "True" else f"a program in it fails: {seen.to_text()[-300:]}"


class _Interpreter:
    """An interpreter in the sandbox that waits for the one program it will run."""

    def __init__(self, limits: Limits, is_unsafe: bool) -> None:
        self._limits = limits
        self._scratch = tempfile.TemporaryDirectory(prefix="unconfined-") if is_unsafe else None
        scratch = SCRATCH if self._scratch is None else self._scratch.name
        task, self._task = os.pipe()
        self._report, report = os.pipe()
        given = [task, report]
        walls: list[str] = []
        if not is_unsafe:
            filters = _seccomp_file()
            given += [] if filters is None else [filters]
            walls = _walls(limits, filters)
        self._is_killed = False
        try:
            self._process = subprocess.Popen(
                [*walls, *_interpreter_command(task, report, limits, scratch, is_unsafe=is_unsafe)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=given,
                env=_environment(scratch),
                cwd=scratch if is_unsafe else "/",
                start_new_session=True,
            )
        except OSError as error:
            for end in (self._task, self._report):
                os.close(end)
            raise SandboxError(f"no interpreter could be started: {error}") from None
        finally:
            for end in given:
                os.close(end)

    @property
    def is_alive(self) -> bool:
        """Whether it can still take a program."""
        return self._process.poll() is None

    def execute(self, program: str, stdin: str) -> Execution:
        """Hand the program over, and wait for it."""
        self._await_ready()
        exchange = _Exchange(self._process, self._task, self._report, self._limits)
        self._task = -1
        return exchange.run(program.encode("utf-8", "replace"), stdin.encode("utf-8", "replace"))

    def _await_ready(self) -> None:
        """Wait until the interpreter is up, so that what it takes to start is not the program's time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._report, selectors.EVENT_READ)
            ready = selector.select(_START_SECONDS)
        if ready and os.read(self._report, 1) == b"R":
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        said = self._process.communicate()[1].decode("utf-8", "replace").strip()
        reason = said.splitlines()[-1][:300] if said else "no word from it"
        raise SandboxError(f"the interpreter in the sandbox did not start ({reason})")

    def kill(self) -> None:
        """End everything that it has started, and forget it."""
        if self._is_killed:
            return
        self._is_killed = True
        _kill(self._process)
        if self._scratch is not None:  # there is no namespace that ends with it
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for end in (self._task, self._report):
            if end >= 0:
                os.close(end)
        if self._scratch is not None:
            with contextlib.suppress(OSError):
                self._scratch.cleanup()


class _Exchange:
    """What goes to and fro between us and one running program."""

    def __init__(self, process: "subprocess.Popen[bytes]", task: int, report: int, limits: Limits) -> None:
        self._process = process
        self._limits = limits
        stdin, stdout, stderr = process.stdin, process.stdout, process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        self._heard: dict[int, bytearray] = {end: bytearray() for end in (stdout.fileno(), stderr.fileno(), report)}
        self._stdout, self._stderr, self._report = self._heard
        self._to_say: dict[int, memoryview] = {}
        self._task, self._stdin = task, stdin
        self._selector = selectors.DefaultSelector()

    def run(self, program: bytes, stdin: bytes) -> Execution:
        begin = time.monotonic()
        self._next_look = begin + _WATCH_SECONDS
        with self._selector:
            for end in self._heard:
                os.set_blocking(end, False)
                self._selector.register(end, selectors.EVENT_READ)
            for end, content in ((self._task, program), (self._stdin.fileno(), stdin)):
                os.set_blocking(end, False)
                self._to_say[end] = memoryview(content)
                self._selector.register(end, selectors.EVENT_WRITE)
            stopped = self._until(begin + self._limits.seconds)
            if stopped is not None:
                _kill(self._process)
                self._until(time.monotonic() + 0.5, is_over=True)
            for end in list(self._to_say):
                self._stop_saying(end)
        code = _kill(self._process)
        return self._execution(stopped, code, time.monotonic() - begin)

    def _until(self, deadline: float, *, is_over: bool = False) -> str | None:
        """Read and write until the program has ended (None), or has reached a limit (which)."""
        while (listening := self._heard.keys() & self._selector.get_map()) or self._process.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return "time"
            if not listening:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(min(left, _WATCH_SECONDS))
                continue
            ready = self._selector.select(min(left, _WATCH_SECONDS))
            for key, _ in ready:
                self._serve(key.fd)
            if not ready and self._process.poll() is not None:
                return None  # what it left behind holds on to its output
            if not is_over and (limit := self._spent()):
                return limit
        return None

    def _serve(self, end: int) -> None:
        if end in self._to_say:
            self._say(end)
        elif not self._hear(end):
            self._selector.unregister(end)

    def _spent(self) -> str | None:
        """The limit that has been reached, but for that of time."""
        if any(len(self._heard[end]) > self._limits.output for end in (self._stdout, self._stderr)):
            return "output"
        if time.monotonic() < self._next_look:
            return None
        self._next_look = time.monotonic() + _WATCH_SECONDS
        return "memory" if _memory_of(self._process.pid) > self._limits.memory else None

    def _say(self, end: int) -> None:
        rest = self._to_say[end]
        try:
            self._to_say[end] = rest = rest[os.write(end, rest[:65536]) :] if rest else rest
        except BlockingIOError:
            return
        except OSError:
            rest = rest[:0]  # nobody reads it: the program's affair
        if not rest:
            self._selector.unregister(end)
            self._stop_saying(end)

    def _stop_saying(self, end: int) -> None:
        del self._to_say[end]
        if end == self._task:
            os.close(end)
        else:
            with contextlib.suppress(OSError):
                self._stdin.close()

    def _hear(self, end: int) -> bool:
        """Read what there is; False when there will be no more. What is beyond the limit is not kept."""
        try:
            content = os.read(end, 65536)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno == errno.EIO:
                return False
            raise
        kept = self._heard[end]
        kept += content[: max(self._limits.output + 1 - len(kept), 0)]
        return bool(content)

    def _execution(self, stopped: str | None, code: int, seconds: float) -> Execution:
        stdout, stderr = (self._text(end) for end in (self._stdout, self._stderr))
        report = self._text(self._report)
        value = report[1:] if report[:1] == "V" else None
        reason, detail = self._reason(stopped, code, report[1:] if report[:1] == "E" else "")
        return Execution(reason, stdout, stderr, value, seconds, detail)

    def _reason(self, stopped: str | None, code: int, exception: str) -> tuple[str, str]:
        limits = self._limits
        told = {
            "time": f"stopped after {limits.seconds:g} s",
            "cpu": f"stopped after {limits.cpu_seconds} s of processor time",
            "memory": f"more than the {limits.memory // MIB} MiB of memory that a program may use",
            "output": f"more than the {limits.output} bytes that a program may print",
        }
        # bubblewrap tells of a signal as a shell does, or dies of it itself.
        number = code - 128 if code > 128 else -code if code < 0 else 0
        if stopped is None and exception == "MemoryError":
            stopped = "memory"
        if stopped is None and number == signal.SIGXCPU:
            stopped = "cpu"
        if stopped is not None:
            return stopped, told[stopped]
        if code == 0:
            return "finished", ""
        if number in {each.value for each in signal.Signals}:
            return "killed", f"by signal {number} ({signal.Signals(number).name})"
        return "failed", exception or f"exit code {code}"

    def _text(self, end: int) -> str:
        return bytes(self._heard[end][: self._limits.output]).decode("utf-8", "replace")


def _kill(process: "subprocess.Popen[bytes]") -> int:
    """Kill a sandbox with all that is in it; its exit code, which it keeps if it has ended by itself."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return process.wait()


def _memory_of(pid: int) -> int:
    """Bytes of memory that a process and all below it hold and share with no file; 0 where that cannot be seen."""
    total, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        with contextlib.suppress(OSError, ValueError):
            lines = (folder / "status").read_text(encoding="utf-8").splitlines()
            held = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
            total += 1024 * sum(map(int, held))
            for thread in (folder / "task").iterdir():
                with contextlib.suppress(OSError):
                    waiting += map(int, (thread / "children").read_text(encoding="utf-8").split())
    return total


# What stands around a program


def _environment(scratch: str) -> dict[str, str]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/bin:/bin", "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "TZ": "UTC", **threads}


def _interpreter_command(task: int, report: int, limits: Limits, scratch: str, *, is_unsafe: bool) -> list[str]:
    """An interpreter without the user's settings and start-up files, which takes its program from the pipe `task`."""
    cpu = limits.cpu_seconds
    bounds = {
        "RLIMIT_AS": (limits.memory, limits.memory),
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_FSIZE": (limits.file_size, limits.file_size),
        "RLIMIT_NOFILE": (limits.open_files, limits.open_files),
        "RLIMIT_CORE": (0, 0),
    }
    if not is_unsafe:
        # Inside the namespace the user has no other processes; outside, those that are there would count.
        bounds["RLIMIT_NPROC"] = (limits.processes, limits.processes)
    settings = (task, report, scratch, _package_folders(), bounds, limits.output)
    source = _source_of_inside() + f"_inside{settings!r}\n"
    return [_interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", source]


def _inside(
    task: int, report: int, scratch: str, packages: list[str], bounds: dict[str, tuple[int, int]], most: int
) -> None:
    """What the interpreter in the sandbox runs: it takes its limits, then a program, and tells how that went.

    It is handed over as text, so it stands alone. The report is R when ready, then V and the value or E and the error.
    """
    import builtins
    import os
    import resource
    import sys

    own = os.getpid()  # the program may fork, and then all of them come to the end of this
    os.set_inheritable(task, False)
    os.set_inheritable(report, False)
    for name, bound in bounds.items():
        resource.setrlimit(getattr(resource, name), bound)
    sys.path += packages
    sys.argv = [os.path.join(scratch, "program.py")]
    main = type(sys)("__main__")
    main.__dict__.update(__file__=sys.argv[0], __builtins__=builtins)
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)
    os.write(report, b"R")
    with open(task, "rb") as pipe:
        program = pipe.read()
    os.chdir(scratch)
    sys.modules["__main__"] = main
    outcome = ""
    try:
        with open(sys.argv[0], "wb") as file:
            file.write(program)
        into_tree = 0x400  # what the module ast, which takes its time to import, asks for
        tree = compile(program, sys.argv[0], "exec", into_tree, dont_inherit=True)
        last = tree.body.pop() if tree.body and type(tree.body[-1]).__name__ == "Expr" else None
        exec(compile(tree, sys.argv[0], "exec", dont_inherit=True), main.__dict__)
        if last is not None:
            tree.body.append(last)
            expression = type(compile("0", "", "eval", into_tree))(last.value)
            value = eval(compile(expression, sys.argv[0], "eval", dont_inherit=True), main.__dict__)
            outcome = "" if value is None else "V" + repr(value)
    except SystemExit:
        raise
    except BaseException as error:  # whatever the program raises is its outcome
        trace = error.__traceback__
        error.__traceback__ = trace.tb_next if trace is not None else None  # without this function
        sys.excepthook(type(error), error, error.__traceback__)
        outcome = "E" + type(error).__name__
    try:
        left = memoryview(outcome.encode("utf-8", "replace")[: most + 1] if os.getpid() == own else b"")
        while left:
            left = left[os.write(report, left) :]
    except OSError:
        pass  # the program has closed it
    if outcome[:1] == "E":
        sys.exit(1)


@cache
def _source_of_inside() -> str:
    return textwrap.dedent(inspect.getsource(_inside))


@cache
def _interpreter() -> str:
    """The interpreter itself, where it lies behind the links of a virtual environment."""
    return os.path.realpath(sys.executable)


@cache
def _package_folders() -> list[str]:
    """Where the packages of our interpreter are; a program may use them too."""
    return [os.path.realpath(folder) for folder in site.getsitepackages() if os.path.isdir(folder)]


def _command(name: str) -> str:
    """Where a command is; what it is given to run is given another environment than ours."""
    return shutil.which(name) or name


@cache
def _bwrap_options() -> str:
    return subprocess.run([_command("bwrap"), "--help"], capture_output=True, text=True, check=False).stdout


def _walls(limits: Limits, filters: int | None) -> list[str]:
    """The command that puts what follows into the sandbox."""
    own = [folder for folder in _visible_folders() if not folder.startswith("/usr/")]
    bubblewrap = [_command("bwrap"), "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    if "--disable-userns" in _bwrap_options():
        bubblewrap.append("--disable-userns")
    bubblewrap += ["--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            bubblewrap += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            bubblewrap += ["--ro-bind", name, name]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        bubblewrap += ["--ro-bind-try", name, name]
    # The scratch directory comes first: what lies below its place outside (a project in /tmp) is put into it.
    size = ["--size", str(limits.scratch)] if "--size" in _bwrap_options() else []
    bubblewrap += [*size, "--tmpfs", SCRATCH]
    closed = [folder for folder in own if os.geteuid() == 0 and not _is_open(folder)]
    for folder in own:
        source = f"{_stage()}/{closed.index(folder)}" if folder in closed else folder
        bubblewrap += [*_above(folder), "--ro-bind", source, folder]
    bubblewrap += ["--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]
    bubblewrap += ["--chdir", SCRATCH, *([] if filters is None else ["--seccomp", str(filters)])]
    if os.geteuid() != 0:
        return bubblewrap
    as_nobody = [_command("setpriv"), f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    if not closed:
        return [*as_nobody, *bubblewrap]
    # Nobody may not look into root's own folders: first lay open, among mounts of our own, just what is needed of them.
    # All this is one process, so that the sandbox stays our child, whom the kernel lets die with us.
    mount = _command("mount")
    stage = [f"{mount} -t tmpfs -o mode=755,size=1m tmpfs {_stage()}"]
    for number, folder in enumerate(closed):
        stage += [f"mkdir {_stage()}/{number}", f"{mount} --bind {shlex.quote(folder)} {_stage()}/{number}"]
    script = " && ".join([*stage, 'exec "$@"'])
    return [_command("unshare"), "--mount", "--", "sh", "-c", script, "sh", *as_nobody, *bubblewrap]


def _above(folder: str) -> list[str]:
    """Options that make the folders above one, open to all; bubblewrap itself may close them to others."""
    return [part for parent in reversed(Path(folder).parents[:-1]) for part in ("--dir", str(parent))]


@cache
def _visible_folders() -> list[str]:
    """Folders of our interpreter and its packages, none inside another."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)} - {"/usr", "/"}
    folders = sorted({*prefixes, *_package_folders()})
    return [each for each in folders if not any(each.startswith(f"{other}/") for other in folders)]


@cache
def _is_open(folder: str) -> bool:
    """Whether everybody may pass through to a folder."""
    return all(each.stat().st_mode & 0o001 for each in (Path(folder), *Path(folder).parents))


@cache
def _stage() -> str:
    """A folder of the system that can be covered for a moment, because nothing that is needed lies in it."""
    for name in ("/mnt", "/media", "/srv", "/tmp"):
        if os.path.isdir(name) and not any(folder.startswith(f"{name}/") for folder in _visible_folders()):
            return name
    raise SandboxError("there is no folder to lay the interpreter out in (/mnt, /media, /srv or /tmp)")


# Calls to the kernel that no ordinary program makes

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ARCHITECTURES = tuple(_MACHINES)
_REFUSED_CALLS = {
    # name: number on x86_64, number on aarch64
    # memory that no limit counts, because it belongs to no process
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75),
    # keys, and the memory of others
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # parts of the kernel in which ways out have been found
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "syslog": (103, 116), "personality": (135, 92),
    "fanotify_init": (300, 262), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "mount_setattr": (442, 442), "quotactl": (179, 60),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), 435
_NEW_NAMESPACE = 0x7E020000
"""Flags of clone that ask for a namespace."""


def _seccomp_file() -> int | None:
    """A file with a filter that refuses these calls, as bubblewrap takes it; None on a machine it is not known for."""
    content = _seccomp_filter(platform.machine())
    if content is None:
        return None
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


@cache
def _seccomp_filter(machine: str) -> bytes | None:
    """The filter, in the kernel's own little language (classic BPF)."""
    if machine not in _MACHINES:
        return None
    column = _ARCHITECTURES.index(machine)
    load, equal, at_least, any_of, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse, unknown = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    # Of each instruction: code, instructions to skip if it holds, to skip if not, constant.
    lines = [(load, 0, 0, 4), (equal, 1, 0, _MACHINES[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":
        lines += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # its other calling convention (x32)
    for numbers in _REFUSED_CALLS.values():
        lines += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    # The flags of clone3 lie where a filter cannot see them; without it, the C library takes clone.
    lines += [(equal, 0, 1, _CLONE3), (give, 0, 0, unknown)]
    lines += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (any_of, 0, 1, _NEW_NAMESPACE), (give, 0, 0, refuse)]
    lines += [(give, 0, 0, allow)]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
