"""What names a feature."""

from pipeline.interp.dashboards import feature_labels


def test_top_tokens_are_those_at_the_peaks_of_the_top_contexts() -> None:
    examples = [
        {"tokens": ["a", " France", "b"], "tokens_acts_list": [0, 2.0, 1]},
        {"tokens": [" Rome", "c"], "tokens_acts_list": [3.0, 0]},
        {"tokens": ["a", " France"], "tokens_acts_list": [0, 1.5]},
    ]
    record = {"examples_quantiles": [{"examples": examples}, {"examples": examples[:1] * 9}]}
    assert feature_labels.top_tokens_of(record) == ["France", "Rome"]
    assert feature_labels.top_tokens_of(None) == []
    assert feature_labels.top_tokens_of({"examples_quantiles": []}) == []


def test_a_label_has_the_first_tokens_and_of_the_others_those_with_a_share() -> None:
    examples = [{"tokens": [" a", "b"], "tokens_acts_list": [value, 0]} for value in (1.0, 2.0)]
    examples += [{"tokens": ["b", "\n"], "tokens_acts_list": [0.5, 1.0]}, {"tokens": ["c"], "tokens_acts_list": [0.5]}]
    found = feature_labels.top_tokens(examples)
    assert found == [["a", 0.667], ["'\\n'", 0.222], ["c", 0.111]]
    assert feature_labels.label(found) == "a / '\\n'"
    assert feature_labels.label([]) == ""
    assert feature_labels.top_tokens([{"tokens": ["a"], "tokens_acts_list": [0]}]) == []
