"""Which documents are run together, and that each is run as if it were alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchmerge.evaluators.causal.documents import group_documents
from searchmerge.evaluators.causal.packing import fill_rows, plan_packed, share_prefixes
from tests.evaluators.causal.test_scoring import PAIRS, SHARED, WINDOW, sequence


def test_a_prefix_is_shared_where_that_saves_tokens():
    documents, _ = group_documents(PAIRS[:10], WINDOW)
    assert [(prefix, len(members)) for prefix, members in share_prefixes(documents, cost=5)] == [
        (20, 2)
    ]
    assert [prefix for prefix, _ in share_prefixes(documents, cost=50)] == [0]


def test_contexts_apart_from_the_others_do_not_stop_them_from_sharing():
    pairs = [*PAIRS[:10], ((1,), (2, 3)), ((SHARED[0],), (4,))]
    documents, _ = group_documents(pairs, WINDOW)
    clusters = share_prefixes(documents, cost=5)
    assert [(prefix, len(members)) for prefix, members in clusters] == [(0, 2), (20, 2)]


tokens = st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple)


@settings(deadline=None)
@given(
    st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12),
    st.integers(1, 40),
    st.integers(1, 16),
)
def test_every_token_read_sees_its_own_text_and_nothing_else(pairs, batch_tokens, row_tokens):
    documents, indices = group_documents(pairs, 16)
    expected = {}
    for (context, continuation), index in zip(pairs, indices, strict=True):
        text = (context + continuation)[-17:]
        start = len(text) - len(continuation)
        expected[index] = sorted(text[: start + i + 1] for i in range(len(continuation)))
    found = {index: [] for index in expected}
    for cluster in plan_packed(documents, batch_tokens, 16, cost=4, row_tokens=row_tokens):
        for batch in cluster.batches:
            assert len(cluster.prefix) + batch.tokens.shape[1] <= 16
            for owner, text in read_texts(cluster.prefix, batch):
                found[owner].append(text)
    assert {owner: sorted(texts) for owner, texts in found.items()} == expected


def read_texts(prefix, batch):
    """Yield what each read of packed rows sees, in the order of positions, and its target."""
    first = batch.tokens.shape[1] - batch.n_keep
    for at, target, owner in zip(
        batch.kept[batch.at].tolist(), batch.targets, batch.owners, strict=True
    ):
        row, column = at // batch.n_keep, first + at % batch.n_keep
        position, order, end = batch.layout[:, row].tolist()
        seen = [i for i in range(len(order)) if order[i] <= order[column] < end[i]]
        assert seen == sorted(seen, key=lambda i: position[i])
        assert [position[i] for i in seen] == list(range(len(prefix), len(prefix) + len(seen)))
        yield int(owner), (*prefix, *batch.tokens[row, seen].tolist(), int(target))


def test_rows_are_of_about_one_length_and_hold_every_continuation_once():
    pairs = [(sequence(k, 3 + k % 9), sequence(k + 50, 2)) for k in range(40)]
    documents, _ = group_documents(pairs, WINDOW)
    rows = fill_rows(documents, 0, 32, WINDOW)
    sizes = [sum(document.size() for document in row) for row in rows]
    assert max(sizes) <= 48
    assert max(sizes) - min(sizes) <= max(document.size() for document in documents)
    owners = [owner for row in rows for document in row for owner in document.owners]
    assert sorted(owners) == list(range(40))


def test_a_document_that_is_too_long_is_spread_over_rows_and_no_continuation_is_cut():
    pairs = [(sequence(1, 10), sequence(k, 8)) for k in range(2, 12)]
    documents, _ = group_documents(pairs, WINDOW)
    rows = fill_rows(documents, 0, 32, 40)
    assert len(rows) > 1
    pieces = [piece for row in rows for piece in row]
    assert all(piece.size() <= 40 for piece in pieces)
    assert {piece.context for piece in pieces} == {sequence(1, 10)}
    continuations = [tokens for piece in pieces for tokens in piece.continuations]
    assert sorted(continuations) == sorted(continuation for _, continuation in pairs)


@pytest.mark.parametrize(("length", "is_plain"), [(100, False), (128, True), (200, True)])
def test_a_long_text_with_one_continuation_needs_no_mask(length, is_plain):
    documents, _ = group_documents([(sequence(1, length), sequence(2, 1))], 256)
    [cluster] = plan_packed(documents, 512, 256)
    [batch] = cluster.batches
    assert (batch.layout is None) == is_plain


def test_no_batch_has_more_tokens_than_were_asked_for_unless_one_document_has():
    pairs = [(sequence(k, 5 + k % 30), sequence(k + 50, 3)) for k in range(60)]
    documents, _ = group_documents(pairs, WINDOW)
    clusters = plan_packed(documents, 80, WINDOW)
    sizes = [batch.tokens.numel() for cluster in clusters for batch in cluster.batches]
    assert len(sizes) > 1
    assert max(sizes) <= 80


def test_texts_that_share_nothing_but_their_first_token_need_no_mask():
    texts = [((1,), sequence(k, 120 + k)) for k in range(2, 30)]
    documents, _ = group_documents(texts, 256)
    [cluster] = plan_packed(documents, 512, 256)
    assert all(batch.layout is None for batch in cluster.batches)
    short = [((1,), sequence(k, 20 + k)) for k in range(2, 30)]
    alike = [((1,), (*sequence(1, 120), *sequence(k, 30))) for k in range(2, 30)]
    for pairs in (short, alike):
        documents, _ = group_documents(pairs, 256)
        clusters = plan_packed(documents, 512, 256)
        assert all(b.layout is not None for cluster in clusters for b in cluster.batches)


def test_no_batch_computes_more_logits_than_there_is_room_for():
    texts = [((1,), sequence(k, 900)) for k in range(2, 20)]
    choices = [(sequence(k, 9), sequence(k + 50 + j, 200)) for k in range(30) for j in range(3)]
    for pairs in (texts, choices):
        documents, _ = group_documents(pairs, 1024)
        [cluster] = plan_packed(documents, 1 << 20, 1024)
        reads = [len(batch.kept) for batch in cluster.batches]
        assert max(reads) <= 8192 < sum(reads)
