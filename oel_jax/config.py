"""The default configuration: every field, its unit and where its value comes from.

The values are the paper's common constants (arXiv 2603.16856, section 4 and appendix) with Frozen
Lake and Qwen3-1.7B as the setting. A file in `experiments/` starts from `default()` and overrides
what its figure or table needs.
"""

from typing import Any

import ml_collections
from ml_collections import config_dict

from oel_jax import config_checks

# Short names of what modules outside the core have, each for its MODULE:NAME.
POLICIES = {"pocket": "oel_jax.pocket.load:load"}  # of config.policy.weights
TASKS = {  # of config.task
  "distill": "oel_jax.tasks.distill:run",
  "pretrain": "oel_jax.pocket.pretrain:run",
}


def default() -> ml_collections.ConfigDict:
  """Returns the locked default configuration, field by field."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # every draw derives from (seed, round, stage, index)
  config.rounds = 2  # deploy → extract → consolidate → evaluate, this often
  # For --stage=withdraw: conversations to be taken out of the run, by their ids, or a user's as
  # user:NAME, with commas between.
  config.withdraw = ""
  config.plan = _plan()
  # The project of Weights & Biases that gets the metrics, too; "": nothing is sent anywhere.
  config.wandb_project = ""
  # gs://BUCKET/FOLDER, or another place (runtime/mirror.py), where a copy of the run directory is
  # kept, all that was said in it, too, and an empty one is filled from; "": none
  config.mirror = ""

  config.policy = _policy()
  config.deployment = _deployment()
  config.logs = _logs()
  config.extraction = _extraction()
  config.consolidation = _consolidation()
  config.evaluation = _evaluation()
  config.mesh = _mesh()
  return config.lock()


def _plan() -> ml_collections.ConfigDict:
  """config.plan: for --stage=plan, which says what a run will take; a run reads none of it."""
  return ml_collections.ConfigDict(
    dict(
      # a kind of device (runtime/target.py) and how many of it: "h200,8"; "": none
      device="",
      prompt_tokens=600,  # of the longest prompt that is trained on
      price=0.0,  # of a device and hour, in whatever money; 0: not told
    )
  )


def _policy() -> ml_collections.ConfigDict:
  """config.policy: the language model that is deployed and trained."""
  return ml_collections.ConfigDict(
    dict(
      # "auto": as the weights say; or a name of policy/architecture.py, which they must then agree
      # with
      architecture="auto",
      # A Hugging Face folder; a .gguf file; a .safetensors file of ours, its tokenizer.model beside
      # it; MODULE:NAME or FILE.py:NAME, a function (compute dtype) -> Policy; or "pocket", the
      # embedded policy.
      weights=config_dict.placeholder(str),
      # "auto": bfloat16 on accelerators, float32 on CPU; or "bfloat16" or "float32"
      compute_dtype="auto",
      thinking=True,  # whether the chat template opens a thinking block
      max_prompt_tokens=16384,  # a longer prompt is an error that names this field
    )
  )


def _deployment() -> ml_collections.ConfigDict:
  """config.deployment: what is played, and how; its turns become the prompts."""
  return ml_collections.ConfigDict(
    dict(
      # "textarena"; or what makes an environment of one's own (environments/api.py), called with
      # game_args: "FILE.py:NAME" or "MODULE:NAME"; or "": none, where logs.path says what was said
      environment="textarena",
      game="FrozenLake-v0-raw",  # a single-player TextArena game, by its registered name
      game_args=ml_collections.ConfigDict(
        dict(size=3, num_holes=2, randomize_start_goal=False)
      ),  # keyword arguments of the game
      player="P",  # how the board shows the player; "" if it does not
      actions="[up], [down], [left], [right]",  # the allowed actions, in the words of the prompt
      # regular expression, case ignored; group 1 goes to the game in brackets
      action_pattern=r"\[\s*(up|down|left|right)\s*\]",
      episodes=64,  # games whose turns become consolidation's prompts
      passed_reward=1.0,  # a game is passed that ends by its own word with at least this reward
      max_turns=5,  # moves; a game that goes on after them is stopped and not passed
      max_response_tokens=1024,  # a turn
      temperature=0.7,  # sampling of the turns
      top_p=1.0,  # 1: off
      top_k=0,  # 0: off
      slots=64,  # games played side by side
      # Base URL, as "http://HOST:PORT/v1", of a server that speaks OpenAI's chat completions and
      # plays the games of this stage in the place of our own policy; "": none. It must serve the
      # weights that the round begins with: gate and evaluation measure our own, which is trained.
      # It decides what is not sent: what is are temperature, top_p and, if it is on, top_k;
      # llama.cpp has top_k 40 and min_p 0.05 unless it is started without. Its key is the
      # environment's OEL_ENDPOINT_KEY, and is written nowhere.
      endpoint="",
      endpoint_model="",  # the name that it has for those weights
      endpoint_timeout=600.0,  # seconds in which a request must be answered whole
      # times that a request which fails is tried again, after 1 s, 2 s, 4 s, ... at most a minute;
      # then its game is left out; 8 outlast a server that starts anew and loads a small model
      endpoint_retries=8,
    )
  )


def _logs() -> ml_collections.ConfigDict:
  """config.logs: what was said to a deployed model, where that takes the place of games."""
  return ml_collections.ConfigDict(
    dict(
      # What the deployed model and its users said, in place of games: a log or a folder of them
      # (conversations/logs.py); "{round}" in it is the round's number. "": games are played.
      path="",
      # share of the users, or of the conversations of nobody in particular, that are measured on
      # and never learned from
      held_out=0.1,
      # the share of five-word sequences in common from which two conversations are one; above 1:
      # none are
      near=0.8,
      # who answered in the deployed policy's place: the names that such messages of the assistant
      # have, with commas between; "*": people wrote all of them; "": the policy did. What people
      # say counts as told for extraction.told_by_others and answered_only
      people="",
      # a JSON file of definitions of tools, in any form of conversations/tools.py, for agents'
      # sessions that name none, as those of Claude Code; "": then their prompts offer none
      tools="",
      # what must not cross beside addresses, numbers and keys (conversations/redact.py): a file of
      # names, one a line; "": none
      redact_names="",
      # MODULE:NAME or FILE.py:NAME, a function (text) -> text that has the last word; "": none
      redact_hook="",
    )
  )


def _extraction() -> ml_collections.ConfigDict:
  """config.extraction: how knowledge is written down (OEL section 3)."""
  return ml_collections.ConfigDict(
    dict(
      texts=10,  # K knowledge texts, each from its own seed
      trajectories=30,  # accumulated, a text
      use=15,  # the text as it stood after this many trajectories is what consolidation uses
      form="items",  # "items": lines that begin "- EXPERIENCE ITEM:"; "text": free text
      # in whose words the extractor is asked and the knowledge told: "games" or "conversations"
      wording="games",
      see_previous=True,  # whether the extractor sees the knowledge so far
      # whether to leave out conversations in which nobody said anything to what the policy said:
      # silence teaches nothing, unless somebody better spoke in the policy's place
      answered_only=False,
      # "nothing": e_0 is empty in each round (the paper); "previous_round": items are carried over
      start_from="nothing",
      # Another model that writes the knowledge down, as policy.weights names one; "": the policy
      # itself (OEL Table 2: knowledge of one's own against that of a larger or a smaller model)
      weights="",
      # "extracted"; controls: "trajectories" (raw), "empty" (wrapper only)
      source="extracted",
      # MODULE:NAME or FILE.py:NAME, a function (text of a new item) -> text, which the round's
      # knowledge says instead; "": none
      edit="",
      # distinct conversations that must have given an item (`extraction/provenance.py`) for it to
      # enter the round's knowledge
      min_support=1,
      # whether of these only conversations count in which others said it: a user, a tool, the
      # outcome or the feedback, not the policy alone, which may be wrong the same way each time
      told_by_others=False,
      # of items about one case ("CASE: ANSWER") that say different things, only that of the latest
      # conversation enters
      newest_wins=False,
      # whether an item stands in a text as often as it was given (the paper); False: once, where it
      # was given last
      repeats=True,
      max_knowledge_tokens=8192,  # over it, the oldest whole items go
      max_response_tokens=1024,  # an answer of the extractor, thinking included
      temperature=0.7,  # sampling of the answers
      top_p=0.8,  # 1: off
      top_k=20,  # 0: off
    )
  )


def _consolidation() -> ml_collections.ConfigDict:
  """config.consolidation: how knowledge is trained into the weights (OEL section 3)."""
  return ml_collections.ConfigDict(
    dict(
      steps=20,  # optimizer steps a round
      later_steps=0,  # those of the second round and of each later one; 0: as many as the first's
      batch_size=64,  # prompts a step, one sample each, one update
      # in its place, all the prompts of so many games a step, new games each step, for which
      # deployment.episodes must suffice; 0: batch_size prompts, of whatever games
      games_per_step=0,
      # who samples the responses: "student" (on-policy) or "teacher" (off-policy, knowledge in its
      # prompt)
      data="student",
      # when a prompt's sample is drawn anew: "step": whenever it comes up, by the student as it
      # then is; "round": once a round, by the weights that the round began with; "never": the same,
      # but by those that the run began with
      renewed="step",
      # whether responses that the limit of tokens cut are trained on
      cut_responses=True,
      # whose view of the knowledge is learned: "frozen": that of the weights as the round began;
      # "first": of those that the run began with; "live": of the student as it is at each step
      teacher="frozen",
      # a name in `consolidation.divergences.DIVERGENCES`, or "imitation": negative log-likelihood
      # of the sampled tokens
      kind="reverse_kl",
      # "full" (exact) | "topk" (the paper's, student's top k, no tail) | "topk_tail"
      support="full",
      k=256,  # tokens of that support
      # whether all tokens that end a response are one to the divergence: which of them it is, is
      # not learned
      one_end=False,
      temperature=0.7,  # of the divergence, on both sides; also of the samples
      learning_rate=1e-6,  # AdamW's, no warm-up
      # share of it that a round's last step has, to which it falls in a line; 1: constant
      final_rate=1.0,
      decay=1.0,  # share of a round's steps, its last ones, over which it falls; 1: all of them
      # above 0: of each layer's matrices only what a product of this rank adds to them is learned
      # (LoRA; consolidation/lora.py), at a rate some ten times as high; the rest stays as it is
      lora_rank=0,
      lora_alpha=32.0,  # the product is multiplied by this over the rank
      b1=0.9,  # decay of the gradient's mean
      b2=0.999,  # decay of its square
      eps=1e-8,  # added to its root
      weight_decay=0.01,  # decoupled, times the rate
      clip_norm=1.0,  # global gradient norm
      # several samples a row; False: one each, which cuDNN's causal attention needs and long
      # responses lose little by
      pack=True,
      # most tokens a forward-backward pass and device, a row at least; no result depends on it
      micro_tokens=16384,
      # what the backward pass computes again: "none", "dots" (all but products and attention) or
      # "full" (each whole layer)
      remat="dots",
      # "yes": layers without a loop, if mesh.tensor divides heads, feed-forward and vocabulary:
      # faster on NVIDIA GPUs, compiled longer; "no"; "auto": there, in bfloat16
      unroll="auto",
      # "xla", "cudnn" (its mask honours packing), "flash" (needs pack=False) or a TPU's "splash";
      # "auto": the fastest of them here
      attention="auto",
      chunk=512,  # tokens whose logits are live at a time
      # of a device, for keys and values of the knowledge; beyond, they stay on the host, if the run
      # is one process
      knowledge_gib=16.0,
      # share of the teacher's layers that lie in the host's memory, matrices and knowledge's keys
      # and values, and come to the device once a step, each while the one before runs; of one
      # device, with layers without a loop (consolidation/streamed.py); 0: none
      teacher_on_host=0.0,
      # play with knowledge no better: "warn" and train, or "stop"; "skip" training if it is worse,
      # else warn
      on_no_gain="warn",
      gate_episodes=64,  # games of each kind for that comparison
      # share of a step's samples, by their tokens, that are trained on: those over which teacher
      # and student disagree most (consolidation/selection.py); 1: all
      select=1.0,
      # whether prompts are drawn so that each conversation counts alike; False: each of its turns
      balance=False,
      # weight of the term that keeps what the round's first weights do with knowledge in their
      # prompts (consolidation/anchor.py); 0: none
      anchor=0.0,
      anchor_share=0.125,  # share of a step's samples that it is of
      # MODULE:NAME or FILE.py:NAME, a function (knowledge text) -> text, which stands in its
      # prompts instead; "": the round's own
      anchor_edit="",
      checkpoint_every=10,  # steps
      # what a finished training leaves: "checkpoints", the last two, or "weights", the parameters
      # alone, a third of one checkpoint, with which it cannot be trained for more steps
      keep="checkpoints",
      # samples of a fixed batch; its KL, entropies and top-k mass (probe_…) are logged with each
      # checkpoint; 0: none
      log_probe=32,
    )
  )


def _evaluation() -> ml_collections.ConfigDict:
  """config.evaluation: what is measured in each round."""
  return ml_collections.ConfigDict(
    dict(
      episodes=128,  # held-out maps, the same in every round
      temperature=0.7,  # sampling of the turns; the gate before training plays with it too
      top_p=0.8,  # 1: off
      top_k=20,  # 0: off
      in_context=True,  # also play with the round's knowledge in the prompt, and with round 1's
      # also play with the knowledge as it stood after these many trajectories
      accumulation=(),
      accumulation_rounds=1,  # in so many rounds from the first
      # each MODULE:NAME or FILE.py:NAME, a function of evaluation/tasks.py's kind; what must not be
      # lost
      tasks=(),
      retention=0,  # examples of each of those tasks; 0: none
      # held-out games whose first prompt the policy answers without knowledge, for the entropy and
      # the mass on consolidation.k tokens of its own answers (`stages/own_answers.py`); 0: none
      own_answers=0,
      # prompts (.txt, .jsonl or .json, `conversations/importers.py`) that have nothing to do with
      # what is learned: on them is measured how far the model has moved from the one that the run
      # began with (`stages/unrelated.py`); "": not measured
      unrelated="",
    )
  )


def _mesh() -> ml_collections.ConfigDict:
  """config.mesh: how devices are laid out."""
  return ml_collections.ConfigDict(
    dict(
      # devices on each axis; -1: all that are left
      data=-1,  # rows
      fsdp=1,  # rows, and parameters and optimizer by their width
      tensor=1,  # heads, feed-forward, vocabulary
      # devices of a process that hold the weights together while they sample, each its share of
      # heads, feed-forward and vocabulary (`policy/sampling/groups.py`); 1: each has them whole
      sample_tensor=1,
    )
  )


def default_distill() -> ml_collections.ConfigDict:
  """Returns `default()` with `task` = "distill" and the fields of `oel_jax.tasks.distill`."""
  config = default()
  with config.unlocked():
    config.task = "distill"
    config.distill = ml_collections.ConfigDict(
      dict(
        knowledge="",  # file with the text that only the teacher's prompts hold
        # what is answered in training: .txt, .jsonl or .json (`conversations/importers.py`)
        prompts="",
        held_out="",  # the same, to measure on
        unrelated="",  # the same, to measure what else has changed; "": not measured
        # FILE.py:FUNCTION, which is given an answer and says whether it has the wanted form
        obeys="",
        # the same of a prompt's last message and an answer: whether that says what it should; "":
        # not judged
        content="",
      )
    )
  return config


def policy(config: Any) -> Any:
  """Returns config.policy with a short name of POLICIES written out, as `policy.load` takes it."""
  copy = config.policy.copy_and_resolve_references()
  copy.weights = POLICIES.get(copy.weights, copy.weights)
  return copy


def extractor(config: Any) -> Any:
  """Returns the config.policy of the model that config.extraction.weights names."""
  copy = config.policy.copy_and_resolve_references()
  weights = config.extraction.weights
  copy.weights, copy.architecture = POLICIES.get(weights, weights), "auto"
  return copy


def consolidation(config: Any, number: int) -> Any:
  """Returns config.consolidation as it is for round `number`, with that round's `steps`."""
  copy = config.consolidation.copy_and_resolve_references()
  if number > 1 and copy.later_steps:
    copy.steps = copy.later_steps
  return copy


def validate(
  config: ml_collections.ConfigDict, expected: ml_collections.ConfigDict | None = None
) -> None:
  """Raises ValueError naming the field, the value seen and what would be right; ImportError if
  `wandb_project` is set and wandb not installed.

  Checks that each field of `expected` (None: of `default()`) is there and of its type, and fields
  alone and against each other (`config_checks`).
  """
  config_checks.check(config, default() if expected is None else expected)
