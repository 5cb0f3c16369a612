"""Environments that offer tools: what reaches them of a model's calls, what the model is shown, and
what is written down of it.
"""

import json
import re

import families
import pytest
import tool_families
from chat_server import completion, send, serving
from fakes import in_turns
from test_chat_tools import by_template, is_llama, ours
from test_endpoint import endpoint
from test_help_desk import find, follow, game_spec

from oel_jax.conversations import exporters, jsonl, logs
from oel_jax.conversations import prompt as prompt_lib
from oel_jax.conversations.schema import (
  Message,
  ToolCall,
  conversation_from_json,
  cut_prompts,
  to_json,
  transcript,
)
from oel_jax.conversations.tool_texts import tool_text
from oel_jax.environments import Episode, Game, GameSpec, Step, play, play_to_file
from oel_jax.environments import help_desk_rules as rules
from oel_jax.environments.help_desk import LOOK_UP, TOOL, HelpDesk
from oel_jax.policy.tokenizers import CannotRender, HuggingFaceTokenizer
from oel_jax.report import games as games_lib

CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
HOW = dict(sampling=None, max_response_tokens=99, max_prompt_tokens=9999, slots=8, thinking=False)


class Clock:
  """Ends where the clock is asked for the end, or an answer says so."""

  tools = [CLOCK]

  def reset(self, seed):
    self.heard = []
    return "What time is it?"

  def step(self, action):
    return Step("Thanks.", done=True, reward=float(action == "noon"), category="said")

  def call(self, name, arguments):
    self.heard.append((name, arguments))
    if arguments.get("zone") == "broken":
      raise ValueError("no such zone")
    done = arguments.get("zone") == "end"
    return Step(f"12:0{len(self.heard)}", done=done, reward=float(done), category="called")


def clock(max_turns=3):
  opened = Game(GameSpec("clock", Clock, max_turns=max_turns), 7)
  return opened, opened._environment


def call(name, text="{}"):
  return ToolCall("", name, text)


def test_the_calls_of_an_answer_are_one_move_in_their_order():
  opened, environment = clock(max_turns=2)
  assert opened.tools == (tool_text(CLOCK),)
  steps = opened.call([call("clock", '{"zone": "UTC"}'), call("clock", "")])
  assert steps == [Step("12:01"), Step("12:02")]
  assert environment.heard == [("clock", {"zone": "UTC"}), ("clock", {})]
  last = opened.call([call("clock")])
  stopped = "12:03\nThe game was stopped after 2 turns."
  assert last == [Step("12:03", True, 0.0, stopped, "turn_limit", "called")]
  with pytest.raises(RuntimeError, match="clock, seed 7: the game is over"):
    opened.call([call("clock")])


def test_a_call_may_end_the_game_and_none_is_made_after_it():
  opened, environment = clock()
  steps = opened.call([call("clock"), call("clock", '{"zone": "end"}'), call("clock")])
  assert steps == [Step("12:01"), Step("12:02", True, 1.0, "12:02", "passed", "called")]
  assert len(environment.heard) == 2


@pytest.mark.parametrize(
  "made, told",
  [
    (call("watch"), "There is no tool 'watch': there are clock."),
    (call("clock", '{"zone": "UT'), "The arguments of clock must be a JSON object."),
    (call("clock", "[1]"), "The arguments of clock must be a JSON object."),
    (call("clock", "[" * 100_000), "The arguments of clock must be a JSON object."),
  ],
)
def test_a_call_that_cannot_be_made_is_told_to_the_model_alone(made, told):
  opened, environment = clock()
  assert opened.call([made]) == [Step(told)] and not environment.heard


def test_a_tool_that_fails_is_named():
  with pytest.raises(RuntimeError, match=r"at the call of clock with \{'zone': 'broken'\}: .*zone"):
    clock()[0].call([call("clock", '{"zone": "broken"}')])


@pytest.mark.parametrize(
  "returned, told",
  [("12:01", "call returned '12:01': it must be a Step"), (Step(1), "of what call returned is 1")],
)
def test_a_tool_that_returns_no_step_is_told_as_such(monkeypatch, returned, told):
  monkeypatch.setattr(Clock, "call", lambda *_: returned)
  with pytest.raises(RuntimeError, match=f"clock, seed 7: .*{told}"):
    clock()[0].call([call("clock")])


@pytest.mark.parametrize(
  "changes, told",
  [
    (dict(tools=["clock"]), r"tools are \['clock'\]: each must be \{\"type\""),
    (dict(tools="clock"), "tools are 'clock': each must be"),
    (dict(tools=[{"name": "clock"}]), "each must be"),
    (dict(tools=[CLOCK | {"more": {1}}]), "cannot be written as JSON"),
    (dict(call=None), r"offers tools and has no method call\(name, arguments\)"),
  ],
)
def test_definitions_that_are_none_are_refused(changes, told):
  with pytest.raises(RuntimeError, match=told):
    Game(GameSpec("odd", type("Odd", (Clock,), changes)), 0)


# Played by a model with a chat template.


class Model:
  """Answers with texts, as a model's tokens; `answer` is given the ids of the prompt as a text."""

  def __init__(self, tokenizer, answer):
    self.tokenizer, self.answer, self.prompts = tokenizer, answer, []

  @in_turns
  def sample(self, prompts, seeds, **how):
    self.prompts += prompts
    return [self.tokens(self.answer(self.tokenizer._tokenizer.decode(ids))) for ids in prompts]

  def tokens(self, text):
    """With the marks of calls as the tokens that they are."""
    marks = {"<tool_call>", "</tool_call>"} & set(self.tokenizer._control)
    parts = re.split(f"({'|'.join(marks)})", text) if marks else [text]
    encode = self.tokenizer.encode
    ids = [[self.tokenizer._control[p]] if p in marks else encode(p) for p in parts if p]
    return [*sum(ids, []), self.tokenizer.eos_ids[0]]


def written(family, *made):
  """Calls in the words of the family's models."""
  if is_llama(family):
    return "; ".join(json.dumps({"name": n, "parameters": given}) for n, given in made)
  said = [json.dumps({"name": name, "arguments": given}) for name, given in made]
  return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in said)


@pytest.mark.parametrize("family", tool_families.TOOL_FAMILIES)
def test_the_models_template_shows_tools_calls_and_results(family, tmp_path):
  look = written(family, ("clock", {"zone": "UTC"}))
  model = Model(ours(family), lambda prompt: "[noon]" if "12:01" in prompt else look)
  spec, path = GameSpec("clock", Clock), tmp_path / "games.jsonl"
  episodes = [Episode("e0", 0, 0), Episode("e1", 2, 0, "It is noon.")]
  played = play_to_file(path, model, spec, episodes=episodes, **HOW)
  for game in played:
    assert [said.role for said in game.messages] == ["user", "assistant", "tool", "assistant"]
    [made] = game.messages[1].tool_calls
    assert (made.name, json.loads(made.arguments)) == ("clock", {"zone": "UTC"})
    result = Message("tool", "12:01", tool_call_id=made.id, name="clock")
    assert game.messages[2] == result and made.id
    assert (game.passed, game.source.category) == (True, "said")
    assert game.tools == (tool_text(CLOCK),) and game.messages[1].response_tokens > 3
  bare = [prompt for prompt in model.prompts if prompt in ([], *_prompts(family, played[0]))]
  assert len(bare) == 2  # as `apply_chat_template` makes them of the first game
  cut = cut_prompts(played[0])
  assert [prompt_lib.ids(ours(family), c.messages, tools=c.tools, thinking=True) for c in cut] == [
    *_prompts(family, played[0])
  ]
  assert jsonl.read_conversations(path) == list(played)
  assert play_to_file(path, None, spec, episodes=episodes, **HOW) == played  # is only read
  told = transcript(played[0])
  assert 'Call of clock: {"zone": "UTC"}\nTool: 12:01\nAnswer: [noon]' in told


def _prompts(family, game):
  return [by_template(family, game.messages[:end], game.tools) for end in (1, 3)]


@pytest.mark.parametrize("family", tool_families.TOOL_FAMILIES)
def test_several_calls_at_once_are_answered_or_end_the_game(family):
  both = written(family, ("clock", {"zone": "UTC"}), ("clock", {}))
  model = Model(ours(family), lambda prompt: "[noon]" if "12:02" in prompt else both)
  spec = GameSpec("clock", Clock)
  games = play(model, spec, episodes=[Episode(f"e{i}", i, 0) for i in range(12)], **HOW)
  assert len(games) == 12
  for game in games:
    assert [len(said.tool_calls) for said in game.messages][:2] == [0, 2]
    ids = [made.id for made in game.messages[1].tool_calls]
    assert [said.tool_call_id for said in game.messages[2:4]] == ids and len(set(ids)) == 2
    if is_llama(family):  # whose template shows one call at a time
      assert (game.ended, game.passed, game.source.category) == ("invalid", False, "called")
      assert "chat template refuses such conversations" in game.outcome and len(game.messages) == 4
    else:
      assert game.passed
    assert conversation_from_json(json.loads(json.dumps(to_json(game)))) == game


def test_a_template_that_knows_no_tools_is_told_before_anything_is_sampled():
  model = Model(HuggingFaceTokenizer(families.tokenizer("smollm2")), None)
  with pytest.raises(CannotRender, match="leaves out the definitions of tools"):
    play(model, GameSpec("clock", Clock), episodes=[Episode("e", 0, 0)], **HOW)


def test_a_server_is_sent_the_tools_and_its_calls_are_made():
  def behave(handler, number, body):
    asked = {"id": "c9", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    told = body["messages"][-1]["role"] == "tool"
    send(handler, completion("[noon]") if told else completion(None, tool_calls=[asked]))

  spec, model = GameSpec("clock", Clock), Model(ours("qwen2.5"), None)
  with serving(behave) as server:
    how = HOW | dict(remote=endpoint(server.url))
    [game] = play(model, spec, episodes=[Episode("e", 0, 0)], **how)
    bodies = [body for _, _, body in server.asked]
  assert game.passed and [body["tools"] for body in bodies] == [[CLOCK]] * 2
  assert game.messages[1].tool_calls == (ToolCall("c9", "clock", '{"zone": "UTC"}'),)
  assert bodies[1]["messages"][1]["tool_calls"][0]["id"] == "c9"
  assert bodies[1]["messages"][2] == to_json(game)["messages"][2]
  assert game.messages[1].response_tokens == 3  # its words and the end, for nobody else counted


@pytest.mark.parametrize(
  "roles",
  [["user", "tool"], ["user", "user"], ["tool", "assistant"], ["user", "assistant", "tool"]],
)
def test_a_games_messages_of_other_roles_are_damaged(roles):
  [game] = play(
    Model(ours("qwen2.5"), lambda prompt: "[noon]"), GameSpec("clock", Clock),
    episodes=[Episode("e", 0, 0)], **HOW,
  )  # fmt: skip
  data = to_json(game)
  answer = data["messages"][1]
  data["messages"] = [
    answer if role == "assistant" else {"role": role, "content": "?"} for role in roles
  ]
  with pytest.raises(ValueError, match="in turn, and tool only|'tool_calls' is missing"):
    conversation_from_json(data)


# The help desk's tool.


def test_orders_are_looked_up_by_the_tool_alone():
  desk, said = find("lookup", tool=True)
  assert desk.tools == [TOOL] and "LOOK UP" not in said
  number = re.search("Order ([0-9]+)", said)[1]
  assert desk.call(LOOK_UP, {"order": "1"}).observation == "Orders: there is no order 1."
  told = desk.call(LOOK_UP, {"order": int(number)}).observation
  state = re.fullmatch(f"Orders: order {number} is (packed|sent).", told)[1]
  assert desk.call(LOOK_UP, {}).observation.startswith("Orders: 2 are looked up already")
  step = desk.step(f"DESK: {desk.rule.values[rules.STATES.index(state)]}")
  assert step.done and step.reward == 1.0
  desk, _ = find("lookup", tool=True)
  corrected = desk.step("LOOK UP: 1").observation  # a line of text is an answer like any other
  assert corrected == f"Back office: {desk.rule.text(LOOK_UP)}" and LOOK_UP in corrected
  assert HelpDesk(tool=True, kinds=["desk"]).tools == HelpDesk().tools == []
  with pytest.raises(ValueError, match="tool is 1: it must be True or False"):
    HelpDesk(tool=1)


@pytest.fixture(name="played", scope="module")
def fixture_played():
  """Cases played by one who knows the rules, but not what customers are silent about."""
  known = HelpDesk(tool=True).rules

  def answer(prompt):
    turns = re.split(r"<\|im_start\|>(?:user|assistant)\n", prompt)[1:]
    texts = [turn.split("<|im_end|>")[0] for turn in turns]
    said = follow(known, texts[:-1])
    number = re.fullmatch("LOOK UP: ([0-9]+)", said)
    return written("qwen2.5", (LOOK_UP, {"order": number[1]})) if number else said

  episodes = [Episode(f"e{seed}", seed, 0) for seed in range(60)]
  return play(Model(ours("qwen2.5"), answer), game_spec(tool=True), episodes=episodes, **HOW)


def test_who_knows_the_rules_passes_every_case_with_the_tool(played):
  assert all(game.passed for game in played)
  looked_up = [game for game in played if any(said.role == "tool" for said in game.messages)]
  assert {game.source.category for game in looked_up} == {"lookup"}
  assert len(looked_up) == sum(game.source.category == "lookup" for game in played) > 3


def test_the_log_holds_calls_and_tools_and_is_read_back(played, tmp_path):
  path = tmp_path / "log.jsonl"
  exporters.write_log(path, played)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert all(line["tools"] == [TOOL] for line in lines)
  counts = logs.Counts()
  for game, log in zip(played, logs.read(path, counts), strict=True):
    assert log.tools == game.tools == (tool_text(TOOL),)
    plain = lambda said: (said.role, said.content, said.tool_calls, said.tool_call_id, said.name)
    assert [*map(plain, log.messages)] == [*map(plain, game.messages)]
    assert [p.messages for p in cut_prompts(log)] == [p.messages for p in cut_prompts(game)]
  assert counts.damaged == counts.without_call == 0


def test_the_page_shows_calls_and_results(played):
  game = next(game for game in played if game.source.category == "lookup")
  page = games_lib._game("Base model", game)
  assert f"called {LOOK_UP}" in page and f"{LOOK_UP}({{" in page and "Orders: order" in page
  assert page.count("Turn ") == len(game.answers)
