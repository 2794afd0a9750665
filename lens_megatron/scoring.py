"""Interference scores of prompts under two models that need not fit beside each other: the `score` command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lens_megatron.errors import UsageError
from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import find_weights, load_model_config, named_template
from lens_megatron.precision import Precision, torch_dtype
from lens_megatron.purification.config import PurificationConfig
from lens_megatron.purification.eligibility import eligible_tokens
from lens_megatron.purification.scores import interference_scores, to_optional
from lens_megatron.purification.strategies import Signals, purify
from lens_megatron.types import Prompt


@dataclass(frozen=True)
class ScoreConfig:
    """The keys that `score` takes as key.path=value."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    purification: PurificationConfig = field(default_factory=PurificationConfig)
    precision: Precision = "auto"
    tokens_per_microbatch: int = 16384
    timeout_s: float = 600.0
    template: str | None = None  # chat, a text with {problem}, or the name of a shipped model; null: the policy's own


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt as `score --json` gives it. The first token has no log-probs and no score."""

    ids: list[int]
    tokens: list[str]
    policy_logprobs: list[float | None]
    reference_logprobs: list[float | None]
    scores: list[float | None]
    eligible: list[bool]
    deleted: list[int]
    purified_ids: list[int]


@dataclass(frozen=True)
class ScoreResult:
    prompts: list[ScoredPrompt]
    noise_floor: float


def check_models(model: str, reference: str) -> None:
    """Whatever the two folders can be refused for, from their configs and headers alone."""
    from lens_megatron.mcore.hf_files import check_folder

    spec = load_model_config(model).spec
    if load_model_config(reference).spec != spec:
        raise UsageError(f"--reference {reference}: not of the same shape as {model}; scores compare token by token")
    for name in (model, reference):
        check_folder(find_weights(name), spec)


def score_prompts(model: str, reference: str, prompts: Sequence[Prompt], config: ScoreConfig) -> ScoreResult:
    """Every process of the layout calls this; every one gets the result. The two models are in memory one at a time."""
    from lens_megatron.data.tokenizer import TokenPieces, load_tokenizer, special_ids
    from lens_megatron.mcore import runtime
    from lens_megatron.mcore.step import build_frozen
    from lens_megatron.prompt_signals import floor_of

    spec = load_model_config(model).spec
    runtime.initialize(spec, config.parallel, timeout_s=config.timeout_s)
    sequences = [torch.tensor(prompt.tokens) for prompt in prompts]
    dtype = torch_dtype(config.precision)
    logprobs = {}
    floor: float | None = None
    for name in (reference, model):
        sharded = build_frozen(spec, config.parallel, find_weights(name), dtype=dtype)
        logprobs[name] = sharded.score(sequences, config.tokens_per_microbatch, entropy=False).logprobs
        if name == model and config.purification.noise_floor == "measured":
            floor = floor_of(sharded, sequences, config.purification, config.tokens_per_microbatch)
        del sharded
    tokenizer = load_tokenizer(str(find_weights(model)))
    special = special_ids(tokenizer)
    pieces = TokenPieces(tokenizer)
    scored = []
    for number, prompt in enumerate(prompts):
        policy_T, reference_T = logprobs[model][number], logprobs[reference][number]
        scores_T = interference_scores(policy_T, reference_T)
        outcome = purify(prompt, config.purification, special, Signals(scores_T, None, floor), seed=0, step=0)
        purified = outcome.purified_prompt
        scored.append(
            ScoredPrompt(
                ids=list(prompt.tokens),
                tokens=pieces(prompt.tokens),
                policy_logprobs=to_optional(policy_T),
                reference_logprobs=to_optional(reference_T),
                scores=to_optional(scores_T),
                eligible=eligible_tokens(prompt, special, config.purification.scope).tolist(),
                deleted=list(purified.deleted) if purified else [],
                purified_ids=list(purified.tokens) if purified else list(prompt.tokens),
            )
        )
    used = config.purification.noise_floor
    return ScoreResult(scored, floor if floor is not None else float(used))


def prompts_from(model: str, text: str | None, file: str | None, template: str | None = None) -> list[Prompt]:
    """One prompt from the command line, or a JSONL file's, through the model's template."""
    from lens_megatron.data.files import read_files
    from lens_megatron.data.prompts import encode_prompts
    from lens_megatron.data.rows import Message, Row, parse_row
    from lens_megatron.data.template import Template
    from lens_megatron.data.tokenizer import check_tokenizer, load_tokenizer

    config = load_model_config(model)
    tokenizer = load_tokenizer(str(find_weights(model)))
    check_tokenizer(tokenizer, config.spec.vocab_size)
    if text is not None:
        rows = [Row(id="prompt", messages=(Message("user", text),), answer="", source="", where="--prompt")]
    else:
        # a score needs no answer, so a file of prompts alone will do
        rows = [parse_row(where, {"answer": "none", **columns}) for where, columns in read_files(str(file), "train")]
        if not rows:
            raise UsageError(f"{file}: no prompts")
    return encode_prompts(rows, Template(tokenizer, named_template(template, config.template)))
