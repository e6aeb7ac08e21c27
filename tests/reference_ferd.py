"""One epoch of FERD, plain and slow: Algorithm 1 as the paper prints it, and as the authors' release runs it.

Written from the equations, with torch alone but for the cut of the teacher and the augmentation, so that
`FERDTrainer` has something to agree with and something to be faster than. Models are left as an epoch leaves
them, and the student's learning rate is the caller's.

Random numbers are drawn in the trainer's order, and the trainer is followed where the text is silent: Adam
starts anew in every epoch, "select" is the batch of the lowest loss, and lambda is softplus(lambda) in all
of Eq. 4 to 6, with one noise value per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferdlib.augment import crop_flip
from ferdlib.bottleneck import split_at
from ferdlib.trainer import FERDConfig

BETAS = (0.5, 0.999)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What an epoch computed.

    Attributes:
        generator_losses: L_gen (Eq. 9) of each generator step.
        class_probabilities: p for the next epoch's labels, float32 `(K,)`.
        student_losses: L_stu (Eq. 11) of each student step; none in warm-up.
    """

    generator_losses: list[float]
    class_probabilities: Tensor
    student_losses: list[float]


def paper_epoch(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    config: FERDConfig,
    rng: torch.Generator,
    pool: list[Tensor],
    class_probabilities: Tensor,
    optimizer: torch.optim.Optimizer,
) -> EpochRecord:
    """Lines 5 to 17 of Algorithm 1, for `FERDConfig.paper(...)` with any sizes and weights.

    Logits, BatchNorm statistics and features are three passes of the teacher, and nothing is kept from one
    student step to the next. L_adv has the minus sign that the sentence below Eq. 8 asks for. A class without
    samples gets the mean of the others' D.

    Args:
        generator: called with codes and labels.
        rng: source of all randomness.
        pool: D, one tensor of images per epoch so far; this epoch's is appended.
        class_probabilities: p, `(K,)`.
        optimizer: the student's.
    """
    device = next(generator.parameters()).device
    features, head = split_at(teacher, config.layer)
    z = normal((config.batch_size, config.latent_dim), rng).to(device)
    y = draw_labels(class_probabilities, config, rng).to(device)
    adam = torch.optim.Adam(generator.parameters(), lr=config.generator_lr, betas=BETAS)
    generator.train()
    teacher.eval().requires_grad_(False)
    student.eval().requires_grad_(False)
    generator_losses: list[float] = []
    for _ in range(config.generator_steps):
        x = generator(z, y)
        teacher_logits = teacher(x)
        _, teacher_statistics = batchnorm_distance(teacher, teacher, x)
        student_logits, student_statistics = batchnorm_distance(student, student, x)
        maps = features(x)
        sigma = noise_scale(maps, head, y, config, rng, regulariser=lambda r: r.sum(dim=1).mean())
        limit = maps.detach().var(dim=(2, 3)).amax(dim=1, keepdim=True)
        loss = (
            config.adv_loss_weight * -kl(teacher_logits, student_logits).mean()
            + config.bn_loss_weight * (teacher_statistics + student_statistics)
            + config.onehot_loss_weight * F.cross_entropy(teacher_logits, y)
            + config.uniformity_loss_weight * nonrobust_uniformity(maps, head, sigma, limit)
        )
        generator_losses.append(loss.item())
        if generator_losses[-1] == min(generator_losses):
            selected = x.detach()
        adam.zero_grad()
        loss.backward()
        adam.step()
    pool.append(selected)

    d = vulnerability(teacher, selected, y, config, rng)
    d = torch.where(d.isnan(), d.nanmean(), d)
    p = d.softmax(dim=0)

    student.train().requires_grad_(True)
    images = torch.cat(pool)
    student_losses = []
    for _ in range(config.student_steps):
        x = images[torch.randperm(len(images), generator=rng)[: config.batch_size]]
        with torch.no_grad():
            target = teacher(x)
        objective = partial(uniform_target, target=target, gamma=config.gamma)
        x_uniform = ascend(teacher, x, x, objective, config, config.attack_steps)
        student_losses.append(train_student(student, optimizer, x, x_uniform, target, config))
    return EpochRecord(
        generator_losses=generator_losses,
        class_probabilities=p.float().cpu(),
        student_losses=[loss.item() for loss in student_losses],
    )


def released_epoch(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    config: FERDConfig,
    rng: torch.Generator,
    pool: list[Tensor],
    class_probabilities: Tensor,
    optimizer: torch.optim.Optimizer,
) -> EpochRecord:
    """What the release computes in an epoch, for `FERDConfig.released(...)` with any sizes and weights.

    The weights of teacher and student keep their gradients on while images are made, so `backward` fills
    them for nothing. Where the trainer's order is another one, it is the trainer's: labels are not sorted, p
    is updated before the student is trained, every student batch is drawn by itself instead of from a shuffled
    pass over the pool, the attack starts inside [0, 1] and comes before the student's clean pass. The
    release's student loss is the soft cross-entropy; the teacher's entropy, a constant, is subtracted here.

    Args:
        teacher, student: whose `grad` is not None afterwards.
        generator: called with codes alone; drawn anew.
        rng, pool, class_probabilities, optimizer: as for `paper_epoch`.
    """
    device = next(generator.parameters()).device
    features, head = split_at(teacher, config.layer)
    z = normal((config.batch_size, config.latent_dim), rng).to(device).requires_grad_()
    y = draw_labels(class_probabilities, config, rng).to(device)
    draw_weights(generator, rng)
    groups = [
        {"params": generator.parameters(), "lr": config.generator_lr},
        {"params": [z], "lr": config.latent_lr},
    ]
    adam = torch.optim.Adam(groups, betas=BETAS)
    generator.train()
    teacher.eval()
    student.eval()

    def teacher_pass(x: Tensor) -> tuple[Tensor, Tensor]:
        maps = features(x)
        return maps, head(maps)

    generator_losses: list[float] = []
    for _ in range(config.generator_steps):
        made = generator(z)
        x = crop_flip(made, padding=config.crop_padding, rng=rng)
        (maps, teacher_logits), statistics = batchnorm_distance(teacher, teacher_pass, x)
        sigma = noise_scale(maps, head, y, config, rng, regulariser=lambda r: r.mean() / 2)
        limit = maps.detach().var(dim=(2, 3)).max()
        loss = (
            config.adv_loss_weight * -decoupled_kl(teacher_logits, student(x)).mean()
            + config.bn_loss_weight * statistics
            + config.onehot_loss_weight * F.cross_entropy(teacher_logits, y)
            + config.uniformity_loss_weight * nonrobust_uniformity(maps, head, sigma, limit)
        )
        generator_losses.append(loss.item())
        if generator_losses[-1] == min(generator_losses):
            selected = made.detach()
        adam.zero_grad()
        loss.backward()
        adam.step()
    pool.append(selected)

    d = vulnerability(teacher, x.detach(), y, config, rng).nan_to_num(nan=0.0)
    p = 0.05 + (0.2 - 0.05) * (d - d.min()) / (d.max() - d.min())
    p = p / p.sum()

    student.train()
    images = torch.cat(pool)
    student_losses = []
    for _ in range(config.student_steps if len(pool) > config.warmup_epochs else 0):
        x = images[torch.randperm(len(images), generator=rng)[: config.batch_size]]
        x = crop_flip(x, padding=config.crop_padding, rng=rng)
        with torch.no_grad():
            target = teacher(x)
        start = x + 0.001 * normal(x.shape, rng).to(x)
        student.eval()
        x_adv = ascend(student, x, start, partial(kl, target), config, config.attack_steps)
        student.train()
        student_losses.append(train_student(student, optimizer, x, x_adv, target, config))
    return EpochRecord(
        generator_losses=generator_losses,
        class_probabilities=p.float().cpu(),
        student_losses=[loss.item() for loss in student_losses],
    )


def normal(
    shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype | None = None
) -> Tensor:
    return torch.randn(shape, generator=rng, device=rng.device, dtype=dtype)


def draw_labels(class_probabilities: Tensor, config: FERDConfig, rng: torch.Generator) -> Tensor:
    return torch.multinomial(
        class_probabilities, config.batch_size, replacement=True, generator=rng
    )


@torch.no_grad()
def draw_weights(generator: nn.Module, rng: torch.Generator) -> None:
    """N(0, 0.02) for linear and convolution weights, N(1, 0.02) for BatchNorm's, 0 for biases."""
    for layer in generator.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            mean = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
            layer.weight.copy_(mean + 0.02 * normal(layer.weight.shape, rng, layer.weight.dtype))
            if layer.bias is not None:
                layer.bias.zero_()


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each sample."""
    log_p, log_q = p_logits.log_softmax(dim=1), q_logits.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def kl_of_uniform(logits: Tensor) -> Tensor:
    """KL(U || p) of each sample (Eq. 7)."""
    return kl(torch.zeros_like(logits), logits)


def uniform_target(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """What Eq. 10 ascends, of each sample."""
    return kl(target, logits) - gamma * kl_of_uniform(logits)


def decoupled_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """The release's L_adv without its sign: a quarter of all weighted errors of logit gaps, and a soft CE."""
    w = (teacher_logits / 100).softmax(dim=1)
    teacher_gaps = teacher_logits[:, :, None] - teacher_logits[:, None, :]
    student_gaps = student_logits[:, :, None] - student_logits[:, None, :]
    pairs = w[:, :, None] * w[:, None, :] * (teacher_gaps - student_gaps) ** 2
    soft = -teacher_logits.detach().softmax(dim=1) * student_logits.log_softmax(dim=1)
    return 0.25 * pairs.sum(dim=(1, 2)) + soft.sum(dim=1)


def batchnorm_distance(
    model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """`run(x)`, and L_bn (Eq. 8) of the BatchNorm layers of `model` that it passes through."""
    norms = []

    def compare(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        mean = inputs[0].mean(dim=(0, 2, 3))
        variance = inputs[0].var(dim=(0, 2, 3), correction=0)
        norms.append((mean - layer.running_mean).norm() + (variance - layer.running_var).norm())

    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(compare) for layer in layers]
    output = run(x)
    for handle in handles:
        handle.remove()
    return output, torch.stack(norms).sum()


def noise_scale(
    maps: Tensor,
    head: nn.Module,
    y: Tensor,
    config: FERDConfig,
    rng: torch.Generator,
    *,
    regulariser: Callable[[Tensor], Tensor],
) -> Tensor:
    """sigma = softplus(lambda), `(N, C)`, after Adam on Eq. 5; `regulariser` reduces its bracket `(N, C)`."""
    maps = maps.detach()
    v = maps.var(dim=(2, 3)).clamp(
        min=1e-10
    )  # a dead channel has none, and the logarithm needs some
    raw = torch.zeros_like(v, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=config.bottleneck_lr)
    for _ in range(config.bottleneck_steps):
        sigma = F.softplus(raw)
        noise = normal((*sigma.shape, 1, 1), rng, maps.dtype).to(maps.device)
        logits = head(maps + sigma[:, :, None, None] * noise)
        bracket = v / sigma**2 + torch.log(sigma**2 / v) - 1
        loss = F.cross_entropy(logits, y) + config.bottleneck_beta * regulariser(bracket)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return F.softplus(raw).detach()


def nonrobust_uniformity(maps: Tensor, head: nn.Module, sigma: Tensor, limit: Tensor) -> Tensor:
    """L_uni (Eq. 7): the channels whose noise is not above the limit of Eq. 6 alone."""
    nonrobust = 1 - (sigma**2 > limit).to(maps)
    return kl_of_uniform(head(maps * nonrobust[:, :, None, None])).mean()


def vulnerability(
    teacher: nn.Module, x: Tensor, y: Tensor, config: FERDConfig, rng: torch.Generator
) -> Tensor:
    """D of each class (Eq. 1 and 2) after PGD-20 on the teacher; nan for a class without samples."""
    noise = torch.empty(x.shape, dtype=x.dtype, device=rng.device)
    noise.uniform_(-config.eps, config.eps, generator=rng)
    objective = partial(F.cross_entropy, target=y, reduction="none")
    x_adv = ascend(teacher, x, x + noise.to(x), objective, config, config.margin_attack_steps)
    with torch.no_grad():
        logits = teacher(x_adv)
    own = F.one_hot(y, config.num_classes).bool()
    margins = logits[own] - logits.masked_fill(own, -torch.inf).amax(dim=1)
    return torch.stack([-margins[y == c].mean() for c in range(config.num_classes)])


def ascend(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    config: FERDConfig,
    steps: int,
) -> Tensor:
    """Sign steps on the images from `start`, inside the ball around x and [0, 1]."""

    def project(x_adv: Tensor) -> Tensor:
        return (x + (x_adv - x).clamp(-config.eps, config.eps)).clamp(0, 1)

    x_adv = project(start)
    for _ in range(steps):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(objective(model(x_adv)).sum(), x_adv)
        x_adv = project(x_adv.detach() + config.step_size * gradient.sign())
    return x_adv


def train_student(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    x_adv: Tensor,
    target: Tensor,
    config: FERDConfig,
) -> Tensor:
    """One step on Eq. 11; its loss."""
    loss = config.clean_weight * kl(target, student(x)).mean()
    loss = loss + config.adv_weight * kl(target, student(x_adv)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
