"""The decoder that is trained, in plain PyTorch: exact widths, and weights that do not depend on the process count.

B batch, N tokens, H query heads, Hkv key/value heads, D head dimension, V vocabulary rows.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear, silu

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.context import AttentionContext
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention
from lighthouse_core.attention.rotary import rotate
from lighthouse_core.models.loss import linear_cross_entropy
from lighthouse_core.models.rope import rotary_table

if TYPE_CHECKING:
    from lighthouse_core.config.model import ModelSection

_NOTHING = AttentionContext()
# What activation checkpointing and torch.compile put into the names of a block's parameters.
_WRAPPED = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")


@dataclass
class DecoderArgs:
    """Arguments of a decoder.

    Attributes:
        dim: width of the hidden states.
        n_layers, n_heads, n_kv_heads, head_dim: layers, H, Hkv, D.
        ffn_dim: width of the SwiGLU.
        vocab_size: V.
        rope_theta: base of the rotary embedding's frequencies.
        rope_scaling: of these; see `rotary_table`.
        norm_eps: of RMSNorm.
        max_seq_len: positions that the rotary table covers.
        embedding_std: standard deviation of the initial embeddings.
        seed: of the initial weights.
        loss_chunk: tokens whose logits exist at once where the loss is asked for.
        qkv_bias: add a bias to queries, keys and values.
        qk_norm: norm queries and keys head by head, before RoPE.
        tied: the head is the embedding table.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float
    norm_eps: float
    max_seq_len: int
    embedding_std: float = 1.0
    seed: int = 0
    loss_chunk: int = 1024
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    rope_scaling: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: "ModelSection", seq_len: int, **others: int) -> "DecoderArgs":
        """Arguments of the model that a recipe's [model] section describes; `others` are fields of this class."""
        return cls(
            dim=model.dim,
            n_layers=model.layers,
            n_heads=model.heads,
            n_kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            ffn_dim=model.ffn_dim,
            vocab_size=model.vocab_size,
            rope_theta=model.rope_theta,
            norm_eps=model.norm_eps,
            embedding_std=model.embedding_std,
            max_seq_len=seq_len,
            qkv_bias=model.kind.qkv_bias,
            qk_norm=model.kind.qk_norm,
            tied=model.tied_embeddings,
            # Plain, as torchtitan writes the arguments into its log.
            rope_scaling=None if model.rope_scaling is None else model.rope_scaling.model_dump(),
            **others,
        )


class Attention(nn.Module):
    """Projections and rotation around `inner_attention`, a module (q, k, v, context) -> [B, N, H, D]."""

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.head_dim = args.head_dim
        width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, width, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, kv_width, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, kv_width, bias=args.qkv_bias)
        self.wo = nn.Linear(width, args.dim, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(args.head_dim, eps=args.norm_eps) if args.qk_norm else None for _ in range(2)
        )
        self.inner_attention: LighthouseAttention | DenseAttention = DenseAttention()

    def queries_and_keys(
        self, x: Tensor, turns: Tensor, context: AttentionContext, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q [B, rows, H, D] of some tokens and k [B, N, Hkv, D] of all, as `inner_attention` takes them if it does not
        rotate.

        Args:
            x, turns, context: as in `forward`.
            rows: int64 [rows], the tokens of q.
        """
        q, k = (w(of).unflatten(-1, (-1, self.head_dim)) for w, of in ((self.wq, x[:, rows]), (self.wk, x)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rotary = _own(turns.view(torch.float32), x, context)
        return rotate(q, rotary[..., rows, :, :]), rotate(k, rotary)

    def forward(self, x: Tensor, turns: Tensor, context: AttentionContext) -> Tensor:
        """[B, N, dim] of `x` [B, N, dim].

        Args:
            x: hidden states.
            turns: int32, the bits of the rotary table: of each position, [at least N, D/2, 2], or of each token,
                [B, N, D/2, 2]; where processes share the sequences, of all tokens.
            context: of this layer.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        scores = None
        if self.q_norm is not None and self.k_norm is not None:
            # After it, all queries and keys are of one length.
            scores = self.inner_attention.scores(q, k, context)
            q, k = self.q_norm(q), self.k_norm(k)
        rotary = turns.view(torch.float32)
        if self.inner_attention.rotates(context):
            out = self.inner_attention(q, k, v, context, rotary=rotary, scores=scores)
        else:
            rotary = _own(rotary, x, context)
            out = self.inner_attention(rotate(q, rotary), rotate(k, rotary), v, context, scores=scores)
        return self.wo(out.flatten(2))


def _own(rotary: Tensor, x: Tensor, context: AttentionContext) -> Tensor:
    """Of a rotary table, that of the tokens of this process, which are those of `x` [B, N, dim]."""
    own = slice(context.first_position, context.first_position + x.shape[1])
    return rotary[own] if rotary.dim() == 3 else rotary[:, own]


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] of `x` [B, N, dim]."""
        return self.w2(silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer."""

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, turns: Tensor, context: AttentionContext) -> Tensor:
        """[B, N, dim] of `x` [B, N, dim]; the context is of this layer."""
        h = x + self.attention(self.attention_norm(x), turns, context)
        return h + self.feed_forward(self.ffn_norm(h))


class Head(nn.Module):
    """The output projection; given labels, the loss in place of the logits.

    Attributes:
        weight: [V, dim]; None where the embedding table takes its place.
        compiled: have torch.compile fuse the loss.
    """

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.weight = None if args.tied else nn.Parameter(torch.empty(args.vocab_size, args.dim))
        self.chunk, self.compiled = args.loss_chunk, False

    def forward(self, hidden: Tensor, labels: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Logits [B, N, V] of `hidden` [B, N, dim], or the loss [] summed over the tokens of `labels` [B, N].

        Args:
            hidden, labels: of the batch.
            table: the embeddings [V, dim], where they are tied.
        """
        weight = self.weight if table is None else table
        assert weight is not None, "tied embeddings are to be given"
        if labels is None:
            return linear(hidden, weight)
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), chunk=self.chunk, compiled=self.compiled
        )


class Decoder(nn.Module):
    """The whole model.

    Attributes:
        freqs_cis: what `rotate` takes, float32.
        initial: gives each weight by its name, a full tensor; None for weights that are drawn.
    """

    freqs_cis: Tensor

    def __init__(self, args: DecoderArgs, initial: Callable[[str], Tensor] | None = None):
        super().__init__()
        self.args = args
        self.initial = initial
        self.vocab_size = args.vocab_size
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.register_buffer("freqs_cis", self.rotary_table(), persistent=False)
        self.layers = nn.ModuleDict({str(number): Block(args) for number in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = Head(args)

    def rotary_table(self, theta: float | None = None) -> Tensor:
        """Cosine and sine of every position's angles, float32 [max_seq_len, D/2, 2]; of the model's `rope_theta` where
        no other base is given."""
        args = self.args
        return rotary_table(args.max_seq_len, args.head_dim, theta or args.rope_theta, args.rope_scaling)

    def turn_by(self, theta: float | None) -> None:
        """Rotate positions by the base `theta` from now on; None for the model's."""
        with torch.device(self.freqs_cis.device):
            self.freqs_cis.copy_(self.rotary_table(theta))

    def forward(self, tokens: Tensor, labels: Tensor | None = None, context: AttentionContext = _NOTHING) -> Tensor:
        """Logits [B, N, V] after `tokens` [B, N] int64, or with `labels` [B, N] the sum [] of their losses in nats.

        Args:
            tokens, labels: of the batch.
            context: of the batch, with the keys of all layers.
        """
        return self.head(self.hidden(tokens, context), labels)

    def head(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """What `Head` makes of hidden states."""
        return self.output(hidden, labels, self.tok_embeddings.weight if self.args.tied else None)

    def hidden(self, tokens: Tensor, context: AttentionContext = _NOTHING) -> Tensor:
        """What the head takes, [B, N, dim], of `tokens` [B, N] int64."""
        hidden = self.tok_embeddings(tokens)
        # As integers: FSDP would cast floating-point inputs of a block to 16 bits.
        turns = self.freqs_cis.float().view(torch.int32)
        if context.positions is not None:
            turns = turns[context.positions.long()]
        for number, block in enumerate(self.layers.values()):
            hidden = block(hidden, turns, context.of_layer(number))
        return self.norm(hidden)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Take every parameter as a full tensor, from `initial` or drawn from one generator, and keep the local shard:
        the weights are the same on any number of processes, and none holds more than its part and one tensor. The
        distributions are those of torchtitan's Llama 3, but for `embedding_std`."""
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self.rotary_table()
        device = next(self.parameters()).device
        generator = torch.Generator(device).manual_seed(self.args.seed)
        for name, parameter in self.named_parameters():
            self._take(name, parameter, device, generator)

    def _take(self, name: str, parameter: Tensor, device: torch.device, generator: torch.Generator) -> None:
        """One parameter; the full tensor is gone before the next is made."""
        if self.initial is None:
            full = torch.empty(parameter.shape, device=device, dtype=torch.float32)
            self._draw(name, full, generator)
        else:
            full = self.initial(_WRAPPED.sub("", name)).to(device)
        if isinstance(parameter, DTensor):
            # No communication: every process has drawn the same tensor.
            shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(full)

    def _draw(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        if "norm" in name:
            weight.fill_(1.0)
        elif name.endswith("bias"):
            weight.zero_()
        elif name.startswith("tok_embeddings") and not self.args.tied:
            weight.normal_(std=self.args.embedding_std, generator=generator)
        elif name.startswith(("tok_embeddings", "output")):
            std = self.args.dim**-0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
        else:
            layer = re.search(r"layers\.(\d+)\.", name)
            assert layer is not None
            depth = int(layer[1]) + 1
            scaled = re.search(r"\.(wo|w2|w3)\.", name)
            std = 0.02 / (2 * depth) ** 0.5 if scaled else 0.02
            nn.init.trunc_normal_(weight, std=std, generator=generator)


def attention_layers(model: nn.Module) -> list[Attention]:
    """Of the model as it is or as it trains, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def lighthouse_layers(model: nn.Module) -> dict[int, LighthouseAttention]:
    """The layers that are not dense, by number."""
    found = (layer.inner_attention for layer in attention_layers(model))
    return {number: layer for number, layer in enumerate(found) if isinstance(layer, LighthouseAttention)}


def use_dense(model: nn.Module, backend: str) -> None:
    """Put dense attention by the kernel of that name into every layer of `model`, in place."""
    for layer in attention_layers(model):
        layer.inner_attention = DenseAttention(backend)


def use_lighthouse(model: nn.Module, cfg: LighthouseConfig, dense_layers: Iterable[int]) -> None:
    """Put Lighthouse attention into every layer of `model` but the dense ones, in place."""
    for number, layer in enumerate(attention_layers(model)):
        if number not in dense_layers:
            layer.inner_attention = LighthouseAttention(cfg)


def build_dense_model(model: "ModelSection", seq_len: int) -> Decoder:
    """The decoder, dense in every layer, on the CPU with uninitialised weights.

    Args:
        model: the recipe's [model] section.
        seq_len: positions N the rotary table covers.

    Returns:
        A module: tokens [B, N] int64 -> logits [B, N, vocab_size].
    """
    with torch.device("meta"):
        built = Decoder(DecoderArgs.of(model, seq_len))
    built.to_empty(device="cpu")
    built.freqs_cis = built.rotary_table()
    return built
