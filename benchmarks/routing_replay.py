"""What routing replay changes and costs: python -m benchmarks.routing_replay --out F.md

1. A tiny mixture in bf16 is trained with a real SGLang server on this machine's CPU, with and without rollout.routing_replay in
   turns: how far log-probs of sampled tokens are apart between trainer and engine.
2. What the rollout process spends on an answer with the experts of Qwen3-30B-A3B (48 layers x 8 of 128), made up here.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._machine import described

STEPS, TURNS = 3, 3
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
PROMPT, RESPONSE, LAYERS, EXPERTS, TOPK = 200, 2000, 48, 128, 8


@contextlib.contextmanager
def server_that_tells(model: Path, logs: Path, dtype: str) -> Iterator[Any]:
    from tests.sglang.server import cpu_config, servers, unpinned_command

    config = cpu_config(args={"dtype": dtype}, command=unpinned_command())
    with servers(model, logs, config=config, enable_return_routed_experts=True) as (server,):
        yield server


def tree_for(task: Path, run_dir: Path, server: Any, replay: bool, **changes: Any) -> dict[str, Any]:
    """Weights stand nearly still: what differs is how trainer and engine compute."""
    from tests.loop.runs import run_tree

    key = run_dir.with_suffix(".key")
    key.write_text(str(server.api_key))
    tree = run_tree(task, run_dir, steps=STEPS, precision="bf16", optimizer={"lr": 1e-6}, **changes)
    tree["rollout"] |= {
        "engine": "sglang",
        "max_response_tokens": 64,
        "server": {"urls": [server.url], "api_key_file": str(key)},
        "sync": {"transport": "tensor", "fallback": "none", "timeout_s": 60.0},
        "routing_replay": replay,
    }
    tree["guards"] = {"on_logprob_diff": "report"}
    return tree


def differences(folder: Path) -> dict[bool, list[dict[str, float]]]:
    from tests.loop.runs import train, write_task

    task = write_task(folder / "task", **MIXTURE)
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with server_that_tells(task / "model", folder / "logs", "bfloat16") as server:
        for turn in range(TURNS):
            for replay, lines in found.items():
                place = folder / f"{turn}_{replay}"
                place.mkdir()
                lines += train(place, tree_for(task, place / "run", server, replay, parallel={"tp": 1}))
    return found


def made_up_answer(experts: np.ndarray[Any, Any] | None) -> bytes:
    meta: dict[str, Any] = {
        "id": "a",
        "finish_reason": {"type": "length"},
        "prompt_tokens": PROMPT,
        "completion_tokens": RESPONSE,
        "weight_version": "1",
        "output_token_logprobs": [[-0.123456789, 1000 + i, None] for i in range(RESPONSE)],
    }
    if experts is not None:
        meta["routed_experts"] = base64.b64encode(experts.astype(np.int32).tobytes()).decode()
    return json.dumps({"output_ids": [1000 + i for i in range(RESPONSE)], "meta_info": meta}).encode()


def costs() -> dict[str, dict[str, float]]:
    """Of one rollout: what is read, the seconds to read and check it, and to hand it to the trainer."""
    from lens_megatron.rollout.sglang_schema import parse_generation
    from lens_megatron.routed_experts import Routers

    routers = Routers(LAYERS, EXPERTS, TOPK)
    random = np.random.default_rng(0).random(((PROMPT + RESPONSE - 1) * LAYERS, EXPERTS), dtype=np.float32)
    experts = np.argpartition(random, TOPK, axis=1)[:, :TOPK].reshape(-1, LAYERS * TOPK)
    result = {}
    for name, told in (("without", None), ("with", experts)):
        answer = made_up_answer(told)
        read, handed, size = [], [], 0
        for _ in range(15):
            began = time.perf_counter()
            parsed = parse_generation(
                json.loads(answer), "a", range(PROMPT), RESPONSE, (), False, None if told is None else routers
            )
            read.append(time.perf_counter() - began)
            began = time.perf_counter()
            size = len(pickled := pickle.dumps(parsed, protocol=pickle.HIGHEST_PROTOCOL))
            pickle.loads(pickled)
            handed.append(time.perf_counter() - began)
        result[name] = {
            "answer_mb": len(answer) / 1e6,
            "read_ms": 1e3 * statistics.median(read),
            "rollout_mb": size / 1e6,
            "pickled_ms": 1e3 * statistics.median(handed),
        }
    return result


def report(found: dict[bool, list[dict[str, float]]], cost: dict[str, dict[str, float]]) -> str:
    rows = []
    for replay, lines in found.items():
        mean = statistics.fmean(line["logprob_diff"] for line in lines)
        largest = [line["logprob_diff_max"] for line in lines]
        rows.append(
            f"| {'with' if replay else 'without'} | {mean:.4f} | {statistics.median(largest):.2f} | {max(largest):.2f} |"
        )
    shape = (
        f"{MIXTURE['num_hidden_layers']} layers, {MIXTURE['num_experts_per_tok']} of {MIXTURE['num_experts']} experts"
    )
    parts = [
        "# Routing replay",
        "",
        f"`python -m benchmarks.routing_replay`, {described()}",
        "",
        "## Trainer and engine apart",
        "",
        f"Log-probs of sampled tokens, trainer and SGLang (the real server on CPU), both in bf16: {shape}, random weights;",
        f"{len(found[True])} steps each, in turns, of 16 rollouts and their rescues, up to 64 tokens.",
        "",
        "| routing replay | mean difference | largest of a step, median | largest of all |",
        "|---|---|---|---|",
        *rows,
        "",
        "## What it costs the rollout process",
        "",
        f"One rollout of {PROMPT} + {RESPONSE} tokens, {LAYERS} layers x {TOPK} experts (Qwen3-30B-A3B's), made up; medians",
        "of 15.",
        "",
        "| | answer, MB | read and checked, ms | to the trainer, MB | pickled and back, ms |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {c['answer_mb']:.2f} | {c['read_ms']:.1f} | {c['rollout_mb']:.2f} | {c['pickled_ms']:.1f} |"
            for name, c in cost.items()
        ),
        "",
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cost = costs()
    with tempfile.TemporaryDirectory() as folder:
        text = report(differences(Path(folder)), cost)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
