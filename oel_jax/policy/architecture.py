"""The shapes a policy can have, and the catalogue of named ones."""

import dataclasses


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
    tied_head: the head is the embedding.
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

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ValueError(f"Architecture.kv_heads is {self.kv_heads}: it must divide heads ({self.heads})")
    if self.head_size % 2:
      raise ValueError(f"Architecture.head_size is {self.head_size}: rotary positions need an even number")


def _qwen3(width: int, layers: int, heads: int, feedforward: int, tied_head: bool) -> Architecture:
  return Architecture(151936, width, layers, heads, 8, 128, feedforward, tied_head=tied_head)


ARCHITECTURES = {
    # The embedded policy (pocket.md, model S) and its smaller sister for tests.
    "pocket": Architecture(576, 128, 8, 4, 2, 32, 352, rope_theta=1e4),
    "pocket-tiny": Architecture(576, 32, 2, 2, 1, 16, 64, rope_theta=1e4),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-4b-instruct": dataclasses.replace(_qwen3(2560, 36, 32, 9728, True), rope_theta=5e6),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, False),
}


def named(name: str) -> Architecture:
  """Returns the architecture of this name; ValueError lists the known ones."""
  if name not in ARCHITECTURES:
    raise ValueError(f"the architecture is {name!r}: it must be one of {', '.join(ARCHITECTURES)}")
  return ARCHITECTURES[name]
