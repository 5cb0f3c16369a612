"""What installs as the README says: the wheel, the extras, an environment with one extra alone; and
the launchers.
"""

import ast
import configparser
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import zipfile

import bare
import pytest
from packaging.requirements import Requirement
from style_figures import parsed

ROOT = pathlib.Path(__file__).parents[1]
# launch/test.sh makes it beside the environment that runs the tests.
BARE = pathlib.Path(sys.prefix + "-hf")
# Imported only where the configuration asks for it, with one sentence where it is not installed.
BY_THE_USER = {"wandb"}
# As conftest.py has them, if XLA there knows them, too.
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if any(BARE.glob("lib/python*/site-packages/jaxlib-0.10.*")):
  FAST += " --xla_cpu_use_fusion_emitters=false"
INSTALLED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "oel_jax")


def run(*command, **how):
  done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **how)
  return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", name="wheel")
def fixture_wheel(tmp_path_factory):
  """The package's wheel, built from a copy of what it is built from."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in INSTALLED:
    source, target = ROOT / name, folder / "source" / name
    if source.is_dir():
      shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      target.parent.mkdir(exist_ok=True)
      shutil.copy(source, target)
  build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
  status, output = run(sys.executable, "-c", build, cwd=folder / "source")
  assert status == 0, output[-3000:]
  (made,) = folder.glob("*.whl")
  return made


@pytest.fixture(name="python")
def fixture_python():
  """The interpreter of the environment that has the extra hf alone."""
  stamp = BARE / "installed[hf]"
  if not stamp.exists() or stamp.read_bytes() != (ROOT / "setup.cfg").read_bytes():
    pytest.skip(f"{BARE} is not there, or older than setup.cfg: `bash launch/test.sh` makes it")
  return BARE / "bin/python"


def test_the_wheel_holds_every_file_of_the_package(wheel):
  with zipfile.ZipFile(wheel) as archive:
    found = {name for name in archive.namelist() if name.startswith("oel_jax/")}
  there = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "oel_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  assert found == there and "oel_jax/pocket/data/pocket.safetensors" in found


def test_every_import_is_named_in_setup_cfg():
  """Not only brought by something else that is: what brings it may be an extra's, or a test's."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  named = lambda lines: {
    bare.normal(Requirement(line).name)
    for line in lines.split("\n")
    if line and not line.startswith("#")
  }
  own, hf = (
    named(setup["options"]["install_requires"]),
    named(setup["options.extras_require"]["hf"]),
  )
  brings = importlib.metadata.packages_distributions()
  missing, used = set(), set()
  for path in sorted((ROOT / "oel_jax").rglob("*.py")):
    for module, always in imports(parsed(path.read_text(encoding="utf-8"))):
      if module in sys.stdlib_module_names or module == "oel_jax":
        continue
      if module in BY_THE_USER and not always:
        continue
      distributions = {bare.normal(name) for name in brings[module]}
      used |= distributions
      # Which are imported only where a GGUF file is read.
      optional = not always or path.name.startswith("gguf")
      if not distributions & (own | hf if optional else own):
        missing.add((str(path.relative_to(ROOT)), module))
  assert not missing
  assert {"jax", "flax", "ml-dtypes", "transformers", "tokenizers", "jinja2", "gguf"} <= used


def imports(tree):
  """(top module, whether importing the file imports it) for each absolute import."""
  inner = {
    node
    for function in ast.walk(tree)
    if isinstance(function, (ast.FunctionDef, ast.Lambda))
    for node in ast.walk(function)
  }
  for node in ast.walk(tree):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
      names = [node.module]
    for name in names:
      yield name.partition(".")[0], node not in inner


@pytest.mark.parametrize(
  "stage",
  [
    pytest.param("core", marks=pytest.mark.slow),
    "hf",
    pytest.param("both", marks=pytest.mark.slow),
  ],
)
def test_a_bare_environment_plays_trains_and_exports(stage, python, wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "package")
  (tmp_path / "work").mkdir()
  # Compiled fast rather than well, and once for each state of the environment: the numbers are
  # those of other tests.
  environment = {
    name: value for name, value in os.environ.items() if not name.startswith("JAX_")
  } | {
    "PYTHONPATH": str(tmp_path / "package"),
    "JAX_PLATFORMS": "cpu",
    "OEL_JAX_CACHE": str(BARE / "compiled"),
    "JAX_COMPILATION_CACHE_DIR": str(BARE / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "XLA_FLAGS": FAST,
  }
  status, output = run(
    python, ROOT / "tests/bare.py", stage, tmp_path / "work", env=environment, cwd=tmp_path
  )
  assert status == 0, output[-3000:]
  assert str(tmp_path / "package/oel_jax") in output, "the wheel's files are the ones that run"
  assert "PyTorch was not found" not in output


@pytest.mark.skipif(
  (platform.system(), platform.machine()) != ("Linux", "x86_64"),
  reason="accelerators' wheels are for Linux on x86-64",
)
@pytest.mark.parametrize("extra", [pytest.param("cuda", marks=pytest.mark.slow), "tpu"])
def test_the_extras_of_accelerators_resolve(extra, python, wheel, pytestconfig):
  """Asked of the package index once for each setup.cfg: without metadata of their own the index has
  pip load the wheels, 2 GB for cuda.
  """
  asked = {"setup.cfg": (ROOT / "setup.cfg").read_text(), "python": sys.version}
  cache = getattr(pytestconfig, "cache", None)  # -p no:cacheprovider has none
  if cache and cache.get(f"resolved/{extra}", None) == asked:
    return
  wanted = f"oel_jax[{extra}] @ {wheel.as_uri()}"
  how = ("--disable-pip-version-check", "--no-cache-dir", "--retries=1", "--timeout=15")
  status, output = run(python, "-m", "pip", "install", "--dry-run", *how, wanted)
  if status and any(
    words in output for words in ("Retrying (", "NewConnectionError", "Max retries exceeded")
  ):
    pytest.skip("the package index cannot be reached")
  assert status == 0, output[-3000:]
  (plan,) = [line for line in output.splitlines() if line.startswith("Would install")]
  assert {"cuda": "jax-cuda13-plugin-", "tpu": "libtpu-"}[extra] in plan
  if cache:
    cache.set(f"resolved/{extra}", asked)


# The launchers.


@pytest.fixture(name="launch")
def fixture_launch(tmp_path):
  """Runs a launcher with environments that are there and whose interpreter only tells how it was
  called.
  """
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  shutil.copy(ROOT / "setup.cfg", tmp_path)
  for folder, extras in ((".venv", ("", "[test]", "[test,cuda]")), (".venv-hf", ("[hf]",))):
    (tmp_path / folder / "bin").mkdir(parents=True)
    (tmp_path / folder / "bin/python").write_text(
      f'#!/bin/sh\necho "{folder} JAX_PLATFORMS=$JAX_PLATFORMS $*"\n'
    )
    (tmp_path / folder / "bin/python").chmod(0o755)
    (tmp_path / folder / "pyvenv.cfg").touch()
    for extra in extras:
      shutil.copy(ROOT / "setup.cfg", tmp_path / folder / f"installed{extra}")

  def launch(name, *arguments, **environment):
    kept = {
      key: value
      for key, value in os.environ.items()
      if key not in ("JAX_PLATFORMS", "VENV", "PYTHON")
    }
    return run("bash", tmp_path / "launch" / name, *arguments, env=kept | environment)

  launch.folder = tmp_path
  return launch


@pytest.mark.parametrize(
  "arguments, platforms, workers",
  [
    ((), "cpu", True),
    (("-m", "slow"), "cpu", True),
    (("-m", "not gpu"), "cpu", True),
    (("tests/test_gpu.py", "-k", "gpu"), "cpu", True),
    (("-m", "gpu"), "", False),
    (("-mgpu", "-x"), "", False),
    (("tests", "-m", "slow and gpu"), "", False),
  ],
)
def test_tests_of_a_gpu_get_it_and_all_others_the_cpu(arguments, platforms, workers, launch):
  status, output = launch("test.sh", *arguments)
  options = " --numprocesses 2 --dist loadfile --no-loadscope-reorder" if workers else ""
  assert status == 0 and output.rstrip() == " ".join(
    [f".venv JAX_PLATFORMS={platforms} -m pytest{options}", *arguments]
  )


def test_a_changed_setup_cfg_is_installed_again_and_the_bare_environment_made_anew(launch):
  for path in (".venv/installed[test]", ".venv-hf/installed[hf]"):
    (launch.folder / path).write_text("older")
  (launch.folder / "python").write_text(
    '#!/bin/sh\ncase "$*" in -c*) echo 3.13 ;; *venv*) mkdir -p "$3/bin" && cp '
    f'{launch.folder}/.venv/bin/python "$3/bin" ;; esac\n'
  )
  (launch.folder / "python").chmod(0o755)
  (launch.folder / ".venv-hf/old").touch()
  status, output = launch("test.sh", PYTHON=str(launch.folder / "python"))
  installs = [line for line in output.splitlines() if "pip install" in line]
  assert status == 0 and [line.split()[-1] for line in installs] == [".[test]", ".[hf]"]
  assert not (launch.folder / ".venv-hf/old").exists()
  assert (launch.folder / ".venv-hf/installed[hf]").read_bytes() == (
    ROOT / "setup.cfg"
  ).read_bytes()
  status, output = launch("test.sh")
  assert status == 0 and "install" not in output


@pytest.mark.parametrize(
  "script, said",
  [
    (
      "#!/bin/sh\necho 3.10\n",
      "is Python 3.10: oel_jax runs on 3.11, 3.12 and 3.13; set PYTHON=/path/to/one of them",
    ),
    (
      "#!/bin/sh\necho 3.14\n",
      "is Python 3.14: oel_jax runs on 3.11, 3.12 and 3.13; set PYTHON=/path/to/one of them",
    ),
    (None, "does not run: set PYTHON=/path/to/python3.11, 3.12 or 3.13"),
  ],
)
@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_another_python_is_one_line(name, script, said, launch):
  python = launch.folder / "python"
  if script:
    python.write_text(script)
    python.chmod(0o755)
  status, output = launch(name, PYTHON=str(python), VENV=str(launch.folder / "new"))
  assert (status, output) == (2, f"error: {python} {said}\n") and not (
    launch.folder / "new"
  ).exists()


def test_a_folder_that_is_no_environment_is_left_alone(launch):
  (launch.folder / "python").write_text("#!/bin/sh\necho 3.12\n")
  (launch.folder / "python").chmod(0o755)
  (launch.folder / "mine").mkdir()
  (launch.folder / "mine/thesis").touch()
  status, output = launch(
    "quickstart.sh", PYTHON=str(launch.folder / "python"), VENV=str(launch.folder / "mine")
  )
  assert (status, output) == (
    2,
    f"error: {launch.folder}/mine is there and is no virtual environment\n",
  )
  assert (launch.folder / "mine/thesis").exists()


@pytest.fixture(name="shared")
def fixture_shared(launch):
  """A real environment, without pip, that says what pip says of an editable install."""
  folder = launch.folder / "shared environment"
  status, output = run(sys.executable, "-m", "venv", "--without-pip", folder)
  assert status == 0, output
  (site,) = folder.glob("lib/python*/site-packages")
  # A pip that is there, and says so where it is asked to install.
  (site / "pip.py").write_text("import sys\nprint('pip', *sys.argv[1:])\n")
  for extra in ("", "[test]"):
    shutil.copy(ROOT / "setup.cfg", folder / f"installed{extra}")

  def installed_from(checkout):
    (site / "oel_jax-0.1.0.dist-info").mkdir(exist_ok=True)
    record = {"dir_info": {"editable": True}, "url": pathlib.Path(checkout).as_uri()}
    (site / "oel_jax-0.1.0.dist-info/direct_url.json").write_text(json.dumps(record))
    return folder

  return installed_from


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_the_environment_of_another_checkout_is_refused(name, launch, shared, tmp_path_factory):
  other = tmp_path_factory.mktemp("other checkout")
  folder = shared(other)
  assert launch(name, VENV=str(folder)) == (
    2,
    f"error: {folder} has the oel_jax of {other}, and this is {launch.folder}: set VENV to a "
    f"folder of this checkout's own, or remove {folder} to have it made anew\n",
  )


def test_an_environment_whose_checkout_has_moved_is_installed_into_again(launch, shared):
  (launch.folder / "link").symlink_to(launch.folder)
  folder = shared(launch.folder / "link")  # this checkout by another name
  status, output = launch("quickstart.sh", VENV=str(folder))
  assert "No module named" in output and "installing" not in output
  folder = shared(launch.folder / "no longer here, 100%")
  status, output = launch("quickstart.sh", VENV=str(folder))
  assert f"installing oel_jax into {folder}" in output and "--editable ." in output


def test_without_a_gpu_its_tests_are_an_error_and_no_success():
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  status, output = run(
    sys.executable,
    "-m",
    "pytest",
    "-m",
    "gpu",
    "tests/test_attention.py",
    "-p",
    "no:cacheprovider",
    env=environment,
    cwd=ROOT,
  )
  assert (
    status == pytest.ExitCode.USAGE_ERROR
    and "need a GPU (-m gpu), but JAX finds none: its backend is cpu" in output
  )
