"""[metrics]: what is measured, and where it goes besides metrics.jsonl."""

from lighthouse_core.config.section import NonNegative, Positive, Section


class MetricsSection(Section):
    """`every` and `validation_every` in steps; validation_every 0 validates at the end of a stage only."""

    every: Positive = 10
    tensorboard: bool = True
    wandb: bool = False
    validation_every: NonNegative = 0
    validation_batches: Positive = 4
