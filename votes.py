"""From neighbours, heads and embeddings to class scores: each vote a small function that returns scores [n, C], the higher
the better. C: number of classes; labels are class numbers.

Inductive votes label a query by itself. Transductive ones use that all queries are there at once, as in a contest: they learn
from the queries' own clusters, and a query's label depends on which others came with it.
"""

import warnings

from utils import new_npy, within

import numpy as np
import torch
import torch.nn.functional as F

from search import SCREENS, topk

# To add a vote: 1. its name and text to INDUCTIVE or TRANSDUCTIVE (--vote auto: of equals nearest, else the first);
# 2. its scores to of_neighbours, or, if it needs the embeddings, to label, and its name to OF_EMBEDDINGS; 3. if it needs heads,
# its name to WITH_HEAD; 4. its flags to vote_flags, and name and flags to README's table of scripts.
INDUCTIVE = {
    "nearest": "the class of the nearest image",
    "sum": "sum of similarity^power over the k nearest",
    "mix": "--mix times the best similarity of each class, plus the rest times the head's score",
    "fusion": "sum times head^head-power, the original solution's",
    "centroid": "the nearest class mean",
    "expansion": "nearest after query expansion and database augmentation by the k nearest",
}
TRANSDUCTIVE = {
    "centring": "nearest after queries and gallery lost their means, see --centre",
    "propagation": "labels propagated over the graph of the k nearest of queries and gallery together",
    "recentring": "the nearest class mean, class means estimated anew on the queries",
}
OF_EMBEDDINGS = {"centroid", "expansion", *TRANSDUCTIVE}  # need more than the neighbours
WITH_HEAD = ("head", "mix", "fusion")  # need heads that fit the classes
EXPLAINED = INDUCTIVE | TRANSDUCTIVE
VOTES = ["head", *EXPLAINED]
DEFAULT_VOTES = ["head", "nearest", "sum", "fusion"]  # always scored, for comparison


def vote_flags(parser):
    """The flags of search and votes, for every script that labels."""
    add = parser.add_argument
    add("--k", type="count", default=5, help="neighbours (default 5)")
    add("--power", type=within("[0, 100]"), default=9.0, help="sum, fusion: exponent of the similarity (default 9)")
    add("--head-power", type=within("[0, 30]"), default=10.0, help="fusion: exponent of the head's cosine (default 10)")
    add("--mix", type="share", default=0.5, help="mix: share of the similarity, 0..1 (default 0.5)")
    add("--graph-k", type="count", default=10, help="expansion, propagation: neighbours (default 10)")
    add("--alpha", type=within("[0, 30]"), default=3.0, help="expansion, propagation: exponent of the similarity (default 3)")
    add("--damping", type="part", default=0.9, help="propagation: share that comes from neighbours (default 0.9)")
    add("--centre", choices=["own", "joint"], default="own", help="centring: queries and gallery each lose their own mean, or "
        "that of both together (default own)")
    add("--temperature", type=within("[1e-6, inf)"), default=0.05, help="recentring: of the softmax over cosines (default "
        "0.05)")
    add("--screen", choices=["auto", *SCREENS], default="auto", help="precision of the search's first look; the result is the "
        "same (default auto: the fastest here)")
    add("--memory", type=within("(0, 1e6]"), help="GiB that the search may use (default 1; on a GPU half of what is free)")


# ------------------------------------------------------------------------------------ of similarity and label, both [n, k]


def nearest(similarity, label, classes):
    """The best similarity of each class; -1 for a class without a neighbour."""
    scores = torch.full((len(label), classes), -1.0)
    return scores.scatter_reduce(1, label, similarity, "amax", include_self=False)


def power_sum(similarity, label, classes, power=9.0):
    """sum of similarity^power over the neighbours of each class. Negative similarities count 1e-6: a class with a
    neighbour stays ahead of one without. In float64, where such powers do not vanish."""
    scores = torch.zeros(len(label), classes, dtype=torch.float64)
    return scores.scatter_add(1, label, similarity.double().clamp(min=1e-6).pow(power))


def mix(similarity, label, classes, head, share=0.5):
    """share * best similarity of the class + (1 - share) * head [n, C]. Several contest solutions; a class without a neighbour
    counts the similarity 0."""
    return share * nearest(similarity, label, classes).clamp(min=0) + (1 - share) * head


def fusion(similarity, label, classes, head, power=9.0, head_power=10.0):
    """The original solution's: power_sum times head(c)^head_power, where head [n, C] is the mean head cosine and counts
    1e-8 outside its five best classes."""
    best = head.topk(min(5, classes), 1)
    weight = torch.full(head.shape, 1e-8, dtype=torch.float64).scatter(1, best.indices, best.values.double())
    return power_sum(similarity, label, classes, power) * weight.clamp(min=1e-8).pow(head_power)


def of_neighbours(vote, similarity, label, classes, head, args):
    """Scores by the name of the vote. `args` has power, head_power and mix."""
    if vote == "head":
        return head
    if vote == "sum":
        return power_sum(similarity, label, classes, args.power)
    if vote == "mix":
        return mix(similarity, label, classes, head, args.mix)
    assert vote == "fusion", vote
    return fusion(similarity, label, classes, head, args.power, args.head_power)


# ----------------------------------------------------------------------- of embeddings: float arrays [n, D], read in blocks


def blocks(count, size=4096):
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def rows_of(vectors, part):
    """Rows of a slice as a float32 tensor."""
    return torch.as_tensor(np.array(vectors[part]) if isinstance(vectors, np.ndarray) else vectors[part]).float()


def recentring(queries, gallery, labels, classes, temperature=0.05, rounds=10):
    """Cosine to class means that the queries take part in: each query counts for class c with the weight
    softmax(cosine / temperature)_c, estimated anew in each round; gallery rows count with weight 1. `queries`, `gallery`:
    normalised. Without a round the nearest class mean; -inf for a class without gallery rows.
    Sources: soft k-means for few-shot classification, Ren et al., Meta-learning for semi-supervised few-shot, ICLR 2018;
    nearest class mean, Mensink et al., Distance-based image classification, PAMI 2013."""
    known = torch.zeros(classes, gallery.shape[1])  # sums of the rows of each class
    for part in blocks(len(gallery)):
        known.index_add_(0, torch.as_tensor(labels[part]), rows_of(gallery, part))
    centres = F.normalize(known)
    empty = torch.from_numpy(np.bincount(labels, minlength=classes) == 0)  # a query's tiniest weight would make it a centre

    def cosine(rows):
        return (rows @ centres.T).masked_fill(empty, -torch.inf)

    for _ in range(rounds):
        sums = known.clone()
        for part in blocks(len(queries)):
            rows = rows_of(queries, part)
            sums += (cosine(rows) / temperature).softmax(1).T @ rows
        centres = F.normalize(sums)
    return torch.cat([cosine(rows_of(queries, part)) for part in blocks(len(queries))])


def mean_row(*sets):
    """Mean of all rows of the sets together, float32 [D]."""
    sums = [rows_of(vectors, part).double().sum(0) for vectors in sets for part in blocks(len(vectors))]
    return (torch.stack(sums).sum(0) / sum(map(len, sets))).float()


def centred(vectors, mean, out):
    """Write the rows minus `mean` [D] to `out` [n, D] and return it."""
    for part in blocks(len(vectors)):
        out[part] = (rows_of(vectors, part) - mean).numpy()
    return out


def expanded(vectors, others, similarity, index, out, alpha=3.0):
    """Write each row plus the sum over its neighbours among `others` of similarity^alpha times the neighbour to `out`.
    Source: alpha query expansion, Radenovic et al., Fine-tuning CNN image retrieval, PAMI 2019; on the gallery it is database
    augmentation, Arandjelovic and Zisserman, Three things, CVPR 2012."""
    for part in blocks(len(vectors), 512):
        near, which = torch.from_numpy(similarity[part]), index[part]
        rows, back = np.unique(which, return_inverse=True)
        neighbour = rows_of(others, rows)[torch.from_numpy(back.reshape(which.shape))]
        out[part] = (rows_of(vectors, part) + (near.clamp(min=0).pow(alpha)[..., None] * neighbour).sum(1)).numpy()
    return out


# -------------------------------------------------------------------------------- of a graph: neighbours of every node [N, k]


def propagation(similarity, index, labels, classes, damping=0.9, power=3.0, rounds=20, columns=64):
    """Labels of the first len(labels) nodes, the gallery, propagated to the others, the queries: scores [n, C].
    similarity, index [N, k]: the neighbours of every node among all nodes. Edges weigh similarity^power, both directions
    added; S = D^-1/2 W D^-1/2; F <- damping S F + (1 - damping) Y. Sparse throughout, `columns` classes at a time.
    Source: Zhou et al., Learning with local and global consistency, NIPS 2003; the edges Iscen et al., CVPR 2017."""
    nodes, known = len(index), len(labels)
    weight = torch.from_numpy(similarity).clamp(min=0).pow(power).flatten()
    row, column = torch.arange(nodes).repeat_interleave(index.shape[1]), torch.from_numpy(index).flatten()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # tensors are "in beta", their invariants not checked
        edges = torch.sparse_coo_tensor(torch.stack([torch.cat([row, column]), torch.cat([column, row])]),
                                        torch.cat([weight, weight]), (nodes, nodes)).coalesce()
        degree = torch.zeros(nodes).index_add_(0, edges.indices()[0], edges.values()).clamp(min=1e-12).rsqrt()
        value = edges.values() * degree[edges.indices()[0]] * degree[edges.indices()[1]]
        graph = torch.sparse_coo_tensor(edges.indices(), value, edges.shape, is_coalesced=True).to_sparse_csr()
    scores = torch.empty(nodes - known, classes)
    for first in range(0, classes, columns):
        width = min(columns, classes - first)
        start = torch.zeros(nodes, width)
        mine = np.flatnonzero((labels >= first) & (labels < first + width))
        start[mine, torch.as_tensor(labels[mine] - first)] = 1 - damping
        state = start.clone()
        for _ in range(rounds):
            state = damping * (graph @ state) + start
        scores[:, first:first + width] = state[known:]
    return scores


# -------------------------------------------------------------------------------------------------------------- labels


def head_scores(embeddings, head, kind, centres=1):
    """What the classifier head says of embeddings [n, 512]: cosines (ArcFace), probabilities (softmax), float32 [n, C].
    head [C, 512]; with sub-centres [C * centres, 512], the nearest of a class counts."""
    if kind == "softmax":
        return (torch.from_numpy(np.array(embeddings)) @ torch.from_numpy(np.array(head)).T).softmax(1)
    cosine = F.normalize(torch.from_numpy(np.array(embeddings))) @ F.normalize(torch.from_numpy(np.array(head))).T
    return cosine.unflatten(1, (-1, centres)).amax(2)


def label(queries, gallery, labels, classes, heads, args, wanted, device, scratch, store=None):
    """Class numbers of the queries by each of the votes `wanted`: ({vote: int64 [n]}, similarity, index).

    queries, gallery: Joined. labels [m]: the gallery's class numbers. heads: function of a slice of the queries -> mean head
    scores [n, C], or None. scratch: folder for embeddings that a vote changes.
    """
    def search(left, right, k, exclude=None, store=None):
        return topk(left, right, k, exclude, device, args.screen, args.memory, store)

    def new_scratch(name, count):
        scratch.mkdir(parents=True, exist_ok=True)
        return new_npy(scratch / f"{name}.npy", np.float32, (count, gallery.shape[1]))

    def nearest_of(left, right):
        return labels[search(left, right, 1)[1][:, 0]]

    similarity, index = search(queries, gallery, args.k, store=store)
    result = {vote: np.empty(len(queries), np.int64) for vote in wanted}
    for part in blocks(len(queries), max(1, min(8192, 2**23 // classes))):
        near, number = torch.from_numpy(similarity[part]), torch.from_numpy(labels[index[part]])
        head = heads(part) if heads else None
        for vote in result.keys() - OF_EMBEDDINGS - {"nearest"}:
            scores = of_neighbours(vote, near, number, classes, head, args)
            result[vote][part] = scores.argmax(1).numpy()
    if "nearest" in wanted:
        result["nearest"] = labels[index[:, 0]]
    for vote, rounds in [("centroid", 0), ("recentring", 10)]:
        if vote in wanted:
            scores = recentring(queries, gallery, labels, classes, args.temperature, rounds)
            result[vote] = scores.argmax(1).numpy()
    if "centring" in wanted:
        first = rows_of(queries, slice(1))
        alike = all((rows_of(queries, part) == first).all() for part in blocks(len(queries)))  # less their own mean: all zero
        joint = mean_row(queries, gallery) if args.centre == "joint" or alike else None
        left, right = (centred(x, mean_row(x) if joint is None else joint, new_scratch(name, len(x)))
                       for name, x in [("q", queries), ("g", gallery)])
        result["centring"] = nearest_of(left, right)
    if "expansion" in wanted:
        left, right = (expanded(x, gallery, *search(x, gallery, args.graph_k, own), new_scratch(name, len(x)), args.alpha)
                       for name, x, own in [("q", queries, None), ("g", gallery, np.arange(len(gallery)))])
        result["expansion"] = nearest_of(left, right)
    if "propagation" in wanted:
        nodes = new_scratch("nodes", len(gallery) + len(queries))
        centred(gallery, 0, nodes[:len(gallery)])
        centred(queries, 0, nodes[len(gallery):])
        graph = search(nodes, nodes, args.graph_k, np.arange(len(nodes)))
        score, number = propagation(*graph, labels, classes, args.damping, args.alpha).max(1)
        result["propagation"] = np.where(score > 0, number, labels[index[:, 0]])  # queries whose graph reaches no gallery row
    return result, similarity, index
