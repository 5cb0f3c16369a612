#!/usr/bin/env bash
# grain 0.2.18: IndexSampler with shuffle, whose documentation says "global", shuffles each shard by itself, and all shards by one and the same permutation.
#
# A guess: all records are shuffled, anew for each epoch, and the shards take turns in that order; so a process meets any record sooner or later, and what the
# processes read at one time has nothing to do with each other. Seen: each shard is a run of neighbouring records for ever, and the permutation of its places
# is that of every other shard. So record i of the first shard is always trained on together with record i of the second, in each epoch; a file
# that is sorted (by source, language or length) gives each process one kind of it alone. MapDataset.range(n).shuffle(seed)[process::processes] is what
# one would think. And the random numbers that a record's transformations get are those of the key seed + index: a run with seed 1 has, record by
# record, those that the run with seed 0 had for the one after.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q grain==0.2.18 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - > "$folder/seen" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import grain.python as grain

RECORDS, EPOCHS, PROCESSES, SEED = 1000, 3, 2, 0


class Numbers:
  def __len__(self):
    return RECORDS

  def __getitem__(self, i):
    return i

  def __repr__(self):
    return f"Numbers({RECORDS})"


class Draw(grain.RandomMapTransform):
  def random_map(self, element, rng):
    return float(rng.random())


def loader(process, processes, seed=SEED, operations=(), shuffle=True):
  shards = grain.ShardOptions(process, processes, drop_remainder=True)
  sampler = grain.IndexSampler(RECORDS, shard_options=shards, shuffle=shuffle, num_epochs=EPOCHS, seed=seed)
  return list(grain.DataLoader(data_source=Numbers(), sampler=sampler, operations=operations))


def tell(name, orders):
  first, second = orders
  size = RECORDS // PROCESSES
  epochs = [set(first[i : i + size]) for i in range(0, len(first), size)]
  ever = len(set(first))
  apart = {b - a for a, b in zip(first, second)}
  print(f"{name}: process 0 reads {ever} of {RECORDS} records in {EPOCHS} epochs, {min(epochs[0])} to {max(epochs[0])} in the first")
  print(f"{name}: what process 1 reads at the same time is {f'always {apart.pop()} further' if len(apart) == 1 else 'at any distance'}")


order = grain.MapDataset.range(RECORDS).shuffle(seed=SEED).repeat(EPOCHS)
tell("IndexSampler", [loader(process, PROCESSES) for process in range(PROCESSES)])
tell("MapDataset", [list(order[process::PROCESSES]) for process in range(PROCESSES)])
zero, one = (loader(0, 1, seed, [Draw()]) for seed in (0, 1))
print(f"random numbers of seeds 0 and 1: {len(set(zero) & set(one))} of {len(zero)} are the same, one place apart: {zero[1:] == one[:-1]}")
PYTHON
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
IndexSampler: process 0 reads 500 of 1000 records in 3 epochs, 0 to 499 in the first
IndexSampler: what process 1 reads at the same time is always 500 further
MapDataset: process 0 reads 887 of 1000 records in 3 epochs, 0 to 999 in the first
MapDataset: what process 1 reads at the same time is at any distance
random numbers of seeds 0 and 1: 2999 of 3000 are the same, one place apart: True
SEEN
