"""Which part of the package may import which (the arrows of the picture in README.md)."""

import ast
import pathlib
import subprocess
import sys

import pytest
from style_figures import parsed

TOP = pathlib.Path(__file__).parents[1]
MODULES = sorted((TOP / "oel_jax").rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
  """All that a file imports, wherever in it: modules, and names of `from` with their module."""
  found = set()
  for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative imports would not be seen here"
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def imports(path: pathlib.Path, part: str) -> bool:
  return any(name == part or name.startswith(f"{part}.") for name in imported(path))


def test_the_reader_of_imports_sees_them(tmp_path):
  (tmp_path / "a.py").write_text(
    "import x.y as z\nfrom p import q\n\ndef f():\n  from r.s import t\n"
  )
  assert imported(tmp_path / "a.py") == {"x.y", "p", "p.q", "r.s", "r.s.t"}
  assert imports(tmp_path / "a.py", "r.s") and not imports(tmp_path / "a.py", "r.s.u")
  assert len(MODULES) > 60


@pytest.mark.parametrize(
  "part, forbidden",
  [
    ("consolidation", ("environments", "extraction", "evaluation", "loop", "tasks", "report")),
    ("environments", ("consolidation", "extraction", "evaluation", "loop", "tasks", "report")),
    ("extraction", ("consolidation", "environments", "evaluation", "loop", "tasks", "report")),
    ("evaluation", ("consolidation", "environments", "extraction", "loop", "tasks", "report")),
    ("policy", ("consolidation", "environments", "extraction", "evaluation", "loop", "tasks")),
    ("conversations", ("consolidation", "environments", "extraction", "evaluation", "loop")),
    ("runtime", ("consolidation", "environments", "extraction", "evaluation", "loop")),
    ("stages", ("loop", "main", "tasks")),
    ("tasks", ("loop", "main")),
  ],
)
def test_the_arrows_run_one_way(part, forbidden):
  wrong = [
    f"{path.relative_to(TOP)} imports {other}"
    for path in MODULES
    if path.is_relative_to(TOP / "oel_jax" / part)
    for other in forbidden
    if imports(path, f"oel_jax.{other}")
  ]
  assert not wrong


def test_the_server_side_alone_loads_no_environment():
  """What `--stage=consolidate` imports, each file's own imports and those of what it imports."""
  code = (
    "import sys, oel_jax.tasks.stage, oel_jax.stages.consolidate\n"
    "found = [name for name in sys.modules"
    " if name.startswith(('oel_jax.environments', 'oel_jax.pocket', 'textarena'))]\n"
    "assert 'oel_jax.consolidation.trainer' in sys.modules and not found, found"
  )
  done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_nothing_but_experiments_imports_the_embedded_policy():
  pocket = TOP / "oel_jax/pocket"
  wrong = [
    str(path.relative_to(TOP))
    for path in MODULES
    if not path.is_relative_to(pocket) and imports(path, "oel_jax.pocket")
  ]
  assert not wrong
