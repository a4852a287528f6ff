import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import MessageError
from common.messages import Envelope, Evaluate, Evaluated, Refused, RoundDone, RoundStart, decode, encode

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
COMMON = {"manifest_sha256": HEX, "run_id": st.text(max_size=20), "round": st.integers(0, 10**6), "adapter_sha256": HEX}
NUMBER = st.floats() | st.integers(-(10**9), 10**9).map(float)
COUNTS = st.dictionaries(st.text(max_size=10), NUMBER, max_size=4)
HEADERS = st.one_of(
    st.builds(RoundStart, **COMMON, evaluate=st.booleans(), accepted=st.integers(0, 9)),
    st.builds(
        RoundDone,
        **COMMON,
        records=st.integers(1, 10**9),
        examples=st.integers(0, 10**9),
        loss=NUMBER,
        counts=COUNTS,
        seconds=st.floats(0, 1e9),
    ),
    st.builds(Evaluate, **COMMON),
    st.builds(Evaluated, **COMMON, counts=COUNTS),
    st.builds(Refused, **COMMON, code=st.from_regex(r"\A[A-Za-z0-9_:]{1,80}\Z")),
)
ARRAYS = st.builds(
    lambda shape, seed: np.random.Generator(np.random.PCG64(seed)).normal(size=shape).astype(np.float32),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)
TENSORS = st.dictionaries(st.text(max_size=12).filter(lambda name: name != "__metadata__"), ARRAYS, max_size=4)

FIELDS: dict[str, Any] = {"manifest_sha256": "a" * 64, "run_id": "SECRET-run", "round": 3, "adapter_sha256": "b" * 64}
DONE = RoundDone(
    **FIELDS,
    records=5,
    examples=32,
    loss=1.5,
    counts={"SECRET-key": 1.0},
    seconds=0.25,
    noise_multiplier=None,
    sampling_rate=None,
)
SECRET_TENSORS = {"SECRET-tensor": np.arange(6, dtype=np.float32).reshape(2, 3)}


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@settings(max_examples=200, deadline=None)
@given(header=HEADERS, tensors=TENSORS)
def test_round_trip(header: Any, tensors: dict[str, Any]) -> None:
    data = encode(Envelope(header=header, tensors=tensors))
    found = decode(data)
    assert type(found.header) is type(header)
    before, after = header.model_dump(), found.header.model_dump()
    for values in (before, after):
        counts = values.pop("counts", {})
        values |= {f"counts {key}": value for key, value in counts.items()}
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert same(value, after[key]) if isinstance(value, float) else after[key] == value
    assert found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found.tensors[name].dtype == np.float32
        assert found.tensors[name].shape == array.shape
        assert found.tensors[name].tobytes() == array.tobytes()


def test_a_loss_may_be_no_number() -> None:
    for loss in (math.nan, math.inf, -math.inf):
        header = decode(encode(Envelope(header=DONE.model_copy(update={"loss": loss, "counts": {"x": loss}})))).header
        assert same(header.loss, loss)
        assert same(header.counts["x"], loss)


def refused(data: bytes) -> str:
    with pytest.raises(MessageError) as error:
        decode(data)
    message = str(error.value)
    assert "SECRET" not in message
    assert "\n" not in message
    return message


def raw(header: object, tensors: bytes | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    rest = encode(Envelope(header=DONE))[8 + len(DONE.model_dump_json().encode()) :] if tensors is None else tensors
    return len(text).to_bytes(8, "big") + text + rest


def safetensors_of(dtype: str, size: int) -> bytes:
    header = json.dumps({"SECRET": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(2 * size)


def test_the_raw_form_of_these_tests_is_right() -> None:
    assert decode(raw(DONE.model_dump())).header == DONE
    assert decode(raw(DONE.model_dump(), safetensors_of("F32", 4))).tensors["SECRET"].tolist() == [0, 0]


def test_every_cut_is_noticed() -> None:
    data = encode(Envelope(header=DONE, tensors=SECRET_TENSORS))
    assert decode(data).header == DONE
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_a_message_error_or_harmless(data: st.DataObject) -> None:
    whole = bytearray(encode(Envelope(header=DONE, tensors=SECRET_TENSORS)))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[place] = data.draw(st.integers(0, 255))
    said = ""
    try:
        decode(bytes(whole))
    except MessageError as error:
        said = str(error)
    assert "SECRET" not in said


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_a_message_error(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": "1"},
        {"version": None},
        {"kind": "SECRET"},
        {"kind": None},
        {"surprise": "SECRET"},
        {"manifest_sha256": "SECRET"},
        {"manifest_sha256": "A" * 64},
        {"adapter_sha256": "b" * 65},
        {"round": -1},
        {"round": "SECRET"},
        {"round": 1.5},
        {"records": 0},
        {"examples": -1},
        {"loss": "SECRET"},
        {"loss": 10**400},
        {"counts": {"x": "SECRET"}},
        {"counts": ["SECRET"]},
        {"seconds": -1},
        {"run_id": 7},
    ],
)
def test_a_wrong_header_is_refused(change: dict[str, Any]) -> None:
    assert "both sides need one version" in refused(raw(DONE.model_dump() | change))


@pytest.mark.parametrize("field", sorted(set(DONE.model_dump()) - {"version"}))
def test_a_missing_field_is_refused(field: str) -> None:
    values = DONE.model_dump()
    del values[field]
    refused(raw(values))


@pytest.mark.parametrize("header", [b"", b"null", b"[]", b'"SECRET"', b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    refused(raw(header))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("F64", 8),
        ("F16", 2),
        ("BF16", 2),
        ("I64", 8),
        ("I32", 4),
        ("BOOL", 1),
        ("F8_E4M3", 1),
        ("F8_E5M2", 1),
        ("U8", 1),
    ],
)
def test_a_tensor_that_is_not_float32_is_refused(dtype: str, size: int) -> None:
    refused(raw(DONE.model_dump(), safetensors_of(dtype, size)))


@pytest.mark.parametrize("code", ["", "two words", "café", "a" * 81, "line\n", "<SECRET>"])
def test_a_refusal_carries_a_fixed_word(code: str) -> None:
    with pytest.raises(ValidationError):
        Refused(**FIELDS, code=code)
    assert refused(raw({**FIELDS, "kind": "refused", "code": code}))


def test_a_size_that_lies_is_refused() -> None:
    data = encode(Envelope(header=DONE, tensors=SECRET_TENSORS))
    for size in (0, 1, len(data), 2**63, 2**64 - 1):
        refused(size.to_bytes(8, "big") + data[8:])
