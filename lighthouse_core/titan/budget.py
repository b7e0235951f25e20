"""[lighthouse.budget] in training: measures what each KV head attends to, and gives the heads their blocks.

The queries and keys that are measured are those of the training step itself: each block's input, of the step's first
micro-batch, is projected once more. So there is no second pass through the model, no other data and no random number,
and the graph of the step is as without a measurement. The hooks are on the blocks as torch.compile and FSDP have
wrapped them: outside of what is compiled, while the weights are whole.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.config.budget import BudgetSection, Measurement
from lighthouse_core.config.phases import Phase, phase_at
from lighthouse_core.errors import PatchError
from lighthouse_core.models.beyond import shares_of_block
from lighthouse_core.models.decoder import Block, Decoder
from lighthouse_core.weights.checkpoint import checked_measurement

logger = logging.getLogger(__name__)


class Budgets:
    """The same on all processes, which add up what they measure. A checkpoint holds the last measurement, from which
    the numbers of blocks follow.

    Args:
        section: of the recipe.
        phases: of stage 1; () for a dense stage, which has no budgets.
        shape: layers and KV heads.
        device: of the model.
    """

    def __init__(self, section: BudgetSection, phases: tuple[Phase, ...], shape: tuple[int, int], device: torch.device):
        self.section, self.phases, self.device = section, phases, device
        self.last = Measurement.none(*shape)
        # Of the step in progress, by layer; None where it measures nothing.
        self._found: dict[int, Tensor] | None = None
        # Of one phase and one measurement, on the device.
        self._blocks: tuple[Phase, Measurement, Tensor] | None = None

    @property
    def on(self) -> bool:
        """Whether any phase has budgets."""
        return any(map(self.section.acts_in, self.phases))

    def _phase(self, step: int) -> Phase | None:
        return phase_at(self.phases, step) if self.phases else None

    def watch(self, model: Decoder) -> None:
        """Look at what the blocks of this model take; called once, after torchtitan has wrapped them."""
        plain = [module for module in model.modules() if isinstance(module, Block)]
        for number, (wrapped, block) in enumerate(zip(model.layers.values(), plain, strict=True)):
            wrapped.register_forward_pre_hook(partial(self._look, number, block))

    def _look(self, number: int, block: Block, wrapped: nn.Module, inputs: tuple[Any, ...]) -> None:
        # The other micro-batches of the step are not looked at.
        context = inputs[2]
        if self._found is not None and number not in self._found and not context.dense:
            how = {"window": context.settings.window, "queries": self.section.queries}
            self._found[number] = shares_of_block(block, *inputs, **how)

    def within(self, context: AttentionContext, step: int) -> AttentionContext:
        """The context of a batch of a step, with the budgets of the step."""
        phase = self._phase(step)
        if phase is None or not self.section.acts_in(phase):
            return context
        if self._blocks is None or self._blocks[0] != phase or self._blocks[1] is not self.last:
            numbers = self.section.blocks(self.phases, step, self.last)
            # A new tensor: with checkpointing the backward pass of a step reads the old one.
            self._blocks = phase, self.last, torch.tensor(numbers, dtype=torch.int32, device=self.device)
        return replace(context, budgets=self._blocks[2])

    def begin(self, step: int) -> None:
        """Begin a step of training."""
        self._found = {} if self.section.due(self._phase(step), step) else None

    def end(self, step: int) -> dict[str, float] | None:
        """End it, on all processes. The budgets of a measurement hold from the next step on.

        Returns:
            What is logged of a measurement; None where there was none.

        Raises:
            PatchError: a layer that was to be measured was not.
        """
        found, self._found = self._found, None
        phase = self._phase(step)
        if found is None or phase is None:
            return None
        layers = [layer for layer in range(len(self.last.shares)) if layer not in phase.dense_layers]
        if sorted(found) != layers:
            raise PatchError(
                f"step {step} was to measure the KV heads of layers {layers}, and measured {sorted(found)}"
            )
        if not layers:
            return None
        shares = torch.stack([found[layer].double() for layer in layers])
        torch.distributed.all_reduce(shares)
        shares /= torch.distributed.get_world_size()
        if not bool(shares.isfinite().all()):
            logger.warning("step %d: the attention scores are not finite, and the KV heads keep their blocks", step)
            return None
        rows = dict(zip(layers, shares.tolist(), strict=True))
        none = [0.0] * shares.shape[1]
        self.last = Measurement(step, [rows.get(layer, none) for layer in range(len(self.last.shares))])
        blocks = self.section.blocks(self.phases, step, self.last)
        numbers = [number for layer in layers for number in blocks[layer]]
        choosing = sum(number > 0 for number in numbers)
        mean, most = float(shares.mean()), max(numbers)
        logger.info(
            "step %d: %.3g of the attention lies beyond the window; %d of %d KV heads choose blocks, at most %d each",
            *(step, mean, choosing, len(numbers), most),
        )
        return {"budget_share": mean, "budget_heads": choosing, "budget_blocks": most}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return self.last._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the measurement of a checkpoint.

        Raises:
            CheckpointError: it has numbers that no training leaves.
        """
        self.last = checked_measurement(Measurement(**state))
