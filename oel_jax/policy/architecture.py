"""The shapes a policy can have, and the catalogue of named ones.

Another field stands in `Architecture`, with a default. What else it changes depends on its kind:

- Norms, queries and keys, feed-forward: plain form, kernel and its gradient in `policy.ops`;
  `attn_impl` in `sampling.kv_cache` chooses "xla", or the decoding kernel there learns the field.
  A factor on scores is one on queries: tests/test_architecture.py does it.
- Embeddings: `apply` in `transformer`, `forward` in `sampling.model`, `embed` in `unrolled`, there
  behind the addition of `weights["rows"]`, or the gradient is wrong.
- A cap on scores: `attend`, `causal` and `attend_with_prefix` in `attention`, `attend` and
  `attend_many` in `sampling.kv_cache`, `attend` in `sampling.text_cache`, and their callers; "xla"
  also from `attn_impl` in `consolidation.placement` and `prefill_attn_impl` in `sampling.model`.
- A cap on logits: `logits` in `transformer`, value and gradient in `consolidation.chunk_loss`, and
  their callers.

Files of models that have it are read by `weights.huggingface_config` and `weights.gguf`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3's stretching of the rotary positions: slow frequencies are divided by `factor`, fast
  ones kept, those between blended.

  Attributes:
    factor: what slow frequencies are divided by.
    low_freq_factor, high_freq_factor: a frequency is slow if it turns fewer times than the first
      within the original context, fast if more often than the second.
    original_max_position_embeddings: the original context, in tokens.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: float


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A pre-norm decoder with grouped-query attention, rotary positions and a SwiGLU feed-forward.

  Attributes:
    vocabulary: V, rows of the embedding and of the head.
    width: D.
    layers: L.
    heads: N, query heads.
    kv_heads: K, key-value heads; divides N.
    head_size: H; even.
    feedforward: F.
    rope_theta: base of the rotary frequencies.
    norm_eps: ε of every RMS norm.
    qk_norm: RMS norm on each query and key head (Qwen3).
    qkv_bias: a bias on query, key and value (Qwen2.5).
    rope_scaling: of the rotary frequencies (Llama 3.1 and later); None for none.
    tied_head: the head is the embedding.
    max_positions: tokens of the longest sequence that the weights were made for; None if unknown.
      It changes no number, so architectures that differ in it alone are equal.
  """

  vocabulary: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  feedforward: int
  rope_theta: float = 1e6
  norm_eps: float = 1e-6
  qk_norm: bool = True
  tied_head: bool = True
  qkv_bias: bool = False
  rope_scaling: Llama3Scaling | None = None
  max_positions: int | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(
        f"Architecture.kv_heads is {self.kv_heads}: it must divide heads ({self.heads})"
      )
    if self.head_size % 2:
      raise ValueError(
        f"Architecture.head_size is {self.head_size}: rotary positions need an even number"
      )

  def share(self, size: int) -> "Architecture":
    """The model that one of `size` devices runs, which hold the weights together: heads,
    feed-forward and vocabulary divide into so many; of fewer key-value heads each has one.
    """
    return dataclasses.replace(
      self,
      heads=self.heads // size,
      kv_heads=max(1, self.kv_heads // size),
      feedforward=self.feedforward // size,
      vocabulary=self.vocabulary // size,
    )


def _qwen3(width: int, layers: int, heads: int, feedforward: int, tied_head: bool) -> Architecture:
  return Architecture(151936, width, layers, heads, 8, 128, feedforward, tied_head=tied_head)


def _qwen25(
  width: int,
  layers: int,
  heads: int,
  kv_heads: int,
  feedforward: int,
  vocabulary: int,
  tied_head: bool,
) -> Architecture:
  return Architecture(
    vocabulary,
    width,
    layers,
    heads,
    kv_heads,
    128,
    feedforward,
    qk_norm=False,
    qkv_bias=True,
    tied_head=tied_head,
  )


def _llama3(
  width: int,
  layers: int,
  heads: int,
  head_size: int,
  feedforward: int,
  factor: float,
  tied_head: bool,
) -> Architecture:
  return Architecture(
    128256,
    width,
    layers,
    heads,
    8,
    head_size,
    feedforward,
    rope_theta=5e5,
    norm_eps=1e-5,
    qk_norm=False,
    tied_head=tied_head,
    rope_scaling=Llama3Scaling(factor, 1.0, 4.0, 8192.0),
  )


ARCHITECTURES = {
  # The embedded policy (pocket.md, model S) and its smaller sister for tests.
  "pocket": Architecture(576, 128, 8, 4, 2, 32, 352, rope_theta=1e4),
  "pocket-tiny": Architecture(576, 32, 2, 2, 1, 16, 64, rope_theta=1e4),
  # The policy of both games (`pocket/boards`), in two sizes, and its smaller sister.
  "boards-4m": Architecture(704, 192, 10, 6, 2, 32, 512, rope_theta=1e4),
  "boards-6m": Architecture(704, 256, 10, 8, 2, 32, 576, rope_theta=1e4),
  "boards-tiny": Architecture(704, 32, 2, 2, 1, 16, 64, rope_theta=1e4),
  "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
  "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
  "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
  "qwen3-4b-instruct": dataclasses.replace(_qwen3(2560, 36, 32, 9728, True), rope_theta=5e6),
  "qwen3-8b": _qwen3(4096, 36, 32, 12288, False),
  "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, 151936, True),
  "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944, 152064, False),
  "llama-3.1-8b": _llama3(4096, 32, 32, 128, 14336, 8.0, False),
  "llama-3.2-1b": _llama3(2048, 16, 32, 64, 8192, 32.0, True),
  "llama-3.2-3b": _llama3(3072, 28, 24, 128, 8192, 32.0, True),
  "smollm2-135m": Architecture(
    49152, 576, 30, 9, 3, 64, 1536, rope_theta=1e5, norm_eps=1e-5, qk_norm=False
  ),
}


def named(name: str) -> Architecture:
  """Returns the architecture of this name; ValueError lists the known ones."""
  if name not in ARCHITECTURES:
    raise ValueError(f"the architecture is {name!r}: it must be one of {', '.join(ARCHITECTURES)}")
  return ARCHITECTURES[name]
