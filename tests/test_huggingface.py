"""Hugging Face folders against `transformers`: hidden states and logits of each family, in and out;
and what a folder may not hold.
"""

import dataclasses
import json
import shutil
import tracemalloc

import families
import jax
import ml_collections
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from oel_jax.policy import architecture, transformer
from oel_jax.policy.architecture import Architecture
from oel_jax.policy.attention import frequencies
from oel_jax.policy.sampling import model, on_cpu, sampler
from oel_jax.policy.weights import huggingface, huggingface_config, safetensors_folder
from oel_jax.runtime import mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(
  vocab_size=97,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  initializer_range=0.3,
)
LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 1e4,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
FAMILIES = {
  "qwen3-tied": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
  "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=False)),
  "qwen2.5": ("Qwen2", dict(tie_word_embeddings=True)),
  "llama-3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=False)),
  "smollm2": ("Llama", dict(tie_word_embeddings=True)),
}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
  """A small random model of each family in a folder, and itself."""
  return make(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One of them, for what has nothing to do with families."""
  return make("qwen3", tmp_path_factory)[0]


def make(family, tmp_path_factory):
  name, fields = FAMILIES[family]
  theirs = families.model(name, **SMALL, **fields)
  folder = tmp_path_factory.mktemp("model") / family
  theirs.save_pretrained(folder)
  return folder, theirs


def expected(theirs, rows):
  with torch.no_grad():
    return [theirs(torch.tensor([row]), output_hidden_states=True) for row in rows]


def rows_of(*lengths):
  rng = np.random.default_rng(1)
  return [rng.integers(0, SMALL["vocab_size"], length).tolist() for length in lengths]


def padded(rows):
  tokens, length = (
    np.zeros((len(rows), max(map(len, rows))), np.int32),
    np.array([len(row) for row in rows])[:, None],
  )
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  return tokens, positions, (positions < length).astype(np.int32)


def test_a_padded_batch_gives_their_hidden_states_and_logits(made):
  folder, theirs = made
  shape, rows = huggingface.read_architecture(folder), rows_of(60, 7, 33)
  params = huggingface.load(folder, shape)
  hidden, _ = transformer.apply(params, shape, *padded(rows))
  logits = transformer.logits(hidden, transformer.head(params))
  for i, (row, right) in enumerate(zip(rows, expected(theirs, rows), strict=True)):
    np.testing.assert_allclose(
      hidden[i, : len(row)], right.hidden_states[-1][0].numpy(), atol=1e-4, rtol=1e-4
    )
    np.testing.assert_allclose(logits[i, : len(row)], right.logits[0].numpy(), atol=1e-4, rtol=1e-4)


def test_packed_segments_give_what_each_gives_alone(made):
  folder, theirs = made
  shape, rows = huggingface.read_architecture(folder), rows_of(20, 31)
  tokens = np.array([rows[0] + rows[1]], np.int32)
  positions, segments = np.r_[np.arange(20), np.arange(31)][None], np.repeat([1, 2], [20, 31])[None]
  params = huggingface.load(folder, shape)
  hidden, _ = transformer.apply(params, shape, tokens, positions, segments)
  alone = expected(theirs, rows)
  states, logits = (
    np.concatenate(parts)
    for parts in zip(*((x.hidden_states[-1][0], x.logits[0]) for x in alone), strict=True)
  )
  np.testing.assert_allclose(hidden[0], states, atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(
    transformer.logits(hidden, transformer.head(params))[0], logits, atol=1e-4, rtol=1e-4
  )


def test_what_is_sampled_has_their_hidden_states_and_log_probabilities(made, monkeypatch):
  """Prefill and decode with the sampler's own cache, prompts of several lengths side by side, each
  step.
  """
  folder, theirs = made
  shape, rows, seen = huggingface.read_architecture(folder), rows_of(30, 7, 19), {}
  draw = model.draw

  def keep(hidden, seeds, drawn):
    for seed, at, row in zip(seeds, drawn, np.asarray(hidden), strict=True):
      # Rows that fill a batch come last, with another's seed.
      seen.setdefault((int(seed), int(at)), row)

  def watched(weights, hidden, seeds, drawn, *how):
    jax.debug.callback(keep, hidden, seeds, drawn)
    return draw(weights, hidden, seeds, drawn, *how)

  monkeypatch.setattr(model, "draw", watched)
  # Functions of their own: programs that another test compiled keep nothing.
  drawing = "sampling", "logprobs"
  decoding = *drawing, "architecture", "chunk", "attn_impl", "mesh"
  for module, name, fixed in ((on_cpu, "prefill_draw", drawing), (on_cpu, "decode", decoding)):
    own = lambda *args, made=getattr(module, name).__wrapped__, **how: made(*args, **how)
    monkeypatch.setattr(module, name, jax.jit(own, static_argnames=fixed))
  found = sampler.generate(
    huggingface.load(folder, shape),
    shape,
    rows,
    [1, 2, 3],
    sampling=sampler.Sampling(1.0),
    max_new_tokens=12,
    eos_ids=(),
    pad_id=0,
    logprobs=True,
  )
  jax.effects_barrier()
  whole = [row + ids for row, ids in zip(rows, found[0], strict=True)]
  for seed, row, ids, scores, right in zip(
    (1, 2, 3), rows, *found, expected(theirs, whole), strict=True
  ):
    steps = slice(len(row) - 1, -1)
    logits = right.logits[0, steps].log_softmax(-1).numpy()
    assert len(ids) == 12
    hidden = np.stack([seen[seed, at] for at in range(12)])
    np.testing.assert_allclose(
      hidden, right.hidden_states[-1][0, steps].numpy(), atol=1e-4, rtol=1e-4
    )
    np.testing.assert_allclose(scores, logits[np.arange(12), ids], atol=1e-4)


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_what_we_write_they_read(made, tmp_path, shard_bytes):
  folder, theirs = made
  shape = huggingface.read_architecture(folder)
  params = huggingface.load(folder, shape)
  huggingface.save(tmp_path, params, shape, dtype=np.float32, shard_bytes=shard_bytes)
  assert huggingface.read_architecture(tmp_path) == shape
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  assert type(again) is type(theirs)
  for right, found in zip(
    expected(theirs, rows_of(50, 9, 21)), expected(again, rows_of(50, 9, 21)), strict=True
  ):
    np.testing.assert_allclose(found.logits.numpy(), right.logits.numpy(), atol=1e-4)
  stored = [
    name for file in tmp_path.glob("*.safetensors") for name in safetensors.numpy.load_file(file)
  ]
  assert len(stored) == len(set(stored)) and ("lm_head.weight" in stored) is not shape.tied_head
  assert (
    (tmp_path / huggingface.INDEX).exists() and len(list(tmp_path.glob("*.safetensors"))) > 3
  ) is (shard_bytes < 10**9)
  assert not list(tmp_path.glob(".part*"))


def test_they_load_the_type_we_wrote(folder, tmp_path):
  shape = huggingface.read_architecture(folder)
  # As transformers 5 saves it.
  params, source = (
    huggingface.load(folder, shape),
    {"dtype": "bfloat16"},
  )
  huggingface.save(tmp_path, params, shape, dtype=np.float32, config=source)
  assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
  assert (
    huggingface.write_config(shape, ml_dtypes.bfloat16).items()
    >= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}.items()
  )


def test_a_second_export_replaces_the_first(folder, tmp_path):
  shape = huggingface.read_architecture(folder)
  params = huggingface.load(folder, shape)
  for factor, shard_bytes in ((1, 10**9), (2, 20_000), (3, 40_000), (4, 10**9)):
    (tmp_path / ".part-00099").touch()  # of a process that was killed
    (tmp_path / "..part-00099.1.tmp").touch()
    scaled = jax.tree.map(lambda leaf: factor * leaf, params)
    huggingface.save(tmp_path, scaled, shape, dtype=np.float32, shard_bytes=shard_bytes)
    found = (
      transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.detach().numpy()
    )
    np.testing.assert_array_equal(found, scaled["head"]["kernel"])
    stored = [
      name for file in tmp_path.glob("*.safetensors") for name in safetensors.numpy.load_file(file)
    ]
    assert len(stored) == len(set(stored)) and not list(tmp_path.glob(".*"))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_an_export_that_fails_leaves_the_first_as_it_was(folder, tmp_path):
  shape = huggingface.read_architecture(folder)
  params = huggingface.load(folder, shape)
  huggingface.save(tmp_path, params, shape, shard_bytes=20_000)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(ValueError, match="cannot be written as JSON"):
    huggingface.save(tmp_path, params, shape, config={"initializer_range": float("nan")})
  params["layers"]["feedforward"]["up"]["kernel"] = (
    params["layers"]["feedforward"]["up"]["kernel"].at[1, 2, 3].set(7e4)
  )
  with pytest.raises(
    ValueError,
    match="model.layers.1.mlp.up_proj.weight holds values that are not finite in float16",
  ):
    huggingface.save(tmp_path, params, shape, dtype=np.float16, shard_bytes=20_000)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
  "family, dtype",
  [
    ("qwen3", np.float32),
    ("qwen3", np.float16),
    ("qwen3", ml_dtypes.bfloat16),
    ("qwen2.5", np.float32),
  ],
)
def test_in_out_and_in_again_is_the_same_bits(family, dtype, tmp_path_factory, tmp_path):
  folder, theirs = make(family, tmp_path_factory)
  shape = huggingface.read_architecture(folder)
  assert shape.tied_head is shape.qkv_bias is (family == "qwen2.5")
  huggingface.save(tmp_path / "a", huggingface.load(folder, shape), shape, dtype=dtype)
  stored = safetensors.numpy.load_file(tmp_path / "a" / huggingface.SINGLE)
  for name, tensor in theirs.state_dict().items():
    is_twice = name == "lm_head.weight" and shape.tied_head
    assert is_twice or stored[name].tobytes() == tensor.numpy().astype(dtype).tobytes()
  first = huggingface.load(tmp_path / "a", shape, dtype=dtype)
  huggingface.save(tmp_path / "b", first, shape, dtype=dtype)
  for x, y in zip(
    jax.tree.leaves(first),
    jax.tree.leaves(huggingface.load(tmp_path / "b", shape, dtype=dtype)),
    strict=True,
  ):
    assert x.dtype == dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_the_host_holds_no_tensor(tmp_path):
  shape = architecture.Architecture(
    vocabulary=8000, width=256, layers=2, heads=4, kv_heads=2, head_size=64, feedforward=1024
  )
  huggingface.save(tmp_path, transformer.init(shape, jax.random.key(0)), shape, shard_bytes=10**7)
  largest = 2 * shape.vocabulary * shape.width
  huggingface.load(tmp_path, shape)  # compiles, which takes memory too
  tracemalloc.start()  # sees what Python and NumPy hold, not what lies on the devices
  try:
    huggingface.load(tmp_path, shape)
    peak = tracemalloc.get_traced_memory()[1]
    tensor = safetensors_folder.open_folder(tmp_path)["model.embed_tokens.weight"]
    copy = tensor.numbers.copy()
    seen = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < largest / 2 and seen > copy.nbytes == largest


def test_parameters_share_no_memory_with_the_file(folder, tmp_path):
  """Or an export that replaces the folder would change, or end, the run that reads it."""
  shape = huggingface.read_architecture(folder)
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  path = tmp_path / "model.safetensors"
  content = path.read_bytes()
  size = int.from_bytes(content[:8], "little")
  header, data = content[8 : 8 + size], content[8 + size :]
  header += b" " * (-(8 + size) % 64)  # where XLA would take the pages as they are
  path.write_bytes(len(header).to_bytes(8, "little") + header + data)
  params = huggingface.load(tmp_path, shape)
  before = jax.tree.map(np.array, params)
  with path.open("r+b") as file:
    file.seek(8 + len(header))
    file.write(bytes(len(data)))
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_parameters_go_where_the_shardings_say(folder):
  shape = huggingface.read_architecture(folder)
  devices = mesh.make_mesh(ml_collections.ConfigDict(dict(data=2, fsdp=2, tensor=2)))
  places = mesh.param_shardings(devices, transformer.abstract(shape))
  whole, params = huggingface.load(folder, shape), huggingface.load(folder, shape, shardings=places)
  for leaf, place, right in zip(*map(jax.tree.leaves, (params, places, whole)), strict=True):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    np.testing.assert_array_equal(leaf, right)
  up = params["layers"]["feedforward"]["up"]["kernel"]
  assert up.addressable_shards[0].data.size == up.size // 4  # split over "fsdp" and "tensor"


def test_shards_give_what_the_single_file_gives(folder, tmp_path):
  shape = huggingface.read_architecture(folder)
  right = huggingface.load(folder, shape)
  huggingface.save(tmp_path, right, shape, dtype=np.float32, shard_bytes=20_000)
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
  jax.tree.map(np.testing.assert_array_equal, huggingface.load(tmp_path, shape), right)


# What a folder may not hold.


def changed(folder, tmp_path, **fields):
  copy = shutil.copytree(folder, tmp_path / "copy")
  config = json.loads((copy / "config.json").read_text()) | fields
  (copy / "config.json").write_text(json.dumps(config))
  return copy


@pytest.mark.parametrize(
  "field, value",
  [
    ("model_type", "mixtral"),
    ("hidden_act", "gelu"),
    ("use_sliding_window", True),
    ("mlp_bias", True),
    ("num_experts", 8),
    ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
    ("quantization_config", {"bits": 4}),
  ],
)
def test_a_field_that_is_not_built_is_named_with_its_value(folder, tmp_path, field, value):
  with pytest.raises(ValueError, match=field) as error:
    huggingface.read_architecture(changed(folder, tmp_path, **{field: value}))
  shown = "sliding_attention" if field == "layer_types" else repr(value)
  assert shown in str(error.value) and "config.json" in str(error.value)


def test_another_scaling_of_positions_is_refused(folder, tmp_path):
  with pytest.raises(ValueError, match="yarn"):
    huggingface.read_architecture(
      changed(
        folder, tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
      )
    )


@pytest.mark.parametrize(
  "field, value, right",
  [
    ("hidden_size", "2560", "whole number"),
    ("head_dim", 16.0, "whole number"),
    ("num_key_value_heads", 0, "whole number"),
    ("vocab_size", True, "whole number"),
    ("rms_norm_eps", "1e-6", "number above 0"),
    ("max_position_embeddings", "4k", "whole number"),
    ("rope_theta", "1e6", "number above 0"),
    ("rope_parameters", LLAMA3 | dict(factor="8"), "number above 0"),
    ("tie_word_embeddings", "false", "true or false"),
  ],
)
def test_what_is_no_number_is_named_with_its_value(folder, tmp_path, field, value, right):
  with pytest.raises(
    ValueError, match=rf"config.json: .*{field}.* is .*it must be .*{right}"
  ) as error:
    huggingface.read_architecture(changed(folder, tmp_path, **{field: value}))
  assert repr(value["factor"] if isinstance(value, dict) else value) in str(error.value)


def test_heads_follow_from_the_width_where_they_are_not_given(folder, tmp_path):
  found = huggingface.read_architecture(
    changed(folder, tmp_path, num_key_value_heads=None, head_dim=None)
  )
  assert (found.kv_heads, found.head_size) == (4, 12)


def test_the_longest_sequence_is_read_and_changes_no_architecture(folder, tmp_path):
  shape = huggingface.read_architecture(folder)
  found = huggingface.read_architecture(changed(folder, tmp_path, max_position_embeddings=777))
  assert (shape.max_positions, found.max_positions) == (256, 777)
  assert found == shape and hash(found) == hash(shape)
  unknown = changed(folder, tmp_path / "unknown", max_position_embeddings=None)
  assert huggingface.read_architecture(unknown).max_positions is None


YARN, PLAIN = {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "default", "rope_theta": 1e4}
OLD = {"type": "llama3"} | {
  name: value for name, value in LLAMA3.items() if name not in ("rope_type", "rope_theta")
}


@pytest.mark.parametrize(
  "fields, named",
  [
    (dict(rope_parameters=PLAIN, rope_scaling=YARN), '"rope_scaling" is .*yarn'),
    (
      dict(rope_parameters=PLAIN, rope_scaling=OLD),
      '"rope_parameters" is .*default.*"rope_scaling" is .*llama3',
    ),
    (
      dict(rope_parameters=LLAMA3, rope_scaling=OLD | dict(factor=32.0)),
      '"rope_parameters" is .*8.0.*"rope_scaling" is .*32.0',
    ),
    (
      dict(rope_parameters=PLAIN, rope_theta=1e6),
      '"rope_parameters" is .*10000.0.*"rope_theta" is 1000000.0',
    ),
    (
      dict(rope_parameters=PLAIN | dict(partial_rotary_factor=0.5)),
      '"rope_parameters" holds "partial_rotary_factor", which is 0.5',
    ),
    (
      dict(rope_scaling=dict(type="default", mrope_section=[16, 24]), rope_parameters=None),
      '"rope_scaling" holds "mrope_section", .*16',
    ),
    (dict(rope_parameters=PLAIN | dict(type="yarn")), '"rope_parameters" is .*yarn'),
    (dict(rope_parameters="linear"), '"rope_parameters" is .*linear'),
    (
      dict(rope_parameters={"full_attention": PLAIN}),
      '"rope_parameters" holds "full_attention", .*default',
    ),
    (dict(rope_parameters=LLAMA3 | dict(factor=None)), '"rope_parameters" lacks factor'),
  ],
)
def test_rotary_fields_that_differ_or_are_not_known_are_named_with_their_values(
  folder, tmp_path, fields, named
):
  with pytest.raises(ValueError, match=f"config.json: {named}"):
    huggingface.read_architecture(changed(folder, tmp_path, **fields))


@pytest.mark.parametrize(
  "fields",
  [
    dict(rope_parameters=LLAMA3),
    dict(rope_parameters=None, rope_scaling=OLD, rope_theta=1e4),
    dict(
      rope_parameters=LLAMA3 | dict(partial_rotary_factor=1.0), rope_scaling=OLD, rope_theta=1e4
    ),
  ],
)
def test_both_spellings_of_the_rotary_fields_are_read(folder, tmp_path, fields):
  found = huggingface.read_architecture(changed(folder, tmp_path, **fields))
  assert found.rope_theta == 1e4 and found.rope_scaling == architecture.Llama3Scaling(
    8.0, 1.0, 4.0, 32.0
  )


def test_a_folder_without_config_or_weights_is_told(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="config.json"):
    huggingface.read_architecture(tmp_path)
  shape = huggingface.read_architecture(folder)
  with pytest.raises(FileNotFoundError, match="model.safetensors"):
    huggingface.load(tmp_path, shape)


def test_a_field_that_no_config_can_say_is_refused_and_not_dropped():
  """Every field is written, or is another than its default and then an error."""
  assert {field.name for field in dataclasses.fields(Architecture)} == huggingface_config.WRITTEN
  wider = dataclasses.make_dataclass(
    "Wider", [("score_cap", float, 0.0)], bases=(Architecture,), frozen=True
  )
  sizes = dict(vocabulary=8, width=8, layers=1, heads=2, kv_heads=1, head_size=4, feedforward=8)
  assert huggingface_config.write_config(wider(**sizes), "float32")["hidden_size"] == 8
  with pytest.raises(ValueError, match=r"Architecture.score_cap is 0.7, .* no place for it"):
    huggingface_config.write_config(wider(**sizes, score_cap=0.7), "float32")


def test_a_head_stored_twice_and_old_frequencies_change_nothing(tmp_path_factory, tmp_path):
  folder, _ = make("qwen2.5", tmp_path_factory)
  copy, shape = shutil.copytree(folder, tmp_path / "copy"), huggingface.read_architecture(folder)
  tensors = safetensors.numpy.load_file(copy / "model.safetensors")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  tensors |= {
    f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)
    for i in range(shape.layers)
  }
  safetensors.numpy.save_file(tensors, copy / "model.safetensors")
  found = huggingface.load(copy, shape)
  assert (
    jax.tree.structure(found) == jax.tree.structure(transformer.abstract(shape))
    and "head" not in found
  )
  np.testing.assert_array_equal(found["embed"]["embedding"], tensors["lm_head.weight"])


# Which file and which tensor counts.


def tensors_of(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def saved(folder, tmp_path, tensors, *extra, name="model.safetensors"):
  """A copy of the folder with these tensors; with further ones as shards, and an index of all."""
  copy = shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
  (copy / "model.safetensors").unlink()
  for i, part in enumerate((tensors, *extra)):
    safetensors.numpy.save_file(part, copy / (f"shard-{i}.safetensors" if extra else name))
  if extra:
    parts = enumerate((tensors, *extra))
    write_index(copy, {name: f"shard-{i}.safetensors" for i, part in parts for name in part})
  return copy


def write_index(folder, weight_map):
  (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def check_holds(folder, tensors):
  found = safetensors_folder.open_folder(folder)
  assert found.keys() == tensors.keys()
  for name, right in tensors.items():
    np.testing.assert_array_equal(found[name].numbers, right)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
  """A folder with a tied head, one layer, and its architecture."""
  folder = tmp_path_factory.mktemp("model") / "tied"
  fields = SMALL | dict(num_hidden_layers=1, tie_word_embeddings=True)
  families.model("Qwen2", **fields).save_pretrained(folder)
  return folder, huggingface.read_architecture(folder)


@pytest.mark.parametrize("changed_row", [None, 96])
def test_a_head_beside_a_tied_flag_counts_if_it_differs(tied, tmp_path, monkeypatch, changed_row):
  """As version 5 of transformers has it."""
  monkeypatch.setattr(safetensors_folder, "SLICE", 10 * 48)  # ten slices
  folder, shape = tied
  tensors = tensors_of(folder)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  if changed_row is not None:
    tensors["lm_head.weight"][changed_row, -1] += 1
  copy = saved(folder, tmp_path, tensors)
  found = huggingface.read_architecture(copy)
  assert shape.tied_head and found.tied_head is (changed_row is None)
  loaded = huggingface.load(copy, found)
  np.testing.assert_array_equal(transformer.head(loaded), tensors["lm_head.weight"])
  theirs = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
  np.testing.assert_array_equal(transformer.head(loaded), theirs.lm_head.weight.detach().numpy())
  config = json.loads((copy / "config.json").read_text())
  huggingface.save(tmp_path / "out", loaded, found, dtype=np.float32, config=config)
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert written["tie_word_embeddings"] is found.tied_head


def test_a_tied_matrix_under_the_heads_name_is_the_embedding(tied, tmp_path):
  """safetensors.torch.save_model keeps one of two names for a matrix, the alphabet's first."""
  folder, shape = tied
  tensors = tensors_of(folder)
  tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
  copy = saved(folder, tmp_path, tensors)
  assert huggingface.read_architecture(copy).tied_head
  found = huggingface.load(copy, shape)
  assert jax.tree.structure(found) == jax.tree.structure(transformer.abstract(shape))
  np.testing.assert_array_equal(found["embed"]["embedding"], tensors["lm_head.weight"])


def test_a_model_without_a_head_has_no_prefix(tied, tmp_path):
  folder, shape = tied
  tensors = {name.removeprefix("model."): value for name, value in tensors_of(folder).items()}
  copy = saved(folder, tmp_path, tensors)
  assert huggingface.read_architecture(copy) == shape
  check_holds(copy, tensors_of(folder))


@pytest.mark.parametrize(
  "prefix",
  ["language_model.", "model.language_model.", "module.model.", "base_model.model.model."],
)
def test_another_prefix_is_named(tied, tmp_path, prefix):
  folder, shape = tied
  usual = tensors_of(folder)
  tensors = {prefix + name.removeprefix("model."): value for name, value in usual.items()}
  with pytest.raises(ValueError, match=f"with '{prefix}' in front of"):
    huggingface.load(saved(folder, tmp_path, tensors), shape)


def test_a_whole_file_counts_before_an_index(tied, tmp_path):
  folder, _ = tied
  tensors = tensors_of(folder)
  copy = saved(folder, tmp_path, tensors)
  write_index(copy, dict.fromkeys(tensors, "old.safetensors"))
  check_holds(copy, tensors)
  other = {name: value + 1 for name, value in tensors.items()}
  safetensors.numpy.save_file(other, copy / "old.safetensors")
  safetensors.numpy.save_file(other, copy / "consolidated.safetensors")
  check_holds(copy, tensors)


def test_of_a_tensor_in_two_shards_the_indexed_one_counts(tied, tmp_path):
  folder, _ = tied
  tensors = tensors_of(folder)
  other = {"model.norm.weight": tensors["model.norm.weight"] + 1}
  for shards in ((tensors, other), (other, tensors)):
    copy = saved(folder, tmp_path, *shards)
    right, wrong = (f"shard-{shards.index(part)}.safetensors" for part in (tensors, other))
    write_index(copy, dict.fromkeys(tensors, right))
    check_holds(copy, tensors)
    write_index(copy, dict.fromkeys(tensors, right) | {"model.norm.weight": wrong})
    check_holds(copy, tensors | other)
    write_index(copy, dict.fromkeys(tensors, wrong))
    with pytest.raises(ValueError, match=f"index.json: .* should lie in {wrong}, .*; nor 12 more"):
      safetensors_folder.open_folder(copy)


@pytest.mark.parametrize(
  "text, told",
  [
    ("{", "JSONDecodeError"),
    ("{}", "KeyError"),
    ('{"weight_map": {"a": 3}}', "'a' lies in 3"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "'a' lies in '../b.safetensors'"),
    ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' is there twice: 'b.*'c"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
  ],
)
def test_an_index_that_is_none_is_told(tied, tmp_path, text, told):
  folder, shape = tied
  copy = shutil.copytree(folder, tmp_path / "copy")
  (copy / "model.safetensors").unlink()
  (copy / huggingface.INDEX).write_text(text)
  with pytest.raises(ValueError, match=f"index.json: not an index of safetensors shards .*{told}"):
    huggingface.load(copy, shape)


@pytest.mark.parametrize(
  "names, told",
  [
    (["pytorch_model.bin"], "there is pytorch_model.bin: pickled weights are not read"),
    (["pytorch_model-00001-of-00002.bin"], "pickled weights are not read"),
    (["model-00001-of-00002.safetensors"], "index.json: no such file, though there are shards"),
    (["consolidated.safetensors"], "there is consolidated.safetensors: it is named in another way"),
    (["model.fp16.safetensors"], "there is model.fp16.safetensors: it is named in another way"),
    (["model-q4_k_m.gguf"], "there is model-q4_k_m.gguf: give the path of this file"),
    ([], "model.safetensors: no such file: the folder must hold"),
  ],
)
def test_a_folder_with_other_weights_says_which(tied, tmp_path, names, told):
  folder, shape = tied
  copy = shutil.copytree(folder, tmp_path / "copy")
  (copy / "model.safetensors").unlink()
  for name in names:
    (copy / name).touch()
  for read in (lambda: huggingface.read_architecture(copy), lambda: huggingface.load(copy, shape)):
    with pytest.raises(FileNotFoundError, match=told):
      read()


def test_a_quantised_tensor_is_named_with_its_type(tied, tmp_path):
  folder, shape = tied
  tensors = tensors_of(folder)
  name = "model.layers.0.mlp.up_proj.weight"
  for kind, tag in ((ml_dtypes.float8_e4m3fn, "F8_E4M3"), (np.int8, "I8"), (np.uint8, "U8")):
    tensors[name] = np.zeros(tensors[name].shape, kind)
    with pytest.raises(ValueError, match=f"{name} is {tag}: quantised"):
      huggingface.load(saved(folder, tmp_path, tensors), shape)


@pytest.mark.parametrize("field", ["quantization_config", "quantization", "compression_config"])
def test_a_quantised_folder_is_told(folder, tmp_path, field):
  value = {"quant_method": "fp8", "weight_block_size": [128, 128]}
  with pytest.raises(ValueError, match=f'"{field}" is .*fp8.*: the weights are quantised'):
    huggingface.read_architecture(changed(folder, tmp_path, **{field: value}))


def test_an_adapter_is_told(folder, tmp_path):
  for copy in (shutil.copytree(folder, tmp_path / "both"), tmp_path):  # with a model, and alone
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="adapter_config.json: the folder holds an adapter"):
      huggingface.read_architecture(copy)


@pytest.mark.parametrize(
  "fields",
  [
    {
      "unsloth_fixed": True,
      "unsloth_version": "2026.1.1",
      "_name_or_path": "some/model",
      "use_cache": False,
      "transformers_version": "4.51.3",
      "_attn_implementation_autoset": True,
      "torch_dtype": "bfloat16",
      "dtype": "float16",
    },
    {
      "pruned_heads": {},
      "max_length": 20,
      "num_beams": 1,
      "num_beam_groups": 1,
      "temperature": 1.0,
      "top_k": 50,
      "top_p": 1.0,
      "typical_p": 1.0,
      "repetition_penalty": 1.0,
      "length_penalty": 1.0,
      "num_return_sequences": 1,
      "mlp_only_layers": [],
    },
  ],
)
def test_fields_that_change_nothing_pass(folder, tmp_path, fields):
  """Those of mirrors, and all that transformers 4 writes beside the shapes."""
  found = huggingface.read_architecture(changed(folder, tmp_path, **fields))
  assert found == huggingface.read_architecture(folder)


def test_missing_unknown_and_misshaped_tensors_are_listed_together(folder, tmp_path):
  copy, shape = shutil.copytree(folder, tmp_path / "copy"), huggingface.read_architecture(folder)
  tensors = safetensors.numpy.load_file(copy / "model.safetensors")
  del tensors["model.norm.weight"]
  tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
  tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
  safetensors.numpy.save_file(tensors, copy / "model.safetensors")
  with pytest.raises(ValueError) as error:
    huggingface.load(copy, shape)
  for part in (
    "model.norm.weight: missing",
    "layers.1.mlp.up_proj.weight: (3, 5) instead of (80, 48)",
    "layers.9.mlp.up_proj.weight: unknown",
  ):
    assert part in str(error.value)


def test_a_cut_file_and_a_missing_shard_are_told(folder, tmp_path):
  shape = huggingface.read_architecture(folder)
  copy = shutil.copytree(folder, tmp_path / "copy")
  content = (copy / "model.safetensors").read_bytes()
  (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    huggingface.load(copy, shape)
  huggingface.save(tmp_path / "shards", huggingface.load(folder, shape), shape, shard_bytes=20_000)
  gone = sorted((tmp_path / "shards").glob("model-*"))[1]
  gone.unlink()
  with pytest.raises(FileNotFoundError, match=gone.name):
    huggingface.load(tmp_path / "shards", shape)


# The named sizes.


def test_frequencies_are_those_of_transformers():
  scaling = architecture.named("llama-3.1-8b").rope_scaling
  config = transformers.LlamaConfig(
    head_dim=128,
    max_position_embeddings=131072,
    rope_parameters={
      "rope_type": "llama3",
      "rope_theta": 5e5,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    },
  )
  right, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
  np.testing.assert_allclose(frequencies(128, 5e5, scaling), right.numpy(), rtol=1e-5)


def test_two_families_in_one_have_no_folder():
  shape = architecture.Architecture(8, 8, 1, 1, 1, 4, 8, qk_norm=True, qkv_bias=True)
  with pytest.raises(ValueError, match="qk_norm"):
    huggingface.write_config(shape, np.float32)


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
  shape = Architecture(4096, 64, 24, 4, 2, 16, 256)
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), transformer.abstract(shape))
  largest, total = 4 * 4096 * 64, 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  tracemalloc.start()
  huggingface.save(tmp_path, params, shape, dtype=np.float16)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert total > 5 * largest and peak < 2 * largest
