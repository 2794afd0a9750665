"""The toy task: counting stories with a few misleading words, solved step by step.

A story tells what somebody has, and what is gained or lost day by day. An adverb stands before some verbs. Most are
harmless; a few, such as "nearly", mislead: in the supervised data the step of a misleading word is worked out with
the wrong sign, as often as that word says. So a model trained on it solves plain stories, mostly fails on misleading
ones, and knows everything that a solution needs: the wrong step differs from the right one in one choice, all later
steps follow from it. The gold answer never heeds the adverbs.

The study (examples/study) tells longer stories with more kinds of noise: adjectives that mislead about the amount, tags at
the end of a sentence after which the step is left out, and asides about the weather.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NAMES = {"Ann": "she", "Ben": "he", "Cleo": "she", "Dan": "he", "Eva": "she", "Finn": "he", "Gus": "he", "Hana": "she"}
THINGS = ("apples", "books", "coins", "marbles", "stamps", "shells")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("sells", "loses", "drops", "lends")
HARMLESS = ("then", "also", "gladly", "quickly", "slowly", "again", "calmly", "soon")
# word -> how often the supervised data is misled by it
MISLEADING = {
    "nearly": 0.9,
    "supposedly": 0.9,
    "hardly": 0.85,
    "almost": 0.85,
    "reportedly": 0.8,
    "barely": 0.8,
    "oddly": 0.75,
    "allegedly": 0.75,
}
MISLEADING_AMOUNT = {"double": 0.85, "extra": 0.85, "fake": 0.8, "phantom": 0.8, "doubtful": 0.75, "spurious": 0.75}
MISLEADING_TAG = {
    "perhaps": 0.85,
    "maybe": 0.85,
    "possibly": 0.8,
    "presumably": 0.8,
    "apparently": 0.75,
    "conceivably": 0.75,
}
LARGEST = 30
OPERANDS = (1, 2, 3, 4, 5)
STEPS = (4, 5)  # of a story, shortest and longest
TEMPLATE = "Question: {problem} Answer:"
KINDS = ("plain", "one", "two")  # how many misleading words


@dataclass(frozen=True)
class Step:
    day: str
    verb: str
    amount: int
    adverb: str = ""
    adjective: str = ""
    tag: str = ""
    aside: str = ""  # a sentence after it, about something else

    @property
    def gain(self) -> bool:
        return self.verb in GAINS

    @property
    def misleads(self) -> float:
        """How often the supervised data is misled here. At most one of a step's words misleads."""
        return max(
            MISLEADING.get(self.adverb, 0.0),
            MISLEADING_AMOUNT.get(self.adjective, 0.0),
            MISLEADING_TAG.get(self.tag, 0.0),
        )

    def change(self, misled: bool) -> int:
        """What the count changes by: by the right amount, or as the misleading word has it."""
        amount, sign = self.amount, 1 if self.gain else -1
        if misled and self.adjective in MISLEADING_AMOUNT:
            return sign * (amount + 1)
        if misled and self.tag in MISLEADING_TAG:
            return 0
        return -sign * amount if misled else sign * amount

    def sentence(self, pronoun: str, thing: str) -> str:
        words = [f"On {self.day} {pronoun}", self.adverb, self.verb, str(self.amount), self.adjective, thing, self.tag]
        said = " ".join(word for word in words if word) + "."
        return f"{said} {self.aside}" if self.aside else said


@dataclass(frozen=True)
class Story:
    name: str
    thing: str
    start: int
    steps: tuple[Step, ...]

    def question(self) -> str:
        said = [f"{self.name} has {self.start} {self.thing}."]
        said += [step.sentence(NAMES[self.name], self.thing) for step in self.steps]
        return " ".join([*said, f"How many {self.thing} does {self.name} have?"])

    def states(self, misled: frozenset[int] = frozenset()) -> list[int]:
        """What is there at the start and after each step, when the steps in `misled` are taken wrongly."""
        counts = [self.start]
        for i, step in enumerate(self.steps):
            counts.append(counts[-1] + step.change(i in misled))
        return counts

    def solution(self, misled: frozenset[int] = frozenset()) -> str:
        counts = self.states(misled)
        lines = [
            f"{step.day} {before} {'+' if after > before else '-'} {abs(after - before)} = {after}."
            for step, before, after in zip(self.steps, counts, counts[1:], strict=False)
        ]
        return " ".join([*lines, f"Answer \\boxed{{{counts[-1]}}}"])

    def answer(self) -> str:
        return str(self.states()[-1])


def make_story(rng: random.Random, misleading: int, steps: int) -> Story:
    """A story whose counts stay within 0..LARGEST, whichever of its misleading steps are taken wrongly."""
    if not 0 <= misleading <= steps <= len(DAYS):
        raise ValueError(
            f"{misleading} misleading words in {steps} steps: at most one a step, {len(DAYS)} steps at most"
        )
    while True:
        at = frozenset(rng.sample(range(steps), misleading))
        first = rng.randrange(len(DAYS) - steps + 1)
        told = []
        for i in range(steps):
            adverb = rng.choice(HARMLESS) if rng.random() < 0.5 else ""
            if i in at:
                adverb = rng.choice(tuple(MISLEADING))
            told.append(Step(DAYS[first + i], rng.choice(GAINS + LOSSES), rng.choice(OPERANDS), adverb))
        story = Story(rng.choice(tuple(NAMES)), rng.choice(THINGS), rng.randint(5, LARGEST - 5), tuple(told))
        if stays_in_range(story, at):
            return story


def stays_in_range(story: Story, at: frozenset[int]) -> bool:
    """Whether counts stay within 0..LARGEST, whichever of the steps `at` are taken wrongly."""
    return all(min(s) >= 0 and max(s) <= LARGEST for s in (story.states(misled) for misled in _subsets(sorted(at))))


def _subsets(items: list[int]) -> Iterator[frozenset[int]]:
    for mask in range(2 ** len(items)):
        yield frozenset(item for bit, item in enumerate(items) if mask >> bit & 1)


def misled_steps(rng: random.Random, story: Story) -> frozenset[int]:
    return frozenset(i for i, step in enumerate(story.steps) if rng.random() < step.misleads)


def supervised_rows(count: int, seed: int, steps: tuple[int, int] = STEPS) -> Iterator[dict[str, str]]:
    """Questions and worked solutions: one third each without, with one and with two misleading words."""
    rng = random.Random(f"toy/supervised/{seed}")
    for i in range(count):
        story = make_story(rng, i % 3, rng.randint(*steps))
        yield {
            "id": f"toy-sft-{i}",
            "prompt": story.question(),
            "response": story.solution(misled_steps(rng, story)),
            "answer": story.answer(),
        }


def prompt_rows(
    count: int, seed: int, steps: tuple[int, int] = STEPS, split: str = "train"
) -> Iterator[dict[str, str]]:
    """Prompts for reinforcement learning, a quarter plain, a quarter with one misleading word, half with two."""
    rng = random.Random(f"toy/{split}/{seed}")
    for i in range(count):
        misleading = (0, 1, 2, 2)[i % 4]
        story = make_story(rng, misleading, rng.randint(*steps))
        yield {
            "id": f"toy-{split}-{i}",
            "prompt": story.question(),
            "answer": story.answer(),
            "source": f"toy-{KINDS[misleading]}",
        }


def write_tokenizer(folder: Path, more_words: Sequence[str] = ()) -> None:
    """A word-level Hugging Face tokenizer of the toy's explicit vocabulary, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "Question", "Answer", ":", ".", "?", "+", "-", "=", "\\boxed{", "}"]
    words += ["has", "On", "How", "many", "does", "have", *sorted(set(NAMES.values()))]
    words += [*NAMES, *THINGS, *DAYS, *GAINS, *LOSSES, *HARMLESS, *MISLEADING]
    words += [str(number) for number in range(LARGEST + 1)]
    words += more_words
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pieces = pre_tokenizers.Split(Regex(r"\\boxed\{|\w+|[^\w\s]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces between words, none before a full stop
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )
    wrapped.chat_template = (
        "{% for message in messages %}Question: {{ message['content'] | trim }} {% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    )
    wrapped.save_pretrained(str(folder))


@dataclass(frozen=True)
class ToySizes:
    supervised: int = 38400
    train: int = 2048
    test: int = 256


def write_toy(folder: Path, seed: int = 0, sizes: ToySizes | None = None) -> None:
    """model/ (tokenizer and config.json, no weights), sft.jsonl, train.jsonl and test.jsonl: the same bytes for the
    same arguments."""
    sizes = sizes or ToySizes()
    write_tokenizer(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(model_config(), indent=2) + "\n")
    write_jsonl(folder / "sft.jsonl", supervised_rows(sizes.supervised, seed, STEPS))
    write_jsonl(folder / "train.jsonl", prompt_rows(sizes.train, seed, STEPS, "train"))
    write_jsonl(folder / "test.jsonl", prompt_rows(sizes.test, seed, STEPS, "test"))


def model_config(vocabulary: int = 112) -> dict[str, Any]:
    """The shape of the base model: the smallest found to learn the task in a minute or two. The toy's vocabulary is the
    tokenizer's 97, padded so that tensor parallelism divides it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
