"""The one top-k function against a float64 brute force, and each vote on a case worked by hand."""

from utils import InputError

import numpy as np
import pytest
import torch

import retrieve
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


BLOCKS = [{"screen": s} for s in ("auto", "int8", "bf16", "fp32")]


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
        topk(queries, gallery, 3)


def test_joined_runs_weigh_alike():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(12, 4)).astype(np.float32), 100 * rng.normal(size=(12, 6)).astype(np.float32)
    joined = Joined([a, b], rows=np.array([5, 1, 7]))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    assert joined.shape == (3, 10) and np.allclose(joined[0:2], np.concatenate(unit, 1)[[5, 1]] / 2**0.5, atol=1e-6)
    mean_cosine = (unit[0] @ unit[0].T + unit[1] @ unit[1].T) / 2
    similarity, index = topk(Joined([a, b]), Joined([a, b]), 12)
    assert np.allclose(similarity, np.take_along_axis(mean_cosine, index, 1), atol=1e-6)


def adversarial(rng):
    """{name: (queries, gallery, k)}: what a low-precision screen finds hard."""
    noise, centre = rng.normal(size=(700, 32)).astype(np.float32), rng.normal(size=(9, 32)).astype(np.float32)
    close = centre[rng.integers(0, 9, 700)] + np.float32(1e-4) * noise
    mixed = noise * (10.0 ** rng.integers(-38, 17, (700, 1))).astype(np.float32)
    spiky = noise * np.where(rng.random((700, 32)) < 0.05, 1e4, 1).astype(np.float32)
    return {"all the same": (noise[:9], np.repeat(noise[:1], 700, 0), 7), "few different": (noise[:70], noise[:700] // 2, 9),
            "closer than the codes": (centre, close, 5), "norms from 1e-38 to 1e17": (mixed[:50], mixed, 5),
            "outliers": (spiky[:50], spiky, 5), "huge k": (noise[:20], noise, 690), "zero rows": (noise[:9] * 0, noise, 3),
            "opposite": (-centre, close, 3), "one row": (noise[:5], noise[:1], 3),
            "zero gallery": (noise[:5], noise[:40] * 0, 3)}


@pytest.mark.parametrize("name", adversarial(np.random.default_rng(0)))
def test_every_screen_is_certified(name, monkeypatch):
    queries, gallery, k = adversarial(np.random.default_rng(0))[name]
    similarity, index = topk(queries, gallery, k, screen="fp32")
    expected, _ = brute_force(queries, gallery, k)
    assert np.allclose(similarity, expected, atol=3e-6)
    cosine = brute_force(queries, gallery, len(gallery))
    true = np.take_along_axis(np.take_along_axis(cosine[0], cosine[1].argsort(1), 1), index, 1)
    assert np.allclose(similarity, true, atol=3e-6), "the similarity is not that of the neighbour"
    assert ((np.diff(similarity) < 0) | (np.diff(similarity) == 0) & (np.diff(index) > 0)).all(), "order"
    monkeypatch.setattr(retrieve, "TILE", 96)
    monkeypatch.setattr(retrieve, "QUERIES", 16)
    for screen in ("int8", "bf16", "fp32"):
        for memory in (1.0, 2e-5):  # the second: many parts of the gallery
            again = topk(queries, gallery, k, screen=screen, memory=memory)
            assert np.array_equal(again[0], similarity) and np.array_equal(again[1], index), (screen, memory)


def test_random_rows_send_int8_to_its_fall_back(monkeypatch):
    rng = np.random.default_rng(5)
    queries, gallery = (rng.normal(size=(n, 4)).astype(np.float32) * 1e-3 + 1 for n in (40, 3000))
    used, candidates = [], retrieve.candidates
    monkeypatch.setattr(retrieve, "candidates", lambda *a: used.append(a[1].screen) or candidates(*a))
    assert np.array_equal(topk(queries, gallery, 5, screen="int8")[1], topk(queries, gallery, 5, screen="fp32")[1])
    assert used[0] == "int8" and "fp32" in used[:3]


def test_a_mask_holds_across_parts_of_the_gallery(monkeypatch):
    monkeypatch.setattr(retrieve, "TILE", 32)
    vectors = np.random.default_rng(6).integers(0, 3, (200, 5)).astype(np.float32)
    own = np.arange(200)
    for screen in ("int8", "bf16", "fp32"):
        index = topk(vectors, vectors, 12, own, screen=screen, memory=1e-6)[1]
        assert not (index == own[:, None]).any()
        assert np.array_equal(index, topk(vectors, vectors, 12, own, screen="fp32")[1])


def test_float64_half_and_bfloat16_rows():
    rng = np.random.default_rng(7)
    queries, gallery = rng.normal(size=(8, 16)), rng.normal(size=(90, 16))
    expected = brute_force(queries, gallery, 4)[1]
    assert np.array_equal(topk(queries * 1e-200, gallery * 1e200, 4)[1], expected)
    assert np.array_equal(topk(torch.from_numpy(queries), torch.from_numpy(gallery), 4)[1], expected)
    half = gallery.astype(np.float16)
    assert np.array_equal(topk(queries, half, 4)[1], brute_force(queries, half, 4)[1])
    coarse = torch.from_numpy(gallery).bfloat16()
    assert np.array_equal(topk(queries, coarse, 4)[1], brute_force(queries, coarse.float().numpy(), 4)[1])


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(retrieve, "QUERIES", 8)
    rng = np.random.default_rng(8)
    queries, gallery = rng.normal(size=(300, 16)).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32)
    expected = topk(queries, gallery, 5)
    store, done, calls = retrieve.Store(tmp_path, "a"), retrieve.Store.done, []

    def killed(self, count):
        done(self, count)
        calls.append(count)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retrieve.Store, "done", killed)
        with pytest.raises(KeyboardInterrupt):
            topk(queries, gallery, 5, store=store)
    assert 0 < calls[-1] < 300
    begun, search = [], retrieve.search
    monkeypatch.setattr(retrieve, "search", lambda *a: begun.append(a[-1]) or search(*a))
    got = topk(queries, gallery, 5, store=retrieve.Store(tmp_path, "a"))
    assert begun == [calls[-1]] and all(np.array_equal(*pair) for pair in zip(got, expected, strict=True))
    topk(queries, gallery, 5, store=retrieve.Store(tmp_path, "another"))
    assert begun[-1] == 0, "another search does not go on from there"


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
    cpu, gpu = topk(queries, gallery, 5), topk(queries, gallery, 5, device="cuda")
    assert np.allclose(cpu[0], gpu[0], atol=2e-6) and np.array_equal(cpu[1], gpu[1])
