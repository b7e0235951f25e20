"""[metrics]: what is measured, and where it goes besides metrics.jsonl."""

from lighthouse_core.config.section import NonNegative, Positive, Section


class MetricsSection(Section):
    """`every` and `validation_every` in steps; validation_every 0 validates at the end of a stage only.

    `measure_dense` times dense steps of the same model before the first step, for the run's ledger.
    """

    every: Positive = 10
    tensorboard: bool = True
    wandb: bool = False
    validation_every: NonNegative = 0
    validation_batches: Positive = 4
    measure_dense: bool = False
