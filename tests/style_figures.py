"""How code reads, in figures: `python tests/style_figures.py oel_jax ../nanodo/nanodo ...` prints a
line of a table for each folder, tests left out.
"""

import ast
import gc
import io
import pathlib
import statistics
import sys
import tokenize


def parsed(source: str) -> ast.Module:
  """`ast.parse` while nothing is collected: an object that goes meanwhile, with a message about it,
  makes Python 3.11.7 lose count of its own depth and raise SystemError.
  """
  gc.disable()
  try:
    return ast.parse(source)
  finally:
    gc.enable()


def figures(folder: pathlib.Path) -> dict[str, float]:
  """Counts of the Python files below a folder: lines, long lines, comment lines, function sizes."""
  lines = over_80 = over_100 = comments = 0
  sizes = []
  for path in sorted(folder.rglob("*.py")):
    if "tests" in path.parts or path.name.endswith("_test.py") or path.name.startswith("test_"):
      continue
    source = path.read_text(encoding="utf-8")
    rows = source.splitlines()
    lines += len(rows)
    over_80 += sum(len(row) > 80 for row in rows)
    over_100 += sum(len(row) > 100 for row in rows)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments += sum(
      token.type == tokenize.COMMENT for token in tokens if not token.line[: token.start[1]].strip()
    )
    for node in ast.walk(parsed(source)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        sizes.append(node.end_lineno - node.lineno + 1)
  return {
    "lines": lines,
    "over 80": over_80 / lines,
    "over 100": over_100 / lines,
    "comment lines": comments / lines,
    "median function": statistics.median(sizes),
    "longest": max(sizes),
  }


if __name__ == "__main__":
  print("| | lines | over 80 columns | over 100 | functions: median, longest | comment lines |")
  print("|---|---|---|---|---|---|")
  for name in sys.argv[1:]:
    found = figures(pathlib.Path(name))
    print(
      f"| {name} | {found['lines']:,} | {found['over 80']:.0%} | {found['over 100']:.1%} "
      f"| {found['median function']:.0f}, {found['longest']} | {found['comment lines']:.1%} |"
    )
