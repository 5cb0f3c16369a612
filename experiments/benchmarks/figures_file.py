"""The flag --json of every benchmark. It imports nothing of ours, and not JAX: some benchmarks may
take no device, or have the code of another checkout measured, before their figures are there.
"""

import argparse
import os
import pathlib


def to_write(text: str) -> str:
  """The `type` of a flag that names a file for the figures: the path, if a file can be written
  there, which is then told before anything is measured.

  Raises:
    argparse.ArgumentTypeError: it cannot.
  """
  path = pathlib.Path(text)
  if not text or path.is_dir() or not path.parent.is_dir():
    raise argparse.ArgumentTypeError(f"{text!r}: it must be a file, in a folder that is there")
  if not os.access(path if path.exists() else path.parent, os.W_OK):
    raise argparse.ArgumentTypeError(f"{text!r}: it must be a file that may be written")
  return text
