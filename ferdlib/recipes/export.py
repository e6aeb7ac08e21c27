"""`ferdlib export`: an ONNX and a torch.export file of a checkpoint, checked, timed, attacked again.

`student.onnx` runs in onnxruntime, `student.pt2` in torch without this library. Both take any number of
images of the data's size, pixels in [0, 1], and are written only if their logits on test images are the
checkpoint's, to 1e-4. They hold the weights and the graph, no images and no paths of source files.

The last table asks whether the robustness came along. PGD-20 attacks the PyTorch model white-box; the ONNX
file, which gives no gradients but has the same weights, then judges the same images. That is no attack on the
file by itself, and says nothing of a file that is quantised, pruned or run on other hardware afterwards.
"""

from __future__ import annotations

import importlib.util
import io
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ferdlib.attacks import pgd
from ferdlib.checkpoints import write_file
from ferdlib.evaluation import AttackSpec, Protocol, compare, evaluate
from ferdlib.models import load_checkpoint
from ferdlib.recipes.data import Images, load, stratified
from ferdlib.recipes.evaluate import check_folder
from ferdlib.recipes.models import Model, check_model
from ferdlib.recipes.options import Export
from ferdlib.recipes.running import check_ball, command, written

INPUT, OUTPUT = "images", "logits"
# One image, an odd number of them, and the larger of the two batches that are timed.
CHECKED_BATCHES = (1, 7, 64)
TIMED_BATCHES = (1, 64)
TOLERANCE = 1e-4
WARMUP, REPETITIONS = 5, 30
# Images at a time for the attack and its judges.
BATCH = 100


def run(args: Export) -> None:
    """Export, check, write, time, attack."""
    model, images = prepare(args)
    x, y = images.batch(slice(None))
    files = exported(model, x.shape[1:])
    models = opened(files, args.threads)
    differences = check(model, models, x)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(args.out / name, content)
    sizes = {"checkpoint": args.student.stat().st_size, **{k: len(v) for k, v in files.items()}}
    times = {
        size: latencies({"checkpoint": model, **models}, batch_of(x, size), args.threads)
        for size in TIMED_BATCHES
    }
    found = {
        name: {
            "bytes": size,
            "largest difference of logits": differences.get(name, 0.0),
            "median ms": {batch: statistics.median(each[name]) for batch, each in times.items()},
        }
        for name, size in sizes.items()
    }
    write_file(args.out / "export.json", json.dumps(found, indent=1))
    print(f"{INPUT} (batch, {', '.join(map(str, x.shape[1:]))}), float32 in [0, 1] -> {OUTPUT}")
    print(table(sizes, times, differences, args.threads))
    print(judged(model, models["student.onnx"], (x, y), args))
    print(written(args.out, *files, "export.json"))
    shown = {"checkpoint": args.student, "data": args.images.data, "eps": args.eps}
    print(f"attack it with more: {command('evaluate', **shown, seed=args.seed)}")


def prepare(args: Export) -> tuple[nn.Module, Images]:
    """Find everything that can be wrong with the input, before anything is written."""
    packages = ("onnx", "onnxruntime", "onnxscript")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'expected {", ".join(missing)} to be installed; pip install "ferdlib[export]" does it'
        )
    if args.threads < 1:
        raise ValueError(f"expected --threads of at least 1, got {args.threads}")
    check_ball(eps=args.eps, step_size=args.step_size)
    check_folder(args.out)
    images = load(args.images.data, args.images.root, download=args.images.download, seed=args.seed)
    classes = len(images.class_names)
    if not classes <= args.test_images <= len(images):
        raise ValueError(
            f"expected --test-images from {classes}, one of a class, to {len(images)}, all there are, got "
            f"{args.test_images}"
        )
    # A file that does not say its architecture says no other number either.
    sizes = {} if args.architecture is None else images.sizes
    model = load_checkpoint(args.student, architecture=args.architecture, **sizes)
    check_model(model, images.batch(slice(0, 2))[0], classes)
    return model, images.part(stratified(images, args.test_images, args.seed))


def exported(model: nn.Module, shape: torch.Size) -> dict[str, bytes]:
    """Export one graph to the content of both files, for any number of images of a shape `(C, H, W)`."""
    # Zeros, because the example is kept in the file.
    example = torch.zeros(2, *shape)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    # Both formats keep the paths of the source files on the machine that exported.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    pt2 = io.BytesIO()
    torch.export.save(program, pt2)
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert onnx is not None
    return {"student.onnx": onnx.model_proto.SerializeToString(), "student.pt2": pt2.getvalue()}


def opened(files: dict[str, bytes], threads: int) -> dict[str, Model]:
    """Open each file as its user would, as a call from images to logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that wait actively would slow the model that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        files["student.onnx"], options, providers=["CPUExecutionProvider"]
    )
    program = torch.export.load(io.BytesIO(files["student.pt2"])).module()

    def onnx(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])

    return {"student.onnx": onnx, "student.pt2": program}


def batch_of(x: Tensor, size: int) -> Tensor:
    """Images from all over x, some of them repeatedly if there are fewer."""
    return x[torch.arange(size) * len(x) // size]


@torch.no_grad()
def check(model: nn.Module, files: dict[str, Model], x: Tensor) -> dict[str, float]:
    """Largest absolute difference of each file's logits from the model's."""
    differences = dict.fromkeys(files, 0.0)
    for size in CHECKED_BATCHES:
        images = batch_of(x, size)
        logits = model(images)
        allowed = TOLERANCE * min(1.0, float(logits.abs().max()))
        for name, file in files.items():
            found = file(images)
            if found.shape != logits.shape:
                raise ValueError(
                    f"expected logits {tuple(logits.shape)} of {name}, got {tuple(found.shape)}"
                )
            difference = float((found - logits).abs().max())
            # A nan is no agreement either.
            if not difference <= allowed:
                raise ValueError(
                    f"expected {name} to give the checkpoint's logits to {allowed:.2g}, got a difference "
                    f"of {difference:.3g} in a batch of {size}; nothing was written"
                )
            differences[name] = max(differences[name], difference)
    return differences


@torch.no_grad()
def latencies(models: dict[str, Model], x: Tensor, threads: int) -> dict[str, list[float]]:
    """Milliseconds per call, taken in turns, so that whatever else the machine does meets all models."""
    found: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for k in range(-WARMUP, REPETITIONS):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            if k >= 0:
                found[name].append(1000 * (time.perf_counter() - start))
    torch.set_num_threads(before)
    return found


def table(
    sizes: dict[str, int],
    times: dict[int, dict[str, list[float]]],
    differences: dict[str, float],
    threads: int,
) -> str:
    """Table of the files' sizes, times and differences."""
    width = max(map(len, sizes))
    heads = "".join(f" | {f'batch {size}, ms':^26}" for size in times)
    lines = [f"{'':{width}} |  file, KiB{heads} | logits differ by"]
    for name, size in sizes.items():
        row = f"{name:{width}} | {size / 1024:10.1f}"
        for each in times.values():
            low, median, high = statistics.quantiles(each[name], n=4, method="inclusive")
            row += f" | {f'{median:.3f} ({low:.3f}-{high:.3f})':^26}"
        lines.append(row + (f" | {differences[name]:.1e}" if name in differences else " | -"))
    lines.append(
        f"ms: median (quartiles) of {REPETITIONS} calls in turns on a CPU, threads: {threads}"
    )
    return "\n".join(lines)


def judged(model: nn.Module, onnx: Model, data: tuple[Tensor, Tensor], args: Export) -> str:
    """Compare how the model and its ONNX file judge the same images, clean and attacked."""
    rng = torch.Generator().manual_seed(args.seed)
    batches = list(zip(*(each.split(BATCH) for each in data), strict=True))
    ball: Any = {"eps": args.eps, "step_size": args.step_size}
    attacked = [pgd(model, x, y, **ball, steps=20, rng=rng) for x, y in batches]
    # For `evaluate`, an attack of the user: one that hands out these images, whatever the model.
    spec = AttackSpec(name="PGD-20", kind="custom", eps=args.eps)
    judges: dict[str, Model] = {"PyTorch": model, "ONNX": onnx}
    reports = {}
    for row, judge in judges.items():
        left = iter(attacked)

        def next_batch(*_: object, left: Iterator[Tensor] = left) -> Tensor:
            return next(left)

        reports[row] = evaluate(
            judge,
            data,
            Protocol(name="PGD-20 on the PyTorch model", attacks=(spec,)),
            num_classes=int(onnx(data[0][:1]).shape[1]),
            custom={"PGD-20": next_batch},
            batch_size=BATCH,
        )
    ours, theirs = (report.predictions for report in reports.values())
    counts = (f"{column} {int((ours[column] != theirs[column]).sum())}" for column in ours)
    differing = f"predictions that differ, of {len(data[1])}: {', '.join(counts)}"
    return f"\n{compare(reports)}\n\n{differing}"
