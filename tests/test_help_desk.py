"""The help desk: rules that nobody can guess, a judge that takes right answers only, feedback that
tells one rule at a time, and logs without the verdict.
"""

import collections
import itertools
import pathlib
import re
import subprocess
import sys

import pytest
from fakes import in_turns

from oel_jax import config as config_lib
from oel_jax.conversations import exporters, jsonl, logs
from oel_jax.conversations.schema import Message, transcript
from oel_jax.environments import Episode, Game, play, try_game
from oel_jax.environments import game_spec as spec_of
from oel_jax.environments import help_desk_cases as cases
from oel_jax.environments import help_desk_rules as rules
from oel_jax.environments.help_desk import HelpDesk
from oel_jax.evaluation.episodes import play_summary
from oel_jax.runtime import named


def test_the_experiments_configuration_plays_it():
  path = pathlib.Path(__file__).parents[1] / "experiments/help_desk.py"
  get_config = named.function(f"{path}:get_config", "--config")
  for size, kinds in (("all", set(rules.KINDS)), ("desk", {"desk"})):
    config = get_config(size)
    config_lib.validate(config)
    spec = spec_of(config.deployment)
    try_game(spec)
    known = HelpDesk(**config.deployment.game_args.to_dict()).rules
    assert {found.kind for found in known} == kinds
    assert episode(spec, 1, lambda said: follow(known, said))[0].ended == "passed"
  with pytest.raises(ValueError, match="has no size 'huge': it must be one of all, changing, desk"):
    get_config("huge")


def game_spec(**arguments):
  config = config_lib.default()
  with config.unlocked():
    config.deployment.update(
      environment="oel_jax.environments.help_desk:HelpDesk",
      player="",
      actions="",
      action_pattern=r"(?s)(.+)",
      max_turns=6,
    )
    config.deployment.game_args = arguments
  return spec_of(config.deployment)


def rule(kind, *values):
  return rules.Rule(kind, cases.TOPICS[0], values)


def follow(known, messages):
  """What a player says who knows every rule and recognises every case, and nothing else: `known` is
  the rules, `messages` the conversation's texts.
  """
  told = [text.rpartition("Customer: ")[2] for text in messages[::2]]
  found = [
    rule
    for rule, said in itertools.product(known, told)
    if any(words in said for words in rule.topic.training + rule.topic.held_out)
  ]
  if not found:
    return "What is it about?"
  kind, values = found[0].kind, found[0].values
  last = messages[-1]
  if kind == "lesson":
    return f"Please note: {values[0]}."
  if kind == "ask" and "Here you are" not in last:
    return f"Please give me the {values[0]}."
  if kind == "lookup":
    state = re.search(r"order [0-9]+ is (packed|sent)", last)
    if not state:
      return f"LOOK UP: {re.search('Order ([0-9]+)', messages[0])[1]}"
    return f"DESK: {values[rules.STATES.index(state[1])]}"
  verb = {"ask": "DESK", "desk": "DESK", "form": "FORM", "fact": "CODE"}[kind]
  return f"I see. {verb}: {values[1] if kind == 'ask' else values[0]}"


def episode(spec, seed, player):
  """Plays one episode with `player`, a function of the texts so far; returns its last step and all
  texts, the environment's and the player's in turn.
  """
  game = Game(spec, seed)
  said = [game.observation]
  while True:
    answer = player(said)
    step = game.play(f"[{' '.join(answer.split())}]" if answer else "")
    said += [answer, step.observation]
    if step.done:
      return step, said


def test_who_knows_the_rules_passes_every_case():
  for period in (0, 3):
    spec, known = game_spec(period=period), HelpDesk(period=period).rules
    ends = [episode(spec, seed, lambda said: follow(known, said))[0] for seed in range(200)]
    assert all(end.ended == "passed" for end in ends)
    assert {end.category for end in ends} >= set(rules.KINDS) - {"fact"}


def test_nobody_passes_more_than_by_chance_who_does_not_know():
  """Brute force: each answer that there is, given to all cases of many tables, by a player who
  always looks up first.
  """
  right, cases_of = collections.Counter(), collections.Counter()
  answers = [f"DESK: {name}" for name in rules.DESKS] + [f"FORM: {n}" for n in rules.FORMS]
  answers += [f"CODE: {word}" for word in rules.CODES] + list(rules.PHRASES)
  answers += ["", "I am sorry to hear that, we will look into it."]
  for seed in range(30):
    for found in rules.table(rules.KINDS, 24, 12, 0, seed, 0.25):
      cases_of[found.kind] += 1
      for answer in answers:
        right[found.kind, answer] += found.right(answer, state=rules.STATES[seed % 2])
  assert set(cases_of.values()) == {120}
  chances = {"desk": 12, "lookup": 12, "form": 88, "lesson": 12, "fact": 16}
  for kind, of in chances.items():
    passed = [right[kind, answer] for answer in answers]
    assert sum(passed) == 120  # each case has one right answer of them
    assert max(passed) < 4 + 1.5 * 120 / of, kind
  assert not any(right["ask", answer] for answer in answers)
  # Who asks first guesses what for, and then the desk.
  asked = [
    sum(found.asks(f"Your {question}?") for found in HelpDesk().rules)
    for question in rules.QUESTIONS
  ]
  assert sum(asked) == 4 and max(asked) == 1


def test_names_tell_nothing_of_the_rules():
  """Over many tables every topic has every kind, and every desk, about equally often."""
  kinds, desks = collections.Counter(), collections.Counter()
  for seed in range(600):
    for found in rules.table(rules.KINDS, 24, 12, 0, seed, 0.25):
      kinds[found.topic.title, found.kind] += 1
      if found.kind == "desk":
        desks[found.topic.title, found.values[0]] += 1
  assert len(kinds) == 24 * 6 and all(60 <= count <= 145 for count in kinds.values())
  assert len(desks) == 24 * 12 and max(desks.values()) <= 25  # 8.3 expected
  assert rules.table(rules.KINDS, 24, 12, 0, 5, 0.25) == rules.table(
    rules.KINDS, 24, 12, 0, 5, 0.25
  )


@pytest.mark.parametrize(
  "found, right, wrong",
  [
    (
      rule("desk", "Rowan"),
      [
        "DESK: Rowan",
        "This is late.\n\nIt goes to **rowan**.",
        "[ROWAN]",
        "Rowan, yes, desk Rowan",
      ],
      ["Alder", "Rowan or Alder", "Desk Rowan, and form 12", "", "Rowanberry", "Rowan, code OWL"],
    ),
    (
      rule("form", "27"),
      ["FORM: 27", "You get form 27.", "Form no. 27", "Use the form number 27, form 27!"],
      ["27", "form 127", "form 27 or form 28", "desk 27", "form 2 7", "Form 27 from Rowan"],
    ),
    (
      rule("fact", "HERON", "10"),
      ["CODE: HERON", "Take the code heron!", "HERON"],
      ["HERONRY", "OWL and HERON", "the code", "Heron, from desk Rowan"],
    ),
    (
      rule("lesson", "page nine", "discount"),
      ["See page nine.", "Page  Nine helps. DESK: Rowan", "PAGE\nNINE"],
      [
        "See page ten.",
        "Page nine, and no discount.",
        "page nine, the grey lid",
        "Discounts? page nine",
        "",
      ],
    ),
    (rule("ask", "photo", "Rowan"), [], ["DESK: Rowan", "Your photo?", ""]),
    (rule("lookup", "Rowan", "Alder"), [], ["DESK: Rowan", "DESK: Alder", "LOOK UP: 12345", ""]),
  ],
)
def test_the_judge(found, right, wrong):
  assert all(found.right(answer) for answer in right)
  assert not any(found.right(answer) for answer in wrong)


def test_the_judge_of_procedures():
  ask, lookup = rule("ask", "photo", "Rowan"), rule("lookup", "Rowan", "Alder")
  assert ask.right("DESK: Rowan", asked=True) and not ask.right("DESK: Alder", asked=True)
  assert lookup.right("DESK: Rowan", state="packed") and lookup.right("DESK: Alder", state="sent")
  assert not lookup.right("DESK: Rowan", state="sent")
  assert ask.asks("Could you send a PHOTO, please?") and ask.asks("photos, please")
  assert not ask.asks("Your photo and your receipt?") and not ask.asks("A photo. DESK: Rowan")
  assert not ask.asks("Any picture?") and not lookup.asks("A photo?")
  assert rules.looked_up("LOOK UP: 12345") == rules.looked_up("look-up: #12345.") == "12345"
  assert rules.looked_up("LOOK UP: 12345 DESK: Rowan") == rules.looked_up("12345") == ""


def find(kind, **arguments):
  """An episode of this kind of rule: the environment and what it said first."""
  for seed in itertools.count(0, 2):
    desk = HelpDesk(**dict(vague=0.0, complaint=0.0, silence=0.0) | arguments)
    said = desk.reset(seed)
    if desk.rule.kind == kind:
      return desk, said


def test_orders_are_looked_up_before_the_case_is_decided():
  desk, said = find("lookup")
  number = re.search("Order ([0-9]+)", said)[1]
  assert desk.step("LOOK UP: 1").observation == "Orders: there is no order 1."
  state = re.fullmatch(
    f"Orders: order {number} is (packed|sent).", desk.step(f"Look up: {number}").observation
  )[1]
  step = desk.step(f"DESK: {desk.rule.values[rules.STATES.index(state)]}")
  assert step.done and step.reward == 1.0 and step.outcome in step.observation
  desk, _ = find("lookup")
  for _ in range(2):
    assert not desk.step("LOOK UP: 1").done
  assert desk.step("LOOK UP: 1").observation.startswith("Back office: ")  # enough of it
  desk, said = find("desk", kinds=["desk", "form"])
  assert "LOOK UP" not in said and "CODE" not in said
  assert desk.step("LOOK UP: 1").observation.startswith("Back office: ")


def test_a_correction_is_answered_once_more_and_changes_no_verdict():
  desk, _ = find("ask")
  first = desk.step("DESK: Rowan FORM: 11")
  assert not first.done and first.observation == f"Back office: {desk.rule.text()}"
  last = desk.step(f"DESK: {desk.rule.values[1]}")
  assert last.done and last.reward == 0.0 and last.outcome
  desk, _ = find("desk", complaint=1.0, second_answer=False)
  last = desk.step("FORM: 11")
  assert last.done and last.outcome == "Customer: Form 11 is not for this."
  desk, _ = find("desk", complaint=1.0)
  desk.step("")
  assert desk.step("no idea") == type(last)("", True, 0.0, "", "", "desk")


def test_silence_says_nothing_of_the_verdict():
  """An episode in which nobody says anything to a wrong answer is silent to the right one, too."""
  quiet = 0
  for seed in range(0, 800, 2):
    ends = []
    for right in (True, False):
      desk = HelpDesk(kinds=["desk"], vague=0.0, silence=0.3)
      desk.reset(seed)
      step = desk.step(f"DESK: {desk.rule.values[0] if right else 'none'}")
      ends.append(step.done and step.outcome == "")
    assert ends[0] == ends[1]
    quiet += ends[0]
  assert 0.23 < quiet / 400 < 0.37


def test_feedback_tells_the_rule_of_its_case_and_no_other():
  """Whatever is answered wrongly, and however often; desks have
  one name for many cases.
  """
  known = HelpDesk().rules
  words = {word for found in known for word in found.values[:1] if found.kind != "lookup"}
  secrets = words - set(rules.DESKS)
  spec = game_spec(complaint=0.0, silence=0.0)
  for seed in range(0, 240, 2):
    desk = HelpDesk()
    desk.reset(seed)
    for answer in ("DESK: Rowan FORM: 5", "No idea.", "CODE: none"):
      _, said = episode(spec, seed, lambda said: answer)
      heard = "\n".join(said[::2])
      assert f"Back office: {desk.rule.text()}" in heard
      told = {
        word for word in secrets if re.search(rf"\b{word}\b", heard.split("Customer: ", 1)[1])
      }
      assert told <= set(desk.rule.values) | {"receipt", "postcode"}, heard  # customers' own words
      assert not told & {*rules.PHRASES, *rules.CODES} - set(desk.rule.values)


def test_held_out_episodes_use_words_of_their_own():
  groups = [
    [(topic.training, topic.held_out) for topic in cases.TOPICS],
    [(cases.FRAMES, cases.HELD_OUT_FRAMES), (cases.OPENINGS, cases.HELD_OUT_OPENINGS)],
  ]
  for pairs in groups:
    said = [words.casefold() for pair in pairs for part in pair for words in part]
    assert len(said) == len(set(said))
  assert all(len(topic.training) >= 8 and len(topic.held_out) >= 4 for topic in cases.TOPICS)
  titles = {topic.title for topic in cases.TOPICS}
  assert len(titles) == len(cases.TOPICS) == 24
  seen = collections.defaultdict(set)
  for seed in range(3000):
    desk = HelpDesk(vague=0.0)
    said = desk.reset(seed).rpartition("Customer: ")[2]
    own, others = (desk.rule.topic.training, desk.rule.topic.held_out)[:: -1 if seed % 2 else 1]
    assert any(words in said for words in own) and not any(words in said for words in others)
    seen[seed % 2].add((desk.rule.topic.title, desk.rule.values))
  assert seen[0] == seen[1]  # the rules are the same for both


def test_the_same_seed_is_the_same_episode():
  told = []
  for seed in range(30):
    first, second = (
      episode(game_spec(vague=0.5), seed, lambda said: f"DESK: {rules.DESKS[seed % 12]}")
      for _ in range(2)
    )
    assert first == second
    told.append(first[1][0])
  assert len(set(told)) == 30


def test_a_period_changes_the_rules_that_it_names_and_no_others():
  for seed in range(20):
    before = HelpDesk(rules_seed=seed).rules
    assert not any(found.changed for found in before)
    for period in (1, 2, 3):
      after = HelpDesk(rules_seed=seed, period=period).rules
      assert [found.topic for found in after] == [found.topic for found in before]
      assert [found.kind for found in after] == [found.kind for found in before]
      for old, new in zip(before, after):
        assert (old.values != new.values) == new.changed
        assert new.changed or new.kind != "fact"
        if new.changed and new.kind != "fact":
          assert new.values[0] != old.values[0]
      facts = [found for found in after if found.kind == "fact"]
      assert all(found.values[1] == str(10 * (period + 1)) for found in facts)
      assert sum(found.changed for found in after) == len(facts) + 5  # a quarter of the other 20
      before = after
    fixed = HelpDesk(rules_seed=seed, period=3, change=0.0, kinds=["desk", "form"]).rules
    assert not any(found.changed for found in fixed)
  weeks = {
    int(re.search(r"week (\d+)\)", HelpDesk(period=2).reset(seed))[1]) for seed in range(300)
  }
  assert weeks == set(range(21, 31))


@pytest.mark.parametrize(
  "arguments, told",
  [
    (dict(kinds=[]), "kinds is ()"),
    (dict(kinds=["desk", "desk"]), "each once"),
    (dict(kinds=["oracle"]), "must be some of"),
    (dict(topics=25), "topics is 25: it must be a whole number from 6 to 24"),
    (dict(desks=2), "desks is 2"),
    (dict(period=-1), "period is -1"),
    (dict(rules_seed=1.5), "rules_seed is 1.5"),
    (dict(vague=2), "vague is 2: it must be a number from 0 to 1"),
    (dict(silence=0.5, complaint=0.6), "complaint is 0.6: it must be a number from 0 to 0.5"),
    (dict(second_answer=1), "second_answer is 1: it must be True or False"),
  ],
)
def test_arguments_that_cannot_be_are_refused(arguments, told):
  with pytest.raises(ValueError, match=re.escape(told)):
    HelpDesk(**arguments)
  with pytest.raises(ValueError, match="config.deployment.environment is"):
    Game(game_spec(**arguments), 0)


class Desk:
  """A policy that follows the rules in every second case; a token is a whole text."""

  def __init__(self, known):
    self.known, self.texts, self.tokenizer = known, [], self

  def chat(self, messages, *, tools=(), thinking):
    return self.put([message.content for message in messages])

  def put(self, what):
    self.texts.append(what)
    return [len(self.texts) - 1]

  def split_response(self, ids, thinking):
    return "", self.texts[ids[0]]

  @in_turns
  def sample(self, prompts, seeds, **how):
    said = [self.texts[prompt[0]] for prompt in prompts]
    return [
      self.put(follow(self.known, texts) if len(texts[0]) % 2 else "I cannot\nsay.\ud800")
      for texts in said
    ]


@pytest.fixture(name="played", scope="module")
def fixture_played():
  spec, policy = game_spec(period=1), Desk(HelpDesk(period=1).rules)
  try_game(spec)
  episodes = [Episode(f"e{seed}", seed, 0) for seed in range(200)]
  how = dict(sampling=None, max_response_tokens=9, max_prompt_tokens=9, slots=8, thinking=False)
  return play(policy, spec, episodes=episodes, **how)


def test_the_player_reads_the_desks_own_words_and_the_desk_the_whole_answer(played):
  assert all(game.messages[0].content.startswith("You work at the help desk") for game in played)
  assert {len(game.answers) for game in played} == {1, 2, 3}
  assert 60 < sum(game.passed for game in played) < 140
  assert {game.ended for game in played} == {"passed", "lost"}


def test_passed_cases_are_counted_by_kind_of_rule(played):
  found = play_summary(played)["categories"]
  assert sum(share["of"] for share in found.values()) == len(played)
  assert sum(share["hits"] for share in found.values()) == sum(game.passed for game in played)
  assert {"fact, changed", "desk", "lookup"} <= set(found) and "fact" not in found
  for game in played:
    desk = HelpDesk(period=1)
    desk.reset(game.source.seed)
    assert game.source.category == desk.rule.category


@pytest.mark.parametrize("text, told", [(None, "No such file"), ("no JSON\n", "1 of 1 lines")])
def test_a_file_that_is_no_log_is_told_in_one_line(tmp_path, text, told):
  file = tmp_path / "games.jsonl"
  if text is not None:
    file.write_text(text)
  [line] = exported(file, tmp_path / "log.jsonl")
  assert told in line and "games.jsonl" in line and not (tmp_path / "log.jsonl").exists()


def test_a_log_takes_no_conversations_place(played, tmp_path):
  file = tmp_path / "games.jsonl"
  jsonl.write_jsonl(file, played[:2])
  before = file.read_bytes()
  [line] = exported(file, tmp_path / "../" / tmp_path.name / "games.jsonl")
  assert "would take the place" in line and file.read_bytes() == before
  [line] = exported(file, tmp_path / "nowhere/log.jsonl")
  assert "could not write" in line and "nowhere/log.jsonl" in line


def exported(file: pathlib.Path, log: pathlib.Path) -> list[str]:
  """The errors of the command, which fails; in one line, it should be."""
  command = [sys.executable, "-m", "oel_jax.conversations.exporters", file, log]
  ran = subprocess.run(command, capture_output=True, text=True)
  assert ran.returncode == 1 and "Traceback" not in ran.stderr
  return [line for line in ran.stderr.splitlines() if line.startswith("error: ")]


def test_logs_hold_what_was_said_and_no_verdict(played, tmp_path):
  path = tmp_path / "logs.jsonl"
  exporters.write_log(path, played)
  read = list(logs.read(path, logs.Counts()))
  clean = lambda text: text.replace("\ud800", "?")
  for game, log in zip(played, read, strict=True):
    assert log.id == game.id and log.source.kind == "log" and log.source.seed is None
    said = tuple(Message(message.role, clean(message.content)) for message in game.messages)
    assert log.messages == said
    assert log.feedback == (game.outcome or None)
    assert log.reward is log.passed is log.ended is log.outcome is log.source.category is None
    assert "End of game" not in transcript(log)
  text = path.read_text()
  for hidden in ("passed", "reward", "score", "lost", "seed", "category", "changed", "action"):
    assert f'"{hidden}' not in text
