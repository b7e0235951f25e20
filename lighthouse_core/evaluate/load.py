"""Models to evaluate: checkpoints of runs, and Hugging Face directories."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lighthouse_core import vml
from lighthouse_core.attention.call import check_backends
from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.context import AttentionContext, selection_keys
from lighthouse_core.attention.dense import BACKENDS
from lighthouse_core.attention.dense.call import documents_kernel
from lighthouse_core.attention.settings import BackendError
from lighthouse_core.config import Recipe
from lighthouse_core.config.phases import phase_at
from lighthouse_core.data.documents import Tokenizer
from lighthouse_core.data.tokenizer import build_tokenizer
from lighthouse_core.errors import DataError, UserError
from lighthouse_core.evaluate.directory import explained, load_model
from lighthouse_core.evaluate.subject import Subject, hidden_of_documents
from lighthouse_core.models.decoder import build_dense_model, use_dense, use_lighthouse
from lighthouse_core.weights.checkpoint import Source, find_source, load_measurement, load_weights
from lighthouse_core.weights.directory import read_config, words

_ELSEWHERE = "measure it on such a machine, or its export, which lighthouse strip makes, on this one"


def load_checkpoint(
    path: Path,
    *,
    attention: Literal["trained", "dense"],
    device: torch.device | None = None,
    step: int | None = None,
    tokens: int = 0,
) -> tuple[Subject, Recipe]:
    """A checkpoint of a run, and the run's recipe.

    Args:
        path: a run directory (its newest checkpoint) or one of its checkpoints/step-N.
        attention: "trained" keeps the Lighthouse layers of a checkpoint of stage 1, as its last step had them; "dense"
            replaces them, as a recovery does.
        device: where it runs; a GPU if there is one.
        step: of the checkpoint, where `path` is a run.
        tokens: the longest sequence that it is to run on, where that is longer than those of training.

    Raises:
        RunError, CheckpointError: there is no such checkpoint, or it is damaged.
        UserError: a backend that the recipe names cannot run here.
    """
    vml.settle()
    device = device or _device()
    source = find_source(path if step is None else path / "checkpoints" / f"step-{step}")
    recipe = source.run.recipe
    # Of step 0, the attention that the first step has.
    step = min(max(source.step, 1), recipe.training.steps)
    phase, as_trained = phase_at(recipe.phases, step), attention == "trained" and _in_stage_1(source)
    cfg = phase.settings(step) if as_trained else recipe.lighthouse.dense_attention
    pooled = as_trained and not phase.dense
    dtype = getattr(torch, recipe.training.dtype)
    try:
        check_backends(cfg, device.type, pooled=pooled)
        if recipe.data.packing == "documents":
            documents_kernel(cfg.dense_backend, device.type, dtype, recipe.model.head_dim)
    except BackendError as error:
        raise UserError(f"the run's recipe names a backend that cannot run here: {error}", hint=_ELSEWHERE) from None
    trained = recipe.training.seq_len
    tokens = max(tokens, trained)
    model = build_dense_model(recipe.model, tokens)
    model.load_state_dict(load_weights(source, recipe.model.kind.entries(recipe.model)), assign=True)
    use_dense(model, cfg.dense_backend)
    if pooled:
        use_lighthouse(model, cfg, phase.dense_layers)
    if as_trained and phase.rope_theta is not None:
        model.turn_by(phase.rope_theta)
    angles = model.freqs_cis
    model.to(device, dtype).eval()
    # Not in the type of the weights.
    model.freqs_cis = angles.to(device)
    budget, budgets = recipe.lighthouse.budget, None
    if as_trained and budget.acts_in(phase):
        numbers = budget.blocks(recipe.phases, step, load_measurement(source))
        budgets = torch.tensor(numbers, dtype=torch.int32, device=device)
    key = selection_keys(recipe.training.seed, 0, 0, recipe.model.layers).to(device)
    # Which layers are dense the model knows by itself; budgets are of the others alone.
    dense_layers = () if budgets is None else phase.dense_layers
    context = AttentionContext(key=key, budgets=budgets, dense_layers=dense_layers)
    beyond = f", trained at {trained} tokens" if tokens > trained else ""
    subject = Subject(
        name=f"{source.run.name} step {source.step}, {_words(cfg) if pooled else 'dense attention'}{beyond}",
        hidden=partial(model.hidden, context=context),
        head=model.head,
        tokenizer=build_tokenizer(recipe.data.tokenizer),
        tokens=tokens,
        device=device,
        tokenizer_name=recipe.data.tokenizer,
        leaky=pooled and cfg.leaks,
        model=model if pooled else None,
        packed=partial(hidden_of_documents, model, context),
        alignment=_alignment(cfg, pooled),
    )
    return subject, recipe


def _alignment(cfg: LighthouseConfig, pooled: bool) -> int | None:
    """Of documents, see `Subject`."""
    if not BACKENDS[cfg.dense_backend].documents or (pooled and "documents" not in cfg.rule.can(cfg)):
        return None
    return cfg.alignment if pooled else 1


def _words(cfg: LighthouseConfig) -> str:
    """Which attention of stage 1, in words."""
    more = cfg.rule.words(cfg)
    return f"Lighthouse attention ({more})" if more else "Lighthouse attention"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _in_stage_1(source: Source) -> bool:
    stages = source.run.ledger["stages"]
    return stages[0]["stage"] == "lighthouse" and (len(stages) == 1 or source.step <= stages[1]["start"])


def load_directory(
    path: Path, *, device: torch.device | None = None, say: Callable[[str], None] = lambda text: None
) -> Subject:
    """A Hugging Face directory with a causal language model. Nothing in it is run.

    Args:
        path: of the directory.
        device: where it runs; a GPU if there is one.
        say: told which tokenizer is used.

    Raises:
        UserError: transformers is missing, or cannot load it; it needs code of its own; its weights are pickled, or not
            those of its model; or there is no tokenizer that Lighthouse reads.
    """
    vml.settle()
    device = device or _device()
    config = read_config(path)
    file, tokenizer = _tokenizer(path, say)
    model: Any = load_model(path, config)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} tokens, and the model {rows}",
            hint="put the tokenizer of the model beside it",
        )
    model.to(device).eval()
    with explained(path):
        # Some settings are met by the first text alone.
        hidden, head = _in_two(model, device)
    length = getattr(model.config, "max_position_embeddings", None)
    return Subject(
        name=path.resolve().name,
        hidden=hidden,
        head=head,
        tokenizer=tokenizer,
        tokens=length if isinstance(length, int) and length > 0 else sys.maxsize,
        device=device,
        tokenizer_name=str(file),
    )


def _tokenizer(path: Path, say: Callable[[str], None]) -> tuple[Path, Tokenizer]:
    """A directory's tokenizer.json, which transformers would take, else its tokenizer.model."""
    files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
    if not files:
        raise UserError(
            f"{path} has neither a tokenizer.json nor a tokenizer.model",
            hint="put the tokenizer of the model beside it",
        )
    problems: list[DataError] = []
    for file in files:
        try:
            tokenizer = build_tokenizer(str(file))
        except DataError as error:
            problems.append(error)
            continue
        except Exception as error:  # of a library, for a file that is not what it should be
            problems.append(
                DataError(
                    f"{file} cannot be used: {type(error).__name__}: {words(error)}",
                    hint="put the tokenizer of the model beside it",
                )
            )
            continue
        passed = f", for {problems[0]}" if problems else ""
        say(f"the tokenizer is {file.name}{passed}")
        return file, tokenizer
    raise UserError(str(problems[0]), hint=problems[0].hint)


@torch.no_grad()
def _in_two(model: Any, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Hidden states and the head; where the model does more than that to its logits, the logits and nothing."""
    body, head = model.get_decoder(), model.get_output_embeddings()

    def hidden(tokens: Tensor) -> Tensor:
        return body(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    some = torch.arange(16, device=device)[None]
    expected = logits(some).float()
    try:
        same = torch.allclose(head(hidden(some)).float(), expected, rtol=1e-2, atol=1e-2)
    except (AttributeError, TypeError):
        same = False
    return (hidden, head) if same else (logits, lambda x: x)
