#!/usr/bin/env bash
# textarena 0.7.4: Minesweeper goes on after a mine, and a player that steps on every mine of the board wins with the full reward.
#
# A guess: a mine ends the game, with the share of cells that were cleared as the reward. Seen: a mine is an "invalid move", and one of these is forgiven; the
# count of what was forgiven begins anew with each valid move, and a mine takes no turn. So only two mines in a row end the game. The player is told where the
# mine is and that it should "resubmit a valid move"; the cell stays covered. One that steps on a mine before each safe cell finds all ten mines in 35 moves,
# of which 25 count as turns, and is paid 1, as one that steps on none. So what is called solved says little of having reasoned about the numbers,
# and a policy is paid for probing wherever it is unsure.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q textarena==0.7.4
(cd "$folder" && "$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors") <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import textarena


def play(seed, mines_between):
  """Opens the safe cells in order, and that many mines that were not yet stepped on before each of them."""
  env = textarena.make("Minesweeper-v0-raw")
  env.reset(num_players=1, seed=seed)
  done, _ = env.step("[2 2]")
  moves, steps = 1, 0
  cells = [(row, column) for row in range(env.rows) for column in range(env.cols)]
  mines = [cell for cell in cells if env.grid[cell[0]][cell[1]] == -1]
  while not done:
    safe = next((row, column) for row, column in cells if (row, column) not in mines and not env.revealed[row][column])
    stepped, mines_left = mines[steps : steps + mines_between], len(mines) - steps
    for row, column in [*stepped, safe]:
      steps += (row, column) in mines
      moves += 1
      done, _ = env.step(f"[{row} {column}]")
      if done:
        break
  rewards, info = env.close()
  return f"{steps} of {len(mines)} mines stepped on in {moves} moves ({info[0]['turn_count']} turns), reward {rewards[0]:.2f}: {info[0]['reason']}"


for mines_between in (0, 1, 2):
  for seed in (0, 1):
    print(f"{mines_between} mines before each safe cell, seed {seed}:", play(seed, mines_between))
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
0 mines before each safe cell, seed 0: 0 of 10 mines stepped on in 27 moves (27 turns), reward 1.00: Congratulations! You have successfully cleared the Minesweeper board.
0 mines before each safe cell, seed 1: 0 of 10 mines stepped on in 25 moves (25 turns), reward 1.00: Congratulations! You have successfully cleared the Minesweeper board.
1 mines before each safe cell, seed 0: 10 of 10 mines stepped on in 37 moves (27 turns), reward 1.00: Congratulations! You have successfully cleared the Minesweeper board.
1 mines before each safe cell, seed 1: 10 of 10 mines stepped on in 35 moves (25 turns), reward 1.00: Congratulations! You have successfully cleared the Minesweeper board.
2 mines before each safe cell, seed 0: 2 of 10 mines stepped on in 3 moves (2 turns), reward 0.00: Invalid Move: You hit a mine at (1, 5).
2 mines before each safe cell, seed 1: 2 of 10 mines stepped on in 3 moves (2 turns), reward 0.00: Invalid Move: You hit a mine at (0, 7).
SEEN
