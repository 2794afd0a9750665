"""The embedded engine: a Hugging Face model in this process, with a KV cache and continuous batching.

Running rows fill the cache's slots 0..B-1 without holes, so that a decoding step reads slices and never gathers:
when a row finishes, the last row moves into its place. Each row starts at cache position 0; lengths differ and are
masked. A row's token is drawn by inverting its cumulative distribution at a number hashed from the request's seed and
the token's index, so a response depends on its own request only.

Shapes: B rows running, U different prompts in a prefill, R rows entering, P padded prompt length, H hidden, V vocabulary,
W longest running row.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lens_megatron.errors import RunError, UsageError
from lens_megatron.precision import whole_products
from lens_megatron.rollout.engine import Finished, Health, Request, VersionSpan
from lens_megatron.rollout.hf_weights import HFWeights
from lens_megatron.rollout.slot_cache import Decode, Prefill, SlotCache, attend_by_group

if TYPE_CHECKING:
    from lens_megatron.types import FinishReason

PREFILL_TOKENS = 8192  # padded tokens of one prefill: bounds its memory


@dataclass
class _Row:
    """A request, waiting or running, and what it has sampled so far."""

    request: Request
    arrival: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # (version, first token sampled with it)

    def context(self) -> tuple[int, ...]:
        return self.request.prompt + tuple(self.tokens)

    def finished(self, finish: FinishReason) -> Finished:
        ends = [*(start for _, start in self.spans[1:]), len(self.tokens)]
        spans = tuple(VersionSpan(v, start, end) for (v, start), end in zip(self.spans, ends, strict=False))
        return Finished(self.request.id, tuple(self.tokens), tuple(self.logprobs), finish, spans)


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> np.ndarray:
    """Numbers in [0, 1) hashed from (seed, token index) by two rounds of splitmix64."""
    with np.errstate(over="ignore"):
        state = np.array(seeds, dtype=np.uint64)
        for step in (np.array(indices, dtype=np.uint64), np.uint64(0)):
            state = state + (step + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, top_p_B: torch.Tensor, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row and its log-prob at the sampling temperature over the whole vocabulary (at 1 when greedy)."""
    greedy_B = temperature_B == 0
    logprobs_BV = torch.log_softmax(logits_BV.float() / torch.where(greedy_B, 1.0, temperature_B)[:, None], dim=-1)
    weights_BV = logprobs_BV.exp()
    if bool((top_p_B < 1).any()):
        sorted_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
        # a token stays while the mass before it is below top_p, so the likeliest always stays
        stays_BV = sorted_BV.cumsum(-1, dtype=torch.float64) - sorted_BV < top_p_B[:, None]
        weights_BV = weights_BV * torch.zeros_like(stays_BV).scatter(1, order_BV, stays_BV)
    # in the vocabulary's order, not by size: near ties that swap places must not swap tokens
    mass_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = (uniform_B * mass_BV[:, -1])[:, None]
    tokens_B = torch.searchsorted(mass_BV, target_B1, right=True)[:, 0]
    tokens_B = torch.where(greedy_B, logprobs_BV.argmax(-1), tokens_B)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


class EmbeddedEngine:
    """Implements `Engine`; work happens inside `poll`."""

    def __init__(self, model: Any, slots: int = 128, version: int = 0) -> None:
        if slots < 1:
            raise UsageError(f"rollout.slots: at least 1 is needed (got {slots})")
        if any(kind != "full_attention" for kind in getattr(model.config, "layer_types", None) or []):
            raise UsageError("embedded engine: models with sliding-window layers are not supported; use SGLang")
        whole_products()
        self._model = model.eval()
        attend_by_group(model)
        self._head = model.get_output_embeddings()
        self._device = self._head.weight.device
        self._weights = HFWeights(model)
        self._slots = slots
        self.positions = int(model.config.max_position_embeddings)
        self._cache = SlotCache(slots)
        self._running: list[_Row] = []
        self._waiting: list[_Row] = []
        self._done: list[Finished] = []
        self._ids: set[str] = set()
        self._version, self._next_version = version, version
        self._updating = False
        self._arrivals = 0
        self.steps = 0

    @classmethod
    def from_folder(cls, folder: Path | str, slots: int = 128, device: str = "cpu", dtype: str = "float32") -> Any:
        """With the weights of an HF folder or hub id."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a bar for each model of a run that is evaluated
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{folder}: not a model that transformers can load ({str(error).splitlines()[0]})"
            ) from None
        return cls(model.to(device), slots)

    @classmethod
    def from_config(cls, config: Any, slots: int = 128, device: str = "cpu", dtype: str = "float32") -> Any:
        """Without weights yet: nothing is sampled before a first whole update."""
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device), slots, -1)

    @property
    def version(self) -> int:
        return -1 if self._updating else self._version

    @property
    def deterministic(self) -> bool:
        return True

    def clock(self) -> float:
        return time.monotonic()

    def health(self) -> Health:
        return Health(self.version >= 0, len(self._running), len(self._waiting), self.version, self.steps)

    def close(self) -> None:
        self._running, self._waiting = [], []
        self._cache = SlotCache(self._slots)

    def free_slots(self) -> int:
        return max(0, self._slots - len(self._running) - len(self._waiting))

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.id in self._ids:
                raise ValueError(f"request {request.id} is already in flight")
            if len(request.prompt) + request.max_tokens > self.positions:
                raise UsageError(
                    f"prompt of {len(request.prompt)} + response of {request.max_tokens} tokens exceeds the model's "
                    f"{self.positions} positions: lower data.max_prompt_tokens or rollout.max_response_tokens"
                )
            self._ids.add(request.id)
            self._waiting.append(_Row(request, self._arrivals))
            self._arrivals += 1

    def poll(self, timeout: float) -> list[Finished]:
        end = time.monotonic() + timeout
        while not self._done and not self._updating and (self._running or self._waiting):
            self.step()
            if time.monotonic() > end:
                break
        done, self._done = self._done, []
        return done

    @torch.inference_mode()
    def abort(self, ids: Iterable[str]) -> None:
        for request_id in [i for i in ids if i in self._ids]:
            waiting = [row for row in self._waiting if row.request.id == request_id]
            if waiting:
                self._waiting.remove(waiting[0])
                self._finish(waiting[0], "abort")
                continue
            slot = next(i for i, row in enumerate(self._running) if row.request.id == request_id)
            self._finish(self._leave(slot), "abort")

    def begin_update(self, version: int) -> None:
        """What is running goes back to waiting, and is prefilled again under the new weights."""
        self._updating, self._next_version = True, version
        self._waiting += self._running
        self._running = []
        self._weights.begin()

    def update(self, bucket: Mapping[str, torch.Tensor]) -> None:
        if not self._updating:
            raise RunError("weights came outside begin_update ... end_update")
        self._weights.load(bucket)

    def end_update(self) -> None:
        self._weights.end()
        self._updating, self._version = False, self._next_version

    def checksums(self) -> dict[str, str]:
        """Of every weight that it holds, by its Hugging Face name (fingerprints.fingerprint)."""
        return self._weights.checksums()

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every row that runs, after waiting rows have taken the free slots."""
        if self.version < 0:
            raise RunError("the embedded engine has no whole set of weights: load them before sampling")
        self.steps += 1
        if self._running:
            self._decode()
        if self._waiting and len(self._running) < self._slots:
            self._enter()

    def _enter(self) -> None:
        self._waiting.sort(key=lambda row: (row.request.priority, row.arrival))
        entering: list[_Row] = []
        contexts: dict[tuple[int, ...], int] = {}
        longest = 0
        for row in self._waiting[: self._slots - len(self._running)]:
            context = row.context()
            longest = max(longest, len(context))
            if entering and (len(contexts) + (context not in contexts)) * longest > PREFILL_TOKENS:
                break
            contexts.setdefault(context, len(contexts))
            entering.append(row)
        del self._waiting[: len(entering)]
        self._cache.reserve(max(len(row.request.prompt) + row.request.max_tokens for row in entering))

        unique = list(contexts)
        padded = max(map(len, unique))
        ids_UP = torch.tensor([c + (0,) * (padded - len(c)) for c in unique], device=self._device)
        unique_R = torch.tensor([contexts[row.context()] for row in entering], device=self._device)
        first = len(self._running)
        slots_R = torch.arange(first, first + len(entering), device=self._device)
        hidden_UPH = self._model.base_model(
            input_ids=ids_UP,
            # padding comes after the prompt, where causal attention does not look
            attention_mask=torch.ones(padded, padded, dtype=torch.bool, device=self._device).tril()[None, None],
            position_ids=torch.arange(padded, device=self._device)[None],
            past_key_values=Prefill(self._cache, slots_R, unique_R),
            use_cache=True,
        ).last_hidden_state
        last_U = torch.tensor([len(c) - 1 for c in unique], device=self._device)
        hidden_UH = hidden_UPH[torch.arange(len(unique), device=self._device), last_U]
        self._running += entering
        self._append(first, self._head(hidden_UH)[unique_R])

    def _decode(self) -> None:
        rows = self._running
        lengths = [len(row.request.prompt) + len(row.tokens) for row in rows]
        positions_B = torch.tensor(lengths, device=self._device) - 1
        width = max(lengths)
        seen_B11W = (torch.arange(width, device=self._device) <= positions_B[:, None])[:, None, None, :]
        ids_B1 = torch.tensor([[row.tokens[-1]] for row in rows], device=self._device)
        hidden_B1H = self._model.base_model(
            input_ids=ids_B1,
            position_ids=positions_B[:, None],
            attention_mask=seen_B11W,
            past_key_values=Decode(self._cache, positions_B, width),
            use_cache=True,
        ).last_hidden_state
        self._append(0, self._head(hidden_B1H[:, 0]))

    def _append(self, first: int, logits_BV: torch.Tensor) -> None:
        """One token drawn for each of the rows from `first` on; rows that are complete leave."""
        rows = self._running[first:]
        requests = [row.request for row in rows]
        noise = uniforms([r.seed for r in requests], [len(row.tokens) for row in rows])
        tokens_B, logprobs_B = draw(
            logits_BV,
            torch.tensor([r.temperature for r in requests], device=self._device),
            torch.tensor([r.top_p for r in requests], device=self._device),
            torch.from_numpy(noise).to(self._device),
        )
        complete: list[tuple[int, FinishReason]] = []
        for slot, (row, token, logprob) in enumerate(zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True)):
            if not row.spans or row.spans[-1][0] != self._version:
                row.spans.append((self._version, len(row.tokens)))
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in row.request.stop:
                complete.append((first + slot, "stop"))
            elif len(row.tokens) == row.request.max_tokens:
                complete.append((first + slot, "length"))
        finished = [self._running[slot] for slot, _ in complete]
        for slot, _ in reversed(complete):  # from the end, so that no row still to leave is moved
            self._leave(slot)
        for row, (_, finish) in zip(finished, complete, strict=True):
            self._finish(row, finish)

    def _leave(self, slot: int) -> _Row:
        row, last = self._running[slot], len(self._running) - 1
        if slot != last:
            self._running[slot] = self._running[last]
            moved = self._running[slot]
            self._cache.move(last, slot, len(moved.request.prompt) + len(moved.tokens))
        self._running.pop()
        return row

    def _finish(self, row: _Row, finish: FinishReason) -> None:
        self._ids.discard(row.request.id)
        self._done.append(row.finished(finish))
