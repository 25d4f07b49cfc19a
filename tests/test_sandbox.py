"""The sandbox: hostile programs end, tell how, and leave nothing; ordinary ones run as they would outside."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hostile import HOSTILE

from recursivemas.errors import ConfigError, SandboxError
from recursivemas.sandbox import (
    REASONS,
    Execution,
    Limits,
    Sandbox,
    SandboxWarning,
    _package_folders,
    _seccomp_filter,
    _visible_folders,
    sandbox_problem,
)

ROOT = Path(__file__).parent.parent
SECRET = "SECRET-8c1f"
MARK = "98765"  # seconds that no program outside these tests sleeps
TIGHT = Limits(seconds=0.6, cpu_seconds=1, memory=256 * 2**20, processes=16, scratch=16 * 2**20, output=20_000)


@pytest.fixture(scope="module", autouse=True)
def needs_sandbox() -> None:
    reason = sandbox_problem()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"continuous integration must have a sandbox: {reason}")
    if reason is not None:
        pytest.skip(f"no sandbox here: {reason}")


class Host:
    """What there is outside to be read, written to, killed and talked to; and whether it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "open"
        self.folder.mkdir()
        self.folder.chmod(0o777)
        self.secret = self.folder / "secret.txt"
        self.secret.write_text(SECRET)
        self.victim = subprocess.Popen(["sleep", "600"])
        self.visitors = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.abstract = f"host-{os.getpid()}"
        self.named = socket.socket(socket.AF_UNIX)
        self.named.bind("\0" + self.abstract)
        self.named.listen()
        for each in (self.server, self.named):
            each.setblocking(False)

    def fill(self, program: str) -> str:
        words = {
            "secret": str(self.secret),
            "folder": str(self.folder),
            "victim": str(self.victim.pid),
            "port": str(self.server.getsockname()[1]),
            "abstract": self.abstract,
            "home": str(Path.home()),
            "packages": ", ".join(repr(folder) for folder in _visible_folders()),
        }
        return re.sub(r"\{(\w+)\}", lambda match: words.get(match[1], match[0]), program)

    def check(self) -> None:
        assert self.victim.poll() is None
        assert [file.name for file in self.folder.iterdir()] == ["secret.txt"]
        assert self.secret.read_text() == SECRET
        for each in (self.server, self.named):
            with pytest.raises(BlockingIOError):
                each.accept()

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        self.server.close()
        self.named.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    # Below /var/tmp: /tmp is the one path that a program has too.
    folder = Path(f"/var/tmp/recursivemas-{os.getpid()}")
    folder.mkdir(mode=0o755)
    os.environ["HOST_SECRET"] = SECRET
    host = Host(folder)
    yield host
    host.close()
    del os.environ["HOST_SECRET"]
    shutil.rmtree(folder)


def left_behind() -> list[str]:
    """Command lines of processes that began in a sandbox."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if "_inside(" in line or f"sleep {MARK}" in line:
            found.append(line[:80])
    return found


def gone_within(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while left_behind():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_program_ends_in_time_and_gets_nothing(name: str, host: Host) -> None:
    hostile = HOSTILE[name]
    begin = time.monotonic()
    execution = Sandbox(TIGHT).run(host.fill(hostile.program))
    assert time.monotonic() - begin < TIGHT.seconds + 1 + 1  # a second for a machine that is busy
    assert execution.seconds < TIGHT.seconds + 1
    assert execution.reason in hostile.reasons, execution
    text = execution.to_text()
    assert text
    assert "ESCAPED" not in text
    assert SECRET not in text
    assert len(text) < 4 * TIGHT.output
    host.check()
    assert gone_within(1.0), left_behind()


def test_there_are_enough_hostile_programs() -> None:
    assert len(HOSTILE) >= 60
    assert {reason for hostile in HOSTILE.values() for reason in hostile.reasons} == set(REASONS)


# As an ordinary user


AS_USER = """
import json, sys
from recursivemas.sandbox import Limits, Sandbox, sandbox_problem
limits, programs = json.load(sys.stdin)
assert sandbox_problem() is None, sandbox_problem()
with Sandbox(Limits(**limits), spares=2) as sandbox:
    done = sandbox.run_many(programs, at_once=4)
json.dump([[each.reason, each.to_text(), each.seconds] for each in done], sys.stdout)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="this is an ordinary user: the tests above were as one")
@pytest.mark.timeout(120)
def test_an_ordinary_user_has_the_same_sandbox(host: Host) -> None:
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip(f"an ordinary user needs an interpreter; there is no {python}")
    names = list(HOSTILE)
    programs = [host.fill(HOSTILE[name].program) for name in names]
    command = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups", python, "-c", AS_USER]
    done = subprocess.run(
        command,
        input=json.dumps([TIGHT.__dict__, programs]),
        capture_output=True,
        text=True,
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "HOST_SECRET": SECRET},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for name, (reason, text, seconds) in zip(names, json.loads(done.stdout), strict=True):
        assert reason in HOSTILE[name].reasons, (name, reason, text)
        assert "ESCAPED" not in text, name
        assert SECRET not in text, name
        assert seconds < TIGHT.seconds + 1, name
    host.check()
    assert gone_within(1.0), left_behind()


# Ordinary programs


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=20.0)) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("program", "stdout", "value"),
    [
        ("", "", None),
        ("6 * 7", "", "42"),
        ("print('a')\n'b'", "a\n", "'b'"),
        ("x = 3", "", None),
        ("x = 3\nx", "", "3"),
        ("None", "", None),
        ("for i in range(3): i", "", None),
        ("def f():\n    '''Not a value.'''\nf()", "", None),
        ("import sys\nprint(sys.stdin.read() or 'nothing')", "nothing\n", None),
        ("__name__", "", "'__main__'"),
        ("import os\nos.getcwd(), os.path.isfile('program.py')", "", "('/tmp', True)"),
        ("open('a', 'w').write('b')\nopen('a').read()", "", "'b'"),
        ("import subprocess\nsubprocess.run('echo hi', shell=True, capture_output=True).stdout", "", r"b'hi\n'"),
        ("import threading\nthreading.Thread(target=print, args=(1,)).start()", "1\n", None),
        ("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))).__name__", "", "'A'"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nA(2)", "", "A(x=2)"),
        ("print('done')\nexit()", "done\n", None),
        ("import sys\nsys.exit(0)", "", None),
        ("'é' + chr(0x1F600)", "", "'é😀'"),
    ],
)
def test_a_program_runs_as_it_would_outside(sandbox: Sandbox, program: str, stdout: str, value: str | None) -> None:
    execution = sandbox.run(program)
    assert (execution.reason, execution.stdout, execution.stderr, execution.value) == ("finished", stdout, "", value)


def test_it_reads_its_input(sandbox: Sandbox) -> None:
    execution = sandbox.run("print(int(input()) + int(input()))", "40\n2\n")
    assert execution.stdout == "42\n"
    much = sandbox.run("import sys\nlen(sys.stdin.read())", "x" * 3_000_000)
    assert much.value == "3000000"
    assert sandbox.run("1", "x" * 3_000_000).value == "1"  # nobody reads it


def test_our_packages_are_there_and_our_settings_are_not(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    found = sandbox.run("import sys\n[p for p in sys.path if 'site-packages' in p or 'nowhere' in p], sys.version")
    assert found.value == repr((_package_folders(), sys.version))
    assert sandbox.run("import numpy\nint(numpy.arange(10).sum())").value == "45"


def test_an_error_shows_the_program_and_nothing_of_ours(sandbox: Sandbox) -> None:
    execution = sandbox.run("def half(x):\n    return x / 0\nhalf(1)")
    assert (execution.reason, execution.detail) == ("failed", "ZeroDivisionError")
    assert execution.stderr.count("File") == 2
    assert "return x / 0" in execution.stderr
    assert "_inside" not in execution.stderr
    assert execution.to_text().endswith("ZeroDivisionError: division by zero\n[failed: ZeroDivisionError]")
    wrong = sandbox.run("1 +")
    assert "SyntaxError" in wrong.stderr
    assert "_inside" not in wrong.stderr
    assert sandbox.run("exit(3)").detail == "exit code 3"
    assert "nothing left" in sandbox.run("import sys\nsys.exit('nothing left')").stderr


def test_what_is_cut_is_cut_at_its_limit() -> None:
    with Sandbox(Limits(output=100)) as small:
        assert small.run("print('x' * 99)").reason == "finished"
        assert len(small.run("print('x' * 10_000)").stdout) == 100
        assert len(small.run("'x' * 10_000").value or "") <= 100


def test_nothing_stays_from_one_program_to_the_next(sandbox: Sandbox) -> None:
    sandbox.run("open('/tmp/left', 'w').write('x')\nimport builtins\nbuiltins.left = 1")
    assert sandbox.run("import os\n'left' in os.listdir('/tmp'), 'left' in dir(__builtins__)").value == "(False, False)"


def test_spares_are_used_once_replaced_and_ended() -> None:
    with Sandbox(Limits(seconds=5.0), spares=2) as pool:
        assert [pool.run(f"{number}").value for number in range(5)] == ["0", "1", "2", "3", "4"]
        # A spare that died is not handed out.
        time.sleep(0.3)
        for spare in list(pool._spares):
            os.killpg(spare._process.pid, signal.SIGKILL)
            spare._process.wait()
        assert pool.run("7").value == "7"
    assert gone_within(1.0)
    with pytest.raises(ConfigError, match="closed"):
        pool.run("1")


def test_two_hundred_programs_eight_at_a_time_leave_nothing() -> None:
    def used() -> tuple[int, int, int, int]:
        ours = Path("/proc/self")
        memory = int((ours / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        return len(list((ours / "fd").iterdir())), threading.active_count(), len(left_behind()), memory

    sandbox = Sandbox(TIGHT)
    programs = [
        ("print({n})", "1 / 0", "import os\nos.fork()\n{n}", "print('x' * 50_000)")[number % 4].replace(
            "{n}", str(number)
        )
        for number in range(200)
    ]
    sandbox.run_many(programs[:16])
    before = used()
    executions = sandbox.run_many(programs, at_once=8)
    gone_within(1.0)
    after = used()
    assert after[:3] == before[:3]
    assert after[3] - before[3] < 20 * 2**20
    for number, execution in enumerate(executions):
        reason = ("finished", "failed", "finished", "output")[number % 4]
        assert execution.reason == reason, execution
        assert number % 4 != 2 or execution.value == str(number)


def test_who_dies_takes_his_sandbox_along(tmp_path: Path) -> None:
    program = f"import time\\ntime.sleep({MARK})"
    code = (
        "from recursivemas.sandbox import Limits, Sandbox\n"
        "import threading\n"
        "sandbox = Sandbox(Limits(seconds=600.0), spares=1)\n"
        "threading.Timer(0.5, print, ['up'], {'flush': True}).start()\n"
        f"sandbox.run('{program}')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert len(left_behind()) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone_within(2.0), left_behind()


# Where there is none


def test_a_missing_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    sandbox_problem.cache_clear()
    try:
        with pytest.raises(SandboxError, match="bwrap is missing .install the package bubblewrap.*allow_unsafe=True"):
            Sandbox()
        with pytest.warns(SandboxWarning, match="can read and change whatever this user can"):
            unsafe = Sandbox(Limits(seconds=0.5, output=1000), allow_unsafe=True)
        assert unsafe.run("print(1)\n2").to_text() == "1\n2"
        assert unsafe.run("while True: pass").reason == "time"
        assert unsafe.run("while True: print('x' * 100)").reason == "output"
        left = unsafe.run(f"import subprocess\nsubprocess.Popen(['/bin/sleep', '{MARK}'])\n1")
        assert left.value == "1"
    finally:
        sandbox_problem.cache_clear()
    assert gone_within(1.0), left_behind()


def test_a_sandbox_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    for script, words in (
        ("echo 'bwrap: No permissions to create a new namespace' >&2; exit 1", "No permissions to create"),
        ('while [ "${1#*/bin/python}" = "$1" ]; do shift; done; exec "$@"', "a program in it fails: False"),
    ):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        tmp_path.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            patch.setattr("recursivemas.sandbox.os.geteuid", lambda: 1000)
            sandbox_problem.cache_clear()
            try:
                with pytest.raises(SandboxError, match=words):
                    Sandbox()
            finally:
                sandbox_problem.cache_clear()


@pytest.mark.parametrize(
    "limits",
    [{"seconds": 0}, {"seconds": "1"}, {"memory": 0}, {"memory": 1.5}, {"processes": True}, {"seconds": float("nan")}],
)
@pytest.mark.usefixtures("unchecked")
def test_a_limit_that_is_none_is_refused(limits: dict) -> None:
    with pytest.raises(ConfigError, match=f"the limit '{next(iter(limits))}' must be a number"):
        Limits(**limits)


def test_a_result_text_is_never_empty() -> None:
    assert Execution("finished", "", "").to_text() == "[finished without output]"
    assert Execution("time", "a\n", "b\n", "3", 1.0, "stopped").to_text() == "a\n3\nb\n[time: stopped]"


def test_the_filter_is_known_for_two_machines() -> None:
    assert _seccomp_filter("riscv64") is None
    for machine in ("x86_64", "aarch64"):
        content = _seccomp_filter(machine)
        assert content is not None
        assert len(content) % 8 == 0
        assert len(content) < 4096  # a pipe takes it at once
