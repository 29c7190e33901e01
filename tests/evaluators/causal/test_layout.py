"""Where tokens stand in a row, what each of them sees, and which logits are read."""

import torch

from searchmerge.evaluators.causal.documents import group_documents
from searchmerge.evaluators.causal.layout import lay_out_packed, lay_out_plain
from searchmerge.evaluators.causal.packing import plan_packed


def documents(*pairs):
    return group_documents(pairs, 16)[0]


def read(batch):
    """Return the token, target and owner of everything that is read."""
    width = batch.tokens.shape[1]
    places = batch.kept[batch.at]
    rows, columns = places // batch.n_keep, width - batch.n_keep + places % batch.n_keep
    tokens = batch.tokens[rows, columns]
    return list(zip(tokens.tolist(), batch.targets.tolist(), batch.owners.tolist(), strict=True))


def visible(batch, row, column):
    """Return the tokens that a token of a packed row sees, itself included."""
    _, order, end = batch.layout[:, row].tolist()
    seen = [i for i in range(len(order)) if order[i] <= order[column] < end[i]]
    return batch.tokens[row, seen].tolist()


def test_what_several_continuations_begin_with_is_run_once():
    pairs = [((1, 2, 3), (4, 5, 6)), ((1, 2, 3), (4, 5, 7, 8)), ((1, 2, 3), (9,))]
    (document,), _ = group_documents(pairs, 16)
    assert document.size() == len([1, 2, 3, 4, 5, 7])
    (cluster,) = plan_packed([document], 64, 16)
    (batch,) = cluster.batches
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 7]]
    assert batch.n_keep == 4


def test_contexts_stand_before_the_tails_whose_logits_are_read():
    first, second = documents(((1, 2, 3), (4, 5)), ((6, 7), (8,)))
    batch = lay_out_packed([[first, second]], 0, inside=False)
    assert batch.tokens.tolist() == [[1, 2, 6, 3, 4, 7]]
    assert batch.layout[0].tolist() == [[0, 1, 0, 2, 3, 1]]
    assert batch.n_keep == 3
    assert read(batch) == [(3, 4, 0), (4, 5, 0), (7, 8, 1)]
    assert visible(batch, 0, 4) == [1, 2, 3, 4]
    assert visible(batch, 0, 5) == [6, 7]


def test_continuations_of_one_context_do_not_see_one_another():
    [document] = documents(((1, 2), (3, 4, 5)), ((1, 2), (6, 7)))
    batch = lay_out_packed([[document]], 0, inside=False)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 6]]
    assert batch.layout[0].tolist() == [[0, 1, 2, 3, 2]]
    assert visible(batch, 0, 3) == [1, 2, 3, 4]
    assert visible(batch, 0, 4) == [1, 2, 6]


def test_rows_are_padded_on_the_left_with_what_nothing_sees():
    first, second = documents(((1, 2, 3), (4,)), ((6,), (8,)))
    batch = lay_out_packed([[first], [second]], 0, inside=False)
    assert batch.tokens.tolist() == [[1, 2, 3], [0, 0, 6]]
    assert batch.layout[1, 1].tolist() == [-1, -1, 0]
    assert batch.layout[2, 1].tolist() == [0, 0, 1]
    assert visible(batch, 1, 2) == [6]


def test_a_shared_prefix_stands_in_the_row_once_or_was_run_before():
    both = documents(((1, 2, 3), (4,)), ((1, 2, 5), (6,)))
    inside = lay_out_packed([both], 2, inside=True)
    assert inside.tokens.tolist() == [[1, 2, 3, 5]]
    assert [visible(inside, 0, column) for column in (2, 3)] == [[1, 2, 3], [1, 2, 5]]
    before = lay_out_packed([both], 2, inside=False)
    assert before.tokens.tolist() == [[3, 5]]
    assert before.layout[0].tolist() == [[2, 2]]


def test_plain_rows_are_padded_on_the_right_the_longest_first():
    batches = lay_out_plain(documents(((1, 2), (3,)), ((4, 5, 6), (7, 8))), 8)
    [batch] = batches
    assert batch.layout is None
    assert batch.tokens.tolist() == [[4, 5, 6, 7], [1, 2, 0, 0]]
    assert sorted(read(batch)) == [(2, 3, 0), (6, 7, 1), (7, 8, 1)]
    assert [
        len(b.tokens) for b in lay_out_plain(documents(((1, 2), (3,)), ((4, 5), (7,))), 2)
    ] == [
        1,
        1,
    ]


def test_continuations_that_differ_in_their_last_token_only_share_a_plain_row():
    [batch] = lay_out_plain(documents(((1, 2), (3, 4)), ((1, 2), (3, 5))), 64)
    assert torch.equal(batch.tokens, torch.tensor([[1, 2, 3]]))
    assert sorted(read(batch)) == [(2, 3, 0), (2, 3, 1), (3, 4, 0), (3, 5, 1)]
