"""The Llama that is trained: torchtitan's, with exact widths and weights that do not depend on the process count."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.config import JobConfig
from torchtitan.models.llama3.model import model as llama3
from torchtitan.models.llama3.model.args import TransformerModelArgs

from lighthouse_core.attention.config import LighthouseConfig
from lighthouse_core.attention.module import DenseAttention, LighthouseAttention
from lighthouse_core.train.loss import linear_cross_entropy

if TYPE_CHECKING:
    from lighthouse_core.config.model import ModelSection


@dataclass
class LlamaArgs(TransformerModelArgs):
    """torchtitan's arguments and the two widths it derives by rounding.

    Attributes:
        head_dim: D, free of dim / n_heads.
        ffn_dim: exact width of the SwiGLU.
        embedding_std: standard deviation of the initial embeddings.
        seed: seed of the initial weights.
        loss_chunk: tokens whose logits exist at once where the loss is asked for.
    """

    head_dim: int = 0
    ffn_dim: int = 0
    embedding_std: float = 1.0
    seed: int = 0
    loss_chunk: int = 1024

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        self.max_seq_len = job_config.training.seq_len

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        # Metrics works out the FLOPs.
        return sum(p.numel() for p in model.parameters()), 0


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position embedding of neighbouring pairs, in float32: in real numbers, for torch.compile fuses no others.

    Args:
        x: [B, N, H, D].
        turns: [at least N, D/2, 2] int32: the bits of the float32 cosine and sine of each position's angles.
    """
    cos, sin = turns[: x.shape[1], None].view(torch.float32).unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


class Attention(llama3.Attention):
    """Attention whose head dimension is its own setting."""

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        self.head_dim = args.head_dim
        width, kv_width = self.n_heads * args.head_dim, self.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, width, bias=False)
        self.wk = nn.Linear(args.dim, kv_width, bias=False)
        self.wv = nn.Linear(args.dim, kv_width, bias=False)
        self.wo = nn.Linear(width, args.dim, bias=False)

    def forward(self, x: Tensor, turns: Tensor, attention_masks: None, positions: None = None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        heads_first = (y.transpose(1, 2) for y in (rotate(q, turns), rotate(k, turns), v))
        out = self.inner_attention(*heads_first, enable_gqa=self.enable_gqa)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(llama3.FeedForward):
    """SwiGLU of an exact width."""

    def __init__(self, args: LlamaArgs):
        nn.Module.__init__(self)
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)


class Head(nn.Linear):
    """The output projection; given labels, the loss in place of the logits.

    Attributes:
        compiled: have torch.compile fuse the loss.
    """

    def __init__(self, args: LlamaArgs):
        super().__init__(args.dim, args.vocab_size, bias=False)
        self.chunk, self.compiled = args.loss_chunk, False

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, N, V] of `hidden` [B, N, dim], or the loss [] summed over the tokens of `labels` [B, N]."""
        if labels is None:
            return super().forward(hidden)
        rows = hidden.flatten(0, 1), self.weight, labels.flatten()
        return linear_cross_entropy(*rows, chunk=self.chunk, compiled=self.compiled)


class Transformer(llama3.Transformer):
    """torchtitan's Llama 3 with exact widths, plain RoPE, and initial weights drawn as full tensors.

    `freqs_cis` holds, as float32, what `rotate` takes.
    """

    def __init__(self, args: LlamaArgs):
        super().__init__(args)
        self.output = Head(args)
        for block in self.layers.values():
            block.attention = Attention(args)
            block.feed_forward = FeedForward(args)

    def _precompute_freqs_cis(self) -> Tensor:
        args = self.model_args
        exponent = torch.arange(0, args.head_dim, 2).float() / args.head_dim
        angles = torch.outer(torch.arange(args.max_seq_len).float(), 1.0 / args.rope_theta**exponent)
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [B, N, V] after `tokens` [B, N] int64, or with `labels` [B, N] the sum [] of their losses in nats."""
        hidden = self.hidden(tokens)
        return self.output(hidden) if labels is None else self.output(hidden, labels)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head takes, [B, N, dim], of `tokens` [B, N] int64."""
        hidden = self.tok_embeddings(tokens)
        # As integers: FSDP would cast floating-point inputs of a block to bfloat16.
        turns = self.freqs_cis.float().view(torch.int32)
        for block in self.layers.values():
            hidden = block(hidden, turns, None)
        return self.norm(hidden)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw every parameter as a full tensor from one generator and keep the local shard, so that the weights are
        the same on any number of processes. The distributions are torchtitan's, but for `embedding_std`."""
        with torch.device(buffer_device or self.freqs_cis.device):
            self.freqs_cis = self._precompute_freqs_cis()
        device = next(self.parameters()).device
        generator = torch.Generator(device).manual_seed(self.model_args.seed)
        for name, parameter in self.named_parameters():
            full = torch.empty(parameter.shape, device=device, dtype=torch.float32)
            self._draw(name, full, generator)
            if isinstance(parameter, DTensor):
                # No communication: every process has drawn the same tensor.
                shard = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(shard.to_local())
            else:
                parameter.copy_(full)

    def _draw(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        if "norm" in name:
            weight.fill_(1.0)
        elif name.startswith("tok_embeddings"):
            weight.normal_(std=self.model_args.embedding_std, generator=generator)
        elif name.startswith("output"):
            std = self.model_args.dim**-0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
        else:
            depth = int(re.search(r"layers\.(\d+)\.", name).group(1)) + 1
            scaled = re.search(r"\.(wo|w2|w3)\.", name)
            std = 0.02 / (2 * depth) ** 0.5 if scaled else 0.02
            nn.init.trunc_normal_(weight, std=std, generator=generator)


def attention_layers(model: nn.Module) -> list[Attention]:
    """Of the model as it is or as it trains, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def use_dense(model: nn.Module, backend: str) -> None:
    """Put dense attention by the kernel of that name into every layer of `model`, in place."""
    for layer in attention_layers(model):
        layer.inner_attention = DenseAttention(backend)


def use_lighthouse(model: nn.Module, cfg: LighthouseConfig, dense_layers: list[int]) -> None:
    """Put Lighthouse attention into every layer of `model` but the dense ones, in place."""
    for name, block in model.layers.items():
        if int(name) not in dense_layers:
            block.attention.inner_attention = LighthouseAttention(cfg, int(name))


def model_args(model: "ModelSection", seq_len: int, **others: int) -> LlamaArgs:
    """Arguments of the Llama that a recipe's [model] section describes; `others` are fields of LlamaArgs."""
    return LlamaArgs(
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
        **others,
    )


def build_dense_model(model: "ModelSection", seq_len: int) -> Transformer:
    """The trainer's Llama, dense in every layer, on the CPU with uninitialised weights.

    Args:
        model: the recipe's [model] section.
        seq_len: positions N the rotary table covers.

    Returns:
        A module: tokens [B, N] int64 -> logits [B, N, vocab_size].
    """
    with torch.device("meta"):
        built = Transformer(model_args(model, seq_len))
    built.to_empty(device="cpu")
    built.freqs_cis = built._precompute_freqs_cis()
    return built
