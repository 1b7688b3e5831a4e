"""Flip-averaged embeddings of finished runs.

Runs with the same image sizes, resizing and precision share one pass over the images.
Reads  input/{train.csv,sample_submission.csv}, output/<arch>/fold<k>/best.pt
Writes output/<arch>/fold<k>/{train,test}.npy (float32 [N, 512] in the CSV's order, not normalised), head.npy (class centres
       [C x centres, 512]) and extract.json

    python extract.py                                  # all finished runs; what is up to date is skipped
    python extract.py --arch nfnet_l0 --fold 3         # one run
    torchrun --nproc_per_node 4 extract.py             # the images shared among processes, one GPU each
    python extract.py --arch dm_nfnet_f0 --fold 0 --weights original.pth --size 256 --precision fp32
"""

import contextlib
import json
import shutil
import time
from pathlib import Path

from utils import (
    InputError,
    Store,
    accuracy,
    autocast,
    duration,
    file_fingerprint,
    fingerprint,
    gather,
    is_first,
    keep_freed_memory,
    load_checkpoint,
    load_json,
    lock,
    my_rows,
    on_first,
    peak_memory,
    pick_device,
    pick_precision,
    processes,
    progress,
    rank_and_world,
    reading,
    run,
    save_checkpoint,
    save_json,
    save_npy,
    script_parser,
    within,
)

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import Subset

from dataset import (
    Cache,
    Images,
    check_inputs,
    default_workers,
    encode,
    input_flags,
    make_loader,
    test_fingerprint,
    train_fingerprint,
)
from models import EMBEDDING, Model, Softmax, build, fuse_batch_norm, load_weights

SAVE = 10.0  # seconds between two savings of a pass
# As PyTorch, cuDNN and cuBLAS say it.
NO_MEMORY = ("OutOfMemoryError", "out of memory", "unable to find an engine", "ALLOC_FAILED", "ALLOCATION_FAILED")


def parse_args():
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--arch", help="timm name of the backbone; default: every finished run")
    add("--fold", help="fold number, or 'all' for a run trained on everything; default: every fold")
    add("--weights", help="a checkpoint that was trained elsewhere, the original solution's for one, becomes the run "
        "--arch/--fold")
    add("--size", type="count", default=256, help="image side in pixels, only with --weights (default 256)")
    add("--test-size", type="count", nargs="+", help="image sides, embeddings averaged; default: those of the training")
    add("--gem-p", type=within("(0, 16]"), help="GeM's p; default: the trained")
    add("--adapt-bn", action="store_true", help="embed the test images with batch-norm statistics re-estimated on them: an "
        "embedding then depends on which other test images there are (Li et al., AdaBN, 2016)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="default: the training's --embed-precision")
    add("--batch-size", type="whole", default=0, help="images a batch; 0 = 64 on a CPU, 128 on a GPU, halved until it fits")
    input_flags(parser)
    args = parser.parse_args()
    if args.weights and not (args.arch and args.fold):
        parser.error("--weights needs --arch and --fold, which name the run that it becomes")
    if args.size != parser.get_default("size") and not args.weights:
        parser.error("--size is for --weights; a run has its own, or give --test-size")
    return args


# --------------------------------------------------------------------------------------------------- runs and embedding


def run_folder(output, arch, fold):
    """output/<arch>/fold<k>; a hub name's slashes and colons become underscores."""
    return Path(output) / arch.replace("/", "_").replace(":", "_") / f"fold{fold}"


def is_finished(folder):
    """True when all epochs of the run are in its log (or, for imported weights, no epoch was wanted)."""
    if not (folder / "best.pt").exists() or not (folder / "args.json").exists():
        return False
    args = load_json(folder / "args.json", epochs=int)
    if args["epochs"] == 0:
        return True
    try:  # all epochs: a flipped bit can turn a 2 into a 3
        wanted = range(1 - args.get("head_first", 0), args["epochs"] + 1)
        return pd.read_csv(folder / "log.csv")["epoch"].tolist() == list(wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finished_runs(output, arch=None, fold=None):
    """Folders of the finished runs below `output`, sorted by name; of one arch or fold if given."""
    folders = sorted(Path(output).glob("*/fold*"), key=lambda f: (f.parent.name, len(f.name), f.name))  # fold10 after fold9
    wanted = None if arch is None else run_folder(output, arch, 0).parent.name
    runs = [f for f in folders if (wanted is None or f.parent.name == wanted) and (fold is None or f.name == f"fold{fold}")
            and is_finished(f)]
    if not runs:
        which = " ".join(f"--{k} {v}" for k, v in [("arch", arch), ("fold", fold)] if v is not None)
        raise InputError(f"no finished run {which} under {output}; run train.py first".replace("  ", " "))
    return runs


def check_embeddings(embedded, images, of=""):
    """The embeddings [N, D] of a dataset.Images; InputError, naming the first image, if any is NaN, infinite or zero."""
    if len(bad := np.flatnonzero(~np.isfinite(embedded).all(1) | ~embedded.any(1))):
        raise InputError(f"{of}{images.folder / images.names[bad[0]]} gives a NaN, infinite or zero embedding ({len(bad)} of "
                         f"{len(images)} images do); try --precision fp32, or another --lr if the training failed")
    return embedded


def pick_batch_size(device):
    """Photographs embedded at a time. On an H100 512 are 1.08 times as fast as 128, and take four times the memory."""
    return 128 if device.type == "cuda" else 64


def my_share(images, batch_size):
    """Under torchrun, the images that this process embeds, whole batches of them, so that all have the batches of one process;
    `gather` joins the embeddings."""
    return images.part(my_rows(len(images), batch_size))


# embed_files calls embed_as_extracted; that and embed_model call embed_models; that calls embed_one_size.


@torch.inference_mode()
def embed_one_size(models, images, device, precision, batch_size, workers, what, stores=None, width=EMBEDDING):
    """embed_models at one size: a list of arrays. If a batch does not fit the GPU, it and all that follow are halved.
    Embeddings stay on the device until they are saved, every SAVE seconds: fetching them makes the CPU wait for the GPU. A
    resumed pass has the batches of an undisturbed one."""
    stores = stores or [Store() for _ in models]
    results, begun = zip(*(store.open(embedding=(np.float32, (len(images), width))) for store in stores), strict=True)
    done = min(begun)
    for store in stores:
        store.back_to(done)
    rest, waiting, saved = Subset(images, range(done, len(images))), [], time.monotonic()
    with progress(None, what, len(images)) as bar:
        bar.update(done)
        for batch, _ in make_loader(rest, batch_size, workers, device):
            batch = batch.to(device, non_blocking=True)
            at = 0
            while at < len(batch):
                part = batch[at:at + batch_size]
                try:
                    pair = torch.cat([part, part.flip(-1)])
                    with autocast(device, precision):  # .forward: by model() train.py's --compile would compile this, too
                        both = torch.cat([model.forward(pair) for model in models], 1)
                except RuntimeError as error:
                    if batch_size == 1 or not any(said in f"{type(error)} {error}" for said in NO_MEMORY):
                        raise
                    batch_size //= 2
                    torch.cuda.empty_cache()
                    continue
                waiting.append((both[:len(part)] + both[len(part):]) / 2)
                at += len(part)
                bar.update(len(part))
            count = done + sum(map(len, waiting))
            if time.monotonic() - saved > SAVE or count == len(images):
                columns = torch.cat(waiting).cpu().numpy()
                for store, result, part in zip(stores, results, np.split(columns, len(stores), 1), strict=True):
                    result[done:count] = part
                    store.done(count)
                done, waiting, saved = count, [], time.monotonic()
    return results


def embed_models(models, images, device, precision="fp32", batch_size=64, workers=0, what="embedding", sizes=None,
                 stores=lambda size: None, width=EMBEDDING):
    """Embeddings of a dataset.Images by several models in one pass, each batch decoded and copied once: an iterator, for each
    model float32 [N, width] in the images' order, averaged over the image and its mirror image and over `sizes` (default: the
    images' own); not normalised, not checked. Leaves the models in eval mode. stores: function of a size -> a Store for each
    model, from which an interrupted pass goes on."""
    keep_freed_memory()
    for model in models:
        model.eval()
    passes = [embed_one_size(models, images.at(size), device, precision, batch_size, workers, what, stores(size), width)
              for size in sizes or [images.size]]
    return (of_sizes[0] if len(of_sizes) == 1 else sum(of_sizes) / len(of_sizes) for of_sizes in zip(*passes, strict=True))


def embed_model(model, images, device, precision="fp32", batch_size=64, workers=0, what="embedding", sizes=None,
                width=EMBEDDING):
    """embed_models by one model, checked: float32 [N, width]."""
    joint = embed_models([model], images, device, precision, batch_size, workers, what, sizes, width=width)
    return check_embeddings(next(joint), images)


def load_run(folder):
    """The trained model of a run and all that its best.pt holds."""
    path = folder / "best.pt"
    checkpoint = load_checkpoint(path, model=dict, classes=list, args=dict)
    with reading(path, "delete it and train it again", "no model of this project"):
        return build(checkpoint), checkpoint


def load_model(folder, stamp, device):
    """The model of an extracted run as it gave the run's embeddings by its extract.json, the `stamp`, but for --adapt-bn."""
    model = load_run(folder)[0].to(device)
    if stamp["gem_p"]:
        model.pool.p.data.fill_(stamp["gem_p"])
    return model


def embed_as_extracted(runs, output, make, device, workers, batch_size=0):
    """{name of the run: embeddings [n, 512]} of other images, the Images that make(size, resize) returns, by the extracted
    `runs` (dicts of retrieve.load_runs) below `output`, just as they embedded their galleries. Runs that are alike share a
    pass."""
    groups, found = {}, {}
    for r in runs:
        groups.setdefault(json.dumps(alike_by(r["stamp"])), []).append(r)
    for some in groups.values():
        sizes, resize, precision = alike_by(some[0]["stamp"])
        models = [fuse_batch_norm(load_model(Path(output) / r["name"], r["stamp"], device), sizes[0]) for r in some]
        images = make(sizes[0], resize)
        what = some[0]["name"] if len(some) == 1 else f"{len(some)} runs in one pass"
        joint = embed_models(models, images, device, pick_precision(precision, device), batch_size or pick_batch_size(device),
                             workers, what, sizes)
        found |= {r["name"]: check_embeddings(part, images, f"{r['name']}: ") for r, part in zip(some, joint, strict=True)}
    return found


def embed_files(runs, output, base, files, device, batch_size=0):
    """embed_as_extracted of image files below `base`."""
    workers = default_workers() if len(files) > 64 else 0  # to start processes takes longer than a few photographs
    return embed_as_extracted(runs, output, lambda size, resize: Images(base, files, None, size, resize), device, workers,
                              batch_size)


@torch.inference_mode()
def adapt_bn(model, images, device, precision="fp32", batch_size=64, workers=0):
    """Replace the statistics of the model's batch norms by those of `images`, their mean over one pass. torch's update_bn would
    also train: some backbones then drop parts at random."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # None: the plain mean over all batches
        norm.train()
    for batch, _ in make_loader(images, batch_size, workers, device):
        if len(batch) > 1:
            with autocast(device, precision):
                model(batch.to(device))
    model.eval()


# ------------------------------------------------------------------------------------------------------------- the work


def import_weights(args, folder, train):
    """Write best.pt and args.json of a run that was trained elsewhere. Its fold is None: nobody knows here which images
    it has seen, so it takes no part in out-of-fold scores."""
    classes, _ = encode(train["label"])
    there = Path(args.weights).is_file()
    stamp = {"arch": args.arch, "fold": None, "weights": args.weights, "size": args.size, "resize": "squash",
             "precision": args.precision or "auto", "head": "arcface", "scale": 45.0, "margin": 0.4, "epochs": 0,
             "sha256": file_fingerprint(args.weights) if there else None}
    if (folder / "args.json").exists():
        recorded = load_json(folder / "args.json")
        known = {} if there else {"sha256": recorded.get("sha256")}  # the file may be gone by now
        differ = [f"{name} {recorded.get(name)}" for name, value in (stamp | known).items() if recorded.get(name) != value]
        if differ:
            raise InputError(f"{folder} holds another run, of {', '.join(differ)}; choose another --fold or --output for "
                             f"{args.weights}")
        if (folder / "best.pt").exists():
            return
    model = Model(args.arch, len(classes))
    said, part = load_weights(model, args.arch, args.weights)
    if part not in ("body", "all"):
        raise InputError(f"--weights {args.weights} brings no neck, so there is no embedding to extract; give a whole "
                         "checkpoint, or train one with train.py")
    plain = Path(args.weights).suffix == ".safetensors"
    if part == "all" and said.startswith("checkpoint") and not plain and "args" in load_checkpoint(args.weights):
        raise InputError(f"--weights {args.weights} is a run of this project, whose arguments count, too; copy its folder to "
                         f"{args.output}/<arch>/fold<k> instead")
    # Its head has numeric labels in the order of the numbers; here labels are text, and "10" comes before "2".
    if said.startswith("the original solution's") and part == "all" and all(label.isdecimal() for label in classes):
        rank = np.argsort(np.argsort([int(label) for label in classes]))  # of each class among the numbers
        model.head.weight.data = model.head.weight.data[rank]
    print(said)
    save_json(folder / "args.json", stamp)
    save_checkpoint(folder / "best.pt", {"model": model.state_dict(), "classes": classes, "args": stamp, "epoch": 0,
                                         "head_fits": part == "all"})


@torch.inference_mode()
def head_knows(head, embedded, labels):
    """Whether a head gives most of the embedded images [N, 512] their class [N], as one does that was trained on them."""
    given = [head(torch.from_numpy(part).to(head.weight.device)).argmax(1).cpu().numpy()
             for part in np.array_split(embedded, -(-len(embedded) // 4096))]
    return accuracy(np.concatenate(given), labels) > 0.5


def sizes_fingerprint(rows):
    """SHA-256 of the files' sizes: tells other photographs under the same names, and is that of a copied folder, too. rows:
    {split: (folder, names)}."""
    return fingerprint([Path(folder, name).stat().st_size] for folder, names in rows.values() for name in names)


def up_to_date(folder, stamp, names):
    """Whether the embeddings on disk are of this stamp and as they were written."""
    try:
        stored = load_json(folder / "extract.json", files=dict)
        return stored.items() >= stamp.items() and all(file_fingerprint(folder / n) == stored["files"].get(n) for n in names)
    except (OSError, InputError):  # not there, or damaged: extracted anew
        return False


def load_job(folder, args, about, classes, names, device):
    """What extract_jointly needs of a run, {folder, model, stamp, imported}; None if its embeddings on disk are up to date.
    stamp: all that the embeddings depend on, the later extract.json; about: its part that is the same for all runs; names: the
    files of the embeddings."""
    recorded = load_json(folder / "args.json", precision=str, size=int)
    precision = args.precision or recorded.get("embed_precision", recorded["precision"])
    stamp = about | {"checkpoint": file_fingerprint(folder / "best.pt"), "fold": recorded.get("fold"),
                     "precision": pick_precision(precision, device), "adapt_bn": args.adapt_bn, "gem_p": args.gem_p,
                     "sizes": args.test_size or recorded.get("test_size") or [recorded["size"]]}
    if on_first(up_to_date, folder, stamp, names):
        shutil.rmtree(folder / ".extract", ignore_errors=True)  # of a job that was killed when it had just finished
        print(f"{folder}: up to date")
        return None
    model, checkpoint = load_run(folder)
    if checkpoint["classes"] != classes:
        again = "train it again" if recorded["epochs"] else "delete it and give its --weights again"
        raise InputError(f"{folder} was trained on other classes than {args.input}/train.csv; {again}")
    if checkpoint["args"] != recorded:
        raise InputError(f"{folder}: args.json says other than best.pt; delete args.json and run train.py again")
    model.try_sizes(stamp["sizes"])  # now: later it would end other runs' pass, too
    if args.gem_p:
        model.pool.p.data.fill_(args.gem_p)
    head = "softmax" if isinstance(model.head, Softmax) else "arcface" if checkpoint["head_fits"] else None
    # Only recorded, for other scripts: up_to_date has compared the stamp above, where a new key makes every extract.json stale.
    stamp |= {"resize": recorded["resize"], "classes": len(classes), "head": head,
              "centres": getattr(model.head, "centres", 1), "held_out": checkpoint.get("held_out")}
    return {"folder": folder, "model": model, "stamp": stamp, "imported": recorded["epochs"] == 0}


def extract(folders, args, train, test, device, cache):
    """Embeddings of the runs in these folders, unless those on disk are of these checkpoints and rows; runs that are alike
    share a pass. Interrupted, it goes on from what lies in each run's .extract."""
    if args.adapt_bn and (test is None or len(test) < 2 or args.batch_size == 1):
        raise InputError("--adapt-bn needs two test images, and a batch of two or more")
    classes, labels = encode(train["label"])
    rows = {"train": (args.input, train["path"])}
    if test is not None:
        rows["test"] = (Path(args.input) / "test", test["filename"])
    names = [*(f"{split}.npy" for split in rows), "head.npy"]
    about = {"train": train_fingerprint(train), "test": None if test is None else test_fingerprint(test),
             "bytes": sizes_fingerprint(rows)}
    passes, failed = {}, []
    with contextlib.ExitStack() as locks:
        for folder in folders:
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(lock(folder))
                    job = load_job(folder, args, about, classes, names, device)
                except InputError as error:
                    if rank_and_world()[1] > 1:  # a folder is locked for the first process only
                        raise
                    failed.append(error.with_traceback(None))
                    continue
                if job:
                    begun = on_first((folder / ".extract").exists)  # apart: a pass starts at the fewest rows that a run has
                    passes.setdefault(json.dumps([alike_by(job["stamp"]), begun]), []).append(job)
                    locks.push(held.pop_all())  # the folder stays locked until all passes are done
        for kind in list(passes):
            failed += extract_jointly(passes.pop(kind), args, rows, labels, names, device, cache)  # pop frees its models
    if failed:
        raise InputError("\n".join(map(str, failed)))


def alike_by(stamp):
    """What runs must have in common to share a pass: image sizes, way to resize, precision."""
    return stamp["sizes"], stamp["resize"], stamp["precision"]


def extract_jointly(jobs, args, rows, labels, names, device, cache):
    """extract runs that are alike, in one pass over the training and one over the test images. Returns what is wrong with those
    whose embeddings are no numbers; the others are written."""
    start, (sizes, how, precision), failed = time.time(), alike_by(jobs[0]["stamp"]), []
    batch_size, first = args.batch_size or pick_batch_size(device), is_first()
    for job in jobs:
        job["model"].to(device)
        job["key"] = json.dumps([job["stamp"], batch_size, device.type, *rank_and_world()])
    what = str(jobs[0]["folder"]) if len(jobs) == 1 else f"{len(jobs)} runs in one pass"
    for split, (base, files) in rows.items():
        cache.add(base, files, sizes, how)
        images = Images(base, files, None, sizes[0], how, cache=cache)
        if split == "test" and args.adapt_bn:
            for job in jobs:
                adapt_bn(job["model"], images, device, precision, min(batch_size, 64), args.workers)
        models = [fuse_batch_norm(job["model"], sizes[0]) for job in jobs]

        def stores(size, jobs=jobs, split=split):
            return [Store(job["folder"] / ".extract" / f"{split}{rank_and_world()[0]}" / str(size), job["key"]) for job in jobs]

        good = []
        joint = embed_models(models, my_share(images, batch_size), device, precision, batch_size, args.workers,
                             f"{what}, {split}", sizes, stores)
        for job, embedded in zip(jobs, map(gather, joint), strict=True):
            folder, stamp = job["folder"], job["stamp"]
            try:
                check_embeddings(embedded, images, f"{folder}: ")
            except InputError as error:
                failed.append(error.with_traceback(None))  # which would keep the models
                if first:  # a card may have erred: embedded anew the next time
                    shutil.rmtree(folder / ".extract", ignore_errors=True)
                continue
            good.append(job)
            if first:
                (folder / "extract.json").unlink(missing_ok=True)  # from here to the end the files are no matching set
                save_npy(folder / f"{split}.npy", embedded)
            if split == "train" and job["imported"] and stamp["head"] and not head_knows(job["model"].head, embedded, labels):
                stamp["head"] = None
                print(f"{folder}: the checkpoint's head names most training images wrongly, so its classes are others, or in "
                      "another order: the votes with the head fall away")
        jobs = good
        if not jobs:
            return failed
    for job in jobs if first else []:
        folder = job["folder"]
        save_npy(folder / "head.npy", job["model"].head.weight.detach().float().cpu().numpy())
        save_json(folder / "extract.json", job["stamp"] | {"files": {name: file_fingerprint(folder / name) for name in names}})
        shutil.rmtree(folder / ".extract", ignore_errors=True)
    seconds, count = time.time() - start, sum(len(files) for _, files in rows.values())
    print(f"{what}: {count} images in {duration(seconds)}, {count * len(jobs) / seconds:.0f} embeddings/s at "
          f"{' + '.join(map(str, sizes))} px, {precision}, peak memory {peak_memory(device):.1f} GiB")
    return failed


def main():
    args = parse_args()
    device = pick_device(args.device, args.deterministic)
    with processes(device):
        train, test = on_first(check_inputs, args)
        if test is None:
            print(f"{args.input}/sample_submission.csv is not there: training images only")
        if args.weights:
            folder = run_folder(args.output, args.arch, args.fold)
            with lock(folder):
                on_first(import_weights, args, folder, train)
        folders = on_first(finished_runs, args.output, args.arch, args.fold)
        extract(folders, args, train, test, device, Cache(args))


if __name__ == "__main__":
    run(main)
