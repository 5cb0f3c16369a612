#!/usr/bin/env bash
# sentencepiece 0.2.3: sampling from a unigram model breaks user_defined_symbols into letters; from a BPE model it never does.
#
# A guess: what is said of these symbols, that each is one piece wherever it stands, holds with enable_sampling, too: <turn> and <end> keep their ids, and the
# words around them are cut in different ways. Seen on one corpus and one conversation, 2,000 draws each:
#   - unigram: pieces such as "<", "t", "u" stand in a symbol's place in three quarters of the draws at alpha 0, and in one of seventeen at alpha 0.1, which
#     the package's own README uses. Among the 64 best segmentations, as nbest_size=64 takes them, there are such, too
#   - BPE (dropout): at no alpha, 1 among them, where every other piece is a single character
# So a markup that is safe under plain encoding, and under BPE, is gone in some training examples when subword regularisation is switched on: the model sees
# turns that do not end, and a mask of what is trained on that is found by the symbols' ids finds none. decode() gives the same text either way, so
# a round trip does not tell.
#
# Ends with 0 if it is still so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sentencepiece==0.2.3
cat > "$folder/draw.py" <<'PYTHON'
import random
import sys

import sentencepiece

folder, DRAWS = sys.argv[1], 2000
words = "the cat sat on a mat and then went to see the other cats sitting around under tall trees of green".split()
random.seed(0)
with open(f"{folder}/corpus.txt", "w") as file:
  file.writelines(" ".join(random.choices(words, k=12)) + "\n" for _ in range(3000))
text, symbols = "the cat<turn>sat around the trees<end>", ("<turn>", "<end>")
for kind, size in (("unigram", 43), ("bpe", 60)):
  sentencepiece.SentencePieceTrainer.train(
    input=f"{folder}/corpus.txt", model_prefix=f"{folder}/{kind}", model_type=kind, vocab_size=size,
    user_defined_symbols=list(symbols), minloglevel=2,
  )
  model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/{kind}.model")
  assert set(symbols) <= set(model.encode(text, out_type=str))
  sentencepiece.set_random_generator_seed(1)
  for alpha in (0.0, 0.1, 1.0):
    drawn = [model.encode(text, out_type=str, enable_sampling=True, nbest_size=-1, alpha=alpha) for _ in range(DRAWS)]
    split = sum(not set(symbols) <= set(pieces) for pieces in drawn)
    kept = sum(model.decode(pieces) == text for pieces in drawn)
    print(f"{kind}, alpha {alpha}: symbols split in", end=" ")
    print("none" if not split else "1 to 10%" if 20 < split < 200 else "over half" if split > 1000 else split, end=", ")
    print("text right in all" if kept == DRAWS else f"text right in {kept}")
best = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/unigram.model").nbest_encode(text, nbest_size=64, out_type=str)
print("unigram, among the best 64:", "some" if any(not set(symbols) <= set(pieces) for pieces in best) else "none")
PYTHON
"$folder/venv/bin/python" "$folder/draw.py" "$folder" > "$folder/seen"
cat "$folder/seen"
diff "$folder/seen" - <<'SEEN'
unigram, alpha 0.0: symbols split in over half, text right in all
unigram, alpha 0.1: symbols split in 1 to 10%, text right in all
unigram, alpha 1.0: symbols split in none, text right in all
bpe, alpha 0.0: symbols split in none, text right in all
bpe, alpha 0.1: symbols split in none, text right in all
bpe, alpha 1.0: symbols split in none, text right in all
unigram, among the best 64: some
SEEN
