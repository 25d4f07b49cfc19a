"""Hostile programs for the sandbox: what each tries, and how it may end.

Whoever gets out says ESCAPED. In braces: a file of the host with a secret, a folder of the host that all may write to,
a process of the host, and a port on which the host listens.
"""

from typing import NamedTuple


class Hostile(NamedTuple):
    """A program, and the reasons with which it may end."""

    program: str
    reasons: tuple[str, ...]


DONE = ("finished", "failed")
STOPPED = ("time", "cpu")

_NETWORK = """
import socket
try:
    {act}
    print("ESCAPED")
except OSError as error:
    print("no:", error)
"""


def _network(act: str) -> Hostile:
    return Hostile(_NETWORK.replace("{act}", act), DONE)


def _write(path: str) -> Hostile:
    program = f"""
import os
try:
    os.makedirs(os.path.dirname({path!r}), exist_ok=True)
    with open({path!r}, "a") as file:
        file.write("ESCAPED")
    print("ESCAPED")
except OSError as error:
    print("no:", error)
"""
    return Hostile(program, DONE)


def _syscall(numbers: str, *arguments: str) -> Hostile:
    """Calls the kernel past every library; it must say no (or not know the call)."""
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
number = dict({numbers})[os.uname().machine]
result = libc.syscall(ctypes.c_long(number), {", ".join(arguments)})
print("ESCAPED" if result >= 0 else "no: " + os.strerror(ctypes.get_errno()))
"""
    return Hostile(program, (*DONE, "killed"))


HOSTILE = {
    # time and processor
    "endless loop": Hostile("while True: pass", STOPPED),
    "sleeping": Hostile("import time\ntime.sleep(98765)", STOPPED),
    "endless loop in C": Hostile("sum(iter(int, 1))", STOPPED),
    "catastrophic regular expression": Hostile("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", STOPPED),
    "huge power": Hostile("9 ** 9 ** 9 % 7", (*STOPPED, "memory")),
    "huge factorial": Hostile("import math\nmath.factorial(10 ** 8)", (*STOPPED, "memory")),
    "huge integer as text": Hostile("import sys\nsys.set_int_max_str_digits(0)\nstr(7 ** 3_000_000)", STOPPED),
    "huge integer as value": Hostile("10 ** 100_000", DONE),
    "swallowing exceptions": Hostile(
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", STOPPED
    ),
    "ignoring signals": Hostile(
        """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
        (*STOPPED, "killed"),
    ),
    "raising its own limits": Hostile(
        """
import resource
for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_NOFILE"):
    try:
        resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("ESCAPED")
    except (OSError, ValueError) as error: print("no:", error)
""",
        DONE,
    ),
    "waiting for itself": Hostile("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()", STOPPED),
    "never ending at exit": Hostile("import atexit, time\natexit.register(time.sleep, 98765)", STOPPED),
    "endless destructor": Hostile(
        "class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a", STOPPED
    ),
    "endless repr": Hostile("class A:\n    def __repr__(self):\n        while True: pass\nA()", STOPPED),
    "reading from standard input for ever": Hostile("import os\nr, w = os.pipe()\nos.read(r, 1)", STOPPED),
    # memory
    "memory at once": Hostile("bytearray(64 * 10 ** 9)", ("memory",)),
    "memory bit by bit": Hostile("a = []\nwhile True: a.append(bytearray(10 ** 6))", ("memory", *STOPPED)),
    "memory by doubling": Hostile("a = 'x'\nwhile True: a += a", ("memory", *STOPPED)),
    "memory shared by many": Hostile(
        """
import mmap, os, time
for _ in range(12):
    if os.fork() == 0: break
m = mmap.mmap(-1, 40_000_000)
for i in range(0, len(m), 4096): m[i] = 1
time.sleep(98765)
""",
        ("memory", *STOPPED),
    ),
    "memory of a list of itself": Hostile("a = [0] * (1 << 40)", ("memory",)),
    "memory that belongs to nobody (shmget)": _syscall("x86_64=29, aarch64=194", "0", "1 << 20", "0o1666"),
    "memory that belongs to nobody (memfd)": _syscall("x86_64=319, aarch64=279", "b'x'", "0"),
    "deep recursion": Hostile("def f(n): return f(n + 1)\nf(0)", ("failed",)),
    "deep recursion without a limit": Hostile(
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n): return f(n + 1)\nf(0)",
        ("failed", "memory", "killed", *STOPPED),
    ),
    "deep recursion in C": Hostile(
        "import sys\nsys.setrecursionlimit(10 ** 9)\na = []\nfor _ in range(10 ** 6): a = [a]\nrepr(a)",
        ("failed", "memory", "killed", *STOPPED),
    ),
    "deep source": Hostile("(" * 50_000 + ")" * 50_000, ("failed", "memory", "killed", "output")),
    "decompression bomb": Hostile(
        """
import zlib
c = zlib.compressobj()
bomb = b"".join(c.compress(bytes(10 ** 6)) for _ in range(30)) + c.flush()
while True: bomb = zlib.decompress(bomb) + zlib.decompress(bomb)*1000
""",
        ("memory", "failed", *STOPPED),
    ),
    "decompression bomb to a file": Hostile(
        """
import lzma
with open("big", "wb") as file:
    while True: file.write(lzma.decompress(lzma.compress(bytes(10 ** 7), preset=0)))
""",
        ("failed", "memory", *STOPPED),
    ),
    "entity bomb": Hostile(
        """
import xml.dom.minidom
names = "".join(f'<!ENTITY a{i} "{("&a%d;" % (i - 1)) * 10}">' for i in range(1, 12))
len(xml.dom.minidom.parseString(f'<!DOCTYPE a [<!ENTITY a0 "ha">{names}]><a>&a11;</a>').toxml())
""",
        ("failed", "memory", *STOPPED),
    ),
    # processes
    "fork bomb": Hostile("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", (*STOPPED, "memory")),
    "fork bomb of a shell": Hostile("import os\nos.system(':(){ :|:& };:')", (*DONE, *STOPPED)),
    "threads": Hostile(
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(98765,)).start()",
        ("failed", "memory", *STOPPED),
    ),
    "a daemon": Hostile(
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for end in range(64):
            try: os.close(end)
            except OSError: pass
        time.sleep(98765)
    os._exit(0)
""",
        DONE,
    ),
    "a daemon that is another program": Hostile(
        "import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\n1", DONE
    ),
    "killing its parent": Hostile(
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint('on')", (*DONE, "killed")
    ),
    "killing the first process": Hostile(
        "import os, signal\nfor _ in range(9): os.kill(1, signal.SIGKILL)\nprint('on')", (*DONE, "killed")
    ),
    "killing everybody": Hostile("import os, signal\nos.kill(-1, signal.SIGKILL)", (*DONE, "killed", *STOPPED)),
    "killing its group": Hostile("import os, signal\nos.killpg(0, signal.SIGKILL)", ("killed",)),
    "killing a process of the host": Hostile(
        "import os, signal\ntry:\n    os.kill({victim}, signal.SIGKILL)\n    print('ESCAPED')\n"
        "except OSError as error: print('no:', error)",
        DONE,
    ),
    "stopping itself": Hostile(
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", (*STOPPED, "finished", "failed")
    ),
    "killing itself": Hostile("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", ("killed", "finished")),
    "an alarm": Hostile(
        "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(98765)", ("killed",)
    ),
    "leaving at once": Hostile("import os\nos._exit(7)", ("failed",)),
    "a null pointer": Hostile("import ctypes\nctypes.string_at(0)", ("killed",)),
    # output
    "endless output": Hostile("while True: print('x' * 10_000)", ("output",)),
    "endless errors": Hostile("import sys\nwhile True: print('x' * 10_000, file=sys.stderr)", ("output",)),
    "output past its limit in one line": Hostile("print('x' * 10 ** 7, end='')", ("output",)),
    "a value without end": Hostile("'x' * 10 ** 7", DONE),
    "output of many": Hostile("import os\nos.fork(), os.fork()\nwhile True: os.write(1, b'x' * 100_000)", ("output",)),
    "bytes that are no text": Hostile("import os\nos.write(1, bytes(range(256)))", DONE),
    "control characters": Hostile(r"print('\x1b]0;title\x07\x1b[2J\x00')", DONE),
    "unicode names": Hostile(
        "ſelf = 𝒙 = 1\nprint(x, '\\u202egnp.exe', chr(0x10FFFF), '\\ud83d\\ude00'.encode('utf-16', 'surrogatepass').decode('utf-16'))",
        DONE,
    ),
    "half a character": Hostile("print('\\ud800')", ("failed",)),
    "a program with zeros": Hostile("print(1)\0", ("failed",)),
    "a program that is no text": Hostile("\udcff\udcfe = 1", ("failed",)),
    "a coding of its own": Hostile("# -*- coding: rot13 -*-\ncevag(1)", DONE),
    "writing over the report": Hostile(
        "import os\nfor end in range(3, 64):\n    try: os.write(end, b'Vforged')\n    except OSError: pass\nos.closerange(0, 64)",
        DONE,
    ),
    # secrets
    "the environment": Hostile("import os\nprint(dict(os.environ))", DONE),
    "the environment of others": Hostile(
        "import glob\nprint([open(each, 'rb').read() for each in glob.glob('/proc/*/environ')])", DONE
    ),
    "the secret itself": Hostile("print(open('{secret}').read())", ("failed",)),
    "the secret through a link": Hostile(
        "import os\nos.symlink('{secret}', 'link')\nprint(open('link').read())", ("failed",)
    ),
    "the secret through its way": Hostile("print(open('/tmp/../' * 9 + '{secret}').read())", ("failed",)),
    "the secret through a hard link": Hostile(
        "import os\nos.link('{secret}', 'link')\nprint(open('link').read())", ("failed",)
    ),
    "home": Hostile("import os\nprint(os.listdir(os.path.expanduser('~')), os.listdir('{home}'))", DONE),
    "passwords": Hostile("print(open('/etc/shadow').read(), open('/etc/passwd').read(), 'ESC' + 'APED')", ("failed",)),
    "everything there is": Hostile(
        """
import os
for folder, _, files in os.walk("/"):
    if folder.startswith(("/usr", "/lib", "/bin", {packages})): continue
    for file in files:
        try:
            with open(os.path.join(folder, file), "rb") as opened: text = opened.read(200)
        except OSError: continue
        if b"SECRET" in text.replace(b"b'SEC' + b'RET'", b"") and file != "program.py": print("ESCAPED", folder, file, text)
""",
        (*DONE, *STOPPED),
    ),
    "open files of the host": Hostile(
        "import os\nfor end in range(3, 4096):\n    try: print(end, os.fstat(end).st_mode & 0o170000 != 0o010000 and 'ESCAPED')\n    except OSError: pass",
        DONE,
    ),
    "memory of others": Hostile(
        "import os\nfor path in ('/proc/{victim}/mem', '/proc/self/mem', '/dev/mem', '/dev/kmem', '/proc/kcore', '/proc/1/root/etc/shadow'):\n"
        "    try:\n        open(path, 'rb')\n        print('ESCAPED', path)\n    except OSError as error: print('no:', error)",
        DONE,
    ),
    # writing
    "writing to the host": _write("{folder}/file"),
    "writing to the root": _write("/file"),
    "writing to the system": _write("/usr/lib/file"),
    "writing to the interpreter": Hostile(
        "import sys, os\nfor folder in [*sys.path, os.path.dirname(sys.executable)]:\n    try:\n"
        "        open(os.path.join(folder, 'sitecustomize.py'), 'w')\n        print('ESCAPED')\n    except OSError: pass",
        DONE,
    ),
    "writing to devices": Hostile(
        "import os\nfor path in ('/dev/sda', '/dev/vda', '/dev/kmsg', '/dev/shm/file', '/dev/file', '/dev/tty', '/sys/power/state', '/proc/sysrq-trigger', '/proc/self/oom_score_adj'):\n"
        "    try:\n        open(path, 'w').write('c')\n        print('ESCAPED', path)\n    except OSError as error: print('no:', error)",
        DONE,
    ),
    "making a device": Hostile("import os\nos.mknod('device', 0o060666, os.makedev(8, 0))", ("failed",)),
    "filling the disk": Hostile(
        "number = 0\nwhile True:\n    with open(str(number), 'wb') as file: file.write(bytes(1_000_000))\n    number += 1",
        ("failed",),
    ),
    "one large file": Hostile(
        "with open('file', 'wb') as file:\n    while True: file.write(bytes(1_000_000))", ("failed",)
    ),
    "a file with a hole": Hostile(
        "import os\nwith open('file', 'wb') as file: os.truncate(file.fileno(), 1 << 40)", ("failed",)
    ),
    "many open files": Hostile("files = []\nwhile True: files.append(open('/dev/null'))", ("failed",)),
    "mounting": Hostile(
        "import subprocess\nprint(subprocess.run('mount -o remount,rw /usr && echo ESC''APED', shell=True).returncode)",
        DONE,
    ),
    "becoming root": Hostile(
        "import os\nfor act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chroot('/tmp')):\n"
        "    try:\n        act()\n        print('ESCAPED')\n    except OSError as error: print('no:', error)",
        DONE,
    ),
    "becoming root by a command": Hostile(
        "import subprocess\nfor command in ('su -c id', 'sudo -n id', 'newgrp root'):\n"
        "    done = subprocess.run(command, shell=True, capture_output=True, stdin=subprocess.DEVNULL)\n"
        "    print('ESCAPED' if b'uid=0' in done.stdout else 'no')",
        DONE,
    ),
    "typing into the terminal": Hostile(
        "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, 'x')\nprint('ESCAPED')", ("failed",)
    ),
    # the kernel
    "a namespace of its own": Hostile(
        "import ctypes\nprint('ESCAPED' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 'no')", DONE
    ),
    "a namespace by a command": Hostile(
        "import subprocess\nprint(b'ESCAPED' if subprocess.run(['unshare', '-r', 'id', '-u'], capture_output=True).stdout else 'no')",
        DONE,
    ),
    "a namespace by clone": _syscall("x86_64=56, aarch64=220", "0x10000000 | 17", "0", "0", "0", "0"),
    "a namespace by clone3": _syscall("x86_64=435, aarch64=435", "bytes([0, 0, 0, 16]) + bytes(84)", "88"),
    "the keys of the session": _syscall("x86_64=250, aarch64=219", "0", "-3", "0"),
    "tracing": _syscall("x86_64=101, aarch64=117", "16", "1", "0", "0"),
    "programs in the kernel": _syscall("x86_64=321, aarch64=280", "0", "bytes(128)", "128"),
    "a ring of calls": _syscall("x86_64=425, aarch64=425", "8", "bytes(120)"),
    # the network
    "a server of the host": _network("socket.create_connection(('127.0.0.1', {port}), 0.3)"),
    "a server of the host, by IPv6": _network("socket.create_connection(('::1', {port}), 0.3)"),
    "a server far away": _network("socket.create_connection(('1.1.1.1', 53), 0.3)"),
    "a name": _network("socket.getaddrinfo('example.com', 80)"),
    "a datagram": _network("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))"),
    "a raw socket": _network("socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)"),
    "a packet": _network("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "a socket of the host by name": _network("s = socket.socket(socket.AF_UNIX); s.connect('\\0' + '{abstract}')"),
    "the daemons of the host": _network(
        "[socket.socket(socket.AF_UNIX).connect(p) for p in ('/run/docker.sock', '/var/run/docker.sock', '/run/systemd/private')]"
    ),
    "a page": Hostile(
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=0.3)\nprint('ESCAPED')",
        ("failed",),
    ),
    "a page by a command": Hostile(
        "import subprocess\nfor command in ('curl', 'wget -O -'):\n"
        "    done = subprocess.run(command + ' http://127.0.0.1:{port}/', shell=True, capture_output=True)\n"
        "    print('ESCAPED' if done.returncode == 0 else 'no')",
        DONE,
    ),
}
