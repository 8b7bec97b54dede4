"""GradientFlowAssertion: the adapters trained, and nothing else did.

Adapters are the parameters that require a gradient; the base is everything else. Both are compared by checksum between
the start and the end of training, so nothing is copied; gradients are watched only until each has been seen to flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_lora.callbacks._support.checksum import checksums, frozen_tensors
from lit_lora.callbacks._support.fused_experts import expert_coverage
from lit_lora.callbacks._support.names import adapter_half, listed, module_path
from lit_lora.callbacks._support.norms import gradient_norms
from lit_lora.callbacks._support.trainer import is_reading_step, state_key
from lit_lora.callbacks.verdict import Check, NotProvedError, Verdict

Record = dict[str, tuple[int, int, str]]
"""Name of a tensor -> the two sums of its checksum, and its dtype."""


class GradientFlowError(NotProvedError):
    """An adapter did not train, a gradient was not finite, or the frozen base changed."""


class GradientFlowAssertion(Check):
    """Asserts that every adapter parameter got a gradient and moved, and that the frozen base is bit-identical.

    Checked early, before optimizer step ``check_after_steps``: every gradient was finite and non-zero once. (On the
    first step the gradient of A is exactly zero, since B still is: a run of one step is not judged.) Checked at the
    end: every adapter parameter had a gradient, moved, and is finite; every frozen parameter, quantized weight with its
    scales, and persistent buffer has the same bits as at the start. Steps with a learning rate of zero, and steps that
    an fp16 loss scale drops, do not count.

    On resume the whole run is judged: the state holds the checksums of its start. A base that is another one then fails
    at once; one in another dtype is compared from there on.

    Logs nothing.

    Args:
        on_failure: "raise" a :class:`GradientFlowError` (early at once, at the end once all is saved), or "warn".
        check_after_steps: optimizer step before which gradients are first judged; None judges at the end only. Set it
            higher where some adapters are used rarely (mixtures of experts).
        check_base: also compare the base; costs one pass over its weights at each end.
    """

    name = "gradient flow"
    key = "gradient_flow"

    def __init__(
        self,
        *,
        on_failure: Literal["warn", "raise"] = "raise",
        check_after_steps: int | None = 2,
        check_base: bool = True,
    ) -> None:
        super().__init__()
        if on_failure not in ("warn", "raise"):
            raise ValueError(f"on_failure must be 'warn' or 'raise', got {on_failure!r}")
        if check_after_steps is not None and check_after_steps < 2:
            raise ValueError(
                f"check_after_steps must be at least 2, got {check_after_steps}: on the first step the gradient of A "
                "is zero because B is"
            )
        self.on_failure = on_failure
        self.check_after_steps = check_after_steps
        self.check_base = check_base
        self._start: Record = {}
        """Checksums of the trainable parameters when the run began."""
        self._base: Record = {}
        self._changed: list[str] = []
        """Frozen tensors that were found changed: no later step makes that undone."""
        self._flowed: set[str] = set()
        """Names of the parameters that have had a finite non-zero gradient."""
        self._num_updates = 0
        """Optimizer steps that could move something."""
        self._pending: list[tuple[list[str], Tensor]] = []
        """On the device, per step: which gradients flowed; NaN for those that were not finite."""
        self._names: dict[int, str] = {}
        self._checked = False

    @property
    def state_key(self) -> str:
        """One for all settings: a resumed run may be judged by others."""
        return state_key(self)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the checksums that the end is compared with, unless the state brought them."""
        trainable = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        if not trainable:
            self._fail(trainer, "no parameter requires a gradient, so nothing is trained: inject adapters first")
        if self._start.keys() != trainable.keys():
            self._start = _record(trainable)
            self._flowed.clear()
            self._changed.clear()
            self._num_updates = 0
            self._checked = False
        if self.check_base:
            self._compare_base(trainer, _record(frozen_tensors(pl_module)))
        self._names = {id(p): name for name, p in trainable.items()}
        self._pending.clear()

    def _compare_base(self, trainer: pl.Trainer, base: Record) -> None:
        """Compare the base of a resumed run with that of its start; keep the latter where it can be compared."""
        converted = [name for name in self._base if name in base and base[name][2] != self._base[name][2]]
        if converted:
            rank_zero_warn(
                f"{self.name}: the base was loaded in another dtype when the run began ({len(converted)} tensors: "
                f"{listed(converted)}); its bits are compared from here on"
            )
        changed = [name for name in _differing(self._base, base) if name not in converted] if self._base else []
        if changed:
            self._changed += changed
            self._fail(
                trainer,
                f"the base differs in {len(changed)} tensors from the one that the run began with: {listed(changed)}; "
                "load the same base, quantized in the same way and on the same kind of device",
            )
        self._base = base

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note which gradients flow, and judge them early."""
        if len(self._flowed) == len(self._start):
            return
        self._note(trainer, optimizer)
        # A tensor learning rate on a GPU is waited for here; only until every gradient has flowed.
        moves = any(float(group["lr"]) > 0 for group in optimizer.param_groups if group.get("lr") is not None)
        step = self._num_updates + 1
        due = self.check_after_steps is not None and step >= self.check_after_steps and not self._checked
        if due or step == 1 or is_reading_step(trainer, trainer.global_step + 1):
            dropped = self._read(trainer)
            if dropped:  # by the loss scale: A still waits for B to move
                return
            if due:
                self._checked = True
                dead = [name for name in self._start if name not in self._flowed]
                if dead:
                    self._fail(trainer, self._no_gradient(pl_module, dead, trainer.global_step + 1))
        self._num_updates += moves

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """Compare both ends of the run."""
        self._read(trainer)
        if trainer.global_step == 0:
            return Verdict(self.name, None, "no optimizer step was taken")
        if not self._start:
            return Verdict(self.name, None, "the checkpoint holds no record of how the run began")
        problems, waiting = self._problems_at_end(trainer, pl_module)
        if problems:
            verdict = Verdict(self.name, False, "; ".join(problems))
            if self.on_failure == "warn":
                rank_zero_warn(f"{self.name}: {verdict.detail}")
            return verdict
        if waiting:
            return Verdict(
                self.name,
                None,
                f"one half of each adapter ({len(waiting)} of {len(self._start)} parameters) gets its first gradient "
                f"once the other has moved, on the second step; this run took {trainer.global_step}",
            )
        base = f"{len(self._base)} frozen tensors bit-identical" if self.check_base else "base not checked"
        experts = expert_coverage(pl_module)
        found = [f"all {len(self._start)} trainable parameters moved", base, *([experts] if experts else [])]
        return Verdict(self.name, True, "; ".join(found))

    def raise_failure(self) -> None:
        """Raise where that was asked for."""
        if self.verdict is not None and self.verdict.passed is False and self.on_failure == "raise":
            raise GradientFlowError(self.verdict.detail)

    def judge_early(self, trainer: pl.Trainer, exception: BaseException) -> Verdict:
        """No answer; and let go of the gradients' flags."""
        self._pending.clear()
        return Verdict(self.name, None, f"ended early after step {trainer.global_step}")

    def state_dict(self) -> dict[str, Any]:
        """Checksums of the start and which gradients have flowed, as plain types."""
        return {
            "start": {name: list(value) for name, value in self._start.items()},
            "base": {name: list(value) for name, value in self._base.items()},
            "changed": list(self._changed),
            "flowed": sorted(self._flowed),
            "num_updates": self._num_updates,
            "checked": self._checked,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; without a state, the run is judged from where it resumed."""
        self._start = _from_lists(state_dict.get("start", {}))
        self._base = _from_lists(state_dict.get("base", {}))
        self._changed = list(state_dict.get("changed", []))
        self._flowed = set(state_dict.get("flowed", []))
        self._num_updates = state_dict.get("num_updates", 0)
        self._checked = state_dict.get("checked", False)

    def _note(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        """Keep, on the device, which gradients are non-zero."""
        watched = [
            (self._names[id(p)], p.grad)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and id(p) in self._names and self._names[id(p)] not in self._flowed
        ]
        if not watched:
            return
        highest = gradient_norms([grad for _, grad in watched], torch.inf)
        flags = torch.where(torch.isfinite(highest), (highest > 0).float(), torch.nan)
        self._pending.append(([name for name, _ in watched], flags))

    def _read(self, trainer: pl.Trainer) -> bool:
        """Read the flags, one wait for the device; returns whether the loss scale drops the step."""
        if not self._pending:
            return False
        names = [name for step_names, _ in self._pending for name in step_names]
        flags = torch.cat([step_flags for _, step_flags in self._pending]).tolist()
        self._pending.clear()
        broken = list(dict.fromkeys(name for name, flag in zip(names, flags, strict=True) if flag != flag))
        self._flowed.update(name for name, flag in zip(names, flags, strict=True) if flag == 1)
        if broken and getattr(trainer.precision_plugin, "scaler", None) is not None:
            return True
        if broken:
            self._fail(trainer, f"the gradients of {len(broken)} parameters are not finite: {listed(broken)}")
        return False

    def _problems_at_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[list[str], list[str]]:
        """What is wrong, and parameters of which nothing can be said yet."""
        problems = []
        parameters = {name: p for name, p in pl_module.named_parameters() if name in self._start}
        now = _record(parameters)
        # Weight decay moves a tensor that has no gradient: what counts is the gradient.
        dead = [name for name in self._start if name not in self._flowed]
        waiting: list[str] = []
        if self._num_updates < 2:
            waiting = _waiting_halves(dead)
            dead = [name for name in dead if name not in waiting]
        if dead:
            problems.append(self._no_gradient(pl_module, dead, trainer.global_step))
        unmoved = [name for name, before in self._start.items() if name in self._flowed and now.get(name) == before]
        if unmoved:
            problems.append(
                f"{len(unmoved)} parameters had a gradient and did not move: {listed(unmoved)}; likely a learning rate "
                "of zero, parameters left out of the optimizer, or updates too small for their dtype"
            )
        broken = [name for name, p in parameters.items() if not bool(torch.isfinite(p.detach()).all())]
        if broken:
            problems.append(f"{len(broken)} parameters are not finite: {listed(broken)}")
        if self.check_base:
            found = _differing(self._base, _record(frozen_tensors(pl_module)))
            self._changed = list(dict.fromkeys([*self._changed, *found]))
            if self._changed:
                problems.append(
                    f"the frozen base changed in {len(self._changed)} tensors: {listed(self._changed)}; give the "
                    "optimizer only the parameters that require a gradient, and look for code that writes to weights "
                    "in place"
                )
        return problems, waiting

    def _no_gradient(self, pl_module: pl.LightningModule, dead: list[str], step: int) -> str:
        half_dead = sorted({module_path(name) for name in dead if adapter_half(name)})
        what = (
            f"{len(dead)} of {len(self._start)} trainable parameters had no gradient up to step {step}: {listed(dead)}"
        )
        if half_dead:
            what += f" (adapters of {listed(half_dead)})"
        if len(dead) == len(self._start):
            return (
                f"{what}; likely gradient checkpointing without input gradients (use the non-reentrant kind, or "
                "enable_input_require_grads()), or a loss that does not depend on the model"
            )
        if all(adapter_half(name) == "A" for name in dead):
            return f"{what}; A gets a gradient once B has moved: likely a learning rate of zero for B"
        return f"{what}; likely layers that the forward does not use, or parameters left out of the optimizer"

    def _fail(self, trainer: pl.Trainer, problem: str) -> None:
        if self.on_failure == "raise":
            self.verdict = Verdict(self.name, False, problem)
            raise GradientFlowError(problem)
        rank_zero_warn(f"{self.name}: {problem}")


def _record(tensors: Mapping[str, Tensor]) -> Record:
    found = checksums(tensors.values())
    return {
        name: (*sums, str(tensor.dtype).removeprefix("torch."))
        for (name, tensor), sums in zip(tensors.items(), found, strict=True)
    }


def _from_lists(saved: Mapping[str, list[Any]]) -> Record:
    return {name: (plain, weighted, dtype) for name, (plain, weighted, dtype) in saved.items()}


def _differing(before: Record, after: Record) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _waiting_halves(dead: list[str]) -> list[str]:
    """Halves of adapters without a gradient whose other half has one: that one was zero, and moves first."""
    halves = {(module_path(name), adapter_half(name)) for name in dead}
    other = {"A": "B", "B": "A"}
    return [
        name
        for name in dead
        if (half := adapter_half(name)) is not None and (module_path(name), other[half]) not in halves
    ]
