"""What share of each KV head's attention lies beyond its window on held-out text, and how many blocks it chooses."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lighthouse_core.attention.beyond import measured_rows
from lighthouse_core.config.phases import phase_at
from lighthouse_core.data.overlap import own_split
from lighthouse_core.evaluate.load import load_checkpoint
from lighthouse_core.evaluate.report import held_out
from lighthouse_core.evaluate.subject import fitting, looking
from lighthouse_core.models.beyond import shares_of_block
from lighthouse_core.models.decoder import Block, lighthouse_layers
from lighthouse_core.runs.run import Run
from lighthouse_core.weights.checkpoint import Source, load_measurement


@dataclass(frozen=True)
class HeadsView:
    """What the KV heads of one checkpoint attend to. Lists are [layer][KV head].

    Attributes:
        run, step: name of the run, and step of the checkpoint.
        method, window: settings of the call; the window in tokens.
        tokens, sequences: N, and how many sequences.
        queries: rows of the softmax that were measured in each sequence.
        threshold: of [lighthouse.budget]; None where every head has as many blocks.
        measured_step: of the training's own last measurement, from which `blocks` follow; None without one.
        layers, kv_heads: numbers of the layers that are not dense, and how many KV heads each has.
        beyond: share of the attention beyond the window, 0 to 1, a mean over the sequences.
        blocks: how many each head chooses.
        notes: whether the text may have been trained on.
    """

    run: str
    step: int
    method: str
    window: int
    tokens: int
    sequences: int
    queries: int
    threshold: float | None
    measured_step: int | None
    layers: list[int]
    kv_heads: int
    beyond: list[list[float]]
    blocks: list[list[int]]
    notes: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def columns(self) -> tuple[str, ...]:
        """Names of what `rows` holds."""
        return ("layer", *(f"head {head}" for head in range(self.kv_heads)))

    def rows(self) -> list[tuple[str, ...]]:
        """A row a layer: its number, and then of each head the share and the number of blocks."""
        return [
            (str(layer), *(f"{share:.1%}, {blocks}" for share, blocks in zip(*heads, strict=True)))
            for layer, *heads in zip(self.layers, self.beyond, self.blocks, strict=True)
        ]


@torch.no_grad()
def heads_view(run: Run, step: int, sequences: int, device: torch.device | None) -> HeadsView:
    """Look at what the heads of a checkpoint attend to, in a phase whose method chooses blocks for each KV head.

    Args:
        run, step: of the checkpoint.
        sequences: how many, of the length of training; one at a time goes through the model.
        device: where it runs; a GPU if there is one.

    Raises:
        CheckpointError: it is damaged.
        UserError: there is too little held-out text, or the memory is too small.
    """
    recipe, notes = run.recipe, {}
    phase, budget = phase_at(recipe.phases, step), recipe.lighthouse.budget
    subject, _ = load_checkpoint(run.checkpoint_dir(step), attention="trained", device=device)
    assert subject.model is not None
    # As many as `evaluate` reads at least, for the same text.
    text = held_out(recipe.data, subject, recipe.training.seq_len, max(sequences, 2), recipe.alignment)[:sequences]
    if (split := own_split(recipe, run.ledger["stages"][0].get("data"))).unknown:
        notes["text"] = str(split)
    layers = list(lighthouse_layers(subject.model))
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def look(number: int, block: Block, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shares = shares_of_block(block, *inputs, window=phase.attention.window, queries=budget.queries)
        found[number].append(shares.double().cpu())

    blocks = [module for module in subject.model.modules() if isinstance(module, Block)]
    hooks = [blocks[number].register_forward_pre_hook(partial(look, number, blocks[number])) for number in layers]
    with looking(hooks), fitting(recipe.training.seq_len):
        for row, packed in text:
            subject.states(row, packed)
    last = load_measurement(Source(run, step))
    numbers = budget.blocks(recipe.phases, step, last)
    return HeadsView(
        run=run.name,
        step=step,
        method=phase.attention.method,
        window=phase.attention.window,
        tokens=recipe.training.seq_len,
        sequences=sequences,
        queries=len(measured_rows(recipe.training.seq_len, budget.queries)),
        threshold=budget.threshold if budget.every else None,
        measured_step=last.step if last.step and phase_at(recipe.phases, last.step) == phase else None,
        layers=layers,
        kv_heads=recipe.model.kv_heads,
        beyond=[torch.stack(found[layer]).mean(0).tolist() for layer in layers],
        blocks=[numbers[layer] for layer in layers],
        notes=notes,
    )
