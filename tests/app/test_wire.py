"""Records as arrays: what Flower's own ``Array.numpy`` gives, without its copy."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from metabloom.wire import from_record, size_of, to_record


def read(array: Array) -> np.ndarray:
    return from_record(ArrayRecord({"x": array}))["x"]


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        hnp.scalar_dtypes(),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    )
)
def test_every_array_comes_back_as_flower_reads_it_and_read_only(value: np.ndarray):
    array = Array(value)
    ours, flowers = read(array), array.numpy()
    assert (ours.dtype, ours.shape) == (flowers.dtype, flowers.shape)
    assert ours.tobytes() == flowers.tobytes()
    assert not ours.flags.writeable


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_layout_in_memory_stays(order: str):
    value = np.asarray(np.arange(6.0).reshape(2, 3), order=order)
    assert read(Array(value)).flags.f_contiguous == (order == "F")
    assert np.array_equal(read(Array(value)), value)


def test_nothing_is_copied():
    array = Array(np.arange(1000.0))
    assert np.shares_memory(read(array), np.frombuffer(array.data, np.uint8))


@pytest.mark.parametrize("cut", [0, 5, 9, 40, 127, 130])
def test_bytes_that_break_off_are_refused(cut: int):
    array = Array(np.arange(2.0))
    with pytest.raises((ValueError, EOFError)):
        read(Array(array.dtype, array.shape, array.stype, array.data[:cut]))


def test_bytes_in_another_version_of_numpys_format_are_read():
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.arange(3.0), version=(2, 0))
    assert read(Array("float64", (3,), "numpy.ndarray", buffer.getvalue())).tolist() == [0, 1, 2]


def test_the_way_back_keeps_names_order_shapes_and_dtypes():
    arrays = {"b": np.array(1.5, np.float16), "a": np.arange(6).reshape(2, 3)[:, ::2]}
    back = from_record(to_record(arrays))
    assert list(back) == ["b", "a"]
    assert all(np.array_equal(back[name], value) for name, value in arrays.items())
    assert [value.dtype for value in back.values()] == [np.float16, np.int64]
    assert size_of(to_record(arrays)) == sum(len(a.data) for a in to_record(arrays).values())
