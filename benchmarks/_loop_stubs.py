"""What stands for engine, model and data in benchmarks/loop_overhead.py."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._profile import Profile
from lens_megatron.algorithms.rescue import RescueConfig
from lens_megatron.rewards.config import RewardConfig
from lens_megatron.rollout.engine import Finished, Health, Request, VersionSpan
from lens_megatron.rollout.factory import rescue_rules
from lens_megatron.rollout.sampler import Sampler
from lens_megatron.rollout.sampling import SamplingConfig
from lens_megatron.types import Prompt, Rollout

VOCABULARY, PADDED_VOCABULARY = 3000, 3072
PROMPT_WORDS = 100


# The stub engine, in the driver's process.


class StubEngine:
    """Every response is complete when it is asked for; `per_poll` of them come out of one poll."""

    deterministic = True
    positions = None

    def __init__(self, response_tokens: int, vocabulary: int, per_poll: int = 64) -> None:
        draw = random.Random(0)
        self._tokens = [draw.randrange(3, vocabulary) for _ in range(2 * response_tokens)]
        self._logprobs = [-draw.random() for _ in range(2 * response_tokens)]
        self._length, self._per_poll = response_tokens, per_poll
        self._ready: list[Request] = []
        self.version = 0
        self.seconds = 0.0

    def submit(self, requests: Sequence[Request]) -> None:
        self._ready += requests

    def poll(self, timeout: float) -> list[Finished]:
        began = time.process_time()
        now, self._ready = self._ready[: self._per_poll], self._ready[self._per_poll :]
        done = []
        for request in now:
            start = request.seed % self._length
            stop = start + self._length
            span = (VersionSpan(self.version, 0, self._length),)
            # the first token tells the reward; and responses differ, as they do in life
            tokens = (request.seed % 1000, *self._tokens[start + 1 : stop])
            done.append(Finished(request.id, tokens, tuple(self._logprobs[start:stop]), "stop", span))
        self.seconds += time.process_time() - began
        return done

    def abort(self, ids: Iterable[str]) -> None:
        if set(ids) & {request.id for request in self._ready}:
            raise ValueError("under schedule `early` nothing that was asked for becomes moot")

    def free_slots(self) -> int:
        return max(0, 256 - len(self._ready))

    def begin_update(self, version: int) -> None:
        self.version = version

    def update(self, bucket: Mapping[str, torch.Tensor]) -> None: ...

    def end_update(self) -> None: ...

    def clock(self) -> float:
        return time.monotonic()

    def health(self) -> Health:
        return Health(True, len(self._ready), 0, self.version)

    def close(self) -> None: ...


def reward(prompt: Prompt, rollout: Rollout) -> float:
    """Prompts with an even number mostly fail, unless they are purified; the others mostly succeed."""
    hard = int(prompt.id.rpartition("-")[2]) % 2 == 0
    return float(rollout.response[0] < (600 if rollout.purified else 200) if hard else rollout.response[0] < 850)


class StubSampler(Sampler):
    """The real one; tells the engine's own time with its state."""

    def state_dict(self) -> dict[str, Any]:
        assert isinstance(self.engine, StubEngine)
        return {**super().state_dict(), "engine_seconds": self.engine.seconds}


def stub_sampler(
    folder: Path,
    slots: int,
    device: str,
    dtype: str,
    sampling: SamplingConfig,
    rescue: RescueConfig,
    rewards: RewardConfig,
    seed: int,
) -> Sampler:
    """Stands for factory.embedded_sampler."""
    engine = StubEngine(sampling.max_response_tokens, VOCABULARY)
    return StubSampler(engine, reward, rescue_rules(rescue), sampling, (1,), seed)


# The stub model.


def stub_model(profile: Profile, spec: Any, layout: Any, folder: Path, *_: Any, shift: float = 0.0, **__: Any) -> Any:
    from megatron.core.enums import ModelType

    from lens_megatron.mcore.model import TokenModel, transformer_config
    from lens_megatron.mcore.step import Trainable

    class StubChunk(TokenModel):
        """log p from a table by label, so that policy and reference differ where prompts differ."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.config = transformer_config(spec, layout, torch.float32, None)
            labels_V = torch.arange(spec.vocab_size)
            self.table_V = torch.nn.Parameter(-0.5 - (labels_V % 97) / 97 - shift * (labels_V % 13))
            self.pre_process = self.post_process = True
            self.vp_stage = None
            self.model_type = ModelType.encoder_or_decoder

        def forward(self, tokens_1T: Any, positions_1T: Any, mask: Any, labels: Any, packed_seq_params: Any) -> Any:
            with profile.section("stub model"):
                logprobs_T = self.table_V[labels.labels_T]
                return torch.stack([logprobs_T, logprobs_T.detach().neg()])

        def set_input_tensor(self, input_tensor: Any) -> None: ...

        def zero_grad_buffer(self) -> None:
            self.table_V.grad = None

    class StubPolicy(Trainable):
        def export_hf(self, limit_s: float | None = None) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(())

    chunk = StubChunk()
    return StubPolicy(spec, chunk.config, [chunk], StubOptimizer())  # type: ignore[arg-type]


class StubOptimizer:
    @property
    def inner(self) -> StubOptimizer:
        return self

    def zero_grad(self) -> None: ...

    def step(self, *_: Any) -> tuple[float, float, bool]:
        return 1.0, 1e-6, True


class StubSaver:
    """Checkpoints are written in the background and measured elsewhere."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def due(self, step: int, last: bool = False) -> bool:
        return False

    def poll(self) -> None: ...

    def finish(self) -> None: ...


# The task.


def write_model(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on this package's own text, and a shape that fits it. No weights."""
    from tokenizers import ByteLevelBPETokenizer

    source = Path(__file__).parent.parent / "lens_megatron"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(
        [str(path) for path in sorted(source.rglob("*.py"))], VOCABULARY, 2, False, ["<pad>", "<eos>", "<unk>"]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    from lens_megatron.data.toy import model_config

    (folder / "config.json").write_text(json.dumps({**model_config(), "vocab_size": PADDED_VOCABULARY}))


def write_prompts(path: Path, count: int) -> None:
    draw = random.Random(0)
    words = ("the", "model", "takes", "every", "token", "of", "a", "prompt", "and", "tells", "its", "score", "again")
    with path.open("w") as file:
        for i in range(count):
            text = f"{i}: " + " ".join(draw.choice(words) for _ in range(PROMPT_WORDS))
            file.write(json.dumps({"id": f"p-{i}", "prompt": text, "answer": "1"}) + "\n")
