"""A help desk: customers with a case, and rules for it that nobody tells.

    deployment.environment = "oel_jax.environments.help_desk:HelpDesk"
    deployment.player = deployment.actions = ""         # the desk asks in words of its own
    deployment.action_pattern = r"(?s)(.+)"             # and hears the whole answer
    deployment.game_args = {}                           # or arguments of `HelpDesk`

A case is passed if the first answer that decides it obeys the rule. The judge is for evaluation
alone: a conversation holds what customers and back office said, and both may be silent, whether the
answer was right or wrong. Held-out episodes, whose seeds are odd, use phrasings that no other
episode does.
"""

import random
from collections.abc import Sequence
from typing import Any

from oel_jax.environments import help_desk_cases as cases
from oel_jax.environments import help_desk_rules as rules
from oel_jax.environments.api import Step
from oel_jax.runtime.seeds import derive

MAX_LOOKUPS = 2  # a case; a further line of text is an answer that decides nothing
LOOK_UP = "look_up_order"
TOOL = {
  "type": "function",
  "function": {
    "name": LOOK_UP,
    "description": "Says whether an order is packed or sent.",
    "parameters": {
      "type": "object",
      "properties": {"order": {"type": "string", "description": "The number of the order."}},
      "required": ["order"],
    },
  },
}
# The same in all cases, so that their prompts begin alike. It names no kinds of rules: a small
# model, told of desks, forms and codes, named one of each. Nor does it name the tool, which that
# model then always used. Asked for "what cases of the kind need", it told which cases need
# something: all of them, in a list without end; asked what has to be done, and not by whose rules,
# what anyone would do.
ASK = (
  "You work at the help desk of Orsa, who sell coffee machines by post. Say in one short sentence "
  "which kind of case this is and what has to be done with it by our rules.\n"
)
NUDGES = {
  "discount": "Do I get a discount?",
  "replacement": "Will there be a replacement?",
  "compensation": "What about compensation?",
  "gift": "Is there a gift for my trouble?",
}
THANKS = ("Customer: Thank you, that helped.", "Back office: Taken over, thank you.")
WRONG = {  # by what the answer decided
  "desk": "At desk {} they sent me away.",
  "form": "Form {} is not for this.",
  "code": "The code {} is not known.",
}


class HelpDesk:
  """One customer's case, an `environments.api.Environment`.

  Args:
    kinds: of `help_desk_rules.KINDS`, those that there are rules of. "lookup" brings the tool.
    topics: kinds of case, dealt to the kinds of rules in turn.
    desks: that a case can go to.
    period: counts from 0. As one begins all facts expire, and a share of the other rules changes.
    rules_seed: of the rules of all periods.
    change: that share, of the rules that are no facts.
    vague: share of customers who tell what it is about only when they have been answered once.
    complaint, silence: of the wrong answers, the share to which the customer complains, without
      knowing better, and that to which nobody says anything; the back office corrects the others.
    second_answer: whether the player answers once more to a complaint or a correction. The case is
      passed by its first answer or not at all.
    tool: how orders are looked up. True: every case offers TOOL, which the model's chat template
      shows and whose calls it reads. False: by a line of the answer, "LOOK UP: 12345", of which
      only the rules tell.

  Raises:
    ValueError: an argument is not what it must be.
  """

  def __init__(
    self,
    kinds: Sequence[str] = rules.KINDS,
    topics: int = len(cases.TOPICS),
    desks: int = len(rules.DESKS),
    period: int = 0,
    rules_seed: int = 0,
    change: float = 0.25,
    vague: float = 0.2,
    complaint: float = 0.2,
    silence: float = 0.2,
    second_answer: bool = True,
    tool: bool = False,
  ):
    kinds = tuple(kinds)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(rules.KINDS):
      raise ValueError(f"kinds is {kinds!r}: it must be some of {rules.KINDS}, each once")
    _whole("topics", topics, len(kinds), len(cases.TOPICS))
    _whole("desks", desks, 3, len(rules.DESKS))
    _whole("period", period, 0, 999)
    _whole("rules_seed", rules_seed, 0, 2**32 - 1)
    shares = dict(change=change, vague=vague, silence=silence, complaint=complaint)
    for name, share in shares.items():
      _share(name, share, 1 - silence if name == "complaint" else 1)
    for name, value in (("second_answer", second_answer), ("tool", tool)):
      if type(value) is not bool:
        raise ValueError(f"{name} is {value!r}: it must be True or False")
    self.rules = rules.table(kinds, topics, desks, period, rules_seed, change)
    self.tools = [TOOL] if tool and "lookup" in kinds else []
    self._looks_up = "lookup" in kinds and not tool
    self._period, self._second_answer = period, second_answer
    self._vague, self._complaint, self._silence = vague, complaint, silence

  def reset(self, seed: int) -> str:
    """Draws the case; returns the whole first message, instruction included."""
    draw, held_out = random.Random(derive("help desk", "case", seed)), seed % 2 == 1
    self.rule = draw.choice(self.rules)
    topic = self.rule.topic
    self._order, self._state = str(draw.randrange(10_000, 100_000)), draw.choice(rules.STATES)
    said = draw.choice(cases.HELD_OUT_FRAMES if held_out else cases.FRAMES).format(
      draw.choice(topic.held_out if held_out else topic.training)
    )
    if self.rule.kind == "lesson" and draw.random() < 0.5:
      said = f"{said} {NUDGES[draw.choice(rules.PROMISES)]}"
    self._to_tell = said if draw.random() < self._vague else ""
    if self._to_tell:
      said = draw.choice(cases.HELD_OUT_OPENINGS if held_out else cases.OPENINGS)
    week = rules.WEEKS * self._period + draw.randrange(1, rules.WEEKS + 1)
    self._fortune, self._thanks = draw.random(), draw.choice(THANKS)
    self._lookups, self._read, self._asked, self._verdict = 0, "", False, None
    # Behind the customer's words: before them, a small model took the order for the kind of case.
    return f"{ASK}\nCustomer: {said}\n(Order {self._order}, week {week})"

  def step(self, action: str) -> Step:
    """Takes an answer, all of it; one that tells the case, looks up or asks decides nothing yet."""
    if self._to_tell:  # whatever the player has said
      said, self._to_tell = self._to_tell, ""
      return self._say(f"Customer: {said}")
    if self._verdict is not None:
      return self._after_second(action)
    number = rules.looked_up(action) if self._looks_up else ""
    if number and self._lookups < MAX_LOOKUPS:
      return self._look_up(number)
    if not self._asked and self.rule.asks(action):
      self._asked = True
      return self._say(f"Customer: Here you are, the {self.rule.values[0]}.")
    self._verdict = self.rule.right(action, state=self._read, asked=self._asked)
    return self._feedback(action)

  def call(self, name: str, arguments: dict[str, Any]) -> Step:
    """Looks an order up, `name` being TOOL's; it decides nothing, whenever it comes."""
    if self._lookups >= MAX_LOOKUPS:
      return self._say(f"Orders: {MAX_LOOKUPS} are looked up already, which is all for one case.")
    return self._look_up(str(arguments.get("order", "")).strip(" #"))

  def _look_up(self, number: str) -> Step:
    self._lookups += 1
    if number != self._order:
      return self._say(f"Orders: there is no order {number}.")
    self._read = self._state
    return self._say(f"Orders: order {number} is {self._state}.")

  def _feedback(self, answer: str) -> Step:
    """What is said of the first answer; silence says nothing of the verdict."""
    if self._fortune < self._silence:
      return self._end("")
    if self._verdict:
      return self._end(self._thanks)
    corrected = self._fortune >= self._silence + self._complaint
    told = self.rule.text(LOOK_UP if self.tools else "")
    said = f"Back office: {told}" if corrected else _complaint(answer)
    return self._say(said) if self._second_answer else self._end(said)

  def _after_second(self, answer: str) -> Step:
    right = self.rule.asks(answer) or self.rule.right(answer, state=self._state, asked=True)
    return self._end(self._thanks if right else "")

  def _say(self, said: str) -> Step:
    return Step(said, category=self.rule.category)

  def _end(self, said: str) -> Step:
    reward = float(self._verdict)
    return Step(said, done=True, reward=reward, outcome=said, category=self.rule.category)


def _complaint(answer: str) -> str:
  """What a customer says who was not helped, and who does not know what would have been right."""
  found = sorted(rules.decisions(answer))
  if not found:
    return "Customer: That does not help me at all."
  verb, _, value = found[0].partition(": ")
  return f"Customer: {WRONG[verb].format(value)}"


def _whole(name: str, value: int, least: int, most: int) -> None:
  if type(value) is not int or not least <= value <= most:
    raise ValueError(f"{name} is {value!r}: it must be a whole number from {least} to {most}")


def _share(name: str, value: float, most: float) -> None:
  if type(value) not in (int, float) or not 0 <= value <= most:
    raise ValueError(f"{name} is {value!r}: it must be a number from 0 to {most:g}")
