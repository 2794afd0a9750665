"""The study's task: the toy's counting stories, longer, with noise of three kinds whose places are recorded.

    sign    an adverb before the verb ("nearly loses 2 books"): the step is taken with the wrong sign
    amount  an adjective before the thing ("loses 2 fake books"): one too many
    skip    a tag at the end ("loses 2 books perhaps"): the step is left out

Each of the three places also has harmless words, so that no place gives the noise away, and asides about the weather
make up for prompts in which every token matters, as in no natural prompt. The base model is trained on all three
kinds; reinforcement learning sees `sign` and `amount` only, `skip` is the noise that training never saw.

Two tasks beside it start from the same base model: the same stories with partial credit (graded.py), and a control in which
nothing distracts: no noise, no harmless words, no asides. The base model, which has seen no story told so briefly, often fails.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lens_megatron.data import toy
from lens_megatron.data.toy import Step, Story

NOISE = {"sign": toy.MISLEADING, "amount": toy.MISLEADING_AMOUNT, "skip": toy.MISLEADING_TAG}
HARMLESS = {
    "sign": toy.HARMLESS,
    "amount": ("red", "blue", "old", "new", "small", "nice"),
    "skip": ("today", "indeed", "alone", "outside", "early", "too"),
}
FIELD = {"sign": "adverb", "amount": "adjective", "skip": "tag"}
TRAINED, UNSEEN = ("sign", "amount"), ("skip",)
WEATHER = ("warm", "cold", "sunny", "rainy", "windy", "cloudy")
STEPS = (5, 6)
WORDS = ("It", "is", "a", "day", *NOISE["amount"], *NOISE["skip"], *HARMLESS["amount"], *HARMLESS["skip"], *WEATHER)
VOCABULARY = 144  # 131 tokens, padded
HARMLESS_SHARE = 0.3  # of the places that could hold a harmless word
ASIDE_SHARE = 0.4  # of the steps that an aside follows


@dataclass(frozen=True)
class Sizes:
    supervised: int = 40960
    train: int = 320
    noisy: int = 192
    other: int = 48  # of the clean set, and of the one with unseen noise


def noisy_story(rng: random.Random, noise: int, kinds: tuple[str, ...]) -> Story:
    """A story with `noise` misleading words of these kinds, each in a step of its own."""
    while True:
        count = rng.randint(*STEPS)
        at = frozenset(rng.sample(range(count), noise))
        first = rng.randrange(len(toy.DAYS) - count + 1)
        steps = [_step(rng, toy.DAYS[first + i], rng.choice(kinds) if i in at else None) for i in range(count)]
        name, thing = rng.choice(tuple(toy.NAMES)), rng.choice(toy.THINGS)
        story = Story(name, thing, rng.randint(5, toy.LARGEST - 5), tuple(steps))
        if toy.stays_in_range(story, at):
            return story


def _step(rng: random.Random, day: str, noise: str | None) -> Step:
    words = {}
    for kind, field in FIELD.items():
        if kind == noise:
            words[field] = rng.choice(tuple(NOISE[kind]))
        elif rng.random() < HARMLESS_SHARE:
            words[field] = rng.choice(HARMLESS[kind])
    aside = f"It is a {rng.choice(WEATHER)} day." if rng.random() < ASIDE_SHARE else ""
    return replace(Step(day, rng.choice(toy.GAINS + toy.LOSSES), rng.choice(toy.OPERANDS), **words), aside=aside)


def solution(story: Story, misled: frozenset[int] = frozenset()) -> str:
    """As the toy's, with each step's verb: a model this small learns a sign from the word before it, not from the prompt."""
    counts = story.states(misled)
    lines = [
        f"{step.day} {step.verb} {before} {'+' if after > before else '-'} {abs(after - before)} = {after}."
        for step, before, after in zip(story.steps, counts, counts[1:], strict=False)
    ]
    return " ".join([*lines, f"Answer \\boxed{{{counts[-1]}}}"])


def planted(question: str) -> list[list[int]]:
    """Where the misleading words stand in the question, in characters."""
    noise = {word for words in NOISE.values() for word in words}
    return [[found.start(), found.end()] for found in re.finditer(r"\w+", question) if found.group() in noise]


def without_noise(row: dict[str, Any]) -> dict[str, Any]:
    question = row["prompt"]
    for start, end in reversed(row["planted"]):
        question = question[:start] + question[end:]
    return {**row, "prompt": re.sub(r" +(?=[ .])", "", question), "planted": []}


def supervised_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """A third each without, with one and with two misleading words, of all kinds."""
    rng = random.Random(f"study/supervised/{seed}")
    for i in range(count):
        story = noisy_story(rng, i % 3, tuple(NOISE))
        response = solution(story, toy.misled_steps(rng, story))
        yield {"id": f"study-sft-{i}", "prompt": story.question(), "response": response, "answer": story.answer()}


def prompt_rows(
    count: int, seed: int, split: str, mix: tuple[int, ...], kinds: tuple[str, ...], graded: bool = False
) -> Iterator[dict[str, Any]]:
    """`mix`: how many misleading words the stories have, in turn. `graded`: the answer is every count, for graded.py."""
    rng = random.Random(f"study/{split}/{seed}")
    for i in range(count):
        noise = mix[i % len(mix)]
        question = (story := noisy_story(rng, noise, kinds)).question()
        row = {"id": f"study-{split}-{i}", "prompt": question, "answer": story.answer()}
        row |= {"source": f"study-{toy.KINDS[noise]}"}
        if graded:
            row |= {"answer": " ".join(str(count) for count in story.states()[1:]), "source": "graded"}
        yield {**row, "planted": planted(question)}


def control_rows(count: int, seed: int, split: str, steps: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The toy's stories, told without a word too many. `steps`: how many they have, in turn."""
    rng = random.Random(f"study/{split}/{seed}")
    for i in range(count):
        story = bare_story(rng, steps[i % len(steps)])
        row = {"id": f"study-{split}-{i}", "prompt": story.question(), "answer": story.answer()}
        yield {**row, "source": f"study-{len(story.steps)}-steps", "planted": []}


def bare_story(rng: random.Random, steps: int) -> Story:
    story = toy.make_story(rng, 0, steps)
    return replace(story, steps=tuple(replace(step, adverb="") for step in story.steps))


def write_task(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> None:
    """model/ (tokenizer and shape), sft.jsonl, train.jsonl; held out: noisy, clean, unseen; purified: noisy without its
    noise, for p(x'). graded-train, graded: train and noisy with partial credit. control-train, bare: the control and its
    held-out set. The same arguments give the same bytes."""
    sizes = sizes or Sizes()
    toy.write_tokenizer(folder / "model", WORDS)
    config = json.dumps(toy.model_config(VOCABULARY), indent=2) + "\n"
    (folder / "model" / "config.json").write_text(config, encoding="utf-8")
    toy.write_jsonl(folder / "sft.jsonl", supervised_rows(sizes.supervised, seed))
    training_mix, hard = (0, 1, 2, 2), (2,)  # easy, medium and hard as 1 : 1 : 2
    toy.write_jsonl(folder / "train.jsonl", prompt_rows(sizes.train, seed, "train", training_mix, TRAINED))
    toy.write_jsonl(folder / "noisy.jsonl", prompt_rows(sizes.noisy, seed, "noisy", hard, TRAINED))
    noisy = prompt_rows(sizes.noisy, seed, "noisy", hard, TRAINED)
    toy.write_jsonl(folder / "purified.jsonl", (without_noise(row) for row in noisy))
    toy.write_jsonl(folder / "clean.jsonl", prompt_rows(sizes.other, seed, "clean", (0,), TRAINED))
    toy.write_jsonl(folder / "unseen.jsonl", prompt_rows(sizes.other, seed, "unseen", hard, UNSEEN))
    graded_train = prompt_rows(sizes.train, seed, "train", training_mix, TRAINED, graded=True)
    toy.write_jsonl(folder / "graded-train.jsonl", graded_train)
    toy.write_jsonl(folder / "graded.jsonl", prompt_rows(sizes.noisy, seed, "noisy", hard, TRAINED, graded=True))
    toy.write_jsonl(folder / "control-train.jsonl", control_rows(sizes.train, seed, "control-train", (5, 6, 7)))
    toy.write_jsonl(folder / "bare.jsonl", control_rows(sizes.noisy, seed, "bare", (5, 7)))
