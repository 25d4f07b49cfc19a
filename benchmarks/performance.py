"""Measures everything that docs/performance.md reports, one thing after the other, and writes its tables.

    python benchmarks/performance.py                  all of it, about ten minutes on two cores; let nothing else run
    python benchmarks/performance.py replay ward      only some of it; the tables of the others stay as they are
    python benchmarks/performance.py --only write     write the tables anew from what is there

Every figure is made by the command that a reader would type: it is printed, and kept beside its result in
runs/performance/. Tables stand between markers in docs/performance.md; the text around them is written by hand.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recursivemas.bench.machine import in_words
from recursivemas.bench.sections import Section, goals_section

PLACE = Path("runs/performance")
DOCUMENT = Path("docs/performance.md")
NOT_YET = "not measured yet"


@dataclass(frozen=True)
class Job:
    """What is typed, and where what comes of it is kept."""

    name: str
    command: str
    """OUT stands for the file of the result; without it, what is printed is the result."""
    tables: dict[str, str]
    """Marker of every table in the document, and the section that stands there (empty: all that was printed)."""

    @property
    def result(self) -> Path:
        return PLACE / f"{self.name}.{'json' if 'OUT' in self.command else 'txt'}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command.replace("OUT", str(self.result)))

    def run(self) -> None:
        """Type it. What it prints is kept, where it writes no file of its own."""
        PLACE.mkdir(parents=True, exist_ok=True)
        print("$", shlex.join(self.words), flush=True)
        program = [sys.executable, "-m", "recursivemas", *self.words[1:]]
        if self.words[0] == "python":
            program = [sys.executable, *self.words[1:]]
        began = time.perf_counter()
        done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, env=_environment())
        if self.result.suffix == ".txt":
            self.result.write_text(done.stdout)
        (PLACE / f"{self.name}.command.txt").write_text(shlex.join(self.words) + "\n")
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)

    def table(self, section: str) -> str:
        """What stands between the markers."""
        if not self.result.exists():
            return f"{NOT_YET}: `{shlex.join(self.words)}`"
        command = (PLACE / f"{self.name}.command.txt").read_text().strip()
        if self.result.suffix == ".txt":
            return f"```\n$ {command}\n{self.result.read_text().rstrip()}\n```"
        found = json.loads(self.result.read_text())
        return f"{_section(found, section).to_markdown()}\n\n`{command}`: {in_words(found['machine'])}"


def _section(found: dict[str, Any], name: str) -> Section:
    sections = [Section.from_plain(each) for each in found["sections"]]
    if name == "goals":
        return goals_section(sections)
    return next(section for section in sections if section.name == name)


def _environment() -> dict[str, str]:
    """Nothing is downloaded, and warnings of libraries say nothing of time."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


SINGLE = ("latent-step", "generate", "uncached")
WHOLE = ("rounds", "latent-steps", "agents", "batch", "prefixes", "memory")
JOBS = [
    Job(
        "random",
        "recursivemas bench --random 256x6 --dtype float32 --out OUT",
        {"goals": "goals", **{name: name for name in (*SINGLE, *WHOLE)}},
    ),
    Job(
        "ward",
        "recursivemas bench ward --only latent-step,generate,rounds,prefixes --repeats 5 --out OUT",
        {f"ward {name}": name for name in ("latent-step", "generate", "rounds", "prefixes")},
    ),
    Job(
        "replay",
        "recursivemas bench --replay table2 --scale 32 --repeats 2 --out OUT",
        {"replay": "replay", "replay cells": "replay-cells"},
    ),
    Job("parallel-roles", "python benchmarks/parallel_roles.py --repeats 1", {"parallel roles": ""}),
    Job("outer-step", "python benchmarks/outer_step.py --repeats 3", {"outer step": ""}),
    Job("memory", "python benchmarks/memory.py", {"residency": ""}),
    Job("sandbox", "python benchmarks/sandbox.py -n 20", {"sandbox": ""}),
    Job("search", "python benchmarks/search.py", {"search": ""}),
]


def write() -> None:
    """Put every table between its markers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    tables: dict[str, Callable[[], str]] = {
        marker: (lambda job=job, section=section: job.table(section))
        for job in JOBS
        for marker, section in job.tables.items()
    }
    for marker, make in tables.items():
        start, end = f"<!-- table: {marker} -->", "<!-- end -->"
        if start not in text:
            raise SystemExit(f"{DOCUMENT} has no marker {start}")
        head, tail = text.split(start)
        text = f"{head}{start}\n{make()}\n{end}{tail.split(end, 1)[1]}"
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [job.name for job in JOBS]
    parser.add_argument("jobs", nargs="*", default=known, metavar="JOB", help=", ".join(known))
    parser.add_argument("--only", choices=["run", "write"], help="do one of the two steps")
    given = parser.parse_args()
    for name in given.jobs:
        if name not in known:
            parser.error(f"there is no job '{name}'; choose from {', '.join(known)}")
    if given.only != "write":
        began = time.perf_counter()
        for job in JOBS:
            if job.name in given.jobs:
                job.run()
        print(f"{time.perf_counter() - began:.0f} s in all")
    if given.only != "run":
        write()


if __name__ == "__main__":
    main()
