"""Kills, bad disks and hostile input at random, repeatable by seed: what RESULTS.md's reliability section rests on.

    kills    the whole ten-run job (two tiny networks x five folds) is killed by SIGKILL at random moments and started again:
             the submission, all ten best.pt and the embeddings must be those of an undisturbed job, bit for bit
    signals  SIGTERM and Ctrl-C at random moments of a training: one line, a code, a checkpoint that loads, no process left
    disks    files of a finished job cut or with a flipped bit, writes that fail, a full and a read-only disk: a sentence that
             names the file, or the right result
    input    mutated images, CSVs, embeddings, checkpoints and JSON: no traceback, 10 s, 2 GiB, no code run, the culprit named
    health   30 epochs of 16 times the demo: memory and descriptors flat; after SIGKILL no worker and no shared memory is left

A script is run in a process forked from this one, which has imported PyTorch: starting it anew would take longer than its work.

Reads  nothing
Writes WORK, where what failed is kept: a table, torture.md, to stdout, too; health.csv and .png, the memory of the training

    python scripts/torture.py
    python scripts/torture.py --parts kills --kills 100 --seed 7
"""

import atexit
import collections
import contextlib
import filecmp
import io
import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads does not fork safely
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, load_checkpoint, run, save_text, script_parser, within

import cv2
import expect  # noqa: F401
import numpy as np
import pandas as pd
import report  # noqa: F401
import summary
from hostile import Cases, cut, flip, mutate

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kills", "signals", "disks", "input", "health")
NETS, EPOCHS = ("test_efficientnet", "test_nfnet"), 2
SECONDS, MEMORY = 10, 2 * 2**30  # that an input may cost
FINAL = ["submission.csv", "confidence.csv", "folds.csv"]  # of the output and of each run: what must be equal, bit for bit
EMBEDDINGS = ["train.npy", "test.npy", "head.npy"]
RECORDS = ["scores.json", "expected.json"], ["best.pt", "args.json", "extract.json"]


def parse_args():
    parser = script_parser(__doc__, folders=False, device=False)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    add("--kills", type="whole", default=100, help="SIGKILLs (default 100)")
    add("--signals", type="whole", default=20, help="SIGTERMs and Ctrl-Cs (default 20)")
    add("--disks", type="whole", default=120, help="damaged files and failing disks (default 120)")
    add("--inputs", type="whole", default=2000, help="mutated inputs (default 2000)")
    add("--health-epochs", type="several", default=30, help="epochs of the long training (default 30)")
    add("--health-times", type="count", default=16, help="its data, in times of the demo's 400 images (default 16)")
    add("--folds", type=within("[1, 5]", int), default=5, help="trained of each network; the ten-run job has 5 (default 5)")
    add("--seed", type="seed", default=0, help="of all that is random (default 0)")
    add("--work", help="folder to work in, kept (default a temporary one, removed when nothing failed)")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- scripts as processes


class Process:
    """`python script args` in a process group of its own, forked from this one; what it prints is read when it has ended."""

    def __init__(self, script, *args, setup=lambda: None):
        self.script, (self.out, out) = script, os.pipe()
        os.set_blocking(out, False)
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.close(self.out)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
            sys.argv = [script, *map(str, args)]
            status = 1
            try:
                setup()
                os.chdir(ROOT)
                runpy.run_path(str(ROOT / script), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else bool(end.code)
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
                status = 130 if isinstance(error, KeyboardInterrupt) else 1
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        os.close(out)

    def running(self):
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, limit=600):
        end = time.time() + limit
        while self.running():
            time.sleep(0.005)
            if time.time() > end:
                self.kill()
        self.kill()  # of its group, what is left
        self.said = io.FileIO(self.out).readall().decode(errors="replace")
        return self


def training(data, output, net=NETS[0], fold=0, workers=1, epochs=EPOCHS, size=32, batch=8):
    where = ["--input", data, "--output", output]
    flags = ["--size", size, "--batch-size", batch, "--weights", "none", "--precision", "fp32", "--workers", workers]
    return ["train.py", "--arch", net, "--fold", fold, "--epochs", epochs, *flags, *where]


def job(data, output, folds, workers=1):
    """The commands of run_all.sh."""
    where = ["--input", data, "--output", output]
    return [*(training(data, output, net, fold, workers) for net in NETS for fold in range(folds)),
            ["extract.py", "--workers", workers, *where],
            *([script, *where] for script in ("retrieve.py", "scripts/expect.py", "scripts/report.py", "scripts/summary.py"))]


def run_job(commands, moment=math.inf, seconds=(), setup=lambda: None):
    """Run commands one after the other until one fails, or until a moment, then SIGKILL. A moment of 2.5 is half-way through
    the third command, by the `seconds` that each takes undisturbed. Returns (the last Process, CPU seconds of each)."""
    used = []
    for number, command in enumerate(commands):
        process, spent = Process(*command, setup=setup), 0.0
        while process.running():
            spent = max(spent, cpu(process.pid))
            if moment < math.inf and number + min(1, spent / seconds[number]) >= moment:
                process.kill()
            time.sleep(0.005)
        used.append(spent)
        if process.wait().code:
            break
    return process, used


def differing(output, undisturbed, records=False):
    """Names of the result files that differ from the undisturbed job's. Not the records where a checkpoint was damaged in a
    bit that does not count, the name of a record for one: they hold its fingerprint."""
    of_job, of_runs = RECORDS if records else ([], [])
    runs = sorted(path.parent.relative_to(undisturbed) for path in undisturbed.glob("*/fold*/args.json"))
    files = [*FINAL, *of_job, *(f"{folder}/{name}" for folder in runs for name in [*EMBEDDINGS, *of_runs])]
    return [name for name in files if not ((output / name).exists() and
                                           filecmp.cmp(output / name, undisturbed / name, shallow=False))]


def make_data(folder, rng, labels=("bottle", "=1+1", "우유"), train_each=10, test_each=3, side=32):
    """A coloured ring or disc a label on noise: train.csv, sample_submission.csv, solution.csv and images."""
    rows = {"train": [], "test": []}
    for split, each in (("train", train_each), ("test", test_each)):
        (folder / split).mkdir(parents=True)
        for number, label in enumerate(labels):
            for i in range(each):
                image = rng.integers(150, 255, (side, side, 3), dtype=np.uint8)
                x, y = (int(v) for v in rng.integers(10, 22, 2))
                cv2.circle(image, (x, y), 8, [(200, 30, 30), (30, 180, 40), (40, 60, 210)][number], -1 if number else 3)
                name = f"{number}_{i}.png"
                cv2.imencode(".png", image)[1].tofile(folder / split / name)
                rows[split].append((name, label))
    pd.DataFrame([(f"train/{n}", label) for n, label in rows["train"]], columns=["path", "label"]).to_csv(
        folder / "train.csv", index=False)
    test = pd.DataFrame(rows["test"], columns=["filename", "label"])
    test.to_csv(folder / "solution.csv", index=False)
    test[["filename"]].assign(prediction=labels[0]).to_csv(folder / "sample_submission.csv", index=False)
    return folder


# -------------------------------------------------------------------------------------------------------------- the parts


class Campaign:
    """The working folder, one random generator a part, and what was found: table rows and faults."""

    def __init__(self, work, seed, folds):
        self.work, self.seed, self.folds, self.rows, self.faults = Path(work), seed, folds, [], []
        self.data = make_data(self.work / "data", np.random.default_rng(seed))
        self.whole = self.work / "undisturbed"
        process, self.seconds = run_job(self.job(self.whole))
        if process.code:
            raise InputError(f"the undisturbed job fails: {process.script}\n{process.said}")

    def job(self, output, workers=0):
        return job(self.data, output, self.folds, workers)

    def rng(self, part):
        return np.random.default_rng((self.seed, PARTS.index(part)))

    def fault(self, what, said=""):
        self.faults.append(f"{what}\n{said[-2000:]}".strip())
        print(f"FAULT {self.faults[-1]}", file=sys.stderr, flush=True)

    def copy(self, name):
        shutil.rmtree(self.work / name, ignore_errors=True)
        return Path(shutil.copytree(self.whole, self.work / name))

    def row(self, part, what, count, good, note=""):
        self.rows.append([part, what, str(count), str(good), note])
        print("  ".join(self.rows[-1]), flush=True)

    def kills(self, count):
        """SIGKILL, and start again, till the job is through; as many jobs as it takes. Every command is as likely to be hit,
        at any moment; a moment that a resumed command does not reach falls into the next."""
        rng, stages, jobs, same = self.rng("kills"), collections.Counter(), 0, 0
        while stages.total() < count:
            output, hit = self.work / f"job{jobs}", 0
            for moment in [*np.sort(rng.uniform(0, len(self.seconds), min(10, count - stages.total()))), math.inf]:
                process, _ = run_job(self.job(output, int(rng.integers(2))), moment, self.seconds)
                if process.code != -signal.SIGKILL:
                    break
                stages[Path(process.script).stem] += 1
                hit += 1
            jobs += 1
            if process.code:
                self.fault(f"job {jobs - 1} failed after {hit} kills: {process.script}", process.said)
            elif other := differing(output, self.whole, records=True):
                self.fault(f"job {jobs - 1} after {hit} kills has other {', '.join(other)}")
            else:
                same += 1
                shutil.rmtree(output)
            print(f"kills {stages.total()}, jobs {jobs}, equal {same}: {dict(stages)}", file=sys.stderr, flush=True)
        self.row("kills", f"SIGKILL, {jobs} jobs of {2 * self.folds} runs", stages.total(), f"{same} of {jobs} jobs equal",
                 "bit for bit; in " + ", ".join(f"{name} {n}" for name, n in stages.most_common()))

    def signals(self, count):
        """SIGTERM and SIGINT to the process group of a training."""
        rng, good, output = self.rng("signals"), 0, self.work / "signals"
        command = training(self.data, output, epochs=5000)  # more than all the signals leave time for
        for i in range(count):
            number = (signal.SIGTERM, signal.SIGINT)[i % 2]
            process, moment = Process(*command), rng.uniform(0.2, 2)
            while process.running() and cpu(process.pid) < moment:
                time.sleep(0.005)
            process.kill(number)
            process.wait(60)
            lines, last = process.said.splitlines(), output / "test_efficientnet" / "fold0" / "last.pt"
            epoch = load_checkpoint(last)["epoch"] if last.exists() else 0
            shown = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("epoch ")]
            interrupted = [line for line in lines if line.startswith("interrupted")]
            early = not lines and process.code == -number  # before the script took the signal over
            if early or (process.code == 130 and len(interrupted) == 1 and "Traceback" not in process.said
                         and epoch in (max(shown, default=epoch), max(shown, default=epoch) + 1)):
                good += 1
            else:
                name = signal.Signals(number).name
                self.fault(f"{name} after {moment:.2f} s: code {process.code}, epoch {epoch}", process.said)
        self.row("signals", "SIGTERM and Ctrl-C in a training", count, good, "a line, code 130, the finished epoch on disk")

    def ends_well(self, what, output, commands, name, setup=lambda: None):
        """Run commands over damage. 'right': through, and the result is the undisturbed one; 'refused': code 2 and a sentence
        that has `name`; None: a fault."""
        process, _ = run_job(commands, setup=setup)
        text = process.said
        if process.code == 0 and not (other := differing(output, self.whole)):
            return "right"
        if process.code == 2 and "Traceback" not in text and name in text:
            return "refused"
        self.fault(f"{what}: {process.script} code {process.code}, differs {other if process.code == 0 else ''}", text)
        return None

    def disks(self, count):
        """Damage a file of a finished job and run it again; let writes fail; then the same job on a sound disk."""
        rng, found = self.rng("disks"), collections.defaultdict(collections.Counter)
        runs = ["best.pt", "last.pt", "train.npy", "test.npy", "head.npy", "args.json", "extract.json", "log.csv"]
        readers = {"neighbours.npz": "scripts/report.py", "scores.json": "scripts/report.py", "confidence.csv": "train.py",
                   "expected.json": "scripts/classify.py", "folds.csv": None}
        caches = ["32-squash.u8", "32-squash.json"]  # of the data
        damages = {"flipped bit": flip, "cut": cut, "empty": lambda data, rng: b"", "gone": None}
        for i in range(count):
            name = [*runs, *readers, *caches][i % len([*runs, *readers, *caches])]
            damage = list(damages)[int(rng.integers(len(damages)))]
            output, (net, fold) = self.copy("disk"), (NETS[int(rng.integers(2))], int(rng.integers(self.folds)))
            run = output / net / f"fold{fold}"
            file = run / name if name in runs else self.data / ".cache" / name if name in caches else output / name
            before = file.read_bytes()
            if name in caches:
                shutil.rmtree(run)  # it is trained and extracted anew
            if damage == "gone":
                file.unlink()
            else:
                file.write_bytes(damages[damage](before, rng))
            what, end = f"{damage} {name} ({i})", 2 * self.folds
            commands = [training(self.data, output, net, fold, 0), *self.job(output)[end:end + 3]]
            if reader := readers.get(name):
                self.read_damaged(what, reader, output, name, found[damage])
            end = self.ends_well(what, output, commands, name)
            if end == "refused":  # do as it says
                file.unlink(missing_ok=True)
                end = "refused, then right" if self.ends_well(f"{what}, deleted", output, commands, "\0") else None
            found[damage][end] += 1
            if name in caches:
                file.write_bytes(before)
        for damage, ends in found.items():
            self.row("disks", f"files {damage}", ends.total(), ends.total() - ends[None],
                     ", ".join(f"{end} {n}" for end, n in ends.most_common() if end))
        self.full_disks(rng, max(4, count // 5))

    def read_damaged(self, what, script, output, name, found):
        """The later readers of a damaged result, alone: a sentence that names the file, or none is needed."""
        where = ["--input", self.data, "--output", output]
        if script == "train.py":
            pseudo = ["--pseudo", output / name, "--pseudo-min", 0, "--restart"]
            command = [*training(self.data, self.work / "pseudo", workers=0, epochs=1), *pseudo]
        else:
            command = [script, *([self.data / "test"] if "classify" in script else []), *where]
        process = Process(*map(str, command)).wait()
        if process.code == 2 and name in process.said and "Traceback" not in process.said:
            found["reader refused"] += 1
        elif process.code == 0:
            found["reader unmoved"] += 1
        else:
            self.fault(f"{what} read by {script}: code {process.code}", process.said)

    def full_disks(self, rng, count):
        """Writes beyond a size fail (RLIMIT_FSIZE); a full, then read-only tmpfs where it can be mounted."""
        ends = collections.Counter()
        for _ in range(count):
            output, limit = self.work / "limited", int(2 ** rng.uniform(6, 21))
            shutil.rmtree(output, ignore_errors=True)

            def setup(limit=limit):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            commands = self.job(output)
            end = self.ends_well(f"no file beyond {limit} bytes", output, commands, str(output), setup)
            if end == "refused":
                end = "refused, then right" if self.ends_well("on a sound disk again", output, commands, "\0") else None
            ends[end] += 1
        said = ", ".join(f"{end} {n}" for end, n in ends.items())
        self.row("disks", "no file beyond 64 B .. 2 MB", count, count - ends[None], said)
        mount, ends = self.work / "mount", collections.Counter()
        mount.mkdir()
        for megabytes in (0.1, 0.5, 1, 3, 8):
            size = f"size={int(megabytes * 1024)}k"
            if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mount], capture_output=True).returncode:
                self.row("disks", "full and read-only disk", 0, 0, "not run: mounting is not allowed here")
                return
            try:
                output = mount / "o"
                end = self.ends_well(f"disk of {megabytes} MB", output, self.job(output), str(output))
                subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
                read_only = self.ends_well("read-only disk", output, self.job(output), str(output))
                subprocess.run(["mount", "-o", "remount,rw,size=200m", mount], check=True)
                ends[end and read_only and self.ends_well("a larger disk", output, self.job(output), "\0")] += 1
            finally:
                subprocess.run(["umount", mount], check=True)
        self.row("disks", "full, read-only, then larger disk", ends.total(), ends["right"], "refused twice, then right")

    def input(self, count):
        """Mutated inputs, many a process; and every fiftieth once more through the real script."""
        seeds = [(self.seed, PARTS.index("input"), i) for i in range(count)]
        cases = Cases(self.work / "input", self.whole, self.data)
        ends, worst = collections.defaultdict(collections.Counter), collections.defaultdict(float)
        at = 0
        while at < count:
            at = self.watch(cases, seeds, at, ends, worst)
        for kind, said in sorted(ends.items()):
            self.row("input", kind, said.total(), said.total() - said["fault"],
                     f"refused {said['refused']}, accepted {said['accepted']}")
        self.row("input", "all", sum(e.total() for e in ends.values()), sum(e.total() - e["fault"] for e in ends.values()),
                 f"slowest {worst['seconds']:.1f} s, most memory {worst['memory'] / 2**20:.0f} MiB above the start")
        self.scripts(max(4, count // 50))

    def watch(self, cases, seeds, at, ends, worst):
        """Run cases from number `at` on in a child, under a clock and a memory limit. Returns the number to go on from."""
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            with os.fdopen(into, "w") as file:
                for seed in seeds[at:]:
                    Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory begins anew
                    begun, start = memory(os.getpid()), time.process_time()
                    kind, end, said = cases.run(seed)
                    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
                    grown = int(peak.split()[1]) * 1024 - begun
                    print(json.dumps([kind, end, said[-700:], time.process_time() - start, grown]), file=file, flush=True)
            os._exit(0)
        os.close(into)
        start, spent, begun, buffer = time.time(), cpu(pid), memory(pid), b""
        os.set_blocking(out, False)
        while True:
            ended = os.waitpid(pid, os.WNOHANG)[0]  # before its last words are read
            with contextlib.suppress(BlockingIOError):
                buffer += os.read(out, 2**16)
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                kind, end, said, seconds, grown = json.loads(line)
                worst["seconds"], worst["memory"] = max(worst["seconds"], seconds), max(worst["memory"], grown)
                if end == "fault" or seconds > SECONDS or grown > MEMORY:
                    self.fault(f"input {at} ({kind}): {seconds:.1f} s, {grown / 2**20:.0f} MiB", said)
                    end = "fault"
                ends[kind][end] += 1
                at += 1
                start, spent, begun = time.time(), cpu(pid), memory(pid)
            if ended:
                os.close(out)
                if at < len(seeds):
                    self.fault(f"input {at}: the process died, or was ended at {SECONDS} s or {MEMORY / 2**30:.0f} GiB")
                    ends["died"]["fault"] += 1
                return at + 1
            if cpu(pid) - spent > SECONDS or time.time() - start > 12 * SECONDS or memory(pid) - begun > MEMORY:
                os.kill(pid, signal.SIGKILL)  # it computes, waits or grows for ever
            time.sleep(0.005)

    def scripts(self, count):
        """Mutated training data through train.py itself: code 0 or 2, no traceback."""
        good, codes = 0, collections.Counter()
        for i in range(count):
            rng, folder = np.random.default_rng((self.seed, 99, i)), self.work / "hostile"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.data, folder / "d")
            name = ["train.csv", "train/0_0.png", "sample_submission.csv", "test/1_1.png"][i % 4]
            file = folder / "d" / name
            file.write_bytes(mutate(file.read_bytes(), rng))
            flags = ["--skip-bad-images"] if rng.integers(2) else []
            process = Process(*training(folder / "d", folder / "o", workers=0, epochs=1), *flags).wait(600)
            codes[process.code] += 1
            if process.code in (0, 2) and "Traceback" not in process.said:
                good += 1
            else:
                self.fault(f"train.py on mutated {name} ({i}): code {process.code}", process.said)
        self.row("input", "through train.py", count, good, ", ".join(f"code {c}: {n}" for c, n in codes.items()))

    def health(self, epochs, times):
        """Memory and descriptors of a long training, and what SIGKILL leaves."""
        data, images = self.work / "long", 400 * times
        made = Process("scripts/make_demo.py", data, "--classes", 20, "--train-per-class", 20 * times, "--test-per-class", 1)
        if made.wait(3600).code:
            raise InputError(f"make_demo.py fails: {made.said}")
        process = Process(*training(data, self.work / "health", epochs=epochs, size=96, batch=32))
        log, seen, start = self.work / "health" / NETS[0] / "fold0" / "log.csv", [], time.time()
        while process.running():
            with contextlib.suppress(OSError):
                done = len(log.read_text().splitlines()) - 1 if log.exists() else 0
                used = memory(process.pid), sum(map(memory, children(process.pid))), len(names(f"/proc/{process.pid}/fd"))
                seen.append((time.time() - start, done, *used))
            time.sleep(0.5)
        process.wait()
        seen = pd.DataFrame(seen, columns=["seconds", "epochs done", "memory", "memory of its processes", "descriptors"])
        seen.to_csv(self.work / "health.csv", index=False)
        draw(seen, self.work / "health.png", f"{epochs} epochs of {images} images")
        most = seen.groupby("epochs done")[["memory", "memory of its processes", "descriptors"]].max()
        early, late = most.iloc[len(most) // 5], most.iloc[-2]  # the last has but the end
        flat = process.code == 0 and (late <= early * 1.05 + 2**23 * (late > 2**20)).all()
        if not flat:
            self.fault(f"health: by epoch\n{most}", process.said)
        said = ", ".join(f"{name} {a / 2**20:.0f} and {b / 2**20:.0f} MiB" if a > 2**20 else f"{name} {a:.0f} and {b:.0f}"
                         for name, a, b in zip(most, early, late, strict=True))
        self.row("health", f"{epochs} epochs of {images} images", epochs, epochs if flat else 0,
                 f"most in epochs {most.index[len(most) // 5] + 1} and {most.index[-2] + 1}: {said}")
        left = 0
        for _ in range(5):
            process = Process(*training(self.data, self.work / "orphans", epochs=5000))
            while process.running() and not (workers := children(process.pid)):
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGKILL)  # it alone: its workers must see that it is gone
            end = time.time() + 60
            while any(Path(f"/proc/{w}").exists() for w in workers) and time.time() < end:
                time.sleep(0.1)
            mine = [name for name in names("/dev/shm") if any(f"_{pid}_" in name for pid in (process.pid, *workers))]
            left += sum(Path(f"/proc/{w}").exists() for w in workers) + len(mine)
            process.wait()
        if left:
            self.fault(f"health: {left} workers or shared memory files left after SIGKILL")
        self.row("health", "SIGKILL of the main process alone", 5, 5 if not left else 0, "no worker, nothing in /dev/shm left")


def draw(seen, path, title):
    """Memory over time as a picture, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure((8, 2.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name in ("memory", "memory of its processes"):
        axes.plot(seen["seconds"], seen[name] / 2**20, label={"memory": "train.py"}.get(name, "its loader processes"))
    axes.plot([], [], " ", label=f"file descriptors: {seen['descriptors'].min()} to {seen['descriptors'].max()}")
    axes.set(title=title, xlabel="seconds", ylabel="MiB resident", xlim=(0, None),
             ylim=(0, 1.3 * seen.filter(like="memory").to_numpy().max() / 2**20))
    axes.legend(loc="upper center", ncols=3)
    figure.savefig(path)


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def children(pid):
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def cpu(pid):
    """Seconds of CPU time of a process: limits and moments in it do not depend on who else uses the machine."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory(pid):
    """Resident bytes of a process, 0 when it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def main():
    args = parse_args()
    work = Path(args.work or tempfile.mkdtemp(prefix="torture"))
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise InputError(f"--work {work} is not empty; name another")
    campaign = Campaign(work, args.seed, args.folds)
    print(f"the undisturbed job takes {sum(campaign.seconds):.1f} s of CPU time", flush=True)
    counts = {"kills": [args.kills], "signals": [args.signals], "disks": [args.disks], "input": [args.inputs],
              "health": [args.health_epochs, args.health_times]}
    for part in args.parts:
        getattr(campaign, part)(*counts[part])
    text = summary.table(campaign.rows, ["part", "what", "number", "as it should", "how"])
    save_text(work / "torture.md", f"seed {args.seed}\n\n{text}\n")
    print("\n" + text)
    if campaign.faults:
        raise InputError(f"{len(campaign.faults)} faults, see above; {work} is kept")
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    run(main)
