"""The help desk's rules can be learned, each kind of them: who has them in words passes all its
cases, who has none passes none, and what a desk says in a deployment becomes those words.
"""

import collections
import itertools
import pathlib
import re

import pytest
from fakes import in_turns

from oel_jax.conversations.schema import KNOWLEDGE, ToolCall
from oel_jax.environments import Episode, changes, game_spec, play
from oel_jax.environments import help_desk_cases as cases
from oel_jax.environments import help_desk_rules as rules
from oel_jax.environments.help_desk import LOOK_UP, HelpDesk
from oel_jax.evaluation.episodes import play_summary
from oel_jax.extraction import provenance
from oel_jax.extraction.extract import extract
from oel_jax.extraction.prompts import ITEM_MARK
from oel_jax.runtime import named

HOW = dict(
  sampling=None,
  max_response_tokens=99,
  max_prompt_tokens=9999,
  slots=16,
  thinking=False,
  wording="conversations",
)
# What a player takes from a rule's words: the kind of rule, and what it says.
WORDS = {
  "desk": r"go to desk (\w+)",
  "form": r"get form (\d+)",
  "lesson": r'are told "([^"]+)", and nothing of a (\w+)',
  "ask": r"are first asked for the ([\w ]+), and with it go to desk (\w+)",
  "lookup": r"are first looked up \((.+)\), and go to desk (\w+) if the order is packed, to desk "
  r"(\w+) if it is sent",
  "fact": r"get the code (\w+) until week (\d+)",
}


def configuration(size):
  path = pathlib.Path(__file__).parents[1] / "experiments/help_desk.py"
  return named.function(f"{path}:get_config", "--config")(size)


class Reader:
  """A policy that recognises each kind of case, follows what its knowledge says of it, and knows
  nothing else; a token is a whole text or call.
  """

  def __init__(self):
    self.texts, self.tokenizer = [], self

  def put(self, what):
    self.texts.append(what)
    return [len(self.texts) - 1]

  def chat(self, messages, *, tools=(), thinking=True):
    return self.put((tuple(messages), tools))

  def split_response(self, ids, thinking, tools=False):
    return "", self.texts[ids[0]]

  @in_turns
  def sample(self, prompts, seeds, **how):
    return [self.put(self.answer(*self.texts[prompt[0]])) for prompt in prompts]

  def answer(self, messages, tools):
    knowledge = messages[0].content if messages[0].role == KNOWLEDGE else ""
    said = [message.content for message in messages if message.role != KNOWLEDGE]
    found = [topic for topic in cases.TOPICS if _speaks_of(topic, " ".join(said[::2]))]
    for topic, (kind, words) in itertools.product(found, WORDS.items()):
      rule = rf"Cases of the kind '{re.escape(topic.title)}' {words}\."
      if known := re.search(rule, knowledge):
        return self.follow(kind, known.groups(), said)
    return "I am sorry to hear that. What is it about?"

  def follow(self, kind, values, said):
    if kind == "lesson":
      return f"Please note: {values[0]}."
    if kind == "ask":
      given = "Here you are" in said[-1]
      return f"You go to desk {values[1]}." if given else f"May I have the {values[0]}?"
    if kind == "lookup":
      number = re.search("Order ([0-9]+)", said[0])[1]
      if state := re.search(rf"order {number} is (packed|sent)", said[-1]):
        return f"Desk {values[1 + rules.STATES.index(state[1])]}, please."
      tool = f'<tool_call>{{"name": "{LOOK_UP}", "arguments": {{"order": "{number}"}}}}</tool_call>'
      return tool if values[0] == f"with {LOOK_UP}" else f"LOOK UP: {number}"
    return {"desk": "To desk {}.", "form": "Take form {}.", "fact": "Your code is {}."}[
      kind
    ].format(values[0])


def _speaks_of(topic, said):
  return any(words in said for words in topic.training + topic.held_out)


def passed(size, knowledge, period=0, **arguments):
  """Share passed by category, of 120 held-out cases played with this knowledge."""
  config = configuration(size)
  with config.unlocked():
    config.deployment.game_args.update(dict(period=period) | arguments)
  episodes = [Episode(f"e{seed}", seed, 0, knowledge) for seed in range(1, 240, 2)]
  played = play(Reader(), game_spec(config.deployment), episodes=episodes, **HOW)
  found = play_summary(played)["categories"]
  return {name: share["rate"] for name, share in found.items()}


def items(known, tool=""):
  return "\n".join(f"{ITEM_MARK} {rule.text(tool)}" for rule in known)


@pytest.mark.parametrize("tool", [False, True], ids=["line", "tool"])
@pytest.mark.parametrize("period", [0, 2])
def test_who_has_the_rules_in_words_passes_every_case_of_every_kind(period, tool):
  known = HelpDesk(period=period, tool=tool).rules
  found = passed("all", items(known, LOOK_UP if tool else ""), period, tool=tool)
  assert {name.partition(",")[0] for name in found} == set(rules.KINDS)
  assert set(found.values()) == {1.0}


def test_who_has_none_passes_none_and_one_kind_helps_with_no_other():
  assert set(passed("all", "").values()) == {0.0}
  known = HelpDesk().rules
  for kind in rules.KINDS:
    found = passed("all", items(rule for rule in known if rule.kind == kind))
    assert found == {name: float(name == kind) for name in rules.KINDS}


def test_the_rules_of_before_are_right_where_nothing_changed_and_nowhere_else():
  found = passed("all", items(HelpDesk().rules), period=1)
  assert {name: share for name, share in found.items() if "changed" in name} == {
    name: 0.0 for name in found if "changed" in name
  }
  assert {share for name, share in found.items() if "changed" not in name} == {1.0}
  assert "fact" not in found and "fact, changed" in found


class Writer(Reader):
  """Writes down what the back office said."""

  def answer(self, messages, tools):
    said = re.findall(r"Back office: (Cases of the kind .+)", messages[-1].content)
    return f"{ITEM_MARK} {said[-1]}" if said else "Nothing."

  def encode(self, text):
    return text.split()


def test_what_the_desk_says_becomes_the_rules_and_the_newest_wins():
  """With the configuration's own settings, over two periods."""
  config, earlier = configuration("all"), {}
  how = config.extraction
  for period in (0, 1):
    with config.unlocked():
      config.deployment.game_args.period = period
    episodes = [Episode(f"p{period}-{seed}", seed, 0) for seed in range(0, 1000, 2)]
    played = play(Reader(), game_spec(config.deployment), episodes=episodes, **HOW)
    [text] = extract(
      Writer(), played, texts=1, form="items", see_previous=how.see_previous, sampling=None,
      max_response_tokens=99, max_knowledge_tokens=10**6, max_prompt_tokens=10**6, seed=0,
      round=1 + period, thinking=False, wording=how.wording, answered_only=how.answered_only,
    )  # fmt: skip
    found = provenance.sift(
      provenance.gather([text], played, earlier),
      min_support=how.min_support,
      newest_wins=how.newest_wins,
      told_by_others=how.told_by_others,
    )
    kept = {name for name, origin in found.items() if not origin.left_out}
    known = HelpDesk(period=period).rules
    assert kept == {provenance.normalised(rule.text()) for rule in known}
    earlier = found
  out = collections.Counter(origin.left_out for origin in found.values() if origin.left_out)
  assert out == {provenance.NEWER: sum(rule.changed for rule in known)}


def test_a_game_may_be_told_how_many_rounds_went_before():
  config = configuration("changing")
  assert changes(config.deployment) and not changes(configuration("all").deployment)
  for before in range(3):
    environment = game_spec(config.deployment, before).make()
    assert environment.rules == HelpDesk(period=before).rules
  assert game_spec(config.deployment).make().rules == HelpDesk().rules


def test_calls_of_the_stand_in_are_calls():
  text = Reader().follow("lookup", (f"with {LOOK_UP}",), ["Order 12345, week 3"])
  from oel_jax.policy.tokenizers.tool_calls import parse

  assert parse(text) == ("", (ToolCall("", LOOK_UP, '{"order": "12345"}'),))
