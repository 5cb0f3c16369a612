#!/usr/bin/env bash
# textarena 0.7.4: Bandit pays nothing for the best button, and the more the worse the chosen one is.
#
# A guess: the player tries buttons for 20 turns, names the best one in the last, and is paid 1 if it is, less or nothing otherwise. Seen: the reward for "an
# incorrect button" is the regret, the best button's chance minus the chosen one's, so of five buttons the worst is paid the most. And the best one counts as
# incorrect, too: the name that was chosen is compared with the table of all chances, which it never equals, so nobody is ever told that the button was
# right, and the regret of the best one is 0. A policy that is trained on this reward learns to name the worst button; an evaluation that counts
# rewards of 1 as solved finds that no model solves it.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q textarena==0.7.4
(cd "$folder" && "$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors") <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import textarena


def play(game, seed, rank):
  """Presses one button all the time, in the last turn, too: chance and reward, and what the game says."""
  env = textarena.make(game)
  env.reset(num_players=1, seed=seed)
  chances = env.state.game_state["ground_truth"]
  button = sorted(chances, key=chances.get, reverse=True)[rank]
  done = False
  while not done:
    done, _ = env.step(f"[{button}]")
  rewards, info = env.close()
  return f"{chances[button]:.3f}: {rewards[0]:.3f}", info[0]["reason"]


for seed in range(3):
  pairs = [play("Bandit-v0-raw", seed, rank)[0] for rank in range(5)]
  print(f"seed {seed}, chance of the button: reward, from best to worst:", ", ".join(pairs))
said = {play(game, seed, 0)[1] for game in ("Bandit-v0-raw", "Bandit-v0-hard-raw") for seed in range(20)}
print("said of the best button in 40 games:", *said)
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
seed 0, chance of the button: reward, from best to worst: 0.550: 0.000, 0.365: 0.185, 0.279: 0.271, 0.247: 0.303, 0.191: 0.359
seed 1, chance of the button: reward, from best to worst: 0.550: 0.000, 0.381: 0.169, 0.299: 0.251, 0.141: 0.409, 0.122: 0.428
seed 2, chance of the button: reward, from best to worst: 0.550: 0.000, 0.383: 0.167, 0.226: 0.324, 0.159: 0.391, 0.132: 0.418
said of the best button in 40 games: You chose an incorrect button.
SEEN
