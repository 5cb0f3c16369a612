"""What a test needs to start an interpreter of its own."""

import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def python_path(*folders: pathlib.Path) -> str:
  """PYTHONPATH with the folders (this checkout without any) before what it holds already:
  dependencies may come by it.
  """
  first = map(str, folders or (ROOT,))
  return os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
