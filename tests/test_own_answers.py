"""How sure a policy is of its own answers to held-out games, against sums over the vocabulary by
hand; and where it is told.
"""

import json

import numpy as np
from test_changed_runs import Player
from test_report import Seen, count, play
from test_unrelated import (  # noqa: F401
  LIMIT,
  TEMPERATURE,
  fixture_base,
  fixture_run,
  log_probabilities,
  moved,
)

from oel_jax.conversations.schema import Conversation, Message, Source
from oel_jax.policy.sampling.sampler import Sampling
from oel_jax.report import page, plots, records
from oel_jax.report import results as results_lib
from oel_jax.runtime.seeds import derive
from oel_jax.stages import own_answers
from oel_jax.stages.evaluate import evaluate
from oel_jax.stages.run import Meter, Run

K = 5
ASKED = ("Which way?", "And now, which way is it?", "Where to?")
TURNS = (Message("assistant", "up"), Message("user", "No."))
GAMES = [
  Conversation(f"g{i}", (Message("user", said), *TURNS), Source("game", "lake"))
  for i, said in enumerate(ASKED)
]


def test_entropy_and_mass_are_those_of_sums_over_the_vocabulary(run):
  run.config.evaluation.own_answers = 2  # of three games
  run.config.consolidation.k = K
  policy = moved(run.base)
  meter = Meter(policy)
  found = own_answers.measure(run, policy, GAMES, meter)
  prompts = [
    list(policy.tokenizer.chat([Message("user", said)], thinking=run.config.policy.thinking))
    for said in ASKED[:2]
  ]
  answers = policy.sample(
    prompts,
    [derive(run.config.seed, 0, "held out", i) for i in range(2)],
    sampling=Sampling(TEMPERATURE),
    max_new_tokens=LIMIT,
  )
  whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
  entropy, mass, kl = [], [], []
  both = (log_probabilities(one, whole) for one in (policy, run.base))
  for prompt, row, of, base in zip(prompts, whole, *both, strict=True):
    said = slice(len(prompt) - 1, len(row) - 1)
    entropy += list(-(np.exp(of) * of).sum(-1)[said])
    mass += list(np.sort(np.exp(of), -1)[:, -K:].sum(-1)[said])
    kl += list((np.exp(of) * (of - base)).sum(-1)[said])
  right = {"entropy": entropy, "topk_mass": mass, "kl": kl}
  for name, values in right.items():
    np.testing.assert_allclose(found[name], np.mean(values), rtol=1e-4, err_msg=name)
  assert (found["prompts"], found["k"]) == (2, K)
  assert meter.tokens == sum(map(len, answers))


def test_nothing_is_measured_where_nothing_is_asked_for(run):
  assert run.config.evaluation.own_answers == 0
  assert own_answers.measure(run, run.base, GAMES, Meter(run.base)) is None


def test_it_is_measured_on_the_held_out_games_and_again_where_other_ones_count(
  run, tmp_path, monkeypatch
):
  asked = []

  def measure(run, policy, games, meter):
    asked.append([game.id for game in games])
    return {"prompts": 2, "entropy": 0.5, "k": K, "topk_mass": 0.9, "kl": 0.25}

  monkeypatch.setattr(own_answers, "measure", measure)
  run.config.evaluation.update(unrelated="", own_answers=2, episodes=3)
  player = Player()
  this = Run(run.config, tmp_path, run.metrics, None, player)
  for number in (2, 2, 1):
    run.config.evaluation.own_answers = number
    evaluate(this, 0, player, player, [])
  assert asked == [[f"r0-without-0000{i}" for i in range(3)]] * 2
  found = json.loads((tmp_path / "round_0/evaluation.json").read_text())
  assert found["own_answers"]["entropy"] == 0.5
  line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
  assert (line["own_entropy"], line["own_topk_mass"], line["own_kl"]) == (0.5, 0.9, 0.25)


def test_the_report_tells_every_round_that_has_it(tmp_path):
  for number in range(4):
    (tmp_path / f"round_{number}").mkdir()
    found = {"schema": 1, "round": number, "without": play(5, 10, 50.0)}
    found |= {"retention": {"worlds": count(9, 10)}, "first_knowledge": play(6, 10, 50.0)}
    sure = {"prompts": 64, "entropy": 0.5 / 2**number, "k": 256, "topk_mass": 0.9, "kl": 0.125}
    found |= {"own_answers": sure if number < 3 else None}
    (tmp_path / f"round_{number}/evaluation.json").write_text(json.dumps(found))
  run = records.read(tmp_path)
  results = results_lib.summarize(run)
  assert results["base"]["own_answers"]["entropy"] == 0.5
  assert [entry["own_answers"] for entry in results["rounds"]][2] is None
  rows = results_lib.rows(results)
  assert [row.get("entropy") for row in rows] == ["0.5000", "0.2500", "0.1250", None]
  assert rows[0]["top-256 mass %"] == "90.0"
  text = Seen(page.render(run, {}, {})).text
  assert "How sure it is of its own answers" in text and "Round 1640.250090.00%0.1250" in text
  assert plots.draw(run, plots.LIGHT)["rounds"].startswith(b"\x89PNG")
  curves = plots._by_round(
    sorted(run.evaluations.items()), {"x": lambda one: one.own_answers and 1}
  )
  assert curves == {"x": [(0, 1), (1, 1), (2, 1)]}
