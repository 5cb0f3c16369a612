"""How large the sampler's programs are. Each size is one of a few, so that few programs are
compiled: what is smaller is filled up, and a prompt that is longer may be read in pieces.

What filling up costs depends on the device. A CPU works on all that is there, so its sizes lie
close together. A GPU reads the weights once, for 8 rows as for 64, and of a cache only the columns
that are filled; but there a program takes many seconds to compile.
"""

import dataclasses
from collections.abc import Sequence

SLOT_COUNTS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
# Of these, what a device other than a CPU has if nobody says how many, and all of them fit.
FEWER_SLOT_COUNTS = (1, 4, 16, 64, 128, 256)
SHRUNK_SLOT_COUNTS = (8, 16)  # on a CPU, when no more are left of MAX_SLOTS_CPU or more
MAX_SLOTS = 256  # of a device, if it is not said how many there are
MAX_SLOTS_CPU = 32  # the same; there, a token takes twice as long with twice as many

CACHE_LENGTHS = (
  *(128, 256, 512, 1024, 1536, 2048, 3072, 4096),
  *(6144, 8192, 12288, 16384, 24576, 32768),
)
# Where attention reads only the columns that are filled, and there is memory for it.
FEWER_CACHE_LENGTHS = (512, 2048, 4096, 8192, 16384, 32768)

# Of texts that are kept once, and how many there is room for.
TEXT_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TEXT_COUNTS = (1, 4, 12, 20, 32)

# On a CPU, prompts that enter together; more than half of a batch is filled, unless it is small.
PREFILL_BATCHES_CPU = (1, 4, 32, 256)
SMALL_BATCH_TOKENS = 1024  # tokens, padding included, up to which a batch is small
# Tokens that are prefilled at once, padding and the cache that is looked at included.
MAX_BATCH_TOKENS = 65536
PREFILL_LENGTHS = (
  *(96, 256, 512, 640, 768, 896, 1024, 1280, 1536, 2048),
  *(3072, 4096, 6144, 8192, 12288, 16384),
)
# One more length for replies on a CPU, which are short: there, padding is not for nothing.
REPLY_LENGTH = 40
# On a CPU, from which length on a batch looks at the cache only for prompts that begin there.
LONG_LENGTH_CPU = 512

# On other devices: a few prompts, and if that is more the least that makes so many tokens, at which
# products are nearly as fast as at many more.
PREFILL_BATCHES = (1, 4, 8, 16, 32, 64)
FEW_PROMPTS = 8
FULL_BATCH_TOKENS = 4096
# Of few prompts that look at the cache pieces of these lengths are read; beyond the second length
# no more than this part of the cache, or its reading would take longer than the piece.
PIECE_LENGTHS = (96, 256, 1024, 4096)
PIECE_SHARE = 4


def bucket(size: int, sizes: Sequence[int]) -> int:
  """The smallest of `sizes` that holds `size`; beyond the largest, the next multiple of it."""
  return next((s for s in sizes if s >= size), -(-size // sizes[-1]) * sizes[-1])


@dataclasses.dataclass(frozen=True)
class Batches:
  """The batches in which prompts are read on a device of so many slots.

  Attributes:
    slots: of the device.
    cpu: whether it is one.
    replies: whether responses may be replied to.
    columns: of the cache that a batch looks at for what prompts begin with; 0 for none.
  """

  slots: int
  cpu: bool
  replies: bool
  columns: int = 0

  def over(self, columns: int) -> "Batches":
    """Those that look at so many columns, 0 for none."""
    return dataclasses.replace(self, columns=columns)

  def length(self, rest: int) -> int:
    """That of the batch in which a prompt enters of which `rest` tokens are to be read; if it is
    less, others follow for what is left.
    """
    if self.cpu or not self.columns:
      more = (REPLY_LENGTH,) if self.cpu and self.replies else ()
      return bucket(rest, (*more, *PREFILL_LENGTHS))
    most = max(PIECE_LENGTHS[1], self.columns // PIECE_SHARE)
    lengths = [length for length in PIECE_LENGTHS if length <= most]
    if rest <= lengths[1]:
      return bucket(rest, lengths)
    return max(length for length in lengths if length <= rest)

  def fits(self, rest: int, length: int) -> bool:
    """Whether a prompt may join a batch of this length: it is no longer, and if the batch is the
    larger for it, at most half of its row is padding.
    """
    own = self.length(rest)
    return own <= length and (length <= 2 * own or bool(self.columns) and not self.cpu)

  def counts(self, length: int) -> list[int]:
    """How many prompts a batch of this length may have room for, rising."""
    fits = lambda n: n * (self.columns + length) <= MAX_BATCH_TOKENS
    if self.cpu:
      counts = [*(n for n in PREFILL_BATCHES_CPU if n < self.slots), self.slots]
      return [n for n in counts if fits(n)] or counts[:1]
    full = FEW_PROMPTS if self.columns else -(-FULL_BATCH_TOKENS // length)
    fitting = [n for n in PREFILL_BATCHES if n == 1 or n <= self.slots and fits(n)]
    return sorted({bucket(min(n, fitting[-1]), fitting) for n in (full, min(full, FEW_PROMPTS))})


def batch_size(prompts: int, counts: Sequence[int], length: int) -> int:
  """The largest of `counts` of which more than half is filled by so many prompts, or that is small;
  or else the largest that they fill, and the others wait; or the smallest.
  """
  filled = [
    n for n in counts if prompts <= n and (n < 2 * prompts or n * length <= SMALL_BATCH_TOKENS)
  ]
  return max(filled or [n for n in counts if n <= prompts] or counts[:1])
