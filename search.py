"""Exact top-k by cosine similarity, several times as fast as the float32 product.

A screen multiplies low-precision codes, cheap and wrong by at most a known bound, and keeps the gallery rows that could
still be among the k nearest; those few are scored anew in float32, one pair at a time. So the screen decides the time and
never the result: the same neighbours and the same digits from every screen, block size and number of processes.

The bound. A normalised query q = q' + r (code and rest), a normalised gallery row g = g' + s. Then
    |<q,g> - <q',g'>| = |<q,s> + <r,g'>| <= |q| |s| + |r| |g'|                                          (Cauchy-Schwarz)
with |q| = 1, |g'| <= 1 + |s|, |r| and |s| measured. Sums of D products in float32, in any order, add at most D 2^-24 |q| |g|
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), and bfloat16 products are rounded to 2^-9.
"""

import functools
import warnings

from utils import InputError, Store, is_first, my_rows, on_first, pick_precision, progress, rank_and_world

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

NONE = torch.iinfo(torch.int64).max  # index of a place not filled
SCREENS = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}  # each falls back to the next
TILE, QUERIES = 2048, 1024  # gallery rows and queries in one product
GROUP = 32  # neighbouring gallery rows: only where the best of a group is near enough are its rows looked at one by one
PAIRS = 1 << 22  # numbers held at a time while pairs are picked out and scored


class Joined:
    """Embeddings of several runs side by side, each L2-normalised first, read in blocks from memory maps. One array does
    as well. `rows`: the rows that count, default all."""

    def __init__(self, arrays, rows=None):
        assert len({len(a) for a in arrays}) == 1, [a.shape for a in arrays]
        self.arrays = [as_float32(a) for a in arrays]
        self.rows = None if rows is None else np.asarray(rows)
        self.shape = (len(arrays[0] if rows is None else self.rows), sum(a.shape[1] for a in arrays))

    def __len__(self):
        return self.shape[0]

    def take(self, part, what="embeddings"):
        """Rows of a slice or of row numbers, normalised, float32 [n, D], and the factors that normalised each run's share,
        float64 [n, runs]. InputError for a row that is not finite."""
        rows = part if self.rows is None else self.rows[part]
        shares = [as_tensor(a[rows]) for a in self.arrays]
        norm = torch.stack([torch.linalg.vector_norm(share, dim=1, dtype=torch.float64) for share in shares], 1)
        if len(bad := (~torch.isfinite(norm).all(1)).nonzero()):
            bad = np.arange(len(self))[part][int(bad[0])]
            raise InputError(f"row {bad} of the {what} is NaN or infinite; extract it again")
        # Each run's share to length 1 / sqrt(number of runs), zero shares not counted: so the whole row has length 1.
        factor = torch.where(norm > 0, 1 / (norm * (norm > 0).sum(1, keepdim=True).sqrt()), 0.0)
        unit = torch.empty(len(factor), self.shape[1])
        for share, f, to in zip(shares, factor.T, unit.split([a.shape[1] for a in self.arrays], 1), strict=True):
            torch.mul(share, f[:, None].float(), out=to)
            odd = (f > 1e30) | (f < 1e-30) & (f > 0)  # beyond float32
            if odd.any():
                to[odd] = (share[odd].double() * f[odd, None]).float()
        return unit, factor

    def __getitem__(self, part):
        return self.take(part)[0]


def as_float32(array):
    """A float32 NumPy array or memory map as it is; a tensor or another float type as a float32 copy, normalised first
    where float32 would overflow or vanish."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float().numpy() if array.dtype != torch.float64 else array.numpy()
    if array.dtype != np.float32:
        peak = np.abs(array).max(1, keepdims=True, initial=0).astype(np.float64)
        with np.errstate(invalid="ignore"):
            array = (array / np.where((peak > 1e-30) & (peak < 1e30) | (peak == 0), 1, peak)).astype(np.float32)
    return array


def as_tensor(array):
    """The array as a tensor on the same memory. A memory map is read-only, and so do we treat it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def in_place(device):
    """Whether rows are scored where they lie: on the CPU, by MKL's build of PyTorch."""
    return device.type == "cpu" and torch.backends.mkl.is_available()


def pair_products(query, array, row, start):
    """Inner products of pairs in float32: those of query [n, D] number i are with the rows row[start[i]:start[i + 1]] of
    the array [m, D], which is read in place. Equal pairs give equal digits, wherever they stand: hence a sparse product and
    no dense one, whose digits depend on its shape."""
    array = as_tensor(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is "in beta"
        pattern = torch.sparse_csr_tensor(start, row, torch.zeros(len(row)), (len(query), len(array)), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, query.contiguous(), array.T, beta=0.0).values()


class Gallery:
    """Rows begin .. end of the gallery as codes of one screen, on the device."""

    def __init__(self, vectors, begin, end, screen, device):
        self.vectors, self.begin, self.size, self.screen = vectors, begin, end - begin, screen
        self.tiles = -(-self.size // TILE)
        self.tile = -(-self.size // (self.tiles * GROUP)) * GROUP
        width = vectors.shape[1]
        self.codes = torch.zeros(self.tiles * self.tile, -(-width // 8) * 8, dtype=SCREENS[screen], device=device)
        self.factor = torch.empty(self.size, len(vectors.arrays), dtype=torch.float64)
        self.unit = None if in_place(device) else torch.empty(self.size, width, device=device)
        self.scale = self.pick_scale() if screen == "int8" else 1.0
        self.rest = 0.0
        step = max(16, 2**18 // width)  # rows that stay in the cache
        for at in range(0, self.size, step):
            to = slice(at, min(at + step, self.size))
            unit, self.factor[to] = vectors.take(slice(begin + to.start, begin + to.stop), "gallery")
            unit = unit.to(device)
            self.codes[to, :width], rest = encode_rows(unit, screen, self.scale)
            self.rest = max(self.rest, rest.max().item())
            if self.unit is not None:
                self.unit[to] = unit
        self.sums = width * (2**-24 if device.type == "cpu" else 2**-22)  # tensor cores round their sums less carefully
        self.buffer = torch.empty(0, dtype=torch.int32 if screen == "int8" else SCREENS[screen], device=device)

    def pick_scale(self):
        """One int8 step for all rows, so that products compare as they are: the one that loses least on a sample."""
        sample = torch.cat([self.vectors[i:i + 1] for i in range(self.begin, self.begin + self.size, self.size // 256 + 1)])
        steps = [max(sample.abs().max().item(), 1e-30) * share / 127 for share in (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)]
        return min(steps, key=lambda step: encode_rows(sample, "int8", step)[1].square().mean())

    def similarity(self, query, i, j):
        """Cosine of the pairs (query[i], gallery row begin + j) in float32; i ascending."""
        if self.unit is not None:
            step = max(1, PAIRS // query.shape[1])
            parts = [(query[i[at:at + step]] * self.unit[j[at:at + step]]).sum(1, dtype=torch.float64)  # in any order the same
                     for at in range(0, len(j), step)]
            return torch.cat(parts).float() if parts else torch.empty(0, device=query.device)
        start = torch.zeros(len(query) + 1, dtype=torch.int64)
        start[1:] = torch.bincount(i, minlength=len(query)).cumsum(0)
        rows = self.begin + j if self.vectors.rows is None else torch.from_numpy(self.vectors.rows)[self.begin + j]
        result, column = torch.zeros(len(j)), 0
        for a, array in enumerate(self.vectors.arrays):
            share = query[:, column:column + array.shape[1]]
            column += array.shape[1]
            factor = self.factor[j, a]
            # Tiny and huge rows: the query takes over a power of two, which rounds nothing, lest float32 overflow or vanish.
            exponent = (factor.clamp(min=1e-300).log2() / 60).round().clamp(-2, 2) * 60 * (factor > 0)
            for e in exponent.unique() if exponent.any() else [torch.tensor(0.0)]:
                product = pair_products(share * 2.0 ** e.item(), array, rows, start)
                result += torch.where(exponent == e, product * (factor * 2.0 ** -e.item()).float(), 0)
        return result


def encode_rows(unit, screen, scale):
    """Codes of normalised rows [n, D] in steps of `scale` (a number, or one a row [n, 1]), and the norms of what they leave
    out [n]."""
    if screen == "fp32":
        return unit, unit.new_zeros(len(unit))
    if screen == "bf16":
        code = unit.to(torch.bfloat16)
        return code, torch.linalg.vector_norm(unit - code, dim=1)
    steps = unit * (1 / scale)
    whole = steps.round().clamp_(-127, 127)
    rest = torch.linalg.vector_norm(steps.sub_(whole), dim=1) * (scale if isinstance(scale, float) else scale[:, 0])
    return whole.to(torch.int8), rest


def inner_products(codes, gallery, mask, group):
    """Products of query codes [q, D] with the gallery's [tiles, q, tile], and the best of each group of neighbouring rows
    [tiles, q, groups]. Padding and the pairs `mask` (i, j) get the least value."""
    if gallery.buffer.numel() < gallery.tiles * len(codes) * gallery.tile:  # kept: fresh memory costs a page fault a page
        gallery.buffer = gallery.buffer.new_empty(gallery.tiles * len(codes) * gallery.tile)
    out = gallery.buffer[:gallery.tiles * len(codes) * gallery.tile].view(gallery.tiles, len(codes), gallery.tile)
    least = torch.iinfo(out.dtype).min if gallery.screen == "int8" else -torch.inf
    codes = F.pad(codes, (0, gallery.codes.shape[1] - codes.shape[1]))
    if gallery.screen == "int8" and codes.is_cuda:  # cuBLAS wants more than 16 rows
        codes = F.pad(codes, (0, 0, 0, max(0, 32 - len(codes))))
    best = out.new_empty(gallery.tiles, out.shape[1], gallery.tile // group) if group > 1 else out
    for t in range(gallery.tiles):
        other = gallery.codes[t * gallery.tile:(t + 1) * gallery.tile].T
        if gallery.screen != "int8":
            torch.mm(codes, other, out=out[t])
        elif codes.is_cuda:
            out[t] = torch._int_mm(codes, other)[:out.shape[1]]
        else:
            torch._int_mm(codes, other, out=out[t])
        if t == gallery.tiles - 1:
            out[t, :, gallery.size - t * gallery.tile:] = least
        if len(mask[0]):
            here = mask[1] // gallery.tile == t
            out[t, mask[0][here], mask[1][here] % gallery.tile] = least
        if group > 1:  # while the tile is in the cache
            torch.amax(out[t].view(out.shape[1], -1, group), 2, out=best[t])
    return out, best


def candidates(query, gallery, k, worst, mask, limit):
    """Pairs (i, j), ascending, among which are the k nearest gallery rows of each query [q, D], as far as they are nearer
    than `worst` [q], the k-th found before. Third, the queries with more than `limit` pairs: they get none. None when the
    pairs of all queries would take too much memory: ask for fewer queries at a time."""
    scale = (query.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30) if gallery.screen == "int8" else query.new_ones(1, 1)
    code, rest = encode_rows(query, gallery.screen, scale)
    unit = scale[:, 0].double() * gallery.scale  # of the products, in cosine
    error = (rest.double() * (1 + gallery.rest) + gallery.rest) * (1 + 1e-5) + 2 * gallery.sums + 1e-6  # and some to spare
    if gallery.screen == "bf16":
        error += 2**-8.9  # the products themselves are rounded
    group = GROUP if k * 4 <= gallery.size // GROUP else 1
    product, best = inner_products(code, gallery, mask, group)
    best = best.transpose(0, 1)
    enough = k <= best[0].numel()  # the k-th best of the groups is a lower bound of the k-th best of all
    kth = best.flatten(1).topk(k, sorted=False).values.amin(1).double() * unit if enough else -torch.inf * error
    # A product is within `error` of its cosine. So the k-th best cosine is at least kth - error, and a row whose cosine reaches
    # that, and the `worst` so far, has a product of at least this less `error`. (clamp: products of codes may exceed 1, where
    # bfloat16 rounds twice as coarsely.)
    kth = kth.clamp(max=1) - error
    least = ((torch.maximum(kth, worst.double()) - error) / unit).float()
    least -= least.abs() * 1e-6  # this line's own rounding
    hit = best >= least[:, None, None]
    over = hit.sum((1, 2)) > limit
    hit[over] = False
    if len(query) > 1 and hit.sum() * group > PAIRS // 2:
        return None
    i, t, column = hit.nonzero().T  # query, tile, group in the tile
    if group > 1:
        columns = column[:, None] * group + torch.arange(group, device=column.device)  # of all rows of the groups
        which, place = (product[t[:, None], i[:, None], columns] >= least[i][:, None]).nonzero().T
        i, t, column = i[which], t[which], columns[which, place]
    j = t * gallery.tile + column
    real = (j < gallery.size) & ~over[i]
    if len(mask[0]):
        real &= ~torch.isin(i * gallery.size + j, mask[0] * gallery.size + mask[1])
    i, j = i[real], j[real]
    over |= torch.bincount(i, minlength=len(query)) > limit
    keep = ~over[i]
    return i[keep], j[keep], over


def merge(similarity, index, k):
    """The k best of each row of [q, c], best first, equal ones by lower index."""
    index, order = index.sort(dim=1, stable=True)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], index.gather(1, order[:, :k])


def search_block(query, gallery, best, own, limit):
    """The block's k best so far (similarity, index [q, k]), changed in place, joined with those of this part of the gallery.
    `own` [q]: the gallery row that is not to be matched, or -1. Also returns the queries with too many candidates, left as they
    were."""
    mask = ((own >= gallery.begin) & (own < gallery.begin + gallery.size)).nonzero()[:, 0]
    mask = mask, own[mask] - gallery.begin
    k = best[0].shape[1]
    found = candidates(query, gallery, k, best[0][:, -1], mask, limit)
    if found is None:
        halves = [search_block(query[half], gallery, (best[0][half], best[1][half]), own[half], limit)[1]
                  for half in (slice(len(query) // 2), slice(len(query) // 2, None))]
        return best, torch.cat(halves)
    i, j, over = found
    count = torch.bincount(i, minlength=len(query))
    start = count.cumsum(0) - count
    rows = max(1, PAIRS // max(1, int(count.max())))  # queries at a time, so that PAIRS bounds the memory
    for at in range(0, len(query), rows):  # their pairs, one query after the other, become a table `near` [rows, most of one]
        part = slice(int(start[at]), int(start[at + rows]) if at + rows < len(query) else len(i))
        row = i[part] - at
        column = torch.arange(part.start, part.stop, device=i.device) - start[i[part]]
        near = query.new_full((min(rows, len(query) - at), int(count[at:at + rows].max())), -torch.inf)
        which = torch.full(near.shape, NONE, device=i.device)
        near[row, column] = gallery.similarity(query[at:at + rows], row, j[part])
        which[row, column] = j[part] + gallery.begin
        both = torch.cat([best[0][at:at + rows], near], 1), torch.cat([best[1][at:at + rows], which], 1)
        best[0][at:at + rows], best[1][at:at + rows] = merge(*both, k)
    return best, over


@functools.cache
def int8_adds_up():
    """Whether this CPU's int8 products are exact. Without VNNI (ONEDNN_MAX_CPU_ISA=AVX2) sums of two saturate at 2^15."""
    codes = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 64 * 127**2).all())


def pick_screen(name, device, work):
    """'auto': what the device multiplies fastest; float32 where `work` (multiplications) is too little to matter."""
    if name == "int8" and device.type != "cuda" and not int8_adds_up():
        return "bf16"
    if name != "auto":
        return name
    if device.type == "cuda":  # cards older than Ampere (T4, V100) have no bfloat16 units
        return "bf16" if pick_precision("auto", device) == "bf16" else "fp32"
    if work < 1e9 or not in_place(device):
        return "fp32"
    return "int8" if torch.cpu._is_vnni_supported() and int8_adds_up() else pick_precision("auto", device)


def search(queries, gallery, k, exclude, device, screen, memory, first=0):
    """Yields (slice of the queries, similarity, index), a chunk at a time, from query number `first` on. Under torchrun
    every process searches its share of the gallery and gets the joint result."""
    mine, ranks = my_rows(len(gallery)), rank_and_world()[1]
    width, screens = gallery.shape[1], list(SCREENS)[list(SCREENS).index(screen):]
    row_bytes = {name: width * (SCREENS[name].itemsize + (0 if in_place(device) else 4)) + 16 for name in screens}
    # Gallery rows in a part: the codes take up to 0.4 of the memory, their products with QUERIES queries up to 0.25.
    rows = {name: max(TILE, int(min(0.4 * memory / row_bytes[name], 0.25 * memory / (4 * QUERIES)))) for name in screens}
    whole = 0 < mine.stop - mine.start <= rows[screen]  # one part: its codes serve all chunks
    kept = Gallery(gallery, mine.start, mine.stop, screen, device) if whole else None

    def parts(name):
        for start in range(mine.start, mine.stop, rows[name]):
            stop = min(start + rows[name], mine.stop)
            yield kept if kept and name == screen else Gallery(gallery, start, stop, name, device)

    chunk = QUERIES * max(1, min(16, int(0.1 * memory / (24 * k) / QUERIES)))
    for at in range(first, len(queries), chunk):
        part = slice(at, min(at + chunk, len(queries)))
        own = torch.as_tensor(exclude[part], device=device)
        similarity, index, useless = search_chunk(queries, at, own, k, screens, parts, device)
        screens = screens[useless:]  # the chunks to come are of the same data
        if ranks > 1:
            similarity, index = merge(*(join_ranks(t, ranks) for t in (similarity, index)), k)
        yield part, similarity.cpu().numpy(), index.cpu().numpy()


def search_chunk(queries, at, own, k, screens, parts, device):
    """(similarity, index [q, k], how many of the `screens` to leave out from now on) of q queries from number `at` on. own [q]:
    the gallery row a query must not match, or -1. parts: function of a screen's name -> the parts of the gallery. A query with
    too many candidates is searched again in all parts by the next, finer screen; the last, float32, takes any number."""
    similarity = torch.full((len(own), k), -torch.inf, device=device)
    index, todo, useless = torch.full((len(own), k), NONE, device=device), torch.arange(len(own)), 0
    for name in screens:
        failed = torch.zeros(len(own), dtype=torch.bool)
        for gallery in parts(name):
            limit = torch.inf if name == screens[-1] else max(64, 4 * k, gallery.size // 64)
            for block in todo.split(QUERIES):
                if len(block := block[~failed[block]]):
                    query = queries.take(at + block.numpy(), "queries")[0].to(device)
                    best, over = search_block(query, gallery, (similarity[block], index[block]), own[block], limit)
                    similarity[block], index[block] = best
                    failed[block] = over.cpu()
                if failed[todo].sum() > max(64, len(todo) / 2):  # not the screen for this data
                    failed[todo], useless = True, screens.index(name) + 1
                    break
            del gallery  # before the next is made
            if failed[todo].all():
                break
        todo = failed.nonzero()[:, 0]
        if not len(todo):
            return similarity, index, useless
        similarity[todo], index[todo] = -torch.inf, NONE
    raise AssertionError("float32 keeps every candidate")


def join_ranks(tensor, ranks):
    """The processes' tensors [q, k] side by side, [q, ranks * k], on every process."""
    all_of_them = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(all_of_them, tensor.contiguous())
    return torch.cat(all_of_them, 1)


def free_memory(device):
    """GiB for the search: 1, on a GPU half of what is free, the same on all processes, whose exchanges have to match."""
    if device.type == "cpu":
        return 1.0
    torch.cuda.empty_cache()  # what then is reserved is a CUDA graph's own
    free = torch.cuda.mem_get_info(device)[0]
    free = torch.tensor(free / 2**31, dtype=torch.float64, device=device)
    if rank_and_world()[1] > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return free.item()


def topk(queries, gallery, k, exclude=None, device="cpu", screen="auto", memory=None, store=None):
    """Exact k nearest gallery rows by cosine similarity; the full similarity matrix never exists.

    queries [n, D], gallery [m, D]: arrays, memory maps, tensors or Joined, of any float type; rows are L2-normalised here,
    tiny and huge ones safely; a zero row has similarity 0 to all. float32 arrays are read in place.
    exclude [n]: gallery row that query i must not match (itself, in a leave-one-out search), -1 for none.
    screen: 'int8', 'bf16', 'fp32', or 'auto' for the fastest here; changes the time, never a digit of the result.
    memory: GiB to use beside the arrays themselves and the result; default 1, on a GPU half of what is free there.
    store: a Store, which keeps what is found on disk and lets an interrupted search go on.
    Returns (similarity float32 [n, k], index int64 [n, k]), best first, equal similarities by lower index; k beyond the
    gallery (less the excluded row) gives that many columns. A similarity is the float32 inner product of the normalised
    rows, within D 2^-24 of the true cosine, typically 1e-7. InputError names a NaN row.
    """
    queries, gallery = (x if isinstance(x, Joined) else Joined([x]) for x in (queries, gallery))
    assert queries.shape[1] == gallery.shape[1], f"{queries.shape[1]} and {gallery.shape[1]} dimensions"
    n, m = len(queries), len(gallery)
    exclude = np.full(n, -1) if exclude is None else np.asarray(exclude)
    k = max(0, min(k, m - bool((exclude >= 0).any())))
    store = store or Store()
    similarity, index, first = store.open(similarity=(np.float32, (n, k)), index=(np.int64, (n, k)))
    first = on_first(lambda: first)  # the first process keeps the result, the others go where it stands
    if not is_first():
        similarity[:first], index[:first] = 0, 0  # only the first has them
    if k:
        device = torch.device(device)
        screen = pick_screen(screen, device, n * m * queries.shape[1])
        memory = free_memory(device) if memory is None else memory
        if device.type == "cuda":  # the bounds are those of sums in float32
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        with progress(None, "search", n) as bar, torch.inference_mode():
            bar.update(first)
            for part, near, which in search(queries, gallery, k, exclude, device, screen, memory * 2**30, first):
                similarity[part], index[part] = near, which
                store.done(part.stop)
                bar.update(part.stop - part.start)
    return similarity, index
