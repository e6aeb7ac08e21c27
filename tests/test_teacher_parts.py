"""What FERD asks of a teacher: to be cut where the bottleneck reads it, and BatchNorm where that counts."""

import pytest
import torch
from tiny_ferd import SIZES, make_models
from torch import nn

from ferdlib.trainer import FERDConfig, FERDTrainer

STEPS = {"epochs": 2, "warmup_epochs": 0, "generator_steps": 2, "student_steps": 2}
TINY = SIZES | STEPS | {"bottleneck_steps": 2, "fold_batchnorm": False}


class Untraceable(nn.Module):
    """A network whose path depends on the values of the images, as far as torch.fx knows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x if x.sum() > -1 else -x)

    def features(self, x):
        net = self.net
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))

    def head(self, z):
        return self.net.fc(z.mean((2, 3)))


def trainer(teacher, student=None, *, split=None, **settings):
    config = FERDConfig(**TINY | settings)
    return FERDTrainer(teacher, student or make_models()[1], config=config, split=split)


def test_a_teacher_is_traced_only_for_a_bottleneck_that_runs():
    made = trainer(Untraceable(make_models()[0]), layer=None, fold_batchnorm=True)
    assert len(made.fit()) == 2
    with pytest.raises(
        ValueError, match=r"^split_at: expected `model` to be .* own \(features, head\) pair"
    ):
        trainer(Untraceable(make_models()[0]), layer="net", uniformity_loss_weight=1.0)


def test_parts_of_ones_own_are_as_good_as_a_cut():
    teacher = Untraceable(make_models()[0])
    split = teacher.features, teacher.head
    runs = [
        trainer(make_models()[0], uniformity_loss_weight=1.0),
        trainer(teacher, uniformity_loss_weight=1.0, split=split),
    ]
    for run in runs:
        run.fit()
    for a, b in zip(*(run.student.state_dict().values() for run in runs), strict=True):
        assert torch.equal(a, b)


class Layout(nn.Module):
    """Feature maps of a convolution as other networks have them, and logits of them."""

    def __init__(self, change):
        super().__init__()
        self.norm, self.conv, self.change = nn.BatchNorm2d(1), nn.Conv2d(1, 6, 3, 2, 1), change
        self.keep, self.fc = nn.Identity(), nn.LazyLinear(3)
        self(torch.rand(2, 1, 8, 8))

    def forward(self, x):
        return self.fc(self.keep(self.change(self.conv(self.norm(x)))).flatten(1))


def tokens(z):
    return z.flatten(2).transpose(1, 2)


def channels_last(z):
    return z.permute(0, 2, 3, 1)


PLAIN = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
USED = {"uniformity_loss_weight": 1.0}


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (lambda: Layout(tokens), USED | {"layer": "keep"},
         r"got tokens \(N, L, D\) \(2, 16, 6\); pass a `split` of .*transpose\(1, 2\)\[..., None\]"),
        (lambda: Layout(channels_last), USED | {"layer": "keep"},
         r"got channels-last \(N, H, W, C\) \(2, 4, 4, 6\); pass a `split` of .*permute\(0, 3, 1, 2\)"),
        (lambda: make_models()[0], USED | {"split": (nn.Identity(), lambda z: 2 * make_models()[0].eval()(z))},
         r"`head\(features\(x\)\)` to be the teacher's logits, got logits off by 1 of their size$"),
        (lambda: make_models()[0], USED | {"split": (nn.Identity(), nn.Identity())}, "another kind of"),
        (lambda: make_models()[0], {"split": (len, len)}, "no `split` with `uniformity_loss_weight` 0"),
        (lambda: PLAIN, {}, "`config.bn_loss_weight` 0, got 5 for a teacher without BatchNorm statistics"),
    ],
)  # fmt: skip
def test_a_teacher_that_the_losses_cannot_read_is_refused_at_once(teacher, settings, message):
    with pytest.raises(ValueError, match=f"^FERDTrainer: expected .*{message}"):
        trainer(teacher(), **settings)


def test_batchnorm_is_asked_for_only_of_the_models_whose_statistics_count():
    teacher, _ = make_models()
    with pytest.raises(ValueError, match="got 5 for a student without BatchNorm"):
        trainer(teacher, PLAIN, bn_models="both")
    for models, weight in (((teacher, PLAIN), 5.0), ((PLAIN, make_models()[1]), 0.0)):
        made = trainer(*models, bn_loss_weight=weight, layer=None)
        assert made.synthesize()[0].shape == (12, 1, 8, 8)
