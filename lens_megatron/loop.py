"""The training loop: one step of any algorithm, one verb a phase. Every rank runs it."""

from __future__ import annotations

from lens_megatron.config import RunConfig
from lens_megatron.stopping import Order
from lens_megatron.trainer import Trainer


def train(config: RunConfig, trainer: Trainer) -> Order | None:
    """What ended the run before its last step, if anything did."""
    order: Order | None = None
    with trainer.starting("give the engine weights"):
        trainer.sync_weights(version=trainer.first_step)
    with trainer.progress:
        trainer.benchmark_first_policy()
        for step in range(trainer.first_step, config.steps):
            trainer.begin_step(step)

            while prompts := trainer.next_prompts():
                with trainer.phase("score"):  # before generation, of every prompt: x' is known when a rollout fails
                    signals = trainer.score_prompts(prompts)
                with trainer.phase("generate"):  # originals, rescues and rewards, overlapped
                    trainer.roll_out(prompts, signals)
            groups = trainer.training_groups()
            trainer.start_rollouts_ahead(step + 1)  # with staleness 1 the next batch is generated while this one trains

            with trainer.phase("logprobs"):  # pi_old under x_roll, the reference under x
                evaluated = trainer.evaluate(groups)
            with trainer.phase("train"):
                metrics = trainer.update(evaluated)
            with trainer.phase("generate"):  # it ends with the weights that it began with
                trainer.await_rollouts_ahead()
            with trainer.phase("sync"):
                trainer.sync_weights(version=step + 1)
            metrics |= trainer.benchmark(step + 1)  # held-out problems, when due
            # the step's files before its checkpoint: a resumed run rewinds what it cannot vouch for, and misses nothing
            trainer.finish_step(evaluated, metrics)
            order = trainer.told_to_end()
            with trainer.phase("save"):
                trainer.save(step + 1, last=order is not None)
            if order is not None:
                break
        trainer.finish()
    return order
