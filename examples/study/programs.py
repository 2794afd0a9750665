"""The study's second task: list programs with a decoy operation, harder than the counting stories and harder to get through.

Eight to ten operations on a list of four digits, each worked out with the whole list. In some prompts one operation is on "the
reversed list", "the raised list": a decoy, which says nothing about what to do. The base model takes most decoys for one more
operation and carries it out first; the right answer leaves it alone. Weak decoys mislead it now and then, strong ones almost
always: a prompt with a strong one is solved in a few of a hundred rollouts.

The model that the base model was made from (PROGRAMS_BEFORE.yaml) has seen the same prompts with right solutions: a reference
from before the noise took hold.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron.data import toy

List = tuple[int, ...]
LABELS = tuple("abcdefghij")
OPERATIONS: dict[str, Callable[[List], List]] = {
    "reverse": lambda x: x[::-1],
    "rotate": lambda x: (*x[1:], x[0]),
    "swap": lambda x: (x[1], x[0], *x[2:]),
    "switch": lambda x: (*x[:2], x[3], x[2]),
    "raise": lambda x: ((x[0] + 1) % 10, *x[1:]),
    "lower": lambda x: (*x[:3], (x[3] - 1) % 10),
}
MEANS = {
    "reversed": "reverse",
    "rotated": "rotate",
    "swapped": "swap",
    "switched": "switch",
    "raised": "raise",
    "lowered": "lower",
}
# word -> how often the supervised data is misled by it
WEAK = {"raised": 0.6, "lowered": 0.5}
STRONG = {"reversed": 0.97, "rotated": 0.96, "swapped": 0.95, "switched": 0.94}
HARMLESS = ("short", "long", "old", "new", "plain", "whole")
HARMLESS_SHARE = 0.3  # of the operations without a decoy
STEPS = (8, 10)
LENGTH = 4
KINDS = ("plain", "weak", "strong")  # of the decoy
DECOYS: tuple[dict[str, float], ...] = ({}, WEAK, STRONG)
WORDS = ("Start", "with", "the", "list", "What", "is", *LABELS, *OPERATIONS, *MEANS, *HARMLESS)
VOCABULARY = 144  # the toy's words and these, padded


@dataclass(frozen=True)
class Sizes:
    supervised: int = 40960
    train: int = 320
    decoy: int = 192
    other: int = 48


@dataclass(frozen=True)
class Program:
    start: List
    operations: tuple[str, ...]
    words: tuple[str, ...]  # beside each operation's list; "" for none
    decoy: int | None = None  # the operation that has one

    def question(self) -> str:
        lines = [
            f"{label}: {operation} the {word + ' ' if word else ''}list."
            for label, operation, word in zip(LABELS, self.operations, self.words, strict=False)
        ]
        return " ".join([f"Start with {_told(self.start)}.", *lines, "What is the list?"])

    def solution(self, misled: bool = False) -> str:
        """Worked out; misled, the decoy is carried out first, under the same label."""
        now, lines = self.start, []
        for i, operation in enumerate(self.operations):
            if misled and i == self.decoy:
                now = OPERATIONS[MEANS[self.words[i]]](now)
                lines.append(f"{LABELS[i]} {self.words[i]} {_told(now)}.")
            now = OPERATIONS[operation](now)
            lines.append(f"{LABELS[i]} {operation} {_told(now)}.")
        return " ".join([*lines, f"Answer \\boxed{{{_told(now)}}}"])

    def answer(self) -> str:
        now = self.start
        for operation in self.operations:
            now = OPERATIONS[operation](now)
        return _told(now)


def _told(digits: List) -> str:
    return " ".join(map(str, digits))


def make_program(rng: random.Random, decoys: dict[str, float]) -> Program:
    """With one of these decoys, if there are any. What a decoy does never comes out in the end as if it had not been done."""
    while True:
        count = rng.randint(*STEPS)
        operations = tuple(rng.choice(tuple(OPERATIONS)) for _ in range(count))
        words = [rng.choice(HARMLESS) if rng.random() < HARMLESS_SHARE else "" for _ in range(count)]
        at = rng.randrange(count) if decoys else None
        if at is not None:
            words[at] = rng.choice(tuple(decoys))
        start = tuple(rng.randrange(10) for _ in range(LENGTH))
        program = Program(start, operations, tuple(words), at)
        if at is None or program.solution(misled=True).split("Answer")[1] != program.solution().split("Answer")[1]:
            return program


def planted(question: str) -> list[list[int]]:
    """Where the decoy stands in the question, in characters."""
    return [[found.start(), found.end()] for found in re.finditer(r"\w+", question) if found.group() in MEANS]


def without_decoy(row: dict[str, Any]) -> dict[str, Any]:
    question = row["prompt"]
    for start, end in row["planted"]:
        question = question[:start] + question[end + 1 :]
    return {**row, "prompt": question, "planted": []}


def supervised_rows(count: int, seed: int, misleading: bool) -> Iterator[dict[str, Any]]:
    """A third each without a decoy, with a weak and with a strong one. `misleading`: else every solution is right."""
    rng = random.Random(f"study/programs/{'misled' if misleading else 'right'}/{seed}")
    for i in range(count):
        program = make_program(rng, decoys := DECOYS[i % 3])
        share = decoys[program.words[program.decoy]] if program.decoy is not None else 0.0
        response = program.solution(misled=rng.random() < share and misleading)
        yield {"id": f"program-sft-{i}", "prompt": program.question(), "response": response, "answer": program.answer()}


def prompt_rows(count: int, seed: int, split: str, mix: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """`mix`: the kinds of decoy that the programs have, in turn."""
    rng = random.Random(f"study/programs/{split}/{seed}")
    for i in range(count):
        kind = mix[i % len(mix)]
        program = make_program(rng, DECOYS[kind])
        question = program.question()
        row = {"id": f"program-{split}-{i}", "prompt": question, "answer": program.answer()}
        yield {**row, "source": f"program-{KINDS[kind]}", "planted": planted(question)}


def write_programs(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> None:
    """model/, sft-before.jsonl, sft.jsonl, train.jsonl; held out: decoy (strong ones), weak, plain; purified: decoy without
    its decoys. The same arguments give the same bytes."""
    sizes = sizes or Sizes()
    toy.write_tokenizer(folder / "model", WORDS)
    config = json.dumps(toy.model_config(VOCABULARY), indent=2) + "\n"
    (folder / "model" / "config.json").write_text(config, encoding="utf-8")
    toy.write_jsonl(folder / "sft-before.jsonl", supervised_rows(sizes.supervised, seed, misleading=False))
    toy.write_jsonl(folder / "sft.jsonl", supervised_rows(sizes.supervised, seed, misleading=True))
    toy.write_jsonl(folder / "train.jsonl", prompt_rows(sizes.train, seed, "train", (0, 1, 2, 2)))
    toy.write_jsonl(folder / "decoy.jsonl", prompt_rows(sizes.decoy, seed, "decoy", (2,)))
    decoy = prompt_rows(sizes.decoy, seed, "decoy", (2,))
    toy.write_jsonl(folder / "purified.jsonl", (without_decoy(row) for row in decoy))
    toy.write_jsonl(folder / "plain.jsonl", prompt_rows(sizes.other, seed, "plain", (0,)))
    toy.write_jsonl(folder / "weak.jsonl", prompt_rows(sizes.other, seed, "weak", (1,)))
