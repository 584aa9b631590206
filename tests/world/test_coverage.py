import pytest

from dit_video.world.coverage import frequencies, total_variation


def test_total_variation() -> None:
    p = {"a": 0.5, "b": 0.5}
    assert total_variation(p, p) == 0
    assert total_variation(p, {"c": 1.0}) == 1
    assert total_variation(p, {"a": 1.0}) == pytest.approx(0.5)
    assert total_variation({("small", "red"): 0.75, ("large", "red"): 0.25}, {("small", "red"): 1.0}) == pytest.approx(0.25)


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="sums to 1"):
        total_variation({"a": 0.5}, {"a": 1.0})
    with pytest.raises(ValueError, match="at least one"):
        frequencies([])


def test_frequencies() -> None:
    assert frequencies(["a", "b", "a", "a"]) == {"a": 0.75, "b": 0.25}
