"""Faults on purpose: processes killed, disks filled, files corrupted, nonsense and hostile files fed in.

    python -m tests.faults                 # everything, fixed seed; writes results/faults.md
    python -m tests.faults --kills 200     # longer

A fault is survived if no run was lost (the resumed one ends with the weights of the undisturbed one, bit for bit), no
wrong weights were loaded, a message stood where one belongs instead of a traceback, nothing half-written was left, and
nothing hung. Every run is a process of its own, forked from one that has imported everything, in a session of its own
and with a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lit_lora.files.checkpoint import newest_checkpoint, read_checkpoint
from tests.faults.preparing import killed_preparing
from tests.faults.ranks import ranks
from tests.faults.runs import LIMIT_S, Budget, Project, Tally, same
from tests.faults.states import states, wait_for_a_checkpoint

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def partial_files(folder: Path) -> bool:
    return any(folder.glob("run*/*/.*.partial"))


def kills(project: Project, rng: random.Random, budget: Budget, count: int) -> list[Tally]:
    """Kill -9 at random moments, and in the middle of writing a file; at most ten times a run."""
    anywhere, writing = Tally("kill -9 at a random moment"), Tally("kill -9 while a file is written")
    signals = Tally("SIGTERM and Ctrl-C")
    done = number = 0
    while done < count and budget.allows("kill -9", count - done):
        name = f"kill{number}"
        number += 1
        attempts = 0
        while True:
            process = project.fit(name, name, "--ckpt_path", "last")
            more = attempts < 10 and done < count and not budget.is_over
            kind = rng.choice([*["anywhere", "writing"] * 5, "term", "int"]) if more else "none"
            tally = {"anywhere": anywhere, "writing": writing}.get(kind, signals)
            sent = None
            wait_s = rng.uniform(0, 1.1 * project.run_s)
            if kind == "writing":
                wait_s = rng.uniform(0, project.run_s)
            code = None
            while code is None and kind != "none":
                elapsed = time.monotonic() - process.started_s
                if elapsed >= wait_s and (kind != "writing" or partial_files(project.folder / name)):
                    sent = {"term": signal.SIGTERM, "int": signal.SIGINT}.get(kind, signal.SIGKILL)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, sent)
                    break
                code = process.poll()
                if elapsed > LIMIT_S:
                    break
            if code is None:
                code = process.wait()
            attempts += 1
            if sent is not None:
                done += kind in ("anywhere", "writing")
                broken = project.broken_files(name)
                fine = code is not None and not broken and "Traceback" not in process.text
                if kind in ("term", "int"):  # before training starts there is nothing to save: the default ends it
                    fine = fine and code in (0, 143, 130, -15)
                tally.check(fine, f"{name}: exit {code}, {broken}, see {process.log}")
            if code == 0:
                break
            if sent is None:
                tally.check(False, f"{name}: exit {code} without a fault, see {process.log}")
                break
        leftovers = project.leftovers(name)
        if leftovers or not same(project.expected, project.end(name)):
            what = f"{name}: left {leftovers}" if leftovers else f"{name}: the end differs from the undisturbed run's"
            for tally in (anywhere, writing):
                tally.failures.append(what)
            print(f"FAILED {what}", flush=True)
        else:
            shutil.rmtree(project.folder / name)
    return [anywhere, writing, signals]


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[bool]:
    """Mount an empty file system of that size; tells whether that is allowed here."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        print(f"no permission to mount a small disk: {folder.name} was not tried")
        folder.rmdir()
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Take all the space that is left, by a file called filler."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def free(folder: Path) -> None:
    (folder / "filler").unlink()


def replace_by_file(folder: Path) -> None:
    folder.rename(folder.with_name(f"kept-{folder.name}"))
    folder.write_text("in the way")


def restore(folder: Path) -> None:
    folder.unlink()
    folder.with_name(f"kept-{folder.name}").rename(folder)


def disks(project: Project, rng: random.Random, budget: Budget) -> list[Tally]:
    """Writes that fail to the end: a file size limit as a stand-in for quota, a full file system, a folder gone."""
    full, gone = Tally("full disk"), Tally("folder lost while training")
    size = max(path.stat().st_size for path in (project.folder / "whole").rglob("*.ckpt"))

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    def run_out(name: str, prepare: Callable[[], None] | None = None) -> None:
        process = project.fit(name, name, prepare=prepare)
        code = process.wait()
        text = process.text
        told = "not saved" in text or "cannot write" in text or "No space left" in text or "File too large" in text
        fine = code == 1 and told and "Traceback" not in text and not project.broken_files(name)
        full.check(fine, f"{name}: exit {code}, see {process.log}")

    def goes_on(tally: Tally, name: str) -> None:
        process = project.fit(name, f"{name}-resumed", "--ckpt_path", "last")
        code = process.wait()
        left = project.leftovers(name)
        fine = code == 0 and not left and same(project.expected, project.end(name))
        tally.check(fine, f"{name} resumed: exit {code}, left {left}")

    if budget.allows(full.name, 2):
        run_out("limit", limited)
        goes_on(full, "limit")
    for number in range(3):
        name = f"disk{number}"
        kib = int(size * rng.uniform(0.5, 4)) // 1024
        if not budget.allows(full.name, 2):
            continue
        with small_disk(project.folder / name, kib) as mounted:
            if mounted:
                run_out(name)
                subprocess.run(["mount", "-o", "remount,size=64m", str(project.folder / name)], check=True)
                goes_on(full, name)
    for number in range(4):
        if not budget.allows(gone.name, 2):
            continue
        name = f"gone{number}"
        process = project.fit(name, name)
        folder = project.folder / name / "run" / "checkpoints"
        wait_for_a_checkpoint(process, folder)
        time.sleep(rng.uniform(0, 0.1))
        replace_by_file(folder)
        code = process.wait()
        fine = code == 1 and "not saved" in process.text and "Traceback" not in process.text
        gone.check(fine, f"{name}: exit {code}, see {process.log}")
        restore(folder)
        goes_on(gone, name)
    return [full, gone]


def disks_for_a_while(project: Project, rng: random.Random, budget: Budget) -> list[Tally]:
    """Writes that fail for some saves: the same run goes on, and ends as if nothing had been."""
    full, gone = Tally("disk full for a while"), Tally("run folder lost for a while")

    def disturb(
        tally: Tally, name: str, place: Path, lose: Callable[[Path], None], give_back: Callable[[Path], None]
    ) -> None:
        num_saves = rng.randint(1, 6)  # of the dozen that a run makes
        process = project.fit(name, name)
        wait_for_a_checkpoint(process, project.folder / name / "run" / "checkpoints")
        lose(place)
        while process.text.count("not saved") < num_saves and process.poll() is None:
            time.sleep(0.005)
        give_back(place)
        code = process.wait()
        text = process.text
        fine = code == 0 and "not saved" in text and "Traceback" not in text and not project.broken_files(name)
        fine = fine and not project.leftovers(name) and same(project.expected, project.end(name))
        fine = fine and same(project.expected_record, project.record(name))
        tally.check(fine, f"{name}: exit {code} after {num_saves} failed saves, see {process.log}")

    for number in range(3):
        place = project.folder / f"filled{number}"
        if budget.allows(full.name):
            with small_disk(place, 8192) as mounted:
                if mounted:
                    disturb(full, place.name, place, fill, free)
    for number in range(3):
        place = project.folder / f"away{number}" / "run"
        if budget.allows(gone.name):
            disturb(gone, place.parent.name, place, replace_by_file, restore)
    return [full, gone]


def corrupt(path: Path, rng: random.Random) -> str:
    """Flip a bit, cut the end off, overwrite a stretch with zeros, or add to it."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    kind = rng.choice(["flip", "flip", "flip", "cut", "zeros", "more"])
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "zeros":
        stretch = min(len(data) - place, rng.randrange(1, 4096))
        data[place : place + stretch] = bytes(stretch)
    else:
        data += rng.randbytes(rng.randrange(1, 100))
    path.write_bytes(data)
    return f"{kind} at {place}"


def corruptions(project: Project, rng: random.Random, budget: Budget, count: int) -> list[Tally]:
    """What is read back is what was written, or an error that names the file."""
    from lit_lora.base.load import load_base_model
    from lit_lora.files.checkpoint import DamagedCheckpointError
    from lit_lora.interchange.peft_format import adapter_state_dict, load_adapter

    folder = project.folder / "corrupt"
    shutil.copytree(project.folder / "whole" / "run", folder)
    original = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.name)
    content, whole = read_checkpoint(original), original.read_bytes()
    checkpoints, adapters = Tally("corrupted checkpoint"), Tally("corrupted adapter")
    for number in range(count):
        if not budget.allows(checkpoints.name):
            continue
        path = folder / "checkpoints" / original.name
        path.write_bytes(whole)
        how = corrupt(path, rng)
        try:
            read = read_checkpoint(path)
        except DamagedCheckpointError as error:
            skipped, problems = newest_checkpoint(folder / "checkpoints")
            fine = path.name in str(error) and skipped is not None and skipped != path and len(problems) == 1
            checkpoints.check(fine, f"{number}: {how}: {error}")
        except Exception as error:
            checkpoints.check(False, f"{number}: {how}: {error!r}")
        else:
            checkpoints.check(same(content, read), f"{number}: {how}: other content")
    original.write_bytes(whole)

    base = f"random:{project.folder / 'base'}"
    files = sorted((folder / "adapter").glob("adapter_*"))
    saved = {path: path.read_bytes() for path in files}
    model = load_base_model(base)
    load_adapter(model, folder / "adapter")
    expected = adapter_state_dict(model)
    inputs = torch.arange(12)[None]
    logits = model.eval()(inputs).logits.detach()
    for number in range(count):
        if not budget.allows(adapters.name):
            continue
        for path, data in saved.items():
            path.write_bytes(data)
        path = rng.choice(files)
        how = f"{path.name}: {corrupt(path, rng)}"
        model = load_base_model(base)
        try:
            load_adapter(model, folder / "adapter")
        except ValueError as error:
            adapters.check(str(folder / "adapter") in str(error), f"{number}: {how}: {error}")
        except Exception as error:
            adapters.check(False, f"{number}: {how}: {error!r}")
        else:
            equal = same(expected, adapter_state_dict(model)) and torch.equal(model.eval()(inputs).logits, logits)
            adapters.check(equal, f"{number}: {how}: other weights or another function")
    return [checkpoints, adapters]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--corruptions", type=int, default=60, help="of checkpoints, and as many of adapters")
    parser.add_argument("--max_minutes", type=float, default=25, help="after these no new fault is started")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "auto"], default="float32", help="auto: what fit takes here")
    parser.add_argument("--keep", action="store_true", help="leave the working folder")
    parser.add_argument("--output", type=Path, default=RESULTS / "faults.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads would not survive the fork
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.dtype == "float32":
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # which leaves auto no other choice on any machine
    from tests.faults.bad_inputs import bad_inputs
    from tests.faults.hostile_files import hostile_files

    for verb in ("cli", "tools.export", "tools.generate", "evaluation.load"):
        importlib.import_module(f"lit_lora.{verb}")  # before the forks, which then start at once

    rng = random.Random(options.seed)
    started = time.monotonic()
    budget = Budget(options.max_minutes)
    work = Path(tempfile.mkdtemp(prefix="lit-lora-faults."))
    project = Project(work)
    print(f"the undisturbed run takes {project.run_s:.1f} s; work in {work}", flush=True)
    tallies: list[Tally] = []
    stages: list[Callable[[], list[Tally]]] = [
        lambda: kills(project, rng, budget, options.kills),
        lambda: disks(project, rng, budget),
        lambda: disks_for_a_while(project, rng, budget),
        lambda: states(project, rng, budget),
        lambda: [killed_preparing(project, rng, budget, options.kills // 6)],
        lambda: corruptions(project, rng, budget, options.corruptions),
        lambda: [Tally(*entry) for entry in bad_inputs(project, options.seed, budget)],
        lambda: hostile_files(project, budget),
        lambda: ranks(project, rng, budget),
    ]
    for stage in stages:
        tallies += stage()
        counts = ", ".join(f"{tally.name} {tally.tried - len(tally.failures)}/{tally.tried}" for tally in tallies)
        print(f"{time.monotonic() - started:.0f} s: {counts}", flush=True)
    lines = [
        "# Faults, and what became of the runs",
        "",
        f"`python -m tests.faults --seed {options.seed} --kills {options.kills} --corruptions {options.corruptions}"
        f"{' --dtype auto' * (options.dtype == 'auto')}`,",
        f"{time.strftime('%Y-%m-%d')}, {time.monotonic() - started:.0f} s on {os.cpu_count()} cores "
        f"({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "| fault | tried | survived |",
        "| --- | ---: | ---: |",
        *(f"| {tally.name} | {tally.tried} | {max(0, tally.tried - len(tally.failures))} |" for tally in tallies),
    ]
    if budget.not_tried:
        left_out = ", ".join(f"{name} {count}" for name, count in budget.not_tried.items())
        total = sum(budget.not_tried.values())
        lines += ["", f"The {options.max_minutes:g} minutes were over: {total} faults were not tried ({left_out})."]
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if not options.keep:
        shutil.rmtree(work)
    if budget.not_tried or any(tally.failures for tally in tallies):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
