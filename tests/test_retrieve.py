"""The one top-k function against a float64 brute force, and each vote on a case worked by hand."""

import subprocess
import sys
from types import SimpleNamespace

from utils import InputError

import numpy as np
import pytest
import torch
from conftest import ROOT

import retrieve
import search
import votes
from search import Joined, topk
from votes import head_scores


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
    monkeypatch.setattr(search, "TILE", 96)
    monkeypatch.setattr(search, "QUERIES", 16)
    for screen in ("int8", "bf16", "fp32"):
        for memory, pairs in ((1.0, search.PAIRS), (2e-5, search.PAIRS), (1.0, 256)):  # many parts; few queries at a time
            monkeypatch.setattr(search, "PAIRS", pairs)
            again = topk(queries, gallery, k, screen=screen, memory=memory)
            assert np.array_equal(again[0], similarity) and np.array_equal(again[1], index), (screen, memory, pairs)


def test_random_rows_send_int8_to_its_fall_back(monkeypatch):
    rng = np.random.default_rng(5)
    queries, gallery = (rng.normal(size=(n, 4)).astype(np.float32) * 1e-3 + 1 for n in (40, 3000))
    used, candidates = [], search.candidates
    monkeypatch.setattr(search, "candidates", lambda *a: used.append(a[1].screen) or candidates(*a))
    assert np.array_equal(topk(queries, gallery, 5, screen="int8")[1], topk(queries, gallery, 5, screen="fp32")[1])
    assert used[0] == "int8" and "fp32" in used[:3]


def test_a_mask_holds_across_parts_of_the_gallery(monkeypatch):
    monkeypatch.setattr(search, "TILE", 32)
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
    monkeypatch.setattr(search, "QUERIES", 8)
    rng = np.random.default_rng(8)
    queries, gallery = rng.normal(size=(300, 16)).astype(np.float32), rng.normal(size=(50, 16)).astype(np.float32)
    expected = topk(queries, gallery, 5)
    store, done, calls = search.Store(tmp_path, "a"), search.Store.done, []

    def killed(self, count):
        done(self, count)
        calls.append(count)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search.Store, "done", killed)
        with pytest.raises(KeyboardInterrupt):
            topk(queries, gallery, 5, store=store)
    assert 0 < calls[-1] < 300
    begun, inner = [], search.search
    monkeypatch.setattr(search, "search", lambda *a: begun.append(a[-1]) or inner(*a))
    got = topk(queries, gallery, 5, store=search.Store(tmp_path, "a"))
    assert begun == [calls[-1]] and all(np.array_equal(*pair) for pair in zip(got, expected, strict=True))
    topk(queries, gallery, 5, store=search.Store(tmp_path, "another"))
    assert begun[-1] == 0, "another search does not go on from there"


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import utils, numpy as np, torch, torch.distributed as dist, search
dist.init_process_group("gloo")
torch.set_num_threads(1)
rng = np.random.default_rng(9)
gallery = rng.integers(0, 3, (401, 6)).astype(np.float32)  # many ties
for screen in ("int8", "fp32"):
    found = search.topk(gallery[:90], gallery, 150, np.arange(90), screen=screen)
    if dist.get_rank() == 0:
        np.savez(f"{sys.argv[2]}/{screen}.npz", *found)
dist.destroy_process_group()  # else its threads may abort the process at its end
"""


def test_shards_merge_to_the_single_result(tmp_path):
    (tmp_path / "job.py").write_text(SHARDED)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3",
                    tmp_path / "job.py", str(ROOT), str(tmp_path)], check=True, timeout=120)
    gallery = np.random.default_rng(9).integers(0, 3, (401, 6)).astype(np.float32)
    alone = topk(gallery[:90], gallery, 150, np.arange(90))
    for screen in ("int8", "fp32"):
        with np.load(tmp_path / f"{screen}.npz") as found:
            assert all(np.array_equal(found[f"arr_{i}"], alone[i]) for i in range(2))


SIMILARITY = torch.tensor([[0.9, 0.8, 0.7]])
LABEL = torch.tensor([[2, 0, 0]])


def test_votes_by_hand():
    assert votes.nearest(SIMILARITY, LABEL, 3)[0].tolist() == pytest.approx([0.8, -1.0, 0.9])
    assert votes.power_sum(SIMILARITY, LABEL, 3, power=1.0)[0].tolist() == pytest.approx([1.5, 0, 0.9])
    assert votes.power_sum(SIMILARITY, LABEL, 3, power=9.0)[0].tolist() == pytest.approx([0.8**9 + 0.7**9, 0, 0.9**9])
    assert votes.power_sum(-SIMILARITY, LABEL, 3)[0].tolist() == pytest.approx([2e-54, 0, 1e-54], abs=1e-66)


def test_fusion_by_hand():
    head = torch.tensor([[0.5, 0.9, 0.4]])
    scores = votes.fusion(SIMILARITY, LABEL, 3, head)[0].tolist()
    assert scores == pytest.approx([(0.8**9 + 0.7**9) * 0.5**10, 0, 0.9**9 * 0.4**10])
    seven = torch.tensor([[0.1, 0.6, 0.2, 0.3, 0.4, 0.5, -0.7]])  # classes 0 and 6 are not among the head's five best
    scores = votes.fusion(SIMILARITY, torch.tensor([[0, 6, 1]]), 7, seven)[0].tolist()
    assert scores[0] == pytest.approx(0.9**9 * 1e-80) and scores[6] == pytest.approx(0.8**9 * 1e-80)
    assert scores[1] == pytest.approx(0.7**9 * 0.6**10) and np.argsort(scores)[::-1][:3].tolist() == [1, 0, 6]


def test_mix_by_hand():
    head = torch.tensor([[0.5, 0.9, 0.4]])
    assert votes.mix(SIMILARITY, LABEL, 3, head, 0.25)[0].tolist() == pytest.approx([0.575, 0.675, 0.525])


UNIT = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)  # of classes 0, 0, 1
QUERY = np.array([[0.8, 0.6]], np.float32)


def test_centroid_by_hand():
    mean = np.array([1.6, 0.8]) / np.hypot(1.6, 0.8)
    scores = votes.recentring(QUERY, UNIT, np.array([0, 0, 1]), 3, rounds=0)
    assert scores[0].tolist() == pytest.approx([QUERY[0] @ mean, 0.6, -np.inf], abs=1e-6)


def test_the_nearest_classes_are_found_behind_many_images_of_one(monkeypatch):
    rng = np.random.default_rng(0)
    centres = np.eye(8)[:3] + 1.0
    numbers = np.repeat([0, 1, 2], [300, 200, 4])
    gallery = Joined([(centres[numbers] + 0.01 * rng.normal(size=(504, 8))).astype(np.float32)])
    queries = Joined([np.array([centres[0], centres[1], centres[2] + 0.1 * centres[1]], np.float32)])
    args = SimpleNamespace(screen="auto", memory=None)
    cosine = (queries[:] @ gallery[:].T).numpy()
    wanted = [sorted(range(3), key=lambda c: -row[numbers == c].max()) for row in cosine]
    assert retrieve.nearest_classes(queries, gallery, numbers, 3, args, torch.device("cpu")).tolist() == wanted
    searched = []
    monkeypatch.setattr(retrieve, "topk", lambda *a: searched.append(len(a[0])) or topk(*a))
    more = retrieve.nearest_classes(queries, gallery, numbers, 4, args, torch.device("cpu"))
    assert more[:, :3].tolist() == wanted and (more[:, 3] == -1).all() and searched[:2] == [3, 3] and len(searched) == 2


def test_recentring_by_hand():
    """At a temperature near 0 the query joins its class wholly: class 0 becomes (1, 0) + (.8, .6)."""
    labels = np.array([0, 1])
    scores = votes.recentring(QUERY, np.array([[1, 0], [0, 1]], np.float32), labels, 2, temperature=1e-3, rounds=1)
    assert scores[0].tolist() == pytest.approx([(1.8 * 0.8 + 0.6 * 0.6) / np.hypot(1.8, 0.6), 0.6], abs=1e-6)
    more = votes.recentring(QUERY, np.array([[1, 0], [0, 1]], np.float32), labels, 3, temperature=0.05, rounds=10)
    assert more[0, 2] == -np.inf, "a class without images gets no query, not even a little of one"


def test_centring_and_expansion_by_hand():
    mean = votes.mean_row(UNIT, QUERY)
    assert mean.tolist() == pytest.approx([0.6, 0.6])
    assert votes.centred(UNIT, mean, np.empty_like(UNIT)).tolist() == [pytest.approx(row) for row in UNIT - 0.6]
    near, which = np.array([[0.96, 0.8]], np.float32), np.array([[1, 0]])
    got = votes.expanded(QUERY, UNIT, near, which, np.empty_like(QUERY), alpha=2.0)
    assert got[0].tolist() == pytest.approx(QUERY[0] + 0.96**2 * UNIT[1] + 0.8**2 * UNIT[0])


def test_centring_of_a_single_query_takes_the_joint_mean(tmp_path):
    """By its own mean it would be zero, and as near to all."""
    args = SimpleNamespace(k=2, centre="own", screen="auto", memory=None)
    query = np.array([[0.1, 0.9]], np.float32)
    said = votes.label(Joined([query]), Joined([UNIT]), np.arange(3), 3, None, args, ["centring"], "cpu", tmp_path)
    assert said[0]["centring"].tolist() == [2]
    said = votes.label(Joined([query.repeat(3, 0)]), Joined([UNIT]), np.arange(3), 3, None, args, ["centring"], "cpu", tmp_path)
    assert said[0]["centring"].tolist() == [2, 2, 2], "nor by that of its copies"


def test_an_island_of_alike_queries_is_labelled_by_the_nearest_image(tmp_path):
    """Eleven photographs of one burst have ten neighbours among themselves, and so do the images of the gallery."""
    rng = np.random.default_rng(3)
    gallery = np.repeat(np.eye(4, 8), 15, 0) + 0.01 * rng.normal(size=(60, 8))
    queries = np.eye(4, 8)[[2]] + 0.3 * np.eye(8)[[7]] + 1e-4 * rng.normal(size=(11, 8))
    args = SimpleNamespace(k=2, graph_k=10, damping=0.9, alpha=3.0, screen="auto", memory=None)
    labels = np.repeat(np.arange(4), 15)
    said = votes.label(Joined([queries]), Joined([gallery]), labels, 4, None, args, ["propagation"], "cpu", tmp_path)
    assert said[0]["propagation"].tolist() == [2] * 11


@pytest.mark.filterwarnings("error")
def test_propagation_equals_the_closed_form():
    """Zhou's fixed point (1 - a) (I - a S)^-1 Y on a small graph; and a chain hands a label on past a nearer class."""
    rng = np.random.default_rng(10)
    vectors = rng.normal(size=(12, 3)).astype(np.float32) + 2
    labels = np.array([0, 1, 2, 1, 0])
    similarity, index = topk(vectors, vectors, 4, np.arange(12))
    weight = np.zeros((12, 12))
    np.add.at(weight, (np.arange(12)[:, None], index), similarity.astype(float) ** 3)
    weight += weight.T
    root = 1 / np.sqrt(weight.sum(1))
    spread = np.linalg.solve(np.eye(12) - 0.9 * root[:, None] * weight * root, 0.1 * np.eye(12)[:, :5] @ np.eye(3)[labels])
    got = votes.propagation(similarity, index, labels, 3, 0.9, 3.0, rounds=400, columns=2)
    assert np.allclose(got, spread[5:], atol=1e-5)
    angle = np.array([0, 2.6, 0.3, 0.6, 0.9, 1.2, 1.4])  # gallery: 0 and 2.6 radians; the last query is nearer to the latter
    chain = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    graph = topk(chain, chain, 2, np.arange(7))
    assert votes.propagation(*graph, np.array([0, 1]), 2, rounds=200).argmax(1).tolist() == [0] * 5


def test_head_scores_are_cosines_or_probabilities():
    x, w = np.array([[3.0, 4.0]], np.float32), np.array([[2.0, 0], [0, 5]], np.float32)
    assert head_scores(x, w, "arcface")[0].tolist() == pytest.approx([0.6, 0.8])
    assert head_scores(x, w, "softmax")[0].tolist() == pytest.approx([np.exp(6) / (np.exp(6) + np.exp(20)), 1], abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and CUDA_VISIBLE_DEVICES that names it")
@pytest.mark.parametrize("screen", search.SCREENS)
def test_topk_on_the_gpu_equals_the_cpu(screen):
    rng = np.random.default_rng(4)
    queries, gallery = rng.normal(size=(300, 60)).astype(np.float32), rng.normal(size=(900, 60)).astype(np.float32)
    for count in (1, 17, 33, 300):  # cuBLAS has rules of its own for the sizes of int8 products
        cpu, gpu = topk(queries[:count], gallery, 5), topk(queries[:count], gallery, 5, device="cuda", screen=screen)
        assert np.allclose(cpu[0], gpu[0], atol=2e-6) and np.array_equal(cpu[1], gpu[1])
