"""Seeds, device and precision, files, metrics, logs. The lowest layer: it imports nothing of the project."""

import os
import sys

# Before torch loads OpenMP, hence the first import of every script: a thread that waits shall spin briefly, then sleep.
# Measured on 2 cores, a training step of tf_efficientnet_lite0 at 96 px: sleeping at once costs 1.6 times the time when
# the cores are idle; OpenMP's default, to spin on and on, costs 10 times the time when another job shares them.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

# Before torch allocates: large tensors in pages of 2 MiB, which fault in 512 times less often.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Before OpenCV is loaded: an image's header may claim any size, and its decoder would ask for that much memory.
MAX_PIXELS = 100_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))

script_pid, interrupted = 0, False  # process of the script that runs; whether a Ctrl-C or SIGTERM came (run, interrupt)
INTERRUPTED = "interrupted; the same command, without --restart, goes on from the last finished epoch or file"


def quiet_interrupt(kind, error, trace):
    """A Ctrl-C while the imports run, which take seconds, is a line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import gc
import hashlib
import json
import multiprocessing
import random
import re
import resource
import signal
import stat
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

PLAIN = ("args", "best", "classes", "epoch", "held_out", "history", "train")  # of a checkpoint of ours: no tensors in them
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class InputError(Exception):
    """Something the user can mend. `run` prints it as one sentence and exits with code 2."""

    def __init__(self, message):
        # A loader worker hands its exceptions on as text, the traceback before the message.
        super().__init__(str(message).rpartition("utils.InputError: ")[2].strip())


class Unwritable(InputError):
    """A file that could not be written."""


class Parser(argparse.ArgumentParser):
    """argparse's parser; under torchrun one process says what is wrong."""

    def error(self, message):
        if fails_first():
            super().error(message)
        os._exit(2)


def within(interval, kind=float):
    """For add_argument's `type`: a function from a flag's text to its number, which must lie in the interval, e.g. "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    with_low, with_high = interval[0] == "[", interval[-1] == "]"

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low < value < high or (with_low and value == low) or (with_high and value == high):
                return value
        raise argparse.ArgumentTypeError(f"{text} is no {'whole ' if kind is int else ''}number in {interval}")

    return convert


# What type="count" of an add_argument means, in every script: script_parser registers these names.
NUMBERS = {"whole": within("[0, inf)", int), "count": within("[1, inf)", int), "several": within("[2, inf)", int),
           "seed": within("[0, 4294967295]", int), "share": within("[0, 1]"), "part": within("[0, 1)"),
           "rate": within("(0, 1)"), "amount": within("[0, inf)"), "positive": within("(0, inf)")}


def script_parser(doc, folders=True, device=True):
    """A script's ArgumentParser: `doc` is its help, abbreviations are errors; folders: with --input, --output, --allow-outside;
    device: with --device. A flag's `type` may be one of the NUMBERS, by name."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, convert in NUMBERS.items():
        parser.register("type", name, convert)
    if folders:
        parser.add_argument("--input", default="input", help="data folder (default input)")
        parser.add_argument("--output", default="output", help="results folder (default output)")
        parser.add_argument("--allow-outside", action="store_true", help="paths in the CSVs may leave the data folder")
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default auto)")
    return parser


def printable(text):
    """Text of strangers without control characters, which could break the line or steer the terminal."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], str(text))


def interrupt(number, frame):
    """SIGTERM ends a script as Ctrl-C does. Schedulers may send several: those that follow shall not disturb the ending."""
    global interrupted
    if os.getpid() != script_pid:  # a loader's process, just forked
        os._exit(130)
    interrupted = True
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def interrupt_later(lost):
    """An exception in a callback of Python's (an object deleted, a loader's workers ended, a process forked) is only printed.
    A Ctrl-C or SIGTERM there must not be lost: it is raised again 50 ms later."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    elif not interrupted:
        sys.__unraisablehook__(lost)


def run(main):
    """Call main() as a script: user errors are a sentence and code 2, Ctrl-C and SIGTERM a line and code 130. Under torchrun
    the first process prints; the first that fails says why, and the others, which then fail for want of it, end silently."""
    global interrupted, script_pid
    interrupted, script_pid = False, os.getpid()
    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGALRM, signal.default_int_handler)  # see interrupt_later
    sys.unraisablehook = interrupt_later
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name that is no UTF-8, a terminal that knows no Korean
            stream.reconfigure(errors="backslashreplace")
    said, code = None, 0
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w") if int(os.environ.get("RANK", 0)) else sys.stdout):
            main()
    except InputError as error:
        said, code = "error: " + "\n".join(map(printable, str(error).split("\n"))), 2
    except BrokenPipeError:
        said, code = "error: what read the output has gone (| head?)", 2
    except OSError as error:
        said = (f"error: {printable(error.filename or 'output')}: {error.strerror}; is it there, may you read and write it, "
                "has the disk space? Then run the same command again: what is finished is kept")
        code = 2
        if error.filename is None and error.errno is None:  # one that a loader's process has met, in its words
            said, code = traceback.format_exc().rstrip(), 1
    except torch.OutOfMemoryError as error:
        said = (f"error: {str(error).partition('. ')[0]}; compute a batch in parts (train.py: --grad-accum 2; for a run that "
                "has finished an epoch with --restart, too)")
        code = 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all processes of a job and to its shell again
        signal.setitimer(signal.ITIMER_REAL, 0)
        said, code = INTERRUPTED, 130
    except Exception as error:
        if interrupted:  # a loader's process may have met the signal first
            said, code = INTERRUPTED, 130
        elif "DataLoader worker (pid" in str(error) or "Pin memory thread" in str(error):
            said = f"error: {error}; memory or /dev/shm was full perhaps: the same command with fewer --workers goes on"
            code = 2
        else:
            said, code = traceback.format_exc().rstrip(), 1
    if code:
        gc.collect()  # while an exception's frames live so does their loader, and Python's end would wait for its processes
        if children := multiprocessing.active_children():  # for ever, where the loader could not tell them
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for child in children:
                child.kill()
    if code and fails_first():
        print(said, file=sys.stderr, flush=True)
    elif code:
        code = 2  # another process has said why
    if code and dist.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # what Python does at its end could wait for the other processes
    if code:
        sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------- seeds


def seed_everything(*key):
    """Seed Python, NumPy and torch from a tuple of whole numbers, e.g. (seed, epoch)."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    random.seed(int(state[0]))
    np.random.seed(state[0])
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))


# --------------------------------------------------------------------------------------------------- device, precision


def pick_device(name="auto", deterministic=False):
    """torch.device for 'auto', 'cpu', 'cuda' or 'cuda:1', under torchrun a GPU each. Convolutions may be in TF32, matrix
    products stay float32, also where a container's variables say otherwise. cuDNN does not try its kernels out: for
    tf_efficientnet_b1 on an H100 that took more than half a minute at each start."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it, before it starts
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # it loads the compiler, which takes a second
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this PyTorch sees no GPU; use --device cpu")
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # else threads of PyTorch's own open the first card, too
        torch.ones(1, device=device).add(1).item()  # a card that this build has no code for fails here
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def pick_precision(name, device, training=False):
    """'fp32', 'bf16' or 'fp16'. 'auto' takes bf16 where the hardware has it, fp16 on older cards, else fp32. On a CPU without
    matrix units (AMX) training in bf16 is no faster than in fp32 (scripts/RESULTS.md, 'Beside their limits'), embedding is."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    amx, bf16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return "bf16" if amx or (bf16 and not training) else "fp32"


def keep_freed_memory():
    """Let glibc keep freed memory instead of handing it back: it maps each large tensor anew, and its pages fault in one by
    one. For the processes that run networks on a CPU: tf_efficientnet_lite2 at 224 px in bfloat16, 2 cores, embeds 2 to 3 times
    the images/s. Not for the search, which promises a bound on its memory. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def hand_back_memory():
    """Hand the freed memory back now, before a process forks: both would share its pages, and each that this one then writes to
    would be copied. Training tf_efficientnet_lite2 at 224 px, 5 GiB: 9 s for each fork without, 1 s with it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def autocast(device, precision):
    """Context in which the forward pass runs in `precision`; does nothing at fp32."""
    return torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32")


def peak_memory(device):
    """Peak memory in GiB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


# ---------------------------------------------------------------------------------------- several processes (torchrun)


@contextlib.contextmanager
def processes(device):
    """Under torchrun, join the group of processes. A process that dies ends the others, so nobody need give up waiting: the
    first may embed for hours to draw folds."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=7))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the others


def fails_first():
    """Whether no other process has failed before, so that this one has to say why."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=30)))  # torchrun's: it outlives them
        return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # another launcher's store may be gone: better said twice than not at all
        return True


def rank_and_world():
    """(number of this process, how many there are); (0, 1) outside `processes`."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    return rank_and_world()[0] == 0


def my_rows(n, step=1):
    """The slice of n rows that is this process's, in whole steps (the end may be shorter), by order of rank."""
    (rank, ranks), steps = rank_and_world(), -(-n // step)  # -(-a // b): a / b, rounded up
    low, high = -(-steps * rank // ranks), -(-steps * (rank + 1) // ranks)
    return slice(min(n, low * step), min(n, high * step))


def on_first(work, *args):
    """work(*args) on the first process, while the others wait; the result on all of them."""
    rank, ranks = rank_and_world()
    box = [work(*args) if rank == 0 else None]
    if ranks > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather(array):
    """The processes' arrays [n, D], one after the other, on every process; n may differ."""
    arrays = [array] * rank_and_world()[1]
    if len(arrays) == 1:
        return array
    dist.all_gather_object(arrays, array)
    return np.concatenate([a for a in arrays if len(a)])  # one without rows knows no D


def sum_up(tensors):
    """Replace float32 tensors by their sums over the processes, in one exchange."""
    if rank_and_world()[1] > 1:
        joined = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(joined)
        for tensor, total in zip(tensors, joined.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


# ---------------------------------------------------------------------------------------------------------------- files


def regular(path, most=2**30):
    """The path, if it is a file of at most `most` bytes. A pipe would be read for ever; OSError where there is nothing."""
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is no file; take it away or name another")
    if most and found.st_size > most:
        raise InputError(f"{path} has {found.st_size / 2**30:.1f} GiB, too much for what it should be; replace it")
    return path


@contextlib.contextmanager
def atomic(path, own=False):
    """Yield a temporary path beside `path`; rename it when the block ends, so that a file that exists is whole.
    The temporary name is fixed: torch.save stores it in the file, and equal runs shall give equal files. `own`: it is this
    process's own, for a file that several may write at once."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}{os.getpid() if own else ''}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written ({error.strerror or error}); free space, or give another --output, and run "
                         "the same command again: what is finished is kept") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_check(value):
    """16 hex digits that a flipped bit anywhere in the JSON changes."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def save_json(path, value):
    """Write a dict, its json_check under the key 'check'."""
    save_text(path, json.dumps(value | {"check": json_check(value)}, indent=1, ensure_ascii=False) + "\n")


def load_json(path, **kinds):
    """The dict of a JSON file, compared with its 'check' where it has one. `kinds`: types of keys that must be there, e.g.
    epochs=int."""
    try:
        value = json.loads(Path(regular(path)).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
        if value.pop("check", None) not in (None, json_check(value)):
            raise ValueError("not as it was written; \"check\" differs")
        for key, kind in kinds.items():
            if not isinstance(value.get(key), kind):
                raise ValueError(f"no proper {key!r}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the step that writes it again") from None
    return value


@contextlib.contextmanager
def reading(path, mend, what="damaged"):
    """What a reader raises for a damaged file, of many kinds, as a sentence; that it cannot be opened stays an OSError."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = str(error).strip().partition("\n")[0][:120]
        raise InputError(f"{path} is {what} ({reason}); {mend}") from None


def save_csv(path, table):
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def save_npy(path, array):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_npz(path, /, own=False, **arrays):
    with atomic(path, own) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_npy(path, shape=None, digest=None):
    """Memory map of a float32 .npy; `shape` (None = any) and `digest`, its file_fingerprint, are checked. Never unpickles."""
    if not Path(path).exists():
        raise InputError(f"{path} is not there; run extract.py again")
    with reading(path, "run extract.py again"):
        array = np.load(regular(path, most=None), mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("no .npy")
    if array.dtype != np.float32 or array.ndim != 2 or not array.flags.c_contiguous:
        raise InputError(f"{path} holds {array.dtype} {array.shape}, not float32 [N, D] by rows; run extract.py again")
    if shape and any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
        raise InputError(f"{path} is {array.shape}, expected {shape}; run extract.py again")
    if digest and digest != file_fingerprint(path):
        raise InputError(f"{path} is not what extract.py wrote: a bad disk, or another file; run extract.py again")
    return array


def load_npz(path, mend):
    """The arrays of an .npz by name, compared with its checksums. `mend`: what to do about a damaged one."""
    with reading(path, mend), np.load(regular(path, most=None), allow_pickle=False) as file:
        return dict(file)


def new_npy(path, dtype, shape):
    """A writable memory map of a new .npy. Its space is taken at once: a full disk is an error here, not a crash later."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        reserve(file, os.fstat(file.fileno()).st_size, path)
    return array


def reserve(file, size, path):
    """Take the disk space of an open file that is then mapped; `path` says in an error where it lies."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise Unwritable(f"{path} cannot be written ({error.strerror}); free space, or give another --output") from None


class Store:
    """Arrays that are filled from the top: in memory, or with a folder on disk, where an interrupted job goes on. `key` names
    the job (its inputs and settings); what another job left in the folder is thrown away."""

    def __init__(self, folder=None, key=""):
        self.folder, self.key, self.arrays = folder and Path(folder), key, []

    def open(self, **arrays):
        """name=(dtype, shape) of each array. Returns the arrays in this order, and last the number of rows done."""
        if self.folder is None:
            return *(np.empty(shape, kind) for kind, shape in arrays.values()), 0
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.first = self.resume(arrays)
        except Exception:  # nothing there yet, or damaged: NumPy's reader of headers raises many kinds
            self.first = 0
        if not self.first:
            (self.folder / "state.json").unlink(missing_ok=True)
            self.arrays = [new_npy(self.folder / f"{name}.npy", kind, shape) for name, (kind, shape) in arrays.items()]
            self.digests = [hashlib.sha256() for _ in arrays]
        return *self.arrays, self.first

    def back_to(self, count):
        """Go back to `count` rows done: a joint pass goes on from the least of its stores."""
        if self.folder is not None and count != self.first:
            self.first, self.digests = count, [hashlib.sha256(array[:count]) for array in self.arrays]

    def resume(self, arrays):
        """Take up what this job left: the number of rows done, 0 if it left nothing or not what it wrote."""
        state = load_json(self.folder / "state.json", key=str, done=int, digests=list)
        self.arrays = [np.lib.format.open_memmap(self.folder / f"{name}.npy", "r+") for name in arrays]
        self.digests = [hashlib.sha256(array[:state["done"]]) for array in self.arrays]
        same = state["key"] == self.key and [d.hexdigest() for d in self.digests] == state["digests"]
        fit = all((kind, shape) == (a.dtype, a.shape) for a, (kind, shape) in zip(self.arrays, arrays.values(), strict=True))
        return state["done"] if same and fit else 0

    def done(self, count):
        if self.folder is not None:
            for array, digest in zip(self.arrays, self.digests, strict=True):
                array.flush()
                digest.update(array[self.first:count])
            self.first = count
            save_json(self.folder / "state.json", {"key": self.key, "done": count,
                                                   "digests": [digest.hexdigest() for digest in self.digests]})


def save_checkpoint(path, value):
    with atomic(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # for want of space, too; without an errno
            raise OSError(str(error).partition("\n")[0]) from None


def load_checkpoint(path, **kinds):
    """Tensors and plain values only: a checkpoint that carries code is refused, not run. PyTorch does not look at the
    checksums in the file: they are compared here. `kinds`: types of keys that must be there, e.g. model=dict."""
    if not Path(path).exists():
        raise InputError(f"{path} is not there; run train.py first")
    with reading(path, "delete it and run the step again", "damaged or no plain checkpoint"):
        if zipfile.is_zipfile(regular(path, most=None)):
            with zipfile.ZipFile(path) as file:
                if any(record.compress_type != zipfile.ZIP_STORED for record in file.infolist()):
                    raise ValueError("compressed, as PyTorch never writes it")
                if bad := file.testzip():
                    raise ValueError(f"checksum of {bad}")
        value = torch.load(path, map_location="cpu", weights_only=True)
        for key, kind in kinds.items():
            if not (isinstance(value, dict) and isinstance(value.get(key), kind)):
                raise ValueError(f"no proper {key!r}")
        if kinds:
            json.dumps([value.get(key) for key in PLAIN])  # a TypeError where one of them holds a tensor
        return value


def fingerprint(rows):
    """SHA-256 over an iterable of tuples of text: which rows, in which order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update("\0".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()


def file_fingerprint(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(folder, wait=False):
    """Hold `folder` against other processes; wait for them, or refuse. A POSIX lock: loader workers do not inherit it,
    and it ends with the process, however that ends. Under torchrun the first process holds it for all."""
    if not is_first():
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(f"{folder}: another process is at work there; wait for it or stop it") from None
            print(f"{folder}: another process is at work there, waiting for it", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------------------------------- metrics


def accuracy(predicted, truth):
    """Share of equal entries of two integer vectors; nan for empty ones."""
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    assert predicted.shape == truth.shape, (predicted.shape, truth.shape)
    return float((predicted == truth).mean()) if len(truth) else float("nan")


def gap(predicted, confidence, truth):
    """Global average precision (micro AP), one prediction a row: sort all rows by confidence, most confident first,
    GAP = 1/N sum_i precision(i) * right(i). Rows of equal confidence keep their order.
    Source: Weyand et al., Google Landmarks Dataset v2, 2020, section 5.1 (there called muAP)."""
    order = np.argsort(-np.asarray(confidence), kind="stable")
    right = (np.asarray(predicted) == np.asarray(truth))[order]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float((precision * right).sum() / len(right)) if len(right) else float("nan")


# ----------------------------------------------------------------------------------------------------------------- logs


def progress(iterable, what, total=None):
    """tqdm bar on a terminal, nothing in a log file. PROGRESS=1 forces it (run_all.sh pipes its output through tee). Under
    torchrun it shows the first process's share."""
    show = (sys.stderr.isatty() or os.environ.get("PROGRESS") == "1") and is_first()
    return tqdm(iterable, what, total, leave=False, disable=not show, mininterval=0.5)


def duration(seconds):
    """'41 s', '12 min 05 s', '3 h 20 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
