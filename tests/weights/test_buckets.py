from hypothesis import given
from hypothesis import strategies as st

from megatron_async_rlhf.weights.buckets import TensorSpec, plan_buckets


def specs_of(sizes: list[int]) -> list[TensorSpec]:
    return [TensorSpec(name=f"t{i}", shape=[size], dtype="uint8", num_bytes=size) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_order_is_kept_and_no_bucket_is_above_the_limit_unless_it_holds_one_tensor(sizes: list[int], limit: int):
    specs = specs_of(sizes)
    buckets = plan_buckets(specs, limit)
    assert [spec for bucket in buckets for spec in bucket] == specs
    assert all(buckets)
    for bucket in buckets:
        assert len(bucket) == 1 or sum(spec.num_bytes for spec in bucket) <= limit
    for bucket, following in zip(buckets, buckets[1:], strict=False):
        assert sum(spec.num_bytes for spec in bucket) + following[0].num_bytes > limit


def test_a_tensor_above_the_limit_is_alone():
    names = [[spec.name for spec in bucket] for bucket in plan_buckets(specs_of([3, 4, 99, 5, 5, 1]), 10)]
    assert names == [["t0", "t1"], ["t2"], ["t3", "t4"], ["t5"]]
