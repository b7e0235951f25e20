"""The root of the recipe language: every section, and the checks that need more than one of them."""

from math import lcm
from typing import Any

from pydantic import Field, ValidationInfo, model_validator

from lighthouse_core.attention.dense import BACKENDS
from lighthouse_core.attention.heads import nearest_shares, shares_heads
from lighthouse_core.config.checkpoint import CheckpointSection
from lighthouse_core.config.data import DataSection
from lighthouse_core.config.lengths import with_steps
from lighthouse_core.config.lighthouse import LighthouseSection
from lighthouse_core.config.metrics import MetricsSection
from lighthouse_core.config.model import ModelSection
from lighthouse_core.config.optimizer import OptimizerSection
from lighthouse_core.config.output import OutputSection
from lighthouse_core.config.parallel import ParallelSection
from lighthouse_core.config.phases import Phase, phase_at
from lighthouse_core.config.positions import KeyPath, spelled
from lighthouse_core.config.recover import RecoverSection
from lighthouse_core.config.schedule import ScheduleSection
from lighthouse_core.config.section import MOST_TOKENS, Section, conflict
from lighthouse_core.config.training import TrainingSection

# Of pydantic's context: whether the recipe is to be trained. See `load_recipe`.
TRAINS = "trains"
# 256 bytes, BOS and EOS.
_BYTES_VOCABULARY = 258


class Recipe(Section):
    """A whole recipe. `titan` holds torchtitan's own tables as given; lighthouse_core.titan checks their names."""

    model: ModelSection
    lighthouse: LighthouseSection = Field(default_factory=LighthouseSection)
    data: DataSection = Field(default_factory=DataSection)
    training: TrainingSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    recover: RecoverSection = Field(default_factory=RecoverSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    metrics: MetricsSection = Field(default_factory=MetricsSection)
    output: OutputSection = Field(default_factory=OutputSection)
    titan: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Of stage 1, first to last; of a dense baseline one that is dense."""
        # Not cached: `model_copy` would take the phases along into a recipe of other steps.
        return self.lighthouse.resolved(self.training.steps, self.model.dense_layers)

    def other_rope_theta(self, step: int) -> float | None:
        """The base of RoPE's frequencies in a step of stage 1; None where that is the model's."""
        theta = phase_at(self.phases, step).rope_theta
        return None if theta == self.model.rope_theta else theta

    @property
    def sparse_phases(self) -> list[Phase]:
        """The phases that are not dense."""
        return [phase for phase in self.phases if not phase.dense]

    @property
    def alignment(self) -> int | None:
        """Tokens of which every document takes a whole multiple, in both stages; None with `data.packing` "concat"."""
        if self.data.packing == "concat":
            return None
        return self.data.align or self._needed_alignment

    @property
    def _needed_alignment(self) -> int:
        """What every phase can take: the data are the same in all of them."""
        return lcm(*(phase.attention.alignment for phase in self.sparse_phases))

    @model_validator(mode="before")
    @classmethod
    def _in_steps(cls, table: Any) -> Any:
        return with_steps(table)

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> "Recipe":
        if self.data.tokenizer == "bytes" and self.model.vocab_size < _BYTES_VOCABULARY:
            raise conflict(
                "model.vocab_size",
                f"model.vocab_size must be at least {_BYTES_VOCABULARY} for the bytes tokenizer, "
                f"not {self.model.vocab_size}",
            )
        if self.metrics.validation_every and not self.data.validation:
            raise conflict("metrics.validation_every", "metrics.validation_every needs data.validation above 0")
        if self.metrics.measure_dense and not self.lighthouse.enabled:
            raise conflict("metrics.measure_dense", "metrics.measure_dense is for a run with lighthouse.enabled")
        self._check_schedule()
        if (last := max(self.checkpoint.also, default=0)) > self.training.steps + self.recover.steps:
            raise conflict("checkpoint.also", f"checkpoint.also has step {last}, which no stage comes to")
        self._check_context()
        if self.lighthouse.enabled:
            self._check_phases()
            if self.parallel.context > 1 and any(map(self.lighthouse.budget.acts_in, self.phases)):
                raise conflict(
                    "lighthouse.budget.every",
                    "lighthouse.budget.every is not for shared sequences: write lighthouse.budget.every = 0, or "
                    "parallel.context = 1",
                )
        if self.data.packing == "documents" and (info.context or {}).get(TRAINS, True):
            self._check_documents()
        return self

    def _check_schedule(self) -> None:
        schedule = self.schedule
        after = self.training.steps - schedule.warmup_steps
        if schedule.decay_steps and schedule.decay_steps > after:
            most = f"at most {after}" if after > 0 else "0"
            raise conflict(
                "schedule.decay_steps",
                "warm-up and schedule.decay_steps are longer than training.steps: after the warm-up of "
                f"{schedule.warmup_steps} of {self.training.steps} steps, "
                f"schedule.decay_steps ({schedule.decay_steps}) can be {most}",
            )
        if schedule.ends_at_zero and self.lighthouse.enabled:
            raise conflict(
                "schedule.decay_steps",
                "schedule.decay_steps takes the rate of stage 1 to 0, which leaves none for the recovery: write "
                "schedule.min_lr_factor = 0.1, or leave the decay out of [schedule] and set recover.decay",
            )
        for key in ("decay", "min_lr_factor"):
            if not schedule.decay_steps and getattr(schedule, key) != ScheduleSection.model_fields[key].default:
                every = f"; {after} are all steps after the warm-up" if after > 0 else ""
                raise conflict(f"schedule.{key}", f"schedule.{key} needs schedule.decay_steps above 0{every}")

    def _check_context(self) -> None:
        context, model = self.parallel.context, self.model
        if self.training.seq_len % context:
            raise conflict(
                "parallel.context",
                f"parallel.context ({context}) must divide training.seq_len ({self.training.seq_len})",
            )
        if not shares_heads(model.heads, model.kv_heads, context):
            near = " or ".join(map(str, nearest_shares(model.heads, model.kv_heads, context)))
            raise conflict(
                "parallel.context",
                f"parallel.context ({context}) must divide model.heads ({model.heads}), and divide or be a multiple of "
                f"model.kv_heads ({model.kv_heads}); the nearest is {near}",
            )

    def _check_documents(self) -> None:
        """Of documents that are kept apart in training: what only reads the data asks none of this."""
        for phase in self.phases:
            attention = phase.attention
            if not phase.dense and "documents" not in attention.rule.can(attention):
                key, said = self._key(phase, "method")
                without = "" if attention.window else f" without a {self._key(phase, 'window')[1]}"
                raise conflict(
                    "data.packing" if not self.lighthouse.phases else key,
                    f'data.packing "documents", the default, is not for {said} "{attention.method}"{without}: '
                    'write data.packing = "concat", or choose pyramid with a lighthouse.window, chunked, sliding or '
                    "blocks",
                )
            self._check_packs(attention.dense_backend, *self._key(phase, "dense_backend"))
        self._check_packs(self.lighthouse.dense_backend, *["lighthouse.dense_backend"] * 2)
        tokens, align = self.training.seq_len, self.alignment or 1
        if align % self._needed_alignment:
            raise conflict(
                "data.align",
                f"data.align ({align}) must be a multiple of the method's {self._needed_alignment} tokens",
            )
        if tokens % align:
            near = [n for n in (tokens // align * align, tokens // align * align + align) if 0 < n <= MOST_TOKENS]
            raise conflict(
                "training.seq_len",
                f"training.seq_len ({tokens}) must be a multiple of the {align} tokens that documents are padded to"
                + f"; the nearest is {' or '.join(map(str, near))}" * bool(near),
            )

    @staticmethod
    def _check_packs(backend: str, key: str | KeyPath, said: str) -> None:
        if not BACKENDS[backend].documents:
            others = ", ".join(name for name, facts in BACKENDS.items() if facts.documents)
            raise conflict(
                key,
                f'{said} "{backend}" is not for data.packing "documents": write '
                f'data.packing = "concat", or choose one of {others}',
            )

    def _key(self, phase: Phase, name: str) -> tuple[KeyPath, str]:
        """A key that decides a phase: its place for `conflict`, and as sentences name it."""
        path: KeyPath = "lighthouse", name
        if self.lighthouse.phases:
            path = "lighthouse", "phases", phase.number - 1, name
        return path, spelled(path)

    def _check_phases(self) -> None:
        """Every phase has steps, and attends to less than dense attention unless it is meant to be dense."""
        tokens, steps, phases = self.training.seq_len, self.training.steps, self.phases
        if len(phases) > steps:
            raise conflict(
                "lighthouse.phases", f"lighthouse.phases are {len(phases)}, more than training.steps ({steps})"
            )
        if all(phase.dense for phase in phases):
            raise conflict("lighthouse.phases", "every phase is dense: write lighthouse.enabled = false without phases")
        for phase in phases:
            if phase.end < phase.begin:
                key, said = self._key(phase, "share")
                raise conflict(key, f"{said} is too small: the phase has none of the {steps} steps of stage 1")
            if phase.growth and phase.end == phase.begin:
                key, said = self._key(phase, "window_end")
                raise conflict(key, f"{said} is for a phase of two steps or more, and this one has one")
            self._check_dense_layers(phase)
            self._check_rope_theta(phase)
            if not phase.dense:
                self._check_that_it_saves(phase, tokens)

    def _check_dense_layers(self, phase: Phase) -> None:
        key, said = self._key(phase, "dense_layers")
        for layer in phase.dense_layers:
            if not 0 <= layer < self.model.layers:
                most = self.model.layers - 1
                raise conflict(key, f"{said}: layer {layer} is outside 0..{most} (model.layers)")
            if phase.dense_layers.count(layer) > 1:
                raise conflict(key, f"{said} lists layer {layer} more than once")

    def _check_rope_theta(self, phase: Phase) -> None:
        key, said = self._key(phase, "rope_theta")
        if phase.number == len(self.lighthouse.phases) and phase.rope_theta not in (None, self.model.rope_theta):
            raise conflict(
                key,
                f"{said} ({phase.rope_theta:g}) is not model.rope_theta ({self.model.rope_theta:g}), with which "
                "training goes on after the last phase",
            )
        yarn = self.model.rope_scaling is not None and self.model.rope_scaling.rope_type == "yarn"
        if yarn and phase.rope_theta is not None and phase.rope_theta <= 1:
            raise conflict(key, f"{said} must be above 1 for YaRN, not {phase.rope_theta:g}")

    def _check_that_it_saves(self, phase: Phase, tokens: int) -> None:
        cfg = phase.attention
        # A window may grow to the whole sequence.
        if cfg.window >= tokens + bool(phase.growth):
            key, said = self._key(phase, "window_end" if phase.growth else "window")
            relation = "above" if phase.growth else "not below"
            raise conflict(key, f"{said} ({cfg.window}) is {relation} training.seq_len ({tokens})")
        if cfg.pools and (call := cfg.geometry(tokens)).dense:
            key, said = self._key(phase, "topk")
            raise conflict(
                key,
                f"the gathered sequence (S = {call.selected_length}) is not shorter than training.seq_len "
                f"({tokens}); use a smaller {said} or more {self._key(phase, 'levels')[1]}",
            )
