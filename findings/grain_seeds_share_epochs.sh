#!/usr/bin/env bash
# grain 0.2.18: a MapDataset's shuffle with seed s has in its second epoch the order that seed s + 1 has in its first, and so on for ever.
#
# A guess: another seed is another order in each epoch, so three runs with seeds 0, 1 and 2 see the data in unrelated orders. Seen: each epoch's order is drawn
# from the seed plus the epoch's number. Of nine epochs (three seeds, three each) there are five orders; over n epochs two neighbouring seeds
# have n - 1 in common, one epoch apart. So what comes of three such runs is less independent than the spread over seeds is taken to be, and a run
# that is begun anew at each round with the seed plus the round's number meets the epochs it has had. WindowShuffle is the same by windows: those of seed 1
# have the order that the next ones of seed 0 have. With a seed given by `.seed(s)` all nine orders differ.
# `random_map` draws by an element's number in ITS dataset, whatever its parents: two processes that shard first (`[0::2]`, `[1::2]`) and two sources that are mixed
# afterwards have the same noise, number by number, under one `.seed`. Sharded or mixed behind random_map, or with a seed each, all of it differs.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import grain

N, EPOCHS = 1000, 3


def epochs(dataset, length=N):
  order = [int(dataset[i]) for i in range(length * EPOCHS)]
  return [tuple(number % length for number in order[i : i + length]) for i in range(0, len(order), length)]


def tell(name, orders):
  names = {}
  for order in sum(orders, []):
    names.setdefault(order, "ABCDEFGHI"[len(names)])
  print(f"{name}:", *("".join(names[order] for order in of_seed) for of_seed in orders))


def noise(number, rng):
  return rng.integers(2**32)


tell("shuffle(seed=0), 1, 2", [epochs(grain.MapDataset.range(N).shuffle(seed=s).repeat()) for s in range(3)])
tell("shuffle(seed=0), 10, 20", [epochs(grain.MapDataset.range(N).shuffle(seed=s).repeat()) for s in (0, 10, 20)])
tell("seed(0).shuffle(), 1, 2", [epochs(grain.MapDataset.range(N).seed(s).shuffle().repeat()) for s in range(3)])
windows = [grain.experimental.WindowShuffleMapDataset(grain.MapDataset.range(300), window_size=100, seed=s) for s in range(3)]
tell("windows of seed 0, 1, 2", [epochs(each, 100) for each in windows])

numbers = grain.MapDataset.range(N).seed(0)
drawn = numbers.random_map(noise)
pairs = {
  "sharded before random_map": [numbers[k::2].random_map(noise) for k in range(2)],
  "sharded behind it": [drawn[k::2] for k in range(2)],
  "two sources before mix, one seed": [grain.MapDataset.range(k * N, k * N + N).seed(0).random_map(noise) for k in range(2)],
  "two sources before mix, a seed each": [grain.MapDataset.range(k * N, k * N + N).seed(k).random_map(noise) for k in range(2)],
}
for name, (one, other) in pairs.items():
  print(f"{name}: {sum(one[i] == other[i] for i in range(500))} of 500 numbers are the same")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
shuffle(seed=0), 1, 2: ABC BCD CDE
shuffle(seed=0), 10, 20: ABC DEF GHI
seed(0).shuffle(), 1, 2: ABC DEF GHI
windows of seed 0, 1, 2: ABC BCD CDE
sharded before random_map: 500 of 500 numbers are the same
sharded behind it: 0 of 500 numbers are the same
two sources before mix, one seed: 500 of 500 numbers are the same
two sources before mix, a seed each: 0 of 500 numbers are the same
SEEN
