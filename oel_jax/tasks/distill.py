"""Consolidation alone: a text that you have, on prompts that you have; no game, no extraction.

OPCD (arXiv 2602.12275) is this with a system prompt. The text stands behind the system text of the
teacher's prompts. Measured before, with the text in context, and after, on prompts held out: the
share of answers of the wanted form, response length, and on unrelated prompts the divergence from
the model as it was.

Of several processes the first runs the story; all take part in its sampling and training
(`runtime.together`).
"""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from oel_jax import choices, report
from oel_jax import config as config_lib
from oel_jax.consolidation import batch as batch_lib
from oel_jax.consolidation import placement, restore, trainer
from oel_jax.consolidation import step as step_lib
from oel_jax.consolidation import task as task_lib
from oel_jax.consolidation import teacher as teacher_lib
from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.importers import read_check, read_prompts, read_text
from oel_jax.conversations.schema import KNOWLEDGE, Message, Prompt
from oel_jax.evaluation import statistics
from oel_jax.policy import load
from oel_jax.policy.sampling.sampler import Policy, Sampling
from oel_jax.policy.sampling.sizes import PREFILL_LENGTHS, bucket
from oel_jax.report import distilled
from oel_jax.runtime import files, finite, mesh, mirror, progress, schema, together
from oel_jax.runtime.checksum import fingerprint
from oel_jax.runtime.manifest import differing
from oel_jax.runtime.metrics import Metrics
from oel_jax.runtime.seeds import derive
from oel_jax.runtime.workdir import opened

CHECKPOINTS = "round_1/checkpoints"
default = config_lib.default_distill


def run(config: Any, workdir: str, *, resume_anyway: bool = False) -> dict[str, Any]:
  """Trains the text into the weights, going on with what is in `workdir`; prints and returns what
  results.json holds. Of several processes the first one calls it, the others `follow`.

  Returns:
    "base", "in_context" and "after", each with "obeys", "content" if it is judged,
    "response_tokens" and "cut", the share that config.deployment.max_response_tokens ended;
    "recovered", the share of the gain in context that the weights now hold;
    "unrelated_kl", KL(after ‖ base) in nats a token on the base's answers to the unrelated prompts;
    "choices", of `choices.choose`.

  Raises:
    ValueError: the configuration is wrong or differs from the run's, a file holds no prompts, or a
      prompt is too long.
    OSError: a file is missing, another process runs in `workdir`, or it cannot be written.
  """
  config_lib.validate(config, default())
  mirror.check(config.mirror, workdir)
  devices = mesh.make_mesh(config.mesh)
  text, prompts = _read(config)
  checks, held_out = _read_checks(config.distill), read_prompts(config.distill.held_out, "held_out")
  for check in checks.values():
    # A model may say nothing; and a check that cannot run shows before anything is sampled.
    check(held_out[0].messages[-1].content, "")
  unrelated = (
    read_prompts(config.distill.unrelated, "unrelated") if config.distill.unrelated else []
  )
  policy, task = _load(config, devices, text, prompts)
  placement.unroll(config.consolidation, policy, devices)
  _warn_of_few(len(held_out))
  _check_lengths(config, policy, held_out, text, "held_out")
  _check_lengths(config, policy, unrelated, None, "unrelated")
  sizes = dict(texts=len(task.knowledge), tokens=max(map(len, task.knowledge)))
  chosen = choices.choose(config, policy, devices, **sizes, exact=True)
  with opened(config, workdir, resume_anyway) as folder, Metrics(folder, config) as metrics:
    with together.leading(**_shared(config, devices, policy, task, metrics)):
      _check(config, folder)
      _check_inputs(folder, task, policy)
      choices.tell(folder, chosen)  # a run that is refused changes no file

      def measure(name: str, player: Policy, given: str | None) -> dict[str, Any]:
        return _measure(config, player, checks, held_out, given, folder / f"{name}.json")

      result = {"schema": 1, "base": measure("base", policy, None)}
      result["in_context"] = measure("in_context", policy, text)
      with progress.bar("consolidate", config.consolidation.steps, metrics.compiles) as advance:
        advance = mirror.with_checkpoints(config.mirror, folder, folder / CHECKPOINTS, advance)
        params = _train(config, task, policy, folder, devices, metrics, advance)
      result["after"] = measure("after", policy.replace(params), None)
      rates = [result[name]["obeys"]["rate"] for name in ("after", "base", "in_context")]
      result["recovered"] = statistics.recovered(*rates)
      result["unrelated_kl"] = (
        _unrelated_kl(config, policy, params, unrelated, devices) if unrelated else None
      )
      result["choices"] = chosen
      files.write_json(folder / "results.json", result)
      report.write(folder)
  _tell(result, folder)
  return result


def follow(config: Any, workdir: str) -> None:
  """What all processes but the first do: their part of what process 0 calls, until its end.

  Raises:
    ValueError: as `run`.
    OSError: a file is missing here.
  """
  config_lib.validate(config, default())
  devices = mesh.make_mesh(config.mesh)
  policy, task = _load(config, devices, *_read(config))
  with Metrics(files.local(workdir, "--workdir"), config) as metrics:  # which writes nothing here
    together.follow(**_shared(config, devices, policy, task, metrics))


def _read(config: Any) -> tuple[str, list[Prompt]]:
  """The text, without the line ends around it, which are the file's, and the prompts."""
  text = read_text(config.distill.knowledge, "knowledge").strip("\n")
  if not text.strip():
    raise ValueError(f"config.distill.knowledge: {config.distill.knowledge} is empty")
  return text, read_prompts(config.distill.prompts, "prompts")


def _load(
  config: Any, devices: Mesh, text: str, prompts: Sequence[Prompt]
) -> tuple[Policy, task_lib.Task]:
  """The policy on the mesh, and what its training draws from."""
  policy = load.load_policy(
    config_lib.policy(config),
    devices,
    response_tokens=config.deployment.max_response_tokens,
    sample_tensor=config.mesh.sample_tensor,
    narrow=config.consolidation.lora_rank > 0,
  )
  task = task_lib.make_task(
    policy.tokenizer,
    prompts,
    [text],
    seed=config.seed,
    round=1,
    thinking=config.policy.thinking,
    limit=config.policy.max_prompt_tokens,
    message=_knowledge,
  )
  return policy, task


def _shared(
  config: Any, devices: Mesh, policy: Policy, task: task_lib.Task, metrics: Metrics
) -> dict[str, Any]:
  """What each process has of its own, by the names that stand for it in calls."""
  named = dict(config=config, mesh=devices, policy=policy, task=task, metrics=metrics)
  return named | {"base": policy.params}


@together.everywhere
def _check_inputs(folder: pathlib.Path, task: task_lib.Task, policy: Policy) -> None:
  restore.check_inputs(folder / CHECKPOINTS, task, policy)


@together.everywhere
def _train(
  config: Any,
  task: task_lib.Task,
  policy: Policy,
  folder: pathlib.Path,
  devices: Mesh,
  metrics: Metrics,
  advance: Callable[..., None] | None,
) -> Any:
  """The parameters after config.consolidation.steps, going on from the newest checkpoint; `advance`
  is None in all processes but the first.
  """
  params, _ = trainer.consolidate(
    config.consolidation,
    task,
    policy,
    limit=config.deployment.max_response_tokens,
    directory=folder / CHECKPOINTS,
    mesh=devices,
    metrics=metrics,
    advance=advance or (lambda n, note="": None),
  )
  together.share(together.WEIGHTS, params)
  return params


def _tell(result: dict[str, Any], folder: pathlib.Path) -> None:
  rows = [_row(name, result[name]) for name in ("base", "in_context", "after")]
  progress.table(rows, str(folder))
  recovered, kl = result["recovered"], result["unrelated_kl"]
  share = "–" if recovered is None else f"{100 * recovered:.0f}%"
  moved = "–" if kl is None else f"{kl:.4g} nats a token"
  print(f"recovered: {share}, KL to the base on unrelated prompts: {moved}")
  print(f"report: {folder / 'report' / 'index.html'}", flush=True)


def _read_checks(config: Any) -> dict[str, Callable[[str, str], bool]]:
  """The user's checks of an answer, by what they say of it; each is given the prompt's last message
  and the answer.

  Raises:
    ValueError: one cannot be read.
    OSError: a file is missing.
  """
  form = read_check(config.obeys)
  checks = {"obeys": lambda prompt, answer: form(answer)}
  if config.content:
    checks["content"] = read_check(config.content, "content")
  return checks


def _warn_of_few(prompts: int) -> None:
  """Warns where a share of so many held-out prompts has an interval that says little."""
  half = lambda of: 50 * float(np.diff(statistics.count(of // 2, of)["interval"])[0])
  if half(prompts) > 100 * distilled.FEW:
    others = ", ".join(f"{of} prompts make ± {half(of):.0f}" for of in (100, 400))
    logging.warning(
      "config.distill.held_out: %d prompts are few: a share of half of them has a 95%% interval of "
      "± %.0f points (%s)",
      prompts,
      half(prompts),
      others,
    )


def _check(config: Any, folder: pathlib.Path) -> None:
  """Reads what is in the directory, before any work is done, and sets aside what was measured of
  weights that will be trained on.

  Raises:
    ValueError: a file is damaged; names it and the field.
  """
  for name in ("base", "in_context", "after"):
    if (folder / f"{name}.json").exists():
      files.read_json(folder / f"{name}.json", distilled.measurement)
  steps, planned = restore.steps_done(folder / CHECKPOINTS), config.consolidation.steps
  for name in ("after.json", "results.json") if 0 < steps < planned else ():
    files.set_aside(
      folder / name,
      f"config.consolidation.steps is {planned}, the weights have been trained for {steps}",
    )


def _knowledge(text: str) -> Message:
  return Message(KNOWLEDGE, text)


def _prompts(
  config: Any, policy: Policy, prompts: Sequence[Prompt], text: str | None
) -> list[list[int]]:
  known, thinking = _knowledge(text) if text else None, config.policy.thinking
  return [prompt_lib.ids(policy.tokenizer, p.messages, known, thinking=thinking) for p in prompts]


def _check_lengths(
  config: Any, policy: Policy, prompts: Sequence[Prompt], text: str | None, field: str
) -> None:
  """Raises ValueError if one of the prompts of config.distill.`field`, behind the text if there is
  one, is over the limit.
  """
  limit = config.policy.max_prompt_tokens
  for prompt, ids in zip(prompts, _prompts(config, policy, prompts, text), strict=True):
    if len(ids) > limit:
      raise ValueError(
        f"config.policy.max_prompt_tokens is {limit}, but prompt {prompt.id} of "
        f"config.distill.{field} has {len(ids)} tokens"
        f"{' with the text' if text else ''}: raise it, or shorten prompt or text"
      )


def _answers(
  config: Any, policy: Policy, prompts: Sequence[Prompt], text: str | None, stage: str
) -> list[list[int]]:
  how = config.evaluation
  return policy.sample(
    _prompts(config, policy, prompts, text),
    [derive(config.seed, stage, i) for i in range(len(prompts))],
    sampling=Sampling(how.temperature, how.top_p, how.top_k),
    max_new_tokens=config.deployment.max_response_tokens,
  )


def _measure(
  config: Any,
  policy: Policy,
  checks: dict[str, Callable[[str, str], bool]],
  prompts: Sequence[Prompt],
  text: str | None,
  path: pathlib.Path,
) -> dict[str, Any]:
  """Answers to the held-out prompts, kept in `path`, and what they are like; measured anew where
  weights or texts are not the present ones.
  """
  how = config.evaluation
  settings = [
    config.seed,
    how.temperature,
    how.top_p,
    how.top_k,
    config.deployment.max_response_tokens,
    config.policy.thinking,
  ]
  made_from = {
    "weights": fingerprint(policy.params),
    "prompts": schema.digest(_prompts(config, policy, prompts, text)),
    "settings": schema.digest(settings),
  }
  for name in checks:
    file, _, function = config.distill[name].rpartition(":")
    made_from[name] = schema.digest([files.sha256(pathlib.Path(file).expanduser()), function])
  if path.exists():
    found = files.read_json(path, distilled.measurement)
    changed = differing(found.get("made_from"), made_from)
    if not changed:
      return found["measured"]
    files.set_aside(path, f"it was measured with other {', '.join(changed)}")
  sampled = _answers(config, policy, prompts, text, "held out")
  answers = [
    policy.tokenizer.split_response(ids, thinking=config.policy.thinking)[1] for ids in sampled
  ]
  kept = [
    {"prompt": prompt.messages[-1].content, "answer": answer}
    for prompt, answer in zip(prompts, answers, strict=True)
  ]
  measured = {
    name: statistics.count(sum(check(one["prompt"], one["answer"]) for one in kept), len(kept))
    for name, check in checks.items()
  }
  sizes, limit = [len(ids) for ids in sampled], config.deployment.max_response_tokens
  measured["response_tokens"] = statistics.mean(sizes)
  measured["cut"] = statistics.count(sum(size >= limit for size in sizes), len(sizes))
  files.write_sealed(
    path, {"schema": 1, "made_from": made_from, "measured": measured, "answers": kept}
  )
  return measured


@together.everywhere
def _unrelated_kl(
  config: Any, base: Policy, params: Any, unrelated: Sequence[Prompt], devices: Mesh
) -> float:
  """KL(after ‖ base) a token at temperature 1, on the base's own answers to unrelated prompts.

  Raises:
    NotFiniteError: it is not finite on some of them.
  """
  prompts = _prompts(config, base, unrelated, None)
  responses = _answers(config, base, unrelated, None, "unrelated")
  rows = config.deployment.max_response_tokens
  length = bucket(max(map(len, prompts)), PREFILL_LENGTHS) + rows
  teacher = teacher_lib.prepare(base.params, base.architecture, [()], dtype=base.dtype)
  probe = step_lib.make_probe(
    base.architecture,
    k=1,
    temperature=1.0,
    chunk=config.consolidation.chunk,
    dtype=base.dtype,
    mesh=devices,
  )
  total = count = 0.0
  for start in range(0, len(prompts), 16):
    part = slice(start, start + 16)
    made = batch_lib.assemble(
      prompts[part],
      [0] * len(prompts[part]),
      responses[part],
      pad_id=base.tokenizer.pad_id,
      length=length,
      response_length=rows,
      pack=False,
    )
    tokens = float(made.mask.sum())
    placed = mesh.pad_batch(made, devices, multiple=16)  # one shape for all
    placed = mesh.put(placed, mesh.batch_sharding(devices))
    kl = float(jax.device_get(probe(params, teacher, placed))["kl"])
    if not math.isfinite(kl):
      raise finite.NotFiniteError(
        f"config.distill.unrelated: the divergence from the base is {kl} on the prompts "
        f"{finite.listed([prompt.id for prompt in unrelated[part]])}: one of the two models gives "
        "numbers that are none there; nothing was written to results.json"
      )
    total += tokens * kl
    count += tokens
  return total / count


def _row(name: str, measured: dict[str, Any]) -> dict[str, Any]:
  obeys, low, high = (100 * x for x in (measured["obeys"]["rate"], *measured["obeys"]["interval"]))
  row = {"": name, "obeys % (interval)": f"{obeys:.1f} [{low:.1f}, {high:.1f}]"}
  if "content" in measured:
    row["content %"] = 100 * measured["content"]["rate"]
  row["response tokens"] = measured["response_tokens"]["mean"]
  if "cut" in measured:  # in files of before it was counted it is not
    row["cut %"] = 100 * measured["cut"]["rate"]
  return row
