#!/usr/bin/env python3
"""What a GPU plan promises, looked at on the GPU that is here, with the tools as a user runs them.

  python3 bench/gpu.py [--bin build/bin] [--work DIR] [--out FILE.jsonl] [--seconds N] [CHECK ...]

  tests      cuda_conformance_test, cuda_training_test and parity_test on the device, with the figures that they print
  prepare    corpora and plans of cold, measure, drift and fit, side by side
  cold       first step of each model of the zoo: plan compiled, kernels cached; without and with timed algorithms kept
  measure    `mtrun --measure` of the plans of the zoo's large models; the device's total beside arena and planned context
  drift      10,000 steps of a small model: allocations, and bytes of device and process
  fit        the batch that `mtc fit` names runs where a ballast leaves just that memory, one more does not
  errors     what is wrong with the machine, the plan or the cache: one line each, with its exit code
  resume     runs killed with SIGKILL go on and end with the bits of one that was not; on the CPU within a tolerance
  generate   trains, and goes on with a text as the CPU does from the same weights; compute-sanitizer's memcheck over it
  sanitize   compute-sanitizer's tools over cuda_conformance_test, each buffer in memory of its own

Without CHECK all but sanitize. A JSON line for each result, first one for the machine; exit code 1 where one is not ok.
--seconds: nothing is begun after so long. Needs no package: the driver is called through ctypes.
"""
import argparse
import concurrent.futures
import ctypes
import datetime
import glob
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

SMALL = "bf16,flash,chunked_loss,pad_vocab,fuse,remat"
TINY = ["--set", "layers=2,dropout=0.1", "--batch", "8", "--seq", "64"]
# model and the vocabulary of a corpus for it; 0: characters
ZOO = {"tiny_char": 0, "chatgot_tiny": 0, "chatgot_85m": 0, "lab4": 10000, "so_small": 50257, "gpt2_124m": 50257,
       "gpt2_wide32k": 32000, "llama_160m": 32000}
TABLE = [("gpt2_wide32k", 125, 256), ("gpt2_124m", 64, 1024), ("lab4", 64, 512), ("lab4", 128, 256), ("so_small", 64, 256)]
FIT = [("lab4", 512, "4GiB"), ("gpt2_124m", 1024, "12GiB"), ("gpt2_wide32k", 256, "6GiB")]


class Driver:
    """The few calls of the CUDA driver that a ballast needs."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.must("cuInit", 0)
        self.must("cuDeviceGet", ctypes.byref(device), 0)
        self.must("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.must("cuCtxSetCurrent", self.context)

    def must(self, name, *arguments):
        code = getattr(self.cuda, name)(*arguments)
        if code != 0:
            sys.exit(f"error: {name}: CUDA error {code}")

    def free(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.must("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size):
        return self.cuda.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(size))


def hold(leave):
    """A process that leaves so many bytes of the device free, until its input ends."""
    driver = Driver()
    for piece in (64 << 20, 2 << 20):
        while driver.free() - piece >= leave:
            amount = (driver.free() - leave) // piece * piece
            if driver.allocate(amount) != 0:
                break
    print(driver.free(), flush=True)
    sys.stdin.read()


def ask(size):
    """Prints 0 where the device gives so many bytes in one piece, else the driver's error."""
    print(Driver().allocate(size), flush=True)


class Ballast:
    def __init__(self, leave):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--hold", str(leave)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.free = int(self.process.stdout.readline() or -1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def tokenizer(vocabulary):
    """A byte tokenizer of so many tokens, all but the bytes never met: a corpus of any vocabulary."""
    bytes_ = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    characters = bytes_ + [256 + i for i in range(256 - len(bytes_))]
    tokens = {chr(c): i for i, c in enumerate(sorted(characters))}
    tokens.update({f"unmet{i}": i for i in range(256, vocabulary - 1)})
    end = {"id": vocabulary - 1, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}
    tokens[end["content"]] = end["id"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": tokens, "merges": []}}


class Checks:
    def __init__(self, args):
        self.bin, self.work, self.out = os.path.abspath(args.bin), os.path.abspath(args.work), args.out
        self.deadline = time.monotonic() + args.seconds
        self.failed = 0
        self.filter, self.shards, self.tools = args.filter, args.shards, args.tools.split(",")
        self.only = args.models.split(",") if args.models else None
        os.makedirs(self.work, exist_ok=True)

    def note(self, check, ok=True, **values):
        line = {"check": check, **values, "ok": ok}
        print(json.dumps(line), flush=True)
        if self.out:
            with open(self.out, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.failed += not ok

    def late(self, what):
        if time.monotonic() < self.deadline:
            return False
        print(f"left out, the time is over: {what}", file=sys.stderr, flush=True)
        return True

    def run(self, command, **environment):
        """command: words. Returns exit code, output, errors, seconds."""
        start = time.monotonic()
        done = subprocess.run([os.path.join(self.bin, command[0]), *map(str, command[1:])], capture_output=True, text=True,
                              cwd=self.work, env=dict(os.environ, **environment), errors="replace")
        return done.returncode, done.stdout, done.stderr, time.monotonic() - start

    def must(self, command, **environment):
        code, out, err, seconds = self.run(command, **environment)
        if code != 0:
            sys.exit(f"error: {' '.join(map(str, command))}: exit code {code}: {err.strip()[-500:]}")
        return out, seconds

    def path(self, name):
        return os.path.join(self.work, name)

    def corpus(self, vocabulary):
        """A corpus of made-up sentences with this vocabulary; 0: one of characters."""
        folder = self.path(f"corpus{vocabulary}")
        if os.path.exists(os.path.join(folder, "manifest.json")):
            return folder
        if not os.path.exists(self.path("text")):
            words = "river stone light winter garden letter window silent morning paper answer water".split()
            chance = random.Random(1)
            with open(self.path("text"), "w") as file:
                for _ in range(9000):
                    file.write("\n".join(" ".join(chance.choice(words) for _ in range(8)) + "." for _ in range(4)) + "\n\n")
        kind = "char"
        if vocabulary:
            kind = self.path(f"tokenizer{vocabulary}.json")
            with open(kind, "w") as file:
                json.dump(tokenizer(vocabulary), file)
        self.must(["mtcorpus", "prep", "--input", "text", "--out", folder, "--tokenizer", kind, "--split", "98,1,1"])
        return folder

    def plan(self, name, spec, vocabulary, passes="default", target="cuda", *more, **environment):
        """Path of the plan NAME, compiled if it is not there."""
        path = self.path(name + ".plan")
        if not os.path.exists(path):
            self.must(["mtc", "compile", spec, "--data", self.corpus(vocabulary), "--passes", passes, "--target", target,
                       *more, "-o", path], **environment)
        return path

    def plans(self, jobs):
        """Compiles side by side."""
        for vocabulary in {job[2] for job in jobs}:
            self.corpus(vocabulary)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            return list(pool.map(lambda job: self.plan(*job), jobs))

    def json(self, *parts):
        with open(os.path.join(self.work, *parts)) as file:
            return json.load(file)

    def machine(self):
        plan = self.plan("small", "tiny_char", 0, "default", "cuda", *TINY)
        self.must(["mtrun", plan, "--data", self.corpus(0), "--steps", 1, "--out", "first", "--fresh"])
        summary = self.json("first", "summary.json")
        self.note("machine", date=datetime.date.today().isoformat(), hardware=summary["hardware"], versions=summary["versions"])

    # -- the checks --

    def tests(self):
        for command in (["cuda_conformance_test"], ["cuda_conformance_matmuls_test"], ["cuda_training_test"],
                        ["parity_test", "--target", "cuda"]):
            if self.late(command[0]) or not os.path.exists(os.path.join(self.bin, command[0])):
                continue
            code, out, _, seconds = self.run(command)
            count = {word: re.findall(rf"^\[ +{word} +\] (\S+) \(\d+ ms\)$", out, re.M) for word in ("OK", "FAILED", "SKIPPED")}
            self.note("test", code == 0 and bool(count["OK"]), name=" ".join(command), exit_code=code, passed=len(count["OK"]),
                      skipped=len(count["SKIPPED"]), failed=count["FAILED"], seconds=round(seconds, 1))
            for line in out.splitlines():
                if line.startswith("{"):
                    line = json.loads(line)
                    self.note(line.pop("check"), code == 0, **line)

    def cold_jobs(self):
        return [(f"{m}.cold", m, ZOO[m]) for m in ZOO if not self.only or m in self.only]

    def measure_jobs(self):
        return [(f"{m}.{b}x{t}.{name}", m, ZOO[m], passes, "cuda", "--batch", b, "--seq", t)
                for name, passes in (("fast", "default"), ("small", SMALL), ("small8bit", SMALL + ",adamw8bit"))
                for m, b, t in TABLE if not self.only or m in self.only]

    def drift_jobs(self):
        return [("drift." + name, "tiny_char", 0, passes, "cuda", "--set", "dropout=0.1", "--batch", "16", "--seq", "32")
                for name, passes in (("default", "default"), ("fp16", "fp16,flash,chunked_loss,fuse,remat,accumulate:2"))]

    def fit_row(self, model, sequence, memory):
        rows = json.loads(self.must(["mtc", "fit", model, "--memory", memory, "--seq", sequence, "--target", "cuda", "--passes",
                                     "default", "--json"])[0])["rows"]
        return next(row for row in rows if row["of"] == "batch")

    def fit_jobs(self, model, sequence, batch):
        return [(f"{model}.fit{more}", model, ZOO[model], "default", "cuda", "--batch", batch + more, "--seq", sequence)
                for more in (0, 1)]

    def prepare(self):
        jobs = self.drift_jobs() + self.cold_jobs() + self.measure_jobs()
        for model, sequence, memory in FIT:
            if not self.only or model in self.only:
                jobs += self.fit_jobs(model, sequence, self.fit_row(model, sequence, memory)["batch"])
        start = time.monotonic()
        self.plans(jobs)
        self.note("prepare", plans=len(jobs), seconds=round(time.monotonic() - start, 1))

    def cold(self):
        models = [job[1] for job in self.cold_jobs()]
        for model, plan in zip(models, self.plans(self.cold_jobs())):
            if self.late(f"cold {model}"):
                return
            kept = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "mt")
            cache = self.path("cache." + model)  # The kernels that are kept, and no algorithm.
            os.makedirs(cache + "/mt", exist_ok=True)
            if os.path.isdir(kept + "/cubins") and not os.path.exists(cache + "/mt/cubins"):
                shutil.copytree(kept + "/cubins", cache + "/mt/cubins")
            seconds = []
            for _ in range(2):
                out, whole = self.must(["mtrun", plan, "--data", self.corpus(ZOO[model]), "--steps", 1], XDG_CACHE_HOME=cache)
                found = re.search(r"after ([\d.]+) s: ([\d.]+) loading, ([\d.]+) weights, ([\d.]+) the step", out)
                seconds.append([float(x) for x in found.groups()] if found else [whole, -1, -1, -1])
            keys = ("first_step_seconds", "loading_seconds", "weights_seconds", "step_seconds")
            self.note("cold start", seconds[1][0] < 3, model=model, algorithms_not_kept=dict(zip(keys, seconds[0])),
                      algorithms_kept=dict(zip(keys, seconds[1])), process_with_evaluation_seconds=round(whole, 2), goal_seconds=3)

    def measure(self):
        jobs = self.measure_jobs()
        plans = self.plans(jobs)
        totals = {}
        for job, plan in zip(jobs, plans):  # One after another: the driver's figure is the whole device's.
            out, _ = self.must(["mtrun", plan, "--data", self.corpus(job[2]), "--steps", 2, "--out", job[0] + ".run", "--fresh"])
            context = round(float(re.search(r"beside the arena \(([\d.]+) MiB planned", out).group(1)) * (1 << 20))
            totals[job[0]] = self.json(job[0] + ".run", "memory.json")["process_bytes"], context

        def one(job, plan):
            if self.late(f"measure {job[0]}"):
                return
            start = time.monotonic()
            folder = job[0] + ".measured"
            self.must(["mtrun", plan, "--data", self.corpus(job[2]), "--steps", 1, "--measure", "--out", folder, "--fresh"])
            memory = self.json(folder, "memory.json")
            planned, (total, context) = memory["planned"]["arena_bytes"], totals[job[0]]
            allowed = max((planned + context) // 200, 64 << 20)
            by_phase = {phase: {"planned_written_bytes": written["written_bytes"],
                                "measured_written_bytes": memory["measured"]["by_phase"][phase]["written_bytes"]}
                        for phase, written in memory["planned"]["by_phase"].items()}
            self.note("measure", memory["agree"] and memory["same_over_poisons"] and abs(total - planned - context) <= allowed,
                      model=job[1], shape=f"{job[6]}x{job[8]}", plan=job[0].split(".")[-1], passes=job[3],
                      planned_arena_bytes=planned, measured_arena_bytes=memory["measured"]["arena_bytes"],
                      idle_workspace_bytes=memory["idle_workspace_bytes"], **by_phase, differences=memory["differences"],
                      same_bits_over_two_poisons=memory["same_over_poisons"], planned_context_bytes=context, device_bytes=total,
                      device_minus_planned_bytes=total - planned - context, allowed_bytes=allowed,
                      allocations_in_step=memory["allocations_after_load"], seconds=round(time.monotonic() - start, 1))

        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            list(pool.map(one, jobs, plans))

    def drift(self):
        for job, plan in zip(self.drift_jobs(), self.plans(self.drift_jobs())):
            if self.late(job[0]):
                return
            found = {}
            for steps in (1000, 10000):
                folder = f"{job[0]}.{steps}.run"
                self.must(["mtrun", plan, "--data", self.corpus(0), "--steps", steps, "--lr", "1e-3", "--out", folder, "--fresh",
                           "--log-every", 5000])
                summary = found[steps] = self.json(folder, "summary.json")
            short, drift = found[1000]["drift"], summary["drift"]
            # What the first steps leave in the process does not grow.
            ok = drift["allocations"] == 0 and drift["device_bytes"] == 0 and drift["process_bytes"] <= max(0, short["process_bytes"])
            self.note("drift", ok, model="tiny_char", passes=summary["passes"], steps=summary["steps"],
                      skipped_steps=summary["skipped_steps"], seconds=round(summary["seconds"], 2), **drift,
                      process_bytes_after_1000_steps=short["process_bytes"])

    def fit(self):
        for model, sequence, memory in FIT:
            if self.late(f"fit {model}"):
                return
            if self.only and model not in self.only:
                continue
            row = self.fit_row(model, sequence, memory)
            # The least memory for which that is the answer: then the next batch lacks nearly a whole sequence.
            vocabulary, limit = ZOO[model], -(-row["needs_bytes"] >> 20) << 20
            row = self.fit_row(model, sequence, f"{limit >> 20}MiB")
            fits, beyond = self.plans(self.fit_jobs(model, sequence, row["batch"]))
            arena = int(re.search(r"arena .*?\((\d[\d,]*) bytes", self.must(["mtc", "inspect", beyond])[0]).group(1).replace(",", ""))
            with Ballast(limit) as ballast:
                train = ["--data", self.corpus(vocabulary), "--steps", 3, "--fresh"]
                code, _, err, _ = self.run(["mtrun", fits, *train, "--out", model + ".fits"])
                code_beyond, _, err_beyond, _ = self.run(["mtrun", beyond, *train, "--out", model + ".beyond"])
                # The check left out: does the device really have no such piece, with only a context beside it?
                forced = subprocess.run([sys.executable, os.path.abspath(__file__), "--ask", str(arena)], capture_output=True,
                                        text=True).stdout.strip()
            used = self.json(model + ".fits", "memory.json")["process_bytes"] if code == 0 else None
            self.note("fit", code == 0 and code_beyond == 3, model=model, sequence=sequence, memory_bytes=limit,
                      free_beside_ballast_bytes=ballast.free, batch=row["batch"], needs_bytes=row["needs_bytes"], device_bytes=used,
                      exit_code=code, error=err.strip(), next_batch=row["batch"] + 1,
                      next_needs_bytes=row["next"]["needs_bytes"], next_exit_code=code_beyond, next_error=err_beyond.strip(),
                      next_arena_asked_of_the_driver=forced)

    def errors(self):
        corpus, small = self.corpus(0), self.plan("small", "tiny_char", 0, "default", "cuda", *TINY)
        own = re.search(r"for cuda:sm_(\d+)", self.must(["mtrun", small, "--dry-run"])[0]).group(1)
        run = ["mtrun", small, "--data", corpus, "--steps", 2]

        def hidden(*libraries):  # Where dlopen finds these first, and no library in them.
            folder = self.path("hidden." + ".".join(libraries))
            os.makedirs(folder, exist_ok=True)
            for library in libraries:
                open(os.path.join(folder, library), "w").close()
            return {"LD_LIBRARY_PATH": folder + ":" + os.environ.get("LD_LIBRARY_PATH", "")}

        def case(name, command, code, *patterns, lines=1, **environment):
            if self.late(f"errors {name}"):
                return
            got, _, err, _ = self.run(command, **environment)
            ok = got == code and len(err.splitlines()) == lines and all(re.search(p, err) for p in patterns)
            self.note("error", ok, what=name, command=" ".join(map(str, command)).replace(self.work + "/", ""), exit_code=got,
                      expected_exit_code=code, message=err.strip().replace(self.work + "/", ""))

        case("no driver", run, 4, "^error: .*no CUDA driver", **hidden("libcuda.so.1"))
        case("a driver and no device", run, 4, "^error: .*no .*device", CUDA_VISIBLE_DEVICES="")
        case("no such device", run + ["--device", 99], 2, "^error: .*device 99 does not exist")
        case("no cuBLASLt", run, 4, "^error: .*cublasLt", **hidden("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"))
        none = hidden("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
        for sm in (75, 80, 86, 89, 90, 100, 120):
            if str(sm) == own:
                continue
            passes = "fp16,flash,fuse" if sm == 75 else "default"
            plan = self.plan(f"small.sm_{sm}", "tiny_char", 0, passes, f"cuda:sm_{sm}", *TINY, **none)  # Sources: quickly compiled.
            older = int(own) < sm
            case(f"a plan for sm_{sm}" + (", newer than the device" if older else ", another architecture"),
                 ["mtrun", plan, *run[2:]], 4, f"^error: .*cuda:sm_{sm}", f"--target cuda:sm_{own}", *(["older"] if older else []))
        with Ballast(1 << 30) as ballast:
            large = self.plan("gpt2_wide32k.125x256.fast", "gpt2_wide32k", ZOO["gpt2_wide32k"], "default", "cuda", "--batch", 125,
                              "--seq", 256)
            command = ["mtrun", large, "--data", self.corpus(ZOO["gpt2_wide32k"]), "--steps", 2]
            case("too little free memory", command, 3, "^error: .*needs an arena", "free of", "short", "held by",
                 str(ballast.process.pid))
            case("too little free memory, between guards", command + ["--debug-arena", "guard"], 3, "^error: .*share nothing")
        case("too little free memory at compile time", ["mtc", "compile", "gpt2_wide32k", "--target", "cuda", "--batch", 125,
                                                         "--passes", "default", "--memory", "2GiB", "-o", self.path("no.plan")], 3,
             "^error: plan does not fit", "what would fit", lines=9)
        with open(small, "rb") as file:
            good = file.read()
        kernel = [m.start() for m in re.finditer(b"\x7fELF", good)]
        damaged = bytearray(good)
        damaged[kernel[len(kernel) // 2] + 2000] ^= 1
        for name, content in (("a flipped bit in a kernel", bytes(damaged)), ("half of a plan", good[:len(good) // 2])):
            with open(self.path("damaged.plan"), "wb") as file:
                file.write(content)
            case(name, ["mtrun", self.path("damaged.plan"), *run[2:]], 4, "^error: ")
        open(self.path("file"), "w").close()
        case("a cache that cannot be written, mtrun", run, 0, "^warning: .*file/mt", XDG_CACHE_HOME=self.path("file"))
        case("a cache that cannot be written, mtc", ["mtc", "compile", "tiny_char", "--target", "cuda", "-o", self.path("no.plan")], 0,
             "^warning: .*file/mt", XDG_CACHE_HOME=self.path("file"))
        sources = self.path("sources.plan")
        if "hold kernels" in self.run(["mtc", "doctor"], **none)[1]:
            print("left out: no NVRTC; it lies where it cannot be hidden", file=sys.stderr, flush=True)
        else:
            case("no NVRTC, mtc", ["mtc", "compile", "tiny_char", "--data", corpus, "--target", "cuda", *TINY, "-o", sources], 0,
                 "^warning: .*NVRTC", XDG_CACHE_HOME=self.path("empty"), **none)
            case("no NVRTC, mtrun of sources", ["mtrun", sources, *run[2:]], 4, "^error: .*NVRTC",
                 XDG_CACHE_HOME=self.path("empty"), **none)
            case("sources, with NVRTC", ["mtrun", sources, *run[2:]], 0, lines=0)
        case("bf16 for sm_75", ["mtc", "compile", "tiny_char", "--target", "cuda:sm_75", "--passes", "bf16"], 2, "^error: .*fp16")
        case("a target that is not there", ["mtc", "compile", "tiny_char", "--target", "cuda:sm_70"], 2, "^error: .*cuda:sm_120")

    def losses(self, folder):
        losses = {}
        with open(os.path.join(self.work, folder, "metrics.jsonl")) as file:
            for line in file:
                line = json.loads(line)
                if "loss" in line:
                    losses[line["step"]] = line["loss"]
        return losses

    def hash(self, folder):
        """Of the final weights and of every tensor of the newest checkpoint."""
        digest = hashlib.sha256()
        newest = max(glob.glob(self.path(folder) + "/step-*"), key=lambda p: int(p.rsplit("-", 1)[1]))
        for path in sorted([self.path(folder) + "/model.safetensors", *glob.glob(newest + "/*.safetensors")]):
            with open(path, "rb") as file:
                digest.update(os.path.basename(path).encode() + file.read())
        return digest.hexdigest()[:16]

    def killed(self, name, passes, more, steps, save, kills):
        """The same run, once undisturbed and once killed after these steps, each time to go on."""
        plan = self.plan("resume." + name, "tiny_char", 0, passes, "cuda", *more)
        command = ["mtrun", plan, "--data", self.corpus(0), "--steps", steps, "--save-every", save, "--log-every", 1000, "--lr", "1e-3"]
        whole, broken = f"resume.{name}.whole", f"resume.{name}.killed"
        for folder in (whole, broken):
            shutil.rmtree(self.path(folder), ignore_errors=True)
        self.must(command + ["--out", whole])
        went_on, deaths = [], []
        for kill in [*kills, None]:
            process = subprocess.Popen([os.path.join(self.bin, command[0]), *map(str, command[1:]), "--out", broken], cwd=self.work,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while kill is not None and process.poll() is None:
                try:
                    with open(self.path(broken) + "/metrics.jsonl") as file:
                        if sum(1 for _ in file) >= kill:
                            process.send_signal(signal.SIGKILL)
                except FileNotFoundError:
                    pass
                time.sleep(0.002)
            out, err = process.communicate()
            deaths.append(process.returncode)
            went_on += [int(s) for s in re.findall(r"goes on from \S+, step (\d+)", out)]
        summary = self.json(whole, "summary.json")
        skipped = [summary["skipped_steps"], self.json(broken, "summary.json")["skipped_steps"]] if deaths[-1] == 0 else None
        same = deaths[-1] == 0 and self.hash(whole) == self.hash(broken) and self.losses(whole) == self.losses(broken)
        ok = same and deaths == [-signal.SIGKILL] * len(kills) + [0] and len(went_on) == len(kills)
        if "fp16" in passes:
            ok = ok and 0 < skipped[0] == skipped[1]
        self.note("resume", ok, config=name, passes=summary["passes"], steps=steps, saved_every=save, killed_after_steps=kills,
                  went_on_from=went_on, exit_codes=deaths, skipped_steps=skipped, same_losses_and_bits=same, hash=self.hash(whole),
                  error=err.strip())

    def resume(self):
        large_gradients = ["--set", "layers=4,dropout=0.1,init_stddev=0.5", "--batch", "8", "--seq", "64"]
        cases = [("bf16", "default", TINY), ("fp16", "fp16,flash,fuse", large_gradients),
                 ("adamw8bit", "bf16,flash,adamw8bit,fuse", TINY), ("accumulate", "bf16,flash,accumulate:2,fuse,remat", TINY),
                 ("f32", "flash,chunked_loss,fuse", TINY)]
        self.plans([("resume." + name, "tiny_char", 0, passes, "cuda", *more) for name, passes, more in cases])
        with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
            list(pool.map(lambda c: self.killed(*c, 4000, 400, [900, 2600]), cases))
        # From the GPU's checkpoint on, on the CPU.
        if self.late("resume on the CPU"):
            return
        for name, passes, more, tolerance in (("f32", "flash,chunked_loss,fuse", TINY, 1e-4), ("bf16", "default", TINY, 1e-2)):
            on_cpu = self.plan("resume.cpu." + name, "tiny_char", 0, passes, "cpu", *more)
            on_gpu = self.plan("resume." + name, "tiny_char", 0, passes, "cuda", *more)
            common = ["--data", self.corpus(0), "--save-every", 100, "--log-every", 1000, "--lr", "1e-3", "--schedule", "constant"]
            first, there, here = (f"resume.{name}.{x}" for x in ("first", "gpu", "cpu"))
            self.must(["mtrun", on_gpu, *common, "--steps", 100, "--out", first, "--fresh"])
            self.must(["mtrun", on_gpu, *common, "--steps", 150, "--out", there, "--fresh", "--resume", first])
            code, _, err, _ = self.run(["mtrun", on_cpu, *common, "--steps", 100, "--out", first])
            out = self.run(["mtrun", on_cpu, *common, "--steps", 150, "--out", here, "--fresh", "--resume", first])
            a, b = self.losses(there), self.losses(here)
            worst = max((abs(a[s] - b[s]) / a[s] for s in a if s in b), default=-1)
            self.note("resume on the CPU", out[0] == 0 and code == 2 and 0 <= worst <= tolerance and len(b) == 50, config=name,
                      same_folder_exit_code=code, same_folder_message=err.strip(), exit_code=out[0],
                      says=[line for line in (out[2] + out[1]).splitlines() if "goes on" in line or line.startswith(("warning", "note"))],
                      steps_compared=len(b), worst_relative_difference=worst, tolerance=tolerance)

    def generate(self):
        cases = {"gpt2": ("tiny_char", ["--set", "layers=2", "--batch", "8", "--seq", "128"]),
                 "llama": ("llama_160m", ["--set", "layers=2,width=256,heads=8,kv_heads=2,ffn_width=512", "--batch", "8", "--seq", "128"])}
        plans = {(name, target): self.plan(f"generate.{name}.{target}", spec, 0, "flash:window=40,chunked_loss,fuse", target, *more)
                 for name, (spec, more) in cases.items() for target in ("cuda", "cpu")}
        for name in cases:
            if self.late(f"generate {name}"):
                return
            train = f"generate.{name}.run"
            self.must(["mtrun", plans[name, "cuda"], "--data", self.corpus(0), "--steps", 300, "--lr", "3e-3", "--out", train, "--fresh",
                       "--log-every", 1000])

            def text(target, *more):
                return ["mtrun", plans[name, target], "--data", self.corpus(0), "--init", train, "--generate", "the river ", *more]
            greedy, drawn = ["--temperature", 0, "--max-new-tokens", 100], ["--top-k", 5, "--seed", 3, "--max-new-tokens", 100]
            texts = [[self.must(text(target, *options))[0] for target in ("cuda", "cuda", "cpu")] for options in (greedy, drawn)]
            command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", os.path.join(self.bin, "mtrun"),
                       *map(str, text("cuda", *greedy)[1:]), "--debug-arena", "guard"]
            clean = subprocess.run(command, capture_output=True, text=True, cwd=self.work).returncode if shutil.which(command[0]) else None
            same = [len({*three}) == 1 and len(three[0]) > 50 for three in texts]
            self.note("generate", all(same) and clean in (0, None), model=name, text=texts[0][0], same_twice_and_on_the_cpu=same,
                      memcheck_exit_code=clean)

    def sanitize(self):
        binary = os.path.join(self.bin, "cuda_conformance_test")
        environment = dict(os.environ, MT_DEBUG_ARENA="guard")
        running = []
        start = time.monotonic()
        for tool in self.tools:
            for shard in range(self.shards):
                log = self.path(f"sanitize.{tool}.{shard}.log")
                with open(log, "w") as file:
                    running.append((tool, log, subprocess.Popen(
                        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "100000", "--show-backtrace",
                         "no", binary, "--gtest_filter=" + self.filter],
                        stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                        env=dict(environment, GTEST_TOTAL_SHARDS=str(self.shards), GTEST_SHARD_INDEX=str(shard)))))
        for _, _, process in running:
            try:
                process.wait(max(1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for tool in self.tools:
            passed, failed, unfinished, findings, unseen = [], [], [], [], {}
            for name, log, _ in running:
                if name != tool:
                    continue
                current = None
                with open(log, errors="replace") as file:
                    for line in file:
                        if found := re.match(r"\[ RUN      \] (\S+)", line):
                            current = found.group(1)
                        elif found := re.match(r"\[ +(OK|FAILED|SKIPPED) +\] (\S+) \(\d+ ms\)", line):
                            {"OK": passed, "FAILED": failed, "SKIPPED": []}[found.group(1)].append(found.group(2))
                            current = None
                        # initcheck does not see what the bulk copy engine writes (attention, cuBLASLt) and names it where the
                        # host reads results; that all of them are written is what the test's two poisons show.
                        elif tool == "initcheck" and "Host API memory access error" in line:
                            unseen[current] = unseen.get(current, 0) + 1
                        elif re.match(r"========= .*(Invalid|Misaligned|hazard|Uninitialized __|Barrier error|Program hit|leaked|Error)", line):
                            findings.append(f"{current}: {line[10:].strip()}")
                if current:
                    unfinished.append(current)
            self.note("sanitize", not findings and not failed and not unfinished and bool(passed), tool=tool, arena="guard",
                      passed=len(passed), failed=failed, unfinished=unfinished, findings=len(findings), first_findings=findings[:8],
                      host_reads_of_unseen_writes=unseen,
                      tests=sorted({name.split("/", 1)[-1] for name in passed}), seconds=round(time.monotonic() - start, 1))


CHECKS = ["tests", "prepare", "cold", "measure", "drift", "fit", "errors", "resume", "generate", "sanitize"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="default: all but sanitize")
    parser.add_argument("--bin", default="build/bin", help="folder of mtc, mtrun, mtcorpus and cuda_conformance_test")
    parser.add_argument("--work", default="build/gpu", help="folder for corpora, plans and runs; what is there is used again")
    parser.add_argument("--out", help="appends the JSON lines to this file")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--models", help="of cold, measure and fit, separated by commas")
    parser.add_argument("--filter", default="Rows/*", help="sanitize: of the tests (--gtest_filter)")
    parser.add_argument("--shards", type=int, default=2, help="sanitize: processes for each tool")
    parser.add_argument("--tools", default="memcheck,racecheck,initcheck,synccheck", help="sanitize")
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hold is not None:
        return hold(args.hold)
    if args.ask is not None:
        return ask(args.ask)
    if not set(args.checks) <= set(CHECKS):
        sys.exit(f"error: {', '.join(sorted(set(args.checks) - set(CHECKS)))}: there is no such check; known: {', '.join(CHECKS)}")
    checks = Checks(args)
    checks.machine()
    for name in args.checks or CHECKS[:-1]:
        getattr(checks, name)()
    sys.exit(1 if checks.failed else 0)


if __name__ == "__main__":
    main()
