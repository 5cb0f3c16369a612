"""The strict reader of JSON, its digests, and the checks of fields."""

import json

import pytest

from oel_jax.evaluation import statistics
from oel_jax.runtime import files, schema


def test_a_digest_is_of_the_value_and_not_of_how_it_is_written():
  value = {"b": [1, 2.5, None, True], "a": {"ü": "\u2028", 2: "x", 10: "y"}, "tuple": (1, 2)}
  other = json.loads(json.dumps({name: value[name] for name in ("tuple", "a", "b")}, indent=7))
  assert schema.digest(value) == schema.digest(other) and len(schema.digest(value)) == 16
  changed = [
    value | {"b": [1, 2.5, None, False]},
    value | {"b": [2.5, 1, None, True]},
    value | {"c": 0},
  ]
  assert len({schema.digest(found) for found in [value, *changed]}) == 4
  assert schema.digest(1) != schema.digest(1.0) != schema.digest(True)


def test_every_bit_of_a_sealed_file_is_told_or_changes_nothing(tmp_path):
  value = {"schema": 1, "counts": {"hits": 3, "of": 8}, "text": "über\n", "share": 0.375}
  path = tmp_path / "a.json"
  files.write_sealed(path, value)
  data = path.read_bytes()
  told = 0
  for bit in range(8 * len(data)):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
      found = files.read_json(path)
    except ValueError as error:
      assert str(error).startswith(f"{path}: damaged") and "\n" not in str(error)
      told += 1
    else:  # white space, or the name of the digest
      assert {name: found[name] for name in value} == value
  assert told > 0.7 * 8 * len(data)


@pytest.mark.parametrize(
  "text, told",
  [
    (b"", "Expecting value"),
    (b'{"a": 1', "Expecting ',' delimiter"),
    (b"[NaN]", "NaN is not JSON"),
    (b"[-Infinity]", "-Infinity is not JSON"),
    (b"[1e999]", "the number 1e999 is beyond a float"),
    (b"[-9223372036854775809]", "the number -9223372036854775809 is beyond 64 bits"),
    (b"[" + b"7" * 5000 + b"]", "beyond 64 bits"),
    (b'{"a": 1, "a": 1}', "the name 'a' occurs twice"),
    (b'"\xff"', "not UTF-8 at byte 1"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a": 1, "digest": 5}', 'its field "digest" was made of'),
  ],
)
def test_what_is_not_strict_json_is_one_line_that_names_the_file(tmp_path, text, told):
  path = tmp_path / "a.json"
  path.write_bytes(text)
  with pytest.raises(ValueError) as error:
    files.read_json(path, advice="do this")
  assert str(error.value).startswith(f"{path}: ") and told in str(error.value)
  assert str(error.value).endswith("do this") and "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_read():
  assert schema.loads(b"[9223372036854775807, -9223372036854775808, 1e308, 5e-324]") == [
    2**63 - 1,
    -(2**63),
    1e308,
    5e-324,
  ]


def test_counts_and_means_as_they_are_made_pass_and_contradictions_are_named():
  for hits, of in ((0, 4), (3, 4), (4, 4)):
    schema.share(statistics.count(hits, of), "passed")
  for values in ([], [2], [1, 2, 4]):
    schema.mean(statistics.mean(values), "moves")
  good = statistics.count(3, 4)
  for change, told in (
    ({"hits": 5}, "passed.hits is 5: it must be at most passed.of (4)"),
    ({"of": -1}, "passed.of is -1: it must be a whole number"),
    ({"of": True}, "passed.of is True"),
    ({"rate": 0.5}, "passed.rate is 0.5: it must be hits / of (3 / 4)"),
    ({"rate": "x"}, "passed.rate is 'x'"),
    ({"interval": [1, 0]}, "passed.interval is [1, 0]"),
    ({"interval": 3}, "passed.interval is 3"),
  ):
    with pytest.raises(ValueError) as error:
      schema.share(good | change, "passed")
    assert told in str(error.value)
  with pytest.raises(ValueError, match="passed has no field 'of'"):
    schema.share({"hits": 1}, "passed")
  with pytest.raises(ValueError, match=r"passed is \[\]: it must be an object"):
    schema.share([], "passed")
