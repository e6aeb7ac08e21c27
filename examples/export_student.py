"""Taking the student away: an ONNX and a torch.export file of a checkpoint, checked, timed, attacked again.

    python examples/export_student.py --student runs/cifar10_ferd/student.pt --data cifar10 --root data
    python examples/export_student.py --student runs/quickstart/student.pt --data digits --eps 0.1

`student.onnx` runs in onnxruntime, `student.pt2` in torch without this library. Both take any number of
images of the data's size, pixels in [0, 1], and are written only if their logits on test images are the
checkpoint's, to 1e-4. They hold the weights and the graph, no images and no paths of source files.

The last table asks whether the robustness came along. PGD-20 attacks the PyTorch model white-box; the ONNX
file, which gives no gradients but has the same weights, then judges the same images. It shows that the
exported file answers as the checkpoint does on attacked images too. It is no attack on the file by itself,
no stronger than PGD-20 (an upper bound of robust accuracy), and says nothing of a file that is quantised,
pruned or run on other hardware afterwards: that is another model, to be attacked anew.
"""

from __future__ import annotations

import importlib.util
import io
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from ferdlib.attacks import pgd
from ferdlib.evaluation import AttackSpec, Protocol, compare, evaluate
from ferdlib.models import load_checkpoint
from image_data import Images, Source, load, stratified

Model = Callable[[Tensor], Tensor]

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT, OUTPUT = "images", "logits"
# One image, an odd number of them, and the larger of the two batches that are timed.
CHECKED_BATCHES = (1, 7, 64)
TIMED_BATCHES = (1, 64)
TOLERANCE = 1e-4
WARMUP, REPETITIONS = 5, 30
ATTACK_STEPS = 20
BATCH = 100  # of the attack and its judges


@dataclass(frozen=True)
class Args:
    """Export a student as ONNX and torch.export files, check them, time them, and attack them again."""

    student: Path
    """Checkpoint with the weights, such as the student.pt or teacher.pt of the other examples."""
    architecture: str | None = None
    """A name that ferdlib.models.build_model knows, such as resnet18; not needed if the file says it."""
    data: Source = "cifar10"
    """Test images: a torchvision data set, "folder" for root/test (or val), or scikit-learn's digits.
    Their height and width, in pixels, are what the exported files take."""
    root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Fetch the data if they are not there."""
    images: int = 500
    """Test images that are attacked, with equal shares of the classes."""
    eps: float = 8 / 255
    """Radius of the L-infinity ball, in units of [0, 1] pixels. Papers: epsilon."""
    step_size: float = 2 / 255
    """Step of PGD-20, same units. Papers: alpha."""
    threads: int = 1
    """CPU threads of PyTorch and onnxruntime while latency is measured."""
    seed: int = 0
    """Of the choice of images and of the attack's start."""
    out: Path = Path("runs/export")
    """Folder for student.onnx and student.pt2."""


def prepare(args: Args) -> tuple[nn.Module, Images]:
    """Everything that can be wrong with the input is found here, before anything is written."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'expected {", ".join(missing)} to be installed; pip install "ferdlib[export]" does it'
        )
    if args.threads < 1:
        raise ValueError(f"expected --threads of at least 1, got {args.threads}")
    if not 0 <= args.eps <= 1 or not 0 <= args.step_size <= 1:
        raise ValueError(
            f"expected --eps and --step-size in units of [0, 1] pixels, got {args.eps} and {args.step_size}"
        )
    images = load(args.data, args.root, "test", download=args.download)
    shape, classes = tuple(images.pixels.shape[1:]), len(images.class_names)
    if not classes <= args.images <= len(images):
        raise ValueError(
            f"expected --images from {classes}, one of a class, to {len(images)}, all there are, got "
            f"{args.images}"
        )
    # A file that does not say its architecture says no other number either.
    own = args.architecture is None
    model = load_checkpoint(
        args.student,
        architecture=args.architecture,
        num_classes=None if own else classes,
        in_channels=None if own else shape[0],
    )
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
    except RuntimeError as error:
        raise ValueError(
            f"expected images of a shape that {str(args.student)!r} takes, got {args.data} with "
            f"{shape}: {error}"
        ) from error
    if logits.shape[1] != classes:
        raise ValueError(
            f"expected test images of the {logits.shape[1]} classes of {str(args.student)!r}, got "
            f"{args.data} with {classes}"
        )
    return model, images.part(stratified(images, args.images, args.seed))


def exported(model: nn.Module, shape: torch.Size) -> dict[str, bytes]:
    """The content of both files, from one graph, for any number of images of a shape `(C, H, W)`."""
    # Zeros, because the example is kept in the file.
    example = torch.zeros(2, *shape)
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    # Both formats keep them: the paths of the source files on the machine that exported.
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    pt2 = io.BytesIO()
    torch.export.save(program, pt2)
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    return {"student.onnx": onnx.model_proto.SerializeToString(), "student.pt2": pt2.getvalue()}


def opened(files: dict[str, bytes], threads: int) -> dict[str, Model]:
    """What a user of each file would call, from images to logits."""
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
    """Largest absolute difference of each file's logits from the model's.

    Raises:
        ValueError: one is above 1e-4; of logits that are all below 1, above that part of the largest.
    """
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
            if not difference <= allowed:  # nan is no agreement either
                raise ValueError(
                    f"expected {name} to give the checkpoint's logits to {allowed:.2g}, got a difference "
                    f"of {difference:.3g} in a batch of {size}; nothing was written"
                )
            differences[name] = max(differences[name], difference)
    return differences


def write(files: dict[str, bytes], folder: Path) -> None:
    """Each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial_files = {folder / name: folder / f"{name}.partial" for name in files}
    try:
        for path, partial_file in partial_files.items():
            partial_file.write_bytes(files[path.name])
        for path, partial_file in partial_files.items():
            os.replace(partial_file, path)
    finally:
        for partial_file in partial_files.values():
            partial_file.unlink(missing_ok=True)


@torch.no_grad()
def latencies(
    models: dict[str, Model], x: Tensor, threads: int, title: str
) -> dict[str, list[float]]:
    """Milliseconds per call, taken in turns, so that whatever else the machine does meets all models."""
    found: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for k in tqdm(range(-WARMUP, REPETITIONS), desc=title, leave=False, disable=None):
        for name, model in models.items():
            start = time.perf_counter()
            model(x)
            if k >= 0:
                found[name].append(1000 * (time.perf_counter() - start))
    torch.set_num_threads(before)
    return found


def print_files(
    sizes: dict[str, int],
    times: dict[int, dict[str, list[float]]],
    differences: dict[str, float],
    threads: int,
) -> None:
    width = max(len(name) for name in sizes)
    batches = "".join(f" | {f'batch {size}, ms':^26}" for size in times)
    print(f"\n{'':{width}} |  file, KiB{batches} | logits differ by")
    print("-" * (width + 32 + 29 * len(times)))
    for name, size in sizes.items():
        row = f"{name:{width}} | {size / 1024:10.1f}"
        for milliseconds in times.values():
            low, median, high = statistics.quantiles(milliseconds[name], n=4, method="inclusive")
            row += f" | {f'{median:.3f} ({low:.3f}-{high:.3f})':^26}"
        print(row + (f" | {differences[name]:.1e}" if name in differences else " | -"))
    print(
        f"ms: median (quartiles) of {REPETITIONS} calls in turns, after {WARMUP} not counted; CPU, "
        f"threads: {threads}"
    )
    print(
        f"logits differ by: at most, from the checkpoint's, in batches of "
        f"{', '.join(map(str, CHECKED_BATCHES))} test images"
    )


def judge(model: nn.Module, onnx: Model, images: Images, args: Args) -> None:
    """Prints how the model and its ONNX file judge the same images, clean and attacked."""
    x, y = images.batch(slice(None))
    rng = torch.Generator().manual_seed(args.seed)
    parts = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    attacked = [
        pgd(model, *part, eps=args.eps, step_size=args.step_size, steps=ATTACK_STEPS, rng=rng)
        for part in tqdm(parts, desc=f"PGD-{ATTACK_STEPS}", leave=False, disable=None)
    ]
    # For `evaluate`, an attack of the user: one that hands out these images, whatever the model.
    name = f"PGD-{ATTACK_STEPS}"
    spec = AttackSpec(name=name, kind="custom", eps=args.eps)
    reports = {}
    for row, judging in {"PyTorch": model, "ONNX": onnx}.items():
        left = iter(attacked)
        reports[row] = evaluate(
            judging,
            (x, y),
            Protocol(name=f"{name} on the PyTorch model", attacks=(spec,)),
            num_classes=len(images.class_names),
            custom={name: lambda _model, _x, _y, left=left: next(left)},
            batch_size=BATCH,
        )
    print(f"\n{compare(reports)}\n")
    ours, theirs = (report.predictions for report in reports.values())
    counted = ", ".join(
        f"{column} {int((ours[column] != theirs[column]).sum())}" for column in ours
    )
    print(f"predictions that differ, of {len(y)}: {counted}")


def main(args: Args) -> None:
    try:
        model, images = prepare(args)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"export_student: {error}")
    x, _ = images.batch(slice(None))
    files = exported(model, x.shape[1:])
    models = opened(files, args.threads)
    try:
        differences = check(model, models, x)
        write(files, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"export_student: {error}")
    print(f"written to {args.out}/: {', '.join(files)}")
    print(
        f"{INPUT} (batch, {', '.join(map(str, x.shape[1:]))}), float32 in [0, 1] -> "
        f"{OUTPUT} (batch, {len(images.class_names)})"
    )
    sizes = {"checkpoint": args.student.stat().st_size}
    sizes |= {name: len(content) for name, content in files.items()}
    timed: dict[str, Model] = {"checkpoint": model, **models}
    times = {
        size: latencies(timed, batch_of(x, size), args.threads, f"latency, batch {size}")
        for size in TIMED_BATCHES
    }
    print_files(sizes, times, differences, args.threads)
    judge(model, models["student.onnx"], images, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
