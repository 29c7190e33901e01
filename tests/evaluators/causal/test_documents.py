"""Contexts with their continuations, each distinct one once."""

from hypothesis import given
from hypothesis import strategies as st

from searchmerge.evaluators.causal.documents import Document, branches, group_documents

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


def test_pairs_of_one_context_are_one_document_and_duplicates_one_continuation():
    pairs = [((1,), (2,)), ((3,), (2,)), ((1,), (4, 5)), ((1,), (2,))]
    documents, indices = group_documents(pairs, 16)
    assert documents == [
        Document((1,), ((2,), (4, 5)), (0, 2)),
        Document((3,), ((2,),), (1,)),
    ]
    assert indices == [0, 1, 2, 0]


def test_what_is_longer_than_the_window_loses_tokens_from_the_left():
    [document], _ = group_documents([((1, 2, 3, 4), (5, 6))], 4)
    assert document == Document((2, 3, 4), ((5, 6),), (0,))  # the last is predicted only
    [whole], _ = group_documents([((1, 2, 3), (5, 6))], 4)
    assert whole.context == (1, 2, 3)


def test_contexts_that_are_cut_alike_are_one_document():
    documents, indices = group_documents([((1, 7, 8), (2, 3)), ((4, 7, 8), (2, 3))], 3)
    assert documents == [Document((7, 8), ((2, 3),), (0,))]
    assert indices == [0, 0]


def test_a_document_needs_a_token_for_all_but_the_last_of_each_branch():
    document = Document((1, 2, 3), ((4, 5, 6), (4, 5, 7, 8), (9,)), (0, 1, 2))
    assert document.n_tails == len([4, 5, 7])
    assert document.size() == 6
    assert document.size(prefix=2) == 4


@given(st.lists(tokens, min_size=1, max_size=8, unique=True))
def test_branches_spell_every_continuation_and_run_nothing_twice(continuations):
    document = Document((9,), tuple(continuations), tuple(range(len(continuations))))
    path, n_run, found = (), 0, {}
    for continuation, owner, n_shared in branches(document):
        assert continuation[:n_shared] == path[:n_shared]
        path = path[:n_shared] + continuation[n_shared:-1]
        n_run += len(continuation) - 1 - n_shared
        found[owner] = (*path, continuation[-1])
    assert found == dict(enumerate(continuations))
    prefixes = {c[:k] for c in continuations for k in range(1, len(c))}
    assert n_run == len(prefixes) == document.n_tails
