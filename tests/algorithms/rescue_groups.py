"""Groups written as lists of rewards."""

from __future__ import annotations

from collections.abc import Sequence

from lens_megatron.types import Group, Prompt, PurifiedPrompt, Rollout

X = (1, 10, 11, 12, 13, 2)
X_PRIME = (1, 10, 12, 13, 2)


def rollouts(prompt_id: str, tokens: tuple[int, ...], rewards: Sequence[float], purified: bool) -> tuple[Rollout, ...]:
    return tuple(
        Rollout(
            prompt_id=prompt_id,
            roll_tokens=tokens,
            response=(7,) * (index + 1),
            behaviour_logprobs=(-0.5,) * (index + 1),
            finish="stop",
            index=index,
            purified=purified,
            reward=float(reward),
        )
        for index, reward in enumerate(rewards)
    )


def group(
    rewards: Sequence[float], again: Sequence[float] = (), prompt_id: str = "p", resampled: bool = False
) -> Group:
    """Y with these rewards, and Y' with those of `again`: under x', or under x when resampled."""
    prompt = Prompt(prompt_id, X, (1, 5), "42")
    x_prime = PurifiedPrompt(prompt_id, X_PRIME, (2,)) if again and not resampled else None
    second = X if resampled else X_PRIME
    return Group(prompt, rollouts(prompt_id, X, rewards, False), x_prime, rollouts(prompt_id, second, again, True))


def binary(successes: int, m: int = 8) -> list[float]:
    """Successes neither first nor last, so that no test passes by position."""
    rewards = [0.0] * m
    for place in sorted(range(m), key=lambda index: (index * 5 + 3) % m)[:successes]:
        rewards[place] = 1.0
    return rewards
