"""What is done to runs and their files between two starts: data changed, folders copied, two started at once, processes
paused, checkpoints edited, a bit of the base flipped, verdicts damaged.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lit_lora.files.checkpoint import CHECKSUM, checksum, newest_checkpoint, read_checkpoint
from tests.faults.runs import Budget, Process, Project, Tally, same


def wait_for_a_checkpoint(process: Process, folder: Path) -> None:
    while not list(folder.glob("*.ckpt")) and process.poll() is None:
        time.sleep(0.005)


def kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def killed_run(project: Project, rng: random.Random, name: str, **settings: Any) -> None:
    """A run that was killed some time after its first checkpoint; a run that was faster is whole."""
    process = project.fit(name, name, **settings)
    wait_for_a_checkpoint(process, project.folder / name / "run" / "checkpoints")
    time.sleep(rng.uniform(0, 0.3 * project.run_s))
    kill(process)


def ends_well(project: Project, name: str, process: Process) -> bool:
    """Whether the run ended as the undisturbed one."""
    code = process.wait()
    return code == 0 and not project.leftovers(name) and same(project.expected, project.end(name))


def changed_data(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """Data that changes under a run: it goes on with what it has, is not resumed on other data, and is on the same."""
    tally = Tally("data changed under the run")
    original = (project.folder / "train.jsonl").read_text()
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name = f"data{number}"
        train = project.folder / f"{name}.jsonl"
        train.write_text(original)
        process = project.fit(name, name, train=train)
        wait_for_a_checkpoint(process, project.folder / name / "run" / "checkpoints")
        changed = original
        for row in rng.sample(range(40), 6):  # more than are held out for validation, of which a change is only named
            changed = changed.replace(f"say {row} ", f"sing {row} ", 1)
        train.write_text(changed)
        time.sleep(rng.uniform(0, 0.3 * project.run_s))
        kill(process)
        refused = project.fit(name, f"{name}-refused", "--ckpt_path", "last", train=train)
        code = refused.wait()
        fine = code == 1 and "the content of data.train has changed" in refused.text
        train.write_text(original)
        resumed = project.fit(name, f"{name}-resumed", "--ckpt_path", "last", train=train)
        fine = fine and ends_well(project, name, resumed)
        tally.check(fine, f"{name}: exit {code}, then {resumed.code}, see {refused.log}")
    return tally


def copies(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """A copy of a run, whose files have other times of change, goes on as the run would."""
    tally = Tally("copied run folder")
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name, copy = f"original{number}", f"copy{number}"
        killed_run(project, rng, name)
        files = [path for path in (project.folder / name).rglob("*") if path.is_file()]
        rng.shuffle(files)
        for path in files:
            target = project.folder / copy / path.relative_to(project.folder / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        resumed = project.fit(copy, copy, "--ckpt_path", "last")
        tally.check(ends_well(project, copy, resumed), f"{copy}: exit {resumed.code}, see {resumed.log}")
    return tally


def at_once(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """Two runs started with one folder take one each; of two resumes of one run, one goes on."""
    tally = Tally("two started at once")
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name = f"twins{number}"
        resuming = number % 2 == 1
        arguments = []
        if resuming:
            killed_run(project, rng, name)
            arguments = ["--ckpt_path", "last"]
        processes = [project.fit(name, f"{name}-{twin}", *arguments) for twin in range(2)]
        codes = sorted(process.wait() or 0 for process in processes)
        if resuming:
            refused = "".join(process.text for process in processes if process.code == 1)
            fine = (codes == [0, 1] and "is going on (process" in refused) or codes == [0, 0]
            fine = fine and same(project.expected, project.end(name))
        else:
            folders = project.finished(name)
            ends = [read_checkpoint(newest_checkpoint(folder / "checkpoints")[0] or "") for folder in folders]
            fine = codes == [0, 0] and len(folders) == 2
            fine = fine and all(same(project.expected["state_dict"], end["state_dict"]) for end in ends)
        tally.check(fine, f"{name}: exit {codes}, see {processes[0].log}")
    return tally


def paused(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """A process that is stopped for a while, as schedulers do, goes on."""
    tally = Tally("paused process")
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name = f"paused{number}"
        process = project.fit(name, name)
        for _ in range(3):
            time.sleep(rng.uniform(0, 0.3 * project.run_s))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(rng.uniform(0.05, 0.3))
                os.kill(process.pid, signal.SIGCONT)
        tally.check(ends_well(project, name, process), f"{name}: exit {process.code}, see {process.log}")
    return tally


def _places(content: Any, depth: int = 0) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Every key of every dict of a checkpoint, but those of weights and moments, whose values are anyone's."""
    if isinstance(content, dict) and depth < 6:
        for key, value in content.items():
            if key not in ("state_dict", "optimizer_states"):
                yield content, key
                yield from _places(value, depth + 1)
    elif isinstance(content, list) and depth < 6:
        for value in content[:2]:
            yield from _places(value, depth + 1)


def edited_checkpoints(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """A key gone, renamed or of another type, under a checksum that says all is well: refused, or without effect."""
    tally = Tally("edited checkpoint")
    killed_run(project, rng, "to-edit")
    source = project.folder / "to-edit"
    newest, _ = newest_checkpoint(source / "run" / "checkpoints")
    assert newest is not None
    running: list[tuple[str, str, Process]] = []

    def judge(name: str, what: str, resumed: Process) -> None:
        code = resumed.wait()
        fine = code is not None and "Traceback" not in resumed.text
        if code == 0:
            fine = fine and not project.leftovers(name) and same(project.expected, project.end(name))
        else:
            fine = fine and "error: " in resumed.text
        tally.check(fine, f"{name}: {what}: exit {code}, see {resumed.log}")
        if fine:
            shutil.rmtree(project.folder / name)

    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name = f"edited{number}"
        shutil.copytree(source, project.folder / name)
        path = project.folder / name / newest.relative_to(source)
        content = read_checkpoint(path)
        how = rng.choice(["gone", "renamed", "text", "nothing"])
        # Other types only in what is ours: callbacks of anyone may keep anything.
        place, key = rng.choice(list(_places(content if how in ("gone", "renamed") else content["lit_lora"])))
        value = place.pop(key)
        if how == "renamed":
            place[f"{key}_"] = value
        elif how != "gone":
            place[key] = "nonsense" if how == "text" else None
        torch.save({**content, CHECKSUM: checksum(content)}, path)
        for other in path.parent.glob("*.ckpt"):
            if other != path:
                other.unlink()
        running.append((name, f"{key!r} {how}", project.fit(name, name, "--ckpt_path", "last")))
        if len(running) == os.cpu_count():
            judge(*running.pop(0))
    for one in running:
        judge(*one)
    return tally


def base_bits(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """One bit of the weights of the base is another base: a resume is refused."""
    from lit_lora import LoRAConfig, LoRALightningModule, load_base_model

    tally = Tally("one bit of the base")
    base = project.folder / "stored"
    load_base_model(f"random:{project.folder / 'base'}").save_pretrained(base)
    path = base / "model.safetensors"
    whole = path.read_bytes()
    process = project.fit("on-stored", "on-stored", base=str(base))
    assert process.wait() == 0, process.text
    newest, _ = newest_checkpoint(*project.checkpoints("on-stored"))
    assert newest is not None
    checkpoint = read_checkpoint(newest)
    start = 8 + int.from_bytes(whole[:8], "little")
    for number in range(count + 1):
        if not budget.allows(tally.name):
            continue
        place, bit = rng.randrange(start, len(whole)), rng.randrange(8)
        flipped = whole[place] ^ 1 << bit if number < count else whole[place]
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        module = LoRALightningModule(str(base), lora=LoRAConfig(r=4, lora_dropout=0.1))
        module.configure_model()
        try:
            module.on_load_checkpoint(dict(checkpoint))
        except ValueError as error:
            fine = number < count and "another base" in str(error)
            tally.check(fine, f"bit {bit} of byte {place}: {error}")
        else:  # the whole base at the end is no other one
            tally.check(number == count, f"bit {bit} of byte {place} was not seen")
    return tally


def damaged_verdicts(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """A finished run whose verdict cannot be read is judged again, by its checkpoint."""
    tally = Tally("damaged verdict")
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name = f"verdict{number}"
        shutil.copytree(project.folder / "whole", project.folder / name)
        path = project.folder / name / "run" / "verdict.json"
        text = path.read_text()
        content = json.loads(text)
        how = rng.choice(["cut", "gone", "field", "list"])
        if how == "cut":
            path.write_text(text[: rng.randrange(len(text))])
        elif how == "gone":
            path.unlink()
        elif how == "field":
            del content[rng.choice(list(content))]
            path.write_text(json.dumps(content))
        else:
            path.write_text("[]")
        resumed = project.fit(name, name, "--ckpt_path", "last")
        fine = ends_well(project, name, resumed) and "lit_lora: proved" in resumed.text
        fine = fine and json.loads(path.read_text())["result"] == "proved"
        tally.check(fine, f"{name}: {how}: exit {resumed.code}, see {resumed.log}")
    return tally


def states(project: Project, rng: random.Random, budget: Budget) -> list[Tally]:
    """All of these."""
    return [
        changed_data(project, rng, budget, 6),
        copies(project, rng, budget, 6),
        at_once(project, rng, budget, 6),
        paused(project, rng, budget, 6),
        edited_checkpoints(project, rng, budget, 40),
        base_bits(project, rng, budget, 60),
        damaged_verdicts(project, rng, budget, 10),
    ]
