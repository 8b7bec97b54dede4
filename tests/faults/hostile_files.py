"""Files made to hang or exhaust their reader, from a table: each is refused in a message that names it.

Each is given to a verb of the command line in a process of its own, with a limit of time and one of memory, as many at
once as there are cores. Some are odd and sound, and have to work. None may leave the mark that those leave which run
code.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from tests.faults.hostile_adapters import ADAPTER, TOKENIZER
from tests.faults.hostile_cases import MARK, Case
from tests.faults.hostile_configs import CONFIG
from tests.faults.hostile_data import DATA
from tests.faults.hostile_runs import CHECKPOINT, RUN
from tests.faults.runs import Budget, Process, Project, Tally

CASES: tuple[Case, ...] = (*DATA, *ADAPTER, *TOKENIZER, *CONFIG, *CHECKPOINT, *RUN)

LIMIT_S = 60.0
MEMORY_BYTES = 2 << 30
"""Beyond what the process has when it starts."""
MESSAGE_BYTES = 20_000
"""Nobody reads more; a message that repeats what it complains about would be longer."""
SHORT_S = 1.0
"""In place of the limits that expressions, templates and pipes have (30, 5 and 10 s): the suite would wait for each."""


class _Running(NamedTuple):
    case: Case
    folder: Path
    process: Process


def hostile_files(project: Project, budget: Budget, cases: tuple[Case, ...] = CASES) -> list[Tally]:
    """All of the table; a tally for each kind of file."""
    tallies = {case.kind: Tally(f"hostile {case.kind}") for case in cases}
    running: list[_Running] = []
    waiting = list(enumerate(cases))
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number, case = waiting.pop(0)
            if budget.allows(tallies[case.kind].name):
                running.append(_start(project, number, case))
        for one in [one for one in running if _is_over(one.process)]:
            running.remove(one)
            problem = _problem(one)
            tallies[one.case.kind].check(not problem, f"{one.case.name}: {problem}, see {one.process.log}")
            if not problem:
                shutil.rmtree(one.folder)
        time.sleep(0.01)
    return list(tallies.values())


def _start(project: Project, number: int, case: Case) -> _Running:
    folder = project.folder / f"hostile{number}"
    arguments = case.prepare(project, folder)
    case.put(folder)
    return _Running(case, folder, Process(arguments, project.folder / f"hostile{number}.log", lambda: _limit(folder)))


def _limit(folder: Path) -> None:
    """In the process that reads the file."""
    from lit_lora.adapters import expressions
    from lit_lora.data.chats import chat_template
    from lit_lora.files import strict_yaml

    expressions.LIMIT_S = chat_template.RENDER_LIMIT_S = strict_yaml.PIPE_LIMIT_S = SHORT_S
    os.environ["RUST_BACKTRACE"] = "0"  # it has no say in what lit_lora prints
    os.chdir(folder)  # where code that runs leaves its mark
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _is_over(process: Process) -> bool:
    if process.poll() is None and time.monotonic() - process.started_s > LIMIT_S:
        process.stop()
        return True
    return process.code is not None


def _problem(one: _Running) -> str:
    """What is wrong with how it ended; empty for nothing."""
    text, code = one.process.text, one.process.code
    if list(one.folder.rglob(MARK)):
        return "code of the file ran"
    if code is None:
        return f"not over after {LIMIT_S:.0f} s"
    if "Traceback" in text:
        return f"exit {code} with a traceback"
    if len(text) > MESSAGE_BYTES:
        return f"exit {code} with a message of {len(text):,} characters"
    if one.case.works:
        return "" if code == 0 else f"exit {code}, though nothing is wrong with it"
    if code not in (1, 2) or "lit-lora: error: " not in text:
        return f"exit {code}"
    return "" if one.case.named in text.partition("lit-lora: error: ")[2] else f"does not name {one.case.named}"
