"""Figures that others have published, beside what the planner says. Nothing in the planner is fitted to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lens_megatron.mcore.layout import ParallelConfig
from lens_megatron.model_spec import load_model_config
from lens_megatron.planning.gpus import assumed_rates, find_gpu
from lens_megatron.planning.search import search
from lens_megatron.planning.syncs import sync_seconds
from lens_megatron.planning.work import ASSUMED_RESCUED, Workload

# arXiv 2601.21244, Table 5: mean step seconds on 8 x A800 with verl, 128 prompts, responses of at most 4,096 tokens.
TABLE_5: dict[str, dict[str, float]] = {
    "qwen2.5-3b": {"grpo": 214, "grpo_extended": 384, "lens": 333},
    "qwen2.5-7b": {"grpo": 344, "grpo_extended": 523, "lens": 463},
    "qwen3-4b-base": {"grpo": 331, "grpo_extended": 524, "lens": 475},
    "qwen3-8b-base": {"grpo": 477, "grpo_extended": 802, "lens": 726},
    "llama-3.2-3b-instruct": {"grpo": 229, "grpo_extended": 338, "lens": 291},
}
# The paper does not print response lengths: three guesses of the mean.
RESPONSES = (512.0, 1024.0, 2048.0)


@dataclass(frozen=True)
class WeightSync:
    """Seconds of a whole weight sync as others report them (least, most)."""

    model: str
    nodes: int  # assumed: the reports name none
    pp: int
    least: float
    most: float


SYNCS = (
    WeightSync("qwen3-8b-base", 2, 1, 10.0, 39.0),
    WeightSync("qwen3-30b-a3b", 2, 1, 4.4, 15.8),
    WeightSync("qwen3-235b-a22b", 32, 4, 23.7, 58.6),
)


def table_5_workload(algorithm: str, response_tokens: float) -> Workload:
    lens = algorithm == "lens"
    return Workload(
        n=16 if algorithm == "grpo_extended" else 8,
        response_tokens=response_tokens,
        rescued=ASSUMED_RESCUED if lens else 0.0,
        schedule="after_group",
        scores_prompts=lens,
    )


@lru_cache
def predicted_step(model: str, algorithm: str, response_tokens: float) -> float:
    """Seconds, in the best layout found with engine and trainer on the same eight GPUs, as verl has them."""
    gpu = find_gpu("a800")
    work = table_5_workload(algorithm, response_tokens)
    found = search(load_model_config(model).spec, gpu, assumed_rates(gpu), work, 8, ("colocated",), most=1)
    return found.best[0].step_seconds


def predicted_sync(published: WeightSync) -> float:
    rates = assumed_rates(find_gpu("h100"))
    spec = load_model_config(published.model).spec
    return sync_seconds(spec, ParallelConfig(pp=published.pp), rates, published.nodes, "broadcast")
