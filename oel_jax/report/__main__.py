"""python -m oel_jax.report WORKDIR"""

import pathlib
import sys

from oel_jax import report

if __name__ == "__main__":
  if len(sys.argv) != 2:
    sys.exit("usage: python -m oel_jax.report WORKDIR")
  try:
    report.write(sys.argv[1])
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  print(pathlib.Path(sys.argv[1]) / "report" / "index.html")
