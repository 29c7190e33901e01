"""A task's choices are read once for each document, and compared as its metrics do it."""

from types import SimpleNamespace

import pytest

from searchmerge.evaluators.lm_harness.choices import OF_LIKELIEST, Choices


@pytest.mark.parametrize(
    ("metric", "lengths"),
    [("acc", [1, 1, 1]), ("acc_norm", [3, 1, 1]), ("acc_bytes", [4, 1, 1]), ("f1", [1, 1, 1])],
)
def test_lengths_are_those_that_a_metric_divides_by(metric, lengths):
    task = SimpleNamespace(doc_to_choice=lambda doc: doc["choices"])
    request = SimpleNamespace(doc_id=7, doc={"choices": ["n\u00e9e", "", "b"]})
    assert Choices(task).lengths(request, metric) == lengths
    assert (metric in OF_LIKELIEST) == (metric != "f1")


def test_each_document_is_read_once():
    read = []

    def doc_to_choice(doc):
        read.append(doc)
        return [doc, "other"]

    choices = Choices(SimpleNamespace(doc_to_choice=doc_to_choice))
    for _ in range(3):
        for i, doc in enumerate(["one", "three"]):
            request = SimpleNamespace(doc_id=i, doc=doc)
            assert choices.texts(request) == [doc, "other"]
            assert choices.lengths(request, "acc_norm") == [len(doc), 5]
    assert read == ["one", "three"]
