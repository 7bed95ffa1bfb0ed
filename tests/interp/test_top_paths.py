import pytest

from pipeline.interp.circuits.top_paths import strongest
from tests.interp.test_graph import made


def test_the_strongest_path_goes_from_a_token_through_features_to_the_output() -> None:
    """Logit (6) <- 1, 0; feature 1 <- 0, token 4; feature 0 <- tokens 3, 4."""
    paths = strongest(made())
    into_logit = 0.75 / 3.875  # its probability over the sum of its |edges|
    into_0 = max(0.5, 0.25 * 2.0 / 2.5)  # straight, or through feature 1
    assert [path.nodes for path in paths] == [[3, 0, 6], [4, 0, 6]]
    assert paths[0].strength == pytest.approx(into_logit * into_0 * 1.0 / 1.75)
    assert paths[1].strength == pytest.approx(into_logit * max(into_0 * 0.25 / 1.75, 0.25 * 0.5 / 2.5))
