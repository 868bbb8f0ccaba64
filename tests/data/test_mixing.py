import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smidgen.data.mixing import held_out, mix


def test_shares_are_shares_of_tokens():
    random = np.random.default_rng(0)
    lengths = random.integers(5, 50, 3000)
    source = np.repeat([0, 1, 2], [2000, 900, 100])
    chosen = mix(lengths, source, [1, 1, 2], seed=1)
    total = lengths[chosen].sum()
    shares = [lengths[chosen[source[chosen] == index]].sum() / total for index in range(3)]
    assert np.allclose(shares, [0.25, 0.25, 0.5], atol=0.003)
    assert abs(total / lengths.sum() - 1) < 0.01
    counts = np.bincount(chosen, minlength=3000)
    assert counts[source == 0].max() == 1  # more rows than its share holds: each at most once
    assert np.ptp(counts[source == 2]) <= 1  # fewer: all of them equally often, but for the rest


def test_a_mixture_depends_on_its_seed_alone():
    lengths, source = np.arange(1, 101), np.repeat([0, 1], 50)
    assert (mix(lengths, source, [3, 1], seed=1) == mix(lengths, source, [3, 1], seed=1)).all()
    assert len(mix(lengths, source, [3, 1], seed=1)) and not np.array_equal(
        mix(lengths, source, [3, 1], seed=1), mix(lengths, source, [3, 1], seed=2)
    )


@given(count=st.integers(2, 200), size=st.one_of(st.integers(1, 2), st.floats(0.01, 0.9)), seed=st.integers(0, 9))
def test_held_out_rows_and_the_others_are_all_rows(count, size, seed):
    kept, held = held_out(count, size, seed=seed)
    assert sorted([*kept, *held]) == list(range(count))
    assert len(held) == (size if size >= 1 else max(1, round(count * size)))
