"""The paper's settings on a small model in a Hugging Face folder: two rounds as they stand, with
fewer steps and games; then out again.
"""

import importlib.util
import json
import pathlib
import shutil

import families
import jax
import numpy as np
import pytest
import torch
import transformers

from oel_jax import loop
from oel_jax.conversations.schema import Message
from oel_jax.policy import load as load_lib
from oel_jax.policy.tokenizers import HuggingFaceTokenizer
from oel_jax.runtime import mesh as mesh_lib
from oel_jax.tasks import export, stage

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
SAYS = "- EXPERIENCE ITEM: H is a hole [down]"  # knowledge to the extractor, a move to the game
FEWER = {
  "deployment.episodes": 4,
  "deployment.slots": 4,
  "extraction.trajectories": 2,
  "extraction.use": 2,
  "consolidation.steps": 2,
  "consolidation.gate_episodes": 2,
  "consolidation.log_probe": 2,
  "consolidation.batch_size": 4,
  "evaluation.episodes": 2,
  "deployment.max_turns": 2,
  "mesh.data": 1,
}


@pytest.fixture(scope="module", name="folder")
def fixture_folder(tmp_path_factory):
  """A small random Qwen3 whose head is bent, so that after any prompt it mostly says SAYS: a random
  one would never write knowledge.
  """
  folder, tokenizer = tmp_path_factory.mktemp("model"), families.tokenizer("qwen3")
  tokenizer.save_pretrained(folder)
  torch.manual_seed(0)
  model = transformers.Qwen3ForCausalLM(
    transformers.Qwen3Config(
      vocab_size=512,
      hidden_size=64,
      intermediate_size=96,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=16,
      max_position_embeddings=32768,
      tie_word_embeddings=False,
    )
  )
  wrapped = HuggingFaceTokenizer(tokenizer)
  for thinking in (True, False):
    chain = [
      wrapped.chat([Message("user", "?")], thinking=thinking)[-1],
      *wrapped.encode(SAYS),
      tokenizer.eos_token_id,
    ]
    assert len(set(chain)) == len(chain), "each token needs a successor of its own"
    with torch.no_grad():
      embedding = torch.nn.functional.normalize(model.model.embed_tokens.weight.normal_(), dim=-1)
      model.model.embed_tokens.weight.copy_(embedding * 8)
      for now, then in zip(chain, chain[1:]):
        model.lm_head.weight[then] += 2 * embedding[now]
  model.save_pretrained(folder)
  (folder / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]})
  )
  return folder


def load(name: str, size: str):
  spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(size)


@pytest.fixture(name="one_device", autouse=True)
def fixture_one_device(monkeypatch):
  make = mesh_lib.make_mesh
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda asked: make(asked, jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, size",
  [
    ("sokoban", "qwen3-4b-instruct"),
    ("frozen_lake", "qwen3-1.7b"),
    ("frozen_lake", "qwen3-4b"),
    ("frozen_lake", "qwen3-8b"),
    ("frozen_lake", "qwen3-1.7b-paper"),
    ("sokoban", "qwen3-4b-instruct-paper"),
  ],
)
def test_the_papers_settings_run_two_rounds_and_go_back_to_hugging_face(
  name, size, folder, tmp_path
):
  config = load(name, size)
  config.update_from_flattened_dict(FEWER | {"rounds": 2, "policy.weights": str(folder)})
  if size.endswith("-paper"):
    config.update_from_flattened_dict({"consolidation.games_per_step": 2, "consolidation.k": 64})
  results = loop.run(config, tmp_path / "run")
  assert [entry["round"] for entry in results["rounds"]] == [1, 2]
  knowledge = (tmp_path / "run/round_1/knowledge/00.md").read_text()
  assert "H is a hole" in knowledge
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  steps = [line for line in lines if line["stage"] == "consolidate" and line["step"] > 0]
  assert [(line["round"], line["step"]) for line in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
  # Near 0: knowledge hardly moves so bent a head. Over some tokens it is no divergence.
  some = size.endswith("-paper")
  assert all(np.isfinite(line["loss"]) and line["loss"] > -1e-5 - some for line in steps)
  if some:  # all the prompts of two games of one turn or two, which no other step has
    assert all(2 <= line["samples"] <= 4 for line in steps)

  export.run(config, tmp_path / "run", dtype="float32")
  again = transformers.Qwen3ForCausalLM.from_pretrained(
    tmp_path / "run/export", dtype=torch.float32
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/export")
  assert tokenizer.chat_template == families.tokenizer("qwen3").chat_template
  assert again.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
  before = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  ids = torch.tensor([tokenizer.encode("How are you?")])
  config.policy.weights = str(tmp_path / "run/export")
  policy = load_lib.load_policy(config.policy, mesh_lib.make_mesh(config.mesh))
  with torch.no_grad():
    trained, first = again(ids).logits.numpy(), before(ids).logits.numpy()
  np.testing.assert_allclose(logits(policy, ids.numpy()), trained, atol=1e-4)
  assert np.abs(trained - first).max() > 0  # the trained weights, not those the run began with


def logits(policy, ids):
  from oel_jax.policy import transformer as model

  positions = np.arange(ids.shape[1])[None]
  hidden, _ = model.apply(policy.params, policy.architecture, ids, positions, np.ones_like(ids))
  return model.logits(hidden, model.head(policy.params))


def said_by(user: str, number: int, *more: dict) -> dict:
  messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {
      "role": "user",
      "content": f"{user} asks for the {number}. time: where does case {number} go?",
    },
    {"role": "assistant", "content": f"To desk {number}."},
    *more,
  ]
  feedback = f"It went to desk {number + 1}, in hall H."  # the name in SAYS has to be told
  return {"messages": messages, "user": user, "feedback": feedback}


def test_logs_alone_become_knowledge_prompts_and_weights(folder, tmp_path, capsys):
  """Two rounds, each with logs of its own; no game, no environment."""
  users = [f"user{i}" for i in range(12)]
  for number in (1, 2):
    (tmp_path / "logs" / str(number)).mkdir(parents=True)
    lines = [said_by(user, 10 * number + i) for i, user in enumerate(users)]
    again = {"role": "user", "content": "Write to ann@example.com, then."}
    lines += [
      said_by(user, 50 + number, again, {"role": "assistant", "content": "Done."}) for user in users
    ]
    lines += lines[:3]  # said twice
    (tmp_path / "logs" / str(number) / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
  config = load("from_logs", "qwen3-1.7b")
  few = {name: value for name, value in FEWER.items() if not name.startswith("deployment.")}
  few |= {
    "rounds": 2,
    "policy.weights": str(folder),
    "logs.path": str(tmp_path / "logs/{round}"),
    "logs.held_out": 0.4,
    "logs.near": 2.0,  # these are all alike
    "deployment.episodes": 100,
    "deployment.max_response_tokens": 32,
    "extraction.texts": 2,
    "consolidation.gate_episodes": 0,
    "consolidation.log_probe": 0,  # the held-out prompts have a probe of their own
    "evaluation.episodes": 4,
    "evaluation.retention": 0,  # what is forgotten has a test of its own
    "evaluation.unrelated": "",
  }
  config.update_from_flattened_dict(few)
  later = tmp_path / "logs/2"
  later.rename(tmp_path / "later")
  with pytest.raises(FileNotFoundError, match="logs/2: round 2 begins from the logs there, and"):
    loop.run(config, tmp_path / "run")
  assert (tmp_path / "run/report/index.html").exists()  # of the round that is done
  (tmp_path / "later").rename(later)
  results = loop.run(config, tmp_path / "run")
  for number in (1, 2):
    round = tmp_path / f"run/round_{number}"
    texts = {name: (round / name).read_text() for name in ("prompts.jsonl", "user/held_out.jsonl")}
    of = {name: {user for user in users if f"{user} asks" in text} for name, text in texts.items()}
    assert not of["prompts.jsonl"] & of["user/held_out.jsonl"]
    assert of["user/held_out.jsonl"] and len(of["prompts.jsonl"]) >= 4
    # One prompt an answer: the first, and in the longer conversation the first and the second.
    assert len(texts["prompts.jsonl"].splitlines()) == 3 * len(of["prompts.jsonl"])
    assert "ann@example.com" not in texts["prompts.jsonl"] and "[EMAIL]" in texts["prompts.jsonl"]
    assert "H is a hole" in (round / "knowledge/00.md").read_text()
    found = json.loads((round / "user/logs.json").read_text())
    # In one prompt of each longer conversation, be that drawn for knowledge, too.
    redacted = sum(text.count("[EMAIL]") for text in texts.values())
    assert found["logs"]["same"] == 3 and found["redacted"] == {"EMAIL": redacted}
  told = capsys.readouterr().out
  assert "round 1: " in told and "3 conversations say the same as another and were left out" in told
  assert "taken out of what is kept: EMAIL" in told and "ann@example.com" not in told
  for entry in results["rounds"]:
    away = entry["held_out"]
    assert entry["passed_count"] == 0 and away["prompts"] >= 4
    counts = {name: share["cut_count"] for name, share in entry["cut"].items()}
    assert counts == {
      "consolidation": 8,
      "held_out_before": away["prompts"],
      "held_out_after": away["prompts"],
    }
    assert np.isfinite([away["kl_before"], away["kl_after"]]).all() and away["kl_before"] >= -1e-6
  page = (tmp_path / "run/report/index.html").read_text()
  assert "Held-out conversations" in page and "Consolidation, step by step" in page
  for of_games in ("Passed", "Games passed", "Turns a game", "not checked"):
    assert f">{of_games}<" not in page, of_games
  assert "Held-out prompts, before and after" in page and "After round 2" in page
  before = (tmp_path / "run/round_1/prompts.jsonl").read_bytes()
  shutil.rmtree(tmp_path / "logs/1")
  assert loop.run(config, tmp_path / "run") == results
  assert (tmp_path / "run/round_1/prompts.jsonl").read_bytes() == before


@pytest.mark.slow
def test_what_is_forgotten_is_measured_before_and_after_every_round(folder, tmp_path):
  """On a real tokenizer and chat template, from logs, where nothing is played; and again by the one
  stage alone, which reads the base from where it was.
  """
  lines = [said_by(f"user{i}", i) for i in range(12)]
  (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
  config = load("from_logs", "qwen3-1.7b")
  few = {name: value for name, value in FEWER.items() if not name.startswith("deployment.")}
  few |= {
    "rounds": 1,
    "policy.weights": str(folder),
    "logs.path": str(tmp_path / "log.jsonl"),
    "logs.near": 2.0,
    "deployment.max_response_tokens": 32,
    "extraction.texts": 2,
    "consolidation.gate_episodes": 0,
    "consolidation.log_probe": 0,
    "consolidation.learning_rate": 0.1,  # so bent a head hardly moves
    "evaluation.retention": 33,
  }
  config.update_from_flattened_dict(few)
  results = loop.run(config, tmp_path / "run")
  kept = [results["base_retention"], *(entry["retention"] for entry in results["rounds"])]
  assert [entry["instructions_count"] for entry in kept] == [33] * 2
  assert all(len(entry["instructions_categories"]) == 33 for entry in kept)
  moved = [results["base"]["unrelated"], *(entry["unrelated"] for entry in results["rounds"])]
  assert [entry["prompts"] for entry in moved] == [60] * 2
  kl = [entry["kl"] for entry in moved]
  assert abs(kl[0]) < 1e-6 and kl[1] > 1e-4
  page = (tmp_path / "run/report/index.html").read_text()
  assert "Instructions, part by part" in page and "KL to the base" in page
  measured = tmp_path / "run/round_1/evaluation.json"
  before = json.loads(measured.read_text())["unrelated"]
  measured.unlink()
  stage.run(config, str(tmp_path / "run"), stage="evaluate", number=1)
  assert json.loads(measured.read_text())["unrelated"] == before
