"""Asks the questions of `order`, each with its deadline, and keeps every answer: one line of JSON each.

A question starts where its seconds fit into what is left of the slice, the first one of a slice in any case; others
that fit go first then. Whatever becomes of it is an answer and it is not asked again: a process that crashes, hangs or
says nonsense costs one question. A question that was on its way when the whole run was ended is asked once more, after
all others.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regnet_fast import store
from regnet_fast.trials.process import Child, Fault, StartError

from .. import record
from .order import ROOT, Item, Question

Answer = dict[str, Any]
COMMAND = (sys.executable, "-m", "bench.gpu.answers")
TIMES = 2  # that a question is asked which was on its way when a run ended
BAD = ("wrong", "failed", "crashed", "hung", "garbled", "cut off")


class Journal:
    """The lines of a file, to which every one is added at once. Those of other conditions are left alone.

    Attributes: `machine`, what it said of itself; `answers` by question; `begun`, how often each
    question was.
    """

    def __init__(self, path: Path, machine: Answer):
        self.path, self.machine = path, machine
        same = {key: machine["conditions"].get(key) for key in record.SAME}
        self.run = store.key(json.dumps(same, sort_keys=True))[:12]
        self.answers: dict[tuple[str, str], Answer] = {}
        self.begun: Counter[tuple[str, str]] = Counter()
        for line in read(path):
            if line.get("run") == self.run:
                self._take(line)
        for key, times in self.begun.items():
            if times >= TIMES and key not in self.answers:
                self.answers[key] = {
                    "status": "cut off",
                    "reason": f"the run was ended {times} times while it was asked",
                }

    def open(self) -> None:
        """A slice begins."""
        self._write({"machine": self.machine, "at": record.now()})

    def begin(self, question: Question) -> None:
        """A question is asked now."""
        self._write({"item": question.item, "question": question.name, "begun": record.now()})

    def end(self, question: Question, answer: Answer) -> None:
        """And this is the answer, in the place of one before."""
        self._write({"item": question.item, "question": question.name, **answer})

    def left(self, question: Question, again: bool) -> bool:
        """Whether a question has no answer and was not begun, or `again`, was but has none."""
        begun = self.begun[question.key]
        return question.key not in self.answers and bool(begun) == again

    def _write(self, line: dict[str, Any]) -> None:
        line = {"run": self.run, **line}
        with self.path.open("a") as file:
            file.write(f"\n{json.dumps(line)}")  # the line before may be half of one
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        key = line.get("item"), line.get("question")
        if "begun" in line:
            self.begun[key] += 1
        elif "status" in line:
            self.answers[key] = line


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that are whole."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # of a process that was ended as it wrote
            continue
    return [line for line in found if isinstance(line, dict)]


class Walk:
    """One slice.

    Args:
        journal: where answers are kept.
        until: the time, by `time.monotonic`, at which the slice ends.
        told: is told every question with its answer.
        command: the process that answers.
    """

    def __init__(
        self,
        journal: Journal,
        until: float,
        told: Callable[[Question, Answer], object],
        command: Sequence[str] | None = None,
    ):
        self.journal, self.until, self.told, self.command = journal, until, told, command or COMMAND
        self.asked = 0

    def all(self, items: Sequence[Item]) -> list[Question]:
        """Ask what has no answer yet, and return what is left for another slice."""
        for again in (False, True):
            for item in items:
                left = [question for question in item.questions if self.journal.left(question, again)]
                self._ask(item, left)
        return [q for item in items for q in item.questions if any(self.journal.left(q, a) for a in (False, True))]

    def _ask(self, item: Item, questions: Sequence[Question]) -> None:
        child: Child | None = None
        answered: Question | None = None  # by this very child, the last one
        for question in questions:
            if self.asked and time.monotonic() + question.seconds > self.until:
                continue
            if item.fresh and child is not None:
                child, answered = self._end(child, answered), None
            self.asked += 1
            self.journal.begin(question)
            begin = time.monotonic()
            for _ in range(2):
                try:
                    if child is None:
                        child, answered = started(self.command, item.environment), None
                    found = self._answer(child, question)
                    answered = question
                    break
                except Fault as fault:
                    child = None
                    found = {"status": fault.kind, "reason": str(fault)}
                    if not fault.before or answered is None:
                        break
                    self._blame(answered, fault)
                except StartError as error:
                    found = {"status": "failed", "reason": str(error)}
                    break
            self._keep(question, {**found, "seconds": round(time.monotonic() - begin, 1)})
        if child is not None:
            self._end(child, answered)

    def _answer(self, child: Child, question: Question) -> Answer:
        facts = {**question.facts, "folder": str(self.journal.path.parent)}
        limit = min(question.seconds, max(1.0, self.until - time.monotonic()))
        found = child.ask(facts, {"work": question.seconds}, limit=limit)
        return {name: value for name, value in found.items() if name != "id"}

    def _end(self, child: Child, answered: Question | None) -> None:
        try:
            child.end()
        except Fault as fault:
            if answered is not None and fault.kind == "crashed":
                self._blame(answered, fault)

    def _blame(self, answered: Question, fault: Fault) -> None:
        """The question that was answered last killed the process after that."""
        before = self.journal.answers[answered.key]
        self._keep(answered, {**before, "status": "crashed", "reason": f"after its answer: {fault}"})

    def _keep(self, question: Question, answer: Answer) -> None:
        self.journal.end(question, answer)
        self.told(question, answer)


def started(command: Sequence[str], environment: dict[str, str]) -> Child:
    """A process that can be asked. Raises StartError."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    child = Child(command, {**environment, "PYTHONPATH": path})
    child.started()
    return child


def ask_once(facts: dict[str, Any], seconds: float) -> Answer:
    """The answer of a process of its own. Raises RuntimeError where there is none."""
    with started(COMMAND, {}) as child:
        return child.ask(facts, {"work": seconds}, limit=seconds)
