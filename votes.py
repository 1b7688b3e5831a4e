"""From neighbours, heads and embeddings to class scores: each vote a small function that returns scores [n, C], the higher
the better. C: number of classes; labels are class numbers.

Inductive votes label a query by itself. Transductive ones use that all queries are there at once, as in a contest: they learn
from the queries' own clusters, and a query's label depends on which others came with it.
"""

import numpy as np
import torch

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
    if vote == "nearest":
        return nearest(similarity, label, classes)
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


def class_sums(vectors, labels, classes):
    """Sum of the rows of each class, float32 [C, D]."""
    sums = torch.zeros(classes, vectors.shape[1])
    for part in blocks(len(vectors)):
        sums.index_add_(0, torch.as_tensor(labels[part]), rows_of(vectors, part))
    return sums


def centroid(queries, gallery, labels, classes):
    """Cosine to the mean of each class's normalised rows; 0 for a class without rows. `queries`, `gallery`: normalised.
    Source: nearest class mean, Mensink et al., Distance-based image classification, PAMI 2013."""
    centres = torch.nn.functional.normalize(class_sums(gallery, labels, classes))
    return torch.cat([rows_of(queries, part) @ centres.T for part in blocks(len(queries))])


def recentring(queries, gallery, labels, classes, temperature=0.05, rounds=10):
    """Cosine to class means that the queries take part in: each query counts for class c with the weight
    softmax(cosine / temperature)_c, estimated anew in each round; gallery rows count with weight 1.
    Source: soft k-means for few-shot classification, Ren et al., Meta-learning for semi-supervised few-shot, ICLR 2018."""
    known = class_sums(gallery, labels, classes)
    centres = torch.nn.functional.normalize(known)
    for _ in range(rounds):
        sums = known.clone()
        for part in blocks(len(queries)):
            rows = rows_of(queries, part)
            sums += (rows @ centres.T / temperature).softmax(1).T @ rows
        centres = torch.nn.functional.normalize(sums)
    return torch.cat([rows_of(queries, part) @ centres.T for part in blocks(len(queries))])


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
