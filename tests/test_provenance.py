"""What stands behind items: by hand, and against a brute force over made-up extractions."""

import dataclasses
import json
import random

import pytest
from fakes import in_turns
from test_changed_runs import Player
from test_loop import short_config

from oel_jax import config as config_lib
from oel_jax.conversations.jsonl import read_conversations
from oel_jax.conversations.schema import LOG, Conversation, Message, Source, ToolCall
from oel_jax.extraction import provenance as lib
from oel_jax.extraction.knowledge import CARRIED, Item, Knowledge
from oel_jax.runtime.metrics import Metrics
from oel_jax.stages import extract as stage
from oel_jax.stages import knowledge
from oel_jax.stages.deploy import play_for_knowledge
from oel_jax.stages.run import Run

MARK = "- EXPERIENCE ITEM:"


def said(id, *contents):
  roles = ("user", "assistant") * len(contents)
  messages = tuple(Message(role, content) for role, content in zip(roles, contents))
  return Conversation(id, messages, Source(LOG, "log.jsonl"))


def texts(*lists, round=1):
  """Of each text its (item, conversation) pairs, one a step."""
  return [
    Knowledge(tuple(Item(t, c, step, round) for step, (t, c) in enumerate(pairs, start=1)))
    for pairs in lists
  ]


@pytest.mark.parametrize(
  "one, other, same",
  [
    (f"{MARK} Damaged parcel: BRASS", "damaged  parcel: brass.", True),
    (f"{MARK} [lesson] Be kind", f"{MARK} (Lesson) be kind!", True),
    (f"{MARK} lesson: Be kind", f"{MARK} **Be kind**", True),
    ("ﬁne: x", "fine: x", True),  # a ligature
    ("a: -5", "a: 5", False),
    ("C++ is for", "C is for", False),
    ("go left", "go right", False),
    ("[up] is left", "up is left", False),
  ],
)
def test_which_texts_are_the_same(one, other, same):
  assert (lib.normalised(one) == lib.normalised(other)) == same


@pytest.mark.parametrize(
  "text, kind",
  [
    (f"{MARK} [procedure] ask for the number", "procedure"),
    (f"{MARK} Where to find: the key lies there", "where-to-find"),
    (f"{MARK} (fact) never", "fact"),  # the tag, not the word
    ("First ask for the number, then refund.", "procedure"),
    ("Broken lamps -> BRASS", "where-to-find"),
    ("A late parcel goes to AMBER.", "where-to-find"),
    ("Never promise a date.", "lesson"),
    ("The refund is valid until 1 May.", "fact"),
    ("Broken lamps: BRASS", ""),
    ("The goal is G.", ""),
    ("", ""),
  ],
)
def test_kinds(text, kind):
  assert lib.kind_of(text) == kind and kind in ("", *lib.KINDS)


@pytest.mark.parametrize(
  "text, key",
  [
    (f"{MARK} Damaged parcel: BRASS.", ("damaged parcel", "brass")),
    (f"{MARK} [where-to-find] damaged parcel -> BRASS", ("damaged parcel", "brass")),
    ("Damaged parcel goes to BRASS", ("damaged parcel", "brass")),
    ("Cases of the kind 'late parcel' get form 12.", ("late parcel", "get form 12")),
    ("- cases of this kind: “Late  parcel” go to desk OAK", ("late parcel", "go to desk oak")),
    ("Cases of the kind 'it's late' go to A: B", ("it's late", "go to a: b")),
    ("Cases of the kind", None),
    ("opening hours: 10:30 to 12", ("opening hours", "10:30 to 12")),
    ("it opens at 10:30", None),
    ("冷咖啡：7号台。", ("冷咖啡", "7号台")),
    ("Note: be kind", None),
    ("lesson: be kind", None),
    ("one two three four five six seven eight nine ten eleven twelve thirteen: x", None),
    ("a case:", None),
    (": x", None),
    ("The goal is G.", None),
  ],
)
def test_keys(text, key):
  assert lib.key_of(text) == key


def test_the_item_that_has_most_words_in_common():
  """Rare words count for more: by hand, "lamp" is one item's and "parcel" two items'."""
  items = ["parcel late: AMBER", "parcel damaged: BRASS", "[lesson] lamp: COPPER"]
  origins = [lib.Origin(f"{MARK} {text}", "", ()) for text in items]
  best = lambda said: lib.related(origins, said)
  assert best("My PARCEL is damaged!") is origins[1]
  assert best("a parcel") is origins[0]  # of several the first
  assert best("the lamp of the parcel") is origins[2]  # 1 against 1/2
  assert best("lesson for you, is it the to") is None and lib.related([], "parcel") is None


def test_messages_that_share_the_words_of_an_item():
  conversation = said(
    "c", "My parcel came damaged", "AMBER will help", "No: BRASS did it.", "Sorry"
  )
  item = f"{MARK} [lesson] A damaged parcel: BRASS"
  assert lib.shared(item, conversation) == (1, 3)
  assert lib.shared(f"{MARK} lamps", conversation) == ()
  assert lib.shared("amber", said("d", "x", "Amber.", "amber")) == (2,)  # of several the first
  # By brute force: the words found are all that the conversation has.
  rng = random.Random(0)
  for _ in range(200):
    words = [f"w{rng.randrange(12)}" for _ in range(5)]
    held = [[f"w{rng.randrange(12)}" for _ in range(4)] for _ in range(5)]
    found = lib.shared(" ".join(words), said("e", *map(" ".join, held)))
    everywhere = {word for one in held for word in one} & set(words)
    assert {word for n in found for word in held[n - 1]} & set(words) == everywhere
    for left in found:  # and no message is there for nothing, but for what the others brought later
      assert set(held[left - 1]) & set(words)


def test_support_counts_distinct_conversations_over_all_texts():
  found = lib.gather(
    texts(
      [("A: x", "c1"), ("a:  X.", "c1"), ("B: y", "c2")],
      [("b: y", "c2"), ("A: x", "c3"), ("C: z", "c3")],
    ),
    [said("c1", "x"), said("c2", "y"), said("c3", "nothing")],
    {},
  )
  assert {name: origin.support for name, origin in found.items()} == {
    "a: x": 2,
    "b: y": 1,
    "c: z": 1,
  }
  first = found["a: x"]
  assert first.text == "A: x" and [
    (one.conversation, one.round, one.place, one.messages) for one in first.seen
  ] == [("c1", 1, 1, (1,)), ("c3", 1, 3, ())]


@pytest.mark.parametrize(
  "item, others",
  [
    ("Login trouble: ROWAN", True),
    ("login trouble goes to Rowan!", True),  # nobody said "goes": the extractor's own word
    ("Login trouble: OLIVE", False),  # the policy's, which nobody took up
    ("Login trouble goes to OLIVE", False),
    ("Say the order: a call", False),  # the policy's first words
    ("A product", True),  # the policy's word, which the outcome has, too
    ("A postcode", True),  # another, which the feedback has
    ("The user wrote of his password", True),
    ("Login trouble: ROAN", False),  # a slip of the extractor's: nobody said that name
    ("Login trouble goes to Roan.", False),
    ("Login trouble goes to Rowan within 3 days.", False),  # nor that number
    ("Login trouble: Send the case to Rowan, as I said.", True),  # words that begin, and "I"
    ("'Login trouble' goes to \"Rowan\".", True),
    ("**Login trouble**: *Rowan*", True),
    ("- Login trouble\n- Send it to Rowan", True),  # a list
    ("Login Trouble Always Goes To Rowan", True),  # a title
    ("LOGIN TROUBLE ALWAYS GOES TO ROWAN", True),
    ("Login trouble goes to Rowan by form B12", False),
    ("login trouble goes to rowan by form b12", False),
  ],
)
def test_whether_others_said_an_item(item, others):
  roles = ("system", "user", "assistant", "user", "assistant", "tool")
  words = (
    "Name the case.",
    "My password is wrong",
    "Say the order? A call to OLIVE for login trouble.",
    "No, login trouble belongs to Rowan.",
    "Rowan will help. Which product? Your postcode?",
    "state: sent",
  )
  messages = tuple(map(Message, roles, words))
  conversation = Conversation(
    "c", messages, Source(LOG, "log.jsonl"), outcome="wrong product", feedback="no postcode asked"
  )
  assert lib.told(item, conversation) is others


@pytest.mark.parametrize(
  "said, item, others",
  [
    ("Nein, kalter Kaffee gehört zu Hasel.", "Fälle von kaltem Kaffee gehen zu Hasel.", True),
    ("Nein, kalter Kaffee gehört zu Hasel.", "Fälle mit Kaffee: nach 3 Tagen zu Hasel", False),
    ("不对，冷咖啡归7号台。", "冷咖啡的情况交给7号台处理", True),
    ("不对，冷咖啡归7号台。", "冷咖啡的情况交给8号台处理", False),
    ("Non, le café froid va chez Noisetier.", "Un café froid : pour Noisetier", True),
    ("Non, le café froid va chez Noisetier.", "Un café froid : pour Noyer", False),
  ],
)
def test_names_and_numbers_of_other_languages(said, item, others):
  """German gives each noun a capital; Chinese has no spaces around its numbers."""
  messages = Message("user", "?"), Message("assistant", "!"), Message("user", said)
  assert lib.told(item, Conversation("c", messages, Source(LOG, "log.jsonl"))) is others


def test_messages_that_share_the_words_of_an_item_without_spaces():
  """冷咖 and 咖啡 stand in the first, 号台 in the third, nothing of it in the second."""
  said = Message("user", "我的冷咖啡?"), Message("assistant", "请稍等"), Message("user", "归7号台")
  conversation = Conversation("c", said, Source(LOG, "log.jsonl"))
  assert lib.shared("冷咖啡交给7号台", conversation) == (1, 3)
  found = [lib.Origin(text, "", (), ()) for text in ("破灯交给8号台", "冷咖啡交给7号台")]
  assert lib.related(found, "冷咖啡又来了") is found[1]
  assert lib.related(found, "再见") is None


@pytest.mark.parametrize(
  "people, others",
  [((), False), (("ann",), True), (("ben",), False), (("*",), True), (("ben", "ann"), True)],
)
def test_who_answered_in_the_policys_place_is_one_of_the_others(people, others):
  """Ann, of the staff, whose messages bear her name."""
  ann = Message("assistant", "Lamps go to desk OLIVE.", name="ann")
  said = Message("user", "my lamp"), Message("assistant", "Desk OAK?"), ann
  conversation = Conversation("c", said, Source(LOG, "log.jsonl"))
  assert lib.told("Lamps: desk OLIVE", conversation, people) is others
  assert lib.told("Lamps: desk OAK", conversation, people) is ("*" in people)
  [found] = lib.gather(texts([("Lamps: desk OLIVE", "c")]), [conversation], {}, people).values()
  assert found.told == others


def test_what_a_policy_said_in_a_call_of_a_tool_is_its_own():
  call = ToolCall("c1", "route", '{"desk": "OAK"}')
  said = Message("user", "my lamp"), Message("assistant", "", (call,))
  conversation = Conversation("c", said, Source(LOG, "log.jsonl"))
  assert lib.told("Lamp: a shelf", conversation) and not lib.told("Lamp: oak", conversation)
  assert lib.shared("Lamp: OAK", conversation) == (1, 2)


def test_what_the_policy_alone_said_has_no_support():
  """A policy that errs the same way in four conversations, and is put right in two of them."""
  wrong = [said(f"c{i}", "my lamp", "Lamp: OAK") for i in (1, 2)]
  right = [said(f"c{i}", "my lamp", "Lamp: OAK", "no: AMBER, a lamp", "") for i in (3, 4)]
  found = lib.gather(
    texts([(f"Lamp: {name}", f"c{i}") for i in (3, 4) for name in ("AMBER", "OAK")])
    + texts([("Lamp: OAK", f"c{i}") for i in (1, 2)]),
    wrong + right,
    {},
  )
  assert {name: (one.support, one.told) for name, one in found.items()} == {
    "lamp: amber": (2, 2),
    "lamp: oak": (4, 0),
  }
  how = dict(min_support=2, newest_wins=False)
  assert not any(one.left_out for one in lib.sift(found, **how).values())
  sifted = lib.sift(found, **how, told_by_others=True)
  assert [one.left_out for one in sifted.values()] == ["", lib.OWN_WORDS]
  strict = lib.sift(found, min_support=3, newest_wins=False, told_by_others=True)
  assert [one.left_out for one in strict.values()] == [lib.SUPPORT, lib.OWN_WORDS]
  left = lib.without(sifted, {"c4"}, **how, told_by_others=True)
  assert [one.left_out for one in left.values()] == [lib.SUPPORT, lib.OWN_WORDS]


def test_of_the_conversations_only_those_count_in_which_others_said_it():
  conversations = [said("c1", "my lamp", "Lamp: OAK"), said("c2", "a lamp goes to OAK", "")]
  found = lib.gather(texts([("Lamp: OAK", "c1"), ("Lamp: OAK", "c2")]), conversations, {})
  out = lambda least: [
    one.left_out
    for one in lib.sift(found, min_support=least, newest_wins=False, told_by_others=True).values()
  ]
  assert out(1) == [""] and out(2) == [lib.OWN_WORDS]


def test_what_the_policy_says_again_is_no_newer():
  """The old rule, told once, goes on in the policy's words after the new one was told."""
  conversations = [
    said("c1", "a lamp?", "", "Lamp: OAK"),
    said("c2", "a lamp?", "Lamp: OAK", "Lamp: AMBER"),
    said("c3", "a lamp?", "Lamp: OAK"),
  ]
  found = lib.gather(
    texts([("Lamp: OAK", "c1"), ("Lamp: AMBER", "c2"), ("Lamp: OAK", "c3")]), conversations, {}
  )
  newest = lambda **how: {
    name
    for name, one in lib.sift(found, min_support=1, newest_wins=True, **how).items()
    if not one.left_out
  }
  assert newest() == {"lamp: oak"} and newest(told_by_others=True) == {"lamp: amber"}


def test_support_of_earlier_rounds_is_carried_over():
  before = lib.gather(texts([("A: x", "c1"), ("B: y", "c1")]), [said("c1", "x")], {})
  before = lib.sift(before, min_support=2, newest_wins=False)
  assert {origin.left_out for origin in before.values()} == {lib.SUPPORT}
  carried = Knowledge((Item("D: d", "c0", CARRIED, 1), Item("a: x", "c9", 1, 2)))
  found = lib.gather([carried], [said("c9", "x")], before)
  assert [one.conversation for one in found["a: x"].seen] == ["c1", "c9"]
  assert found["d: d"].seen == (lib.Sighting("c0", 1, 0, ()),)
  found = lib.sift(found, min_support=2, newest_wins=False)
  assert {name for name, origin in found.items() if not origin.left_out} == {"a: x"}


def test_the_newest_of_one_case_wins_and_the_others_are_named():
  conversations = [said(f"c{i}", "") for i in range(1, 6)]
  found = lib.gather(
    texts(
      [("Lamp: BRASS", "c4"), ("Lamp: AMBER", "c1"), ("Chair: OAK", "c2")],
      [("lamp -> amber", "c2"), ("chair: oak.", "c3"), ("Sofa: A", "c5"), ("Sofa: B", "c5")],
    ),
    conversations,
    {},
  )
  assert not any(one.left_out for one in lib.sift(found, min_support=1, newest_wins=False).values())
  sifted = lib.sift(found, min_support=1, newest_wins=True)
  out = {name: one.superseded_by for name, one in sifted.items() if one.left_out}
  assert out == {"lamp: amber": "Lamp: BRASS", "lamp -> amber": "Lamp: BRASS"}
  # Both wordings of what the same conversation says stay: neither is newer.
  assert not sifted["sofa: a"].left_out and not sifted["sofa: b"].left_out
  # What too few have seen does not win: "amber" in one wording was given by c1 alone, and so on.
  weak = lib.sift(found, min_support=2, newest_wins=True)
  assert {name for name, one in weak.items() if not one.left_out} == {"chair: oak"}
  assert {one.left_out for one in weak.values()} == {"", lib.SUPPORT}


def test_wordings_of_one_answer_replace_nothing_but_other_answers():
  conversations = [said(f"c{i}", "") for i in range(1, 4)]
  given = [("Lamp: OLD", "c1"), ("Lamp -> AMBER", "c2"), ("Lamp: AMBER", "c3")]
  given += [("Chair: OLD", "c1"), ("Chair: A", "c3"), ("Chair: B", "c3")]
  sifted = lib.sift(lib.gather(texts(given), conversations, {}), min_support=1, newest_wins=True)
  # Of two that are as new, the first to be written is named.
  assert {name: one.superseded_by for name, one in sifted.items() if one.left_out} == {
    "lamp: old": "Lamp: AMBER",
    "chair: old": "Chair: A",
  }


def test_newest_is_by_round_before_place():
  earlier = lib.gather(texts([("Lamp: OLD", "c9")]), [said(f"c{i}", "") for i in range(10)], {})
  later = texts([("Lamp: NEW", "d0")], round=2)
  found = lib.sift(lib.gather(later, [said("d0", "")], earlier), min_support=1, newest_wins=True)
  assert (found["lamp: old"].superseded_by, found["lamp: new"].left_out) == ("Lamp: NEW", "")


def test_the_newest_wins_as_brute_force_says():
  rng = random.Random(3)
  for _ in range(60):
    conversations = [said(f"c{i}", "") for i in range(8)]
    pairs = [
      (f"case {rng.randrange(3)}: v{rng.randrange(3)}", f"c{rng.randrange(8)}") for _ in range(12)
    ]
    found = lib.gather(texts(pairs[:6], pairs[6:]), conversations, {})
    support, newest = rng.choice((1, 1, 2)), {}
    sifted = lib.sift(found, min_support=support, newest_wins=True)
    seen = {text: {c for t, c in pairs if t == text} for text, _ in pairs}
    strong = [text for text in seen if len(seen[text]) >= support]
    for text in strong:
      newest.setdefault(text.split(":")[0], set()).add((max(seen[text]), text))
    for text in seen:
      last = max(newest.get(text.split(":")[0], {("", "")}))[0]
      stays = text in strong and max(seen[text]) == last
      assert bool(sifted[text].left_out) != stays


def test_where_items_stand_and_why_not():
  found = lib.gather(texts([("A: x", "c1"), ("B: y", "c1")], [("A: x", "c1")]), [], {})
  found = lib.placed(found, texts([], [("a: x", "c1")]))
  assert (found["a: x"].texts, found["a: x"].left_out) == ((1,), "")
  assert (found["b: y"].texts, found["b: y"].left_out) == ((), lib.LIMIT)


def test_files_round_trip(tmp_path):
  path = tmp_path / "user/items.jsonl"
  found = lib.gather(
    texts([("[lesson] ü: x", "c1"), ("Lamp: A", "c1"), ("Lamp: B", "c2")]),
    [said("c1", "lamp"), said("c2", "lamp")],
    {},
  )
  found = lib.placed(lib.sift(found, min_support=1, newest_wins=True), texts([("Lamp: B", "c2")]))
  lib.write(path, found)
  assert lib.read(path) == found and lib.read(tmp_path / "none.jsonl") == {}
  first = json.loads(path.read_text().splitlines()[0])
  assert (first["schema"], first["kind"], first["support"]) == (1, "lesson", 1)
  lines = path.read_text().splitlines()
  for broken in (lines[1].replace("lamp", "damp").replace("Lamp", "Damp"), '{"schema": 2}', "[]"):
    path.write_text("\n".join([lines[0], broken]) + "\n")
    with pytest.raises(ValueError, match=f"{path}: 1 of 2 lines are damaged.*line 2"):
      lib.read(path)


def test_conversations_that_never_were():
  found = lib.gather(
    texts([("Lamp: A", "c1"), ("Lamp: A", "c2"), ("Lamp: B", "c3"), ("Sofa: C", "c2")]),
    [said(f"c{i}", "") for i in range(1, 4)],
    {},
  )
  found = lib.sift(found, min_support=1, newest_wins=True)
  assert found["lamp: a"].left_out == lib.NEWER
  left = lib.without(found, {"c3"}, min_support=1, newest_wins=True)
  assert set(left) == {"lamp: a", "sofa: c"}
  assert (left["lamp: a"].left_out, left["lamp: a"].superseded_by) == ("", "")
  how = dict(min_support=1, newest_wins=False)
  left = lib.without(lib.sift(found, **how), {"c2"}, **how)
  assert set(left) == {"lamp: a", "lamp: b"} and left["lamp: a"].support == 1
  assert (
    dataclasses.replace(left["lamp: b"])
    == lib.sift(found, min_support=1, newest_wins=False)["lamp: b"]
  )
  left = lib.without(found, {"c2"}, min_support=2, newest_wins=False)
  assert left["lamp: a"].left_out == lib.SUPPORT


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_is_sifted_as_if_they_had_never_been(seed):
  """Of cases that several conversations speak of, the newest may go, or lose what made it so."""
  rng = random.Random(seed)
  pairs = [(f"case {rng.randrange(3)}: v{rng.randrange(3)}", f"c{i}") for i in range(12)]
  conversations = [said(f"c{i}", rng.choice((pairs[i][0], "")), pairs[i][0]) for i in range(12)]
  how = dict(min_support=rng.choice((1, 2)), newest_wins=True, told_by_others=rng.random() < 0.5)
  gone = set(rng.sample([name for _, name in pairs], 3))
  whole = lib.sift(lib.gather(texts(pairs), conversations, {}), **how)
  rest = [(text, name) for text, name in pairs if name not in gone]
  right = lib.sift(lib.gather(texts(rest), conversations, {}), **how)
  assert lib.without(whole, gone, **how) == right


# The stage, with a policy that writes an item that each game gives and one of the game's own.


class Writer(Player):
  """Says of each game "Case N: …", N and the rest by the words of its record."""

  @in_turns
  def sample(self, prompts, seeds, **how):
    self.asked += len(prompts)
    asked = [self.tokenizer.seen[prompt[0]][-1].content for prompt in prompts]
    return [
      self.tokenizer.put(self.answer(text) if "Record:" in text else "[up]") for text in asked
    ]

  def answer(self, prompt):
    rng = random.Random(prompt.split("Record:")[1])  # the record alone, not what is known
    own = f"case {rng.randrange(2)}: v{rng.randrange(3)}"
    return f"{MARK} Keep away from H.\n{MARK} {own}"


@pytest.fixture(name="make_run")
def fixture_make_run(tmp_path):
  with Metrics(tmp_path) as metrics:

    def make(**changes) -> Run:
      config = short_config()
      config.extraction.max_knowledge_tokens = 400
      config.extraction.update(trajectories=6, use=5)
      config.extraction.update(changes)
      return Run(config, tmp_path, metrics, None)

    yield make


def items_of(run, number=1):
  return [[item.text for item in text.items] for text in knowledge.read(run, number)]


def test_an_item_of_too_few_conversations_does_not_cross(make_run, tmp_path):
  stage.extract(make_run(), 1, Writer())
  all_items = items_of(make_run())
  seen = {}
  for text in knowledge.read(make_run(), 1):
    for item in text.items:
      seen.setdefault(item.text, set()).add(item.trajectory)
  assert len(seen) > 3 and min(map(len, seen.values())) == 1
  (tmp_path / "round_1/knowledge/whole").unlink()
  stage.extract(make_run(min_support=2), 1, Writer())  # sampled nothing: of the same accumulation
  kept = items_of(make_run())
  assert kept == [[text for text in items if len(seen[text]) >= 2] for items in all_items]
  found = lib.read(tmp_path / "round_1/user/items.jsonl")
  games = [game.id for game in read_conversations(tmp_path / "round_1/user/trajectories.jsonl")]
  for text, conversations in seen.items():
    origin = found[lib.normalised(text)]
    assert {one.conversation for one in origin.seen} == conversations
    assert all(games[one.place - 1] == one.conversation for one in origin.seen)
    assert origin.texts == tuple(i for i, items in enumerate(kept) if text in items)
    assert origin.left_out == ("" if len(conversations) >= 2 else lib.SUPPORT)
  crossing = "".join(path.read_text() for path in (tmp_path / "round_1/knowledge").iterdir())
  assert not any(text in crossing for text in seen if len(seen[text]) < 2)
  with pytest.raises(ValueError, match="all 2 knowledge texts are empty.*extraction.min_support"):
    (tmp_path / "round_1/knowledge/whole").unlink()
    stage.extract(make_run(min_support=7), 1, Writer())


def test_the_newest_wins_in_the_texts_and_in_the_next_round(make_run, tmp_path):
  how = dict(newest_wins=True, start_from="previous_round")
  for number in (1, 2):
    stage.extract(make_run(**how), number, Writer())
    said = {text for items in items_of(make_run(), number) for text in items}
    values = {}
    for text in said:
      if key := lib.key_of(text):
        values.setdefault(key[0], set()).add(key[1])
    assert values and all(len(value) == 1 for value in values.values())
  found = lib.read(tmp_path / "round_2/user/items.jsonl")
  assert {one.round for origin in found.values() for one in origin.seen} == {1, 2}
  out = [origin for origin in found.values() if origin.left_out == lib.NEWER]
  assert out and all(origin.superseded_by in said for origin in out)


def test_another_model_writes_the_knowledge_down(make_run, tmp_path, monkeypatch):
  class Other(Writer):
    def answer(self, prompt):
      return f"{MARK} the other's word"

  asked, other = [], Other(weights=7)

  def load_policy(config, devices, **how):
    asked.append((config.weights, config.architecture, how["field"]))
    return other

  monkeypatch.setattr(stage.load, "load_policy", load_policy)
  player, run = Writer(), make_run(weights="folder")
  run.config.policy.architecture = "qwen3-1.7b"
  play_for_knowledge(run, 1, player)
  played = player.asked
  stage.extract(run, 1, player)
  assert player.asked == played and other.asked > 0
  assert asked == [("folder", "auto", "extraction.weights")]
  assert {text for items in items_of(run) for text in items} == {f"{MARK} the other's word"}
  made_from = run.manifest(1).made_from("knowledge/00.jsonl")
  assert made_from["extractor"] != made_from["weights"]
  assert stage.extract(run, 1, player) == knowledge.texts(run, 1)  # its games are its own
  assert len(asked) == 1


def test_without_repeats_an_item_stands_once_where_it_was_given_last(make_run, tmp_path):
  stage.extract(make_run(), 1, Writer())
  often = items_of(make_run())
  assert all(len(set(items)) < len(items) for items in often)
  (tmp_path / "round_1/knowledge/whole").unlink()
  stage.extract(make_run(repeats=False), 1, Writer())
  once = items_of(make_run())
  assert once == [list(dict.fromkeys(reversed(items)))[::-1] for items in often]


@pytest.mark.parametrize(
  "field, value",
  [("min_support", 2), ("told_by_others", True), ("newest_wins", True), ("repeats", False)],
)
@pytest.mark.parametrize("other", [{"form": "text"}, {"source": "trajectories"}])
def test_texts_and_transcripts_have_no_cases(make_run, field, value, other):
  config = make_run(**{field: value}, **other).config
  with pytest.raises(ValueError, match=f"config.extraction.{field} is {value}: it must be"):
    config_lib.validate(config)
  config.extraction[field] = config_lib.default().extraction[field]
  config_lib.validate(config)
