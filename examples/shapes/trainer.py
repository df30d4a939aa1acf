"""Runs a course: optimizer steps, a log, and a state on disk from which an interrupted run goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from course import Stage, batch_of, learning_rate, loss_of, right_answers, trained_names
from lessons import Lessons
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from student import Student
from task import Task

from runtime.console.files import replaced
from runtime.errors import MonoedgeError

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
LOG_EVERY, SAVE_EVERY = 10, 50
"""Steps."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter beside its number of steps."""

Bar = Callable[[Iterable[int], Stage, int], Iterator[int]]
"""Shows steps while they pass: the steps left, their stage, and how many of it are done."""


@dataclass(frozen=True)
class Settings:
    """What a run is; two runs with the same settings give the same weights.

    Attributes:
        task: its name.
        seed: of the first weights and of all data.
        course: the stages.
        sizes: what differs from the config.json of the template, by section.
        language: SHA-256 of the language part that was taken over, or None where it is trained.
    """

    task: str
    seed: int
    course: tuple[Stage, ...]
    sizes: dict[str, dict[str, int | bool]]
    language: str | None

    def to_json(self) -> str:
        """As text; equal settings give equal text."""
        return json.dumps(asdict(self), sort_keys=True)


class Trainer:
    """A run in a folder, from its beginning or from where it was interrupted.

    Args:
        folder: where the run keeps its state and log; made if it is not there.
        settings: what to run.
        student: the model, with its first weights.
        lessons: makes the batches.
        task: what pictures show.
        language_tasks: what the language part learns to talk about.

    Raises:
        MonoedgeError: the folder holds another run, or a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        student: Student,
        lessons: Lessons,
        task: Task,
        language_tasks: Sequence[Task],
    ) -> None:
        self.folder, self.settings, self.student = folder, settings, student
        self.lessons, self.task, self.language_tasks = lessons, task, language_tasks
        self.stage, self.step = 0, 0
        self.frozen: str | None = settings.language
        self._optimizer: torch.optim.AdamW | None = None
        self._log: list[dict[str, object]] = []
        if (folder / STATE_FILE).exists():
            self._restore()
        else:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def done(self) -> bool:
        """Whether the course has been run to its end."""
        return self.stage == len(self.settings.course)

    def run(self, bar: Bar, until: int | None = None) -> None:
        """Goes on to the end of the course, or for ``until`` steps.

        The state is saved on the way. An interruption saves nothing, as it may come in the middle of a step: what was
        learned since the last time is learned again.

        Raises:
            MonoedgeError: the loss is no number any more, or the disk is full.
        """
        left = until
        while not self.done and left != 0:
            stage = self.settings.course[self.stage]
            if self._optimizer is None:
                self._begin(stage)
            last = stage.steps if left is None else min(stage.steps, self.step + left)
            left = None if left is None else left - (last - self.step)
            for step in bar(range(self.step, last), stage, self.step):
                self._learn(stage, step)
                self.step = step + 1
                if self.step % SAVE_EVERY == 0:
                    self._save()
            if self.step == stage.steps:
                self._end(stage)
            self._save()

    # ---- stages ------------------------------------------------------------------------------------------

    def _begin(self, stage: Stage) -> None:
        parameters = self.student.train_only(trained_names(stage, self.student))
        self._optimizer = torch.optim.AdamW(parameters, stage.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def _learn(self, stage: Stage, step: int) -> None:
        optimizer, student = self._optimizer, self.student
        assert optimizer is not None  # noqa: S101 - _begin made it
        batch = batch_of(stage, step, self.lessons, self.task, self.language_tasks, self.settings.seed)
        record: dict[str, object] = {"stage": stage.name, "step": step}
        loss, logits = loss_of(stage, student, batch)
        if logits is not None:
            record["right"] = right_answers(logits, batch).float().mean().item()
        record["loss"] = loss.item()
        if not torch.isfinite(loss):
            raise MonoedgeError(f"the loss of step {step} of stage {stage.name} is {loss.item()}: lower its rate")
        optimizer.zero_grad()
        loss.backward()
        group = optimizer.param_groups[0]
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = learning_rate(stage, step)
        optimizer.step()
        if step % LOG_EVERY == 0:
            self._log.append(record)

    def _end(self, stage: Stage) -> None:
        following = self.settings.course[self.stage + 1 :]
        if stage.trains == "language" and not (following and following[0].trains == "language"):
            # As the file will hold it, so that what follows learns with the language part that it is used with.
            for _, parameter in self.student.language_parameters():
                parameter.data = parameter.data.bfloat16().float()
            self.student.start_visual_experts()
            self.frozen = language_digest(self.student)
        elif stage.trains != "language" and language_digest(self.student) != self.frozen:
            raise AssertionError("the language part has changed while it was frozen")
        self.stage, self.step, self._optimizer = self.stage + 1, 0, None

    # ---- state -------------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = {name: value.contiguous() for name, value in self.student.named_parameters()}
        if self._optimizer is not None:
            names = {id(parameter): name for name, parameter in self.student.named_parameters()}
            for parameter, moments in self._optimizer.state.items():
                for moment in _MOMENTS:
                    tensors[f"{moment}/{names[id(parameter)]}"] = moments[moment]
        metadata = {
            "settings": self.settings.to_json(),
            "stage": str(self.stage),
            "step": str(self.step),
            "frozen": self.frozen or "",
            "log": json.dumps(self._log),
        }
        try:
            with replaced(self.folder / STATE_FILE) as partial:
                save_file(tensors, partial, metadata=metadata)
            lines = "".join(json.dumps(record) + "\n" for record in self._log)
            (self.folder / LOG_FILE).write_text(lines, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise MonoedgeError(f"saving the state in {self.folder} failed: {error}") from None

    def _restore(self) -> None:
        file = self.folder / STATE_FILE
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
            settings, stage, step = metadata["settings"], int(metadata["stage"]), int(metadata["step"])
            self._log, self.frozen = json.loads(metadata["log"]), metadata["frozen"] or None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise MonoedgeError(f"{file} is not the state of a run ({error}): delete {self.folder}") from None
        if settings != self.settings.to_json():
            raise MonoedgeError(
                f"{self.folder} holds a run with other settings: give the same options to go on, or another folder"
            )
        self.stage, self.step = stage, step
        parameters = dict(self.student.named_parameters())
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
        if self.done or not any(name.startswith(_MOMENTS[0]) for name in tensors):
            return
        self._begin(self.settings.course[stage])
        assert self._optimizer is not None  # noqa: S101 - _begin made it
        for name in trained_names(self.settings.course[stage], self.student):
            state = {moment: tensors[f"{moment}/{name}"] for moment in _MOMENTS}
            self._optimizer.state[parameters[name]] = {"step": torch.tensor(float(step)), **state}


def language_digest(student: Student) -> str:
    """SHA-256 of every bit of the language part."""
    digest = hashlib.sha256()
    for name, parameter in student.language_parameters():
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def saved_course(folder: Path) -> tuple[Stage, ...] | None:
    """The stages of the run that a folder holds; None where it holds none that can be read."""
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as opened:
            stages = json.loads((opened.metadata() or {})["settings"])["course"]
        return tuple(Stage(**stage) for stage in stages)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def seconds_a_step(
    stage: Stage, student: Student, lessons: Lessons, task: Task, language_tasks: Sequence[Task]
) -> float:
    """How long a step of a stage takes here, its best of three; changes no weight."""
    student.train_only(trained_names(stage, student))
    times = []
    for step in range(3):
        started = time.perf_counter()
        batch = batch_of(stage, stage.steps - 1 - step, lessons, task, language_tasks, seed=0)
        loss_of(stage, student, batch)[0].backward()
        times.append(time.perf_counter() - started)
    return min(times)
