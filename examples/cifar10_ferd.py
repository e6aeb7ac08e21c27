"""FERD at CIFAR scale: a student from a robust teacher, without data. The test images only measure it.

    python examples/cifar10_ferd.py --teacher runs/train/student.pt --download
    python examples/cifar10_ferd.py --teacher teacher.pt --architecture wide_resnet_34_10 --preset paper
    python examples/cifar10_ferd.py --smoke        # two tiny epochs on generated images, on any machine

`ferdlib distill` is the same job with every option of FERD, with checkpoints, and on several GPUs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ferdlib.attacks import pgd
from ferdlib.evaluation import PROTOCOLS, compare, evaluate
from ferdlib.losses import cross_entropy
from ferdlib.models import build_model, load_checkpoint
from ferdlib.plots import plot_images
from ferdlib.recipes.data import load
from ferdlib.trainer import FERDConfig, FERDTrainer

PRESETS = {"default": FERDConfig, "paper": FERDConfig.paper, "released": FERDConfig.released}
# Two epochs of tiny sizes, to see that everything fits together.
SMOKE = {
    "epochs": 2,
    "warmup_epochs": 1,
    "batch_size": 16,
    "generator_steps": 3,
    "generator_width": 8,
    "bottleneck_steps": 3,
    "student_steps": 3,
    "attack_steps": 3,
    "margin_attack_steps": 3,
}


def tiny_teacher(images):
    """Stand-in for a robust teacher: a few steps of adversarial training on the generated images."""
    teacher = build_model("small_cnn_8", len(images.class_names))
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    x, y = images.batch(slice(None))
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(teacher(pgd(teacher, x, y, steps=3)), y).mean().backward()
        optimizer.step()
    return teacher.eval()


def load_teacher(args, images):
    if args.smoke and args.teacher is None:
        return tiny_teacher(load("generated", split="train"))
    sizes = {"num_classes": len(images.class_names), "in_channels": images.pixels.shape[1]}
    # A checkpoint of ferdlib says itself what it holds.
    return load_checkpoint(args.teacher, architecture=args.architecture, **sizes)


def distil(teacher, student, config, args):
    """The whole of FERD; the loop body could evaluate, save or stop."""
    trainer = FERDTrainer(teacher, student, config=config, seed=args.seed, device=args.device)
    with tqdm(total=config.epochs, desc="FERD", unit="epoch") as bar:
        for stats in trainer.epochs():
            bar.set_postfix_str(
                f"loss {stats.student_loss:.3f}, labels agree {stats.label_agreement:.0%}, "
                f"largest p {max(stats.class_probabilities):.2f}"
            )
            bar.update()
    return trainer


def report(trainer, images, args):
    """Teacher and student under Fair-ARD's attacks, class by class; synthetic images of ten classes."""
    protocol = PROTOCOLS["fair-ard"].at(eps=trainer.config.eps).with_seed(args.seed)
    if not args.autoattack:
        protocol = protocol.without("AutoAttack")
    names = images.class_names
    reports = {
        name: evaluate(
            model, images, protocol, num_classes=len(names), class_names=names, progress=name
        )
        for name, model in {"teacher": trainer.teacher, "student": trainer.student}.items()
    }
    comparison = compare(reports)
    print(f"\n{comparison}\n\n{comparison.test('student', 'teacher', 'PGD-20')}\n")
    print(f"The student, {args.preset}:\n{reports['student']}\n")

    args.out.mkdir(parents=True, exist_ok=True)
    for name, found in reports.items():
        found.save(args.out / f"report-{name}.json")
    content = {
        "architecture": args.student,
        "num_classes": len(names),
        "in_channels": images.pixels.shape[1],
        "state_dict": trainer.student.state_dict(),
    }
    torch.save(content, args.out / "student.pt")
    count = min(len(trainer.pool), 2000)
    x, y = trainer.pool.sample(count, rng=torch.Generator().manual_seed(args.seed))
    shown = y < 10
    axes = plot_images(x[shown], y[shown], num_classes=len(names[:10]), class_names=names[:10])
    axes.figure.savefig(args.out / "synthetic.png", dpi=150)
    print(f"written to {args.out}/: student.pt, both reports, synthetic.png")


def main(args):
    if args.smoke:
        args.data, args.student = "generated", "small_cnn_8"
    images = load(args.data, args.root, "test", download=args.download)
    teacher = load_teacher(args, images)
    torch.manual_seed(args.seed)
    shape = tuple(images.pixels.shape[1:])
    student = build_model(args.student, len(images.class_names), in_channels=shape[0])
    config = PRESETS[args.preset](
        num_classes=len(images.class_names), layer=teacher.feature_layers[-1], image_shape=shape
    )
    config = replace(config, **SMOKE) if args.smoke else config
    report(distil(teacher, student, config, args), images, args)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="checkpoint of a robust model")
    parser.add_argument("--architecture", help="of the teacher, if its file does not say it")
    parser.add_argument("--student", default="resnet18", help="such as mobilenet_v2")
    parser.add_argument("--preset", choices=PRESETS, default="default")
    parser.add_argument("--data", default="cifar10", help="cifar100, svhn, tiny-imagenet, folder")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--download", action="store_true", help="fetch the data")
    parser.add_argument("--autoattack", action="store_true", help="slow on a CPU")
    parser.add_argument("--smoke", action="store_true", help="a trial at tiny sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_ferd"))
    args = parser.parse_args()
    if args.teacher is None and not args.smoke:
        parser.error("expected --teacher FILE, a robust model, or --smoke")
    return args


if __name__ == "__main__":
    main(parse())
