"""torchrun over two machines, as docs/multi_process.md says it: two network namespaces here, with a wire between them.

What is left out of a second machine is its disk: both see the same files, as they must with a shared run folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_lora.files.checkpoint import newest_checkpoint, read_checkpoint
from tests.started_runs import lit_lora, make_base, questions

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "multi_process.md").read_text()
MACHINES = {"first-machine": "10.213.77.1", "second-machine": "10.213.77.2"}
ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
"""What makes a namespace a machine of its own name, which knows the other one's."""

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@contextmanager
def two_machines(folder: Path) -> Iterator[list[list[str]]]:
    """What runs a command on each of two machines that see each other alone; skips where there can be none."""
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare", "mount", "hostname"))):
        pytest.skip("network namespaces need root, `ip` (iproute2) and `unshare` (util-linux)")
    names = [f"lit-lora-{os.getpid()}-{number}" for number in range(2)]
    wires = [f"ll{os.getpid()}n{number}" for number in range(2)]
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in MACHINES.items()))

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"network namespaces are not allowed here: ip {' '.join(arguments)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for name, wire, address in zip(names, wires, MACHINES.values(), strict=True):
            ip("link", "set", wire, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", wire)
            for device in (wire, "lo"):
                ip("-n", name, "link", "set", device, "up")
        enter = ["unshare", "--uts", "--mount", "sh", "-c", ENTER]
        machines = [
            ["ip", "netns", "exec", name, *enter, machine, str(hosts)]
            for name, machine in zip(names, MACHINES, strict=True)
        ]
        if (tried := subprocess.run([*machines[0], "true"], capture_output=True, text=True, check=False)).returncode:
            pytest.skip(f"namespaces of a name and hosts of their own are not allowed here: {tried.stderr.strip()}")
        yield machines
    finally:
        for name in names:  # and the wire in it
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def documented(config: Path, strategy: str, number: int | None) -> list[str]:
    """The command that the docs have for two machines of four processes, for one process on each.

    Args:
        config: of the run.
        strategy: of the run.
        number: of the machine, for the other way that the docs have; None for the first one.
    """
    (command,) = re.findall(r"^torchrun --nnodes 2 (?:.*\\\n)*.*$", DOCS, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    for option, value in {
        "--nproc_per_node": "1",
        "--trainer.devices": "1",
        "--trainer.strategy": strategy,
        "--config": str(config),
    }.items():
        words[words.index(option) + 1] = value
    if number is not None:
        (instead,) = re.findall(r"in place of `(.*)` and\n`(.*)`, `(.*)`, and `--node_rank 1` on the second", DOCS)
        for option in instead[:2]:
            at = words.index(option)
            del words[at : at + 2]
        numbered = instead[2].replace("10.0.0.1", MACHINES["first-machine"]).replace("rank 0", f"rank {number}")
        words[1:1] = shlex.split(numbered)
    return [sys.executable, "-m", "torch.distributed.run", *words[1:]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest, problems = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert problems == []
    state: dict[str, torch.Tensor] = read_checkpoint(newest)["state_dict"]
    return state


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tmp_path_factory.mktemp("machines")


@pytest.mark.parametrize(("strategy", "numbered"), [("lora_sharded", True), ("ddp", False)])
def test_two_machines_train_as_one_process(project, monkeypatch, strategy, numbered):
    """With the documented command, and a config that both of them read."""
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    base, data = project / "base", project / "train.jsonl"
    run, alone = project / strategy, project / "alone"
    if not alone.is_dir():
        make_base(base, num_hidden_layers=3)
        questions(data)

    def settings(run: Path, batches_a_step: int) -> dict[str, Any]:
        trainer = {
            "accelerator": "cpu", "max_steps": 4, "max_epochs": -1, "enable_progress_bar": False,
            "default_root_dir": str(run), "accumulate_grad_batches": batches_a_step,
        }  # fmt: skip
        given = {"train": str(data), "batch_size": 1, "cache_dir": str(project / "cache")}
        return {"model": {"base": str(base)}, "data": given, "trainer": trainer, "convergence": {"min_decrease": -9.0}}

    with two_machines(project) as machines:
        if not alone.is_dir():
            config = project / "alone.yaml"
            config.write_text(yaml.safe_dump(settings(alone, 2)))
            lit_lora("fit", config=config)
        config = project / f"{strategy}.yaml"
        config.write_text(yaml.safe_dump(settings(run, 1)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [*machine, *documented(config, strategy, number if numbered else None)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=project,
            )
            for number, machine in enumerate(machines)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=120)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    expected, found = weights(alone), weights(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
