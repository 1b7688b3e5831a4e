"""The one top-k function against a float64 brute force, and each vote on a case worked by hand."""

from utils import InputError

import numpy as np
import pytest
import torch

from retrieve import Joined, head_scores, topk, vote_fusion, vote_nearest, vote_sum


def brute_force(queries, gallery, k, exclude=None):
    """Float64 cosines, sorted by (similarity descending, index)."""
    q, g = (np.asarray(a, np.float64) for a in (queries, gallery))
    q, g = (a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-300) for a in (q, g))
    similarity = q @ g.T
    if exclude is not None:
        rows = np.flatnonzero(exclude >= 0)
        similarity[rows, exclude[rows]] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), order


BLOCKS = [{}, {"query_block": 7, "gallery_block": 13}, {"query_block": 1, "gallery_block": 1}]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("n, m, k", [(20, 50, 5), (1, 50, 1), (9, 4, 10), (3, 1, 1), (0, 5, 2), (5, 0, 2)])
def test_topk_equals_brute_force(n, m, k, blocks):
    rng = np.random.default_rng(n + m)
    queries, gallery = rng.normal(size=(n, 16)).astype(np.float32), rng.normal(size=(m, 16)).astype(np.float32)
    similarity, index = topk(queries, gallery, k, **blocks)
    expected, order = brute_force(queries, gallery, k)
    assert similarity.dtype == np.float32 and index.dtype == np.int64 and index.shape == (n, min(k, m))
    assert np.array_equal(index, order) and np.allclose(similarity, expected, atol=2e-6)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_ties_go_to_the_lower_index(blocks):
    rng = np.random.default_rng(0)
    gallery = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 40)]  # exact in float32, ten copies of each
    index = topk(np.eye(4, dtype=np.float32), gallery, 6, **blocks)[1]
    assert np.array_equal(index, brute_force(np.eye(4), gallery, 6)[1])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_an_image_does_not_match_itself(blocks):
    vectors = np.random.default_rng(1).normal(size=(30, 8)).astype(np.float32)
    own = np.arange(30)
    own[3] = -1  # this one may
    similarity, index = topk(vectors, vectors, 40, exclude=own, **blocks)
    expected, order = brute_force(vectors, vectors, 29, own)
    assert index.shape == (30, 29) and np.array_equal(index, order) and np.allclose(similarity, expected, atol=2e-6)
    assert index[3, 0] == 3 and all(i not in index[i] for i in range(30) if i != 3)


def test_norms_do_not_matter_zero_is_zero_and_nan_is_named(tmp_path):
    rng = np.random.default_rng(2)
    queries, gallery = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=(9, 8)).astype(np.float32)
    expected = topk(queries, gallery, 3)
    got = topk(queries * np.float32(1e-30), gallery * np.float32(1e30), 3)
    assert np.array_equal(got[1], expected[1]) and np.allclose(got[0], expected[0], atol=1e-6)
    queries[2] = 0
    similarity, index = topk(queries, gallery, 3)
    assert (similarity[2] == 0).all() and index[2].tolist() == [0, 1, 2]
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    assert np.array_equal(topk(queries, mapped, 3)[1], index)
    gallery[7, 1] = np.nan
    with pytest.raises(InputError, match="row 7 of the gallery"):
        topk(queries, gallery, 3, gallery_block=4)


def test_joined_runs_weigh_alike():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(12, 4)).astype(np.float32), 100 * rng.normal(size=(12, 6)).astype(np.float32)
    joined = Joined([a, b], rows=np.array([5, 1, 7]))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    assert joined.shape == (3, 10) and np.allclose(joined[0:2], np.concatenate(unit, 1)[[5, 1]], atol=1e-6)
    mean_cosine = (unit[0] @ unit[0].T + unit[1] @ unit[1].T) / 2
    similarity, index = topk(Joined([a, b]), Joined([a, b]), 12)
    assert np.allclose(similarity, np.take_along_axis(mean_cosine, index, 1), atol=1e-6)


SIMILARITY = torch.tensor([[0.9, 0.8, 0.7]])
LABEL = torch.tensor([[2, 0, 0]])


def test_votes_by_hand():
    assert vote_nearest(SIMILARITY, LABEL, 3)[0].tolist() == pytest.approx([0.8, -1.0, 0.9])
    assert vote_sum(SIMILARITY, LABEL, 3, power=1.0)[0].tolist() == pytest.approx([1.5, 0, 0.9])
    assert vote_sum(SIMILARITY, LABEL, 3, power=9.0)[0].tolist() == pytest.approx([0.8**9 + 0.7**9, 0, 0.9**9])
    assert vote_sum(-SIMILARITY, LABEL, 3)[0].tolist() == pytest.approx([2e-54, 0, 1e-54], abs=1e-66), "none without neighbour"


def test_fusion_by_hand():
    head = torch.tensor([[0.5, 0.9, 0.4]])
    scores = vote_fusion(SIMILARITY, LABEL, 3, head)[0].tolist()
    assert scores == pytest.approx([(0.8**9 + 0.7**9) * 0.5**10, 0, 0.9**9 * 0.4**10])
    seven = torch.tensor([[0.1, 0.6, 0.2, 0.3, 0.4, 0.5, -0.7]])  # classes 0 and 6 are not among the head's five best
    scores = vote_fusion(SIMILARITY, torch.tensor([[0, 6, 1]]), 7, seven)[0].tolist()
    assert scores[0] == pytest.approx(0.9**9 * 1e-80) and scores[6] == pytest.approx(0.8**9 * 1e-80)
    assert scores[1] == pytest.approx(0.7**9 * 0.6**10) and np.argsort(scores)[::-1][:3].tolist() == [1, 0, 6]


def test_head_scores_are_cosines_or_probabilities():
    x, w = np.array([[3.0, 4.0]], np.float32), np.array([[2.0, 0], [0, 5]], np.float32)
    assert head_scores(x, w, "arcface")[0].tolist() == pytest.approx([0.6, 0.8])
    assert head_scores(x, w, "softmax")[0].tolist() == pytest.approx([np.exp(6) / (np.exp(6) + np.exp(20)), 1], abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_topk_on_the_gpu_equals_the_cpu():
    rng = np.random.default_rng(4)
    queries, gallery = rng.normal(size=(300, 64)).astype(np.float32), rng.normal(size=(900, 64)).astype(np.float32)
    cpu, gpu = topk(queries, gallery, 5), topk(queries, gallery, 5, device="cuda", query_block=100, gallery_block=128)
    assert np.allclose(cpu[0], gpu[0], atol=2e-6) and np.array_equal(cpu[1], gpu[1])
